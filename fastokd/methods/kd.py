"""KD: Hinton et al. 2015, a frozen teacher. The graph of its loss."""

from typing import Literal

from fastokd.graph import KL, CrossEntropy, External, Graph, Logits


def kd_graph(temperature: float = 3.0, lambda_kd: float = 1.0, teacher: Literal["logits", "probabilities"] = "logits",
             teacher_eps: float = 0.0, label_smoothing: float = 0.0) -> Graph:
    """``L = CE(z) + kd_weight * lambda_kd * T^2 KL(teacher || z)`` (AHBF eq. 3-5) for the student ``branch1``.

    The ``teacher`` is a second row of logits (detached), or a row of stored probabilities, softened at T already.
    The OKDDip repository adds ``teacher_eps=1e-7`` (here 0). Other libraries weigh the cross-entropy by
    ``1 - lambda_kd`` as well; the paper form does not.
    """
    if teacher not in ("logits", "probabilities"):
        raise ValueError(f"teacher={teacher!r}; use 'logits' or 'probabilities'")
    source = Logits("teacher") if teacher == "logits" else External("teacher")
    terms = (CrossEntropy("branch1"), KL("teacher", "branch1", lambda_kd, temperature, detach=True, eps=teacher_eps))
    return Graph("kd", (Logits("branch1"), source), terms, label_smoothing)
