"""The records of a run: CSV, TensorBoard and W&B say what metrics.jsonl says, also after a resume;
environment.json.
"""

import csv
import json
import math
import struct
import sys
import time
from datetime import datetime
from pathlib import Path
from types import ModuleType

import pytest
import torch

from fastokd.data import open_dataset
from fastokd.errors import MissingExtra
from fastokd.train import run_folder
from fastokd.train.checkpoint import load_checkpoint
from fastokd.train.config import TrainConfig
from fastokd.train.logs import check_sinks, open_sinks
from fastokd.train.progress import Reporter
from fastokd.train.run_folder import RunFolder
from fastokd.train.trainer import Trainer


def record(epoch, value=0.5, **extra):
    return {
        "epoch": epoch,
        "lr": 0.1,
        "train": {"loss": 1 / 3 + value, "kl/ta2->branch1": value},
        "eval": {"branch1": value, "ta2": 1.0},
        **extra,
    }


SCALARS = {"lr", "train/loss", "train/kl/ta2->branch1", "eval/branch1", "eval/ta2"}


def rows_of(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


class TestCsv:
    def check(self, run):
        """Every number of the one file is in the other, to the last bit."""
        records = [json.loads(line) for line in run.metrics_path.read_text().splitlines()]
        rows = rows_of(run.csv_path)
        assert len(rows) == len(records)
        for row, of_epoch in zip(rows, records, strict=True):
            left = dict(row)
            for name, value in of_epoch.items():
                for column, number in (
                    {f"{name}/{inner}": item for inner, item in value.items()}.items()
                    if isinstance(value, dict)
                    else [(name, value)]
                ):
                    found = left.pop(column)
                    assert float(found) == number or (
                        math.isnan(float(found)) and math.isnan(number)
                    )
            assert set(left.values()) <= {""}
        return rows

    def test_csv_equals_records(self, tmp_path):
        run = RunFolder.create(tmp_path / "run")
        run.append_metrics(record(0))
        assert list(self.check(run)[0]) == [
            "epoch",
            "lr",
            "train/loss",
            "train/kl/ta2->branch1",
            "eval/branch1",
            "eval/ta2",
        ]
        run.append_metrics(record(1, float("nan")))
        run.append_metrics(record(2, 0.1 + 0.2, **{'with, comma and "quote"': 1e-300}))
        rows = self.check(run)
        assert [row['with, comma and "quote"'] for row in rows] == ["", "", "1e-300"]
        run.keep_metrics_before(2)  # a resume at the third epoch
        assert [row["epoch"] for row in self.check(run)] == ["0", "1"]
        run.append_metrics(record(2, 0.75))
        assert self.check(run)[2]["eval/branch1"] == "0.75"

    def test_csv_is_repaired_after_a_crash(self, tmp_path):
        run = RunFolder.create(tmp_path / "run")
        run.append_metrics(record(0))
        with open(run.metrics_path, "a") as file:
            file.write(json.dumps(record(1)) + "\n" + '{"epoch": 2, "lr"')
        run.keep_metrics_before(2)
        assert [row["epoch"] for row in self.check(run)] == ["0", "1"]


def scalars(folder):
    """The content as read by TensorBoard: {tag: [(step, value)]}, and the text of the
    configuration.
    """
    from tensorboard.backend.event_processing import plugin_event_accumulator
    from tensorboard.util import tensor_util

    events = plugin_event_accumulator.EventAccumulator(
        str(folder), tensor_size_guidance={"scalars": 0, "text": 0}
    )
    events.Reload()
    found = {
        tag: [
            (event.step, tensor_util.make_ndarray(event.tensor_proto).item())
            for event in events.Tensors(tag)
        ]
        for tag in events.Tags()["tensors"]
    }
    ((step, text),) = found.pop("config/text_summary")
    assert step == 0
    return found, text.decode()


class TestTensorBoard:
    @pytest.fixture(autouse=True)
    def installed(self):
        pytest.importorskip("tensorboard", reason="pip install -e '.[tensorboard]'")

    def test_tensorboard_shows_every_record(self, tmp_path):
        said = []
        (sink,) = open_sinks(
            ["tensorboard"], tmp_path, {"model": "resnet8", "lr": 0.1}, [], said.append
        )
        for epoch in range(3):
            sink.write(record(epoch, epoch / 4))
            assert scalars(tmp_path / "tensorboard")[0]["eval/branch1"][-1] == (
                epoch,
                epoch / 4,
            )  # at once, not at the end
        sink.close()
        found, config = scalars(tmp_path / "tensorboard")
        assert set(found) == SCALARS
        assert found["train/loss"] == [
            (epoch, pytest.approx(1 / 3 + epoch / 4)) for epoch in range(3)
        ]
        assert config.splitlines() == ["    model: resnet8", "    lr: 0.1"]
        assert said == []

    def test_tensorboard_after_resume_shows_records(self, tmp_path):
        """The first session was killed: it had shown two epochs more than are saved, and lacked one
        that is.
        """
        (first,) = open_sinks(["tensorboard"], tmp_path, {"epochs": 5}, [], pytest.fail)
        for epoch in (0, 2, 3):
            first.write(record(epoch, 0.25))
        (second,) = open_sinks(
            ["tensorboard"],
            tmp_path,
            {"epochs": 5},
            [record(0, 0.25), record(1, 0.25)],
            pytest.fail,
        )
        assert scalars(tmp_path / "tensorboard")[0]["eval/branch1"] == [(0, 0.25), (1, 0.25)]
        second.write(record(2, 0.75))
        second.close()
        assert scalars(tmp_path / "tensorboard")[0]["eval/branch1"] == [
            (0, 0.25),
            (1, 0.25),
            (2, 0.75),
        ]
        first.close()

    def test_tensorboard_of_a_resumed_run(self, tmp_path):
        config = TrainConfig(
            data="digits",
            model="resnet8",
            method="baseline",
            branches=1,
            aux_blocks=0,
            epochs=2,
            batch_size=256,
            log_to=("tensorboard",),
        )
        digits, folder = open_dataset("digits"), tmp_path / "run"
        first = Trainer(config, RunFolder.create(folder), Reporter(quiet=True), digits)
        first.start()
        first.run(until=1)  # and killed
        run = RunFolder.open(folder)
        second = Trainer(config, run, Reporter(quiet=True), digits)
        second.resume(load_checkpoint(run.last))
        second.run()
        found, _ = scalars(folder / "tensorboard")
        for name in ("eval/branch1", "train/loss", "lr"):
            rows = [
                (int(row["epoch"]), pytest.approx(float(row[name])))
                for row in rows_of(folder / "metrics.csv")
            ]
            assert found[name] == rows
            assert [epoch for epoch, _ in rows] == [0, 1]
        assert [
            session["torch"] for session in json.loads(run.environment_path.read_text())["sessions"]
        ] == [torch.__version__] * 2


class TestFailures:
    """A failing sink is reported once; the other sinks and the run continue."""

    @pytest.fixture(autouse=True)
    def installed(self):
        pytest.importorskip("tensorboard", reason="pip install -e '.[tensorboard]'")

    def test_sink_that_cannot_start_is_dropped(self, tmp_path):
        (tmp_path / "tensorboard").write_text("a file where the folder should be")
        said = []
        (sink,) = open_sinks(["tensorboard"], tmp_path, {}, [], said.append)
        sink.write(record(0))
        sink.close()
        assert len(said) == 1
        assert said[0].startswith("tensorboard: ")
        assert "continuing without it, metrics.jsonl has every epoch" in said[0]

    def test_sink_that_fails_later_is_dropped(self, tmp_path, monkeypatch):
        said = []
        (broken,) = open_sinks(["tensorboard"], tmp_path / "one", {}, [], said.append)
        (other,) = open_sinks(["tensorboard"], tmp_path / "two", {}, [], said.append)
        broken.write(record(0))

        from torch.utils.tensorboard import SummaryWriter

        flush = SummaryWriter.flush

        def refuse(writer):
            if Path(writer.log_dir).is_relative_to(tmp_path / "one"):
                raise OSError(28, "No space left on device")
            flush(writer)

        monkeypatch.setattr(SummaryWriter, "flush", refuse)
        for epoch in range(1, 4):
            broken.write(record(epoch))
            other.write(record(epoch))
        broken.close()
        other.close()
        assert said == [
            "tensorboard: [Errno 28] No space left on device; continuing without it,"
            " metrics.jsonl has every epoch"
        ]
        assert [step for step, _ in scalars(tmp_path / "two" / "tensorboard")[0]["lr"]] == [1, 2, 3]


@pytest.mark.parametrize(
    ("name", "package"), [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")]
)
def test_missing_package_is_reported_first(tmp_path, monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, package, None)
    config = TrainConfig(data="no/such/folder", model="resnet8", log_to=(name,))
    for ask in (
        lambda: check_sinks([name]),
        lambda: open_sinks([name], tmp_path, {}, [], pytest.fail),
        lambda: Trainer(config, RunFolder(tmp_path), Reporter(silent=True)),
    ):
        with pytest.raises(
            MissingExtra, match=rf"--log-to {name} needs .*: pip install -e '\.\[{name}\]'"
        ):
            ask()
    assert list(tmp_path.iterdir()) == []


def test_folder_named_wandb_is_not_the_package(tmp_path, monkeypatch):
    (tmp_path / "wandb").mkdir()  # W&B makes one where it is run
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.delitem(sys.modules, "wandb")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(MissingExtra, match="pip install"):
        check_sinks(["wandb"])


def wandb_file(path):
    """The records of an offline W&B run: protocol buffers in blocks of 32 KiB, each part with its
    checksum, length and kind.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, part, found = path.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        if at + 7 + length > len(data):
            break  # it is still being written
        part += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            found.append(Record.FromString(part))
            part = b""
    return found


def finished(path):
    """The records when the last is there: W&B's own process may write the file a moment after
    ``finish`` has returned.
    """
    until = time.monotonic() + 60
    while time.monotonic() < until:
        found = wandb_file(path)
        if found and found[-1].WhichOneof("record_type") == "exit":
            return found
        time.sleep(0.1)
    pytest.fail(
        f"{path} was not finished: {[item.WhichOneof('record_type') for item in wandb_file(path)]}"
    )


def test_wandb_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb.proto", reason="pip install -e '.[wandb]'")
    for name, value in {
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
        "WANDB_CONFIG_DIR": str(tmp_path / "config"),
        "WANDB_CACHE_DIR": str(tmp_path / "cache"),
    }.items():
        monkeypatch.setenv(name, value)
    folder = tmp_path / "runs" / "resnet8-ahbf"
    folder.mkdir(parents=True)
    (first,) = open_sinks(
        ["wandb"], folder, {"model": "resnet8", "betas": [0.9, 0.99]}, [], pytest.fail
    )
    first.write(record(0, 0.25))
    first.write(record(1, 0.25))
    first.close()
    time.sleep(1.1)  # W&B names the folder of a session by the second
    (second,) = open_sinks(["wandb"], folder, {"model": "resnet8"}, [record(0, 0.25)], pytest.fail)
    second.write(record(1, 0.75))
    second.close()

    files = sorted(folder.glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 2
    sessions = [finished(file) for file in files]
    runs = [
        next(item.run for item in records if item.WhichOneof("record_type") == "run")
        for records in sessions
    ]
    assert runs[0].run_id == runs[1].run_id
    assert (runs[1].project, runs[1].display_name) == ("fastokd", "resnet8-ahbf")
    assert {
        item.key: json.loads(item.value_json)
        for item in runs[0].config.update
        if item.key != "_wandb"
    } == {"model": "resnet8", "betas": [0.9, 0.99]}
    histories = []
    for records in sessions:
        steps = [item.history for item in records if item.WhichOneof("record_type") == "history"]
        values = [
            {
                part.key or "/".join(part.nested_key): json.loads(part.value_json)
                for part in step.item
            }
            for step in steps
        ]
        histories.append([(row["_step"], row["eval/branch1"]) for row in values])
        assert {name for name in values[0] if not name.startswith("_")} == SCALARS
    # Each session's folder is the whole run so far, without what was not saved.
    assert histories == [[(0, 0.25), (1, 0.25)], [(0, 0.25), (1, 0.75)]]


class OnlineRun:
    """A run that W&B's server already has two steps of, as an online resume finds it."""

    def __init__(self, id):
        self.id, self.step, self.rows = id or "made-by-wandb", 2 if id else 0, []

    def log(self, values, step, commit):
        if step == 5:
            raise ConnectionError("the network is gone\nfor good")
        self.rows.append((step, values["eval/branch1"]))
        self.step = step + 1

    def finish(self):
        pass


@pytest.fixture
def online(monkeypatch):
    """W&B's module without a network behind it; the calls of ``init``."""
    module, calls = ModuleType("wandb"), []

    def init(**options):
        if module.refuses:
            raise RuntimeError("api_key not configured (no-tty)")
        calls.append(options)
        module.run = OnlineRun(options["id"])
        return module.run

    module.init, module.Settings, module.refuses = init, dict, False
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    return module, calls


def test_wandb_online_gets_missing_records(tmp_path, online):
    module, calls = online
    said = []
    (first,) = open_sinks(["wandb"], tmp_path, {"epochs": 9}, [], said.append)
    first.close()
    (sink,) = open_sinks(
        ["wandb"],
        tmp_path,
        {"epochs": 9},
        [record(0, 0.0), record(1, 0.1), record(2, 0.2)],
        said.append,
    )
    run = module.run
    for epoch in range(3, 8):
        sink.write(record(epoch, epoch / 10))
    sink.close()
    assert [
        (options["id"], options["resume"], options["project"], options["name"], options["dir"])
        for options in calls
    ] == [
        (None, None, "mine", tmp_path.name, str(tmp_path)),
        ("made-by-wandb", "allow", "mine", tmp_path.name, str(tmp_path)),
    ]
    assert run.rows == [
        (2, 0.2),
        (3, 0.3),
        (4, 0.4),
    ]  # 0 and 1 are there, 5 fails, and nothing is tried again
    assert len(said) == 1
    assert said[0].startswith("wandb: the network is gone; continuing without it")


def test_wandb_without_login_is_dropped(tmp_path, online):
    online[0].refuses = True
    said = []
    (sink,) = open_sinks(["wandb"], tmp_path, {}, [], said.append)
    sink.write(record(0))
    sink.close()
    assert said == [
        "wandb: api_key not configured (no-tty); continuing without it, metrics.jsonl has"
        " every epoch ('wandb login' or WANDB_MODE=offline, then --resume, restores it)"
    ]


class TestEnvironment:
    def test_environment_entries(self, tmp_path):
        run = RunFolder.create(tmp_path / "run")
        run.save_environment(torch.device("cpu"), "fp32", {"name": "toy"})
        found = json.loads(run.environment_path.read_text())
        # No host, no user, no environment variables: a new entry has to be thought about here.
        assert set(found) == {
            "started",
            "fastokd",
            "commit",
            "command",
            "python",
            "torch",
            "torchvision",
            "triton",
            "dali",
            "cuda",
            "cudnn",
            "platform",
            "cpus",
            "threads",
            "world_size",
            "device",
            "precision",
            "data",
            "sessions",
        }
        import torchvision

        assert found["torchvision"] == torchvision.__version__.partition("+")[0]
        assert (found["world_size"], found["device"], found["data"]) == (1, "cpu", {"name": "toy"})
        assert abs(datetime.fromisoformat(found["started"]).timestamp() - time.time()) < 60

    def test_resume_adds_a_session(self, tmp_path, monkeypatch):
        run = RunFolder.create(tmp_path / "run")
        run.save_environment(torch.device("cpu"), "fp32", {"name": "toy"})
        start = json.loads(run.environment_path.read_text())
        # Private, because the commit of the checkout changes.
        monkeypatch.setattr(run_folder, "_commit", lambda: "0123456789ab")
        monkeypatch.setattr(
            sys, "orig_argv", ["python3", "/usr/bin/fastokd", "train", "--resume", "run"]
        )
        run.add_session(torch.device("cpu"), "fp32")
        run.add_session(torch.device("cpu"), "fp32")
        found = json.loads(run.environment_path.read_text())
        assert {**found, "sessions": start["sessions"]} == start
        assert [(session["command"], session["commit"]) for session in found["sessions"]] == [
            (start["command"], start["commit"]),
            *[("fastokd train --resume run", "0123456789ab")] * 2,
        ]
        assert all(
            set(session)
            == {
                *("started", "command", "commit", "fastokd", "torch", "device", "precision"),
                "world_size",
            }
            for session in found["sessions"]
        )
        assert run.versions() == {name: start[name] for name in ("fastokd", "commit", "torch")}

    @pytest.mark.parametrize("damage", ["", "{", "[1]", '{"sessions": 3}'])
    def test_damaged_environment_keeps_the_run(self, tmp_path, damage):
        run = RunFolder.create(tmp_path / "run")
        run.environment_path.write_text(damage)
        run.add_session(torch.device("cpu"), "fp32")
        assert len(json.loads(run.environment_path.read_text())["sessions"]) == 1
        assert run.versions() == {}

    @pytest.mark.parametrize(
        ("argv", "command"),
        [
            (
                [
                    "/home/me/.venv/bin/python",
                    "/home/me/.venv/bin/fastokd",
                    "train",
                    "--out",
                    "two words",
                ],
                "fastokd train --out 'two words'",
            ),
            (
                ["/home/me/.venv/bin/python", "-u", "-m", "fastokd", "train"],
                "python -u -m fastokd train",
            ),
            (["python3.11", "mine.py", "--x"], "python3.11 mine.py --x"),
            (["python"], "python"),
        ],
    )
    def test_environment_has_the_real_command(self, monkeypatch, argv, command):
        monkeypatch.setattr(sys, "orig_argv", argv)
        assert run_folder.environment(torch.device("cpu"))["command"] == command


def test_files_of_dead_run_are_replaced(tmp_path):
    run = RunFolder.create(tmp_path / "run")
    for path in (
        run.log_path,
        run.csv_path,
        run.path / "tensorboard" / "events",
        run.path / "wandb" / "offline-run" / "file",
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("old")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "kept").touch()
    (run.path / "wandb" / "latest-run").symlink_to(elsewhere)
    run.unlock()
    again = RunFolder.create(Path(run.path))
    assert [entry.name for entry in again.path.iterdir()] == ["checkpoints"]
    assert (elsewhere / "kept").exists()
    again.discard_without_checkpoint()
    assert not again.path.exists()
