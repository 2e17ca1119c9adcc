"""What the scheduler promises, case by case, over a device that remembers what every (page, offset) holds."""

import pytest

from atoma_jax.engine.sequence import Sequence
from atoma_jax.errors import ConfigError, Overloaded, ParameterError
from tests.engine.fake_device import EOS, STOP, Harness, finite_prompt, model, prompt_of


@pytest.mark.parametrize("depth", [0, 1])
def test_a_request_aborted_in_its_prefill_leaves_nothing_in_the_cache(depth):
    harness = Harness(depth=depth, max_num_batched_tokens=16)
    (seq,) = harness.add(prompt_of(60))
    harness.step()
    harness.step()
    assert 0 < seq.num_dispatched < 60
    harness.scheduler.abort(seq.request_id)
    assert harness.pool.num_free == harness.pool.num_pages - 1
    harness.drain()
    assert harness.pool.num_free == harness.pool.num_pages - 1


def test_pages_are_found_only_after_the_step_that_filled_them_has_committed():
    harness = Harness()
    harness.add(prompt_of(16))
    harness.plan()
    assert harness.pool.cache.contents() == []
    harness.commit()
    assert len(harness.pool.cache.contents()) == 4


@pytest.mark.parametrize("caching", [True, False])
def test_samples_of_one_request_share_the_pages_of_its_prompt(caching):
    harness = Harness(enable_prefix_caching=caching)
    prompt = finite_prompt(18, 8, n=3)
    first, *others = harness.add(prompt, n=3)
    plan = harness.step()
    assert [work.seq for work in plan.works] == [first]
    assert harness.scheduler.num_waiting == 2
    plan = harness.step()
    assert [(work.seq, work.start, work.count) for work in plan.prefills] == [(seq, 16, 2) for seq in others]
    assert all(seq.pages[:4] == first.pages[:4] and seq.pages[4] != first.pages[4] for seq in others)
    assert [harness.pool.num_owners(page) for page in first.pages[:4]] == [3] * 4
    harness.drain()
    harness.check_outputs()
    assert len({tuple(seq.output_tokens) for seq in harness.seqs}) == 3


def test_samples_that_wait_for_the_first_one_go_on_without_it():
    harness = Harness()
    first, second, third = harness.add(finite_prompt(8, 8, n=3), n=3)
    harness.scheduler.finish(first, "stop", "text")
    harness.drain()
    harness.check_outputs()
    assert [seq.finish_reason for seq in (second, third)] == ["length", "length"]


def test_a_preempted_sequence_returns_only_after_its_tokens_in_flight_have_arrived():
    harness = Harness(num_pages=7, depth=1, watermark=0.0)
    early, late = (harness.add(finite_prompt(8, 16, seed=i), max_tokens=16)[0] for i in range(2))
    while not late.num_preemptions:
        if len(harness.in_flight) > 1:
            harness.commit()
        harness.plan()
    assert late.num_pending == 1
    harness.scheduler.abort(early.request_id)
    assert harness.scheduler.plan() is None, "there is room, but the token of the step in flight is not known"
    harness.drain()
    harness.check_outputs()


def test_without_prefix_caching_requests_share_nothing():
    harness = Harness(enable_prefix_caching=False)
    prompt = finite_prompt(16, 8, n=2)
    for n in (1, 2, 2):
        first = harness.add(prompt, n=n)[0]
        harness.drain()
        assert first.num_cached_tokens == 0
    assert harness.scheduler.stats().prefix_queried_tokens == 0


def test_salts_separate_prefixes():
    harness = Harness()
    prompt = finite_prompt(17, 8)
    cached = []
    for salt in ("alice", "bob", None, "alice"):
        (seq,) = harness.add(prompt, salt=salt)
        harness.drain()
        cached.append(seq.num_cached_tokens)
    assert cached == [0, 0, 0, 16]


def test_the_last_prompt_token_is_computed_even_if_all_of_it_is_cached():
    harness = Harness()
    prompt = finite_prompt(16, 8)
    harness.add(prompt)
    harness.drain()
    (seq,) = harness.add(prompt)
    plan = harness.step()
    assert seq.num_cached_tokens == 12
    assert (plan.prefills[0].start, plan.prefills[0].count) == (12, 4)
    assert harness.scheduler.stats().prefix_hit_tokens == 12
    assert harness.scheduler.stats().prefix_queried_tokens == 32


def test_the_next_turn_of_a_chat_finds_the_answer_of_the_last():
    harness = Harness()
    (first,) = harness.add(finite_prompt(10, 12), max_tokens=12)
    harness.drain()
    (second,) = harness.add([*first.tokens, 3, 4])
    harness.step()
    assert second.num_cached_tokens == 20, "21 positions of 22 tokens have KV, and pages hold 4"


def test_after_a_reset_what_runs_is_not_published():
    harness = Harness()
    (seq,) = harness.add(finite_prompt(10, 30), max_tokens=30)
    harness.step()
    harness.pool.reset_cache()
    harness.drain()
    assert seq.finish_reason == "length"
    assert harness.pool.num_free == harness.pool.num_pages - 1


# NaN, ends and aborts


def test_a_row_of_nan_ends_its_request_alone_and_its_pages_are_not_cached():
    harness = Harness(max_num_batched_tokens=8)
    seed = next(seed for seed in range(10_000) if not model(prompt_of(14, seed), 0)[1])
    (neighbour,) = harness.add(finite_prompt(5, 8))
    (broken,) = harness.add(prompt_of(14, seed))
    while not broken.is_finished:
        harness.step()
    assert (broken.finish_reason, broken.output_tokens) == ("error", [])
    harness.drain()
    harness.check_outputs()
    assert neighbour.finish_reason == "length"
    assert all(prefix == neighbour.tokens[: len(prefix)] for _, prefix in harness.pool.cache.contents())


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_a_sequence_ends_exactly_at_the_maximum_length(depth):
    harness = Harness(depth=depth, max_model_len=20)
    (seq,) = harness.add(finite_prompt(7, 13), max_tokens=500)
    harness.drain()
    harness.check_outputs()
    assert (len(seq.tokens), seq.finish_reason) == (20, "length")
    assert max(position for _, position in harness.device.kv.values()) == 18, "the last token needs no KV"


def test_a_sequence_that_fills_the_whole_pool_ends_by_length():
    harness = Harness(num_pages=5, max_model_len=100)
    (seq,) = harness.add(finite_prompt(7, 10), max_tokens=90)
    harness.drain()
    assert (len(seq.tokens), seq.finish_reason) == (17, "length")
    assert seq.num_preemptions == 0


@pytest.mark.parametrize("ignore_eos", [True, False])
def test_a_token_sampled_after_the_end_was_in_flight_is_dropped_and_pages_come_back_at_once(ignore_eos):
    harness = Harness(depth=1)
    seed = next(s for s in range(10_000) if model(prompt_of(8, s), 0) == (STOP, True))
    (seq,) = harness.add(prompt_of(8, seed), stop_token_ids=[STOP], ignore_eos=ignore_eos)
    harness.plan()
    stale = harness.plan()
    assert stale.decodes[0].token_on_device
    (news,) = harness.commit()
    assert (news.token, seq.finish_reason, seq.stop_reason) == (STOP, "stop", STOP)
    assert harness.pool.num_owned == 0
    assert harness.commit() == []
    assert seq.output_tokens == [STOP]


def test_the_end_of_sequence_token_has_no_stop_reason_and_can_be_ignored():
    seed = next(s for s in range(10_000) if model(prompt_of(8, s), 0) == (EOS, True))
    harness = Harness()
    (heeds,) = harness.add(prompt_of(8, seed), ignore_eos=False)
    (ignores,) = harness.add(prompt_of(8, seed), ignore_eos=True)
    (stops,) = harness.add(prompt_of(8, seed), ignore_eos=True, stop_token_ids=[EOS])
    harness.step()
    assert (heeds.finish_reason, heeds.stop_reason) == ("stop", None)
    assert not ignores.is_finished
    assert (stops.finish_reason, stops.stop_reason) == ("stop", EOS)


def test_no_step_is_planned_beyond_the_last_token_by_count():
    harness = Harness(depth=1)
    harness.add(finite_prompt(4, 2), max_tokens=2)
    assert harness.plan().prefills
    assert harness.plan().decodes
    assert harness.plan() is None


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("state", ["queued", "held", "prefill", "decode", "preempted"])
def test_an_abort_in_any_state_brings_every_page_back_at_once(state, depth):
    harness = Harness(num_pages=12, depth=depth, max_num_batched_tokens=16, watermark=0.0)
    seqs = harness.add(finite_prompt(20, 30, n=2), n=2, max_tokens=30)
    if state == "preempted":
        (other,) = harness.add(finite_prompt(4, 30, seed=1), max_tokens=30)
        while not any(seq.num_preemptions for seq in (*seqs, other)):
            harness.step()
        preempted = next(seq for seq in (*seqs, other) if seq.num_preemptions)
        assert not preempted.is_running
        assert preempted in harness.scheduler.abort(preempted.request_id)
    else:
        for _ in range({"queued": 0, "held": 1, "prefill": 1, "decode": 6}[state]):
            harness.step()
        assert harness.scheduler.abort(seqs[0].request_id) == seqs
    for seq in harness.seqs:
        harness.scheduler.abort(seq.request_id)
    assert harness.pool.num_owned == 0
    assert not harness.scheduler.has_work
    harness.drain()
    assert harness.scheduler.abort("no such request") == []


def test_a_finish_seen_by_the_detokenizer_replaces_the_reason_of_the_same_token():
    harness = Harness()
    (seq,) = harness.add(finite_prompt(4, 1), max_tokens=1)
    harness.step()
    assert seq.finish_reason == "length"
    harness.scheduler.finish(seq, "stop", "text")
    assert (seq.finish_reason, seq.stop_reason) == ("stop", "text")


# Refusals


@pytest.mark.parametrize(
    ("length", "limits", "message"),
    [
        (0, {}, "contains no tokens"),
        (33, {"max_model_len": 32}, r"maximum context length is 32 tokens.*contains 33 input tokens, which exceeds"),
        (32, {"max_model_len": 32}, r"maximum context length is 32 tokens.*no room for an output token"),
        (60, {"num_pages": 16}, r"KV cache holds 60 tokens.*contains 60 input tokens"),
    ],
)
def test_a_prompt_that_can_never_run_is_refused_by_name(length, limits, message):
    harness = Harness(**limits)
    with pytest.raises(ParameterError, match=message) as caught:
        harness.add(prompt_of(length))
    assert (caught.value.field, caught.value.value) == ("prompt", length)
    assert not harness.scheduler.has_work


def test_a_full_queue_refuses_and_keeps_what_it_has():
    harness = Harness(max_num_seqs=1, max_waiting=3)
    harness.add(finite_prompt(4, 8), n=2)
    with pytest.raises(
        Overloaded, match="2 sequences wait already and max_num_queued_reqs is 3: no room for 2 more"
    ) as caught:
        harness.add(finite_prompt(4, 8), n=2)
    assert caught.value.retry_after > 0
    assert harness.scheduler.num_waiting == 2
    harness.drain()
    harness.check_outputs()


def test_a_request_id_in_use_is_refused():
    harness = Harness()
    (seq,) = harness.add(prompt_of(4))
    with pytest.raises(ParameterError, match="in use"):
        harness.scheduler.add([Sequence(request_id=seq.request_id, index=0, tokens=[2], params=seq.params)])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_num_seqs", 0),
        ("max_model_len", 1),
        ("max_num_batched_tokens", 7),
        ("max_prefill_rows", 0),
        ("max_waiting", 0),
        ("fixed_chunk", 0),
        ("fixed_chunk", 65),
        ("score_chunk", 0),
        ("watermark", 1.0),
        ("watermark", float("nan")),
        ("policy", "lifo"),
    ],
)
def test_limits_that_make_no_sense_are_refused_by_name(field, value):
    with pytest.raises(ConfigError, match=field) as caught:
        Harness(**{field: value})
    assert caught.value.field == field


def test_fixed_chunks_need_chunked_prefill():
    with pytest.raises(ConfigError, match="enable_chunked_prefill"):
        Harness(fixed_chunk=8, enable_chunked_prefill=False)
