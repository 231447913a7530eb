"""From gradients to new weights, without the host ever waiting for the device: division, clipping,
the guard against what is not finite, the update.
"""

import bisect
import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from fastokd.errors import ConfigError
from fastokd.models import BranchedModel
from fastokd.train.config import TrainConfig
from fastokd.train.lamb import LAMB, adam_state


class Optimizers:
    """All that happens between a backward pass and the next forward pass.

    The run's own optimizer has the parameters of the networks and of the method's modules; what a
    method trains with Adam has one of its own. They are PyTorch's fused kernels, which divide
    gradients and leave a step out where the device says so: clipping and skipping cost no pass over
    the gradients. A parameter that the loss does not reach has the gradient 0, so weight decay and
    momentum apply to it too.

    The model must stay where it is afterwards, on its device and in its memory format.

    Args:
        config: the run's optimizer, betas, momentum, weight decay and ``clip_grad``.
        model: its parameters must be float32.
        device: that of the model.
        flat: keep the parameters of a kind in one tensor, of which the model's are views, in their
            memory format; gradients are gathered into another one before they are used. An update
            is then one operation. It computes the same values to the last bit on a GPU. On a CPU
            the last few elements of a tensor, which do not fill a vector, may round otherwise; so
            does the norm of the gradients, which is summed in another order, wherever it clips.

    Raises:
        ConfigError: a parameter is not float32 or on another device, or, for ``flat``, two
            parameters share memory.
    """

    def __init__(
        self, config: TrainConfig, model: BranchedModel, device: torch.device, *, flat: bool
    ) -> None:
        _check_parameters(model, device, flat)
        self.lr = torch.tensor(config.lr_at(0.0), dtype=torch.float32, device=device)
        """The learning rate of the run's optimizer, 0-d on the device; every update reads it."""
        self._clip = config.clip_grad
        self._optimizers: dict[str, tuple[Optimizer, list[_Group]]] = {}
        for name, settings in _settings(config, model).items():
            groups = [(_Flat if flat else _Group)(each.parameters) for each in settings]
            self._optimizers[name] = (
                _build(
                    name,
                    config,
                    [
                        {
                            "params": group.tensors,
                            **({"split": group.split} if name == "lamb" else {}),
                            **each.options,
                        }
                        for group, each in zip(groups, settings, strict=True)
                    ],
                    self.lr,
                ),
                groups,
            )
        self._groups = [group for _, groups in self._optimizers.values() for group in groups]
        self.parts = tuple(part for group in self._groups for part in group.parts)
        """The parts of the gradient whose norms are taken: the names of the parameters in each."""
        self.norms = torch.zeros(len(self.parts), device=device)
        """The norms of these parts in the last step, as the backward pass left them."""

    def set_lr(self, lr: float | Tensor) -> None:
        """Set the learning rate of the run's optimizer; also between replays of a captured step."""
        self.lr.copy_(lr) if isinstance(lr, Tensor) else self.lr.fill_(lr)

    def zero_grad(self) -> None:
        """Forget all gradients, so that the next backward pass writes them instead of adding to
        zeros.
        """
        for group in self._groups:
            for parameter in group.parameters:
                parameter.grad = None

    @torch.no_grad()
    def step(
        self, divisor: Tensor | float = 1.0, bad: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Update all parameters, or none if something is not finite.

        Args:
            divisor: what the gradients are too large by: the number of passes they were added up
                over, times the scale of the loss.
            bad: 0-d, not 0 where the caller found something that is not finite. Processes must
                agree on it; their gradients are the same, so they do on the rest.

        Returns:
            The norm of the gradient of all parameters together, divided and not clipped, and 1.0
            where the step was left
            out, else 0.0: 0-d float32 tensors on the device. A norm above 1.8e19 before the
                division counts as not finite.
        """
        for group in self._groups:
            group.collect()
        self.norms = torch.cat([group.norms() for group in self._groups])
        norm = (torch.linalg.vector_norm(self.norms) / divisor).float()
        skipped = norm.isfinite().logical_not()
        if bad is not None:
            skipped = skipped | (bad != 0)
        skipped = skipped.float()
        scale = self._scale(norm, divisor)
        for optimizer, _ in self._optimizers.values():
            optimizer.grad_scale, optimizer.found_inf = scale, skipped  # type: ignore[attr-defined]
            optimizer.step()
        return norm, skipped

    def _scale(self, norm: Tensor, divisor: Tensor | float) -> Tensor | None:
        """What the gradients are to be divided by; None for nothing, which saves the kernels from
        writing them back.
        """
        if self._clip:
            return (
                ((norm + 1e-6) / self._clip).clamp(min=1.0) * divisor
            ).float()  # as torch.nn.utils.clip_grad_norm_
        if isinstance(divisor, Tensor):
            return divisor.float()
        return None if divisor == 1 else torch.full_like(norm, divisor)

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """What the optimizers remember of every parameter, by its name in the model, for a run with
        any levers.

        Moments have the parameter's shape and are contiguous; they may share memory with what the
        next step changes.
        """
        return {
            name: {key: value.contiguous() for key, value in state.items()}
            for name, (_, state) in self._states().items()
        }

    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Continue from a ``state_dict``, in place.

        Raises:
            ValueError: it is of other parameters, of another optimizer or of another shape; the
                message names the first.
        """
        own = self._states()
        if missing := [name for name in own if name not in state]:
            raise ValueError(
                f"the state of {len(missing)} parameters is missing, e.g. {missing[0]}"
            )
        if extra := [name for name in state if name not in own]:
            raise ValueError(
                f"{len(extra)} states are of parameters that this run does not train, e.g."
                f" {extra[0]}"
            )
        for name, (optimizer, mine) in own.items():
            theirs = state[name]
            if mine.keys() != theirs.keys():
                raise ValueError(
                    f"the state of {name} is {', '.join(theirs) or 'empty'}; {optimizer} has"
                    f" {', '.join(mine) or 'none'}"
                )
            for key, value in mine.items():
                if theirs[key].shape != value.shape:
                    raise ValueError(
                        f"{key} of {name} is {list(theirs[key].shape)}, here it is"
                        f" {list(value.shape)}"
                    )
        steps: dict[int, float] = {}
        for name, (_, mine) in own.items():
            if "step" in mine and steps.setdefault(
                id(mine["step"]), float(state[name]["step"])
            ) != float(state[name]["step"]):
                raise ValueError(
                    f"{name} has seen {float(state[name]['step']):g} steps and others have not,"
                    " which flat=True cannot hold; use flat=False"
                )
        for name, (_, mine) in own.items():
            for key, value in mine.items():
                value.copy_(state[name][key])

    def _states(self) -> dict[str, tuple[str, dict[str, Tensor]]]:
        """For every parameter the name of its optimizer and what that remembers of it, to be
        changed in place.
        """
        found: dict[str, tuple[str, dict[str, Tensor]]] = {}
        for title, (optimizer, groups) in self._optimizers.items():
            for group in groups:
                states = [optimizer.state[tensor] for tensor in group.tensors]
                columns = {key: group.split([state[key] for state in states]) for key in states[0]}
                found.update(
                    (name, (title, {key: column[place] for key, column in columns.items()}))
                    for place, name in enumerate(group.names)
                )
        return found


Named = list[tuple[str, nn.Parameter]]


class _Settings(NamedTuple):
    """Parameters that are trained alike, and the options of their optimizer that are theirs
    alone.
    """

    parameters: Named
    options: dict[str, Any]


def _settings(config: TrainConfig, model: BranchedModel) -> dict[str, list[_Settings]]:
    """How every parameter is trained, by optimizer: the run's, and Adam where a method trains
    something with it.
    """
    names = {
        parameter: name for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    own: list[_Settings] = []
    adam: list[_Settings] = []
    for group in model.companion.parameter_groups() if model.companion is not None else []:
        parameters = [
            (names.pop(parameter), parameter)
            for parameter in group.parameters
            if parameter.requires_grad
        ]
        if group.optimizer == "adam":
            adam.append(_Settings(parameters, {"lr": group.lr}))
        else:
            own.append(
                _Settings(
                    parameters,
                    {} if group.weight_decay is None else {"weight_decay": group.weight_decay},
                )
            )
    rest = _Settings([(name, parameter) for parameter, name in names.items()], {})
    found = {config.optimizer: [rest, *own], "adam": adam}
    filled = {
        name: [each for each in settings if each.parameters] for name, settings in found.items()
    }
    return {name: settings for name, settings in filled.items() if settings}


def _build(name: str, config: TrainConfig, groups: list[dict[str, Any]], lr: Tensor) -> Optimizer:
    """An optimizer with its state; PyTorch makes that in the first step, but a step may be captured
    or left out.

    SGD's first step does not read the momentum but writes it: where that one is left out, the next
    one would read memory that nobody wrote.
    """
    common: dict[str, Any] = {"lr": lr, "weight_decay": config.weight_decay}
    if name == "sgd":
        optimizer: Optimizer = SGD(
            groups, momentum=config.momentum, nesterov=config.nesterov, fused=True, **common
        )
        if config.momentum:
            optimizer.state.update(
                (tensor, {"momentum_buffer": torch.zeros_like(tensor, requires_grad=False)})
                for group in groups
                for tensor in group["params"]
            )
        return optimizer
    if name == "lamb":
        return LAMB(groups, betas=config.betas, **common)
    if name == "adamw":
        optimizer = AdamW(groups, betas=config.betas, fused=True, capturable=lr.is_cuda, **common)
    else:
        optimizer = Adam(groups, fused=True, capturable=lr.is_cuda)
    optimizer.state.update(
        (tensor, adam_state(tensor)) for group in groups for tensor in group["params"]
    )
    return optimizer


class _Group:
    """Parameters that are trained alike, updated where they are."""

    def __init__(self, named: Named) -> None:
        self.names = [name for name, _ in named]
        self.parameters = [parameter for _, parameter in named]
        self.tensors: list[Tensor] = list(self.parameters)
        """What the optimizer updates."""
        self.parts: list[tuple[str, ...]] = [(name,) for name in self.names]
        """The parameters in each of the parts that ``norms`` measures."""

    def split(self, tensors: list[Tensor]) -> list[Tensor]:
        """For one tensor for each of ``tensors``, one for each parameter, sharing its memory."""
        return tensors

    def collect(self) -> None:
        """Have a gradient at each of ``tensors``."""
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def norms(self) -> Tensor:
        """Norms [n] of the parts of the gradient."""
        return torch.stack(torch._foreach_norm([tensor.grad for tensor in self.tensors]))


_ALIGNED = 4
"""Elements of 16 bytes: where every view begins, as kernels load as much at once."""
_ROW = 1024
"""Elements of a row; norms are taken over rows first, because a CPU would lose three digits in the
sum of millions.
"""


class _Flat(_Group):
    """Parameters that are views of one tensor, each in its memory format; what is between and after
    them stays 0.

    Gradients are left to autograd and gathered when they are complete. As views of one tensor from
    the beginning, each would be added to zeros, which is one small kernel for every parameter;
    gathering is a few for all.
    """

    def __init__(self, named: Named) -> None:
        super().__init__(named)
        self._places: list[tuple[torch.Size, tuple[int, ...], int]] = []
        total = 0
        for parameter in self.parameters:
            self._places.append((parameter.shape, torch.empty_like(parameter).stride(), total))
            total += -(-parameter.numel() // _ALIGNED) * _ALIGNED
        flat = torch.zeros(-(-total // _ROW) * _ROW, device=self.parameters[0].device)
        starts = [start for _, _, start in self._places]
        self.parts = [
            tuple(
                self.names[
                    bisect.bisect_right(starts, begin) - 1 : bisect.bisect_left(
                        starts, begin + _ROW
                    )
                ]
            )
            for begin in range(0, len(flat), _ROW)
        ]
        self._views = self._cut(flat)
        for parameter, view in zip(self.parameters, self._views, strict=True):
            view.copy_(parameter.detach())
            parameter.data = view
        self.tensors = [nn.Parameter(flat)]
        self.tensors[0].grad = torch.zeros_like(flat)
        self._gradients = self._cut(self.tensors[0].grad)

    def _cut(self, flat: Tensor) -> list[Tensor]:
        return [flat.as_strided(*place) for place in self._places]

    def split(self, tensors: list[Tensor]) -> list[Tensor]:
        (tensor,) = tensors
        return (
            self._cut(tensor.detach()) if tensor.dim() else [tensor] * len(self._places)
        )  # or a count of steps

    def collect(self) -> None:
        if self.parameters[0].data_ptr() != self._views[0].data_ptr():
            raise RuntimeError(
                "the model's weights were moved after its Optimizers were made, and would not be"
                " trained; make new ones, or move it before"
            )
        super().collect()
        torch._foreach_copy_(self._gradients, [parameter.grad for parameter in self.parameters])

    def norms(self) -> Tensor:
        return torch.linalg.vector_norm(self.tensors[0].grad.view(-1, _ROW), dim=1)


def _check_parameters(model: nn.Module, device: torch.device, flat: bool) -> None:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            raise ConfigError(
                f"parameter {name} is {parameter.dtype}; weights are trained in float32,"
                " --precision is that of the forward pass"
            )
        if parameter.requires_grad and parameter.device != device:
            raise ConfigError(
                f"parameter {name} is on {parameter.device} and the run on {device}; move the model"
                " before"
            )
    if flat and (names := sharing(model)):
        raise ConfigError(
            f"parameters {names[0]} and {names[1]} share memory, which flat=True would end; give"
            " both modules one Parameter, or use flat=False"
        )


def sharing(model: nn.Module) -> tuple[str, str] | None:
    """Two parameters that share memory and are not one; None if there are none."""
    extents = sorted(
        (parameter.data_ptr(), parameter.data_ptr() + _extent(parameter), name)
        for name, parameter in model.named_parameters()
        if parameter.numel() and parameter.data_ptr()
    )  # fake tensors lie nowhere
    return next(
        (
            (first, second)
            for (_, end, first), (start, _, second) in itertools.pairwise(extents)
            if start < end
        ),
        None,
    )


def _extent(tensor: Tensor) -> int:
    """Bytes from the first element to the end of the last."""
    return tensor.element_size() * (
        1
        + sum(
            (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
        )
    )
