"""The tables of the study, as rows of runs."""

from dataclasses import dataclass, replace
from typing import Final

from benchmarks.study.data import VALIDATION
from benchmarks.study.run import FLOAT, Run

NETS: Final = (("glyphs", "resnet"), ("glyphs", "mobilenet"), ("text", "transformer"))
# Clips that are found anew for each tensor, and those that are learned.
FOUND: Final = ("octav", "octav-grid", "max", "percentile", "mse")
LEARNED: Final = ("pact", "lsq")
METHODS: Final = (*FOUND, *LEARNED)
# Made after the others had been seen, for the text net: beside them in the tables of three seeds, and in no other.
LATER: Final = ("octav-tight",)
EVERY: Final = (*METHODS, *LATER)
# Name -> gradients of weights and activations (arXiv 2206.06501, section 4.2).
GRADIENTS: Final = {"STE": ("ste", "ste"), "PWL": ("pwl", "pwl"), "MAD": ("mad", "mad"), "MPH": ("mad", "pwl")}

Labelled = tuple[tuple[str, Run], ...]


@dataclass(frozen=True)
class Table:
    """A row for each label, a column for each net; runs of one label and net differ in their seed."""

    title: str
    runs: Labelled
    # Whether quantization errors are measured during the runs of seed 0.
    measured: bool = False
    # The label from which the others are told apart, seed by seed; "": only scores are shown.
    against: str = ""

    def sized(self, size: str) -> Labelled:
        """Return the runs in another size than small; those of a table with a size of its own as they are."""
        return tuple((label, replace(run, size=size) if run.size == "small" else run) for label, run in self.runs)


def _on(nets: tuple[tuple[str, str], ...], *labelled: tuple[str, Run]) -> Labelled:
    """Return each labelled run on each net."""
    return tuple((label, replace(run, recipe=recipe, net=net)) for label, run in labelled for recipe, net in nets)


def _run(clip: str, **fields: object) -> Run:
    return Run("", "", clip, **fields)  # type: ignore[arg-type]


# No gradient is cut.
_STE: Final = {"weight_gradient": "ste", "activation_gradient": "ste"}


def _tiny(seeds: int, *labelled: tuple[str, Run]) -> Labelled:
    """Return each labelled run on the tiny text net."""
    return tuple(
        (label, replace(run, recipe="text", net="transformer", size="tiny", judged=VALIDATION, seed=seed))
        for label, run in labelled
        for seed in range(seeds)
    )


def _glyphs(bits: int, weights: str, activations: str) -> Table:
    """Return the table of clips of one granularity on the glyphs' ResNet, whose channels are multiples of 16."""
    labelled = _on(
        NETS[:1],
        *((clip, _run(clip, bits=bits)) for clip in ("max", "octav", "octav-tight")),
        ("octav-tight for activations, max for weights", _run("max", bits=bits, experiment="tight-activations")),
    )
    shared = {"weight_granularity": weights, "activation_granularity": activations, "judged": VALIDATION}
    of_weights = "channels" if weights == "channel" else f"groups of {weights.removeprefix('group-')}"
    of_activations = {"tensor": "whole activations", "token": "tokens"}[activations]
    return Table(
        f"glyphs, resnet, {bits} bits, {of_weights} of weights and {of_activations}, judged by validation fonts",
        tuple((label, replace(run, seed=seed, **shared)) for seed in range(3) for label, run in labelled),  # type: ignore[arg-type]
        against="max",
    )


def _short(labelled: Labelled) -> Labelled:
    """Return labelled runs with a clip for each group of 32 weights and for each token."""
    return tuple(
        (label, replace(run, weight_granularity="group-32", activation_granularity="token")) for label, run in labelled
    )


def _residuals(net: str, bits: int) -> Labelled:
    """Return a net of glyphs in float, and quantized without and with residual_bits, three seeds of each."""
    found = []
    for seed in range(3):
        found.append((FLOAT, _run(FLOAT, seed=seed)))
        for residual in (0, 8):
            label = f"residual_bits={residual or None}"
            found.append((label, _run("octav", bits=bits, residual_bits=residual, seed=seed)))
    return _on((("glyphs", net),), *found)


TABLES: Final[dict[str, Table]] = {
    "main": Table(
        "4 bits, three seeds",
        _on(NETS, *((clip, _run(clip, seed=seed)) for seed in range(3) for clip in (FLOAT, *EVERY))),
        measured=True,
    ),
    "gradients": Table(
        "gradients, octav, one seed",
        _on(
            NETS,
            *(
                (f"{name}, {bits} bits", _run("octav", bits=bits, weight_gradient=of_w, activation_gradient=of_a))
                for bits in (4, 3)
                for name, (of_w, of_a) in GRADIENTS.items()
            ),
        ),
    ),
    "retrain": Table(
        "4 bits, from the float net with the short schedule, three seeds",
        _on(
            NETS,
            *((FLOAT, _run(FLOAT, seed=seed)) for seed in range(3)),
            *(
                ("float, trained on" if clip == FLOAT else clip, _run(clip, start="float", seed=seed))
                for seed in range(3)
                for clip in (FLOAT, *EVERY)
            ),
        ),
    ),
    "static": Table(
        "4 bits, from the float net, clips found anew or calibrated and frozen, one seed",
        _on(
            NETS,
            (FLOAT, _run(FLOAT)),
            *(
                (f"{clip}, {clips}", _run(clip, start="float", clips=clips))
                for clip in FOUND
                for clips in ("dynamic", "static")
            ),
        ),
    ),
    "edges": Table(
        "4 bits, first convolution and last linear layer, one seed",
        _on(
            NETS,
            *(
                (f"{clip}, edges at {edge_bits or 4} bits", _run(clip, edge_bits=edge_bits))
                for clip in ("octav", "octav-grid")
                for edge_bits in (8, 0)
            ),
        ),
    ),
    "attention": Table(
        "4 bits, softmax output in float (operands) or quantized (full), one seed",
        _on(
            NETS[2:],
            *(
                (f"{clip}, {attention}", _run(clip, attention=attention))
                for clip in ("octav", "octav-grid", "max", "mse")
                for attention in ("operands", "full")
            ),
        ),
        measured=True,
    ),
    "bits": Table(
        "3 and 2 bits, one seed",
        _on(
            NETS,
            (FLOAT, _run(FLOAT)),
            *((f"{clip}, {bits} bits", _run(clip, bits=bits)) for bits in (3, 2) for clip in METHODS),
        ),
    ),
    "percentiles": Table(
        "4 bits, percentiles, one seed",
        _on(
            NETS,
            ("99.9", _run("percentile")),
            ("99.99", _run("percentile-99.99")),
            ("99.999", _run("percentile-99.999")),
        ),
    ),
    "residual": Table(
        "octav, 4 bits, inputs of sums and of the global pool in float or at 8 bits, three seeds",
        _on(
            NETS[:2],
            *(
                (f"residual_bits={bits or None}", _run("octav", residual_bits=bits, seed=seed))
                for seed in range(3)
                for bits in (0, 8)
            ),
        ),
    ),
    "gates": Table(
        "octav, 8 bits, SiLU and gates: what sums, the global pool and SiLU read in float or at 8 bits, three seeds",
        _residuals("efficientnet", bits=8),
    ),
    "branches": Table(
        "octav, 4 bits, branches: what branches share and the global pool in float or at 8 bits, three seeds",
        _residuals("inception", bits=4),
    ),
    # What is below is judged by validation files: explanations and choices, on a net small enough for many runs.
    "clips, groups and tokens": Table(
        "text, tiny, 4 bits, groups of 32 of weights and tokens of activations, judged by validation files",
        _short(_tiny(6, *((clip, _run(clip)) for clip in ("max", "octav", "octav-tight")))),
        against="max",
    ),
    "clips, channels and tensors": Table(
        "text, tiny, 4 bits, channels of weights and whole activations, judged by validation files",
        _tiny(
            3,
            ("octav", _run("octav")),
            ("max", _run("max")),
            ("octav-tight", _run("octav-tight")),
            ("octav-tight for weights, octav for activations", _run("octav", experiment="tight-weights")),
            ("octav for weights, octav-tight for activations", _run("octav", experiment="tight-activations")),
            (FLOAT, _run(FLOAT)),
        ),
        against="octav",
    ),
    "clips, 8-bit activations": Table(
        "text, 4 bits in groups of 32 for weights and 8 for tokens of activations, judged by test files",
        _short(
            _on(NETS[2:], *((c, _run(c, activation_bits=8, seed=s)) for s in range(3) for c in ("max", "octav-tight")))
        ),
        against="max",
    ),
    **{
        f"glyphs, {bits} bits, {weights}, {activations}": _glyphs(bits, weights, activations)
        for bits in (4, 3)
        for weights, activations in (("channel", "tensor"), ("group-16", "token"), ("group-16", "tensor"))
    },
    "experiments": Table(
        "experiments, at most three seeds: text, tiny, 4 bits, groups of 32 and tokens, judged by validation files",
        (
            *_tiny(3, (FLOAT, _run(FLOAT))),
            *_short(
                _tiny(
                    3,
                    ("max", _run("max")),
                    ("max, each clip 10 % less", _run("max", experiment="times-0.9")),
                    ("max, each clip 10 % more", _run("max", experiment="times-1.1")),
                    ("max, each clip up to 10 % more or less", _run("max", experiment="jittered")),
                    ("octav", _run("octav")),
                    ("octav, STE", _run("octav", **_STE)),
                    ("octav by its recursion, without the search", _run("octav", experiment="recursion")),
                    ("octav, clips of weights smoothed over steps", _run("octav", experiment="smoothed-weights")),
                    ("octav, errors of weights weighted by gradients", _run("octav", experiment="weighted-weights")),
                    ("octav for activations, max for weights", _run("octav", experiment="max-weights")),
                    ("octav for weights, max for activations", _run("octav", experiment="max-activations")),
                    ("octav-tight", _run("octav-tight")),
                    ("octav-tight, STE", _run("octav-tight", **_STE)),
                    ("octav-tight for weights, max for activations", _run("max", experiment="tight-weights")),
                    ("octav-tight for activations, max for weights", _run("max", experiment="tight-activations")),
                    ("octav-tight, clipped and not rounded", _run("octav-tight", experiment="clipped")),
                    ("octav-tight, rounded and not clipped", _run("octav-tight", experiment="rounded")),
                )
            ),
        ),
        against="max",
    ),
    # Seconds, not minutes: to try the study out.
    "digits": Table(
        "digits, 4 bits, one seed", _on((("digits", "resnet"),), (FLOAT, _run(FLOAT)), ("octav", _run("octav")))
    ),
}
# Of no table that asks for them by default.
DEFAULT: Final = tuple(name for name in TABLES if name != "digits")


def all_runs(names: tuple[str, ...], size: str = "small") -> list[Run]:
    """Return each run of some tables once, in the order of the tables; before it the run whose net it starts from.

    Of a size, those of a table with a size of its own as they are.
    """
    runs: dict[Run, None] = {}
    for name in names:
        for _, run in TABLES[name].sized(size):
            if run.parent is not None:
                runs[run.parent] = None
            runs[run] = None
    return list(runs)


def is_measured(run: Run) -> bool:
    """Return whether a table wants the quantization errors of a run."""
    wanted = {known for table in TABLES.values() if table.measured for _, known in table.runs}
    return run.seed == 0 and run.clip != FLOAT and replace(run, size="small") in wanted
