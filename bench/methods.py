"""Every method on the embedded digits, with one student and one set of settings: ``python -m
bench.methods``.

Writes ``bench/results/methods-digits.json`` after every method, and leaves alone what that file
already has for the same settings, so that a second call continues and a new method costs its own
runs only. ``python -m bench.method_pages`` makes the table of ``docs/methods/index.md`` from it.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fastokd.data import Dataset, open_dataset
from fastokd.errors import ConfigError, did_you_mean
from fastokd.methods import get_method, list_methods
from fastokd.models.summary import count_parameters
from fastokd.storage import write_json
from fastokd.train.config import TrainConfig
from fastokd.train.progress import Reporter
from fastokd.train.run_folder import RunFolder, environment
from fastokd.train.trainer import Trainer

RESULTS = Path(__file__).resolve().parent / "results" / "methods-digits.json"
STUDENT, TEACHER = "resnet8", "resnet20"
SETTINGS = TrainConfig(
    data="digits",
    model=STUDENT,
    aux_blocks=1,
    batch_size=64,
    lr=0.05,
    device="cpu",
    precision="fp32",
)
"""The demo's: the papers' optimizer, scaled to 1,442 images of 8 x 8 pixels."""
MEASURED = ("ensemble", "branch_mean", "teacher")


def configuration(
    method: str, preset: str, seed: int, epochs: int, teacher: Path | None
) -> TrainConfig:
    """One run of a method with its default number of branches."""
    options = {"teacher": str(teacher)} if teacher else {}
    return dataclasses.replace(
        SETTINGS, method=method, preset=preset, seed=seed, epochs=epochs, method_options=options
    )


def run(config: TrainConfig, folder: Path, data: Dataset) -> Trainer:
    """Train in a folder; the trainer, when it is done."""
    trainer = Trainer(config, RunFolder.create(folder), Reporter(quiet=True), data)
    trainer.start()
    trainer.run()
    return trainer


def measure(
    method: str, preset: str, seeds: int, epochs: int, data: Dataset, folder: Path
) -> dict[str, Any]:
    """One row: the accuracy of every seed's student after the last epoch, and of the other
    rows.
    """
    found: list[Trainer] = []
    for seed in range(seeds):
        teacher = None
        if get_method(method).needs_teacher:
            teacher = folder / f"teacher-{seed}"
            if not teacher.exists():
                run(
                    dataclasses.replace(
                        SETTINGS, model=TEACHER, method="baseline", seed=seed, epochs=epochs
                    ),
                    teacher,
                    data,
                )
        found.append(
            run(
                configuration(method, preset, seed, epochs, teacher),
                folder / f"{method}-{preset}-{seed}",
                data,
            )
        )
    first = found[0]
    return {
        "method": method,
        "preset": preset,
        "branches": first.config.num_branches(),
        "networks": first.config.topology or get_method(method).topologies[0],
        "kept": first.student_name,
        "student_parameters": count_parameters(first.model.student()),
        "parameters": count_parameters(first.model),
        "seconds": [round(trainer.seconds, 1) for trainer in found],
        "student": [trainer.last[first.student_name] for trainer in found],
        **{
            name: [trainer.last[name] for trainer in found]
            for name in MEASURED
            if name in first.last
        },
        "commit": environment(torch.device("cpu"))["commit"],
    }


def earlier(path: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows that a file has for these settings."""
    if not path.is_file():
        return []
    found = json.loads(path.read_text(encoding="utf-8"))
    return found["rows"] if found["settings"] == settings else []


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the missing rows; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.methods", description=__doc__)
    parser.add_argument("methods", nargs="*", help="methods to compare (default: all)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=24)
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args(arguments)
    for name in given.methods:
        if name not in list_methods():
            raise ConfigError(f"unknown method '{name}'{did_you_mean(name, list_methods())}")
    torch.set_num_threads(1)  # on 8 x 8 pixels a second one gains nothing
    data = open_dataset("digits")
    settings = {
        "data": f"digits, {len(data.train)} training and {len(data.evaluation)} test images",
        "student": STUDENT,
        "teacher": TEACHER,
        "seeds": given.seeds,
        "epochs": given.epochs,
        "batch_size": SETTINGS.batch_size,
        "lr": SETTINGS.lr,
        "aux_blocks": SETTINGS.aux_blocks,
    }
    rows = earlier(given.out, settings)
    with tempfile.TemporaryDirectory() as folder:
        for name in given.methods or list_methods():
            for preset in get_method(name).loss_class.presets:
                if any((row["method"], row["preset"]) == (name, preset) for row in rows):
                    continue
                row = measure(name, preset, given.seeds, given.epochs, data, Path(folder))
                rows = sorted(
                    [*rows, row],
                    key=lambda row: (
                        row["method"] != "baseline",
                        row["method"],
                        row["preset"] != "paper",
                    ),
                )
                write_json(
                    given.out, {"settings": settings, "torch": torch.__version__, "rows": rows}
                )
                accuracies = ", ".join(f"{100 * value:.2f}" for value in row["student"])
                print(f"{name} ({preset}): student {accuracies} %", flush=True)
    return 0


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except ConfigError as error:
        print(f"bench.methods: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
