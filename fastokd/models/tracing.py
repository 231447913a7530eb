"""Where a network can be cut in two: its forward followed with ``torch.fx``, as far down as the cut
and no further.

Only the modules around the cut are traced (the network itself and the containers on the way to the
cut); everything else stays a call of the module, which keeps its own control flow, its training
flag and its hooks.
"""

import copy
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fastokd.errors import ConfigError, first_line

DROPOUTS = {F.dropout: nn.Dropout, F.dropout2d: nn.Dropout2d, F.alpha_dropout: nn.AlphaDropout}
_LAYERS = (nn.Linear, nn.Conv2d)


class _Whole(nn.Module):
    """A network called with images alone, whatever further arguments its forward has defaults
    for.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)


class _Tracer(fx.Tracer):
    """Follows the forward of the modules named in ``opened``; calls of all others are recorded as
    calls.
    """

    def __init__(self, opened: Collection[str]) -> None:
        super().__init__()
        self.opened = {"network", *(f"network.{name}" for name in opened)}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name not in self.opened


def _not_followed(network: nn.Module, error: Exception) -> ConfigError:
    return ConfigError(
        f"the forward of {type(network).__name__} cannot be followed by torch.fx"
        f" ({first_line(error)}); a network can be branched if its forward is a fixed sequence of"
        " calls"
    )


def trace(network: nn.Module, opened: Collection[str] = ()) -> fx.Graph:
    """The forward of a network, and of the modules in it named in ``opened``, as a graph of calls.

    The network's training flags are changed: pass a copy.

    Raises:
        ConfigError: it cannot be followed, or computes something else in training than in
            evaluation.
    """
    graphs = []
    for training in (True, False):
        try:
            graph = _Tracer(opened).trace(_Whole(network.train(training)))
        except Exception as error:  # whatever a forward does with what is no tensor yet
            raise _not_followed(network, error) from error
        for node in graph.nodes:
            if node.op in ("call_module", "get_attr"):
                node.target = node.target.removeprefix("network.")
            elif node.op == "call_function" and node.target in DROPOUTS:
                # The flag as it was while tracing: `dropouts` makes a module of it, which has a
                # flag of its own.
                node.kwargs = {
                    name: value for name, value in node.kwargs.items() if name != "training"
                }
        graphs.append(graph)
    if str(graphs[0]) != str(graphs[1]):
        raise ConfigError(
            f"the forward of {type(network).__name__} computes something else in training than in"
            " evaluation (auxiliary classifiers?), which cannot be branched; build it without them"
        )
    return graphs[0]


def uses(nodes: Iterable[fx.Node]) -> list[fx.Node]:
    """What a part of a graph takes from outside, without the parameters that it reads itself."""
    inside = set(nodes)
    return list(
        dict.fromkeys(
            value
            for node in nodes
            for value in node.all_input_nodes
            if value not in inside and value.op != "get_attr"
        )
    )


def tail_from(graph: fx.Graph, start: fx.Node) -> list[fx.Node]:
    """Everything that depends on a node, with the node, in order."""
    found = {start}
    for node in graph.nodes:
        if any(value in found for value in node.all_input_nodes):
            found.add(node)
    return [node for node in graph.nodes if node in found]


def is_cut(nodes: Sequence[fx.Node], index: int) -> bool:
    """Whether the nodes after ``nodes[index]`` take nothing but its value from before."""
    return uses(nodes[index + 1 :]) == [nodes[index]]


def part(
    source: nn.Module, nodes: Sequence[fx.Node], start: fx.Node, end: fx.Node
) -> fx.GraphModule:
    """A module that computes ``end`` from ``start``, made of the source's own modules under their
    own names.
    """
    graph = fx.Graph()
    copies = {start: graph.placeholder("x")}
    held = nn.Module()
    for node in nodes:
        for value in node.all_input_nodes:
            if value.op == "get_attr" and value not in copies:
                copies[value] = graph.node_copy(value)
        if node.op == "call_function" and node.target in DROPOUTS:
            copies[node] = _dropout(graph, held, node, copies)
        else:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(copies[end])
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr") and not hasattr(held, node.target):
            put(held, node.target, _get(source, node.target))
    held.training = source.training
    return fx.GraphModule(held, graph, f"{type(source).__name__}Part")


def _dropout(
    graph: fx.Graph, held: nn.Module, node: fx.Node, copies: dict[fx.Node, fx.Node]
) -> fx.Node:
    """A call of a dropout function as a module."""
    chosen = dict(zip(("input", "p", "training", "inplace"), node.args, strict=False)) | dict(
        node.kwargs
    )
    name = f"{node.name}_module"
    held.add_module(name, DROPOUTS[node.target](chosen.get("p", 0.5), chosen.get("inplace", False)))
    return graph.call_module(name, (copies[chosen["input"]],))


def named(nodes: Iterable[fx.Node]) -> list[str]:
    """The modules and tensors that a part of a graph uses, by name."""
    return list(
        dict.fromkeys(
            value.target
            for node in nodes
            for value in (*node.all_input_nodes, node)
            if value.op == "get_attr" or (value is node and node.op == "call_module")
        )
    )


def tensors(network: nn.Module, path: str) -> list[Tensor]:
    """The parameters and buffers at a dotted path."""
    value = _get(network, path)
    return [*value.parameters(), *value.buffers()] if isinstance(value, nn.Module) else [value]


def _tensor_ids(network: nn.Module, nodes: Iterable[fx.Node]) -> frozenset[int]:
    return frozenset(id(tensor) for name in named(nodes) for tensor in tensors(network, name))


def _get(root: nn.Module, path: str) -> nn.Module | Tensor:
    parent, _, name = path.rpartition(".")
    return getattr(root.get_submodule(parent), name)


def put(root: nn.Module, path: str, value: nn.Module | Tensor) -> None:
    """Set a module, parameter or buffer at its dotted path, in its place among the others;
    containers are made as needed.
    """
    *containers, name = path.split(".")
    for container in containers:
        if container not in root._modules:
            root.add_module(container, nn.Module())
        root = root._modules[container]
    if isinstance(value, nn.Module):
        root._modules[name] = value
    elif isinstance(value, nn.Parameter):
        root._parameters[name] = value
    else:
        root._buffers[name] = value


@dataclass
class Call:
    """What a module was called with: the shapes of its first argument and its output, ``None`` for
    what is no tensor.
    """

    name: str
    shape_in: torch.Size | None
    shape_out: torch.Size | None
    calls: int = 1


@dataclass
class Shapes:
    """The shapes of a forward pass of one image: of every node, and of every module in the order in
    which they finished.
    """

    nodes: dict[fx.Node, torch.Size] = field(default_factory=dict)
    modules: dict[str, Call] = field(default_factory=dict)
    written: set[fx.Node] = field(default_factory=set)
    """Nodes whose value another node wrote to."""


class _Recorder(fx.Interpreter):
    """Runs a graph and writes down the shapes."""

    def __init__(self, network: nn.Module, graph: fx.Graph, shapes: Shapes) -> None:
        super().__init__(network, graph=graph)
        self.shapes = shapes
        self.versions: list[tuple[fx.Node, Tensor, int]] = []

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        for node, tensor, version in self.versions:
            # An in-place operation gives back the tensor that it wrote to; a node after it sees
            # that node's value.
            if tensor._version != version and n.op != "output":
                self.shapes.written.add(node)
        if isinstance(value, Tensor) and n.op != "output":
            self.shapes.nodes[n] = value.shape
            self.versions.append((n, value, value._version))
        return value


def record_shapes(network: nn.Module, graph: fx.Graph, input_size: Sequence[int]) -> Shapes:
    """The shapes of a forward pass of one image of ``input_size`` (channels, height, width).

    Args:
        network: on the meta device, so that nothing is computed.
        graph: its forward.
        input_size: of one image.

    Raises:
        ConfigError: the network cannot take such an image, or cannot be run call by call.
    """
    shapes = Shapes()

    def write_down(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            before = shapes.modules.pop(name, None)
            shape_in, shape_out = (
                value.shape if isinstance(value, Tensor) else None
                for value in (inputs[0] if inputs else None, output)
            )
            shapes.modules[name] = Call(
                name, shape_in, shape_out, 1 if before is None else before.calls + 1
            )

        return hook

    handles = [
        module.register_forward_hook(write_down(name)) for name, module in network.named_modules()
    ]
    try:
        with torch.no_grad():
            _Recorder(network.eval(), graph, shapes).run(torch.empty(1, *input_size, device="meta"))
    except Exception as error:  # whatever the network's own operators raise
        if _takes(
            network, input_size
        ):  # so it is not the size: for example, a module writes to a list that it is given
            raise _not_followed(network, error) from error
        size = " x ".join(map(str, input_size))
        raise ConfigError(
            f"{type(network).__name__} cannot take an image of {size} ({first_line(error)}); pass"
            " input_size=(channels, height, width)"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return shapes


def _takes(network: nn.Module, input_size: Sequence[int]) -> bool:
    """Whether a network on the meta device runs on an image of that size."""
    try:
        with torch.no_grad():
            network(torch.empty(1, *input_size, device="meta"))
    except Exception:  # whatever its operators raise
        return False
    return True


def meta_copy(network: nn.Module) -> nn.Module:
    """The network without its values: what shapes and graphs are found with."""
    return copy.deepcopy(network).to("meta")


def default_input_size(network: nn.Module) -> tuple[int, int, int]:
    """The images a network was made for (channels, height, width), where it says so; else 3 x 224 x
    224.
    """
    channels, *size = getattr(network, "pretrained_cfg", {}).get("input_size", (None, 224, 224))
    made_for = (
        getattr(network, "image_size", None)
        or getattr(getattr(network, "patch_embed", None), "img_size", None)
        or size
    )
    height, width = (made_for, made_for) if isinstance(made_for, int) else made_for
    if channels is None:
        first = next(
            (module for module in network.modules() if isinstance(module, nn.Conv2d)), None
        )
        channels = 3 if first is None else first.in_channels
    return channels, height, width


def feature_node(network: nn.Module, nodes: Sequence[fx.Node], shapes: Shapes) -> int | None:
    """The index of the last feature maps [B, c, H, W] (or tokens [B, N, D]) before pooling, which
    the rest is a function of.
    """
    for index in reversed(range(len(nodes) - 1)):
        node = nodes[index]
        shape = shapes.nodes.get(node)
        if (
            shape is None
            or len(shape) not in (3, 4)
            or node in shapes.written
            or not is_cut(nodes, index)
        ):
            continue
        maps = (
            shape[1:3]
            if is_nhwc(network) and len(shape) == 4
            else shape[2:]
            if len(shape) == 4
            else shape[1:2]
        )
        pooled = node.op == "call_module" and isinstance(
            network.get_submodule(node.target), nn.AdaptiveAvgPool2d
        )
        if maps.numel() > 1 and not pooled:
            return index
    return None


def is_nhwc(network: nn.Module) -> bool:
    """Whether feature maps are [B, H, W, c]: timm's networks say so."""
    return getattr(network, "output_fmt", None) == "NHWC"


class TokensToMaps(nn.Module):
    """Tokens [B, prefix + H * W, D] to feature maps [B, D, H, W], without the prefix (class and
    register tokens).
    """

    def __init__(self, prefix: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.prefix = prefix
        self.grid = grid

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens[:, self.prefix :].transpose(1, 2).unflatten(2, self.grid)


class ChannelsFirst(nn.Module):
    """Feature maps [B, H, W, c] to [B, c, H, W]."""

    def forward(self, maps: Tensor) -> Tensor:
        return maps.permute(0, 3, 1, 2)


def maps_view(network: nn.Module, shape: torch.Size) -> tuple[nn.Module, int]:
    """What makes feature maps [B, c, H, W] of a network's features of that shape, and c.

    Raises:
        ConfigError: tokens that are no grid.
    """
    if len(shape) == 4:
        return (ChannelsFirst(), shape[3]) if is_nhwc(network) else (nn.Identity(), shape[1])
    count = shape[1]
    grid = getattr(getattr(network, "patch_embed", None), "grid_size", None)
    if grid is None:
        squares = (side for side in range(int(count**0.5), 0, -1) if count - side * side <= 8)
        side = next(squares, 0)
        grid = (side, side)
    prefix = count - grid[0] * grid[1]
    if prefix < 0 or grid[0] < 1 or prefix > 8:
        raise ConfigError(
            f"{type(network).__name__} ends in {count} tokens, which are not a grid of patches and"
            " a few tokens before it"
        )
    return TokensToMaps(prefix, tuple(grid)), shape[2]


def list_split_points(module: nn.Module, input_size: Sequence[int] | None = None) -> list[str]:
    """Where ``branch_out`` can split a classifier: its stages and blocks by dotted name, in the
    order of execution.

    Args:
        module: a classifier, on any device; it is not changed.
        input_size: channels, height and width of an image; None is what the network says, else (3,
            224, 224).

    Raises:
        ConfigError: its forward cannot be followed, or it cannot take such an image.
    """
    network = meta_copy(module)
    graph = trace(network)
    shapes = record_shapes(network, graph, input_size or default_input_size(module))
    nodes = [node for node in graph.nodes if node.op not in ("placeholder", "get_attr")]
    end = feature_node(network, nodes, shapes)
    if end is None:
        return []
    # A stage and its first block begin at the same place; the stage names it. Before the first
    # layer there is no trunk.
    points: dict[int, str] = {}
    for name, before in _points(network, nodes[: end + 1], ""):
        points.setdefault(before, name)
    points.pop(0, None)
    return list(points.values())


def _points(
    module: nn.Module,
    nodes: Sequence[fx.Node],
    prefix: str,
    before: int = 0,
    earlier: frozenset[int] = frozenset(),
    later: frozenset[int] = frozenset(),
) -> Iterable[tuple[str, int]]:
    """Split points with the number of parameters before each; descends into containers of blocks.

    ``earlier`` and ``later`` are the tensors used before and after the container.
    """
    graph = nodes[0].graph
    for node in nodes:
        if node.op != "call_module":
            continue
        child = module.get_submodule(node.target)
        tail = tail_from(graph, node)
        trunk = [
            each
            for each in graph.nodes
            if each not in tail and each.op not in ("placeholder", "get_attr")
        ]
        used, needed = earlier | _tensor_ids(module, trunk), later | _tensor_ids(module, tail)
        if (
            any(parameter.dim() > 1 for parameter in child.parameters())
            and len(uses(tail)) == 1
            and not used & needed
        ):
            yield prefix + node.target, before
            if _holds_blocks(child):
                try:
                    inner = trace(child)
                except ConfigError:
                    inner = None
                if inner is not None:
                    calls = [
                        each for each in inner.nodes if each.op not in ("placeholder", "get_attr")
                    ]
                    yield from _points(
                        child,
                        calls,
                        f"{prefix}{node.target}.",
                        before,
                        used,
                        later | _tensor_ids(module, tail[1:]),
                    )
        before += sum(parameter.numel() for parameter in child.parameters())


def _holds_blocks(module: nn.Module) -> bool:
    """Whether a module is a container of blocks or layers, and not a block itself."""
    if type(module) is nn.Sequential:
        return True
    groups = [
        module,
        *(
            child
            for child in module.children()
            if isinstance(child, (nn.Sequential, nn.ModuleList))
        ),
    ]
    return any(repeats(child, group.children()) for group in groups for child in group.children())


def repeats(block: nn.Module, siblings: Iterable[nn.Module]) -> bool:
    """Whether a module is one of several blocks of one class that stand side by side: each with two
    layers or more.
    """
    if (
        isinstance(block, nn.Sequential)
        or sum(isinstance(layer, _LAYERS) for layer in block.modules()) < 2
    ):
        return False
    return sum(type(sibling) is type(block) for sibling in siblings) > 1
