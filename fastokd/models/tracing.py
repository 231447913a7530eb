"""Split points of a network, found by following its forward with ``torch.fx`` down to the cut.

Only the network and the containers on the way to the cut are traced. Everything else stays a call
of the module, which keeps its control flow, its training flag and its hooks.
"""

import copy
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fastokd.errors import ConfigError, first_line

DROPOUTS: dict[object, Callable[..., nn.Module]] = {
    F.dropout: nn.Dropout,
    F.dropout2d: nn.Dropout2d,
    F.alpha_dropout: nn.AlphaDropout,
}
NOT_COMPUTED = ("placeholder", "get_attr", "output")


class _ImagesOnly(nn.Module):
    """A network called with images alone: its forward may have further optional arguments."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)


class _Tracer(fx.Tracer):
    """Follow the forward of the modules named in ``opened``; record all others as calls."""

    def __init__(self, opened: Collection[str]) -> None:
        super().__init__()
        self.opened = {"network", *(f"network.{name}" for name in opened)}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name not in self.opened


def _untraceable(network: nn.Module, error: Exception) -> ConfigError:
    name, reason = type(network).__name__, first_line(error)
    return ConfigError(
        f"the forward of {name} cannot be followed by torch.fx ({reason}); a network can be"
        " branched if its forward is a fixed sequence of calls"
    )


def trace(network: nn.Module, opened: Collection[str] = ()) -> fx.Graph:
    """The forward of a network and of its modules named in ``opened`` as a graph of calls.

    The network's training flags are changed: pass a copy.

    Raises:
        ConfigError: the forward cannot be followed, or differs between training and evaluation.
    """
    graphs = []
    for training in (True, False):
        try:
            graph = _Tracer(opened).trace(_ImagesOnly(network.train(training)))
        except Exception as error:  # a forward may raise any exception for a symbolic tensor
            raise _untraceable(network, error) from error
        for node in graph.nodes:
            if node.op in ("call_module", "get_attr"):
                node.target = target(node).removeprefix("network.")
            elif node.op == "call_function" and node.target in DROPOUTS:
                # The flag at trace time; ``_dropout`` makes a module with its own flag.
                node.kwargs = {key: v for key, v in node.kwargs.items() if key != "training"}
        graphs.append(graph)
    if str(graphs[0]) != str(graphs[1]):
        name = type(network).__name__
        raise ConfigError(
            f"the forward of {name} differs between training and evaluation (auxiliary"
            " classifiers?), so it cannot be branched; build it without them"
        )
    return graphs[0]


def target(node: fx.Node) -> str:
    """The dotted name of the module or tensor that a node uses."""
    return str(node.target)


def uses(nodes: Iterable[fx.Node]) -> list[fx.Node]:
    """The inputs of a part of a graph, without the parameters that it reads."""
    inside = set(nodes)
    inputs = (value for node in nodes for value in node.all_input_nodes)
    return list(dict.fromkeys(v for v in inputs if v not in inside and v.op != "get_attr"))


def tail_from(graph: fx.Graph, start: fx.Node) -> list[fx.Node]:
    """A node and everything that depends on it, in order."""
    found = {start}
    for node in graph.nodes:
        if any(value in found for value in node.all_input_nodes):
            found.add(node)
    return [node for node in graph.nodes if node in found]


def part(
    source: nn.Module, nodes: Sequence[fx.Node], start: fx.Node, end: fx.Node
) -> fx.GraphModule:
    """A module that computes ``end`` from ``start`` with the source's modules."""
    graph = fx.Graph()
    copies = {start: graph.placeholder("x")}
    holder = nn.Module()
    for node in nodes:
        for value in node.all_input_nodes:
            if value.op == "get_attr" and value not in copies:
                copies[value] = graph.node_copy(value)
        if node.op == "call_function" and node.target in DROPOUTS:
            copies[node] = _dropout(graph, holder, node, copies)
        else:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(copies[end])
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr") and not hasattr(holder, target(node)):
            put(holder, target(node), get(source, target(node)))
    holder.training = source.training
    return fx.GraphModule(holder, graph, f"{type(source).__name__}Part")


def _dropout(
    graph: fx.Graph, holder: nn.Module, node: fx.Node, copies: dict[fx.Node, fx.Node]
) -> fx.Node:
    """Replace a call of a dropout function by a module."""
    arguments = dict(zip(("input", "p", "training", "inplace"), node.args, strict=False))
    arguments.update(node.kwargs)
    value: Any = arguments.pop("input")
    arguments.pop("training", None)
    name = f"{node.name}_module"
    holder.add_module(name, DROPOUTS[node.target](**arguments))
    return graph.call_module(name, (copies[value],))


def named(nodes: Iterable[fx.Node]) -> list[str]:
    """The names of the modules and tensors that a part of a graph uses."""
    used: list[fx.Node] = []
    for node in nodes:
        used += [value for value in (*node.all_input_nodes, node) if value.op == "get_attr"]
        used += [node] if node.op == "call_module" else []
    return list(dict.fromkeys(map(target, used)))


def tensors(network: nn.Module, path: str) -> list[Tensor]:
    """The parameters and buffers at a dotted path."""
    value = get(network, path)
    return [*value.parameters(), *value.buffers()] if isinstance(value, nn.Module) else [value]


def weights(network: nn.Module, nodes: Iterable[fx.Node]) -> list[Tensor]:
    """The parameters and buffers that a part of a graph uses."""
    return [tensor for name in named(nodes) for tensor in tensors(network, name)]


def _tensor_ids(network: nn.Module, nodes: Iterable[fx.Node]) -> frozenset[int]:
    return frozenset(map(id, weights(network, nodes)))


def get(root: nn.Module, path: str) -> nn.Module | Tensor:
    """The module, parameter or buffer at a dotted path."""
    parent, _, name = path.rpartition(".")
    value: nn.Module | Tensor = getattr(root.get_submodule(parent), name)
    return value


def put(root: nn.Module, path: str, value: nn.Module | Tensor) -> None:
    """Set a module, parameter or buffer at its dotted path; missing containers are created."""
    *containers, name = path.split(".")
    for container in containers:
        if container not in root._modules:
            root.add_module(container, nn.Module())
        root = root.get_submodule(container)
    # Not setattr: an existing name keeps its position in the order of the modules.
    if isinstance(value, nn.Module):
        root._modules[name] = value
    elif isinstance(value, nn.Parameter):
        root._parameters[name] = value
    else:
        root._buffers[name] = value


class Call(NamedTuple):
    """A called module, the shapes of first argument and output (None: no tensor), and its calls."""

    name: str
    shape_in: torch.Size | None
    shape_out: torch.Size | None
    calls: int


class Shapes(NamedTuple):
    """The shapes of a forward pass of one image."""

    nodes: dict[fx.Node, torch.Size]
    """Of every node whose value is a tensor."""
    modules: dict[str, Call]
    """Of every module, in the order in which they finished."""
    written: set[fx.Node]
    """The nodes whose value another node overwrote."""


class _Recorder(fx.Interpreter):
    """Run a graph and record the shapes."""

    def __init__(self, network: nn.Module, graph: fx.Graph, shapes: Shapes) -> None:
        super().__init__(network, graph=graph)
        self.shapes = shapes
        self.versions: list[tuple[fx.Node, Tensor, int]] = []

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.op == "output":
            return value
        # An in-place operation returns the tensor that it overwrote.
        written = (node for node, tensor, version in self.versions if tensor._version != version)
        self.shapes.written.update(written)
        if isinstance(value, Tensor):
            self.shapes.nodes[n] = value.shape
            self.versions.append((n, value, value._version))
        return value


def record_shapes(network: nn.Module, graph: fx.Graph, input_size: Sequence[int]) -> Shapes:
    """The shapes of a forward pass of one image of ``input_size`` (channels, height, width).

    The network is on the meta device, so that nothing is computed.

    Raises:
        ConfigError: the network cannot take such an image, or cannot be run call by call.
    """
    shapes = Shapes({}, {}, set())
    image = torch.empty(1, *input_size, device="meta")
    network.eval()

    def record(name: str, inputs: tuple[Any, ...], output: Any) -> None:
        before = shapes.modules.pop(name, None)
        shape_in, shape_out = (
            value.shape if isinstance(value, Tensor) else None
            for value in (inputs[0] if inputs else None, output)
        )
        calls = 1 if before is None else before.calls + 1
        shapes.modules[name] = Call(name, shape_in, shape_out, calls)

    handles = [
        module.register_forward_hook(lambda _, *values, name=name: record(name, *values))
        for name, module in network.named_modules()
    ]
    with torch.no_grad():
        try:
            network(image)
        except Exception as error:  # operators of a network raise any exception
            name, size = type(network).__name__, " x ".join(map(str, input_size))
            reason = f"{name} cannot take an image of {size} ({first_line(error)})"
            raise ConfigError(f"{reason}; pass input_size=(channels, height, width)") from error
        finally:
            for handle in handles:
                handle.remove()
        try:
            _Recorder(network, graph, shapes).run(image)
        except Exception as error:
            raise _untraceable(network, error) from error
    return shapes


def meta_copy(network: nn.Module) -> nn.Module:
    """A copy of the network without values, for finding shapes and graphs."""
    return copy.deepcopy(network).to("meta")


def default_input_size(network: nn.Module) -> tuple[int, int, int]:
    """The image size (channels, height, width) a network declares; else 3 x 224 x 224."""
    channels, *size = getattr(network, "pretrained_cfg", {}).get("input_size", (None, 224, 224))
    declared = (
        getattr(network, "image_size", None)
        or getattr(getattr(network, "patch_embed", None), "img_size", None)
        or size
    )
    height, width = (declared, declared) if isinstance(declared, int) else declared
    if channels is None:
        convs = (module for module in network.modules() if isinstance(module, nn.Conv2d))
        channels = next((conv.in_channels for conv in convs), 3)
    return channels, height, width


def feature_node(network: nn.Module, nodes: Sequence[fx.Node], shapes: Shapes) -> int | None:
    """The index of the last maps [B, c, H, W] or tokens [B, N, D] that all later nodes need."""
    for index in reversed(range(len(nodes) - 1)):
        node = nodes[index]
        shape = shapes.nodes.get(node, ())
        if len(shape) not in (3, 4) or node in shapes.written:
            continue
        first = 1 if len(shape) == 3 or is_nhwc(network) else 2
        is_spatial = any(side > 1 for side in shape[first : first + len(shape) - 2])
        module = network.get_submodule(target(node)) if node.op == "call_module" else None
        pooled = isinstance(module, nn.AdaptiveAvgPool2d)
        if is_spatial and not pooled and uses(nodes[index + 1 :]) == [node]:
            return index
    return None


def is_nhwc(network: nn.Module) -> bool:
    """True if feature maps are [B, H, W, c], which timm's networks declare."""
    return getattr(network, "output_fmt", None) == "NHWC"


class TokensToMaps(nn.Module):
    """Tokens [B, prefix + H * W, D], without class and register tokens, to maps [B, D, H, W]."""

    def __init__(self, prefix: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.prefix, self.grid = prefix, grid

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens[:, self.prefix :].transpose(1, 2).unflatten(2, self.grid)


class ChannelsFirst(nn.Module):
    """Feature maps [B, H, W, c] to [B, c, H, W]."""

    def forward(self, maps: Tensor) -> Tensor:
        return maps.permute(0, 3, 1, 2)


def maps_view(network: nn.Module, shape: torch.Size) -> tuple[nn.Module, int]:
    """A module from features of that shape to maps [B, c, H, W], and c; a ConfigError for tokens
    that do not form a grid.
    """
    if len(shape) == 4:
        return (ChannelsFirst(), shape[3]) if is_nhwc(network) else (nn.Identity(), shape[1])
    count = shape[1]
    declared = getattr(getattr(network, "patch_embed", None), "grid_size", None)
    grid = declared or (int(count**0.5), int(count**0.5))
    prefix = count - grid[0] * grid[1]
    if not 0 <= prefix <= 8 or grid[0] < 1:
        reason = f"ends in {count} tokens, which are not a few tokens and a grid of patches"
        raise ConfigError(f"{type(network).__name__} {reason}")
    return TokensToMaps(prefix, tuple(grid)), shape[2]


def list_split_points(module: nn.Module, input_size: Sequence[int] | None = None) -> list[str]:
    """The stages and blocks at which ``branch_out`` can split a classifier, in order of execution.

    Args:
        module: a classifier, on any device; it is not changed.
        input_size: channels, height and width of an image; None for the size that the network
            declares, else (3, 224, 224).

    Raises:
        ConfigError: its forward cannot be followed, or it cannot take such an image.
    """
    network = meta_copy(module)
    graph = trace(network)
    shapes = record_shapes(network, graph, input_size or default_input_size(module))
    nodes = _computed(graph)
    end = feature_node(network, nodes, shapes)
    if end is None:
        return []
    # A stage and its first block start at the same position; the stage names it. Before the first
    # layer, the trunk would be empty.
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
    """Split points with the number of parameters before each; tensors ``earlier`` and ``later`` are
    used before and after the module.
    """
    graph = nodes[0].graph
    for node in nodes:
        if node.op != "call_module":
            continue
        child = module.get_submodule(target(node))
        tail = tail_from(graph, node)
        trunk = [each for each in _computed(graph) if each not in set(tail)]
        used, needed = earlier | _tensor_ids(module, trunk), later | _tensor_ids(module, tail)
        has_weights = any(parameter.dim() > 1 for parameter in child.parameters())
        if has_weights and len(uses(tail)) == 1 and not used & needed:
            name = prefix + target(node)
            yield name, before
            rest = later | _tensor_ids(module, tail[1:])
            if _holds_blocks(child) and (calls := _calls(child)):
                yield from _points(child, calls, f"{name}.", before, used, rest)
        before += sum(parameter.numel() for parameter in child.parameters())


def _calls(module: nn.Module) -> list[fx.Node]:
    """The computations of a module's forward; empty if it cannot be followed."""
    try:
        return _computed(trace(module))
    except ConfigError:
        return []


def _computed(graph: fx.Graph) -> list[fx.Node]:
    """The nodes of a graph without inputs and parameters."""
    return [node for node in graph.nodes if node.op not in ("placeholder", "get_attr")]


def _holds_blocks(module: nn.Module) -> bool:
    """True for a container of blocks or layers, as opposed to a block."""
    containers = (nn.Sequential, nn.ModuleList)
    groups = [module, *(child for child in module.children() if isinstance(child, containers))]
    return type(module) is nn.Sequential or any(
        repeats(child, group.children()) for group in groups for child in group.children()
    )


def repeats(block: nn.Module, siblings: Iterable[nn.Module]) -> bool:
    """True for one of several sibling blocks of one class, with two layers or more."""
    layers = sum(isinstance(layer, (nn.Linear, nn.Conv2d)) for layer in block.modules())
    is_block = layers > 1 and not isinstance(block, nn.Sequential)
    return is_block and sum(type(sibling) is type(block) for sibling in siblings) > 1
