"""The ONNX format: one file with embedded weights and a dynamic batch dimension; onnxruntime runs
it on the CPU.
"""

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastokd.errors import CheckpointError, MissingExtra, first_line
from fastokd.export.formats import ExportFormat, Runtime
from fastokd.export.preprocessing import example_images, run_on_pixels, takes_pixels
from fastokd.export.record import KEY

OPSET = 18
"""The exporter writes it without conversion, and runtimes since 2023 read it."""

_MISSING = "the onnx format needs onnx, onnxscript and onnxruntime: pip install -e '.[export]'"


def _describe(architecture: Mapping[str, Any]) -> dict[str, Any]:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript
    except ImportError:
        raise MissingExtra(_MISSING) from None
    return {
        "opset": OPSET,
        "input": "images",
        "output": "logits",
        "torch": torch.__version__,
        "onnxscript": onnxscript.__version__,
    }


def _encode(student: nn.Module, record: dict[str, Any]) -> bytes:
    import onnx

    program = torch.onnx.export(
        student,
        (example_images(record),),
        dynamo=True,
        opset_version=OPSET,
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=({0: "batch"},),
        verbose=False,
    )
    assert program is not None, "the exporter returns a program without a file"
    model = program.model_proto
    graph = model.graph
    # The exporter's metadata are as long as the graph, and contain local paths.
    values = (*graph.input, *graph.output, *graph.value_info, *graph.initializer)
    for part in (graph, *graph.node, *values):
        del part.metadata_props[:]
    onnx.helper.set_model_props(model, {KEY: json.dumps(record)})
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString()


def _session(blob: bytes) -> Any:
    try:
        import onnxruntime
    except ImportError:
        raise MissingExtra(_MISSING) from None
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # errors are raised as well
    # From memory, so that the file cannot refer to other files.
    return onnxruntime.InferenceSession(blob, options, providers=["CPUExecutionProvider"])


def _find_record(blob: bytes) -> str | None:
    return _session(blob).get_modelmeta().custom_metadata_map.get(KEY)


def _open(blob: bytes, record: dict[str, Any], where: str, device: torch.device) -> Runtime:
    session = _session(blob)
    inputs, outputs = session.get_inputs(), session.get_outputs()
    expected = [3, *record["preprocessing"]["image_size"]]
    if (
        [item.name for item in (*inputs, *outputs)] != ["images", "logits"]
        or inputs[0].shape[1:] != expected
        or inputs[0].type != ("tensor(uint8)" if takes_pixels(record) else "tensor(float)")
    ):
        images = f"images [batch, {', '.join(map(str, expected))}]"
        raise CheckpointError(f"{where} does not take {images} to logits; export it again")

    def run(images: Tensor) -> Tensor:
        try:
            logits = session.run(["logits"], {"images": images.contiguous().numpy()})[0]
        except Exception as error:  # its errors have no common class
            reason = f"{first_line(error)}; export it again"
            raise CheckpointError(f"{where} cannot be run by onnxruntime: {reason}") from error
        return torch.from_numpy(logits)

    return Runtime(run_on_pixels(run, record), torch.device("cpu"))


ONNX = ExportFormat(
    "onnx", "student.onnx", ".onnx", 1e-4, _describe, _encode, _find_record, _open, is_program=True
)
