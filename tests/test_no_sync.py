"""A step takes nothing from the device: numbers are fetched at log points only."""
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode


class CountFetches(TorchDispatchMode):
    """Counts the operator behind .item(), float(tensor), bool(tensor) and the like."""
    fetches = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.fetches += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize('options', [[], ['--arch_preset=qwen3', '--dropout=0.1', '--gradient_accumulation_steps=2']])
def test_fetches_do_not_grow_with_the_steps_between_log_points(train, tmp_path, options):
    counts = []
    for iterations in (10, 40):
        with CountFetches() as counter:
            assert train(tmp_path / str(iterations), f'--max_iters={iterations}', '--log_interval=1000', '--eval_interval=1000', *options) == 0
        counts.append(counter.fetches)
    # logged are the first iteration and the last, evaluated is once
    assert counts[0] == counts[1] and counts[0] > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_on_a_gpu_a_step_does_not_wait(train, tmp_path):
    torch.cuda.set_sync_debug_mode('warn')
    try:
        with pytest.warns(UserWarning) as few:
            assert train(tmp_path / 'few', '--max_iters=10', '--log_interval=1000', '--eval_interval=1000', '--device=cuda') == 0
        with pytest.warns(UserWarning) as many:
            assert train(tmp_path / 'many', '--max_iters=40', '--log_interval=1000', '--eval_interval=1000', '--device=cuda') == 0
    finally:
        torch.cuda.set_sync_debug_mode('default')
    assert len(few) == len(many)
