"""Images with boxes, on disk as detectors read them."""

from pathlib import Path

import numpy as np
import yaml
from PIL import Image


def squares(folder: Path) -> Path:
    """Write images of 64 x 64 with a red or a green square each, and return the file that describes them."""
    random = np.random.default_rng(0)
    for part in ("train", "val"):
        for kind in ("images", "labels"):
            (folder / kind / part).mkdir(parents=True)
        for i in range(4):
            pixels = random.integers(0, 60, (64, 64, 3), dtype=np.uint8)
            x, y = random.integers(8, 40, 2)
            pixels[y : y + 16, x : x + 16] = (255, 40, 40) if i % 2 else (40, 255, 40)
            Image.fromarray(pixels).save(folder / "images" / part / f"{i}.png")
            box = f"{i % 2} {(x + 8) / 64} {(y + 8) / 64} 0.25 0.25\n"
            (folder / "labels" / part / f"{i}.txt").write_text(box)
    described = {"path": str(folder), "train": "images/train", "val": "images/val", "names": {0: "red", 1: "green"}}
    (folder / "data.yaml").write_text(yaml.dump(described))
    return folder / "data.yaml"
