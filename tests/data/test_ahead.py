"""Work ahead on threads keeps order and errors."""

from __future__ import annotations

import threading
import time

import pytest

from ecar.data.ahead import in_order
from ecar.files.images import BadImageError


def test_results_keep_their_order_whichever_is_ready_first_and_bad_images_their_place() -> None:
    def work(number: int) -> int:
        time.sleep(0.002 * (number % 3 == 0))
        if number % 7 == 2:
            raise BadImageError(f"bad {number}")
        return -number

    found = list(in_order(work, range(100)))
    assert [item for item, _ in found] == list(range(100))
    for item, result in found:
        if item % 7 == 2:
            assert isinstance(result, BadImageError) and str(result) == f"bad {item}"
        else:
            assert result == -item


def test_a_reader_that_stops_early_does_not_read_the_whole_data_set_nor_leave_threads() -> None:
    taken = []

    def items():
        for number in range(10_000):
            taken.append((number, threading.current_thread()))
            yield number

    results = in_order(abs, items())
    assert next(results) == (0, 0)
    results.close()
    assert len(taken) < 500
    assert {thread for _, thread in taken} == {threading.current_thread()}
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("images")]


def test_other_errors_are_not_taken_for_bad_images() -> None:
    def work(number: int) -> int:
        raise RuntimeError(f"a bug with {number}")

    with pytest.raises(RuntimeError, match="a bug with 0"):
        list(in_order(work, range(3)))
