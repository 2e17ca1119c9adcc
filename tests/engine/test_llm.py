"""The offline interface: what streams show adds up, stops hold, and logprobs are those of the model."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from random import Random
from typing import Any

import pytest

from atoma_jax import LLM, RequestOutput, RequestOutputKind, SamplingParams, UserError
from atoma_jax.config import EngineConfig
from tests.engine.conftest import SIZES
from tests.engine.traffic import brief, same_output
from tests.tiny_model import CHAT_TEMPLATE

GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
DELTA, CUMULATIVE, FINAL = RequestOutputKind.DELTA, RequestOutputKind.CUMULATIVE, RequestOutputKind.FINAL_ONLY

Message = dict[str, Any]


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return Random(seed).choices(range(3, 259), k=length)


def one(llm: LLM, prompt: Any, params: SamplingParams) -> RequestOutput:
    (output,) = llm.generate(prompt, params, use_tqdm=False)
    return output


@pytest.fixture
def words(llm: LLM) -> Callable[..., SamplingParams]:
    """Settings under which the model writes letters alone, so that stop strings are common."""
    letters = [llm.get_tokenizer().token_to_id(chr(code)) for code in range(ord("a"), ord("f"))]
    return lambda **settings: SamplingParams(
        **{"temperature": 1, "seed": 5, "max_tokens": 40, "allowed_token_ids": letters} | settings
    )


class TestGenerate:
    def test_prompts_of_every_form_come_back_in_order(self, llm: LLM) -> None:
        text = "Hello"
        ids = llm.get_tokenizer().encode(text)
        prompts = [text, {"prompt": text}, {"prompt_token_ids": ids}, ids, {"prompt": "seen", "prompt_token_ids": ids}]
        outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
        assert [output.prompt for output in outputs] == [text, text, None, None, "seen"]
        assert {tuple(output.prompt_token_ids) for output in outputs} == {tuple(ids)}
        for output in outputs[1:]:
            same_output(output, outputs[0])

    def test_one_prompt_needs_no_list(self, llm: LLM) -> None:
        assert len(llm.generate("Hello", GREEDY, use_tqdm=False)) == 1
        assert len(llm.generate([5, 6, 7], GREEDY, use_tqdm=False)) == 1
        assert len(llm.generate([[5, 6, 7]], GREEDY, use_tqdm=False)) == 1
        assert llm.generate([], GREEDY, use_tqdm=False) == []

    def test_each_prompt_may_have_its_own_settings(self, llm: LLM) -> None:
        params = [replace(GREEDY, max_tokens=count) for count in (3, 1, 7)]
        outputs = llm.generate([[5], [6], [7]], params, use_tqdm=False)
        assert [len(output.outputs[0].token_ids) for output in outputs] == [3, 1, 7]

    def test_the_defaults_are_those_of_the_interface(self, llm: LLM) -> None:
        (output,) = llm.generate([[5]], use_tqdm=False)
        assert len(output.outputs[0].token_ids) <= 16

    @pytest.mark.parametrize(
        ("arguments", "field"),
        [
            ({"sampling_params": [GREEDY]}, "sampling_params"),
            ({"sampling_params": [GREEDY] * 3}, "sampling_params"),
            ({"priority": [1]}, "priority"),
        ],
    )
    def test_lists_must_fit_the_prompts(self, llm: LLM, arguments: dict[str, Any], field: str) -> None:
        with pytest.raises(UserError, match=r"for each of the 2 prompts") as caught:
            llm.generate([[5], [6]], use_tqdm=False, **arguments)
        assert caught.value.field == field

    def test_one_bad_prompt_runs_none(self, llm: LLM) -> None:
        with pytest.raises(UserError):
            llm.generate([[5], [6], []], GREEDY, use_tqdm=False)
        assert not llm.llm_engine.has_work
        assert llm.stats().steps == 0

    def test_a_progress_bar_counts_prompts(self, llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
        llm.generate([[5], [6]], replace(GREEDY, max_tokens=2))
        assert "2/2" in capsys.readouterr().err

    def test_end_tokens_end_an_answer(self, llm: LLM) -> None:
        end = llm.get_tokenizer().token_to_id("<|im_end|>")
        force = replace(GREEDY, logit_bias={end: 100.0})
        ended = one(llm, [[5]], replace(force, ignore_eos=False)).outputs[0]
        assert (ended.token_ids, ended.text, ended.finish_reason, ended.stop_reason) == ([end], "", "stop", None)
        kept = one(llm, [[5]], replace(force, ignore_eos=False, min_tokens=4)).outputs[0]
        assert len(kept.token_ids) == 5
        assert end not in kept.token_ids[:4]
        assert len(one(llm, [[5]], force).outputs[0].token_ids) == 24
        asked = one(llm, [[5]], replace(GREEDY, logit_bias={77: 100.0}, stop_token_ids=[77])).outputs[0]
        assert (asked.token_ids, asked.finish_reason, asked.stop_reason) == ([77], "stop", 77)

    def test_times_are_in_order(self, llm: LLM) -> None:
        metrics = one(llm, [prompt_of(70)], GREEDY).metrics
        moments = [
            metrics.arrival_time,
            metrics.first_scheduled_time,
            metrics.first_token_time,
            metrics.last_token_time,
            metrics.finished_time,
        ]
        assert moments == sorted(moments)
        assert metrics.num_generation_tokens == 24

    def test_clients_read_the_models_length(self, llm: LLM) -> None:
        assert llm.llm_engine.model_config.max_model_len == 96

    def test_requests_without_a_seed_differ_and_a_seed_repeats(self, llm: LLM) -> None:
        free = SamplingParams(max_tokens=8, ignore_eos=True)
        drawn = {tuple(one(llm, [[5, 6]], free).outputs[0].token_ids) for _ in range(4)}
        assert len(drawn) > 1
        seeded = {tuple(one(llm, [[5, 6]], replace(free, seed=3)).outputs[0].token_ids) for _ in range(4)}
        assert len(seeded) == 1


class TestChat:
    MESSAGES: tuple[Message, ...] = ({"role": "user", "content": "Hi <|im_end|> there"},)

    def test_a_conversation_is_rendered_by_the_models_template(self, llm: LLM) -> None:
        rendered = llm.render(self.MESSAGES)
        assert rendered["prompt"] == "<|im_start|>user\nHi <|im_end|> there<|im_end|>\n<|im_start|>assistant\n"
        (output,) = llm.chat(self.MESSAGES, GREEDY, use_tqdm=False)
        assert output.prompt_token_ids == rendered["prompt_token_ids"]
        assert output.prompt == rendered["prompt"]
        start = llm.get_tokenizer().token_to_id("<|im_start|>")
        assert output.prompt_token_ids.count(start) == 2

    def test_many_conversations(self, llm: LLM) -> None:
        outputs = llm.chat([self.MESSAGES, [{"role": "user", "content": "Bye"}]], GREEDY, use_tqdm=False)
        assert len(outputs) == 2
        same_output(outputs[0], llm.chat(self.MESSAGES, GREEDY, use_tqdm=False)[0])

    def test_another_template_and_no_generation_prompt(self, llm: LLM) -> None:
        template = CHAT_TEMPLATE.replace("assistant", "bot")
        assert llm.render(self.MESSAGES, chat_template=template)["prompt"].endswith("<|im_start|>bot\n")
        assert llm.render(self.MESSAGES, add_generation_prompt=False)["prompt"].endswith("<|im_end|>\n")

    def test_a_control_token_in_plain_text_stays_text(self, llm: LLM) -> None:
        ids = one(llm, "<|im_end|>", GREEDY).prompt_token_ids
        assert llm.get_tokenizer().token_to_id("<|im_end|>") not in ids


class TestStreams:
    """All kinds of output say the same."""

    def collect(self, llm: LLM, params: SamplingParams) -> dict[RequestOutputKind, list[RequestOutput]]:
        kinds = {}
        for kind in RequestOutputKind:
            llm.reset_prefix_cache()
            kinds[kind] = list(llm.stream(prompt_of(20), replace(params, output_kind=kind)))
        return kinds

    def check(self, kinds: dict[RequestOutputKind, list[RequestOutput]], n: int = 1) -> RequestOutput:
        (final,) = kinds[FINAL]
        assert final.finished
        same_output(kinds[CUMULATIVE][-1], final)
        for outputs in kinds.values():
            assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
        for index in range(n):
            deltas = [output.outputs[index] for output in kinds[DELTA]]
            whole = final.outputs[index]
            assert "".join(delta.text for delta in deltas) == whole.text
            assert [token for delta in deltas for token in delta.token_ids] == whole.token_ids
            assert deltas[-1].finish_reason == whole.finish_reason
            if whole.logprobs is not None:
                assert [entry for delta in deltas for entry in delta.logprobs] == whole.logprobs
                assert deltas[-1].cumulative_logprob == whole.cumulative_logprob
            shown = [output.outputs[index] for output in kinds[CUMULATIVE]]
            for before, after in pairwise(shown):
                assert after.text.startswith(before.text)
                assert after.token_ids[: len(before.token_ids)] == before.token_ids
            assert all(whole.text.startswith(sample.text) for sample in shown), "text behind a stop was shown"
        return final

    def test_plain(self, llm: LLM) -> None:
        kinds = self.collect(llm, GREEDY)
        self.check(kinds)
        assert len(kinds[DELTA]) == 24

    def test_with_logprobs(self, llm: LLM) -> None:
        final = self.check(self.collect(llm, replace(GREEDY, logprobs=2))).outputs[0]
        assert len(final.logprobs) == 24
        assert all(len(entry) == 2 for entry in final.logprobs)  # greedy: the token itself is the likeliest
        total = sum(entry[token].logprob for entry, token in zip(final.logprobs, final.token_ids, strict=True))
        assert final.cumulative_logprob == pytest.approx(total)

    def test_several_samples(self, llm: LLM) -> None:
        params = SamplingParams(n=3, seed=1, max_tokens=12, ignore_eos=True, logprobs=0)
        final = self.check(self.collect(llm, params), n=3)
        assert [sample.index for sample in final.outputs] == [0, 1, 2]
        assert len({tuple(sample.token_ids) for sample in final.outputs}) == 3

    def test_without_text(self, llm: LLM) -> None:
        final = self.check(self.collect(llm, replace(GREEDY, detokenize=False, logprobs=1))).outputs[0]
        assert final.text == ""
        assert final.logprobs[0][final.token_ids[0]].decoded_token is None

    @pytest.mark.parametrize("keep", [False, True])
    @pytest.mark.parametrize("stop", [["ab"], ["cab", "dd", "aaa"], ["abcde"], ["e", "ee"]])
    def test_stop_strings_over_token_borders(
        self, llm: LLM, words: Callable[..., SamplingParams], stop: list[str], keep: bool
    ) -> None:
        for seed in range(6):
            free = one(llm, [prompt_of(20)], words(seed=seed)).outputs[0].text
            params = words(seed=seed, stop=stop, include_stop_str_in_output=keep)
            final = self.check(self.collect(llm, params)).outputs[0]
            ends = [(free.index(s) + len(s), s) for s in stop if s in free]
            if not ends:
                assert (final.finish_reason, final.stop_reason, final.text) == ("length", None, free)
                continue
            end, first = min(ends)
            assert (final.finish_reason, final.stop_reason) == ("stop", first)
            assert final.text == free[: end if keep else end - len(first)]
            assert len(final.token_ids) == end  # a letter a token

    def test_stop_strings_count_from_min_tokens_on(self, llm: LLM, words: Callable[..., SamplingParams]) -> None:
        free = one(llm, [prompt_of(20)], words()).outputs[0].text
        letter = free[0]
        assert letter in free[10:]
        final = self.check(self.collect(llm, words(stop=[letter], min_tokens=10))).outputs[0]
        assert final.text == free[: free.index(letter, 10)]
        assert final.stop_reason == letter

    def test_some_samples_stop_early(self, llm: LLM, words: Callable[..., SamplingParams]) -> None:
        kinds = self.collect(llm, words(n=3, stop=["ab"]))
        final = self.check(kinds, n=3)
        assert len({len(sample.token_ids) for sample in final.outputs}) > 1
        assert all("ab" not in sample.text for output in kinds[CUMULATIVE] for sample in output.outputs)

    def test_a_stream_that_is_closed_gives_its_pages_back(self, llm: LLM) -> None:
        stream = llm.stream(prompt_of(40), GREEDY)
        next(stream)
        assert llm.llm_engine.scheduler_stats().pages_owned > 0
        stream.close()
        llm.llm_engine.step()
        assert llm.llm_engine.scheduler_stats().pages_owned == 0

    def test_streams_and_batches_share_steps(self, llm: LLM) -> None:
        alone = [list(llm.stream(prompt_of(9, seed), GREEDY)) for seed in range(2)]
        first, second = (llm.stream(prompt_of(9, seed), GREEDY) for seed in range(2))
        got: list[list[RequestOutput]] = [[next(first)], [next(second)]]
        llm.generate([prompt_of(30, 7)], GREEDY, use_tqdm=False)
        got[1] += second
        got[0] += first
        for outputs, reference in zip(got, alone, strict=True):
            assert [brief(o.outputs[0]) for o in outputs] == [brief(o.outputs[0]) for o in reference]

    def test_a_chat_streams(self, llm: LLM) -> None:
        messages = TestChat.MESSAGES
        outputs = list(llm.stream_chat(messages, replace(GREEDY, output_kind=DELTA)))
        (whole,) = llm.chat(messages, GREEDY, use_tqdm=False)
        assert "".join(output.outputs[0].text for output in outputs) == whole.outputs[0].text


class TestLogprobs:
    def test_a_prompts_are_those_of_generating_it(self, llm: LLM) -> None:
        made = one(llm, [prompt_of(20)], replace(GREEDY, logprobs=3)).outputs[0]
        whole = prompt_of(20) + made.token_ids
        scored = one(llm, [whole], replace(GREEDY, max_tokens=1, prompt_logprobs=3))
        assert len(scored.prompt_logprobs) == len(whole)
        assert scored.prompt_logprobs[0] is None
        assert all(token in entry for token, entry in zip(whole[1:], scored.prompt_logprobs[1:], strict=True))
        for token, generated, given in zip(made.token_ids, made.logprobs, scored.prompt_logprobs[20:], strict=True):
            assert list(generated) == list(given)
            assert given[token].rank == generated[token].rank == 1
            assert given[token].logprob == pytest.approx(generated[token].logprob, abs=1e-4)

    def test_a_prompts_do_not_depend_on_what_is_cached(self, llm: LLM) -> None:
        params = replace(GREEDY, max_tokens=1, prompt_logprobs=1)
        first, second = (one(llm, [prompt_of(50)], params) for _ in range(2))
        assert first.prompt_logprobs == second.prompt_logprobs
        assert second.num_cached_tokens == 0

    @pytest.mark.parametrize("length", [1, 2, 16, 17, 18, 33])
    def test_there_is_one_for_each_token_of_a_prompt(self, llm: LLM, length: int) -> None:
        scored = one(llm, [prompt_of(length)], replace(GREEDY, max_tokens=2, prompt_logprobs=0))
        assert [entry and list(entry) for entry in scored.prompt_logprobs] == [
            None,
            *([token] for token in prompt_of(length)[1:]),
        ]
        plain = one(llm, [prompt_of(length)], replace(GREEDY, max_tokens=2))
        same_output(scored, plain)

    def test_ranks_and_counts(self, llm: LLM) -> None:
        params = SamplingParams(max_tokens=20, seed=2, logprobs=4, ignore_eos=True)
        sample = one(llm, [prompt_of(9)], params).outputs[0]
        assert any(next(iter(entry)) not in list(entry)[1:5] for entry in sample.logprobs)
        for token, entry in zip(sample.token_ids, sample.logprobs, strict=True):
            assert next(iter(entry)) == token
            ranks = {value.rank for value in entry.values()}
            assert ranks == {1, 2, 3, 4} | {entry[token].rank}
            values = [value.logprob for value in sorted(entry.values(), key=lambda value: value.rank)]
            assert values == sorted(values, reverse=True)
            assert all(value.decoded_token is not None for value in entry.values())

    def test_they_are_of_the_model_not_of_the_rules(self, llm: LLM) -> None:
        plain = one(llm, [prompt_of(9)], replace(GREEDY, max_tokens=1, logprobs=20)).outputs[0]
        (likeliest, second, *_) = plain.logprobs[0]
        ruled = replace(GREEDY, max_tokens=1, logprobs=20, logit_bias={second: 50.0}, temperature=1.5, seed=0)
        sample = one(llm, [prompt_of(9)], ruled).outputs[0]
        assert sample.token_ids == [second]
        assert sample.logprobs[0] == plain.logprobs[0]
        assert sample.logprobs[0][second].rank == 2
        assert likeliest in sample.logprobs[0]


def test_a_file_of_settings_builds_one_too(tiny_path: Any, tmp_path: Any, shared_llm: LLM) -> None:
    path = tmp_path / "serve.toml"
    path.write_text(
        f'[model]\nmodel = "{tiny_path}"\ndtype = "float32"\nmax_model_len = 96\n'
        f'cpu_precision = "{SIZES["cpu_precision"]}"\n'  # the programs are there
        "[cache]\nblock_size = 8\nnum_pages = 28\n"
        "[scheduler]\nmax_num_seqs = 4\nmax_num_batched_tokens = 32\n"
        "[compile]\ndecode_rows = [1, 4]\nprefill_tokens = [16, 32]\nscore_tokens = 16\n"
    )
    phases: list[str] = []
    llm = LLM.from_config(EngineConfig.from_toml(path), on_phase=lambda name, _: phases.append(name))
    assert phases == list(llm.startup.phases)
    assert llm.startup.total > 0
    same_output(one(llm, "Hello", GREEDY), one(shared_llm, "Hello", GREEDY))
    llm.shutdown()
    with pytest.raises(Exception, match="was shut down"):
        one(llm, "Hello", GREEDY)
