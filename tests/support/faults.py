"""What is wrong with a quantized, deployed, compiled or used program of the grammars fuzz*.py.

    python -m tests.support.faults quantized --minutes 10 [--seed 0]

What a model says it does not hold for is no fault.
"""

import argparse
import contextlib
import copy
import functools
import io
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn

import octav_fx
from octav_fx import Config
from octav_fx.deploy.runtimes import run_onnx
from octav_fx.errors import OctavError
from octav_fx.nn import FakeQuantizer
from tests.support import follow, fuzz, fuzz_images, fuzz_lives
from tests.support.alike import assert_close, assert_computes, gradients, run, tensors
from tests.support.faultless import as_words, check_codes
from tests.support.file_faults import EXACT, ROUNDING, check_file, without_dead, write
from tests.support.float_work import COARSE, float_work
from tests.support.fuzz import built, inputs, is_valid
from tests.support.given_levels import Run
from tests.support.onnx_files import optimized_ops

# What programs are deployed with, in turn.
DEPLOYED: Final = (
    Config(weight_bits=8, activation_bits=8, residual_bits=8),
    Config(weight_bits=4, activation_bits=4, residual_bits=8),
    Config(weight_bits=4, activation_bits=8),
)


def check_signs(q: nn.Module, args: tuple[Tensor, ...]) -> None:
    """Check that nothing negative reaches an unsigned grid."""

    def seen(quantizer: nn.Module, given: tuple[Tensor], result: Tensor) -> None:
        assert isinstance(quantizer, FakeQuantizer)
        assert quantizer.spec.format.signed or given[0].min() >= 0, "a negative value on an unsigned grid"

    handles = [m.register_forward_hook(seen) for m in q.modules() if isinstance(m, FakeQuantizer)]
    run(q, args)
    for handle in handles:
        handle.remove()


def fault_quantized(source: str, seed: int) -> str | None:
    """Say how the quantized program, its quantizers aside, differs from float in a mode, or return None."""
    training = bool(seed % 2)
    if not is_valid(source, training):
        return None
    model, all_inputs = built(source).train(training), inputs()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            q = octav_fx.quantize(model, all_inputs[0])
    except OctavError as error:
        return f"refused: {error}"
    except Exception as error:
        return f"raised {type(error).__name__}: {error}"
    for args in all_inputs:
        try:
            # fx prints where in its generated code an error came up.
            with contextlib.redirect_stderr(io.StringIO()):
                assert_computes(q, built(source).train(training), args)
                check_signs(q, args)
        except OctavError:
            continue
        except AssertionError as error:
            return f"differs: {error}"
        except RuntimeError as error:
            # A quantizer keeps its input for the mask of its gradient, where a product of float would not.
            if "modified by an inplace operation" not in str(error):
                return f"raised later: {error}"
        except Exception as error:
            return f"raised later {type(error).__name__}: {error}"
    return None


def fault_deployed(source: str, seed: int, grammar: Any = fuzz) -> str | None:
    """Say where the converted program is not the frozen one, or return None.

    grammar: the module that has written it. By definition they are equal, and integers from equal codes give equal
    codes, but for one at a tie of oneDNN's rounding.
    """
    if (found := _program(source, seed, grammar)) is None:
        return None
    model, all_inputs = found
    with as_words() as words:
        q = _frozen(model, all_inputs, seed)
        defined, converted = octav_fx.convert(q, integers=False), octav_fx.convert(q)
        for args in all_inputs:
            # Forward may write into its state.
            with contextlib.suppress(OctavError), torch.no_grad():
                expected, found = (tensors(run(copy.deepcopy(m), args)) for m in (q, defined))
                assert len(expected) == len(found) and all(map(torch.equal, found, expected)), "not as frozen"
                run(copy.deepcopy(converted), args)
                check_codes(copy.deepcopy(defined), copy.deepcopy(converted), args)
    return words.get("fault")


def _program(source: str, seed: int, grammar: Any) -> tuple[nn.Module, list[tuple[Tensor, ...]]] | None:
    """Return a program and its inputs, channels last for every second seed where float runs so; None if it is none."""
    if not grammar.is_valid(source, training=False):
        return None
    if seed % 2 and grammar is fuzz_images:
        model = grammar.built(source).eval().to(memory_format=torch.channels_last)
        all_inputs = [tuple(x.contiguous(memory_format=torch.channels_last) for x in args) for args in grammar.inputs()]
        # A view of what lies otherwise is none.
        with contextlib.suppress(RuntimeError), torch.no_grad():
            for args in all_inputs:
                run(copy.deepcopy(model), args)
            return model, all_inputs
    return grammar.built(source).eval(), grammar.inputs()


def _frozen(model: nn.Module, all_inputs: list[tuple[Tensor, ...]], seed: int) -> nn.Module:
    q = octav_fx.quantize(model, all_inputs[0], DEPLOYED[seed % len(DEPLOYED)])
    return octav_fx.freeze(octav_fx.calibrate(q, all_inputs))


def fault_exported(
    source: str,
    seed: int,
    grammar: Any = fuzz,
    targets: tuple[str, ...] = ("onnxruntime", "exact"),
    compute: Run = run_onnx,
) -> str | None:
    """Say where a runtime computes otherwise than the frozen program what was exported of it, or return None.

    compute: runs a file. From equal codes it gives equal codes, but where what is rounded lies at a tie, and equal
    results, but for roundings to float32; where onnxruntime has integers and moves alone, the results of the whole are
    equal bits.
    """
    if (found := _program(source, seed, grammar)) is None:
        return None
    model, all_inputs = found
    with as_words() as words, tempfile.TemporaryDirectory() as folder:
        q, path = _frozen(model, all_inputs, seed), Path(folder) / "model.onnx"
        defined = without_dead(octav_fx.convert(q, integers=False))
        for target in targets:
            # Forward may write into its state.
            holds_for_all = write(copy.deepcopy(q), all_inputs[0], path, target, grammar.AXES)
            is_exact, far = compute is run_onnx and set(optimized_ops(path)) <= EXACT, list[float]()
            for args in all_inputs if holds_for_all else all_inputs[:1]:
                try:
                    far += check_file(path, defined, args, compute, is_exact)
                except AssertionError as error:
                    raise AssertionError(f"{target}, {[*args[0].shape]}: {error}") from error
            # A code that moves at a tie moves what is behind it.
            assert sum(d > ROUNDING for d in far) <= len(far) / 3, f"{target}: off by {far}"
    return words.get("fault")


def fault_operands(source: str, seed: int) -> str | None:
    """Say where an operand of a program in eval mode is float of which the table does not say so, or return None."""
    if not is_valid(source, training=False):
        return None
    with as_words() as words:
        q = octav_fx.quantize(built(source).eval(), inputs()[0], COARSE)
        for at, args in enumerate(inputs()):
            with contextlib.suppress(OctavError), torch.no_grad(), float_work(q, is_example=at == 0):
                run(q, args)
    return words.get("fault")


def fault_compiled(source: str, seed: int) -> str | None:
    """Say where the program that Dynamo has read differs from the one that Python runs, in a mode, or return None."""
    training = bool(seed % 2)
    if not is_valid(source, training):
        return None
    torch.compiler.reset()
    with as_words() as words:
        q = octav_fx.quantize(built(source).train(training), inputs()[0])
        other = copy.deepcopy(q)
        compiled = torch.compile(other, backend="eager")
        for at, args in enumerate([*inputs(), inputs()[0]]):
            expected, found = tensors(run(q, args)), tensors(run(compiled, args))
            assert [t.requires_grad for t in found] == [t.requires_grad for t in expected], at
            for e, f in zip(expected, found, strict=True):
                assert_close(f"result of call {at}", f, e)
            of_q, of_compiled = gradients(q, expected), gradients(other, found)
            assert of_q.keys() == of_compiled.keys(), f"call {at}: who gets a gradient"
            for name, gradient in of_q.items():
                assert_close(f"gradient of {name} in call {at}", of_compiled[name], gradient)
            for name, value in q.state_dict().items():
                assert_close(f"{name} after call {at}", other.state_dict()[name], value)
    return words.get("fault")


class Kind(NamedTuple):
    """A grammar, and what is wrong with a program of it; trains: every second seed is one in training mode."""

    grammar: Any
    fault: Callable[[str, int], str | None]
    trains: bool


KINDS: Final = {
    "quantized": Kind(fuzz, fault_quantized, True),
    "compiled": Kind(fuzz, fault_compiled, True),
    "operands": Kind(fuzz, fault_operands, False),
    "deployed": Kind(fuzz, fault_deployed, False),
    "exported": Kind(fuzz, fault_exported, False),
    "images": Kind(fuzz_images, functools.partial(fault_deployed, grammar=fuzz_images), False),
    "exported_images": Kind(fuzz_images, functools.partial(fault_exported, grammar=fuzz_images), False),
    "python": Kind(follow, follow.fault_followed, True),
    "python_compiled": Kind(follow, follow.fault_followed_compiled, True),
    "python_operands": Kind(follow, follow.fault_operands_followed, False),
    "lives": Kind(fuzz_lives, fuzz_lives.fault_lived, True),
}


def main() -> None:
    """Write and check programs until the time is up; print each finding once."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=KINDS)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    grammar, fault, trains = KINDS[given.what]
    end, seed, valid = time.monotonic() + 60 * given.minutes, given.seed, 0
    while time.monotonic() < end:
        source = grammar.program(seed)
        found = fault(source, seed)
        valid += grammar.is_valid(source, trains and bool(seed % 2))
        if found is not None:
            print(f"--- seed {seed}: {found}\n{source}\n", flush=True)
        seed += 1
    print(f"{seed - given.seed} programs, {valid} of them valid", flush=True)


if __name__ == "__main__":
    main()
