"""Export the student of a run to ONNX and classify images with onnxruntime.

    fastokd train --data path/to/images --model resnet20 --epochs 10 --out runs/pets
    python examples/export_onnx.py runs/pets image.jpg another.jpg

Needs ``pip install -e '.[export]'``. In deployment, only ``classify`` is needed, with
onnxruntime, NumPy and Pillow.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image


def classify(
    session: onnxruntime.InferenceSession, record: dict, files: list[Path]
) -> list[tuple[str, float]]:
    """Return the predicted class of each image and its probability.

    Args:
        session: the exported network.
        record: the JSON record in the file's metadata.
        files: image files in any format of Pillow.
    """
    settings = record["preprocessing"]
    height, width = settings["image_size"]
    # Records of early versions have no shorter_side.
    shorter = settings.get("shorter_side", min(height, width))
    batch = []
    for file in files:
        image = Image.open(file).convert("RGB")
        wide, high = (shorter * side // min(image.size) for side in image.size)
        left, top = round((wide - width) / 2), round((high - height) / 2)
        image = image.resize((wide, high), Image.Resampling.BILINEAR).crop(
            (left, top, left + width, top + height)
        )
        pixels = np.asarray(image, dtype=np.float32) / 255
        batch.append(((pixels - settings["mean"]) / settings["std"]).transpose(2, 0, 1))
    images = np.stack(batch).astype(np.float32)  # [B, 3, H, W]
    (logits,) = session.run(["logits"], {"images": images})  # [B, C]
    exponentials = np.exp(logits - logits.max(1, keepdims=True))
    probabilities = exponentials / exponentials.sum(1, keepdims=True)
    return [(record["classes"][row.argmax()], float(row.max())) for row in probabilities]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="a run folder of 'fastokd train'")
    parser.add_argument("images", type=Path, nargs="+", help="image files")
    args = parser.parse_args()

    # fastokd verifies the export on the run's images before writing the file.
    subprocess.run(
        [sys.executable, "-m", "fastokd", "export", args.run, "--to", "onnx"], check=True
    )
    session = onnxruntime.InferenceSession(args.run / "export" / "student.onnx")
    record = json.loads(session.get_modelmeta().custom_metadata_map["fastokd"])
    for image, (name, probability) in zip(
        args.images, classify(session, record, args.images), strict=True
    ):
        print(f"{image}: {name} ({100 * probability:.1f} %)")


if __name__ == "__main__":
    main()
