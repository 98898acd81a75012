"""What fuzzers of programs share: findings as words, and codes that may move at ties alone."""

import contextlib
import io
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from octav_fx.deploy.codes import codes_of_quantizers
from octav_fx.errors import OctavError


@contextlib.contextmanager
def as_words() -> Iterator[dict[str, str]]:
    """Keep what is raised inside under "fault"; an OctavError, which says what does not hold, under "refused"."""
    words: dict[str, str] = {}
    try:
        # fx prints where in its generated code an error came up.
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield words
    except OctavError as error:
        words["refused"] = str(error)
    except AssertionError as error:
        words["fault"] = f"differs: {error}"
    except Exception as error:
        # torch's own refusal: of a write of the program's own, or of the state of a quantizer by backend="eager".
        if "modified by an inplace operation" not in str(error):
            words["fault"] = f"raised {type(error).__name__}: {error}"


def check_codes(defined: nn.Module, converted: nn.Module, args: tuple[Tensor, ...]) -> None:
    """Check that from equal codes integers give equal codes, but for one at a tie of oneDNN's rounding."""
    given = codes_of_quantizers(defined, tuple(map(torch.clone, args)), {})
    found = codes_of_quantizers(converted, tuple(map(torch.clone, args)), {}, given)
    for name, calls in given.items():
        # The copy of a quantizer behind a move is none where codes are moved.
        for expected, codes in zip(calls, found.get(name, calls), strict=True):
            moved = (codes.int() - expected.int()).abs()
            assert moved.max() <= 1 and moved.count_nonzero() <= 1, f"{moved.count_nonzero()} codes of {name} moved"
