"""How a batch is laid over programs and threads: the tile, and the rules by which it is chosen. No
Triton, no torch.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from fastokd.kernels.triton.constant import Constant

VECTOR_BYTES = 16
"""What one thread loads at once where rows are aligned for it."""
PROGRAMS = 256
"""So many programs fill a GPU of the size of an H100 or H200: two on each of 132 multiprocessors,
nearly.
"""
SPLIT_COLUMNS = 8192
"""Columns below which a program is not worth its start, its sums over threads, and its share of the
merge.
"""


@dataclass(frozen=True, eq=False, repr=False)
class Tile(Constant):
    """Constants of a launch that do not come from the graph.

    A program has ``rows`` rows and ``rows * lanes = 32 * num_warps`` threads; each lane takes
    ``pieces`` columns of every chunk: neighbours that are loaded as one vector if ``vector``, else
    ``lanes`` columns apart. Where ``splits`` is above 1 (then ``rows`` is 1), so many programs
    share a row, each with a run of its chunks. Strides are in elements: (row, column) for each
    logits row, weight source and external row; ``target_strides`` has one entry for labels.
    ``needs`` tells for each logits row and weight source whether its gradient is wanted.
    ``double``: float64 arithmetic. ``hardware``: 0 in the interpreter, which has neither the GPU's
    own logarithm nor its fused multiply-add.
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

    @property
    def block(self) -> int:
        """Columns of a chunk."""
        return self.lanes * self.pieces

    @property
    def whole(self) -> int:
        """The number of whole chunks of a row."""
        return self.num_classes // self.block

    @property
    def rest(self) -> int:
        """Columns of the last chunk if it is not whole."""
        return self.num_classes % self.block

    @property
    def rest_pieces(self) -> int:
        """Pieces of the last chunk that hold any column."""
        return self.pieces if self.vector else -(-self.rest // self.lanes)

    @property
    def single(self) -> bool:
        """Whether a row is a single chunk, whole or not."""
        return self.splits == 1 and self.num_classes <= self.block

    @property
    def soft_target(self) -> bool:
        return len(self.target_strides) == 2

    @property
    def needs_weights(self) -> bool:
        """Whether the gradient of any weight is wanted."""
        return any(self.needs[len(self.logit_strides) :])

    @property
    def order(self) -> tuple[int, ...]:
        """The column of each piece after a chunk was split into halves (even, odd) again and again.
        Its own inverse.
        """
        order: tuple[int, ...] = (0,)
        while len(order) < self.pieces:
            order = tuple(2 * k for k in order) + tuple(2 * k + 1 for k in order)
        return order

    def masks(self, limit: int, piece: int) -> bool:
        """Whether a piece of a chunk with so many columns (0: all) has columns that the row
        lacks.
        """
        limit, piece = int(limit), int(piece)
        return bool(limit) and (bool(self.vector) or (piece + 1) * self.lanes > limit)


@lru_cache(maxsize=4096)
def make_tile(*fields: Any) -> Tile:
    """The tile with these fields, one object for equal fields: making its digest anew would slow
    every launch.
    """
    return Tile(*fields)


@lru_cache(maxsize=4096)
def choose_tile(
    batch: int, num_classes: int, itemsize: int, num_nodes: int, aligned: bool, fused: bool = False
) -> tuple[int, int, int, int, int]:
    """Rows, lanes, pieces, vector and warps for a regime of batch and class count.

    ``aligned``: every row of logits begins at a multiple of 16 bytes, and its columns are
    neighbours. ``fused``: for the kernel of loss and gradient at once.

    Few classes: several rows share a warp, and sums stay among few lanes. Up to 256 classes: a warp
    per row holds the whole row. More: chunks, loaded as vectors where rows are aligned. One warp
    per row needs no barrier at all and wastes least where there are rows enough to fill the GPU;
    with few rows, four or eight warps share one so that its latency shrinks.

    Graphs of many nodes keep so many values per row and column that a thread has registers for four
    columns of one row only. So there bfloat16 moves in vectors of 8 bytes, those of a warp still
    being 256 neighbouring bytes. Compiled for eight branches, 16 bytes would save the forward 3 %
    of its instructions and double the time to compile it; the backward would spill. Up to 32
    classes several rows share a warp and each node has values of its own for all of them: there the
    fused kernel spills at eight columns a thread from four branches on, and at four from eight;
    with eight it spills at four columns of float32 in longer rows too.
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
        pieces = min(most, VECTOR_BYTES // (2 if fused and num_nodes > 12 else 1) // itemsize)
    else:
        pieces = most
    while warps > 1 and 32 * warps * pieces >= 2 * num_classes:
        warps //= 2
    return 1, 32 * warps, pieces, int(aligned), warps


def register_limit(which: str, num_nodes: int) -> int | None:
    """Registers a thread that a kernel may take; None where the compiler finds a good number
    itself.

    For the forward of eight branches it aims at 168 or 128 on sm_100, and spills rather than take a
    few more.
    """
    return 176 if which == "forward" and num_nodes > 12 else None


def choose_splits(batch: int, num_classes: int) -> int:
    """Over how many programs the columns of each row are split: a power of two, 1 for all but few
    and long rows.

    Doubled while the programs do not fill the GPU (``PROGRAMS``) and each half keeps
    ``SPLIT_COLUMNS`` columns. What it costs is the sums of each part, written and read again, and
    one more launch per pass over the columns.
    """
    splits = 1
    while batch and batch * splits < PROGRAMS and num_classes >= 2 * splits * SPLIT_COLUMNS:
        splits *= 2
    return splits


def _power_of_two(count: int) -> int:
    return 1 << max(count - 1, 0).bit_length()
