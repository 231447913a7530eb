"""Branches that start as copies of the student's part after the split."""

import copy
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastokd.models import BranchedModel
from fastokd.models.branch_out import NOISE, AddedBlock, Blocks
from fastokd.models.branched import Peer


@torch.no_grad()
def copy_to_branches(
    model: BranchedModel,
    image_size: tuple[int, int],
    seed: int,
    fresh: Collection[Tensor] = (),
    own_views: bool = False,
) -> int:
    """Copy the kept branch's values into all other branches of a model with a trunk.

    A tensor with more input channels (after additional dense layers) gets the values in its first
    channels and zeros in the rest. Additional blocks become the identity if zeros in their last
    layer are enough, as for residual blocks, and otherwise stay as initialized. Equal branches get
    noise, see ``separate``.

    Args:
        image_size: height and width of the images on which blocks are compared with the identity.
        seed: of the noise.
        fresh: tensors of the kept branch whose counterparts stay as initialized, e.g. a new last
            layer.
        own_views: every branch is trained on its own views of the images, which differ; then equal
            branches get no noise.

    Returns:
        The number of additional blocks that are not the identity.
    """
    kept = model.branches[model.kept]
    remaining = 0
    for branch in model.branches:
        if branch is kept:
            continue
        _copy_tensors(branch, kept, fresh)
        blocks = list(_new_blocks(branch, kept))
        remaining += len(blocks) - len(_make_identities(model, branch, blocks, image_size))
    if not own_views:
        separate(model, seed)
    return remaining


@torch.no_grad()
def separate(model: BranchedModel, seed: int) -> None:
    """Add noise to the heads of branches or peers whose parameters equal the kept one's: of a tenth
    of each weight's standard deviation. Equal branches would get equal gradients and stay equal.
    """
    generator = torch.Generator().manual_seed(seed)
    kept = list(model.branches[model.kept].parameters())
    for index, branch in enumerate(model.branches):
        own = list(branch.parameters())
        if index != model.kept and len(own) == len(kept) and all(map(torch.equal, own, kept)):
            _add_noise(branch, generator)


def _copy_tensors(branch: nn.Module, kept: nn.Module, fresh: Collection[Tensor]) -> None:
    """Copy the kept branch's parameters and buffers to the same layers of another branch."""
    values = kept.state_dict(keep_vars=True)
    values = {name: each for name, each in values.items() if not any(each is one for one in fresh)}
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
) -> set[str]:
    """Set the last layer of blocks to zero, where this makes them the identity; returns which."""
    before: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for path in paths:
        layers = [list(each.parameters(False)) for each in branch.get_submodule(path).modules()]
        last = next(filter(None, reversed(layers)), [])
        before[path] = [(parameter, parameter.clone()) for parameter in last]
        for parameter in last:
            parameter.zero_()
    identities = _identities(model.trunk, branch, paths, image_size) if paths else set()
    for path in paths:
        if path not in identities:
            for weight, value in before[path]:
                weight.copy_(value)
    return identities


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
    part = branch.branch if isinstance(branch, Peer) else branch
    head = [each for each in part.get_submodule("head").parameters() if each.dim() > 1]
    for weight in head or [each for each in branch.parameters() if each.dim() > 1]:
        noise = torch.randn(weight.shape, generator=generator).to(weight.device)
        weight.add_(noise * (NOISE * weight.std()))
