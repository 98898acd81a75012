import ctypes
import subprocess
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from octav_fx.formats.spec import integers
from octav_fx.ops import cpu
from octav_fx.ops.fake_quantize import reference
from octav_fx.ops.fake_quantize.op import fake_quantize
from tests.support.examples import examples


@pytest.fixture
def fresh():
    """native.library is asked again, in this test and after it."""
    cpu.library.cache_clear()
    yield
    cpu.library.cache_clear()


def no_compiler(monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(cpu.shutil, "which", lambda name: None)


def test_the_environment_can_ask_for_the_references(fresh, monkeypatch):
    monkeypatch.setenv("OCTAV_FX_NATIVE", "0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cpu.library() is None
    read = Mock(wraps=reference.spec_of)
    monkeypatch.setattr(reference, "spec_of", read)
    fake_quantize(torch.randn(5), torch.tensor(1.0), integers(4, True, None), "pwl")
    read.assert_called_once()


def test_a_missing_compiler_warns_once_and_the_references_run(fresh, monkeypatch):
    no_compiler(monkeypatch)
    x = torch.randn(5)
    with pytest.warns(UserWarning, match="no C\\+\\+ compiler found") as record:
        first = fake_quantize(x, torch.tensor(1.0), integers(4, True, None), "pwl")
        fake_quantize(x, torch.tensor(1.0), integers(4, True, None), "pwl")
    assert len(record) == 1
    assert cpu.library() is None
    assert torch.equal(first, reference.fake_quantize(x, torch.tensor(1.0), integers(4, True, None), "pwl"))


def test_a_compiler_that_is_not_there_warns(fresh, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", str(tmp_path / "nothing"))
    with pytest.warns(UserWarning, match="nothing"):
        assert cpu.library() is None


def test_a_compiler_that_fails_warns_with_what_it_said(fresh, monkeypatch, tmp_path):
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho out of luck >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.warns(UserWarning, match="out of luck"):
        assert cpu.library() is None
    assert not list((tmp_path / "octav_fx").iterdir())


def test_a_cache_that_cannot_be_written_warns(fresh, monkeypatch, tmp_path):
    (tmp_path / "octav_fx").write_text("a file where the folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "c++")
    with pytest.warns(UserWarning, match="octav_fx"):
        assert cpu.library() is None


def test_what_takes_long_for_its_dtype_says_so_once(kernels):
    cpu._warn_slow.cache_clear()
    x = torch.randn(cpu._SLOW_FROM, dtype=torch.float64)
    with pytest.warns(UserWarning, match=r"fake_quantize of torch\.float64 .*\.float\(\)") as record:
        for _ in range(2):
            fake_quantize(x, torch.tensor(1.0), integers(4, True, None), "pwl")
    assert len(record) == 1
    with pytest.warns(UserWarning, match=r"quantize of torch\.float64"):
        torch.ops.octav.quantize(x, torch.tensor(1.0), integers(4, True, None))


def test_nothing_is_said_about_what_is_fast(kernels):
    cpu._warn_slow.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # A few elements take no time, and for these dtypes and layouts there are kernels.
        fake_quantize(torch.randn(100, dtype=torch.float64), torch.tensor(1.0), integers(4, True, None), "pwl")
        for dtype in cpu.TYPES:
            x = torch.randn(2, cpu._SLOW_FROM).to(dtype)
            for layout in (x, x.t(), x[:, ::2], x[:, :1].expand_as(x)):
                fake_quantize(layout, torch.tensor(1.0), integers(4, True, None), "pwl")
                torch.ops.octav.optimal_clip(layout, torch.tensor(1.0), integers(4, True, None), "octav")


def test_without_kernels_the_dtype_is_not_to_blame(fresh, monkeypatch):
    monkeypatch.setenv("OCTAV_FX_NATIVE", "0")
    cpu._warn_slow.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fake_quantize(
            torch.randn(cpu._SLOW_FROM, dtype=torch.float64), torch.tensor(1.0), integers(4, True, None), "pwl"
        )


def test_of_those_who_build_at_once_one_compiles_and_the_others_wait(monkeypatch, tmp_path):
    compiled = []

    def slowly(compiler, flags, target):
        compiled.append(target)
        time.sleep(0.2)
        target.touch()

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cpu, "BUNDLED", tmp_path / "none")
    monkeypatch.setattr(cpu, "_compile", slowly)
    with ThreadPoolExecutor(4) as pool:
        built = [pool.submit(cpu._built) for _ in range(4)]
    assert {future.result() for future in built} == set(compiled)
    assert len(compiled) == 1


def test_kernels_are_built_once(kernels, monkeypatch, tmp_path):
    # Of other sources, which take less time than all kernels.
    monkeypatch.setattr(cpu, "_FOLDER", tmp_path)
    (tmp_path / "op").mkdir()
    (tmp_path / "op" / "kernel.cpp").write_text('extern "C" int octav_one() { return 1; }')
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    built = cpu._built()
    assert [path.name for path in (tmp_path / "octav_fx").iterdir()] == [built.name]
    assert ctypes.CDLL(str(built)).octav_one() == 1

    def unreachable(*args, **kwargs):
        raise AssertionError("compiled again")

    with monkeypatch.context() as patched:
        patched.setattr(subprocess, "run", unreachable)
        assert cpu._built() == built
    (tmp_path / "op" / "kernel.cpp").write_text('extern "C" int octav_one() { return 2; }')
    assert ctypes.CDLL(str(cpu._built())).octav_one() == 2


@pytest.mark.parametrize(
    ("x", "dense"),
    [
        (torch.empty(()), True),
        (torch.empty(1), True),
        (torch.empty(3, 4), True),
        (torch.empty(3, 4).t(), True),
        (torch.empty(3, 4)[1:], True),
        (torch.empty(3, 4)[:, :1], False),
        (torch.empty(3, 4)[:, ::2], False),
        (torch.empty(6)[::2], False),
        (torch.empty(3, 1).expand(3, 4), False),
        (torch.empty(1, 1).expand(3, 4), False),
        (torch.empty(8).as_strided((3, 4), (2, 1)), False),
        (torch.empty(2, 3, 4, 5).to(memory_format=torch.channels_last), True),
        (torch.empty(4, 1, 3).transpose(0, 1), True),
        (torch.empty(12).as_strided((1, 3, 4), (99, 4, 1)), True),
    ],
)
def test_dense_tensors_fill_one_stretch_of_memory(x, dense):
    assert cpu.is_dense(x) is dense


@examples(100)
@given(data=st.data())
def test_channel_layout_tells_the_channel_of_each_element_in_memory(data):
    shape = data.draw(st.lists(st.sampled_from([1, 2, 3, 5]), min_size=1, max_size=4))
    order = data.draw(st.permutations(range(len(shape))))
    dim = data.draw(st.integers(-len(shape), len(shape) - 1))
    along = [1] * len(shape)
    along[dim] = -1
    channel = torch.arange(shape[dim]).reshape(along).expand(shape)
    # The channel of each element, laid out in that order.
    x = channel.permute(order).contiguous()
    in_memory = x.flatten()
    x = x.permute([order.index(axis) for axis in range(len(shape))])
    outer, channels, inner = cpu.channel_layout(x, dim)
    assert outer * channels * inner == x.numel()
    assert torch.equal((torch.arange(x.numel()) // inner) % channels, in_memory)


def test_a_tensor_with_gaps_has_no_channel_layout():
    assert cpu.channel_layout(torch.empty(3, 4)[:, ::2], 0) is None


def test_without_a_channel_axis_all_elements_share_a_channel():
    assert cpu.channel_layout(torch.empty(3, 4), None) == (1, 1, 12)
