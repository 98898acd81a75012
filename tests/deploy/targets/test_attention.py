"""Parts of a wide layer as layers: those that are some, and what looks like it, as onnxruntime computes the nodes."""

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

from octav_fx import Config, export_onnx
from octav_fx.deploy.runtimes import run_onnx
from tests.support.deployable_models import Case, frozen, relative


class Projected(nn.Module):
    """A wide layer, and what a function makes of its result [1, 4, 24]."""

    def __init__(self, of: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.wide, self.of = nn.Linear(8, 24), of

    def forward(self, x: Tensor) -> Tensor:
        return self.of(self.wide(x))


def counted_from_the_end(y: Tensor) -> Tensor:
    parts = y.unflatten(-1, (3, 8)).unsqueeze(0).transpose(0, -2).squeeze(-2)
    return parts[-1] * parts[0]


def in_three_and_in_six(y: Tensor) -> Tensor:
    (first, _, _), (part, other, *_) = y.chunk(3, -1), y.chunk(6, -1)
    return first[..., :4] + part * other


def rows_at_the_front(y: Tensor) -> Tensor:
    return y.unflatten(-1, (3, 8)).unsqueeze(3).permute(3, 1, 2, 0, 4).squeeze(0)[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("of", "products"), [(counted_from_the_end, 2), (in_three_and_in_six, 3), (rows_at_the_front, 1)]
)
def test_a_part_of_a_layer_is_what_it_was(of: Callable[[Tensor], Tensor], products: int, tmp_path: Path) -> None:
    q, (x,) = frozen(Case(lambda: Projected(of), lambda batch: (torch.randn(1, 4, 8),)), Config(8, 8, edge_bits=None))
    path = tmp_path / "model.onnx"
    export_onnx(q, x, path, target="openvino", dynamic_batch=False)
    assert sum(node.op_type == "MatMul" for node in onnx.load(path).graph.node) == products
    (found,) = run_onnx(path, (x,)).values()
    with torch.no_grad():
        # Sums of floats in other orders.
        assert relative(found, q(x)) < 1e-5
