"""The page pool under any traffic: every page is free, cached or owned, and its count is the number of its owners."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, precondition, rule

from atoma_jax.engine.pages import PagePool
from atoma_jax.engine.prefix_cache import Chain, PrefixCache
from atoma_jax.errors import ConfigError

PAGE_SIZE = 2
SALTS = (b"", b"other")


def make_pool(num_pages: int, hash_function=None) -> PagePool:
    cache = PrefixCache(PAGE_SIZE) if hash_function is None else PrefixCache(PAGE_SIZE, hash_function)
    return PagePool(num_pages, cache)


def test_the_scratch_page_is_never_handed_out():
    pool = make_pool(5)
    assert sorted(pool.allocate() for _ in range(4)) == [1, 2, 3, 4]
    assert pool.num_available == 0


@pytest.mark.parametrize("num_pages", [-1, 0, 1])
def test_a_pool_without_a_page_beside_the_scratch_page_is_refused(num_pages):
    with pytest.raises(ConfigError, match=r"num_pages.*at least 2"):
        make_pool(num_pages)


def test_a_page_is_free_again_only_after_its_last_owner():
    pool = make_pool(3)
    page = pool.allocate()
    pool.retain(page)
    pool.release(page)
    assert (pool.num_free, pool.num_owners(page)) == (1, 1)
    pool.release(page)
    assert (pool.num_free, pool.num_owners(page)) == (2, 0)


def test_free_pages_go_before_cached_ones_and_the_least_recently_used_cached_page_goes_first():
    pool = make_pool(4)
    first, second = pool.allocate(), pool.allocate()
    for page, tokens in ((first, [1, 1]), (second, [2, 2])):
        pool.cache.publish(pool.cache.start(b""), tokens, page)
    pool.release(second)
    pool.release(first)
    assert pool.num_cached == 2
    assert pool.allocate() not in (first, second)
    assert [pool.allocate(), pool.allocate()] == [second, first]


def test_a_tail_is_evicted_before_its_head_whoever_let_go_first():
    """Two sequences computed the same first page. The owner of the published one leaves first."""
    pool = make_pool(4)
    cache = pool.cache
    ours, theirs, tail = pool.allocate(), pool.allocate(), pool.allocate()
    chain, other_chain = cache.start(b""), cache.start(b"")
    cache.publish(chain, [1, 2], ours)
    cache.publish(other_chain, [1, 2], theirs)
    cache.publish(other_chain, [3, 4], tail)
    pool.release(ours)
    pool.release_all([theirs, tail])
    assert (pool.num_free, pool.num_cached) == (1, 2)
    assert [pool.allocate() for _ in range(3)] == [theirs, tail, ours]


def test_evicting_a_head_whose_tail_is_owned_makes_the_tail_unfindable():
    pool = make_pool(4)
    cache = pool.cache
    ours, theirs, tail = pool.allocate(), pool.allocate(), pool.allocate()
    chain, other_chain = cache.start(b""), cache.start(b"")
    cache.publish(chain, [1, 2], ours)
    cache.publish(other_chain, [1, 2], theirs)
    cache.publish(other_chain, [3, 4], tail)
    pool.release(ours)
    assert pool.allocate() == ours
    assert not cache.is_published(tail)
    cache.publish(other_chain, [5, 6], theirs)
    assert not cache.is_published(theirs), "a chain without its head must not be extended"
    pool.check_integrity([[ours], [theirs, tail]])


class Owner:
    """What a sequence does with pages: `num_full` of them hold `tokens`, the first ones of which are published."""

    def __init__(self, tokens: list[int], pages: list[int], chain: Chain | None):
        self.tokens = tokens
        self.pages = pages
        self.chain = chain


@settings(max_examples=60, stateful_step_count=40, deadline=None)
class PoolMachine(RuleBasedStateMachine):
    """Sequences that come, grow, publish, fork and leave at random, over a pool that is too small for them."""

    owners = Bundle("owners")

    def __init__(self) -> None:
        super().__init__()
        # A hash of four bits: pages collide all the time, and still no lookup may return another content's page.
        self.pool = make_pool(8, lambda parent, content: bytes([sum(parent + content) % 16]))
        self.live: list[Owner] = []
        self.content: dict[int, list[int]] = {}  # what the owner's step wrote to the page, with all before it

    @rule(target=owners, tokens=st.lists(st.integers(0, 2), min_size=1, max_size=9), salt=st.sampled_from(SALTS))
    def add(self, tokens, salt):
        chain = self.pool.cache.start(salt)
        pages = self.pool.cache.lookup(chain, tokens, (len(tokens) - 1) // PAGE_SIZE)
        for index, page in enumerate(pages):
            self.pool.retain(page)
            assert self.content[page] == [salt, *tokens[: (index + 1) * PAGE_SIZE]], (
                "a page of another content was found"
            )
        owner = Owner([salt, *tokens[: len(pages) * PAGE_SIZE]], pages, chain)
        self.live.append(owner)
        return owner

    @precondition(lambda self: self.pool.num_available)
    @rule(owner=owners, tokens=st.lists(st.integers(0, 2), min_size=PAGE_SIZE, max_size=PAGE_SIZE))
    def grow(self, owner, tokens):
        if owner not in self.live:
            return
        page = self.pool.allocate()
        owner.pages.append(page)
        owner.tokens = owner.tokens + tokens
        self.content[page] = owner.tokens

    @rule(owner=owners)
    def publish(self, owner):
        chain = owner.chain
        if owner in self.live and chain is not None and chain.is_open and chain.num_pages < len(owner.pages):
            start = 1 + chain.num_pages * PAGE_SIZE
            self.pool.cache.publish(chain, owner.tokens[start : start + PAGE_SIZE], owner.pages[chain.num_pages])

    @rule(target=owners, owner=owners)
    def fork(self, owner):
        if owner not in self.live:
            return multiple()
        for page in owner.pages:
            self.pool.retain(page)
        fork = Owner(owner.tokens, list(owner.pages), None)
        self.live.append(fork)
        return fork

    @rule(owner=consumes(owners))
    def leave(self, owner):
        if owner in self.live:
            self.live.remove(owner)
            self.pool.release_all(owner.pages)

    @rule()
    def reset(self):
        self.pool.reset_cache()
        assert self.pool.num_cached == 0

    @invariant()
    def books_agree(self):
        self.pool.check_integrity([owner.pages for owner in self.live])
        for page, tokens in self.pool.cache.contents():
            assert self.content[page][1:] == tokens

    def teardown(self):
        for owner in self.live:
            self.pool.release_all(owner.pages)
        assert self.pool.num_free + self.pool.num_cached == self.pool.num_pages - 1
        for _ in range(self.pool.num_pages - 1):
            self.pool.allocate()
        assert self.pool.num_available == 0


TestPool = PoolMachine.TestCase
