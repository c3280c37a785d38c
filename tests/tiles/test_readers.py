"""Readers: order, bounded memory, an early end, errors, and a process that dies."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from slidetl.errors import ProcessEnded, SlideReadError
from slidetl.models.runner import Runner
from slidetl.tiles.grid import TileSpec
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


def all_parts(readers: Readers, *arguments: Any) -> list[tuple[Any, NDArray[np.uint8] | None]]:
    with readers.stream(*arguments) as parts:
        return [(about, None if tiles is None else tiles.copy()) for about, tiles in parts]


def test_parts_come_in_order_through_few_blocks(readers: Readers) -> None:
    (_, none), *parts = all_parts(readers, 40)
    assert none is None
    for number, (about, tiles) in enumerate(parts):
        assert about == number and tiles is not None
        assert tiles.shape == (1 + number % TILES, SIDE, SIDE, 3) and (tiles == number).all()
    assert len(parts) == 40


def test_a_part_is_valid_until_as_many_more_were_taken(readers: Readers) -> None:
    with readers.stream(30) as parts:
        next(parts)
        before: list[NDArray[np.uint8]] = []
        for number, tiles in parts:
            assert tiles is not None
            before = [*before, tiles][-HELD:]
            assert [int(held[0, 0, 0, 0]) for held in before] == list(range(number + 1))[-HELD:]


def fill(value: int, parts: int) -> Generator[tuple[int, NDArray[np.uint8]], None, None]:
    for number in range(parts):
        yield number, np.full((2, SIDE, SIDE, 3), value, np.uint8)


def test_a_reader_begins_no_other_slide_while_tiles_of_the_last_are_in_use() -> None:
    """A slide's last tiles wait for a network that warms up, and another slide fails at once."""
    first_pass, found = threading.Event(), []

    def embed(tiles: torch.Tensor) -> torch.Tensor:
        first_pass.wait(120)
        return tiles[:, :1, 0, 0].float()

    spec = TileSpec(mpp=1.0, tile_size_px=SIDE)
    with (
        Readers(fill, 1, 2, SIDE, HELD) as readers,
        Runner(embed, torch.device("cpu"), 4, spec, packs=True) as runner,
    ):

        def embed_slide(value: int) -> None:
            with readers.stream(value, HELD) as parts:
                for _, rows in runner.stream(cast(Any, parts), readers.held):
                    found.extend(rows.flatten().tolist())

        threads = [threading.Thread(target=embed_slide, args=(value,)) for value in (7, 99)]
        threads[0].start()
        while runner._waiting.qsize() < HELD:
            time.sleep(0.01)
        threads[1].start()
        time.sleep(0.2)
        first_pass.set()
        for thread in threads:
            thread.join(120)
    assert found == [7] * 2 * HELD + [99] * 2 * HELD


def test_a_reader_without_a_free_block_waits(readers: Readers, tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    with readers.stream(1000, "", notes) as parts:
        next(parts), next(parts)
        most = HELD + 2 + 1  # blocks, and one part that waits for its own
        deadline = time.monotonic() + 60
        while notes.stat().st_size < most and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)
        assert notes.stat().st_size == most
    assert len(all_parts(readers, 2)) == 3  # ready for the next slide at once


@pytest.mark.parametrize(
    ("end", "error", "message"),
    [("error", SlideReadError, "a region is damaged"), ("foreign", RuntimeError, "ZeroDivisionError: by")],
)
def test_an_error_belongs_to_its_slide(
    readers: Readers, end: str, error: type[Exception], message: str
) -> None:
    pid = all_parts(readers, 0)[0][0]
    with pytest.raises(error, match=message):
        all_parts(readers, 5, end)
    assert all_parts(readers, 0)[0][0] == pid


@pytest.mark.slow
def test_readers_that_end_end_their_slides_and_start_no_other() -> None:
    """As after Ctrl-C, while another thread reads."""
    reasons: list[str] = []

    def read_on(readers: Readers) -> None:
        with contextlib.suppress(ProcessEnded), readers.stream(1) as parts:
            list(parts)
            begun.set()
            ended.wait(60)
        try:
            all_parts(readers, 5)
        except ProcessEnded as error:
            reasons.append(str(error))

    begun, ended = threading.Event(), threading.Event()
    with Readers(read, 1, TILES, SIDE, HELD) as readers:
        thread = threading.Thread(target=read_on, args=(readers,))
        thread.start()
        assert begun.wait(60)
        (reader,) = readers._all
    ended.set()
    thread.join(60)
    assert len(reasons) == 1 and readers._all == [reader] and not reader.child.process.is_alive()


def test_a_process_that_dies_costs_its_slide(readers: Readers) -> None:
    pid = all_parts(readers, 0)[0][0]
    with pytest.raises(ProcessEnded, match="the process that read it was ended by SIGKILL, perhaps for want"):
        all_parts(readers, 5, "killed")
    (other, _), *parts = all_parts(readers, 5)
    assert other != pid and len(parts) == 5
