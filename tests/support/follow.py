"""Following the steps of a program of tests/support/fuzz_python.py, the float model beside the quantized one."""

import copy
import dataclasses
import functools
import itertools
import linecache
import sys
import types
import warnings
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import octav_fx
from tests.support import fuzz_python
from tests.support.alike import assert_close, gradients, silent_quantizers, tensors
from tests.support.faultless import as_words
from tests.support.float_work import COARSE, float_work
from tests.support.fuzz_python import program as program

_NUMBERS: Final = itertools.count()
_LARGEST: Final = 1e3
_PLAIN: Final = (bool, int, float, str, type(None))


class Session:
    """A program that was run as a file, its model, and what the steps speak of."""

    def __init__(self, source: str, training: bool) -> None:
        file = types.ModuleType(f"fuzzed_{next(_NUMBERS)}")
        names = {name: value for name, value in vars(fuzz_python).items() if not name.startswith("_")}
        vars(file).update(names, torch=torch, nn=nn, F=F, functools=functools, checkpoint=checkpoint)
        vars(file).update(__name__=file.__name__, __file__=f"<{file.__name__}>")
        linecache.cache[file.__file__] = (len(source), None, source.splitlines(keepends=True), file.__file__)
        sys.modules[file.__name__] = file
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exec(compile(source, file.__file__, "exec"), vars(file))
            self.model: nn.Module = vars(file)["Net"]().train(training)
        self.file = file
        self.scope = vars(file)
        self.scope.update(m=self.model, r=None, sized=self._sized, train=self._train, past=_past)
        self.scope["x"], self.scope["y"] = self._sized(2, 5)
        self.steps: list[str] = self.scope["STEPS"]

    def _sized(self, b: int, t: int) -> tuple[Tensor, Tensor]:
        """Make inputs of a size; ids and mask are of the same."""
        drawn = torch.Generator().manual_seed(b)
        self.scope["ids"] = torch.randint(0, 5, (b, t), generator=drawn)
        self.scope["mask"] = torch.rand(b, t, generator=drawn) > 0.3
        x, y = torch.randn(2, b, t, 8, generator=drawn).unbind()
        return x, y

    @staticmethod
    def _train(m: nn.Module, x: Tensor, y: Tensor) -> None:
        """Train for three steps."""
        optimizer = torch.optim.SGD(m.parameters(), 0.05)
        for _ in range(3):
            optimizer.zero_grad()
            losses = [t.float().square().mean() for t in leaves(m(x.clone(), y.clone())).values() if _learns(t)]
            sum(losses, torch.zeros(())).backward()
            optimizer.step()

    def use(self, model: nn.Module) -> None:
        self.model = self.scope["m"] = model

    def call(self, at: int) -> None:
        """Run a step that is a call."""
        torch.manual_seed(at)
        exec(self.steps[at], self.scope)

    def do(self, at: int) -> dict[str, Any] | None:
        """Run a step; return what a call has given, its gradients, its arguments afterwards and the state."""
        step = self.steps[at]
        torch.manual_seed(at)
        given = {name: self.scope[name].clone() for name in ("x", "y", "ids", "mask")}
        kept = {name: self.scope[name] for name in given}
        if not step.startswith("r ="):
            exec(step, self.scope)
            return None
        self.scope.update(given)
        self.call(at)
        result = leaves(self.scope["r"])
        found = {f"result{name}": value for name, value in result.items()}
        found |= {f"argument {name}": self.scope[name] for name in given}
        of_call = gradients(self.model, tensors(list(result.values())))
        found |= {f"gradient of {name}": gradient for name, gradient in of_call.items()}
        for path, module in self.model.named_modules():
            found |= {f"{path}.{name}": v for name, v in vars(module).items() if _is_state(name, v)}
        found |= {name: value.clone() for name, value in self.model.state_dict().items()}
        self.scope.update(kept)
        return found


def _is_state(name: str, value: Any) -> bool:
    return name[:1] != "_" and isinstance(value, (*_PLAIN, Tensor))


def _learns(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _past(r: Any, name: str, x: Tensor) -> Tensor | None:
    """Return the cache that the last call returned, if it is of this batch."""
    cache = r[name] if isinstance(r, dict) and name in r else None
    return cache if cache is not None and len(cache) == len(x) else None


def leaves(value: Any, path: str = "") -> dict[str, Any]:
    """Return what is in a result, by where it is and the names of the classes around it."""
    if dataclasses.is_dataclass(value):
        value = {f"{type(value).__name__}.{name}": held for name, held in vars(value).items()}
    if isinstance(value, dict):
        return {k: v for name, held in value.items() for k, v in leaves(held, f"{path}.{name}").items()}
    if isinstance(value, (list, tuple)):
        kind = type(value).__name__
        return {k: v for at, held in enumerate(value) for k, v in leaves(held, f"{path}.{kind}.{at}").items()}
    return {path: value}


@functools.lru_cache(1)
def followed(source: str, training: bool) -> tuple[dict[str, Any] | None, ...] | None:
    """Return what each step of the float model gives; None where it does not run, or grows beyond comparing."""
    try:
        session = Session(source, training)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            steps = tuple(session.do(at) for at in range(len(session.steps)))
    except Exception:
        return None
    compared = [t.float() for step in steps if step is not None for t in step.values() if isinstance(t, Tensor)]
    return steps if all(t.isfinite().all() and not (t.abs() > _LARGEST).any() for t in compared) else None


def is_valid(source: str, training: bool) -> bool:
    return followed(source, training) is not None


def fault_followed(source: str, seed: int) -> str | None:
    """Say in which step the quantized program, its quantizers aside, differs from float, or return None."""
    training = bool(seed % 2)
    expected = followed(source, training)
    if expected is None:
        return None
    with as_words() as words:
        session = Session(source, training)
        session.use(octav_fx.quantize(session.model, (session.scope["x"], session.scope["y"])))
        for at, step in enumerate(expected):
            with silent_quantizers():
                found = session.do(at)
            _compare(at, session.steps[at], step, found)
            if step is not None:
                _runs_with_quantizers(session, at)
    return words.get("fault")


def _runs_with_quantizers(session: Session, at: int) -> None:
    """Check that a call runs with quantizers, too, both ways, on a copy: forward may write into its state."""
    kept, kept_r = session.model, session.scope["r"]
    session.use(copy.deepcopy(kept))
    globals_before = {name: v for name, v in session.scope.items() if isinstance(v, int)}
    session.do(at)
    session.scope.update(globals_before)
    session.use(kept)
    session.scope["r"] = kept_r


def fault_operands_followed(source: str, seed: int) -> str | None:
    """Say in which step an operand is float of which the table does not say so, in eval mode, or return None."""
    if followed(source, False) is None:
        return None
    with as_words() as words:
        session = Session(source, False)
        session.use(octav_fx.quantize(session.model, (session.scope["x"], session.scope["y"]), COARSE))
        for at, step in enumerate(session.steps):
            if not step.startswith("r ="):
                session.do(at)
                continue
            with torch.no_grad(), float_work(session.model, is_example=False):
                session.call(at)
    return words.get("fault")


def fault_followed_compiled(source: str, seed: int) -> str | None:
    """Say in which step the program that Dynamo has read differs from the one that Python runs, or return None."""
    training = bool(seed % 2)
    if followed(source, training) is None:
        return None
    torch.compiler.reset()
    with as_words() as words:
        eager, compiled = Session(source, training), Session(source, training)
        for session in (eager, compiled):
            session.use(octav_fx.quantize(session.model, (session.scope["x"], session.scope["y"])))
        compiled.model.compile(backend="eager")
        for at in range(len(eager.steps)):
            _compare(at, eager.steps[at], eager.do(at), compiled.do(at))
    return words.get("fault")


def _compare(at: int, step: str, expected: dict[str, Any] | None, found: dict[str, Any] | None) -> None:
    if expected is None or found is None:
        return
    for what, value in expected.items():
        assert what in found, f"step {at}, {step}: no {what}"
        if isinstance(value, Tensor):
            assert isinstance(found[what], Tensor), f"step {at}, {step}: {what} is {found[what]}"
            assert_close(f"step {at}, {step}: {what}", found[what], value)
        elif isinstance(value, _PLAIN):
            assert type(found[what]) is type(value) and found[what] == value, (
                f"step {at}, {step}: {what} is {found[what]}, not {value}"
            )
    more = [
        name
        for name in found
        if name not in expected and name.startswith(("gradient", "result")) and "quantizers." not in name
    ]
    assert not more, f"step {at}, {step}: {more[0]} beyond float"
