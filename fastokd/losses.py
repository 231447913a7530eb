"""The drop-in losses, gathered from the methods."""

from fastokd.methods.ahbf import AHBFLoss
from fastokd.methods.base import GraphLoss
from fastokd.methods.baseline import BaselineLoss
from fastokd.methods.ffm import FFMLoss
from fastokd.methods.kdcl import KDCLLoss
from fastokd.methods.method import MethodLoss, ramp_up
from fastokd.methods.one import ONELoss
from fastokd.methods.tsb import TSBLoss

__all__ = ["AHBFLoss", "BaselineLoss", "FFMLoss", "GraphLoss", "KDCLLoss", "MethodLoss", "ONELoss", "TSBLoss", "ramp_up"]
