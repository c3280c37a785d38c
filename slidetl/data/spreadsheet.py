"""Reads tables exported by spreadsheets and statistics programs."""

from __future__ import annotations

import codecs
import csv
import io
import re
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from slidetl.errors import ManifestError
from slidetl.text import plain_cell

_SEPARATORS = ",;\t|"
_BYTE_ORDER_MARKS = {  # longer ones first: the mark of UTF-16 begins the one of UTF-32
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
    codecs.BOM_UTF8: "utf-8-sig",
}
_FORMULA_OF_TEXT = re.compile(r'^="([^"]*)"$')  # ="0012", which keeps zeros in a spreadsheet
# #REF!, German #BEZUG!, Spanish #¡REF!, Czech #NENÍ_K_DISPOZICI; LibreOffice's Err:502; a narrow column's ##.
# Of two or three letters alone only German #NV and Turkish #YOK: #A and #B are the labels of blocks.
_ERROR = re.compile(
    r"#(#+|[¡¿]\S+|NV|YOK|[^\W\d_](?=.{3}|.*[/!?])(?:[^\W\d]|/0?)*[!?]?)|Err:\d{3}", re.IGNORECASE
)
_NO_TEXT = {
    b"PK\x03\x04": "a workbook (.xlsx, .ods) or another zip file",
    b"\xd0\xcf\x11\xe0": "an Excel workbook (.xls)",
    b"\x1f\x8b": "a gzip file",
    b"%PDF": "a PDF",
}


@dataclass(frozen=True)
class Table:
    """A table of text.

    Attributes:
        header: names of the columns; known ones as requested, others as in the file.
        rows: first line (the header usually has 1) and cells of each row. Cells have no outer blanks, rows no
            empty cells beyond the header.
        separator: of the cells.
    """

    header: tuple[str, ...]
    rows: tuple[tuple[int, tuple[str, ...]], ...]
    separator: str = ","

    def unclear_numbers(self, column: str) -> set[str]:
        """Finds the numbers of a column that may have a separator of thousands, such as 1,050 or 1.050.

        None is unclear if another with the same mark, such as 0.253 or 12.5, shows that it is decimal, and no
        number has the other mark. Commas usually come with decimal points and semicolons with decimal commas:
        such marks are unclear only beside the other one, or beside whole numbers that are all below 1000
        (950, 1.050).
        """
        if column not in self.header:
            return set()
        at = self.header.index(column)
        found = {cells[at] for _, cells in self.rows if len(cells) == len(self.header)}
        wholes = set(filter(re.compile(r"[+-]?\d+").fullmatch, found))
        is_mixed = bool(wholes) and all(abs(int(whole)) < 1000 for whole in wholes)
        usual = {",": ".", ";": ","}.get(self.separator)
        unclear: set[str] = set()
        for mark, other in (".,", ",."):
            grouped = set(filter(re.compile(rf"[+-]?[1-9]\d{{0,2}}[{mark}]\d{{3}}").fullmatch, found))
            decimal = re.compile(rf"[+-]?\d*[{mark}]\d*([Ee][+-]?\d+)?")
            is_decimal = any(map(decimal.fullmatch, found - grouped)) or (mark == usual and not is_mixed)
            if not is_decimal or any(other in cell for cell in found):
                unclear |= grouped
        return unclear


def is_error(cell: str) -> bool:
    """Tells if a cell has the error value of a spreadsheet, in any language; ``#12`` and ``#A`` are none."""
    return _ERROR.fullmatch(cell) is not None


def read_table(path: Path, required: Iterable[str], optional: Iterable[str] = ()) -> Table:
    """Reads a table: CSV in UTF-8, UTF-16 or Windows-1252, separated by commas, semicolons, tabs or bars.

    Case, blanks, ``-`` and ``_`` make no difference in the names of known columns. A first line ``sep=;``
    names the separator. Columns without a name and empty lines are skipped.

    Args:
        path: the file.
        required: columns the file must have.
        optional: further known columns.

    Raises:
        ManifestError: it is no such table, a required column is missing, or a column occurs twice.
    """
    required = tuple(required)
    text = _decode(path)
    first, separator = 1, ""
    if named := re.match(r'"?sep=(.)"?(?:\r\n|\r|\n)', text):
        first, separator, text = 2, named[1], text[named.end() :]
    separator = separator or _separator(path, text, required)
    lines = _rows(path, text, separator, first)
    if not lines:
        raise ManifestError(f"{path}: the file is empty; expected a header with {', '.join(required)}")
    spelled = {_folded(name): name for name in (*required, *optional)}
    header = [spelled.get(_folded(cell), cell) for cell in lines[0][1]]
    missing = [name for name in required if name not in header]
    where = f"{path}, line {lines[0][0]}"
    if missing:
        raise ManifestError(f"{where}: missing column {', '.join(missing)}; found {', '.join(header)}")
    repeated = [name for name, count in Counter(filter(None, header)).items() if count > 1]
    if repeated:
        raise ManifestError(f"{where}: column {', '.join(repeated)} occurs more than once")
    named_columns = [index for index, name in enumerate(header) if name]

    def cells_of(cells: tuple[str, ...]) -> tuple[str, ...]:
        while len(cells) > len(header) and not cells[-1]:
            cells = cells[:-1]
        return tuple(cells[i] for i in named_columns) if len(cells) == len(header) else cells

    return Table(
        tuple(header[index] for index in named_columns),
        tuple((line, cells_of(cells)) for line, cells in lines[1:]),
        separator,
    )


def _decode(path: Path) -> str:
    data = path.read_bytes()
    for start, what in _NO_TEXT.items():
        if data.startswith(start):
            raise ManifestError(
                f"{path}: expected a CSV, found {what}; save the table as CSV, in Excel 'CSV UTF-8'"
            )
    encoding = next((name for mark, name in _BYTE_ORDER_MARKS.items() if data.startswith(mark)), "")
    if not encoding and b"\0" in data[:2]:  # the first letter is ASCII
        encoding = "utf-16-be" if data.startswith(b"\0") else "utf-16-le"
    try:
        return data.decode(encoding or "utf-8")
    except UnicodeDecodeError as error:
        no_utf8 = error
    try:
        if encoding:
            raise no_utf8
        text = data.decode("cp1252")
    except UnicodeDecodeError:
        raise ManifestError(f"{path}: expected a CSV in UTF-8 ({no_utf8}); save it as such") from no_utf8
    around = r"[^\s,;|\"]*"
    place = no_utf8.start
    before, after = re.search(f"{around}$", text[:place]), re.match(around, text[place:])
    assert before and after  # of any length
    warnings.warn(
        f"{path}: not UTF-8, read as Windows-1252 ({before[0] + after[0]!r}); if letters come out wrong, "
        "save it as 'CSV UTF-8'",
        stacklevel=5,
    )
    return text


def _separator(path: Path, text: str, required: tuple[str, ...]) -> str:
    """Chooses the separator for the most required columns; the comma by default."""
    wanted = {_folded(name) for name in required}

    def found(separator: str) -> int:
        header = next((cells for _, cells in _rows(path, text, separator, 1, only_first=True)), ())
        return len(wanted & {_folded(cell) for cell in header})

    return max(_SEPARATORS, key=found)


def _rows(
    path: Path, text: str, separator: str, first: int, only_first: bool = False
) -> list[tuple[int, tuple[str, ...]]]:
    """Splits text into non-empty rows, each with its first line."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=not only_first, delimiter=separator)
    rows: list[tuple[int, tuple[str, ...]]] = []
    begins = first  # an open quote extends a row to the end of the file
    try:
        for cells in reader:
            texts = (_FORMULA_OF_TEXT.sub(r"\1", cell.strip()).strip() for cell in cells)
            row = tuple(plain_cell(text).strip() for text in texts)
            if any(row):
                rows.append((begins, row))
                if only_first:
                    break
            begins = reader.line_num + first
    except csv.Error as error:
        raise ManifestError(
            f"{path}, line {begins}: expected a row of a CSV, found a fault ({error}); check its quotes"
        ) from error
    return rows


def _folded(name: str) -> str:
    return re.sub(r"[\s_-]+", "", name).casefold()
