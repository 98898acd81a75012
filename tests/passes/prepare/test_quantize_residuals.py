"""quantize_residuals: sums that join two paths and global pools read quantizers, one for each tensor."""

import operator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import octav_fx
from octav_fx import Config, OctavError, quantize
from octav_fx.ir.printer import graph_text
from octav_fx.nn import FakeQuantizer
from octav_fx.passes import quantize_operands, quantize_residuals
from tests.support.graphs import model
from tests.support.passes import made


class Block(nn.Module):
    """A residual block, an inverted one without relu, a pool and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.two = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.pool, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = (self.one(x) + x).relu()
        x = x + self.two(x)
        return self.head(self.pool(x).flatten(1))


CONFIG = Config(edge_bits=None, residual_bits=8)


def quantizers(q: nn.Module) -> dict[str, FakeQuantizer]:
    return dict(q.quantizers.named_children())


def test_one_quantizer_for_each_tensor_and_the_narrow_ones_read_it():
    x = torch.randn(2, 3, 4, 4)
    q = quantize(Block().eval(), x, CONFIG)
    assert (
        graph_text(q.graph)
        == """\
stem_weight = self.stem.weight
stem_bias = self.stem.bias
quantizers_stem_input = self.quantizers.stem_input(x)
quantizers_stem_weight = self.quantizers.stem_weight(stem_weight)
stem = conv2d(quantizers_stem_input, quantizers_stem_weight, stem_bias, (1, 1), (0, 0), (1, 1), 1)
relu = stem.relu()
quantizers_add_y = self.quantizers.add_y(relu)
one_weight = self.one.weight
one_bias = self.one.bias
quantizers_one_input = self.quantizers.one_input(quantizers_add_y)
quantizers_one_weight = self.quantizers.one_weight(one_weight)
one = conv2d(quantizers_one_input, quantizers_one_weight, one_bias, (1, 1), (0, 0), (1, 1), 1)
quantizers_add_x = self.quantizers.add_x(one)
add = add(quantizers_add_x, quantizers_add_y)
relu_1 = add.relu()
quantizers_add_1_x = self.quantizers.add_1_x(relu_1)
two_weight = self.two.weight
two_bias = self.two.bias
quantizers_two_input = self.quantizers.two_input(quantizers_add_1_x)
quantizers_two_weight = self.quantizers.two_weight(two_weight)
two = conv2d(quantizers_two_input, quantizers_two_weight, two_bias, (1, 1), (0, 0), (1, 1), 1)
quantizers_add_1_y = self.quantizers.add_1_y(two)
add_1 = add(quantizers_add_1_x, quantizers_add_1_y)
quantizers_pool_x = self.quantizers.pool_x(add_1)
pool = self.pool(quantizers_pool_x)
flatten = pool.flatten(1)
head_weight = self.head.weight
head_bias = self.head.bias
quantizers_head_input = self.quantizers.head_input(flatten)
quantizers_head_weight = self.quantizers.head_weight(head_weight)
head = linear(quantizers_head_input, quantizers_head_weight, head_bias)
return head"""
    )
    signed = {name: part.spec.format.signed for name, part in quantizers(q).items() if part.spec.format.bits == 8}
    assert signed == {"add_x": True, "add_y": False, "add_1_x": False, "add_1_y": True, "pool_x": True}
    assert all(part.mean is not None for name, part in quantizers(q).items() if not name.endswith("weight"))
    # Values are on the grids of both: 16 of the 256 levels.
    q(x)
    levels = quantizers(q)["one_input"](quantizers(q)["add_y"](torch.rand(1000)))
    assert len(levels.unique()) <= 16


def test_an_operand_of_as_many_bits_is_the_quantizer_of_the_sum():
    q = quantize(Block().eval(), torch.randn(2, 3, 4, 4), Config(8, 8, residual_bits=8))
    assert "add_y" not in quantizers(q)
    assert "quantizers_add_x, quantizers_one_input" in graph_text(q.graph)
    q = quantize(Block().eval(), torch.randn(2, 3, 4, 4), Config(8, 8, residual_bits=4))
    assert quantizers(q)["one_input"].spec.format.bits == 8
    assert quantizers(q)["add_x"].spec.format.bits == 4


def test_off_by_default():
    x = torch.randn(2, 3, 4, 4)
    assert not [name for name in quantizers(quantize(Block().eval(), x)) if "add" in name or "pool" in name]


def test_idempotent():
    q = quantize(Block().eval(), torch.randn(2, 3, 4, 4), CONFIG)
    text = graph_text(q.graph)
    assert made(q, lambda gm: quantize_residuals(gm, lambda place: "not asked")) == []
    assert graph_text(q.graph) == text


def test_rows_and_overrides():
    x = torch.randn(2, 3, 4, 4)
    q = quantize(Block().eval(), x, Config(residual_bits=8))
    found = {(row.node, row.operand): row.bits for row in octav_fx.rows(q, x)}
    assert {key: bits for key, bits in found.items() if key[0] in ("add", "add:1", "pool")} == {
        **{("add", "x"): 8, ("add", "y"): 8, ("add:1", "x"): 8, ("add:1", "y"): 8, ("pool", "x"): 8}
    }
    q = quantize(Block().eval(), x, Config(residual_bits=8, overrides={"add*": None, "pool": {"activation_bits": 5}}))
    reasons = {row.node: row.reason for row in octav_fx.rows(q, x) if row.reason}
    assert reasons == {"add": "override 'add*': None", "add:1": "override 'add*': None"}
    assert quantizers(q)["pool_x"].spec.format.bits == 5
    with pytest.raises(OctavError, match=r"residual_bits=9: whole bits from 2 to 8"):
        Config(residual_bits=9)


def test_gradients_pass_straight_to_a_pool():
    x = torch.randn(2, 3, 4, 4)
    found = quantizers(quantize(Block().eval(), x, Config(residual_bits=8)))
    gradients = {name: q.settings.gradient for name, q in found.items() if "add" in name or "pool" in name}
    assert {name for name, gradient in gradients.items() if gradient == "ste"} == {"pool_x"}
    assert len(gradients) > 1
    overrides = {"pool": {"activation_gradient": "mad"}}
    overridden = quantizers(quantize(Block().eval(), x, Config(residual_bits=8, overrides=overrides)))
    assert overridden["pool_x"].settings.gradient == "mad"
    # A learned clip has its paper's.
    learned = quantizers(quantize(Block().eval(), x, Config(residual_bits=8, clip="lsq")))
    assert learned["pool_x"].settings.gradient == "pwl"


def test_what_is_no_join():
    def forward(self, x):
        y = self.one(x)
        # A constant, one that is broadcast, a number, a mean over something else.
        y = y + self.table + y.mean((2, 3), keepdim=True) + 1
        return self.two(y) * y.mean(1, keepdim=True)

    parts = {"one": nn.Conv2d(3, 4, 1), "two": nn.Conv2d(4, 4, 1), "table": torch.randn(4, 4, 4)}
    q = quantize(model(forward, **parts).eval(), torch.randn(2, 3, 4, 4), CONFIG)
    assert [name for name in quantizers(q) if "one" not in name and "two" not in name] == ["mean_x"]


def test_sums_in_place():
    def forward(self, x):
        y = self.one(x)
        y += x
        z = self.two(x)
        return operator.iadd(z, y) + z

    x = torch.randn(2, 3, 4, 4)
    parts = {"one": nn.Conv2d(3, 3, 1), "two": nn.Conv2d(3, 3, 1)}
    float_module = model(forward, **parts).eval()
    q = quantize(float_module, x, CONFIG)
    with octav_fx.float_mode(q):
        assert torch.equal(q(x), float_module(x))
    # 8 bits of the sums, 4 of the operands.
    assert float((q(x) - float_module(x)).abs().max() / float_module(x).abs().max()) < 0.3


@pytest.mark.parametrize(
    "write",
    [lambda y: y.add_(y), lambda y: y.add_(other=y), lambda y: y.add_(y.view_as(y)), lambda y: y.T.add_(y.T)],
    ids=["itself", "by its name", "a view of it", "a view into a view"],
)
def test_what_a_sum_writes_into_itself_is_read_after_it(write):
    def forward(self, x):
        y = self.one(x)
        write(y)
        return self.two(y)

    x = torch.randn(4, 4)
    q = quantize(model(forward, one=nn.Linear(4, 4), two=nn.Linear(4, 4)).eval(), x, CONFIG)
    given = []
    found = quantizers(q)
    seen = found["two_input"].register_forward_hook(lambda _, args, result: given.append((args[0].clone(), result)))
    q(x)
    seen.remove()
    one = F.linear(found["one_input"](x), found["one_weight"](q.one.weight), q.one.bias)
    ((operand, levels),) = given
    # The sum itself, or that of levels of 8 bits: a step of them at most, twice.
    step = float(one.detach().abs().max()) / 127
    torch.testing.assert_close(operand, 2 * one, rtol=0, atol=2 * step)
    assert levels.unique().numel() <= 16
    octav_fx.freeze(octav_fx.calibrate(q, [x]))
    assert torch.equal(octav_fx.convert(q, integers=False)(x), q(x))
    integers = octav_fx.convert(q)(x)
    # Of 4 bits of two_input a code may lie at a tie, for one at the most.
    assert float((integers - q(x)).abs().max()) <= 1e-5


@pytest.mark.compile
def test_training_compiled_and_eager_and_a_second_graph():
    x = torch.randn(4, 3, 4, 4)
    q = quantize(Block(), x, CONFIG)
    q(x).sum().backward()
    expected = {name: p.grad.clone() for name, p in q.named_parameters()}
    q.zero_grad()
    torch.compile(q, backend="octav")(x).sum().backward()
    for name, p in q.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-4, atol=1e-5)
    q.eval()
    octav_fx.freeze(octav_fx.calibrate(q, [x]))
    assert q(x).isfinite().all()


@pytest.mark.compile
def test_a_float_model_that_is_compiled():
    x = torch.randn(4, 3, 4, 4)
    float_module = Block().eval()
    q = quantize(float_module, x, CONFIG)
    compiled = torch.compile(float_module, backend="octav", options={"edge_bits": None, "residual_bits": 8})
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), q(x), rtol=1e-4, atol=1e-5)


def test_functions_of_pools():
    def forward(self, x):
        y = self.one(x)
        return F.adaptive_avg_pool2d(y, (1, 1)), F.adaptive_avg_pool2d(self.one(x), 2), y.mean([-2, -1])

    q = quantize(model(forward, one=nn.Conv2d(3, 4, 1)).eval(), torch.randn(2, 3, 4, 4), CONFIG)
    # One tensor, one quantizer; a pool to more than one position is none.
    assert [name for name in quantizers(q) if "one" not in name] == ["adaptive_avg_pool_x"]


FUNCTIONS = {
    "silu, in place, behind a norm": (lambda s, x: s.f(s.norm(s.one(x))), ["f_x"]),
    "hardswish by hand": (lambda s, x: (y := s.one(x)) * F.relu6(y + 3) / 6, ["add_x"]),
    "a clamp": (lambda s, x: F.relu6(s.one(x)), []),
    "of the input": (lambda s, x: s.one(F.silu(x)), []),
    "of a linear layer": (lambda s, x: F.gelu(s.head(x)), []),
}


@pytest.mark.parametrize(("forward", "expected"), FUNCTIONS.values(), ids=list(FUNCTIONS))
def test_functions_of_convolutions(forward, expected):
    parts = {"one": nn.Conv2d(4, 4, 1), "norm": nn.BatchNorm2d(4), "head": nn.Linear(4, 4), "f": nn.SiLU(inplace=True)}
    x = torch.randn(2, 4, 4, 4)
    q = quantize(model(forward, **parts).eval(), x, CONFIG)
    named = quantizers(q)
    assert [name for name in named if name.rpartition("_")[2] == "x"] == expected
    for name in expected:
        assert named[name].spec.format.bits == 8
        assert [node.name for node in q.graph.nodes if f"quantizers_{name}" in map(str, node.all_input_nodes)]


def test_what_several_read_of_a_convolution():
    def forward(self, x):
        y = self.one(x).relu()
        return self.two(torch.cat([y, self.two(F.max_pool2d(y, 1))], 1)[:, :4])

    x = torch.randn(2, 3, 4, 4)
    q = quantize(model(forward, one=nn.Conv2d(3, 4, 1), two=nn.Conv2d(4, 4, 1)).eval(), x, CONFIG)
    text = graph_text(q.graph)
    assert "relu = one.relu()\nquantizers_max_pool_x = self.quantizers.max_pool_x(relu)\n" in text
    assert "max_pool2d = max_pool2d(quantizers_max_pool_x, 1, " in text
    assert "cat = cat([quantizers_max_pool_x, two], 1)\n" in text
    assert not quantizers(q)["max_pool_x"].spec.format.signed
    found = {(row.node, row.operand) for row in octav_fx.rows(q, x) if row.bits == 8}
    assert found == {("max_pool", "x"), ("cat", "x0")}
    assert made(q, lambda gm: quantize_residuals(gm, lambda place: "not asked")) == []
    assert graph_text(q.graph) == text


def two_halves(self, x):
    a, b = self.one(x).chunk(2, 1)
    return self.two(torch.cat([a, self.few(b)], 1))


SHARED = {
    "halves": (two_halves, ["chunk_x"]),
    "a part of what is concatenated": (
        lambda s, x: s.two(torch.cat([y := s.one(x), s.two(y)], 1)[:, 2:6]),
        ["cat_x0"],
    ),
    "a pool, and a pool of it": (
        lambda s, x: s.two(torch.cat([y := s.one(x), z := F.max_pool2d(y, 3, 1, 1), F.max_pool2d(z, 3, 1, 1)])),
        ["max_pool_x"],
    ),
    "a concatenation": (
        lambda s, x: s.two(y := torch.cat([s.few(x[:, :2]), s.few(x[:, 2:])], 1)) + s.two(F.avg_pool2d(y, 1)),
        ["add_x", "add_y", "avg_pool_x"],
    ),
    "of a norm, enlarged": (
        lambda s, x: s.two(y := s.norm(s.one(x))).mean() + s.two(F.interpolate(y, scale_factor=2, mode="bilinear")),
        ["interpolate_x"],
    ),
    "enlarged, and both by several": (
        lambda s, x: (
            s.two(y := s.one(x)).mean()
            + s.two(torch.cat([z := s.up(y), s.two(z)], 1)[:, 2:6])
            + s.two(F.max_pool2d(z, 1))
        ),
        ["add_1_x", "add_1_y", "up_x"],
    ),
    "padded, and both by several": (
        lambda s, x: (
            s.two(y := s.one(x)).mean()
            + s.two(torch.cat([z := F.pad(y, (1, 1, 1, 1)), s.two(z)], 1)[:, 2:6])
            + s.two(F.max_pool2d(z, 1))
        ),
        ["add_1_x", "add_1_y", "pad_x"],
    ),
    "by keywords": (
        lambda s, x: s.two(
            torch.cat(tensors=[y := s.one(x), s.two(torch.add(input=y, other=s.one(x)))], dim=1)[:, 2:6]
        ),
        ["add_x", "add_y"],
    ),
    "indices of a pool": (
        lambda s, x: s.two(torch.cat([i := s.pool(s.one(x))[1], s.two(x)], 1)[:, 2:6]) + i[:, :1],
        [],
    ),
    "one quantizer reads all of it": (lambda s, x: s.two(F.max_pool2d(s.one(x), 2)), []),
    "nothing quantizes it": (lambda s, x: (y := s.one(x), F.max_pool2d(y, 2)), []),
    "of a linear layer": (lambda s, x: s.two(y := s.head(x)).mean() + s.two(F.max_pool2d(y, 2)), []),
    "the input": (lambda s, x: s.two(x).mean() + s.two(F.max_pool2d(x, 2)), []),
    "its sizes": (lambda s, x: s.two((y := s.one(x)).reshape(y.shape[0], 4, 4, len(y[0]))), []),
}


@pytest.mark.parametrize(("forward", "expected"), SHARED.values(), ids=list(SHARED))
def test_what_is_shared(forward, expected):
    parts = {"one": nn.Conv2d(4, 4, 1), "two": nn.Conv2d(4, 4, 1), "few": nn.Conv2d(2, 2, 1)}
    parts |= {
        "up": nn.Upsample(scale_factor=2),
        "norm": nn.BatchNorm2d(4),
        "head": nn.Linear(4, 4),
        "pool": nn.MaxPool2d(1, return_indices=True),
    }
    x = torch.randn(2, 4, 4, 4)
    float_module = model(forward, **parts).eval()
    q = quantize(float_module, x, CONFIG)
    assert sorted(name for name, part in quantizers(q).items() if part.spec.format.bits == 8) == expected
    with octav_fx.float_mode(q):
        torch.testing.assert_close(q(x), float_module(x), rtol=0, atol=0)


def branches(self, x):
    y = self.one(x).relu()
    return self.two(y), self.two(F.max_pool2d(y, 3, 1, 1)), self.two(F.pad(y, (1, 1, 1, 1)))


def test_one_quantizer_for_equal_ones_behind_moves():
    x = torch.randn(2, 3, 4, 4)
    q = quantize(model(branches, one=nn.Conv2d(3, 4, 1), two=nn.Conv2d(4, 4, 1)).eval(), x, CONFIG)
    text = graph_text(q.graph)
    assert (
        text
        == """\
one_weight = self.one.weight
one_bias = self.one.bias
quantizers_one_input = self.quantizers.one_input(x)
quantizers_one_weight = self.quantizers.one_weight(one_weight)
one = conv2d(quantizers_one_input, quantizers_one_weight, one_bias, (1, 1), (0, 0), (1, 1), 1)
relu = one.relu()
quantizers_two_input = self.quantizers.two_input(relu)
two_weight = self.two.weight
two_bias = self.two.bias
quantizers_two_weight = self.quantizers.two_weight(two_weight)
two = conv2d(quantizers_two_input, quantizers_two_weight, two_bias, (1, 1), (0, 0), (1, 1), 1)
max_pool2d = max_pool2d(quantizers_two_input, 3, stride=1, padding=1, dilation=1, ceil_mode=False, return_indices=False)
two_1 = conv2d(max_pool2d, quantizers_two_weight, two_bias, (1, 1), (0, 0), (1, 1), 1)
pad = pad(quantizers_two_input, (1, 1, 1, 1), mode='constant', value=None)
two_2 = conv2d(pad, quantizers_two_weight, two_bias, (1, 1), (0, 0), (1, 1), 1)
return (two, two_1, two_2)"""
    )
    assert made(q, lambda gm: quantize_residuals(gm, lambda place: "not asked")) == []
    assert made(q, lambda gm: quantize_operands(gm, lambda place: "not asked")) == []
    assert graph_text(q.graph) == text
    # The names are among those without residual_bits, and the rows say how what is moved is represented.
    assert set(quantizers(q)) == {"one_input", "one_weight", "two_input", "two_weight"}
    rows = {(row.node, row.operand): (row.shape, row.bits, row.clip) for row in octav_fx.rows(q, x)}
    clip = float(quantizers(q)["two_input"].hint)
    assert rows["two:1", "input"] == ((2, 4, 4, 4), 4, clip)
    assert rows["two:2", "input"] == ((2, 4, 6, 6), 4, clip)
    assert rows["max_pool", "x"] == ((2, 4, 4, 4), 4, clip)


def test_what_one_quantizer_rounds_is_what_each_would_round():
    x = torch.randn(2, 3, 4, 4)
    q = quantize(model(branches, one=nn.Conv2d(3, 4, 1), two=nn.Conv2d(4, 4, 1)).eval(), x, CONFIG)
    octav_fx.freeze(octav_fx.calibrate(q, [x])).train()
    parts = quantizers(q)
    y = F.conv2d(parts["one_input"](x), parts["one_weight"](q.one.weight), q.one.bias).relu()
    weight = parts["two_weight"](q.two.weight)
    moved = (y, F.max_pool2d(y, 3, 1, 1), F.pad(y, (1, 1, 1, 1)))
    for value, found in zip(moved, q(x), strict=True):
        assert torch.equal(found, F.conv2d(parts["two_input"](value), weight, q.two.bias))


@pytest.mark.compile
def test_branches_train_compiled_as_eager_and_in_a_second_graph():
    x = torch.randn(2, 3, 8, 8)
    q = quantize(model(branches, one=nn.Conv2d(3, 4, 1), two=nn.Conv2d(4, 4, 1)), x, CONFIG)
    sum(y.sum() for y in q(x)).backward()
    expected = {name: p.grad.clone() for name, p in q.named_parameters()}
    q.zero_grad()
    sum(y.sum() for y in torch.compile(q, backend="octav")(x)).backward()
    for name, p in q.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-4, atol=1e-4)
    # One more kind of call, and the quantizers that are there.
    assert len(q(x[0])) == 3
    assert set(quantizers(q)) == {"one_input", "one_weight", "two_input", "two_weight"}


KEPT = {
    "another reader": (
        lambda s, x: (s.two(y := s.one(x)), s.last(F.max_pool2d(y, 2)), y.sum()),
        {},
        ["max_pool_x"],
    ),
    "a mean": (lambda s, x: (s.two(y := s.one(x)), s.last(F.avg_pool2d(y, 2))), {}, ["avg_pool_x"]),
    "parts": (lambda s, x: [s.few(part) for part in s.one(x).chunk(2, 1)], {}, ["chunk_x"]),
    "other bits": (
        lambda s, x: (s.two(y := s.one(x)), s.last(F.max_pool2d(y, 2))),
        {"overrides": {"last": {"activation_bits": 3}}},
        ["max_pool_x"],
    ),
    "an override of the place": (
        lambda s, x: (s.two(y := s.one(x)), s.last(F.max_pool2d(y, 2))),
        {"overrides": {"max_pool": {"activation_bits": 8}}},
        ["max_pool_x"],
    ),
    "an override to float": (
        lambda s, x: (s.two(y := s.one(x)), s.last(F.max_pool2d(y, 2))),
        {"overrides": {"max_pool": None}},
        [],
    ),
    "learned clips": (
        lambda s, x: (s.two(y := s.one(x)), s.last(F.max_pool2d(y, 2))),
        {"clip": "lsq"},
        ["max_pool_x"],
    ),
    "tokens": (
        lambda s, x: (s.two(y := s.one(x)), s.last(F.max_pool2d(y, 2))),
        {"activation_granularity": "token"},
        ["max_pool_x"],
    ),
    "levels that are not even": (
        lambda s, x: (s.two(y := s.one(x)), s.last(F.max_pool2d(y, 2))),
        {"activation_format": "e2m1"},
        ["max_pool_x"],
    ),
    "written into": (
        lambda s, x: (s.two(y := s.one(x)), s.last(z := F.max_pool2d(y, 2)), z.add_(1)),
        {},
        ["max_pool_x"],
    ),
}


@pytest.mark.parametrize(("forward", "options", "expected"), KEPT.values(), ids=list(KEPT))
def test_quantizers_that_one_cannot_stand_for(forward, options, expected):
    sizes = {"one": (3, 4), "two": (4, 4), "last": (4, 4), "few": (2, 2)}
    parts = {name: nn.Conv2d(*channels, 1) for name, channels in sizes.items()}
    x = torch.randn(2, 3, 4, 4)
    q = quantize(model(forward, **parts).eval(), x, Config(edge_bits=None, residual_bits=8, **options))
    assert [name for name, part in quantizers(q).items() if part.spec.format.bits == 8] == expected
    narrow = [name for name in quantizers(q) if name.endswith("_input") and not name.startswith("one")]
    assert len(narrow) == 2


WRITTEN = {
    "a part": lambda s, x: s.two((y := s.one(x), y[:, :2].add_(1.5))[0] + s.one(x)),
    "all of it, as another shape": lambda s, x: s.two((y := s.one(x), y.view(y.shape).mul_(0.4))[0] + s.one(x)),
    "a half, behind a pool": lambda s, x: (
        s.two((y := s.one(x), F.max_pool2d(y, 2), y[:, 1:].mul_(0.4))[0]) + s.two(F.max_pool2d(y, 1))
    ),
}


@pytest.mark.parametrize("forward", WRITTEN.values(), ids=list(WRITTEN))
def test_what_is_written_into_by_a_view_has_no_levels(forward):
    x = torch.randn(2, 3, 4, 4)
    q = quantize(model(forward, one=nn.Conv2d(3, 4, 1), two=nn.Conv2d(4, 4, 1)).eval(), x, CONFIG)
    assert {row.reason for row in octav_fx.rows(q, x) if row.reason} == {
        f"{name} is written in place by another node" for name in ("one",)
    }
    octav_fx.freeze(octav_fx.calibrate(q, [x]))
    expected = q(x)
    # Sums of eight products, in another order.
    atol = 8 * torch.finfo(torch.float32).eps * float(expected.abs().max())
    torch.testing.assert_close(octav_fx.convert(q)(x), expected, rtol=0, atol=atol)
