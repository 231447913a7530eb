"""Top-5 accuracy, negative log-likelihood and calibration error: against NumPy in float64, in the
records of a run, and in what reads them.
"""

import csv
import io
import json
import math
import statistics

import numpy as np
import pytest
import torch
from method_runs import few_digits, make
from oracles import diversity as oracle
from oracles.rows import softmax
from sample_runs import change_records, copied, records
from scipy.special import logsumexp

from fastokd.cli import main
from fastokd.losses import KDCLLoss
from fastokd.metrics import ECE_BINS, metric_sums, metrics_of
from fastokd.train.config import TrainConfig
from fastokd.train.runs import load_run

SIZES = (64, 64, 1, 30)


def expected_metrics(logits, labels):
    """The metrics of logits [N, C], float64."""
    p = softmax(logits)
    order = np.argsort(-logits, axis=1, kind="stable")
    right = order[:, 0] == labels
    top5 = {"top5": (order[:, :5] == labels[:, None]).any(1).mean()}
    return {
        "accuracy": right.mean(),
        **(top5 if logits.shape[1] > 5 else {}),
        "nll": (logsumexp(logits, axis=1) - logits[np.arange(len(labels)), labels]).mean(),
        "ece": oracle.calibration(p.max(1), right, ECE_BINS)[3],
    }


def metrics_in_batches(logits, labels):
    parts = zip(logits.split(SIZES), labels.split(SIZES), strict=True)
    return metrics_of(sum(metric_sums(*part) for part in parts))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("classes", "scale"), [(2, 3), (5, 1), (6, 1), (10, 0.1), (10, 4)])
def test_metrics_equal_float64_oracle(classes, scale, dtype):
    """Small logits leave bins of high confidence empty; bf16 logits have ties."""
    generator = torch.Generator().manual_seed(classes)
    logits = (scale * torch.randn(sum(SIZES), classes, generator=generator)).to(dtype)
    labels = torch.randint(classes, (sum(SIZES),), generator=generator)
    expected = expected_metrics(logits.double().numpy(), labels.numpy())
    found = metrics_in_batches(logits, labels)
    assert list(found) == list(expected)
    assert found == pytest.approx(expected, rel=1e-12)
    shares = torch.nn.functional.one_hot(labels, classes) * 0.6 + 0.4 / classes
    assert metrics_in_batches(logits, shares) == found


def test_equal_logits_rank_by_class():
    """All are equal: the first class is predicted, and the first five are the top 5."""
    found = metrics_of(metric_sums(torch.zeros(10, 10), torch.arange(10)))
    assert (found["accuracy"], found["top5"]) == (0.1, 0.5)
    assert found["nll"] == pytest.approx(math.log(10))
    assert found["ece"] == pytest.approx(0, abs=1e-12)


def test_nonfinite_logits_keep_other_counts():
    logits = torch.eye(8)[:6]
    logits[0], logits[1, 3] = math.nan, math.inf
    found = metrics_of(metric_sums(logits, torch.arange(6)))
    assert found["accuracy"] == pytest.approx(5 / 6)  # argmax takes the first NaN
    assert found["top5"] == pytest.approx(5 / 6)
    assert math.isnan(found["nll"])
    assert math.isnan(found["ece"])


def test_ensemble_of_predictions_has_metrics_of_mean_probability():
    generator = torch.Generator().manual_seed(0)
    rows = [2 * torch.randn(sum(SIZES), 10, generator=generator) for _ in range(2)]
    labels = torch.randint(10, (sum(SIZES),), generator=generator)
    mean = np.mean([softmax(row.double().numpy()) for row in rows], axis=0)
    found = metrics_in_batches(KDCLLoss(2).named_logits(rows)["ensemble"], labels)
    assert found == pytest.approx(expected_metrics(np.log(mean), labels.numpy()), rel=1e-5)


def test_records_hold_metrics_of_every_row(sample_runs, monkeypatch):
    monkeypatch.setattr("fastokd.train.runs.open_data", lambda *_: few_digits())
    run = load_run(sample_runs / "ahbf-seed0", device="cpu")
    images, labels = zip(*[(batch.images, batch.target) for batch in run.loader], strict=True)
    with torch.no_grad():
        rows = run.evaluator.named_logits(run.evaluator.model(torch.cat(images)))
    record = records(sample_runs / "ahbf-seed0")[-1]
    assert list(record["metrics"]) == ["top5", "nll", "ece"]
    for metric, values in record["metrics"].items():
        assert list(values) == list(rows) == list(record["eval"])
        for name, row in rows.items():
            expected = expected_metrics(row.double().numpy(), torch.cat(labels).numpy())[metric]
            assert values[name] == pytest.approx(expected, rel=2e-5, abs=1e-6)
    with open(sample_runs / "ahbf-seed0" / "metrics.csv", newline="") as file:
        assert float([*csv.DictReader(file)][-1]["metrics/ece/ta2"]) == values["ta2"]


def test_metrics_do_not_change_training(tmp_path, monkeypatch, digits_config):
    def weights(name):
        trainer = make(digits_config, tmp_path / name, few_digits())
        trainer.run()
        return trainer.step.state_dict()

    expected = weights("measured")
    zeros = torch.zeros(3 + 3 * ECE_BINS, dtype=torch.float64)
    monkeypatch.setattr("fastokd.train.step.metric_sums", lambda *_: zeros)
    found = weights("not-measured")
    assert found["model"].keys() == expected["model"].keys()
    for name, value in expected["model"].items():
        assert torch.equal(found["model"][name], value), name


@pytest.fixture
def digits_config():
    return TrainConfig(
        data="digits",
        model="resnet8",
        method="ahbf",
        branches=3,
        aux_blocks=1,
        epochs=2,
        batch_size=64,
        lr=0.05,
        device="cpu",
    )


def said(capsys, *arguments):
    assert main([*map(str, arguments)]) == 0
    return capsys.readouterr().out


def compare(capsys, *runs, form="terminal"):
    return said(capsys, "compare", *runs, "--no-latency", "--format", form)


def test_compare_averages_metrics_of_students(sample_runs, capsys):
    runs = [
        sample_runs / f"{method}-seed{seed}" for method in ("ahbf", "baseline") for seed in (0, 1)
    ]
    rows = {
        row["runs"]: row for row in csv.DictReader(io.StringIO(compare(capsys, *runs, form="csv")))
    }
    text = compare(capsys, *runs)
    assert max(map(len, text.split("Top-5")[1].split("NLL:")[0].splitlines())) <= 80
    for metric, scale, digits in (("top5", 100, 2), ("nll", 1, 4), ("ece", 100, 2)):
        values = [scale * records(run)[-1]["metrics"][metric]["branch1"] for run in runs[:2]]
        mean, deviation = statistics.mean(values), statistics.stdev(values)
        row = rows["resnet8 ahbf"]
        assert float(row[f"last_{metric}_mean"]) == pytest.approx(mean)
        assert float(row[f"last_{metric}_std"]) == pytest.approx(deviation)
        assert [*map(float, row[f"last_{metric}_by_seed"].split())] == pytest.approx(values)
        assert f"{mean:.{digits}f} +- {deviation:.{digits}f}" in text


def test_compare_without_metrics_omits_table(sample_runs, tmp_path, capsys):
    """Records of earlier versions lack them, and records of one seed may."""
    runs = [copied(sample_runs / f"ahbf-seed{seed}", tmp_path / str(seed)) for seed in (0, 1)]
    change_records(runs[0], lambda record: record.pop("metrics"))
    assert "ECE" not in compare(capsys, *runs)
    assert "last_ece" not in compare(capsys, *runs, form="csv")
    both = compare(capsys, *runs, sample_runs / "baseline-seed0")
    assert "resnet8 ahbf 2 - - -" in " ".join(both.split("Top-5")[1].split())


def test_compare_reports_nonfinite_metrics(sample_runs, tmp_path, capsys):
    runs = [copied(sample_runs / f"ahbf-seed{seed}", tmp_path / str(seed)) for seed in (0, 1)]
    change_records(runs[0], lambda record: record["metrics"]["nll"].update(branch1=math.nan))
    assert "non-finite" in compare(capsys, *runs)
    assert "nan" in compare(capsys, *runs, form="csv")


def test_run_prints_metrics_and_eval_repeats_them(tmp_path, capsys, digits_config):
    """Also after a resume from records without metrics."""
    out = tmp_path / "run"
    command = [
        "train",
        "--data",
        "digits",
        "--model",
        "resnet8",
        "--method",
        "kdcl",
        "--branches",
        2,
    ]
    first = said(capsys, *command, "--epochs", 1, "--device", "cpu", "--quiet", "--out", out)
    change_records(out, lambda record: record.pop("metrics"))
    second = said(capsys, "train", "--resume", out, "--epochs", 2, "--quiet")
    before, last = records(out)
    assert "metrics" not in before
    numbers = [
        f"{scale * last['metrics'][metric]['branch1']:.{digits}f}"
        for metric, scale, digits in (("top5", 100, 2), ("nll", 1, 4), ("ece", 100, 2))
    ]
    for text in (second, said(capsys, "eval", out, "--device", "cpu")):
        row = next(line for line in text.splitlines() if line.startswith("branch1 (student)"))
        assert row.split()[-3:] == numbers
        assert max(len(line) for line in text.splitlines() if line.startswith("branch")) <= 100
    assert "top-5 %, NLL, ECE %: of the last epoch" in first
    said(capsys, "export", out, "--device", "cpu")
    text = said(capsys, "eval", out / "export", "--data", "digits", "--device", "cpu")
    assert "top-5 {} %, NLL {}, ECE {} %".format(*numbers) in text
    assert json.loads((out / "summary.json").read_text())["last"] == last["eval"]
