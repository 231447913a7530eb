"""The comparison of all methods on the digits: it resumes where it stopped, and its table has the
numbers of its file.
"""

import dataclasses
import json

import pytest
import torch

from bench import methods
from bench.method_pages import comparison
from fastokd.data import open_dataset
from fastokd.errors import ConfigError
from fastokd.methods import get_method, list_methods
from fastokd.models import create_model
from fastokd.train.rules import check_config


def test_comparison_resumes_and_restarts_on_other_settings(tmp_path, capsys, monkeypatch):
    file = tmp_path / "found.json"
    calls = []

    def measure(method, preset, seeds, epochs, data, folder):
        calls.append((method, preset))
        return {"method": method, "preset": preset, "student": [0.5] * seeds}

    monkeypatch.setattr(methods, "measure", measure)
    arguments = ["one", "baseline", "--seeds", "2", "--epochs", "1", "--out", str(file)]
    assert methods.main(arguments) == 0
    assert calls == [("one", "paper"), ("one", "code"), ("baseline", "paper")]
    assert [(row["method"], row["preset"]) for row in json.loads(file.read_text())["rows"]] == [
        ("baseline", "paper"),
        ("one", "paper"),
        ("one", "code"),
    ]
    assert methods.main(["dml", *arguments]) == 0
    assert calls[3:] == [("dml", "paper"), ("dml", "code")]
    assert methods.main([*arguments[:4], "--epochs", "2", "--out", str(file)]) == 0
    assert len(calls) == 8
    assert "dml" not in file.read_text()
    with pytest.raises(ConfigError, match="unknown method 'oen'; did you mean 'one'"):
        methods.main(["oen"])


def test_row_has_results_of_its_runs(tmp_path, monkeypatch):
    """Two seeds of a method with a teacher, on a corner of the digits; each seed has its own
    teacher.
    """
    whole = open_dataset("digits")
    corner = dataclasses.replace(
        whole, train=whole.train.select(torch.arange(128)), test=whole.test.select(torch.arange(64))
    )
    monkeypatch.setattr(methods, "TEACHER", "resnet8")
    row = methods.measure("kd", "code", 2, 1, corner, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "kd-code-0",
        "kd-code-1",
        "teacher-0",
        "teacher-1",
    ]
    for seed in range(2):
        summary = json.loads((tmp_path / f"kd-code-{seed}" / "summary.json").read_text())
        assert row["student"][seed] == summary["last"]["branch1"]
        teacher = json.loads((tmp_path / f"teacher-{seed}" / "summary.json").read_text())
        assert row["teacher"][seed] == summary["last"]["teacher"] == teacher["last"]["branch1"]
    assert (row["kept"], row["student_parameters"], row["parameters"], row["branches"]) == (
        "branch1",
        78_042,
        78_042,
        1,
    )


def test_table_matches_file(tmp_path):
    path = tmp_path / "found.json"
    assert comparison(path) == []
    row = {
        "method": "one",
        "preset": "paper",
        "branches": 3,
        "networks": "branches",
        "kept": "branch1",
        "student_parameters": 987,
        "parameters": 1234,
        "seconds": [1.0, 4.0],
        "student": [0.9, 0.92],
        "ensemble": [0.95, 0.95],
        "commit": "abc",
    }
    settings = {
        "data": "digits, 1442 training and 355 test images",
        "student": "resnet8",
        "teacher": "resnet20",
        "seeds": 2,
        "epochs": 3,
        "batch_size": 64,
        "lr": 0.05,
        "aux_blocks": 1,
    }
    path.write_text(json.dumps({"settings": settings, "torch": "2", "rows": [row]}))
    assert (
        "| [one](one.md) | paper | 3 branches | 91.00 +- 1.41 | 95.00 +- 0.00 |  | 987 | 1,234"
        " | 2 |" in comparison(path)
    )


@pytest.mark.parametrize("name", list_methods())
def test_comparison_configuration_is_valid_for_every_method(name, tmp_path):
    teacher = tmp_path if get_method(name).needs_teacher else None
    config = methods.configuration(name, "paper", 0, 1, teacher)
    check_config(config)
    create_model(
        config.model,
        name,
        10,
        config.num_branches(),
        config.aux_blocks,
        options=config.model_options(),
    )
