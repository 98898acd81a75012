"""Kernels for matmuls of codes that a test registers, and the passes on devices that they leave alone by default."""

from unittest import mock

import torch
from torch import fx

from octav_fx.ir.edits import Edit
from octav_fx.ops import matmuls
from octav_fx.ops.matmuls import MatmulKernel, fits_int32
from octav_fx.passes import fuse_weight_quantizers, integer_matmul
from octav_fx.passes.lower import fuse_weight_quantizers as fuse_module
from tests.support.interpreter import DEVICE

# The op itself, whatever it pays: on a CPU that is its reference.
ON_CPU, ON_DEVICE = (
    MatmulKernel(device, torch.ops.octav.int_matmul.default, fits_int32, lambda *sizes: None)
    for device in ("cpu", DEVICE)
)


def forced(gm: fx.GraphModule) -> list[Edit]:
    """Run integer_matmul where every matmul has a kernel that declines none."""
    with mock.patch.object(matmuls, "MATMULS", (ON_CPU, ON_DEVICE)):
        return integer_matmul(gm)


def fuse_anywhere(gm: fx.GraphModule) -> list[Edit]:
    """Run fuse_weight_quantizers for weights on any device."""
    with mock.patch.object(fuse_module, "DEVICES", {"cpu", "cuda"}):
        return fuse_weight_quantizers(gm)
