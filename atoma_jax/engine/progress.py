"""The bar that shows how far weights are loaded."""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from threading import Lock

from tqdm import tqdm

_DELAY = 1.0  # seconds: what is done before needs no bar


@contextmanager
def loading_bar(total: int, label: str, *, shown: bool) -> Generator[Callable[[int], None]]:
    """A bar on standard error, none where that is no terminal.

    Args:
        total: bytes to come.
        label: in front of the bar.
        shown: False for no bar at all.

    Yields:
        What to call with bytes that are there, from any thread.
    """
    lock = Lock()
    with tqdm(
        total=total,
        desc=label,
        unit="B",
        unit_scale=True,
        unit_divisor=1024,
        delay=_DELAY,
        disable=None if shown else True,
    ) as bar:

        def advance(nbytes: int) -> None:
            with lock:
                bar.update(nbytes)

        yield advance
