"""Networks of torchvision and timm by name, such as "timm:convnext_tiny"; no downloads."""

import difflib
import functools
import itertools
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import nn

from fastokd.errors import ConfigError, MissingExtra, did_you_mean, first_line
from fastokd.models.branch_out import Split, fresh_block
from fastokd.models.branched import Backbone
from fastokd.models.drop_path import library_drop_path
from fastokd.models.tracing import list_split_points

T = TypeVar("T")

LIBRARIES = ("torchvision", "timm")

_AUXILIARY = {"googlenet": ("aux1.", "aux2."), "inception_v3": ("AuxLogits.",)}
"""Weights of torchvision's auxiliary classifiers, which networks are built without."""


def is_library_name(name: str) -> bool:
    """True if a model's name has the form LIBRARY:NAME."""
    return ":" in name


def library_network(name: str, num_classes: int, drop_path: float | None = None) -> nn.Module:
    """Build "torchvision:NAME" or "timm:NAME" with fresh weights, without auxiliary classifiers.

    ``drop_path`` is the rate of stochastic depth; None for the library's.

    Raises:
        ConfigError: the name is unknown, or the library cannot build the network, or it has no
            stochastic depth.
        MissingExtra: timm is not installed.
    """
    library, _, network = name.partition(":")
    if library not in LIBRARIES:
        hint = did_you_mean(library, LIBRARIES)
        raise ConfigError(f"unknown library '{library}' in model '{name}'{hint}")
    build = _torchvision(network) if library == "torchvision" else _timm(network)
    if drop_path is not None:
        build = library_drop_path(name, build, drop_path)
    try:
        try:
            return build(num_classes=num_classes)
        except RuntimeError:
            if torch.get_default_device().type != "meta":
                raise
            with torch.device("cpu"):  # the constructor computes with tensor values
                return build(num_classes=num_classes)
    except ConfigError:
        raise
    except Exception as error:  # constructors of libraries raise any exception
        reason = f"cannot be built for {num_classes} classes ({first_line(error)})"
        raise ConfigError(f"{name} {reason}") from error


def without_auxiliary(name: str, weights: Mapping[str, T]) -> dict[str, T]:
    """The weights of a library's network without those of auxiliary classifiers."""
    prefixes = _AUXILIARY.get(name.removeprefix("torchvision:"), ())
    return {key: value for key, value in weights.items() if not key.startswith(prefixes)}


def library_backbone(
    name: str, num_classes: int, at: str | None, split: bool = True, drop_path: float | None = None
) -> Backbone:
    """A library's network split at ``at``; each branch gets the library's initialization.

    ``at`` may be None without ``split`` (several branches share the trunk), where every split point
    gives the same student.

    Raises:
        ConfigError, MissingExtra: as ``library_network`` and ``branch_out``. If ``at`` is missing,
            the message lists the split points.
    """
    template = _template(name, num_classes, drop_path)
    if at is None:
        points = list_split_points(template)
        if split or not points:
            raise ConfigError(
                f"{name} needs at (--at), the first module that each branch owns; split points:"
                f" {', '.join(points) or 'none'}"
            )
        at = points[-1]
    networks = (
        (library_network(name, num_classes, drop_path), fresh_block) for _ in itertools.count()
    )
    return Split(template, at).backbone(name, networks)


def library_split_points(name: str) -> list[str]:
    """The split points of a library's network, see ``list_split_points``."""
    return list_split_points(_template(name, 10))


def _template(name: str, num_classes: int, drop_path: float | None = None) -> nn.Module:
    """The network without values, if its constructor can do without them."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return library_network(name, num_classes, drop_path)


def _torchvision(network: str) -> Callable[..., nn.Module]:
    import torchvision

    names = torchvision.models.list_models(module=torchvision.models)
    if network not in names:
        hint = did_you_mean(network, names)
        raise ConfigError(f"torchvision has no classifier '{network}'{hint}")
    extra = {"aux_logits": False, "init_weights": True} if network in _AUXILIARY else {}
    return functools.partial(torchvision.models.get_model, network, weights=None, **extra)


def _timm(network: str) -> Callable[..., nn.Module]:
    try:
        import timm
    except ImportError:
        fix = "which is not installed: pip install 'fastokd[timm]'"
        raise MissingExtra(f"timm:{network} needs timm, {fix}") from None
    if not timm.is_model(network):
        names = timm.list_models()
        close = difflib.get_close_matches(network, names, n=1)
        hint = f"; did you mean '{close[0]}'?" if close else ";"
        hint += f" timm.list_models() lists all {len(names)}"
        raise ConfigError(f"timm has no network '{network}'{hint}")
    return functools.partial(timm.create_model, network, pretrained=False)
