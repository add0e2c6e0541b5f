"""Draw one run: loss, learning rate, gradient norm, throughput and MFU, memory; experts and tasks
where it has them.

    python plots/plot_single_run.py out-llama-1.36b
    cd plots && python plot_single_run.py ../out-llama-1.36b/run_*.json

The picture is saved beside the newest log that was read (run_X.png), and its path is printed. A new
panel is a function (axes, run, window) that draws it, and a line in PANELS with the columns it
needs.
"""

# first, so that a Ctrl-C while libraries are imported ends this without a traceback
from onetrain.command_line import ArgumentParser, run_command

# isort: split
import argparse
import sys
import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter, StrMethodFormatter

from onetrain.config import UserError
from onetrain.files import replacing
from onetrain.logs.read_log import cleaned, load_runs

if TYPE_CHECKING:
    from onetrain.logs.read_log import Run

BLUE, ORANGE, GREEN, PURPLE, GRAY = '#2f6690', '#d1603d', '#4a8c5c', '#7a5c99', '#808080'
STYLE = {
    'font.size': 10,
    'axes.titlesize': 11,
    'axes.titleweight': 'bold',
    'axes.titlelocation': 'left',
    'axes.labelsize': 10,
    'axes.spines.top': False,
    'axes.spines.right': False,
    'axes.edgecolor': '#666666',
    'axes.grid': True,
    'axes.axisbelow': True,
    'grid.color': '#e4e4e4',
    'grid.linewidth': 0.7,
    'lines.linewidth': 1.5,
    'legend.fontsize': 9,
    'legend.frameon': True,
    'legend.framealpha': 0.85,
    'legend.edgecolor': 'none',
    'text.parse_math': False,
}


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Return the centered moving average over `window` entries, fewer at both ends; entries that
    are not finite count for nothing.
    """
    finite = np.isfinite(values)
    total = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    count = np.concatenate([[0], np.cumsum(finite)])
    first = np.maximum(np.arange(len(values)) - window // 2, 0)
    last = np.minimum(np.arange(len(values)) + (window + 1) // 2, len(values))
    counts = count[last] - count[first]
    return np.where(finite, (total[last] - total[first]) / np.maximum(counts, 1), np.nan)


def default_window(run: 'Run') -> int:
    """Return records to average over when the user does not say: one fortieth of the run, an odd
    number, at most 201.
    """
    return 1 + 2 * min(len(run.iters) // 80, 100)


def set_limits(axes: Any, *curves) -> None:
    """y-limits that show every curve and where it ends, but not rare high values: the first losses
    would flatten the rest.
    """
    finite = [curve[np.isfinite(curve)] for curve in curves]
    curves = tuple(curve for curve in finite if len(curve))
    if not curves:
        return
    low = min(curve.min() for curve in curves)
    high = max(max(usual_top(curve), curve[-1]) for curve in curves)
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1
    axes.set_ylim(low - margin, high + margin)


def usual_top(curve: np.ndarray) -> float:
    """Return the highest value but for outliers: 2.5 sigma above the median for plain noise, the
    late part of the descent for a loss.
    """
    if len(curve) < 20:
        return curve.max()
    median, high = np.percentile(curve, (50, 95))
    return min(curve.max(), high + 0.5 * (high - median))


def trained(eval_loss: np.ndarray) -> np.ndarray:
    """Return the evaluations without the first, which may be that of the untrained model; all of
    them if they are few.
    """
    return eval_loss[1:] if len(eval_loss) > 3 else eval_loss


def scaled(values: np.ndarray) -> tuple:
    """Return the divisor and word that keep the ticks of large counts short, such as (1e9, '
    (billions)').
    """
    largest = np.nanmax(values)
    for divisor, word in (
        (1e12, 'trillions'),
        (1e9, 'billions'),
        (1e6, 'millions'),
        (1e3, 'thousands'),
    ):
        if largest >= divisor:
            return divisor, f' ({word})'
    return 1, ''


def plot_line(axes: Any, x: np.ndarray, y: np.ndarray, **style) -> None:
    """A line through the finite values only: with a marker where there are too few points for a
    line to be seen.
    """
    finite = np.isfinite(y)
    marker = 'o' if finite.sum() < 12 else None
    axes.plot(x[finite], y[finite], marker=marker, markersize=4, **style)


def plot_smoothed(axes: Any, run: 'Run', name: str, window: int, **style) -> None:
    """A column as a faint raw line under its moving average."""
    draw_raw(axes, run, name, window > 1, style['color'])
    plot_line(axes, run.iters, smooth(run.column(name), window), **style)


def draw_raw(
    axes: Any, run: 'Run', name: str, always: bool, color: str, divisor: float = 1
) -> None:
    """Draw every value of a column as a faint line, or only if some are no entries of it."""
    iters, values = run.raw(name)
    if always or len(iters) > len(run.iters):
        axes.plot(iters, values / divisor, color=color, alpha=0.3, linewidth=0.8)


def draw_marks(
    axes: Any, run: 'Run', resume: str | None = None, checkpoint: str | None = None
) -> None:
    """Resumes as dashed lines, checkpoints as short strokes at the foot of the panel; with these
    labels in its legend.
    """
    foot = axes.get_xaxis_transform()
    if len(run.resumes):
        axes.vlines(
            run.resumes,
            0,
            1,
            transform=foot,
            color=PURPLE,
            linewidth=1,
            linestyle=(0, (4, 3)),
            zorder=1,
            label=resume,
        )
    if len(run.checkpoints):
        axes.vlines(
            run.checkpoints,
            0,
            0.06,
            transform=foot,
            color='#333333',
            linewidth=1.3,
            label=checkpoint,
        )


def draw_loss(axes: Any, run: 'Run', window: int) -> None:
    """Draw training and validation loss."""
    plot_smoothed(
        axes,
        run,
        'loss',
        window,
        color=BLUE,
        label='train' if window == 1 else f'train (mean of {window} records)',
    )
    if len(run.eval_iters):
        axes.plot(
            run.eval_iters, run.eval_val_loss, 'o-', color=ORANGE, markersize=4, label='validation'
        )
        mark_best(axes, run)
    draw_marks(axes, run, resume='resume', checkpoint='checkpoint')
    set_limits(axes, run.column('loss'), trained(run.eval_val_loss))
    axes.set(title='Loss', ylabel='loss (nats per token)')
    add_perplexity(axes)
    axes.legend(loc='upper right')


def mark_best(axes: Any, run: 'Run') -> None:
    """A ring around the best evaluation, with its value and where it is."""
    if not np.isfinite(run.eval_val_loss).any():
        return
    best = int(np.nanargmin(run.eval_val_loss))
    at, value = run.eval_iters[best], run.eval_val_loss[best]
    axes.plot(
        [at], [value], 'o', color='none', markeredgecolor=ORANGE, markeredgewidth=1.6, markersize=11
    )
    late = at > (run.iters[0] + run.iters[-1]) / 2 if len(run.iters) else False
    axes.annotate(
        f'best {value:.4f} at {at:,.0f}',
        (at, value),
        xytext=(-12 if late else 12, 16),
        textcoords='offset points',
        color=ORANGE,
        fontweight='bold',
        ha='right' if late else 'left',
        va='bottom',
        bbox={'boxstyle': 'round,pad=0.2', 'fc': 'white', 'ec': 'none', 'alpha': 0.85},
    )


def add_perplexity(axes: Any) -> None:
    """A right-hand axis with exp(loss), its ticks at round perplexities."""
    low, high = axes.get_ylim()
    if high > 50:
        return  # a perplexity of e^50 tells nobody anything
    if high - low > 1.6:
        steps = (1, 2, 5) if high - low < 8 else (1,)
        ticks = np.array([step * 10.0**power for power in range(-1, 23) for step in steps])
    else:
        ticks = MaxNLocator(6).tick_values(np.exp(low), np.exp(high))
    ticks = ticks[(ticks >= np.exp(low)) & (ticks <= np.exp(high))]
    right = axes.secondary_yaxis('right')
    right.set_yticks(
        np.log(ticks), labels=[f'{tick:,.0f}' if tick >= 1000 else f'{tick:.4g}' for tick in ticks]
    )
    right.set_ylabel('perplexity')
    right.spines['right'].set_visible(True)


def draw_lr(axes: Any, run: 'Run', window: int) -> None:
    """Draw the learning rate."""
    plot_line(axes, run.iters, run.column('lr'), color=BLUE)
    axes.set(title='Learning rate', ylabel='learning rate')
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f'{value:.3g}'))


def draw_grad_norm(axes: Any, run: 'Run', window: int) -> None:
    """Draw the norm of the gradient."""
    plot_smoothed(axes, run, 'gradients.global_norm', window, color=BLUE, label='all parameters')
    mean, low, high = (
        run.column(f'gradients.{kind}_layer_norm') for kind in ('mean', 'min', 'max')
    )
    if np.isfinite(mean).any():
        plot_line(axes, run.iters, mean, color=ORANGE, label='layers: mean')
    both = np.isfinite(low) & np.isfinite(high)
    if both.any():
        axes.fill_between(
            run.iters[both],
            low[both],
            high[both],
            color=ORANGE,
            alpha=0.2,
            linewidth=0,
            label='layers: min to max',
        )
    norms = np.concatenate([run.column('gradients.global_norm'), mean, low, high])
    norms = norms[np.isfinite(norms) & (norms > 0)]
    axes.set(title='Gradient norm', ylabel='gradient norm, before clipping')
    if len(norms) and np.percentile(norms, 99) > 30 * np.percentile(norms, 1):
        axes.set(yscale='log', ylabel='gradient norm, before clipping (log)')
        axes.yaxis.set_major_formatter(StrMethodFormatter('{x:g}'))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        set_limits(axes, run.column('gradients.global_norm'), high, low)
    if np.isfinite(mean).any() or both.any():
        axes.legend(loc='upper right')


def draw_throughput(axes: Any, run: 'Run', window: int) -> None:
    """Draw tokens per second and MFU."""
    speed, mfu = run.column('tokens_per_sec'), run.column('mfu_percent')
    title = 'Throughput'
    if run.has('tokens_per_sec'):
        divisor, word = scaled(speed)
        draw_raw(axes, run, 'tokens_per_sec', False, BLUE, divisor)
        plot_line(axes, run.iters, speed / divisor, color=BLUE)
        axes.set_ylabel(f'tokens per second{word}', color=BLUE)
        axes.set_ylim(0, 1.15 * np.nanpercentile(speed, 99) / divisor)
    if run.has('mfu_percent'):
        right = axes
        if run.has('tokens_per_sec'):
            right = axes.twinx()
            right.spines['right'].set_visible(True)
            right.grid(False)
        plot_line(right, run.iters, mfu, color=ORANGE)
        right.set_ylabel('MFU (%)', color=ORANGE)
        # MFU is proportional to the speed: another headroom keeps the two lines apart
        right.set_ylim(0, 1.6 * np.nanpercentile(mfu, 99))
        title += ' and MFU'
    elif run.mfu_unknown:
        title += ' (MFU unknown for this device)'
    axes.set_title(title)


def draw_memory(axes: Any, run: 'Run', window: int) -> None:
    """Draw the memory in use."""
    drawn = []
    for name, label, color, line in (
        ('max_allocated', 'allocated, peak', BLUE, '-'),
        ('allocated', 'allocated', BLUE, '--'),
        ('max_reserved', 'reserved, peak', GREEN, '-'),
        ('reserved', 'reserved', GREEN, '--'),
    ):
        values = run.column(f'memory.{name}_gb')
        # two lines in one place tell nothing
        if run.has(f'memory.{name}_gb') and not any(
            np.allclose(values, other, rtol=0.02, equal_nan=True) for other in drawn
        ):
            plot_line(axes, run.iters, values, color=color, linestyle=line, label=label)
            drawn.append(values)
    axes.set(title='Memory' if len(drawn) > 1 else 'Memory, peak', ylabel='memory (GB)')
    axes.set_ylim(0, 1.1 * max((np.nanmax(values) for values in drawn), default=1) or 1)
    if len(drawn) > 1:
        axes.legend(loc='lower right', ncols=2)


def draw_load(axes: Any, run: 'Run', window: int) -> None:
    """Draw how evenly experts are loaded."""
    for layer in run.each(r'moe\.layers\.\d+\.load_score'):
        plot_line(axes, run.iters, layer, color=BLUE, alpha=0.3, linewidth=0.8)
    plot_line(
        axes,
        run.iters,
        run.column('moe.load_score'),
        color=BLUE,
        linewidth=2,
        label='mean of the layers',
    )
    dropped = sum(np.nan_to_num(layer) for layer in run.each(r'moe\.layers\.\d+\.dropped'))
    axes.set(
        title=f'Experts: load score ({int(np.sum(dropped))} tokens dropped)',
        ylabel='100 × least / most tokens',
        ylim=(0, 100),
    )
    axes.legend(loc='lower right')


def draw_utilization(axes: Any, run: 'Run', window: int) -> None:
    """Draw the share of the tokens that each expert got."""
    layers, experts = run.expert_shares.shape
    times = run.expert_shares * experts
    image = axes.imshow(
        times, aspect='auto', cmap='RdBu_r', vmin=0, vmax=2, interpolation='nearest'
    )
    axes.figure.colorbar(image, ax=axes, label='tokens / fair share')
    layer_numbers = [
        int(column[np.isfinite(column)][0]) for column in run.each(r'moe\.layers\.\d+\.layer')
    ]
    axes.set(
        title=f'Experts: share of the tokens at iteration {run.shares_at:,}',
        ylabel='layer',
        yticks=range(layers),
        yticklabels=layer_numbers,
    )
    axes.grid(False)


def draw_router(axes: Any, run: 'Run', window: int) -> None:
    """Draw the losses of the router."""
    low, high = (run.each(rf'moe\.layers\.\d+\.bias_{end}') for end in ('min', 'max'))
    axes.fill_between(
        run.iters,
        np.min(low, axis=0),
        np.max(high, axis=0),
        color=GRAY,
        alpha=0.3,
        label='balancing bias, all layers',
    )
    axes.set(title='Experts: balancing bias and entropy of the router', ylabel='bias')
    right = axes.twinx()
    for layer in run.each(r'moe\.layers\.\d+\.entropy'):
        plot_line(right, run.iters, layer, color=PURPLE, alpha=0.5, linewidth=0.9)
    if experts := run.expert_shares.shape[1]:
        right.axhline(np.log(experts), color=PURPLE, linestyle=':', linewidth=1)
    right.set_ylabel('entropy (nats; dotted: uniform)', color=PURPLE)
    right.grid(False)
    axes.legend(loc='lower left')


def draw_tasks(axes: Any, run: 'Run', window: int) -> None:
    """Draw the accuracy of multiple-choice tasks."""
    for number, (name, values) in enumerate(run.eval_tasks.items()):
        plot_line(
            axes,
            run.eval_iters,
            100 * values,
            color=(BLUE, ORANGE, GREEN, PURPLE, GRAY)[number % 5],
            label=name,
        )
    axes.set(title='Multiple-choice tasks', ylabel='right answers (%, by length)')
    axes.legend(loc='best')


# columns of which one must hold data, and the function that draws them
PANELS = [
    (('loss',), draw_loss),
    (('lr',), draw_lr),
    (('gradients.global_norm',), draw_grad_norm),
    (('tokens_per_sec', 'mfu_percent'), draw_throughput),
    (
        (
            'memory.allocated_gb',
            'memory.reserved_gb',
            'memory.max_allocated_gb',
            'memory.max_reserved_gb',
        ),
        draw_memory,
    ),
    (('moe.load_score',), draw_load),
    (('moe.load_score',), draw_utilization),
    (('moe.load_score',), draw_router),
]


def describe(run: 'Run') -> str:
    """Return what was run, in up to two lines, from as much as config and startup_info know."""
    config = run.config
    hardware, model = (cleaned(run.startup_info.get(key)) for key in ('hardware', 'model'))
    sizes = '-'.join(
        f'{config[key]}{letter}'
        for key, letter in (('n_layer', 'L'), ('n_head', 'H'), ('n_embd', 'D'), ('d_ff', 'ff'))
        if config.get(key)
    )
    params, gpus = (
        value if isinstance(value, (int, float)) else 0
        for value in (model.get('total_params'), hardware.get('num_gpus'))
    )
    device = hardware.get('gpu_name') or run.metadata.get('device')
    what = [
        config.get('arch_preset'),
        sizes,
        params and f'{count(params)} parameters',
        config.get('dataset'),
        config.get('block_size') and f'context {config["block_size"]}',
    ]
    tokens = run.column('tokens_seen')
    what += [f'{count(np.nanmax(tokens))} tokens'] if run.has('tokens_seen') else []
    where = [
        f'{gpus} × {device}' if gpus > 1 and device else device,
        hardware.get('precision') or run.metadata.get('dtype'),
        hardware.get('parallelism'),
    ]
    return '\n'.join(
        ' · '.join(str(part) for part in line if part) for line in (what, where) if any(line)
    )


def count(number: float) -> str:
    """Return a large count in three digits: 1.29 B."""
    for divisor, letter in ((1e12, 'T'), (1e9, 'B'), (1e6, 'M'), (1e3, 'k')):
        if number >= divisor:
            return f'{number / divisor:.3g} {letter}'
    return f'{number:.0f}'


def grid(figure: Any, panels: int) -> list:
    """Return axes for this many panels: the first, the loss, as wide as the figure, the others in
    two columns.
    """
    rows = panels // 2
    spec = figure.add_gridspec(1 + rows, 2, height_ratios=[1.35] + [1] * rows)
    return [figure.add_subplot(spec[0, :])] + [
        figure.add_subplot(spec[1 + i // 2, i % 2]) for i in range(panels - 1)
    ]


def draw_run(run: 'Run', window: int | None = None):
    """Return the figure of one run, a panel for each thing it logged; `window` is the number of
    records averaged for smooth lines.
    """
    window = window or default_window(run)
    panels = [
        draw
        for columns, draw in PANELS
        if run.has(*columns) and (draw is not draw_utilization or run.expert_shares.size)
    ]
    panels += [draw_tasks] * bool(run.eval_tasks)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(13, 1.2 + 4.4 + 3.3 * (len(panels) // 2)), layout='constrained')
        for axes, draw in zip(grid(figure, len(panels)), panels):
            draw(axes, run, window)
            if draw is draw_utilization:  # of one iteration
                axes.set_xlabel('expert')
                axes.xaxis.set_major_locator(MaxNLocator(12, integer=True))
                continue
            if draw is not draw_loss:  # which has them in its legend
                draw_marks(axes, run)
            axes.set_xlabel('iteration')
            if len(run.iters) == 1:
                axes.set_xlim(run.iters[0] - 1, run.iters[0] + 1)
            axes.xaxis.set_major_locator(MaxNLocator(7, integer=True, min_n_ticks=1))
            axes.xaxis.set_major_formatter(StrMethodFormatter('{x:,.0f}'))
        figure.suptitle(f'{run.label} · {run.name}\n{describe(run)}', fontsize=12)
    return figure


def check_output(path: Path) -> None:
    """Raise UserError for a path that no picture can be written to."""
    if path.suffix not in ('.png', '.pdf', '.svg') or path.is_dir():
        raise UserError(f'--output must be a file that ends in .png, .pdf or .svg, got {path}')
    if not path.parent.is_dir():
        raise UserError(f'no such folder for the picture: {path.parent}')


def save(figure: Any, path: Path) -> None:
    """Write the picture and print where. Raises UserError for a path that cannot be one."""
    check_output(path)
    with matplotlib.rc_context(STYLE):  # ticks are made while drawing
        with replacing(str(path)) as f:
            figure.savefig(f, format=path.suffix[1:], dpi=130)
    print(path)


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv`; returns the exit code."""
    parser = ArgumentParser(description='Draw one run from its log.')
    parser.add_argument(
        'path',
        nargs='+',
        help='out_dir, run_*.jsonl or run_*.json; several belong to one run and are joined',
    )
    parser.add_argument(
        '--output',
        type=Path,
        metavar='FILE',
        help='where to save the picture (default: beside the newest log)',
    )
    parser.add_argument(
        '--show',
        action='store_true',
        help='open the picture, in the browser or what opens such files',
    )
    parser.add_argument(
        '--smooth',
        type=int,
        metavar='N',
        help='average over N records, 1 for none (default: a fortieth of the run, at most 201)',
    )
    return run_command(lambda argv: run(parser.parse_args(argv)), argv)


def run(args: argparse.Namespace) -> None:
    """Draw the run that the parsed `args` name. Raises UserError."""
    if args.smooth is not None and not 1 <= args.smooth <= 10**9:
        raise UserError(f'--smooth must be at least 1 and at most 10**9, got {args.smooth}')
    if args.output:
        check_output(args.output)
    runs = load_runs(args.path)
    if args.output and len(runs) > 1:
        raise UserError(
            f'these are logs of {len(runs)} models ({", ".join(run.name for run in runs)}), and'
            ' --output names one picture: leave it out, or draw them over each other with'
            ' compare_runs.py'
        )
    for run in runs:
        for note in run.notes:
            print('note:', note)
        path = args.output or run.path.with_suffix('.png')
        save(draw_run(run, args.smooth), path)
        if args.show:
            webbrowser.open(path.resolve().as_uri())


if __name__ == '__main__':
    sys.exit(main())
