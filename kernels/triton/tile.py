"""The mapping of a batch to programs and threads, and the rules that choose it. No Triton, no
torch.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from fastokd.kernels.triton.constant import Constant

VECTOR_BYTES = 16
"""Bytes that a thread loads at once from aligned rows."""
PROGRAMS = 256
"""Programs that fill an H100 or H200: almost two on each of its 132 multiprocessors."""
SPLIT_COLUMNS = 8192
"""The fewest columns that are worth another program, with its start, its reductions over threads
and its part of the merge.
"""


@dataclass(frozen=True, eq=False, repr=False)
class Tile(Constant):
    """Constants of a launch that do not come from the graph.

    A program has ``rows`` rows and ``rows * lanes = 32 * num_warps`` threads. Each lane handles
    ``pieces`` columns of every chunk: adjacent ones, loaded as one vector, if ``vector``, else
    columns ``lanes`` apart.

    Attributes:
        splits: programs that share a row, each with some consecutive chunks; if above 1, ``rows``
            is 1.
        logit_strides: (row, column) for each row of logits, in elements.
        weight_strides: the same for each source of weights.
        external_strides: the same for each external row.
        target_strides: (row, column), or (row,) for labels.
        needs: whether a gradient is needed, for each row of logits and source of weights.
        double: float64 arithmetic.
        hardware: 0 in the interpreter, which lacks the GPU's logarithm and fused multiply-add.
        weights_per_row: whether the weights of the terms are [B, T] instead of [T].
    """

    num_classes: int
    rows: int
    lanes: int
    pieces: int
    vector: int
    num_warps: int
    splits: int
    logit_strides: tuple[tuple[int, int], ...]
    weight_strides: tuple[tuple[int, int], ...]
    external_strides: tuple[tuple[int, int], ...]
    target_strides: tuple[int, ...]
    grad_stride: int
    needs: tuple[int, ...]
    double: int
    hardware: int
    weights_per_row: int = 0

    @property
    def block(self) -> int:
        """Columns of a chunk."""
        return self.lanes * self.pieces

    @property
    def whole(self) -> int:
        """Number of whole chunks of a row."""
        return self.num_classes // self.block

    @property
    def rest(self) -> int:
        """Columns of the last chunk if it is not whole, else 0."""
        return self.num_classes % self.block

    @property
    def rest_pieces(self) -> int:
        """Pieces of the last chunk that contain a column."""
        return self.pieces if self.vector else -(-self.rest // self.lanes)

    @property
    def single(self) -> bool:
        """True if a row is a single chunk, whole or not."""
        return self.splits == 1 and self.num_classes <= self.block

    @property
    def soft_target(self) -> bool:
        return len(self.target_strides) == 2

    @property
    def needs_weights(self) -> bool:
        """True if the gradient of any weight is needed."""
        return any(self.needs[len(self.logit_strides) :])

    @property
    def order(self) -> tuple[int, ...]:
        """The column of each piece after a chunk was split repeatedly into even and odd columns.
        The permutation is its own inverse.
        """
        order: tuple[int, ...] = (0,)
        while len(order) < self.pieces:
            order = tuple(2 * k for k in order) + tuple(2 * k + 1 for k in order)
        return order

    def has_pairs(self, stride: int, limit: int) -> bool:
        """True if columns of this stride, ``limit`` of them (0: all), are loaded two per word."""
        return bool(self.vector) and int(stride) == 1 and int(limit) % 2 == 0

    def masks(self, limit: int, piece: int) -> bool:
        """True if a piece of a chunk of ``limit`` columns (0: all) has columns beyond the row."""
        limit, piece = int(limit), int(piece)
        return bool(limit) and (bool(self.vector) or (piece + 1) * self.lanes > limit)


@lru_cache(maxsize=4096)
def make_tile(*fields: Any) -> Tile:
    """Return the tile with these fields. Equal fields give the same object, because computing the
    digest again would slow every launch.
    """
    return Tile(*fields)


@lru_cache(maxsize=4096)
def choose_tile(
    batch: int,
    num_classes: int,
    itemsize: int,
    num_nodes: int,
    aligned: bool,
    forward_backward: bool = False,
) -> tuple[int, int, int, int, int]:
    """Return rows, lanes, pieces, vector and warps for a batch size and class count.

    Args:
        batch: B.
        num_classes: C.
        itemsize: bytes of a logit.
        num_nodes: nodes of the graph.
        aligned: every row of logits starts at a multiple of 16 bytes and has adjacent columns.
        forward_backward: for the kernel of loss and gradient in one launch.

    Up to 32 classes, several rows share a warp, and each reduction involves few lanes. Up to 256
    classes, one warp holds a whole row. Longer rows are processed in chunks, loaded as vectors if
    aligned. One warp per row needs no barriers and is the most efficient if there are enough rows
    to fill the GPU. If there are few rows, four or eight warps share one to reduce its latency.

    Graphs of many nodes have registers for only four columns of a row per thread. Then bfloat16 is
    loaded in vectors of 8 bytes; a warp still reads 256 adjacent bytes. For eight branches, 16
    bytes would save 3 % of the instructions of the forward kernel and double its compile time, and
    the backward kernel would spill. Up to 32 classes, where each thread holds values of several
    rows, the forward_backward kernel spills with eight columns per thread from four branches on,
    and with four from eight. With eight branches it also spills with four float32 columns in longer
    rows.
    """
    most = 8 if num_nodes <= 8 else 4
    if num_classes <= 32:
        widest = 8 if num_nodes <= 5 else 4 if num_nodes <= 12 else 2
        lanes = max(4 if num_nodes <= 8 else 8, _power_of_two(-(-num_classes // widest)))
        return 32 // lanes, lanes, _power_of_two(-(-num_classes // lanes)), 0, 1
    if num_classes <= 256 and not aligned:
        return 1, 32, min(most, _power_of_two(-(-num_classes // 32))), 0, 1
    if num_classes <= 4096:
        warps = 1 if batch >= 1024 else 4
    else:
        warps = 4 if batch >= 256 else 8
    if aligned:
        pieces = min(
            most, VECTOR_BYTES // (2 if forward_backward and num_nodes > 12 else 1) // itemsize
        )
    else:
        pieces = most
    while warps > 1 and 32 * warps * pieces >= 2 * num_classes:
        warps //= 2
    return 1, 32 * warps, pieces, int(aligned), warps


def register_limit(which: str, num_nodes: int) -> int | None:
    """Return the register limit per thread for a kernel; None leaves it to the compiler.

    For the forward kernel of eight branches on sm_100 the compiler aims at 168 or 128 registers and
    spills instead of using a few more.
    """
    return 176 if which == "forward" and num_nodes > 12 else None


def choose_splits(batch: int, num_classes: int) -> int:
    """Return the number of programs that share a row: a power of two, 1 unless rows are few and
    long.

    It doubles while the programs do not fill the GPU (``PROGRAMS``) and each half keeps
    ``SPLIT_COLUMNS`` columns. The cost of splitting is one more launch per pass, and writing and
    reading the sums of each part.
    """
    splits = 1
    while batch and batch * splits < PROGRAMS and num_classes >= 2 * splits * SPLIT_COLUMNS:
        splits *= 2
    return splits


def _power_of_two(count: int) -> int:
    return 1 << max(count - 1, 0).bit_length()
