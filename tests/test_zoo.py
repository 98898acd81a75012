"""zoo: models by name, and torchvision beside a torch without its CUDA libraries."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from octav_fx import OctavError, zoo


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


def test_any_callable_by_module_and_name():
    assert isinstance(zoo.load("torch.nn:Linear", in_features=3, out_features=2), nn.Linear)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet", "torchvision has no model 'resnet'; it has .*resnet18"),
        ("", "torchvision has no model ''"),
        ("no_such_module:build", "no model 'no_such_module:build': No module named 'no_such_module'"),
        ("torch.nn:no_such_model", "no model 'torch.nn:no_such_model': .* has no attribute"),
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


def test_importing_octav_fx_imports_none_of_the_optional_packages():
    optional = ("torchvision", "sklearn", "onnx", "triton")
    program = f"import sys, octav_fx; print([name for name in {optional} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_torchvision_can_be_asked_for_twice():
    assert zoo.torchvision() is zoo.torchvision()
