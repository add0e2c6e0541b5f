"""Tokens per second of training a mixture of experts beside a dense model with as many active
parameters: steps alternate in one process.

python bench/expert_speed.py --steps=15
"""

import argparse
import statistics
import sys

import torch

from model import Model
from onetrain.command_line import run_command, whole
from onetrain.distributed import processes
from onetrain.model_config import resolve_shape
from onetrain.ops.kernels import synchronized_time


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--steps', type=whole(), default=15)
    parser.add_argument('--n_embd', type=whole(), default=256)
    parser.add_argument('--n_layer', type=whole(), default=4)
    parser.add_argument('--expert_d_ff', type=whole(), default=384)
    parser.add_argument('--batch', type=whole(), default=8)
    parser.add_argument('--block_size', type=whole(), default=256)
    parser.add_argument('--compile', action='store_true')
    parser.add_argument('--device')
    args = parser.parse_args()
    device = processes.start(args.device).device
    common = dict(
        n_layer=args.n_layer,
        n_head=4,
        n_embd=args.n_embd,
        block_size=args.block_size,
        vocab_size=4096,
    )
    routed = dict(
        common,
        arch_preset='mixtral',
        num_experts=8,
        num_experts_per_tok=2,
        expert_d_ff=args.expert_d_ff,
    )
    models = {
        'dense': Model(resolve_shape(dict(common, arch_preset='llama', d_ff=2 * args.expert_d_ff))),
        'grouped': Model(resolve_shape(routed)),
        'loop': Model(resolve_shape(routed), dispatch='loop'),
    }
    x = torch.randint(
        4096, (args.batch, args.block_size + 1), generator=torch.Generator().manual_seed(0)
    ).to(device)
    steps, times = {}, {name: [] for name in models}
    for name, model in models.items():
        model.init_weights(0)
        model.to(device)
        if args.compile and name != 'loop':  # whose host syncs break the graph
            model.compile()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

        def step(model=model, optimizer=optimizer):
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == 'cuda'):
                model(x[:, :-1], x[:, 1:]).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        steps[name] = step
    for turn in range(args.steps + 3):
        for name in [*models][:: 1 if turn % 2 else -1]:
            started = synchronized_time(device)
            steps[name]()
            times[name] += [synchronized_time(device) - started] * (
                turn >= 3
            )  # the first are warm-up
    for name, model in models.items():
        counts = model.parameter_counts()
        print(
            f'{name:>8}: {args.batch * args.block_size / statistics.median(times[name]):9,.0f}'
            f' tokens/s, {1000 * statistics.median(times[name]):7.1f} ms, '
            f'{counts["total"]:,} parameters, {counts["active"]:,} active'
        )
    for name in ('grouped', 'loop'):
        print(
            f'{name} / dense:'
            f' {statistics.median(d / m for d, m in zip(times["dense"], times[name])):.2f}'
        )


if __name__ == '__main__':
    sys.exit(run_command(lambda _: main()))
