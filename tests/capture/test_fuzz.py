"""Programs from the grammar of tests/support/fuzz.py: the quantized ones, quantizers aside, are the float ones."""

import itertools

import pytest
import torch
from torch import nn

import octav_fx
from octav_fx.nn import FakeQuantizer
from tests.support import fuzz_lives
from tests.support.faults import KINDS, fault_compiled, fault_deployed, fault_exported, fault_operands, fault_quantized
from tests.support.follow import fault_followed, followed
from tests.support.fuzz import built, inputs, is_valid
from tests.support.fuzz_lives import fault_lived

# The last programs that are exported branch on sizes, or take rows one by one.
SEEDS = {
    **{"quantized": range(40), "deployed": range(12), "images": range(24), "exported": (1, 8, 10, 16, 40, 51)},
    **{"exported_images": range(6), "python": range(16), "lives": range(12)},
    **{"operands": range(12), "python_operands": range(12)},
}
COMPILED = {"compiled": range(6), "python_compiled": range(4)}


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "seed"), [(kind, seed) for kind, seeds in SEEDS.items() for seed in seeds])
def test_a_program(kind: str, seed: int) -> None:
    source = KINDS[kind].grammar.program(seed)
    assert KINDS[kind].fault(source, seed) is None, source


@pytest.mark.compile
@pytest.mark.parametrize(("kind", "seed"), [(kind, seed) for kind, seeds in COMPILED.items() for seed in seeds])
def test_a_compiled_program(kind: str, seed: int) -> None:
    source = KINDS[kind].grammar.program(seed)
    assert KINDS[kind].fault(source, seed) is None, source


def test_every_kind_of_program_is_tested() -> None:
    assert {*SEEDS, *COMPILED} == KINDS.keys()


# What the fuzzer has found.
FOUND = {
    "out=None is no write": """
with torch.no_grad():
    z = torch.tensordot(y, self.a.weight, 1)
return self.c(z) + self.c(y)""",
    "a guard on what a baked size lets fail": """
z = torch.stack([self.b(t) for t in y.exp().log1p()], 0)
return self.attention(z, x, torch.stack([self.b(t) for t in y.exp().log1p()], 0))[0]""",
    "a name for what was written twice": """
z = self.a(x)
w = z
w *= 2
w += y
return z""",
    "a size of what has a gradient of its own, and a write into an argument": """
y.sub_(1)
z = tripled(x * 2)
return z.view(len(z), z.size(1), 2, 4).flatten(2)""",
    "a size of what is computed from a buffer that was written": """
self.mean.mul_(0.9).add_(x.detach().mean((0, 1)), alpha=0.1)
z = self.tripled(x - x.mean(1, keepdim=True)) + self.mean
x += (-z).view(len(-z), (-z).size(1), 2, 4).flatten(2)
return z""",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FOUND)
@pytest.mark.parametrize("training", [False, True])
def test_what_was_found(name: str, training: bool) -> None:
    source = FOUND[name].strip()
    assert is_valid(source, training)
    assert fault_quantized(source, training) is None


FOUND_IN_FILES = {
    "a pattern of sizes": """
class Net(Base):
    def forward(self, x, y, factor=1.0):
        match x.shape:
            case (_, t, 8) if t > 5:
                return self.a(x)
            case _:
                return self.c(y)

STEPS = ["x, y = sized(2, 6)", "r = m(x, y)", "r = m(y, x, factor=y[:1, :1])"]
""",
    "a pattern of sizes, after a layer was replaced that nothing calls": """
class Net(Base):
    def forward(self, x, y):
        match y.shape:
            case (_, t, 8) if t > 5:
                z = x
            case _:
                z = self.a(x)
        return self.b(z)

STEPS = ["x, y = sized(2, 6)", "m.c = nn.Linear(8, 8)", "r = m(x, x)"]
""",
    "a flag": """
class Net(Base):
    def __init__(self):
        super().__init__()
        self.done = False

    def forward(self, x, y):
        self.done = True
        return self.a(x) + y

STEPS = ["r = m(x, y)", "m.done = False", "r = m(y, x)"]
""",
    "a count in a global": """
CALLS = 0

class Net(Base):
    def forward(self, x, y):
        global CALLS
        CALLS += 1
        z = self.a(x)
        return z * 2 if CALLS > 3 else z + y

STEPS = ["r = m(x, y)", "r = m(x, y)", "x, y = sized(1, 4)", "r = m(x, y)", "r = m(x, y)"]
""",
}


@pytest.mark.parametrize("name", FOUND_IN_FILES)
@pytest.mark.parametrize("training", [False, True])
def test_what_was_found_in_files(name: str, training: bool) -> None:
    source = FOUND_IN_FILES[name].strip()
    assert followed(source, training) is not None
    assert fault_followed(source, training) is None


def without_levels(q: nn.Module) -> nn.Module:
    for quantizer in q.modules():
        if isinstance(quantizer, FakeQuantizer):
            quantizer.__dict__["forward"] = lambda x: x
    return q


@pytest.mark.slow
def test_a_fault_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another program in place of the one that is looked for differs; one that raises has raised."""
    quantize, convert, export, compiled = octav_fx.quantize, octav_fx.convert, octav_fx.export_onnx, torch.compile
    source, other = "return self.a(x)", quantize(built("return self.b(x)").eval(), inputs()[0])
    monkeypatch.setattr(torch, "compile", lambda model, **options: compiled(other, **options))
    assert str(fault_compiled(source, 0)).startswith("differs: result of call 0")
    octav_fx.freeze(octav_fx.calibrate(other, inputs()))
    monkeypatch.setattr(octav_fx, "convert", lambda model, **options: convert(other, **options))
    assert fault_deployed(source, 0) == "differs: not as frozen"
    monkeypatch.setattr(octav_fx, "export_onnx", lambda model, *args, **options: export(other, *args, **options))
    monkeypatch.setattr(octav_fx, "convert", convert)
    assert str(fault_exported(source, 0)).startswith("differs: onnxruntime: off by")
    monkeypatch.setattr(octav_fx, "quantize", lambda model, args: quantize(built("return self.b(x)"), args))
    assert str(fault_quantized(source, 0)).startswith("differs: result for inputs 0")
    # The table says of them that they are quantized, and they are not.
    monkeypatch.setattr(octav_fx, "quantize", lambda model, *args: without_levels(quantize(model, *args)))
    assert "multiply-accumulates in float, 0 in the table" in str(fault_operands(source, 0))
    monkeypatch.setattr(octav_fx, "quantize", lambda *args: 1 / 0)
    for fault in (fault_operands, fault_quantized, fault_deployed, fault_exported, fault_compiled):
        assert fault(source, 0) == "raised ZeroDivisionError: division by zero"


@pytest.mark.slow
def test_a_fault_in_a_life_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz_lives, "STEPS", {fuzz_lives._restart: 1})
    source = fuzz_lives.program(0)
    with monkeypatch.context() as changed:
        changed.setattr(octav_fx, "load_state", lambda *_: 1 / 0)
        assert "ZeroDivisionError" in str(fault_lived(source, 0))
    numbers = itertools.count()
    monkeypatch.setattr(fuzz_lives, "results", lambda *_: [torch.tensor(next(numbers))])
    assert "differs: a restart: " in str(fault_lived(source, 0))
