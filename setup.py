"""What a wheel for release holds besides: the C++ passes, compiled for AVX2 and AVX512.

Only with OCTAV_FX_BUNDLE=1, as ./dev release sets it: any other wheel is of plain Python, and the passes are compiled
when they are first used. They know nothing of Python or of torch, so that one wheel does for every version of both.
"""

import os
import re
import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


class BuildWithPasses(build_py):
    """Compile the passes beside the sources that were copied."""

    def run(self) -> None:
        """Copy, then compile."""
        super().run()
        sys.path.insert(0, str(ROOT))
        from octav_fx.ops import cpu

        cpu.bundle(Path(self.build_lib) / "octav_fx" / "ops" / cpu.BUNDLED.name)


class WithPasses(Distribution):
    """What holds compiled code is of one platform."""

    def has_ext_modules(self) -> bool:
        """Say so to the commands that ask."""
        return True


class WheelOfAnyPython(bdist_wheel):
    """A wheel of one platform and every Python."""

    def get_tag(self) -> tuple[str, str, str]:
        """Return the tag without Python's version and ABI, and with the glibc that the passes need (PEP 600)."""
        platform = super().get_tag()[2]
        libraries = [path.read_bytes() for path in Path(self.bdist_dir).rglob("*.so")]
        needed = [int(minor) for library in libraries for minor in re.findall(rb"GLIBC_2\.(\d+)", library)]
        if platform.startswith("linux_") and needed:
            platform = platform.replace("linux_", f"manylinux_2_{max(needed)}_", 1)
        return "py3", "none", platform


if os.environ.get("OCTAV_FX_BUNDLE") == "1":
    setup(distclass=WithPasses, cmdclass={"build_py": BuildWithPasses, "bdist_wheel": WheelOfAnyPython})
else:
    setup()
