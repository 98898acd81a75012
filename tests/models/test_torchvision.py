"""Every torchvision model: both operands of each contraction on a grid, seen from outside, and the way back exact."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from octav_fx import Config, coverage, float_mode, quantize, zoo
from tests.support.on_grid import OnGrid

pytestmark = pytest.mark.models

models = zoo.torchvision().models
# One model of each kind of graph: of each file of torchvision, and of each kind of block in it. ./dev bench zoo asks
# the same of all its models.
NAMES = (
    *("alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "efficientnet_v2_s", "googlenet", "inception_v3"),
    *("maxvit_t", "mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small", "regnet_x_400mf", "regnet_y_400mf", "resnet18"),
    *("resnet50", "resnext50_32x4d", "shufflenet_v2_x0_5", "squeezenet1_0", "squeezenet1_1", "swin_t", "swin_v2_t"),
    *("vgg11", "vgg11_bn", "vit_b_32"),
    *("deeplabv3_mobilenet_v3_large", "fcn_resnet50", "lraspp_mobilenet_v3_large"),
    *("mc3_18", "mvit_v1_b", "mvit_v2_s", "r2plus1d_18", "r3d_18", "s3d", "swin3d_t"),
)
# In training mode: those whose training differs, in statistics, random numbers and auxiliary heads. Without Inception,
# whose auxiliary head needs 299 pixels, and MaxViT for its time.
TRAINED = (
    *("alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "efficientnet_v2_s", "fcn_resnet50", "googlenet"),
    *("lraspp_mobilenet_v3_large", "mc3_18", "mnasnet0_5", "mobilenet_v3_small", "mvit_v2_s"),
    *("regnet_y_400mf", "resnet18", "shufflenet_v2_x0_5", "squeezenet1_1", "swin_t", "swin_v2_t", "vit_b_32"),
)
# Channels, frames if it is a video, and pixels of an example.
SHAPES = {
    "inception_v3": (3, 80, 80),
    "maxvit_t": (3, 224, 224),
    "s3d": (3, 14, 224, 224),
    "vit_b_32": (3, 32, 32),
    **dict.fromkeys(("mvit_v1_b", "mvit_v2_s"), (3, 4, 64, 64)),
    **dict.fromkeys(("mc3_18", "r2plus1d_18", "r3d_18", "swin3d_t"), (3, 8, 32, 32)),
}
FOUR_BITS = Config(edge_bits=None)


@pytest.fixture(autouse=True)
def _fast_and_small(monkeypatch: pytest.MonkeyPatch) -> None:
    # Truncated normal numbers take most of the time that it takes to make a transformer.
    monkeypatch.setattr(nn.init, "trunc_normal_", lambda t, mean=0.0, std=1.0, *_, **__: t.data.normal_(mean, std))
    # Its builders ask for 16 frames of 224 pixels.
    mvit, small = models.video.mvit.MViT, {"spatial_size": (64, 64), "temporal_size": 4}
    monkeypatch.setattr(models.video.mvit, "MViT", lambda **given: mvit(**{**given, **small}))


def build(name: str) -> nn.Module:
    options: dict[str, Any] = {}
    if name.startswith("vit_"):
        options["image_size"] = 32
    if name in ("googlenet", "inception_v3"):
        # Minutes of scipy.
        options["init_weights"] = False
    return zoo.load(name, **options)


def example(name: str, batch: int = 1) -> Tensor:
    return torch.randn(batch, *SHAPES.get(name, (3, 64, 64)))


def fingerprint(model: nn.Module) -> list[Any]:
    """Everything about a model that someone could have changed: values, writes, modes and attributes."""
    tensors = [
        (name, tensor.data_ptr(), tensor._version, tensor.requires_grad, float(tensor.detach().sum(dtype=torch.double)))
        for name, tensor in model.state_dict(keep_vars=True).items()
    ]
    modules = [(name, module.training, sorted(vars(module))) for name, module in model.named_modules()]
    return [tensors, modules]


def assert_same(one: Any, other: Any) -> None:
    """Tensors equal bit for bit, in the same order of the same containers' leaves."""
    for x, y in zip(pytree.tree_leaves(one), pytree.tree_leaves(other), strict=True):
        assert torch.equal(x, y)


def leaves(out: Any) -> Iterator[Tensor]:
    return (leaf for leaf in pytree.tree_leaves(out) if isinstance(leaf, Tensor))


def test_there_is_one_of_every_file_of_torchvision():
    files = {
        name: models.get_model_builder(name).__module__.removeprefix("torchvision.models.")
        for name in models.list_models()
    }
    # Detectors are in tests/test_zoo.py, optical flow in ./dev bench zoo; those of quantized kernels cannot be trained.
    others = ("detection.", "quantization.", "optical_flow.")
    assert {files[name] for name in NAMES} == {file for file in files.values() if not file.startswith(others)}


@pytest.mark.parametrize("name", NAMES)
def test_eval(name):
    model, x = build(name).eval(), example(name)
    before = fingerprint(model)
    q = quantize(model, x, FOUR_BITS, strict=True)
    assert fingerprint(model) == before
    assert list(q.state_dict()) == list(model.state_dict())
    with torch.no_grad():
        with float_mode(q):
            restored = q(x)
        assert_same(restored, model(x))
        del model
        with OnGrid(4) as seen:
            q(x)
    assert seen.off_grid == []
    # A head of training alone is not called.
    nodes = {record.site for record in q.all_records[False] if record.reason is None}
    assert seen.checked >= len(nodes) > 0
    assert coverage(q).quantized_macs == coverage(q).total_macs > 0


@pytest.mark.parametrize("name", TRAINED)
def test_training(name):
    model, x = build(name).train(), example(name, batch=2)
    q = quantize(model, x, FOUR_BITS, strict=True)
    with float_mode(q):
        step(q, x)
    step(model, x)
    for (key, ours), theirs in zip(q.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad), key
    assert_same(dict(q.state_dict()), dict(model.state_dict()))
    del model
    q.zero_grad()
    with OnGrid(4) as seen:
        out = q(x)
    assert seen.off_grid == []
    assert seen.checked > 0
    sum(leaf.square().mean() for leaf in leaves(out)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in q.parameters())


def step(model: nn.Module, x: Tensor) -> None:
    torch.manual_seed(1)
    sum(leaf.square().mean() for leaf in leaves(model(x))).backward()


def test_edge_layers_are_on_the_grid_of_eight_bits_and_on_no_coarser_one():
    model, x = build("resnet18").eval(), example("resnet18")
    q = quantize(model, x, strict=True)
    with torch.no_grad():
        with OnGrid(8) as seen:
            q(x)
        assert seen.off_grid == []
        with OnGrid(4) as coarse:
            q(x)
    # conv1's image and weight, fc's features and weight; each of the others has at most 16 values.
    assert [shape for _, shape in coarse.off_grid] == [(1, 3, 64, 64), (64, 3, 7, 7), (1, 512), (512, 1000)]


@pytest.mark.parametrize("name", ["resnet18", "vit_b_32"])
def test_a_float_model_is_off_the_grid_everywhere(name):
    model = build(name).eval()
    with torch.no_grad(), OnGrid(8) as seen:
        model(example(name))
    assert seen.checked > 0
    # Attention of one token per head and image may have few values; every convolution and linear has many.
    assert len(seen.off_grid) >= seen.checked
