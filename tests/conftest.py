"""One thread and one seed: what a test computes depends neither on the other tests nor on the machine's cores."""

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
# Cores are shared with other processes: how long one example takes says nothing.
settings.register_profile("octav_fx", deadline=None)
settings.load_profile("octav_fx")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
