"""Weights as compressed-tensors, an encoder that others serve, writes and reads them: equal levels at equal scales."""

from typing import Any

import pytest
import torch
from torch import Tensor

from octav_fx import zoo
from octav_fx.formats.scales import tensor_scale
from octav_fx.formats.spec import spec_of

pytestmark = pytest.mark.stacks

# Its preset, its compressor, and ours. Scales of float32, as its integers and FP8 have them, are of any format there.
CASES = {
    "NVFP4A16": ("NVFP4PackedCompressor", "e2m1/group-16.1/e4m3"),
    "MXFP4A16": ("MXFP4PackedCompressor", "e2m1/group-32.1/e8m0"),
    "MXFP8A16": ("MXFP8QuantizationCompressor", "e4m3/group-32.1/e8m0"),
    "W4A16": ("PackedQuantizationCompressor", "int4/group-128.1"),
    "W8A16": ("PackedQuantizationCompressor", "int8/channel.0"),
}


@pytest.fixture
def library() -> Any:
    zoo.torchvision()
    return pytest.importorskip("compressed_tensors")


def weight() -> Tensor:
    """A weight whose largest magnitude is that of E2M1 times that of E4M3: the scale of the tensor of NVFP4 is 1."""
    x = torch.randn(24, 256) * torch.randn(24, 1).exp() * 100
    return x.clamp(-6 * 448, 6 * 448).index_put((torch.tensor([3]), torch.tensor([5])), torch.tensor(6 * 448.0))


@pytest.mark.parametrize("preset", CASES)
@pytest.mark.parametrize("method", ["octav", "max"])
def test_levels_are_those_that_it_writes_and_reads(library: Any, preset: str, method: str) -> None:
    from compressed_tensors import compressors
    from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme

    name, text = CASES[preset]
    compressor, scheme = getattr(compressors, name), preset_name_to_scheme(preset, ["Linear"])
    spec, x = spec_of(text), weight()
    hint = torch.zeros(() if spec.granularity.is_short else spec.clip_shape(x.shape))
    clip = torch.ops.octav.optimal_clip(x, hint, text, method)
    ours = torch.ops.octav.fake_quantize(x, clip, text, "ste")
    scale = spec.format.step(clip).reshape(len(x), -1)
    tensors = {"weight": x, "weight_scale": scale}
    if preset.startswith("NVFP4"):
        assert tensor_scale(x, spec.format) == 1
        tensors["weight_global_scale"] = torch.ones(1)
    theirs = compressor.decompress(compressor.compress(tensors, scheme), scheme)["weight"]
    # It reads FP4 into bfloat16, which holds these products.
    assert torch.equal(theirs.float(), ours)
