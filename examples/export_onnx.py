"""The student of a run as an ONNX file, run by onnxruntime on pictures: from a file name to a class
name.

    fastokd train --data path/to/images --model resnet20 --epochs 10 --out runs/pets
    python examples/export_onnx.py runs/pets picture.jpg another.jpg

Needs ``pip install 'fastokd[export]'``. What deploys the file needs onnxruntime, NumPy and Pillow,
and no PyTorch: ``classify`` is all of it.
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
    session: onnxruntime.InferenceSession, record: dict, pictures: list[Path]
) -> list[tuple[str, float]]:
    """The class of each picture and its probability; ``record`` is the JSON in the file's
    metadata.
    """
    height, width = record["preprocessing"]["image_size"]
    shorter = record["preprocessing"].get(
        "shorter_side", min(height, width)
    )  # records of early versions have none
    batch = []
    for picture in pictures:
        image = Image.open(picture).convert("RGB")
        wide, high = (shorter * side // min(image.size) for side in image.size)
        left, top = round((wide - width) / 2), round((high - height) / 2)
        image = image.resize((wide, high), Image.Resampling.BILINEAR).crop(
            (left, top, left + width, top + height)
        )
        pixels = np.asarray(image, dtype=np.float32) / 255
        batch.append(
            ((pixels - record["preprocessing"]["mean"]) / record["preprocessing"]["std"]).transpose(
                2, 0, 1
            )
        )
    (logits,) = session.run(
        ["logits"], {"images": np.stack(batch).astype(np.float32)}
    )  # [B, 3, H, W] to [B, C]
    odds = np.exp(logits - logits.max(1, keepdims=True))
    probabilities = odds / odds.sum(1, keepdims=True)
    return [(record["classes"][row.argmax()], float(row.max())) for row in probabilities]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="a run folder of 'fastokd train'")
    parser.add_argument("pictures", type=Path, nargs="+")
    args = parser.parse_args()

    # Checked on the run's own images before it is written: the ONNX file gives the student's
    # logits.
    subprocess.run(
        [sys.executable, "-m", "fastokd", "export", args.run, "--to", "onnx"], check=True
    )
    session = onnxruntime.InferenceSession(args.run / "export" / "student.onnx")
    record = json.loads(session.get_modelmeta().custom_metadata_map["fastokd"])
    for picture, (name, probability) in zip(
        args.pictures, classify(session, record, args.pictures), strict=True
    ):
        print(f"{picture}: {name} ({100 * probability:.1f} %)")


if __name__ == "__main__":
    main()
