"""FFM + CD: the loss with its fusion module and classifiers against float64, what it refuses, and a
run that resumes.
"""

import dataclasses

import numpy as np
import pytest
import torch
from method_runs import NETWORKS, check_resume, check_student, few_digits, losses_of_a_step
from oracles import methods as oracle
from torch import nn

from fastokd.errors import ConfigError
from fastokd.losses import FFMLoss
from fastokd.methods.ffm import FeatureFusion, classifier_diversity, classifier_weight
from fastokd.methods.modules import BranchPass
from fastokd.models import create_model
from fastokd.models.summary import count_parameters
from fastokd.train.config import TrainConfig
from fastokd.train.rules import check_config

CONFIG = TrainConfig(
    data="digits", model="resnet8", method="ffm", branches=3, epochs=2, batch_size=32, lr=0.05
)


def test_classifier_diversity_matches_worked_values():
    """|W1 W2^T| of the printed matrices is 10, |W1^T W2| (the paper's order, for W as features x
    classes) is 13.
    """
    one, other = torch.tensor([[1.0, 2.0], [3.0, -1.0]]), torch.tensor([[0.0, 1.0], [-2.0, 1.0]])
    assert classifier_diversity([one, other]).item() == 10
    assert classifier_diversity([one.T, other.T]).item() == 13
    # Three classifiers are three pairs; |W2 W2^T| is 8.
    assert classifier_diversity([one, other, other]).item() == 10 + 10 + 8
    rows = [torch.tensor([row]) for row in ((1.0, 0.0), (0.5, 1.0), (2.0, -1.0))]
    criterion = FFMLoss(3, lambda_cd=0.5)
    given = {"fusion_weights": torch.tensor([[0.5, 0.5]]), "classifiers": [one, other, other]}
    loss, terms = criterion(rows, torch.tensor([0]), **given, return_terms=True)
    plain = FFMLoss(3, lambda_cd=0.0)(
        rows, torch.tensor([0]), fusion_weights=given["fusion_weights"]
    )
    assert terms["classifier_diversity"].item() == 28
    assert (loss - plain).item() == pytest.approx(14, rel=1e-6)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("detach", [False, True])
def test_loss_and_gradients_match_formula(detach, impl):
    """Feature maps are given; from there on, classifiers, fusion module and loss are those of the
    oracle.

    The gradient is taken by a complex step in every single number, because batch norm ties the
    samples together.
    """
    torch.manual_seed(0)
    count, batch, channels, classes, w, gamma = 3, 3, 2, 4, 0.7, 0.05
    fusion = FeatureFusion(count - 1, channels, classes, 3).double()
    heads = nn.ModuleList(nn.Linear(channels, classes) for _ in range(count)).double()
    with torch.no_grad():
        fusion.bn.weight.uniform_(0.5, 1.5)
        fusion.bn.bias.uniform_(-0.5, 0.5)
    features = [
        torch.randn(batch, channels, 2, 2, dtype=torch.float64).requires_grad_()
        for _ in range(count)
    ]
    target = torch.tensor([3, 0, 2])
    logits = tuple(
        head(feature.mean((2, 3))) for head, feature in zip(heads, features, strict=True)
    )
    given = fusion(BranchPass(features[0], features[0], tuple(features), logits, heads))
    criterion = FFMLoss(count, lambda_cd=gamma, detach_teacher=detach, impl=impl)
    loss, terms = criterion.forward_backward(logits, target, kd_weight=w, **given)

    leaves = [
        *features,
        *(head.weight for head in heads),
        *(head.bias for head in heads),
        fusion.conv.weight,
        fusion.bn.weight,
        fusion.bn.bias,
        fusion.fc.weight,
        fusion.fc.bias,
    ]

    def formula(*values):
        maps, weights, biases, module = (
            values[:count],
            values[count : 2 * count],
            values[2 * count : 3 * count],
            values[3 * count :],
        )
        z = [
            x.mean((2, 3)) @ weight.T + bias
            for x, weight, bias in zip(maps, weights, biases, strict=True)
        ]
        shares = oracle.feature_fusion(maps[:-1], *module)
        return oracle.ffm(
            z[:-1], z[-1], shares, target.numpy(), w, detach=detach
        ).mean() + gamma * oracle.classifier_diversity(weights)

    values = [leaf.detach().numpy() for leaf in leaves]
    assert loss.item() == pytest.approx(formula(*values), rel=1e-6)  # the extra term is float32
    assert terms["classifier_diversity"].item() == pytest.approx(
        oracle.classifier_diversity(values[count : 2 * count]), rel=1e-6
    )
    step = 1e-40
    for number, leaf in enumerate(leaves):
        want = np.zeros(leaf.shape)
        for place in np.ndindex(*leaf.shape):
            moved = [
                value.astype(np.complex128) if k == number else value
                for k, value in enumerate(values)
            ]
            moved[number][place] += 1j * step
            want[place] = np.imag(formula(*moved)) / step
        got = np.zeros(leaf.shape) if leaf.grad is None else leaf.grad.numpy()
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-8, err_msg=f"leaf {number}")
    fused = [parameter.grad for parameter in fusion.parameters()]
    assert (
        all(grad is None or not grad.any() for grad in fused) == detach
    )  # no cross-entropy on the fusion


def test_ffm_fuses_auxiliaries_and_exports_leader():
    model = create_model("resnet8", "ffm", 10, 4).eval()
    result = model(torch.randn(5, 3, 16, 16))
    assert result.extras["fusion_weights"].shape == (5, 3)
    torch.testing.assert_close(result.extras["fusion_weights"].sum(1), torch.ones(5))
    assert [tuple(weight.shape) for weight in result.extras["classifiers"]] == [(10, 64)] * 4
    for weight, branch in zip(result.extras["classifiers"], model.branches, strict=True):
        assert weight.data_ptr() == branch.head.fc.weight.data_ptr()
    assert model.kept == 3
    # A 3x3 convolution of 3 * 64 channels, batch norm, and a linear layer to 3 values.
    assert count_parameters(model.companion) == 9 * 3 * 64 * 64 + 2 * 64 + 64 * 3 + 3
    assert (
        count_parameters(
            create_model("resnet8", "ffm", 10, 4, options={"fusion_channels": 8}).companion
        )
        == 9 * 3 * 64 * 8 + 2 * 8 + 8 * 3 + 3
    )
    rows = FFMLoss(4).named_logits(result.logits, **result.extras)
    assert list(rows) == ["branch1", "branch2", "branch3", "leader", "fusion", "ensemble"]
    torch.testing.assert_close(rows["ensemble"], torch.stack(result.logits[:3]).mean(0))


@pytest.mark.parametrize(
    ("head", "shape"),
    [
        (nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5)), (5, 8)),
        (nn.Sequential(nn.Conv2d(6, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()), (5, 6)),
    ],
)
def test_classifier_weight_of_head_has_shape(head, shape):
    assert classifier_weight(head, 5).shape == shape


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 7)), "to 5 classes, and the last is Linear"),
        (nn.Sequential(nn.Conv2d(6, 5, 3), nn.Flatten()), "5 classes, and the network has no such"),
    ],
)
def test_classifier_weight_without_classifier_is_refused(head, message):
    with pytest.raises(ValueError, match=message):
        classifier_weight(head, 5)


def test_ffm_loss_with_wrong_classifiers_is_refused():
    rows, weights = torch.randn(3, 2, 4), torch.full((2, 2), 0.5)
    for classifiers in (
        (),
        [torch.zeros(4, 2)] * 2,
        [torch.zeros(4, 2), torch.zeros(4, 3), torch.zeros(4, 2)],
    ):
        with pytest.raises(
            ValueError,
            match=(
                r"classifiers has the shapes \[.*\]; pass the 3 branches' classifier weights, each"
                r" \[C, d\], or set lambda_cd=0"
            ),
        ):
            FFMLoss(3)(rows, torch.tensor([0, 1]), fusion_weights=weights, classifiers=classifiers)
    with pytest.raises(
        ValueError, match=r"fusion_weights has the shape \(2, 3\); it must be \[2, 2\]"
    ):
        FFMLoss(3, lambda_cd=0)(rows, torch.tensor([0, 1]), fusion_weights=torch.full((2, 3), 0.5))


@pytest.mark.parametrize(
    ("options", "branches", "message"),
    [
        ({"lambda_cd": -1.0}, 4, "lambda_cd=-1.0; it must be a number of at least 0"),
        ({"detach_teacher": "no"}, 4, "detach_teacher='no'; it must be True or False"),
        ({}, 2, r"2 branches: method 'ffm' takes 3 to 8 \(its default is 4\)"),
        ({"gamma": 1}, 4, "unknown option 'gamma' of method 'ffm'"),
    ],
)
def test_wrong_options_are_refused(options, branches, message):
    with pytest.raises(ConfigError, match=message):
        check_config(
            TrainConfig(method="ffm", model="resnet8", branches=branches, method_options=options)
        )


def test_wrong_fusion_channels_are_refused():
    with pytest.raises(
        ConfigError, match=r"fusion_channels=1\.5; it must be an integer of at least 0"
    ):
        create_model("resnet8", "ffm", 10, 3, options={"fusion_channels": 1.5})


def test_reductions_other_than_the_mean_need_no_diversity():
    with pytest.raises(ValueError, match="classifier_diversity are means over the batch"):
        FFMLoss(3, reduction="none")
    rows = torch.randn(3, 2, 4)
    assert FFMLoss(3, lambda_cd=0, reduction="none")(
        rows, torch.tensor([0, 1]), fusion_weights=torch.full((2, 2), 0.5)
    ).shape == (2,)


@pytest.mark.parametrize("network", NETWORKS)
def test_step_lowers_the_loss(network):
    before, after = losses_of_a_step("ffm", network, 3, fusion_channels=16)
    assert after < before


def test_run_resumes_exactly_and_exports_leader(tmp_path):
    trainer = check_resume(CONFIG, tmp_path, few_digits())
    check_student(trainer, "resnet8", "leader")
    assert list(trainer.last) == ["branch1", "branch2", "leader", "fusion", "ensemble"]
    record = trainer.run_folder.read_metrics()[0]["train"]
    weighted = (
        sum(record[f"ce/{name}"] for name in ("branch1", "branch2", "leader"))
        + 5e-8 * record["classifier_diversity"]
    )
    weighted += trainer.config.kd_weight_at(0) * (
        record["kl/fusion->branch1"]
        + record["kl/fusion->branch2"]
        + 2 * record["kl/ensemble->leader"]
    )
    assert record["loss"] == pytest.approx(weighted, rel=1e-5)


def test_ramp_up_length_equals_okddip():
    assert TrainConfig(method="ffm", epochs=300).ramp_length() == 80
    assert dataclasses.replace(CONFIG, ramp_epochs=5).ramp_length() == 5
