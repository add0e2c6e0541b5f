"""Proves CUDA graphs: the bits of a run without, each micro-step with its own data; steps that
cannot be recorded, or are not repeated, are refused.
"""

import dataclasses

import pytest
import torch
from conftest import equal, losses, records, run_train, weights

from model import Model
from onetrain.config import UserError
from onetrain.distributed import layouts, processes
from onetrain.model_config import resolve_shape
from onetrain.ops import kernels
from onetrain.training import micro_step, validate
from train import Config

SMALL = dict(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=64)
FAMILIES = ('gpt2', 'llama', 'qwen3', 'neox', 'moe')


class Again:
    """Stands for a CUDA graph where there is no GPU: replay() calls the function once more, on the
    same tensors.
    """

    def __init__(self, work, pool, stream):
        work()
        self.work, self.shares = work, pool

    def replay(self):
        self.work()

    def pool(self):
        return self


def plain(family='gpt2', accumulation=1, dropout=0.0):
    shape = resolve_shape(
        dict(
            arch_preset=family,
            **SMALL,
            **({'num_experts': 4, 'n_dense_layers': 1} if family == 'moe' else {}),
        )
    )
    model = Model.on_meta(shape, dropout=dropout).allocate('cpu')
    model.init_weights(0)
    world = processes.start('cpu')
    return micro_step.ForwardBackward(
        model,
        model,
        world,
        torch.autocast('cpu', enabled=False),
        torch.amp.GradScaler('cpu', enabled=False),
        1 / 64,
        accumulation,
    )


def batches(number, device='cpu'):
    generator = torch.Generator().manual_seed(0)
    return [
        tuple(torch.randint(0, 64, (4, 16), generator=generator).to(device) for _ in range(2))
        for _ in range(number)
    ]


def forget(step):
    return lambda: step.model.after_step(step.world, 0.0, None)


def gradients_after(step, data, model):
    step.zero_grad()
    total = [step(x, y, number).clone() for number, (x, y) in enumerate(data)]
    return total, [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize('accumulation', [1, 2, 4])
@pytest.mark.parametrize('family', ['gpt2', 'moe'])
def test_each_micro_step_has_its_own_data(family, accumulation):
    step, data = plain(family, accumulation), batches(2 * accumulation)
    expected = [
        gradients_after(step, data[at : at + accumulation], step.model) for at in (0, accumulation)
    ]
    step.model.after_step(step.world, 0.0, None)
    graphs = micro_step.CudaGraphStep(step, record=Again)
    graphs.prepare(data[:2], forget(step))
    assert len(graphs.graphs) == min(accumulation, 2)
    if family == 'moe':
        assert not step.model.routing.any()
    for at, (total, gradients) in zip((0, accumulation), expected):
        found = gradients_after(graphs, data[at : at + accumulation], step.model)
        assert all(map(torch.equal, found[0], total)) and all(map(torch.equal, found[1], gradients))


def test_what_is_recorded_has_the_strides_of_a_batch():
    """torch.compile makes code for strides; new code cannot be made while a graph is recorded."""
    step, seen = plain(accumulation=2), []
    call = step.train_model
    step.train_model = lambda x, y, **kwargs: (
        seen.append((x.stride(), y.stride(), x.data_ptr())) or call(x, y, **kwargs)
    )
    # as the loader gives them out
    windows = [torch.cat([x, y[:, -1:]], dim=1) for x, y in batches(2)]
    graphs = micro_step.CudaGraphStep(step, record=Again)
    graphs.prepare([(window[:, :-1], window[:, 1:]) for window in windows], forget(step))
    assert {(x, y) for x, y, _ in seen} == {((17, 1), (17, 1))} and len(
        {address for _, _, address in seen}
    ) == 1


def test_dropout_is_drawn_anew():
    step, data = plain(dropout=0.3), batches(2)
    graphs = micro_step.CudaGraphStep(step, record=Again)
    graphs.prepare(data, forget(step))
    found = []
    for seed in (5, 6, 5):
        torch.manual_seed(seed)
        found.append(graphs(*data[0], 0).clone())
    assert found[0] == found[2] != found[1]


def test_graphs_with_ranks_that_exchange_gradients(monkeypatch):
    """The last micro-step has a graph of its own there, and all share the memory of the first."""
    step = plain(accumulation=4)
    step.world.layout = 'DDP'
    asked = []
    monkeypatch.setattr(
        layouts,
        'gradient_sync_context',
        lambda model, last, world: asked.append(last) or torch.enable_grad(),
    )
    graphs = micro_step.CudaGraphStep(step, record=Again)
    assert graphs.graph_keys == [(True, False), (False, False), (False, False), (False, True)]
    graphs.prepare(batches(2), forget(step))
    first, *others = graphs.graphs.values()
    assert (
        len(others) == 2 and first.shares is None and all(graph.shares is first for graph in others)
    )
    asked.clear()
    for number, (x, y) in enumerate(batches(4)):
        graphs(x, y, number)
    assert asked == [False, False, False, True]


class Stream:
    """Stands for a torch.cuda.Stream; entering one makes it the current one."""

    current = None

    def __init__(self, name='made'):
        self.name, self.waited = name, []

    def wait_stream(self, other):
        self.waited.append(other)

    def __enter__(self):
        self.before, Stream.current = Stream.current, self

    def __exit__(self, *error):
        Stream.current = self.before


def test_ddp_is_made_warmed_up_and_recorded_on_one_stream(monkeypatch):
    """Gradients of a recording arrive on the stream on which DDP was made; nothing else waits for
    it.
    """
    default, where, made = Stream('default'), [], []
    monkeypatch.setattr(Stream, 'current', default)
    monkeypatch.setattr(torch.cuda, 'Stream', lambda *device: made.append(Stream()) or made[-1])
    monkeypatch.setattr(torch.cuda, 'current_stream', lambda *device: Stream.current)
    monkeypatch.setattr(torch.cuda, 'stream', lambda stream: stream)
    monkeypatch.setattr(torch.cuda, 'CUDAGraph', lambda: 'a graph')
    monkeypatch.setattr(
        torch.cuda,
        'graph',
        lambda graph, pool, stream, capture_error_mode: (
            where.append(('recorded', stream)) or stream
        ),
    )
    monkeypatch.setattr(
        torch.nn.parallel,
        'DistributedDataParallel',
        lambda model, device_ids, **options: where.append(('made', Stream.current)) or model,
    )
    step = plain()
    world = step.world
    world.layout, world.device = 'DDP', torch.device('cuda', 0)
    monkeypatch.setattr(
        layouts, 'gradient_sync_context', lambda model, last, world: torch.enable_grad()
    )
    step.train_model = layouts.wrap(step.model, world, compile=False, accumulation=1, graphs=True)[
        1
    ]
    call = step.train_model
    step.train_model = lambda *args, **kwargs: (
        where.append(('warmed up', Stream.current)) or call(*args, **kwargs)
    )
    micro_step.CudaGraphStep(step, record=Again).prepare(batches(2), forget(step))
    warm = list(where)
    assert micro_step.record_graph(lambda: None, None, world.graph_stream) == 'a graph'
    assert (
        len(made) == 1
        and made[0] is world.graph_stream
        and made[0].waited
        and default.waited == [made[0]] * 2
    )
    assert where[0] == ('made', made[0]) and where[-1] == ('recorded', made[0])
    assert [stream for what, stream in warm[1:]][:22] == [made[0]] * 22  # 11 times two micro-steps


@pytest.mark.parametrize(
    'capability, refused', [((8, 0), True), ((8, 9), True), ((9, 0), False), ((10, 0), False)]
)
def test_experts_are_recorded_where_one_kernel_multiplies_all(capability, refused, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device=None: capability)
    if refused:
        with pytest.raises(UserError, match='grouped matmul waits for the host'):
            validate.validate_cuda_graphs(Config(use_cuda_graphs=True), 'cuda', 'grouped', [])
    else:
        assert validate.validate_cuda_graphs(Config(use_cuda_graphs=True), 'cuda', 'grouped', [])
    c = Config(
        arch_preset='moe',
        num_experts=4,
        n_layer=2,
        n_head=2,
        n_embd=64,
        expert_d_ff=64,
        vocab_size=64,
    )
    notes = ' '.join(
        kernels.select_kernels(
            c, resolve_shape(dataclasses.asdict(c)), torch.device('cuda'), torch.bfloat16
        )[1]
    )
    assert ('expert_dispatch=grouped is slow on this GPU' in notes) == refused


class Frozen(Again):
    """Replays the data that it was recorded with."""

    def replay(self):
        if not hasattr(self, 'once'):
            self.once = True
            self.work()


class Impossible:
    """As torch.cuda.graph does, which ends a recording that failed with an error of its own."""

    def __init__(self, work, pool, stream):
        try:
            raise RuntimeError('operation not permitted when stream is capturing')
        finally:
            raise RuntimeError('capture was invalidated')


@pytest.mark.parametrize(
    'record, told',
    [
        (Frozen, 'does not compute what the plain one does'),
        (Impossible, 'cannot be recorded (operation not permitted when stream is capturing)'),
    ],
)
@pytest.mark.parametrize('accumulation', [1, 2])
def test_what_is_not_repeated_is_refused(record, told, accumulation):
    step = plain(accumulation=accumulation)
    with pytest.raises(UserError, match='use_cuda_graphs=True: ') as error:
        micro_step.CudaGraphStep(step, record=record).prepare(batches(2), forget(step))
    assert told in str(error.value) and '--use_cuda_graphs=False' in str(error.value)


def test_kernels_that_do_not_repeat_themselves_are_compared_by_norms():
    """As with deterministic=False."""
    step, noise = plain(), iter(range(10**6))
    call = step.train_model
    step.train_model = lambda *args, **kwargs: call(*args, **kwargs) * (1 + 1e-5 * next(noise))
    micro_step.CudaGraphStep(step, record=Again).prepare(batches(2), forget(step))
    step.train_model = lambda *args, **kwargs: call(*args, **kwargs) * (1 + next(noise))
    with pytest.raises(UserError, match='does not compute'):
        micro_step.CudaGraphStep(step, record=Again).prepare(batches(2), forget(step))


@pytest.mark.parametrize(
    'options, told',
    [
        (dict(use_fsdp=True), '--use_fsdp=False'),
        (dict(context_parallel=2), '--context_parallel=1'),
        (dict(expert_dispatch='loop'), '--expert_dispatch=grouped'),
    ],
)
def test_what_cannot_be_recorded(options, told):
    with pytest.raises(UserError, match='use_cuda_graphs=True cannot record') as error:
        validate.validate_cuda_graphs(
            Config(use_cuda_graphs=True, **options), 'cuda', options.get('expert_dispatch'), []
        )
    assert told in str(error.value)
    notes = []
    assert (
        validate.validate_cuda_graphs(Config(use_cuda_graphs=True), 'cuda', None, notes)
        and not notes
    )
    assert (
        not validate.validate_cuda_graphs(
            Config(**options), 'cuda', options.get('expert_dispatch'), notes
        )
        and not notes
    )
    assert (
        not validate.validate_cuda_graphs(Config(use_cuda_graphs=True), 'cpu', None, notes)
        and 'needs an NVIDIA GPU' in notes[0]
    )


@pytest.mark.parametrize(
    'options',
    [
        ['--gradient_accumulation_steps=3', '--dropout=0.1'],
        ['--arch_preset=moe', '--num_experts=4', '--n_dense_layers=1'],
    ],
    ids=['dense', 'moe'],
)
def test_a_run(options, dataset, tmp_path, monkeypatch, capsys):
    """train.py with graphs, or what stands for them on a CPU, against without: losses, weights,
    routing.
    """
    on_gpu = torch.cuda.is_available() and 'moe' not in options[0]
    common = ['--max_iters=4', '--eval_interval=2', *options] + (
        ['--device=cuda', '--dtype=float32'] if on_gpu else []
    )
    assert run_train(dataset, tmp_path / 'plain', *common) == 0
    if not on_gpu:
        monkeypatch.setattr(validate, 'validate_cuda_graphs', lambda c, *_: c.use_cuda_graphs)
        real = micro_step.CudaGraphStep
        monkeypatch.setattr(micro_step, 'CudaGraphStep', lambda step: real(step, record=Again))
    assert run_train(dataset, tmp_path / 'graphs', *common, '--use_cuda_graphs=True') == 0
    said = capsys.readouterr().out
    assert 'CUDA Graphs: on' in said and 'CUDA graphs recorded in' in said
    assert losses(tmp_path / 'graphs') == losses(tmp_path / 'plain') and equal(
        weights(tmp_path / 'graphs', 4), weights(tmp_path / 'plain', 4)
    )
    if 'moe' in options[0]:
        assert [record['moe'] for record in records(tmp_path / 'graphs')] == [
            record['moe'] for record in records(tmp_path / 'plain')
        ]


@pytest.fixture
def strict():
    """Kernels that repeat: compiled, the gradient of an embedding is else summed in any order."""
    before = torch.are_deterministic_algorithms_enabled()
    kernels.set_deterministic(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('compiled', [False, True])
@pytest.mark.parametrize('family', FAMILIES)
def test_on_a_gpu(family, compiled, strict):
    """Real graphs, whose own comparison must pass, in bfloat16 with three micro-steps and
    dropout.
    """
    shape = resolve_shape(
        dict(
            arch_preset=family,
            **SMALL,
            **({'num_experts': 4, 'n_dense_layers': 1} if family == 'moe' else {}),
        )
    )
    model = Model.on_meta(shape, dropout=0.1).allocate('cuda')
    model.init_weights(0)
    train_model = torch.compile(model) if compiled else model
    step = micro_step.ForwardBackward(
        model,
        train_model,
        processes.start('cuda'),
        torch.autocast('cuda', dtype=torch.bfloat16),
        torch.amp.GradScaler('cuda', enabled=False),
        1 / 64,
        3,
    )
    graphs = micro_step.CudaGraphStep(step)
    graphs.prepare(batches(2, 'cuda'), forget(step))
    data = batches(3, 'cuda')
    torch.manual_seed(7)
    found = gradients_after(graphs, data, model)
    model.zero_grad(set_to_none=True)
    torch.manual_seed(7)
    expected = gradients_after(step, data, model)
    assert all(map(torch.equal, found[0], expected[0])) and all(
        map(torch.equal, found[1], expected[1])
    )
