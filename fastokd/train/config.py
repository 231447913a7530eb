"""The configuration of a training run: one frozen dataclass for the command line, recipes, YAML
files and checkpoints. Importing it does not import torch, so that ``--help`` is fast.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import yaml

from fastokd.train.fields import EXECUTION, GROUPS, Group, Role, infos
from fastokd.train.schedules import Schedule, scaled_rate

if TYPE_CHECKING:
    from fastokd.methods.method import Method

OptionValue = bool | int | float | str


def _list_loaders() -> Sequence[str]:
    from fastokd.data import list_loaders

    return (*list_loaders(), "auto")


def _list_policies() -> Sequence[str]:
    from fastokd.data.policies import POLICIES

    return tuple(POLICIES)


DATA, MODEL, METHOD, OPTIMIZATION, PERFORMANCE, CHECKPOINTS, LOGGING = map(Group, GROUPS)
SPEED, SWITCH, TRAINED, OF_METHOD = Role.SPEED, Role.SWITCH, Role.TRAINED, Role.OF_METHOD
OPTIONAL = EXECUTION | SPEED | SWITCH


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The configuration of a training run; ``fastokd.train.fields`` explains the metadata."""

    data: str = DATA(
        "",
        "Dataset: an image folder, a .csv list, a folder of WebDataset shards or of a known dataset"
        " such as ImageNet or CIFAR, or a name such as digits or cifar10:FOLDER",
        role=EXECUTION,
    )
    model: str = MODEL(
        "resnet32",
        "Network, e.g. resnet20, torchvision:NAME, timm:NAME, or MODULE:NAME for a custom network;"
        " the last three are split at --at; peers may differ: resnet20,resnet8",
        role=TRAINED,
    )
    at: str | None = MODEL(
        None,
        "First module that is separate for each branch (torchvision, timm and custom networks);"
        " all before it is the trunk. E.g. layer3",
        unset="recommended; see 'fastokd models NAME'",
        role=TRAINED,
    )
    plugin: tuple[str, ...] = MODEL(
        (),
        "Python code that registers custom methods, networks or datasets: FILE.py or MODULE",
        role=EXECUTION,
    )
    method: str = METHOD("ahbf", "Distillation method", role=TRAINED)
    preset: str = METHOD(
        "paper", "Preset of the loss options: paper or code", role=TRAINED | OF_METHOD
    )
    branches: int | None = MODEL(
        None,
        "Number of branches, including the student",
        unset="the method's, or the number of networks",
        role=TRAINED | OF_METHOD,
    )
    topology: str | None = MODEL(
        None,
        "Layout: branches (on a shared trunk) or peers (whole networks)",
        unset="the method's",
        role=TRAINED | OF_METHOD,
    )
    aux_blocks: int = MODEL(
        4, "Auxiliary blocks that each hierarchy level adds to its branch", ge=0, role=TRAINED
    )
    branch_views: bool = METHOD(
        False,
        "Give every branch its own augmented view of each training image",
        role=TRAINED | OF_METHOD,
    )
    compression: bool = MODEL(
        False,
        "Make the deepest branch the student; each earlier one has --aux-blocks fewer blocks",
        role=TRAINED,
    )
    drop_path: float | None = MODEL(
        None,
        "Stochastic depth: probability of skipping the last residual block for an image; it falls"
        " linearly to 0 in the first",
        unset="0, or the default of torchvision's network",
        ge=0,
        lt=1,
        role=SPEED,
    )
    weights: str = MODEL(
        "",
        "Start from trained weights: a file (.safetensors, .pt, .pth) or a run folder; for several"
        " networks one each, separated by commas",
    )
    pretrained: bool = MODEL(
        False, "Start from the trained weights that torchvision or timm publishes for the network"
    )
    branch_init: str | None = MODEL(
        None,
        "Branches of a network with trained weights: copies of the student's, or fresh",
        unset="copy",
        choices=("copy", "fresh"),
        role=TRAINED,
    )
    method_options: Mapping[str, OptionValue] = METHOD(
        {}, "Options of the method, e.g. temperature=4 lambda_ta=2", role=TRAINED | OF_METHOD
    )
    epochs: int = OPTIMIZATION(300, "Passes over the training images", ge=1, role=Role.RESUME)
    batch_size: int = OPTIMIZATION(
        128,
        "Images per step over all processes; for small data 'fastokd train' uses fewer and a lower"
        " --lr, unless one of them is given",
        ge=2,
        role=SPEED,
    )
    device_batch: int | None = OPTIMIZATION(
        None,
        "Images per forward pass of a process; gradients are accumulated over the batch",
        unset="the process's share of the batch",
        role=SPEED,
    )
    optimizer: str = OPTIMIZATION("sgd", "Optimizer", choices=("sgd", "adamw"), role=SPEED)
    lr: float = OPTIMIZATION(0.1, "Learning rate after the warm-up", gt=0)
    lr_scaling: str = OPTIMIZATION(
        "none",
        "Scaling of --lr with batch_size / lr_batch_size",
        choices=("none", "linear", "sqrt"),
    )
    lr_batch_size: int = OPTIMIZATION(256, "Batch size that --lr is meant for", ge=1)
    schedule: str = OPTIMIZATION(
        "step", "Learning-rate schedule", choices=("step", "cosine", "onecycle")
    )
    lr_decay_at: tuple[float, ...] = OPTIMIZATION(
        (0.5, 0.75), "Schedule step: fractions of the epochs at which the rate decays", gt=0, lt=1
    )
    lr_gamma: float = OPTIMIZATION(0.1, "Schedule step: decay factor of the rate", gt=0, le=1)
    lr_final: float = OPTIMIZATION(
        0.0, "Schedules cosine and onecycle: final rate as a fraction of --lr", ge=0, le=1
    )
    warmup_epochs: float | None = OPTIMIZATION(
        None, "Epochs of linear warm-up", unset="0; onecycle: 0.3 of the epochs", ge=0
    )
    momentum: float = OPTIMIZATION(0.9, "Momentum of SGD", ge=0, lt=1)
    nesterov: bool = OPTIMIZATION(True, "Nesterov momentum of SGD")
    betas: tuple[float, ...] = OPTIMIZATION((0.9, 0.999), "Betas of AdamW", ge=0, lt=1)
    weight_decay: float = OPTIMIZATION(5e-4, "Weight decay, see --decay", ge=0)
    decay: str = OPTIMIZATION(
        "all",
        "Parameters with weight decay; norm-bias-free: all but biases, normalization, layer scales",
        choices=("all", "norm-bias-free"),
    )
    trunk_lr: float = OPTIMIZATION(1.0, "Factor of the learning rate in the trunk", gt=0)
    head_lr: float = OPTIMIZATION(
        1.0, "Factor of the learning rate in the heads, the part after the feature maps", gt=0
    )
    layer_decay: float = OPTIMIZATION(
        1.0, "Factor of the learning rate for each block between a layer and the output", gt=0, le=1
    )
    freeze_epochs: int = OPTIMIZATION(
        0, "Epochs at the start in which the trunk is not trained", ge=0
    )
    head_epochs: int = OPTIMIZATION(
        0, "Epochs at the start in which only the heads and the method's modules are trained", ge=0
    )
    clip_grad: float = OPTIMIZATION(0.0, "Maximum norm of the total gradient; 0: no limit", ge=0)
    ema: float = OPTIMIZATION(
        0.0,
        "Decay per step of the average of the student's weights, which is evaluated and exported;"
        " 0: no average",
        ge=0,
        lt=1,
        role=SPEED,
    )
    ramp_epochs: int | None = METHOD(
        None,
        "Epochs over which the distillation terms ramp up",
        unset="the preset's",
        ge=0,
        role=OF_METHOD,
    )
    teacher: str | None = METHOD(
        None,
        "Frozen teacher for any method: a run folder, a checkpoint, an exported student,"
        " torchvision:NAME[:FILE], timm:NAME[:FILE] (without FILE: the library's published weights)"
        " or a file of its rows for every training image, .npy or .safetensors",
        unset="no teacher",
        role=TRAINED,
    )
    teacher_to: str = METHOD(
        "student",
        "Rows that the frozen teacher teaches: the student, or all branches",
        choices=("student", "branches"),
        role=TRAINED,
    )
    teacher_weight: float = METHOD(
        1.0, "Weight of each KL term of the frozen teacher; no ramp-up", ge=0, role=TRAINED
    )
    teacher_temperature: float = METHOD(
        3.0, "Temperature of the frozen teacher's KL terms", gt=0, role=TRAINED
    )
    teacher_rows: str = METHOD(
        "logits",
        "Stored rows of the frozen teacher: logits, or probabilities softened at its temperature",
        choices=("logits", "probabilities"),
        role=TRAINED,
    )
    teacher_normalization: str = METHOD(
        "data",
        "Normalization of images for the frozen teacher torchvision:NAME:FILE or timm:NAME:FILE;"
        " library: that of the weights that it publishes for the network",
        choices=("data", "imagenet", "library"),
        role=TRAINED,
    )
    teach_from: float = METHOD(
        0.0,
        "Late teaching: train the student alone until this point, then all branches. Below 1: a"
        " fraction of --epochs; from 1 on: a number of epochs (1 is one epoch); 0: off",
        ge=0,
        role=TRAINED | OF_METHOD,
    )
    label_smoothing: float | None = OPTIMIZATION(
        None, "Label smoothing of every cross-entropy", unset="the preset's", ge=0, lt=1
    )
    seed: int = OPTIMIZATION(
        0, "Seed of initialization, order and augmentation", ge=0, lt=2**31, role=Role.REPEAT
    )
    image_size: int | None = DATA(
        None, "Height and width of the images in pixels", unset="the data's", ge=4, role=SPEED
    )
    val_split: float = DATA(
        0.0, "Fraction of the training images to evaluate on, instead of the test split", ge=0, lt=1
    )
    normalization: str = DATA(
        "auto",
        "Mean and standard deviation of pixels: the data's, ImageNet's, those of the trained"
        " weights that the run starts from, or those that torchvision or timm (library) states for"
        " the network; auto: the weights', if known, else the data's",
        choices=("auto", "data", "imagenet", "weights", "library"),
    )
    background: str | None = DATA(
        None,
        "Color behind transparent pixels of image files, e.g. white or #ff8000",
        unset="the transparency is dropped",
    )
    pad: int | None = DATA(None, "Padding of random crops in pixels", unset="the data's", ge=0)
    flip: bool | None = DATA(None, "Random horizontal flips", unset="the data's")
    padding: str | None = DATA(
        None, "Padding of random crops", unset="the data's", choices=("zero", "reflect")
    )
    mixup: float = DATA(0.0, "Alpha of mixup; 0: no mixup", ge=0, role=SPEED)
    cutmix: float = DATA(
        0.0, "Alpha of CutMix; 0: no CutMix. With mixup, each batch uses either", ge=0, role=SPEED
    )
    auto_augment: str = DATA(
        "none",
        "Augmentation policy, applied to each image after crop and flip: randaugment,"
        " trivialaugment, autoaugment or augmix",
        choices=_list_policies,
        role=SPEED,
    )
    auto_augment_options: Mapping[str, OptionValue] = DATA(
        {},
        "Options of --auto-augment; randaugment: num_ops=2 magnitude=9; autoaugment:"
        " policy=imagenet, cifar10 or svhn; augmix: severity=3",
        role=SPEED,
    )
    color_jitter: float = DATA(
        0.0,
        "Color jitter: factors of brightness, contrast and saturation from 1 - value to 1 + value",
        ge=0,
        role=SPEED,
    )
    random_erasing: float = DATA(
        0.0, "Probability of erasing a random box of a training image", ge=0, le=1, role=SPEED
    )
    resize_schedule: Mapping[int, int] = DATA(
        {},
        "Progressive resizing: image size from a 0-based epoch on, e.g. 0:128 60:192",
        role=SPEED,
    )
    loader: str = DATA(
        "auto",
        "Loader: resident keeps decoded images on the device; dali and torchvision decode while"
        " training; auto chooses",
        choices=_list_loaders,
        role=SPEED,
    )
    loader_options: Mapping[str, OptionValue] = DATA(
        {},
        "Options of the loaders dali, e.g. threads=8, and torchvision, e.g. workers=8",
        role=SPEED,
    )
    bad_images: str = DATA(
        "fail",
        "Reaction to training images that cannot be decoded; replace: at most 1 %, by other images",
        choices=("fail", "replace"),
    )
    device: str = PERFORMANCE("auto", "Device: auto, cpu, cuda or cuda:N", role=EXECUTION)
    precision: str = PERFORMANCE(
        "auto",
        "Number format; auto: bf16 where the device has it, else fp16 on a GPU with tensor cores"
        " (V100, T4), else fp32",
        choices=("auto", "fp32", "tf32", "bf16", "fp16"),
        role=SPEED,
    )
    channels_last: bool = PERFORMANCE(
        True, "Channels-last memory format of images and weights", role=SPEED | SWITCH
    )
    impl: str = PERFORMANCE(
        "auto", "Executor of the loss: auto, reference, triton or cpu", role=EXECUTION | SPEED
    )
    compile: bool | None = PERFORMANCE(
        None, "Compile the networks with torch.compile", unset="on a GPU", role=OPTIONAL
    )
    cuda_graph: bool | None = PERFORMANCE(
        None, "Run the step as one CUDA graph", unset="on one GPU, if possible", role=OPTIONAL
    )
    streams: bool | None = PERFORMANCE(
        None,
        "Run each branch on a separate CUDA stream",
        unset="on one GPU, if possible",
        role=EXECUTION | SWITCH,
    )
    flat: bool | None = PERFORMANCE(
        None,
        "Keep the parameters in one tensor, so that the optimizer is one operation",
        unset="on a GPU, if possible",
        role=OPTIONAL,
    )
    cast_once: bool | None = PERFORMANCE(
        None,
        "Cast all weights to bf16 or fp16 in one operation per step instead of one per layer; needs"
        " --flat",
        unset="on one GPU, if possible",
        role=OPTIONAL,
    )
    sync_bn: bool = PERFORMANCE(False, "Batch norm over the images of all processes", role=SPEED)
    deterministic: bool = PERFORMANCE(False, "Use only deterministic operations", role=SPEED)
    on_nonfinite: str = OPTIMIZATION(
        "stop",
        "Reaction to a non-finite loss or gradient; rollback: to the last checkpoint",
        choices=("stop", "skip", "rollback"),
    )
    keep_checkpoints: int = CHECKPOINTS(
        2, "Number of latest checkpoints to keep, in addition to the best", ge=1, role=EXECUTION
    )
    save_minutes: float = CHECKPOINTS(
        15.0, "Minutes between checkpoints in an epoch; 0: only at its end", ge=0, role=EXECUTION
    )
    log_to: tuple[str, ...] = LOGGING(
        (),
        "Metric loggers in addition to the run folder",
        choices=("tensorboard", "wandb"),
        role=EXECUTION,
    )

    def lr_at(self, epoch: float) -> float:
        """The learning rate after ``epoch`` epochs, see ``Schedule``."""
        return Schedule(
            shape=self.schedule,
            peak=scaled_rate(self.lr, self.lr_scaling, self.batch_size, self.lr_batch_size),
            epochs=self.epochs,
            warmup_epochs=self.warmup_epochs,
            decay_at=self.lr_decay_at,
            gamma=self.lr_gamma,
            final=self.lr_final,
        ).rate(epoch)

    def size_at(self, epoch: int) -> int | None:
        """The side of the training images in a 0-based epoch; None for the data's own size."""
        starts = [start for start in self.resize_schedule if start <= epoch]
        return self.resize_schedule[max(starts)] if starts else None

    def teach_epoch(self) -> int:
        """The 0-based epoch in which the teaching starts; 0 without late teaching."""
        return round(self.teach_from * (self.epochs if self.teach_from < 1 else 1))

    def ramp_length(self) -> int:
        """The length of the ramp-up in epochs; by default the preset's, of the taught epochs."""
        if self.ramp_epochs is not None:
            return self.ramp_epochs
        return method_of(self).schedule.ramp_epochs(self.epochs - self.teach_epoch(), self.preset)

    def kd_weight_at(self, epoch: int) -> float:
        """The factor of the scheduled terms in a 0-based epoch; 0 before the teaching starts."""
        if (taught := epoch - self.teach_epoch()) < 0:
            return 0.0
        return method_of(self).schedule.kd_weight(taught, self.ramp_length())

    def model_names(self) -> list[str]:
        """The networks in ``model``: one, or one for each peer."""
        return [name.strip() for name in self.model.split(",")]

    def weight_files(self) -> list[str]:
        """The files in ``weights``: one, or one for each of several networks; empty if unused."""
        several = len(self.model_names()) > 1
        files = self.weights.split(",") if several else [self.weights]
        return [file.strip() for file in files if file.strip()]

    def num_branches(self) -> int:
        """The number of branches, with the default filled in."""
        if self.branches is not None:
            return self.branches
        names = self.model_names()
        return len(names) if len(names) > 1 else method_of(self).default_branches

    def kept_branch(self) -> int:
        """The index of the branch that is the student."""
        return range(self.num_branches())[-1 if self.compression else method_of(self).kept]

    def teacher_spec(self) -> str:
        """The frozen teacher: ``teacher``, or the option of methods that need one; "" for none."""
        options = self.model_options() if method_of(self).needs_teacher else {}
        return self.teacher or str(options.get("teacher", ""))

    def loss_options(self) -> dict[str, Any]:
        """The keyword arguments of the method's loss: the preset's, then the overrides."""
        method, options = method_of(self), self.method_options
        overrides = {name: options[name] for name in options if name not in method.model_options}
        if self.label_smoothing is not None:
            overrides["label_smoothing"] = self.label_smoothing
        return {**method.loss_class.presets[self.preset], **overrides, "impl": self.impl}

    def model_options(self) -> dict[str, OptionValue]:
        """The options of the method's own modules."""
        defaults = method_of(self).default_model_options()
        return {name: self.method_options.get(name, default) for name, default in defaults.items()}

    def views(self) -> int:
        """The number of augmented views of each training image: one, or one for each branch."""
        option = method_of(self).views
        separate = self.branch_views or (option and self.model_options()[option])
        return self.num_branches() if separate else 1

    def to_yaml(self) -> str:
        """The configuration as YAML with every field."""
        fields = vars(self).items()
        plain = {name: dict(each) if isinstance(each, Mapping) else each for name, each in fields}
        return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)


@dataclass(frozen=True)
class Retired:
    """A field of earlier versions. It is ignored in old files, with a warning if it was used."""

    off: Any
    """The value that did nothing."""
    before: str
    """The field that followed it."""
    reason: str


RETIRED = {
    "merge_first_conv": Retired(False, "method_options", "merged first convolutions were removed")
}

TEACHER = (
    "teacher",
    "teacher_to",
    "teacher_weight",
    "teacher_temperature",
    "teacher_rows",
    "teacher_normalization",
)
"""Fields of a frozen teacher that joins the method."""

ADDED = (
    "teach_from",
    *TEACHER,
    *("weights", "pretrained", "branch_init"),
    *("decay", "trunk_lr", "head_lr", "layer_decay", "freeze_epochs", "head_epochs"),
    *("auto_augment", "auto_augment_options", "color_jitter", "random_erasing"),
    *("label_smoothing", "normalization", "drop_path", "branch_views", "background"),
)
"""Fields that earlier versions did not have."""

WITH_OPTIONS = ("method_options", "loader_options", "auto_augment_options")
"""Fields whose options are set one by one."""


def identity_fields(config: TrainConfig) -> list[tuple[str, Any]]:
    """Names and values of the fields that may not change when a run is resumed; with retired
    fields and without unused added ones, so that hashes are the same in all versions.
    """
    retired = {field.before: (name, field.off) for name, field in RETIRED.items()}
    pairs, defaults = [], vars(TrainConfig())
    for name, info in infos(config).items():
        if name in retired:
            pairs.append(retired[name])
        unused = name in ADDED and getattr(config, name) == defaults[name]
        if not info.role & Role.RESUME and not unused:
            pairs.append((name, getattr(config, name)))
    return pairs


def method_of(config: TrainConfig) -> "Method":
    """The method of a configuration."""
    from fastokd.methods import get_method

    return get_method(config.method)


def one_teacher(config: TrainConfig) -> TrainConfig:
    """The configuration with the teacher of a method that needs one in the field ``teacher``, if it
    is given as the method's option, which means the same.
    """
    options = dict(config.method_options)
    if not method_of(config).needs_teacher or not (spec := options.pop("teacher", "")):
        return config
    return dataclasses.replace(config, teacher=config.teacher or str(spec), method_options=options)


def fields_with_role(role: Role) -> tuple[str, ...]:
    """The names of the fields that have a role, in the order of the fields."""
    return tuple(name for name, info in infos(TrainConfig).items() if info.role & role)


# --- checks


# --- changing configurations


def override(base: TrainConfig, changes: Mapping[str, Any]) -> TrainConfig:
    """The configuration with changes. Options are added; another method has its own defaults, and
    another network its own split point.
    """
    if "teacher" in changes:
        base = one_teacher(base)
    if changes.get("method", base.method) != base.method:
        defaults: dict[str, Any] = vars(TrainConfig())
        changed = {name: defaults[name] for name in fields_with_role(Role.OF_METHOD)}
        base = dataclasses.replace(base, **changed)
    if changes.get("model", base.model) != base.model:
        base = dataclasses.replace(base, at=None)
    options = {
        name: {**getattr(base, name), **changes[name]} for name in WITH_OPTIONS if name in changes
    }
    return dataclasses.replace(base, **{**changes, **options})


def option_value(text: str) -> OptionValue:
    """The value of a method's or loader's option: a boolean or a number if the text is one."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def differences(one: TrainConfig, other: TrainConfig) -> list[str]:
    """The fields in which two configurations differ, each as "name: value, value"."""
    return [
        f"{name}: {value!r}, {getattr(other, name)!r}"
        for name, value in vars(one).items()
        if value != getattr(other, name)
    ]
