"""report(): one HTML file that needs no network."""

import html
import importlib
import json
import os
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

from torch import nn

from octav_fx.deploy.files import replacing
from octav_fx.errors import OctavError
from octav_fx.reporting.report.collect import collected
from octav_fx.version import __version__


def report(
    q: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Any = None,
    *,
    before: nn.Module | None = None,
    title: str | None = None,
) -> Path:
    """Write what became of each operand as one HTML file, with plots that can be zoomed; return its path.

    It shows the table, sortable; of each operand a histogram with clip and levels; SQNR, clipped share and bits along
    the net; bytes and multiply-accumulates; what stays float and why; the graph, coloured by error; and the SQNR that
    other bits would have, predicted on a sample of each operand with the best clip for them.

    example_inputs: as for rows(), by default those given to quantize(). before: another quantized model with the same
    names, such as a copy from before training, shown beside. title: None for the name of the model's class. The file is
    written whole or not at all. Raises OctavError where plotly is not installed, and for a path that cannot be written.
    """
    script = _plotly()
    after = collected(q, example_inputs)
    earlier = None if before is None else collected(before, example_inputs)
    values = {"after": after, "before": earlier, "version": __version__}
    heading = title or after["model"]
    folder = files("octav_fx.reporting.report")
    # What is between script tags ends at the first closing tag, wherever it stands.
    data = json.dumps(values, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    parts = {
        "title": html.escape(heading),
        "style": (folder / "page.css").read_text(),
        "page": (folder / "page.js").read_text(),
        "plotly": script,
        "data": data,
    }
    text = re.sub(r"\{\{(\w+)\}\}", lambda place: parts[place[1]], (folder / "page.html").read_text())
    with replacing(Path(path)) as draft:
        draft.write_text(text)
    return Path(path)


def _plotly() -> str:
    try:
        source: str = importlib.import_module("plotly.offline").get_plotlyjs()
    except ModuleNotFoundError as error:
        raise OctavError("a report needs plotly: pip install 'octav_fx[report]'") from error
    return source
