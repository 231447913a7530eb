"""Augmentation policies: sequences of random operations on each image.

torchvision applies them to one image at a time on the CPU. Its random choices come from the global
generator, which is seeded for each image and restored afterwards, so they depend only on the seed.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastokd.errors import ConfigError, did_you_mean
from fastokd.limits import Limits

NO_POLICY = "none"


@dataclass(frozen=True, kw_only=True)
class Option(Limits):
    """An option of a policy: its default and its limits."""

    default: int | float | str


POLICIES: Mapping[str, Mapping[str, Option]] = {
    NO_POLICY: {},
    "randaugment": {
        "num_ops": Option(default=2, ge=1, le=6),
        "magnitude": Option(default=9, ge=0, le=30),
    },
    "trivialaugment": {},
    "autoaugment": {"policy": Option(default="imagenet", choices=("imagenet", "cifar10", "svhn"))},
    "augmix": {
        "severity": Option(default=3, ge=1, le=10),
        "mixture_width": Option(default=3, ge=1, le=10),
        "chain_depth": Option(default=-1, ge=-1, le=10),
        "alpha": Option(default=1.0, gt=0),
    },
}
"""The policies and their options, which have torchvision's names and defaults."""


class PolicyDraws(NamedTuple):
    """Random choices of a batch for a loader that applies the policy while decoding.

    Attributes:
        offsets, flipped: as ``Augment.draw``; the crop and the flip precede the policy.
        numbers: float64 [B, NUMBERS], uniform numbers for the policy.
    """

    offsets: Tensor
    flipped: Tensor
    numbers: Any

    def row(self, index: int) -> "PolicyDraws":
        """The choices of one image, as a batch."""
        return PolicyDraws(*(values[index : index + 1] for values in self))


def policy_options(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """All options of a policy, with defaults.

    Raises:
        ConfigError: an unknown policy or option, or a value of another type or out of range.
    """
    if name not in POLICIES:
        raise ConfigError(f"unknown auto_augment '{name}'{did_you_mean(name, POLICIES)}")
    known = POLICIES[name]
    for key, value in options.items():
        given = f"auto_augment_options {key}={value!r}"
        if key not in known:
            if not known:
                raise ConfigError(f"{given}: auto_augment={name} has no options; omit it")
            hint = did_you_mean(key, known)
            raise ConfigError(f"unknown option '{key}' of auto_augment={name}{hint}")
        option = known[key]
        if words := option.words():
            if value not in words:
                raise ConfigError(f"{given}: it must be one of {', '.join(words)}")
            continue
        whole = isinstance(option.default, int)
        kinds = int if whole else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds) or not option.allows(value):
            kind = "a whole number " if whole else ""
            raise ConfigError(f"{given}: it must be {kind}{option.bounds()}")
    return {key: option.default for key, option in known.items()} | dict(options)


def policy_transform(name: str, options: Mapping[str, Any]) -> Any:
    """torchvision's transform of a policy: uint8 [3, H, W] to the same."""
    from torchvision.transforms import v2

    values = policy_options(name, options)
    if name == "autoaugment":
        return v2.AutoAugment(v2.AutoAugmentPolicy(values["policy"]))
    kinds = {
        "randaugment": v2.RandAugment,
        "trivialaugment": v2.TrivialAugmentWide,
        "augmix": v2.AugMix,
    }
    return kinds[name](**values)


def apply_policy(
    images: Tensor, name: str, options: Mapping[str, Any], seeds: Iterable[int]
) -> Tensor:
    """Apply a policy to each image with its own seed.

    Args:
        images: uint8 [B, H, W, 3] on the CPU.
        name, options: see ``POLICIES``.
        seeds: B seeds.

    Returns:
        uint8 [B, H, W, 3]. The state of the global generator is unchanged.
    """
    transform = policy_transform(name, options)
    out = torch.empty_like(images)
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed, which would also seed the generators of GPUs
        generator: torch.Generator = torch.default_generator
        planar = images.permute(0, 3, 1, 2).contiguous()
        for row, image, seed in zip(out, planar, seeds, strict=True):
            generator.manual_seed(seed)
            row.copy_(transform(image).permute(1, 2, 0))
    return out
