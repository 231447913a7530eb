"""The captured training step on the pretend CUDA device: no method breaks a rule of stream capture,
waits for the device, or takes more memory from step to step.

The eager steps of ``make test`` are those of every method on separate streams, and on one stream
those that differ from it by more than the order of the same kernels. They run in one process, as
starting another one takes longer than most of them.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any

import pretend_cuda
import pytest
from kernel_counts import METHODS

from fastokd.methods import get_method, list_methods

pytestmark = pytest.mark.usefixtures("pretend_device")

OWN_FORWARD = ("ffsd", "afid")
"""Methods that run their networks themselves, on one stream."""
OPTIONS: dict[str, dict[str, Any]] = {
    "adamw, fp16, everything": {
        "method": "ahbf",
        "optimizer": "adamw",
        "precision": "fp16",
        "ema": 0.9,
        "clip_grad": 1.0,
        "on_nonfinite": "skip",
        "device_batch": 16,
    },
    "parameters apart, fp32, mixup": {
        "method": "ahbf",
        "flat": False,
        "precision": "fp32",
        "channels_last": False,
        "mixup": 0.2,
    },
    "views": {"method": "kdcl", "method_options": {"icl": True}},
    "stochastic depth": {"method": "ahbf", "drop_path": 0.3},
    "views of branches": {"method": "ahbf", "branch_views": True},
}
CASES = {**METHODS, **OPTIONS}
ON_ONE_STREAM = ("ahbf", "ffsd", "tsb on the host", *OPTIONS)
"""Cases whose eager step ``make test`` captures on one stream too: branches and mixtures, an own
forward, copies from the host, and every option.
"""
STREAMS = pytest.mark.parametrize("streams", [True, False], ids=["streams", "one stream"])
LATE = {"method": "ahbf", "branches": 3, "aux_blocks": 1, "compile": False}
FAILING = {"method": "ahbf", "compile": False}


def run(calls: Iterable[tuple[str, Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Results of functions of ``pretend_cuda/steps.py`` with fields of a configuration."""
    program = pretend_cuda.FOLDER / "steps.py"
    return pretend_cuda.run(program, json.dumps(list(calls)), timeout=850)


@pytest.fixture(scope="module")
def eager() -> dict[tuple[str, bool], dict[str, Any]]:
    """Results of all eager steps: by case, "late" or "failing", and with or without streams."""
    calls = {
        (name, streams): ("capture", settings(name, streams, compile=False))
        for streams in (True, False)
        for name in (CASES if streams else ON_ONE_STREAM)
    }
    calls["late", True] = ("teach_late", LATE)
    for streams in (True, False):
        calls["failing", streams] = ("fail_to_capture", {**FAILING, "streams": streams})
    return dict(zip(calls, run(calls.values()), strict=True))


def faults(result: Mapping[str, Any], num_streams: int) -> dict[str, Any]:
    """The results that differ from those of a legal capture with work on each of the streams, whose
    loss and optimizer wait for all of it, and of steps that neither wait nor grow.
    """
    expected = {"reason": "", "violations": [], "waits": {}, "growth": 0}
    found = {name: result[name] for name, value in expected.items() if result[name] != value}
    # At least one number for the loss and one for the optimizer.
    if len(result["unordered"]) < 2 or any(result["unordered"]):
        found["unordered"] = result["unordered"]
    if [len(nodes) for nodes in result["captures"]] != [num_streams] or not all(
        result["captures"][0]
    ):
        found["captures"] = result["captures"]
    return found


def num_streams(name: str, streams: bool) -> int:
    """The streams that the branches of a method run on."""
    method = get_method(CASES[name]["method"])
    return method.default_branches if streams and method.name not in OWN_FORWARD else 1


def settings(name: str, streams: bool, **more: Any) -> dict[str, Any]:
    fields = {**CASES[name], **more}
    return fields if streams else {**fields, "streams": False}


def test_capture_cases_cover_every_method() -> None:
    assert {fields["method"] for fields in METHODS.values()} == set(list_methods())


@STREAMS
def test_eager_steps_follow_capture_rules(
    eager: dict[tuple[str, bool], dict[str, Any]], streams: bool
) -> None:
    found = {
        name: faults(eager[name, streams], num_streams(name, streams))
        for name in (CASES if streams else ON_ONE_STREAM)
    }
    assert {name: each for name, each in found.items() if each} == {}


@pytest.mark.grid
def test_every_eager_step_on_one_stream_follows_rules() -> None:
    results = run(("capture", settings(name, False, compile=False)) for name in CASES)
    found = {
        name: faults(result, num_streams(name, False))
        for name, result in zip(CASES, results, strict=True)
    }
    assert {name: each for name, each in found.items() if each} == {}


def test_compiled_step_is_captured() -> None:
    fields = {"method": "ahbf", "branches": 2, "aux_blocks": 1, "compile": True}
    (result,) = run([("capture", fields)])
    assert "compiled" in result["options"]
    assert faults(result, 2) == {}


@pytest.mark.grid
@STREAMS
@pytest.mark.parametrize("name", CASES)
def test_compiled_steps_follow_capture_rules(name: str, streams: bool) -> None:
    (result,) = run([("capture", settings(name, streams, compile=True))])
    assert faults(result, num_streams(name, streams)) == {}


def test_step_is_captured_again_when_teaching_starts(
    eager: dict[tuple[str, bool], dict[str, Any]],
) -> None:
    result = eager["late", True]
    assert faults(result["alone"], 1) == {}
    assert "separate streams" not in result["alone"]["options"]
    assert faults(result["taught"], 3) == {}
    assert "branches on separate streams, parameters in one tensor" in result["taught"]["options"]
    assert result["freed"] > 0


@STREAMS
def test_failed_capture_leaves_no_memory_behind(
    eager: dict[tuple[str, bool], dict[str, Any]], streams: bool
) -> None:
    result = eager["failing", streams]
    assert result["violations"] == ["captured stream: cudaStreamSynchronize"]
    assert result["reason"]
    assert "one CUDA graph" not in result["options"]
    assert result["growth"] == 0
    # The value that this step reads: seven times before the capture, and in the steps after it.
    assert result["waits"] == {"cudaStreamSynchronize": 27}
