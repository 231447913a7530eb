"""The run-time weights of standardized nodes, see ``fastokd.graph.Standardized``."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fastokd.graph import Graph, Mixture
from fastokd.ops.inputs import compute_dtype


def standard_weights(
    graph: Graph, logits: Sequence[Tensor], weights: Mapping[str, Tensor]
) -> list[Tensor]:
    """For each standardized node the weight 1 / std(z) [B, 1] of its input z, in the order of the
    plan and differentiable.

    Args:
        graph: the distillation graph.
        logits: its rows of logits [B, C].
        weights: its mixing weights by name, [B, K] or [K].
    """
    if not graph.standardized:
        return []
    branches = dict(zip(graph.logits, logits, strict=False))

    def row(name: str) -> Tensor:
        if name in branches:
            return branches[name].to(compute_dtype(branches[name]))
        node = graph.by_name[name]
        assert isinstance(node, Mixture), "the graph has checked the input"
        rows = [row(source) for source in node.inputs]
        mixing = node.weights
        if isinstance(mixing, str):
            columns = weights[mixing].to(rows[0].dtype).unsqueeze(-1).unbind(-2)
            parts = [column * each for column, each in zip(columns, rows, strict=True)]
        else:
            parts = [factor * each for factor, each in zip(mixing, rows, strict=True)]
        return torch.stack(parts).sum(0)

    with torch.autocast(logits[0].device.type, enabled=False):
        return [_weight(row(node.input)) for node in graph.standardized]


def _weight(row: Tensor) -> Tensor:
    """The inverse of the standard deviation [B, 1] over the classes that are not at -inf; 0 for a
    constant row.
    """
    absent = row == -torch.inf
    count = (~absent).sum(1, keepdim=True)
    row = row.masked_fill(absent, 0.0)
    centered = (row - row.sum(1, keepdim=True) / count).masked_fill(absent, 0.0)
    variance = centered.square().sum(1, keepdim=True) / count
    # The mean of a constant row is rounded.
    rounding = torch.finfo(row.dtype).eps * row.detach().abs().amax(1, keepdim=True)
    constant = variance <= rounding.square()
    return variance.masked_fill(constant, torch.inf).rsqrt()
