"""report: the file, and what a browser makes of it."""

import json
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from octav_fx import Config, OctavError, quantize, report, zoo
from tests.support.browser import Browser, browser
from tests.support.nets import Tiny, tiny_input


def test_without_plotly_it_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(OctavError, match=r"pip install 'octav_fx\[report\]'"):
        report(quantize(Tiny(), tiny_input()), tmp_path / "report.html")
    assert not list(tmp_path.iterdir())


def written(folder: Path) -> Path:
    pytest.importorskip("plotly")
    q = quantize(Tiny(), tiny_input(), Config(weight_bits=2, edge_bits=None, overrides={"fc": None}))
    return report(q, folder / "report.html", title="A </script> & <b>title</b>")


def test_the_file_needs_no_network_and_holds_its_data(tmp_path):
    text = written(tmp_path).read_text()
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=\"http", text)
    data = json.loads(re.search(r'<script id="data"[^>]*>(.*?)</script>', text, re.DOTALL)[1])
    assert [row["node"] for row in data["after"]["rows"]] == ["conv", "conv", "fc", "fc"]
    assert data["before"] is None
    assert "<title>A &lt;/script&gt; &amp; &lt;b&gt;title&lt;/b&gt;: octav_fx report</title>" in text
    assert list(tmp_path.iterdir()) == [tmp_path / "report.html"]


@pytest.mark.models
@pytest.mark.parametrize("name", ["resnet50", "vit_b_16"])
def test_large_models_are_quick_and_small_and_render(name, tmp_path):
    pytest.importorskip("plotly")
    q = quantize(zoo.load(name).eval(), torch.randn(1, 3, 224, 224))
    start = time.process_time()
    path = report(q, tmp_path / "report.html")
    # CPU time: the machine may be busy with other things.
    assert time.process_time() - start < 20
    assert path.stat().st_size < 8e6
    with browser() as found:
        found.open(path)
        assert found.run("return document.body.dataset.ready") == "yes"
        assert found.messages() == []


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A small ResNet before and after its weights have moved, in a browser."""
    pytest.importorskip("plotly")
    x = torch.randn(1, 3, 32, 32)
    q = quantize(zoo.load("resnet18").eval(), x, Config(overrides={"layer1.0.conv1": None}))
    before = quantize(zoo.load("resnet18").eval(), x)
    path = report(q, tmp_path_factory.mktemp("report") / "report.html", before=before)
    with browser() as found:
        found.open(path)
        yield found


def column(opened: Browser, name: str) -> list[str]:
    return opened.run(
        """const heads = [...document.querySelectorAll("#table th")].map(cell => cell.textContent);
        const at = heads.indexOf(arguments[0]);
        return [...document.querySelectorAll("#table tbody tr")].map(line => line.children[at].textContent);""",
        name,
    )


def click_heading(opened: Browser, name: str) -> None:
    opened.run('[...document.querySelectorAll("#table th")].find(c => c.textContent === arguments[0]).click()', name)


@pytest.mark.models
def test_it_renders_without_a_word_on_the_console(opened):
    assert opened.run("return document.body.dataset.ready") == "yes"
    assert opened.messages() == []
    for plot in ("profile", "histogram", "predicted", "heat", "drawing", "costs"):
        assert opened.run("return document.querySelector(`#${arguments[0]} svg.main-svg`).clientHeight", plot) > 100, (
            plot
        )
    assert len(column(opened, "node")) == 42
    assert "override 'layer1.0.conv1': None" in opened.run("return document.getElementById('skipped').textContent")
    # 41 layers, and what lies between them: every node has its mark.
    assert opened.run("return document.querySelectorAll('#drawing path.point').length") > 60


@pytest.mark.models
def test_it_sorts_both_ways_with_what_is_missing_last(opened):
    for _ in range(2):
        click_heading(opened, "SQNR dB")
        values = column(opened, "SQNR dB")
        assert values[-2:] == ["", ""]
        numbers = [float(value) for value in values[:-2]]
        ascending = opened.run("return document.querySelector('#table th[data-order]').dataset.order") == "1"
        assert numbers == sorted(numbers, reverse=not ascending)
    click_heading(opened, "node")
    assert column(opened, "node") == sorted(column(opened, "node"))
    assert opened.messages() == []


@pytest.mark.models
def test_it_filters(opened):
    opened.run(
        """const field = document.getElementById("filter");
        field.value = "layer2 weight"; field.dispatchEvent(new Event("input"));"""
    )
    shown = opened.run("return document.getElementById('count').textContent")
    visible = opened.run("return [...document.querySelectorAll('#table tbody tr')].filter(line => !line.hidden).length")
    assert (shown, visible) == ("5 of 42 operands", 5)
    opened.run("const f = document.getElementById('filter'); f.value = ''; f.dispatchEvent(new Event('input'));")


@pytest.mark.models
def test_a_line_shows_its_histogram_beside_the_earlier_one(opened):
    opened.run("""document.querySelector('#table tr[data-row="7"]').click()""")
    row = json.loads(opened.run("return document.getElementById('data').textContent"))["after"]["rows"][7]
    assert opened.run("return document.getElementById('chosen').textContent").startswith(
        f"{row['node']} {row['operand']}"
    )
    names = opened.run("return document.getElementById('histogram').data.map(trace => trace.name)")
    assert names == ["after", "before"]
    # 16 levels, the clip and its opposite.
    assert opened.run("return document.getElementById('histogram').layout.shapes.length") == 18
    opened.run("document.getElementById('log').click()")
    assert opened.run("return document.getElementById('histogram').layout.yaxis.type") == "log"
    assert opened.messages() == []


@pytest.mark.models
def test_the_wheel_zooms_the_graph(opened):
    extent = "const [a, b] = document.getElementById('drawing').layout.xaxis.range; return b - a;"
    before = opened.run(extent)
    x, y = opened.run(
        """const place = document.getElementById("drawing"); place.scrollIntoView({ block: "center" });
        const box = place.querySelector(".nsewdrag").getBoundingClientRect();
        return [Math.round(box.x + box.width / 2), Math.round(box.y + box.height / 2)];"""
    )
    opened.scroll(x, y, -400)
    end = time.monotonic() + 10
    while opened.run(extent) >= before and time.monotonic() < end:
        time.sleep(0.1)
    assert opened.run(extent) < before
    assert opened.messages() == []


@pytest.mark.models
def test_a_transformer_and_a_model_in_parts_render(opened, tmp_path):
    class InParts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x):
            y = self.body(x)
            return self.head(y) if y.sum() < 1e9 else y

    layer = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True)
    encoder = quantize(nn.TransformerEncoder(layer, 12, enable_nested_tensor=False).eval(), torch.randn(1, 8, 32))
    for name, q, count in (("encoder", encoder, None), ("parts", quantize(InParts(), torch.randn(2, 8)), 4)):
        opened.open(report(q, tmp_path / f"{name}.html"))
        assert opened.run("return document.body.dataset.ready") == "yes" and opened.messages() == []
        lines = opened.run("return document.querySelectorAll('#table tbody tr').length")
        assert lines == count if count else lines >= 12 * 4 * 2
