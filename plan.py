"""
Tell what a run needs, how long it takes and what it costs, without data, GPU or weights.

    python plan.py config/full_llama3_1.5b_optimal.py --gpus=8xA100-80 --tokens=100e9 --price=1.80
    python plan.py config/full_llama3_8b.py --gpus=8xA100-80,8xH200 --batch_size=4
    python plan.py config/demo_pystdlib.py --like=out-demo --iters=20000
    python plan.py --budget=1.36e21 --preset=llama3 --to=config/mine.py --plot=budget.png
    python plan.py --fit out-a out-b out-c out-d out-e out-f --to=law.json

Keys of train.py (--key=value) change the recipe. Memory is predicted for training without
torch.compile, which takes less. Losses are predicted for the text and the tokenizer that a law was
fitted on: losses of different tokenizers do not compare.
"""

import argparse
import sys

from onetrain.command_line import ROOT, ArgumentParser, importing, number, run_command, whole

if __name__ == '__main__':
    imported = importing('torch')

import dataclasses
import json
import os
import re

from onetrain import huggingface
from onetrain.config import UserError, nearest, resolve
from onetrain.data.dataset import open_dataset
from onetrain.files import is_whole, replacing
from onetrain.logs.read_log import load_runs
from onetrain.logs.read_log import number as number_of
from onetrain.logs.terminal import Terminal
from onetrain.model_config import PRESETS, resolve_shape
from onetrain.planning import budget, pictures, scaling_laws
from onetrain.planning.machines import parse_machines
from onetrain.planning.memory_table import MemoryTable
from onetrain.planning.recipe_plan import RecipePlan, compare_lines, plan_lines
from onetrain.planning.time_and_cost import assumed_speeds
from onetrain.training.memory import SHARE
from train import ALIASES, SHAPE_KEYS, Config

if __name__ == '__main__':
    imported()

# what each kind of plan takes beside --json
OF_RECIPE = 'gpus price price_per_hour mfu like iters_per_hour tokens iters hours dollars law'
OF_BUDGET = 'gpus price price_per_hour mfu hours dollars law budget preset chinchilla as_guide'
OF_BUDGET += ' layers ratio to plot'
OF_FIT = 'fit to plot'
LENGTHS = ('tokens', 'iters', 'hours', 'dollars')
FAMILIES = ('llama', 'llama3', 'qwen3')


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv`; returns the exit code."""
    parser = ArgumentParser(description=__doc__, usage='%(prog)s [config/file.py ...] [options]')
    machine = parser.add_argument_group('machine')
    machine.add_argument('--gpus', help='such as 8xA100-80, or several to compare: 8xH100,2x24GB')
    machine.add_argument(
        '--price', type=prices, help='dollars for an hour of one GPU; of several kinds: 1.80,2.50'
    )
    machine.add_argument('--price_per_hour', type=number(), help='dollars for an hour of them all')
    speed = parser.add_argument_group('speed, at most one; default: 30, 40 and 50 % MFU')
    speed.add_argument('--mfu', type=number(most=1), help='such as 0.4')
    speed.add_argument('--like', help='run folder or log: the median of its last half')
    speed.add_argument('--iters_per_hour', type=number(), help='as measured elsewhere')
    length = parser.add_argument_group("length, at most one; default: the recipe's max_iters")
    length.add_argument('--tokens', type=token_count, help='such as 100e9 or 100B')
    length.add_argument('--iters', type=whole(most=10**12), help='such as 50000')
    length.add_argument('--hours', type=number(), help='of training and evaluations')
    length.add_argument('--dollars', type=number(most=1e12), help='that may be spent')
    law = parser.add_argument_group('scaling laws')
    law.add_argument('--law', help='hoffmann (the default), besiroglu or a file of --fit')
    law.add_argument('--fit', nargs='+', metavar='RUN', help='fit a law to the logs of these runs')
    law.add_argument('--budget', type=number(most=1e30), help='FLOPs: find the best model for them')
    law.add_argument('--preset', choices=FAMILIES, help='family of that model')
    law.add_argument(
        '--chinchilla', action='store_true', help='only models with 10 to 30 tokens per parameter'
    )
    law.add_argument(
        '--as_guide', action='store_true', help='count as was done for the shipped recipes'
    )
    law.add_argument('--layers', help='numbers of layers to try, such as 24,32 (default: 16 to 62)')
    law.add_argument('--ratio', type=number(0.24, 64), help='d_ff over n_embd (default: 3.5)')
    law.add_argument('--to', help='file to write: a config file (--budget), a law (--fit)')
    parser.add_argument('--plot', metavar='FILE.png', help='picture of --budget or --fit')
    parser.add_argument('--json', action='store_true', help='print JSON instead of text')
    return run_command(lambda argv: run(*parser.parse_known_args(argv)), argv)


def run(args: argparse.Namespace, words: list[str]) -> int:
    """Print the plan that `args` ask for; words: config files and keys of train.py. Returns the
    exit code. Raises UserError.
    """
    for names in (LENGTHS, ('mfu', 'like', 'iters_per_hour'), ('price', 'price_per_hour')):
        given = [f'--{name}' for name in names if getattr(args, name) is not None]
        if len(given) > 1:
            raise UserError(f'{" and ".join(given)} say the same thing: type one of them')
    if args.fit:
        kind, allowed, work = '--fit', OF_FIT, fit_law
    elif args.budget is not None or args.preset:
        kind, allowed, work = '--budget and --preset', OF_BUDGET, best_model
    else:
        kind, allowed, work = 'a recipe', OF_RECIPE, plan_recipe
    for name, value in vars(args).items():
        if value == '':
            raise UserError(f'--{name}= is empty: leave it out, or type what it should be')
        if value not in (None, False) and name not in ('json', *allowed.split()):
            raise UserError(f'--{name} does not go with {kind}: leave it out')
    _check_targets(args)
    lines, found = work(args, words)
    print(json.dumps(found, indent=1) if args.json else '\n'.join(lines))
    return 0


def plan_recipe(args: argparse.Namespace, words: list[str]) -> tuple[list[str], dict]:
    """Return (lines, JSON) of the plan for a recipe."""
    options = [f'--{name}' for name in vars(args)]
    keys = [f'--{field.name}' for field in dataclasses.fields(Config)]
    for word in words:
        key = word.split('=')[0]
        if key.startswith('-') and key not in [*keys, *(f'--{alias}' for alias in ALIASES)]:
            raise UserError(
                f'unknown option {key}{nearest(key, [*options, *keys])}; `--help` lists those of'
                ' plan.py, `python train.py --help=all` the keys of a recipe'
            )
    if not any(not word.startswith('-') for word in words):
        raise UserError(
            'no config file is given: type one, such as config/full_llama_1.36b.py, or --budget'
            ' with --preset for the best model'
        )
    config, given = resolve(Config, words, ALIASES)
    if config.init_from == 'resume':
        raise UserError(
            'a plan is made of a recipe, not of a run: type its config file with'
            ' --init_from=scratch'
        )
    if config.init_from != 'scratch':  # whose shape is that of the weights
        config, _ = huggingface.resolve_source(config, given, SHAPE_KEYS)
    config, tokens = with_data(config, args.like)
    if args.gpus is not None and config.device == 'cpu':
        raise UserError('device=cpu does not go with --gpus: leave one of them out')
    if config.eval_only:
        raise UserError('eval_only=True trains nothing that could be planned: leave it out')
    law = scaling_laws.read_law(args.law or 'hoffmann')
    machines = parse_machines(args.gpus) if args.gpus is not None else [None]
    price = args.price or [None]
    if len(price) not in (1, len(machines)):
        raise UserError(f'--price has {len(price)} prices for {len(machines)} kinds of machine')
    price = price * len(machines) if len(price) == 1 else price
    terminal = Terminal(file=sys.stderr)
    files = [word for word in words if not word.startswith('-')]
    typed = [word for word in words if word.startswith('-')]
    plans: list[RecipePlan] = []
    for machine, dollars in zip(machines, price):
        with terminal.doing('predicting the memory' + (f' of {machine.name}' if machine else '')):
            table = plans[0].table if plans else None
            plan = RecipePlan(
                config, machine, args, law, price=dollars, data_tokens=tokens, table=table
            )
        if plans and all(getattr(args, name) is None for name in LENGTHS):
            plan.fix_tokens(plans[0].tokens)
        plans.append(plan)
    terminal.close()
    command = [*files, *typed]
    lines = compare_lines(plans) if len(plans) > 1 else plan_lines(plans[0], command)
    found = [plan.record(command) for plan in plans]
    return lines, found[0] if len(plans) == 1 else {'machines': found}


def with_data(config: Config, like: str | None) -> tuple[Config, int | None]:
    """Return (config with the vocabulary of its data set, tokens of that), as far as it is prepared
    here; else with the vocabulary of the run `like`.
    """
    try:
        train, _, meta = open_dataset(config.dataset, ROOT)
    except (UserError, OSError):
        vocabulary = load_runs([like])[-1].config.get('vocab_size') if like else None
        if config.vocab_size is None and is_whole(vocabulary, 1, 2**30):
            config = dataclasses.replace(config, vocab_size=vocabulary)
        return config, None
    vocabulary = meta.get('vocab_size')
    if config.vocab_size is None and vocabulary:
        config = dataclasses.replace(config, vocab_size=vocabulary)
    return config, len(train)


def best_model(args: argparse.Namespace, words: list[str]) -> tuple[list[str], dict]:
    """Return (lines, JSON) of the model with the least predicted loss for a budget, and write what
    is asked for.
    """
    if words:
        raise UserError(
            f'{words[0]!r} does not go with --budget, which looks for a model itself: type'
            f' --preset={"|".join(FAMILIES)}'
        )
    machines = parse_machines(args.gpus) if args.gpus is not None else []
    if len(machines) > 1:
        raise UserError(f'--gpus={args.gpus}: a model is looked for on one machine')
    given = [
        name
        for name in ('mfu', 'hours', 'dollars', 'price', 'price_per_hour')
        if getattr(args, name)
    ]
    if args.budget is not None and given:
        raise UserError(f'--{given[0]} does not go with --budget, which says how much is computed')
    total = args.budget if args.budget is not None else _machine_budget(args, machines)
    grid = budget.Grid(args.preset or 'llama3', _layers(args.layers), args.ratio or 3.5)
    law = scaling_laws.read_law(args.law or 'hoffmann')
    look = budget.candidates_of_recipes if args.as_guide else budget.candidates
    terminal = Terminal(file=sys.stderr)
    with terminal.doing('computing the size of each shape'):
        found = look(grid, total, law, args.chinchilla)
    with terminal.doing('looking for a model that fits'):
        chosen = next((c for c in found if not machines or _fits(c, grid, machines[0])), None)
    terminal.close()
    if chosen is None:
        raise UserError(f'no model of the grid fits into {machines[0].describe()}')
    tried = sum(1 for _ in grid.shapes())
    lines = _budget_lines(grid, chosen, tried, len(found), total, law)
    if args.to:
        command = f'python train.py {args.to}'
        name = os.path.splitext(os.path.basename(args.to))[0]
        _write(args.to, budget.recipe(grid, chosen, name, command))
        lines.append(f'Next:        python plan.py {args.to} --gpus=8xH100')
    if args.plot:
        pictures.draw_budget(found, chosen, total, law, args.plot)
        lines.append(f'Picture:     {args.plot}')
    record = {
        'law': dataclasses.asdict(law),
        'tried': tried,
        'kept': len(found),
        'budget': total,
        'best': budget.record(chosen),
    }
    return lines, record


def _budget_lines(grid, chosen, tried, kept, total, law):
    """Return what is said of the best model."""
    vocabulary = PRESETS[grid.preset]['vocab_size']
    some = '' if kept == tried else f', {kept} kept'
    lines = [
        f'Tried:       {tried} shapes of {grid.preset} at {total:.3g} FLOPs{some}',
        f'             context {grid.block_size}, vocabulary {vocabulary:,}',
        f'Best:        {chosen.describe()}',
        f'             {chosen.n_head} heads, {budget.KEY_VALUE_HEADS} of keys and values',
        f'             {chosen.parameters:,} parameters',
        f'             {chosen.tokens / 1e9:.3f} B tokens,'
        f' {chosen.tokens / chosen.parameters:.1f} per parameter',
        f'             {chosen.flops:.3g} FLOPs, all matmuls counted',
        f'             {chosen.loss:.6f} nats per token by the law {law.name}',
    ]
    if chosen.n_layer in (min(grid.layers), max(grid.layers)):
        lines.append('             (the law knows sizes, not shapes: the layers are at an edge)')
    return lines


def _machine_budget(args, machines):
    """Return the FLOPs that the given machine does in the given hours, or for the given dollars."""
    hours = args.hours
    if len(machines) == 1 and args.dollars is not None:
        price = args.price_per_hour or (args.price and args.price[0] * machines[0].count)
        if not price:
            raise UserError('--dollars needs --price (of a GPU and hour) or --price_per_hour')
        hours = args.dollars / price
    if len(machines) != 1 or hours is None:
        raise UserError(
            '--preset needs --budget in FLOPs, or one machine as --gpus with --hours or --dollars'
        )
    if args.mfu is None:
        raise UserError('--preset with --hours or --dollars needs --mfu, such as --mfu=0.4')
    speeds = assumed_speeds(machines[0], 'bfloat16', args.mfu)
    if not speeds:
        raise UserError(f'the peak of {machines[0].describe()} is not known: type --budget')
    return speeds[0].flops_per_sec * 3600 * hours


def _layers(text):
    """Return the numbers of layers to try."""
    if text is None:
        return budget.LAYERS
    try:
        return sorted({whole(most=1000)(word) for word in text.split(',')})
    except argparse.ArgumentTypeError as error:
        raise UserError(f'--layers={text}: {error}') from None


def _fits(candidate, grid, machine):
    """Return whether a step of one sequence fits without offload, where all is computed twice."""
    if 16 * candidate.parameters / machine.count > SHARE * machine.memory:  # the state alone
        return False
    keys = grid.keys(candidate.n_layer, candidate.n_embd, candidate.head_dim, candidate.d_ff)
    config = Config(**keys, batch_size=1, dtype='bfloat16')
    return MemoryTable(config, resolve_shape(keys)).fits(machine)


def _check_targets(args):
    """Raise UserError for files that could not be written after the work."""
    for name in ('to', 'plot'):
        path = getattr(args, name)
        folder = path and (os.path.dirname(path) or '.')
        if path and not os.path.isdir(folder):
            raise UserError(f'--{name}={path}: there is no folder {folder}')
    if args.to and os.path.lexists(args.to):
        raise UserError(f'--to={args.to} exists: type another name, or remove it')
    if args.plot and not args.plot.lower().endswith(('.png', '.pdf', '.svg')):
        raise UserError(f'--plot={args.plot}: type a name that ends with .png, .pdf or .svg')


def token_count(text: str) -> float:
    """Return a number of tokens, such as 100e9 or 100B."""
    match = re.fullmatch(r'(\d{1,12}(?:\.\d{1,12})?)([kMBT])', text)
    scale = {'k': 1e3, 'M': 1e6, 'B': 1e9, 'T': 1e12}
    if match:
        text = repr(float(match[1]) * scale[match[2]])
    return number(0.99, 1e16)(text)


def prices(text: str) -> list[float]:
    """Return the prices of an hour of each kind of GPU."""
    return [number()(word) for word in text.split(',')]


def _write(path, text):
    with replacing(path) as f:
        f.write(text.encode())


def fit_law(args: argparse.Namespace, words: list[str]) -> tuple[list[str], dict]:
    """Return (lines, JSON) of the law that fits the last evaluations of runs, and write what is
    asked for.
    """
    if words:
        raise UserError(f'{words[0]!r} does not go with --fit')
    points = []
    for run in load_runs(args.fit):
        size = number_of((run.startup_info.get('model') or {}).get('total_params'))
        if len(run.eval_iters) and size > 0:
            at = run.iters <= run.eval_iters[-1]
            seen = run.columns['tokens_seen'][at]
            if len(seen):
                points.append((size, float(seen[-1]), float(run.eval_val_loss[-1])))
    terminal = Terminal(file=sys.stderr)
    with terminal.doing('fitting the law'):
        found = scaling_laws.fit(points)
    terminal.close()
    law = found.law
    lines = [f'L(N, D) = E + A / N^alpha + B / D^beta, fitted to {len(points)} runs']
    for name, (low, high) in found.intervals.items():
        value = getattr(law, name)
        lines.append(f'{name:>8} = {value:.6g}  ({low:.6g} to {high:.6g} in 90 % of resamples)')
    lines.append(f'largest deviation of a run: {100 * found.largest_deviation:.2f} %')
    if args.to:
        constants = {k: v for k, v in dataclasses.asdict(law).items() if k != 'name'}
        _write(args.to, json.dumps(constants, indent=1))
        lines.append(f'Next: python plan.py --budget=1e21 --preset=llama3 --law={args.to}')
    if args.plot:
        pictures.draw_fit(points, law, args.plot)
        lines.append(f'Picture: {args.plot}')
    return lines, {**dataclasses.asdict(found), 'runs': points}


if __name__ == '__main__':
    sys.exit(main())
