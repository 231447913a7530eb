"""Worked examples of the methods with six decimals, as checks of every executor.

Three rows of logits, label 0, ``kd_weight=0.5``, in float64.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from executor_contract import Subject, check
from oracles.ahbf import ahbf
from torch import Tensor

from fastokd.graph import KL
from fastokd.losses import (
    AHBFLoss,
    CLILRLoss,
    DMLLoss,
    IndependentLoss,
    KDLoss,
    OKDDipLoss,
    ONELoss,
)
from fastokd.methods.ahbf import PRESETS

Z = [[1.0, 0.0, -1.0], [0.5, 1.0, -0.5], [2.0, -1.0, 0.5]]
CROSS_ENTROPIES = (0.407606, 1.104131, 0.241311)
# The sum of each network's terms of DML with the mean of the others as teacher, which is CL-ILR's
# loss.
OF_NETWORKS = (0.483713, 1.660695, 1.026168)
PRINTED = 1.1e-6
"""Sums of numbers rounded to six decimals are off by a little more than half a unit of the last."""


def rows(device: str, *values: Sequence[float]) -> list[Tensor]:
    return [
        torch.tensor([value], dtype=torch.float64, device=device, requires_grad=True)
        for value in values
    ]


def near(found: Any, expected: Any, tolerance: float = PRINTED) -> None:
    if isinstance(found, Tensor):
        found = found.detach().cpu().numpy()
    np.testing.assert_allclose(
        np.asarray(found).reshape(-1), np.asarray(expected).reshape(-1), rtol=0, atol=tolerance
    )


def label(device: str) -> Tensor:
    return torch.zeros(1, dtype=torch.long, device=device)


AHBF = (
    (
        "paper",
        True,
        4.285215,
        [
            (-0.211609, 0.288253, -0.076643),
            (-1.515738, 1.463874, 0.051864),
            (-0.329034, 0.109383, 0.219651),
            (0.881250, -1.295249),
            (-0.924506, -0.230439),
        ],
    ),
    (
        "paper",
        False,
        4.285215,
        [
            (-0.293761, 0.310757, -0.016996),
            (-1.935302, 1.759042, 0.176260),
            (0.030955, -0.434477, 0.403522),
            (0.760261, -1.649746),
            (-0.021102, -0.376563),
        ],
    ),
    (
        "code",
        False,
        4.882989,
        [
            (-0.355319, 0.434495, -0.079176),
            (-2.144962, 2.058317, 0.086645),
            (0.249353, -0.761870, 0.512517),
            (1.034656, -1.401557),
            (-1.376208, -0.157377),
        ],
    ),
)


@check
def worked_ahbf(on: Subject) -> None:
    for preset, detach, value, gradients in AHBF:
        z, scores = rows(on.device, *Z), rows(on.device, [0.6, 0.4], [0.3, 0.7])
        criterion = AHBFLoss.preset(preset, 3, detach_teacher=detach, impl=on.executor)
        loss = criterion(z, label(on.device), scores=scores, kd_weight=0.5)
        loss.backward()
        near(loss, value)
        for leaf, gradient in zip([*z, *scores], gradients, strict=True):
            near(leaf.grad, gradient)
        # The formula with which other tests compare gives the same numbers.
        options = PRESETS[preset]
        formula = ahbf(
            [row.detach().cpu().numpy() for row in z],
            np.zeros(1, dtype=int),
            [score.detach().cpu().numpy() for score in scores],
            lambda_ta=options["lambda_ta"],
            lambda_branch=options["lambda_branch"],
            lambda_self=options["lambda_self"],
            eps=options["teacher_eps"],
            detach=detach,
            kd_weight=0.5,
        )
        near(formula.loss, value)
        for found, gradient in zip([*formula.logits, *formula.scores], gradients, strict=True):
            near(found, gradient)


@check
def worked_ahbf_terms(on: Subject) -> None:
    z, scores = rows(on.device, *Z), rows(on.device, [0.6, 0.4], [0.3, 0.7])
    criterion = AHBFLoss(3, lambda_self=1e-9, impl=on.executor)
    loss, terms = criterion(z, label(on.device), scores=scores, kd_weight=0.5, return_terms=True)
    near(loss, 4.285215, 2e-6)
    for number, value in enumerate(CROSS_ENTROPIES, start=1):
        near(terms[f"ce/branch{number}"], value)
    near(sum(value for name, value in terms.items() if name.startswith("ce/")), 3.000616)
    for name, value in {
        "ta2->branch1": 0.079651,
        "ta3->ta2": 0.081410,
        "branch2->branch1": 0.218212,
        "branch3->ta2": 0.744266,
        "ta2->branch2": 0.034841,
        "ta3->branch3": 0.388951,
    }.items():
        near(terms[f"kl/{name}"], value)


@check
def worked_one(on: Subject) -> None:
    for detach, of_scores, of_first in (
        (True, (-0.560811, -0.026996, -0.990781), (-0.370900, 0.304808, 0.066092)),
        (False, (-0.652593, 0.010711, -1.247712), (-0.388437, 0.321527, 0.066910)),
    ):
        z, (scores,) = rows(on.device, *Z), rows(on.device, [0.2, 0.5, 0.3])
        criterion = ONELoss(detach_teacher=detach, impl=on.executor)
        loss, terms = criterion(
            z, label(on.device), scores=[scores], kd_weight=0.5, return_terms=True
        )
        loss.backward()
        near(loss, 2.595284)
        near(terms["ce/ensemble"], 0.522747)
        for number, value in enumerate((0.034610, 0.174829, 0.429538), start=1):
            near(terms[f"kl/ensemble->branch{number}"], value)
        near(scores.grad, of_scores)
        near(z[0].grad, of_first)
        near(criterion.named_logits(z, scores=[scores])["ensemble"], (1.05, 0.2, -0.3))


@check
def worked_okddip(on: Subject) -> None:
    for mix, values, total in (
        ("logits", (0.020030, 0.034841, 0.784857), 2.172911),
        ("probabilities", (0.019538, 0.035857, 0.787748), 2.174620),
    ):
        z, scores = rows(on.device, *Z), rows(on.device, [0.7, 0.3], [0.4, 0.6])
        criterion = OKDDipLoss(3, mix=mix, impl=on.executor)
        loss, terms = criterion(
            z, label(on.device), scores=scores, kd_weight=0.5, return_terms=True
        )
        near(loss, total)
        names = ("group1->branch1", "group2->branch2", "ensemble->leader")
        near([terms[f"kl/{name}"].item() for name in names], values)


@check
def worked_dml(on: Subject) -> None:
    for teacher, temperature, of_networks in (
        ("pairwise", 1.0, (0.618089, 1.542971, 0.935924)),
        ("mean", 3.0, OF_NETWORKS),
    ):
        criterion = DMLLoss(3, temperature, teacher=teacher, impl=on.executor)
        loss, terms = criterion(rows(on.device, *Z), label(on.device), return_terms=True)
        near(loss, sum(of_networks))
        for number, value in enumerate(of_networks, start=1):
            student = f"branch{number}"
            edges = [
                term
                for term in criterion.graph.terms
                if isinstance(term, KL) and term.student == student
            ]
            total = sum(term.weight * terms[term.name] for term in edges)
            near(terms[f"ce/{student}"] + total, value)


@check
def worked_cross_entropies(on: Subject) -> None:
    """The same rows: independent networks, CL-ILR, and KD with z2 as the teacher of z1, which is
    AHBF's edge branch2 -> branch1.
    """
    target = label(on.device)
    near(IndependentLoss(3, impl=on.executor)(rows(on.device, *Z), target), sum(CROSS_ENTROPIES))
    near(CLILRLoss(3, impl=on.executor)(rows(on.device, *Z), target), sum(OF_NETWORKS))
    first, second = rows(on.device, *Z[:2])
    value = CROSS_ENTROPIES[0] + 0.5 * 0.218212
    near(KDLoss(impl=on.executor)([first], target, teacher=second, kd_weight=0.5), value)
    (stored,) = rows(on.device, [0.345078, 0.407662, 0.247260])
    criterion = KDLoss(teacher_rows="probabilities", impl=on.executor)
    near(criterion([first], target, teacher=stored.detach(), kd_weight=0.5), value)
