"""What Inductor writes for a graph, compiled together and apart."""

import pytest
import torch
from torch import Tensor
from torch._inductor.async_compile import AsyncCompile, get_compile_threads
from torch._inductor.codecache import CppPythonBindingsCodeCache
from torch._inductor.config import patch


def _several(x: Tensor) -> Tensor:
    """Two reductions with a product of matrices between them: a kernel each, with other arguments."""
    y = (x * x.sigmoid()).softmax(1) @ x.T
    return (y - y.mean(1, keepdim=True)).exp().sum(0)


@pytest.mark.compile
@pytest.mark.skipif(get_compile_threads() <= 1, reason="Inductor then asks for each kernel at once")
def test_kernels_of_a_graph_are_one_library_with_the_same_bits(monkeypatch):
    loaded, load = [], CppPythonBindingsCodeCache._load_library_inner.__func__

    def recorded(cls, path, key):
        loaded.append(path)
        return load(cls, path, key)

    monkeypatch.setattr(CppPythonBindingsCodeCache, "_load_library_inner", classmethod(recorded))
    x = torch.randn(5, 37)
    with patch(force_disable_caches=True):
        together = torch.compile(_several)(x)
        several = len(loaded)
        assert several > 1
        assert len(set(loaded)) == 1
        torch.compiler.reset()
        monkeypatch.setattr(AsyncCompile, "cpp_pybinding", AsyncCompile.cpp_pybinding.__wrapped__)
        apart = torch.compile(_several)(x)
    assert len(set(loaded)) == 1 + several
    assert torch.equal(together, apart)
