"""A short demo prints the results in its files."""

import json
import re
import statistics
import sys

import pytest

from fastokd.cli import main

pytest.importorskip("matplotlib", reason="pip install -e '.[plots]'")
stats = pytest.importorskip("scipy.stats", reason="pip install -e '.[plots]'")


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "out"
    assert main(["demo", "--out", str(folder), "--epochs", "2", "--seeds", "3"]) == 0
    return folder


def test_table_is_the_mean_and_deviation_of_the_last_epochs(demo, capsys):
    assert (
        main(["demo", "--out", str(demo), "--epochs", "1", "--branches", "3", "--seeds", "3"]) == 0
    )
    said = capsys.readouterr().out
    errors = {
        method: [
            100
            - 100
            * json.loads((demo / f"{method}-seed{seed}" / "summary.json").read_text())["last"][
                "branch1"
            ]
            for seed in range(3)
        ]
        for method in ("baseline", "ahbf")
    }
    for method, values in errors.items():
        row = next(line for line in said.splitlines() if line.startswith(f"resnet8 {method}"))
        assert f"{statistics.mean(values):.2f} +- {statistics.stdev(values):.2f}" in row
    differences = [one - other for one, other in zip(*errors.values(), strict=True)]
    assert f"{-statistics.mean(differences):+.2f} +- {statistics.stdev(differences):.2f}" in said
    p = stats.ttest_rel(*errors.values()).pvalue
    size = "larger than" if p < 0.05 else "within"
    assert f"The difference is {size} what chance gives over 3 seeds" in said
    assert "the same number of epochs, and AHBF several times the training compute" in said
    again = json.loads((demo / "ahbf-seed0" / "summary.json").read_text())["last"]["branch1"]
    assert re.search(
        rf"the same logits bit for bit on 1038 images: {100 * again:.2f} % \(training said"
        rf" {100 * again:.2f} %\)",
        said,
    )
    for name in ("branch1", "branch3", "ta2", "ta3", "overview"):
        assert (demo / "curves" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_missing_matplotlib_names_the_extra(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["demo", "--out", str(tmp_path / "out")]) == 2
    assert "drawing needs matplotlib: pip install -e '.[plots]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
