"""A run folder that an earlier version wrote (commit df4c5d5, stopped in its second epoch)."""

import importlib
import shutil
from pathlib import Path

import pytest

from fastokd.cli import main
from fastokd.export import load_student
from fastokd.train.runs import load_run

OLD_RUN = Path(__file__).parent / "data" / "run-df4c5d5"


@pytest.fixture
def old_run(tmp_path):
    return Path(shutil.copytree(OLD_RUN, tmp_path / "run"))


def test_old_run_resumes_with_results_of_its_version(old_run, capsys):
    assert main(["train", "--resume", str(old_run)]) == 0
    loaded = load_run(old_run)
    record = loaded.evaluator.evaluate(loaded.loader)
    # The values of the earlier version's uninterrupted run; other CPUs round differently.
    assert record["branch1"] == pytest.approx(0.4620, abs=0.02)
    assert loaded.state["epoch"] == 2
    assert (old_run / "summary.json").is_file()


def test_old_run_is_evaluated(old_run, capsys):
    assert main(["eval", str(old_run), "--device", "cpu"]) == 0
    assert "branch1" in capsys.readouterr().out


def test_old_run_is_exported(old_run, capsys):
    assert main(["export", str(old_run), "--device", "cpu"]) == 0
    student, record = load_student(old_run / "export")
    assert record["architecture"] == {"name": "resnet8", "num_classes": 10}
    assert sum(parameter.numel() for parameter in student.parameters()) > 70_000


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("loop.Trainer", "trainer.Trainer"),
        ("loop.begin_run", "session.begin_run"),
        ("loop.load_run", "runs.load_run"),
        ("levers.choose_levers", "step_options.choose_step_options"),
        ("progress.Pace", "progress.Throughput"),
        ("memory.size", "memory.format_bytes"),
    ],
)
def test_old_import_path_works_with_a_warning(old, new):
    def find(path):
        module, name = path.split(".")
        return getattr(importlib.import_module(f"fastokd.train.{module}"), name)

    with pytest.warns(DeprecationWarning, match="will be removed in the next release"):
        assert find(old) is find(new)
