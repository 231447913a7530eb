"""The first convolutions of the branches as one: they read the same maps, so their kernels can
stand side by side.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fastokd.errors import ConfigError
from fastokd.models.tracing import DROPOUTS, trace


class MergedFirstConvs:
    """Runs branches with their first convolutions merged: equal in value to running them one by
    one, up to rounding.

    Convolutions of the branches' common input that have one geometry become one convolution with
    the output channels of all; a projection shortcut that reads the input too is merged with the
    other branches' in the same way. The parameters stay the branches' own: kernels are concatenated
    in every call, so state dicts, optimizers and students know nothing of it. Hooks of the merged
    convolutions are not called.

    Not a module: it holds the branches' modules without owning them.

    Args:
        branches: M branches with a ``body`` that starts with convolutions.

    Raises:
        ConfigError: nothing can be merged; the message says what stands in the way.
    """

    def __init__(self, branches: Sequence[nn.Module]) -> None:
        if len(branches) < 2:
            raise ConfigError(
                "merged_first_conv: there is one branch, so there is nothing to merge it with"
            )
        found = [
            _first_convs(branch.body, f"branch{number}")
            for number, branch in enumerate(branches, start=1)
        ]
        groups: dict[tuple[Any, ...], list[_First]] = {}
        for convs, _ in found:
            for first in convs:
                groups.setdefault(_geometry(first.conv), []).append(first)
        self.groups = tuple(
            _Group(tuple(first.conv for first in group))
            for group in groups.values()
            if len(group) > 1
        )
        if not self.groups:
            raise ConfigError(
                "merged_first_conv: nothing to merge;"
                f" {_reasons([reason for _, reason in found], groups)}"
            )
        order = {
            id(first): place
            for place, first in enumerate(
                first for group in groups.values() if len(group) > 1 for first in group
            )
        }
        self.bodies, self.places = [], []
        for branch, (convs, _) in zip(branches, found, strict=True):
            merged = [first for first in convs if id(first) in order]
            self.bodies.append(_without(branch.body, merged))
            self.places.append(tuple(order[id(first)] for first in merged))
        self.branches = tuple(branches)

    @property
    def parts(self) -> list[nn.Module]:
        """The modules that a call runs after the merged convolutions: the bodies without them, and
        the heads.
        """
        return [*self.bodies, *(branch.head for branch in self.branches)]

    def __call__(self, x: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The trunk's maps [B, c, H, W] to each branch's feature maps and logits."""
        outputs = [part for group in self.groups for part in group(x)]
        results = []
        for branch, body, places in zip(self.branches, self.bodies, self.places, strict=True):
            results.append(branch.finish(body(x, *(outputs[place] for place in places))))
        return results


@dataclass(frozen=True)
class _First:
    """A convolution that reads a branch's input."""

    path: str
    conv: nn.Conv2d


@dataclass(frozen=True)
class _Group:
    """Convolutions of one input and one geometry."""

    convs: tuple[nn.Conv2d, ...]

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        """[B, c, H, W] to the output of each, a view into the common one."""
        first = self.convs[0]
        weight = torch.cat([conv.weight for conv in self.convs])
        bias = None if first.bias is None else torch.cat([conv.bias for conv in self.convs])
        together = F.conv2d(x, weight, bias, first.stride, first.padding, first.dilation)
        return together.split([conv.out_channels for conv in self.convs], 1)


def _geometry(conv: nn.Conv2d) -> tuple[Any, ...]:
    return (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.bias is None)


def _first_convs(body: nn.Module, title: str) -> tuple[list[_First], str]:
    """The convolutions that can be merged, and what else reads the input."""
    convs: list[_First] = []
    others: list[str] = []

    def visit(module: nn.Module, prefix: str) -> None:
        graph = _follow(module)
        start = next(node for node in graph.nodes if node.op == "placeholder")
        for node in start.users:
            if node.op != "call_module" or len(node.args) != 1 or node.kwargs:
                others.append(
                    f"{title} reads its input with {node.name.removeprefix('network_')}"
                )  # a shortcut's addition and the like
                continue
            child, path = module.get_submodule(node.target), prefix + node.target
            if type(child) is nn.Conv2d and child.groups == 1 and child.padding_mode == "zeros":
                convs.append(_First(path, child))
            elif isinstance(child, nn.Conv2d):
                others.append(
                    f"{title}'s '{path}' has groups={child.groups}"
                    if type(child) is nn.Conv2d
                    else f"{title}'s '{path}' is a {type(child).__name__}"
                )
            elif any(isinstance(layer, nn.Conv2d) for layer in child.modules()):
                visit(child, f"{path}.")
            else:
                others.append(f"{title}'s '{path}' is a {type(child).__name__}, no convolution")

    visit(body, "")
    return convs, "; ".join(others)


def _follow(module: nn.Module, opened: Sequence[str] = ()) -> fx.Graph:
    """The module's forward as a graph; its training flags are left as they were."""
    flags = {each: each.training for each in module.modules()}
    try:
        return trace(module, opened)
    finally:
        for each, flag in flags.items():
            each.training = flag


def _reasons(others: Sequence[str], groups: dict[tuple[Any, ...], list[_First]]) -> str:
    if groups:
        return (
            "the branches' first convolutions differ in kernel, stride, padding, dilation or bias"
        )
    return next((reason for reason in others if reason), "no branch starts with a convolution")


def _without(body: nn.Module, merged: Sequence[_First]) -> fx.GraphModule:
    """A body that takes, after its input, what the merged convolutions give; its modules are the
    body's own.
    """
    opened = {
        ".".join(steps[:count])
        for first in merged
        for steps in [first.path.split(".")]
        for count in range(1, len(steps))
    }
    graph = _follow(body, opened)
    if any(node.target in DROPOUTS for node in graph.nodes):
        raise ConfigError(
            f"merged_first_conv: the first block of {type(body).__name__} calls a dropout function;"
            " merging needs dropout as a module"
        )
    start = next(node for node in graph.nodes if node.op == "placeholder")
    last = start
    for index, first in enumerate(merged):
        call = next(
            node
            for node in graph.nodes
            if node.op == "call_module" and node.target == first.path and node.args == (start,)
        )
        with graph.inserting_after(last):
            last = graph.placeholder(f"first{index}")
        call.replace_all_uses_with(last)
        graph.erase_node(call)
    return fx.GraphModule(body, graph, f"{type(body).__name__}AfterFirstConvs")
