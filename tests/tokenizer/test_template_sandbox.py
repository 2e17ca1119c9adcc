"""Hostile chat templates: no way out, and an end by a counted budget, in time and memory. (reliability.md 9, 10)"""

import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from atoma_jax.errors import TemplateError
from atoma_jax.tokenizer.chat_template import ChatTemplate, TemplateLimits

# Processor time is left out of these tests: what ends a bomb must not depend on the machine.
COUNTED = TemplateLimits(seconds=1e9)
VARIABLES: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}], "add_generation_prompt": True}


def render(source: str, limits: TemplateLimits = COUNTED) -> str:
    return ChatTemplate(source, limits).render(VARIABLES)


INJECTIONS = [
    "{{ ''.__class__ }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''['__class__'] }}",
    "{{ messages|map(attribute='__class__')|list }}",
    "{{ messages[0]|attr('__class__') }}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__globals__['datetime'] }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ range.__globals__ }}",
    "{{ dict.mro() }}",
    "{{ self.__init__.__globals__ }}",
    "{{ self._TemplateReference__context }}",
    "{{ cycler.__init__.__globals__.os.popen('touch PWNED').read() }}",
    "{{ lipsum.__globals__['os'].system('touch PWNED') }}",
    "{{ joiner.__init__.__globals__.os }}",
    "{% for x in ().__class__.__base__.__subclasses__() %}{{ x }}{% endfor %}",
    "{{ '{0.__class__}'.format('x') }}",
    "{{ '{0.__class__}'.format_map({'0': 'x'}) }}",
    "{{ 'x'.encode().decode() }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update({'a': 1}) }}",
    "{{ messages.__init__.__class__ }}",
    "{{ (1).to_bytes(4, 'big') }}",
    "{{ environment }}{{ environment.filters }}",
    "{{ charge_step() }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{% from 'os' import system %}",
    "{% extends '/etc/passwd' %}",
    "{{ range }}",
    "{{ [namespace()] }}",
    "{% set n = namespace() %}{% set n.x = n %}",
    "{% macro m() %}{{ m.__call__ }}{% endmacro %}{{ m() }}",
    "{% for x in [1] %}{{ loop.__class__ }}{% endfor %}",
    "{{ messages[0].items().mapping }}",
]


@pytest.mark.parametrize("source", INJECTIONS)
def test_injections_are_refused_without_side_effect(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TemplateError, match="chat_template"):
        render(source)
    assert list(tmp_path.iterdir()) == []
    assert VARIABLES["messages"] == [{"role": "user", "content": "x"}]


def grow(start: str, step: str, after: str = "") -> str:
    """A template that replaces a value by a larger one sixty times."""
    loop = f"{{% for i in range(60) %}}{{% set ns.x = {step} %}}{{% endfor %}}"
    return f"{{% set ns = namespace(x={start}) %}}{loop}{after}"


BOMBS = {
    "nested loops": "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}",
    "rounds left out": "{% for a in range(9999) %}{% for b in range(9999) if false %}{% endfor %}{% endfor %}",
    "recursive loop": "{% for x in [[]] recursive %}{{ loop([[]]) }}{{ loop([[]]) }}{% endfor %}",
    "macro recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "macro tree": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "block tree": "{% block a %}{{ self.a() }}{{ self.a() }}{% endblock %}",
    "repeat": "{{ 'x' * 100000000 }}",
    "repeat a variable": "{% set n = 100000000 %}{% set x = 'x' * n %}",
    "repeat a list": "{{ ([1] * 100000000)|length }}",
    "doubling +": grow("'x'", "ns.x + ns.x"),
    "doubling ~": grow("'x'", "ns.x ~ ns.x"),
    "doubling a list": grow("['x']", "ns.x + ns.x"),
    "shared lists": grow("[1]", "[ns.x, ns.x]", "{{ ns.x }}"),
    "shared tuples": grow("(1, 2)", "(ns.x, ns.x)", "{{ ns.x == ns.x }}"),
    "shared dictionaries": grow("{}", "{'a': ns.x, 'b': ns.x}", "{{ ns.x|tojson }}"),
    "shared dict()": grow("{}", "dict(a=ns.x, b=ns.x)", "{{ ns.x|string }}"),
    "format arguments": grow("'x'", "'%s%s%s' % (ns.x, ns.x, ns.x)"),
    "str.format": grow("'x'", "'{0}{0}{0}'.format(ns.x)"),
    "power": "{{ 10 ** 100000000 }}",
    "power of a power": grow("10", "ns.x * ns.x"),
    "format width": "{{ '%100000000d' % 1 }}",
    "format star": "{{ '%*d' % (100000000, 1) }}",
    "format filter": "{{ '%100000000d'|format(1) }}",
    "format precision": "{{ '%.100000000f' % 1 }}",
    "brace width": "{{ '{:100000000}'.format(1) }}",
    "brace field": "{{ '{:{}}'.format(1, 100000000) }}",
    "indent": "{{ 'x'|indent(100000000) }}",
    "deep json": "{% set ns = namespace(x=range(999)|list) %}{% for i in range(200) %}{% set ns.x = [ns.x] %}"
    "{% endfor %}{{ ns.x|tojson(indent=16) }}",
    "replace": "{% set x = 'a' * 100000 %}{{ x.replace('a', x) }}",
    "replace filter": "{% set x = 'a' * 100000 %}{{ x|replace('', x) }}",
    "join": "{% set x = 'a' * 100000 %}{{ x.join(['a'] * 10000) }}",
    "join filter": "{% set x = 'a' * 100000 %}{{ range(100)|join(x) }}",
    "map default": "{% set x = 'a' * 100000 %}{{ range(10000)|map(attribute='q', default=x)|list }}",
    "sum of lists": "{{ ([[1] * 100] * 1000)|sum(start=[]) }}",
    "strip": "{% set x = 'a' * 300000 %}{{ x.strip('b' * 300 + 'a') }}",
    "rfind": "{% set x = 'a' * 300000 %}{{ x.rfind('b' + 'a' * 1000) }}",
    "output": "{% for i in range(99999) %}" + "x" * 999 + "{% endfor %}",
    "macro output": "{% macro m() %}{% for i in range(99999) %}" + "x" * 999 + "{% endfor %}{% endmacro %}{{ m() }}",
    "block set": "{% set y %}{% for i in range(9999) %}{{ 'x' * 9999 }}{% endfor %}{% endset %}",
    "kept strings": "{% set ns = namespace(l=[]) %}{% for i in range(9999) %}{% set ns.l = ns.l + ['x' * 9999 ~ i] %}"
    "{% endfor %}",
    "slices": "{% set x = 'x' * 99999 %}{% for i in range(9999) %}{% set y = x[1:] %}{% endfor %}",
    "missing filters": "{{ 'x'|center(100000000) }}",
    "missing methods": "{{ 'x'.ljust(100000000) }}",
    "bytes": "{{ (5).to_bytes(100000000, 'big') }}",
    "range": "{{ range(100000000)|list }}",
    "lipsum": "{{ lipsum(100000000) }}",
    "parentheses": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "operators": "{{ " + "+".join(["1"] * 5000) + " }}",
    "nested blocks": "{% if 1 %}" * 2000 + "{% endif %}" * 2000,
    "many nodes": "{{ a + b }}" * 2700,
    "long source": "x" * 100_000,
}


LIMIT = "rendering takes too many"
ENDS = {
    "recursive loop": "RecursionError",
    "macro recursion": "RecursionError",
    "block tree": "RecursionError",
    "power": "a power may have at most 4096 bits",
    "format width": "a format's width may have at most 3 digits",
    "format star": "a format's width may have at most 3 digits",
    "format filter": "a format's width may have at most 3 digits",
    "format precision": "a format's width may have at most 3 digits",
    "brace width": "a format's width may have at most 3 digits",
    "brace field": "no field of its own",
    "indent": "indent() takes at most 16 characters",
    "strip": "the argument of strip() may have at most 256 characters",
    "rfind": "the argument of rfind() may have at most 256 characters",
    "missing filters": "No filter named 'center'",
    "missing methods": "attribute 'ljust' of 'str' is not available",
    "bytes": "attribute 'to_bytes' of 'int' is not available",
    "range": "OverflowError",
    "lipsum": "'lipsum' is undefined",
    "parentheses": "RecursionError",
    "operators": "nested at most 100 deep",
    "nested blocks": "RecursionError",
    "many nodes": "at most 8000 nodes",
    "long source": "at most 65536 characters",
}
# Far below the defaults, because the test run checks the types of every call; memory goes with them.
SMALL = TemplateLimits(seconds=1e9, steps=1_500, output_characters=100_000)
SMALL_MEMORY = 16 << 20


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_end_by_a_counted_limit_in_little_memory(name: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(TemplateError, match="chat_template") as caught:
            render(BOMBS[name], SMALL)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert ENDS.get(name, LIMIT) in str(caught.value)
    assert peak < SMALL_MEMORY


def test_processor_time_is_limited_too() -> None:
    source = "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}"
    with pytest.raises(TemplateError, match=r"too many seconds of processor time, got 'more than 0\.05'"):
        render(source, TemplateLimits(seconds=0.05, steps=10**12))


def test_bombs_in_other_threads_end_and_leave_honest_templates_alone() -> None:
    """No signals and no shared state: a rendering has a budget of its own."""
    bomb = ChatTemplate(BOMBS["nested loops"], SMALL)
    honest = ChatTemplate("{% for m in messages * 50 %}{{ m.content }}{% endfor %}", COUNTED)

    def explode(_: int) -> str:
        with pytest.raises(TemplateError, match="too many steps"):
            bomb.render(VARIABLES)
        return honest.render(VARIABLES)

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(explode, range(8))) == ["x" * 50] * 8


def test_a_long_honest_conversation_stays_within_the_default_limits() -> None:
    source = (
        "{% for message in messages %}{% if message.role == 'user' or loop.last %}"
        "{{ '<|im_start|>' + message.role + '\n' + message.content | trim + '<|im_end|>' + '\n' }}"
        "{% endif %}{% endfor %}"
    )
    messages = [{"role": "user", "content": "word " * 150}] * 1000
    rendered = ChatTemplate(source, TemplateLimits(seconds=1e9)).render({"messages": messages})
    assert len(rendered) > 750_000


def test_a_template_that_fails_in_any_way_is_a_template_error() -> None:
    for source in ["{{ 1 / 0 }}", "{{ messages[0] + 1 }}", "{{ nothing.at.all }}", "{{ 'x'|int('y') + 1 }}"]:
        with pytest.raises(TemplateError, match="chat_template: the template"):
            render(source)
