"""Warn of what goes wrong while a run trains: once each, in its log, on the terminal, and at a URL.

terminal and .log   WARNING: a sentence
.jsonl              {"type": "warning", "iter", "what", "text", "timestamp"}
--notify=URL        a POST of {"run", "what", "text", "iter", "time"}, also when the run ends and
                    when a checkpoint cannot be saved
"""

import contextlib
import json
import math
import shutil
import statistics
import threading
import urllib.request
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from onetrain.files import redact
from onetrain.logs.read_log import number
from onetrain.logs.run_log import now

if TYPE_CHECKING:
    from onetrain.logs.run_log import RunLog

NORM, NORM_FOR_LONG = 10.0, 5.0
BACK = 5000  # iterations between the losses that are compared
OVER = 100  # iterations that their medians are over
GAP = 0.3  # nats by which validation may be above training
NOISE = 6  # standard errors by which it must have risen
DATA_WAIT = 0.05  # of the time of an iteration
LONG = 20  # logged iterations after which something is no accident
LEAST_UTILIZATION = 85.0  # percent
SAMPLES = 6  # lines of a GPU after which something is no accident: a minute
POST_TIMEOUT_S = 10


class Alerts:
    """Looks at the records of a run, as RunLog hands them to its sinks, and at its telemetry.

    run_name, folder: of the run; max_iters: at which it is finished; url: to notify, None for none;
    checkpoint_bytes: size of one; slow_path(): a phrase on the slowest link between its GPUs, None
    where none is known.
    """

    def __init__(
        self,
        log: 'RunLog',
        run_name: str,
        folder: str,
        *,
        max_iters: int,
        url: str | None = None,
        checkpoint_bytes: int = 0,
        slow_path: Callable = lambda: None,
    ):
        self.log, self.run_name, self.folder, self.url = log, run_name, folder, url
        self.max_iters, self.checkpoint_bytes = max_iters, checkpoint_bytes
        self.slow_path = slow_path
        self.step, self.warned = 0, set()
        self.losses: deque[tuple[int, float]] = deque()  # (iteration, loss) of the last BACK + OVER
        self.norms: deque[float] = deque(maxlen=LONG)
        self.data_waits: deque[float] = deque(maxlen=LONG)
        self.comm_waits: deque[float] = deque(maxlen=LONG)
        self.gap = math.inf
        self.gpus: dict[int, deque[dict]] = {}
        self.posts: list[threading.Thread] = []
        self.lock = threading.Lock()  # telemetry comes from a thread of its own

    def sink(self, kind: str, record: dict) -> None:
        """Look at a record of the log."""
        if kind == 'iter':
            self.step = record['iter']
            self._look_at_norm(record)
            self._look_at_loss(record)
            self._look_at_waits(record)
        elif kind == 'eval':
            self._look_at_gap(record)
        elif kind == 'save_failed':
            self.post('save failed', f'checkpoint not saved: {record.get("error")}')
        elif kind == 'end':
            done = self.step >= self.max_iters
            self.post('finished' if done else 'stopped', f'at iteration {self.step:,}')
        elif kind == 'close':
            for post in self.posts:
                post.join(POST_TIMEOUT_S)

    def warn(self, what: str, text: str) -> None:
        """Warn, unless of this was warned before."""
        with self.lock:
            if what in self.warned:
                return
            self.warned.add(what)
        self.log.say(f'WARNING: {text}')
        self.log.event('warning', iter=self.step, what=what, text=text, timestamp=now())
        self.post(what, text)

    def post(self, what: str, text: str) -> None:
        """Send a notice to the URL, if there is one, without waiting for it."""
        if not self.url:
            return
        notice = {'run': self.run_name, 'what': what, 'text': redact(text), 'iter': self.step}
        body = json.dumps({**notice, 'time': now()}).encode()
        thread = threading.Thread(target=self._send, args=(body,), daemon=True, name='notice')
        thread.start()
        self.posts = [post for post in self.posts if post.is_alive()] + [thread]

    def _send(self, body):
        headers = {'Content-Type': 'application/json', 'User-Agent': 'onetrain'}
        try:
            request = urllib.request.Request(self.url, body, headers)
            with urllib.request.urlopen(request, timeout=POST_TIMEOUT_S):
                pass
        except Exception as error:  # whatever a network may do
            with self.lock:
                told = 'notify' in self.warned
                self.warned.add('notify')
            if not told:
                reason = redact(' '.join(str(error).split())[:150])
                self.log.say(f'WARNING: a notice could not be sent to notify ({reason})')

    def _look_at_norm(self, record):
        gradients = record.get('gradients')
        norm = number(gradients.get('global_norm')) if isinstance(gradients, dict) else math.nan
        if norm != norm:
            return
        self.norms.append(norm)
        if norm > NORM and self.step > OVER:  # it is large at the beginning
            self.warn('gradient norm', f'the gradient norm is {norm:.3g}, above {NORM:g}')
        if len(self.norms) == LONG and min(self.norms) > NORM_FOR_LONG and self.step > OVER:
            self.warn(
                'gradient norm for long',
                f'the gradient norm has been above {NORM_FOR_LONG:g} in the last {LONG} logged'
                ' iterations: a lower --learning_rate or a longer --warmup_iters calms it',
            )

    def _look_at_loss(self, record):
        loss = number(record.get('loss'))
        if loss != loss:
            return
        self.losses.append((self.step, loss))
        while self.losses[0][0] < self.step - BACK - OVER:
            self.losses.popleft()
        if self.losses[0][0] > self.step - BACK:
            return
        before = [value for step, value in self.losses if step <= self.step - BACK]
        lately = [value for step, value in self.losses if step > self.step - OVER]
        if len(before) < 3 or len(lately) < 3:
            return
        # by more than the medians of so few losses differ by chance, in ten thousand looks
        noise = 1.25 * math.hypot(
            *(statistics.stdev(values) / len(values) ** 0.5 for values in (before, lately))
        )
        was, is_now = statistics.median(before), statistics.median(lately)
        if is_now > was + NOISE * noise:
            self.warn(
                'loss rises',
                f'the loss is {is_now:.4f}, and {BACK:,} iterations ago it was {was:.4f} (medians):'
                ' look at the gradient norm and at the data, or resume from an older checkpoint'
                ' with --resume_from',
            )

    def _look_at_waits(self, record):
        time_ms = number(record.get('time_ms'))
        for waits, key in ((self.data_waits, 'data_wait_ms'), (self.comm_waits, 'comm_wait_ms')):
            wait = number(record.get(key))
            if wait == wait and time_ms > 0:
                waits.append(wait / time_ms)
        share = statistics.median(self.data_waits) if len(self.data_waits) == LONG else 0.0
        if share > DATA_WAIT:
            self.warn(
                'data wait',
                f'{100 * share:.0f} % of an iteration wait for data: --use_dataloader=True reads'
                ' ahead in processes, and a copy of the data on a local disk is faster',
            )
        share = statistics.median(self.comm_waits) if len(self.comm_waits) == LONG else 0.0
        if share > 0.5:
            alone = 1000 / (time_ms * (1 - share))
            slow = None if 'gradients wait' in self.warned else self.slow_path()
            path = f' ({slow})' if slow else ''
            self.warn(
                'gradients wait',
                f'{100 * share:.0f} % of an iteration wait for gradients{path}: one GPU alone would'
                f' do about {alone:.3g} iterations a second; a larger --total_batch_size makes'
                ' exchanges rarer',
            )

    def _look_at_gap(self, record):
        gap = number(record.get('val_loss')) - number(record.get('train_loss'))
        if gap > GAP and gap > self.gap:
            self.warn(
                'overfitting',
                f'the validation loss is {gap:.2f} above the training loss, and the gap grows: more'
                ' data, --dropout or fewer epochs keep them together',
            )
        self.gap = gap if gap == gap else self.gap

    def look_at_machine(self, lines: list[dict]) -> None:
        """Look at the lines of gpu_metrics.jsonl of one moment."""
        for line in lines:
            if 'gpu' in line:
                self.gpus.setdefault(line['gpu'], deque(maxlen=SAMPLES)).append(line)
        for gpu, lately in self.gpus.items():
            if len(lately) < SAMPLES or not self.step:
                continue
            used = [number(line.get('utilization_percent')) for line in lately]
            used = [value for value in used if value == value]
            if used and (median := statistics.median(used)) < LEAST_UTILIZATION:
                self.warn(
                    'utilization',
                    f'GPU {gpu} is busy {median:.0f} % of the time: a larger --batch_size,'
                    ' --compile=True or --use_cuda_graphs=True keep it busy',
                )
            if all(line.get('throttle') for line in lately):
                reasons = ', '.join(lately[-1]['throttle'])
                self.warn('throttling', f'GPU {gpu} has lowered its clock: {reasons}')
        with contextlib.suppress(OSError):
            free = shutil.disk_usage(self.folder).free
            if free < 2 * self.checkpoint_bytes:
                self.warn(
                    'disk',
                    f'{free / 1e9:.1f} GB of disk are free, less than two checkpoints of'
                    f' {self.checkpoint_bytes / 1e9:.1f} GB: make room, or keep fewer with'
                    ' --keep_checkpoints',
                )
