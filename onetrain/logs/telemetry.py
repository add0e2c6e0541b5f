"""What the machine does while a run trains: gpu_metrics.jsonl in the folder of the run.

Every `interval` seconds a line for each GPU,

    {time, gpu, utilization_percent, memory_used_gb, memory_total_gb, temperature_c, power_w,
     sm_clock_mhz, throttle}

and one for the machine,

    {time, machine, cpu_percent, memory_used_gb, memory_total_gb, disk_free_gb,
     received_mb_per_sec, sent_mb_per_sec, energy_kwh}

with gigabytes of 1e9 bytes, throttle a list of reasons or null, and energy_kwh what the GPUs have
taken since the run began. nvidia-ml-py is asked where it is installed, else nvidia-smi. A thread of
each machine writes; a machine that is not that of rank 0 writes to gpu_metrics_N.jsonl.
"""

import contextlib
import csv
import datetime
import io
import json
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from typing import Any

from onetrain.files import no_link

# bits of the reasons for which a GPU lowers its clock, as NVML numbers them; idleness and clocks
# that somebody set are none
_THROTTLE = {
    0x4: 'power limit',
    0x8: 'hardware slowdown',
    0x20: 'temperature',
    0x40: 'temperature (hardware)',
    0x80: 'power brake',
}
_QUERY = (
    'index,utilization.gpu,memory.used,memory.total,temperature.gpu,power.draw,clocks.sm,'
    'clocks_throttle_reasons.active'
)
TIMEOUT_S = 20  # for an answer of nvidia-smi
_LAST_BYTES = 2**16  # of a file in which its last line is looked for


def metrics_name(machine: int = 0) -> str:
    """Return the name of the file of a machine, numbered from that of rank 0."""
    return f'gpu_metrics_{machine}.jsonl' if machine else 'gpu_metrics.jsonl'


class Telemetry:
    """Thread that appends lines about this machine to a file.

    path: of the file; interval: seconds between lines, 0 writes none; gpus: numbers, as nvidia-smi
    counts, of the GPUs that this machine's processes use; say: called with one sentence where it
    cannot go on; resumed: whether the energy of the lines that are there is of this run.

    look: a function that is called with the lines of each moment, None for none.
    """

    def __init__(
        self, path: str, interval: float, gpus: list[int], say: Callable, resumed: bool = False
    ):
        self.look: Callable | None = None
        self.path, self.interval, self.gpus, self.say = path, interval, gpus, say
        self.ended = threading.Event()
        self.thread: threading.Thread | None = None
        self.energy_kwh = last_energy(path) if resumed else 0.0

    def start(self) -> None:
        """Begin to write, from one interval on."""
        if self.interval:
            self.thread = threading.Thread(target=self._run, daemon=True, name='telemetry')
            self.thread.start()

    def close(self) -> None:
        """End the thread, but do not wait for a GPU that does not answer."""
        self.ended.set()
        if self.thread is not None:
            self.thread.join(timeout=1.0)

    def _run(self):
        try:
            read_gpus = gpu_reader(self.gpus) if self.gpus else None
            before = machine_counters()
            while not self.ended.wait(self.interval):
                now = machine_counters()
                lines = self._sample(read_gpus, before, now)
                before = now
                text = ''.join(json.dumps(line) + '\n' for line in lines)
                with open(self.path, 'a', encoding='utf-8', opener=no_link) as f:
                    f.write(text)
                if self.look:
                    self.look(lines)
        except Exception as error:  # whatever a driver or a file system may say
            if not self.ended.is_set():
                reason = ' '.join(str(error).split())[:150]
                self.say(
                    f'{os.path.basename(self.path)} is not written any longer'
                    f' ({type(error).__name__}: {reason})'
                )

    def _sample(self, read_gpus, before, now):
        """Return the lines of this moment."""
        moment = datetime.datetime.now().astimezone().isoformat(timespec='seconds')
        gpus = read_gpus() if read_gpus else []
        seconds = now['time'] - before['time']
        self.energy_kwh += sum(gpu['power_w'] or 0.0 for gpu in gpus) * seconds / 3.6e6
        disk = shutil.disk_usage(os.path.dirname(self.path) or '.')
        machine = {
            'time': moment,
            'machine': os.uname().nodename,
            **machine_rates(before, now),
            'disk_free_gb': disk.free / 1e9,
            'energy_kwh': self.energy_kwh if gpus else None,
        }
        return [{'time': moment, **gpu} for gpu in gpus] + [machine]


def machine_counters() -> dict[str, float]:
    """Return what /proc counts since the start: seconds of the processors, busy and in all, bytes
    received and sent by all networks but the loopback; and bytes of memory, used and in all.
    """
    with open('/proc/stat') as f:
        ticks = [int(word) for word in f.readline().split()[1:9]]
    with open('/proc/meminfo') as f:
        memory = {line.split(':')[0]: 1024 * int(line.split()[1]) for line in f}
    received = sent = 0
    with contextlib.suppress(OSError), open('/proc/net/dev') as f:
        for line in f.readlines()[2:]:
            name, _, numbers = line.partition(':')
            if name.strip() != 'lo':
                received += int(numbers.split()[0])
                sent += int(numbers.split()[8])
    return {
        'time': time.monotonic(),
        'busy': sum(ticks) - ticks[3] - ticks[4],  # all but idle and waiting for a disk
        'ticks': sum(ticks),
        'received': received,
        'sent': sent,
        'memory_used': memory['MemTotal'] - memory['MemAvailable'],
        'memory_total': memory['MemTotal'],
    }


def machine_rates(before: dict[str, float], now: dict[str, float]) -> dict[str, float | None]:
    """Return what the machine did between two results of machine_counters()."""
    seconds, ticks = now['time'] - before['time'], now['ticks'] - before['ticks']
    rates = {
        name: (now[name] - before[name]) / seconds / 1e6 if seconds > 0 else None
        for name in ('received', 'sent')
    }
    return {
        'cpu_percent': 100 * (now['busy'] - before['busy']) / ticks if ticks > 0 else None,
        'memory_used_gb': now['memory_used'] / 1e9,
        'memory_total_gb': now['memory_total'] / 1e9,
        'received_mb_per_sec': rates['received'],
        'sent_mb_per_sec': rates['sent'],
    }


def gpu_reader(gpus: list[int]) -> Callable:
    """Return a function that gives the lines of these GPUs without their time."""
    try:
        import pynvml

        pynvml.nvmlInit()
        handles = {gpu: pynvml.nvmlDeviceGetHandleByIndex(gpu) for gpu in gpus}
    except Exception:  # the package is not there, or does not fit the driver
        return lambda: read_nvidia_smi(gpus)
    return lambda: [_read_nvml(pynvml, gpu, handle) for gpu, handle in handles.items()]


def _read_nvml(nvml: Any, gpu: int, handle: Any) -> dict:
    def ask(function, *args):
        try:
            return function(handle, *args)
        except nvml.NVMLError:  # what this GPU does not tell
            return None

    memory = ask(nvml.nvmlDeviceGetMemoryInfo)
    power = ask(nvml.nvmlDeviceGetPowerUsage)  # mW
    rates = ask(nvml.nvmlDeviceGetUtilizationRates)
    return {
        'gpu': gpu,
        'utilization_percent': None if rates is None else rates.gpu,
        'memory_used_gb': memory and memory.used / 1e9,
        'memory_total_gb': memory and memory.total / 1e9,
        'temperature_c': ask(nvml.nvmlDeviceGetTemperature, nvml.NVML_TEMPERATURE_GPU),
        'power_w': None if power is None else power / 1e3,
        'sm_clock_mhz': ask(nvml.nvmlDeviceGetClockInfo, nvml.NVML_CLOCK_SM),
        'throttle': throttle_reasons(ask(nvml.nvmlDeviceGetCurrentClocksThrottleReasons)),
    }


def read_nvidia_smi(gpus: list[int]) -> list[dict]:
    """Return the lines of these GPUs without their time, as nvidia-smi tells them."""
    text = subprocess.run(
        ['nvidia-smi', f'--query-gpu={_QUERY}', '--format=csv,noheader,nounits'],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=True,
    ).stdout
    lines = []
    for row in csv.reader(io.StringIO(text), skipinitialspace=True):
        index, *rest = row
        if int(index) not in gpus:
            continue
        used, used_mib, total_mib, temperature, power, clock = map(_number, rest[:6])
        mask = rest[6].strip()
        lines.append(
            {
                'gpu': int(index),
                'utilization_percent': used,
                'memory_used_gb': used_mib and used_mib * 2**20 / 1e9,
                'memory_total_gb': total_mib and total_mib * 2**20 / 1e9,
                'temperature_c': temperature,
                'power_w': power,
                'sm_clock_mhz': clock,
                'throttle': throttle_reasons(int(mask, 16) if mask.startswith('0x') else None),
            }
        )
    return lines


def _number(text):
    """Return a number, None for what is not told, such as [N/A]."""
    try:
        return float(text)
    except ValueError:
        return None


def throttle_reasons(mask: int | None) -> list[str] | None:
    """Return why a GPU has lowered its clock, None where it has not."""
    return [name for bit, name in _THROTTLE.items() if mask & bit] or None if mask else None


def last_energy(path: str) -> float:
    """Return the last energy_kwh that is in a file, 0 where there is none: a resumed run goes on
    counting.
    """
    with contextlib.suppress(OSError), open(path, 'rb') as f:
        f.seek(max(0, os.path.getsize(path) - _LAST_BYTES))
        for line in reversed(f.read().splitlines()):
            with contextlib.suppress(ValueError, AttributeError):
                energy = json.loads(line).get('energy_kwh')
                if isinstance(energy, (int, float)) and 0 <= energy < 1e9:
                    return energy
    return 0.0
