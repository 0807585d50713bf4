"""Per-example gradients of one layer in the form in which their norms and sum are cheapest.

The gradient of record i in a linear layer is the sum over positions t of ``b_it a_it'``, with a the
layer's input and b the loss's gradient in its output. From a and b alone come its norm and, once
the factors are known, the clipped sum: one backward pass ("book-keeping", Bu et al., arXiv
2210.00038, section 3).

>>> ones = nn.Parameter(torch.zeros(1, 2))
>>> pair = Outer((ones,), torch.tensor([[3.0, 4.0]]), torch.tensor([[2.0]]))
>>> pair.squares()
tensor([100.], dtype=torch.float64)
>>> pair.weighted_sums(torch.tensor([0.5]).double(), None)
[tensor([[3., 4.]])]
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Final, final

import torch
from torch import Tensor, nn

from dpfl_flower.client.per_sample.full_precision import full_precision

LARGEST_INPUT: Final = 2.0**80
_CHUNK: Final = 1 << 22  # numbers of float64 at once: 32 MiB
_DEVICE_CHUNK: Final = 1 << 26  # 512 MiB: each part takes a dozen kernels, whose launches add up


class Contribution(ABC):
    """What the records contribute to the gradients of ``parameters`` through one use of a layer.

    Attributes
    ----------
    parameters : tuple of Parameter
        Those of the layer, or of several small ones.
    """

    def __init__(self, parameters: tuple[nn.Parameter, ...]) -> None:
        self.parameters = parameters

    @abstractmethod
    def squares(self) -> Tensor:
        """Return an upper bound of each record's squared norm over all ``parameters``, float64.

        Rounding errors of `weighted_sums` that are particular to one record are in the bound. NaN
        or inf where the record's gradient is not finite.
        """

    @abstractmethod
    def weighted_sums(self, factors: Tensor, dropped: Tensor | None) -> list[Tensor]:
        """Return the sum of each parameter's gradients, scaled by ``factors``, in full precision.

        Parameters
        ----------
        factors : Tensor
            One per record.
        dropped : Tensor, optional
            Which records count as zeros whatever they hold; None: none does.
        """

    @abstractmethod
    def held(self) -> list[Tensor]:
        """Return each parameter's gradients themselves, of shape ``(records, numbers)``."""


@final
class Held(Contribution):
    """Gradients that are held: the norm is of what is summed, whatever the layer does."""

    def __init__(self, parameters: tuple[nn.Parameter, ...], gradients: Sequence[Tensor]) -> None:
        super().__init__(parameters)
        self._gradients = [g.flatten(1) for g in gradients]

    def squares(self) -> Tensor:
        """Return the squared norms, summed in float64."""
        total = squared_norms(self._gradients[0])
        for gradient in self._gradients[1:]:
            total = total.add_(squared_norms(gradient))
        return total

    def weighted_sums(self, factors: Tensor, dropped: Tensor | None) -> list[Tensor]:
        """Return one matrix-vector product per parameter."""
        with full_precision(factors):
            return [
                (factors.to(g.dtype) @ without(g, dropped)).view(p.shape)
                for p, g in zip(self.parameters, self._gradients, strict=True)
            ]

    def held(self) -> list[Tensor]:
        """Return what is held."""
        return self._gradients


@final
class Outer(Contribution):
    """One position per record: the gradient is ``b a'``, its norm exactly ``|b| |a|``.

    A record whose input has a norm above 2^80 is not finite here: a factor times b could
    vanish in float32 where the product with the input does not.

    Parameters
    ----------
    parameters : tuple of Parameter
        A weight of shape ``(m, n)`` and, optionally, the bias.
    inputs, gradients : Tensor
        a and b, of shapes ``(records, n)`` and ``(records, m)``.
    """

    def __init__(
        self, parameters: tuple[nn.Parameter, ...], inputs: Tensor, gradients: Tensor
    ) -> None:
        super().__init__(parameters)
        self.inputs, self.gradients = inputs, gradients

    def squares(self) -> Tensor:
        """Return ``|b|^2 (|a|^2 + 1)``, the 1 for the bias."""
        lengths = norms(self.inputs)
        lengths.masked_fill_(lengths > LARGEST_INPUT, math.inf).square_()
        if len(self.parameters) > 1:
            lengths += 1
        return lengths.mul_(squared_norms(self.gradients))

    def weighted_sums(self, factors: Tensor, dropped: Tensor | None) -> list[Tensor]:
        """Return one matrix product, and one sum for the bias."""
        gradients = without(self.gradients, dropped)
        scaled = gradients.t() * factors.to(gradients.dtype)
        with full_precision(scaled):
            sums = [scaled @ without(self.inputs, dropped)]
        return sums if len(self.parameters) == 1 else [*sums, scaled.sum(1)]

    def held(self) -> list[Tensor]:
        """Return the outer products."""
        outer = self.gradients.unsqueeze(2) * self.inputs.unsqueeze(1)
        return [outer.flatten(1), self.gradients][: len(self.parameters)]


@final
class Ghost(Contribution):
    """Few positions, many weights: norms from inner products of positions ("ghost norm").

    ``|sum_t b_t a_t'|^2 = sum_st (a_s . a_t)(b_s . b_t)``: Li et al., arXiv 2110.05679, section 4.
    The terms may cancel, so they are taken in float64, and both their rounding and that of the
    product in `weighted_sums` are added: with Q = sum_t |a_t| |b_t| and u the unit roundoff of the
    sum, 2^-24 in float32, (n + m + T^2 + 4) 2^-52 Q^2 and (T + 4) u Q (Higham, Accuracy and
    Stability of Numerical Algorithms, section 3.1).

    Parameters
    ----------
    parameters : tuple of Parameter
        A weight of ``m n`` numbers and, optionally, the bias.
    inputs, gradients : Tensor
        a and b, of shapes ``(records, T, n)`` and ``(records, T, m)``.
    """

    def __init__(
        self, parameters: tuple[nn.Parameter, ...], inputs: Tensor, gradients: Tensor
    ) -> None:
        super().__init__(parameters)
        self._inputs, self._gradients = inputs, gradients
        self._unit = torch.finfo(gradients.dtype).eps / 2

    def squares(self) -> Tensor:
        """Return the squares of upper bounds of the norms."""
        return torch.cat([self._bounds(a, b) for a, b in self._chunks()]).square_()

    def _chunks(self) -> Iterator[tuple[Tensor, Tensor]]:
        positions, wide = self._inputs.shape[1], self._inputs.shape[2]
        each = positions * (2 * positions + wide + self._gradients.shape[2])
        chunk = _CHUNK if self._inputs.device.type == "cpu" else _DEVICE_CHUNK
        size = max(1, chunk // max(1, each))
        for a, b in zip(
            torch.split(self._inputs, size), torch.split(self._gradients, size), strict=True
        ):
            yield a.double(), b.double()

    def _bounds(self, a: Tensor, b: Tensor) -> Tensor:
        positions = a.shape[1]
        square = (a @ a.transpose(1, 2)).mul_(b @ b.transpose(1, 2)).sum((1, 2)).clamp_(min=0)
        length = torch.linalg.vector_norm(a, dim=2)
        length = length.masked_fill_(length > LARGEST_INPUT, math.inf)
        spread = (length * torch.linalg.vector_norm(b, dim=2)).sum(1)
        rounding = (a.shape[2] + b.shape[2] + positions**2 + 4) * 2.0**-52
        square += rounding * spread.square()
        bound = square.sqrt_().add_(spread, alpha=(positions + 4) * self._unit)
        if len(self.parameters) == 1:
            return bound
        return torch.hypot(bound, self._bias_bounds(b))

    def _bias_bounds(self, b: Tensor) -> Tensor:
        spread = torch.linalg.vector_norm(b, dim=2).sum(1)
        exact: Tensor = torch.linalg.vector_norm(b.sum(1), dim=1)
        return exact.add_(spread, alpha=(b.shape[1] + 4) * self._unit)

    def weighted_sums(self, factors: Tensor, dropped: Tensor | None) -> list[Tensor]:
        """Return one matrix product over records and positions, and one sum for the bias."""
        gradients = without(self._gradients, dropped)
        scaled = (gradients * factors.to(gradients.dtype)[:, None, None]).flatten(0, 1)
        inputs = without(self._inputs, dropped).flatten(0, 1)
        with full_precision(scaled):
            sums = [(scaled.t() @ inputs).view(self.parameters[0].shape)]
        return sums if len(self.parameters) == 1 else [*sums, scaled.sum(0)]

    def held(self) -> list[Tensor]:
        """Return the products of each record."""
        weights = self._gradients.transpose(1, 2) @ self._inputs
        return [weights.flatten(1), self._gradients.sum(1)][: len(self.parameters)]


@final
class Rows(Contribution):
    """Gradients in the rows of a table: only the rows that a record names, summed by record.

    Parameters
    ----------
    table : Parameter
        Of shape ``(rows, n)``.
    ids : Tensor
        The rows that the records name, of shape ``(records, T)``.
    gradients : Tensor
        In what was looked up, of shape ``(records, T, n)``.
    """

    def __init__(self, table: nn.Parameter, ids: Tensor, gradients: Tensor) -> None:
        super().__init__((table,))
        self._records = len(ids)
        rows = len(table)
        first = torch.arange(self._records, device=ids.device).unsqueeze(1) * rows
        keys, order = (ids + first).flatten().sort()
        starts = torch.zeros_like(keys)
        starts[1:] = keys[1:] != keys[:-1]
        segments = starts.cumsum_(0)
        # As many segments as positions, though fewer are filled: no size has to be asked for.
        self._sums = gradients.new_zeros((len(keys), gradients.shape[2]))
        self._sums.index_add_(0, segments, gradients.flatten(0, 1)[order])
        names = torch.zeros_like(keys).scatter_(0, segments, keys)
        self._rows, self._owners = names % rows, names // rows

    def squares(self) -> Tensor:
        """Return the squared norms of the rows' sums, added by record."""
        of_rows = squared_norms(self._sums)
        return of_rows.new_zeros(self._records).index_add_(0, self._owners, of_rows)

    def weighted_sums(self, factors: Tensor, dropped: Tensor | None) -> list[Tensor]:
        """Add the scaled rows into a table."""
        sums = self._sums
        if dropped is not None:
            sums = sums.masked_fill(dropped[self._owners].unsqueeze(1), 0)
        scaled = sums * factors.to(sums.dtype)[self._owners].unsqueeze(1)
        (table,) = self.parameters
        return [sums.new_zeros(table.shape).index_add_(0, self._rows, scaled)]

    def held(self) -> list[Tensor]:
        """Return one table per record."""
        rows, wide = self.parameters[0].shape
        tables = self._sums.new_zeros((self._records * rows, wide))
        tables.index_add_(0, self._owners * rows + self._rows, self._sums)
        return [tables.view(self._records, rows * wide)]


def norms(rows: Tensor) -> Tensor:
    """Return the L2 norm of each row, summed in float64.

    Squares of 1e-23 do not vanish and squares of 1e30 do not overflow.
    """
    found: Tensor = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
    return found


def squared_norms(rows: Tensor) -> Tensor:
    """Return the square of `norms`."""
    return norms(rows).square_()


def without(rows: Tensor, dropped: Tensor | None) -> Tensor:
    """Return ``rows`` with those of ``dropped`` at zero.

    Not by a factor 0: 0 * nan is nan.
    """
    if dropped is None:
        return rows
    return rows.masked_fill(dropped.view(-1, *(1,) * (rows.dim() - 1)), 0)
