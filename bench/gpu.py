"""Everything that wants a GPU, from one entry: ``python -m bench.gpu [PARTS] --out DIR --minutes N``.

Parts run in the order of their worth and each writes its JSON when it is done; a part whose file is there already is
skipped, so a second call continues. ``--dry-run`` goes through the same code on the CPU with tiny sizes.
"""

import argparse
import contextlib
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.loaders import LARGE_MODEL, images_per_second, waiting_share
from bench.pictures import compose
from fastokd.data import Augment, list_files
from fastokd.data.dali import default_threads
from fastokd.data.loader import get_loader_kind
from fastokd.errors import ConfigError, FastOKDError, did_you_mean, first_line
from fastokd.graph import lower
from fastokd.methods.ahbf import PRESETS, ahbf_graph
from fastokd.models import create_model
from fastokd.ops import evaluate, loss_and_grad
from fastokd.storage import write_json
from fastokd.train.config import TrainConfig
from fastokd.train.ladder import Ladder, ladder_images, median_seconds, report
from fastokd.train.loop import Trainer
from fastokd.train.progress import Reporter
from fastokd.train.run_folder import RunFolder, environment
from fastokd.train.step import TrainStep

SIZES = ((128, 10), (128, 100), (96, 1000), (1024, 1000), (4096, 1000), (1024, 21841), (256, 100_000))
"""(B, C): CIFAR batches, an ImageNet batch, large batches, and the two regimes where memory bandwidth rules."""
NUM_BRANCHES = 4


@dataclass(frozen=True)
class Context:
    """What every part needs."""

    device: torch.device
    out: Path
    deadline: float
    dry: bool
    data: str | None
    pictures: str | None

    def left(self) -> float:
        """Seconds until the minutes are spent."""
        return self.deadline - time.monotonic()


def part_environment(context: Context) -> dict[str, Any]:
    """Device, versions, and the two rates that everything is measured against."""
    device, dry = context.device, context.dry
    numel, side = (1 << 20, 256) if dry else (1 << 29, 8192)
    source = torch.empty(numel, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    left = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    repeats = _repeats(context)
    copy = median_seconds(lambda: target.copy_(source), device, True, *repeats)
    matmul = median_seconds(lambda: left @ left, device, True, *repeats)
    found = {"copy_bandwidth_gb_s": 2 * numel / copy / 1e9, "bf16_matmul_tflop_s": 2 * side**3 / matmul / 1e12}
    try:
        import triton

        found["triton"] = triton.__version__
    except ImportError:
        found["triton"] = None
    if device.type == "cuda":
        found |= {"cuda": torch.version.cuda, "capability": list(torch.cuda.get_device_capability(device)), "driver": _driver()}
    return found


def _repeats(context: Context) -> tuple[int, int]:
    """How often a call is timed, and how many calls at a time."""
    return (3, 1) if context.dry else (25, 20)


def _driver() -> str | None:
    try:
        done = subprocess.run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout.strip() else None


def part_tests(context: Context) -> dict[str, Any]:
    """The tests that need a GPU; the dry run only collects them."""
    files = sorted(str(path) for path in Path("tests").glob("test_*.py") if "mark.gpu" in path.read_text())
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", *files]
    done = subprocess.run([*command, "--collect-only"] if context.dry else command, capture_output=True, text=True,
                          timeout=max(60.0, context.left()), check=False)
    lines = done.stdout.strip().splitlines()
    return {"returncode": done.returncode, "files": files, "summary": lines[-1] if lines else done.stderr[-500:], "failures": [line for line in lines if line.startswith("FAILED")]}


def _loss_inputs(batch: int, num_classes: int, dtype: torch.dtype, device: torch.device) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
    """Logits, mixing weights and labels of a batch."""
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(batch, num_classes, generator=generator).mul_(3).to(device, dtype).requires_grad_() for _ in range(NUM_BRANCHES)]
    weights = [torch.randn(batch, 2, generator=generator).softmax(1).to(device).requires_grad_() for _ in range(NUM_BRANCHES - 1)]
    return logits, weights, torch.randint(0, num_classes, (batch,), generator=generator).to(device)


def part_kernels(context: Context) -> dict[str, Any]:
    """The loss of each preset at each size: eager, compiled and fused, each in a CUDA graph; eager also without one."""
    rows = []
    for batch, num_classes in ((8, 10), (4, 100)) if context.dry else SIZES:
        for preset in ("paper",) if context.dry else ("paper", "code"):
            if context.left() < 0:
                return {"rows": rows, "stopped": "the minutes were spent"}
            rows.append(_kernel_row(context, batch, num_classes, preset))
    return {"rows": rows}


def _kernel_row(context: Context, batch: int, num_classes: int, preset: str) -> dict[str, Any]:
    device, dtype = context.device, torch.bfloat16
    fused = "triton" if device.type == "cuda" else "cpu"
    plan = lower(ahbf_graph(NUM_BRANCHES, **PRESETS[preset]))
    logits, weights, target = _loss_inputs(batch, num_classes, dtype, device)
    term_weights = torch.ones(plan.num_terms, device=device)
    leaves = [*logits, *weights]

    def forward(impl: str) -> torch.Tensor:
        return evaluate(plan, logits, weights, [], target, term_weights, impl)[0].mean()

    def both(call: Callable[[], torch.Tensor]) -> Any:
        return torch.autograd.grad(call(), leaves)

    compiled = torch.compile(lambda: forward("reference"), backend="eager" if context.dry else "inductor")
    cases: dict[str, tuple[Callable[[], Any], bool]] = {}
    for name, call, modes in (
        ("eager", lambda: forward("reference"), (False, True)),
        ("compiled", compiled, (True,)),
        ("fused", lambda: forward(fused), (False, True)),
    ):
        for graph in modes:
            label = f"{name} graph" if graph else name
            cases[f"{label}/forward"] = (call, graph)
            cases[f"{label}/both"] = (partial(both, call), graph)
    cases["one kernel graph/both"] = (lambda: loss_and_grad(plan, logits, weights, [], target, term_weights, fused), True)

    num_bytes = NUM_BRANCHES * batch * num_classes * dtype.itemsize
    row: dict[str, Any] = {
        "batch": batch, "num_classes": num_classes, "preset": preset, "dtype": "bfloat16", "fused": fused,
        "bytes_forward": num_bytes, "bytes_both": 3 * num_bytes}
    for name, (call, graph) in cases.items():
        try:
            row[name] = median_seconds(call, device, graph, *_repeats(context))
        except (RuntimeError, FastOKDError) as error:  # one case that cannot run must not lose the others
            row[name], row[f"{name} error"] = None, first_line(error)
    return row


def part_step(context: Context) -> dict[str, Any]:
    """The ladder of ``fastokd bench step`` at CIFAR and at ImageNet size, the student alone beside it."""
    if context.dry:
        ladders = [("resnet8", 0, 4, 8, 10)]
    else:
        ladders = [("resnet32", 4, 128, 32, 10), *((model, 2, batch, 224, 1000) for batch in (96, 256) for model in ("resnet18_imagenet", "resnet34_imagenet"))]
    found = []
    for model, aux_blocks, batch, side, num_classes in ladders:
        if context.left() < 0:
            return {"ladders": found, "stopped": "the minutes were spent"}
        config = TrainConfig(model=model, method="ahbf", branches=NUM_BRANCHES, aux_blocks=aux_blocks, batch_size=batch, image_size=side, lr=0.01)
        # The dry run goes through every row, but compiling takes minutes.
        with torch.compiler.set_stance("force_eager") if context.dry else contextlib.nullcontext():
            ladder = Ladder(config, ladder_images(config, num_classes), context.device, seconds=3.0, steps=1 if context.dry else None)
            rows = []
            for row in ladder.rows(lambda: context.left() < 0):
                rows.append(row)
                print(f"  {model}, batch {batch}: {row.name}: " + (row.reason or f"{row.images_per_second[0]:,.0f} images/s, {row.times_first[0]:.2f} x"), flush=True)
            found.append(report(ladder, rows))
    return {"ladders": found}


def _network(context: Context, method: str, **settings: Any) -> TrainConfig:
    """The papers' ResNet-32, alone or with four branches of hierarchical depth; for the dry run a small one."""
    taught = method == "ahbf"
    return TrainConfig(model="resnet8" if context.dry else "resnet32", method=method, branches=NUM_BRANCHES if taught else 1,
                       aux_blocks=4 if taught and not context.dry else 0, **settings)


def part_accuracy(context: Context) -> dict[str, Any]:
    """ResNet-32 alone and with both AHBF presets on CIFAR-10 (JPEG) or the user's files: the papers' schedule, scaled to the minutes."""
    data = context.data or ("digits" if context.dry else None)
    if data is None:
        return {"skipped": "no --data: give the folder of CIFAR-10 images"}
    runs = [("baseline", "paper"), ("ahbf", "paper"), ("ahbf", "code")]
    rows: list[dict[str, Any]] = []
    for method, preset in runs:
        config = _network(context, method, preset=preset, data=data, epochs=1, batch_size=64 if context.dry else 128)
        if not context.dry:
            # One epoch is timed first, then as many as fit into an equal share of what is left.
            probe = _train(context.out / "runs" / f"probe-{method}-{preset}", config)
            share = context.left() / (len(runs) - len(rows))
            if share <= probe.seconds:
                return {"data": data, "rows": rows, "stopped": "the minutes were spent"}
            config = replace(config, epochs=max(1, min(300, int(0.85 * share / probe.seconds))))
        summary = _train(context.out / "runs" / f"{method}-{preset}", config)
        rows.append({"method": method, "preset": preset, "epochs": config.epochs, "seed": config.seed, "last": summary.last, "best": summary.best,
                     "minutes": summary.seconds / 60, "images_per_second": summary.images_per_second})
    return {"data": data, "rows": rows}


def _train(path: Path, config: TrainConfig) -> Any:
    trainer = Trainer(config, RunFolder.create(path), Reporter(quiet=True))
    trainer.start()
    return trainer.run()


def part_data(context: Context) -> dict[str, Any]:
    """DALI at 224 pixels: images per second by the share of the JPEG engine and by decoder, and how long an AHBF step waits for it."""
    device, dry = context.device, context.dry
    kind = get_loader_kind("dali")
    if reason := kind.missing(device):
        return {"skipped": reason}
    size, batch, count = (48, 4, 16) if dry else (224, 256, 8192)
    with tempfile.TemporaryDirectory() as folder:
        pictures = Path(context.pictures) if context.pictures else compose(Path(folder), count)
        dataset = list_files(pictures, image_size=size, augment=Augment(flip=True, crop_scale=(0.08, 1.0)))

        def loader(batch: int, **options: Any) -> Any:
            return kind.make(dataset.train, batch, True, device, 0, size=dataset.image_size, mean=dataset.mean, std=dataset.std,
                             augment=dataset.augment, dtype=torch.float32 if device.type == "cpu" else torch.bfloat16, options=options)

        cases: list[dict[str, Any]] = [{"decoder": "cpu"}]
        if device.type == "cuda":
            cases += [{"decoder": "mixed", "hw_decoder_load": load} for load in (0.0, 0.15, 0.3, 0.5, 0.65, 0.8, 1.0)]
        rows: list[dict[str, Any]] = []
        for options in cases:
            if context.left() < 0:
                return {"rows": rows, "stopped": "the minutes were spent"}
            one = loader(batch, **options)
            rows.append({**options, "batch": batch, "size": size, "threads": default_threads(device.type == "cuda"),
                         "images_per_second": images_per_second(one, device, 1 if dry else 2)})
            one.close()
        best = max(rows, key=lambda row: row["images_per_second"])
        config = TrainConfig(model="resnet8" if dry else LARGE_MODEL, method="ahbf", branches=2 if dry else NUM_BRANCHES, aux_blocks=0)
        torch.manual_seed(0)
        model = create_model(config.model, config.method, len(dataset.classes), config.branches, config.aux_blocks).to(device, memory_format=torch.channels_last)
        step = TrainStep(config, model, device)
        feeding = loader(4 if dry else 96, **{option: best[option] for option in ("decoder", "hw_decoder_load") if option in best})
        waiting = waiting_share(feeding, device, step)
        feeding.close()
    return {"rows": rows, "waiting": {"model": config.model, "method": "ahbf", "branches": config.branches, "batch": feeding.batch_size, **waiting}}


PARTS: dict[str, Callable[[Context], dict[str, Any]]] = {
    "environment": part_environment, "tests": part_tests, "kernels": part_kernels, "step": part_step, "data": part_data, "accuracy": part_accuracy,
}
"""In the order of their worth."""


def main(arguments: list[str] | None = None) -> int:
    """Run the parts; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all by default")
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="folder for the JSON files (default bench/results)")
    parser.add_argument("--minutes", type=float, default=25.0, help="stop cleanly when these are spent (default 25)")
    parser.add_argument("--data", help="folder of CIFAR-10 images for the accuracy part")
    parser.add_argument("--pictures", help="tree of large JPEG files for the data part (default: some are drawn)")
    parser.add_argument("--again", action="store_true", help="run parts whose result is there already")
    parser.add_argument("--dry-run", action="store_true", help="the same code on the CPU, with tiny sizes")
    options = parser.parse_args(arguments)
    try:
        return run_parts(options)
    except FastOKDError as error:
        print(f"bench.gpu: {error}", file=sys.stderr)
        return error.exit_code


def run_parts(options: argparse.Namespace) -> int:
    """Check the options, then run part after part.

    Raises:
        ConfigError: an unknown part, no GPU, or minutes that are not positive.
        StorageError: the results cannot be written.
    """
    for name in options.parts:
        if name not in PARTS:
            raise ConfigError(f"unknown part '{name}'{did_you_mean(name, PARTS)}")
    if options.minutes <= 0:
        raise ConfigError(f"--minutes {options.minutes}: must be positive")
    if not options.dry_run and not torch.cuda.is_available():
        raise ConfigError("torch sees no GPU here; --dry-run goes through the same code on the CPU")
    out = options.out.absolute()
    os.chdir(Path(__file__).resolve().parent.parent)  # where the tests are
    device = torch.device("cuda", 0) if not options.dry_run else torch.device("cpu")
    context = Context(device, out, time.monotonic() + 60 * options.minutes, options.dry_run, options.data, options.pictures)
    label = "dry-run" if options.dry_run else torch.cuda.get_device_name(device).replace(" ", "-").lower()
    for name in options.parts or PARTS:
        path = out / f"{name}-{label}.json"
        if path.exists() and not options.again:
            print(f"{name}: {path} is there already", flush=True)
            continue
        if context.left() < 0:
            print(f"{name}: skipped, the minutes are spent", flush=True)
            continue
        started = time.monotonic()
        found = PARTS[name](context)
        write_json(path, {
            "part": name, "command": f"python -m bench.gpu {' '.join(sys.argv[1:])}".strip(), "environment": environment(device),
            "machine": platform.machine(), "seconds": round(time.monotonic() - started, 1), **found})
        print(f"{name}: {time.monotonic() - started:.1f} s, wrote {path}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
