"""``fastokd models``."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from fastokd.cli.options import Positional, print_table, say
from fastokd.errors import ConfigError
from fastokd.methods import get_method, list_methods
from fastokd.models import (
    allowed_methods,
    create_model,
    find_backbone,
    is_library_name,
    list_models,
)
from fastokd.models.libraries import library_split_points
from fastokd.models.summary import check_images, model_costs
from fastokd.train.build import model_layout
from fastokd.train.config import TrainConfig


def models(name: Positional[str | None] = None, num_classes: int = 10, **fields: Any) -> None:
    """List the networks with their costs, or print one in detail, branch by branch.

    Args:
        name: Network to print in detail: a listed one, torchvision:NAME or timm:NAME; peers may
            differ: resnet20,resnet32
        num_classes: Number of classes
    """
    config = TrainConfig(**fields)
    if config.image_size is not None and config.image_size < 1:
        raise ConfigError(f"image_size={config.image_size}: it must be at least 1")
    if name is None:
        _print_networks(list_models(), config, num_classes)
        return
    peers = (config.topology or get_method(config.method).topologies[0]) == "peers"
    if is_library_name(name) and "," not in name and config.at is None and not peers:
        points = ", ".join(library_split_points(name)) or "no place"
        say(f"{name} can be split at: {points}")
        say(
            f"its costs: fastokd models {name} --at PLACE; train it: fastokd train --model"
            f" {name} --at PLACE --data FOLDER"
        )
        return
    _print_network(name, config, num_classes, peers)


def _costs(name: str, config: TrainConfig, num_classes: int) -> tuple[dict[str, Any], int]:
    """The costs of a training network and its parts, without allocating weights, and the image
    size.
    """
    config = dataclasses.replace(config, model=name)
    with torch.device("meta"):
        model = create_model(name, num_classes=num_classes, **model_layout(config))
    made_for = max(find_backbone(part, config.at).image_size for part in model.names)
    if config.image_size is not None:
        check_images(model, (config.image_size, config.image_size), made_for)
    size = config.image_size or made_for
    return model_costs(model, size), size


def _print_networks(names: Sequence[str], config: TrainConfig, num_classes: int) -> None:
    rows = []
    for name in names:
        costs, size = _costs(name, config, num_classes)
        cells = [
            text
            for part in (costs["student"], costs["training"])
            for text in (f"{part.parameters / 1e6:.2f}", f"{part.flops / 1e6:.0f}")
        ]
        allowed = allowed_methods(name)
        methods = "all" if allowed == list_methods() else ", ".join(allowed)
        rows.append((name, str(size), *cells, methods))
    costs_of = ("million\nparams", "\nMFLOPs", f"{config.method}:\nparams", "\nMFLOPs")
    print_table(("network", "pixels", *costs_of, "methods"), rows, texts=(6,), wide=True)
    say(
        f"student and training network for {num_classes} classes; FLOPs of one image forward, 2 per"
        " multiply-add; one in detail: fastokd models NAME; all methods:"
        f" {', '.join(list_methods())}"
    )
    say(
        "any classifier of torchvision or timm: torchvision:NAME or timm:NAME with --at PLACE;"
        " fastokd models torchvision:resnet18 lists the places"
    )


def _print_network(name: str, config: TrainConfig, num_classes: int, peers: bool) -> None:
    costs, size = _costs(name, config, num_classes)
    titles = {"student": "student, alone", "training": "training network"}
    rows = [
        (
            titles.get(part, f"{part}, a peer" if peers else f"{part}, with the trunk"),
            f"{cost.parameters:,}",
            f"{cost.flops / 1e6:,.2f}",
        )
        for part, cost in costs.items()
    ]
    print_table((f"{name}, {config.method}", "parameters", "MFLOPs"), rows, wide=True)
    networks = [part.strip() for part in name.split(",")]
    allowed = [each for each in list_methods() if all(each in allowed_methods(n) for n in networks)]
    say(f"{num_classes} classes, images of {size} x {size}; methods: {', '.join(allowed)}")
