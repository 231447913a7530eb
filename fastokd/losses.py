"""The drop-in losses, gathered from the methods."""

from fastokd.methods.afid import AFIDLoss
from fastokd.methods.ahbf import AHBFLoss
from fastokd.methods.base import GraphLoss
from fastokd.methods.baseline import BaselineLoss
from fastokd.methods.ffsd import FFSDLoss, FFSDMaps
from fastokd.methods.method import MethodLoss, ramp_up
from fastokd.methods.one import ONELoss

__all__ = ["AFIDLoss", "AHBFLoss", "BaselineLoss", "FFSDLoss", "FFSDMaps", "GraphLoss", "MethodLoss", "ONELoss", "ramp_up"]
