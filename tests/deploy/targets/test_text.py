"""A small text model for each target: what the nodes say, and that runtimes load the file."""

from pathlib import Path

import onnx
import onnx.reference
import pytest
import torch
from torch import Tensor, nn

import octav_fx
from octav_fx import Config
from octav_fx.deploy.runtimes import run_onnx
from octav_fx.deploy.targets import TARGETS
from tests.support.deployable_models import Case, frozen, relative


class Text(nn.Module):
    """Embeddings, an encoder layer of PyTorch's, and one whose queries, keys and values are chunks."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(20, 16), nn.Embedding(8, 16)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, activation="gelu", batch_first=True)
        self.project, self.head = nn.Linear(16, 48), nn.Linear(16, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.layer(self.tokens(tokens) + self.places.weight[: tokens.shape[1]])
        q, k, v = (part.unflatten(-1, (2, 8)).transpose(1, 2) for part in self.project(x).chunk(3, -1))
        x = x + nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.head(x.mean(1))


def tokens(batch: int = 2) -> tuple[Tensor, ...]:
    return (torch.randint(0, 20, (batch, 8)),)


@pytest.fixture(scope="module")
def model() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return frozen(Case(Text, tokens), Config.preset("tensorrt"))


@pytest.mark.parametrize("target", [target.name for target in TARGETS])
def test_runtimes_and_the_standard_agree_with_the_frozen_model(target, model, tmp_path):
    q, inputs = model
    path: Path = tmp_path / "model.onnx"
    octav_fx.export_onnx(q, inputs, path, target=target)
    stored = onnx.load(path)
    onnx.checker.check_model(stored, full_check=True)
    (x,) = inputs
    (stated,) = onnx.reference.ReferenceEvaluator(stored).run(None, {stored.graph.input[0].name: x.numpy()})
    (found,) = run_onnx(path, inputs).values()
    with torch.no_grad():
        expected = q(*inputs)
    # Sums of floats in other orders; a code that moved would be far more.
    assert relative(torch.from_numpy(stated), expected) < 1e-5
    assert relative(found, expected) < 1e-5
