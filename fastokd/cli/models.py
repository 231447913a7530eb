"""``fastokd models``."""

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import tyro

from fastokd import plugins
from fastokd.cli.options import make_table, print_table
from fastokd.errors import ConfigError
from fastokd.methods import get_method, list_methods
from fastokd.models import (
    allowed_methods,
    create_model,
    find_backbone,
    is_library_name,
    list_models,
)
from fastokd.models.libraries import library_split_points, recommended_split_point, trunk_share
from fastokd.models.summary import check_images, model_costs
from fastokd.train.config import TrainConfig


def models(
    name: tyro.conf.Positional[str | None] = None,
    method: str = "ahbf",
    branches: int | None = None,
    aux_blocks: int = 4,
    at: str | None = None,
    topology: str | None = None,
    compression: bool = False,
    num_classes: int = 10,
    image_size: int | None = None,
) -> None:
    """List the networks with their costs, or print one in detail, branch by branch.

    Args:
        name: Network to print in detail: a listed one, torchvision:NAME, timm:NAME or MODULE:NAME;
            peers may differ: resnet20,resnet32
        method: Method whose training network is counted
        at: First module that is separate for each branch (torchvision, timm and custom networks);
            without it all split points are listed with their costs
        compression: Make the deepest branch the student; each branch before it has --aux-blocks
            fewer blocks
        num_classes: Number of classes
        image_size: Height and width in pixels (default: those that the network is made for)
    """
    if image_size is not None and image_size < 1:
        raise ConfigError(f"image_size={image_size}: it must be at least 1")
    layout = {
        "method": method,
        "num_classes": num_classes,
        "num_branches": branches,
        "aux_blocks": aux_blocks,
        "topology": topology,
        "compression": compression,
    }
    if name is None:
        _print_networks(list_models(), layout, image_size)
        return
    peers = "peers" in (topology, get_method(method).topologies[0])
    if is_library_name(name) and "," not in name and at is None and not peers:
        _print_split_points(name, layout, image_size)
        return
    _print_network(name, {**layout, "at": at}, image_size)


def _print_split_points(name: str, layout: Mapping[str, Any], image_size: int | None) -> None:
    """A line for each split point: the trunk's share and the costs of the training network."""
    recommended = recommended_split_point(name)
    table = make_table("split point", "trunk, %\nof FLOPs", "training\nmillion params")
    table.add_column("training\nMFLOPs", justify="right")
    table.add_column("relative to\nthe student", justify="right")
    size, reason = image_size, ""
    for point in library_split_points(name):
        cells = ["-", "-", "-"]
        try:
            costs, size = _costs(name, {**layout, "at": point}, image_size)
            training, student = costs["training"], costs["student"]
            cells = [
                f"{training.parameters / 1e6:.2f}",
                f"{training.flops / 1e6:,.0f}",
                f"{training.flops / student.flops:.2f} x",
            ]
        except ConfigError as error:  # such as a part without a block to repeat
            reason = str(error)
        mark = " (recommended)" if point == recommended else ""
        table.add_row(f"{point}{mark}", f"{100 * trunk_share(name, point):.0f}", *cells)
    print_table(table, wrap=False)
    if reason:
        print(f"-: {reason}")
    if recommended is None:
        print(f"{name} has no split point; use --method dml, whose peers are whole networks")
        return
    branches = layout["num_branches"] or get_method(layout["method"]).default_branches
    deeper = f" with up to {layout['aux_blocks'] * (branches - 1)} additional blocks"
    hierarchical = get_method(layout["method"]).hierarchical and layout["aux_blocks"]
    print(
        f"{layout['method']}, {branches} branches{deeper if hierarchical else ''}, images of {size}"
        f" x {size}; a later point shares more and usually trains faster, an earlier one gives each"
        " branch more layers (docs/bring-your-own.md)"
    )
    plugin = "".join(f" --plugin {shlex.quote(text)}" for text in plugins.origins([name]))
    print(f"train it: fastokd train --model {name}{plugin}{_changed(layout)} --data FOLDER")
    print("another point: add --at POINT; cheaper: fewer --branches or --aux-blocks")


def _changed(layout: Mapping[str, Any]) -> str:
    """The options of ``fastokd train`` for a layout that differs from the defaults."""
    defaults = TrainConfig()
    names = {"num_branches": "branches"}
    values = {names.get(name, name): value for name, value in layout.items()}
    return "".join(
        f" --{name.replace('_', '-')} {value}"
        for name, value in values.items()
        if name != "num_classes" and value != getattr(defaults, name)
    )


def _costs(
    name: str, layout: Mapping[str, Any], image_size: int | None
) -> tuple[dict[str, Any], int]:
    """The costs of networks with these keywords of ``create_model``, and their image size. No
    weights are allocated.
    """
    with torch.device("meta"):
        model = create_model(name, **layout)
    made_for = max(find_backbone(part, layout.get("at")).image_size for part in model.names)
    if image_size is not None:
        check_images(model, (image_size, image_size), made_for)
    size = image_size or made_for
    return model_costs(model, size), size


def _print_networks(
    names: Sequence[str], layout: Mapping[str, Any], image_size: int | None
) -> None:
    costs_of = ("million\nparams", "\nMFLOPs", f"{layout['method']}:\nparams", "\nMFLOPs")
    table = make_table("network", "pixels", *costs_of)
    table.add_column("methods")
    for column in table.columns:
        column.no_wrap, column.vertical = True, "bottom"
    for name in names:
        costs, size = _costs(name, layout, image_size)
        cells = [
            text
            for part in ("student", "training")
            for text in (f"{costs[part].parameters / 1e6:.2f}", f"{costs[part].flops / 1e6:.0f}")
        ]
        allowed = allowed_methods(name)
        methods = "all" if allowed == list_methods() else ", ".join(allowed)
        table.add_row(name, str(size), *cells, methods)
    print_table(table, wrap=False)
    print(
        f"student and training network for {layout['num_classes']} classes; FLOPs of one image"
        " forward, 2 per multiply-add; one in detail: fastokd models NAME; all methods:"
        f" {', '.join(list_methods())}"
    )
    print(
        "any classifier of torchvision or timm: torchvision:NAME or timm:NAME; fastokd models"
        " torchvision:resnet18 lists its split points for --at"
    )


def _print_network(name: str, layout: Mapping[str, Any], image_size: int | None) -> None:
    costs, size = _costs(name, layout, image_size)
    peers = (layout["topology"] or get_method(layout["method"]).topologies[0]) == "peers"
    table = make_table(f"{name}, {layout['method']}", "parameters", "MFLOPs")
    titles = {"student": "student, alone", "training": "training network"}
    for part, cost in costs.items():
        title = titles.get(part, f"{part}, a peer" if peers else f"{part}, with the trunk")
        table.add_row(title, f"{cost.parameters:,}", f"{cost.flops / 1e6:,.2f}")
    print_table(table, wrap=False)
    allowed = [
        method
        for method in list_methods()
        if all(method in allowed_methods(part.strip()) for part in name.split(","))
    ]
    print(
        f"{layout['num_classes']} classes, images of {size} x {size}; methods: {', '.join(allowed)}"
    )
