"""The datasets of a plan's runs, each opened once."""

from collections.abc import Iterable
from dataclasses import replace

import torch

from fastokd.data import Dataset, FileDataset, made_of_files
from fastokd.data.files import SMALL
from fastokd.data.loader import file_loaders
from fastokd.train.config import TrainConfig
from fastokd.train.data import AnyDataset, open_data
from fastokd.train.progress import Counter


class Datasets:
    """Opens datasets as runs do, each of them once."""

    def __init__(self) -> None:
        self._opened: dict[str, AnyDataset] = {}

    def of(self, config: TrainConfig) -> AnyDataset:
        """The dataset of a configuration.

        Raises:
            ConfigError, DataError: see ``open_data``.
        """
        key = repr(
            [config.data, config.image_size, config.val_split, config.loader, config.bad_images]
        )
        if key not in self._opened:
            counter = Counter("reading images")
            try:
                self._opened[key] = open_data(config, torch.device("cpu"), progress=counter)
            finally:
                counter.close()
        return self._opened[key]

    def fingerprints(self, configs: Iterable[TrainConfig]) -> dict[str, str]:
        """The fingerprints of the datasets, by form: files, or decoded images of a size."""
        datasets = [(config, self.of(config)) for config in configs]
        return {
            (
                f"images of size {config.image_size}" if isinstance(dataset, Dataset) else "files"
            ): dataset.fingerprint
            for config, dataset in datasets
        }

    def differ(self, config: TrainConfig, fingerprint: str) -> bool:
        """Whether a configuration's images differ from those of a recorded fingerprint."""
        dataset = self.of(config)
        if dataset.fingerprint == fingerprint:
            return False
        undecided = (
            config.loader == "auto"
            and made_of_files(config.data)
            and max(dataset.image_size) <= SMALL
        )
        if not undecided:
            return True
        # The memory that was free decides whether small images are decoded, and the fingerprint
        # depends on that.
        loader = "resident" if isinstance(dataset, FileDataset) else next(file_loaders())
        return self.of(replace(config, loader=loader)).fingerprint != fingerprint
