"""Units that no honest program would send, for claims about what one unit can do."""

import numpy as np
import torch
from numpy.typing import NDArray

Released = list[NDArray | torch.Tensor]

UNIT_KINDS = (
    "normal",
    "zero",
    "features of 1e5",
    "all missing",
    "one missing",
    "infinite",
    "huge",
    "alternating huge",
    "tiny",
    "subnormal",
    "one coordinate",
    "on the clip norm",
    "halves",
)
"""What may be wrong with a unit's update; "halves" has every entry at the point of rounding."""


def unit_arrays(
    kind: str, seed: int, dtype: str, dimension: int, clip_norm: float
) -> tuple[Released, Released | None]:
    """Return a unit's arrays and the reference to subtract, of ``dimension`` entries in all."""
    rng = np.random.default_rng(seed)
    vector = _vector(kind, rng, dimension, clip_norm)
    with np.errstate(all="ignore"):
        values = _cast(vector, dtype)
        if seed % 2:
            return _split(values, seed), None
        reference = _cast(rng.normal(size=dimension), "float32")
        if kind in {"one missing", "infinite", "huge"} and seed % 4 == 0:
            reference[0] = 3e38
        return _split(values, seed), _split(reference, seed)


def _vector(kind: str, rng: np.random.Generator, d: int, clip_norm: float) -> NDArray[np.float64]:
    noise = rng.normal(size=d)
    one = np.zeros(d)
    one[rng.integers(d)] = 1.0
    signs = np.where(np.arange(d) % 2, 1.0, -1.0)
    match kind:
        case "normal":
            return noise * clip_norm * rng.choice([0.01, 1.0, 100.0])
        case "zero":
            return np.zeros(d)
        case "features of 1e5":
            return noise * 1e5
        case "all missing":
            return np.full(d, np.nan)
        case "one missing":
            return np.where(one > 0, np.nan, noise)
        case "infinite":
            return np.where(one > 0, rng.choice([np.inf, -np.inf]), noise)
        case "huge":
            return np.full(d, rng.choice([1e30, 3e38, 1e300, 1.7e308]))
        case "alternating huge":
            return signs * rng.choice([6e4, 1e19, 1e154, 1e200])
        case "tiny":
            return noise * 1e-23
        case "subnormal":
            return noise * 1e-310
        case "one coordinate":
            return one * clip_norm * rng.choice([0.5, 1.0, 1e9])
        case "on the clip norm":
            return noise / np.linalg.norm(noise) * clip_norm * rng.choice([1 - 1e-7, 1.0, 1 + 1e-7])
        case "halves":
            # Rounding moves every entry by half a unit, the same way: the longest it can be.
            unit = clip_norm / 2**14
            return np.full(d, unit * (rng.integers(0, 3) + 0.5 + rng.choice([-1e-9, 0, 1e-9])))
        case _:
            raise ValueError(kind)


def _cast(vector: NDArray[np.float64], dtype: str) -> NDArray | torch.Tensor:
    if dtype == "bfloat16":
        return torch.from_numpy(vector).to(torch.bfloat16)
    return vector.astype(dtype)


def _split(vector: NDArray | torch.Tensor, seed: int) -> Released:
    """Return the vector as one array, or as several with a 0-d one among them."""
    d = vector.shape[0]
    if d < 3 or seed % 3 == 0:
        return [vector]
    cut = 1 + seed % (d - 2)
    return [vector[:cut], vector[cut].reshape(()), vector[cut + 1 :].reshape(1, -1)]
