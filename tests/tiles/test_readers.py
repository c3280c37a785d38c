"""Readers: order, bounded memory, an early end, errors, and a process that dies."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from slidetl.errors import ProcessEnded, SlideReadError
from slidetl.tiles.readers import Readers

SIDE, TILES, HELD = 4, 3, 2


def read(
    parts: int, end: str = "", notes: Path | None = None
) -> Generator[tuple[Any, NDArray[np.uint8] | None], None, None]:
    """The reader's process; parts of tiles that carry their number; then an end of some kind."""
    yield os.getpid(), None
    for number in range(parts):
        if notes is not None:
            with notes.open("a") as file:
                file.write("x")
        yield number, np.full((1 + number % TILES, SIDE, SIDE, 3), number, np.uint8)
    if end == "error":
        raise SlideReadError("a region is damaged")
    if end == "foreign":
        raise ZeroDivisionError("by zero")
    if end == "killed":
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope="module")
def readers() -> Iterator[Readers]:
    with Readers(read, 1, TILES, SIDE, HELD) as started:
        yield started


def test_parts_come_in_order_through_few_blocks(readers: Readers) -> None:
    (_, none), *parts = ((about, None if t is None else t.copy()) for about, t in readers.stream(40))
    assert none is None
    for number, (about, tiles) in enumerate(parts):
        assert about == number and tiles is not None
        assert tiles.shape == (1 + number % TILES, SIDE, SIDE, 3) and (tiles == number).all()
    assert len(parts) == 40


def test_a_part_is_valid_until_as_many_more_were_taken(readers: Readers) -> None:
    parts = readers.stream(30)
    next(parts)
    before: list[NDArray[np.uint8]] = []
    for number, tiles in parts:
        assert tiles is not None
        before = [*before, tiles][-HELD:]
        assert [int(held[0, 0, 0, 0]) for held in before] == list(range(number + 1))[-HELD:]


def test_a_reader_without_a_free_block_waits(readers: Readers, tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    parts = readers.stream(1000, "", notes)
    next(parts), next(parts)
    most = HELD + 2 + 1  # blocks, and one part that waits for its own
    deadline = time.monotonic() + 60
    while notes.stat().st_size < most and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    assert notes.stat().st_size == most
    parts.close()
    assert len(list(readers.stream(2))) == 3  # ready for the next slide at once


@pytest.mark.parametrize(
    ("end", "error", "message"),
    [("error", SlideReadError, "a region is damaged"), ("foreign", RuntimeError, "ZeroDivisionError: by")],
)
def test_an_error_belongs_to_its_slide(
    readers: Readers, end: str, error: type[Exception], message: str
) -> None:
    pid = next(readers.stream(0))[0]
    with pytest.raises(error, match=message):
        list(readers.stream(5, end))
    assert next(readers.stream(0))[0] == pid


def test_a_process_that_dies_costs_its_slide(readers: Readers) -> None:
    pid = next(readers.stream(0))[0]
    with pytest.raises(ProcessEnded, match="the process that read it was ended by SIGKILL, perhaps for want"):
        list(readers.stream(5, "killed"))
    (other, _), *parts = readers.stream(5)
    assert other != pid and len(parts) == 5
