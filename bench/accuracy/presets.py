"""The matrices of ``bench.accuracy``: settings of their rows, and the order of the runs.

The settings are fixed before the reported seeds are trained. A row with results is never changed:
another setting is another row.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.accuracy.images import PRETRAINING, cifar10, fine_tuning, tiny_imagenet_100
from fastokd.train.config import TrainConfig, override


@dataclass(frozen=True)
class Preset:
    """A matrix of runs on one dataset.

    Attributes:
        name: on the command line, and in the name of the result file.
        title: the data and the network, for tables.
        rows: the configuration of each row by its name, with seed 0. ``weights`` and ``teacher``
            name a row, whose first run is trained before; ``data``, if set, another list next to
            that of ``images``. Rows with another list are not compared with others.
        order: row names and seeds, in the order in which they are trained: all seeds of a row,
            then the next row; then the next pair.
        images: prepares the dataset, see ``bench.accuracy.images``.
        per_device: the number of simultaneous runs. The cores are divided among them; on CPUs
            several runs with one thread each finish sooner than one after another.
        alone: the row of the student alone, whose training costs are the unit.
    """

    name: str
    title: str
    rows: Mapping[str, TrainConfig]
    order: Sequence[tuple[Sequence[str], Sequence[int]]]
    images: Callable[[Path | None, Path], Path]
    per_device: int = 2
    alone: str = "alone"

    @property
    def runs(self) -> list[tuple[str, int]]:
        """All rows and seeds in the order of training, each once."""
        pairs = [(row, seed) for rows, seeds in self.order for row in rows for seed in seeds]
        return list(dict.fromkeys(pairs))

    def needed(self, row: str) -> list[tuple[str, int]]:
        """The runs whose students a row starts from or learns from: the first of their rows."""
        names = [self.rows[row].weights, self.rows[row].teacher]
        return [next(run for run in self.runs if run[0] == name) for name in names if name]


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


def _alone(epochs: int = 20) -> TrainConfig:
    return override(_CPU, {"method": "baseline", "epochs": epochs})


def _taught(method: str, **changes: Any) -> TrainConfig:
    return override(_CPU, {"method": method, "branches": 4, **changes})


ALONE = "alone"
EQUAL_COMPUTE = "alone, equal compute"
"""The student alone with the training compute of ``AHBF``."""
AHBF = "ahbf, paper"

_FIRST = {
    ALONE: _alone(),
    AHBF: _taught("ahbf"),
    EQUAL_COMPUTE: _alone(85),  # AHBF has 4.27 times the FLOPs of the student alone
    "ahbf, code": _taught("ahbf", preset="code"),
    "one": _taught("one"),
    "okddip": _taught("okddip"),
}
_OTHERS = {
    "dml": _taught("dml"),
    "kdcl, minlogit": _taught("kdcl", method_options={"variant": "minlogit"}),
    "tsb": _taught("tsb"),
    "ffm": _taught("ffm"),
    "cl-ilr": _taught("cl_ilr"),
}
_FRONTIER = {
    **{f"alone, {epochs} epochs": _alone(epochs) for epochs in (10, 40, 80, 160)},
    **{f"ahbf, {epochs} epochs": _taught("ahbf", epochs=epochs) for epochs in (5, 10, 40)},
}
"""Error over training compute, together with the rows of 20 epochs."""
_LATE = {f"ahbf from {start:g}": _taught("ahbf", teach_from=start) for start in (0.5, 0.7, 0.85)}
"""Late teaching, after a fraction of the epochs."""
_ABLATIONS = {
    "ahbf, equal depth": _taught("ahbf", aux_blocks=0),
    "ahbf, TA edges only": _taught("ahbf", method_options={"lambda_branch": 0.0}),
    "ahbf, branch edges only": _taught("ahbf", method_options={"lambda_ta": 0.0}),
    "ahbf, no TA distillation": _taught(
        "ahbf", method_options={"lambda_ta": 0.0, "lambda_branch": 0.0}
    ),
}

TINY_IMAGENET = Preset(
    name="tiny-imagenet-100",
    title="Tiny-ImageNet-100 at 32 x 32, 200 training images of each class, ResNet-8",
    rows={**_FIRST, **_OTHERS, **_LATE, **_FRONTIER, **_ABLATIONS},
    order=(
        ([*_FIRST], (0, 1, 2)),
        ([*_OTHERS], (0, 1, 2)),
        ([*_LATE], (0, 1, 2)),
        ([*_FRONTIER], (0,)),
        ([*_ABLATIONS], (0, 1, 2)),
        ([*_FIRST][:3], (3, 4)),
        ([*_FRONTIER], (1, 2)),
    ),
    images=tiny_imagenet_100,
)

CIFAR10 = Preset(
    name="cifar10-jpeg",
    title="CIFAR-10 (JPEG), 1,000 training images of each class, ResNet-8",
    rows={name: _FIRST[name] for name in (ALONE, AHBF, EQUAL_COMPUTE, "one")},
    order=(((ALONE, AHBF, EQUAL_COMPUTE, "one"), (0, 1, 2)),),
    images=cifar10,
)

_TIMM = override(
    _CPU,
    {
        "model": "timm:test_resnet",
        "at": "layer3",
        "method": "baseline",
        "data": PRETRAINING,
        "epochs": 30,
        "optimizer": "adamw",
        "lr": 2e-3,
        "weight_decay": 0.05,
        "decay": "norm-bias-free",
        "warmup_epochs": 2.0,
        "label_smoothing": 0.1,
    },
)
_LARGER = {"model": "timm:resnet10t"}
# The best of 3e-4, 1e-3 and 3e-3 from scratch and alone from the weights of a shorter pretraining,
# with seed 100 and a third of the validation images. The larger network's was not searched.
_FINE = override(_TIMM, {"data": "", "epochs": 40, "lr": 3e-3})
# A practitioner's teacher: a larger network of the library, fine-tuned on the same few images.
PRETRAINED, LARGER_PRETRAINED = "pretrained", "larger network, pretrained"
LARGER = "larger network from the weights"
_START = {"weights": PRETRAINED}
_BRANCHES = {"method": "ahbf", "branches": 3}

FINE_TUNING = Preset(
    name="fine-tuning",
    title="Fine-tuning on 50 classes of Tiny-ImageNet-100 at 32 x 32, 20 training images of each"
    " class, timm's test_resnet",
    rows={
        PRETRAINED: _TIMM,
        LARGER_PRETRAINED: override(_TIMM, {**_LARGER, "epochs": 20}),
        LARGER: override(_FINE, {**_LARGER, "weights": LARGER_PRETRAINED, "lr": 1e-3}),
        "from scratch": _FINE,
        "alone from the weights": override(_FINE, _START),
        # AHBF has 1.24 times the FLOPs of the student alone, and with the teacher 3.06 times.
        **{
            f"alone from the weights, {epochs} epochs": override(
                _FINE, {**_START, "epochs": epochs}
            )
            for epochs in (50, 123)
        },
        "alone and a teacher from the weights": override(_FINE, {**_START, "teacher": LARGER}),
        "AHBF from the weights": override(_FINE, {**_START, **_BRANCHES}),
        "AHBF and a teacher from the weights": override(
            _FINE, {**_START, **_BRANCHES, "teacher": LARGER}
        ),
    },
    order=(
        ((PRETRAINED, LARGER_PRETRAINED), (0,)),
        ((LARGER, "from scratch", "alone from the weights"), (0, 1, 2)),
        (("AHBF from the weights", "AHBF and a teacher from the weights"), (0, 1, 2)),
        (("alone and a teacher from the weights",), (0, 1, 2)),
        (("alone from the weights, 50 epochs", "alone from the weights, 123 epochs"), (0, 1, 2)),
    ),
    images=fine_tuning,
    alone="alone from the weights",
)

PRESETS = {preset.name: preset for preset in (TINY_IMAGENET, CIFAR10, FINE_TUNING)}
