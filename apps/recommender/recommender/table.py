"""Reads tab-separated tables whose first line names and types the columns (``user_id:token``).

A file that cannot be read as it should raises a ValueError that names the column and the line. The
message may quote the cell: it is for the node's own log and must not leave the node.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Row:
    """One line of a table: its cells by column, and how to complain about one."""

    cells: Mapping[str, str]
    number: int
    path: Path

    def wrong(self, column: str, why: str) -> ValueError:
        """Return the error that says what is wrong with a cell."""
        return ValueError(f"{self.path}: column {column!r}, line {self.number}: {why}")

    def token(self, column: str) -> str:
        """Return a cell that may not be empty."""
        cell = self.cells[column].strip()
        if not cell:
            raise self.wrong(column, "empty")
        return cell

    def number_in(self, column: str, low: float, high: float) -> float:
        """Return a cell's number, checked against its bounds."""
        cell = self.token(column)
        try:
            value = float(cell)
        except ValueError:
            raise self.wrong(column, f"{cell!r} is not a number") from None
        if not (math.isfinite(value) and low <= value <= high):
            raise self.wrong(column, f"{cell!r} must lie between {low:g} and {high:g}")
        return value


def read_rows(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    """Yield the lines of a table; the header is line 1, further columns are not read.

    Raises
    ------
    ValueError
        A column is missing or comes twice, a line has too few or too many cells, the file is empty
        or not UTF-8.
    OSError
        The file cannot be opened.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a UTF-8 text file ({error})") from error
    header = [name.split(":")[0].strip() for name in lines[0].split("\t")]
    for column in columns:
        if (times := header.count(column)) != 1:
            fault = "is missing" if times == 0 else f"comes {times} times"
            raise ValueError(f"{path}: column {column!r}, line 1: {fault}")
    for number, line in enumerate(lines[1:], start=2):
        if not line.strip():
            continue
        cells = line.rstrip("\r").split("\t")
        if len(cells) != len(header):
            raise ValueError(
                f"{path}: line {number}: {len(cells)} cells, but line 1 names {len(header)} columns"
            )
        yield Row(dict(zip(header, cells, strict=True)), number=number, path=path)
