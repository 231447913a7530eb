"""The training step: equal results with every option, no host reads, non-finite values."""

import copy
import dataclasses
import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastokd.data import Batch, make_loader, open_dataset
from fastokd.errors import ConfigError
from fastokd.losses import checks
from fastokd.train.build import build_model
from fastokd.train.config import TrainConfig
from fastokd.train.guard import FiniteGuard
from fastokd.train.metrics import MetricSums
from fastokd.train.precision import LossScale
from fastokd.train.rules import check_config
from fastokd.train.runner import StepRunner
from fastokd.train.step import BranchEvaluator, TrainStep
from fastokd.train.step_options import choose_step_options

CPU = torch.device("cpu")
CONFIG = TrainConfig(
    data="digits", model="resnet8", method="ahbf", branches=3, aux_blocks=1, batch_size=16, lr=0.05
)


def step_of(smooth=False, **changes):
    config = dataclasses.replace(CONFIG, **changes)
    check_config(config)
    model = build_model(config, 10, CPU)
    for module in [*model.modules()] if smooth else ():
        for name, child in module.named_children():
            if isinstance(child, nn.ReLU):
                # Rounding may fall on either side of a kink, and after twenty steps all weights
                # show which.
                setattr(module, name, nn.Softplus(beta=3.0))
    return TrainStep(config, model, CPU)


def batches(count, size=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        Batch(
            torch.randn(size, 3, 8, 8, generator=generator),
            torch.randint(10, (size,), generator=generator),
            torch.arange(size),
        )
        for _ in range(count)
    ]


def train(step, given, kd_weight=0.7, lr=0.05):
    step.set_schedule(lr, kd_weight)
    for batch in given:
        step(batch)
    return step


def weights(step):
    return {name: value.detach().clone() for name, value in step.model.state_dict().items()}


def difference(one, other, start):
    """Distance between the parameters of two trainings, as a fraction of how far the second moved
    them.
    """
    one, other, start = (
        torch.cat(
            [
                value.flatten().double()
                for name, value in each.items()
                if value.is_floating_point() and "running" not in name
            ]
        )
        for each in (one, other, start)
    )
    return float((one - other).norm() / (other - start).norm())


OFF = {"impl": "reference", "channels_last": False, "flat": False, "compile": False}
SMOOTH = {"smooth": True, **OFF}


@pytest.fixture(scope="module")
def plain():
    """Weights before and after twenty steps with all options off."""
    step = step_of(**SMOOTH)
    return weights(step), weights(train(step, batches(20), lr=0.002))


class TestStepOptions:
    """An option changes the speed of a step, not its result."""

    # Measured: 1e-6 to 3e-6. A weight decay of 4e-4 instead of 5e-4 is off by 5e-3, a kd_weight of
    # 0.69 for 0.7 by 0.1.
    TOLERANCE = 1e-4

    @pytest.mark.parametrize(
        "option",
        [{"impl": "auto"}, {"channels_last": True}, {"flat": True}],
        ids=lambda option: next(iter(option)),
    )
    def test_each_option_preserves_result(self, plain, option):
        start, end = plain
        assert (
            difference(
                weights(train(step_of(**{**SMOOTH, **option}), batches(20), lr=0.002)), end, start
            )
            < self.TOLERANCE
        )

    def test_all_options_preserve_result(self, plain):
        start, end = plain
        every = step_of(
            **{**SMOOTH, "impl": "auto", "channels_last": True, "flat": True, "compile": True}
        )
        assert every.options.describe() == "fp32, channels-last, compiled, parameters in one tensor"
        assert difference(weights(train(every, batches(20), lr=0.002)), end, start) < self.TOLERANCE
        assert set(every.model.student().state_dict()) == set(
            step_of(**SMOOTH).model.student().state_dict()
        )

    @pytest.mark.parametrize("precision", ["bf16", "fp16"])
    def test_low_precision_is_close(self, precision):
        """One step of gradient descent: of a gradient through all layers and batch norms 8 bits
        lose 12 %, 11 bits 5 %.
        """
        settings = {**SMOOTH, "momentum": 0.0, "nesterov": False}
        start = weights(step_of(**settings))
        full, half = (
            train(step_of(**settings, precision=each), batches(1)) for each in ("fp32", precision)
        )
        assert 1e-3 < difference(weights(half), weights(full), start) < 0.3
        assert half.guard.read() is None
        assert half.sums.means()["loss"] == pytest.approx(full.sums.means()["loss"], rel=0.02)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"cuda_graph": True}, "cuda_graph=True: not available on cpu; omit it"),
            ({"streams": True}, "streams=True: not available on cpu"),
            ({"precision": "tf32"}, "precision=tf32: cpu has no TF32 units; use fp32 or bf16"),
            (
                {"cast_once": True, "flat": True},
                "cast_once=True: precision=fp32 casts no weights; omit it",
            ),
            ({"cast_once": True, "precision": "bf16"}, "cast_once=True: it needs flat=True"),
        ],
    )
    def test_unavailable_option_is_refused_on_cpu(self, changes, message):
        with pytest.raises(ConfigError, match=message):
            step_of(**changes)

    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({}, None),
            ({"method": "baseline", "branches": 1, "aux_blocks": 0}, "there is one branch"),
        ],
    )
    def test_compatible_options_are_on_for_a_gpu(self, changes, reason):
        config = dataclasses.replace(CONFIG, **changes)
        model = build_model(config, 10, CPU)
        options = choose_step_options(config, model, torch.device("cuda", 0))
        assert options == type(options)(
            "bf16",
            channels_last=True,
            compile=True,
            cuda_graph=True,
            streams=reason is None,
            flat=True,
            cast_once=True,
        )
        several = choose_step_options(config, model, torch.device("cuda", 0), world_size=2)
        assert several == dataclasses.replace(
            options, cuda_graph=False, streams=False, cast_once=False
        )
        if reason:
            with pytest.raises(ConfigError, match=f"streams=True: {reason}"):
                choose_step_options(
                    dataclasses.replace(config, streams=True), model, torch.device("cuda", 0)
                )

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            (
                {"device_batch": 5},
                r"device_batch=5: it must be at least 2 and a divisor of batch_size=16",
            ),
            ({"optimizer": "sdg"}, r"unknown optimizer 'sdg'; did you mean 'sgd'\?"),
            ({"schedule": "cosin"}, r"unknown schedule 'cosin'; did you mean 'cosine'\?"),
            ({"ema": 1.0}, r"ema=1.0: it must be in \[0, 1\)"),
            ({"clip_grad": -1.0}, r"clip_grad=-1.0"),
            ({"betas": (0.9,)}, r"betas=\(0.9,\): it must be two numbers"),
            ({"warmup_epochs": 300.0}, r"warmup_epochs=300.0: it must be below epochs=300"),
            ({"on_nonfinite": "ignore"}, r"unknown on_nonfinite 'ignore'"),
            (
                {"log_to": ("tensorbord",)},
                r"unknown log_to 'tensorbord'; did you mean 'tensorboard'\?",
            ),
            ({"keep_checkpoints": 0}, r"keep_checkpoints=0"),
            (
                {"method": "tsb", "branches": 2, "aux_blocks": 0, "on_nonfinite": "skip"},
                r"on_nonfinite=skip and method 'tsb': it stores",
            ),
        ],
    )
    def test_invalid_settings_are_refused(self, changes, message):
        with pytest.raises(ConfigError, match=message):
            check_config(dataclasses.replace(CONFIG, **changes))


def test_accumulated_gradients_equal_manual_parts():
    """Two passes of eight images and one update, against the same by hand: batch norm sees eight
    images at a time.
    """
    step = step_of(device_batch=8, momentum=0.0, nesterov=False, weight_decay=0.0)
    model, criterion, batch = (
        copy.deepcopy(step.model),
        copy.deepcopy(step.criterion),
        batches(1)[0],
    )
    train(step, [batch], lr=0.1)
    loss = 0.0
    for rows in (slice(0, 8), slice(8, 16)):
        result = model(batch.images[rows])
        loss = (
            loss
            + criterion(result.logits, batch.target[rows], scores=result.scores, kd_weight=0.7) / 2
        )
    loss.backward()
    loss = loss.detach()
    for (name, trained), reference in zip(
        step.model.named_parameters(), model.parameters(), strict=True
    ):
        torch.testing.assert_close(
            trained, reference - 0.1 * reference.grad, rtol=1e-4, atol=1e-6, msg=name
        )
    assert step.sums.means()["loss"] == pytest.approx(float(loss), rel=1e-5)


class HostReads(TorchDispatchMode):
    """Counts what makes the host wait for a value on the device."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (
            torch.ops.aten._local_scalar_dense,
            torch.ops.aten.equal,
            torch.ops.aten.nonzero,
            torch.ops.aten.masked_select,
            torch.ops.aten.is_nonzero,
        ):
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"impl": "reference"},
        {"flat": True, "clip_grad": 1.0, "ema": 0.9},
        {"optimizer": "adamw", "on_nonfinite": "skip"},
        {"optimizer": "adamw", "device_batch": 8},
        {"precision": "fp16", "impl": "reference"},
    ],
    ids=str,
)
def test_loop_has_no_host_reads(monkeypatch, changes):
    # On a CPU labels are looked at in every step, because that is free there.
    monkeypatch.setattr(checks, "check_labels", lambda target, first: None)
    dataset = open_dataset("digits")
    step = step_of(**changes)
    loader = make_loader(
        dataset, dataset.train.select(torch.arange(64)), 16, device=CPU, seed=0, train=True
    )
    runner = StepRunner(step)
    loader.set_epoch(0)
    with HostReads() as reads:
        for done in runner.epoch(loader):
            step.set_schedule(0.1 / done, 0.5)
    assert done == 4
    assert reads.names == []
    with HostReads() as reads:
        step.sums.means()
        assert step.guard.read() is None
    assert reads.names, "the counter counts"


def test_runner_starts_within_an_epoch():
    dataset = open_dataset("digits")
    whole, parts = step_of(), step_of()

    def loader():
        return make_loader(
            dataset, dataset.train.select(torch.arange(64)), 16, device=CPU, seed=0, train=True
        )

    assert list(StepRunner(whole).epoch(loader())) == [1, 2, 3, 4]
    first, second = loader(), loader()
    taken = StepRunner(parts).epoch(first)
    assert [next(taken), next(taken)] == [1, 2]
    second.load_state_dict(first.state_dict())
    assert list(StepRunner(parts).epoch(second, 2)) == [3, 4]
    assert all(torch.equal(value, weights(parts)[name]) for name, value in weights(whole).items())


class TestNotFinite:
    @pytest.fixture
    def given(self):
        good = batches(4)
        bad = Batch(torch.full_like(good[0].images, math.inf), good[0].target, good[0].index)
        return good, bad

    @pytest.mark.parametrize("flat", [False, True])
    def test_skipped_step_changes_nothing(self, given, flat):
        good, bad = given
        step = train(step_of(on_nonfinite="skip", ema=0.9, flat=flat), [good[0], bad, *good[1:]])
        clean = train(step_of(on_nonfinite="skip", flat=flat), good)
        assert all(
            torch.equal(value, weights(clean)[name]) for name, value in weights(step).items()
        )
        found = step.guard.read()
        assert (found.count, found.step) == (1, 1)
        assert {"loss", "ce/branch1", "ce/ta3"} <= set(found.terms)
        assert step.sums.means() == clean.sums.means()
        assert all(
            bool(value.isfinite().all()) for value in step.average.module.state_dict().values()
        )

    @pytest.mark.parametrize("policy", ["stop", "rollback"])
    def test_weights_stay_until_the_host_checks(self, given, policy):
        good, bad = given
        step = train(step_of(on_nonfinite=policy), good[:2])
        before = {name: value.detach().clone() for name, value in step.model.named_parameters()}
        train(step, [bad, *good[2:]])
        assert all(
            torch.equal(value, before[name]) for name, value in step.model.named_parameters()
        )
        found = step.guard.read()
        assert (found.count, found.step) == (1, 2)
        step.guard.clear()
        assert step.guard.read() is None

    @pytest.mark.parametrize("flat", [False, True])
    def test_nonfinite_gradient_names_its_branch(self, given, flat):
        step = step_of(flat=flat)
        step.model.branches[1].head.fc.weight.register_hook(lambda grad: grad * math.inf)
        train(step, given[0][:1])
        found = step.guard.read()
        assert found.terms == ()
        assert "branch2" in found.describe()
        assert "trunk" not in found.describe()
        if not flat:
            assert found.describe() == "step 1: non-finite gradient (the loss is finite) in branch2"

    def test_first_nonfinite_step_is_described(self):
        guard = FiniteGuard(CPU, [("a",), ("b",)], sticky=True)
        guard.prepare(("loss", "ce/branch1"))
        for number, value in enumerate([1.0, math.nan, math.inf]):
            assert float(guard.withheld()) == (number > 1)
            guard.note(
                torch.tensor(not math.isfinite(value)),
                torch.tensor(number),
                torch.tensor([value, 1.0 if number == 1 else value]),
                torch.tensor([1.0, value]),
            )
        found = guard.read()
        assert (found.count, found.step, found.terms, found.parameters) == (2, 1, ("loss",), ("b",))
        assert found.describe() == "step 2: non-finite loss (2 such steps)"


class TestLossScale:
    def test_loss_scale_is_halved_and_doubled(self, monkeypatch):
        monkeypatch.setattr(LossScale, "GROWTH_STEPS", 3)
        scale = LossScale(CPU)
        seen = []
        for overflowed in (False, False, True, False, False, False, False):
            scale.update(torch.tensor(overflowed))
            seen.append(float(scale.value) / LossScale.START)
        assert seen == [1, 1, 0.5, 0.5, 0.5, 1, 1]
        other = LossScale(CPU)
        other.load_state_dict(scale.state_dict())
        for each in (scale, other):
            each.update(torch.tensor(False))
            each.update(torch.tensor(False))
        assert float(other.value) == float(scale.value) == 2 * LossScale.START

    def test_loss_scale_changes_on_overflow_not_on_nan_loss(self):
        step = step_of(impl="reference", precision="fp16")
        before = weights(step)
        step.scale.value.fill_(2.0**40)
        train(step, batches(1))
        assert step.guard.read() is None
        assert float(step.scale.value) == LossScale.LARGEST
        assert all(torch.equal(value, weights(step)[name]) for name, value in before.items())
        train(
            step,
            [
                Batch(
                    torch.full((16, 3, 8, 8), math.nan),
                    torch.zeros(16, dtype=torch.int64),
                    torch.arange(16),
                )
            ],
        )
        assert "loss" in step.guard.read().terms


def test_metric_sums_skip_steps():
    sums = MetricSums()
    assert sums.means() == {}
    sums.prepare(["loss"], CPU)
    sums.add([torch.tensor([8.0])], 4, torch.tensor(False))
    sums.add([torch.tensor([math.nan])], 4, torch.tensor(True))
    assert sums.means() == {"loss": 2.0}
    other = MetricSums()
    other.load_state_dict(sums.state_dict(), CPU)
    other.add([torch.tensor([4.0])], 1, torch.tensor(False))
    assert (other.means(), sums.means()) == ({"loss": 2.4}, {"loss": 2.0})
    sums.clear()
    assert sums.means() == {}


def test_step_gives_its_device_an_index(monkeypatch):
    """So that "cuda" equals the device of tensors on the current GPU."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.nn.Module, "to", lambda module, *arguments, **options: module)
    config = TrainConfig(model="resnet8", method="baseline", branches=1)
    model = build_model(config, 10, torch.device("cuda"))
    assert BranchEvaluator(config, model, torch.device("cuda")).device == torch.device("cuda", 1)
    assert BranchEvaluator(config, model, torch.device("cuda", 0)).device.index == 0
    assert BranchEvaluator(config, model, torch.device("cpu")).device == torch.device("cpu")
