"""Dense logits, such as one prediction for each pixel or token, as rows [N, C]."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class DenseLayout(NamedTuple):
    """Logits [B, C, d1, ...], or with the classes last [B, d1, ..., C], as N = B * d1 * ... rows.

    Rows are views if the classes are adjacent in memory, as in channels-last images; otherwise
    they are copied.
    """

    batch: int
    positions: tuple[int, ...]
    """d1, ..."""
    classes_last: bool

    @classmethod
    def of(cls, logits: Sequence[Tensor] | Tensor, class_dim: int) -> "DenseLayout | None":
        """The layout of the first of several tensors of logits; None for rows [B, C]."""
        if isinstance(logits, Tensor):
            shape: Sequence[int] = logits.shape[1:]
        else:  # the checks report anything else than a sequence of tensors
            first = logits[0] if isinstance(logits, (tuple, list)) and logits else None
            shape = first.shape if isinstance(first, Tensor) else ()
        if len(shape) < 3:
            return None
        batch, *others = shape
        last = class_dim == -1
        return cls(batch, tuple(others[:-1] if last else others[1:]), last)

    @property
    def num_rows(self) -> int:
        return self.batch * math.prod(self.positions)

    def rows(self, value: Tensor, name: str) -> Tensor:
        """A tensor [B, K, d1, ...] (classes last: [B, d1, ..., K]) as [N, K].

        Raises:
            ValueError: the tensor has another shape.
        """
        moved = value if self.classes_last or value.dim() < 2 else value.movedim(1, -1)
        if tuple(moved.shape[:-1]) != (self.batch, *self.positions):
            raise ValueError(f"{name} has the shape {tuple(value.shape)}; {self._expected('K')}")
        return moved.reshape(self.num_rows, moved.shape[-1])

    def weights(self, value: Tensor, name: str) -> Tensor:
        """Mixing weights as [N, K] like ``rows``, or [K] for all rows; [B, K] are shared by all
        positions.
        """
        if not isinstance(value, Tensor) or value.dim() < 2:
            return value  # reported by the checks, or [K]
        if value.dim() > 2:
            return self.rows(value, name)
        if len(value) == self.batch != self.num_rows:
            return value.repeat_interleave(math.prod(self.positions), 0)
        return value

    def values(self, value: Tensor | None, name: str) -> Tensor | None:
        """A tensor [B, d1, ...] as [N]; [B] is shared by all positions.

        Raises:
            ValueError: the tensor has another shape.
        """
        if not isinstance(value, Tensor):
            return value  # reported by the checks
        if value.dim() == 1 and value.shape[0] == self.batch:
            return value.repeat_interleave(math.prod(self.positions))
        if tuple(value.shape) != (self.batch, *self.positions):
            wanted = list((self.batch, *self.positions))
            raise ValueError(f"{name} has the shape {tuple(value.shape)}; it must be {wanted}")
        return value.reshape(-1)

    def target(self, target: Tensor) -> Tensor:
        """Labels [B, d1, ...] as [N], or class probabilities as [N, C].

        Raises:
            ValueError: the target has another shape.
        """
        if not isinstance(target, Tensor):
            return target  # reported by the checks
        if target.is_floating_point():
            return self.rows(target, "target")
        wanted = [self.batch, *self.positions]
        if list(target.shape) != wanted:
            fix = "; pass class_dim=-1 if the classes are last" * (not self.classes_last)
            shape = f"target has the shape {tuple(target.shape)}"
            raise ValueError(f"{shape}; labels must be {wanted}{fix}")
        return target.reshape(-1)

    def restore(self, rows: Tensor) -> Tensor:
        """The inverse of ``values`` for [N], and of ``rows`` for [N, K]."""
        if rows.dim() == 1:
            return rows.reshape(self.batch, *self.positions)
        dense = rows.reshape(self.batch, *self.positions, rows.shape[1])
        return dense if self.classes_last else dense.movedim(-1, 1)

    def _expected(self, width: str) -> str:
        sizes = [str(size) for size in self.positions]
        sizes = [*sizes, width] if self.classes_last else [width, *sizes]
        return f"with these logits it must be [{self.batch}, {', '.join(sizes)}]"
