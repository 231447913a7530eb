"""Package order, import cost, and extension points that take one file and one line."""

import ast
import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "fastokd"

# A package may import packages of an earlier line; packages of one line do not import each other.
# The list of public losses, ``fastokd/losses/__init__.py``, ranks after the methods it re-exports.
PUBLIC_LOSSES = "fastokd.losses"
ORDER = [
    {"version", "errors", "_moved"},
    {"plugins"},
    {"limits", "metrics", "registry", "ranks", "storage"},
    {"graph"},
    {"kernels", "_native"},
    {"ops"},
    {"losses"},
    {"methods"},
    {PUBLIC_LOSSES},
    {"models", "data"},
    {"export"},
    {"train"},
    {"experiments", "doctor"},
    {"cli"},
    {"__main__", "recipes", "analysis", "sweep", "demo"},
]
RANK = {package: rank for rank, packages in enumerate(ORDER) for package in packages}


def _module_name(path: Path) -> str:
    """The dotted name a file is imported by."""
    base = ROOT if path.is_relative_to(PACKAGE) else ROOT / "kernels" / ".."
    parts = list(path.relative_to(base.resolve()).with_suffix("").parts)
    if parts[0] == "kernels":
        parts.insert(0, "fastokd")
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _package(module: str) -> str:
    return module if module == PUBLIC_LOSSES else [*module.split("."), ""][1]


def _imports(path: Path) -> set[str]:
    """The dotted fastokd names that a file imports at any depth: lazily and for types too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write the whole name"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in names if name.startswith("fastokd.")}


def _sources() -> list[Path]:
    return [path for folder in (PACKAGE, ROOT / "kernels") for path in sorted(folder.rglob("*.py"))]


def test_imports_follow_the_package_order():
    violations = []
    packages = set()
    files = {_module_name(path): path for path in _sources()}
    for module, path in files.items():
        package = _package(module)
        if not package:
            continue
        packages.add(package)
        for other in {_package(_defining_module(name, files)) for name in _imports(path)}:
            if other not in ("", package) and not RANK[other] < RANK[package]:
                violations.append(f"{path.relative_to(ROOT)} imports {other}")
    assert not violations
    assert {"graph", "ops", "methods", "models", "data", "train", "experiments", "cli"} <= packages


def test_modules_have_no_import_cycles():
    files = {_module_name(path): path for path in _sources()}
    edges = {
        module: {_defining_module(name, files) for name in _imports(path)} - {module}
        for module, path in files.items()
    }
    assert [set(group) for group in _components(edges) if len(group) > 1] == []


def _defining_module(name: str, files: dict[str, Path]) -> str:
    """The module of a dotted name: itself, or the package or module that holds it."""
    while name not in files:
        name = name.rpartition(".")[0]
    return name


def _components(edges: dict[str, set[str]]) -> list[list[str]]:
    """The strongly connected components of a graph (Tarjan 1972)."""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    components = []

    def visit(node: str) -> None:
        order[node] = low[node] = len(order)
        stack.append(node)
        for other in sorted(edges[node]):
            if other not in order:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], order[other])
        if low[node] == order[node]:
            position = stack.index(node)
            components.append(stack[position:])
            del stack[position:]

    for node in edges:
        if node not in order:
            visit(node)
    return components


# Lower these as the package shrinks.
MOST_LINES = {"file": 600, "function body": 60, "fastokd": 36_500, "library": 9_500}
LIBRARY = ("graph", "ops", "losses", "methods", "models")
MOST_PARAMETERS = 15
MOST_PRIVATE_ACCESS = 27


def test_files_and_functions_are_short():
    too_long = []
    for path in [*_sources(), *sorted((ROOT / "bench").rglob("*.py"))]:
        name, text = path.relative_to(ROOT), path.read_text(encoding="utf-8")
        if (lines := text.count("\n")) > MOST_LINES["file"]:
            too_long.append(f"{name}: {lines} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                too_long += [f"{name}: {node.name}: {reason}" for reason in _excess(node, path)]
    assert too_long == []


def _excess(node: ast.FunctionDef | ast.AsyncFunctionDef, path: Path) -> list[str]:
    """The limits that a function exceeds."""
    body = node.body[1:] if ast.get_docstring(node) is not None else node.body
    lines = body[-1].end_lineno - body[0].lineno + 1 if body else 0
    arguments = node.args
    count = len(arguments.posonlyargs + arguments.args + arguments.kwonlyargs)
    return [
        *([f"body of {lines} lines"] if lines > MOST_LINES["function body"] else []),
        # Kernels take one parameter per tensor.
        *(
            [f"{count} parameters"]
            if count > MOST_PARAMETERS and "kernels" not in path.parts
            else []
        ),
    ]


def test_package_and_library_stay_small():
    lines = {
        package: sum(path.read_text(encoding="utf-8").count("\n") for path in folder.rglob("*.py"))
        for package in LIBRARY
        if (folder := PACKAGE / package)
    }
    assert sum(lines.values()) <= MOST_LINES["library"], lines
    total = sum(path.read_text(encoding="utf-8").count("\n") for path in PACKAGE.rglob("*.py"))
    assert total <= MOST_LINES["fastokd"]


def test_tests_use_public_names():
    """Private names of the package appear in tests only where no public way exists."""
    private = set()
    for path in _sources():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            private |= {name for name in _bound_names(node) if _is_private(name)}
    uses = [
        f"{path.relative_to(ROOT)}:{node.lineno}: {name}"
        for path in sorted((ROOT / "tests").rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        for name in _private_uses(node, private)
    ]
    assert len(uses) <= MOST_PRIVATE_ACCESS, "\n".join(uses)


def _bound_names(node: ast.AST) -> set[str]:
    """The names of functions, classes, variables and attributes that a node defines."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return {node.name}
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        return {node.id}
    if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
        return {node.attr}
    return set()


def _private_uses(node: ast.AST, private: set[str]) -> list[str]:
    """The private names that a node reads from a module or object, imports, or patches."""
    if isinstance(node, ast.Attribute):
        # "self" is the test's own object, "accuracy" and "gpu_tests" are modules of bench/, and
        # "_version" is the count of changes that torch keeps for every tensor.
        ours = isinstance(node.value, ast.Name) and node.value.id in OTHER_OBJECTS
        return [node.attr] if node.attr in private - {"_version"} and not ours else []
    if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fastokd"):
        return [alias.name for alias in node.names if _is_private(alias.name)]
    if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "setattr":
        texts = [each.value for each in node.args[:2] if isinstance(each, ast.Constant)]
        return [name for text in texts for name in str(text).split(".") if name in private]
    return []


OTHER_OBJECTS = ("self", "cls", "accuracy", "gpu_tests")


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def test_moved_packages_work_with_a_warning():
    code = """
        import warnings
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            import fastokd.analysis, fastokd.demo, fastokd.recipes, fastokd.sweep
        from fastokd.experiments import analysis, demo, recipes, sweep
        assert fastokd.analysis is analysis and fastokd.demo is demo
        assert fastokd.recipes is recipes and fastokd.sweep is sweep
        for package in ("analysis", "demo", "recipes", "sweep"):
            (warning,) = [each for each in caught if f"fastokd.{package} is" in str(each.message)]
            assert f"is now fastokd.experiments.{package}" in str(warning.message)
            assert warning.filename == "<string>"  # of the import, or Python does not show it
        print("same")
    """
    assert _python(code) == "same"


def test_walk_imports_every_module_once():
    code = """
        import importlib, pkgutil, warnings
        import fastokd
        warnings.simplefilter("ignore", DeprecationWarning)
        names = [module.name for module in pkgutil.walk_packages(fastokd.__path__, "fastokd.")]
        for name in names:
            if not name.startswith("fastokd._native."):  # a library without Python's interface
                importlib.import_module(name)
        assert len(set(names)) == len(names) > 100
        assert [name for name in names if name.count("fastokd") > 1 and "_native" not in name] == []
        assert not {"fastokd.tests", "fastokd.setup"} & set(names)
        print("done")
    """
    assert _python(code) == "done"


def test_public_losses_can_be_imported():
    code = """
        import fastokd.losses as losses
        from fastokd.methods import get_method, list_methods
        public = {getattr(losses, name) for name in losses.__all__}
        print({get_method(name).loss_class for name in list_methods()} - public)
    """
    assert _python(code) == "set()"


def test_graph_package_does_not_import_torch():
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


def test_losses_import_does_not_load_optional_packages():
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


def test_import_does_not_change_random_state_or_start_cuda():
    code = """
        import random, torch
        before = (random.getstate(), torch.random.get_rng_state())
        import fastokd.losses, fastokd.models, fastokd.data, fastokd.export
        assert random.getstate() == before[0]
        # Rich, which these use, draws from random when imported
        import fastokd.cli, fastokd.experiments.recipes, fastokd.train.session
        assert torch.equal(torch.random.get_rng_state(), before[1])
        assert not torch.cuda.is_initialized()
        print("quiet")
    """
    assert _python(code) == "quiet"


def test_sources_use_no_unsafe_loading():
    for path in _sources():
        text = path.read_text(encoding="utf-8")
        assert "weights_only=False" not in text, path
        assert "pickle.load" not in text, path


def test_kernels_folder_has_no_init():
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
        from fastokd.graph import CrossEntropy, Graph, Logits
        from fastokd.losses import options
        from fastokd.losses.method_loss import MethodLoss
        from fastokd.losses.options import Impl, Reduction, loss_options
        from fastokd.methods.method import Method

        @loss_options
        class ToyLoss(MethodLoss):
            num_branches: int = options.num_branches(2, 2, "M.")
            lambda_kd: float = options.weight(1.0, "weight of the KL terms.")
            reduction: Reduction = options.reduction()
            impl: Impl = options.impl()

            def build_graph(self):
                first, *others = self.branch_names()
                terms = [CrossEntropy(name) for name in (first, *others)]
                terms += [self.teach(name, first, self.lambda_kd) for name in others]
                return Graph("toy", [Logits(first), *map(Logits, others)], terms)

        METHOD = Method(name="toy", summary="a toy", loss_class=ToyLoss,
                        branch_range=(2, 8), default_branches=2)
        """,
        "fastokd.methods.register_method('toy', 'toy_method')",
        """
import torch
from fastokd.data import Batch
from fastokd.methods import get_method
from fastokd.methods.method import MethodBatch
from fastokd.models import create_model
from fastokd.train.config import TrainConfig
from fastokd.train.rules import check_config
from fastokd.train.step import TrainStep
config = TrainConfig(method="toy", model="resnet8", method_options={"lambda_kd": 0.5})
check_config(config)
method, target = get_method("toy"), torch.tensor([3, 1])
model = create_model("resnet8", "toy", 10)
batch = Batch(torch.randn(2, 3, 32, 32), target, torch.arange(2))
loss = method.loss(method.loss_class(), model(batch.images), MethodBatch(target))
before = [parameter.clone() for parameter in model.parameters()]
TrainStep(config, model, torch.device("cpu"))(batch)
moved = [not torch.equal(old, new) for old, new in zip(before, model.parameters())]
print("fine", bool(loss > 0), any(moved))
""",
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
            " import TrainConfig; from fastokd.train.rules import check_config;"
            " check_config(TrainConfig(impl='toy')); z ="
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
        from fastokd.experiments.recipes.recipe import Recipe, by_name, given
        settings = given("a toy", model="resnet8", method="baseline")
        RECIPES = by_name([Recipe(dataset="cifar10", settings=settings)])
        """,
        "fastokd.experiments.recipes.register_recipes('toy_recipe')",
        (
            "from fastokd.experiments.recipes import get_recipe; print('fine',"
            " get_recipe('cifar10-resnet8-baseline').config.model)"
        ),
    ),
}
EXPECTED = {
    "method": "fine True True",
    "executor": "toy ran\nfine True",
    "model": "fine 1",
    "recipe": "fine resnet8",
    "dataset": "fine 3",
}


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    """The output of every toy, by its kind. One process runs them all, the executor, which then
    takes every loss, as the last.
    """
    folder = tmp_path_factory.mktemp("toys")
    code = [f"import sys; sys.path[:0] = {json.dumps([str(folder), str(ROOT)])}"]
    for kind in sorted(TOYS, key=lambda kind: kind == "executor"):
        source, registration, use = TOYS[kind]
        (folder / f"toy_{kind}.py").write_text(textwrap.dedent(source))
        package = registration.rsplit(".", 1)[0]
        code += [f"print('# {kind}')", f"import {package}", registration, use]
    parts = re.split(r"^# (\w+)\n", _python("\n".join(code), folder), flags=re.MULTILINE)[1:]
    return dict(zip(parts[::2], map(str.strip, parts[1::2]), strict=True))


@pytest.mark.parametrize("kind", sorted(EXPECTED))
def test_extension_is_one_file_and_one_registry_entry(kind, printed):
    assert printed[kind] == EXPECTED[kind]
