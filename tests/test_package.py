"""What is installed: the wheel's contents, the public names, and passes/ under one name only."""

import importlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

import octav_fx
from tests.support.sources import SOURCES

ROOT = Path(__file__).parent.parent
REFERENCE = (ROOT / "docs" / "reference.md").read_text()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of a copy of the sources: the build leaves nothing in the checkout, and nothing old gets in."""
    if int(version("setuptools").partition(".")[0]) < 77:
        pytest.skip("building without isolation takes the setuptools that pyproject.toml asks for")
    folder = tmp_path_factory.mktemp("wheel")
    sources = folder / "sources"
    sources.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, sources)
    for name in ("octav_fx", "passes"):
        shutil.copytree(ROOT / name, sources / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    return made_wheel(sources, folder)


def made_wheel(sources: Path, folder: Path, **environment: str) -> Path:
    """The wheel that pip makes of a folder."""
    options = ["--no-build-isolation", "--no-deps", "--no-index", "--disable-pip-version-check", "--quiet"]
    made = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", *options, str(sources), "-w", str(folder)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )
    assert made.returncode == 0, made.stderr
    (path,) = folder.glob("*.whl")
    return path


def test_the_version_is_the_same_everywhere():
    assert f"version: {octav_fx.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"## {octav_fx.__version__}" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.slow
def test_a_wheel_made_of_the_sdist_is_the_wheel(wheel, tmp_path):
    sources = wheel.parent / "sources"
    program = "from setuptools import build_meta; import sys; print(build_meta.build_sdist(sys.argv[1]))"
    made = subprocess.run([sys.executable, "-c", program, str(tmp_path)], cwd=sources, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    with tarfile.open(tmp_path / made.stdout.splitlines()[-1]) as archive:
        archive.extractall(tmp_path, filter="data")
    (unpacked,) = (path for path in tmp_path.iterdir() if path.is_dir())
    again = made_wheel(unpacked, tmp_path / "again")
    assert sorted(zipfile.ZipFile(again).namelist()) == sorted(zipfile.ZipFile(wheel).namelist())


@pytest.mark.slow
def test_the_installed_wheel_has_its_command_and_its_backend(wheel, tmp_path):
    """In an environment of its own, beside the packages of this one."""
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    (site,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    # Dependencies come from here; an editable octav_fx among them would be found later than the installed one.
    (site / "dependencies.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    options = ["--no-deps", "--no-index", "--disable-pip-version-check", "--quiet", "--no-warn-script-location"]
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", *options, str(wheel)]
    done = subprocess.run(install, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    shown = subprocess.run(
        [str(python.parent / "octav-fx"), "--version"], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert shown.stdout.startswith(f"octav_fx {octav_fx.__version__}, torch "), shown.stderr
    program = (
        "import torch; f = torch.compile(torch.nn.Linear(4, 2), backend='octav'); import octav_fx; "
        "print(octav_fx.__file__, 'octav' in torch.compiler.list_backends())"
    )
    shown = subprocess.run([str(python), "-c", program], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert shown.stdout.split() == [str(site / "octav_fx" / "__init__.py"), "True"], shown.stderr


@pytest.mark.slow
def test_a_wheel_for_release_needs_no_compiler(kernels, wheel, tmp_path):
    sources = wheel.parent / "sources"
    path = made_wheel(sources, tmp_path, OCTAV_FX_BUNDLE="1")
    assert re.fullmatch(rf"octav_fx-{octav_fx.__version__}-py3-none-\w+\.whl", path.name)
    if sys.platform == "linux":
        # No newer than that of this machine, which loads it below, and with the name by which package indexes take it.
        minor = re.search(r"-manylinux_2_(\d+)_", path.name)
        assert minor is not None and int(minor[1]) <= int(platform.libc_ver()[1].split(".")[1])
    with zipfile.ZipFile(path) as archive:
        archive.extractall(tmp_path / "installed")
    folder = tmp_path / "installed" / "octav_fx" / "ops" / "bundled"
    bundled = sorted(each.name.split("-")[1] for each in folder.iterdir())
    assert bundled == ["AVX2", "AVX512"]
    program = (
        "import torch; from octav_fx import optimal_clip; from octav_fx.ops import cpu; "
        "print(cpu.library()._name, float(optimal_clip(torch.arange(100.0), 4)))"
    )
    # A compiler that fails, and an empty cache.
    environment = {**os.environ, "CXX": "false", "XDG_CACHE_HOME": str(tmp_path / "cache"), "PYTHONPATH": ""}
    for chosen, expected in (({"ATEN_CPU_CAPABILITY": "avx2"}, "AVX2"), ({}, torch.backends.cpu.get_cpu_capability())):
        shown = subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            cwd=tmp_path / "installed",
            env={**environment, **chosen},
        )
        assert shown.returncode == 0, shown.stderr
        library, clip = shown.stdout.split()
        assert f"bundled/passes-{expected}-" in library
        # Sums in another order.
        assert float(clip) == pytest.approx(float(octav_fx.optimal_clip(torch.arange(100.0), 4)), rel=1e-6)
    assert not (tmp_path / "cache").exists()


def tracked(folder: str) -> set[str]:
    """The files of a source folder under the names that they have once installed; links are not followed."""
    files = [path for path in (ROOT / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    named = {str(path.relative_to(ROOT)) for path in files}
    return {f"octav_fx/{name}" if folder == "passes" else name for name in named}


@pytest.mark.slow
def test_the_wheel_holds_every_source_file_once(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    inside = {name for name in names if not name.startswith(f"octav_fx-{octav_fx.__version__}.dist-info/")}
    assert inside == tracked("octav_fx") | tracked("passes")
    assert len(names) == len(set(names))
    assert {"octav_fx/passes/__init__.py", "octav_fx/passes/prepare/canonicalize.py", "octav_fx/py.typed"} <= inside
    assert {"octav_fx/ops/fake_quantize/kernel.cpp", "octav_fx/ops/optimal_clip/kernel.cpp"} <= inside


@pytest.mark.slow
def test_the_wheel_has_one_top_level_name_and_the_licence(wheel):
    with zipfile.ZipFile(wheel) as archive:
        information = f"octav_fx-{octav_fx.__version__}.dist-info"
        assert archive.read(f"{information}/top_level.txt").decode().split() == ["octav_fx"]
        assert f"{information}/licenses/LICENSE" in archive.namelist()


@pytest.mark.slow
def test_the_installed_wheel_works_without_the_checkout(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    program = (
        "import octav_fx, octav_fx.passes, torch; "
        "q = octav_fx.quantize(torch.nn.Linear(4, 2), torch.ones(1, 4)); "
        "print(octav_fx.__file__, octav_fx.passes.__file__, octav_fx.coverage(q).quantized_macs)"
    )
    shown = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    inside = tmp_path / "octav_fx"
    assert shown.stdout.split() == [str(inside / "__init__.py"), str(inside / "passes" / "__init__.py"), "8"]


def test_passes_has_no_other_name():
    shown = subprocess.run([sys.executable, "-c", "import passes"], cwd=ROOT, capture_output=True, text=True)
    assert shown.returncode == 1
    assert "ImportError: this folder is the package octav_fx.passes; import it under that name" in shown.stderr


def test_the_link_to_passes_is_relative():
    link = ROOT / "octav_fx" / "passes"
    assert link.is_symlink()
    assert str(link.readlink()) == "../passes"


def test_the_public_names():
    # A name that goes or comes is a decision: write it here.
    assert octav_fx.__all__ == [
        "Config",
        "Coverage",
        "DeployedRow",
        "Deployment",
        "OctavError",
        "Row",
        "Rows",
        "Rule",
        "__version__",
        "activation",
        "calibrate",
        "check",
        "convert",
        "coverage",
        "deployment",
        "either",
        "export_compressed_tensors",
        "export_gguf",
        "export_onnx",
        "fake_quantize",
        "float_mode",
        "freeze",
        "load_state",
        "optimal_clip",
        "pact_penalty",
        "param_groups",
        "quantize",
        "report",
        "rows",
        "state",
        "table",
        "unfreeze",
        "weight",
    ]
    assert all(hasattr(octav_fx, name) for name in octav_fx.__all__)
    assert issubclass(octav_fx.OctavError, RuntimeError)


@pytest.mark.parametrize("name", sorted(name for name in SOURCES if not name.endswith((".kernel", ".__main__"))))
def test_no_module_is_hidden_by_what_has_its_name(name):
    module = importlib.import_module(name)
    parent, _, last = name.rpartition(".")
    assert not parent or getattr(sys.modules[parent], last) is module


@pytest.mark.parametrize("name", [name for name in octav_fx.__all__ if not name.startswith("__")])
def test_every_public_name_is_documented(name):
    value = getattr(octav_fx, name)
    # A dataclass without a docstring gets its signature for one.
    assert value.__doc__ and not value.__doc__.startswith(f"{name}(")
    assert f"`{name}`" in REFERENCE or f"`{name}(" in REFERENCE
