"""``fastokd report``: one page that needs nothing else, and says what the runs say."""

import base64
import itertools
import json
import re
import statistics
import sys
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
from sample_runs import change_config, change_json, copied, records
from scipy.stats import ttest_rel

from fastokd.cli import main
from fastokd.experiments.analysis.compare import Reference, paired_test
from fastokd.experiments.analysis.report import analysis_section
from fastokd.experiments.analysis.runs import read_run
from fastokd.experiments.analysis.verdict import verdicts
from fastokd.train.config import TrainConfig

pytest.importorskip("matplotlib", reason="pip install -e '.[plots]'")

VOID = {"meta", "img", "br", "hr"}


class Page(HTMLParser):
    """A page as a reader's program sees it; what is not closed in its order fails."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.text, self.tables, self._open = [], "", [], []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self._open.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if {"style", "title"}.isdisjoint(self._open):
            self.text += data
            if self._open and self._open[-1] in ("td", "th"):
                self.tables[-1][-1][-1] += data

    def of(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    def table(self, first):
        """The rows below the head that begins with this cell, by their first cells."""
        return next(
            {row[0]: row[1:] for row in rows[1:]} for rows in self.tables if rows[0][0] == first
        )


def report(runs, out):
    return main(["report", *map(str, runs), "--no-latency", "--out", str(out)])


@pytest.fixture(scope="module")
def page(sample_runs, tmp_path_factory):
    """The page of all sample runs, and its text."""
    path = tmp_path_factory.mktemp("page") / "report.html"
    assert report(sorted(sample_runs.iterdir()), path) == 0
    text = path.read_text(encoding="utf-8")
    return Page(text), text


def check_nothing_is_loaded(page, text):
    assert not {tag for tag, _ in page.elements} & {
        "script",
        "link",
        "iframe",
        "object",
        "embed",
        "base",
        "form",
        "video",
        "audio",
        "source",
    }
    for tag, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on")], tag
        for name in ("src", "href", "srcset", "data", "action", "poster"):
            assert attributes.get(name, "data:").startswith(
                ("data:image/svg+xml;base64,", "data:")
            ), tag
    style = re.search(r"<style>(.*?)</style>", text, re.DOTALL)[1]
    assert "url(" not in style
    assert "@import" not in style
    policy = next(
        meta["content"]
        for meta in page.of("meta")
        if meta.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy.split("; ") == [
        "default-src 'none'",
        "img-src data:",
        "style-src 'unsafe-inline'",
    ]
    for figure in page.of("img"):
        svg = ET.fromstring(base64.b64decode(figure["src"].partition("base64,")[2], validate=True))
        for element in svg.iter():
            assert not element.tag.endswith(("script", "foreignObject")), element.tag
            if not element.tag.startswith(
                "{http://www.w3.org/1999/02/22-rdf"
            ) and not element.tag.startswith("{http://purl.org"):
                for name, value in element.attrib.items():
                    assert not name.endswith("href") or value.startswith(("#", "data:")), (
                        name,
                        value,
                    )


def test_page_loads_no_external_resources(page):
    check_nothing_is_loaded(*page)
    assert len(page[0].of("img")) == 4


def test_page_is_accessible(page):
    found, text = page
    assert text.startswith("<!DOCTYPE html>")
    assert found.of("html") == [{"lang": "en"}]
    assert {"charset": "utf-8"} in found.of("meta")
    levels = [int(tag[1]) for tag, _ in found.elements if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert len(found.of("table")) == len(found.of("caption")) == 7
    assert all(cell.get("scope") in ("col", "row") for cell in found.of("th"))
    assert all(len({len(row) for row in rows}) == 1 for rows in found.tables)
    alts = [figure["alt"] for figure in found.of("img")]
    assert len(set(alts)) == 4
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text


def test_page_shows_comparison_differences_and_last_values(page, sample_runs):
    found, _ = page
    for method in ("ahbf", "baseline"):
        errors = [
            100 - 100 * records(sample_runs / f"{method}-seed{seed}")[-1]["eval"]["branch1"]
            for seed in (0, 1)
        ]
        assert (
            found.table("runs")[f"resnet8 {method}"][2]
            == f"{statistics.mean(errors):.2f} +- {statistics.stdev(errors):.2f}"
        )
        for seed, error in enumerate(errors):
            assert (
                found.table("run")[str(sample_runs / f"{method}-seed{seed}")][3] == f"{error:.2f}"
            )
    assert found.table("field") == {"method": ["ahbf", "baseline"], "branches": ["3", "-"]}
    for figure, title in zip(
        found.of("img"), ("accuracy", "training loss", "schedules", "throughput"), strict=True
    ):
        assert figure["alt"].startswith(f"digits, resnet8: {title}")
    ta3 = statistics.mean(
        100 * records(sample_runs / f"ahbf-seed{seed}")[-1]["eval"]["ta3"] for seed in (0, 1)
    )
    assert f"ta3: resnet8 ahbf {ta3:.4g} in epoch 2;" in found.of("img")[0]["alt"]
    assert "Not as in finished runs" not in found.text


def test_page_starts_with_the_verdict(page, sample_runs):
    """Computed with scipy from the records; two seeds of two epochs prove nothing."""
    found, text = page
    errors = {
        method: [
            100 - 100 * records(sample_runs / f"{method}-seed{seed}")[-1]["eval"]["branch1"]
            for seed in (0, 1)
        ]
        for method in ("ahbf", "baseline")
    }
    differences = [a - b for a, b in zip(*errors.values(), strict=True)]
    p = ttest_rel(*errors.values()).pvalue
    verdict = "no evidence of a difference" if p > 0.05 else "ahbf is "
    start = f"{statistics.mean(differences):+.2f} +- {statistics.stdev(differences):.2f}"
    sentence = f"ahbf vs baseline: {start} points of error over 2 seeds, p {p:.2g}: {verdict}"
    assert sentence in found.text
    assert found.text.index(sentence) < found.text.index("Comparison")
    assert text.count("<figure><img") == len(found.of("img"))
    assert "img { width: 100%;" in text


def test_curves_have_no_ramp_up_of_methods_without_one(page, sample_runs, tmp_path):
    found, _ = page
    (schedule,) = [image["alt"] for image in found.of("img") if "schedules" in image["alt"]]
    ramp_up = schedule.partition("ramp-up (kd_weight): ")[2]
    assert "resnet8 ahbf" in ramp_up
    assert "baseline" not in ramp_up
    assert report([sample_runs / "baseline-seed0"], tmp_path / "alone.html") == 0
    alone = (tmp_path / "alone.html").read_text(encoding="utf-8")
    assert "ramp-up" not in alone
    assert "points of error" not in alone


def group(method, errors):
    return SimpleNamespace(
        label=f"net {method}", config=TrainConfig(method=method), errors=dict(enumerate(errors))
    )


@pytest.mark.parametrize(
    ("taught", "alone", "sentence"),
    [
        ([10.0, 10.2, 9.9], [12.0, 12.3, 11.9], "ahbf is better"),
        ([12.0, 12.3, 11.9], [10.0, 10.2, 9.9], "ahbf is worse"),
        ([10.0], [12.0], "-2.00 points of error over 1 seed: one seed cannot show"),
        ([10.0, 11.0], [12.0, 13.0], "over 2 seeds: no test (all differences are equal)"),
    ],
)
def test_verdict_follows_the_paired_test(taught, alone, sentence):
    ahbf, baseline = group("ahbf", taught), group("baseline", alone)
    test = paired_test(ahbf.errors, baseline.errors)
    rows = [
        SimpleNamespace(group=ahbf, equal_epochs=Reference(baseline, test)),
        SimpleNamespace(group=baseline, equal_epochs=Reference()),
    ]
    (line,) = verdicts(SimpleNamespace(rows=rows))
    assert line.startswith("ahbf vs baseline: ")
    assert sentence in line


ANALYSIS = {
    "format": "fastokd analysis 1",
    "data": "digits",
    "split": "test",
    "images": 100,
    "checkpoint": "last",
    "epochs": 2,
    "notes": ["a note with <b>"],
    "pictures": [
        {"name": "agreement", "title": "agreement of rows", "description": "A heat map & more."}
    ],
    "measures": {
        "any_branch_right": {
            "title": "any branch right",
            "description": "One is right.",
            "axes": [],
            "values": 0.8125,
        },
        "accuracy": {
            "title": "accuracy",
            "description": "Fraction.",
            "axes": ["row"],
            "values": {"branch1": 0.5, "ta2": 0.75},
        },
        "calibration_error": {
            "title": "calibration",
            "description": "Gap.",
            "axes": ["row"],
            "values": {"branch1": 0.125, "ta2": None},
        },
        "agreement": {
            "title": "agreement",
            "description": "Same class.",
            "axes": ["row", "row"],
            "values": {"branch1": {"branch1": 1, "ta2": 0.25}, "ta2": {"branch1": 0.25, "ta2": 1}},
        },
        "class_mixing": {
            "title": "mixing per class",
            "description": "Weights.",
            "axes": ["mixture", "input", "class"],
            "values": {
                "ta2": {
                    "branch1": {"cat": 0.375, "dog": 0.5},
                    "branch2": {"cat": 0.625, "dog": 0.5},
                }
            },
        },
        "confusion": {
            "title": "confusion",
            "description": "Counts.",
            "axes": ["class", "predicted class"],
            "values": {str(i): {str(j): 1 for j in range(100)} for i in range(100)},
        },
    },
}


@pytest.fixture
def analysed(sample_runs, tmp_path):
    run = copied(sample_runs / "ahbf-seed0", tmp_path / "<img src=x onerror=alert(1)>")
    (run / "analysis").mkdir()
    (run / "analysis" / "analysis.json").write_text(json.dumps(ANALYSIS))
    (run / "analysis" / "agreement.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg"/>')
    return run


def test_analysis_of_run_is_on_page(analysed, tmp_path):
    assert report([analysed], tmp_path / "report.html") == 0
    text = (tmp_path / "report.html").read_text()
    page = Page(text)
    check_nothing_is_loaded(page, text)
    assert "100 test images of digits, last checkpoint, 2 epochs" in page.text
    assert "a note with <b>" in page.text
    assert page.of("img")[-1]["alt"] == "A heat map & more."
    assert page.table("measure") == {"any branch right": ["0.8125"]}
    assert "any branch right: One is right." in page.text
    assert page.table("row") == {"branch1": ["0.5", "0.125"], "ta2": ["0.75", "-"]}
    folded = [{row[0]: row[1:] for row in rows} for rows in page.tables if rows[0][0] == ""]
    assert {"": ["branch1", "ta2"], "branch1": ["1", "0.25"], "ta2": ["0.25", "1"]} in folded
    assert {
        "": ["cat", "dog"],
        "ta2, branch1": ["0.375", "0.5"],
        "ta2, branch2": ["0.625", "0.5"],
    } in folded
    assert "confusion: 100 x 100 numbers, which analysis.json has." in page.text
    assert "The configurations are the same but for the seed." in page.text


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "analysis.json").write_text("{"),
        lambda folder: (folder / "analysis.json").unlink(),
        lambda folder: (folder / "agreement.svg").unlink(),
        lambda folder: change_json(folder / "analysis.json", lambda found: found.pop("measures")),
        lambda folder: (folder / "analysis.json").write_text("[]"),
        lambda folder: change_json(
            folder / "analysis.json", lambda found: found["measures"]["accuracy"].update(values=3)
        ),
    ],
)
def test_damaged_analysis_is_reported(analysed, damage):
    damage(analysed / "analysis")
    page = Page(analysis_section(read_run(analysed)))
    assert "is incomplete or damaged" in page.text
    assert "run 'fastokd analyze' again" in page.text


def test_unfinished_runs_are_reported_on_both_pages(sample_runs, tmp_path):
    run = copied(sample_runs / "ahbf-seed0", tmp_path / "run & more")
    change_config(run, epochs=5)
    assert report([run], tmp_path / "report.html") == 0
    assert main(["compare", str(run), "--no-latency", "--out", str(tmp_path / "compare.html")]) == 0
    for name in ("report", "compare"):
        text = (tmp_path / f"{name}.html").read_text()
        page = Page(text)
        check_nothing_is_loaded(page, text)
        assert f"{run}: unfinished, 2 of 5 epochs" in page.text


def test_invalid_arguments_are_one_line_and_write_no_page(
    sample_runs, tmp_path, capsys, monkeypatch
):
    assert report([], tmp_path / "report.html") == 2
    assert report([tmp_path], tmp_path / "report.html") == 4
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert report([sample_runs / "ahbf-seed0"], tmp_path / "report.html") == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.startswith("fastokd: ") for line in lines] == [True] * 3
    assert lines[2] == "fastokd: drawing needs matplotlib: pip install -e '.[plots]'"
    assert not (tmp_path / "report.html").exists()
