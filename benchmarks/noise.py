"""A million integer draws against ``torch.randn`` and OpenDP: ``python -m benchmarks.noise``.

The bars: cryptographic, exact integer noise within 5 times torch's seeded float32 noise; the
discrete Gaussian in at most 1/300 of the time of OpenDP's exact sampler. One thread.
"""

import time

import numpy as np
import opendp.prelude as opendp
import torch

from benchmarks import compare
from dpfl_flower.noise import DiscreteGaussian, RoundedGaussian, RoundedLaplace, Skellam
from dpfl_flower.rng import secure

DRAWS = 1_000_000
SCALE = 2**14
OPENDP_DRAWS = 10_000  # a hundredth of the others', multiplied out: it takes seconds as it is


def main() -> None:
    """Print the table and the ratio."""
    compare.one_thread()
    rng = secure()
    gaussian, laplace = RoundedGaussian(SCALE), RoundedLaplace(SCALE)
    discrete, skellam = DiscreteGaussian(SCALE**2), Skellam(SCALE**2)
    numpy_generator = np.random.default_rng()
    ours, theirs = f"RoundedGaussian({SCALE})", "torch.randn float32"
    timings = compare.compare(
        {
            ours: lambda: gaussian.sample(DRAWS, rng),
            f"DiscreteGaussian({SCALE}^2)": lambda: discrete.sample(DRAWS, rng),
            f"Skellam({SCALE}^2)": lambda: skellam.sample(DRAWS, rng),
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
    median = {timing.name: timing.median for timing in timings}
    ours_discrete = median[f"DiscreteGaussian({SCALE}^2)"]
    compare.print_ratio(ours_discrete / median[theirs], bar=5)
    exact = _opendp_seconds()
    print(f"OpenDP's discrete Gaussian: {1e3 * exact:.0f} ms for {DRAWS:,}")
    print(f"ratio {ours_discrete / exact:.6f} bar {1 / 300:.6f}")


def _opendp_seconds() -> float:
    """Return the CPU time of OpenDP's exact sampler for as many draws."""
    opendp.enable_features("contrib")
    space = opendp.vector_domain(opendp.atom_domain(T=int)), opendp.l2_distance(T=int)
    sample = opendp.m.make_gaussian(*space, scale=float(SCALE))
    zeros = [0] * OPENDP_DRAWS
    (timing,) = compare.compare(
        {"OpenDP": lambda: sample(zeros)}, repeats=5, clock=time.process_time
    )
    return timing.median * DRAWS / OPENDP_DRAWS


if __name__ == "__main__":
    main()
