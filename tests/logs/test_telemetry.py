"""Proves what gpu_metrics.jsonl says, with stand-ins for NVML and nvidia-smi, that it never stops a
run, and what a run costs.
"""

import json
import os
import sys
import time
import types

import pytest
from conftest import records, run_train

from onetrain.logs import telemetry
from onetrain.logs.run_json import parse_record
from onetrain.training.iteration_log import costs

NVIDIA_SMI = """#!/bin/sh
echo "0, 97, 40000, 81559, 61, 512.30, 1980, 0x0000000000000004"
echo "1, 12, 1024, 81559, 40, [N/A], 345, 0x0000000000000001"
echo "2, 50, 2048, 81559, 40, 100.00, 345, [N/A]"
"""


def lines_of(path):
    # the last line may be under way
    return [json.loads(line) for line in open(path).read().split('\n')[:-1]]


def sampled(path, gpus, **options):
    """(lines, what was said) of a thread that writes at least two samples, or gives up."""
    said, before = [], len(lines_of(path)) if os.path.exists(path) else 0
    thread = telemetry.Telemetry(str(path), 0.2, gpus, said.append, **options)
    thread.start()
    until = time.monotonic() + 30
    while not said and time.monotonic() < until:
        time.sleep(0.05)
        if os.path.exists(path) and len(lines_of(path)) >= before + 2 * (len(gpus) + 1):
            break
    thread.close()
    return lines_of(path) if os.path.exists(path) else [], said


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """nvidia_smi(text): a program of that name, and no NVML."""
    monkeypatch.setitem(sys.modules, 'pynvml', None)
    monkeypatch.setenv('PATH', str(tmp_path / 'bin'), prepend=':')
    (tmp_path / 'bin').mkdir()

    def write(text):
        (tmp_path / 'bin' / 'nvidia-smi').write_text(text)
        (tmp_path / 'bin' / 'nvidia-smi').chmod(0o755)

    write(NVIDIA_SMI)
    return write


def test_a_line_for_each_gpu_and_one_for_the_machine(tmp_path, nvidia_smi):
    lines, said = sampled(tmp_path / 'gpu_metrics.jsonl', [0, 1])
    assert not said and len(lines) >= 6
    first, second, machine = lines[:3]
    assert {key: first[key] for key in first if key != 'time'} == {
        'gpu': 0,
        'utilization_percent': 97,
        'memory_used_gb': 40000 * 2**20 / 1e9,
        'memory_total_gb': 81559 * 2**20 / 1e9,
        'temperature_c': 61,
        'power_w': 512.3,
        'sm_clock_mhz': 1980,
        'throttle': ['power limit'],
    }
    assert (second['gpu'], second['power_w'], second['throttle']) == (1, None, None)
    assert 0 <= machine['cpu_percent'] <= 100
    assert 0 < machine['memory_used_gb'] < machine['memory_total_gb']
    assert machine['disk_free_gb'] > 0 and machine['received_mb_per_sec'] >= 0
    energies = [line['energy_kwh'] for line in lines if 'machine' in line]
    # 512.3 W for 0.2 s, or longer on a busy machine
    assert 0.9 * 512.3 * 0.2 / 3.6e6 < energies[0] < 30 * 512.3 * 0.2 / 3.6e6
    assert energies == sorted(energies)
    again, _ = sampled(tmp_path / 'gpu_metrics.jsonl', [0], resumed=True)
    assert again[len(lines) + 1]['energy_kwh'] > energies[-1]
    anew, _ = sampled(tmp_path / 'gpu_metrics.jsonl', [0])
    assert anew[len(again) + 1]['energy_kwh'] < again[-1]['energy_kwh']


def test_nvml_is_asked_where_it_is_there(tmp_path, monkeypatch):
    error = type('NVMLError', (Exception,), {})

    def refuse(handle):
        raise error('not supported')

    stand_in = types.SimpleNamespace(
        NVMLError=error,
        NVML_TEMPERATURE_GPU=0,
        NVML_CLOCK_SM=1,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByIndex=lambda gpu: f'handle {gpu}',
        nvmlDeviceGetMemoryInfo=lambda handle: types.SimpleNamespace(used=4e10, total=8e10),
        nvmlDeviceGetPowerUsage=lambda handle: 500000,
        nvmlDeviceGetUtilizationRates=lambda handle: types.SimpleNamespace(gpu=88),
        nvmlDeviceGetTemperature=lambda handle, sensor: 50,
        nvmlDeviceGetClockInfo=refuse,
        nvmlDeviceGetCurrentClocksThrottleReasons=lambda handle: 0x60,
    )
    stand_in.nvmlDeviceGetClockInfo = lambda handle, kind: refuse(handle)
    monkeypatch.setitem(sys.modules, 'pynvml', stand_in)
    (line,) = telemetry.gpu_reader([3])()
    assert line == {
        'gpu': 3,
        'utilization_percent': 88,
        'memory_used_gb': 40.0,
        'memory_total_gb': 80.0,
        'temperature_c': 50,
        'power_w': 500.0,
        'sm_clock_mhz': None,
        'throttle': ['temperature', 'temperature (hardware)'],
    }


@pytest.mark.parametrize('text', ['#!/bin/sh\nexit 9\n', '#!/bin/sh\necho nonsense\n', None])
def test_it_ends_with_one_sentence(tmp_path, nvidia_smi, text):
    nvidia_smi(text or NVIDIA_SMI)
    if text is None:
        os.remove(tmp_path / 'bin' / 'nvidia-smi')
    lines, said = sampled(tmp_path / 'gpu_metrics.jsonl', [0])
    assert not lines and len(said) == 1 and 'is not written any longer' in said[0]


def test_a_link_is_not_followed(tmp_path):
    (tmp_path / 'other').write_text('mine')
    os.symlink(tmp_path / 'other', tmp_path / 'gpu_metrics.jsonl')
    thread = telemetry.Telemetry(str(tmp_path / 'gpu_metrics.jsonl'), 0.1, [], lambda text: None)
    thread.start()
    thread.thread.join(timeout=20)  # it gives up
    thread.close()
    assert (tmp_path / 'other').read_text() == 'mine'


def test_a_run_writes_it_and_says_what_it_costs(dataset, tmp_path, capsys):
    words = '--telemetry_interval=0.01', '--price_per_hour=7200'
    assert run_train(dataset, tmp_path, *words, '--max_iters=6') == 0
    shown = capsys.readouterr().out
    assert '$7,200.00 an hour' in shown
    assert [line for line in lines_of(tmp_path / 'gpu_metrics.jsonl') if 'cpu_percent' in line]
    before = records(tmp_path)
    for record in before:
        assert record['cost'] == pytest.approx(2 * record['wall_s'])
    assert before[-1]['left_s'] == 0 and before[0]['left_s'] is None
    assert before[3]['cost_total'] == pytest.approx(2 * (before[3]['wall_s'] + before[3]['left_s']))
    resume = '--init_from=resume', '--max_iters=8'
    assert run_train(dataset, tmp_path, *words, *resume) == 0
    after = records(tmp_path)
    assert [record['iter'] for record in after] == list(range(1, 9))
    assert after[6]['cost'] > before[5]['cost']  # of both together
    # what is made again was paid for all the same
    back = '--init_from=resume', '--resume_from=6', '--max_iters=7'
    assert run_train(dataset, tmp_path, *words, *back) == 0
    assert records(tmp_path)[-1]['iter'] == 7
    assert records(tmp_path)[-1]['cost'] > after[7]['cost']
    assert run_train(dataset, tmp_path / 'b', '--max_iters=2', '--telemetry_interval=0') == 0
    assert not os.path.exists(tmp_path / 'b' / 'gpu_metrics.jsonl')
    assert all('cost' not in record for record in records(tmp_path / 'b'))


def test_costs():
    assert costs(0.0, 100.0, 5.0) == {}
    assert costs(36.0, 100.0, None) == {'cost': 1.0, 'cost_total': None}
    assert costs(36.0, 100.0, 100.0) == {'cost': 1.0, 'cost_total': 2.0}
    assert costs(36.0, 200.0, 100.0, 5.0, 100.0) == {'cost': 6.0, 'cost_total': 7.0}


def test_names_of_files():
    assert [telemetry.metrics_name(n) for n in (0, 2)] == [
        'gpu_metrics.jsonl',
        'gpu_metrics_2.jsonl',
    ]
    assert parse_record(b'{"gpu": 1}') is None  # no record of a run's log


def test_a_sample_takes_little():
    """0.1 % of a step would be 10 ms in 10 s."""
    durations = []
    for _ in range(20):
        began = time.thread_time()
        before = telemetry.machine_counters()
        telemetry.machine_rates(before, before)
        durations.append(time.thread_time() - began)
    assert sorted(durations)[10] < 0.01
