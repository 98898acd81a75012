"""The demo's accuracies and step times, kept."""

import dataclasses

from benchmarks import result
from octav_fx import demo


def main(rounds: int) -> None:
    """Run the demo as users do and write results/demo.json."""
    result.write("demo", dataclasses.asdict(demo.main()))
