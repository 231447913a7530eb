"""The networks: their size to the last parameter, their shapes, their gradients, and the student
they export.
"""

import copy
import dataclasses
import subprocess
import sys

import pytest
import torch
import torchvision.models.resnet
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastokd.data import Batch
from fastokd.errors import ConfigError
from fastokd.methods import get_method
from fastokd.methods.method import MethodBatch
from fastokd.models import (
    PlainNetwork,
    create_model,
    create_student,
    factory,
    list_models,
    register_model,
    residual,
)
from fastokd.models.layout import to_memory_format
from fastokd.models.resnet_cifar import CifarResNet
from fastokd.models.summary import count_parameters, forward_flops
from fastokd.train.config import TrainConfig
from fastokd.train.step import TrainStep

CIFAR = (3, 32, 32)


def images(batch=4, **options):
    return torch.randn(batch, *CIFAR, generator=torch.Generator().manual_seed(1), **options)


def warm(module, batch=None):
    """Batch norms away from their initial values, with the statistics of a batch, as after some
    training.
    """
    generator = torch.Generator().manual_seed(2)
    norms = [
        norm for norm in module.modules() if isinstance(norm, (nn.BatchNorm1d, nn.BatchNorm2d))
    ]
    with torch.no_grad():
        for norm in norms:
            norm.momentum = 1.0
            for tensor in (norm.weight, norm.bias):
                tensor += 0.2 * torch.randn(tensor.shape, generator=generator)
        module.train()(images(8) if batch is None else batch)
    return module


# ---- size


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("resnet8", 78_042),
        ("resnet14", 175_258),
        ("resnet20", 272_474),
        ("resnet32", 466_906),
        ("resnet44", 661_338),
        ("resnet56", 855_770),
        ("resnet110", 1_147_738),
    ],
)
def test_plain_networks_have_published_size(name, parameters):
    student = create_student(name, 10)
    assert type(student) is CifarResNet
    assert count_parameters(student) == parameters
    assert [child for child, _ in student.named_children()] == [
        "conv1",
        "bn1",
        "relu",
        "layer1",
        "layer2",
        "layer3",
        "avgpool",
        "flatten",
        "fc",
    ]
    assert student.eval()(images(2)).shape == (2, 10)


def test_forward_flops_does_not_change_module():
    model = create_model("resnet8")
    before = copy.deepcopy(model.state_dict())
    forward_flops(model, CIFAR)
    assert model.training
    assert all(parameter.device.type == "cpu" for parameter in model.parameters())
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


# ---- initial weights


def test_initial_weights_match_definition():
    """Convolutions Kaiming-normal by fan-out (std sqrt(2 / (k^2 out))), batch norms 1 and 0, the
    gates alike.
    """
    torch.manual_seed(0)
    model = create_model("resnet110", num_branches=2, aux_blocks=0)
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() >= 4096:
            std = (2 / (module.kernel_size[0] ** 2 * module.out_channels)) ** 0.5
            assert module.weight.std().item() == pytest.approx(std, rel=0.06), name
        elif isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            assert (module.weight == 1).all(), name
            assert (module.bias == 0).all(), name


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("resnet8", {"method": "ahbf"}),
        ("resnet8", {"method": "baseline"}),
        # The last branch is kept: by the method on a trunk, by the method among peers, and in
        # compression.
        ("resnet8", {"method": "okddip"}),
        ("resnet8", {"method": "okddip", "topology": "peers"}),
        ("resnet14", {"method": "ahbf", "num_branches": 3, "aux_blocks": 1, "compression": True}),
        ("torchvision:resnet18", {"method": "okddip", "at": "layer4", "num_branches": 3}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_student_initialization_depends_only_on_seed(name, layout):
    def start(build):
        torch.manual_seed(3)
        return build().state_dict()

    plain = start(lambda: create_student(name, 10))
    torch.testing.assert_close(
        start(lambda: create_model(name, **layout).student()), plain, rtol=0, atol=0
    )


# ---- shapes


@pytest.mark.parametrize("num_branches", range(2, 9))
@pytest.mark.parametrize("aux_blocks", range(6))
def test_model_outputs_have_shapes(num_branches, aux_blocks):
    model = create_model("resnet8", num_classes=7, num_branches=num_branches, aux_blocks=aux_blocks)
    assert model.num_branches == num_branches
    assert [len(branch.body.layer3) for branch in model.branches] == [
        1 + aux_blocks * m for m in range(num_branches)
    ]
    result = model(images(3))
    assert [tuple(row.shape) for row in result.logits] == [(3, 7)] * num_branches
    assert [tuple(maps.shape) for maps in result.features] == [(3, 64, 8, 8)] * num_branches
    assert [tuple(score.shape) for score in result.scores] == [(3, 2)] * (num_branches - 1)
    for score in result.scores:
        torch.testing.assert_close(score.sum(1), torch.ones(3))
        assert (score > 0).all()


def test_baseline_is_one_branch_without_gates():
    model = create_model("resnet20", method="baseline", num_classes=10)
    assert (model.name, model.num_classes, model.num_branches, model.companion) == (
        "resnet20",
        10,
        1,
        None,
    )
    assert count_parameters(model) == 272_474
    result = model(images(2))
    assert (len(result.logits), len(result.features), result.scores) == (1, 1, ())


def test_method_selects_depth_gates_and_kept_branch(monkeypatch):
    """Peers of equal depth, no gates, and the last branch kept: the layout of methods with a
    leader.
    """
    leader = dataclasses.replace(
        get_method("ahbf"), hierarchical=False, build_companion=None, kept=-1
    )
    monkeypatch.setattr(factory, "get_method", lambda name: leader)
    model = warm(create_model("resnet8", num_branches=3)).eval()
    assert [len(branch.body.layer3) for branch in model.branches] == [1, 1, 1]
    assert model(images()).scores == ()
    assert torch.equal(model.student()(images()), model(images()).logits[2])


def test_default_is_four_branches_with_four_auxiliary_blocks():
    assert [len(branch.body.layer3) for branch in create_model("resnet32").branches] == [
        5,
        9,
        13,
        17,
    ]


def test_branches_equal_their_plain_networks():
    model = warm(create_model("resnet14", num_branches=3, aux_blocks=1)).eval()
    x = images()
    with torch.no_grad():
        result = model(x)
        for branch, logits, features in zip(
            model.branches, result.logits, result.features, strict=True
        ):
            assert torch.equal(PlainNetwork.join(model.trunk, branch)(x), logits)
            assert torch.equal(branch.head(features), logits)


@pytest.mark.parametrize("block", ["BasicBlock", "Bottleneck"])
@pytest.mark.parametrize(("in_channels", "stride"), [(16, 1), (16, 2), (64, 1), (64, 2)])
def test_blocks_equal_torchvision(block, in_channels, stride):
    """Same attribute names, same function; the width is such that 64 channels in and stride 1 need
    no projection.
    """
    theirs_class, ours_class = getattr(torchvision.models.resnet, block), getattr(residual, block)
    width = 64 // ours_class.expansion
    x = torch.randn(8, in_channels, 8, 8)
    ours = warm(ours_class(in_channels, width, stride), x).eval()
    assert (ours.downsample is None) == (in_channels == 64 and stride == 1)
    theirs = theirs_class(in_channels, width, stride, copy.deepcopy(ours.downsample)).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    torch.testing.assert_close(ours(x), theirs(x))


def test_stem_is_convolution_norm_and_relu():
    trunk = warm(create_model("resnet8")).eval().trunk
    x = images()
    torch.testing.assert_close(trunk[:3](x), trunk.bn1(trunk.conv1(x)).clamp(min=0))


# ---- the student


def test_student_is_independent_of_the_model():
    model = create_model("resnet8").eval()
    student = model.student()
    before = student(images())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(student(images()), before)
    assert not {id(tensor) for tensor in model.parameters()} & {
        id(tensor) for tensor in student.parameters()
    }


def test_student_keeps_dtype_format_and_mode():
    model = create_model("resnet8").to(torch.bfloat16, memory_format=torch.channels_last).eval()
    model.trunk.bn1.train()
    student = model.student()
    assert not student.training
    assert [name for name, module in student.named_modules() if module.training] == ["bn1"]
    assert student.conv1.weight.dtype == torch.bfloat16
    assert student.layer3[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert create_model("resnet8").student().training


def test_models_can_be_copied_and_sliced():
    model = warm(create_model("resnet8")).eval()
    torch.testing.assert_close(
        copy.deepcopy(model).student()(images()), model(images()).logits[0], rtol=0, atol=0
    )
    student = model.student()
    assert torch.equal(student[:-3](images()), model(images()).features[0])


# ---- how it runs


@pytest.mark.parametrize("method", ["ahbf", "baseline"])
def test_bf16_autocast(method):
    model = create_model("resnet20", method).to(memory_format=torch.channels_last)
    chosen = get_method(method)
    x = images().to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        result = model(x)
        criterion = chosen.loss_class(num_branches=model.num_branches)
        loss = chosen.loss(criterion, result, MethodBatch(torch.arange(4)))
    assert {row.dtype for row in result.logits} == {torch.bfloat16}
    assert {maps.dtype for maps in result.features} == {torch.bfloat16}
    assert loss.dtype == torch.float32
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


class CountedAdds(TorchDispatchMode):
    """Number of times a model's counters of batches are added to in place."""

    def __init__(self, model):
        super().__init__()
        self.count = 0
        self.counters = {
            buffer.data_ptr()
            for name, buffer in model.named_buffers()
            if name.endswith("num_batches_tracked")
        }

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten.add_.Tensor and args[0].data_ptr() in self.counters
        return func(*args, **(kwargs or {}))


def test_training_step_counts_only_cumulative_norms():
    config = TrainConfig(
        model="torchvision:resnet18",
        at="layer4",
        branches=2,
        aux_blocks=0,
        precision="fp32",
        impl="reference",
    )
    torch.manual_seed(0)
    model = create_model(config.model, at=config.at, num_branches=2, aux_blocks=0)
    average = model.branches[0].body.layer4[0].bn1
    average.momentum = None  # a cumulative average needs its count
    plain = copy.deepcopy(model)
    batch = Batch(images(), torch.arange(4), torch.arange(4))
    with CountedAdds(model) as adds:
        TrainStep(config, model, torch.device("cpu"))(batch)
    assert (adds.count, average.num_batches_tracked) == (1, 1)
    with CountedAdds(plain) as adds:
        plain(batch.images)
    assert adds.count == 27
    stepped, counted = model.state_dict(), plain.state_dict()
    assert list(stepped) == list(counted)
    for name, value in counted.items():
        if "running" in name:
            assert torch.equal(stepped[name], value), name
    torchvision.models.resnet18(num_classes=10).load_state_dict(
        model.student().state_dict(), strict=True
    )


@pytest.mark.parametrize("method", ["ahbf", "baseline"])
def test_compiles_as_one_graph(method):
    model = warm(create_model("resnet14", method, aux_blocks=1)).eval()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(
            tuple(compiled(images())), tuple(model(images())), rtol=0, atol=0
        )
    model.train()
    assert len(compiled(images()).logits) == model.num_branches


# ---- the registry and what users get wrong


def test_list_models_does_not_import_families():
    code = (
        "import sys, fastokd.models as m; assert 'resnet110' in m.list_models();"
        "sys.exit('fastokd.models.resnet_cifar' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_listed_models_can_be_created():
    for name in list_models():
        assert create_model(name, "baseline").name == name


TOY = """
from torch import nn
from fastokd.models import Backbone, Branch, PlainNetwork

def branch(num_classes, level, aux_blocks):
    body = nn.Sequential()
    for i in range(1 + aux_blocks * (level - 1)):
        body.add_module(f"conv{i}", nn.Conv2d(4, 4, 1))
    head = nn.Sequential()
    head.add_module("pool", nn.AdaptiveAvgPool2d(1))
    head.add_module("flatten", nn.Flatten())
    head.add_module("fc", nn.Linear(4, num_classes))
    return Branch(body, head, channels=4)

def trunk():
    net = nn.Sequential()
    net.add_module("stem", nn.Conv2d(3, 4, 1))
    return net

BACKBONES = {"toy": Backbone("toy", trunk, branch, PlainNetwork.join)}
"""


def test_new_network_is_one_file_and_one_registry_entry(tmp_path, monkeypatch):
    (tmp_path / "toy_backbone_module.py").write_text(TOY)
    monkeypatch.syspath_prepend(tmp_path)
    # Private, because a registered network cannot be removed in a public way.
    monkeypatch.setattr(factory._models, "targets", dict(factory._models.targets))
    register_model("toy", "toy_backbone_module")
    model = create_model("toy", num_classes=3, num_branches=3, aux_blocks=1).eval()
    result = model(images(2))
    assert [tuple(row.shape) for row in result.logits] == [(2, 3)] * 3
    assert torch.equal(model.student()(images(2)), result.logits[0])
    create_student("toy", 3).load_state_dict(model.student().state_dict())


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: create_model("resent32"),
            r"unknown model 'resent32'; did you mean 'resnet32'\? \(choices: .*resnet110",
        ),
        (lambda: create_student("resnet18c", 10), "unknown model 'resnet18c'"),
        (lambda: create_model("resnet8", "ahfb"), r"unknown method 'ahfb'; did you mean 'ahbf'\?"),
        (
            lambda: create_model("resnet8", num_branches=1),
            r"1 branches: method 'ahbf' takes 2 to 8 \(its default is 4\)",
        ),
        (
            lambda: create_model("resnet8", num_branches=9),
            r"9 branches: method 'ahbf' takes 2 to 8",
        ),
        (
            lambda: create_model("resnet8", num_branches=2.5),
            r"2.5 branches: method 'ahbf' takes 2 to 8",
        ),
        (
            lambda: create_model("resnet8", "baseline", num_branches=4),
            r"4 branches: method 'baseline' takes 1 only",
        ),
        (
            lambda: create_model("resnet8", aux_blocks=-1),
            r"aux_blocks=-1; it must be a whole number of at least 0",
        ),
        (
            lambda: create_model("resnet8", num_classes=1),
            r"num_classes=1; a classifier needs a whole number of at least 2",
        ),
        (lambda: create_student("resnet8", 0), r"num_classes=0; a classifier needs"),
    ],
)
def test_invalid_arguments_are_reported_with_fix(build, message):
    with pytest.raises(ConfigError, match=message):
        build()


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_gradients_have_the_strides_of_their_weights(memory_format):
    """Otherwise ``DistributedDataParallel`` warns, e.g. for 1 x 1 convolutions."""
    model = to_memory_format(
        create_model("mobilenetv2_x0_5", "ahbf", 10, num_branches=2, aux_blocks=1), memory_format
    )
    result = model(torch.randn(4, 3, 32, 32).contiguous(memory_format=memory_format))
    (sum(row.sum() for row in result.logits) + sum(each.sum() for each in result.scores)).backward()
    weights = [each for each in model.parameters() if each.ndim == 4 and each.grad is not None]
    assert any(weight.shape[2:] == (1, 1) for weight in weights)
    assert [weight.shape for weight in weights if weight.stride() != weight.grad.stride()] == []
