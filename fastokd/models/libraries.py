"""Networks of torchvision and timm by name: "torchvision:resnet18", "timm:convnext_tiny". Nothing
is downloaded.
"""

import difflib
from collections.abc import Callable, Iterator

import torch
from torch import nn

from fastokd.errors import ConfigError, MissingExtra, did_you_mean, first_line
from fastokd.models.branch_out import Source, Split, fresh_block
from fastokd.models.branched import Backbone
from fastokd.models.tracing import list_split_points


def is_library_name(name: str) -> bool:
    """Whether a model's name is of the form LIBRARY:NAME."""
    return ":" in name


def library_network(name: str, num_classes: int) -> nn.Module:
    """The network of that name as its library builds it, with its initialisation: images [B, 3, H,
    W] to logits [B, C].

    Args:
        name: "torchvision:NAME" or "timm:NAME".
        num_classes: C.

    Raises:
        ConfigError: the name is unknown, or the library cannot build it.
        MissingExtra: timm is not installed.
    """
    build = _builder(name)
    try:
        try:
            return build(num_classes)
        except RuntimeError:
            if torch.get_default_device().type != "meta":
                raise
            with torch.device("cpu"):  # a constructor that computes with tensors needs their values
                return build(num_classes)
    except Exception as error:  # whatever a constructor of theirs raises
        raise ConfigError(
            f"{name} cannot be built for {num_classes} classes ({first_line(error)})"
        ) from error


def library_backbone(name: str, num_classes: int, at: str | None, split: bool = True) -> Backbone:
    """A library's network split at ``at``; every branch is initialised as the library does it.

    Args:
        name: as in ``library_network``.
        num_classes: C.
        at: the first module that branches own; without ``split`` it may be None, and any place
            gives the same.
        split: whether several branches share the trunk.

    Raises:
        ConfigError, MissingExtra: as ``library_network`` and ``branch_out``; without ``at`` with
            the split points.
    """
    template = _template(name, num_classes)
    if at is None:
        points = list_split_points(template)
        if split or not points:
            raise ConfigError(
                f"{name} needs at (--at): the first module that every branch has for itself; split"
                f" points: {', '.join(points) or 'none'}"
            )
        at = points[-1]
    return Split(template, at).backbone(name, _new_networks(name, num_classes))


def library_split_points(name: str) -> list[str]:
    """Where the network of that name can be split, see ``list_split_points``; errors as
    ``library_network``.
    """
    return list_split_points(_template(name, 10))


def _new_networks(name: str, num_classes: int) -> Iterator[Source]:
    while True:
        yield library_network(name, num_classes), fresh_block


def _template(name: str, num_classes: int) -> nn.Module:
    """The network for finding out about it: without values where its constructor can do without."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return library_network(name, num_classes)


def _builder(name: str) -> Callable[[int], nn.Module]:
    """What builds the network of a name for C classes."""
    library, _, network = name.partition(":")
    if library == "torchvision":
        return _torchvision(network)
    if library == "timm":
        return _timm(network)
    raise ConfigError(
        f"unknown library '{library}' in model"
        f" '{name}'{did_you_mean(library, ('torchvision', 'timm'))}"
    )


def _torchvision(network: str) -> Callable[[int], nn.Module]:
    import torchvision

    names = torchvision.models.list_models(module=torchvision.models)
    if network not in names:
        raise ConfigError(
            f"torchvision has no classifier '{network}'{did_you_mean(network, names)}"
        )
    # Their auxiliary classifiers give several outputs in training.
    extra = {
        "googlenet": {"aux_logits": False, "init_weights": True},
        "inception_v3": {"aux_logits": False, "init_weights": True},
    }
    return lambda num_classes: torchvision.models.get_model(
        network, weights=None, num_classes=num_classes, **extra.get(network, {})
    )


def _timm(network: str) -> Callable[[int], nn.Module]:
    try:
        import timm
    except ImportError:
        raise MissingExtra(
            f"timm:{network} needs timm, which is not installed: pip install 'fastokd[timm]'"
        ) from None
    if not timm.is_model(network):
        names = timm.list_models()
        close = difflib.get_close_matches(network, names, n=1)
        hint = f"; did you mean '{close[0]}'?" if close else ";"
        raise ConfigError(
            f"timm has no network '{network}'{hint} timm.list_models() lists all {len(names)}"
        )
    return lambda num_classes: timm.create_model(network, pretrained=False, num_classes=num_classes)
