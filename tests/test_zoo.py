"""zoo: models by name, and torchvision beside a torch without its CUDA libraries."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import octav_fx
from octav_fx import OctavError, zoo
from tests.support.on_grid import OnGrid


def test_torchvision_by_name():
    model = zoo.load("squeezenet1_1", num_classes=7)
    assert model.training
    assert model.eval()(torch.randn(1, 3, 64, 64)).shape == (1, 7)


@pytest.mark.parametrize("name", ["lraspp_mobilenet_v3_large", "r3d_18"])
def test_names_of_segmentation_and_video_models_are_known_and_nothing_is_downloaded(name, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a download")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    assert isinstance(zoo.load(name), nn.Module)


def test_torchvisions_functions_can_be_scripted():
    boxes, scores = torch.tensor([[0.0, 0, 2, 2], [0, 0, 2, 1.9], [5, 5, 6, 6]]), torch.tensor([0.5, 0.9, 0.1])
    suppressed = torch.jit.script(zoo.torchvision().ops.nms)
    assert suppressed(boxes, scores, 0.5).tolist() == [1, 2]


MODEL = nn.Linear(3, 2)


def test_any_callable_by_module_and_name():
    assert isinstance(zoo.load("torch.nn:Linear", in_features=3, out_features=2), nn.Linear)
    assert zoo.load("tests.test_zoo:MODEL") is sys.modules[__name__].MODEL


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet", "torchvision has no model 'resnet'; it has .*resnet18"),
        ("", "torchvision has no model ''"),
        ("no_such_module:build", "no model 'no_such_module:build': No module named 'no_such_module'"),
        ("torch.nn:no_such_model", "no model 'torch.nn:no_such_model': .* has no attribute"),
        ("models/own.py:build", "no model 'models/own.py:build': the name of a module, not of a file, as own:build"),
        (
            "torch.nn:Linear",
            "torch.nn:Linear cannot be called with no arguments: missing a required argument: 'in_f",
        ),
        ("os:name", "os:name cannot be called with no arguments: .* is not a callable object"),
        ("os:getcwd", "os:getcwd returned str, not an nn.Module"),
    ],
)
def test_names_that_are_none(name, message):
    with pytest.raises(OctavError, match=message):
        zoo.load(name)


def test_without_torchvision_it_says_what_to_install(monkeypatch):
    # None in sys.modules is how Python marks a module that cannot be imported.
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(OctavError, match=r"torchvision is not installed: pip install 'octav_fx\[models\]'"):
        zoo.load("resnet18")


@pytest.mark.slow
def test_importing_octav_fx_imports_none_of_the_optional_packages():
    optional = ("torchvision", "sklearn", "onnx", "triton")
    # Dynamo imports triton by itself where there is one.
    program = (
        "import sys, torch._dynamo; there = set(sys.modules); import octav_fx; "
        f"print([name for name in {optional} if name in sys.modules and name not in there])"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_torchvision_can_be_asked_for_twice():
    assert zoo.torchvision() is zoo.torchvision()


def kept_by_definition(boxes: list[list[int]], scores: list[float], threshold: float) -> list[int]:
    """Best first, each box that overlaps none of those kept before by more than the threshold, in whole numbers."""

    def area(box: list[int]) -> int:
        return max(box[2] - box[0], 0) * max(box[3] - box[1], 0)

    def overlap(a: list[int], b: list[int]) -> float:
        shared = area([max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])])
        return shared / (area(a) + area(b) - shared) if shared else 0.0

    kept: list[int] = []
    for i in sorted(range(len(boxes)), key=lambda i: -scores[i]):
        if all(overlap(boxes[i], boxes[j]) <= threshold for j in kept):
            kept.append(i)
    return kept


SIDES = st.tuples(st.integers(0, 8), st.integers(0, 8), st.integers(0, 6), st.integers(0, 6))
BOXES = st.lists(st.tuples(SIDES, st.integers(0, 5)), max_size=12)


# Thresholds that are no quotient of two areas here, where float32 may round either way.
@given(BOXES, st.sampled_from([0.0, 0.123456, 0.34567, 0.56789, 0.987654]))
def test_non_maximum_suppression_is_that_of_the_definition(found: list[tuple[tuple[int, ...], int]], threshold: float):
    boxes = [[x, y, x + w, y + h] for (x, y, w, h), _ in found]
    scores = [float(score) for _, score in found]
    kept = zoo._nms(torch.tensor(boxes, dtype=torch.float32).view(-1, 4), torch.tensor(scores), threshold)
    assert kept.dtype is torch.long
    assert kept.tolist() == kept_by_definition(boxes, scores, threshold)


def test_boxes_of_no_area_and_an_overlap_of_just_the_threshold_stay():
    boxes = torch.tensor([[0.0, 0, 2, 2], [1, 0, 3, 2], [0, 0, 2, 2], [1, 1, 1, 1], [1, 1, 1, 1]])
    # The first two share 2 of 6, which is a third in float32 too.
    assert zoo._nms(boxes, torch.arange(5, 0, -1.0), 1 / 3).tolist() == [0, 1, 3, 4]
    assert zoo._nms(boxes, torch.ones(5), 0.33).tolist() == [0, 3, 4]


@pytest.mark.parametrize("name", ["nms", "batched_nms"])
def test_torchvision_takes_it_for_its_own(name: str):
    ops = zoo.torchvision().ops
    boxes, scores = torch.tensor([[0.0, 0, 2, 2], [0, 0, 2, 2], [5, 5, 6, 6]]), torch.tensor([0.1, 0.9, 0.5])
    groups = () if name == "nms" else (torch.tensor([0, 0, 1]),)
    assert getattr(ops, name)(boxes, scores, *groups, 0.5).tolist() == [1, 2]


# Few boxes: torchvision samples each in Python where it has no binary ops.
FEW = {"min_size": 64, "max_size": 64, "rpn_post_nms_top_n_test": 20, "rpn_post_nms_top_n_train": 20}
DETECTORS: dict[str, dict[str, int]] = {
    "ssdlite320_mobilenet_v3_large": {},
    "fasterrcnn_mobilenet_v3_large_320_fpn": FEW,
}


@pytest.mark.models
@pytest.mark.parametrize("name", DETECTORS)
def test_a_detector_is_quantized_in_parts_and_its_boxes_are_the_float_models(name: str):
    model = zoo.load(name, num_classes=5, **DETECTORS[name]).eval()
    images = [torch.rand(3, 48, 64), torch.rand(3, 64, 40)]
    q = octav_fx.quantize(model, (images,), octav_fx.Config(edge_bits=None))
    assert type(q).__name__ == type(model).__name__ and isinstance(q, type(model))
    covered = octav_fx.coverage(q)
    assert covered.quantized_macs == covered.total_macs > 0
    assert "the model: in parts, because " in octav_fx.table(q)
    with torch.no_grad():
        with octav_fx.float_mode(q):
            ours = q(images)
        theirs = model(images)
        with OnGrid(4) as seen:
            q(images)
    assert seen.checked > 0 and seen.off_grid == []
    assert len(ours) == len(theirs) == len(images)
    assert sum(len(found["boxes"]) for found in theirs) > 0
    for one, other in zip(ours, theirs, strict=True):
        assert list(one) == list(other)
        assert all(torch.equal(one[key], other[key]) for key in other)


@pytest.mark.models
def test_a_detector_learns():
    model = zoo.load("fasterrcnn_mobilenet_v3_large_320_fpn", num_classes=5, **FEW).train()
    images: list[Tensor] = [torch.rand(3, 64, 64)] * 2
    targets = [{"boxes": torch.tensor([[4.0, 4, 40, 40]]), "labels": torch.tensor([2])}] * 2
    q = octav_fx.quantize(model, (images, targets))
    losses = q(images, targets)
    assert list(losses) == ["loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"]
    sum(losses.values()).backward()
    gradients = [p.grad for p in q.parameters() if p.requires_grad]
    assert all(g is not None and g.isfinite().all() for g in gradients)
