"""Prefix cache: an index from the content of full pages to the pages that hold their KV.

Owns the salted hash chain, the index and the LRU order of idle pages (published pages that no sequence owns). It does
not own reference counts or the free list (pages.py), nor does it decide when a page may be published (scheduler.py).

The key of a page is `hash(key of the page before it, its tokens as int32)`; the first page follows `hash(b"", salt)`.
A key alone is never trusted: an entry keeps its tokens, its salt and its parent, and all three must agree. A forged or
forced collision is a miss.
"""

from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

HashFunction = Callable[[bytes, bytes], bytes]


def blake2b_key(parent_key: bytes, content: bytes) -> bytes:
    """128-bit BLAKE2b (RFC 7693) of the parent's key followed by `content`."""
    return blake2b(parent_key + content, digest_size=16).digest()


@dataclass(slots=True, eq=False)
class Entry:
    """One published page."""

    key: bytes
    page: int
    tokens: bytes  # int32, page_size of them
    salt: bytes
    parent: "Entry | None"  # None: the first page of a chain
    children: "set[Entry]" = field(default_factory=lambda: set[Entry]())
    live: bool = True  # False once dropped from the index


@dataclass(slots=True, eq=False)
class Chain:
    """Where one sequence stands in the hash chain: its first `num_pages` pages are in the index.

    A chain closes when its next page cannot be reached any more: its tail was evicted, the cache was reset, or another
    content holds the key. A closed chain publishes nothing.
    """

    salt: bytes
    key: bytes
    generation: int
    tail: Entry | None = None
    num_pages: int = 0
    missing: bytes | None = None  # key that ended the lookup; None: it ended at its limit
    is_open: bool = True


def _as_int32(tokens: Sequence[int]) -> bytes:
    return array("i", tokens).tobytes()


class PrefixCache:
    """Index of published pages, with the idle ones in LRU order.

    Idle leaves come before their idle parents in that order, because a page is useless without the pages before it.

    Attributes:
        num_queried_tokens: tokens of admitted prompts that were looked up.
        num_hit_tokens: those of them that were found.
    """

    def __init__(self, page_size: int, hash_function: HashFunction = blake2b_key):
        self.page_size = page_size
        self.num_queried_tokens = 0
        self.num_hit_tokens = 0
        self._hash = hash_function
        self._generation = 0
        self._by_key: dict[bytes, Entry] = {}
        self._by_page: dict[int, Entry] = {}
        self._idle: OrderedDict[int, Entry] = OrderedDict()  # least recently used first

    @property
    def num_idle(self) -> int:
        """Published pages that no sequence owns."""
        return len(self._idle)

    def is_published(self, page: int) -> bool:
        """Whether a lookup can find `page`."""
        return page in self._by_page

    def knows(self, key: bytes) -> bool:
        """Whether some page has this key."""
        return key in self._by_key

    def start(self, salt: bytes) -> Chain:
        """An empty chain. Chains of different salts never share a page."""
        return Chain(salt=salt, key=self._hash(b"", salt), generation=self._generation)

    def lookup(self, chain: Chain, tokens: Sequence[int], max_pages: int) -> list[int]:
        """Pages that hold the KV of the longest known prefix of `tokens`, at most `max_pages`.

        Advances `chain` past them; it must be fresh from `start`. The caller must retain the pages before it allocates
        any other.
        """
        assert chain.num_pages == 0
        size = self.page_size
        content = _as_int32(tokens[: max_pages * size])
        width = 4 * size  # bytes of a page's tokens
        pages: list[int] = []
        for offset in range(0, len(content) - width + 1, width):
            page_tokens = content[offset : offset + width]
            key = self._hash(chain.key, page_tokens)
            entry = self._by_key.get(key)
            if entry is None or not self._matches(entry, chain, page_tokens):
                chain.missing = key
                break
            self._advance(chain, entry)
            pages.append(entry.page)
        return pages

    def publish(self, chain: Chain, tokens: Sequence[int], page: int) -> None:
        """Make `page` findable, which holds the KV of `tokens` (one full page) after the pages of `chain`; advances it.

        Where the same content is in the index already, that entry stays and `page` remains private to its owner.
        """
        assert len(tokens) == self.page_size
        assert page not in self._by_page
        if not self._can_extend(chain):
            return
        content = _as_int32(tokens)
        key = self._hash(chain.key, content)
        entry = self._by_key.get(key)
        if entry is None:
            entry = Entry(key=key, page=page, tokens=content, salt=chain.salt, parent=chain.tail)
            self._by_key[key] = entry
            self._by_page[page] = entry
            if chain.tail is not None:
                chain.tail.children.add(entry)
        elif not self._matches(entry, chain, content):
            chain.is_open = False
            return
        self._advance(chain, entry)

    def park(self, page: int) -> bool:
        """Keep `page`, which lost its last owner, as the most recently used idle page. False if it is not published."""
        entry = self._by_page.get(page)
        if entry is None:
            return False
        self._idle[page] = entry
        # An ancestor can be idle already only where two sequences computed the same page: it must outlive this leaf.
        ancestor = entry.parent
        while ancestor is not None and ancestor.page in self._idle:
            self._idle.move_to_end(ancestor.page)
            ancestor = ancestor.parent
        return True

    def unpark(self, page: int) -> None:
        """`page` was idle and has an owner again."""
        del self._idle[page]

    def evict(self) -> list[int]:
        """Drop the least recently used idle leaf; returns the pages that became free, at least one.

        When every idle page has children (owned ones then), the oldest goes and its descendants become unfindable.
        """
        assert self._idle
        leaf = next((entry for entry in self._idle.values() if not entry.children), None)
        return self._drop(leaf or next(iter(self._idle.values())))

    def reset(self) -> list[int]:
        """Forget everything, say because the weights changed; returns the pages that became free.

        Sequences that run keep their pages, but what they computed so far is never published: their chains are closed.
        """
        freed = list(self._idle)
        for entry in self._by_key.values():
            entry.live = False
        self._by_key.clear()
        self._by_page.clear()
        self._idle.clear()
        self._generation += 1
        return freed

    def contents(self) -> list[tuple[int, list[int]]]:
        """Every published page with all tokens from the start of its chain to the page's end, for integrity checks."""
        found: list[tuple[int, list[int]]] = []
        for entry in self._by_key.values():
            content = entry.tokens
            ancestor = entry.parent
            while ancestor is not None:
                content = ancestor.tokens + content
                ancestor = ancestor.parent
            found.append((entry.page, array("i", content).tolist()))
        return found

    def check_integrity(self) -> None:
        """Assert that index, page map, family links and LRU order agree."""
        assert len(self._by_key) == len(self._by_page)
        rank = {page: order for order, page in enumerate(self._idle)}
        for key, entry in self._by_key.items():
            assert entry.live
            assert entry.key == key
            assert self._by_page[entry.page] is entry
            parent = entry.parent
            if parent is not None:
                assert parent.live
                assert entry in parent.children
                assert entry.salt == parent.salt
                if entry.page in rank and parent.page in rank:
                    assert rank[entry.page] < rank[parent.page], "a parent would be evicted before its child"
            assert all(child.live and child.parent is entry for child in entry.children)
        assert all(self._by_page.get(page) is entry for page, entry in self._idle.items())

    def _can_extend(self, chain: Chain) -> bool:
        if chain.generation != self._generation or (chain.tail is not None and not chain.tail.live):
            chain.is_open = False
        return chain.is_open

    def _matches(self, entry: Entry, chain: Chain, content: bytes) -> bool:
        return entry.tokens == content and entry.parent is chain.tail and entry.salt == chain.salt

    def _advance(self, chain: Chain, entry: Entry) -> None:
        chain.key, chain.tail = entry.key, entry
        chain.num_pages += 1

    def _drop(self, top: Entry) -> list[int]:
        """Remove `top` and all its descendants from the index; returns those pages of them that were idle."""
        if top.parent is not None:
            top.parent.children.discard(top)
        freed: list[int] = []
        stack = [top]
        while stack:
            entry = stack.pop()
            stack.extend(entry.children)
            entry.live = False
            del self._by_key[entry.key]
            del self._by_page[entry.page]
            if self._idle.pop(entry.page, None) is not None:
                freed.append(entry.page)
        return freed
