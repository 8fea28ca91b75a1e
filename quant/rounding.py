"""The rounding step: which code each weight gets, once the grid of its group is fixed.

The steps take a weight W ``[N, K]``, a visit of its columns, which is made of the Gram matrix H
``[K, K]`` of its inputs, and a grid ``[N, G]``, and give levels ``[N, G, group_size]`` that make
``tr((V - W) H (V - W)^T)`` small. The columns are visited by falling ``diag(H)``, the inputs that
matter most first; as the grid is fixed beforehand, the order leaves no trace in what is stored.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from qserve.quant.grid import Grid, snapper

DAMPING_GROWTH = 10.0
"""How much more is tried when H with the damping asked for cannot be factored."""

COLUMNS_AT_ONCE = 64
"""Columns whose effect on the later ones is applied in one matrix product."""


@dataclass(frozen=True, slots=True)
class Visit:
    """In which order columns are rounded, and what each does to the others; the same for all rows.

    order: ``[K]``. gram: H ``[K, K]``, damped, in that order. factor: U, upper triangular, with
    ``U^T U = gram^-1``.
    """

    order: torch.Tensor
    gram: torch.Tensor
    factor: torch.Tensor


def plan_visit(gram: torch.Tensor, damping: float) -> Visit:
    """The visit for H ``[K, K]`` with ``damping`` times its mean diagonal added to the diagonal.

    That is made ten times as much as often as it takes to factor H in float32.
    """
    order = torch.argsort(gram.diagonal(), descending=True, stable=True)
    visited, factor = factor_damped(gram, damping, order)
    return Visit(order, visited, factor)


def factor_damped(
    gram: torch.Tensor, damping: float, order: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """H, damped as much as it takes and in an order, and its ``inverse_factor``."""
    while True:
        visited = damped(gram, damping)
        if order is not None:
            visited = visited[order[:, None], order]
        try:
            return visited, inverse_factor(visited)
        except ValueError:
            damping *= DAMPING_GROWTH


@dataclass(frozen=True, slots=True)
class _Columns:
    """A weight in the order of the visit, one column a row, so that a column is contiguous.

    weight ``[K, N]``; scales of each group ``[G, N]``; snap_: for each group, what makes levels of
    its units; groups: the group of each column visited.
    """

    weight: torch.Tensor
    order: torch.Tensor
    scales: torch.Tensor
    snap_: list[Callable[[torch.Tensor], torch.Tensor]]
    groups: list[int]

    def nearest_(self, values: torch.Tensor, column: int, out: torch.Tensor) -> torch.Tensor:
        """The nearest levels of the values ``[N]`` of one column."""
        group = self.groups[column]
        return self.snap_[group](torch.div(values, self.scales[group], out=out))

    def scale_of(self, column: int) -> torch.Tensor:
        return self.scales[self.groups[column]]

    def levels_of(self, values: torch.Tensor) -> torch.Tensor:
        """The levels ``[K, N]`` of values that lie on the grid, up to rounding."""
        levels = torch.empty_like(values)
        for column, row in enumerate(values):
            self.nearest_(row, column, out=levels[column])
        return levels

    def restore(self, levels: torch.Tensor) -> torch.Tensor:
        """Levels ``[K, N]`` in the order of the visit as ``[N, G, group_size]``."""
        natural = torch.empty_like(levels)
        natural[self.order] = levels
        num_rows, num_groups = natural.shape[1], self.scales.shape[0]
        return natural.T.reshape(num_rows, num_groups, -1)


def damped(gram: torch.Tensor, damping: float) -> torch.Tensor:
    """H with ``damping`` times its mean diagonal added to the diagonal."""
    result = gram.clone()
    result.diagonal().add_(damping * gram.diagonal().mean())
    return result


def inverse_factor(gram: torch.Tensor) -> torch.Tensor:
    """The upper triangular U with ``U^T U = H^-1``.

    Raises ``ValueError`` when float32 does not hold H as positive definite.
    """
    factor, failed = torch.linalg.cholesky_ex(gram)
    if not failed:
        factor, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(factor), upper=True)
    if failed:
        raise ValueError("the Gram matrix is not positive definite: expected more damping")
    upper: torch.Tensor = factor
    return upper


def _in_visiting_order(weight: torch.Tensor, visit: Visit, grid: Grid) -> _Columns:
    return _Columns(
        weight=weight.T[visit.order].contiguous(),
        order=visit.order,
        scales=grid.scales.T.contiguous(),
        snap_=[snapper(grid.levels, zeros) for zeros in grid.zero_points.T.contiguous()],
        groups=(visit.order // (weight.shape[1] // grid.scales.shape[1])).tolist(),
    )


def feed_errors_back(weight: torch.Tensor, visit: Visit, grid: Grid) -> torch.Tensor:
    """Levels found column by column, the error of each taken up by the columns still to come.

    (GPTQ, Frantar et al. 2022, algorithm 1, with the groups fixed beforehand.)
    """
    columns = _in_visiting_order(weight, visit, grid)
    factor = visit.factor
    pivots = factor.diagonal().tolist()
    remaining = columns.weight
    num_columns, num_rows = remaining.shape
    levels = torch.empty_like(remaining)
    errors = torch.empty(COLUMNS_AT_ONCE, num_rows)
    for start in range(0, num_columns, COLUMNS_AT_ONCE):
        end = min(start + COLUMNS_AT_ONCE, num_columns)
        for i in range(start, end):
            level = columns.nearest_(remaining[i], i, out=levels[i])
            error = torch.mul(level, columns.scale_of(i), out=errors[i - start])
            torch.sub(remaining[i], error, out=error).div_(pivots[i])
            remaining[i + 1 : end].addcmul_(factor[i, i + 1 : end, None], error, value=-1)
        remaining[end:].addmm_(factor[start:end, end:].T, errors[: end - start], alpha=-1)
    return columns.restore(levels)


def descend(
    weight: torch.Tensor, visit: Visit, grid: Grid, levels: torch.Tensor, num_passes: int
) -> torch.Tensor:
    """Levels improved by coordinate descent: each column to its best level given all the others.

    No pass makes the (damped) error larger.
    """
    columns = _in_visiting_order(weight, visit, grid)
    gram = visit.gram
    current = (levels * grid.scales[..., None]).flatten(1).T[columns.order].contiguous()
    gradient = gram @ (current - columns.weight)  # half of it, [K, N]
    diagonal = gram.diagonal().tolist()
    num_columns, num_rows = current.shape
    level = torch.empty(num_rows)
    changes = torch.empty(COLUMNS_AT_ONCE, num_rows)
    for _ in range(num_passes):
        for start in range(0, num_columns, COLUMNS_AT_ONCE):
            end = min(start + COLUMNS_AT_ONCE, num_columns)
            # Within the piece gradients are kept up to date one by one, outside it at its end.
            local = gradient[start:end].clone()
            for i in range(start, end):
                target = torch.sub(current[i], local[i - start], alpha=1 / diagonal[i])
                columns.nearest_(target, i, out=level).mul_(columns.scale_of(i))
                change = torch.sub(level, current[i], out=changes[i - start])
                current[i].copy_(level)
                following = gram[i, i + 1 : end, None]
                local[i + 1 - start :].addcmul_(following, change)
            gradient.addmm_(gram[:, start:end], changes[: end - start])
    return columns.restore(columns.levels_of(current))
