"""Floats to integers and back: the grids, the public dither and rotation, the exact sums."""

from dpfl_flower.quantize.bounded_sum import BoundedSum
from dpfl_flower.quantize.distributed_grid import DistributedGrid
from dpfl_flower.quantize.distributed_sum import DistributedSum, decoded
from dpfl_flower.quantize.grid import USUAL_NOISE_UNITS, IntegerGrid, Rounding, to_float
from dpfl_flower.quantize.modular import centred, reduced
from dpfl_flower.quantize.rotation import Rotation

__all__ = [
    "USUAL_NOISE_UNITS",
    "BoundedSum",
    "DistributedGrid",
    "DistributedSum",
    "IntegerGrid",
    "Rotation",
    "Rounding",
    "centred",
    "decoded",
    "reduced",
    "to_float",
]
