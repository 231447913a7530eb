"""Runs of several processes: the same as those of one, exactly evaluated, and stopped, killed and
continued without a trace.
"""

import json
import os
import re
import shlex
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import rank_runs
import torch
from launching import ROOT, finish, free_port, start, start_ranks
from PIL import Image

from fastokd.data.dali import missing_dali
from fastokd.errors import EXIT_PREEMPTED
from fastokd.train.checkpoint import load_checkpoint
from fastokd.train.run_folder import RunFolder
from fastokd.train.runs import load_run

NAMES = {
    2: (
        "command",
        "plain",
        "synchronized",
        "parts",
        "average",
        "tsb",
        "kdcl",
        "plain@3",
        "average@3",
        "plain@-1",
        "late",
        "late@3",
        "later",
        "later@-1",
        "skip",
        "stop",
    ),
    3: ("tiny",),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The runs of two and of three processes, see ``rank_runs.py``; what process R ended with is in
    NAME.R.pt.
    """
    folder = tmp_path_factory.mktemp("runs")
    for size, names in NAMES.items():
        for process in start_ranks(size, ["tests/rank_runs.py", folder, *names]):
            code, _, errors = finish(process)
            assert code == 0, errors
    return folder


def ended(folder, name, rank=0):
    return torch.load(folder / f"{name}.{rank}.pt", weights_only=True)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The final state of one process, for one of the configurations."""

    def run(name):
        before = torch.are_deterministic_algorithms_enabled()
        try:
            return rank_runs.run(name, tmp_path_factory.mktemp("alone") / name)
        finally:
            torch.use_deterministic_algorithms(before)

    return run


def assert_close(found, expected, tolerance, leave_out=()):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if not name.endswith(leave_out or "\0"):
            torch.testing.assert_close(
                found[name],
                value,
                rtol=tolerance,
                atol=tolerance,
                msg=lambda text, name=name: f"{name}: {text}",
            )


def assert_equal(found, expected):
    """The same tensors bit for bit, and the same values."""
    if isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected)
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert_equal(found[name], value)
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for mine, theirs in zip(found, expected, strict=True):
            assert_equal(mine, theirs)
    else:
        assert found == expected


@pytest.fixture
def undeterministic():
    """Puts back what a deterministic run changes in this process."""
    before = torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(before)


GPUS = ("--gpus", "2")
STATISTICS = ("running_mean", "running_var")


@pytest.mark.parametrize(
    "name", ["command", "plain", "synchronized", "parts", "average", "late", "tsb", "kdcl", "skip"]
)
def test_processes_end_with_equal_state(folder, name):
    first = ended(folder, name)
    del first["train"]
    assert_equal(ended(folder, name, 1), first)


def test_synchronized_norms_match_one_process(folder, alone):
    found, expected = ended(folder, "synchronized"), alone("synchronized")
    assert found["share"] == "batch 32 = 2 processes x 16"
    assert_close(found["model"], expected["model"], 1e-5)
    for mine, theirs in zip(found["train"], expected["train"], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4)
    assert found["last"] == expected["last"]


@pytest.mark.parametrize("name", ["parts", "tsb", "kdcl"])
def test_two_processes_match_accumulation(folder, alone, name):
    """Each part of 8 images is normalised on its own. Two processes' statistics are averaged, one's
    follow each other.
    """
    found, expected = ended(folder, name), alone(name)
    assert found["share"] == "batch 32 = 2 processes x 2 x 8"
    assert_close(found["model"], expected["model"], 1e-5, leave_out=STATISTICS)
    assert_close(found["criterion"], expected["criterion"], 1e-5)
    for mine, theirs in zip(found["train"], expected["train"], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4)


def test_loss_memory_covers_all_images(folder):
    steps = ended(folder, "tsb")["criterion"]["accumulator.steps"]
    assert torch.equal(steps, torch.ones(256, dtype=torch.int32))


@pytest.mark.parametrize(
    ("name", "images"), [("plain", (256, 99)), ("average", (256, 99)), ("tiny", (64, 2))]
)
def test_metrics_equal_one_process_over_all_images(folder, name, images, monkeypatch):
    """99 images over two processes, and 2 over three, one of which has no image."""
    monkeypatch.setattr("fastokd.train.runs.open_data", lambda *_: rank_runs.dataset(*images))
    run = load_run(folder / name)
    measured = run.evaluator.measure(run.loader)
    assert measured.accuracies == ended(folder, name)["last"] == run.state["last"]
    recorded = RunFolder(folder / name).read_metrics()[-1]
    assert recorded["mixing"].keys() == measured.mixing.keys() == {"ta2"}
    assert recorded["mixing"]["ta2"] == pytest.approx(measured.mixing["ta2"], rel=1e-5)
    assert recorded["metrics"].keys() == measured.metrics.keys() >= {"nll", "ece"}
    for metric, values in measured.metrics.items():
        assert recorded["metrics"][metric] == pytest.approx(values, rel=1e-5)


def test_random_layers_differ_between_processes(folder):
    first, second = load_checkpoint(folder / "plain" / "checkpoints" / "last.pt")["ranks"]
    assert not torch.equal(first["rng"]["cpu"], second["rng"]["cpu"])


@pytest.mark.parametrize(
    ("name", "place"),
    [("plain@3", 5), ("average@3", 5), ("plain@-1", 8), ("late@3", 5), ("later@-1", 8)],
)
def test_signal_to_one_process_stops_all_and_resumes(folder, name, place):
    """The signal comes after the third step's exchange: it is exchanged after the fourth and obeyed
    after the fifth. Eight are all. The run "late" teaches from the second epoch, "later" from the
    third.
    """
    for rank in (0, 1):
        stopped = ended(folder, name, rank)
        stopped.pop("fewer", None)
        assert stopped.pop("code") == EXIT_PREEMPTED
        message = stopped.pop("message")
        assert message.startswith(
            f"stopped by SIGTERM; the last checkpoint has 1 finished epoch and {place} steps of"
            " the next; continue with 'fastokd train --resume"
        )
        state = load_checkpoint(folder / "kept" / name / "checkpoints" / "last.pt")
        assert (state["epoch"], len(state["ranks"]), state["loader"]["position"]) == (
            1,
            2,
            place * 32,
        )
        assert_equal(stopped, ended(folder, name.partition("@")[0], rank))


@pytest.mark.parametrize(("name", "place"), [("plain@3", 4), ("plain@-1", 8)])
def test_single_process_stops_and_resumes_exactly(name, place, alone, tmp_path, undeterministic):
    stopped = rank_runs.run(name, tmp_path / name)
    assert stopped.pop("code") == EXIT_PREEMPTED
    assert f" and {place} steps of the next; " in stopped.pop("message")
    assert_equal(stopped, alone("plain"))


def test_two_processes_resume_as_one(folder, tmp_path, undeterministic):
    """Nothing that was measured before is lost: the accuracies are of 256 images."""
    shutil.copytree(folder / "kept" / "plain@3", tmp_path / "plain@3")
    found = rank_runs.found(rank_runs.resume(tmp_path / "plain@3"))
    before = load_checkpoint(folder / "kept" / "plain@3" / "checkpoints" / "last.pt")
    names = before["ranks"][0]["sums"]["names"]
    counted = sum(state["sums"]["values"] for state in before["ranks"])
    assert counted[-1] == 5 * 32
    for name, value in found["train"][1].items():
        if name.startswith("accuracy/"):
            assert value * 256 == round(value * 256) >= counted[names.index(name)]
    assert found["train"][0] == ended(folder, "plain")["train"][0]


def test_one_process_resumes_as_two(folder):
    """The 5 x 16 images that one of two processes had measured, and the 3 x 32 that were left."""
    for name, value in ended(folder, "plain@3")["fewer"]["train"][1].items():
        if name.startswith("accuracy/"):
            assert value * 176 == pytest.approx(round(value * 176), abs=1e-9)


def test_nonfinite_step_in_one_process_is_skipped_in_all(folder):
    found = ended(folder, "skip")
    assert all(value.isfinite().all() for value in found["model"].values())
    right = found["train"][0]["accuracy/branch1"] * 7 * 32
    assert right == pytest.approx(round(right), abs=1e-9)


def test_nonfinite_step_in_one_process_is_named_by_all(folder):
    first, second = (ended(folder, "stop", rank)["message"] for rank in (0, 1))
    assert first == second
    assert first.startswith(
        "epoch 1, step 3: non-finite loss, ce/branch2, ce/ta2, kl/ta2->branch1, kl/branch2->branch1"
    )


class Command:
    """A run of the command in several processes that is watched from outside."""

    def __init__(self, out, before=(), after=()):
        self.out = out
        self.process = start(
            [*before, "-m", "fastokd", *rank_runs.COMMAND, "--out", out, "--resume", "auto", *after]
        )

    def rank(self, rank):
        """The process of that rank below the one that was started."""
        below = (
            Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        )
        return next(
            int(pid)
            for pid in below
            if f"RANK={rank}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        )

    def wait_for(self, what):
        end = time.monotonic() + 120
        while not what():
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < end, "it did not come so far"
            time.sleep(0.02)

    def sessions(self):
        try:
            return len(json.loads((self.out / "environment.json").read_text())["sessions"])
        except (OSError, ValueError):
            return 0


def assert_same_run(out, expected):
    """The checkpoint and the records of a run from outside, which is one that was not
    interrupted.
    """
    state = load_checkpoint(out / "checkpoints" / "last.pt")
    for part in ("model", "optimizer", "last"):
        assert_equal(state[part], expected[part])
    assert_equal(
        [json.loads(line)["train"] for line in (out / "metrics.jsonl").read_text().splitlines()],
        expected["train"],
    )


def test_torchrun_restarts_a_killed_worker(folder, tmp_path):
    run = Command(
        tmp_path / "run",
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"],
    )
    run.wait_for((run.out / "checkpoints" / "last.pt").exists)
    os.kill(run.rank(1), signal.SIGKILL)
    code, _, errors = finish(run.process)
    assert code == 0, errors
    assert run.sessions() == 2
    assert_same_run(run.out, ended(folder, "command"))


def test_two_nodes_train_together(folder, tmp_path):
    """Two agents of torchrun with one process each meet on the loopback interface."""
    agents = [
        Command(
            tmp_path / "run",
            [
                "-m",
                "torch.distributed.run",
                "--nnodes=2",
                "--nproc-per-node=1",
                "--rdzv-backend=c10d",
                "--rdzv-id=test",
                f"--rdzv-endpoint=127.0.0.1:{port}",
                "--local-addr=127.0.0.1",
            ],
        )
        for port in [free_port()] * 2
    ]
    for agent in agents:
        code, _, errors = finish(agent.process)
        assert code == 0, errors
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["world_size"] == 2
    assert_same_run(tmp_path / "run", ended(folder, "command"))


def test_two_nodes_train_with_dali(tmp_path):
    """The command of docs/cluster.md: DALI in both agents, of which each decodes its share."""
    if reason := missing_dali():
        pytest.skip(reason)
    generator = np.random.default_rng(0)
    for split, count in (("train", 34), ("val", 5)):
        for name in ("a", "b"):
            (tmp_path / "images" / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 255, (40, 36, 3), dtype=np.uint8)
                path = tmp_path / "images" / split / name / f"{number}.jpg"
                Image.fromarray(pixels).save(path)
    page = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"^torchrun (--nnodes=2 --nproc-per-node=1 .*?)^```", page, re.M | re.S)
    words = shlex.split(command.replace("\\\n", ""))
    changes = {
        "path/to/images": str(tmp_path / "images"),
        "runs/two-nodes": str(tmp_path / "run"),
        "--rdzv-endpoint=127.0.0.1:29500": f"--rdzv-endpoint=127.0.0.1:{free_port()}",
    }
    words = [changes.get(word, word) for word in words]
    agents = [start(["-m", "torch.distributed.run", *words]) for _ in range(2)]
    results = [finish(agent) for agent in agents]
    assert [code for code, *_ in results] == [0, 0], results
    (output,) = [output for _, output, _ in results if output]
    assert "loader dali" in output
    assert "2 steps per epoch; each epoch drops 4 of 68 images" in output
    assert "batch 32 = 2 processes x 16" in output
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["world_size"] == 2


def complaints(errors):
    """Messages of fastokd on stderr, without those of each process about a signal."""
    return [
        line
        for line in errors.splitlines()
        if line.startswith("fastokd: ") and "saving after this step" not in line
    ]


def test_resume_auto_repeated_finishes_the_run(folder, tmp_path):
    """Stopped by a signal to one process, then killed in one process, then let alone."""
    out = tmp_path / "run"
    run = Command(out, after=GPUS)
    run.wait_for((out / "checkpoints" / "last.pt").exists)
    os.kill(run.rank(1), signal.SIGUSR1)
    code, _, errors = finish(run.process)
    assert code == EXIT_PREEMPTED
    (said,) = complaints(errors)
    assert said.startswith(
        "fastokd: stopped by SIGUSR1; the last checkpoint has 1 finished epoch and "
    )

    run = Command(out, after=GPUS)
    run.wait_for(lambda: run.sessions() == 2)
    os.kill(run.rank(1), signal.SIGKILL)
    code, _, errors = finish(run.process)
    assert code == 128 + signal.SIGKILL
    assert (
        complaints(errors)[-1]
        == "fastokd: rank 1 of 2 was killed by SIGKILL; the last checkpoint is intact"
    )
    assert len(complaints(errors)) <= 2
    assert "Traceback" not in errors

    code, output, errors = finish(Command(out, after=GPUS).process)
    assert (code, complaints(errors)) == (0, [])
    assert output.count("branch1 (student)") == 1
    assert run.sessions() == 3
    assert_same_run(out, ended(folder, "command"))


def test_launcher_forwards_an_interrupt(tmp_path):
    run = Command(tmp_path / "run", after=GPUS)
    run.wait_for((run.out / "checkpoints" / "last.pt").exists)
    run.process.send_signal(signal.SIGINT)
    code, _, errors = finish(run.process)
    assert code == 130
    (said,) = complaints(errors)
    assert said.startswith("fastokd: stopped by Ctrl-C; the last checkpoint has ")
    assert said.endswith(f"continue with 'fastokd train --resume {run.out} --gpus 2'")
    assert "Traceback" not in errors


def test_user_error_is_reported_once(tmp_path):
    code, output, errors = finish(
        start(
            [
                "-m",
                "fastokd",
                *rank_runs.COMMAND,
                "--batch-size",
                "63",
                "--gpus",
                "2",
                "--out",
                tmp_path / "run",
            ]
        )
    )
    assert (code, output) == (2, "")
    assert (
        errors
        == "fastokd: batch_size=63 over 2 processes leaves 1; it is the global batch: use 62 or"
        " 64\n"
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_missing_gpus_are_reported_once(tmp_path):
    words = ["-m", "fastokd", *rank_runs.COMMAND, "--gpus", "2", "--out", tmp_path / "run"]
    at = words.index("--device")
    code, output, errors = finish(start([*words[:at], *words[at + 2 :]]))
    assert (code, output) == (2, "")
    assert errors == (
        "fastokd: device 'cuda' does not exist: torch sees 0 GPUs; use --device cpu or see"
        " 'fastokd doctor'\n"
    )
