"""Branch a torchvision network, train it with AHBF, and export the plain torchvision network.

On your images, or on the digits that come with fastokd::

    python examples/branch_torchvision.py --data path/to/images --model resnet18 --at layer3
    python examples/branch_torchvision.py

The written file loads into ``torchvision.models.MODEL(num_classes=C)`` with ``strict=True``,
without fastokd.
"""

import argparse
from pathlib import Path

import torch
import torchvision
from safetensors.torch import load_file, save_file

from fastokd.data import make_loader, open_dataset
from fastokd.losses import AHBFLoss, ramp_up
from fastokd.models import branch_out


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default="digits", help="a folder of images, or digits")
    parser.add_argument("--model", default="resnet18", help="a classifier of torchvision")
    parser.add_argument(
        "--at",
        default="layer3",
        help=(
            "first module that each branch has separately; list the choices with: fastokd models"
            " torchvision:NAME"
        ),
    )
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--branches", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--out", type=Path, default=Path("student.safetensors"))
    args = parser.parse_args()

    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dataset = open_dataset(args.data, image_size=args.image_size)
    train = make_loader(dataset, dataset.train, args.batch_size, device=device)
    evaluation = make_loader(dataset, dataset.evaluation, 256, device=device)

    network = torchvision.models.get_model(
        args.model, weights=None, num_classes=dataset.num_classes
    )
    model = branch_out(network, at=args.at, num_branches=args.branches, deepen=1).to(device)
    criterion = AHBFLoss(num_branches=args.branches)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=args.lr, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    for epoch in range(args.epochs):
        train.set_epoch(epoch)
        for images, target, _ in train:
            result = model(images)
            loss = criterion(
                result.logits, target, scores=result.scores, kd_weight=ramp_up(epoch, args.epochs)
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}")

    save_file(model.student().cpu().state_dict(), args.out)
    student = torchvision.models.get_model(
        args.model, weights=None, num_classes=dataset.num_classes
    )
    student.load_state_dict(load_file(args.out), strict=True)
    student.to(device).eval()
    with torch.no_grad():
        right = sum(
            int((student(images).argmax(1) == target).sum()) for images, target, _ in evaluation
        )
    print(
        f"{args.out}: torchvision's {args.model} alone, {100 * right / len(dataset.evaluation):.2f}"
        f" % of {len(dataset.evaluation)} images"
    )


if __name__ == "__main__":
    main()
