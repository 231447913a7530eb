"""One of the processes of ``test_tsb.py``'s run with torch.distributed: python tsb_rank.py FOLDER
RANK SIZE.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from fastokd.losses import KDCLLoss, TSBLoss

SAMPLES, CLASSES, BATCH, EPOCHS = 12, 5, 6, 3


def batches() -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """The global batches of all epochs: shuffled, the last of each epoch dropped: two networks'
    logits, index, labels.
    """
    generator = torch.Generator().manual_seed(7)
    found = []
    for _ in range(EPOCHS):
        index = torch.randperm(SAMPLES, generator=generator)[:BATCH]
        found.append(
            (
                torch.randn(2, BATCH, CLASSES, generator=generator),
                index,
                torch.randint(CLASSES, (BATCH,), generator=generator),
            )
        )
    return found


def run(rank: int, size: int) -> dict[str, torch.Tensor]:
    """The memory of this process at the end, the sum over its samples of loss and gradient in
    every step, and what the last reads.
    """
    criterion = TSBLoss(impl="reference")
    criterion.prepare(SAMPLES, CLASSES, torch.device("cpu"))
    own = slice(rank * BATCH // size, (rank + 1) * BATCH // size)
    losses, grads = [], []
    for logits, index, target in batches():
        rows = logits[:, own].clone().requires_grad_()
        loss, _ = criterion.forward_backward(rows, target[own], index=index[own])
        losses.append(loss * len(index[own]))
        grads.append(rows.grad * len(index[own]))
    general = KDCLLoss(2, "general", impl="reference")
    general.see_held_out(
        [(logits[:, own].unbind(0), target[own]) for logits, _, target in batches()]
    )
    evaluated = {}
    if rank == size - 1:
        criterion.eval()
        logits, index, target = batches()[0]
        evaluated["evaluated"] = torch.stack(
            list(criterion.graph_inputs(logits, target, index=index).externals.values())
        )
    return {
        **evaluated,
        **criterion.state_dict(),
        "losses": torch.stack(losses),
        "grads": torch.cat(grads, 1),
        "weights": general.teacher_weights,
    }


if __name__ == "__main__":
    folder, rank, size = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size)
    torch.save(run(rank, size), folder / f"{rank}.pt")
    dist.destroy_process_group()
