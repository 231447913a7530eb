"""Several processes that train one model: how they meet, what each does of a batch, and what they
tell each other.

torchrun, or ``launch.py``, starts the processes and describes them in the environment. NCCL carries
what is on GPUs and gloo what is on the host, in one process group.
"""

import contextlib
import hashlib
import os
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
"""How long processes wait for the others to start."""


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together: which of how many, and which on its machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @classmethod
    def current(cls) -> "Ranks":
        """Those of the process group that was joined; alone without one."""
        rank, size = rank_and_size()
        return cls(rank, size, int(os.environ["LOCAL_RANK"]) if size > 1 else 0)

    @property
    def is_main(self) -> bool:
        """Whether this process speaks and writes files for all."""
        return self.rank == 0


@contextlib.contextmanager
def process_group(device_name: str) -> Iterator[Ranks]:
    """Join the processes that the environment describes, if it describes any, and leave them in the
    end.

    What all of them raise, one of them says: the others' errors are marked as ``repeated``.

    Args:
        device_name: as in the configuration.

    Yields:
        This process among the others.

    Raises:
        ConfigError: the environment makes no sense, the port is taken, or there are fewer GPUs than
            processes here.
        PeerLost: another process ended, or did not come.
    """
    if not launched():
        yield Ranks()
        return
    ranks = _described_ranks()
    store = _meet(ranks)
    joined = False
    try:
        with _peers_may_be_lost(ranks):
            if (device := choose_device(device_name, ranks)).type == "cuda":
                torch.cuda.set_device(device)
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                store=store,
                rank=ranks.rank,
                world_size=ranks.size,
            )
            joined = True
            yield ranks
    except BaseException as error:
        if isinstance(error, (FastOKDError, KeyboardInterrupt)):
            error.repeated = not _is_first_to_say(store, error)
        raise
    finally:
        if joined:
            dist.destroy_process_group()


def _described_ranks() -> Ranks:
    found = {}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"):
        text = os.environ.get(name, "")
        if not text.isdecimal():
            raise ConfigError(
                f"{name}={text!r} in the environment; torchrun sets RANK, WORLD_SIZE, LOCAL_RANK,"
                " MASTER_ADDR and MASTER_PORT: start with torchrun or --gpus N, or unset them"
            )
        found[name] = int(text)
    ranks = Ranks(found["RANK"], found["WORLD_SIZE"], found["LOCAL_RANK"])
    if ranks.rank >= ranks.size:
        raise ConfigError(
            f"RANK={ranks.rank} with WORLD_SIZE={ranks.size} in the environment; ranks are 0 to"
            " WORLD_SIZE - 1"
        )
    if not os.environ.get("MASTER_ADDR"):
        raise ConfigError(
            "MASTER_ADDR is not in the environment; it is the address of rank 0: start with"
            " torchrun or --gpus N"
        )
    return ranks


def _meet(ranks: Ranks) -> dist.Store:
    """The store in which all processes find each other, served by the launcher's agent or by rank
    0.
    """
    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    wait = timedelta(minutes=MEET_MINUTES)
    try:
        store, _, _ = next(dist.rendezvous("env://", ranks.rank, ranks.size, timeout=wait))
        return _of_this_start(store, ranks)
    except dist.DistNetworkError as error:
        if "EADDRINUSE" in str(error):
            raise ConfigError(
                f"the port of {where} is taken; choose another with torchrun's --master-port or"
                " --rdzv-endpoint, or let --gpus N find one"
            ) from None
        raise PeerLost(
            f"rank {ranks.rank} cannot reach rank 0 at {where} ({first_line(error)}); are address"
            " and port right, and does rank 0 run?"
        ) from None
    except (dist.DistError, RuntimeError, ValueError) as error:
        raise PeerLost(
            f"rank {ranks.rank} of {ranks.size} found no others at {where} within {MEET_MINUTES}"
            f" minutes ({first_line(error)}); have all been started?"
        ) from None


def choose_device(name: str, ranks: Ranks | None = None) -> torch.device:
    """The device of that name. "auto" is the first GPU if there is one; of several processes each
    has that of its local rank.

    Args:
        name: "auto", "cpu", "cuda" or "cuda:N".
        ranks: this process among the others; None for those it has joined.

    Raises:
        ConfigError: no such device on this machine, or not enough for its processes.
    """
    ranks = ranks or Ranks.current()
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        name = "cuda" if count else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"unknown device '{name}'; use auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device '{name}' is not supported; use auto, cpu, cuda or cuda:N")
    if device.type == "cpu":
        return device
    if (device.index or 0) >= count:
        raise ConfigError(
            f"device '{name}' is not there: torch sees {count} GPUs; use --device cpu or see"
            " 'fastokd doctor'"
        )
    if ranks.size == 1:
        return torch.device("cuda", device.index or 0)
    if device.index is not None:
        raise ConfigError(
            f"device '{name}' with {ranks.size} processes: each takes the GPU of its local rank;"
            " use --device auto, cuda or cpu"
        )
    if (here := int(os.environ.get("LOCAL_WORLD_SIZE", ranks.local_rank + 1))) > count:
        raise ConfigError(
            f"{here} processes on this machine, and torch sees {count} GPUs; start {count} with"
            f" --gpus {count} or --nproc-per-node {count}, or use --device cpu"
        )
    return torch.device("cuda", ranks.local_rank)


def _of_this_start(store: dist.Store, ranks: Ranks) -> dist.Store:
    """A part of the store that no earlier start of the run has written to.

    torchrun keeps one store over its restarts, in which workers find the addresses of those that
    died, and fail to reach them (PyTorch 2.15 with gloo: about every second restart). Nothing in
    the environment tells the starts apart on all machines, so rank 0 names this one, and every
    other rank takes a name only when rank 0 has answered it in person.
    """
    own = uuid.uuid4().hex
    if ranks.rank == 0:
        store.set("start", own)
        for rank in range(1, ranks.size):
            store.set(f"{own}/{rank}/answer", store.get(f"{own}/{rank}"))
        return dist.PrefixStore(own, store)
    deadline = time.monotonic() + 60 * MEET_MINUTES
    while time.monotonic() < deadline:
        name = store.get("start").decode()
        store.set(f"{name}/{ranks.rank}", own)
        if (
            store.check([answer := f"{name}/{ranks.rank}/answer"])
            and store.get(answer).decode() == own
        ):
            return dist.PrefixStore(name, store)
        time.sleep(0.05)
    raise RuntimeError("rank 0 does not answer")


@contextlib.contextmanager
def _peers_may_be_lost(ranks: Ranks) -> Iterator[None]:
    """Errors of the backends, which say that a connection broke, as what that means."""
    try:
        yield
    except FastOKDError:
        raise
    except RuntimeError as error:
        text = str(error)
        if not isinstance(error, dist.DistError) and not any(
            word in text
            for word in (
                "gloo",
                "Gloo",
                "NCCL",
                "Connection closed by peer",
                "Connection reset by peer",
            )
        ):
            raise
        raise PeerLost(
            f"another of the {ranks.size} processes ended, and training together cannot go on; what"
            " it said, if anything, is above, and the last checkpoint is intact"
        ) from error


def _is_first_to_say(store: dist.Store, error: BaseException) -> bool:
    """Whether no other process has said this yet, and for the loss of another process, whether none
    has said anything.
    """
    key = "lost" if isinstance(error, PeerLost) else hashlib.sha256(str(error).encode()).hexdigest()
    try:
        first = store.add(f"said/{key}", 1) == 1
        others = store.add("said", 1) - 1
    except RuntimeError:
        return False  # the process that served the store has ended, and said why
    return first and not (others and isinstance(error, PeerLost))


@dataclass(frozen=True)
class BatchShare:
    """How the images of one step are divided: batch_size = processes x accumulate x
    device_batch.
    """

    batch_size: int
    processes: int
    accumulate: int
    device_batch: int

    def describe(self) -> str:
        """For the start of a run, e.g. "batch 256 = 2 processes x 2 x 64"."""
        if self.processes == 1 and self.accumulate == 1:
            return f"batch {self.batch_size}"
        processes = f"{self.processes} process{'es' if self.processes > 1 else ''}"
        return (
            f"batch {self.batch_size} = {processes} x "
            + (f"{self.accumulate} x " if self.accumulate > 1 else "")
            + str(self.device_batch)
        )


def share_of_batch(config: TrainConfig, ranks: Ranks) -> BatchShare:
    """What this process does of every batch.

    Raises:
        ConfigError: the batch cannot be divided by the processes, or a process's share by
            ``device_batch``.
    """
    share, rest = divmod(config.batch_size, ranks.size)
    if rest:
        below, above = share * ranks.size, (share + 1) * ranks.size
        raise ConfigError(
            f"batch_size={config.batch_size} over {ranks.size} processes leaves {rest}; it is the"
            f" global batch: use {f'{below} or ' if below else ''}{above}"
        )
    device_batch = config.device_batch or share
    if device_batch > share or share % device_batch:
        fit = [size for size in range(1, share + 1) if share % size == 0]
        raise ConfigError(
            f"device_batch={device_batch}: each of {ranks.size} processes has {share} images of a"
            f" batch of {config.batch_size}; use one of {', '.join(map(str, fit))}"
        )
    if device_batch < 2 and not (config.sync_bn and ranks.size > 1):
        raise ConfigError(
            f"batch_size={config.batch_size} over {ranks.size} processes is one image at once, and"
            f" batch norm needs two: use {2 * ranks.size} or more, or --sync-bn True"
        )
    return BatchShare(config.batch_size, ranks.size, share // device_batch, device_batch)


def parallel(
    model: nn.Module, device: torch.device, *, accumulate: int = 1, bucket_views: bool = True
) -> DistributedDataParallel:
    """The model with gradients that are means over all processes after a backward pass.

    Every process keeps its own running statistics; ``mean_buffers`` brings them together. Only the
    last of ``accumulate`` backward passes exchanges gradients, the others run in ``no_sync()``.

    Args:
        accumulate: backward passes of one step.
        bucket_views: let the gradients be views of what is sent; not where they are views of
            something else already.
    """
    # Buffers are equal at the start, because all processes make the model from one seed. torch
    # renamed the switch.
    own = (
        "forward_sync_buffers"
        if "forward_sync_buffers" in signature(DistributedDataParallel).parameters
        else "broadcast_buffers"
    )
    on_gpu = device.type == "cuda"
    # On a stream of its own, as PyTorch's notes on CUDA graphs want it for what is captured later.
    with torch.cuda.stream(torch.cuda.Stream(device)) if on_gpu else contextlib.nullcontext():
        wrapped = DistributedDataParallel(
            model,
            device_ids=[device.index] if on_gpu else None,
            gradient_as_bucket_view=bucket_views,
            # A static graph whose first backward pass is in no_sync() ends in an internal assertion
            # (PyTorch issue 143580).
            static_graph=accumulate == 1,
            **{own: False},
        )
    if on_gpu:
        torch.cuda.synchronize(device)
    return wrapped


@torch.no_grad()
def mean_buffers(*modules: nn.Module | None) -> None:
    """Replace floating buffers, such as running statistics, by their means over the processes.
    Equal ones stay bit for bit.

    A variance becomes the mean of the processes' variances: their means differ by little, because
    the images are shuffled.
    """
    size = rank_and_size()[1]
    buffers = [
        buffer
        for module in modules
        if module is not None
        for buffer in module.buffers()
        if buffer.is_floating_point()
    ]
    if size == 1 or not buffers:
        return
    flat = torch.cat([buffer.flatten().double() for buffer in buffers])
    first = flat.clone()
    dist.broadcast(first, 0)
    # What rank 0 has plus a mean of differences: exact where there are none, and the same on all
    flat -= first
    dist.all_reduce(flat)
    first += flat.div_(size)
    for buffer, mean in zip(
        buffers, first.split([buffer.numel() for buffer in buffers]), strict=True
    ):
        buffer.copy_(mean.view_as(buffer))


class Agreement:
    """A number that any process may raise, and that all see at the same step.

    It travels through host memory while the device works: what is raised at one call is seen by all
    at the next. A process alone sees it at once. All processes must call equally often.
    """

    def __init__(self) -> None:
        # A group of its own: nothing else waits behind a process that is late.
        self._group = dist.new_group(backend="gloo") if rank_and_size()[1] > 1 else None
        self._value = torch.zeros((), dtype=torch.int64)
        self._work: dist.Work | None = None

    def exchange(self, raised: int) -> int:
        """Say what this process raises, 0 for nothing; returns the largest that any raised at the
        call before.
        """
        if self._group is None:
            return raised
        seen = self.settle()
        self._value.fill_(raised)
        self._work = dist.all_reduce(self._value, dist.ReduceOp.MAX, self._group, async_op=True)
        return seen

    def agree(self, raised: int) -> int:
        """As ``exchange``, and complete the exchange if anything was raised: a number raised now
        is handled with it, or raised again.
        """
        agreed = self.exchange(raised)
        if agreed:
            self.settle()
        return agreed

    def settle(self) -> int:
        """The largest that any process raised at the last call; waits for all to have made it. 0 if
        there was none since.
        """
        if self._work is None:
            return 0
        self._work.wait()
        self._work = None
        return int(self._value)


def sum_counts(right: Mapping[str, Tensor], count: int) -> tuple[dict[str, int], int]:
    """Sum right answers by name, and the number of images, over all processes; those without an
    image have no names.
    """
    found = gather_states(
        {"right": {name: int(value) for name, value in right.items()}, "count": count}
    )
    names = max((state["right"] for state in found), key=len)
    return {name: sum(state["right"].get(name, 0) for state in found) for name in names}, sum(
        state["count"] for state in found
    )


@contextlib.contextmanager
def local_main_first() -> Iterator[None]:
    """Let one process of each machine go through the block before the others: what it leaves in a
    cache, they find.
    """
    others = Ranks.current().local_rank > 0
    if others:
        gather_states(None)
    yield
    if not others:
        gather_states(None)


def gather_states(value: T) -> list[T]:
    """The value of every process, in the order of the ranks; tensors in it must be on the CPU."""
    size = rank_and_size()[1]
    if size == 1:
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
