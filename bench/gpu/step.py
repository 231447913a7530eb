"""The training step, with one more optimization per row, at CIFAR and at ImageNet size, and the
student alone: the cost of teaching.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

from bench.gpu.kernels import NUM_BRANCHES
from bench.gpu.part import Context, OutOfMinutes, Part, Row
from bench.gpu.results import Results
from fastokd.experiments.step_benchmark import NEVER, SPENT, StepBenchmark, report
from fastokd.experiments.step_images import synthetic_images
from fastokd.experiments.step_timer import StepRow
from fastokd.train.config import TrainConfig


class Step(NamedTuple):
    """A network with AHBF and four branches, and its batches."""

    model: str
    aux_blocks: int
    batch: int
    side: int
    num_classes: int

    @property
    def name(self) -> str:
        return f"{self.model}, batch {self.batch} of {self.side} x {self.side}"

    def config(self) -> TrainConfig:
        return TrainConfig(
            model=self.model,
            method="ahbf",
            branches=NUM_BRANCHES,
            aux_blocks=self.aux_blocks,
            batch_size=self.batch,
            image_size=self.side,
            lr=0.01,
        )


CIFAR = Step("resnet32", 4, 128, 32, 10)
IMAGENET = Step("resnet18_imagenet", 2, 256, 224, 1000)
STEPS = (
    CIFAR,
    IMAGENET,
    *(
        Step(model, 2, batch, 224, 1000)
        for model, batch in (
            ("resnet34_imagenet", 256),
            ("resnet18_imagenet", 96),
            ("resnet34_imagenet", 96),
        )
    ),
)
TINY = Step("resnet8", 0, 4, 8, 10)


def _rows(context: Context, results: Results) -> Iterator[Row]:
    for step in (TINY,) if context.dry else STEPS:
        yield Row(step.name, context.needs(2.0), lambda step=step: _measure(context, results, step))


def _measure(context: Context, results: Results, step: Step) -> dict[str, Any]:
    """A step benchmark; rows are written one by one, so that a later call resumes it."""
    config = step.config()
    benchmark = StepBenchmark(
        config,
        synthetic_images(config, step.num_classes),
        context.device,
        seconds=3.0,
        steps=1 if context.dry else None,
    )
    known = {
        row["name"]: StepRow(**row)
        for row in (results.find(step.name) or {}).get("rows", ())
        if not row["reason"]
    }
    rows: list[StepRow] = []
    with context.not_compiled():
        for row in benchmark.rows(lambda: context.minutes_left() < context.needs(1.0), known):
            rows.append(row)
            if row.name not in known:
                print(
                    f"    {row.name}: "
                    + (
                        row.reason
                        or f"{row.images_per_second[0]:,.0f} images/s, {row.times_first[0]:.2f} x"
                    ),
                    flush=True,
                )
            results.put(
                {"row": step.name, "partial": "not measured to the end", **report(benchmark, rows)}
            )
    if missing := [row.name for row in rows if row.reason == SPENT]:
        raise OutOfMinutes(f"{len(rows) - len(missing)} of its {len(rows)} rows are there")
    failed = [f"{row.name}: {row.reason}" for row in rows if row.reason and row.reason not in NEVER]
    return report(benchmark, rows) | ({"partial": "; ".join(failed)} if failed else {})


def _line(found: dict[str, Any]) -> str:
    (best,) = (row for row in found["rows"] if row["name"] == found["all_levers"])
    teaching = (
        f", {found['teaching_costs']:.2f} times the student alone"
        if found["teaching_costs"]
        else ""
    )
    return (
        f"{best['images_per_second'][0]:,.0f} images/s, {best['times_first'][0]:.2f} x the first"
        f" row{teaching}"
    )


PART = Part("step", 2.0, _rows, _line, entries="ladders")
"""Its rows are ``ladders``, each as ``fastokd bench step`` writes it."""
