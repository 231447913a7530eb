r"""Train a branched ResNet-18 on ImageNet images decoded by NVIDIA DALI, in your own loop.

The second command is small enough for a CPU::

    python examples/imagenet_dali.py --data path/to/imagenet
    python examples/imagenet_dali.py --data path/to/images --model resnet8 --image-size 32 \
        --batch-size 8 --steps 3

Needs ``pip install -e '.[dali]'``. The folder has ``train/SYNSET/`` and ``val/``;
``val/`` has a label file or class folders. For complete training runs use ``fastokd train --loader
dali``.
"""

import argparse
import time
from itertools import islice

import torch

from fastokd.data import list_files, make_loader
from fastokd.losses import AHBFLoss, ramp_up
from fastokd.models import create_model


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="the folder of images")
    parser.add_argument("--model", default="resnet18_imagenet")
    parser.add_argument("--branches", type=int, default=4)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=96)
    parser.add_argument("--epochs", type=int, default=90)
    parser.add_argument("--steps", type=int, help="steps per epoch; default: all")
    args = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dataset = list_files(
        args.data, image_size=args.image_size
    )  # lists and checks the files without decoding
    train = make_loader(dataset, dataset.train, args.batch_size, loader="dali", device=device)
    evaluation = make_loader(
        dataset, dataset.evaluation, args.batch_size, loader="dali", device=device
    )
    model = create_model(args.model, "ahbf", dataset.num_classes, args.branches, aux_blocks=2).to(
        device, memory_format=torch.channels_last
    )
    criterion = AHBFLoss(num_branches=args.branches)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4
    )
    schedule = torch.optim.lr_scheduler.MultiStepLR(
        optimizer, [args.epochs // 3, 2 * args.epochs // 3]
    )
    for epoch in range(args.epochs):
        model.train()
        train.set_epoch(epoch)
        start, seen = time.perf_counter(), 0
        for images, target, _ in islice(
            train, args.steps
        ):  # normalized, on the device, channels-last
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                result = model(images)
            loss = criterion(
                result.logits, target, scores=result.scores, kd_weight=ramp_up(epoch, args.epochs)
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seen += len(target)
        schedule.step()
        last = loss.item()  # waits for the device, so the time includes all steps
        speed = seen / (time.perf_counter() - start)
        model.eval()
        with torch.no_grad():
            right = sum(
                int((model(images).logits[0].argmax(1) == target).sum())
                for images, target, _ in evaluation
            )
        print(
            f"epoch {epoch + 1}: loss {last:.3f}, {speed:.0f} images/s, the student's accuracy"
            f" {100 * right / len(dataset.evaluation):.2f} %"
        )


if __name__ == "__main__":
    main()
