"""The performance page says what the result files say."""

import subprocess
import sys
from pathlib import Path

from bench.report import END, START, generated, loss_table, page_with

ROOT = Path(__file__).resolve().parent.parent


def test_page_is_not_stale():
    done = subprocess.run([sys.executable, "-m", "bench.report", "--check"], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr


def test_a_stale_page_is_noticed():
    text = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    assert page_with(text.replace(" x 1000 |", " x 1001 |"), generated()) == text
    assert START in text
    assert END in text


def test_table_keeps_losing_rows(tmp_path, monkeypatch):
    import json

    import bench.report

    monkeypatch.setattr(bench.report, "ROOT", tmp_path)
    stats = {"eager": 0.004, "compiled": 0.001, "fused": 0.002}
    path = tmp_path / "loss-x.json"
    path.write_text(json.dumps({"machine_info": {"device": "cpu", "cpu": "Some CPU", "threads": 2, "torch": "2", "commit": "abc"}, "benchmarks": [
        {"extra_info": {"batch": 8, "classes": 10, "mode": "forward", "provider": name}, "stats": {"median": value, "q1": value, "q3": value}}
        for name, value in stats.items()]}))
    assert loss_table(path)[-1] == "| 8 x 10 | forward | 4 | 1 | 2 | 2-2 | 2.00 | 0.50 |"
