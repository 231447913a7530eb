"""LAMB (You et al. 2020, "Large Batch Optimization for Deep Learning", Algorithm 2), for batches
too large for SGD.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Adam, Optimizer


class LAMB(Optimizer):
    """Adam's direction, scaled by the ratio of two norms for every parameter: ``x -= lr * |x| / |u|
    * u``, ``u = r + weight_decay * x``.

    ``r`` is Adam's bias-corrected direction, ``|.|`` the 2-norm, and the ratio is 1 where one of
    the norms is 0. As torch's fused optimizers do, it reads the attributes ``grad_scale`` (what
    gradients are divided by) and ``found_inf`` (where it is 1, everything stays as it was), and it
    never waits for the device.

    Args:
        params: parameters, or groups of them, on one device. A group's ``split`` is for tensors
            that hold many parameters: it makes of tensors like the group's own those of the single
            parameters, all of them views, and each gets its ratio.
        lr: a number, or a 0-d tensor on the device that every update reads anew.
        betas, eps, weight_decay: beta_1 and beta_2, epsilon and lambda of the paper.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(
            params,
            {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "split": None},
        )
        # Where Adam is applied to zeros, with a learning rate of 1, it leaves -r: moments, division
        # and what is to be skipped are its fused kernel's.
        self._adam = Adam(
            [
                {
                    "params": [
                        torch.zeros_like(parameter, requires_grad=False)
                        for parameter in group["params"]
                    ],
                    "betas": group["betas"],
                    "eps": group["eps"],
                }
                for group in self.param_groups
            ],
            lr=1.0,
            fused=True,
            capturable=self.param_groups[0]["params"][0].is_cuda,
        )
        for group in self.param_groups:
            self.state.update((parameter, adam_state(parameter)) for parameter in group["params"])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient; returns what ``closure`` does."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found_inf = getattr(self, "found_inf", None)
        self._adam.grad_scale, self._adam.found_inf = getattr(self, "grad_scale", None), found_inf
        updates = []
        for group, inner in zip(self.param_groups, self._adam.param_groups, strict=True):
            pairs = list(zip(group["params"], inner["params"], strict=True))
            for parameter, direction in pairs:
                direction.grad, self._adam.state[direction] = parameter.grad, self.state[parameter]
            if given := [pair for pair in pairs if pair[0].grad is not None]:
                updates.append((group, *map(list, zip(*given, strict=True))))
        for _, _, directions in updates:
            torch._foreach_zero_(directions)
        self._adam.step()
        for group, parameters, directions in updates:
            if group["weight_decay"]:
                torch._foreach_sub_(
                    directions, torch._foreach_mul(parameters, group["weight_decay"])
                )
            split = group["split"] or list
            _move(split(parameters), split(directions), group["lr"], found_inf)
        return loss


def _move(
    parameters: Sequence[Tensor],
    directions: Sequence[Tensor],
    lr: float | Tensor,
    found_inf: Tensor | None,
) -> None:
    """Move each parameter along its direction -u."""
    sizes, lengths = (
        torch.stack(torch._foreach_norm(parameters)),
        torch.stack(torch._foreach_norm(directions)),
    )
    rates = lr * (sizes / lengths).masked_fill_((sizes == 0) | (lengths == 0), 1.0)
    if found_inf is not None:
        rates.masked_fill_(found_inf != 0, 0.0)
    # Each parameter has a factor that only the device knows: one small kernel each, as there is no
    # fused one for that.
    torch._foreach_addcmul_(parameters, directions, rates.unbind())


def adam_state(parameter: Tensor) -> dict[str, Tensor]:
    """What Adam and LAMB remember of a parameter, as it is before the first step."""
    return {
        "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
        **{
            name: torch.zeros_like(parameter, requires_grad=False)
            for name in ("exp_avg", "exp_avg_sq")
        },
    }
