"""quantize(blocks=): each block a graph of its own, called as a module by the user's Python, with one table of all."""

import contextlib
import copy
import functools
import operator
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.utils.checkpoint import checkpoint

import octav_fx
from octav_fx import Config, OctavError, quantize, table
from octav_fx.capture.modules import graphs_of
from octav_fx.capture.partial import PartialModule
from octav_fx.capture.rerun import without_quantizers
from octav_fx.capture.whole import WholeModule
from octav_fx.compat.tensors import pytree
from tests.support.alike import assert_close, assert_computes
from tests.support.blocks import WIDTH, Block, Net, batch, saved_bytes
from tests.support.on_grid import OnGrid

WAYS: list[Any] = ["auto", [Block], ["blocks.0", "blocks.1", "blocks.2"]]


@pytest.mark.slow
@pytest.mark.parametrize("blocks", WAYS, ids=["auto", "class", "names"])
def test_each_block_is_one_graph_inside_the_users_python(blocks: Any) -> None:
    model, x = Net(), batch()
    q = quantize(model, x, blocks=blocks)
    assert isinstance(q, Net) and isinstance(q, PartialModule) and not isinstance(q, WholeModule)
    for block in q.blocks:
        assert isinstance(block, Block) and isinstance(block, WholeModule)
        assert [name for name, _ in block.named_children()] == ["norm", "up", "down", "quantizers"]
    assert list(q.state_dict()) == list(model.state_dict()) and q.tied.weight is q.head.weight
    with octav_fx.float_mode(q):
        assert torch.equal(q(x), model(x))


@pytest.mark.parametrize("training", [False, True])
def test_operands_are_quantized_as_in_the_whole_model(training: bool) -> None:
    torch.manual_seed(3)
    model, x = Net().train(training), batch()
    parts, whole = quantize(model, x, blocks="auto"), quantize(model, x, blocks=())
    assert isinstance(whole, WholeModule)
    found = [
        {(row.node, row.operand): (row.op, row.bits, row.signed, row.clip, row.macs, row.share) for row in rows}
        for rows in map(octav_fx.rows, (parts, whole))
    ]
    # The sign of what the first block takes is known, and the last layer is the last of the model: blocks are no edges.
    assert found[0] == found[1] and {bits for _, bits, *_ in found[0].values()} == {4, 8}
    assert octav_fx.coverage(parts) == octav_fx.coverage(whole)
    assert torch.equal(parts(x), whole(x))
    for q in (parts, whole):
        q(x).square().sum().backward()
    for (name, ours), theirs in zip(parts.named_parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad), name


def test_methods_of_the_model_are_quantized() -> None:
    q, x = quantize(Net(), batch(), Config(2, 2, edge_bits=None), blocks="auto"), batch()
    with OnGrid(2) as seen:
        y = q.forward_features(x)
    assert (seen.checked, seen.off_grid) == (7, [])
    assert torch.equal(q.tied(q.head(y)), q(x))


@pytest.mark.slow
@pytest.mark.parametrize("again", [copy.deepcopy, lambda q: pickle.loads(pickle.dumps(q))], ids=["deepcopy", "pickle"])
def test_calibrate_freeze_convert_and_copies_go_over_all_blocks(again: Any) -> None:
    q, x = quantize(Net(), batch(), blocks="auto").eval(), batch()
    octav_fx.freeze(octav_fx.calibrate(q, [x, batch(3)]))
    assert torch.equal(again(q)(x), q(x))
    converted = octav_fx.convert(q)
    # Sums of codes round in another order than sums of levels: a code at a tie may differ.
    assert (converted(x) - q(x)).abs().max() < 0.2 * q(x).abs().max()
    octav_fx.unfreeze(q)
    assert torch.equal(again(q)(x), q(x))


@pytest.mark.slow
@pytest.mark.parametrize("when", ["before", "after", "blocks by default"])
def test_blocks_are_recomputed_as_in_float(when: str) -> None:
    # Many blocks and tokens: what quantizers keep outside of the blocks is little beside the inputs of blocks.
    model, x = Net(depth=12), torch.randn(8, 64, WIDTH)
    if when != "after":
        model.set_grad_checkpointing()
    q = quantize(model, x) if when == "blocks by default" else quantize(model, x, blocks="auto")
    assert all(isinstance(block, WholeModule) for block in q.blocks)
    plain = saved_bytes(q.eval(), x, q)
    q.train().set_grad_checkpointing()
    model.set_grad_checkpointing()
    kept, of_float = saved_bytes(q, x, q), saved_bytes(model, x, model)
    assert kept < plain / 3
    q(x).sum().backward()
    recomputed = {name: p.grad.clone() for name, p in q.named_parameters()}
    q.zero_grad()
    q.set_grad_checkpointing(False)
    q(x).sum().backward()
    assert all(torch.equal(p.grad, recomputed[name]) for name, p in q.named_parameters())
    assert kept <= 1.2 * of_float


@pytest.mark.slow
@pytest.mark.parametrize("when", ["before", "after"])
def test_torchs_own_wrappers_recompute_blocks(when: str) -> None:
    model, x = Net(depth=12), torch.randn(8, 64, WIDTH)
    plain = quantize(model, x, blocks="auto")
    if when == "after":
        q = quantize(model, x, blocks="auto")
    for wrapped in (model, q) if when == "after" else (model,):
        apply_activation_checkpointing(wrapped, check_fn=lambda module: isinstance(module, Block))
    if when == "before":
        q = quantize(model, x)
    assert torch.equal(q(x), plain(x))
    assert saved_bytes(q, x, q) <= 1.2 * saved_bytes(model, x, model)
    assert octav_fx.coverage(q) == octav_fx.coverage(plain)


class Reentrant(Net):
    """Recomputes by torch's older checkpoint, and says so by no flag that libraries have."""

    recompute = True

    def forward_features(self, x: Tensor) -> Tensor:
        x = self.stem(x.transpose(1, 2)).transpose(1, 2).relu()
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=True) if self.recompute else block(x)
        return x


def test_a_part_that_is_recomputed_is_in_no_graph() -> None:
    model, x = Reentrant(depth=12), torch.randn(8, 64, WIDTH)
    q = quantize(model, x)
    found = {(row.node, row.operand): (row.bits, row.signed, row.macs) for row in octav_fx.rows(q)}
    assert "recomputed in backward (torch.utils.checkpoint at " in octav_fx.table(q)
    assert saved_bytes(q, x, q) <= 1.2 * saved_bytes(model, x, model)
    model.recompute = False
    whole = quantize(model, x)
    assert isinstance(whole, WholeModule)
    # The signs, the bits and the edges of one graph of it all.
    assert found == {(row.node, row.operand): (row.bits, row.signed, row.macs) for row in octav_fx.rows(whole)}
    assert torch.equal(q(x), whole(x))


@pytest.mark.slow
def test_a_single_graph_leaves_recomputation_to_the_models_own_python() -> None:
    q, x = quantize(Net(depth=12), torch.randn(8, 64, WIDTH)), torch.randn(8, 64, WIDTH)
    quantizers = sum(1 for _ in q.get_submodule("quantizers").children())
    gradients, kept = [], []
    for recompute in (False, True, False):
        q.set_grad_checkpointing(recompute)
        with pytest.warns(UserWarning, match="recomputed in backward") if recompute else contextlib.nullcontext():
            q(x).sum().backward()
        gradients.append([p.grad.clone() for p in q.parameters()])
        kept.append(saved_bytes(q, x, q))
        q.zero_grad()
    assert all(torch.equal(*pair) for pair in zip(*gradients[:2], strict=True)) and kept[1] < kept[0] / 3
    assert kept[2] == kept[0]
    # Each operand has the quantizer that it had.
    assert sum(1 for _ in q.get_submodule("quantizers").children()) == quantizers


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore:.*run its own Python")
def test_the_models_own_python_is_compiled_as_that_of_float_is() -> None:
    q, x = quantize(Net(depth=3), torch.randn(4, 6, WIDTH)), torch.randn(4, 6, WIDTH)
    q.set_grad_checkpointing(True)
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(q, backend=counter)
    gradients = []
    # The first call finds out that no graph holds.
    for run in (q, compiled, compiled):
        run(x).sum().backward()
        gradients.append([p.grad.clone() for p in q.parameters()])
        q.zero_grad()
    assert all(
        torch.equal(one, other) for found in gradients[1:] for one, other in zip(gradients[0], found, strict=True)
    )
    # All of it, and once.
    assert counter.frame_count == 1 and counter.op_count > 3 * 4


class CheckpointedBlock(Block):
    """Holds what recomputes it, as the layers of transformers do, and asks in forward whether that is there."""

    recomputes: Any = None

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.recomputes is not None else super().forward(x) * 2


@pytest.mark.compile
def test_a_block_that_holds_what_recomputes_it_breaks_no_graph() -> None:
    model, x = nn.Sequential(*(CheckpointedBlock() for _ in range(2))), torch.randn(4, 6, WIDTH)
    for block in model:
        block.recomputes = functools.partial(checkpoint, use_reentrant=False)
    q = quantize(model, x, blocks="auto")
    torch.compiler.reset()
    # fullgraph: a break is an error.
    compiled = torch.compile(q, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), q(x))


def squared(y: Tensor) -> Tensor:
    torch._dynamo.graph_break()
    return y @ y.mT


class Squares(nn.Module):
    """No graph holds it where it squares; it counts such calls, and a helper multiplies apart from the module."""

    squares = 0

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, is_squared: bool = False) -> Tensor:
        y = self.second(self.first(x).relu())
        if not is_squared:
            return y
        self.squares += 1
        return y if float(y.detach().sum()) > 1e9 else squared(y) + self.squares


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore:.*run its own Python")
def test_compiled_own_python_counts_and_leaves_its_products_in_float() -> None:
    q, x = octav_fx.quantize(Squares(), torch.randn(6, 8)), torch.randn(6, 8)
    before = q(x, is_squared=True)
    torch.compiler.reset()
    compiled = torch.compile(q, backend="octav")
    for count in (2, 3):
        found = compiled(x, is_squared=True)
        # Sums of 8 products in another order, one after another: some roundings of float32 (6e-8).
        torch.testing.assert_close(found, before + (count - 1), rtol=1e-5, atol=1e-5)
        assert q.squares == count


class Layer(nn.Module):
    """Recomputes the forward of each subclass around it, as the layers of transformers do."""

    recompute = False
    is_reentrant = False

    def __init_subclass__(cls) -> None:
        forward = cls.forward

        @functools.wraps(forward)
        def around(self: Any, *args: Any, **kwargs: Any) -> Tensor:
            if self.recompute and type(self).forward is around:
                run = functools.partial(forward, self, **kwargs)
                return checkpoint(run, *args, use_reentrant=self.is_reentrant)
            return forward(self, *args, **kwargs)

        cls.forward = around


class BlockOfLayer(Layer, Block):
    def forward(self, x: Tensor, **_: Any) -> Tensor:
        return Block.forward(self, x)


@pytest.mark.slow
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("is_reentrant", [True, False])
def test_a_class_that_recomputes_around_its_subclasses_does_so_around_graphs(is_reentrant: bool, before: bool) -> None:
    model, x = nn.Sequential(*(BlockOfLayer() for _ in range(4))), torch.randn(8, 64, WIDTH, requires_grad=True)
    for layer in model if before else ():
        layer.recompute = True
    q = quantize(model, x, blocks="auto")
    for layer in (*model, *q):
        layer.recompute, layer.is_reentrant = True, is_reentrant
    assert saved_bytes(q, x, q) <= 1.2 * saved_bytes(model, x, model)
    q(x).sum().backward()
    assert all(p.grad is not None for p in q.parameters())
    assert all(isinstance(layer, WholeModule) and graphs_of(layer)._own_python == {} for layer in q)


class SetsRequiresGrad(Layer, Block):
    """Where it is recomputed no graph holds it."""

    def forward(self, x: Tensor, bias: Tensor | None = None, *, runs: Any = None) -> tuple[Tensor, Tensor]:
        if runs is not None:
            runs.append(self)
        if bias is None:
            bias = torch.zeros(WIDTH)
            if self.recompute:
                bias.requires_grad = True
        return Block.forward(self, x) + bias, bias


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(SetsRequiresGrad() for _ in range(2))

    def forward(self, x: Tensor, runs: Any = None) -> Tensor:
        bias = None
        for block in self.blocks:
            x, bias = block(x, bias, runs=runs)
        return x


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*run its own Python")
@pytest.mark.parametrize("is_reentrant", [True, False])
def test_what_recomputes_itself_and_runs_its_own_python_is_recomputed_once(is_reentrant: bool) -> None:
    model = Chain()
    q = quantize(model, torch.randn(4, 6, WIDTH), blocks="auto")
    for layer in (*model.blocks, *q.blocks):
        layer.recompute, layer.is_reentrant = True, is_reentrant
    x = torch.randn(4, 6, WIDTH, requires_grad=True)
    # What a new kind of calls needs is there before quantizers are set aside.
    q(x, []).square().sum().backward()
    x.grad = None
    q.zero_grad()
    of_float, of_q = [], []
    with without_quantizers(q):
        q(x, of_q).square().sum().backward()
    found = {"x": x.grad, **{name: p.grad for name, p in q.named_parameters()}}
    x.grad = None
    model(x, of_float).square().sum().backward()
    for name, gradient in {"x": x.grad, **{name: p.grad for name, p in model.named_parameters()}}.items():
        assert_close(name, found[name], gradient)
    # Each block once forward and once backward.
    assert len(of_q) == len(of_float) == 4


def test_checkpointing_around_the_model() -> None:
    q, x = quantize(Net(), batch(), blocks="auto"), batch()
    y = checkpoint(q, x, use_reentrant=False)
    assert torch.equal(y, q(x))
    y.sum().backward()
    assert all(p.grad is not None for p in q.parameters())


@pytest.mark.slow
def test_hooks_on_blocks_fire() -> None:
    q, x = quantize(Net(), batch(), blocks="auto"), batch()
    seen: list[str] = []
    for i, block in enumerate(q.blocks):
        block.register_forward_pre_hook(lambda m, args, i=i: seen.append(f"before {i}"))
        block.register_forward_hook(lambda m, args, y, i=i: seen.append(f"after {i}"))
        block.register_full_backward_hook(lambda m, g, h, i=i: seen.append(f"backward {i}"))
    q(x).sum().backward()
    assert seen == [
        *("before 0", "after 0", "before 1", "after 1", "before 2", "after 2"),
        *("backward 2", "backward 1", "backward 0"),
    ]
    with pytest.raises(OctavError, match="up of Block would never run this hook"):
        q.blocks[0].up.register_forward_hook(lambda *_: None)


Register = Callable[[nn.Module, list[Any]], Any]
HOOKS: dict[str, Register] = {
    "before": lambda m, seen: m.register_forward_pre_hook(lambda m, args: seen.append(args)),
    "before, keywords": lambda m, seen: m.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append((args, kwargs)), with_kwargs=True
    ),
    "after": lambda m, seen: m.register_forward_hook(lambda m, args, y: seen.append((args, y))),
    "after, keywords": lambda m, seen: m.register_forward_hook(
        lambda m, args, kwargs, y: seen.append((args, kwargs, y)), with_kwargs=True
    ),
    "backward": lambda m, seen: m.register_full_backward_hook(lambda m, g, h: seen.append((g, h))),
    "before backward": lambda m, seen: m.register_full_backward_pre_hook(lambda m, h: seen.append(h)),
}


class Scaled(Block):
    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return super().forward(x) * scale


class Hooked(nn.Module):
    """Calls a container, and a module of its own with a keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.layer = nn.Linear(WIDTH, WIDTH), nn.Sequential(nn.Linear(WIDTH, WIDTH), Block())
        self.scaled, self.head = Scaled(), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.scaled(self.layer(self.stem(x).relu()), scale=0.5))


@pytest.mark.slow
@pytest.mark.parametrize("path", ["layer", "layer.1", "scaled"])
@pytest.mark.parametrize("kind", HOOKS)
def test_a_module_with_hooks_is_called_in_each_call(kind: str, path: str) -> None:
    def observed(module: nn.Module, seen: list[Any]) -> list[Tensor]:
        seen.clear()
        module(x).square().sum().backward()
        return [leaf.detach().clone() for leaf in pytree.tree_leaves(seen) if isinstance(leaf, Tensor)]

    torch.manual_seed(2)
    model, x = Hooked(), batch()
    plain, seen = quantize(model, x), list[Any]()
    HOOKS[kind](model.get_submodule(path), seen)
    q = quantize(model, x)
    # What hooks see while the model is captured are tensors, nothing that stands for them.
    assert all(type(leaf) in (Tensor, float) for leaf in pytree.tree_leaves(seen))
    assert isinstance(plain, WholeModule) and f"hooks on {path} run where that is called as a module" in table(q)
    assert octav_fx.coverage(q).skipped == []
    expected = observed(model, seen)
    with without_quantizers(q):
        found = observed(q, seen)
    assert found and all(torch.equal(e, f) for e, f in zip(expected, found, strict=True))
    assert len(observed(q, seen)) == len(expected) and len(observed(q.eval(), seen)) == len(expected)
    signs = [[row.signed for row in octav_fx.rows(each) if row.operand] for each in (plain, q)]
    # A hook may change what it sees in any call, so of that no sign is known.
    assert sum(map(operator.ne, *signs)) == (path == "layer" and "backward" not in kind)


@pytest.mark.slow
def test_hooks_change_what_they_see() -> None:
    model, x = Hooked(), batch()
    model.layer.register_forward_pre_hook(lambda m, args: (-args[0],))
    model.scaled.register_forward_hook(lambda m, args, kwargs, y: y - kwargs["scale"], with_kwargs=True)
    q = quantize(model, x, Config(2, 2, edge_bits=None))
    assert_computes(q, model, (x,), (batch(3),))
    with OnGrid(2) as seen:
        q(x)
    assert (seen.checked, seen.off_grid) == (7, [])


@pytest.mark.compile
def test_hooks_on_modules_that_are_called_fire_in_compiled_code() -> None:
    model, x, seen = Hooked(), batch(), list[Any]()
    for kind in HOOKS:
        HOOKS[kind](model.layer, seen)
    q = quantize(model, x)
    compiled = torch.compile(q, backend="aot_eager")
    for _ in range(2):
        seen.clear()
        compiled(x).sum().backward()
        assert len(seen) == len(HOOKS)


@pytest.mark.parametrize("integers", [True, False])
def test_hooks_run_in_what_convert_returns(integers: bool) -> None:
    model, x, seen = Hooked(), batch(), list[Any]()
    for path in ("layer", "scaled"):
        HOOKS["after, keywords"](model.get_submodule(path), seen)
    q = quantize(model.eval(), x)
    octav_fx.freeze(octav_fx.calibrate(q, [x]))
    converted = octav_fx.convert(q, integers=integers)
    for module in (q, converted, copy.deepcopy(converted)):
        seen.clear()
        module(x)
        assert [kwargs for _, kwargs, _ in seen] == [{}, {"scale": 0.5}]


def test_a_layer_by_itself_is_no_edge_of_a_network() -> None:
    x = torch.randn(2, 8)
    assert {row.bits for row in octav_fx.rows(quantize(nn.Linear(8, 8), x))} == {4}
    assert {row.bits for row in octav_fx.rows(quantize(nn.Sequential(nn.Linear(8, 8)), x))} == {8}


def test_partial_freezing() -> None:
    model = Net()
    for p in model.blocks[0].parameters():
        p.requires_grad_(False)
    q = quantize(model, batch(), blocks="auto")
    q(batch()).sum().backward()
    assert {name.split(".")[1] for name, p in q.named_parameters() if p.grad is None} == {"0"}


class TestRefusals:
    def test_what_is_no_block(self) -> None:
        with pytest.raises(OctavError, match=r"blocks: 'layers' is no module of it; Net has blocks, blocks\.0"):
            quantize(Net(), batch(), blocks=["layers"])
        with pytest.raises(OctavError, match="is the model itself"):
            quantize(Net(), batch(), blocks=[Net])
        with pytest.raises(OctavError, match=r'blocks=\'blocks\': "auto", or a list'):
            quantize(Net(), batch(), blocks="blocks")
        with pytest.raises(OctavError, match="blocks: 3 is no name and no class of modules"):
            quantize(Net(), batch(), blocks=[3])  # type: ignore[list-item]


def test_the_model_stays_one_graph_without_blocks() -> None:
    assert graphs_of(quantize(Net(), batch())) is not None


@pytest.mark.compile
def test_equal_blocks_are_compiled_once() -> None:
    x = batch()
    # More blocks than Dynamo compiles one function anew for.
    q = quantize(Net(depth=10), x, blocks="auto")
    expected = q(x)
    counter = CompileCounterWithBackend("aot_eager")
    for block in q.blocks:
        block.compile(backend=counter)
    assert torch.equal(q(x), expected) and counter.frame_count == 1


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x, mask=None):
        y = self.fc(x)
        return y if mask is None else y * mask


class MaskedNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Masked() for _ in range(3))

    def forward(self, x, mask=None):
        for block in self.blocks:
            x = block(x, mask)
        return x


@pytest.mark.compile
def test_a_new_graph_of_a_block_becomes_part_of_what_is_compiled_around_it() -> None:
    ran: list[int] = []

    def counted(gm, inputs):
        def run(*args):
            ran.append(1)
            return gm(*args)

        return run

    torch.manual_seed(0)
    x, mask = torch.randn(2, 8), torch.ones(8)
    q = octav_fx.quantize(MaskedNet(), x, blocks=[Masked])
    compiled = torch.compile(q, backend=counted)
    expected = copy.deepcopy(q)(x, mask)
    for _ in range(3):
        ran.clear()
        assert torch.equal(compiled(x, mask), expected)
    assert sum(ran) == 1
