"""Writes files whole or not at all, and checks foreign files before they are read."""

from __future__ import annotations

import csv
import ctypes
import errno
import functools
import hashlib
import io
import math
import os
import re
import shutil
import socket
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray

from slidetl.errors import FileHeldError, OutputError, SlidetlError, UsageError
from slidetl.text import csv_cell, plain_cell

# A network of a thousand tensors has 100 kB; the library would read up to 100 MB.
_MAX_SAFETENSORS_HEADER_BYTES = 8 * 2**20
_MAX_NPY_HEADER_BYTES = 10_000  # NumPy's own limit; three numbers and a type are 128
# A share's answer to a rename onto a file that a program of Windows has open.
_HELD = (errno.EACCES, errno.EBUSY, errno.ETXTBSY)
# Least interval between two writes of a table that grows: seconds, and a multiple of the duration of a write.
_LEAST_SECONDS = 1.0
_LEAST_DURATIONS = 10


@contextmanager
def replaced(path: Path) -> Iterator[IO[bytes]]:
    """Opens a file to replace ``path`` once it is whole and durable; makes the folder.

    It is written beside ``path`` under another name. If anything fails, it is removed and ``path`` stays.

    Raises:
        OutputError: the file cannot be written; a FileHeldError if another program has ``path`` open.
    """
    with replaced_path(path) as partial, partial.open("xb") as file:  # never through a link of someone else
        yield file


@contextmanager
def replaced_path(path: Path) -> Iterator[Path]:
    """Gives the name of a file to write, and puts it in the place of ``path``; see :func:`replaced`."""
    partial = partial_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.unlink(missing_ok=True)
        try:
            yield partial
            fsync_path(partial)
            _put(partial, path)
        finally:
            partial.unlink(missing_ok=True)  # on a full disk it would take the missing room
        fsync_path(path.parent)
    except SlidetlError:
        raise
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {describe_full(error)}") from error


def _put(partial: Path, path: Path) -> None:
    try:
        partial.replace(path)
    except OSError as error:
        if error.errno not in _HELD or not path.exists():
            raise
        raise FileHeldError(
            f"{path}: cannot be replaced ({error.strerror}); is it open in another program? Close it there"
        ) from error


@contextmanager
def postponed() -> Iterator[None]:
    """Warns once of a file that another program has open, instead of ending a run that writes it again."""
    try:
        yield
    except FileHeldError as error:
        _warn_once(f"{error}; this run tries again")


def paced(write: Callable[[], None]) -> Callable[[], None]:
    """Returns ``write``, for after each row of a table that is written whole: it takes a tenth of the time.

    Calls before a write is due do nothing, so write once more at the end. A file that another program has
    open is written by a later call, :func:`postponed`.
    """
    due = -math.inf

    def write_if_due() -> None:
        nonlocal due
        started = time.monotonic()
        if started < due:
            return
        with postponed():
            write()
        ended = time.monotonic()
        due = ended + max(_LEAST_SECONDS, _LEAST_DURATIONS * (ended - started))

    return write_if_due


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=4)


def check_writable(path: Path) -> None:
    """Checks before long work that a file can be written; leaves neither it nor a folder.

    Raises:
        OutputError: it cannot be written.
    """
    if path.is_dir():
        raise OutputError(f"{path}: expected the name of a file to write, not of a folder")
    trial = partial_path(path)
    missing = [folder for folder in path.parents if not os.path.lexists(folder)]
    top = partial_path(missing[-1]) if missing else None
    if top is not None:  # not under its own name, as another process may be about to write there
        trial = top / trial.relative_to(missing[-1])
    try:
        trial.parent.mkdir(parents=True, exist_ok=True)
        trial.unlink(missing_ok=True)
        trial.open("xb").close()
        trial.unlink()
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {describe_full(error)}") from error
    finally:
        if top is not None:
            shutil.rmtree(top, ignore_errors=True)


def partial_path(path: Path) -> Path:
    """Names the file that this process writes to replace ``path``: no other machine or container has it."""
    host = zlib.crc32(socket.gethostname().encode())
    return path.with_name(f".{path.name}.{host:08x}-{os.getpid()}.partial")


def write_whole(path: Path, content: str | bytes | memoryview) -> None:
    """Writes a file, whole or not at all; text as UTF-8.

    Raises:
        OutputError: the file cannot be written.
    """
    with replaced(path) as file:
        file.write(content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content)


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes a CSV file, whole or not at all; its text is harmless to a spreadsheet.

    Args:
        path: the file.
        columns: in order.
        rows: by column; a missing column, None or NaN is empty.

    Raises:
        OutputError: the file cannot be written.
    """
    write_whole(path, csv_text(columns, rows))


def csv_text(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    """Returns the content of a CSV file, as :func:`write_csv` writes it."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: csv_cell(value) for name, value in row.items()})
    return text.getvalue()


def csv_rows(lines: Iterable[str]) -> list[dict[str, str]]:
    """Reads rows of :func:`write_csv` by column, as they were given; a missing cell is empty.

    Raises:
        csv.Error: it is no CSV.
    """
    reader = csv.DictReader(lines, restval="")
    return [{name: plain_cell(cell) for name, cell in row.items() if name is not None} for row in reader]


def is_sha256(text: str) -> bool:
    """Tells a SHA-256, in hexadecimal and small letters, from other text."""
    return re.fullmatch("[0-9a-f]{64}", text) is not None


def file_sha256(path: Path) -> str:
    """Returns the SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync_path(path: Path) -> None:
    """Makes a file's content durable, or the names in a folder, as far as its file system can."""
    try:
        descriptor = os.open(path, os.O_RDWR)  # SMB flushes nothing that was opened for reading
    except OSError:  # a folder, or a file that is read-only
        descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Shares that cannot sync a folder say so by many numbers: EINVAL, EBADF, ENOTSUP, EIO (WSL). At worst
        # a power cut takes the newest names; the content of files is synced with them, and fails with them.
        if is_full(error) or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def sync_file_system(folder: Path) -> None:
    """Makes durable all that was written to the file system of a folder.

    Raises:
        OSError: it cannot do so, or could not.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        if ctypes.CDLL(None, use_errno=True).syncfs(descriptor):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), str(folder))
    finally:
        os.close(descriptor)


def is_full(error: BaseException) -> bool:
    """Tells if the disk, or the user's quota, is full."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def full_disk(error: BaseException) -> OSError | None:
    """Returns the error of a full disk behind an error; None if there is none."""
    cause: BaseException | None = error
    while cause is not None and not is_full(cause):
        cause = cause.__cause__ or cause.__context__
    return cause if isinstance(cause, OSError) else None


def describe_full(error: OSError) -> str:
    """Describes an error of writing, with the remedy if the disk is full."""
    if not is_full(error):
        return error.strerror or str(error)
    return "the disk is full; make room and run again: what was written before is kept"


def parse_xml(data: str | bytes) -> ElementTree.Element:
    """Parses XML of a stranger: without a document type, so no entity grows or opens another file.

    Raises:
        ValueError: it is damaged, or has a document type.
    """
    text = data if isinstance(data, str) else _decode_xml(data)
    if "<!DOCTYPE" in text or "<!ENTITY" in text:
        raise ValueError("its XML has a document type, which none needs")
    try:
        # As text: the encoding that the XML declares cannot hide what was looked for.
        return ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        raise ValueError(f"its XML is damaged: {error}") from error


def _decode_xml(data: bytes) -> str:
    try:
        return data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("latin-1")


def check_stored(path: Path) -> None:
    """Checks an archive of torch for compressed parts, as they would grow when read.

    Raises:
        ValueError: it is compressed, or larger than its file.
        BadZipFile: it is damaged.
    """
    with zipfile.ZipFile(path) as archive:
        parts = archive.infolist()
    if any(part.compress_type != zipfile.ZIP_STORED for part in parts):
        raise ValueError("its parts are packed, as torch never writes them")
    if sum(part.file_size for part in parts) > path.stat().st_size:
        raise ValueError("its parts say that they are larger than the file")


def check_safetensors(path: Path) -> None:
    """Checks the length of the header of a safetensors file.

    Raises:
        ValueError: it is longer than the file or than any network needs.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    size = path.stat().st_size
    if not 2 <= length <= min(size - 8, _MAX_SAFETENSORS_HEADER_BYTES):
        raise ValueError(
            f"its header has {length} bytes, expected 2 to {_MAX_SAFETENSORS_HEADER_BYTES} and within the "
            f"file of {size}"
        )


def array_header(archive: zipfile.ZipFile, name: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Reads shape and type of an array in an ``.npz``, without its values.

    Raises:
        ValueError: no array of NumPy, or a header larger than any array needs.
        KeyError: no array of this name.
    """
    with archive.open(f"{name}.npy") as stream:
        # NumPy reads a header whole before it finds it too long; packed, 4 GB of spaces are 4 MB.
        start = stream.read(12)
        length = int.from_bytes(start[8:10] if start[6:7] == b"\x01" else start[8:12], "little")
        if length > _MAX_NPY_HEADER_BYTES:
            raise ValueError(f"{name} has a header of {length} bytes, more than {_MAX_NPY_HEADER_BYTES}")
    with archive.open(f"{name}.npy") as stream:
        version = np.lib.format.read_magic(stream)
        headers = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}
        if version[0] not in headers:
            raise ValueError(f"{name} is of version {version[0]} of the format, expected 1 or 2")
        try:
            shape, _, dtype = headers[version[0]](stream)
        except Exception as error:  # of Python's parser: SyntaxError, TokenError, RecursionError, ...
            raise ValueError(f"{name} has a header that cannot be read: {error}") from error
    return shape, dtype


def read_packed_array(archive: zipfile.ZipFile, name: str, most_bytes: int) -> NDArray[Any]:
    """Reads an array in an ``.npz``, of at most ``most_bytes``; never a pickle, as it could run code.

    Raises:
        ValueError: it would take more, or is no array.
        KeyError: no array of this name.
    """
    shape, dtype = array_header(archive, name)
    wanted = int(np.prod(shape, dtype=object)) * dtype.itemsize
    if not 0 <= wanted <= most_bytes:
        raise ValueError(f"{name} would take {wanted} bytes, more than {most_bytes}")
    with archive.open(f"{name}.npy") as stream:
        return np.asarray(np.lib.format.read_array(stream, allow_pickle=False))


def read_yaml(path: Path, what: str, expected: str) -> dict[str, Any]:
    """Reads a YAML file of named values.

    Args:
        path: the file.
        what: it describes, for messages: "a comparison".
        expected: names of values in it, and where there is an example, for messages.

    Raises:
        UsageError: it cannot be read, holds no named values, or has a key twice.
    """
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
        check_keys(text, path)
        values = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"{path}: expected the YAML of {what}: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UsageError(f"{path}: expected {expected}")
    return values


def check_keys(text: str, path: str | os.PathLike[str]) -> None:
    """Refuses YAML with a key twice in one block, where a reader silently drops the first value.

    Args:
        text: the YAML.
        path: its file, for messages.

    Raises:
        UsageError: a key is there twice; the message has its lines.
        YAMLError: it is no YAML.
    """
    import yaml

    # Of nodes, not values: a merge (<<) may repeat keys, as those of its own block then count.
    nodes, seen = [yaml.compose(text, Loader=yaml.SafeLoader)], set[int]()
    while nodes:
        node = nodes.pop()
        if id(node) in seen or not isinstance(node, yaml.CollectionNode):
            continue
        seen.add(id(node))  # an alias stands for the node of its anchor, which may hold the alias
        if isinstance(node, yaml.SequenceNode):
            nodes += node.value
            continue
        lines: dict[tuple[str, str], int] = {}
        for key, value in node.value:
            nodes.append(value)
            name, line = (key.tag, str(key.value)), key.start_mark.line + 1
            if name in lines and key.tag != "tag:yaml.org,2002:merge":
                raise UsageError(
                    f"{path}: {key.value!r} is on line {lines[name]} and again on line {line}, and only "
                    "one of them would count; join the two"
                )
            lines[name] = line
