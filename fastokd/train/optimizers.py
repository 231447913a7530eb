"""Division, clipping, skipping of non-finite steps and updates, without waiting for the device."""

import bisect
import itertools
from collections.abc import Mapping, Set
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from fastokd.errors import ConfigError
from fastokd.models import BranchedModel
from fastokd.train.config import TrainConfig
from fastokd.train.param_groups import Settings, parameter_settings


class Optimizers:
    """Everything between a backward pass and the next forward pass.

    The run's optimizer has the parameters of the networks and of the method's modules; parameters
    that a method trains with Adam have their own. Both are PyTorch's fused kernels, which divide
    gradients and skip a step by values on the device, so that clipping and skipping read no
    gradient again. A parameter that the loss does not reach has a zero gradient: weight decay and
    momentum still apply to it. The model must stay on its device and in its memory format.

    Args:
        flat: keep the parameters of a kind in one tensor of which the model's are views, and gather
            their gradients in another, so that an update is one operation. The results are
            bit-identical on a GPU. On a CPU the last few elements of a tensor, which do not fill a
            vector, may round differently, and so does the norm where it clips.

    Raises:
        ConfigError: a parameter is not float32, on another device, or tied (with ``flat``).
    """

    def __init__(
        self, config: TrainConfig, model: BranchedModel, device: torch.device, *, flat: bool
    ) -> None:
        _check_parameters(model, device, flat)
        self.lr = torch.tensor(config.lr_at(0.0), dtype=torch.float32, device=device)
        """The learning rate of the run's optimizer, 0-d on the device, read by every update."""
        self._scaled_lrs: dict[float, Tensor] = {}  # by factor
        self._frozen: list[str] = []  # the names of optimizers that update nothing now
        self._clip = config.clip_grad
        self.by_name: dict[str, tuple[Optimizer, list[ParameterTensors]]] = {}
        """PyTorch's optimizers, with their groups of parameters."""
        for name, settings in _settings(config, model).items():
            groups, options = [], []
            for parameters, different in settings:
                groups.append((FlatParameters if flat else ParameterTensors)(parameters))
                if (factor := different.pop("lr_factor", 1.0)) != 1.0:
                    different["lr"] = self._scaled_lrs.setdefault(factor, self.lr * factor)
                options.append({"params": groups[-1].tensors, **different})
            kind = name.partition(" of ")[0]
            self.by_name[name] = _build(kind, config, options, self.lr), groups
        self.groups = [group for _, groups in self.by_name.values() for group in groups]
        self.parts = tuple(part for group in self.groups for part in group.parts)
        """The names of the parameters in each part of the gradient whose norm is taken."""
        self.norms = torch.zeros(len(self.parts), device=device)
        """The norms of these parts in the last step, as the backward pass left them."""

    def set_lr(self, lr: float | Tensor) -> None:
        """Set the learning rate of the run's optimizer; also between replays of a captured step."""
        self.lr.copy_(lr) if isinstance(lr, Tensor) else self.lr.fill_(lr)
        for factor, scaled in self._scaled_lrs.items():
            torch.mul(self.lr, factor, out=scaled)

    def freeze(self, parts: Set[str]) -> None:
        """Keep the parameters of these parts and train all others, see ``frozen_parts``. A captured
        step must be captured again.
        """
        self._frozen = [name for name in self.by_name if name.partition(" of ")[2] in parts]

    def zero_grad(self) -> None:
        """Drop all gradients, so that the next backward pass writes instead of adding to zeros."""
        for group in self.groups:
            group.zero_grad()

    @torch.no_grad()
    def accumulate(self) -> None:
        """Add the gradients of a backward pass to those before in float32, which autograd does not
        do for copies; call it before the next backward pass of the same step.
        """
        for group in self.groups:
            group.accumulate()

    @torch.no_grad()
    def step(
        self, divisor: Tensor | float = 1.0, bad: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Update all parameters, or none if a gradient is non-finite.

        Args:
            divisor: divides the gradients: the number of accumulated passes times the loss scale.
            bad: 0-d, nonzero to skip the step. All processes must agree on it; they agree on the
                gradients.

        Returns:
            0-d float32 tensors on the device: the norm of the gradient of all parameters, divided
            and not clipped, and 1.0 if the step was skipped, else 0.0. A norm above 1.8e19 before
            the division counts as non-finite.
        """
        for group in self.groups:
            group.collect()
        for name in self._frozen:  # the norm and clipping do not see them
            for group in self.by_name[name][1]:
                torch._foreach_zero_([_gradient(tensor) for tensor in group.tensors])
        self.norms = torch.cat([group.norms() for group in self.groups])
        norm = (torch.linalg.vector_norm(self.norms) / divisor).float()
        skipped = norm.isfinite().logical_not()
        if bad is not None:
            skipped = skipped | (bad != 0)
        skipped = skipped.float()
        scale = self._scale(norm, divisor)
        for name, (optimizer, _) in self.by_name.items():
            # The fused kernels read these attributes, as GradScaler sets them.
            keep = torch.ones_like(skipped) if name in self._frozen else skipped
            vars(optimizer).update(grad_scale=scale, found_inf=keep)
            optimizer.step()
        return norm, skipped

    def _scale(self, norm: Tensor, divisor: Tensor | float) -> Tensor | None:
        """The divisor with clipping; None for 1, so that gradients are not written back."""
        if self._clip:  # as torch.nn.utils.clip_grad_norm_
            return (((norm + 1e-6) / self._clip).clamp(min=1.0) * divisor).float()
        if isinstance(divisor, Tensor):
            return divisor.float()
        return None if divisor == 1 else torch.full_like(norm, divisor)

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """The optimizer state of every parameter, by its name in the model, for any step options.
        Moments have the parameter's shape and are contiguous; they may share memory with tensors
        that the next step changes.
        """
        return {
            name: {key: value.contiguous() for key, value in state.items()}
            for name, (_, state) in self._states().items()
        }

    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Load a ``state_dict`` in place; a ``ValueError`` names the first difference if it has
        other parameters, another optimizer or another shape.
        """
        own = self._states()
        if missing := [name for name in own if name not in state]:
            raise ValueError(f"no state for {len(missing)} parameters, e.g. {missing[0]}")
        if extra := [name for name in state if name not in own]:
            raise ValueError(f"{len(extra)} states are of other parameters, e.g. {extra[0]}")
        steps: dict[int, float] = {}
        for name, (optimizer, current) in own.items():
            loaded = state[name]
            if current.keys() != loaded.keys():
                have, want = (", ".join(each) or "empty" for each in (loaded, current))
                raise ValueError(f"the state of {name} is {have}; {optimizer} has {want}")
            for key, value in current.items():
                if (shape := list(loaded[key].shape)) != list(value.shape):
                    raise ValueError(f"{key} of {name} is {shape}, here it is {list(value.shape)}")
            step = float(loaded.get("step", 0))
            if steps.setdefault(id(current.get("step")), step) != step:
                problem = f"parameters have different step counts ({name}: {step:g})"
                raise ValueError(f"{problem}; flat=True requires equal ones; use flat=False")
        for name, (_, current) in own.items():
            for key, value in current.items():
                value.copy_(state[name][key])

    def _states(self) -> dict[str, tuple[str, dict[str, Tensor]]]:
        """For every parameter the name of its optimizer and its state, to be changed in place."""
        states: dict[str, tuple[str, dict[str, Tensor]]] = {}
        for title, (optimizer, groups) in self.by_name.items():
            for group in groups:
                each = [optimizer.state[tensor] for tensor in group.tensors]
                columns = {key: group.split([state[key] for state in each]) for key in each[0]}
                for index, name in enumerate(group.names):
                    state = {key: column[index] for key, column in columns.items()}
                    states[name] = title, state
        return states


Named = list[tuple[str, nn.Parameter]]
_Settings = list[tuple[Named, dict[str, Any]]]
"""Groups of parameters, each with the options that differ from its optimizer's."""


def _settings(config: TrainConfig, model: BranchedModel) -> dict[str, _Settings]:
    """The groups of parameters by optimizer: the run's, and Adam if a method trains with it."""
    names = {each: name for name, each in model.named_parameters() if each.requires_grad}
    known = parameter_settings(config, model)
    run: _Settings = []
    adam: _Settings = []
    for group in model.companion.parameter_groups() if model.companion is not None else []:
        parameters = [(names.pop(each), each) for each in group.parameters if each.requires_grad]
        if not parameters:
            continue
        if group.optimizer == "adam":
            adam.append((parameters, {"lr": group.lr}))
        else:
            for decays in (True, False):
                some = [pair for pair in parameters if known[pair[1]].decays is decays]
                decay = group.weight_decay if decays else 0.0
                if some:
                    run.append((some, {} if decay is None else {"weight_decay": decay}))
    # With flat=True the parameters of a group share a step count, and new branches start at 0.
    late = config.teach_epoch() and config.optimizer != "sgd"
    student = ("trunk.", f"branches.{model.kept}.")
    groups: dict[tuple[bool, Settings], Named] = {}
    for each, name in names.items():
        is_student = bool(late) and name.startswith(student)
        groups.setdefault((is_student, known[each]), []).append((name, each))
    settings = {"adam": adam}
    for (_, own), parameters in groups.items():
        title = f"{config.optimizer} of {own.part}" if own.part else config.optimizer
        changes: dict[str, Any] = {} if own.decays else {"weight_decay": 0.0}
        if own.lr_factor != 1:
            changes["lr_factor"] = own.lr_factor
        settings.setdefault(title, []).append((parameters, changes))
    settings.setdefault(config.optimizer, []).extend(run)
    return {name: settings[name] for name in sorted(settings, key="adam".__eq__) if settings[name]}


def _build(name: str, config: TrainConfig, groups: list[dict[str, Any]], lr: Tensor) -> Optimizer:
    """An optimizer with its state, which PyTorch would create in the first step: too late for one
    that is captured, or skipped (the next would read uninitialized memory).
    """
    common: dict[str, Any] = {"lr": lr, "weight_decay": config.weight_decay, "fused": True}
    optimizer: Optimizer
    moments: tuple[str, ...] = ("exp_avg", "exp_avg_sq")
    if name == "sgd":
        optimizer = SGD(groups, momentum=config.momentum, nesterov=config.nesterov, **common)
        moments = ("momentum_buffer",) if config.momentum else ()
    elif name == "adamw":
        betas = (config.betas[0], config.betas[1])
        optimizer = AdamW(groups, betas=betas, capturable=lr.is_cuda, **common)
    elif name == "adam":
        optimizer = Adam(groups, fused=True, capturable=lr.is_cuda)
    else:
        raise ConfigError(f"unknown optimizer '{name}'; use sgd or adamw")
    for tensor in (tensor for group in groups for tensor in group["params"]):
        if name != "sgd":
            step = torch.zeros((), dtype=torch.float32, device=tensor.device)
            optimizer.state[tensor]["step"] = step
        for key in moments:
            optimizer.state[tensor][key] = torch.zeros_like(tensor, requires_grad=False)
    return optimizer


class ParameterTensors:
    """Parameters that are trained alike, updated in place."""

    def __init__(self, named: Named) -> None:
        self.names = [name for name, _ in named]
        self.parameters = [parameter for _, parameter in named]
        self.sources = self.parameters
        """The leaf tensors that a backward pass gives gradients to."""
        self.tensors: list[Tensor] = list(self.parameters)
        """The tensors that the optimizer updates."""
        self.parts: list[tuple[str, ...]] = [(name,) for name in self.names]
        """The parameters in each part that ``norms`` measures."""

    def split(self, tensors: list[Tensor]) -> list[Tensor]:
        """From one tensor for each of ``tensors`` to one for each parameter, sharing its memory."""
        return tensors

    def zero_grad(self) -> None:
        """Drop the gradients."""
        for source in self.sources:
            source.grad = None

    def accumulate(self) -> None:
        """As ``Optimizers.accumulate``; autograd does it for parameters."""

    def collect(self) -> None:
        """Put a gradient at each of ``tensors``."""
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def norms(self) -> Tensor:
        """Norms [n] of the parts of the gradient."""
        return torch.stack(list(torch._foreach_norm([_gradient(each) for each in self.tensors])))


def _gradient(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad


_ALIGNED = 8  # elements: of two bytes they fill the 16 bytes that kernels load at once
_ROW = 1024  # norms are taken over rows first: a CPU's sum of millions of elements loses digits


class FlatParameters(ParameterTensors):
    """Parameters that are views of one tensor, each in its memory format, with zeros between them.

    Autograd makes the gradients separately, and they are gathered when complete. If they were views
    from the start, autograd would add each to zeros with one small kernel per parameter.
    """

    def __init__(self, named: Named) -> None:
        super().__init__(named)
        self._views_of: list[tuple[torch.Size, tuple[int, ...], int]] = []
        total = 0
        for parameter in self.parameters:
            self._views_of.append((parameter.shape, torch.empty_like(parameter).stride(), total))
            total += -(-parameter.numel() // _ALIGNED) * _ALIGNED
        starts = [start for _, _, start in self._views_of]
        flat = torch.zeros(-(-total // _ROW) * _ROW, device=self.parameters[0].device)
        self.parts = []
        for begin in range(0, len(flat), _ROW):
            first = bisect.bisect_right(starts, begin) - 1
            end = bisect.bisect_left(starts, begin + _ROW)
            self.parts.append(tuple(self.names[first:end]))
        self._views = self._cut(flat)
        for parameter, view in zip(self.parameters, self._views, strict=True):
            view.copy_(parameter.detach())
            parameter.data = view
        self._flat = nn.Parameter(flat)
        self._flat.grad = torch.zeros_like(flat)
        self.tensors = [self._flat]
        self._gradients = self._cut(self._flat.grad)
        self._flat_copy: Tensor | None = None
        self._accumulated = False

    def _cut(self, flat: Tensor) -> list[Tensor]:
        return [flat.as_strided(*view) for view in self._views_of]

    def split(self, tensors: list[Tensor]) -> list[Tensor]:
        (tensor,) = tensors  # of the flat tensor's size, or a count of steps
        return self._cut(tensor.detach()) if tensor.dim() else [tensor] * len(self._views_of)

    def make_copies(
        self, chosen: Set[nn.Parameter], dtype: torch.dtype
    ) -> dict[nn.Parameter, nn.Parameter]:
        """Copies of some of the parameters in another dtype, for the forward pass, which
        ``update_copies`` casts in one operation. Their gradients count as the parameters'.
        """
        if chosen.isdisjoint(self.parameters):
            return {}
        self._flat_copy = torch.zeros_like(self._flat, dtype=dtype, requires_grad=False)
        views = zip(self.parameters, self._cut(self._flat_copy), strict=True)
        copies = {parameter: nn.Parameter(view) for parameter, view in views if parameter in chosen}
        self.sources = [copies.get(parameter, parameter) for parameter in self.parameters]
        return copies

    @torch.no_grad()
    def update_copies(self) -> None:
        """Cast the parameters into their copies."""
        if self._flat_copy is not None:
            self._flat_copy.copy_(self._flat)

    def zero_grad(self) -> None:
        super().zero_grad()
        self._accumulated = False

    def accumulate(self) -> None:
        if self._flat_copy is None:
            return
        self.collect()
        self.zero_grad()
        self._accumulated = True

    def collect(self) -> None:
        if self.parameters[0].data_ptr() != self._views[0].data_ptr():
            raise RuntimeError(
                "the weights were moved after the Optimizers were made; move the model before"
            )
        total = _gradient(self._flat)
        before = total.clone() if self._accumulated else None
        by_dtype: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
        for view, source in zip(self._gradients, self.sources, strict=True):
            gradient = torch.zeros_like(source) if source.grad is None else source.grad
            into, gradients = by_dtype.setdefault(gradient.dtype, ([], []))
            into.append(view)
            gradients.append(gradient)
        # Copying a list of mixed dtypes takes a kernel for every tensor.
        for into, gradients in by_dtype.values():
            torch._foreach_copy_(into, gradients)
        if before is not None:
            total.add_(before)

    def norms(self) -> Tensor:
        return torch.linalg.vector_norm(_gradient(self._flat).view(-1, _ROW), dim=1)


def with_index(device: torch.device) -> torch.device:
    """The device with its index; "cuda" is the current GPU."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _check_parameters(model: nn.Module, device: torch.device, flat: bool) -> None:
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.dtype != torch.float32:
            raise ConfigError(
                f"parameter {name} is {parameter.dtype}; weights are trained in float32"
            )
        if parameter.device != with_index(device):
            places = f"on {parameter.device} and the run on {device}"
            raise ConfigError(f"parameter {name} is {places}; move the model before")
    if flat and (names := tied_parameters(model)):
        raise ConfigError(
            f"parameters {names[0]} and {names[1]} are tied by shared storage, which flat=True"
            " would break; use flat=False"
        )


def tied_parameters(model: nn.Module) -> tuple[str, str] | None:
    """The names of two different parameters that share memory, or None."""
    extents = []
    for name, parameter in model.named_parameters():
        if parameter.numel() and (start := parameter.data_ptr()):  # fake tensors have no address
            sizes = zip(parameter.shape, parameter.stride(), strict=True)
            elements = 1 + sum((size - 1) * stride for size, stride in sizes)
            extents.append((start, start + elements * parameter.element_size(), name))
    for (_, end, first), (start, _, second) in itertools.pairwise(sorted(extents)):
        if start < end:
            return first, second
    return None
