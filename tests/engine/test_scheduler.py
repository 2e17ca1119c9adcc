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


# Order, budgets and pages


def test_decodes_go_first_and_prefill_gets_the_rest_of_the_budget():
    harness = Harness(max_num_batched_tokens=10)
    (first,) = harness.add(finite_prompt(8, 8))
    harness.step()
    (second,) = harness.add(finite_prompt(30, 8, seed=1))
    plan = harness.step()
    assert [work.seq for work in plan.decodes] == [first]
    assert [(work.seq, work.start, work.count, work.samples) for work in plan.prefills] == [(second, 0, 9, False)]
    assert (plan.num_tokens, plan.is_decode_only) == (10, False)
    assert [harness.step().prefills[0].count for _ in range(3)] == [9, 9, 3]
    assert harness.step().is_decode_only


def test_the_head_of_the_queue_is_never_overtaken():
    harness = Harness(num_pages=9, watermark=0.0)
    (first,) = harness.add(finite_prompt(16, 8))
    harness.step()
    (large,) = harness.add(finite_prompt(20, 4, seed=1), max_tokens=4)
    (small,) = harness.add(finite_prompt(3, 4, seed=2), max_tokens=4)
    while not first.is_finished:
        assert not large.is_running
        assert not small.is_running
        harness.step()
    harness.step()
    assert large.is_running
    assert small.is_running


def test_a_head_that_waits_for_pages_is_admitted_when_its_prefix_becomes_shareable():
    harness = Harness(num_pages=12, max_num_batched_tokens=16, watermark=0.0)
    prompt = finite_prompt(29, 8)
    harness.add(prompt)
    harness.step()
    (second,) = harness.add(prompt)
    harness.step()
    assert not second.is_running
    harness.step()
    assert second.is_running
    assert second.num_cached_tokens == 28


def test_smaller_priorities_are_admitted_first():
    harness = Harness(max_num_seqs=1, policy="priority")
    seqs = [harness.add(finite_prompt(4, 2, seed=i), priority=p, max_tokens=2)[0] for i, p in enumerate([1, 0, 1, -1])]
    order = []
    while harness.scheduler.has_work:
        order += [work.seq for work in harness.step().prefills]
    assert order == [seqs[3], seqs[1], seqs[0], seqs[2]]


def test_fcfs_ignores_priorities():
    harness = Harness(max_num_seqs=1)
    seqs = [harness.add(finite_prompt(4, 2, seed=i), priority=p, max_tokens=2)[0] for i, p in enumerate([1, 0])]
    order = []
    while harness.scheduler.has_work:
        order += [work.seq for work in harness.step().prefills]
    assert order == seqs


def test_the_least_urgent_then_latest_sequence_is_preempted_and_is_the_next_to_return():
    harness = Harness(num_pages=10, policy="priority", watermark=0.0)
    urgent = [harness.add(finite_prompt(8, 30, seed=i), priority=0, max_tokens=24)[0] for i in range(1)]
    lazy = [harness.add(finite_prompt(8, 30, seed=5 + i), priority=1, max_tokens=24)[0] for i in range(2)]
    (late_but_urgent,) = harness.add(finite_prompt(8, 30, seed=9), priority=0, max_tokens=24)
    while not harness.scheduler.stats().num_preemptions:
        harness.step()
    assert [seq.num_preemptions for seq in (*urgent, *lazy, late_but_urgent)] == [0, 0, 1, 0]
    (newcomer,) = harness.add(finite_prompt(4, 8, seed=20), priority=1)
    while not newcomer.is_running:
        harness.step()
        assert newcomer.num_dispatched == 0 or lazy[1].is_running or lazy[1].is_finished
    harness.drain()
    harness.check_outputs()


def test_admission_leaves_the_watermark_free_unless_nothing_runs():
    harness = Harness(num_pages=11, watermark=0.3)
    (first,) = harness.add(finite_prompt(40, 1)[:38], max_tokens=1)
    harness.step()
    assert first.is_finished, "alone, it may fill the pool"
    (second,) = harness.add(finite_prompt(16, 6, seed=1), max_tokens=6)
    (third,) = harness.add(finite_prompt(16, 6, seed=2), max_tokens=6)
    harness.step()
    assert second.is_running
    assert not third.is_running, "4 pages of 6 would leave less than 3 free"


def test_admitted_prompts_have_their_pages_reserved():
    harness = Harness(num_pages=17, max_num_batched_tokens=16, fixed_chunk=8, watermark=0.0)
    first, second = (harness.add(finite_prompt(40, 4, seed=i), max_tokens=4)[0] for i in range(2))
    harness.step()
    assert first.is_running
    assert not second.is_running, "16 pages do not hold two prompts of 10"
    harness.drain()
    assert harness.scheduler.stats().num_preemptions == 0


def test_without_chunked_prefill_a_prompt_is_one_piece():
    harness = Harness(max_num_batched_tokens=32, enable_chunked_prefill=False)
    first, second = (harness.add(finite_prompt(20, 4, seed=i), max_tokens=4)[0] for i in range(2))
    assert [(work.seq, work.count) for work in harness.step().prefills] == [(first, 20)]
    assert [(work.seq, work.count) for work in harness.step().prefills] == [(second, 20)]
    with pytest.raises(ParameterError, match=r"a step takes 32 tokens.*33 input tokens.*max_num_batched_tokens"):
        harness.add(prompt_of(33))


def test_fixed_chunks_do_not_depend_on_neighbours():
    harness = Harness(max_num_batched_tokens=20, fixed_chunk=8)
    seqs = [harness.add(finite_prompt(21, 8, seed=i))[0] for i in range(4)]
    cuts = {seq: [] for seq in seqs}
    while harness.scheduler.has_work:
        for work in harness.step().prefills:
            cuts[work.seq].append((work.start, work.count))
    assert all(cut == [(0, 8), (8, 8), (16, 5)] for cut in cuts.values())


def test_with_fixed_chunks_pages_are_reserved_and_nothing_is_preempted():
    harness = Harness(num_pages=7, max_num_batched_tokens=16, fixed_chunk=8, watermark=0.0)
    for length in (4, 3):
        harness.add(finite_prompt(length, 8))
    (late,) = harness.add(finite_prompt(16, 2, seed=2), max_tokens=2)
    cuts = []
    while harness.scheduler.has_work:
        cuts += [(work.start, work.count) for work in harness.step().prefills if work.seq is late]
    assert cuts == [(0, 8), (8, 8)]
    assert harness.scheduler.stats().num_preemptions == 0


def test_with_fixed_chunks_answers_are_not_shared():
    harness = Harness(fixed_chunk=8)
    (first,) = harness.add(finite_prompt(12, 8))
    harness.drain()
    (second,) = harness.add([*first.tokens, 1, 2])
    harness.drain()
    assert second.num_cached_tokens == 12 // harness.device.page_size * harness.device.page_size


def test_prefill_rows_are_limited():
    harness = Harness(max_prefill_rows=2)
    for seed in range(5):
        harness.add(finite_prompt(4, 8, seed=seed))
    assert [len(harness.step().prefills) for _ in range(3)] == [2, 2, 1]


def test_prompt_scores_come_in_steps_of_their_own_once_each_and_bypass_the_cache():
    harness = Harness(score_chunk=8)
    prompt = finite_prompt(20, 8, n=2)
    harness.add(prompt)
    harness.drain()
    first, second = harness.add(prompt, n=2, prompt_logprobs=1)
    plans = [harness.step() for _ in range(4)]
    assert [(plan.is_scoring, plan.prefills[0].start, plan.num_tokens) for plan in plans] == [
        (True, 0, 8),
        (True, 8, 8),
        (True, 16, 3),
        (False, 19, 1),
    ]
    harness.drain()
    harness.check_outputs()
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 16)


def test_scores_of_a_chunk_in_flight_are_not_given_twice_after_a_preemption():
    harness = Harness(num_pages=7, depth=3, score_chunk=15, watermark=0.0)
    (early,) = harness.add(finite_prompt(8, 8))
    (late,) = harness.add(finite_prompt(16, 8, seed=1), prompt_logprobs=1)
    harness.plan()
    assert harness.plan().is_scoring
    assert harness.plan().decodes[0].seq is early
    assert late.num_preemptions == 1
    harness.scheduler.abort(early.request_id)
    again = harness.plan()
    assert (again.is_scoring, again.prefills[0].start) == (True, 0)
    harness.drain()
    harness.check_outputs()


def test_a_step_scores_chunks_of_several_prompts_and_lets_more_in():
    harness = Harness(score_chunk=12)
    for seed, length in enumerate((6, 11, 4)):
        harness.add(finite_prompt(length, 2, seed=seed), max_tokens=2, prompt_logprobs=0)
    assert [(work.start, work.count) for work in harness.step().prefills] == [(0, 5), (0, 7)]
    assert [(work.start, work.count) for work in harness.step().prefills] == [(7, 3), (0, 3)]
    assert [(work.samples, work.count) for work in harness.step().prefills] == [(True, 1)] * 3
    harness.drain()
    harness.check_outputs()


def test_fixed_chunks_are_scored_whole_or_later():
    harness = Harness(score_chunk=8, fixed_chunk=8)
    for seed, length in enumerate((6, 11, 4)):
        harness.add(finite_prompt(length, 2, seed=seed), max_tokens=2, prompt_logprobs=0)
    assert [(work.start, work.count) for work in harness.step().prefills] == [(0, 5), (0, 3)]
    harness.drain()
    harness.check_outputs()


def test_scoring_leaves_every_second_step_to_the_decodes():
    harness = Harness(score_chunk=4, depth=1)
    (runs,) = harness.add(finite_prompt(4, 16), max_tokens=16)
    harness.step()
    harness.add(finite_prompt(20, 2, seed=1), max_tokens=2, prompt_logprobs=0)
    kinds = [harness.step().is_scoring for _ in range(8)]
    assert kinds[1:] == [True, False, True, False, True, False, True]
    assert not runs.is_finished


def test_scoring_leaves_every_second_step_to_prompts_that_are_not_scored():
    harness = Harness(score_chunk=4, max_num_seqs=4, max_num_batched_tokens=4, depth=1)
    for seed, scores in enumerate((0, None)):
        harness.add(finite_prompt(12, 1, seed=seed), max_tokens=1, prompt_logprobs=scores)
    kinds = [harness.step().is_scoring for _ in range(6)]
    assert kinds == [False, True, False, True, False, True]


def test_kv_waste_counts_the_empty_places_of_the_last_pages():
    harness = Harness(page_size=16)
    harness.add(finite_prompt(20, 8))
    harness.step()
    stats = harness.scheduler.stats()
    assert (stats.kv_allocated, stats.kv_wasted, stats.num_running) == (32, 12, 1)


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
