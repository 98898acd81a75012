"""pact and lsq through the life of a model: learned by any optimizer, saved, copied, cast, frozen, compiled."""

import copy
import io
import math
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import octav_fx
from octav_fx import Config, OctavError, float_mode, pact_penalty, quantize
from octav_fx.nn import FakeQuantizer
from tests.support.nets import ConvNet as Net
from tests.support.ranks import same_everywhere, spawn

CLIPS = ["pact", "lsq"]


@pytest.fixture
def fresh_dynamo():
    torch.compiler.reset()


def images(batch: int = 4) -> Tensor:
    return torch.randn(batch, 3, 8, 8)


def quantized(clip: str, training: bool = True):
    model, x = Net().train(training), images()
    return model, quantize(model, x, Config(clip=clip)), x


def learned(q: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in q.named_parameters() if name.endswith(".learned")}


def train(q, x, steps: int = 3, lr: float = 0.1, **options):
    optimizer = torch.optim.SGD(q.parameters(), lr=lr, **options)
    for _ in range(steps):
        optimizer.zero_grad()
        q(x).square().mean().backward()
        optimizer.step()


# Parameters.


def test_lsq_learns_a_step_per_channel_of_weights_and_per_tensor_of_activations():
    _, q, x = quantized("lsq")
    assert {name: tuple(p.shape) for name, p in learned(q).items()} == {
        "quantizers.conv_input.learned": (),
        "quantizers.conv_weight.learned": (4,),
        "quantizers.fc_input.learned": (),
        "quantizers.fc_weight.learned": (2,),
    }
    # 8 bits at the edges.
    torch.testing.assert_close(learned(q)["quantizers.conv_input.learned"], 2 * x.abs().mean() / math.sqrt(127))
    weight = q.fc.weight.abs().mean(1)
    torch.testing.assert_close(learned(q)["quantizers.fc_weight.learned"], 2 * weight / math.sqrt(127))


def test_pact_learns_clips_of_activations_and_weights_are_clipped_at_their_maximum():
    _, q, x = quantized("pact")
    assert list(learned(q)) == ["quantizers.conv_input.learned", "quantizers.fc_input.learned"]
    assert learned(q)["quantizers.conv_input.learned"] == x.abs().max()
    assert q.quantizers.conv_weight.settings.method == "max"
    assert torch.equal(q.quantizers.conv_weight.hint, q.conv.weight.abs().amax((1, 2, 3)))


@pytest.mark.parametrize("clip", CLIPS)
def test_the_gradient_of_the_loss_is_that_of_its_formula(clip):
    torch.manual_seed(1)
    model, x = nn.Linear(6, 3, bias=False), torch.randn(5, 6)
    q = quantize(model, x, Config(clip=clip, edge_bits=None))
    parameter = q.get_submodule(next(n for n, _ in q.named_modules() if n.endswith("_input"))).learned
    with torch.no_grad():
        parameter.mul_(0.4)
    q(x).sum().backward()
    with torch.no_grad():
        weight = next(m for n, m in q.named_modules() if n.endswith("_weight"))(q.get_parameter("weight")).sum(0)
        alpha = parameter.detach()
        if clip == "pact":
            expected = (torch.where(x.abs() > alpha, x.sign(), 0) * weight).sum()
        else:
            code = x / alpha
            slope = torch.where(code <= -8, -8, torch.where(code >= 7, 7, code.round() - code))
            expected = (slope * weight).sum() / math.sqrt(6 * 7)
    torch.testing.assert_close(parameter.grad, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop])
def test_any_optimizer_moves_them(clip, optimizer):
    _, q, _ = quantized(clip)
    before = {name: p.detach().clone() for name, p in learned(q).items()}
    with torch.no_grad():
        q.quantizers.conv_input.learned.mul_(0.3)
    made = optimizer(q.parameters(), lr=0.01)
    for _ in range(3):
        made.zero_grad()
        F.cross_entropy(q(images()), torch.tensor([0, 1, 0, 1])).backward()
        made.step()
    assert all(not torch.equal(p, before[name]) for name, p in learned(q).items())


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("value", [0.0, -3.0])
def test_what_an_optimizer_takes_below_zero_neither_flips_nor_breaks_the_grid(clip, value):
    _, q, x = quantized(clip)
    with torch.no_grad():
        for p in learned(q).values():
            p.fill_(value)
    y = q(x)
    assert y.isfinite().all()
    y.sum().backward()
    assert all(p.grad.isfinite().all() for p in q.parameters())
    assert all(row.clip > 0 for row in octav_fx.rows(q) if row.clip is not None)


def test_the_penalty_is_the_sum_of_squares_and_what_weight_decay_does():
    _, q, x = quantized("pact")
    other = copy.deepcopy(q)
    assert pact_penalty(q).item() == pytest.approx(sum(p.item() ** 2 for p in learned(q).values()), rel=1e-6)
    for model, decay, factor in ((q, 0.1, 0.0), (other, 0.0, 0.05)):
        optimizer = torch.optim.SGD(learned(model).values(), lr=0.5, weight_decay=decay)
        (model(x).square().mean() + factor * pact_penalty(model)).backward()
        optimizer.step()
    for one, two in zip(learned(q).values(), learned(other).values(), strict=True):
        torch.testing.assert_close(one, two)
    for model in (quantized("lsq")[1], Net()):
        with pytest.raises(OctavError, match=r"learns no clip: quantize it with octav_fx\.Config\(clip='pact'\)"):
            pact_penalty(model)


@pytest.mark.parametrize("clip", CLIPS)
def test_data_that_is_not_finite_leaves_them_alone(clip):
    _, q, x = quantized(clip)
    train(q, x)
    before = copy.deepcopy(q.state_dict())
    bad = x.clone()
    bad[0, 0, 0, 0] = math.nan
    q.eval()(bad)
    assert all(torch.equal(p, before[name]) for name, p in learned(q).items())
    torch.testing.assert_close(q(x), copy.deepcopy(q)(x), rtol=0, atol=0)
    # Nor does it decide where they begin.
    initialized = quantize(Net().eval(), bad, Config(clip=clip))
    assert learned(initialized)["quantizers.conv_input.learned"].isfinite()


# Saved and copied.


@pytest.mark.parametrize("clip", CLIPS)
def test_a_float_checkpoint_loads_strictly_and_begins_weights_anew(clip):
    _, q, x = quantized(clip, training=False)
    train(q, x)
    kept = {name: p.detach().clone() for name, p in learned(q).items() if "_input" in name}
    other = Net().eval()
    assert str(q.load_state_dict(other.state_dict(), strict=True)) == "<All keys matched successfully>"
    q(x)
    assert all(torch.equal(learned(q)[name], value) for name, value in kept.items())
    fresh = quantize(other, x, Config(clip=clip))
    for name, p in learned(q).items():
        if "_weight" in name:
            assert torch.equal(p, learned(fresh)[name])


@pytest.mark.parametrize("clip", CLIPS)
def test_a_checkpoint_of_the_quantized_model_restores_them(clip):
    _, q, x = quantized(clip)
    train(q, x)
    file = io.BytesIO()
    torch.save(q.state_dict(), file)
    file.seek(0)
    restored = quantize(Net(), images(), Config(clip=clip))
    restored.load_state_dict(torch.load(file), strict=True)
    assert torch.equal(restored.eval()(x), q.eval()(x))
    assert all(torch.equal(p, learned(q)[name]) for name, p in learned(restored).items())


@pytest.mark.parametrize("clip", CLIPS)
def test_one_missing_beside_others_stays(clip):
    _, q, _ = quantized(clip)
    state = {name: value for name, value in q.state_dict().items() if name != "quantizers.fc_input.learned"}
    assert q.load_state_dict(state).missing_keys == []


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda q: pickle.loads(pickle.dumps(q))])
def test_copies_have_their_own(clip, duplicate):
    _, q, x = quantized(clip)
    train(q, x)
    other, before = duplicate(q), {name: p.detach().clone() for name, p in learned(q).items()}
    assert torch.equal(other.eval()(x), q.eval()(x))
    train(other.train(), x)
    assert all(torch.equal(p, before[name]) for name, p in learned(q).items())


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("cast", [nn.Module.half, nn.Module.bfloat16, nn.Module.double])
def test_they_stay_float32_with_every_bit(clip, cast):
    _, q, x = quantized(clip)
    with torch.no_grad():
        q.quantizers.conv_input.learned.fill_(0.1234567)
    before = {name: p.detach().clone() for name, p in learned(q).items()}
    cast(q)
    for name, p in learned(q).items():
        assert p.dtype is torch.float32
        assert torch.equal(p, before[name])
    dtype = q.conv.weight.dtype
    y = q(x.to(dtype))
    assert y.dtype is dtype
    y.sum().backward()
    assert all(p.grad.dtype is torch.float32 for p in learned(q).values())


@pytest.mark.parametrize("clip", CLIPS)
def test_a_model_without_data_begins_with_its_first(clip):
    with torch.device("meta"):
        model, x = Net(), images()
    q = quantize(model, x, Config(clip=clip)).to_empty(device="cpu")
    q.load_state_dict(Net().state_dict())
    x = images()
    q(x)
    expected = quantize(Net(), x, Config(clip=clip))
    name = "quantizers.conv_input.learned"
    assert torch.equal(learned(q)[name], learned(expected)[name])
    before = learned(q)[name].detach().clone()
    q(2 * x)
    assert torch.equal(learned(q)[name], before)


class Branches(nn.Module):
    """A graph for each mode, each with a layer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.training_only, self.eval_only = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.training_only(self.both(x)) if self.training else self.eval_only(self.both(x))


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("training", [True, False])
def test_both_modes_begin_with_the_example_inputs_and_share_what_they_share(clip, training):
    q = quantize(Branches().train(training), torch.randn(4, 8), Config(clip=clip))
    assert q.training is training
    quantizers = [m for m in q.modules() if isinstance(m, FakeQuantizer) and m.learned is not None]
    assert len(quantizers) == (6 if clip == "lsq" else 3)
    assert all(m.initialized for m in quantizers)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.q(x) @ self.k(x).transpose(-1, -2)


def test_a_shared_value_has_one():
    q = quantize(Attention(), torch.randn(2, 5, 8), Config(clip="lsq", edge_bits=None))
    assert sum("q_input" in name or "k_input" in name for name in learned(q)) == 1


@pytest.mark.parametrize("clip", CLIPS)
def test_float_mode_is_the_float_model(clip):
    model, q, x = quantized(clip, training=False)
    with float_mode(q):
        assert torch.equal(q(x), model(x))
    assert not torch.equal(q(x), model(x))


# Static, deployed, shown.


@pytest.mark.slow
@pytest.mark.parametrize("clip", CLIPS)
def test_frozen_they_are_what_was_learned(clip, tmp_path):
    _, q, x = quantized(clip)
    train(q, x)
    y = q.eval()(x)
    # Calibration has nothing to find here.
    octav_fx.freeze(octav_fx.calibrate(q, [images() for _ in range(5)]))
    assert torch.equal(q.simulated_forward(x), y)
    deployed = octav_fx.deployment(q, x)
    # Biases are rounded to the grid of sums; codes at a tie may fall to either side. Both do the same.
    assert deployed.converted_difference < 0.05
    assert abs(deployed.onnx_difference - deployed.converted_difference) < 1e-5
    loaded = quantize(Net().eval(), x, Config(clip=clip))
    loaded.load_state_dict(q.state_dict())
    assert torch.equal(loaded.simulated_forward(x), y)
    octav_fx.unfreeze(q)
    assert torch.equal(q(x), y)
    train(q.train(), x)
    assert not torch.equal(q.eval()(x), y)


@pytest.mark.parametrize("clip", CLIPS)
def test_the_table_shows_them(clip):
    _, q, x = quantized(clip)
    train(q, x)
    shown = {(row.node, row.operand): row.clip for row in octav_fx.rows(q)}
    factor = 128 if clip == "lsq" else 1
    assert shown["conv", "input"] == pytest.approx(factor * q.quantizers.conv_input.learned.item(), rel=1e-6)
    assert clip in repr(q.quantizers.conv_input)


# Compiled and distributed.


@pytest.mark.compile
@pytest.mark.parametrize("clip", CLIPS)
def test_compiled_it_computes_the_same(clip, fresh_dynamo):
    _, q, x = quantized(clip)
    with torch.no_grad():
        for p in learned(q).values():
            p.mul_(0.3)
    eager = copy.deepcopy(q)
    for run in (torch.compile(q, backend="octav", fullgraph=True), eager):
        F.cross_entropy(run(x), torch.tensor([0, 1, 0, 1])).backward()
    for (name, one), two in zip(q.named_parameters(), eager.parameters(), strict=True):
        # Sums in another order around the quantizers; the bias before a batch norm has no gradient but rounding.
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("clip", CLIPS)
def test_a_float_model_that_is_compiled_has_no_place_for_them(clip, fresh_dynamo):
    for options in ({"clip": clip}, {"overrides": {"fc": {"clip": clip}}}):
        with pytest.raises(OctavError, match=f"clip='{clip}' is learned.*octav_fx.quantize"):
            torch.compile(Net(), backend="octav", options=options)(images())


def step(rank: int, clip: str) -> None:
    torch.manual_seed(0)
    model, batches = Net(), torch.randn(3, 2, 4, 3, 8, 8)
    # Each rank begins with examples of its own; wrapping takes those of the first.
    q = quantize(model, batches[0, rank], Config(clip=clip))
    wrapped = DistributedDataParallel(q)
    assert all(same_everywhere(p.detach()) for p in learned(q).values())
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    for batch in batches:
        optimizer.zero_grad()
        wrapped(batch[rank]).square().mean().backward()
        assert all(same_everywhere(p.grad) for p in q.parameters())
        optimizer.step()
    assert all(same_everywhere(p.detach()) for p in q.parameters())


@pytest.mark.ranks
@pytest.mark.parametrize("clip", CLIPS)
def test_ranks_learn_the_same(clip):
    spawn(step, clip)
