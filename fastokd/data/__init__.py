"""Datasets decoded once, and loaders that make their batches on the device."""

from fastokd.data.augment import Augment
from fastokd.data.dataset import Dataset, DataSource, Split
from fastokd.data.files import FileDataset, FileSplit
from fastokd.data.loader import (
    Batch,
    Loader,
    LoaderKind,
    list_loaders,
    make_loader,
    register_loader,
)
from fastokd.data.registry import (
    DatasetKind,
    EvaluationSet,
    ReadOptions,
    absolute_spec,
    list_datasets,
    list_evaluation,
    list_files,
    list_source,
    made_of_files,
    open_dataset,
    open_evaluation,
    register_dataset,
)
from fastokd.data.resident import ResidentLoader

__all__ = [
    "Augment",
    "Batch",
    "DataSource",
    "Dataset",
    "DatasetKind",
    "EvaluationSet",
    "FileDataset",
    "FileSplit",
    "Loader",
    "LoaderKind",
    "ReadOptions",
    "ResidentLoader",
    "Split",
    "absolute_spec",
    "list_datasets",
    "list_evaluation",
    "list_files",
    "list_loaders",
    "list_source",
    "made_of_files",
    "make_loader",
    "open_dataset",
    "open_evaluation",
    "register_dataset",
    "register_loader",
]
