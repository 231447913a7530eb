"""NVIDIA DALI as the decoder: fused decoding and cropping in C++ threads, or on the GPU and its
JPEG engine.

The pipeline is given every batch's files and windows instead of DALI's own readers and random
operators: a permutation of the whole epoch, whatever the layout, needs no buffer that shuffles only
what is near, and an interrupted epoch is continued from one number instead of from the pipeline's
serialised state.
"""

import os
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from fastokd.data.files import FileSplit
from fastokd.data.images import decode, default_workers, reason_of
from fastokd.data.loader import LoaderKind
from fastokd.data.random_crop import ATTEMPTS
from fastokd.data.stream import Decoded, Request, StreamLoader, read_options, scaled, stand_in
from fastokd.errors import (
    ConfigError,
    DataError,
    MissingExtra,
    did_you_mean,
    escape,
    first_line,
    summarize,
)

if TYPE_CHECKING:
    from nvidia.dali.pipeline import DataNode, Pipeline

DECODERS = ("auto", "cpu", "mixed")
RESIZERS = ("auto", "dali", "torch")
UNSUPPORTED = frozenset({".gif"})
"""Extensions that other loaders can decode and DALI cannot."""


@dataclass(frozen=True)
class DaliOptions:
    """What can be tuned; the defaults are set from the machine.

    Args:
        threads: CPU threads that read and decode; None for one per usable core, less the two of
            step and reading ahead where a GPU trains and there are more than four.
        prefetch: batches made ahead of the step, 1 or more.
        decoder: "cpu", "mixed" (the GPU with its JPEG engine), or "auto": mixed where the step runs
            on a GPU.
        resize: who scales decoded pictures: "dali", "torch" (in threads, where the step runs on the
            CPU), or "auto": the one that is faster, which is torch on a CPU, by five times, and
            DALI on a GPU.
        hw_decoder_load: the share of JPEG files that goes to the GPU's JPEG engine, in [0, 1]; the
            best value falls with the number of threads.
        width_hint, height_hint: the size of large pictures of the set; buffers on the GPU are made
            for it at the start, so that a large picture later on does not stop the pipeline to
            allocate. 0 for no hint.
        fancy_upsampling: chroma upsampling as libjpeg-turbo and therefore every other loader does
            it.
        mmap: map files into memory; False to read them, which suits network file systems.
    """

    threads: int | None = None
    prefetch: int = 2
    decoder: Literal["auto", "cpu", "mixed"] = "auto"
    resize: Literal["auto", "dali", "torch"] = "auto"
    hw_decoder_load: float = 0.65
    width_hint: int = 0
    height_hint: int = 0
    fancy_upsampling: bool = True
    mmap: bool = True

    def __post_init__(self) -> None:
        for name, good, rule in (
            ("threads", self.threads is None or self.threads >= 1, "1 or more"),
            ("prefetch", self.prefetch >= 1, "1 or more"),
            ("hw_decoder_load", 0 <= self.hw_decoder_load <= 1, "in [0, 1]"),
            ("width_hint", self.width_hint >= 0, "0 or more"),
            ("height_hint", self.height_hint >= 0, "0 or more"),
        ):
            if not good:
                raise ConfigError(f"{name}={getattr(self, name)}: it must be {rule}")
        for name, choices in (("decoder", DECODERS), ("resize", RESIZERS)):
            if getattr(self, name) not in choices:
                raise ConfigError(
                    f"unknown {name}"
                    f" '{getattr(self, name)}'{did_you_mean(getattr(self, name), choices)}"
                )


def missing_dali(device: torch.device | None = None) -> str | None:
    """Why DALI cannot run here, and what mends it; None if it can."""
    try:
        import nvidia.dali  # noqa: F401
    except ImportError as error:
        return (
            f"DALI cannot be imported ({first_line(error)}): pip install 'fastokd[dali]', or use"
            " --loader torchvision"
        )
    return None


def unsuitable_for_dali(split: FileSplit) -> str | None:
    """Which files of a split DALI cannot decode, going by their names, and what mends it; None if
    there are none.
    """
    strange = [name for name in split.files if os.path.splitext(name)[1].lower() in UNSUPPORTED]
    if not strange:
        return None
    return (
        f"split '{split.name}' of {escape(split.root)}: DALI cannot decode {summarize(strange)};"
        " convert them, or use --loader torchvision"
    )


class DaliLoader(StreamLoader):
    """Decodes with DALI; ``StreamLoader`` says what it promises.

    With ``device="cpu"`` it needs neither a GPU nor CUDA.

    Args:
        options: what can be tuned.
        settings: the arguments of ``StreamLoader``.

    Raises:
        MissingExtra: DALI is not installed.
        DataError: files of a format that DALI cannot decode, or as ``StreamLoader``.
        ConfigError: decoding on the GPU for a step on the CPU, or as ``StreamLoader``.
    """

    def __init__(
        self, *settings: Any, options: DaliOptions | Mapping[str, Any] | None = None, **named: Any
    ) -> None:
        if reason := missing_dali():
            raise MissingExtra(reason)
        self._pipeline: Pipeline | None = None
        super().__init__(*settings, **named)
        self.options = read_options(DaliOptions, options)
        if reason := unsuitable_for_dali(self.split):
            raise DataError(reason)
        on_gpu = self.device.type == "cuda"
        if self.options.decoder == "mixed" and not on_gpu:
            raise ConfigError(
                f"decoder='mixed' decodes on the GPU, and the step runs on {self.device}; use"
                " decoder=cpu"
            )
        if self.options.resize == "torch" and on_gpu:
            raise ConfigError(
                f"resize='torch' scales on the CPU, and the step runs on {self.device}; use"
                " resize=dali"
            )
        self._mixed = on_gpu and self.options.decoder != "cpu"
        self._by_torch = not on_gpu and self.options.resize != "dali"
        self._threads = self.options.threads or default_threads(on_gpu)
        self._pool: ThreadPoolExecutor | None = None
        self._device_id = gpu_number(self.device)
        self._requests: Iterator[Request] = iter(())
        self._in_flight: deque[Request] = deque()
        self._archives: dict[str, NDArray[np.uint8]] = {}

    def close(self) -> None:
        super().close()
        self._pipeline = None
        self._archives.clear()
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None

    def _frame(self, size: tuple[int, int]) -> None:
        super()._frame(size)
        self._pipeline = None  # made for one size

    def _decode(self, requests: Iterator[Request]) -> Generator[Decoded, None, None]:
        self._requests = requests
        ready: deque[Callable[[], Decoded]] = deque()
        try:
            while True:
                try:
                    images = self._run()
                except StopIteration:
                    break
                except (
                    Exception
                ) as error:  # DALI raises what its threads met, and the pipeline is lost
                    self._pipeline = None
                    self._find_bad(error)
                    continue
                ready.append(self._framed(images, self._in_flight.popleft()))
                if (
                    len(ready) > self._by_torch
                ):  # torch scales a batch while the one before it is used
                    yield ready.popleft()()
            while ready:
                yield ready.popleft()()
        finally:
            self._requests = iter(())
            self._drain()

    def _run(self) -> Any:
        """The next batch of the pipeline."""
        if self._pipeline is None:
            self._pipeline = self._build(
                self.views * self.batch_size, self.options.prefetch, self._feed
            )
        stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
        (images,) = self._pipeline.run(stream)
        return images

    def _framed(self, images: Any, request: Request) -> Callable[[], Decoded]:
        """A promise of the pipeline's batch in the size of the request."""
        if not self._by_torch:
            # No copy: the tensor keeps DALI's buffer until it is let go.
            pixels = torch.from_dlpack(images.as_tensor())
            return lambda: Decoded(pixels, request.index)
        if self._pool is None:
            # One thread each: torch's own would be one more for every core.
            self._pool = ThreadPoolExecutor(
                self._threads, "fastokd-resize", torch.set_num_threads, (1,)
            )
        count = len(request.index)
        out = torch.empty((count, *request.framing.size, 3), dtype=torch.uint8)

        def scale(part: range) -> None:
            for place in part:
                out[place] = scaled(
                    torch.from_dlpack(images[place]).permute(2, 0, 1), request.framing
                )

        chunk = -(-count // (2 * self._threads))
        tasks = [
            self._pool.submit(scale, range(start, min(start + chunk, count)))
            for start in range(0, count, chunk)
        ]

        def wait() -> Decoded:
            for task in tasks:
                task.result()
            return Decoded(out, request.index)

        return wait

    def _drain(self) -> None:
        """Let what is read ahead run out, so that the pipeline can begin anew."""
        try:
            while self._pipeline is not None:
                self._pipeline.run()
        except StopIteration:
            self._pipeline.reset()
        except Exception:  # a bad picture in a batch that nobody wants
            self._pipeline = None
        self._in_flight.clear()

    def _feed(self) -> tuple[Any, ...]:
        """Called by DALI when it has room for one more batch."""
        request = self._without_bad(next(self._requests))
        self._in_flight.append(request)
        return self._inputs(request)

    def _inputs(self, request: Request) -> tuple[Any, ...]:
        split, encoded = self.split, []
        for i in request.index.tolist():
            if split.members is None:
                encoded.append(np.frombuffer(os.fsencode(split.path(i)), np.uint8))
            else:
                start = int(split.members.offset[i])
                encoded.append(
                    self._archive(split.path(i))[start : start + int(split.members.size[i])]
                )
        return (encoded,) if request.candidates is None else (encoded, request.candidates)

    def _archive(self, path: str) -> NDArray[np.uint8]:
        if path not in self._archives:
            self._archives[path] = np.memmap(path, np.uint8, "r")
        return self._archives[path]

    def _find_bad(self, error: Exception) -> None:
        """Decode the pictures of the batches under way one by one, and put others in the place of
        those that cannot be.

        Raises:
            DataError: bad pictures are not to be replaced, or there is none, and DALI failed for
                another reason.
        """
        pending = list(self._in_flight)
        self._in_flight.clear()
        found: dict[int, str] = {}
        for request in pending:
            found |= self._probe(request)
            if found:
                break
        if not found:
            raise DataError(
                f"DALI failed on split '{self.split.name}' of {escape(self.split.root)}:"
                f" {dali_reason(error)}"
            ) from error
        self._note_bad(found)
        self._requests = chain(pending, self._requests)

    def _without_bad(self, request: Request) -> Request:
        """The request with stand-ins for the images that are known to be bad."""
        if not self.replaced:
            return request
        index = request.index.copy()
        for place, i in enumerate(index.tolist()):
            if i in self.replaced:
                index[place] = stand_in(self.split, i, self.replaced)
        return request._replace(index=index)

    def _probe(self, request: Request) -> dict[int, str]:
        """Why the pictures of a batch that cannot be decoded cannot be, by their place in the
        split.
        """
        found: dict[int, str] = {}
        waiting: deque[tuple[Any, ...]] = deque()
        pipeline = None

        def source() -> tuple[Any, ...]:
            return waiting.popleft()

        for place, i in enumerate(request.index.tolist()):
            candidates = (
                None if request.candidates is None else request.candidates[place : place + 1]
            )
            try:
                waiting.append(
                    self._inputs(
                        Request(request.framing, request.index[place : place + 1], candidates)
                    )
                )
                if pipeline is None:
                    pipeline = self._build(1, 1, source)
                pipeline.run()
            except Exception as error:
                pipeline = None
                waiting.clear()
                found[i] = self._why(i, error)
        return found

    def _why(self, index: int, error: Exception) -> str:
        """What is wrong with a picture, in fewer and better words than DALI's if it is known."""
        from io import BytesIO

        try:
            decode(BytesIO(self.split.read(index)))
        except Exception as known:
            return reason_of(known)
        return dali_reason(error)

    def _build(self, batch_size: int, prefetch: int, source: Any) -> "Pipeline":
        from nvidia.dali.pipeline import Pipeline

        pipeline = Pipeline(
            batch_size,
            self._threads,
            self._device_id,
            prefetch_queue_depth=prefetch,
            exec_dynamic=True,
        )
        with pipeline:
            pipeline.set_outputs(self._define(source))
        pipeline.build()
        return pipeline

    def _define(self, source: Any) -> "DataNode":
        """The pipeline from what ``_inputs`` gives to uint8 pictures, HWC: of one size, or as they
        are for torch to scale.
        """
        from nvidia.dali import fn, types

        framing, options, in_files = self.framing, self.options, self.split.members is None
        kinds = [types.UINT8, types.FLOAT64][: 2 if framing.random else 1]
        given = fn.external_source(
            source=source,
            num_outputs=len(kinds),
            dtype=kinds,
            ndim=1,
            batch=True,
            no_copy=not in_files,
        )
        encoded = (
            fn.io.file.read(given[0], dont_use_mmap=not options.mmap) if in_files else given[0]
        )
        how: dict[str, Any] = {
            "device": "mixed" if self._mixed else "cpu",
            "output_type": types.RGB,
            "adjust_orientation": True,
            "jpeg_fancy_upsampling": options.fancy_upsampling,
        }
        if self._mixed:
            how |= {
                "hw_decoder_load": options.hw_decoder_load,
                "preallocate_width_hint": options.width_hint,
                "preallocate_height_hint": options.height_hint,
            }
        if self._by_torch and not framing.random:
            return fn.decoders.image(encoded, **how)
        shape = fn.peek_image_shape(encoded, dtype=types.FLOAT64)
        height, width = shape[0], shape[1]
        if framing.random:
            top, left, height, width = _window(given[1], height, width, framing.augment.crop_ratio)
            pixels = fn.decoders.image_slice(
                encoded,
                start=_integers(top, left),
                shape=_integers(height, width),
                axes=(0, 1),
                **how,
            )
            if self._by_torch:
                return pixels
            return _resize(
                pixels if self._mixed or self._device_id is None else pixels.gpu(), framing.size
            )
        pixels = fn.decoders.image(encoded, **how)
        rows, columns = _cover(height, width, framing.cover_size)
        pixels = _resize(
            pixels if self._mixed or self._device_id is None else pixels.gpu(),
            _floats(rows, columns),
        )
        start = _integers(_central(rows, framing.size[0]), _central(columns, framing.size[1]))
        return fn.slice(pixels, start=start, shape=list(framing.size), axes=(0, 1))


def gpu_number(device: torch.device) -> int | None:
    """The number of a GPU, which without one is the current one as everywhere in torch; None for
    the CPU.
    """
    if device.type != "cuda":
        return None
    return torch.cuda.current_device() if device.index is None else device.index


def default_threads(beside_gpu: bool) -> int:
    """One thread per usable core but those that the rest needs: where a GPU trains and there are
    more than four, two for the step and reading ahead; without a GPU one, which scales the
    pictures.
    """
    cores = default_workers()
    if beside_gpu:
        return cores - 2 if cores > 4 else cores
    return max(1, cores - 1)


def dali_reason(error: Exception) -> str:
    """The one line of DALI's message that says what happened."""
    lines = [line.strip() for line in str(error).splitlines()]
    said = (
        [line for line in lines[lines.index("encountered:") + 1 :] if line]
        if "encountered:" in lines
        else []
    )
    return said[0][:160] if said else first_line(error)


def _resize(pixels: "DataNode", size: Any) -> "DataNode":
    """Scaled with a triangle filter as wide as it must be, as the other loaders do."""
    from nvidia.dali import fn, types

    return fn.resize(pixels, size=size, interp_type=types.INTERP_LINEAR, antialias=True)


def _integers(*values: "DataNode") -> "DataNode":
    from nvidia.dali import fn, types

    return fn.cast(fn.stack(*values), dtype=types.INT32)


def _floats(*values: "DataNode") -> "DataNode":
    from nvidia.dali import fn, types

    return fn.cast(fn.stack(*values), dtype=types.FLOAT)


def _window(
    candidates: "DataNode", height: "DataNode", width: "DataNode", ratio: tuple[float, float]
) -> "tuple[DataNode, DataNode, DataNode, DataNode]":
    """``random_crop.window`` in DALI's arithmetic: top, left, height, width as floating-point
    numbers.
    """
    from nvidia.dali import fn, math, types

    def single(values: "DataNode") -> "DataNode":  # whole numbers, and reductions take no doubles
        return fn.cast(values, dtype=types.FLOAT)

    areas, ratios = candidates[:ATTEMPTS] * (height * width), candidates[ATTEMPTS : 2 * ATTEMPTS]
    widths, heights = (
        math.floor(math.sqrt(areas * ratios) + 0.5),
        math.floor(math.sqrt(areas / ratios) + 0.5),
    )
    fits = single((widths >= 1.0) & (heights >= 1.0) & (widths <= width) & (heights <= height))
    attempts = types.Constant(np.arange(ATTEMPTS, dtype=np.float32))
    first = fn.reductions.min(attempts + ATTEMPTS * (1.0 - fits))
    chosen = single(attempts == first)
    found = single(first < float(ATTEMPTS))
    missing = 1.0 - found
    h = (
        fn.reductions.sum(chosen * single(heights)) * found
        + math.max(1.0, single(math.floor(math.min(height, width / ratio[0] + 0.5)))) * missing
    )
    w = (
        fn.reductions.sum(chosen * single(widths)) * found
        + math.max(1.0, single(math.floor(math.min(width, height * ratio[1] + 0.5)))) * missing
    )
    places = candidates[2 * ATTEMPTS], candidates[2 * ATTEMPTS + 1]
    top, left = (
        math.floor(place * (outer - inner + 1.0)) * found
        + math.floor((outer - inner) / 2.0) * missing
        for place, outer, inner in zip(places, (height, width), (h, w), strict=True)
    )
    return top, left, h, w


def _cover(
    height: "DataNode", width: "DataNode", size: tuple[int, int]
) -> "tuple[DataNode, DataNode]":
    """``random_crop.cover`` in DALI's arithmetic."""
    from nvidia.dali import math

    by_height = size[0] * width >= size[1] * height
    rows = math.max(float(size[0]), math.floor(size[1] * height / width))
    columns = math.max(float(size[1]), math.floor(size[0] * width / height))
    return by_height * float(size[0]) + (1.0 - by_height) * rows, by_height * columns + (
        1.0 - by_height
    ) * float(size[1])


def _central(outer: "DataNode", inner: int) -> "DataNode":
    """``random_crop.central`` in DALI's arithmetic: half of the difference, a half to the even
    side.
    """
    from nvidia.dali import math

    spare = outer - float(inner)
    half = math.floor(spare / 2.0)
    return half + (spare - 2.0 * half) * (half - 2.0 * math.floor(half / 2.0))


LOADER = LoaderKind(DaliLoader, decoded=False, missing=missing_dali, unsuitable=unsuitable_for_dali)
