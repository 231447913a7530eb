"""A step that is left out leaves no trace in the statistics of batch norms."""

import copy

import pytest
import torch
from torch import nn

from fastokd.models import create_model
from fastokd.train.statistics import RunningStatistics


def test_skipped_batch_restores_statistics() -> None:
    model = create_model("resnet8", "ahbf", num_branches=2)
    twin = copy.deepcopy(model)
    statistics = RunningStatistics(model)
    torch.manual_seed(0)
    good = torch.randn(3, 4, 3, 32, 32)
    broken = good[0].clone()
    broken[2, 1, 5, 5] = float("inf")
    for index, images in enumerate((broken, good[0], broken, good[1])):
        is_broken = images is broken
        statistics.keep()
        model(images)
        assert model.trunk.bn1.running_var.isnan().any() == is_broken
        statistics.put_back(torch.tensor(float(is_broken)))
        if not is_broken:
            twin(images)
        for (name, mine), theirs in zip(model.named_buffers(), twin.buffers(), strict=True):
            if mine.is_floating_point():  # counters count batches, broken or not
                assert torch.equal(mine, theirs), (index, name)
    assert not torch.equal(twin.trunk.bn1.running_mean, torch.zeros(16))


def test_model_without_statistics_is_accepted() -> None:
    statistics = RunningStatistics(nn.Linear(2, 2))
    statistics.keep()
    statistics.put_back(torch.tensor(1.0))


@pytest.mark.gpu
def test_keep_and_restore_are_captured() -> None:
    norm = nn.BatchNorm2d(4).cuda()
    statistics, images, skipped = (
        RunningStatistics(norm),
        torch.randn(2, 4, 3, 3, device="cuda"),
        torch.ones((), device="cuda"),
    )

    def step() -> None:
        statistics.keep()
        norm(images)
        statistics.put_back(skipped)

    with torch.no_grad():
        step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        graph.replay()
        assert torch.equal(norm.running_mean, torch.zeros(4, device="cuda"))
        skipped.zero_()
        graph.replay()
        torch.testing.assert_close(norm.running_mean, 0.1 * images.mean((0, 2, 3)))
