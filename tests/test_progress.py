"""Displayed progress of a run: the numbers, the bar, the plain lines, and log.txt."""

import dataclasses
import io
import re
from datetime import datetime

import pytest
from rich.console import Console

from fastokd.data import open_dataset
from fastokd.train import progress as progress_module
from fastokd.train.config import TrainConfig
from fastokd.train.progress import EpochProgress, Reporter, Throughput, duration
from fastokd.train.run_folder import RunFolder
from fastokd.train.trainer import Interrupted, Trainer

HIDE_CURSOR, SHOW_CURSOR = "\x1b[?25l", "\x1b[?25h"


class Clock:
    """A clock that a test advances."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress_module.time, "monotonic", clock)
    return clock


def batches(clock, count, seconds):
    for index in range(count):
        clock.now += seconds
        yield index


def look(pace, done):
    return pace.look(done, {"loss": 1.0}, lr=0.1, kd_weight=1.0)


class TestPace:
    def test_throughput_waiting_share_and_time_left(self):
        clock = Clock()
        pace = Throughput(epochs=3, batch_size=8, clock=clock)
        pace.start_epoch(0, steps=20)
        for index in pace.waiting(batches(clock, 20, 0.1)):
            clock.now += 0.3
            if index == 9:
                seen = look(pace, index + 1)
        assert (seen.images_per_second, seen.waiting_share) == (
            pytest.approx(8 / 0.4),
            pytest.approx(0.25),
        )
        assert seen.seconds_left_epoch == pytest.approx(10 * 0.4)
        assert seen.seconds_left_run == pytest.approx(
            50 * 0.4
        )  # what comes after the steps is not known yet
        assert pace.waiting_share() == pytest.approx(0.25)
        clock.now += 2  # evaluation and checkpoint
        assert pace.end_epoch() == pytest.approx(2 * (20 * 0.4 + 2))
        pace.start_epoch(1, steps=20)
        for index in pace.waiting(batches(clock, 20, 0.0)):
            clock.now += 0.5
            if index == 4:
                seen = look(pace, index + 1)
        assert (seen.waiting_share, seen.seconds_left_epoch) == (0, pytest.approx(7.5))
        assert seen.seconds_left_run == pytest.approx(15 * 0.5 + 20 * 0.5 + 2 * 2)
        clock.now += 1
        assert pace.end_epoch() == pytest.approx(20 * 0.5 + 1)

    def test_time_left_counts_the_costs_of_later_epochs(self):
        """Two epochs of the student alone, then two that cost three times as much."""
        clock = Clock()
        pace = Throughput(epochs=4, batch_size=8, clock=clock, costs=[2.0, 2.0, 6.0, 6.0])
        left = []
        for epoch, seconds in enumerate((0.5, 0.5, 1.5, 1.5)):
            pace.start_epoch(epoch, steps=10)
            for index in pace.waiting(batches(clock, 10, 0.0)):
                clock.now += seconds
                if index == 3:
                    left.append(look(pace, 4).seconds_left_run)
            left.append(pace.end_epoch())
        assert left == pytest.approx([38, 35, 33, 30, 24, 15, 9, 0])

    def test_slow_first_step_is_forgotten(self):
        clock = Clock()
        pace = Throughput(epochs=1, batch_size=10, clock=clock)
        pace.start_epoch(0, steps=10_000)
        clock.now += 300
        assert look(pace, 1).seconds_left_epoch == pytest.approx(300 * 9_999)
        for second in range(1, 61):
            clock.now += 1
            seen = look(pace, 1 + 5 * second)
        assert seen.images_per_second == pytest.approx(50)
        assert seen.seconds_left_epoch == pytest.approx((10_000 - 301) / 5)

    def test_throughput_of_a_resumed_epoch(self):
        clock = Clock()
        pace = Throughput(epochs=2, batch_size=4, clock=clock)
        pace.start_epoch(0, steps=10, done=6)
        for index in pace.waiting(batches(clock, 4, 0.0)):
            clock.now += 1
            if index == 1:
                seen = look(pace, 8)
        assert (seen.images_per_second, seen.seconds_left_epoch) == (
            pytest.approx(4),
            pytest.approx(2),
        )
        assert pace.end_epoch() == pytest.approx(10)  # the whole next epoch, not four steps of it


def names_of(branches):
    return [
        *(f"branch{index + 1}" for index in range(branches)),
        *(f"ta{index + 2}" for index in range(branches - 1)),
        "ensemble",
    ]


def numbers(branches, loss=12.34):
    """A progress with different numbers everywhere; accuracies 0.500, 0.501, ..."""
    names = names_of(branches)
    terms = {f"ce/{name}": 0.1 * index for index, name in enumerate(names)}
    accuracy = {f"accuracy/{name}": 0.5 + index / 1000 for index, name in enumerate(names)}
    return EpochProgress(
        {"loss": loss, **terms, **accuracy},
        images_per_second=1234.4,
        waiting_share=0.031,
        seconds_left_epoch=65,
        seconds_left_run=3725,
        lr=0.05,
        kd_weight=0.135,
        memory=3 << 30,
    )


def record(epoch, branches=3, student=0.7, **extra):
    names = names_of(branches)
    values = {name: student + index / 100 for index, name in enumerate(names)}
    return {
        "epoch": epoch,
        "lr": 0.1,
        "train": {"loss": 1.5, "accuracy/branch1": 0.6},
        "eval": values,
        "images_per_second": 321.4,
        **extra,
    }


class Terminal(io.StringIO):
    """A terminal that keeps what is written to it."""

    def isatty(self):
        return True


def live_reporter(width=100, height=40, **options):
    console = Console(
        file=Terminal(),
        width=width,
        height=height,
        force_terminal=True,
        soft_wrap=True,
        highlight=False,
        color_system=None,
        _environ={"TERM": "xterm"},
    )
    return Reporter(console=console, **options)


def last_line(reporter):
    """The current state of the bar, without control codes."""
    return re.split(r"\r|\n|\x1b\[[?\d]*[a-zA-Z]", reporter.console.file.getvalue())[-1].rstrip()


@pytest.fixture
def live():
    made = []

    def make(**options):
        reporter = live_reporter(**options)
        made.append(reporter)
        reporter.start_run("branch1", [record(0, 3, 0.6), record(1, 3, 0.7), record(2, 3, 0.65)])
        reporter.start_epoch(3, 10, 22)
        reporter.step(11, numbers(3))
        return reporter

    yield make
    for reporter in made:
        reporter.close()


def test_bar_shows_steps_best_accuracy_and_numbers(live):
    words = last_line(live(width=250)).split()
    assert words[:2] == ["epoch", "4/10"]
    assert " ".join(words[3:]) == (
        "11/22 best 70.00 % loss 12.3400 branch1 50.0 % epoch 1:05 left, run 1:02:05 left"
        " 1234 img/s waiting for data 3 % lr 0.05 kd_weight 0.135 GPU 3.0 GiB"
    )


@pytest.mark.parametrize("width", [20, 60, 100, 250])
def test_bar_is_one_line_of_any_terminal(live, width):
    reporter = live(width=width, label="ahbf seed 0")
    assert last_line(reporter).startswith("ahbf")
    assert len(last_line(reporter)) <= width
    assert "\n" not in reporter.console.file.getvalue()


def test_bar_before_first_numbers_and_while_evaluating(live):
    reporter = live()
    reporter.step(22)
    reporter.evaluating()
    assert last_line(reporter).split()[-2:] == ["22/22", "evaluating"]
    new = live_reporter()
    new.start_epoch(0, 2, 5)
    new.step(1)
    new.close()
    assert "epoch 1/2" in new.console.file.getvalue()


def test_terminal_shows_bar_and_epoch_lines(clock, tmp_path):
    reporter = live_reporter()
    reporter.attach_log(tmp_path / "log.txt")
    reporter.start_run("branch1")
    for epoch in range(2):
        reporter.start_epoch(epoch, 2, 100)
        for step in range(1, 101):
            clock.now += 0.5
            reporter.step(step, numbers(3) if reporter.should_report() else None)
        reporter.end_epoch(record(epoch), 60.0)
    reporter.close()
    shown = reporter.console.file.getvalue()
    assert shown.count("run 1:00 left  accuracy %: branch1 70.00  branch2 71.00") == 2
    assert "step 61/100" not in shown
    # The cursor is hidden once and comes back.
    assert shown.count(HIDE_CURSOR) == 1
    assert shown.index(HIDE_CURSOR) < shown.index(SHOW_CURSOR)
    logged = (tmp_path / "log.txt").read_text()
    assert logged.count("  step ") == 2  # one each 30 seconds
    assert (
        "epoch 1/2  step 61/100  loss 12.3400  branch1 50.0 %  epoch 1:05 left, run 1:02:05 left "
        " 1234 img/s  waiting for data 3 %  lr 0.05  kd_weight 0.135  GPU 3.0 GiB\n" in logged
    )


@pytest.mark.parametrize("file", ["pipe", "pipe with FORCE_COLOR", "dumb terminal"])
def test_pipe_shows_plain_lines(clock, file):
    console = Console(
        file=Terminal() if "dumb" in file else io.StringIO(),
        force_terminal=file != "pipe",
        soft_wrap=True,
        highlight=False,
        color_system=None,
        _environ={"TERM": "dumb" if "dumb" in file else "xterm"},
    )
    reporter = Reporter("kd", console=console)
    reporter.start_run("branch1")
    reporter.start_epoch(0, 1, 100)
    for step in range(1, 101):
        clock.now += 1
        reporter.step(step, numbers(3) if reporter.should_report() else None)
    reporter.end_epoch(record(0, waiting_share=0.125), 0.0)
    shown = console.file.getvalue()
    assert "\x1b" not in shown
    assert [line.split("  ")[:2] for line in shown.splitlines()] == [
        *(["kd: epoch 1/1", f"step {step}/100"] for step in (31, 62, 93)),
        ["kd: epoch 1/1", "loss 1.5000"],
    ]
    assert shown.splitlines()[-1].startswith(
        "kd: epoch 1/1  loss 1.5000  lr 0.1  321 img/s  waiting for data 12 %  accuracy %: branch1"
        " 70.00"
    )


@pytest.mark.parametrize(
    ("options", "screen"),
    [
        ({}, ["result", "detail", "epoch 1/1"]),
        ({"quiet": True}, ["result"]),
        ({"lines": False}, ["result"]),
        ({"silent": True}, []),
    ],
)
@pytest.mark.parametrize("log", [True, False])
def test_options_select_screen_and_log(clock, tmp_path, capsys, options, screen, log):
    reporter = Reporter(**options)
    if log:
        reporter.attach_log(tmp_path / "log.txt")
    reporter.print("result")
    reporter.info("detail")
    reporter.start_run("branch1")
    reporter.start_epoch(0, 1, 5)
    clock.now += 31
    silent = "silent" in options
    assert reporter.should_report() == (options == {} or (log and not silent))
    reporter.end_epoch(record(0))
    reporter.close()
    assert [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()] == screen
    assert (tmp_path / "log.txt").exists() == (log and not silent)
    if log and not silent:
        logged = (tmp_path / "log.txt").read_text().splitlines()
        assert [line.split(" ", 1)[1].split("  ")[0] for line in logged] == [
            "result",
            "detail",
            "epoch 1/1",
        ]


def test_log_is_appended_with_the_time(tmp_path):
    path = tmp_path / "log.txt"
    for session in range(2):
        reporter = Reporter(console=Console(file=io.StringIO()))
        reporter.attach_log(path)
        reporter.log(f"session {session}\nsecond line of it \udcff")
    lines = [line.split(" ", 1) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [text for _, text in lines] == [
        "session 0",
        "second line of it \\udcff",
        "--- resumed ---",
        "session 1",
        "second line of it \\udcff",
    ]
    assert all(datetime.fromisoformat(time).tzinfo is not None for time, _ in lines)


def test_unwritable_log_is_reported_once(tmp_path, capsys):
    reporter = Reporter()
    reporter.attach_log(tmp_path)  # a folder
    reporter.print("one")
    reporter.print("two")
    assert sorted(capsys.readouterr().out.splitlines()) == sorted(
        ["one", f"cannot write {tmp_path}: Is a directory; continuing without it", "two"]
    )


def test_interrupted_run_restores_the_terminal(tmp_path, monkeypatch):
    config = TrainConfig(
        data="digits",
        model="resnet8",
        method="baseline",
        branches=1,
        aux_blocks=0,
        epochs=2,
        batch_size=256,
    )
    reporter = live_reporter()
    trainer = Trainer(config, RunFolder.create(tmp_path / "run"), reporter, open_dataset("digits"))
    trainer.start()
    step, calls = trainer.step.__class__.__call__, []

    def interrupted(*arguments):
        shown = reporter.console.file.getvalue()
        calls.append((shown.count(HIDE_CURSOR), shown.count(SHOW_CURSOR)))
        if len(calls) == 8:  # in the second epoch
            raise KeyboardInterrupt
        return step(*arguments)

    monkeypatch.setattr(trainer.step.__class__, "__call__", interrupted)
    with pytest.raises(Interrupted):
        trainer.run()
    assert set(calls) == {(1, 0)}
    shown = reporter.console.file.getvalue()
    assert shown.count(HIDE_CURSOR) == shown.count(SHOW_CURSOR) == 1
    logged = [
        line.split(" ", 1)[1] for line in (tmp_path / "run" / "log.txt").read_text().splitlines()
    ]
    assert logged[0].startswith("run ")
    assert logged[-2].startswith("epoch 1/2  loss ")
    assert logged[-1].startswith("stopped by Ctrl-C; the last checkpoint has 1 finished")


def test_duration_format():
    assert [
        duration(seconds) for seconds in (0, 59.6, 3599, 3600, 90_061, float("inf"), float("nan"))
    ] == ["0:00", "1:00", "59:59", "1:00:00", "1d 01:01:01", "?", "?"]


def test_epoch_progress_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        numbers(1).lr = 0.0
