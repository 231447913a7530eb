"""Everything that wants a GPU, from one entry: ``python -m bench.gpu [PARTS] --out DIR --minutes
N``.

Parts run in the order of their worth, and each writes its JSON file row by row: a call that is
ended loses the current row, and the next call continues with the missing rows.
``--dry-run`` goes through the same code on the CPU with tiny sizes.
"""

import argparse
import gc
import os
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.gpu import accuracy, data, environment, kernels, profile, step, tests
from bench.gpu.part import Context, OutOfMinutes, Part, Refused
from bench.gpu.results import ROOT, Results, check_writable, identity
from fastokd.data import absolute_spec
from fastokd.errors import (
    EXIT_INTERRUPTED,
    ConfigError,
    FastOKDError,
    Preempted,
    StorageError,
    did_you_mean,
    first_line,
)

PARTS: dict[str, Part] = {
    module.PART.name: module.PART
    for module in (environment, tests, kernels, step, profile, data, accuracy)
}
"""In the order of their worth. What is wrong cannot be fast, so the tests come before what is
timed; the profile explains the speed of the step; and accuracy is last, because it takes all
the minutes there are.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts; returns the exit code."""
    try:
        return run_parts(_parser().parse_args(arguments))
    except FastOKDError as error:
        print(f"bench.gpu: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt as error:
        print(
            f"bench.gpu: {str(error) or 'interrupted'}; the rows so far are kept, and a later call"
            " continues",
            file=sys.stderr,
        )
        return EXIT_INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all by default"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("bench/results"),
        help="folder for the JSON files and traces (default bench/results)",
    )
    parser.add_argument(
        "--runs",
        type=Path,
        default=Path("runs/bench-gpu"),
        help="folder for run folders and drawn images, to resume a run (default runs/bench-gpu)",
    )
    parser.add_argument(
        "--minutes", type=float, default=25.0, help="stop cleanly when these are spent (default 25)"
    )
    parser.add_argument(
        "--data", help="CIFAR-10 for the accuracy part, as 'fastokd train --data' takes it"
    )
    parser.add_argument(
        "--epochs",
        type=int,
        help=(
            f"of the accuracy part's plan, fixed by its first call (default {accuracy.EPOCHS}; the"
            " papers' 300)"
        ),
    )
    parser.add_argument(
        "--seeds",
        type=int,
        help=f"of the accuracy part's plan, fixed by its first call (default {accuracy.SEEDS})",
    )
    parser.add_argument(
        "--images",
        type=Path,
        help="tree of large JPEG files for the data part (default: some are drawn)",
    )
    parser.add_argument(
        "--again",
        action="store_true",
        help="start the parts again; existing results are moved to the folder 'earlier'",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="the same code on the CPU, with tiny sizes"
    )
    return parser


def run_parts(options: argparse.Namespace) -> int:
    """Check the options, then run part after part.

    Raises:
        ConfigError: an unknown part, no GPU, numbers that are not positive, or another plan than
            that of the runs so far.
        DataError: there is no such dataset.
        StorageError: the results cannot be written.
        Preempted: a signal ended a run, which has saved.
    """
    for name in options.parts:
        if name not in PARTS:
            raise ConfigError(f"unknown part '{name}'{did_you_mean(name, PARTS)}")
    for name in ("minutes", "epochs", "seeds"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise ConfigError(f"--{name} {value}: it must be positive")
    if not options.dry_run and not torch.cuda.is_available():
        raise ConfigError(
            "torch sees no GPU here, and every part needs one; --dry-run goes through the code of"
            " all of them on the CPU"
        )
    if options.images is not None and not options.images.is_dir():
        raise ConfigError(f"--images {options.images}: no such folder; omit it to generate images")
    device = torch.device("cpu") if options.dry_run else torch.device("cuda", 0)
    label = (
        "dry-run"
        if options.dry_run
        else torch.cuda.get_device_name(device).replace(" ", "-").lower()
    )
    context = Context(
        device,
        label,
        options.out.absolute(),
        options.runs.absolute(),
        time.monotonic() + 60 * options.minutes,
        options.dry_run,
        None if options.data is None else absolute_spec(options.data),
        options.images and options.images.absolute(),
        options.epochs,
        options.seeds,
    )
    os.chdir(ROOT)  # where the tests are
    # Errors are reported now, not after the minutes of other parts.
    for folder in (context.out, context.runs):
        check_writable(folder)
    chosen = [PARTS[name] for name in options.parts or PARTS]
    refusals = {part.name: part.refusal(context) for part in chosen}
    for part in chosen:
        if refusals[part.name]:
            print(f"{part.name}: skipped, {refusals[part.name]}", flush=True)
        else:
            run_part(part, context, identity(device, part.code()), options.again)
    return 0


def run_part(part: Part, context: Context, own: dict[str, Any], again: bool) -> None:
    """Measure the rows of a part that its result file lacks, as far as the minutes reach."""
    path = context.out / f"{part.name}-{context.label}.json"
    if context.minutes_left() < context.needs(part.minutes):
        print(
            f"{part.name}: skipped, it needs at least {part.minutes:g} minutes and"
            f" {max(0.0, context.minutes_left()):.1f} are left",
            flush=True,
        )
        return
    results = Results(path, part.name, own, context.device, part.entries, again)
    if results.note:
        print(f"{part.name}: {results.note}", flush=True)
    if results.complete:
        print(f"{part.name}: {path} is complete; --again measures it again", flush=True)
        return
    started, measured = time.monotonic(), 0
    left: dict[str, str] = {}
    for row in part.rows(context, results):
        if results.has(row.name):
            continue
        if context.minutes_left() < row.minutes:
            minutes = max(0.0, context.minutes_left())
            left[row.name] = f"needs at least {row.minutes:g} minutes, {minutes:.1f} were left"
            continue  # a smaller one may still fit
        _free(context.device)
        begun = time.monotonic()
        try:
            entries = row.measure()
        except OutOfMinutes as error:
            left[row.name] = str(error)
            print(f"  {row.name}: {error}", flush=True)
            continue
        except (Refused, StorageError, Preempted):
            raise
        except Exception as error:  # a row that cannot run must not lose the others
            # A later call continues from the row's finished entries.
            entries = (results.find(row.name) or {}) | _failure(error)
        measured += 1
        results.put({"row": row.name, **entries})
        if "error" in entries:
            _check_answering(context.device, entries["error"])
        if "error" in entries:
            outcome = f"{entries['error']} ({'; '.join(entries['where'])})"
        else:
            outcome = part.line(entries)
        print(f"  {row.name} ({time.monotonic() - begun:.1f} s): {outcome}", flush=True)
    results.finish(left)
    missing = ""
    if left:
        missing = f", {len(left)} left ({next(iter(left))}: {next(iter(left.values()))})"
    print(
        f"{part.name}: {measured} rows in {time.monotonic() - started:.1f} s{missing}; {path}",
        flush=True,
    )


def _failure(error: Exception) -> dict[str, Any]:
    """The entries of a row that failed: the error and the innermost calls."""
    frames = traceback.extract_tb(error.__traceback__)[-4:]
    return {
        "error": f"{type(error).__name__}: {first_line(error)}",
        "where": [
            f"{Path(frame.filename).name}:{frame.lineno} in {frame.name}" for frame in frames
        ],
    }


def _free(device: torch.device) -> None:
    """Release the previous row's memory and compiled code, which counts against dynamo's limits."""
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _check_answering(device: torch.device, error: str) -> None:
    """End the call if a row left the GPU in a state in which every other row would fail too.

    Raises:
        ConfigError: it has.
    """
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except RuntimeError as lost:
        raise ConfigError(
            f"the GPU answers no more after '{error}' ({first_line(lost)}); the rows so far are"
            " kept: call again, in a new process"
        ) from lost
