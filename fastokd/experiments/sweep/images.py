"""The datasets of the runs of a queue, each opened once."""

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
    """Opens datasets as runs do, but each of them once."""

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
        """The fingerprints of the datasets of configurations, by what they are of beside the data
        itself: decoded images of a size, or files.
        """
        found = {}
        for config in configs:
            dataset = self.of(config)
            found[
                f"images of size {config.image_size}" if isinstance(dataset, Dataset) else "files"
            ] = dataset.fingerprint
        return found

    def are_others(self, config: TrainConfig, fingerprint: str) -> bool:
        """Whether the images of a configuration are others than those that a run of it has recorded
        this fingerprint of.
        """
        dataset = self.of(config)
        if dataset.fingerprint == fingerprint:
            return False
        if (
            config.loader != "auto"
            or not made_of_files(config.data)
            or max(dataset.image_size) > SMALL
        ):
            return True
        # The memory that was free then decided whether small images were decoded, and the
        # fingerprint is of what was opened.
        return (
            self.of(
                replace(
                    config,
                    loader="resident" if isinstance(dataset, FileDataset) else next(file_loaders()),
                )
            ).fingerprint
            != fingerprint
        )
