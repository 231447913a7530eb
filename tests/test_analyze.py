"""``fastokd analyze``: the formulas, the data gathered from a run, the written files, and the
messages about missing data.
"""

import dataclasses
import json
import math
import re
import shlex
import sys
import xml.etree.ElementTree
from pathlib import Path

import numpy as np
import pytest
import torch
from method_runs import few_digits, make
from oracles import diversity as oracle
from oracles.rows import softmax
from PIL import Image

from fastokd.cli import main
from fastokd.experiments.analysis import diversity
from fastokd.experiments.analysis.study import MEASURES, analyze_run, measures
from fastokd.experiments.analysis.study_figures import NAMES, draw_study
from fastokd.methods import get_method
from fastokd.metrics import ECE_BINS, calibration
from fastokd.train.config import TrainConfig
from fastokd.train.runs import load_run
from fastokd.train.step import BranchEvaluator

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "analyze.md").read_text(encoding="utf-8")


def bools(*rows):
    return torch.tensor(rows, dtype=torch.bool)


def close(found, expected):
    np.testing.assert_allclose(
        np.asarray(found, dtype=float), np.asarray(expected, dtype=float), rtol=1e-12, atol=1e-12
    )


class TestFormulas:
    """Against vectors computed apart, and against scikit-learn and SciPy."""

    def test_interrater_agreement(self):
        assert diversity.interrater_agreement(
            bools((1, 1, 0, 1, 0), (1, 0, 0, 1, 1), (1, 1, 0, 0, 1))
        ) == pytest.approx(1 / 6, abs=1e-12)
        assert diversity.interrater_agreement(bools(*[(1, 0, 1, 0)] * 3)) == 1
        assert diversity.interrater_agreement(bools((1, 0), (0, 1))) == -1
        for undefined in (bools((1, 1), (1, 1)), bools((0, 0), (0, 0)), bools((1, 0))):
            assert math.isnan(diversity.interrater_agreement(undefined))

    def test_pairwise_measures_match_manual_values(self):
        labels, predictions = torch.tensor([0, 1, 2, 0]), torch.tensor([[0, 2, 0, 1], [0, 2, 1, 0]])
        assert diversity.agreement(predictions)[0, 1] == 0.5
        assert diversity.error_overlap(predictions == labels)[0, 1] == 2 / 3
        assert diversity.same_error(predictions, labels)[0, 1] == 0.5
        assert diversity.any_right(predictions == labels) == 0.5
        # 1 both right, 1 only the first, 0 only the second, 1 neither: (1*1 - 1*0) / (1*1 + 1*0).
        assert diversity.q_statistic(bools((1, 1, 0), (1, 0, 0)))[0, 1] == 1
        assert diversity.q_statistic(bools((1, 1, 0, 0), (1, 0, 1, 0)))[0, 1] == 0

    def test_pairwise_measures_without_errors_are_nan(self):
        right = bools((1, 1), (1, 1), (1, 0))
        assert diversity.error_overlap(right).isnan().tolist() == [
            [True, True, False],
            [True, True, False],
            [False] * 3,
        ]
        assert diversity.q_statistic(right)[0].isnan().all()
        labels = torch.tensor([1, 0])
        assert diversity.same_error(labels[None], labels).isnan().all()

    @pytest.mark.parametrize(("num", "count", "classes"), [(2, 40, 2), (4, 200, 10), (3, 30, 100)])
    def test_measures_match_other_libraries(self, num, count, classes):
        generator = np.random.default_rng(num)
        labels = generator.integers(0, classes, count)
        logits = 3 * generator.normal(size=(num, count, classes)) + 4 * np.eye(classes)[labels]
        p = softmax(logits.reshape(-1, classes)).reshape(logits.shape)
        predictions, confidences = p.argmax(2), p.max(2)
        right = predictions == labels
        mine = torch.from_numpy(predictions), torch.from_numpy(labels), torch.from_numpy(right)
        assert 0 < right.mean() < 1
        close(diversity.interrater_agreement(mine[2]), oracle.interrater_agreement(right))
        for found, expected in (
            (
                diversity.agreement(mine[0]),
                lambda a, b: oracle.agreement(predictions[a], predictions[b]),
            ),
            (
                diversity.error_overlap(mine[2]),
                lambda a, b: oracle.error_overlap(right[a], right[b]),
            ),
            (
                diversity.same_error(*mine[:2]),
                lambda a, b: oracle.same_error(predictions[a], predictions[b], labels),
            ),
            (diversity.q_statistic(mine[2]), lambda a, b: oracle.q_statistic(right[a], right[b])),
        ):
            close(found, [[expected(a, b) for b in range(num)] for a in range(num)])
        close(diversity.pairwise_distances(torch.from_numpy(logits)), oracle.distances(logits))
        close(
            diversity.confusion_matrix(mine[0][0], mine[1], classes),
            oracle.confusion(predictions[0], labels, classes),
        )
        close(
            diversity.class_means(torch.from_numpy(confidences[0]), mine[1], classes),
            oracle.class_means(confidences[0], labels, classes),
        )
        found, expected = (
            calibration(torch.from_numpy(confidences[0]), mine[2][0]),
            oracle.calibration(confidences[0], right[0], ECE_BINS),
        )
        for value, other in zip((*found, found.error), expected, strict=True):
            close(value, other)

    def test_calibration_bin_includes_upper_edge(self):
        found = calibration(
            torch.tensor([0.5, 0.5, 1.0], dtype=torch.float64),
            torch.tensor([True, False, False]),
            bins=2,
        )
        assert found.images.tolist() == [2, 1]
        assert found.error == pytest.approx(1 / 3)
        assert (
            calibration(torch.ones(4, dtype=torch.float64), torch.ones(4, dtype=torch.bool)).error
            == 0
        )

    def test_mean_over_pairs_of_single_row_is_nan(self):
        assert diversity.mean_over_pairs(torch.tensor([[0.0, 1, 2], [1, 0, 6], [2, 6, 0]])) == 3
        assert math.isnan(diversity.mean_over_pairs(torch.zeros(1, 1)))


def train(folder, **settings):
    """A run of one epoch on a few digits, evaluated in batches of 64 and 36."""
    config = TrainConfig(
        data="digits",
        **{
            "model": "resnet8",
            "method": "ahbf",
            "branches": 3,
            "aux_blocks": 0,
            "epochs": 1,
            "batch_size": 64,
            "lr": 0.02,
            "device": "cpu",
            **settings,
        },
    )
    trainer = make(config, folder, few_digits())
    trainer.run()
    return folder


@pytest.fixture(autouse=True)
def small_digits(monkeypatch):
    """Runs are analysed on the images that ``train`` evaluated them on."""
    monkeypatch.setattr("fastokd.train.runs.open_data", lambda *_: few_digits())


@pytest.fixture(scope="module")
def ahbf(tmp_path_factory):
    return train(tmp_path_factory.mktemp("analyze") / "ahbf")


@pytest.fixture
def analyze(capsys):
    def call(*arguments):
        code = main(["analyze", *map(str, arguments)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def everything(folder):
    """The model's output for all images at once, and the labels: a pass of its own, not through
    the loader.
    """
    run = load_run(folder, device="cpu")
    target, images = zip(*[(batch.target, batch.images) for batch in run.loader], strict=True)
    evaluator = run.evaluator
    with torch.no_grad():
        result = evaluator.model(torch.cat(images))
    rows = {name: row.double().numpy() for name, row in evaluator.named_logits(result).items()}
    return rows, result, torch.cat(target).numpy()


def test_run_measures_match_formulas(ahbf):
    rows, result, labels = everything(ahbf)
    record = analyze_run(ahbf, max_images=10, device="cpu").record
    found = {key: measure["values"] for key, measure in record["measures"].items()}
    names = list(rows)
    assert record["rows"] == names == ["branch1", "branch2", "branch3", "ta2", "ta3", "ensemble"]
    assert (record["student"], record["branches"], record["ensemble_members"]) == (
        "branch1",
        names[:3],
        names[:3],
    )
    logits = np.stack(list(rows.values()))
    p = np.stack([softmax(row) for row in logits])
    predictions = logits.argmax(2)
    right = predictions == labels
    wrong = ~right[0]
    assert 3 < wrong.sum() < 100
    assert record["student_errors"] == wrong.sum()

    def near(value, expected):
        np.testing.assert_allclose(
            value, expected, rtol=2e-5, atol=1e-6
        )  # float32 logits of other batches

    apart, on_errors = oracle.distances(p).mean(2), oracle.distances(logits[:, wrong]).mean(2)
    for key, expected in (("softmax_distance", apart), ("logit_distance", on_errors)):
        near([list(line.values()) for line in found[key].values()], expected)
    pairs = [(0, 1), (0, 2), (1, 2)]
    near(found["branch_softmax_distance"], np.mean([apart[pair] for pair in pairs]))
    near(found["branch_logit_distance"], np.mean([on_errors[pair] for pair in pairs]))
    near(found["interrater_agreement"], oracle.interrater_agreement(right[:3]))
    near(found["any_branch_right"], right[:3].any(0).mean())
    for index, name in enumerate(names):
        assert found["accuracy"][name] == right[index].mean()
        assert found["top5_accuracy"][name] == np.mean(
            [
                label in np.argsort(row)[-5:]
                for row, label in zip(logits[index], labels, strict=True)
            ]
        )
        near(found["cross_entropy"][name], -np.log(p[index, np.arange(100), labels]).mean())
        near(found["confidence"][name], p[index].max(1).mean())
        counts, accuracy, confidence, error = oracle.calibration(
            p[index].max(1), right[index], ECE_BINS
        )
        near(found["calibration_error"][name], error)
        assert list(found["bin_count"][name].values()) == counts
        near(np.array(list(found["bin_accuracy"][name].values()), dtype=float), accuracy)
        near(np.array(list(found["bin_confidence"][name].values()), dtype=float), confidence)
        near(
            list(found["class_accuracy"][name].values()),
            oracle.class_means(right[index], labels, 10),
        )
        for other, second in enumerate(names):
            near(
                found["agreement"][name][second],
                oracle.agreement(predictions[index], predictions[other]),
            )
            near(
                found["error_overlap"][name][second],
                oracle.error_overlap(right[index], right[other]),
            )
            near(
                found["same_error"][name][second],
                oracle.same_error(predictions[index], predictions[other], labels),
            )
            near(
                np.array(found["q_statistic"][name][second], dtype=float),
                oracle.q_statistic(right[index], right[other]),
            )
    matrix = oracle.confusion(predictions[0], labels, 10)
    assert found["confusion"] == {
        str(a): {str(b): int(matrix[a, b]) for b in range(10) if matrix[a, b]} for a in range(10)
    }
    scores = {
        ("ta2", "branch2"): result.scores[0][:, 0],
        ("ta2", "branch1"): result.scores[0][:, 1],
        ("ta3", "branch3"): result.scores[1][:, 0],
        ("ta3", "ta2"): result.scores[1][:, 1],
    }
    assert [
        (mixture, name) for mixture, weights in found["mixing"].items() for name in weights
    ] == list(scores)
    for (mixture, name), weight in scores.items():
        near(found["mixing"][mixture][name], weight.mean())
        near(found["mixing_deviation"][mixture][name], weight.numpy().std())
        near(
            list(found["class_mixing"][mixture][name].values()),
            oracle.class_means(weight.double().numpy(), labels, 10),
        )
        # Training has measured the same at the end of its only epoch.
        near(found["epoch_mixing"][mixture][name]["1"], weight.mean())
    assert found.keys() == MEASURES.keys()


def test_features_are_of_images_misclassified_by_student(ahbf):
    rows, result, labels = everything(ahbf)
    wrong = rows["branch1"].argmax(1) != labels
    everyone, some, none = (
        analyze_run(ahbf, max_images=count, device="cpu").gathered for count in (1000, 5, 0)
    )
    for place, name in enumerate(("branch1", "branch2", "branch3")):
        pooled = (
            torch.nn.functional.adaptive_avg_pool2d(result.features[place], 1)
            .flatten(1)[torch.from_numpy(wrong)]
            .numpy()
        )
        order = np.lexsort(pooled.T)
        mine = everyone.features[name].numpy()
        np.testing.assert_allclose(mine[np.lexsort(mine.T)], pooled[order], rtol=1e-4, atol=1e-6)
        assert torch.equal(some.features[name], everyone.features[name][:5])
        assert len(none.features[name]) == 0
    assert sorted(everyone.feature_labels.tolist()) == sorted(labels[wrong].tolist())
    # Drawn from the whole split, and not the first of it.
    assert some.feature_labels.tolist() != labels[wrong][:5].tolist()


def test_features_with_wrong_branch_count_are_refused(ahbf, monkeypatch):
    measured = BranchEvaluator.measured
    monkeypatch.setattr(
        BranchEvaluator,
        "measured",
        lambda self, batches: (
            (result._replace(features=result.features[:-1]), rows, target)
            for result, rows, target in measured(self, batches)
        ),
    )
    with pytest.raises(ValueError, match="shorter"):
        analyze_run(ahbf, max_images=5, device="cpu")


@pytest.mark.parametrize(
    ("method", "count", "members"),
    [
        ("ahbf", 3, 3),
        ("one", 3, 3),
        ("dml", 2, 2),
        ("okddip", 4, 3),
        ("ffm", 4, 3),
        ("ffsd", 3, 2),
        ("baseline", 1, 1),
    ],
)
def test_ensemble_members_exclude_leader(method, count, members):
    loss = get_method(method).loss_class(num_branches=count)
    assert loss.ensemble_members == tuple(f"branch{m}" for m in range(1, members + 1))


@pytest.mark.parametrize(
    ("settings", "rows", "members", "mixtures"),
    [
        ({"method": "baseline", "branches": 1}, ["branch1"], ["branch1"], []),
        (
            {"method": "okddip", "topology": "peers"},
            ["branch1", "branch2", "leader", "ensemble"],
            ["branch1", "branch2"],
            ["group1", "group2"],
        ),
        (
            {"method": "one", "ema": 0.9},
            ["branch1", "branch2", "branch3", "ensemble", "ema"],
            ["branch1", "branch2", "branch3"],
            ["ensemble"],
        ),
        (
            {
                "method": "kdcl",
                "branches": 2,
                "model": "resnet8,resnet14",
                "method_options": {"variant": "linear"},
            },
            ["branch1", "branch2", "ensemble"],
            ["branch1", "branch2"],
            ["teacher"],
        ),
    ],
)
def test_analyze_each_method_has_rows_and_members(tmp_path, settings, rows, members, mixtures):
    record = analyze_run(train(tmp_path / "run", **settings), max_images=0, device="cpu").record
    assert (record["rows"], record["ensemble_members"]) == (rows, members)
    assert list(record["measures"].get("mixing", {"values": {}})["values"]) == mixtures
    for weights in record["measures"].get("mixing", {"values": {}})["values"].values():
        assert sum(weights.values()) == pytest.approx(1, abs=1e-5)
    said = " ".join(record["notes"])
    assert ("has no mixture" in said) == (not mixtures)
    assert ("there is one branch" in said) == (len(members) == 1)
    if record["student"] == "ema":
        assert (
            record["measures"]["accuracy"]["values"]["ema"]
            == load_run(tmp_path / "run").state["last"]["ema"]
        )


@pytest.fixture
def unsaved(monkeypatch):
    """Pictures are drawn and not encoded, which takes longer."""
    monkeypatch.setattr(
        "fastokd.experiments.analysis.figures.encoded",
        lambda plt, figure, _: plt.close(figure) or {},
    )


@pytest.fixture
def says(monkeypatch):
    """Let every row give the label the largest logit, but for some images of the student's."""

    def let(wrong):
        original = BranchEvaluator.measured

        def measured(self, batches):
            seen = 0
            for result, rows, target in original(self, batches):
                logits = {name: 9.0 * torch.nn.functional.one_hot(target, 10) for name in rows}
                for image in range(seen, seen + len(target)):
                    if image in wrong:
                        logits["branch1"][image - seen] = logits["branch1"][image - seen].roll(1)
                seen += len(target)
                yield result, logits, target

        monkeypatch.setattr(BranchEvaluator, "measured", measured)

    return let


def test_student_without_errors_omits_logit_distances(ahbf, says, tmp_path):
    (tmp_path / "tsne.svg").write_text("of an earlier analysis")
    says(wrong=())
    analysis = analyze_run(ahbf, device="cpu")
    drawn = analysis.write(tmp_path)
    assert (
        "branch1 gets every image right, so there are no distances of logits on its errors and no"
        " t-SNE" in analysis.record["notes"]
    )
    assert not (tmp_path / "tsne.svg").exists()
    assert set(NAMES) - set(drawn) == {"tsne"}
    found = json.loads((tmp_path / "analysis.json").read_text())["measures"]
    assert (
        found["branch_logit_distance"]["values"]
        is found["interrater_agreement"]["values"]
        is found["same_error"]["values"]["branch1"]["ta2"]
        is None
    )
    assert found["agreement"]["values"]["branch1"]["ta2"] == 1
    assert found["branch_softmax_distance"]["values"] == 0


def test_student_with_one_error_is_analyzed(ahbf, says, unsaved, tmp_path):
    says(wrong=(70,))
    analysis = analyze_run(ahbf, device="cpu")
    drawn = analysis.write(tmp_path)
    assert analysis.record["student_errors"] == 1
    # The student's logits of that image are the others' but for two classes.
    assert analysis.record["measures"]["logit_distance"]["values"]["branch1"][
        "branch3"
    ] == pytest.approx(9 * math.sqrt(2), abs=1e-12)
    assert "tsne" not in drawn
    assert any(
        re.search(
            "no figure tsne: t-SNE needs at least 4 points that differ, and there are 3", note
        )
        for note in analysis.record["notes"]
    )


def test_nonfinite_logits_are_refused(ahbf, analyze, monkeypatch, tmp_path):
    original = BranchEvaluator.measured
    monkeypatch.setattr(
        BranchEvaluator,
        "measured",
        lambda self, batches: (
            (result, {**rows, "ta2": rows["ta2"] * math.nan}, target)
            for result, rows, target in original(self, batches)
        ),
    )
    code, _, err = analyze(ahbf, "--out", tmp_path / "out", "--device", "cpu")
    assert (code, err.count("\n")) == (4, 1)
    assert "the logits are non-finite from image 1 on" in err
    assert not (tmp_path / "out").exists()


def test_figures_of_many_classes_limit_names(ahbf, unsaved, tmp_path):
    """Each figure names as many classes as can be read, and reports their number."""
    analysis = analyze_run(ahbf, max_images=20, device="cpu")
    names = [f"class {place}" for place in range(1000)]
    found = dataclasses.replace(analysis.gathered, labels=10 * torch.arange(100))
    record = {
        **analysis.record,
        "classes": names,
        "measures": measures(found, analysis.record["ensemble_members"], names, {}),
    }
    drawn, notes = draw_study(record, found, tmp_path)
    titles = {figure["name"]: figure["title"] for figure in drawn}
    assert titles["confusion"].endswith("; 20 of 1000 classes, those of the most frequent mistakes")
    assert titles["mixing"].endswith("; 20 of 1000 classes, those that are mixed most differently")
    assert set(titles) == set(NAMES) - {"mixing-by-epoch"}
    assert notes == []


def test_single_branch_without_gate_draws_three_figures(tmp_path):
    analysis = analyze_run(
        train(tmp_path / "run", method="baseline", branches=1), max_images=20, device="cpu"
    )
    assert analysis.write(tmp_path / "out") == ["tsne", "reliability", "confusion"]


def test_branches_of_different_width_have_separate_embeddings(ahbf, unsaved, tmp_path):
    analysis = analyze_run(ahbf, max_images=20, device="cpu")
    analysis.gathered.features["branch3"] = analysis.gathered.features["branch3"][:, :5]
    drawn, _ = draw_study(analysis.record, analysis.gathered, tmp_path)
    assert (
        "each has a separate embedding"
        in {figure["name"]: figure["description"] for figure in drawn}["tsne"]
    )


def test_missing_scikit_learn_omits_tsne_and_names_extra(ahbf, analyze, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
    code, out, _ = analyze(ahbf, "--out", tmp_path / "a", "--device", "cpu")
    assert code == 0
    assert "no figure tsne: t-SNE needs scikit-learn: pip install -e '.[plots]'" in out
    assert (tmp_path / "a" / "agreement.png").exists()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, out, _ = analyze(ahbf, "--out", tmp_path / "b", "--device", "cpu")
    assert code == 0
    assert "note: no figures: drawing needs matplotlib: pip install -e '.[plots]'" in out
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["analysis.json"]


def test_unfinished_run_is_reported(analyze, unsaved, tmp_path):
    code, out, _ = analyze(
        train(tmp_path / "run", epochs=1, branches=2), "--max-images", "0", "--device", "cpu"
    )
    assert (code, "not finished" in out) == (0, False)
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace("epochs: 1\n", "epochs: 5\n"))
    metrics = tmp_path / "run" / "metrics.jsonl"
    metrics.write_text(
        json.dumps(
            {
                key: value
                for key, value in json.loads(metrics.read_text()).items()
                if key != "mixing"
            }
        )
        + "\n"
    )
    code, out, _ = analyze(tmp_path / "run", "--max-images", "0", "--device", "cpu")
    assert code == 0
    assert "note: the run is not finished: 1 of 5 epochs are done" in out
    assert "note: mixing weights by epoch were not recorded" in out
    record = json.loads((tmp_path / "run" / "analysis" / "analysis.json").read_text())
    assert "mixing" in record["measures"]
    assert "epoch_mixing" not in record["measures"]
    # The best epoch of a finished run is not where it stopped.
    metrics.write_text(
        "".join(
            metrics.read_text().replace('"epoch": 0', f'"epoch": {epoch}') for epoch in range(5)
        )
    )
    assert (
        "not finished"
        not in analyze(tmp_path / "run", "--which", "best", "--max-images", "0", "--device", "cpu")[
            1
        ]
    )
    (tmp_path / "run" / "checkpoints" / "last.pt").unlink()
    code, _, err = analyze(tmp_path / "run", "--device", "cpu")
    assert (code, err.count("\n")) == (4, 1)
    assert "there is no checkpoint at" in err


def test_invalid_arguments_are_one_line(ahbf, analyze, tmp_path):
    for arguments, expected, pattern in (
        ([tmp_path], 4, "is not a run folder"),
        ([tmp_path / "none"], 4, "does not exist"),
        ([ahbf, "--max-images", "-1"], 2, "max_images=-1: use 0"),
        ([ahbf, "--split", "tset"], 2, "no split 'tset'"),
        ([ahbf, "--out", ahbf / "config.yaml"], 5, "cannot write"),
    ):
        code, _, err = analyze(*arguments)
        assert (code, err.count("\n")) == (expected, 1), err
        assert pattern in err


class TestPage:
    def test_page_commands_write_documented_files(self, monkeypatch, tmp_path, capsys):
        monkeypatch.undo()  # the whole of the digits, as a reader has them
        monkeypatch.chdir(tmp_path)
        commands = re.search(r"```\n(fastokd .*?)```", PAGE, flags=re.DOTALL)[1].splitlines()
        for command in commands:
            assert main(shlex.split(command)[1:]) == 0, command
        out = capsys.readouterr().out
        assert re.search(r"^branch1 \(student\) +\d+\.\d\d +\d", out, flags=re.MULTILINE)
        for folder in (Path("runs/a/analysis"), Path("compared/a")):
            record = json.loads((folder / "analysis.json").read_text())
            assert [figure["name"] for figure in record["pictures"]] == list(NAMES)
            assert {path.name for path in folder.iterdir()} == {
                "analysis.json",
                *(f"{name}{suffix}" for name in NAMES for suffix in (".svg", ".png")),
            }
            for name in NAMES:
                assert (
                    xml.etree.ElementTree.parse(folder / f"{name}.svg")
                    .getroot()
                    .tag.endswith("svg")
                )
                with Image.open(folder / f"{name}.png") as figure:
                    # Something is drawn: many colours, or at least several.
                    assert len(figure.convert("RGB").getcolors(2**24)) > 20
            assert list(record["measures"]["epoch_mixing"]["values"]["ta2"]["branch2"]) == [
                "1",
                "2",
            ]
        # The same again is the same to the last byte.
        before = {path: path.read_bytes() for path in Path("compared/a").iterdir()}
        assert main(shlex.split(commands[-1])[1:]) == 0
        assert {path: path.read_bytes() for path in Path("compared/a").iterdir()} == before

    def test_page_names_every_key_and_figure(self):
        numbers, figures = (
            [
                (key, after)
                for keys, after in re.findall(r"^\| (`.*?) \| (.*?) ?\|", part, flags=re.MULTILINE)
                for key in re.findall(r"`(.+?)`", keys)
            ]
            for part in PAGE.split("## The numbers")[1].split("## The figures")
        )
        assert numbers == [(key, ", ".join(measure.axes)) for key, measure in MEASURES.items()]
        assert [name for name, _ in figures] == list(NAMES)
