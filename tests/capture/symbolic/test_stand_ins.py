"""Batch norms that are evaluated without data: what is computed from their results is known as of real ones."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from octav_fx.capture.partial import partial_lines
from octav_fx.capture.symbolic.stand_ins import Evaluation
from octav_fx.compat.tensors import FakeTensorMode
from tests.support.alike import assert_follows

image = torch.randn(2, 4, 6, 6)
GIVEN = {
    "contiguous": image,
    "channels last": image.to(memory_format=torch.channels_last),
    "turned": image.transpose(2, 3),
    "every other row": image[:, :, ::2],
    "a sequence": torch.randn(2, 6, 4).transpose(1, 2),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", GIVEN)
def test_a_batch_norm_is_as_in_its_kernel(name: str, training: bool) -> None:
    x = GIVEN[name]
    expected = torch.native_batch_norm(x, None, None, torch.zeros(4), torch.ones(4), training, 0.1, 1e-5)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, Evaluation():
        state = mode.from_tensor(torch.ones(4))
        found = torch.native_batch_norm(mode.from_tensor(x), None, None, state, state, training, 0.1, 1e-5)
    assert [(t.shape, t.stride(), t.dtype) for t in found] == [(t.shape, t.stride(), t.dtype) for t in expected]


class OfSequence(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(8, 8), nn.BatchNorm1d(8, momentum=None), nn.Linear(40, 8)

    def forward(self, x: Tensor) -> Any:
        # Contiguous, which its input is not.
        return self.b(self.norm(self.a(x).transpose(1, 2)).view(x.shape[0], -1))


@pytest.mark.parametrize("training", [False, True])
def test_statistics_that_are_means_of_all_calls_are_in_the_graph(training: bool) -> None:
    q = assert_follows(OfSequence, ((torch.randn(2, 5, 8),), (torch.randn(3, 5, 8),)), training)
    assert partial_lines(q) == []
