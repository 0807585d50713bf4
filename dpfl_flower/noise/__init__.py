"""Noise on the integers, drawn exactly from cryptographic randomness."""

from dpfl_flower.noise.discrete_gaussian import DiscreteGaussian
from dpfl_flower.noise.distribution import NoiseDistribution
from dpfl_flower.noise.rounded_gaussian import RoundedGaussian
from dpfl_flower.noise.rounded_laplace import RoundedLaplace
from dpfl_flower.noise.skellam import Skellam
from dpfl_flower.noise.table import TableSampler

__all__ = [
    "DiscreteGaussian",
    "NoiseDistribution",
    "RoundedGaussian",
    "RoundedLaplace",
    "Skellam",
    "TableSampler",
]
