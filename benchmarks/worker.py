"""python -m benchmarks.worker QUESTION MODEL VARIANT: one measurement in a process of its own, printed as JSON."""

import ctypes
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import models
from benchmarks.saved import saved_for_backward
from benchmarks.variants import VARIANTS

WARM_UP, STEPS = 3, 10


def run(question: str, model: str, variant: str, **environment: str) -> dict[str, Any]:
    """Answer one question in a process with one thread; {"error": ...} if the variant cannot do it."""
    command = [sys.executable, "-m", "benchmarks.worker", question, model, variant]
    print(question, model, variant, file=sys.stderr, flush=True)
    settings = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(command, env=settings, capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        return {"error": lines[-1] if lines else f"exit {done.returncode}"}
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _prepare(model_name: str, variant_name: str) -> tuple[nn.Module, Callable[..., Tensor], Tensor, Tensor]:
    """The module whose parameters are trained, what computes its forward, a batch, its targets."""
    torch.set_num_threads(1)
    model, x, target = models.load(model_name)
    variant = VARIANTS[variant_name]
    prepared = variant.prepare(model, x)
    forward: Any = prepared
    if variant.backend is not None:
        forward = torch.compile(prepared, backend=variant.backend, options=variant.options)
    if variant.autocast:
        forward = torch.autocast("cpu", torch.bfloat16)(forward)
    return prepared, forward, x, target


def step(model_name: str, variant_name: str) -> dict[str, Any]:
    """Milliseconds of the fastest training step: zero_grad, forward, backward, SGD; and where freed memory is kept."""
    prepared, forward, x, target = _prepare(model_name, variant_name)
    optimizer = torch.optim.SGD(prepared.parameters(), lr=1e-3, momentum=0.9)

    def fastest() -> float:
        times = []
        for _ in range(WARM_UP + STEPS):
            start = time.perf_counter()
            optimizer.zero_grad()
            F.cross_entropy(forward(x), target).backward()
            optimizer.step()
            times.append(time.perf_counter() - start)
        return 1e3 * min(times[WARM_UP:])

    return {"ms": fastest(), "kept_ms": fastest() if _keep_memory() else None}


# glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4


def _keep_memory() -> bool:
    """Let what is freed stay with the process, as allocators for training do; tell whether the C library can.

    By itself glibc returns large blocks, and a step asks for them again: 10,000 to 25,000 pages, which ones by chance.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(_TRIM_THRESHOLD, 2**31 - 1) and mallopt(_MMAP_MAX, 0))


def compile_time(model_name: str, variant_name: str) -> dict[str, Any]:
    """Seconds of the first forward and backward, which compile."""
    _, forward, x, target = _prepare(model_name, variant_name)
    start = time.perf_counter()
    F.cross_entropy(forward(x), target).backward()
    return {"seconds": time.perf_counter() - start}


def memory(model_name: str, variant_name: str) -> dict[str, Any]:
    """MB held for backward between forward and backward, besides parameters, buffers and the batch."""
    prepared, forward, x, target = _prepare(model_name, variant_name)
    # Once before: compiling, lazily made state.
    F.cross_entropy(forward(x), target).backward()
    present = {_storage(t) for t in (*prepared.parameters(), *prepared.buffers(), x, target)}
    _, saved = saved_for_backward(lambda: F.cross_entropy(forward(x), target))
    storages = {_storage(t): t.untyped_storage().nbytes() for t in saved}
    return {"mb": sum(size for storage, size in storages.items() if storage not in present) / 1e6}


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


QUESTIONS: dict[str, Callable[[str, str], dict[str, Any]]] = {
    "step": step,
    "compile": compile_time,
    "memory": memory,
}

if __name__ == "__main__":
    question, model, variant = sys.argv[1:]
    print(json.dumps(QUESTIONS[question](model, variant)))
