"""What no run can have, and what other keys make void: told before any work starts."""

import dataclasses
import difflib
import importlib.util
import os
import re
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from onetrain.checkpoint import fault_injection, resume
from onetrain.config import UserError
from onetrain.files import redact
from onetrain.ops import experts
from onetrain.training.profiler import parse_profile

if TYPE_CHECKING:
    from onetrain.data.order import Order
    from onetrain.model_config import ModelConfig
    from onetrain.training.run_data import RunData
    from train import Config

_MOST = {
    'batch_size': 2**20,
    'gradient_accumulation_steps': 10**6,
    'eval_iters': 2**31,
    'eval_interval': 2**53,
    'log_interval': 2**53,
    'max_iters': 2**53,
    'total_batch_size': 2**40,
    'max_bad_steps': 2**31,
    'dataloader_num_workers': 256,
    'dataloader_prefetch_factor': 1024,
    'timeout_minutes': 10**6,
    'max_time': 10**6,
    'keep_checkpoints': 2**31,
    'context_parallel': 2**20,
    'fsdp_replicas': 2**20,
    'telemetry_interval': 86400,
    'price_per_hour': 10**9,
}


_AT_LEAST_1 = (
    'eval_interval',
    'log_interval',
    'eval_iters',
    'gradient_accumulation_steps',
    'batch_size',
    'block_size',
    'max_iters',
    'keep_checkpoints',
    'log_save_interval',
    'max_bad_steps',
    'fsdp_replicas',
    'context_parallel',
    'dataloader_num_workers',
    'dataloader_prefetch_factor',
)
_AT_LEAST_1_OR_NONE = ('checkpoint_interval', 'upload_keep_local', 'eval_tasks_limit')
_NOT_NEGATIVE = (
    'balance_rate',
    'aux_loss_weight',
    'z_loss_weight',
    'head_z_loss_weight',
    'sample_interval',
    'keep_every',
    'max_time',
    'telemetry_interval',
    'early_stop_patience',
    'price_per_hour',
    'loss_chunk',
    'gradient_log_interval',
    'expert_log_interval',
    'total_batch_size',
    'weight_decay',
    'grad_clip',
    'warmup_iters',
    'min_lr',
    'learning_rate',
)
_BELOW_1 = ('dropout', 'beta1', 'beta2', 'muon_momentum')


def validate(c: 'Config') -> None:
    """Raise UserError for values that no run can have."""
    fault_injection.check()
    parse_profile(c.profile)
    _check_bounds(c)
    _check_reports(c)
    _check_start(c)
    _check_packages(c)


def _check_bounds(c):
    for key in _AT_LEAST_1:
        if getattr(c, key) < 1:
            raise UserError(f'{key}={getattr(c, key)} must be at least 1')
    for key, most in _MOST.items():
        if getattr(c, key) > most:
            raise UserError(f'{key}={getattr(c, key)} must be at most {most:,}')
    for key in _NOT_NEGATIVE:
        if (getattr(c, key) or 0) < 0:
            raise UserError(f'{key}={getattr(c, key)} must not be negative')
    for key in _AT_LEAST_1_OR_NONE:
        if getattr(c, key) is not None and getattr(c, key) < 1:
            raise UserError(f'{key}={getattr(c, key)} must be at least 1, or None')
    for key in _BELOW_1:
        if not 0 <= getattr(c, key) < 1:
            raise UserError(f'{key}={getattr(c, key)} must be at least 0 and below 1')
    if c.spike_factor and c.spike_factor <= 1:
        raise UserError(
            f'spike_factor={c.spike_factor} must be above 1 (it multiplies the median of the'
            ' gradient norm), or 0 for off'
        )
    if c.timeout_minutes <= 0:
        raise UserError(f'timeout_minutes={c.timeout_minutes} must be above 0')
    if not 0 <= c.seed < 2**63:
        raise UserError(f'seed={c.seed} must be at least 0 and below 2**63')


def _check_reports(c):
    if c.notify and not re.match(r'https?://[^\s/]', c.notify):
        raise UserError(
            f'notify={redact(c.notify)!r} is no URL that can be posted to: type one that begins'
            ' with https://'
        )
    if 0 < c.telemetry_interval < 0.01:
        raise UserError(f'telemetry_interval={c.telemetry_interval} must be at least 0.01, or 0')


def _check_start(c):
    """Refuse keys about where a run starts, and where it writes, that contradict each other."""
    if '://' in c.out_dir:
        raise UserError(
            f'out_dir={c.out_dir!r} is a URL, and a run is written to a local folder: type'
            f' --upload_to={c.out_dir} to copy it there'
        )
    if c.auto_resume and resume.is_step(c.resume_from):
        raise UserError(
            f'resume_from={c.resume_from} with auto_resume=True would go back to iteration'
            f' {c.resume_from} at every start: type --init_from=resume'
            f' --resume_from={c.resume_from} once, with --auto_resume=False'
        )
    if (
        not os.path.exists(c.init_from)
        and (meant := difflib.get_close_matches(c.init_from, ['scratch', 'resume'], 1, 0.75))
        and c.init_from not in meant
    ):
        raise UserError(f'init_from={c.init_from!r} is no folder, did you mean {meant[0]!r}')
    if c.upcycle and c.init_from == 'scratch':
        raise UserError(
            'upcycle=True needs --init_from with the Hugging Face folder or id of a dense model'
            ' (export.py makes one of a run)'
        )
    if c.resume_from and c.init_from != 'resume' and not c.auto_resume:
        raise UserError(
            f'resume_from={c.resume_from!r} needs --init_from=resume or --auto_resume=True'
        )


def _check_packages(c):
    for key, package in (
        ('wandb_log', 'wandb'),
        ('trackio_log', 'trackio'),
        ('tensorboard_log', 'tensorboard'),
    ):
        if (
            getattr(c, key)
            and package not in sys.modules
            and importlib.util.find_spec(package) is None
        ):
            raise UserError(
                f'{key}=True needs the package {package}: pip install {package}, or leave it out'
            )


def warn_about_data(
    c: 'Config',
    data: 'RunData',
    start_step: int,
    order: 'Order',
    sequences_per_step: int,
    notes: list[str],
) -> None:
    """Warn of a run that reads its data too often, evaluates on too little, or has no learning rate
    left. order: of order.order_of().
    """
    if c.decay_lr and start_step and c.lr_decay_iters <= start_step < c.max_iters:
        notes.append(
            f'WARNING: all {c.max_iters - start_step:,} iterations run at min_lr={c.min_lr:g},'
            f' since iteration {c.lr_decay_iters:,} (lr_decay_iters) has passed:'
            f' --lr_decay_iters={c.max_iters} lowers it by a longer cosine'
        )
    epochs = c.max_iters * sequences_per_step / order.per_epoch
    if epochs > 4 and not c.eval_only:
        notes.append(
            f'WARNING: {epochs:,.1f} epochs of the data: more than about 4 passes over the data'
            ' help little'
        )
    windows = data.val.evaluation_starts(c.block_size, c.eval_iters * c.batch_size)
    seen = set(data.val.sources_of(windows).tolist())
    for number, name in enumerate(data.sources):
        if number not in seen and len(data.sources) > 1:
            notes.append(
                f'WARNING: no evaluation sees {name}, whose share of {len(windows)} sequences is'
                ' none, or which has none: raise --eval_iters'
            )
    validation = (len(data.val) - 1) // c.block_size
    if validation < c.eval_iters * c.batch_size:
        notes.append(
            f'WARNING: the validation set has {validation:,} sequences, fewer than the'
            f' {c.eval_iters * c.batch_size:,} of an evaluation: each evaluation takes all of it'
        )


def warn_about_learning_rate(
    before: dict, c: 'Config', step: int, learning_rate: Callable, notes: list[str]
) -> None:
    """Warn where the learning rate of a resumed run jumps. before: the config of its checkpoint, a
    dict; learning_rate: function of a config and an iteration.
    """
    old = {
        **dataclasses.asdict(c),
        **{key: value for key, value in before.items() if hasattr(c, key)},
    }
    was, now = learning_rate(type(c)(**old), max(0, step - 1)), learning_rate(c, step)
    if was > 0 and not 0.8 <= now / was <= 1.25:
        notes.append(
            f'WARNING: the learning rate goes from {was:.2e} to {now:.2e}, by the schedule of'
            ' learning_rate, warmup_iters, lr_decay_iters and min_lr'
        )


def warn_about_schedule(c: 'Config', notes: list) -> None:
    """Note a learning rate that hardly does what its keys are for."""
    if c.decay_lr and c.warmup_iters >= c.max_iters and c.init_from != 'resume':
        notes.append(
            f'WARNING: the learning rate never leaves its warm-up: warmup_iters={c.warmup_iters},'
            f' max_iters={c.max_iters}'
        )
    if c.decay_lr and c.min_lr > c.learning_rate:
        notes.append(
            f'the learning rate rises after the warm-up: min_lr={c.min_lr} is above'
            f' learning_rate={c.learning_rate}'
        )


def validate_cuda_graphs(
    c: 'Config', device_type: str, dispatch: str | None, notes: list[str]
) -> bool:
    """Return whether micro-steps are recorded as CUDA graphs. Raises UserError for steps that
    cannot be; where there is no GPU, notes that it does without. dispatch: of experts, or None.
    """
    if not c.use_cuda_graphs:
        return False
    if dispatch == 'grouped' and experts.syncs_host(device_type):
        raise UserError(
            'use_cuda_graphs=True cannot record experts on this GPU, whose grouped matmul waits for'
            ' the host (compute capability 9.0 and 10.0 have one that does not): type'
            ' --use_cuda_graphs=False'
        )
    for there, what, instead in (
        (
            c.use_fsdp,
            'FSDP, which gathers and frees parameters in between',
            '--use_fsdp=False (--use_zero1=True shares out the optimizer state)',
        ),
        (
            c.context_parallel > 1,
            f'context_parallel={c.context_parallel}, whose ranks send each other keys and values',
            '--context_parallel=1',
        ),
        (
            dispatch == 'loop',
            'expert_dispatch=loop, which asks for the tokens of each expert',
            '--expert_dispatch=grouped with --dtype=bfloat16',
        ),
    ):
        if there:
            raise UserError(
                f'use_cuda_graphs=True cannot record {what}: type --use_cuda_graphs=False, or'
                f' {instead}'
            )
    if device_type != 'cuda':
        notes.append(
            'use_cuda_graphs=True needs an NVIDIA GPU: running without; the results are the same'
        )
    return device_type == 'cuda'


def require_eot_id(c: 'Config', meta: dict) -> int:
    """Return the token after which documents are kept apart. Raises UserError where the data set
    has none.
    """
    if meta.get('eot_id') is None:
        raise UserError(
            f'document_mask=True needs an end-of-text token, and the meta.pkl of {c.dataset} names'
            ' none: prepare it with a tokenizer that has one, or leave --document_mask out'
        )
    return meta['eot_id']


def validate_context_parallel(c: 'Config', shape: 'ModelConfig'):
    """Raise UserError for what attention and experts cannot do when a sequence is spread over
    ranks.
    """
    for there, key in (
        (any(shape.windows), 'sliding_window'),
        (shape.attention_sinks, 'attention_sinks'),
        (c.document_mask, 'document_mask'),
    ):
        if there:
            raise UserError(
                f'context_parallel={c.context_parallel} knows plain causal attention only, not'
                f' {key}: type --context_parallel=1'
            )
    if shape.num_experts and c.block_size % (2 * c.context_parallel):
        raise UserError(
            f'a mixture of experts with context_parallel={c.context_parallel} needs a block_size'
            f' that {2 * c.context_parallel} divides, not {c.block_size}: type'
            f' --block_size={-(-c.block_size // (2 * c.context_parallel)) * 2 * c.context_parallel}'
        )


def warn_ignored_keys(
    c: 'Config', given: dict[str, str], shape: 'ModelConfig', routing: tuple, notes: list[str]
) -> None:
    """Note the keys that were given and that other keys make void. shape: the resolved one;
    routing: the keys of a mixture of experts.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(c)}
    for condition, reason, keys in (
        (
            not c.use_fsdp,
            'without use_fsdp=True',
            [key for key in defaults if key.startswith('fsdp_')],
        ),
        (c.optimizer != 'muon', 'without optimizer=muon', ('muon_momentum',)),
        (
            not c.use_dataloader,
            'without use_dataloader=True',
            ('dataloader_num_workers', 'dataloader_prefetch_factor'),
        ),
        (not c.wandb_log, 'without wandb_log=True', ('wandb_project', 'wandb_run_name')),
        (not c.decay_lr, 'with decay_lr=False', ('warmup_iters', 'min_lr', 'lr_decay_iters')),
        (not c.upload_to, 'without upload_to', ('upload_keep_local',)),
        (not c.eval_tasks, 'without eval_tasks', ('eval_tasks_limit',)),
        (
            shape.position_encoding != 'rope',
            f'with position_encoding={shape.position_encoding}',
            ('rope_theta', 'rotary_pct'),
        ),
        (
            shape.rope_scaling == 'none',
            'without rope_scaling',
            [
                key
                for key in defaults
                if key.startswith('rope_') and key not in ('rope_theta', 'rope_scaling')
            ],
        ),
        (not shape.sliding_window, 'without sliding_window', ('window_pattern',)),
        (
            not shape.num_experts,
            'without num_experts',
            (
                *routing,
                'balance_rate',
                'aux_loss_weight',
                'z_loss_weight',
                'expert_dispatch',
                'expert_log_interval',
            ),
        ),
    ):
        # a recipe may name them all, so that one word on the command line turns them on
        notes += [
            f'{key} has no effect {reason}'
            for key in keys
            if condition and given.get(key) == 'command line' and getattr(c, key) != defaults[key]
        ]


def accumulation_steps(c: 'Config', world_size: int) -> int:
    """Micro-steps per iteration on each rank. Raises UserError if total_batch_size is no multiple
    of one micro-step.
    """
    if not c.total_batch_size:
        return c.gradient_accumulation_steps
    micro_step = c.batch_size * c.block_size * world_size
    if c.total_batch_size % micro_step:
        below = c.total_batch_size // micro_step * micro_step
        near = ' or '.join(str(value) for value in (below, below + micro_step) if value)
        sizes = [
            size
            for size in range(c.batch_size, 0, -1)
            if c.total_batch_size % (size * c.block_size * world_size) == 0
        ][:1]
        counts = [
            str(n)
            for n in range(1, 2 * world_size)
            if c.total_batch_size % (c.batch_size * c.block_size * n) == 0
        ]
        raise UserError(
            f'total_batch_size={c.total_batch_size} is not a multiple of batch_size {c.batch_size}'
            f' x block_size {c.block_size} x {world_size} ranks = {micro_step} tokens: type'
            f' --total_batch_size={near}'
            + ''.join(f', or --batch_size={size}' for size in sizes)
            + (
                f', or share the sequences of a micro-step among {" or ".join(counts)} ranks'
                if counts and world_size > 1
                else ''
            )
        )
    steps = c.total_batch_size // micro_step
    if steps > _MOST['gradient_accumulation_steps']:
        raise UserError(
            f'total_batch_size={c.total_batch_size} is {steps:,} micro-steps of {micro_step}'
            ' tokens: type a smaller one, or a larger --batch_size'
        )
    return steps
