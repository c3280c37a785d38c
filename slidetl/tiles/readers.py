"""Reads slides in processes, one each, and passes tiles in shared memory. See docs/design/gpu.md."""

from __future__ import annotations

import contextlib
import mmap
import os
import queue
from collections import deque
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.reduction import DupFd
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from slidetl.errors import ProcessEnded, SlidetlError
from slidetl.processes import Child, start_child

_AHEAD = 2  # blocks of a reader beyond those held by the caller

Part = tuple[Any, NDArray[np.uint8] | None]
"""A reader's item: a small value, and tiles ``[n, S, S, 3]``, or None."""
Read = Callable[..., Generator[tuple[Any, Any], None, None]]


class Readers:
    """Processes with one slide each at a time. Use it as a context manager; threads may share it.

    Threads of one process wait for the interpreter lock, so more than eight read no faster. Tiles lie in
    blocks of constant size, shared between both processes: a reader without a free block waits.

    Args:
        read: called in a reader with the arguments of :meth:`stream`; a function of a module.
        count: processes.
        tiles: most tiles per item of ``read``.
        side_px: greatest side of a tile.
        held: parts with tiles in use by the caller of :meth:`stream` at a time.
    """

    def __init__(self, read: Read, count: int, tiles: int, side_px: int, held: int) -> None:
        self.tiles, self.held = tiles, held
        self._count, self._read = count, read
        self._block_bytes = tiles * side_px * side_px * 3
        self._all: list[_Reader] = []
        self._is_over = False
        self._idle: queue.SimpleQueue[_Reader] = queue.SimpleQueue()

    def __enter__(self) -> Self:
        for _ in range(self._count):
            self._idle.put(self._start())
        return self

    def __exit__(self, *exc: object) -> None:
        self._is_over = True
        for reader in list(self._all):
            reader.child.end()

    def _start(self) -> _Reader:
        blocks = self.held + _AHEAD
        memory = os.memfd_create("tiles")  # has no name, so it goes with its last process
        try:
            os.ftruncate(memory, blocks * self._block_bytes)
            shared = mmap.mmap(memory, 0)
            child = start_child(_serve, _Descriptor(memory), self._block_bytes, self._read)
        finally:
            os.close(memory)
        reader = _Reader(child, shared)
        self._all.append(reader)
        return reader

    @contextlib.contextmanager
    def stream(self, *arguments: Any) -> Generator[Iterator[Part], None, None]:
        """Opens the items of ``read(*arguments)``, from an idle reader; waits for one.

        Tiles are valid until ``held`` further parts with tiles were taken, or until the context ends: only
        then does the reader begin another slide, in the same blocks.

        Raises:
            ProcessEnded: the reader's process ended; and whatever ``read`` raises.
        """
        reader = self._idle.get()
        try:
            yield self._parts(reader, arguments)
        finally:
            with contextlib.suppress(ProcessEnded):  # the slide was left early
                reader.finish()
            try:
                if reader.child.connection.closed and not self._is_over:
                    if reader in self._all:  # not if it could not be started anew before
                        self._all.remove(reader)
                    reader = self._start()
            finally:
                self._idle.put(reader)

    def _parts(self, reader: _Reader, arguments: tuple[Any, ...]) -> Iterator[Part]:
        held: deque[int] = deque()
        reader.begin(arguments)
        while True:
            part = reader.receive()
            if part is None:
                return
            if isinstance(part, Exception):
                raise part
            about, block, shape = part
            if block is None:
                yield about, None
                continue
            held.append(block)
            start = block * self._block_bytes
            size = int(np.prod(shape))
            yield about, np.frombuffer(reader.shared, np.uint8, size, start).reshape(shape)
            while len(held) > self.held:
                reader.free(held.popleft())


_STOP = -1  # in the place of a free block


class _Descriptor:
    """A file descriptor inherited by a child at its start."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def __reduce__(self) -> tuple[Callable[[Any], int], tuple[Any]]:
        return _detach, (DupFd(self._descriptor),)


def _detach(duplicate: Any) -> int:
    descriptor: int = duplicate.detach()
    return descriptor


@dataclass(eq=False)
class _Reader:
    """A process, its shared memory, and the number of its present slide."""

    child: Child
    shared: mmap.mmap
    number: int = 0
    is_busy: bool = False

    def begin(self, arguments: tuple[Any, ...]) -> None:
        self.number += 1
        self.is_busy = True
        self._send(arguments)

    def receive(self) -> Any:
        """Receives a part; an error, or None, ends the slide.

        Raises:
            ProcessEnded: the process ended; the connection is closed then.
        """
        try:
            value = self.child.connection.recv()
        except (EOFError, OSError):  # an OSError if it was closed by the thread that ends all readers
            self.is_busy = False
            raise ProcessEnded(self.child.cause_of_death("read")) from None
        self.is_busy = isinstance(value, tuple)
        return value

    def free(self, block: int) -> None:
        if self.is_busy:
            self._send(block)

    def _send(self, value: Any) -> None:
        with contextlib.suppress(OSError):  # if it has just ended, `receive` tells so
            self.child.connection.send((self.number, value))

    def finish(self) -> None:
        """Stops it if the slide was left early, so it is ready for the next."""
        self.free(_STOP)
        while self.is_busy:
            self.receive()


def _serve(connection: Connection, memory: int, block_bytes: int, read: Read) -> None:
    """Reads one slide after the other in a reader, until its pipe ends."""
    shared = mmap.mmap(memory, 0)
    os.close(memory)
    blocks = np.frombuffer(shared, np.uint8).reshape(-1, block_bytes)
    with contextlib.suppress(EOFError, ConnectionError):  # the other end went away
        while True:
            number, arguments = connection.recv()
            if not isinstance(arguments, tuple):
                continue  # a block of the last slide, freed after its end
            connection.send(_serve_slide(connection, blocks, number, read(*arguments)))


def _serve_slide(
    connection: Connection, blocks: NDArray[np.uint8], number: int, parts: Generator[Part, None, None]
) -> Exception | None:
    """Sends the parts of a slide; returns the error if one ended it early."""
    free = deque(range(len(blocks)))
    with contextlib.closing(parts):
        while True:
            try:
                part = next(parts, None)
            except (SlidetlError, OSError, MemoryError) as error:
                return error
            except Exception as error:  # its class may not survive the pipe
                return RuntimeError(f"{type(error).__name__}: {error}")
            if part is None:
                return None
            about, tiles = part
            while connection.poll(0 if free or tiles is None else None):
                of, block = connection.recv()
                if of == number and block == _STOP:
                    return None
                if of == number:
                    free.append(block)
            if tiles is None:
                connection.send((about, None, ()))
                continue
            blocks[free[0], : tiles.size] = tiles.reshape(-1)
            connection.send((about, free.popleft(), tiles.shape))
