"""Every Triton kernel compiles for GPUs that are not here, and keeps its values in registers there."""

import ast
import re
from pathlib import Path

import pytest

from tests.support.offline import ROOT, ROWS, TARGETS, compiled, loops_with

pytest.importorskip("triton")

pytestmark = pytest.mark.gpu


def launched(path: Path) -> set[str]:
    """The @triton.jit functions of a file that no other of them calls."""
    functions = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]
    jitted = {f.name for f in functions if any("triton.jit" in ast.unparse(d) for d in f.decorator_list)}
    calls = (call for f in functions if f.name in jitted for call in ast.walk(f) if isinstance(call, ast.Call))
    return jitted - {call.func.id for call in calls if isinstance(call.func, ast.Name)}


def test_every_kernel_has_a_row():
    ops = ROOT / "octav_fx" / "ops"
    named = {".".join(path.relative_to(ops).parts[:-1]): launched(path) for path in ops.rglob("kernel.py")}
    # optimal_clip launches those of others.
    kernels = {name: found for name, found in named.items() if found}
    assert {op: {row.kernel for row in rows} for op, rows in ROWS.items()} == kernels


@pytest.mark.parametrize("op", sorted(ROWS))
def test_nothing_is_spilled(op):
    found = compiled(op)
    assert {one.target for one in found} == set(TARGETS)
    for one in found:
        assert one.text
        if one.target.startswith("sm_"):
            assert one.local == 0, f"{one.kernel}, row {one.row}, {one.target}: {one.local} bytes, {one.registers} regs"


@pytest.mark.parametrize("op", ["dequantize", "fake_quantize", "quantize"])
def test_what_is_equal_bit_for_bit_uses_no_approximation(op):
    # The interpreter divides exactly and keeps subnormal numbers, whatever the source says.
    for one in compiled(op):
        assert not re.search(r"div\.(full|approx)|rcp\.approx|\.ftz", one.text), f"{one.kernel}, {one.target}"


def test_the_tail_is_counted_in_registers():
    row = ROWS["kernels.solve_tail"][0]
    elements = 2 * row.constexprs["BLOCK"] // (32 * row.num_warps)
    (warm,) = (one for one in compiled("kernels.solve_tail") if one.row == 0 and one.target == "sm_90")
    # Not that which adds a copy of the bins to another.
    loops = [loop for loop in loops_with(warm.machine, "REDG") if sum("LDG" in text for text in loop) >= elements // 2]
    assert len(loops) == 2
    # With a bin that is counted apart, and without: 128 instructions in a clock and multiprocessor read 2 bytes for
    # 17.5, which is 3.4 TB/s at 1.75 GHz, what the memory of an H100 gives.
    for loop, limit in zip(sorted(loops, key=len), (17.5, 21.5), strict=True):
        assert len(loop) <= limit * elements
        assert not any(name in text for text in loop for name in ("STS", "LDS", "BAR"))
        loads = [i for i, text in enumerate(loop) if "LDG" in text]
        assert len(loads) == elements // 2
        # All are on their way before the first is used.
        assert max(loads) < min(i for i, text in enumerate(loop) if "REDG" in text)
