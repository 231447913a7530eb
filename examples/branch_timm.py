r"""Branch a timm network and fine-tune it with ONE.

With trained weights, on your images::

    python examples/branch_timm.py --data path/to/images --model mobilenetv3_small_050 \
        --at blocks.4 --image-size 224 --weights weights.safetensors

With random weights, on the digits that come with fastokd::

    python examples/branch_timm.py

Needs ``pip install -e '.[timm]'``. ``--weights`` is a safetensors file with timm's weights for
the network; nothing is downloaded. With ``--weights``, images are normalized as in the network's
training; set ``--image-size`` to the size used there.
"""

import argparse

import timm
import torch
from safetensors.torch import load_file

from fastokd.data import make_loader, open_dataset
from fastokd.losses import ONELoss
from fastokd.models import branch_out


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default="digits", help="a folder of images, or digits")
    parser.add_argument("--model", default="mobilenetv3_small_050", help="a classifier of timm")
    parser.add_argument(
        "--at",
        default="blocks.4",
        help=(
            "first module that each branch has separately; list the choices with: fastokd models"
            " timm:NAME"
        ),
    )
    parser.add_argument(
        "--weights", help="a safetensors file of the network's weights; default: random weights"
    )
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--branches", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    args = parser.parse_args()

    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = timm.create_model(args.model, pretrained=False)
    expected = timm.data.resolve_model_data_config(network)
    normalization = (
        {"mean": expected["mean"], "std": expected["std"]} if args.weights else {}
    )  # {}: the normalization of the dataset
    dataset = open_dataset(args.data, image_size=args.image_size, **normalization)
    train = make_loader(dataset, dataset.train, args.batch_size, device=device)
    evaluation = make_loader(dataset, dataset.evaluation, 256, device=device)

    if args.weights:
        network.load_state_dict(load_file(args.weights), strict=True)
    network.reset_classifier(dataset.num_classes)
    model = branch_out(network, at=args.at, num_branches=args.branches, method="one").to(device)
    criterion = ONELoss(num_branches=args.branches)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    for epoch in range(args.epochs):
        model.train()
        train.set_epoch(epoch)
        for images, target, _ in train:
            result = model(images)
            loss = criterion(result.logits, target, scores=result.scores)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        model.eval()
        right = dict.fromkeys((*criterion.graph.logits, "ensemble"), 0)
        with torch.no_grad():
            for images, target, _ in evaluation:
                result = model(images)
                for name, row in criterion.named_logits(
                    result.logits, scores=result.scores
                ).items():
                    right[name] += int((row.argmax(1) == target).sum())
        print(
            f"epoch {epoch + 1}: loss {loss.item():.3f}, accuracy in %: "
            + ", ".join(
                f"{name} {100 * count / len(dataset.evaluation):.2f}"
                for name, count in right.items()
            )
        )
    print(
        f"student: timm's {args.model} ({type(model.student()).__name__}),"
        f" {sum(p.numel() for p in model.student().parameters()):,} parameters"
    )


if __name__ == "__main__":
    main()
