"""Work shared by processes: what they tell each other, and batches dealt to the processes that are free, a few at a time."""

import contextlib
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from torch import distributed as dist
from torch.utils.data import DataLoader

from fastsal.evaluation.batches import Analysis, Batches
from fastsal.evaluation.tables import Columns
from fastsal.progress import Report, bar

HELD_BYTES = 1 << 26  # of rows that wait to be written


class Team:
    """The processes that share this work: this one's rank, how many there are, and what they tell each other.

    Without torch.distributed it is a team of one.
    """

    def __init__(self) -> None:
        together = dist.is_available() and dist.is_initialized()
        self.size: int = dist.get_world_size() if together else 1
        self.rank: int = dist.get_rank() if together else 0
        self._prefix = self._from_first(str(uuid.uuid4()))
        self._counters: dict[str, int] = {}

    @contextlib.contextmanager
    def _hearing(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise RuntimeError(
                f"process {self.rank} of {self.size}: another process of this run has ended; what was saved is in the folder: "
                "call again in the same way, with any number of processes, to resume"
            ) from error

    def _from_first(self, value: Any) -> Any:
        """The first process's value."""
        values = [value]
        if self.size > 1:
            with self._hearing():
                dist.broadcast_object_list(values)
        return values[0]

    def decided(self, decide: Callable[[], Any]) -> Any:
        """What the first process decides."""
        return self._from_first(decide() if self.rank == 0 else None)

    def gathered(self, value: Any) -> list[Any]:
        """The value of each process. Waits for all."""
        values = [value] * self.size
        if self.size > 1:
            with self._hearing():
                dist.all_gather_object(values, value)
        return values

    def count(self, name: str, amount: int) -> int:
        """A counter that all share, after an amount is added to it."""
        if self.size > 1:
            with self._hearing():
                store = dist.distributed_c10d._get_default_store()  # torch 2.6 has no public way to it
                return int(store.add(f"{self._prefix}/{name}", amount))
        self._counters[name] = self._counters.get(name, 0) + amount
        return self._counters[name]


class Bar:
    """Progress with its rate and the time left, on the first process's standard error where somebody watches."""

    def __init__(self, team: Team, total: int, done: int, wanted: bool | None) -> None:
        self.before = done
        self.bar = bar(wanted, total=total, initial=done, unit="example") if team.rank == 0 else None

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar:
            self.bar.close()

    def within(self, done: int, size: int) -> Report:
        """What to tell the share of the next `size` examples that is done."""
        return lambda share: self.reach(done + int(share * size))

    def reach(self, done: int) -> None:
        """Shows that this run has done so many examples."""
        if self.bar:
            self.bar.update(self.before + done - self.bar.n)


class Work:
    """The batches that are missing, dealt to the processes, analysed, and handed to `save` when it is time.

    A process takes as many batches at once as fill half of `save_every` at its pace, and never more than its half of a fair
    share of what is left, so that all end together.
    """

    def __init__(
        self, team: Team, missing: list[int], batches: Batches, save: Callable[[Columns], None], save_every: float
    ) -> None:
        self.team, self.missing, self.batches, self.save, self.save_every = team, missing, batches, save, save_every
        self.pace = 0.0  # seconds a batch, as soon as one is done
        self.waiting: list[Columns] = []

    def _deal(self) -> Iterator[int]:
        left = len(self.missing)
        while True:
            wanted = self.save_every / 2 / self.pace if self.pace else 1
            size = max(1, int(min(wanted, left // (2 * self.team.size))))
            end = self.team.count("dealt", size)
            yield from self.missing[end - size : end]
            left = len(self.missing) - end
            if left <= 0:
                return

    def run(self, analysis: Analysis, workers: int, bar: Bar) -> None:
        """Analyses this process's part. What is done when anything is raised is saved first."""
        loader = DataLoader(self.batches, batch_size=None, sampler=self._deal(), num_workers=workers)
        saved = start = time.monotonic()
        reached = 0  # by all processes
        try:
            for done, batch in enumerate(loader, 1):
                size = len(batch.indices)
                self.waiting.append(analysis.table(batch, bar.within(reached, size)))
                now = time.monotonic()
                self.pace = max((now - start) / done, 1e-9)
                held = sum(column.nbytes for columns in self.waiting for column in columns.values())
                if now - saved >= self.save_every or held >= HELD_BYTES:
                    self.flush()
                    saved = time.monotonic()
                reached = self.team.count("done", size)
                bar.reach(reached)
        finally:
            self.flush()

    def flush(self) -> None:
        """Saves what waits, consecutive batches together."""
        while self.waiting:
            length = 1
            while (
                length < len(self.waiting)
                and self.waiting[length]["index"][0] == self.waiting[length - 1]["index"][-1] + 1
            ):
                length += 1
            part = self.waiting[:length]
            self.save({name: np.concatenate([columns[name] for columns in part]) for name in part[0]})
            del self.waiting[:length]
