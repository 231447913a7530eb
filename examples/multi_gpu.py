r"""Train on several GPUs without a framework: torchrun, DistributedDataParallel, a loader per rank.

On eight GPUs, or on a CPU (two processes over gloo, on the digits)::

    torchrun --standalone --nproc-per-node=8 examples/multi_gpu.py --data path/to/images \
        --model resnet20 --batch-size 1024
    torchrun --standalone --nproc-per-node=2 examples/multi_gpu.py

This example is for custom training loops. ``fastokd train --gpus N`` also handles stopping,
resuming and exact running statistics.
"""

import argparse
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.nn.parallel import DistributedDataParallel

from fastokd.data import make_loader, open_dataset
from fastokd.losses import AHBFLoss, ramp_up
from fastokd.models import create_model


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default="digits", help="a folder of images, or digits")
    parser.add_argument("--model", default="resnet8")
    parser.add_argument("--branches", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument(
        "--batch-size", type=int, default=64, help="images per step over all processes"
    )
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--out", type=Path, default=Path("student.safetensors"))
    args = parser.parse_args()

    if "RANK" not in os.environ:
        sys.exit(
            "multi_gpu.py: not started by torchrun; run: torchrun --standalone --nproc-per-node=2"
            " examples/multi_gpu.py"
        )
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    rank, processes = dist.get_rank(), dist.get_world_size()

    # With the same seed, all processes have the same order, and each takes its part of a batch.
    torch.manual_seed(0)
    dataset = open_dataset(args.data)
    share = {"device": device, "rank": rank, "world_size": processes}
    train = make_loader(dataset, dataset.train, args.batch_size // processes, **share)
    evaluation = make_loader(dataset, dataset.evaluation, 256, **share)

    model = create_model(args.model, "ahbf", dataset.num_classes, args.branches, aux_blocks=1).to(
        device
    )
    parallel = DistributedDataParallel(model, device_ids=[device] if on_gpu else None)
    criterion = AHBFLoss(num_branches=args.branches)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=args.lr, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    for epoch in range(args.epochs):
        parallel.train()
        train.set_epoch(epoch)
        for images, target, _ in train:
            result = parallel(images)
            loss = criterion(
                result.logits, target, scores=result.scores, kd_weight=ramp_up(epoch, args.epochs)
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        # Every image is evaluated once, without padding; correct predictions are summed over ranks.
        model.eval()
        right = torch.zeros((), dtype=torch.int64, device=device)
        with torch.no_grad():
            for images, target, _ in evaluation:
                right += (model(images).logits[0].argmax(1) == target).sum()
        dist.all_reduce(right)
        if rank == 0:
            print(
                f"epoch {epoch + 1}: {processes} processes, the student's accuracy"
                f" {100 * int(right) / len(dataset.evaluation):.2f} %"
            )

    if rank == 0:
        save_file(model.student().cpu().state_dict(), args.out)
        print(f"wrote {args.out}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
