"""What a recipe is: a configuration whose every value has a source, and the numbers that papers
report for it.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from fastokd.train.config import TrainConfig


class Sourced(NamedTuple):
    """The value of a field of ``TrainConfig``, and who gives it."""

    value: Any
    source: str


Settings = Mapping[str, Sourced]


def given(source: str, **values: Any) -> dict[str, Sourced]:
    """Fields of ``TrainConfig`` that one source gives: paper and section, table or equation."""
    return {name: Sourced(value, source) for name, value in values.items()}


class Published(NamedTuple):
    """A number that a paper reports. None of the papers says whether it is the last epoch's or the
    best's.

    Attributes:
        source: paper and table, e.g. "AHBF Table 2".
        error: top-1 error on the test split in %, the mean over the runs.
        std: its standard deviation in %; None if not given.
        runs: number of runs; None if not given.
        row: what was measured: "student" (the network that is kept), another branch such as
            "branch2", "ensemble", or "branch_mean", the mean of the errors of all branches or
            networks.
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
}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A training run that a paper describes, but for where the images lie.

    Attributes:
        dataset: a key of ``DATASETS``.
        settings: the fields of the configuration that have a source; the others keep their
            defaults.
        variant: what sets it apart from other recipes of its dataset, network and method, as the
            end of its name.
        meaning: ``variant`` in words.
        published: what papers report for it.
        notes: what the sources leave open and what was chosen, one sentence or two each.
    """

    dataset: str
    settings: Settings
    variant: str = ""
    meaning: str = ""
    published: tuple[Published, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def config(self) -> TrainConfig:
        """The configuration, with ``data`` left empty."""
        return TrainConfig(**{name: value for name, (value, _) in self.settings.items()})

    @property
    def name(self) -> str:
        """Dataset, network, method and variant."""
        model = self.config.model.replace("_imagenet", "").replace("_", "-").replace(",", "-")
        return "-".join(
            filter(None, (self.dataset, model, self.config.method.replace("_", "-"), self.variant))
        )

    @property
    def title(self) -> str:
        """What it is, in one line."""
        return (
            f"{self.config.method} with {self.config.model} on {DATASETS[self.dataset].title}"
            + (f", {self.meaning}" if self.meaning else "")
        )

    def reported(self) -> str:
        """What papers report, in one line: errors in % by their sources, with the row where it is
        not the student.
        """
        sources = dict.fromkeys(number.source for number in self.published)
        return "; ".join(
            f"{source}: "
            + ", ".join(
                number.number()
                + ("" if number.row == "student" else f" ({_ROWS.get(number.row, number.row)})")
                for number in self.published
                if number.source == source
            )
            for source in sources
        )

    def to_yaml(self) -> str:
        """The configuration as YAML, every field written out, with its source as a comment;
        ``read_config`` takes it.
        """
        lines = [f"# {self.title}"]
        for number in self.published:
            runs = f", mean of {number.runs} runs" if number.runs else ""
            lines.append(
                f"# {number.source}: {number.number()} % error,"
                f" {_ROWS.get(number.row, number.row)}{runs}"
            )
        lines += [f"# {note}" for note in self.notes]
        lines.append("# Fields without a source are fastokd's defaults.")
        for line in self.config.to_yaml().splitlines():
            name, colon, _ = line.partition(":")
            lines.append(
                f"{line}  # {self.settings[name].source}"
                if colon and name in self.settings
                else line
            )
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
    return {
        words[0]: [float(word) for word in words[1:]]
        for words in map(str.split, text.strip().splitlines())
    }
