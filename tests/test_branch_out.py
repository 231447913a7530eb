"""Any classifier of torchvision or timm: branched where it is asked for, and the student is that
classifier again.
"""

import copy
import dataclasses
import sys

import pytest
import torch
import torchvision
from torch import nn

from fastokd.errors import ConfigError, MissingExtra
from fastokd.methods import get_method
from fastokd.methods.method import MethodBatch
from fastokd.models import (
    allowed_methods,
    branch_out,
    create_model,
    create_student,
    find_backbone,
    list_split_points,
)
from fastokd.models.branch_out import GrowingBlock
from fastokd.models.summary import check_images, count_parameters, model_costs

# (name, where, image size): the smallest of each family that splits in a late stage.
FAMILIES = [
    ("torchvision:resnet18", "layer4", 32),
    ("torchvision:resnext50_32x4d", "layer4", 32),
    ("torchvision:mobilenet_v2", "features.14", 32),
    ("torchvision:mobilenet_v3_small", "features.9", 32),
    ("torchvision:efficientnet_b0", "features.6", 32),
    ("torchvision:convnext_tiny", "features.7", 32),
    ("torchvision:regnet_y_400mf", "trunk_output.block4", 32),
    ("torchvision:densenet121", "features.denseblock4", 32),
    ("torchvision:squeezenet1_1", "features.10", 64),
    ("torchvision:shufflenet_v2_x0_5", "stage4", 32),
    ("torchvision:swin_t", "features.7", 64),
    ("timm:resnet18", "layer4", 32),
    ("timm:convnext_atto", "stages.3", 32),
    ("timm:efficientnet_b0", "blocks.5", 32),
    ("timm:vit_tiny_patch16_224", "blocks.10", 224),
]
# Several hundred megabytes: only what can be said without values.
LARGE = [
    ("torchvision:wide_resnet50_2", "layer4"),
    ("torchvision:vgg11", "features.16"),
    ("torchvision:vgg11_bn", "features.22"),
    ("torchvision:vit_b_16", "encoder.layers.encoder_layer_10"),
]


def skip_without(name):
    if name.startswith("timm:"):
        pytest.importorskip("timm")


def warm(model, x):
    """Batch norms with the statistics of a batch."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model.train()(x)
    return model.eval()


@pytest.mark.parametrize(("name", "at", "size"), FAMILIES, ids=lambda value: str(value))
def test_network_families_can_be_branched(name, at, size):
    """Two branches, the second deeper: finite gradients everywhere, and the student bit for bit in
    the stock constructor.
    """
    skip_without(name)
    torch.manual_seed(0)
    model = create_model(name, "ahbf", 5, num_branches=2, aux_blocks=1, at=at)
    x = torch.randn(2, 3, size, size)
    result = model.train()(x)
    method = get_method("ahbf")
    batch = MethodBatch(torch.arange(2))
    method.loss(method.loss_class(num_branches=2), result, batch, kd_weight=0.5).backward()
    for title, parameter in model.named_parameters():
        assert parameter.grad is not None, title
        assert parameter.grad.isfinite().all(), title
    own = [count_parameters(branch) for branch in model.branches]
    assert own[1] > own[0]

    warm(model, x)
    stock = create_student(name, 5).eval()
    student = model.student()
    assert type(student) is type(stock)
    assert list(student.state_dict()) == list(stock.state_dict())
    assert count_parameters(model.trunk) + own[0] == count_parameters(stock)
    with torch.no_grad():
        result = model(x)
        stock.load_state_dict(student.state_dict(), strict=True)
        for network in (student, stock):
            assert torch.equal(network(x), result.logits[0])
        assert torch.equal(model.student(1)(x), result.logits[1])
    channels = [branch.channels for branch in model.branches]
    assert [(maps.dim(), maps.shape[1]) for maps in result.features] == [(4, c) for c in channels]


@pytest.mark.parametrize(("name", "at"), LARGE, ids=lambda value: str(value))
def test_large_network_families_can_be_branched(name, at):
    with torch.device("meta"):
        model = create_model(name, "ahbf", 5, num_branches=3, aux_blocks=2, at=at)
        stock = create_student(name, 5)
    student = model.student()
    assert type(student) is type(stock)
    assert {key: value.shape for key, value in student.state_dict().items()} == {
        key: value.shape for key, value in stock.state_dict().items()
    }
    check_images(model, (224, 224), 224)
    costs = model_costs(model, 224)
    assert costs["student"] == costs["branch1"]
    assert costs["student"].parameters == count_parameters(stock)
    steps = [
        costs["branch2"].parameters - costs["branch1"].parameters,
        costs["branch3"].parameters - costs["branch2"].parameters,
    ]
    assert steps[0] == steps[1] > 0


class Small(nn.Module):
    """A residual network in little, with what cutting has to mind: dropout as a function, a shape
    in use, a spare layer.
    """

    def __init__(self, num_classes=6, drop=0.25):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.stage1 = nn.Sequential(Residual(8, 8), Residual(8, 8))
        self.stage2 = nn.Sequential(Residual(8, 12), Residual(12, 12), Residual(12, 12))
        self.spare = nn.Linear(3, 3)
        self.fc = nn.Linear(12, num_classes)
        self.drop = drop

    def forward(self, x, unused=None):
        x = self.stage2(self.stage1(self.stem(x)))
        x = torch.nn.functional.dropout(x.mean((2, 3)), self.drop, training=self.training)
        return self.fc(x)


class Residual(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.skip = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, x, scale=None):
        out = self.conv2(self.bn1(self.conv1(x)).relu())
        return (self.bn2(out) + self.skip(x)).relu()


def small(trained=False, **options):
    torch.manual_seed(1)
    network = Small(**options)
    if trained:
        with torch.no_grad():
            for norm in network.modules():
                if isinstance(norm, nn.BatchNorm2d):
                    norm.weight.uniform_(0.5, 1.5)
                    norm.bias.normal_()
        warm(network, torch.randn(4, 3, 16, 16))
    return network


X = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(3))


def test_student_equals_original_module():
    network = small(trained=True)
    before = copy.deepcopy(network.state_dict())
    model = branch_out(network, at="stage2", num_branches=3, deepen=1).eval()
    student = model.student()
    assert type(student) is Small
    torch.testing.assert_close(student.state_dict(), before, rtol=0, atol=0)  # the spare layer too
    torch.testing.assert_close(network.state_dict(), before, rtol=0, atol=0)
    assert torch.equal(student(X), network.eval()(X))
    assert model.num_classes == 6
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    torch.testing.assert_close(model.student().state_dict(), before, rtol=0, atol=0)


def test_deeper_branches_start_equal_to_trained_module():
    network = small(trained=True).eval()
    model = branch_out(network, at="stage2", num_branches=3, deepen=2).eval()
    assert [
        sum(isinstance(block, GrowingBlock) for block in branch.modules())
        for branch in model.branches
    ] == [0, 2, 4]
    for logits in model(X).logits:
        torch.testing.assert_close(logits, network(X))
    model(X).logits[1].square().sum().backward()
    assert all(
        block.scale.grad.abs() > 0
        for block in model.branches[1].modules()
        if isinstance(block, GrowingBlock)
    )


def test_equal_depth_branches_of_trained_module_differ():
    network = small(trained=True).eval()
    model = branch_out(network, at="stage2", num_branches=3, method="one").eval()
    logits = model(X).logits
    assert torch.equal(logits[model.kept], network(X))
    spread = network(X).std()
    for first, second in ((0, 1), (1, 2), (0, 2)):
        distance = (logits[first] - logits[second]).abs().max()
        assert 1e-4 < distance / spread < 3


def test_exported_branch_at_any_position_is_original_module(monkeypatch):
    last = dataclasses.replace(get_method("one"), kept=-1)
    # The function of this name hides the module.
    monkeypatch.setattr(sys.modules["fastokd.models.branch_out"], "get_method", lambda name: last)
    network = small(trained=True).eval()
    model = branch_out(network, at="stage2", num_branches=3, method="one", init="fresh").eval()
    assert model.kept == 2
    assert torch.equal(model.student()(X), network(X))


def test_branches_of_untrained_module_are_reinitialized():
    network = small()
    model = branch_out(network, at="stage2", num_branches=2, deepen=1)
    kernels = [branch.body.stage2[0].conv1.weight for branch in model.branches]
    own = network.stage2[0].conv1.weight
    assert torch.equal(kernels[0], own)
    assert not torch.equal(kernels[1], own)
    assert kernels[1].std().item() == pytest.approx(own.std().item(), rel=0.15)
    assert kernels[1].mean().item() == pytest.approx(0, abs=0.03)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert all((norm.weight == 1).all() and (norm.bias == 0).all() for norm in norms)


def test_fresh_branches_of_trained_module_reset_statistics():
    model = branch_out(small(trained=True), at="stage2", num_branches=2, deepen=0, init="fresh")
    for norm in model.branches[1].modules():
        if isinstance(norm, nn.BatchNorm2d):
            assert (norm.running_mean == 0).all()
            assert (norm.weight == 1).all()
    assert any(
        (norm.running_mean != 0).any()
        for norm in model.branches[0].modules()
        if isinstance(norm, nn.BatchNorm2d)
    )


def test_dropout_functions_follow_the_training_flag():
    model = branch_out(small(drop=0.5), at="stage2", num_branches=2, deepen=0)
    model.eval()
    assert torch.equal(model(X).logits[0], model(X).logits[0])
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    model.train()
    for norm in norms:
        norm.eval()
    assert not torch.equal(model(X).logits[0], model(X).logits[0])


def test_other_number_of_classes_replaces_last_layer():
    network = small()
    with pytest.warns(
        UserWarning,
        match="Small has 6 classes: its last layer 'fc' is replaced by a fresh one for 9",
    ):
        model = branch_out(network, at="stage2", num_branches=2, num_classes=9)
    assert [row.shape[1] for row in model(X).logits] == [9, 9]
    assert model.student().fc.out_features == 9
    assert network.fc.out_features == 6
    heads = [branch.head.fc.weight for branch in model.branches]
    assert not torch.equal(*heads)
    with pytest.warns(UserWarning, match=r"'classifier\.1'"):
        student = branch_out(
            torchvision.models.squeezenet1_1(weights=None),
            at="features.10",
            num_branches=2,
            num_classes=3,
            input_size=(3, 64, 64),
        ).student()
    assert student.eval()(torch.randn(1, 3, 64, 64)).shape == (1, 3)


def test_split_points_are_accepted():
    with torch.device("meta"):
        network = torchvision.models.resnet18()
    points = list_split_points(network)
    assert points == [
        "layer1",
        "layer1.1",
        "layer2",
        "layer2.1",
        "layer3",
        "layer3.1",
        "layer4",
        "layer4.1",
    ]
    assert list_split_points(small()) == ["stage1", "stage1.1", "stage2", "stage2.1", "stage2.2"]
    for at in list_split_points(small()):
        model = branch_out(small(), at=at, num_branches=2, deepen=0).eval()
        assert torch.equal(model.student()(X), small().eval()(X)), at


def test_runs_compiled_channels_last_and_copied():
    network = small(trained=True)
    model = (
        branch_out(network, at="stage2", num_branches=2, deepen=1)
        .to(memory_format=torch.channels_last)
        .eval()
    )
    x = X.to(memory_format=torch.channels_last)
    with torch.no_grad():
        result = model(x)
        assert all(
            maps.is_contiguous(memory_format=torch.channels_last) for maps in result.features
        )
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x).logits, result.logits, rtol=0, atol=0)
        torch.testing.assert_close(copy.deepcopy(model)(x).logits, result.logits, rtol=0, atol=0)
    assert model.student().stem.weight.is_contiguous(memory_format=torch.channels_last)


def test_token_networks_compile_and_give_maps_to_gates():
    pytest.importorskip("timm")
    model = create_model(
        "timm:vit_tiny_patch16_224", "ahbf", 4, num_branches=2, aux_blocks=0, at="blocks.11"
    ).eval()
    x = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        result = model(x)
        tokens = model.branches[0].body(model.trunk(x))
        assert tokens.shape == (2, 197, 192)
        assert torch.equal(result.features[0][1, :, 2, 5], tokens[1, 1 + 2 * 14 + 5])
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x).logits, result.logits, rtol=0, atol=0)


def test_peers_of_one_library_network_have_separate_weights():
    backbone = find_backbone("torchvision:shufflenet_v2_x0_5", num_classes=4)
    networks = [
        backbone.join(backbone.build_trunk(), backbone.build_branch(4, 1, 0)) for _ in range(2)
    ]
    weights = [
        [network.conv1[0].weight, network.conv5[0].weight, network.fc.weight]
        for network in networks
    ]
    for first, second in zip(*weights, strict=True):
        assert not torch.equal(first, second)
    assert allowed_methods("torchvision:shufflenet_v2_x0_5")[:2] == ["ahbf", "baseline"]


class Scaled(Small):
    """Blocks that take more than maps."""

    def forward(self, x):
        x = self.stage1(self.stem(x))
        for block in self.stage2:
            x = block(x, scale=None)
        return self.fc(x.mean((2, 3)))


def test_added_blocks_are_called_like_repeated_block():
    torch.manual_seed(1)
    network = Scaled().eval()
    model = branch_out(network, at="stage2.1", num_branches=2, deepen=2, init="copy").eval()
    assert [count_parameters(branch.body) for branch in model.branches][1] > 2 * count_parameters(
        network.stage2[1]
    )
    torch.testing.assert_close(model(X).logits[1], network(X))


class NoClassifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)

    def forward(self, x):
        return self.b(self.a(x))


class Moody(Small):
    """Something else in training."""

    def forward(self, x):
        x = self.stage2(self.stage1(self.stem(x))).mean((2, 3))
        return (self.fc(x), self.spare(x)) if self.training else self.fc(x)


class Undecided(Small):
    """Looks at values."""

    def forward(self, x):
        return super().forward(x if x.sum() > 0 else -x)


class Tied(Small):
    """One block in the trunk and again in the tail."""

    def forward(self, x):
        x = self.stage1(self.stem(x))
        return self.fc(self.stage2(self.stage1(self.stage1(x))).mean((2, 3)))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: branch_out(small(), at="stage3"),
            (
                r"at='stage3': Small has no module of that name; did you mean 'stage\d'\?"
                r" \(choices: stage1, .*stage2.2\)"
            ),
        ),
        (
            lambda: branch_out(small(), at="stage2.1.conv2"),
            (
                r"at='stage2.1.conv2': Small cannot be split there: 2 tensors cross this point"
                r" .*residual.*; split points: stage1, "
            ),
        ),
        (lambda: branch_out(small(), at="stem"), r"at='stem': .* no parameters before this point"),
        (lambda: branch_out(small(), at="fc"), r"at='fc': .* it comes after the last feature maps"),
        (lambda: branch_out(small(), at="spare"), r"at='spare': .* its forward does not call it"),
        (
            lambda: branch_out(Tied(), at="stage1.1"),
            "at='stage1.1': .*(used on both sides|tensors cross this point)",
        ),
        (
            lambda: branch_out(NoClassifier(), at="b"),
            r"NoClassifier is no classifier: for one image it returns \[1, 4, 220, 220\]",
        ),
        (lambda: branch_out(Moody(), at="stage2"), "Moody differs between training"),
        (
            lambda: branch_out(Undecided(), at="stage2"),
            "the forward of Undecided cannot be followed",
        ),
        (
            lambda: branch_out(small(), at="stage2", init="clone"),
            r"unknown init 'clone' \(choices: auto, copy, fresh\)",
        ),
        (
            lambda: branch_out(small(), at="stage2", deepen=-1),
            "deepen=-1; it must be a whole number",
        ),
        (
            lambda: branch_out(small(), at="stage2", num_branches=1),
            "1 branches: method 'ahbf' takes 2 to 8",
        ),
        (
            lambda: branch_out(small(), at="stage2", num_classes=1),
            "num_classes=1; a classifier needs",
        ),
        (
            lambda: branch_out(small(), at="stage2", input_size=(4, 8, 8)),
            "Small cannot take an image of 4 x 8 x 8",
        ),
        (
            lambda: create_model("torchvision:resnet81"),
            "torchvision has no classifier 'resnet81'; did you mean 'resnet18'",
        ),
        (
            lambda: create_model("hub:resnet18"),
            r"model 'hub:resnet18': 'hub' is neither .* \(choices: timm, torchvision\)",
        ),
        (
            lambda: create_model("resnet20", at="layer3"),
            "at='layer3': resnet20 is branched as in its paper",
        ),
        (
            lambda: create_model("torchvision:densenet121", at="features.denseblock4.denselayer3"),
            "as inside a residual or dense block",
        ),
    ],
)
def test_invalid_arguments_are_reported_with_fix(build, message):
    with pytest.raises(ConfigError, match=message) as caught:
        build()
    assert "\n" not in str(caught.value)


def test_unknown_timm_name_is_suggested(monkeypatch):
    pytest.importorskip("timm")
    with pytest.raises(
        ConfigError,
        match=r"timm has no network 'resnet81'; did you mean '.*'\? timm.list_models\(\) lists all",
    ):
        create_student("timm:resnet81", 10)
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(MissingExtra, match=r"pip install -e '\.\[timm\]'"):
        create_student("timm:resnet18", 10)


def test_images_of_unsupported_size_are_refused():
    pytest.importorskip("timm")
    with torch.device("meta"):
        model = create_model("timm:vit_tiny_patch16_224", "baseline", 10)
    with pytest.raises(
        ConfigError, match=r"the network cannot take images of 32 x 32 pixels .*224.*--image-size"
    ):
        check_images(model, (32, 32), 224)


class Joint(nn.Module):
    """Three blocks, of which the last two scale by one tensor."""

    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b, self.c = (
            nn.Conv2d(inputs, 4, 3, padding=1) for inputs in (3, 4, 4, 4)
        )
        self.scale = nn.Parameter(torch.ones(1, 4, 1, 1))
        self.fc = nn.Linear(4, 5)

    def forward(self, x):
        x = self.a(self.stem(x))
        return self.fc(self.c(self.b(x) * self.scale).mul(self.scale).mean((2, 3)))


def test_split_points_with_shared_tensor_are_not_listed():
    points = list_split_points(Joint(), (3, 16, 16))
    assert points == ["a", "b"]
    for at in points:
        branch_out(Joint(), at=at, num_branches=2, method="one", input_size=(3, 16, 16))
    with pytest.raises(
        ConfigError,
        match=(
            r"at='c': Joint cannot be split there: 'scale' is used on both sides; split points:"
            r" a, b$"
        ),
    ):
        branch_out(Joint(), at="c", num_branches=2, method="one", input_size=(3, 16, 16))


class Fuse(nn.Module):
    def forward(self, maps):
        maps[0] = maps[0] + maps[1]
        return maps[0]


class WritesToItsList(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.other, self.fuse, self.fc = (
            nn.Conv2d(3, 4, 3),
            nn.Conv2d(3, 4, 3),
            Fuse(),
            nn.Linear(4, 5),
        )

    def forward(self, x):
        return self.fc(self.fuse([self.stem(x), self.other(x)]).mean((2, 3)))


def test_untraceable_network_error_does_not_suggest_image_size():
    assert WritesToItsList()(torch.randn(1, 3, 8, 8)).shape == (1, 5)
    with pytest.raises(
        ConfigError,
        match=r"the forward of WritesToItsList cannot be followed by torch\.fx .*immutable_list",
    ) as told:
        list_split_points(WritesToItsList(), (3, 8, 8))
    assert "input_size" not in str(told.value)
    with pytest.raises(ConfigError, match=r"cannot take an image of 3 x 2 x 2 .*pass input_size"):
        list_split_points(Joint().apply(lambda layer: setattr(layer, "padding", (0, 0))), (3, 2, 2))
