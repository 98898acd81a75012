"""python -m benchmarks NAME: run a benchmark, print its table, write results/NAME.json."""

import argparse

from benchmarks import compile, cost, demo, graphs, memory, readme, step

_BENCHMARKS = {
    "compile": compile.main,
    "cost": cost.main,
    "demo": demo.main,
    "graphs": graphs.main,
    "memory": memory.main,
    "peers": step.peers,
    "readme": readme.main,
    "step": step.main,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="./dev bench", description="Run a benchmark.")
    parser.add_argument("name", choices=_BENCHMARKS)
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds (default 5)")
    arguments = parser.parse_args()
    _BENCHMARKS[arguments.name](arguments.rounds)


if __name__ == "__main__":
    main()
