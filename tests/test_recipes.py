"""Every recipe is what its source says: numbers as in the papers' tables, networks of the published
size, names that fit.
"""

import dataclasses
import functools
import inspect
import json
import re
import shlex
import statistics
import sys
import types
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from bench import recipe_page
from fastokd import cli
from fastokd.cli.commands import COMMANDS, option_names
from fastokd.errors import ConfigError
from fastokd.experiments import recipes
from fastokd.experiments.recipes import DATASETS, Recipe, get_recipe, list_recipes, recipe_groups
from fastokd.experiments.recipes.recipe import by_name, given
from fastokd.models import BranchedModel, create_model, find_backbone
from fastokd.models.summary import count_parameters
from fastokd.train.build import model_layout
from fastokd.train.config import TrainConfig
from fastokd.train.config_files import read_config
from fastokd.train.rules import check_config

DATA = Path(__file__).parent / "data"
PUBLISHED: list[dict[str, Any]] = json.loads((DATA / "published.json").read_text())["tables"]
NETWORKS: dict[str, list[dict[str, Any]]] = json.loads((DATA / "networks.json").read_text())
ALL = {name: recipe for name, recipe in list_recipes().items() if not recipe.label}
"""The recipes for one dataset and network."""
DEFAULTS = {
    field.name: getattr(TrainConfig(), field.name) for field in dataclasses.fields(TrainConfig)
}


def get_group(start: str) -> dict[str, Recipe]:
    """The recipes under the heading that begins so."""
    (group,) = (group for group in recipe_groups() if group.heading.startswith(start))
    return dict(group.recipes)


# ---- numbers


def number(measure: str, values: list[float | None]) -> tuple[float | None, float | None]:
    """Mean error and standard deviation in % of an entry of published.json."""
    if measure == "runs":
        accuracies = [value for value in values if value is not None]
        return round(100 - statistics.mean(accuracies), 2), (
            round(statistics.stdev(accuracies), 2) if len(accuracies) > 1 else None
        )
    mean, std = values
    return mean if mean is None or measure == "error" else round(100 - mean, 2), std


def test_published_numbers_match_tables():
    expected = set()
    for table in PUBLISHED:
        for name, rows in table["recipes"].items():
            for row, values in rows.items():
                runs = (
                    table["runs"]
                    if table["measure"] != "runs"
                    else len(values)
                    if len(values) > 1
                    else None
                )
                expected.add((name, table["source"], row, *number(table["measure"], values), runs))
    have = [
        (name, found.source, found.row, found.error, found.std, found.runs)
        for name, recipe in ALL.items()
        for found in recipe.published
    ]
    assert len(have) == len(set(have))
    assert set(have) == expected


def test_ahbf_table_rows_have_recipes():
    counts = {table["source"]: sum(map(len, table["recipes"].values())) for table in PUBLISHED}
    assert {source: count for source, count in counts.items() if source.startswith("AHBF")} == {
        "AHBF Table 1": 35,
        "AHBF Table 2": 35,
        "AHBF Table 3": 10,
        "AHBF Table 4": 25,
        "AHBF Table 5": 12,
        "AHBF Figure 3": 6,
    }


def test_reported_text_names_every_table_row():
    assert (
        get_recipe("cifar100-resnet32-ahbf").reported()
        == "AHBF Table 2: 25.19 +- 0.16; AHBF Table 4: 25.19; AHBF Figure 3: 25.19"
    )
    assert (
        get_recipe("cifar10-wrn16-4-wrn28-2-tsb").reported()
        == "TSB, different networks: 4.42, 4.64 (branch2), 3.99 (ensemble)"
    )
    assert (
        get_recipe("cifar100-wrn20-8-one").reported()
        == "OKDDip slides: 21.19 +- 0.12 (mean of the branches)"
    )


# ---- configurations


def complete(config: TrainConfig) -> TrainConfig:
    """The configuration with what only the user can say."""
    return (
        dataclasses.replace(config, method_options={"teacher": "rows.npy"})
        if config.method == "kd"
        else config
    )


def test_recipes_are_valid_configurations():
    for recipe in ALL.values():
        check_config(complete(recipe.config))


def test_recipe_names_match_configuration():
    assert len(ALL) + 1 == sum(len(group.recipes) for group in recipe_groups())
    for name, recipe in ALL.items():
        config, parts = recipe.config, name.split("-")
        assert recipe.dataset == parts[0], name
        assert config.data == "", name
        networks = [
            part.removesuffix("_imagenet").replace("_", "-") for part in config.model_names()
        ]
        stem = "-".join([parts[0], *networks, config.method.replace("_", "-")])
        assert name == stem or name.startswith(stem + "-"), name
        assert ("peers" in parts) == (config.topology == "peers"), name
        assert ("compression" in parts) == config.compression, name
        large = recipe.dataset == "imagenet"
        for network in config.model_names():
            assert find_backbone(network, None).image_size == (224 if large else 32), name
        # ImageNet is cropped and scaled as its dataset says, small images are padded by 4 pixels.
        assert (config.pad, config.flip) == ((None, None) if large else (4, True)), name


def settings(**values: Any) -> dict[str, Any]:
    return {
        "optimizer": "sgd",
        "schedule": "step",
        "lr_scaling": "none",
        "warmup_epochs": None,
        "momentum": 0.9,
        "lr_gamma": 0.1,
        **values,
    }


# Of each paper or code: epochs, batch, learning rate, the epochs after which it decays, Nesterov,
# weight decay.
SHARED = settings(epochs=300, batch_size=128, lr=0.1, nesterov=True, weight_decay=5e-4), (150, 225)
TSB = (
    settings(epochs=240, batch_size=64, lr=0.05, nesterov=False, weight_decay=5e-4),
    (150, 180, 210),
)
TSB_IMAGENET = (
    settings(epochs=200, batch_size=256, lr=0.1, nesterov=False, weight_decay=1e-4),
    (60, 120, 180),
)
AHBF_IMAGENET = (
    settings(epochs=90, batch_size=96, lr=0.1, nesterov=True, weight_decay=1e-4),
    (30, 60),
)
OPTIMIZERS = {
    "cifar100-resnet32-ahbf": SHARED,
    "cifar10-densenet40-12-okddip": SHARED,
    "cinic10-resnet32-ffm": SHARED,
    "cifar100-resnet32-ahbf-a-0": SHARED,
    "cifar100-mobilenetv2-x0-5-ahbf-compression": SHARED,
    "cifar100-wrn20-8-dml": SHARED,
    "imagenet-resnet34-ahbf": AHBF_IMAGENET,
    "cifar10-resnet32-tsb": TSB,
    "cifar100-wrn16-2-wrn16-4-kdcl": TSB,
    "cifar100-resnet32-wrn16-2-kdcl-general": TSB,
    "cifar10-vgg13-baseline-tsb": TSB,
    "cifar100-mobilenetv2-x0-5-tsb": ({**TSB[0], "lr": 0.01}, TSB[1]),
    "imagenet-resnet18-tsb": TSB_IMAGENET,
    "imagenet-resnet50-resnet18-kdcl-naive": TSB_IMAGENET,
    "imagenet-mobilenetv2-x1-0-tsb": ({**TSB_IMAGENET[0], "epochs": 300}, (90, 180, 270)),
    "imagenet-resnet50-resnet18-kdcl-linear-100-epochs": (
        {**TSB_IMAGENET[0], "epochs": 100},
        (30, 60, 90),
    ),
    "cifar100-resnet32-one-official": (
        settings(epochs=300, batch_size=128, lr=0.1, nesterov=False, weight_decay=1e-4),
        (150, 225),
    ),
    "cifar100-resnet32-ffsd-official": (
        settings(
            epochs=299, batch_size=128, lr=0.1, nesterov=True, weight_decay=1e-4, padding="reflect"
        ),
        (150, 225),
    ),
    "imagenet-resnet18-ffsd-official": (
        settings(
            epochs=89, batch_size=256, lr=0.1, nesterov=True, weight_decay=1e-4, warmup_epochs=5.0
        ),
        (30, 60, 80),
    ),
    "cifar100-wrn16-2-afid-official": (
        settings(epochs=301, batch_size=128, lr=0.1, nesterov=True, weight_decay=2e-4),
        (150, 225),
    ),
    "imagenet-resnet34-afid-official": (
        settings(epochs=100, batch_size=256, lr=0.1, nesterov=False, weight_decay=1e-4),
        (30, 60, 90),
    ),
}


@pytest.mark.parametrize(
    ("heading", "expected"),
    [
        ("CIFAR-10, CIFAR-100", SHARED),
        ("AHBF's ablations", SHARED),
        ("ImageNet in AHBF", AHBF_IMAGENET),
    ],
)
def test_recipes_of_one_paper_share_its_optimizer_settings(
    heading: str, expected: tuple[dict[str, Any], tuple[int, ...]]
):
    for name, recipe in get_group(heading).items():
        if not name.endswith("-large"):
            check_optimizer(recipe.config, expected)


def test_recipes_in_tsb_settings_share_them():
    for recipe in get_group("TSB's tables").values():
        config = recipe.config
        if recipe.dataset == "imagenet":
            common = {key: value for key, value in TSB_IMAGENET[0].items() if key != "epochs"}
            check_optimizer(
                config, (common, tuple(round(part * config.epochs) for part in (0.3, 0.6, 0.9)))
            )
            long = config.model.startswith("mobilenetv2_x1_0")
            assert config.epochs == (
                100 if recipe.variant.endswith("100-epochs") else 300 if long else 200
            )
        else:
            check_optimizer(
                config, ({**TSB[0], "lr": 0.01 if "mobilenetv2" in config.model else 0.05}, TSB[1])
            )


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_settings_match_papers(name: str):
    check_optimizer(get_recipe(name).config, OPTIMIZERS[name])


def check_optimizer(
    config: TrainConfig, expectation: tuple[dict[str, Any], tuple[int, ...]]
) -> None:
    """The settings, and the learning rate just before and after each decay."""
    expected, decays = expectation
    assert {key: getattr(config, key) for key in expected} == expected
    assert len(config.lr_decay_at) == len(decays)
    for count, epoch in enumerate(decays):
        assert config.lr_at(epoch - 1e-3) == pytest.approx(expected["lr"] * 0.1**count)
        assert config.lr_at(epoch) == pytest.approx(expected["lr"] * 0.1 ** (count + 1))


# Branches, ramp-up in epochs and loss options of the methods.
LOSSES = {
    "cifar10-resnet110-ahbf": (
        4,
        300,
        {
            "temperature": 3.0,
            "lambda_ta": 4.0,
            "lambda_branch": 2.0,
            "lambda_self": 0.0,
            "teacher_eps": 0.0,
            "detach_teacher": False,
        },
    ),
    "imagenet-resnet18-ahbf": (4, 90, {"lambda_ta": 4.0, "lambda_branch": 2.0}),
    "cifar100-resnet32-okddip": (
        4,
        80,
        {
            "temperature": 3.0,
            "lambda_peer": 1.0,
            "lambda_leader": 1.0,
            "teacher_eps": 1e-7,
            "detach_teacher": False,
        },
    ),
    "cifar100-resnet32-one": (
        4,
        80,
        {"temperature": 3.0, "lambda_kd": 1.0, "teacher_eps": 1e-7, "detach_teacher": False},
    ),
    "cifar100-resnet32-one-official": (
        3,
        80,
        {"temperature": 3.0, "lambda_kd": 1.0, "teacher_eps": 1e-7, "detach_teacher": True},
    ),
    "cifar100-resnet32-cl-ilr": (
        4,
        80,
        {"temperature": 3.0, "lambda_kd": 1.0, "teacher_eps": 1e-7, "detach_teacher": False},
    ),
    "cifar100-resnet32-dml": (
        4,
        0,
        {"temperature": 3.0, "teacher": "mean", "teacher_eps": 1e-7, "detach_teacher": False},
    ),
    "cifar100-resnet32-dml-tsb": (2, 0, {"temperature": 1.0, "teacher_eps": 0.0}),
    "cifar100-resnet32-kd": (1, 0, {"temperature": 3.0, "lambda_kd": 1.0, "teacher_eps": 1e-7}),
    "cifar100-resnet32-ffm": (
        4,
        80,
        {"temperature": 3.0, "lambda_peer": 1.0, "lambda_leader": 2.0, "lambda_cd": 5e-8},
    ),
    "cifar100-resnet32-ffm-no-cd": (
        4,
        80,
        {"lambda_peer": 1.0, "lambda_leader": 2.0, "lambda_cd": 0.0},
    ),
    "cifar100-resnet32-tsb": (
        2,
        20,
        {"temperature": 4.0, "beta": 0.8, "lambda_ta": 0.5, "lambda_si": 0.5},
    ),
    "cifar100-resnet32-wrn16-2-kdcl-general": (2, 0, {"variant": "general", "icl": True}),
    "cifar100-resnet32-wrn16-2-kdcl-naive-no-icl": (2, 0, {"variant": "naive", "icl": False}),
    "cifar100-resnet32-ffsd-official": (
        3,
        5,
        {
            "temperature": 2.0,
            "lambda_diversity": 1e-5,
            "lambda_fusion": 10.0,
            "lambda_decoder": 1000.0,
        },
    ),
    "cifar100-resnet32-ffsd": (4, 5, {"temperature": 2.0}),
    "cifar100-wrn16-2-afid-official": (
        2,
        80,
        {"temperature": 3.0, "lambda_kd": 1.0, "teacher_eps": 1e-7, "fusion_weight_decay": 1e-5},
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_loss_settings_match_papers(name: str):
    config, (branches, ramp, expected) = complete(get_recipe(name).config), LOSSES[name]
    check = {**options(config), **config.model_options()}
    assert config.num_branches() == branches
    assert config.ramp_length() == ramp
    assert {key: check[key] for key in expected} == expected


def test_ramp_up_lengths_follow_epochs():
    """A shortened run has as large a part of its epochs to ramp up in, where the recipe's own
    length is the method's default.
    """
    for name, ramp in (
        ("cifar100-resnet32-ahbf", 30),
        ("cifar100-resnet32-okddip", 8),
        ("cifar100-resnet32-tsb", 2),
        ("cifar100-resnet32-ahbf-e-80", 80),
    ):
        assert dataclasses.replace(get_recipe(name).config, epochs=30).ramp_length() == ramp, name


def options(config: TrainConfig) -> dict[str, Any]:
    """The loss's options, its defaults filled in."""
    from fastokd.methods import get_method

    defaults = {
        name: value.default
        for name, value in inspect.signature(
            get_method(config.method).loss_class
        ).parameters.items()
    }
    return {**defaults, **config.loss_options()}


def test_ahbf_ablations_vary_one_setting():
    base, seen = get_recipe("cifar100-resnet32-ahbf").config, {}
    for name, recipe in get_group("AHBF's ablations").items():
        changed = {
            key: getattr(recipe.config, key)
            for key in DEFAULTS
            if getattr(recipe.config, key) != getattr(base, key)
        }
        seen[name.removeprefix("cifar100-resnet32-ahbf-")] = changed
    expected = {
        f"lambda-{one}-{two}": {"method_options": {"lambda_ta": one, "lambda_branch": two}}
        for one in range(5)
        for two in range(5)
        if (one, two) != (4, 2)
    }
    expected |= {f"a-{a}": {"aux_blocks": a} for a in (0, 1, 2, 3, 5)}
    expected |= {f"m-{m}": {"branches": m} for m in (2, 3, 5, 6)}
    expected |= {"e-80": {"ramp_epochs": 80}, "compression": {"aux_blocks": 2, "compression": True}}
    expected |= {
        "cifar100-mobilenetv2-x0-5-ahbf-compression": {
            "model": "mobilenetv2_x0_5",
            "aux_blocks": 1,
            "compression": True,
        }
    }
    assert seen == expected


def test_large_scale_settings_are_equal_for_both_methods():
    for network in ("resnet18", "resnet34", "resnet50"):
        alone, ahbf = (
            get_recipe(f"imagenet-{network}-{method}-large") for method in ("baseline", "ahbf")
        )
        assert not alone.published
        assert not ahbf.published
        differ = {
            key for key in DEFAULTS if getattr(alone.config, key) != getattr(ahbf.config, key)
        }
        assert differ <= {"method", "branches", "aux_blocks"}
        config = ahbf.config
        assert (config.batch_size, config.loader, config.epochs, config.weight_decay) == (
            1024,
            "dali",
            90,
            1e-4,
        )
        assert "label_smoothing" not in config.method_options
        assert config.lr_at(5) == pytest.approx(0.4)  # 0.1 for 256 images
        assert config.lr_at(2.5) == pytest.approx(0.2)
        assert config.lr_at(47.5) == pytest.approx(0.2)
        assert config.lr_at(90) == pytest.approx(0.0)


# ---- networks


NO_INITIALIZATION = patch.multiple(
    torch.nn.init,
    **dict.fromkeys(
        ("kaiming_normal_", "kaiming_uniform_", "normal_", "uniform_", "ones_", "zeros_"),
        lambda tensor, *_, **__: tensor,
    ),
)
"""On the meta device, random numbers without values take most of the time."""


@functools.cache
def _network(model: str, num_classes: int, layout: tuple[tuple[str, Any], ...]) -> BranchedModel:
    values = {name: dict(value) if name == "options" else value for name, value in layout}
    teacher = torch.nn.Identity() if values["method"] == "kd" else None
    with torch.device("meta"), NO_INITIALIZATION:
        return create_model(model, num_classes=num_classes, teacher=teacher, **values)


def network(recipe: Recipe) -> BranchedModel:
    """The recipe's network without memory for its weights."""
    layout = model_layout(complete(recipe.config))
    key = tuple(
        (name, tuple(value.items()) if name == "options" else value)
        for name, value in layout.items()
    )
    return _network(recipe.config.model, DATASETS[recipe.dataset].num_classes, key)


SIZES = {(row["name"], row["num_classes"]): row for row in NETWORKS["parameters"]}
COMPRESSED = {
    (row["name"], row["num_classes"], row["aux_blocks"]): row for row in NETWORKS["compression"]
}
EQUAL = {(row["name"], row["num_classes"]): row["four_equal_branches"] for row in NETWORKS["equal"]}


@pytest.mark.parametrize("method", ["baseline", "ahbf"])
def test_modern_recipes_note_the_sources_evaluation(method: str):
    timm, models = pytest.importorskip("timm"), pytest.importorskip("torchvision.models")
    ratio = timm.get_pretrained_cfg("resnet18.a3_in1k").test_crop_pct
    scaled = {
        "resnet50-{}-modern": models.ResNet50_Weights.IMAGENET1K_V2.transforms().resize_size[0],
        "resnet18-{}-a3": int(224 / ratio),
    }
    for name, side in scaled.items():
        notes = " ".join(get_recipe(f"imagenet-{name.format(method)}").notes)
        assert f"evaluation images to {side} before the crop of 224" in notes
        assert ("with branches neither published" in notes) is (method == "ahbf")


def test_networks_exist_and_have_the_published_size():
    students, ahbf, compressed, equal = 0, 0, 0, 0
    for name, recipe in ALL.items():
        config, model = recipe.config, network(recipe)
        assert len(model.branches) == config.num_branches(), name
        key = (
            config.model_names()[model.kept if "," in config.model else 0],
            DATASETS[recipe.dataset].num_classes,
        )
        if key in SIZES and config.method != "afid":  # whose student is two networks
            assert count_parameters(model.student()) == SIZES[key]["single"], name
            students += 1
        if config.compression:
            row = COMPRESSED[(*key, config.aux_blocks)]
            assert count_parameters(model) == row["total"], name
            assert [count_parameters(model.student(branch)) for branch in range(4)] == row[
                "single"
            ], name
            compressed += 1
        elif (
            key in SIZES
            and config.method == "ahbf"
            and (config.num_branches(), config.aux_blocks) == (4, SIZES[key]["aux_blocks"])
        ):
            assert count_parameters(model) == SIZES[key]["total"], name
            ahbf += 1
        elif (
            EQUAL.get(key) is not None
            and config.method in ("independent", "cl_ilr")
            and config.topology != "peers"
        ):
            assert count_parameters(model) == EQUAL[key], name
            equal += 1
    # So that no condition above leaves everything out.
    assert students > 150
    assert ahbf >= 5 + 5 + 2 * 3 + 24 + 1
    assert compressed == 2
    assert equal >= 4


# ---- what a person sees


def test_recipe_fields_have_source_or_default():
    for name, recipe in ALL.items():
        assert all(sourced.source for sourced in recipe.settings.values()), name
        plain = {
            key: value
            for key, value in dataclasses.asdict(recipe.config).items()
            if value != DEFAULTS[key]
        }
        assert set(plain) <= set(recipe.settings), name


@pytest.mark.parametrize(
    "name",
    [
        "cifar100-resnet32-ahbf-lambda-2-0",
        "imagenet-resnet50-ahbf-large",
        "cifar100-resnet32-wrn16-2-kdcl-general",
        "cifar100-resnet32-ffsd-official",
    ],
)
def test_printed_recipe_is_trainable_config_file(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert cli.main(["recipes", name]) == 0
    text = capsys.readouterr().out
    (tmp_path / "config.yaml").write_text(text)
    recipe = get_recipe(name)
    assert read_config(tmp_path / "config.yaml") == recipe.config
    for field, (_, source) in recipe.settings.items():
        assert any(
            line.startswith(f"{field}:") and line.endswith(f"  # {source}")
            for line in text.splitlines()
        ), field
    for line in (*recipe.notes, *(found.source for found in recipe.published)):
        assert line in text


def test_recipes_are_listed_in_groups(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["recipes"]) == 0
    text = capsys.readouterr().out
    for heading, _, group in recipe_groups():
        assert heading in text
        assert set(group) <= set(text.split())
    assert cli.main(["recipes", "cifar10-vgg13"]) == 0
    listed = {word for word in capsys.readouterr().out.split() if word in ALL}
    assert listed == {name for name in ALL if "cifar10-vgg13" in name}


def test_unknown_recipe_suggests_closest_name():
    with pytest.raises(
        ConfigError,
        match=r"unknown recipe 'cifar10-resnet32-abhf'; did you mean 'cifar10-resnet32-ahbf'\?",
    ) as caught:
        get_recipe("cifar10-resnet32-abhf")
    assert len(str(caught.value)) < 200  # not the names of all


def test_recipe_fields_can_be_overridden():
    names = {f"--{name.replace('_', '-')}" for name in DEFAULTS}
    assert names <= set(option_names(COMMANDS["train"].load([])))


def test_overridden_option_keeps_other_recipe_options(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run = tmp_path / "run"
    code = cli.main(
        [
            "train",
            "--recipe",
            "cifar100-resnet32-one",
            "--method-options",
            "temperature=4",
            "--model",
            "resnet8",
            "--data",
            "digits",
            "--epochs",
            "1",
            "--branches",
            "2",
            "--batch-size",
            "256",
            "--device",
            "cpu",
            "--out",
            str(run),
            "--quiet",
        ]
    )
    assert code == 0, capsys.readouterr().err
    config = read_config(run / "config.yaml")
    assert config.method_options == {"detach_teacher": False, "temperature": 4}
    assert (config.method, config.preset, config.weight_decay, config.branches) == (
        "one",
        "code",
        5e-4,
        2,
    )


# ---- the page


def test_recipe_page_is_current(capsys: pytest.CaptureFixture[str]):
    code = recipe_page.main(["--check"])
    assert code == 0, capsys.readouterr().err


def test_stale_page_is_reported_and_updated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    good = recipe_page.PAGE.read_text(encoding="utf-8")
    copy = tmp_path / "recipes.md"
    monkeypatch.setattr(recipe_page, "PAGE", copy)
    copy.write_text(good.replace("25.19 +- 0.16", "24.19 +- 0.16"), encoding="utf-8")
    assert copy.read_text(encoding="utf-8") != good
    assert recipe_page.main(["--check"]) == 1
    assert "is stale" in capsys.readouterr().err
    assert recipe_page.main([]) == 0
    assert copy.read_text(encoding="utf-8") == good


def test_page_commands_and_snippets_run(capsys: pytest.CaptureFixture[str]):
    text = recipe_page.PAGE.read_text(encoding="utf-8").partition(recipe_page.START)[0]
    commands, snippet = re.findall(r"```(?:python)?\n(.*?)```", text, re.DOTALL)
    lines = [shlex.split(line, comments=True) for line in commands.splitlines()]
    assert {line[1] for line in lines} == {"recipes", "train"}
    for line in lines:
        if line[1] == "recipes":
            assert cli.main(line[1:]) == 0, line
        else:
            get_recipe(line[line.index("--recipe") + 1])
    capsys.readouterr()
    exec(compile(snippet, str(recipe_page.PAGE), "exec"), {})
    assert capsys.readouterr().out.startswith("AHBF Table 2 25.19\n")


def test_duplicate_recipe_name_is_refused(monkeypatch: pytest.MonkeyPatch):
    twin = Recipe(dataset="cifar10", settings=given("a test", model="resnet8", method="baseline"))
    with pytest.raises(ValueError, match="two recipes are named cifar10-resnet8-baseline"):
        by_name([twin, twin])
    again = types.ModuleType("again", "Other recipes.")
    again.RECIPES = get_group("ONE, FFSD and AFID")
    monkeypatch.setitem(sys.modules, "again", again)
    recipes.register_recipes("again")
    try:
        with pytest.raises(
            ValueError, match="two recipes are named cifar100-resnet32-one-official"
        ):
            list_recipes()
    finally:
        # Private, because registered recipes cannot be removed in a public way.
        recipes._modules.remove("again")
