"""Checks of a configuration: the limits of its fields, and rules over several fields."""

from collections.abc import Iterable, Iterator

from fastokd.errors import ConfigError
from fastokd.train.config import TEACHER, TrainConfig, method_of
from fastokd.train.fields import check_value, infos
from fastokd.train.loss import check_method


def check_config(config: TrainConfig) -> None:
    """Check every value before anything is read or written.

    Raises:
        ConfigError: names the field, its value and the fix.
    """
    from fastokd.data.decoding import parse_color
    from fastokd.data.policies import policy_options
    from fastokd.ops import check_impl

    policy_options(config.auto_augment, config.auto_augment_options)
    if config.background is not None:
        parse_color(config.background)
    check_method(config)
    for name, info in infos(config).items():
        check_value(name, getattr(config, name), info)
    check_rules(_rules(config))
    check_rules(teacher_rules(config))
    check_rules(_late_teaching_rules(config))
    check_rules(_weight_rules(config))
    check_impl(config.impl)


def check_rules(rules: Iterable[tuple[object, str]]) -> None:
    """Raise ``ConfigError`` with the message of the first broken rule."""
    for is_broken, message in rules:
        if is_broken:
            raise ConfigError(message)


def _rules(config: TrainConfig) -> Iterator[tuple[object, str]]:
    """Rules over several fields: whether the configuration breaks them, and the message."""
    from fastokd.data.loader import get_loader_kind

    method, name = method_of(config), f"method '{config.method}'"
    part, least = config.device_batch, 1 if config.sync_bn else 2
    divisor = f"a divisor of batch_size={config.batch_size}"
    yield (
        part is not None and (part < least or config.batch_size % part),
        f"device_batch={part}: it must be at least {least} and {divisor}",
    )
    warmup, epochs = config.warmup_epochs, config.epochs
    yield (
        warmup is not None and warmup >= epochs,
        f"warmup_epochs={warmup}: it must be below epochs={epochs}",
    )
    yield (
        config.optimizer == "sgd" and config.nesterov and config.momentum == 0,
        "nesterov=True: it must be false when momentum is 0",
    )
    for field in ("freeze_epochs", "head_epochs"):
        count = getattr(config, field)
        yield count >= epochs, f"{field}={count}: it must be below epochs={epochs}"
    yield len(config.betas) != 2, f"betas={config.betas!r}: it must be two numbers"
    yield (
        method.needs_index and config.on_nonfinite == "skip",
        f"on_nonfinite=skip and {name}: it stores predictions; use stop or rollback",
    )
    for field, alpha in (("mixup", config.mixup), ("cutmix", config.cutmix)):
        reason = "it stores predictions of each image, and a mixed image is two"
        yield method.needs_index and alpha, f"{field}={alpha:g} and {name}: {reason}; use 0"
    yield (
        config.branch_views and config.num_branches() == 1,
        f"branch_views=True and {name}: there is one branch, which sees one view; omit it",
    )
    smoothing, option = config.label_smoothing, config.method_options.get("label_smoothing")
    yield (
        None not in (smoothing, option) and smoothing != option,
        f"label_smoothing={smoothing} and method_options label_smoothing={option}: omit one of"
        " them",
    )
    policy, loader = config.auto_augment, config.loader
    lacks = None if loader == "auto" else get_loader_kind(loader).lacks(policy)
    yield lacks, f"auto_augment={policy} and loader={loader}: {lacks}"
    schedule = config.resize_schedule
    sizes = f"resize_schedule={schedule!r}: it must be of"
    yield not all(0 <= each < epochs for each in schedule), f"{sizes} epochs from 0 to {epochs - 1}"
    small = not all(size >= 4 for size in schedule.values())
    yield small, f"{sizes} sizes of at least 4 pixels"
    yield (
        any("\ud800" <= letter <= "\udfff" for letter in config.data),
        f"data={config.data!r}: the name is not valid UTF-8; rename the folder",
    )


def teacher_rules(config: TrainConfig) -> Iterator[tuple[object, str]]:
    """The rules of a frozen teacher, as ``_rules``."""
    method, name = method_of(config), f"method '{config.method}'"
    yield (
        method.needs_teacher and not config.teacher_spec(),
        f"{name} needs a trained teacher: pass --teacher RUN (a run folder or an exported student),"
        " torchvision:resnet50, timm:NAME:WEIGHTS.safetensors, or ROWS.npy",
    )
    yield (
        method.needs_teacher
        and config.teacher
        and config.model_options()["teacher"] not in ("", config.teacher),
        f"teacher={config.teacher}: --method-options names another teacher; pass one of them",
    )
    for field in TEACHER[1:]:
        value = getattr(config, field)
        is_set = value != getattr(TrainConfig, field)
        yield (
            is_set and method.needs_teacher,
            f"{field}={value}: {name} sets its teacher's terms by --method-options; omit it",
        )
        yield is_set and not config.teacher, f"{field}={value}: there is no teacher; pass --teacher"


def _late_teaching_rules(config: TrainConfig) -> Iterator[tuple[object, str]]:
    """The rules of ``teach_from``, as ``_rules``."""
    if not config.teach_from:
        return
    method, start = method_of(config), config.teach_epoch()
    name = f"teach_from={config.teach_from:g}"
    yield (
        config.teach_from > 1 and config.teach_from != start,
        f"{name}: neither a fraction below 1 nor a whole number of epochs; pass e.g. 0.5 or 2",
    )
    yield (
        not 0 < start < config.epochs,
        f"{name} with epochs={config.epochs}: no epoch is left for"
        f" {'teaching' if start else 'the student alone'}; pass a fraction such as 0.5, or a number"
        " of epochs from 1 to epochs - 1",
    )
    branched = "branches" in method.topologies
    yield (
        (config.topology or method.topologies[0]) == "peers",
        f"{name} and method '{config.method}': peers share no trunk that the student could train"
        f" alone; use {'--topology branches' if branched else 'a method with branches, e.g. ahbf'}",
    )
    yield (
        config.num_branches() == 1 and not config.teacher_spec(),
        f"{name} and method '{config.method}': no branch could teach; omit teach_from",
    )
    yield (
        config.compression,
        f"{name} and compression=True: branches with fewer blocks than the student cannot start as"
        " copies of it; omit teach_from or compression",
    )


def _weight_rules(config: TrainConfig) -> Iterator[tuple[object, str]]:
    """The rules of ``weights`` and ``pretrained``, as ``_rules``."""
    trained, names = config.weights or config.pretrained, config.model_names()
    yield (
        config.weights and config.pretrained,
        f"weights={config.weights} and pretrained=True: give one of them (--pretrained false)",
    )
    if config.weights and len(names) > 1:
        count = len(config.weight_files())
        yield (
            count != len(names),
            f"weights={config.weights}: {count} files for the {len(names)} networks"
            f" {','.join(names)}; pass one for each, separated by commas; no path may"
            " contain a comma",
        )
        yield (
            config.branch_init == "fresh",
            "branch_init=fresh with several networks: only the student's file would be used; omit"
            " branch_init",
        )
    yield (
        config.normalization == "weights" and not trained,
        "normalization=weights: the run starts from random weights; pass weights or pretrained, or"
        " omit it",
    )
    yield (
        config.branch_init and not trained,
        f"branch_init={config.branch_init}: it is for networks with trained weights; pass weights"
        " or pretrained, or omit it",
    )
    yield (
        trained and config.compression and config.branch_init != "fresh",
        "compression=True with trained weights: branches with fewer blocks than the student cannot"
        " start as copies of it; pass branch_init=fresh",
    )
    yield (
        config.teach_from and config.branch_init == "fresh",
        "branch_init=fresh with teach_from: branches that start later are copies of the student;"
        " omit one of them",
    )
