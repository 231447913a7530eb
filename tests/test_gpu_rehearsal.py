"""A rehearsal of ``bench.gpu`` for GPUs on the pretend device: every part's program runs to its end
without a failed row. Values and times are meaningless there.
"""

import json
from pathlib import Path

import pretend_cuda
import pytest

pytestmark = [pytest.mark.grid, pytest.mark.usefixtures("pretend_device"), pytest.mark.timeout(0)]

# The accuracy part needs real losses: a run on the pretend device ends with a non-finite one. The
# part "tests" compares values.
PARTS = {"environment": 4, "kernels": 1, "step": 1, "profile": 1, "data": 2}
"""Parts, and the number of rows that must be finished in the minutes of the rehearsal."""
MINUTES = 5


@pytest.mark.parametrize(("part", "rows"), PARTS.items())
def test_rehearsed_part_has_no_failed_row(part: str, rows: int, tmp_path: Path) -> None:
    program = pretend_cuda.FOLDER / "gpu_calls.py"
    arguments = [part, "--out", str(tmp_path), "--runs", str(tmp_path / "runs")]
    arguments += ["--minutes", str(MINUTES)]
    assert pretend_cuda.run(program, json.dumps(arguments), timeout=60 * (MINUTES + 20)) == 0
    (path,) = tmp_path.glob(f"{part}-*.json")
    results = json.loads(path.read_text())
    found = results["ladders" if part == "step" else "rows"]
    assert [row["row"] for row in found if "error" in row] == []
    assert len(found) >= rows
