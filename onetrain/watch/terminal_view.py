"""How runs stand, for a terminal: a panel for each, with its curve of losses."""

from collections.abc import Sequence

import numpy as np
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.panel import Panel
from rich.text import Text

from onetrain.logs.terminal import duration, short_number
from onetrain.watch.follow import Curve, Standing

COLORS = {
    'running': 'green',
    'finished': 'cyan',
    'stopped': 'yellow',
    'waiting': 'yellow',
    'stale': 'red',
    'gone': 'red',
}
VALIDATION = 'magenta'
BAR = 20  # columns of the bar of progress
# bits of the dots of a Braille character, by row and column
_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))


def view(standings: Sequence[Standing], width: int, height: int = 8) -> RenderableType:
    """Return panels of `width` columns; height: lines of a curve."""
    return Group(*(_panel(each, width, height) for each in standings))


def _panel(standing, width, height):
    color = COLORS[standing.state]
    lines = [*facts(standing), *hardware(standing)]
    text = Text('\n'.join(lines))
    curve = draw(standing.curves['loss'], standing.curves['val_loss'], width - 4, height, color)
    for step, warning in standing.warnings[-3:]:
        text.append(f'\n{step:,}: {plain(warning)}', style='yellow')
    parts = [text] if curve is None else [text, curve]
    why = f': {standing.why}' if standing.why else ''
    name, state = escape(plain(standing.name)), standing.state
    title = f'[bold]{name}[/bold] [{color}]{state}[/{color}]{escape(why)}'
    return Panel(Group(*parts), title=title, title_align='left', width=width, border_style='dim')


def facts(standing: Standing) -> list[str]:
    """Return lines about the run itself."""
    n = standing.numbers
    groups = [_progress(n, standing.state), _losses(n), _speed(n), _rest(n)]
    return [plain(standing.architecture)] * bool(standing.architecture) + [
        '  '.join(words) for words in groups if words
    ]


def _progress(n, state):
    if 'iter' not in n:
        return []
    step, most = int(n['iter']), int(n.get('max_iters', 0))
    words = [f'iter {step:,}' + (f'/{most:,}' if most else '')]
    if most:
        share = min(1.0, step / most)
        filled = round(BAR * share)
        words.append(f'{"━" * filled}{"╌" * (BAR - filled)} {100 * share:.1f} %')
    if n.get('left_s', 0) > 0 and state == 'running':
        words.append(f'{duration(n["left_s"])} left')
    if 'wall_s' in n:
        words.append(f'{duration(n["wall_s"])} of training')
    return words


def _losses(n):
    words = [f'loss {n["loss"]:.4f} (last 10)'] if 'loss' in n else []
    if 'val_loss' in n:
        last, best = int(n.get('val_iter', 0)), int(n['best_val_iter'])
        words.append(f'val {n["val_loss"]:.4f} at {last:,}' + ', the best' * (last == best))
        if last != best:
            words.append(f'best {n["best_val_loss"]:.4f} at {best:,}')
    words += [f'{n["bits_per_byte"]:.3f} bits/byte'] if 'bits_per_byte' in n else []
    return words


def _speed(n):
    words = [f'{short_number(n["tokens_per_sec"])} tok/s'] if 'tokens_per_sec' in n else []
    words += [f'{n["time_ms"] / 1e3:.3g} s/it'] if 'time_ms' in n else []
    words += [f'MFU {n["mfu_percent"]:.1f} %'] if 'mfu_percent' in n else []
    words += [f'memory {n["memory_gb"]:.2f} GB'] if 'memory_gb' in n else []
    for key, what in (('data_wait_percent', 'data'), ('comm_wait_percent', 'gradients')):
        words += [f'waits {n[key]:.1f} % for {what}'] if key in n else []
    return words


def _rest(n):
    words = [f'{short_number(n["tokens_seen"])} tokens'] if 'tokens_seen' in n else []
    words += [f'lr {n["lr"]:.2e}'] if 'lr' in n else []
    words += [f'norm {n["grad_norm"]:.3f}'] if 'grad_norm' in n else []
    if 'checkpoint_iter' in n:
        stall = n.get('checkpoint_stall_ms')
        waited = '' if stall is None else f' (waited {stall:.0f} ms)'
        words.append(f'saved {int(n["checkpoint_iter"]):,}{waited}')
    words += [f'skipped {int(n["skipped"])}'] if n.get('skipped') else []
    words += [f'expert load {n["expert_load"]:.0f}'] if 'expert_load' in n else []
    if 'cost' in n:
        total = f' of ${n["cost_total"]:,.2f}' if 'cost_total' in n else ''
        words.append(f'${n["cost"]:,.2f}{total}')
    return words


def hardware(standing: Standing) -> list[str]:
    """Return lines about the GPUs and the machine."""
    lines = [[f'GPU {gpu["gpu"]}', *gpu_phrases(gpu)] for gpu in standing.gpus]
    lines += [words] if (words := machine_phrases(standing.machine)) else []
    return ['  '.join(words) for words in lines]


def gpu_phrases(gpu: dict) -> list[str]:
    """Return what a line of gpu_metrics.jsonl says of a GPU."""
    words = _phrases(
        gpu,
        ('utilization_percent', '{:.0f} %'),
        ('memory_used_gb', '{:.1f} GB'),
        ('temperature_c', '{:.0f} °C'),
        ('power_w', '{:.0f} W'),
        ('sm_clock_mhz', '{:.0f} MHz'),
    )
    reasons = gpu.get('throttle')
    if isinstance(reasons, list):
        words.append('slowed by ' + plain(', '.join(map(str, reasons))))
    return words


def machine_phrases(machine: dict) -> list[str]:
    """Return what a line of gpu_metrics.jsonl says of the machine."""
    return _phrases(
        machine,
        ('cpu_percent', 'CPU {:.0f} %'),
        ('memory_used_gb', 'memory {:.1f} GB'),
        ('disk_free_gb', 'disk {:.0f} GB free'),
        ('received_mb_per_sec', 'in {:.1f} MB/s'),
        ('sent_mb_per_sec', 'out {:.1f} MB/s'),
        ('energy_kwh', '{:.2f} kWh'),
    )


def _phrases(record, *forms):
    return [form.format(record[key]) for key, form in forms if key in record]


def plain(text: str) -> str:
    """Return a text of a log in one line that no terminal takes for more than text."""
    return ''.join(c if c.isprintable() else ' ' for c in text)[:200]


def draw(loss: Curve, val_loss: Curve, width: int, height: int, color: str) -> Text | None:
    """Return lines of Braille dots with both curves over each other, that of validation in its own
    color: iterations to the right, from the 1st to the 99th percentile of the values upwards. None
    without two points.
    """
    if len(loss.iters) + len(val_loss.iters) < 2 or height < 2:
        return None
    values = np.array(loss.values + val_loss.values)
    low, high = np.percentile(values, [1, 99])
    if high <= low:
        low, high = low - 0.5, high + 0.5
    left = min(loss.iters[:1] + val_loss.iters[:1])
    right = max(loss.iters[-1:] + val_loss.iters[-1:] + [left + 1])
    labels = {0: f'{high:.3f}', height - 1: f'{low:.3f}'}
    margin = max(map(len, labels.values())) + 1
    columns = width - margin

    def cells(curve):
        found = np.zeros((height, columns), int)
        if not curve.iters:
            return found
        across = (np.array(curve.iters, float) - left) / (right - left) * (2 * columns - 1)
        down = (high - np.clip(curve.values, low, high)) / (high - low) * (4 * height - 1)
        # a line from point to point, beside the points themselves
        between = np.arange(np.ceil(across[0]), across[-1] + 1)
        dots = [*zip(across, down), *zip(between, np.interp(between, across, down))]
        for i, j in dots:
            found[int(j) // 4, int(i) // 2] |= _DOTS[int(j) % 4][int(i) % 2]
        return found

    training, validation = cells(loss), cells(val_loss)
    drawn = Text()
    for row in range(height):
        drawn.append(f'{labels.get(row, ""):>{margin - 1}} ')
        for one, other in zip(training[row].tolist(), validation[row].tolist()):
            drawn.append(chr(0x2800 + (one | other)), style=VALIDATION if other else color)
        drawn.append('\n')
    first, last = f'{left:,}', f'iteration {right:,}'
    return drawn.append(f'{"":{margin}}{first}{last:>{columns - len(first)}}')
