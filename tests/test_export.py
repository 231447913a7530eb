"""The student as a file: every format gives the student's logits to whoever loads it, says what it
is, and breaks in one line.
"""

import io
import json
import os
import re
import shutil
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from fastokd.cli import main
from fastokd.data import Batch, ResidentLoader, open_dataset
from fastokd.errors import CheckpointError, ConfigError
from fastokd.export import (
    compare_logits,
    export_student,
    get_format,
    list_formats,
    load_student,
    open_export,
    strip_wrappers,
    write_student,
)
from fastokd.models import create_model, create_student
from fastokd.train.runs import load_run

DOCS = (Path(__file__).resolve().parent.parent / "docs" / "export.md").read_text(encoding="utf-8")
TRAIN = [
    "train",
    "--data",
    "digits",
    "--batch-size",
    "128",
    "--lr",
    "0.05",
    "--epochs",
    "1",
    "--quiet",
    "--device",
    "cpu",
]
FORMATS = ["safetensors", "onnx", "torch-export"]
TWINS = ["torchvision", "timm"]
FILES = {
    "safetensors": "student.safetensors",
    "onnx": "student.onnx",
    "torch-export": "student.pt2",
    "torchvision": "student.torchvision.safetensors",
    "timm": "student.timm.safetensors",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of one epoch with two branches of different depth, exported in every format that its
    network has.
    """
    folder = tmp_path_factory.mktemp("export") / "run"
    assert (
        main(
            [
                *TRAIN,
                "--model",
                "resnet8",
                "--branches",
                "2",
                "--aux-blocks",
                "1",
                "--out",
                str(folder),
            ]
        )
        == 0
    )
    for name in FORMATS:
        assert main(["export", str(folder), "--to", name, "--device", "cpu"]) == 0
    return folder


@pytest.fixture(scope="module")
def twin_run(tmp_path_factory):
    """A run of a network that torchvision and timm have too, exported for both."""
    folder = tmp_path_factory.mktemp("twin") / "run"
    assert (
        main(
            [
                *TRAIN,
                "--model",
                "resnet18_imagenet",
                "--method",
                "baseline",
                "--branches",
                "1",
                "--aux-blocks",
                "0",
                "--out",
                str(folder),
            ]
        )
        == 0
    )
    for name in TWINS:
        assert main(["export", str(folder), "--to", name, "--device", "cpu"]) == 0
    return folder


@pytest.fixture(scope="module")
def images():
    """Real images as the runs saw them, float32 [355, 3, 8, 8], without fastokd's loader."""
    data = open_dataset("digits")
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (data.mean, data.std))
    return (data.test.images / 255 - mean) / std


def trained_logits(folder, images, branch=0):
    """The logits of the checkpoint's branched network. With weights in channels-last order they
    would be rounded differently.
    """
    model = load_run(folder, device="cpu").evaluator.model.to(memory_format=torch.contiguous_format)
    with torch.no_grad():
        return model(images).logits[branch]


def file_of(folder, name):
    return folder / "export" / FILES[name]


# --- what is in a file, read with the libraries that read such files
# -------------------------------------------------


def read_metadata(path):
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            return file.metadata()["fastokd"]
    if path.suffix == ".onnx":
        import onnx

        return {item.key: item.value for item in onnx.load(path).metadata_props}["fastokd"]
    return read_archive(path)["extra/fastokd.json"]


def stock_network(path):
    """A file as a function, loaded by the library it is for; a state dict into a network that
    the library creates.
    """
    if path.suffix == ".onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(str(path))
        return lambda x: torch.from_numpy(session.run(None, {"images": x.contiguous().numpy()})[0])
    if path.suffix == ".pt2":
        return torch.export.load(path).module()
    if path.suffix == ".pt":
        with pytest.warns(FutureWarning, match="deprecated"):
            return torch.jit.load(path)
    if "torchvision" in path.name:
        import torchvision

        network = torchvision.models.resnet18(num_classes=10)
    elif "timm" in path.name:
        import timm

        network = timm.create_model("resnet18", num_classes=10)
    else:
        network = create_student("resnet8", 10)
    network.load_state_dict(load_file(path), strict=True)
    return network.eval()


@pytest.mark.parametrize("name", [*FORMATS, *TWINS])
def test_export_in_its_library_has_student_logits(request, images, name):
    folder = request.getfixturevalue("twin_run" if name in TWINS else "run")
    network, expected = stock_network(file_of(folder, name)), trained_logits(folder, images)
    start = 0
    for size in (1, 3, 7, 344):  # all sizes of a batch, and every image once
        part = slice(start, start + size)
        start += size
        with torch.no_grad():
            found = network(images[part])
        assert torch.equal(found.argmax(1), expected[part].argmax(1))
        if name == "onnx":
            torch.testing.assert_close(
                found, expected[part], rtol=0, atol=1e-4 * max(1.0, expected.abs().max().item())
            )
        elif name == "torch-export":
            torch.testing.assert_close(found, expected[part], rtol=0, atol=1e-5)
        else:
            # The same kernels on the same batches: every bit.
            whole = trained_logits(folder, images[part])
            assert torch.equal(found, whole)


@pytest.mark.parametrize("name", [*FORMATS, *TWINS])
def test_record_in_file_equals_json_next_to_it(request, name):
    folder = request.getfixturevalue("twin_run" if name in TWINS else "run")
    path = file_of(folder, name)
    record = json.loads(read_metadata(path))
    beside = "student.json" if name == "safetensors" else f"student.{name}.json"
    assert json.loads((folder / "export" / beside).read_text(encoding="utf-8")) == record
    summary = json.loads((folder / "summary.json").read_text())
    data = open_dataset("digits")
    model = "resnet18_imagenet" if name in TWINS else "resnet8"
    assert record["architecture"] == {"name": model, "num_classes": 10}
    assert record["classes"] == [str(digit) for digit in range(10)]
    assert record["preprocessing"] == {
        "color": "RGB",
        "background": None,
        "shorter_side": 8,
        "image_size": [8, 8],
        "scale": "divide by 255",
        "mean": list(data.mean),
        "std": list(data.std),
    }
    assert record["accuracy"] == {
        "top1": summary["last"]["branch1"],
        "data": "digits",
        "split": "test",
        "num_images": 355,
        "epoch": 1,
    }
    environment = json.loads((folder / "environment.json").read_text())
    run = record["provenance"].pop("run")
    assert re.fullmatch("[0-9a-f]{12}", run)
    assert json.loads((folder / "student.json").read_text())["provenance"]["run"] == run
    assert record["provenance"] == {
        "fastokd": environment["fastokd"],
        "torch": environment["torch"],
        "commit": environment["commit"],
        "method": "baseline" if name in TWINS else "ahbf",
        "preset": "paper",
        "branches": 1 if name in TWINS else 2,
        "branch": 1,
        "aux_blocks": 0 if name in TWINS else 1,
        "compression": False,
        "seed": 0,
        "epochs": 1,
        "checkpoint": "last",
    }
    assert record["export"]["to"] == name
    assert record["export"]["tolerance"] == (0 if path.suffix == ".safetensors" else 1e-4)


def test_onnx_is_one_valid_file(run):
    import onnx

    path = file_of(run, "onnx")
    onnx.checker.check_model(str(path), full_check=True)
    model = onnx.load(path, load_external_data=False)
    assert [(item.domain, item.version) for item in model.opset_import] == [("", 18)]
    assert json.loads(read_metadata(path))["export"]["opset"] == 18
    assert not any(item.external_data for item in model.graph.initializer)
    weights = sum(int(np.prod(item.dims)) for item in model.graph.initializer)
    assert weights > 77_000  # the 78,042 parameters, batch norm folded into the convolutions
    (taken,), (given,) = model.graph.input, model.graph.output
    shapes = [
        [item.dim_param or item.dim_value for item in value.type.tensor_type.shape.dim]
        for value in (taken, given)
    ]
    assert (taken.name, given.name, shapes) == (
        "images",
        "logits",
        [["batch", 3, 8, 8], ["batch", 10]],
    )


@pytest.mark.parametrize("name", ["onnx", "torch-export"])
def test_exported_files_contain_no_local_paths(run, name):
    blob = file_of(run, name).read_bytes()
    parts = (
        [blob]
        if name == "onnx"
        else [
            zipfile.ZipFile(io.BytesIO(blob)).read(item)
            for item in zipfile.ZipFile(io.BytesIO(blob)).namelist()
        ]
    )
    here = os.path.dirname(torch.__file__).encode()
    assert not any(here in part or b"fastokd/models/residual.py" in part for part in parts)


# --- the command line
# -------------------------------------------------------------------------------------------------


def call(capsys, *arguments):
    capsys.readouterr()
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def mistake(result, code, pattern):
    got, _, err = result
    assert got == code, err
    assert len(err.strip().splitlines()) == 1, err
    assert re.search(pattern, err), err


@pytest.mark.parametrize("name", [*FORMATS, *TWINS])
def test_eval_of_exported_file_reproduces_accuracy(request, capsys, name):
    folder = request.getfixturevalue("twin_run" if name in TWINS else "run")
    said = f"{100 * json.loads((folder / 'summary.json').read_text())['last']['branch1']:.2f}"
    code, out, err = call(
        capsys, "eval", file_of(folder, name), "--data", "digits", "--device", "cpu"
    )
    assert (code, err) == (0, "")
    assert f"alone ({name}) on digits, 355 test images" in out
    assert f"accuracy {said} % (stored with the export: {said} % on digits, 355 test images)" in out


def test_export_to_unknown_format_lists_the_formats(run, capsys):
    code, _, err = call(capsys, "export", run, "--to", "torchscrpt")
    assert code == 2
    assert f"--to: invalid choice 'torchscrpt' (choices: {', '.join(list_formats())});" in err


def test_export_of_other_branch_has_its_logits(run, images, tmp_path, capsys):
    for branch in ("2", "branch2"):
        code, out, _ = call(
            capsys, "export", run, "--branch", branch, "--out", tmp_path, "--device", "cpu"
        )
        assert code == 0
        assert "the same logits bit for bit on 355 images" in out
    student, record = load_student(tmp_path)
    assert record["architecture"] == {
        "name": "resnet8",
        "num_classes": 10,
        "branch": 1,
        "method": "ahbf",
        "num_branches": 2,
        "aux_blocks": 1,
        "topology": None,
        "at": None,
        "compression": False,
        "options": {"gate_attention": "none"},
    }
    with torch.no_grad():
        assert torch.equal(student(images), trained_logits(run, images, 1))
    assert (
        record["accuracy"]["top1"]
        == json.loads((run / "summary.json").read_text())["last"]["branch2"]
    )
    for wrong in ("0", "3", "teacher", "\u00b2"):
        mistake(
            call(capsys, "export", run, "--branch", wrong, "--out", tmp_path),
            2,
            rf"unknown branch '{wrong}'.*\(choices: branch1, branch2\)",
        )


def test_export_does_not_overwrite_other_files(run, tmp_path, capsys):
    shutil.copy(file_of(run, "safetensors"), tmp_path)
    mistake(
        call(capsys, "export", run, "--branch", "2", "--out", tmp_path),
        2,
        r"student\.safetensors is the export of another run \(resnet8, .*branch 1.*choose another"
        r" folder",
    )
    assert (tmp_path / "student.safetensors").read_bytes() == file_of(
        run, "safetensors"
    ).read_bytes()
    for name in ("student.safetensors", "student.json"):
        folder = tmp_path / name.replace(".", "-")
        folder.mkdir()
        (folder / name).write_text("mine")
        mistake(
            call(capsys, "export", run, "--out", folder),
            2,
            rf"{name} exists and is not an export of fastokd",
        )
        assert [(file.name, file.read_text()) for file in folder.iterdir()] == [(name, "mine")]
    # An earlier export of the same run is replaced.
    before = (tmp_path / "student.safetensors").stat().st_ino
    assert call(capsys, "export", run, "--out", tmp_path)[0] == 0
    assert (tmp_path / "student.safetensors").stat().st_ino != before


def test_export_of_run_with_other_lr_does_not_overwrite(run, tmp_path, capsys):
    other = tmp_path / "other"
    assert (
        main(
            [
                *TRAIN,
                "--lr",
                "0.1",
                "--model",
                "resnet8",
                "--branches",
                "2",
                "--aux-blocks",
                "1",
                "--out",
                str(other),
            ]
        )
        == 0
    )
    shutil.copy(file_of(run, "safetensors"), tmp_path)
    mistake(
        call(capsys, "export", other, "--out", tmp_path),
        2,
        r"student\.safetensors is the export of another run \(resnet8, run [0-9a-f]{12}, .*choose"
        r" another folder",
    )
    assert (tmp_path / "student.safetensors").read_bytes() == file_of(
        run, "safetensors"
    ).read_bytes()


def test_export_of_continued_or_moved_run_is_replaced(run, tree, tmp_path, capsys):
    """Trained on, moved, and exported with other images for the check: its earlier export is
    replaced.
    """
    moved = tmp_path / "moved"
    shutil.copytree(run, moved)
    assert call(capsys, "train", "--resume", moved, "--epochs", "2", "--quiet")[0] == 0
    data = tmp_path / "data"
    for split in ("train", "val"):
        shutil.copytree(tree, data / split)
    code, _, err = call(capsys, "export", moved, "--data", data, "--device", "cpu")
    assert (code, err) == (0, "")
    before, after = (
        json.loads((folder / "export" / "student.json").read_text()) for folder in (run, moved)
    )
    assert (before["provenance"]["epochs"], after["provenance"]["epochs"]) == (1, 2)
    assert before["accuracy"]["data"] != after["accuracy"]["data"]
    assert before["provenance"]["run"] == after["provenance"]["run"]


def test_export_finds_network_of_any_spelling(twin_run, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(twin_run, folder)
    config = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(
        config.replace("model: resnet18_imagenet\n", "model: ResNet18-ImageNet\n")
    )
    assert (folder / "config.yaml").read_text() != config
    code, _, err = call(
        capsys, "export", folder, "--to", "torchvision", "--out", tmp_path, "--device", "cpu"
    )
    assert (code, err) == (0, "")
    assert json.loads((tmp_path / "student.torchvision.json").read_text())["architecture"] == {
        "name": "resnet18_imagenet",
        "num_classes": 10,
    }


def test_export_finds_library_peer_by_name(tmp_path, capsys):
    folder = tmp_path / "run"
    assert (
        main(
            [
                *TRAIN,
                "--model",
                "resnet8,torchvision:shufflenet_v2_x0_5",
                "--method",
                "dml",
                "--out",
                str(folder),
            ]
        )
        == 0
    )
    code, _, err = call(
        capsys, "export", folder, "--to", "torchvision", "--branch", "2", "--device", "cpu"
    )
    assert (code, err) == (0, "")
    assert json.loads((folder / "export" / "student.torchvision.json").read_text())[
        "architecture"
    ] == {"name": "torchvision:shufflenet_v2_x0_5", "num_classes": 10}
    (
        folder / "checkpoints" / "last.pt"
    ).unlink()  # a missing network is reported before anything is read
    mistake(
        call(capsys, "export", folder, "--to", "torchvision"),
        2,
        r"torchvision has no network with the weights of resnet8;",
    )


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_torchvision_export_omits_auxiliary_classifiers(run, tmp_path, name):
    import torchvision

    torch.manual_seed(0)
    student = create_student(f"torchvision:{name}", 10).eval()
    record = load_student(run)[1]
    record["architecture"]["name"] = f"torchvision:{name}"
    batch = Batch(torch.randn(4, 3, 80, 80), torch.tensor([0, 1, 2, 3]), torch.arange(4))
    path, compared = export_student(student, record, "torchvision", tmp_path, [batch])
    assert compared.num_images == 4
    written = json.loads(read_metadata(path))["export"]["constructor"]
    assert written == f"torchvision.models.{name}(aux_logits=False)"
    stock = eval(
        written.replace("(", "(num_classes=10, init_weights=False, "), {"torchvision": torchvision}
    )
    stock.load_state_dict(load_file(path), strict=True)
    with torch.no_grad():
        assert torch.equal(stock.eval()(batch.images), student(batch.images))


def test_network_unknown_to_library_is_refused(run, capsys):
    for library in TWINS:
        mistake(
            call(capsys, "export", run, "--to", library),
            2,
            rf"{library} has no network with the weights of resnet8; it has them of"
            rf" resnet18_imagenet, resnet34_imagenet.* and every {library}:NAME",
        )


@pytest.mark.parametrize(
    ("module", "to", "extra"),
    [
        ("onnx", "onnx", "export"),
        ("onnxruntime", "onnx", "export"),
        ("onnxscript", "onnx", "export"),
        ("timm", "timm", "timm"),
    ],
)
def test_missing_package_names_the_extra(
    twin_run, tmp_path, capsys, monkeypatch, module, to, extra
):
    monkeypatch.setitem(sys.modules, module, None)
    mistake(
        call(capsys, "export", twin_run, "--to", to, "--out", tmp_path),
        2,
        rf"pip install -e '\.\[{extra}\]'",
    )
    assert not list(tmp_path.iterdir())


def test_eval_without_onnxruntime_names_the_extra(run, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    mistake(
        call(capsys, "eval", file_of(run, "onnx"), "--data", "digits"),
        2,
        r"pip install -e '\.\[export\]'",
    )


def test_full_disk_leaves_no_file(run, tmp_path, capsys, monkeypatch):
    def refuse(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    mistake(
        call(capsys, "export", run, "--to", "torch-export", "--out", tmp_path),
        5,
        r"cannot write .*student\.pt2: No space left on device",
    )
    assert not list(tmp_path.iterdir())


# --- evaluation images without training images
# ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """The digits' test images as files: DIGIT/NUMBER.png."""
    root, split = tmp_path_factory.mktemp("tree") / "digits", open_dataset("digits").test
    for number, (pixels, target) in enumerate(zip(split.images, split.targets, strict=True)):
        (root / str(int(target))).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()).save(
            root / str(int(target)) / f"{number}.png"
        )
    return root


@pytest.mark.parametrize("layout", ["classes", "val", "test"])
def test_eval_needs_no_training_images(run, tree, tmp_path, capsys, layout):
    where = tree
    if layout != "classes":
        where = tmp_path / "data"
        shutil.copytree(tree, where / layout)
    said = f"{100 * json.loads((run / 'summary.json').read_text())['last']['branch1']:.2f}"
    code, out, err = call(
        capsys, "eval", file_of(run, "safetensors"), "--data", where, "--device", "cpu"
    )
    assert (code, err) == (0, "")
    assert f"accuracy {said} % (" in out
    assert f"355 {'digits' if layout == 'classes' else layout} images" in out


def test_unsuitable_evaluation_images_are_refused(run, tree, tmp_path, capsys):
    path = file_of(run, "safetensors")
    (tmp_path / "train").mkdir()
    mistake(call(capsys, "eval", path, "--data", tmp_path), 3, r"only train/ exists")
    mistake(
        call(capsys, "eval", path, "--data", tree, "--split", "test"),
        2,
        r"has no split 'test' \(it has none\)",
    )
    shutil.copytree(tree, tmp_path / "test")
    mistake(
        call(capsys, "eval", path, "--data", tmp_path, "--split", "val"),
        2,
        r"has no split 'val' \(it has train, test\)",
    )
    shutil.rmtree(tmp_path / "test" / "9")
    mistake(
        call(capsys, "eval", path, "--data", tmp_path),
        4,
        r"the student knows 10 classes \(0, 1, 2 and 7 more\), the data has 9 \(0, 1, 2 and 6"
        r" more\)",
    )
    (tmp_path / "test" / "9").mkdir()
    mistake(
        call(capsys, "eval", path, "--data", tmp_path),
        3,
        r"class folder\(s\) without images: test/9",
    )
    mistake(
        call(capsys, "eval", path, "--data", f"folder:{tmp_path / 'nowhere'}"),
        3,
        r"nowhere: no readable folder",
    )


def test_eval_images_of_other_size_are_refused(run, tree, tmp_path, capsys):
    student, record = load_student(run)
    record["preprocessing"]["image_size"] = [8, 12]
    write_student(tmp_path / "student.safetensors", student, record)
    mistake(
        call(capsys, "eval", tmp_path, "--data", tree),
        3,
        r"the images are 8 x 8, the student takes 8 x 12",
    )


# --- the check
# --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loader():
    data = open_dataset("digits")
    return ResidentLoader(data.test, 128, train=False, mean=data.mean, std=data.std)


@pytest.mark.parametrize("name", FORMATS)
def test_format_with_changed_logits_is_not_written(run, tmp_path, monkeypatch, loader, name):
    student, record = load_student(run)
    form = get_format(name)
    made = {}

    def write_another(network, its_record):
        with torch.no_grad():
            network.fc.bias[3] += 1e-2
        made[name] = True
        return form.encode(network, its_record)

    monkeypatch.setattr(
        "fastokd.export.files.get_format",
        lambda asked: type(form)(**{**form.__dict__, "encode": write_another}),
    )
    with pytest.raises(
        CheckpointError, match=r"logits differ by up to 0\.0(1|09).* from the trained branch's"
    ):
        export_student(student, record, name, tmp_path, loader)
    assert made
    assert not list(tmp_path.iterdir())


def test_library_network_of_other_architecture_is_not_written(
    twin_run, tmp_path, capsys, monkeypatch
):
    import torchvision.models

    mistake(
        _with_twin(
            monkeypatch,
            "resnet34",
            call,
            capsys,
            "export",
            twin_run,
            "--to",
            "torchvision",
            "--out",
            tmp_path,
        ),
        4,
        r"of another architecture: \d+ weights are missing",
    )
    # Strictly loaded, and still another network: only the logits tell.
    monkeypatch.setattr(
        torchvision.models.resnet,
        "conv3x3",
        lambda *a, **k: nn.Conv2d(
            a[0], a[1], 3, a[2] if len(a) > 2 else 1, 1, bias=False, padding_mode="circular"
        ),
    )
    mistake(
        call(capsys, "export", twin_run, "--to", "torchvision", "--out", tmp_path),
        4,
        r"logits differ by up to",
    )
    assert not list(tmp_path.iterdir())


def _with_twin(monkeypatch, name, function, *arguments):
    with monkeypatch.context() as patch:
        patch.setitem(
            sys.modules["fastokd.export.state_dict"].TWINS["torchvision"], "resnet18_imagenet", name
        )
        return function(*arguments)


class FrozenBatch(nn.Module):
    """A network whose export is specialized to one batch size."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(192, 10)

    def forward(self, x):
        return self.fc(x.reshape(2, 192))


def test_fixed_batch_size_is_not_written(run, tmp_path, loader):
    _, record = load_student(run)
    with pytest.raises(CheckpointError, match="resnet8 cannot be written as torch-export"):
        export_student(FrozenBatch(), record, "torch-export", tmp_path, loader)
    assert not list(tmp_path.iterdir())


def test_untraceable_network_is_refused(run, tmp_path, loader):
    class Moody(nn.Module):
        def forward(self, x):
            return x.flatten(1)[:, :10] if x.sum() > 0 else x.flatten(1)[:, 1:11]

    _, record = load_student(run)
    with pytest.raises(
        CheckpointError,
        match=r"resnet8 cannot be written as torch-export: .*; use --to safetensors",
    ):
        export_student(Moody(), record, "torch-export", tmp_path, loader)
    with pytest.raises(ConfigError, match=r"unknown export format 'onxx'; did you mean 'onnx'"):
        export_student(Moody(), record, "onxx", tmp_path, loader)


def test_comparison_counts_images(loader):
    student = create_student("resnet8", 10).eval()
    off = create_student("resnet8", 10).eval()
    off.load_state_dict(student.state_dict())
    with torch.no_grad():
        off.fc.bias += torch.linspace(0, 1, 10)
    found = compare_logits(student, off, loader, tolerance=1.0)
    with torch.no_grad():
        pairs = [(student(batch.images), off(batch.images), batch.target) for batch in loader]
    left, right, target = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    assert found.num_images == 355
    assert found.same_top1 == int((left.argmax(1) == right.argmax(1)).sum()) < 355
    assert found.difference == pytest.approx(1.0, abs=1e-4)
    assert found.accuracy == pytest.approx(
        int((right.argmax(1) == target).sum()) / 355, abs=1 / 355
    )
    with torch.no_grad():
        off.fc.bias[0] = float("nan")
    with pytest.raises(CheckpointError, match="differ by up to nan"):
        compare_logits(student, off, loader, tolerance=1.0)


# --- wrappers
# --------------------------------------------------------------------------------------------------


def test_wrappers_are_removed_from_export(run, tmp_path, loader):
    from torch.optim.swa_utils import AveragedModel

    student, record = load_student(run)
    names = set(student.state_dict())
    inside = create_student("resnet8", 10).eval()
    inside.load_state_dict(student.state_dict())
    inside.layer1 = torch.compile(inside.layer1)
    wrapped = AveragedModel(torch.compile(nn.DataParallel(inside))).eval()
    assert not names & set(wrapped.state_dict())
    for name in ("safetensors", "torch-export"):
        export_student(wrapped, record, name, tmp_path / name, loader)
    assert set(load_file(tmp_path / "safetensors" / "student.safetensors")) == names
    assert "_orig_mod" in "".join(wrapped.state_dict())  # the original is left as it was
    write_student(tmp_path / "student.safetensors", wrapped, record)
    assert set(load_file(tmp_path / "student.safetensors")) == names
    loaded, _ = load_student(tmp_path)
    assert all(
        torch.equal(value, student.state_dict()[name])
        for name, value in loaded.state_dict().items()
    )


def test_only_wrappers_are_stripped():
    x = torch.zeros(1)
    assert list(strip_wrappers({"module.module.a.weight": x, "n_averaged": x})) == ["a.weight"]
    assert list(strip_wrappers({"_orig_mod.module.a._orig_mod.weight": x})) == ["a.weight"]
    assert list(strip_wrappers({"module.a": x, "other.b": x})) == ["module.a", "other.b"]
    assert list(strip_wrappers({"a.module.b": x, "a.n_averaged": x})) == [
        "a.module.b",
        "a.n_averaged",
    ]
    assert list(strip_wrappers({"ema_model.module.a": x, "initted": x, "step": x})) == ["a"]


# --- files that are not what they should be
# ----------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0, 7, 300, 0.5, -1])
@pytest.mark.parametrize("name", FORMATS)
def test_truncated_file_is_refused(run, tmp_path, capsys, name, keep):
    path, blob = tmp_path / FILES[name], file_of(run, name).read_bytes()
    path.write_bytes(blob[: int(keep * len(blob)) if isinstance(keep, float) else keep])
    mistake(
        call(capsys, "eval", path, "--data", "digits"),
        4,
        rf"{FILES[name]} is (damaged or not a \w+ file \(.*\)|not a student exported by fastokd.*)",
    )


def test_file_with_changed_byte_is_refused(run, tmp_path, capsys):
    path, blob = tmp_path / "student.pt2", bytearray(file_of(run, "torch-export").read_bytes())
    blob[len(blob) // 3] ^= 1
    path.write_bytes(blob)
    mistake(
        call(capsys, "eval", path, "--data", "digits"),
        4,
        r"is damaged or not a \w+ file \(Bad CRC-32",
    )


def foreign(path, run):
    """A file that others would write under that name."""
    if path.suffix == ".safetensors":
        save_file({"weight": torch.zeros(2)}, path)
    elif path.suffix == ".onnx":
        import onnx

        model = onnx.load(file_of(run, "onnx"))
        del model.metadata_props[:]
        onnx.save(model, path)
    elif path.suffix == ".pt2":
        torch.export.save(torch.export.export(nn.Linear(2, 2), (torch.zeros(1, 2),)), path)
    else:
        torch.save({"weights": torch.zeros(3)}, path)


@pytest.mark.parametrize("name", FORMATS)
def test_foreign_file_is_refused(run, tmp_path, capsys, name):
    path = tmp_path / FILES[name]
    foreign(path, run)
    mistake(
        call(capsys, "eval", path, "--data", "digits"),
        4,
        rf"{FILES[name]} is not a student exported by fastokd \(its metadata has no 'fastokd'"
        r" entry\); make one with",
    )


def test_eval_of_checkpoint_file_is_refused(run, capsys):
    mistake(
        call(capsys, "eval", run / "checkpoints" / "last.pt", "--data", "digits"),
        4,
        r"last\.pt is not an export by its name, which ends in .*onnx.*for a run, pass its folder",
    )


def test_eval_of_wrongly_named_file_is_refused(run, tmp_path, capsys):
    (tmp_path / "student.torchscript.pt").write_bytes(b"")
    mistake(
        call(capsys, "eval", tmp_path / "student.torchscript.pt", "--data", "digits"),
        4,
        r"TorchScript exports are no longer supported; export the run again with --to torch-export",
    )
    shutil.copy(file_of(run, "onnx"), tmp_path / "student.safetensors")
    mistake(
        call(capsys, "eval", tmp_path / "student.safetensors", "--data", "digits"),
        4,
        r"is damaged or not a safetensors file",
    )


def test_folder_of_several_exports_without_default_is_refused(run, tmp_path, capsys):
    names = {path.name for path in (run / "export").iterdir()}
    assert {"student.onnx", "student.pt2", "student.safetensors"} <= names
    code, output, _ = call(capsys, "eval", run / "export", "--data", "digits")
    assert code == 0
    assert "student.safetensors" in output
    load_student(run / "export")
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in ("onnx", "torch-export"):
        shutil.copy(file_of(run, name), programs)
    mistake(
        call(capsys, "eval", programs, "--data", "digits"),
        4,
        r"programs holds 2 exports \(student\.onnx, student\.pt2\); name the file",
    )
    shutil.copy(file_of(run, "safetensors"), tmp_path / "a.safetensors")
    shutil.copy(file_of(run, "safetensors"), tmp_path / "b.safetensors")
    with pytest.raises(
        CheckpointError, match=r"holds 2 exports \(a\.safetensors, b\.safetensors\); name the file"
    ):
        load_student(tmp_path)
    with pytest.raises(CheckpointError, match=r"there is no student at .*nothing"):
        load_student(tmp_path / "nothing")
    with pytest.raises(
        CheckpointError,
        match=r"student\.onnx is a program without a network's weights: run it with open_export",
    ):
        load_student(file_of(run, "onnx"))


def with_tensors(run, path, change):
    """The exported student with its tensors or record changed."""
    _, record = load_student(run)
    tensors = load_file(file_of(run, "safetensors"))
    change(tensors, record)
    save_file(tensors, path, metadata={"fastokd": json.dumps(record)})
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda tensors, record: tensors.pop("fc.bias"),
            r"is of another architecture: 1 weights are missing, e\.g\. fc\.bias$",
        ),
        (
            lambda tensors, record: tensors.update(extra=torch.zeros(1)),
            r"1 are not the model's, e\.g\. extra$",
        ),
        (
            lambda tensors, record: tensors.update({"fc.weight": torch.zeros(5, 64)}),
            r"1 have another shape, e\.g\. fc\.weight is \[5, 64\], the model's is \[10, 64\]$",
        ),
        (
            lambda tensors, record: record["architecture"].update(num_classes=5),
            r"its record has 10 class names for a network of 5 classes",
        ),
        (
            lambda tensors, record: record.update(
                classes=["a", "b"], architecture={"name": "resnet8", "num_classes": 2}
            ),
            r"fc\.weight is \[10, 64\], the model's is \[2, 64\]",
        ),
        (
            lambda tensors, record: record["architecture"].update(num_classes="ten"),
            r"its record's entry 'architecture' is incomplete",
        ),
        (
            lambda tensors, record: record["architecture"].update(name="resnet9"),
            r"unknown model 'resnet9'; did you mean 'resnet\d+'",
        ),
        (
            lambda tensors, record: record["architecture"].update(width=2),
            r"does not fit the architecture .*width",
        ),
        (
            lambda tensors, record: record["preprocessing"].update(mean=[0.5]),
            r"its record's entry 'preprocessing' is incomplete",
        ),
        (
            lambda tensors, record: record["preprocessing"].update(std=[1, 1, 0]),
            r"its record's entry 'preprocessing' is incomplete",
        ),
        (
            lambda tensors, record: record["preprocessing"].update(shorter_side="x"),
            r"its record's entry 'preprocessing' is incomplete",
        ),
        (
            lambda tensors, record: record["preprocessing"].update(shorter_side=7),
            r"its record's entry 'preprocessing' is incomplete",
        ),
        (
            lambda tensors, record: record["architecture"].update(method="ahbf", options=5),
            r"does not fit the architecture .*'options': 5",
        ),
        (
            lambda tensors, record: record["preprocessing"].update(image_size=[8, "8"]),
            r"its record's entry 'preprocessing' is incomplete",
        ),
        (
            lambda tensors, record: record["accuracy"].update(top1=None),
            r"its record's entry 'accuracy' is incomplete",
        ),
        (
            lambda tensors, record: record["export"].update(to="zip"),
            r"declares the format 'zip', which a safetensors file cannot have",
        ),
        (
            lambda tensors, record: record.update(format=99),
            r"has format 99, this fastokd reads up to 1: install a newer fastokd",
        ),
    ],
)
def test_weights_unlike_record_are_refused(run, tmp_path, change, message):
    path = with_tensors(run, tmp_path / "student.safetensors", change)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_student(path)
    assert "\n" not in str(caught.value)


def read_archive(path):
    """The files of an archive by their names below its folder."""
    with zipfile.ZipFile(path) as archive:
        return {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}


def write_archive(path, files):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(f"student/{name}", content)


def rewrite(source, target, changes):
    """An archive with files below its folder replaced or added."""
    write_archive(target, {**read_archive(source), **changes})


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize(
    "where",
    [
        "data/sample_inputs/model.pt",
        "data/weights/model.pt",
        "data/constants/model.pt",
        "data/aotinductor/model/x.so",
        "pickled weight",
        "custom object",
    ],
)
def test_program_with_pickle_is_refused(run, tmp_path, capsys, where):
    buffer = io.BytesIO()
    torch.save((Evil(tmp_path / "written"),), buffer)
    changes = {where: buffer.getvalue()}
    if " " in where:
        folder = "weights" if where == "pickled weight" else "constants"
        config = f"data/{folder}/model_{folder}_config.json"
        content = json.loads(read_archive(file_of(run, "torch-export"))[config])
        path_name = "weight_0" if where == "pickled weight" else "custom_obj_0"
        content["config"]["evil"] = {
            "path_name": path_name,
            "is_param": False,
            "use_pickle": True,
            "tensor_meta": None,
        }
        changes = {config: json.dumps(content), f"data/{folder}/{path_name}": buffer.getvalue()}
    rewrite(file_of(run, "torch-export"), tmp_path / "student.pt2", changes)
    mistake(
        call(capsys, "eval", tmp_path / "student.pt2", "--data", "digits"),
        4,
        r"student\.pt2 (is refused: |cannot be loaded by torch .*[Ww]eights.only)",
    )
    assert not (tmp_path / "written").exists()


def test_archive_with_duplicate_name_is_refused(run, tmp_path, capsys):
    shutil.copy(file_of(run, "torch-export"), tmp_path / "student.pt2")
    with (
        pytest.warns(UserWarning, match="Duplicate name"),
        zipfile.ZipFile(tmp_path / "student.pt2", "a") as archive,
    ):
        archive.writestr(
            next(name for name in archive.namelist() if name.endswith("model.json")), b""
        )
    mistake(call(capsys, "eval", tmp_path, "--data", "digits"), 4, r"a name is in it twice")


@pytest.mark.parametrize("first", [True, False])
def test_archive_names_differing_in_case_are_refused(run, tmp_path, capsys, first):
    """PyTorch looks names up without regard to case: another spelling of a file that was looked at
    could be what it reads.
    """
    buffer = io.BytesIO()
    torch.save(Evil(tmp_path / "written"), buffer)
    sound = read_archive(file_of(run, "torch-export"))
    config = "data/weights/model_weights_config.json"
    content = json.loads(sound[config])
    content["config"][next(iter(content["config"]))] = {
        "path_name": "weight_evil",
        "is_param": False,
        "use_pickle": True,
        "tensor_meta": None,
    }
    added = {
        "data/weights/MODEL_weights_config.json": json.dumps(content),
        "data/weights/weight_evil": buffer.getvalue(),
    }
    write_archive(tmp_path / "student.pt2", {**added, **sound} if first else {**sound, **added})
    mistake(
        call(capsys, "eval", tmp_path / "student.pt2", "--data", "digits"),
        4,
        r"a name is in it twice",
    )
    assert not (tmp_path / "written").exists()


def test_pytorch_reads_only_checked_archive_content(run, tmp_path, capsys, monkeypatch):
    """Content that Python's reader skips and another might not, such as bytes before the archive,
    does not reach PyTorch.
    """
    (tmp_path / "student.pt2").write_bytes(b"before" + file_of(run, "torch-export").read_bytes())
    given, load = [], torch.export.load
    monkeypatch.setattr(
        torch.export, "load", lambda file: given.append(file.getvalue()) or load(file)
    )
    assert call(capsys, "eval", tmp_path / "student.pt2", "--data", "digits")[0] == 0
    (tmp_path / "given.pt2").write_bytes(given[0])
    assert given[0].startswith(b"PK")
    assert read_archive(tmp_path / "given.pt2") == read_archive(file_of(run, "torch-export"))


def test_unchanged_rewritten_archive_is_accepted(run, tmp_path, capsys):
    rewrite(file_of(run, "torch-export"), tmp_path / "student.pt2", {})
    assert call(capsys, "eval", tmp_path, "--data", "digits")[0] == 0


# --- docs/export.md
# --------------------------------------------------------------------------------------------------


def test_page_snippets_run(run, twin_run, images, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "export").mkdir()
    for folder in (run, twin_run):
        for file in (folder / "export").iterdir():
            shutil.copy(file, tmp_path / "export")
    split = open_dataset("digits").test
    Image.fromarray(split.images[0].permute(1, 2, 0).contiguous().numpy()).save("image.png")
    snippets = re.findall(r"```python\n(.*?)```", DOCS, flags=re.DOTALL)
    expected = {folder: trained_logits(folder, images[:1]) for folder in (run, twin_run)}
    files = []
    for snippet in snippets:
        names = {}
        if "torch.jit" in snippet:
            with pytest.warns(FutureWarning, match="deprecated"):
                exec(snippet, names)
        else:
            exec(snippet, names)
        files.append(re.search(r"export/(student\.[\w.]+)", snippet)[1])
        folder = twin_run if any(library in files[-1] for library in TWINS) else run
        found = (
            torch.from_numpy(names["logits"]) if "logits" in names else names["network"](images[:1])
        )
        torch.testing.assert_close(found, expected[folder], rtol=0, atol=1e-4)
        if "record" in names:
            assert names["record"]["classes"] == [str(digit) for digit in range(10)]
    assert set(files) == set(FILES.values())
    assert capsys.readouterr().out.strip() == str(int(expected[run].argmax()))


def test_page_snippet_preprocesses_like_the_run(run, tmp_path, monkeypatch):
    """After random resized crops a picture is scaled further than to what is cut of it."""
    import onnx
    from torchvision import transforms

    monkeypatch.chdir(tmp_path)
    (tmp_path / "export").mkdir()
    model = onnx.load(file_of(run, "onnx"))
    record = json.loads(model.metadata_props[0].value)
    record["preprocessing"]["shorter_side"] = 10
    model.metadata_props[0].value = json.dumps(record)
    onnx.save(model, "export/student.onnx")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 43, 3), dtype=np.uint8))
    image.save("image.png")
    names = {}
    exec(
        next(
            snippet
            for snippet in re.findall(r"```python\n(.*?)```", DOCS, flags=re.DOTALL)
            if "onnxruntime" in snippet
        ),
        names,
    )
    preprocessing = record["preprocessing"]
    expected = transforms.Compose(
        [
            transforms.Resize(10),
            transforms.CenterCrop(8),
            transforms.ToTensor(),
            transforms.Normalize(preprocessing["mean"], preprocessing["std"]),
        ]
    )(image)
    np.testing.assert_allclose(names["images"][0], expected.numpy(), atol=1e-5)
    row = re.search(r"^\| `preprocessing` \|.*$", DOCS, flags=re.MULTILINE)[0]
    assert set(preprocessing) == set(re.findall(r"`(\w+)`", row)) - {"preprocessing"}


def test_page_lists_all_formats():
    rows = re.findall(r"^\| `([\w-]+)`[^|]*\| `(student[\w.]+)` \|", DOCS, flags=re.MULTILINE)
    assert dict(rows) == FILES
    assert [name for name, _ in rows] == list_formats()
    assert {name: get_format(name).filename for name in list_formats()} == FILES


def test_open_export_runs_any_format(run, images):
    for name in FORMATS:
        path, record, runtime = open_export(file_of(run, name))
        assert path == file_of(run, name)
        assert record["export"]["to"] == name
        torch.testing.assert_close(
            runtime.run(images[:5]), trained_logits(run, images[:5]), rtol=0, atol=1e-4
        )
        assert not runtime.run(images[:5]).requires_grad


def test_create_student_from_layout_fits_every_branch():
    layout = {"method": "ahbf", "num_branches": 3, "aux_blocks": 2}
    model = create_model("resnet8", num_classes=10, **layout)
    for branch in range(3):
        create_student("resnet8", 10, branch=branch, **layout).load_state_dict(
            model.student(branch).state_dict()
        )
    with pytest.raises(ConfigError, match="branch 3: this model has the branches 0 to 2"):
        create_student("resnet8", 10, branch=3, **layout)
