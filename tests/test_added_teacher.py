"""A frozen teacher added to any method: its graph, its options, and runs with it."""

import dataclasses
import shutil
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision
from method_runs import check_resume, few_digits, make
from safetensors.torch import save_file
from torch.nn import functional as F

from fastokd.errors import CheckpointError, ConfigError, GraphError
from fastokd.experiments.analysis.runs import read_runs
from fastokd.export import load_student
from fastokd.graph import Graph, Logits, lower
from fastokd.losses import AHBFLoss, GraphLoss
from fastokd.methods import get_method, list_methods
from fastokd.models import create_student
from fastokd.train.checkpoint import load_checkpoint
from fastokd.train.compute import student_alone, training_flops
from fastokd.train.config import TrainConfig
from fastokd.train.export_run import export_run
from fastokd.train.progress import Reporter
from fastokd.train.rules import check_config
from fastokd.train.run_folder import RunFolder
from fastokd.train.runs import load_run, run_identity
from fastokd.train.teacher import check_teacher, open_teacher
from fastokd.train.trainer import Trainer

BATCH, CLASSES, WEIGHT, TEMPERATURE = 6, 7, 0.7, 2.5
METHODS = [name for name in list_methods() if name != "kd"]


def graph_of(method: str) -> Graph:
    chosen = get_method(method)
    return chosen.loss_class(num_branches=chosen.default_branches).graph


def evaluated(graph, rows, target, impl, **given):
    """The loss, and the gradient of every row of logits of the method."""
    leaves = [row.clone().requires_grad_() for row in rows]
    dtype, draws = rows[0].dtype, torch.Generator().manual_seed(3)
    weights, externals = {}, {}
    for name, width in graph.weight_sources.items():
        weights[name] = torch.rand(BATCH, width, generator=draws, dtype=torch.float64).to(dtype)
    for name in graph.externals:
        if name != graph.teacher:
            values = torch.randn(BATCH, CLASSES, generator=draws, dtype=torch.float64)
            externals[name] = values.softmax(1).to(dtype)
    criterion = GraphLoss(graph, impl=impl)
    loss = criterion(leaves, target, kd_weight=0.4, weights=weights, externals=externals, **given)
    loss.backward()
    return loss.detach(), [leaf.grad for leaf in leaves]


@pytest.mark.parametrize("rows", ["logits", "probabilities"])
@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("method", METHODS)
def test_with_teacher_adds_its_divergence(method, impl, rows):
    graph = graph_of(method)
    branches = graph.logits[:2]
    taught = graph.with_teacher(branches, WEIGHT, TEMPERATURE, rows=rows)
    assert taught.teacher == ("frozen_teacher" if method == "kdcl" else "teacher")
    dtype = torch.float64 if impl == "reference" else torch.float32
    draws = torch.Generator().manual_seed(1)
    logits = torch.randn(len(graph.logits), BATCH, CLASSES, generator=draws, dtype=dtype)
    teacher = torch.randn(BATCH, CLASSES, generator=draws, dtype=dtype)
    target = torch.randint(CLASSES, (BATCH,), generator=draws)

    z = logits.double().clone().requires_grad_()
    p = (teacher.double() / TEMPERATURE).softmax(1)
    divergences = [
        F.kl_div((row / TEMPERATURE).log_softmax(1), p, reduction="batchmean")
        for row in z[: len(branches)]
    ]
    expected = WEIGHT * TEMPERATURE**2 * sum(divergences)
    expected.backward()

    given = teacher if rows == "logits" else p.to(dtype)
    before, grads_before = evaluated(graph, logits, target, impl)
    loss, grads = evaluated(taught, logits, target, impl, teacher=given.requires_grad_())
    close = {"rtol": 1e-9, "atol": 1e-10} if impl == "reference" else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close((loss - before).double(), expected.detach(), **close)
    differences = torch.stack(grads) - torch.stack(grads_before)
    torch.testing.assert_close(differences.double(), z.grad, **close)
    assert given.grad is None


def test_student_with_teacher_equals_pytorch_formula():
    graph = graph_of("baseline").with_teacher("branch1", WEIGHT, TEMPERATURE)
    z = torch.randn(BATCH, CLASSES, dtype=torch.float64, requires_grad=True)
    teacher, target = torch.randn(BATCH, CLASSES).double(), torch.arange(BATCH)
    q, p = (z / TEMPERATURE).log_softmax(1), (teacher / TEMPERATURE).softmax(1)
    divergence = F.kl_div(q, p, reduction="batchmean")
    expected = F.cross_entropy(z, target) + WEIGHT * TEMPERATURE**2 * divergence
    (gradient,) = torch.autograd.grad(expected, z)
    loss, (own,) = evaluated(graph, [z.detach()], target, "reference", teacher=teacher)
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(own, gradient)


def test_with_teacher_keeps_the_graph_and_is_checked():
    graph = graph_of("ahbf")
    taught = graph.with_teacher(["branch1", "ta2"], 0.5, 2.0)
    assert graph == graph_of("ahbf")
    assert taught.nodes == (*graph.nodes, Logits("teacher"))
    assert [term.name for term in taught.terms[-2:]] == ["kl/teacher->branch1", "kl/teacher->ta2"]
    assert not any(term.scheduled for term in taught.terms[-2:])
    assert lower(taught) != lower(graph)
    for students, options, message in (
        ("branch9", {}, "unknown node 'branch9'"),
        ("branch1", {"weight": -1.0}, "weight -1"),
        ("branch1", {"temperature": 0.0}, "temperature=0"),
        ("branch1", {"rows": "file"}, "rows='file'; use 'logits' or 'probabilities'"),
        ([], {}, "'teacher' reaches no term"),
    ):
        with pytest.raises(GraphError, match=message):
            graph.with_teacher(students, **options)
    for twice in (taught, graph_of("kd")):
        with pytest.raises(GraphError, match="has a frozen teacher already, 'teacher'"):
            twice.with_teacher("branch1")


def test_method_loss_with_teacher_takes_its_rows():
    plain, criterion = AHBFLoss(3), AHBFLoss(3).add_teacher("branch1", WEIGHT, TEMPERATURE)
    z, target = torch.randn(3, BATCH, CLASSES), torch.arange(BATCH)
    teacher, scores = torch.randn(BATCH, CLASSES).double(), torch.rand(2, BATCH, 2)
    loss, terms = criterion(z, target, scores=scores, teacher=teacher, return_terms=True)
    term = WEIGHT * terms["kl/teacher->branch1"]
    torch.testing.assert_close(loss, plain(z, target, scores=scores) + term)
    tas = list(plain.mixtures(z, scores=scores).values())
    mixed = criterion(z, target, ta_logits=tas, teacher=teacher)
    torch.testing.assert_close(mixed, loss)
    names = ["branch1", "branch2", "branch3", "ta2", "ta3", "ensemble"]
    assert list(criterion.named_logits(z, scores=scores)) == names
    with_row = criterion.named_logits(z, scores=scores, teacher=teacher)
    assert set(with_row) == {*names, "teacher"}
    weights = criterion.mixing_weights(z, target, scores=scores, teacher=teacher)
    assert set(weights) == {"ta2", "ta3"}
    with pytest.raises(ValueError, match="teacher is missing: pass the teacher's logits"):
        criterion(z, target, scores=scores)


# --- runs
# --------------------------------------------------------------------------------------------------

CONFIG = TrainConfig(
    data="digits", model="resnet8", branches=2, epochs=2, batch_size=48, lr=0.05, aux_blocks=0
)


@pytest.fixture(scope="module")
def digits():
    return dataclasses.replace(few_digits(192), fingerprint="corner")


@pytest.fixture(scope="module")
def teacher_run(tmp_path_factory, digits):
    """A run of one epoch, the teacher of other runs."""
    folder = tmp_path_factory.mktemp("teachers") / "run"
    config = dataclasses.replace(CONFIG, method="baseline", branches=1, epochs=1)
    make(config, folder, digits).run()
    return folder


def test_run_with_teacher_resumes_and_exports_plain_student(tmp_path, digits, teacher_run):
    config = dataclasses.replace(CONFIG, teacher=str(teacher_run))
    run = check_resume(config, tmp_path, digits)
    assert list(run.last) == ["branch1", "branch2", "teacher", "ta2", "ensemble"]
    for record in run.run_folder.read_metrics():
        train = record["train"]
        assert train["kl/teacher->branch1"] > 0
        terms = {term.name: term for term in run.step.criterion.graph.terms}
        kd_weight = record["kd_weight"]
        total = sum(
            train[name] * term.weight * (kd_weight if term.scheduled else 1)
            for name, term in terms.items()
        )
        assert train["loss"] == pytest.approx(total, rel=1e-4)
    student, record = load_student(run.run_folder.path)
    assert record["architecture"]["name"] == "resnet8"
    create_student("resnet8", 10).load_state_dict(student.state_dict())
    assert "teacher" not in load_run(run.run_folder.path).evaluator.evaluate(run.eval_loader)


def test_stored_rows_teach_every_peer(tmp_path, digits):
    rows = torch.randn(len(digits.train), 10) + 4 * torch.eye(10)[digits.train.targets]
    np.save(tmp_path / "rows.npy", rows.numpy())
    config = dataclasses.replace(
        CONFIG, method="dml", teacher=str(tmp_path / "rows.npy"), teacher_to="branches", epochs=1
    )
    run = make(config, tmp_path / "run", digits)
    run.run()
    (record,) = run.run_folder.read_metrics()
    assert {"kl/teacher->branch1", "kl/teacher->branch2"} <= set(record["train"])
    with pytest.raises(ConfigError, match="stored rows are of unmixed images"):
        check_teacher(dataclasses.replace(config, mixup=0.2))


def test_teacher_of_kd_is_named_either_way(tmp_path, digits, teacher_run):
    plain = dataclasses.replace(CONFIG, method="kd", branches=1, epochs=1)
    one = dataclasses.replace(plain, teacher=str(teacher_run))
    other = dataclasses.replace(plain, method_options={"teacher": str(teacher_run)})
    losses = []
    for name, config in (("one", one), ("other", other)):
        run = make(config, tmp_path / name, digits)
        run.run()
        losses.append(run.run_folder.read_metrics()[0]["train"]["loss"])
    assert losses[0] == losses[1]


@pytest.mark.parametrize("method", ["kd", "ahbf"])
def test_paths_of_one_teacher_make_one_run(tmp_path, digits, teacher_run, method):
    """As an option or a field, by run folder, student or checkpoint, and after it was moved."""
    moved = Path(shutil.copytree(teacher_run, tmp_path / "moved"))
    paths = [teacher_run, teacher_run / "student.safetensors", moved / "checkpoints/last.pt"]
    plain = dataclasses.replace(CONFIG, method=method, branches=1 if method == "kd" else 2)
    configs = [dataclasses.replace(plain, teacher=str(path), seed=0) for path in paths]
    if method == "kd":
        configs.append(dataclasses.replace(plain, method_options={"teacher": str(moved)}))
    records, folders = [], []
    for seed, config in enumerate(configs):
        run = make(dataclasses.replace(config, seed=seed), tmp_path / f"run{seed}", digits)
        run.run(until=1)
        folders.append(run.run_folder.path)
        assert run.run_folder.load_config().teacher
        assert "teacher" not in run.run_folder.load_config().method_options
        record = load_student(run.run_folder.path)[1]
        records.append(record["provenance"]["run"])
        state = load_checkpoint(run.run_folder.last)
        identity = run_identity(dataclasses.replace(config, seed=0), "x", state["teacher"])
        assert identity == run_identity(configs[0], "x", state["teacher"])
        assert identity != run_identity(configs[0], "x", "another")
        exported = load_student(export_run(run.run_folder.path, out=tmp_path / f"e{seed}").path)
        assert exported[1]["provenance"]["run"] == records[-1]
    assert len(set(records)) == len(configs)  # the seeds differ
    (group,) = read_runs(folders)
    assert [run.config.seed for run in group.runs] == list(range(len(configs)))

    def resume(teacher):
        folder = RunFolder.open(folders[0])
        config = dataclasses.replace(folder.load_config(), teacher=str(teacher))
        state = load_checkpoint(folder.last)
        trainer = Trainer(config, folder, Reporter(quiet=True), digits, saved_data=state["data"])
        trainer.resume(state)
        return trainer

    for path in (paths[1], moved):
        assert (resume(path).epoch, resume(path).config.teacher) == (1, str(path))
    config = dataclasses.replace(CONFIG, method="baseline", branches=1, seed=9, epochs=1)
    make(config, tmp_path / "another", digits).run()
    with pytest.raises(ConfigError, match=r"the configuration differs .* teacher: "):
        resume(tmp_path / "another")


def test_teacher_joins_with_late_teaching(tmp_path, digits, teacher_run):
    config = dataclasses.replace(CONFIG, teacher=str(teacher_run), teach_from=1)
    run = make(config, tmp_path / "run", digits)
    run.run()
    before, after = (record["train"] for record in run.run_folder.read_metrics())
    assert "kl/teacher->branch1" not in before
    assert after["kl/teacher->branch1"] > 0


def test_teacher_counts_in_training_compute_and_identity(teacher_run):
    config = dataclasses.replace(CONFIG, teacher=str(teacher_run))
    plain = training_flops(CONFIG, 10, (8, 8))
    alone = dataclasses.replace(CONFIG, method="baseline", branches=1)
    forward = training_flops(alone, 10, (8, 8))
    assert training_flops(config, 10, (8, 8)) == pytest.approx(plain + forward / 3)
    assert student_alone(config) == student_alone(CONFIG)
    assert run_identity(config, None) != run_identity(CONFIG, None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": "torchvision:"}, "teacher=torchvision:: name the network, torchvision:NAME"),
        ({"teacher": "torchvision:resnet1o1"}, "no classifier 'resnet1o1'; did you mean"),
        ({"teacher": "nowhere"}, r"no teacher at nowhere \(teacher=nowhere\); pass its path$"),
        ({"teacher": "resnet18"}, "for the published weights pass torchvision:resnet18$"),
        ({"teacher": "a", "teacher_to": "leader"}, "unknown teacher_to 'leader'"),
        ({"teacher_weight": 2.0}, r"teacher_weight=2\.0: there is no teacher; pass --teacher"),
        (
            {"method": "kd", "branches": 1, "teacher": "a", "method_options": {"teacher": "b"}},
            "teacher=a: --method-options names another teacher; pass one of them",
        ),
        (
            {"method": "kd", "branches": 1, "teacher": "a", "teacher_weight": 2.0},
            r"teacher_weight=2\.0: method 'kd' sets its teacher's terms by --method-options",
        ),
    ],
)
def test_wrong_teacher_is_refused_before_reading(changes, message):
    def check(config):
        check_config(config)
        check_teacher(config)

    with pytest.raises((ConfigError, CheckpointError), match=message):
        check(dataclasses.replace(CONFIG, **changes))


# --- published weights
# --------------------------------------------------------------------------------------------------


def thousand(digits, **changes):
    classes = tuple(f"class {index}" for index in range(1000))
    return dataclasses.replace(digits, classes=classes, **changes)


def test_published_torchvision_weights_are_read_from_cache(tmp_path, digits, monkeypatch):
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    config = dataclasses.replace(CONFIG, teacher="torchvision:squeezenet1_1")
    data = thousand(digits, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))

    def fail(*arguments, **options):
        raise URLError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    check_teacher(config)
    message = r"cannot be downloaded from https://download\.pytorch\.org/models/squeezenet1_1-\w+"
    with pytest.raises(CheckpointError, match=message):
        open_teacher(config, data, torch.device("cpu"))
    with pytest.raises(CheckpointError, match=r"for 1000 classes, the data has 10 \(0, 1, 2, 3"):
        open_teacher(config, digits, torch.device("cpu"))

    network = torchvision.models.squeezenet1_1().eval()
    url = torchvision.models.SqueezeNet1_1_Weights.DEFAULT.url
    (tmp_path / "checkpoints").mkdir(exist_ok=True)
    torch.save(network.state_dict(), tmp_path / "checkpoints" / url.rpartition("/")[2])
    found = open_teacher(config, data, torch.device("cpu"))
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(found.network.eval()(x), network(x))


def test_published_timm_weights_state_their_normalization(tmp_path, digits, monkeypatch):
    timm = pytest.importorskip("timm")
    config = dataclasses.replace(CONFIG, teacher="timm:test_resnet")
    check_teacher(config)
    network = timm.create_model("test_resnet").eval()
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    hub = timm.models._hub
    monkeypatch.setattr(hub, "hf_hub_download", lambda **_: str(tmp_path / "model.safetensors"))
    data = thousand(digits, mean=(0.1, 0.2, 0.3), std=(0.3, 0.2, 0.1))
    found = open_teacher(config, data, torch.device("cpu"))
    pixels = torch.rand(2, 3, 64, 64)

    def normalized(mean, std):
        return torchvision.transforms.functional.normalize(pixels, mean, std)

    expected = network(normalized((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)))
    ours = found.network.eval()(normalized(data.mean, data.std))
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)

    # The same weights in a file, also with Lightning's prefix, by the choice "library"
    prefixed = {f"model.{name}": each for name, each in network.state_dict().items()}
    torch.save({"state_dict": prefixed}, tmp_path / "last.ckpt")
    for file, changes in (
        ("last.ckpt", {"teacher_normalization": "library"}),
        (
            "model.safetensors",
            {"method": "kd", "branches": 1, "method_options": {"teacher_normalization": "library"}},
        ),
    ):
        spec = f"timm:test_resnet:{tmp_path / file}"
        of_file = dataclasses.replace(CONFIG, teacher=spec, **changes)
        check_config(of_file)
        check_teacher(of_file)
        same = open_teacher(of_file, data, torch.device("cpu"))
        assert torch.equal(same.network.eval()(normalized(data.mean, data.std)), ours)
        assert same.normalization == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))

    def fail(**options):
        raise OSError("no network")

    monkeypatch.setattr(hub, "hf_hub_download", fail)
    by_field = r"timm:test_resnet:FILE with --teacher-normalization library"
    by_option = r"timm:test_resnet:FILE with --method-options teacher_normalization=library"
    of_kd = dataclasses.replace(config, method="kd", branches=1)
    for each, advice in ((config, by_field), (of_kd, by_option)):
        message = rf"https://huggingface\.co/timm/test_resnet\..*{advice}"
        with pytest.raises(CheckpointError, match=message):
            open_teacher(each, data, torch.device("cpu"))


def test_library_teacher_of_other_classes_is_refused(tmp_path, digits):
    torch.save(create_student("timm:test_resnet", 7).state_dict(), path := tmp_path / "seven.pt")
    config = dataclasses.replace(CONFIG, teacher=f"timm:test_resnet:{path}")
    message = r"seven\.pt has weights for 7 classes, the data has 10; use a teacher with the same"
    with pytest.raises(CheckpointError, match=message):
        make(config, tmp_path / "run", digits)
