"""Images in an ``.npz`` of arrays: one item of an array is an image, and has a path of its own.

The layout is that of the public patch sets in MedMNIST form (Yang et al. 2023, Scientific Data 10:41):
``train_images [N, h, w, 3]`` or ``[N, h, w]``, ``train_labels [N, 1]``, and so for ``val`` and ``test``. Item
17 of the first is named ``FILE.npz#train/17``.
"""

from __future__ import annotations

import functools
import re
import struct
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slidetl.errors import SlideOpenError
from slidetl.files import array_header, read_packed_array

SPLITS = ("train", "val", "test")

_ITEM = re.compile(rf"(?P<file>.+\.npz)#(?P<split>{'|'.join(SPLITS)})/(?P<index>\d{{1,9}})", re.IGNORECASE)

# Each process holds an array completely, once: 90,000 colour images of 64 pixels are 1.1 GB.
_MAX_BYTES = 2 * 2**30
_MAX_ITEMS = 1_000_000  # each becomes a row of a manifest; the largest such set has 236,386
# Errors of NumPy and zipfile on damaged or foreign files.
_DAMAGE = (
    OSError,
    ValueError,
    EOFError,
    KeyError,
    RuntimeError,
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
)


@dataclass(frozen=True)
class NpzItem:
    """One image in an ``.npz``.

    Attributes:
        file: the archive.
        split: ``train``, ``val`` or ``test``.
        index: its place in ``<split>_images``, from 0.
    """

    file: Path
    split: str
    index: int

    @classmethod
    def of(cls, path: Path) -> NpzItem | None:
        """Parses a path ``FILE.npz#SPLIT/INDEX``; None for any other path."""
        found = _ITEM.fullmatch(str(path))
        return cls(Path(found["file"]), found["split"].lower(), int(found["index"])) if found else None

    @property
    def path(self) -> Path:
        """The path ``FILE.npz#SPLIT/INDEX``."""
        return Path(f"{self.file}#{self.split}/{self.index}")

    def read(self) -> NDArray[np.uint8]:
        """Reads the image, ``[h, w] or [h, w, C] uint8``.

        Raises:
            SlideOpenError: the file is damaged, too large or has no such item.
        """
        try:
            about = self.file.stat()
        except OSError as error:
            raise SlideOpenError(f"{self.file}: no such file") from error
        images = _load(self.file, f"{self.split}_images", about.st_mtime_ns, about.st_size)
        if self.index >= len(images):
            raise SlideOpenError(
                f"{self.path}: {self.split}_images has items 0 to {len(images) - 1}, not {self.index}"
            )
        return np.asarray(images[self.index])


def read_labels(file: Path) -> dict[str, NDArray[np.integer[Any]]]:
    """Reads the labels of every split in an ``.npz``, ``[N]`` each.

    Raises:
        SlideOpenError: the file is no ``.npz`` in this form; the message gives the reason.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            names = set(archive.namelist())
            splits = [split for split in SPLITS if f"{split}_images.npy" in names]
            counts = {split: _images(archive, f"{split}_images")[0] for split in splits}
            labels = {
                split: read_packed_array(archive, f"{split}_labels", 8 * _MAX_ITEMS) for split in splits
            }
    except _DAMAGE as error:
        raise SlideOpenError(f"{file}: not an .npz of images that can be read: {error}") from error
    if not splits:
        raise SlideOpenError(
            f"{file}: expected train_images and train_labels (or val_, test_), found {sorted(names)[:6]}"
        )
    for split, values in labels.items():
        one_each = values.ndim == 1 or (values.ndim == 2 and values.shape[1] == 1)
        if not one_each or values.dtype.kind not in "ui" or len(values) != counts[split][0]:
            raise SlideOpenError(
                f"{file}: {split}_labels must be one whole number for each of {counts[split][0]} images, "
                f"not {list(values.shape)} {values.dtype}"
            )
    return {split: values.reshape(-1) for split, values in labels.items()}


@functools.lru_cache(maxsize=1)
def _load(file: Path, name: str, mtime_ns: int, size: int) -> NDArray[np.uint8]:
    """Loads an array of images. One is kept, since items are requested one after another."""
    del mtime_ns, size  # they only make another file another key
    try:
        with zipfile.ZipFile(file) as archive:
            shape, dtype = _images(archive, name)
            if dtype != np.uint8 or len(shape) not in (3, 4):
                raise SlideOpenError(
                    f"{file}: {name} must be [N, h, w] or [N, h, w, 3] uint8, not {list(shape)} {dtype}"
                )
            return read_packed_array(archive, name, _MAX_BYTES)
    except _DAMAGE as error:
        if isinstance(error, SlideOpenError):
            raise
        raise SlideOpenError(f"{file}: {name} cannot be read: {error}") from error


def _images(archive: zipfile.ZipFile, name: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Reads shape and type of an array of images, and refuses too large ones."""
    shape, dtype = array_header(archive, name)
    if not shape:
        raise ValueError(f"{name} has no items")
    if shape[0] > _MAX_ITEMS:
        raise ValueError(f"{name} has {shape[0]} items, more than {_MAX_ITEMS}")
    wanted = int(np.prod(shape, dtype=object)) * dtype.itemsize
    if wanted > _MAX_BYTES:
        raise ValueError(
            f"{name} would take {wanted / 2**30:.1f} GiB, more than {_MAX_BYTES / 2**30:.0f}; "
            "write its images into folders, one for each label"
        )
    return shape, dtype
