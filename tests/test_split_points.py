"""The recommended split point of a library's network, and the costs of the others."""

import re

import pytest
import torch
import torchvision
from torch import nn

from fastokd.cli import main
from fastokd.errors import ConfigError
from fastokd.models import create_model, split_point
from fastokd.models.libraries import recommended_split_point, trunk_share
from fastokd.train.config import TrainConfig
from fastokd.train.config_files import completed


def flops_before(network, name):
    """The part of the multiply-adds of convolutions and linear layers that runs before a module
    starts, counted by hooks in a forward pass of real numbers.
    """
    counts, before = [0], []

    def count(module, inputs, output):
        if isinstance(module, nn.Conv2d):
            inside = module.kernel_size[0] * module.kernel_size[1] * module.in_channels
            counts[0] += output.numel() * inside // module.groups
        else:
            counts[0] += output.numel() * module.in_features

    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(count)
    network.get_submodule(name).register_forward_pre_hook(lambda *_: before.append(counts[0]))
    with torch.no_grad():
        network.eval()(torch.zeros(1, 3, 224, 224))
    return before[0] / counts[0]


@pytest.mark.parametrize(
    ("name", "point"), [("resnet18", "layer3"), ("mobilenet_v3_small", "features.7")]
)
def test_recommended_point_has_half_of_the_flops(name, point):
    network = torchvision.models.get_model(name, num_classes=10)
    share = flops_before(network, point)
    assert trunk_share(f"torchvision:{name}", point) == pytest.approx(share, abs=1e-4)
    assert 1 / 3 < share < 2 / 3
    assert recommended_split_point(f"torchvision:{name}") == point


def test_recommended_point_is_the_default_and_is_stored():
    name = "torchvision:resnet18"
    with torch.device("meta"):
        default = create_model(name, num_branches=2, aux_blocks=0)
        explicit = create_model(name, num_branches=2, aux_blocks=0, at="layer3")
    assert str(default.trunk) == str(explicit.trunk)
    assert completed(TrainConfig(model=name)).at == "layer3"
    assert completed(TrainConfig(model=name, at="layer4")).at == "layer4"
    for config in (
        TrainConfig(model=name, method="baseline"),
        TrainConfig(model=name, method="dml"),
        TrainConfig(model="resnet20"),
    ):
        assert completed(config).at is None
    assert split_point(name, "okddip", 3, "peers") is None


def test_models_lists_split_points_with_costs(capsys):
    assert main(["models", "torchvision:resnet18", "--method", "cl_ilr", "--branches", "2"]) == 0
    output = capsys.readouterr().out
    rows = re.findall(
        r"^(layer\S+)( \(recommended\))? +(\d+) +[\d.]+ +[\d,]+ +([\d.]+) x", output, re.M
    )
    assert [row[0] for row in rows if row[1]] == ["layer3"]
    assert {row[0] for row in rows} >= {"layer1", "layer2", "layer3.1", "layer4"}
    for _, _, share, factor in rows:  # two equal branches: the part after the split runs twice
        assert float(factor) == pytest.approx(2 - float(share) / 100, abs=0.02)
    assert "cl_ilr, 2 branches, images of 224 x 224" in output
    assert (
        "fastokd train --model torchvision:resnet18 --method cl_ilr --branches 2 --data" in output
    )
    assert main(["models", "torchvision:resnet18", "--aux-blocks", "1"]) == 0
    output = capsys.readouterr().out
    assert "ahbf, 4 branches with up to 3 additional blocks, images" in output
    assert "fastokd train --model torchvision:resnet18 --aux-blocks 1 --data FOLDER\n" in output


def test_plain_library_name_is_suggested():
    with pytest.raises(ConfigError, match="'Mobilenet_v3_small'"):
        create_model("Mobilenet_v3_small")
    with pytest.raises(ConfigError, match="use 'torchvision:mobilenet_v3_small'"):
        create_model("mobilenet_v3_small")
    pytest.importorskip("timm")
    with pytest.raises(ConfigError, match="use 'timm:test_resnet'"):
        create_model("test_resnet")
