"""FFSD: Feature Fusion and Self-Distillation (Li et al., "Distilling a Powerful Student Model via
Online Knowledge Distillation"), in the forms of the official code.
"""

import itertools
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastokd.graph import CrossEntropy, Graph, Logits, Mixture, Term
from fastokd.losses import options
from fastokd.losses.graph_loss import ExtraTerm, GraphInputs, Rows
from fastokd.losses.method_loss import MethodLoss, Presets
from fastokd.losses.options import Reduction, integer, keyword
from fastokd.methods.layers import FusionHead, depthwise_pointwise, run_head, run_stages, stages
from fastokd.methods.method import Method, Schedule, ramp_up
from fastokd.methods.modules import (
    BranchOutput,
    BranchPass,
    BranchSpec,
    MethodModules,
    ParameterGroup,
)
from fastokd.ops.inputs import compute_dtype


class FFSDMaps(NamedTuple):
    """The feature maps that the FFSD loss compares; each list starts at the earliest stage."""

    students: Sequence[Sequence[Tensor]]
    """K lists of S maps [B, c_s, H_s, W_s]."""
    leader: Sequence[Tensor]
    """S maps."""
    fused: Tensor
    """The fusion head's map [B, c_S, H_S, W_S]."""
    transformed: Tensor
    """The leader's last map, with the channels of all students' maps [B, K c_S, H_S, W_S]."""
    decoded_shifted: Sequence[Sequence[Tensor]]
    """For students 2 .. K, the shifted map of the student before, decoded: S-1 maps each."""
    decoded_fused: Sequence[Tensor]
    """The fused map, decoded by the leader's decoder: S-1 maps."""
    decoded: Sequence[Sequence[Tensor]]
    """For students 2 .. K and the leader, their detached last map, decoded: S-1 maps each."""


def attention_map(features: Tensor) -> Tensor:
    """Maps [B, c, H, W] to the mean of their channels' squares [B, H, W], in the compute dtype."""
    return features.to(compute_dtype(features)).square().mean(1)


def _unit(values: Tensor) -> Tensor:
    return F.normalize(values.to(compute_dtype(values)).flatten(1), dim=1)


def _mean_square(difference: Tensor) -> Tensor:
    return difference.square().sum() / max(difference.numel(), 1)


def map_distance(one: Tensor, other: Tensor) -> Tensor:
    """Mean squared difference of the flattened rows, each of length 1; 0 for an empty batch."""
    return _mean_square(_unit(one) - _unit(other))


def shifted_attention(attention: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The attention target of a student: strong where the attention of the one before it is weak.

    Args:
        attention: the other's attention map [B, H, W].

    Returns:
        ``v``, its rows of length 1, ``v'``, the target, both [B, H W], and ``n``, the lengths of
        the rows [B, 1]. With ``t`` the largest of the lowest third of v (at least one entry): v' is
        v below t, n / 2 at t, and n - v above it. As in the official code, n is the length before
        normalizing while v is normalized.
    """
    rows = attention.flatten(1)
    length = rows.norm(dim=1, keepdim=True)
    unit = _unit(attention)
    threshold = unit.sort(dim=1).values[:, max(unit.shape[1] // 3, 1) - 1, None]
    upper = torch.where(unit > threshold, length - unit, length / 2)
    return unit, torch.where(unit < threshold, unit, upper), length


def shifted_map(features: Tensor) -> Tensor:
    """The map [B, c, H, W] of the student before, with its attention moved to where it was weak."""
    unit, target, length = shifted_attention(attention_map(features))
    change = (target - unit) * length / features.shape[1]
    batch, _, height, width = features.shape
    return features + change.reshape(batch, 1, height, width).to(features.dtype)


@options.loss_options
class FFSDLoss(MethodLoss):
    """K students ``branch1`` .., then the ``leader`` (kept) and the ``fusion`` head: K + 2 rows of
    logits, and three terms on feature maps.

    ``L = sum_i [ CE(z^i) + w/(K-1) sum_{j != i} T^2 KL(z^j || z^i) ] + CE(fusion) + w T^2
    KL(ensemble || fusion) + CE(leader) + w T^2 KL(fusion || leader)`` with ``w = lambda_kd``,
    ``ensemble`` the mean of the students' logits, and every teacher detached. These terms are not
    scheduled: the official code ramps up only the terms on maps. The fusion head reads detached
    features.

    With ``A`` the attention map and ``d`` the distance of ``map_distance``, all targets detached:

    - ``diversity``: for students 2 .. K, the mean squared difference of the student's attention to
      the shifted attention of the student before, and ``d`` of its earlier attention maps to those
      decoded from the shifted map;
    - ``fusion``: ``d`` of the leader's last attention map to the fusion head's, of the transformed
      leader's to that of the students' concatenation, and of its earlier attention maps to those
      decoded from the fused map;
    - ``decoder``: for each decoder and each earlier stage, ``d`` of maps and of attention maps,
      decoded and true.
    """

    # Both are the official code's values; the paper's text was not available.
    presets: ClassVar[Presets] = {"paper": {}, "code": {}}

    num_branches: int = options.num_branches(3, 3, "K + 1: two or more students, the leader.")
    temperature: float = options.temperature(2.0)
    lambda_kd: float = options.weight(1.0, "weight of every KL term.")
    lambda_diversity: float = options.weight(1e-5, "weight of ``diversity``, which ramps up.")
    lambda_fusion: float = options.weight(10.0, "weight of ``fusion``, which ramps up.")
    lambda_decoder: float = options.weight(1000.0, "weight of ``decoder``, which ramps up.")
    teacher_eps: float = options.teacher_eps()
    reduction: Reduction = keyword(default=options.reduction('"mean".'), kw_only=True)

    def build_graph(self) -> Graph:
        students = self.branch_names()[:-1]
        heads = (*students, "leader", "fusion")
        weight, share = self.lambda_kd, 1.0 / (len(students) - 1)
        pairs = [(other, student) for student in students for other in students if other != student]
        edges = [(*pair, weight * share) for pair in pairs]
        edges += [("ensemble", "fusion", weight), ("fusion", "leader", weight)]
        ensemble = Mixture("ensemble", students, (1.0 / len(students),) * len(students))
        terms: list[Term] = [*map(CrossEntropy, heads)]
        terms += [self.teach(*edge, scheduled=False) for edge in edges]
        return Graph("ffsd", [*map(Logits, heads), ensemble], terms, self.label_smoothing)

    def build_extra_terms(self) -> dict[str, ExtraTerm]:
        weights = {
            "diversity": self.lambda_diversity,
            "fusion": self.lambda_fusion,
            "decoder": self.lambda_decoder,
        }
        return {name: ExtraTerm(value, scheduled=True) for name, value in weights.items()}

    def graph_inputs(
        self,
        branch_logits: Rows,
        target: Tensor | None = None,
        *,
        fusion_logits: Tensor,
        maps: FFSDMaps | None = None,
    ) -> GraphInputs:
        """``fusion_logits``: [B, C]. ``maps``: not needed by ``named_logits``."""
        rows = [*branch_logits, fusion_logits]
        if target is None:
            return GraphInputs(rows)
        if maps is None:
            raise ValueError("maps are missing: three of the loss's terms compare feature maps")
        extras = {"diversity": _diversity(maps), "fusion": _fusion(maps), "decoder": _decoder(maps)}
        return GraphInputs(rows, extras=extras)


def ffsd_graph(num_students: int = 2, *rest: Any, **options: Any) -> Graph:
    """The graph of ``FFSDLoss`` for K students."""
    integer(2, "K", low=2).check("num_students", num_students)
    return FFSDLoss(num_students + 1, *rest, **options).graph


def _attention_distance(maps: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    distances: Any = (
        map_distance(attention_map(one), attention_map(other.detach()))
        for one, other in zip(maps, targets, strict=True)
    )
    return sum(distances)  # type: ignore[no-any-return]


def _diversity(maps: FFSDMaps) -> Tensor:
    total = maps.fused.new_zeros((), dtype=compute_dtype(maps.fused))
    pairs = itertools.pairwise(maps.students)
    for (before, own), decoded in zip(pairs, maps.decoded_shifted, strict=True):
        _, target, _ = shifted_attention(attention_map(before[-1].detach()))
        total = total + _mean_square(_unit(attention_map(own[-1])) - target)
        total = total + _attention_distance(own[:-1], decoded)
    return total


def _fusion(maps: FFSDMaps) -> Tensor:
    together = torch.cat([student[-1].detach() for student in maps.students], 1)
    last = _attention_distance([maps.leader[-1], maps.transformed], [maps.fused, together])
    return last + _attention_distance(maps.leader[:-1], maps.decoded_fused)


def _decoder(maps: FFSDMaps) -> Tensor:
    total = maps.fused.new_zeros((), dtype=compute_dtype(maps.fused))
    for own, decoded in zip((*maps.students[1:], maps.leader), maps.decoded, strict=True):
        for true, made in zip(own[:-1], decoded, strict=True):
            total = total + map_distance(made, true.detach())
        total = total + _attention_distance(decoded, own[:-1])
    return total


class Decoder(nn.Module):
    """Bring a network's last map back to the sizes of its earlier stages, whose ``channels`` are
    given: for each a transposed 3x3 convolution, batch norm and ReLU.
    """

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        self.steps: Any = nn.ModuleList()
        for own, before in itertools.pairwise(list(channels)[::-1]):
            up = nn.ConvTranspose2d(own, before, 3, stride=2, padding=1, bias=False)
            self.steps.append(nn.ModuleList((up, nn.BatchNorm2d(before))))

    def forward(self, features: Tensor, sizes: Sequence[torch.Size]) -> list[Tensor]:
        """The last map [B, c_S, H, W] to S-1 maps of ``sizes`` (H, W), the earliest first."""
        made = []
        for (up, bn), size in zip(self.steps, list(sizes)[::-1], strict=True):
            features = F.relu(bn(up(features, output_size=size)))
            made.append(features)
        return made[::-1]


class FFSDModules(MethodModules):
    """The fusion head, the leader's transformation, the decoders of students 2 .. K and the leader.

    Raises:
        ValueError: the K students and the leader differ, cannot be run stage by stage, or have
            stages that do not halve the maps.
    """

    def __init__(
        self, spec: BranchSpec, fusion_weight_decay: float = 1e-5, decoder_lr: float = 1e-3
    ) -> None:
        super().__init__()
        peers = [stages(peer) for peer in dict.fromkeys(spec.branches)]
        if any(other != peers[0] for other in peers):
            reason = "students and leader compare their feature maps stage by stage"
            raise ValueError(f"{reason}, so they must be one network; name one")
        sizes = [stage.size for stage in peers[0]]
        for before, after in itertools.pairwise(sizes):
            if any((big + 1) // 2 != small for big, small in zip(before, after, strict=True)):
                maps = f"from {before} to {after} (for 64 x 64 images)"
                raise ValueError(f"decoders double the maps from stage to stage; these go {maps}")
        channels = [stage.channels for stage in peers[0]]
        num_students = len(spec.branches) - 1
        self.ends = tuple(stage.end for stage in peers[0])
        self.fusion = FusionHead(num_students * channels[-1], channels[-1], spec.num_classes)
        self.transform = depthwise_pointwise(channels[-1], num_students * channels[-1])
        self.decoders = nn.ModuleList(Decoder(channels) for _ in range(num_students))
        self.fusion_weight_decay, self.decoder_lr = fusion_weight_decay, decoder_lr

    def parameter_groups(self) -> list[ParameterGroup]:
        return [
            ParameterGroup(list(self.fusion.parameters()), weight_decay=self.fusion_weight_decay),
            ParameterGroup(list(self.decoders.parameters()), optimizer="adam", lr=self.decoder_lr),
        ]

    def run(self, inputs: Sequence[Tensor], branches: Sequence[nn.Module]) -> BranchOutput:
        """As in ``MethodModules``; the context holds every stage's maps."""
        maps = [run_stages(peer, x, self.ends) for peer, x in zip(branches, inputs, strict=True)]
        features = tuple(own[-1] for own in maps)
        logits = [run_head(peer, own) for peer, own in zip(branches, features, strict=True)]
        return BranchOutput(tuple(logits), features, context=maps)

    def forward(self, seen: BranchPass) -> dict[str, Any]:
        """``fusion_logits`` [B, C] and, in training, ``maps``."""
        *students, leader = seen.context
        fused, logits = self.fusion([own[-1].detach() for own in students])
        if not self.training:
            return {"fusion_logits": logits}
        sizes = [own.shape[2:] for own in leader[:-1]]
        with torch.no_grad():
            pairs = zip(self.decoders, students[:-1], strict=False)
            shifted = [decoder(shifted_map(before[-1]), sizes) for decoder, before in pairs]
            from_fused = self.decoders[-1](fused.detach(), sizes)
        pairs = zip(self.decoders, (*students[1:], leader), strict=True)
        decoded = [decoder(own[-1].detach(), sizes) for decoder, own in pairs]
        transformed = self.transform(leader[-1])
        maps = FFSDMaps(students, leader, fused, transformed, shifted, from_fused, decoded)
        return {"fusion_logits": logits, "maps": maps}


def _ramp_up_from_1(epoch: int, length: int) -> float:
    """The official code counts its 299 epochs from 1."""
    return ramp_up(epoch + 1, length)


METHOD = Method(
    name="ffsd",
    summary="Feature Fusion and Self-Distillation: a head on fused features of the students teaches"
    " the leader, the exported network",
    loss_class=FFSDLoss,
    build_companion=FFSDModules,
    model_options={
        "fusion_weight_decay": options.number(1e-5, "weight decay of the fusion head."),
        "decoder_lr": options.number(1e-3, "Adam's constant learning rate for the decoders."),
    },
    topologies=("peers",),
    kept=-1,
    schedule=Schedule((5, 300), _ramp_up_from_1, min_epochs=1),
)
