"""The modules of FFSD and AFID in NumPy; conventions as in ``gates``.

``stop`` marks what is detached, so a complex step finds the gradients that should be there.
"""

from collections.abc import Sequence

import numpy as np

from oracles.ffsd import shifted_map
from oracles.gates import Params, batch_norm, conv1x1, linear, part, pool, relu, seen_where
from oracles.rows import Array, stop


def depthwise_pointwise(x: Array, p: Params) -> Array:
    """Depth-wise 3x3, batch norm, ReLU, 1x1, batch norm, ReLU."""
    height, width = x.shape[2:]
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    kernel = p["0.weight"]
    x = sum(
        padded[:, :, i : i + height, j : j + width] * kernel[None, :, 0, i, j, None, None]
        for i in range(3)
        for j in range(3)
    )
    x = relu(batch_norm(x, part(p, "1")))
    return relu(batch_norm(np.einsum("bihw,oi->bohw", x, p["3.weight"][:, :, 0, 0]), part(p, "4")))


def fusion_head(maps: Sequence[Array], p: Params) -> tuple[Array, Array]:
    """The fused map and the logits."""
    fused = depthwise_pointwise(np.concatenate(maps, 1), part(p, "fuse"))
    return fused, linear(pool(fused), part(p, "fc"))


def transposed_conv(x: Array, weight: Array, size: tuple[int, int]) -> Array:
    """3x3, stride 2, padding 1: every input pixel adds the kernel around its place in the
    output.
    """
    height, width = x.shape[2:]
    canvas = np.zeros(
        (x.shape[0], weight.shape[1], 2 * height + 1, 2 * width + 1), np.result_type(x, weight)
    )
    for y in range(height):
        for z in range(width):
            canvas[:, :, 2 * y : 2 * y + 3, 2 * z : 2 * z + 3] += np.einsum(
                "bi,ioyx->boyx", x[:, :, y, z], weight
            )
    return canvas[:, :, 1 : 1 + size[0], 1 : 1 + size[1]]


def decode(x: Array, p: Params, sizes: Sequence[tuple[int, int]]) -> list[Array]:
    """The earlier stages' maps, the earliest first, from the last one."""
    made = []
    for step, size in enumerate(reversed(sizes)):
        x = relu(
            batch_norm(
                transposed_conv(x, p[f"steps.{step}.0.weight"], size), part(p, f"steps.{step}.1")
            )
        )
        made.append(x)
    return made[::-1]


def ffsd(
    students: Sequence[Array], leader: Array, p: Params, sizes: Sequence[tuple[int, int]]
) -> dict[str, list[Array]]:
    """From the last maps of K students and the leader: the logits of the fusion head, and the maps
    that the loss compares.
    """
    fused, logits = fusion_head([stop(maps) for maps in students], part(p, "fusion"))
    decoders = [part(p, f"decoders.{number}") for number in range(len(students))]
    fixed = [{name: stop(value) for name, value in decoder.items()} for decoder in decoders]
    learners = [*students[1:], leader]
    return {
        "fusion_logits": [logits],
        "fused": [fused],
        "transformed": [depthwise_pointwise(leader, part(p, "transform"))],
        # Student i's decoder sees what student i - 1 saw, moved.
        "decoded_shifted": [
            made
            for i in range(1, len(students))
            for made in decode(shifted_map(stop(students[i - 1])), fixed[i - 1], sizes)
        ],
        "decoded_fused": decode(stop(fused), fixed[-1], sizes),
        "decoded": [
            made
            for own, decoder in zip(learners, decoders, strict=True)
            for made in decode(stop(own), decoder, sizes)
        ],
    }


def exchange(one: Array, other: Array, p: Params) -> tuple[Array, Array]:
    return one * seen_where(other, p)[1], other * seen_where(one, p)[1]


def afid(images: Sequence[Array], p: Params) -> dict[str, Array]:
    """Two sub-networks of a 1x1 stem, a 1x1 body and a linear head: their logits and the fusion
    head's.
    """
    peers = [part(p, f"peers.{number}") for number in range(2)]
    early = exchange(
        *(conv1x1(x, part(peer, "trunk.0")) for x, peer in zip(images, peers, strict=True)),
        part(p, "pair.after_stem"),
    )
    late = [conv1x1(x, part(peer, "branch.body.0.0")) for x, peer in zip(early, peers, strict=True)]
    last = exchange(*late, part(p, "pair.after_last"))
    logits = [linear(pool(x), part(peer, "branch.fc")) for x, peer in zip(last, peers, strict=True)]
    return {
        "logits1": logits[0],
        "logits2": logits[1],
        "fusion_logits": fusion_head(late, part(p, "fusion"))[1],
    }
