"""The networks, one file per family. A family's file is imported when one of its networks is asked for."""

import importlib

from torch import nn

from fastokd.errors import ConfigError, did_you_mean
from fastokd.methods import Method, get_method
from fastokd.models.branch_out import branch_out
from fastokd.models.branched import Backbone, Branch, BranchedModel, BranchOutput, PlainNetwork
from fastokd.models.libraries import is_library_name, library_backbone, library_network
from fastokd.models.tracing import list_split_points

_modules = {
    **dict.fromkeys(("resnet8", "resnet14", "resnet20", "resnet32", "resnet44", "resnet56", "resnet110"),
                    "fastokd.models.resnet_cifar"),
}


def register_model(name: str, module: str) -> None:
    """Add a network: the module whose constant ``BACKBONES`` holds it under that name."""
    _modules[name] = module


def list_models() -> list[str]:
    """The names of all networks."""
    return sorted(_modules)


def create_model(name: str, method: str = "ahbf", num_classes: int = 10, num_branches: int | None = None,
                 aux_blocks: int = 4, at: str | None = None) -> BranchedModel:
    """The network of that name, branched as the method trains it.

    Args:
        name: a network, see ``list_models``, or "torchvision:NAME" or "timm:NAME" for one of theirs, with fresh weights.
        method: a method, see ``fastokd.methods.list_methods``; "baseline" gives the student alone.
        num_classes: C, at least 2.
        num_branches: M; None is the method's default.
        aux_blocks: auxiliary blocks that each hierarchy level has more than the one before (the paper's a), at least 0.
            Methods without a hierarchy have branches of equal depth and do not look at it.
        at: for networks of torchvision and timm, the first module that branches own, see ``branch_out``. A student alone
            needs none.

    Raises:
        ConfigError: a name is unknown or a number out of range; the message says what would do.
        MissingExtra: the network is timm's, and timm is not installed.
    """
    _check_num_classes(num_classes)
    num_branches = get_method(method).default_branches if num_branches is None else num_branches
    return assemble(find_backbone(name, at, num_branches, num_classes), method, num_classes, num_branches, aux_blocks)


def find_backbone(name: str, at: str | None = None, num_branches: int = 1, num_classes: int = 10) -> Backbone:
    """The backbone of that name; arguments and errors as in ``create_model``, whose network it makes. Builds no weights yet."""
    if is_library_name(name):
        return library_backbone(name, num_classes, at, alone=num_branches == 1)
    backbone = _backbone(name)
    if at is not None:
        raise ConfigError(f"at='{at}': {name} is branched where its paper branches it; at is for networks torchvision:NAME and timm:NAME")
    return backbone


def assemble(backbone: Backbone, method: str, num_classes: int, num_branches: int | None, aux_blocks: int) -> BranchedModel:
    """A backbone branched as the method trains it; arguments and errors as in ``create_model``."""
    chosen = get_method(method)
    num_branches = chosen.default_branches if num_branches is None else num_branches
    _check_num_branches(num_branches, chosen)
    if not isinstance(aux_blocks, int) or aux_blocks < 0:
        raise ConfigError(f"aux_blocks={aux_blocks!r}; it must be a whole number of at least 0 (the paper uses 4 on CIFAR)")
    levels = range(1, num_branches + 1) if chosen.hierarchical else [1] * num_branches
    return BranchedModel(backbone, num_classes, levels, aux_blocks, chosen.build_gates, chosen.kept)


def create_student(name: str, num_classes: int = 10) -> nn.Module:
    """The plain network of that name, with fresh weights: images [B, 3, H, W] to logits [B, C].

    A student's state dict loads into it: ``create_student(name, C).load_state_dict(model.student().state_dict())``.

    Args:
        name: as in ``create_model``.
        num_classes: C, at least 2.

    Raises:
        ConfigError: the name is unknown or ``num_classes`` below 2.
        MissingExtra: the network is timm's, and timm is not installed.
    """
    _check_num_classes(num_classes)
    if is_library_name(name):
        return library_network(name, num_classes)
    backbone = _backbone(name)
    return backbone.join(backbone.build_trunk(), backbone.build_branch(num_classes, 1, 0))


def _backbone(name: str) -> Backbone:
    if name not in _modules:
        raise ConfigError(f"unknown model '{name}'{did_you_mean(name, _modules)}; networks of torchvision and timm are torchvision:NAME and timm:NAME")
    return importlib.import_module(_modules[name]).BACKBONES[name]


def _check_num_classes(num_classes: int) -> None:
    if not isinstance(num_classes, int) or num_classes < 2:
        raise ConfigError(f"num_classes={num_classes!r}; a classifier needs a whole number of at least 2")


def _check_num_branches(num_branches: int, method: Method) -> None:
    low, high = method.branch_range
    if not isinstance(num_branches, int) or not low <= num_branches <= high:
        allowed = f"{low} to {high}" if low < high else f"{low}"
        raise ConfigError(f"num_branches={num_branches!r}; method '{method.name}' takes {allowed}"
                          f" (its default is {method.default_branches})")


__all__ = [
    "Backbone", "Branch", "BranchOutput", "BranchedModel", "PlainNetwork",
    "assemble", "branch_out", "create_model", "create_student", "find_backbone", "list_models", "list_split_points", "register_model",
]
