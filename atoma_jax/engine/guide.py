"""What one sample of a structured answer may go on with: a matcher that follows its tokens, and the bits of a step.

Owns the matcher's life and what is added to its bits (stop tokens, allowed ids). Grammars are compiled elsewhere
(`grammars.py`); when a sample's bits are needed is the engine's to know.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int32


class Guide:
    """Follows one sample. The scheduler plans a step for it once its last token is known here."""

    def __init__(
        self, matcher: Any, *, ends: Sequence[int] = (), allowed: Int32[np.ndarray, " M"] | None = None
    ) -> None:
        """Begins with an answer that is empty.

        Args:
            matcher: llguidance's, at its beginning, of this sample alone.
            ends: stop tokens without a text of their own: they may be drawn where the answer may end.
            allowed: bits of the only tokens that the request allows; None: all.
        """
        self._matcher, self._ends, self._allowed = matcher, tuple(ends), allowed
        self.error: str | None = None

    @property
    def is_complete(self) -> bool:
        """Nothing can follow: only the end."""
        return self._matcher.is_stopped()

    def accept(self, token: int) -> None:
        """Takes a token that the sample has got, but for one that ends it."""
        if not self._matcher.consume_token(token):
            self._fail()

    def finish_bits(self, bits: Int32[np.ndarray, " M"]) -> None:
        """Adds to the matcher's bits what it does not know of."""
        if self._matcher.is_error():
            self._fail()
        if self._ends and self._matcher.is_accepting():
            for token in self._ends:
                bits.view(np.uint32)[token // 32] |= np.uint32(1 << token % 32)
        if self._allowed is not None:
            bits &= self._allowed
            if not bits.any():
                self.error = self.error or "allowed_token_ids and the constraint on the answer leave no token"

    @property
    def matcher(self) -> Any:
        """For who computes the bits of many at once."""
        return self._matcher

    def _fail(self) -> None:
        why = self._matcher.get_error().splitlines()[:1]
        self.error = self.error or f"the answer cannot go on: {why[0] if why else 'its grammar has no way out'}"
