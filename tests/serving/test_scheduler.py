"""Where previews fall, and which rows are computed next."""

from __future__ import annotations

import pytest
import torch

from conftest import random_model, tiny_config
from ecar.config import SamplingConfig
from ecar.network.model import ECAR
from ecar.sampling.loop import Rows, advance
from ecar.sampling.noise import StageNoise, draw_noise
from ecar.serving.previews import preview_points
from ecar.serving.rows import Chunk, Row
from ecar.serving.scheduler import PATIENCE, Scheduler

SETTINGS = SamplingConfig(steps=(3, 2, 2), guidance=(1.0, 1.0, 1.0))
GUIDED = SamplingConfig(steps=(3, 2, 2), guidance=(2.0, 1.5, 1.0))


@pytest.mark.parametrize(
    ("steps", "count", "points"),
    [
        ((8, 4), 0, ()),
        ((8, 4), 1, ((0, 8),)),
        ((8, 4), 3, ((0, 2), (0, 4), (0, 8))),
        ((8, 8, 8, 8), 3, ((0, 8), (1, 8), (2, 8))),
        ((3, 2, 2), 1, ((1, 2),)),
        ((4,), 1, ((0, 2),)),
        ((1,), 3, ()),
        ((1, 1), 3, ((0, 1),)),
    ],
)
def test_previews_are_ends_of_stages_first_and_inside_stages_where_more_are_asked_for(
    steps: tuple[int, ...], count: int, points: tuple[tuple[int, int], ...]
) -> None:
    assert preview_points(steps, count) == points


def row(settings: SamplingConfig = SETTINGS, label: int = 0, seed: int = 0) -> Row:
    return Row(label, seed, settings, emit=lambda _: None)


def chunk(model: ECAR, rows: list[Row], stages: int) -> Chunk:
    """Rows whose first stages are done."""
    noise = draw_noise([r.seed for r in rows], model.plan, 3)
    batch = Rows.start(model, torch.tensor([r.label for r in rows]), rows[0].settings)
    for k in range(stages):
        advance(model, batch, noise[k], rows[0].settings)
    return Chunk(rows, batch)


def test_rows_of_other_settings_are_never_in_one_batch() -> None:
    scheduler = Scheduler(8)
    scheduler.add([row(), row(GUIDED), row(), row(GUIDED), row()])
    batches = [scheduler.next(), scheduler.next(), scheduler.next()]
    assert [len(b) if isinstance(b, list) else b for b in batches] == [3, 2, None]


def test_rows_that_came_late_join_the_others_at_the_next_stage(model: ECAR) -> None:
    scheduler, early, late = Scheduler(8), [row(seed=1)], [row(seed=2), row(seed=3)]
    scheduler.put_back(chunk(model, early, 1))
    scheduler.add(late)
    first = scheduler.next()
    assert first == late
    scheduler.put_back(chunk(model, late, 1))
    second = scheduler.next()
    assert isinstance(second, Chunk) and second.members == [*early, *late] and len(second.batch.labels) == 3


def test_a_small_batch_is_not_passed_over_for_ever() -> None:
    """Largest first alone would starve one row for as long as others keep coming."""
    scheduler, alone = Scheduler(2), row(GUIDED)
    scheduler.add([alone])
    for passed in range(PATIENCE + 1):
        scheduler.add([row(), row()])
        chosen = scheduler.next()
        assert (chosen == [alone]) == (passed == PATIENCE)


def test_batches_never_exceed_their_bound_and_no_row_is_lost(model: ECAR) -> None:
    scheduler = Scheduler(4)
    rows = [row(seed=i) for i in range(7)]
    scheduler.put_back(chunk(model, rows[:5], 1))
    scheduler.put_back(chunk(model, rows[5:], 1))
    first, second = scheduler.next(), scheduler.next()
    assert isinstance(first, Chunk) and isinstance(second, Chunk)
    assert first.members + second.members == rows and len(first.members) == len(first.batch.labels) == 4
    assert scheduler.next() is None


def test_removed_rows_leave_their_neighbours_where_they_were(model: ECAR) -> None:
    scheduler, rows, waiting = Scheduler(8), [row(GUIDED, i, i) for i in range(3)], row(seed=9)
    whole = chunk(model, rows, 1)
    scheduler.put_back(whole)
    scheduler.add([waiting])
    assert scheduler.remove(lambda r: r is rows[1], begun=False) == []  # the event loop's thread copies no tensors
    assert scheduler.remove(lambda r: r in (rows[1], waiting)) == [waiting, rows[1]]
    left = scheduler.next()
    assert isinstance(left, Chunk) and left.members == [rows[0], rows[2]] and scheduler.next() is None
    assert left.batch.y is not None and whole.batch.y is not None
    assert torch.equal(left.batch.y, whole.batch.y[[0, 2]])


@pytest.mark.parametrize("settings", [SETTINGS, GUIDED])
def test_rows_split_and_joined_between_stages_go_on_as_if_alone(settings: SamplingConfig) -> None:
    """With guidance the cache holds each row twice: the halves must not be mixed up."""
    model, seeds, labels = random_model(tiny_config()), [3, 4, 5], [0, 1, 2]
    noise = draw_noise(seeds, model.plan, 3)

    def part(k: int, rows: list[int]) -> StageNoise:
        context = noise[k].context
        return StageNoise(noise[k].fresh[rows], None if context is None else context[rows])

    whole = Rows.start(model, torch.tensor(labels), settings)
    for k in range(3):
        advance(model, whole, noise[k], settings)
    pair, single = (Rows.start(model, torch.tensor([labels[i] for i in rows]), settings) for rows in ([2, 0], [1]))
    advance(model, pair, part(0, [2, 0]), settings)
    advance(model, single, part(0, [1]), settings)
    mixed = Rows.join([pair.select([1]), single, pair.select([0])])
    for k in (1, 2):
        advance(model, mixed, part(k, [0, 1, 2]), settings)
    assert mixed.y is not None and whole.y is not None
    assert torch.allclose(mixed.y, whole.y, atol=1e-4)
