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
    "fastokd.losses.graph_loss": ["GraphLoss"],
    "fastokd.losses.method_loss": ["MethodLoss"],
    "fastokd.methods.afid": ["AFIDLoss"],
    "fastokd.methods.ahbf": ["AHBFLoss"],
    "fastokd.methods.baseline": ["BaselineLoss"],
    "fastokd.methods.cl_ilr": ["CLILRLoss"],
    "fastokd.methods.dml": ["DMLLoss"],
    "fastokd.methods.ffm": ["FFMLoss"],
    "fastokd.methods.ffsd": ["FFSDLoss", "FFSDMaps"],
    "fastokd.methods.independent": ["IndependentLoss"],
    "fastokd.methods.kd": ["KDLoss"],
    "fastokd.methods.kdcl": ["KDCLLoss"],
    "fastokd.methods.method": ["ramp_up"],
    "fastokd.methods.okddip": ["OKDDipLoss"],
    "fastokd.methods.one": ["ONELoss"],
    "fastokd.methods.tsb": ["TSBLoss"],
}
_module_of = {name: module for module, names in _MODULES.items() for name in names}
__all__ = ["AFIDLoss", "AHBFLoss", "BaselineLoss", "CLILRLoss", "DMLLoss", "FFMLoss", "FFSDLoss"]
__all__ += ["FFSDMaps", "GraphLoss", "IndependentLoss", "KDCLLoss", "KDLoss", "MethodLoss"]
__all__ += ["OKDDipLoss", "ONELoss", "TSBLoss", "ramp_up"]


def __getattr__(name: str) -> Any:
    if name not in _module_of:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_module_of[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
