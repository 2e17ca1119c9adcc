"""What the scheduler takes first, how much of it, and on which pages."""

import pytest

from atoma_jax.errors import ParameterError
from tests.engine.fake_device import Harness, finite_prompt, prompt_of


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
