"""Networks that torch.fx cannot follow: alone and as peers; and gates on tokens."""

import pytest
import torch

from fastokd.errors import ConfigError
from fastokd.methods.one import pooled_channels
from fastokd.models import create_model, create_student

timm = pytest.importorskip("timm")
UNTRACEABLE = "timm:twins_svt_small"


@pytest.mark.parametrize(("method", "branches"), [("baseline", 1), ("dml", 2), ("independent", 2)])
def test_untraceable_network_trains_where_nothing_is_cut(method, branches):
    torch.manual_seed(0)
    model = create_model(
        UNTRACEABLE,
        method,
        num_classes=3,
        num_branches=branches,
        topology="peers" if branches > 1 else None,
    )
    output = model(torch.randn(2, 3, 64, 64))
    assert [list(row.shape) for row in output.logits] == [[2, 3]] * branches
    sum(row.sum() for row in output.logits).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    student = create_student(UNTRACEABLE, 3)
    student.load_state_dict(model.student().state_dict())
    model.eval(), student.eval()
    images = torch.randn(2, 3, 64, 64)
    index = 0
    assert torch.equal(student(images), model(images).logits[index])


@pytest.mark.parametrize("method", ["ahbf", "one"])
def test_untraceable_network_is_refused_where_it_is_cut(method):
    with pytest.raises(ConfigError, match=r"torch\.fx"):
        create_model(UNTRACEABLE, method, num_classes=3)


def test_untraceable_peers_with_feature_maps_are_refused():
    with pytest.raises(ConfigError, match="needs its feature maps; use baseline or dml"):
        create_model(UNTRACEABLE, "afid", num_classes=3)


@pytest.mark.parametrize("shape", [(2, 5, 4, 3), (2, 4, 3, 5), (2, 7, 5)])
def test_channels_of_maps_and_tokens_are_pooled(shape):
    shared = torch.randn(shape)
    axis = shape.index(5)
    want = shared.movedim(axis, -1).reshape(2, -1, 5).mean(1)
    torch.testing.assert_close(pooled_channels(shared, 5), want)


def test_one_trains_on_a_trunk_of_tokens():
    model = create_model(
        "timm:vit_tiny_patch16_224", "one", 3, num_branches=2, aux_blocks=0, at="blocks.10"
    )
    output = model(torch.randn(2, 3, 224, 224))
    assert [list(row.shape) for row in output.logits] == [[2, 3]] * 2
