"""The drop-in losses, gathered from the methods."""

from fastokd.methods.ahbf import AHBFLoss
from fastokd.methods.base import GraphLoss
from fastokd.methods.baseline import BaselineLoss
from fastokd.methods.method import MethodLoss, ramp_up
from fastokd.methods.one import ONELoss

__all__ = ["AHBFLoss", "BaselineLoss", "GraphLoss", "MethodLoss", "ONELoss", "ramp_up"]
