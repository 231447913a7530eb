"""The networks, one file per family. A family's file is imported when one of its networks is asked for."""

import importlib

from torch import nn

from fastokd.errors import ConfigError, did_you_mean
from fastokd.methods import Method, get_method
from fastokd.models.branched import Backbone, Branch, BranchedModel, BranchOutput, PlainNetwork

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
                 aux_blocks: int = 4) -> BranchedModel:
    """The network of that name, branched as the method trains it.

    Args:
        name: a network, see ``list_models``.
        method: a method, see ``fastokd.methods.list_methods``; "baseline" gives the student alone.
        num_classes: C, at least 2.
        num_branches: M; None is the method's default.
        aux_blocks: auxiliary blocks that each hierarchy level has more than the one before (the paper's a), at least 0.
            Methods without a hierarchy have branches of equal depth and do not look at it.

    Raises:
        ConfigError: a name is unknown or a number out of range; the message says what would do.
    """
    backbone, chosen = _backbone(name), get_method(method)
    _check_num_classes(num_classes)
    num_branches = chosen.default_branches if num_branches is None else num_branches
    _check_num_branches(num_branches, chosen)
    if not isinstance(aux_blocks, int) or aux_blocks < 0:
        raise ConfigError(f"aux_blocks={aux_blocks!r}; it must be a whole number of at least 0 (the paper uses 4 on CIFAR)")
    levels = range(1, num_branches + 1) if chosen.hierarchical else [1] * num_branches
    return BranchedModel(backbone, num_classes, levels, aux_blocks, chosen.build_gates, chosen.kept)


def create_student(name: str, num_classes: int = 10) -> nn.Module:
    """The plain network of that name, with fresh weights: images [B, 3, H, W] to logits [B, C].

    A student's state dict loads into it: ``create_student(name, C).load_state_dict(model.student().state_dict())``.

    Raises:
        ConfigError: the name is unknown or ``num_classes`` below 2.
    """
    backbone = _backbone(name)
    _check_num_classes(num_classes)
    return backbone.join(backbone.build_trunk(), backbone.build_branch(num_classes, 1, 0))


def _backbone(name: str) -> Backbone:
    if name not in _modules:
        raise ConfigError(f"unknown model '{name}'{did_you_mean(name, _modules)}")
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
    "create_model", "create_student", "list_models", "register_model",
]
