"""Several processes that train one model: joining, sharing a batch, and exchanging values.

torchrun or ``launch.py`` starts the processes and describes them in the environment. One process
group has NCCL for tensors on GPUs and gloo for tensors on the host.
"""

import contextlib
import hashlib
import itertools
import os
import re
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from inspect import signature
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastokd.errors import ConfigError, FastOKDError, PeerLost, first_line
from fastokd.ranks import rank_and_size
from fastokd.train.config import TrainConfig
from fastokd.train.launch import launched

T = TypeVar("T")

MEET_MINUTES = 10
"""Time that processes wait for the others to start."""
REPORT_SECONDS = 2.0
"""Time that rank 0 waits for the errors of the others before it ends."""


@dataclass(frozen=True)
class Ranks:
    """The rank of this process, the number of processes, and the rank on this machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @classmethod
    def current(cls) -> "Ranks":
        """Those of the process group; of a single process without one."""
        rank, size = rank_and_size()
        return cls(rank, size, int(os.environ["LOCAL_RANK"]) if size > 1 else 0)

    @property
    def is_main(self) -> bool:
        """True if this process prints and writes files for all."""
        return self.rank == 0


@contextlib.contextmanager
def process_group(device_name: str) -> Iterator[Ranks]:
    """Join the processes that the environment describes, if any, and leave them at the end; yields
    the ranks of this process.

    Of an error that all processes raise, one reports it: the others' are marked as ``repeated``.

    Raises:
        ConfigError: the environment is inconsistent, the port is taken, or GPUs are missing.
        PeerLost: another process exited, or did not start.
    """
    if not launched():
        yield Ranks()
        return
    ranks = _ranks_of_environment()
    store = _meet(ranks)
    try:
        with _peers_may_be_lost():
            backend = "gloo"
            if (device := choose_device(device_name, ranks)).type == "cuda":
                torch.cuda.set_device(device)
                backend = "cpu:gloo,cuda:nccl"
            dist.init_process_group(backend, store=store, rank=ranks.rank, world_size=ranks.size)
            yield ranks
    except BaseException as error:
        if isinstance(error, FastOKDError | KeyboardInterrupt):
            vars(error)["repeated"] = not _reports_first(store, error)
            if ranks.rank == 0:
                _wait_for_reports(store, ranks)
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _ranks_of_environment() -> Ranks:
    values = {}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", "MASTER_ADDR"):
        values[name] = text = os.environ.get(name, "")
        if not text or (name != "MASTER_ADDR" and not text.isdecimal()):
            raise ConfigError(
                f"{name}={text!r} in the environment; torchrun sets RANK, WORLD_SIZE, LOCAL_RANK,"
                " MASTER_ADDR and MASTER_PORT: start with torchrun or --gpus N, or unset them"
            )
    rank, size, local_rank = (int(values[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if rank >= size:
        text = f"RANK={rank} with WORLD_SIZE={size} in the environment"
        raise ConfigError(f"{text}; ranks are 0 to WORLD_SIZE - 1")
    return Ranks(rank, size, local_rank)


def _meet(ranks: Ranks) -> dist.Store:
    """The store in which the processes find each other, served by the launcher or by rank 0."""
    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    timeout = timedelta(minutes=MEET_MINUTES)
    try:
        store, _, _ = next(dist.rendezvous("env://", ranks.rank, ranks.size, timeout=timeout))
        return _store_of_this_start(store, ranks)
    except (dist.DistError, RuntimeError, ValueError) as error:
        if "EADDRINUSE" in str(error):
            raise ConfigError(
                f"the port of {where} is taken; choose another with torchrun's --master-port or"
                " --rdzv-endpoint, or let --gpus N find one"
            ) from None
        raise PeerLost(
            f"rank {ranks.rank} of {ranks.size} did not meet the others at {where} within"
            f" {MEET_MINUTES} minutes ({first_line(error)}); check that rank 0 runs there, and that"
            " all were started"
        ) from None


def choose_device(name: str, ranks: Ranks | None = None) -> torch.device:
    """The device named "auto", "cpu", "cuda" or "cuda:N". "auto" is the first GPU if there is one;
    of several processes each has the GPU of its local rank.

    Args:
        ranks: of this process; None for those of the process group.

    Raises:
        ConfigError: the device does not exist, or there are too few for the processes.
    """
    ranks = ranks or Ranks.current()
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        name = "cuda" if count else "cpu"
    match = re.fullmatch(r"cpu|cuda(?::(\d+))?", name, re.ASCII)
    if match is None:
        raise ConfigError(f"unknown device '{name}'; use auto, cpu, cuda or cuda:N")
    if name == "cpu":
        return torch.device("cpu")
    index = int(match[1] or 0)
    if index >= count:
        problem = f"device '{name}' does not exist: torch sees {count} GPUs"
        raise ConfigError(f"{problem}; use --device cpu or see 'fastokd doctor'")
    if ranks.size == 1:
        return torch.device("cuda", index)
    if match[1]:
        raise ConfigError(
            f"device '{name}' with {ranks.size} processes: each takes the GPU of its local rank;"
            " use --device auto, cuda or cpu"
        )
    if (local := int(os.environ.get("LOCAL_WORLD_SIZE", ranks.local_rank + 1))) > count:
        raise ConfigError(
            f"{local} processes on this machine, and torch sees {count} GPUs; start {count} with"
            f" --gpus {count} or --nproc-per-node {count}, or use --device cpu"
        )
    return torch.device("cuda", ranks.local_rank)


def _store_of_this_start(store: dist.Store, ranks: Ranks) -> dist.Store:
    """A part of the store that no earlier start of the run has written to.

    torchrun keeps one store over its restarts, in which workers find the addresses of dead ones.
    The environment does not tell starts apart on all machines, so rank 0 names this one, and every
    other rank accepts a name only when rank 0 has answered it.
    """
    token = uuid.uuid4().hex
    if ranks.rank == 0:
        store.set("start", token)
        for rank in range(1, ranks.size):
            store.set(f"{token}/{rank}/answer", store.get(f"{token}/{rank}").decode())
        for rank in range(1, ranks.size):  # if rank 0 ended before, so would their store
            store.get(f"{token}/{rank}/done")
        return dist.PrefixStore(token, store)
    deadline = time.monotonic() + 60 * MEET_MINUTES
    while time.monotonic() < deadline:
        name = store.get("start").decode()
        store.set(f"{name}/{ranks.rank}", token)
        answer = f"{name}/{ranks.rank}/answer"
        if store.check([answer]) and store.get(answer).decode() == token:
            store.set(f"{name}/{ranks.rank}/done", "")
            return dist.PrefixStore(name, store)
        time.sleep(0.05)
    raise RuntimeError("rank 0 does not answer")


_LOST = re.compile("gloo|NCCL|Connection (closed|reset) by peer", re.IGNORECASE)
"""Words of the backends' errors about a broken connection."""


@contextlib.contextmanager
def _peers_may_be_lost() -> Iterator[None]:
    """Raise ``PeerLost`` for a backend's error about a broken connection."""
    try:
        yield
    except FastOKDError:
        raise
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and not _LOST.search(str(error)):
            raise
        raise PeerLost(
            "a peer process exited, so distributed training cannot continue; see its error above;"
            " the last checkpoint is intact"
        ) from error


def _reports_first(store: dist.Store, error: BaseException) -> bool:
    """True if no other process has reported this error; for ``PeerLost``, any error."""
    is_lost = isinstance(error, PeerLost)
    key = "lost" if is_lost else hashlib.sha256(str(error).encode()).hexdigest()
    try:
        first = store.add(f"said/{key}", 1) == 1
        others = store.add("said", 1) - 1
    except RuntimeError:
        return False  # the process that served the store has exited, with a report
    return first and not (others and is_lost)


def _wait_for_reports(store: dist.Store, ranks: Ranks) -> None:
    """Keep the store, which rank 0 may serve, until the other processes have raised errors too, or
    for ``REPORT_SECONDS``. Without it, each would print PyTorch's stack trace.
    """
    deadline = time.monotonic() + REPORT_SECONDS
    with contextlib.suppress(RuntimeError):
        while store.add("said", 0) < ranks.size and time.monotonic() < deadline:
            time.sleep(0.05)


@dataclass(frozen=True)
class BatchShare:
    """The division of a batch: batch_size = processes x accumulate x device_batch."""

    batch_size: int
    processes: int
    accumulate: int
    device_batch: int

    def describe(self) -> str:
        """For the start of a run, e.g. "batch 256 = 2 processes x 2 x 64"."""
        if self.processes == 1 and self.accumulate == 1:
            return f"batch {self.batch_size}"
        processes = f"{self.processes} process{'es' if self.processes > 1 else ''}"
        accumulate = f"{self.accumulate} x " if self.accumulate > 1 else ""
        return f"batch {self.batch_size} = {processes} x {accumulate}{self.device_batch}"


def share_of_batch(config: TrainConfig, ranks: Ranks) -> BatchShare:
    """The share of this process in every batch.

    Raises:
        ConfigError: the processes do not divide the batch, or ``device_batch`` a process's share.
    """
    share, rest = divmod(config.batch_size, ranks.size)
    if rest:
        below, above = share * ranks.size, (share + 1) * ranks.size
        raise ConfigError(
            f"batch_size={config.batch_size} over {ranks.size} processes leaves {rest}; it is the"
            f" global batch: use {f'{below} or ' if below else ''}{above}"
        )
    device_batch = config.device_batch or share
    if share % device_batch:
        divisors = [str(size) for size in range(1, share + 1) if share % size == 0]
        raise ConfigError(
            f"device_batch={device_batch}: each of {ranks.size} processes has {share} images of a"
            f" batch of {config.batch_size}; use one of {', '.join(divisors)}"
        )
    if device_batch < 2 and not (config.sync_bn and ranks.size > 1):
        given = f"batch_size={config.batch_size} over {ranks.size} processes"
        if config.device_batch:
            given = f"device_batch={config.device_batch}"
        fix = "--device-batch 2" if config.device_batch else str(2 * ranks.size)
        other = ", or --sync-bn True" if ranks.size > 1 else ""
        if config.sync_bn:
            other = " (--sync-bn needs several processes, and there is one)"
        problem = f"{given} is one image at once, and batch norm needs two"
        raise ConfigError(f"{problem}: use {fix} or more{other}")
    return BatchShare(config.batch_size, ranks.size, share // device_batch, device_batch)


def parallel(
    model: nn.Module, device: torch.device, *, accumulate: int = 1
) -> DistributedDataParallel:
    """Wrap a model so that its gradients are means over all processes after a backward pass.

    Every process keeps its own running statistics; ``mean_buffers`` averages them. Only the last of
    ``accumulate`` backward passes of a step exchanges gradients; run the others in ``no_sync()``.
    Gradients are views of the buckets that are sent.
    """
    # All processes create the model from one seed, so buffers are equal at the start. Newer
    # versions of torch renamed the switch.
    renamed = "forward_sync_buffers" in signature(DistributedDataParallel).parameters
    options: dict[str, Any] = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
    on_gpu = device.type == "cuda"
    # On a side stream, as PyTorch's notes on CUDA graphs require for a later capture.
    with torch.cuda.stream(torch.cuda.Stream(device)) if on_gpu else contextlib.nullcontext():
        wrapped = DistributedDataParallel(
            model,
            device_ids=[device.index] if on_gpu else None,
            gradient_as_bucket_view=True,
            # A static graph whose first backward pass is in no_sync() fails an internal assertion
            # (PyTorch issue 143580).
            static_graph=accumulate == 1,
            **options,
        )
    if on_gpu:
        torch.cuda.synchronize(device)
    return wrapped


@torch.no_grad()
def mean_buffers(*modules: nn.Module | None) -> None:
    """Replace floating-point buffers, such as running statistics, by their means over the
    processes; equal ones do not change.

    A variance becomes the mean of the variances: the means differ little, as images are shuffled.
    """
    size = rank_and_size()[1]
    of_modules = (module.buffers() for module in modules if module is not None)
    buffers = [each for each in itertools.chain(*of_modules) if each.is_floating_point()]
    if size == 1 or not buffers:
        return
    flat = torch.cat([buffer.flatten().double() for buffer in buffers])
    first = flat.clone()
    dist.broadcast(first, 0)
    # Rank 0's plus the mean difference: exact for equal buffers, and the same everywhere.
    flat -= first
    dist.all_reduce(flat)
    first += flat.div_(size)
    means = first.split([buffer.numel() for buffer in buffers])
    for buffer, mean in zip(buffers, means, strict=True):
        buffer.copy_(mean.view_as(buffer))


class Agreement:
    """A number that any process may raise and that all processes see at the same step.

    It is exchanged in host memory while the device works: a number raised at one call is seen by
    all at the next. A single process sees it at once. All processes must call equally often.
    """

    def __init__(self) -> None:
        # A separate group, in which nothing else waits behind a slow process.
        self._group: Any = dist.new_group(backend="gloo") if rank_and_size()[1] > 1 else None
        self._value = torch.zeros((), dtype=torch.int64)
        self._work: Any = None

    def exchange(self, raised: int) -> int:
        """Raise a number, 0 for nothing; returns the largest of all at the call before. If that is
        not 0, the number of this call is dropped: it is handled too, or raised again.
        """
        if self._group is None:
            return raised
        agreed = self.settle()
        self._value.fill_(raised)
        self._work = dist.all_reduce(self._value, dist.ReduceOp.MAX, self._group, async_op=True)
        if agreed:
            self.settle()
        return agreed

    def settle(self) -> int:
        """The largest number raised at the last call, 0 if there was none; waits for all."""
        if self._work is None:
            return 0
        self._work.wait()
        self._work = None
        return int(self._value)


def sum_counts(sums: Mapping[str, Tensor], count: int) -> tuple[dict[str, Tensor], int]:
    """Sum tensors by name (none without images), and images, over all processes; on the CPU."""
    own = {name: value.cpu() for name, value in sums.items()}
    parts, counts = zip(*gather_states((own, count)), strict=True)
    totals = {
        name: torch.stack([part[name] for part in parts if part]).sum(0)
        for name in max(parts, key=len)
    }
    return totals, sum(counts)


@contextlib.contextmanager
def local_main_first() -> Iterator[None]:
    """Run the block in one process of each machine first, so that the others find its caches."""
    is_first = Ranks.current().local_rank == 0
    if not is_first:
        gather_states(None)
    yield
    if is_first:
        gather_states(None)


def gather_states(value: T) -> list[T]:
    """The value of every process, in the order of the ranks; tensors in it must be on the CPU."""
    if (size := rank_and_size()[1]) == 1:
        return [value]
    values: list[Any] = [None] * size
    dist.all_gather_object(values, value)
    return values


def from_main(value: T) -> T:
    """The main process's value, on all processes; what the others pass is ignored."""
    rank, size = rank_and_size()
    if size == 1:
        return value
    values: list[Any] = [value if rank == 0 else None]
    dist.broadcast_object_list(values, src=0)
    return values[0]
