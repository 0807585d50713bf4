"""What the hospitals agreed on in public: who adds noise, how they train, what it may cost."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TypeVar

from dpfl_flower import checks
from dpfl_flower.client import DPSGDConfig

T = TypeVar("T", bool, int, float, str)


class Trust(StrEnum):
    """Who adds the noise."""

    LOCAL = "local"
    """Every hospital adds all of its own to each of its answers."""
    DISTRIBUTED = "distributed"
    """Every hospital adds a share, and masks: the coordinator sees one noisy sum."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The app's run configuration, parsed; every value is public and the same in every hospital.

    Attributes
    ----------
    trust
        Who adds the noise.
    num_hospitals
        Nodes to wait for.
    min_hospitals
        Under distributed trust, the fewest hospitals in a sum: with fewer a round is abandoned,
        and so many shares are what a patient's protection counts on. Unused under local trust.
    rosters
        Under distributed trust, whether every hospital has a roster of the others' keys: they then
        also sign who survived a round.
    num_rounds
        Rounds; each is one full-batch DP-SGD step in every hospital.
    learning_rate
        Of that step.
    server_momentum
        Of the average of the hospitals' steps.
    clip_norm
        Bounds one patient's gradient in L2.
    expected_patients
        What every hospital divides its noisy sum by (under distributed trust, the coordinator, so
        many for each hospital): a public guess, not its number of patients.
    target_epsilon, target_delta
        What a hospital may spend on its patients over all runs in its ledger.
    split_seed
        Decides, with a patient's id, who is held out.
    run_dir
        Where the result goes and, for the packaged sample, the hospitals' ledgers.
    """

    trust: Trust
    num_hospitals: int
    min_hospitals: int
    rosters: bool
    num_rounds: int
    learning_rate: float
    server_momentum: float
    clip_norm: float
    expected_patients: float
    target_epsilon: float
    target_delta: float
    split_seed: int
    run_dir: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "trust", checks.choice(Trust, trust=self.trust))
        checks.positive_int(num_hospitals=self.num_hospitals, num_rounds=self.num_rounds)
        checks.positive_int(min_hospitals=self.min_hospitals)
        if self.trust is Trust.DISTRIBUTED:
            checks.at_most(self.num_hospitals, min_hospitals=self.min_hospitals)
        checks.positive(learning_rate=self.learning_rate)
        checks.non_negative(server_momentum=self.server_momentum)
        checks.non_negative_int(split_seed=self.split_seed)
        self.dp_sgd()  # checks what is left

    @classmethod
    def parse(cls, run_config: Mapping[str, bool | float | int | str]) -> "Settings":
        """Read Flower's ``run_config``; raise a ValueError that names a missing or wrong key."""

        def read(key: str, kind: type[T]) -> T:
            value = run_config.get(key)
            accepted = (int, float) if kind is float else kind
            if isinstance(value, bool) is not (kind is bool) or not isinstance(value, accepted):
                raise ValueError(f"run config {key}={value!r} must be of type {kind.__name__}")
            return kind(value)

        return cls(
            trust=checks.choice(Trust, trust=read("trust", str)),
            num_hospitals=read("num-hospitals", int),
            min_hospitals=read("min-hospitals", int),
            rosters=read("rosters", bool),
            num_rounds=read("num-server-rounds", int),
            learning_rate=read("learning-rate", float),
            server_momentum=read("server-momentum", float),
            clip_norm=read("clip-norm", float),
            expected_patients=read("expected-patients", float),
            target_epsilon=read("target-epsilon", float),
            target_delta=read("target-delta", float),
            split_seed=read("split-seed", int),
            run_dir=Path(read("run-dir", str)),
        )

    def dp_sgd(self) -> DPSGDConfig:
        """Return what every hospital trains with: all patients in every step, one step a round."""
        return DPSGDConfig(
            sampling_rate=1.0,
            steps_per_round=1,
            planned_rounds=self.num_rounds,
            clip_norm=self.clip_norm,
            expected_batch_size=self.expected_patients,
            delta=self.target_delta,
            target_epsilon=self.target_epsilon,
        )
