"""Inductor's C++ kernels of a graph, compiled by one call of the compiler: of its 1.3 s for each, headers take 1.1."""

import functools
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

_INCLUDE = re.compile(r"^[ \t]*#include .*$", re.MULTILINE)


def compile_kernels_together() -> None:
    """Have all kernels of a module that Inductor writes compiled when the first of them is asked for."""
    module = sys.modules.get("torch._inductor.async_compile")
    if module is None or hasattr(module.AsyncCompile.cpp_pybinding, "__wrapped__"):
        return
    apart = module.AsyncCompile.cpp_pybinding

    @functools.wraps(apart)
    def together(self: Any, argtypes: Sequence[str], source_code: str) -> Any:
        # Without threads of its own Inductor asks for each kernel at once.
        if module.get_compile_threads() <= 1:
            return apart(self, argtypes, source_code)
        library = vars(self).get("library")
        if library is None or library.loads:
            library = self.library = _Library()
        library.kernels.append((argtypes, source_code))
        return module.LambdaFuture(functools.partial(library.function, len(library.kernels) - 1))

    module.AsyncCompile.cpp_pybinding = together


class _Library:
    """The kernels of a module; each becomes a Python module of its own, and all lie in one file."""

    def __init__(self) -> None:
        self.kernels: list[tuple[Sequence[str], str]] = []
        self.loads: list[Callable[[], Any]] = []

    def function(self, place: int) -> Any:
        self.loads = self.loads or self._compiled()
        return getattr(self.loads[place](), _entry(place))

    def _compiled(self) -> list[Callable[[], Any]]:
        from torch._inductor.codecache import CppPythonBindingsCodeCache as Base

        parts = [_in_namespace(Base.suffix_template, _entry(i), *kernel) for i, kernel in enumerate(self.kernels)]
        # The header that is precompiled comes first.
        includes = dict.fromkeys(_INCLUDE.findall("\n".join(parts)))
        source = "\n".join([*includes, *(_INCLUDE.sub("", part) for part in parts)])
        kinds = [type("One", (Base,), {"entry_function": _entry(i), "cache": {}}) for i in range(len(parts))]
        return [kind.load_async(source) for kind in kinds]


def _entry(place: int) -> str:
    return f"kernel_{place}"


def _in_namespace(bindings: str, entry: str, argtypes: Sequence[str], source: str) -> str:
    """Return a kernel under another name, and its bindings to Python, as CppPythonBindingsCodeCache writes them."""
    arguments = ", ".join(f"parse_arg<{kind.replace('const ', '')}>(args, {i})" for i, kind in enumerate(argtypes))
    call = f"{entry}({arguments}); Py_RETURN_NONE;"
    bound = bindings.format(arg_len=len(argtypes), call_entry_func=call, entry_func=entry, extra_parse_arg="")
    named = re.sub(r"\bkernel\b(?=\s*\()", entry, source)
    return f"namespace of_{entry} {{\n{named}\n{bound}\n}}"
