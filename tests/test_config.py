"""The metadata of the configuration and what is derived from it."""

import dataclasses
import hashlib
import subprocess
import sys

import pytest

from bench import option_page
from fastokd.data.augment import PADDINGS
from fastokd.data.files import BAD_IMAGES
from fastokd.errors import ConfigError
from fastokd.methods import list_methods
from fastokd.train.compute import student_alone
from fastokd.train.config import TEACHER, TrainConfig, fields_with_role, identity_fields, override
from fastokd.train.config_files import load_config
from fastokd.train.fields import GROUPS, Info, Role, infos
from fastokd.train.loss import reference_loss
from fastokd.train.rules import check_config

RESUME = {
    *("data", "device", "epochs", "impl", "compile", "cuda_graph", "streams", "flat"),
    *("cast_once", "keep_checkpoints", "save_minutes", "log_to", "plugin"),
}
ROLES = {
    Role.RESUME: RESUME,
    Role.REPEAT: {"seed", *RESUME} - {"epochs"},
    Role.SPEED: {
        *("batch_size", "device_batch", "image_size", "resize_schedule", "mixup", "cutmix"),
        *("loader", "loader_options", "optimizer", "ema", "precision", "channels_last", "impl"),
        *("compile", "cuda_graph", "flat", "cast_once", "sync_bn", "deterministic"),
        *("auto_augment", "auto_augment_options", "color_jitter", "random_erasing", "drop_path"),
    },
    Role.SWITCH: {*("channels_last", "compile", "cuda_graph", "streams", "flat", "cast_once")},
    Role.TRAINED: {
        *("model", "at", "method", "preset", "branches", "topology", "aux_blocks"),
        *("compression", "branch_init", "branch_views", "method_options", "teach_from", *TEACHER),
    },
    Role.OF_METHOD: {
        *("branches", "topology", "preset", "method_options", "ramp_epochs", "teach_from"),
        "branch_views",
    },
}


@pytest.mark.parametrize("role", ROLES, ids=lambda role: role.name)
def test_role_has_exactly_these_fields(role: Role) -> None:
    assert set(fields_with_role(role)) == ROLES[role]


def test_every_field_has_help_and_a_group() -> None:
    for name, info in infos(TrainConfig).items():
        assert info.group in GROUPS, name
        assert info.help[0].isupper(), name
        assert not info.help.endswith("."), name
        assert (getattr(TrainConfig(), name) is None) == bool(info.unset), name


def test_config_choices_equal_data_package() -> None:
    assert infos(TrainConfig)["padding"].words() == PADDINGS
    assert infos(TrainConfig)["bad_images"].words() == BAD_IMAGES


@pytest.mark.parametrize(
    ("bounds", "text", "allowed", "refused"),
    [
        ({"ge": 1}, "at least 1", [1, 5], [0]),
        ({"gt": 0}, "a positive number", [1e-9], [0.0, -1.0]),
        ({"gt": 2}, "above 2", [3], [2]),
        ({"ge": 0, "lt": 1}, "in [0, 1)", [0.0, 0.5], [1.0, -0.1]),
        ({"gt": 0, "le": 1}, "in (0, 1]", [1.0], [0.0, 1.1]),
        ({"ge": 0, "lt": 2**31}, "in [0, 2147483648)", [0, 2**31 - 1], [2**31]),
    ],
    ids=str,
)
def test_bounds_are_checked_and_described(bounds, text, allowed, refused) -> None:
    info = Info("help", "data", **bounds)
    assert info.bounds() == text
    assert all(map(info.allows, allowed))
    assert not any(map(info.allows, [*refused, float("nan"), float("inf")]))


def test_check_covers_every_bounded_field() -> None:
    """Every field with bounds or choices refuses a bad value and names it."""
    for name, info in infos(TrainConfig).items():
        if info.bounds() or info.words():
            value = "no-such-word" if info.words() else float("nan")
            if isinstance(getattr(TrainConfig(), name), tuple):
                value = (value, value)
            with pytest.raises(ConfigError, match=name):
                check_config(TrainConfig(**{name: value}))


def test_override_with_another_method_resets_its_fields() -> None:
    base = TrainConfig(branches=3, preset="code", method_options={"temperature": 2.0}, lr=0.5)
    assert override(base, {"method": "dml"}) == TrainConfig(method="dml", lr=0.5)
    library = TrainConfig(model="torchvision:resnet18", at="layer4")
    assert override(library, {"model": "resnet8"}) == TrainConfig(model="resnet8")
    assert override(library, {"model": "torchvision:resnet18", "lr": 0.5}).at == "layer4"
    merged = override(base, {"method_options": {"lambda_ta": 1.0}})
    assert merged.method_options == {"temperature": 2.0, "lambda_ta": 1.0}
    assert dataclasses.replace(merged, method_options=base.method_options) == base


@pytest.mark.parametrize("method", list_methods())
def test_label_smoothing_sets_loss_option_of_every_method(method) -> None:
    assert reference_loss(TrainConfig(method=method)).graph.label_smoothing == 0
    for smoothed in ({"label_smoothing": 0.2}, {"method_options": {"label_smoothing": 0.2}}):
        assert reference_loss(TrainConfig(method=method, **smoothed)).graph.label_smoothing == 0.2


def test_label_smoothing_and_different_option_are_refused() -> None:
    option = {"label_smoothing": 0.1}
    check_config(TrainConfig(label_smoothing=0.1, method_options=option))
    with pytest.raises(ConfigError, match=r"label_smoothing=0\.2 and method_options"):
        check_config(TrainConfig(label_smoothing=0.2, method_options=option))


def test_label_smoothing_holds_for_the_student_alone() -> None:
    config = TrainConfig(label_smoothing=0.1, method_options={"label_smoothing": 0.1})
    assert student_alone(config).label_smoothing == 0.1
    check_config(student_alone(config))
    assert override(config, {"method": "dml"}).label_smoothing == 0.1


def test_retired_field_is_ignored_or_warns(recwarn) -> None:
    assert load_config("merge_first_conv: false\nlr: 0.2", "old.yaml") == TrainConfig(lr=0.2)
    assert not recwarn.list
    with pytest.warns(UserWarning, match=r"old\.yaml: merge_first_conv=True: merged first conv"):
        assert load_config("merge_first_conv: true", "old.yaml") == TrainConfig()


def test_retired_optimizer_is_named() -> None:
    config = load_config("optimizer: lamb", "old.yaml")
    with pytest.raises(ConfigError, match="unknown optimizer 'lamb'"):
        check_config(config)


def test_identity_equals_earlier_versions() -> None:
    """The hash of version 0.1.0, in whose exports it is stored."""
    pairs = repr((identity_fields(TrainConfig()), None))
    assert hashlib.sha256(pairs.encode()).hexdigest()[:12] == "1cc9ad5b0f03"


def test_documentation_tables_are_current() -> None:
    assert option_page.main(["--check"]) == 0


def test_configuration_does_not_import_torch() -> None:
    code = "import sys, fastokd.train.config; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
