"""One thread, one seed, own caches: no test depends on another, on the machine's cores, or on an earlier run.

--fast leaves out every test with a marker of MARKERS, and holds the others to a second each, more on a slow machine.
"""

import functools
import math
import os
import tempfile
import time
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

# Without a GPU Triton's kernels run interpreted, the same source on tensors of a CPU. Triton reads it when it is
# imported, which torch does as soon as somebody counts floating point operations.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from octav_fx import zoo
from octav_fx.formats.spec import integers
from octav_fx.ops import cpu
from tests.support.examples import PROFILES
from tests.support.exporter import read_its_tables_once
from tests.support.one_library import compile_kernels_together

torch.set_num_threads(1)
# Sums of products are compared to the last bits of float32.
torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
# Passes are checked after each other's work (octav_fx/ir/verify.py).
os.environ.setdefault("OCTAV_FX_VERIFY", "1")
# A compiler that was killed leaves half a library in the user's cache of Inductor, where every later run would find it.
# The processes of one run share a cache: what two of them compile is compiled once.
if "PYTEST_XDIST_WORKER" not in os.environ:
    _CACHE = tempfile.TemporaryDirectory(prefix="octav_fx_tests_")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = _CACHE.name
# Cores are shared with other processes: how long one example takes says nothing.
for _name, _count in PROFILES.items():
    settings.register_profile(f"octav_fx_{_name}", deadline=None, max_examples=_count)
settings.load_profile("octav_fx_full")

# What a fast run leaves out; pyproject.toml says what they mean.
MARKERS = ("models", "compile", "ranks", "slow", "stacks", "gpu")


@functools.cache
def limit() -> float:
    """Return the seconds of CPU time that any other test may take in a fast run: one, or more on a slow machine.

    Slow is where a plain loop takes more than 0.05 seconds. Another torch (./dev test --torch) takes its own time.
    """
    if "OCTAV_FX_TORCH" in os.environ:
        return math.inf
    seconds = []
    for _ in range(3):
        start = time.thread_time()
        sum(i * i % 7 for i in range(10**6))
        seconds.append(time.thread_time() - start)
    return max(1.0, min(seconds) / 0.05)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fast", action="store_true", help="only tests without a marker, and a tenth of the examples")


def pytest_configure(config: pytest.Config) -> None:
    """Make a run fast before any module of tests is imported, which asks for its number of examples."""
    if config.getoption("fast"):
        settings.load_profile("octav_fx_fast")
        given = config.option.markexpr
        config.option.markexpr = " and ".join([*([f"({given})"] if given else []), *(f"not {m}" for m in MARKERS)])


def _cpu_seconds() -> float:
    """Return what this process and the ended ones that it started have computed.

    The time of the clock would say how busy the machine is with other things, and the time of one thread would miss
    a subprocess.
    """
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Fail a test of a fast run that takes longer than limit()."""
    start = _cpu_seconds()
    result = yield
    spent = _cpu_seconds() - start
    if item.config.getoption("fast") and spent > limit():
        pytest.fail(f"{spent:.1f} s of CPU time: make it cheaper, or mark it with one of {', '.join(MARKERS)}")
    return result


@pytest.fixture(autouse=True, scope="session")
def _warm(request: pytest.FixtureRequest) -> None:
    """Pay what the first test that needs it would: the C++ kernels are built, and large packages imported, once.

    Not where no test has a limit: with torch 2.11 nothing that is forked after this has gradients.
    """
    if request.config.getoption("fast") and limit() < math.inf:
        cpu.library()
        zoo.torchvision()
        x = torch.ones(1, requires_grad=True)
        torch.library.opcheck(
            torch.ops.octav.fake_quantize.default, (x, torch.ones(()), integers(4, True, None), "pwl")
        )


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _exporter() -> None:
    read_its_tables_once()


@pytest.fixture(autouse=True)
def _compiler() -> None:
    compile_kernels_together()


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
