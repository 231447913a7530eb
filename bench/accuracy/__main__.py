"""Train the missing runs of a benchmark matrix."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.accuracy.matrix import plan_matrix, wanted_runs
from bench.accuracy.presets import PRESETS
from bench.gpu.results import ROOT
from fastokd.errors import ConfigError, FastOKDError


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.accuracy", description=__doc__)
    parser.add_argument(
        "preset", choices=PRESETS, help="matrix of rows and seeds, see bench/accuracy/presets.py"
    )
    parser.add_argument(
        "--data",
        type=Path,
        help="folder of the unpacked images (default: archives in shared/data of the checkout or"
        " next to it)",
    )
    parser.add_argument(
        "--out", type=Path, help="result file (default: bench/results/accuracy-PRESET-cpu.json)"
    )
    parser.add_argument(
        "--runs",
        type=Path,
        help="folder of the prepared images and the run folders (default: runs/accuracy/PRESET)",
    )
    parser.add_argument(
        "--rows", nargs="+", default=[], metavar="ROW", help="train only these rows"
    )
    parser.add_argument("--seeds", type=int, help="train only seeds 0 to SEEDS - 1")
    parser.add_argument("--per-device", type=int, help="simultaneous runs (default: the preset's)")
    parser.add_argument(
        "--dry-run", action="store_true", help="print finished and missing runs, and train nothing"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Train the missing runs; returns the exit code."""
    options = _parser().parse_args(arguments)
    preset = PRESETS[options.preset]
    runs = options.runs or ROOT / "runs" / "accuracy" / preset.name
    out = options.out or ROOT / "bench" / "results" / f"accuracy-{preset.name}-cpu.json"
    per_device = preset.per_device if options.per_device is None else options.per_device
    try:
        if per_device < 1:
            raise ConfigError(f"--per-device {per_device}: must be at least 1")
        wanted_runs(preset, options.rows, options.seeds)  # images take minutes to prepare
        data = preset.images(options.data, runs / "images")
        matrix = plan_matrix(preset, data, runs / "matrix", out, options.rows, options.seeds)
        if options.dry_run:
            matrix.check()
            print(matrix.results({}).as_text())
            return 0
        outcome = matrix.run(
            [torch.device("cpu")], per_device, lambda line: print(line, flush=True)
        )
        print(matrix.results(outcome.failed).as_text())
        return outcome.exit_code
    except FastOKDError as error:
        print(f"bench.accuracy: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
