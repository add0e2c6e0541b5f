"""Name the process that the others wait for.

All ranks take a step in the same time, that of the slowest: it is the one that waits least for the
gradients of others, or, where that is not measured (FSDP, CUDA graphs), the one that waits longest
for its data.
"""

import collections
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING

from onetrain.distributed import collectives

if TYPE_CHECKING:
    from onetrain.distributed.processes import World

LATELY = 10  # logged iterations, of which one rank must be the slowest in all but one
SHARE = 0.1  # of the time of an iteration that the others wait at least


class Stragglers:
    """Watches the ranks of a run; say: function of a line of text."""

    def __init__(self, world: 'World', say: Callable):
        self.world, self.say = world, say
        self.hosts = collectives.all_gather_objects(socket.gethostname(), world)
        self.lately, self.named = collections.deque(maxlen=LATELY), set()

    def of(self, table: dict[str, list], seconds: float) -> dict:
        """Return {'slowest_rank': number, 'slowest_rank_wait_ms': how long others wait for it}.

        It is {} for one process. table: {name: list of the ranks' values} of one logged iteration;
        seconds: that an iteration took. Says it in the log,
        once for each rank, where one is the slowest again and again.
        """
        if self.world.size == 1:
            return {}
        waits = table.get('comm_wait_s')
        late = (
            [max(waits) - wait for wait in waits]
            if waits
            else [wait - min(table['data_wait_s']) for wait in table['data_wait_s']]
        )
        rank = max(range(len(late)), key=late.__getitem__)
        self.lately.append((rank, late[rank]))
        again = [wait for other, wait in self.lately if other == rank and wait >= SHARE * seconds]
        if len(again) >= LATELY - 1 and rank not in self.named:
            self.named.add(rank)
            self.say(
                f'rank {rank} on {self.hosts[rank]} is the slowest: the others wait '
                f'{1000 * sorted(again)[len(again) // 2]:.1f} ms '
                f'of the {1000 * seconds:.1f} ms of an iteration for it'
                + ('' if waits else ', which waits for its data')
            )
        return {'slowest_rank': rank, 'slowest_rank_wait_ms': 1000 * late[rank]}
