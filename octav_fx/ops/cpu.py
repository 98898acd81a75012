"""The CPU passes (ops/*/*.cpp): called through ctypes; built once with the machine's C++ compiler, or before.

Each build lies in the user's cache folder under the hash of its sources and flags. A wheel for release brings builds
for two kinds of CPU (setup.py). Without either the references run, three to ten times slower; a warning says so, once.
"""

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import math
import os
import shlex
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from octav_fx.errors import OctavError
from octav_fx.formats.granularity import Granularity

# Named extensions, not -march=native: a cache folder shared by unlike machines must never hold what one cannot run.
_ARCHITECTURE: Final = {
    "AVX2": ("-mavx2", "-mfma"),
    "AVX512": ("-mavx2", "-mfma", "-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mprefer-vector-width=512"),
}
_FOLDER: Final = Path(__file__).parent
# What setup.py puts into a wheel for release.
BUNDLED: Final = _FOLDER / "bundled"
# No -ffast-math: inf and NaN must be seen. These two only say that nobody reads errno or traps.
_FLAGS: Final = ("-O3", "-std=c++17", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off")

# The codes of elements.h.
TYPES: Final = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

# From so many elements on, a tensor is large enough for a slow way through it to be felt.
_SLOW_FROM: Final = 1 << 16

_INT, _LONG, _FLOAT, _POINTER = ctypes.c_int, ctypes.c_int64, ctypes.c_float, ctypes.c_void_p
_SIGNATURES: Final = {
    "octav_optimal_clip": (_POINTER, _INT, _LONG, _LONG, _POINTER, _POINTER, _INT, _INT, _INT, _INT),
    "octav_percentile": (_POINTER, _INT, _LONG, _LONG, _POINTER, _POINTER, _INT, _LONG, _INT),
    "octav_round_unclipped": (_POINTER, _INT, _LONG, _LONG, _POINTER, _POINTER, _INT, _FLOAT, _POINTER, _INT),
    "octav_search": (
        *(_POINTER, _INT, _LONG, _LONG, _POINTER, _POINTER, _INT, _FLOAT, _POINTER, _INT, _INT, _POINTER, _INT),
    ),
    "octav_sweep": (_POINTER, _INT, _LONG, _LONG, _POINTER, _POINTER, _INT, _INT, _INT),
    "octav_dequantize": (_POINTER, _POINTER, _POINTER, _INT, _LONG, _LONG, _LONG, _POINTER, _INT, _INT),
    "octav_fake_quantize": (_POINTER, _INT, _POINTER, _POINTER, _INT, _LONG, _LONG, _LONG, _POINTER, _INT),
    "octav_fake_quantize_backward": (
        *(_POINTER, _INT, _POINTER, _INT, _POINTER, _POINTER, _LONG, _LONG, _LONG, _INT, _INT, _INT),
    ),
    "octav_code_mean": (*(_POINTER,) * 4, *(_LONG,) * 3, *(_INT,) * 4, _FLOAT, _FLOAT),
    "octav_code_sum": (*(_POINTER,) * 6, _LONG, *(_INT,) * 6, _FLOAT, _FLOAT, _INT),
    "octav_depthwise": (*(_POINTER,) * 7, *(_LONG,) * 6, _INT, *(_FLOAT,) * 4, _INT, _INT),
    "octav_gated_codes": (*(_POINTER,) * 5, _LONG, _LONG, _LONG, _INT, _INT, _INT, _INT),
    "octav_integer_codes": (_POINTER, _POINTER, _POINTER, _LONG, _INT, _INT, _INT),
    "octav_integer_linear": (*(_POINTER,) * 7, _LONG, _LONG, _LONG, _INT, *(_FLOAT,) * 4, _INT, _INT),
    "octav_lookup": (_POINTER, _POINTER, _POINTER, _LONG, _INT),
    "octav_max_pool": (_POINTER, _POINTER, _INT, *(_LONG,) * 6, *(_INT,) * 9),
    "octav_integer_sum": (*(_POINTER,) * 5, _LONG, _INT, _INT, _INT, _INT),
    "octav_operand": (_POINTER, _INT, _POINTER, _LONG, _INT, _INT, _POINTER, _INT),
    "octav_filter_codes": (
        *(_POINTER, _INT, _POINTER, _POINTER, _POINTER, _LONG, _LONG, _LONG, _INT, _INT, _INT, _INT, _POINTER, _INT),
    ),
    "octav_windows": (_POINTER, _POINTER, _POINTER, _INT, _INT),
    "octav_scaled": (_POINTER, _POINTER, _INT, _POINTER, _POINTER, _POINTER, _INT, _LONG, _LONG, _INT),
    "octav_fake_quantize_filters": (
        *(_POINTER, _INT, _POINTER, _POINTER, _INT, _LONG, _LONG, _LONG, _INT, _INT, _INT, _INT),
    ),
    "octav_fake_quantize_filters_backward": (
        *(_POINTER, _INT, _POINTER, _INT, _POINTER, _POINTER, _LONG, _LONG, _LONG, _INT, _INT, _INT, _INT),
    ),
    "octav_quantize": (_POINTER, _INT, _POINTER, _POINTER, _LONG, _LONG, _LONG, _POINTER, _FLOAT, _INT, _INT),
}


@functools.cache
def library() -> ctypes.CDLL | None:
    """Load the kernels; return None, with a warning, where they cannot be built. OCTAV_FX_NATIVE=0 asks for None."""
    if os.environ.get("OCTAV_FX_NATIVE") == "0":
        return None
    try:
        loaded = ctypes.CDLL(str(_built()))
    except (OSError, subprocess.CalledProcessError) as error:
        detail = getattr(error, "stderr", None) or error
        warnings.warn(f"octav_fx: no C++ kernels, quantizers on the CPU will be slow: {detail}", stacklevel=2)
        return None
    for name, arguments in _SIGNATURES.items():
        function = getattr(loaded, name)
        function.argtypes, function.restype = arguments, None
    return loaded


def _built() -> Path:
    """Return the shared library for these sources and this machine, compiled if it is neither bundled nor cached."""
    capability, openmp = torch.backends.cpu.get_cpu_capability(), _openmp()
    if openmp and (bundled := BUNDLED / bundled_name(capability)).exists():
        return bundled
    compiler = _compiler()
    flags = [*_FLAGS, *_ARCHITECTURE.get(capability, ()), *openmp]
    identity = hashlib.sha256(" ".join([*compiler, *flags]).encode() + _sources_hash())
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "octav_fx"
    target = folder / f"kernels-{identity.hexdigest()[:16]}.so"
    if not target.exists():
        _compile_once(compiler, flags, target)
    return target


def bundled_name(capability: str) -> str:
    """Return the name of the build that a wheel holds for a CPU: of these sources and no others."""
    return f"passes-{capability}-{_sources_hash().hex()[:16]}.so"


def bundle(folder: Path) -> None:
    """Compile the passes for each kind of CPU into a folder, for a wheel."""
    for capability, flags in _ARCHITECTURE.items():
        _compile(_compiler(), [*_FLAGS, *flags, "-fopenmp"], folder / bundled_name(capability))


def _sources_hash() -> bytes:
    files = [*sorted(_FOLDER.glob("*/*.cpp")), *sorted(_FOLDER.rglob("*.h"))]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).digest()


def _compiler() -> list[str]:
    found = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    # CXX may bring a launcher or flags along.
    if not (compiler := shlex.split(found or "")):
        raise OSError("no C++ compiler found; install one or set CXX")
    return compiler


def _compile_once(compiler: list[str], flags: list[str], target: Path) -> None:
    """Compile, or wait for a process that does: those of one run begin at the same time."""
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        # Some network folders have no locks.
        with contextlib.suppress(OSError):
            fcntl.flock(folder, fcntl.LOCK_EX)
        if not target.exists():
            _compile(compiler, flags, target)
    finally:
        os.close(folder)


def _compile(compiler: list[str], flags: list[str], target: Path) -> None:
    folder = target.parent
    folder.mkdir(parents=True, exist_ok=True)
    sources = sorted(_FOLDER.glob("*/*.cpp"))
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        objects = [str(Path(scratch) / f"{source.parent.name}-{source.stem}.o") for source in sources]

        def compile_one(source: Path, output: str) -> None:
            command = [*compiler, *flags, "-c", str(source), "-o", output]
            subprocess.run(command, check=True, capture_output=True, text=True)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            # A list, so that what one raises is raised here.
            list(pool.map(compile_one, sources, objects))
        # Linked without an OpenMP runtime: the symbols come from the one that torch has loaded, so that there is
        # one pool of threads in the process and not two that spin against each other.
        built = Path(scratch) / target.name
        undefined = ["-undefined", "dynamic_lookup"] if os.uname().sysname == "Darwin" else []
        command = [*compiler, "-shared", *undefined, *objects, "-o", str(built)]
        subprocess.run(command, check=True, capture_output=True, text=True)
        # Without locks another process may be building the same: whoever is last replaces an equal file.
        built.replace(target)


def _openmp() -> tuple[str, ...]:
    """-fopenmp where torch's own OpenMP runtime is visible to later libraries, else one thread per pass."""
    try:
        ctypes.CDLL(None).GOMP_parallel  # noqa: B018
    except (AttributeError, OSError):
        return ()
    return ("-fopenmp",)


def checked(clip: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return a clip or hint as the kernels read it; one of another shape would be read beyond its end."""
    if clip.shape != shape:
        raise OctavError(f"a clip or hint of shape {tuple(clip.shape)} where x and dim ask for {shape}")
    return clip.to(torch.float32).contiguous()


def bounds(low: float | None, high: float | None) -> tuple[float, float]:
    """Return the bounds of a clamp as the kernels take them."""
    return -math.inf if low is None else low, math.inf if high is None else high


def types_of(op: str, *tensors: Tensor) -> list[int] | None:
    """Return the codes of the dtypes for the kernels of an op, or None, and warn where its reference takes long."""
    types = [TYPES[tensor.dtype] for tensor in tensors if tensor.dtype in TYPES]
    if len(types) == len(tensors):
        return types
    if any(tensor.numel() >= _SLOW_FROM for tensor in tensors):
        _warn_slow(op, next(tensor.dtype for tensor in tensors if tensor.dtype not in TYPES))
    return None


@functools.cache
def _warn_slow(op: str, dtype: torch.dtype) -> None:
    known = ", ".join(str(known) for known in TYPES)
    warnings.warn(
        f"octav_fx: {op} of {dtype} runs on the CPU in pure torch, three to ten times slower than the C++ kernels for "
        f"{known}: convert the model and its inputs, for example with .float()",
        stacklevel=2,
    )


def lying_as(x: Tensor, dense: Tensor) -> Tensor:
    """X with equal indices at equal offsets as in a dense tensor of its shape: itself, or a copy."""
    return x if same_layout(x, dense) else torch.empty_like(dense, dtype=x.dtype).copy_(x)


def is_dense(x: Tensor) -> bool:
    """Tell whether the elements of x fill one stretch of memory without gaps or overlaps, in any order of axes."""
    expected = 1
    for size, stride in sorted(zip(x.shape, x.stride(), strict=True), key=lambda pair: (pair[1], pair[0])):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def channel_layout(x: Tensor, dim: int | None) -> tuple[int, int, int] | None:
    """Return how a dense x lies in memory, (outer, channels, inner), the channel index in the middle; else None."""
    if not is_dense(x):
        return None
    if dim is None:
        return 1, 1, x.numel()
    channels = x.shape[dim]
    inner = x.stride(dim) if channels > 1 else 1
    return (x.numel() // (channels * inner) if channels * inner else 0), channels, inner


# Tensors and a clip, contiguous where the pass reads them; out; (outer, channels, inner), a clip for each channel.
_Run = Callable[[list[Tensor], Tensor, Tensor, tuple[int, int, int]], None]


def each_stretch(run: _Run, inputs: list[Tensor], clip: Tensor, shared: Granularity, out: Tensor) -> bool:
    """Run an elementwise pass over stretches that share a clip; False where out has gaps.

    An input that does not lie as out does (strided, expanded, permuted) is copied into that layout first. Rows have to
    lie one behind the other: out is written by way of a copy where its reduction axis is not the last one in memory.
    """
    clip = checked(clip, shared.clip_shape(out.shape))
    if not shared.is_short:
        if (layout := channel_layout(out, shared.channel)) is None:
            return False
        run([lying_as(x, out) for x in inputs], clip, out, layout)
        return True
    order = rows_last(out, shared.axis or 0)
    to, clip = out.permute(order), clip.permute(order).contiguous()
    written = to if to.is_contiguous() else torch.empty_like(to, memory_format=torch.contiguous_format)
    size = out.numel() // max(clip.numel(), 1)
    run([x.permute(order).contiguous() for x in inputs], clip, written, (1, clip.numel(), size))
    if written is not to:
        to.copy_(written)
    return True


def rows_last(x: Tensor, axis: int) -> list[int]:
    """Return the axes of x as they lie in memory, but for that of its rows, which is the last."""
    axis = range(x.dim())[axis]
    return [*sorted(set(range(x.dim())) - {axis}, key=x.stride().__getitem__, reverse=True), axis]


def each_row(
    run: Callable[[Tensor, Tensor], Tensor | None], x: Tensor, shared: Granularity, out: Tensor, clip: Tensor
) -> bool:
    """Run a pass over tokens or groups, rows [R, N] of x and of out, both contiguous; False where it returns no clips.

    It writes the rows of out and returns their clips [R]; x and out are copied where they lie otherwise.
    """
    assert shared.axis is not None
    order, size = rows_last(out, shared.axis), out.numel() // clip.numel()
    to, clips = out.permute(order), clip.permute(order)
    written = to if to.is_contiguous() else torch.empty_like(to, memory_format=torch.contiguous_format)
    found = run(x.permute(order).contiguous().view(-1, size), written.view(-1, size))
    if found is None:
        return False
    clips.copy_(found.view(clips.shape))
    if written is not to:
        to.copy_(written)
    return True


def same_layout(a: Tensor, b: Tensor) -> bool:
    """Tell whether the shapes are equal and equal indices lie at equal offsets; a stride along size 1 says nothing."""
    return a.shape == b.shape and all(
        i == j or size == 1 for size, i, j in zip(a.shape, a.stride(), b.stride(), strict=True)
    )
