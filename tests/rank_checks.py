"""One of the processes of ``test_distributed.py``: torchrun's environment, and python
rank_checks.py FOLDER.
"""

import contextlib
import os
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from fastokd.data import open_dataset
from fastokd.train import memory
from fastokd.train.config import TrainConfig
from fastokd.train.distributed import (
    Agreement,
    from_main,
    gather_states,
    mean_buffers,
    parallel,
    process_group,
    sum_counts,
)
from fastokd.train.sync_norm import synchronized_batch_norm

BATCH, STEPS = 6, 4


class TwoHeads(nn.Module):
    """Two results from one trunk, as branches are, with buffers and every kind of batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(3, 8, 3),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 6, 3),
            nn.BatchNorm2d(6, affine=False, momentum=None),
        )
        self.one = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5), nn.BatchNorm1d(5)
        )
        self.two = nn.Sequential(nn.Flatten(), nn.Linear(6 * 16, 5))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.trunk(x)
        return self.one(x), self.two(x)


def make_model(norms: bool) -> TwoHeads:
    torch.manual_seed(0)
    model = TwoHeads().double()
    if not norms:
        for part in (model.trunk, model.one):
            for name, child in list(part.named_children()):
                if isinstance(child, nn.modules.batchnorm._BatchNorm):
                    setattr(part, name, nn.Identity())
    return model


def images() -> Tensor:
    """The global batches of all steps, [STEPS, 12, 3, 8, 8]: for two processes of 6 or three of
    4.
    """
    return torch.randn(
        STEPS, 2 * BATCH, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )


def train(model: TwoHeads, wrapped: nn.Module, parts: list[list[Tensor]]) -> dict[str, Tensor]:
    """Plain gradient descent on the mean over all images of each step's parts; all but the last
    part in ``no_sync``.
    """
    for step in parts:
        model.zero_grad(set_to_none=True)
        for number, x in enumerate(step, start=1):
            alone = (
                wrapped.no_sync()
                if number < len(step) and wrapped is not model
                else contextlib.nullcontext()
            )
            with alone:
                outputs = wrapped(x)
                torch.autograd.backward(
                    outputs,
                    [(3 * output.detach().tanh() + 1) / len(x) / len(step) for output in outputs],
                )
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.05 * parameter.grad
    return {name: value.clone() for name, value in model.state_dict().items()}


def run(rank: int, size: int) -> dict[str, object]:
    own = images().chunk(size, 1)[rank]
    found: dict[str, object] = {}
    for accumulate in (1, 2):
        model = make_model(norms=False)
        wrapped = parallel(model, torch.device("cpu"), accumulate=accumulate)
        found[f"weights{accumulate}"] = train(
            model, wrapped, [list(step.chunk(accumulate)) for step in own]
        )
    model = make_model(norms=True)
    wrapped = parallel(model, torch.device("cpu"))
    with synchronized_batch_norm():
        found["synchronized"] = train(
            model, wrapped, [[step.contiguous(memory_format=torch.channels_last)] for step in own]
        )
    model = make_model(norms=True)
    found["apart"] = train(model, parallel(model, torch.device("cpu")), [[step] for step in own])
    mean_buffers(model, None)
    found["together"] = {name: value.clone() for name, value in model.named_buffers()}

    agreement = Agreement()
    found["agreed"] = [
        agreement.exchange(raised)
        for raised in ([0, 3, 0, 0, 1, 0] if rank == size - 1 else [0, 0, 0, 2, 0, 0])
    ]
    found["settled"] = [
        agreement.exchange(int(rank == 0)) * 0 + agreement.settle(),
        agreement.settle(),
    ]

    right = {"branch1": torch.tensor(2 + rank), "ta2": torch.tensor(1)} if rank else {}
    found["counts"] = sum_counts(right, 5 * rank)
    found["gathered"] = gather_states(
        {"rng": torch.arange(rank + 1, dtype=torch.uint8), "name": "x" * rank, "list": [rank, None]}
    )
    found["main"] = from_main(
        {"value": torch.full((3,), rank), "path": f"runs/{rank}"} if rank == 0 else None
    )
    found["fits"] = gather_states(one_step_fits(rank == size - 1))
    return found


def one_step_fits(lacks_memory: bool) -> bool:
    """Check that a step fits, where the last process has no memory for its second half."""

    def out_of_memory(*_: object) -> None:
        raise torch.OutOfMemoryError("of this process alone")

    if lacks_memory:
        memory.TrainStep.__call__ = out_of_memory
    return memory.one_step_fits(
        TrainConfig(data="digits", model="resnet8", branches=2, aux_blocks=0, batch_size=8),
        open_dataset("digits"),
        torch.device("cpu"),
        None,
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    with process_group("cpu") as ranks:
        assert (ranks.rank, ranks.size) == (int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
        torch.save(run(ranks.rank, ranks.size), Path(sys.argv[1]) / f"{ranks.rank}.pt")
