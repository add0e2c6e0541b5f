"""What a run says of itself when it starts, and the memory it takes."""
import dataclasses
import platform

import torch

from engine import flops, topology
from engine.dataset import shares_of
from engine.loader import WindowOrder
from engine.logger import now
from engine.memory import Prediction, available
from engine.resume import config_record

VOCABULARIES = {50304: 'GPT-2', 50257: 'GPT-2', 32000: 'LLaMA-2', 128256: 'LLaMA-3', 151936: 'Qwen3'}


def cpu_name():
    with open('/proc/cpuinfo') as f:
        return next((line.split(':')[1].strip() for line in f if line.startswith('model name')), platform.machine())


def startup_info(c, model, optimizer, world, gpu_name, token_flops, prediction):
    """The `startup_info` of the log. prediction: engine.memory.Prediction or None."""
    counts = model.parameter_counts()
    gpu = torch.cuda.get_device_properties(world.device) if gpu_name else None
    return {
        'timestamp': now(),
        'model': {**{f'{kind}_params': count for kind, count in counts.items()}, 'architecture': model.config.describe(),
                  'flops_per_token': token_flops.total, 'flops_per_token_causal': token_flops.causal, 'float8_layers': model.float8_layers},
        'optimizer': {'type': type(optimizer).__name__, 'fused': bool(optimizer.defaults.get('fused')), 'param_groups': [
            {'kind': 'Muon' if group.get('muon') else 'AdamW', 'weight_decay': group['weight_decay'], 'num_tensors': len(group['params']), 'num_params': sum(p.numel() for p in group['params'])}
            for group in optimizer.param_groups]},
        'memory': prediction and {**dataclasses.asdict(prediction), 'total': prediction.total},
        'config': config_record(c),
        'hardware': {'gpu_name': gpu_name, 'num_gpus': world.size if gpu_name else 0, 'gpu_memory_gb': gpu.total_memory / 1e9 if gpu else None,
                     'cpu_name': cpu_name(), 'cpu_threads': torch.get_num_threads(), 'precision': c.dtype,
                     'parallelism': world.describe()},
    }


def size_of(parameters):
    """A number of parameters as people write it: ~1.545B or 60.821M."""
    return f'~{parameters / 1e9:.3f}B' if parameters >= 1e8 else f'{parameters / 1e6:.3f}M'


def _checkpoints(c):
    when = [f'every {c.save_interval:,} iterations'] * bool(c.save_interval) + ['when an evaluation improves'] * (not c.always_save_checkpoint)
    kept = 'all stay' if c.keep_all_checkpoints else (f"the {c.keep_checkpoints} newest" if c.keep_checkpoints > 1 else 'the newest') + (
        f', multiples of {c.keep_every:,}' if c.keep_every else '') + ' and the best stay'
    return f"{' and '.join(when)}, written {'while training goes on' if c.checkpoint_async else 'while training waits'}; {kept}" + (
        f'; copied to {c.upload_to}' if c.upload_to else '') + (
        f', of the copied ones the {c.upload_keep_local} newest and the best stay here' if c.upload_to and c.upload_keep_local else '')


def report(c, startup, meta, order, world, token_flops, sequences_per_step, loader_workers, resumed, notes):
    """Lines that say what will run: the effective model, the arithmetic of the batch, hardware, and every fallback."""
    hardware, counts = startup['hardware'], startup['model']
    family = VOCABULARIES.get(c.vocab_size)
    theta = f'{c.rope_theta / 1e6:g}M' if c.rope_theta >= 1e6 else f'{c.rope_theta / 1e3:g}K'
    position = {'rope': f"{'Extended ' if c.rope_theta > 10000 else ''}RoPE (theta={theta})" +
                (f' on {c.rotary_pct:.0%} of each head' if c.rotary_pct < 1 else '') +
                (f', {c.rope_scaling} x {c.rope_factor:g} from {c.rope_original_block_size} tokens' if c.rope_scaling != 'none' else ''),
                'learned_absolute': 'learned positions', 'none': 'no positions'}[c.position_encoding]
    tokens_per_step = sequences_per_step * c.block_size
    peak = flops.peak_flops(hardware['gpu_name'], c.dtype)
    per_second = f', peak {peak / 1e12:g} TFLOP/s each' if peak else ', peak not known: no MFU'
    total = counts['total_params']
    paths, slow_path = topology.describe(topology.read(world.here)) if hardware['gpu_name'] and world.here > 1 and world.main else (None, None)
    return [
        f'Architecture: {c.n_layer}L-{c.n_head}H-{c.n_embd}D-{c.d_ff}ff' +
        (f' with GQA ({c.num_key_value_heads} KV)' if c.num_key_value_heads != c.n_head else '') + f', {c.arch_preset}',
        f"Blocks: {position}, {c.normalization} ({c.norm_position}-norm, eps {c.norm_eps:g}), {c.ffn_type} FFN with {c.activation}"
        + (', attention sinks' if c.attention_sinks else '') + (f', window of {c.sliding_window} tokens in the layers {c.window_pattern}' if c.sliding_window else '')
        + (', documents kept apart' if c.document_mask else '') + (', QK-norm' if c.qk_norm else '') + (', parallel residual' if c.parallel_residual else '') + (', biases' if c.bias else ''),
        f'Vocab: {c.vocab_size}' + (f' ({family})' if family else '') + (', tied to the head' if c.weight_tying else ''),
        *([f'Experts: {c.num_experts} of width {c.expert_d_ff}, {c.num_experts_per_tok} per token' + (f' and {c.num_shared_experts} shared' if c.num_shared_experts else '')
           + (f', {c.topk_groups} of {c.n_groups} groups' if c.topk_groups < c.n_groups else '') + f', {c.score_function} affinities' + (f' x {c.route_scale:g}' if c.route_scale != 1 else '')
           + (f'; the first {c.n_dense_layers} layers are dense' if c.n_dense_layers else '') + f'; none dropped; balancing bias moves by {c.balance_rate:g}'
           + (f', auxiliary loss x {c.aux_loss_weight:g}' if c.aux_loss_weight else '') + (f', z-loss x {c.z_loss_weight:g}' if c.z_loss_weight else '')] if c.num_experts else []),
        f"Parameters: {size_of(total)} ({total:,}; {counts['non_embedding_params']:,} without embeddings)"
        + (f", {size_of(counts['active_params'])} active ({counts['active_params']:,})" if c.num_experts else ''),
        f'FLOPs per token: {token_flops.total:.4g} forward and backward, attention in full ({token_flops.causal:.4g} causal)',
        f'Batch: {c.batch_size} sequences x {c.block_size} tokens x {c.gradient_accumulation_steps} micro-steps x {world.size} ranks = '
        f'{tokens_per_step:,} tokens per iteration',
        f"Data: {c.data_url or c.dataset}, {meta.get('tokens', {}).get('train', order.per_epoch * c.block_size):,} training tokens" + (
            f' = {order.per_epoch / sequences_per_step:,.1f} iterations per epoch; {c.max_iters:,} iterations = {c.max_iters * sequences_per_step / order.per_epoch:.2f} epochs'
            if isinstance(order, WindowOrder) else f'; {c.max_iters:,} iterations are ' + ', '.join(
                f'{float(share * c.max_iters * sequences_per_step) / of_source.per_epoch:.2f} epochs of {name}'
                for (name, share), of_source in zip(shares_of(c.dataset), order.orders))),
        f"DataLoader: {f'{loader_workers} worker processes' if loader_workers else 'a thread with pinned memory' if world.device.type == 'cuda' else 'in process'}",
        f'Attention backend: {c.attention_backend}',
        f"CUDA Graphs: {'on' if c.use_cuda_graphs else 'off'}. Compile: {'on' if c.compile else 'off'}. Precision: "
        + (f'{c.dtype} autocast, float32 weights' if c.dtype != 'float32' else 'float32') + (f", {startup['model']['float8_layers']} linear layers in float8" if c.fp8 else '') + f". Deterministic: {'yes' if c.deterministic else 'no'}",
        f"Optimizer: {' and '.join(dict.fromkeys(g['kind'] for g in startup['optimizer']['param_groups']))}{' (fused)' if startup['optimizer']['fused'] else ''}; " + '; '.join(
            f"weight decay {g['weight_decay']:g} on {g['num_tensors']} tensors with {g['num_params']:,} parameters{' (Muon)' if g['kind'] == 'Muon' else ''}" for g in startup['optimizer']['param_groups']),
        f"Hardware: {world.size} x {hardware['gpu_name']} with {hardware['gpu_memory_gb']:.0f} GB{per_second}" if hardware['gpu_name'] else
        f"Hardware: {hardware['cpu_name']}, {hardware['cpu_threads']} threads per process, {world.size} process{'es' if world.size > 1 else ''}{per_second}",
        *([paths] if paths else []),
        *([f"Memory: {Prediction.of_log(startup['memory']).describe()}, {available(world.device) / 1e9:.1f} GB are free"] if startup['memory'] else []),
        f'Layout: {world.describe()}' + (f", gradients summed in {c.fsdp_reduce_dtype}" if world.fsdp and c.dtype != 'float32' else '')
        + (', parameters and optimizer state in the memory of the CPU' if c.fsdp_offload and world.fsdp else '')
        + {'none': '', 'selective': '; backward computes all but matmuls and attention again', 'full': '; backward computes all of each block again'}[c.activation_checkpointing],
        *([] if c.eval_only else [f'Checkpoints: {_checkpoints(c)}']),
        f'Run folder: {c.out_dir}' + (f", continuing at iter {resumed['step']}" if resumed else ''),
        *(f'Note: {note}' for note in [*notes, *([slow_path] if slow_path else [])]),
    ]


def memory_gb(device):
    """Memory in 1e9 bytes: of torch's allocator on a GPU, of the whole process (resident set) on a CPU."""
    if device.type == 'cuda':
        return {f'{name}_gb': getattr(torch.cuda, f'{call}memory_{kind}')(device) / 1e9 for name, call, kind in (
            ('allocated', '', 'allocated'), ('reserved', '', 'reserved'), ('max_allocated', 'max_', 'allocated'), ('max_reserved', 'max_', 'reserved'))}
    with open('/proc/self/status') as f:
        kilobytes = {key: int(value.split()[0]) for key, _, value in (line.partition(':') for line in f) if key in ('VmRSS', 'VmHWM')}
    resident, peak = 1024 * kilobytes['VmRSS'] / 1e9, 1024 * kilobytes['VmHWM'] / 1e9
    return {'allocated_gb': resident, 'reserved_gb': resident, 'max_allocated_gb': peak, 'max_reserved_gb': peak}
