"""Additional blocks that start as the identity, and copies that do not stay equal."""

import dataclasses
import itertools

import pytest
import torch
from method_runs import SHORT_RUN, few_digits, make
from test_initial_weights import initial, logits, moved
from torch import nn
from torchvision.models.convnext import CNBlock
from torchvision.models.mobilenetv2 import InvertedResidual
from torchvision.models.squeezenet import Fire
from torchvision.models.swin_transformer import SwinTransformerBlock, SwinTransformerBlockV2
from torchvision.models.vision_transformer import EncoderBlock

from fastokd.models import create_model, create_student
from fastokd.models.branch_out import AddedBlock
from fastokd.models.residual import BasicBlock, Bottleneck, zeros_for_identity
from fastokd.train import initial as initial_weights
from fastokd.train.initial import start_from

NORM = nn.LayerNorm


def swin(kind):
    return kind(8, 2, window_size=[4, 4], shift_size=[0, 0])


MAPS, CHANNELS_LAST, TOKENS = (2, 8, 6, 6), (2, 8, 8, 8), (2, 5, 8)


@pytest.mark.parametrize(
    ("block", "shape", "zeros"),
    [
        (lambda: BasicBlock(8, 8), MAPS, {"bn2.weight", "bn2.bias"}),
        (lambda: Bottleneck(8, 2), MAPS, {"bn3.weight", "bn3.bias"}),
        (lambda: InvertedResidual(8, 8, 1, 2), MAPS, {"conv.3.weight", "conv.3.bias"}),
        (lambda: AddedBlock(8), MAPS, {"residual.8.weight"}),
        (lambda: CNBlock(8, 0.1, 0.0), MAPS, {"block.5.weight", "block.5.bias"}),
        (
            lambda: EncoderBlock(2, 8, 16, 0.0, 0.0, NORM),
            TOKENS,
            {
                "self_attention.out_proj.weight",
                "self_attention.out_proj.bias",
                "mlp.3.weight",
                "mlp.3.bias",
            },
        ),
        (
            lambda: swin(SwinTransformerBlock),
            CHANNELS_LAST,
            {"attn.proj.weight", "attn.proj.bias", "mlp.3.weight", "mlp.3.bias"},
        ),
        (
            lambda: swin(SwinTransformerBlockV2),
            CHANNELS_LAST,
            {"norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"},
        ),
        (lambda: Fire(8, 2, 4, 4), MAPS, None),
        (lambda: nn.Conv2d(8, 8, 3, padding=1), MAPS, None),
    ],
)
def test_zeros_for_identity(block, shape, zeros):
    block = block().train()
    x = torch.rand(shape)
    before = {name: each.clone() for name, each in block.state_dict().items()}
    found = zeros_for_identity(block, x)
    assert block.training
    assert all(torch.equal(each, before[name]) for name, each in block.state_dict().items())
    assert (found and set(found)) == zeros
    if zeros is None:
        return
    with torch.no_grad():
        for name in found:
            block.get_parameter(name).zero_()
    # In training mode too, where batch norm uses other statistics.
    for mode in (True, False):
        assert torch.equal(block.train(mode)(x.clone()), x)
    loss = block.train()(torch.rand(shape)).square().sum()
    loss.backward()
    assert all(block.get_parameter(name).grad.isfinite().all() for name in found)
    assert any(block.get_parameter(name).grad.any() for name in found)


def test_block_on_the_meta_device_is_examined_too():
    with torch.device("meta"):
        block = Bottleneck(8, 2)
    assert zeros_for_identity(block, torch.rand(MAPS)) == ["bn3.weight", "bn3.bias"]
    assert block.conv1.weight.is_meta


@pytest.mark.parametrize(
    ("name", "at", "size"),
    [
        ("timm:test_resnet", "layer1", 64),
        ("torchvision:squeezenet1_1", "features.8", 64),
        ("torchvision:shufflenet_v2_x0_5", "stage3", 64),
        ("torchvision:vgg11", "features.11", 32),
        ("timm:test_convnext", "stages.2", 64),
        ("densenet40_12", None, 32),
        ("mobilenetv2_x0_5", None, 32),
        ("xception", None, 32),
    ],
)
def test_every_branch_starts_as_the_trained_network(name, at, size):
    network = moved(create_student(name, 5))
    model = create_model(name, "ahbf", 5, 3, 1, at=at)
    lines = start_from(model, [initial(network)], image_size=(size, size))
    assert lines[1] == "the other branches start as copies of the student's"
    expected = logits(network, size)
    for row in logits(model, size):
        torch.testing.assert_close(row, expected, rtol=1e-4, atol=1e-4 * expected.abs().max())


@pytest.mark.parametrize("name", ["vgg13", "shufflenetv2_x1_0"])
def test_blocks_that_cannot_be_the_identity_are_reported(name):
    model = create_model(name, "ahbf", 5, 3, 1)
    lines = start_from(model, [initial(moved(create_student(name, 5)))])
    assert lines[1].endswith(
        "; 2 of them have additional blocks that start fresh, since they cannot be the identity"
    )


# --- copies do not stay equal


@pytest.fixture(scope="module")
def digits():
    return few_digits(64)


def differences_after_training(tmp_path, digits, monkeypatch, separated=True, **changes):
    """The largest difference of two branches' logits after an epoch from trained weights."""
    if not separated:
        monkeypatch.setattr(initial_weights, "separate", lambda *_: 0)
    names = changes.get("model", "resnet8").split(",")
    files = [str(tmp_path / f"{name}.pth") for name in names]
    for name, file in zip(names, files, strict=True):
        torch.save(moved(create_student(name, 10)).state_dict(), file)
    config = dataclasses.replace(SHORT_RUN, epochs=1, weights=",".join(files), **changes)
    trainer = make(config, tmp_path / "run", digits)
    trainer.run()
    rows = list(logits(trainer.model))
    return [float((one - other).abs().max()) for one, other in itertools.combinations(rows, 2)]


EQUAL_DEPTH = {"method": "cl_ilr", "branches": 3}
VIEWS = {**EQUAL_DEPTH, "branch_views": True, "auto_augment": "trivialaugment"}


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (EQUAL_DEPTH, "copies of the student's, with noise on the last layers of 2 of equal depth"),
        (
            {"method": "dml", "branches": 2},
            "noise is added to the last layers of 1 peer with the weights of another peer",
        ),
        (
            {"method": "dml", "model": "resnet14,resnet8,resnet8", "branches": None},
            "noise is added to the last layers of 1 peer with the weights of another peer",
        ),
    ],
)
def test_noise_separates_branches_and_peers_of_equal_depth(
    tmp_path, digits, monkeypatch, changes, line
):
    found = differences_after_training(tmp_path, digits, monkeypatch, **changes)
    assert min(found) > 1e-3
    assert line in (tmp_path / "run/log.txt").read_text()


def test_copies_stay_equal_without_any_difference(tmp_path, digits, monkeypatch):
    """Noise is needed; with depth or views, copies differ without it."""
    alike = differences_after_training(tmp_path, digits, monkeypatch, False, **EQUAL_DEPTH)
    assert max(alike) < 1e-5


@pytest.mark.parametrize("changes", [{"method": "ahbf", "branches": 3, "aux_blocks": 1}, VIEWS])
def test_depth_and_views_need_no_noise(tmp_path, digits, monkeypatch, changes):
    found = differences_after_training(tmp_path, digits, monkeypatch, False, **changes)
    assert min(found) > 1e-3
