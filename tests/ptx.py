"""An interpreter of the PTX that Triton emits for this project's kernels.

``Program`` parses a kernel, ``launch`` executes it on CPU tensors. All threads of all programs run
at once, as numpy arrays with one element per thread. Divided warps are executed branch by branch,
lowest address first.

Every access to global memory must lie inside a tensor, every access to shared memory inside the
program's allocation, and both must be aligned. Unwritten shared memory is NaN. Shared memory that
one warp writes must not be accessed by another warp before the next barrier. Shuffles and matrix
accesses need all lanes that they read. A violation raises an ``Error`` with the instruction.

Approximate instructions (``ex2``, ``lg2``, ``rcp``, ``div.full``) return the rounded exact result.
Time, caches, and the errors of ptxas are not modeled.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from ptx_memory import Error, Memory, SharedMemory
from ptx_values import FUNCTIONS, UNSIGNED, Array, decode, encode, flushed, width
from torch import Tensor

WARP = 32
MAX_BLOCKS = 10_000  # basic blocks after which a launch counts as endless
_F = r"(rn\.)?(ftz\.)?(f32|f64|f16|bf16|f32x2|f16x2|bf16x2)"
_I = r"[bsu](16|32|64)"
_CACHE = r"(\.(L1|L2)::\w+)*"
_VECTOR = r"(\.v[248])?"
OPCODES = (
    # Arithmetic on the type named last. Integers wrap. .ftz flushes subnormal numbers to zero.
    (rf"(add|sub|neg|abs)\.({_F}|{_I})", "elementwise"),
    (rf"(mul|fma)\.{_F}|(mul|mad)\.lo\.{_I}", "elementwise"),
    (r"(fma|add|sub)\.rn\.f32\.b?f16", "elementwise"),  # the last operand and the result are f32
    (rf"(min|max)\.({_F}|{_I})", "elementwise"),  # of 2 or 3; a NaN loses
    (r"(min|max)\.(ftz\.)?NaN\.(f32|f16|bf16|f16x2|bf16x2)", "elementwise"),  # a NaN wins
    (r"(ex2|lg2|rcp|sqrt)\.(approx|rn)\.(ftz\.)?f(32|64)", "elementwise"),  # ex2, lg2: base 2
    (r"div\.(full|approx|rn)\.(ftz\.)?f(32|64)", "elementwise"),
    (r"(and|or|xor|not)\.(pred|b16|b32|b64)", "elementwise"),
    (r"(mul|mad)\.wide\.[su](16|32)", "wide"),  # the result (and mad's addend) is twice as wide
    (r"mul\.hi\.[su]32", "wide"),  # the upper half of that
    (r"(shl\.b|shr\.[su])(16|32|64)", "shift"),  # amounts from the width on give 0 or the sign
    (r"bfe\.[su](32|64)", "bit_field"),  # d = the bits of a from position b, count c
    (r"prmt\.b32", "permute_bytes"),  # digit i of c selects byte i of d among those of b:a
    # Conversion (d, a), or of a pair (d, upper half, lower half). .rni, .rzi: to an integer.
    (r"cvt\.((rn|rz|rni|rzi)\.)?(ftz\.)?\w+\.[a-z]+\d+", "convert"),
    (r"mov\.([bsu](16|32|64)|pred|f32|f64)", "move"),  # also packs {a, b} and unpacks
    (r"selp\.[bsuf](16|32|64)", "select"),  # d = a where the predicate c holds, else b
    # Comparison. With a NaN false, or true if the comparison ends in u.
    (r"setp\.((eq|ne|lt|le|gt|ge)u?|num|nan)\.(ftz\.)?([bsuf]\d+|bf16)", "compare"),
    (r"ld\.param\.[bu](32|64)", "load_parameter"),
    (rf"ld\.(global|shared|shared::cta){_CACHE}{_VECTOR}\.[bu](8|16|32|64)", "load"),
    (rf"st\.(global|shared|shared::cta){_CACHE}{_VECTOR}\.[bu](8|16|32|64)", "store"),
    # 8 x 8 matrices of 16 bits in shared memory. Lane 8 j + r holds the address of row r of matrix
    # j; a thread's register j holds two adjacent values of a row, or of a column with .trans.
    (r"(st|ld)matrix\.sync\.aligned\.m8n8\.x[124](\.trans)?\.shared(::cta)?\.b16", "matrix"),
    (r"shfl\.sync\.(bfly|idx)\.b32", "shuffle"),  # a's value in another lane of the warp
    (r"redux\.sync\.(min|max|add)\.(NaN\.)?([su]32|f32)", "warp_reduction"),
    (r"bar\.warp\.sync", "nothing"),  # lanes of a warp run in step
    # Ends of a basic block.
    (r"bra(\.uni)?", "branch"),
    (r"ret", "leave"),
    (r"bar\.sync|barrier\.sync\.aligned", "barrier"),
)


@dataclass(frozen=True)
class Instruction:
    """One line of PTX."""

    text: str
    guard: str  # predicate register, or empty
    negated: bool
    name: str
    suffixes: tuple[str, ...]
    operands: tuple[str, ...]
    method: str

    @property
    def type(self) -> str:
        """The type of the sources, which the opcode names last."""
        return self.suffixes[-1]

    @classmethod
    def parse(cls, text: str) -> "Instruction":
        found = re.fullmatch(r"(?:@(!?)(%\w+)\s+)?([a-z][\w.:]*)\s*(.*)", text, re.DOTALL)
        if found is None:
            raise Error(f"this is no instruction: {text}")
        negation, guard, opcode, rest = found.groups()
        method = next((name for pattern, name in OPCODES if re.fullmatch(pattern, opcode)), None)
        if method is None:
            raise Error(f"unknown opcode {opcode} in: {text}; add it to OPCODES in {__file__}")
        name, *suffixes = opcode.split(".")
        operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", rest)
        return cls(text, guard or "", bool(negation), name, (*suffixes,), (*operands,), method)


def registers(operand: str) -> list[str]:
    """The names in an operand such as ``{%r1, %r2}`` or ``%r1``."""
    return re.findall(r"[%\w.-]+", operand)


class Program:
    """A parsed kernel."""

    def __init__(self, ptx: str) -> None:
        found = re.search(r"\.visible \.entry (\w+)\((.*?)\)(.*?)\n\{(.*?)\n\}", ptx, re.DOTALL)
        if found is None:
            raise Error("the PTX has no kernel")
        self.name, parameters, directives, body = found.groups()
        self.parameters = re.findall(r"(\w+)(?:,|$)", parameters, re.MULTILINE)
        self.num_threads = int(re.search(r"\.(?:reqntid|maxntid) (\d+)", directives)[1])
        self.code: list[Instruction] = []
        self.labels: dict[str, int] = {}
        self.widths: dict[str, int] = {}
        body = re.sub(r"//.*", "", body)
        for line in re.split(r"[;\n]", re.sub(r"(\$L\w+):", r"\n\1:\n", body)):
            line = line.strip()
            if register := re.match(r"\.reg \.(\w+)\s+%(\w+)<", line):
                self.widths[register[2]] = width(register[1])
            elif line.endswith(":"):
                self.labels[line[:-1]] = len(self.code)
            elif line and not line.startswith("."):
                self.code.append(Instruction.parse(line))
        ends = (k + 1 for k, op in enumerate(self.code) if op.method in ("branch", "barrier"))
        self.starts = {*self.labels.values(), *ends}
        """Positions of the first instructions of basic blocks"""


@dataclass
class Launch:
    """The state of one launch: registers of all threads, and the position of each."""

    program: Program
    grid: int
    parameters: dict[str, int]
    memory: Memory
    shared_size: int
    values_of: dict[str, Array] = field(default_factory=dict)

    def __post_init__(self) -> None:
        threads = self.program.num_threads
        self.threads = np.arange(self.grid * threads)
        self.lanes = self.threads % WARP
        self.first_lanes = self.threads - self.lanes
        programs, local = self.threads // threads, self.threads % threads
        self.special = {"%tid.x": local.astype(np.uint32), "%ctaid.x": programs.astype(np.uint32)}
        self.shared = SharedMemory(self.shared_size, programs, local // WARP)
        self.position = np.zeros(len(self.threads), np.int64)
        self.waiting = np.zeros(len(self.threads), np.bool_)

    def run(self) -> None:
        end = len(self.program.code)
        for _block in range(MAX_BLOCKS):
            ready = (self.position < end) & ~self.waiting
            if ready.any():
                at = int(self.position[ready].min())
                self.run_block(at, ready & (self.position == at))
            elif self.waiting.any():
                self.release()
            else:
                return
        raise Error("the kernel does not end")

    def release(self) -> None:
        """Let the threads continue, which all wait at a barrier or have ended."""
        at = np.where(self.waiting, self.position, -1).reshape(self.grid, -1)
        if ((at >= 0) & (at != at.max(1, keepdims=True))).any():
            raise Error("threads of a program wait at different barriers")
        self.shared.pass_barrier()
        self.waiting[:] = False

    def run_block(self, at: int, active: Array) -> None:
        """Execute one basic block with the active threads."""
        code, starts = self.program.code, self.program.starts
        while at < len(code):
            op, mask = code[at], active
            at += 1
            self.position[active] = at
            if op.guard:
                holds = self.value(op.guard, 1)
                mask = active & (~holds if op.negated else holds)
            if mask.any():
                try:
                    result = getattr(self, op.method)(op, mask)
                    if result is not None:
                        self.put(op.operands[0], result, mask)
                except Exception as error:
                    raise Error(f"{self.program.name}: {error}, in: {op.text}") from error
            if at in starts:
                return

    def value(self, operand: str, bits: int) -> Array:
        """The bits of an operand, by thread or one for all."""
        if operand in self.special:
            return self.special[operand]
        if operand.startswith("%"):
            if operand not in self.values_of:
                raise Error(f"register {operand} is read before it is written")
            register = self.values_of[operand]
            return register if bits == 1 else register.astype(UNSIGNED[bits], copy=False)
        number = 0 if operand == "global_smem" else int(re.sub("^0[fd]", "0x", operand), 0)
        return np.full(1, number & ((1 << bits) - 1), UNSIGNED[bits])

    def values(self, operands: Sequence[str], type_: str) -> list[Array]:
        return [decode(self.value(operand, width(type_)), type_) for operand in operands]

    def put(self, operand: str, bits: Array, mask: Array) -> None:
        """Write a register in the threads of the mask."""
        if operand == "_":
            return  # a value that is not needed
        dtype = UNSIGNED[self.program.widths[re.match(r"%([a-z]+)", operand)[1]]]
        bits = np.broadcast_to(bits.astype(dtype, copy=False), self.threads.shape)
        if not mask.all():
            old = self.values_of.get(operand)
            bits = np.where(mask, bits, np.zeros_like(bits) if old is None else old)
        self.values_of[operand] = bits

    def address(self, operand: str, bits: int) -> Array:
        base, _, offset = operand.strip("[] ").partition("+")
        start = self.value(base.strip(), bits).astype(np.int64) + int(offset or 0)
        return np.broadcast_to(start, self.threads.shape)

    def elementwise(self, op: Instruction, mask: Array) -> Array:
        to = "f32" if "f32" in op.suffixes else op.type
        values = self.values(op.operands[1:-1], op.type) + self.values(op.operands[-1:], to)
        flush = flushed if "ftz" in op.suffixes else np.asarray
        values = [flush(value.astype(np.float32) if to != op.type else value) for value in values]
        function = FUNCTIONS[op.name + "NaN" * ("NaN" in op.suffixes)]
        reduces = op.name in ("min", "max")
        result = function.reduce(np.broadcast_arrays(*values)) if reduces else function(*values)
        return encode(flush(result), to)

    def wide(self, op: Instruction, mask: Array) -> Array:
        bits = width(op.type)
        twice = f"{op.type[0]}{2 * bits}"
        factors = self.values(op.operands[1:3], op.type)
        a, b = (factor.astype(f"{factor.dtype.kind}{bits // 4}") for factor in factors)
        if op.suffixes[0] == "hi":
            return encode(a * b >> bits, op.type)
        return encode(FUNCTIONS[op.name](a, b, *self.values(op.operands[3:], twice)), twice)

    def shift(self, op: Instruction, mask: Array) -> Array:
        bits = width(op.type)
        (value,), amount = self.values(op.operands[1:2], op.type), self.value(op.operands[2], 32)
        inside = np.minimum(amount, bits - 1).astype(value.dtype)
        moved = value << inside if op.name == "shl" else value >> inside
        return encode(moved if op.type[0] == "s" else np.where(amount < bits, moved, 0), op.type)

    def bit_field(self, op: Instruction, mask: Array) -> Array:
        bits = width(op.type)
        value, position, count = (self.value(operand, bits) for operand in op.operands[1:])
        left = decode(value << (bits - count - position), op.type)
        return encode(left >> (bits - count).astype(left.dtype), op.type)

    def permute_bytes(self, op: Instruction, mask: Array) -> Array:
        low, high, selection = (self.value(x, 32).astype(np.int64) for x in op.operands[1:])
        both, result = low | (high << 32), np.int64(0)
        for i in range(4):
            digit = (selection >> (4 * i)) & 15
            byte = (both >> (digit % 8 * 8)) & 0xFF
            byte = np.where(digit >= 8, (byte >> 7) * 0xFF, byte)
            result = result | (byte << (8 * i))
        return result

    def convert(self, op: Instruction, mask: Array) -> Array:
        values = self.values(op.operands[1:], op.type)
        to = op.suffixes[-2]
        if len(values) == 2:
            high, low = (encode(value, to[:-2]).astype(np.uint32) for value in values)
            return (high << np.uint32(16)) | low
        round_ = {"rni": np.rint, "rzi": np.trunc}.get(op.suffixes[0], np.asarray)
        return encode(round_(values[0]), to)

    def move(self, op: Instruction, mask: Array) -> Array | None:
        bits = width(op.type)
        target, source = map(registers, op.operands)
        if len(target) > 1:
            value, part = self.value(*source, bits), bits // len(target)
            for k, name in enumerate(target):
                self.put(name, value >> UNSIGNED[bits](k * part), mask)
            return None
        part = bits // len(source)
        # Half of a pair may be undefined if only the other half is used: make it NaN.
        for name in source if len(source) > 1 else ():
            if name[0] == "%" and name not in self.values_of:
                self.put(name, np.full(1, -1).astype(UNSIGNED[part]), mask | True)
        words = [self.value(name, part).astype(UNSIGNED[bits]) for name in source]
        return sum(word << k * part for k, word in enumerate(words))

    def select(self, op: Instruction, mask: Array) -> Array:
        yes, no = (self.value(operand, width(op.type)) for operand in op.operands[1:3])
        return np.where(self.value(op.operands[3], 1), yes, no)

    def compare(self, op: Instruction, mask: Array) -> Array:
        name = op.suffixes[0]
        a, b = self.values(op.operands[1:], op.type)
        nan = np.isnan(a) | np.isnan(b)
        if name in ("num", "nan"):
            return nan if name == "nan" else ~nan
        result = FUNCTIONS[name[:2]](a, b)
        return result | nan if name.endswith("u") else result & ~nan

    def load_parameter(self, op: Instruction, mask: Array) -> Array:
        return self.value(str(self.parameters[op.operands[1].strip("[] ")]), width(op.type))

    def locate(self, op: Instruction, operand: str, count: int, mask: Array) -> tuple[Array, Array]:
        """A memory as words of the instruction's type, and the words that the threads access."""
        size = width(op.type) // 8
        if op.suffixes[0] == "global":
            memory, at = self.memory.bytes, self.address(operand, 64)[mask]
            self.memory.check(at, size * count)
        else:
            memory, at = self.shared.bytes, self.address(operand, 32)[mask]
            at = self.shared.locate(at, self.threads[mask], size * count, op.name == "st")
        return memory.view(UNSIGNED[8 * size]), at // size

    def load(self, op: Instruction, mask: Array) -> None:
        names = registers(op.operands[0])
        words, at = self.locate(op, op.operands[1], len(names), mask)
        for k, name in enumerate(names):
            result = np.zeros(len(mask), words.dtype)
            result[mask] = words[at + k]
            self.put(name, result, mask)

    def store(self, op: Instruction, mask: Array) -> None:
        names = registers(op.operands[1])
        words, at = self.locate(op, op.operands[0], len(names), mask)
        for k, name in enumerate(names):
            value = self.value(name, width(op.type))
            words[at + k] = np.broadcast_to(value, mask.shape)[mask]

    def matrix(self, op: Instruction, mask: Array) -> None:
        self.check_warps(mask)
        stored = op.name == "stmatrix"
        address, names = op.operands if stored else op.operands[::-1]
        starts, words = self.address(address, 32), self.shared.bytes.view(np.uint16)
        for j, name in enumerate(registers(names)):
            result = np.zeros(len(mask), np.uint32)
            for half in range(2):
                row, column = self.lanes // 4, 2 * (self.lanes % 4) + half
                if "trans" in op.suffixes:
                    row, column = column, row
                start = starts[self.first_lanes + 8 * j + row][mask]
                if (start % 16).any():
                    raise Error("misaligned row of a matrix")
                at = start + 2 * column[mask]
                at = self.shared.locate(at, self.threads[mask], 2, stored) // 2
                if stored:
                    words[at] = (self.value(name, 32) >> np.uint32(16 * half))[mask] & 0xFFFF
                else:
                    result[mask] |= words[at].astype(np.uint32) << np.uint32(16 * half)
            if not stored:
                self.put(name, result, mask)

    def shuffle(self, op: Instruction, mask: Array) -> Array:
        value = np.broadcast_to(self.value(op.operands[1], 32), mask.shape)
        distance = self.value(op.operands[2], 32).astype(np.int64)
        lane = self.lanes ^ distance if op.suffixes[1] == "bfly" else self.lanes * 0 + distance
        source = self.first_lanes + lane % WARP
        if not mask[source[mask]].all():
            raise Error("a shuffle reads an inactive lane")
        return value[source]

    def warp_reduction(self, op: Instruction, mask: Array) -> Array:
        self.check_warps(mask)
        value = np.broadcast_to(self.values(op.operands[1:2], op.type)[0], mask.shape)
        function = FUNCTIONS[op.suffixes[1] + "NaN" * ("NaN" in op.suffixes)]
        return encode(np.repeat(function.reduce(value.reshape(-1, WARP), axis=1), WARP), op.type)

    def check_warps(self, mask: Array) -> None:
        warps = mask.reshape(-1, WARP)
        if (warps.any(1) != warps.all(1)).any():
            raise Error("not all lanes of a warp are active")

    def nothing(self, op: Instruction, mask: Array) -> None:
        pass

    def branch(self, op: Instruction, mask: Array) -> None:
        self.position[mask] = self.program.labels[op.operands[0]]

    def leave(self, op: Instruction, mask: Array) -> None:
        self.position[mask] = len(self.program.code)

    def barrier(self, op: Instruction, mask: Array) -> None:
        self.waiting[mask] = True


def launch(program: Program, grid: int, arguments: Sequence[Tensor | int], shared: int) -> None:
    """Execute a kernel on CPU tensors. Its last parameters may be missing; they are null."""
    memory = Memory([value for value in arguments if isinstance(value, Tensor)])
    numbers = [memory.address(x) if isinstance(x, Tensor) else x for x in arguments]
    numbers += [0] * (len(program.parameters) - len(numbers))
    parameters = dict(zip(program.parameters, numbers, strict=True))
    with np.errstate(all="ignore"):
        Launch(program, grid, parameters, memory, -(-max(shared, 1) // 16) * 16).run()
    memory.copy_back()
