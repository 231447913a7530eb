"""The branches' first convolutions as one: the same values and gradients, and nobody notices but
the clock.
"""

import copy

import pytest
import torch
from torch import nn

from fastokd.errors import ConfigError
from fastokd.methods import get_method
from fastokd.models import branch_out, create_model


def loss_of(model, x):
    method = get_method(model.method)
    result = model(x)
    loss = method.loss_class(num_branches=model.num_branches, impl="reference")
    return loss(
        result.logits,
        torch.arange(len(x)) % model.num_classes,
        **method.loss_inputs(result),
        kd_weight=0.5,
    )


# (network, where, method, convolutions in each merged one): a projection shortcut reads the input
# too.
CASES = [
    ("resnet8", None, "ahbf", [3, 3]),
    ("resnet8", None, "one", [3, 3]),
    ("resnet110", None, "ahbf", [3, 3]),
    ("torchvision:regnet_y_400mf", "trunk_output.block4", "ahbf", [3, 3]),
]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("name", "at", "method", "groups"), CASES, ids=lambda value: str(value))
def test_same_values_and_gradients(name, at, method, groups, channels_last):
    torch.manual_seed(0)
    apart = create_model(name, method, 5, num_branches=3, aux_blocks=1, at=at).double()
    layout = torch.channels_last if channels_last else torch.contiguous_format
    apart.to(memory_format=layout)
    x = torch.randn(4, 3, 32, 32, dtype=torch.float64).to(memory_format=layout)
    merged = copy.deepcopy(apart)
    merged.merged_first_conv = True
    assert [len(group.convs) for group in merged._merged.groups] == groups
    torch.testing.assert_close(loss_of(merged, x), loss_of(apart, x), rtol=1e-10, atol=1e-10)
    for model in (apart, merged):
        loss_of(model, x).backward()
    for (title, one), other in zip(apart.named_parameters(), merged.parameters(), strict=True):
        torch.testing.assert_close(
            other.grad,
            one.grad,
            rtol=1e-5,
            atol=1e-7,
            msg=lambda text, title=title: f"{title}: {text}",
        )
    # Running statistics were updated as often.
    torch.testing.assert_close(merged.state_dict(), apart.state_dict(), rtol=1e-9, atol=1e-9)


def test_it_runs_one_convolution_for_all(monkeypatch):
    model = create_model("resnet8", "ahbf", 5, num_branches=4, aux_blocks=0).eval()
    calls = []
    plain = torch.nn.functional.conv2d

    def conv2d(x, weight, *rest, **options):
        calls.append((x.shape[1], weight.shape[0]))
        return plain(x, weight, *rest, **options)

    monkeypatch.setattr(torch.nn.functional, "conv2d", conv2d)
    x = torch.randn(2, 3, 32, 32)
    model(x)
    assert calls.count((32, 64)) == 8
    calls.clear()
    model.merged_first_conv = True
    model(x)
    assert calls.count((32, 64)) == 0
    assert calls.count((32, 256)) == 2


def test_state_student_optimizer_and_copies_do_not_know():
    torch.manual_seed(0)
    model = create_model("resnet8", "ahbf", 5, num_branches=3, aux_blocks=1)
    keys, identities = list(model.state_dict()), [id(parameter) for parameter in model.parameters()]
    x = torch.randn(4, 3, 32, 32)
    model.eval()
    before = model(x)
    model.merged_first_conv = True
    assert model.merged_first_conv
    assert list(model.state_dict()) == keys
    assert [id(parameter) for parameter in model.parameters()] == identities
    torch.testing.assert_close(model(x).logits, before.logits, rtol=1e-4, atol=1e-5)
    assert torch.equal(model.student()(x), before.logits[0])

    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    torch.testing.assert_close(other(x).logits, before.logits, rtol=1e-4, atol=1e-5)
    assert not model(x).logits[0].any()

    other.load_state_dict(model.state_dict())
    assert not other(x).logits[0].any()
    other.merged_first_conv = False
    assert not other.merged_first_conv
    assert not other(x).logits[0].any()


def test_training_flags_stay_as_they_are():
    model = create_model("resnet8", "ahbf", 5, num_branches=2, aux_blocks=0)
    model.branches[0].eval()
    before = [module.training for module in model.modules()]
    model.merged_first_conv = True
    assert [module.training for module in model.modules()] == before
    running = model.branches[1].body.layer3[0].bn1.running_mean.clone()
    model(torch.randn(4, 3, 32, 32))
    assert not torch.equal(model.branches[1].body.layer3[0].bn1.running_mean, running)
    assert not model.branches[0].body.layer3[0].bn1.running_mean.any()


def test_compiles_as_one_graph():
    model = create_model("resnet8", "ahbf", 5, num_branches=3, aux_blocks=1).eval()
    model.merged_first_conv = True
    x = torch.randn(2, 3, 32, 32)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(tuple(compiled(x).logits), tuple(model(x).logits))
    model.train()
    assert len(compiled(x).logits) == 3


class Branched(nn.Module):
    """A plain network that ends as one likes."""

    def __init__(self, tail):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU())
        self.tail = tail
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        return self.fc(self.tail(self.stem(x)).mean((2, 3)))


def branched(*tail):
    return branch_out(Branched(nn.Sequential(*tail)), at="tail", num_branches=2, method="one")


def test_biases_are_merged():
    model = branched(nn.Conv2d(4, 8, 3, 2, bias=True), nn.BatchNorm2d(8), nn.ReLU()).eval()
    with torch.no_grad():
        for branch in model.branches:
            branch.body.tail[0].bias.normal_()
    x = torch.randn(2, 3, 16, 16)
    before = model(x).logits
    model.merged_first_conv = True
    torch.testing.assert_close(model(x).logits, before)


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: create_model("resnet8", "baseline"), "there is one branch"),
        (
            lambda: branched(nn.BatchNorm2d(4), nn.Conv2d(4, 8, 3)),
            r"branch1's 'tail\.0' is a BatchNorm2d, no convolution",
        ),
        (
            lambda: branched(nn.Conv2d(4, 8, 3, groups=4), nn.ReLU()),
            r"branch1's 'tail\.0' has groups=4",
        ),
        (
            lambda: create_model(
                "torchvision:densenet121",
                "ahbf",
                at="features.denseblock4",
                aux_blocks=0,
                num_branches=2,
            ),
            "branch1 reads its input with cat",
        ),
    ],
)
def test_what_cannot_be_merged_says_why(build, reason):
    model = build()
    with pytest.raises(ConfigError, match=rf"merged_first_conv: .*{reason}"):
        model.merged_first_conv = True
    assert not model.merged_first_conv


def test_other_geometry_is_not_merged():
    model = branched(nn.Conv2d(4, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8))
    model.branches[1].body.tail[0] = nn.Conv2d(4, 8, 5, stride=2, padding=2)
    with pytest.raises(ConfigError, match="differ in kernel, stride, padding"):
        model.merged_first_conv = True
