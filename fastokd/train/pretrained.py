"""The weights that torchvision and timm publish for their networks."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastokd.errors import CheckpointError, ConfigError, first_line
from fastokd.models.libraries import library_network


class PretrainedWeights(NamedTuple):
    """Published weights of a network, which are downloaded by ``read``."""

    name: str
    """"torchvision:NAME" or "timm:NAME"."""
    num_classes: int
    mean: Sequence[float]
    """Of the normalization of images, 3 values."""
    std: Sequence[float]
    source: str
    """The URL of the file, or of the repository on the Hugging Face Hub."""
    load: Callable[[], Mapping[str, Tensor]]
    """Read the state dict from the library's cache, or download it first."""

    def read(self) -> Mapping[str, Tensor]:
        """The state dict; a ``CheckpointError`` names the source if it cannot be downloaded."""
        try:
            return self.load()
        except Exception as error:  # the libraries' downloads raise any exception
            raise CheckpointError(
                f"the weights of {self.name} cannot be downloaded from {self.source}"
                f" ({first_line(error)}); without network access, copy the file here and pass its"
                " path"
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
        raise ConfigError(f"{library} publishes no weights of {name}; pass a file of weights")
    return weights


def _torchvision(name: str, network: str) -> PretrainedWeights | None:
    import torchvision

    weights: Any = getattr(torchvision.models.get_model_weights(network), "DEFAULT", None)
    if weights is None:
        return None
    images, count = weights.transforms(), len(weights.meta["categories"])

    def load() -> Mapping[str, Tensor]:
        # Without weights_only, torch.hub would unpickle the file.
        state: dict[str, Tensor] = weights.get_state_dict(
            progress=False, check_hash=True, weights_only=True, map_location="cpu"
        )
        return state

    return PretrainedWeights(name, count, images.mean, images.std, weights.url, load)


def _timm(name: str, network: str) -> PretrainedWeights | None:
    import timm

    settings: Any = timm.get_pretrained_cfg(network)
    if settings is None or not settings.has_weights:
        return None
    source = settings.url
    if settings.hf_hub_id:
        source = f"https://huggingface.co/{settings.hf_hub_id}"

    def load() -> Mapping[str, Tensor]:
        with torch.random.fork_rng(devices=[]):
            return timm.create_model(network, pretrained=True).state_dict()

    normalization = settings.mean, settings.std
    return PretrainedWeights(name, settings.num_classes, *normalization, source, load)
