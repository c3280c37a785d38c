"""The interface of a slide: an image with a physical spacing."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from slidetl.errors import SlideOpenError, SlideReadError
from slidetl.slides.turn import ViewerFrame
from slidetl.slides.unread import describe_unread

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class SlideInfo:
    """Metadata of a slide.

    Attributes:
        path: the file (of several files, the one given).
        fingerprint: SHA-256 over the content of the slide (:func:`fingerprint_of`), hexadecimal; independent
            of the file's place.
        vendor: the reader's word for it, e.g. ``aperio``.
        size_level0: width and height, level-0 pixels.
        mpp_level0: spacing along x and y, micrometres per level-0 pixel.
        mpp_levels: nominal spacing of every pyramid level, finest first; for messages only.
        background_rgb: colour of unscanned glass, 0..255.
        objective_power: nominal magnification, if the file has it.
        notes: doubts about the slide and changes to its pixels; one line each, no semicolon.
        corner_level0: ``(x, y)`` of the scanned area, the crop shown by viewers, level-0 pixels.
        orientation: of TIFF and EXIF, 1..8, as applied to the stored pixels.
    """

    path: Path
    fingerprint: str
    vendor: str
    size_level0: tuple[int, int]
    mpp_level0: tuple[float, float]
    mpp_levels: tuple[float, ...]
    background_rgb: tuple[int, int, int]
    objective_power: float | None
    notes: tuple[str, ...] = ()
    corner_level0: tuple[int, int] = (0, 0)
    orientation: int = 1

    @property
    def viewer(self) -> ViewerFrame:
        """The frame of the slide in other programs."""
        return ViewerFrame(self.size_level0, self.corner_level0, self.orientation)


class Slide(Protocol):
    """An open slide. Not shared between processes or threads: each opens its own.

    Readers inherit from it: they become context managers, with slow :meth:`map_tiles` and :meth:`copy_tiles`.
    """

    @property
    def info(self) -> SlideInfo:
        """Metadata of the slide."""
        ...

    def mpp_read(self, mpp: float, mpp_tolerance: float = 0.01) -> tuple[float, float]:
        """Returns the spacing ``(x, y)`` of the pixels of :meth:`read` for ``mpp``.

        It is ``mpp`` itself, or the spacing of a pyramid level within the relative tolerance, then read
        without resampling.

        Raises:
            SpacingError: the slide is coarser than ``mpp``; it is never enlarged.
        """
        ...

    def read(
        self,
        origin_level0: tuple[int, int],
        size_px: tuple[int, int],
        mpp: float,
        mpp_tolerance: float = 0.01,
    ) -> NDArray[np.uint8]:
        """Reads a rectangle at a physical spacing, averaging areas when it is reduced.

        Args:
            origin_level0: upper-left corner ``(x, y)``, level-0 pixels.
            size_px: width and height of the result, pixels of :meth:`mpp_read` micrometres.
            mpp: spacing of the result, micrometres per pixel.
            mpp_tolerance: relative difference within which a level is read without resampling.

        Returns:
            ``[height, width, 3] uint8`` RGB. Areas outside the slide or not scanned have its background
            colour.

        Raises:
            SlideReadError: the region is damaged, or the slide is closed.
            SpacingError: the slide is coarser than ``mpp``.
        """
        ...

    def missing(self, size_px: tuple[int, int], mpp: float) -> NDArray[np.bool_] | None:
        """Marks areas unscanned or missing in the file, for the whole slide at ``mpp`` micrometres per pixel.

        Returns:
            ``[height, width] bool`` of ``size_px``, or None if they cannot be distinguished from glass.
        """
        return None

    def map_tiles(
        self,
        work: Callable[[NDArray[np.uint8]], _Result],
        origins_level0: NDArray[np.int32],
        side_px: int,
        mpp: float,
        mpp_tolerance: float = 0.01,
        first: int = 0,
        threads: int = 1,
    ) -> Iterator[_Result | SlideReadError]:
        """Reads many tiles, shares work between them, and calls a function with each.

        Args:
            work: called with the pixels of a tile, as from :meth:`read`, in several threads.
            origins_level0: ``[N, 2] int32``, upper-left corners ``(x, y)``, level-0 pixels, row by row. The
                pixels of a tile depend on all of them, so give the same ones to resume.
            side_px: of a tile, pixels of :meth:`mpp_read` micrometres.
            mpp: spacing of the tiles, micrometres per pixel.
            mpp_tolerance: relative difference within which a level is read without resampling.
            first: the tile to begin with.
            threads: parallel reads and calls.

        Yields:
            In order, from the tile ``first`` on, the result of ``work``, or the error if the slide is damaged
            there.

        Raises:
            SpacingError: the slide is coarser than ``mpp``.
        """
        for x, y in origins_level0[first:].tolist():
            try:
                yield work(self.read((x, y), (side_px, side_px), mpp, mpp_tolerance))
            except SlideReadError as error:
                yield error

    def copy_tiles(
        self,
        origins_level0: NDArray[np.int32],
        side_px: int,
        mpp: float,
        mpp_tolerance: float = 0.01,
        first: int = 0,
    ) -> Iterator[bytes | None] | None:
        """Copies the slide's own JPEGs, if they coincide with the tiles wanted; see :meth:`map_tiles`.

        Returns:
            None if they do not. Else, in order, each tile as a standalone JPEG with exactly the pixels of
            :meth:`read`; None for a tile to be read instead.

        Raises:
            SpacingError: the slide is coarser than ``mpp``.
        """
        return None

    def close(self) -> None:
        """Releases the file. Closing twice is harmless."""
        ...

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def check_there(path: Path) -> None:
    """Checks if a slide is a file, with its folder of pixels in the case of MIRAX.

    Raises:
        SlideOpenError: something is missing; the message names it.
    """
    if not path.is_file():
        what = "no such file"
        if path.exists():
            what = describe_unread(path) or "not a file"
        if path.is_symlink() and not path.exists():
            what = f"a link to {path.readlink()}, which is not there"
        raise SlideOpenError(f"{path}: {what}")
    if path.suffix.lower() == ".mrxs" and not path.with_suffix("").is_dir():
        raise SlideOpenError(f"{path}: its pixels are missing, the folder {path.stem} beside it; copy both")


# Up to this size a file is hashed completely; beyond it by so many blocks of so many bytes.
WHOLE_BYTES = 64 * 2**20
_BLOCKS = 64
_BLOCK_BYTES = 2**20

# Windows and Synology; those of macOS and Linux are hidden.
_LEFT_BEHIND = frozenset(["thumbs.db", "ehthumbs.db", "desktop.ini", "@eadir"])


def fingerprint_of(files: Iterable[Path]) -> str:
    """Identifies a slide's content: SHA-256, hexadecimal, independent of file names.

    A file of up to 64 MiB is hashed completely; of a larger one, its size and 64 blocks of 1 MiB: the first
    (with the metadata or the pointer to it), the last, and 62 evenly between. Another slide, or the same
    slide scanned, cut or written again, differs everywhere, and so here; hashing 5 GB completely would cost
    more than tiling a small slide. It misses a few flipped bytes in a large file. Of several files, the
    sorted digests are hashed.

    Raises:
        OSError: a file cannot be read.
    """
    digests = sorted(file_digest(path) for path in files)
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def is_left_behind(name: str) -> bool:
    """Tells by its name if a file or folder belongs to a system that showed the folder, not to the slide."""
    is_hidden = name.startswith(".") and not name.startswith(".z")  # of zarr: .zarray and others
    return is_hidden or name.lower() in _LEFT_BEHIND


def file_digest(path: Path) -> str:
    """Identifies a file's content, as :func:`fingerprint_of` says."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size <= WHOLE_BYTES:
            while block := file.read(_BLOCK_BYTES):
                digest.update(block)
        else:
            digest.update(size.to_bytes(8, "little"))
            for index in range(_BLOCKS):
                file.seek((size - _BLOCK_BYTES) * index // (_BLOCKS - 1))
                digest.update(file.read(_BLOCK_BYTES))
    return digest.hexdigest()
