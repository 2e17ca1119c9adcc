"""The scheduler under random traffic: each sequence reads its own tokens only and yields what it yields alone."""

import random
from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from atoma_jax.errors import Overloaded, ParameterError
from tests.engine.fake_device import STOP, Harness, prompt_of


@settings(max_examples=50, stateful_step_count=30, deadline=None)
class SchedulerMachine(RuleBasedStateMachine):
    """Requests of few prompt families come and go over a pool that is too small for them."""

    @initialize(
        num_pages=st.integers(4, 16),
        page_size=st.integers(1, 4),
        depth=st.integers(0, 2),
        max_num_seqs=st.integers(1, 5),
        budget=st.integers(5, 24),
        policy=st.sampled_from(["fcfs", "priority"]),
        chunking=st.sampled_from([None, None, 3, "off"]),
        caching=st.booleans(),
        rows=st.sampled_from([None, 1, 2]),
    )
    def start(self, num_pages, page_size, depth, max_num_seqs, budget, policy, chunking, caching, rows):
        self.harness = Harness(
            num_pages,
            page_size,
            depth,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=budget,
            max_model_len=40,
            policy=policy,
            enable_chunked_prefill=chunking != "off",
            fixed_chunk=None if chunking == "off" else chunking,
            enable_prefix_caching=caching,
            max_prefill_rows=rows,
            max_waiting=12,
            score_chunk=3,
        )

    @rule(
        family=st.integers(0, 2),
        length=st.integers(1, 24),
        tail=st.integers(0, 3),
        n=st.sampled_from([1, 1, 1, 2, 3]),
        priority=st.integers(-1, 1),
        salt=st.sampled_from([None, "a"]),
        max_tokens=st.integers(1, 16),
        ignore_eos=st.booleans(),
        stop=st.booleans(),
        scores=st.sampled_from([None, None, None, 1]),
    )
    def add(self, family, length, tail, n, priority, salt, max_tokens, ignore_eos, stop, scores):
        harness = self.harness
        prompt = prompt_of(length, family) + [2 + tail] * (tail > 0)
        before = (harness.scheduler.num_waiting, harness.pool.num_available)
        limits = harness.limits
        capacity = (harness.pool.num_pages - 1) * harness.device.page_size
        too_long = len(prompt) + 1 > min(capacity, limits.max_model_len) or (
            not limits.enable_chunked_prefill and len(prompt) > limits.max_num_batched_tokens
        )
        full = before[0] + n > limits.max_waiting
        params = {
            "max_tokens": max_tokens,
            "ignore_eos": ignore_eos,
            "stop_token_ids": [STOP] if stop else None,
            "prompt_logprobs": scores,
        }
        if too_long or full:
            with pytest.raises(ParameterError if too_long else Overloaded):
                harness.add(prompt, n, priority, salt, **params)
            assert (harness.scheduler.num_waiting, harness.pool.num_available) == before
        else:
            harness.add(prompt, n, priority, salt, **params)

    @rule(count=st.integers(1, 8))
    def step(self, count):
        for _ in range(count):
            self.harness.step()

    @rule(which=st.integers(0, 30))
    def abort(self, which):
        harness = self.harness
        if harness.seqs:
            name = harness.seqs[which % len(harness.seqs)].request_id
            unfinished = [seq for seq in harness.seqs if seq.request_id == name and not seq.is_finished]
            assert harness.scheduler.abort(name) == unfinished
            assert all(seq.finish_reason == "abort" and not seq.pages for seq in unfinished)

    @rule(which=st.integers(0, 30))
    def stop_string(self, which):
        candidates = [seq for seq in self.harness.seqs if seq.output_tokens and not seq.is_finished]
        if candidates:
            self.harness.scheduler.finish(candidates[which % len(candidates)], "stop", "text")

    @rule()
    def reset_cache(self):
        self.harness.pool.reset_cache()

    @invariant()
    def books_agree(self):
        if hasattr(self, "harness"):
            self.harness.check()

    def teardown(self):
        if hasattr(self, "harness"):
            self.harness.drain()
            self.harness.check_outputs()


TestTraffic = SchedulerMachine.TestCase


@pytest.mark.parametrize(("depth", "policy"), [(0, "fcfs"), (1, "fcfs"), (1, "priority")])
def test_two_hundred_random_requests_yield_what_each_yields_alone(depth, policy):
    rng = random.Random(depth)
    harness = Harness(40, 4, depth, max_num_seqs=6, max_num_batched_tokens=24, policy=policy, score_chunk=8)
    harness.check_every = 5
    for _ in range(200):
        prompt = prompt_of(rng.randrange(1, 30), rng.randrange(3)) + prompt_of(rng.randrange(1, 9), rng.randrange(99))
        seqs = harness.add(
            prompt,
            n=rng.choice([1, 1, 1, 3]),
            priority=rng.randrange(3),
            max_tokens=rng.randrange(1, 60),
            ignore_eos=rng.random() < 0.8,
            stop_token_ids=[STOP] if rng.random() < 0.3 else None,
            prompt_logprobs=1 if rng.random() < 0.1 else None,
        )
        for _ in range(rng.randrange(12)):
            harness.step()
        if rng.random() < 0.2:
            harness.scheduler.abort(seqs[0].request_id)
    harness.drain()
    harness.check_outputs()
    stats = harness.scheduler.stats()
    reasons = Counter(seq.finish_reason for seq in harness.seqs)
    assert set(reasons) == {"stop", "length", "abort", "error"}, "the traffic does not test what it says"
    assert stats.num_preemptions > 20
    assert 0 < stats.prefix_hit_tokens < stats.prefix_queried_tokens
    assert (stats.kv_allocated, stats.kv_wasted, stats.pages_owned) == (0, 0, 0)


# Shared prompts and cancellation


def test_after_cancelled_prefills_no_request_reads_a_foreign_tag():
    """A prefix for all, a tag for each, a quarter aborted in mid-prefill, ten rounds. The device checks every read."""
    harness = Harness(60, 4, 1, max_num_seqs=8, max_num_batched_tokens=16)
    shared = prompt_of(10)
    for _ in range(10):
        requests = [harness.add([*shared, *prompt_of(14, seed=tag)])[0] for tag in range(12)]
        for victim in requests[::4]:
            while not (victim.is_running and 0 < victim.num_dispatched < victim.prompt_len):
                harness.step()
                if victim.is_finished or not victim.prefilling:
                    break
            harness.scheduler.abort(victim.request_id)
        harness.drain()
    harness.check_outputs()
