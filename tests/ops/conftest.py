import pytest
import torch

from octav_fx.ops import native


@pytest.fixture(scope="session")
def kernels():
    """The compiled kernels; without a compiler the ops run their references, and comparing would show nothing."""
    library = native.library()
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

    monkeypatch.setattr(native, "library", Recorded)
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
