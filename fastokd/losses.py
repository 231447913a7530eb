"""The drop-in losses, gathered from the methods."""

from fastokd.methods.afid import AFIDLoss
from fastokd.methods.ahbf import AHBFLoss
from fastokd.methods.base import GraphLoss
from fastokd.methods.baseline import BaselineLoss
from fastokd.methods.cl_ilr import CLILRLoss
from fastokd.methods.dml import DMLLoss
from fastokd.methods.ffsd import FFSDLoss, FFSDMaps
from fastokd.methods.independent import IndependentLoss
from fastokd.methods.kd import KDLoss
from fastokd.methods.method import MethodLoss, ramp_up
from fastokd.methods.okddip import OKDDipLoss
from fastokd.methods.one import ONELoss

__all__ = [
    "AFIDLoss", "AHBFLoss", "BaselineLoss", "CLILRLoss", "DMLLoss", "FFSDLoss", "FFSDMaps", "GraphLoss", "IndependentLoss", "KDLoss",
    "MethodLoss", "OKDDipLoss", "ONELoss", "ramp_up",
]
