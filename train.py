"""
Trains a language model on token files: one process, or many under torchrun.

    python train.py config/demo_pystdlib.py
    python train.py config/train_shakespeare_char.py --device=cpu --compile=False --max_iters=2000
    python train.py config/full_llama_1.36b.py --init_from=resume
    torchrun --standalone --nproc_per_node=8 train.py config/full_llama_1.36b.py --batch_size=24

`python train.py --help` lists the common options, `--help=all` every key. Exit codes: 0 done; 2
something given cannot be run; 3 loss, gradient or weights are not finite; 4 done, but the last
checkpoint could not be written or copied; stopped before the end, with a checkpoint: 75 max_time is
up, 130 Ctrl-C, 138 SIGUSR1, 143 SIGTERM (torchrun itself then exits with 1).
"""

from __future__ import annotations

# first: until main() takes over, a Ctrl-C ends the process quietly
from engine.command_line import check_arguments, explain, importing, resolve_early

# isort: split

import dataclasses
import gc
import math
import os
import platform
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from typing import Literal

from engine.configurator import ConfigError, resolve

Family = Literal[
    'gpt2',
    'llama',
    'llama3',
    'qwen3',
    'neox',
    'moe',
    'mixtral',
    'qwen3_moe',
    'deepseek',
    'gpt_oss',
    'custom',
]
Backend = Literal[
    'auto', 'flash_attn_4', 'flash_attn_3', 'flash_attn_2', 'cudnn', 'sdpa', 'flex', 'manual'
]


@dataclass
class Config:
    # ---- Run
    out_dir: str = 'out'  # Folder of the run: logs and checkpoints.
    eval_interval: int = 2000  # Iterations between evaluations.
    log_interval: int = 1  # Log every this many iterations.
    eval_iters: int = 200  # Batches per evaluation and split, over all ranks together.
    eval_only: bool = False  # Evaluate once and exit.
    eval_at_start: bool = True  # Evaluate before the first iteration too.
    init_from: str = 'scratch'
    # Where the weights come from: 'scratch', 'resume', a GPT-2 ('gpt2', 'gpt2-medium', ...), or a
    # Hugging Face folder or hub id.
    sample_interval: int = 0  # Iterations between samples shown on the terminal; 0 shows none.
    sample_start: str = '\n'
    # Prompt of these samples, or FILE:name of a file with a prompt on each line.
    eval_tasks: str | None = None
    # Multiple-choice tasks at each evaluation: NAME or NAME:FILE.jsonl, separated by commas.
    eval_tasks_limit: int | None = 200  # Items of each task that are evaluated; None takes all.
    save_log_to_json: bool = True  # Keep run_*.json beside run_*.jsonl.
    log_save_interval: int = 100
    # Least number of iterations between rewrites of run_*.json, which is written when the log has
    # doubled and at the end.
    expert_log_interval: int = 100
    # Iterations between logs of the share of the tokens that each expert got; 0 logs none.
    gradient_log_interval: int = 0
    # Iterations between gradient statistics, which are logged at once; 0 computes none.
    wandb_log: bool = False  # Send the log to Weights & Biases too.
    wandb_project: str = 'onetrain'  # Project on Weights & Biases.
    wandb_run_name: str = 'run'  # Name of the run on Weights & Biases.
    trackio_log: bool = False
    # Keep the log for trackio's dashboard on this machine, under wandb_project and wandb_run_name.
    tensorboard_log: bool = False  # Write TensorBoard events to out_dir/tensorboard.
    dry_run: bool = False
    # Print the report, the predicted memory and where each value comes from, then exit; no data
    # and no GPU are needed.
    # ---- Checkpoints
    checkpoint_interval: int | None = None
    # Iterations between checkpoints; None saves before each evaluation.
    always_save_checkpoint: bool = True
    # Save at every evaluation; False saves only when the validation loss improved (and every
    # checkpoint_interval, if given).
    checkpoint_async: bool = True  # Write checkpoints while training goes on.
    verify_checkpoint: Literal['full', 'size'] = 'full'
    # What is verified before resuming: every byte, or only the sizes of the files.
    keep_checkpoints: int = 2  # Number of newest checkpoints to keep, beside the best.
    keep_every: int = 0  # Keep checkpoints whose iteration is a multiple of this too; 0 keeps none.
    keep_all_checkpoints: bool = False  # Never remove a checkpoint.
    auto_resume: bool = False
    # Continue the run in out_dir (or at upload_to) if there is one, else start it.
    resume_from: str | None = None
    # With init_from=resume: an iteration, or the URL or folder of a checkpoint or a run; None takes
    # the newest in out_dir.
    allow_data_change: bool = False  # Resume although train.bin or val.bin changed.
    upload_to: str | None = None
    # URL (s3://, gs://, hf://, file://) that finished checkpoints and logs are copied to, as
    # URL/NAME with the name of out_dir.
    upload_keep_local: int | None = None
    # Number of copied checkpoints that stay in out_dir; None removes none after copying.
    max_time: float = 0.0
    # Hours after which the run saves and exits with code 75; 0 sets no limit.
    max_bad_steps: int = 3
    # Iterations in a row with a loss or gradient that is not finite (each is skipped) after which
    # the run stops.
    spike_factor: float = 0.0
    # Skip iterations with a gradient norm above this many times the running median; 0 skips none.
    # ---- Data
    dataset: str = 'openwebtext'
    # Folder of data/ with train.bin and val.bin, or a mixture of several: 'a:0.7,b:0.3'.
    data_url: str | None = None
    # URL (s3://bucket/folder) of a prepared data set, read as needed; what was read is kept in
    # data/DATASET/copy.
    gradient_accumulation_steps: int = 40  # Micro-steps per iteration on each rank.
    batch_size: int = 12  # Sequences per micro-step on each rank.
    block_size: int = 1024  # Tokens per sequence.
    find_batch_size: bool = False
    # Pick the largest batch_size that fits in memory and adjust gradient_accumulation_steps to
    # keep the total batch unchanged.
    total_batch_size: int = 0
    # Tokens per iteration over all ranks, which sets gradient_accumulation_steps; 0 keeps that.
    seed: int = 1337  # Seed of the weights, the data order and dropout.
    use_dataloader: bool = False  # Load batches in worker processes; the batches are the same.
    dataloader_num_workers: int = 4  # Number of worker processes with use_dataloader.
    dataloader_prefetch_factor: int = 2  # Batches that each worker prepares ahead.
    # ---- Model (None takes the value of arch_preset)
    arch_preset: Family = 'gpt2'
    # Model family, which sets the defaults of the keys below.
    n_layer: int = 12  # Number of layers.
    n_head: int = 12  # Attention heads of each layer.
    n_embd: int = 768  # Width of the model.
    num_key_value_heads: int | None = None
    # Heads of keys and values; fewer than n_head make it grouped-query attention.
    head_dim: int | None = None  # Width of a head; None is n_embd / n_head.
    d_ff: int | None = None  # Width of the feed-forward layer (alias: intermediate_size).
    vocab_size: int | None = None  # Vocabulary; None is the data set's, else the preset's.
    dropout: float = 0.0  # Probability with which dropout zeroes an activation.
    bias: bool | None = None
    # Biases in linear layers (never the head); with layernorm also in the norms.
    normalization: Literal['layernorm', 'layernorm_nobias', 'rmsnorm'] | None = None
    # Kind of norm.
    norm_eps: float | None = None  # Epsilon of the norms.
    norm_position: Literal['pre', 'post'] | None = None  # Norm before or after each sub-layer.
    activation: Literal['gelu', 'gelu_tanh', 'silu', 'relu', 'relu2'] | None = None
    # Activation of the feed-forward layer.
    ffn_type: Literal['standard', 'swiglu', 'swiglu_clamped'] | None = None
    # Kind of feed-forward layer; swiglu_clamped is that of gpt-oss.
    position_encoding: Literal['learned_absolute', 'rope', 'none'] | None = None
    # How positions are encoded.
    rope_theta: float | None = None  # Base of the frequencies of RoPE.
    rotary_pct: float | None = None  # Share of each head that RoPE rotates.
    qk_norm: bool | None = None  # RMSNorm on each head of queries and keys.
    parallel_residual: bool | None = None  # Attention and MLP read the same input (GPT-NeoX).
    weight_tying: bool | None = None  # Use the token embedding as the weight of the head.
    attention_backend: Backend | None = None
    # Attention kernel; falls back in this order (cudnn only if asked for). auto times them and
    # takes the fastest. None is flex on an H100 or H200 where deterministic and compile are on,
    # and sdpa elsewhere.
    attention_sinks: bool | None = None
    # Add a learned logit to each head's softmax (gpt-oss).
    sliding_window: int | None = None  # Tokens that a query sees, itself included; 0 is all.
    window_pattern: str | None = None
    # Letters repeated over the layers, S for a sliding window and L for full attention, such as
    # SSSL; None slides in all layers.
    document_mask: bool = False
    # Start attention and positions anew after each end-of-text token.
    rope_scaling: Literal['none', 'linear', 'dynamic', 'yarn', 'llama3'] | None = None
    # How RoPE is scaled for a block_size above rope_original_block_size.
    rope_factor: float | None = None
    # Factor by which the context grew; None is block_size / rope_original_block_size.
    rope_original_block_size: int | None = None  # Context before scaling; None is block_size.
    rope_attention_factor: float | None = None
    # Factor of cosine and sine with yarn; None is 0.1 ln(rope_factor) + 1.
    rope_beta_fast: float | None = None
    # With yarn, rotations within the original context above which a frequency is unchanged.
    rope_beta_slow: float | None = None
    # With yarn, rotations within the original context below which a frequency is divided.
    rope_truncate: bool | None = None  # With yarn, round these limits to whole dimensions.
    rope_low_freq_factor: float | None = None
    # With llama3 scaling, rotations below which a frequency is divided.
    rope_high_freq_factor: float | None = None
    # With llama3 scaling, rotations above which a frequency is unchanged.
    # ---- Mixture of experts
    num_experts: int | None = None  # Number of experts; 0 makes a dense model.
    num_experts_per_tok: int | None = None  # Experts that each token is routed to.
    num_shared_experts: int | None = None  # Experts that every token goes to.
    expert_d_ff: int | None = None
    # Width of one expert; None is d_ff (alias: moe_intermediate_size).
    n_dense_layers: int | None = None  # Number of first layers without experts.
    score_function: Literal['sigmoid', 'softmax'] | None = None
    # Function from the router's logits to affinities.
    n_groups: int | None = None  # Number of groups that the experts form.
    topk_groups: int | None = None  # Number of groups that a token may choose experts from.
    norm_topk_prob: bool | None = None  # Scale the gates of a token to add up to 1.
    route_scale: float | None = None  # Factor of the gates.
    balance_rate: float = 1e-3
    # Step of the bias that balances experts without a loss; 0 turns it off.
    aux_loss_weight: float = 0.0
    # Weight of the balancing loss of Switch Transformers.
    z_loss_weight: float = 0.0  # Weight of the router's z-loss (ST-MoE).
    expert_dispatch: Literal['grouped', 'loop'] = 'grouped'
    # Compute all experts in one grouped matmul, or one expert after another.
    upcycle: bool = False
    # With init_from: turn a dense model into one of num_experts, each a copy of its feed-forward
    # layer.
    # ---- Optimization
    head_z_loss_weight: float = 0.0
    # Weight of the z-loss of the logits (1e-4 in PaLM), in the gradient only.
    optimizer: Literal['adamw', 'muon'] = 'adamw'
    # Optimizer; muon updates the matrices of the layers and leaves the rest to AdamW, with the
    # same learning rate.
    muon_momentum: float = 0.95  # Momentum of Muon.
    learning_rate: float = 6e-4  # Learning rate at the end of the warm-up.
    max_iters: int = 600000  # Iterations of the whole run.
    weight_decay: float = 1e-1  # Weight decay of parameters with two dimensions or more.
    beta1: float = 0.9  # Decay rate of AdamW's first moment.
    beta2: float = 0.95  # Decay rate of AdamW's second moment.
    grad_clip: float = 1.0  # Clip gradients to this global norm; 0 turns clipping off.
    decay_lr: bool = True  # Decay the learning rate by a cosine after the warm-up.
    warmup_iters: int = 2000  # Iterations over which the learning rate rises from 0.
    lr_decay_iters: int = 600000  # Iteration at which the cosine reaches min_lr.
    min_lr: float = 6e-5  # Learning rate at the end of the cosine.
    # ---- System
    device: str | None = None
    # Device: 'cpu', 'cuda' or 'cuda:1'; None is a GPU if there is one.
    dtype: Literal['float32', 'bfloat16', 'float16'] | None = None
    # Precision of the matmuls; weights stay float32. None is bfloat16 on a GPU, float32 on a CPU.
    fp8: bool = False
    # Compute the matmuls of the large linear layers in float8 (needs torchao).
    compile: bool = True  # Compile the model with torch.compile.
    activation_checkpointing: Literal['none', 'selective', 'full'] = 'none'
    # Trade compute for memory: store all activations, only the outputs of matmuls and attention,
    # or only the input of each block.
    deterministic: bool = True  # Use kernels that repeat to the last bit.
    use_cuda_graphs: bool = False
    # Capture forward and backward as CUDA graphs to remove launch overhead (bitwise identical).
    loss_chunk: int | None = None
    # Tokens whose logits are in memory at a time (the same loss in less memory); 0 is torch's
    # loss, None chunks where the logits are large.
    ignore_memory: bool = False  # Start although the predicted memory does not fit.
    # ---- Many processes (under torchrun each trains on its share of the batch)
    backend: Literal['nccl', 'gloo'] | None = None
    # Backend of torch.distributed; None is nccl on GPUs, gloo on CPUs.
    timeout_minutes: float = 10.0  # Minutes without an answer after which a process gives up.
    use_zero1: bool = False  # Shard the optimizer state (ZeRO-1).
    use_fsdp: bool = False  # Shard parameters, gradients and optimizer state (FSDP).
    fsdp_reshard: bool = True
    # Gather parameters for each block (ZeRO-3); False gathers once per iteration (ZeRO-2).
    fsdp_replicas: int = 1
    # Number of groups that each hold all shards (hybrid sharding), such as one per machine.
    fsdp_reduce_dtype: Literal['float32', 'bfloat16'] = 'float32'
    # Precision in which gradients are summed over ranks.
    fsdp_offload: bool = False  # Keep parameters and optimizer state in CPU memory.
    fsdp_min_num_params: int | None = None  # Ignored: FSDP wraps each block (kept for old recipes).
    fsdp_activation_checkpointing: bool | None = None
    # With use_fsdp=True: the same as activation_checkpointing=full.
    context_parallel: int = 1  # Number of processes that share each sequence.

    COMMON = (  # what --help shows
        'out_dir',
        'dataset',
        'init_from',
        'auto_resume',
        'max_iters',
        'eval_interval',
        'eval_iters',
        'log_interval',
        'batch_size',
        'gradient_accumulation_steps',
        'total_batch_size',
        'block_size',
        'arch_preset',
        'n_layer',
        'n_head',
        'n_embd',
        'dropout',
        'optimizer',
        'learning_rate',
        'min_lr',
        'warmup_iters',
        'lr_decay_iters',
        'device',
        'dtype',
        'compile',
        'dry_run',
    )

    @property
    def save_interval(self):
        return self.checkpoint_interval or (
            self.eval_interval if self.always_save_checkpoint else 0
        )


ALIASES = {
    'intermediate_size': lambda value: {'d_ff': value},
    'moe_intermediate_size': lambda value: {'expert_d_ff': value},
    'flash_attn': lambda value: {
        'attention_backend': (
            'flash_attn_2' if value is True else 'sdpa' if value is False else f'flash_attn={value}'
        )
    },
}
if __name__ == '__main__':
    # before torch is imported, which takes seconds
    RESOLVED = resolve_early(Config, sys.argv[1:], ALIASES)
    imported = importing('torch')

import torch

import huggingface
from data.tokenizer import tokenizer_of
from engine import (
    __version__,
    checkpoint,
    checks,
    flops,
    kernels,
    memory,
    optim,
    parallel,
    resume,
    stopping,
    tasks,
    tokenizer_match,
)
from engine.copier import Copier, place_of
from engine.copying_together import Machines
from engine.dataset import check_fit, folder_of, open_dataset, shares_of
from engine.files import redact
from engine.loader import (
    TrainLoader,
    evaluation_batches,
    evaluation_identity,
    evaluation_length,
    inputs_and_targets,
    mix,
    order_of,
    read_batch,
)
from engine.logger import RunLog, new_run_name, now, unsaved_run
from engine.loss import IGNORE, choose_chunk, written_chunk
from engine.micro_step import Graphs, MicroStep, compile_ahead
from engine.report import (
    ending_lines,
    evaluation_line,
    memory_gb,
    origins,
    readings,
    report,
    startup_info,
)
from engine.saver import Saver
from engine.stragglers import Stragglers
from engine.terminal import Terminal, progress_line
from engine.text_bytes import TextBytes
from generation import generate, prompts_of
from model import Model
from presets import ROUTING, ModelConfig, resolve_shape

ROOT = os.path.dirname(os.path.abspath(__file__))
# parameters, elements of activations, roughly: the memory of less is of no interest
PREDICT_FROM = 10**6, 2**28
SHAPE_KEYS = ['arch_preset', *(field.name for field in dataclasses.fields(ModelConfig))]


def main(argv=None, resolved=None):
    """Run the trainer with command-line arguments `argv`, or what resolve() made of them; returns
    the exit code.
    """
    stop = stopping.StopRequest(talk=parallel.is_rank_0())
    terminal = Terminal(active=parallel.is_rank_0())
    try:
        if resolved is None:
            argv = sys.argv[1:] if argv is None else argv
            check_arguments(argv)
            resolved = resolve(Config, argv, ALIASES)
        return dry_run(*resolved) if resolved[0].dry_run else run(*resolved, stop, terminal)
    except BrokenPipeError:  # as `| head` does; nothing more can be shown
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 128 + signal.SIGPIPE
    except Exception as error:
        if 'use_deterministic_algorithms' in str(error):
            error = ConfigError(
                'deterministic=True:'
                f' {str(error).splitlines()[0].split(" but you set")[0].rstrip(",")}: type'
                ' --deterministic=False'
            )
        elif isinstance(error, RuntimeError) and parallel.was_told():
            return 2
        sentence = explain(error)
        if sentence is None or isinstance(error, ValueError) and not isinstance(error, ConfigError):
            raise
        parallel.tell(sentence)
        return 2
    finally:
        gc.unfreeze()
        stop.restore()
        terminal.close()


def run(c, given, stop, terminal):
    # ---- configuration, processes, device
    notes = []  # fallbacks and changes, told in the report
    checks.refuse_impossible(c)
    checks.note_schedule(c, notes)
    world = parallel.start(c.device, c.backend, c.timeout_minutes, c.out_dir)
    parallel.same(
        {**resume.config_record(c), 'torch': torch.__version__}, 'the configuration', world
    )
    device = world.device

    # ---- where to start from: settings now, weights when the model exists
    folder = resume.Folder(c.out_dir, world)
    fetching = c.resume_from and not resume.is_step(c.resume_from)
    if fetching or not c.eval_only:  # evaluating alone only reads
        folder.hold(make=fetching or c.auto_resume)
    c, verified = resume.automatic(c, world)
    resumed = nanogpt = hf_folder = None
    if c.init_from == 'resume':
        c, resumed, nanogpt = resume.find(c, given, SHAPE_KEYS, world, notes, verified)
        try:
            checks.refuse_impossible(c)
        except ConfigError as error:
            raise ConfigError(
                f'the checkpoint in {c.out_dir} has settings that no run can have: {error}'
            ) from None
    elif c.init_from != 'scratch':
        c, hf_folder = huggingface.find(c, given, SHAPE_KEYS)
    start_step = resumed['step'] if resumed else 0
    if c.use_fsdp and c.fsdp_activation_checkpointing and 'activation_checkpointing' not in given:
        c.activation_checkpointing = 'full'
    parallel.arrange(world, c, notes)
    # a URL that cannot work is known before any checkpoint is renamed
    if c.upload_to and not c.eval_only:
        parallel.from_main(lambda: resume.check_upload(c, resumed, notes), world)

    # ---- data and the model's shape
    with terminal.doing('opening the data'):
        train_file, val_file, meta = parallel.once_per_machine(
            lambda: open_dataset(c.dataset, ROOT, c.data_url), world
        )
    shape = resolve_shape(dataclasses.asdict(c), meta.get('vocab_size'))
    for file in sorted((train_file, val_file), key=len):
        check_fit(file, shape.vocab_size, shape.block_size)
    document_end = checks.end_of_documents(c, meta) if c.document_mask else None
    if world.ring:
        checks.refuse_in_parts(c, shape)
    checks.note_without_effect(c, given, shape, ROUTING, notes)
    data = {
        file.split: {'fingerprint': file.fingerprint, 'tokens': len(file)}
        for file in (train_file, val_file)
    }
    data_folder = folder_of(c.dataset, ROOT)
    parallel.same(
        {f'{split}.bin': what for split, what in data.items()} | {'folder': data_folder},
        'the data',
        world,
    )
    tokenizer_id = parallel.from_main(
        lambda: tokenizer_match.tokenizer_identity(data_folder, meta), world
    )
    token_ids = parallel.from_main(lambda: tokenizer_match.digest_of_dataset(data_folder), world)
    new_stream, new_validation = (
        resume.check_data(resumed, data, c.allow_data_change, notes) if resumed else (False, False)
    )
    if resumed:
        parallel.from_main(
            lambda: tokenizer_match.check_resumed(resumed, data_folder, meta, c.dataset, notes),
            world,
        )
    weights = (
        f'checkpoint of {"nanoGPT" if nanogpt else "this run"}, continuing at iter {start_step}'
        if resumed
        else f'initialized with seed {c.seed}'
    )
    if hf_folder:
        match = parallel.from_main(
            lambda: tokenizer_match.check_weights(hf_folder, data_folder, c.dataset), world
        )
        weights = f'{c.init_from}, {huggingface.count_tensors(hf_folder):,} tensors; {match}'
    torch_dtype = kernels.precision(c.dtype, device)
    kernels.set_deterministic(c.deterministic)  # before a trial times them
    dtype = str(torch_dtype).removeprefix('torch.')
    with terminal.doing('trying attention kernels'):
        chosen, told = parallel.from_main(
            lambda: kernels.choose(c, shape, device, torch_dtype), world
        )
    notes += told
    if (
        c.compile
        and device.type == 'cpu'
        and not (shutil.which('g++') or shutil.which('clang++') or os.environ.get('CXX'))
    ):
        notes.append('compile=True needs a C++ compiler, and there is none: running without')
        c.compile = False

    # ---- memory and batch arithmetic
    autocast = kernels.autocast(device.type, torch_dtype)
    tokens_of_rank = c.block_size // c.context_parallel
    options = ModelOptions(c, shape, chosen, document_end, torch_dtype, world)

    def predicted(batch_size, sequences):
        return options.predict(batch_size, sequences // batch_size, autocast)

    if c.find_batch_size:
        sequences = (
            checks.accumulation_steps(dataclasses.replace(c, batch_size=1), world.data_size)
            if c.total_batch_size
            else c.batch_size * c.gradient_accumulation_steps
        )
        room = memory.available(device)
        with terminal.doing('looking for the largest batch_size that fits'):
            # what fits on every rank
            size = -parallel.largest(
                -memory.find_batch_size(lambda size: predicted(size, sequences), sequences, room),
                world,
            )
        c = dataclasses.replace(c, batch_size=size, gradient_accumulation_steps=sequences // size)
        notes.append(
            f'batch_size={size}, with {sequences // size} micro-steps an iteration, is the largest'
            f' that fits: {room / 1e9:.1f} GB are free'
        )
    accumulation = checks.accumulation_steps(c, world.data_size)
    note = dataclasses.replace(options, c=c).loss_chunk(c.batch_size)[1]
    notes += [note] if note else []
    sequences_per_step = c.batch_size * accumulation * world.data_size
    tokens_per_step = sequences_per_step * c.block_size
    position = (
        start_step * sequences_per_step
        if nanogpt
        else resumed['position']
        if resumed and not new_stream
        else 0
    )
    tokens = resumed.get('tokens', position * c.block_size) if resumed else 0
    if resumed and not nanogpt and resumed['tokens_per_step'] != tokens_per_step:
        notes.append(
            f'{tokens_per_step} tokens per iteration from now on (it was'
            f' {resumed["tokens_per_step"]}); --total_batch_size fixes them for any number of'
            ' processes'
        )
    if resumed and resumed.get('threads', torch.get_num_threads()) != torch.get_num_threads():
        notes.append(
            f'{torch.get_num_threads()} CPU threads (it was {resumed["threads"]}): sums are rounded'
            ' differently, so losses differ in the last bits'
        )
    c = dataclasses.replace(
        c,
        dtype=dtype,
        attention_backend=chosen['backend'],
        gradient_accumulation_steps=accumulation,
        device=device.type,
        backend=world.backend,
        use_cuda_graphs=checks.cuda_graphs(c, device.type, chosen['dispatch'], notes),
        **dataclasses.asdict(shape),
    )
    windows = evaluation_identity(val_file, c)
    best_val_loss = (
        resume.best_loss_so_far(resumed, windows, new_validation, notes) if resumed else math.inf
    )
    if c.decay_lr and c.lr_decay_iters > c.max_iters and c.min_lr < c.learning_rate:
        notes.append(
            f'the learning rate does not reach min_lr: lr_decay_iters={c.lr_decay_iters} lies'
            f' beyond max_iters={c.max_iters}'
        )

    order = order_of(train_file, c.block_size, c.seed)
    if resumed and not nanogpt:
        checks.note_jump(resumed['config'], c, start_step, learning_rate, notes)
    checks.note_data(
        c, start_step, order, sequences_per_step, (len(val_file) - 1) // c.block_size, notes
    )
    tokenizer = text_tokenizer(c, meta) if c.sample_interval or c.eval_tasks else None
    prompts = prompts_of(c.sample_start, tokenizer, c.block_size) if c.sample_interval else []
    eval_tasks = tasks.encode(
        tasks.load_tasks(c.eval_tasks or '', c.eval_tasks_limit), tokenizer, c.block_size
    )
    parallel.same(
        {'prompts': prompts, 'eval_tasks': tasks.fingerprint(eval_tasks)},
        'what is written or asked at evaluations',
        world,
    )

    model = Model.on_meta(shape, ring=world.ring, **options.of(c.batch_size))
    memory.refuse_too_large(model, device, world.mesh.size(-1) if world.fsdp else 1)
    if c.fp8 and not model.float8_layers:
        raise ConfigError(
            'fp8=True finds no linear layer that would gain (sizes that are multiples of 16, more'
            ' than 1024 outputs or 4096 inputs): type --fp8=False'
        )

    prediction = None
    elements = (
        c.batch_size * tokens_of_rank * (16 * shape.n_layer * shape.n_embd + shape.vocab_size)
    )
    if (
        not c.eval_only
        and not c.fsdp_offload
        and (
            sum(p.numel() for p in model.parameters()) >= PREDICT_FROM[0]
            or elements >= PREDICT_FROM[1]
        )
    ):
        try:
            with terminal.doing('predicting the memory'):
                prediction = predicted(c.batch_size, c.batch_size * accumulation)
                parallel.from_main(
                    lambda: (
                        c.ignore_memory
                        or memory.refuse(
                            prediction,
                            device,
                            c,
                            accumulation,
                            world.fsdp,
                            options.predictor(autocast),
                        )
                    ),
                    world,
                )
        except memory.NotPredicted as error:
            notes.append(str(error))

    # ---- the run's folder
    run_name = copier = machines = None
    if not c.eval_only:
        folder.hold(make=True)
        if resumed:
            resume.set_aside(c, resumed, world, notes)
        else:
            resume.make_way(c, world, notes)
        run_name = resumed.get('run_name') if resumed else None
        # a run that died before its first checkpoint keeps its name and log
        again = c.auto_resume and not resumed
        run_name = run_name or parallel.from_main(
            lambda: (
                again and unsaved_run(c.out_dir, resume.config_record(c)) or new_run_name(c.out_dir)
            ),
            world,
        )
        parallel.from_main(lambda: folder.check_room(run_name, checkpoint_bytes(model, c)), world)
        lineage = parallel.from_main(
            lambda: resume.choose_lineage(
                c, resumed, c.upload_to and place_of(c.upload_to, c.out_dir)
            ),
            world,
        )
        if c.upload_to:
            machines = Machines(world, c.upload_to)
            if world.main:
                copier = Copier(c.upload_to, c.out_dir, run_name, c.upload_keep_local, machines)
            elif world.local_rank == 0:
                machines.serve()

    # ---- model
    torch.manual_seed(c.seed)
    before = memory_gb(device)['allocated_gb']
    parallel.shard(model, world, torch_dtype, getattr(torch, c.fsdp_reduce_dtype), c.fsdp_offload)
    model.allocate('cpu' if c.use_fsdp and c.fsdp_offload else device, buffers_on=device)
    with terminal.doing(
        'initializing the weights' if c.init_from == 'scratch' else 'loading the weights'
    ):
        if nanogpt:
            model.fill(nanogpt['model'].items())
        elif hf_folder and c.upcycle:
            model.init_weights(c.seed, device)  # the routers
            model.fill(huggingface.upcycled(hf_folder, shape), partly=True)
        elif hf_folder:
            model.fill(huggingface.weights(hf_folder, shape))
        elif not resumed:
            model.init_weights(c.seed, device)
    step_model, train_model = parallel.wrap(
        model, world, c.compile, accumulation, c.use_cuda_graphs
    )

    # ---- optimizer
    named = dict(model.named_parameters())
    parameters = list(named.values())
    updated = parallel.optimized(named, world)
    optimizer = optim.build_optimizer(
        updated,
        matrices=model.matrices() if c.optimizer == 'muon' else (),
        momentum=c.muon_momentum,
        learning_rate=c.learning_rate,
        betas=(c.beta1, c.beta2),
        weight_decay=c.weight_decay,
        device_type=parameters[0].device.type,
        ranks=world.size if world.layout == 'DDP' else 1,
    )
    parallel.bind(optimizer, named, updated, world)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == 'float16')
    guard = optim.Guard(parameters, scaler, c.max_bad_steps, c.spike_factor)
    if resumed:
        if nanogpt:
            for name, tensor in (
                optim.named_state(optimizer, updated).items() if nanogpt['optimizer'] else ()
            ):
                parallel.put(tensor, nanogpt['optimizer'][name])
        else:
            with terminal.doing('loading the checkpoint'):
                checkpoint.load(
                    resumed['path'],
                    checkpoint_tensors(
                        model, named, *(() if c.eval_only else (updated, optimizer, guard))
                    ),
                    world,
                )
            scaler.load_state_dict(resumed['scaler'])

    # ---- log and report
    loader_workers = c.dataloader_num_workers if c.use_dataloader else 0
    evaluation_count = sum(
        evaluation_length(file, c.block_size, c.batch_size, c.eval_iters, world.data_size)
        for file in (train_file, val_file)
    )
    token_flops = model.flops()
    gpu_name = torch.cuda.get_device_name(device) if device.type == 'cuda' else None
    startup = startup_info(c, model, optimizer, world, gpu_name, token_flops, prediction)
    mfu_constants = {
        key: value
        for key, value in flops.utilisation(
            token_flops,
            1.0,
            device_name=gpu_name,
            dtype=dtype,
            num_devices=world.size,
            architecture=shape.describe(),
        ).items()
        if key not in flops.VARIES
    }
    header = {
        'config': resume.config_record(c),
        'startup_info': startup,
        'mfu_constants': mfu_constants,
        'metadata': (
            {
                key: getattr(c, key)
                for key in ('device', 'dtype', 'compile', 'use_zero1', 'use_fsdp')
            }
            | {'world_size': world.size, 'version': __version__}
        ),
    }
    evaluated = (
        checkpoint.read_evaluation(resumed['path'])
        if resumed and not nanogpt and not new_validation
        else None
    )
    evaluated = evaluated if evaluated and evaluated.get('data') == windows else None
    if evaluated and (evaluated['val'] or math.inf) < best_val_loss:
        best_val_loss = evaluated['val']
    log = RunLog(
        c.out_dir,
        run_name,
        header,
        active=world.main,
        write=not c.eval_only,
        resume_step=start_step if resumed or c.auto_resume else None,
        evaluated=evaluated is not None,
        save_json=c.save_log_to_json,
        save_interval=c.log_save_interval,
        first=start_step,
        terminal=terminal,
    )
    if world.main and not c.eval_only:
        if c.wandb_log:
            log.to_wandb(c.wandb_project, c.wandb_run_name)
        if c.trackio_log:
            log.to_trackio(c.wandb_project, c.wandb_run_name)
        if c.tensorboard_log:
            log.to_tensorboard()
    if resumed and not nanogpt and not log.has_checkpoint(start_step):
        log.event(
            'checkpoint',
            iter=start_step,
            val_loss=None,
            path=resumed['path'],
            timestamp=now(),
            stall_ms=None,
            total_ms=None,
        )
    for line in report(
        c,
        startup,
        meta,
        order,
        world,
        sequences_per_step,
        loader_workers,
        run_name,
        weights,
        notes,
        terminal.columns(),
    ):
        log.say(line)

    sources = [name for name, _ in shares_of(c.dataset)]
    text_bytes = (
        TextBytes(
            val_file,
            val_file.evaluation_starts(c.block_size, c.eval_iters * c.batch_size),
            c.block_size,
            lambda: tokenizer or tokenizer_of(data_folder, meta),
        )
        if world.main
        else None
    )
    agreement, stragglers = parallel.Agreement(world), Stragglers(world, log.say)

    def evaluate():
        """{'train': loss, 'val': loss, perhaps 'tasks': scores} over the fixed evaluation windows,
        the same on every rank; None if the run is to stop.
        """
        with (
            parallel.forward_only(step_model),
            torch.no_grad(),
            terminal.doing('evaluating', evaluation_count) as work,
        ):
            return measure(work)

    def measure(work):
        losses = {}
        for split, file in (('train', train_file), ('val', val_file)):
            # of each source the sum of losses, targets
            total = torch.zeros(len(sources), 2, dtype=torch.float64, device=device)
            for x, y, source in evaluation_batches(
                file,
                c.block_size,
                c.batch_size,
                c.eval_iters,
                world.data_rank,
                world.data_size,
                world.ring,
            ):
                if agreement.begin(stop.code()):
                    return None
                x, y = x.to(device), y.to(device)
                with autocast:
                    loss = step_model(x, y, reduction='sum')
                total[source] += torch.stack([loss.double(), (y != IGNORE).sum().double()])
                if agreement.end():
                    return None
                work.done += 1
            total = parallel.sum_over_ranks(total, world)
            losses[split] = (total[:, 0].sum() / total[:, 1].sum()).item()
        if len(sources) > 1:
            # of 'val'
            losses['sources'] = {
                name: loss / targets
                for name, (loss, targets) in zip(sources, total.tolist())
                if targets
            }
        if eval_tasks:
            with autocast:
                losses['tasks'] = tasks.evaluate(
                    eval_tasks,
                    model,
                    c.batch_size,
                    device,
                    lambda values: parallel.sum_over_ranks(values, world),
                    world.rank,
                    world.size,
                    lambda: parallel.largest(stop.code(), world),
                )
        return None if eval_tasks and losses['tasks'] is None else losses

    def save():
        nonlocal saved_step
        state = {
            'run_name': run_name,
            'branch': lineage,
            'position': position,
            'tokens': tokens,
            'tokens_per_step': tokens_per_step,
            'config': resume.config_record(c),
            'threads': torch.get_num_threads(),
            'best_val_loss': None if best_val_loss == math.inf else best_val_loss,
            'scaler': scaler.state_dict(),
            'data': data,
            'windows': windows,
            'tokenizer': tokenizer_id,
            'token_ids': token_ids,
            'optimizer': type(optimizer).__name__,
            'time': now(),
            'world_size': world.size,
            'versions': {
                'onetrain': __version__,
                'torch': torch.__version__,
                'python': platform.python_version(),
            },
        }
        due = time.perf_counter()
        settle(saver.wait())  # one save at a time
        saver.start(step, checkpoint_tensors(model, named, updated, optimizer, guard), state, due)
        saved_step = step

    def settle(outcome):
        """Tell what became of a save, and note the losses that were measured meanwhile."""
        nonlocal saved_step, failed_save
        if outcome is not None:
            failed_save = outcome.error
            if outcome.error:
                log.event('save_failed', iter=outcome.step, error=outcome.error, timestamp=now())
                log.say(
                    f'CHECKPOINT NOT SAVED at iter {outcome.step}: {outcome.error}. '
                    + (
                        'It would be of no use; the older ones are as they were'
                        if outcome.not_finite
                        else 'The older ones are as they were; the next try is at the next interval'
                    )
                )
                saved_step = -1 if saved_step == outcome.step else saved_step
                if outcome.not_finite:
                    stop.fault = stopping.NOT_FINITE
            else:
                log.event(
                    'checkpoint',
                    iter=outcome.step,
                    val_loss=None,
                    path=outcome.path,
                    timestamp=now(),
                    stall_ms=1000 * outcome.stall_s,
                    total_ms=1000 * outcome.total_s,
                    bytes=outcome.size,
                )
                log.say(
                    f'saved {outcome.path}'
                    + (
                        f', training waited {outcome.stall_s:.1f} s'
                        if outcome.stall_s >= 0.1
                        else ''
                    )
                )
                for note in outcome.notes:
                    log.say(f'Note: {note}')
                note_evaluation(outcome.step)
        for line in copier.news() if copier else ():
            log.say(line)

    def note_evaluation(at):
        if world.main and last_evaluation[0] == at:
            try:
                checkpoint.record_evaluation(checkpoint.path_of(c.out_dir, at), last_evaluation[1])
            except OSError as error:
                log.say(
                    f'the losses at iter {at} could not be noted beside its checkpoint'
                    f' ({error.strerror}): it will not count as the best'
                )
            if copier:
                copier.add(at)

    def prepare():
        """Compile, and record the CUDA graphs, on the first tokens of the data: no weight
        changes.
        """
        nonlocal micro_step
        batches = [
            inputs_and_targets(
                read_batch(
                    train_file,
                    order.starts(position + i * c.batch_size, c.batch_size),
                    c.block_size,
                    world.ring,
                ).to(device)
            )
            for i in range(2)
        ]  # as the loader gives it out: strides count too

        def evaluation():
            if c.max_iters > start_step:
                x, y = (
                    part.to(device)
                    for part in next(
                        evaluation_batches(
                            train_file, c.block_size, c.batch_size, 1, ring=world.ring
                        )
                    )[:2]
                )
                with parallel.forward_only(step_model), torch.no_grad(), autocast:
                    step_model(x, y, reduction='sum')

        def forget_routing():
            model.after_step(world, 0.0, None)

        if c.compile:
            log.say('compiling')
            with terminal.doing('compiling'):
                seconds, error = compile_ahead(
                    lambda: micro_step(*batches[0], accumulation - 1), evaluation
                )
            micro_step.clear()
            forget_routing()
            log.event('compile', seconds=seconds, error=error, timestamp=now())
            log.say(
                f'COMPILING FAILED, so everything runs without: {error}'
                if error
                else f'compiled in {seconds:.1f} s'
            )
        if c.use_cuda_graphs:
            micro_step = Graphs(micro_step)
            log.say(
                f'CUDA graphs recorded in {micro_step.prepare(batches, forget_routing):.1f} s: two'
                ' batches gave what they give without'
            )

    def sample():
        # its own, so that training draws what it would without; and alike on every rank
        generator = torch.Generator(device).manual_seed(c.seed)
        with parallel.forward_only(model), autocast:
            written = generate(
                model,
                prompts,
                128,
                temperature=0.8,
                top_k=50,
                generator=generator,
                device=device,
                interrupted=lambda: parallel.largest(stop.code(), world),
            )
        for prompt, ids in zip(prompts, written):
            log.sample(step, tokenizer.decode(prompt + ids))

    if c.eval_only:
        losses = evaluate()
        log.say(evaluation_line(start_step, losses))
        log.close()
        return 0

    loader = TrainLoader(
        train_file,
        order,
        batch_size=c.batch_size,
        rank=world.data_rank,
        world_size=world.data_size,
        position=position,
        device=device,
        ring=world.ring,
        num_workers=loader_workers,
        prefetch_factor=c.dataloader_prefetch_factor,
    )
    saver = Saver(
        c.out_dir,
        world,
        keep=c.keep_checkpoints,
        keep_every=c.keep_every,
        keep_all=c.keep_all_checkpoints,
        background=c.checkpoint_async,
        before_commit=log.sync,
        copier=copier,
    )
    saver.reserve(checkpoint_tensors(model, named, updated, optimizer, guard))
    stop.max_hours = c.max_time
    step, saved_step, stop_code, failed_save = (
        start_step,
        start_step if resumed and not nanogpt else -1,
        0,
        None,
    )
    last_evaluation, bad_before, timed = (-1, None), guard.counts(), None
    # the sum over this rank's targets, over the targets of the whole step; ranks average, hence
    # world.size
    micro_step = MicroStep(
        model, train_model, world, autocast, scaler, world.size / tokens_per_step, accumulation
    )
    if step < c.max_iters and (c.compile or c.use_cuda_graphs):
        prepare()
        gc.collect()
    gc.freeze()  # what stays for good is not searched for garbage again
    interval_start, interval_steps, warming_up = time.perf_counter(), 0, True
    terminal.start_bar(c.max_iters, step)
    if step >= c.max_iters:
        log.say(
            f'nothing to train: already at iter {step} of max_iters={c.max_iters}; a larger'
            ' --max_iters goes on'
        )

    # ---- the loop: once in a while save, evaluate, sample; then one step; then log
    while True:
        ending = step >= c.max_iters or stop_code
        last = step == c.max_iters and step > start_step  # the final weights are always evaluated
        evaluating = (
            (last or step % c.eval_interval == 0)
            and (step > 0 or c.eval_at_start)
            and not stop_code
            and not (step == start_step and evaluated)
        )
        sampling = (
            c.sample_interval
            and step % c.sample_interval == 0
            and step > start_step
            and not stop_code
        )
        with terminal.doing('saving the checkpoint'):
            settle(saver.wait() if ending else saver.poll())
        # alike on every rank: what poll() says comes at its own time on each, what wait() says does
        # not
        saving = (
            (ending or c.save_interval and step % c.save_interval == 0)
            and step not in (saved_step, 0)
            and not (ending and stop.fault)
        )
        if saving or evaluating or sampling:
            # a save waits for nothing
            pause = (
                kernels.time_when_done(device) if evaluating or sampling else time.perf_counter()
            )
            if saving:
                save()
            losses = evaluate() if evaluating else None
            if evaluating and not losses:
                stop_code = parallel.largest(stop.code(), world)
                continue
            if losses:
                log.event(
                    'eval',
                    iter=step,
                    train_loss=losses['train'],
                    val_loss=losses['val'],
                    timestamp=now(),
                    lr=learning_rate(c, max(0, step - 1)),
                    tokens_seen=tokens,
                    **readings(losses['val'], text_bytes),
                    **({'val_loss_by_source': losses['sources']} if len(sources) > 1 else {}),
                    **({'tasks': losses['tasks']} if eval_tasks else {}),
                )
                log.say(evaluation_line(step, losses, best_val_loss))
                last_evaluation = step, {**losses, 'data': windows}
                if losses['val'] < best_val_loss:
                    best_val_loss = losses['val']
                    if not c.always_save_checkpoint and step not in (saved_step, 0):
                        save()
                note_evaluation(step)
            if sampling:
                sample()
            interval_start += time.perf_counter() - pause
        if ending:
            with terminal.doing('saving the checkpoint'):
                settle(saver.wait())
            if stop_code == stopping.NOT_FINITE and world.main:
                resume.supersede(c.out_dir, step)  # saved between the first bad step and now
            break

        lr = learning_rate(c, step)
        optim.set_learning_rate(optimizer, lr)
        step_loss = torch.zeros((), device=device)
        with terminal.doing(f'iter {step + 1}/{c.max_iters}: micro-step', accumulation) as work:
            for number in range(accumulation):
                batch = loader.next(stop.code)
                # who is to stop says so before the micro-step, and all know after it: the answer
                # comes while they compute
                stop_code = agreement.begin(stop.code())
                if not stop_code:
                    x, y, first_position = batch or loader.nothing()
                    if c.dropout:
                        # masks are a function of the data, not of the layout
                        torch.manual_seed(mix(c.seed, first_position) % 2**63)
                    step_loss += micro_step(x, y, number)
                    stop_code = agreement.end()
                if stop_code:
                    break
                work.done += 1
        # the step is given up: the weights are those of the last one, and its batches will come
        # again
        if stop_code:
            micro_step.clear()
            continue
        step_loss = parallel.sum_over_ranks(step_loss, world) / world.size
        guard.unscale()
        measuring = c.gradient_log_interval and (step + 1) % c.gradient_log_interval == 0
        statistics = optim.gradient_statistics(parameters) if measuring else {}
        grad_norm = optim.clip_gradients(parameters, c.grad_clip)
        interval_start += saver.wait_staged()
        step += 1
        guard.step(optimizer, step, step_loss, grad_norm)
        routing = model.after_step(world, c.balance_rate, optimizer.found_inf)
        micro_step.clear()
        position += sequences_per_step
        tokens += tokens_per_step
        interval_steps += 1
        stop.at_once = False

        terminal.advance(step)
        # the first iteration, which warms up, tells nothing of the others
        timed = timed or (step, time.monotonic())
        if step % c.log_interval == 0 or measuring or step in (start_step + 1, c.max_iters):
            loss_value = step_loss.item()  # the only wait for the device
            used = memory_gb(device)
            table = parallel.of_each_rank(
                {
                    **used,
                    'data_wait_s': loader.wait_s / interval_steps,
                    **({} if c.use_cuda_graphs else parallel.waited_for_gradients(train_model)),
                },
                world,
            )
            worst = {key: max(values) for key, values in table.items()}
            seconds = (time.perf_counter() - interval_start) / interval_steps
            rate = tokens_per_step / seconds
            mfu = (
                None
                if warming_up
                else flops.utilisation(
                    token_flops,
                    rate,
                    device_name=gpu_name,
                    dtype=dtype,
                    num_devices=world.size,
                    architecture=shape.describe(),
                )
            )
            gradients = {
                'global_norm': grad_norm.item(),
                **{key: value.item() for key, value in statistics.items()},
            }
            bad = guard.counts()
            k = c.expert_log_interval  # met or passed since the last logged iteration
            shares = bool(k) and (
                step in (start_step + 1, c.max_iters) or step // k > (step - interval_steps) // k
            )
            log.event(
                'iter',
                iter=step,
                loss=loss_value,
                lr=lr,
                tokens_seen=tokens,
                time_ms=1000 * seconds,
                tokens_per_sec=rate,
                data_wait_ms=1000 * worst['data_wait_s'],
                comm_wait_ms=1000 * worst['comm_wait_s'] if 'comm_wait_s' in worst else None,
                **stragglers.of(table, seconds),
                wall_s=log.wall_s(),
                mfu=mfu and {key: mfu[key] for key in flops.VARIES},
                memory={key: worst[key] for key in used},
                gradients=gradients,
                skipped={'bad': bad['bad'], 'spikes': bad['spikes']},
                **(
                    {}
                    if routing is None
                    else {'moe': (moe := model.routing_report(routing, tokens_per_step, shares))}
                ),
            )
            left = (
                (time.monotonic() - timed[1]) / (step - timed[0]) * (c.max_iters - step)
                if step > timed[0]
                else None
            )
            log.say(
                progress_line(
                    step,
                    c.max_iters,
                    loss_value,
                    lr,
                    gradients['global_norm'],
                    rate,
                    mfu and mfu['mfu_percent'],
                    left,
                    [] if routing is None else [f'load {moe["load_score"]:.0f}'],
                    terminal.width(),
                )
            )
            for key, what in (
                ('bad', 'loss or gradient not finite'),
                ('spikes', f'gradient norm above {c.spike_factor:g} times its median'),
            ):
                if bad[key] > bad_before[key]:
                    log.say(
                        f'SKIPPED {bad[key] - bad_before[key]} updates since the last line'
                        f' ({what}), {bad[key]} in all'
                    )
            bad_before = bad
            if bad['row'] >= c.max_bad_steps:
                good = bad['first'] - 1
                first_bad = position - (step - good) * sequences_per_step
                log.say(
                    f'loss or gradient not finite at {c.max_bad_steps} iterations in a row,'
                    f' {bad["first"]} to {good + c.max_bad_steps}, sequences {first_bad} to'
                    f' {first_bad + c.max_bad_steps * sequences_per_step - 1} of the stream:'
                    f' stopping with the weights of iter {good}. Resume with a lower'
                    ' --learning_rate, or look at the data: the first of these sequences begin at'
                    f' tokens {order.starts(first_bad, sequences_per_step)[:8].tolist()} of'
                    ' train.bin'
                )
                # copies of what was saved since then come before it
                lineage = checkpoint.new_lineage([lineage])
                position, tokens, step, stop_code = (
                    first_bad,
                    tokens - (step - good) * tokens_per_step,
                    good,
                    stopping.NOT_FINITE,
                )
                guard.state['counts'][:2] = 0  # the run that continues starts its row anew
            interval_start, interval_steps, warming_up, loader.wait_s = (
                time.perf_counter(),
                0,
                False,
                0.0,
            )

    loader.close()
    terminal.end_bar()
    if stop_code not in (0, stopping.NOT_FINITE):
        log.say(
            f'stopped at iter {step}; python train.py --out_dir={c.out_dir} --init_from=resume'
            ' continues it'
            if step
            else 'stopped before the first iteration, nothing was saved'
        )
    if stop_code > 128 and 'TORCHELASTIC_RUN_ID' in os.environ:
        log.say(
            'torchrun now prints a traceback of its own, as after every signal: the run is saved'
        )
    if failed_save:
        log.say('THE LAST CHECKPOINT WAS NOT SAVED (see above)')
    if stop_code == 0 and step > start_step:
        for line in ending_lines(
            c,
            run_name,
            log.end(),
            prediction,
            memory_gb(device)['max_allocated_gb'],
            before,
            terminal.columns(),
        ):
            log.say(line)
    log.end()
    copied = True
    if c.upload_to:
        log.say(
            f'copying to {redact(c.upload_to)}'
            + ('' if stop_code else ' (Ctrl-C, or ten minutes without success, give up)')
        )
        how = (5,) if stop_code else (600, stop.code)
        with terminal.doing('copying'):
            # in rounds: no rank waits for another for longer
            while (copied := parallel.from_main(lambda: copier.finish(*how), world)) is None:
                settle(None)
        settle(None)
        if not copied:
            log.say(
                f'NOT EVERYTHING IS COPIED: `python checkpoints.py {c.out_dir}'
                f' --copy_to={redact(c.upload_to)}` does it'
            )
        machines.close()
    log.close()
    folder.release()
    # also the barrier before the end: torchrun ends all when one leaves with an error
    return parallel.largest(
        stop.fault or stop_code or (stopping.SAVE_FAILED if failed_save or not copied else 0), world
    )


@dataclass
class ModelOptions:
    """What Model needs beside its shape, and what a step of it takes."""

    c: Config
    shape: ModelConfig
    chosen: dict  # of kernels.choose()
    document_end: int | None
    dtype: torch.dtype
    world: parallel.World

    @property
    def fuses(self):
        """Whether the loss is compiled together with what comes before it, not unit by unit."""
        return self.c.compile and self.world.layout == 'single'

    def loss_chunk(self, batch_size):
        """Return what choose_chunk() does for micro-steps of batch_size sequences."""
        c, tokens = self.c, batch_size * (self.c.block_size // self.c.context_parallel)
        return choose_chunk(
            c.loss_chunk,
            tokens,
            self.shape.vocab_size,
            self.world.device.type,
            self.dtype,
            self.fuses,
        )

    def of(self, batch_size):
        """Return the keyword arguments of Model for micro-steps of batch_size sequences."""
        c = self.c
        return dict(
            **self.chosen,
            dropout=c.dropout,
            activation_checkpointing=c.activation_checkpointing,
            aux_loss=c.aux_loss_weight,
            z_loss=c.z_loss_weight,
            document_end=self.document_end,
            head_z_loss=c.head_z_loss_weight,
            loss_chunk=self.loss_chunk(batch_size)[0],
        )

    def predict(self, batch_size, accumulation, autocast):
        """Return the memory.Prediction of a step. Raises memory.NotPredicted."""
        c, world = self.c, self.world
        length = c.block_size // c.context_parallel
        settings = {
            **self.of(batch_size),
            'backend': 'manual' if self.chosen['backend'] == 'manual' else 'sdpa',
            'loss_chunk': written_chunk(
                self.loss_chunk(batch_size)[0],
                batch_size * length,
                self.shape.vocab_size,
                world.device.type,
                self.fuses,
            ),
        }
        return memory.predict(
            lambda: Model(self.shape, **settings),
            batch_size,
            length,
            world.device,
            autocast,
            accumulation=accumulation,
            muon=c.optimizer == 'muon',
            layout=world.layout,
            ranks=world.size // c.fsdp_replicas,
        )

    def predictor(self, autocast):
        """Return a function of ({key: other value}, batch_size, accumulation) that predicts such a
        step.
        """

        def predicted(changes, batch_size, accumulation):
            changed = dataclasses.replace(self, c=dataclasses.replace(self.c, **changes))
            return changed.predict(batch_size, accumulation, autocast)

        return predicted


def dry_run(c, given):
    """Print what a run would be, without weights, data or files; returns the exit code."""
    notes, before = [], dataclasses.replace(c)
    checks.refuse_impossible(c)
    checks.note_schedule(c, notes)
    assumed = (c.device or '').startswith('cuda') and not torch.cuda.is_available()
    if assumed:
        notes.append(
            f'there is no GPU here: --device={c.device} is assumed, and the memory is estimated'
            " with the CPU's kernels"
        )
        c = dataclasses.replace(c, device='cpu', backend=None, dtype=c.dtype or 'bfloat16')
    world = parallel.start(c.device, c.backend, c.timeout_minutes)
    resumed = hf_folder = None
    if c.init_from == 'resume':
        c, resumed, _ = resume.find(c, given, SHAPE_KEYS, world, notes, None)
        c = dataclasses.replace(c, device=world.device.type)
    elif c.init_from != 'scratch':
        c, hf_folder = huggingface.find(c, given, SHAPE_KEYS)
    parallel.arrange(world, c, notes)
    try:
        train_file, _, meta = open_dataset(c.dataset, ROOT, c.data_url)
        tokens, vocabulary = len(train_file), f'data set {c.dataset}'
    except ConfigError as error:
        meta, tokens, vocabulary = {}, None, f'arch_preset={c.arch_preset}'
        notes.append(f'vocab_size is that of the recipe or the preset: {error}')
    shape = resolve_shape(dataclasses.asdict(c), meta.get('vocab_size'))
    torch_dtype = kernels.precision(c.dtype, world.device)
    trial = c.attention_backend == 'auto'
    if trial:
        notes.append('attention_backend=auto is not tried: sdpa is assumed')
    chosen, told = kernels.choose(
        dataclasses.replace(c, attention_backend='sdpa') if trial or assumed else c,
        shape,
        world.device,
        torch_dtype,
    )
    options = ModelOptions(
        c, shape, chosen, meta.get('eot_id') if c.document_mask else None, torch_dtype, world
    )
    accumulation = checks.accumulation_steps(c, world.data_size)
    autocast = kernels.autocast(world.device.type, torch_dtype)
    prediction, problem = None, None
    try:
        prediction = options.predict(c.batch_size, accumulation, autocast)
        if not assumed:
            memory.refuse(
                prediction, world.device, c, accumulation, world.fsdp, options.predictor(autocast)
            )
    except ConfigError as error:  # not predicted, or too much
        problem = str(error)
    model = Model.on_meta(shape, ring=world.ring, **options.of(c.batch_size))
    optimizer = optim.build_optimizer(
        model.named_parameters(),
        matrices=model.matrices() if c.optimizer == 'muon' else (),
        learning_rate=c.learning_rate,
        betas=(c.beta1, c.beta2),
        weight_decay=c.weight_decay,
        device_type='meta',
    )
    resolved = dataclasses.replace(
        c,
        dtype=str(torch_dtype).removeprefix('torch.'),
        attention_backend=c.attention_backend if assumed else chosen['backend'],
        gradient_accumulation_steps=accumulation,
        backend=before.backend if assumed else world.backend,
        device=before.device if assumed else c.device,
        **dataclasses.asdict(shape),
    )
    gpu_name = torch.cuda.get_device_name(world.device) if world.device.type == 'cuda' else None
    startup = startup_info(resolved, model, optimizer, world, gpu_name, model.flops(), prediction)
    if assumed:
        startup['hardware']['assumed'] = (
            f'{world.size} GPU{"s" if world.size > 1 else ""} (assumed)'
        )
    sequences = c.batch_size * accumulation * world.data_size
    weights = (
        f'checkpoint of iteration {resumed["step"]}'
        if resumed
        else c.init_from
        if hf_folder
        else f'initialized with seed {c.seed}'
    )
    order = order_of(train_file, c.block_size, c.seed) if tokens else None
    if world.main:
        loaders = c.dataloader_num_workers if c.use_dataloader else 0
        columns = Terminal().columns()
        print(
            '\n'.join(
                report(
                    resolved,
                    startup,
                    meta,
                    order,
                    world,
                    sequences,
                    loaders,
                    'dry run',
                    weights,
                    notes + told,
                    columns,
                )
            )
        )
        if problem:
            print(f'WARNING: {problem}')
        print(
            '\n'.join(
                origins(
                    before,
                    resolved,
                    given,
                    'checkpoint' if resumed else c.init_from,
                    vocabulary,
                    columns,
                )
            )
        )
    return 0


def text_tokenizer(c, meta):
    try:
        return tokenizer_of(folder_of(c.dataset, ROOT), meta)
    except ValueError as error:
        raise ConfigError(
            f'sample_interval and eval_tasks need the tokenizer of {c.dataset}: {error}'
        ) from None


def checkpoint_tensors(model, named, updated=None, optimizer=None, guard=None):
    """What a checkpoint holds, {name: tensor}: the model's, the state of the optimizer over
    `updated` and of the guard; the first alone to evaluate.

    named: the model's parameters as they were when it was wrapped. Under FSDP these stay the parts
    of this rank, while what the model itself names may be gathered.
    """
    tensors = {f'model.{name}': tensor for name, tensor in model.tensors().items()}
    tensors.update({f'model.{name}': parameter.detach() for name, parameter in named.items()})
    if optimizer is not None:
        tensors.update(
            {
                f'optimizer.{name}': tensor
                for name, tensor in optim.named_state(optimizer, updated).items()
            }
        )
        tensors.update({f'guard.{name}': tensor for name, tensor in guard.state.items()})
    return tensors


def checkpoint_bytes(model, c):
    """Bytes of a checkpoint, nearly: float32 weights, and one moment of each for Muon's matrices,
    two for AdamW.
    """
    matrices = set(model.matrices()) if c.optimizer == 'muon' else ()
    return sum(
        4 * p.numel() * (2 if name in matrices else 3) for name, p in model.named_parameters()
    )


def learning_rate(c, step):
    return optim.learning_rate_at(
        step,
        learning_rate=c.learning_rate,
        min_lr=c.min_lr,
        warmup_iters=c.warmup_iters,
        lr_decay_iters=c.lr_decay_iters,
        decay_lr=c.decay_lr,
    )


if __name__ == '__main__':
    imported()
    parallel.run_and_leave(lambda: main(resolved=RESOLVED))
