"""What every part of a run works with: its ranks, its terminal and log, requests to stop."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from onetrain.distributed.collectives import Agreement

if TYPE_CHECKING:
    from onetrain.distributed.processes import World
    from onetrain.logs.run_log import RunLog
    from onetrain.logs.telemetry import Telemetry
    from onetrain.logs.terminal import Terminal
    from onetrain.signals import StopRequest


@dataclass
class Session:
    """world: the ranks and this one's device; stop: requests to stop; notes: fallbacks and changes,
    for the report; agreement: of the ranks on whether to stop; log: from open_log() on; telemetry:
    of one process of each machine.
    """

    world: 'World'
    stop: 'StopRequest'
    terminal: 'Terminal'
    notes: list[str] = field(default_factory=list)
    agreement: Agreement = field(init=False)
    log: 'RunLog' = field(init=False)
    telemetry: 'Telemetry | None' = None

    def __post_init__(self):
        self.agreement = Agreement(self.world)
