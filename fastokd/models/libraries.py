"""Networks by name of torchvision and timm, such as "timm:convnext_tiny", without downloads, and of
the user's modules, such as "mypackage.nets:make_net".
"""

import difflib
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
from torch import nn

from fastokd.errors import ConfigError, MissingExtra, did_you_mean, first_line
from fastokd.models.branch_out import Split, fresh_block
from fastokd.models.branched import Backbone, Branch
from fastokd.models.drop_path import library_drop_path
from fastokd.models.summary import forward_flops
from fastokd.models.tracing import default_input_size, list_split_points
from fastokd.plugins import plugin_network

P = ParamSpec("P")
T = TypeVar("T")

LIBRARIES = ("torchvision", "timm")

_AUXILIARY = {"googlenet": ("aux1.", "aux2."), "inception_v3": ("AuxLogits.",)}
"""Weights of torchvision's auxiliary classifiers, which networks are built without."""


def cached_for_libraries(find: Callable[P, T]) -> Callable[P, T]:
    """Keep the results of a function of a network's name and hashable arguments, except for
    networks of the user's modules, which may change.
    """
    cached: Any = functools.lru_cache(maxsize=64)(find)

    @functools.wraps(find)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        library = str(args[0]).partition(":")[0]
        result: T = (cached if library in LIBRARIES else find)(*args, **kwargs)
        return result

    return call


def is_library_name(name: str) -> bool:
    """True if a model's name has the form LIBRARY:NAME or MODULE:NAME."""
    return ":" in name


def library_network(name: str, num_classes: int, drop_path: float | None = None) -> nn.Module:
    """Build "torchvision:NAME" or "timm:NAME" with fresh weights, without auxiliary classifiers, or
    "MODULE:NAME", a function or class of the user's module that takes ``num_classes``.

    ``drop_path`` is the rate of stochastic depth; None for the library's.

    Raises:
        ConfigError: the name is unknown, or the network cannot be built, or it has no stochastic
            depth.
        MissingExtra: timm is not installed.
    """
    library, _, network = name.partition(":")
    if library == "torchvision":
        build = _torchvision(network)
    elif library == "timm":
        build = _timm(network)
    else:
        build = _own(name)
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

    ``at`` may be None: without ``split`` (several branches share the trunk) every split point gives
    the same student, with it the default is ``recommended_split_point``.

    Raises:
        ConfigError, MissingExtra: as ``library_network`` and ``branch_out``.
    """
    requested = at is not None
    if drop_path is not None:
        _template(name, num_classes, drop_path)  # raises for a network without stochastic depth
    if at is None:
        try:
            points = library_split_points(name)
        except ConfigError:
            if split:
                raise
            return whole_backbone(name, drop_path)
        if not (split or points):
            return whole_backbone(name, drop_path)
        at = recommended_split_point(name) if split else next(reversed(points))
        if at is None:
            raise ConfigError(f"{name} has no split point: no single tensor crosses between stages")
    networks = (
        (library_network(name, num_classes, drop_path), fresh_block) for _ in itertools.count()
    )
    try:
        return _split(name, num_classes, at, drop_path).backbone(name, networks)
    except ConfigError:
        if split or requested:
            raise
        return whole_backbone(name, drop_path)


def whole_backbone(name: str, drop_path: float | None = None) -> Backbone:
    """A library's network that ``torch.fx`` cannot follow, as one branch without a trunk."""
    image_size = default_input_size(_template(name, 10))[1]

    def build_branch(num_classes: int, level: int, aux_blocks: int) -> Branch:
        return Branch(nn.Identity(), library_network(name, num_classes, drop_path), 3)

    def join(trunk: nn.Module, branch: Branch) -> nn.Module:
        return branch.head

    return Backbone(name, nn.Identity, build_branch, join, image_size, whole=True)


@cached_for_libraries
def library_split_points(name: str) -> Sequence[str]:
    """The split points of a library's network, see ``list_split_points``."""
    return tuple(list_split_points(_template(name, 10)))


@functools.cache
def trunk_share(name: str, at: str) -> float:
    """The trunk's part of the network's FLOPs at a split point, from 0 to 1."""
    split = _split(name, 10, at, None)
    trunk = split.backbone(name, iter([(_template(name, 10), fresh_block)])).build_trunk()
    return forward_flops(trunk, split.size) / _network_flops(name, split.size)


@functools.cache
def _network_flops(name: str, size: tuple[int, ...]) -> int:
    return forward_flops(_template(name, 10), size)


@functools.cache
def recommended_split_point(name: str) -> str | None:
    """The split point whose trunk has nearly half of the FLOPs, as in AHBF's ImageNet ResNets;
    whole stages (``layer3``) before parts of them (``layer3.1``). None for no split point.
    """
    points = library_split_points(name)
    for depth in sorted({point.count(".") for point in points}):
        shares = {point: trunk_share(name, point) for point in points if point.count(".") <= depth}
        best = min(shares, key=lambda point: abs(shares[point] - 0.5))
        if 1 / 3 <= shares[best] <= 2 / 3:
            return best
    return best if points else None


def suggest_library(name: str) -> str | None:
    """The name with its library for a plain name that torchvision or timm has."""
    for library, find in (("torchvision", _torchvision), ("timm", _timm)):
        try:
            find(name)
        except (ConfigError, MissingExtra):
            continue
        return f"{library}:{name}"
    return None


def _template(name: str, num_classes: int, drop_path: float | None = None) -> nn.Module:
    """The network without values, if its constructor can do without them."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return library_network(name, num_classes, drop_path)


@cached_for_libraries
def _split(name: str, num_classes: int, at: str, drop_path: float | None) -> Split:
    """A network without values, split at ``at``."""
    return Split(_template(name, num_classes, drop_path), at)


def _own(name: str) -> Callable[..., nn.Module]:
    build: Any = plugin_network(name)
    if build is None:
        module = name.partition(":")[0]
        raise ConfigError(
            f"model '{name}': '{module}' is neither a library nor a module that can be imported"
            f"{did_you_mean(module, LIBRARIES)}; run in the folder that holds your module, or pass"
            " --plugin FILE.py"
        )

    def checked(num_classes: int) -> nn.Module:
        network = build(num_classes=num_classes)
        if not isinstance(network, nn.Module):
            raise TypeError(f"it returns {type(network).__name__}, not a torch.nn.Module")
        return network

    return checked


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
        fix = "which is not installed: pip install -e '.[timm]'"
        raise MissingExtra(f"timm:{network} needs timm, {fix}") from None
    if not timm.is_model(network):
        names = timm.list_models()
        close = difflib.get_close_matches(network, names, n=1)
        hint = f"; did you mean '{close[0]}'?" if close else ";"
        hint += f" timm.list_models() lists all {len(names)}"
        raise ConfigError(f"timm has no network '{network}'{hint}")
    return functools.partial(timm.create_model, network, pretrained=False)
