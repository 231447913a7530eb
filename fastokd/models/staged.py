"""Networks as sequences of stages, branched in two ways: deeper teachers, or smaller students."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from fastokd.errors import ConfigError
from fastokd.models.branched import Backbone, Branch, PlainNetwork

Parts = OrderedDict[str, nn.Module]
"""Layers in sequence, by their names in the plain network."""


def level_blocks(num_blocks: Sequence[int], level: int, aux_blocks: int) -> tuple[int, ...]:
    """Blocks in each branched stage of a branch of hierarchy level 1, 2, ...

    The first level has the plain network's. Each further one has ``aux_blocks`` more than the
    previous, in one stage: the first, then the second, and so on (AHBF section 3.2; for several
    stages its published code).
    """
    blocks = list(num_blocks)
    for step in range(level - 1):
        blocks[step % len(blocks)] += aux_blocks
    return tuple(blocks)


def compressed_blocks(num_blocks: Sequence[int], steps: int, aux_blocks: int) -> tuple[int, ...]:
    """Blocks in each branched stage of the branch ``steps`` below the deepest, for compression.

    The deepest has the plain network's. Each further one has ``aux_blocks`` fewer than the
    previous, in one stage: the last, then the one before, and so on; a stage of one block keeps it.
    For four branches, this matches AHBF's published code ("reduced" in its Table 5). For other
    numbers of branches, that code reduces both stages of a ResNet's smallest branch, and has two
    equal branches among five.

    Raises:
        ConfigError: too few blocks.
    """
    blocks = list(num_blocks)
    shrinking = [stage for stage, count in enumerate(num_blocks) if count > 1][::-1]
    for step in range(steps if shrinking else 0):
        blocks[shrinking[step % len(shrinking)]] -= aux_blocks
    if min(blocks) < 1 or (steps and aux_blocks and not shrinking):
        counts = " and ".join(map(str, num_blocks))
        raise ConfigError(
            f"compression to {steps + 1} branches with aux_blocks={aux_blocks}: the stages have"
            f" {counts} blocks, too few to take {steps} x {aux_blocks}; use fewer of them"
        )
    return tuple(blocks)


@dataclass(frozen=True)
class Stage:
    """Blocks of one width; the functions take input channels and the number of blocks."""

    name: str
    num_blocks: int
    build: Callable[[int, int], nn.Module]
    out_channels: Callable[[int, int], int]


def block_stage(
    name: str, num_blocks: int, width: int, block: Callable[[int, bool], nn.Module]
) -> Stage:
    """Blocks with ``width`` output channels, from ``block(in_channels, is_first)``."""

    def build(in_channels: int, count: int) -> nn.Sequential:
        others = (block(width, False) for _ in range(count - 1))
        return nn.Sequential(block(in_channels, True), *others)

    return Stage(name, num_blocks, build, lambda *_: width)


def staged_network(
    name: str,
    network: type[PlainNetwork],
    stem: Callable[[], Parts],
    stem_channels: int,
    stages: Sequence[Stage],
    head: Callable[[int, int], nn.Sequential],
    split: int,
    compressed_split: int | None = None,
    tail: Callable[[int], Parts] = lambda channels: OrderedDict(),
    tail_channels: int | None = None,
    image_size: int = 32,
) -> Backbone:
    """A network of a stem, stages, a tail and a head, branched at a stage.

    Args:
        name: in the registry.
        network: the plain network's class, whose ``join`` names its children.
        stem: builds the layers before the stages, which return ``stem_channels`` channels.
        stages: in order.
        head: builds the layers from feature maps to logits, from feature channels and C.
        split: index of the first stage that each branch owns.
        compressed_split: the same in compression mode; one less by default.
        tail: builds the layers between the last stage and the features, from the stage's channels;
            they return ``tail_channels`` channels (None: as many).
        image_size: height and width of the images that the network is designed for.
    """

    def build_stages(
        parts: Parts, channels: int, stages: Sequence[Stage], num_blocks: Sequence[int]
    ) -> int:
        """Add the stages to the end of ``parts``; returns their output channels."""
        for stage, count in zip(stages, num_blocks, strict=True):
            parts[stage.name] = stage.build(channels, count)
            channels = stage.out_channels(channels, count)
        return channels

    def branched(
        split: int,
        count_blocks: Callable[[Sequence[int], int, int], Sequence[int]],
        compressed: Callable[[int], Backbone] | None = None,
    ) -> Backbone:
        blocks = [stage.num_blocks for stage in stages]
        trunk_channels = stem_channels
        for stage in stages[:split]:
            trunk_channels = stage.out_channels(trunk_channels, stage.num_blocks)

        def build_trunk() -> nn.Sequential:
            parts = stem()
            build_stages(parts, stem_channels, stages[:split], blocks[:split])
            return nn.Sequential(parts)

        def build_branch(num_classes: int, level: int, aux_blocks: int) -> Branch:
            parts: Parts = OrderedDict()
            own = count_blocks(blocks[split:], level, aux_blocks)
            channels = build_stages(parts, trunk_channels, stages[split:], own)
            parts.update(tail(channels))
            channels = tail_channels or channels
            return Branch(nn.Sequential(parts), head(channels, num_classes), channels)

        return Backbone(name, build_trunk, build_branch, network.join, image_size, compressed)

    def compress(num_branches: int) -> Backbone:
        return branched(
            split - 1 if compressed_split is None else compressed_split,
            lambda blocks, level, aux: compressed_blocks(blocks, num_branches - level, aux),
        )

    return branched(split, level_blocks, compress)
