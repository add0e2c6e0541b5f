"""Memory of each rank is what theory allows: optimizer state, parameters, gradients, and what is
kept for the backward pass.
"""

import ast
import gc

import pytest
import torch
from layout_runs import LAYOUTS
from ranks import ranks
from torch.distributed.tensor import DTensor

PARTS = ('parameters', 'gradients', 'state')


def bytes_of_a_rank(options):
    """{'parameters', 'gradients', 'state', 'alive', 'total'}: bytes on this rank before the third
    step of a small model, 'alive' those of all tensors there are; 'total' of all parameters.
    """
    import train
    from model import Model
    from onetrain.distributed import layouts, processes
    from onetrain.model_config import resolve_shape
    from onetrain.training import optim

    config = train.Config(**{'block_size': 32, **options})
    world = processes.start('cpu')
    layouts.choose_layout(world, config, [])
    # an odd vocabulary and one block that holds little of the whole
    shape = resolve_shape(
        dict(
            arch_preset='gpt2',
            n_layer=3,
            n_head=4,
            n_embd=100,
            block_size=32,
            vocab_size=4099,
            bias=True,
            weight_tying=False,
        )
    )
    others = {id(t) for t in gc.get_objects() if isinstance(t, torch.Tensor)}
    model = Model.on_meta(shape, ring=world.ring)
    layouts.shard(model, world, torch.float32, torch.float32, False)
    model.allocate('cpu').init_weights(0)
    named = dict(model.named_parameters())
    updated = layouts.zero1_parameters(named, world)
    optimizer = optim.build_adamw(
        updated, learning_rate=1e-3, betas=(0.9, 0.95), weight_decay=0.1, device_type='cpu'
    )
    layouts.attach_zero1(optimizer, named, updated, world)
    step_model, train_model = layouts.wrap(model, world, False, 1)
    x = y = torch.zeros(1, len(world.ring.positions) if world.ring else 32, dtype=torch.int64)
    for step in range(3):
        with layouts.gradient_sync_context(train_model, True, world):
            train_model(x, y).backward()
        if step < 2:
            optimizer.step()
            model.zero_grad(set_to_none=True)
    gc.collect()

    def size(tensors):
        storages = {}
        for tensor in tensors:
            storage = (
                tensor.to_local() if isinstance(tensor, DTensor) else tensor
            ).untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        return sum(storages.values())

    sizes = {
        'parameters': size(named.values()),
        'gradients': size(p.grad for p in named.values()),
        'total': 4 * sum(p.numel() for p in named.values()),
        'state': size(
            tensor
            for state in optimizer.state.values()
            for key, tensor in state.items()
            if key != 'step'
        ),
        'alive': size(
            t
            for t in gc.get_objects()
            if isinstance(t, torch.Tensor) and id(t) not in others and t.device.type == 'cpu'
        ),
    }
    del model, train_model, step_model, optimizer, named, updated
    gc.collect()
    return sizes


def table(layouts, sizes=(1, 2, 4)):
    """{(layout, number of ranks): the sizes of the rank that has most}."""
    rows = {}
    for layout in layouts:
        options = {
            key.removeprefix('--'): ast.literal_eval(value)
            for key, value in (o.split('=') for o in LAYOUTS[layout])
        }
        for size in sizes:
            if size % (options.get('fsdp_replicas') or options.get('context_parallel') or 1) == 0:
                answers = ranks(size)(bytes_of_a_rank, options)
                rows[layout, size] = {
                    key: max(answer[key] for answer in answers) for key in answers[0]
                }
    return rows


@pytest.mark.parametrize('layout', LAYOUTS)
def test_a_rank_holds_its_share(layout):
    for (_, size), row in table([layout], sizes=(2, 4)).items():
        group = size // 2 if layout == 'hybrid' else size
        shares = {'DDP': (1, 1, 1), 'context': (1, 1, 1), 'ZeRO-1': (1, 1, group)}.get(
            layout, (group, group, group)
        )
        for part, share, whole in zip(PARTS, shares, (1, 1, 2)):
            assert row[part] == pytest.approx(row['total'] * whole / share, rel=0.05), (size, part)
        # nothing else of that size is alive: buckets of DDP are the gradients, gathered parameters
        # are given back
        assert row['alive'] <= 1.1 * sum(row[part] for part in PARTS), (size, row)


def kept(activation_checkpointing):
    """Bytes that a forward pass leaves alive for the backward pass."""
    from torch.distributed._tools.mem_tracker import MemTracker

    from model import Model
    from onetrain.model_config import resolve_shape

    model = Model(
        resolve_shape(
            dict(
                arch_preset='llama3',
                n_layer=6,
                n_head=4,
                n_embd=64,
                num_key_value_heads=2,
                block_size=128,
                vocab_size=64,
            )
        ),
        activation_checkpointing=activation_checkpointing,
    )
    model.init_weights(0)
    x = torch.zeros(2, 128, dtype=torch.int64)
    with MemTracker() as tracker:
        loss = model(x, x)
        alive = tracker.get_tracker_snapshot('current')[torch.device('cpu')]['Total']
        loss.backward()
    return alive - sum(p.nbytes for p in model.parameters())


def test_activation_checkpointing_keeps_less():
    none, selective, full = (kept(kind) for kind in ('none', 'selective', 'full'))
    inputs = 6 * 2 * 128 * 64 * 4  # of six blocks
    assert full < selective < 0.7 * none and full < 0.3 * none and full < 2.5 * inputs, (
        none,
        selective,
        full,
        inputs,
    )
