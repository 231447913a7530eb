"""FFSD and AFID: the parts of these methods that are no function of rows of logits."""

import copy
import dataclasses
import itertools

import numpy as np
import pytest
import torch
from oracles import ffsd as oracle
from oracles import fusion as modules
from oracles.gates import gradients
from torch import nn

from fastokd.errors import ConfigError
from fastokd.losses import AFIDLoss, FFSDLoss, FFSDMaps, GraphLoss
from fastokd.methods import get_method
from fastokd.methods.afid import AFIDModules, Exchange
from fastokd.methods.ffsd import FFSDModules, shifted_map
from fastokd.methods.modules import BranchPass, BranchSpec
from fastokd.models import create_model, create_student
from fastokd.models.summary import count_parameters
from fastokd.train.config import TrainConfig
from fastokd.train.step import TrainStep

STEP = 1e-6


def random_maps(num_students: int) -> dict:
    """Two stages: 3 channels of 4 x 4, then 5 of 2 x 2. The numbers are such that no entry ties
    with a threshold.
    """
    draw = np.random.default_rng(0)

    def pair():
        return [draw.normal(size=(2, 3, 4, 4)), draw.normal(size=(2, 5, 2, 2))]

    return {
        "students": [pair() for _ in range(num_students)],
        "leader": pair(),
        "fused": draw.normal(size=(2, 5, 2, 2)),
        "transformed": draw.normal(size=(2, 5 * num_students, 2, 2)),
        "decoded_shifted": [pair()[:1] for _ in range(num_students - 1)],
        "decoded_fused": pair()[:1],
        "decoded": [pair()[:1] for _ in range(num_students)],
    }


def as_tensors(value):
    if isinstance(value, np.ndarray):
        return torch.tensor(value, requires_grad=True)
    return (
        {k: as_tensors(v) for k, v in value.items()}
        if isinstance(value, dict)
        else [as_tensors(v) for v in value]
    )


def empty(value):
    """The same of no samples."""
    if isinstance(value, np.ndarray):
        return value[:0]
    return (
        {k: empty(v) for k, v in value.items()}
        if isinstance(value, dict)
        else [empty(v) for v in value]
    )


def arrays(value, path=()):
    """Every array with its path."""
    if isinstance(value, np.ndarray):
        yield path, value
        return
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        yield from arrays(item, (*path, key))


def at(value, path):
    for key in path:
        value = value[key]
    return value


@pytest.mark.parametrize("num_students", [2, 3])
@pytest.mark.parametrize("name", sorted(oracle.TERMS))
def test_ffsd_terms_and_gradients_match_finite_differences(name, num_students):
    values = random_maps(num_students)
    tensors = as_tensors(values)
    criterion = FFSDLoss(num_students + 1)
    rows = [torch.zeros(2, 4, dtype=torch.float64)] * (num_students + 1)
    extras = criterion.graph_inputs(
        rows, torch.zeros(2, dtype=torch.long), fusion_logits=rows[0], maps=FFSDMaps(**tensors)
    ).extras
    term = oracle.TERMS[name]
    assert extras[name].item() == pytest.approx(term(values, values), rel=1e-12)
    extras[name].backward()
    live = 0
    for path, array in arrays(values):
        moved = copy.deepcopy(values)
        want = np.zeros_like(array)
        for index in np.ndindex(array.shape):
            for sign in (1, -1):
                at(moved, path)[index] = array[index] + sign * STEP
                want[index] += sign * term(moved, values) / (2 * STEP)
            at(moved, path)[index] = array[index]
        got = at(tensors, path).grad
        np.testing.assert_allclose(
            np.zeros_like(want) if got is None else got.numpy(),
            want,
            rtol=1e-5,
            atol=1e-9,
            err_msg=str(path),
        )
        live += bool(np.abs(want).max() > 1e-6)
    # Which maps the term trains: students 2 .. K on both stages; the leader's and the transformed;
    # all the decoded.
    assert live == {"diversity": 2 * (num_students - 1), "fusion": 3, "decoder": num_students}[name]


def test_ffsd_loss_adds_its_terms_with_their_weights():
    maps = FFSDMaps(**as_tensors(random_maps(2)))
    rows, target = [torch.randn(2, 4, dtype=torch.float64) for _ in range(4)], torch.tensor([1, 3])
    criterion = FFSDLoss(lambda_diversity=0.5, lambda_fusion=0.25, lambda_decoder=2.0)
    loss, terms = criterion(
        rows[:3], target, fusion_logits=rows[3], maps=maps, kd_weight=0.1, return_terms=True
    )
    # The KL terms do not ramp up, the terms on maps do.
    want = GraphLoss(criterion.graph)(rows, target, kd_weight=0.0) + 0.1 * (
        0.5 * terms["diversity"] + 0.25 * terms["fusion"] + 2.0 * terms["decoder"]
    )
    torch.testing.assert_close(loss, want)
    assert terms["kl/ensemble->fusion"] > 0
    assert "ce/leader" in terms


def test_ffsd_loss_of_empty_batch_is_zero():
    maps = FFSDMaps(**as_tensors(empty(random_maps(2))))
    rows = [torch.zeros(0, 4, dtype=torch.float64)] * 4
    loss, terms = FFSDLoss()(
        rows[:3],
        torch.zeros(0, dtype=torch.long),
        fusion_logits=rows[3],
        maps=maps,
        return_terms=True,
    )
    assert loss.item() == 0
    assert not any(term.item() for term in terms.values())
    loss.backward()


def test_shifted_map_matches_worked_values():
    features = np.random.default_rng(1).normal(size=(3, 4, 3, 3))
    np.testing.assert_allclose(
        shifted_map(torch.tensor(features)).numpy(), oracle.shifted_map(features), rtol=1e-12
    )
    # One position: the lowest third has at least one entry, and it is the threshold itself.
    one = np.full((1, 2, 1, 1), 3.0)
    np.testing.assert_allclose(shifted_map(torch.tensor(one)).numpy(), one + (9 / 2 - 1) * 9 / 2)


class TinyBranch(nn.Module):
    def __init__(self, body, channels, num_classes=4):
        super().__init__()
        self.body, self.fc = nn.Sequential(*body), nn.Linear(channels, num_classes)

    def head(self, maps):
        return self.fc(maps.mean((2, 3)))


class TinyPeer(nn.Module):
    def __init__(self, stem, body, channels):
        super().__init__()
        self.trunk, self.branch = nn.Sequential(stem), TinyBranch(body, channels)


def draw_parameters(module):
    """In float64 and none at 0 or 1, where a normalisation would start."""
    generator = torch.Generator().manual_seed(1)
    for parameter in module.double().parameters():
        parameter.data = 0.7 * torch.randn(
            parameter.shape, generator=generator, dtype=torch.float64
        ) + (0.4 if parameter.dim() == 1 else 0.0)


def check_modules(got, formula, leaves):
    """Every output, and the gradients of a random sum of all entries for every leaf. Both sides by
    name; ``formula`` in NumPy.
    """
    want = formula(leaves_in := {name: leaf.detach().numpy() for name, leaf in leaves.items()})
    assert got.keys() == want.keys()
    draw = np.random.default_rng(3)
    upstream = {name: draw.normal(size=value.shape) for name, value in want.items()}
    for name, value in got.items():
        np.testing.assert_allclose(
            value.detach().numpy(), want[name], rtol=1e-9, atol=1e-10, err_msg=name
        )
    sum((value * torch.tensor(upstream[name])).sum() for name, value in got.items()).backward()

    def total(inputs):
        return sum((value * upstream[name]).sum() for name, value in formula(inputs).items())

    for name, gradient in gradients(total, leaves_in).items():
        mine = leaves[name].grad
        np.testing.assert_allclose(
            np.zeros_like(gradient) if mine is None else mine.numpy(),
            gradient,
            rtol=1e-8,
            atol=1e-9,
            err_msg=name,
        )


def test_ffsd_modules_and_gradients_match_formula():
    """Three students and a leader, of three stages: 2 channels of 7 x 7, 2 of 4 x 4, 3 of 2 x 2."""
    channels, sizes = (2, 2, 3), [(7, 7), (4, 4), (2, 2)]
    peers = [
        TinyPeer(
            nn.Conv2d(3, 2, 3, padding=1), [nn.Conv2d(2, 2, 3, 2, 1), nn.Conv2d(2, 3, 3, 2, 1)], 3
        )
        for _ in range(4)
    ]
    companion = FFSDModules(BranchSpec((3,) * 4, 3, 5, peers))
    for module in (companion, *peers):
        draw_parameters(module)
    generator = torch.Generator().manual_seed(2)
    images = [torch.randn(2, 3, 7, 7, generator=generator, dtype=torch.float64) for _ in peers]
    ran = companion.run(images, peers)
    for peer, x, maps, features, logits in zip(
        peers, images, ran.context, ran.features, ran.logits, strict=True
    ):
        for layer, own, width, size in zip(
            (*peer.trunk, *peer.branch.body), maps, channels, sizes, strict=True
        ):
            x = layer(x)
            assert torch.equal(own, x)
            assert own.shape[1:] == (width, *size)
        assert torch.equal(features, x)
        assert torch.equal(logits, peer.branch.head(x))
    leaves = {f"map{m}": maps[-1].detach().requires_grad_() for m, maps in enumerate(ran.context)}
    context = [[*maps[:-1], leaf] for maps, leaf in zip(ran.context, leaves.values(), strict=True)]
    seen = companion(
        BranchPass(images[0], images[0], tuple(leaves.values()), ran.logits, peers, context)
    )
    assert [seen["maps"].leader, *seen["maps"].students] == [context[-1], *context[:-1]]

    def named(parts):
        return {
            f"{name} {number}": value
            for name, values in parts.items()
            for number, value in enumerate(values)
        }

    maps = seen["maps"]
    got = named(
        {
            "fusion_logits": [seen["fusion_logits"]],
            "fused": [maps.fused],
            "transformed": [maps.transformed],
            "decoded_shifted": [*itertools.chain(*maps.decoded_shifted)],
            "decoded_fused": maps.decoded_fused,
            "decoded": [*itertools.chain(*maps.decoded)],
        }
    )
    check_modules(
        got,
        lambda p: named(modules.ffsd([p[f"map{m}"] for m in range(3)], p["map3"], p, sizes[:-1])),
        {**leaves, **dict(companion.named_parameters())},
    )


def test_ffsd_parameter_counts_match_official_code():
    """The official code's counts for ResNet-32, two students and 100 classes."""
    model = create_model("resnet32", "ffsd", 100)
    parts = model.companion
    assert (count_parameters(parts.fusion), count_parameters(parts.transform)) == (16_228, 9_152)
    assert [count_parameters(decoder) for decoder in parts.decoders] == [23_136, 23_136]
    assert count_parameters(model) == 1_489_920


def test_ffsd_optimizer_settings_match_official_code():
    config = TrainConfig(model="resnet8", method="ffsd", weight_decay=1e-4, lr=0.1)
    model = create_model("resnet8", "ffsd", 4)
    optimizers = TrainStep(config, model, torch.device("cpu")).optimizers
    groups = {name: optimizer.param_groups for name, (optimizer, _) in optimizers.by_name.items()}
    decay = {
        id(parameter): group["weight_decay"]
        for group in groups["sgd"]
        for parameter in group["params"]
    }
    rates = {
        id(parameter): group["lr"] for group in groups["adam"] for parameter in group["params"]
    }
    for name, parameter in model.named_parameters():
        if name.startswith("companion.decoders."):
            assert (rates[id(parameter)], id(parameter) in decay) == (1e-3, False)
        else:
            assert decay[id(parameter)] == (
                1e-5 if name.startswith("companion.fusion.") else 1e-4
            ), name
            assert id(parameter) not in rates


def test_ffsd_map_terms_ramp_up_over_five_epochs():
    config = TrainConfig(method="ffsd", epochs=300)
    assert [config.kd_weight_at(epoch) for epoch in (0, 3, 4, 100)] == pytest.approx(
        [np.exp(-5 * 0.8**2), np.exp(-5 * 0.2**2), 1.0, 1.0]
    )


@pytest.mark.parametrize("method", ["ffsd", "afid"])
def test_ffsd_teacher_gradients_do_not_reach_other_parts(method):
    """FFSD detaches between its parts: a student learns nothing from the leader's cross-entropy,
    nor from the head's.
    """
    model, chosen = create_model("resnet8", method, 4), get_method(method)
    result = model(torch.randn(4, 3, 16, 16))
    result.extras["fusion_logits"].sum().backward()
    reached = any(parameter.grad is not None for parameter in model.branches.parameters())
    # AFID's head reads the maps themselves.
    assert reached == (method == "afid")
    assert chosen.needs_index is False


def test_ffsd_and_afid_refuse_incompatible_networks():
    with pytest.raises(ConfigError, match=r"method 'ffsd' .*they must be one network; name one"):
        create_model("resnet8,resnet8,resnet110", "ffsd", 4)
    with pytest.raises(ConfigError, match=r"method 'afid' .* their last stages 64 and 256"):
        create_model("resnet8,resnet110", "afid", 4)
    with pytest.raises(ValueError, match="num_branches=2; it must be an integer of at least 3"):
        FFSDLoss(2)
    with pytest.raises(ValueError, match="num_branches=3; it must be 2"):
        AFIDLoss(3)
    with pytest.raises(ValueError, match=r"lambda_fusion=-1\.0"):
        FFSDLoss(lambda_fusion=-1.0)
    for name, method in (
        ("fusion_weight_decay", "ffsd"),
        ("decoder_lr", "ffsd"),
        ("fusion_weight_decay", "afid"),
    ):
        for value in ("x", True, -1.0, float("inf")):
            expected = "a number of at least 0" if isinstance(value, float) else "a number"
            with pytest.raises(
                ConfigError, match=f"method '{method}'.*{name}={value!r}; it must be {expected}"
            ):
                create_model("resnet8", method, 4, options={name: value})
    with pytest.raises(ValueError, match="maps are missing"):
        FFSDLoss()(
            [torch.zeros(2, 3)] * 3,
            torch.zeros(2, dtype=torch.long),
            fusion_logits=torch.zeros(2, 3),
        )


# ---- AFID


def sigmoid(value):
    return 1 / (1 + np.exp(-value))


def test_afid_exchange_matches_loops():
    """Each map weighted by where the other looks, both from the values before, by loops."""
    torch.manual_seed(0)
    exchange = Exchange(32).double()
    one, other = (torch.randn(2, 32, 3, 3, dtype=torch.float64) for _ in range(2))
    reduce, expand, kernel = (
        module.weight.detach().numpy()
        for module in (exchange.channel.reduce, exchange.channel.expand, exchange.spatial.conv)
    )
    assert reduce.shape == (2, 32)

    def look(maps):
        hidden = [
            np.maximum(reduce @ pooled, 0) for pooled in (maps.mean((1, 2)), maps.max((1, 2)))
        ]
        maps = maps * sigmoid(expand @ hidden[0] + expand @ hidden[1])[:, None, None]
        planes = np.pad(np.stack([maps.mean(0), maps.max(0)]), ((0, 0), (3, 3), (3, 3)))
        return np.array(
            [
                [sigmoid((kernel[0] * planes[:, y : y + 7, x : x + 7]).sum()) for x in range(3)]
                for y in range(3)
            ]
        )

    got = exchange(one, other)
    for mine, theirs, result in ((one, other, got[0]), (other, one, got[1])):
        want = np.stack(
            [own * look(seen) for own, seen in zip(mine.numpy(), theirs.numpy(), strict=True)]
        )
        np.testing.assert_allclose(result.detach().numpy(), want, rtol=1e-12)


def test_afid_networks_and_gradients_match_formula():
    """Exchange, bodies, exchange, heads; the fusion head reads the maps before the second exchange,
    and trains them.
    """

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.peers = nn.ModuleList(
                TinyPeer(nn.Conv2d(3, 4, 1), [nn.Sequential(nn.Conv2d(4, 3, 1))], 3)
                for _ in range(2)
            )
            self.companion = AFIDModules(BranchSpec((3, 3), 3, 5, self.peers))

    network = Network()
    draw_parameters(network)
    generator = torch.Generator().manual_seed(2)
    leaves = {
        f"x{m}": torch.randn(2, 3, 3, 3, generator=generator, dtype=torch.float64).requires_grad_()
        for m in range(2)
    }
    images = tuple(leaves.values())
    ran = network.companion.run(images, network.peers)
    head = network.companion(
        BranchPass(images[0], images[0], ran.features, ran.logits, network.peers)
    )
    got = {"logits1": ran.logits[0], "logits2": ran.logits[1], **head}
    parameters = {
        name.removeprefix("companion."): value for name, value in network.named_parameters()
    }
    check_modules(got, lambda p: modules.afid((p["x0"], p["x1"]), p), {**leaves, **parameters})


def test_afid_student_has_both_networks_and_equal_logits():
    model = create_model("resnet8", "afid", 4)
    x = torch.randn(6, 3, 16, 16)
    model(x)  # batch norm has seen a batch
    model.eval()
    student = model.student()
    assert model.name == "resnet8,resnet8@afid"
    assert torch.equal(student(x), model(x).logits[0])
    again = create_student(model.name, 4).eval()
    again.load_state_dict(student.state_dict(), strict=True)
    assert torch.equal(again(x), student(x))
    plain = model.student(0)
    assert not torch.equal(
        plain(x), student(x)
    )  # a sub-network without the other's attention is another function
    assert count_parameters(student) == count_parameters(model) - count_parameters(
        model.companion.fusion
    )
    assert not any(
        one.data_ptr() == other.data_ptr()
        for one, other in zip(student.parameters(), model.parameters(), strict=False)
    )


def test_afid_code_preset_has_official_eps():
    assert {term.eps for term in AFIDLoss.preset("code").graph.terms if hasattr(term, "eps")} == {
        1e-7
    }
    assert dataclasses.replace(TrainConfig(method="afid"), epochs=300).ramp_length() == 80


@pytest.mark.parametrize("method", ["ffsd", "afid"])
def test_networks_that_exchange_features_are_compiled(monkeypatch, method):
    """As one graph without breaks, with the results of the networks that are not compiled."""
    graphs, compiled, real = [], [], torch.compile

    def count_graphs(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def compile_whole(function, **options):
        compiled.append(function.__name__)
        return real(function, backend=count_graphs, fullgraph=True)

    model = create_model("resnet8", method=method, num_classes=10)
    other = copy.deepcopy(model)
    monkeypatch.setattr(torch, "compile", compile_whole)
    model.compile_parts()
    assert "run" in compiled
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    output, expected = model(images), other(images)
    for one, another in zip(output.logits, expected.logits, strict=True):
        torch.testing.assert_close(one, another, rtol=0, atol=0)
    assert len(graphs) == 2  # of the networks and of the method's modules
