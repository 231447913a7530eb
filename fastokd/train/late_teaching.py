"""Late teaching (``teach_from``): the student is trained alone, then its part after the split is
copied into every branch.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastokd.errors import ConfigError
from fastokd.graph import CrossEntropy, Graph, Logits
from fastokd.losses.method_loss import MethodLoss
from fastokd.models import BranchedModel, find_backbone
from fastokd.models.summary import check_images
from fastokd.train.build import before_teaching, build_model, is_before_teaching, meta_model
from fastokd.train.config import TrainConfig
from fastokd.train.copies import copy_to_branches, separate
from fastokd.train.data import AnyDataset
from fastokd.train.describe import describe_fine_tuning
from fastokd.train.distributed import Ranks
from fastokd.train.initial import InitialWeights, normalization_notes, start_from
from fastokd.train.loss import build_loss
from fastokd.train.optimizers import with_index
from fastokd.train.step import TrainStep
from fastokd.train.step_options import choose_step_options
from fastokd.train.teacher import Teacher


def student_loss(config: TrainConfig) -> MethodLoss:
    """The cross-entropy of the student alone, with the student's name and the label smoothing of
    the configured method's loss.
    """
    loss = build_loss(config)
    row = loss.graph.logits[config.kept_branch()]
    nodes, terms = (Logits(row),), (CrossEntropy(row),)
    alone = Graph("baseline", nodes, terms, loss.graph.label_smoothing)
    return MethodLoss(alone, 1, impl=loss.impl)


def check_late_teaching(
    config: TrainConfig, num_classes: int, device: torch.device, teacher: Teacher | None
) -> None:
    """Check the networks and step options of the taught epochs before the first epoch.

    Raises:
        ConfigError: the method cannot train the network, an option of the step is not available, or
            the method exports another network than the student.
    """
    model = meta_model(config, num_classes, teacher.network if teacher else None)
    rows = teacher.rows if teacher else None
    host_rows = rows is not None and rows.table.device != with_index(device)
    choose_step_options(config, model, device, Ranks.current().size, host_rows)
    if model.has_custom_student:
        raise ConfigError(
            f"teach_from={config.teach_from:g}: method '{config.method}' does not export the"
            " student alone, which the epochs before train; omit teach_from"
        )


def check_same_phase(
    before: TrainConfig, config: TrainConfig, state: Mapping[str, Any], where: str
) -> None:
    """Check that the networks in a checkpoint are those that a changed configuration trains next.

    Raises:
        ConfigError: the change of ``epochs`` or ``teach_from`` moves the start of the teaching to
            the other side of the checkpoint.
    """
    if (is_alone := is_before_teaching(before, state)) == is_before_teaching(config, state):
        return
    changed = f"epochs={config.epochs} with teach_from={config.teach_from:g}"
    networks = "has trained only the student" if is_alone else "has already started teaching"
    raise ConfigError(
        f"{changed}: teaching would now start in epoch {config.teach_epoch() + 1}, but the run"
        f" {networks} in its {state['epoch']} epochs ({where}); to keep the start, pass"
        f" --teach-from {before.teach_epoch()} --allow-config-change"
    )


def build_step(
    config: TrainConfig,
    dataset: AnyDataset,
    device: torch.device,
    teacher: Teacher | None,
    *,
    alone: bool = False,
    student: Mapping[str, Any] | None = None,
    initial: Sequence[InitialWeights] = (),
) -> TrainStep:
    """Build the networks and the step of a run's configuration.

    Args:
        alone: build the step of the student alone, as before ``teach_from``.
        student: the ``TrainStep.state_dict`` of that step, from which the branches start.
        initial: trained weights, from which a new run starts.

    Raises:
        ConfigError: the network cannot take the images, or an option is not available.
        CheckpointError: the weights are of another architecture.
    """
    criterion = None
    if alone:
        config, teacher, criterion = before_teaching(config), None, student_loss(config)
    network, rows = (teacher.network, teacher.rows) if teacher else (None, None)
    model = build_model(config, len(dataset.classes), device, network)
    smallest = max(find_backbone(name).image_size for name in config.model_names())
    check_images(model, dataset.image_size, smallest)
    own_views = config.views() > 1 and dataset.augment.is_random
    if student is not None:
        copy_student(model, student["model"], dataset.image_size, config.seed, own_views)
    notes = start_from(
        model,
        initial,
        classes=dataset.classes,
        branch_init=config.branch_init or "copy",
        image_size=dataset.image_size,
        seed=config.seed,
        own_views=own_views,
    )
    step = TrainStep(config, model, device, rows, criterion)
    step.notes = [*notes, *normalization_notes(config, initial), *describe_fine_tuning(config)]
    if student is not None:
        carry_over(step, student)
    return step


@torch.no_grad()
def copy_student(
    model: BranchedModel,
    student: Mapping[str, Tensor],
    image_size: tuple[int, int],
    seed: int,
    own_views: bool = False,
) -> None:
    """Load the weights of a student trained alone into the trunk and all branches of a model, see
    ``copy_to_branches``. The kept branch becomes the student's part after the split.

    Args:
        model: the networks of the configuration, newly initialized.
        student: the state dict of the model of ``before_teaching``.
        image_size: height and width of the images.
        seed: of the noise.
        own_views: every branch is trained on its own views of the images, which differ; then equal
            branches get no noise.
    """
    own = model.state_dict()
    for name, value in student.items():
        own[kept_name(name, model.kept)].copy_(value)
    copy_to_branches(model, image_size)
    if not own_views:
        separate(model, seed)


def carry_over(step: TrainStep, student: Mapping[str, Any]) -> None:
    """Load the optimizer state, weight average, loss scale and step number of a student trained
    alone (``TrainStep.state_dict``) into the step of the taught epochs. All other parameters start
    with an optimizer state of zeros.
    """
    kept = step.model.kept
    optimizer = {kept_name(name, kept): each for name, each in student["optimizer"].items()}
    state = step.state_dict()
    carried = {"optimizer": {**state["optimizer"], **optimizer}}
    carried |= {name: student[name] for name in ("ema", "scaler")}
    step.load_state_dict({**state, **carried}, "the student alone")
    step.number.fill_(student["step"])


def kept_name(name: str, kept: int) -> str:
    """The name in the branched model of a tensor of the student alone, whose branch is 0."""
    return re.sub(r"^branches\.0\.", f"branches.{kept}.", name)
