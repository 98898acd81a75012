"""What a quantized model goes through, drawn at random: a configuration, and what is done with the model, step by step.

    python -m tests.support.faults lives --minutes 10 [--seed 0]

Each step checks what it promises: a copy, a checkpoint or a compiled model computes the same to the bit, a report
changes nothing, a converted model is the frozen one.
"""

import contextlib
import copy
import io
import json
import random
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import torch
from torch import Tensor, nn

import octav_fx
from octav_fx import Config
from octav_fx.clips.gradients import GRADIENTS
from octav_fx.clips.learned import LEARNED
from octav_fx.clips.methods import METHODS
from octav_fx.errors import OctavError
from octav_fx.formats.registry import NAMES
from octav_fx.formats.scales import SCALES
from tests.support import fuzz, fuzz_images
from tests.support.alike import run, tensors
from tests.support.faultless import as_words, check_codes

_BITS: Final = (2, 3, 4, 4, 8, 8)
# What a configuration is drawn from; what is there more than once is drawn more often.
_FIELDS: Final[dict[str, tuple[Any, ...]]] = {
    "weight_bits": (None, *_BITS),
    "activation_bits": (None, *_BITS),
    "edge_bits": (None, 4, 8),
    "residual_bits": (None, None, 4, 8),
    "weight_format": ("int",) * len(NAMES) + tuple(NAMES),
    "activation_format": ("int",) * len(NAMES) + tuple(NAMES),
    "weight_granularity": ("tensor", "channel", "channel", "group-4"),
    "activation_granularity": ("tensor", "tensor", "token", "group-4"),
    "scale_format": ("float32",) * len(SCALES) + tuple(SCALES),
    "signed_activations": (False, False, True),
    "narrow_weights": (False, False, True),
    "clip": ("octav",) * 4 + (*METHODS, *LEARNED),
    "weight_gradient": ("mad", *GRADIENTS),
    "activation_gradient": ("pwl", "pwl", *GRADIENTS),
    "attention": ("operands", "full"),
    "fold_batchnorm": (False, True),
}


@dataclass
class Life:
    """A quantized model, where it stands, and what it was made of."""

    q: nn.Module
    config: Config
    source: str
    grammar: ModuleType
    # The mode that it was quantized in.
    training: bool
    frozen: bool = False

    def inputs(self) -> list[tuple[Tensor, ...]]:
        return self.grammar.inputs()

    def new(self) -> nn.Module:
        """Quantize the same float model again, as after a restart."""
        return quantized(self.source, self.grammar, self.config, self.training).train(self.q.training)


def quantized(source: str, grammar: ModuleType, config: Config, training: bool) -> nn.Module:
    """Quantize a program for all kinds of calls that it will get: a checkpoint goes with its graphs."""
    float_model, inputs = grammar.built(source).train(training), grammar.inputs()
    return octav_fx.quantize(float_model, inputs[0], config, examples=inputs[1:])


def configuration(drawn: random.Random) -> Config:
    """Draw fields until they combine."""
    while True:
        fields = {name: drawn.choice(choices) for name, choices in _FIELDS.items() if drawn.random() < 0.5}
        with contextlib.suppress(OctavError):
            return Config(**fields)


def results(model: nn.Module, inputs: list[tuple[Tensor, ...]]) -> list[Tensor]:
    """Compute on a copy, as forward may write into its state."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        return [t.detach() for args in inputs for t in tensors(run(model, args))]


def assert_same(found: list[Tensor], expected: list[Tensor], what: str) -> None:
    assert len(found) == len(expected), f"{what}: {len(found)} results for {len(expected)}"
    for f, e in zip(found, expected, strict=True):
        assert (f.shape, f.dtype) == (e.shape, e.dtype), f"{what}: {f.shape} {f.dtype} for {e.shape} {e.dtype}"
        same = torch.equal(f.nan_to_num(7.0), e.nan_to_num(7.0))
        assert same, f"{what}: {(f.double() - e.double()).abs().max():.2e} of {e.abs().max():.2e}"


def _train(life: Life) -> None:
    if life.frozen:
        return
    optimizer = torch.optim.SGD(life.q.parameters(), 1e-3)
    for args in life.inputs():
        optimizer.zero_grad()
        given = [t for t in tensors(run(life.q, args)) if t.requires_grad]
        if given:
            sum((t.cos() + t * 0.1).sum() for t in given).backward()
            nn.utils.clip_grad_norm_(life.q.parameters(), 1.0)
            optimizer.step()


def _switch(life: Life) -> None:
    if not life.frozen:
        life.q.train(not life.q.training)


def _copy(life: Life) -> None:
    expected, other = results(life.q, life.inputs()), copy.deepcopy(life.q)
    assert_same(results(other, life.inputs()), expected, "a copy")
    life.q = other


@contextlib.contextmanager
def _by_name(life: Life) -> Iterator[None]:
    """Let pickle find the class of a program where it says that it is defined."""
    *_, kind = (kind for kind in type(life.q).__mro__ if kind.__name__ == "Program")
    module = sys.modules[kind.__module__]
    setattr(module, kind.__name__, kind)
    yield
    delattr(module, kind.__name__)


def _save_whole(life: Life) -> None:
    expected = results(life.q, life.inputs())
    with tempfile.TemporaryDirectory() as folder, _by_name(life):
        torch.save(life.q, Path(folder) / "q.pt")
        other = torch.load(Path(folder) / "q.pt", weights_only=False)
    assert_same(results(other, life.inputs()), expected, "a saved model")
    life.q = other


def _restart(life: Life) -> None:
    if life.frozen:
        return
    expected = results(life.q, life.inputs())
    with tempfile.TemporaryDirectory() as folder:
        torch.save({"model": life.q.state_dict(), "octav": octav_fx.state(life.q)}, Path(folder) / "q.pt")
        saved = torch.load(Path(folder) / "q.pt", weights_only=True)
    other = life.new()
    other.load_state_dict(saved["model"])
    octav_fx.load_state(other, saved["octav"])
    assert_same(results(other, life.inputs()), expected, "a restart")
    life.q = other


def _report(life: Life) -> None:
    expected, state = results(life.q, life.inputs()), copy.deepcopy(life.q.state_dict())
    with contextlib.redirect_stdout(io.StringIO()):
        str(octav_fx.table(life.q, life.inputs()[0]))
        str(octav_fx.coverage(life.q))
    assert_same(list(life.q.state_dict().values()), list(state.values()), "state after a table")
    assert_same(results(life.q, life.inputs()), expected, "after a table")


def _check(life: Life) -> None:
    if life.frozen:
        return
    expected = results(life.q, life.inputs())
    with contextlib.redirect_stdout(io.StringIO()):
        octav_fx.check(life.q, life.inputs())
    assert_same(results(life.q, life.inputs()), expected, "after a check")


def _go_on_in_float(life: Life) -> None:
    """Take the weights back into the float model; what is frozen or learned has keys of its own."""
    missing, unexpected = life.grammar.built(life.source).load_state_dict(life.q.state_dict(), strict=False)
    assert not missing, missing
    assert life.config.learned or life.frozen or not unexpected, unexpected


def _configuration(life: Life) -> None:
    assert Config.from_dict(json.loads(json.dumps(life.config.to_dict()))) == life.config


def _compile(life: Life) -> None:
    torch.compiler.reset()
    expected, other = results(life.q, life.inputs()), copy.deepcopy(life.q)
    compiled = torch.compile(other, backend="eager")
    with torch.no_grad():
        found = [t.detach() for args in life.inputs() for t in tensors(run(compiled, args))]
    assert_same(found, expected, "compiled")


def _twice(life: Life) -> None:
    assert_same(results(life.q, life.inputs()), results(life.q, life.inputs()), "a second time")


def _freeze(life: Life) -> None:
    if life.frozen:
        octav_fx.unfreeze(life.q)
        life.frozen = False
        return
    octav_fx.calibrate(life.q.eval(), life.inputs())
    saved, extra = copy.deepcopy(life.q.state_dict()), octav_fx.state(life.q)
    octav_fx.freeze(life.q)
    life.frozen = True
    other = life.new()
    other.load_state_dict(saved)
    octav_fx.load_state(other, extra)
    octav_fx.freeze(other)
    assert_same(results(other, life.inputs()), results(life.q, life.inputs()), "frozen after a restart")


def _convert(life: Life) -> None:
    if not life.frozen:
        return
    expected = results(life.q, life.inputs())
    try:
        converted = octav_fx.convert(life.q, integers=False)
    except OctavError:
        return
    assert_same(results(converted, life.inputs()), expected, "converted")
    assert_same(results(life.q, life.inputs()), expected, "after convert")
    assert_same(results(copy.deepcopy(converted), life.inputs()), expected, "a copy of the converted model")
    integers = octav_fx.convert(life.q)
    for args in life.inputs():
        check_codes(copy.deepcopy(converted), copy.deepcopy(integers), args)
    with tempfile.TemporaryDirectory() as folder, _by_name(life):
        torch.save(integers, Path(folder) / "q.pt")
        other = torch.load(Path(folder) / "q.pt", weights_only=False)
    assert_same(results(other, life.inputs()), results(integers, life.inputs()), "a saved converted model")


def _call_with(life: Life) -> None:
    # A program may assign what it computes to a parameter, which is none in such a call.
    if "weight *=" in life.source or life.frozen:
        return
    expected = results(life.q, life.inputs())
    other = copy.deepcopy(life.q)
    given = {name: p.detach().clone() for name, p in other.named_parameters()}
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
        found = []
        for args in life.inputs():
            torch.manual_seed(1)
            found += tensors(torch.func.functional_call(other, given, tuple(map(torch.clone, args))))
    assert_same([t.detach() for t in found], expected, "functional_call")


def _other_type(life: Life) -> None:
    if life.frozen:
        return
    other = copy.deepcopy(life.q).double()
    inputs = [tuple(t.double() for t in args) for args in life.inputs()]
    results(other, inputs)
    assert_same(results(other.float(), life.inputs()), results(life.q, life.inputs()), "to double and back")


# What is done, and how often beside the others.
STEPS: Final[dict[Callable[[Life], None], int]] = {
    **{_train: 3, _switch: 1, _copy: 1, _save_whole: 1, _restart: 2, _call_with: 1, _other_type: 1, _compile: 1},
    **{_report: 1, _check: 1, _configuration: 1, _go_on_in_float: 1, _twice: 1, _freeze: 2, _convert: 3},
}


def program(seed: int) -> str:
    """Write a program of one of the grammars."""
    return random.Random(seed).choice((fuzz, fuzz_images)).program(seed)


def is_valid(source: str, training: bool) -> bool:
    return _grammar(source).is_valid(source, training)


def _grammar(source: str) -> Any:
    return fuzz_images if "self.stem(" in source else fuzz


def fault_lived(source: str, seed: int) -> str | None:
    """Say what a life promised and did not keep, or return None; what quantize refuses is none."""
    drawn, grammar, training = random.Random(seed), _grammar(source), bool(seed % 2)
    config = configuration(drawn)
    if not is_valid(source, training):
        return None
    torch.manual_seed(0)
    with as_words() as words:
        life = Life(quantized(source, grammar, config, training), config, source, grammar, training)
    if words:
        return words.get("fault")
    done: list[str] = []
    for step in drawn.choices(list(STEPS), list(STEPS.values()), k=drawn.randint(4, 9)):
        done.append(step.__name__)
        with as_words() as words:
            step(life)
        if words:
            return f"{done} {words}\n{config}"
    return None
