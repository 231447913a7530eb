"""The programs in ``examples/`` run as their first lines say, in the small, and do what they
show.
"""

import contextlib
import io
import re
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torchvision
from launching import finish, start, start_ranks
from PIL import Image
from safetensors.torch import load_file

from fastokd.cli import main
from fastokd.models import create_student

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def run(name: str, *arguments: object) -> str:
    """The output of an example in a separate process."""
    code, output, errors = finish(start([ROOT / "examples" / name, *arguments]))
    assert code == 0, f"{output}\n{errors}"
    return output


def run_here(name: str, *arguments: object) -> str:
    """The output of an example that leaves nothing behind in this process."""
    path = str(ROOT / "examples" / name)
    output = io.StringIO()
    with (
        patch.object(sys, "argv", [path, *map(str, arguments)]),
        contextlib.redirect_stdout(output),
    ):
        runpy.run_path(path, run_name="__main__")
    return output.getvalue()


def last_percentage(output: str) -> float:
    return float(re.findall(r"([\d.]+) %", output)[-1])


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Files of two classes, dark and bright, 40 x 32."""
    root = tmp_path_factory.mktemp("pictures")
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 64), ("val", 8)):
        for name, level in (("bright", 128), ("dark", 0)):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = torch.randint(
                    level, level + 128, (32, 40, 3), generator=generator, dtype=torch.uint8
                )
                Image.fromarray(pixels.numpy()).save(folder / f"{index}.jpg")
    return root


def test_own_loop_example_learns():
    assert last_percentage(run_here("own_loop.py", "--epochs", 3)) > 85  # ten classes


def test_branch_torchvision(tmp_path):
    out = tmp_path / "student.safetensors"
    output = run_here(
        "branch_torchvision.py",
        "--model",
        "resnet18",
        "--at",
        "layer4",
        "--image-size",
        16,
        "--branches",
        2,
        "--epochs",
        2,
        "--out",
        out,
    )
    assert last_percentage(output) > 50
    torchvision.models.resnet18(num_classes=10).load_state_dict(load_file(out), strict=True)


def test_branch_timm():
    timm = pytest.importorskip("timm", reason="needs pip install -e '.[timm]'")
    output = run_here(
        "branch_timm.py", "--model", "resnet10t", "--at", "layer3", "--branches", 2, "--epochs", 2
    )
    assert float(re.findall(r"branch1 ([\d.]+)", output)[-1]) > 50
    count = sum(
        parameter.numel()
        for parameter in timm.create_model("resnet10t", num_classes=10).parameters()
    )
    assert output.strip().endswith(f"(ResNet), {count:,} parameters")


@pytest.mark.parametrize("weights", [False, True])
def test_branch_timm_normalises_as_the_weights_were_trained(weights, monkeypatch, tmp_path):
    timm = pytest.importorskip("timm", reason="needs pip install -e '.[timm]'")
    model = "vit_tiny_patch16_224"  # 0.5 for all, neither the digits' values nor ImageNet's
    opened = {}

    def open_dataset(*_, **given):
        opened.update(given)
        raise SystemExit

    monkeypatch.setattr("fastokd.data.open_dataset", open_dataset)
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "branch_timm.py",
            "--model",
            model,
            "--image-size",
            "224",
            *(["--weights", str(tmp_path / "w")] if weights else []),
        ],
    )
    with pytest.raises(SystemExit):
        runpy.run_path(str(ROOT / "examples" / "branch_timm.py"), run_name="__main__")
    wanted = timm.create_model(model).pretrained_cfg
    assert opened == {
        "image_size": 224,
        **({"mean": wanted["mean"], "std": wanted["std"]} if weights else {}),
    }


def test_multi_gpu_without_torchrun(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    code, output, errors = finish(start([ROOT / "examples" / "multi_gpu.py"]))
    assert (code, output) == (1, "")
    assert (
        errors
        == "multi_gpu.py: not started by torchrun; run: torchrun --standalone --nproc-per-node=2"
        " examples/multi_gpu.py\n"
    )


def test_multi_gpu_with_two_processes(tmp_path):
    out = tmp_path / "student.safetensors"
    processes = start_ranks(2, [ROOT / "examples" / "multi_gpu.py", "--epochs", 2, "--out", out])
    (first, output, errors), (second, silent, _) = map(finish, processes)
    assert (first, second) == (0, 0), errors
    assert "2 processes" in output
    assert silent == ""
    assert float(re.findall(r"accuracy ([\d.]+) %", output)[-1]) > 40
    create_student("resnet8", 10).load_state_dict(load_file(out), strict=True)


def test_imagenet_dali(pictures):
    pytest.importorskip("nvidia.dali", reason="needs pip install -e '.[dali]'")
    output = run(
        "imagenet_dali.py",
        "--data",
        pictures,
        "--model",
        "resnet8",
        "--branches",
        2,
        "--image-size",
        32,
        "--batch-size",
        8,
        "--steps",
        6,
        "--epochs",
        2,
    )
    assert output.count("images/s") == 2
    assert last_percentage(output) >= 50


def test_export_onnx(pictures, tmp_path):
    pytest.importorskip("onnxruntime", reason="needs pip install -e '.[export]'")
    folder = tmp_path / "run"
    assert (
        main(
            [
                "train",
                "--data",
                str(pictures),
                "--image-size",
                "32",
                "--model",
                "resnet8",
                "--method",
                "baseline",
                "--batch-size",
                "16",
                "--lr",
                "0.01",
                "--epochs",
                "2",
                "--out",
                str(folder),
                "--quiet",
                "--device",
                "cpu",
            ]
        )
        == 0
    )
    shown = [pictures / "val" / name / "3.jpg" for name in ("dark", "bright")]
    lines = run_here("export_onnx.py", folder, *shown).splitlines()[-2:]
    assert [re.match(r".*: (\w+) \(", line)[1] for line in lines] == ["dark", "bright"]


@pytest.mark.parametrize("shorter", [{}, {"shorter_side": 32}])
def test_export_onnx_example_reads_early_record(shorter, pictures):
    pytest.importorskip("onnxruntime", reason="needs pip install -e '.[export]'")
    given = []
    session = SimpleNamespace(
        run=lambda _, feeds: (given.append(feeds["images"]) or np.array([[0.0, 3.0]]),)
    )
    record = {
        "preprocessing": {"image_size": [32, 32], "mean": [0.5] * 3, "std": [0.25] * 3, **shorter},
        "classes": ["bright", "dark"],
    }
    classify = runpy.run_path(str(ROOT / "examples" / "export_onnx.py"))["classify"]
    assert classify(session, record, [pictures / "val" / "dark" / "3.jpg"]) == [
        ("dark", pytest.approx(1 / (1 + np.exp(-3))))
    ]
    assert given[0].shape == (1, 3, 32, 32)


@pytest.mark.parametrize(
    ("name", "steps", "chance"), [("segmentation.py", 100, 33.4), ("tokens.py", 120, 12.5)]
)
def test_dense_example_trains_above_chance(name, steps, chance):
    calls = {
        "segmentation.py": lambda: run_here("segmentation.py", "--steps", steps),
        "tokens.py": lambda: run_here("tokens.py", "--steps", steps),
    }
    assert last_percentage(calls[name]()) > 1.2 * chance


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_examples_have_usage_and_a_test(path):
    text = path.read_text(encoding="utf-8")
    assert f"python examples/{path.name}" in text or f"examples/{path.name} --" in text
    is_run_here = re.search(
        rf'(?:run(?:_here)?\(\s*|/ )"{path.name}"', Path(__file__).read_text(encoding="utf-8")
    )
    # test_docs.py runs the commands of the pages.
    pages = [page.read_text(encoding="utf-8") for page in (ROOT / "docs").glob("*.md")]
    command = rf"^fastokd train .*--plugin examples/{path.name}"
    assert is_run_here or any(re.search(command, page, re.MULTILINE) for page in pages)
    assert f"`{path.name}`" in (ROOT / "docs" / "own-loop.md").read_text(encoding="utf-8")
