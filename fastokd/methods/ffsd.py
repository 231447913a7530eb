"""FFSD: Distilling a Powerful Student Model via Online Knowledge Distillation (Li et al.): feature
fusion and self-distillation.

The forms are those of the official code.
"""

import itertools
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastokd.graph import KL, CrossEntropy, Graph, Logits, Mixture
from fastokd.methods.base import Impl, Reduction, as_rows, branch_names, check_options
from fastokd.methods.layers import FusionHead, check_rates, depthwise_pointwise, run_stages, stages
from fastokd.methods.method import (
    BranchPass,
    Companion,
    ExtraTerm,
    GraphInputs,
    Layout,
    Method,
    MethodLoss,
    ParameterGroup,
    Presets,
    RunResult,
    ramp_up,
)
from fastokd.ops.reference import compute_dtype


def ffsd_graph(
    num_students: int = 2,
    temperature: float = 2.0,
    lambda_kd: float = 1.0,
    teacher_eps: float = 0.0,
    label_smoothing: float = 0.0,
) -> Graph:
    """K students ``branch1`` .., then the ``leader`` (kept) and the ``fusion`` head: K + 2 rows of
    logits.

    ``L = sum_i [ CE(z^i) + w/(K-1) sum_{j != i} T^2 KL(z^j || z^i) ] + CE(fusion) + w T^2
    KL(ensemble || fusion) + CE(leader) + w T^2 KL(fusion || leader)`` with ``w = lambda_kd``,
    ``ensemble`` the mean of the students' logits, and every teacher detached. Nothing here is
    scheduled: the official code ramps up the losses on maps, which are outside the graph, and not
    the KL terms. The fusion head reads detached features.
    """
    students = branch_names("ffsd_graph", num_students, 2, "num_students")

    def teach(teacher: str, student: str, share: float = 1.0) -> KL:
        return KL(
            teacher,
            student,
            lambda_kd * share,
            temperature,
            detach=True,
            eps=teacher_eps,
            scheduled=False,
        )

    heads = (*students, "leader", "fusion")
    share = 1.0 / (num_students - 1)
    terms = (
        *map(CrossEntropy, heads),
        *(
            teach(other, student, share)
            for student in students
            for other in students
            if other != student
        ),
        teach("ensemble", "fusion"),
        teach("fusion", "leader"),
    )
    nodes = (
        *map(Logits, heads),
        Mixture("ensemble", students, (1.0 / num_students,) * num_students),
    )
    return Graph("ffsd", nodes, terms, label_smoothing)


class FFSDMaps(NamedTuple):
    """The feature maps that the FFSD loss compares; each list goes from the earliest stage to the
    last.
    """

    students: Sequence[Sequence[Tensor]]
    """K lists of S maps [B, c_s, H_s, W_s]."""
    leader: Sequence[Tensor]
    """S maps."""
    fused: Tensor
    """The fusion head's map [B, c_S, H_S, W_S]."""
    transformed: Tensor
    """The leader's last map, brought to the channels of the students' concatenation [B, K c_S, H_S,
    W_S].
    """
    decoded_shifted: Sequence[Sequence[Tensor]]
    """For students 2 .. K, what their decoder makes of the shifted map of the student before: S-1
    maps each.
    """
    decoded_fused: Sequence[Tensor]
    """What the leader's decoder makes of the fused map: S-1 maps."""
    decoded: Sequence[Sequence[Tensor]]
    """For students 2 .. K and the leader, what their decoder makes of their own detached last map:
    S-1 maps each.
    """


def attention_map(features: Tensor) -> Tensor:
    """The mean over the channels of the squares, in float32 (float64 for float64 maps): [B, c, H,
    W] to [B, H, W].
    """
    return features.to(compute_dtype(features)).square().mean(1)


def _unit(values: Tensor) -> Tensor:
    return F.normalize(values.to(compute_dtype(values)).flatten(1), dim=1)


def _mean_square(difference: Tensor) -> Tensor:
    return difference.square().sum() / max(difference.numel(), 1)


def map_distance(one: Tensor, other: Tensor) -> Tensor:
    """Mean over batch and entries of the squared difference of the flattened rows, each of length
    1; 0 for an empty batch.
    """
    return _mean_square(_unit(one) - _unit(other))


def shifted_attention(attention: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where a student should look that the one before it does not: strong where the other is weak.

    Args:
        attention: the other's attention map [B, H, W].

    Returns:
        ``v``, its rows of length 1, ``v'``, the target, both [B, H W], and ``n``, the lengths of
        the rows [B, 1]. With ``t``
        the largest of the lowest third of v (at least one entry): v' is v below t, n / 2 at t, and
            n - v above it. As in the
        official code, n is the length before normalising while v is normalised.
    """
    rows = attention.flatten(1)
    length = rows.norm(dim=1, keepdim=True)
    unit = _unit(attention)
    threshold = unit.sort(dim=1).values[:, max(unit.shape[1] // 3, 1) - 1, None]
    target = torch.where(
        unit < threshold, unit, torch.where(unit > threshold, length - unit, length / 2)
    )
    return unit, target, length


def shifted_map(features: Tensor) -> Tensor:
    """The map [B, c, H, W] of the student before, with its attention moved to where it was weak."""
    unit, target, length = shifted_attention(attention_map(features))
    change = ((target - unit) * length / features.shape[1]).unflatten(1, features.shape[2:])
    return features + change[:, None].to(features.dtype)


class FFSDLoss(MethodLoss):
    """The FFSD loss: the graph of ``ffsd_graph`` and three terms on feature maps, as the official
    code computes them.

    With ``A`` the attention map and ``d`` the distance of ``map_distance``, all targets detached:

    - ``diversity``: for students 2 .. K, the mean squared difference of the student's attention to
      the shifted attention of the student before, and ``d`` of its earlier attention maps to those
      decoded from the shifted map;
    - ``fusion``: ``d`` of the leader's last attention map to the fusion head's, of the transformed
      leader's to that of the students' concatenation, and of its earlier attention maps to those
      decoded from the fused map;
    - ``decoder``: for each decoder and each earlier stage, ``d`` of maps and of attention maps,
      decoded and true.

    Args:
        num_branches: K + 1, at least 3: the students, then the leader.
        temperature: T of the KL terms.
        lambda_kd: weight of every KL term.
        lambda_diversity, lambda_fusion, lambda_decoder: weights of the three terms; these ramp up.
        teacher_eps: added to the teachers' probabilities, not renormalised.
        label_smoothing: in [0, 1), for every cross-entropy.
        reduction: "mean".
        impl: the executor: "auto", "reference", "triton" or "cpu".
    """

    # Both are the official code's values; the paper's text was not at hand.
    presets: ClassVar[Presets] = {"paper": {}, "code": {}}

    def __init__(
        self,
        num_branches: int = 3,
        temperature: float = 2.0,
        lambda_kd: float = 1.0,
        lambda_diversity: float = 1e-5,
        lambda_fusion: float = 10.0,
        lambda_decoder: float = 1000.0,
        teacher_eps: float = 0.0,
        label_smoothing: float = 0.0,
        reduction: Reduction = "mean",
        impl: Impl = "auto",
    ) -> None:
        if not isinstance(num_branches, int) or num_branches < 3:
            raise ValueError(
                f"num_branches={num_branches!r}; FFSD has two students or more and a leader: 3 or"
                " more"
            )
        check_options(
            temperature=temperature,
            lambda_kd=lambda_kd,
            lambda_diversity=lambda_diversity,
            lambda_fusion=lambda_fusion,
            lambda_decoder=lambda_decoder,
            teacher_eps=teacher_eps,
            label_smoothing=label_smoothing,
        )
        weights = {
            "diversity": lambda_diversity,
            "fusion": lambda_fusion,
            "decoder": lambda_decoder,
        }
        graph = ffsd_graph(num_branches - 1, temperature, lambda_kd, teacher_eps, label_smoothing)
        super().__init__(
            graph,
            num_branches,
            reduction,
            impl,
            {"fusion": "fusion_logits"},
            {name: ExtraTerm(value, scheduled=True) for name, value in weights.items()},
        )

    def graph_inputs(
        self,
        branch_logits: Sequence[Tensor] | Tensor,
        target: Tensor | None = None,
        *,
        fusion_logits: Tensor,
        maps: FFSDMaps | None = None,
    ) -> GraphInputs:
        """``fusion_logits``: [B, C]. ``maps``: what the terms on feature maps compare; only
        measuring does without them.
        """
        rows = [*as_rows(branch_logits, self.num_branches, "branch_logits"), fusion_logits]
        if target is None:
            return GraphInputs(rows)
        if maps is None:
            raise ValueError(
                "maps are missing: three of the FFSD loss's terms compare feature maps"
            )
        return GraphInputs(
            rows,
            extras={
                "diversity": _diversity(maps),
                "fusion": _fusion(maps),
                "decoder": _decoder(maps),
            },
        )


def _attention_distance(maps: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    return sum(
        map_distance(attention_map(one), attention_map(other.detach()))
        for one, other in zip(maps, targets, strict=True)
    )


def _diversity(maps: FFSDMaps) -> Tensor:
    total = maps.fused.new_zeros((), dtype=compute_dtype(maps.fused))
    for before, own, decoded in zip(
        maps.students, maps.students[1:], maps.decoded_shifted, strict=False
    ):
        _, target, _ = shifted_attention(attention_map(before[-1].detach()))
        total = (
            total
            + _mean_square(_unit(attention_map(own[-1])) - target)
            + _attention_distance(own[:-1], decoded)
        )
    return total


def _fusion(maps: FFSDMaps) -> Tensor:
    together = torch.cat([student[-1].detach() for student in maps.students], 1)
    return _attention_distance(
        [maps.leader[-1], maps.transformed], [maps.fused, together]
    ) + _attention_distance(maps.leader[:-1], maps.decoded_fused)


def _decoder(maps: FFSDMaps) -> Tensor:
    total = maps.fused.new_zeros((), dtype=compute_dtype(maps.fused))
    for own, decoded in zip((*maps.students[1:], maps.leader), maps.decoded, strict=True):
        for true, made in zip(own[:-1], decoded, strict=True):
            total = total + map_distance(made, true.detach())
        total = total + _attention_distance(decoded, own[:-1])
    return total


class Decoder(nn.Module):
    """Brings a network's last map back to the sizes of its earlier stages: for each a transposed
    3x3 convolution, batch norm and ReLU.

    Args:
        channels: of the S stages, the earliest first.
    """

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        backwards = list(channels)[::-1]
        self.steps = nn.ModuleList(
            nn.ModuleList(
                (
                    nn.ConvTranspose2d(own, before, 3, stride=2, padding=1, bias=False),
                    nn.BatchNorm2d(before),
                )
            )
            for own, before in itertools.pairwise(backwards)
        )

    def forward(self, features: Tensor, sizes: Sequence[torch.Size]) -> list[Tensor]:
        """The last map [B, c_S, H, W] to S-1 maps of ``sizes`` (height and width), the earliest
        first.
        """
        made = []
        for (up, bn), size in zip(self.steps, list(sizes)[::-1], strict=True):
            features = F.relu(bn(up(features, output_size=size)))
            made.append(features)
        return made[::-1]


class FFSDModules(Companion):
    """The fusion head, the leader's transformation, and the decoders of students 2 .. K and of the
    leader.

    Args:
        layout: K students and the leader, all of one architecture.
        fusion_weight_decay: of the fusion head.
        decoder_lr: the decoders are trained with Adam at this constant learning rate.

    Raises:
        ValueError: an option is no number of at least 0, or the networks differ, cannot be run
            stage by stage, or have stages that do not halve the maps.
    """

    def __init__(
        self, layout: Layout, fusion_weight_decay: float = 1e-5, decoder_lr: float = 1e-3
    ) -> None:
        super().__init__()
        check_rates(fusion_weight_decay=fusion_weight_decay, decoder_lr=decoder_lr)
        found = [stages(peer) for peer in layout.branches]
        if any(other != found[0] for other in found):
            raise ValueError(
                "students and leader compare their feature maps stage by stage, so they must be one"
                " network; name one"
            )
        sizes = [stage.size for stage in found[0]]
        for before, after in itertools.pairwise(sizes):
            if any((big + 1) // 2 != small for big, small in zip(before, after, strict=True)):
                raise ValueError(
                    "its decoders double the maps from stage to stage, and here they go from"
                    f" {before} to {after} (for 64 x 64 images)"
                )
        channels = [stage.channels for stage in found[0]]
        num_students = len(layout.branches) - 1
        self.ends = tuple(stage.end for stage in found[0])
        self.fusion = FusionHead(num_students * channels[-1], channels[-1], layout.num_classes)
        self.transform = depthwise_pointwise(channels[-1], num_students * channels[-1])
        self.decoders = nn.ModuleList(Decoder(channels) for _ in range(num_students))
        self.fusion_weight_decay, self.decoder_lr = fusion_weight_decay, decoder_lr

    def parameter_groups(self) -> list[ParameterGroup]:
        return [
            ParameterGroup(list(self.fusion.parameters()), weight_decay=self.fusion_weight_decay),
            ParameterGroup(list(self.decoders.parameters()), optimizer="adam", lr=self.decoder_lr),
        ]

    def run(self, inputs: Sequence[Tensor], branches: Sequence[nn.Module]) -> RunResult:
        """As in ``Companion``; passes on every stage's maps."""
        maps = [run_stages(peer, x, self.ends) for peer, x in zip(branches, inputs, strict=True)]
        logits = tuple(peer.branch.head(own[-1]) for peer, own in zip(branches, maps, strict=True))
        return RunResult(tuple(own[-1] for own in maps), logits, maps)

    def forward(self, seen: BranchPass) -> dict[str, Any]:
        """``fusion_logits`` [B, C] and, in training, ``maps``."""
        *students, leader = seen.passed_on
        fused, logits = self.fusion([own[-1].detach() for own in students])
        if not self.training:
            return {"fusion_logits": logits}
        sizes = [own.shape[2:] for own in leader[:-1]]
        with torch.no_grad():
            shifted = [
                decoder(shifted_map(before[-1]), sizes)
                for decoder, before in zip(self.decoders, students[:-1], strict=False)
            ]
            from_fused = self.decoders[-1](fused.detach(), sizes)
        decoded = [
            decoder(own[-1].detach(), sizes)
            for decoder, own in zip(self.decoders, (*students[1:], leader), strict=True)
        ]
        return {
            "fusion_logits": logits,
            "maps": FFSDMaps(
                students, leader, fused, self.transform(leader[-1]), shifted, from_fused, decoded
            ),
        }


METHOD = Method(
    name="ffsd",
    summary=(
        "Feature Fusion and Self-Distillation: students fused into a teacher for a leader, which is"
        " kept"
    ),
    loss_class=FFSDLoss,
    branch_range=(3, 8),
    default_branches=3,
    build_companion=FFSDModules,
    model_options={"fusion_weight_decay": 1e-5, "decoder_lr": 1e-3},
    topologies=("peers",),
    kept=-1,
    # Five of the official code's 299 epochs, which it counts from 1.
    schedule=lambda epoch, length: ramp_up(epoch + 1, length),
    ramp_epochs=lambda epochs, preset: max(round(epochs * 5 / 300), 1),
)
