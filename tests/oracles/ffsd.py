"""FFSD's terms on feature maps, in NumPy and loops over samples, from the formulas alone.

Every function takes ``live`` maps, through which gradients flow, and ``fixed`` ones, which are the
same values detached, so that finite differences of ``live`` are the gradients that the loss should
have.
"""

import numpy as np


def _unit(row: np.ndarray) -> np.ndarray:
    return row / np.sqrt((row**2).sum())


def _attention(maps: np.ndarray) -> np.ndarray:
    return (maps**2).mean(axis=1)


def distance(one: np.ndarray, other: np.ndarray) -> float:
    total, count = 0.0, 0
    for mine, theirs in zip(one, other, strict=True):
        gap = (_unit(mine.ravel()) - _unit(theirs.ravel())) ** 2
        total, count = total + gap.sum(), count + gap.size
    return total / count


def shifted(attention: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """For one sample's attention map: v, v' and n."""
    row = attention.ravel()
    n = np.sqrt((row**2).sum())
    v = row / n
    k = max(len(v) // 3, 1)
    threshold = sorted(v)[k - 1]
    moved = np.array(
        [value if value < threshold else n / 2 if value == threshold else n - value for value in v]
    )
    return v, moved, n


def shifted_map(features: np.ndarray) -> np.ndarray:
    made = features.copy()
    for sample, attention in zip(made, _attention(features), strict=True):
        v, moved, n = shifted(attention)
        sample += ((moved - v) * n / features.shape[1]).reshape(attention.shape)
    return made


def diversity(live: dict, fixed: dict) -> float:
    total = 0.0
    for i in range(1, len(live["students"])):
        own, before = _attention(live["students"][i][-1]), _attention(fixed["students"][i - 1][-1])
        gaps = [
            (_unit(mine.ravel()) - shifted(theirs)[1]) ** 2
            for mine, theirs in zip(own, before, strict=True)
        ]
        total += np.mean(gaps)
        for stage, decoded in enumerate(fixed["decoded_shifted"][i - 1]):
            total += distance(_attention(live["students"][i][stage]), _attention(decoded))
    return total


def fusion(live: dict, fixed: dict) -> float:
    together = np.concatenate([student[-1] for student in fixed["students"]], axis=1)
    total = distance(_attention(live["leader"][-1]), _attention(fixed["fused"]))
    total += distance(_attention(live["transformed"]), _attention(together))
    for stage, decoded in enumerate(fixed["decoded_fused"]):
        total += distance(_attention(live["leader"][stage]), _attention(decoded))
    return total


def decoder(live: dict, fixed: dict) -> float:
    total = 0.0
    for own, decoded in zip(
        [*fixed["students"][1:], fixed["leader"]], live["decoded"], strict=True
    ):
        for true, made in zip(own[:-1], decoded, strict=True):
            total += distance(made, true) + distance(_attention(made), _attention(true))
    return total


TERMS = {"diversity": diversity, "fusion": fusion, "decoder": decoder}
