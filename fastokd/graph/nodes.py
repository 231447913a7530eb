"""Nodes and terms of a distillation graph.

A node is one row per sample. Rows of logits (``Logits``, ``Mixture``, ``Standardized``) can learn:
they may be students, carry cross-entropies and feed other nodes. The other nodes are teacher rows:
they may only be the teacher of a term (an ``External`` row may also feed a ``ProbabilityMixture``).

In the formulas of the terms, t and s are the rows of the teacher and the student, p and q their
softmax at the temperature T, and C is the number of classes.
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
class Standardized:
    """``(z - mean(z)) / std(z)`` over the classes of each row z, before any temperature (Sun et
    al., CVPR 2024), where ``std`` divides by C. ``input``: logits or a mixture.

    It lowers to a mixture of the one input with the weight 1 / std(z), because no term that takes
    this node depends on the mean. Classes at -inf do not count.
    """

    name: str
    input: str
    kind: ClassVar[str] = "standardized"

    @property
    def inputs(self) -> tuple[str, ...]:
        return (self.input,)


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


Node: TypeAlias = (
    Logits | Mixture | Standardized | ProbabilityMixture | External | MinLogit | LowestCrossEntropy
)


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


class Distillation:
    """A term between the rows of a teacher and a student.

    ``detach`` stops the gradient into the teacher. The term is multiplied by ``kd_weight`` if
    ``scheduled``. Where there is a temperature T, ``t2_scaling=False`` drops the factor T^2.
    """

    teacher: str
    student: str
    weight: float
    detach: bool
    scheduled: bool
    temperature: float = 1.0
    t2_scaling: bool = True
    word: ClassVar[str]
    """The first part of the term's name."""

    @property
    def name(self) -> str:
        return f"{self.word}/{self.teacher}->{self.student}"

    @property
    def scale(self) -> float:
        """T^2, or 1 where that is switched off."""
        return float(self.temperature) ** 2 if self.t2_scaling else 1.0

    @property
    def coefficient(self) -> float:
        """The factor of the divergence: weight times T^2, before ``kd_weight``."""
        return self.weight * self.scale


@dataclass(frozen=True)
class KL(Distillation):
    """``weight * T^2 * KL(p || q)``, the Kullback-Leibler divergence (Hinton et al., 2015).

    Teacher rows that are probabilities enter unchanged. ``eps`` is added to the teacher's
    probabilities without renormalising, inside and outside the logarithm;
    ``eps_mode="first_order"`` replaces that by its first-order expansion in eps, which needs no
    logarithm per element. ``direction="student_first"`` computes ``KL(q || p)``, and "symmetric"
    the mean of both.
    """

    teacher: str
    student: str
    weight: float = 1.0
    temperature: float = 1.0
    t2_scaling: bool = True
    detach: bool = False
    eps: float = 0.0
    eps_mode: Literal["exact", "first_order"] = "exact"
    direction: Literal["teacher_first", "student_first", "symmetric"] = "teacher_first"
    scheduled: bool = True
    word: ClassVar[str] = "kl"


@dataclass(frozen=True)
class JensenShannon(Distillation):
    """``weight * T^2 * (beta KL(p || m) + (1 - beta) KL(q || m))``, ``m = beta p + (1 - beta) q``.

    The generalized Jensen-Shannon divergence (Lin, 1991; Agarwal et al., ICLR 2024), with
    ``0 < beta < 1``. Teacher rows that are probabilities enter unchanged.
    """

    teacher: str
    student: str
    weight: float = 1.0
    temperature: float = 1.0
    beta: float = 0.5
    t2_scaling: bool = True
    detach: bool = False
    scheduled: bool = True
    word: ClassVar[str] = "js"


@dataclass(frozen=True)
class DKD(Distillation):
    """``weight * T^2 * (alpha TCKD + beta NCKD)``, decoupled distillation (Zhao et al., CVPR 2022).

    TCKD is the KL divergence of the pairs (probability of the label, of all other classes), NCKD
    that of the softmaxes over the other classes. It needs labels and rows of logits; with a single
    class it is 0. ``KL(p || q) = TCKD + (1 - p_label) NCKD``.
    """

    teacher: str
    student: str
    weight: float = 1.0
    temperature: float = 1.0
    alpha: float = 1.0
    beta: float = 8.0
    t2_scaling: bool = True
    detach: bool = False
    scheduled: bool = True
    word: ClassVar[str] = "dkd"


@dataclass(frozen=True)
class MSE(Distillation):
    """``weight / C * sum_c (s_c - t_c)^2`` of the logits (Ba and Caruana, 2014)."""

    teacher: str
    student: str
    weight: float = 1.0
    detach: bool = False
    scheduled: bool = True
    word: ClassVar[str] = "mse"


@dataclass(frozen=True)
class L1(Distillation):
    """``weight / C * sum_c |s_c - t_c|`` of the logits. The gradient is 0 where they are equal."""

    teacher: str
    student: str
    weight: float = 1.0
    detach: bool = False
    scheduled: bool = True
    word: ClassVar[str] = "l1"


Term: TypeAlias = CrossEntropy | KL | JensenShannon | DKD | MSE | L1
