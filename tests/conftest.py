"""One thread, one seed, own caches: no test depends on another, on the machine's cores, or on an earlier run."""

import os
import tempfile

import pytest
import torch
from hypothesis import settings

from octav_fx.ops import cpu

torch.set_num_threads(1)
# Read when triton is first imported. Without a GPU its kernels run interpreted, the same source on CPU tensors.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# Passes are checked after each other's work (octav_fx/ir/verify.py).
os.environ.setdefault("OCTAV_FX_VERIFY", "1")
# A compiler that was killed leaves half a library in the user's cache of Inductor, where every later run would find it.
_CACHE = tempfile.TemporaryDirectory(prefix="octav_fx_tests_")
os.environ["TORCHINDUCTOR_CACHE_DIR"] = _CACHE.name
# Cores are shared with other processes: how long one example takes says nothing.
settings.register_profile("octav_fx", deadline=None)
settings.load_profile("octav_fx")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def kernels():
    """The compiled kernels; without a compiler the ops run their references, and comparing would show nothing."""
    library = cpu.library()
    if library is None:
        pytest.skip("no C++ kernels on this machine")
    return library


@pytest.fixture
def kernel_calls(kernels, monkeypatch):
    """The names of the kernels that the ops call, in order."""
    calls = []

    class Recorded:
        def __getattr__(self, name):
            calls.append(name)
            return getattr(kernels, name)

    monkeypatch.setattr(cpu, "library", Recorded)
    return calls


@pytest.fixture
def threads():
    """Sets the number of threads for the ops; puts it back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def fresh_dynamo():
    """Parametrized tests compile one function often, and Dynamo gives up on a function after eight recompilations."""
    torch.compiler.reset()
