"""Runs that start from trained weights (``weights``, ``pretrained``)."""

import dataclasses
import itertools
from pathlib import Path

import pytest
import torch
from method_runs import SHORT_RUN, few_digits, make
from safetensors.torch import save_file
from test_interruption import assert_equal, outcome

from fastokd.errors import CheckpointError, ConfigError
from fastokd.experiments.analysis.runs import read_runs
from fastokd.export import load_student
from fastokd.models import create_model, create_student
from fastokd.train.compute import student_alone
from fastokd.train.config import identity_fields
from fastokd.train.data import data_record, prepared
from fastokd.train.export_run import export_run
from fastokd.train.initial import (
    InitialWeights,
    check_initial,
    normalization_notes,
    normalization_of,
    pretrained,
    read_initial,
    read_weights,
    start_from,
    with_absolute_weights,
)
from fastokd.train.progress import Reporter
from fastokd.train.rules import check_config
from fastokd.train.run_folder import RunFolder
from fastokd.train.runs import load_run, newest_checkpoint, run_identity
from fastokd.train.trainer import Trainer
from fastokd.train.weight_files import without_prefix

CPU = torch.device("cpu")
CONFIG = SHORT_RUN


@pytest.fixture(scope="module")
def digits():
    return few_digits(64)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, digits):
    """The folder of a finished run of ResNet-8 alone."""
    config = dataclasses.replace(CONFIG, method="baseline", branches=None, epochs=1)
    trainer = make(config, tmp_path_factory.mktemp("trained") / "run", digits)
    trainer.run()
    return trainer.run_folder.path


def moved(network, seed=3):
    """A network whose weights and running statistics are not initial ones."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in network.state_dict().values():
            if value.is_floating_point():
                value.add_(torch.rand(value.shape, generator=generator) * 0.1)
    return network.eval()


def logits(network, size=32):
    images = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        result = network.eval()(images)
    return result if isinstance(result, torch.Tensor) else result.logits


def initial(network, **known):
    return InitialWeights("file.pt", network.state_dict(), **known)


# --- the values


@pytest.mark.parametrize(
    ("name", "at"),
    [
        ("resnet8", None),
        ("resnet18_imagenet", None),
        ("timm:test_resnet", "layer4"),
        ("torchvision:mobilenet_v3_small", "features.8"),
    ],
)
def test_every_branch_starts_as_the_trained_network(name, at):
    network = moved(create_student(name, 7))
    model = create_model(name, "ahbf", 7, 3, 1, at=at)
    start_from(model, [initial(network)])
    for row in logits(model):
        assert torch.equal(row, logits(network))


def test_new_classes_get_a_fresh_last_layer_in_every_branch():
    network = moved(create_student("resnet8", 7))
    torch.manual_seed(0)
    model = create_model("resnet8", "one", 4, 3)
    heads = [dict(branch.head.state_dict()) for branch in create_model_again("one").branches]
    lines = start_from(model, [initial(network)])
    assert "new: fc.weight, fc.bias (7 classes in the file, 4 in the data)" in lines[0]
    for branch, head in zip(model.branches, heads, strict=True):
        assert all(
            torch.equal(value, head[name]) for name, value in branch.head.state_dict().items()
        )
    assert len({row.sum().item() for row in logits(model)}) == 3
    bodies = [branch.body.state_dict() for branch in model.branches]
    assert all(
        torch.equal(one[name], other[name])
        for one, other in itertools.pairwise(bodies)
        for name in one
    )
    kept = model.student().state_dict()
    for name, value in network.state_dict().items():
        if not name.startswith("fc."):
            assert torch.equal(kept[name], value), name


def create_model_again(method):
    torch.manual_seed(0)
    return create_model("resnet8", method, 4, 3)


@pytest.mark.parametrize(("classes", "same"), [(list("abc"), True), (list("abd"), False)])
def test_last_layer_is_kept_only_for_the_same_class_names(classes, same):
    network = moved(create_student("resnet8", 3))
    model = create_model("resnet8", "baseline", 3)
    lines = start_from(model, [initial(network, classes=list("abc"))], classes=classes)
    assert torch.equal(logits(model)[0], logits(network)) is same
    reason = "(other classes than the file's (not in the data: c; only in the data: d))"
    assert (f"new: fc.weight, fc.bias {reason}" in lines[0]) is not same


@pytest.mark.parametrize("method", ["one", "dml"])
def test_branches_of_equal_depth_differ_by_noise_on_their_heads(method):
    network = moved(create_student("resnet8", 4))
    model = create_model("resnet8", method, 4, 3)
    start_from(model, [initial(network)])
    rows = logits(model)
    assert torch.equal(rows[0], logits(network))
    assert len({row.sum().item() for row in rows}) == 3
    for row in rows:
        assert (row - rows[0]).abs().max() < 0.5 * rows[0].std()


@pytest.mark.parametrize("missing", ["conv1.weight", "bn1.weight", "fc.bias"])
def test_equal_branches_with_missing_shared_tensor_get_noise(missing):
    state = moved(create_student("resnet8", 4)).state_dict()
    del state[missing]
    model = create_model("resnet8", "one", 4, 3)
    start_from(model, [InitialWeights("file.pt", state)])
    for one, other in itertools.combinations(model.branches, 2):
        assert not all(map(torch.equal, one.parameters(), other.parameters()))


def test_all_classifiers_of_a_network_are_replaced():
    """DeiT with distillation has two."""
    name = "timm:deit_tiny_distilled_patch16_224"
    state = create_student(name, 7).state_dict()
    model = create_model(name, "baseline", 4)
    (line,) = start_from(model, [InitialWeights("file.pt", state)])
    assert "new: head.weight, head.bias, head_dist.weight" in line


def test_fresh_branches_stay_as_initialized():
    network = moved(create_student("resnet8", 4))
    torch.manual_seed(0)
    model, before = create_model("resnet8", "ahbf", 4, 3, 1), None
    before = [
        {name: value.clone() for name, value in branch.state_dict().items()}
        for branch in model.branches
    ]
    start_from(model, [initial(network)], branch_init="fresh")
    assert torch.equal(logits(model)[0], logits(network))
    for branch, values in list(zip(model.branches, before, strict=True))[1:]:
        assert all(torch.equal(value, values[name]) for name, value in branch.state_dict().items())


def test_different_peers_start_from_their_own_files():
    networks = [moved(create_student(name, 4)) for name in ("resnet8", "resnet14")]
    model = create_model("resnet8,resnet14", "dml", 4)
    start_from(model, [initial(each) for each in networks])
    rows = logits(model)
    assert torch.equal(rows[0], logits(networks[0]))
    assert torch.equal(rows[1], logits(networks[1]))


# --- files


def wrappings(state):
    extra = {"loss.weight": torch.ones(1)} if state else {}
    return {
        "plain": state,
        "module": {f"module.{name}": value for name, value in state.items()},
        "compiled": {f"_orig_mod.{name}": value for name, value in state.items()},
        "state_dict": {"epoch": 3, "state_dict": state},
        "model in model": {"model": {"model": {f"module.{k}": v for k, v in state.items()}}},
        "only an average": {"model_ema": {f"module.{k}": v for k, v in state.items()}, "step": 4},
        "Lightning": {"state_dict": {f"model.{k}": v for k, v in state.items()} | extra},
        "average of timm": {"ema": {"module": state}},
        "half precision": {k: v.half() if v.is_floating_point() else v for k, v in state.items()},
    }


@pytest.mark.parametrize("wrapping", wrappings({}))
def test_file_in_any_wrapper_is_read(tmp_path, wrapping):
    state = create_student("resnet8", 4).state_dict()
    torch.save(wrappings(state)[wrapping], tmp_path / "weights.pth")
    found = without_prefix(read_weights(tmp_path / "weights.pth").tensors, state)
    assert found.keys() - {"loss.weight"} == state.keys()
    for name, value in state.items():
        expected = value.half() if wrapping == "half precision" else value
        assert torch.equal(found[name].float(), expected.float())


def test_prefix_of_all_names_is_removed():
    network = moved(create_student("resnet8", 4))
    prefixed = {f"net.model.{name}": value for name, value in network.state_dict().items()}
    model = create_model("resnet8", "baseline", 4)
    (line,) = start_from(model, [InitialWeights("w.ckpt", prefixed)])
    assert torch.equal(logits(model)[0], logits(network))
    assert "not used" not in line


def test_eight_bit_weights_are_read(tmp_path):
    state = create_student("resnet8", 4).state_dict()
    small = {"fc.weight": state["fc.weight"].to(torch.float8_e4m3fn)}
    torch.save({**state, **small}, tmp_path / "w.pth")
    model = create_model("resnet8", "baseline", 4)
    start_from(model, [read_weights(tmp_path / "w.pth")])
    assert torch.equal(model.student().fc.weight, small["fc.weight"].float())


def test_weights_are_preferred_to_their_average(tmp_path):
    state = {"a.weight": torch.ones(2)}
    content = {"model": state, "model_ema": {"a.weight": torch.zeros(2)}}
    torch.save(content, tmp_path / "w.pt")
    found = read_weights(tmp_path / "w.pt")
    assert found.tensors["a.weight"].sum() == 2
    assert found.source.endswith("w.pt, entry 'model'")


@pytest.mark.parametrize("file", ["", "student.safetensors", "checkpoints/last.pt"])
def test_run_folder_checkpoint_and_student_are_read(trained, file):
    found = read_weights(trained / file)
    network = create_student("resnet8", 10)
    network.load_state_dict(dict(found.tensors))
    assert found.classes == [str(digit) for digit in range(10)]
    mean, std = found.normalization
    assert len(mean) == len(std) == 3
    expected = read_weights(trained / "student.safetensors").tensors
    assert all(torch.equal(value, found.tensors[name]) for name, value in expected.items())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PK\x03\x04 not a file", "is damaged or not a file of weights"),
        ({"epoch": 3}, "has no weights: no dictionary of tensors (epoch)"),
        ({"state_dict": {"a": torch.tensor([1.0, float("nan")])}}, "'a' has NaN or infinite"),
        ({"model": Path("x")}, "pickled objects other than tensors"),
        ([1, 2], "has no weights"),
    ],
)
def test_unusable_file_is_refused(tmp_path, content, message):
    path = tmp_path / "weights.pt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(CheckpointError) as raised:
        read_weights(path)
    assert message in str(raised.value)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_truncated_file_is_refused(tmp_path, trained):
    whole = (trained / "student.safetensors").read_bytes()
    (tmp_path / "half.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"half\.safetensors is damaged"):
        read_weights(tmp_path / "half.safetensors")


def test_other_architecture_is_refused_with_the_closest_names():
    model = create_model("resnet8", "baseline", 4)
    with pytest.raises(CheckpointError, match=r"of another architecture: .*\(closest: "):
        start_from(model, [initial(create_student("vgg13", 4))])


def test_other_shape_is_refused():
    state = create_student("resnet8", 4).state_dict()
    name = next(iter(state))
    state[name] = torch.zeros(3, 3)
    model = create_model("resnet8", "baseline", 4)
    with pytest.raises(CheckpointError, match=rf"{name} is \[3, 3\], the model's is"):
        start_from(model, [InitialWeights("file.pt", state)])


def test_missing_and_unused_tensors_are_named():
    state = create_student("resnet8", 4).state_dict()
    del state["fc.bias"]
    state["extra.weight"] = torch.zeros(1)
    (line,) = start_from(create_model("resnet8", "baseline", 4), [InitialWeights("file.pt", state)])
    assert "new: fc.bias; not used: extra.weight" in line


# --- pretrained


def test_pretrained_weights_come_from_the_cache_of_torchvision(tmp_path, monkeypatch):
    import torchvision

    network = moved(torchvision.models.resnet18())
    url = torchvision.models.ResNet18_Weights.DEFAULT.url
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    torch.save(network.state_dict(), tmp_path / "hub/checkpoints" / url.rpartition("/")[2])
    for name in ("torchvision:resnet18", "resnet18_imagenet"):
        found = pretrained(name)
        assert found.normalization == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
        model = create_model(name, "ahbf", 5, 2, 1, at="layer4" if ":" in name else None)
        lines = start_from(model, [found])
        assert "trained weights of torchvision:resnet18" in lines[0]
        assert "new: fc.weight, fc.bias" in lines[0]
        assert torch.equal(model.student().conv1.weight, network.conv1.weight)


def test_pretrained_weights_of_timm_come_from_its_cache(tmp_path, monkeypatch):
    timm = pytest.importorskip("timm")
    network = moved(timm.create_model("test_resnet"))
    save_file(network.state_dict(), file := tmp_path / "model.safetensors")
    monkeypatch.setattr(timm.models._hub, "hf_hub_download", lambda **_: str(file))
    weights = pretrained("timm:test_resnet")
    assert weights.source == "trained weights of timm:test_resnet"
    assert [list(each) for each in weights.normalization] == [HALF, HALF]
    model = create_model("timm:test_resnet", "ahbf", 1000, 2, 1, at="layer4")
    start_from(model, [weights])
    for row in logits(model):
        torch.testing.assert_close(row, logits(network))


def test_download_without_network_names_address_and_file(tmp_path, monkeypatch):
    import urllib.request

    def no_network(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    monkeypatch.setattr(torch.hub, "urlopen", no_network)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(CheckpointError) as raised:
        pretrained("torchvision:resnet18")
    assert "downloaded from https://download.pytorch.org/models/resnet18-" in str(raised.value)
    assert f"copy that file to {tmp_path}/hub/checkpoints/resnet18-" in str(raised.value)
    assert "or pass it with --weights FILE" in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pretrained": True}, "no trained weights are published for resnet8"),
        ({"pretrained": True, "model": "torchvision:resnet1"}, "did you mean 'resnet1"),
        ({"weights": "nowhere.pt"}, "weights=nowhere.pt: there is no such file"),
    ],
)
def test_unavailable_weights_are_refused_before_the_data_is_read(changes, message):
    with pytest.raises((ConfigError, CheckpointError), match=message):
        check_initial(dataclasses.replace(CONFIG, **changes))


# --- configurations and runs


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": "a.pt", "pretrained": True}, r"give one of them \(--pretrained false\)"),
        ({"branch_init": "fresh"}, "it is for networks with trained weights"),
        ({"weights": "a.pt", "compression": True}, "pass branch_init=fresh"),
        (
            {"weights": "a.pt", "model": "resnet8,resnet14", "method": "dml", "branches": None},
            "1 files for the 2 networks resnet8,resnet14",
        ),
        (
            {"weights": "a.pt, ", "model": "resnet8,resnet14", "method": "dml", "branches": None},
            "1 files for the 2 networks resnet8,resnet14",
        ),
        (
            {"weights": "a.pt", "branch_init": "fresh", "teach_from": 0.5},
            "branches that start later are copies of the student",
        ),
    ],
)
def test_contradicting_options_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        check_config(dataclasses.replace(CONFIG, **changes))


def test_identity_of_configurations_without_weights_is_as_before():
    names = [name for name, _ in identity_fields(CONFIG)]
    assert not {"weights", "pretrained", "branch_init"} & set(names)
    changed = dataclasses.replace(CONFIG, weights="a.pt")
    assert ("weights", "a.pt") in identity_fields(changed)


def test_run_starts_from_weights_and_resumes_without_the_file(tmp_path, trained, digits):
    file = tmp_path / "w.safetensors"
    state = dict(read_weights(trained).tensors)
    save_file({name: value.contiguous() for name, value in state.items()}, file)
    config = dataclasses.replace(CONFIG, weights=str(file), teach_from=0.0, ema=0.9)
    straight = make(config, tmp_path / "straight", digits)
    student = straight.model.student().state_dict()
    assert all(torch.equal(student[name], value) for name, value in state.items())
    average = straight.step.average.module.state_dict()
    assert all(torch.equal(average[name], value) for name, value in state.items())
    straight.run()
    log = straight.run_folder.log_path.read_text()
    digest = read_weights(file).fingerprint[:12]
    assert f"weights from {file} (SHA-256 of the tensors: {digest}): " in log
    assert "the other branches start as copies of the student's" in log

    first = make(config, tmp_path / "resumed", digits)
    first.run(until=1)
    file.unlink()
    run = RunFolder.open(tmp_path / "resumed")
    state, _ = newest_checkpoint(run, print)
    second = Trainer(config, run, Reporter(quiet=True), digits, saved_data=state["data"])
    second.resume(state)
    second.run()
    assert_equal(outcome(second), outcome(straight))
    assert export_run(tmp_path / "resumed").path.is_file()


def test_copies_of_one_file_of_weights_make_one_run(tmp_path, trained, digits):
    """Also in another format; a changed file at the same path makes another run."""
    state = dict(read_weights(trained).tensors)
    torch.save(state, tmp_path / "a.pth")
    file = tmp_path / "b.safetensors"
    save_file({name: value.contiguous() for name, value in state.items()}, file)
    config = dataclasses.replace(CONFIG, weights=str(tmp_path / "a.pth"), epochs=1)

    def train(name, **changes):
        run = make(dataclasses.replace(config, **changes), tmp_path / name, digits)
        run.run()
        return run.run_folder

    first, other = train("first"), train("other", weights=str(file), seed=1)
    same = train("same", weights=str(file))
    torch.save({**state, "fc.bias": state["fc.bias"] + 1}, tmp_path / "a.pth")
    changed = [train("changed"), train("changed again", seed=2)]
    identities = [
        load_student(folder.path)[1]["provenance"]["run"] for folder in (first, same, changed[0])
    ]
    assert identities[0] == identities[1] != identities[2]
    exported = load_student(export_run(first.path, out=tmp_path / "export").path)
    assert exported[1]["provenance"]["run"] == identities[0]
    one, two = read_runs([first.path, other.path, changed[1].path])
    assert [run.config.seed for run in one.runs] == [0, 1]
    assert "weights" in one.label
    assert one.label != two.label


@pytest.mark.parametrize("is_old", [False, True])
def test_resumed_run_keeps_its_identity_without_the_file(tmp_path, trained, digits, is_old):
    """Runs of earlier versions recorded no fingerprint of the weights."""
    torch.save(dict(read_weights(trained).tensors), file := tmp_path / "w.pth")
    config = dataclasses.replace(CONFIG, weights=str(file))
    make(config, tmp_path / "run", digits).run(until=1)
    file.unlink()
    run = RunFolder.open(tmp_path / "run")
    state, _ = newest_checkpoint(run, print)
    weights = state.pop("weights") if is_old else state["weights"]
    assert state["config_hash"] == run_identity(config, digits.fingerprint, weights=weights)
    second = Trainer(config, run, Reporter(quiet=True), digits, saved_data=state["data"])
    second.resume(state)
    second.run()
    state, _ = newest_checkpoint(run, print)
    expected = None if is_old else weights
    assert state.get("weights") == expected
    identity = run_identity(config, digits.fingerprint, weights=expected)
    assert load_student(run.path)[1]["provenance"]["run"] == identity[:12]


def test_late_teaching_starts_from_weights(tmp_path, trained, digits):
    config = dataclasses.replace(CONFIG, weights=str(trained), teach_from=0.5)
    trainer = make(config, tmp_path / "run", digits)
    assert trainer.model.num_branches == 1
    student = trainer.model.student().state_dict()
    expected = read_weights(trained).tensors
    assert all(torch.equal(student[name], value) for name, value in expected.items())
    trainer.run()
    assert trainer.model.num_branches == 3


def test_relative_path_of_weights_is_stored_absolute(tmp_path, trained, digits, monkeypatch):
    monkeypatch.chdir(trained.parent)
    config = dataclasses.replace(CONFIG, weights=trained.name)
    trainer = make(config, tmp_path / "run", digits)
    assert trainer.config.weights == str(trained)
    (initial_weights,) = read_initial(trainer.config)
    assert initial_weights.classes
    trainer.start()
    assert f"weights: {trained}" in (tmp_path / "run/config.yaml").read_text()


def test_student_alone_has_the_same_weights_and_split():
    config = dataclasses.replace(
        CONFIG, model="timm:test_resnet", at="layer3", weights="a.pt", branch_init="fresh"
    )
    alone = student_alone(dataclasses.replace(config, freeze_epochs=1))
    assert (alone.weights, alone.branch_init, alone.at) == ("a.pt", None, "layer3")
    assert student_alone(config).at is None
    peers = dataclasses.replace(
        CONFIG, model="resnet8,resnet14", method="dml", branches=None, weights="a.pt, b.pt"
    )
    assert student_alone(peers).weights == ("a.pt", "b.pt")[peers.kept_branch()]
    check_config(alone)


# --- normalization


@pytest.mark.parametrize(
    ("normalization", "expected"),
    [("auto", (0.5, 0.2)), ("weights", (0.5, 0.2)), ("data", None), ("imagenet", None)],
)
def test_normalization_follows_the_weights_by_default(digits, normalization, expected):
    config = dataclasses.replace(CONFIG, weights="a.pt", normalization=normalization)
    known = ((0.5,) * 3, (0.2,) * 3)
    given = prepared(config, digits, of_weights=known)
    if expected is not None:
        assert (given.mean, given.std) == known
        # Evaluation and resumed runs take the recorded one, without the weights.
        record = data_record(given, "resident")
        again = prepared(config, digits, record)
        assert (again.mean, again.std) == known
    elif normalization == "data":
        assert (given.mean, given.std) == (digits.mean, digits.std)
    else:
        assert given.mean == (0.485, 0.456, 0.406)
    without = prepared(dataclasses.replace(config, normalization="auto"), digits)
    assert (without.mean, without.std) == (digits.mean, digits.std)


HALF = [0.5] * 3


@pytest.mark.parametrize(
    ("model", "mean", "std"),
    [
        ("timm:test_resnet", HALF, HALF),
        ("torchvision:googlenet", HALF, HALF),
        ("torchvision:resnet18", [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ("resnet18", [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    ],
)
def test_library_states_the_normalization_of_its_network(digits, model, mean, std):
    """Without a download, and with weights in a file."""
    config = dataclasses.replace(CONFIG, model=model, weights="a.pt", normalization="library")
    known = normalization_of(config, [InitialWeights("a.pt", {})])
    assert [list(each) for each in known] == [mean, std]
    dataset = prepared(config, digits, of_weights=known)
    assert (list(dataset.mean), list(dataset.std)) == (mean, std)
    again = prepared(config, digits, data_record(dataset, "resident"))
    assert (again.mean, again.std) == (dataset.mean, dataset.std)


def test_library_normalization_of_other_networks_is_refused():
    message = "normalization=library: no trained weights are published for resnet8; .* use data"
    with pytest.raises(ConfigError, match=message):
        check_initial(dataclasses.replace(CONFIG, normalization="library"))
    plain = dataclasses.replace(CONFIG, model="timm:test_resnet", normalization="library")
    check_initial(plain)


def test_other_normalization_of_a_peers_weights_is_reported(tmp_path, digits):
    """All networks get the images of the student."""
    config = dataclasses.replace(CONFIG, method="baseline", branches=None, epochs=1)
    for name, mean in (("a", 0.4), ("b", 0.5)):
        other = dataclasses.replace(digits, mean=(mean,) * 3)
        make(config, tmp_path / name, other).run(until=1)
    line = f"the weights from {tmp_path}/b/student.safetensors are for another normalization"
    for files, is_reported in ((("a", "b"), True), (("a", "a"), False)):
        peers = dataclasses.replace(
            config,
            method="dml",
            model="resnet8,resnet8",
            weights=",".join(str(tmp_path / file) for file in files),
        )
        notes = make(peers, tmp_path / f"run{is_reported}", digits).step.notes
        assert any(note.startswith(line) for note in notes) is is_reported
    assert not normalization_notes(
        dataclasses.replace(peers, normalization="data"), read_initial(peers)
    )


def test_unknown_normalization_of_weights_is_refused(digits):
    config = dataclasses.replace(CONFIG, weights="a.pt", normalization="weights")
    with pytest.raises(ConfigError, match="does not state its normalization"):
        prepared(config, digits)
    with pytest.raises(ConfigError, match="the run starts from random weights"):
        check_config(dataclasses.replace(CONFIG, normalization="weights"))


def test_run_from_another_run_keeps_its_normalization(tmp_path, trained, digits):
    """In training, evaluation, as a teacher and in the exported student."""
    other = dataclasses.replace(digits, mean=(0.4,) * 3, std=(0.3,) * 3)
    config = dataclasses.replace(CONFIG, weights=str(trained), epochs=1)
    mean, std = read_weights(trained).normalization
    trainer = make(config, tmp_path / "run", other)
    assert (list(trainer.dataset.mean), list(trainer.dataset.std)) == (list(mean), list(std))
    trainer.run()
    again = read_weights(tmp_path / "run")
    assert again.normalization == (mean, std)
    loaded = load_run(tmp_path / "run", data="digits")
    assert list(loaded.dataset.mean) == list(mean)


def test_folder_with_a_comma_is_refused_for_several_files(tmp_path, monkeypatch):
    (tmp_path / "a,b").mkdir()
    monkeypatch.chdir(tmp_path / "a,b")
    one = dataclasses.replace(CONFIG, weights="x.pt")
    assert with_absolute_weights(one).weight_files() == [str(tmp_path / "a,b" / "x.pt")]
    two = dataclasses.replace(
        CONFIG, model="resnet8,resnet14", method="dml", branches=None, weights="x.pt,y.pt"
    )
    with pytest.raises(ConfigError, match="no path may contain a comma"):
        with_absolute_weights(two)


def test_resumed_run_cannot_change_its_normalization(tmp_path, digits):
    trainer = make(CONFIG, tmp_path / "run", digits)
    trainer.run(until=1)
    changed = dataclasses.replace(CONFIG, normalization="imagenet")
    run = RunFolder.open(tmp_path / "run")
    state, _ = newest_checkpoint(run, print)
    second = Trainer(changed, run, Reporter(quiet=True), digits, saved_data=state["data"])
    with pytest.raises(ConfigError, match="the run has trained with auto, which cannot change"):
        second.resume(state, allow_config_change=True)
