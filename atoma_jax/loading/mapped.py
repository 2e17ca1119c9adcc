"""Maps weight files read-only. Owns what may be mapped; what is in a file is its parser's."""

import mmap
import stat
from pathlib import Path

from atoma_jax.errors import ModelNotFoundError, WeightFileError


def map_file(path: Path) -> mmap.mmap:
    """The whole file.

    Raises:
        ModelNotFoundError: nothing that can be mapped is at `path`.
        WeightFileError: the file is empty.
    """
    try:
        status = path.stat()
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        raise ModelNotFoundError("model", str(path), f"there is no such file ({error})") from error
    if stat.S_ISDIR(status.st_mode):
        raise ModelNotFoundError("model", str(path), f"is a directory; name the {path.suffix or '.gguf'} file in it")
    if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
        raise ModelNotFoundError("model", str(path), "must be a regular file")
    if status.st_size == 0:
        raise WeightFileError(f"{path}: magic", "0 bytes", "the file is empty; fetch it again")
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise ModelNotFoundError("model", str(path), f"the file cannot be mapped ({error})") from error
