"""The command line as a user meets it: what it prints, its exit codes, one line for every mistake,
never a traceback.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from fastokd.cli import main
from fastokd.experiments.recipes import get_recipe
from fastokd.methods import get_method, list_methods
from fastokd.train.checkpoint import load_checkpoint
from fastokd.train.run_folder import RunFolder

ROOT = Path(__file__).resolve().parent.parent
TRAIN = [
    "train",
    "--data",
    "digits",
    "--model",
    "resnet8",
    "--branches",
    "2",
    "--aux-blocks",
    "0",
    "--batch-size",
    "128",
    "--lr",
    "0.05",
]


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run a command in an empty folder; returns (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of one epoch."""
    folder = tmp_path_factory.mktemp("cli") / "run"
    assert main([*TRAIN, "--epochs", "1", "--out", str(folder)]) == 0
    return folder


def mistake(result, code, pattern):
    """The result is one line on stderr that matches, with that exit code."""
    got, _, err = result
    assert got == code, err
    lines = err.strip().splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith("fastokd: ")
    assert re.search(pattern, lines[0]), lines[0]


def test_train_eval_export_eval_resume(run, tmp_path):
    code, out, _ = run(*TRAIN, "--epochs", "1")
    assert code == 0
    assert (
        "loss (T^2 and weights multiplied out): 1 ce/branch1, 1 ce/branch2, 1 ce/ta2, 36*kd_weight"
        " kl/ta2->branch1, 18*kd_weight kl/branch2->branch1" in out
    )
    assert "branch1 (student)" in out
    assert "last epoch (1)" in out
    assert "best epoch (1)" in out
    assert re.search(r"\d+ img/s, [\d.]+ s of training", out)
    folder = tmp_path / "runs" / "resnet8-ahbf-seed0"
    last = json.loads((folder / "summary.json").read_text())["last"]["branch1"]
    said = f"{100 * last:.2f}"

    code, out, _ = run("eval", folder)
    assert code == 0
    assert re.search(rf"branch1 \(student\)\s+{said}", out)
    assert "ta2" in out

    code, out, _ = run("export", folder, "--to", "safetensors")
    assert code == 0
    assert f"the same logits bit for bit on 355 images, accuracy {said} %" in out
    assert (folder / "export" / "student.json").is_file()

    code, out, _ = run("eval", folder / "export", "--data", "digits")
    assert code == 0
    assert f"accuracy {said} % (stored with the export: {said} % on digits, 355 test images)" in out

    code, out, _ = run("train", "--resume", folder, "--epochs", "2", "--quiet")
    assert code == 0
    assert "last epoch (2)" in out
    assert load_checkpoint(folder / "checkpoints" / "last.pt")["epoch"] == 2


def test_second_run_of_same_name_gets_separate_folder(run, tmp_path):
    for _ in range(2):
        assert (
            run(*TRAIN, "--method", "baseline", "--branches", "1", "--epochs", "1", "--quiet")[0]
            == 0
        )
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == [
        "resnet8-baseline-seed0",
        "resnet8-baseline-seed0-2",
    ]


def test_relative_image_folder_is_found_from_other_folder(run, tmp_path, monkeypatch):
    tree = tmp_path / "images"
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 8), ("val", 3)):
        for name in ("cat", "dog"):
            folder = tree / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = torch.randint(
                    0, 256, (16, 16, 3), generator=generator, dtype=torch.uint8
                ).numpy()
                Image.fromarray(pixels).save(folder / f"{index}.png")
    code, out, _ = run(
        "train",
        "--data",
        "images",
        "--model",
        "resnet8",
        "--method",
        "baseline",
        "--branches",
        "1",
        "--epochs",
        "1",
        "--batch-size",
        "4",
        "--out",
        "r",
    )
    assert code == 0
    assert "data images: 2 classes, 16 training and 6 val images" in out
    monkeypatch.chdir(tmp_path.parent)
    assert run("eval", tmp_path / "r")[0] == 0
    mistake(
        run("eval", tmp_path / "r", "--data", "digits"),
        4,
        r"was trained on the classes cat, dog, the data has 0, 1, 2, 3",
    )


def test_recipes_are_listed_and_printed(run):
    code, out, _ = run("recipes")
    assert code == 0
    assert "cifar10-resnet32-ahbf" in out
    code, out, _ = run("recipes", "cifar100-resnet32-ahbf")
    assert code == 0
    assert "# AHBF Table 2" in out
    assert "weight_decay: 0.0005" in out


def test_config_file_and_options_on_top(run, tmp_path, trained):
    code, _, _ = run(
        "train",
        "--config",
        trained / "config.yaml",
        "--method-options",
        "temperature=4",
        "detach_teacher=true",
        "--epochs",
        "1",
        "--out",
        "again",
        "--quiet",
    )
    assert code == 0
    text = (tmp_path / "again" / "config.yaml").read_text()
    assert "temperature: 4" in text
    assert "detach_teacher: true" in text
    assert "model: resnet8" in text


def test_show_prints_terms_and_formats(run):
    code, out, _ = run("show", "ahbf", "--branches", "4")
    assert code == 0
    assert "36 * kd_weight  KL(ta4 || ta3)  teaches ta3; T=3" in out
    code, out, _ = run("show", "ahbf", "--branches", "3", "--preset", "code", "--format", "mermaid")
    assert code == 0
    assert out.startswith("flowchart LR")
    assert "eps=1e-07" in out


def test_show_draws_the_frozen_teacher(run):
    options = ("--teacher", "--teacher-to", "branches", "--teacher-weight", "0.5")
    code, out, _ = run("show", "ahbf", "--branches", "3", *options, "--teacher-temperature", "2")
    assert code == 0
    for branch in ("branch1", "branch2", "branch3"):
        assert f"2  KL(teacher || {branch})  teaches {branch}; T=2" in out
    for plain in (("show", "kd"), ("show", "kd", "--method-options", "teacher=runs/a")):
        code, out, _ = run(*plain)
        assert code == 0
        assert "KL(teacher || branch1)" in out


def test_show_draws_the_divergence_of_a_method(run):
    code, out, _ = run("show", "dml", "--method-options", "divergence=dkd")
    assert code == 0
    assert "DKD(branch2, branch1)  teaches branch1" in out
    assert " KL(" not in out


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("ahbf", r"teacher_weight=5.0: there is no teacher; pass --teacher"),
        ("kd", r"teacher_weight=5.0: method 'kd' sets its teacher's terms by --method-options"),
    ],
)
def test_show_refuses_unused_teacher_options(run, method, message):
    mistake(run("show", method, "--teacher-weight", "5"), 2, message)


def test_doctor_reports_environment(run):
    code, out, _ = run("doctor")
    assert code == 0
    assert "native library" in out
    assert "executor reference" in out
    code, out, _ = run("doctor", "--json")
    found = {item["name"]: item for item in json.loads(out)}
    assert found["torch"]["state"] == "ok"
    assert found["executor reference"]["state"] == "ok"


@pytest.mark.parametrize(
    "command", ["demo", "train", "eval", "analyze", "export", "show", "doctor", "recipes"]
)
def test_help_prints_usage_of_command(run, command):
    code, out, _ = run(command, "--help")
    assert code == 0
    assert f"usage: fastokd {command}" in out


def test_no_command_prints_the_help(run):
    code, out, _ = run()
    assert code == 0
    assert "demo" in out


def test_python_module_is_same_command():
    done = subprocess.run(
        [sys.executable, "-m", "fastokd", "--version"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    assert re.fullmatch(r"fastokd \d+\.\d+\.\d+\n", done.stdout)


class TestMistakes:
    def test_unknown_names_are_refused(self, run):
        mistake(run("trian"), 2, r"unknown command 'trian'; did you mean 'train'\?")
        mistake(
            run("train", "--data", "digits", "--model", "resnet21"),
            2,
            r"unknown model 'resnet21'; did you mean 'resnet\d+'\?",
        )
        mistake(
            run("train", "--data", "digits", "--method", "ahfb"),
            2,
            r"unknown method 'ahfb'; did you mean 'ahbf'\?",
        )
        mistake(
            run("train", "--recipe", "cifar10-resnet32-abhf"),
            2,
            r"unknown recipe .* did you mean 'cifar10-resnet32-ahbf'\?",
        )
        mistake(
            run("train", "--data", "digits", "--preset", "papr"),
            2,
            r"unknown preset 'papr' .* did you mean 'paper'\?",
        )
        mistake(
            run("train", "--data", "digits", "--method-options", "temp=3"),
            2,
            r"unknown option 'temp'",
        )
        mistake(run("train", "--data", "digts"), 3, r"digts.* did you mean 'digits'\?")
        mistake(run("show", "abhf"), 2, r"unknown method 'abhf'; did you mean 'ahbf'\?")
        mistake(run("recipes", "cifar1000"), 2, r"unknown recipe 'cifar1000'")

    def test_unknown_option_suggests(self, run):
        code, out, err = run("train", "--modle", "resnet20")
        assert code == 2
        mistake((code, out, err), 2, r"unknown option '--modle'; did you mean '--model'\?")
        mistake(run("train", "--zzz"), 2, r"unknown option '--zzz'")
        mistake(run("show", "ahbf", "more"), 2, r"unknown argument 'more'")
        mistake(run("--zzz"), 2, r"unknown option '--zzz'")
        mistake(run("data", "--zzz"), 2, r"unknown option '--zzz'")

    def test_values_of_wrong_type_are_refused(self, run):
        mistake(run("train", "--branches", "x"), 2, r"--branches: 'x' is not a whole number")
        mistake(run("train", "--lr", "fast"), 2, r"--lr: 'fast' is not a number")
        mistake(run("train", "--flip", "maybe"), 2, r"--flip: 'maybe' is not True or False")
        mistake(
            run("eval", "x", "--which", "lst"),
            2,
            r"--which: invalid choice 'lst' \(choices: last, best\)",
        )
        mistake(run("train", "--epochs"), 2, "--epochs: the value is missing")
        mistake(run("eval"), 2, "missing argument: PATH")
        mistake(
            run("train", "--data", "digits", "--method-options", "temperature=[1"),
            2,
            r"temperature='\[1'; it must be a number",
        )
        mistake(
            run(
                "train",
                "--data",
                "digits",
                "--model",
                "resnet8",
                "--branches",
                "2",
                "--pad",
                "100000",
            ),
            2,
            r"pad=100000: it must not exceed the images, which are 8 x 8",
        )

    def test_too_long_names_are_refused(self, run):
        for arguments in (["--out", "x" * 300], ["--resume", "x" * 300], ["--data", "x" * 300]):
            got, _, err = run(
                "train",
                "--model",
                "resnet8",
                *(["--data", "digits"] if arguments[0] != "--data" else []),
                *arguments,
            )
            assert got in (2, 3, 5)
            assert "Traceback" not in err
            assert len(err.strip().splitlines()) == 1

    def test_values_out_of_range_are_refused(self, run):
        mistake(
            run("train", "--data", "digits", "--branches", "1"),
            2,
            r"1 branches: method 'ahbf' takes 2 to 8",
        )
        mistake(
            run("train", "--data", "digits", "--method-options", "temperature=0"),
            2,
            r"temperature=0",
        )
        mistake(
            run("train", "--data", "digits", "--method-options", "temperature"),
            2,
            r"'temperature' is not of the form NAME=VALUE",
        )
        mistake(run("train", "--data", "digits", "--epochs", "0"), 2, r"epochs=0")
        mistake(
            run("train", "--data", "digits", "--device", "cuda:99"),
            2,
            r"device 'cuda:99' does not exist",
        )
        mistake(run("train", "--data", "digits", "--device", "tpu"), 2, r"device 'tpu'")
        mistake(run("train"), 2, r"no dataset: pass --data")
        mistake(run("demo", "--seeds", "1"), 2, r"seeds=1: use at least 3")
        mistake(
            run("train", "--recipe", "cifar10-resnet32-ahbf", "--config", "x.yaml"),
            2,
            r"--recipe or --config, not both",
        )
        mistake(
            run("train", "--config", "missing.yaml"), 2, r"cannot read missing.yaml: No such file"
        )

    def test_batch_larger_than_data_is_refused(self, run, tmp_path):
        mistake(
            run("train", "--data", "digits", "--model", "resnet8", "--batch-size", "5000"),
            3,
            r"1442 images, fewer than one batch of 5000",
        )
        assert not list((tmp_path / "runs").iterdir())

    @pytest.mark.parametrize("break_it", ["missing", "empty", "one-sided", "truncated", "zero"])
    def test_bad_image_folders_are_refused(self, run, tmp_path, break_it):
        tree = tmp_path / "images"
        for split in ("train", "val"):
            for name in ("cat", "dog"):
                (tree / split / name).mkdir(parents=True)
                for index in range(2):
                    Image.new("RGB", (16, 16), (index, 0, 0)).save(
                        tree / split / name / f"{index}.jpg"
                    )
        broken = tree / "train" / "cat" / "1.jpg"
        if break_it == "missing":
            tree = tmp_path / "nowhere"
        elif break_it == "empty":
            tree = tmp_path / "void"
            tree.mkdir()
        elif break_it == "one-sided":
            (tree / "train" / "horse").mkdir()
            Image.new("RGB", (16, 16)).save(tree / "train" / "horse" / "0.jpg")
        elif break_it == "truncated":
            broken.write_bytes(broken.read_bytes()[:200])
        else:
            broken.write_bytes(b"")
        pattern = {
            "missing": r"nowhere: no readable folder",
            "empty": r"void.*train/",
            "one-sided": r"horse",
            "truncated": r"train/cat/1\.jpg",
            "zero": r"train/cat/1\.jpg",
        }[break_it]
        mistake(run("train", "--data", tree, "--model", "resnet8", "--batch-size", "2"), 3, pattern)
        assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").iterdir())

    def test_folder_without_run_is_refused(self, run, tmp_path):
        mistake(run("eval", tmp_path / "nothing"), 4, r"nothing does not exist")
        mistake(run("export", tmp_path), 4, r"is not a run folder")
        mistake(
            run("train", "--resume", tmp_path), 4, r"is not a run folder \(it has no config.yaml\)"
        )
        mistake(run("eval", tmp_path), 4, r"there is no student at")

    def test_existing_run_folder_is_refused(self, run, trained):
        mistake(
            run(*TRAIN, "--epochs", "1", "--out", trained),
            2,
            r"already holds a run: continue it with 'fastokd train --resume",
        )

    def test_nonempty_out_folder_is_refused(self, run, tmp_path):
        for name in ("config.yaml", "thesis.tex"):
            folder = tmp_path / name.split(".")[0]
            folder.mkdir()
            (folder / name).write_text("mine")
            mistake(
                run(*TRAIN, "--out", folder), 2, rf"is not empty \({name}\); choose another --out"
            )
            assert (folder / name).read_text() == "mine"

    def test_train_into_run_without_checkpoint_restarts(self, run, trained, tmp_path):
        import shutil

        shutil.copytree(trained, tmp_path / "dead")
        (tmp_path / "dead" / "checkpoints" / "last.pt").unlink()
        assert run(*TRAIN, "--epochs", "1", "--quiet", "--out", tmp_path / "dead")[0] == 0
        assert len((tmp_path / "dead" / "metrics.jsonl").read_text().splitlines()) == 1

    def test_resume_with_changed_configuration_is_refused(self, run, trained):
        mistake(
            run("train", "--resume", trained, "--lr", "1", "--model", "resnet20"),
            2,
            r"the configuration differs from the checkpoint's \(old, new: model: 'resnet8',"
            r" 'resnet20'; lr: 0.05, 1.0\): undo the change, pass --allow-config-change",
        )
        mistake(run("train", "--resume", trained), 2, r"already finished 1 of 1 epochs")

    def test_export_with_other_architecture_is_refused(self, run, trained, tmp_path):
        import shutil

        shutil.copytree(trained, tmp_path / "run")
        config = tmp_path / "run" / "config.yaml"
        config.write_text(config.read_text().replace("model: resnet8", "model: resnet14"))
        mistake(run("export", tmp_path / "run"), 4, r"last\.pt is of another architecture")

    def test_exported_student_with_other_data_is_refused(self, run, trained, tmp_path):
        mistake(
            run("eval", trained / "student.safetensors"),
            2,
            r"does not contain the path of its data, digits; pass --data FOLDER, with the 10"
            r" classes",
        )
        for split in ("train", "val"):
            for name in ("cat", "dog"):
                (tmp_path / "t" / split / name).mkdir(parents=True)
                Image.new("RGB", (8, 8)).save(tmp_path / "t" / split / name / "0.png")
        mistake(
            run("eval", trained / "student.safetensors", "--data", tmp_path / "t"),
            4,
            r"knows 10 classes .* the data has 2 \(cat, dog",
        )

    def test_unwritable_out_is_reported(self, run, tmp_path):
        (tmp_path / "file").write_text("")
        mistake(
            run(*TRAIN, "--out", tmp_path / "file" / "run"),
            5,
            r"cannot write .*/file/run: Not a directory",
        )
        # /proc refuses even root.
        mistake(run(*TRAIN, "--out", "/proc/fastokd"), 5, r"cannot write /proc/fastokd: ")

    def test_demo_does_not_delete_foreign_files(self, run, tmp_path):
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "thesis.tex").write_text("")
        mistake(
            run("demo", "--out", tmp_path / "mine"),
            2,
            r"mine holds something else than an earlier demo \(thesis.tex\)",
        )
        (tmp_path / "mine" / "demo.json").write_text('{"name": "mine"}')
        mistake(run("demo", "--out", tmp_path / "mine"), 2, r"mine holds something else")
        mistake(
            run("demo", "--out", tmp_path / "mine" / "thesis.tex"),
            5,
            r"cannot write .*thesis.tex: Not a directory",
        )
        assert (tmp_path / "mine" / "thesis.tex").exists()


def noise_tree(root, brightness, count=12, size=16):
    """Two classes of noise images in train/ and val/, the training images of a given brightness."""
    generator = torch.Generator().manual_seed(0)
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = torch.randint(0, 256, (size, size, 3), generator=generator)
                if split == "train":
                    pixels = pixels * brightness
                Image.fromarray(pixels.to(torch.uint8).numpy()).save(
                    root / split / name / f"{index}.png"
                )
    return root


def test_other_data_uses_preprocessing_of_run(run, tmp_path):
    # The same validation images next to darker training images: nothing about the student may
    # change.
    here, there = noise_tree(tmp_path / "a", 1.0), noise_tree(tmp_path / "b", 0.2)
    folder = tmp_path / "run"
    assert (
        run(
            "train",
            "--data",
            here,
            "--model",
            "resnet8",
            "--branches",
            "2",
            "--aux-blocks",
            "0",
            "--batch-size",
            "8",
            "--epochs",
            "1",
            "--out",
            folder,
        )[0]
        == 0
    )
    record = json.loads((folder / "student.json").read_text())
    assert run("export", folder, "--data", there, "--out", tmp_path / "export")[0] == 0
    exported = json.loads((tmp_path / "export" / "student.json").read_text())
    assert exported["preprocessing"] == record["preprocessing"]
    assert exported["accuracy"]["top1"] == record["accuracy"]["top1"]
    said = [run("eval", folder, "--data", where)[1] for where in (here, there)]
    assert re.search(r"branch1.*", said[0])[0] == re.search(r"branch1.*", said[1])[0]
    # Larger images are brought to the size that the student was trained on.
    large = noise_tree(tmp_path / "c", 1.0, size=24)
    assert run("export", folder, "--data", large, "--out", tmp_path / "export2")[0] == 0
    assert (
        json.loads((tmp_path / "export2" / "student.json").read_text())["preprocessing"]
        == record["preprocessing"]
    )
    # Too few training images for a batch do not stop an evaluation; other splits can be named.
    assert "24 train images" in run("eval", folder, "--split", "train")[1]
    mistake(run("eval", folder, "--split", "tset"), 2, r"no split 'tset'")


def test_resume_accepts_moved_data_and_refuses_changed(run, tmp_path):
    tree = noise_tree(tmp_path / "a", 1.0)
    folder = tmp_path / "run"
    assert (
        run(
            "train",
            "--data",
            tree,
            "--model",
            "resnet8",
            "--branches",
            "2",
            "--aux-blocks",
            "0",
            "--batch-size",
            "8",
            "--epochs",
            "1",
            "--out",
            folder,
        )[0]
        == 0
    )
    tree.rename(tmp_path / "moved")
    mistake(run("train", "--resume", folder, "--epochs", "2"), 3, r"/a: ")
    code, out, _ = run("train", "--resume", folder, "--epochs", "2", "--data", tmp_path / "moved")
    assert code == 0
    assert (
        "the run now has 2 epochs instead of 1: learning-rate decay and ramp-up follow the new"
        " number" in out
    )
    next((tmp_path / "moved" / "train" / "cat").iterdir()).unlink()
    mistake(
        run("train", "--resume", folder, "--epochs", "3"),
        4,
        r"was trained on other images than .*moved holds now",
    )


def test_run_ended_before_first_checkpoint_leaves_nothing(run, tmp_path):
    got, out, err = run(*TRAIN, "--epochs", "1", "--lr", "1e30", "--quiet", "--out", tmp_path / "r")
    mistake(
        (got, out, err),
        2,
        r"epoch 1, step \d+: non-finite loss, ce/branch1, .*; no epoch was saved, so there is no"
        r" checkpoint. Try a lower --lr$",
    )
    assert not (tmp_path / "r").exists()
    assert run(*TRAIN, "--epochs", "1", "--quiet", "--out", tmp_path / "r")[0] == 0


@pytest.mark.parametrize(
    "content", [b"\xff\xfe", b"epochs: [", b"epoch: 1", b"method_options: {1: 2}"]
)
def test_damaged_config_file_is_refused(run, trained, tmp_path, content):
    import shutil

    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "run" / "config.yaml").write_bytes(content)
    for command in (
        ["eval", tmp_path / "run"],
        ["export", tmp_path / "run"],
        ["train", "--resume", tmp_path / "run"],
    ):
        mistake(run(*command), 2, r"config\.yaml")


BASELINE_RUN = ["train", "--data", "digits", "--method", "baseline", "--epochs", "1"]


@pytest.mark.parametrize("command", [["recipes"], ["train", "--help"], ["doctor"], BASELINE_RUN])
def test_closed_output_ends_quietly(command, tmp_path):
    if command is BASELINE_RUN:
        command = [*command, "--model", "resnet8", "--out", str(tmp_path / "run")]
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "fastokd", *command],
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        check=False,
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize(
    ("command", "usage"),
    [
        ("models", "[NAME]"),
        ("recipes", "[NAME]"),
        ("reproduce", "[TABLE]"),
        ("compare", "[RUNS ...]"),
        ("predict", "PATH [IMAGES ...]"),
        ("show", "METHOD"),
        ("eval", "PATH"),
    ],
)
def test_help_shows_optional_positionals_in_brackets(run, command, usage):
    first = run(command, "--help")[1].splitlines()[0]
    assert first.removesuffix(" [--plugin FILE.py|MODULE]").endswith(f" {usage}")


def test_tables_keep_their_width_when_piped(run, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    rows = run("methods")[1].splitlines()
    for name in list_methods():
        (row,) = [row for row in rows if row.startswith(f"{name} ")]
        assert row.rstrip().endswith(get_method(name).summary)
    monkeypatch.setenv("COLUMNS", "80")
    assert max(map(len, run("methods")[1].splitlines()[:-1])) <= 80


def test_piped_lines_do_not_end_with_blanks(run):
    for command in (["recipes"], ["methods"], ["models", "torchvision:squeezenet1_1"]):
        assert [line for line in run(*command)[1].splitlines() if line != line.rstrip()] == []


def test_help_joins_the_lines_of_a_description(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    output = run("models", "--help")[1]
    assert "networks); without it all split points are listed with their costs" in output


def test_help_shows_the_defaults_of_the_recipe(run):
    text = " ".join(run("train", "--recipe", "cifar10-resnet32-ahbf", "--help")[1].split())
    assert "(default: 0.0005)" in text
    assert "(default: resnet32)" in text
    recipe = get_recipe("cifar10-resnet32-ahbf").config
    assert f"Passes over the training images (default: {recipe.epochs})" in text
    assert run("train", "--recipe", "nonsense", "--help")[0] == 2


def test_option_without_truth_value_means_true(run, tmp_path):
    small = ("--data", "digits", "--model", "resnet8", "--method", "baseline", "--epochs", "1")
    out = tmp_path / "run"
    code, _, errors = run("train", *small, "--sync_bn", "--flip", "--out", str(out))
    assert code == 0, errors
    config = RunFolder(out).load_config()
    assert (config.sync_bn, config.flip) == (True, True)


def test_retired_options_are_named(run):
    mistake(run("train", "--merge-first-conv", "True"), 2, r"were removed")
    mistake(run("bench", "compare", "a", "b"), 2, r"pytest-benchmark compare")


def test_full_standard_output_is_reported():
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "fastokd", "recipes"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            check=False,
        )
    assert done.returncode != 0
    assert "Traceback" not in done.stderr, done.stderr


def start(tmp_path):
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "fastokd",
            *TRAIN,
            "--epochs",
            "200",
            "--out",
            str(tmp_path / "run"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        # Started from a background job the child would inherit that Ctrl-C is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def wait_for_checkpoint(process, tmp_path):
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "checkpoints" / "last.pt").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_ctrl_c_keeps_checkpoint_and_prints_resume_command(tmp_path, run):
    process = start(tmp_path)
    wait_for_checkpoint(process, tmp_path)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
    said = re.search(
        r"fastokd: stopped by Ctrl-C; the last checkpoint has (\d+) finished epochs?"
        r" and \d+ steps of the next; continue with 'fastokd train --resume ",
        err,
    )
    assert said, err
    state = load_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt")
    assert state["epoch"] == int(said[1])
    assert run("eval", tmp_path / "run")[0] == 0


def test_ctrl_c_while_the_program_ends_prints_no_traceback():
    """Torch takes seconds to unload, in which impatient users press Ctrl-C again."""
    code = """
        import atexit, os, signal, sys
        from fastokd import cli
        def interrupted(arguments):
            raise KeyboardInterrupt
        cli._run = interrupted
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.argv = ["fastokd", "train"]
        atexit.register(os.kill, os.getpid(), signal.SIGINT)
        sys.exit(cli.main())
    """
    code = "\n".join(line[8:] for line in code.splitlines())
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "fastokd: interrupted\n")


def test_ctrl_c_before_the_first_step_is_explained(run, tmp_path, monkeypatch):
    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr("fastokd.train.trainer.Trainer._introduce", interrupted)
    code, _, errors = run(*TRAIN, "--epochs", "1", "--out", tmp_path / "run")
    assert code == 130
    assert "fastokd: interrupted before the first step, so nothing new is saved" in errors
    assert not (tmp_path / "run").exists()


def test_sigkill_leaves_a_loadable_checkpoint(tmp_path, run):
    process = start(tmp_path)
    wait_for_checkpoint(process, tmp_path)
    process.kill()
    process.communicate()
    epoch = load_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt")["epoch"]
    assert run("train", "--resume", tmp_path / "run", "--epochs", epoch + 1, "--quiet")[0] == 0


def test_full_disk_stops_run_and_keeps_checkpoint(tmp_path):
    # A limit on file size stands in for a full disk: a write past it fails with an OSError, as one
    # past the disk's end does.
    folder = tmp_path / "run"
    assert main([*TRAIN, "--epochs", "1", "--out", str(folder), "--quiet"]) == 0
    before = (folder / "checkpoints" / "last.pt").read_bytes()
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        f" resource.setrlimit(resource.RLIMIT_FSIZE, ({len(before) // 2}, {len(before) // 2}));"
        f" from fastokd.cli import main; sys.exit(main(['train', '--resume', {str(folder)!r},"
        " '--epochs', '2', '--quiet']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 5, done.stderr
    assert re.fullmatch(
        r"fastokd: cannot write .*(last|best)\.pt: File too large\..*", done.stderr.strip()
    )
    assert (folder / "checkpoints" / "last.pt").read_bytes() == before
    assert [
        path.name for path in (folder / "checkpoints").iterdir() if path.name.startswith(".")
    ] == []


def test_resume_auto_starts_resumes_and_accepts_finished_run(run, tmp_path):
    command = [*TRAIN, "--quiet", "--resume", "auto", "--out", tmp_path / "r"]
    assert run(*command, "--epochs", "1")[0] == 0
    code, out, _ = run(*command, "--epochs", "2")
    assert code == 0
    assert "the run now has 2 epochs instead of 1" in out
    for _ in range(2):
        code, out, err = run(*command, "--epochs", "2")
        assert (code, err) == (0, "")
        assert out == (
            "the run already finished 2 of 2 epochs; pass a larger --epochs to continue\n"
        )
    mistake(
        run(*command, "--epochs", "3", "--lr", "1"),
        2,
        r"the configuration differs from the checkpoint's \(old, new: lr: 0.05, 1.0\)",
    )


def test_wrong_process_counts_are_refused(run, monkeypatch):
    mistake(run(*TRAIN, "--gpus", "0"), 2, "gpus=0: the number of processes must be at least 1")
    for name, value in (
        ("RANK", "0"),
        ("WORLD_SIZE", "2"),
        ("LOCAL_RANK", "0"),
        ("LOCAL_WORLD_SIZE", "2"),
    ):
        monkeypatch.setenv(name, value)
    mistake(
        run(*TRAIN, "--gpus", "3"),
        2,
        "--gpus 3 conflicts with a launcher that started 2 local processes; drop --gpus",
    )
