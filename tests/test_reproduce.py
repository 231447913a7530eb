"""A published table is run with its own settings, and the results are shown next to its numbers
with every known difference.
"""

import json
import re
import sys
from pathlib import Path

import pytest
from cifar_files import write_cifar
from launching import replace_training

from fastokd import cli
from fastokd.errors import ConfigError
from fastokd.experiments.analysis.runs import Run
from fastokd.experiments.recipes import get_recipe, list_recipes
from fastokd.experiments.sweep.grid import parse_values
from fastokd.experiments.sweep.reproduce import get_table, paper_tables, plan_reproduction, scaled
from fastokd.experiments.sweep.results import data_differences
from fastokd.methods import get_method
from fastokd.train.config import TrainConfig

FAKE = [sys.executable, str(Path(__file__).resolve().parent / "fake_training.py")]
PUBLISHED = json.loads((Path(__file__).parent / "data" / "published.json").read_text())["tables"]


@pytest.fixture
def fake(monkeypatch):
    """Runs that take no time."""
    replace_training(monkeypatch, FAKE)


def reproduce(out: Path, *arguments: str) -> int:
    return cli.main(
        [
            "reproduce",
            "--out",
            str(out),
            "--data",
            "digits",
            "--devices",
            "cpu",
            "--per-device",
            "4",
            *arguments,
        ]
    )


# ---- the tables


def test_published_numbers_are_each_in_one_table():
    expected = {
        (table["source"], name, row)
        for table in PUBLISHED
        for name, rows in table["recipes"].items()
        for row in rows
    }
    found = [
        (table.source, recipe.name, number.row)
        for table in paper_tables().values()
        for recipe in table.recipes.values()
        for number in table.numbers(recipe)
    ]
    assert len(found) == len(set(found))
    assert set(found) == expected
    for table in paper_tables().values():
        assert {recipe.dataset for recipe in table.recipes.values()} == {table.dataset}


def test_tables_are_named_after_their_source():
    names = set(paper_tables())
    assert {
        "ahbf-table1",
        "ahbf-table2",
        "ahbf-table3",
        "ahbf-table4",
        "ahbf-table5",
        "ahbf-figure3",
    } <= names
    assert {
        "okddip-slides-cifar10",
        "okddip-slides-cifar100",
        "ffm-cd-cinic10",
        "ffm-cd-ablation",
        "tsb-table1-cifar100",
        "ffsd-readme-imagenet",
    } <= names
    assert (get_table("ahbf-table1").runs, get_table("ahbf-table4").runs) == (3, 1)


def test_published_rows_are_evaluated_by_recipe():
    """Every number is of a row that the runs of its recipe evaluate."""
    for table in paper_tables().values():
        for recipe in table.recipes.values():
            config = recipe.config
            loss = get_method(config.method).loss_class(
                num_branches=config.num_branches(), **{**config.loss_options(), "impl": "reference"}
            )
            for number in table.numbers(recipe):
                assert number.row in ("student", "branch_mean", "ensemble", *loss.graph.logits), (
                    recipe.name
                )


def test_tables_are_listed(capsys):
    assert cli.main(["reproduce"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"\nahbf-table1 +AHBF Table 1 +CIFAR-10 +35 +3\n", said)
    assert all(f"\n{name} " in said for name in paper_tables())


# ---- what is run


@pytest.mark.parametrize("epochs", [30, 600])
def test_scaled_schedules_keep_their_shape(epochs):
    for recipe in list_recipes().values():
        whole, short = recipe.config, scaled(recipe.config, epochs)
        assert short.epochs == epochs
        assert (
            abs(short.ramp_length() / epochs - whole.ramp_length() / whole.epochs)
            <= 1 / epochs + 1 / whole.epochs
        ), recipe.name
        if not whole.warmup_epochs:
            for part in (0.0, 0.3, 0.55, 0.8, 0.99):
                assert short.lr_at(part * epochs) == pytest.approx(
                    whole.lr_at(part * whole.epochs)
                ), recipe.name
        else:
            assert short.warmup_epochs / epochs == pytest.approx(whole.warmup_epochs / whole.epochs)


def test_plan_selects_rows_seeds_and_settings():
    plan = plan_reproduction(
        "ahbf-table1",
        "digits",
        ["*-resnet32-*", "*-vgg16-ahbf"],
        None,
        30,
        parse_values(["precision=fp32"]),
        Path("x"),
    )
    assert len(plan.rows) == 7 + 1
    assert [job.name for job in plan.queue][::8] == [
        f"cifar10-resnet32-afid-seed{seed}" for seed in (0, 1, 2)
    ]
    assert {(job.config.epochs, job.config.precision, job.config.data) for job in plan.queue} == {
        (30, "fp32", "digits")
    }
    assert {name for name, jobs in plan.jobs.items() if jobs} == set(plan.rows)
    assert len(plan.jobs) == 35
    ahbf = next(job.config for job in plan.queue if job.name == "cifar10-resnet32-ahbf-seed1")
    assert (ahbf.seed, ahbf.method, ahbf.branches, ahbf.aux_blocks, ahbf.ramp_length()) == (
        1,
        "ahbf",
        4,
        4,
        30,
    )


def test_tables_can_all_be_planned(tmp_path):
    for name, table in paper_tables().items():
        plan = plan_reproduction(name, "", [], None, 7, {}, tmp_path)
        assert len(plan.queue) == len(table.recipes) * table.runs
        assert {job.config.epochs for job in plan.queue} == {7}


def test_reproduced_table_lists_published_and_measured(fake, tmp_path, capsys):
    out = tmp_path / "out"
    given = ["ahbf-table1", "--rows", "cifar10-resnet32-a*", "--epochs", "2", "--seeds", "2"]
    assert reproduce(out, *given, "--dry-run") == 0
    said = capsys.readouterr().out
    assert not out.exists()
    assert "cifar10-resnet32-ahbf-seed1: not run\n" in said
    assert "4 runs in " in said
    assert said.count("  not run\n") == 35
    assert "0 of 35 published numbers have a finished run" in said
    assert reproduce(out, *given) == 0
    said = capsys.readouterr().out
    # fake_training: 30 % and 30.5 %, in the best epoch 1 less. AHBF Table 1, ResNet-32: 5.32 +-
    # 0.11.
    assert re.search(
        r"\ncifar10-resnet32-ahbf +5\.32 \+- 0\.11 \(3\) +30\.25 \+- 0\.35 \(2\) +\+24\.93 +29\.25"
        r" \+- 0\.35 +2 seeds\n",
        said,
    )
    assert re.search(
        r"\ncifar10-resnet32-baseline +6\.31 \+- 0\.07 \(3\) +- +- +- +not run\n", said
    )
    for note in (
        "2 of 35 published numbers have a finished run.",
        "Not as published: epochs: 300, 2 (published, here).",
        "Not as published: 2 of 3 runs.",
        "Not as published: trained on 1,442 images, published on 50,000.",
        "an epoch omits the 34 images that do not fill a batch",
        "the images come from digits, not from the published arrays of CIFAR-10",
        "AHBF does not state its AFID settings",
        "on a GPU it is bf16",
    ):
        assert note in said, note
    assert "seed" not in next(line for line in said.splitlines() if "epochs: 300, 2" in line)
    markdown = (out / "reproduce.md").read_text()
    assert "| cifar10-resnet32-ahbf | 5.32 +- 0.11 (3) | 30.25 +- 0.35 (2) | +24.93 |" in markdown
    assert "- Not as published: epochs: 300, 2 (published, here)." in markdown
    found = json.loads((out / "results.json").read_text())
    rows = {row["recipe"]: row for row in found["rows"]}
    assert rows["cifar10-resnet32-ahbf"]["last_errors"] == pytest.approx([30, 30.5])
    assert rows["cifar10-resnet32-ahbf"]["published"]["error"] == 5.32
    assert rows["cifar10-vgg16-ahbf"]["last_error_mean"] is None
    assert rows["cifar10-vgg16-ahbf"]["runs"] == {}
    # Other rows are added to these; a table in other settings does not.
    assert (
        reproduce(
            out,
            "ahbf-table1",
            "--rows",
            "cifar10-resnet32-baseline",
            "--epochs",
            "2",
            "--seeds",
            "1",
        )
        == 0
    )
    said = capsys.readouterr().out
    assert re.search(r"\ncifar10-resnet32-ahbf .* 30\.25 \+- 0\.35 \(2\)", said)
    assert re.search(r"\ncifar10-resnet32-baseline .* 30\.00 \(1\)", said)
    for dry_run in ([], ["--dry-run"]):
        assert reproduce(out, *given[:-4], "--epochs", "3", *dry_run) == 2
        assert (
            "belongs to a different 'reproduce' (existing vs requested: epochs: 2, 3)"
            in capsys.readouterr().err
        )


def test_table_rows_of_other_branches_and_mean(fake, tmp_path):
    out = tmp_path / "out"
    assert (
        reproduce(
            out,
            "tsb-table1-cifar10",
            "--rows",
            "cifar10-resnet20-dml-tsb",
            "--epochs",
            "1",
            "--seeds",
            "1",
        )
        == 0
    )
    rows = {
        (row["recipe"], row["row"]): row
        for row in json.loads((out / "results.json").read_text())["rows"]
    }
    # fake_training: branch2 has 2 % more error than the student, the ensemble 2 % less.
    assert [
        rows["cifar10-resnet20-dml-tsb", row]["last_error_mean"]
        for row in ("student", "branch2", "ensemble")
    ] == pytest.approx([30, 32, 28])
    assert (
        reproduce(
            tmp_path / "other",
            "okddip-slides-cifar10",
            "--rows",
            "cifar10-resnet32-dml",
            "--epochs",
            "1",
            "--seeds",
            "1",
        )
        == 0
    )
    rows = {
        (row["recipe"], row["row"]): row
        for row in json.loads((tmp_path / "other" / "results.json").read_text())["rows"]
    }
    assert rows["cifar10-resnet32-dml", "branch_mean"]["last_error_mean"] == pytest.approx(31)


def test_failing_row_is_reported(fake, tmp_path, capsys):
    (tmp_path / "orders.json").write_text(json.dumps({"cifar10-resnet32-ahbf-seed0": "fail"}))
    assert (
        reproduce(
            tmp_path / "out",
            "ahbf-table1",
            "--rows",
            "*-resnet32-a*",
            "--epochs",
            "1",
            "--seeds",
            "1",
        )
        == 3
    )
    said = capsys.readouterr()
    assert re.search(r"\ncifar10-resnet32-ahbf +5\.32 .* - +failed\n", said.out)
    assert (
        said.err
        == "fastokd: 1 of 2 runs failed: cifar10-resnet32-ahbf-seed0; the same command tries them"
        " again\n"
    )
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    states = next(row["runs"] for row in found["rows"] if row["recipe"] == "cifar10-resnet32-ahbf")
    assert states == {
        "cifar10-resnet32-ahbf-seed0": "failed: the images are not to my taste; bring others"
    }


# ---- mistakes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ahbf-table-1"], "unknown table 'ahbf-table-1'; did you mean 'ahbf-table1'? (choices: "),
        (
            ["ahbf-table1", "--rows", "*-resnet56-*"],
            (
                "--rows *-resnet56-*: no recipe of ahbf-table1 matches; its recipes are"
                " cifar10-densenet40-12-afid, "
            ),
        ),
        (["ahbf-table1", "--seeds", "0"], "seeds=0: must be at least 1"),
        (["ahbf-table1", "--epochs", "0"], "epochs=0: must be at least 1"),
        (["ahbf-table1", "--set", "precision=fp32,bf16"], "--set precision has 2 values; pass one"),
        (
            ["ahbf-table1", "--set", "epochs=3"],
            "--set epochs does not scale the schedule; use --epochs",
        ),
        (["ahbf-table1", "--set", "presicion=fp32"], "did you mean 'precision'?"),
        (["ahbf-table1", "--set", "optimizer=adm"], "unknown optimizer 'adm'"),
    ],
)
def test_invalid_arguments_are_one_line_and_create_no_files(arguments, message, tmp_path, capsys):
    assert reproduce(tmp_path / "out", *arguments) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_missing_data_is_refused(tmp_path, capsys):
    assert (
        cli.main(["reproduce", "ahbf-table1", "--out", str(tmp_path / "out"), "--devices", "cpu"])
        == 2
    )
    assert "no dataset: pass --data FOLDER" in capsys.readouterr().err


def test_single_recipe_has_configuration_of_its_table():
    plan = plan_reproduction("ahbf-table2", "", ["cifar100-resnet32-ahbf"], 1, None, {}, Path("x"))
    assert plan.queue[0].config == get_recipe("cifar100-resnet32-ahbf").config
    with pytest.raises(ConfigError):
        get_table("")


def test_folder_with_other_data_is_refused(fake, tmp_path, capsys):
    out = tmp_path / "out"
    assert (
        reproduce(
            out, "ahbf-table1", "--rows", "cifar10-resnet32-ahbf", "--epochs", "1", "--seeds", "1"
        )
        == 0
    )
    capsys.readouterr()
    other = write_cifar(tmp_path / "data")
    for dry_run in ([], ["--dry-run"]):
        assert (
            cli.main(
                [
                    "reproduce",
                    "ahbf-table1",
                    "--rows",
                    "cifar10-resnet32-ahbf",
                    "--epochs",
                    "1",
                    "--seeds",
                    "1",
                    "--out",
                    str(out),
                    "--data",
                    f"cifar10:{other}",
                    *dry_run,
                ]
            )
            == 2
        )
        assert "belongs to other images than cifar10:" in capsys.readouterr().err


def test_notes_cover_all_rows_with_runs(fake, tmp_path, capsys):
    out = tmp_path / "out"
    given = ["--epochs", "2", "--seeds", "1"]
    assert reproduce(out, "ahbf-table1", "--rows", "cifar10-resnet32-afid", *given) == 0
    capsys.readouterr()
    assert reproduce(out, "ahbf-table1", "--rows", "cifar10-resnet32-baseline", *given) == 0
    said = capsys.readouterr().out
    assert "AHBF does not state its AFID settings" in said
    assert re.search(r"Not as published: 1 of 3 runs\.", said)
    # And a run of another call that is counted was configured as this one has it.
    config = out / "runs" / "cifar10-resnet32-afid-seed0" / "config.yaml"
    config.write_text(config.read_text().replace("weight_decay: 0.0005", "weight_decay: 0.1"))
    (config.parent / "checkpoints" / "last.pt").unlink()
    for dry_run in ([], ["--dry-run"]):
        assert (
            reproduce(out, "ahbf-table1", "--rows", "cifar10-resnet32-baseline", *given, *dry_run)
            == 2
        )
        assert (
            "cifar10-resnet32-afid-seed0 contains a run with a different configuration (existing vs"
            " requested: weight_decay: 0.1, 0.0005)" in capsys.readouterr().err
        )


@pytest.mark.parametrize(
    ("prefix", "there", "said"),
    [
        ("", True, False),
        ("cifar10:", True, False),
        ("cifar10:", False, False),
        ("folder:", True, True),
        ("", False, True),
    ],
)
def test_published_data_is_recognized_under_any_spec(tmp_path, prefix, there, said):
    folder = write_cifar(tmp_path / "data") if there else tmp_path / "nowhere"
    run = Run(
        Path("x"),
        TrainConfig(data=f"{prefix}{folder}"),
        ({"epoch": 0, "eval": {"branch1": 0.9}},),
        "branch1",
        {},
        {},
        {},
        (),
    )
    found = data_differences(get_recipe("cifar10-resnet32-ahbf"), [run])
    assert (
        any(
            "not from the published arrays of CIFAR-10; if stored as JPEG, their pixels differ"
            in each
            for each in found
        )
        == said
    )
