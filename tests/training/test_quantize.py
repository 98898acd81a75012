"""quantize(): what it takes, what it returns, what it leaves alone, what it refuses."""

import contextlib
import copy
import gc
import random
import re

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import octav_fx
from octav_fx import Config, OctavError, quantize
from octav_fx.capture.rerun import without_quantizers
from octav_fx.capture.whole import WholeModule
from tests.support.on_grid import OnGrid


class Net(nn.Module):
    """Everything that keeps state of its own: batch norm, dropout as a module and as a function."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 6, 3, padding=1)
        self.dropout = nn.Dropout(0.5)
        self.middle = nn.Linear(6, 5)
        self.head = nn.Linear(5, 2)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        x = F.relu(self.norm(self.conv1(x)))
        x = F.relu(self.conv2(x)).mean((2, 3)) * scale
        x = F.dropout(self.dropout(x), 0.2, self.training)
        return self.head(F.gelu(self.middle(x)))


class Function(nn.Module):
    """A forward given by a function of two layers and the input."""

    def __init__(self, function) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


class Calls(TorchDispatchMode):
    """Counts the quantizers that run."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.octav.dynamic_fake_quantize.default
        return func(*args, **(kwargs or {}))


def calls(q: nn.Module, *args: Tensor) -> int:
    with Calls() as counted:
        q(*args)
    return counted.count


def images(batch: int = 2, size: int = 8) -> Tensor:
    return torch.randn(batch, 3, size, size)


def bits_by_site(q: nn.Module) -> dict[tuple[str, str], int | None]:
    return {(row.node, row.operand): row.bits for row in octav_fx.rows(q)}


# What it takes.


def test_example_inputs_are_a_tensor_a_tuple_a_list_or_a_dict():
    model, x = Net().eval(), images()
    expected = quantize(model, x)(x)
    for example in ((x,), [x], {"x": x}, {"x": x, "scale": 1.0}):
        assert torch.equal(quantize(model, example)(x), expected)


def test_returns_a_graph_module_with_the_quantizers_in_its_code():
    q = quantize(Net(), images())
    assert isinstance(q, WholeModule)
    assert "self.quantizers.conv1_weight(" in q.code


def test_other_batch_and_image_sizes_work_afterwards():
    model = Net().eval()
    q = quantize(model, images(), Config(edge_bits=None))
    for x in (images(1), images(7), images(3, size=13)):
        with octav_fx.float_mode(q):
            assert torch.equal(q(x), model(x))
        with OnGrid(4) as seen:
            q(x)
        assert (seen.checked, seen.off_grid) == (4, [])


def test_containers_go_in_and_out():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(8, 8)

        def forward(self, batch: dict[str, Tensor], *rest: Tensor, factor: Tensor) -> dict[str, list[Tensor]]:
            return {name: [self.a(x) * factor, *rest] for name, x in batch.items()}

    x = torch.randn(2, 8)

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Model()

        def forward(self, batch: dict[str, Tensor], y: Tensor) -> dict[str, list[Tensor]]:
            return self.inner(batch, y, factor=y)

    q = quantize(Outer(), ({"one": x, "two": x + 1}, x))
    out = q({"one": x, "two": x + 1}, x)
    assert list(out) == ["one", "two"]
    assert [len(values) for values in out.values()] == [2, 2]


def test_plain_attributes_stay_and_a_bound_forward_is_not_float_in_silence():
    model = Net()
    model.classes = ["cat", "dog"]
    model.predict = model.forward
    q = quantize(model, images())
    assert q.classes == ["cat", "dog"]
    with pytest.raises(OctavError, match="of Net would compute in float here"):
        q.predict(images())


# What it leaves alone.


@pytest.mark.parametrize("training", [True, False])
def test_nothing_that_the_user_passed_in_changes(training):
    model = Net().train(training)
    model.norm.eval()
    x, config = images(), Config(overrides={"head": {"weight_bits": 3}})
    before = copy.deepcopy((model.state_dict(), x, config))
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    modes = {name: module.training for name, module in model.named_modules()}
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    q = quantize(model, x, config)
    octav_fx.table(q)
    for now, then in zip(model.state_dict().values(), before[0].values(), strict=True):
        assert torch.equal(now, then)
    assert torch.equal(x, before[1])
    assert config == before[2]
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]
    assert not {p.data_ptr() for p in q.parameters()} & {p.data_ptr() for p in model.parameters()}


@pytest.mark.parametrize("features", [4, 5])
def test_the_garbage_collector_runs_as_before(features):
    before = gc.get_threshold(), gc.get_freeze_count()
    with contextlib.suppress(OctavError):
        quantize(nn.Linear(4, 4), torch.randn(2, features))
    assert (gc.get_threshold(), gc.get_freeze_count()) == before


def test_a_model_that_writes_into_its_input_gets_a_copy():
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(8, 8))
    x = torch.randn(2, 8)
    before = x.clone()
    q = quantize(model, x)
    octav_fx.table(q)
    assert torch.equal(x, before)
    assert torch.equal(q.examples[0][0], before)


def test_a_buffer_that_forward_writes_into_is_counted_by_the_model_not_by_quantize():
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(8, 8)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls.add_(1)
            return self.a(x)

    x = torch.randn(2, 8)
    q = quantize(Counting(), x)
    octav_fx.table(q)
    assert q.calls == 0
    q(x)
    assert q.calls == 1


def test_gradients_of_inputs_and_parameters_stay_empty():
    model, x = Net(), images().requires_grad_()
    q = quantize(model, x)
    assert x.grad is None
    assert all(p.grad is None for p in (*model.parameters(), *q.parameters()))


@pytest.mark.parametrize("training", [True, False])
def test_each_submodule_keeps_its_mode(training):
    model = Net().train(training)
    model.norm.train(not training)
    q = quantize(model, images())
    expected = {name: module.training for name, module in model.named_modules()}
    assert {name: module.training for name, module in q.named_modules() if name in expected} == expected


class SetByInit(nn.Identity):
    """As a layer of einops: what is copied or unpickled begins anew, in training mode."""

    def __setstate__(self, state):
        self.__init__()


def test_a_module_that_begins_anew_where_it_is_copied_keeps_its_mode():
    q = octav_fx.quantize(nn.Sequential(SetByInit(), nn.Linear(4, 2)).eval(), torch.randn(2, 4))
    assert not any(module.training for module in q.modules())


class Selected(nn.Module):
    """A parametrized layer behind a size that depends on data."""

    def __init__(self):
        super().__init__()
        self.fc, self.conv = nn.Linear(4, 4), nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 4, 1))

    def forward(self, x):
        return self.conv(self.fc(x)[x[:, 0] > 0].unsqueeze(2))


@pytest.mark.filterwarnings("error")
def test_a_parametrized_weight_behind_data_is_quantized_without_a_warning():
    assert octav_fx.coverage(octav_fx.quantize(Selected().eval(), torch.randn(8, 4))).skipped == []


def test_a_frozen_batch_norm_stays_frozen():
    model = Net().train()
    model.norm.eval()
    q = quantize(model, images())
    mean = q.norm.running_mean.clone()
    q(images())
    assert torch.equal(q.norm.running_mean, mean)
    model.norm.train()
    q = quantize(model, images())
    q(images())
    assert not torch.equal(q.norm.running_mean, mean)


def test_dtype_and_frozen_parameters_stay():
    model = Net().double()
    model.conv1.weight.requires_grad_(False)
    q = quantize(model, images().double())
    assert {p.dtype for p in q.parameters()} == {torch.float64}
    assert q(images().double()).dtype is torch.float64
    assert [p.requires_grad for p in q.parameters()] == [p.requires_grad for p in model.parameters()]


def test_a_model_on_the_meta_device_is_quantized_without_data():
    with torch.device("meta"):
        model, x = Net().eval(), images()
    q = quantize(model, x)
    assert all(p.is_meta for p in q.parameters())
    for row in octav_fx.rows(q):
        assert row.bits is not None
        assert (row.clip, row.clip_min, row.max_abs, row.clipped, row.zeros, row.sqnr, row.gain) == (None,) * 7
    assert octav_fx.table(q).count("conv1") == 2
    q.to_empty(device="cpu").load_state_dict(Net().state_dict())
    assert q(images()).shape == (2, 2)


# One value, one quantizer.

SHARED = {
    # Two readers of x, two weights.
    "two layers": (lambda m, x: m.a(x) + m.b(x), 3),
    "both sides of a product": (lambda m, x: torch.matmul(x, x), 1),
    "x @ x after a layer": (lambda m, x: m.a(x) @ m.a(x), 4),
    "the same method call": (lambda m, x: x.mm(x) + x @ x, 1),
    # Its weight once, its two inputs.
    "a module called twice": (lambda m, x: m.a(m.a(x)), 3),
    "three projections": (lambda m, x: m.a(x) @ m.b(x) + m.a(x), 5),
    "a view is another value": (lambda m, x: m.a(x) + m.b(x.t()), 4),
    "after a write in place it is another value": (lambda m, x: m.a(y := x.clone()) + m.b(y.add_(1)), 4),
}


@pytest.mark.parametrize("name", SHARED)
def test_a_value_is_quantized_once(name):
    function, expected = SHARED[name]
    x = torch.randn(8, 8)
    model = Function(function)
    # An edge layer asks for other bits, so it does not share.
    q = quantize(model, x, Config(edge_bits=None))
    assert calls(q, x) == expected
    assert len(q.quantizers._modules) == expected
    with octav_fx.float_mode(q):
        assert torch.equal(q(x), model(x))
        assert calls(q, x) == 0


def test_products_of_a_value_with_itself_read_one_rounded_value():
    x = torch.randn(8, 8)
    q = quantize(Function(lambda m, x: torch.matmul(x, x)), x)
    rounded = octav_fx.fake_quantize(x, octav_fx.optimal_clip(x, 4), 4)
    assert torch.equal(q(x), rounded @ rounded)


def test_values_with_other_bits_are_not_shared():
    x = torch.randn(8, 8)
    model = Function(lambda m, x: m.a(x) + m.b(x))
    assert calls(quantize(model, x, Config(overrides={"a": {"activation_bits": 3}})), x) == 4


def test_a_module_called_twice_is_one_module_with_two_rows():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.layer(x).relu())

    x = torch.randn(2, 8)
    q = quantize(Twice(), x)
    assert list(dict(q.named_parameters())) == ["layer.weight", "layer.bias"]
    assert [row.node for row in octav_fx.rows(q)] == ["layer", "layer", "layer:1", "layer:1"]
    q(x).sum().backward()
    assert q.layer.weight.grad.abs().sum() > 0


# Edge layers, overrides, strict.


def test_edge_layers_get_eight_bits_and_the_rest_four():
    assert bits_by_site(quantize(Net(), images())) == {
        ("conv1", "input"): 8,
        ("conv1", "weight"): 8,
        ("conv2", "input"): 4,
        ("conv2", "weight"): 4,
        ("middle", "input"): 4,
        ("middle", "weight"): 4,
        ("head", "input"): 8,
        ("head", "weight"): 8,
    }


@pytest.mark.parametrize("edge_bits", [None, 2, 6])
def test_edge_bits_are_those_asked_for(edge_bits):
    bits = bits_by_site(quantize(Net(), images(), Config(weight_bits=3, activation_bits=5, edge_bits=edge_bits)))
    assert bits["conv1", "weight"] == bits["head", "weight"] == (edge_bits or 3)
    assert bits["conv1", "input"] == bits["head", "input"] == (edge_bits or 5)
    assert (bits["conv2", "weight"], bits["conv2", "input"]) == (3, 5)


def test_several_stems_and_heads_are_all_edges():
    class Forked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Conv1d(8, 8, 1), nn.Conv1d(8, 8, 1)
            self.body = nn.Linear(6, 6)
            self.classes, self.boxes = nn.Linear(6, 3), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = self.body(self.left(x) + self.right(x))
            return self.classes(x), self.boxes(x)

    bits = bits_by_site(quantize(Forked(), torch.randn(2, 8, 6)))
    assert {site for (site, _), b in bits.items() if b == 8} == {"left", "right", "classes", "boxes"}


def test_an_override_reaches_the_operands_of_its_node_only():
    config = Config(
        overrides={
            "conv*": {"weight_bits": 5},
            "conv2": {"weight_bits": 3, "activation_bits": 2, "clip": "max", "weight_gradient": "ste"},
            "middle": None,
        }
    )
    q = quantize(Net(), images(), config)
    bits = bits_by_site(q)
    assert (bits["conv1", "weight"], bits["conv1", "input"]) == (5, 8)
    assert (bits["conv2", "weight"], bits["conv2", "input"]) == (3, 2)
    assert (bits["middle", "weight"], bits["middle", "input"]) == (None, None)
    assert (bits["head", "weight"], bits["head", "input"]) == (8, 8)
    assert q.quantizers.conv2_weight.settings.method == "max"
    assert q.quantizers.conv2_weight.settings.gradient == "ste"
    assert q.quantizers.conv2_input.settings.gradient == "pwl"
    assert q.quantizers.conv1_weight.settings.method == "octav"


def test_the_name_of_a_module_is_an_override_for_all_in_it():
    model, x = nn.Sequential(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), nn.Linear(8, 8)), torch.randn(2, 8)
    rows = octav_fx.rows(quantize(model, x, Config(edge_bits=None, overrides={"0": None, "0.1": {"weight_bits": 3}})))
    assert [(row.node, row.operand, row.bits) for row in rows] == [
        *(("0.0", "input", None), ("0.0", "weight", None), ("0.1", "input", 4), ("0.1", "weight", 3)),
        *(("1", "input", 4), ("1", "weight", 4)),
    ]


def test_a_configuration_may_be_a_dict_and_wrong_ones_say_what_there_is():
    q = quantize(nn.Sequential(nn.Linear(8, 8)), torch.randn(2, 8), {"weight_bits": 3, "edge_bits": None})
    assert [row.bits for row in octav_fx.rows(q)] == [4, 3]
    with pytest.raises(OctavError, match=r"Config has no field bits; it has weight_bits, activation_bits"):
        quantize(nn.Linear(8, 8), torch.randn(2, 8), {"bits": 4})
    with pytest.raises(OctavError, match=r"a list of classes, \[Linear\]"):
        quantize(nn.Linear(8, 8), torch.randn(2, 8), leaves=nn.Linear)


def test_an_override_that_fits_no_node_is_an_error_that_lists_them():
    with pytest.raises(
        OctavError, match=r"overrides\['layer4\.\*'\] fits no node; there are conv1, conv2, head, middle"
    ):
        quantize(Net(), images(), Config(overrides={"layer4.*": None}))


@pytest.mark.parametrize("blocks", [(), "auto"])
def test_overrides_by_class_and_by_operand(blocks):
    model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)) for _ in range(3)))
    overrides = {nn.Linear: {"weight_bits": 3}, "1.0/input": None, "2.*/weight": {"weight_bits": 2}}
    q = quantize(model, torch.randn(2, 8), Config(overrides=overrides), blocks=blocks)
    assert [(row.node, row.operand, row.bits) for row in octav_fx.rows(q)] == [
        *(("0.0", "input", 4), ("0.0", "weight", 3), ("0.2", "input", 4), ("0.2", "weight", 3)),
        *(("1.0", "input", None), ("1.0", "weight", 3), ("1.2", "input", 4), ("1.2", "weight", 3)),
        *(("2.0", "input", 4), ("2.0", "weight", 2), ("2.2", "input", 8), ("2.2", "weight", 2)),
    ]
    with pytest.raises(OctavError, match=r"overrides\[Conv2d\]: no module of this Sequential is one"):
        quantize(model, torch.randn(2, 8), Config(overrides={nn.Conv2d: None}))
    with pytest.raises(OctavError, match=r"overrides\['0\.0/wieght'\] fits no node; there are 0\.0/input, 0\.0/weight"):
        quantize(model, torch.randn(2, 8), Config(overrides={"0.0/wieght": None}))


def test_an_override_that_loses_everywhere_is_none():
    q = quantize(Net(), images(), Config(overrides={"con*": None, "*": {"weight_bits": 3}}))
    weights = [row for row in octav_fx.rows(q) if row.operand == "weight"]
    assert weights and all(row.bits == 3 for row in weights)


def test_strict_lists_what_stays_float():
    quantize(Net(), images(), strict=True)
    with pytest.raises(OctavError) as caught:
        quantize(Net(), images(), Config(overrides={"conv2": None, "head": None}), strict=True)
    assert str(caught.value).splitlines() == [
        "strict=True, and 4 operands stay float:",
        "  conv2 input: override 'conv2': None",
        "  conv2 weight: override 'conv2': None",
        "  head input: override 'head': None",
        "  head weight: override 'head': None",
    ]


def test_strict_lists_products_that_no_rule_covers():
    model = Function(lambda m, x: torch.cdist(m.a(x), m.b.weight))
    with pytest.raises(OctavError, match="cdist : no rule for cdist"):
        quantize(model, torch.randn(2, 8), strict=True)


# The two modes.


class Auxiliary(nn.Module):
    """Its Python code branches on self.training, as GoogLeNet's does."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.auxiliary = nn.Linear(8, 8), nn.Linear(8, 3), nn.Conv1d(8, 2, 5)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        y = self.body(x).relu()
        if self.training:
            return self.head(y), self.auxiliary(y.transpose(1, 2))
        return self.head(y)


@pytest.mark.parametrize("training", [True, False])
def test_a_branch_on_training_is_captured_on_both_sides(training):
    model, x = Auxiliary().train(training), torch.randn(2, 6, 8)
    q = quantize(model, x, Config(edge_bits=None))
    for mode in (training, not training, training):
        q.train(mode)
        model.train(mode)
        with OnGrid(4) as seen:
            out = q(x)
        assert isinstance(out, tuple) == mode
        assert (seen.checked, seen.off_grid) == (3 if mode else 2, [])
        assert {row.node for row in octav_fx.rows(q) if row.bits} == {"body", "head", *(["auxiliary"] if mode else [])}
        idle = [] if mode else [("auxiliary", "not called for the example inputs", 0)]
        assert octav_fx.coverage(q).skipped == idle


def test_the_quantizers_of_both_modes_are_shared():
    q = quantize(Auxiliary(), torch.randn(2, 6, 8))
    assert sorted(dict(q.quantizers.named_children())) == [
        "auxiliary_input",
        "auxiliary_weight",
        "body_input",
        "body_weight",
        "head_input",
        "head_weight",
    ]


def test_a_mode_that_cannot_be_captured_says_so_when_it_is_asked_for():
    # Four columns are too few for the auxiliary head of five.
    q = quantize(Auxiliary().eval(), torch.randn(2, 4, 8))
    assert "training mode is not captured" in octav_fx.table(q)
    # As the float model does.
    with pytest.raises(RuntimeError, match=r"size"):
        q.train()(torch.randn(2, 4, 8))
    wide = torch.randn(2, 6, 8)
    q(wide)
    with without_quantizers(q):
        assert [y.shape for y in q(wide)] == [y.shape for y in q.float_forward(wide)]
    assert q.eval()(torch.randn(2, 4, 8)).shape == (2, 4, 3)


# What it refuses.


def test_what_is_not_a_module():
    with pytest.raises(OctavError, match=r"takes an nn\.Module, not function"):
        quantize(F.relu, images())
    with pytest.raises(OctavError, match=r"takes an nn\.Module, not type"):
        quantize(Net, images())


def test_what_is_quantized_already():
    q = quantize(Net(), images())
    for model in (q, nn.Sequential(q), copy.deepcopy(q)):
        with pytest.raises(OctavError, match="quantized already"):
            quantize(model, images())


def test_wrappers_that_belong_outside():
    with pytest.raises(OctavError, match=r"wrap it in DistributedDataParallel afterwards: pass model\.module"):
        quantize(nn.DataParallel(Net()), images())
    with pytest.raises(OctavError, match=r"compile it afterwards: pass model\._orig_mod"):
        quantize(torch.compile(Net()), images())


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_a_scripted_model_has_no_python():
    with pytest.raises(OctavError, match="no Python code to capture: quantize the module that was scripted"):
        quantize(torch.jit.script(nn.Sequential(nn.Linear(8, 8))), torch.randn(2, 8))


def test_lazy_modules_have_to_run_first():
    model = nn.Sequential(nn.Linear(8, 8), nn.LazyLinear(3))
    with pytest.raises(OctavError, match=r"1\.weight has no shape yet: run the model once"):
        quantize(model, torch.randn(2, 8))
    model(torch.randn(2, 8))
    assert quantize(model, torch.randn(2, 8))(torch.randn(2, 8)).shape == (2, 3)


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ((), "do not fit Net.forward: missing a required argument: 'x'"),
        ({"image": None}, "do not fit Net.forward"),
        ((1, 2, 3), "too many positional arguments; leave out what it does not take, such as labels"),
        (torch.randn(2, 4, 8, 8), r"capture stopped at .*test_quantize\.py:\d+: RuntimeError: .*channels"),
        ("a string", r"capture stopped at .*test_quantize\.py:\d+: TypeError"),
        (None, r"capture stopped at .*test_quantize\.py:\d+: "),
    ],
)
def test_inputs_that_do_not_fit(example, message):
    with pytest.raises(OctavError, match=message):
        quantize(Net(), example)


def test_integer_operands_are_named():
    class Integers(nn.Module):
        def forward(self, x: Tensor, table: Tensor) -> Tensor:
            return x @ x.t(), table @ table

    with pytest.raises(OctavError, match=r"matmul:1: input has dtype torch.int64 and shape \(3, 3\), only floating"):
        quantize(Integers(), (torch.randn(2, 8), torch.ones(3, 3, dtype=torch.long)))


def test_a_branch_on_data_is_quantized_in_parts_and_its_line_is_told():
    model, x = Function(lambda m, x: m.a(x) if x.sum() > 0 else m.b(x)), torch.ones(2, 8)
    q = quantize(model, x)
    why = r"test_quantize\.py:\d+: forward needs bool\(gt\), which depends on the data"
    assert re.search("the model: in parts, because .*" + why, octav_fx.table(q))
    with octav_fx.float_mode(q):
        for values in (x, -x):
            assert torch.equal(q(values), model(values))
    # The side that the example does not take.
    assert [(row.node, row.reason) for row in octav_fx.rows(q) if row.bits is None] == [
        ("b", "not called for the example inputs")
    ]
    with pytest.raises(OctavError, match="b : not called for the example inputs"):
        quantize(model, x, strict=True)


def test_a_branch_on_a_size_is_checked_when_the_model_runs():
    def branch(m: Function, x: Tensor) -> Tensor:
        return m.a(x) if x.shape[0] > 4 else m.b(x)

    q = quantize(Function(branch), torch.randn(2, 8))
    assert q(torch.randn(3, 8)).shape == (3, 8)
    x = torch.randn(5, 8)
    q(x)
    with without_quantizers(q):
        torch.testing.assert_close(q(x), q.float_forward(x), rtol=0, atol=1e-6)
    assert len(q.graphs_of(True)) == 2


def test_names_that_a_graph_module_needs():
    class Clash(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.quantizers = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.quantizers(x)

    model, x = Clash(), torch.randn(2, 8)
    q = quantize(model, x, strict=True)
    assert "the model: in parts, because Clash.quantizers: octav_fx needs that name" in octav_fx.table(q)
    assert list(q.state_dict()) == ["quantizers.weight", "quantizers.bias"]
    assert bits_by_site(q) == {("quantizers", "input"): 8, ("quantizers", "weight"): 8}
    with octav_fx.float_mode(q):
        assert torch.equal(q(x), model(x))


def test_a_model_that_cannot_be_copied():
    class Stubborn(nn.Linear):
        def __deepcopy__(self, memo):
            raise TypeError("cannot pickle this")

    with pytest.raises(OctavError, match=r"Stubborn cannot be copied .* cannot pickle this"):
        quantize(Stubborn(8, 8), torch.randn(2, 8))


# Odd models.


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("model", "shapes", "contractions"),
    [
        (nn.Linear(8, 4), [(2, 8)], 1),
        (nn.Conv2d(3, 4, 3, padding="same", padding_mode="circular"), [(2, 3, 8, 8)], 1),
        (nn.ConvTranspose1d(3, 4, 3), [(2, 3, 8)], 1),
        # The packed projection, the fused attention, its output, two layers; a decoder also has the two
        # projections, the fused attention and the output of its cross attention.
        (nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), [(2, 5, 8)], 5),
        (nn.Transformer(8, 2, 1, 1, 16, dropout=0.0), [(5, 2, 8), (4, 2, 8)], 14),
        (nn.Sequential(nn.Embedding(5, 8), nn.Linear(8, 5)), [()], 1),
    ],
    ids=lambda value: type(value).__name__,
)
def test_modules_of_torch_itself(model, shapes, contractions, training):
    model.train(training)
    inputs = tuple(torch.randn(shape) if shape else torch.tensor([1, 4, 2]) for shape in shapes)
    q = quantize(model, inputs, Config(edge_bits=None), strict=True)
    with OnGrid(4) as seen:
        q(*inputs)
    assert seen.off_grid == []
    assert seen.checked == contractions
    with octav_fx.float_mode(q):
        assert torch.equal(q(*inputs), model(*inputs))


def test_nothing_to_quantize_is_no_error():
    x = torch.randn(2, 8)
    q = quantize(nn.Sequential(nn.ReLU(), nn.LayerNorm(8)), x, strict=True)
    assert octav_fx.rows(q) == []
    assert octav_fx.coverage(q) == octav_fx.Coverage(0, 0, [])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_reach_the_output_and_not_the_hints(value):
    x = torch.randn(4, 8)
    q = quantize(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3)), x)
    expected = q(x)
    broken = x.clone()
    broken[1, 2] = value
    out = q(broken)
    assert not out[1].isfinite().any()
    assert out[[0, 2, 3]].isfinite().all()
    assert all(buffer.isfinite().all() for buffer in q.buffers())
    assert torch.equal(q(x), expected)


def test_empty_batches_pass_through():
    x = torch.randn(2, 8)
    q = quantize(nn.Linear(8, 3), x)
    expected = q(x)
    assert q(x[:0]).shape == (0, 3)
    assert torch.equal(q(x), expected)
