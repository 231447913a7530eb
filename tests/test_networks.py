"""Every network: its size to the last parameter, its arithmetic, what it computes, its initial
weights, compression.
"""

import functools
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models.mobilenetv2 import MobileNetV2 as TorchvisionMobileNetV2
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from fastokd.errors import ConfigError
from fastokd.methods.ahbf import AHBFGate
from fastokd.models import (
    Backbone,
    BranchedModel,
    create_model,
    create_student,
    factory,
    get_backbone,
    list_models,
)
from fastokd.models.staged import compressed_blocks, level_blocks
from fastokd.models.summary import check_images, count_parameters, forward_flops
from fastokd.models.vgg import backbone as vgg
from fastokd.train.build import build_model
from fastokd.train.config import TrainConfig
from fastokd.train.rules import check_config
from fastokd.train.step import BranchEvaluator

NETWORKS: dict[str, list[dict[str, Any]]] = json.loads(
    (Path(__file__).parent / "data" / "networks.json").read_text()
)


def row_id(row: dict[str, Any]) -> str:
    return f"{row['name']}-{row['num_classes']}" + (
        "-compression" if row.get("compression") else ""
    )


@functools.cache
def shapes(
    name: str, num_classes: int, aux_blocks: int, compression: bool = False
) -> BranchedModel:
    """AHBF's four branches without memory for their weights."""
    with torch.device("meta"):
        return create_model(name, "ahbf", num_classes, 4, aux_blocks, compression=compression)


def own_counts(model: BranchedModel) -> list[int]:
    return [count_parameters(branch) for branch in model.branches]


# ---- parameters


@pytest.mark.parametrize("row", NETWORKS["parameters"], ids=row_id)
def test_parameter_counts_match_reference(row: dict[str, Any]) -> None:
    model = shapes(row["name"], row["num_classes"], row["aux_blocks"])
    assert count_parameters(model.trunk) == row["shared"]
    assert own_counts(model) == row["own"]
    assert [
        count_parameters(gate) for gate in model.modules() if isinstance(gate, AHBFGate)
    ] == row["gates"]
    assert count_parameters(model) == row["total"]
    assert count_parameters(model.student()) == row["single"]


@pytest.mark.parametrize("row", NETWORKS["compression"], ids=row_id)
def test_compressed_parameter_counts_match_reference(row: dict[str, Any]) -> None:
    model = shapes(row["name"], row["num_classes"], row["aux_blocks"], compression=True)
    assert count_parameters(model.trunk) == row["shared"]
    assert own_counts(model) == row["own"]
    assert [
        count_parameters(gate) for gate in model.modules() if isinstance(gate, AHBFGate)
    ] == row["gates"]
    assert count_parameters(model) == row["total"]
    assert [count_parameters(model.student(branch)) for branch in range(4)] == row["single"]


@pytest.mark.parametrize("row", NETWORKS["equal"], ids=row_id)
def test_equal_branch_parameter_counts_match_reference(row: dict[str, Any]) -> None:
    backbone = get_backbone(row["name"])
    with torch.device("meta"):
        student = create_student(row["name"], row["num_classes"])
        parts = [
            backbone.build_trunk(),
            *(backbone.build_branch(row["num_classes"], 1, 0) for _ in range(4)),
        ]
    assert count_parameters(student) == row["single"]
    if row["four_equal_branches"] is not None:
        assert sum(map(count_parameters, parts)) == row["four_equal_branches"]


# Counts by hand for networks whose papers and codes give none: convolutions without bias, batch
# norms, linear layers.


def conv(inputs: int, outputs: int, kernel: int, groups: int = 1) -> int:
    return inputs // groups * outputs * kernel**2


def bn(channels: int) -> int:
    return 2 * channels


def fc(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


def wide_resnet(blocks: int, widen: int, aux: int) -> tuple[int, int]:
    def stage(inputs: int, width: int, count: int) -> int:
        first = (
            bn(inputs)
            + conv(inputs, width, 3)
            + bn(width)
            + conv(width, width, 3)
            + conv(inputs, width, 1)
        )
        return first + (count - 1) * (2 * bn(width) + 2 * conv(width, width, 3))

    w = [widen * width for width in (16, 32, 64)]
    return conv(3, 16, 3) + stage(16, w[0], blocks) + stage(w[0], w[1], blocks), stage(
        w[1], w[2], blocks + aux
    ) + bn(w[2]) + fc(w[2], 10)


def resnext(aux: int) -> tuple[int, int]:
    def stage(inputs: int, width: int, count: int) -> int:
        def block(inputs: int) -> int:
            return (
                conv(inputs, 2 * width, 1)
                + conv(2 * width, 2 * width, 3, 32)
                + conv(2 * width, 4 * width, 1)
                + 2 * bn(2 * width)
                + bn(4 * width)
            )

        return (
            conv(inputs, 4 * width, 1)
            + bn(4 * width)
            + block(inputs)
            + (count - 1) * block(4 * width)
        )

    return conv(3, 64, 3) + bn(64) + stage(64, 64, 3) + stage(256, 128, 4) + stage(
        512, 256, 6
    ), stage(1024, 512, 3 + aux) + fc(2048, 10)


def shufflenet(aux: int) -> tuple[int, int]:
    def stage(inputs: int, channels: int, count: int) -> int:
        w = channels // 2
        passing = conv(inputs, inputs, 3, inputs) + bn(inputs) + conv(inputs, w, 1) + bn(w)
        after_first = conv(w, w, 3, w) + bn(w) + conv(w, w, 1) + bn(w)
        return (
            passing
            + conv(inputs, w, 1)
            + bn(w)
            + after_first
            + (count - 1) * (conv(w, w, 1) + bn(w) + after_first)
        )

    return conv(3, 24, 3) + bn(24) + stage(24, 116, 4) + stage(116, 232, 8), stage(
        232, 464, 4 + aux
    ) + conv(464, 1024, 1) + bn(1024) + fc(1024, 10)


def xception(aux: int) -> tuple[int, int]:
    def separable(inputs: int, outputs: int) -> int:
        return conv(inputs, inputs, 3, inputs) + conv(inputs, outputs, 1) + bn(outputs)

    def down(inputs: int, inner: int, outputs: int) -> int:
        return (
            conv(inputs, outputs, 1)
            + bn(outputs)
            + separable(inputs, inner)
            + separable(inner, outputs)
        )

    middle = 3 * separable(728, 728)
    shared = (
        conv(3, 32, 3)
        + bn(32)
        + conv(32, 64, 3)
        + bn(64)
        + down(64, 128, 128)
        + down(128, 256, 256)
        + down(256, 728, 728)
        + 7 * middle
    )
    return shared, (1 + aux) * middle + down(728, 728, 1024) + separable(1024, 1536) + separable(
        1536, 2048
    ) + fc(2048, 10)


def vgg13(aux: int) -> tuple[int, int]:
    def convs(*channels: int) -> int:
        return sum(conv(i, o, 3) + o + bn(o) for i, o in itertools.pairwise(channels))

    return convs(3, 64, 64, 128, 128, 256, 256, 512, 512), convs(*(512,) * (3 + aux)) + 2 * fc(
        512, 512
    ) + fc(512, 10)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("wrn16_2", functools.partial(wide_resnet, 2, 2)),
        ("wrn16_4", functools.partial(wide_resnet, 2, 4)),
        ("wrn28_2", functools.partial(wide_resnet, 4, 2)),
        ("resnext50_32x4d", resnext),
        ("shufflenetv2_x1_0", shufflenet),
        ("xception", xception),
        ("vgg13", vgg13),
    ],
)
def test_parameter_counts_match_manual_formula(
    name: str, count: Callable[[int], tuple[int, int]]
) -> None:
    model = shapes(name, 10, 4)
    counts = [count(4 * level) for level in range(4)]
    assert count_parameters(model.trunk) == counts[0][0]
    assert own_counts(model) == [own for _, own in counts]


@pytest.mark.parametrize(
    ("name", "num_classes", "millions"),
    [
        # As their papers print them.
        ("wrn16_4", 10, 2.7),
        ("wrn28_2", 10, 1.5),
        ("mobilenetv2_x1_0_imagenet", 1000, 3.5),
        # torchvision's, whose stems differ by little.
        ("resnext50_32x4d", 1000, 25.0),
        ("shufflenetv2_x1_0", 1000, 2.3),
        ("mobilenetv2_x1_0", 1000, 3.5),
    ],
)
def test_student_sizes_match_published(name: str, num_classes: int, millions: float) -> None:
    with torch.device("meta"):
        assert count_parameters(create_student(name, num_classes)) / 1e6 == pytest.approx(
            millions, abs=0.05
        )


def test_auxiliary_block_adds_published_size() -> None:
    """The published increments: a basic block of 64 channels, a bottleneck, a convolution of VGG;
    9.437 MFLOPs.
    """
    for name, parameters in (("resnet20", 73_984), ("resnet110", 70_400), ("vgg16", 2_360_832)):
        one, two = (shapes(name, 10, aux_blocks) for aux_blocks in (1, 2))
        assert own_counts(two)[1] - own_counts(one)[1] == parameters
        assert own_counts(two)[3] - own_counts(one)[3] == 3 * parameters
    flops = [
        forward_flops(shapes("resnet20", 10, aux_blocks), (3, 32, 32)) for aux_blocks in (1, 2)
    ]
    assert (flops[1] - flops[0]) / 1e6 == pytest.approx(9.437 * (1 + 2 + 3), abs=0.002)


@pytest.mark.parametrize(
    ("num_blocks", "aux_blocks", "expected"),
    [
        ((5,), 4, [(5,), (9,), (13,), (17,), (21,)]),
        ((2, 2), 2, [(2, 2), (4, 2), (4, 4), (6, 4), (6, 6)]),
        ((6, 3), 2, [(6, 3), (8, 3), (8, 5), (10, 5), (10, 7)]),
        ((3, 3, 1), 4, [(3, 3, 1), (7, 3, 1), (7, 7, 1), (7, 7, 5), (11, 7, 5)]),
    ],
)
def test_blocks_of_each_hierarchy_level(
    num_blocks: tuple[int, ...], aux_blocks: int, expected: list[tuple[int, ...]]
) -> None:
    assert [level_blocks(num_blocks, level, aux_blocks) for level in range(1, 6)] == expected


# ---- arithmetic


@pytest.mark.parametrize("row", NETWORKS["mflops"], ids=row_id)
def test_forward_mflops(row: dict[str, Any]) -> None:
    model = shapes(row["name"], row["num_classes"], row["aux_blocks"], row["compression"])
    size = get_backbone(row["name"]).image_size

    def mflops(module: nn.Module) -> float:
        return forward_flops(module, (3, size, size)) / 1e6

    # Half a unit of the last printed digit, and a hair for the tie.
    printed = 0.501 * 10 ** -row["digits"]
    shared, everything = mflops(model.trunk), mflops(model)
    singles = [mflops(model.student(branch)) for branch in range(4)]
    for value, want in zip(singles, row["single"], strict=True):
        assert want is None or value == pytest.approx(want, abs=printed)
    gates = everything - shared - sum(single - shared for single in singles)
    assert gates == pytest.approx(sum(row["gates"]), abs=3 * printed)
    assert everything == pytest.approx(row["all"], abs=printed)
    if row["shared"] is not None:
        assert shared == pytest.approx(row["shared"], abs=printed)


# ---- what they compute: the same as the networks of stock libraries


def cifar_resnet(block: type[nn.Module], count: int, **options: int) -> nn.Module:
    net = ResNet(block, [1, 1, 1, 1], num_classes=7, **options)
    net.inplanes = 16
    net.conv1, net.bn1, net.maxpool = (
        nn.Conv2d(3, 16, 3, 1, 1, bias=False),
        nn.BatchNorm2d(16),
        nn.Identity(),
    )
    net.layer1, net.layer2, net.layer3 = (
        net._make_layer(block, width, count, stride)
        for width, stride in ((16, 1), (32, 2), (64, 2))
    )
    net.layer4, net.fc = nn.Identity(), nn.Linear(64 * block.expansion, 7)
    return net


def imagenet(name: str, **options: float) -> nn.Module:
    return torchvision.models.get_model(name, weights=None, num_classes=7, **options)


def cifar_resnext() -> nn.Module:
    net = imagenet("resnext50_32x4d")
    net.conv1, net.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    return net


def cifar_shufflenet() -> nn.Module:
    net = imagenet("shufflenet_v2_x1_0")
    net.conv1[0].stride, net.maxpool = (1, 1), nn.Identity()
    return net


def cifar_mobilenet(width: float) -> nn.Module:
    """The stride of the second row is 1, ReLU is not cut at 6, and the first block has a
    convolution that widens by 1.
    """
    rows = [
        [1, 16, 1, 1],
        [6, 24, 2, 1],
        [6, 32, 3, 2],
        [6, 64, 4, 2],
        [6, 96, 3, 1],
        [6, 160, 3, 2],
        [6, 320, 1, 1],
    ]
    net = TorchvisionMobileNetV2(7, width, rows, round_nearest=1, dropout=0.0)
    stem = int(32 * width)
    first = net.features[1].conv
    net.features[1].conv = nn.Sequential(
        nn.Sequential(nn.Conv2d(stem, stem, 1, bias=False), nn.BatchNorm2d(stem), nn.ReLU()), *first
    )
    for module in list(net.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.ReLU6):
                setattr(module, name, nn.ReLU())
    return net


def cifar_vgg(name: str) -> nn.Module:
    net = imagenet(name)
    net.avgpool = nn.Identity()
    net.classifier = nn.Sequential(
        nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 7)
    )
    return net


def cifar_densenet() -> nn.Module:
    net = torchvision.models.DenseNet(12, (6, 6, 6), 24, bn_size=4, num_classes=7)
    net.features.conv0 = nn.Conv2d(3, 24, 3, 1, 1, bias=False)
    for name in ("norm0", "relu0", "pool0"):
        setattr(net.features, name, nn.Identity())
    return net


def cifar_xception() -> nn.Module:
    net = pytest.importorskip("timm.models.xception").Xception(num_classes=7)
    net.conv1.stride = (1, 1)
    net.conv1.padding = net.conv2.padding = (1, 1)
    return net


class FunctionalWideResNet(nn.Module):
    """Pre-activation blocks as Zagoruyko & Komodakis describe them, on a list of tensors in the
    order of the state dict.
    """

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.blocks = blocks

    def forward_with(self, state: dict[str, Tensor], x: Tensor) -> Tensor:
        left = iter(
            [value for name, value in state.items() if not name.endswith("num_batches_tracked")]
        )

        def norm_relu(x: Tensor) -> Tensor:
            weight, bias, mean, var = (next(left) for _ in range(4))
            return F.relu(
                (x - mean[:, None, None])
                / (var[:, None, None] + 1e-5).sqrt()
                * weight[:, None, None]
                + bias[:, None, None]
            )

        x = F.conv2d(x, next(left), padding=1)
        for stage, block in ((stage, block) for stage in range(3) for block in range(self.blocks)):
            active = norm_relu(x)
            stride = 2 if stage and not block else 1
            y = F.conv2d(active, next(left), stride=stride, padding=1)
            y = F.conv2d(norm_relu(y), next(left), padding=1)
            x = y + (x if block else F.conv2d(active, next(left), stride=stride))
        x = norm_relu(x).mean((2, 3))
        weight, bias = left
        return x @ weight.T + bias


def trained(name: str, size: int) -> nn.Module:
    """A plain network in float64, its batch norms as after some training."""
    torch.manual_seed(0)
    student = create_student(name, 7).double()
    for module in student.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
            nn.init.uniform_(module.weight, 0.8, 1.2)
            nn.init.normal_(module.bias, std=0.2)
    with torch.no_grad():
        student(torch.randn(4, 3, size, size).double())
    return student.eval()


STOCK: dict[str, tuple[Callable[[], nn.Module], bool]] = {
    # The stock network, and whether the names of its tensors are the same.
    "resnet20": (lambda: cifar_resnet(BasicBlock, 3), True),
    "resnet110": (lambda: cifar_resnet(Bottleneck, 12), True),
    "wrn20_8": (lambda: cifar_resnet(Bottleneck, 2, width_per_group=8 * 64), True),
    "resnext50_32x4d": (cifar_resnext, True),
    "resnet18_imagenet": (lambda: imagenet("resnet18"), True),
    "resnet34_imagenet": (lambda: imagenet("resnet34"), True),
    "resnet50_imagenet": (lambda: imagenet("resnet50"), True),
    "mobilenetv2_x1_0_imagenet": (lambda: imagenet("mobilenet_v2"), True),
    "mobilenetv2_x0_5_imagenet": (lambda: imagenet("mobilenet_v2", width_mult=0.5), True),
    "mobilenetv2_x1_0": (lambda: cifar_mobilenet(1.0), True),
    "mobilenetv2_x0_5": (lambda: cifar_mobilenet(0.5), True),
    "shufflenetv2_x1_0": (cifar_shufflenet, True),
    "vgg13": (lambda: cifar_vgg("vgg13_bn"), False),
    "vgg16": (lambda: cifar_vgg("vgg16_bn"), False),
    "densenet40_12": (cifar_densenet, False),
    "xception": (cifar_xception, False),
}


@pytest.mark.parametrize("name", STOCK)
def test_network_equals_stock_implementation(name: str) -> None:
    build, same_names = STOCK[name]
    size = 32 if get_backbone(name).image_size == 32 else 64
    student, stock = trained(name, size), build().double().eval()
    state = student.state_dict()
    if not same_names:
        state = dict(zip(stock.state_dict(), state.values(), strict=True))
    stock.load_state_dict(state, strict=True)
    x = torch.randn(2, 3, size, size).double().requires_grad_()
    got, want = student(x), stock(x)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    upstream = torch.randn(2, 7).double()
    for ours, theirs in zip(
        *(torch.autograd.grad(logits, x, upstream) for logits in (got, want)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-9)
    with torch.no_grad():
        if name.endswith("_imagenet"):
            student, stock, x = student.float(), stock.float(), x.float()
            assert torch.equal(student(x), stock(x))


@pytest.mark.parametrize(("name", "blocks"), [("wrn16_2", 2), ("wrn16_4", 2), ("wrn28_2", 4)])
def test_wide_resnets_match_definition(name: str, blocks: int) -> None:
    student, x = trained(name, 32), torch.randn(2, 3, 32, 32).double()
    with torch.no_grad():
        torch.testing.assert_close(
            student(x),
            FunctionalWideResNet(blocks).forward_with(student.state_dict(), x),
            rtol=1e-9,
            atol=1e-9,
        )


def test_compared_networks_cover_list_models() -> None:
    compared = {
        *STOCK,
        "wrn16_2",
        "wrn16_4",
        "wrn28_2",
        "resnet8",
        "resnet14",
        "resnet32",
        "resnet44",
        "resnet56",
    }
    assert compared == set(list_models())


def test_vgg_dropout_is_equal_in_all_branches() -> None:
    """0.5 in the baseline and in every branch; a network without is one argument away."""

    def rates(module: nn.Module) -> list[float]:
        return [layer.p for layer in module.modules() if isinstance(layer, nn.Dropout)]

    with torch.device("meta"):
        assert rates(create_student("vgg16", 10)) == [0.5, 0.5]
        assert rates(create_model("vgg16", "baseline", 10)) == [0.5, 0.5]
        assert rates(create_model("vgg16", "ahbf", 10, 3)) == [0.5] * 6
        assert rates(vgg("mine", (1, 1, 1, 1, 1), dropout=0.0).build_branch(10, 1, 0)) == [0.0, 0.0]


# ---- initial weights


@pytest.mark.parametrize(
    "name",
    [
        "resnet20",
        "wrn20_8",
        "wrn16_2",
        "resnet18_imagenet",
        "resnext50_32x4d",
        "vgg13",
        "densenet40_12",
        "mobilenetv2_x0_5",
        "mobilenetv2_x1_0_imagenet",
        "shufflenetv2_x1_0",
        "xception",
    ],
)
def test_initial_weights_match_definition(name: str) -> None:
    torch.manual_seed(0)
    for layer, module in create_student(name, 100).named_modules():
        if isinstance(module, nn.Conv2d):
            fan = module.in_channels if name.startswith("densenet") else module.out_channels
            check_normal(module.weight, math.sqrt(2 / (module.kernel_size[0] ** 2 * fan)), layer)
            assert module.bias is None or not module.bias.any(), layer
        elif isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all(), layer
            assert (module.bias == 0).all(), layer
        elif isinstance(module, nn.Linear) and name.startswith(("vgg", "mobilenet")):
            check_normal(module.weight, 0.01, layer)
            assert not module.bias.any(), layer
        elif isinstance(module, nn.Linear):
            bound = 1 / math.sqrt(module.in_features)
            assert 0.9 * bound < module.weight.abs().max() <= bound, layer
            assert module.bias.any() != name.startswith(("densenet", "wrn16")), layer


def check_normal(weight: Tensor, std: float, where: str) -> None:
    """Mean 0 and this standard deviation within six standard errors, and tails that a uniform
    distribution has not.
    """
    count = weight.numel()
    assert abs(weight.mean().item()) < 6 * std / math.sqrt(count), where
    assert abs(weight.std().item() / std - 1) < 6 / math.sqrt(2 * count), where
    if count > 10_000:
        assert weight.abs().max() > 3 * std, where


# ---- compression


def stages(module: nn.Module, *names: str) -> tuple[int, ...]:
    return tuple(len(module.get_submodule(name)) for name in names)


def test_compression_removes_blocks_from_last_stage_first() -> None:
    resnet = shapes("resnet32", 100, 2, compression=True)
    assert [stages(branch.body, "layer2", "layer3") for branch in resnet.branches] == [
        (3, 1),
        (3, 3),
        (5, 3),
        (5, 5),
    ]
    assert [name for name, _ in resnet.trunk.named_children()] == ["conv1", "bn1", "relu", "layer1"]
    mobile = shapes("mobilenetv2_x0_5", 100, 1, compression=True)
    assert [stages(branch.body, "row96", "row160", "row320") for branch in mobile.branches] == [
        (2, 1, 1),
        (2, 2, 1),
        (3, 2, 1),
        (3, 3, 1),
    ]
    assert compressed_blocks((5, 5), 5, 1) == (3, 2)


def test_compression_exports_deepest_or_any_branch() -> None:
    model = create_model(
        "resnet14", "ahbf", 5, num_branches=3, aux_blocks=1, compression=True
    ).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        logits = model(x).logits
        assert model.kept == 2
        plain = create_student("resnet14", 5).eval()
        plain.load_state_dict(model.student().state_dict(), strict=True)
        assert torch.equal(plain(x), logits[2])
        assert [torch.equal(model.student(branch)(x), logits[branch]) for branch in range(3)] == [
            True
        ] * 3
    assert [stages(model.student(branch), "layer2", "layer3") for branch in range(3)] == [
        (1, 1),
        (2, 1),
        (2, 2),
    ]


@pytest.mark.parametrize("name", sorted(set(list_models()) - {"resnet8"}))
def test_compressed_network_is_smaller(name: str) -> None:
    with torch.device("meta"):
        model = create_model(name, "ahbf", 10, num_branches=2, aux_blocks=1, compression=True)
        smaller, kept = own_counts(model)
        assert smaller < kept
        assert {key: value.shape for key, value in model.student().state_dict().items()} == {
            key: value.shape for key, value in create_student(name, 10).state_dict().items()
        }
    size = get_backbone(name).image_size
    assert [
        tuple(logits.shape)
        for logits in model.eval()(torch.empty(2, 3, size, size, device="meta")).logits
    ] == [(2, 10)] * 2


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: create_model("resnet32", num_branches=4, aux_blocks=4, compression=True),
            (
                r"compression to 4 branches with aux_blocks=4: the stages have 5 and 5 blocks, too"
                r" few to take 3 x 4"
            ),
        ),
        (
            lambda: create_model("resnet8", num_branches=2, aux_blocks=1, compression=True),
            "the stages have 1 and 1 blocks, too few to take 1 x 1",
        ),
        (
            lambda: create_model("resnet32", "one", compression=True),
            "compression: method 'one' has branches of equal depth; use method 'ahbf'",
        ),
        (
            lambda: create_model("mine", num_branches=2, compression=True),
            "compression: model 'mine' does not say which of its blocks",
        ),
        (
            lambda: create_model("resnet8").student(4),
            "branch 4: this model has the branches 0 to 3",
        ),
        (lambda: create_student("vgg61", 10), r"unknown model 'vgg61'; did you mean 'vgg16'\?"),
        (
            lambda: create_student("resnet18_imgnet", 10),
            r"unknown model 'resnet18_imgnet'; did you mean 'resnet18_imagenet'\?",
        ),
    ],
)
def test_invalid_arguments_are_reported_with_fix(
    build: Callable[[], object], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock = get_backbone("resnet8")
    mine = Backbone("mine", stock.build_trunk, stock.build_branch, stock.join)
    # Private, because a registered network cannot be removed in a public way.
    targets = {**factory._models.targets, "mine": "mine"}
    monkeypatch.setattr(factory._models, "targets", targets)
    real = factory.get_backbone
    monkeypatch.setattr(
        factory, "get_backbone", lambda name: mine if name == "mine" else real(name)
    )
    with torch.device("meta"), pytest.raises(ConfigError, match=message):
        build()


@pytest.mark.parametrize(
    ("spelled", "name"),
    [
        ("WRN-16-2", "wrn16_2"),
        ("ResNet-32", "resnet32"),
        ("densenet40-12", "densenet40_12"),
        ("MobileNetV2 x0.5", "mobilenetv2_x0_5"),
    ],
)
def test_model_name_ignores_case_and_punctuation(spelled: str, name: str) -> None:
    with torch.device("meta"):
        assert create_model(spelled, "baseline").name == name
        assert (
            create_student(spelled, 10).state_dict().keys()
            == create_student(name, 10).state_dict().keys()
        )
    check_config(TrainConfig(model=spelled))


def test_too_small_images_are_refused() -> None:
    with torch.device("meta"):
        vgg, resnet = create_model("VGG-16"), create_model("resnet20")
    check_images(vgg, (32, 32), 32)
    check_images(resnet, (8, 8), 32)
    with pytest.raises(
        ConfigError,
        match=(
            r"cannot take images of 8 x 16 pixels .*; it is made for 32 x 32: pass --image-size 32"
        ),
    ):
        check_images(vgg, (8, 16), 32)


def test_compression_run_exports_deepest_branch() -> None:
    config = TrainConfig(model="resnet14", branches=3, aux_blocks=1, compression=True)
    model = build_model(config, 5, torch.device("cpu"))
    assert [stages(branch.body, "layer2", "layer3") for branch in model.branches] == [
        (1, 1),
        (2, 1),
        (2, 2),
    ]
    assert BranchEvaluator(config, model, torch.device("cpu")).kept == "branch3"
