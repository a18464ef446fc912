"""Which rows are computed next. Pure bookkeeping: no threads, no clock, no model.

Continuous batching at stage boundaries: new rows wait for stage 1; rows in progress wait between two stages, and those
with the same stage and settings join, whenever they came.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable

from ecar.serving.rows import Chunk, Key, Row

PATIENCE = 2  # batches that may go first


class Scheduler:
    """Rows that wait, and the choice among them.

    The largest batch goes first (of equals, the earlier stage): it makes the best use of the device, and gives later
    rows the time to catch up with earlier ones. What was passed over ``PATIENCE`` times goes before that

    Args:
        max_batch: rows of one batch; at most twice as many are in progress.
    """

    def __init__(self, max_batch: int) -> None:
        self.max_batch = max_batch
        self.new: deque[Row] = deque()
        self.chunks: dict[Key, list[Chunk]] = {}
        self._passed: Counter[Key] = Counter()

    def add(self, rows: Iterable[Row]) -> None:
        """New rows, behind those that wait."""
        self.new.extend(rows)

    def put_back(self, chunk: Chunk) -> None:
        """Rows that finished a stage but not their last."""
        self.chunks.setdefault((chunk.batch.done, chunk.members[0].settings), []).append(chunk)

    def in_progress(self) -> list[Row]:
        """Rows between two stages."""
        return [row for chunks in self.chunks.values() for chunk in chunks for row in chunk.members]

    def remove(self, unwanted: Callable[[Row], bool], *, begun: bool = True) -> list[Row]:
        """Take out rows wherever they wait; returns them. Without ``begun`` only new ones: of rows between two stages
        tensors have to be copied."""
        removed = [row for row in (*self.new, *(self.in_progress() if begun else ())) if unwanted(row)]
        if removed:
            gone = set(map(id, removed))
            self.new = deque(row for row in self.new if id(row) not in gone)
            for key, chunks in list(self.chunks.items()):
                kept = [[i for i, row in enumerate(c.members) if id(row) not in gone] for c in chunks]
                self._keep(key, [c.select(rows) for c, rows in zip(chunks, kept, strict=True) if rows])
        return removed

    def clear(self) -> list[Row]:
        """Take out all rows in progress (what they have computed is lost); new rows stay."""
        rows = self.in_progress()
        self.chunks.clear()
        return rows

    def next(self) -> list[Row] | Chunk | None:
        """New rows for stage 1, or a chunk for a later stage; None where nothing waits."""
        sizes: Counter[Key] = Counter()
        for key, chunks in self.chunks.items():
            sizes[key] = sum(len(c.members) for c in chunks)
        room = 2 * self.max_batch - sum(sizes.values())
        if room > 0:
            sizes.update((0, row.settings) for row in self.new)
        if not sizes:
            self._passed.clear()
            return None
        patient = [key for key in sizes if self._passed[key] >= PATIENCE]
        if patient:
            chosen = max(patient, key=lambda key: self._passed[key])
        else:
            chosen = max(sizes, key=lambda key: (min(sizes[key], self.max_batch), -key[0]))
        self._passed = Counter({key: self._passed[key] + 1 for key in sizes if key != chosen})
        return self._take_new(chosen, min(room, self.max_batch)) if chosen[0] == 0 else self._take(chosen)

    def _take_new(self, key: Key, most: int) -> list[Row]:
        rows = [row for row in self.new if row.settings == key[1]][:most]
        taken = set(map(id, rows))
        self.new = deque(row for row in self.new if id(row) not in taken)
        return rows

    def _take(self, key: Key) -> Chunk:
        chunks, taken, count = self.chunks[key], [], 0
        while chunks and count < self.max_batch:
            chunk = chunks.pop(0)
            room = self.max_batch - count
            if len(chunk.members) > room:
                chunks.insert(0, chunk.select(list(range(room, len(chunk.members)))))
                chunk = chunk.select(list(range(room)))
            taken.append(chunk)
            count += len(chunk.members)
        self._keep(key, chunks)
        return Chunk.join(taken)

    def _keep(self, key: Key, chunks: list[Chunk]) -> None:
        if chunks:
            self.chunks[key] = chunks
        else:
            self.chunks.pop(key, None)
