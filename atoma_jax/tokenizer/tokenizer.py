"""The tokenizer of one model: text to ids and back, and conversations to text by the model's chat template.

Owns BOS and EOS, the checks of what callers hand in, and the rule of leading spaces. Cutting text is `encoders.py`,
what ids mean is `vocabulary.py`, templates are `chat_template.py`, decoding a stream is `detokenizer.py`.
"""

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

from atoma_jax.errors import ParameterError, TemplateError
from atoma_jax.tokenizer.chat_template import ChatTemplate, TemplateLimits, render_chat
from atoma_jax.tokenizer.encoders import Encoder
from atoma_jax.tokenizer.vocabulary import TokenKind, Vocabulary

# Control tokens that end an answer by their name, for files that declare one end token only (an instruction-tuned
# Llama 3 declares <|end_of_text|> and ends its turns with <|eot_id|>). The names are those of llama.cpp's
# end-of-generation set, without the fill-in-the-middle marks.
END_NAMES = frozenset(
    {
        "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>",
        "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>",
        "<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>", "<｜end▁of▁sentence｜>", "[e~[",
    }
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class SpecialTokens:
    """The marked tokens of a model, by role."""

    bos_token_id: int | None = None
    eos_token_ids: frozenset[int] = frozenset()  # any of them ends an answer
    pad_token_id: int | None = None
    names: Mapping[str, str]  # what a chat template sees: bos_token, eos_token, pad_token, unk_token
    prefix: tuple[int, ...] = ()  # put before a prompt, BOS as a rule
    suffix: tuple[int, ...] = ()  # put after a prompt


def end_token_ids(vocabulary: Vocabulary, declared: Sequence[int]) -> frozenset[int]:
    """The ids that end an answer: those a file declares, and its control tokens that are known by name to do so.

    A token must be control to count by name: Gemma's `</s>` closes HTML's strike-through, and is no end there. Where
    gpt-oss's `<|return|>` and `<|call|>` exist, `<|end|>` ends one message of an answer, not the answer.
    """
    found = set(declared)
    for name in END_NAMES:
        token_id = vocabulary.id_of(name)
        if token_id is not None and vocabulary.kind(token_id) == TokenKind.CONTROL:
            found.add(token_id)
    harmony = {vocabulary.id_of("<|return|>"), vocabulary.id_of("<|call|>")}
    end_of_message = vocabulary.id_of("<|end|>")
    if harmony <= found and end_of_message is not None and end_of_message not in declared:
        found.discard(end_of_message)
    return frozenset(found)


class Tokenizer:
    """Text to token ids and back. Immutable, safe to use from several threads.

    Attributes:
        vocab_size: number of token ids; a model's logits may be padded to more.
        bos_token_id: the token that begins a text, if the model has one.
        eos_token_ids: every token that ends an answer (`end_token_ids`).
        pad_token_id: the padding token, if the model has one.
        special_ids: control and unknown tokens, which `skip_special_tokens` leaves out.
        special_names: marked tokens as the model's files spell them, by role: bos_token, eos_token, …
        chat_template: the Jinja source of the model's default chat template, None if it has none.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        encoder: Encoder,
        special: SpecialTokens,
        *,
        chat_templates: Mapping[str, str],
        strips_leading_space: bool,
    ):
        """`chat_templates` are sources by name, `default` among them; `strips_leading_space` says that the encoder puts
        a space before a text, which decoding a whole text takes away again."""
        self._vocabulary = vocabulary
        self._encoder = encoder
        self._special = special
        self._template_sources = dict(chat_templates)
        self._templates: dict[str, ChatTemplate] = {}
        self.strips_leading_space = strips_leading_space
        self.vocab_size = vocabulary.size
        self.bos_token_id = special.bos_token_id
        self.eos_token_ids = special.eos_token_ids
        self.pad_token_id = special.pad_token_id
        self.special_ids = vocabulary.special_ids
        self.special_names = dict(special.names)
        self.chat_template = self._template_sources.get("default")

    def encode(self, text: str, *, add_special_tokens: bool = True, parse_special: bool = False) -> list[int]:
        """The token ids of a text.

        Args:
            text: any text without lone surrogates.
            add_special_tokens: put BOS and EOS around it as the model's files ask for.
            parse_special: recognise control tokens such as `<|im_end|>` in the text. For rendered chat templates, which
                are encoded with `add_special_tokens=False` since they write BOS themselves; never for a user's text.

        Raises:
            ParameterError: the text is no string, or holds a lone surrogate.
        """
        check_text("prompt", text)
        ids = self._encoder.encode(text, parse_special=parse_special)
        return [*self._special.prefix, *ids, *self._special.suffix] if add_special_tokens else ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True, continues: bool = False) -> str:
        """The text of token ids; bytes that are no UTF-8 become U+FFFD.

        Args:
            ids: token ids.
            skip_special_tokens: leave out control tokens; otherwise they read as the model's files spell them.
            continues: the ids follow a prompt, so that a leading space is part of the text.

        Raises:
            UserError: an id outside the vocabulary.
        """
        data = self.text_bytes(ids, skip_special_tokens=skip_special_tokens)
        if self.strips_leading_space and not continues:
            data = data.removeprefix(b" ")
        return data.decode(errors="replace")

    def text_bytes(self, ids: Sequence[int], *, skip_special_tokens: bool) -> bytes:
        """The joined bytes of tokens. Raises `UserError` for an id outside the vocabulary."""
        token_bytes, special = self._vocabulary.token_bytes, self.special_ids
        return b"".join(token_bytes(i) for i in ids if not (skip_special_tokens and i in special))

    def token_bytes(self, token_id: int) -> bytes:
        """The exact bytes that a token stands for, a part of a UTF-8 sequence perhaps.

        Raises:
            UserError: an id outside the vocabulary.
        """
        return self._vocabulary.token_bytes(token_id)

    def id_to_token(self, token_id: int) -> str:
        """The token as the model's files spell it (`Ġthe`, `▁the`). Raises `UserError` for an unknown id."""
        return self._vocabulary.text(token_id)

    def token_to_id(self, token: str) -> int | None:
        """The id of the token that the model's files spell so, None if there is none."""
        return self._vocabulary.id_of(token)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        limits: TemplateLimits | None = None,
    ) -> str:
        """A conversation as the text that the model was trained on.

        Encode the result with `add_special_tokens=False, parse_special=True`.

        Args:
            messages: dictionaries with `role` and `content` (a string, or a list of text parts).
            chat_template: a Jinja source, or the name of one of the model's templates; None is the model's default.
            add_generation_prompt: end with the beginning of an assistant's answer.
            continue_final_message: leave the last message open, for the model to go on with it.
            tools: JSON schemas of functions, for templates that know tools.
            documents: dictionaries to answer from, for templates that know documents.
            chat_template_kwargs: further variables that the template reads, `enable_thinking` for example.
            limits: time and size that the template may use.

        Raises:
            TemplateError: no template, an invalid one, one that refused the messages or exceeded its limits.
            UserError: an argument has the wrong shape, or names a variable that the template does not read.
        """
        template = self._template(chat_template, with_tools=bool(tools), limits=limits or TemplateLimits())
        return render_chat(
            template,
            messages,
            special_names=self._special.names,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            documents=documents,
            extra=chat_template_kwargs or {},
        )

    def with_chat_template(self, source: str) -> "Tokenizer":
        """The same tokenizer with another default template, and no other. Raises `TemplateError` if it is none."""
        other = copy(self)
        other._template_sources, other._templates, other.chat_template = {"default": source}, {}, source
        other._template(None, with_tools=False, limits=TemplateLimits())
        return other

    def _template(self, asked: str | None, *, with_tools: bool, limits: TemplateLimits) -> ChatTemplate:
        """The template to use, compiled. The model's own are kept compiled, a caller's are not."""
        name = asked
        if asked is None:
            name = "tool_use" if with_tools and "tool_use" in self._template_sources else "default"
        if name not in self._template_sources:
            if asked is None:
                raise TemplateError("chat_template", None, "the model has no chat template; pass one")
            return ChatTemplate(asked, limits)
        compiled = self._templates.get(name)
        if compiled is None or compiled.limits != limits:
            compiled = ChatTemplate(self._template_sources[name], limits)
            self._templates[name] = compiled
        return compiled


def check_text(field: str, text: object) -> None:
    """Raises `ParameterError` if `text` is no string, or has no UTF-8 form."""
    if not isinstance(text, str):
        raise ParameterError(field, text, f"{field} must be a string, got {type(text).__name__}.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        shown = f"U+{ord(text[error.start]):04X}"
        raise ParameterError(
            field, text, f"{field} holds a lone surrogate, {shown} at character {error.start}: send valid Unicode."
        ) from None
