"""Late teaching (``teach_from``): the student is trained alone, then its part after the split is
copied into every branch.
"""

import copy
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastokd.errors import ConfigError
from fastokd.graph import CrossEntropy, Graph, Logits
from fastokd.losses.method_loss import MethodLoss
from fastokd.models import BranchedModel, find_backbone
from fastokd.models.branch_out import NOISE, AddedBlock, Blocks
from fastokd.models.summary import check_images
from fastokd.train.build import before_teaching, build_model, is_before_teaching, meta_model
from fastokd.train.config import TrainConfig, build_loss
from fastokd.train.data import AnyDataset
from fastokd.train.distributed import Ranks
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
) -> TrainStep:
    """Build the networks and the step of a run's configuration.

    Args:
        alone: build the step of the student alone, as before ``teach_from``.
        student: the ``TrainStep.state_dict`` of that step, from which the branches start.

    Raises:
        ConfigError: the network cannot take the images, or an option is not available.
    """
    criterion = None
    if alone:
        config, teacher, criterion = before_teaching(config), None, student_loss(config)
    network, rows = (teacher.network, teacher.rows) if teacher else (None, None)
    model = build_model(config, len(dataset.classes), device, network)
    smallest = max(find_backbone(name).image_size for name in config.model_names())
    check_images(model, dataset.image_size, smallest)
    if student is not None:
        copy_student(model, student["model"], dataset.image_size, config.seed)
    step = TrainStep(config, model, device, rows, criterion)
    if student is not None:
        carry_over(step, student)
    return step


@torch.no_grad()
def copy_student(
    model: BranchedModel, student: Mapping[str, Tensor], image_size: tuple[int, int], seed: int
) -> None:
    """Load the weights of a student trained alone into the trunk and all branches of a model.

    The kept branch becomes the student's part after the split. Every other branch gets the values
    of the same layers; a tensor with more input channels (after additional dense layers) gets these
    values in its first channels and zeros in the rest. Additional blocks become the identity if
    zeros in their last layer are enough, as for residual blocks, and otherwise stay
    as initialized. A branch without additional blocks gets noise on its head's weights, of a tenth
    of their standard deviation, because equal branches would get equal gradients.

    Args:
        model: the networks of the configuration, newly initialized.
        student: the state dict of the model of ``before_teaching``.
        image_size: height and width of the images on which blocks are compared with the identity.
        seed: of the noise.
    """
    own = model.state_dict()
    for name, value in student.items():
        own[kept_name(name, model.kept)].copy_(value)
    kept = model.branches[model.kept]
    generator = torch.Generator().manual_seed(seed)
    for branch in model.branches:
        if branch is kept:
            continue
        _copy_tensors(branch, kept)
        blocks = list(_new_blocks(branch, kept))
        _make_identities(model, branch, blocks, image_size)
        if len(list(branch.parameters())) == len(list(kept.parameters())):
            _add_noise(branch, generator)


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


def _copy_tensors(branch: nn.Module, kept: nn.Module) -> None:
    """Copy the kept branch's parameters and buffers to the same layers of another branch."""
    values = kept.state_dict()
    containers = [f"{path}." for path in _containers(branch)]
    for name, target in branch.state_dict().items():
        for container in containers:
            # The first child is the layer after which blocks were added.
            if name.startswith(f"{container}0."):
                name = container + name.removeprefix(f"{container}0.")
                break
        value = values.get(name)
        if value is None or value.dim() != target.dim():
            continue
        common = tuple(map(slice, map(min, value.shape, target.shape)))
        if value.dim() > 1 and value.shape != target.shape:
            target.zero_()
        target[common] = value[common]


def _containers(branch: nn.Module) -> Iterator[str]:
    """The paths of modules that ``branch_out`` put in place of one layer, to add blocks to it."""
    for path, module in branch.named_modules():
        if isinstance(module, Blocks) or any(
            isinstance(each, AddedBlock) for each in module.children()
        ):
            yield path


def _new_blocks(branch: nn.Module, kept: nn.Module) -> Iterator[str]:
    """The paths of the outermost modules of a branch that the kept branch does not have."""
    containers = list(_containers(branch))
    known = {path for path, _ in kept.named_modules()}
    for path, _ in branch.named_modules():
        parent, _, child = path.rpartition(".")
        if parent in containers:
            if child != "0":
                yield path
        elif path not in known and parent in known:
            yield path


def _make_identities(
    model: BranchedModel, branch: nn.Module, paths: list[str], image_size: tuple[int, int]
) -> None:
    """Set the last layer of blocks to zero, where this makes them the identity."""
    before: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for path in paths:
        layers = [list(each.parameters(False)) for each in branch.get_submodule(path).modules()]
        last = next(filter(None, reversed(layers)), [])
        before[path] = [(parameter, parameter.clone()) for parameter in last]
        for parameter in last:
            parameter.zero_()
    identities = _identities(model.trunk, branch, paths, image_size) if paths else ()
    for path in paths:
        if path not in identities:
            for weight, value in before[path]:
                weight.copy_(value)


def _identities(
    trunk: nn.Module | None, branch: nn.Module, paths: list[str], image_size: tuple[int, int]
) -> set[str]:
    """The modules of a branch that return their input unchanged in evaluation mode."""
    assert trunk is not None
    trunk, branch = copy.deepcopy(trunk).eval(), copy.deepcopy(branch).eval()
    blocks = {branch.get_submodule(path): path for path in paths}
    inputs: dict[nn.Module, Tensor] = {}
    identities = set()

    def keep_input(block: nn.Module, arguments: tuple[Any, ...]) -> None:
        if isinstance(arguments[0], Tensor):
            inputs[block] = arguments[0].clone()

    def compare(block: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        given = inputs.get(block)
        if given is not None and isinstance(output, Tensor) and torch.equal(output, given):
            identities.add(blocks[block])

    for block in blocks:
        block.register_forward_pre_hook(keep_input)
        block.register_forward_hook(compare)
    images = torch.randn(2, 3, *image_size, generator=torch.Generator().manual_seed(0))
    branch(trunk(images.to(next(branch.parameters()).device)))
    return identities


def _add_noise(branch: nn.Module, generator: torch.Generator) -> None:
    """Add Gaussian noise to the weights of a branch's head, or of all its layers if the head has no
    weights.
    """
    head = [each for each in branch.get_submodule("head").parameters() if each.dim() > 1]
    for weight in head or [each for each in branch.parameters() if each.dim() > 1]:
        noise = torch.randn(weight.shape, generator=generator).to(weight.device)
        weight.add_(noise * (NOISE * weight.std()))
