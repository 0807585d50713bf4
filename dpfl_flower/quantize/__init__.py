"""Floats to integers and back: the grid, the public dither and the exact bounded sum."""

from dpfl_flower.quantize.bounded_sum import BoundedSum
from dpfl_flower.quantize.grid import IntegerGrid, Rounding, to_float

__all__ = ["BoundedSum", "IntegerGrid", "Rounding", "to_float"]
