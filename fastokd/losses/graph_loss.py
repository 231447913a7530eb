"""The loss module that runs any distillation graph."""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from fastokd._moved import renamed_method
from fastokd.graph import Graph, Plan, draw_text
from fastokd.losses import checks
from fastokd.losses.dense import DenseLayout
from fastokd.losses.inputs import ExtraTerm as ExtraTerm
from fastokd.losses.inputs import GraphInputs as GraphInputs
from fastokd.losses.inputs import LoweredGraph as LoweredGraph
from fastokd.losses.options import Impl, Reduction
from fastokd.losses.row_weights import RowWeights, weigh_rows
from fastokd.losses.standardize import standard_weights
from fastokd.ops import Inputs, check_impl, evaluate, forward_backward
from fastokd.ops.inputs import compute_dtype, is_transformed
from fastokd.ops.reference import node_rows

Rows = Sequence[Tensor] | Tensor
"""M tensors [B, C], or one tensor [M, B, C]."""


class _Call(NamedTuple):
    """The checked inputs of one evaluation of a loss."""

    plan: Plan
    tensors: Inputs
    extras: Mapping[str, Tensor]
    layout: DenseLayout | None
    """Of dense logits."""
    row_weights: RowWeights | None
    """Weights of the rows; None if all rows count alike."""


def overridable(hook: Callable[..., GraphInputs]) -> Callable[..., GraphInputs]:
    """Let overrides of a hook name the keywords that their loss takes, for type checkers."""
    return hook


class GraphLoss(nn.Module):
    """The loss of any distillation graph, run by the fastest executor that supports it.

    Subclasses override one pure function, ``graph_inputs``, which turns their arguments into the
    graph's inputs. Losses with state also override ``update_state`` or ``fit_held_out``.

    Args:
        graph: the distillation graph.
        reduction: "mean" over the B rows, "sum", or "none" for the loss of each row [B].
        impl: the executor: "auto", "reference", "triton" or "cpu"; an explicit one must be able to
            run.
        labels: names of logits rows and weight sources in messages, by their names in the graph.
        num_branches: M, how many of the first rows of logits are branches; None for all.
        extra_terms: terms that are not in the graph, by name; they need ``reduction="mean"``.
        ignore_index: label of rows that contribute nothing; None for no label. As in
            ``cross_entropy`` the mean is over the other rows, and 0 without such rows.
        class_weight: [C], the factors of the classes in every cross-entropy, as in
            ``cross_entropy``, whose mean they also weigh.
        class_dim: the dimension of the classes in dense logits, 1 or -1.
    """

    term_weights: Tensor
    class_weight: Tensor | None
    ensemble_of = "logits"
    """Values whose mean is the ensemble, without a node ``ensemble``: "logits" or "predictions"."""

    def __init__(
        self,
        graph: Graph,
        reduction: Reduction = "mean",
        impl: Impl = "auto",
        labels: Mapping[str, str] | None = None,
        *,
        num_branches: int | None = None,
        extra_terms: Mapping[str, ExtraTerm] | None = None,
        ignore_index: int | None = -100,
        class_weight: Tensor | None = None,
        class_dim: int = 1,
    ) -> None:
        super().__init__()
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f"reduction={reduction!r}; use 'mean', 'sum' or 'none'")
        if extra_terms and reduction != "mean":
            terms = f"the terms {', '.join(extra_terms)} are means over the batch"
            raise ValueError(f"reduction={reduction!r}: {terms}; use reduction='mean'")
        if class_dim not in (1, -1):
            raise ValueError(f"class_dim={class_dim}; use 1 ([B, C, ...]) or -1 ([B, ..., C])")
        check_impl(impl)
        self.ignore_index, self.class_dim = checks.checked_ignore_index(ignore_index), class_dim
        vars(self).pop("class_weight", None)  # an option of ``loss_options`` before it is a buffer
        weight = checks.checked_class_weight(class_weight)
        self.register_buffer("class_weight", weight, persistent=False)
        self.lowered = LoweredGraph.of(graph, labels or {})
        self.num_branches = self._num_rows() if num_branches is None else num_branches
        self.reduction, self.impl = reduction, impl
        self.extra_terms = dict(extra_terms or {})
        self._kept: tuple[Any, Tensor, Tensor] | None = None
        self._place_term_weights(torch.device("cpu"))

    @property
    def graph(self) -> Graph:
        """The distillation graph."""
        return self.lowered.graph

    @property
    def plan(self) -> Plan:
        """The lowered graph."""
        return self.lowered.plan

    def _num_rows(self) -> int:
        """The number of the graph's rows of logits, without a frozen teacher's."""
        return len(self.graph.logits) - (self.graph.teacher in self.graph.logits)

    def add_teacher(self, students: str | Sequence[str], *arguments: Any, **options: Any) -> Self:
        """Add a frozen teacher to the graph, see ``Graph.with_teacher``; returns the loss itself.

        Calls then take the keyword ``teacher``: its rows [B, C], constants.
        """
        change = self.with_divergence
        self.lowered = self.lowered.with_teacher(change, students, *arguments, **options)
        self._place_term_weights(self.term_weights.device)
        return self

    def with_divergence(self, graph: Graph) -> Graph:
        """The graph with the divergence that the loss uses in place of KL, here the same graph."""
        return graph

    def _place_term_weights(self, device: torch.device) -> None:
        fixed = [0.0 if term.scheduled else term.weight for term in self.graph.terms]
        scheduled = [term.weight if term.scheduled else 0.0 for term in self.graph.terms]
        # Tensors made under inference_mode could not be used by a later backward pass.
        with torch.inference_mode(False):
            weights = torch.tensor([fixed, scheduled], dtype=torch.float64, device=device)
        self.register_buffer("term_weights", weights, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Follow a move to another device, but keep buffers of float64 in float64."""
        buffers = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch has no types here
        for name, before in buffers.items():
            after = self.get_buffer(name)
            if before.dtype == torch.float64 != after.dtype:
                self._buffers[name] = before.to(after.device)
        return self

    def extra_repr(self) -> str:
        size = f"{len(self.graph.nodes)} nodes, {len(self.graph.terms)} terms"
        return f"{self.graph.name}: {size}, reduction={self.reduction}, impl={self.impl}"

    def draw(self) -> str:
        """The graph and the extra terms as lines of text, every coefficient multiplied out."""
        lines = [draw_text(self.graph)]
        lines += ["terms that are not in the graph"] if self.extra_terms else []
        for name, (coefficient, scheduled) in self.extra_terms.items():
            lines.append(f"  {coefficient:>16.6g}{' * kd_weight' if scheduled else ''}  {name}")
        return "\n".join(lines)

    # --- the hook, and state

    @overridable
    def graph_inputs(
        self,
        logits: Rows,
        target: Tensor | None = None,
        *,
        weights: Mapping[str, Tensor] | None = None,
        externals: Mapping[str, Tensor] | None = None,
    ) -> GraphInputs:
        """The graph's inputs for a batch. Overrides must be pure functions of their arguments.

        Args:
            logits: the graph's M rows [B, C].
            target: as in ``forward``; None where only logits and mixtures are needed
                (``named_logits``).
            weights: for each of ``graph.weight_sources`` a tensor [B, K], or [K] for the same
                weights in every row.
            externals: for each of ``graph.externals`` probabilities [B, C].
        """
        rows = checks.as_rows(logits, self._num_rows(), "logits")
        return GraphInputs(rows, weights or {}, externals or {})

    def _rows(self, branch_logits: Rows) -> Rows:
        """The first argument of ``graph_inputs``."""
        return branch_logits

    def update_state(self, *arguments: Any, **inputs: Any) -> Mapping[str, Any]:
        """Update the loss's state with a training batch, before ``graph_inputs``.

        It takes the arguments of ``graph_inputs`` and returns further keywords for it.
        """
        return {}

    @property
    def held_out_fraction(self) -> float:
        """The fraction of every class's training images that ``fit_held_out`` needs; 0 for none."""
        return 0.0

    def fit_held_out(self, batches: Iterable[tuple[Sequence[Tensor], Tensor]]) -> None:
        """Fit the loss to the logits and targets of held-out images; called before every epoch."""

    def prepare(self, num_samples: int, num_classes: int, device: torch.device) -> str:
        """Allocate the state per training sample, once, before the first step; returns a line that
        states the memory it takes, or "".
        """
        return ""

    def _inputs(
        self, branch_logits: Rows, target: Tensor | None, inputs: Mapping[str, Any]
    ) -> GraphInputs:
        """``graph_inputs``, after ``update_state`` in training; wrong keywords name the loss."""
        branch_logits, layout = self._dense_rows(branch_logits)
        inputs, teacher = self._split_teacher(inputs)
        try:
            if target is not None and self.training:
                inputs = {**inputs, **self.update_state(branch_logits, target, **inputs)}
            given = self.graph_inputs(branch_logits, target, **inputs)
        except TypeError:
            signature = inspect.signature(self.graph_inputs)
            try:
                signature.bind(branch_logits, target, **inputs)
            except TypeError as error:
                takes = ", ".join([*signature.parameters, *["teacher"] * bool(self.graph.teacher)])
                message = f"{type(self).__name__}: {error}; this loss takes {takes}"
                raise TypeError(message) from None
            raise
        given = self._with_teacher(given, target, teacher)
        if layout is None:
            return given
        return given.as_rows(layout, given.lowered or self.lowered)

    def _dense_rows(self, branch_logits: Rows) -> tuple[Rows, DenseLayout | None]:
        """``_rows`` of dense logits as [N, C], and their layout; None for rows."""
        branch_logits = self._rows(branch_logits)
        layout = DenseLayout.of(branch_logits, self.class_dim)
        if layout is None:
            return branch_logits, None
        rows = enumerate(branch_logits)
        return [layout.rows(row, f"branch_logits[{index}]") for index, row in rows], layout

    def _split_teacher(self, inputs: Mapping[str, Any]) -> tuple[dict[str, Any], Tensor | None]:
        """The keywords of ``graph_inputs``, and the frozen teacher's rows."""
        inputs = dict(inputs)
        return inputs, inputs.pop("teacher", None) if self.graph.teacher else None

    def _with_teacher(
        self, given: GraphInputs, target: Tensor | None, teacher: Tensor | None
    ) -> GraphInputs:
        """The graph's inputs with the rows of its frozen teacher, if it has one."""
        name, is_external = self.graph.teacher, self.graph.teacher in self.graph.externals
        if not name or (teacher is None and target is None):
            return given
        if teacher is None:
            kind = "probabilities" if is_external else "logits"
            raise ValueError(f"teacher is missing: pass the teacher's {kind} [B, C]")
        if not isinstance(teacher, Tensor):
            raise TypeError(f"teacher must be a tensor, got {type(teacher).__name__}")
        teacher = teacher.detach()
        if is_external:
            return given._replace(externals={**given.externals, name: teacher})
        # A teacher may run in another precision than the student.
        return given._replace(logits=[*given.logits, teacher.to(given.logits[0].dtype)])

    # --- the loss

    def forward(
        self,
        branch_logits: Rows,
        target: Tensor,
        *,
        kd_weight: float | Tensor = 1.0,
        return_terms: bool = False,
        sample_weight: Tensor | None = None,
        **inputs: Any,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch of B samples with C classes.

        Args:
            branch_logits: M tensors [B, C], or one [M, B, C]. Dense logits have further dimensions,
                [B, C, d1, ...] or, with ``class_dim=-1``, [B, d1, ..., C]: every position is a row
                with its own label [B, d1, ...]. The other inputs have the same layout, such as
                mixing weights [B, K, d1, ...]; [B, K] is shared by all positions.
            target: int64 [B], or floating [B, C] class probabilities. Treated as a constant.
            kd_weight: the factor of the scheduled terms: a float, or a 0-d tensor on the device.
            return_terms: also return each term's mean over the rows before its weight, by name, as
                detached 0-d tensors.
            sample_weight: floating [B], or [B, d1, ...], the factors of all terms of a row. A mean
                is divided by the sum of the factors, so only their ratios matter. A constant.
            inputs: the keywords of ``graph_inputs``.

        Returns:
            The reduced loss in float32 (float64 for float64 logits); with ``reduction="none"`` [B],
            or [B, d1, ...]. An empty batch gives 0.

        Raises:
            TypeError, ValueError: an argument's type, dtype, shape, device or label is wrong; the
                message names it.
        """
        call = self._prepared(branch_logits, target, kd_weight, sample_weight, inputs)
        rows, terms = evaluate(call.plan, *call.tensors, self.impl, mean=self.reduction == "mean")
        loss = rows if self.reduction == "none" else rows.sum()
        if self.reduction == "none" and call.layout is not None:
            loss = call.layout.restore(rows)
        if self.reduction == "mean":
            loss = loss / max(len(rows), 1)
        if call.extras:
            loss = loss + self._extra_loss(call.extras, kd_weight)
        return (loss, self._term_means(terms, call)) if return_terms else loss

    def forward_backward(
        self,
        branch_logits: Rows,
        target: Tensor,
        *,
        kd_weight: float | Tensor = 1.0,
        extra: Tensor | None = None,
        scale: Tensor | None = None,
        sample_weight: Tensor | None = None,
        **inputs: Any,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """``forward`` and ``loss.backward()`` in one pass over the logits.

        Args:
            branch_logits, target, kd_weight, sample_weight, inputs: as in ``forward``.
            extra: a 0-d tensor that is added to the loss and differentiated with it.
            scale: a 0-d tensor on the device that multiplies every gradient, but not the loss.

        Returns:
            The loss and each term's mean, detached. Gradients are accumulated in the leaf tensors'
            ``.grad``, as by ``loss.backward()``.

        Raises:
            ValueError: ``reduction`` is not "mean"; else as ``forward``.
        """
        if self.reduction != "mean":
            fix = "forward_backward needs reduction='mean'; use forward and loss.backward()"
            raise ValueError(f"reduction={self.reduction!r}: {fix}")
        call = self._prepared(branch_logits, target, kd_weight, sample_weight, inputs)
        rows, terms, grads = forward_backward(call.plan, *call.tensors, self.impl)
        gradients = zip(call.tensors.differentiable, grads, strict=True)
        roots = [(tensor, grad) for tensor, grad in gradients if grad is not None]
        loss = rows.sum() / max(len(rows), 1)
        if call.extras:
            extra_loss = self._extra_loss(call.extras, kd_weight)
            extra = extra_loss if extra is None else extra + extra_loss
        if extra is not None:
            loss = loss + extra.detach()
            if extra.requires_grad:
                roots.append((extra, torch.ones_like(extra)))
        if scale is not None:
            roots = [(tensor, (grad * scale).to(grad.dtype)) for tensor, grad in roots]
        if roots:
            torch.autograd.backward([root for root, _ in roots], [grad for _, grad in roots])
        return loss, self._term_means(terms, call)

    def _prepared(
        self,
        branch_logits: Rows,
        target: Tensor,
        kd_weight: float | Tensor,
        sample_weight: Tensor | None,
        inputs: dict[str, Any],
    ) -> _Call:
        """The operator's inputs of a call, with every tensor checked."""
        if target is None:  # None is valid only for methods such as ``named_logits``
            raise TypeError("target must be a tensor, got NoneType")
        layout = DenseLayout.of(self._rows(branch_logits), self.class_dim)
        if layout is not None:
            target = layout.target(target)
            sample_weight = layout.values(sample_weight, "sample_weight")
        ignored = checks.ignored_rows(target, self.ignore_index)
        if ignored is not None:
            target = target.masked_fill(ignored, 0)  # a class for the kernels
        given = self._inputs(branch_logits, target, inputs)
        lowered = given.lowered or self.lowered
        first = lowered.check(given, target)
        checks.check_kd_weight(kd_weight, first.device)
        checks.check_ignore_index(self.ignore_index, first.shape[1])
        weights = [given.weights[name] for name in lowered.weight_labels]
        weights += standard_weights(lowered.graph, given.logits, given.weights)
        weights = [each if each.dim() == 2 else each.expand(len(first), -1) for each in weights]
        externals = [given.externals[name] for name in lowered.graph.externals]
        term_weights = self._weights_of_terms(first, kd_weight)
        plan, row_weights = lowered.plan, None
        if ignored is not None or sample_weight is not None or self.class_weight is not None:
            factors = checks.check_row_factors(first, self.class_weight, sample_weight)
            row_weights = weigh_rows(plan, lowered.unsmoothed, first, target, ignored, *factors)
            plan, target = row_weights.plan, row_weights.target
            term_weights = row_weights.term_weights(term_weights, self.reduction == "mean")
        tensors = Inputs(given.logits, weights, externals, target, term_weights)
        return _Call(plan, tensors, given.extras, layout, row_weights)

    def _weights_of_terms(self, first: Tensor, kd_weight: float | Tensor) -> Tensor:
        """The weight of each term [T], a cached tensor while ``kd_weight`` is the same number."""
        device = first.device
        if self.term_weights.device != device and not torch.compiler.is_compiling():
            self._place_term_weights(device)
        both = self.term_weights
        key = None if isinstance(kd_weight, Tensor) else _kept_for(first, kd_weight, both)
        if self._kept is not None and key == self._kept[0] and both is self._kept[1]:
            return self._kept[2]
        # ``to`` copies only if the first call is traced: a traced module cannot move its buffers.
        fixed, scheduled = both.to(device)
        weights: Tensor = (fixed + scheduled * kd_weight).to(compute_dtype(first))
        # Not the tensors of FakeTensorMode and inference_mode, which other calls cannot use.
        if key is not None and type(weights) is Tensor and not weights.is_inference():
            self._kept = key, both, weights
        return weights

    def _extra_loss(self, values: Mapping[str, Tensor], kd_weight: float | Tensor) -> Tensor:
        parts = []
        for name, (coefficient, scheduled) in self.extra_terms.items():
            part = values[name] * coefficient
            parts.append(part * kd_weight if scheduled else part)
        return torch.stack(parts).sum()

    def _term_means(self, terms: Tensor, call: _Call) -> dict[str, Tensor]:
        """The mean of each term [T, B] over the rows, and the extra terms, by name."""
        if call.row_weights is None:
            means = terms.detach().sum(1) / max(terms.shape[1], 1)
        else:
            means = call.row_weights.term_means(terms.detach())
        names = [term.name for term in self.graph.terms]
        extra_means = {name: value.detach() for name, value in call.extras.items()}
        return {**dict(zip(names, means.unbind(), strict=True)), **extra_means}

    # --- rows and weights by name

    @property
    def ensemble_members(self) -> tuple[str, ...]:
        """The ensemble's rows: the inputs of the graph's node ``ensemble``, or all branches."""
        node = self.graph.by_name.get("ensemble")
        return self.graph.logits[: self.num_branches] if node is None else node.inputs

    @torch.no_grad()
    def named_logits(self, branch_logits: Rows, **inputs: Any) -> dict[str, Tensor]:
        """The logits [B, C] of every branch, head and mixture, and the external rows, by name.

        With two or more branches there is the row ``ensemble``: the graph's mixture of that name,
        else the mean of ``ensemble_members`` (see ``ensemble_of``). Mixtures that need a target are
        omitted. Arguments as in ``forward``.
        """
        given = self._inputs(branch_logits, None, inputs)
        graph = (given.lowered or self.lowered).graph
        named = dict(zip(graph.logits, given.logits, strict=False))
        named.update(given.externals)
        if self.num_branches > 1 and self.ensemble_of == "predictions":
            named["ensemble"] = checks.mean_prediction(given.logits[: self.num_branches])
        if graph.weight_sources.keys() <= given.weights.keys():
            named.update(self._mixtures(given))
        if self.num_branches > 1 and "ensemble" not in named:
            members = [named[name] for name in self.ensemble_members]
            named["ensemble"] = torch.stack(members).mean(0)
        return self._restored(named, branch_logits)

    def _restored(self, named: dict[str, Tensor], branch_logits: Rows) -> dict[str, Tensor]:
        """Rows [N, C] or values [N] by name in the layout of dense logits."""
        layout = DenseLayout.of(branch_logits, self.class_dim)
        return named if layout is None else {n: layout.restore(row) for n, row in named.items()}

    @torch.no_grad()
    def mixtures(
        self, branch_logits: Rows, weights: Mapping[str, Tensor] | None = None, **inputs: Any
    ) -> dict[str, Tensor]:
        """The logits [B, C] of every mixture by name; arguments as in ``graph_inputs``, also with
        dense logits.
        """
        if weights is not None:
            inputs["weights"] = weights
        named = self._mixtures(self._inputs(branch_logits, None, inputs))
        return self._restored(named, branch_logits)

    def _mixtures(self, given: GraphInputs) -> dict[str, Tensor]:
        lowered = given.lowered or self.lowered
        graph, plan = lowered.graph, lowered.plan
        if not graph.mixtures:
            return {}
        # Mixtures need no target, external row or frozen teacher, which get placeholders.
        rows = [*given.logits, *[given.logits[0]] * (plan.num_logits - len(given.logits))]
        first = checks.check_rows(rows, lowered.row_labels)
        sources, labels = graph.weight_sources, lowered.weight_labels
        weights = checks.check_weights(given.weights, sources, first, labels)
        weights = [*weights, *standard_weights(graph, rows, given.weights)]
        target = torch.zeros(first.shape[0], dtype=torch.long, device=first.device)
        externals = [first] * plan.num_externals
        rows = node_rows(plan, Inputs(rows, weights, externals, target, first))
        derived = (node.name for node in graph.ordered if node.inputs)
        names = (*graph.logits, *graph.externals, *derived)
        named = dict(zip(names, rows, strict=False))  # rows of terms (DKD) follow
        return {name: named[name] for name in graph.mixtures}

    @torch.no_grad()
    def mixing_weights(
        self, branch_logits: Rows, target: Tensor | None, **inputs: Any
    ) -> dict[str, dict[str, Tensor]]:
        """For each mixture with run-time weights, the weight [B] of each input, by name:
        ``{"ta2": {"branch2": ..., "branch1": ...}}``; [B, d1, ...] for dense logits. Arguments as
        in ``forward``.
        """
        mixtures = self.graph.dynamic_mixtures
        if not mixtures:
            return {}
        inputs, _ = self._split_teacher(inputs)
        rows, layout = self._dense_rows(branch_logits)
        if layout is not None and target is not None:
            target = layout.target(target)
        given = self.graph_inputs(rows, target, **inputs)
        if layout is not None:
            given = given.as_rows(layout, given.lowered or self.lowered)
        batch = given.logits[0].shape[0]
        columns = {name: each.expand(batch, -1).unbind(1) for name, each in given.weights.items()}
        return {
            node.name: self._restored(
                dict(zip(node.inputs, columns[str(node.weights)], strict=True)), branch_logits
            )
            for node in mixtures
        }

    # --- former names

    named_rows = renamed_method("named_rows", "named_logits")
    see_held_out = renamed_method("see_held_out", "fit_held_out")


def _kept_for(first: Tensor, kd_weight: float, term_weights: Tensor) -> tuple[Any, ...] | None:
    """Key of the cached tensor of term weights; None if it must not be cached.

    Another stream would not wait for the kernels that compute the tensor, and in a captured graph
    it has its values only while the graph runs.
    """
    if is_transformed() or first.device.type not in ("cpu", "cuda") or term_weights.is_inference():
        return None
    key = kd_weight, first.dtype, term_weights._version  # which counts changes in place
    if first.device.type == "cpu":
        return key
    if torch.cuda.is_current_stream_capturing():
        return None
    # The handle of the stream, as Triton and Inductor get it: torch.cuda.current_stream is slow.
    return *key, torch._C._cuda_getCurrentRawStream(first.get_device())
