"""The films there are, from the public catalogue: what may be rated, never what was.

A model's arrays have a place for each film of the catalogue, rated or not. Were the list made of
the ratings, its length alone would say that somebody rated the film nobody else did.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from .table import Row, read_rows

FILE: Final = "ml-100k.item"
COLUMNS: Final = ("item_id", "movie_title", "release_year", "class")
"""What a catalogue must hold."""

_NEW: Final = 1995
_DECADES_OLD: Final = (-1.0, 6.0)


@dataclass(frozen=True)
class Film:
    """One line of the catalogue; ``year`` is None where it is not known."""

    id: str
    title: str
    year: int | None
    genres: tuple[str, ...]

    @property
    def decades_old(self) -> float:
        """Age in decades before 1995, cut off at -1 and 6; 0 where the year is not known."""
        if self.year is None:
            return 0.0
        low, high = _DECADES_OLD
        return min(high, max(low, (_NEW - self.year) / 10))


@dataclass(frozen=True)
class Catalogue:
    """All films, in the order of the file, which is the order in the model's arrays."""

    films: tuple[Film, ...]

    def __len__(self) -> int:
        return len(self.films)

    @cached_property
    def places(self) -> Mapping[str, int]:
        """Where each film stands, by id."""
        return {film.id: place for place, film in enumerate(self.films)}

    @cached_property
    def genres(self) -> tuple[str, ...]:
        """The genres that occur, in alphabetical order."""
        return tuple(sorted({genre for film in self.films for genre in film.genres}))

    @cached_property
    def traits(self) -> NDArray[np.float64]:
        """What is publicly known of each film: genres as 0 or 1, then its age in decades.

        Shape ``(films, genres + 1)``.
        """
        table = np.zeros((len(self.films), len(self.genres) + 1))
        column = {genre: number for number, genre in enumerate(self.genres)}
        for row, film in zip(table, self.films, strict=True):
            row[[column[genre] for genre in film.genres]] = 1.0
            row[-1] = film.decades_old
        return table


def read_catalogue(path: Path) -> Catalogue:
    """Return the films of a catalogue file.

    Raises
    ------
    ValueError
        Naming the column and the line: a film comes twice, has no title, or a year that is none;
        or the file is not a table.
    OSError
        The file cannot be opened.
    """
    films: dict[str, Film] = {}
    for row in read_rows(path, COLUMNS):
        film = Film(
            id=row.token("item_id"),
            title=row.token("movie_title"),
            year=_year(row),
            genres=tuple(row.cells["class"].split()),
        )
        if film.id in films:
            raise row.wrong("item_id", f"{film.id!r} is in the catalogue twice")
        films[film.id] = film
    if not films:
        raise ValueError(f"{path}: no films")
    return Catalogue(tuple(films.values()))


def _year(row: Row) -> int | None:
    cell = row.cells["release_year"].strip()
    # The packaged catalogue has one film without a year and one whose year is "V".
    if not cell.isdigit():
        return None
    return int(row.number_in("release_year", 1870, 2100))
