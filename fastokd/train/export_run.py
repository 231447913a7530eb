"""Exporting the student, or another branch, of a run folder."""

from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from fastokd.errors import ConfigError, did_you_mean
from fastokd.export import Comparison, export_student, get_format, measure_accuracy, student_record
from fastokd.export.files import check_preprocessing
from fastokd.methods import get_method
from fastokd.models import create_student, is_library_name, model_name
from fastokd.train.build import model_layout
from fastokd.train.config import TrainConfig
from fastokd.train.run_folder import RunFolder
from fastokd.train.runs import LoadedRun, load_run, provenance


class ExportedRun(NamedTuple):
    """An export and its comparison with the trained student."""

    path: Path
    record_name: str
    name: str
    """Of the network."""
    num_parameters: int
    comparison: Comparison
    tolerance: float


def export_run(
    path: Path,
    to: str = "safetensors",
    out: Path | None = None,
    which: str = "last",
    branch: str | None = None,
    data: str | None = None,
    device: str = "auto",
    with_preprocessing: bool = False,
) -> ExportedRun:
    """Write the student of a run in a format, with a record, and verify it on the run's images.

    Args:
        to: the format, see ``list_formats``.
        out: the folder to write to; None for ``export`` in the run folder.
        which: "last" or "best" checkpoint.
        branch: another branch than the student, by number or name.
        data: another dataset for the verification.
        with_preprocessing: see ``export_student``.

    Raises:
        CheckpointError: the run cannot be loaded, or the export failed verification.
        ConfigError: the branch is unknown, or the format has no such network.
    """
    folder, form = RunFolder.open(path), get_format(to)
    config = folder.load_config()
    index = None if branch is None else _branch_index(branch, config.num_branches())
    # An impossible format is refused before the images are read.
    check_preprocessing(to, with_preprocessing)
    form.describe({"name": _network_name(config, index)})
    run = load_run(path, which, data, device)
    model = run.evaluator.model
    if index is not None and index >= model.num_branches:
        alone = f"the {which} checkpoint of {path} is of the epochs before teach_from"
        raise ConfigError(f"branch '{branch}': {alone} and holds only the student; omit --branch")
    student = (run.evaluator.student() if index is None else model.student(index)).eval()
    name, layout = (model.name, {}) if index is None else _architecture(run, index, student)
    record = student_record(
        name,
        run.dataset,
        # Measured as deployed: alone and in float32, not under the run's autocast.
        accuracy=measure_accuracy(student, run.loader),
        epoch=run.state["epoch"],
        layout=layout,
        provenance={
            **provenance(
                config,
                folder,
                run.state["data"].get("fingerprint"),
                run.state.get("teacher"),
                run.state.get("weights"),
            ),
            "checkpoint": which,
            "branch": (model.kept if index is None else index) + 1,
        },
    )
    target, comparison = export_student(
        student,
        record,
        to,
        out or path / "export",
        run.loader,
        run.evaluator.device,
        with_preprocessing,
    )
    count = sum(value.numel() for value in student.parameters())
    return ExportedRun(target, form.record_name, name, count, comparison, form.tolerance)


def _branch_index(text: str, num_branches: int) -> int:
    number = text.removeprefix("branch")
    if not (number.isascii() and number.isdecimal()) or not 1 <= int(number) <= num_branches:
        names = [f"branch{m}" for m in range(1, num_branches + 1)]
        raise ConfigError(f"unknown branch '{text}'{did_you_mean(text, names)}")
    return int(number) - 1


def _network_name(config: TrainConfig, index: int | None) -> str:
    """The registered name of a branch's network, of the student's for None, without building it."""
    names = config.model_names()
    place = get_method(config.method).kept if index is None else index
    name = names[place] if len(names) > 1 else names[0]
    return name if is_library_name(name) else model_name(name)


def _architecture(run: LoadedRun, index: int, network: nn.Module) -> tuple[str, dict[str, Any]]:
    """The name of a branch's network, and its model's layout unless it is a plain network."""

    def shapes(module: nn.Module) -> dict[str, Any]:
        return {name: value.shape for name, value in module.state_dict().items()}

    name = run.evaluator.model.names[index]
    if shapes(create_student(name, len(run.dataset.classes))) == shapes(network):
        return name, {}
    layout = model_layout(run.config)
    del layout["drop_path"]  # acts in training only
    return run.config.model, {"branch": index, **layout}
