"""Assembly of branched models from backbones, for registered networks and for ``branch_out``."""

import functools
from collections.abc import Callable, Mapping, Sequence

from torch import nn

from fastokd.errors import ConfigError, did_you_mean
from fastokd.losses.options import OptionValue
from fastokd.methods import Method
from fastokd.methods.method import Topology
from fastokd.methods.modules import BranchSpec, MethodModules
from fastokd.models.branched import Backbone, Branch, BranchedModel, Peer


def assemble(
    backbones: Sequence[Backbone],
    method: Method,
    num_classes: int,
    num_branches: int,
    aux_blocks: int,
    topology: Topology,
    options: Mapping[str, OptionValue] | None = None,
    teacher: nn.Module | None = None,
    kept: int | None = None,
) -> BranchedModel:
    """The branched model of one backbone, or of one for each peer; arguments and errors as in
    ``create_model``. ``kept`` is the index of the student's branch, by default the method's.
    """
    if not isinstance(aux_blocks, int) or aux_blocks < 0:
        fix = "it must be a whole number of at least 0 (the paper uses 4 on CIFAR)"
        raise ConfigError(f"aux_blocks={aux_blocks!r}; {fix}")
    if len(backbones) == 1:
        backbones = [*backbones] * num_branches
    names = [backbone.name for backbone in backbones]
    kept = range(num_branches)[method.kept if kept is None else kept]
    # The student's branch is built first, right after its trunk as in the plain network, so one
    # seed gives the student the same initial weights with and without its teachers.
    branches: dict[int, Branch | Peer] = {}
    trunk = None if topology == "peers" else backbones[0].build_trunk()
    for index in sorted(range(num_branches), key=lambda index: index != kept):
        backbone = backbones[index]
        if trunk is None:
            branches[index] = Peer(backbone.build_trunk(), backbone.build_branch(num_classes, 1, 0))
        else:
            level = index + 1 if method.hierarchical else 1
            branches[index] = backbone.build_branch(num_classes, level, aux_blocks)
    ordered = [branches[index] for index in range(num_branches)]
    joins = [backbone.join for backbone in backbones]
    modules = (companion_builder(method, options), teacher, method.name)
    try:
        return BranchedModel(names, num_classes, trunk, ordered, joins, kept, *modules)
    except ConfigError:
        raise
    except ValueError as error:
        model = ",".join(dict.fromkeys(names))
        raise ConfigError(f"method '{method.name}' with model '{model}': {error}") from error


def companion_builder(
    method: Method, options: Mapping[str, OptionValue] | None
) -> Callable[[BranchSpec], MethodModules] | None:
    """The constructor of the method's own modules with these options, which it checks; None without
    modules.
    """
    for name, value in (options or {}).items():
        if name not in method.model_options:
            hint = did_you_mean(name, method.model_options)
            raise ConfigError(f"unknown option '{name}' of method '{method.name}'{hint}")
        try:
            method.model_options[name].check(name, value)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"method '{method.name}': {error}") from error
    if method.build_companion is None:
        return None
    values = {**method.default_model_options(), **(options or {})}
    return functools.partial(method.build_companion, **values)


def check_layout(
    method: Method, names: Sequence[str], topology: str | None, num_branches: int
) -> Topology:
    """The topology (None: the default), or a ConfigError that states what the method supports."""
    chosen = method.topologies[0] if topology is None else topology
    title, model = f"method '{method.name}'", f"model={','.join(names)!r}"
    if chosen not in method.topologies:
        raise ConfigError(f"topology='{topology}': {title} takes {' or '.join(method.topologies)}")
    low, high = method.branch_range
    if not isinstance(num_branches, int) or not low <= num_branches <= high:
        allowed = f"{low} to {high}" if low < high else f"{low} only"
        allowed += f" (its default is {method.default_branches})"
        raise ConfigError(f"{num_branches!r} branches: {title} takes {allowed}")
    if len(names) > 1 and chosen != "peers":
        reason = f"several networks can only be peers, and {title} branches one network"
        raise ConfigError(f"{model}: {reason}; name one")
    if len(names) not in (1, num_branches):
        reason = f"names {len(names)} networks for {num_branches} branches"
        raise ConfigError(f"{model} {reason}; name one, or as many as there are branches")
    return chosen


def check_num_classes(num_classes: int) -> None:
    """Raise a ConfigError unless the number of classes is an integer of at least 2."""
    if not isinstance(num_classes, int) or num_classes < 2:
        fix = "a classifier needs a whole number of at least 2"
        raise ConfigError(f"num_classes={num_classes!r}; {fix}")
