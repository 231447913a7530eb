"""Every network runs as the engine needs it: memory format, precision, compilation, gradients, and
its student.
"""

import contextlib
import copy
import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastokd.errors import ConfigError
from fastokd.methods import get_method, list_methods
from fastokd.methods.method import MethodBatch
from fastokd.models import BranchedModel, create_model, create_student, get_backbone, list_models

CLASSES = 5
BATCH = 4
CHANNELS_LAST = torch.channels_last


def images(name: str, batch: int = BATCH, seed: int = 1) -> Tensor:
    """32x32, and 64x64 for ImageNet networks: their maps shrink to 2x2."""
    size = 32 if get_backbone(name).image_size == 32 else 64
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


# ResNets of the same blocks that differ in nothing but their number are left to the shortest and to
# ResNet-20.
NAMES = [
    name for name in list_models() if name not in ("resnet14", "resnet32", "resnet44", "resnet56")
]
# Networks of the same layers as another one: only their widths or numbers of blocks differ.
SAME_LAYERS = {
    "mobilenetv2_x1_0",
    "mobilenetv2_x1_0_imagenet",
    "resnet20",
    "resnet34_imagenet",
    "resnet110",
    "vgg16",
    "wrn16_4",
    "wrn20_8",
    "wrn28_2",
}


class Network(NamedTuple):
    """A network with a student and one deeper branch, in eval mode, its batch norms as after some
    training.
    """

    name: str
    model: BranchedModel
    images: Tensor


@pytest.fixture(scope="module", params=NAMES)
def network(request: pytest.FixtureRequest) -> Network:
    torch.manual_seed(0)
    name = request.param
    model = create_model(name, "ahbf", CLASSES, num_branches=2, aux_blocks=1)
    for norm in model.modules():
        if isinstance(norm, (nn.BatchNorm1d, nn.BatchNorm2d)):
            norm.momentum = 1.0
            nn.init.uniform_(norm.weight, 0.8, 1.2)
            nn.init.normal_(norm.bias, std=0.2)
    with torch.no_grad():
        model(images(name, 6, seed=2))
    return Network(name, model.eval(), images(name))


# ---- the student


def test_exported_branch_equals_model_branch_exactly(network: Network) -> None:
    with torch.no_grad():
        result = network.model(network.images)
        for branch, logits in enumerate(result.logits):
            student = network.model.student(branch)
            assert torch.equal(student(network.images), logits)
            assert not any(module.training for module in student.modules())
            assert {name.split(".")[0] for name in student.state_dict()} == {
                name.split(".")[0] for name in create_student_on_meta(network.name)
            }
        fresh = create_student(network.name, CLASSES).eval()
        fresh.load_state_dict(network.model.student().state_dict(), strict=True)
        assert torch.equal(fresh(network.images), result.logits[0])


def create_student_on_meta(name: str) -> dict[str, Tensor]:
    with torch.device("meta"):
        return create_student(name, CLASSES).state_dict()


# ---- memory format and precision


class Copies(TorchDispatchMode):
    """Records the operators that copy a tensor, as a change of layout or dtype would."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[object] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (
            torch.ops.aten.clone,
            torch.ops.aten.copy_,
            torch.ops.aten._to_copy,
        ):
            self.seen.append(func)
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def watching(
    model: nn.Module, check: Callable[[nn.Module, Tensor, Tensor], None]
) -> Iterator[None]:
    """Call ``check(layer, input, output)`` for every convolution and linear layer that runs."""

    def hook(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        check(module, inputs[0], output)

    with contextlib.ExitStack() as handles:
        for module in model.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                handles.enter_context(module.register_forward_hook(hook))
        yield


@pytest.fixture
def channels_last(network: Network) -> Iterator[BranchedModel]:
    yield network.model.to(memory_format=CHANNELS_LAST)
    network.model.to(memory_format=torch.contiguous_format)


def test_channels_last_layers_make_no_copy(network: Network, channels_last: BranchedModel) -> None:
    seen = []

    def check(layer: nn.Module, given: Tensor, output: Tensor) -> None:
        if isinstance(layer, nn.Conv2d):
            assert given.is_contiguous(memory_format=CHANNELS_LAST), layer
            assert output.is_contiguous(memory_format=CHANNELS_LAST), layer
        seen.append(layer)

    x = network.images.to(memory_format=CHANNELS_LAST)
    with torch.no_grad(), watching(channels_last, check), Copies() as copies:
        result = channels_last(x)
    assert len(seen) == sum(
        isinstance(module, (nn.Conv2d, nn.Linear)) for module in channels_last.modules()
    )
    assert copies.seen == []
    assert all(maps.is_contiguous(memory_format=CHANNELS_LAST) for maps in result.features)


def test_memory_format_does_not_change_results(network: Network) -> None:
    """In float64: a deep network with random weights amplifies float32's rounding."""
    double = copy.deepcopy(network.model).double()
    x = network.images[:2].double()
    with torch.no_grad():
        expected = double(x)
        same = double.to(memory_format=CHANNELS_LAST)(x.to(memory_format=CHANNELS_LAST))
    torch.testing.assert_close(
        (same.logits, same.features, same.scores),
        (expected.logits, expected.features, expected.scores),
        rtol=1e-9,
        atol=1e-9,
    )


def test_bf16_autocast(network: Network, channels_last: BranchedModel) -> None:
    dtypes = set()
    watched = watching(channels_last, lambda layer, given, output: dtypes.add(output.dtype))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), watched:
        result = channels_last(network.images.to(memory_format=CHANNELS_LAST))
    assert dtypes == {torch.bfloat16}
    assert {row.dtype for row in (*result.logits, *result.features)} == {torch.bfloat16}
    assert all(row.isfinite().all() for row in (*result.logits, *result.scores))


# ---- compilation


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize(
    "network", [name for name in NAMES if name not in SAME_LAYERS], indirect=True
)
def test_trunk_and_branch_compile_as_one_graph_each(network: Network, fresh_compiler: None) -> None:
    graphs = []

    def capture(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    model, x = network.model, network.images
    with torch.no_grad():
        shared = torch.compile(model.trunk, fullgraph=True, backend=capture)(x)
        assert torch.equal(shared, model.trunk(x))
        # The deeper branch is the student's and more of the same.
        features, logits = torch.compile(model.branches[1], fullgraph=True, backend=capture)(shared)
        want_features, want_logits = model.branches[1](shared)
        assert torch.equal(features, want_features)
        assert torch.equal(logits, want_logits)
    assert len(graphs) == 2


@pytest.mark.parametrize(
    ("name", "part"),
    [pytest.param("resnet8", "student", marks=pytest.mark.grid), ("shufflenetv2_x1_0", "branch")],
)
def test_inductor_results_equal_eager(name: str, part: str, fresh_compiler: None) -> None:
    """A whole network, and the branch whose layers look at the memory format."""
    torch.manual_seed(0)
    model = create_model(name, "baseline", CLASSES).eval().to(memory_format=CHANNELS_LAST)
    x = images(name, 2).to(memory_format=CHANNELS_LAST)
    with torch.no_grad():
        module, given = (
            (model.student(), x) if part == "student" else (model.branches[0], model.trunk(x))
        )
        torch.testing.assert_close(
            torch.compile(module, fullgraph=True)(given), module(given), rtol=1e-4, atol=1e-4
        )


# ---- gradients


# Every method on networks of three kinds, every network with the method of most modules and with a
# method of feature maps; the other pairs are in the grid.
CHOSEN = {
    *itertools.product(("resnet8", "vgg13", "mobilenetv2_x0_5_imagenet"), list_methods()),
    *itertools.product(NAMES, ("ahbf", "ffsd")),
}


@pytest.mark.parametrize(
    ("name", "method"),
    [
        pytest.param(*pair, marks=[] if pair in CHOSEN else pytest.mark.grid)
        for pair in itertools.product(NAMES, list_methods())
    ],
)
def test_every_trainable_parameter_gets_a_finite_gradient(name: str, method: str) -> None:
    torch.manual_seed(0)
    chosen = get_method(method)
    num_branches = chosen.branch_range[0]
    teacher = create_student(name, CLASSES) if chosen.needs_teacher else None
    try:
        model = create_model(name, method, CLASSES, num_branches, aux_blocks=1, teacher=teacher)
    except ConfigError as error:
        assert str(error).startswith(f"method '{method}' with model '{name}'")  # noqa: PT017
        pytest.skip(str(error))
    loss = chosen.loss_class(num_branches=num_branches, impl="reference")
    loss.prepare(BATCH, CLASSES, torch.device("cpu"))
    batch = MethodBatch(torch.arange(BATCH), torch.arange(BATCH))
    chosen.loss(loss, model(images(name)), batch, kd_weight=0.5).backward()

    # Batch norm takes the mean away again, so nothing but rounding reaches the bias of the
    # convolution before it.
    without_effect = {
        f"{layer}.bias" for layer, module in model.named_modules() if isinstance(module, nn.Conv2d)
    }
    for parameter_name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name
        # ReLU may leave a method's own scores, a handful of numbers, without a gradient.
        if not parameter_name.startswith("companion.") and parameter_name not in without_effect:
            assert parameter.grad.any(), parameter_name
