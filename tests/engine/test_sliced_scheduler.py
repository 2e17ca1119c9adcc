"""Requests over several slices: where each is placed, that none is lost, and that slices never share a page."""

from random import Random

import numpy as np
import pytest

from atoma_jax.engine.admission import SchedulerLimits
from atoma_jax.engine.pages import PagePool
from atoma_jax.engine.plan import SlicedPlan
from atoma_jax.engine.prefix_cache import PrefixCache
from atoma_jax.engine.sequence import Sequence
from atoma_jax.engine.sliced_scheduler import SlicedScheduler
from atoma_jax.errors import Overloaded, ParameterError
from atoma_jax.sampling_params import SamplingParams

PAGE = 4


def scheduler(slices: int = 2, *, num_pages: int = 17, **limits: object) -> SlicedScheduler:
    settings = {"max_num_seqs": 2, "max_num_batched_tokens": 16, "max_model_len": 40, **limits}
    pools = [PagePool(num_pages, PrefixCache(PAGE)) for _ in range(slices)]
    return SlicedScheduler(pools, SchedulerLimits(**settings))  # pyright: ignore[reportArgumentType]


def request(name: str, tokens: list[int], *, outputs: int = 3, n: int = 1, **settings: int) -> list[Sequence]:
    params = SamplingParams(max_tokens=outputs, n=n, ignore_eos=True, temperature=1.0)
    return [
        Sequence(request_id=name, index=index, tokens=list(tokens), params=params, **settings) for index in range(n)
    ]


def step(sliced: SlicedScheduler) -> SlicedPlan | None:
    """Plans and commits; every token is the number of outputs so far."""
    plan = sliced.plan()
    if plan is not None:
        tokens = [len(work.seq.output_tokens) for part in plan.slices for work in part.sampling]
        news = sliced.commit(plan, np.asarray(tokens, np.int32), np.ones(len(tokens), np.bool_))
        for committed in news:
            assert committed.token == tokens[committed.row]
    sliced.check_integrity()
    return plan


def drain(sliced: SlicedScheduler) -> int:
    steps = 0
    while sliced.has_work:
        assert step(sliced) is not None
        steps += 1
    return steps


def test_requests_go_to_the_slice_with_more_free_pages() -> None:
    sliced = scheduler()
    first, second, third = (request(name, list(range(length))) for name, length in (("a", 12), ("b", 8), ("c", 4)))
    for seqs in (first, second, third):
        sliced.add(seqs)
    step(sliced)
    assert [seqs[0].home for seqs in (first, second)] == [0, 1]
    assert third[0].home == 1
    drain(sliced)


def test_a_request_goes_where_its_prefix_is_known() -> None:
    sliced = scheduler()
    prefix = list(range(50, 58))
    sliced.add(request("other", [1] * 12, outputs=9))
    known = request("known", [*prefix, 1])
    sliced.add(known)
    while not known[0].is_finished:
        step(sliced)
    assert known[0].home == 1
    again = request("again", [*prefix, 2])
    sliced.schedulers[1].pool.allocate()  # it has fewer free pages than the other
    while sliced.schedulers[0].pool.num_available <= sliced.schedulers[1].pool.num_available:
        sliced.schedulers[1].pool.allocate()
    sliced.add(again)
    sliced.plan()
    assert again[0].home == 1
    assert again[0].num_cached_tokens == 8


def test_what_finds_no_slot_waits_for_whichever_slice_is_free_first() -> None:
    sliced = scheduler(max_num_seqs=1)
    long, short, waiting = request("a", [1, 2], outputs=12), request("b", [3, 4], outputs=2), request("c", [5, 6])
    for seqs in (long, short, waiting):
        sliced.add(seqs)
    step(sliced)
    assert sliced.num_waiting == 1
    while not waiting[0].is_running:
        step(sliced)
    assert not long[0].is_finished
    assert waiting[0].home == short[0].home != long[0].home
    drain(sliced)


def test_samples_of_a_request_share_a_slice_and_its_prompt() -> None:
    sliced = scheduler()
    seqs = request("a", list(range(9)), n=3)
    sliced.add(seqs)
    drain(sliced)
    assert len({seq.home for seq in seqs}) == 1
    assert [seq.num_cached_tokens for seq in seqs] == [0, 8, 8]


def test_order_is_that_of_priorities_then_of_arrival() -> None:
    sliced = scheduler(max_num_seqs=1, policy="priority")
    names = {"late": 5, "first": 1, "second": 1, "third": 2}
    seqs = {name: request(name, [1, 2], priority=priority) for name, priority in names.items()}
    for one in seqs.values():
        sliced.add(one)
    step(sliced)
    assert [name for name, (seq,) in seqs.items() if seq.is_running or seq.output_tokens] == ["first", "second"]
    drain(sliced)


def test_refusals_are_those_of_one_slice() -> None:
    sliced = scheduler(max_waiting=2)
    sliced.add(request("a", [1]))
    with pytest.raises(ParameterError, match="'a' is in use"):
        sliced.add(request("a", [2]))
    with pytest.raises(ParameterError, match="maximum context length is 40"):
        sliced.add(request("long", [1] * 41))
    sliced.add(request("b", [1]))
    with pytest.raises(Overloaded, match="2 sequences wait already"):
        sliced.add(request("c", [1]))
    drain(sliced)
    sliced.add(request("a", [1]))  # its name is free again
    drain(sliced)


@pytest.mark.parametrize("seed", range(4))
def test_random_traffic_finishes_and_gives_every_page_back(seed: int) -> None:
    rng = Random(seed)
    sliced = scheduler(3, num_pages=13, max_num_seqs=3)
    seqs: list[Sequence] = []
    for index in range(40):
        prompt = [rng.randrange(3) for _ in range(rng.randrange(1, 25))]
        seqs += (new := request(f"r{index}", prompt, outputs=rng.randrange(1, 15), n=rng.choice((1, 1, 2))))
        sliced.add(new)
        for _ in range(rng.randrange(3)):
            step(sliced)
        if rng.random() < 0.2:
            sliced.abort(rng.choice(seqs).request_id)
    drain(sliced)
    assert all(seq.is_finished for seq in seqs)
    assert all(seq.output_tokens == list(range(len(seq.output_tokens))) for seq in seqs)
    stats = sliced.stats()
    assert stats.pages_owned == 0
    assert stats.num_preemptions > 0
    assert len({seq.home for seq in seqs}) == 3
