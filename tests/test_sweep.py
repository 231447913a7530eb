"""A sweep trains every point of a grid, resumes after an interruption, and tabulates the errors."""

import csv
import io
import json
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import yaml
from cifar_files import write_cifar
from launching import default_signals, replace_training, start

from fastokd import cli
from fastokd.errors import ConfigError, StorageError
from fastokd.experiments.recipes import get_recipe
from fastokd.experiments.sweep import queue
from fastokd.experiments.sweep.grid import grid_points, parse_values
from fastokd.experiments.sweep.queue import Job, Queue, parse_devices, parse_per_device
from fastokd.experiments.sweep.results import Measured
from fastokd.experiments.sweep.sweep import plan_sweep
from fastokd.train.config import TrainConfig
from fastokd.train.run_folder import RunFolder

ROOT = Path(__file__).resolve().parent.parent
FAKE = [sys.executable, str(ROOT / "tests" / "fake_training.py")]
TINY = ["--set", "model=resnet8", "--set", "batch_size=256"]


@pytest.fixture
def fake(monkeypatch):
    """Runs that take no time."""
    replace_training(monkeypatch, FAKE)


def sweep(out: Path, *arguments: str) -> int:
    return cli.main(["sweep", "--out", str(out), "--data", "digits", *arguments])


def order(root: Path, orders: dict[str, str]) -> None:
    """The behavior of runs in folders below ``root``, see ``fake_training``."""
    (root / "orders.json").write_text(json.dumps(orders))


def events(root: Path) -> list[dict]:
    return [json.loads(line) for line in (root / "events.txt").read_text().splitlines()]


def wait_for_events(root: Path, count: int) -> None:
    """Wait until the runs have written that many events, at most a minute."""
    deadline = time.monotonic() + 60
    while (
        not (root / "events.txt").is_file() or len(events(root)) < count
    ) and time.monotonic() < deadline:
        time.sleep(0.05)


def most_at_once(root: Path) -> int:
    counts = [0]
    for each in events(root):
        counts.append(counts[-1] + (1 if each["what"] == "begins" else -1))
    return max(counts)


def results(out: Path) -> dict:
    return json.loads((out / "results.json").read_text())


# ---- the grid


def test_values_have_the_types_of_their_fields():
    texts = [
        "branches=2,null",
        "lr=1e-3, 0.1",
        "flip=true,false",
        "lr_decay_at=[0.5, 0.75],[0.6]",
        'model="resnet8,resnet14",resnet8',
        "method_options.temperature=1,2.5,1e1",
        "method_options.teacher=a.npy,b:c",
        "resize_schedule={0: 8, 1: 16},{}",
        "at=layer3",
    ]
    found = parse_values(texts)
    assert found == {
        "branches": [2, None],
        "lr": [0.001, 0.1],
        "flip": [True, False],
        "lr_decay_at": [(0.5, 0.75), (0.6,)],
        "model": ["resnet8,resnet14", "resnet8"],
        "method_options.temperature": [1, 2.5, 10.0],
        "method_options.teacher": ["a.npy", "b:c"],
        "resize_schedule": [{0: 8, 1: 16}, {}],
        "at": ["layer3"],
    }
    assert isinstance(found["lr"][0], float)


def test_grid_has_every_combination_once():
    base = TrainConfig(model="resnet8", method_options={"temperature": 2.0}, seed=7)
    points = grid_points(
        base, parse_values(["method_options.lambda_ta=1,2,4", "epochs=3", "branches=2,3"])
    )
    assert [
        (point.config.method_options["lambda_ta"], point.config.branches) for point in points
    ] == [(1, 2), (1, 3), (2, 2), (2, 3), (4, 2), (4, 3)]
    assert [point.name for point in points[:2]] == [
        "lambda_ta-1-branches-2",
        "lambda_ta-1-branches-3",
    ]
    for point in points:
        assert (
            point.config.epochs,
            point.config.seed,
            point.config.method_options["temperature"],
        ) == (3, 0, 2.0)
        assert "epochs" not in point.values


def test_grid_of_methods_resets_method_options():
    points = grid_points(
        get_recipe("cifar10-resnet32-ahbf").config,
        parse_values(["method=ahbf,dml", "aux_blocks=1"]),
    )
    assert [
        (point.config.method, point.config.branches, point.config.lr_decay_at) for point in points
    ] == [("ahbf", 4, (0.5, 0.75)), ("dml", None, (0.5, 0.75))]


def test_relative_teacher_path_becomes_absolute(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    points = grid_points(
        TrainConfig(method="kd", branches=1),
        parse_values(["method_options.teacher=rows.npy", "lr=0.1,0.2"]),
    )
    assert {point.config.teacher for point in points} == {str(tmp_path / "rows.npy")}


def test_points_with_equal_names_get_suffix():
    points = grid_points(
        TrainConfig(),
        parse_values(['model="resnet20,resnet32","resnet20 ,resnet32"', "method=dml"]),
    )
    assert [point.name for point in points] == [
        "model-resnet20_resnet32",
        "model-resnet20_resnet32-2",
    ]


def test_queue_starts_first_seed_of_every_point(tmp_path):
    plan = plan_sweep(TrainConfig(), None, parse_values(["branches=2,3"]), 2, tmp_path)
    assert [job.name for job in plan.queue] == [
        "branches-2-seed0",
        "branches-3-seed0",
        "branches-2-seed1",
        "branches-3-seed1",
    ]
    assert [job.config.seed for job in plan.queue] == [0, 0, 1, 1]


def test_ahbf_ablations_are_recipes():
    for name, options, layout, meaning in [
        (
            "lambda-2-0",
            {"lambda_ta": 2, "lambda_branch": 0},
            4,
            "the teacher assistants' term alone",
        ),
        ("lambda-0-3", {"lambda_ta": 0, "lambda_branch": 3}, 4, "the branches' term alone"),
        (
            "lambda-0-0",
            {"lambda_ta": 0, "lambda_branch": 0},
            4,
            "no distillation from teacher assistants",
        ),
        ("a-0", {}, 0, "equal branches"),
    ]:
        recipe = get_recipe(f"cifar100-resnet32-ahbf-{name}")
        assert (recipe.config.method_options, recipe.config.aux_blocks, recipe.config.method) == (
            options,
            layout,
            "ahbf",
        )
        assert recipe.meaning.endswith(f": {meaning}")
        assert recipe.published


# ---- the results


def test_sweep_writes_runs_and_tables(fake, tmp_path, capsys):
    out = tmp_path / "out"
    grid = [
        "--recipe",
        "cifar10-resnet32-ahbf",
        "--set",
        "epochs=2",
        "--set",
        "method_options.lambda_ta=1,2,4",
        "--set",
        "method_options.lambda_branch=0,2",
        "--seeds",
        "2",
        "--devices",
        "cpu",
        "--per-device",
        "6",
    ]
    assert sweep(out, *grid) == 0
    said = capsys.readouterr().out
    # fake_training: 20 + 2 lambda_ta + lambda_branch, 0.5 more for seed 1; 1 less in the best
    # epoch.
    by_hand = {
        (1, 0): 22.25,
        (1, 2): 24.25,
        (2, 0): 24.25,
        (2, 2): 26.25,
        (4, 0): 28.25,
        (4, 2): 30.25,
    }
    found = results(out)
    assert [
        (
            each["values"],
            round(each["last_error_mean"], 9),
            round(each["last_error_std"], 9),
            round(each["best_error_mean"], 9),
        )
        for each in found["points"]
    ] == [
        (
            {"method_options.lambda_ta": one, "method_options.lambda_branch": two},
            mean,
            round(0.125**0.5, 9),
            mean - 1,
        )
        for (one, two), mean in by_hand.items()
    ]
    assert re.search(
        r"lambda_ta=4, lambda_branch=2 +2 seeds +30\.25 \+- 0\.35 +29\.25 \+- 0\.35\n", said
    )
    assert "Errors of the student in %, digits, 2 seeds, last of 2 epochs" in said
    assert re.search(
        r"\n1 +22\.25 \+- 0\.35 +24\.25 \+- 0\.35\n2 +24\.25 \+- 0\.35 +26\.25 \+- 0\.35\n4 +28\.25"
        r" \+- 0\.35 +30\.25 \+- 0\.35\n",
        said,
    )
    assert (
        "| lambda_ta=1, lambda_branch=0 | 2 seeds | 22.25 +- 0.35 |"
        in (out / "sweep.md").read_text()
    )
    rows = list(csv.DictReader(io.StringIO((out / "sweep.csv").read_text())))
    assert [float(row["last_error_mean"]) for row in rows] == pytest.approx(list(by_hand.values()))
    assert [float(word) for word in rows[0]["last_errors"].split()] == pytest.approx([22, 22.5])


def test_unfinished_runs_are_reported_and_not_counted(fake, tmp_path, capsys):
    out = tmp_path / "out"
    grid = [
        *TINY,
        "--set",
        "epochs=2",
        "--set",
        "aux_blocks=0,1",
        "--devices",
        "cpu",
        "--per-device",
        "2",
        "--seeds",
        "2",
    ]
    assert sweep(out, *grid, "--dry-run") == 0
    said = capsys.readouterr().out
    assert said.count("not run") == 6
    assert "4 runs in " in said
    assert not out.exists()
    assert sweep(out, *grid) == 0
    (out / "runs" / "aux_blocks-1-seed1" / "summary.json").unlink()
    metrics = out / "runs" / "aux_blocks-1-seed1" / "metrics.jsonl"
    metrics.write_text(metrics.read_text().splitlines()[0] + "\n")
    capsys.readouterr()
    assert sweep(out, *grid, "--dry-run") == 0
    said = capsys.readouterr().out
    assert "aux_blocks-1-seed1: 1 of 2 epochs\n4 runs in " in said
    assert re.search(r"aux_blocks=0 +2 seeds +30\.25 \+- 0\.35 ", said)
    assert re.search(r"aux_blocks=1 +1 of 2 seeds +30\.00 +29\.00\n", said)


@pytest.mark.parametrize(
    ("states", "said"),
    [
        ("finished finished", "2 seeds"),
        ("finished", "1 seed"),
        ("finished failed", "1 of 2 seeds, 1 failed"),
        ("finished started failed", "1 of 3 seeds, 1 failed"),
        ("finished started", "1 of 2 seeds"),
        ("failed failed", "failed"),
        ("failed started", "0 of 2 seeds, 1 failed"),
        ("started", "started"),
        ("", "not run"),
    ],
)
def test_progress_of_seeds_is_described(states, said):
    words = states.split()
    assert (
        Measured(
            ("run",) * words.count("finished"),
            {
                f"seed{seed}": f"{word}: why" if word == "failed" else word
                for seed, word in enumerate(words)
            },
        ).progress()
        == said
    )


# ---- the queue


def test_run_with_truncated_records_is_not_counted(fake, tmp_path, capsys):
    out = tmp_path / "out"
    grid = [*TINY, "--set", "epochs=2", "--devices", "cpu"]
    assert sweep(out, *grid) == 0
    (metrics,) = out.glob("runs/*/metrics.jsonl")
    metrics.write_text(metrics.read_text().splitlines()[0] + "\n{")
    assert sweep(out, *grid) == 0
    (point,) = results(out)["points"]
    assert point["last_errors"] == []
    (state,) = point["runs"].values()
    assert state.startswith("failed: metrics.jsonl is damaged in line 2")


def test_failed_run_is_reported_and_others_continue(fake, tmp_path, capsys):
    out = tmp_path / "out"
    grid = [
        *TINY,
        "--set",
        "epochs=1",
        "--set",
        "aux_blocks=0,1,2",
        "--devices",
        "cpu",
        "--per-device",
        "1",
    ]
    order(tmp_path, {"aux_blocks-1-seed0": "fail"})
    assert sweep(out, *grid) == 3
    said = capsys.readouterr()
    assert (
        "aux_blocks-1-seed0: failed: the images are not to my taste; bring others (its output: "
        in said.out
    )
    assert said.err.endswith(
        "1 of 3 runs failed: aux_blocks-1-seed0; the same command tries them again\n"
    )
    assert re.search(r"aux_blocks=1 +failed +- +-\n", said.out)
    assert [each["run"] for each in events(tmp_path) if each["what"] == "begins"] == [
        "aux_blocks-0-seed0",
        "aux_blocks-1-seed0",
        "aux_blocks-2-seed0",
    ]
    # The same command tries that one alone again.
    order(tmp_path, {})
    (tmp_path / "events.txt").unlink()
    assert sweep(out, *grid) == 0
    assert [each["run"] for each in events(tmp_path) if each["what"] == "begins"] == [
        "aux_blocks-1-seed0"
    ]
    assert [each["last_error_mean"] for each in results(out)["points"]] == pytest.approx(
        [30, 30, 30]
    )


def jobs(root: Path, count: int, **fields) -> list[Job]:
    return [
        Job(
            root / "out" / "runs" / f"run{number}",
            TrainConfig(
                data="digits", model="resnet8", method="baseline", epochs=2, seed=number, **fields
            ),
        )
        for number in range(count)
    ]


def run_queue(
    root: Path, given: list[Job], devices: list[torch.device], per_device: int
) -> tuple[queue.Outcome, list[str]]:
    (root / "out").mkdir(exist_ok=True)
    said: list[str] = []
    return Queue(given, root / "out", devices, per_device, said.append).run(), said


@pytest.mark.parametrize("per_device", [1, 3])
def test_queue_limits_concurrent_runs(fake, tmp_path, per_device, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(12))
    outcome, _ = run_queue(tmp_path, jobs(tmp_path, 5), [torch.device("cpu")], per_device)
    assert outcome == queue.Outcome({}, 0)
    assert most_at_once(tmp_path) == per_device
    assert {each["threads"] for each in events(tmp_path)} == {str(12 // per_device)}


def test_runs_are_distributed_over_devices(fake, tmp_path):
    _, said = run_queue(
        tmp_path, jobs(tmp_path, 4), [torch.device("cuda", 0), torch.device("cuda", 3)], 2
    )
    assert sorted(each["device"] for each in events(tmp_path) if each["what"] == "begins") == [
        "cuda:0",
        "cuda:0",
        "cuda:3",
        "cuda:3",
    ]
    assert said[:4] == [
        "run0: starts, on cuda:0",
        "run1: starts, on cuda:3",
        "run2: starts, on cuda:0",
        "run3: starts, on cuda:3",
    ]


def test_killed_run_is_a_failure(tmp_path, monkeypatch):
    replace_training(monkeypatch, ["sh", "-c", "kill -9 $$"])
    outcome, _ = run_queue(tmp_path, jobs(tmp_path, 1), [torch.device("cpu")], 1)
    assert outcome == queue.Outcome({"run0": "killed by SIGKILL"}, 137)


def test_second_sweep_in_same_folder_is_refused(fake, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    other = RunFolder(out)
    other.lock()
    assert sweep(out, *TINY, "--set", "epochs=1", "--devices", "cpu") == 2
    assert (
        f"{out} is locked: runs started by another 'sweep' process are still active"
        in capsys.readouterr().err
    )
    other.unlock()
    assert sweep(out, *TINY, "--set", "epochs=1", "--devices", "cpu") == 0


def test_refused_larger_grid_keeps_folder_unchanged(fake, tmp_path, capsys):
    out = tmp_path / "out"
    grid = [*TINY, "--devices", "cpu", "--set", "epochs=1"]
    assert sweep(out, *grid, "--set", "aux_blocks=0,1") == 0
    record = (out / "sweep.json").read_text()
    other = RunFolder(out)
    other.lock()
    assert sweep(out, *grid, "--set", "aux_blocks=0,1,2") == 2
    other.unlock()
    assert (out / "sweep.json").read_text() == record
    assert sweep(out, *grid, "--set", "aux_blocks=0,1") == 0, capsys.readouterr()
    # Nor does one whose data cannot be opened make a folder.
    assert cli.main(
        ["sweep", "--out", str(tmp_path / "new"), "--data", str(tmp_path / "nowhere"), *grid]
    ) in (2, 3)
    assert not (tmp_path / "new").exists()


@pytest.fixture
def listening():
    """Default signal dispositions: these tests may run in the background, with SIGINT ignored."""
    with default_signals():
        yield


@pytest.mark.parametrize(
    ("number", "orders"),
    [
        (signal.SIGTERM, {"aux_blocks-0-seed0": "wait", "aux_blocks-1-seed0": "wait"}),
        (signal.SIGINT, {"aux_blocks-0-seed0": "wait", "aux_blocks-1-seed0": "stubborn"}),
    ],
)
def test_signal_lets_runs_save(fake, listening, tmp_path, capsys, number, orders):
    out = tmp_path / "out"
    order(tmp_path, orders)

    def send(after: int) -> None:
        wait_for_events(tmp_path, after)
        os.kill(os.getpid(), number)

    def stop() -> None:
        send(after=2)
        if "stubborn" in orders.values():
            send(after=3)  # another Ctrl-C does not wait for the run that does not listen

    before = signal.getsignal(number)
    stopper = threading.Thread(target=stop)
    stopper.start()
    assert (
        sweep(
            out,
            *TINY,
            "--set",
            "epochs=2",
            "--set",
            "aux_blocks=0,1,2",
            "--per-device",
            "2",
            "--devices",
            "cpu",
        )
        == 75
    )
    stopper.join()
    assert signal.getsignal(number) is before
    said = capsys.readouterr()
    assert (
        f"{signal.Signals(number).name}: 2 runs save and stop; another signal stops them at once\n"
        in said.out
    )
    assert (
        said.err == f"fastokd: stopped by {signal.Signals(number).name}; the same command resumes\n"
    )
    assert "aux_blocks-0-seed0: saved, 1 of 2 epochs\n" in said.out
    assert ("aux_blocks-1-seed0: stopped, not run\n" in said.out) == ("stubborn" in orders.values())
    assert {each["run"] for each in events(tmp_path)} == set(orders)
    assert [each["last_errors"] for each in results(out)["points"]] == [[], [], []]


def test_missing_teacher_is_reported_before_first_run(fake, tmp_path, capsys):
    teachers = f"method_options.teacher={tmp_path}/one,{tmp_path}/nowhere"
    grid = ["--set", "method=kd", "--set", "branches=1", "--set", teachers, "--devices", "cpu"]
    assert sweep(tmp_path / "out", *TINY, *grid) != 0
    assert str(tmp_path) in capsys.readouterr().err
    assert not (tmp_path / "events.txt").exists()


def test_results_are_written_after_every_run_and_after_an_error(fake, tmp_path, monkeypatch):
    written: list[tuple[list[str], dict[str, str]]] = []
    given = jobs(tmp_path, 3)
    order(tmp_path, {"run1": "fail"})

    def write(failed: dict[str, str]) -> None:
        written.append(([job.state() for job in given], dict(failed)))

    def say(text: str) -> None:
        if text.startswith("run2: starts"):
            raise StorageError("the disk is full")

    with pytest.raises(StorageError, match="the disk is full"):
        Queue(given, tmp_path / "out", [torch.device("cpu")], 1, say).run(write)
    failed = {"run1": "the images are not to my taste; bring others"}
    assert written[:2] == [
        (["finished", "not run", "not run"], {}),
        (["finished", "not run", "not run"], failed),
    ]
    assert len(written) == 3


def test_second_ctrl_c_while_runs_save_stops_them(fake, listening, tmp_path):
    order(tmp_path, {"run0": "stubborn"})

    def say(text: str) -> None:
        wait_for_events(tmp_path, 1)  # the run does not listen from then on
        raise StorageError("the disk is full")

    def press() -> None:
        wait_for_events(tmp_path, 1)
        for _ in range(2):
            time.sleep(1)
            os.kill(os.getpid(), signal.SIGINT)

    presser = threading.Thread(target=press)
    presser.start()
    with pytest.raises(StorageError):
        Queue(jobs(tmp_path, 1), tmp_path / "out", [torch.device("cpu")], 1, say).run()
    presser.join()


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_ignored_signal_does_not_stop_sweep(fake, listening, tmp_path, capsys, number):
    """As after nohup, or in the background of a script. SIGTERM stops such a sweep."""
    out = tmp_path / "out"
    before = signal.signal(number, signal.SIG_IGN)
    stopper = threading.Thread(
        target=lambda: (wait_for_events(tmp_path, 1), os.kill(os.getpid(), number))
    )
    stopper.start()
    try:
        assert sweep(out, *TINY, "--set", "epochs=2", "--per-device", "1", "--devices", "cpu") == 0
        assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)
        stopper.join()
    assert f"{number.name}: " not in capsys.readouterr().out


def test_sweep_waits_for_runs_of_killed_sweep(fake, tmp_path, capsys):
    out = tmp_path / "out"
    grid = [
        *TINY,
        "--set",
        "epochs=2",
        "--set",
        "aux_blocks=0,1",
        "--per-device",
        "1",
        "--devices",
        "cpu",
    ]
    order(tmp_path, {"aux_blocks-0-seed0": "wait"})
    with_fakes = (
        "import sys; from fastokd import cli; from fastokd.experiments.sweep import queue; real ="
        f" queue.train_command; queue.train_command = lambda *given: [*{FAKE}, *real(*given)[4:]];"
        " cli.main(sys.argv[1:])"
    )
    killed = start(["-c", with_fakes, "sweep", "--out", out, "--data", "digits", *grid])
    wait_for_events(tmp_path, 1)
    killed.kill()
    killed.communicate(timeout=60)
    left = events(tmp_path)[0]["pid"]
    try:
        assert sweep(out, *grid) == 2
        assert (
            f"{out} is locked: runs started by another 'sweep' process are still active; wait for"
            " them" in capsys.readouterr().err
        )
        assert len(events(tmp_path)) == 1
    finally:
        os.kill(left, signal.SIGTERM)
    wait_for_events(tmp_path, 2)
    order(tmp_path, {})
    deadline = time.monotonic() + 60
    while (
        code := sweep(out, *grid)
    ) == 2 and time.monotonic() < deadline:  # its process ends shortly after its last message
        time.sleep(0.05)
    assert code == 0
    assert "aux_blocks-0-seed0: resumes after 1 of 2 epochs" in capsys.readouterr().out


def test_sigterm_stops_a_sweep_that_ignores_ctrl_c(fake, listening, tmp_path, capsys):
    out = tmp_path / "out"
    order(tmp_path, {"resnet8-ahbf-seed0": "wait"})
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def stop() -> None:
        wait_for_events(tmp_path, 1)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)

    stopper = threading.Thread(target=stop)
    stopper.start()
    assert sweep(out, *TINY, "--set", "epochs=2", "--devices", "cpu") == 75
    stopper.join()
    assert "SIGTERM: 1 runs save and stop" in capsys.readouterr().out


# ---- with real runs


def test_stopped_sweep_resumes_with_same_result(tmp_path, monkeypatch, capsys):
    """Two real runs; the sweep is asked to stop while the first trains, and the same command again
    ends both as if nothing had been.
    """
    monkeypatch.chdir(ROOT)
    out = tmp_path / "out"
    command = [
        "--data",
        "digits",
        *TINY,
        "--set",
        "method=baseline",
        "--set",
        "lr=0.05,0.1",
        "--set",
        "epochs=6",
        "--per-device",
        "1",
        "--devices",
        "cpu",
    ]
    stopped = start(["-m", "fastokd", "sweep", "--out", out, *command])
    metrics = out / "runs" / "lr-0.05-seed0" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not metrics.is_file():
        assert stopped.poll() is None, stopped.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    stopped.send_signal(signal.SIGTERM)
    said, errors = stopped.communicate(timeout=120)
    assert stopped.returncode == 75, (said, errors)
    assert "lr-0.05-seed0: saved, " in said
    assert not (out / "runs" / "lr-0.1-seed0").exists()
    assert sweep(out, *command[2:]) == 0, capsys.readouterr()
    assert "lr-0.05-seed0: resumes after " in capsys.readouterr().out
    found = results(out)["points"]
    for each, lr in zip(found, (0.05, 0.1), strict=True):
        run = out / "runs" / f"lr-{lr}-seed0"
        config = yaml.safe_load((run / "config.yaml").read_text())
        assert (config["lr"], config["epochs"], config["method"]) == (lr, 6, "baseline")
        last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
        assert (last["epoch"], each["last_errors"]) == (5, [100 * (1 - last["eval"]["branch1"])])
    assert (
        len(
            json.loads((out / "runs" / "lr-0.05-seed0" / "environment.json").read_text())[
                "sessions"
            ]
        )
        == 2
    )
    # Killed after its last checkpoint and before its summary, a run is not finished, and has it
    # after the next call.
    summary = out / "runs" / "lr-0.1-seed0" / "summary.json"
    before = json.loads(summary.read_text())
    summary.unlink()
    capsys.readouterr()
    assert sweep(out, *command[2:], "--dry-run") == 0
    assert "lr-0.1-seed0: 6 of 6 epochs\n2 runs in " in capsys.readouterr().out
    assert sweep(out, *command[2:]) == 0
    after = json.loads(summary.read_text())
    assert {name: after[name] for name in ("epochs", "last", "best", "best_epoch", "student")} == {
        name: before[name] for name in ("epochs", "last", "best", "best_epoch", "student")
    }
    assert after["seconds"] == pytest.approx(before["seconds"])
    assert results(out)["points"] == found


# ---- mistakes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "branchs=2,3",
            (
                r"unknown field 'branchs'; options of the method are method_options\.NAME; did you"
                r" mean 'branches'\?"
            ),
        ),
        (
            "lambda_ta=1",
            r"unknown field 'lambda_ta'; options of the method are method_options\.NAME",
        ),
        (
            "branches=two,3",
            r"--set branches=two,3: branches='two' has the wrong type; expected int \| None",
        ),
        ("lr=1,x", r"lr='x' has the wrong type; expected float"),
        ("branches=[2", r"not a list of values separated by commas; put quotes around"),
        ("branches=", "branches has no value; write at least one after the ="),
        ("branches", r"must be FIELD=VALUE,VALUE, such as branches=2,3,4"),
        ("=2", "must be FIELD=VALUE,VALUE"),
        ("branches=2,3,2", "the value 2 is listed twice; remove one"),
        (
            "branches.x=2",
            "branches has no option 'x'; only method_options and loader_options and"
            " auto_augment_options have options",
        ),
        ("method_options.=2", "method_options has no option ''"),
        (
            "method_options={lambda_ta: 1},{lambda_ta: 2}",
            r"set options one by one, as --set method_options\.NAME=VALUE,VALUE",
        ),
        (
            "loader_options={workers: 1}",
            r"set options one by one, as --set loader_options\.NAME=VALUE,VALUE",
        ),
        ("resize_schedule.x=2", "resize_schedule has no option 'x'"),
        ("seed=1,2", "seed cannot be set here; use --seeds N"),
        ("device=cuda", "device cannot be set here; use --devices"),
        ("data=a,b", "data cannot be set here; use --data; runs on other data cannot be compared"),
    ],
)
def test_invalid_values_are_refused(text, message):
    with pytest.raises(ConfigError, match=message) as caught:
        parse_values([text])
    assert "\n" not in str(caught.value)


def test_field_set_twice_is_refused():
    with pytest.raises(
        ConfigError,
        match="branches is set twice; write all its values in one --set, separated by commas",
    ):
        parse_values(["branches=2", "branches=3"])


def test_duplicate_configurations_are_refused(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ConfigError,
        match=(r"^teacher=.*/rows\.npy: the same configuration as teacher=rows\.npy; remove one$"),
    ):
        grid_points(
            TrainConfig(method="kd", branches=1),
            parse_values([f"method_options.teacher=rows.npy,{tmp_path}/rows.npy"]),
        )


def test_invalid_combination_is_named():
    with pytest.raises(
        ConfigError,
        match=(
            r"^lr=0\.1, lambda_tb=1: unknown option 'lambda_tb' of method 'ahbf'; did you mean"
            r" 'lambda_ta'\?"
        ),
    ):
        grid_points(TrainConfig(), parse_values(["lr=0.1,0.2", "method_options.lambda_tb=1,2"]))
    with pytest.raises(ConfigError, match=r"^branches=1: .*ahbf"):
        grid_points(TrainConfig(), parse_values(["branches=3,1"]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "0"], "seeds=0: must be at least 1"),
        (["--devices", "cuda:7"], "cuda:7"),
        (
            ["--devices", "cpu,cpu"],
            "cpu is listed twice; use --per-device N for several runs at once on a device",
        ),
        (["--per-device", "0"], "--per-device 0: must be auto or a whole number of at least 1"),
        (["--per-device", "many"], "--per-device many: must be auto or a whole number"),
        (["--recipe", "cifar10-resnet32-abhf"], "did you mean 'cifar10-resnet32-ahbf'"),
        (["--config", "missing.yaml"], "cannot read missing.yaml"),
    ],
)
def test_invalid_arguments_are_one_line_and_create_no_files(arguments, message, tmp_path, capsys):
    assert sweep(tmp_path / "out", *arguments) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.startswith("fastokd: ")
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_device_options_are_parsed():
    assert parse_devices("cpu") == [torch.device("cpu")]
    assert parse_per_device("auto") == 1
    assert parse_per_device("12") == 12


def test_sweep_on_unusable_data_is_refused_before_first_run(fake, tmp_path, capsys):
    assert cli.main(
        [
            "sweep",
            "--out",
            str(tmp_path / "out"),
            "--data",
            str(tmp_path / "nowhere"),
            "--set",
            "aux_blocks=0,1",
        ]
    ) in (2, 3)
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "events.txt").exists()


def test_foreign_folder_is_refused(fake, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").touch()
    assert sweep(out, *TINY) == 2
    assert (
        "is not empty (thesis.tex) and was not written by 'fastokd sweep'; choose another --out"
        in capsys.readouterr().err
    )
    (tmp_path / "file").touch()
    assert sweep(tmp_path / "file", *TINY) == 5
    assert "Not a directory" in capsys.readouterr().err


def test_sweep_into_folder_of_other_grid_is_refused(fake, tmp_path, capsys):
    out = tmp_path / "out"
    base = [*TINY, "--devices", "cpu", "--per-device", "4", "--set", "epochs=1"]
    assert sweep(out, *base, "--set", "aux_blocks=0,1", "--seeds", "2") == 0
    for other, message in [
        (["--set", "aux_blocks=1,2", "--seeds", "2"], "aux_blocks: [0, 1], [1, 2]"),
        (["--set", "aux_blocks=0,1"], "seeds: 2, 1"),
        (
            ["--set", "aux_blocks=0,1", "--set", "lr=0.1,0.2", "--seeds", "2"],
            (
                "the fields with several values: aux_blocks, aux_blocks lr; runs are named after"
                " these fields, so a folder keeps them and only they can get more values"
            ),
        ),
        (
            ["--set", "aux_blocks=1", "--seeds", "2"],
            (
                "the fields with several values: aux_blocks, none; runs are named after these"
                " fields, so a folder keeps them and only they can get more values"
            ),
        ),
        (
            ["--set", "aux_blocks=0,1", "--set", "weight_decay=0.1", "--seeds", "2"],
            "weight_decay: 0.0005, 0.1",
        ),
    ]:
        capsys.readouterr()
        assert sweep(out, *base, *other) == 2
        assert (
            f"belongs to a different 'sweep' (existing vs requested: {message})"
            in capsys.readouterr().err
        )
    (tmp_path / "events.txt").unlink()
    assert (
        sweep(out, *base, "--set", "aux_blocks=0,1,2", "--seeds", "3") == 0
    )  # a larger grid continues
    assert sorted(each["run"] for each in events(tmp_path) if each["what"] == "begins") == [
        "aux_blocks-0-seed2",
        "aux_blocks-1-seed2",
        "aux_blocks-2-seed0",
        "aux_blocks-2-seed1",
        "aux_blocks-2-seed2",
    ]
    (out / "sweep.json").write_text("{")
    assert sweep(out, *base, "--set", "aux_blocks=0,1") == 2
    assert "sweep.json is damaged" in capsys.readouterr().err


def test_run_with_other_configuration_in_folder_is_refused(fake, tmp_path, capsys):
    out = tmp_path / "out"
    grid = [*TINY, "--devices", "cpu", "--set", "epochs=1", "--set", "aux_blocks=0,1"]
    assert sweep(out, *grid) == 0
    config = out / "runs" / "aux_blocks-1-seed0" / "config.yaml"
    config.write_text(config.read_text().replace("weight_decay: 0.0005", "weight_decay: 0.1"))
    capsys.readouterr()
    assert sweep(out, *grid) == 2
    assert (
        "aux_blocks-1-seed0 contains a run with a different configuration (existing vs requested:"
        " weight_decay: 0.1, 0.0005); choose another --out" in capsys.readouterr().err
    )


def test_folder_with_other_data_is_refused(fake, tmp_path, capsys):
    out, data = tmp_path / "out", write_cifar(tmp_path / "data")
    grid = [
        "sweep",
        "--out",
        str(out),
        "--set",
        "model=resnet8",
        "--set",
        "epochs=1",
        "--set",
        "batch_size=4",
        "--devices",
        "cpu",
        "--set",
        "aux_blocks=0,1",
    ]
    assert cli.main([*grid, "--data", f"cifar10:{data}"]) == 0, capsys.readouterr()
    data = data.rename(tmp_path / "moved")
    assert cli.main([*grid, "--data", f"cifar10:{data}"]) == 0
    for dry_run in ([], ["--dry-run"]):
        capsys.readouterr()
        assert cli.main([*grid, "--data", "digits", *dry_run]) == 2
        said = capsys.readouterr()
        assert (
            f"{out} belongs to other images than digits has now: pass the data that its runs are"
            " trained on, or choose another --out" in said.err
        )
        assert "30.00" not in said.out
    assert cli.main([*grid, "--dry-run"]) == 0  # without data there is nothing to compare
    assert "30.00" in capsys.readouterr().out
