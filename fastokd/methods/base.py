"""The loss module that runs any distillation graph."""

import math
import numbers
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastokd.errors import did_you_mean
from fastokd.graph import Graph, lower
from fastokd.ops import check_impl, evaluate, loss_and_grad
from fastokd.ops.reference import compute_dtype, node_rows

Reduction = Literal["mean", "sum", "none"]
Impl = Literal["auto", "reference", "triton", "cpu"]
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class GraphLoss(nn.Module):
    """The loss of any distillation graph, executed by the fastest executor that can.

    Args:
        graph: the distillation graph.
        reduction: "mean" over the B rows, "sum", or "none" for the loss of each row [B].
        impl: the executor: "auto", "reference", "triton" or "cpu". An explicit choice that cannot
            run raises.
        labels: what error messages call a logits row or a weight source, for modules that take them
            under other names.
    """

    def __init__(
        self,
        graph: Graph,
        reduction: Reduction = "mean",
        impl: Impl = "auto",
        labels: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__()
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f"reduction={reduction!r}; use 'mean', 'sum' or 'none'")
        check_impl(impl)
        labels = labels or {}
        self._row_labels = [
            labels.get(name, f"logits[{index}]") for index, name in enumerate(graph.logits)
        ]
        self._weight_labels = {
            name: labels.get(name, f"weights['{name}']") for name in graph.weight_sources
        }
        self.graph = graph
        self.plan = lower(graph)
        self.reduction = reduction
        self.impl = impl
        self._place_term_weights(torch.device("cpu"))

    def _place_term_weights(self, device: torch.device) -> None:
        fixed = [0.0 if term.scheduled else term.weight for term in self.graph.terms]
        scheduled = [term.weight if term.scheduled else 0.0 for term in self.graph.terms]
        # A first call under inference_mode must not leave tensors that no later backward pass may
        # use.
        with torch.inference_mode(False):
            for name, values in (("fixed_weights", fixed), ("scheduled_weights", scheduled)):
                self.register_buffer(
                    name, torch.tensor(values, dtype=torch.float64, device=device), persistent=False
                )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "GraphLoss":
        """Follow a move to another device, but not ``half()`` and the like: weights of terms are
        never rounded.
        """
        super()._apply(fn, recurse)
        if self.fixed_weights.dtype != torch.float64:
            self._place_term_weights(self.fixed_weights.device)
        return self

    def extra_repr(self) -> str:
        return (
            f"{self.graph.name}: {len(self.graph.nodes)} nodes, {len(self.graph.terms)} terms,"
            f" reduction={self.reduction}, impl={self.impl}"
        )

    def forward(
        self,
        logits: Sequence[Tensor] | Tensor,
        target: Tensor,
        *,
        weights: Mapping[str, Tensor] | None = None,
        externals: Mapping[str, Tensor] | None = None,
        kd_weight: float | Tensor = 1.0,
        return_terms: bool = False,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch.

        Args:
            logits: the graph's M logits rows in their order: M tensors [B, C], or one [M, B, C].
            target: int64 [B], or floating [B, C] class probabilities. Treated as a constant.
            weights: for each of ``graph.weight_sources`` a tensor [B, K], or [K] for the same
                weights in every row.
            externals: for each of ``graph.externals`` probabilities [B, C].
            kd_weight: factor of the scheduled terms: a float, or a 0-d tensor on the logits'
                device.
            return_terms: also return the mean of each term over the rows, before its weight, by the
                term's name.

        Returns:
            The reduced loss in float32 (float64 for float64 logits). An empty batch gives 0.

        Raises:
            TypeError, ValueError: an argument's type, dtype, shape, device or label is wrong; the
                message names it.
        """
        arguments = self._arguments(logits, target, weights, externals, kd_weight)
        rows, terms = evaluate(self.plan, *arguments, self.impl)
        loss = rows if self.reduction == "none" else rows.sum()
        if self.reduction == "mean":
            loss = loss / max(target.shape[0], 1)
        return (loss, self._term_means(terms)) if return_terms else loss

    def forward_backward(
        self,
        logits: Sequence[Tensor] | Tensor,
        target: Tensor,
        *,
        weights: Mapping[str, Tensor] | None = None,
        externals: Mapping[str, Tensor] | None = None,
        kd_weight: float | Tensor = 1.0,
        extra: Tensor | None = None,
        scale: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch and its backward pass at once: what a training step does, with the
        logits read only once.

        Does what ``forward`` and ``loss.backward()`` do, for the mean over the batch; arguments as
        in ``forward``. ``extra``, a 0-d tensor, is added to the loss: what a method has beside its
        graph goes through the same backward pass. ``scale``, a 0-d tensor on the logits' device,
        multiplies every gradient, and not the loss that is returned.

        Returns:
            The loss and each term's mean, detached. The gradients are where ``backward()`` leaves
            them.

        Raises:
            ValueError: ``reduction`` is not "mean"; else as ``forward``.
        """
        if self.reduction != "mean":
            raise ValueError(
                "forward_backward computes the mean over the batch, and this loss has"
                f" reduction='{self.reduction}'"
            )
        logits_in, weights_in, *others = self._arguments(
            logits, target, weights, externals, kd_weight
        )
        inputs = [*logits_in, *weights_in]
        rows, terms, grads = loss_and_grad(self.plan, logits_in, weights_in, *others, self.impl)
        wanted = [
            (tensor, grad) for tensor, grad in zip(inputs, grads, strict=True) if grad is not None
        ]
        loss = rows.sum() / max(target.shape[0], 1)
        if extra is not None:
            loss = loss + extra.detach()
            if extra.requires_grad:
                wanted.append((extra, torch.ones_like(extra)))
        if wanted:
            tensors, gradients = zip(*wanted, strict=True)
            torch.autograd.backward(
                tensors,
                (
                    gradients
                    if scale is None
                    else [(gradient * scale).to(gradient.dtype) for gradient in gradients]
                ),
            )
        return loss, self._term_means(terms)

    def _arguments(
        self,
        logits: Sequence[Tensor] | Tensor,
        target: Tensor,
        weights: Mapping[str, Tensor] | None,
        externals: Mapping[str, Tensor] | None,
        kd_weight: float | Tensor,
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor], Tensor, Tensor]:
        """What the operator takes after the plan: everything checked, and the term weights [T] on
        the logits' device.
        """
        rows_in = as_rows(logits, self.plan.num_logits, "logits")
        first = _check_rows(rows_in, self._row_labels)
        weight_list = self._runtime_weights(weights, first)
        external_list = [_external(name, externals, first) for name in self.graph.externals]
        check_target(target, first)
        _check_kd_weight(kd_weight, first.device)
        if self.fixed_weights.device != first.device and not torch.compiler.is_compiling():
            self._place_term_weights(first.device)
        # The move is for a module whose first call is traced, where it cannot change itself; else
        # it is a no-op.
        fixed, scheduled = (
            self.fixed_weights.to(first.device),
            self.scheduled_weights.to(first.device),
        )
        return (
            rows_in,
            weight_list,
            external_list,
            target,
            (fixed + scheduled * kd_weight).to(compute_dtype(first)),
        )

    def _term_means(self, terms: Tensor) -> dict[str, Tensor]:
        """The mean of each term over the rows, from [T, B]."""
        means = terms.detach().sum(1) / max(terms.shape[1], 1)
        return {
            term.name: mean for term, mean in zip(self.graph.terms, means.unbind(), strict=True)
        }

    @torch.no_grad()
    def mixtures(
        self, logits: Sequence[Tensor] | Tensor, weights: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """The logits [B, C] of every mixture by name, for measuring their accuracy."""
        rows_in = as_rows(logits, self.plan.num_logits, "logits")
        first = _check_rows(rows_in, self._row_labels)
        weight_list = self._runtime_weights(weights, first)
        no_target = torch.zeros(first.shape[0], dtype=torch.long, device=first.device)
        # Mixtures depend on neither the target nor the external rows; those rows only hold their
        # places.
        rows = node_rows(
            self.plan, rows_in, weight_list, [first] * self.plan.num_externals, no_target
        )
        order = [
            *self.graph.logits,
            *self.graph.externals,
            *(node.name for node in self.graph.ordered if node.inputs),
        ]
        return {name: rows[order.index(name)] for name in self.graph.mixtures}

    def _runtime_weights(self, given: Mapping[str, Tensor] | None, first: Tensor) -> list[Tensor]:
        return [
            _runtime_weight(name, width, given, first, self._weight_labels[name])
            for name, width in self.graph.weight_sources.items()
        ]


def as_rows(value: Sequence[Tensor] | Tensor, count: int, name: str) -> list[Tensor]:
    """A sequence of ``count`` tensors, or one tensor [count, B, ...] taken apart; errors call it
    ``name``.
    """
    if isinstance(value, Tensor):
        if value.dim() != 3:
            raise ValueError(
                f"{name} is one tensor of the shape {tuple(value.shape)}; stacked rows have three"
                f" dimensions, the first is {count}"
            )
        value = list(value.unbind(0))
    if not isinstance(value, (tuple, list)):
        raise TypeError(
            f"{name} must be a tensor or a sequence of {count} tensors, got {type(value).__name__}"
        )
    if len(value) != count:
        raise ValueError(f"{name} holds {len(value)} tensors; this loss needs {count}")
    return list(value)


def checked_rows(value: Sequence[Tensor] | Tensor, count: int, name: str) -> list[Tensor]:
    """``as_rows``, checked to be what the graph takes: for losses that compute with the rows before
    the graph does.

    Raises:
        TypeError, ValueError: as ``GraphLoss.forward`` does.
    """
    rows = as_rows(value, count, name)
    _check_rows(rows, [f"{name}[{index}]" for index in range(count)])
    return rows


def mean_prediction(rows: Sequence[Tensor]) -> Tensor:
    """The ensemble of M rows of logits [B, C] by the mean of their predictions, as
    log-probabilities [B, C].
    """
    return torch.stack([row.to(compute_dtype(row)).log_softmax(1) for row in rows]).logsumexp(
        0
    ) - math.log(len(rows))


def _check_rows(rows: list[Tensor], labels: Sequence[str]) -> Tensor:
    """Check that all rows are floating [B, C] of one shape, dtype and device; returns the first."""
    for label, row in zip(labels, rows, strict=True):
        if not isinstance(row, Tensor):
            raise TypeError(f"{label} must be a tensor, got {type(row).__name__}")
    first, first_label = rows[0], labels[0]
    if first.dim() != 2:
        raise ValueError(f"{first_label} has the shape {tuple(first.shape)}; it must be [B, C]")
    if first.shape[1] < 1:
        raise ValueError(f"{first_label} has the shape {tuple(first.shape)}: there are no classes")
    if first.dtype not in _FLOATS:
        raise TypeError(
            f"{first_label} is {first.dtype}; logits must be float16, bfloat16, float32 or float64"
        )
    for label, row in zip(labels, rows, strict=True):
        for what in ("shape", "dtype", "device"):
            mine, theirs = getattr(row, what), getattr(first, what)
            if mine != theirs:
                error = TypeError if what == "dtype" else ValueError
                raise error(
                    f"{label} has the {what} {_plain(mine)}, {first_label} has {_plain(theirs)};"
                    " they must be equal"
                )
    return first


def _plain(value: object) -> object:
    return tuple(value) if isinstance(value, torch.Size) else value


def _runtime_weight(
    name: str, width: int, given: Mapping[str, Tensor] | None, first: Tensor, label: str
) -> Tensor:
    if given is None or name not in given:
        raise ValueError(
            f"{label} is missing: this graph mixes with it; pass a tensor [B, {width}]"
        )
    value = given[name]
    batch = first.shape[0]
    if not isinstance(value, Tensor) or value.dtype not in _FLOATS:
        raise TypeError(
            f"{label} must be a floating tensor, got"
            f" {getattr(value, 'dtype', type(value).__name__)}"
        )
    if value.shape not in ((width,), (batch, width)):
        raise ValueError(
            f"{label} has the shape {tuple(value.shape)}; it must be [{batch}, {width}] or"
            f" [{width}]"
        )
    if value.device != first.device:
        raise ValueError(f"{label} is on {value.device}, the logits are on {first.device}")
    return value if value.dim() == 2 else value.expand(batch, width)


def _external(name: str, given: Mapping[str, Tensor] | None, first: Tensor) -> Tensor:
    if given is None or name not in given:
        raise ValueError(f"externals['{name}'] is missing: pass probabilities {list(first.shape)}")
    value = given[name]
    if not isinstance(value, Tensor) or value.dtype not in _FLOATS:
        raise TypeError(
            f"externals['{name}'] must be a floating tensor, got"
            f" {getattr(value, 'dtype', type(value).__name__)}"
        )
    if value.shape != first.shape or value.device != first.device:
        raise ValueError(
            f"externals['{name}'] is {tuple(value.shape)} on {value.device}; the logits are"
            f" {tuple(first.shape)} on {first.device}"
        )
    return value


def _check_kd_weight(kd_weight: float | Tensor, device: torch.device) -> None:
    if isinstance(kd_weight, Tensor):
        if kd_weight.dim() != 0 or kd_weight.device != device:
            raise ValueError(
                f"kd_weight must be a float or a 0-d tensor on {device}, got shape"
                f" {tuple(kd_weight.shape)} on {kd_weight.device}"
            )
        return
    if torch.compiler.is_compiling():
        return  # A number that changes is a symbol there, and has no value to look at.
    if not isinstance(kd_weight, numbers.Real):
        raise TypeError(f"kd_weight must be a float or a 0-d tensor, got {kd_weight!r}")
    if not math.isfinite(kd_weight):
        raise ValueError(f"kd_weight={kd_weight}; it must be finite")


def check_target(target: Tensor | None, first: Tensor) -> None:
    """Check that a batch's target fits its rows of logits: for losses that use it before the graph
    does.

    Raises:
        TypeError, ValueError: as ``GraphLoss.forward`` does.
    """
    batch, num_classes = first.shape
    if not isinstance(target, Tensor):
        raise TypeError(f"target must be a tensor, got {type(target).__name__}")
    if target.device != first.device:
        raise ValueError(f"target is on {target.device}, the logits are on {first.device}")
    if target.dtype in _FLOATS:
        if target.shape != first.shape:
            raise ValueError(
                f"a floating target holds class probabilities and must have the shape [{batch},"
                f" {num_classes}], got {tuple(target.shape)}"
            )
        if target.requires_grad:
            raise ValueError(
                "target requires a gradient, but targets are constants here; pass target.detach()"
            )
        return
    if target.dtype != torch.int64:
        raise TypeError(
            f"target is {target.dtype}; class labels must be int64 (use target.long()),"
            " probabilities floating"
        )
    if target.shape != (batch,):
        raise ValueError(f"target has the shape {tuple(target.shape)}; labels must be [{batch}]")
    # On a GPU looking at the labels would wait for the device; there a label out of range makes the
    # loss NaN.
    if torch.compiler.is_compiling() or not batch:
        return
    if target.device.type == "cpu" or os.environ.get("FASTOKD_CHECK_LABELS") == "1":
        _check_label_range(target, num_classes)


def _check_label_range(target: Tensor, num_classes: int) -> None:
    low, high = (int(value) for value in target.aminmax())
    if low < 0 or high >= num_classes:
        worst = low if low < 0 else high
        at = int((target == worst).nonzero()[0])
        raise ValueError(
            f"target[{at}] is {worst}, but the logits have {num_classes} classes (labels 0 to"
            f" {num_classes - 1})"
        )


def branch_names(
    where: str, count: int, minimum: int, what: str = "num_branches"
) -> tuple[str, ...]:
    """``branch1`` .. ``branchM``; raises a ValueError in the name of the graph function ``where``
    if M is too small.
    """
    if not isinstance(count, int) or count < minimum:
        raise ValueError(f"{where}: {what}={count!r}; it must be an integer of at least {minimum}")
    return tuple(f"branch{m}" for m in range(1, count + 1))


def check_options(**options: Any) -> None:
    """Check a loss's options, which mean the same under the same name in every method.

    ``lambda_...`` are weights, at least 0; ``temperature`` is positive; ``teacher_eps`` and
    ``label_smoothing`` are in [0, 1); ``detach_teacher`` is a switch.

    Raises:
        TypeError, ValueError: a value is of the wrong type or out of range; the message names it.
    """
    for name, value in options.items():
        if name == "detach_teacher":
            if not isinstance(value, bool):
                raise TypeError(f"{name}={value!r}; it must be True or False")
            continue
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError(f"{name}={value!r}; it must be a number")
        if name.startswith("lambda_"):
            good, rule = math.isfinite(value) and value >= 0, "a number of at least 0"
        elif name == "temperature":
            good, rule = math.isfinite(value) and value > 0, "a positive number"
        else:
            assert name in ("teacher_eps", "label_smoothing"), name
            good, rule = 0 <= value < 1, "in [0, 1)"
        if not good:
            raise ValueError(f"{name}={value}; it must be {rule}")


def check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """Check an option that is one of several words.

    Raises:
        ValueError: it is none of them; the message suggests the closest and lists them.
    """
    choices = tuple(choices)
    if value not in choices:
        raise ValueError(f"{name}={value!r}{did_you_mean(str(value), choices)}")
