"""python -m benchmarks NAME: run a benchmark, print its table, write results/NAME.json."""

import argparse

from benchmarks import (
    blocks,
    bytes,
    capture,
    compile,
    cost,
    demo,
    equal,
    formats,
    graphs,
    inference,
    memory,
    pictures,
    readme,
    step,
    zoo,
)

_BENCHMARKS = {
    "blocks": blocks.main,
    "bytes": bytes.main,
    "capture": capture.main,
    "compile": compile.main,
    "cost": cost.main,
    "demo": demo.main,
    "formats": formats.main,
    "graphs": graphs.main,
    "memory": memory.main,
    "peers": step.peers,
    "pictures": pictures.main,
    "readme": readme.main,
    "step": step.main,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="./dev bench", description="Run a benchmark.")
    parser.add_argument("name", choices=sorted([*_BENCHMARKS, "equal", "inference", "zoo"]))
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds (default 5)")
    parser.add_argument("--limit", type=float, help="seconds of a batch of the zoo (default: all of it at once)")
    parser.add_argument("--only", default="*", help="glob of library/name in the zoo, such as 'timm/test_*'")
    parser.add_argument("--nets", default="*", help="glob of the models of equal and inference, such as 'resnet*'")
    parser.add_argument("--batches", default="1,4,16", help="batches of inference (default 1,4,16)")
    arguments = parser.parse_args()
    if arguments.name == "zoo":
        zoo.main(arguments.limit, arguments.only)
    elif arguments.name == "inference":
        inference.main(arguments.rounds, arguments.nets, [int(batch) for batch in arguments.batches.split(",")])
    elif arguments.name == "equal":
        equal.main(arguments.nets)
    else:
        _BENCHMARKS[arguments.name](arguments.rounds)


if __name__ == "__main__":
    main()
