"""What a loss needs of the other processes that train the same networks. Without torch.distributed,
all is here.
"""

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

_alone = False


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Within it, this process computes as if there were no others: what may fail in one of them
    must not make the others wait.
    """
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def rank_and_size() -> tuple[int, int]:
    """This process among those that train together, and how many there are."""
    if not _alone and dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def gather_rows(rows: Tensor) -> Tensor:
    """The rows [B, ...] of all W processes in the order of their ranks, [W * B, ...]. B must be
    equal everywhere.
    """
    size = rank_and_size()[1]
    if size == 1:
        return rows
    parts = [torch.empty_like(rows, memory_format=torch.contiguous_format) for _ in range(size)]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts)


def sum_over_ranks(value: Tensor) -> Tensor:
    """The sum of every process's tensor, in place."""
    if rank_and_size()[1] > 1:
        dist.all_reduce(value)
    return value
