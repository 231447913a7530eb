"""The weights that torchvision and timm publish for their networks."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastokd.errors import CheckpointError, ConfigError, first_line
from fastokd.models.libraries import library_network
from fastokd.train.weight_files import current_names

_TRANSFORM_INPUT = ("googlenet", "inception_v3")
"""torchvision's networks that, with published weights, convert images from the normalization of
ImageNet to a mean and standard deviation of 0.5. They are built here without that conversion.
"""


class PretrainedWeights(NamedTuple):
    """Published weights of a network, which are downloaded by ``read``."""

    name: str
    """"torchvision:NAME" or "timm:NAME"."""
    num_classes: int
    mean: Sequence[float]
    """Of the normalization of images, 3 values."""
    std: Sequence[float]
    source: str
    """The URL of the file."""
    cache: str
    """The path at which the library looks for the file; empty if its cache has no simple paths."""
    load: Callable[[], Mapping[str, Tensor]]
    """Read the state dict from the library's cache, or download it first."""

    def read(self, fix: str) -> Mapping[str, Tensor]:
        """The state dict.

        Args:
            fix: how to use a copy of the file instead, for the error message.

        Raises:
            CheckpointError: the file is not in the cache and cannot be downloaded.
        """
        try:
            return current_names(self.load())
        except Exception as error:  # the libraries' downloads raise any exception
            cached = (
                f"copy that file to {self.cache}, or" if self.cache else "copy that file here and"
            )
            raise CheckpointError(
                f"the weights of {self.name} cannot be downloaded from {self.source}"
                f" ({first_line(error)}); without network access, {cached} {fix}"
            ) from error


def pretrained_weights(library: str, network: str) -> PretrainedWeights:
    """The default weights that a library publishes for its network; nothing is downloaded.

    Raises:
        ConfigError: the library has no such network, or no weights of it.
        MissingExtra: timm is not installed.
    """
    name = f"{library}:{network}"
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        library_network(name, 2)  # raises errors for unknown names
    find = _torchvision if library == "torchvision" else _timm
    if (weights := find(name, network)) is None:
        raise ConfigError(
            f"{library} publishes no weights of {name} and no normalization; pass a file of weights"
            " and the normalization data or imagenet"
        )
    return weights


def _torchvision(name: str, network: str) -> PretrainedWeights | None:
    import torchvision

    weights: Any = getattr(torchvision.models.get_model_weights(network), "DEFAULT", None)
    if weights is None:
        return None
    images, count = weights.transforms(), len(weights.meta["categories"])
    mean, std = images.mean, images.std
    if network in _TRANSFORM_INPUT:
        mean = std = [0.5, 0.5, 0.5]
    cache = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name

    def load() -> Mapping[str, Tensor]:
        # Without weights_only, torch.hub would unpickle the file.
        state: dict[str, Tensor] = weights.get_state_dict(
            progress=False, check_hash=True, weights_only=True, map_location="cpu"
        )
        return state

    return PretrainedWeights(name, count, mean, std, weights.url, str(cache), load)


def _timm(name: str, network: str) -> PretrainedWeights | None:
    import timm

    settings: Any = timm.get_pretrained_cfg(network)
    if settings is None or not settings.has_weights:
        return None
    source = settings.url
    if settings.hf_hub_id:
        file = settings.hf_hub_filename or "model.safetensors"
        source = f"https://huggingface.co/{settings.hf_hub_id}/resolve/main/{file}"

    def load() -> Mapping[str, Tensor]:
        with torch.random.fork_rng(devices=[]):
            return timm.create_model(network, pretrained=True).state_dict()

    normalization = settings.mean, settings.std
    return PretrainedWeights(name, settings.num_classes, *normalization, source, "", load)
