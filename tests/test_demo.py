"""The demo, made tiny: it trains, quantizes, trains again and prints what it says."""

import dataclasses
import sys

import pytest
import torch

from octav_fx import OctavError, demo


@pytest.fixture
def few_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    full = demo.digits

    def few(seed: int) -> demo.Data:
        data = full(seed)
        return demo.Data(data.train_images[:32], data.train_labels[:32], data.test_images[:24], data.test_labels[:24])

    monkeypatch.setattr(demo, "digits", few)
    monkeypatch.setattr(demo, "BATCH", 8)


@pytest.mark.models
def test_one_epoch_prints_the_table_and_returns_what_it_prints(few_digits, capsys):
    found = demo.main(epochs=1, seed=0)
    out = capsys.readouterr().out
    rows = [[*line.split()[:4], *line.split()[5:6]] for line in out.splitlines()]
    assert ["layer4.1.conv2", "conv2d", "weight", "512x512x3x3", "int4"] in rows
    assert "quantized: 100.00% of" in out
    assert f"{found.float_accuracy:.2%}" in out
    assert f"{found.quantized_accuracy:.2%}" in out
    assert 0 <= found.float_accuracy <= 1
    assert 0 <= found.quantized_accuracy <= 1
    assert found.float_ms > 0
    assert found.quantized_ms > 0


@pytest.mark.models
def test_it_writes_a_file_and_a_report(few_digits, capsys, tmp_path):
    pytest.importorskip("plotly")
    demo.main(epochs=1, seed=0, folder=tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["report.html", "resnet18.onnx"]
    said = capsys.readouterr().out
    runs = [words[:2] for line in said.splitlines() if (words := line.split())[1:2] in (["PyTorch"], ["onnxruntime"])]
    assert runs == [
        *(["float", "PyTorch"], ["quantized", "PyTorch"]),
        *(["float", "onnxruntime"], ["quantized", "onnxruntime"]),
    ]
    assert "report.html in a browser" in said


@pytest.mark.models
def test_the_seed_decides_everything_but_the_times(few_digits):
    first, again = (demo.main(epochs=1, seed=1) for _ in range(2))
    assert (first.float_accuracy, first.quantized_accuracy) == (again.float_accuracy, again.quantized_accuracy)


def test_digits_are_normalized_and_split_without_overlap():
    data = demo.digits(0)
    assert (len(data.train_images), len(data.test_images)) == (1348, 449)
    assert data.train_images.shape[1:] == (3, demo.PIXELS, demo.PIXELS)
    together = torch.cat([data.train_images, data.test_images])
    # Sums of millions of float32.
    assert abs(float(together.mean())) < 1e-4
    assert abs(float(together.std()) - 1) < 1e-4
    assert set(data.test_labels.tolist()) == set(range(10))
    again, other = demo.digits(0), demo.digits(1)
    assert torch.equal(again.train_labels, data.train_labels)
    assert not torch.equal(other.train_labels, data.train_labels)


def test_training_learns(few_digits):
    data = demo.digits(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * demo.PIXELS**2, 10))
    on_training_images = dataclasses.replace(data, test_images=data.train_images, test_labels=data.train_labels)
    before = demo.accuracy(model, on_training_images)
    demo.train(model, data, 10, "float")
    assert before < 0.5
    assert demo.accuracy(model, on_training_images) > 0.9


@pytest.mark.parametrize("module", ["sklearn.datasets", "tqdm"])
def test_what_is_missing_is_named(module, few_digits, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(OctavError, match=r"the demo needs .*: pip install 'octav_fx\[demo\]'"):
        demo.main(epochs=1)
