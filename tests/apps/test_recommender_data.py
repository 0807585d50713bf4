"""Ratings: the counts are MovieLens', the films the catalogue's, and one user is one unit."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from apps.recommender.recommender.catalogue import FILE as CATALOGUE_FILE
from apps.recommender.recommender.catalogue import Catalogue, read_catalogue
from apps.recommender.recommender.data import FILE as RATINGS_FILE
from apps.recommender.recommender.data import Split, UserRatings, of_node, read_ratings
from apps.recommender.recommender.task import BIAS, local_update, new_model
from dpfl_flower.datasets import fetch

FILMS = """item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq
10\tHeat\t1995\tAction Crime
7\tM\t1931\tCrime
31\tunkonwn\tunkonwn\t
12\tEmma\t1996\tComedy
"""
HEADER = "user_id:token\titem_id:token\trating:float\ttimestamp:float"
LINES = ("ann\t10\t5\t1", "ann\t12\t3\t2", "bob\t7\t4\t3", "ann\t7\t1\t4", "cem\t10\t2\t5")

Write = Callable[[Sequence[str]], Path]


@pytest.fixture(scope="module")
def folder() -> Path:
    return fetch("ml-100k")


@pytest.fixture(scope="module")
def catalogue(folder: Path) -> Catalogue:
    return read_catalogue(folder / CATALOGUE_FILE)


@pytest.fixture(scope="module")
def users(folder: Path, catalogue: Catalogue) -> tuple[UserRatings, ...]:
    return read_ratings(folder / RATINGS_FILE, catalogue)


@pytest.fixture
def few(tmp_path: Path) -> Catalogue:
    """Four films, one of them without year and genre."""
    (tmp_path / "films").write_text(FILMS)
    return read_catalogue(tmp_path / "films")


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(lines: Sequence[str]) -> Path:
        path = tmp_path / "ratings"
        path.write_text("\n".join([HEADER, *lines]) + "\n")
        return path

    return write


def test_movielens_has_943_users_1682_films_and_100000_ratings(
    users: tuple[UserRatings, ...], catalogue: Catalogue
) -> None:
    assert len(catalogue) == 1682
    assert len(users) == 943
    counts = [len(user) for user in users]
    assert (sum(counts), min(counts), max(counts)) == (100_000, 20, 737)
    assert {star for user in users for star in user.stars} == {1, 2, 3, 4, 5}


def test_traits_are_the_catalogues_genres_and_age(catalogue: Catalogue) -> None:
    assert len(catalogue.genres) == 19
    assert catalogue.traits.shape == (1682, 20)
    toy_story = dict(
        zip((*catalogue.genres, "age"), catalogue.traits[catalogue.places["1"]], strict=True)
    )
    assert {name for name, value in toy_story.items() if value} == {
        "Animation",
        "Children's",
        "Comedy",
    }
    assert catalogue.films[catalogue.places["267"]].year is None  # "unkonwn"
    assert catalogue.films[catalogue.places["1412"]].year is None  # "V"
    assert catalogue.traits[:, -1].min() == pytest.approx(-0.3)
    assert catalogue.traits[:, -1].max() == 6.0


def test_the_films_are_the_catalogues_whatever_was_rated(few: Catalogue, write: Write) -> None:
    assert [film.id for film in few.films] == ["10", "7", "31", "12"]
    everybody = read_ratings(write(LINES), few)
    nearly_nobody = read_ratings(write(LINES[-1:]), few)
    for users in (everybody, nearly_nobody):
        for user in users:
            assert local_update(new_model(few), user)[BIAS].shape == (4,)
    (cem,) = nearly_nobody
    assert cem.places.tolist() == everybody[-1].places.tolist() == [0]


def test_a_users_films_are_in_the_catalogues_order_with_their_traits(
    few: Catalogue, write: Write
) -> None:
    ann, *_ = read_ratings(write(LINES), few)
    assert ann.user == "ann"
    assert ann.places.tolist() == [0, 1, 3]
    assert ann.stars.tolist() == [5, 1, 3]
    np.testing.assert_array_equal(ann.traits, few.traits[[0, 1, 3]])


def test_the_order_of_lines_plays_no_part(few: Catalogue, write: Write) -> None:
    there = read_ratings(write(LINES), few)
    back = read_ratings(write(LINES[::-1]), few)
    assert [user.user for user in there] == [user.user for user in back]
    for one, other in zip(there, back, strict=True):
        np.testing.assert_array_equal(one.places, other.places)
        np.testing.assert_array_equal(one.stars, other.stars)


def test_changing_one_users_ratings_moves_that_users_contribution_only(
    folder: Path, catalogue: Catalogue, tmp_path: Path
) -> None:
    header, *lines = (folder / RATINGS_FILE).read_text().splitlines()
    of_13 = [number for number, line in enumerate(lines) if line.startswith("13\t")]
    for number in of_13[::2]:
        user, film, _, time = lines[number].split("\t")
        lines[number] = "\t".join([user, film, "1", time])
    for number in reversed(of_13[1::2]):
        del lines[number]
    path = tmp_path / "changed"
    path.write_text("\n".join([header, *lines]))
    model = {BIAS: np.linspace(-1, 1, len(catalogue), dtype=np.float32)}

    def contributions(path: Path) -> dict[str, bytes]:
        return {
            user.user: local_update(model, Split.of(user, catalogue, seed=1).training)[
                BIAS
            ].tobytes()
            for user in read_ratings(path, catalogue)
        }

    before, after = contributions(folder / RATINGS_FILE), contributions(path)
    assert before.keys() == after.keys()
    assert [user for user in before if before[user] != after[user]] == ["13"]


def test_removing_one_user_moves_nobody_else(users: tuple[UserRatings, ...]) -> None:
    rest = users[:100] + users[101:]
    for partition in range(4):
        whole = of_node(users, partition=partition, num_partitions=4)
        expected = [user.user for user in whole if user.user != users[100].user]
        found = [user.user for user in of_node(rest, partition=partition, num_partitions=4)]
        assert found == expected


@pytest.mark.parametrize("num_partitions", [1, 2, 7])
def test_every_user_lives_on_one_node(users: tuple[UserRatings, ...], num_partitions: int) -> None:
    nodes = [
        of_node(users, partition=partition, num_partitions=num_partitions)
        for partition in range(num_partitions)
    ]
    assert sorted(user.user for node in nodes for user in node) == [user.user for user in users]
    smallest = min(map(len, nodes))
    assert smallest > 0.7 * len(users) / num_partitions


@pytest.mark.parametrize(("partition", "num_partitions"), [(2, 2), (-1, 2), (0, 0)])
def test_a_node_that_there_is_not_is_refused(partition: int, num_partitions: int) -> None:
    with pytest.raises(ValueError, match="partition"):
        of_node([], partition=partition, num_partitions=num_partitions)


def test_about_a_fifth_of_the_ratings_is_held_out_and_follows_the_seed(
    users: tuple[UserRatings, ...], catalogue: Catalogue
) -> None:
    splits = [Split.of(user, catalogue, seed=1) for user in users]
    held_out = sum(len(split.held_out) for split in splits)
    assert 0.195 < held_out / 100_000 < 0.205
    for user, split in zip(users, splits, strict=True):
        parts = [*split.training.places, *split.held_out.places]
        assert sorted(parts) == user.places.tolist()
    other = Split.of(users[0], catalogue, seed=2)
    assert other.held_out.places.tolist() != splits[0].held_out.places.tolist()


def test_the_stars_do_not_decide_what_is_held_out(
    users: tuple[UserRatings, ...], catalogue: Catalogue
) -> None:
    user = users[0]
    flipped = UserRatings(user.user, user.places, 6 - user.stars, user.traits)
    one, other = (Split.of(who, catalogue, seed=1).held_out for who in (user, flipped))
    assert one.places.tolist() == other.places.tolist()


def test_one_rating_less_moves_no_other_rating_in_or_out(
    users: tuple[UserRatings, ...], catalogue: Catalogue
) -> None:
    user = users[0]
    keep = np.arange(len(user)) != 3
    whole, rest = (
        Split.of(who, catalogue, seed=1).held_out.places for who in (user, user.where(keep))
    )
    assert [place for place in whole if place != user.places[3]] == rest.tolist()


@pytest.mark.parametrize(
    ("line", "column", "why"),
    [
        ("ann\t99\t5\t1", "item_id", "'99' is not in the catalogue"),
        ("ann\t10\t4\t9", "item_id", "'10' is rated twice by the same user"),
        ("dan\t10\t0\t9", "rating", "'0' must lie between 1 and 5"),
        ("dan\t10\t6\t9", "rating", "'6' must lie between 1 and 5"),
        ("dan\t10\tnan\t9", "rating", "'nan' must lie between 1 and 5"),
        ("dan\t10\tgood\t9", "rating", "'good' is not a number"),
        ("dan\t10\t\t9", "rating", "empty"),
        ("\t10\t4\t9", "user_id", "empty"),
    ],
)
def test_a_bad_cell_is_named_by_column_and_line(
    few: Catalogue, write: Write, line: str, column: str, why: str
) -> None:
    with pytest.raises(ValueError, match=rf"ratings: column '{column}', line 7: {why}"):
        read_ratings(write([*LINES, line]), few)


def test_a_line_with_too_few_cells_is_named(few: Catalogue, write: Write) -> None:
    with pytest.raises(ValueError, match="line 3: 2 cells, but line 1 names 4 columns"):
        read_ratings(write([LINES[0], "ann\t12"]), few)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "column 'user_id', line 1: is missing"),
        (HEADER + "\trating:float\n", "column 'rating', line 1: comes 2 times"),
    ],
)
def test_a_wrong_header_is_named(few: Catalogue, tmp_path: Path, text: str, why: str) -> None:
    (tmp_path / "ratings").write_text(text)
    with pytest.raises(ValueError, match=why):
        read_ratings(tmp_path / "ratings", few)


def test_a_file_that_is_not_text_is_named(few: Catalogue, tmp_path: Path) -> None:
    (tmp_path / "ratings").write_bytes(HEADER.encode() + b"\n\xff")
    with pytest.raises(ValueError, match="ratings: not a UTF-8 text file"):
        read_ratings(tmp_path / "ratings", few)


def test_line_ends_and_a_byte_order_mark_of_other_systems_are_fine(
    few: Catalogue, tmp_path: Path
) -> None:
    text = "\r\n".join([HEADER, *LINES, ""])
    (tmp_path / "ratings").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert [user.user for user in read_ratings(tmp_path / "ratings", few)] == ["ann", "bob", "cem"]


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (
            "10\tHeat again\t1995\tAction",
            "column 'item_id', line 6: '10' is in the catalogue twice",
        ),
        ("11\t\t1995\tAction", "column 'movie_title', line 6: empty"),
        ("11\tLater\t2200\tAction", "column 'release_year', line 6: '2200' must lie between"),
    ],
)
def test_a_bad_film_is_named(tmp_path: Path, line: str, why: str) -> None:
    (tmp_path / "films").write_text(FILMS + line + "\n")
    with pytest.raises(ValueError, match=why):
        read_catalogue(tmp_path / "films")


def test_a_catalogue_without_films_is_refused(tmp_path: Path) -> None:
    (tmp_path / "films").write_text(FILMS.splitlines()[0])
    with pytest.raises(ValueError, match="films: no films"):
        read_catalogue(tmp_path / "films")
