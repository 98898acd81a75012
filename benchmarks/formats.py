"""What each number format costs and gives: error, bits with scales counted, time, on four kinds of data.

And how near the search comes to brute force: the error of the clip it finds over the least of 400 steps up to twice the
one that clips nothing.
"""

import math
from collections.abc import Callable
from typing import Any, Final

import torch
from tabulate import tabulate
from torch import Tensor
from torch.nn import functional as F

from benchmarks import result
from benchmarks.least import least_time
from octav_fx.formats.format import Format
from octav_fx.formats.registry import CODEBOOKS, format_of
from octav_fx.formats.spec import spec_of

ROWS, COLUMNS = 512, 512
SPECS: Final = (
    *("int8/channel.0", "int4/channel.0", "int3/channel.0", "int2/channel.0"),
    *("int8/token.1", "int4/group-128.1", "int4/group-32.1", "int4/group-32.1/float16", "int3/group-32.1"),
    *(
        "ternary/channel.0",
        "zero-free/channel.0",
        "pow2/channel.0",
        "apot/channel.0",
        "nf4/group-64.1/float16",
        "nupes/channel.0",
        "kmeans4/tensor",
    ),
    *("e4m3/channel.0", "e5m2/channel.0", "e4m3/group-32.1/e8m0", "e2m1/group-32.1/e8m0", "e2m1/group-16.1/e4m3"),
)
METHODS: Final = ("octav", "max")
# A tail of four degrees of freedom is that of trained weights with outliers.
DATA: Final = {
    "gaussian": lambda: torch.randn(ROWS, COLUMNS),
    "laplace": lambda: torch.distributions.Laplace(0.0, 1.0).sample((ROWS, COLUMNS)),
    "student t": lambda: torch.distributions.StudentT(4.0).sample((ROWS, COLUMNS)),
    "gelu": lambda: F.gelu(torch.randn(ROWS, COLUMNS)),
}
# Rows as groups and tokens have them: of each length so many elements of each kind.
SEARCHED: Final = (*(f"{sign}int{bits}" for bits in range(2, 9) for sign in ("", "u")), *CODEBOOKS)
LENGTHS: Final = (16, 32, 64, 128, 256, 1024)
ELEMENTS: Final = 25600
TRIES: Final = 400
ROWS_OF: Final[dict[str, Callable[[int, int], Tensor]]] = {
    "gaussian": torch.randn,
    "laplace": lambda r, n: torch.distributions.Laplace(0.0, 1.0).sample((r, n)),
    "student t": lambda r, n: torch.distributions.StudentT(4.0).sample((r, n)),
    "half-rectified": lambda r, n: torch.randn(r, n).relu(),
    "gelu": lambda r, n: F.gelu(torch.randn(r, n)),
    "softmax": lambda r, n: (2 * torch.randn(r, n)).softmax(-1),
}
NON_NEGATIVE: Final = ("half-rectified", "softmax")


def main(rounds: int) -> None:
    """Measure, print, and write results/formats.json."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    data = {name: make() for name, make in DATA.items()}
    # Levels found in the tensor are the best ones, whatever the method.
    methods = {spec: METHODS[:1] if spec.startswith("kmeans") else METHODS for spec in SPECS}
    rows = [_row(spec, method, data, rounds) for spec in SPECS for method in methods[spec]]
    setting = {"threads": 1, "rounds": rounds, "shape": [ROWS, COLUMNS], "seed": 0}
    searched = [_searched(name, rounds) for name in SEARCHED]
    result.write(result.of_cpu("formats"), {"setting": setting, "rows": rows, "searched": searched})
    print(tabulate(rows, headers="keys"), tabulate(searched, headers="keys"), sep="\n\n")


def _row(spec: str, method: str, data: dict[str, Tensor], rounds: int) -> dict[str, Any]:
    """SQNR in dB on each kind of data, and nanoseconds an element of solving and rounding, on the first."""
    bits = spec_of(spec).bits_per_element((ROWS, COLUMNS))
    found: dict[str, Any] = {"spec": spec, "clip": method, "bits": round(bits, 3)}
    for name, x in data.items():
        noise = (x - _quantized(x, spec, method)).double().square().sum()
        found[name] = round(10 * math.log10(x.double().square().sum() / noise), 2)
    x = next(iter(data.values()))
    return found | {"ns": _ns(lambda: _quantized(x, spec, method), x, rounds)}


def _quantized(x: Tensor, spec: str, method: str) -> Tensor:
    represented = spec_of(spec)
    hint = torch.zeros(() if represented.granularity.is_short else represented.clip_shape(x.shape))
    return torch.ops.octav.dynamic_fake_quantize(x, hint, spec, method, "ste")[0]


def _searched(name: str, rounds: int) -> dict[str, Any]:
    """Error over that of brute force by length of row, the mean over kinds of data and the most; ns of groups of 32."""
    form, found = format_of(name), {"format": name}
    for n in LENGTHS:
        kinds = ROWS_OF if form.signed else NON_NEGATIVE
        ratios = [_over_brute_force(ROWS_OF[kind](ELEMENTS // n, n), form) for kind in kinds]
        found[str(n)] = f"{sum(ratios) / len(ratios):.3f} ({max(ratios):.3f})"
    x = torch.randn(ROWS, COLUMNS)
    solve = torch.ops.octav.optimal_clip
    return found | {"ns": _ns(lambda: solve(x, torch.zeros(()), f"{name}/group-32.1", "octav"), x, rounds)}


def _ns(run: Callable[[], object], x: Tensor, rounds: int) -> float:
    """Return the least nanoseconds of a call for each element of x."""
    return round(least_time(run, rounds) / x.numel() * 1e9, 1)


def _over_brute_force(x: Tensor, form: Format) -> float:
    clips = torch.ops.octav.optimal_clip(x, torch.zeros(()), f"{form.name}/token.1", "octav")
    below = x.amin(-1, keepdim=True).clamp(max=0) / form.least if form.signed else torch.zeros(())
    whole = torch.maximum(x.amax(-1, keepdim=True).clamp(min=0) / form.greatest, below).double()
    least = torch.stack([_error(x, whole * (2 * i / TRIES), form) for i in range(1, TRIES + 1)]).amin(0)
    return float(_error(x, form.step(clips).double(), form).sum() / least.sum())


def _error(x: Tensor, step: Tensor, form: Format) -> Tensor:
    """The squared error of rows [R, N] with steps [R, 1] -> [R], float64."""
    ratio = (x / step).nan_to_num()
    return ((form.round(ratio) * step) - x).square().sum(-1)
