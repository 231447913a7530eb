"""The drop-in losses, gathered from the methods."""

from fastokd.methods.afid import AFIDLoss
from fastokd.methods.ahbf import AHBFLoss
from fastokd.methods.base import GraphLoss
from fastokd.methods.baseline import BaselineLoss
from fastokd.methods.cl_ilr import CLILRLoss
from fastokd.methods.dml import DMLLoss
from fastokd.methods.ffm import FFMLoss
from fastokd.methods.ffsd import FFSDLoss, FFSDMaps
from fastokd.methods.independent import IndependentLoss
from fastokd.methods.kd import KDLoss
from fastokd.methods.kdcl import KDCLLoss
from fastokd.methods.method import MethodLoss, ramp_up
from fastokd.methods.okddip import OKDDipLoss
from fastokd.methods.one import ONELoss
from fastokd.methods.tsb import TSBLoss

__all__ = [
    "AFIDLoss",
    "AHBFLoss",
    "BaselineLoss",
    "CLILRLoss",
    "DMLLoss",
    "FFMLoss",
    "FFSDLoss",
    "FFSDMaps",
    "GraphLoss",
    "IndependentLoss",
    "KDCLLoss",
    "KDLoss",
    "MethodLoss",
    "OKDDipLoss",
    "ONELoss",
    "TSBLoss",
    "ramp_up",
]
