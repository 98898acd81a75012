"""One thread, one seed, own caches: no test depends on another, on the machine's cores, or on an earlier run."""

import os
import tempfile

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
# Read when triton is first imported. Without a GPU its kernels run interpreted, the same source on CPU tensors.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# A compiler that was killed leaves half a library in the user's cache of Inductor, where every later run would find it.
_CACHE = tempfile.TemporaryDirectory(prefix="octav_fx_tests_")
os.environ["TORCHINDUCTOR_CACHE_DIR"] = _CACHE.name
# Cores are shared with other processes: how long one example takes says nothing.
settings.register_profile("octav_fx", deadline=None)
settings.load_profile("octav_fx")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
