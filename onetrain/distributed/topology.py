"""How the GPUs of this machine are connected, as `nvidia-smi topo -m` tells."""

import os
import re
import subprocess

# from fast to slow, in the terms of nvidia-smi
_PATHS = {
    'NV': 'NVLink',
    'PIX': 'PCIe through one switch',
    'PXB': 'PCIe through several switches',
    'PHB': "PCIe through a CPU's bridge",
    'NODE': "PCIe between a CPU's bridges",
    'SYS': 'the link between CPU sockets',
}
_ORDER = list(_PATHS)


def read_topology(count: int) -> dict[tuple, str]:
    """Return {(i, j): kind} between the first `count` GPUs that this process may use, kind as
    nvidia-smi writes it; {} where it cannot be asked.
    """
    try:
        text = subprocess.run(
            ['nvidia-smi', 'topo', '-m'], capture_output=True, text=True, timeout=20, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return parse_topology(text, visible_gpus(count))


def visible_gpus(count: int) -> list[int]:
    """Return the numbers, as nvidia-smi counts, of the first `count` GPUs that this process may
    use.
    """
    return (named_gpus() or list(range(count)))[:count]


def named_gpus() -> list[int] | None:
    """Return the numbers in CUDA_VISIBLE_DEVICES, None where it is not set or holds other names."""
    visible = os.environ.get('CUDA_VISIBLE_DEVICES', '')
    known = re.fullmatch(r'\d+(,\d+)*', visible)
    return [int(gpu) for gpu in visible.split(',')] if known else None


def parse_topology(text: str, gpus: list[int]) -> dict[tuple, str]:
    """Return {(i, j): kind} for i < j among the GPU numbers `gpus`, from the matrix that
    `nvidia-smi topo -m` prints.
    """
    rows, columns = {}, []
    for line in text.splitlines():
        cells = re.sub(r'\x1b\[[0-9;]*m', '', line).split('\t')
        names = [cell.strip() for cell in cells]
        if not columns and 'GPU0' in names and not names[0]:
            columns = names[1:]
        elif columns and re.fullmatch(r'GPU\d+', names[0]):
            rows[names[0]] = dict(zip(columns, names[1:]))
    return {
        (a, b): kind
        for a in gpus
        for b in gpus
        if a < b and (kind := rows.get(f'GPU{a}', {}).get(f'GPU{b}'))
    }


def slowest_path(links: dict[tuple, str]) -> str | None:
    """Return the slowest of the links {(i, j): kind} in words, None where that is NVLink or not
    known.
    """
    kinds = list(_pairs_by_kind(links))
    slow = kinds[-1] if kinds else 'NV'
    return None if slow == 'NV' else f'the slowest path is {_PATHS.get(slow, slow)}'


def _pairs_by_kind(links):
    """Return {kind: its pairs} of the links {(i, j): kind}, from fast to slow."""
    pairs = {}
    for pair, kind in links.items():
        pairs.setdefault('NV' if kind.startswith('NV') else kind, []).append(pair)
    known = [kind for kind in _ORDER if kind in pairs]
    return {kind: pairs[kind] for kind in known + [kind for kind in pairs if kind not in _ORDER]}


def describe_topology(links: dict[tuple, str]) -> tuple:
    """Return (line for the report or None, note or None) about {(i, j): kind}: how the GPUs talk,
    and a warning where the slowest path is no NVLink.
    """
    if not links:
        return None, None
    pairs = _pairs_by_kind(links)
    names = list(pairs)
    parts = [
        f'{_PATHS.get(kind, kind)} ({sorted({links[pair] for pair in pairs[kind]})[0]}) between '
        + ('all' if len(names) == 1 else ', '.join(f'{a}-{b}' for a, b in pairs[kind]))
        for kind in names
    ]
    slow = names[-1]
    note = (
        None
        if slow == 'NV'
        else (
            f'GPUs {pairs[slow][0][0]} and {pairs[slow][0][1]} reach each other over'
            f' {_PATHS.get(slow, slow)} ({slow}): sums over all ranks go at that speed, which'
            ' bench/allreduce.py measures; a larger total_batch_size makes them rarer'
        )
    )
    return 'Topology: ' + '; '.join(parts), note
