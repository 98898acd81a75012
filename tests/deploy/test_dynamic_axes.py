"""export_onnx(dynamic_axes=): texts of any length and images of any size, of the file as of the frozen model."""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import octav_fx
from octav_fx import OctavError
from octav_fx.deploy import other_sizes
from octav_fx.deploy.runtimes import run_onnx
from octav_fx.deploy.targets import TARGETS
from tests.support.deployable_models import relative

pytestmark = pytest.mark.slow


class Text(nn.Module):
    """One encoder layer that reads tokens, with positions cut out of a table, and pools by a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(20, 16), nn.Parameter(torch.randn(32, 16))
        self.layer, self.head = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True), nn.Linear(16, 3)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.layer(self.tokens(ids) + self.positions[: ids.shape[1]], src_key_padding_mask=mask == 0)
        return self.head((x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))


class Image(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm, self.head = nn.BatchNorm2d(8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        return self.head((x + self.norm(self.body(x)).relu()).mean((2, 3)))


def text(batch: int, length: int) -> dict[str, Tensor]:
    lengths = torch.randint(1, length + 1, (batch, 1))
    lengths[0] = length
    return {"ids": torch.randint(20, (batch, length)), "mask": (torch.arange(length) < lengths).float()}


def image(batch: int, height: int) -> dict[str, Tensor]:
    return {"x": torch.randn(batch, 3, height, 12)}


# What is exported, and its free axes; both take keywords in another order than forward's.
CASES: dict[str, tuple[type[nn.Module], Any, dict[str, list[int]]]] = {
    "text": (Text, text, {"mask": [1], "ids": [-1]}),
    "image": (Image, image, {"x": [2]}),
}


def frozen(kind: type[nn.Module], example: dict[str, Tensor]) -> nn.Module:
    # TensorRT takes signed bytes only.
    q = octav_fx.quantize(kind().eval(), example, octav_fx.Config(signed_activations=True))
    return octav_fx.freeze(octav_fx.calibrate(q, [example]))


@pytest.mark.parametrize("target", [target.name for target in TARGETS])
@pytest.mark.parametrize("name", CASES)
def test_other_sizes_are_computed_as_the_frozen_model_does(name: str, target: str, tmp_path: Path) -> None:
    kind, made, axes = CASES[name]
    q, path = frozen(kind, made(2, 8)), tmp_path / "model.onnx"
    octav_fx.export_onnx(q, made(2, 8), path, target=target, dynamic_axes=axes)
    sizes = {value.name: value.type.tensor_type.shape.dim for value in onnx.load(path).graph.input}
    for given, free in axes.items():
        assert all(sizes[given][axis].dim_param for axis in (0, *free))
    # Files for other runtimes are not what onnxruntime's optimizer expects: it fails on the text's of fixed sizes, too.
    for batch, size in ((2, 8), (3, 14), (1, 5)) if target in ("onnxruntime", "exact") else ():
        call = made(batch, size)
        (found,) = run_onnx(path, call).values()
        # Another order of additions may move a code at a tie.
        assert relative(found, q(**call)) < 0.05


def test_of_positional_inputs_the_names_are_those_of_forward(tmp_path: Path) -> None:
    (x,) = image(2, 8).values()
    q, path = frozen(Image, image(2, 8)), tmp_path / "model.onnx"
    octav_fx.export_onnx(q, x, path, dynamic_batch=False, dynamic_axes={"x": [2, 3]})
    other = torch.randn(2, 3, 10, 6)
    (found,) = run_onnx(path, other).values()
    assert relative(found, q(other)) < 0.05


@pytest.mark.parametrize("axes", [{"y": [1]}, {"x": [4]}, {"x": [-5]}, {"x": 2}, {"x": ["height"]}])
def test_axes_that_are_not_there_are_refused(axes: dict[str, Any], tmp_path: Path) -> None:
    q, path = frozen(Image, image(2, 8)), tmp_path / "model.onnx"
    with pytest.raises(OctavError, match=r"no such axes; the inputs are x \[2, 3, 8, 12\]"):
        octav_fx.export_onnx(q, image(2, 8), path, dynamic_axes=axes)
    assert not path.exists()


def test_what_holds_for_one_size_is_refused(tmp_path: Path) -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x) + torch.ones(5, 8)

    x = torch.randn(2, 5, 8)
    q = frozen(Fixed, {"x": x})
    with pytest.raises(OctavError, match=r"with dynamic_batch=False and without dynamic_axes"):
        octav_fx.export_onnx(q, x, tmp_path / "model.onnx", dynamic_axes={"x": [1]})


def test_a_size_that_the_exporter_fixes_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of its ways writes what fails in the others for the sizes of the example."""
    q, path, original = frozen(Image, image(2, 8)), tmp_path / "model.onnx", torch.onnx.export
    axes: dict[str, list[int]] = {"x": [2]}

    def export(*args: Any, dynamic_shapes: Any, **kwargs: Any) -> Any:
        # The batch is free, the height is not.
        return original(*args, dynamic_shapes={"x": {0: dynamic_shapes["x"][0]}}, **kwargs)

    monkeypatch.setattr(torch.onnx, "export", export)
    octav_fx.export_onnx(q, image(2, 8), path)
    path.unlink()
    with pytest.raises(OctavError, match=r"axis 2 of x for size 8 alone: .* without dynamic_axes"):
        octav_fx.export_onnx(q, image(2, 8), path, dynamic_axes=axes)
    assert not path.exists()


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor, more: dict[str, Tensor]) -> Tensor:
        return self.fc(x) - self.fc(more["b"]) + more["a"]


def test_a_dictionary_is_an_input(tmp_path: Path) -> None:
    example = (torch.randn(2, 8), {"b": torch.randn(2, 8), "a": torch.randn(2, 8)})
    q, path = octav_fx.quantize(Pair().eval(), example), tmp_path / "model.onnx"
    q = octav_fx.freeze(octav_fx.calibrate(q, [example]))
    octav_fx.export_onnx(q, example, path)
    assert all(value.type.tensor_type.shape.dim[0].dim_param for value in onnx.load(path).graph.input)


class Ways(nn.Module):
    """Texts that Python looks at the size of, in the way that a subclass has."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.other = nn.Linear(8, 8), nn.Linear(8, 8)


class OtherWay(Ways):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) if x.shape[1] <= 100 else self.fc(x).relu()


class OfState(Ways):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) if x.shape[1] <= 5 * len(self.fc.weight) else self.fc(x).relu()


class OfComputed(Ways):
    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool1d(self.fc(x).mT, 2).mT
        return self.other(x) if x.shape[1] <= 30 else self.other(x).relu()


class OneByOne(Ways):
    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.fc(row) for row in x])


class Even(Ways):
    """Another layer, which is of the graph for other sizes alone."""

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) if x.shape[1] % 2 == 0 else self.other(x)


class Refuses(Ways):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] % 2:
            raise ValueError("no odd lengths")
        assert x.shape[1] <= 20
        return self.fc(x)


class SameResult(Ways):
    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x)
        return x - x.mean(1, keepdim=True) if x.shape[1] > 1 else x - x


@pytest.mark.parametrize(
    ("kind", "options", "advice"),
    [
        (OtherWay, {"dynamic_axes": {"x": [1]}}, r"for inputs \[2, 101, 8\] .* \(.*py:\d+\)"),
        (OfState, {"dynamic_axes": {"x": [1]}}, r"for inputs \[2, 41, 8\] "),
        (OfComputed, {"dynamic_axes": {"x": [1]}}, r"for inputs \[2, 62, 8\] "),
        (Even, {"dynamic_axes": {"x": [1]}}, r"for inputs \[2, 7, 8\] .* without dynamic_axes"),
        (OneByOne, {}, r"for inputs \[3, 6, 8\] .* with dynamic_batch=False"),
    ],
)
def test_sizes_that_the_model_computes_another_way_for(
    kind: type[nn.Module], options: dict[str, Any], advice: str, tmp_path: Path
) -> None:
    x, path = torch.randn(2, 6, 8), tmp_path / "model.onnx"
    q = frozen(kind, {"x": x})
    with pytest.raises(OctavError, match=advice):
        octav_fx.export_onnx(q, x, path, **options)
    assert not path.exists()
    octav_fx.export_onnx(q, x, path, dynamic_batch=False)
    (found,) = run_onnx(path, x).values()
    assert relative(found, q(x)) < 1e-6


@pytest.mark.parametrize("kind", [Refuses, SameResult])
def test_sizes_that_the_model_refuses_or_computes_alike_are_free(kind: type[nn.Module], tmp_path: Path) -> None:
    x, path = torch.randn(2, 6, 8), tmp_path / "model.onnx"
    q = frozen(kind, {"x": x})
    octav_fx.export_onnx(q, x, path, dynamic_axes={"x": [1]})
    other = torch.randn(3, 8, 8)
    (found,) = run_onnx(path, other).values()
    assert relative(found, q(other)) < 1e-5


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x).relu()


class LongBlock(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) if x.shape[1] <= 50 else self.fc(x).relu()


class Around(nn.Module):
    """A model in blocks, whose own Python asks of sizes."""

    def __init__(self, asks: Callable[[Tensor], bool], kind: type[nn.Module] = Block) -> None:
        super().__init__()
        self.blocks, self.asks = nn.ModuleList(kind() for _ in range(2)), asks

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return 2 * x if self.asks(x) else x


def in_blocks(asks: Callable[[Tensor], bool], kind: type[nn.Module] = Block) -> tuple[nn.Module, Tensor]:
    x = torch.randn(2, 6, 8)
    q = octav_fx.quantize(Around(asks, kind).eval(), x, blocks=[kind])
    return octav_fx.freeze(octav_fx.calibrate(q, [x])), x


@pytest.mark.parametrize(
    ("asks", "kind", "shape"),
    [
        (lambda x: x.shape[1] > 100, Block, [2, 101, 8]),
        (lambda x: x.shape[1] % 2 == 1, Block, [2, 7, 8]),
        (lambda x: x.shape[1] == 77, Block, [2, 77, 8]),
        (lambda x: math.ceil(x.shape[1] / 4) > 5, Block, [2, 21, 8]),
        (lambda x: x.numel() > 2000, Block, [42, 6, 8]),
        (lambda x: False, LongBlock, [2, 51, 8]),
    ],
)
def test_python_around_blocks_that_goes_another_way_for_other_sizes(
    asks: Callable[[Tensor], bool], kind: type[nn.Module], shape: list[int], tmp_path: Path
) -> None:
    (q, x), path = in_blocks(asks, kind), tmp_path / "model.onnx"
    with pytest.raises(OctavError, match=re.escape(f"for inputs {shape} the model computes another way")):
        octav_fx.export_onnx(q, x, path, dynamic_axes={"x": [1]})
    assert not path.exists()
    octav_fx.export_onnx(q, x, path, dynamic_batch=False)


def refuses(x: Tensor) -> bool:
    if x.shape[1] > 20:
        raise ValueError("20 at most")
    return False


@pytest.mark.parametrize("asks", [lambda x: False, refuses])
def test_python_around_blocks_that_goes_one_way(asks: Callable[[Tensor], bool], tmp_path: Path) -> None:
    (q, x), path = in_blocks(asks), tmp_path / "model.onnx"
    octav_fx.export_onnx(q, x, path, dynamic_axes={"x": [1]})
    for other in (torch.randn(3, 17, 8), torch.randn(1, 1, 8)):
        (found,) = run_onnx(path, other).values()
        assert relative(found, q(other)) < 1e-6


def test_where_torch_export_cannot_say_what_python_asks_a_warning_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: Any) -> Any:
        raise RuntimeError("no such op\nand more")

    monkeypatch.setattr(other_sizes, "exported", fails)
    q, x = in_blocks(lambda x: False)
    with pytest.warns(UserWarning, match=r"could not be asked, .*: no such op$"):
        octav_fx.export_onnx(q, x, tmp_path / "model.onnx")
