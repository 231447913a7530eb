"""The PTX of compiled kernels, executed by an interpreter (``ptx.py``) on CPU tensors.

Results are compared with float64 by the bounds of ``executor_properties.py`` and
``executor_contract.py``. The interpreter also reports races, misaligned accesses and accesses
outside of tensors.
"""

import os
import re
from collections.abc import Callable, Sequence
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1 replaces the compiler", allow_module_level=True)

import executor_properties
import graph_catalog
import masked_rows
import ptx
import ptx_executor
from executor_contract import LAYOUTS, Subject, with_logits
from graph_catalog import Inputs
from ptx_executor import EXECUTOR

from fastokd.kernels.triton import launch
from fastokd.kernels.triton.specialize import specialize
from fastokd.ops import forward_backward

PTX = Subject(ptx_executor.register(), "cpu")
CATALOG = {case.name: case.graph for case in graph_catalog.catalog()}
MUTATIONS = 24
CHANGE = 2.0**-16
"""A change of a result, relative to its largest value: 128 roundings of float32"""
HUGE = ("cascade", "mixed probabilities", "minimum", "cascade, exact eps")


def check_catalog_case(
    name: str, batch: int, num_classes: int, dtype: torch.dtype, soft: bool, capability: int = 90
) -> None:
    with patch.object(EXECUTOR, "capability", capability):
        executor_properties.check(
            CATALOG[name], PTX.executor, batch, num_classes, dtype, 0, soft, device="cpu"
        )


@pytest.mark.parametrize(
    ("name", "batch", "num_classes", "dtype", "soft"),
    [
        ("ahbf_two", 5, 10, torch.bfloat16, False),  # rows share a warp, through shared memory
        ("baseline_smoothed", 3, 100, torch.float16, True),  # a warp holds a row
        ("ahbf_two", 2, 1000, torch.bfloat16, False),  # several warps hold a row, wide loads
        ("kdcl_minlogit", 3, 10, torch.float32, False),
        ("tsb_student_first", 3, 10, torch.float32, True),
        ("eps_exact", 3, 10, torch.float32, False),
        ("student_first_logits", 2, 100, torch.float32, True),
        ("decoupled_mixtures", 3, 10, torch.float32, False),
        ("jensen_shannon_probabilities", 3, 10, torch.float32, False),
    ],
)
def test_catalog_graph_is_as_accurate_as_torch(
    name: str, batch: int, num_classes: int, dtype: torch.dtype, soft: bool
) -> None:
    check_catalog_case(name, batch, num_classes, dtype, soft)


@pytest.mark.grid
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("number", range(len(CATALOG)), ids=list(CATALOG))
def test_every_catalog_graph_is_as_accurate_as_torch(
    number: int, dtype: torch.dtype, capability: int
) -> None:
    batch, num_classes = ((3, 10), (2, 100), (2, 1001))[number % 3]
    check_catalog_case(
        list(CATALOG)[number], batch, num_classes, dtype, number % 2 == 1, capability
    )


@pytest.mark.grid
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("batch", "num_classes"),
    [(1, 2), (17, 10), (37, 32), (9, 256), (5, 1000), (3, 4096), (3, 21841), (2, 40000)],
)
def test_every_shape_is_as_accurate_as_torch(
    batch: int, num_classes: int, dtype: torch.dtype, capability: int
) -> None:
    with patch.object(EXECUTOR, "capability", capability):
        PTX.compare(PTX.make("cascade", (batch, num_classes), dtype=dtype))


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[ptx.Program]]:
    """The programs that a test compiles."""
    compiled: dict[Any, tuple[ptx.Program, int]] = {}
    monkeypatch.setattr(EXECUTOR, "programs", compiled)
    return lambda: [program for program, _shared in compiled.values()]


@pytest.mark.parametrize(
    "name", [HUGE[0], *(pytest.param(name, marks=pytest.mark.grid) for name in HUGE[1:])]
)
def test_huge_logits_are_rounded_equally_in_every_pass(
    name: str, programs: Callable[[], list[ptx.Program]]
) -> None:
    """A logit near 1e4 must be rounded alike in every pass over its row: in one fused multiply-add.

    The factor of a scaled node is multiplied separately only for maxima and the label's logit.
    """
    inputs = PTX.make(name, (33, 1000), scale=1e4)
    PTX.compare(inputs, huge=True)
    spec = specialize(inputs.plan)
    scales = [node.scale for node in spec.first.scaled_nodes + spec.main.scaled_nodes]
    literals = {f"0f{np.float32(scale).view(np.uint32):08X}" for scale in scales}
    for program in programs():
        products = {
            op.operands[0]
            for op in program.code
            if op.name == "mul" and literals & {*op.operands[1:]}
        }
        readers = {op.name for op in program.code if products & {*op.operands[1:]}}
        assert readers <= {"max", "neg"}, f"{program.name}: products are read by {readers}"
    assert any(literals & {*op.operands} for op in programs()[0].code)


def test_logit_far_above_estimated_maximum_is_handled() -> None:
    inputs = PTX.make("mutual, temperature 1", (3, 1300))
    with torch.no_grad():
        for row in inputs.logits:
            row[torch.arange(3), torch.tensor([1, 700, 1299])] += 90.0
    PTX.compare(inputs, huge=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_masked_classes_count_as_absent(dtype: torch.dtype) -> None:
    """Loads of pairs of columns, of vectors, and of single columns."""
    for classes in (41, 600):
        inputs = PTX.make(
            masked_rows.MASKED_GRAPHS["mixed probabilities"], (2, classes), dtype=dtype
        )
        masked_rows.compare_with_absent(PTX, inputs, torch.arange(classes) % 3 == 1)


def test_split_rows_are_as_accurate_as_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "choose_splits", lambda batch, num_classes: 2)
    PTX.compare(PTX.make("cascade, detached", (2, 1200)))


def test_forward_backward_kernel_equals_the_two() -> None:
    inputs = PTX.make("cascade, detached", (5, 10))
    expected = PTX.run(inputs, torch.full((5,), 1 / 5))
    rows, terms, grads = forward_backward(inputs.plan, *inputs.arguments(), impl=PTX.executor)
    for mine, theirs in zip((rows, terms, *grads), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7)


def test_strided_rows_are_as_accurate_as_torch() -> None:
    inputs = PTX.make("mutual", (5, 101), dtype=torch.bfloat16)
    layouts = (LAYOUTS[3], LAYOUTS[0], LAYOUTS[1])
    rows = zip(layouts, inputs.logits, strict=True)
    PTX.compare(with_logits(inputs, [layout(row) for layout, row in rows]))


def kernel(body: str) -> ptx.Program:
    """A program of two warps with a pointer as parameter; ``%rd1`` is a thread's element of it."""
    return ptx.Program(
        f"""
.visible .entry example(
	.param .u64 .ptr .global .align 1 example_param_0
)
.reqntid 64
{{
	.reg .pred 	%p<9>;
	.reg .b32 	%r<9>;
	.reg .b64 	%rd<9>;
	ld.param.b64 	%rd0, [example_param_0];
	mov.u32 	%r0, %tid.x;
	mul.wide.u32 	%rd2, %r0, 4;
	add.s64 	%rd1, %rd0, %rd2;
	{body}
	ret;
}}
"""
    )


EXCHANGE = (
    "st.shared.b32 [%r2], {%r0}; bar.sync 0; ld.shared.b32 %r3, [%r4]; st.global.b32 [%rd1], %r3;"
)
ADDRESSES = "mul.lo.u32 %r2, %r0, 4; xor.b32 %r1, %r0, 63; mul.lo.u32 %r4, %r1, 4;"


def test_program_exchanges_values_through_shared_memory() -> None:
    out = torch.zeros(64, dtype=torch.int32)
    ptx.launch(kernel(ADDRESSES + EXCHANGE), 1, [out], 256)
    assert out.tolist() == list(range(63, -1, -1))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (ADDRESSES + EXCHANGE.replace("bar.sync 0;", ""), "race"),
        ("st.global.b32 [%rd1+4], %r0;", "outside all tensors"),
        ("st.global.b32 [%rd1+2], %r0;", "misaligned access of 4 bytes"),
        ("st.global.v2.b32 [%rd1], {%r0, %r0};", "misaligned access of 8 bytes"),
        ("mul.lo.u32 %r2, %r0, 8; st.shared.b32 [%r2], %r0;", "outside the program's shared"),
        ("add.u32 %r2, %r0, 1; st.shared.b32 [%r2], %r0;", "misaligned access of 4 bytes of sh"),
        ("add.s32 %r2, %r0, %r7;", "%r7 is read before it is written"),
        (
            "setp.lt.u32 %p1, %r0, 5; @%p1 shfl.sync.bfly.b32 %r2, %r0, 8, 31, -1;",
            "reads an inactive lane",
        ),
        ("$L__1:\nbra $L__1;", "does not end"),
        (
            "setp.lt.u32 %p1, %r0, 5; @%p1 bra $L__1;\nbar.sync 0;\n$L__1:\nbar.sync 0;",
            "wait at different barriers",
        ),
    ],
)
def test_violation_is_an_error(body: str, message: str) -> None:
    with pytest.raises(ptx.Error, match=message):
        ptx.launch(kernel(body), 1, [torch.zeros(64, dtype=torch.int32)], 256)


def test_unknown_opcode_is_named() -> None:
    with pytest.raises(ptx.Error, match=r"unknown opcode lop3\.b32 in: lop3\.b32 %r1"):
        kernel("lop3.b32 %r1, %r0, %r0, %r0, 0x1;")


def mutated(op: ptx.Instruction, random: np.random.Generator) -> ptx.Instruction | None:
    """The instruction with one random change; None if it has nothing to change."""
    siblings = [
        ("add", "sub", "mul"),
        ("min", "max"),
        ("and", "or", "xor"),
        ("ex2", "lg2"),
        ("lt", "le", "gt", "ge", "eq", "ne"),
        ("shl", "shr"),
    ]
    changes = []
    if op.guard:
        changes.append(op.text.replace("@!", "@") if op.negated else op.text.replace("@", "@!", 1))
    for number in re.finditer(r"(?<=[ +])-?\d+(?=[\],;]|$)", op.text):
        for other in (int(number[0]) + 1, int(number[0]) * 2 + 2):
            changes.append(op.text[: number.start()] + str(other) + op.text[number.end() :])
    for number in re.finditer(r"0f([0-9A-F]{8})", op.text):
        value = np.uint32(int(number[1], 16)).view(np.float32)
        other = np.float32(value * np.float32(1.01) if value else 1e-3).view(np.uint32)
        changes.append(op.text.replace(number[0], f"0f{other:08X}"))
    for group in siblings:
        for word in {*group}.intersection((op.name, *op.suffixes)):
            changes += [re.sub(rf"\b{word}\.", f"{other}.", op.text, count=1) for other in group]
    if op.name in ("sub", "div", "selp", "setp", "fma") and len({*op.operands[1:]}) > 1:
        first, second = op.operands[1], op.operands[2 if op.name != "fma" else 3]
        head, _, tail = op.text.partition(",")
        swapped = tail.replace(first, "#").replace(second, first).replace("#", second)
        changes.append(f"{head},{swapped}")
    changes = [text for text in changes if text != op.text]
    try:
        return ptx.Instruction.parse(str(random.choice(changes))) if changes else None
    except ptx.Error:
        return None  # no such instruction, such as mul.s64


def difference(found: Sequence[Tensor], original: Sequence[Tensor]) -> float:
    """The largest difference of two lists of results, relative to the size of each result."""
    return max(
        float(
            ((mine - theirs).abs().max() / theirs.abs().max().clamp(min=1e-3)).nan_to_num(torch.inf)
        )
        for mine, theirs in zip(found, original, strict=True)
    )


@pytest.mark.grid
@pytest.mark.parametrize(
    "name", ["mutual, temperature 1", "cascade, detached", "mixed probabilities"]
)
def test_mutations_that_change_results_are_detected(
    name: str, programs: Callable[[], list[ptx.Program]], capsys: pytest.CaptureFixture[str]
) -> None:
    """Random changes of one executed instruction each.

    A change by more than ``CHANGE`` of a result's size must make ``compare`` fail or the
    interpreter report a violation. Smaller ones, such as another estimate of a maximum, only round
    differently.
    """
    inputs = PTX.make(name, (5, 10))
    original = results(inputs)
    random = np.random.default_rng(0)
    counts = dict.fromkeys(("no change", "rounding", "violation", "inaccurate", "missed"), 0)
    while sum(counts.values()) < MUTATIONS:
        program = programs()[random.integers(len(programs()))]
        position = int(random.integers(len(program.code)))
        changed = mutated(program.code[position], random)
        if changed is None:
            continue
        code = [*program.code[:position], changed, *program.code[position + 1 :]]
        with patch.object(program, "code", code):
            outcome = outcome_of_mutation(inputs, original)
        counts[outcome] += 1
        if outcome == "missed":
            pytest.fail(f"{program.code[position].text} -> {changed.text}: {program.name}")
    with capsys.disabled():
        print(f"\n{name}: {counts}")
    assert counts["violation"] + counts["inaccurate"] >= MUTATIONS // 2


def results(inputs: Inputs) -> list[Tensor]:
    rows, terms, *grads = PTX.run(inputs)
    return [result for result in (rows, *terms, *grads) if result is not None]


def outcome_of_mutation(inputs: Inputs, original: Sequence[Tensor]) -> str:
    """The kind of a mutated kernel's results, a key of ``counts``."""
    try:
        found = results(inputs)
    except ptx.Error:
        return "violation"
    if all(map(torch.equal, found, original)):
        return "no change"
    try:
        PTX.compare(inputs)
    except AssertionError:
        return "inaccurate"
    return "rounding" if difference(found, original) <= CHANGE else "missed"
