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

import dataclasses
import gc
import os
import signal
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from onetrain.command_line import check_arguments, explain, importing, resolve_early
from onetrain.config import UserError, resolve

if TYPE_CHECKING:
    from model import Model
    from onetrain.checkpoint.keeper import CheckpointKeeper
    from onetrain.data.order import Order
    from onetrain.distributed.processes import World
    from onetrain.logs.run_log import RunLog
    from onetrain.signals import StopRequest
    from onetrain.training.batch_plan import BatchPlan
    from onetrain.training.optim import NonFiniteGuard, Optimization
    from onetrain.training.outputs import RunOutputs
    from onetrain.training.run_data import PromptsAndTasks, RunData
    from onetrain.training.start_point import TrainState

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
    'auto',
    'flash_attn_4',
    'flash_attn_3',
    'flash_attn_2',
    'cudnn',
    'blocks',
    'sdpa',
    'flex',
    'manual',
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
    telemetry_interval: float = 10.0
    # Seconds between lines of out_dir/gpu_metrics.jsonl about GPUs, processor, memory, disk and
    # network; 0 writes none.
    notify: str | None = None
    # URL (https://) that warnings and the end of the run are posted to, as JSON; it is kept in no
    # log and no checkpoint.
    price_per_hour: float = 0.0
    # Dollars for an hour of all machines of the run, to log what it costs; 0 logs no cost.
    profile: str | None = None
    # Iterations that rank 0 traces into out_dir/profile_*.json for Perfetto, such as 100:103.
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
    early_stop_patience: int = 0
    # Evaluations without a better validation loss after which the run ends; 0 never ends it so.
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
    # Attention kernel; falls back in this order (cudnn and blocks only if asked for). auto times
    # them and takes the fastest. None is flex on an H100 or H200 where deterministic and compile
    # are on, blocks on a CPU in bfloat16 (up to a block_size of 1024), and sdpa elsewhere.
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
    # Precision of the matmuls; weights stay float32. None is bfloat16 on a GPU, and on a CPU that
    # computes faster in it, for models at least 128 wide; else float32.
    float32_matmul_precision: Literal['highest', 'high', 'medium'] = 'highest'
    # With dtype=float32: how exact its matmuls are, as torch.set_float32_matmul_precision has it;
    # high is TF32 on GPUs that have it.
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
    def save_interval(self) -> int:
        """Iterations between checkpoints: checkpoint_interval, else those between evaluations."""
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
from torch import nn

from onetrain import signals
from onetrain.checkpoint import resume
from onetrain.counter_rng import hash_ints
from onetrain.data.loader import TrainLoader
from onetrain.data.order import order_of
from onetrain.data.text_bytes import TextBytes
from onetrain.distributed import collectives, layouts, processes
from onetrain.evaluation.evaluator import Evaluator
from onetrain.files import redact
from onetrain.generation import generate
from onetrain.logs.run_log import now
from onetrain.logs.terminal import Terminal
from onetrain.model_config import ModelConfig
from onetrain.training import memory, optim, validate
from onetrain.training.batch_plan import plan_batches, predict_memory
from onetrain.training.dry_run import dry_run
from onetrain.training.early_stop import open_patience
from onetrain.training.iteration_log import IterationLog, costs, mfu_function
from onetrain.training.micro_step import CudaGraphStep, ForwardBackward, compile_and_capture
from onetrain.training.outputs import open_keeper, open_log, open_outputs
from onetrain.training.run_data import load_prompts_and_tasks, open_data
from onetrain.training.session import Session
from onetrain.training.start_point import StartPoint
from onetrain.training.startup_report import (
    ending_lines,
    evaluation_line,
    interpreter,
    loss_metrics,
    memory_gb,
    report,
    startup_info,
)

ROOT = os.path.dirname(os.path.abspath(__file__))
SHAPE_KEYS = ['arch_preset', *(field.name for field in dataclasses.fields(ModelConfig))]


def main(argv: list[str] | None = None, resolved: Any = None) -> int:
    """Run the trainer with command-line arguments `argv`, or what resolve() made of them; returns
    the exit code.
    """
    stop = signals.StopRequest(verbose=processes.is_rank_0())
    terminal = Terminal(active=processes.is_rank_0())
    try:
        if resolved is None:
            argv = sys.argv[1:] if argv is None else argv
            check_arguments(argv)
            resolved = resolve(Config, argv, ALIASES)
        c, given = resolved
        if c.dry_run:
            return dry_run(c, given, SHAPE_KEYS, ROOT)
        return train(c, given, stop, terminal)
    except BrokenPipeError:  # as `| head` does; nothing more can be shown
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 128 + signal.SIGPIPE
    except Exception as error:
        if 'use_deterministic_algorithms' in str(error):
            error = UserError(
                'deterministic=True:'
                f' {str(error).splitlines()[0].split(" but you set")[0].rstrip(",")}: type'
                ' --deterministic=False'
            )
        elif isinstance(error, RuntimeError) and processes.was_reported():
            return 2
        sentence = explain(error)
        if sentence is None or isinstance(error, ValueError) and not isinstance(error, UserError):
            raise
        processes.report_error(sentence)
        return 2
    finally:
        gc.unfreeze()
        stop.restore()
        terminal.close()


def train(c: Config, given: dict[str, str], stop: StopRequest, terminal: Terminal) -> int:
    """Run training with the Config `c`; returns the exit code.

    given: {key: where it was given}; stop: signals.StopRequest.
    """
    validate.validate(c)
    world = processes.start(c.device, c.backend, c.timeout_minutes, c.out_dir)
    session = Session(world, stop, terminal)
    notes = session.notes
    validate.warn_about_schedule(c, notes)
    same = {**resume.config_record(c), 'torch': torch.__version__}
    collectives.assert_same_on_all_ranks(same, 'the configuration', world)

    # ---- where to start from, the data, how a step is computed
    lock = resume.OutDirLock(c.out_dir, world)
    start = StartPoint.find(c, given, SHAPE_KEYS, lock, session)
    data = open_data(start, given, ROOT, session)
    origin = start.describe_weights(data.folder, world)
    plan = plan_batches(start, data, session)
    c = plan.config
    state = start.initial_state(plan, data.train_data_changed, notes)
    order = order_of(data.train, c.block_size, c.seed)
    warn_about_plan(start, data, plan, order, notes)
    prompts = load_prompts_and_tasks(c, data, world)

    # ---- model and optimizer
    model = plan.model(world)
    check_model(c, model, world)
    prediction = predict_memory(plan, model, session)
    outputs = open_outputs(start, plan, model, lock, session)
    before_gb = memory_gb(world.device)['allocated_gb']
    eval_model, train_model = build_model(start, plan, model, session)
    optimization = build_optimizer(c, model, world)
    start.load_checkpoint(model, optimization, session)

    # ---- evaluation, log and report
    evaluator = Evaluator(plan, data, prompts, model, eval_model, session)
    windows_hash, changed = evaluator.windows_hash, data.val_data_changed
    cached_losses = start.cached_losses(windows_hash, changed)
    state.best_val_loss = start.best_loss(windows_hash, changed, cached_losses, notes)
    mfu = mfu_function(plan, model, world)
    startup = startup_info(c, model, optimization.optimizer, world, prediction)
    open_log(c, start, outputs, model, startup, mfu, cached_losses, session)
    log = session.log
    run_name, columns = outputs.run_name, terminal.columns()
    for line in report(c, startup, data.meta, order, world, run_name, origin, notes, columns):
        log.say(line)
    if c.eval_only:
        if losses := evaluator():
            log.say(evaluation_line(start.step, losses))
        log.close()
        return collectives.all_reduce_max(stop.code(), world)

    # ---- what the loop works with
    # forks its processes, so before a thread reads the data
    loader = open_loader(plan, data, order, state, world)
    text_bytes = count_text_bytes(plan, data, prompts) if world.is_main else None
    keeper = open_keeper(start, plan, data, evaluator, outputs, model, optimization, state, session)
    stop.max_hours = c.max_time
    guard = optimization.guard
    micro_step = build_micro_step(
        plan, data, order, state, model, train_model, optimization, evaluator, session
    )
    gc.freeze()  # what stays for good is not searched for garbage again
    iterations = IterationLog(plan, model, train_model, loader, guard, mfu, session, start.step)
    patience = open_patience(c, session)
    announce_start(c, state.step, session)

    # ---- the loop: once in a while save, evaluate, sample; then one step; then log
    stop_code = 0
    while True:
        step = state.step
        ending = step >= c.max_iters or bool(stop_code) or patience.is_over()
        going_on = not stop_code and not patience.is_over()
        evaluating = evaluates_at(c, step, start.step, cached_losses) and going_on
        sampling = samples_at(c, step, start.step) and going_on
        with terminal.doing('saving the checkpoint'):
            keeper.report_save(wait=ending)
        # whether a save is done may differ between ranks, so nothing here depends on it
        saving = keeper.due(ending)
        if saving or evaluating or sampling:
            # saving is asynchronous: it does not synchronize the GPU
            with iterations.excluded(world.device if evaluating or sampling else None):
                if saving:
                    keeper.save()
                losses = evaluator() if evaluating else None
                if losses:
                    log_evaluation(c, state, losses, text_bytes, keeper, log)
                    patience.add(losses['val'])
                elif evaluating:
                    stop_code = collectives.all_reduce_max(stop.code(), world)
                    continue
                if sampling:
                    log_samples(plan, step, prompts, model, session)
            if patience.is_over() and not ending:
                continue
        if ending:
            with terminal.doing('saving the checkpoint'):
                keeper.report_save(wait=True)
            break

        result = train_step(plan, state, model, optimization, micro_step, loader, keeper, session)
        stop_code = result.stop_code
        if stop_code:
            continue
        stop.exit_immediately = False
        iterations.count(state.step, result.waited)
        if iterations.due(state.step, bool(result.statistics)):
            bad = iterations.record(state, result)
            if bad['row'] >= c.max_bad_steps:
                stop_code = rewind_after_bad_steps(plan, order, bad, keeper, guard, log)
            iterations.reset_interval()

    loader.close()
    iterations.profiler.close()
    terminal.end_bar()
    return finish(start, stop_code, keeper, outputs, prediction, before_gb, session)


def build_micro_step(
    plan: BatchPlan,
    data: RunData,
    order: Order,
    state: TrainState,
    model: Model,
    train_model: nn.Module,
    optimization: Optimization,
    evaluator: Evaluator,
    session: Session,
) -> ForwardBackward | CudaGraphStep:
    """Return what computes a micro-step, compiled and recorded where the config asks for it."""
    c, world = plan.config, session.world
    # DDP averages gradients over ranks: this makes it the mean over the tokens of a step
    weight = world.size / plan.tokens_per_step
    micro_step = ForwardBackward(
        model, train_model, world, plan.autocast, optimization.scaler, weight, plan.accumulation
    )
    if state.step < c.max_iters and (c.compile or c.use_cuda_graphs):
        return compile_and_capture(plan, data, order, state, micro_step, evaluator, session)
    return micro_step


def announce_start(c: Config, step: int, session: Session) -> None:
    """Show the progress bar from iteration `step` on, or say that there is nothing to train, and
    begin to write what the machine does.
    """
    session.terminal.start_bar(c.max_iters, step)
    if session.telemetry:  # a thread, so after the loader has forked its processes
        session.telemetry.start()
    if step >= c.max_iters:
        session.log.say(
            f'nothing to train: already at iter {step} of max_iters={c.max_iters}; a larger'
            ' --max_iters goes on'
        )


@dataclass
class StepResult:
    """What an optimizer step gave. Tensors stay on the GPU; they are only synced when logged.

    stop_code: not 0 if the step was given up; waited: seconds blocked on a checkpoint.
    """

    stop_code: int
    lr: float = 0.0
    loss: torch.Tensor | None = None
    grad_norm: torch.Tensor | None = None
    statistics: dict = dataclasses.field(default_factory=dict)
    routing: torch.Tensor | None = None
    waited: float = 0.0


def train_step(
    plan: BatchPlan,
    state: TrainState,
    model: Model,
    optimization: Optimization,
    micro_step: ForwardBackward | CudaGraphStep,
    loader: TrainLoader,
    keeper: CheckpointKeeper,
    session: Session,
) -> StepResult:
    """Take one optimizer step, of plan.accumulation micro-steps; returns a StepResult.

    A step during which the run is asked to stop is given up: the weights are those of the last one,
    and its batches will come again.
    """
    c, guard = plan.config, optimization.guard
    world, stop, agreement = session.world, session.stop, session.agreement
    lr = learning_rate(c, state.step)
    optim.set_learning_rate(optimization.optimizer, lr)
    loss = torch.zeros((), device=world.device)
    title = f'iter {state.step + 1}/{c.max_iters}: micro-step'
    with session.terminal.doing(title, plan.accumulation) as work:
        for number in range(plan.accumulation):
            batch = loader.next(stop.code)
            # the all-reduce about stopping starts before the micro-step, so that they overlap
            stop_code = agreement.begin(stop.code())
            if not stop_code:
                x, y, first_position = batch or loader.dummy_batch()
                if c.dropout:
                    # masks are a function of the data, not of the layout
                    torch.manual_seed(hash_ints(c.seed, first_position) % 2**63)
                loss += micro_step(x, y, number)
                stop_code = agreement.end()
            if stop_code:
                micro_step.zero_grad()
                return StepResult(stop_code)
            work.done += 1
    loss = collectives.sum_over_ranks(loss, world) / world.size
    guard.unscale()
    measured = c.gradient_log_interval and (state.step + 1) % c.gradient_log_interval == 0
    statistics = optim.gradient_statistics(optimization.parameters) if measured else {}
    grad_norm = optim.clip_gradients(optimization.parameters, c.grad_clip)
    waited = keeper.saver.wait_staged()  # until then the tensors of a save must not change
    state.step += 1
    guard.step(optimization.optimizer, state.step, loss, grad_norm)
    routing = model.after_step(world, c.balance_rate, optimization.optimizer.found_inf)
    micro_step.zero_grad()
    state.position += plan.sequences_per_step
    state.tokens += plan.tokens_per_step
    return StepResult(0, lr, loss, grad_norm, statistics, routing, waited)


def evaluates_at(c: Config, step: int, start_step: int, cached_losses: dict | None) -> bool:
    """Return whether the losses are to be measured at `step`, which includes the final weights.

    cached_losses: of the weights that the run started from, or None.
    """
    last = step == c.max_iters and step > start_step
    wanted = (last or step % c.eval_interval == 0) and (step > 0 or c.eval_at_start)
    return wanted and not (step == start_step and cached_losses)


def samples_at(c: Config, step: int, start_step: int) -> bool:
    """Return whether to show samples before iteration step + 1."""
    return c.sample_interval > 0 and step % c.sample_interval == 0 and step > start_step


def log_evaluation(
    c: Config,
    state: TrainState,
    losses: dict,
    text_bytes: TextBytes,
    keeper: CheckpointKeeper,
    log: RunLog,
) -> None:
    """Log the losses of an evaluation, and save the weights if they are the best."""
    log.event(
        'eval',
        iter=state.step,
        train_loss=losses['train'],
        val_loss=losses['val'],
        timestamp=now(),
        lr=learning_rate(c, max(0, state.step - 1)),
        tokens_seen=state.tokens,
        **loss_metrics(losses['val'], text_bytes),
        **({'val_loss_by_source': losses['sources']} if 'sources' in losses else {}),
        **({'tasks': losses['tasks']} if 'tasks' in losses else {}),
    )
    log.say(evaluation_line(state.step, losses, state.best_val_loss))
    best = keeper.update_best(losses)
    if best and not c.always_save_checkpoint and state.step not in (keeper.saved_step, 0):
        keeper.save()
    keeper.attach_losses(state.step)


def log_samples(
    plan: BatchPlan,
    step: int,
    prompts: PromptsAndTasks,
    model: Model,
    session: Session,
) -> None:
    """Continue the prompts of sample_start and log the texts."""
    world, stop = session.world, session.stop
    # a generator of its own: sampling must not change what training draws; alike on every rank
    generator = torch.Generator(world.device).manual_seed(plan.config.seed)
    with layouts.forward_only(model), plan.autocast:
        written = generate(
            model,
            prompts.ids,
            128,
            temperature=0.8,
            top_k=50,
            generator=generator,
            device=world.device,
            interrupted=lambda: collectives.all_reduce_max(stop.code(), world),
        )
    for prompt, ids in zip(prompts.ids, written):
        session.log.sample(step, prompts.tokenizer.decode(prompt + ids))


def rewind_after_bad_steps(
    plan: BatchPlan,
    order: Order,
    bad: dict[str, int],
    keeper: CheckpointKeeper,
    guard: NonFiniteGuard,
    log: RunLog,
) -> int:
    """Go back to the last good step after too many that were not finite; returns the exit code.

    The weights are still those of that step: bad steps change none. bad: of guard.counts().
    """
    c, state, good = plan.config, keeper.state, bad['first'] - 1
    missed = state.step - good
    first = state.position - missed * plan.sequences_per_step
    last = first + c.max_bad_steps * plan.sequences_per_step - 1
    log.say(
        f'loss or gradient not finite at {c.max_bad_steps} iterations in a row, {bad["first"]} to'
        f' {good + c.max_bad_steps}, sequences {first} to {last} of the stream: stopping with the'
        f' weights of iter {good}. Resume with a lower --learning_rate (from an older checkpoint,'
        ' with --resume_from, if these weights give no finite loss), or look at the data: the'
        ' first of these sequences begin at tokens'
        f' {order.starts(first, plan.sequences_per_step)[:8].tolist()} of train.bin'
    )
    keeper.rewind(good, first, state.tokens - missed * plan.tokens_per_step)
    guard.state['counts'][:2] = 0  # the run that continues starts its row anew
    return signals.NOT_FINITE


def warn_about_plan(
    start: StartPoint,
    data: RunData,
    plan: BatchPlan,
    order: Order,
    notes: list[str],
) -> None:
    """Note what of the schedule and the data a user may not expect."""
    c = plan.config
    if c.decay_lr and c.lr_decay_iters > c.max_iters and c.min_lr < c.learning_rate:
        notes.append(
            f'the learning rate does not reach min_lr: lr_decay_iters={c.lr_decay_iters} lies'
            f' beyond max_iters={c.max_iters}'
        )
    if start.from_own_checkpoint:
        validate.warn_about_learning_rate(
            start.checkpoint_state['config'], c, start.step, learning_rate, notes
        )
    validate.warn_about_data(c, data, start.step, order, plan.sequences_per_step, notes)


def check_model(c: Config, model: Model, world: World) -> None:
    """Raise UserError for a model that is too large, or fp8 that has no effect."""
    memory.refuse_too_large(model, world.device, world.mesh.size(-1) if world.fsdp else 1)
    if c.fp8 and not model.float8_layers:
        raise UserError(
            'fp8=True finds no linear layer that would gain (sizes that are multiples of 16, more'
            ' than 1024 outputs or 4096 inputs): type --fp8=False'
        )


def build_model(start: StartPoint, plan: BatchPlan, model: Model, session: Session) -> tuple:
    """Give `model` memory and values on this rank's layout; returns (what evaluation calls, what
    training calls).
    """
    c, world = plan.config, session.world
    torch.manual_seed(c.seed)
    reduce_dtype = getattr(torch, c.fsdp_reduce_dtype)
    layouts.shard(model, world, plan.options.dtype, reduce_dtype, c.fsdp_offload)
    offloaded = c.use_fsdp and c.fsdp_offload
    model.allocate('cpu' if offloaded else world.device, buffers_on=world.device)
    new = c.init_from == 'scratch'
    with session.terminal.doing('initializing the weights' if new else 'loading the weights'):
        start.initialize(model, world.device)
    return layouts.wrap(model, world, c.compile, plan.accumulation, c.use_cuda_graphs)


def build_optimizer(c: Config, model: Model, world: World) -> Optimization:
    """Return the optim.Optimization of `model`, whose parameters have memory."""
    named = dict(model.named_parameters())
    parameters = list(named.values())
    updated = layouts.zero1_parameters(named, world)
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
    layouts.attach_zero1(optimizer, named, updated, world)
    scaler = torch.amp.GradScaler(world.device.type, enabled=c.dtype == 'float16')
    guard = optim.NonFiniteGuard(parameters, scaler, c.max_bad_steps, c.spike_factor)
    return optim.Optimization(optimizer, scaler, guard, named, updated)


def count_text_bytes(plan: BatchPlan, data: RunData, prompts: PromptsAndTasks) -> TextBytes:
    """Return the TextBytes of the evaluation windows."""
    c = plan.config
    starts = data.val.evaluation_starts(c.block_size, c.eval_iters * c.batch_size)
    return TextBytes(data.val, starts, c.block_size, lambda: prompts.tokenizer or data.tokenizer())


def open_loader(
    plan: BatchPlan, data: RunData, order: Order, state: TrainState, world: World
) -> TrainLoader:
    """Return the TrainLoader, which begins to read ahead."""
    c = plan.config
    return TrainLoader(
        data.train,
        order,
        batch_size=c.batch_size,
        rank=world.data_rank,
        world_size=world.data_size,
        position=state.position,
        device=world.device,
        ring=world.ring,
        num_workers=c.dataloader_num_workers if c.use_dataloader else 0,
        prefetch_factor=c.dataloader_prefetch_factor,
    )


def finish(
    start: StartPoint,
    stop_code: int,
    keeper: CheckpointKeeper,
    outputs: RunOutputs,
    prediction: memory.Prediction | None,
    before_gb: float,
    session: Session,
) -> int:
    """Report how the run ended, wait for its copies and release its folder; returns the exit code.

    prediction: of the memory of a step; before_gb: what was allocated before there was a model.
    """
    c, state, log = keeper.config, keeper.state, session.log
    if session.telemetry:
        session.telemetry.close()
    if stop_code == signals.NOT_FINITE and session.world.is_main:
        resume.archive_newer(c.out_dir, state.step)  # saved between the first bad step and now
    if stop_code not in (0, signals.NOT_FINITE):
        command = f'{interpreter()} train.py --out_dir={c.out_dir} --init_from=resume'
        again = f'{command} continues it'
        at = f'stopped at iter {state.step}; {again}'
        log.say(at if state.step else 'stopped before the first iteration, nothing was saved')
    if stop_code > 128 and 'TORCHELASTIC_RUN_ID' in os.environ:
        log.say(
            'torchrun now prints a traceback of its own, as after every signal: the run is saved'
        )
    if keeper.failed:
        log.say('THE LAST CHECKPOINT WAS NOT SAVED (see above)')
    if stop_code == 0 and state.step > start.step:
        peak_gb = memory_gb(session.world.device)['max_allocated_gb']
        columns = session.terminal.columns()
        cost = costs(c.price_per_hour, log.wall_s(), None, log.cost_before, log.wall_before)
        facts = log.end(), prediction, peak_gb, before_gb, columns, cost.get('cost')
        for line in ending_lines(c, outputs.run_name, *facts):
            log.say(line)
    log.end()
    copied = True
    if c.upload_to:
        patience = '' if stop_code else ' (Ctrl-C, or ten minutes without success, give up)'
        log.say(f'copying to {redact(c.upload_to)}{patience}')
        with session.terminal.doing('copying'):
            copied = keeper.finish_copying(stop_code)
        if not copied:
            log.say(
                f'NOT EVERYTHING IS COPIED: `python checkpoints.py {c.out_dir}'
                f' --copy_to={redact(c.upload_to)}` does it'
            )
        outputs.machines.close()
    log.close()
    outputs.folder.release()
    unsaved = signals.SAVE_FAILED if keeper.failed or not copied else 0
    # also the barrier before the end: torchrun ends all when one leaves with an error
    return collectives.all_reduce_max(
        session.stop.requested_code or stop_code or unsaved, session.world
    )


def learning_rate(c: Config, step: int) -> float:
    """Return the learning rate of optimizer step `step` (0-based)."""
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
    processes.run_and_exit(lambda: main(resolved=RESOLVED))
