"""Augmentation policies by DALI's operators.

DALI draws its own random numbers per iteration of a pipeline. Here operations, magnitudes and signs
are drawn before, as a function of (seed, epoch, position), and are inputs of the pipeline.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastokd.data.augment import Augment
from fastokd.data.policies import policy_options

POLICIES = ("none", "randaugment", "trivialaugment", "autoaugment")
TRANSLATION = 150 / 331
"""The largest translation as a fraction of the image; TrivialAugment: 32 pixels. As torchvision."""

Stage = tuple[int, float, int | None]
"""The position of an operation, its probability, and the bin of its magnitude; None for an
operation without one.
"""


class DaliPolicy:
    """A policy as up to ``stages`` selections from a list of DALI's augmentations.

    Args:
        augment: has one of ``POLICIES``.
    """

    def __init__(self, augment: Augment) -> None:
        from nvidia.dali.auto_aug import rand_augment, trivial_augment

        self._name = augment.policy
        self._options = policy_options(augment.policy, augment.policy_options)
        self._sub_policies: list[Sequence[Stage]] = []
        self._bins, self.stages = 31, 1
        if self._name == "randaugment":
            self._operations = rand_augment.get_rand_augment_suite(True, None, TRANSLATION)
            self.stages = self._options["num_ops"]
        elif self._name == "trivialaugment":
            self._operations = trivial_augment.get_trivial_augment_wide_suite(False, 32)
        else:
            self._sub_policies = learned_policy(self._options["policy"])
            self._operations, self._bins, self.stages = policy_operations(), 10, 2

    def draw(self, numbers: NDArray[np.float64]) -> list[NDArray[np.int32]]:
        """Operations, magnitudes and signs (1: negative) of images from their uniform numbers, each
        int32 [B, stages].
        """
        first, rest = numbers[:, 0], numbers[:, 1 : 1 + 3 * self.stages]
        chosen, strength, sign = np.split(rest, 3, axis=1)
        operations = (chosen * len(self._operations)).astype(np.int32)
        bins = (strength * self._bins).astype(np.int32)
        if self._name == "randaugment":
            bins[:] = self._options["magnitude"]
        if self._sub_policies:
            bins[:], operations[:] = 0, len(self._operations) - 1
            for row, part in enumerate((first * len(self._sub_policies)).astype(int)):
                for stage, (operation, probability, magnitude) in enumerate(
                    self._sub_policies[part]
                ):
                    if chosen[row, stage] < probability:
                        operations[row, stage] = operation
                        bins[row, stage] = magnitude or 0
        return [operations, bins, (sign < 0.5).astype(np.int32)]

    def apply(self, images: Any, drawn: Sequence[Any], size: tuple[int, int]) -> Any:
        """The nodes of the images after the policy, in a pipeline with conditionals.

        Args:
            images: node of uint8 images, HWC, of ``size`` (height, width).
            drawn: nodes of the results of ``draw``.
        """
        from nvidia.dali import types as dali_types
        from nvidia.dali.auto_aug.core import signed_bin
        from nvidia.dali.auto_aug.core._select import select

        types: Any = dali_types  # its contents are generated at import
        operations, bins, signs = drawn
        magnitudes = [signed_bin(bins[k], signs[k]) for k in range(self.stages)]
        for stage, magnitude in enumerate(magnitudes):
            images = select(
                self._operations,
                operations[stage],
                images,
                magnitude_bin=magnitude,
                num_magnitude_bins=self._bins,
                fill_value=0,
                interp_type=types.INTERP_NN,
                shape=list(size),
            )
        return images


def policy_operations() -> list[Any]:
    """DALI's operations with torchvision's ranges of magnitudes; the identity is the last."""
    from nvidia.dali.auto_aug import augmentations, rand_augment

    *suite, identity = rand_augment.get_rand_augment_suite(True, None, TRANSLATION)
    return [*suite, augmentations.invert, identity]


def learned_policy(name: str) -> list[Sequence[Stage]]:
    """One of torchvision's AutoAugment policies: pairs of DALI's operations, by their positions in
    ``policy_operations``.
    """
    from torchvision.transforms import v2

    index = {each.name.replace("_", ""): i for i, each in enumerate(policy_operations())}
    pairs = v2.AutoAugment(v2.AutoAugmentPolicy(name))._policies
    return [[(index[name.lower()], *rest) for name, *rest in pair] for pair in pairs]
