"""The public losses. A loss's module is imported when the loss is first used.

The list is lazy because the methods, whose losses it names, import this package's modules.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastokd.losses.graph_loss import GraphLoss as GraphLoss
    from fastokd.losses.method_loss import MethodLoss as MethodLoss
    from fastokd.methods.afid import AFIDLoss as AFIDLoss
    from fastokd.methods.ahbf import AHBFLoss as AHBFLoss
    from fastokd.methods.baseline import BaselineLoss as BaselineLoss
    from fastokd.methods.cl_ilr import CLILRLoss as CLILRLoss
    from fastokd.methods.dml import DMLLoss as DMLLoss
    from fastokd.methods.ffm import FFMLoss as FFMLoss
    from fastokd.methods.ffsd import FFSDLoss as FFSDLoss
    from fastokd.methods.ffsd import FFSDMaps as FFSDMaps
    from fastokd.methods.independent import IndependentLoss as IndependentLoss
    from fastokd.methods.kd import KDLoss as KDLoss
    from fastokd.methods.kdcl import KDCLLoss as KDCLLoss
    from fastokd.methods.method import ramp_up as ramp_up
    from fastokd.methods.okddip import OKDDipLoss as OKDDipLoss
    from fastokd.methods.one import ONELoss as ONELoss
    from fastokd.methods.tsb import TSBLoss as TSBLoss

_MODULES = {
    "AFIDLoss": "fastokd.methods.afid",
    "AHBFLoss": "fastokd.methods.ahbf",
    "BaselineLoss": "fastokd.methods.baseline",
    "CLILRLoss": "fastokd.methods.cl_ilr",
    "DMLLoss": "fastokd.methods.dml",
    "FFMLoss": "fastokd.methods.ffm",
    "FFSDLoss": "fastokd.methods.ffsd",
    "FFSDMaps": "fastokd.methods.ffsd",
    "GraphLoss": "fastokd.losses.graph_loss",
    "IndependentLoss": "fastokd.methods.independent",
    "KDCLLoss": "fastokd.methods.kdcl",
    "KDLoss": "fastokd.methods.kd",
    "MethodLoss": "fastokd.losses.method_loss",
    "OKDDipLoss": "fastokd.methods.okddip",
    "ONELoss": "fastokd.methods.one",
    "TSBLoss": "fastokd.methods.tsb",
    "ramp_up": "fastokd.methods.method",
}

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


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
