"""Branches a classifier of torchvision, timm or one's own at a named stage; the student is that
classifier again.
"""

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase

from fastokd.errors import ConfigError, did_you_mean
from fastokd.methods import get_method
from fastokd.models.assembly import assemble, check_layout
from fastokd.models.branched import Backbone, Branch, BranchedModel
from fastokd.models.layers import conv
from fastokd.models.tracing import (
    Shapes,
    default_input_size,
    feature_node,
    is_nhwc,
    list_split_points,
    maps_view,
    meta_copy,
    named,
    part,
    put,
    record_shapes,
    repeats,
    tail_from,
    tensors,
    trace,
    uses,
)

Init = Literal["auto", "copy", "fresh"]
# What is added to the weights of an equal copy, as a share of each tensor's standard deviation.
NOISE = 0.1
_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm)


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
    """Branch a classifier: what comes before ``at`` becomes the trunk, ``at`` and everything after
    it exists M times.

    The branch that the method keeps is the module's own: ``student()`` is a module of the original
    class with the original state dict. The module itself is left as it is. For hierarchical methods
    (AHBF) branch m has ``(m - 1) * deepen`` blocks more: copies of the last block of the branch
    that keeps its input's shape, behind it; where there is none (DenseNet, VGG), residual blocks on
    the last feature maps.

    The weights of the trunk and of the kept branch are the module's. Those of the other branches:

    - ``init="copy"``, for trained modules: also the module's. An added block starts as the identity
      (its residual is multiplied by a learned number, 0 at the start: ReZero, Bachlechner et al.,
      UAI 2021), so deeper branches start as the trained network. Branches of equal depth would get
      equal gradients and stay equal for ever, so all but the kept one get Gaussian noise of a tenth
      of each weight's standard deviation.
    - ``init="fresh"``, for training from scratch: drawn anew from a normal distribution with the
      mean and the standard deviation that each parameter has in the module, normalisations and
      their statistics reset. So the module's own initialisation is followed whatever it is, and
      constants (biases at 0, scales at 1) stay.
    - ``init="auto"``: "fresh" if every normalisation layer has one value for all its channels, as
      before training (without such layers: if every bias has), else "copy".

    Args:
        module: a classifier, images [B, channels, H, W] to logits [B, C], with a forward that
            ``torch.fx`` can follow outside of the blocks.
        at: dotted name of the first module that branches own, e.g. "layer3", "features.5",
            "stages.2", "blocks.8"; ``list_split_points`` has them.
        num_branches: M; None is the method's default.
        deepen: blocks that each hierarchy level has more than the one before (the paper's a), at
            least 0.
        method: a method, see ``fastokd.methods.list_methods``.
        num_classes: C; None is the module's. Another number replaces the last layer by a fresh one
            in every branch, with a warning that names it.
        init: see above.
        input_size: channels, height and width of an image, for finding shapes; None is what the
            network says, else (3, 224, 224).

    Raises:
        ConfigError: the module cannot be split there, or is no classifier, or a number is out of
            range.
    """
    if init not in get_args(Init):
        raise ConfigError(f"unknown init '{init}'{did_you_mean(init, get_args(Init))}")
    if not isinstance(deepen, int) or deepen < 0:
        raise ConfigError(
            f"deepen={deepen!r}; it must be a whole number of at least 0 (the paper uses 2 on"
            " ImageNet)"
        )
    chosen = get_method(method)
    num_branches = chosen.default_branches if num_branches is None else num_branches
    module = copy.deepcopy(module)
    split = Split(module, at, input_size, num_classes)
    if init == "auto":
        init = "copy" if _is_trained(module) else "fresh"
    sources = _copies(module, split.replaced, init, equal=not (chosen.hierarchical and deepen))
    backbone = split.backbone(type(module).__name__, sources)
    return assemble(
        [backbone],
        chosen,
        split.num_classes,
        num_branches,
        deepen,
        check_layout(chosen, [backbone.name], "branches", num_branches),
    )


Source = tuple[nn.Module, Callable[[nn.Module], nn.Module]]
"""A network that gives its modules to a trunk or a branch, and what makes a further block of one of
its blocks.
"""


class Split:
    """A classifier cut into trunk, body and head.

    Args:
        module: the classifier; its last layer is replaced if ``num_classes`` is another number than
            its own.
        at, input_size, num_classes: see ``branch_out``.

    Raises:
        ConfigError: see ``branch_out``.
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
        self.size = tuple(input_size or default_input_size(module))
        network = meta_copy(module)
        self._check_name(network)
        steps = at.split(".")
        self.opened = [".".join(steps[:count]) for count in range(1, len(steps))]
        graph = trace(network, self.opened)
        shapes = record_shapes(network, graph, self.size)
        self.num_classes, self.replaced = self._classifier(module, graph, shapes, num_classes)
        self._cut(network, graph, shapes)
        self._check_sharing(network)
        self.grown = self._grown(network, shapes)

    def _check_name(self, network: nn.Module) -> None:
        try:
            network.get_submodule(self.at)
        except AttributeError:
            raise ConfigError(
                f"at='{self.at}': {self.kind} has no module of that"
                f" name{did_you_mean(self.at, list_split_points(network, self.size))}"
            ) from None

    def _refuse(self, network: nn.Module, reason: str) -> ConfigError:
        points = ", ".join(list_split_points(network, self.size))
        return ConfigError(
            f"at='{self.at}': {self.kind} cannot be split there: {reason}; split points:"
            f" {points or 'none'}"
        )

    def _classifier(
        self, module: nn.Module, graph: fx.Graph, shapes: Shapes, wanted: int | None
    ) -> tuple[int, str | None]:
        """The number of classes, and the name of the last layer if it was replaced to get it."""
        output = next(node for node in graph.nodes if node.op == "output").args[0]
        logits = shapes.nodes.get(output) if isinstance(output, fx.Node) else None
        layers = [
            call
            for call in shapes.modules.values()
            if isinstance(module.get_submodule(call.name), (nn.Linear, nn.Conv2d))
        ]
        last = layers[-1] if layers else None
        if (
            logits is None
            or len(logits) != 2
            or last is None
            or last.shape_out is None
            or last.shape_out[1] != logits[1]
        ):
            found = "several values" if logits is None else list(logits)
            raise ConfigError(
                f"{self.kind} is no classifier: for one image it gives {found}, and its last layer"
                f" is {last.name if last else 'missing'}; a classifier ends in a linear layer (or"
                " 1x1 convolution) to logits [B, C]"
            )
        if wanted is None or wanted == logits[1]:
            return logits[1], None
        if not isinstance(wanted, int) or wanted < 2:
            raise ConfigError(
                f"num_classes={wanted!r}; a classifier needs a whole number of at least 2"
            )
        before = module.get_submodule(last.name)
        kind = type(before)
        if kind is nn.Linear:
            after: nn.Module = nn.Linear(before.in_features, wanted, before.bias is not None)
        elif kind is nn.Conv2d:
            after = nn.Conv2d(
                before.in_channels,
                wanted,
                before.kernel_size,
                before.stride,
                before.padding,
                bias=before.bias is not None,
            )
        else:
            raise ConfigError(
                f"num_classes={wanted}: the last layer '{last.name}' is a {kind.__name__}; replace"
                " it yourself, then branch out"
            )
        put(module, last.name, after.to(before.weight.device, before.weight.dtype))
        if hasattr(module, "num_classes"):
            module.num_classes = wanted
        if (again := record_shapes(meta_copy(module), graph, self.size).nodes[output])[1] != wanted:
            raise ConfigError(
                f"num_classes={wanted}: replacing the last layer '{last.name}' gives logits"
                f" {list(again)}; replace the classifier yourself, then branch out"
            )
        warnings.warn(
            f"{self.kind} has {logits[1]} classes: its last layer '{last.name}' is replaced by a"
            f" fresh one for {wanted}",
            stacklevel=4,
        )
        return wanted, last.name

    def _cut(self, network: nn.Module, graph: fx.Graph, shapes: Shapes) -> None:
        calls = [
            node for node in graph.nodes if node.op not in ("placeholder", "get_attr", "output")
        ]
        first = next(
            (
                node
                for node in calls
                if node.op == "call_module" and f"{node.target}.".startswith(f"{self.at}.")
            ),
            None,
        )
        if first is None:
            raise self._refuse(network, "its forward does not call it")
        tail = [node for node in tail_from(graph, first) if node.op != "output"]
        entering = uses(tail)
        if len(entering) != 1:
            raise self._refuse(
                network,
                f"{len(entering)} values go on from there"
                f" ({', '.join(_title(node) for node in entering)}), as inside a residual or dense"
                " block, and branches share one",
            )
        self.cut = entering[0]
        self.trunk_nodes = [node for node in calls if node not in set(tail)]
        if not any(
            parameter.numel()
            for name in named(self.trunk_nodes)
            for parameter in tensors(network, name)
        ):
            raise self._refuse(
                network, "nothing with parameters comes before it, so branches would share nothing"
            )
        end = feature_node(network, [self.cut, *tail], shapes)
        if not end:
            raise self._refuse(network, "it comes after the last feature maps")
        self.body_nodes, self.head_nodes = tail[:end], tail[end:]
        self.features = tail[end - 1]
        self.logits = tail[-1]
        if self.cut in shapes.written:
            raise self._refuse(
                network, "the first operation there overwrites its input, which branches share"
            )
        shape = shapes.nodes[self.cut]
        self.trunk_channels = shape[1] if len(shape) == 4 and not is_nhwc(network) else shape[-1]
        self.view, self.channels = maps_view(network, shapes.nodes[self.features])
        self.input = next(node for node in graph.nodes if node.op == "placeholder")

    def _check_sharing(self, network: nn.Module) -> None:
        """Weights that several parts use would not be one tensor any more."""
        owner: dict[int, str] = {}
        for title, nodes in (
            ("trunk", self.trunk_nodes),
            ("branches", self.body_nodes),
            ("heads", self.head_nodes),
        ):
            for name in named(nodes):
                for tensor in tensors(network, name):
                    if owner.setdefault(id(tensor), title) != title:
                        raise self._refuse(network, f"'{name}' is used on both sides")

    def _grown(self, network: nn.Module, shapes: Shapes) -> tuple[str, str | None]:
        """The module behind which blocks are added, and the block to copy; None for residual blocks
        of our own.
        """
        targets = [node.target for node in self.body_nodes if node.op == "call_module"]
        inside = [
            call
            for call in shapes.modules.values()
            if any(f"{call.name}.".startswith(f"{target}.") for target in targets)
        ]
        keeping = [
            call.name
            for call in inside
            if call.calls == 1 and call.shape_in is not None and call.shape_in == call.shape_out
        ]
        blocks = []
        for name in keeping:
            parent = network.get_submodule(name.rpartition(".")[0])
            if repeats(network.get_submodule(name), parent.children()):
                blocks.append(name)
        outermost = [
            name for name in blocks if not any(name.startswith(f"{other}.") for other in blocks)
        ]
        if outermost:
            return outermost[-1], outermost[-1]
        shape = shapes.nodes[self.features]
        ends = [
            node.target
            for node in self.body_nodes
            if node.op == "call_module" and shapes.nodes.get(node) == shape
        ]
        if not ends or not isinstance(self.view, nn.Identity):
            return "", None
        return ends[-1], None

    def trunk(self, source: nn.Module) -> nn.Module:
        """The trunk, of the modules of a source: a network of the same structure."""
        trunk = part(source, self.trunk_nodes, self.input, self.cut)
        trunk.channels = self.trunk_channels
        return trunk

    def branch(
        self, source: nn.Module, num_blocks: int, new_block: Callable[[nn.Module], nn.Module]
    ) -> "PartBranch":
        """The branch, of the modules of a source, with ``num_blocks`` more; ``new_block`` makes one
        of the block to copy.
        """
        if num_blocks:
            end, block = self.grown
            if not end:
                raise ConfigError(
                    f"{self.kind} from '{self.at}' on has no block that could be repeated; deepen=0"
                    " (--aux-blocks 0) makes branches of equal depth"
                )
            last = source.get_submodule(end)
            like = next(source.parameters())
            blocks = [
                new_block(last) if block else AddedBlock(self.channels).to(like.device, like.dtype)
                for _ in range(num_blocks)
            ]
            put(source, end, Blocks(last, *blocks) if block else nn.Sequential(last, *blocks))
        body = part(source, self.body_nodes, self.cut, self.features)
        head = part(source, self.head_nodes, self.features, self.logits)
        return PartBranch(body, head, self.channels, copy.deepcopy(self.view))

    def backbone(self, name: str, sources: Iterator[Source]) -> Backbone:
        """What ``BranchedModel`` is built with.

        Args:
            name: of the network.
            sources: networks of this structure. A trunk takes one, the first branch built after it
                the rest of it; every other branch takes one of its own.
        """
        source: nn.Module | None = None
        shell: nn.Module | None = None
        new_block: Callable[[nn.Module], nn.Module] = fresh_block
        rest = False

        def build_trunk() -> nn.Module:
            nonlocal source, new_block, shell, rest
            (source, new_block), rest = next(sources), True
            shell = self._shell(source)
            return self.trunk(source)

        def build_branch(num_classes: int, level: int, aux_blocks: int) -> Branch:
            nonlocal rest
            own, new = (source, new_block) if rest else next(sources)
            rest = False
            return self.branch(own, (level - 1) * aux_blocks, new)

        def join(trunk: nn.Module, branch: Branch) -> nn.Module:
            network = copy.deepcopy(shell)
            for nodes, own in (
                (self.trunk_nodes, trunk),
                (self.body_nodes, branch.body),
                (self.head_nodes, branch.head),
            ):
                for path in named(nodes):
                    parent, _, name = path.rpartition(".")
                    put(network, path, getattr(own.get_submodule(parent), name))
            for path in self.opened:
                network.get_submodule(path).training = trunk.training
            return network

        return Backbone(name, build_trunk, build_branch, join, self.size[1])

    def _shell(self, source: nn.Module) -> nn.Module:
        """The network without what trunk and branches hold."""
        held = named([*self.trunk_nodes, *self.body_nodes, *self.head_nodes])
        memo: dict[int, object] = {}
        for path in held:
            parent, _, name = path.rpartition(".")
            value = getattr(source.get_submodule(parent), name)
            memo[id(value)] = (
                nn.Identity() if isinstance(value, nn.Module) else type(value)(torch.empty(0))
            )
        return copy.deepcopy(source, memo)


class PartBranch(Branch):
    """A branch of which the features may be tokens; gates see them as feature maps.

    Args:
        body, head, channels: see ``Branch``.
        view: the body's output to feature maps [B, channels, H, W].
    """

    def __init__(self, body: nn.Module, head: nn.Module, channels: int, view: nn.Module) -> None:
        super().__init__(body, head, channels)
        self.view = view

    def finish(self, features: Tensor) -> tuple[Tensor, Tensor]:
        return self.view(features), self.head(features)


class Blocks(nn.Sequential):
    """Blocks of one kind in a row, in the place of one; whatever else that one is called with, all
    get.
    """

    def forward(self, x: Tensor, *others: Any, **options: Any) -> Tensor:
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


class AddedBlock(nn.Module):
    """A residual block on feature maps [B, channels, H, W] of any sign, in pre-activation order (He
    et al., ECCV 2016).

    Three convolutions through a quarter of the channels. It starts as the identity: the last
    convolution is 0.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        width = max(channels // 4, 1)
        self.residual = nn.Sequential()
        for outputs, inputs, kernel in (
            (width, channels, 1),
            (width, width, 3),
            (channels, width, 1),
        ):
            self.residual.extend(
                (nn.BatchNorm2d(inputs), nn.ReLU(inplace=True), conv(inputs, outputs, kernel))
            )
        nn.init.zeros_(self.residual[-1].weight)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.residual(x)


def fresh_block(block: nn.Module) -> nn.Module:
    """A copy of a block with its weights drawn anew."""
    return _redraw(copy.deepcopy(block))


def _copies(module: nn.Module, replaced: str | None, init: Init, equal: bool) -> Iterator[Source]:
    """The module, then copies of it with weights as ``branch_out`` says under ``init``; ``equal``
    if their depth is equal too.
    """
    new_block = fresh_block if init == "fresh" else lambda block: GrowingBlock(copy.deepcopy(block))
    yield copy.deepcopy(module), new_block
    while True:
        source = copy.deepcopy(module)
        if init == "fresh":
            _redraw(source)
        else:
            if replaced is not None:
                _redraw(source.get_submodule(replaced))
            if equal:
                _add_noise(source)
        yield source, new_block


@torch.no_grad()
def _redraw(module: nn.Module) -> nn.Module:
    """Draw every parameter anew with its own mean and standard deviation; constants stay, trained
    normalisations are reset.
    """
    norms = [norm for norm in module.modules() if isinstance(norm, _NORMS)]
    for norm in norms:
        if not all(_is_constant(parameter) for parameter in norm.parameters()):
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
    """Whether a module has been trained, by what initialisation leaves constant; see
    ``branch_out``.
    """
    norms = [
        parameter
        for norm in module.modules()
        if isinstance(norm, _NORMS)
        for parameter in norm.parameters()
    ]
    found = norms or [
        parameter for name, parameter in module.named_parameters() if name.endswith("bias")
    ]
    return not all(_is_constant(parameter) for parameter in found)


def _is_constant(tensor: Tensor) -> bool:
    return tensor.is_meta or tensor.numel() == 0 or bool((tensor == tensor.flatten()[0]).all())


def _title(node: fx.Node) -> str:
    """A value as a user knows it."""
    return (
        f"'{node.target}'"
        if node.op in ("call_module", "placeholder")
        else node.name.removeprefix("network_")
    )
