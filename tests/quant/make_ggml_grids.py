"""Writes `atoma_jax/quant/data/ggml_grids.npz` from the gguf package's tables: `python -m tests.quant.make_ggml_grids`.

Each entry of a grid becomes one uint16, its elements in fields of two bits (eight of them) or four bits (four), the
first in the lowest. That is the form in which the package itself writes them down, as hexadecimal text.
"""

from pathlib import Path

import gguf.quants
import numpy as np

from atoma_jax.quant.ggml_grids import GRIDS_FILE

# Its IQ1_M shares the grid of IQ1_S.
TYPES = (
    gguf.quants.IQ1_S,
    gguf.quants.IQ2_XXS,
    gguf.quants.IQ2_XS,
    gguf.quants.IQ2_S,
    gguf.quants.IQ3_XXS,
    gguf.quants.IQ3_S,
)


def grids() -> dict[str, np.ndarray]:
    """Every grid, by the name of its type in small letters."""
    return {kind.qtype.name.lower(): np.frombuffer(bytes.fromhex(kind.grid_hex.decode()), "<u2") for kind in TYPES}


if __name__ == "__main__":
    file = Path(__file__).parents[2] / "atoma_jax" / "quant" / GRIDS_FILE
    file.parent.mkdir(exist_ok=True)
    np.savez_compressed(file, **grids())
    print(f"{file}: {file.stat().st_size} bytes")
