"""Training with every method: their networks, one step on every kind of network, a run with
its resume, the frozen teacher.
"""

import dataclasses
import re

import numpy as np
import pytest
import torch
import torchvision
from method_runs import NETWORKS, check_resume, few_digits, losses, make
from safetensors.torch import save_file
from torch import nn

from fastokd.data import Batch
from fastokd.errors import CheckpointError, ConfigError
from fastokd.export import check_same_logits, load_student, measure_accuracy, write_student
from fastokd.methods import get_method
from fastokd.models import create_model, create_student
from fastokd.models.summary import count_parameters
from fastokd.train import teacher as teachers
from fastokd.train.checkpoint import load_checkpoint
from fastokd.train.config import TrainConfig
from fastokd.train.loss import check_method
from fastokd.train.progress import Reporter
from fastokd.train.rules import check_config
from fastokd.train.run_folder import RunFolder
from fastokd.train.runs import load_run
from fastokd.train.step import TrainStep
from fastokd.train.teacher import open_teacher
from fastokd.train.trainer import Trainer

# --- networks
# --------------------------------------------------------------------------------------------------

TOTALS = [
    ("resnet32", "okddip", {}, (1_530_872, 1_554_272)),
    ("resnet32", "okddip", {"topology": "peers"}, (1_868_648, 1_892_048)),
    ("resnet110", "okddip", {}, (3_781_496, 3_874_016)),
    ("resnet110", "okddip", {"topology": "peers"}, (4_607_336, 4_699_856)),
    ("wrn20_8", "okddip", {}, (22_519_416, 22_611_936)),
    ("resnet32", "one", {}, (1_529_988, 1_553_388)),
    ("resnet110", "one", {}, (3_765_636, 3_858_156)),
    ("wrn20_8", "one", {}, (22_503_556, 22_596_076)),
    ("resnet32", "cl_ilr", {}, (1_529_848, 1_553_248)),
    ("resnet110", "cl_ilr", {}, (3_765_112, 3_857_632)),
    ("resnet32", "independent", {}, (1_529_848, 1_553_248)),
    ("resnet32", "dml", {}, (4 * 466_906, 4 * 472_756)),
    ("resnet32", "kd", {"num_branches": 1}, (466_906, 472_756)),
]


@pytest.mark.parametrize(("name", "method", "changes", "totals"), TOTALS)
def test_training_parameter_count_matches_reference(name, method, changes, totals):
    """The published code's, four branches, 10 and 100 classes."""
    with torch.device("meta"):
        for num_classes, total in zip((10, 100), totals, strict=True):
            options = {"num_branches": 4, **changes}
            assert count_parameters(create_model(name, method, num_classes, **options)) == total


@pytest.mark.parametrize("method", ["okddip", "independent", "dml", "cl_ilr", "one", "kd"])
def test_kept_branch_is_last_only_for_okddip(method):
    model = create_model("resnet8", method, 5)
    assert model.kept == (model.num_branches - 1 if method == "okddip" else 0)


def test_okddip_peers_of_different_width_are_refused():
    """DML takes any; OKDDip's peers share a projection, its leader is free."""
    assert create_model("resnet8,resnet110", "dml", 5).num_branches == 2
    create_model("resnet8,resnet8,resnet110", "okddip", 5, topology="peers")
    with pytest.raises(
        ConfigError,
        match=(
            r"method 'okddip' with model 'resnet8,resnet110.*64 and 256 channels; give peers of one"
            r" width"
        ),
    ):
        create_model("resnet8,resnet110,resnet8", "okddip", 5, topology="peers")


def images(batch: int = 8, size: int = 32) -> torch.Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))


def test_cl_ilr_divides_trunk_gradient():
    def grads(method):
        torch.manual_seed(0)
        model = create_model("resnet8", method, 5, 3).double()
        result = model(images(4, 16).double())
        loss = get_method("independent").loss_class(3, impl="reference")(
            result.logits, torch.tensor([0, 1, 2, 3])
        )
        loss.backward()
        return result, {name: parameter.grad for name, parameter in model.named_parameters()}

    (one, plain), (other, rescaled) = grads("independent"), grads("cl_ilr")
    assert all(torch.equal(a, b) for a, b in zip(one.logits, other.logits, strict=True))
    for name, gradient in plain.items():
        expected = gradient / 3 if name.startswith("trunk.") else gradient
        torch.testing.assert_close(rescaled[name], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "method",
    ["cl_ilr", "okddip", *(pytest.param(name, marks=pytest.mark.grid) for name in ("one", "kd"))],
)
def test_network_compiles_as_one_graph(method):
    torch._dynamo.reset()
    teacher = create_student("resnet8", 5) if method == "kd" else None
    model = create_model("resnet8", method, 5, get_method(method).branch_range[0], teacher=teacher)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    result = compiled(images(4, 16))
    sum(row.sum() for row in result.logits).backward()
    gradient = model.trunk.conv1.weight.grad.clone()
    model.zero_grad()
    sum(row.sum() for row in model(images(4, 16)).logits).backward()
    torch.testing.assert_close(gradient, model.trunk.conv1.weight.grad)


# --- a step
# --------------------------------------------------------------------------------------------------

METHODS = {
    "baseline": {"branches": 1},
    "independent": {"branches": 2},
    "independent peers": {"branches": 2, "topology": "peers"},
    "kd": {"branches": 1},
    "dml": {"branches": 2},
    "cl_ilr": {"branches": 2},
    "one": {"branches": 2},
    "okddip": {"branches": 3},
    "okddip peers": {"branches": 3, "topology": "peers"},
    "ahbf": {"branches": 2, "aux_blocks": 1},
    "ahbf cbam": {"branches": 2, "aux_blocks": 0, "method_options": {"gate_attention": "cbam"}},
    # FFSD's losses on maps are steep: weighted with up to 1000.
    "ffsd": {"branches": 3, "lr": 1e-5, "method_options": {"decoder_lr": 1e-5}},
    "afid": {"branches": 2},
}


# Every method on the smallest network; on the others the methods with separate modules for maps
# and scores. The other pairs are in the grid.
@pytest.mark.parametrize(
    ("name", "network"),
    [
        pytest.param(name, network, marks=[] if is_chosen else pytest.mark.grid)
        for name in METHODS
        for network in NETWORKS
        for is_chosen in [network == "resnet8" or name in ("ahbf", "ffsd", "okddip peers")]
    ],
)
def test_step_lowers_the_loss(name, network):
    """A short plain step of gradient descent, so that what goes down is what the gradients say."""
    method = name.partition(" ")[0]
    config = TrainConfig(
        data="digits",
        model=network,
        method=method,
        momentum=0.0,
        nesterov=False,
        weight_decay=0.0,
        **{"lr": 1e-3, **METHODS[name]},
    )
    torch.manual_seed(0)
    teacher = create_student(network, 10) if method == "kd" else None
    model = create_model(
        network,
        method,
        10,
        config.branches,
        config.aux_blocks,
        topology=config.topology,
        options=config.model_options(),
        teacher=teacher,
    )
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # another mask would be another loss
    step = TrainStep(config, model, torch.device("cpu"))
    batch = Batch(images(), torch.arange(8), torch.arange(8))
    step.set_schedule(config.lr, 1.0)
    before, after = losses(step, batch)
    assert np.isfinite(before)
    assert after < before


# --- a run
# --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits():
    """A corner of the digits, so that an epoch takes a moment."""
    return dataclasses.replace(few_digits(192), fingerprint="corner")


CONFIG = TrainConfig(data="digits", model="resnet8", epochs=2, batch_size=48, lr=0.05, aux_blocks=0)
RUNS = {
    "baseline": (["branch1"], "branch1"),
    "independent": (
        ["branch1", "branch2", "branch3", "branch4", "ensemble", "branch_mean"],
        "branch1",
    ),
    "kd": (["branch1", "teacher"], "branch1"),
    "dml": (["branch1", "branch2", "ensemble", "branch_mean"], "branch1"),
    "cl_ilr": (
        [
            "branch1",
            "branch2",
            "branch3",
            "branch4",
            "others1",
            "others2",
            "others3",
            "others4",
            "ensemble",
            "branch_mean",
        ],
        "branch1",
    ),
    "one": (["branch1", "branch2", "branch3", "ensemble"], "branch1"),
    "okddip": (
        ["branch1", "branch2", "branch3", "leader", "group1", "group2", "group3", "ensemble"],
        "leader",
    ),
    "ffsd": (["branch1", "branch2", "leader", "fusion", "ensemble"], "leader"),
    "afid": (["branch1", "branch2", "fusion", "ensemble"], "branch1"),
}
DIFFERENT = {"kd": {}, "dml": {"model": "resnet8,resnet14"}, "okddip": {"preset": "code"}}


@pytest.fixture(scope="module")
def teacher_run(tmp_path_factory, digits):
    """A teacher of fastokd: a run of one epoch."""
    folder = tmp_path_factory.mktemp("teachers") / "run"
    make(dataclasses.replace(CONFIG, method="baseline", epochs=1), folder, digits).run()
    return folder


def settings(name, teacher_run, **changes):
    options = {"teacher": str(teacher_run)} if name == "kd" else {}
    return dataclasses.replace(
        CONFIG,
        method=name,
        method_options={**options, **changes.pop("method_options", {})},
        **{**DIFFERENT.get(name, {}), **changes},
    )


@pytest.mark.parametrize("name", RUNS)
def test_run_resume_and_student_of_each_method(name, tmp_path, digits, teacher_run):
    config, (rows, kept) = settings(name, teacher_run), RUNS[name]
    straight = check_resume(config, tmp_path, digits)
    measured = straight.last
    assert list(measured) == rows
    assert straight.student_name == kept
    if "branch_mean" in rows:
        branches = [
            value
            for row, value in measured.items()
            if row.startswith("branch") and row != "branch_mean"
        ]
        assert measured["branch_mean"] == pytest.approx(sum(branches) / len(branches))
    terms = {term.name for term in straight.step.criterion.graph.terms}
    for record in straight.run_folder.read_metrics():
        assert terms <= set(record["train"])

    student, record = load_student(tmp_path / "straight")
    assert record["architecture"]["name"] == straight.model.name
    straight.model.eval()
    trained = straight.model.student().to(
        memory_format=torch.contiguous_format
    )  # the format of a loaded student: bits depend on it
    assert check_same_logits(trained, student, straight.eval_loader) == 100
    assert measure_accuracy(student, straight.eval_loader) == measured[kept]


def test_run_prints_teacher_and_loss_terms(tmp_path, digits, teacher_run, capsys):
    run = RunFolder.create(tmp_path / "run")
    trainer = Trainer(settings("kd", teacher_run, epochs=1), run, Reporter(), digits)
    trainer.start()
    trainer.run()
    said = capsys.readouterr().out
    assert f"teacher {teacher_run}, 78,042 parameters" in said
    assert "1 ce/branch1, 9*kd_weight kl/teacher->branch1" in said


# --- the frozen teacher
# --------------------------------------------------------------------------------------------------


def test_teacher_does_not_change(tmp_path, digits, teacher_run):
    trainer = make(settings("kd", teacher_run, epochs=1), tmp_path / "run", digits)
    # Private, because the teacher is no submodule and in no state dict.
    (network,) = trainer.model.teacher._network
    before = {name: value.clone() for name, value in network.state_dict().items()}
    trainer.model.train()
    assert not any(module.training for module in network.modules())
    assert trainer.model.training
    trainer.run()
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]), name
    own, _ = load_student(teacher_run)
    assert all(torch.equal(value, before[name]) for name, value in own.state_dict().items())
    assert not [
        name for name in load_checkpoint(trainer.run_folder.last)["model"] if "teacher" in name
    ]


def test_teacher_moves_with_the_model():
    network = create_student("resnet8", 5)
    assert network.training
    model = create_model("resnet8", "kd", 5, teacher=network).to(
        torch.float64, memory_format=torch.channels_last
    )
    assert not any(module.training for module in network.modules())
    assert network.fc.weight.dtype == torch.float64
    assert network.layer1[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
    x = images(2, 16).double()
    extras = model(x).extras
    torch.testing.assert_close(extras["teacher"], network(x))
    assert not extras["teacher"].requires_grad
    assert create_model("resnet8", "kd", 5).double()(x).extras == {}


def test_run_without_teacher_is_evaluated_not_resumed(tmp_path, digits, teacher_run):
    here = tmp_path / "teacher"
    here.mkdir()
    (here / "student.safetensors").write_bytes((teacher_run / "student.safetensors").read_bytes())
    config = settings("kd", here)
    trainer = make(config, tmp_path / "run", digits)
    trainer.run(until=1)
    other, record = create_student("resnet8", 10), load_student(teacher_run)[1]
    (here / "student.safetensors").unlink()
    with pytest.raises(CheckpointError, match=f"there is no student at {re.escape(str(here))}"):
        make(config, tmp_path / "run", digits, resume=True)
    found = load_run(tmp_path / "run")
    assert list(found.evaluator.evaluate(found.loader)) == ["branch1"]
    write_student(here / "student.safetensors", other, record)
    with pytest.raises(CheckpointError, match="was distilled from another teacher than"):
        make(config, tmp_path / "run", digits, resume=True)


def opened(spec, dataset, **options):
    config = dataclasses.replace(
        CONFIG, method="kd", method_options={"teacher": str(spec), **options}
    )
    check_config(config)
    teachers.check_teacher(config)
    return open_teacher(config, dataset, torch.device("cpu"))


def test_teacher_from_every_source(tmp_path, digits, teacher_run):
    x = images(4, 8)
    run, exported, checkpoint = (
        opened(teacher_run / part, digits)
        for part in ("", "student.safetensors", "checkpoints/last.pt")
    )
    for other in (exported, checkpoint):
        # The memory format, and with it the order of sums, may differ.
        torch.testing.assert_close(run.network(x), other.network(x))
        assert other.fingerprint == run.fingerprint
    torch.manual_seed(0)
    stock = torchvision.models.resnet18(num_classes=10).eval()
    torch.save({"model": stock.state_dict()}, tmp_path / "stock.pth")
    save_file(stock.state_dict(), tmp_path / "stock.safetensors")
    for file in ("stock.pth", "stock.safetensors"):
        found = opened(f"torchvision:resnet18:{tmp_path / file}", digits)
        assert torch.equal(found.network.eval()(x), stock(x))
    found = opened(
        f"torchvision:resnet18:{tmp_path / file}", digits, teacher_normalization="imagenet"
    )
    pixels = x * torch.tensor(digits.std).view(3, 1, 1) + torch.tensor(digits.mean).view(3, 1, 1)
    wanted = torchvision.transforms.functional.normalize(
        pixels, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    )
    torch.testing.assert_close(found.network.eval()(x), stock(wanted), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
@pytest.mark.parametrize("aux_logits", [False, True])
def test_teacher_has_no_auxiliary_classifiers(tmp_path, digits, name, aux_logits):
    """Weights saved with auxiliary classifiers load too; theirs are dropped."""
    build = getattr(torchvision.models, name)
    saved = build(num_classes=10, aux_logits=aux_logits, init_weights=False)
    torch.save(saved.state_dict(), tmp_path / "weights.pth")
    network = opened(f"torchvision:{name}:{tmp_path / 'weights.pth'}", digits).network
    assert set(network.state_dict()) == {
        key for key in saved.state_dict() if not key.lower().startswith("aux")
    }
    assert network.train()(images(2, 96)).shape == (2, 10)  # one output while training too


def test_teacher_from_timm(tmp_path, digits):
    timm = pytest.importorskip("timm")
    network = timm.create_model("resnet10t", num_classes=10).eval()
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    found = opened(f"timm:resnet10t:{tmp_path / 'weights.pth'}", digits)
    assert torch.equal(found.network.eval()(images(2)), network(images(2)))


def test_images_get_the_teachers_normalization(digits, teacher_run):
    other = dataclasses.replace(digits, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    pixels = torch.rand(4, 3, 8, 8)

    def normalised(dataset):
        return (pixels - torch.tensor(dataset.mean).view(3, 1, 1)) / torch.tensor(dataset.std).view(
            3, 1, 1
        )

    plain, moved = opened(teacher_run, digits), opened(teacher_run, other)
    assert moved.fingerprint == plain.fingerprint
    torch.testing.assert_close(
        moved.network(normalised(other)), plain.network(normalised(digits)), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize(
    ("kind", "suffix"),
    [("logits", "npy"), ("probabilities", "npy"), ("probabilities", "safetensors")],
)
def test_stored_rows_equal_their_network(tmp_path, digits, monkeypatch, kind, suffix, resident):
    """Rows are addressed by the image, whatever the order: each image's own row comes to it."""
    if not resident:
        monkeypatch.setattr(teachers, "RESIDENT_BYTES", 0)
    rows = torch.randn(192, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows += 4 * torch.eye(10, dtype=torch.float64)[digits.train.targets]
    rows = rows if kind == "logits" else (rows / 3).softmax(1)
    path = tmp_path / f"rows.{suffix}"
    np.save(path, rows.numpy()) if suffix == "npy" else save_file({"rows": rows}, path)
    config = settings(
        "kd", path, epochs=1, method_options={"teacher_rows": kind, "teacher": str(path)}
    )
    trainer = make(config, tmp_path / "run", digits)
    trainer.train_loader.set_epoch(0)
    batch = next(iter(trainer.train_loader))
    assert batch.index.tolist() != list(range(48))
    torch.testing.assert_close(trainer.step.stored(batch.index), rows[batch.index].float())
    seen = {}
    forward = trainer.step.criterion.forward_backward
    trainer.step.criterion.forward_backward = lambda *given, **others: (
        seen.update(others),
        forward(*given, **others),
    )[1]
    trainer.step(batch)
    torch.testing.assert_close(seen["teacher"], rows[batch.index].float())
    assert list(trainer.run().last) == ["branch1"]
    assert "kl/teacher->branch1" in trainer.run_folder.read_metrics()[0]["train"]


ROWS = torch.randn(192, 10)


@pytest.mark.parametrize("mixing", ["mixup", "cutmix"])
@pytest.mark.parametrize("suffix", ["npy", "safetensors"])
def test_stored_rows_with_mixed_images_are_refused(tmp_path, suffix, mixing):
    path = tmp_path / f"rows.{suffix}"
    np.save(path, ROWS.numpy()) if suffix == "npy" else save_file({"rows": ROWS}, path)
    config = settings("kd", path)
    teachers.check_teacher(config)
    with pytest.raises(ConfigError, match=f"{mixing}=0.4: stored rows are of unmixed images"):
        teachers.check_teacher(dataclasses.replace(config, **{mixing: 0.4}))


def test_network_teacher_sees_mixed_images(teacher_run):
    teachers.check_teacher(
        settings("kd", teacher_run / "student.safetensors", mixup=0.4, cutmix=1.0)
    )


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (
            ROWS[:100],
            {},
            (
                r"float32 \[100, 10\]; rows for 192 training images and 10 classes are floating"
                r" \[192, 10\]"
            ),
        ),
        (ROWS[:, :7], {}, r"\[192, 7\]"),
        (ROWS.long(), {}, r"int64 \[192, 10\]"),
        (
            ROWS,
            {"teacher_rows": "probabilities"},
            (
                "holds rows that are not probabilities, and teacher_rows=probabilities; pass"
                " teacher_rows=logits"
            ),
        ),
        (
            ROWS.softmax(1),
            {},
            "holds probabilities, and teacher_rows=logits; pass teacher_rows=probabilities",
        ),
        (torch.full((192, 10), float("nan")), {}, "non-finite numbers"),
    ],
)
def test_wrong_stored_rows_are_refused(tmp_path, digits, content, options, message):
    np.save(tmp_path / "rows.npy", content.numpy())
    with pytest.raises(CheckpointError, match=message):
        opened(tmp_path / "rows.npy", digits, **options)


@pytest.mark.parametrize("change", ["shuffled rows", "permuted columns", "noise"])
def test_stored_rows_near_chance_are_refused(tmp_path, digits, change):
    labels = digits.train.targets
    rows = (
        torch.randn(192, 10, generator=torch.Generator().manual_seed(0)) + 4 * torch.eye(10)[labels]
    )
    assert "accuracy 9" in _described(tmp_path, rows, digits)
    wrong = {
        "shuffled rows": rows[torch.randperm(192, generator=torch.Generator().manual_seed(1))],
        "permuted columns": rows.roll(1, 1),
        "noise": torch.randn(192, 10, generator=torch.Generator().manual_seed(2)),
    }[change]
    with pytest.raises(CheckpointError, match=r"on 192 training labels.*expected by chance"):
        _described(tmp_path, wrong, digits)


def test_weak_teacher_above_chance_is_accepted(tmp_path, digits):
    rows = torch.zeros(192, 10)
    rows[torch.arange(192), (digits.train.targets + (torch.arange(192) % 3 > 0)) % 10] = 1.0
    assert "accuracy 33" in _described(tmp_path, rows * 5, digits)


def _described(folder, rows, digits) -> str:
    np.save(folder / "rows.npy", rows.numpy())
    return opened(folder / "rows.npy", digits).description


def test_pickled_rows_are_refused(tmp_path, digits):
    np.save(tmp_path / "rows.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(CheckpointError, match="is damaged or not numeric"):
        opened(tmp_path / "rows.npy", digits)


def test_teacher_of_other_classes_is_refused(digits, teacher_run):
    renamed = dataclasses.replace(digits, classes=(*digits.classes[1:], digits.classes[0]))
    with pytest.raises(
        CheckpointError,
        match=(
            r"has the classes 0, 1, 2, 3 and 6 more, the data has 1, 2, 3, 4 and 6 more"
            r" \(in another order\); use a teacher with the same classes and order"
        ),
    ):
        opened(teacher_run, renamed)
    larger = dataclasses.replace(
        digits,
        train=dataclasses.replace(digits.train, images=digits.train.images.repeat(1, 1, 2, 2)),
    )
    with pytest.raises(
        CheckpointError,
        match=(
            r"was trained on images of 8 x 8, the run's are 16 x 16; use another teacher, or"
            r" --image-size 8"
        ),
    ):
        opened(teacher_run, larger)


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("", ConfigError, r"method 'kd' needs a trained teacher: pass --teacher RUN"),
        ("{tmp}/nothing", CheckpointError, "there is no teacher at .*nothing"),
        (
            "{tmp}/empty",
            CheckpointError,
            "there is no student at .*empty; make one with 'fastokd export RUN'",
        ),
        ("{tmp}/notes.txt", ConfigError, r"notes\.txt is not a run folder, a checkpoint"),
        (
            "torchvision:resnet18:",
            ConfigError,
            "name the network, torchvision:NAME for its published weights or torchvision:NAME:FILE",
        ),
        (
            "torchvision:resnet1o1:{tmp}/weights.pth",
            ConfigError,
            "torchvision has no classifier 'resnet1o1'; did you mean 'resnet101'",
        ),
        (
            "torchvision:resnet18:{tmp}/weights.pth",
            CheckpointError,
            r"weights\.pth has weights for 7 classes, the data has 10; use a teacher with the same",
        ),
        (
            "torchvision:resnet18:{tmp}/notes.txt",
            CheckpointError,
            r"notes\.txt is damaged or not a file of weights",
        ),
        (
            "{tmp}/weights.pth",
            ConfigError,
            r"for weights of a library's network use torchvision:NAME:FILE",
        ),
        ("{tmp}/damaged.safetensors", CheckpointError, "is damaged or not a safetensors file"),
        ("{tmp}/damaged.npy", CheckpointError, "is damaged or not numeric"),
    ],
)
def test_wrong_teachers_are_refused(tmp_path, digits, spec, error, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("hello")
    for name in ("damaged.safetensors", "damaged.npy"):
        (tmp_path / name).write_bytes(b"hello hello hello")
    torch.save(torchvision.models.resnet18(num_classes=7).state_dict(), tmp_path / "weights.pth")
    with pytest.raises(error, match=message):
        opened(spec.format(tmp=tmp_path), digits)


def test_wrong_teacher_options_are_refused(tmp_path, digits, teacher_run):
    with pytest.raises(
        ConfigError, match=r"teacher_rows='probabilities': teacher=.* is a network; use logits"
    ):
        opened(teacher_run, digits, teacher_rows="probabilities")
    with pytest.raises(
        ConfigError,
        match=(
            r"teacher_normalization='imagenet' is for networks of torchvision and timm with weights"
            r" in a file, not for teacher="
        ),
    ):
        opened(teacher_run, digits, teacher_normalization="imagenet")
    with pytest.raises(
        ConfigError,
        match=(
            r"teacher_normalization='image-net'; did you mean 'imagenet'\? \(choices: data,"
            r" imagenet, library\)"
        ),
    ):
        opened(teacher_run, digits, teacher_normalization="image-net")


def test_relative_teacher_path_becomes_absolute(tmp_path, digits, teacher_run, monkeypatch):
    monkeypatch.chdir(teacher_run.parent)
    trainer = make(settings("kd", teacher_run.name, epochs=1), tmp_path / "run", digits)
    assert trainer.run_folder.load_config().teacher == str(teacher_run)


# --- options
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"method": "ahbf", "method_options": {"gate_attention": "cbm"}},
            r"gate_attention='cbm'; did you mean 'cbam'\? \(choices: cbam, none, nonlocal, se\)",
        ),
        ({"method": "okddip", "branches": 2}, "2 branches: method 'okddip' takes 3 to 8"),
        (
            {"method": "dml", "topology": "branches"},
            "topology='branches': method 'dml' takes peers",
        ),
        ({"method": "one", "topology": "peers"}, "topology='peers': method 'one' takes branches"),
        (
            {"method": "one", "model": "resnet8,resnet14"},
            "several networks can only be peers, and method 'one' branches one network",
        ),
        (
            {"method": "one", "method_options": {"temprature": 2}},
            "unknown option 'temprature' of method 'one'; did you mean 'temperature'",
        ),
        ({"method": "okddip", "method_options": {"mix": "probs"}}, "method 'okddip': mix='probs'"),
        (
            {"method": "cl_ilr", "method_options": {"lambda_ce": -1}},
            "method 'cl_ilr': lambda_ce=-1; it must be a number of at least 0",
        ),
        (
            {"method": "independent", "preset": "code"},
            r"unknown preset 'code' of method 'independent' \(choices: paper\)",
        ),
    ],
)
def test_config_is_checked_before_reading(changes, message):
    with pytest.raises(ConfigError, match=message):
        check_config(dataclasses.replace(TrainConfig(data="digits", model="resnet8"), **changes))


def test_graph_needs_no_teacher():
    check_method(TrainConfig(method="kd"))


def test_module_options_are_checked_by_models():
    with pytest.raises(
        ConfigError,
        match="unknown option 'gate_atention' of method 'ahbf'; did you mean 'gate_attention'",
    ):
        create_model("resnet8", "ahbf", 5, options={"gate_atention": "se"})
    with pytest.raises(ConfigError, match="gate_attention='see'"):
        create_model("resnet8", "ahbf", 5, options={"gate_attention": "see"})


@pytest.mark.parametrize(
    ("method", "preset", "length"),
    [
        ("independent", "paper", 0),
        ("kd", "code", 0),
        ("dml", "paper", 0),
        ("dml", "code", 0),
        ("cl_ilr", "paper", 0),
        ("cl_ilr", "code", 80),
        ("one", "paper", 80),
        ("one", "code", 80),
        ("okddip", "paper", 0),
        ("okddip", "code", 80),
        ("ahbf", "paper", 300),
        ("ahbf", "code", 240),
    ],
)
def test_ramps_of_300_epochs(method, preset, length):
    assert TrainConfig(method=method, preset=preset, epochs=300).ramp_length() == length
