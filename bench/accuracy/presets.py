"""The matrices of ``bench.accuracy``: settings of their rows, and the order of the runs.

The settings are fixed before the reported seeds are trained. A row with results is never changed:
another setting is another row.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.accuracy.images import cifar10, tiny_imagenet_100
from fastokd.train.config import TrainConfig, override

Changes = Mapping[str, Any]


@dataclass(frozen=True)
class Preset:
    """A matrix of runs on one dataset.

    Attributes:
        name: on the command line, and in the name of the result file.
        title: the data and the network, for tables.
        images: prepares the dataset, see ``bench.accuracy.images``.
        base: the configuration that all rows share, without ``data``.
        rows: the changes of each row to ``base``, by its name.
        order: pairs of row names and seeds, in the order in which they are trained: all seeds of
            a row, then the next row.
        per_device: the number of simultaneous runs. The cores are divided among them; on CPUs
            several runs with one thread each finish sooner than one after another.
    """

    name: str
    title: str
    images: Callable[[Path | None, Path], Path]
    base: TrainConfig
    rows: Mapping[str, Changes]
    order: tuple[tuple[tuple[str, ...], tuple[int, ...]], ...]
    per_device: int = 2

    def config(self, row: str, data: str) -> TrainConfig:
        """The configuration of a row with seed 0."""
        return override(self.base, {**self.rows[row], "data": data})

    @property
    def runs(self) -> list[tuple[str, int]]:
        """All rows and seeds in the order of training, each once."""
        pairs = [(row, seed) for rows, seeds in self.order for row in rows for seed in seeds]
        return list(dict.fromkeys(pairs))


ALONE = "alone"
EQUAL_COMPUTE = "alone, equal compute"
"""The student alone with the training compute of ``AHBF``."""
AHBF = "ahbf, paper"

_FOUR: Changes = {"branches": 4}
_AHBF: Changes = {**_FOUR, "method": "ahbf"}
_FIRST: Mapping[str, Changes] = {
    ALONE: {"method": "baseline"},
    AHBF: _AHBF,
    # AHBF has 4.27 times the FLOPs of the student alone.
    EQUAL_COMPUTE: {"method": "baseline", "epochs": 85},
    "ahbf, code": {**_AHBF, "preset": "code"},
    "one": {**_FOUR, "method": "one"},
    "okddip": {**_FOUR, "method": "okddip"},
}
_OTHERS: Mapping[str, Changes] = {
    "dml": {**_FOUR, "method": "dml"},
    "kdcl, minlogit": {**_FOUR, "method": "kdcl", "method_options": {"variant": "minlogit"}},
    "tsb": {**_FOUR, "method": "tsb"},
    "ffm": {**_FOUR, "method": "ffm"},
    "cl-ilr": {**_FOUR, "method": "cl_ilr"},
}
_FRONTIER: Mapping[str, Changes] = {
    **{f"alone, {n} epochs": {"method": "baseline", "epochs": n} for n in (10, 40, 80, 160)},
    **{f"ahbf, {n} epochs": {**_AHBF, "epochs": n} for n in (5, 10, 40)},
}
"""Error over training compute, together with the rows of 20 epochs."""
_ABLATIONS: Mapping[str, Changes] = {
    "ahbf, equal depth": {**_AHBF, "aux_blocks": 0},
    "ahbf, TA edges only": {**_AHBF, "method_options": {"lambda_branch": 0.0}},
    "ahbf, branch edges only": {**_AHBF, "method_options": {"lambda_ta": 0.0}},
    "ahbf, no TA distillation": {
        **_AHBF,
        "method_options": {"lambda_ta": 0.0, "lambda_branch": 0.0},
    },
}

_CPU = TrainConfig(
    model="resnet8",
    aux_blocks=1,
    epochs=20,
    batch_size=64,
    schedule="cosine",
    lr=0.1,
    weight_decay=5e-4,
    pad=4,
    flip=True,
    loader="resident",
    device="cpu",
    precision="fp32",  # the same on processors with and without bf16 arithmetic
)

TINY_IMAGENET = Preset(
    name="tiny-imagenet-100",
    title="Tiny-ImageNet-100 at 32 x 32, 200 training images of each class, ResNet-8",
    images=tiny_imagenet_100,
    base=_CPU,
    rows={**_FIRST, **_OTHERS, **_FRONTIER, **_ABLATIONS},
    order=(
        (tuple(_FIRST), (0, 1, 2)),
        (tuple(_OTHERS), (0, 1, 2)),
        (tuple(_FRONTIER), (0,)),
        (tuple(_ABLATIONS), (0, 1, 2)),
        (tuple(_FIRST)[:3], (3, 4)),
        (tuple(_FRONTIER), (1, 2)),
    ),
)

CIFAR10 = Preset(
    name="cifar10-jpeg",
    title="CIFAR-10 (JPEG), 1,000 training images of each class, ResNet-8",
    images=cifar10,
    base=_CPU,
    rows={name: _FIRST[name] for name in (ALONE, EQUAL_COMPUTE, AHBF, "one")},
    order=((tuple(_FIRST)[:3], (0, 1, 2)), (("one",), (0, 1, 2))),
)

PRESETS = {preset.name: preset for preset in (TINY_IMAGENET, CIFAR10)}
