"""Descriptions of a run, for the lines that it prints."""

import os
from collections import Counter
from collections.abc import Sequence

from fastokd.data.augment import Augment
from fastokd.errors import summarize
from fastokd.losses.method_loss import MethodLoss
from fastokd.train.config import TrainConfig, method_of
from fastokd.train.data import AnyDataset, Normalization


def describe_run(config: TrainConfig) -> str:
    """Network, method, number of branches and split point."""
    count = config.num_branches()
    preset = f" ({config.preset})" * (len(method_of(config).loss_class.presets) > 1)
    line = f"{config.model}, method {config.method}{preset}, {count} branch{'es' * (count > 1)}"
    return f"{line} from {config.at} on" if config.at and count > 1 else line


def describe_data(data: AnyDataset) -> str:
    """One line with the numbers of classes and images, their extensions if these are mixed, and
    the skipped files.
    """
    line = (
        f"data {data.name}: {len(data.classes)} classes, {len(data.train)} training and"
        f" {len(data.evaluation)} {data.evaluation.name} images"
    )
    extensions = _count_extensions(data.train.files or ())
    if len(extensions) > 1:
        line += f"; extensions in training: {summarize(extensions)}"
    if skipped := _count_extensions([name for name in data.skipped if not name.endswith("/")]):
        line += f"; skipped files: {summarize(skipped)}"
    if folders := [name for name in data.skipped if name.endswith("/")]:
        line += f"; unused folders: {summarize(folders)}"
    return line


def _count_extensions(names: Sequence[str]) -> list[str]:
    """The extensions of file names with their numbers, the most frequent first."""
    found = Counter(os.path.splitext(name)[1].lower() or "without extension" for name in names)
    return [f"{count} {extension}" for extension, count in found.most_common()]


def describe_normalization(normalization: Normalization) -> str:
    """One line with the mean and standard deviation that images are normalized with."""
    mean, std = (", ".join(f"{each:.4g}" for each in values) for values in normalization)
    return f"normalization: mean {mean}; standard deviation {std}"


def describe_augmentation(config: TrainConfig, augment: Augment) -> str:
    """One line with everything that is random about training images."""
    parts = [f"random crops after padding by {augment.pad} pixels"] * bool(augment.pad)
    if augment.crop_scale is not None:
        parts.append("random resized crops of {:g} to {:g} of the area".format(*augment.crop_scale))
    parts += ["horizontal flips"] * augment.flip
    if augment.has_policy:
        options = ", ".join(f"{name} {each}" for name, each in augment.policy_options.items())
        parts.append(f"{augment.policy}{f' ({options})' if options else ''}")
    for title, value in (
        ("color jitter", augment.color_jitter),
        ("random erasing", augment.erasing),
        ("mixup", config.mixup),
        ("CutMix", config.cutmix),
    ):
        parts += [f"{title} {value:g}"] * bool(value)
    line = f"augmentation: {', '.join(parts) or 'none'}"
    if (views := config.views()) > 1:
        line += f"; {views} views of each image, one for each branch"
        if start := config.teach_epoch():
            line += f", from epoch {start + 1} on"
    return line


def describe_fine_tuning(config: TrainConfig) -> list[str]:
    """A line about the options that train parts of the network differently, if there are some."""
    names = ("trunk_lr", "head_lr", "layer_decay", "freeze_epochs", "head_epochs", "decay")
    values, defaults = vars(config), vars(TrainConfig())
    changed = [f"{name}={values[name]}" for name in names if values[name] != defaults[name]]
    if not changed:
        return []
    trunk = f"; the trunk is all before {config.at}" if config.at else ""
    return [f"fine-tuning: {', '.join(changed)}{trunk}"]


def describe_stochastic_depth(config: TrainConfig) -> list[str]:
    """A line about ``drop_path``, if it is set."""
    rate = config.drop_path
    return [f"stochastic depth: {rate:g} in the last residual block"] if rate else []


def describe_loss(criterion: MethodLoss, config: TrainConfig) -> str:
    """One line with the coefficient of every term, and the ramp-up of ``kd_weight``."""
    terms = [(term.name, term.coefficient, term.scheduled) for term in criterion.graph.terms]
    terms += [(name, *term) for name, term in criterion.extra_terms.items()]
    line = "loss (T^2 and weights multiplied out): " + ", ".join(
        f"{coefficient:g}{'*kd_weight' if scheduled else ''} {name}"
        for name, coefficient, scheduled in terms
    )
    if smoothing := criterion.graph.label_smoothing:
        line += f"; label smoothing {smoothing:g}"
    if length := config.ramp_length():
        first, last = config.teach_epoch(), config.teach_epoch() + length - 1
        line += f"; kd_weight is {config.kd_weight_at(first):.3g} in epoch {first + 1}"
        if length > 1:
            line += f", {config.kd_weight_at(last):.3g} in epoch {last + 1}"
        if last + 1 < config.epochs:
            line += " and 1 afterwards"
    elif any(scheduled for _, _, scheduled in terms):
        line += "; kd_weight is 1 (no ramp-up)"
    return line


def describe_late_teaching(config: TrainConfig) -> str:
    """One line about the epochs before ``teach_from``."""
    start, copies = config.teach_epoch(), config.num_branches() - 1
    teacher = ["its teacher is used"] * bool(config.teacher_spec())
    branches = [f"{copies} further branches start as copies of it"] * bool(copies)
    further = " and ".join([*branches, *teacher])
    return (
        f"late teaching: the student is trained alone in the first {start} of {config.epochs}"
        f" epochs; from epoch {start + 1} on, {further}"
    )


def describe_extension(before: TrainConfig, config: TrainConfig, epoch: int) -> str:
    """One line about a run that is resumed at an epoch with another number of epochs."""
    last, following = (
        f"lr {each.lr_at(at):g}, kd_weight {each.kd_weight_at(at):.4g}"
        for each, at in ((before, max(epoch - 1, 0)), (config, epoch))
    )
    return (
        f"the run now has {config.epochs} epochs instead of {before.epochs}: learning-rate decay"
        f" and ramp-up follow the new number (epoch {max(epoch, 1)} ran with {last}; epoch"
        f" {epoch + 1} continues with {following})"
    )
