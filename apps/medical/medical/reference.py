"""The figure that privacy is compared with: the same model, without clipping and without noise.

NOT PRIVATE: it is trained on everybody's patients in one place, which only the packaged sample
allows.
"""

import torch
from torch import nn

from .evaluation import ScoreHistogram
from .patients import HOSPITALS, sample_patients
from .settings import Settings
from .split import Split
from .task import LOSS, GradientDescent, new_model, probabilities, tensors


def train_reference(settings: Settings) -> nn.Linear:
    """Return the model after the same rounds on the pooled sample. NOT PRIVATE."""
    splits = [Split.of(sample_patients(name), seed=settings.split_seed) for name in HOSPITALS]
    x, y = tensors(tuple(p for split in splits for p in split.training)).tensors
    model, average = new_model(), new_model()
    # As torch's, this momentum multiplies the velocity by the learning rate as the server's does.
    optimizer = GradientDescent(
        model.parameters(), lr=settings.learning_rate, momentum=settings.server_momentum
    )
    kept = 0
    for number in range(1, settings.num_rounds + 1):
        optimizer.zero_grad()
        (LOSS(model(x), y).sum() / (len(HOSPITALS) * settings.expected_patients)).backward()
        optimizer.step()
        if number > settings.num_rounds // 2:
            kept += 1
            with torch.no_grad():
                for mean, last in zip(average.parameters(), model.parameters(), strict=True):
                    mean.add_(last - mean, alpha=1 / kept)
    return average


def reference_histograms(settings: Settings) -> dict[str, ScoreHistogram]:
    """Return each packaged hospital's histogram under the reference model. NOT PRIVATE."""
    model = train_reference(settings)
    found = {}
    for name in HOSPITALS:
        held_out = tensors(Split.of(sample_patients(name), seed=settings.split_seed).held_out)
        found[name] = ScoreHistogram.of(
            probabilities(model, held_out), held_out.tensors[1][:, 0].numpy()
        )
    return found
