"""The distillation graph: what a loss computes, as data. This package does not import torch."""

from fastokd._moved import moved_names
from fastokd.graph.divergences import DIVERGENCES, with_divergence
from fastokd.graph.draw import draw_mermaid, draw_text
from fastokd.graph.graph import Graph
from fastokd.graph.nodes import (
    DKD,
    KL,
    L1,
    MSE,
    CrossEntropy,
    External,
    JensenShannon,
    Logits,
    LowestCrossEntropy,
    MinLogit,
    Mixture,
    Node,
    ProbabilityMixture,
    Standardized,
    Term,
)
from fastokd.graph.plan import Plan, PlanNode, PlanTerm, decode_plan, lower

__all__ = [
    "DIVERGENCES",
    "DKD",
    "KL",
    "L1",
    "MSE",
    "CrossEntropy",
    "External",
    "Graph",
    "JensenShannon",
    "Logits",
    "LowestCrossEntropy",
    "MinLogit",
    "Mixture",
    "Node",
    "Plan",
    "PlanNode",
    "PlanTerm",
    "ProbabilityMixture",
    "Standardized",
    "Term",
    "decode_plan",
    "draw_mermaid",
    "draw_text",
    "lower",
    "with_divergence",
]

__getattr__ = moved_names(__name__, {"fastokd.experiments.analysis.graph_svg": ("draw_svg",)})
