"""What a run says of itself when it starts, and the memory it takes."""

import collections
import dataclasses
import math
import os
import shutil
import sys
import textwrap
from typing import TYPE_CHECKING

import torch

from onetrain import __version__, flops
from onetrain.checkpoint import store
from onetrain.checkpoint.resume import config_record
from onetrain.cpu import cpu_name
from onetrain.data.dataset import parse_mixture
from onetrain.data.order import Order, WindowOrder
from onetrain.distributed import topology
from onetrain.logs.run_log import now
from onetrain.logs.terminal import duration, short_number
from onetrain.training.memory import available_memory

if TYPE_CHECKING:
    from model import Model
    from onetrain.data.text_bytes import TextBytes
    from onetrain.distributed.processes import World
    from onetrain.training.memory import Prediction
    from onetrain.training.muon import Muon
    from train import Config

VOCABULARIES = {
    50304: 'GPT-2',
    50257: 'GPT-2',
    32000: 'LLaMA-2',
    128256: 'LLaMA-3',
    151936: 'Qwen3',
}


def startup_info(
    c: 'Config',
    model: 'Model',
    optimizer: 'Muon | torch.optim.Optimizer',
    world: 'World',
    prediction: 'Prediction | None',
) -> dict:
    """Return the `startup_info` of the log. prediction: memory.Prediction or None."""
    counts, token_flops, gpu_name = model.parameter_counts(), model.flops(), world.gpu_name
    gpu = torch.cuda.get_device_properties(world.device) if gpu_name else None
    return {
        'timestamp': now(),
        'model': {
            **{f'{kind}_params': count for kind, count in counts.items()},
            'architecture': model.config.describe(),
            'flops_per_token': token_flops.total,
            'flops_per_token_causal': token_flops.causal,
            'float8_layers': model.float8_layers,
        },
        'optimizer': {
            'type': type(optimizer).__name__,
            'fused': bool(optimizer.defaults.get('fused')),
            'param_groups': [
                {
                    'kind': 'Muon' if group.get('muon') else 'AdamW',
                    'weight_decay': group['weight_decay'],
                    'num_tensors': len(group['params']),
                    'num_params': sum(p.numel() for p in group['params']),
                }
                for group in optimizer.param_groups
            ],
        },
        'memory': prediction and {**dataclasses.asdict(prediction), 'total': prediction.total},
        'config': config_record(c),
        'hardware': {
            'gpu_name': gpu_name,
            'num_gpus': world.size if gpu_name else 0,
            'gpu_memory_gb': gpu.total_memory / 1e9 if gpu else None,
            'cpu_name': cpu_name(),
            'cpu_threads': torch.get_num_threads(),
            'precision': c.dtype,
            'parallelism': world.describe(),
        },
    }


def size_of(parameters: int) -> str:
    """Return a number of parameters as people write it: ~1.545B or 60.821M."""
    return (
        f'~{parameters / 1e9:.3f}B'
        if parameters >= 1e8
        else f'{parameters / 1e6:.3f}M'
        if parameters >= 1e6
        else f'{parameters:,}'
    )


def _checkpoints(c):
    when = [f'every {c.save_interval:,} iterations'] * bool(c.save_interval)
    when += ['when an evaluation improves'] * (not c.always_save_checkpoint)
    kept = 'the newest' if c.keep_checkpoints == 1 else f'the {c.keep_checkpoints} newest'
    kept += f', multiples of {c.keep_every:,}' if c.keep_every else ''
    return [
        ' and '.join(when),
        'all stay' if c.keep_all_checkpoints else f'{kept} and the best stay',
        *([] if c.checkpoint_async else ['training waits for them']),
        *([f'copied to {c.upload_to}'] if c.upload_to else []),
        *(
            [f'of the copied ones the {c.upload_keep_local} newest and the best stay here']
            if c.upload_to and c.upload_keep_local
            else []
        ),
    ]


def _model(c, counts):
    family = VOCABULARIES.get(c.vocab_size)
    theta = f'{c.rope_theta / 1e6:g}M' if c.rope_theta >= 1e6 else f'{c.rope_theta / 1e3:g}K'
    heads = f' with GQA ({c.num_key_value_heads} KV)' if c.num_key_value_heads != c.n_head else ''
    rope = f'{"Extended " if c.rope_theta > 10000 else ""}RoPE (theta={theta})'
    rope += f' on {c.rotary_pct:.0%} of each head' if c.rotary_pct < 1 else ''
    if c.rope_scaling != 'none':
        rope += f', {c.rope_scaling} x {c.rope_factor:g} from {c.rope_original_block_size} tokens'
    tied = ', tied to the head' if c.weight_tying else ''
    active = f', {size_of(counts["active_params"])} active' if c.num_experts else ''
    found = [
        f'Architecture: {c.n_layer}L-{c.n_head}H-{c.n_embd}D-{c.d_ff}ff{heads}, {c.arch_preset}',
        (
            f'Parameters: {size_of(counts["total_params"])}{active}'
            f' ({size_of(counts["non_embedding_params"]).removeprefix("~")} without embeddings)'
        ),
        f'Vocab: {c.vocab_size}{f" ({family})" if family else ""}{tied}',
        {'rope': rope, 'learned_absolute': 'learned positions', 'none': 'no positions'}[
            c.position_encoding
        ],
        f'{c.normalization}{"" if c.norm_position == "pre" else ", post-norm"}',
        f'{c.ffn_type} FFN with {c.activation}',
    ]
    found += [
        words
        for words, on in (
            ('QK-norm', c.qk_norm),
            ('biases', c.bias),
            ('parallel residual', c.parallel_residual),
            ('attention sinks', c.attention_sinks),
            ('documents kept apart', c.document_mask),
            (
                f'window of {c.sliding_window} tokens in the layers {c.window_pattern}',
                c.sliding_window,
            ),
        )
        if on
    ]
    if c.num_experts:
        shared = f' and {c.num_shared_experts} shared' if c.num_shared_experts else ''
        found += [
            (
                f'Experts: {c.num_experts} of width {c.expert_d_ff}, {c.num_experts_per_tok} per'
                f' token{shared}'
            ),
            f'{c.score_function} affinities'
            + (f' x {c.route_scale:g}' if c.route_scale != 1 else ''),
        ]
        found += [
            words
            for words, on in (
                (f'{c.topk_groups} of {c.n_groups} groups', c.topk_groups < c.n_groups),
                (f'the first {c.n_dense_layers} layers are dense', c.n_dense_layers),
                (f'balancing bias moves by {c.balance_rate:g}', c.balance_rate),
                (f'auxiliary loss x {c.aux_loss_weight:g}', c.aux_loss_weight),
                (f'z-loss x {c.z_loss_weight:g}', c.z_loss_weight),
            )
            if on
        ]
    return found


def _data(c, meta, order, sequences_per_step, device):
    if order is None:
        return [
            f'{c.data_url or c.dataset}, not prepared',
            (
                f'{c.max_iters * sequences_per_step * c.block_size:,} tokens are read in'
                f' {c.max_iters:,} iterations'
            ),
        ]
    tokens = meta.get('tokens', {}).get('train', order.per_epoch * c.block_size)
    sequences = c.max_iters * sequences_per_step
    if isinstance(order, WindowOrder):
        epochs = [f'{c.max_iters:,} iterations = {sequences / order.per_epoch:.2f} epochs']
    else:
        epochs = [
            f'{c.max_iters:,} iterations = '
            + ', '.join(
                f'{float(share * sequences) / source.per_epoch:.2f} epochs of {name}'
                for (name, share), source in zip(parse_mixture(c.dataset), order.orders)
            )
        ]
    loader = (
        f'{c.dataloader_num_workers} worker processes'
        if c.use_dataloader and c.dataloader_num_workers
        else ('a thread with pinned memory' if device.type == 'cuda' else 'in process')
    )
    return [
        f'{c.data_url or c.dataset}, {tokens:,} training tokens',
        *epochs,
        f'DataLoader: {loader}',
    ]


def _optimizer(c, startup):
    kinds = dict.fromkeys(group['kind'] for group in startup['optimizer']['param_groups'])
    rate = [f'learning rate {c.learning_rate:g}']
    if c.decay_lr:
        rate += [
            f'warm-up {c.warmup_iters:,}',
            f'cosine to {c.min_lr:g} at iteration {c.lr_decay_iters:,}',
        ]
    decayed = collections.Counter()
    for group in startup['optimizer']['param_groups']:
        decayed[group['weight_decay']] += group['num_params']
    return [
        ' and '.join(kinds) + (' (fused)' if startup['optimizer']['fused'] else ''),
        *rate,
        *(
            f'weight decay {decay:g} on {size_of(count).removeprefix("~")} parameters'
            for decay, count in decayed.items()
            if decay
        ),
        *([f'gradients clipped at {c.grad_clip:g}'] if c.grad_clip else []),
    ]


def _system(c, startup, world):
    hardware = startup['hardware']
    peak = flops.peak_flops(hardware['gpu_name'], c.dtype)
    if hardware.get('assumed'):
        machine = hardware['assumed']
    elif hardware['gpu_name']:
        machine = f'{world.size} x {hardware["gpu_name"]} with {hardware["gpu_memory_gb"]:.0f} GB'
    else:
        machine = (
            f'{hardware["cpu_name"]}, {hardware["cpu_threads"]}'
            f' thread{"s" if hardware["cpu_threads"] > 1 else ""}'
        )
        machine += f' for each of {world.size} processes' if world.size > 1 else ''
    precision = f'{c.dtype}, weights in float32' if c.dtype != 'float32' else 'float32'
    if c.dtype == 'float32' and c.float32_matmul_precision != 'highest':
        precision += f', matmul precision {c.float32_matmul_precision}'
    precision += f', {startup["model"]["float8_layers"]} linear layers in float8' if c.fp8 else ''
    again = {
        'none': [],
        'selective': ['backward computes all but matmuls and attention again'],
        'full': ['backward computes all of each block again'],
    }[c.activation_checkpointing]
    return [
        machine,
        *(
            [f'peak {peak / 1e12:g} TFLOP/s each' if peak else 'peak not known: no MFU']
            if hardware['gpu_name']
            else []
        ),
        *([f'Layout: {world.describe()}'] if world.size > 1 else []),
        *(
            [f'gradients summed in {c.fsdp_reduce_dtype}']
            if world.fsdp and c.dtype != 'float32'
            else []
        ),
        *(
            ['parameters and optimizer state in the memory of the CPU']
            if c.fsdp_offload and world.fsdp
            else []
        ),
        precision,
        f'Compile: {"on" if c.compile else "off"}',
        f'Attention backend: {c.attention_backend or "chosen on the GPU"}',
        f'CUDA Graphs: {"on" if c.use_cuda_graphs else "off"}',
        *again,
        *([] if c.deterministic else ['not deterministic']),
        *([f'${c.price_per_hour:,.2f} an hour'] if c.price_per_hour else []),
    ]


def group_lines(title: str, phrases: list[str], width: int = 100) -> list[str]:
    """Return the lines of a group: `phrases`, none of them broken, behind its title."""
    lines = ['']
    for phrase in phrases:
        joined = f'{lines[-1]}; {phrase}' if lines[-1] else phrase
        if lines[-1] and 13 + len(joined) > width:
            lines.append(phrase)
        else:
            lines[-1] = joined
    return [('' if number else f'{title}:').ljust(13) + line for number, line in enumerate(lines)]


def report(
    c: 'Config',
    startup: dict,
    meta: dict,
    order: 'Order',
    world: 'World',
    run_name: str | None,
    weights: str,
    notes: list[str],
    columns: int | None = None,
) -> list[str]:
    """Return the lines that say what will run, in groups, with every fallback at the end.

    run_name: None for a run that writes nothing; weights: where they come from, in words; columns:
    those of the terminal, None where there is none.
    """
    width = min(100, columns or 100)
    sequences_per_step = c.batch_size * c.gradient_accumulation_steps * world.data_size
    paths, slow_path = None, None
    if startup['hardware']['gpu_name'] and world.local_size > 1 and world.is_main:
        paths, slow_path = topology.describe_topology(topology.read_topology(world.local_size))
    groups = {
        'Model': _model(c, startup['model']),
        'Weights': [weights],
        'Data': _data(c, meta, order, sequences_per_step, world.device),
        'Batch': _batch(c, sequences_per_step, world),
        'Optimizer': _optimizer(c, startup),
        'System': _system(c, startup, world) + ([paths] if paths else []),
    }
    if startup['memory']:
        groups['Memory'] = [f'{startup["memory"]["total"] / 1e9:.2f} GB predicted for a step']
        if not startup['hardware'].get('assumed'):
            groups['Memory'].append(f'{available_memory(world.device) / 1e9:.1f} GB are free')
    if not c.eval_only:
        groups['Checkpoints'] = _checkpoints(c)
    where = f'evaluation of {c.out_dir}' if c.init_from == 'resume' else 'evaluation'
    if run_name:
        where = f'{run_name} in {c.out_dir}'
    lines = [f'onetrain {__version__}: {where}']
    for title, phrases in groups.items():
        lines += group_lines(title, phrases, width)
    notes = [*notes, *([slow_path] if slow_path else [])]
    for note in sorted(notes, key=lambda note: note.startswith('WARNING')):
        lines += fit_lines(
            note if note.startswith('WARNING') else f'Note: {note}', columns and width
        )
    return lines


def _batch(c, sequences_per_step, world):
    several = c.gradient_accumulation_steps > 1
    return [
        (
            f'{c.batch_size:,} sequences x {c.block_size:,} tokens x'
            f' {c.gradient_accumulation_steps:,} micro-step{"s" if several else ""} x {world.size}'
            f' rank{"s" if world.size > 1 else ""}'
        ),
        f'{sequences_per_step * c.block_size:,} tokens per iteration',
    ]


def fit_lines(text: str, columns: int | None) -> list[str]:
    """Return `text` in lines of at most `columns`; in one, which can be searched for, where there
    is no terminal (None).
    """
    return (
        [text]
        if columns is None
        else textwrap.wrap(
            text, columns, subsequent_indent='  ', break_long_words=False, break_on_hyphens=False
        )
    )


def origins(
    before: 'Config',
    c: 'Config',
    given: dict[str, str],
    start: str,
    vocabulary: str,
    columns: int | None = None,
):
    """Return lines that say where each value of a run comes from.

    before: the configuration as it was typed; c: as it is run; given: {key: file or 'command
    line'}; start: what the weights and other keys come from, such as 'checkpoint'; vocabulary: what
    vocab_size comes from.
    """
    found = {}
    for field in dataclasses.fields(c):
        key, value = field.name, getattr(c, field.name)
        if key == 'dry_run':
            continue
        if key in given and getattr(before, key) == value:
            source = given[key]
        elif key == 'vocab_size':
            source = vocabulary
        elif getattr(before, key) == value:
            source = 'default'
        elif getattr(before, key) is None:
            source = (
                f'arch_preset={c.arch_preset}'
                if start in ('scratch', 'resume') and key not in ('device', 'dtype', 'backend')
                else start
                if start != 'scratch'
                else 'this machine'
            )
        else:
            source = start if start != 'scratch' else 'worked out'
        found.setdefault(source, {})[key] = value
    lines = ['Where each value comes from:']
    for source in sorted(found, key=lambda name: (name == 'default', name != 'command line', name)):
        lines.append(f'  {source}:')
        lines += settings_lines(found[source], 4, columns)
    return lines


def settings_lines(values: dict, indent: int, columns: int | None = None) -> list[str]:
    """Return {key: value} as lines of key=value. columns: as for report()."""
    words = ', '.join(
        (
            f'{key}={value!r}'
            if isinstance(value, str) and not value.isprintable()
            else f'{key}={value}'
        )
        for key, value in values.items()
    )
    return textwrap.wrap(
        words,
        min(100, columns or 100),
        initial_indent=' ' * indent,
        subsequent_indent=' ' * indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def evaluation_line(step: int, losses: dict, best_before: float | None = None) -> str:
    """Return the line of an evaluation. best_before: the best validation loss until then; None
    marks none.
    """
    best = ' *best*' if step and best_before is not None and losses['val'] < best_before else ''
    scores = ''.join(
        f', {name} {100 * found["acc_norm"]:.1f} %'
        for name, found in losses.get('tasks', {}).items()
    )
    parts = ''.join(f'\n     {name} {loss:.4f}' for name, loss in losses.get('sources', {}).items())
    return (
        f'---- iter {step}: train loss {losses["train"]:.4f}, val loss'
        f' {losses["val"]:.4f}{best}{scores}{parts}'
    )


def loss_metrics(loss: float, text_bytes: 'TextBytes') -> dict:
    """Return {'perplexity', 'bits_per_byte'} of a loss in nats per token, null where it is not
    finite or the text is not known.

    text_bytes: text_bytes.TextBytes, or None on ranks that log nothing.
    """
    per_token = text_bytes.per_token() if text_bytes else None
    return {
        'perplexity': math.exp(loss) if loss < 700 else None,
        'bits_per_byte': (
            loss / math.log(2) / per_token if per_token and math.isfinite(loss) else None
        ),
    }


def ending_lines(
    c: 'Config',
    run_name: str,
    summary: dict,
    prediction: 'Prediction | None',
    peak_gb: float,
    before_gb: float,
    columns: int | None = None,
    cost: float | None = None,
) -> list[str]:
    """Return what a finished run says at its end, and what can be typed next.

    summary: that of the log, {} where there is none; peak_gb: the most memory, of which before_gb
    were there before the model was made; columns: as for report(); cost: dollars, None without a
    price.
    """
    if not summary.get('final_iter'):
        return []
    speed = summary['median_tokens_per_sec']
    mfu = summary['median_mfu']
    tokens = summary['tokens_seen']
    final, best = summary['final_val_loss'], summary['best_val_loss']
    done = [f'{summary["final_iter"]:,} iterations in {duration(summary["wall_s"] or 0)}']
    if tokens:
        done.append(f'{short_number(tokens)} tokens')
    if cost is not None:
        done.append(f'${cost:,.2f}')
    if speed:
        utilization = f', MFU {100 * mfu:.1f} %' if mfu else ''
        done.append(f'{short_number(speed)} tok/s{utilization} (median)')
    groups = {'Done': done}
    if best is not None:
        losses = [f'loss {final:.4f} at the end'] if final is not None else []
        if bits := summary.get('final_bits_per_byte'):
            losses.append(f'{bits:.3f} bits per byte')
        losses.append(f'best {best:.4f} at iteration {summary["best_val_iter"]:,}')
        path = store.path_of(c.out_dir, summary['best_val_iter'])
        groups['Validation'] = losses + ([path] if os.path.isdir(path) else [])
    since = f'{peak_gb - before_gb:.2f} GB of it since the model was made'
    groups['Memory'] = [f'peak {peak_gb:.2f} GB, {since}']
    if prediction:
        groups['Memory'].append(f'{prediction.total / 1e9:.2f} GB predicted for its tensors')
    groups['Run folder'] = [c.out_dir, f'log {run_name}.jsonl']
    lines = [
        line
        for title, phrases in groups.items()
        for line in group_lines(title, phrases, min(100, columns or 100))
    ]
    python = interpreter()
    return lines + [
        f'Next:        {python} sample.py --out_dir={c.out_dir}',
        f'             {python} plots/plot_single_run.py {c.out_dir}',
        f'             {python} export.py --out_dir={c.out_dir} --to={c.out_dir}/export',
    ]


def interpreter() -> str:
    """Return how the running Python is typed: 'python' where that is the same one."""
    found = shutil.which('python')
    if (
        found
        and os.path.realpath(found) == os.path.realpath(sys.executable)
        and os.path.dirname(found) == os.path.dirname(sys.executable)
    ):
        return 'python'
    inside = os.path.relpath(sys.executable)
    return sys.executable if inside.startswith(os.pardir) else inside


def memory_gb(device: torch.device) -> dict[str, float]:
    """Return the memory in 1e9 bytes: of torch's allocator on a GPU, of the whole process (resident
    set) on a CPU.
    """
    if device.type == 'cuda':
        return {
            f'{name}_gb': getattr(torch.cuda, f'{call}memory_{kind}')(device) / 1e9
            for name, call, kind in (
                ('allocated', '', 'allocated'),
                ('reserved', '', 'reserved'),
                ('max_allocated', 'max_', 'allocated'),
                ('max_reserved', 'max_', 'reserved'),
            )
        }
    with open('/proc/self/status') as f:
        kilobytes = {
            key: int(value.split()[0])
            for key, _, value in (line.partition(':') for line in f)
            if key in ('VmRSS', 'VmHWM')
        }
    resident, peak = 1024 * kilobytes['VmRSS'] / 1e9, 1024 * kilobytes['VmHWM'] / 1e9
    return {
        'allocated_gb': resident,
        'reserved_gb': resident,
        'max_allocated_gb': peak,
        'max_reserved_gb': peak,
    }
