"""Recipes: configurations whose every value has a source, with the published numbers."""

import fnmatch
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from fastokd.train.config import TrainConfig


class Sourced(NamedTuple):
    """The value of a field of ``TrainConfig``, and who gives it."""

    value: Any
    source: str


Settings = dict[str, Sourced]


def given(source: str, **values: Any) -> Settings:
    """Fields of ``TrainConfig`` that one source gives: paper and section, table or equation."""
    return {name: Sourced(value, source) for name, value in values.items()}


def steps(epochs: int, *decays: int) -> dict[str, Any]:
    """A number of epochs, and a learning rate multiplied by 0.1 after each of some of them."""
    return {
        "epochs": epochs,
        "lr_decay_at": tuple(epoch / epochs for epoch in decays),
        "lr_gamma": 0.1,
    }


CIFAR_AUGMENT = {"pad": 4, "flip": True}


class Published(NamedTuple):
    """A number that a paper reports; none of the papers says whether of the last or best epoch.

    Attributes:
        source: paper and table, e.g. "AHBF Table 2".
        error: top-1 error on the test split in %, the mean over the runs.
        std: its standard deviation in %; None if not given.
        runs: number of runs; None if not given.
        row: "student" (the network that is kept), another branch such as "branch2", "ensemble", or
            "branch_mean", the mean of the errors of all branches or networks.
    """

    source: str
    error: float
    std: float | None = None
    runs: int | None = None
    row: str = "student"

    def number(self) -> str:
        """The error as text, e.g. "25.19 +- 0.16"."""
        return f"{self.error:.2f}" + ("" if self.std is None else f" +- {self.std:.2f}")


class Target(NamedTuple):
    """A dataset that recipes are for, and how many images papers train and test on."""

    title: str
    num_classes: int
    num_train: int
    num_test: int


DATASETS = {
    "cifar10": Target("CIFAR-10", 10, 50_000, 10_000),
    "cifar100": Target("CIFAR-100", 100, 50_000, 10_000),
    "cinic10": Target("CINIC-10", 10, 90_000, 90_000),
    "imagenet": Target("ImageNet", 1000, 1_281_167, 50_000),
    "images": Target("your own images", 0, 0, 0),
}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A training run that a paper describes, without the location of the images.

    Attributes:
        dataset: a key of ``DATASETS``.
        settings: the fields of the configuration that have a source; the others keep their
            defaults.
        variant: the end of its name, which distinguishes it from other recipes of its dataset,
            network and method.
        meaning: ``variant`` in words.
        published: the numbers that papers report for it.
        notes: open points of the sources and the choices made, one sentence or two each.
        label: the name of a recipe that is not for one dataset and network.
    """

    dataset: str
    settings: Settings
    variant: str = ""
    meaning: str = ""
    published: tuple[Published, ...] = ()
    notes: tuple[str, ...] = ()
    label: str = ""

    @property
    def config(self) -> TrainConfig:
        """The configuration, with ``data`` left empty."""
        return TrainConfig(**{name: value for name, (value, _) in self.settings.items()})

    @property
    def name(self) -> str:
        """``label``, or dataset, network, method and variant."""
        if self.label:
            return self.label
        model = self.config.model.replace("_imagenet", "").replace("_", "-").replace(",", "-")
        parts = (self.dataset, model, self.config.method.replace("_", "-"), self.variant)
        return "-".join(filter(None, parts))

    @property
    def title(self) -> str:
        """A description in one line."""
        text = f"{self.config.method} with {self.config.model} on {DATASETS[self.dataset].title}"
        return f"{text}, {self.meaning}" if self.meaning else text

    def reported(self) -> str:
        """The published errors in % in one line, by source, with rows other than the student's."""
        by_source: dict[str, list[str]] = {}
        for number in self.published:
            row = "" if number.row == "student" else f" ({_ROWS.get(number.row, number.row)})"
            by_source.setdefault(number.source, []).append(number.number() + row)
        return "; ".join(f"{source}: {', '.join(texts)}" for source, texts in by_source.items())

    def to_yaml(self) -> str:
        """The configuration as YAML with sources as comments; ``read_config`` takes it."""
        lines = [f"# {self.title}"]
        for number in self.published:
            runs = f", mean of {number.runs} runs" if number.runs else ""
            row = _ROWS.get(number.row, number.row)
            lines.append(f"# {number.source}: {number.number()} % error, {row}{runs}")
        lines += [f"# {note}" for note in self.notes]
        lines.append("# Fields without a source are fastokd's defaults.")
        for line in self.config.to_yaml().splitlines():
            source = self.settings.get(line.partition(":")[0]) if ":" in line else None
            lines.append(f"{line}  # {source.source}" if source else line)
        return "\n".join(lines) + "\n"


_ROWS = {"branch_mean": "mean of the branches"}


def by_name(recipes: Iterable[Recipe]) -> dict[str, Recipe]:
    """The recipes by their names, which must differ."""
    found: dict[str, Recipe] = {}
    for recipe in recipes:
        if recipe.name in found:
            raise ValueError(f"two recipes are named {recipe.name}")
        found[recipe.name] = recipe
    return found


def read_table(text: str) -> dict[str, list[float]]:
    """Rows of a network's name and numbers."""
    rows = map(str.split, text.strip().splitlines())
    return {name: list(map(float, numbers)) for name, *numbers in rows}


def read_notes(text: str, key: str) -> tuple[str, ...]:
    """The notes in a text, each below a line "[PATTERN PATTERN]", with a pattern that matches a
    recipe's key, such as "dataset/model/method"; patterns have wildcards.
    """
    notes = (block.partition("]") for block in text.split("[")[1:])
    return tuple(
        " ".join(note.split())
        for patterns, _, note in notes
        if any(fnmatch.fnmatchcase(key, pattern) for pattern in patterns.split())
    )
