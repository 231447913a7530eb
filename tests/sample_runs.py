"""Small finished runs for what reads run folders, and ways to change what they recorded."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from method_runs import few_digits, make

from fastokd.train.config import TrainConfig

EPOCHS = 2


def make_runs(root: Path) -> Path:
    """ResNet-8 alone and with AHBF, seeds 0 and 1, two epochs each on a part of the digits:
    ``METHOD-seedN`` in ``root``.
    """
    digits = few_digits()
    for method in ("baseline", "ahbf"):
        for seed in (0, 1):
            config = TrainConfig(
                data="digits",
                model="resnet8",
                method=method,
                branches=3 if method == "ahbf" else 1,
                aux_blocks=1,
                epochs=EPOCHS,
                batch_size=64,
                lr=0.05,
                seed=seed,
                device="cpu",
                keep_checkpoints=1,
            )
            make(config, root / f"{method}-seed{seed}", digits).run()
    return root


def copied(run: Path, to: Path) -> Path:
    """A copy of a run, to be changed."""
    shutil.copytree(run, to)
    return to


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def change_records(run: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the record of every epoch in place."""
    found = records(run)
    for record in found:
        change(record)
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in found))


def change_config(run: Path, **values: Any) -> None:
    path = run / "config.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **values}, sort_keys=False))


def change_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(found))
