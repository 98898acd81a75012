"""Glyphs: the 62 letters and digits of matplotlib's bundled fonts, under random affine distortion and noise."""

import functools
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import matplotlib
import torch
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

from benchmarks.study.data import TEST, Batch, generator

CHARACTERS: Final = string.digits + string.ascii_uppercase + string.ascii_lowercase
PIXELS: Final = 32
# Glyphs are kept at this size, and each use of one is a distorted view of it.
_CANVAS: Final = 64
_BASELINE: Final = 47
# Of so many fonts one is for testing, and of as many of the others one for validation.
_EVERY: Final = 4
_TEST_BATCH: Final = 310


def fonts(judged: str = TEST) -> tuple[list[Path], list[Path]]:
    """Return the fonts for training and those to judge by, by name; each has a glyph for every character."""
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    usable = [path for path in sorted(folder.glob("*.ttf")) if _has_all(path)]
    train, test = _apart(usable)
    return (train, test) if judged == TEST else _apart(train)


@functools.cache
def rendered(paths: tuple[Path, ...]) -> Tensor:
    """Return glyphs [fonts, 62, 64, 64] from 0 to 1, those of a font of one size, on one baseline: o is less than O."""
    return torch.stack([torch.stack([_render(path, character) for character in CHARACTERS]) for path in paths])


class Glyphs:
    """Images [N, 1, 32, 32] with about mean 0 and variance 1, labels [N] into CHARACTERS."""

    def __init__(self, seed: int, batch: int, views: int, judged: str = TEST) -> None:
        """views: how many images to judge by are made of each glyph of each font."""
        train, test = fonts(judged)
        self.seed, self.size = seed, batch
        self.glyphs, test_glyphs = rendered(tuple(train)), rendered(tuple(test))
        labels = torch.arange(len(CHARACTERS)).repeat(len(test) * views)
        self.test_labels = labels
        self.test_images = distorted(test_glyphs.repeat(views, 1, 1, 1).flatten(0, 1), generator(0))

    def batch(self, step: int) -> Batch:
        """Draw characters and fonts evenly."""
        random = generator(1, self.seed, step)
        font = torch.randint(len(self.glyphs), (self.size,), generator=random)
        label = torch.randint(len(CHARACTERS), (self.size,), generator=random)
        return distorted(self.glyphs[font, label], random), label

    def test(self) -> Iterator[Batch]:
        """Return every glyph of every test font, in several views."""
        yield from zip(self.test_images.split(_TEST_BATCH), self.test_labels.split(_TEST_BATCH), strict=True)


def distorted(glyphs: Tensor, random: torch.Generator) -> Tensor:
    """Return views [N, 1, 32, 32] of glyphs [N, 64, 64]: turned, scaled, sheared and moved, with contrast and noise."""
    count = len(glyphs)

    def uniform(low: float, high: float) -> Tensor:
        return torch.empty(count).uniform_(low, high, generator=random)

    angle, shear = uniform(-0.25, 0.25), uniform(-0.25, 0.25)
    scale = uniform(0.75, 0.95)
    cos, sin = angle.cos() * scale, angle.sin() * scale
    rows = [cos, cos * shear - sin, uniform(-0.1, 0.1), sin, sin * shear + cos, uniform(-0.1, 0.1)]
    grid = F.affine_grid(torch.stack(rows, 1).view(count, 2, 3), [count, 1, PIXELS, PIXELS], align_corners=False)
    views = F.grid_sample(glyphs.unsqueeze(1), grid, align_corners=False)
    contrast = uniform(0.6, 1.0).view(-1, 1, 1, 1)
    noise = torch.randn(views.shape, generator=random)
    return (contrast * views + 0.1 * noise - 0.08) / 0.25


def _apart(paths: list[Path]) -> tuple[list[Path], list[Path]]:
    """Return all but every fourth, and every fourth."""
    fourth = paths[_EVERY // 2 :: _EVERY]
    return [path for path in paths if path not in fourth], fourth


def _has_all(path: Path) -> bool:
    """Return whether a font has a glyph of its own for each character, and is made for text."""
    # Of the fonts for mathematics, some put symbols where letters would be and name them so.
    if path.name.startswith(("cmsy", "cmex", "cmmi", "LastResort")):
        return False
    glyph_of = FT2Font(str(path)).get_charmap()
    return len({glyph_of.get(ord(character), 0) for character in CHARACTERS} - {0}) == len(CHARACTERS)


def _render(path: Path, character: str) -> Tensor:
    image = Image.new("L", (_CANVAS, _CANVAS))
    font = ImageFont.truetype(str(path), size=44)
    ImageDraw.Draw(image).text((_CANVAS // 2, _BASELINE), character, fill=255, font=font, anchor="ms")
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(_CANVAS, _CANVAS) / 255
