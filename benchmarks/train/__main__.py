"""python -m benchmarks.train RECIPE: one training, resumed where its folder has a checkpoint."""

import argparse
import sys
from pathlib import Path
from typing import Final

import torch

from benchmarks.train import loop, plot, recipes, run
from octav_fx import OctavError

WORK: Final = Path(__file__).parent.parent.parent / "build" / "train"


def main() -> int:
    """Train; an OctavError is printed without a traceback."""
    parser = argparse.ArgumentParser(
        prog="./dev train", description="Train one net of a recipe; run it again to go on."
    )
    parser.add_argument("recipe", choices=recipes.names())
    run.add_options(parser)
    parser.add_argument("--out", type=Path, help="folder of the run (default build/train/ and its name)")
    parser.add_argument("--parent", type=Path, help="folder of the float run that --start float begins with")
    parser.add_argument("--steps", type=int, help="another number of steps than the recipe's")
    parser.add_argument("--save-every", type=int, help="steps between checkpoints (default a tenth of them)")
    parser.add_argument(
        "--measured", type=int, default=0, help="how often quantization errors are measured (default 0)"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.net is None:
        options.net = recipes.nets(options.recipe)[0]
    chosen = run.from_options(options)
    folder = options.out or WORK / chosen.name
    parent = options.parent or (WORK / chosen.parent.name if chosen.parent else None)
    try:
        found = loop.train(
            chosen,
            folder,
            parent,
            steps=options.steps,
            save_every=options.save_every,
            measured=options.measured,
            device=options.device,
        )
    except OctavError as error:
        print(f"octav_fx: {error}", file=sys.stderr)
        return 1
    plot.curve(folder / loop.CURVE, folder / "curve.png", chosen.name, found["score"])
    print(f"{chosen.name}: {found['final']:.3f} {found['score']}, {found['seconds']:.0f} s; {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
