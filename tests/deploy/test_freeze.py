"""Static clips: what calibrate, training and the weights themselves leave, kept by freeze until unfreeze."""

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn

from octav_fx import (
    Config,
    OctavError,
    calibrate,
    check,
    convert,
    float_mode,
    freeze,
    optimal_clip,
    quantize,
    rows,
    table,
    unfreeze,
)
from octav_fx.capture.modules import QuantizedModule
from octav_fx.clips.methods import METHODS
from octav_fx.nn import FakeQuantizer
from tests.support.graphs import model
from tests.support.nets import ConvNet as Net


class Branches(nn.Module):
    """A graph for each mode; the layer of training mode is no part of the other."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.auxiliary = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        return x + self.auxiliary(x) if self.training else x


def images(scale: float = 1.0) -> Tensor:
    return scale * torch.randn(2, 3, 8, 8)


def quantized(training: bool = False) -> tuple[QuantizedModule, Tensor]:
    x = images()
    return quantize(Net().train(training), x), x


def quantizers(q: nn.Module) -> dict[str, FakeQuantizer]:
    return {name: m for name, m in q.named_modules() if isinstance(m, FakeQuantizer)}


def saved_and_loaded(q: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(q, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = [copy.deepcopy, lambda q: pickle.loads(pickle.dumps(q)), saved_and_loaded]


# calibrate.


def test_the_clip_of_an_activation_is_the_average_over_the_batches():
    q, _ = quantized()
    batches = [images(scale) for scale in (0.5, 1, 4)]
    assert calibrate(q, batches) is q
    freeze(q)
    # The first convolution reads the images themselves, at 8 bits.
    expected = torch.stack([optimal_clip(x, 8) for x in batches]).double().mean()
    torch.testing.assert_close(q.quantizers.conv_input.clip.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("method", METHODS)
def test_five_batches_with_every_clip(method):
    x = images()
    q = quantize(Net().eval(), x, Config(clip=method))
    batches = [images(scale) for scale in (0.5, 1, 1, 2, 4)]
    freeze(calibrate(q, batches))
    expected = torch.stack([optimal_clip(x, 8, method=method) for x in batches]).double().mean()
    torch.testing.assert_close(q.quantizers.conv_input.clip.double(), expected, rtol=1e-6, atol=0)
    # A weight from itself, in the model and alone: the hint is another start for the same fixed point.
    weight = optimal_clip(q.conv.weight, 8, dim=0, method=method)
    torch.testing.assert_close(q.quantizers.conv_weight.clip, weight, rtol=1e-6, atol=0)
    static = q(x)
    assert torch.equal(q(x), static)
    unfreeze(q)
    torch.testing.assert_close(optimal_clip(x, 8, method=method), _clip_of(q, x), rtol=1e-6, atol=0)


def _clip_of(q: nn.Module, x: Tensor) -> Tensor:
    q(x)
    return q.quantizers.conv_input.hint


@pytest.mark.parametrize("training", [True, False])
def test_calibration_changes_nothing_else(training):
    q, x = quantized(training)
    q.norm.eval()
    before = {name: value.clone() for name, value in q.state_dict().items()}
    modes, random = [m.training for m in q.modules()], torch.get_rng_state()
    calibrate(q, (x for _ in range(2)))
    assert [m.training for m in q.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[name]) for name, value in q.state_dict().items())
    assert q.graph is q.graph_of(training)
    assert all(parameter.grad is None for parameter in q.parameters())


def test_batches_may_be_tuples_and_dicts():
    q, x = quantized()
    clips = []
    for batches in ([x], [(x,)], [{"x": x}]):
        clips.append(freeze(calibrate(q, batches)).quantizers.fc_input.clip.clone())
        unfreeze(q)
    assert clips[0] == clips[1] == clips[2] > 0


def test_a_loader_with_labels_calibrates_and_checks():
    q, x = quantized()
    expected = freeze(calibrate(q, [x])).quantizers.fc_input.clip.clone()
    unfreeze(q)
    loader = torch.utils.data.DataLoader([(row, 1) for row in x], batch_size=len(x))
    check(q, loader)
    assert torch.equal(freeze(calibrate(q, loader)).quantizers.fc_input.clip, expected)


def test_batches_that_are_none_say_so():
    q, x = quantized()
    with pytest.raises(OctavError, match=r"a list of batches or a loader, not a tensor, .*: \[x\]"):
        calibrate(q, x)
    with pytest.raises(OctavError, match=r"a batch does not fit \w+\.forward: .*; labels are left out"):
        calibrate(q, [{"x": x, "labels": x}])


def test_calibration_needs_a_batch_and_a_model_that_is_not_frozen():
    q, x = quantized()
    with pytest.raises(OctavError, match=r"no batches: give at least one"):
        calibrate(q, [])
    freeze(calibrate(q, [x]))
    with pytest.raises(OctavError, match=r"has a static clip already: call octav_fx\.unfreeze"):
        calibrate(q, [x])
    with pytest.raises(OctavError, match=r"Linear holds no module that octav_fx\.quantize returned"):
        calibrate(nn.Linear(2, 2), [x])


# freeze.


def test_without_data_freeze_names_the_quantizer():
    q, _ = quantized()
    # The example inputs of quantize() are no data: the weights may be others since.
    with pytest.raises(OctavError, match=r"quantizers\.conv_input has seen no data: call octav_fx\.calibrate"):
        freeze(q)
    assert all(quantizer.clip is None for quantizer in quantizers(q).values())


def test_training_leaves_a_running_mean():
    q, _ = quantized(training=True)
    clips = []
    for scale in (1, 2, 3):
        x = images(scale)
        q(x)
        clips.append(optimal_clip(x, 8))
    q.eval()
    # Eval mode is not training.
    q(images(100))
    weights = 0.9 ** torch.tensor([2.0, 1, 0])
    expected = (weights * torch.stack(clips)).sum() / weights.sum()
    torch.testing.assert_close(freeze(q).quantizers.conv_input.clip, expected, rtol=1e-6, atol=0)


def test_a_table_does_not_move_the_running_mean():
    q, x = quantized(training=True)
    q(x)
    before = q.quantizers.conv_input.mean.clone()
    table(q, images(50))
    assert torch.equal(q.quantizers.conv_input.mean, before)


def test_weights_keep_their_own_fixed_point_of_the_moment():
    q, x = quantized()
    calibrate(q, [x])
    with torch.no_grad():
        q.conv.weight.mul_(3)
    freeze(q)
    expected = optimal_clip(q.conv.weight, 8, dim=0)
    torch.testing.assert_close(q.quantizers.conv_weight.clip, expected, rtol=1e-6, atol=0)


def test_a_frozen_model_computes_with_its_clips_and_unfreezing_is_the_way_back():
    q, x = quantized()
    dynamic = q(x)
    assert freeze(calibrate(q, [x, images(3)])) is q
    frozen = q(x)
    assert not torch.equal(frozen, dynamic)
    hints = [quantizer.hint.clone() for quantizer in quantizers(q).values()]
    # One image twice as large is clipped where it was.
    assert torch.equal(q(x), frozen)
    for quantizer, hint in zip(quantizers(q).values(), hints, strict=True):
        assert torch.equal(quantizer.hint, hint)
    assert unfreeze(q) is q
    # The same fixed point, from another hint.
    torch.testing.assert_close(q(x), dynamic, rtol=1e-5, atol=1e-6)
    assert q.state_dict().keys() == Net().state_dict().keys()


def test_a_table_shows_the_static_clips():
    q, x = quantized()
    freeze(calibrate(q, [images(3)]))
    shown = {f"{row.node}_{row.operand}": row.clip for row in rows(q, x)}
    assert shown["conv_input"] == float(q.quantizers.conv_input.clip)
    assert shown["fc_weight"] == float(q.quantizers.fc_weight.clip.mean())


def test_frozen_clips_give_the_gradient_of_the_spec():
    q, x = quantized(training=True)
    freeze(calibrate(q, [x]))
    q.quantizers.conv_input.clip.mul_(0.1)
    x.requires_grad_()
    q(x).sum().backward()
    inside = x.abs() <= q.quantizers.conv_input.clip
    # PWL: nothing passes beyond the clip.
    assert (x.grad[~inside] == 0).all()
    assert x.grad[inside].any()
    assert q.conv.weight.grad.any()


def test_freezing_again_follows_the_weights():
    q, x = quantized()
    freeze(calibrate(q, [x]))
    first, activation = q.quantizers.fc_weight.clip.clone(), q.quantizers.fc_input.clip.clone()
    with torch.no_grad():
        q.fc.weight.mul_(2)
    freeze(q)
    torch.testing.assert_close(q.quantizers.fc_weight.clip, 2 * first, rtol=1e-6, atol=0)
    assert torch.equal(q.quantizers.fc_input.clip, activation)


def test_a_quantized_part_of_a_larger_module():
    q, x = quantized()
    whole = nn.Sequential(nn.Identity(), q, nn.Softmax(1))
    freeze(calibrate(whole, [x]))
    assert torch.equal(whole(x), q(x).softmax(1))
    assert all(quantizer.clip is not None for quantizer in quantizers(q).values())
    unfreeze(whole)
    assert all(quantizer.clip is None for quantizer in quantizers(q).values())


@pytest.mark.slow
def test_both_graphs_are_frozen_and_what_eval_mode_lacks_may_stay_dynamic():
    x = torch.randn(4, 8)
    q = quantize(Branches().eval(), x, Config(edge_bits=None))
    freeze(calibrate(q, [x]))
    loose = [name for name, quantizer in quantizers(q).items() if quantizer.clip is None]
    assert loose == ["quantizers.auxiliary_input"]
    q.train()
    assert q(x).isfinite().all()
    q = quantize(Branches(), x, Config(edge_bits=None))
    q(x)
    q.train()
    freeze(q.eval())
    assert all(quantizer.clip is not None for quantizer in quantizers(q).values())


def test_float_mode_is_float_still():
    model, x = Net().eval(), images()
    q = freeze(calibrate(quantize(model, x), [x]))
    with float_mode(q):
        assert torch.equal(q(x), model(x))


# State and copies.


@pytest.mark.parametrize("duplicate", COPIES)
def test_copies_are_frozen_alike(duplicate):
    q, x = quantized()
    freeze(calibrate(q, [x]))
    copied = duplicate(q)
    assert torch.equal(copied(2 * x), q(2 * x))
    unfreeze(copied)
    assert quantizers(q)["quantizers.fc_input"].clip is not None


def test_a_frozen_state_freezes_what_it_is_loaded_into():
    q, x = quantized()
    freeze(calibrate(q, [x]))
    state = q.state_dict()
    assert {name for name in state if name.startswith("quantizers.")} == {f"{name}.clip" for name in quantizers(q)}
    other = quantize(Net().eval(), x)
    other.load_state_dict(state, strict=True)
    assert torch.equal(other(3 * x), q(3 * x))
    # A float checkpoint would leave clips of other weights.
    with pytest.raises(RuntimeError, match=r"Missing key.*quantizers\.conv_input\.clip"):
        q.load_state_dict(Net().state_dict(), strict=True)


def test_clips_stay_float32_and_follow_the_model():
    q, x = quantized()
    freeze(calibrate(q, [x]))
    q.half()
    assert all(quantizer.clip.dtype is torch.float32 for quantizer in quantizers(q).values())


def test_memory_without_data_is_no_mean():
    q, _ = quantized()
    q.to("meta")
    q.to_empty(device="cpu")
    assert q.quantizers.conv_input.average is None


# Compiled.


@pytest.mark.compile
@pytest.mark.parametrize("training", [True, False])
def test_compiled_before_and_after(training):
    torch._dynamo.reset()
    q, x = quantized(training)
    q.norm.eval()
    compiled = torch.compile(q, backend="octav")
    dynamic = compiled(x)
    calibrate(compiled, [x, images(3)])
    freeze(q)
    for module in (compiled, torch.compile(copy.deepcopy(q), backend="octav")):
        # Fused kernels sum in another order; a value at a tie of the 4-bit grid of fc_input may move by a step.
        torch.testing.assert_close(module(x), q(x), rtol=1e-4, atol=1e-4)
        assert (module(x) - dynamic).abs().max() > 1e-3
    q.zero_grad()
    compiled(x).sum().backward()
    found = q.conv.weight.grad.clone()
    q.zero_grad()
    q(x).sum().backward()
    torch.testing.assert_close(found, q.conv.weight.grad, rtol=1e-3, atol=1e-4)
    unfreeze(q)
    torch.testing.assert_close(compiled(x), dynamic, rtol=1e-4, atol=1e-4)


class Places(nn.Module):
    """Keeps the places of its positions for images of the shape of the last ones, as the heads of YOLO do."""

    shape: torch.Size | None = None

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.places = torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if self.shape != y.shape:
            self.places = torch.arange(y.shape[2]).repeat_interleave(y.shape[3]).to(y)
            self.shape = y.shape
        return y.flatten(2) + self.places


def _places() -> tuple[nn.Module, Tensor, Tensor]:
    high, wide = torch.rand(2, 3, 8, 4), torch.rand(2, 3, 4, 8)
    q = quantize(Places().eval(), high, Config(8, 8))
    return freeze(calibrate(q, [high, wide, high])), high, wide


@pytest.mark.slow
def test_a_frozen_model_reads_tensors_that_forward_has_set():
    q, *batches = _places()
    for x in (*batches, *batches):
        y, expected = q(x), unfreeze(copy.deepcopy(q))(x)
        # Rounding is far from the distance of two places, which are whole numbers.
        assert (y - expected).abs().max() < 0.1
    q.places += 100
    assert (q(batches[1]) - expected - 100).abs().max() < 0.1


class Placed(Places):
    """Computes the places in each call, and keeps them: YOLO with `dynamic`."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        self.places = torch.arange(y.shape[2]).repeat_interleave(y.shape[3]).to(y)
        self.last = y
        return y.flatten(2) + self.places


def test_a_frozen_model_that_stores_computes_its_definition():
    high, wide = torch.rand(2, 3, 8, 4), torch.rand(2, 3, 4, 8)
    q = freeze(calibrate(quantize(Placed().eval(), high, Config(8, 8)), [high, wide]))
    defined = convert(q, integers=False)
    with torch.no_grad():
        for x in (high, wide, high):
            y, kept = q(x), q.places
            assert torch.equal(y, defined(x)) and not torch.equal(y, unfreeze(copy.deepcopy(q))(x))
            assert kept.shape == (32,) and q.last.shape == (2, 8, *x.shape[2:])


@pytest.mark.slow
@pytest.mark.parametrize("integers", [False, True])
def test_what_is_converted_is_the_graph_of_what_forward_has_left(integers):
    q, high, wide = _places()
    for x, other in ((wide, high), (high, wide)):
        expected = q(x)
        converted = convert(q, integers=integers)
        assert (converted(x) - expected).abs().max() < 0.1
        # It keeps nothing of a call: the places of the other shape are none that it has.
        with pytest.raises(
            OctavError, match=r"holds for the value False.*there.*: a converted model.*calibrate with batches"
        ):
            converted(other)
    q.shape = "unknown"
    with pytest.raises(OctavError, match=r"Places: shape is not what it was when octav_fx\.calibrate ran"):
        convert(q, integers=integers)


class Optional(nn.Module):
    """Takes another branch with a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = self.first(x).relu()
        return self.last(y if mask is None else y * mask - 1)


def test_every_kind_of_call_that_calibrate_ran_is_converted():
    x, mask = torch.randn(4, 8), torch.rand(4, 8)
    q = quantize(Optional(), (x, mask))
    converted = convert(freeze(calibrate(q, [(x, mask), x])).eval())
    # Levels are added in another order; no code of these is at a tie.
    for call in ((x, mask), (x,), (x[:2], mask[:2]), (x[:3],)):
        torch.testing.assert_close(converted(*call), q(*call))
    with pytest.raises(OctavError, match="calibrate with batches like this call, freeze, and convert again"):
        converted(x, [mask])
    # Training goes by the example, as before.
    assert q.train()(x, mask).shape == q(x).shape


def test_a_kind_of_call_whose_clips_nobody_found_is_not_converted():
    def forward(self, x, scale=None):
        y = self.first(x).relu()
        return y if scale is None else torch.matmul(y, y.T * scale)

    x = torch.randn(4, 8)
    q = quantize(model(forward, first=nn.Linear(8, 8)).eval(), x)
    freeze(calibrate(q, [x]))
    with pytest.warns(UserWarning, match="finds its clip anew"):
        q(x, torch.ones(4))
    converted = convert(q)
    torch.testing.assert_close(converted(x), q(x))
    with pytest.raises(OctavError, match=r"argument scale: None at capture, a tensor .*calibrate with batches like"):
        converted(x, torch.ones(4))
    converted = convert(freeze(calibrate(unfreeze(q), [x, (x, torch.ones(4))])))
    torch.testing.assert_close(converted(x, torch.ones(4)), q(x, torch.ones(4)))


@pytest.mark.slow
def test_kinds_of_calls_share_what_they_store():
    x, mask = torch.randn(4, 8), torch.rand(4, 8)
    q = freeze(calibrate(quantize(Optional().eval(), x), [x, (x, mask)]))
    converted = convert(q)
    saved = io.BytesIO()
    torch.save(converted, saved)
    saved.seek(0)
    loaded = convert(freeze(calibrate(quantize(Optional().eval(), x), [x, (x, mask)])))
    loaded.load_state_dict(converted.state_dict())
    others = [copy.deepcopy(converted), torch.load(saved, weights_only=False), converted.to(torch.float32), loaded]
    for other in others:
        (further,) = other.octav_further
        own, its = dict(other.named_buffers()), dict(further.named_buffers())
        weights = [name for name in own if name.endswith("_weight.codes")]
        assert len(weights) == 2 and all(own[name] is its[name] for name in weights)
        # What a clip of its own is in.
        assert not [name for name in other.state_dict() if name.startswith("octav_further") and "weight" in name]
        for call in ((x,), (x, mask)):
            assert torch.equal(other(*call), converted(*call))
    with pytest.raises(RuntimeError, match=r"Missing key.*octav_further\.0\."):
        loaded.load_state_dict({k: v for k, v in converted.state_dict().items() if not k.startswith("octav_further")})


def test_code_around_a_converted_layer_reads_its_type():
    class Cast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x.to(self.layer.weight.dtype)).relu()

    x = torch.randn(4, 8)
    q = quantize(Cast().eval(), x, blocks=["layer"])
    converted = convert(freeze(calibrate(q, [x])))
    outline = converted.layer.weight
    assert torch.isfinite(converted(x)).all()
    assert (outline.dtype, outline.shape, outline.is_meta) == (torch.float32, (8, 8), True)
    assert "layer.weight" not in converted.state_dict()
