"""The compiled kernels, and each of their variants."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from atoma_jax.native.library import VARIANTS, Library, library

# The kernels' own tests, programs that say at their end that all is well.
OWN_TESTS = tuple(Path(__file__).with_name(f"{name}.cc") for name in ("kernels_test", "attention_test"))
HOLD = "all kernels hold"


@pytest.fixture(scope="session")
def kernels() -> Library:
    found = library()
    if found is None:
        pytest.skip("the native kernels are not built, or do not fit; the log says why")
    return found


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest, kernels: Library) -> Iterator[str]:
    """Each variant that this CPU runs, in turn."""
    if request.param not in kernels.supported_variants():
        pytest.skip(f"this CPU does not run {request.param}")
    with kernels.forced(variant=request.param):
        yield request.param
