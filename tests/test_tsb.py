"""TSB: what the temporal accumulator remembers, the loss against its equations, two processes, and
a run that resumes.
"""

import copy
import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import tsb_rank
from method_runs import NETWORKS, check_resume, check_student, few_digits, losses_of_a_step, make
from oracles import methods as oracle
from oracles.rows import complex_step, softmax

from fastokd.errors import ConfigError
from fastokd.losses import TSBLoss
from fastokd.methods import tsb
from fastokd.methods.tsb import TemporalAccumulator, warm_up
from fastokd.train.checkpoint import load_checkpoint
from fastokd.train.config import TrainConfig
from fastokd.train.rules import check_config
from fastokd.train.runs import load_run

CPU = torch.device("cpu")
HERE = Path(__file__).resolve().parent
CONFIG = TrainConfig(
    data="digits", model="resnet8", branches=2, method="tsb", epochs=2, batch_size=32, lr=0.05
)
ROUNDING = {"rtol": 1e-5, "atol": 1e-6}  # the memory is float32


def prepared(samples=20, classes=6, **options) -> TSBLoss:
    criterion = TSBLoss(**options)
    criterion.prepare(samples, classes, CPU)
    return criterion


def test_memory_matches_worked_values():
    criterion = prepared(1, 3)
    z = [torch.tensor([row], dtype=torch.float64) for row in ((1.0, 0.0, -1.0), (0.5, 1.0, -0.5))]
    for step in range(1, 4):
        memories = criterion.update_state(z, torch.tensor([0]), index=torch.tensor([0]))["memories"]
        assert memories[0, 1].tolist() == pytest.approx([0.343413, 0.389137, 0.267450], abs=1e-6)
        if step == 1:
            assert criterion.accumulator.memory[0, 1].tolist() == pytest.approx(
                [0.068683, 0.077827, 0.053490], abs=1e-6
            )
    _, terms = criterion(z, torch.tensor([0]), index=torch.tensor([0]), return_terms=True)
    assert terms["kl/mean->branch1"].item() == pytest.approx(0.00330907, abs=1e-6)
    assert terms["kl/memory2->branch1"].item() == pytest.approx(0.01330442, abs=1e-6)
    reverse = prepared(1, 3, student_first=True)
    _, terms = reverse(z, torch.tensor([0]), index=torch.tensor([0]), return_terms=True)
    assert terms["kl/mean->branch1"].item() == pytest.approx(0.00332130, abs=1e-6)
    assert terms["kl/memory2->branch1"].item() == pytest.approx(0.01347987, abs=1e-6)


@pytest.mark.parametrize(
    ("impl", "options"),
    [
        ("reference", {}),
        ("cpu", {}),
        ("cpu", {"student_first": True, "t2_scaling": True}),
        ("reference", {"beta": 0.0}),
    ],
)
def test_loss_and_memory_over_epochs_match_formula(impl, options):
    """Three epochs in random order, the rest of each dropped: samples have been seen one to three
    times, or never.
    """
    samples, batch, classes, count = 11, 4, 6, 3
    criterion = prepared(samples, classes, num_branches=count, impl=impl, **options)
    beta = options.get("beta", 0.8)
    random = np.random.default_rng(2)
    history: dict[int, list] = {}
    for _ in range(3):
        order = random.permutation(samples)
        for index in (order[:batch], order[batch : 2 * batch]):
            z = [2 * random.normal(size=(batch, classes)) for _ in range(count)]
            target = random.integers(classes, size=batch)
            for place, sample in enumerate(index):
                history.setdefault(sample, []).append(
                    np.stack([softmax(row, 4.0)[place] for row in z])
                )
            memories = np.stack(
                [oracle.temporal_accumulator(history[sample], beta) for sample in index], 1
            )
            leaves = [torch.from_numpy(row).requires_grad_() for row in z]
            loss, _ = criterion.forward_backward(
                leaves, torch.from_numpy(target), kd_weight=0.7, index=torch.from_numpy(index)
            )
            student_first = "student_first" in options
            scale = 16.0 if "t2_scaling" in options else 1.0

            def formula(
                *rows, memories=memories, target=target, student_first=student_first, scale=scale
            ):
                return oracle.tsb(rows, list(memories), target, 0.7, 4.0, student_first, scale)

            assert loss.item() == pytest.approx(formula(*z).mean(), rel=1e-5)
            for leaf, want in zip(leaves, complex_step(formula, z), strict=True):
                np.testing.assert_allclose(leaf.grad.numpy(), want / batch, **ROUNDING)
    times = [len(history.get(sample, ())) for sample in range(samples)]
    assert len(set(times)) > 1
    assert criterion.accumulator.steps.tolist() == times
    for sample, predictions in history.items():
        raw = oracle.temporal_accumulator(predictions, beta) * (1 - beta ** len(predictions))
        np.testing.assert_allclose(criterion.accumulator.memory[sample].numpy(), raw, **ROUNDING)


def test_evaluation_mode_does_not_update_memory():
    criterion = prepared()
    rows, target, index = torch.randn(2, 3, 6), torch.tensor([0, 1, 2]), torch.tensor([4, 1, 9])
    criterion(rows, target, index=index)
    before = copy.deepcopy(criterion.state_dict())
    criterion.eval()
    again = criterion.graph_inputs(-rows, target, index=index).externals
    for name, value in criterion.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert not torch.equal(
        again["memory1"], criterion.graph_inputs(rows, target, index=index).externals["memory1"]
    )


def test_duplicate_sample_in_batch_updates_with_mean():
    accumulator = TemporalAccumulator(0.8)
    accumulator.allocate(5, 1, 3, CPU, "auto")
    p = torch.tensor([[[1.0, 0.0, 0.0]], [[0.0, 1.0, 0.0]], [[0.0, 0.0, 1.0]], [[0.0, 1.0, 0.0]]])
    corrected = accumulator.update(torch.tensor([2, 0, 2, 2]), p)
    third = torch.tensor([[1 / 3, 1 / 3, 1 / 3]])
    for place in (0, 2, 3):
        torch.testing.assert_close(corrected[place], third)
    torch.testing.assert_close(corrected[1], p[1])
    assert accumulator.steps.tolist() == [1, 0, 1, 0, 0]
    torch.testing.assert_close(accumulator.memory[2], 0.2 * third)
    assert not accumulator.memory[[1, 3, 4]].any()


def test_memory_is_saved_and_stays_float32():
    criterion = prepared()
    criterion(torch.randn(2, 3, 6), torch.tensor([0, 1, 2]), index=torch.tensor([4, 1, 9]))
    other = prepared()
    other.load_state_dict(criterion.state_dict())
    rows, target, index = torch.randn(2, 3, 6), torch.tensor([0, 1, 2]), torch.tensor([9, 4, 0])
    for mine, theirs in zip(
        criterion.graph_inputs(rows, target, index=index).externals.values(),
        other.graph_inputs(rows, target, index=index).externals.values(),
        strict=True,
    ):
        assert torch.equal(mine, theirs)
    assert sorted(criterion.state_dict()) == ["accumulator.memory", "accumulator.steps"]
    assert criterion.half().accumulator.memory.dtype == torch.float32


def test_two_processes_have_memory_of_one(tmp_path):
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join((str(HERE), str(HERE.parent))),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    command = [sys.executable, str(HERE / "tsb_rank.py"), str(tmp_path)]
    running = [
        subprocess.Popen(
            [*command, str(rank), "2"], env=environment, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=120)[1] for process in running]
    assert [process.returncode for process in running] == [0, 0], errors
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    alone = tsb_rank.run(0, 1)
    for name in ("accumulator.memory", "accumulator.steps", "weights"):
        assert torch.equal(first[name], second[name]), name
    for name in ("accumulator.memory", "accumulator.steps"):
        assert torch.equal(first[name], alone[name]), name
    assert "evaluated" not in first  # the second process evaluates alone, without waiting
    assert torch.equal(second["evaluated"], alone["evaluated"])
    torch.testing.assert_close(first["weights"], alone["weights"])
    torch.testing.assert_close(first["losses"] + second["losses"], alone["losses"])
    mine, other, both = (
        value["grads"].unflatten(1, (tsb_rank.EPOCHS, -1)) for value in (first, second, alone)
    )
    torch.testing.assert_close(torch.cat((mine, other), 2), both)


def test_memory_size_is_reported_before_allocation(monkeypatch):
    criterion = TSBLoss()
    said = criterion.prepare(50_000, 100, CPU)
    assert (
        said
        == "temporal accumulator: 2 networks' predictions of 50,000 samples and 100 classes take"
        " 38.1 MiB of float32, on cpu"
    )
    # Private, because the free memory differs between machines.
    monkeypatch.setattr(tsb, "_free_memory", lambda device: 2**30)
    with pytest.raises(
        ConfigError,
        match=(
            r"1,281,167 samples and 1,000 classes take 9\.55 GiB of float32, and 1 GiB are free on"
            r" cpu; use fewer networks"
        ),
    ):
        criterion.prepare(1_281_167, 1000, CPU)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"index": torch.tensor([0, 1, 20])},
            r"index holds 20; prepare\(\) allocated the samples 0 to 19",
        ),
        ({"index": torch.tensor([0, -1, 2])}, "index holds -1"),
        ({"index": torch.tensor([0, 1])}, r"index is torch.int64 \[2\]; it must be int64 \[3\]"),
        ({"index": torch.tensor([0.0, 1, 2])}, r"index is torch.float32 \[3\]"),
        ({"branch_logits": torch.randn(2, 3, 7)}, r"has 7 classes; prepare\(\) allocated 6"),
        ({"branch_logits": torch.randn(3, 3, 6)}, "holds 3 tensors; this loss needs 2"),
        ({"target": torch.tensor([0, 6, 2])}, r"target\[1\] is 6, but the logits have 6 classes"),
        ({"target": torch.tensor([0, 1])}, r"target has the shape \(2,\); labels must be \[3\]"),
        ({"target": None}, "target must be a tensor, got NoneType"),
    ],
)
def test_tsb_with_wrong_arguments_is_refused_and_not_stored(change, message):
    arguments = {
        "branch_logits": torch.randn(2, 3, 6),
        "target": torch.tensor([0, 1, 2]),
        "index": torch.tensor([0, 1, 2]),
        **change,
    }
    criterion = prepared()
    with pytest.raises((TypeError, ValueError), match=message):
        criterion(**arguments)
    assert not criterion.accumulator.steps.any()


def test_batch_before_prepare_is_refused():
    with pytest.raises(ValueError, match="there is no memory yet: call prepare"):
        TSBLoss()(torch.randn(2, 3, 6), torch.tensor([0, 1, 2]), index=torch.tensor([0, 1, 2]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 1.0}, r"beta=1.0; it must be in \[0, 1\)"),
        ({"memory": "disk"}, r"memory='disk' \(choices: auto, device, host\)"),
        ({"student_first": 1}, "student_first=1; it must be True or False"),
        ({"lambda_ta": -1.0}, "lambda_ta=-1.0; it must be a number of at least 0"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        check_config(TrainConfig(method="tsb", model="resnet8", method_options=options))


def test_warmup_is_one_twelfth_of_run():
    assert [warm_up(epoch, 20) for epoch in (0, 19, 20, 239)] == [0, 0, 1, 1]
    assert TrainConfig(method="tsb", epochs=240).ramp_length() == 20
    assert [TrainConfig(method="tsb", epochs=240).kd_weight_at(epoch) for epoch in (19, 20)] == [
        0,
        1,
    ]


@pytest.mark.parametrize("network", NETWORKS)
def test_step_lowers_the_loss(network):
    before, after = losses_of_a_step("tsb", network, 2)
    assert after < before


def test_run_resumes_exactly_with_memory(tmp_path):
    config = dataclasses.replace(CONFIG, ramp_epochs=1)
    trainer = check_resume(config, tmp_path, few_digits())
    check_student(trainer, "resnet8", "branch1")
    assert list(trainer.last) == ["branch1", "branch2", "ensemble"]
    records = trainer.run_folder.read_metrics()
    assert [record["kd_weight"] for record in records] == [0, 1]
    assert records[0]["train"]["kl/memory2->branch1"] > 0
    accumulator = trainer.step.criterion.accumulator
    assert torch.equal(
        accumulator.steps, torch.full((256,), 2, dtype=torch.int32)
    )  # in the warm-up too
    torch.testing.assert_close(accumulator.memory.sum(2), torch.full((256, 2), 1 - 0.8**2))
    assert (
        load_run(trainer.run_folder.path).evaluator.evaluate(trainer.eval_loader) == trainer.last
    )  # without the memory
    state = load_checkpoint(trainer.run_folder.last)
    assert torch.equal(state["criterion"]["accumulator.memory"], accumulator.memory)


def test_resume_without_memory_differs(tmp_path):
    """That the run above resumes exactly says something: a forgotten memory shows in the
    weights.
    """
    config = dataclasses.replace(CONFIG, ramp_epochs=0)
    few = few_digits(128)
    ends = []
    for forget in (False, True):
        trainer = make(config, tmp_path / str(forget), few)
        trainer.run(until=1)
        if forget:
            trainer.step.criterion.prepare(128, 10, CPU)
        trainer.run(until=2)
        trainer.run_folder.unlock()
        ends.append(trainer.model.student().state_dict())
    assert not all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


@pytest.mark.gpu
def test_tsb_memory_on_pinned_host_equals_memory_on_device():
    device = torch.device("cuda", 0)
    ends = []
    for where in ("device", "host"):
        criterion = TSBLoss(memory=where)
        said = criterion.prepare(50, 6, device)
        assert ("pinned host memory" in said) == (where == "host")
        assert criterion.accumulator.memory.is_pinned() == (where == "host")
        generator = torch.Generator().manual_seed(0)
        steps = [
            (
                torch.randn(2, 8, 6, generator=generator).to(device),
                torch.randperm(50, generator=generator)[:8].to(device),
            )
            for _ in range(5)
        ]
        target = torch.arange(8, device=device) % 6
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            memories = [
                criterion.graph_inputs(rows, target, index=index).externals["memory1"]
                for rows, index in steps
            ]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        ends.append(
            (
                [memory.cpu() for memory in memories],
                {name: value.cpu() for name, value in criterion.state_dict().items()},
            )
        )
    for mine, theirs in zip(ends[0][0], ends[1][0], strict=True):
        assert torch.equal(mine, theirs)
    for name, value in ends[0][1].items():
        assert torch.equal(value, ends[1][1][name]), name
