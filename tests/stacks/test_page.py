"""The blocks of docs/guides/stacks.md, and of language-models.md, run as they stand there."""

import importlib
import re
from pathlib import Path
from typing import Any

import pytest

from octav_fx import zoo
from tests.support.images import squares

pytestmark = pytest.mark.stacks

GUIDES = Path(__file__).parents[2] / "docs" / "guides"
PAGE = GUIDES / "stacks.md"


def blocks_of(page: Path) -> list[str]:
    return re.findall(r"^```py\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


# Library -> its block.
BLOCKS = {re.search(r"^import (?!torch)(\w+)", block, re.MULTILINE)[1]: block for block in blocks_of(PAGE)}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("library", BLOCKS)
def test_a_block_runs(library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zoo.torchvision()
    for name in ("cv2", "yaml") if library == "ultralytics" else ():
        pytest.importorskip(name)
    pytest.importorskip(library)
    if library == "timm":
        importlib.import_module("timm.optim")
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "page"}
    if library == "ultralytics":
        namespace["data"] = str(squares(tmp_path / "data"))
    exec(compile(BLOCKS[library], str(PAGE), "exec"), namespace)


def test_every_library_has_its_block() -> None:
    assert list(BLOCKS) == ["timm", "lightning", "accelerate", "peft", "diffusers", "ultralytics"]


def test_a_language_model_for_each_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zoo.torchvision()
    for name in ("transformers", "compressed_tensors", "gguf"):
        pytest.importorskip(name)
    monkeypatch.chdir(tmp_path)
    page = GUIDES / "language-models.md"
    namespace: dict[str, Any] = {"__name__": "page"}
    for block in blocks_of(page):
        exec(compile(block, str(page), "exec"), namespace)
    assert (tmp_path / "model.gguf").stat().st_size > 0
