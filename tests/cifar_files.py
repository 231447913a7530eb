"""CIFAR's files as torchvision unpacks them, with random pictures."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np


def write_cifar(
    root: Path,
    kind: str = "cifar10",
    protocol: int = 2,
    count: int = 4,
    keys: Callable[[str], Any] = str,
) -> Path:
    """Two classes in files of ``count`` images each; returns the folder that holds theirs."""
    rng = np.random.default_rng(0)
    if kind == "cifar10":
        folder, names, meta = (
            root / "cifar-10-batches-py",
            [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"],
            "batches.meta",
        )
        labels, classes, label_names = "labels", "label_names", ["plane", "car"]
    else:
        folder, names, meta = root / "cifar-100-python", ["train", "test"], "meta"
        labels, classes, label_names = "fine_labels", "fine_label_names", ["apple", "ray"]
    folder.mkdir(parents=True)
    for name in names:
        content = {
            keys("data"): rng.integers(0, 256, (count, 3072), dtype=np.uint8),
            keys(labels): [i % 2 for i in range(count)],
        }
        (folder / name).write_bytes(pickle.dumps(content, protocol=protocol))
    (folder / meta).write_bytes(pickle.dumps({keys(classes): label_names}, protocol=protocol))
    return root
