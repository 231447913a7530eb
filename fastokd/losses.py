"""The drop-in losses, gathered from the methods."""

from fastokd.methods.ahbf import AHBFLoss, ramp_up
from fastokd.methods.base import GraphLoss
from fastokd.methods.baseline import BaselineLoss

__all__ = ["AHBFLoss", "BaselineLoss", "GraphLoss", "ramp_up"]
