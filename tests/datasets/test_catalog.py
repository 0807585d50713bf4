"""The catalog is complete, and a wrong name is answered with the right ones."""

import re
from pathlib import PurePosixPath

import pytest

from dpfl_flower.datasets import CATALOG, DataSet, look_up

SHA256 = re.compile(r"[0-9a-f]{64}")


@pytest.mark.parametrize("data", CATALOG.values(), ids=lambda data: data.name)
def test_an_entry_pins_its_wheel_and_each_file_and_states_its_terms(data: DataSet) -> None:
    assert SHA256.fullmatch(data.wheel_sha256)
    assert data.files
    for name, digest in data.files.items():
        assert PurePosixPath(name).name == name  # a bare name: nothing can leave the folder
        assert SHA256.fullmatch(digest)
    folder = PurePosixPath(data.folder)
    assert not folder.is_absolute()
    assert ".." not in folder.parts
    assert data.licence
    assert data.citation
    assert data.requirement == f"{data.distribution}=={data.version}"


def test_every_name_leads_to_its_own_entry() -> None:
    assert all(look_up(name).name == name for name in CATALOG)


def test_an_unknown_name_is_answered_with_the_names_there_are() -> None:
    with pytest.raises(
        ValueError, match=r"name='ml-1m' must be one of \['akl-pedestrians', .*'ml-"
    ):
        look_up("ml-1m")
