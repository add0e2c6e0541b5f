"""
Trains a language model on token files: one process, or many under torchrun.

    python train.py config/demo_pystdlib.py
    python train.py config/train_shakespeare_char.py --device=cpu --compile=False --max_iters=2000
    python train.py config/full_llama_1.36b.py --init_from=resume
    torchrun --standalone --nproc_per_node=8 train.py config/full_llama_1.36b.py --batch_size=24

`python train.py --help` lists every key. Exit codes: 0 done, 2 something given cannot be run, 3 loss or weights are not
finite, 130 and 143 stopped by Ctrl-C or SIGTERM after saving (torchrun itself then exits with 1).
"""
from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import math
import os
import platform
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from typing import Literal

import torch

from data.tokenizer import tokenizer_of
from engine import checkpoint, flops, optim, parallel
from engine.attention import choose_backend
from engine.configurator import ConfigError, resolve
from engine.loader import TrainLoader, WindowOrder, check_fit, evaluation_batches, mix, open_dataset
from engine.logger import RunLog, new_run_name, now
import huggingface
from model import FAMILY_NAMES, Model, ModelConfig, resolve_shape

ROOT = os.path.dirname(os.path.abspath(__file__))


@dataclass
class Config:
    # I/O
    out_dir: str = 'out'  # the run's folder: logs, checkpoints
    eval_interval: int = 2000  # iterations between evaluations; a checkpoint is saved before each
    log_interval: int = 1  # iterations between logged iterations
    eval_iters: int = 200  # batches per evaluation and split, over all ranks together
    eval_only: bool = False  # evaluate once and exit
    eval_at_start: bool = True  # evaluate before the first iteration too
    always_save_checkpoint: bool = True  # False: at evaluations save only when the validation loss improved
    keep_checkpoints: int = 2  # newest checkpoints that stay, beside the one with the best validation loss
    keep_all_checkpoints: bool = False  # never remove one
    init_from: str = 'scratch'  # 'scratch' | 'resume' | 'gpt2', 'gpt2-medium', ... | a Hugging Face folder or hub id
    sample_interval: int = 0  # iterations between samples shown on the terminal, 0 = none
    sample_start: str = '\n'  # their prompt
    save_log_to_json: bool = True  # keep run_*.json beside run_*.jsonl
    log_save_interval: int = 100  # iterations between rewrites of run_*.json
    gradient_log_interval: int = 0  # iterations between gradient statistics (which are logged at once), 0 = none
    wandb_log: bool = False
    wandb_project: str = 'onetrain'
    wandb_run_name: str = 'run'
    tensorboard_log: bool = False  # TensorBoard events in out_dir/tensorboard
    # data
    dataset: str = 'openwebtext'  # a folder of data/ with train.bin and val.bin
    gradient_accumulation_steps: int = 40  # micro-steps per iteration on each rank
    batch_size: int = 12  # sequences per micro-step on each rank
    block_size: int = 1024  # tokens per sequence
    total_batch_size: int = 0  # tokens per iteration over all ranks; sets gradient_accumulation_steps, 0 = off
    seed: int = 1337  # of the weights, the data order and dropout
    use_dataloader: bool = False  # gather batches in worker processes (the same batches)
    dataloader_num_workers: int = 4
    dataloader_prefetch_factor: int = 2  # batches each worker prepares ahead
    # model; None = what arch_preset says
    arch_preset: Literal['gpt2', 'llama', 'llama3', 'qwen3', 'neox', 'custom'] = 'gpt2'
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    num_key_value_heads: int | None = None  # below n_head: grouped-query attention
    head_dim: int | None = None  # None: n_embd / n_head
    d_ff: int | None = None  # width of the feed-forward layer (alias: intermediate_size)
    vocab_size: int | None = None  # None: the data set's, else the preset's
    dropout: float = 0.0
    bias: bool | None = None  # in linear layers (never the head); with layernorm also in the norms
    normalization: Literal['layernorm', 'layernorm_nobias', 'rmsnorm'] | None = None
    norm_eps: float | None = None
    norm_position: Literal['pre', 'post'] | None = None
    activation: Literal['gelu', 'gelu_tanh', 'silu', 'relu', 'relu2'] | None = None
    ffn_type: Literal['standard', 'swiglu'] | None = None
    position_encoding: Literal['learned_absolute', 'rope', 'none'] | None = None
    rope_theta: float | None = None
    rotary_pct: float | None = None  # share of each head that RoPE turns
    qk_norm: bool | None = None  # RMSNorm on each head of q and k
    parallel_residual: bool | None = None  # attention and MLP read the same x (GPT-NeoX)
    weight_tying: bool | None = None  # the head is the token table
    attention_backend: Literal['flash_attn_3', 'flash_attn_2', 'sdpa', 'manual'] = 'sdpa'  # falls back in this order
    # optimiser: AdamW, warm-up and cosine
    learning_rate: float = 6e-4  # at the end of the warm-up
    max_iters: int = 600000  # iterations in all
    weight_decay: float = 1e-1  # on parameters with two dimensions or more
    beta1: float = 0.9
    beta2: float = 0.95
    grad_clip: float = 1.0  # largest global norm of the gradient, 0 = off
    decay_lr: bool = True
    warmup_iters: int = 2000
    lr_decay_iters: int = 600000  # where the cosine reaches min_lr
    min_lr: float = 6e-5
    # system
    device: str | None = None  # 'cpu' | 'cuda' | 'cuda:1'; None: a GPU if there is one
    dtype: Literal['float32', 'bfloat16', 'float16'] | None = None  # of the matmuls; weights stay float32. None: bfloat16 on a GPU, float32 on a CPU
    compile: bool = True  # torch.compile the model
    deterministic: bool = True  # kernels that repeat to the last bit
    backend: Literal['nccl', 'gloo'] | None = None  # of torch.distributed; None: nccl on GPUs, gloo on CPUs
    use_zero1: bool = False  # shard the optimizer state (not in this version: runs as DDP and says so)
    use_fsdp: bool = False  # shard everything (refused in this version)
    fsdp_min_num_params: int | None = None  # only with use_fsdp
    fsdp_activation_checkpointing: bool | None = None  # only with use_fsdp
    use_cuda_graphs: bool = False  # (not in this version: runs without and says so)


ALIASES = {
    'intermediate_size': lambda value: {'d_ff': value},
    'flash_attn': lambda value: {'attention_backend': {True: 'flash_attn_2', False: 'sdpa'}.get(value, f'flash_attn={value}')},
}
SHAPE_KEYS = ['arch_preset', *(field.name for field in dataclasses.fields(ModelConfig))]
# what a resumed run takes from its own command line, never from the checkpoint
NOT_INHERITED = ('out_dir', 'init_from', 'eval_only', 'eval_at_start', 'device', 'backend')


def main(argv=None):
    """Run the trainer with command-line arguments `argv`; returns the exit code."""
    try:
        return run(sys.argv[1:] if argv is None else argv)
    except ConfigError as error:
        if int(os.environ.get('RANK', 0)) == 0:
            print(f'error: {error}', file=sys.stderr, flush=True)
        return 2


def run(argv):
    # ---- configuration, processes, device
    c, given = resolve(Config, argv, ALIASES)
    notes = []  # fallbacks and changes, told in the report
    refuse_impossible(c, given, notes)
    if c.deterministic:
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')  # read by cuBLAS when CUDA starts
    world = parallel.start(c.device, c.backend)
    device = world.device

    # ---- where to start from: settings now, weights when the model exists
    resumed = nanogpt = hf_folder = None
    if c.init_from == 'resume':
        c, resumed, nanogpt = find_checkpoint(c, given, world, notes)
    elif c.init_from != 'scratch':
        c, hf_folder = find_huggingface(c, given)
    start_step = resumed['step'] if resumed else 0

    # ---- data and the model's shape
    train_file, val_file, meta = open_dataset(c.dataset, ROOT)
    shape = resolve_shape(dataclasses.asdict(c), meta.get('vocab_size'))
    for file in sorted((train_file, val_file), key=len):
        check_fit(file, shape.vocab_size, shape.block_size)
    dtype = c.dtype or ('float32' if device.type == 'cpu' else 'bfloat16' if torch.cuda.is_bf16_supported() else 'float16')
    if dtype == 'float16' and device.type == 'cpu':
        raise ConfigError('dtype=float16 needs a GPU: type --dtype=bfloat16 or --dtype=float32')
    torch_dtype = getattr(torch, dtype)
    attention_backend, passed_over = choose_backend(c.attention_backend, device.type, torch_dtype, shape.head_dim, c.dropout)
    if passed_over:
        notes.append(f'attention_backend={c.attention_backend} falls back to {attention_backend} ({"; ".join(passed_over)})')
    if c.compile and device.type == 'cpu' and not (shutil.which('g++') or shutil.which('clang++') or os.environ.get('CXX')):
        notes.append('compile=True needs a C++ compiler, and there is none: running without')
        c.compile = False

    # ---- batch arithmetic
    accumulation = accumulation_steps(c, world.size)
    sequences_per_step = c.batch_size * accumulation * world.size
    tokens_per_step = sequences_per_step * c.block_size
    position = start_step * sequences_per_step if nanogpt else resumed['position'] if resumed else 0
    tokens = resumed.get('tokens', position * c.block_size) if resumed else 0
    if resumed and not nanogpt and resumed['tokens_per_step'] != tokens_per_step:
        notes.append(f"{tokens_per_step} tokens per iteration from now on (it was {resumed['tokens_per_step']}); --total_batch_size fixes them "
                     f'for any number of processes')
    if resumed and resumed.get('threads', torch.get_num_threads()) != torch.get_num_threads():
        notes.append(f"{torch.get_num_threads()} CPU threads (it was {resumed['threads']}): sums are rounded differently, so losses differ in the last bits")
    fingerprints = {'train': train_file.fingerprint, 'val': val_file.fingerprint}
    if resumed and resumed.get('data', fingerprints)['train'] != fingerprints['train']:
        notes.append(f'the training data is not that of the checkpoint: its stream starts at position 0 (it was at {position})')
        position = 0
    c = dataclasses.replace(c, dtype=dtype, attention_backend=attention_backend, gradient_accumulation_steps=accumulation, device=device.type,
                            backend=world.backend, use_zero1=False, use_cuda_graphs=False, **dataclasses.asdict(shape))
    if c.decay_lr and c.lr_decay_iters > c.max_iters and c.min_lr < c.learning_rate:
        notes.append(f'the learning rate does not reach min_lr: lr_decay_iters={c.lr_decay_iters} lies beyond max_iters={c.max_iters}')

    tokenizer = sample_ids = None
    if c.sample_interval:
        tokenizer, sample_ids = sample_prompt(c, meta)

    # ---- the run's folder
    run_name = None
    if not c.eval_only:
        make_folder(c.out_dir)
        if not resumed:
            keep_finished_run(c, world, notes)
        run_name = parallel.share(resumed.get('run_name') if resumed else None, world)
        run_name = run_name or parallel.share(new_run_name(c.out_dir), world)

    # ---- model
    if c.deterministic:
        torch.use_deterministic_algorithms(True, warn_only=device.type == 'cuda')
        torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid that costs a write per buffer
    torch.manual_seed(c.seed)
    model = Model.empty(shape, attention_backend, c.dropout, device)
    if nanogpt:
        model.load_state_dict(nanogpt['model'])
    elif hf_folder:
        model.load_state_dict(huggingface.read_weights(hf_folder, shape))
    elif not resumed:
        model.init_weights(c.seed)
    step_model = torch.compile(model) if c.compile else model  # what evaluation calls
    train_model = parallel.wrap(step_model, world)

    # ---- optimizer
    named = dict(model.named_parameters())
    parameters = list(named.values())
    optimizer = optim.build_adamw(named, learning_rate=c.learning_rate, betas=(c.beta1, c.beta2), weight_decay=c.weight_decay, device_type=device.type)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == 'float16')
    autocast = contextlib.nullcontext() if dtype == 'float32' else torch.autocast(device.type, dtype=torch_dtype)
    best_val_loss = math.inf
    if resumed:
        best_val_loss = math.inf if resumed['best_val_loss'] is None else resumed['best_val_loss']
        if nanogpt:
            for name, tensor in optim.named_state(optimizer, named).items():
                tensor.copy_(nanogpt['optimizer'][name])
        else:
            checkpoint.load(resumed['path'], checkpoint_tensors(named, None if c.eval_only else optimizer), world.size)
            scaler.load_state_dict(resumed['scaler'])

    # ---- log and report
    loader_workers = c.dataloader_num_workers if c.use_dataloader else 0
    order = WindowOrder(len(train_file), c.block_size, c.seed)
    token_flops = flops.per_token(model.matmul_weights(), n_layer=c.n_layer, n_head=c.n_head, head_dim=c.head_dim, block_size=c.block_size)
    gpu_name = torch.cuda.get_device_name(device) if device.type == 'cuda' else None
    startup = startup_info(c, model, optimizer, world, gpu_name, token_flops)
    header = {'config': dataclasses.asdict(c), 'startup_info': startup,
              'metadata': {key: getattr(c, key) for key in ('device', 'dtype', 'compile', 'use_zero1', 'use_fsdp')} | {'world_size': world.size}}
    evaluated = checkpoint.read_evaluation(c.out_dir, start_step) if resumed and not nanogpt else None
    if evaluated and evaluated['val'] < best_val_loss:
        best_val_loss = evaluated['val']
    log = RunLog(c.out_dir, run_name, header, active=world.main, write=not c.eval_only, resume_step=start_step if resumed else None,
                 evaluated=evaluated is not None, save_json=c.save_log_to_json, save_interval=c.log_save_interval, total=c.max_iters, first=start_step)
    if world.main and not c.eval_only:
        if c.wandb_log:
            log.to_wandb(c.wandb_project, c.wandb_run_name)
        if c.tensorboard_log:
            log.to_tensorboard()
    if resumed and not nanogpt and not log.has_checkpoint(start_step):
        log.event('checkpoint', iter=start_step, val_loss=None, path=resumed['path'], timestamp=now(), stall_ms=None)
    for line in report(c, startup, meta, order, world, token_flops, sequences_per_step, loader_workers, resumed, notes):
        log.say(line)

    @torch.no_grad()
    def evaluate():
        """{'train': loss, 'val': loss} over the fixed evaluation windows, the same on every rank."""
        step_model.eval()
        losses = {}
        for split, file in (('train', train_file), ('val', val_file)):
            total = torch.zeros(2, dtype=torch.float64, device=device)  # sum of losses, targets
            for x, y in evaluation_batches(file, c.block_size, c.batch_size, c.eval_iters, world.rank, world.size):
                with autocast:
                    loss = step_model(x.to(device), y.to(device), reduction='sum')
                total += torch.stack([loss.double(), torch.tensor(float(y.numel()), dtype=torch.float64, device=device)])
            total = parallel.sum_over_ranks(total, world)
            losses[split] = (total[0] / total[1]).item()
        step_model.train()
        return losses

    def save():
        started = time.perf_counter()
        state = {'run_name': run_name, 'position': position, 'tokens': tokens, 'tokens_per_step': tokens_per_step, 'config': dataclasses.asdict(c),
                 'threads': torch.get_num_threads(), 'best_val_loss': None if best_val_loss == math.inf else best_val_loss, 'scaler': scaler.state_dict(), 'data': fingerprints,
                 'world_size': world.size, 'versions': {'torch': torch.__version__, 'python': platform.python_version()}}
        path = checkpoint.save(c.out_dir, step, checkpoint_tensors(named, optimizer), state, world, c.keep_checkpoints, c.keep_all_checkpoints)
        seconds = time.perf_counter() - started
        log.event('checkpoint', iter=step, val_loss=None, path=path, timestamp=now(), stall_ms=1000 * seconds)
        log.say(f'saved {path} in {seconds:.1f} s')

    def sample():
        generator = torch.Generator(device).manual_seed(c.seed)  # its own, so that training draws what it would without
        with autocast:
            text = tokenizer.decode(model.generate(sample_ids.to(device), 128, temperature=0.8, top_k=50, generator=generator)[0].tolist())
        log.say(f'---- sample at iter {step}\n{text}\n----')

    if c.eval_only:
        losses = evaluate()
        log.say(f"iter {start_step}: train loss {losses['train']:.4f}, val loss {losses['val']:.4f}")
        log.close()
        return 0

    loader = TrainLoader(train_file, order, batch_size=c.batch_size, rank=world.rank, world_size=world.size, position=position,
                         device=device, num_workers=loader_workers, prefetch_factor=c.dataloader_prefetch_factor)
    stop = StopSignals(log)
    step, saved_step, exit_code = start_step, start_step if resumed and not nanogpt else -1, 0
    interval_start, interval_steps, warming_up = time.perf_counter(), 0, True

    # ---- the loop: once in a while save, evaluate, sample; then one step; then log
    while True:
        stopping = parallel.any_rank(stop.signal is not None, world)
        evaluating = step % c.eval_interval == 0 and (step > 0 or c.eval_at_start) and not stopping and not (step == start_step and evaluated)
        sampling = c.sample_interval and step % c.sample_interval == 0 and step > start_step
        ending = step >= c.max_iters or stopping
        if evaluating or sampling or ending:
            pause = pause_started(device)
            if not all_finite(parameters):  # never save them: the older checkpoints are worth more
                log.say(f'the weights are not finite at iter {step}: stopping. Resume from {checkpoint.folder_of(c.out_dir)} with a lower --learning_rate')
                exit_code = 3
                break
            if (ending or evaluating and c.always_save_checkpoint) and step not in (saved_step, 0):
                save()
                saved_step = step
            if evaluating:
                losses = evaluate()
                log.event('eval', iter=step, train_loss=losses['train'], val_loss=losses['val'], timestamp=now(), lr=learning_rate(c, max(0, step - 1)),
                          tokens_seen=tokens)
                log.say(f"iter {step}: train loss {losses['train']:.4f}, val loss {losses['val']:.4f}")
                if improved := losses['val'] < best_val_loss:
                    best_val_loss = losses['val']
                if improved and not c.always_save_checkpoint and step not in (saved_step, 0):
                    save()
                    saved_step = step
                if world.main:
                    checkpoint.record_evaluation(c.out_dir, step, losses)
            if sampling and world.main:
                sample()
            interval_start += time.perf_counter() - pause
        if ending:
            exit_code = 128 + stop.signal if stop.signal else 143 if stopping else 0
            break

        lr = learning_rate(c, step)
        optim.set_learning_rate(optimizer, lr)
        step_loss = torch.zeros((), device=device)
        for micro_step in range(accumulation):
            x, y, first_position = loader.next()
            if c.dropout:
                torch.manual_seed(mix(c.seed, first_position) % 2**63)  # masks are a function of the data, not of the layout
            with parallel.last_micro_step(train_model, micro_step == accumulation - 1):
                with autocast:
                    # the sum over this rank's targets, over the targets of the whole step; DDP averages, hence world.size
                    loss = train_model(x, y, reduction='sum') * (world.size / tokens_per_step)
                scaler.scale(loss).backward()
            step_loss += loss.detach()
        scaler.unscale_(optimizer)
        measuring = c.gradient_log_interval and (step + 1) % c.gradient_log_interval == 0
        statistics = optim.gradient_statistics(parameters) if measuring else {}
        grad_norm = optim.clip_gradients(parameters, c.grad_clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        position += sequences_per_step
        tokens += tokens_per_step
        interval_steps += 1

        log.progress(step)
        if step % c.log_interval == 0 or measuring or step in (start_step + 1, c.max_iters):
            loss_value = parallel.sum_over_ranks(step_loss, world).item() / world.size  # the only wait for the device
            seconds = (time.perf_counter() - interval_start) / interval_steps
            rate = tokens_per_step / seconds
            mfu = -100.0 if warming_up else flops.utilisation(token_flops, rate, device_name=gpu_name, dtype=dtype, num_devices=world.size,
                                                              architecture=shape.describe())
            gradients = {'global_norm': grad_norm.item(), **{key: value.item() for key, value in statistics.items()}}
            log.event('iter', iter=step, loss=loss_value, lr=lr, tokens_seen=tokens, time_ms=1000 * seconds, tokens_per_sec=rate,
                      data_wait_ms=1000 * loader.wait_s / interval_steps, wall_s=log.wall_s(), mfu=mfu, memory=memory_gb(device), gradients=gradients)
            shown = f", mfu {mfu['mfu_percent']:.2f}%" if isinstance(mfu, dict) and mfu['mfu'] is not None else ''
            log.say(f"iter {step}: loss {loss_value:.4f}, lr {lr:.2e}, grad norm {gradients['global_norm']:.3f}, time {1000 * seconds:.1f} ms, "
                    f"{rate:,.0f} tokens/s{shown}")
            if not math.isfinite(loss_value):
                log.say(f'the loss is not finite at iter {step}: stopping. Resume from the checkpoints in {checkpoint.folder_of(c.out_dir)} '
                        f'with a lower --learning_rate')
                exit_code = 3
                break
            interval_start, interval_steps, warming_up, loader.wait_s = time.perf_counter(), 0, False, 0.0

    loader.close()
    stop.restore()
    if exit_code in (130, 143):
        log.say(f'stopped at iter {step}; --init_from=resume continues' if step else 'stopped before the first iteration, nothing was saved')
    log.close()
    parallel.barrier(world)  # the main rank may still be writing, and torchrun ends all when one leaves with an error
    return exit_code


def refuse_impossible(c, given, notes):
    """Raise ConfigError for values that no run can have; note options that this version cannot obey but may ignore."""
    for key in ('eval_interval', 'log_interval', 'eval_iters', 'gradient_accumulation_steps', 'batch_size', 'block_size', 'max_iters',
                'keep_checkpoints', 'log_save_interval', 'dataloader_num_workers', 'dataloader_prefetch_factor'):
        if getattr(c, key) < 1:
            raise ConfigError(f'{key}={getattr(c, key)} must be at least 1')
    for key in ('sample_interval', 'gradient_log_interval', 'total_batch_size', 'weight_decay', 'grad_clip', 'warmup_iters', 'min_lr', 'learning_rate'):
        if getattr(c, key) < 0:
            raise ConfigError(f'{key}={getattr(c, key)} must not be negative')
    if not 0 <= c.dropout < 1:
        raise ConfigError(f'dropout={c.dropout} must be at least 0 and below 1')
    for key in ('beta1', 'beta2'):
        if not 0 <= getattr(c, key) < 1:
            raise ConfigError(f'{key}={getattr(c, key)} must be at least 0 and below 1')
    if not 0 <= c.seed < 2**63:
        raise ConfigError(f'seed={c.seed} must be at least 0 and below 2**63')
    for key, package in (('wandb_log', 'wandb'), ('tensorboard_log', 'tensorboard')):
        if getattr(c, key) and package not in sys.modules and importlib.util.find_spec(package) is None:
            raise ConfigError(f'{key}=True needs the package {package}: pip install {package}, or leave it out')
    if c.decay_lr and c.warmup_iters >= c.max_iters and c.init_from != 'resume':
        notes.append(f'the learning rate never leaves its warm-up: warmup_iters={c.warmup_iters}, max_iters={c.max_iters}')
    if c.decay_lr and c.min_lr > c.learning_rate:
        notes.append(f'the learning rate rises after the warm-up: min_lr={c.min_lr} is above learning_rate={c.learning_rate}')
    if c.use_fsdp:
        raise ConfigError('use_fsdp=True is not in this version: type --use_fsdp=False, which trains with DDP under torchrun')
    if c.use_zero1:
        notes.append('use_zero1=True is not in this version: the optimizer state is whole on every rank, as under DDP; the results are the same')
    if c.use_cuda_graphs:
        notes.append('use_cuda_graphs=True is not in this version: running without; the results are the same')
    for key in ('fsdp_min_num_params', 'fsdp_activation_checkpointing'):
        if given.get(key) and getattr(c, key):
            notes.append(f'{key} has no effect without use_fsdp=True')
    for key in ('dataloader_num_workers', 'dataloader_prefetch_factor'):
        if given.get(key) == 'command line' and not c.use_dataloader:
            notes.append(f'{key} has no effect without use_dataloader=True')


def find_checkpoint(c, given, world, notes):
    """(config, state of the newest whole checkpoint in c.out_dir, nanoGPT's content or None) to resume from.

    Keys that the user did not set now are taken from the checkpoint. The shape of the model cannot be changed.
    """
    if world.main and not c.eval_only:
        checkpoint.tidy(c.out_dir)
    step, rejected = parallel.share(checkpoint.newest_whole(c.out_dir) if world.main else None, world)
    if world.main and not c.eval_only and step is not None:
        checkpoint.set_aside_rejected(path for path, _ in rejected)
    notes += [f'rejected {path}: {reason}' for path, reason in rejected]
    nanogpt = None
    if step is not None:
        path = checkpoint.path_of(c.out_dir, step)
        state = {**checkpoint.read_state(path), 'path': path}
    elif os.path.isfile(os.path.join(c.out_dir, 'ckpt.pt')):
        nanogpt = checkpoint.read_nanogpt(os.path.join(c.out_dir, 'ckpt.pt'))
        state = {'step': nanogpt['step'], 'best_val_loss': nanogpt['best_val_loss'], 'config': nanogpt['config']}
        notes.append(f"imported nanoGPT's {os.path.join(c.out_dir, 'ckpt.pt')} at iter {nanogpt['step']}; it stays as it is")
    else:
        why = ''.join(f'; {path}: {reason}' for path, reason in rejected)
        raise ConfigError(f'init_from=resume, but {checkpoint.folder_of(c.out_dir)} has no checkpoint that can be used{why}: '
                          f'type --init_from=scratch to start, or the --out_dir of the run to continue')
    known = {field.name for field in dataclasses.fields(Config)}
    saved = {key: value for key, value in state['config'].items() if key in known and key not in NOT_INHERITED}
    for key, source in given.items():
        now_value = getattr(c, key)
        if key not in saved or now_value == saved[key] or now_value is None and key in SHAPE_KEYS:
            continue
        if key == 'gradient_accumulation_steps' and saved['total_batch_size'] and source != 'command line':
            continue  # a recipe's value, which total_batch_size overruled when the run began
        if key in SHAPE_KEYS or key == 'seed':
            raise ConfigError(f'{source}: {key}={now_value!r}, but the checkpoint in {c.out_dir} has {key}={saved[key]!r}, which cannot change: '
                              f'leave --{key} out, or start in another --out_dir')
        del saved[key]
        notes.append(f"{key}={now_value} from now on ({source}; it was {state['config'][key]})")
    if given.get('gradient_accumulation_steps') == 'command line' and not given.get('total_batch_size') and saved.get('total_batch_size'):
        notes.append(f"total_batch_size={saved['total_batch_size']} of the checkpoint gives way to gradient_accumulation_steps={c.gradient_accumulation_steps}")
        saved['total_batch_size'] = 0
    return dataclasses.replace(c, **saved), state, nanogpt


def find_huggingface(c, given):
    """(config with the shape of the Hugging Face model that c.init_from names, its local folder)."""
    if not huggingface.is_source(c.init_from):
        raise ConfigError(f"init_from={c.init_from!r} is not 'scratch', 'resume', 'gpt2...', a Hugging Face folder (with config.json) or a hub id (org/name)")
    folder = huggingface.fetch(c.init_from)
    settings = huggingface.read_settings(folder)
    if given.get('arch_preset') and {c.arch_preset, settings['arch_preset']} not in ({settings['arch_preset']}, {'llama', 'llama3'}):
        raise ConfigError(f"{given['arch_preset']}: arch_preset={c.arch_preset!r}, but {c.init_from} is {settings['arch_preset']!r}: leave --arch_preset out")
    if c.block_size > settings['block_size'] and given.get('block_size'):
        raise ConfigError(f"block_size={c.block_size} is beyond the {settings['block_size']} positions of {c.init_from}: "
                          f"type --block_size={settings['block_size']} or less")
    settings['block_size'] = min(c.block_size, settings['block_size'])
    for key in set(SHAPE_KEYS) - {'arch_preset', 'block_size'}:
        if given.get(key) and getattr(c, key) is not None and getattr(c, key) != settings[key]:
            raise ConfigError(f'{given[key]}: {key}={getattr(c, key)!r}, but {c.init_from} has {key}={settings[key]!r}: leave --{key} out')
    return dataclasses.replace(c, **settings), folder


def accumulation_steps(c, world_size):
    """Micro-steps per iteration on each rank. Raises ConfigError if total_batch_size is no multiple of one micro-step."""
    if not c.total_batch_size:
        return c.gradient_accumulation_steps
    micro_step = c.batch_size * c.block_size * world_size
    if c.total_batch_size % micro_step:
        below = c.total_batch_size // micro_step * micro_step
        near = ' or '.join(str(value) for value in (below, below + micro_step) if value)
        raise ConfigError(f'total_batch_size={c.total_batch_size} is not a multiple of batch_size {c.batch_size} x block_size {c.block_size} x '
                          f'{world_size} ranks = {micro_step} tokens: type --total_batch_size={near}')
    return c.total_batch_size // micro_step


def keep_finished_run(c, world, notes):
    """Before a new run in a folder with checkpoints: set those of a finished run aside, refuse if the run could go on."""
    found = checkpoint.steps(c.out_dir)
    if not found:
        return
    path = checkpoint.path_of(c.out_dir, found[-1])
    finished, name = False, 'earlier'
    if os.path.isfile(os.path.join(path, 'state.json')) and checkpoint.why_broken(path) is None:
        state = checkpoint.read_state(path)
        finished, name = state['step'] >= state['config']['max_iters'], state['run_name']
    if not finished:
        raise ConfigError(f'{c.out_dir} holds an unfinished run, up to {path}: continue it with --init_from=resume, start this one in another '
                          f'--out_dir, or move {checkpoint.folder_of(c.out_dir)} away')
    parallel.barrier(world)  # every rank has looked before the folder is renamed
    moved = parallel.share(checkpoint.set_aside(c.out_dir, name) if world.main else None, world)
    notes.append(f'{c.out_dir} held the finished run {name}: its checkpoints are now in {moved}')


def make_folder(path):
    """Make the run's folder. Raises ConfigError where nothing can be written."""
    try:
        os.makedirs(path, exist_ok=True)
        writable = os.access(path, os.W_OK)
    except OSError as error:
        raise ConfigError(f'out_dir={path!r} cannot be made ({error.strerror}): give another --out_dir') from None
    if not writable:
        raise ConfigError(f'out_dir={path!r} is not writable: give another --out_dir')


def sample_prompt(c, meta):
    """(tokenizer of the data set, ids of c.sample_start as a (1, n) int64 tensor)."""
    try:
        tokenizer = tokenizer_of(os.path.join(ROOT, 'data', c.dataset), meta)
        ids = torch.from_numpy(tokenizer.encode(c.sample_start).astype('int64'))[None]
    except ValueError as error:
        raise ConfigError(f'sample_start={c.sample_start!r}: {error}') from None
    if ids.size(1) == 0:
        raise ConfigError('sample_start is empty: give the text that samples begin with, or --sample_interval=0')
    return tokenizer, ids


def all_finite(parameters):
    return bool(torch.stack([p.detach().isfinite().all() for p in parameters]).all())


def checkpoint_tensors(named_parameters, optimizer):
    """What a checkpoint holds, {name: tensor}: parameters, and the optimizer's state unless optimizer is None."""
    tensors = {f'model.{name}': p.detach() for name, p in named_parameters.items()}
    if optimizer is not None:
        tensors.update({f'optimizer.{name}': tensor for name, tensor in optim.named_state(optimizer, named_parameters).items()})
    return tensors


def learning_rate(c, step):
    return optim.learning_rate_at(step, learning_rate=c.learning_rate, min_lr=c.min_lr, warmup_iters=c.warmup_iters,
                                  lr_decay_iters=c.lr_decay_iters, decay_lr=c.decay_lr)


def pause_started(device):
    """The time at which all steps so far are done: what follows is not theirs."""
    if device.type == 'cuda':
        torch.cuda.synchronize()
    return time.perf_counter()


def memory_gb(device):
    """Memory in 1e9 bytes: of torch's allocator on a GPU, of the whole process (resident set) on a CPU."""
    if device.type == 'cuda':
        return {f'{name}_gb': getattr(torch.cuda, f'{call}memory_{kind}')(device) / 1e9 for name, call, kind in (
            ('allocated', '', 'allocated'), ('reserved', '', 'reserved'), ('max_allocated', 'max_', 'allocated'), ('max_reserved', 'max_', 'reserved'))}
    with open('/proc/self/status') as f:
        kilobytes = {key: int(value.split()[0]) for key, _, value in (line.partition(':') for line in f) if key in ('VmRSS', 'VmHWM')}
    resident, peak = 1024 * kilobytes['VmRSS'] / 1e9, 1024 * kilobytes['VmHWM'] / 1e9
    return {'allocated_gb': resident, 'reserved_gb': resident, 'max_allocated_gb': peak, 'max_reserved_gb': peak}


class StopSignals:
    """Ctrl-C (SIGINT) and SIGTERM set `signal`; the loop saves at the next step boundary and leaves. A second Ctrl-C leaves at once."""

    def __init__(self, log):
        self.signal, self.time, self.log = None, 0.0, log
        self.before = {number: signal.signal(number, self._received) for number in (signal.SIGINT, signal.SIGTERM)}

    def _received(self, number, frame):
        # torchrun passes on the Ctrl-C that the terminal has sent already, hence the second of grace
        if self.signal is not None:
            if number == signal.SIGINT and time.perf_counter() - self.time > 1.0:
                os._exit(128 + number)
            return
        self.signal, self.time = number, time.perf_counter()
        os.write(2, b'\nstopping after this step, with a checkpoint (Ctrl-C again: at once, without)\n' if self.log.active else b'')

    def restore(self):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def cpu_name():
    with open('/proc/cpuinfo') as f:
        return next((line.split(':')[1].strip() for line in f if line.startswith('model name')), platform.machine())


def startup_info(c, model, optimizer, world, gpu_name, token_flops):
    """The `startup_info` of the log."""
    counts = model.parameter_counts()
    gpu = torch.cuda.get_device_properties(world.device) if gpu_name else None
    return {
        'timestamp': now(),
        'model': {**{f'{kind}_params': count for kind, count in counts.items()}, 'architecture': model.config.describe(),
                  'flops_per_token': token_flops.total, 'flops_per_token_causal': token_flops.causal},
        'optimizer': {'type': type(optimizer).__name__, 'fused': bool(optimizer.defaults.get('fused')), 'param_groups': [
            {'weight_decay': group['weight_decay'], 'num_tensors': len(group['params']), 'num_params': sum(p.numel() for p in group['params'])}
            for group in optimizer.param_groups]},
        'config': dataclasses.asdict(c),
        'hardware': {'gpu_name': gpu_name, 'num_gpus': world.size if gpu_name else 0, 'gpu_memory_gb': gpu.total_memory / 1e9 if gpu else None,
                     'cpu_name': cpu_name(), 'cpu_threads': torch.get_num_threads(), 'precision': c.dtype,
                     'parallelism': 'DDP' if world.size > 1 else 'single'},
    }


def report(c, startup, meta, order, world, token_flops, sequences_per_step, loader_workers, resumed, notes):
    """Lines that say what will run: the effective model, the arithmetic of the batch, hardware, and every fallback."""
    hardware, counts = startup['hardware'], startup['model']
    family = FAMILY_NAMES.get(c.vocab_size)
    theta = f'{c.rope_theta / 1e6:g}M' if c.rope_theta >= 1e6 else f'{c.rope_theta / 1e3:g}K'
    position = {'rope': f"{'Extended ' if c.rope_theta > 10000 else ''}RoPE (theta={theta})" +
                (f' on {c.rotary_pct:.0%} of each head' if c.rotary_pct < 1 else ''),
                'learned_absolute': 'learned positions', 'none': 'no positions'}[c.position_encoding]
    tokens_per_step = sequences_per_step * c.block_size
    peak = flops.peak_flops(hardware['gpu_name'], c.dtype)
    per_second = f', peak {peak / 1e12:g} TFLOP/s each' if peak else ', peak not known: no MFU'
    total = counts['total_params']
    return [
        f'Architecture: {c.n_layer}L-{c.n_head}H-{c.n_embd}D-{c.d_ff}ff' +
        (f' with GQA ({c.num_key_value_heads} KV)' if c.num_key_value_heads != c.n_head else '') + f', {c.arch_preset}',
        f"Blocks: {position}, {c.normalization} ({c.norm_position}-norm, eps {c.norm_eps:g}), {c.ffn_type} FFN with {c.activation}"
        + (', QK-norm' if c.qk_norm else '') + (', parallel residual' if c.parallel_residual else '') + (', biases' if c.bias else ''),
        f'Vocab: {c.vocab_size}' + (f' ({family})' if family else '') + (', tied to the head' if c.weight_tying else ''),
        f"Parameters: {f'~{total / 1e9:.3f}B' if total >= 1e8 else f'{total / 1e6:.3f}M'} ({total:,}; {counts['non_embedding_params']:,} without embeddings)",
        f'FLOPs per token: {token_flops.total:.4g} forward and backward, attention in full ({token_flops.causal:.4g} causal)',
        f'Batch: {c.batch_size} sequences x {c.block_size} tokens x {c.gradient_accumulation_steps} micro-steps x {world.size} ranks = '
        f'{tokens_per_step:,} tokens per iteration',
        f"Data: {c.dataset}, {meta.get('tokens', {}).get('train', order.per_epoch * c.block_size):,} training tokens = "
        f'{order.per_epoch / sequences_per_step:,.1f} iterations per epoch; {c.max_iters:,} iterations = '
        f'{c.max_iters * sequences_per_step / order.per_epoch:.2f} epochs',
        f"DataLoader: {f'{loader_workers} worker processes' if loader_workers else 'a thread with pinned memory' if world.device.type == 'cuda' else 'in process'}",
        f'Attention backend: {c.attention_backend}',
        f"CUDA Graphs: off. Compile: {'on, the first iteration takes longer' if c.compile else 'off'}. Precision: "
        + (f'{c.dtype} autocast, float32 weights' if c.dtype != 'float32' else 'float32') + f". Deterministic: {'yes' if c.deterministic else 'no'}",
        f"Optimizer: AdamW{' (fused)' if startup['optimizer']['fused'] else ''}; " + '; '.join(
            f"weight decay {g['weight_decay']:g} on {g['num_tensors']} tensors with {g['num_params']:,} parameters" for g in startup['optimizer']['param_groups']),
        f"Hardware: {world.size} x {hardware['gpu_name']} with {hardware['gpu_memory_gb']:.0f} GB{per_second}" if hardware['gpu_name'] else
        f"Hardware: {hardware['cpu_name']}, {hardware['cpu_threads']} threads per process, {world.size} process{'es' if world.size > 1 else ''}{per_second}",
        f'Run folder: {c.out_dir}' + (f", continuing at iter {resumed['step']}" if resumed else ''),
        *(f'Note: {note}' for note in notes),
    ]


if __name__ == '__main__':
    parallel.leave(main())
