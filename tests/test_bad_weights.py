"""Weights and teachers that cannot be used are refused in one line that names the problem."""

import dataclasses
import errno
import os
import re
from urllib.error import URLError

import pytest
import torch
import torchvision
from method_runs import SHORT_RUN, few_digits, make
from safetensors.torch import save_file

from fastokd.cli import main
from fastokd.errors import CheckpointError, ConfigError
from fastokd.models import create_model, create_student
from fastokd.train.build import build_model
from fastokd.train.config_files import completed
from fastokd.train.initial import InitialWeights, read_weights, start_from
from fastokd.train.param_groups import parameter_settings
from fastokd.train.weight_files import unwrapped

TRAIN = "train --data digits --model resnet8 --branches 2 --aux-blocks 1 --epochs 1 --out run"


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """Train with further options, which must end with one line; returns exit code and line."""
    monkeypatch.chdir(tmp_path)

    def call(*options):
        code = main([*TRAIN.split(), *map(str, options)])
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert not (tmp_path / "run").exists()
        return code, line

    return call


def resnet8(**tensors):
    """The weights of a ResNet-8 for ten classes, with changed tensors."""
    return {**create_student("resnet8", 10).state_dict(), **tensors}


def broken_files(folder):
    """Files that are not weights of a ResNet-8, and what the message says about each."""
    (folder / "text.pth").write_text("not a file of weights")
    yield "text.pth", r"text\.pth is damaged or not a file of weights \(it was not written by"
    for name in ("student.onnx", "student.pt2"):
        (folder / name).write_bytes(b"a program")
        yield name, rf"{name} is an exported program without a network's weights; pass the run"
    torch.save(resnet8(), folder / "whole.pth")
    whole = (folder / "whole.pth").read_bytes()
    (folder / "half.pth").write_bytes(whole[: len(whole) // 2])
    yield "half.pth", r"half\.pth is damaged or not a file of weights \(PytorchStreamReader"
    save_file(resnet8(), folder / "whole.safetensors")
    whole = (folder / "whole.safetensors").read_bytes()
    (folder / "half.safetensors").write_bytes(whole[: len(whole) // 2])
    yield "half.safetensors", r"half\.safetensors is damaged or not a file of weights"
    torch.save(torchvision.models.squeezenet1_1(), folder / "network.pth")
    yield (
        "network.pth",
        r"network\.pth has pickled objects other than tensors"
        r" \(torchvision\.models\.squeezenet\.SqueezeNet\), which are not loaded",
    )
    shape = {"layer2.0.conv1.weight": torch.zeros(32, 16, 1, 1)}
    torch.save(resnet8(**shape), folder / "shape.pth")
    yield (
        "shape.pth",
        r"shape\.pth is of another architecture: layer2\.0\.conv1\.weight is \[32, 16, 1, 1\], the"
        r" model's is \[32, 16, 3, 3\]",
    )
    torch.save(resnet8(**{"bn1.bias": torch.full((16,), torch.nan)}), folder / "nan.pth")
    yield "nan.pth", r"nan\.pth: 'bn1\.bias' has NaN or infinite values; use another file"
    eighth = torch.full((16,), torch.nan).to(torch.float8_e4m3fn)
    torch.save(resnet8(**{"bn1.bias": eighth}), folder / "nan8.pth")
    yield "nan8.pth", r"nan8\.pth: 'bn1\.bias' has NaN or infinite values; use another file"
    torch.save({"epoch": 3, "best": 0.5}, folder / "numbers.pth")
    yield (
        "numbers.pth",
        r"numbers\.pth has no weights: no dictionary of tensors \(epoch, best\); save the weights",
    )
    for name, content in (("list", [1]), ("tensor", torch.ones(1)), ("none", {"state_dict": {}})):
        torch.save(content, folder / f"{name}.pth")
        yield f"{name}.pth", rf"{name}\.pth has no weights: no dictionary of tensors; save"
    (folder / "empty.pth").touch()
    yield "empty.pth", r"empty\.pth is damaged or not a file of weights \(the file is empty\)"
    packed = torch.zeros(16, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    torch.save(resnet8(**{"bn1.bias": packed}), folder / "packed.pth")
    yield (
        "packed.pth",
        r"packed\.pth: 'bn1\.bias' has values of type float4_e2m1fn_x2, which cannot be converted",
    )
    torch.save(create_student("vgg13", 10).state_dict(), folder / "vgg.pth")
    yield (
        "vgg.pth",
        r"vgg\.pth is of another architecture: 0 of 47 tensors match; missing, e\.g\."
        r" conv1\.weight \(closest: \S+\), bn1\.weight \(closest: \S+\), .*; pass the network that"
        r" the file belongs to with --model \(given: resnet8\)",
    )
    (folder / "folder").mkdir()
    yield "folder", r"folder is not a run folder: it has no student\.safetensors"
    yield "missing.pth", r"weights=missing\.pth: there is no such file or run folder"


def test_broken_files_are_refused_in_one_line(refused, tmp_path):
    for file, message in broken_files(tmp_path):
        code, line = refused("--weights", file)
        assert code == 4, line
        assert re.search(message, line), (file, line)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_file_without_permission_is_refused(refused, tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    (tmp_path / name).chmod(0)
    code, line = refused("--weights", name)
    assert (code, line.endswith(f"{name} cannot be read: Permission denied")) == (4, True)


def test_unreadable_file_is_refused(tmp_path, monkeypatch):
    def fail(*arguments, **options):
        raise OSError(errno.EIO, "Input/output error")

    (tmp_path / "w.pth").write_bytes(b"")
    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(CheckpointError, match=r"w\.pth cannot be read: Input/output error"):
        read_weights(tmp_path / "w.pth")


@pytest.mark.parametrize(
    ("model", "file", "message"),
    [
        ("resnet8", "resnet14", "layer1 has 2 modules, the model's has 1"),
        ("resnet14", "resnet8", "layer1 has 1 module, the model's has 2"),
        ("resnet18_imagenet", "torchvision:resnet34", "layer1 has 3 modules, the model's has 2"),
        ("timm:resnet18", "timm:resnet34", "layer1 has 3 modules, the model's has 2"),
    ],
)
def test_deeper_and_shallower_networks_are_refused(model, file, message):
    """Although all tensors of the shallower one match."""
    with torch.device("meta"):
        network = create_model(model, "baseline", 10)
        weights = InitialWeights("w.pth", create_student(file, 10).state_dict())
    with pytest.raises(CheckpointError, match=rf"w\.pth is of another architecture: {message}"):
        start_from(network, [weights])


def test_replaced_classifier_is_no_other_depth():
    """A classifier of another number of layers gives every branch a new one."""
    network = torchvision.models.mobilenet_v3_small(num_classes=4)
    state = {name: each for name, each in network.state_dict().items() if "classifier" not in name}
    state["classifier.1.weight"] = torch.zeros(4, 576)
    model = create_model("torchvision:mobilenet_v3_small", "baseline", 10)
    (line,) = start_from(model, [InitialWeights("w.pth", state)])
    assert "new: classifier.0.weight" in line
    assert "not used: classifier.1.weight" in line


def test_names_of_older_torchvision_files_are_read(tmp_path):
    """Its published DenseNet files have the names of before 2018."""
    state = create_student("torchvision:densenet121", 10).state_dict()
    older = {
        re.sub(r"(denselayer\d+\.(?:norm|conv))([12])", r"\1.\2", name): each
        for name, each in state.items()
    }
    assert "features.denseblock1.denselayer1.norm.1.weight" in older
    tensors, _ = unwrapped(older, tmp_path)
    assert tensors.keys() == state.keys()


# --- teachers


@pytest.fixture(scope="module")
def of_digits(tmp_path_factory):
    """A run of one epoch on the ten digits."""
    config = dataclasses.replace(SHORT_RUN, method="baseline", branches=1, epochs=1)
    trainer = make(config, tmp_path_factory.mktemp("digits") / "run", few_digits(64))
    trainer.run()
    return trainer.run_folder.path


@pytest.mark.parametrize(
    ("classes", "which"),
    [
        (
            list("012345678x"),
            r"\(not in the data: 9; only in the data: x\); use a teacher with the",
        ),
        (list("0123456798"), r"\(in another order\)"),
        (list("01234"), r"\(not in the data: 5, 6, 7, 8 and 1 more\)"),
    ],
)
def test_teacher_with_other_classes_is_refused_with_their_names(
    tmp_path, of_digits, classes, which
):
    digits = few_digits(64)
    kept = digits.train.targets < len(classes)
    train, test = (
        dataclasses.replace(split, images=split.images[mask], targets=split.targets[mask])
        for split in (digits.train, digits.test)
        for mask in [split.targets < len(classes)]
    )
    assert kept.any()
    data = dataclasses.replace(digits, classes=tuple(classes), train=train, test=test)
    config = dataclasses.replace(SHORT_RUN, teacher=str(of_digits))
    message = (
        rf"the teacher {of_digits} has the classes 0, 1, 2, 3 and 6 more, the data has .*{which}"
    )
    with pytest.raises(CheckpointError, match=message):
        make(config, tmp_path / "run", data)


def test_broken_teachers_are_refused_in_one_line(refused, tmp_path):
    network = create_student("timm:test_resnet", 10)
    torch.save(network.state_dict(), tmp_path / "whole.pth")
    whole = (tmp_path / "whole.pth").read_bytes()
    (tmp_path / "half.pth").write_bytes(whole[: len(whole) // 2])
    torch.save(network, tmp_path / "network.pth")
    torch.save(
        {**network.state_dict(), "fc.bias": torch.full((10,), torch.inf)}, tmp_path / "inf.pth"
    )
    torch.save(create_student("timm:test_resnet", 7).state_dict(), tmp_path / "seven.pth")
    torch.save(create_student("vgg13", 10).state_dict(), tmp_path / "vgg.pth")
    for file, message in (
        ("half.pth", r"half\.pth is damaged or not a file of weights"),
        ("network.pth", r"network\.pth has pickled objects other than tensors \(timm\."),
        ("inf.pth", r"has non-finite numbers in 1 weights, e\.g\. fc\.bias; use another file"),
        ("seven.pth", r"seven\.pth has weights for 7 classes, the data has 10; use a teacher with"),
        (
            "vgg.pth",
            r"vgg\.pth is of another architecture: 92 weights are missing, e\.g\. conv1\.0",
        ),
        ("missing.pth", r"there is no teacher at \S*missing\.pth"),
    ):
        code, line = refused("--teacher", f"timm:test_resnet:{file}")
        assert code == 4, line
        assert re.search(message, line), (file, line)


# --- published weights without a network


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """No network, and empty caches."""
    timm = pytest.importorskip("timm")

    def fail(*arguments, **options):
        raise URLError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    monkeypatch.setattr(timm.models._hub, "hf_hub_download", fail)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(
    ("options", "file", "fix"),
    [
        (
            ["--model", "resnet18", "--pretrained", "true"],
            r"https://download\.pytorch\.org/models/resnet18-f37072fd\.pth",
            r"copy that file to \S*/torch/hub/checkpoints/resnet18-f37072fd\.pth, or pass it with"
            r" --weights FILE --normalization library",
        ),
        (
            ["--model", "timm:test_resnet", "--pretrained", "true"],
            r"https://huggingface\.co/timm/test_resnet\.r160_in1k/resolve/main/model\.safetensors",
            r"copy that file here and pass it with --weights FILE --normalization library",
        ),
    ],
)
def test_pretrained_without_network_names_the_file(refused, options, file, fix):
    code, line = refused(*options)
    assert code == 4
    assert re.search(rf"cannot be downloaded from {file} \(.*no network.*\); .*{fix}", line), line


@pytest.mark.parametrize("network", ["googlenet", "inception_v3"])
def test_published_weights_with_their_own_conversion_of_images(network):
    """torchvision's networks convert from ImageNet's normalization; ours get what they need."""
    from fastokd.train.pretrained import pretrained_weights

    torch.manual_seed(0)
    options = {"init_weights": False, "aux_logits": False, "num_classes": 7}
    theirs = torchvision.models.get_model(network, transform_input=True, **options).eval()
    ours = create_student(f"torchvision:{network}", 7).eval()
    ours.load_state_dict(theirs.state_dict())
    weights = pretrained_weights("torchvision", network)
    pixels = torch.rand(2, 3, 96, 96)
    normalize = torchvision.transforms.functional.normalize
    with torch.no_grad():
        expected = theirs(normalize(pixels, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
        found = ours(normalize(pixels, weights.mean, weights.std))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


# --- the split and frozen parts


@pytest.mark.parametrize("at", ["conv1.6", "layer1", "layer2.0", "layer3", "layer4"])
@pytest.mark.parametrize("method", ["ahbf", "baseline"])
def test_frozen_trunk_is_all_before_the_split(at, method):
    """So a split point cannot be inside a frozen part."""
    model = create_model("timm:test_resnet", method, 10, at=at)
    config = dataclasses.replace(SHORT_RUN, method=method, freeze_epochs=1)
    settings = parameter_settings(config, model)
    student = dict(model.live_student().named_parameters())
    order = list(student)
    first = next(at_ for at_, name in enumerate(order) if f"{name}.".startswith(f"{at}."))
    parts = [settings[each].part for each in student.values()]
    assert set(parts[:first]) == {"trunk"}
    assert "trunk" not in parts[first:]


def test_network_alone_with_frozen_trunk_has_the_same_split():
    for method, count in (("baseline", 1), ("ahbf", 3)):
        config = dataclasses.replace(
            SHORT_RUN, model="timm:test_resnet", method=method, branches=count, freeze_epochs=1
        )
        assert completed(config).at == "layer1"
    plain = dataclasses.replace(config, method="baseline", branches=1, freeze_epochs=0)
    assert completed(plain).at is None


@pytest.mark.parametrize(
    ("name", "value"),
    [("freeze_epochs", 1), ("trunk_lr", 0.1), ("head_epochs", 1), ("head_lr", 5.0)],
)
def test_network_without_parts_is_refused(name, value):
    config = dataclasses.replace(
        SHORT_RUN, model="timm:test_vit", method="baseline", branches=1, **{name: value}
    )
    assert completed(config).at is None
    model = build_model(config, 10, torch.device("cpu"))
    message = (
        rf"{name}={value}: timm:test_vit cannot be divided into trunk and heads, since torch\.fx"
    )
    with pytest.raises(ConfigError, match=message):
        parameter_settings(config, model)


def test_unknown_split_point_is_refused_with_the_known_ones(refused):
    options = ["--model", "timm:test_resnet", "--freeze-epochs", "1", "--epochs", "2"]
    code, line = refused(*options, "--at", "layer9")
    assert code == 2
    assert "at='layer9': ResNet has no module of that name; did you mean 'layer4'?" in line


def test_weights_of_a_run_are_read_by_its_folder(of_digits):
    assert read_weights(of_digits).classes == list("0123456789")
