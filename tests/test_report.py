"""The performance page says what the result files say."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import bench.report
from bench.pages import short
from bench.report import PAGE, blocks, current, data_tables, ladder_tables, loss_table, merge_table

ROOT = Path(__file__).resolve().parent.parent


def test_page_is_not_stale():
    done = subprocess.run([sys.executable, "-m", "bench.report", "--check"], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr


def test_a_stale_page_is_noticed():
    text = PAGE.read_text(encoding="utf-8")
    for wrong in (text.replace(" x 1000 |", " x 1001 |"), text.replace("| dali |", "| dalli |"), text.replace("| resnet32 ", "| resnet33 ")):
        assert wrong != text
        assert current(wrong) == text
    mark = blocks()[1].partition("\n")[0]
    with pytest.raises(ValueError, match=f"has no line '{mark}'"):
        current(text.replace(mark, ""))


@pytest.fixture
def result(tmp_path, monkeypatch):
    """Writes benchmarks as a result file and gives its path."""
    monkeypatch.setattr(bench.report, "ROOT", tmp_path)

    def write(benchmarks):
        machine = {"device": "cpu", "cpu": "Some CPU", "threads": 2, "torch": "2", "commit": "abc"}
        (tmp_path / "x.json").write_text(json.dumps({"machine_info": machine, "benchmarks": benchmarks}))
        return tmp_path / "x.json"

    return write


def seconds(median, **others):
    return {"stats": {"median": median, "min": median / 2, "max": median * 2, "q1": median, "q3": median} | others}


def test_loss_table_keeps_losing_rows(result):
    path = result([
        {"extra_info": {"batch": 8, "classes": 10, "mode": "forward", "provider": name}, **seconds(value)}
        for name, value in {"eager": 4, "compiled": 0.001, "fused": 0.002}.items()])
    assert loss_table(path)[-2:] == ["| 8 x 10 | forward | 4,000 | 1 | 2 | 2-2 | 2000.00 | 0.50 |", ""]


def test_data_tables_compare_within_the_run_and_keep_losing_rows(result):
    def streamed(loader, rate, pictures="small-64", **options):
        return {"name": f"test_streaming[{loader}]", "extra_info": {"loader": loader, **options, "pictures": pictures, "images_per_second": rate}, **seconds(0.5)}

    lines = data_tables(result([
        streamed("dali", 80, threads=1), streamed("torchvision", 100, workers=2), streamed("torchvision", 1234567, workers=0),
        streamed("dali", 30, "large-224", threads=2), streamed("torchvision", 20, "large-224", workers=2),
        {"name": "test_waiting[dali]", "extra_info": {"loader": "dali", "step_images_per_second": 50, "epoch_images_per_second": 40, "waiting_share": 0.2}},
        {"name": "test_resident_loader[a]", "params": {"name": "cifar", "work": "shuffle"}, "extra_info": {"images_per_second": 300}, **seconds(1)},
        {"name": "test_resident_loader[b]", "params": {"name": "tiny-imagenet", "work": "shuffle"}, "extra_info": {"images_per_second": 200}, **seconds(1)},
        {"name": "test_a_step_consumes", "extra_info": {"images_per_second": 10}, **seconds(1)},
        *({"name": f"test_start[{start}]", "params": {"start": start}, **seconds(value)} for start, value in (("first", 2), ("second", 0.1))),
    ]))
    assert lines[0] == "Some CPU, 2 threads of torch; torch 2; commit abc; `x.json`, made by `make bench`."
    assert [line for line in lines if "dali" in line or "torchvision |" in line] == [
        "| 64 x 64 | dali | 1 | 80 | 40-160 | 0.80 |", "| 64 x 64 | torchvision | 2 | 100 | 50-200 | 1.00 |",
        "| 64 x 64 | torchvision | 0 | 1,230,000 | 617,000-2,470,000 | 12345.67 |",
        "| 500 x 375, cropped to 224 | dali | 2 | 30 | 15-60 | 1.50 |", "| 500 x 375, cropped to 224 | torchvision | 2 | 20 | 10-40 | 1.00 |",
        "| dali | 50 | 40 | 20.0% |"]
    assert [line for line in lines if "shuffle" in line or "itself" in line] == [
        "| 32 x 32 | shuffle | 300 | 150-600 | 30 |", "| 64 x 64 | shuffle | 200 | 100-400 |  |",
        "| 32 x 32 | the step itself: ResNet-20, AHBF | 10 | 5-20 | 1 |"]
    assert "2 s decoded, 0.1 s from the cache" in lines[-2]


def test_merged_convolutions_that_lose_stay(result):
    lines = merge_table(result([
        {"name": "test_first_convs[x]", "group": "net 2x3", "extra_info": {"merged": merged}, **seconds(value)} for merged, value in ((False, 0.1), (True, 0.2))]))
    assert lines[-2] == "| net 2x3 | 100 (50-200) | 200 (100-400) | 0.50 |"


def test_ladders_keep_rows_that_lose_and_that_were_not_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(bench.report, "ROOT", tmp_path)
    row = {"name": "first", "kind": "first", "reason": "", "images_per_second": [1000, 900, 1100], "milliseconds": 128.0, "times_first": [1.0, 1.0, 1.0], "peak_bytes": None,
           "loss_share": 0.1234, "start_seconds": 1.0, "first_loss": 2.0}
    ladder = {
        "model": "net", "method": "ahbf", "branches": 4, "batch_size": 128, "image_size": [32, 32], "num_classes": 10, "data": "random images", "teaching_costs": 2.5, "processor": "Some CPU",
        "environment": {"device": "cpu", "threads": 2, "torch": "2", "commit": "abc", "command": "fastokd bench step"},
        "rows": [row, {**row, "name": "loses", "kind": "alternative", "times_first": [0.5, 0.4, 0.6], "peak_bytes": 3 * 2**30, "loss_share": None},
                 {**dict.fromkeys(row), "name": "streams", "kind": "lever", "reason": "needs a GPU"}]}
    for content, times in ((ladder, 1), ({"ladders": [ladder, ladder]}, 2)):
        (tmp_path / "x.json").write_text(json.dumps(content))
        lines = ladder_tables(tmp_path / "x.json")
        assert lines.count("Some CPU, 2 threads of torch; torch 2; commit abc; `x.json`, made by `fastokd bench step`.") == times
        assert lines.count("| or loses | 1,000 | 900-1,100 | 128 | 0.50 (0.40-0.60) |  | 3.00 GiB | 1 |") == times
        assert lines.count("| first | 1,000 | 900-1,100 | 128 | 1.00 (1.00-1.00) | 12.3% |  | 1 |") == times
        assert lines.count("| + streams: needs a GPU |  |  |  |  |  |  |  |") == times


def test_numbers_have_three_digits_and_no_exponent():
    assert [short(value) for value in (0.0123456, 1.2, 99.96, 123.4, 1234.5, 1_234_567.0)] == ["0.0123", "1.2", "100", "123", "1,230", "1,230,000"]
