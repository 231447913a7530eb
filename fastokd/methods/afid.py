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
    over 80 epochs. The attention exchange between the sub-networks is part of the forward pass, not
    of the loss.
    """

    # "paper" omits the authors' 1e-7; the paper's text was not available.
    presets: ClassVar[Presets] = {"paper": {}, "code": {"teacher_eps": 1e-7}}

    num_branches: int = options.num_branches(
        2, 2, "must be 2, the sub-networks that exchange attention.", high=2
    )
    temperature: float = options.temperature()
    lambda_kd: float = options.weight(1.0, "weight of every KL term.")
    teacher_eps: float = options.teacher_eps()

    def build_graph(self) -> Graph:
        heads = ("branch1", "branch2", "fusion")
        terms: tuple[Term, ...] = (
            *map(CrossEntropy, heads),
            self.teach("fusion", "branch1", self.lambda_kd),
            self.teach("fusion", "branch2", self.lambda_kd),
            self.teach("ensemble", "fusion", self.lambda_kd),
        )
        nodes: tuple[Node, ...] = (*map(Logits, heads), Mixture("ensemble", heads[:2], (0.5, 0.5)))
        return Graph("afid", nodes, terms, self.label_smoothing)

    def labels(self) -> dict[str, str]:
        return {"fusion": "fusion_logits"}

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
        seen_by_other, seen_by_one = (
            self.spatial(self.channel(maps) * maps) for maps in (other, one)
        )
        return one * seen_by_other, other * seen_by_one


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
        if stems[0][1] != stems[1][1] or spec.channels[0] != spec.channels[1]:
            raise ValueError(
                "two sub-networks that exchange attention need maps of the same channels: their"
                f" stems have {stems[0][1]} and {stems[1][1]}, their last stages"
                f" {spec.channels[0]} and {spec.channels[1]}"
            )
        self.stem_ends = tuple(end for end, _ in stems)
        self.after_stem = Exchange(stems[0][1])
        self.after_last = Exchange(spec.channels[0])

    def forward(self, inputs: Sequence[Tensor], peers: Sequence[nn.Module]) -> BranchOutput:
        """Logits [B, C] of both sub-networks, and their last maps before the second exchange."""
        early = [
            _run(children(peer)[:end], x)
            for peer, end, x in zip(peers, self.stem_ends, inputs, strict=True)
        ]
        late = tuple(
            _run(children(peer)[end:], x)
            for peer, end, x in zip(peers, self.stem_ends, self.after_stem(*early), strict=True)
        )
        exchanged = self.after_last(*late)
        logits = [run_head(peer, x) for peer, x in zip(peers, exchanged, strict=True)]
        return BranchOutput(tuple(logits), late)


def _run(modules: Sequence[nn.Module], x: Tensor) -> Tensor:
    for module in modules:
        x = module(x)
    return x


def _stem(peer: nn.Module) -> tuple[int, int]:
    """The end of a peer's stem, as an index into its children, and the stem's channels.

    The stem consists of the leading plain layers, or else of the first module.
    """
    modules = children(peer)
    blocks = (index for index, child in enumerate(modules) if any(True for _ in child.children()))
    end = next(blocks, len(modules)) or 1
    channels = next(
        layer.out_channels
        for child in reversed(modules[:end])
        for layer in reversed(list(child.modules()))
        if isinstance(layer, nn.Conv2d)
    )
    return end, channels


class AFIDNetwork(nn.Module):
    """The student of AFID: both sub-networks, because each needs the other's attention.

    Images [B, 3, H, W] to logits [B, C]. It costs about twice the plain network, without the fusion
    head.
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
    """The attention exchange and the fusion head.

    Args:
        spec: two peers.
        fusion_weight_decay: of the fusion head.

    Raises:
        ValueError: see ``Pair``.
    """

    def __init__(self, spec: BranchSpec, fusion_weight_decay: float = 1e-5) -> None:
        super().__init__()
        self.pair = Pair(spec)
        self.fusion = FusionHead(sum(spec.channels), spec.channels[0], spec.num_classes)
        self.fusion_weight_decay = fusion_weight_decay

    def parameter_groups(self) -> list[ParameterGroup]:
        return [
            ParameterGroup(list(self.fusion.parameters()), weight_decay=self.fusion_weight_decay)
        ]

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
    summary=(
        "two sub-networks exchange attention and learn from a head on both; the student needs both"
        " of them"
    ),
    loss_class=AFIDLoss,
    branch_range=(2, 2),
    default_branches=2,
    build_companion=AFIDModules,
    model_options={"fusion_weight_decay": options.number(1e-5, "weight decay of the fusion head.")},
    topologies=("peers",),
    schedule=Schedule((80, 300)),
)
