"""What the step of DP-SGD is timed on: a CNN, an MLP, a transformer, and adapters on it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

VOCABULARY, WIDTH, HEADS, CLASSES, LENGTH, RANK = 1000, 128, 4, 4, 128, 8


@dataclass(frozen=True)
class Task:
    """A model, a batch, and the most that a private step may cost in plain ones."""

    build: Callable[[], nn.Module]
    batch: Callable[[], list[Tensor]]
    bar: float
    steps: int = 1  # in one timed call


def cnn() -> nn.Module:
    """Two convolutions and two linear layers: 545,098 parameters."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(4096, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )


def mlp() -> nn.Module:
    """Three linear layers: 4,130 parameters."""
    return nn.Sequential(
        nn.Linear(30, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 2)
    )


class Adapted(nn.Module):
    """A frozen linear layer with a trained product of rank 8 beside it (Hu et al., 2106.09685)."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, RANK, bias=False)
        self.up = nn.Linear(RANK, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum of both."""
        return self.base(x) + self.up(self.down(x))  # type: ignore[no-any-return]


class Block(nn.Module):
    """Attention and a feed-forward layer, each normalised before and added to its input."""

    def __init__(self) -> None:
        super().__init__()
        self.before_attention, self.before_wide = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.query: nn.Module = nn.Linear(WIDTH, WIDTH)
        self.key = nn.Linear(WIDTH, WIDTH)
        self.value: nn.Module = nn.Linear(WIDTH, WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.wide, self.narrow = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Return what the block makes of ``(records, positions, WIDTH)``."""
        normal = self.before_attention(x)
        heads = [
            layer(normal).unflatten(2, (HEADS, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        ]
        attended = nn.functional.scaled_dot_product_attention(*heads)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.narrow(  # type: ignore[no-any-return]
            nn.functional.gelu(self.wide(self.before_wide(x)))
        )


class Transformer(nn.Module):
    """Classifies sequences of token ids by two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.Sequential(Block(), Block())
        self.normal, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        """Return one row of logits per sequence."""
        # One row of positions per record, so that each record's gradient can be told apart.
        where = torch.arange(ids.shape[1], device=ids.device).repeat(len(ids), 1)
        hidden = self.blocks(self.tokens(ids) + self.positions(where))
        return self.head(self.normal(hidden).mean(1))  # type: ignore[no-any-return]


def lora() -> nn.Module:
    """Freeze the transformer and put adapters on its queries and values."""
    model = Transformer().requires_grad_(False)
    for block in model.blocks:
        assert isinstance(block, Block)
        block.query, block.value = Adapted(block.query), Adapted(block.value)
    return model


def _vectors(*shape: int, classes: int) -> Callable[[], list[Tensor]]:
    return lambda: [torch.randn(shape), torch.randint(classes, shape[:1])]


def _sequences() -> list[Tensor]:
    return [torch.randint(VOCABULARY, (32, LENGTH)), torch.randint(CLASSES, (32,))]


TASKS = {
    "cnn": Task(cnn, _vectors(64, 3, 32, 32, classes=10), 2.0),
    "mlp": Task(mlp, _vectors(32, 30, classes=2), 2.6, steps=20),
    "transformer": Task(Transformer, _sequences, 2.4),
    "lora": Task(lora, _sequences, 1.8),
}
