"""The Jinja environment of chat templates: what a template may call, and where its budget is charged.

Templates come with model files and with requests, so they are untrusted programs. Jinja's immutable sandbox keeps them
from Python's internals, yet lets them loop thirty million times or build a string of 100 MB. Here everything that can
take time or memory is on a short list, and is charged to a `Budget` before it happens: loop rounds, calls, operators,
literals, filters and output, by rewriting the syntax tree before it is compiled. This works in any thread and needs
no second process.
"""

from collections.abc import Callable, Sequence
from datetime import datetime
from types import BuiltinMethodType, CodeType, FunctionType, MethodType
from typing import Any, cast

from jinja2 import Undefined, nodes
from jinja2.exceptions import SecurityError, TemplateRuntimeError
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import FILTERS
from jinja2.meta import find_undeclared_variables
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace, pass_context
from jinja2.visitor import NodeTransformer

from atoma_jax.errors import TemplateError
from atoma_jax.tokenizer.template_budget import MAX_INTEGER_BITS, Budget
from atoma_jax.tokenizer.template_filters import (
    BoundedFilters,
    check_format_braces,
    check_format_percent,
    check_replace,
    joined,
)

# Filters of Jinja whose result is no longer than their input, and that work in time about linear in it.
_PLAIN_FILTERS = (
    "abs", "capitalize", "count", "d", "default", "dictsort", "first", "float", "groupby", "int", "items", "last",
    "length", "lower", "map", "max", "min", "reject", "rejectattr", "reverse", "select", "selectattr", "sort", "title",
    "unique", "upper", "wordcount",
)  # fmt: skip
_METHODS: dict[type, frozenset[str]] = {
    str: frozenset(
        {
            "strip", "lstrip", "rstrip", "split", "rsplit", "splitlines", "startswith", "endswith", "lower", "upper",
            "title", "capitalize", "swapcase", "replace", "find", "rfind", "index", "rindex", "count", "join",
            "removeprefix", "removesuffix", "partition", "rpartition", "isdigit", "isalpha", "isalnum", "isspace",
            "isupper", "islower", "isnumeric", "isdecimal",
        }
    ),
    dict: frozenset({"get", "items", "keys", "values"}),
    list: frozenset({"index", "count"}),
    tuple: frozenset({"index", "count", "grouper", "list"}),  # the last two of Jinja's groupby
    float: frozenset({"is_integer"}),
}  # fmt: skip
# Methods whose time is the product of the lengths of text and argument.
_QUADRATIC_METHODS = frozenset({"strip", "lstrip", "rstrip", "rfind", "rindex", "rsplit", "rpartition"})
MAX_QUADRATIC_ARGUMENT = 256
MAX_NODES = 8_000  # of the syntax tree: compiling takes about 0.1 ms each; the largest published templates have 3,000
MAX_NESTING = 100


class _TemplateNamespace(Namespace):
    """Jinja's `namespace()`, the one mutable object of a template.

    It may not hold another one and reads the same whatever it holds: text that grows after it was measured would escape
    the budget.
    """

    def __setitem__(self, name: str, value: Any) -> None:
        if isinstance(value, Namespace):
            raise SecurityError("a namespace cannot hold a namespace")
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<namespace>"


class _GenerationBlock(Extension):
    """`{% generation %}` … `{% endgeneration %}`: marks an assistant's words for training, and is plain text here."""

    tags = {"generation"}  # noqa: RUF012  Jinja reads it from the class

    def parse(self, parser: Parser) -> nodes.Node:
        """The block's body in a scope of its own, as `transformers` has it."""
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _ChargeEverything(NodeTransformer):
    """Rewrites a template so that whatever takes time or memory calls the environment's budget."""

    def visit(self, node: nodes.Node, *_args: Any, **_kwargs: Any) -> nodes.Node | list[nodes.Node]:
        """The node to put in place of `node`, children first."""
        self.generic_visit(node)
        match node:
            case nodes.For():
                node.body.insert(0, _statement("charge_step", [], node))
                if node.test is not None:  # rounds that it leaves out do not reach the body
                    node.test = _call("charge_result", [node.test], node)
            case nodes.Output():
                literal = sum(len(child.data) for child in node.nodes if isinstance(child, nodes.TemplateData))
                return [_statement("charge_text", [nodes.Const(literal)], node), node]
            case nodes.Concat():
                return _call("concatenate", node.nodes, node)
            case nodes.Compare() | nodes.List() | nodes.Dict() | nodes.Tuple(ctx="load"):
                return _call("charge_result", [node], node)
            case nodes.Getitem(arg=nodes.Slice()):
                return _call("charge_result", [node], node)
            case _:
                pass
        return node


def _call(method: str, args: Sequence[nodes.Node], at: nodes.Node) -> nodes.Call:
    """A call of the environment's method, which no template can spell."""
    call = nodes.Call(nodes.EnvironmentAttribute(method), list(args), [], None, None)
    call.set_lineno(at.lineno)
    return call


def _statement(method: str, args: Sequence[nodes.Node], at: nodes.Node) -> nodes.Node:
    return nodes.ExprStmt(_call(method, args, at)).set_lineno(at.lineno)


class _ChargedFilter:
    """A filter that counts as a step, and whose result is charged."""

    def __init__(self, budget: Budget, function: Callable[..., Any]):
        self._budget = budget
        self._function = function
        self.jinja_pass_arg = vars(function).get("jinja_pass_arg") if isinstance(function, FunctionType) else None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The filter's result."""
        self._budget.step()
        result = self._function(*args, **kwargs)
        self._budget.make_value(result)
        return result


def _check_tree(tree: nodes.Template) -> None:
    """Refuses a template that takes long to compile: time grows with the nodes, and faster with their nesting."""
    count, level = 0, [cast(nodes.Node, tree)]
    for _ in range(MAX_NESTING):
        count += len(level)
        level = [child for node in level for child in node.iter_child_nodes()]
        if not level:
            break
    if level or count > MAX_NODES:
        problem = f"a template may have at most {MAX_NODES} nodes, nested at most {MAX_NESTING} deep"
        raise TemplateError("chat_template", f"at least {count + len(level)} nodes", problem)


class TemplateSandbox(ImmutableSandboxedEnvironment):
    """The environment of one rendering; it holds that rendering's budget and is used once, by one thread."""

    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "%", "**"})

    def __init__(self, budget: Budget):
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationBlock, loopcontrols],
            finalize=_finalize,
            optimized=False,  # folding constants would run operators and filters while compiling
            cache_size=0,
        )
        self._budget = budget
        bounded = BoundedFilters(self, budget, self.as_text)
        plain: dict[str, Callable[..., Any]] = {name: FILTERS[name] for name in _PLAIN_FILTERS}
        self.filters = {
            name: _ChargedFilter(budget, function) for name, function in {**plain, **bounded.by_name()}.items()
        }
        self.globals = {
            "range": self.globals["range"],  # the sandbox's own: at most 100,000
            "dict": bounded.make_dict,
            "namespace": _TemplateNamespace,
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
        }

    def compile_charged(self, source: str) -> tuple[CodeType, set[str]]:
        """The compiled template with its charges built in, and the names that it reads and does not set."""
        tree = self.parse(source)
        _check_tree(tree)
        names = find_undeclared_variables(tree)
        _ChargeEverything().generic_visit(tree)
        return self.compile(tree), names - self.globals.keys()

    # -- called from compiled templates

    def charge_step(self) -> None:
        """One round of a loop."""
        self._budget.step()

    def charge_text(self, characters: int) -> None:
        """Literal text of the template that is written out."""
        self._budget.make(characters)

    def charge_result(self, value: Any) -> Any:
        """A new list, tuple, dictionary or slice, or the outcome of a comparison."""
        self._budget.step()
        self._budget.make_value(value)
        return value

    def concatenate(self, *parts: Any) -> str:
        """The operator `~`."""
        return joined(self._budget, "", [self.as_text(part) for part in parts])

    def as_text(self, value: Any) -> str:
        """What writing a value out gives. Only plain data: Python's objects would show addresses in memory."""
        if not isinstance(value, str):
            self._budget.make(self._budget.written(value))
            return str(value)
        return value

    def output(self, value: Any) -> str:
        """A value that the template writes out."""
        text = self.as_text(value)
        self._budget.make(len(text))
        return text

    # -- hooks of Jinja's sandbox

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Items and the listed methods only; everything else of plain data is refused."""
        if not super().is_safe_attribute(obj, attr, value):
            return False
        if isinstance(obj, (Namespace, LoopContext, Macro, Undefined)):
            return True
        return any(attr in names for kind, names in _METHODS.items() if isinstance(obj, kind))

    def unsafe_undefined(self, obj: Any, attribute: str) -> Undefined:
        """Refuses at once; Jinja's own would read as an empty text."""
        raise SecurityError(f"attribute {attribute!r} of {type(obj).__name__!r} is not available in chat templates")

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """`str.format` with its result measured first."""
        inner = super().wrap_str_format(value)
        if inner is None:
            return None

        def bounded(*args: Any, **kwargs: Any) -> str:
            check_format_braces(self._budget, value.__self__, [*args, *kwargs.values()])
            return inner(*args, **kwargs)

        return bounded

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805  Jinja's signature
        """Every call of a template: of its macros, of methods, of the globals, and of the charges above."""
        if isinstance(__obj, MethodType) and __obj.__self__ is __self:
            return __obj(*args)  # a charge; Jinja's keywords (names of the loop) are nothing to it
        __self._budget.step()
        if isinstance(__obj, BuiltinMethodType) and isinstance(__obj.__self__, str):
            given = {name: value for name, value in kwargs.items() if name not in ("_loop_vars", "_block_vars")}
            return __self._call_string_method(__obj.__self__, __obj, args, given)
        result = super().call(__context, __obj, *args, **kwargs)
        if isinstance(result, str):
            __self._budget.make_value(result)
        return result

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Arithmetic, with the size of the result known before it is made."""
        budget = self._budget
        budget.step()
        for operand in (left, right):
            if isinstance(operand, int):
                budget.check_integer(operand)
        if operator == "*":
            self._check_product(left, right)
        elif operator == "%" and isinstance(left, str):
            check_format_percent(budget, left, right)
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            if left.bit_length() * abs(right) > MAX_INTEGER_BITS:
                raise TemplateRuntimeError(f"a power may have at most {MAX_INTEGER_BITS} bits")
        elif operator == "+" and isinstance(left, (str, list, tuple)) and isinstance(right, (str, list, tuple)):
            budget.check_value(budget.written(left) + budget.written(right))
        result = super().call_binop(context, operator, left, right)
        budget.make_value(result)
        return result

    # -- helpers

    def _check_product(self, left: Any, right: Any) -> None:
        sequence, count = (left, right) if isinstance(left, (str, list, tuple)) else (right, left)
        if isinstance(sequence, (str, list, tuple)) and isinstance(count, int):
            size = len(sequence) if isinstance(sequence, str) else self._budget.written(sequence)
            self._budget.check_value(size * max(count, 0))

    def _call_string_method(
        self, text: str, method: BuiltinMethodType, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        name = method.__name__
        if name == "join" and len(args) == 1:
            return joined(self._budget, text, list(args[0]))
        if name == "replace" and len(args) >= 2:
            check_replace(self._budget, text, args[0], args[1])
        if name in _QUADRATIC_METHODS:
            for arg in (*args, *kwargs.values()):
                if isinstance(arg, str) and len(arg) > MAX_QUADRATIC_ARGUMENT:
                    raise SecurityError(
                        f"the argument of {name}() may have at most {MAX_QUADRATIC_ARGUMENT} characters"
                    )
        self._budget.step(1 + len(text) // 256)
        result = method(*args, **kwargs)
        if isinstance(result, (list, tuple)):
            self._budget.make_strings(result)
        else:
            self._budget.make_value(result)
        return result


@pass_context  # which also keeps Jinja from applying it to constants while compiling
def _finalize(context: Context, value: Any) -> str:
    """Called for every expression that a template writes out."""
    environment = context.environment
    assert isinstance(environment, TemplateSandbox)
    return environment.output(value)


def _raise_exception(message: str) -> None:
    """How a template refuses a conversation."""
    raise TemplateRuntimeError(str(message)[:500])


def _strftime_now(form: str) -> str:
    """The local date or time; what templates of Llama 3 and others put into their system prompt."""
    if len(form) > 100:
        raise TemplateRuntimeError("the format of strftime_now() may have at most 100 characters")
    return datetime.now().strftime(form)
