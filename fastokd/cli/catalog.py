"""Commands that list methods and recipes, draw graphs, and report the environment."""

import dataclasses
import json as json_format
from typing import Literal

import tyro
from rich.table import Column, Table

from fastokd.cli.options import print_table
from fastokd.doctor import examine
from fastokd.train.config import OptionValue, TrainConfig
from fastokd.train.loss import build_loss, check_method
from fastokd.train.rules import check_rules, teacher_rules


def show(
    method: tyro.conf.Positional[str],
    branches: int | None = None,
    preset: str = "paper",
    format: Literal["text", "mermaid", "svg"] = "text",
    method_options: dict[str, OptionValue] = {},  # noqa: B006 - never changed
    teacher: bool = False,
    teacher_to: Literal["student", "branches"] = "student",
    teacher_weight: float = 1.0,
    teacher_temperature: float = 3.0,
) -> None:
    """Draw the distillation graph of a method with its effective coefficients.

    Args:
        method: Method, e.g. ahbf
        teacher: Add the row of a frozen teacher
        format: Text, a Mermaid flowchart, or an SVG drawing
    """
    from fastokd.experiments.analysis.graph_svg import draw_svg
    from fastokd.graph import draw_mermaid
    from fastokd.methods import get_method

    needs_teacher = get_method(method).needs_teacher and not method_options.get("teacher")
    config = TrainConfig(
        method=method,
        preset=preset,
        branches=branches,
        method_options=method_options,
        teacher="any" if teacher or needs_teacher else None,
        teacher_to=teacher_to,
        teacher_weight=teacher_weight,
        teacher_temperature=teacher_temperature,
    )
    check_method(config)
    check_rules(teacher_rules(config))
    loss = build_loss(config)
    if format == "text":
        print(loss.draw())
    else:
        print({"mermaid": draw_mermaid, "svg": draw_svg}[format](loss.graph))


def methods() -> None:
    """List the methods and their numbers of branches."""
    from fastokd.methods import get_method, list_methods

    first = Column("method", no_wrap=True)
    table = Table(first, "branches", "networks", "presets", "summary", box=None, pad_edge=False)
    for name in list_methods():
        method = get_method(name)
        low, high = method.branch_range
        count = f"{low} to {high} ({method.default_branches})" if high > low else f"{low}"
        networks, presets = " or ".join(method.topologies), ", ".join(method.loss_class.presets)
        table.add_row(name, count, networks, presets, method.summary)
    print_table(table)
    print("train with one: fastokd train --method NAME; see its graph: fastokd show NAME")


def recipes(name: tyro.conf.Positional[str | None] = None) -> None:
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
    for heading, _, group in recipe_groups():
        selected = {key: recipe for key, recipe in group.items() if part in key}
        if selected:
            first = Column("recipe", no_wrap=True)
            table = Table(first, "error, %, published", box=None, pad_edge=False)
            for key, recipe in selected.items():
                table.add_row(key, recipe.reported())
            print(heading)
            print_table(table)
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
    marks = {"ok": "[green]ok[/]", "absent": "[yellow]--[/]", "problem": "[red]!![/]"}
    table = Table(box=None, show_header=False, pad_edge=False)
    for finding in findings:
        table.add_row(marks[finding.state], finding.name, finding.text.replace("[", "\\["))
    print_table(table)
    problems = sum(finding.state == "problem" for finding in findings)
    print(f"{problems} problems, marked !!" if problems else "no problems found")
