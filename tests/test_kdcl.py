"""KDCL: the teacher that each variant makes, the loss against its equations, separate views,
and held-out images.
"""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from method_runs import NETWORKS, check_resume, check_student, few_digits, losses_of_a_step, make
from oracles import methods as oracle
from oracles.rows import complex_step, cross_entropy

from fastokd.errors import ConfigError
from fastokd.losses import KDCLLoss
from fastokd.methods.kdcl import VARIANTS, error_correlation_weights
from fastokd.methods.simplex import lowest_cross_entropy_weights
from fastokd.train.config import TrainConfig
from fastokd.train.rules import check_config
from fastokd.train.runs import load_run

Z = [
    torch.tensor([row], dtype=torch.float64)
    for row in ((1.0, 0.0, -1.0), (0.5, 1.0, -0.5), (2.0, -1.0, 0.5))
]
LABEL = torch.tensor([0])
PRINTED = 1.1e-6


def weights_of(rows, target):
    return lowest_cross_entropy_weights(rows, target).numpy()


def test_linear_weights_match_worked_values():
    # The optimum is a vertex, met exactly.
    assert weights_of(Z[:2], LABEL) == pytest.approx(np.array([[1.0, 0.0]]), abs=1e-12)
    pair = [
        torch.tensor([row], dtype=torch.float64) for row in ((1.0, 2.0, -3.0), (1.0, -3.0, 2.0))
    ]
    assert weights_of(pair, LABEL) == pytest.approx(np.array([[0.5, 0.5]]), abs=1e-9)
    mixed = KDCLLoss(2, "linear").graph_inputs(pair, LABEL).weights[
        "teacher_weights"
    ].numpy() @ np.concatenate(pair)
    assert cross_entropy(mixed, LABEL.numpy())[0] == pytest.approx(0.368981, abs=PRINTED)


def test_general_weights_match_worked_values():
    assert error_correlation_weights(
        torch.tensor([[0.04, 0.01], [0.01, 0.09]])
    ).tolist() == pytest.approx([0.727273, 0.272727], abs=PRINTED)
    # C^-1 1 is (12, -2) here: the negative weight is 0, and the other one is all.
    assert error_correlation_weights(torch.tensor([[0.04, 0.07], [0.07, 0.19]])).tolist() == [
        1.0,
        0.0,
    ]
    assert error_correlation_weights(torch.full((3, 3), 0.5)).tolist() == pytest.approx([1 / 3] * 3)
    assert error_correlation_weights(torch.zeros(2, 2)).tolist() == [0.5, 0.5]


def test_loss_teachers_match_worked_values():
    _, terms = KDCLLoss(3, "naive")(Z, LABEL, return_terms=True)
    assert terms["kl/teacher->branch3"].item() == pytest.approx(0, abs=1e-12)
    z = [row.numpy() for row in Z]
    for variant, teacher in (("naive", z[2]), ("minlogit", np.array([[0.0, -3.0, -2.0]]))):
        loss = KDCLLoss(3, variant)(Z, LABEL, kd_weight=0.5)
        assert loss.item() == pytest.approx(
            oracle.kdcl(z, teacher, LABEL.numpy(), 0.5, 3.0)[0], abs=1e-9
        )


@settings(max_examples=60, deadline=None)
@given(
    st.integers(2, 6),
    st.sampled_from((2, 10, 50)),
    st.sampled_from((0.05, 1.0, 5.0, 40.0)),
    st.sampled_from(("free", "alike", "equal")),
    st.booleans(),
    st.integers(0, 999),
)
def test_linear_weights_are_optimal(count, classes, scale, kind, soft, seed):
    random = np.random.default_rng(seed)
    base, own = random.normal(size=(8, 1, classes)), random.normal(size=(8, count, classes))
    rows = scale * {"free": own, "alike": base + 1e-3 * own, "equal": base + 0 * own}[kind]
    labels = random.integers(classes, size=8)
    y = random.dirichlet(np.full(classes, 0.3), 8) if soft else np.eye(classes)[labels]
    target = torch.from_numpy(y if soft else labels)
    a = weights_of(list(torch.from_numpy(rows).unbind(1)), target)
    assert (a >= 0).all()
    assert a.sum(1) == pytest.approx(np.ones(8), abs=1e-12)
    value, gap = oracle.mixed_cross_entropy_gap(rows, y, a)
    spread = 1 + np.ptp(rows, axis=(1, 2))
    assert (gap <= 1e-9 * spread).all(), gap / spread
    # And no corner is better, whatever the certificate says.
    for k in range(count):
        corner = oracle.mixed_cross_entropy_gap(rows, y, np.eye(count)[[k] * 8])[0]
        assert (value <= corner + 1e-9 * spread).all()


@pytest.mark.parametrize("count", [2, 3, 6])
def test_linear_weights_of_large_logits_are_optimal(count):
    """There the cross-entropy is almost piecewise linear, and without the cooling 16 steps end 100
    times as far off.
    """
    random = np.random.default_rng(count)
    rows, labels = 100 * random.normal(size=(64, count, 100)), random.integers(100, size=64)
    a = weights_of(list(torch.from_numpy(rows).unbind(1)), torch.from_numpy(labels))
    gap = oracle.mixed_cross_entropy_gap(rows, np.eye(100)[labels], a)[1]
    assert (gap <= 1e-9 * (1 + np.ptp(rows, axis=(1, 2)))).all()


def test_linear_weights_have_lower_loss_than_grid():
    """Without the certificate: all mixtures of three rows in steps of 1/200."""
    random = np.random.default_rng(5)
    rows, labels = 3 * random.normal(size=(6, 3, 7)), random.integers(7, size=6)
    y = np.eye(7)[labels]
    a = weights_of(list(torch.from_numpy(rows).unbind(1)), torch.from_numpy(labels))
    grid = (
        np.array(
            [
                (i, j, 200 - i - j)
                for i, j in itertools.product(range(201), repeat=2)
                if i + j <= 200
            ]
        )
        / 200
    )
    lowest = np.min(
        [oracle.mixed_cross_entropy_gap(rows, y, np.tile(point, (6, 1)))[0] for point in grid],
        axis=0,
    )
    found = oracle.mixed_cross_entropy_gap(rows, y, a)[0]
    assert (found <= lowest + 1e-12).all()
    assert (found >= lowest - 1e-3).all()
    assert ((a > 1e-3).sum(1) > 1).any(), "all at corners: the case is too easy"


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_and_gradients_match_formula(variant, impl):
    random = np.random.default_rng(3)
    z = [2 * random.normal(size=(5, 6)) for _ in range(3)]
    target = random.integers(6, size=5)
    criterion = KDCLLoss(3, variant, temperature=2.5, lambda_kd=1.5, impl=impl)
    if variant == "general":
        held = [random.normal(size=(9, 6)) * k for k in (1, 2, 3)]
        labels = random.integers(6, size=9)
        criterion.see_held_out(
            [
                ([torch.from_numpy(row[part]) for row in held], torch.from_numpy(labels[part]))
                for part in (slice(0, 4), slice(4, 9))
            ]
        )
        inverse = np.linalg.inv(oracle.error_correlation(held, labels))
        mix = np.maximum(inverse.sum(1) / inverse.sum(), 0)
        mix /= mix.sum()
        assert len(set(mix.round(3))) > 1
        np.testing.assert_allclose(criterion.teacher_weights.numpy(), mix, rtol=1e-9)
    elif variant == "linear":
        mix = weights_of(
            [torch.from_numpy(row) for row in z], torch.from_numpy(target)
        )  # held to its oracle above
    teacher = {"naive": oracle.naive_teacher, "minlogit": oracle.minlogit_teacher}.get(
        variant, lambda rows, _: oracle.mixed_teacher(rows, mix)
    )
    leaves = [torch.from_numpy(row).requires_grad_() for row in z]
    loss, _ = criterion.forward_backward(leaves, torch.from_numpy(target), kd_weight=0.7)

    def formula(*rows):
        return oracle.kdcl(rows, teacher(rows, target), target, 0.7 * 1.5, 2.5)

    assert loss.item() == pytest.approx(formula(*z).mean(), rel=1e-9)
    for leaf, want in zip(leaves, complex_step(formula, z), strict=True):
        np.testing.assert_allclose(leaf.grad.numpy(), want / 5, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("variant", VARIANTS)
def test_soft_targets_and_half_precision(variant):
    rows = [
        torch.randn(
            4, 6, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(k)
        ).requires_grad_()
        for k in range(2)
    ]
    target = torch.full((4, 6), 1 / 6)
    loss, terms = KDCLLoss(2, variant).forward_backward(rows, target)
    assert torch.isfinite(loss)
    assert all(torch.isfinite(row.grad).all() for row in rows)
    assert list(terms) == ["ce/branch1", "ce/branch2", "kl/teacher->branch1", "kl/teacher->branch2"]


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (torch.tensor([0, 1, 2]), r"target has the shape \(3,\); labels must be \[4\]"),
        (torch.tensor([0, 1, 2, 3, 4]), r"target has the shape \(5,\); labels must be \[4\]"),
        (torch.tensor([0, 1, 2, 6]), r"target\[3\] is 6, but the logits have 6 classes"),
        (torch.full((4, 5), 0.2), r"class probabilities must be \[4, 6\]"),
        (None, "target must be a tensor, got NoneType"),
        ([0, 1, 2, 3], "target must be a tensor, got list"),
    ],
)
def test_wrong_targets_are_refused(target, message):
    """Wrong targets of variants that use the target before the graph."""
    rows = list(torch.randn(2, 4, 6))
    with pytest.raises((TypeError, ValueError), match=message):
        KDCLLoss(2, "linear")(rows, target)
    with pytest.raises((TypeError, ValueError), match=message):
        KDCLLoss(2, "general").see_held_out([(rows, target)])


def test_held_out_rows_may_be_ignored_or_dense():
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(2, 3, 6, 2, 2, generator=generator)
    target = torch.randint(6, (3, 2, 2), generator=generator)
    target[0] = target[2, 1, 1] = -100
    counted = target.flatten() != -100
    rows = dense.movedim(2, -1).reshape(2, 12, 6)[:, counted]
    given, expected = KDCLLoss(2, "general"), KDCLLoss(2, "general")
    given.fit_held_out([(list(dense), target)])
    expected.fit_held_out([(list(rows), target.flatten()[counted])])
    assert given.teacher_weights[0] != 0.5
    assert torch.allclose(given.teacher_weights, expected.teacher_weights, rtol=1e-12)


def test_held_out_labels_as_probabilities():
    rows, target = (
        list(torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))),
        torch.tensor([0, 5, 2, 2, 1]),
    )
    labels, probabilities = KDCLLoss(2, "general"), KDCLLoss(2, "general")
    labels.see_held_out([(rows, target)])
    probabilities.see_held_out([(rows, torch.eye(6)[target])])
    assert labels.teacher_weights[0] != 0.5
    assert torch.equal(labels.teacher_weights, probabilities.teacher_weights)


def test_teacher_weights_stay_float64_on_dtype_change():
    criterion = KDCLLoss(2, "general")
    before = torch.tensor([1 / 3, 2 / 3], dtype=torch.float64)
    criterion.teacher_weights.copy_(before)
    for moved in (criterion.half(), criterion.float(), criterion.to("cpu", torch.bfloat16)):
        assert moved.teacher_weights.dtype == torch.float64
        assert torch.equal(moved.teacher_weights, before)
    assert torch.equal(criterion.state_dict()["teacher_weights"], before)
    assert criterion.to("meta", torch.half).teacher_weights.device.type == "meta"


def test_ensemble_is_mean_of_predictions():
    """Two rows whose mean logits and whose mean predictions name different classes."""
    rows = [torch.tensor([[0.0, 8.0, -40.0]]), torch.tensor([[1.0, -20.0, 0.0]])]
    assert sum(rows).argmax() == 0
    found = KDCLLoss(2).named_logits(rows)
    assert list(found) == ["branch1", "branch2", "ensemble"]
    assert found["ensemble"].argmax() == 1
    assert found["ensemble"].exp().sum().item() == pytest.approx(1)
    assert list(KDCLLoss(2, "general").named_logits(rows)) == [
        "branch1",
        "branch2",
        "ensemble",
        "teacher",
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "minlogits"}, "variant='minlogits'; did you mean 'minlogit'"),
        ({"temperature": 0}, "temperature=0; it must be a positive number"),
        ({"lambda_kd": -1.0}, "lambda_kd=-1.0; it must be a number of at least 0"),
        ({"held_out": 1.5}, r"held_out=1.5; it must be in \(0, 1\)"),
        ({"icl": 3}, "icl=3; it must be True or False"),
        ({"iccl": True}, "unknown option 'iccl' of method 'kdcl'; did you mean 'icl'"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        check_config(TrainConfig(method="kdcl", model="resnet8", method_options=options))


def test_invalid_layouts_are_refused():
    with pytest.raises(ConfigError, match="'linear' solves for the weights of at most 6 networks"):
        check_config(
            TrainConfig(
                method="kdcl", model="resnet8", branches=7, method_options={"variant": "linear"}
            )
        )
    with pytest.raises(ConfigError, match="topology='branches': method 'kdcl' takes peers"):
        check_config(TrainConfig(method="kdcl", model="resnet8", topology="branches"))


@pytest.mark.parametrize("network", NETWORKS)
def test_step_lowers_the_loss(network):
    before, after = losses_of_a_step("kdcl", network, 2, variant="linear")
    assert after < before


CONFIG = TrainConfig(
    data="digits", model="resnet8,resnet14", method="kdcl", epochs=2, batch_size=32, lr=0.05
)


def test_networks_get_separate_views(tmp_path):
    few = few_digits(64)
    for icl in (True, False):
        trainer = make(
            dataclasses.replace(CONFIG, method_options={"icl": icl}, pad=1),
            tmp_path / str(icl),
            few,
        )
        images = next(iter(trainer.train_loader)).images
        if icl:
            assert images.shape == (2, 32, 3, 8, 8)
            assert not torch.equal(images[0], images[1])
        else:
            assert images.shape == (32, 3, 8, 8)
        assert next(iter(trainer.eval_loader)).images.dim() == 4
        trainer.run_folder.unlock()


def test_kdcl_general_resumes_exactly_without_held_out_images(tmp_path):
    few = few_digits()
    config = dataclasses.replace(CONFIG, method_options={"variant": "general", "held_out": 0.25})
    trainer = check_resume(config, tmp_path, few)
    check_student(trainer, "resnet8", "branch1")
    assert list(trainer.last) == ["branch1", "branch2", "ensemble", "teacher"]
    # Ten classes of some 26 images each.
    assert trainer.num_held_out == pytest.approx(64, abs=5)
    held = torch.cat([batch.images for batch in trainer.held_out_loader])
    assert len(held) == trainer.num_held_out
    assert len(trainer.train_loader) == (256 - trainer.num_held_out) // 32
    plain = make(dataclasses.replace(config, pad=0, flip=False), tmp_path / "plain", few)
    seen = torch.cat([batch.images[0] for batch in plain.train_loader]).flatten(1)
    plain.run_folder.unlock()
    originals = {image.numpy().tobytes() for image in (few.train.images * 1).flatten(1)}
    assert len(originals) == 256, (
        "two digits are the same picture, and the next line would say nothing"
    )
    assert torch.cdist(held.flatten(1), seen).min() > 0
    assert trainer.step.criterion.teacher_weights.sum().item() == pytest.approx(1)
    assert trainer.step.criterion.teacher_weights[0] != 0.5
    loaded = load_run(trainer.run_folder.path).evaluator
    assert torch.equal(loaded.criterion.teacher_weights, trainer.step.criterion.teacher_weights)
    assert loaded.evaluate(trainer.eval_loader) == trainer.last


def test_weights_are_updated_before_every_epoch(tmp_path):
    trainer = make(
        dataclasses.replace(CONFIG, method_options={"variant": "general", "held_out": 0.25}),
        tmp_path / "run",
        few_digits(),
    )
    weights = []
    while trainer.epoch < 2:
        before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
        trainer.run(until=trainer.epoch + 1)
        weights.append(trainer.step.criterion.teacher_weights.clone())
    trainer.run_folder.unlock()
    assert not torch.equal(*weights)
    # Those of the last epoch are the ones of the networks as they were when it began.
    trainer.model.load_state_dict(before)
    trainer.model.eval()
    with torch.no_grad():
        pairs = [
            (trainer.model(batch.images).logits, batch.target) for batch in trainer.held_out_loader
        ]
    rows = [torch.cat([logits[k] for logits, _ in pairs]).double().numpy() for k in range(2)]
    inverse = np.linalg.inv(
        oracle.error_correlation(rows, torch.cat([target for _, target in pairs]).numpy())
    )
    want = np.maximum(inverse.sum(1) / inverse.sum(), 0)
    np.testing.assert_allclose(weights[1].numpy(), want / want.sum(), rtol=1e-4)


@pytest.mark.gpu
def test_linear_on_gpu_equals_cpu_without_synchronization():
    rows = [3 * torch.randn(16, 10, generator=torch.Generator().manual_seed(k)) for k in range(3)]
    target = torch.arange(16) % 10
    there = [row.cuda() for row in rows], target.cuda()
    lowest_cross_entropy_weights(*there)  # the solver's library is loaded
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = lowest_cross_entropy_weights(*there)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(
        found.cpu(), lowest_cross_entropy_weights(rows, target), rtol=0, atol=1e-6
    )
