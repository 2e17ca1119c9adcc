"""Outputs: the logprobs of a position, and the times of a request."""

from atoma_jax.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput, position_logprobs


def test_the_chosen_token_comes_first_and_beside_the_asked_number():
    entry = position_logprobs(
        token_id=7, logprob=-9.0, rank=40, top_ids=[3, 5], top_logprobs=[-0.5, -1.0], decode=lambda token: f"<{token}>"
    )
    assert list(entry.items()) == [
        (7, Logprob(-9.0, 40, "<7>")),
        (3, Logprob(-0.5, 1, "<3>")),
        (5, Logprob(-1.0, 2, "<5>")),
    ]


def test_a_chosen_token_among_the_likeliest_has_one_entry():
    entry = position_logprobs(token_id=5, logprob=-1.0, rank=2, top_ids=[3, 5], top_logprobs=[-0.5, -1.0], decode=None)
    assert entry == {5: Logprob(-1.0, 2, None), 3: Logprob(-0.5, 1, None)}


def test_times_are_spans_between_what_has_happened():
    metrics = RequestMetrics(arrival_time=10.0)
    assert metrics.queue_time is None
    assert metrics.time_per_output_token is None
    metrics.first_scheduled_time = 11.0
    metrics.first_token_time = 13.0
    metrics.num_generation_tokens = 1
    metrics.last_token_time = 13.0
    assert (metrics.queue_time, metrics.prefill_time, metrics.time_to_first_token) == (1.0, 2.0, 3.0)
    assert metrics.time_per_output_token is None
    metrics.num_generation_tokens = 5
    metrics.last_token_time = 15.0
    metrics.finished_time = 16.0
    assert (metrics.decode_time, metrics.time_per_output_token, metrics.e2e_time) == (2.0, 0.5, 6.0)


def test_a_sample_is_finished_when_it_has_a_reason():
    sample = CompletionOutput(index=0, text="", token_ids=[])
    assert not sample.finished()
    sample.finish_reason = "length"
    assert sample.finished()
    output = RequestOutput(request_id="a", prompt=None, prompt_token_ids=[1], outputs=[sample], finished=True)
    assert output.num_cached_tokens == 0
