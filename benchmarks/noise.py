"""A million rounded-Gaussian draws against ``torch.randn``: ``python -m benchmarks.noise``.

The bar: cryptographic, exact integer noise within 5 times torch's seeded float32 noise, one thread.
"""

import time

import numpy as np
import torch

from benchmarks import compare
from dpfl_flower.noise import RoundedGaussian, RoundedLaplace
from dpfl_flower.rng import secure

DRAWS = 1_000_000
SCALE = 2**14


def main() -> None:
    """Print the table and the ratio."""
    compare.one_thread()
    rng = secure()
    gaussian, laplace = RoundedGaussian(SCALE), RoundedLaplace(SCALE)
    numpy_generator = np.random.default_rng()
    ours, theirs = f"RoundedGaussian({SCALE})", "torch.randn float32"
    timings = compare.compare(
        {
            ours: lambda: gaussian.sample(DRAWS, rng),
            f"RoundedLaplace({SCALE})": lambda: laplace.sample(DRAWS, rng),
            "rng.gaussian float64": lambda: rng.gaussian(DRAWS),
            "rng.uint64, the words alone": lambda: rng.uint64(DRAWS),
            "NumPy PCG64 float64": lambda: numpy_generator.standard_normal(DRAWS),
            theirs: lambda: torch.randn(DRAWS),
        },
        repeats=15,
        warmups=2,
        clock=time.process_time,  # one thread: CPU time, which other loads disturb least
    )
    title = f"{DRAWS:,} draws, CPU time; ours from AES-256-CTR, exact on the integers"
    compare.report(timings, ours=ours, theirs=theirs, bar=5, title=title)


if __name__ == "__main__":
    main()
