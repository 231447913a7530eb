"""Stochastic depth: rates over depth, the blocks that are skipped, and runs with it."""

import dataclasses

import pytest
import torch
from method_runs import SHORT_RUN, few_digits, make
from test_interruption import assert_equal, interrupted, outcome
from torchvision.ops import StochasticDepth

from fastokd.errors import ConfigError
from fastokd.export import load_student
from fastokd.models import create_model, create_student
from fastokd.models.residual import BasicBlock, Bottleneck, PreActivationBlock
from fastokd.train.build import build_model
from fastokd.train.config import TrainConfig, identity_fields
from fastokd.train.rules import check_config

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def digits():
    return few_digits(64)


def rates(module):
    """The rates of a module's blocks in order, 0 where there is no stochastic depth."""
    blocks = (BasicBlock, Bottleneck, PreActivationBlock)
    found = [block.drop_path for block in module.modules() if isinstance(block, blocks)]
    return [0.0 if each is None else each.p for each in found]


@pytest.mark.parametrize("name", ["resnet20", "wrn16_2", "resnet110", "resnext50_32x4d"])
def test_rates_rise_linearly_to_the_given_one(name):
    model = create_model(name, "baseline", drop_path=0.3)
    count = len(rates(model))
    assert rates(model) == pytest.approx([0.3 * place / (count - 1) for place in range(count)])


def test_rates_of_branches_follow_their_depth():
    """ResNet-20 has three stages of three blocks; branches 2 and 3 have two and four more."""
    model = create_model("resnet20", "ahbf", num_branches=3, aux_blocks=2, drop_path=0.4)
    step = 0.4 / 8
    assert rates(model.trunk) == pytest.approx([step * place for place in range(6)])
    last = [step * place for place in (6, 7, 8)]
    for index, branch in enumerate(model.branches):
        assert rates(branch) == pytest.approx(last + [0.4] * 2 * index)


def test_rates_of_different_peers_follow_their_own_depth():
    model = create_model("resnet8,resnet20", "dml", drop_path=0.4)
    for branch, count in zip(model.branches, (3, 9), strict=True):
        expected = [0.4 * place / (count - 1) for place in range(count)]
        assert rates(branch) == pytest.approx(expected)


@pytest.mark.parametrize("kind", [BasicBlock, PreActivationBlock])
def test_block_is_skipped_for_random_images(kind):
    block = kind(8, 8)
    block.set_drop_path(0.5)
    plain = kind(8, 8)
    plain.load_state_dict(block.state_dict())
    images = torch.rand(16, 8, 4, 4)  # positive, as after ReLU
    layers = []
    plain.add = lambda out, shortcut: layers.append(out) or out + shortcut
    plain(images)
    torch.manual_seed(3)
    out = block(images)
    torch.manual_seed(3)
    kept = torch.empty(16, 1, 1, 1).bernoulli_(0.5)
    assert 0 < kept.sum() < 16
    expected = images + kept / 0.5 * layers[0]
    if kind is BasicBlock:
        expected = expected.relu()
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("rate", [None, 0.0])
def test_model_without_drop_path_has_no_layer_of_it(rate):
    model = create_model("resnet8", "ahbf", num_branches=2, drop_path=rate)
    assert not any(isinstance(each, StochasticDepth) for each in model.modules())


def test_initial_weights_and_evaluation_do_not_depend_on_it():
    config = dataclasses.replace(SHORT_RUN, drop_path=0.5)
    plain, model = (build_model(each, 10, CPU).eval() for each in (SHORT_RUN, config))
    assert_equal(plain.state_dict(), model.state_dict())
    images = torch.randn(2, 3, 32, 32)
    for one, other in zip(plain(images).logits, model(images).logits, strict=True):
        assert torch.equal(one, other)
    model.train()
    assert not torch.equal(model(images).logits[0], model(images).logits[0])


@pytest.mark.parametrize(
    ("name", "at", "block"),
    [
        ("timm:test_resnet", "layer3", "DropPath"),
        ("torchvision:convnext_tiny", "features.5", "StochasticDepth"),
        ("torchvision:swin_t", "features.5", "StochasticDepth"),  # its constructor sets the rate
    ],
)
def test_libraries_apply_the_rate_in_all_branches(name, at, block):
    def found(module):
        kinds = (block, "StochasticDepth")  # the latter also in blocks that are not copies
        layers = [each for each in module.modules() if type(each).__name__ in kinds]
        return [getattr(each, "p", getattr(each, "drop_prob", None)) for each in layers]

    with torch.device("meta"):
        model = create_model(name, "ahbf", 10, 2, 1, at=at, drop_path=0.4)
        alone = create_model(name, "baseline", 10, drop_path=0.4)
    whole = found(alone)
    assert max(whole) == pytest.approx(0.4)
    assert whole == sorted(whole)
    assert found(model.trunk) + found(model.branches[0]) == pytest.approx(whole)
    more = found(model.branches[1])
    assert len(more) > len(found(model.branches[0]))
    assert max(more) == pytest.approx(0.4)
    if block == "DropPath":  # one block in a stage: the additional one is at the end
        assert more[-1] == pytest.approx(0.4)


def test_compiled_model_has_no_graph_break():
    model = create_model("resnet8", "ahbf", num_branches=2, drop_path=0.5).train()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    images = torch.randn(4, 3, 32, 32)
    results = []
    for network in (model, compiled):
        torch.manual_seed(5)
        results.append(network(images).logits[1])
    torch.testing.assert_close(*results)


def test_rate_of_zero_switches_off_that_of_a_library():
    with torch.device("meta"):
        usual, off = (
            create_model("torchvision:convnext_tiny", "baseline", drop_path=rate)
            for rate in (None, 0.0)
        )
    largest = [
        max(each.p for each in model.modules() if isinstance(each, StochasticDepth))
        for model in (usual, off)
    ]
    assert largest == [pytest.approx(0.1), 0.0]
    create_student("timm:vgg11")
    check_config(TrainConfig(model="timm:vgg11", method="baseline", branches=1, drop_path=0.0))


@pytest.mark.parametrize("name", ["vgg13", "densenet40_12", "timm:vgg11", "torchvision:resnet18"])
def test_networks_without_it_are_refused_by_name(name):
    config = TrainConfig(model=name, method="baseline", branches=1, drop_path=0.2)
    with pytest.raises(ConfigError, match=f"{name} has no stochastic depth; these networks have"):
        check_config(config)


@pytest.mark.parametrize("rate", [-0.1, 1.0])
def test_rate_outside_its_range_is_refused(rate):
    with pytest.raises(ConfigError, match=f"drop_path={rate}"):
        check_config(dataclasses.replace(SHORT_RUN, drop_path=rate))


def test_identity_of_runs_without_it_is_unchanged():
    assert "drop_path" not in dict(identity_fields(SHORT_RUN))
    config = dataclasses.replace(SHORT_RUN, drop_path=0.1)
    assert dict(identity_fields(config))["drop_path"] == 0.1


def test_resumed_run_is_equal_and_exports_a_plain_student(tmp_path, digits):
    config = dataclasses.replace(SHORT_RUN, drop_path=0.5)
    straight = make(config, tmp_path / "straight", digits)
    straight.run()
    resumed = interrupted(config, tmp_path / "other", digits, step=1)
    assert_equal(outcome(resumed), outcome(straight))
    student, record = load_student(straight.run_folder.student)
    assert not any(isinstance(each, StochasticDepth) for each in student.modules())
    assert "drop_path" not in record["architecture"]
    images = torch.randn(2, 3, 32, 32)
    live = straight.model.student().eval()
    assert any(isinstance(each, StochasticDepth) for each in live.modules())
    torch.testing.assert_close(student.cpu()(images), live(images))
