"""Networks of torchvision and timm from the command line: train, resume, evaluate, export; and the
list of networks.
"""

import json
import re

import pytest
import torch
import torchvision
from PIL import Image
from safetensors.torch import load_file

from fastokd.cli import main
from fastokd.models import list_models


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Two classes of coloured noise, 32 x 32."""
    root = tmp_path_factory.mktemp("library") / "images"
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 8), ("val", 3)):
        for index, name in enumerate(("cat", "dog")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = torch.randint(0, 200, (32, 32, 3), generator=generator, dtype=torch.uint8)
                pixels[..., index] += 55
                Image.fromarray(pixels.numpy()).save(folder / f"{number}.png")
    return root


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments):
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_train_resume_evaluate_export(run, images, tmp_path):
    base = (
        "train",
        "--data",
        images,
        "--model",
        "torchvision:mobilenet_v3_small",
        "--at",
        "features.11",
    )
    code, out, err = run(
        *base,
        "--branches",
        "2",
        "--aux-blocks",
        "1",
        "--epochs",
        "1",
        "--batch-size",
        "8",
        "--lr",
        "0.01",
        "--quiet",
    )
    assert code == 0, err
    folder = tmp_path / "runs" / "torchvision-mobilenet_v3_small-ahbf-seed0"
    assert "at: features.11" in (folder / "config.yaml").read_text()
    code, out, err = run("train", "--resume", folder, "--epochs", "2", "--quiet")
    assert code == 0, err
    assert run("eval", folder)[0] == 0
    code, out, err = run("export", folder)
    assert code == 0, err
    assert "the same logits" in out
    code, out, err = run("eval", folder / "export", "--data", images)
    assert code == 0, err
    student = torchvision.models.mobilenet_v3_small(num_classes=2)
    student.load_state_dict(load_file(folder / "export" / "student.safetensors"), strict=True)


def test_baseline_needs_no_split_and_timm_trains(run, images, tmp_path):
    pytest.importorskip("timm")
    code, _, err = run(
        "train",
        "--data",
        images,
        "--model",
        "timm:test_resnet",
        "--method",
        "baseline",
        "--epochs",
        "1",
        "--batch-size",
        "8",
        "--out",
        "r",
        "--quiet",
    )
    assert code == 0, err
    record = json.loads((tmp_path / "r" / "student.json").read_text())
    assert record["architecture"]["name"] == "timm:test_resnet"
    assert run("eval", "r")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        (
            ("--model", "torchvision:resnet81", "--at", "layer3"),
            r"torchvision has no classifier 'resnet81'; did you mean 'resnet18'\?",
        ),
        (
            ("--model", "torchvision:resnet18", "--at", "layer9"),
            r"at='layer9': ResNet has no module of that name; did you mean 'layer\d'\?",
        ),
        (("--model", "resnet20", "--at", "layer3"), "resnet20 is branched as in its paper"),
        (("--model", "hub:resnet18"), "'hub' is neither a library nor a module"),
        (("--model", "mobilenet_v3_small"), "use 'torchvision:mobilenet_v3_small'"),
        (
            ("--model", "resnte18"),
            r"unknown model 'resnte18'; did you mean .* torchvision:NAME and timm:NAME",
        ),
    ],
)
def test_user_errors_are_reported_before_reading(run, tmp_path, arguments, pattern):
    code, _, err = run("train", "--data", tmp_path / "nowhere", *arguments)
    assert code == 2
    assert len(err.strip().splitlines()) == 1
    assert re.search(pattern, err), err


def test_too_small_images_are_refused(run, images):
    code, _, err = run(
        "train",
        "--data",
        images,
        "--model",
        "torchvision:vit_b_16",
        "--at",
        "encoder.layers.encoder_layer_11",
        "--method",
        "one",
        "--branches",
        "2",
    )
    assert code == 2
    assert re.fullmatch(
        r"fastokd: the network cannot take images of 32 x 32 pixels \(.*\); it is made for 224 x"
        r" 224: pass --image-size 224, or another --model\n",
        err,
    ), err


def test_models_lists_costs(run):
    code, out, err = run("models", "resnet32", "--num-classes", "100")
    assert code == 0, err
    # The published counts of ResNet-32 with four branches and a = 4.
    assert re.search(r"student, alone +472,756 +138\.26", out)
    assert re.search(r"training network +3,354,418 +503\.20", out)
    assert re.search(r"branch4, with the trunk +1,360,564 +251\.51", out)
    assert re.search(r"methods: .*ahbf, baseline", out)
    code, out, err = run("models", "torchvision:resnet18")
    assert code == 0, err
    assert "layer3 (recommended)" in out
    code, out, err = run(
        "models",
        "torchvision:resnet18",
        "--at",
        "layer3",
        "--aux-blocks",
        "0",
        "--num-classes",
        "1000",
    )
    assert code == 0, err
    assert re.search(r"student, alone +11,689,512 +3,628\.15", out)
    assert "images of 224 x 224" in out


def test_models_shows_peers_and_compression(run):
    code, out, err = run("models", "resnet20, resnet32", "--method", "dml", "--num-classes", "100")
    assert code == 0, err
    # The published counts of the two networks alone.
    assert re.search(r"branch1, a peer +278,324 ", out)
    assert re.search(r"branch2, a peer +472,756 ", out)
    assert re.search(r"training network +751,080 ", out)
    assert re.search(r"methods: .*dml", out)
    code, out, err = run(
        "models", "resnet8", "--method", "okddip", "--topology", "peers", "--branches", "3"
    )
    assert code == 0, err
    assert re.search(r"branch3, a peer +78,042 ", out)
    code, out, err = run(
        "models", "resnet32", "--compression", "--aux-blocks", "2", "--num-classes", "100"
    )
    assert code == 0, err
    assert re.search(r"student, alone +472,756 ", out)
    assert re.search(r"branch4, with the trunk +472,756 ", out)
    assert int(re.search(r"branch1, with the trunk +([\d,]+)", out)[1].replace(",", "")) < 472_756


@pytest.mark.parametrize("size", [0, -3])
@pytest.mark.parametrize("name", [(), ("resnet8",)])
def test_models_refuses_invalid_image_size(run, name, size):
    code, _, err = run("models", *name, "--image-size", size)
    assert (code, err) == (2, f"fastokd: image_size={size}: it must be at least 1\n")


def test_models_lists_every_network(run, monkeypatch):
    monkeypatch.setattr("fastokd.cli.models.list_models", lambda: ["resnet14", "resnet8"])
    code, out, err = run("models", "--method", "one")
    assert code == 0, err
    rows = {line.split()[0]: line for line in out.splitlines() if line.startswith("resnet")}
    assert list(rows) == ["resnet14", "resnet8"]
    assert re.search(r"resnet8 +32 +0\.08 +25 +0\.\d\d +\d+ +all", rows["resnet8"])
    assert "torchvision:NAME or timm:NAME" in out
    assert re.search(r"all methods: .*ahbf, baseline", out)
    assert len(list_models()) > 5
