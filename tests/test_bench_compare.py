"""``fastokd bench compare``: two result files row by row, and one line for every pair that cannot
be compared.
"""

import copy
import json
from pathlib import Path

import pytest

from fastokd.cli import main
from fastokd.experiments.analysis.bench_files import compare_files

RESULTS = Path(__file__).resolve().parent.parent / "bench" / "results"


def suite(**medians):
    """A file of pytest-benchmark whose rows have a spread of 10 % on both sides, in seconds."""
    return {
        "machine_info": {
            "device": "cpu",
            "cpu": "Some CPU",
            "threads": 2,
            "python_version": "3.11.7",
            "torch": "2.15",
            "commit": "abc",
        },
        "benchmarks": [
            {
                "fullname": f"bench/bench_loss.py::{name}",
                "name": name,
                "stats": {
                    "median": value,
                    "q1": 0.9 * value,
                    "q3": 1.1 * value,
                    "min": 0.1 * value,
                    "max": 9 * value,
                },
            }
            for name, value in medians.items()
        ],
    }


def ladder(batch_size=100, **speeds):
    """A ladder with windows of 10 % on both sides, in images per second."""
    rows = [
        {"name": name, "reason": "", "images_per_second": [value, 0.9 * value, 1.1 * value]}
        for name, value in speeds.items()
    ]
    return {
        "model": "net",
        "method": "ahbf",
        "branches": 4,
        "batch_size": batch_size,
        "image_size": [32, 32],
        "processor": "Some CPU",
        "teaching_costs": 2.0,
        "environment": {"device": "cpu", "threads": 2, "torch": "2.15", "commit": "abc"},
        "rows": [*rows, {"name": "streams", "reason": "needs a GPU", "images_per_second": None}],
    }


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
        return tmp_path / name

    return write


def test_rows_of_a_suite(write):
    found = compare_files(
        write("a.json", suite(same=1.0, hardly=1.0, faster=1.0, slower=1.0, gone=1.0)),
        write("b.json", suite(same=1.15, hardly=0.85, faster=0.5, slower=1.3, new=1.0)),
    )
    assert {row.name: (round(row.ratio, 9), row.verdict) for row in found.rows} == {
        "bench_loss.py::same": (1.15, "within the spread"),
        "bench_loss.py::hardly": (0.85, "within the spread"),
        "bench_loss.py::faster": (0.5, "faster"),
        "bench_loss.py::slower": (1.3, "slower"),
    }
    lines = found.lines()
    assert lines[:3] == [
        f"before: {found.before.path}",
        f"after:  {found.after.path}",
        "the same machine, versions and commit",
    ]
    (row,) = [line.split() for line in lines if "::slower" in line]
    assert row == [
        "bench_loss.py::slower",
        "1000",
        "900-1100",
        "1300",
        "1170-1430",
        "1.30",
        "slower",
    ]
    assert [line for line in lines if line.startswith("only in")] == [
        f"only in {found.before.path}: bench_loss.py::gone",
        f"only in {found.after.path}: bench_loss.py::new",
    ]


def test_what_differs_is_said_first(write):
    other = suite(row=1.0)
    other["machine_info"] |= {"torch": "2.16", "commit": "def", "python": "3.12.1"}
    del other["machine_info"]["cpu"]
    lines = compare_files(write("a.json", suite(row=1.0)), write("b.json", other)).lines()
    assert lines[2:7] == [
        "cpu: Some CPU -> not said",
        "python: 3.11.7 -> 3.12.1",
        "torch: 2.15 -> 2.16",
        "commit: abc -> def",
        "",
    ]


def test_rows_of_ladders_are_times_and_belong_to_their_setting(write):
    one, other = ladder(first=1000.0, fused=2000.0), ladder(first=1000.0, fused=1000.0)
    for content in (
        other,
        {
            "part": "step",
            "ladders": [other, {"row": "x", "error": "no room"}, ladder(batch_size=7, first=5.0)],
        },
    ):
        found = compare_files(write("a.json", one), write("b.json", content))
        assert [
            (row.name.rpartition(": ")[2], round(row.ratio, 9), row.verdict) for row in found.rows
        ] == [("first", 1.0, "within the spread"), ("fused", 2.0, "slower")]
        assert found.rows[1].before == pytest.approx((0.05, 100 / 2200, 100 / 1800))
    assert (
        found.lines()[-2]
        == f"only in {found.after.path}: net, ahbf, 4 branches, batch 7 of 32x32: first"
    )


def test_cases_of_kernels_are_rows(write):
    def kernels(fused):
        rows = [
            {
                "row": "ahbf, paper, 128 x 10, bfloat16",
                "batch": 128,
                "eager/forward": 1e-3,
                "fused graph/both": fused,
                "compiled graph/both": None,
                "spread": {
                    "eager/forward": [0.9e-3, 1.1e-3],
                    "fused graph/both": [0.9 * fused, 1.1 * fused],
                },
            },
            {"row": "KL", "error": "RuntimeError: no"},
        ]
        return {
            "part": "kernels",
            "processor": "Some CPU",
            "environment": {"device": "NVIDIA H200", "torch": "2.15"},
            "rows": rows,
        }

    found = compare_files(write("a.json", kernels(4e-6)), write("b.json", kernels(2e-6)))
    assert [(row.name, row.ratio, row.verdict) for row in found.rows] == [
        ("ahbf, paper, 128 x 10, bfloat16: eager/forward", 1.0, "within the spread"),
        ("ahbf, paper, 128 x 10, bfloat16: fused graph/both", 0.5, "faster"),
    ]
    assert found.before.machine == {"device": "NVIDIA H200", "cpu": "Some CPU", "torch": "2.15"}


def test_the_committed_files_compare_with_themselves():
    for path in (RESULTS / "loss-cpu.json", RESULTS / "data-cpu.json"):
        found = compare_files(path, path)
        assert len(found.rows) == len(json.loads(path.read_text())["benchmarks"])
        assert {row.verdict for row in found.rows} == {"within the spread"}


def test_the_command_and_its_exit_codes(write, capsys):
    files = [
        str(write("a.json", suite(one=1.0, two=1.0))),
        str(write("b.json", suite(one=1.15, two=1.3))),
    ]
    assert main(["bench", "compare", *files]) == 0
    assert "1.30  slower" in capsys.readouterr().out
    assert main(["bench", "compare", *files, "--fail-above", "1.4"]) == 0
    capsys.readouterr()
    assert (
        main(["bench", "compare", *files, "--fail-above", "1.1"]) == 7
    )  # of the first row the spreads overlap
    assert (
        capsys.readouterr().err
        == "fastokd: bench_loss.py::two takes 1.30 times as long, more than --fail-above 1.1\n"
    )


def without(content, *path):
    content = copy.deepcopy(content)
    place = content
    for key in path[:-1]:
        place = place[key]
    del place[path[-1]]
    return content


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "b.json is damaged or no JSON file"),
        ("[]", "b.json is damaged: it lacks"),
        ({"rows": []}, "b.json is no result file that can be compared; choices: "),
        (
            without(suite(row=1.0), "machine_info"),
            (
                "b.json is damaged: it lacks what a benchmark writes (KeyError: 'machine_info');"
                " make it anew"
            ),
        ),
        (without(suite(row=1.0), "benchmarks", 0, "stats", "q1"), "(KeyError: 'q1')"),
        (suite(row=0.0), "0.0, 0.0, 0.0 are no times"),
        (suite(), "b.json has no row that was measured"),
        (ladder(first=1.0), "is a suite's result and "),
        (
            suite(other=1.0),
            (
                "have no row in common (the first has 'bench_loss.py::row', the second"
                " 'bench_loss.py::other')"
            ),
        ),
    ],
)
def test_what_cannot_be_compared_is_one_line(write, capsys, content, said):
    assert (
        main(
            [
                "bench",
                "compare",
                str(write("a.json", suite(row=1.0))),
                str(write("b.json", content)),
            ]
        )
        == 2
    )
    error = capsys.readouterr().err
    assert said in error
    assert error.startswith("fastokd: ")
    assert error.count("\n") == 1


def test_a_missing_file_and_a_wrong_bound(write, capsys):
    there = str(write("a.json", suite(row=1.0)))
    assert main(["bench", "compare", there, "nowhere.json"]) == 2
    assert (
        capsys.readouterr().err
        == "fastokd: cannot read nowhere.json: No such file or directory; give a result file of a"
        " benchmark\n"
    )
    assert main(["bench", "compare", there, there, "--fail-above", "0.9"]) == 2
    assert "--fail-above 0.9: it must be at least 1" in capsys.readouterr().err
