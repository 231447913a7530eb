"""Datasets decoded once, and loaders that make their batches on the device."""

from fastokd.data.augment import Augment
from fastokd.data.dataset import Dataset, DataSource, Split
from fastokd.data.loader import Batch, Loader, ResidentLoader, make_loader
from fastokd.data.registry import (
    DatasetKind,
    EvaluationSet,
    ReadOptions,
    absolute_spec,
    list_datasets,
    open_dataset,
    open_evaluation,
    register_dataset,
)

__all__ = [
    "Augment", "Batch", "DataSource", "Dataset", "DatasetKind", "EvaluationSet", "Loader", "ReadOptions", "ResidentLoader", "Split", "absolute_spec",
    "list_datasets", "make_loader", "open_dataset", "open_evaluation", "register_dataset",
]
