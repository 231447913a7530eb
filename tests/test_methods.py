"""Requests of a method to model and trainer: layouts, its own modules, extra terms, and what
it remembers.
"""

import dataclasses

import pytest
import torch
from torch import nn

from fastokd.errors import ConfigError
from fastokd.graph import KL, CrossEntropy, Graph, Logits
from fastokd.losses import GraphLoss, MethodLoss
from fastokd.losses.graph_loss import ExtraTerm, GraphInputs
from fastokd.methods import get_method
from fastokd.methods.modules import MethodModules
from fastokd.models import create_model, create_student, factory
from fastokd.models.summary import count_parameters

PAIR = Graph(
    "pair",
    (Logits("branch1"), Logits("branch2")),
    (
        CrossEntropy("branch1"),
        CrossEntropy("branch2"),
        KL("branch2", "branch1", 1.0, 2.0, detach=True),
    ),
)


class PullLoss(MethodLoss):
    """Two rows and a term outside the graph: a plain sum that pulls the parameter ``pull`` up."""

    def __init__(self, num_branches: int = 2, reduction: str = "mean", impl: str = "auto") -> None:
        super().__init__(
            PAIR,
            num_branches,
            reduction,
            impl,
            extra_terms={"pull": ExtraTerm(0.5), "late": ExtraTerm(2.0, scheduled=True)},
        )

    def graph_inputs(self, branch_logits, target=None, *, pull):
        return GraphInputs(branch_logits, extras={"pull": pull.sum(), "late": pull.square().sum()})


class NegativeLoss(PullLoss):
    def graph_inputs(self, branch_logits, target=None, *, pull):
        return super().graph_inputs(branch_logits, target, pull=-pull)


def peers(method: str = "baseline", **changes):
    return dataclasses.replace(
        get_method(method),
        topologies=("peers", "branches"),
        branch_range=(2, 4),
        default_branches=2,
        build_companion=None,
        **changes,
    )


def images(batch: int = 4, size: int = 16) -> torch.Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_extra_terms_use_the_same_backward_pass(impl):
    criterion = PullLoss(impl=impl)
    rows = [torch.randn(3, 5, requires_grad=True) for _ in range(2)]
    target, pull = torch.tensor([0, 1, 2]), torch.tensor([1.0, -2.0], requires_grad=True)
    loss, terms = criterion(rows, target, pull=pull, kd_weight=0.25, return_terms=True)
    graph_loss = GraphLoss(criterion.graph)(rows, target, kd_weight=0.25)
    torch.testing.assert_close(loss, graph_loss + 0.5 * -1.0 + 2.0 * 0.25 * 5.0)
    assert (terms["pull"].item(), terms["late"].item()) == (-1.0, 5.0)
    loss.backward()
    want = [rows[0].grad, rows[1].grad, pull.grad]
    torch.testing.assert_close(pull.grad, torch.tensor([0.5 + 1.0, 0.5 - 2.0]))
    again = [value.detach().clone().requires_grad_() for value in (*rows, pull)]
    both, both_terms = criterion.forward_backward(again[:2], target, pull=again[2], kd_weight=0.25)
    torch.testing.assert_close(both, loss.detach())
    assert both_terms.keys() == terms.keys()
    for value, grad in zip(again, want, strict=True):
        torch.testing.assert_close(value.grad, grad)


@pytest.mark.parametrize("call", ["forward", "forward_backward", "named_rows"])
@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {},
            (
                "PullLoss: missing a required argument: 'pull'; this loss takes branch_logits,"
                " target, pull"
            ),
        ),
        (
            {"pull": torch.ones(2), "push": 1},
            (
                "PullLoss: got an unexpected keyword argument 'push'; this loss takes"
                " branch_logits, target, pull"
            ),
        ),
    ],
)
def test_missing_or_unknown_loss_inputs_are_named(call, given, message):
    rows = torch.randn(2, 3, 5, requires_grad=True)
    batch = (rows,) if call == "named_rows" else (rows, torch.tensor([0, 1, 2]))
    with pytest.raises(TypeError) as caught:
        getattr(PullLoss(), call)(*batch, **given)
    assert str(caught.value) == message


def test_type_error_inside_loss_is_unchanged():
    with pytest.raises(TypeError, match="bad operand type for unary"):
        NegativeLoss()(torch.randn(2, 3, 5), torch.tensor([0, 1, 2]), pull="x")


def test_terms_outside_the_graph_are_means():
    with pytest.raises(
        ValueError, match="reduction='sum': the terms pull, late are means over the batch"
    ):
        PullLoss(reduction="sum")


def test_peers_are_complete_networks_in_given_order(monkeypatch):
    monkeypatch.setattr(factory, "get_method", lambda name: peers(kept=-1))
    model = create_model("resnet8,resnet14", "baseline", 5).eval()
    assert (model.names, model.name, model.num_branches, model.trunk) == (
        ("resnet8", "resnet14"),
        "resnet14",
        2,
        None,
    )
    assert count_parameters(model) == sum(
        count_parameters(create_student(name, 5)) for name in model.names
    )
    x = images()
    result = model(x)
    for index, name in enumerate(model.names):
        plain = create_student(name, 5).eval()
        plain.load_state_dict(model.student(index).state_dict(), strict=True)
        assert torch.equal(plain(x), result.logits[index])
    views = torch.stack([x, x.flip(3)])
    assert torch.equal(model(views).logits[0], result.logits[0])
    assert torch.equal(model(views).logits[1], model.student(1)(x.flip(3)))
    with pytest.raises(ConfigError, match="branch 2: this model has the branches 0 to 1"):
        model.student(2)


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        (
            "resnet8,resnet14,resnet20",
            {"num_branches": 2},
            "names 3 networks for 2 branches; name one, or as many",
        ),
        ("resnet8,resnet14", {"topology": "branches"}, "several networks can only be peers"),
        (
            "resnet8",
            {"topology": "tree"},
            "topology='tree': method 'baseline' takes peers or branches",
        ),
        ("resnet8,resent14", {}, "unknown model 'resent14'"),
    ],
)
def test_invalid_layouts_are_refused(monkeypatch, name, given, message):
    monkeypatch.setattr(factory, "get_method", lambda method: peers())
    with pytest.raises(ConfigError, match=message):
        create_model(name, "baseline", 5, **given)


def test_companion_observes_and_changes_forward_pass(monkeypatch):
    class Watch(MethodModules):
        def __init__(self, layout) -> None:
            super().__init__()
            assert (layout.channels, layout.trunk_channels, layout.num_classes) == ((64, 64), 32, 5)
            self.scale = nn.Parameter(torch.tensor(2.0))

        def at_split(self, shared):
            return self.scale * shared

        def run(self, inputs, branches):
            ran = super().run(inputs, branches)
            return ran._replace(logits=ran.logits[::-1], context="seen")

        def forward(self, seen):
            assert seen.images.shape == (4, 3, 16, 16)
            assert len(seen.branches) == 2
            assert seen.context == "seen"
            return {"scores": (seen.logits[0] * 0,), "pull": seen.shared.mean()}

    monkeypatch.setattr(
        factory, "get_method", lambda method: dataclasses.replace(peers(), topologies=("branches",))
    )
    plain = create_model("resnet8", "baseline", 5).eval()
    monkeypatch.setattr(
        factory,
        "get_method",
        lambda method: dataclasses.replace(
            peers(), topologies=("branches",), build_companion=Watch
        ),
    )
    model = create_model("resnet8", "baseline", 5).eval()
    model.load_state_dict({**plain.state_dict(), "companion.scale": torch.tensor(1.0)})
    result = model(images())
    for one, other in zip(result.logits, plain(images()).logits[::-1], strict=True):
        assert torch.equal(one, other)
    assert result.extras.keys() == {"scores", "pull"}
    assert len(result.scores) == 1
    model.companion.scale.data.fill_(2.0)
    assert not torch.equal(model(images()).logits[1], result.logits[1])


def test_network_that_method_cannot_train_is_refused(monkeypatch):
    def refuse(layout, **options):
        raise ValueError("its features have no height and width")

    monkeypatch.setattr(
        factory,
        "get_method",
        lambda method: dataclasses.replace(get_method("ahbf"), build_companion=refuse),
    )
    with pytest.raises(
        ConfigError,
        match="method 'ahbf' with model 'resnet8': its features have no height and width",
    ):
        create_model("resnet8", "ahbf", 5)


def test_one_gate_reads_the_trunk():
    """The OKDDip repository's totals for ONE with four branches."""
    assert count_parameters(create_model("resnet32", "one", 10, 4)) == 1_529_988
    assert count_parameters(create_model("resnet32", "one", 100, 4)) == 1_553_388
    assert count_parameters(create_model("resnet110", "one", 10, 4)) == 3_765_636
