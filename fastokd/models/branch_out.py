"""Branch a classifier of torchvision, timm or the user; its student keeps the original class."""

import copy
import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase

from fastokd.errors import ConfigError, did_you_mean
from fastokd.methods import get_method
from fastokd.models import tracing
from fastokd.models.assembly import assemble, check_layout, check_num_classes
from fastokd.models.branched import Backbone, Branch, BranchedModel
from fastokd.models.layers import conv
from fastokd.models.residual import NORMS, ResidualBlock, zeros_for_identity
from fastokd.models.tracing import Shapes, get, list_split_points, put, target

Init = Literal["auto", "copy", "fresh"]
NOISE = 0.1
"""Noise on the weights of an equal copy, as a fraction of each tensor's standard deviation."""

_REPLACE = "replace it yourself, then branch out"


def branch_out(
    module: nn.Module,
    *,
    at: str,
    num_branches: int | None = None,
    deepen: int = 2,
    method: str = "ahbf",
    num_classes: int | None = None,
    init: Init = "auto",
    input_size: Sequence[int] | None = None,
) -> BranchedModel:
    """Branch a classifier: all before ``at`` becomes the trunk, ``at`` and the rest exist M times.

    The branch that the method keeps is the module's own: ``student()`` returns a module of the
    original class with the original state dict. The module itself is not changed. For hierarchical
    methods (AHBF), branch m has ``(m - 1) * deepen`` more blocks: copies of the branch's last
    residual block that keeps its input's shape, inserted after it, or new residual blocks on the
    last feature maps if it has no such block (DenseNet, VGG, SqueezeNet).

    The trunk and the kept branch have the module's weights. The other branches:

    - ``init="copy"``, for trained modules: the module's weights too. An added block starts as the
      identity (its residual is multiplied by a learned number, 0 at the start: ReZero, Bachlechner
      et al., UAI 2021), so deeper branches start as the trained network. Branches of equal depth
      would get equal gradients and stay equal, so all but the kept one get Gaussian noise of a
      tenth of each weight's standard deviation.
    - ``init="fresh"``, for training from scratch: drawn from a normal distribution with the mean
      and the standard deviation of each parameter in the module; normalization layers and their
      statistics are reset. This follows the module's initialization; constants (biases at 0, scales
      at 1) stay.
    - ``init="auto"``: "fresh" if every normalization layer has one value for all its channels, as
      before training (without such layers: if every bias has), else "copy".

    Args:
        module: a classifier, images [B, channels, H, W] to logits [B, C], whose forward outside of
            the blocks ``torch.fx`` can follow.
        at: dotted name of the first module that each branch owns, e.g. "layer3", "features.5",
            "stages.2", "blocks.8"; see ``list_split_points``.
        num_branches: M; None for the method's default.
        deepen: additional blocks per hierarchy level (the paper's a), at least 0.
        method: a method, see ``fastokd.methods.list_methods``.
        num_classes: C; None for the module's. Another number replaces the last layer by a fresh one
            in every branch, with a warning that names it.
        init: see above.
        input_size: channels, height and width of an image; None for the size that the network
            declares, else (3, 224, 224).

    Raises:
        ConfigError: the module cannot be split there or is no classifier, or a number is wrong.
    """
    if init not in get_args(Init):
        raise ConfigError(f"unknown init '{init}'{did_you_mean(init, get_args(Init))}")
    if not isinstance(deepen, int) or deepen < 0:
        fix = "it must be a whole number of at least 0 (the paper uses 2 on ImageNet)"
        raise ConfigError(f"deepen={deepen!r}; {fix}")
    chosen = get_method(method)
    num_branches = chosen.default_branches if num_branches is None else num_branches
    module = copy.deepcopy(module)
    split = Split(module, at, input_size, num_classes)
    if init == "auto":
        init = "copy" if _is_trained(module) else "fresh"
    sources = _copies(module, split.replaced, init, equal=not (chosen.hierarchical and deepen))
    backbone = split.backbone(type(module).__name__, sources)
    topology = check_layout(chosen, [backbone.name], "branches", num_branches)
    return assemble([backbone], chosen, split.num_classes, num_branches, deepen, topology)


Source = tuple[nn.Module, Callable[[nn.Module], nn.Module]]
"""A network that provides modules, and a function that makes a new block from one of its blocks."""


class Split:
    """A classifier cut into trunk, body and head; arguments and errors as in ``branch_out``.

    Its last layer is replaced if ``num_classes`` differs from the module's.
    """

    def __init__(
        self,
        module: nn.Module,
        at: str,
        input_size: Sequence[int] | None = None,
        num_classes: int | None = None,
    ) -> None:
        self.kind = type(module).__name__
        self.at = at
        self.size = tuple(input_size or tracing.default_input_size(module))
        network = tracing.meta_copy(module)
        try:
            network.get_submodule(at)
        except AttributeError:
            hint = did_you_mean(at, list_split_points(network, self.size))
            raise ConfigError(f"at='{at}': {self.kind} has no module of that name{hint}") from None
        steps = at.split(".")
        self.opened = [".".join(steps[:count]) for count in range(1, len(steps))]
        graph = tracing.trace(network, self.opened)
        shapes = tracing.record_shapes(network, graph, self.size)
        self.num_classes, self.replaced = self._classifier(module, graph, shapes, num_classes)
        self._cut(network, graph, shapes)
        self._check_sharing(network)
        self.grown = self._grown(network, shapes)

    def _error(self, network: nn.Module, reason: str) -> ConfigError:
        points = ", ".join(list_split_points(network, self.size)) or "none"
        where = f"at='{self.at}': {self.kind} cannot be split there"
        return ConfigError(f"{where}: {reason}; split points: {points}")

    def _classifier(
        self, module: nn.Module, graph: fx.Graph, shapes: Shapes, wanted: int | None
    ) -> tuple[int, str | None]:
        """The number of classes, and the name of the last layer if it was replaced."""
        output: Any = next(node for node in graph.nodes if node.op == "output").args[0]
        logits = shapes.nodes.get(output) if isinstance(output, fx.Node) else None
        layers = [
            call
            for call in shapes.modules.values()
            if isinstance(module.get_submodule(call.name), (nn.Linear, nn.Conv2d))
        ]
        last, shape = (layers[-1].name, layers[-1].shape_out) if layers else ("missing", None)
        if shape is None or logits is None or len(logits) != 2 or shape[1] != logits[1]:
            result = "several values" if logits is None else list(logits)
            raise ConfigError(
                f"{self.kind} is no classifier: for one image it returns {result}, and its last"
                f" layer is {last}; it must be a linear layer or 1x1 convolution to logits [B, C]"
            )
        if wanted is None or wanted == logits[1]:
            return logits[1], None
        self._replace_classifier(module, last, wanted)
        again = tracing.record_shapes(tracing.meta_copy(module), graph, self.size).nodes[output]
        if again[1] != wanted:
            reason = f"replacing the last layer '{last}' gives logits {list(again)}"
            raise ConfigError(f"num_classes={wanted}: {reason}; {_REPLACE}")
        change = f"its last layer '{last}' is replaced by a fresh one for {wanted}"
        warnings.warn(f"{self.kind} has {logits[1]} classes: {change}", stacklevel=4)
        return wanted, last

    def _replace_classifier(self, module: nn.Module, name: str, wanted: int) -> None:
        """Put a fresh last layer with ``wanted`` outputs into the module."""
        check_num_classes(wanted)
        before: Any = module.get_submodule(name)
        kind, bias = type(before), before.bias is not None
        if kind is nn.Linear:
            after: nn.Module = nn.Linear(before.in_features, wanted, bias)
        elif kind is nn.Conv2d:
            geometry = (before.kernel_size, before.stride, before.padding)
            after = nn.Conv2d(before.in_channels, wanted, *geometry, bias=bias)
        else:
            reason = f"the last layer '{name}' is a {kind.__name__}"
            raise ConfigError(f"num_classes={wanted}: {reason}; {_REPLACE}")
        put(module, name, after.to(before.weight.device, before.weight.dtype))
        if hasattr(module, "num_classes"):
            setattr(module, "num_classes", wanted)  # noqa: B010  # not declared by nn.Module

    def _cut(self, network: nn.Module, graph: fx.Graph, shapes: Shapes) -> None:
        calls = [node for node in graph.nodes if node.op not in tracing.NOT_COMPUTED]
        modules = (node for node in calls if node.op == "call_module")
        owned = [node for node in modules if f"{target(node)}.".startswith(f"{self.at}.")]
        if not owned:
            raise self._error(network, "its forward does not call it")
        tail = [node for node in tracing.tail_from(graph, owned[0]) if node.op != "output"]
        entering = tracing.uses(tail)
        if len(entering) != 1:
            crossing = f"{len(entering)} tensors cross this point ({_titles(entering)})"
            fix = "as inside a residual or dense block; a split needs exactly one"
            raise self._error(network, f"{crossing}, {fix}")
        self.input = next(node for node in graph.nodes if node.op == "placeholder")
        self.cut = entering[0]
        self.trunk_nodes = [node for node in calls if node not in set(tail)]
        if not any(weight.numel() for weight in tracing.weights(network, self.trunk_nodes)):
            raise self._error(network, "no parameters before this point, so the trunk is empty")
        end = tracing.feature_node(network, [self.cut, *tail], shapes)
        if not end:
            raise self._error(network, "it comes after the last feature maps")
        if self.cut in shapes.written:
            reason = "the first operation there overwrites its input, which branches share"
            raise self._error(network, reason)
        self.body_nodes, self.head_nodes = tail[:end], tail[end:]
        self.features, self.logits = tail[end - 1], tail[-1]
        shape = shapes.nodes[self.cut]
        channels_first = len(shape) == 4 and not tracing.is_nhwc(network)
        self.trunk_channels = shape[1 if channels_first else -1]
        self.view, self.channels = tracing.maps_view(network, shapes.nodes[self.features])

    @property
    def _parts(self) -> dict[str, list[fx.Node]]:
        return {"trunk": self.trunk_nodes, "body": self.body_nodes, "head": self.head_nodes}

    def _check_sharing(self, network: nn.Module) -> None:
        """Refuse weights that several parts use: copying the parts would separate them."""
        owner: dict[int, str] = {}
        for title, nodes in self._parts.items():
            for name in tracing.named(nodes):
                for tensor in tracing.tensors(network, name):
                    if owner.setdefault(id(tensor), title) != title:
                        raise self._error(network, f"'{name}' is used on both sides")

    def _grown(self, network: nn.Module, shapes: Shapes) -> tuple[str, str | None]:
        """The module after which blocks are added; the block to copy, None for ``AddedBlock``."""
        calls = [node for node in self.body_nodes if node.op == "call_module"]
        targets, other = tuple(f"{target(node)}." for node in calls), ""
        # A block finishes after the blocks inside it.
        for call in reversed(shapes.modules.values()):
            keeps_shape = call.shape_in is not None and call.shape_in == call.shape_out
            if call.calls == 1 and keeps_shape and f"{call.name}.".startswith(targets):
                block = network.get_submodule(call.name)
                siblings = network.get_submodule(call.name.rpartition(".")[0]).children()
                if tracing.repeats(block, siblings):
                    if _is_residual(block, call.shape_in):
                        return call.name, call.name
                    other = other or call.name
        shape = shapes.nodes[self.features]
        ends = [target(node) for node in calls if shapes.nodes.get(node) == shape]
        if ends and isinstance(self.view, nn.Identity):
            return ends[-1], None
        return other, other or None

    def branch(
        self, source: nn.Module, num_blocks: int, new_block: Callable[[nn.Module], nn.Module]
    ) -> "PartBranch":
        """A branch of a source's modules and ``num_blocks`` more, which ``new_block`` makes."""
        if num_blocks:
            end, block = self.grown
            if not end:
                reason = f"{self.kind} from '{self.at}' on has no block that could be repeated"
                fix = "deepen=0 (--aux-blocks 0) makes branches of equal depth"
                raise ConfigError(f"{reason}; {fix}")
            last, like = source.get_submodule(end), next(source.parameters())
            blocks = [
                new_block(last) if block else AddedBlock(self.channels).to(like.device, like.dtype)
                for _ in range(num_blocks)
            ]
            put(source, end, Blocks(last, *blocks) if block else nn.Sequential(last, *blocks))
        body = tracing.part(source, self.body_nodes, self.cut, self.features)
        head = tracing.part(source, self.head_nodes, self.features, self.logits)
        return PartBranch(body, head, self.channels, copy.deepcopy(self.view))

    def backbone(self, name: str, sources: Iterator[Source]) -> Backbone:
        """The backbone that ``BranchedModel`` is built from.

        A trunk and the first branch built after it share one of ``sources``, which are networks of
        this structure; each further branch takes another.
        """
        shell = nn.Module()
        unfinished: list[Source] = []  # of a trunk, for the next branch

        def build_trunk() -> nn.Module:
            nonlocal shell
            unfinished[:] = [next(sources)]
            source = unfinished[0][0]
            shell = self._shell(source)
            trunk: Any = tracing.part(source, self.trunk_nodes, self.input, self.cut)
            trunk.channels = self.trunk_channels
            return trunk

        def build_branch(num_classes: int, level: int, aux_blocks: int) -> Branch:
            source, new_block = unfinished.pop() if unfinished else next(sources)
            return self.branch(source, (level - 1) * aux_blocks, new_block)

        def join(trunk: nn.Module, branch: Branch) -> nn.Module:
            network = copy.deepcopy(shell)
            owners = (trunk, branch.body, branch.head)
            for nodes, owner in zip(self._parts.values(), owners, strict=True):
                for path in tracing.named(nodes):
                    put(network, path, get(owner, path))
            for path in self.opened:
                network.get_submodule(path).training = trunk.training
            return network

        return Backbone(name, build_trunk, build_branch, join, self.size[1])

    def _shell(self, source: nn.Module) -> nn.Module:
        """The network without the modules and tensors of trunk and branches."""
        memo: dict[int, object] = {}
        for path in tracing.named(itertools.chain(*self._parts.values())):
            value = get(source, path)
            is_module = isinstance(value, nn.Module)
            memo[id(value)] = nn.Identity() if is_module else type(value)(torch.empty(0))
        return copy.deepcopy(source, memo)


class PartBranch(Branch):
    """A branch whose features may be tokens; ``view`` turns them into maps for gates."""

    def __init__(self, body: nn.Module, head: nn.Module, channels: int, view: nn.Module) -> None:
        super().__init__(body, head, channels)
        self.view = view

    def finish(self, features: Tensor) -> tuple[Tensor, Tensor]:
        return self.view(features), self.head(features)


class Blocks(nn.Sequential):
    """Blocks of one kind in place of one; all receive that one's further arguments."""

    def forward(self, x: Tensor, /, *others: Any, **options: Any) -> Tensor:  # type: ignore[override]  # Sequential takes one argument
        for block in self:
            x = block(x, *others, **options)
        return x


class GrowingBlock(nn.Module):
    """``x + scale * (block(x) - x)`` with a learned scale that is 0 at the start: the identity."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block
        like = next(block.parameters())
        self.scale = nn.Parameter(torch.zeros((), device=like.device, dtype=like.dtype))

    def forward(self, x: Tensor, *others: Any, **options: Any) -> Tensor:
        return x + self.scale * (self.block(x, *others, **options) - x)


class AddedBlock(ResidualBlock):
    """A residual block on feature maps [B, channels, H, W] of any sign (He et al., ECCV 2016).

    Three convolutions through a quarter of the channels, in pre-activation order. It starts as the
    identity: the last convolution is 0.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        width = max(channels // 4, 1)
        self.residual = nn.Sequential()
        for inputs, outputs, kernel in zip(
            (channels, width, width), (width, width, channels), (1, 3, 1), strict=True
        ):
            last = conv(inputs, outputs, kernel)
            self.residual.extend((nn.BatchNorm2d(inputs), nn.ReLU(inplace=True), last))
        nn.init.zeros_(last.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.add(self.residual(x), x)


def _is_residual(block: nn.Module, shape: Any) -> bool:
    """True if a block can start as the identity, or if its forward needs further arguments."""
    with torch.device("cpu"):
        try:
            x = torch.rand(shape, generator=torch.Generator().manual_seed(0))
            return zeros_for_identity(block, x) is not None
        except Exception:  # a forward without its further arguments raises any exception
            return True


def fresh_block(block: nn.Module) -> nn.Module:
    """A copy of a block with newly drawn weights."""
    return _redraw(copy.deepcopy(block))


def _copies(module: nn.Module, replaced: str | None, init: Init, equal: bool) -> Iterator[Source]:
    """The module, then copies with weights by ``init``; ``equal`` if all have the same depth."""
    new_block = fresh_block if init == "fresh" else lambda block: GrowingBlock(copy.deepcopy(block))
    yield copy.deepcopy(module), new_block
    while True:
        source = copy.deepcopy(module)
        if init == "fresh":
            _redraw(source)
        elif replaced is not None:
            _redraw(source.get_submodule(replaced))
        if init != "fresh" and equal:
            _add_noise(source)
        yield source, new_block


@torch.no_grad()
def _redraw(module: nn.Module) -> nn.Module:
    """Draw every parameter again with its mean and deviation; constants stay, norms are reset."""
    for norm in module.modules():
        if isinstance(norm, NORMS) and not all(map(_is_constant, norm.parameters())):
            norm.reset_parameters()
        if isinstance(norm, _NormBase):
            norm.reset_running_stats()
    for parameter in module.parameters():
        if not _is_constant(parameter):
            parameter.copy_(torch.randn_like(parameter) * parameter.std() + parameter.mean())
    return module


@torch.no_grad()
def _add_noise(module: nn.Module) -> None:
    for parameter in module.parameters():
        if parameter.dim() > 1 and not _is_constant(parameter):
            parameter.add_(torch.randn_like(parameter) * (NOISE * parameter.std()))


def _is_trained(module: nn.Module) -> bool:
    """True if parameters that are constant at initialization are not; see ``branch_out``."""
    norms = (norm for norm in module.modules() if isinstance(norm, NORMS))
    parameters = [parameter for norm in norms for parameter in norm.parameters()]
    biases = (p for name, p in module.named_parameters() if name.endswith("bias"))
    return not all(map(_is_constant, parameters or biases))


def _is_constant(tensor: Tensor) -> bool:
    return tensor.is_meta or tensor.numel() == 0 or bool((tensor == tensor.flatten()[0]).all())


def _titles(nodes: Sequence[fx.Node]) -> str:
    """The names of values in messages."""
    return ", ".join(
        f"'{node.target}'"
        if node.op in ("call_module", "placeholder")
        else node.name.removeprefix("network_")
        for node in nodes
    )
