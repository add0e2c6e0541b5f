"""Copy a checkpoint by all machines of a job, each the files that its own processes wrote.

The main rank asks for each copy through the store where the processes met. The first process of
every other machine answers when its files are there, or says why they are not. All of it happens in
threads that training does not wait for.
"""

import bisect
import contextlib
import json
import re
import secrets
import threading
import time
from typing import TYPE_CHECKING

import torch.distributed as dist

from onetrain.checkpoint.store import LOCAL
from onetrain.checkpoint.uploader import copy_files
from onetrain.distributed import collectives, processes
from onetrain.files import open_url

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

    from onetrain.distributed.processes import World

POLL_S = 0.2
PATIENCE_S = 600.0  # after which the main rank copies what another machine did not


class Machines:
    """The machines of a job, as the first process of each sees them.

    url: whose file system the copies go to. Every rank makes one together; the main rank calls
    copy(), the first process of each other machine serve().
    """

    def __init__(self, world: 'World', url: str):
        local_ranks = collectives.all_gather_objects(world.local_rank, world)
        self.firsts = [rank for rank, local in enumerate(local_ranks) if local == 0]
        self.mine = bisect.bisect(self.firsts, world.rank) - 1
        self.url = url
        self.to_fs: AbstractFileSystem = None  # file system of the url, once it is needed
        self.asked, self.closed = 0, threading.Event()
        name = collectives.broadcast_from_main(lambda: f'copies {secrets.token_hex(4)}', world)
        # a connection of its own: a thread uses it
        self.store = (
            dist.PrefixStore(name, processes.rendezvous_store().clone())
            if self.firsts[1:]
            else None
        )

    def owner(self, name: str) -> int:
        """Return the number of the machine that copies the file `name`: a rank of it wrote that."""
        match = re.match(r'__(\d+)_\d+\.distcp$', name)
        return bisect.bisect(self.firsts, int(match[1])) - 1 if match else 0

    def _copy_share(self, here, there, files):
        self.to_fs = self.to_fs or open_url(self.url)[0]
        mine = {name: entry for name, entry in files.items() if self.owner(name) == self.mine}
        copy_files(LOCAL, here, self.to_fs, there, mine)

    def copy(self, here: str, there: str, files: dict[str, dict]) -> None:
        """Copy `files` of a checkpoint from the folder `here` to `there`, with the other machines.

        files: {name: entry of the manifest}. What is not there in the end, as this machine sees it,
        is copied by it. Raises ValueError with the reason of one that failed,
        and what copy_files() raises.
        """
        self.asked += 1
        if self.store is not None:
            self.store.set(f'ask {self.asked}', json.dumps([here, there, files]))
        self._copy_share(here, there, files)
        if self.store is None:
            return
        last = time.monotonic() + PATIENCE_S
        for machine in range(1, len(self.firsts)):
            key = f'answer {self.asked} {machine}'
            while not (answered := self.store.check([key])) and time.monotonic() < last:
                time.sleep(POLL_S)
            if answered and (reason := self.store.get(key).decode()):
                raise ValueError(reason)
        # a folder may be another one there, and a machine that does not answer has copied nothing
        self.to_fs.invalidate_cache()
        missing = {
            name: entry
            for name, entry in files.items()
            if not self.to_fs.isfile(f'{there}/{name}')
            or self.to_fs.size(f'{there}/{name}') != entry['size']
        }
        copy_files(LOCAL, here, self.to_fs, there, missing)

    def serve(self) -> None:
        """Begin to copy this machine's share whenever the main rank asks, until close()."""
        threading.Thread(target=self._serve, daemon=True, name='copies').start()

    def _serve(self):
        while not self.closed.wait(POLL_S):
            with contextlib.suppress(dist.DistError):  # the main rank may have gone, with the store
                if not self.store.check([key := f'ask {self.asked + 1}']):
                    continue
                here, there, files = json.loads(self.store.get(key))
                self.asked += 1
                try:
                    self._copy_share(here, there, files)
                    reason = ''
                except Exception as error:  # each backend has its own; the main rank tries again
                    reason = f'{type(error).__name__}: {error}'
                self.store.set(f'answer {self.asked} {self.mine}', reason)

    def close(self) -> None:
        """Answer no longer."""
        self.closed.set()
