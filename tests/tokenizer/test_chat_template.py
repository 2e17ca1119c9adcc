"""Chat templates render as `transformers` renders them, and what callers hand in is checked by name."""

from typing import Any

import pytest

from atoma_jax.errors import TemplateError, UserError
from atoma_jax.tokenizer.chat_template import ChatTemplate, TemplateLimits, render_chat

CHATML = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
LLAMA = """\
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" + system + "<|eot_id|>" }}
{%- if tools is not none %}
    {%- for tool in tools %}{{- tool | tojson(indent=4) }}{{- "\\n\\n" }}{%- endfor %}
{%- endif %}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}
"""
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
)
REASONING = """\
{%- macro show(content) %}
    {{- content.split('</think>')[-1].lstrip('\\n') if '</think>' in content else content }}
{%- endmacro %}
{%- set ns = namespace(last=-1, names=[]) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.last < 0 and message.role == 'user' %}{%- set ns.last = index %}{%- endif %}
    {%- set ns.names = ns.names + [message.role ~ ':' ~ index] %}
{%- endfor %}
{%- for message in messages if message.content %}
    {%- if loop.first %}{{ ns.names | join(', ') }}|{{ ns.last }}|{%- endif %}
    {%- if message.content.startswith('<tool') and not loop.last %}{% continue %}{% endif %}
    {%- generation %}{{ '%s=%s;' % (message.role | upper, show(message.content)) }}{% endgeneration %}
{%- endfor %}
{{- messages | map(attribute='role') | unique | sort | list | tojson }}
{{- {'a': [1, 2.5, none, true], 'b': '<é>'} | tojson }}
{%- if enable_thinking is defined and enable_thinking is false %}<no_think>{% endif %}
"""
TEMPLATES = {"chatml": CHATML, "llama": LLAMA, "mistral": MISTRAL, "reasoning": REASONING}
MESSAGES: list[dict[str, Any]] = [
    {"role": "user", "content": " Hello 🙂 "},
    {"role": "assistant", "content": "<think>hm</think>\nHi & <b>welcome</b>"},
    {"role": "user", "content": "Bye"},
]
NAMES = {"bos_token": "<s>", "eos_token": "</s>"}


def ours(source: str, messages: list[Any], **options: Any) -> str:
    defaults: dict[str, Any] = {
        "special_names": NAMES,
        "add_generation_prompt": True,
        "continue_final_message": False,
        "tools": None,
        "documents": None,
        "extra": {},
    }
    return render_chat(ChatTemplate(source, TemplateLimits()), messages, **{**defaults, **options})


def theirs(source: str, messages: list[Any], **options: Any) -> str:
    name = "transformers.utils.chat_template_utils"
    utils = pytest.importorskip(name, reason="needs the extra `oracle`: transformers")
    return utils.render_jinja_template([messages], chat_template=source, **NAMES, **options)[0][0]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("prompt", [True, False])
def test_templates_render_as_transformers_renders_them(name: str, prompt: bool) -> None:
    source = TEMPLATES[name]
    assert ours(source, MESSAGES, add_generation_prompt=prompt) == theirs(
        source, MESSAGES, add_generation_prompt=prompt
    )


def test_tools_render_as_transformers_renders_them() -> None:
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {"city": {"type": "string"}}}}]
    messages = [{"role": "system", "content": "Be brief."}, *MESSAGES]
    assert ours(LLAMA, messages, tools=tools) == theirs(LLAMA, messages, tools=tools, add_generation_prompt=True)


@pytest.mark.parametrize("content", ["The answer is", "ends in spaces  ", "two\nlines\n"])
@pytest.mark.parametrize("name", ["chatml", "llama"])
def test_the_last_message_is_left_open_as_transformers_does(name: str, content: str) -> None:
    messages = [*MESSAGES, {"role": "assistant", "content": content}]
    options = {"add_generation_prompt": False, "continue_final_message": True}
    rendered = ours(TEMPLATES[name], messages, **options)
    assert rendered == theirs(TEMPLATES[name], messages, **options)
    assert rendered.rstrip().endswith(content.rstrip())


def test_continuing_and_a_new_answer_exclude_each_other() -> None:
    with pytest.raises(UserError, match="continue_final_message: cannot go together with add_generation_prompt=True"):
        ours(CHATML, MESSAGES, continue_final_message=True)


def test_a_message_that_the_template_hides_cannot_be_continued() -> None:
    with pytest.raises(TemplateError, match="does not show the last message"):
        ours("{{ messages[0].content }}", MESSAGES, add_generation_prompt=False, continue_final_message=True)


def test_text_parts_are_joined_to_one_text() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert ours(CHATML, [{"role": "user", "content": parts}]) == ours(CHATML, [{"role": "user", "content": "one\ntwo"}])


def test_a_refusal_of_the_template_reaches_the_user() -> None:
    with pytest.raises(TemplateError, match="Conversation roles must alternate"):
        ours(MISTRAL, [MESSAGES[1]])


def test_variables_of_the_template_can_be_set() -> None:
    assert "<no_think>" not in ours(REASONING, MESSAGES)
    assert ours(REASONING, MESSAGES, extra={"enable_thinking": False}).endswith("<no_think>")


@pytest.mark.parametrize(
    "name",
    [
        "messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "tokenize",
        "chat_template", "bos_token", "raise_exception", "namespace", "not_read_by_the_template", "__class__",
    ],
)  # fmt: skip
def test_no_other_variable_can_be_set(name: str) -> None:
    with pytest.raises(UserError, match=rf"chat_template_kwargs\.{name}: .*can be set: enable_thinking"):
        ours(REASONING + "{{ tokenize }}{{ documents }}{{ bos_token }}", MESSAGES, extra={name: "x"})


class Trap:
    """An object that a template must never get hold of."""

    def __str__(self) -> str:
        raise AssertionError("a template reached it")


@pytest.mark.parametrize(
    ("field", "messages"),
    [
        ("messages", []),
        (r"messages\[0\].role", [{"content": "x"}]),
        (r"messages\[0\].role", [{"role": 5, "content": "x"}]),
        (r"messages\[0\].content", [{"role": "user", "content": 5}]),
        (r"messages\[0\].content\[0\]", [{"role": "user", "content": [{"type": "image_url"}]}]),
        (r"messages\[0\].content\[0\]", [{"role": "user", "content": ["x"]}]),
        (r"messages\[0\].extra", [{"role": "user", "content": "x", "extra": Trap()}]),
        (r"messages\[0\].extra", [{"role": "user", "content": "x", "extra": float("nan")}]),
        (r"messages\[0\].extra", [{"role": "user", "content": "x", "extra": {5: "x"}}]),
    ],
)
def test_messages_of_another_shape_are_refused_by_field(field: str, messages: list[Any]) -> None:
    with pytest.raises(UserError, match=f"^{field}: "):
        ours(CHATML, messages)


def test_nesting_in_messages_is_bounded() -> None:
    nested: list[Any] = []
    nested.append(nested)
    with pytest.raises(UserError, match="may be nested at most 64 deep"):
        ours(CHATML, [{"role": "user", "content": "x", "extra": nested}])


@pytest.mark.parametrize("field", ["tools", "documents"])
def test_what_a_template_would_leave_out_is_refused(field: str) -> None:
    with pytest.raises(UserError, match=f"{field}: this model's chat template does not take {field}"):
        ours(CHATML, MESSAGES, **{field: [{"name": "x"}]})


def test_a_template_that_is_no_jinja_is_refused_by_line() -> None:
    with pytest.raises(TemplateError, match="chat_template: line 2 is no valid Jinja"):
        ours("a\n{% for %}", MESSAGES)


def test_a_model_without_a_template_says_so(byte_level: Any) -> None:
    with pytest.raises(TemplateError, match="the model has no chat template; pass one"):
        byte_level.ours.apply_chat_template(MESSAGES)
    assert byte_level.ours.apply_chat_template(MESSAGES, chat_template="{{ bos_token }}") == "<|bos|>"
