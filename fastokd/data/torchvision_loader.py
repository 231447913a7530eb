"""torchvision as the decoder, in worker processes: available wherever torch is."""

import functools
import math
import multiprocessing
import signal
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastokd.data import stream
from fastokd.data.decoding import JPEG, Color, check_jpeg_rows, decode, decodes_alike
from fastokd.data.files import FileSplit, replacement_index
from fastokd.data.images import reason_of, workers_per_process
from fastokd.data.loader import LoaderKind
from fastokd.data.policies import POLICIES
from fastokd.data.random_crop import window
from fastokd.data.stream import Decoded, Request, StreamLoader
from fastokd.errors import DataError


@dataclass(frozen=True)
class TorchvisionOptions:
    """Options of the torchvision loader.

    Args:
        workers: processes that decode; None for one per usable core, 0 to decode in the training
            process.
        prefetch: batches that each worker makes ahead of the step, 1 or more.
        start_method: how workers are started: "forkserver", "spawn" or "fork". Forking the training
            process is fastest, but kills workers that are forked while DALI or another library runs
            threads in it.
        timeout: seconds to wait for a batch before the run is stopped; 0 for no limit.
    """

    workers: int | None = None
    prefetch: int = 2
    start_method: str = "forkserver"
    timeout: float = 0.0

    def __post_init__(self) -> None:
        methods = multiprocessing.get_all_start_methods()
        some, any_number = (1, math.inf), (0, math.inf)
        stream.check_options(
            self, workers=any_number, prefetch=some, start_method=methods, timeout=any_number
        )


class TorchvisionLoader(StreamLoader):
    """Decode in worker processes, which live until ``close``. They receive crop windows and files,
    and draw no random numbers.

    Args:
        options: see ``TorchvisionOptions``.
        arguments, settings: the arguments of ``StreamLoader``.

    Raises:
        ConfigError, DataError: as ``StreamLoader``.
    """

    def __init__(
        self,
        *arguments: Any,
        options: TorchvisionOptions | Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(*arguments, **settings)
        self.options = stream.read_options(TorchvisionOptions, options)
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
                pixels, indices, corrupt, failure = next(batches)
            except StopIteration:
                return
            except RuntimeError as error:  # a worker was killed, crashed or is out of time
                self._workers = None
                raise DataError(explain_lost_worker(error)) from error
            if corrupt:
                self._note_corrupt(corrupt)
            if failure:
                raise DataError(failure)
            yield Decoded(pixels, indices.numpy())

    def _start(self) -> DataLoader[Any]:
        options = self.options
        workers = workers_per_process() if options.workers is None else options.workers
        multiple: dict[str, Any] = {}
        if workers:
            if options.start_method == "forkserver":  # import once, not in each worker
                multiprocessing.set_forkserver_preload([__name__, "torchvision.transforms.v2"])
            multiple = {
                "worker_init_fn": _ignore_interrupts,
                "persistent_workers": True,
                "prefetch_factor": options.prefetch,
                "multiprocessing_context": options.start_method,
                "timeout": options.timeout,
            }
        return DataLoader(
            _Batches(self.split, self.train and self.bad_images == "replace"),
            batch_size=None,
            sampler=self._requests,
            num_workers=workers,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # the default one is that of the network's layers
            **multiple,
        )


def explain_lost_worker(error: RuntimeError) -> str:
    """The message of a ``DataLoader`` whose workers failed, with the probable cause and a fix."""
    texts = [str(each).strip().rstrip(".") for each in (error, error.__cause__) if each]
    text = "; ".join(dict.fromkeys(texts))
    if any(word in text for word in ("signal: Killed", "Bus error", "shared memory")):
        return f"{text}; a smaller --batch-size or fewer workers need less memory"
    if "timed out" in text:
        return f"{text}; reading or decoding is slow: pass a larger timeout, or timeout=0"
    if "Too many open files" in text:
        return text
    return (
        f"{text}; a file may crash the decoder: 'fastokd data check DATA' finds it, or pass"
        " --loader-options workers=0 to see the error"
    )


def _ignore_interrupts(_: int) -> None:
    """Leave Ctrl-C, which a terminal sends to workers too, to the training process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class _Requests:
    """The sampler of a ``DataLoader`` that lives for several epochs: the remaining requests."""

    remaining: Iterator[Request] = iter(())

    def __iter__(self) -> Iterator[Request]:
        return self.remaining

    def __len__(self) -> int:
        raise TypeError("the number of requests is unknown")


class _Batches(Dataset[Any]):
    """Decoded batches by request; lives in the workers."""

    def __init__(self, split: FileSplit, replace: bool) -> None:
        self.split, self.replace = split, replace

    def __getitem__(self, request: Request) -> tuple[Tensor, Tensor, dict[int, str], str]:
        """The images [B, H, W, 3] of a request, their actual indices, the reason for each corrupt
        image, and the error if one cannot be replaced.
        """
        indices, failure = request.indices.copy(), ""
        corrupt: dict[int, str] = {}
        pixels = torch.empty((len(indices), *request.framing.size, 3), dtype=torch.uint8)
        for row, i in enumerate(indices.tolist()):
            candidate = None if request.candidates is None else request.candidates[row]
            try:
                while not self._decode_into(pixels[row], i, request, candidate, corrupt):
                    if not self.replace:
                        break
                    i = replacement_index(self.split, i, corrupt)
            except DataError as error:
                failure = str(error)
            indices[row] = i
        if request.draws is not None and not failure:
            pixels = stream.with_policy(pixels, request.framing.augment, request.draws)
        return pixels, torch.from_numpy(indices), corrupt, failure

    def _decode_into(
        self, out: Tensor, i: int, request: Request, candidate: Any, corrupt: dict[int, str]
    ) -> bool:
        try:
            image = decode_rgb(self.split.read(i), self.split.background)
            if candidate is not None:
                ratio = request.framing.augment.crop_ratio
                top, left, height, width = window(candidate, image.shape[1], image.shape[2], ratio)
                image = image[:, top : top + height, left : left + width]
            out.copy_(stream.scaled(image, request.framing))
        except Exception as error:  # a decoder may raise any exception for damaged bytes
            corrupt[i] = reason_of(error)
            return False
        return True


def decode_rgb(data: bytes, background: Color | None = None) -> Tensor:
    """Decode an image into uint8 [3, H, W], upright, in RGB; ``background`` is as in ``decode``.

    JPEG uses torchvision's decoder while it exists (0.29 deprecates it), where it returns the same
    pixels as Pillow: it is a quarter faster. Other files use Pillow: torchvision supports fewer
    formats, and some damaged PNG files crash its process.

    Raises:
        Exception: any exception of the decoder, for bytes that are not an image.
    """
    fast = jpeg_decoder() if data.startswith(JPEG) and decodes_alike(data) else None
    if fast is None:
        return torch.from_numpy(np.array(decode(BytesIO(data), background))).permute(2, 0, 1)
    image = fast(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    if image.ndim == 3 and bool((image[:, -1] == 128).all()):
        check_jpeg_rows(data, image[:, -1].numpy())
    return image


@functools.cache
def jpeg_decoder() -> Callable[[Tensor], Tensor] | None:
    """torchvision's decoder of JPEG files to upright RGB; None if this version lacks it."""
    try:
        from torchvision.io import ImageReadMode, decode_jpeg
    except ImportError:
        return None
    return functools.partial(decode_jpeg, mode=ImageReadMode.RGB, apply_exif_orientation=True)


LOADER = LoaderKind(TorchvisionLoader, decoded=False, policies=tuple(POLICIES))
