"""Runs a network over tiles from one thread per device, in passes of one shape. See docs/design/gpu.md."""

from __future__ import annotations

import queue
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Self, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from slidetl.errors import UsageError, is_gpu_full
from slidetl.text import one_line
from slidetl.tiles.grid import TileSpec

_T = TypeVar("_T")
_About = TypeVar("_About")
_MOST_PASSES = 8  # at a time on a CPU; each holds its activations in memory
_BUFFERS = 3  # batches on a GPU: one computed, one copied, one filled
_PATIENCE_S = 0.02  # an idle GPU waits so long for a full batch
_WARM_PASSES = 3  # TorchScript profiles two before it settles
_PACE = 0.85  # from this share of the network's own rate on, the network is the limit
_PROFILE_S = 0.5  # to measure the network alone, during the tissue search of the first slides

Embed = Callable[[Tensor], Tensor]
"""Tiles ``[n, 3, S, S] uint8``, or patches ``[n, 1, S, S, S] int16``, on the device -> ``[n, D]`` there."""


def channels_first(tiles: Tensor) -> Tensor:
    """Views tiles ``[n, S, S, 3] uint8`` as ``[n, 3, S, S]``, patches ``[n, S, S, S]`` with one channel."""
    return tiles.permute(0, 3, 1, 2) if tiles.dtype == torch.uint8 else tiles.unsqueeze(1)


@dataclass(frozen=True)
class Rates:
    """Throughput of reading tiles and running a network, beside the network alone.

    Attributes:
        everything: tiles per second, from the first read to the end of the slide, or of all slides; on a GPU,
            shared by slides, of all since its first pass.
        network_alone: tiles per second of the network on tiles already on its device, right after; on a GPU
            right before.
        processor_share: CPU time of the network alone, as a share of the CPU time of everything. Other users
            of the machine disturb it less than the rates; on a single free core it equals their quotient.
            None on a GPU.
        waited: share of the time in which the network waited for tiles, 0..1.
        first_pass_s: seconds of the first pass on a GPU, with its planning, while the first slide is read;
            0 on a CPU.
    """

    everything: float
    network_alone: float
    processor_share: float | None
    waited: float
    first_pass_s: float = 0.0

    @property
    def share(self) -> float:
        """The rate with everything on, as a share of the network's own."""
        return self.everything / self.network_alone

    @property
    def limit(self) -> str:
        """The limit: the network, reading or the runner.

        It is reading if waiting for tiles explains at least half of the time lost; ``everything`` is then the
        rate of reading. Else it is the runner: copying and starting passes, on a CPU also cores shared with
        reading.
        """
        if self.share >= _PACE:
            return "the network"
        return "reading" if self.waited >= (1 - self.share) / 2 else "the runner"

    def __str__(self) -> str:
        parts = [
            f"{self.everything:.1f} tiles/s with everything on, {self.network_alone:.1f} by the network "
            f"alone: {self.share:.0%} ({self.limit} is the limit)",
            f"the network waited for tiles {self.waited:.0%} of the time",
        ]
        if self.first_pass_s:
            parts.append(f"the first pass took {self.first_pass_s:.1f} s, while the first slide was read")
        if self.processor_share is not None:
            parts.append(f"{self.processor_share:.0%} of the processor time went to the network")
        return "; ".join(parts)


class Runner:
    """Embeds tiles on one device. Use it as a context manager.

    On a GPU one thread owns the device, and every pass has the same shape: cuDNN takes seconds to plan for
    each new thread and batch length. Tiles of several slides share a batch; zeros fill up the last one.
    Copies from pinned memory run on a stream of their own while the GPU computes.

    On a CPU each piece is a pass, several at a time: threads sharing a pass wait for each other after every
    layer (docs/design/loading.md).

    Args:
        embed: the network; called in the runner's threads alone.
        device: of the network.
        batch_size: tiles in a pass on a GPU; halved, with a warning, if its memory is too small.
        spec: of the tiles, for the warm-up passes of a GPU; None: the first tiles warm it up.
        passes: passes at a time on a CPU (eight at most); they share torch's threads.
        packs: one thread owns the device and packs tiles into batches of one shape; by default on a GPU.
        then: called after the warm-up passes with their embeddings, to warm up what else runs on a GPU.
        profile: if it packs, measure the network alone after the warm-up, into ``alone``.
        precision: number format of ``embed``, for records.

    Attributes:
        first_pass_s: seconds of the first pass if it packs.
        packs, precision: as above.
        alone: tiles per second of the network on tiles already on the device; None if not measured.
        busy_s: seconds of all passes, divided by those at a time, if it does not pack.
    """

    def __init__(
        self,
        embed: Embed,
        device: torch.device,
        batch_size: int,
        spec: TileSpec | None = None,
        passes: int = 1,
        packs: bool | None = None,
        then: Callable[[Tensor], object] | None = None,
        profile: bool = False,
        precision: str = "float32",
    ) -> None:
        self.device, self.batch_size, self.precision = device, batch_size, precision
        self.first_pass_s = 0.0
        self.alone: float | None = None
        self.busy_s = 0.0
        self._tiles, self._warm_at, self._waited_s, self._profile = 0, 0.0, 0.0, profile
        self._counted = threading.Lock()
        self._embed, self._spec, self._then = embed, spec, then
        self._is_gpu = device.type == "cuda"
        self.packs = self._is_gpu if packs is None else packs
        self._passes = 1 if self.packs else max(1, min(passes, _MOST_PASSES))
        self._room = threading.Semaphore(2 * self._passes)
        self._waiting: queue.Queue[_Piece | _Call | None] = queue.Queue(_BUFFERS)
        self._torch_threads = torch.get_num_threads()

    @property
    def depth(self) -> int:
        """Number of pieces for a caller to submit before it waits for the first."""
        return _BUFFERS if self.packs else self._passes

    def depth_of(self, piece: int, callers: int) -> int:
        """Computes :attr:`depth` for pieces of ``piece`` tiles, for the callers to fill two batches."""
        return max(_BUFFERS, -(-2 * self.batch_size // (piece * callers)) + 1)

    def __enter__(self) -> Self:
        if self.packs:
            self._owner = threading.Thread(target=self._own, name="gpu", daemon=True)
            self._owner.start()
        else:
            each = max(1, self._torch_threads // self._passes)
            self._pool = ThreadPoolExecutor(self._passes, "network", torch.set_num_threads, (each,))
        return self

    def __exit__(self, *exc: object) -> None:
        if self.packs:
            self._waiting.put(None)
            self._owner.join()
        else:
            self._pool.shutdown(cancel_futures=True)
            torch.set_num_threads(self._torch_threads)  # part of this setting is shared by all threads

    def submit(self, tiles: NDArray[Any]) -> Future[Tensor]:
        """Queues tiles ``[n, S, S, 3]`` or patches ``[n, S, S, S]``, and blocks while too many wait.

        Returns:
            Their embeddings ``[n, D]`` on the device. The future raises the errors of the pass.
        """
        if self.packs:
            piece = _Piece(tiles)
            self._waiting.put(piece)
            return piece.future
        self._room.acquire()

        def run() -> Tensor:
            started = time.perf_counter()
            try:
                with torch.inference_mode():
                    return self._embed(channels_first(torch.from_numpy(tiles)))
            finally:
                self._room.release()
                with self._counted:
                    self.busy_s += (time.perf_counter() - started) / self._passes

        return self._pool.submit(run)

    def stream(
        self, parts: Iterable[tuple[_About, NDArray[Any]]], depth: int = 0
    ) -> Iterator[tuple[_About, Tensor]]:
        """Yields embeddings of described tiles in order; ``depth`` 0 is :attr:`depth`."""
        pending: deque[tuple[_About, Future[Tensor]]] = deque()
        for about, tiles in parts:
            pending.append((about, self.submit(tiles)))
            if len(pending) > (depth or self.depth):
                done, future = pending.popleft()
                yield done, future.result()
        for done, future in pending:
            yield done, future.result()

    def call(self, function: Callable[[], _T]) -> _T:
        """Calls a function in the thread owning the device, or in this one if none does."""
        if not self.packs:
            with torch.inference_mode():
                return function()
        called: Future[_T] = Future()
        self._waiting.put(_Call(function, called))
        return called.result()

    def rate(self, tiles: NDArray[Any], seconds: float = 2.0) -> float:
        """Measures tiles per second of the network alone, on tiles ``[n, S, S, 3]``."""
        if self.packs:
            return self.call(lambda: self._rate(tiles, seconds))
        done, started = 0, time.perf_counter()
        futures: list[Future[Tensor]] = []
        while time.perf_counter() - started < seconds:
            futures.append(self.submit(tiles))
            if len(futures) > self.depth:
                done += len(futures.pop(0).result())
        done += sum(len(future.result()) for future in futures)
        return done / (time.perf_counter() - started)

    @property
    def rate_so_far(self) -> float:
        """Tiles per second since the warm-up, if it packs."""
        return self._tiles / (time.perf_counter() - self._warm_at)

    @property
    def waited_so_far(self) -> float:
        """Share of the time since the warm-up in which the owner waited for tiles, 0..1, if it packs."""
        return self._waited_s / (time.perf_counter() - self._warm_at)

    def _rate(self, tiles: NDArray[Any], seconds: float) -> float:
        repeated = np.resize(tiles, (self.batch_size, *tiles.shape[1:]))
        batch = channels_first(torch.from_numpy(repeated).to(self.device))
        self._embed(batch)
        self._synchronise()
        done, started = 0, time.perf_counter()
        while time.perf_counter() - started < seconds:
            for _ in range(8):
                self._embed(batch)
            self._synchronise()
            done += 8 * self.batch_size
        return done / (time.perf_counter() - started)

    # The methods below run in the thread owning the device.

    @torch.inference_mode()
    def _own(self) -> None:
        self._copies: Any = None
        self._buffers: list[_Buffer] = []
        self._pieces: list[tuple[_Piece, int, int]] = []  # piece, and its rows in the batch
        self._filled = 0
        failed: BaseException | None = None
        try:
            if self._is_gpu:
                if self.device.index is not None:  # or leaving the stream of copies opens the first card, too
                    torch.cuda.set_device(self.device)
                self._copies = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call] # torch's
            if self._spec is not None:
                tile = np.zeros((1, *self._spec.tile_shape), self._spec.dtype)
                self._warm(tile)
                if self._profile:
                    self.alone = self._rate(tile, _PROFILE_S)
        except BaseException as error:  # raised where embeddings are asked for
            failed = error
        self._warm_at = time.perf_counter()
        while True:
            asked = time.perf_counter()
            try:
                item = self._waiting.get(timeout=_PATIENCE_S if self._filled else None)
            except queue.Empty:
                self._waited_s += time.perf_counter() - asked
                self._launch()
                continue
            self._waited_s += time.perf_counter() - asked
            if item is None:
                self._launch()
                return
            if failed is not None:
                item.future.set_exception(failed)
            elif isinstance(item, _Call):
                _settle(item.future, item.function)
            else:
                self._take(item)

    def _warm(self, tile: NDArray[Any]) -> None:
        started = time.perf_counter()
        zeros = torch.from_numpy(np.repeat(tile, self.batch_size, 0))
        for number in range(_WARM_PASSES):
            rows = self._pass(zeros)
            self._synchronise()
            if not number:
                self.first_pass_s = time.perf_counter() - started
        if self._then is not None:
            self._then(rows)

    def _take(self, piece: _Piece) -> None:
        taken = 0
        try:
            while taken < len(piece.tiles):
                buffer = self._buffer(piece.tiles)
                part = piece.tiles[taken : taken + len(buffer.array) - self._filled]
                if not self._filled and buffer.free is not None:
                    buffer.free.synchronize()  # its last copy has left
                np.copyto(buffer.array[self._filled : self._filled + len(part)], part)
                self._pieces.append((piece, self._filled, self._filled + len(part)))
                taken += len(part)
                self._filled += len(part)
                if self._filled == len(buffer.array):
                    self._launch()
        except BaseException as error:  # raised where the piece was submitted
            if not piece.future.done():
                piece.future.set_exception(error)

    def _buffer(self, tiles: NDArray[Any]) -> _Buffer:
        """Returns the buffer to fill, of the current batch size and the tiles' shape and type.

        Tiles of another shape or type than those that wait run them first, in a batch that is not full.
        """
        wanted, now = (self.batch_size, *tiles.shape[1:]), self._buffers[0].array if self._buffers else None
        if now is not None and (now.shape[1:] != wanted[1:] or now.dtype != tiles.dtype):
            self._launch()
            now = None
        if now is None or (not self._filled and len(now) != wanted[0]):
            self._buffers = [_Buffer.of(wanted, tiles.dtype, self._is_gpu) for _ in range(_BUFFERS)]
        return self._buffers[0]

    def _launch(self) -> None:
        """Runs the batch filled so far, and hands its embeddings to their pieces."""
        if not self._filled:
            return
        buffer, pieces, filled = self._buffers[0], self._pieces, self._filled
        self._buffers = [*self._buffers[1:], buffer]
        self._pieces, self._filled = [], 0
        buffer.array[filled:] = 0
        try:
            rows = self._pass(buffer.tensor, buffer.free)
            self._tiles += filled
            for piece, begin, end in pieces:
                piece.add(rows[begin:end])
        except BaseException as error:  # joining the parts of a piece may run out of memory, too
            for piece, _, _ in pieces:
                if not piece.future.done():
                    piece.future.set_exception(error)

    def _copied(self, tiles: Tensor, free: Any) -> Tensor:
        """Copies tiles to the device; a GPU copies while it computes, and records the event ``free``."""
        if not self._is_gpu:
            return tiles.to(self.device)
        with torch.cuda.stream(self._copies):
            batch = tiles.to(self.device, non_blocking=True)
            if free is not None:
                free.record(self._copies)
        compute = torch.cuda.current_stream(self.device)
        compute.wait_stream(self._copies)
        batch.record_stream(compute)
        return batch

    def _synchronise(self) -> None:
        if self._is_gpu:
            torch.cuda.synchronize(self.device)

    def _pass(self, tiles: Tensor, free: Any = None) -> Tensor:
        """Runs a pass of tiles in a buffer, in halves if the GPU has no memory for all of it."""
        try:
            return self._embed(channels_first(self._copied(tiles, free)))
        except Exception as error:
            size = len(tiles)
            if not is_gpu_full(error):
                raise
            if size == 1:
                raise UsageError(  # with its words: cuDNN may lack an engine for another reason
                    f"{self.device} has no room for a single tile beside the network, or cannot run it; use "
                    "--device cpu (or CUDA_VISIBLE_DEVICES= before the command), or free memory on the card "
                    f"({one_line(str(error))[:200]})"
                ) from error
        torch.cuda.empty_cache()
        halves = [self._pass(half, free) for half in (tiles[: size // 2], tiles[size // 2 :])]
        if self.batch_size > size // 2:
            self.batch_size = size // 2
            warnings.warn(
                f"{self.device} has no room for {size} tiles at once; it takes {size // 2} at a time from "
                f"here on (--batch-size {size // 2})",
                stacklevel=2,
            )
        return torch.cat(halves)


@dataclass(eq=False)
class _Piece:
    """Tiles of one caller, and their embeddings so far."""

    tiles: NDArray[Any]
    future: Future[Tensor] = field(default_factory=Future)
    parts: list[Tensor] = field(default_factory=list)

    def add(self, rows: Tensor) -> None:
        self.parts.append(rows)
        if not self.future.done() and sum(len(part) for part in self.parts) == len(self.tiles):
            self.future.set_result(self.parts[0] if len(self.parts) == 1 else torch.cat(self.parts))


@dataclass(eq=False)
class _Call:
    function: Callable[[], Any]
    future: Future[Any]


@dataclass(eq=False)
class _Buffer:
    """Memory of a batch of tiles or patches, pinned for a GPU, and the event of its last copy."""

    tensor: Tensor
    array: NDArray[Any]
    free: Any

    @classmethod
    def of(cls, shape: tuple[int, ...], dtype: np.dtype[Any], is_pinned: bool) -> Self:
        like = torch.from_numpy(np.empty(0, dtype))
        tensor = torch.empty(shape, dtype=like.dtype, pin_memory=is_pinned)
        event = torch.cuda.Event() if is_pinned else None  # type: ignore[no-untyped-call] # torch's
        return cls(tensor, tensor.numpy(), event)


def _settle(future: Future[Any], function: Callable[[], Any]) -> None:
    try:
        future.set_result(_with_room(function))
    except BaseException as error:  # raised in the calling thread
        future.set_exception(error)


def _with_room(function: Callable[[], _T]) -> _T:
    """Calls a function, and again, after freeing what torch keeps of the GPU's memory, if that is full."""
    try:
        return function()
    except Exception as error:
        if not is_gpu_full(error):
            raise
    torch.cuda.empty_cache()
    return function()
