"""The moving average of the student's weights."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastokd.errors import CheckpointError, ConfigError
from fastokd.export import write_student
from fastokd.methods.modules import BranchPass, MethodModules
from fastokd.models import BranchedModel, create_model, create_student
from fastokd.models.factory import get_backbone
from fastokd.train.ema import StudentAverage
from fastokd.train.optimizers import Optimizers
from tests.test_optimizers import config_of


def shake(model: nn.Module, seed: int) -> None:
    """Change all weights and statistics in place, as a step does."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            (
                tensor.copy_(torch.randn(tensor.shape, generator=generator))
                if tensor.is_floating_point()
                else tensor.add_(1)
            )


def averaged(states: list[dict[str, Tensor]], decay: float) -> dict[str, Tensor]:
    """The average in float64, from the weights at the start and after every step."""
    average = {name: value.double() for name, value in states[0].items()}
    for number, state in enumerate(states[1:]):
        own = min(decay, (1 + number) / (10 + number))
        average = {
            name: own * value + (1 - own) * state[name].double() for name, value in average.items()
        }
    return {
        name: value if states[0][name].is_floating_point() else states[-1][name].double()
        for name, value in average.items()
    }


def assert_same(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        torch.testing.assert_close(
            value.double(),
            theirs[name].double(),
            rtol=1e-5,
            atol=1e-6,
            msg=lambda text, name=name: f"{name}: {text}",
        )


@pytest.mark.parametrize(
    ("network", "method", "options"),
    [
        ("resnet8", "ahbf", {}),
        ("mobilenetv2_x0_5", "one", {}),
        ("resnet8", "okddip", {"topology": "peers"}),
        ("resnet8", "afid", {}),
        ("torchvision:resnet18", "ahbf", {"at": "layer4", "num_branches": 2, "aux_blocks": 1}),
    ],
    ids=str,
)
def test_average_covers_weights_and_statistics(
    network: str, method: str, options: dict[str, Any]
) -> None:
    model = create_model(network, method, **options)
    averages = {decay: StudentAverage(model, decay) for decay in (0.15, 0.999)}
    states = [copy.deepcopy(model.student().state_dict())]
    for step in range(4):
        shake(model, step)
        states.append(copy.deepcopy(model.student().state_dict()))
        for average in averages.values():
            average.update()
    for decay, average in averages.items():
        assert_same(average.module.state_dict(), averaged(states, decay))
    assert type(average.module) is type(model.student())
    assert not average.module.training
    assert not any(parameter.requires_grad for parameter in average.module.parameters())
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert_same(model.student().state_dict(), states[-1])  # the model is not changed


def test_average_of_flat_weights_is_exported(tmp_path: Any) -> None:
    config = config_of(method="ahbf", branches=2)
    model = create_model("resnet8", "ahbf", num_branches=2)
    average = StudentAverage(model, 0.5)  # made before the weights become views
    optimizers = Optimizers(config, model, torch.device("cpu"), flat=True)
    optimizers.set_lr(0.1)
    states = [copy.deepcopy(model.student().state_dict())]
    for step in range(3):
        optimizers.zero_grad()
        sum(
            row.square().sum()
            for row in model(
                torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(step))
            ).logits
        ).backward()
        optimizers.step()
        states.append(copy.deepcopy(model.student().state_dict()))
        average.update()
    assert (states[-1]["conv1.weight"] - states[0]["conv1.weight"]).abs().max() > 1e-3
    assert_same(average.module.state_dict(), averaged(states, 0.5))
    write_student(tmp_path / "student.safetensors", average.module, {})
    create_student("resnet8").load_state_dict(average.module.state_dict())


def test_state_dict_resumes() -> None:
    model = create_model("resnet8", "ahbf", num_branches=2)
    straight = StudentAverage(model, 0.9)
    for step in range(6):
        if step == 3:
            weights, state = copy.deepcopy((model.state_dict(), straight.state_dict()))
        shake(model, step)
        straight.update()
    other = create_model("resnet8", "ahbf", num_branches=2)
    other.load_state_dict(weights)
    resumed = StudentAverage(other, 0.9)
    resumed.load_state_dict(state)
    for step in range(3, 6):
        shake(other, step)
        resumed.update()
    for name, value in straight.module.state_dict().items():
        assert torch.equal(value, resumed.module.state_dict()[name]), name
    assert int(resumed.state_dict()["updates"]) == 6
    with pytest.raises(
        CheckpointError, match=r"the checkpoint is of another architecture: .* weights are missing"
    ):
        resumed.load_state_dict({**state, "weights": {}}, "the checkpoint")


def test_copied_student_is_refused() -> None:
    class Copies(MethodModules):
        def forward(self, seen: BranchPass) -> dict[str, Any]:
            return {}

        def student(self, branches: Any, kept: int) -> nn.Module:
            return copy.deepcopy(branches[kept])

    parts = create_model("resnet8", "independent", num_branches=2)
    model = BranchedModel(
        ["resnet8", "resnet8"],
        10,
        None,
        list(parts.branches),
        [get_backbone("resnet8").join] * 2,
        build_companion=lambda layout: Copies(),
        method="mine",
    )
    with pytest.raises(
        ConfigError,
        match=(
            r"ema=0.9: the student of method 'mine' is not made of the model's own modules; use"
            r" ema=0"
        ),
    ):
        StudentAverage(model, 0.9)


@pytest.mark.gpu
def test_update_is_captured_without_synchronization() -> None:
    model = create_model("resnet8", "ahbf", num_branches=2).cuda()
    average, expected = StudentAverage(model, 0.9), StudentAverage(model, 0.9)
    StudentAverage(model, 0.9).update()  # allocates
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        average.update()
    for _ in range(3):
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                tensor.add_(1)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            expected.update()
            graph.replay()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert_same(average.module.state_dict(), expected.module.state_dict())
