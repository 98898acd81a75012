"""The examples that need what ./dev test stacks installs."""

from pathlib import Path

import pytest

from examples import trainer

pytestmark = pytest.mark.stacks


def test_trainer(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    found = trainer.main(tmp_path, steps=150)
    # Half of the texts have more letters of either half: by chance it would be right in half of them.
    assert found["quantized"] > 0.9 and found["its weights in float"] > 0.9
