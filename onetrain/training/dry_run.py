"""What a run would be, told without weights, data or files."""

import contextlib
import dataclasses
from typing import TYPE_CHECKING

import torch

from onetrain import huggingface
from onetrain.checkpoint import resume
from onetrain.config import UserError
from onetrain.data.dataset import NotPrepared, folder_of, open_dataset, parse_mixture
from onetrain.data.order import order_of
from onetrain.data.token_file import read_meta
from onetrain.distributed import layouts, processes
from onetrain.logs.terminal import Terminal
from onetrain.model_config import resolve_shape
from onetrain.ops import kernels
from onetrain.training import optim, validate
from onetrain.training.batch_plan import ModelOptions, resolved_plan
from onetrain.training.start_point import StartPoint
from onetrain.training.startup_report import origins, report, startup_info

if TYPE_CHECKING:
    from train import Config


def dry_run(c: 'Config', given: dict[str, str], shape_keys: list[str], root: str):
    """Print the report of the Config `c`, the memory that a step would take, and where each value
    comes from; returns the exit code.

    given: {key: where it was given}; shape_keys: keys that come from a checkpoint; root: folder of
    data/. Raises UserError for what no run can have.
    """
    notes, before = [], dataclasses.replace(c)
    validate.validate(c)
    validate.warn_about_schedule(c, notes)
    assumed = (c.device or '').startswith('cuda') and not torch.cuda.is_available()
    if assumed:
        notes.append(
            f'there is no GPU here: --device={c.device} is assumed, and the memory is estimated'
            " with the CPU's kernels"
        )
        c = dataclasses.replace(c, device='cpu', backend=None, dtype=c.dtype or 'bfloat16')
    world = processes.start(c.device, c.backend, c.timeout_minutes)
    start = _find(c, given, shape_keys, world, notes)
    c = start.config
    layouts.choose_layout(world, c, notes)
    train, meta, vocabulary = _data(c, root, notes)
    plan, told = _plan(c, meta, world, assumed, notes)
    prediction, problem = None, None
    try:
        prediction = plan.options.predict(c.batch_size, plan.accumulation)
        if not assumed:
            plan.options.check_memory(prediction, plan.accumulation)
    except UserError as error:  # not predicted, or too much
        problem = str(error)
    model = plan.model(world)
    shown = plan.config
    if assumed:
        shown = dataclasses.replace(
            shown,
            device=before.device,
            backend=before.backend,
            attention_backend=c.attention_backend,
        )
    startup = _startup(shown, model, world, prediction, assumed)
    if world.is_main:
        order = order_of(train, c.block_size, c.seed) if train else None
        columns = Terminal().columns()
        facts = startup, meta, order, world, 'dry run', _weights(start)
        print('\n'.join(report(shown, *facts, notes + told, columns)))
        if problem:
            print(f'WARNING: {problem}')
        source = 'checkpoint' if start.checkpoint_state else c.init_from
        print('\n'.join(origins(before, shown, given, source, vocabulary, columns)))
    return 0


def _find(c, given, shape_keys, world, notes):
    """Return the StartPoint, for which nothing is held or fetched."""
    if c.init_from == 'resume':
        c, saved, nanogpt = resume.find_checkpoint(c, given, shape_keys, world, notes, None)
        return StartPoint(dataclasses.replace(c, device=world.device.type), saved, nanogpt)
    if c.init_from != 'scratch':
        c, hf_folder = huggingface.resolve_source(c, given, shape_keys)
        return StartPoint(c, hf_folder=hf_folder)
    return StartPoint(c)


def _weights(start):
    if start.checkpoint_state:
        return f'checkpoint of iteration {start.step}'
    c = start.config
    return c.init_from if start.hf_folder else f'initialized with seed {c.seed}'


def _data(c, root, notes):
    """Return (training split or None, meta.pkl, what the vocabulary is taken from)."""
    try:
        train, _, meta = open_dataset(c.dataset, root, c.data_url)
        return train, meta, f'data set {c.dataset}'
    except NotPrepared as error:
        for name, _ in parse_mixture(c.dataset):  # of a mixture another may be there
            with contextlib.suppress(ValueError):  # a damaged one is told when it is opened
                if meta := read_meta(folder_of(name, root)):
                    notes.append(f'vocab_size is that of {name}: {error}')
                    return None, meta, f'data set {name}'
        notes.append(f'vocab_size is that of the recipe or the preset: {error}')
        return None, {}, f'arch_preset={c.arch_preset}'


def _plan(c, meta, world, assumed, notes):
    """Return (BatchPlan, sentences about its kernels), for which no attention kernel is timed."""
    shape = resolve_shape(dataclasses.asdict(c), meta.get('vocab_size'))
    dtype = kernels.precision(c.dtype, world.device, shape.n_embd)
    trial = c.attention_backend == 'auto'
    if trial:
        notes.append('attention_backend=auto is not tried: sdpa is assumed')
    with_sdpa = dataclasses.replace(c, attention_backend='sdpa') if trial or assumed else c
    chosen, told = kernels.select_kernels(with_sdpa, shape, world.device, dtype)
    accumulation = validate.accumulation_steps(c, world.data_size)
    document_end = meta.get('eot_id') if c.document_mask else None
    gpu = 'cuda' if assumed else None
    options = ModelOptions(c, shape, chosen, document_end, dtype, world, gpu)
    return resolved_plan(options, accumulation), told


def _startup(c, model, world, prediction, assumed):
    """Return startup_info() of a model that has shapes alone."""
    optimizer = optim.build_optimizer(
        model.named_parameters(),
        matrices=model.matrices() if c.optimizer == 'muon' else (),
        learning_rate=c.learning_rate,
        betas=(c.beta1, c.beta2),
        weight_decay=c.weight_decay,
        device_type='meta',
    )
    startup = startup_info(c, model, optimizer, world, prediction)
    if assumed:
        number = f'{world.size} GPU{"s" if world.size > 1 else ""}'
        startup['hardware']['assumed'] = f'{number} (assumed)'
    return startup
