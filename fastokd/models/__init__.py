"""The networks, one file per family. A family's file is imported when one of its networks is asked for."""

import importlib

from torch import nn

from fastokd.errors import ConfigError, did_you_mean
from fastokd.methods import Method, get_method
from fastokd.models.branched import Backbone, Branch, BranchedModel, BranchOutput, PlainNetwork

_modules = {
    **dict.fromkeys(("resnet8", "resnet14", "resnet20", "resnet32", "resnet44", "resnet56", "resnet110", "wrn20_8"),
                    "fastokd.models.resnet_cifar"),
    **dict.fromkeys(("resnet18_imagenet", "resnet34_imagenet", "resnet50_imagenet", "resnext50_32x4d"), "fastokd.models.resnet"),
    **dict.fromkeys(("wrn16_2", "wrn16_4", "wrn28_2"), "fastokd.models.wide_resnet"),
    **dict.fromkeys(("vgg13", "vgg16"), "fastokd.models.vgg"),
    "densenet40_12": "fastokd.models.densenet",
    **dict.fromkeys(("mobilenetv2_x0_5", "mobilenetv2_x1_0", "mobilenetv2_x0_5_imagenet", "mobilenetv2_x1_0_imagenet"),
                    "fastokd.models.mobilenet_v2"),
    "shufflenetv2_x1_0": "fastokd.models.shufflenet_v2",
    "xception": "fastokd.models.xception",
}


def register_model(name: str, module: str) -> None:
    """Add a network: the module whose constant ``BACKBONES`` holds it under that name."""
    _modules[name] = module


def list_models() -> list[str]:
    """The names of all networks."""
    return sorted(_modules)


def create_model(name: str, method: str = "ahbf", num_classes: int = 10, num_branches: int | None = None,
                 aux_blocks: int = 4, *, compression: bool = False) -> BranchedModel:
    """The network of that name, branched as the method trains it.

    Args:
        name: a network, see ``list_models``.
        method: a method, see ``fastokd.methods.list_methods``; "baseline" gives the student alone.
        num_classes: C, at least 2.
        num_branches: M; None is the method's default.
        aux_blocks: auxiliary blocks that each hierarchy level has more than the one before (the paper's a), at least 0.
            Methods without a hierarchy have branches of equal depth and do not look at it.
        compression: the deepest branch, the last, is the plain network and the one that is kept; each before it has
            ``aux_blocks`` blocks fewer than the next, and any can be taken out with ``student(branch)`` (AHBF Table 5).

    Raises:
        ConfigError: a name is unknown or a number out of range; the message says what would do.
    """
    backbone, chosen = get_backbone(name), get_method(method)
    _check_num_classes(num_classes)
    num_branches = chosen.default_branches if num_branches is None else num_branches
    _check_num_branches(num_branches, chosen)
    if not isinstance(aux_blocks, int) or aux_blocks < 0:
        raise ConfigError(f"aux_blocks={aux_blocks!r}; it must be a whole number of at least 0 (the paper uses 4 on CIFAR)")
    if compression:
        backbone = _compressed(backbone, chosen, num_branches)
    levels = range(1, num_branches + 1) if chosen.hierarchical else [1] * num_branches
    return BranchedModel(backbone, num_classes, levels, aux_blocks, chosen.build_gates, -1 if compression else chosen.kept)


def create_student(name: str, num_classes: int = 10) -> nn.Module:
    """The plain network of that name, with fresh weights: images [B, 3, H, W] to logits [B, C].

    A student's state dict loads into it: ``create_student(name, C).load_state_dict(model.student().state_dict())``.

    Raises:
        ConfigError: the name is unknown or ``num_classes`` below 2.
    """
    backbone = get_backbone(name)
    _check_num_classes(num_classes)
    return backbone.join(backbone.build_trunk(), backbone.build_branch(num_classes, 1, 0))


def model_name(name: str) -> str:
    """The registry's spelling of a network's name: a '-' is read as '_'.

    Raises:
        ConfigError: there is none; the message suggests the closest name.
    """
    spelled = name if name in _modules else name.replace("-", "_")
    if spelled not in _modules:
        raise ConfigError(f"unknown model '{name}'{did_you_mean(spelled, _modules)}")
    return spelled


def get_backbone(name: str) -> Backbone:
    """How the network of that name is split.

    Raises:
        ConfigError: there is none; the message suggests the closest name.
    """
    name = model_name(name)
    return importlib.import_module(_modules[name]).BACKBONES[name]


def _compressed(backbone: Backbone, method: Method, num_branches: int) -> Backbone:
    if not method.hierarchical:
        raise ConfigError(f"compression: method '{method.name}' has branches of equal depth; use method 'ahbf'")
    if backbone.compressed is None:
        raise ConfigError(f"compression: model '{backbone.name}' does not say which of its blocks can be taken away; use another")
    return backbone.compressed(num_branches)


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
    "create_model", "create_student", "get_backbone", "list_models", "model_name", "register_model",
]
