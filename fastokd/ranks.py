"""Collectives used by losses. They do nothing when torch.distributed is not initialized."""

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

_alone = False


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Compute without the other processes, so that an error here does not make them wait."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def rank_and_size() -> tuple[int, int]:
    """The rank of this process and the number of processes."""
    if not _alone and dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def gather_rows(rows: Tensor) -> Tensor:
    """The rows [B, ...] of all W processes by rank, [W * B, ...]; B must be the same everywhere."""
    size = rank_and_size()[1]
    if size == 1:
        return rows
    parts = [torch.empty_like(rows, memory_format=torch.contiguous_format) for _ in range(size)]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts)


def sum_over_ranks(value: Tensor) -> Tensor:
    """The sum of a tensor over all processes, in place."""
    if rank_and_size()[1] > 1:
        dist.all_reduce(value)
    return value
