"""Run: one training, as plain data. Its name is the same wherever it is run."""

import argparse
import dataclasses
from dataclasses import dataclass
from typing import Any, Final

from benchmarks.study.data import TEST
from octav_fx import Config

FLOAT: Final = "float"


@dataclass(frozen=True)
class Run:
    """What is trained and how it is quantized; the recipe holds all that methods have in common."""

    recipe: str
    net: str
    # "float", or what Config.clip can be.
    clip: str = FLOAT
    bits: int = 4
    # 0: as many for activations.
    activation_bits: int = 0
    seed: int = 0
    # What clips belong to, as in Config.
    weight_granularity: str = "channel"
    activation_granularity: str = "tensor"
    # Bits of the first convolution and the last linear layer; 0: no exception for them.
    edge_bits: int = 8
    # Bits of the inputs of sums and of the global pool; 0: they stay float.
    residual_bits: int = 0
    weight_gradient: str = "mad"
    activation_gradient: str = "pwl"
    attention: str = "operands"
    # "dynamic", or "static": calibrated on five batches and frozen before the first step.
    clips: str = "dynamic"
    # "scratch", or "float": from the trained float net of the same seed, with the recipe's short schedule.
    start: str = "scratch"
    size: str = "small"
    # A row of benchmarks/study/experiments.py: what is done to the clips.
    experiment: str = ""
    # "test", or "validation": benchmarks/study/data.py.
    judged: str = TEST

    @property
    def name(self) -> str:
        """What differs from the defaults, as a file name: glyphs-resnet-octav-4bits-seed0, ..."""
        parts = [self.recipe, self.net, self.clip]
        if self.clip != FLOAT:
            parts.append(f"{self.bits}bits")
        fields = ("start", "judged") if self.clip == FLOAT else _NAMED
        parts += [f"{field}={getattr(self, field)}" for field in fields if getattr(self, field) != _DEFAULTS[field]]
        if self.size != _DEFAULTS["size"]:
            parts.append(self.size)
        return "-".join([*parts, f"seed{self.seed}"])

    @property
    def column(self) -> tuple[str, ...]:
        """What tables have a column for: recipe and net, and what clips belong to where it is not the usual."""
        granularities = (self.weight_granularity, self.activation_granularity)
        is_usual = granularities == (_DEFAULTS["weight_granularity"], _DEFAULTS["activation_granularity"])
        return (self.recipe, self.net, *(() if is_usual else granularities))

    @property
    def parent(self) -> "Run | None":
        """The float run whose net this one starts from."""
        if self.start == "scratch":
            return None
        return Run(self.recipe, self.net, seed=self.seed, size=self.size, judged=self.judged)

    def config(self) -> Config:
        """Return how it is quantized."""
        return Config(
            weight_bits=self.bits,
            activation_bits=self.activation_bits or self.bits,
            weight_granularity=self.weight_granularity,
            activation_granularity=self.activation_granularity,
            edge_bits=self.edge_bits or None,
            residual_bits=self.residual_bits or None,
            clip=self.clip,
            weight_gradient=self.weight_gradient,
            activation_gradient=self.activation_gradient,
            attention=self.attention,
        )

    def arguments(self) -> list[str]:
        """Return the command line that from_options reads back."""
        fields = dataclasses.asdict(self)
        flags = [[f"--{name.replace('_', '-')}", str(value)] for name, value in fields.items() if name != "recipe"]
        return [self.recipe, *(word for flag in flags for word in flag)]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add an option for each field of Run but the recipe."""
    for field in dataclasses.fields(Run):
        if field.name != "recipe":
            default = None if field.name == "net" else field.default
            shown = "" if default is None else f"default {default}"
            kind = field.type if isinstance(field.type, type) else str
            parser.add_argument(f"--{field.name.replace('_', '-')}", type=kind, default=default, help=shown)


def from_options(options: argparse.Namespace) -> Run:
    """Return the Run that options of add_options describe."""
    values: dict[str, Any] = {field.name: getattr(options, field.name) for field in dataclasses.fields(Run)}
    return Run(**values)


_DEFAULTS: Final = {field.name: field.default for field in dataclasses.fields(Run)}
# Those that the name of a quantized run says where they are not the default, in this order.
_NAMED: Final = (
    *(
        "activation_bits",
        "weight_granularity",
        "activation_granularity",
        "edge_bits",
        "residual_bits",
        "weight_gradient",
    ),
    *("activation_gradient", "attention", "clips", "start", "experiment", "judged"),
)
