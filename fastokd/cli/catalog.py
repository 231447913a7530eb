"""Commands that list methods and recipes, draw graphs, and report the environment."""

import dataclasses
import json as json_format
from typing import Any, Literal

from rich.text import Text

from fastokd.cli.options import Positional, print_table
from fastokd.doctor import examine
from fastokd.train.config import TrainConfig, build_loss, check_method


def show(
    method: Positional[str], format: Literal["text", "mermaid", "svg"] = "text", **fields: Any
) -> None:
    """Draw the distillation graph of a method with its effective coefficients.

    Args:
        method: Method, e.g. ahbf
        format: Text, a Mermaid flowchart, or an SVG drawing
    """
    from fastokd.graph import draw_mermaid, draw_svg

    config = TrainConfig(method=method, **fields)
    check_method(config)
    loss = build_loss(config)
    if format == "text":
        print(loss.draw())
    else:
        print({"mermaid": draw_mermaid, "svg": draw_svg}[format](loss.graph))


def methods() -> None:
    """List the methods and their numbers of branches."""
    from fastokd.methods import get_method, list_methods

    rows = []
    for name in list_methods():
        method = get_method(name)
        low, high = method.branch_range
        count = f"{low} to {high} ({method.default_branches})" if high > low else f"{low}"
        networks, presets = " or ".join(method.topologies), ", ".join(method.loss_class.presets)
        rows.append((name, count, networks, presets, method.summary))
    headings = ("method", "branches", "networks", "presets", "summary")
    print_table(headings, rows, texts=range(5))
    print("train with one: fastokd train --method NAME; see its graph: fastokd show NAME")


def recipes(name: Positional[str | None] = None) -> None:
    """List the published configurations with the errors that the papers report in %, or print one.

    Args:
        name: Recipe to print, with the source of every value; or a part of some names, e.g.
            cifar100-resnet32
    """
    from fastokd.experiments.recipes import get_recipe, list_recipes, recipe_groups

    part = name or ""
    if part in list_recipes() or not any(part in key for key in list_recipes()):
        print(get_recipe(part).to_yaml(), end="")
        return
    headings = ("recipe", "error, %, published")
    for title, _, group in recipe_groups():
        rows = [(key, recipe.reported()) for key, recipe in group.items() if part in key]
        if rows:
            print(title)
            print_table(headings, rows, texts=(1,))
            print()
    print("print one: fastokd recipes NAME; run it: fastokd train --recipe NAME --data FOLDER")


def doctor(json: bool = False) -> None:
    """Report the environment, with a fix for each problem. Attach it to bug reports.

    Args:
        json: Print JSON
    """
    findings = examine()
    if json:
        print(json_format.dumps([dataclasses.asdict(finding) for finding in findings], indent=2))
        return
    marks = {"ok": ("ok", "green"), "absent": ("--", "yellow"), "problem": ("!!", "red")}
    rows = [(Text(*marks[each.state]), each.name, each.text) for each in findings]
    print_table(("", "", ""), rows, texts=(1, 2))
    problems = sum(finding.state == "problem" for finding in findings)
    print(f"{problems} problems, marked !!" if problems else "no problems found")
