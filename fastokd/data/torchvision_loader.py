"""torchvision as the decoder, in worker processes: what runs wherever torch does."""

import functools
import multiprocessing
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastokd.data.files import FileSplit
from fastokd.data.images import decode, default_workers, reason_of
from fastokd.data.loader import LoaderKind
from fastokd.data.random_crop import window
from fastokd.data.stream import Decoded, Request, StreamLoader, read_options, scaled, stand_in
from fastokd.errors import ConfigError, DataError, did_you_mean

JPEG = b"\xff\xd8\xff"


@dataclass(frozen=True)
class TorchvisionOptions:
    """What can be tuned; the defaults are set from the machine.

    Args:
        workers: processes that decode; None for one per usable core, 0 to decode in the training
            process.
        prefetch: batches that each worker makes ahead of the step, 1 or more.
        start_method: how workers are started: "forkserver", "spawn" or "fork". Forking the training
            process itself starts fastest, and takes workers down that are forked while DALI or
            another library runs threads in it.
        timeout: seconds to wait for a batch before the run is stopped; 0 to wait for ever.
    """

    workers: int | None = None
    prefetch: int = 2
    start_method: str = "forkserver"
    timeout: float = 0.0

    def __post_init__(self) -> None:
        for name, good, rule in (
            ("workers", self.workers is None or self.workers >= 0, "0 or more"),
            ("prefetch", self.prefetch >= 1, "1 or more"),
            ("timeout", self.timeout >= 0, "0 or more"),
        ):
            if not good:
                raise ConfigError(f"{name}={getattr(self, name)}: it must be {rule}")
        methods = multiprocessing.get_all_start_methods()
        if self.start_method not in methods:
            raise ConfigError(
                "unknown start_method"
                f" '{self.start_method}'{did_you_mean(self.start_method, methods)}"
            )


class TorchvisionLoader(StreamLoader):
    """Decodes in worker processes; ``StreamLoader`` says what it promises.

    The workers live until ``close``. They are handed windows and files and draw nothing themselves.

    Args:
        options: what can be tuned.
        settings: the arguments of ``StreamLoader``.

    Raises:
        ConfigError, DataError: as ``StreamLoader``.
    """

    def __init__(
        self,
        *settings: Any,
        options: TorchvisionOptions | Mapping[str, Any] | None = None,
        **named: Any,
    ) -> None:
        super().__init__(*settings, **named)
        self.options = read_options(TorchvisionOptions, options)
        self._requests = _Requests()
        self._workers: DataLoader[Any] | None = None

    def close(self) -> None:
        super().close()
        self._workers = None

    def _decode(self, requests: Iterator[Request]) -> Generator[Decoded, None, None]:
        self._requests.remaining = requests
        if self._workers is None:
            self._workers = self._start()
        batches = iter(self._workers)
        while True:
            try:
                pixels, index, bad, hopeless = next(batches)
            except StopIteration:
                return
            except (
                RuntimeError
            ) as error:  # a worker was killed, timed out, or ran out of shared memory
                self._workers = None
                raise DataError(
                    f"{error}; a smaller --batch-size or fewer workers need less memory"
                ) from error
            if bad:
                self._note_bad(bad)
            if hopeless:
                raise DataError(hopeless)
            yield Decoded(pixels, index.numpy())

    def _start(self) -> DataLoader[Any]:
        options = self.options
        workers = default_workers() if options.workers is None else options.workers
        several: dict[str, Any] = {}
        if workers:
            if options.start_method == "forkserver":
                multiprocessing.set_forkserver_preload(
                    [__name__, "torchvision.transforms.v2"]
                )  # imported once, not in each worker
            several = {
                "persistent_workers": True,
                "prefetch_factor": options.prefetch,
                "multiprocessing_context": options.start_method,
                "timeout": options.timeout,
            }
        return DataLoader(
            _Pictures(self.split, self.train and self.bad_images == "replace"),
            batch_size=None,
            sampler=self._requests,
            num_workers=workers,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),
            **several,
        )  # its own: without one it draws from what the network's layers draw from


class _Requests:
    """The sampler of a ``DataLoader`` that outlives the epochs: it gives whatever requests remain
    now.
    """

    remaining: Iterator[Request] = iter(())

    def __iter__(self) -> Iterator[Request]:
        return self.remaining

    def __len__(self) -> int:
        raise TypeError("requests are not counted here")


class _Pictures(Dataset):
    """Decoded batches by request; lives in the workers."""

    def __init__(self, split: FileSplit, replace: bool) -> None:
        self.split, self.replace = split, replace

    def __getitem__(self, request: Request) -> tuple[Tensor, Tensor, dict[int, str], str]:
        """The pictures [B, H, W, 3] asked for, the images they are, the bad ones and why, and why
        one has no stand-in.
        """
        index, bad, hopeless = request.index.copy(), {}, ""
        pixels = torch.empty((len(index), *request.framing.size, 3), dtype=torch.uint8)
        for place, i in enumerate(index.tolist()):
            candidate = None if request.candidates is None else request.candidates[place]
            try:
                while (
                    not self._decode_into(pixels[place], i, request, candidate, bad)
                    and self.replace
                ):
                    i = stand_in(self.split, i, bad)
            except DataError as error:
                hopeless = str(error)
            index[place] = i
        return pixels, torch.from_numpy(index), bad, hopeless

    def _decode_into(
        self, out: Tensor, i: int, request: Request, candidate: Any, bad: dict[int, str]
    ) -> bool:
        try:
            picture = decode_rgb(self.split.read(i))
            if candidate is not None:
                top, left, height, width = window(
                    candidate, *picture.shape[1:], request.framing.augment.crop_ratio
                )
                picture = picture[:, top : top + height, left : left + width]
            out.copy_(scaled(picture, request.framing))
        except Exception as error:  # a decoder may raise anything at all for damaged bytes
            bad[i] = reason_of(error)
            return False
        return True


def decode_rgb(data: bytes) -> Tensor:
    """An encoded picture as uint8 [3, H, W], upright, in RGB.

    JPEG by torchvision's decoder, which gives the pixels that Pillow does a quarter faster, as long
    as there is one (0.29 calls it deprecated); everything else by Pillow, because torchvision knows
    fewer formats, and some damaged PNG files take its process down.

    Raises:
        Exception: whatever the decoder raises for bytes that are no picture.
    """
    if data.startswith(JPEG) and (decode_jpeg := _jpeg_decoder()) is not None:
        return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    return torch.from_numpy(np.array(decode(BytesIO(data)))).permute(2, 0, 1)


@functools.cache
def _jpeg_decoder() -> Callable[[Tensor], Tensor] | None:
    try:
        from torchvision.io import ImageReadMode, decode_jpeg
    except ImportError:
        return None
    return functools.partial(decode_jpeg, mode=ImageReadMode.RGB, apply_exif_orientation=True)


LOADER = LoaderKind(TorchvisionLoader, decoded=False)
