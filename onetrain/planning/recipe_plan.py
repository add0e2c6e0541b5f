"""The plan of a recipe: its model, data, memory, time and cost, in words and for JSON."""

import argparse
import dataclasses
import math
import shlex
import textwrap
from typing import TYPE_CHECKING

from model import Model
from onetrain.config import UserError
from onetrain.logs.terminal import duration, short_number
from onetrain.model_config import resolve_shape
from onetrain.planning import time_and_cost
from onetrain.planning.machines import PER_NODE
from onetrain.planning.memory_table import RECOMPUTATIONS, MemoryTable
from onetrain.planning.scaling_laws import TOKENS_PER_PARAMETER
from onetrain.training import validate
from onetrain.training.memory import SHARE, NotPredicted
from onetrain.training.outputs import checkpoint_bytes
from onetrain.training.startup_report import group_lines

if TYPE_CHECKING:
    from onetrain.planning.machines import Machine
    from onetrain.planning.scaling_laws import Law
    from train import Config

WIDTH = 80


class RecipePlan:
    """What a recipe takes on a machine (None: only what does not depend on one).

    c: train.Config; args: options of plan.py; law: predicts the loss; price: dollars for an hour of
    one GPU; data_tokens: of the training split, where it is prepared; table: that of another
    machine for the same recipe. Raises UserError for what no run can have, or what `args` leave
    open.
    """

    def __init__(
        self,
        c: 'Config',
        machine: 'Machine | None',
        args: argparse.Namespace,
        law: 'Law',
        *,
        price: float | None = None,
        data_tokens: int | None = None,
        table: MemoryTable | None = None,
    ):
        validate.validate(dataclasses.replace(c, out_dir='out', init_from='scratch'))
        self.given = c
        c = dataclasses.replace(c, dtype=c.dtype or 'bfloat16') if machine else c
        if c.fsdp_activation_checkpointing and c.use_fsdp:
            c = dataclasses.replace(c, activation_checkpointing='full')
        self.config, self.machine, self.args, self.law = c, machine, args, law
        self.shape = resolve_shape(dataclasses.asdict(c))
        self.model = Model.on_meta(self.shape)
        self.counts, self.flops = self.model.parameter_counts(), self.model.flops()
        self.count = machine.count if machine else 1
        self.vocabulary_assumed = c.vocab_size is None
        self.problem: str | None = None
        self.choices, self.best, self.why = [], None, ''
        self.data_tokens = data_tokens
        self.price = (
            args.price_per_hour or (price and price * self.count) or c.price_per_hour or None
        )
        self.speeds = self._speeds()
        self._check_length()
        self.table = table
        if machine:
            self._memory(machine)
        self.batch_size = self.best.batch_size if self.best else c.batch_size
        self.fix_length()

    @property
    def tokens_per_iter(self) -> int:
        """Return the tokens of an iteration over all GPUs."""
        c = self.config
        return c.total_batch_size or (
            c.batch_size * c.gradient_accumulation_steps * c.block_size * self.count
        )

    def sequences(self, context_parallel: int) -> int:
        """Return the sequences of an iteration on each rank. Raises UserError."""
        c, ranks = self.config, self.count // context_parallel
        share = c.block_size * ranks
        if self.tokens_per_iter % share:
            below = self.tokens_per_iter // share * share
            raise UserError(
                f'total_batch_size={c.total_batch_size} cannot be shared by {ranks} ranks in'
                f' sequences of {c.block_size} tokens: type'
                f' --total_batch_size={" or ".join(str(n) for n in (below, below + share) if n)}'
            )
        return self.tokens_per_iter // share

    def _memory(self, machine):
        """Fill the table of memory, and choose from it."""
        try:
            self.table = self.table or MemoryTable(self.config, self.shape)
            self.choices = self.table.fill(machine, self.sequences)
            if found := self.table.best(self.choices, machine, self.sequences):
                self.best, self.why = found
            else:
                least = min(self.choices, key=lambda choice: choice.bytes)
                self.problem = (
                    f'nothing fits: a sequence takes {least.bytes / 1e9:.1f} GB of each GPU at'
                    ' least: take more or larger GPUs, or a smaller --block_size'
                )
        except NotPredicted as error:
            self.problem = str(error)

    def _speeds(self):
        """Return the speeds at which the time is told, [] where none is known."""
        args, machine, dtype = self.args, self.machine, self.config.dtype or 'float32'
        if args.like:
            return [time_and_cost.measured_speed(args.like, machine, dtype)]
        if args.iters_per_hour:
            rate = args.iters_per_hour / 3600 * self.tokens_per_iter * self.flops.total
            return [time_and_cost.Speed(rate, None, f'{args.iters_per_hour:g} iterations an hour')]
        if machine is None:
            if args.mfu:
                raise UserError('--mfu needs --gpus, such as --gpus=8xH100')
            return []
        speeds = time_and_cost.assumed_speeds(machine, dtype, args.mfu)
        if not speeds and args.mfu:
            raise UserError(
                f'--mfu={args.mfu:g}: the peak of {machine.describe()} in {dtype} is not known'
            )
        return speeds

    def _check_length(self):
        """Raise UserError where the length that was asked for cannot be told."""
        args = self.args
        if args.dollars is not None and not self.price:
            raise UserError('--dollars needs --price (of a GPU and hour) or --price_per_hour')
        if (args.hours is not None or args.dollars is not None) and not self.speeds:
            raise UserError(
                'how many tokens the hours are needs a speed: type --gpus of a kind that is known,'
                ' --like or --iters_per_hour'
            )

    def fix_length(self) -> None:
        """Compute tokens, time and cost from the length that was asked for."""
        args, hours = self.args, self.args.hours
        if args.dollars is not None:
            assert self.price
            hours = args.dollars / self.price
        tokens = args.tokens
        if tokens is None and hours is None:
            tokens = (args.iters or self.config.max_iters) * self.tokens_per_iter
        batch = self.batch_size, self.tokens_per_iter
        self.estimates = [
            time_and_cost.estimate(
                speed,
                self.flops.total,
                # an iterations_per_hour holds all that a run does
                evaluations=0.0
                if args.iters_per_hour
                else time_and_cost.evaluation_share(self.config, speed, self.flops.total, *batch),
                price_per_hour=self.price,
                tokens=tokens,
                hours=hours,
            )
            for speed in self.speeds
        ]
        # of several speeds the middle one stands for the run, the slowest where the time is limited
        number = len(self.estimates) // 2 if hours is None else 0
        self.estimate = self.estimates[number] if self.estimates else None
        if tokens is None:
            assert self.estimate
            tokens = self.estimate.tokens
        self.tokens = tokens

    def fix_tokens(self, tokens: float) -> None:
        """Have the run take as many tokens as another."""
        self.args = argparse.Namespace(**{**vars(self.args), 'tokens': tokens})
        self.fix_length()

    @property
    def iterations(self) -> int:
        """Return the iterations of the run."""
        return max(1, -int(-self.tokens // self.tokens_per_iter))

    @property
    def loss(self) -> float:
        """Return the loss that the law predicts, in nats per token."""
        return self.law.loss(self.counts['total'], self.tokens)

    @property
    def checkpoint_bytes(self) -> int:
        """Return the size of one checkpoint."""
        return checkpoint_bytes(self.model, self.config)

    @property
    def checkpoints_kept(self) -> int | None:
        """Return how many checkpoints lie on the disk at most, None where all stay."""
        c = self.config
        if c.keep_all_checkpoints:
            return None
        spaced = self.iterations // c.keep_every if c.keep_every else 0
        return c.keep_checkpoints + spaced + 1  # and the best

    @property
    def bytes_per_token(self) -> int:
        """Return the size of a token in a .bin file."""
        return 2 if self.shape.vocab_size <= 2**16 else 4

    def parameters_by_role(self) -> dict[str, int]:
        """Return {'embedding', 'attention', 'feed_forward', 'head', 'norms'}: numbers of
        parameters; a tied head has none.
        """
        found = dict.fromkeys(('embedding', 'attention', 'feed_forward', 'head', 'norms'), 0)
        for name, p in self.model.named_parameters():
            role = (
                'embedding'
                if '.wte.' in name or '.wpe.' in name
                else 'head'
                if name.startswith('lm_head')
                else 'attention'
                if '.attn.' in name
                else 'feed_forward'
                if '.mlp.' in name
                else 'norms'
            )
            found[role] += p.numel()
        return found

    def changes(self) -> dict:
        """Return {key: value} of what the command of train.py gets beside the recipe."""
        c, keys = self.given, {}
        if self.best:
            layout = {
                **self.best.layout.keys,
                'activation_checkpointing': self.best.recomputation,
                'batch_size': self.best.batch_size,
            }
            if self.best.layout.keys['use_fsdp'] or self.best.layout.keys['context_parallel'] > 1:
                layout['use_cuda_graphs'] = False
            if c.fsdp_activation_checkpointing:
                layout['fsdp_activation_checkpointing'] = None
            keys |= {key: value for key, value in layout.items() if getattr(c, key) != value}
            if 'batch_size' in keys or self.count > 1:
                keys['total_batch_size'] = self.tokens_per_iter
        if self.iterations != c.max_iters:
            keys['max_iters'] = self.iterations
            if c.decay_lr:
                keys['lr_decay_iters'] = self.iterations
        return keys

    def commands(self, words: list[str]) -> list[str]:
        """Return lines of shell that start the run, on as many machines as planned and on two.

        words: config files and keys, as typed.
        """
        machine = self.machine
        if machine is None or self.best is None:
            return []
        changes = self.changes()
        typed = [w for w in words if w.removeprefix('--').split('=')[0] not in changes]
        lines = ['RUN=(train.py']
        for word in map(shlex.quote, [*typed, *(f'--{k}={v}' for k, v in changes.items())]):
            if len(lines[-1]) + len(word) > WIDTH - 3 - 11 * (len(lines) == 1):
                lines.append(word)
            else:
                lines[-1] += f' {word}'
        lines[-1] += ')'
        if machine.count == 1:
            return [*lines, 'python "${RUN[@]}"']
        each = min(machine.count, PER_NODE)
        nodes = machine.nodes
        if nodes == 1:
            lines.append(f'torchrun --standalone --nproc_per_node={each} "${{RUN[@]}}"')
        more = max(2, nodes)
        ranks = more * each // self.best.layout.keys['context_parallel']
        sequences, rest = divmod(self.tokens_per_iter, self.config.block_size * ranks)
        if sequences and not rest:
            size = math.gcd(sequences, self.best.batch_size)
            other = f' --batch_size={size}' if size != self.best.batch_size else ''
            lines += [
                f'torchrun --nnodes={more} --nproc_per_node={each} --rdzv_backend=c10d \\',
                f'  --rdzv_endpoint=FIRST_HOST:29500 "${{RUN[@]}}"{other}  # {more} nodes',
            ]
        per_node = f' --gpus-per-node={each}' if each != PER_NODE else ''
        return [*lines, f'sbatch --nodes={nodes}{per_node} scripts/train.sbatch "${{RUN[@]:1}}"']

    def record(self, words: list[str]) -> dict:
        """Return the plan for JSON. words: as of commands()."""
        return {
            'machine': self.machine and self.machine.describe(),
            'parameters': {**self.counts, **self.parameters_by_role()},
            'architecture': self.shape.describe(),
            'flops_per_token': self.flops.total,
            'flops_per_token_causal': self.flops.causal,
            'flops': self.flops.total * self.tokens,
            'tokens': self.tokens,
            'tokens_per_iter': self.tokens_per_iter,
            'iterations': self.iterations,
            'data_tokens': self.data_tokens,
            'data_bytes': self.tokens * self.bytes_per_token,
            'checkpoint_bytes': self.checkpoint_bytes,
            'checkpoints_kept': self.checkpoints_kept,
            'law': dataclasses.asdict(self.law),
            'loss': self.loss,
            'loss_extrapolated': not self.law.covers(self.counts['total'], self.tokens),
            'chinchilla_tokens': TOKENS_PER_PARAMETER * self.counts['total'],
            'memory': [_choice_record(choice) for choice in self.choices],
            'best': self.best and {**_choice_record(self.best), 'why': self.why},
            'problem': self.problem,
            'estimates': [dataclasses.asdict(found) for found in self.estimates],
            'command': self.commands(words),
        }


def _choice_record(choice):
    return {
        'layout': choice.layout.name,
        'activation_checkpointing': choice.recomputation,
        'batch_size': choice.batch_size,
        'gigabytes': choice.bytes / 1e9,
    }


def _money(dollars):
    if dollars >= 1e7:
        return f'${dollars / 1e6:,.0f} M'
    return f'${dollars:,.2f}' if dollars < 100 else f'${dollars:,.0f}'


def _hours(hours):
    return f'{hours:,.1f} h' + (f' ({duration(hours * 3600)})' if hours >= 48 else '')


def _ratio(value):
    return f'{value:,.0f}' if value >= 1000 else f'{value:.3g}'


def _disk(size):
    return f'{size / 1e12:.2f} TB' if size >= 1e12 else f'{size / 1e9:.2f} GB'


def _short(count):
    """Return such as '1.54 B', '263 M' or '76 k'."""
    for size, unit in ((1e12, 'T'), (1e9, 'B'), (1e6, 'M'), (1e3, 'k')):
        if count >= size:
            scaled = count / size
            return f'{scaled:.0f} {unit}' if scaled >= 100 else f'{scaled:.3g} {unit}'
    return f'{count:.0f}'


def _model_phrases(plan):
    names = {'feed_forward': 'MLP'}
    roles = ', '.join(
        f'{names.get(name, name)} {_short(count)}'
        for name, count in plan.parameters_by_role().items()
        if count > plan.counts['total'] / 1000
    )
    counts = plan.counts
    active = f' ({_short(counts["active"])} active)' if plan.shape.num_experts else ''
    assumed = ''
    if plan.vocabulary_assumed:
        assumed = f', with a vocabulary of {plan.shape.vocab_size:,}, which is assumed'
    return [
        plan.shape.describe(),
        f'{_short(counts["total"])} parameters{active}{assumed}',
        roles,
        f'{plan.flops.total / 1e9:.3g} GFLOPs per token ({plan.flops.causal / 1e9:.3g} causal)',
    ]


def _data_phrases(plan):
    kept = plan.checkpoints_kept
    if kept is None:  # all stay
        kept = max(1, plan.iterations // (plan.config.save_interval or plan.iterations))
    return [
        f'{plan.iterations:,} iterations x {plan.tokens_per_iter:,} = {_short(plan.tokens)} tokens,'
        f' {_ratio(plan.tokens / plan.counts["total"])} per parameter',
        f'{_epochs(plan)} ({plan.bytes_per_token} bytes a token)',
        f'{kept} checkpoints x {_disk(plan.checkpoint_bytes)}',
    ]


def _epochs(plan):
    """Return what the data takes on the disk, and how often it is read where it is prepared."""
    if not plan.data_tokens:
        return f'read once, {_disk(plan.tokens * plan.bytes_per_token)}'
    epochs = plan.tokens / plan.data_tokens
    return f'{_ratio(epochs)} epochs of {_disk(plan.data_tokens * plan.bytes_per_token)}'


def _loss_phrases(plan):
    best = TOKENS_PER_PARAMETER * plan.counts['total']
    covered = plan.law.covers(plan.counts['total'], plan.tokens)
    return [
        f'{plan.loss:.4f} predicted by {plan.law.name}'
        if covered
        else f'{plan.law.name} has no such runs',
        f'{TOKENS_PER_PARAMETER} tokens per parameter are {_short(best)}',
    ]


def _memory_lines(plan):
    """Return the table: for each layout and recomputation the largest batch, and its gigabytes."""
    if not plan.choices:
        return []
    room = f'batch (of {SHARE * plan.machine.memory / 1e9:.1f} GB)'
    cells = ''.join(f'{how:<15}' for how in RECOMPUTATIONS)
    lines = [f'Memory:      {room:<22}{cells}'.rstrip()]
    best = plan.best and (plan.best.layout.name, plan.best.recomputation)
    for name in dict.fromkeys(choice.layout.name for choice in plan.choices):
        cells = ''
        for choice in plan.choices:
            if choice.layout.name == name:
                mark = '*' if best == (name, choice.recomputation) else ''
                size = str(choice.batch_size or '-')
                cells += f'{f"{size} ({choice.bytes / 1e9:.1f}){mark}":<15}'
        lines.append(f'{"":13}{name:<22}{cells}'.rstrip())
    if plan.best:
        phrase = f'* {plan.best.batch_size} ({plan.best.bytes / 1e9:.1f} GB): {plan.why}'
        lines += [f'{"":13}{line}' for line in textwrap.wrap(phrase, WIDTH - 13)]
    return lines


def _time_phrases(plan):
    found = []
    for estimate in plan.estimates:
        speed = estimate.speed.describe()
        words = [f'{speed}: {short_number(estimate.tokens_per_sec)} tok/s']
        if plan.args.hours is not None or plan.args.dollars is not None:
            words += [f'{_short(estimate.tokens)} tokens', f'{estimate.hours:,.1f} h']
        else:
            words.append(_hours(estimate.hours))
        if estimate.dollars is not None:
            words.append(_money(estimate.dollars))
        found.append(', '.join(words))
    return found


def plan_lines(plan: RecipePlan, words: list[str]) -> list[str]:
    """Return the plan for people. words: config files and keys, as typed."""
    lines = group_lines('Model', _model_phrases(plan), WIDTH)
    lines += group_lines('Data', _data_phrases(plan), WIDTH)
    lines += group_lines('Loss', _loss_phrases(plan), WIDTH)
    if plan.machine:
        lines += _memory_lines(plan)
    if plan.problem:
        lines += [f'{"":13}{line}' for line in textwrap.wrap(plan.problem, WIDTH - 13)]
    for i, phrase in enumerate(_time_phrases(plan)):
        lines.append(f'{"" if i else "Time:":13}{phrase}')
    if plan.machine and not plan.estimates:
        lines.append(f'Time:        not known for {plan.machine.name}: type --iters_per_hour')
    if plan.machine is None and not plan.estimates:
        lines.append('Time:        type --gpus, such as --gpus=8xA100-80 (and --price), or --like')
    lines = [
        part
        for line in lines
        for part in textwrap.wrap(line, WIDTH, subsequent_indent=' ' * 13, drop_whitespace=True)
    ]
    for i, command in enumerate(plan.commands(words)):
        lines.append(f'  {command}' if i else f'Start:       {command}')
    return lines


def compare_lines(plans: list[RecipePlan]) -> list[str]:
    """Return one line for each of several machines."""
    first = plans[0]
    speeds = [plan.estimate.speed.describe() for plan in plans if plan.estimate]
    lines = group_lines('Model', _model_phrases(first), WIDTH)
    if first.args.tokens is not None:
        lines.append(f'Tokens:      {_short(first.tokens)} on each machine')
    lines += [
        f'Each machine as it does best{f", at {speeds[0]}" if speeds else ""}:',
        f'{"":15} {"layout":<13} {"recompute":<9} {"batch":>5} {"GB":>6} {"tokens":>8}'
        f' {"hours":>9} {"cost":>8}',
    ]
    for plan in plans:
        name = plan.machine.describe() if plan.machine else ''
        best, estimate = plan.best, plan.estimate
        if best is None:
            lines.append(f'{name:<15} {plan.problem}'.split(': take')[0][:WIDTH])
            continue
        # what is offloaded does not come near the MFU that is assumed
        above = '>' if best.layout.name == 'offload' else ''
        hours = (
            above + (f'{estimate.hours:,.1f}' if estimate.hours < 1e5 else f'{estimate.hours:.1e}')
            if estimate
            else '-'
        )
        cost = (
            above + _money(estimate.dollars) if estimate and estimate.dollars is not None else '-'
        )
        layout = best.layout.name.replace(' parallel', '')
        lines.append(
            f'{name:<15} {layout:<13} {best.recomputation:<9} {best.batch_size:>5}'
            f' {best.bytes / 1e9:>6.1f} {_short(plan.tokens):>8} {hours:>9} {cost:>8}'
        )
    if any(plan.best and plan.best.layout.name == 'offload' for plan in plans):
        lines.append(
            'offload: what the GPUs cannot hold lies in the CPU, at a fraction of that MFU'
        )
    return lines
