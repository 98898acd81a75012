"""A quantized module is an ordinary nn.Module: saved, copied, cast, trained, averaged and compiled like a float one."""

import contextlib
import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import octav_fx
from octav_fx import Config, float_mode, quantize
from octav_fx.capture.rerun import without_quantizers
from octav_fx.deploy.runtimes import run_onnx
from octav_fx.nn import FakeQuantizer
from tests.support.on_grid import OnGrid


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4, 1, 1))
        self.register_buffer("offset", torch.full((1,), 0.5))
        self.register_buffer("scratch", torch.zeros(1), persistent=False)
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()) for _ in range(2)])
        self.dropout = nn.Dropout(0.5)
        self.fc = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv(x + self.offset))) * self.scale
        for block in self.blocks:
            x = x + block(x)
        x = F.dropout(x.mean((2, 3)), 0.3, self.training)
        return self.fc(self.dropout(x))


class Tied(nn.Module):
    """An embedding whose weight is the output layer's too."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 8)
        self.body = nn.Linear(8, 8)
        self.head = nn.Linear(8, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.body(self.embedding(tokens)).relu())


class Branches(nn.Module):
    """One graph for each mode."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x)) if self.training else self.a(x)


def images(batch: int = 4) -> Tensor:
    return torch.randn(batch, 3, 8, 8)


def quantized(training: bool = True) -> tuple[nn.Module, octav_fx.quantize, Tensor]:
    model, x = Net().train(training), images()
    return model, quantize(model, x), x


def assert_same_state(one: nn.Module, other: nn.Module) -> None:
    ours, theirs = one.state_dict(), other.state_dict()
    assert list(ours) == list(theirs)
    for key, value in ours.items():
        assert torch.equal(value, theirs[key]), key


def saved_and_loaded(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda q: pickle.loads(pickle.dumps(q)),
    "torch.save": saved_and_loaded,
    "a copy of a copy": lambda q: copy.deepcopy(pickle.loads(pickle.dumps(copy.deepcopy(q)))),
}


# The state.


@pytest.mark.parametrize("training", [True, False])
def test_the_float_keys_are_all_there_in_order_with_their_values(training):
    model, q, _ = quantized(training)
    assert_same_state(q, model)
    assert [name for name, _ in q.named_parameters()] == [name for name, _ in model.named_parameters()]
    buffers = [name for name, _ in q.named_buffers() if not name.startswith("quantizers.")]
    assert buffers == [name for name, _ in model.named_buffers()]


def test_checkpoints_load_both_ways():
    model, q, x = quantized(False)
    other = Net().eval()
    assert str(q.load_state_dict(other.state_dict(), strict=True)) == "<All keys matched successfully>"
    with float_mode(q):
        assert torch.equal(q(x), other(x))
    assert torch.equal(q(x), quantize(other, x)(x))
    with torch.no_grad():
        q.fc.weight.mul_(2)
    model.load_state_dict(q.state_dict(), strict=True)
    with float_mode(q):
        assert torch.equal(q(x), model(x))


def test_a_checkpoint_loads_with_weights_only_and_by_assignment():
    _, q, x = quantized(False)
    file = io.BytesIO()
    torch.save(q.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    other = quantize(Net().eval(), x)
    other.load_state_dict(state, strict=True, assign=True)
    assert torch.equal(other(x), q(x))
    with float_mode(q), float_mode(other):
        assert torch.equal(other(x), q(x))


def test_a_wrong_checkpoint_is_refused():
    _, q, _ = quantized()
    state = q.state_dict()
    del state["fc.bias"]
    with pytest.raises(RuntimeError, match=r"Missing key.*fc\.bias"):
        q.load_state_dict(state)


def test_the_result_does_not_depend_on_what_ran_before():
    _, q, x = quantized(False)
    others = [copy.deepcopy(q) for _ in range(2)]
    for hint in others[0].quantizers.buffers():
        hint.zero_()
    others[1](images() * 100)
    q(x)
    for other in others:
        other(x)
        # Operands that no quantizer stands before: the same fixed point from any hint, up to rounding of the sums.
        for name in ("conv_input", "conv_weight", "blocks_0_0_weight", "blocks_1_0_weight", "fc_weight"):
            ours, theirs = (m.get_submodule(f"quantizers.{name}").hint for m in (q, other))
            torch.testing.assert_close(theirs, ours, rtol=1e-6, atol=0)


# Copies.


@pytest.mark.parametrize("name", COPIES)
@pytest.mark.parametrize("training", [True, False])
def test_copies_compute_the_same_and_are_apart(name, training):
    _, q, x = quantized(training)
    copied = COPIES[name](q)
    assert_same_state(copied, q)
    assert copied.training == training
    torch.manual_seed(1)
    expected = q(x)
    torch.manual_seed(1)
    assert torch.equal(copied(x), expected)
    assert octav_fx.coverage(copied) == octav_fx.coverage(q)
    assert not {t.data_ptr() for t in copied.state_dict().values()} & {t.data_ptr() for t in q.state_dict().values()}
    with torch.no_grad():
        for p in copied.parameters():
            p.zero_()
    assert not any(torch.equal(p, torch.zeros_like(p)) for name, p in q.named_parameters() if "weight" in name)


@pytest.mark.parametrize("name", COPIES)
def test_copies_keep_float_mode_and_both_graphs(name):
    model, x = Branches(), torch.randn(2, 8)
    q = COPIES[name](quantize(model, x, Config(edge_bits=None)))
    for mode in (True, False, True):
        q.train(mode)
        model.train(mode)
        with OnGrid(4) as seen:
            q(x)
        assert (seen.checked, seen.off_grid) == (2 if mode else 1, [])
        with float_mode(q):
            assert torch.equal(q(x), model(x))


def test_copies_of_what_was_trained_since():
    _, q, x = quantized()
    optimizer = torch.optim.SGD(q.parameters(), lr=0.1)
    q(x).sum().backward()
    optimizer.step()
    q.eval()
    for make in COPIES.values():
        assert torch.equal(make(q)(x), q(x))


# Tied weights.


@pytest.mark.parametrize(
    "change",
    [
        lambda q: q,
        *COPIES.values(),
        lambda q: q.to(torch.float64).to(torch.float32),
        lambda q: q.load_state_dict(Tied().state_dict()) and q,
        lambda q: q.requires_grad_(False).requires_grad_(True),
    ],
    ids=["as it is", *COPIES, "to", "load_state_dict", "requires_grad_"],
)
def test_tied_weights_stay_tied(change: Callable[[nn.Module], nn.Module]):
    tokens = torch.tensor([[1, 2, 3], [4, 5, 6]])
    q = change(quantize(Tied(), tokens))
    assert q.head.weight is q.embedding.weight
    assert [name for name, _ in q.named_parameters()] == ["embedding.weight", "body.weight", "body.bias"]
    assert list(q.state_dict()) == list(Tied().state_dict())
    optimizer = torch.optim.SGD(q.parameters(), lr=0.1)
    q(tokens).square().sum().backward()
    before = q.head.weight.detach().clone()
    optimizer.step()
    assert q.head.weight is q.embedding.weight
    assert not torch.equal(q.head.weight, before)
    model = Tied()
    model.load_state_dict(q.state_dict())
    with float_mode(q):
        assert torch.equal(q(tokens), model(tokens))


def test_a_tied_weight_gets_the_gradients_of_both_readers():
    tokens = torch.tensor([[1, 2, 3], [4, 5, 6]])
    q = quantize(Tied(), tokens, Config(weight_gradient="ste", activation_gradient="ste"))
    features = []
    q.quantizers.head_input.register_forward_hook(lambda module, args, y: features.append(y))
    q(tokens).sum().backward()
    # Straight through, the head's part is the sum of its inputs for each of the 7 tokens.
    of_embedding = q.embedding.weight.grad - features[0].flatten(0, 1).sum(0)
    # Token 0 is not looked up. Sums of six terms below 1: 1e-6 is a few roundings.
    torch.testing.assert_close(of_embedding[0], torch.zeros(8), rtol=0, atol=1e-6)
    assert (of_embedding[1:].abs().sum(1) > 1e-3).all()


# Modes.


def test_train_and_eval_reach_batch_norm_and_both_dropouts():
    _, q, x = quantized()
    assert not torch.equal(q(x), q(x))
    mean = q.norm.running_mean.clone()
    q(x)
    assert not torch.equal(q.norm.running_mean, mean)
    assert q.eval() is q
    mean = q.norm.running_mean.clone()
    assert torch.equal(q(x), q(x))
    assert torch.equal(q.norm.running_mean, mean)
    assert q.train() is q
    assert q.norm.training
    assert q.dropout.training


def test_functional_dropout_follows_the_mode_when_quantized_in_eval():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    x = torch.randn(2, 8)

    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(self.model(x), 0.5, self.training)

    q = quantize(Functional().eval(), x)
    assert torch.equal(q(x), q(x))
    q.train()
    assert (q(torch.randn(64, 8)) == 0).any()


# Devices, dtypes, autocast.


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype):
    model, q, x = quantized(False)
    q = quantize(model, x, Config(edge_bits=None)).to(dtype)
    assert {p.dtype for p in q.parameters()} == {dtype}
    assert {hint.dtype for hint in q.quantizers.buffers()} == {torch.float32}
    with OnGrid(4) as seen:
        out = q(x.to(dtype))
    assert (seen.checked, seen.off_grid) == (4, [])
    assert out.dtype is dtype
    with float_mode(q):
        assert torch.equal(q(x.to(dtype)), model.to(dtype)(x.to(dtype)))
    out.sum().backward()
    assert all(p.grad.dtype is dtype and p.grad.isfinite().all() for p in q.parameters())


def test_double_and_float_are_the_modules_methods():
    _, q, x = quantized(False)
    expected = q(x)
    assert q.double()(x.double()).dtype is torch.float64
    assert torch.equal(q.float()(x), expected)


def test_channels_last():
    model, x = Net().eval(), images()
    q = quantize(model, x, Config(edge_bits=None))
    clips = {name: hint.clone() for name, hint in q.quantizers.named_buffers() if "weight" in name}
    q.to(memory_format=torch.channels_last)
    with OnGrid(4) as seen:
        q(x.to(memory_format=torch.channels_last))
    assert (seen.checked, seen.off_grid) == (4, [])
    for name, clip in clips.items():
        # The sums of a clip run in another order.
        torch.testing.assert_close(q.quantizers.get_buffer(name), clip, rtol=1e-6, atol=0)


@pytest.mark.parametrize("training", [True, False])
def test_autocast_forward_and_backward(training):
    model, x = Net().train(training), images()
    q = quantize(model, x, Config(edge_bits=None))
    with torch.autocast("cpu", torch.bfloat16):
        with OnGrid(4) as seen:
            out = q(x)
        assert (seen.checked, seen.off_grid) == (4, [])
        loss = out.float().square().sum()
    loss.backward()
    assert out.dtype is torch.bfloat16
    assert all(p.grad is not None and p.grad.dtype is torch.float32 for p in q.parameters())
    with torch.autocast("cpu", torch.bfloat16), float_mode(q):
        torch.manual_seed(1)
        ours = q.eval()(x)
        torch.manual_seed(1)
        model.load_state_dict(q.state_dict())
        assert torch.equal(ours, model.eval()(x))


class Doubled(nn.Module):
    """How often a layer runs is decided by sizes of what another computes."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.body = nn.ConvTranspose2d(1, 4, 2, stride=2), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        for _ in range(x.shape[2] // 8):
            x = self.body(x)
        return x


@pytest.mark.parametrize("side", [4, 6, 8])
def test_autocast_computes_with_data_on_sizes_that_are_asked_about_inside(side):
    model, x = Doubled(), torch.randn(2, 1, side, side)
    q = quantize(model, x.new_ones(2, 1, 4, 4))
    with torch.autocast("cpu", torch.bfloat16):
        out = q(x)
        with float_mode(q):
            assert torch.equal(q(x), model(x))
    # What asks about sizes computes without numbers: nothing of it is left in what autocast has cast.
    assert type(out) is Tensor
    out.float().sum().backward()
    assert all(type(p.grad) is Tensor and p.grad.any() for p in q.parameters())


class ByDtype(nn.Module):
    """What dtype a layer computes in decides; the arguments do not tell."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.fc = nn.Embedding(8, 4), nn.Linear(4, 4)

    def forward(self, index: Tensor) -> Tensor:
        x = self.fc(self.embed(index))
        return x * 2 if x.dtype == torch.bfloat16 else x


class ByIdentity(ByDtype):
    """As it is often written: a dtype is one object."""

    def forward(self, index: Tensor) -> Tensor:
        x = self.fc(self.embed(index))
        dtype = x.dtype
        return x * 2 if dtype is torch.bfloat16 else x.to(dtype)


def twice_if_half(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x * 2 if dtype is torch.bfloat16 else x


class ByIdentityElsewhere(ByDtype):
    """In a function that is given the dtype, which forward itself uses, too."""

    def forward(self, index: Tensor) -> Tensor:
        x = self.fc(self.embed(index))
        return twice_if_half(x.to(x.dtype), x.dtype)


@pytest.mark.parametrize("kind", [ByDtype, ByIdentity, ByIdentityElsewhere])
@pytest.mark.parametrize("first", ["float32", "autocast"])
def test_autocast_decides_a_branch_for_arguments_alike(first, kind):
    model, index = kind(), torch.randint(8, (3, 2))
    around = {"float32": contextlib.nullcontext, "autocast": lambda: torch.autocast("cpu", torch.bfloat16)}
    with around[first]():
        q = quantize(model, index)
    for name in ("autocast", "float32", "autocast", "float32"):
        with around[name]():
            assert q(index).dtype is model(index).dtype
            with without_quantizers(q):
                assert torch.equal(q(index), model(index))


@pytest.mark.parametrize("kind", [ByDtype, ByIdentity, ByIdentityElsewhere])
def test_a_graph_is_for_the_dtype_that_a_model_was_given(kind):
    model, index = kind(), torch.randint(8, (3, 2))
    q = quantize(model, index)
    for dtype in (torch.bfloat16, torch.float32):
        assert q.to(dtype)(index).dtype is model.to(dtype)(index).dtype
        with without_quantizers(q):
            assert torch.equal(q(index), model(index))


def test_inference_mode():
    _, q, x = quantized(False)
    expected = q(x)
    with torch.inference_mode():
        assert torch.equal(q(x), expected)
        assert octav_fx.table(q)
    q(x).sum().backward()
    assert q.fc.weight.grad is not None


def test_what_is_made_in_inference_mode_trains():
    model, _, x = quantized(False)
    with torch.inference_mode():
        q = octav_fx.quantize(model.train(), x)
        octav_fx.freeze(octav_fx.calibrate(q.eval(), [x]))
        converted, loaded = octav_fx.convert(q), octav_fx.quantize(model, x)
        loaded.load_state_dict(q.state_dict())
    for made in (q, loaded, converted):
        assert not any(t.is_inference() for t in (*made.parameters(), *made.buffers()))
    for trained in (q, loaded):
        octav_fx.unfreeze(trained).train()(x).sum().backward()
        assert all(p.grad is not None for p in trained.parameters())


# Training.


def mlp() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 2)
    )


def problem() -> tuple[Tensor, Tensor]:
    x = torch.randn(64, 8)
    return x, (x[:, 0] > 0).long()


def groups(model: nn.Module) -> list[dict]:
    named = dict(model.named_parameters())
    plain = [p for name, p in named.items() if name.endswith("bias") or "3." in name]
    return [{"params": plain, "weight_decay": 0.0}, {"params": [p for p in named.values() if p.dim() > 1]}]


OPTIMIZERS = {
    "SGD": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4),
    "AdamW": lambda m: torch.optim.AdamW(m.parameters(), lr=0.01),
    "groups by name": lambda m: torch.optim.AdamW(groups(m), lr=0.01, weight_decay=0.1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_train_it_and_resume(name):
    x, target = problem()
    q = quantize(mlp(), x)
    optimizer = OPTIMIZERS[name](q)

    def train(q: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> float:
        for _ in range(steps):
            optimizer.zero_grad()
            loss = F.cross_entropy(q(x), target)
            loss.backward()
            optimizer.step()
        return loss.item()

    first = train(q, optimizer, 1)
    assert train(q, optimizer, 30) < first / 2
    resumed = quantize(mlp(), x)
    resumed.load_state_dict(q.state_dict())
    of_resumed = OPTIMIZERS[name](resumed)
    of_resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for module, its in ((q, optimizer), (resumed, of_resumed)):
        train(module, its, 1)
    assert_same_state(resumed, q)


def gradients(q: nn.Module) -> list[Tensor]:
    found = [p.grad.clone() for p in q.parameters()]
    q.zero_grad()
    return found


def test_gradient_clipping():
    _, q, x = quantized(False)
    q(x).square().sum().backward()
    norm = nn.utils.clip_grad_norm_(q.parameters(), 1e-3)
    assert norm > 1e-3
    clipped = torch.stack([p.grad.norm() for p in q.parameters()]).norm()
    # Both norms and the division round: a few ulps of float32.
    torch.testing.assert_close(clipped, torch.tensor(1e-3), rtol=1e-4, atol=0)


def test_gradients_accumulate():
    _, q, x = quantized(False)
    parts = []
    for part in (x[:2], x[2:]):
        q(part).sum().backward()
        parts.append(gradients(q))
    for part in (x[:2], x[2:]):
        q(part).sum().backward()
    for total, one, two in zip(gradients(q), *parts, strict=True):
        assert torch.equal(total, one + two)


def test_two_forwards_before_the_backward():
    _, q, x = quantized(False)
    (q(x[:2]).sum() + q(x[2:]).sum()).backward()
    together = gradients(q)
    q(x[:2]).sum().backward()
    q(x[2:]).sum().backward()
    for one, other in zip(together, gradients(q), strict=True):
        # The two parts are added in either order.
        assert torch.equal(one, other)


def test_gradients_of_the_input_and_second_derivatives():
    x = torch.randn(4, 8, requires_grad=True)
    q = quantize(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1)), x)
    (grad,) = torch.autograd.grad(q(x).sum(), x, create_graph=True)
    grad.square().sum().backward()
    assert x.grad.isfinite().all()
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_gives_the_same_gradients(use_reentrant):
    _, q, _ = quantized()
    x = images().requires_grad_()
    results = []
    for call in (q, lambda x: checkpoint(q, x, use_reentrant=use_reentrant)):
        torch.manual_seed(1)
        copied = q.state_dict()
        copied = {key: value.clone() for key, value in copied.items()}
        call(x).square().sum().backward()
        q.load_state_dict(copied)
        results.append(gradients(q))
    for plain, recomputed in zip(*results, strict=True):
        assert torch.equal(recomputed, plain)


def test_checkpointing_of_quantized_parts():
    x = torch.randn(16, 8)
    parts = nn.Sequential(*(quantize(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), x) for _ in range(4)))
    parts(x).square().sum().backward()
    plain = gradients(parts)
    checkpoint_sequential(parts, 2, x.requires_grad_(), use_reentrant=False).square().sum().backward()
    for one, other in zip(gradients(parts), plain, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("use_buffers", [True, False])
def test_averaged_weights(use_buffers):
    x, _ = problem()
    q = quantize(mlp(), x)
    model = mlp()
    model.load_state_dict(q.state_dict())
    averages = [
        AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=use_buffers) for module in (q, model)
    ]
    for factor in (2.0, 3.0):
        for module, average in zip((q, model), averages, strict=True):
            with torch.no_grad():
                for p in module.parameters():
                    p.mul_(factor)
            average.update_parameters(module)
    assert_same_state(averages[0].module, averages[1].module)
    with float_mode(averages[0]):
        assert torch.equal(averages[0].eval()(x), averages[1].eval()(x))
    assert not torch.equal(averages[0](x), averages[1](x))


def test_averaging_a_copy_by_hand():
    _, q, x = quantized()
    average = copy.deepcopy(q).eval().requires_grad_(False)
    with torch.no_grad():
        for p in q.parameters():
            p.add_(1)
        for ours, theirs in zip(average.parameters(), q.parameters(), strict=True):
            ours.lerp_(theirs, 0.5)
    q.eval()
    assert not torch.equal(average(x), q(x))
    average.load_state_dict(q.state_dict())
    assert torch.equal(average(x), q(x))


def test_functional_call_takes_other_parameters():
    _, q, x = quantized(False)
    other = copy.deepcopy(q)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(2)
    assert torch.equal(torch.func.functional_call(q, dict(other.named_parameters()), (x,)), other(x))


def test_a_frozen_part_gets_no_gradient():
    _, q, x = quantized(False)
    q.conv.requires_grad_(False)
    q(x).sum().backward()
    assert q.conv.weight.grad is None
    assert q.fc.weight.grad is not None


# Compilers.


@pytest.mark.compile
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compiled_equals_eager(backend, training):
    model, x = nn.Sequential(*mlp(), nn.Softmax(-1)), torch.randn(16, 8)
    q = quantize(model.train(training), x)
    compiled = torch.compile(copy.deepcopy(q), backend=backend, fullgraph=True)
    expected, out = q(x), compiled(x)
    # Inductor's softmax and batch norm add up in another order; nothing there feeds a rounding to a grid of 4 bits.
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if backend == "inductor" else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(out, expected, **tolerance)
    expected[:, 0].sum().backward()
    out[:, 0].sum().backward()
    for ours, theirs in zip(compiled.parameters(), q.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, **tolerance)
    for ours, theirs in zip(compiled.buffers(), q.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, **tolerance)


def test_one_graph_for_each_batch_size_kind():
    q = quantize(mlp().eval(), torch.randn(16, 8))
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(q, backend=counter, dynamic=True)
    for batch in (16, 5, 9, 33):
        x = torch.randn(batch, 8)
        assert torch.equal(compiled(x), q(x))
    assert counter.frame_count == 1


def test_export_and_trace():
    _, q, x = quantized(False)
    assert torch.equal(torch.export.export(q, (x,)).module()(x), q(x))
    assert torch.equal(torch.jit.trace(q, x)(x), q(x))


@pytest.mark.slow
def test_a_frozen_model_is_traced_as_what_it_is_deployed_as():
    _, q, x = quantized(False)
    octav_fx.freeze(octav_fx.calibrate(q.eval(), [x]))
    assert torch.equal(torch.jit.trace(q, x)(x), octav_fx.convert(q, integers=False)(x))


def test_scripting_is_refused():
    _, q, x = quantized(False)
    frozen = octav_fx.freeze(octav_fx.calibrate(quantize(Net().eval(), x), [x]))
    for module in (q, nn.Sequential(q), octav_fx.convert(frozen)):
        with pytest.raises(octav_fx.OctavError, match=r"torch\.jit\.script reads source code, and Net runs graphs"):
            torch.jit.script(module)


@pytest.mark.parametrize("blocks", [(), ["2"]])
@pytest.mark.parametrize("training", [False, True])
def test_an_exported_program_is_saved_and_loaded(training: bool, blocks: Any, tmp_path: Path) -> None:
    x = torch.randn(4, 8)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)).train(training)
    q = octav_fx.quantize(model, x, blocks=blocks)
    torch.export.save(torch.export.export(q, (x,)), tmp_path / "q.pt2")
    loaded = torch.export.load(tmp_path / "q.pt2").module()
    for batch in (x, torch.randn(4, 8)):
        assert torch.equal(loaded(batch), q(batch))


@pytest.mark.parametrize("blocks", [(), ["0"]])
def test_a_tracer_of_torch_fx_sees_quantizers_as_leaves(blocks: Any) -> None:
    x = torch.randn(4, 8)
    q = octav_fx.quantize(nn.Sequential(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), nn.Linear(8, 8)), x, blocks=blocks)
    traced = torch.fx.symbolic_trace(q)
    called = [q.get_submodule(str(node.target)) for node in traced.graph.find_nodes(op="call_module")]
    # So is a single layer that is a graph of its own: its class is torch's.
    assert sum(isinstance(module, FakeQuantizer) for module in called) == (2 if blocks else 4)
    assert torch.equal(traced(x), q(x))


@pytest.mark.parametrize("made", ["dynamic", "frozen", "blocks"])
@pytest.mark.parametrize("dynamo", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore:You are using the legacy TorchScript-based ONNX export")
def test_torch_onnx_export_says_what_writes_the_model(made: str, dynamo: bool, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    x = torch.randn(4, 8)
    model = nn.Sequential(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), nn.Linear(8, 8)).eval()
    q = octav_fx.quantize(model, x, blocks=["0"] if made == "blocks" else ())
    if made == "frozen":
        octav_fx.freeze(octav_fx.calibrate(q, [x]))
    for module in (q, nn.Sequential(q)):
        with pytest.raises(octav_fx.OctavError, match=r"octav_fx\.export_onnx write this model"):
            torch.onnx.export(module, (x,), tmp_path / "q.onnx", dynamo=dynamo, verbose=False)
    with octav_fx.float_mode(q):
        torch.onnx.export(q, (x,), tmp_path / "float.onnx", dynamo=dynamo, verbose=False)
    (found,) = run_onnx(tmp_path / "float.onnx", x).values()
    # Another order of additions.
    torch.testing.assert_close(found, model(x), rtol=1e-5, atol=1e-6)
