"""Branches that start as copies of the student's part after the split."""

import copy
import functools
import itertools
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastokd.models import BranchedModel
from fastokd.models.branch_out import NOISE, AddedBlock, Blocks
from fastokd.models.branched import Peer
from fastokd.models.residual import zeros_for_identity


@torch.no_grad()
def copy_to_branches(
    model: BranchedModel, image_size: tuple[int, int], fresh: Collection[Tensor] = ()
) -> int:
    """Copy the kept branch's values into all other branches of a model with a trunk.

    A tensor with more input channels (after additional dense layers) gets the values in its first
    channels and zeros in the rest. Additional blocks become the identity if zeros in some of their
    parameters are enough, as for residual blocks, and otherwise stay as initialized. Branches of
    equal depth need ``separate`` or different images.

    Args:
        image_size: height and width of the images on which blocks are compared with the identity.
        fresh: tensors of the kept branch whose counterparts stay as initialized, e.g. a new last
            layer.

    Returns:
        The number of branches with other features, since some of their blocks are not the identity.
    """
    kept = model.branches[model.kept]
    different = 0
    for branch in model.branches:
        if branch is kept:
            continue
        _copy_tensors(branch, kept, fresh)
        blocks = _new_blocks(branch, kept)
        others = len(blocks) - len(_make_identities(model, branch, blocks, image_size))
        different += others > 0 and not _has_same_features(model, branch, image_size)
    return different


@torch.no_grad()
def separate(model: BranchedModel, seed: int) -> int:
    """Add noise to the heads of branches or peers whose parameters equal the kept one's or those of
    an earlier one: of a tenth of each weight's standard deviation. Equal branches would get equal
    gradients and stay equal.

    Returns:
        The number of these branches or peers.
    """
    count = 0
    generator = torch.Generator().manual_seed(seed)
    earlier = [model.branches[model.kept]]
    for index, branch in enumerate(model.branches):
        if index == model.kept:
            continue
        if any(_is_equal(branch, other) for other in earlier):
            _add_noise(branch, generator)
            count += 1
        earlier.append(branch)
    return count


def _is_equal(branch: nn.Module, other: nn.Module) -> bool:
    """True if two branches or peers have the same parameters."""
    pairs = itertools.zip_longest(branch.parameters(), other.parameters())
    return all(one is not None and two is not None and torch.equal(one, two) for one, two in pairs)


def _copy_tensors(branch: nn.Module, kept: nn.Module, fresh: Collection[Tensor]) -> None:
    """Copy the kept branch's parameters and buffers to the same layers of another branch."""
    values = kept.state_dict(keep_vars=True)
    values = {name: each for name, each in values.items() if not any(each is one for one in fresh)}
    containers = list(_containers(branch))
    for name, target in branch.state_dict().items():
        value = values.get(_plain_name(name, containers))
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


def _plain_name(name: str, containers: Collection[str]) -> str:
    """The name of a module or tensor in the branch before ``branch_out`` added blocks."""
    for path in containers:
        # The first child is the layer after which blocks were added.
        if name.startswith(f"{path}.0."):
            return f"{path}.{name.removeprefix(f'{path}.0.')}"
    return name


def _new_blocks(branch: nn.Module, kept: nn.Module) -> list[str]:
    """The paths of the outermost modules of a branch that the kept branch does not have."""
    containers = set(_containers(branch))
    known = {path for path, _ in kept.named_modules()}
    added: list[str] = []
    for path, _ in branch.named_modules():
        parent, _, child = path.rpartition(".")
        if parent in containers:
            is_new = child != "0"
        else:
            is_new = _plain_name(path, containers) not in known
        if is_new and not any(path.startswith(f"{other}.") for other in added):
            added.append(path)
    return added


def _make_identities(
    model: BranchedModel, branch: nn.Module, paths: list[str], image_size: tuple[int, int]
) -> set[str]:
    """Set parameters of blocks to zero, where this makes them the identity; returns which."""
    identities = set()
    for path, (inputs, options) in _inputs(model.trunk, branch, paths, image_size).items():
        block = branch.get_submodule(path)
        if (names := zeros_for_identity(block, *inputs, **options)) is not None:
            identities.add(path)
            for name in names:
                block.get_parameter(name).zero_()
    return identities


def _inputs(
    trunk: nn.Module | None, branch: nn.Module, paths: list[str], image_size: tuple[int, int]
) -> dict[str, tuple[tuple[Any, ...], dict[str, Any]]]:
    """The arguments that blocks of a branch get for random images in evaluation mode, if the first
    one is a tensor.
    """
    branch = copy.deepcopy(branch).eval()
    arguments: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def keep(path: str, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
        if inputs and isinstance(inputs[0], Tensor):
            arguments[path] = (inputs[0].clone(), *inputs[1:]), options

    for path in paths:
        hook = functools.partial(lambda path, _, *inputs: keep(path, *inputs), path)
        branch.get_submodule(path).register_forward_pre_hook(hook, with_kwargs=True)
    branch(_trunk_maps(trunk, image_size))
    return arguments


def _has_same_features(
    model: BranchedModel, branch: nn.Module, image_size: tuple[int, int]
) -> bool:
    """True if a branch has the kept branch's features, in evaluation mode, and perhaps more."""
    maps = _trunk_maps(model.trunk, image_size)
    ours, kept = (
        copy.deepcopy(each.get_submodule("body")).eval()(maps.clone())
        for each in (branch, model.branches[model.kept])
    )
    common = ours[tuple(map(slice, kept.shape))]
    return common.shape == kept.shape and torch.allclose(common, kept, rtol=1e-4, atol=1e-6)


def _trunk_maps(trunk: nn.Module | None, image_size: tuple[int, int]) -> Tensor:
    """The trunk's output for two random images, in evaluation mode."""
    assert trunk is not None
    trunk = copy.deepcopy(trunk).eval()
    images = torch.randn(2, 3, *image_size, generator=torch.Generator().manual_seed(0))
    maps: Tensor = trunk(images.to(next(trunk.parameters()).device))
    return maps


def _add_noise(branch: nn.Module, generator: torch.Generator) -> None:
    """Add Gaussian noise to the weights of a branch's head, or of all its layers if the head has no
    weights.
    """
    part = branch.branch if isinstance(branch, Peer) else branch
    head = [each for each in part.get_submodule("head").parameters() if each.dim() > 1]
    for weight in head or [each for each in branch.parameters() if each.dim() > 1]:
        noise = torch.randn(weight.shape, generator=generator).to(weight.device)
        weight.add_(noise * (NOISE * weight.std()))
