"""AFID: Attention-based Feature Interaction for Online Knowledge Distillation. The forms are those
of the authors' code.
"""

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn

from fastokd.graph import KL, CrossEntropy, Graph, Logits, Mixture
from fastokd.methods.base import Impl, Reduction, as_rows, check_options
from fastokd.methods.layers import (
    ChannelAttention,
    FusionHead,
    SpatialAttention,
    check_rates,
    children,
)
from fastokd.methods.method import (
    BranchPass,
    Companion,
    GraphInputs,
    Layout,
    Method,
    MethodLoss,
    ParameterGroup,
    Presets,
    RunResult,
)


def afid_graph(
    temperature: float = 3.0,
    lambda_kd: float = 1.0,
    teacher_eps: float = 0.0,
    label_smoothing: float = 0.0,
) -> Graph:
    """Two sub-networks ``branch1``, ``branch2`` and a ``fusion`` head: three rows of logits.

    ``L = CE(z^1) + CE(z^2) + CE(fusion) + kd_weight * lambda_kd * T^2 [ KL(fusion || z^1) +
    KL(fusion || z^2) + KL(ensemble || fusion) ]``, ``ensemble = (z^1 + z^2) / 2``, every teacher
    detached: the form of the authors' code, which adds ``teacher_eps=1e-7`` (here 0) and ramps up
    over 80 epochs. The attention exchange between the sub-networks is part of the forward pass, not
    of the loss.
    """

    def teach(teacher: str, student: str) -> KL:
        return KL(teacher, student, lambda_kd, temperature, detach=True, eps=teacher_eps)

    heads = ("branch1", "branch2", "fusion")
    return Graph(
        "afid",
        (*map(Logits, heads), Mixture("ensemble", heads[:2], (0.5, 0.5))),
        (
            *map(CrossEntropy, heads),
            teach("fusion", "branch1"),
            teach("fusion", "branch2"),
            teach("ensemble", "fusion"),
        ),
        label_smoothing,
    )


class AFIDLoss(MethodLoss):
    """The AFID loss, see ``afid_graph`` for the formula.

    Args:
        num_branches: must be 2.
        temperature: T of the KL terms.
        lambda_kd: weight of every KL term.
        teacher_eps: added to the teachers' probabilities, not renormalised.
        label_smoothing: in [0, 1), for every cross-entropy.
        reduction: "mean" over the batch, "sum", or "none" for the loss of each sample.
        impl: the executor: "auto", "reference", "triton" or "cpu".
    """

    # "paper" leaves out the authors' 1e-7; the paper's text was not at hand.
    presets: ClassVar[Presets] = {"paper": {}, "code": {"teacher_eps": 1e-7}}

    def __init__(
        self,
        num_branches: int = 2,
        temperature: float = 3.0,
        lambda_kd: float = 1.0,
        teacher_eps: float = 0.0,
        label_smoothing: float = 0.0,
        reduction: Reduction = "mean",
        impl: Impl = "auto",
    ) -> None:
        if num_branches != 2:
            raise ValueError(
                f"num_branches={num_branches}; AFID exchanges attention between two sub-networks,"
                " use 2"
            )
        check_options(
            temperature=temperature,
            lambda_kd=lambda_kd,
            teacher_eps=teacher_eps,
            label_smoothing=label_smoothing,
        )
        graph = afid_graph(temperature, lambda_kd, teacher_eps, label_smoothing)
        super().__init__(graph, 2, reduction, impl, {"fusion": "fusion_logits"})

    def graph_inputs(
        self,
        branch_logits: Sequence[Tensor] | Tensor,
        target: Tensor | None = None,
        *,
        fusion_logits: Tensor,
    ) -> GraphInputs:
        """``fusion_logits``: [B, C], the fusion head's."""
        return GraphInputs([*as_rows(branch_logits, 2, "branch_logits"), fusion_logits])


class Exchange(nn.Module):
    """Each of two maps is weighted by where the other looks; one channel and one spatial attention
    serve both.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channel = ChannelAttention(channels)
        self.spatial = SpatialAttention()

    def forward(self, one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        """Two maps [B, c, H, W] to ``one * S(C(other) * other)`` and ``other * S(C(one) *
        one)``.
        """
        seen_by_other, seen_by_one = (
            self.spatial(self.channel(maps) * maps) for maps in (other, one)
        )
        return one * seen_by_other, other * seen_by_one


class Pair(nn.Module):
    """Two sub-networks that exchange attention after their stems and after their last stage.

    Args:
        layout: two peers whose stems and last stages have the same channels.

    Raises:
        ValueError: they have not, or cannot be run module by module.
    """

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        stems = [_stem(peer) for peer in layout.branches]
        if stems[0][1] != stems[1][1] or layout.channels[0] != layout.channels[1]:
            raise ValueError(
                "two sub-networks that exchange attention need maps of the same channels: their"
                f" stems have {stems[0][1]} and {stems[1][1]}, their last stages"
                f" {layout.channels[0]} and {layout.channels[1]}"
            )
        self.stem_ends = tuple(end for end, _ in stems)
        self.after_stem = Exchange(stems[0][1])
        self.after_last = Exchange(layout.channels[0])

    def forward(self, inputs: Sequence[Tensor], peers: Sequence[nn.Module]) -> RunResult:
        """The last maps before the second exchange, and the logits [B, C], of the two
        sub-networks.
        """
        early = [
            _run(children(peer)[:end], x)
            for peer, end, x in zip(peers, self.stem_ends, inputs, strict=True)
        ]
        late = tuple(
            _run(children(peer)[end:], x)
            for peer, end, x in zip(peers, self.stem_ends, self.after_stem(*early), strict=True)
        )
        return RunResult(
            late,
            tuple(
                peer.branch.head(x) for peer, x in zip(peers, self.after_last(*late), strict=True)
            ),
        )


def _run(modules: Sequence[nn.Module], x: Tensor) -> Tensor:
    for module in modules:
        x = module(x)
    return x


def _stem(peer: nn.Module) -> tuple[int, int]:
    """The end of a peer's stem, as an index into its children, and the stem's channels.

    The stem is the leading plain layers; where there are none, the first module.
    """
    found = children(peer)
    end = (
        next(
            (index for index, child in enumerate(found) if any(True for _ in child.children())),
            len(found),
        )
        or 1
    )
    channels = next(
        layer.out_channels
        for child in reversed(found[:end])
        for layer in reversed(list(child.modules()))
        if isinstance(layer, nn.Conv2d)
    )
    return end, channels


class AFIDNetwork(nn.Module):
    """The student of AFID: a sub-network with the other beside it, because it needs the other's
    attention.

    Images [B, 3, H, W] to logits [B, C]. It costs about twice the plain network; the fusion head is
    gone.
    """

    def __init__(self, pair: Pair, peers: Sequence[nn.Module], kept: int) -> None:
        super().__init__()
        self.pair = pair
        self.peers = nn.ModuleList(peers)
        self.peers.training = pair.training
        self.kept = kept

    def forward(self, x: Tensor) -> Tensor:
        return self.pair((x, x), self.peers).logits[self.kept]


class AFIDModules(Companion):
    """The attention exchange and the fusion head.

    Args:
        layout: two peers.
        fusion_weight_decay: of the fusion head.

    Raises:
        ValueError: an option is no number of at least 0, or see ``Pair``.
    """

    def __init__(self, layout: Layout, fusion_weight_decay: float = 1e-5) -> None:
        super().__init__()
        check_rates(fusion_weight_decay=fusion_weight_decay)
        self.pair = Pair(layout)
        self.fusion = FusionHead(sum(layout.channels), layout.channels[0], layout.num_classes)
        self.fusion_weight_decay = fusion_weight_decay

    def parameter_groups(self) -> list[ParameterGroup]:
        return [
            ParameterGroup(list(self.fusion.parameters()), weight_decay=self.fusion_weight_decay)
        ]

    def run(self, inputs: Sequence[Tensor], branches: Sequence[nn.Module]) -> RunResult:
        return self.pair(inputs, branches)

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
    model_options={"fusion_weight_decay": 1e-5},
    topologies=("peers",),
    ramp_epochs=lambda epochs, preset: round(epochs * 80 / 300),
)
