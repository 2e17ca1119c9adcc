"""`LLM`: the offline interface. Runs the engine in the caller's thread until the caller's requests are done."""

import dataclasses
from collections import deque
from collections.abc import Generator, Mapping
from collections.abc import Sequence as ListLike
from typing import Any

from tqdm import tqdm

from atoma_jax.config import EngineConfig
from atoma_jax.engine.engine import EMBEDS, Engine, Prompt
from atoma_jax.engine.startup import OnPhase, StartupReport, follow, start_engine
from atoma_jax.engine.stats import EngineStats
from atoma_jax.errors import ParameterError
from atoma_jax.outputs import EmbeddingOutput, EmbeddingRequestOutput, RequestOutput, unit_length
from atoma_jax.sampling_params import RequestOutputKind, SamplingParams
from atoma_jax.tokenizer import Tokenizer

Message = Mapping[str, Any]  # {"role": …, "content": …}


class LLM:
    """A model, ready to generate.

    `LLM("smollm2-135m-instruct", max_num_seqs=8)`: the first argument is a name of configs/models, a .gguf file, a
    folder or a hub id, the others are settings of `atoma_jax.config`.
    """

    def __init__(self, model: str, **options: Any):
        """Loads and compiles; see `from_config`."""
        self._start(EngineConfig.from_options({"model": model, **options}), None)

    @classmethod
    def from_config(cls, config: EngineConfig, *, on_phase: OnPhase | None = None) -> "LLM":
        """Builds from checked settings.

        Args:
            config: all settings.
            on_phase: called with name and seconds as each phase of start-up ends.

        Raises:
            UserError: the model or a setting cannot be used.
            DownloadError: the model could not be fetched.
            EngineDeadError: another process of this engine is lost.
            SystemExit: of several processes this is not the first: it has served the first one until that one ended.
                The same program runs in all of them.
        """
        llm = cls.__new__(cls)
        llm._start(config, on_phase)
        return llm

    def _start(self, config: EngineConfig, on_phase: OnPhase | None) -> None:
        self.llm_engine: Engine
        self.config = config
        if follow(config, on_phase=on_phase):
            raise SystemExit(0)
        self.llm_engine, self._startup = start_engine(config, on_phase=on_phase)
        self._num_requests = 0
        self._mailboxes: dict[str, deque[RequestOutput]] = {}

    @property
    def startup(self) -> StartupReport:
        """Seconds of each phase of the start."""
        return self._startup

    def get_tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self.llm_engine.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What requests without parameters get: what the model's makers recommend (generation_config.json)."""
        return self.llm_engine.default_params

    def stats(self) -> EngineStats:
        """Times and counters since the start or `reset_stats`."""
        return self.llm_engine.stats()

    def reset_stats(self) -> None:
        """Begins a new reading of `stats`."""
        self.llm_engine.reset_stats()

    def reset_prefix_cache(self) -> None:
        """Forgets all shared prefixes."""
        self.llm_engine.reset_prefix_cache()

    def shutdown(self) -> None:
        """Aborts what is unfinished and gives the device's memory back; the object is of no use afterwards."""
        self.llm_engine.close()

    def generate(
        self,
        prompts: Prompt | ListLike[Prompt],
        sampling_params: SamplingParams | ListLike[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        priority: ListLike[int] | None = None,
    ) -> list[RequestOutput]:
        """Completes prompts, all in one continuously batched run.

        Args:
            prompts: one prompt or a list; a prompt is text, `{"prompt": text}`, `{"prompt_token_ids": ids}`, or ids.
            sampling_params: for all, or one for each; None: what the model's makers recommend.
            use_tqdm: show progress on standard error.
            priority: of each prompt; smaller goes first, under the priority policy.

        Returns:
            One output a prompt, in order.

        Raises:
            ParameterError: a prompt or a parameter is outside the limits. Nothing is run then.
        """
        listed = _as_prompts(prompts)
        params = _as_params(self.llm_engine.default_params if sampling_params is None else sampling_params, len(listed))
        if priority is not None and len(priority) != len(listed):
            raise ParameterError(
                "priority", len(priority), f"priority must have one entry for each of the {len(listed)} prompts."
            )
        ids: list[str] = []
        try:
            for index, (prompt, param) in enumerate(zip(listed, params, strict=True)):
                request_id = self._next_id()
                rank = 0 if priority is None else priority[index]
                self.llm_engine.add_request(request_id, prompt, _final_only(param), priority=rank)
                ids.append(request_id)
            return self._run(ids, use_tqdm)
        except BaseException:
            for request_id in ids:
                self.llm_engine.abort_request(request_id)
            raise

    def chat(
        self,
        messages: ListLike[Message] | ListLike[ListLike[Message]],
        sampling_params: SamplingParams | ListLike[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: ListLike[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answers one conversation or a list of them, through the model's chat template.

        Args:
            messages: `[{"role": "user", "content": "Hi"}]`, or a list of such lists.
            sampling_params: as in `generate`.
            use_tqdm: as in `generate`.
            chat_template: a Jinja template instead of the model's.
            add_generation_prompt: end with the beginning of an assistant's answer.
            continue_final_message: go on with the last message instead.
            tools: JSON schemas of functions, for templates that know tools.
            chat_template_kwargs: further variables of the template.

        Raises:
            ParameterError: as in `generate`.
            TemplateError: the model has no template, or it refused the messages.
        """
        conversations = [messages] if messages and isinstance(messages[0], Mapping) else messages
        prompts = [
            self.render(
                conversation,  # pyright: ignore[reportArgumentType]  # a list of messages after the line above
                chat_template=chat_template,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tools=tools,
                chat_template_kwargs=chat_template_kwargs,
            )
            for conversation in conversations
        ]
        return self.generate(prompts, sampling_params, use_tqdm)

    def embed(
        self, prompts: Prompt | ListLike[Prompt], use_tqdm: bool = True, *, normalize: bool = True
    ) -> list[EmbeddingRequestOutput]:
        """Turns prompts into vectors, of an engine with `runner="pooling"`.

        Args:
            prompts: as in `generate`.
            use_tqdm: show progress on standard error.
            normalize: scale each vector to length 1.

        Raises:
            ParameterError: a prompt is outside the limits, or the engine generates text.
        """
        ids: list[str] = []
        try:
            for prompt in _as_prompts(prompts):
                request_id = self._next_id()
                self.llm_engine.add_request(request_id, prompt, EMBEDS, embeds=True)
                ids.append(request_id)
            outputs = self._run(ids, use_tqdm)
        except BaseException:
            for request_id in ids:
                self.llm_engine.abort_request(request_id)
            raise
        found: list[EmbeddingRequestOutput] = []
        for output in outputs:
            vector = output.embedding
            if vector is None:
                problem = "The model's numbers were not finite for this prompt."
                raise ParameterError("prompts", output.request_id, problem)
            embedding = EmbeddingOutput((unit_length(vector) if normalize else vector).tolist())
            found.append(
                EmbeddingRequestOutput(
                    request_id=output.request_id, outputs=embedding, prompt_token_ids=output.prompt_token_ids
                )
            )
        return found

    def render(
        self,
        messages: ListLike[Message],
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: ListLike[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """A conversation as a prompt: its text and its tokens. Arguments and errors as in `chat`."""
        tokenizer = self.llm_engine.tokenizer
        text = tokenizer.apply_chat_template(
            messages,
            chat_template=chat_template,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            chat_template_kwargs=chat_template_kwargs,
        )
        ids = tokenizer.encode(text, add_special_tokens=False, parse_special=True)
        return {"prompt": text, "prompt_token_ids": ids}

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Generator[RequestOutput]:
        """Completes one prompt, output by output as tokens come. Closing the generator aborts the request.

        Args:
            prompt: as in `generate`.
            sampling_params: its `output_kind` says whether outputs hold everything so far or what is new.
        """
        request_id = self._next_id()
        self.llm_engine.add_request(request_id, prompt, sampling_params or self.llm_engine.default_params)
        mailbox = self._mailboxes[request_id] = deque[RequestOutput]()
        try:
            finished = False
            while not finished:
                while not mailbox:
                    self._step()
                output = mailbox.popleft()
                finished = output.finished
                yield output
        finally:
            del self._mailboxes[request_id]
            self.llm_engine.abort_request(request_id)

    def stream_chat(
        self, messages: ListLike[Message], sampling_params: SamplingParams | None = None
    ) -> Generator[RequestOutput]:
        """Answers one conversation as `stream` does."""
        return self.stream(self.render(messages), sampling_params)

    def _run(self, ids: ListLike[str], use_tqdm: bool) -> list[RequestOutput]:
        done: dict[str, RequestOutput] = {}
        with tqdm(total=len(ids), desc="Processed prompts", disable=not use_tqdm, dynamic_ncols=True) as bar:
            wanted = set(ids)
            while len(done) < len(ids):
                for output in self._step():
                    if output.finished and output.request_id in wanted:
                        done[output.request_id] = output
                        bar.update()
        return [done[request_id] for request_id in ids]

    def _step(self) -> list[RequestOutput]:
        """One step; what streams wait for goes to their mailboxes, as a step serves all that are open."""
        outputs = self.llm_engine.step()
        for output in outputs:
            if output.request_id in self._mailboxes:
                self._mailboxes[output.request_id].append(output)
        return outputs

    def _next_id(self) -> str:
        self._num_requests += 1
        return f"offline-{self._num_requests}"


def _as_prompts(prompts: Prompt | ListLike[Prompt]) -> list[Prompt]:
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    listed: list[Any] = list(prompts)
    if listed and all(isinstance(token, int) for token in listed):
        return [listed]
    return listed


def _as_params(params: SamplingParams | ListLike[SamplingParams], count: int) -> list[SamplingParams]:
    if isinstance(params, SamplingParams):
        return [params] * count
    if len(params) != count:
        raise ParameterError(
            "sampling_params", len(params), f"sampling_params must be one, or one for each of the {count} prompts."
        )
    return list(params)


def _final_only(params: SamplingParams) -> SamplingParams:
    return dataclasses.replace(params, output_kind=RequestOutputKind.FINAL_ONLY)
