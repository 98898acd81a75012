"""Files that are written whole or not at all."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from octav_fx.errors import OctavError


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Yield a new file beside the target, which takes its place when all went well inside, and is gone when not.

    Raises OctavError for a path that cannot be written.
    """
    if target.is_dir():
        raise OctavError(f"{target} is a folder: give the path of a file to write")
    try:
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent)
    except OSError as error:
        raise OctavError(f"{target} cannot be written: {error.strerror}; give another path") from error
    os.close(handle)
    draft = Path(name)
    try:
        yield draft
        # mkstemp gives no one else a right to read.
        mask = os.umask(0)
        os.umask(mask)
        draft.chmod(0o666 & ~mask)
        draft.replace(target)
    except OSError as error:
        raise OctavError(f"{target} cannot be written: {error.strerror}; give another path") from error
    finally:
        draft.unlink(missing_ok=True)
