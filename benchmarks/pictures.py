"""The pictures of the README: costs beside others, from the committed results; and a report in a browser."""

import tempfile
from pathlib import Path
from typing import Any, Final

import torch

import octav_fx
from benchmarks import result
from octav_fx import zoo
from tests.support.browser import browser

IMAGES: Final = Path(__file__).parent.parent / "docs" / "images"

_MODELS: Final = ("resnet18", "mobilenet_v2", "encoder")
_OURS, _FLOAT, _OTHERS = "#d1495b", "#9aa7b5", "#cfd6de"
# Title, result, the field of a row that is shown, and variant -> (label, colour).
_PANELS: Final = (
    (
        "training step: time, float = 1",
        *("peers", "ratio"),
        {
            "octav compiled": ("octav_fx", _OURS),
            "torchao quantize_ QAT": ("torchao quantize_", _OTHERS),
            "torchao PT2E QAT": ("torchao PT2E", _OTHERS),
            "torch.ao FX QAT": ("torch.ao FX", _OTHERS),
            "Brevitas": ("Brevitas", _OTHERS),
        },
    ),
    (
        "held for backward: bytes, float = 1",
        *("memory", "ratio"),
        {
            "octav compiled": ("octav_fx", _OURS),
            "float Inductor": ("float, Inductor", _FLOAT),
            "float eager": ("float, eager", _FLOAT),
        },
    ),
    (
        "inference, onnxruntime: times as fast as float",
        *("inference", "ratio"),
        {
            "octav_fx W4A8 onnxruntime": ("octav_fx W4A8", _OURS),
            "octav_fx W8A8 onnxruntime": ("octav_fx W8A8", _OURS),
            "onnxruntime's quantize_static": ("quantize_static", _OTHERS),
            "float onnxruntime": ("float", _FLOAT),
        },
    ),
)


def main(rounds: int) -> None:
    """Write docs/images/measured.png and docs/images/report.png."""
    IMAGES.mkdir(parents=True, exist_ok=True)
    _measured(IMAGES / "measured.png")
    _report(IMAGES / "report.png")


def _report(path: Path) -> None:
    torch.manual_seed(0)
    q = octav_fx.quantize(zoo.load("resnet18").eval(), torch.randn(1, 3, 64, 64))
    with tempfile.TemporaryDirectory() as folder, browser() as opened:
        opened.open(octav_fx.report(q, Path(folder) / "report.html", title="resnet18, 4 bits"))
        opened.run("document.getElementById('operands').scrollIntoView();")
        opened.screenshot(path)


def _measured(path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(13, 3.4), layout="constrained")
    for axis, (title, name, field, variants) in zip(axes, _PANELS, strict=True):
        _bars(axis, title, values_of(name, field), variants)
    where = [result.read(name)["environment"] for _, name, _, _ in _PANELS]
    note = f"{where[0]['cpu']}, one thread, torch {where[0]['torch']}; each bar a model: {', '.join(_MODELS)}"
    figure.supxlabel(note, fontsize=8, color="#4a5868")
    # Without the date and version that a file would otherwise hold, the same figures are the same bytes.
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def values_of(name: str, field: str) -> dict[tuple[str, str], float | None]:
    """Return a field of a committed result by variant and model; of a batch of 4, where there are several."""
    rows = [row for row in result.read(name)["rows"] if row.get("batch", 4) == 4]
    return {(row["variant"], row["model"]): row[field] for row in rows}


def _bars(
    axis: Any, title: str, found: dict[tuple[str, str], float | None], variants: dict[str, tuple[str, str]]
) -> None:
    for i, (variant, (_, color)) in enumerate(reversed(variants.items())):
        for j, model in enumerate(_MODELS):
            value = found[variant, model]
            if value is not None:
                place = i + 0.26 * (1 - j)
                axis.barh(place, value, 0.24, color=color)
                axis.text(value, place, f" {value:.2f}", va="center", fontsize=7)
    axis.set_yticks(range(len(variants)), [label for label, _ in reversed(variants.values())], fontsize=9)
    axis.axvline(1, color="#46525f", linewidth=0.8)
    axis.set_title(title, fontsize=10)
    axis.margins(x=0.12)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


if __name__ == "__main__":
    main(1)
