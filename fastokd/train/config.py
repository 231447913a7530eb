"""What a training run is made of: one frozen dataclass for the command line, recipes, YAML files
and checkpoints.
"""

import dataclasses
import inspect
import math
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml

from fastokd.data import list_loaders
from fastokd.data.augment import PADDINGS
from fastokd.data.files import BAD_IMAGES
from fastokd.errors import ConfigError, did_you_mean, first_line
from fastokd.methods import get_method
from fastokd.methods.method import MethodLoss, OptionValue
from fastokd.models import check_layout, companion_builder, find_backbone
from fastokd.ops import check_impl
from fastokd.train.schedules import learning_rate


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run.

    Attributes:
        data: the dataset: a folder, or a name such as "digits" or "cifar10:FOLDER".
        model: the network's name, e.g. "resnet32", or "torchvision:NAME" or "timm:NAME"; peers may
            differ: "resnet20,resnet32".
        at: for networks of torchvision and timm, the first module that every branch has for itself,
            e.g. "layer3".
        method: the method's name, e.g. "ahbf".
        preset: the method's bundle of loss options, "paper" or "code".
        branches: number of branches M; None for the method's default, or as many as ``model``
            names.
        topology: "branches" (one shared trunk) or "peers" (whole networks); None for the method's
            default.
        aux_blocks: auxiliary blocks each hierarchy level adds to its branch (the paper's a).
        compression: the student is the deepest branch, and each before it has ``aux_blocks`` blocks
            fewer.
        merge_first_conv: run the branches' first convolutions as one, see
            ``BranchedModel.merged_first_conv``.
        method_options: options of the method's loss and of its modules that override the preset's,
            e.g. {"temperature": 4.0}.
        epochs: passes over the training images.
        batch_size: images per step, over all processes.
        device_batch: images that a process takes at once; the gradients of its share of the batch
            are added up over as many forward passes as that takes. None for the whole share.
        optimizer: "sgd", "adamw" or "lamb".
        lr: the learning rate, for ``lr_scaling`` "none" that of the steps after warm-up.
        lr_scaling: how the learning rate follows the batch size: "none", or "linear" or "sqrt" in
            ``batch_size / lr_batch_size``.
        lr_batch_size: the batch size that ``lr`` is meant for; used with ``lr_scaling`` alone.
        schedule: of the learning rate: "step", "cosine" or "onecycle".
        lr_decay_at: of "step": fractions of the epochs after which the learning rate is multiplied
            by ``lr_gamma``.
        lr_gamma: see ``lr_decay_at``.
        lr_final: of "cosine" and "onecycle": the fraction of the learning rate at the end.
        warmup_epochs: epochs over which the learning rate rises to ``lr``; None for the schedule's
            own: none, or for "onecycle" 0.3 of the epochs.
        momentum, nesterov: of SGD.
        betas: of AdamW and LAMB.
        weight_decay: applies to every parameter, as in the papers; "adamw" and "lamb" decouple it
            from the gradient.
        clip_grad: largest norm of the gradient of all parameters together; 0 for any.
        ema: decay per step of a moving average of the student's weights, which is then what is
            evaluated and handed over as the student; 0 for none.
        ramp_epochs: length E of the ramp-up in epochs; None for the method's default.
        seed: of initialisation, order and augmentation.
        image_size: height and width in pixels; None for the dataset's own.
        val_split: fraction of the training images held out for evaluation instead of the test
            split; 0 for none.
        pad, flip, padding: random-crop padding in pixels, horizontal flip, and what is padded with
            ("zero" or "reflect"); None for the dataset's default.
        mixup, cutmix: alpha of each; 0 for none. With both, each batch draws one of them.
        resize_schedule: progressive resizing: from which 0-based epoch on training images have
            which side in pixels, e.g. {0: 128, 60: 192, 80: 224}; before the first epoch named, the
            data's own size. Evaluation keeps that size.
        loader: "resident", "dali", "torchvision", or "auto", which keeps small images decoded and
            streams others.
        loader_options: what can be tuned of a loader that decodes while training, e.g. {"threads":
            8}.
        bad_images: what to do about training images that cannot be decoded: "fail" or "replace".
        device: "auto", "cpu", "cuda" or "cuda:N".
        precision: "fp32", "tf32" (matrix units at float32 range and 10 bits), "bf16" or "fp16"
            (autocast; fp16 with loss scaling), or "auto": bf16 on a GPU, fp32 on a CPU.
        channels_last: keep images and weights in channels-last memory format.
        impl: the loss executor: "auto", "reference", "triton" or "cpu".
        compile: compile trunk, branches and the method's modules, each on its own; None for where
            it pays: on a GPU.
        cuda_graph: replay the whole step as one CUDA graph; None for where that can be done.
        streams: run the branches on CUDA streams of their own; None for where that can be done.
        flat: keep all parameters of a kind in one tensor, so that the optimizer is one operation;
            None for where it can be.
        sync_bn: batch norm over the images of all processes.
        deterministic: only operations that give the same bits again on the same machine.
        on_nonfinite: what to do about a loss or gradient that is not finite: "stop", "skip" the
            step, or "rollback" to the last checkpoint and go on from there with the batches that
            come next.
        keep_checkpoints: how many of the newest checkpoints are kept, beside the best.
        save_minutes: minutes after which a checkpoint is written within an epoch; 0 for only at its
            end.
        log_to: where metrics go beside the run folder: "tensorboard", "wandb".
    """

    data: str = ""
    model: str = "resnet32"
    at: str | None = None
    method: str = "ahbf"
    preset: str = "paper"
    branches: int | None = None
    topology: str | None = None
    aux_blocks: int = 4
    compression: bool = False
    merge_first_conv: bool = False
    method_options: Mapping[str, OptionValue] = field(default_factory=dict)
    epochs: int = 300
    batch_size: int = 128
    device_batch: int | None = None
    optimizer: str = "sgd"
    lr: float = 0.1
    lr_scaling: str = "none"
    lr_batch_size: int = 256
    schedule: str = "step"
    lr_decay_at: tuple[float, ...] = (0.5, 0.75)
    lr_gamma: float = 0.1
    lr_final: float = 0.0
    warmup_epochs: float | None = None
    momentum: float = 0.9
    nesterov: bool = True
    betas: tuple[float, ...] = (0.9, 0.999)
    weight_decay: float = 5e-4
    clip_grad: float = 0.0
    ema: float = 0.0
    ramp_epochs: int | None = None
    seed: int = 0
    image_size: int | None = None
    val_split: float = 0.0
    pad: int | None = None
    flip: bool | None = None
    padding: str | None = None
    mixup: float = 0.0
    cutmix: float = 0.0
    resize_schedule: Mapping[int, int] = field(default_factory=dict)
    loader: str = "auto"
    loader_options: Mapping[str, OptionValue] = field(default_factory=dict)
    bad_images: str = "fail"
    device: str = "auto"
    precision: str = "auto"
    channels_last: bool = True
    impl: str = "auto"
    compile: bool | None = None
    cuda_graph: bool | None = None
    streams: bool | None = None
    flat: bool | None = None
    sync_bn: bool = False
    deterministic: bool = False
    on_nonfinite: str = "stop"
    keep_checkpoints: int = 2
    save_minutes: float = 15.0
    log_to: tuple[str, ...] = ()

    def lr_at(self, epoch: float) -> float:
        """The learning rate at a place in the run, in epochs from its start, see
        ``schedules.py``.
        """
        return learning_rate(self, epoch)

    def size_at(self, epoch: int) -> int | None:
        """The side of the training images in a 0-based epoch; None for the data's own size."""
        begun = [start for start in self.resize_schedule if start <= epoch]
        return self.resize_schedule[max(begun)] if begun else None

    def ramp_length(self) -> int:
        """The length of the ramp-up in epochs."""
        return (
            get_method(self.method).ramp_epochs(self.epochs, self.preset)
            if self.ramp_epochs is None
            else self.ramp_epochs
        )

    def kd_weight_at(self, epoch: int) -> float:
        """The factor of the scheduled terms in a 0-based epoch."""
        return get_method(self.method).schedule(epoch, self.ramp_length())

    def model_names(self) -> list[str]:
        """The networks that ``model`` names: one, or one for each peer."""
        return [name.strip() for name in self.model.split(",")]

    def num_branches(self) -> int:
        """The number of branches, the default filled in."""
        if self.branches is not None:
            return self.branches
        names = self.model_names()
        return len(names) if len(names) > 1 else get_method(self.method).default_branches

    def loss_options(self) -> dict[str, Any]:
        """The keyword arguments of the method's loss: the preset's, then the overrides."""
        method = get_method(self.method)
        given = {
            name: value
            for name, value in self.method_options.items()
            if name not in method.model_options
        }
        return {**method.loss_class.presets[self.preset], **given, "impl": self.impl}

    def model_options(self) -> dict[str, OptionValue]:
        """The options of the method's own modules."""
        defaults = get_method(self.method).model_options
        return {name: self.method_options.get(name, default) for name, default in defaults.items()}

    def views(self) -> int:
        """How many augmented views of each training image there are: one, or one for each peer."""
        own = get_method(self.method).views({**self.model_options(), **self.loss_options()})
        return self.num_branches() if own else 1

    def to_yaml(self) -> str:
        """The configuration as YAML, every field written out."""
        plain = dataclasses.asdict(self)
        for name in ("lr_decay_at", "betas", "log_to"):
            plain[name] = list(plain[name])
        plain["method_options"] = dict(self.method_options)
        plain["resize_schedule"] = dict(self.resize_schedule)
        plain["loader_options"] = dict(self.loader_options)
        return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)


def check_method(config: TrainConfig) -> None:
    """Check the method, its layout and its options: all that its graph depends on.

    Raises:
        ConfigError: names the field, its value and the fix.
    """
    method = get_method(config.method)
    topology = check_layout(method, config.model_names(), config.topology, config.num_branches())
    for name in config.model_names():
        find_backbone(name, config.at, split=topology == "branches" and config.num_branches() > 1)
    reference_loss(config)
    companion_builder(method, config.model_options())


def reference_loss(config: TrainConfig) -> MethodLoss:
    """The loss of a configuration's method, with its preset and options, as the reference computes
    it.

    Raises:
        ConfigError: the preset or an option is unknown, or a value is out of range.
    """
    method = get_method(config.method)
    presets = method.loss_class.presets
    if config.preset not in presets:
        raise ConfigError(
            f"unknown preset '{config.preset}' of method"
            f" '{config.method}'{did_you_mean(config.preset, presets)}"
        )
    allowed = {
        name
        for name in inspect.signature(method.loss_class).parameters
        if name not in ("num_branches", "impl", "reduction")
    }
    allowed |= set(method.model_options)
    for name in config.method_options:
        if name not in allowed:
            raise ConfigError(
                f"unknown option '{name}' of method '{config.method}'{did_you_mean(name, allowed)}"
            )
    try:
        loss = method.loss_class(
            num_branches=config.num_branches(), **{**config.loss_options(), "impl": "reference"}
        )
        config.views()
    except (ValueError, TypeError) as error:
        raise ConfigError(f"method '{config.method}': {error}") from error
    return loss


def check_config(config: TrainConfig) -> None:
    """Check every value before anything is read or written.

    Raises:
        ConfigError: names the field, its value and the fix.
    """
    check_method(config)
    if get_method(config.method).needs_teacher and not config.model_options()["teacher"]:
        raise ConfigError(
            f"method '{config.method}' needs a trained teacher: pass --method-options teacher=RUN"
            " (a run folder or an exported student), teacher=torchvision:resnet50:WEIGHTS.pth,"
            " teacher=timm:NAME:WEIGHTS.safetensors, or teacher=ROWS.npy"
        )
    _check(config, "epochs", config.epochs >= 1, "at least 1")
    _check(config, "batch_size", config.batch_size >= 2, "at least 2 (batch norm needs two images)")
    _check(
        config,
        "device_batch",
        config.device_batch is None
        or (
            config.device_batch >= (1 if config.sync_bn else 2)
            and config.batch_size % config.device_batch == 0
        ),
        f"at least {1 if config.sync_bn else 2} and a divisor of batch_size={config.batch_size}",
    )
    _check(config, "aux_blocks", config.aux_blocks >= 0, "at least 0")
    _check(config, "lr", math.isfinite(config.lr) and config.lr > 0, "a positive number")
    _check(config, "lr_gamma", 0 < config.lr_gamma <= 1, "in (0, 1]")
    _check(
        config,
        "lr_decay_at",
        all(0 < value < 1 for value in config.lr_decay_at),
        "fractions of the epochs, each in (0, 1)",
    )
    _check(config, "lr_batch_size", config.lr_batch_size >= 1, "at least 1")
    _check(config, "lr_final", 0 <= config.lr_final <= 1, "in [0, 1]")
    _check(
        config,
        "warmup_epochs",
        config.warmup_epochs is None or 0 <= config.warmup_epochs < config.epochs,
        f"at least 0 and below epochs={config.epochs}",
    )
    _check(config, "momentum", 0 <= config.momentum < 1, "in [0, 1)")
    _check(
        config,
        "nesterov",
        not config.nesterov or config.momentum > 0 or config.optimizer != "sgd",
        "false when momentum is 0",
    )
    _check(
        config,
        "betas",
        len(config.betas) == 2 and all(0 <= value < 1 for value in config.betas),
        "two numbers, each in [0, 1)",
    )
    if config.on_nonfinite == "skip" and get_method(config.method).needs_index:
        raise ConfigError(
            f"on_nonfinite=skip and method '{config.method}': it remembers what was predicted in"
            " the step that is left out; use stop or rollback"
        )
    _check(
        config,
        "clip_grad",
        math.isfinite(config.clip_grad) and config.clip_grad >= 0,
        "a norm above 0, or 0 for none",
    )
    _check(config, "ema", 0 <= config.ema < 1, "a decay in (0, 1) such as 0.999, or 0 for none")
    _check(config, "keep_checkpoints", config.keep_checkpoints >= 1, "at least 1")
    _check(
        config,
        "save_minutes",
        math.isfinite(config.save_minutes) and config.save_minutes >= 0,
        "at least 0",
    )
    _check(
        config,
        "weight_decay",
        math.isfinite(config.weight_decay) and config.weight_decay >= 0,
        "at least 0",
    )
    _check(
        config, "ramp_epochs", config.ramp_epochs is None or config.ramp_epochs >= 0, "at least 0"
    )
    _check(config, "seed", 0 <= config.seed < 2**31, "at least 0 and below 2^31")
    _check(config, "image_size", config.image_size is None or config.image_size >= 4, "at least 4")
    _check(config, "val_split", 0 <= config.val_split < 1, "in [0, 1)")
    _check(config, "pad", config.pad is None or config.pad >= 0, "at least 0")
    _check(
        config,
        "padding",
        config.padding is None or config.padding in PADDINGS,
        " or ".join(PADDINGS),
    )
    for name in ("mixup", "cutmix"):
        alpha = getattr(config, name)
        _check(config, name, math.isfinite(alpha) and alpha >= 0, "an alpha above 0, or 0 for none")
        if alpha and get_method(config.method).needs_index:
            raise ConfigError(
                f"{name}={alpha:g} and method '{config.method}': it remembers what was predicted"
                " for each image, and a mixed image is two; use 0"
            )
    _check(
        config,
        "resize_schedule",
        all(0 <= epoch < config.epochs for epoch in config.resize_schedule),
        f"of epochs from 0 to {config.epochs - 1}",
    )
    _check(
        config,
        "resize_schedule",
        all(size >= 4 for size in config.resize_schedule.values()),
        "of sizes of at least 4 pixels",
    )
    for name, choices in CHOICES.items():
        value = getattr(config, name)
        for item in value if isinstance(value, tuple) else (value,):
            if item not in choices:
                raise ConfigError(f"unknown {name} '{item}'{did_you_mean(item, choices)}")
    check_impl(config.impl)
    try:
        config.data.encode()
    except UnicodeEncodeError:
        raise ConfigError(
            f"data={config.data!r}: the name is not valid UTF-8; rename the folder"
        ) from None


CHOICES: Mapping[str, Sequence[str]] = {
    "optimizer": ("sgd", "adamw", "lamb"),
    "lr_scaling": ("none", "linear", "sqrt"),
    "schedule": ("step", "cosine", "onecycle"),
    "loader": (*list_loaders(), "auto"),
    "bad_images": BAD_IMAGES,
    "precision": ("auto", "fp32", "tf32", "bf16", "fp16"),
    "on_nonfinite": ("stop", "skip", "rollback"),
    "log_to": ("tensorboard", "wandb"),
}
"""The fields that take one of some words."""


def _check(config: TrainConfig, name: str, good: bool, rule: str) -> None:
    if not good:
        raise ConfigError(f"{name}={getattr(config, name)!r}: it must be {rule}")


def config_from_mapping(values: Mapping[str, Any], where: str) -> TrainConfig:
    """A configuration from plain values, e.g. those of a YAML file; fields left out keep their
    defaults.

    Raises:
        ConfigError: an unknown field (with the closest name) or a value of the wrong type.
    """
    hints = get_type_hints(TrainConfig)
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where}: expected a mapping of fields, got {type(values).__name__}")
    cleaned: dict[str, Any] = {}
    for name, value in values.items():
        if name not in hints:
            raise ConfigError(f"{where}: unknown field '{name}'{did_you_mean(str(name), hints)}")
        cleaned[name] = _convert(name, value, hints[name], where)
    return TrainConfig(**cleaned)


def _convert(name: str, value: Any, hint: Any, where: str) -> Any:
    """A value in its field's type; integers pass as floats, and YAML's 5e-4 (a string) as the
    number it means.
    """
    kinds = get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    wrong = ConfigError(
        f"{where}: {name}={value!r} has the wrong type; expected {inspect.formatannotation(hint)}"
    )
    if value is None:
        if type(None) not in kinds:
            raise wrong
        return None
    kind = get_origin(kinds[0]) or kinds[0]
    if kind is Mapping:
        if not isinstance(value, Mapping) or not all(
            isinstance(item, each) and not (each is int and isinstance(item, bool))
            for pair in value.items()
            for item, each in zip(pair, get_args(kinds[0]), strict=True)
        ):
            raise wrong
        return dict(value)
    if kind is tuple:
        each = get_args(kinds[0])[0]
        allowed = (int, float) if each is float else each
        if not isinstance(value, (list, tuple)) or not all(
            isinstance(item, allowed) for item in value
        ):
            raise wrong
        return tuple(each(item) for item in value)
    if kind is float and not isinstance(value, bool):
        try:
            return float(value)
        except (TypeError, ValueError):
            raise wrong from None
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise wrong
    return value


def override(base: TrainConfig, given: Mapping[str, Any]) -> TrainConfig:
    """The configuration with fields given anew: options beside those it has, and another method
    with that method's own defaults.
    """
    if given.get("method", base.method) != base.method:
        # Branch counts, presets and loss options belong to the method they were written for.
        base = dataclasses.replace(
            base, branches=None, topology=None, preset="paper", method_options={}, ramp_epochs=None
        )
    options = {
        name: {**getattr(base, name), **given[name]}
        for name in ("method_options", "loader_options")
        if name in given
    }
    return dataclasses.replace(base, **{**given, **options})


def option_value(text: str) -> bool | int | float | str:
    """The value of an option of a method or a loader that is written so: a boolean or a number
    where it is one.
    """
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def read_config(path: Path) -> TrainConfig:
    """A configuration from a YAML file.

    Raises:
        ConfigError: the file cannot be read, is not YAML, or a field is wrong.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"cannot read {path}: {getattr(error, 'strerror', None) or 'it is not UTF-8 text'}"
        ) from None
    return load_config(text, str(path))


def differences(one: TrainConfig, other: TrainConfig) -> list[str]:
    """The fields in which two configurations differ, each as "name: value, value"."""
    pairs = (
        (item.name, getattr(one, item.name), getattr(other, item.name))
        for item in dataclasses.fields(TrainConfig)
    )
    return [f"{name}: {mine!r}, {theirs!r}" for name, mine, theirs in pairs if mine != theirs]


def load_config(text: str, where: str) -> TrainConfig:
    """A configuration from YAML text.

    Raises:
        ConfigError: the text is not YAML, or a field is wrong.
    """
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where} is not valid YAML: {first_line(error)}") from error
    return config_from_mapping(values or {}, where)
