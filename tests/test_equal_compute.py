"""Training compute, and the student alone with as much of it, in ``compare``, ``sweep`` and
``reproduce``.
"""

import csv
import io
import json
import math
import re
import statistics
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from sample_runs import change_config, change_json, copied, records
from scipy import stats
from torch.utils.flop_counter import FlopCounterMode

from fastokd import cli
from fastokd.data import open_dataset
from fastokd.errors import CheckpointError
from fastokd.experiments.sweep import queue
from fastokd.train.build import build_model
from fastokd.train.compute import (
    equal_compute_epochs,
    equal_compute_student,
    scaled,
    student_alone,
    training_flops,
)
from fastokd.train.config import TrainConfig
from fastokd.train.rules import check_config

FAKE = [sys.executable, str(Path(__file__).resolve().parent / "fake_training.py")]
SIZE = (32, 32)


@pytest.fixture
def fake(monkeypatch):
    """Runs that take no time."""
    real = queue.train_command
    monkeypatch.setattr(queue, "train_command", lambda *given: [*FAKE, *real(*given)[4:]])


# ---- the ratio


def conv(inputs: int, outputs: int, kernel: int, side: int) -> int:
    """FLOPs of a convolution, 2 for a multiply-add."""
    return 2 * inputs * outputs * kernel**2 * side**2


def test_flops_of_resnet8_match_count_by_hand():
    """ResNet-8 on 32 x 32 images: stages of 16, 32 and 64 channels at sides 32, 16 and 8, a block
    each; branch m has m - 1 more blocks of 64 channels, and a gate except the first.
    """
    trunk = conv(3, 16, 3, 32) + 2 * conv(16, 16, 3, 32)
    trunk += conv(16, 32, 3, 16) + conv(32, 32, 3, 16) + conv(16, 32, 1, 16)
    more = 2 * conv(64, 64, 3, 8)
    branch = conv(32, 64, 3, 8) + conv(64, 64, 3, 8) + conv(32, 64, 1, 8) + 2 * 64 * 10
    gate = conv(128, 64, 1, 8) + 2 * 64 * 2
    config = TrainConfig(model="resnet8", branches=4, aux_blocks=1, epochs=20)
    assert training_flops(student_alone(config), 10, SIZE) == trunk + branch
    taught = trunk + 4 * branch + (1 + 2 + 3) * more + 3 * gate
    assert training_flops(config, 10, SIZE) == taught
    assert equal_compute_epochs(config, 10, SIZE) == round(20 * taught / (trunk + branch)) == 85


@pytest.mark.parametrize(
    "options",
    [
        {"method": "ahbf", "branches": 3, "aux_blocks": 2},
        {"method": "ahbf", "branches": 3, "aux_blocks": 1, "compression": True},
        {"method": "one", "branches": 3},
        {"method": "dml", "model": "resnet14,resnet8"},
    ],
)
def test_flops_match_forward_pass_on_images(options):
    """Counted on real images, in training mode."""
    config = TrainConfig(**{"model": "resnet14", "epochs": 10, **options})

    def counted(each: TrainConfig) -> float:
        model = build_model(each, 10, torch.device("cpu"))
        with FlopCounterMode(display=False) as counter:
            model(torch.randn(2, 3, *SIZE))
        return counter.get_total_flops() / 2

    plain = TrainConfig(model="resnet14", method="baseline", epochs=10)
    assert training_flops(config, 10, SIZE) == counted(config)
    ratio = counted(config) / counted(plain)
    assert equal_compute_epochs(config, 10, SIZE) == round(10 * ratio) > 10


def test_frozen_teacher_adds_third_of_forward_pass(tmp_path):
    config = TrainConfig(
        model="resnet8", method="kd", method_options={"teacher": "torchvision:resnet18:weights.pth"}
    )
    alone = training_flops(student_alone(config), 10, SIZE)
    with FlopCounterMode(display=False) as counter:
        torchvision.models.resnet18(num_classes=10).eval()(torch.randn(1, 3, *SIZE))
    expected = alone + counter.get_total_flops() / 3
    assert training_flops(config, 10, SIZE) == pytest.approx(expected, rel=1e-12)
    rows = TrainConfig(model="resnet8", method="kd", method_options={"teacher": "rows.npy"})
    assert equal_compute_epochs(rows, 10, SIZE) == rows.epochs
    lost = str(tmp_path / "run")
    with pytest.raises(CheckpointError, match="run"):
        training_flops(
            TrainConfig(model="resnet8", method="kd", method_options={"teacher": lost}), 10, SIZE
        )


def test_held_out_images_cost_forward_pass():
    options = {"variant": "general", "held_out": 0.25}
    kdcl = TrainConfig(model="resnet8", method="kdcl", branches=2, method_options=options)
    alone = training_flops(student_alone(kdcl), 10, SIZE)
    assert training_flops(kdcl, 10, SIZE) == pytest.approx(2 * alone * (0.75 + 0.25 / 3))


def test_flops_are_mean_over_scheduled_sizes():
    small, large = (
        training_flops(TrainConfig(model="resnet8"), 10, (side, side)) for side in (16, 32)
    )
    config = TrainConfig(model="resnet8", epochs=4, resize_schedule={0: 16, 3: 32})
    assert training_flops(config, 10, (48, 48)) == pytest.approx((3 * small + large) / 4)


def test_student_alone_keeps_all_but_method():
    config = TrainConfig(
        data="digits",
        model="resnet14,resnet8",
        method="ahbf",
        preset="code",
        branches=2,
        topology="peers",
        aux_blocks=1,
        method_options={"lambda_ta": 1.0, "label_smoothing": 0.1},
        ramp_epochs=3,
        epochs=12,
        lr=0.03,
        weight_decay=1e-3,
        seed=4,
        warmup_epochs=2.0,
        mixup=0.2,
    )
    expected = TrainConfig(
        data="digits",
        model="resnet14",
        method="baseline",
        method_options={"label_smoothing": 0.1},
        epochs=12,
        lr=0.03,
        weight_decay=1e-3,
        seed=4,
        warmup_epochs=2.0,
        mixup=0.2,
    )
    assert student_alone(config) == expected
    check_config(expected)


def test_equal_compute_student_stretches_schedule():
    config = TrainConfig(
        model="resnet8",
        branches=4,
        aux_blocks=1,
        epochs=20,
        warmup_epochs=2.0,
        resize_schedule={0: 16, 10: 32},
    )
    alone = equal_compute_student(config, 10, SIZE)
    factor = alone.epochs / 20
    assert alone.epochs > 60
    assert alone.warmup_epochs == pytest.approx(2 * factor)
    assert alone.resize_schedule == {0: 16, round(10 * factor): 32}
    for part in (0.05, 0.3, 0.6, 0.9):
        assert alone.lr_at(part * alone.epochs) == pytest.approx(config.lr_at(part * 20))
    assert scaled(config, 1).resize_schedule == {0: 32}  # the later size wins


def test_frozen_epochs_are_scaled_with_the_epochs():
    config = TrainConfig(epochs=10, freeze_epochs=4, head_epochs=1)
    longer = scaled(config, 25)
    assert (longer.freeze_epochs, longer.head_epochs) == (10, 2)
    assert scaled(config, 1).freeze_epochs == 0


# ---- compare


ALONE_EPOCHS = 6  # 2 epochs times 2.80, the ratio of ResNet-8 with 3 branches, a = 1


@pytest.fixture
def runs(sample_runs, tmp_path):
    """Two epochs of AHBF and of the student alone, and the student alone at equal compute."""
    for method in ("ahbf", "baseline"):
        for seed in (0, 1):
            copied(sample_runs / f"{method}-seed{seed}", tmp_path / f"{method}-seed{seed}")
    return tmp_path


def give(runs: Path, name: str, of: str, by_seed: dict[int, float], epochs: int, **config) -> list:
    """Runs with these last errors in % by seed, all else as in seed 0 of a method."""
    paths = []
    for seed, error in by_seed.items():
        run = runs / f"{name}-seed{seed}"
        if not run.exists():
            copied(runs / f"{of}-seed0", run)
        change_config(run, **{"seed": seed, "epochs": epochs, **config})
        last = records(run)[-1]
        last["eval"]["branch1"] = 1 - error / 100
        lines = [json.dumps({**last, "epoch": epoch}) + "\n" for epoch in range(epochs)]
        (run / "metrics.jsonl").write_text("".join(lines))
        paths.append(run)
    return paths


TAUGHT = {0: 6.2, 1: 6.3, 2: 5.1, 9: 90.0}
EQUAL_EPOCHS = {0: 7.0, 1: 6.5, 2: 6.0, 8: 1.0}
EQUAL_COMPUTE = {0: 4.0, 1: 4.4, 2: 3.9, 9: 80.0, 7: 2.0}


def three_groups(runs: Path) -> list[Path]:
    return [
        *give(runs, "ahbf", "ahbf", TAUGHT, 2),
        *give(runs, "baseline", "baseline", EQUAL_EPOCHS, 2),
        *give(runs, "longer", "baseline", EQUAL_COMPUTE, ALONE_EPOCHS),
    ]


def compared(capsys, paths, form: str = "terminal") -> str:
    assert cli.main(["compare", *map(str, paths), "--no-latency", "--format", form]) == 0
    return capsys.readouterr().out


def csv_rows(capsys, paths) -> dict[str, dict[str, str]]:
    text = compared(capsys, paths, "csv")
    return {row["runs"]: row for row in csv.DictReader(io.StringIO(text))}


def by_hand(others: dict[int, float]) -> tuple[list[float], float]:
    """The differences over the shared seeds, and p from Student's t distribution."""
    differences = [TAUGHT[seed] - others[seed] for seed in TAUGHT if seed in others]
    count = len(differences)
    t = statistics.mean(differences) / (statistics.stdev(differences) / math.sqrt(count))
    return differences, float(2 * stats.t.sf(abs(t), df=count - 1))


def test_compare_tests_equal_epochs_and_equal_compute(runs, capsys):
    paths = three_groups(runs)
    row = csv_rows(capsys, paths)["resnet8 ahbf"]
    for prefix, others, epochs in (
        ("", EQUAL_EPOCHS, 2),
        ("equal_compute_", EQUAL_COMPUTE, ALONE_EPOCHS),
    ):
        differences, p = by_hand(others)
        assert row[f"{prefix}reference"] == f"resnet8 baseline, epochs {epochs}"
        assert int(row[f"{prefix}paired_seeds"]) == len(differences)
        assert float(row[f"{prefix}p"]) == pytest.approx(p)
        mean = statistics.mean(differences)
        assert float(row[f"{prefix}last_error_difference"]) == pytest.approx(mean)
    assert row["epochs_alone_at_equal_compute"] == str(ALONE_EPOCHS)
    cells = []
    for differences, p in (by_hand(EQUAL_EPOCHS), by_hand(EQUAL_COMPUTE)):
        mean, deviation = statistics.mean(differences), statistics.stdev(differences)
        cells += [f"{mean:+.2f} +- {deviation:.2f} (n={len(differences)})", f"{p:.3g}"]
    terminal, markdown = compared(capsys, paths), compared(capsys, paths, "markdown")
    pattern = " +".join(map(re.escape, ["resnet8 ahbf", *cells, str(ALONE_EPOCHS)]))
    assert re.search(rf"^{pattern}$", terminal, re.MULTILINE)
    assert "| " + " | ".join(["resnet8 ahbf", *cells, str(ALONE_EPOCHS)]) + " |" in markdown
    html = compared(capsys, paths, "html")
    assert "".join(f"<td>{cell}</td>" for cell in [*cells, str(ALONE_EPOCHS)]) in html
    assert (
        "The reference at equal compute of resnet8 ahbf is resnet8 baseline, epochs 6." in terminal
    )


def test_tables_fit_100_columns(runs, capsys):
    text = compared(capsys, three_groups(runs)).partition("Single runs")[0]
    tables = [line for line in text.splitlines() if line.startswith("resnet8 ")]
    assert len(tables) == 5 * 3
    assert max(map(len, tables)) <= 100


def test_training_compute_counts_images_and_epochs(runs, capsys):
    """128 of the images: batches of 64, without the rest that does not fill one."""
    paths = three_groups(runs)
    for path in paths:
        change_json(
            path / "environment.json",
            lambda found: found["data"].update(num_images={"train": 150, "test": 100}),
        )
    rows = csv_rows(capsys, paths)
    for name, epochs in (
        ("ahbf", 2),
        ("baseline, epochs 2", 2),
        (f"baseline, epochs {ALONE_EPOCHS}", ALONE_EPOCHS),
    ):
        row = rows[f"resnet8 {name}"]
        expected = 3 * 128 * epochs * int(row["training_flops"])
        assert int(row["training_compute_flops"]) == expected


@pytest.mark.parametrize("epochs", [ALONE_EPOCHS - 1, ALONE_EPOCHS + 1])
def test_other_compute_is_no_reference(runs, capsys, epochs):
    paths = [
        *give(runs, "ahbf", "ahbf", TAUGHT, 2),
        *give(runs, "longer", "baseline", EQUAL_COMPUTE, epochs),
    ]
    text = compared(capsys, paths)
    assert (
        "No difference at equal epochs for resnet8 ahbf: there is no run of resnet8 baseline with 2"
        " epochs." in text
    )
    assert (
        "No difference at equal compute for resnet8 ahbf: there is no run of resnet8 alone with as"
        " much training compute" in text
    )
    assert "--equal-compute" in text
    assert re.search(rf"^resnet8 ahbf +- +- +- +- +{ALONE_EPOCHS}$", text, re.MULTILINE)


def test_tolerance_of_equal_compute_is_five_percent(runs, capsys):
    """20 epochs cost 56.0 of the student alone: 53.2 to 58.8 count as equal."""
    taught = give(runs, "ahbf", "ahbf", TAUGHT, 20)
    for epochs, equal in ((53, False), (54, True), (58, True), (59, False)):
        alone = give(runs, f"alone-{epochs}", "baseline", EQUAL_COMPUTE, epochs)
        row = csv_rows(capsys, [*taught, *alone])["resnet8 ahbf"]
        assert bool(row.get("equal_compute_p")) == equal, epochs
    nearest = [path for count in (54, 58) for path in sorted(runs.glob(f"alone-{count}-*"))]
    close = give(runs, "alone-56", "baseline", EQUAL_COMPUTE, 56)
    row = csv_rows(capsys, [*taught, *nearest, *close])["resnet8 ahbf"]
    assert row["equal_compute_reference"] == "resnet8 baseline, epochs 56"


def test_reference_has_same_settings_if_possible(runs, capsys):
    taught = give(runs, "ahbf", "ahbf", TAUGHT, 2, lr=0.2)
    others = [
        path
        for name, epochs, lr in (("a", 2, 0.1), ("b", 2, 0.2), ("c", 6, 0.1), ("d", 6, 0.2))
        for path in give(runs, name, "baseline", EQUAL_COMPUTE, epochs, lr=lr)
    ]
    row = csv_rows(capsys, [*taught, *others])["resnet8 ahbf"]
    assert row["reference"] == "resnet8 baseline, epochs 2, lr 0.2"
    assert row["equal_compute_reference"] == "resnet8 baseline, epochs 6, lr 0.2"


def test_other_settings_of_the_reference_are_named(runs, capsys):
    taught = give(runs, "ahbf", "ahbf", TAUGHT, 2, lr=0.2)
    alone = give(runs, "a", "baseline", EQUAL_EPOCHS, 2, lr=0.1)
    note = "Other settings of resnet8 ahbf and resnet8 baseline differ, too: lr: 0.2, 0.1."
    assert note in compared(capsys, [*taught, *alone])
    same = give(runs, "b", "baseline", EQUAL_EPOCHS, 2, lr=0.2)
    assert "Other settings" not in compared(capsys, [*taught, *same])


def test_unfinished_reference_is_not_tested(runs, capsys):
    paths = three_groups(runs)
    for path in paths:
        if path.name.startswith("longer"):
            lines = (path / "metrics.jsonl").read_text().splitlines(keepends=True)
            (path / "metrics.jsonl").write_text("".join(lines[:4]))
    assert (
        "No difference at equal compute for resnet8 ahbf: 4 of 6 epochs of resnet8 baseline, epochs"
        " 6 are finished." in compared(capsys, paths)
    )


def test_lost_teacher_is_reported(runs, capsys, tmp_path):
    lost = str(tmp_path / "lost")
    paths = give(
        runs, "kd", "baseline", TAUGHT, 2, method="kd", method_options={"teacher": lost}
    ) + give(runs, "baseline", "baseline", EQUAL_EPOCHS, 2)
    text = compared(capsys, paths)
    assert "resnet8 kd: its training compute is not known: " in text
    assert (
        "No difference at equal compute for resnet8 kd: the training compute is not known." in text
    )
    assert float(csv_rows(capsys, paths)["resnet8 kd"]["p"]) == pytest.approx(
        by_hand(EQUAL_EPOCHS)[1]
    )


# ---- sweep and reproduce


TINY = ["--set", "model=resnet8", "--set", "epochs=2", "--devices", "cpu", "--per-device", "4"]


def sweep(out: Path, *arguments: str) -> int:
    return cli.main(["sweep", "--out", str(out), "--data", "digits", *TINY, *arguments])


def run_names(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "runs").iterdir())


def results(out: Path) -> dict:
    return json.loads((out / "results.json").read_text())


def test_sweep_adds_student_alone_for_each_cost(fake, tmp_path, capsys):
    """The cost depends on the branches, not on the weight: one student alone for each number."""
    out = tmp_path / "out"
    grid = ["--set", "branches=2,4", "--set", "method_options.lambda_ta=1,2", "--seeds", "2"]
    assert sweep(out, "--set", "aux_blocks=1", *grid, "--equal-compute") == 0
    said = capsys.readouterr().out
    epochs = {}
    for branches in (2, 4):
        config = TrainConfig(model="resnet8", branches=branches, aux_blocks=1, epochs=2)
        epochs[branches] = equal_compute_epochs(config, 10, (8, 8))
    assert len(run_names(out)) == 2 * (4 + 2)
    found = results(out)["equal_compute"]
    for branches in (2, 4):
        for weight in (1, 2):
            row = found[f"branches-{branches}-lambda_ta-{weight}"]
            assert row["alone"] == f"resnet8-alone-{epochs[branches]}-epochs"
            # fake_training: 30 % without options, 20 + 2 lambda_ta + 2 with them.
            assert row["differences"] == pytest.approx([2 * weight - 8] * 2)
            assert row["p"] is None
            assert re.search(
                rf"\nbranches={branches}, lambda_ta={weight} +2 +{22 + 2 * weight}\.25 \+- 0\.35"
                rf" +{epochs[branches]} +30\.25 \+- 0\.35 +{2 * weight - 8}\.00 \+- 0\.00 \(n=2\)",
                said,
            )
    config = (out / "configs" / f"resnet8-alone-{epochs[4]}-epochs-seed1.yaml").read_text()
    for line in ("method: baseline", "seed: 1", f"epochs: {epochs[4]}", "method_options: {}"):
        assert f"\n{line}\n" in config
    assert "Student alone with equal training compute" in (out / "sweep.md").read_text()


def test_equal_compute_can_be_added_to_finished_sweep(fake, tmp_path, capsys):
    out = tmp_path / "out"
    grid = ["--set", "lr=0.1,0.2", "--set", "branches=2", "--set", "aux_blocks=1"]
    assert sweep(out, *grid) == 0
    before = run_names(out)
    (tmp_path / "events.txt").unlink()
    assert sweep(out, *grid, "--equal-compute") == 0
    alone = [name for name in run_names(out) if name not in before]
    assert [re.sub(r"\d+-epochs", "N-epochs", name) for name in alone] == [
        "resnet8-alone-N-epochs-lr-0.1-seed0",
        "resnet8-alone-N-epochs-lr-0.2-seed0",
    ]
    started = [json.loads(line) for line in (tmp_path / "events.txt").read_text().splitlines()]
    assert {each["run"] for each in started} == set(alone)  # finished runs are not repeated
    (tmp_path / "events.txt").unlink()
    larger = ["--set", "lr=0.05,0.1,0.2", *grid[2:], "--seeds", "2", "--equal-compute"]
    assert sweep(out, *larger) == 0
    assert set(run_names(out)) >= {*before, *alone}
    started = [json.loads(line) for line in (tmp_path / "events.txt").read_text().splitlines()]
    assert not {each["run"] for each in started} & {*before, *alone}
    assert len(run_names(out)) == 2 * (3 + 3)
    capsys.readouterr()
    assert sweep(out, *larger[:-1]) == 2
    assert (
        "belongs to a different 'sweep' (existing vs requested: equal_compute: True, False); repeat"
        " that command to resume it" in capsys.readouterr().err
    )


def test_student_alone_in_grid_is_not_repeated(fake, tmp_path):
    """Stored rows cost nothing: the student alone with equal compute is a point of the grid."""
    out = tmp_path / "out"
    rows = np.random.default_rng(0).normal(size=(1442, 10))
    rows[range(1442), open_dataset("digits").train.targets] += 3  # better than chance
    np.save(tmp_path / "rows.npy", rows)
    config = tmp_path / "kd.yaml"
    options = f"method_options: {{teacher: {tmp_path / 'rows.npy'}}}\nbranches: 1\n"
    config.write_text(f"method: kd\n{options}")
    grid = ["--config", str(config), "--set", "method=baseline,kd", "--equal-compute"]
    assert sweep(out, *grid) == 0
    assert run_names(out) == ["method-baseline-seed0", "method-kd-seed0"]
    assert results(out)["equal_compute"]["method-kd"]["alone"] == "method-baseline"


@pytest.mark.parametrize(
    "command",
    [
        ["sweep", "--set", "method=baseline", "--set", "lr=0.1,0.2"],
        ["reproduce", "ahbf-table1", "--rows", "*-baseline"],
    ],
)
def test_equal_compute_without_teaching_is_refused(command, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main([*command, "--data", "digits", "--out", str(out), "--equal-compute"]) == 2
    said = capsys.readouterr().err
    assert "--equal-compute: every run is of the student alone; omit the option" in said
    assert said.count("\n") == 1
    assert not out.exists()


def test_equal_compute_without_data_is_refused(tmp_path, capsys):
    given = ["reproduce", "ahbf-table1", "--rows", "*-resnet32-ahbf", "--dry-run"]
    assert cli.main([*given, "--out", str(tmp_path / "out"), "--equal-compute"]) == 2
    assert "no dataset: pass --data FOLDER" in capsys.readouterr().err


def test_reproduced_table_has_students_alone(fake, tmp_path, capsys):
    out = tmp_path / "out"
    given = ["reproduce", "ahbf-table1", "--data", "digits", "--out", str(out), "--devices", "cpu"]
    given += ["--epochs", "2", "--per-device", "4"]
    ahbf = ["--rows", "cifar10-resnet32-ahbf", "--seeds", "2"]
    assert cli.main([*given, *ahbf]) == 0
    assert cli.main([*given, *ahbf, "--equal-compute"]) == 0
    said = capsys.readouterr().out
    # The ratio is 3.64 for four branches with four more blocks each.
    assert re.search(
        r"\ncifar10-resnet32-ahbf +2 +30\.25 \+- 0\.35 +7 +30\.25 \+- 0\.35 +\+0\.00 \+- 0\.00"
        r" \(n=2\) +-\n",
        said,
    )
    assert "## Student alone with equal training compute" in (out / "reproduce.md").read_text()
    assert "\n1 of 35 published numbers have a finished run." in said
    other = ["--rows", "cifar10-resnet32-one", "--seeds", "1", "--equal-compute"]
    assert cli.main([*given, *other]) == 0
    found = results(out)["equal_compute"]
    assert set(found) == {"cifar10-resnet32-ahbf", "cifar10-resnet32-one"}
    assert found["cifar10-resnet32-ahbf"]["seeds"] == [0, 1]
    assert found["cifar10-resnet32-one"]["seeds"] == [0]
    capsys.readouterr()
    assert cli.main([*given, *ahbf]) == 2
    assert "equal_compute: True, False" in capsys.readouterr().err


def test_sweep_at_equal_compute_trains_and_compares(tmp_path, capsys):
    """Real runs, of 1 and of as many epochs as cost the same."""
    out = tmp_path / "out"
    tiny = ["--set", "batch_size=256", "--set", "branches=4", "--set", "aux_blocks=1"]
    given = ["sweep", "--data", "digits", "--out", str(out), "--set", "model=resnet8", *tiny]
    given += ["--set", "epochs=1", "--devices", "cpu", "--per-device", "2", "--equal-compute"]
    assert cli.main(given) == 0, capsys.readouterr()
    (row,) = results(out)["equal_compute"].values()
    run = out / "runs" / f"{row['alone']}-seed0"
    assert row["epochs"] == len(records(run)) == 4
    taught = records(out / "runs" / "resnet8-ahbf-seed0")[-1]["eval"]["branch1"]
    difference = 100 * (records(run)[-1]["eval"]["branch1"] - taught)
    assert row["differences"] == pytest.approx([difference])
    capsys.readouterr()
    rows = csv_rows(capsys, sorted((out / "runs").iterdir()))
    assert rows["resnet8 ahbf"]["equal_compute_reference"] == "resnet8 baseline"
    assert float(rows["resnet8 ahbf"]["equal_compute_last_error_difference"]) == pytest.approx(
        difference
    )
