"""Configurations, weights and names as people have them: accepted, or refused with the cause."""

import argparse
import datetime

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from fastokd.errors import CheckpointError, ConfigError, did_you_mean
from fastokd.experiments.analysis.figures import label_of
from fastokd.export import load_weights
from fastokd.models import create_student
from fastokd.models.layout import to_memory_format, unsafe_channels_last
from fastokd.train.config import TrainConfig
from fastokd.train.config_files import load_config
from fastokd.train.distributed import Ranks, share_of_batch
from fastokd.train.weight_files import read_file, unwrapped


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-1", 0.1), ("5E-4", 5e-4), ("1e1", 10.0), ("1.e-2", 0.01), (".5e0", 0.5), ("+2e-1", 0.2)],
)
def test_yaml_numbers_with_exponents_are_floats_anywhere(text, value):
    config = load_config(f"lr: {text}\nmethod_options: {{a: {text}}}\n", "here")
    assert config.lr == value
    assert config.method_options == {"a": value}


def test_yaml_text_that_looks_like_numbers_stays_text():
    config = load_config("method_options: {a: e1, b: 1e, c: '1e-1', d: 1e5x}\n", "here")
    assert config.method_options == {"a": "e1", "b": "1e", "c": "1e-1", "d": "1e5x"}


@pytest.mark.parametrize(
    "text", ["lr: 0.1\nepochs: 3\nlr: 0.2\n", "method_options: {a: 1, a: 2}\n", "'lr': 1\nlr: 2\n"]
)
def test_doubled_yaml_key_is_refused_with_its_line(text):
    with pytest.raises(ConfigError, match=r"line \d: the key '(lr|a)' occurs twice"):
        load_config(text, "here")


def saved(path, content):
    torch.save(content, path)
    return path


@pytest.mark.parametrize(
    "extra",
    [
        {"args": argparse.Namespace(lr=0.1, name="x", nested=argparse.Namespace(a=[1]))},
        {"best_acc": np.float64(93.2)},
        {"best_acc": np.float32(93.2), "epoch": np.int64(3), "done": np.bool_(True)},
        {"optimizer": {"state": {}, "param_groups": [{"lr": np.float64(0.1)}]}},
    ],
)
def test_checkpoints_with_harmless_objects_are_read(tmp_path, extra):
    state = {"weight": torch.ones(2, 3)}
    path = saved(tmp_path / "a.pth", {"state_dict": state, **extra})
    weights, entry = unwrapped(read_file(path)[0], path)
    assert entry == "state_dict"
    assert torch.equal(weights["weight"], state["weight"])


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
        ({"state_dict": {}, "time": datetime.datetime(2026, 1, 1)}, "datetime.datetime"),
    ],
)
def test_pickled_objects_are_refused_in_one_plain_sentence(tmp_path, content, named):
    path = saved(tmp_path / "a.pth", content)
    with pytest.raises(CheckpointError) as refused:
        read_file(path)
    text = str(refused.value)
    assert named in text
    assert "torch.save(model.state_dict(), FILE)" in text
    assert "weights_only" not in text
    assert text.isprintable()


def test_missing_batch_counters_are_filled_in():
    network = torchvision.models.resnet18(num_classes=3)
    weights = {k: v for k, v in network.state_dict().items() if "num_batches" not in k}
    other = torchvision.models.resnet18(num_classes=3)
    load_weights(other, weights, "file")
    assert torch.equal(other.conv1.weight, network.conv1.weight)
    del weights["bn1.running_mean"]
    with pytest.raises(CheckpointError, match="weights are missing"):
        load_weights(other, weights, "file")


@pytest.mark.parametrize("depth", [18, 34, 50])
def test_resnet_of_the_libraries_is_the_imagenet_network(depth):
    with torch.device("meta"):
        student = create_student(f"resnet{depth}", 1000)
        other = create_student(f"resnet{depth}_imagenet", 1000)
        own = getattr(torchvision.models, f"resnet{depth}")()
    shapes = [
        {name: value.shape for name, value in network.state_dict().items()}
        for network in (student, other, own)
    ]
    assert shapes[0] == shapes[1] == shapes[2]


@pytest.mark.parametrize(
    ("word", "choices", "meant"),
    [
        ("learning_rate", ["lr", "lr_decay"], "lr"),
        ("wd", ["weight_decay", "width"], "weight_decay"),
        ("num-workers", ["loader", "loader_options"], "loader_options"),
        ("vanilla", ["ahbf", "baseline"], "baseline"),
        ("mutual", ["dml", "kd"], "dml"),
    ],
)
def test_names_of_other_tools_are_suggested(word, choices, meant):
    assert f"did you mean '{meant}'?" in did_you_mean(word, choices)


@pytest.mark.parametrize("sync_bn", [False, True])
@pytest.mark.parametrize("size", [1, 2])
def test_one_image_at_once_is_refused_without_a_circle(sync_bn, size):
    config = TrainConfig(batch_size=4 * size, device_batch=1, sync_bn=sync_bn)
    ranks = Ranks(0, size)
    if sync_bn and size > 1:
        assert share_of_batch(config, ranks).device_batch == 1
        return
    with pytest.raises(ConfigError, match="device_batch=1 is one image at once") as refused:
        share_of_batch(config, ranks)
    assert ("or --sync-bn True" in str(refused.value)) == (size > 1)
    assert ("needs several processes" in str(refused.value)) == sync_bn


@pytest.mark.parametrize(
    ("convolution", "unsafe"),
    [
        (nn.Conv2d(3, 48, 1, 2), True),
        (nn.Conv2d(15, 8, 1, stride=(1, 2)), True),
        (nn.Conv2d(32, 32, 1, 2, groups=4), True),
        (nn.Conv2d(16, 48, 1, 2), False),
        (nn.Conv2d(3, 48, 1, 1), False),
        (nn.Conv2d(3, 48, 3, 2), False),
        (nn.Conv3d(3, 4, 1, 2), False),
    ],
)
@pytest.mark.parametrize("avx512", [True, False])
def test_convolutions_that_crash_in_channels_last_are_found(
    monkeypatch, convolution, unsafe, avx512
):
    monkeypatch.setattr("fastokd.models.layout.has_avx512", lambda: avx512)
    network = nn.Sequential(nn.ReLU(), convolution)
    found = unsafe_channels_last(network, torch.device("cpu"))
    assert found == ("1" if unsafe and avx512 else None)
    assert unsafe_channels_last(network, torch.device("meta")) is None


def test_memory_format_leaves_weights_of_other_ranks():
    network = nn.Sequential(nn.Conv1d(4, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv3d(4, 4, 3))
    before = [parameter.clone() for parameter in network.parameters()]
    to_memory_format(network, torch.channels_last)
    assert network[1].weight.is_contiguous(memory_format=torch.channels_last)
    assert network[0].weight.is_contiguous()
    assert network[2].weight.is_contiguous()
    for parameter, value in zip(network.parameters(), before, strict=True):
        assert torch.equal(parameter, value)


NAMES = [
    "Ba$$in",
    "$x",
    "a_b^c",
    "_hidden",
    "100 %",
    "back\\slash",
    "\N{HEBREW LETTER ALEF}b",
    "x" * 300,
]


@pytest.mark.parametrize("name", NAMES)
def test_labels_of_figures_are_drawn_as_text(name):
    pytest.importorskip("matplotlib")
    from fastokd.experiments.analysis.figures import encoded, require_matplotlib

    plt = require_matplotlib()
    figure, axes = plt.subplots()
    axes.plot([0, 1], label=label_of(name))
    axes.set_xticks([0], [label_of(name)])
    legend = figure.legend()
    shown = [text.get_text() for text in legend.get_texts()]
    assert shown == [label_of(name)]
    assert len(shown[0]) <= 40
    assert shown[0].strip()[:5] == name[:5]
    assert encoded(plt, figure, ["svg", "png"])
