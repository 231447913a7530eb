"""NVIDIA DALI as the decoder: fused decoding and cropping in C++ threads, or on the GPU and its
JPEG engine.

The pipeline receives each batch's files and crop windows, instead of DALI's readers and random
operators. So an epoch is a full permutation for any layout, without a shuffle buffer, and an
interrupted epoch is resumed from one number instead of the pipeline's serialized state.
"""

import math
import os
import tempfile
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from fastokd.data import dali_policies, stream
from fastokd.data.dali_arithmetic import Node, central, cover, dali, has_gray_edge, integers, window
from fastokd.data.dali_policies import DaliPolicy
from fastokd.data.decoding import (
    EXTENSIONS,
    HEADER_BYTES,
    central_part,
    decodes_alike,
    is_plain_jpeg,
)
from fastokd.data.files import FileSplit, read_bytes, replacement_index
from fastokd.data.images import reason_of, workers_per_process
from fastokd.data.loader import LoaderKind
from fastokd.data.stream import Decoded, Framing, Request, StreamLoader
from fastokd.errors import ConfigError, DataError, MissingExtra, first_line, summarize

if TYPE_CHECKING:
    from nvidia.dali.pipeline import Pipeline

DECODERS = ("auto", "cpu", "mixed")
RESIZERS = ("auto", "dali", "torch")
_SUPPORTED = "bmp jfif jpe jpeg jpg mpo pgm png pnm ppm tif tiff webp"
UNSUPPORTED = EXTENSIONS - {f".{name}" for name in _SUPPORTED.split()}
"""Extensions that other loaders can decode and DALI cannot."""


@dataclass(frozen=True)
class DaliOptions:
    """Options of the DALI loader; the defaults depend on the machine.

    Args:
        threads: CPU threads that read and decode; None for one per usable core, minus two for the
            step and reading ahead if a GPU trains and there are more than four.
        prefetch: batches made ahead of the step, 1 or more.
        decoder: "cpu", "mixed" (the GPU with its JPEG engine), or "auto": mixed if the step runs on
            a GPU.
        resize: the library that scales decoded images: "dali", "torch" (in threads, only if the
            step runs on the CPU), or "auto": the faster one, which is torch on a CPU (five times
            faster) and DALI on a GPU.
        hw_decoder_load: the share of JPEG files for the GPU's JPEG engine, in [0, 1]; the best
            value decreases with the number of threads.
        width_hint, height_hint: the size of the dataset's large images; GPU buffers are allocated
            for it at the start, so that a large image does not stall the pipeline later. 0 for no
            hint.
        fancy_upsampling: chroma upsampling as in libjpeg-turbo and therefore all other loaders.
        mmap: map files into memory; False reads them, which suits network file systems.
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
        some, any_size = (1, math.inf), (0, math.inf)
        stream.check_options(self, threads=some, prefetch=some, hw_decoder_load=(0, 1))
        stream.check_options(self, decoder=DECODERS, resize=RESIZERS)
        stream.check_options(self, width_hint=any_size, height_hint=any_size)


def missing_dali(device: torch.device | None = None) -> str | None:
    """The reason why DALI cannot run here, with the fix; None if it can."""
    try:
        import nvidia.dali  # noqa: F401
    except ImportError as error:
        fix = "pip install -e '.[dali]', or use --loader torchvision"
        return f"DALI cannot be imported ({first_line(error)}): {fix}"
    return None


def unsuitable_for_dali(split: FileSplit) -> str | None:
    """The files of a split that DALI cannot decode, by their names, with the fix, or None."""
    names = [name for name in split.files if os.path.splitext(name)[1].lower() in UNSUPPORTED]
    fix = "convert them, or use --loader torchvision"
    return f"{split.where}: DALI cannot decode {summarize(names)}; {fix}" if names else None


class Rewritten:
    """Temporary files with images that were decoded on the host, by the request they belong to."""

    def __init__(self) -> None:
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._files: dict[int, list[str]] = {}
        self._count = 0

    def write(self, content: bytes, request: Request) -> str:
        """Write a file and return its path; no two files have the same."""
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="fastokd-dali-")
        path = os.path.join(self._folder.name, f"{self._count}.ppm")
        self._count += 1
        with open(path, "wb") as file:
            file.write(content)
        self._files.setdefault(id(request), []).append(path)
        return path

    def forget(self, request: Request) -> None:
        """Delete the files of a request."""
        for path in self._files.pop(id(request), ()):
            os.remove(path)

    def clear(self) -> None:
        """Delete all files."""
        if self._folder is not None:
            self._folder.cleanup()
        self._folder = None
        self._files.clear()


class DaliLoader(StreamLoader):
    """Decode with DALI. With ``device="cpu"`` it needs neither a GPU nor CUDA.

    Args:
        options: see ``DaliOptions``.
        arguments, settings: the arguments of ``StreamLoader``.

    Raises:
        MissingExtra: DALI is not installed.
        DataError: files of a format that DALI cannot decode, or as ``StreamLoader``.
        ConfigError: decoding on the GPU for a step on the CPU, or as ``StreamLoader``.
    """

    def __init__(
        self,
        *arguments: Any,
        options: DaliOptions | Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        if reason := missing_dali():
            raise MissingExtra(reason)
        self._pipeline: Pipeline | None = None
        super().__init__(*arguments, **settings)
        self.options = stream.read_options(DaliOptions, options)
        if reason := unsuitable_for_dali(self.split):
            raise DataError(reason)
        on_gpu = self.device.type == "cuda"
        runs = f"and the step runs on {self.device}"
        if self.options.decoder == "mixed" and not on_gpu:
            raise ConfigError(f"decoder='mixed' decodes on the GPU, {runs}; use decoder=cpu")
        if self.options.resize == "torch" and on_gpu:
            raise ConfigError(f"resize='torch' scales on the CPU, {runs}; use resize=dali")
        self._policy = self._open_policy()
        self._mixed = on_gpu and self.options.decoder != "cpu"
        self._by_torch = not on_gpu and self.options.resize != "dali" and self._policy is None
        self._threads = self.options.threads or default_threads(on_gpu)
        self._pool: ThreadPoolExecutor | None = None
        self._device_id = gpu_number(self.device)
        self._requests: Iterator[Request] = iter(())
        self._in_flight: deque[Request] = deque()
        self._archives: dict[str, NDArray[np.uint8]] = {}
        self._by_pillow: dict[int, bool] = {}
        self._complete: set[int] = set()
        self._rewritten = Rewritten()

    def _open_policy(self) -> DaliPolicy | None:
        """The augmentation policy, which DALI applies to images that it has scaled."""
        if not (self.train and self.augment.has_policy):
            return None
        given = f"auto_augment={self.augment.policy} and loader dali"
        if self.augment.policy not in dali_policies.POLICIES:
            raise ConfigError(f"{given}: DALI does not have this policy; use --loader torchvision")
        if self.options.resize == "torch":
            raise ConfigError(f"{given}: resize='torch' is not supported; use resize=dali")
        if self.augment.pad and self.augment.padding != "zero":
            fix = "use --padding zero or --loader torchvision"
            raise ConfigError(f"{given}: padding={self.augment.padding} is not supported; {fix}")
        return DaliPolicy(self.augment)

    def close(self) -> None:
        super().close()
        self._pipeline = None
        self._archives.clear()
        self._rewritten.clear()
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None

    def _frame(self, size: tuple[int, int]) -> None:
        super()._frame(size)
        self._pipeline = None  # a pipeline has a fixed size

    def _decode(self, requests: Iterator[Request]) -> Generator[Decoded, None, None]:
        self._requests = requests
        ready: deque[Callable[[], Decoded]] = deque()
        try:
            while True:
                try:
                    images, gray = self._run()
                except StopIteration:
                    break
                except Exception as error:  # raised by DALI's threads; the pipeline is unusable
                    self._find_corrupt(error)
                    continue
                request = self._in_flight.popleft()
                self._rewritten.forget(request)
                if corrupt := self._without_rows(request, gray):
                    self._note_corrupt(corrupt)
                    self._repeat([request, *self._in_flight])
                    continue
                ready.append(self._framed(images, request))
                # torch scales a batch while the previous one is used.
                if len(ready) > self._by_torch:
                    yield ready.popleft()()
            while ready:
                yield ready.popleft()()
        finally:
            self._requests = iter(())
            self._drain()

    def _run(self) -> tuple[Any, Any]:
        """The next batch of the pipeline: images, and whether they have a gray edge."""
        if self._pipeline is None:
            count = self.views * self.batch_size
            self._pipeline = self._build(count, self.options.prefetch, self._feed)
        on_gpu = self._device_id is not None
        stream = torch.cuda.current_stream(self.device) if on_gpu else None
        images, gray = self._pipeline.run(stream)
        return images, gray

    def _without_rows(self, request: Request, gray: Any) -> dict[int, str]:
        """The reason for each image of a batch with missing rows, by its index: DALI fills them
        with gray. Images with a gray edge are decoded once more, by Pillow, which finds out.
        """
        corrupt = {}
        for i in request.indices[np.flatnonzero(gray.as_array())].tolist():
            if i not in self._complete:
                try:
                    self.split.decode(i)
                except Exception as error:  # a decoder may raise any exception for damaged bytes
                    corrupt[i] = reason_of(error)
                else:
                    self._complete.add(i)
        return corrupt

    def _repeat(self, pending: list[Request]) -> None:
        """Decode these batches again, in a new pipeline."""
        self._pipeline = None
        self._in_flight.clear()
        self._rewritten.clear()
        self._requests = chain(pending, self._requests)

    def _framed(self, images: Any, request: Request) -> Callable[[], Decoded]:
        """A function that waits for the pipeline's batch in the requested size."""
        if not self._by_torch:
            # No copy: the tensor keeps DALI's buffer until it is released.
            pixels = torch.from_dlpack(images.as_tensor())
            return lambda: Decoded(pixels, request.indices)
        if self._pool is None:
            # One thread each: torch's own threads would add one for every core.
            self._pool = ThreadPoolExecutor(
                self._threads, "fastokd-resize", torch.set_num_threads, (1,)
            )

        count = len(request.indices)
        out = torch.empty((count, *request.framing.size, 3), dtype=torch.uint8)

        def scale(rows: range) -> None:
            for row in rows:
                image = torch.from_dlpack(images[row]).permute(2, 0, 1)
                out[row] = stream.scaled(image, request.framing)

        chunk = -(-count // (2 * self._threads))
        starts = range(0, count, chunk)
        tasks = self._pool.map(scale, (range(i, min(i + chunk, count)) for i in starts))

        def wait() -> Decoded:
            list(tasks)  # raises their errors
            return Decoded(out, request.indices)

        return wait

    def _drain(self) -> None:
        """Discard the batches read ahead, so that the pipeline can start again."""
        if self._pipeline is not None:
            try:
                while True:
                    self._pipeline.run()
            except StopIteration:
                self._pipeline.reset()
            except Exception:  # a corrupt image in a discarded batch
                self._pipeline = None
        self._in_flight.clear()
        self._rewritten.clear()

    def _feed(self) -> tuple[Any, ...]:
        """Called by DALI when it can read one more batch."""
        request = self._without_corrupt(next(self._requests))
        self._in_flight.append(request)
        return self._inputs(request)

    def _inputs(self, request: Request) -> tuple[Any, ...]:
        encoded = []
        for i in request.indices.tolist():
            path, start, size = self.split.location(i)
            if self._needs_pillow(i):
                content = self._decode_on_host(i, request.framing)
                if size < 0:
                    path = self._rewritten.write(content, request)
                else:
                    encoded.append(np.frombuffer(content, np.uint8))
                    continue
            if size < 0:
                encoded.append(np.frombuffer(os.fsencode(path), np.uint8))
            else:
                encoded.append(self._archive(path)[start : start + size])
        inputs: list[Any] = (
            [encoded] if request.candidates is None else [encoded, request.candidates]
        )
        if self._policy is not None and request.draws is not None:
            offsets, flipped, numbers = request.draws
            inputs += self._policy.draw(numbers)
            inputs.append(flipped.numpy().astype(np.int32)[:, None])
            if self.augment.pad:
                inputs.append((offsets.numpy() - self.augment.pad).astype(np.int32))
        return tuple(inputs)

    def _needs_pillow(self, index: int) -> bool:
        """True if DALI does not decode an image, or to other pixels than the other loaders."""
        if index not in self._by_pillow:
            path, start, size = self.split.location(index)
            try:
                # Whole files are read for other formats only: this runs in the loop of the step.
                head = read_bytes(
                    path, start, HEADER_BYTES if size < 0 else min(size, HEADER_BYTES)
                )
                alike = is_plain_jpeg(head) or decodes_alike(
                    self.split.read(index), self.split.background
                )
                self._by_pillow[index] = not alike
            except OSError:  # DALI reports it
                return False
        return self._by_pillow[index]

    def _decode_on_host(self, index: int, framing: Framing) -> bytes:
        """An image, decoded by Pillow, in a format that DALI only copies."""
        image = self.split.decode(index)
        if not framing.random:
            image = image.crop(central_part(*image.size))
        content = BytesIO()
        image.save(content, "PPM")
        return content.getvalue()

    def _archive(self, path: str) -> NDArray[np.uint8]:
        if path not in self._archives:
            self._archives[path] = np.memmap(path, np.uint8, "r")
        return self._archives[path]

    def _find_corrupt(self, error: Exception) -> None:
        """Decode the images of the pending batches one by one, and replace those that fail.

        Raises:
            DataError: corrupt images must not be replaced, or no image is corrupt and DALI failed
                for another reason.
        """
        pending = list(self._in_flight)
        known = sum(self._by_pillow.values())
        corrupt = next(filter(None, map(self._probe, pending)), None)
        if corrupt:
            self._note_corrupt(corrupt)
        elif sum(self._by_pillow.values()) == known:
            raise DataError(f"DALI failed on {self.split.where}: {dali_reason(error)}") from error
        self._repeat(pending)

    def _without_corrupt(self, request: Request) -> Request:
        """The request with replacements for the images known to be corrupt."""
        if not self.replaced:
            return request
        indices = request.indices.copy()
        for row, i in enumerate(indices.tolist()):
            if i in self.replaced:
                indices[row] = replacement_index(self.split, i, self.replaced)
        return request._replace(indices=indices)

    def _probe(self, request: Request) -> dict[int, str]:
        """The reason for each image of a batch that cannot be decoded, by its index."""
        corrupt: dict[int, str] = {}
        waiting: deque[tuple[Any, ...]] = deque()
        pipeline = None
        for row, i in enumerate(request.indices.tolist()):
            one = slice(row, row + 1)
            candidates = None if request.candidates is None else request.candidates[one]
            draws = None if request.draws is None else request.draws.row(row)
            single = Request(request.framing, request.indices[one], candidates, draws)
            try:
                waiting.append(self._inputs(single))
                if pipeline is None:
                    pipeline = self._build(1, 1, lambda: waiting.popleft())
                pipeline.run()
            except Exception as error:
                pipeline = None
                waiting.clear()
                try:
                    self.split.decode(i)
                except Exception as known:  # Pillow has the better reason, if it fails too
                    corrupt[i] = reason_of(known)
                else:
                    if self._by_pillow.get(i):
                        corrupt[i] = dali_reason(error)
                    self._by_pillow[i] = True
        return corrupt

    def _build(self, batch_size: int, prefetch: int, source: Any) -> "Pipeline":
        from nvidia.dali.pipeline import Pipeline, do_not_convert, pipeline_def

        sizes = (batch_size, self._threads, self._device_id)
        settings: dict[str, Any] = {"prefetch_queue_depth": prefetch, "exec_dynamic": True}
        if (policy := self._policy) is None:
            pipeline = Pipeline(*sizes, **settings)
            with pipeline:
                images, gray, _ = self._define(source)
                pipeline.set_outputs(images, gray)
        else:
            define, size = do_not_convert(self._define), self.framing.size

            # DALI rewrites its conditions and those of functions it calls.
            def graph() -> tuple[Node, Node]:
                images, gray, drawn = define(source)
                return policy.apply(images, drawn, size), gray

            settings |= {"batch_size": batch_size, "num_threads": self._threads}
            settings |= {"device_id": self._device_id, "enable_conditionals": True}
            with warnings.catch_warnings():  # DALI's policies use names that DALI deprecates
                warnings.simplefilter("ignore", DeprecationWarning)
                pipeline = pipeline_def(graph, **settings)()
        pipeline.build()
        return pipeline

    def _define(self, source: Any) -> tuple[Node, Node, list[Node]]:
        """The pipeline from the result of ``_inputs`` to uint8 images, HWC: of one size, or for
        torch to scale; whether they have a gray edge; and the policy's inputs.
        """
        fn, _, types = dali()
        crops = [types.FLOAT64] if self.framing.random else []
        draws = [types.INT32] * (0 if self._policy is None else 4 + bool(self.augment.pad))
        kinds = [types.UINT8, *crops, *draws]
        in_files = self.split.members is None
        inputs = fn.external_source(
            source=source,
            num_outputs=len(kinds),
            dtype=kinds,
            ndim=1,
            batch=True,
            no_copy=not in_files,
        )
        images, gray = self._decoded(inputs[0], inputs[1] if crops else None)
        if not draws:
            return images, gray, []
        operations, bins, signs, flipped, *corners = inputs[-len(draws) :]
        if corners:
            crop: dict[str, Any] = {"start": corners[0], "shape": list(self.framing.size)}
            images = fn.slice(images, **crop, axes=(0, 1), out_of_bounds_policy="pad")
        return fn.flip(images, horizontal=flipped[0]), gray, [operations, bins, signs]

    def _decoded(self, encoded: Node, candidates: Node | None) -> tuple[Node, Node]:
        """Images cropped and scaled from files or their names, and whether an edge is gray."""
        fn, _, types = dali()
        framing, options = self.framing, self.options
        if self.split.members is None:
            encoded = fn.io.file.read(encoded, dont_use_mmap=not options.mmap)
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
        shape = fn.peek_image_shape(encoded, dtype=types.FLOAT64)
        height, width = shape[0], shape[1]
        if framing.random:
            ratio = framing.augment.crop_ratio
            top, left, height, width = window(candidates, height, width, ratio)
            box = {"start": integers(top, left), "shape": integers(height, width)}
            pixels = fn.decoders.image_slice(encoded, **box, axes=(0, 1), **how)
        else:
            pixels = fn.decoders.image(encoded, **how)
        gray = has_gray_edge(pixels)
        gray = gray.cpu() if self._mixed else gray
        if self._by_torch:
            return pixels, gray
        if framing.random:
            return self._resize(pixels, framing.size), gray
        rows, columns = cover(height, width, framing.cover_size)
        size = fn.cast(fn.stack(rows, columns), dtype=types.FLOAT)
        pixels = self._resize(pixels, size)
        start = integers(central(rows, framing.size[0]), central(columns, framing.size[1]))
        return fn.slice(pixels, start=start, shape=list(framing.size), axes=(0, 1)), gray

    def _resize(self, pixels: Node, size: Any) -> Node:
        """Scaled on the step's device with an antialiased triangle filter, as by other loaders."""
        fn, _, types = dali()
        if not self._mixed and self._device_id is not None:
            pixels = pixels.gpu()
        return fn.resize(pixels, size=size, interp_type=types.INTERP_LINEAR, antialias=True)


def gpu_number(device: torch.device) -> int | None:
    """The number of a GPU, by default the current one; None for the CPU."""
    if device.type != "cuda":
        return None
    return torch.cuda.current_device() if device.index is None else device.index


def default_threads(with_gpu: bool) -> int:
    """One thread per usable core of this process's share of the machine, minus two for the step and
    reading ahead if a GPU trains and there are more than four, or minus one for scaling if no GPU
    does.
    """
    cores = workers_per_process()
    if not with_gpu:
        return max(1, cores - 1)
    return cores - 2 if cores > 4 else cores


def dali_reason(error: Exception) -> str:
    """The line of DALI's message that has the reason."""
    _, _, after = str(error).partition("encountered:\n")
    reasons = [line.strip() for line in after.splitlines() if line.strip()]
    return reason_of(RuntimeError(reasons[0] if reasons else first_line(error)))[:160]


LOADER = LoaderKind(
    DaliLoader,
    decoded=False,
    missing=missing_dali,
    unsuitable=unsuitable_for_dali,
    policies=dali_policies.POLICIES,
)
