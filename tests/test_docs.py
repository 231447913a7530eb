"""Every command and snippet of the documentation runs, what it prints is what the page says, and
the site is built from it.

A comment right above a block says what is special: ``<!-- run with: OPTIONS -->`` adds options to
its training runs, sweeps and tables, ``<!-- not run: REASON -->`` leaves it to be looked at, and
then its options and configurations must be sound.
"""

import contextlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from html import unescape
from pathlib import Path

import pytest
import torch
import tyro
import yaml
from cifar_files import write_cifar
from launching import finish, start
from PIL import Image

from fastokd import cli, methods
from fastokd.cli.commands import COMMANDS, Command, find_command, option_names
from fastokd.data.dali import missing_dali
from fastokd.experiments.recipes import list_recipes
from fastokd.models import create_model
from fastokd.train.rules import check_config
from fastokd.version import __version__

ROOT = Path(__file__).resolve().parent.parent
# README first: other pages continue with its runs.
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(ROOT.glob("docs/*.md")),
    *sorted(ROOT.glob("docs/methods/*.md")),
]
ELSEWHERE = {
    ("docs/export.md", "python"): "tests/test_export.py",
    ("docs/compare.md", ""): "tests/test_compare.py",
    ("docs/analyze.md", ""): "tests/test_analyze.py",
}
"""Pages and languages of blocks that another file runs, because it looks closely at what they
do.
"""
PROGRAMS = ("fastokd", "make", "pip")
"""Words that may start a line of an executed block; that make's targets exist is looked at
apart.
"""


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: str
    line: int
    mark: str  # the comment above it
    language: str
    text: str

    @property
    def where(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def is_run(self) -> bool:
        return not self.mark.startswith("not run: ")

    def statements(self) -> list[str]:
        """The lines, those that are continued as one, without comments."""
        lines = re.sub(r"\\\n\s*", "", self.text).splitlines()
        return [line for line in lines if line.strip() and not line.startswith("#")]

    def fastokd_commands(self) -> list[list[str]]:
        """The arguments of every call of fastokd, whoever starts it."""
        if self.language == "yaml":
            words = yaml.safe_load(self.text)["spec"]["trainer"]["command"]
            return [words[words.index("fastokd") + 1 :]]
        calls = [
            found[1]
            for line in self.statements()
            if (found := re.search(r"(?:^|-m )fastokd (.*?)(?: &)?$", line))
        ]
        return [
            [word for word in shlex.split(call, comments=True) if word != "..."] for call in calls
        ]


def blocks_of(path: Path) -> list[Block]:
    text = path.read_text(encoding="utf-8")
    found = re.finditer(
        r"^(?:<!-- (?P<mark>(?:run with|not run): [^\n]*)"
        r" -->\n)?```(?P<language>\w*)\n(?P<text>.*?)^```$",
        text,
        flags=re.DOTALL | re.MULTILINE,
    )
    return [
        Block(
            str(path.relative_to(ROOT)),
            1 + text[: match.start()].count("\n"),
            match["mark"] or "",
            match["language"],
            match["text"],
        )
        for match in found
    ]


BLOCKS = [block for path in PAGES for block in blocks_of(path)]
LEFT_OUT = [block for block in BLOCKS if not block.is_run]


@pytest.fixture(scope="module", autouse=True)
def own_methods():
    """Forget the methods that the pages' plug-ins register, for other tests of this process."""
    targets = methods._methods.targets
    before = dict(targets)
    yield
    for name in targets.keys() - before.keys():
        del targets[name]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """Real files where the pages say they are: three classes of coloured noise, 32 x 32, and
    CIFAR's files.
    """
    root = tmp_path_factory.mktemp("docs")
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 60), ("val", 8)):
        for shift, name in enumerate(("blue", "green", "red")):
            folder = root / "path/to/images" / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = torch.randint(0, 120, (32, 32, 3), generator=generator, dtype=torch.uint8)
                pixels[..., 2 - shift] += 120
                Image.fromarray(pixels.numpy()).save(folder / f"{index}.jpg")
    (root / "path/to/imagenet").symlink_to(root / "path/to/images")
    (root / "examples").symlink_to(ROOT / "examples")
    write_cifar(root / "path/to/torchvision/files", "cifar10", count=32)
    write_cifar(root / "path/to/torchvision/files", "cifar100", count=300)
    return root


def given_names(page: str) -> dict[str, object]:
    """The variables that a page's snippets use."""
    target = torch.tensor([0, 1, 2, 0])
    if page == "README.md":
        images = torch.randn(4, 3, 32, 32)
        output = create_model("resnet8", num_classes=3, num_branches=4, aux_blocks=0)(images)
        return {
            "images": images,
            "branch_logits": output.logits,
            "scores": output.scores,
            "target": target,
            "kd_weight": 0.5,
        }
    rows = [torch.randn(4, 3, requires_grad=True) for _ in range(3)]
    return {
        "images": torch.randn(4, 3, 32, 32),
        "target": target,
        "branch_logits": rows,
        "scores": torch.full((2, 4, 2), 0.5),
        "small": rows[0],
        "large": rows[1],
        "shares": torch.tensor([0.5, 0.5]),
        "teacher_logits": torch.randn(4, 3),
    }


def run_command(words: list[str]) -> str:
    """Run fastokd; returns what went wrong, empty if nothing did."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            code = cli.main(words)
        except SystemExit as stop:
            code = stop.code
    return f"exit code {code}: {said.getvalue()[-2000:]}" if code else ""


def run_block(block: Block) -> list[str]:
    """Run a block of commands; returns what went wrong."""
    wrong = [
        f"{block.where}: '{line}' is none of {', '.join(PROGRAMS)}"
        for line in block.statements()
        if line.split()[0] not in PROGRAMS
    ]
    for words in block.fastokd_commands():
        if "dali" in words and missing_dali():
            continue
        if words[0] in ("train", "sweep", "reproduce"):
            words += shlex.split(block.mark.removeprefix("run with: "))
        if said := run_command(words):
            wrong.append(f"{block.where}: fastokd {shlex.join(words)}: {said}")
    return wrong


@pytest.mark.filterwarnings("ignore:ResNet has 1000 classes")
def test_commands_and_snippets_run(workplace, monkeypatch):
    """In one folder and one process, in the order of the pages, so that a run serves all that look
    at it.
    """
    monkeypatch.chdir(workplace)
    wrong = []
    for path in PAGES:
        page = str(path.relative_to(ROOT))
        names, printed = given_names(page), None
        for block in blocks_of(path):
            if block.language == "text" and printed is not None and block.text != printed:
                wrong.append(f"{block.where}: the snippet before prints\n{printed}")
            printed = None
            if (
                not block.is_run
                or (page, block.language) in ELSEWHERE
                or block.text.startswith(("$ ", "--8<--"))
            ):
                # test_method_pages.py compares the output of drawing commands, and test_examples.py
                # runs programs.
                continue
            if block.language == "python":
                printed = run_snippet(block, names)
            elif not block.language:
                wrong += run_block(block)
        check_names(page, names)
    assert not wrong, "\n".join(wrong)


def run_snippet(block: Block, names: dict[str, object]) -> str:
    """Run a snippet; returns its output."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(compile(block.text, block.where, "exec"), names)
    return said.getvalue()


def check_names(page: str, names: dict[str, object]) -> None:
    """That the snippets of a page did what it says."""
    if page == "README.md":
        torch.testing.assert_close(names["loss"], names["by_hand"])
        assert names["logits"].shape == (4, 3)
        assert names["record"]["classes"] == ["blue", "green", "red"]
    if page == "docs/bring-your-own.md":
        model, images = names["model"], names["images"]
        assert [tuple(row.shape) for row in names["result"].logits] == [(4, 10)] * 3
        assert all(parameter.grad is not None for parameter in model.parameters())
        with torch.no_grad():
            torch.testing.assert_close(
                model.eval()(images).logits[0], names["stock"].eval()(images), rtol=1e-4, atol=1e-5
            )
        plugin = ["--plugin", "examples/own_network.py"]
        with contextlib.redirect_stdout(io.StringIO()) as output:
            assert cli.main(["models", "own_network:make_net", *plugin]) == 0
        suggested = re.search(r"train it: fastokd (.*) --data FOLDER", output.getvalue())[1]
        assert f"--plugin {Path(plugin[1]).absolute()}" in suggested
        # A new process knows the network's module only by --plugin.
        paths = [
            str(Path(name).absolute()) for name in ("runs/own-network/export", "path/to/images/val")
        ]
        evaluation = ["eval", paths[0], "--data", paths[1]]
        code, _, errors = finish(start(["-m", "fastokd", *evaluation]))
        assert code == 4
        assert "pass --plugin with its file or with own_network@FOLDER" in errors
        assert run_command([*evaluation, *plugin]) == ""
    if page == "docs/plugins.md":
        lines = Path("runs/consensus/metrics.jsonl").read_text(encoding="utf-8").splitlines()
        terms = {f"kl/consensus->branch{number}" for number in (1, 2, 3)}
        assert terms <= set(json.loads(lines[-1])["train"])
    if page == "docs/fine-tuning.md":
        assert all(parameter.grad is not None for parameter in names["model"].parameters())
    if page == "docs/own-loop.md":
        assert all(row.grad is not None for row in names["branch_logits"])


class Understood(Exception):
    """A run was about to begin, with a configuration that can be trained."""


@pytest.mark.parametrize(
    "block", LEFT_OUT, ids=lambda block: f"{block.where} ({block.mark.removeprefix('not run: ')})"
)
def test_skipped_commands_are_valid(block, monkeypatch):
    """Its options exist, its values are allowed, its recipes and files are there."""

    def begin(settings, *others):
        check_config(settings)
        raise Understood

    monkeypatch.setattr("fastokd.train.session.begin_run", begin)
    commands = block.fastokd_commands()
    for words in commands:
        if words[0] == "train":
            if "--gpus" in words:
                at = words.index("--gpus")
                assert int(words[at + 1]) > 0
                words[at : at + 2] = []
            with pytest.raises(Understood):
                assert cli.main(words) == 0
        else:
            command, depth = find_command(words)
            tyro.cli(command.load(words[depth:]), args=words[depth:])
    files = re.findall(
        r"^(?:pytest|python) (?:-m )?(bench[/.]\w+(?:\.py)?)", block.text, flags=re.MULTILINE
    )
    for file in files:
        assert any(
            (ROOT / name).exists()
            for name in (
                file,
                f"{file.replace('.', '/')}.py",
                f"{file.replace('.', '/')}/__main__.py",
            )
        ), file
    assert commands or files, f"{block.where}: nothing in it that could be looked at"


def words_of(pattern: str) -> set[str]:
    """The matches of a pattern in the inline code of all pages."""
    return {
        word
        for path in PAGES
        for code in re.findall(r"`([^`\n]+)`", path.read_text(encoding="utf-8"))
        for word in re.findall(pattern, code)
    }


OTHERS_OPTIONS = {
    "--account",
    "--mem",
    "--output",
    "--partition",
    "--nproc-per-node",
    "--local-addr",
    "--max-restarts",
    "--signals-to-handle",
    "--shutdown-timeout",
    "--check",
    "--write",
    "--dry-run",
    "--again",
    "--minutes",
    "--shm-size",
    "--help",
    "--version",
    "--benchmark-json",
    "--benchmark-quiet",
}
"""Of torchrun, bench, docker and every command."""


def test_options_and_names_in_the_text_exist():
    groups = [{"": item} if isinstance(item, Command) else item for item in COMMANDS.values()]
    commands = [command for group in groups for command in group.values()]
    options = {name[2:] for command in commands for name in option_names(command.load([]))}
    known = (
        {f"--{name}" for name in options} | {f"--no-{name}" for name in options} | OTHERS_OPTIONS
    )
    assert words_of(r"(?<![\w-])--[a-z][a-z-]+") <= known
    assert words_of(r"fastokd recipes ([a-z][\w-]+)") <= set(list_recipes())
    missing = {
        path
        for path in words_of(r"(?<![\w/])(?:tests|fastokd|bench|examples|kernels)/[\w/.-]+\.\w+")
        if not (ROOT / path).exists()
    }
    assert {path for path in missing if not path.startswith("bench/results/")} == set()


def test_make_targets_and_extras_exist():
    text = "\n".join(path.read_text(encoding="utf-8") for path in PAGES)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"(?:^|`)make ([\w.-]*\w)", text, flags=re.MULTILINE)):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"][
        "optional-dependencies"
    ]
    # There is no package on an index: the lines work in a checkout.
    sources = [*PAGES, *(ROOT / "fastokd").rglob("*.py"), *(ROOT / "examples").glob("*.py")]
    assert [path for path in sources if "fastokd[" in path.read_text(encoding="utf-8")] == []
    assert {
        name
        for group in re.findall(r"(?:fastokd|\.)\[([\w,-]+)\]", text)
        for name in group.split(",")
    } <= set(extras)


def test_documents_have_no_placeholders_or_dead_links():
    for path in [*PAGES, ROOT / "CHANGELOG.md"]:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"@[A-Z]+@|\bTODO\b|\bTBD\b", text), path
        for target in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (path.parent / target).exists(), f"{path} points to {target}"
    for (page, _), test in ELSEWHERE.items():
        assert Path(page).name in (ROOT / test).read_text(encoding="utf-8")
    for block in BLOCKS:
        for name in re.findall(r'^--8<-- "([^":]+)', block.text, flags=re.MULTILINE):
            assert (ROOT / name).is_file(), f"{block.where} takes in {name}"


def test_rows_of_tables_are_in_tables():
    """A blank line ends a table, and later rows are shown as text."""
    for path in PAGES:
        text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
        before = ["", *text.splitlines()]
        after = [*before[2:], ""]
        for previous, line, following in zip(before, before[1:], after, strict=False):
            starts = line.startswith("|") and not previous.startswith("|")
            assert not starts or following.startswith("|---"), f"{path}: {line}"


def test_figures_have_no_formulas_as_text():
    """matplotlib labels logarithmic axes with formulas, which its option can turn into raw text."""
    for path in (ROOT / "docs/figures").glob("*.svg"):
        assert "mathdefault" not in path.read_text(encoding="utf-8"), path


def test_citation_and_issue_templates():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == __version__
    assert citation["license"] == "Apache-2.0"
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    forms = [
        yaml.safe_load(path.read_text(encoding="utf-8"))
        for path in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml")
        if path.name != "config.yml"
    ]
    assert len(forms) == 3
    for form in forms:
        asked = {part["id"]: part for part in form["body"] if "id" in part}
        assert "`fastokd doctor`" in asked["doctor"]["attributes"]["description"], form["name"]
        assert asked["doctor"]["validations"]["required"], form["name"]


def test_site_builds_without_external_resources(tmp_path):
    pytest.importorskip("material", reason="the site needs pip install -e '.[docs]'")
    pytest.importorskip("mkdocstrings", reason="the site needs pip install -e '.[docs]'")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    pages = {
        str(path.relative_to(tmp_path / "site")): path.read_text(encoding="utf-8")
        for path in (tmp_path / "site").rglob("*.html")
    }
    assert len(pages) > 30
    for name, html in pages.items():
        loaded = re.findall(r'<(?:script|img|iframe|link)\b[^>]*?\b(?:src|href)="([^"]+)"', html)
        assert not [address for address in loaded if "//" in address], name
        assert 'class="arithmatex"' not in html, f"{name}: a formula that is not MathML"
        for formula in re.findall(r"<math.*?</math>", html, flags=re.DOTALL):
            signs = "".join(unescape(re.sub(r"<[^>]+>", "", formula)).split())
            # The column has 1,000 pixels in a window of 1,300; a longer formula is scrolled.
            assert len(signs) <= 95, f"{name}: a formula wider than the column"
        assert "|---|" not in html, f"{name}: a table that is not one"
        assert "flowchart LR" not in html, f"{name}: a drawing that is not SVG"
    assert pages["methods/ahbf.html"].count("<math") > 1
    assert "<title>ahbf</title>" in pages["methods/ahbf.html"]
    assert "packages, and their allowed imports" in pages["architecture.html"]
    assert "ArgumentParser" in pages["own-loop.html"]
    assert 'id="fastokd.losses.AHBFLoss"' in pages["reference.html"]
