"""Learning-rate factors, frozen parts and weight decay of fine-tuning."""

import dataclasses

import pytest
import torch
from method_runs import SHORT_RUN, few_digits, make
from safetensors.torch import load_file
from test_interruption import assert_equal, interrupted, outcome

from fastokd.data import Batch
from fastokd.errors import ConfigError
from fastokd.methods.method import MethodBatch
from fastokd.models import create_model, create_student
from fastokd.train.build import build_model
from fastokd.train.compute import training_flops
from fastokd.train.config import identity_fields
from fastokd.train.export_run import export_run
from fastokd.train.param_groups import blocks, frozen_parts, parameter_settings
from fastokd.train.rules import check_config
from fastokd.train.step import TrainStep

CPU = torch.device("cpu")
CONFIG = dataclasses.replace(SHORT_RUN, epochs=4)


@pytest.fixture(scope="module")
def digits():
    return few_digits(64)


def batch():
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(8, 3, 32, 32, generator=generator)
    return Batch(images, torch.arange(8), torch.arange(8))


def trained_step(config, count=2):
    """A step after some updates, and the parameters before them."""
    step = TrainStep(config, build_model(config, 10, CPU), CPU)
    before = {name: each.detach().clone() for name, each in step.model.named_parameters()}
    step.start_epoch(0)
    step.set_schedule(config.lr, 1.0)
    for _ in range(count):
        step(batch())
    return step, before


def part_of(name):
    """The part of a parameter or buffer; empty for the method's modules."""
    return next((each for each in name.split(".")[:4] if each in ("trunk", "body", "head")), "")


FACTORS = {"trunk": 0.1, "body": 1.0, "head": 5.0, "": 1.0}


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("flat", [False, True])
def test_update_equals_torch_with_groups_of_its_own(optimizer, flat):
    config = dataclasses.replace(
        CONFIG,
        # Adam scales the rounding errors of AHBF's gates, whose biases have no gradient.
        method="ahbf" if optimizer == "sgd" else "cl_ilr",
        optimizer=optimizer,
        flat=flat,
        trunk_lr=0.1,
        head_lr=5.0,
        decay="norm-bias-free",
        weight_decay=0.1,
    )
    step, before = trained_step(config)
    model = build_model(config, 10, CPU).train()
    groups = [
        {
            "params": [parameter],
            "lr": config.lr * FACTORS[part_of(name)],
            "weight_decay": 0.1 if parameter.dim() > 1 else 0.0,
        }
        for name, parameter in model.named_parameters()
    ]
    if optimizer == "sgd":
        expected = torch.optim.SGD(groups, lr=0.0, momentum=0.9, nesterov=True, foreach=False)
    else:
        expected = torch.optim.AdamW(groups, lr=0.0, foreach=False)
    data = batch()
    for _ in range(2):
        expected.zero_grad()
        given = MethodBatch(data.target, data.index)
        step.method.forward_backward(step.criterion, model(data.images), given, kd_weight=1.0)
        expected.step()
    for name, parameter in step.model.named_parameters():
        wanted = model.get_parameter(name)
        # Adam scales up the rounding errors of single gradients near zero.
        moved = (wanted - before[name]).norm()
        assert (parameter - wanted).norm() <= 1e-3 * moved + 1e-7, name


BLOCKS = (
    "fc",
    "layer3.1",
    "layer3.0",
    "layer2.1",
    "layer2.0",
    "layer1.1",
    "layer1.0",
    "bn1",
    "conv1",
)
"""The blocks of ResNet-14 from the output to the input."""


def test_layer_decay_multiplies_the_rate_of_each_block():
    config = dataclasses.replace(
        CONFIG, model="resnet14", momentum=0.0, nesterov=False, weight_decay=0.0, layer_decay=0.5
    )
    step, before = trained_step(config, count=1)
    plain, _ = trained_step(dataclasses.replace(config, layer_decay=1.0), count=1)
    names = {id(each): name for name, each in step.model.named_parameters()}
    for plain_name, each in step.model.live_student().named_parameters():
        depth = next(at for at, block in enumerate(BLOCKS) if plain_name.startswith(f"{block}."))
        name = names[id(each)]
        expected = (plain.model.get_parameter(name) - before[name]) * 0.5**depth
        torch.testing.assert_close(each - before[name], expected, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "count", "first", "last"),
    [
        ("torchvision:resnet18", 11, "Conv2d", "Linear"),
        ("torchvision:vit_b_16", 15, "Conv2d", "Sequential"),
        ("torchvision:vgg11", 11, "Conv2d", "Linear"),
        ("timm:vit_tiny_patch16_224", 15, "PatchEmbed", "Linear"),
    ],
)
def test_blocks_of_library_networks(name, count, first, last):
    with torch.device("meta"):
        found = blocks(create_student(name, 10))
    assert len(found) == count
    assert (type(found[0]).__name__, type(found[-1]).__name__) == (first, last)


@pytest.mark.parametrize("method", ["ahbf", "afid", "ffsd"])
def test_norms_and_biases_of_methods_are_not_decayed_either(method):
    config = dataclasses.replace(CONFIG, method=method, branches=None, decay="norm-bias-free")
    step = TrainStep(config, build_model(config, 10, CPU), CPU)
    for optimizer, _ in step.optimizers.by_name.values():
        decayed = [group for group in optimizer.param_groups if group["weight_decay"]]
        assert all(each.dim() > 1 for group in decayed for each in group["params"])


def test_defaults_keep_one_group_and_the_identity_of_runs():
    step = TrainStep(CONFIG, build_model(CONFIG, 10, CPU), CPU)
    assert list(step.optimizers.by_name) == ["sgd"]
    assert len(step.optimizers.groups) == 1
    added = {"decay", "trunk_lr", "head_lr", "layer_decay", "freeze_epochs", "head_epochs"}
    assert not added & {name for name, _ in identity_fields(CONFIG)}


def test_layer_scales_are_not_decayed():
    """torchvision's ConvNeXt has them as [C, 1, 1]; depthwise weights [C, 1, 7, 7] are decayed."""
    with torch.device("meta"):
        model = create_model("torchvision:convnext_tiny", "baseline", 10)
    config = dataclasses.replace(CONFIG, method="baseline", branches=1, decay="norm-bias-free")
    settings = parameter_settings(config, model)
    decays = {name: settings[each].decays for name, each in model.named_parameters()}
    shapes = {name: each.shape for name, each in model.named_parameters()}
    scales = [name for name in decays if name.endswith("layer_scale")]
    assert len(scales) == 18
    assert not any(decays[name] for name in scales)
    weights = [name for name in decays if len(shapes[name]) in (2, 4)]
    assert all(decays[name] for name in weights)
    assert len(weights) > 18


@pytest.mark.parametrize(("field", "frozen"), [("freeze_epochs", "trunk"), ("head_epochs", "both")])
def test_frozen_epochs_cost_a_forward_pass(field, frozen):
    """Multiply-adds are counted by hand: hooks on the convolutions of the frozen layers."""
    model, flops = create_model("resnet8", "ahbf", 10, 3, 1).eval(), {"trunk": 0, "body": 0}

    def hook(part):
        def count(layer, _, output):
            flops[part] += 2 * layer.weight[0].numel() * output.numel()

        return count

    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Conv2d) and not name.startswith("companion"):
            layer.register_forward_hook(hook("trunk" if name.startswith("trunk") else "body"))
    model(torch.zeros(1, 3, 32, 32))
    assert 0 < flops["trunk"] < flops["body"]
    expected = flops["trunk"] + (flops["body"] if frozen == "both" else 0)
    config = dataclasses.replace(CONFIG, epochs=4)
    plain = training_flops(config, 10, (32, 32))
    changed = training_flops(dataclasses.replace(config, **{field: 1}), 10, (32, 32))
    assert plain - changed == pytest.approx(expected * 2 / 3 / 4)


# --- frozen parts


@pytest.mark.parametrize(
    ("freeze", "head", "frozen"),
    [
        (2, 0, [{"trunk"}, {"trunk"}, set(), set()]),
        (0, 1, [{"trunk", "body"}, set(), set(), set()]),
        (3, 1, [{"trunk", "body"}, {"trunk"}, {"trunk"}, set()]),
    ],
)
def test_frozen_parts_by_epoch(freeze, head, frozen):
    config = dataclasses.replace(CONFIG, freeze_epochs=freeze, head_epochs=head)
    assert [set(frozen_parts(config, epoch)) for epoch in range(4)] == frozen


@pytest.mark.parametrize("method", ["ahbf", "dml"])
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize(("field", "frozen"), [("freeze_epochs", 1), ("head_epochs", 2)])
def test_frozen_parts_do_not_change_in_weights_and_statistics(method, flat, field, frozen):
    config = dataclasses.replace(CONFIG, method=method, flat=flat, **{field: 1}, ema=0.5)
    step = TrainStep(config, build_model(config, 10, CPU), CPU)
    before = {name: value.clone() for name, value in step.model.state_dict().items()}
    step.set_schedule(0.1, 1.0)
    kinds = ["trunk", "body"][:frozen]
    for epoch in (0, 1):
        step.start_epoch(epoch)
        for _ in range(2):
            step(batch())
        changed = {
            name
            for name, value in step.model.state_dict().items()
            if not torch.equal(value, before[name]) and not name.endswith("num_batches_tracked")
        }
        parts = {part_of(name) for name in changed}
        assert bool(parts & set(kinds)) is (epoch == 1)
        assert "head" in parts


def test_frozen_parts_are_not_clipped_and_get_no_momentum():
    config = dataclasses.replace(CONFIG, freeze_epochs=1, head_epochs=1, clip_grad=0.01)
    step, _ = trained_step(config, count=1)
    norms = dict(zip(step.optimizers.parts, step.optimizers.norms, strict=True))
    for (name,), norm in norms.items():
        assert (norm == 0) == (part_of(name) in ("trunk", "body")), name
    for name, state in step.optimizers.state_dict().items():
        if part_of(name) in ("trunk", "body"):
            assert not state["momentum_buffer"].any(), name


@pytest.mark.parametrize("stop", [{"step": 1}, {"step": 3}])
def test_run_with_a_frozen_phase_resumes_exactly(tmp_path, digits, stop):
    config = dataclasses.replace(
        CONFIG, epochs=3, freeze_epochs=2, head_epochs=1, optimizer="adamw", head_lr=2.0, flat=True
    )
    straight = make(config, tmp_path / "straight", digits)
    straight.run()
    assert_equal(
        outcome(interrupted(config, tmp_path / "other", digits, **stop)), outcome(straight)
    )


def test_fine_tuned_network_of_timm_resumes_and_is_exported(tmp_path, digits):
    """From weights for other classes, with a teacher, views, stochastic depth and frozen parts."""
    timm = pytest.importorskip("timm")
    before = timm.create_model("test_resnet", num_classes=7).state_dict()
    torch.save({"model": {f"module.{k}": v for k, v in before.items()}}, tmp_path / "7.pth")
    train, test = (
        dataclasses.replace(split, images=split.images.repeat(1, 1, 4, 4))
        for split in (digits.train, digits.test)
    )
    teacher = timm.create_model("test_resnet", num_classes=10).state_dict()
    torch.save(teacher, tmp_path / "teacher.pth")
    config = dataclasses.replace(
        CONFIG,
        model="timm:test_resnet",
        at="layer3",
        branches=2,
        epochs=3,
        freeze_epochs=2,
        head_epochs=1,
        weights=str(tmp_path / "7.pth"),
        teacher=f"timm:test_resnet:{tmp_path / 'teacher.pth'}",
        teacher_to="branches",
        branch_views=True,
        auto_augment="trivialaugment",
        drop_path=0.2,
        label_smoothing=0.1,
        optimizer="adamw",
        layer_decay=0.8,
    )
    data = dataclasses.replace(digits, train=train, test=test)
    straight = make(config, tmp_path / "straight", data)
    frozen = {name: before[name] for name in ("layer1.0.conv1.weight", "layer2.0.bn1.running_mean")}
    straight.run(until=2)
    for name, value in frozen.items():
        assert torch.equal(straight.model.student().state_dict()[name], value)
    straight.run()
    for name, value in frozen.items():
        assert not torch.equal(straight.model.student().state_dict()[name], value)
    resumed = interrupted(config, tmp_path / "resumed", data, step=3)  # in the second frozen epoch
    assert_equal(outcome(resumed), outcome(straight))

    log = straight.run_folder.log_path.read_text()
    for line in (
        "timm:test_resnet, method ahbf (paper), 2 branches from layer3 on, on cpu",
        "7.pth, entry 'model' (SHA-256 of the tensors: ",
        "): 75 tensors loaded; new: fc.weight, fc.bias",
        "the other branches start as copies of the student's, without noise because their views",
        "normalization: mean ",
        "; augmentation: random crops after padding by 1 pixels, trivialaugment; 2 views of each",
        "the weights do not state their normalization, so the data's is used; pass --normalizat",
        "stochastic depth: 0.2 in the last residual block",
        "; label smoothing 0.1",
        "fine-tuning: layer_decay=0.8, freeze_epochs=2, head_epochs=1; the trunk is all before lay",
        "teacher timm:test_resnet:",
    ):
        assert line in log, line

    exported = load_file(export_run(straight.run_folder.path, "timm", data="digits").path)
    network = timm.create_model("test_resnet", num_classes=10).eval()
    network.load_state_dict(exported, strict=True)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        # The run's own is in channels-last format, whose kernels round differently.
        expected = straight.step.student().eval()(images)
        torch.testing.assert_close(network(images), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"freeze_epochs": 4}, "freeze_epochs=4: it must be below epochs=4"),
        ({"head_epochs": 9}, "head_epochs=9: it must be below epochs=4"),
        ({"layer_decay": 1.5}, "layer_decay=1.5"),
        ({"trunk_lr": 0.0}, "trunk_lr=0.0"),
        ({"decay": "none"}, "unknown decay 'none'"),
    ],
)
def test_values_out_of_range_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        check_config(dataclasses.replace(CONFIG, **changes))
