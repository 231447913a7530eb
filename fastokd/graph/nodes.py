"""Nodes and terms of a distillation graph.

A node is one row per sample. Rows of logits (``Logits``, ``Mixture``) can learn: they may be
students, carry cross-entropies and feed other nodes. The other nodes are teacher rows: they may
only be the teacher of a KL edge (an ``External`` row may also feed a ``ProbabilityMixture``).
"""

from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias

Weights: TypeAlias = str | tuple[float, ...]
"""Mixing weights: constants, or the name of a run-time tensor, [B, K] or [K] for K inputs."""


class _Derived:
    """A node made of others. Lists of inputs or weights become tuples, to be hashable."""

    def __post_init__(self) -> None:
        for field in ("inputs", "weights"):
            value = getattr(self, field, ())
            if not isinstance(value, (str, tuple)):
                object.__setattr__(self, field, tuple(value))


@dataclass(frozen=True)
class Logits:
    """A row of logits [B, C] that a network computes: a branch, a leader, a fusion head."""

    name: str
    kind: ClassVar[str] = "logits"

    @property
    def inputs(self) -> tuple[str, ...]:
        return ()


@dataclass(frozen=True)
class Mixture(_Derived):
    """``u = sum_k w_k * input_k`` (AHBF eq. 8, ONE, OKDDip). Inputs: logits or mixtures."""

    name: str
    inputs: tuple[str, ...]
    weights: Weights
    kind: ClassVar[str] = "mixture"


@dataclass(frozen=True)
class ProbabilityMixture(_Derived):
    """``h = sum_k w_k * p_T(input_k)``, an ``External`` input unchanged; the weights must not be
    negative, and should add up to 1.
    """

    name: str
    inputs: tuple[str, ...]
    weights: Weights
    temperature: float = 1.0
    kind: ClassVar[str] = "probability mixture"


@dataclass(frozen=True)
class External:
    """Probabilities [B, C] from outside, such as a memory or a stored teacher. A constant."""

    name: str
    kind: ClassVar[str] = "external"

    @property
    def inputs(self) -> tuple[str, ...]:
        return ()


@dataclass(frozen=True)
class MinLogit(_Derived):
    """``min_k (input_k - input_k[label])`` for each class (KDCL-MinLogit). A constant. For soft
    targets y, ``input_k[label]`` is ``<y, input_k>``.
    """

    name: str
    inputs: tuple[str, ...]
    kind: ClassVar[str] = "minimum"


@dataclass(frozen=True)
class LowestCrossEntropy(_Derived):
    """For each sample the first input with the lowest cross-entropy (KDCL-Naive). A constant."""

    name: str
    inputs: tuple[str, ...]
    kind: ClassVar[str] = "selection"


Node: TypeAlias = Logits | Mixture | ProbabilityMixture | External | MinLogit | LowestCrossEntropy


@dataclass(frozen=True)
class CrossEntropy:
    """``weight * CE(node, target)`` at temperature 1, times ``kd_weight`` if ``scheduled``."""

    node: str
    weight: float = 1.0
    scheduled: bool = False

    @property
    def name(self) -> str:
        return f"ce/{self.node}"

    @property
    def coefficient(self) -> float:
        """The factor of the cross-entropy itself, before ``kd_weight``."""
        return self.weight


@dataclass(frozen=True)
class KL:
    """``weight * T^2 * KL(p_T(teacher) || p_T(student))``, multiplied by ``kd_weight`` if
    ``scheduled``.

    Teacher rows that are probabilities enter unchanged. ``t2_scaling=False`` drops the T^2.
    ``detach`` stops the gradient into the teacher. ``eps`` is added to the teacher's probabilities
    without renormalising, inside and outside the logarithm; ``eps_mode="first_order"`` replaces
    that by its first-order expansion in eps, which needs no logarithm per element.
    ``direction="student_first"`` computes ``KL(student || teacher)``.
    """

    teacher: str
    student: str
    weight: float = 1.0
    temperature: float = 1.0
    t2_scaling: bool = True
    detach: bool = False
    eps: float = 0.0
    eps_mode: Literal["exact", "first_order"] = "exact"
    direction: Literal["teacher_first", "student_first"] = "teacher_first"
    scheduled: bool = True

    @property
    def name(self) -> str:
        return f"kl/{self.teacher}->{self.student}"

    @property
    def coefficient(self) -> float:
        """The factor of the KL divergence: weight times T^2, before ``kd_weight``."""
        return self.weight * (self.temperature**2 if self.t2_scaling else 1.0)


Term: TypeAlias = CrossEntropy | KL
