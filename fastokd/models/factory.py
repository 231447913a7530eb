"""Branched networks and students by name: those of this package, torchvision and timm."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from fastokd.errors import ConfigError, did_you_mean
from fastokd.losses.options import OptionValue
from fastokd.methods import Method, get_method, list_methods
from fastokd.methods.method import Topology
from fastokd.methods.modules import BranchSpec
from fastokd.models.assembly import assemble, check_layout, check_num_classes
from fastokd.models.branched import Backbone, BranchedModel, Peer, trunk_channels
from fastokd.models.drop_path import check_has_drop_path, set_drop_path
from fastokd.models.libraries import (
    is_library_name,
    library_backbone,
    library_network,
    recommended_split_point,
    suggest_library,
)
from fastokd.registry import Registry

_FAMILIES = {
    "resnet_cifar": "resnet8 resnet14 resnet20 resnet32 resnet44 resnet56 resnet110"
    " wrn16_2 wrn16_4 wrn28_2 wrn20_8",
    "resnet": "resnet18_imagenet resnet34_imagenet resnet50_imagenet resnext50_32x4d",
    "vgg": "vgg13 vgg16",
    "densenet": "densenet40_12",
    "mobilenet_v2": "mobilenetv2_x0_5 mobilenetv2_x1_0"
    " mobilenetv2_x0_5_imagenet mobilenetv2_x1_0_imagenet",
    "shufflenet_v2": "shufflenetv2_x1_0",
    "xception": "xception",
}
ALIASES = {f"resnet{depth}": f"resnet{depth}_imagenet" for depth in (18, 34, 50)}
"""The names of networks in torchvision and timm."""

_models: Registry[Mapping[str, Backbone]] = Registry(
    "model",
    "BACKBONES",
    {
        name: f"fastokd.models.{family}"
        for family, names in _FAMILIES.items()
        for name in names.split()
    },
)


def register_model(name: str, module: str) -> None:
    """Add a network: the module whose constant ``BACKBONES`` holds it under that name."""
    _models.register(name, module)


def list_models() -> list[str]:
    """The names of all networks."""
    return sorted(_models)


def create_model(
    name: str,
    method: str = "ahbf",
    num_classes: int = 10,
    num_branches: int | None = None,
    aux_blocks: int = 4,
    *,
    at: str | None = None,
    topology: Topology | None = None,
    options: Mapping[str, OptionValue] | None = None,
    teacher: nn.Module | None = None,
    compression: bool = False,
    drop_path: float | None = None,
) -> BranchedModel:
    """Create a branched network for a method.

    Args:
        name: a network, see ``list_models``, or "torchvision:NAME" or "timm:NAME" with fresh
            weights. Peers may differ: "resnet20,resnet32" names them in order.
        method: a method, see ``fastokd.methods.list_methods``; "baseline" is the student alone.
        num_classes: C, at least 2.
        num_branches: M; None for the method's default, or the number of networks named.
        aux_blocks: additional auxiliary blocks per hierarchy level (the paper's a), at least 0.
            Methods without a hierarchy ignore it.
        at: for networks of torchvision, timm and the user, the first module that each branch owns,
            see ``branch_out``; None for the recommended one, see ``split_point``.
        topology: "branches" (one shared trunk) or "peers" (whole networks); None for the method's
            default.
        options: options of the method's modules, see ``Method.model_options``.
        teacher: a frozen teacher: images to logits [B, C], the output's extra ``teacher``.
        compression: the last and deepest branch is the plain network and the student; each earlier
            branch has ``aux_blocks`` fewer blocks than the next. ``student(branch)`` returns any of
            them (AHBF Table 5).
        drop_path: rate of stochastic depth in the last residual block, from 0 to below 1; it falls
            linearly to 0 in the first. None for the network's own: 0, except some of torchvision's.

    Raises:
        ConfigError: an unknown name, a number out of range, or networks that the method cannot
            train; the message has the fix.
        MissingExtra: timm is needed and not installed.
    """
    chosen, names = get_method(method), [part.strip() for part in name.split(",")]
    check_num_classes(num_classes)
    if num_branches is None:
        num_branches = chosen.default_branches if len(names) == 1 else len(names)
    topology = check_layout(chosen, names, topology, num_branches)
    backbones = [
        find_backbone(part, at, num_classes, topology == "branches" and num_branches > 1, drop_path)
        for part in names
    ]
    if chosen.build_companion is not None and (whole := [b.name for b in backbones if b.whole]):
        reason = "torch.fx cannot follow its forward, and the method needs its feature maps"
        raise ConfigError(
            f"method '{method}' with model '{whole[0]}': {reason}; use baseline or dml"
        )
    kept = chosen.kept
    if compression:
        compressed, kept = backbones[0].compressed, -1
        if not chosen.hierarchical:
            reason = f"method '{method}' has branches of equal depth; use method 'ahbf'"
            raise ConfigError(f"compression: {reason}")
        if compressed is None:
            reason = "does not say which of its blocks can be removed; use another"
            raise ConfigError(f"compression: model '{backbones[0].name}' {reason}")
        backbones = [compressed(num_branches)]
    sizes = (num_classes, num_branches, aux_blocks)
    model = assemble(backbones, chosen, *sizes, topology, options, teacher, kept)
    if drop_path:
        set_drop_path(model, drop_path)
    return model


def find_backbone(
    name: str,
    at: str | None = None,
    num_classes: int = 10,
    split: bool = False,
    drop_path: float | None = None,
) -> Backbone:
    """The backbone of one name, without building it; arguments and errors as ``create_model``.

    ``split`` is whether several branches will share its trunk.
    """
    if is_library_name(name):
        return library_backbone(name, num_classes, at, split, drop_path)
    backbone = get_backbone(name)
    if drop_path:
        check_has_drop_path(backbone)
    if at is not None:
        reason = f"{name} is branched as in its paper; at is for torchvision:NAME and timm:NAME"
        raise ConfigError(f"at='{at}': {reason}")
    return backbone


def split_point(
    name: str, method: str, num_branches: int, topology: str | None = None
) -> str | None:
    """The recommended split point of a library's or user's network whose branches share a trunk;
    None for other networks and layouts. Arguments as for ``create_model``.
    """
    names = [part.strip() for part in name.split(",")]
    shares_trunk = (topology or get_method(method).topologies[0]) == "branches"
    if len(names) > 1 or not is_library_name(name) or num_branches < 2 or not shares_trunk:
        return None
    return recommended_split_point(name)


def allowed_methods(name: str) -> list[str]:
    """The methods that can train the network of that name; a ConfigError for an unknown name."""
    with torch.device("meta"):
        backbone = find_backbone(name)
        trunk, branch = backbone.build_trunk(), backbone.build_branch(10, 1, 0)
        peer, shared_channels = Peer(trunk, branch), trunk_channels(trunk)

        def can_train(method: Method) -> bool:
            if method.build_companion is None:
                return True
            peers, count = method.topologies[0] == "peers", method.default_branches
            branches = [peer if peers else branch] * count
            channels = trunk_channels(None) if peers else shared_channels
            spec = BranchSpec((branch.channels,) * count, channels, 10, branches)
            try:
                method.build_companion(spec, **method.default_model_options())
            except ValueError:
                return False
            return True

        return [method for method in list_methods() if can_train(get_method(method))]


def create_student(
    name: str, num_classes: int = 10, *, branch: int | None = None, **layout: Any
) -> nn.Module:
    """Create the plain network of that name with fresh weights: images to logits [B, C].

    A student's state dict loads into it: ``create_student(model.name,
    C).load_state_dict(model.student().state_dict())``. "NETWORKS@METHOD" is the student of a method
    that needs more than one branch.

    Args:
        layout: keywords of ``create_model``; if given, the network is a branch of that model.
        branch: the index of that branch; None for the branch that the method keeps.

    Raises:
        ConfigError: an unknown name, or ``num_classes`` below 2.
        MissingExtra: timm is needed and not installed.
    """
    if layout or branch is not None:
        return create_model(name, num_classes=num_classes, **layout).student(branch)
    networks, mark, method = name.partition("@")
    if mark:
        return create_model(networks, method, num_classes).student()
    check_num_classes(num_classes)
    if is_library_name(name):
        return library_network(name, num_classes)
    backbone = get_backbone(name)
    return backbone.join(backbone.build_trunk(), backbone.build_branch(num_classes, 1, 0))


def model_name(name: str) -> str:
    """The registered spelling of a network's name, such as wrn16_2 for "WRN-16-2"; a ConfigError
    suggests the closest one for an unknown name.
    """

    def plain(text: str) -> str:
        return "".join(filter(str.isalnum, text.lower()))

    name = ALIASES.get(name.lower(), name)
    if name in _models:
        return name
    matches = [known for known in _models if plain(known) == plain(name)]
    if len(matches) != 1:
        if suggestion := suggest_library(name):
            raise ConfigError(f"unknown model '{name}'; use '{suggestion}'")
        libraries = "networks of torchvision and timm are torchvision:NAME and timm:NAME"
        raise ConfigError(f"unknown model '{name}'{did_you_mean(name, _models)}; {libraries}")
    return matches[0]


def get_backbone(name: str) -> Backbone:
    """The backbone of a registered network; errors as ``model_name``."""
    name = model_name(name)
    return _models.get(name)[name]
