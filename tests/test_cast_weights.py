"""Weights that are cast once per step: the same bits as autocast's casts in every layer."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_step import CPU, batches, step_of, train, weights
from torch import Tensor, nn

from fastokd.errors import ConfigError
from fastokd.train.build import build_model
from fastokd.train.cast_weights import cast_parameters
from fastokd.train.config import TrainConfig
from fastokd.train.step import TrainStep

BF16 = {"precision": "bf16", "flat": True}
PEERS = {"aux_blocks": 0}
IMAGES = torch.zeros(4, 3, 8, 8)


def state(step: TrainStep) -> dict[str, Any]:
    """Copies of all weights and moments, and the metrics."""
    moments = {
        f"{name}.{key}": value.clone()
        for name, each in step.optimizers.state_dict().items()
        for key, value in each.items()
    }
    average = {} if step.average is None else step.average.state_dict()["weights"]
    return {**weights(step), **moments, **average, **step.sums.means()}


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    assert one.keys() == other.keys()
    return [
        name
        for name, value in one.items()
        if not torch.equal(torch.as_tensor(value), torch.as_tensor(other[name]))
    ]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"device_batch": 4},
        {"precision": "fp16"},
        {"optimizer": "adamw", "clip_grad": 1.0, "ema": 0.9},
        {"channels_last": False, "impl": "reference"},
        {"method": "ffm", **PEERS},
        {"method": "ffsd", "device_batch": 8, **PEERS},
        {"method": "afid", "branches": 2, **PEERS},
    ],
    ids=str,
)
def test_step_with_weights_cast_once_has_equal_bits(changes: dict[str, Any]) -> None:
    often, once = (
        train(step_of(**{**BF16, **changes}, cast_once=cast_once), batches(3), lr=0.01)
        for cast_once in (False, True)
    )
    assert once.options.cast_once
    assert not often.options.cast_once
    assert differences(state(once), state(often)) == []


def test_skipped_step_with_weights_cast_once_changes_nothing() -> None:
    good = batches(3)
    bad = good[0]._replace(images=torch.full_like(good[0].images, float("inf")))
    options = {**BF16, "cast_once": True, "on_nonfinite": "skip"}
    with_bad = train(step_of(**options), [good[0], bad, *good[1:]])
    assert with_bad.guard.read() is not None
    assert differences(weights(with_bad), weights(train(step_of(**options), good))) == []


def test_loaded_weights_are_used_in_the_next_step() -> None:
    """In a new step, as when a run is resumed, and in one with copies of other weights."""
    options, given = {**BF16, "cast_once": True}, batches(4)
    whole = train(step_of(**options), given[:2])
    kept = {
        name: {key: _copy(value) for key, value in each.items()} if isinstance(each, dict) else each
        for name, each in whole.state_dict().items()
    }
    used = train(step_of(**options), batches(2, seed=1))
    expected = weights(train(whole, given[2:]))
    for step in (step_of(**options), used):
        step.load_state_dict(kept, "the checkpoint")
        assert differences(weights(train(step, given[2:])), expected) == []


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copy(each) for key, each in value.items()}
    return value.clone() if isinstance(value, Tensor) else value


def test_weights_outside_of_a_step_are_float32() -> None:
    step = train(step_of(**BF16, cast_once=True), batches(1))
    assert {parameter.dtype for parameter in step.model.parameters()} == {torch.float32}
    assert {value.dtype for value in step.student().parameters()} == {torch.float32}


class Uses(nn.Module):
    """A branch whose weights are used in different ways."""

    def __init__(self) -> None:
        super().__init__()
        self.once, self.twice = nn.Linear(8, 8), nn.Linear(8, 8)
        self.also_without_gradient, self.standardized = nn.Linear(8, 8), nn.Linear(8, 8)
        self.in_float32, self.returned = nn.Linear(8, 8), nn.Linear(8, 8)
        self.norm, self.dropout = nn.BatchNorm1d(8), nn.Dropout()
        self.frozen, self.unused = nn.Linear(8, 8).requires_grad_(False), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.norm(self.dropout(self.frozen(self.once(x[:, 0, 0]))))
        x = self.twice(self.twice(x))
        with torch.no_grad():
            self.also_without_gradient(x)
        x = self.returned(self.also_without_gradient(x))
        weight = self.standardized.weight
        x = F.linear(x, weight - weight.mean(), self.standardized.bias)
        with torch.autocast("cpu", enabled=False):
            x = self.in_float32(x.float())
        return x, self.returned.weight


class Wrapped(nn.Module):
    """A model of one branch, without a loss."""

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch, self.run_branches = branch, None

    def forward(self, x: Tensor) -> Iterator[Tensor]:
        return self.branch(x)


def names_of(model: nn.Module, chosen: list[nn.Parameter]) -> set[str]:
    ids = {id(parameter) for parameter in chosen}
    return {name for name, parameter in model.named_parameters() if id(parameter) in ids}


def test_only_weights_that_are_cast_alone_are_chosen() -> None:
    model: Any = Wrapped(Uses())
    random, before = torch.get_rng_state(), {k: v.clone() for k, v in model.state_dict().items()}
    chosen = names_of(model, cast_parameters(model, IMAGES, "bf16"))
    both = [f"branch.{name}." for name in ("once", "frozen", "also_without_gradient")]
    expected = {each + kind for each in both for kind in ("weight", "bias")}
    assert chosen == expected | {"branch.standardized.bias", "branch.returned.bias"}
    assert torch.equal(random, torch.get_rng_state())
    assert differences(before, model.state_dict()) == []


def test_all_layers_of_a_network_are_chosen() -> None:
    config = TrainConfig(model="resnet8", method="ahbf", branches=2, aux_blocks=0)
    model = build_model(config, 10, CPU)
    layers = {
        f"{name}.{kind}"
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
        for kind, _ in module.named_parameters()
    }
    assert names_of(model, cast_parameters(model, IMAGES, "bf16")) == layers


class DependsOnValues(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) if bool(x.sum() > -1e9) else x


def test_network_that_depends_on_values_is_cast_in_every_layer() -> None:
    reason = "cast_once=True: the network does not run on fake tensors .*; omit it"
    step = step_of(**BF16, cast_once=True)
    step.model.trunk = DependsOnValues(step.model.trunk)
    before = weights(step)
    with pytest.raises(ConfigError, match=reason):
        train(step, batches(1))
    assert differences(weights(step), before) == []
    step.config = step_of(**BF16).config  # the option is open
    train(step, batches(2))
    assert not step.options.cast_once
    assert differences(weights(step), before)
