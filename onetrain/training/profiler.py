"""A trace of some iterations, for https://ui.perfetto.dev or chrome://tracing."""

import os
import re
from collections.abc import Callable

import torch

from onetrain.config import UserError
from onetrain.files import check_own

MOST_ITERATIONS = 100  # a trace of more takes gigabytes


def parse_profile(text: str | None) -> tuple[int, int] | None:
    """Return the first and the last iteration of the key `profile`, such as '100:103'. Raises
    UserError.
    """
    if text is None:
        return None
    match = re.fullmatch(r'(\d{1,12})(?::(\d{1,12}))?', text)
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= first <= last:
        raise UserError(
            f'profile={text!r}: type the first and the last iteration to trace, such as'
            ' --profile=100:103'
        )
    if last - first >= MOST_ITERATIONS:
        raise UserError(f'profile={text!r}: a trace has at most {MOST_ITERATIONS} iterations')
    return first, last


class Profiler:
    """Traces the iterations of the key `profile` (None: none) into profile_FIRST_LAST.json in
    `folder`. say: told where the trace is.
    """

    def __init__(self, profile: str | None, folder: str, say: Callable):
        self.span, self.folder, self.say = parse_profile(profile), folder, say
        self.step = 0
        self.tracing: torch.profiler.profile | None = None

    def after(self, step: int) -> None:
        """Take up that iteration `step` is done, or that the run begins after it."""
        if self.span is None:
            return
        first, last = self.span
        self.step = step
        if step == first - 1:
            self.tracing = torch.profiler.profile(record_shapes=True)
            self.tracing.start()
        elif step == last:
            self.close()

    def close(self) -> None:
        """Write the trace, if one is under way, with the iterations that there were."""
        if self.tracing is None or self.span is None:
            return
        self.tracing.stop()
        path = os.path.join(self.folder, f'profile_{self.span[0]}_{self.step}.json')
        check_own(path)
        self.tracing.export_chrome_trace(path)
        self.tracing = None
        self.say(f'wrote the trace {path}: open it at https://ui.perfetto.dev')
