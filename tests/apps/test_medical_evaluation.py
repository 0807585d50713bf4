"""The pooled AUC is the exact one, up to ties within a bin."""

import numpy as np
import pytest

from apps.medical.medical.evaluation import BINS, ScoreHistogram


def exact_auc(scores: np.ndarray, labels: np.ndarray) -> float:
    pairs = scores[labels == 1][:, None] - scores[labels == 0][None, :]
    return float(((pairs > 0) + 0.5 * (pairs == 0)).mean())


def test_auc_is_exact_when_every_score_has_a_bin_of_its_own() -> None:
    rng = np.random.default_rng(0)
    scores = (rng.permutation(BINS)[:200] + 0.5) / BINS
    labels = rng.integers(0, 2, 200)
    assert ScoreHistogram.of(scores, labels).auc == pytest.approx(exact_auc(scores, labels))


def test_patients_in_one_bin_are_ties() -> None:
    rng = np.random.default_rng(1)
    scores, labels = rng.random(500), rng.integers(0, 2, 500)
    binned = np.floor(scores * BINS)
    assert ScoreHistogram.of(scores, labels).auc == pytest.approx(exact_auc(binned, labels))
    assert ScoreHistogram.of(scores, labels).auc == pytest.approx(
        exact_auc(scores, labels), abs=0.003
    )


def test_hospitals_add_up_to_the_pool() -> None:
    rng = np.random.default_rng(2)
    scores, labels = rng.random(300), rng.integers(0, 2, 300)
    parts = [ScoreHistogram.of(scores[i::4], labels[i::4]) for i in range(4)]
    pooled = sum(parts, ScoreHistogram.empty())
    assert pooled == ScoreHistogram.of(scores, labels)
    assert pooled.patients == 300


@pytest.mark.parametrize("label", [0, 1])
def test_one_class_alone_has_no_auc(label: int) -> None:
    assert ScoreHistogram.of(np.array([0.1, 0.9]), np.array([label, label])).auc is None
    assert ScoreHistogram.empty().auc is None


def test_both_ends_of_the_scale_are_counted() -> None:
    histogram = ScoreHistogram.of(np.array([0.0, 1.0]), np.array([0, 1]))
    assert (histogram.healthy[0], histogram.diseased[-1], histogram.auc) == (1, 1, 1.0)


def test_scores_of_a_diverged_model_are_refused() -> None:
    with pytest.raises(ValueError, match="finite"):
        ScoreHistogram.of(np.array([0.5, np.nan]), np.array([0, 1]))


@pytest.mark.parametrize("counts", [(0,) * (BINS - 1), (-1,) + (0,) * (BINS - 1)])
def test_a_malformed_histogram_is_refused(counts: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="healthy must be 512 counts >= 0"):
        ScoreHistogram(healthy=counts, diseased=(0,) * BINS)
