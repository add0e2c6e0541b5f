"""
Training speed beside others: train.py's step, nanoGPT's loop, Hugging Face's Trainer and, where it
is installed, litgpt, with the same model and batch, each in a process of its own, in turns, and as
its users run it: on a CPU the others compute in float32, on a GPU all in bfloat16.

    python bench/peers.py  # GPT-2's kind, then LLaMA's, on this machine's CPU
    python bench/peers.py --family=llama --rounds=7 --steps=4
    python bench/peers.py --device=cuda --n_layer=12 --n_head=12 --n_embd=768 \\
        --block_size=1024 --batch_size=16

nanoGPT's loop is rewritten from what it does, around the same model: the whole of it compiled, all
logits at once, windows drawn and stacked one by one, AdamW fused on a GPU only, the loss fetched
every tenth iteration. The Trainer has transformers' own model and its defaults, not compiled, as it
comes; --hf_compile compiles it. litgpt (which has no GPT-2; pip install --no-deps litgpt lightning
lightning-utilities torchmetrics pytorch-lightning jsonargparse) has its own model, loss and use of
Fabric, as its pretraining puts them together. First steps and compiling are not in the figures.
Beside them stands what the matmuls alone of such a step take here, one after the other.
"""

import argparse
import importlib.util
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np

from onetrain.command_line import run_command, whole

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

VOCABULARIES = {'gpt2': 50304, 'llama': 32000}
RATES = dict(learning_rate=6e-4, betas=(0.9, 0.95), weight_decay=0.1)
PEERS = ('onetrain', 'nanogpt', 'hf_trainer', 'litgpt')


def shape_of(args):
    from onetrain.model_config import resolve_shape

    return resolve_shape(
        dict(
            arch_preset=args.family,
            n_layer=args.n_layer,
            n_head=args.n_head,
            n_embd=args.n_embd,
            block_size=args.block_size,
            vocab_size=VOCABULARIES[args.family],
            bias=False,
        )
    )


def context(args):
    from step import kernels

    return kernels.autocast(args.device, dtype_of(args))


def dtype_of(args):
    """The torch dtype of a peer's matmuls."""
    import torch
    from step import kernels

    width = args.n_embd if args.peer == 'onetrain' else 0
    return kernels.precision(args.dtype, torch.device(args.device), width)


def onetrain(args):
    """A generator: one step of train.py per next()."""
    from step import Step, config_of

    step = Step(
        config_of(
            [
                f'--{key}={value}'
                for key, value in dict(
                    arch_preset=args.family,
                    vocab_size=VOCABULARIES[args.family],
                    bias=False,
                    gradient_accumulation_steps=1,
                    learning_rate=RATES['learning_rate'],
                    **{
                        key: getattr(args, key)
                        for key in (
                            'n_layer',
                            'n_head',
                            'n_embd',
                            'block_size',
                            'batch_size',
                            'device',
                        )
                    },
                    **({'dtype': args.dtype} if args.dtype else {}),
                ).items()
            ]
        ),
        args.data,
    )
    while True:
        step.run()
        if step.steps % 10 == 0:
            step.last_loss.item()
        yield


def nanogpt(args):
    """A generator: one iteration of nanoGPT's loop per next()."""
    from nanogpt_step import reference_loop

    from model import Model

    model = Model(shape_of(args)).to(args.device)
    model.init_weights(0)
    yield from reference_loop(
        args.data,
        model,
        batch_size=args.batch_size,
        block_size=args.block_size,
        rates=dict(lr=RATES['learning_rate'], betas=RATES['betas']),
        compiled=True,
        device=args.device,
        autocast=context(args),
        fetch_every=10,
    )


def litgpt(args):
    """A generator: one iteration of litgpt's pretraining per next()."""
    import lightning
    import litgpt
    import torch
    from litgpt.utils import chunked_cross_entropy
    from nanogpt_step import random_windows

    shape = shape_of(args)
    fabric = lightning.Fabric(
        accelerator=args.device,
        devices=1,
        precision='32-true' if dtype_of(args) == torch.float32 else 'bf16-mixed',
    )
    fabric.launch()
    with fabric.init_module():
        model = litgpt.GPT(
            litgpt.Config(
                name='peer',
                block_size=shape.block_size,
                n_layer=shape.n_layer,
                n_head=shape.n_head,
                n_embd=shape.n_embd,
                n_query_groups=shape.num_key_value_heads,
                padded_vocab_size=shape.vocab_size,
                rotary_percentage=1.0,
                parallel_residual=False,
                bias=False,
                norm_class_name='RMSNorm',
                mlp_class_name='LLaMAMLP',
                intermediate_size=shape.d_ff,
            )
        )
    model = fabric.setup(torch.compile(model))
    optimizer = fabric.setup_optimizers(
        torch.optim.AdamW(
            model.parameters(),
            lr=RATES['learning_rate'],
            betas=RATES['betas'],
            weight_decay=RATES['weight_decay'],
            fused=args.device == 'cuda',
        )
    )
    for number in itertools.count(1):
        x, y = random_windows(args.data, args.batch_size, args.block_size, args.device)
        loss = chunked_cross_entropy(model(x), y)
        fabric.backward(loss)
        fabric.clip_gradients(model, optimizer, max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad()
        if number % 10 == 0:
            loss.item()
        yield


def hf_trainer(args, between):
    """Hugging Face's Trainer; calls between() after each step."""
    import torch
    import transformers

    shape = shape_of(args)
    same = dict(vocab_size=shape.vocab_size, bos_token_id=0, eos_token_id=0)
    if args.family == 'gpt2':
        model = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                n_layer=shape.n_layer,
                n_head=shape.n_head,
                n_embd=shape.n_embd,
                n_positions=shape.block_size,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                use_cache=False,
                **same,
            )
        )
    else:
        model = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                num_hidden_layers=shape.n_layer,
                num_attention_heads=shape.n_head,
                num_key_value_heads=shape.num_key_value_heads,
                hidden_size=shape.n_embd,
                intermediate_size=shape.d_ff,
                max_position_embeddings=shape.block_size,
                use_cache=False,
                **same,
            )
        )

    class Windows(torch.utils.data.Dataset):
        data = np.memmap(os.path.join(args.data, 'train.bin'), dtype=np.uint16, mode='r')

        def __len__(self):
            return (len(self.data) - 1) // args.block_size

        def __getitem__(self, i):
            ids = torch.from_numpy(
                self.data[i * args.block_size : (i + 1) * args.block_size].astype(np.int64)
            )
            return {'input_ids': ids, 'labels': ids}

    class Between(transformers.TrainerCallback):
        def on_step_end(self, *_, **__):
            between()

    with tempfile.TemporaryDirectory() as folder:
        settings = transformers.TrainingArguments(
            folder,
            per_device_train_batch_size=args.batch_size,
            max_steps=10**6,
            learning_rate=RATES['learning_rate'],
            weight_decay=0.1,
            adam_beta2=0.95,
            max_grad_norm=1.0,
            report_to=[],
            logging_strategy='no',
            save_strategy='no',
            disable_tqdm=True,
            use_cpu=args.device == 'cpu',
            bf16=dtype_of(args) == torch.bfloat16,
            torch_compile=args.hf_compile,
        )
        transformers.Trainer(
            model, settings, train_dataset=Windows(), callbacks=[Between()]
        ).train()


def serve(args):
    """Take steps: as many as each line of standard input says, and print the seconds that they
    took.
    """
    from step import kernels, matmuls

    waiting = {'steps': 0}

    def between():
        waiting['steps'] -= 1
        if waiting['steps'] > 0:
            return
        now = kernels.synchronized_time(args.device)
        if 'since' in waiting:
            print(now - waiting['since'], flush=True)
        line = sys.stdin.readline()
        if not line:
            os._exit(0)
        if line.strip() == 'matmuls':
            print(
                *matmuls(
                    shape_of(args),
                    args.batch_size * args.block_size,
                    dtype_of(args),
                    args.device,
                ),
                flush=True,
            )
            waiting.pop('since', None)
            return between()
        waiting.update(steps=int(line), since=time.perf_counter())

    if args.peer == 'hf_trainer':
        hf_trainer(args, between)
    for _ in {'onetrain': onetrain, 'nanogpt': nanogpt, 'litgpt': litgpt}[args.peer](args):
        between()


def measure(args, folder):
    from step import write_noise

    vocabulary = VOCABULARIES[args.family]
    write_noise(folder, vocabulary)
    own = [
        f'--{key}={value}'
        for key, value in vars(args).items()
        if key not in ('peer', 'data', 'peers', 'family') and value not in (None, False)
    ]
    own = [word.removesuffix('=True') for word in own]
    processes = {
        peer: subprocess.Popen(
            [
                sys.executable,
                __file__,
                *own,
                f'--family={args.family}',
                f'--peer={peer}',
                f'--data={folder}',
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, 'HF_HUB_OFFLINE': '1'},
        )
        for peer in args.peers
    }

    def ask(peer, what):
        processes[peer].stdin.write(f'{what}\n')
        processes[peer].stdin.flush()
        line = processes[peer].stdout.readline()
        if not line:
            sys.exit(
                f'{peer} ended: python {__file__} {" ".join(own)} --family={args.family}'
                f' --peer={peer} --data=FOLDER <<< 1 shows why'
            )
        return [float(word) for word in line.split()]

    for peer in args.peers:
        ask(peer, args.warmup)
    tokens = args.batch_size * args.block_size
    seconds = {peer: [] for peer in args.peers}
    alone = []
    for turn in range(args.rounds):
        for peer in [*args.peers][:: 1 if turn % 2 else -1]:
            seconds[peer] += [ask(peer, args.steps)[0] / args.steps]
        alone += [ask(args.peers[0], 'matmuls')]
    for process in processes.values():
        process.stdin.close()
        process.wait(60)
    print(
        f'{args.family}: {args.n_layer} layers, {args.n_embd} wide, vocabulary {vocabulary:,},'
        f' {args.batch_size} x {args.block_size} tokens, {args.dtype or "each as it comes"} on'
        f' {args.device}, medians of {args.rounds} x {args.steps} steps'
    )
    middle = {peer: statistics.median(found) for peer, found in seconds.items()}
    took, flops = (statistics.median(column) for column in zip(*alone))
    for peer, found in seconds.items():
        ratio = statistics.median(
            theirs / ours for ours, theirs in zip(seconds[args.peers[0]], found)
        )
        print(
            f'{peer:>12}: {1000 * middle[peer]:8.1f} ms a step ({1000 * min(found):.1f} to'
            f' {1000 * max(found):.1f}), {tokens / middle[peer]:10,.0f} tokens/s; {args.peers[0]}'
            f' is {ratio:.2f} times as fast'
        )
    share = statistics.median(
        matmul[0] / ours for ours, matmul in zip(seconds[args.peers[0]], alone)
    )
    print(
        f'{"matmuls":>12}: {1000 * took:8.1f} ms alone, {flops / took / 1e9:,.0f} GFLOP/s; the step'
        f' of {args.peers[0]} runs at {share:.0%} of that rate',
        flush=True,
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--family', choices=tuple(VOCABULARIES), help='default: both')
    for name, default in (
        ('n_layer', 6),
        ('n_head', 6),
        ('n_embd', 384),
        ('block_size', 256),
        ('batch_size', 8),
        ('rounds', 5),
        ('steps', 3),
        ('warmup', 3),
    ):
        parser.add_argument(f'--{name}', type=whole(), default=default)
    parser.add_argument('--device', default='cpu', choices=('cpu', 'cuda'))
    parser.add_argument('--dtype', choices=('float32', 'bfloat16'), help='of all of them')
    parser.add_argument('--hf_compile', action='store_true')
    parser.add_argument('--peers', nargs='+', default=PEERS, choices=PEERS)
    parser.add_argument(
        '--peer',
        choices=PEERS,
        help='one process (it is told on standard input how many steps to take)',
    )
    parser.add_argument('--data', help='of that process')
    args = parser.parse_args()
    if args.peer:
        return serve(args)
    wanted = [peer for peer in args.peers if peer != 'litgpt' or importlib.util.find_spec('litgpt')]
    for family in [args.family] if args.family else VOCABULARIES:
        args.family = family
        args.peers = [peer for peer in wanted if family == 'llama' or peer != 'litgpt']
        with tempfile.TemporaryDirectory() as folder:
            measure(args, folder)


if __name__ == '__main__':
    sys.exit(run_command(lambda _: main()))
