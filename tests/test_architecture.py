"""The rooms: imports go one way, importing is cheap, and extending takes one file and one line."""

import ast
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "fastokd"

# Lower may not import higher. Rooms of one rank may not import each other either.
RANK = {
    "version": 0,
    "errors": 0,
    "storage": 0.5,
    "graph": 1,
    "kernels": 2,
    "_native": 2,
    "ops": 3,
    "methods": 4,
    "losses": 4.5,
    "models": 5,
    "data": 5,
    "export": 6,
    "train": 7,
    "analysis": 7.5,
    "recipes": 8,
    "doctor": 8,
    "demo": 8,
    "sweep": 8.5,
    "cli": 9,
    "__main__": 10,
}


def _room(path: Path) -> str:
    base = PACKAGE if path.is_relative_to(PACKAGE) else ROOT
    first = path.relative_to(base).parts[0]
    return first.removesuffix(".py")


def _imports(path: Path) -> set[str]:
    """The rooms of fastokd that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write the whole name"
            names = (
                [f"{node.module}.{alias.name}" for alias in node.names]
                if node.module == "fastokd"
                else [node.module or ""]
            )
        found |= {name.split(".")[1] for name in names if name.startswith("fastokd.")}
    return found


def _sources() -> list[Path]:
    return [path for folder in (PACKAGE, ROOT / "kernels") for path in sorted(folder.rglob("*.py"))]


def test_imports_go_one_way():
    wrong = []
    seen = set()
    for path in _sources():
        room = _room(path)
        if room == "__init__":
            continue
        seen.add(room)
        for other in _imports(path):
            if other != room and not RANK[other] < RANK[room]:
                wrong.append(f"{path.relative_to(ROOT)} imports {other}")
    assert not wrong
    assert {"graph", "ops", "methods", "models", "data", "train", "recipes", "cli"} <= seen


def test_graph_room_does_not_import_torch():
    code = "import sys, fastokd.graph; print([m for m in ('torch', 'numpy') if m in sys.modules])"
    assert _python(code) == "[]"


def test_importing_the_package_is_cheap():
    heavy = (
        "torch",
        "triton",
        "torchvision",
        "nvidia.dali",
        "matplotlib",
        "sklearn",
        "rich",
        "tyro",
        "yaml",
    )
    code = f"import sys, fastokd; print([m for m in {heavy} if m in sys.modules])"
    assert _python(code) == "[]"


def test_importing_the_losses_leaves_optional_packages_alone():
    # torch itself imports triton lazily; what must not happen is that fastokd pulls in the rest.
    heavy = (
        "torchvision",
        "nvidia.dali",
        "matplotlib",
        "sklearn",
        "rich",
        "tyro",
        "fastokd.ops.triton",
        "fastokd.train",
    )
    code = (
        f"import sys, fastokd.losses, fastokd.models; print([m for m in {heavy} if m in"
        " sys.modules])"
    )
    assert _python(code) == "[]"


def test_nothing_happens_at_import():
    code = """
        import random, torch
        before = (random.getstate(), torch.random.get_rng_state())
        import fastokd.losses, fastokd.models, fastokd.data, fastokd.export
        assert random.getstate() == before[0]
        # Rich, which these use, draws from random when imported
        import fastokd.cli, fastokd.recipes, fastokd.train.loop
        assert torch.equal(torch.random.get_rng_state(), before[1])
        assert not torch.cuda.is_initialized()
        print("quiet")
    """
    assert _python(code) == "quiet"


def test_no_unsafe_loading():
    for path in _sources():
        text = path.read_text(encoding="utf-8")
        assert "weights_only=False" not in text, path
        assert "pickle.load" not in text, path


def test_no_init_directly_in_kernels():
    # From the repository root it would shadow another installed package called "kernels".
    assert not (ROOT / "kernels" / "__init__.py").exists()


def _python(code: str, cwd: Path = ROOT) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        cwd=cwd,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


TOYS = {
    "method": (
        """
        from fastokd.methods.method import Method
        from fastokd.methods.baseline import BaselineLoss
        METHOD = Method(name="toy", summary="a toy", loss_class=BaselineLoss,
                        branch_range=(1, 1), default_branches=1)
        """,
        "fastokd.methods.register_method('toy', 'toy_method')",
        (
            "from fastokd.train.config import TrainConfig, check_config;"
            " check_config(TrainConfig(method='toy')); print('fine')"
        ),
    ),
    "executor": (
        """
        from fastokd.ops.reference import ReferenceExecutor
        class Toy(ReferenceExecutor):
            name = "toy"
            def forward(self, *arguments):
                print("toy ran")
                return super().forward(*arguments)
        EXECUTOR = Toy()
        """,
        "fastokd.ops.register_executor('toy', 'toy_executor', devices=['cpu'])",
        (
            "import torch; from fastokd.losses import BaselineLoss; from fastokd.train.config"
            " import TrainConfig, check_config; check_config(TrainConfig(impl='toy')); z ="
            " torch.zeros(1, 2, 3, requires_grad=True); BaselineLoss()(z, torch.tensor([0,"
            " 1])).backward(); print('fine', bool(z.grad.abs().sum() > 0))"
        ),
    ),
    "model": (
        """
        from fastokd.models.resnet_cifar import BACKBONES as STOCK
        BACKBONES = {"toynet": STOCK["resnet8"]}
        """,
        "fastokd.models.register_model('toynet', 'toy_model')",
        (
            "from fastokd.models import create_model; print('fine', len(create_model('toynet',"
            " 'baseline', 10).branches))"
        ),
    ),
    "dataset": (
        """
        import torch
        from fastokd.data import DatasetKind, DataSource, Split
        def read(path, options):
            images, targets = torch.zeros(6, 3, 8, 8, dtype=torch.uint8), torch.arange(6) % 3
            splits = (Split("train", images, targets), Split("test", images, targets))
            return DataSource("toy", ("a", "b", "c"), *splits)
        TOY = DatasetKind(read)
        """,
        "fastokd.data.register_dataset('toy', 'toy_dataset:TOY')",
        "from fastokd.data import open_dataset; print('fine', len(open_dataset('toy').classes))",
    ),
    "recipe": (
        """
        from fastokd.recipes.recipe import Recipe, by_name, given
        settings = given("a toy", model="resnet8", method="baseline")
        RECIPES = by_name([Recipe(dataset="cifar10", settings=settings)])
        """,
        "fastokd.recipes.register_recipes('toy_recipe')",
        (
            "from fastokd.recipes import get_recipe; print('fine',"
            " get_recipe('cifar10-resnet8-baseline').config.model)"
        ),
    ),
}
EXPECTED = {
    "method": "fine",
    "executor": "toy ran\nfine True",
    "model": "fine 1",
    "recipe": "fine resnet8",
    "dataset": "fine 3",
}


@pytest.mark.parametrize("kind", sorted(EXPECTED))
def test_extending_takes_one_file_and_one_line(kind, tmp_path):
    source, registration, use = TOYS[kind]
    (tmp_path / f"toy_{kind}.py").write_text(textwrap.dedent(source))
    room = registration.rsplit(".", 1)[0]
    code = (
        f"import sys; sys.path[:0] = {json.dumps([str(tmp_path), str(ROOT)])}\nimport"
        f" {room}\n{registration}\n{use}"
    )
    assert _python(code, tmp_path) == EXPECTED[kind]
