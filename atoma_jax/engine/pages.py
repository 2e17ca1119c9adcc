"""The pool of KV pages: which are free, who owns the others.

Owns the free list and the reference counts. It does not know what a page holds (prefix_cache.py) nor which sequence an
owner is (scheduler.py). Page 0 is scratch, where padding writes; it is never handed out.

A page is in exactly one state: free, cached (published in the prefix cache, without owner) or owned. Hence
`free + cached + owned == num_pages - 1`.
"""

from collections import Counter
from collections.abc import Iterable, Sequence

from atoma_jax.engine.prefix_cache import PrefixCache
from atoma_jax.errors import ConfigError


class PagePool:
    """Hands out pages: free ones first, then the least recently used cached one."""

    def __init__(self, num_pages: int, cache: PrefixCache):
        """`num_pages` counts the scratch page.

        Raises:
            ConfigError: fewer than 2 pages.
        """
        if num_pages < 2:
            raise ConfigError("num_pages", num_pages, "at least 2 KV pages are needed, as page 0 is scratch")
        self.num_pages = num_pages
        self.cache = cache
        self._free = list(range(num_pages - 1, 0, -1))
        self._num_owners = [0] * num_pages

    @property
    def num_free(self) -> int:
        """Pages that hold nothing of use."""
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Pages without owner that the prefix cache keeps."""
        return self.cache.num_idle

    @property
    def num_available(self) -> int:
        """Pages that `allocate` can hand out: free and cached."""
        return len(self._free) + self.cache.num_idle

    @property
    def num_owned(self) -> int:
        """Pages with at least one owner; a shared page counts once."""
        return self.num_pages - 1 - self.num_available

    def num_owners(self, page: int) -> int:
        """Reference count of `page`."""
        return self._num_owners[page]

    def allocate(self) -> int:
        """A page with one owner and no promise about its content. The caller has checked `num_available`."""
        if not self._free:
            self._free.extend(self.cache.evict())
        page = self._free.pop()
        self._num_owners[page] = 1
        return page

    def retain(self, page: int) -> None:
        """Add an owner to a page that is owned or cached."""
        if self._num_owners[page] == 0:
            self.cache.unpark(page)
        self._num_owners[page] += 1

    def release(self, page: int) -> None:
        """Take an owner from `page`. Without owners it is cached if it is published, else free."""
        assert self._num_owners[page] > 0
        self._num_owners[page] -= 1
        if self._num_owners[page] == 0 and not self.cache.park(page):
            self._free.append(page)

    def release_all(self, pages: Iterable[int]) -> None:
        """Release a sequence's pages, given in order; the last one first, so that the LRU evicts tails before heads."""
        for page in reversed(list(pages)):
            self.release(page)

    def reset_cache(self) -> None:
        """Empty the prefix cache: cached pages become free, owned ones lose their entry."""
        self._free.extend(self.cache.reset())

    def check_integrity(self, page_tables: Iterable[Sequence[int]]) -> None:
        """Assert the invariants, `page_tables` being the pages of every owner."""
        expected = Counter(page for table in page_tables for page in table)
        assert 0 not in expected, "page 0 is scratch"
        assert self._num_owners[0] == 0, "page 0 is scratch"
        for page in range(1, self.num_pages):
            assert self._num_owners[page] == expected[page], f"page {page}: reference count differs from its owners"
        free = set(self._free)
        assert len(free) == len(self._free)
        assert 0 not in free
        assert not any(self._num_owners[page] or self.cache.is_published(page) for page in free)
        assert self.num_free + self.num_cached + len(expected) == self.num_pages - 1
        self.cache.check_integrity()
