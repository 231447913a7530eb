"""A run from start to end: what it writes, that it can be resumed exactly, and what comes out of
it.
"""

import dataclasses
import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file

from fastokd.data import open_dataset
from fastokd.errors import CheckpointError, ConfigError, StorageError
from fastokd.export import check_same_logits, load_student, measure_accuracy, write_student
from fastokd.losses import ramp_up
from fastokd.models import create_student
from fastokd.train import checkpoint, run_folder
from fastokd.train import trainer as trainer_module
from fastokd.train.checkpoint import ENTRIES, load_checkpoint, load_newest, serialize
from fastokd.train.config import TrainConfig
from fastokd.train.config_files import load_config
from fastokd.train.progress import Reporter
from fastokd.train.rules import check_config
from fastokd.train.run_folder import RunFolder
from fastokd.train.runs import load_run
from fastokd.train.trainer import Interrupted, NonFiniteLoss, Trainer

CONFIG = TrainConfig(
    data="digits",
    model="resnet8",
    method="ahbf",
    branches=3,
    aux_blocks=1,
    epochs=2,
    batch_size=64,
    lr=0.05,
)
ROWS = ["branch1", "branch2", "branch3", "ta2", "ta3"]
MEASURED = [*ROWS, "ensemble"]


@pytest.fixture(scope="module")
def digits():
    return open_dataset("digits")


def make(config, folder, dataset, resume=False):
    run = RunFolder.open(folder) if resume else RunFolder.create(folder)
    trainer = Trainer(config, run, Reporter(quiet=True), dataset)
    trainer.resume(load_checkpoint(run.last)) if resume else trainer.start()
    return trainer


@pytest.fixture(scope="module")
def finished(tmp_path_factory, digits):
    """A run of two epochs."""
    trainer = make(CONFIG, tmp_path_factory.mktemp("runs") / "straight", digits)
    return trainer, trainer.run()


def test_run_folder_is_complete(finished):
    trainer, summary = finished
    folder = trainer.run_folder.path
    assert sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
    ) == [
        "checkpoints/best.pt",
        "checkpoints/last-1.pt",
        "checkpoints/last.pt",
        "config.yaml",
        "environment.json",
        "log.txt",
        "metrics.csv",
        "metrics.jsonl",
        "student.json",
        "student.safetensors",
        "summary.json",
    ]
    assert load_config((folder / "config.yaml").read_text(), "config") == CONFIG
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["torch"] == torch.__version__
    assert environment["data"]["num_images"] == {"train": 1442, "test": 355}
    assert json.loads((folder / "summary.json").read_text()) == dataclasses.asdict(summary)


def test_metrics_contain_every_branch_ta_and_term(finished):
    trainer, summary = finished
    records = trainer.run_folder.read_metrics()
    assert [record["epoch"] for record in records] == [0, 1]
    assert [record["lr"] for record in records] == [0.05, pytest.approx(0.005)]
    # E is the number of epochs; epochs count from 0 (eq. 13).
    assert [record["kd_weight"] for record in records] == [ramp_up(0, 2), ramp_up(1, 2)]
    for record in records:
        assert list(record["eval"]) == MEASURED
        assert {f"accuracy/{name}" for name in MEASURED} < set(record["train"])
        weighted = sum(record["train"][f"ce/{name}"] for name in ROWS) + record["kd_weight"] * sum(
            weight * record["train"][f"kl/{edge}"]
            for edge, weight in (
                ("ta2->branch1", 4),
                ("branch2->branch1", 2),
                ("ta3->ta2", 4),
                ("branch3->ta2", 2),
            )
        )
        assert record["train"]["loss"] == pytest.approx(weighted, rel=1e-5)
    assert summary.last == records[-1]["eval"]
    assert summary.best["branch1"] == max(record["eval"]["branch1"] for record in records)
    assert summary.best == records[summary.best_epoch]["eval"]


def test_training_beats_chance(finished):
    _, summary = finished
    # Ten classes: chance is 0.1. The weakest of many seeds stays above 0.6 after two epochs.
    assert summary.last["branch1"] > 0.5


def test_evaluation_counts_each_image_once(finished, digits):
    trainer, summary = finished
    trainer.model.eval()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (digits.mean, digits.std))
    right = 0
    with torch.no_grad():
        for image, target in zip(digits.test.images, digits.test.targets, strict=True):
            logits = trainer.model((((image / 255) - mean) / std).unsqueeze(0)).logits[0]
            right += int(logits.argmax()) == int(target)
    assert summary.last["branch1"] == pytest.approx(
        right / 355, abs=1.5 / 355
    )  # one borderline image may round otherwise


def test_resumed_run_equals_uninterrupted_run(finished, tmp_path, digits):
    straight, summary = finished
    # The first epoch is that of the two-epoch run: same schedule, stopped after it as a kill would.
    first = make(CONFIG, tmp_path / "run", digits)
    first.run(until=1)
    second = make(CONFIG, tmp_path / "run", digits, resume=True)
    resumed = second.run()
    assert resumed.last == summary.last
    for name, value in straight.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name]), name
    mine, theirs = (trainer.run_folder.read_metrics() for trainer in (second, straight))
    for record in (*mine, *theirs):
        del record["seconds"], record["images_per_second"], record["waiting_share"]
    assert mine == theirs


def test_resume_restores_best_of_unfinished_epoch(finished, tmp_path, digits, capsys):
    first = make(CONFIG, tmp_path / "run", digits)
    first.run(until=1)
    kept = {path: path.read_bytes() for path in (first.run_folder.last, first.run_folder.best)}
    first.best = {"branch1": 0.0}  # the second epoch is the best
    first.run(until=2)
    first.run_folder.last.write_bytes(
        kept[first.run_folder.last]
    )  # as if killed right before last.pt took its place
    for path in first.run_folder.checkpoints.glob("last-*.pt"):
        path.unlink()
    assert load_checkpoint(first.run_folder.best)["epoch"] == 2
    second = make(CONFIG, tmp_path / "run", digits, resume=True)
    assert load_checkpoint(first.run_folder.best)["epoch"] == 1
    assert (second.best_epoch, second.best) == (0, second.last)
    assert "best" not in capsys.readouterr().out

    # Without a checkpoint of the best epoch a new best is tracked, with a message.
    first.run_folder.best.unlink()
    state = {**load_checkpoint(first.run_folder.last), "best_epoch": 7}
    del state["format"]
    first.run_folder.last.write_bytes(serialize(state))
    third = make(CONFIG, tmp_path / "run", digits, resume=True)
    assert (third.best_epoch, third.best) == (-1, {})
    assert re.search(
        r"best\.pt does not match the best epoch \(8\) and no other checkpoint does; tracking a"
        r" new best from here",
        capsys.readouterr().out,
    )
    assert third.run().best_epoch == 1


def test_load_run_skips_damaged_checkpoint_with_warning(finished, tmp_path):
    trainer, _ = finished
    folder = tmp_path / "run"
    shutil.copytree(trainer.run_folder.path, folder)
    (folder / "checkpoints" / "last.pt").write_bytes(b"")
    with pytest.warns(UserWarning, match=r"last\.pt is damaged"):
        loaded = load_run(folder)
    assert loaded.state["epoch"] == 1


def test_resume_with_more_epochs_continues(finished, tmp_path, digits):
    config = dataclasses.replace(CONFIG, epochs=1)
    make(config, tmp_path / "run", digits).run()
    with pytest.raises(
        ConfigError, match=r"already finished 1 of 1 epochs; pass a larger --epochs to continue"
    ):
        make(config, tmp_path / "run", digits, resume=True)
    more = make(dataclasses.replace(config, epochs=2), tmp_path / "run", digits, resume=True)
    more.run()
    assert [record["epoch"] for record in more.run_folder.read_metrics()] == [0, 1]
    assert RunFolder.open(tmp_path / "run").load_config().epochs == 2


def test_run_depends_only_on_seed(tmp_path, digits):
    config = dataclasses.replace(CONFIG, epochs=1, method="baseline", branches=1)
    weights = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        trainer = make(dataclasses.replace(config, seed=seed), tmp_path / name, digits)
        trainer.run()
        weights.append(load_file(trainer.run_folder.student))
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert not all(torch.equal(weights[0][key], weights[2][key]) for key in weights[0])


def test_resume_repairs_truncated_metrics(finished, tmp_path, digits):
    trainer = make(CONFIG, tmp_path / "run", digits)
    trainer.run(until=1)
    with open(trainer.run_folder.metrics_path, "a") as file:
        file.write('{"epoch": 1, "lr": 0.0')
    again = make(CONFIG, tmp_path / "run", digits, resume=True)
    again.run()
    lines = again.run_folder.metrics_path.read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [0, 1]


def test_load_run_returns_trained_weights(finished, digits):
    trainer, summary = finished
    for which, expected in (("last", summary.last), ("best", summary.best)):
        loaded = load_run(trainer.run_folder.path, which)
        assert loaded.evaluator.evaluate(loaded.loader) == expected


def test_student_is_the_kept_branch(finished, digits):
    trainer, summary = finished
    student, record = load_student(trainer.run_folder.path)
    assert record["accuracy"] == {
        "top1": summary.last["branch1"],
        "data": "digits",
        "split": "test",
        "num_images": 355,
        "epoch": 2,
    }
    assert record["classes"] == [str(digit) for digit in range(10)]
    assert record["architecture"] == {"name": "resnet8", "num_classes": 10}
    assert json.loads((trainer.run_folder.path / "student.json").read_text()) == record
    assert set(load_file(trainer.run_folder.student)) == set(
        create_student("resnet8", 10).state_dict()
    )
    trainer.model.eval()
    assert check_same_logits(trainer.model.student(), student, trainer.eval_loader) == 355
    assert measure_accuracy(student, trainer.eval_loader) == summary.last["branch1"]


def test_student_check_detects_a_difference(finished):
    trainer, _ = finished
    other = create_student("resnet8", 10).eval()
    with pytest.raises(CheckpointError, match="logits differ by up to"):
        check_same_logits(trainer.model.student().eval(), other, trainer.eval_loader)


def test_val_split_excludes_test_images(tmp_path):
    config = dataclasses.replace(CONFIG, val_split=0.2, epochs=1, method="baseline", branches=1)
    trainer = make(config, tmp_path / "run", None)
    assert trainer.dataset.evaluation.name == "val"
    assert len(trainer.dataset.train) + len(trainer.dataset.evaluation) == 1442


def test_non_finite_loss_stops_the_run_and_names_the_terms(tmp_path, digits):
    trainer = make(dataclasses.replace(CONFIG, lr=1e30), tmp_path / "run", digits)
    with pytest.raises(
        NonFiniteLoss,
        match=r"epoch 1, step \d+: non-finite loss, ce/branch1.*no epoch was saved.*lower --lr$",
    ):
        trainer.run()
    assert not trainer.run_folder.last.exists()


def test_bf16_autocast_trains(tmp_path, digits):
    summary = make(dataclasses.replace(CONFIG, precision="bf16"), tmp_path / "run", digits).run()
    assert summary.last["branch1"] > 0.4


@pytest.mark.parametrize(("method", "expected"), [("ahbf", MEASURED), ("baseline", ["branch1"])])
def test_metrics_have_rows_of_each_method(tmp_path, digits, method, expected):
    config = dataclasses.replace(
        CONFIG,
        epochs=1,
        method=method,
        branches=len([name for name in expected if name.startswith("b")]),
    )
    assert list(make(config, tmp_path / "run", digits).run().last) == expected


class TestCheckpoints:
    def test_checkpoint_of_other_architecture_is_refused(self, finished, tmp_path, digits):
        trainer, _ = finished
        other = make(dataclasses.replace(CONFIG, model="resnet14"), tmp_path / "run", digits)
        state = load_checkpoint(trainer.run_folder.last)
        other.run_folder.last.write_bytes(serialize({**state, "config": other.config.to_yaml()}))
        with pytest.raises(
            CheckpointError, match=r"is of another architecture: \d+ weights are missing, e\.g\. "
        ):
            other.resume(load_checkpoint(other.run_folder.last))

    def test_checkpoint_of_other_classes_is_refused(self, finished, tmp_path, digits):
        trainer, _ = finished
        renamed = dataclasses.replace(digits, classes=tuple("abcdefghij"))
        folder = tmp_path / "run"
        other = make(CONFIG, folder, renamed)
        other.run_folder.last.write_bytes(trainer.run_folder.last.read_bytes())
        with pytest.raises(
            CheckpointError,
            match=r"trained on the classes 0, 1, 2, 3 and 6 more, the data has a, b",
        ):
            other.resume(load_checkpoint(other.run_folder.last))

    @pytest.mark.parametrize("keep", [0, 10, 1000, 50_000])
    def test_truncated_checkpoint_is_refused(self, finished, tmp_path, keep):
        trainer, _ = finished
        path = tmp_path / "last.pt"
        path.write_bytes(trainer.run_folder.last.read_bytes()[:keep])
        with pytest.raises(CheckpointError, match="is damaged or not a checkpoint"):
            load_checkpoint(path)

    def test_checkpoint_that_runs_code_is_refused(self, tmp_path):
        class Evil:
            def __reduce__(self):
                return (open, (str(tmp_path / "written"), "w"))

        path = tmp_path / "last.pt"
        torch.save({"format": 1, "model": Evil()}, path)
        with pytest.raises(CheckpointError, match="is damaged or not a checkpoint"):
            load_checkpoint(path)
        assert not (tmp_path / "written").exists()

    def test_missing_or_foreign_checkpoint_is_refused(self, tmp_path):
        with pytest.raises(CheckpointError, match="there is no checkpoint at"):
            load_checkpoint(tmp_path / "last.pt")
        torch.save({"weights": torch.zeros(3)}, tmp_path / "other.pt")
        with pytest.raises(CheckpointError, match="is not a fastokd checkpoint"):
            load_checkpoint(tmp_path / "other.pt")
        torch.save({"format": 99, "model": {}}, tmp_path / "newer.pt")
        with pytest.raises(CheckpointError, match="has format 99"):
            load_checkpoint(tmp_path / "newer.pt")

    def test_resume_without_checkpoint_is_refused(self, tmp_path, digits):
        make(CONFIG, tmp_path / "run", digits)
        with pytest.raises(CheckpointError, match="there is no checkpoint"):
            make(CONFIG, tmp_path / "run", digits, resume=True)

    @pytest.mark.parametrize("entry", sorted(ENTRIES))
    def test_checkpoint_with_wrong_entry_is_refused(self, finished, tmp_path, entry):
        trainer, _ = finished
        state = load_checkpoint(trainer.run_folder.last)
        for wrong in (
            {key: value for key, value in state.items() if key != entry},
            {**state, entry: None},
        ):
            (tmp_path / "last.pt").write_bytes(serialize(wrong))
            with pytest.raises(CheckpointError, match=f"'{entry}' is missing or of the wrong type"):
                load_checkpoint(tmp_path / "last.pt")

    def test_checkpoint_of_other_optimizer_is_refused(self, finished, tmp_path, digits):
        trainer, _ = finished
        config = dataclasses.replace(CONFIG, epochs=3)
        other = make(config, tmp_path / "run", digits)
        state = load_checkpoint(trainer.run_folder.last)
        state["optimizer"] = {"state": {}, "param_groups": []}
        with pytest.raises(CheckpointError, match="an optimizer state that does not fit"):
            other.resume(state)

    def test_checkpoint_of_other_images_is_refused(self, finished, tmp_path, digits):
        trainer, _ = finished
        other = make(
            dataclasses.replace(CONFIG, epochs=3),
            tmp_path / "run",
            dataclasses.replace(digits, fingerprint="other"),
        )
        with pytest.raises(
            CheckpointError, match="was trained on other images than digits holds now"
        ):
            other.resume(load_checkpoint(trainer.run_folder.last))

    def test_checkpoint_of_changed_config_is_refused(self, finished, tmp_path, digits):
        trainer, _ = finished
        other = make(
            dataclasses.replace(CONFIG, epochs=3, lr=0.5, seed=7), tmp_path / "run", digits
        )
        with pytest.raises(
            ConfigError,
            match=(
                r"differs from the checkpoint's \(old, new: lr: 0\.05, 0\.5; seed: 0,"
                r" 7\).*--allow-config-change"
            ),
        ):
            other.resume(load_checkpoint(trainer.run_folder.last))


@pytest.mark.parametrize("failing", ["best.pt", "student.safetensors", "metrics.jsonl", "last.pt"])
def test_run_resumes_exactly_after_failed_write(finished, tmp_path, digits, monkeypatch, failing):
    straight, summary = finished
    trainer = make(CONFIG, tmp_path / "run", digits)
    trainer.run(until=1)

    def refusing(write):
        def written(path, *arguments, **options):
            if path.name == failing:
                raise StorageError(f"cannot write {path}: No space left on device")
            return write(path, *arguments, **options)

        return written

    for module, name in (
        (checkpoint, "write_atomically"),
        (run_folder, "append_line"),
        (trainer_module, "write_student"),
    ):
        monkeypatch.setattr(module, name, refusing(getattr(module, name)))
    trainer.best = {
        "branch1": 0.0
    }  # the second epoch is to be the best, so that best.pt is written
    with pytest.raises(StorageError):
        trainer.run()
    assert load_newest(trainer.run_folder.checkpoints)[0]["epoch"] == 1
    monkeypatch.undo()
    resumed = make(CONFIG, tmp_path / "run", digits, resume=True)
    assert resumed.run().last == summary.last
    assert [record["epoch"] for record in resumed.run_folder.read_metrics()] == [0, 1]
    assert load_checkpoint(resumed.run_folder.best)["best_epoch"] == summary.best_epoch
    for name, value in straight.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_ctrl_c_while_saving_reports_no_checkpoint(tmp_path, digits, monkeypatch):
    trainer = make(CONFIG, tmp_path / "run", digits)

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer.store, "save", interrupt)
    with pytest.raises(Interrupted, match="no epoch was saved, so there is no checkpoint"):
        trainer.run()


def test_two_processes_cannot_share_a_run_folder(tmp_path):
    first = RunFolder.create(tmp_path / "run")
    with pytest.raises(ConfigError, match="another process is training in"):
        RunFolder.create(tmp_path / "run")
    first.unlock()
    RunFolder.create(tmp_path / "run")


@pytest.mark.parametrize("line", ["{}", "[1]", '{"epoch": "a", "eval": {}}', "\xff"])
def test_damaged_metrics_lines_are_skipped(finished, tmp_path, line):
    trainer, _ = finished
    run = RunFolder(tmp_path)
    run.metrics_path.write_bytes(
        trainer.run_folder.metrics_path.read_bytes() + line.encode("latin-1") + b"\n"
    )
    assert [record["epoch"] for record in run.read_metrics()] == [0, 1]


class TestExports:
    @pytest.mark.parametrize(
        "entry", ["architecture", "classes", "preprocessing", "accuracy", "provenance", "format"]
    )
    def test_export_with_incomplete_record_is_refused(self, finished, tmp_path, entry):
        trainer, _ = finished
        student, record = load_student(trainer.run_folder.path)
        for wrong in (
            {key: value for key, value in record.items() if key != entry},
            {**record, entry: "x"},
        ):
            write_student(tmp_path / "student.safetensors", student, wrong)
            with pytest.raises(CheckpointError, match="is damaged: its record"):
                load_student(tmp_path)

    def test_damaged_export_is_refused(self, finished, tmp_path):
        trainer, _ = finished
        path = tmp_path / "student.safetensors"
        path.write_bytes(trainer.run_folder.student.read_bytes()[:1000])
        with pytest.raises(CheckpointError, match="is damaged or not a safetensors file"):
            load_student(path)

    def test_foreign_file_is_refused(self, tmp_path):
        from safetensors.torch import save_file

        save_file({"weight": torch.zeros(2)}, tmp_path / "student.safetensors")
        with pytest.raises(CheckpointError, match="is not a student exported by fastokd"):
            load_student(tmp_path)

    def test_export_of_unknown_architecture_is_refused(self, finished, tmp_path):
        trainer, _ = finished
        student, record = load_student(trainer.run_folder.path)
        write_student(
            tmp_path / "student.safetensors",
            student,
            {**record, "architecture": {"name": "resnet999", "num_classes": 10}},
        )
        with pytest.raises(CheckpointError, match="unknown model 'resnet999'"):
            load_student(tmp_path)
        write_student(
            tmp_path / "student.safetensors",
            student,
            {**record, "architecture": {"name": "resnet20", "num_classes": 10}},
        )
        with pytest.raises(
            CheckpointError, match="is of another architecture: 72 weights are missing"
        ):
            load_student(tmp_path)


class TestConfig:
    def test_yaml_round_trip(self):
        config = dataclasses.replace(
            CONFIG, method_options={"temperature": 4.0, "detach_teacher": True}, lr_decay_at=(0.25,)
        )
        assert load_config(config.to_yaml(), "here") == config

    def test_yaml_numbers_without_a_dot(self):
        # YAML 1.1 reads 5e-4 as a string.
        assert load_config("weight_decay: 5e-4\nlr: 1", "here") == TrainConfig(
            weight_decay=5e-4, lr=1.0
        )

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("epoch: 3", r"here: unknown field 'epoch'; did you mean 'epochs'\?"),
            ("epochs: three", r"here: epochs='three' has the wrong type; expected int"),
            ("epochs: true", r"epochs=True has the wrong type"),
            ("epochs: null", r"epochs=None has the wrong type"),
            ("lr_decay_at: 0.5", r"lr_decay_at=0.5 has the wrong type"),
            ("nesterov: 1", r"nesterov=1 has the wrong type; expected bool"),
            ("method_options: {1: 2}", r"method_options=\{1: 2\} has the wrong type"),
            ("- 1", r"expected a mapping of fields, got list"),
            ("a: [", r"here is not valid YAML"),
        ],
    )
    def test_bad_yaml_is_refused(self, text, message):
        with pytest.raises(ConfigError, match=message):
            load_config(text, "here")

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"method": "ahfb"}, r"unknown method 'ahfb'; did you mean 'ahbf'\?"),
            (
                {"preset": "papers"},
                r"unknown preset 'papers' of method 'ahbf'; did you mean 'paper'\?",
            ),
            ({"branches": 1}, r"1 branches: method 'ahbf' takes 2 to 8"),
            ({"branches": 9}, r"9 branches"),
            ({"method": "baseline"}, r"3 branches: method 'baseline' takes 1 only"),
            (
                {"method_options": {"temprature": 3}},
                r"unknown option 'temprature' of method 'ahbf'; did you mean 'temperature'\?",
            ),
            ({"method_options": {"temperature": 0}}, r"temperature=0"),
            ({"method_options": {"lambda_ta": -1}}, r"lambda_ta=-1"),
            ({"method_options": {"temperature": "hot"}}, r"method 'ahbf'"),
            ({"epochs": 0}, r"epochs=0: it must be at least 1"),
            ({"batch_size": 1}, r"batch_size=1"),
            ({"lr": float("nan")}, r"lr=nan"),
            ({"lr": -1.0}, r"lr=-1.0"),
            ({"lr_decay_at": (150.0,)}, r"lr_decay_at=\(150.0,\): each value must be in \(0, 1\)"),
            ({"momentum": 0.0}, r"nesterov=True: it must be false when momentum is 0"),
            ({"weight_decay": -1.0}, r"weight_decay"),
            ({"val_split": 1.0}, r"val_split=1.0"),
            ({"precision": "fp23"}, r"unknown precision 'fp23'; did you mean 'fp32'\?"),
            ({"model": "resnet21"}, r"unknown model 'resnet21'; did you mean 'resnet\d+'\?"),
            ({"seed": 2**31}, r"seed=2147483648"),
            ({"data": "b\udcff"}, r"not valid UTF-8"),
            (
                {"method_options": {"detach_teacher": 3}},
                r"detach_teacher=3; it must be True or False",
            ),
            ({"impl": "tritn"}, r"unknown impl 'tritn'; did you mean 'triton'\?"),
            ({"aux_blocks": -1}, r"aux_blocks=-1"),
            ({"seed": -1}, r"seed=-1"),
        ],
    )
    def test_bad_values_are_refused(self, changes, message):
        with pytest.raises(ConfigError, match=message):
            check_config(dataclasses.replace(CONFIG, **changes))

    def test_default_lr_schedule_matches_papers(self):
        config = TrainConfig(data="x")
        rates = [config.lr_at(epoch) for epoch in range(300)]
        assert rates[:150] == [0.1] * 150
        assert rates[150:225] == [pytest.approx(0.01)] * 75
        assert rates[225:] == [pytest.approx(0.001)] * 75

    def test_lr_decays_at_epoch_of_fraction(self):
        for epochs in (100, 150, 164, 182, 200, 240, 300):
            for at in range(1, epochs):
                config = TrainConfig(data="x", epochs=epochs, lr_decay_at=(at / epochs,))
                assert config.lr_at(at - 1) == 0.1
                assert config.lr_at(at) == pytest.approx(0.01), (at, epochs)
