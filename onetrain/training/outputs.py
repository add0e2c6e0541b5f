"""What a run writes to, opened: its folder, its copy elsewhere, its log, its checkpoints."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from onetrain import __version__, flops
from onetrain.checkpoint import resume
from onetrain.checkpoint.async_writer import Saver
from onetrain.checkpoint.keeper import CheckpointKeeper
from onetrain.checkpoint.shared_upload import Machines
from onetrain.checkpoint.uploader import Uploader, place_of
from onetrain.distributed import collectives, topology
from onetrain.logs.alerts import Alerts
from onetrain.logs.run_log import RunLog, new_run_name, now, unsaved_run
from onetrain.logs.telemetry import Telemetry, metrics_name

if TYPE_CHECKING:
    from model import Model
    from onetrain.checkpoint.resume import OutDirLock
    from onetrain.evaluation.evaluator import Evaluator
    from onetrain.training.batch_plan import BatchPlan
    from onetrain.training.optim import Optimization
    from onetrain.training.run_data import RunData
    from onetrain.training.session import Session
    from onetrain.training.start_point import StartPoint, TrainState
    from train import Config


@dataclass
class RunOutputs:
    """Where a run writes: its folder, name and lineage, uploader and machines that upload; None
    where it writes nothing or uploads nothing.
    """

    folder: 'OutDirLock'
    run_name: str | None = None
    lineage: str | None = None
    uploader: Uploader | None = None
    machines: Machines | None = None


def open_outputs(
    start: 'StartPoint',
    plan: 'BatchPlan',
    model: 'Model',
    folder: 'OutDirLock',
    session: 'Session',
) -> 'RunOutputs':
    """Take out_dir for this run; returns a RunOutputs. Raises UserError where others have it."""
    c, saved = plan.config, start.checkpoint_state
    world, notes = session.world, session.notes
    if c.eval_only:
        return RunOutputs(folder)
    folder.acquire(make=True)
    if saved:
        resume.archive_rejected(c, saved, world, notes)
    else:
        resume.prepare_out_dir(c, world, notes)

    def name():
        # a run that died before its first checkpoint keeps its name and log
        again = c.auto_resume and not saved
        unsaved = again and unsaved_run(c.out_dir, resume.config_record(c))
        return unsaved or new_run_name(c.out_dir)

    run_name = (saved and saved.get('run_name')) or collectives.broadcast_from_main(name, world)
    collectives.broadcast_from_main(
        lambda: folder.check_room(run_name, checkpoint_bytes(model, c)), world
    )
    there = c.upload_to and place_of(c.upload_to, c.out_dir)
    lineage = collectives.broadcast_from_main(lambda: resume.choose_lineage(c, saved, there), world)
    outputs = RunOutputs(folder, run_name, lineage)
    if c.upload_to:
        outputs.machines = Machines(world, c.upload_to)
        if world.is_main:
            keep = c.upload_keep_local
            outputs.uploader = Uploader(c.upload_to, c.out_dir, run_name, keep, outputs.machines)
        elif world.local_rank == 0:
            outputs.machines.serve()
    return outputs


def checkpoint_bytes(model: 'Model', c: 'Config') -> int:
    """Return bytes of a checkpoint, nearly: float32 weights, and one moment of each for Muon's
    matrices, two for AdamW.
    """
    matrices = set(model.matrices()) if c.optimizer == 'muon' else ()
    return sum(
        4 * p.numel() * (2 if name in matrices else 3) for name, p in model.named_parameters()
    )


def open_log(
    c: 'Config',
    start: 'StartPoint',
    outputs: 'RunOutputs',
    model: 'Model',
    startup: dict,
    utilization: Callable,
    evaluated: dict | None,
    session: 'Session',
) -> None:
    """Set session.log: write its header and open what else it goes to."""
    world = session.world
    constants = utilization(tokens_per_sec=1.0)
    shown = ('device', 'dtype', 'compile', 'use_zero1', 'use_fsdp')
    header = {
        'config': resume.config_record(c),
        'startup_info': startup,
        'mfu_constants': {key: constants[key] for key in constants if key not in flops.VARIES},
        'metadata': {key: getattr(c, key) for key in shown}
        | {'world_size': world.size, 'version': __version__},
    }
    session.log = log = RunLog(
        c.out_dir,
        outputs.run_name,
        header,
        active=world.is_main,
        write=not c.eval_only,
        resume_step=start.step if start.checkpoint_state or c.auto_resume else None,
        evaluated=evaluated is not None,
        save_json=c.save_log_to_json,
        save_interval=c.log_save_interval,
        first=start.step,
        terminal=session.terminal,
    )
    if world.local_rank == 0 and not c.eval_only:
        path = os.path.join(c.out_dir, metrics_name(world.rank // world.local_size))
        gpus = topology.visible_gpus(world.local_size) if world.device.type == 'cuda' else []
        resumed = bool(start.checkpoint_state)
        session.telemetry = Telemetry(path, c.telemetry_interval, gpus, log.say, resumed)
    if world.is_main and not c.eval_only:
        _watch_over(c, outputs, model, session)
        if c.wandb_log:
            log.to_wandb(c.wandb_project, c.wandb_run_name)
        if c.trackio_log:
            log.to_trackio(c.wandb_project, c.wandb_run_name)
        if c.tensorboard_log:
            log.to_tensorboard()
    if start.from_own_checkpoint and not log.has_checkpoint(start.step):
        log.event(
            'checkpoint',
            iter=start.step,
            val_loss=None,
            path=start.checkpoint_state['path'],
            timestamp=now(),
            stall_ms=None,
            total_ms=None,
        )


def _watch_over(c, outputs, model, session):
    """Have the run warned of what goes wrong."""
    world = session.world
    alerts = Alerts(
        session.log,
        outputs.run_name,
        c.out_dir,
        max_iters=c.max_iters,
        url=c.notify,
        checkpoint_bytes=checkpoint_bytes(model, c),
        slow_path=lambda: topology.slowest_path(topology.read_topology(world.local_size)),
    )
    session.log.sinks.append(alerts.sink)
    if session.telemetry:
        session.telemetry.look = alerts.look_at_machine


def open_keeper(
    start: 'StartPoint',
    plan: 'BatchPlan',
    data: 'RunData',
    evaluator: 'Evaluator',
    outputs: 'RunOutputs',
    model: 'Model',
    optimization: 'Optimization',
    state: 'TrainState',
    session: 'Session',
) -> 'CheckpointKeeper':
    """Return the CheckpointKeeper, with the memory of its copies taken."""
    c = plan.config
    saver = Saver(
        c.out_dir,
        session.world,
        keep=c.keep_checkpoints,
        keep_every=c.keep_every,
        keep_all=c.keep_all_checkpoints,
        background=c.checkpoint_async,
        before_commit=session.log.sync,
        uploader=outputs.uploader,
    )
    facts = {
        'run_name': outputs.run_name,
        'tokens_per_step': plan.tokens_per_step,
        'data': data.splits,
        'windows': evaluator.windows_hash,
        'tokenizer': data.tokenizer_id,
        'token_ids': data.token_ids,
        'optimizer': type(optimization.optimizer).__name__,
    }
    keeper = CheckpointKeeper(
        c, state, model, optimization, saver, facts, outputs.lineage, session.log, session.stop
    )
    if start.from_own_checkpoint:
        keeper.saved_step = start.step
    return keeper
