"""A short mark of what is in a model's files, without reading all of them: equal for copies, another for others.

Sizes, the beginning of each file (where GGUF and safetensors keep their headers), and pieces spread evenly over the
rest. Weights of another training differ everywhere, and so in the pieces; a single byte changed by somebody who knows
where they lie does not show. It names a model, and proves nothing about it.
"""

import hashlib
import re
from pathlib import Path

_HEAD = 1 << 16  # bytes
_PIECE = 1 << 10  # bytes
_PIECES = 64  # of each file
_PART = re.compile(r"(.+)-\d{5}-of-(\d{5}\.gguf)")


def content_mark(path: Path) -> str:
    """Sixteen hex digits.

    Args:
        path: a .gguf file, all parts of whose model are then meant, or a folder.

    Raises:
        OSError: a file cannot be read.
    """
    digest = hashlib.sha256()
    for file in _files(path):
        name = file.relative_to(path).as_posix() if path.is_dir() else ""
        size = file.stat().st_size
        digest.update(f"{name}\0{size}\0".encode())
        with file.open("rb") as content:
            digest.update(content.read(_HEAD))
            for number in range(_PIECES if size > _HEAD else 0):
                content.seek(_HEAD + (size - _HEAD) * number // _PIECES)
                digest.update(content.read(_PIECE))
    return digest.hexdigest()[:16]


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if file.is_file() and not file.name.startswith("."))
    part = _PART.fullmatch(path.name)
    if part is None:
        return [path]
    return sorted(path.parent.glob(f"{part[1]}-*-of-{part[2]}"))
