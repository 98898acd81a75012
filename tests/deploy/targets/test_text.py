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
from tests.support.deployable_models import Case, Text, frozen, relative, rows_of_tokens


@pytest.fixture(scope="module")
def model() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return frozen(Case(Text, rows_of_tokens), Config.preset("tensorrt"))


@pytest.mark.slow
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
