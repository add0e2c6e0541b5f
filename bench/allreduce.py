"""
How fast the ranks sum and gather: what gradients and parameters travel at.

    torchrun --standalone --nproc_per_node=8 bench/allreduce.py
    torchrun --nnodes=2 ... bench/allreduce.py --largest=1024

For all-reduce (DDP, ZeRO-1), reduce-scatter and all-gather (FSDP) over all ranks: the median time
of a call and the bus bandwidth, which is what each link of a ring carries (2 (n-1)/n times the
bytes for all-reduce, (n-1)/n for the others; the convention of NVIDIA's nccl-tests), so that it can
be held against the data sheet of the link. On a CPU it measures gloo.
"""

import argparse
import sys

import torch
import torch.distributed as dist

from onetrain.command_line import run_command, whole
from onetrain.distributed import collectives, layouts, processes, topology
from onetrain.ops.kernels import synchronized_time


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--largest', type=whole(), default=256, help='MB of the largest message')
    parser.add_argument(
        '--calls', type=whole(), default=20, help='timed calls for each size, after 5 that are not'
    )
    parser.add_argument('--device', help='cpu or cuda')
    args = parser.parse_args()
    world = processes.start(args.device)
    n = world.size
    if n == 1:
        sys.exit(
            'error: one process has nobody to talk to: start this with torchrun --nproc_per_node=N'
        )
    if world.is_main:
        line, note = (
            topology.describe_topology(topology.read_topology(torch.cuda.device_count()))
            if world.device.type == 'cuda'
            else (None, None)
        )
        print(
            '\n'.join(filter(None, [f'{n} ranks, {world.backend}', line, note and f'Note: {note}']))
        )
        print('| operation | MB | ms | GB/s on the bus |\n|---|---|---|---|', flush=True)
    scatter = getattr(dist, 'reduce_scatter_single', None) or dist.reduce_scatter_tensor
    sizes = [size for size in (1, 4, 16, 64, 256, 1024, 4096) if size <= args.largest]
    for size in sizes:
        count = size * 10**6 // 4 // n * n
        full = torch.ones(count, device=world.device)
        part = torch.ones(count // n, device=world.device)
        for name, call, factor in (
            ('all-reduce', lambda: dist.all_reduce(full), 2),
            ('reduce-scatter', lambda: scatter(part, full), 1),
            ('all-gather', lambda: layouts.gather_rows(full, part), 1),
        ):
            times = []
            for _k in range(args.calls + 5):
                full.fill_(1.0)
                dist.barrier()
                started = synchronized_time(world.device)
                call()
                times.append(synchronized_time(world.device) - started)
            seconds = max(
                collectives.all_gather_numbers(
                    {'median': sorted(times[5:])[args.calls // 2]}, world
                )['median']
            )
            if world.is_main:
                print(
                    f'| {name} | {size} | {1000 * seconds:.2f} |'
                    f' {4 * count * factor * (n - 1) / n / seconds / 1e9:.2f} |',
                    flush=True,
                )
    return 0


if __name__ == '__main__':
    processes.leave(run_command(lambda _: main(), tell=processes.report_error))
