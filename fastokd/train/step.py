"""One training step: forward of trunk and branches, loss, backward, optimizer."""

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastokd.data import Batch
from fastokd.errors import CheckpointError, ConfigError, first_line
from fastokd.export import load_weights
from fastokd.losses.method_loss import MethodLoss
from fastokd.methods import get_method
from fastokd.methods.method import MethodBatch
from fastokd.metrics import metric_sums, metrics_of
from fastokd.models import BranchedModel, BranchOutput
from fastokd.models.layers import uncounted_batches
from fastokd.ranks import sum_over_ranks
from fastokd.train.cast_weights import CastWeights, cast_parameters
from fastokd.train.config import TrainConfig
from fastokd.train.distributed import Ranks, mean_buffers, parallel, share_of_batch, sum_counts
from fastokd.train.ema import StudentAverage
from fastokd.train.guard import FiniteGuard
from fastokd.train.loss import build_loss
from fastokd.train.metrics import MetricSums, correct_counts
from fastokd.train.optimizers import Optimizers, with_index
from fastokd.train.param_groups import frozen_parts, parts
from fastokd.train.precision import (
    LossScale,
    allow_tf32,
    autocast,
    choose_precision,
    image_dtype,
    in_float32,
)
from fastokd.train.statistics import RunningStatistics
from fastokd.train.step_options import choose_step_options
from fastokd.train.streams import BranchStreams
from fastokd.train.sync_norm import synchronized_batch_norm
from fastokd.train.teacher import StoredRows

AVERAGE = "ema"
"""The name of the averaged student among the evaluated rows."""
FEW_KERNELS: dict[str, Any] = {"max_pointwise_cat_inputs": 64, "combo_kernels": True}
"""Options of ``torch.compile`` for the bookkeeping of a step: it has little data."""
COMBINED_KERNELS: dict[str, Any] = {"combo_kernels": True, "shape_padding": False}
"""Options for the networks: independent kernels are launched as one, such as the last parts of a
batch norm's two sums in the backward pass, and the matrices of classifiers, which are small, are
not copied into padded ones.
"""
_STREAM_WARNING = "set_warn_on_accumulate_grad_stream_mismatch"
"""Of ``torch.autograd.graph``, since PyTorch 2.11."""


class Evaluation(NamedTuple):
    """The metrics of a split: the accuracies in [0, 1] of every branch and mixture, and
    ``branch_mean`` for methods whose published number that is; the mean weights of the inputs of
    each mixture whose weights are computed at run time; and for each other metric of ``metrics_of``
    the values of every branch and mixture.
    """

    accuracies: dict[str, float]
    mixing: dict[str, dict[str, float]]
    metrics: dict[str, dict[str, float]]

    def record(self) -> dict[str, Any]:
        """The entries of an epoch's record."""
        mixing = {"mixing": self.mixing} if self.mixing else {}
        return {"eval": self.accuracies, "metrics": self.metrics, **mixing}


class BranchEvaluator:
    """A branched model with the loss of its method (``criterion``: another loss), for evaluating
    every branch and mixture.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: BranchedModel,
        device: torch.device,
        criterion: MethodLoss | None = None,
    ) -> None:
        self.config = config
        self.method = get_method(config.method)
        self.model = model
        self.device = device = with_index(device)
        self.criterion = (criterion or build_loss(config)).to(device)
        self.kept = self.criterion.graph.logits[model.kept]
        self.average: StudentAverage | None = None
        self.precision = choose_precision(config, device)
        allow_tf32(self.precision == "tf32")

    @property
    def reported(self) -> str:
        """The name of the student's accuracy: that of its branch, or of its moving average."""
        return self.kept if self.average is None else AVERAGE

    def student(self) -> nn.Module:
        """A copy of the student to export: the kept branch, or the average of its weights."""
        return self.model.student() if self.average is None else copy.deepcopy(self.average.module)

    def named_logits(self, result: BranchOutput) -> dict[str, Tensor]:
        """The logits [B, C] of every branch, head and mixture by name."""
        return self.method.named_logits(self.criterion, result)

    def results(self, batches: Iterable[Batch]) -> Iterator[tuple[BranchOutput, Tensor]]:
        """The output of the model in evaluation mode for each batch, and the targets."""
        return ((result, batch.target) for batch, result in self._evaluated(batches))

    def _evaluated(self, batches: Iterable[Batch]) -> Iterator[tuple[Batch, BranchOutput]]:
        """Each batch and its output; the model is in evaluation mode until they end."""
        was_training = self.model.training
        self.model.eval()
        try:
            for batch in batches:
                # Evaluation has other shapes, and compiling for them takes longer than it saves.
                eager = torch.compiler.set_stance("force_eager")
                with torch.no_grad(), autocast(self.precision, self.device), eager:
                    result = self.model(batch.images)
                yield batch, result
        finally:
            self.model.train(was_training)

    def measured(
        self, batches: Iterable[Batch]
    ) -> Iterator[tuple[BranchOutput, dict[str, Tensor], Tensor]]:
        """For each batch the output, the logits of ``named_logits`` and of the average, and the
        targets.
        """
        for batch, result in self._evaluated(batches):
            rows = self.named_logits(result)
            if self.average is not None:
                with torch.no_grad(), autocast(self.precision, self.device):
                    rows[AVERAGE] = self.average.module(batch.images)
            yield result, rows, batch.target

    def mixing_weights(self, result: BranchOutput, target: Tensor) -> dict[str, dict[str, Tensor]]:
        """The weights of the method's gates, see ``GraphLoss.mixing_weights``."""
        return self.method.mixing_weights(self.criterion, result, target)

    def evaluate(self, batches: Iterable[Batch]) -> dict[str, float]:
        """The accuracies of ``measure``."""
        return self.measure(batches).accuracies

    def measure(self, batches: Iterable[Batch]) -> Evaluation:
        """Evaluate every branch and mixture on all samples of all processes, each counted once."""
        sums: dict[str, Tensor] = {}
        count = 0
        nodes = self.criterion.graph.dynamic_mixtures
        mixed = [(node.name, name) for node in nodes for name in node.inputs]
        weights = torch.zeros(len(mixed), dtype=torch.float64, device=self.device)
        for result, rows, target in self.measured(batches):
            for name, row in rows.items():
                more = metric_sums(row, target)
                sums[name] = sums[name] + more if name in sums else more
            if mixed:
                gates = self.mixing_weights(result, target)
                values = torch.stack([gates[mixture][name] for mixture, name in mixed])
                weights += values.sum(1, dtype=torch.float64)
            count += target.shape[0]
        totals, count = sum_counts(sums, count)
        metrics: dict[str, dict[str, float]] = {}
        for name, total in totals.items():
            for metric, value in metrics_of(total).items():
                metrics.setdefault(metric, {})[name] = value
        accuracies = metrics.pop("accuracy", {})
        if self.method.reports_mean:
            branches = self.criterion.graph.logits[: self.criterion.num_branches]
            accuracies["branch_mean"] = sum(accuracies[name] for name in branches) / len(branches)
        mixing: dict[str, dict[str, float]] = {}
        for (mixture, name), total in zip(mixed, sum_over_ranks(weights).tolist(), strict=True):
            mixing.setdefault(mixture, {})[name] = total / count
        return Evaluation(accuracies, mixing, metrics)


class TrainStep(BranchEvaluator):
    """The training step of a process: owns criterion and optimizers, changes the model in place.

    Everything a step reads except its batch is on the device and never moves: the learning rate,
    ``kd_weight``, the step's number, the metric sums. So a step waits for nothing and can be
    captured (``runner.py``). The model must be on the device, in its memory format; ``stored`` are
    a frozen teacher's rows. Raises a ``ConfigError`` if an option is not available here.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: BranchedModel,
        device: torch.device,
        stored: StoredRows | None = None,
        criterion: MethodLoss | None = None,
    ) -> None:
        super().__init__(config, model, device, criterion)
        self.stored, device = stored, self.device
        ranks = Ranks.current()
        self.share = share_of_batch(config, ranks)
        host_rows = stored is not None and stored.table.device != device
        self.options = choose_step_options(config, model, device, ranks.size, host_rows)
        if self.options.compile:
            model.compile_parts(COMBINED_KERNELS if device.type == "cuda" else None)
        if self.options.streams:
            model.run_branches = BranchStreams(device, model.num_branches)
            # Modules that use a branch's weights outside of its stream (FFM) are synchronized.
            if warn := getattr(torch.autograd.graph, _STREAM_WARNING, None):
                warn(False)
        self.optimizers = Optimizers(config, model, device, flat=self.options.flat)
        self._cast_weights: CastWeights | None = None  # made in the first step
        self._parallel = None
        if ranks.size > 1:
            self._parallel = parallel(model, device, accumulate=self.share.accumulate)
        if config.ema:
            self.average = StudentAverage(model, config.ema)
        self.scale = LossScale(device) if self.precision == "fp16" else None
        skip = config.on_nonfinite == "skip"
        self.guard = FiniteGuard(device, self.optimizers.parts, sticky=not skip)
        self._statistics = RunningStatistics(model) if skip or self.scale is not None else None
        self.sums = MetricSums()
        self.kd_weight = torch.ones((), device=device)
        self._schedule: tuple[float, float] | None = None  # the values on the device
        self.number = torch.zeros((), dtype=torch.int64, device=device)
        self.frozen: frozenset[str] = frozenset()
        """The parts of the model that are not trained now, see ``frozen_parts``."""
        self.notes: list[str] = []
        """Lines about the initial weights, for the start of a run."""
        self._names: tuple[str, ...] = ()  # of the metrics
        self.sum_metrics, self.check_loss = self._sum_metrics, self._check_loss
        self.record = self._record
        if self.options.compile and device.type == "cuda":
            # Together dozens of small kernels, and compiled a few.
            self.sum_metrics = torch.compile(self.sum_metrics, options=FEW_KERNELS)
            self.check_loss = torch.compile(self.check_loss, options=FEW_KERNELS)
            self.record = torch.compile(self.record, options=FEW_KERNELS)
            if self.criterion.extra_terms:  # of feature maps or weights, in many operations
                vars(self.criterion)["graph_inputs"] = torch.compile(
                    self.criterion.graph_inputs, options=COMBINED_KERNELS
                )

    def start_epoch(self, epoch: int) -> None:
        """Put the model in training mode, with the frozen parts of a 0-based epoch."""
        self.frozen = frozen_parts(self.config, epoch)
        self.model.frozen = tuple(each for part, each in parts(self.model) if part in self.frozen)
        # Gradients that are exchanged must exist in every step.
        self.model.detach_trunk = "trunk" in self.frozen and self._parallel is None
        self.optimizers.freeze(self.frozen)
        self.model.train()

    def set_schedule(self, lr: float, kd_weight: float) -> None:
        """Set the learning rate and the factor of the scheduled terms for the next steps."""
        if (lr, kd_weight) == self._schedule:
            return  # each write is a kernel, and most steps change nothing
        self._schedule = (lr, kd_weight)
        self.optimizers.set_lr(lr)
        self.kd_weight.fill_(kd_weight)

    def __call__(self, batch: Batch) -> None:
        """Train on a batch, and add its loss, terms and correct answers to ``sums``."""
        self.optimizers.zero_grad()
        if self._statistics is not None:
            self._statistics.keep()
        *others, last = self._parts(batch)
        if self.options.cast_once:
            self._update_cast_weights(last.images)
        parts = []
        with contextlib.nullcontext() if self._parallel is None else self._parallel.no_sync():
            for part in others:
                parts.append(self._forward_backward(part))
                self.optimizers.accumulate()
        parts.append(self._forward_backward(last))
        values, right = (functools.reduce(torch.add, each) for each in zip(*parts, strict=True))
        lost, withheld = self.check_loss(values)
        divisor: Tensor | int = self.share.accumulate
        if self.scale is not None:
            divisor = self.scale.value * divisor
        norm, _ = self.optimizers.step(divisor, withheld)
        if self._statistics is not None:
            self._statistics.put_back(lost | ~norm.isfinite())
        if self.average is not None:
            self.average.update()
        if self.scale is not None:
            self.scale.update(~norm.isfinite())
        self.record(values, right, batch.index.shape[0], lost, norm)

    def mean_statistics(self) -> None:
        """Average the running statistics of all processes, before they are read."""
        if not self.config.sync_bn:
            mean_buffers(self.model, None if self.average is None else self.average.module)

    def rank_statistics(self) -> dict[str, Tensor]:
        """The running statistics that differ between processes within an epoch."""
        if self.share.processes == 1 or self.config.sync_bn:
            return {}
        parts: dict[str, nn.Module] = {"model": self.model}
        if self.average is not None:
            parts["average"] = self.average.module
        # Only buffers in the state dict: a frozen teacher has some too, which never change.
        return {
            f"{part}.{name}": value
            for part, module in parts.items()
            for name, value in module.state_dict(keep_vars=True).items()
            if value.is_floating_point() and not isinstance(value, nn.Parameter)
        }

    def state_dict(self) -> dict[str, Any]:
        """The state of everything that a step changes, for a checkpoint."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizers.state_dict(),
            "criterion": self.criterion.state_dict(),
            "ema": {} if self.average is None else self.average.state_dict(),
            "scaler": {} if self.scale is None else self.scale.state_dict(),
            "step": int(self.number),
        }

    def load_state_dict(self, state: Mapping[str, Any], where: str) -> None:
        """Load a ``state_dict`` in place, but not the step's number; it may have further entries.
        Raises a ``CheckpointError`` if it is of another architecture or another optimizer.
        """
        load_weights(self.model, state["model"], where)
        load_weights(self.criterion, state["criterion"], where)
        try:
            self.optimizers.load_state_dict(state["optimizer"])
            if self.average is not None and state["ema"]:
                self.average.load_state_dict(state["ema"], where)
            if self.scale is not None and state["scaler"]:
                self.scale.load_state_dict(state["scaler"])
        except (ValueError, KeyError, TypeError, RuntimeError) as error:
            message = f"{where} has an optimizer state that does not fit ({first_line(error)})"
            raise CheckpointError(message) from error

    def _parts(self, batch: Batch) -> list[Batch]:
        """The parts of a batch that go through the network at once."""
        count = self.share.accumulate
        if count == 1:
            return [batch]
        images = batch.images.chunk(count, batch.images.dim() - 4)  # [views, B, 3, H, W]
        pieces = zip(images, batch.target.chunk(count), batch.index.chunk(count), strict=True)
        return [Batch(*piece) for piece in pieces]

    def _update_cast_weights(self, images: Tensor) -> None:
        """Cast the weights for this step. If the network cannot be analyzed for it, which the first
        step finds out, autocast does it in every layer.
        """
        if self._cast_weights is None:
            try:
                chosen = cast_parameters(self.model, images, self.precision)
            except Exception as error:  # a network's operators may raise anything
                reason = f"the network does not run on fake tensors ({first_line(error)})"
                if self.config.cast_once:
                    raise ConfigError(f"cast_once=True: {reason}; omit it") from error
                self.options = dataclasses.replace(self.options, cast_once=False)
                return
            dtype = image_dtype(self.precision)
            self._cast_weights = CastWeights(self.model, self.optimizers, chosen, dtype)
        self._cast_weights.update()

    def _forward_backward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Accumulate the gradients of a part of the batch; returns its ``_sum_metrics``."""
        with contextlib.ExitStack() as contexts:
            contexts.enter_context(autocast(self.precision, self.device))
            contexts.enter_context(uncounted_batches(self.model))
            if self.config.sync_bn:
                contexts.enter_context(synchronized_batch_norm())
            if self._cast_weights is not None:
                contexts.enter_context(self._cast_weights.used())
            result = (self._parallel or self.model)(batch.images)
        output, scale = result, None
        if self.scale is not None:
            output = BranchOutput(in_float32(result.logits), (), in_float32(result.extras))
            scale = self.scale.value
        teacher = None if self.stored is None else self.stored(batch.index)
        loss, terms = self.method.forward_backward(
            self.criterion,
            output,
            MethodBatch(batch.target, batch.index, teacher),
            kd_weight=self.kd_weight,
            scale=scale,
        )
        values = {"loss": loss, **terms}
        if not self._names:
            rows = self.named_logits(result)
            self._names = (*values, *(f"accuracy/{name}" for name in rows))
            self.guard.prepare(tuple(values))
        assert self._names[: len(values)] == tuple(values)  # the same terms in every step
        self.sums.prepare(self._names, self.device)
        return self.sum_metrics(tuple(values.values()), result, batch.target)

    def _sum_metrics(
        self, values: Sequence[Tensor], result: BranchOutput, target: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The sums over the samples of the loss and its terms [1 + T], and the number of correct
        answers of each row of ``named_logits``, int64 [R].
        """
        rows = tuple(self.named_logits(result).values())
        return torch.stack(list(values)) * target.shape[0], correct_counts(rows, target)

    def _check_loss(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """True (0-d bool) if the loss of any process is non-finite, and 1.0 (else 0.0) if the
        update is skipped.
        """
        lost = sum_over_ranks((~values[0].isfinite()).float()) > 0
        return lost, torch.maximum(lost.float(), self.guard.withheld())

    def _record(
        self, values: Tensor, right: Tensor, count: int, lost: Tensor, norm: Tensor
    ) -> None:
        """Add the metrics of ``count`` samples to ``sums``, and note a non-finite loss or norm."""
        overflowed = ~norm.isfinite()
        if self.scale is not None:
            # The scale handles gradients that overflow, until it cannot fall further.
            overflowed = overflowed & (self.scale.value <= 1.0)
        self.guard.note(lost | overflowed, self.number, values, self.optimizers.norms)
        self.sums.add((values, right), count, lost)
        self.number.add_(1)
