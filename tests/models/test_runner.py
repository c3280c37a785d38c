"""Tests of the runner: one thread owns the device, every batch has one shape, nothing is lost or mixed."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from slidetl.errors import UsageError, is_gpu_full
from slidetl.models.runner import Rates, Runner
from slidetl.publish.model_file import without_deprecation
from slidetl.tiles.grid import TileSpec

CPU = torch.device("cpu")
SIDE = 4
TILES = TileSpec(mpp=1.0, tile_size_px=SIDE)


class Network:
    """Embeds a tile as its first two pixel values; notes who called it, and with how many tiles."""

    def __init__(self, room: int = 10**9, broken: bool = False) -> None:
        self.room, self.broken = room, broken
        self.threads: list[int] = []
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, tiles: Tensor) -> Tensor:
        self.threads.append(threading.get_ident())
        self.shapes.append(tuple(tiles.shape))
        if len(tiles) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        if self.broken:
            raise RuntimeError("a layer is broken")
        return tiles[:, :2, 0, 0].float()


def tiles_of(first: int, n: int) -> NDArray[np.uint8]:
    """Tiles ``[n, S, S, 3]`` that carry their number."""
    numbers = np.arange(first, first + n)
    tiles = np.zeros((n, SIDE, SIDE, 3), np.uint8)
    tiles[..., 0], tiles[..., 1] = (numbers % 256)[:, None, None], (numbers // 256)[:, None, None]
    return tiles


def numbers_of(rows: Tensor) -> list[int]:
    return (rows[:, 0] + 256 * rows[:, 1]).long().tolist()


@pytest.mark.slow
@given(st.lists(st.integers(1, 40), max_size=12), st.integers(1, 16))
def test_every_piece_gets_its_own_embeddings_in_batches_of_one_shape(pieces: list[int], batch: int) -> None:
    network = Network()
    with Runner(network, CPU, batch, TILES, packs=True) as runner:
        starts = np.cumsum([0, *pieces])
        futures = [runner.submit(tiles_of(int(s), n)) for s, n in zip(starts, pieces, strict=False)]
        found = [numbers_of(future.result(120)) for future in futures]
    assert found == [list(range(s, s + n)) for s, n in zip(starts, pieces, strict=False)]
    assert {shape[0] for shape in network.shapes} <= {batch}
    assert len(set(network.threads)) == 1


def test_slides_share_batches_and_one_thread() -> None:
    network = Network()
    with Runner(network, CPU, 8, packs=True) as runner, ThreadPoolExecutor(4) as pool:
        ready = threading.Barrier(4)

        def slide(number: int) -> list[int]:
            ready.wait(120)
            futures = [runner.submit(tiles_of(100 * number + 2 * k, 2)) for k in range(10)]
            return [tile for future in futures for tile in numbers_of(future.result(120))]

        found = list(pool.map(slide, range(4)))
    assert found == [list(range(100 * number, 100 * number + 20)) for number in range(4)]
    assert len(set(network.threads)) == 1
    assert {shape[0] for shape in network.shapes} == {8}
    # 80 tiles fill ten batches of eight. A batch of its own for each piece would be 40 passes.
    assert len(network.shapes) < 20


def test_tiles_of_several_sizes_and_types_never_share_a_batch() -> None:
    shapes: list[tuple[torch.dtype, tuple[int, ...]]] = []

    def embed(tiles: Tensor) -> Tensor:
        shapes.append((tiles.dtype, tuple(tiles.shape)))
        return tiles.flatten(1)[:, :1].float()

    pieces = [
        np.full(shape, value, dtype)
        for value, (shape, dtype) in enumerate(
            [
                ((3, 4, 4, 3), np.uint8),
                ((3, 6, 6, 3), np.uint8),
                ((9, 6, 6, 3), np.uint8),
                ((2, 6, 6, 3), np.int16),
                ((3, 4, 4, 3), np.uint8),
            ]
        )
    ]
    with Runner(embed, CPU, 8, packs=True) as runner:
        futures = [runner.submit(piece) for piece in pieces]
        for value, (future, piece) in enumerate(zip(futures, pieces, strict=True)):
            assert future.result(20).flatten().tolist() == [value] * len(piece)
    side4, side6 = (8, 3, 4, 4), (8, 3, 6, 6)
    assert shapes == [
        (torch.uint8, side4),
        *[(torch.uint8, side6)] * 2,
        (torch.int16, (8, 1, 6, 6, 3)),
        (torch.uint8, side4),
    ]


def test_the_device_is_warmed_before_tiles_come() -> None:
    network = Network()
    with Runner(network, CPU, 8, TILES, packs=True) as runner:
        assert runner.call(lambda: len(network.shapes)) == 3
        assert runner.first_pass_s > 0
    assert set(network.shapes) == {(8, 3, SIDE, SIDE)}


def test_calls_run_in_the_thread_that_owns_the_device() -> None:
    network = Network()
    with Runner(network, CPU, 2, packs=True) as runner:
        runner.submit(tiles_of(0, 2)).result(120)
        assert runner.call(threading.get_ident) == network.threads[0] != threading.get_ident()
        with pytest.raises(ZeroDivisionError):
            runner.call(lambda: 1 // 0)


@pytest.mark.parametrize("packs", [False, True])
def test_an_error_of_a_pass_reaches_whoever_waits_and_the_runner_goes_on(packs: bool) -> None:
    network = Network(broken=True)
    with Runner(network, CPU, 2, packs=packs) as runner:
        with pytest.raises(RuntimeError, match="a layer is broken"):
            runner.submit(tiles_of(0, 2)).result(120)
        network.broken = False
        assert numbers_of(runner.submit(tiles_of(5, 2)).result(120)) == [5, 6]


def test_a_card_without_room_takes_smaller_batches_and_loses_nothing() -> None:
    network = Network(room=3)
    with Runner(network, CPU, 8, packs=True) as runner:
        with pytest.warns(UserWarning, match=r"no room for 4 tiles at once; it takes 2 .*--batch-size 2"):
            first = runner.submit(tiles_of(0, 8)).result(120)
        tried = len(network.shapes)
        rest = runner.submit(tiles_of(8, 8)).result(120)
    assert numbers_of(first) + numbers_of(rest) == list(range(16))
    assert {shape[0] for shape in network.shapes[tried:]} == {2}


def test_a_card_without_room_for_the_copy_of_a_batch_takes_smaller_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def copied(runner: Runner, tiles: Tensor, free: Any) -> Tensor:
        if len(tiles) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return tiles.clone()

    monkeypatch.setattr(Runner, "_copied", copied)
    network = Network()
    with Runner(network, CPU, 8, packs=True) as runner, pytest.warns(UserWarning, match="it takes 2"):
        found = runner.submit(tiles_of(0, 8)).result(120)
    assert numbers_of(found) == list(range(8))
    assert [shape[0] for shape in network.shapes] == [2] * 4


def test_a_call_without_room_is_tried_again_with_the_cache_emptied(monkeypatch: pytest.MonkeyPatch) -> None:
    emptied: list[bool] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(True))

    def pool() -> str:
        if not emptied:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return "graded"

    with Runner(Network(), CPU, 2, packs=True) as runner:
        assert runner.call(pool) == "graded"
        with pytest.raises(ZeroDivisionError):
            runner.call(lambda: 1 // 0)
    assert emptied == [True]


def limited(tiles: Tensor, room: int, says: str) -> Tensor:
    if tiles.size(0) > room:
        raise RuntimeError(says)
    return tiles[:, :2, 0, 0].float()


@pytest.fixture(scope="module")
def scripted() -> Any:
    """A network in TorchScript, as in a model file; it takes so many tiles and raises so many words."""
    with without_deprecation():
        return torch.jit.script(limited)


@pytest.mark.parametrize(
    "says",
    [
        "CUDA out of memory. Tried to allocate 2.00 GiB",
        "CUDA error: out of memory",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "GET was unable to find an engine to execute this computation",
    ],
)
def test_a_scripted_network_without_room_takes_smaller_batches_too(scripted: Any, says: str) -> None:
    """TorchScript raises the OutOfMemoryError of a card as a plain RuntimeError."""
    assert is_gpu_full(RuntimeError(f"The following operation failed in the TorchScript ...: {says}"))
    with Runner(lambda tiles: scripted(tiles, 4, says), CPU, 8, packs=True) as runner:
        with pytest.warns(UserWarning, match=r"no room for 8 tiles at once; it takes 4"):
            found = runner.submit(tiles_of(0, 8)).result(120)
        assert runner.batch_size == 4
    assert numbers_of(found) == list(range(8))


def test_another_error_of_a_scripted_network_is_raised_as_it_is(scripted: Any) -> None:
    with Runner(lambda tiles: scripted(tiles, 4, "a layer is broken"), CPU, 8, packs=True) as runner:
        with pytest.raises(torch.jit.Error, match="a layer is broken"):
            runner.submit(tiles_of(0, 8)).result(120)
        assert runner.batch_size == 8


def test_a_card_without_room_for_one_tile_is_one_clear_line() -> None:
    full = Network(room=0)
    with (
        Runner(full, CPU, 4, packs=True) as runner,
        pytest.raises(UsageError, match=r"no room for a single tile .*\(CUDA out of memory\)"),
    ):
        runner.submit(tiles_of(0, 4)).result(120)


def test_a_card_owns_its_thread_by_default_and_one_that_fails_to_start_is_no_wait_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(device: torch.device) -> None:
        raise RuntimeError("no stream")

    monkeypatch.setattr(torch.cuda, "Stream", fails)
    assert not Runner(Network(), CPU, 4).packs
    with Runner(Network(), torch.device("cuda"), 4) as runner:
        assert runner.packs
        with pytest.raises(RuntimeError, match="no stream"):
            runner.submit(tiles_of(0, 4)).result(20)
        with pytest.raises(RuntimeError, match="no stream"):
            runner.call(lambda: None)


@pytest.mark.parametrize("packs", [False, True])
def test_the_rate_of_the_network_alone_is_measured(packs: bool) -> None:
    with Runner(Network(), CPU, 4, packs=packs) as runner:
        assert runner.rate(tiles_of(0, 2), seconds=0.05) > 0


@pytest.mark.parametrize(
    ("share", "waited", "limit"),
    [
        (0.9, 0.1, "the network"),
        (0.6, 0.35, "reading"),
        (0.6, 0.15, "the runner"),
        (0.1, 0.2, "the runner"),
    ],
)
def test_reading_is_the_limit_only_if_it_was_waited_for(share: float, waited: float, limit: str) -> None:
    rates = Rates(1000 * share, 1000.0, None, waited)
    assert rates.limit == limit
    assert f"{share:.0%} ({limit} is the limit); the network waited for tiles {waited:.0%}" in str(rates)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("slow", "packs"),
    [("reading", True), ("reading", False), ("network", True), ("network", False), ("runner", True)],
)
def test_the_time_that_the_network_waits_for_tiles_is_measured(
    slow: str, packs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if slow == "runner":
        monkeypatch.setattr(Runner, "_copied", lambda _, tiles, free: time.sleep(0.1) or tiles)  # type: ignore[func-returns-value]

    def embed(tiles: Tensor) -> Tensor:
        if slow == "network":
            time.sleep(0.1)
        return tiles[:, :2, 0, 0].float()

    def parts() -> Iterator[tuple[int, NDArray[np.uint8]]]:
        for number in range(8):
            if slow == "reading":
                time.sleep(0.1)
            yield number, tiles_of(2 * number, 2)

    with Runner(embed, CPU, 2, TILES, packs=packs) as runner:
        runner.call(lambda: None)  # it is warm
        started, found = time.perf_counter(), list(runner.stream(parts()))
        waited = runner.waited_so_far if packs else 1 - runner.busy_s / (time.perf_counter() - started)
    assert len(found) == 8
    assert (waited > 0.5) == (slow == "reading")


@pytest.mark.parametrize("passes", [1, 3])
def test_on_a_processor_a_piece_is_a_pass(passes: int) -> None:
    network, before = Network(), torch.get_num_threads()
    with Runner(network, CPU, 4, passes=passes) as runner:
        futures = [runner.submit(tiles_of(n, 1 + n)) for n in range(6)]
        assert [numbers_of(future.result(120)) for future in futures] == [
            list(range(n, 2 * n + 1)) for n in range(6)
        ]
    assert sorted(shape[0] for shape in network.shapes) == [1, 2, 3, 4, 5, 6]
    assert len(set(network.threads)) <= passes
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("packs", [True, False])
def test_patches_of_volumes_keep_their_type_and_their_owners(packs: bool) -> None:
    spec = TileSpec(spacing_mm=1.0, tile_size_px=4)
    patches = np.random.default_rng(0).integers(-1000, 400, (7, *spec.tile_shape)).astype(spec.dtype)
    seen: set[tuple[torch.dtype, tuple[int, ...]]] = set()

    def embed(tiles: Tensor) -> Tensor:
        seen.add((tiles.dtype, tuple(tiles.shape[1:])))
        return tiles.flatten(1).float()

    with Runner(embed, CPU, 3, spec, packs=packs) as runner:
        found = torch.cat([rows for _, rows in runner.stream((n, patches[n : n + 2]) for n in (0, 2, 4, 6))])
    assert seen == {(torch.int16, (1, 4, 4, 4))}
    np.testing.assert_array_equal(found.numpy(), patches.reshape(7, -1))
