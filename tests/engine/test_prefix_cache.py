"""The prefix cache finds the longest known prefix of whole pages, and never a page of another content or salt."""

import pytest

from atoma_jax.engine.prefix_cache import Chain, PrefixCache, blake2b_key

SIZE = 4


def publish(cache: PrefixCache, tokens: list[int], pages: list[int], salt: bytes = b"") -> Chain:
    chain = cache.start(salt)
    for index, page in enumerate(pages):
        cache.publish(chain, tokens[index * SIZE : (index + 1) * SIZE], page)
    return chain


def lookup(cache: PrefixCache, tokens: list[int], salt: bytes = b"", max_pages: int = 100) -> list[int]:
    return cache.lookup(cache.start(salt), tokens, max_pages)


def test_the_longest_chain_of_full_pages_is_found():
    cache = PrefixCache(SIZE)
    publish(cache, list(range(12)), [5, 3, 9])
    assert lookup(cache, list(range(12))) == [5, 3, 9]
    assert lookup(cache, list(range(11))) == [5, 3]
    assert lookup(cache, [*range(8), 0, 0, 0, 0]) == [5, 3]
    assert lookup(cache, list(range(12)), max_pages=1) == [5]
    assert lookup(cache, list(range(3))) == []
    assert lookup(cache, []) == []


def test_equal_tokens_after_another_prefix_are_not_found():
    cache = PrefixCache(SIZE)
    publish(cache, [0, 0, 0, 0, 1, 1, 1, 1], [1, 2])
    assert lookup(cache, [1, 1, 1, 1]) == []
    assert lookup(cache, [2, 2, 2, 2, 1, 1, 1, 1]) == []


def test_two_salts_share_nothing():
    cache = PrefixCache(SIZE)
    publish(cache, [1] * 8, [1, 2], salt=b"alice")
    assert lookup(cache, [1] * 8, salt=b"bob") == []
    assert lookup(cache, [1] * 8) == []
    publish(cache, [1] * 8, [3, 4], salt=b"bob")
    assert lookup(cache, [1] * 8, salt=b"alice") == [1, 2]
    assert lookup(cache, [1] * 8, salt=b"bob") == [3, 4]


def test_forced_collisions_give_no_false_hit():
    cache = PrefixCache(SIZE, hash_function=lambda parent, content: b"the same for everything")
    publish(cache, [1] * 4, [1], salt=b"alice")
    assert lookup(cache, [1] * 4, salt=b"alice") == [1]
    assert lookup(cache, [2] * 4, salt=b"alice") == []
    assert lookup(cache, [1] * 4, salt=b"bob") == []
    assert lookup(cache, [1] * 8, salt=b"alice") == [1], "the second page's key is known, its parent is not the same"


def test_a_page_whose_key_is_taken_by_another_content_is_not_published_and_neither_is_what_follows():
    taken = iter([b"root", b"a", b"root", b"a", b"b"])
    cache = PrefixCache(SIZE, hash_function=lambda parent, content: next(taken))
    publish(cache, [1] * 4, [1])
    chain = publish(cache, [2] * 8, [2, 3])
    assert not chain.is_open
    assert not cache.is_published(2)
    assert not cache.is_published(3)


def test_the_first_copy_of_a_content_stays_and_chains_go_on_behind_it():
    cache = PrefixCache(SIZE)
    publish(cache, [1] * 4, [1])
    publish(cache, [1] * 8, [2, 3])
    assert lookup(cache, [1] * 8) == [1, 3]
    assert not cache.is_published(2)


def test_a_reset_forgets_all_and_chains_that_began_before_it_publish_nothing():
    cache = PrefixCache(SIZE)
    empty, begun = cache.start(b""), publish(cache, [1] * 4, [1])
    assert cache.park(1)
    assert cache.reset() == [1]
    assert lookup(cache, [1] * 4) == []
    cache.publish(empty, [1] * 4, 2)
    cache.publish(begun, [1] * 4, 3)
    assert not cache.is_published(2)
    assert not cache.is_published(3)
    publish(cache, [1] * 4, [4])
    assert lookup(cache, [1] * 4) == [4]


def test_unpublished_pages_are_not_parked():
    assert not PrefixCache(SIZE).park(1)


def test_a_lookup_that_ended_early_names_the_key_it_missed():
    cache = PrefixCache(SIZE)
    publish(cache, [1] * 4, [1])
    chain = cache.start(b"")
    cache.lookup(chain, [1] * 8, 2)
    assert chain.missing is not None
    assert not cache.knows(chain.missing)
    publish(cache, [1] * 8, [5, 6])
    assert cache.knows(chain.missing)


@pytest.mark.parametrize("other", [[1, 2, 3, 5], [1, 2, 3], [4, 3, 2, 1]])
def test_the_key_depends_on_every_token_their_order_and_the_parent(other):
    def content(tokens: list[int]) -> bytes:
        return b"".join(token.to_bytes(4, "little") for token in tokens)

    key = blake2b_key(b"parent", content([1, 2, 3, 4]))
    assert len(key) == 16
    assert key != blake2b_key(b"parent", content(other))
    assert key != blake2b_key(b"another", content([1, 2, 3, 4]))
