"""The grids that are shipped are those of the gguf package, and the signs that are computed those of its table."""

from importlib import resources

import gguf.quants
import numpy as np
import pytest

from atoma_jax.quant import ggml_grids, ggml_iq_blocks
from tests.quant.make_ggml_grids import TYPES, grids

TABLES = {
    "iq1_s": (-1, 0, 1),
    "iq2_xxs": ggml_iq_blocks.IQ2_TABLE,
    "iq2_xs": ggml_iq_blocks.IQ2_TABLE,
    "iq2_s": ggml_iq_blocks.IQ2_TABLE,
    "iq3_xxs": ggml_iq_blocks.IQ3_XXS_TABLE,
    "iq3_s": ggml_iq_blocks.IQ3_S_TABLE,
}


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.qtype.name)
def test_an_entry_stands_for_the_numbers_of_ggmls_own(kind) -> None:
    name = kind.qtype.name.lower()
    kind.init_grid()
    expected = kind.grid.reshape(kind.grid_shape)  # as the package unpacks it, by its own code
    codes = ggml_grids.grid(name).view(np.uint8).reshape(kind.grid_shape)
    np.testing.assert_array_equal(np.array(TABLES[name])[codes], expected)


def test_the_shipped_file_is_what_its_script_makes() -> None:
    made = grids()
    with (
        resources.files("atoma_jax.quant").joinpath(ggml_grids.GRIDS_FILE).open("rb") as stream,
        np.load(stream, allow_pickle=False) as shipped,
    ):
        assert set(shipped) == set(made)
        for name, entries in made.items():
            np.testing.assert_array_equal(shipped[name], entries, strict=True)


def test_seven_signs_tell_the_eighth_as_in_ggmls_table() -> None:
    table = np.frombuffer(gguf.quants.IQ2_XXS.ksigns, np.uint8)
    np.testing.assert_array_equal(ggml_grids.even_signs(), ggml_grids.signs()[table])


def test_a_sign_marks_the_code_of_its_element() -> None:
    for bits in (0, 1, 0x80, 0xA5):
        marks = ggml_grids.signs()[bits : bits + 1].view(np.uint8)
        assert marks.tolist() == [ggml_grids.SIGN if bits >> element & 1 else 0 for element in range(8)]


def test_what_threads_share_cannot_be_written_to() -> None:
    shared = (ggml_grids.grid("iq3_s"), ggml_grids.signs(), ggml_grids.even_signs(), ggml_grids.delta_grid())
    assert not any(words.flags.writeable for words in shared)
