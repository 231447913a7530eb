"""The GPU entry: its dry run goes through the code of every part, so that no GPU minute dies on a typo."""

import json
from pathlib import Path

import pytest

from bench.gpu import NUM_BRANCHES, PARTS, main
from bench.loaders import LARGE_MODEL
from fastokd.models import create_model, find_backbone


def test_dry_run_writes_every_part_and_continues(tmp_path, capsys):
    assert main(["--dry-run", "--out", str(tmp_path)]) == 0
    found = {name: json.loads((tmp_path / f"{name}-dry-run.json").read_text()) for name in PARTS}
    assert found["tests"]["returncode"] == 0, found["tests"]
    assert {"tests/test_triton_gpu.py", "tests/test_data_dali_gpu.py", "tests/test_data_loader.py", "tests/test_kdcl.py", "tests/test_tsb.py"} <= set(found["tests"]["files"])
    for row in found["kernels"]["rows"]:
        missing = [name for name, value in row.items() if value is None and not name.startswith("fused")]
        assert not missing, row
    (ladder,) = found["step"]["ladders"]
    measured = [row for row in ladder["rows"] if row["reason"] != "needs a GPU"]
    assert {row["kind"] for row in measured} == {"first", "lever", "alternative", "student"}
    assert all(not row["reason"] and row["images_per_second"][0] > 0 for row in measured), measured
    if "skipped" not in found["data"]:
        assert all(row["images_per_second"] > 0 for row in [*found["data"]["rows"], {"images_per_second": found["data"]["waiting"]["epoch_images_per_second"]}])
        assert 0 <= found["data"]["waiting"]["waiting_share"] < 1
    assert [row["preset"] for row in found["accuracy"]["rows"]] == ["paper", "paper", "code"]
    assert found["environment"]["copy_bandwidth_gb_s"] > 0
    capsys.readouterr()
    assert main(["--dry-run", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("is there already") == len(PARTS)


def test_the_step_that_waits_for_large_pictures_is_of_a_network_made_for_them():
    assert find_backbone(LARGE_MODEL).image_size == 224
    assert create_model(LARGE_MODEL, "ahbf", 10, NUM_BRANCHES, 1).num_branches == NUM_BRANCHES


def test_no_gpu_test_is_left_out():
    """Those that are skipped without a GPU bear the mark by which the entry finds them."""
    by_hand = "skipif(" + "not torch.cuda.is_available()"
    assert not [file.name for file in Path(__file__).parent.glob("test_*.py") if by_hand in file.read_text()]


def test_spent_minutes_skip_the_rest(tmp_path, capsys):
    assert main(["--dry-run", "--out", str(tmp_path), "--minutes", "1e-9"]) == 0
    assert capsys.readouterr().out.count("skipped, the minutes are spent") == len(PARTS)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("arguments", "said"), [
    (["kernel", "--dry-run"], "unknown part 'kernel'; did you mean 'kernels'?"),
    (["--minutes", "0", "--dry-run"], "--minutes 0.0: must be positive"),
])
def test_bad_arguments(arguments, said, capsys):
    assert main(arguments) == 2
    assert said in capsys.readouterr().err
