"""Compile Triton kernels for GPUs that are not on this machine, and read what the assembler made of them.

A kernel is a row of ROWS. compiled(op) compiles all rows of an op for all TARGETS, once in a process, in a process of
its own: where TRITON_INTERPRET=1 is set, triton.jit and the functions of triton.language are interpreted, and nothing
in them can be compiled any more. Triton's own cache on disk makes the second run fast.

Another version of Triton compiles them where PYTHONPATH names a folder with it first, made by
`pip install --no-deps --target FOLDER triton==3.6.0`: PYTHONPATH=FOLDER pytest tests/ops/test_offline.py.
"""

import dataclasses
import functools
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Compute capabilities of NVIDIA, and one architecture of AMD.
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")


@dataclass(frozen=True)
class Row:
    """One kernel as it is launched.

    kernel: its name in the kernel.py of the op. signature: parameter -> Triton's type of it, such as "*bf16" or
    "i32", or a tuple of types; ":16" behind one says what Triton finds out at a launch, that an address or a number
    divides by 16.
    constexprs: parameter -> value. A parameter that is None at a launch, or an integer 1, is a constexpr for Triton.
    targets: where this row is ever launched.
    """

    kernel: str
    signature: dict[str, str | tuple[str, ...]]
    constexprs: dict[str, int | float | bool | str | None]
    num_warps: int = 4
    num_stages: int = 3
    targets: tuple[str, ...] = TARGETS
    # Further options of a launch, such as enable_fp_fusion.
    options: tuple[tuple[str, int | bool], ...] = ()


def _int_matmul(
    warps: int, stages: int, m: int, n: int, k: int, *targets: str, halves: bool = False, float8: bool = False
) -> list[Row]:
    """A tile at its best, and at its worst: codes 0..255, a rest of K, and a result of four bytes."""
    codes = "*fp8e4nv" if float8 else "*i8"
    pointers = {"x": codes, "x_scale": "*fp32", "w": codes, "w_scale": "*fp32", "bias": "*fp32", "out": "*bf16"}
    best = {f"{name}_ptr": f"{kind}:16" for name, kind in pointers.items()}
    best |= dict.fromkeys(("out_n", "k", "x_stride", "w_stride", "out_stride"), "i32:16") | {"m": "i32", "n": "i32"}
    worst = {**best, "out_ptr": "*fp32:16", "w_sums_ptr": "*i32:16"}
    shape = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "GROUP": 8}
    flags = {
        "SCALED_ROWS": True,
        "SCALED_COLUMNS": True,
        "HALVES": halves,
        "PROMOTED": 128 if float8 else None,
        **shape,
    }
    launch = {"num_warps": warps, "num_stages": stages, "targets": targets, "options": (("enable_fp_fusion", False),)}
    return [
        Row("int_matmul_kernel", best, {"w_sums_ptr": None, "OFFSET": 0, "EVEN_K": True, **flags}, **launch),
        Row("int_matmul_kernel", worst, {"OFFSET": 0 if float8 else 128, "EVEN_K": False, **flags}, **launch),
    ]


# A tensor of its own clip, and one by channel whose channels come last, so that inner is a constant.
_SIZES = {"n": "i32:16", "channels": "i32", "inner": "i32"}
_TILED = {"BLOCK": 2048, "WIDE": False}
_SIGNED = {"STEPS": 8, "LOW": -8, "HIGH": 7}
_UNSIGNED = {"STEPS": 16, "LOW": 0, "HIGH": 15}


def _elementwise(kernel: str, pointers: dict[str, str], **constexprs) -> Row:
    signature = {f"{name}_ptr": f"{kind}:16" for name, kind in {**pointers, "clip": "*fp32"}.items()}
    constexprs = {**_TILED, "PER_CHANNEL": False, **constexprs}
    sizes = {name: kind for name, kind in _SIZES.items() if name not in constexprs}
    if constexprs["WIDE"]:
        sizes["n"] = "i64:16"
    return Row(kernel, {**signature, **sizes, **({"ceiling": "fp32"} if "BELOW" in constexprs else {})}, constexprs)


_BFLOAT16 = {"x": "*bf16", "out": "*bf16"}
_TABLES = {**_BFLOAT16, "levels": "*fp32", "edges": "*fp32"}
_LEVELS = {"LEAST": -6.0, "GREATEST": 6.0, "STEPS": 6.0, "MANTISSA": 1, "LEAST_EXPONENT": 0}
_CODES = {"SATURATED": 32, "NOT_FINITE": -128, "SIGNED": False}
# Of codes that quantize writes: 16 from 0 on, and 16 around 0.
_FROM_ZERO = {"LOW": 0, "HIGH": 15, "BELOW": -2, **_CODES}
_AROUND_ZERO = {"LOW": -8, "HIGH": 7, "BELOW": -9, **_CODES, "SIGNED": True}
_EVEN = {"KIND": 0, "EDGES": 1}
_STORED = {"codes": "*i8", "out": "*bf16", "levels": "*fp32"}


def _solve_rows(kind: str, method: int, block: int, fits: bool, contiguous: bool = True) -> Row:
    signature = {"x_ptr": f"*{kind}:16", "hint_ptr": "*fp32:16", "clip_ptr": "*fp32:16", "n": "i32", "rows": "i32"}
    constexprs = {**_SIGNED, "SIGNED": True, "METHOD": method, "BLOCK": block, "CONTIGUOUS": contiguous, "FITS": fits}
    warps = min(max(block // 512, 1), 16)
    return Row("solve_rows_kernel", {**signature, "inner": "i32"}, constexprs, num_warps=warps)


def _search_rows(of: str, halvings: int, kind: int, scale: int, search: bool = True, out: str = "*fp32") -> Row:
    """A launch that writes levels or codes where out is not the clips of float32 again."""
    pointers = dict.fromkeys(("clip", "unit", "shares", "levels", "edges"), "*fp32")
    signature = {f"{name}_ptr": f"{pointer}:16" for name, pointer in {"x": of, "out": out, **pointers}.items()}
    sizes = {**dict.fromkeys(("rows", "n", "shares", "edges"), "i32"), "ceiling": "fp32"}
    levels = {"KIND": kind, "LEAST": -8.0, "GREATEST": 7.0, "STEPS": 8.0, "MANTISSA": 1, "LEAST_EXPONENT": 0}
    rows = max(2048 >> halvings, 1)
    tried = {"SEARCH": search, "COARSE": scale > 2}
    writes = {"*fp32": 0, "*bf16": 1, "*i8": 2}[out]
    constexprs = {
        **levels,
        "SCALE": scale,
        **tried,
        **_AROUND_ZERO,
        "WRITES": writes,
        "ROWS": rows,
        "HALVINGS": halvings,
    }
    warps = min(max((rows << halvings) // 256, 1), 16)
    options = (("enable_fp_fusion", False), *((("maxnreg", 128),) if warps == 16 else ()))
    return Row("search_rows_kernel", {**signature, **sizes}, constexprs, num_warps=warps, options=options)


def _solve_pass(which: int, method: int) -> Row:
    pointers = {"x": "*bf16", "hint": "*fp32", "clip": "*fp32", "numbers": "*fp64", "counters": "*i64"}
    signature = {f"{name}_ptr": f"{kind}:16" for name, kind in {**pointers, "partials": "*fp64"}.items()}
    constexprs = {**_SIGNED, "PASS": which, "SIGNED": True, "METHOD": method, "BLOCK": 4096, "PROGRAMS": 512}
    return Row("solve_pass_kernel", {**signature, "n": "i32:16"}, constexprs, num_warps=8)


def _solve_tail(stage: int, dtype: int, pairs: bool = True, **ones) -> Row:
    """A launch for bfloat16, float16 or float32; ones: what is 1 at a launch."""
    infinite, shift, span = [(0x7F80, 0, 3072), (0x7C00, 0, 9216), (0x7F800000, 16, 3072)][dtype]
    bins = "*i64" if shift and stage < 2 else "*i32"
    pointers = {"x": "*i32" if pairs or shift else "*i16", "hint": "*fp32", "clip": "*fp32", "bins": bins}
    pointers |= {"merged": "*i64" if stage < 2 else "*i32", "every_bin": "*i64" if shift else "*i32"}
    pointers |= {"counters": "*i64", "numbers": "*fp64"}
    signature = {f"{name}_ptr": f"{pointer}:16" for name, pointer in pointers.items()}
    constexprs = {"STAGE": stage, "SPAN": [span, 2**15, 2**16][stage], "UNKNOWN": 14720, "SIGNED": True}
    constexprs |= {"NOISE": 1 / 768, "INFINITE": infinite, "SHIFT": shift, "DTYPE": dtype}
    constexprs |= {"PAIRS": pairs and not shift, "BLOCK": 2048, "CHUNK": 1024}
    sizes = {
        "n": "i32:16",
        "keep": "fp32",
        "unit": "i32",
        "cold_replicas": "i32",
        **({} if ones else {"replicas": "i32"}),
    }
    # As solve_tail launches it on NVIDIA's.
    registers = (("maxnreg", 96),)
    return Row("solve_tail_kernel", {**signature, **sizes}, {**constexprs, **ones}, num_warps=8, options=registers)


def _weights(kind: str, method: int, block: int, warps: int, fits: bool = True, count: int = 32) -> Row:
    addresses = {"weights": f"*{kind}:16", "outs": f"*{kind}:16", "hints": "*fp32:16"}
    numbers = dict.fromkeys(("firsts", "offsets", "lengths"), "i32")
    signature = {name: (of,) * count for name, of in {**addresses, **numbers}.items()}
    constexprs = {"SOLVED_STEPS": 8, "STEPS": 8, "METHOD": method, "WEIGHTS": count, "BLOCK": block, "FITS": fits}
    return Row("fake_quantize_weights_kernel", {**signature, "clips_ptr": "*fp32:16"}, constexprs, num_warps=warps)


# Package of octav_fx.ops -> how its kernels are launched. Each @triton.jit function that is launched has a row.
ROWS: dict[str, tuple[Row, ...]] = {
    "fake_quantize": (
        _elementwise("fake_quantize_kernel", _BFLOAT16, **_SIGNED),
        _elementwise("fake_quantize_kernel", {"x": "*fp32", "out": "*fp32"}, **_SIGNED, PER_CHANNEL=True),
        _elementwise("fake_quantize_kernel", _BFLOAT16, **_UNSIGNED, PER_CHANNEL=True, inner=1, WIDE=True),
        # E2M1 and NF4.
        _elementwise("fake_quantize_levels_kernel", _TABLES, **_LEVELS, KIND=1, EDGES=1, PER_CHANNEL=True),
        _elementwise("fake_quantize_levels_kernel", _TABLES, **_LEVELS, KIND=2, EDGES=15, PER_CHANNEL=True),
        _elementwise("fake_quantize_backward_kernel", {"grad": "*bf16", **_BFLOAT16}, SIGNED=True, MAD=True),
        _elementwise("fake_quantize_backward_kernel", {"grad": "*bf16", **_BFLOAT16}, SIGNED=False, MAD=False),
    ),
    "fake_quantize_weights": (
        _weights("fp32", 0, 128, 1),
        _weights("fp32", 0, 1024, 2),
        _weights("fp32", 1, 8192, 16),
        _weights("bf16", 1, 8192, 16, fits=False),
    ),
    # Integers without and with a sign, E2M1 and NF4.
    "quantize": (
        _elementwise("quantize_kernel", {**_TABLES, "out": "*i8"}, **_LEVELS, **_EVEN, **_FROM_ZERO),
        _elementwise("quantize_kernel", {**_TABLES, "x": "*fp32", "out": "*i16"}, **_LEVELS, **_EVEN, **_AROUND_ZERO),
        _elementwise("quantize_kernel", {**_TABLES, "out": "*i8"}, **_LEVELS, KIND=1, EDGES=15, **_AROUND_ZERO),
        _elementwise("quantize_kernel", {**_TABLES, "out": "*i8"}, **_LEVELS, KIND=2, EDGES=15, **_AROUND_ZERO),
    ),
    "dequantize": (
        _elementwise("dequantize_kernel", _STORED, **_UNSIGNED, **_CODES, EVEN=True),
        _elementwise(
            "dequantize_kernel",
            {**_STORED, "codes": "*i16", "out": "*fp32"},
            **_SIGNED,
            **{**_CODES, "SIGNED": True},
            EVEN=True,
        ),
        _elementwise("dequantize_kernel", _STORED, **_SIGNED, **{**_CODES, "SIGNED": True}, EVEN=False),
    ),
    "zero_clipped": (
        Row(
            "zero_clipped_kernel",
            {"grad_ptr": "*bf16:16", "codes_ptr": "*i8:16", "n": "i32:16"},
            {"LOW": -8, "HIGH": 7, **_TILED},
        ),
    ),
    # "octav", "octav-grid" and "max", held and read again.
    "kernels.solve_rows": (
        _solve_rows("fp32", 0, 512, True),
        _solve_rows("fp32", 1, 2**14, True),
        _solve_rows("bf16", 1, 2**14, False, contiguous=False),
        _solve_rows("fp32", 2, 4096, True),
    ),
    # Integers in groups of 32, MXFP4, NVFP4, NF4 in groups of 64 under float16, the longest token, and "max"; some with
    # their levels, or codes.
    "kernels.search_rows": (
        _search_rows("*fp32", 5, 0, 0),
        _search_rows("*bf16", 5, 1, 3),
        _search_rows("*bf16", 4, 1, 4),
        _search_rows("*fp32", 6, 2, 2),
        _search_rows("*fp32", 13, 0, 0),
        _search_rows("*bf16", 10, 0, 0, search=False),
        _search_rows("*bf16", 5, 1, 3, out="*i8"),
        _search_rows("*fp32", 6, 2, 2, out="*i8"),
        _search_rows("*bf16", 12, 0, 0, out="*bf16"),
        _search_rows("*bf16", 10, 0, 0, search=False, out="*i8"),
    ),
    "kernels.solve_passes": (
        *(_solve_pass(which, 0) for which in range(3)),
        *(_solve_pass(which, 1) for which in range(1, 4)),
        _solve_pass(0, 2),
    ),
    # bfloat16, float16 and float32.
    "kernels.solve_tail": (
        *(_solve_tail(stage, 0) for stage in range(2)),
        _solve_tail(0, 0, pairs=False),
        _solve_tail(0, 1),
        *(_solve_tail(stage, 2) for stage in range(3)),
        _solve_tail(2, 2, replicas=1),
    ),
    "int_matmul": (
        *_int_matmul(16, 3, 128, 256, 128, "sm_90"),
        *_int_matmul(8, 3, 128, 128, 128, "sm_80", "sm_90"),
        *_int_matmul(4, 4, 64, 64, 128, "sm_80", "sm_90"),
        *_int_matmul(8, 3, 128, 128, 128, "sm_90", float8=True),
        *_int_matmul(4, 4, 64, 64, 128, "sm_90", float8=True),
        *_int_matmul(8, 3, 128, 128, 128, "sm_100", halves=True),
        *_int_matmul(4, 4, 64, 64, 128, "sm_100", halves=True),
        *_int_matmul(8, 2, 128, 128, 64, "gfx942"),
        *_int_matmul(4, 2, 64, 64, 64, *TARGETS),
    ),
}


@dataclass(frozen=True)
class Compiled:
    """What came out for one row and one target. The numbers are of NVIDIA's targets only, per thread and in bytes."""

    row: int
    kernel: str
    target: str
    # PTX of NVIDIA, assembly of AMD.
    text: str
    registers: int | None = None
    # Local memory: where registers are spilled to, on or off the stack.
    local: int | None = None
    # Shared memory of one program, in bytes.
    shared: int | None = None
    # What sm_90 executes: the instructions in their order, each with its address.
    machine: tuple[tuple[int, str], ...] = ()


@functools.cache
def compiled(op: str) -> tuple[Compiled, ...]:
    """Every row of the op for every target it names."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "compiled.json"
        command = [sys.executable, "-m", "tests.support.offline", op, str(path)]
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, f"{op}: not compiled:\n{done.stderr}"
        return tuple(Compiled(**fields) for fields in json.loads(path.read_text()))


def main(op: str, path: str) -> None:
    """Compile the rows of an op and write them as JSON; in a process without TRITON_INTERPRET."""
    module = importlib.import_module(f"octav_fx.ops.{op}.kernel")
    found = [
        _compile(getattr(module, row.kernel), index, row, target)
        for index, row in enumerate(ROWS[op])
        for target in row.targets
    ]
    Path(path).write_text(json.dumps([dataclasses.asdict(one) for one in found]))


def _compile(function, index: int, row: Row, target: str) -> Compiled:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    # Triton wants the parameters in their order.
    kinds = [row.signature.get(name, "constexpr") for name in function.arg_names]
    signature = {name: _bare(kind) for name, kind in zip(function.arg_names, kinds, strict=True)}
    attributes = {
        path: [["tt.divisibility", 16]]
        for position, kind in enumerate(kinds)
        for path, one in _paths(position, kind)
        if one.endswith(":16")
    }
    source = ASTSource(function, signature, row.constexprs, attributes)
    options = {"num_warps": row.num_warps, "num_stages": row.num_stages, **dict(row.options)}
    if target.startswith("sm_"):
        kernel = triton.compile(source, target=GPUTarget("cuda", int(target[3:]), 32), options=options)
        registers, local = _usage(kernel.asm["cubin"])
        machine = _machine(kernel.asm["cubin"]) if target == "sm_90" else ()
        return Compiled(index, row.kernel, target, kernel.asm["ptx"], registers, local, kernel.metadata.shared, machine)
    options.pop("maxnreg", None)
    kernel = triton.compile(source, target=GPUTarget("hip", target, 64), options=options)
    return Compiled(index, row.kernel, target, kernel.asm["amdgcn"])


def _bare(kind: str | tuple[str, ...]) -> str | tuple[str, ...]:
    return kind.partition(":")[0] if isinstance(kind, str) else tuple(one.partition(":")[0] for one in kind)


def _paths(position: int, kind: str | tuple[str, ...]) -> list[tuple[tuple[int, ...], str]]:
    """Return where in the arguments each type stands."""
    return [((position,), kind)] if isinstance(kind, str) else [((position, i), one) for i, one in enumerate(kind)]


def loops_with(machine: Sequence[tuple[int, str]], mnemonic: str) -> list[list[str]]:
    """Return the instructions of each loop that has one of this name in it, innermost loops alone."""
    jumps = [(int(m[1], 16), at) for at, text in machine if (m := re.search(r"\bBRA\b.* (?:0x)([0-9a-f]+)$", text))]
    loops = [(begin, end) for begin, end in jumps if begin < end]
    inner = [
        (b, e) for b, e in loops if not any((b, e) != other and b <= other[0] and other[1] <= e for other in loops)
    ]
    found = [[text for at, text in machine if begin <= at <= end] for begin, end in inner]
    return [texts for texts in found if any(mnemonic in text for text in texts)]


def _usage(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of local memory per thread."""
    printed = _dumped(cubin, "-res-usage")
    registers, stack, local = (int(_only(rf"\b{name}:(\d+)", printed)) for name in ("REG", "STACK", "LOCAL"))
    return registers, stack + local


def _machine(cubin: bytes) -> tuple[tuple[int, str], ...]:
    """Return what the GPU executes."""
    found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?) ;", _dumped(cubin, "-sass"))
    return tuple((int(at, 16), text) for at, text in found)


def _dumped(cubin: bytes, what: str) -> str:
    """Return what cuobjdump, which Triton brings along, prints."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, what, file.name], capture_output=True, text=True, check=True).stdout


def _only(pattern: str, text: str) -> str:
    found = re.findall(pattern, text)
    assert len(found) == 1, f"{pattern} {len(found)} times in {text}"
    return found[0]


if __name__ == "__main__":
    main(*sys.argv[1:])
