"""How processes find each other, and what they tell each other where no collective works.

Both go through the store of keys that torchrun keeps (without torchrun, the first process).
"""

from __future__ import annotations

import contextlib
import datetime
import json
import time
import uuid

from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from allmlp.errors import UserError


def meet(timeout: datetime.timedelta) -> tuple[Store, int, int]:
    """Returns a store that only the processes of this start use, the rank, and how many they are.

    torchrun has one store for all its restarts, and what the dead have written there would lead the
    living astray: to addresses where nobody listens any more (pytorch/pytorch#135712). So the first
    process draws a name for the part of the store that is used. A number drawn by each of the
    others shows that it has been answered itself, and not the one that had its rank before.

    Args:
        timeout: for the others to come, and for whatever the store is asked later.
    """
    store, rank, size = next(rendezvous("env://", timeout=timeout))
    store.set_timeout(timeout)
    name = uuid.uuid4().hex
    if rank > 0:
        store.set(f"hello/{rank}", name)
        name = store.get(f"answer/{name}").decode()  # waits for it
        store.set(f"{name}/heard/{rank}", "")
        return PrefixStore(name, store), rank, size
    waiting, end = set(range(1, size)), time.monotonic() + timeout.total_seconds()
    while waiting:
        for other in sorted(waiting):
            if store.check([f"{name}/heard/{other}"]):
                waiting.remove(other)
            elif store.check([f"hello/{other}"]):
                store.set(f"answer/{store.get(f'hello/{other}').decode()}", name)
        if time.monotonic() > end:
            ranks = ", ".join(map(str, sorted(waiting)))
            raise UserError(f"rank {ranks} did not come in {timeout.total_seconds():.0f} seconds")
        time.sleep(0.01)
    return PrefixStore(name, store), rank, size


class Notes:
    """What the processes leave for each other where they may meet in no collective any more.

    An error of one process breaks the connections of all others, which say nothing of it; so it
    leaves a note of the error first.
    """

    def __init__(self, store: Store, rank: int, size: int) -> None:
        self._store, self._rank = PrefixStore("notes", store), rank
        self._others = [other for other in range(size) if other != rank]

    def leave(self, error: UserError) -> None:
        """Says by which error this process ends."""
        with contextlib.suppress(RuntimeError):  # who had the store is gone
            self._store.set(str(self._rank), json.dumps((error.what, error.where, error.fix)))

    def found(self) -> dict[int, tuple[str, str | None, str | None]]:
        """Returns the notes of other processes: what, where and fix by rank."""
        notes = {}
        with contextlib.suppress(RuntimeError):
            for rank in self._others:
                if self._store.check([str(rank)]):
                    notes[rank] = tuple(json.loads(self._store.get(str(rank))))
        return notes
