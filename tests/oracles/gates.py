"""The methods' modules in NumPy: gates on feature maps, attention between peers.
Training mode throughout.

Maps are [B, c, H, W], pooled features [B, c]; ``p`` holds a module's parameters by the names of its
state dict. Every function is analytic but for ReLU and maxima, which follow the real part, so that
``gradients`` can take complex steps.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from oracles.rows import Array, softmax

Params = Mapping[str, Array]
EPS = 1e-5  # of batch norm


def gradients(
    f: Callable[[dict[str, Array]], Array], inputs: Mapping[str, Array]
) -> dict[str, Array]:
    """The gradient of the scalar ``f`` for every entry of every input, by one complex step each."""
    step, found = 1e-60, {}
    for name, value in inputs.items():
        gradient = np.zeros(value.shape)
        for place in np.ndindex(value.shape):
            moved = value.astype(np.complex128)
            moved[place] += 1j * step
            gradient[place] = np.imag(f({**inputs, name: moved})) / step
        found[name] = gradient
    return found


def part(p: Params, prefix: str) -> Params:
    """The parameters of a submodule."""
    return {
        name.removeprefix(prefix + "."): value
        for name, value in p.items()
        if name.startswith(prefix + ".")
    }


def relu(x: Array) -> Array:
    return np.where(np.real(x) > 0, x, 0)


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def pool(x: Array) -> Array:
    return x.mean((2, 3))


def peak(x: Array, axis: int) -> Array:
    """The maximum along an axis, which stays as one of length 1."""
    return np.take_along_axis(x, np.expand_dims(np.argmax(np.real(x), axis), axis), axis)


def linear(x: Array, p: Params) -> Array:
    return x @ p["weight"].T + p.get("bias", 0)


def conv1x1(x: Array, p: Params) -> Array:
    return np.einsum("bihw,oi->bohw", x, p["weight"][:, :, 0, 0]) + p["bias"][None, :, None, None]


def batch_norm(x: Array, p: Params) -> Array:
    axes = (0, *range(2, x.ndim))
    shape = (1, -1, *(1,) * (x.ndim - 2))
    mean = x.mean(axes, keepdims=True)
    spread = ((x - mean) ** 2).mean(axes, keepdims=True)
    return (x - mean) / np.sqrt(spread + EPS) * p["weight"].reshape(shape) + p["bias"].reshape(
        shape
    )


def one_gate(shared: Array, p: Params) -> Array:
    """[B, M]."""
    return softmax(relu(batch_norm(linear(pool(shared), part(p, "fc")), part(p, "bn"))))


def okddip_attention(features: Sequence[Array], p: Params) -> list[Array]:
    """For each peer [B, peers]."""
    pooled = [pool(maps) for maps in features]
    queries, keys = ([linear(h, part(p, name)) for h in pooled] for name in ("query", "key"))
    return [softmax(np.stack([(q * k).sum(1) for k in keys], 1)) for q in queries]


def squeeze_excitation(x: Array, p: Params) -> Array:
    return x * sigmoid(_mlp(pool(x), part(p, "mlp.0"), part(p, "mlp.2")))[:, :, None, None]


def _mlp(x: Array, first: Params, second: Params) -> Array:
    return linear(relu(linear(x, first)), second)


def seen_where(x: Array, p: Params) -> tuple[Array, Array]:
    """Maps after the channel attention of CBAM, and the weight of every position [B, 1, H, W]."""
    layers = part(p, "channel.reduce"), part(p, "channel.expand")
    highest = peak(x.reshape(*x.shape[:2], -1), 2)[:, :, 0]
    x = x * sigmoid(_mlp(pool(x), *layers) + _mlp(highest, *layers))[:, :, None, None]
    seen = np.concatenate([x.mean(1, keepdims=True), peak(x, 1)], 1)
    height, width = x.shape[2:]
    padded = np.pad(seen, ((0, 0), (0, 0), (3, 3), (3, 3)))
    kernel = p["spatial.conv.weight"]
    total = sum(
        np.einsum("bihw,i->bhw", padded[:, :, i : i + height, j : j + width], kernel[0, :, i, j])
        for i in range(7)
        for j in range(7)
    )
    return x, sigmoid(total)[:, None]


def cbam(x: Array, p: Params) -> Array:
    x, where = seen_where(x, p)
    return x * where


def non_local(x: Array, p: Params) -> Array:
    query, key, value = (
        conv1x1(x, part(p, name)).reshape(*x.shape[:1], -1, x.shape[2] * x.shape[3])
        for name in ("query", "key", "value")
    )
    shares = [
        softmax(query[b].T @ key[b]) for b in range(len(x))
    ]  # row: a position, columns: all positions
    seen = np.stack([value[b] @ shares[b].T for b in range(len(x))])
    return x + batch_norm(
        conv1x1(seen.reshape(*seen.shape[:2], *x.shape[2:]), part(p, "out")), part(p, "bn")
    )


ATTENTION = {"none": lambda x, p: x, "se": squeeze_excitation, "cbam": cbam, "nonlocal": non_local}


def ahbf_gates(features: Sequence[Array], p: Params, attention: str = "none") -> list[Array]:
    """For each gate the scores [B, 2]."""
    fused, scores = features[0], []
    for number, own in enumerate(features[1:]):
        gate = part(p, f"gates.{number}")
        fused = batch_norm(
            conv1x1(np.concatenate([own, fused], 1), part(gate, "conv")), part(gate, "bn")
        )
        fused = ATTENTION[attention](fused, part(gate, "attention"))
        scores.append(
            softmax(relu(batch_norm(linear(pool(fused), part(gate, "fc")), part(gate, "score_bn"))))
        )
    return scores
