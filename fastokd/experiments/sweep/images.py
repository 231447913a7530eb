"""The datasets of a plan's runs, each opened once."""

from collections.abc import Iterable

import torch

from fastokd.data import Dataset
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
        fingerprints = {}
        for config in configs:
            dataset = self.of(config)
            decoded = isinstance(dataset, Dataset)
            form = f"images of size {config.image_size}" if decoded else "files"
            fingerprints[form] = dataset.fingerprint
        return fingerprints
