"""The captured training step on the pretend CUDA device: no method breaks a rule of stream capture,
waits for the device, or takes more memory from step to step.
"""

import json
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
}
CASES = {**METHODS, **OPTIONS}


def capture(fields: dict[str, Any], function: str = "capture") -> dict[str, Any]:
    (result,) = run([(function, fields)])
    return result


def run(cases: list[tuple[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    return pretend_cuda.run(pretend_cuda.FOLDER / "steps.py", json.dumps(cases), timeout=900)


@pytest.fixture(scope="module")
def eager() -> dict[tuple[str, bool], dict[str, Any]]:
    """The results of all cases without compilation, with and without streams, of one process."""
    cases = [(name, streams) for streams in (True, False) for name in CASES]
    fields = [settings(name, streams, compile=False) for name, streams in cases]
    return dict(zip(cases, run([("capture", each) for each in fields]), strict=True))


def settings(name: str, streams: bool, **more: Any) -> dict[str, Any]:
    fields = {**CASES[name], **more}
    return fields if streams else {**fields, "streams": False}


def check(result: dict[str, Any], num_streams: int) -> None:
    """A legal capture with work on each of the streams, whose loss and optimizer wait for all of
    it, and steps that neither wait nor grow.
    """
    assert result["reason"] == ""
    assert result["violations"] == []
    assert result["unordered"] == [0, 0]
    assert result["waits"] == {}
    assert result["growth"] == 0
    (nodes,) = result["captures"]
    assert all(nodes)
    assert len(nodes) == num_streams


def num_streams(name: str, streams: bool) -> int:
    """The streams that the branches of a method run on."""
    method = get_method(CASES[name]["method"])
    return method.default_branches if streams and method.name not in OWN_FORWARD else 1


def test_every_method_is_captured() -> None:
    assert {fields["method"] for fields in METHODS.values()} == set(list_methods())


@pytest.mark.parametrize("streams", [True, False], ids=["streams", "one stream"])
@pytest.mark.parametrize("name", CASES)
def test_eager_step_is_captured(
    eager: dict[tuple[str, bool], dict[str, Any]], name: str, streams: bool
) -> None:
    check(eager[name, streams], num_streams(name, streams))


def test_compiled_step_is_captured() -> None:
    result = capture({"method": "ahbf", "branches": 2, "aux_blocks": 1, "compile": True})
    assert "compiled" in result["options"]
    check(result, 2)


@pytest.mark.grid
@pytest.mark.parametrize("streams", [True, False], ids=["streams", "one stream"])
@pytest.mark.parametrize("name", CASES)
def test_every_compiled_step_is_captured(name: str, streams: bool) -> None:
    check(capture(settings(name, streams, compile=True)), num_streams(name, streams))


@pytest.mark.parametrize("streams", [True, False], ids=["streams", "one stream"])
def test_failed_capture_leaves_no_memory_behind(streams: bool) -> None:
    fields = {"method": "ahbf", "streams": streams, "compile": False}
    result = capture(fields, "fail_to_capture")
    assert result["violations"] == ["captured stream: cudaStreamSynchronize"]
    assert result["reason"]
    assert "one CUDA graph" not in result["options"]
    assert result["growth"] == 0
    # The value that this step reads: seven times before the capture, and in the steps after it.
    assert result["waits"] == {"cudaStreamSynchronize": 27}
