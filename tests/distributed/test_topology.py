"""The matrix of nvidia-smi is read as it is printed, and a slow path is told of."""

from onetrain.distributed import topology

HEAD = '\t{}\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\n'


def matrix(rows, others=''):
    """What `nvidia-smi topo -m` prints for a square of kinds."""
    names = '\t'.join(f'GPU{i}' for i in range(len(rows)))
    return (
        HEAD.format(names + others)
        + ''.join(
            f'\x1b[4mGPU{i}\x1b[0m\t'
            + '\t'.join(' X ' if kind == 'X' else kind for kind in row)
            + '\t0-51\t0\tN/A\n'
            for i, row in enumerate(rows)
        )
        + '\nLegend:\n\n  X    = Self\n  SYS  = Connection traversing PCIe as well as the SMP'
        ' interconnect between NUMA nodes\n'
    )


def test_nvlink_between_all():
    links = topology.parse_topology(
        matrix([['X', 'NV18', 'NV18'], ['NV18', 'X', 'NV18'], ['NV18', 'NV18', 'X']], '\tNIC0'),
        [0, 1, 2],
    )
    assert links == {(0, 1): 'NV18', (0, 2): 'NV18', (1, 2): 'NV18'}
    assert topology.describe_topology(links) == ('Topology: NVLink (NV18) between all', None)


def test_pairs_with_nvlink_across_sockets():
    rows = [
        ['X', 'NV4', 'SYS', 'SYS'],
        ['NV4', 'X', 'SYS', 'SYS'],
        ['SYS', 'SYS', 'X', 'NV4'],
        ['SYS', 'SYS', 'NV4', 'X'],
    ]
    line, note = topology.describe_topology(topology.parse_topology(matrix(rows), [0, 1, 2, 3]))
    assert (
        line
        == 'Topology: NVLink (NV4) between 0-1, 2-3; the link between CPU sockets (SYS) between'
        ' 0-2, 0-3, 1-2, 1-3'
    )
    assert (
        'GPUs 0 and 2 reach each other over the link between CPU sockets (SYS)' in note
        and 'bench/allreduce.py' in note
    )
    # only these are used
    assert topology.describe_topology(topology.parse_topology(matrix(rows), [2, 3])) == (
        'Topology: NVLink (NV4) between all',
        None,
    )


def test_without_nvidia_smi(monkeypatch, tmp_path):
    monkeypatch.setenv('PATH', str(tmp_path))
    assert topology.read_topology(2) == {} and topology.describe_topology({}) == (None, None)
    program = tmp_path / 'nvidia-smi'
    program.write_text(
        '#!/bin/sh\n'
        + 'printf "'
        + matrix([['X', 'PHB'], ['PHB', 'X']])
        .replace('\n', '\\n')
        .replace('\t', '\\t')
        .replace('\x1b', '\\033')
        + '"\n'
    )
    program.chmod(0o755)
    assert topology.read_topology(2) == {(0, 1): 'PHB'}
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '1,0')
    assert topology.read_topology(2) == {(0, 1): 'PHB'}
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '1')
    assert topology.read_topology(1) == {}
