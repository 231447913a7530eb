"""Updates between a backward and a forward pass: the published updates, clipped, left out
where something is not finite, in every layout.
"""

import copy
import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastokd.errors import ConfigError
from fastokd.export import write_student
from fastokd.models import BranchedModel, create_student
from fastokd.train.build import build_model
from fastokd.train.config import TrainConfig
from fastokd.train.optimizers import Optimizers

CPU = torch.device("cpu")
OPTIMIZERS = ("sgd", "adamw")
# FFSD trains its fusion head with a weight decay of its own, and its decoders with Adam.
CONFIG = TrainConfig(
    data="digits",
    model="resnet8",
    method="ffsd",
    branches=3,
    lr=0.05,
    weight_decay=0.02,
    betas=(0.8, 0.97),
)
NETWORKS = ("resnet20", "densenet40_12", "mobilenetv2_x0_5", "shufflenetv2_x1_0", "wrn16_2")


def config_of(optimizer: str = "sgd", **changes: Any) -> TrainConfig:
    return TrainConfig(**{**CONFIG.__dict__, "optimizer": optimizer, **changes})


def build(
    config: TrainConfig, flat: bool, device: torch.device = CPU
) -> tuple[BranchedModel, Optimizers]:
    model = build_model(config, 10, device)
    return model, Optimizers(config, model, device, flat=flat)


def gradient(name: str, parameter: Tensor, step: int) -> Tensor:
    """A gradient for a step: the same values for any memory format."""
    generator = torch.Generator().manual_seed(hash((len(name), parameter.numel(), step)) % 2**31)
    return torch.empty_like(parameter).copy_(torch.randn(parameter.shape, generator=generator))


def give(model: nn.Module, step: int, factor: float = 1.0) -> None:
    for name, parameter in model.named_parameters():
        parameter.grad = gradient(name, parameter, step) * factor


def train(model: nn.Module, optimizers: Optimizers, steps: Iterator[int] | range) -> None:
    for step in steps:
        optimizers.zero_grad()
        optimizers.set_lr(0.05 / (1 + step))
        give(model, step)
        optimizers.step()


def snapshot(model: nn.Module, optimizers: Optimizers) -> dict[str, Tensor]:
    moments = {
        f"{name}/{key}": value
        for name, state in optimizers.state_dict().items()
        for key, value in state.items()
    }
    return copy.deepcopy({**model.state_dict(), **moments})


def assert_same(mine: dict[str, Tensor], theirs: dict[str, Tensor], **tolerance: float) -> None:
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        torch.testing.assert_close(
            value,
            theirs[name],
            msg=lambda text, name=name: f"{name}: {text}",
            **(tolerance or {"rtol": 0, "atol": 0}),
        )


class Oracle:
    """The updates as the papers and PyTorch's documentation write them, in NumPy and float64."""

    def __init__(self, config: TrainConfig, weight: Tensor, rule: str, weight_decay: float) -> None:
        self.config, self.rule, self.decay = config, rule, weight_decay
        self.x = weight.detach().double().numpy().copy()
        self.m, self.v, self.t = np.zeros_like(self.x), np.zeros_like(self.x), 0

    def step(self, grad: Tensor, lr: float) -> None:
        g = grad.double().numpy()
        self.t += 1
        if self.rule == "sgd":  # Sutskever et al. 2013 in PyTorch's form
            g = g + self.decay * self.x
            self.m = self.config.momentum * self.m + g
            self.x = self.x - lr * (
                g + self.config.momentum * self.m if self.config.nesterov else self.m
            )
            return
        b1, b2 = (0.9, 0.999) if self.rule == "adam" else self.config.betas
        self.m, self.v = b1 * self.m + (1 - b1) * g, b2 * self.v + (1 - b2) * g * g
        first, second = self.m / (1 - b1**self.t), self.v / (1 - b2**self.t)
        if self.rule == "adam":  # Kingma and Ba 2015, Algorithm 1
            self.x = self.x - lr * first / (np.sqrt(second) + 1e-8)
        else:  # adamw: Loshchilov and Hutter 2019, Algorithm 2
            self.x = self.x - lr * (first / (np.sqrt(second) + 1e-8) + self.decay * self.x)


@pytest.mark.parametrize("flat", [False, True], ids=["list", "flat"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"momentum": 0.0, "nesterov": False},
        {"nesterov": False, "weight_decay": 0.0},
        {"optimizer": "adamw"},
    ],
    ids=str,
)
def test_five_steps_equal_the_published_updates(changes: dict[str, Any], flat: bool) -> None:
    config = config_of(**changes)
    model, optimizers = build(config, flat)
    oracles = {}
    for name, parameter in model.named_parameters():
        kind, _, rest = name.partition(".")
        apart = rest.split(".")[0] if kind == "companion" else ""
        rule, decay = {"decoders": ("adam", 0.0), "fusion": (config.optimizer, 1e-5)}.get(
            apart, (config.optimizer, config.weight_decay)
        )
        oracles[name] = (
            Oracle(config, parameter, rule, decay),
            config.model_options()["decoder_lr"] if rule == "adam" else None,
        )
    assert {oracle.rule for oracle, _ in oracles.values()} == {config.optimizer, "adam"}
    for step, lr in enumerate((0.05, 0.05, 0.02, 0.1, 0.01)):
        optimizers.zero_grad()
        optimizers.set_lr(torch.tensor(lr) if step % 2 else lr)
        give(model, step, factor=3.0)
        norm, skipped = optimizers.step(3.0)
        assert not skipped
        grads = {
            name: gradient(name, parameter, step) for name, parameter in model.named_parameters()
        }
        assert float(norm) == pytest.approx(
            sum(float((grad.double() ** 2).sum()) for grad in grads.values()) ** 0.5, rel=1e-5
        )
        for name, (oracle, constant) in oracles.items():
            oracle.step(grads[name], constant or lr)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            parameter.detach().double(),
            torch.from_numpy(oracles[name][0].x),
            rtol=2e-5,
            atol=2e-6,
            msg=lambda text, name=name: f"{name}: {text}",
        )


@pytest.mark.parametrize("flat", [False, True], ids=["list", "flat"])
@pytest.mark.parametrize("limit", [2.0, 1e6])
def test_clipping_equals_pytorch(limit: float, flat: bool) -> None:
    model, optimizers = build(
        config_of(
            momentum=0.0,
            nesterov=False,
            weight_decay=0.0,
            clip_grad=limit,
            method="baseline",
            branches=1,
        ),
        flat,
    )
    optimizers.set_lr(1.0)
    before = copy.deepcopy(model)
    give(model, 0, factor=8.0)
    norm, _ = optimizers.step(torch.tensor(8.0))
    give(before, 0)
    expected = nn.utils.clip_grad_norm_(before.parameters(), limit)
    assert (expected > limit) == (limit == 2.0)
    torch.testing.assert_close(norm, expected)
    for old, new in zip(before.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(old.detach() - old.grad, new.detach(), rtol=1e-5, atol=1e-6)


def test_divisor_divides_gradients() -> None:
    for divisor in (4.0, 4, torch.tensor(4.0), torch.tensor(4.0, dtype=torch.float64)):
        ends = []
        for given, factor in ((divisor, 4.0), (1.0, 1.0)):
            model, optimizers = build(config_of(), False)
            give(model, 0, factor)
            norm, _ = optimizers.step(given)
            ends.append({**snapshot(model, optimizers), "norm": norm})
        assert_same(*ends, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("flat", [False, True], ids=["list", "flat"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("where", ["rest", "adam", "told"])
def test_nonfinite_step_changes_nothing(where: str, optimizer: str, flat: bool) -> None:
    config = config_of(optimizer, clip_grad=1.0)
    ends = []
    for broken in (True, False):
        model, optimizers = build(config, flat)
        for step in range(3):
            if broken and step != 1:  # the first step of all, and one after others
                before = snapshot(model, optimizers)
                optimizers.zero_grad()
                give(model, 9)
                if where != "told":
                    chosen = (
                        model.branches[1].trunk.conv1.weight
                        if where == "rest"
                        else next(model.companion.decoders.parameters())
                    )
                    chosen.grad[(0,) * chosen.dim()] = float("inf") if step else float("nan")
                _, skipped = optimizers.step(
                    2.0, torch.tensor(1.0) if where == "told" else torch.tensor(0.0)
                )
                assert skipped == 1
                assert_same(snapshot(model, optimizers), before)
            train(model, optimizers, range(step, step + 1))
        ends.append(snapshot(model, optimizers))
    assert_same(*ends)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("network", NETWORKS)
def test_flat_update_equals_list(network: str, optimizer: str) -> None:
    config = config_of(optimizer, model=network, method="baseline", branches=1, weight_decay=0.1)
    models = []
    for flat in (False, True):
        model, optimizers = build(config, flat)
        train(model, optimizers, range(3))
        models.append(model)
    for (name, mine), theirs in zip(
        models[0].named_parameters(), models[1].parameters(), strict=True
    ):
        assert theirs.stride() == mine.stride(), name
        assert theirs.data_ptr() % 16 == 0, name
        torch.testing.assert_close(theirs, mine, rtol=1e-5, atol=1e-6)
        whole = mine.numel() - mine.numel() % 64  # the rest does not fill a vector
        assert torch.equal(
            *(
                tensor.detach().as_strided((whole,), (1,), tensor.storage_offset())
                for tensor in (mine, theirs)
            )
        ), name


@pytest.mark.parametrize("channels_last", [False, True])
def test_flat_training_equals_list(channels_last: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    images, target = torch.randn(8, 3, 32, 32, generator=generator), torch.arange(8)
    ends = []
    for flat in (False, True):
        model, optimizers = build(
            config_of(method="baseline", branches=1, channels_last=channels_last, clip_grad=1.0),
            flat,
        )
        for _ in range(4):
            optimizers.zero_grad()
            for half in (slice(4), slice(4, 8)):  # gradients are added up
                F.cross_entropy(model(images[half]).logits[0], target[half]).backward()
            _, skipped = optimizers.step(2)
            assert not skipped
        ends.append(snapshot(model, optimizers))
    assert_same(*ends, rtol=1e-3, atol=1e-4)
    start = build_model(config_of(method="baseline", branches=1), 10, CPU).state_dict()
    assert (start["trunk.conv1.weight"] - ends[1]["trunk.conv1.weight"]).abs().max() > 0.01


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_state_loads_with_other_step_options(optimizer: str) -> None:
    layouts = [(flat, channels_last) for flat in (False, True) for channels_last in (False, True)]
    straight = build(config_of(optimizer), False)
    train(*straight, range(4))
    for number, (flat, channels_last) in enumerate(layouts):
        model, optimizers = build(config_of(optimizer, channels_last=channels_last), flat)
        train(model, optimizers, range(2))
        state = optimizers.state_dict()
        shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        assert state.keys() == shapes.keys()
        for name, each in state.items():
            assert all(
                value.is_contiguous() and value.shape == (() if key == "step" else shapes[name])
                for key, value in each.items()
            )
        file = io.BytesIO()
        torch.save((model.state_dict(), state), file)
        weights, state = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
        other_flat, other_channels_last = layouts[number - 2]
        other, optimizers = build(
            config_of(optimizer, channels_last=other_channels_last, seed=5), other_flat
        )
        other.load_state_dict(weights)
        optimizers.load_state_dict(state)
        train(other, optimizers, range(2, 4))
        assert_same(snapshot(other, optimizers), snapshot(*straight), rtol=1e-5, atol=1e-6)


def test_state_of_another_run_is_refused() -> None:
    _, optimizers = build(config_of("adamw"), True)
    state = optimizers.state_dict()
    name = "branches.0.trunk.conv1.weight"
    for changed, message in [
        (
            {key: value for key, value in state.items() if key != name},
            f"no state for 1 parameters, e.g. {name}",
        ),
        ({**state, "other.weight": {}}, "1 states are of other parameters, e.g. other.weight"),
        (
            {**state, name: {"momentum_buffer": torch.zeros(3)}},
            f"state of {name} is momentum_buffer; adamw has step, exp_avg, exp_avg_sq",
        ),
        ({**state, name: {}}, f"state of {name} is empty; adamw has step"),
        (
            {**state, name: {**state[name], "exp_avg": torch.zeros(3)}},
            rf"exp_avg of {name} is \[3\], here it is \[16, 3, 3, 3\]",
        ),
        (
            {**state, name: {**state[name], "step": torch.tensor(7.0)}},
            "parameters have different step counts .*flat=True requires equal ones",
        ),
    ]:
        before = copy.deepcopy(optimizers.state_dict())
        with pytest.raises(ValueError, match=message):
            optimizers.load_state_dict(changed)
        assert all(
            torch.equal(value, before[key][part])
            for key, each in optimizers.state_dict().items()
            for part, value in each.items()
        )


def test_flat_model_is_copied_loaded_and_exported(tmp_path: Any) -> None:
    model, optimizers = build(config_of("sgd"), True)
    names, parameters = list(model.state_dict()), list(model.parameters())
    train(model, optimizers, range(1))
    assert list(model.state_dict()) == names
    assert all(mine is theirs for mine, theirs in zip(model.parameters(), parameters, strict=True))
    student, twin = model.student(), copy.deepcopy(model)
    kept = copy.deepcopy(student.state_dict())
    write_student(tmp_path / "student.safetensors", student, {})
    train(model, optimizers, range(1, 2))
    assert_same(student.state_dict(), kept)  # a copy of its own, not a view
    assert_same(load_file(tmp_path / "student.safetensors"), kept)
    create_student("resnet8").load_state_dict(kept)
    model.load_state_dict(twin.state_dict())
    give(model, 1)
    give(twin, 1)
    optimizers.set_lr(1.0)
    optimizers.load_state_dict(
        {
            name: {key: torch.zeros_like(value) for key, value in state.items()}
            for name, state in optimizers.state_dict().items()
        }
    )
    optimizers.step()
    for name, parameter in model.named_parameters():
        if not name.startswith("companion"):
            old = dict(twin.named_parameters())[name]
            torch.testing.assert_close(
                parameter.detach(),
                old.detach() - 1.9 * (old.grad + 0.02 * old.detach()),
                rtol=1e-5,
                atol=1e-5,
            )


def test_unused_parameter_has_zero_gradient() -> None:
    ends = []
    for flat in (False, True):
        model, optimizers = build(
            config_of(method="baseline", branches=1, momentum=0.0, nesterov=False), flat
        )
        optimizers.set_lr(0.5)
        weight = model.trunk.conv1.weight
        before = weight.detach().clone()
        give(model, 0)
        optimizers.step()
        moved = weight.detach().clone()
        assert not torch.equal(moved, before)
        optimizers.zero_grad()  # and what was gathered before is forgotten
        assert all(parameter.grad is None for parameter in model.parameters())
        optimizers.step()
        torch.testing.assert_close(weight.detach(), moved * (1 - 0.5 * 0.02))
        ends.append(snapshot(model, optimizers))
    assert_same(*ends, rtol=1e-6, atol=1e-7)


def test_untrainable_parameters_are_refused() -> None:
    config = config_of(method="baseline", branches=1)
    model = build_model(config, 10, CPU)
    model.trunk.conv1.double()
    with pytest.raises(
        ConfigError,
        match=r"parameter trunk.conv1.weight is torch.float64; weights are trained in float32",
    ):
        Optimizers(config, model, CPU, flat=False)
    with pytest.raises(
        ConfigError,
        match=r"trunk.conv1.weight is on cpu and the run on meta; move the model before",
    ):
        Optimizers(config, build_model(config, 10, CPU), torch.device("meta"), flat=False)
    model = build_model(config, 10, CPU)
    model.trunk.extra = nn.Conv2d(3, 16, 3, bias=False)
    model.trunk.extra.weight.data = model.trunk.conv1.weight.data
    with pytest.raises(
        ConfigError,
        match=r"trunk.conv1.weight and trunk.extra.weight are tied by shared storage, which flat",
    ):
        Optimizers(config, model, CPU, flat=True)
    model.trunk.extra.weight = model.trunk.conv1.weight  # one parameter, as PyTorch ties them
    give(model, 0)
    Optimizers(config, model, CPU, flat=True).step()
    Optimizers(config, model, CPU, flat=True).step()  # flat ones do not overlap
    assert model.trunk.extra.weight is model.trunk.conv1.weight
    model, optimizers = build(config, True)
    model.to(memory_format=torch.contiguous_format)
    give(model, 0)
    with pytest.raises(RuntimeError, match="the weights were moved after the Optimizers were made"):
        optimizers.step()


def test_frozen_parameters_do_not_change() -> None:
    model = build_model(CONFIG, 10, CPU)
    model.branches[0].trunk.conv1.weight.requires_grad_(False)
    for parameter in model.companion.decoders.parameters():
        parameter.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    optimizers = Optimizers(CONFIG, model, CPU, flat=True)
    give(model, 0)
    optimizers.step()
    changed = {
        name for name, value in model.state_dict().items() if not torch.equal(value, before[name])
    }
    assert changed == optimizers.state_dict().keys()
    assert "branches.0.trunk.conv1.weight" not in changed
    assert not any("decoders" in name for name in changed)


class _Reads(TorchDispatchMode):
    """Counts values that are read on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("flat", [False, True], ids=["list", "flat"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_step_has_no_host_reads(optimizer: str, flat: bool) -> None:
    model, optimizers = build(config_of(optimizer, clip_grad=1.0), flat)
    address = optimizers.lr.data_ptr()
    give(model, 0)
    with _Reads() as reads:
        optimizers.set_lr(torch.tensor(0.1))
        optimizers.set_lr(0.2)
        optimizers.step(torch.tensor(2.0), torch.tensor(0.0))
        optimizers.zero_grad()
        assert reads.count == 0
        bool(optimizers.lr > 0)
        assert reads.count == 1
    assert optimizers.lr.data_ptr() == address


@pytest.mark.gpu
@pytest.mark.parametrize("flat", [False, True], ids=["list", "flat"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_captured_step_equals_eager_bits(optimizer: str, flat: bool) -> None:
    device = torch.device("cuda")
    config = config_of(optimizer, clip_grad=1.0)
    ends, inputs = [], [(0.05, 4.0, 0.0), (0.1, 2.0, 0.0), (0.1, 2.0, 1.0), (0.2, 1.0, 0.0)]
    for captured in (False, True):
        model, optimizers = build(config, flat, device)
        give(model, 0)
        divisor, bad = torch.ones((), device=device), torch.ones((), device=device)
        optimizers.step(divisor, bad)  # left out: compiles and allocates
        grads = {name: parameter.grad for name, parameter in model.named_parameters()}
        graph = torch.cuda.CUDAGraph()
        if captured:
            with torch.cuda.graph(graph):
                outputs = optimizers.step(divisor, bad)
        results = []
        for step, (lr, scale, broken) in enumerate(inputs):
            fresh = {
                name: gradient(name, parameter.cpu(), step).to(device)
                for name, parameter in model.named_parameters()
            }
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            try:
                optimizers.set_lr(lr)
                divisor.fill_(scale)
                bad.fill_(broken)
                for name, grad in grads.items():
                    grad.copy_(fresh[name])
                if captured:
                    graph.replay()
                else:
                    outputs = optimizers.step(divisor, bad)
                results.append(torch.stack(outputs))
            finally:
                torch.cuda.set_sync_debug_mode("default")
        ends.append({**snapshot(model, optimizers), "results": torch.stack(results)})
    assert ends[0]["results"][:, 1].tolist() == [0, 0, 1, 0]
    assert_same(*ends)


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_flat_is_bit_identical_on_gpu(optimizer: str) -> None:
    ends = []
    for flat in (False, True):
        model, optimizers = build(config_of(optimizer), flat, torch.device("cuda"))
        train(model, optimizers, range(3))
        ends.append(snapshot(model, optimizers))
    assert_same(*ends)
