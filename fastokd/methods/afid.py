"""AFID: Attention-based Feature Interaction, in the forms of the authors' code."""

import functools
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from fastokd.graph import CrossEntropy, Graph, Logits, Mixture, Node, Term
from fastokd.losses import options
from fastokd.losses.graph_loss import GraphInputs, Rows
from fastokd.losses.method_loss import MethodLoss, Presets
from fastokd.methods.layers import (
    ChannelAttention,
    FusionHead,
    SpatialAttention,
    children,
    run_head,
)
from fastokd.methods.method import Method, Schedule
from fastokd.methods.modules import (
    BranchOutput,
    BranchPass,
    BranchSpec,
    MethodModules,
    ParameterGroup,
)


@options.loss_options
class AFIDLoss(MethodLoss):
    """Two sub-networks ``branch1``, ``branch2`` and a ``fusion`` head: three rows of logits.

    ``L = CE(z^1) + CE(z^2) + CE(fusion) + kd_weight * lambda_kd * T^2 [ KL(fusion || z^1) +
    KL(fusion || z^2) + KL(ensemble || fusion) ]``, ``ensemble = (z^1 + z^2) / 2``, every teacher
    detached: the form of the authors' code, which adds ``teacher_eps=1e-7`` (here 0) and ramps up
    over 80 epochs. The exchange of attention is part of the forward pass.
    """

    # "paper" omits the authors' 1e-7; the paper's text was not available.
    presets: ClassVar[Presets] = {"paper": {}, "code": {"teacher_eps": 1e-7}}

    num_branches: int = options.num_branches(2, 2, "must be 2, the sub-networks.", high=2)
    temperature: float = options.temperature()
    lambda_kd: float = options.weight(1.0, "weight of every KL term.")
    teacher_eps: float = options.teacher_eps()

    def build_graph(self) -> Graph:
        heads = ("branch1", "branch2", "fusion")
        edges = (("fusion", "branch1"), ("fusion", "branch2"), ("ensemble", "fusion"))
        nodes: list[Node] = [*map(Logits, heads), Mixture("ensemble", heads[:2], (0.5, 0.5))]
        terms: list[Term] = [*map(CrossEntropy, heads)]
        terms += [self.teach(*edge, self.lambda_kd) for edge in edges]
        return Graph("afid", nodes, terms, self.label_smoothing)

    def graph_inputs(
        self, branch_logits: Rows, target: Tensor | None = None, *, fusion_logits: Tensor
    ) -> GraphInputs:
        """``fusion_logits``: [B, C], the fusion head's."""
        return GraphInputs([*branch_logits, fusion_logits])


afid_graph = functools.partial(AFIDLoss.make_graph, 2)


class Exchange(nn.Module):
    """Weigh each of two maps with the attention of the other, by the same two modules."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channel = ChannelAttention(channels)
        self.spatial = SpatialAttention()

    def forward(self, one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        """Maps [B, c, H, W] to ``one * S(C(other) * other)``, ``other * S(C(one) * one)``."""
        of_other, of_one = (self.spatial(self.channel(maps) * maps) for maps in (other, one))
        return one * of_other, other * of_one


class Pair(nn.Module):
    """Two sub-networks that exchange attention after their stems and after their last stage.

    Args:
        spec: two peers whose stems and last stages have the same channels.

    Raises:
        ValueError: their channels differ, or they cannot be run module by module.
    """

    def __init__(self, spec: BranchSpec) -> None:
        super().__init__()
        stems = [_stem(peer) for peer in spec.branches]
        (one, other), (last, other_last) = (channels for _, channels in stems), spec.channels
        if (one, last) != (other, other_last):
            raise ValueError(
                "two sub-networks that exchange attention need maps of the same channels: their"
                f" stems have {one} and {other}, their last stages {last} and {other_last}"
            )
        self.stem_ends = tuple(end for end, _ in stems)
        self.after_stem, self.after_last = Exchange(one), Exchange(last)

    def forward(self, inputs: Sequence[Tensor], peers: Sequence[nn.Module]) -> BranchOutput:
        """Logits [B, C] of both sub-networks, and their last maps before the second exchange."""
        parts = list(zip(map(children, peers), self.stem_ends, strict=True))
        early = [_run(m[:end], x) for (m, end), x in zip(parts, inputs, strict=True)]
        exchanged = self.after_stem(*early)
        late = [_run(m[end:], x) for (m, end), x in zip(parts, exchanged, strict=True)]
        logits = map(run_head, peers, self.after_last(*late))
        return BranchOutput(tuple(logits), tuple(late))


def _run(modules: Sequence[nn.Module], x: Tensor) -> Tensor:
    for module in modules:
        x = module(x)
    return x


def _stem(peer: nn.Module) -> tuple[int, int]:
    """The end of a peer's stem (the leading plain layers, or else the first module), as an index
    into its children, and the stem's channels.
    """
    modules = children(peer)
    blocks = (index for index, child in enumerate(modules) if any(True for _ in child.children()))
    end = next(blocks, len(modules)) or 1
    layers = [layer for child in modules[:end] for layer in child.modules()]
    return end, [layer.out_channels for layer in layers if isinstance(layer, nn.Conv2d)][-1]


class AFIDNetwork(nn.Module):
    """The student of AFID, at about twice the cost of the plain network: both sub-networks, because
    each needs the other's attention.
    """

    def __init__(self, pair: Pair, peers: Sequence[nn.Module], kept: int) -> None:
        super().__init__()
        self.pair = pair
        self.peers: Any = nn.ModuleList(peers)
        self.peers.training = pair.training
        self.kept = kept

    def forward(self, x: Tensor) -> Tensor:
        output: BranchOutput = self.pair((x, x), self.peers)
        return output.logits[self.kept]


class AFIDModules(MethodModules):
    """The attention exchange of two peers and the fusion head; errors as ``Pair``."""

    def __init__(self, spec: BranchSpec, fusion_weight_decay: float = 1e-5) -> None:
        super().__init__()
        self.pair = Pair(spec)
        self.fusion = FusionHead(sum(spec.channels), spec.channels[0], spec.num_classes)
        self.fusion_weight_decay = fusion_weight_decay

    def parameter_groups(self) -> list[ParameterGroup]:
        parameters = list(self.fusion.parameters())
        return [ParameterGroup(parameters, weight_decay=self.fusion_weight_decay)]

    def run(self, inputs: Sequence[Tensor], branches: Sequence[nn.Module]) -> BranchOutput:
        output: BranchOutput = self.pair(inputs, branches)
        return output

    def forward(self, seen: BranchPass) -> dict[str, Tensor]:
        """``fusion_logits`` [B, C], from the last maps before they are exchanged."""
        return {"fusion_logits": self.fusion(seen.features)[1]}

    def student(self, branches: Sequence[nn.Module], kept: int) -> AFIDNetwork:
        return AFIDNetwork(self.pair, branches, kept)


METHOD = Method(
    name="afid",
    summary="two sub-networks exchange attention and learn from a shared fusion head; the student"
    " consists of both",
    loss_class=AFIDLoss,
    build_companion=AFIDModules,
    model_options={"fusion_weight_decay": options.number(1e-5, "weight decay of the fusion head.")},
    topologies=("peers",),
    schedule=Schedule((80, 300)),
)
