"""The kernels of a training step stay within the budgets of ``kernel_counts.json``."""

import json
import warnings
from pathlib import Path
from typing import Any

import kernel_counts
import pretend_cuda
import pytest
from kernel_counts import CASES, COMMAND, PATH, QUICK, measure, versions

pytestmark = pytest.mark.usefixtures("pretend_device")

RECORD = json.loads(PATH.read_text(encoding="utf-8"))
ONE = "resnet8, one, eager"
OTHER_VERSIONS = 1.05
"""Of a budget: what other releases of PyTorch and Triton may launch."""


def check(name: str, counts: dict[str, int]) -> None:
    budget = RECORD["cases"][name]
    allowed = 1.0 if RECORD["versions"] == versions() else OTHER_VERSIONS
    above = {
        phase: f"{number}, budget {budget[phase]}"
        for phase, number in counts.items()
        if number > allowed * budget[phase]
    }
    assert not above, (
        f"{name}: more kernels than before ({above}); if that is intended, run {COMMAND} '{name}'"
    )
    if allowed == 1.0 and counts != budget:
        warnings.warn(
            f"{name}: {sum(counts.values())} kernels, budget {sum(budget.values())}; lower the"
            f" budget with {COMMAND} '{name}'",
            stacklevel=2,
        )


@pytest.fixture(scope="module")
def counted() -> tuple[dict[str, dict[str, int]], dict[str, Any]]:
    """The kernels of the quick cases, and a captured step; from one process."""
    cases = [("count", CASES[name]) for name in QUICK]
    capture = ("capture", {**CASES[ONE], "streams": False})
    *counts, captured = pretend_cuda.run(
        pretend_cuda.FOLDER / "steps.py", json.dumps([*cases, capture])
    )
    return dict(zip(QUICK, counts, strict=True)), captured


def test_every_case_has_a_budget() -> None:
    assert list(RECORD["cases"]) == list(CASES)


def test_eager_steps_stay_within_budgets(
    counted: tuple[dict[str, dict[str, int]], dict[str, Any]],
) -> None:
    for name, counts in counted[0].items():
        check(name, counts)


@pytest.mark.grid
@pytest.mark.parametrize("name", [name for name in CASES if name not in QUICK])
def test_step_stays_within_budget(name: str) -> None:
    check(name, measure([name])[name])


def test_counts_are_the_nodes_of_the_graph(
    counted: tuple[dict[str, dict[str, int]], dict[str, Any]],
) -> None:
    counts, captured = counted
    ((nodes,),) = captured["captures"]
    assert nodes == sum(counts[ONE].values()) + 1  # the runner counts its steps


def test_excess_and_savings_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    record = {"versions": versions(), "cases": {"a": {"forward": 100, "loss": 8}}}
    monkeypatch.setitem(globals(), "RECORD", record)
    check("a", {"forward": 100, "loss": 8})
    with pytest.raises(AssertionError, match=r"'forward': '101, budget 100'"):
        check("a", {"forward": 101, "loss": 8})
    with pytest.warns(UserWarning, match="107 kernels, budget 108; lower the budget"):
        check("a", {"forward": 99, "loss": 8})
    record["versions"] = {"torch": "2.11.0", "triton": "3.6.0"}
    check("a", {"forward": 104, "loss": 8})
    with pytest.raises(AssertionError, match="more kernels than before"):
        check("a", {"forward": 106, "loss": 8})


def test_command_prints_counts_and_keeps_the_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = tmp_path / "counts.json"
    monkeypatch.setattr(kernel_counts, "PATH", path)
    monkeypatch.setattr(
        kernel_counts, "measure", lambda names: {name: {"forward": len(name)} for name in names}
    )
    assert kernel_counts.main(["resnet32"]) == 0
    assert "resnet32, ahbf, eager: 21 kernels" in capsys.readouterr().out
    assert not path.exists()
    assert kernel_counts.main(["--write"]) == 0
    written = json.loads(path.read_text(encoding="utf-8"))
    assert list(written["cases"]) == list(CASES)
    assert written["versions"] == versions()
    monkeypatch.setattr(kernel_counts, "versions", lambda: {"torch": "2.99", "triton": "3.9"})
    with pytest.raises(SystemExit):
        kernel_counts.main(["--write", "resnet32"])
    assert "write all cases" in capsys.readouterr().err
