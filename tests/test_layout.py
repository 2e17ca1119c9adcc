"""The tree holds what design and style promise: who imports whom, what no file may contain, how long a file is."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SHIPPED = ("atoma_jax", "pallas_kernels", "sharding", "configs")
SOURCES = sorted(path for package in SHIPPED for path in (ROOT / package).rglob("*.py"))
ALL_PYTHON = sorted([*SOURCES, *(ROOT / "tests").rglob("*.py"), *(ROOT / "bench").rglob("*.py")])

BASICS = tuple(
    f"atoma_jax.{name}"
    for name in (
        "errors",
        "config",
        "cores",
        "histogram",
        "model_spec",
        "sampling_params",
        "structured_outputs",
        "outputs",
    )
)
PUBLIC = ("atoma_jax", *BASICS)
PARSERS = tuple(
    f"atoma_jax.loading.{name}"
    for name in (
        *("gguf", "hf", "fetch", "orbax.manifest_values"),
        *("checkpoint", "mapped", "json_file", "name_patterns", "rope", "spec_json", "spec_limits"),
        *("generation_defaults", "threads"),
    )
)
NAMES = ("atoma_jax.loading.gguf.names", "atoma_jax.loading.hf.names")  # beside the parsers: they know models' weights
HOST_QUANT = ("groups", "ggml", "ggml_types", "ggml_blocks", "packed", "quantizers")  # of quant, what works with numpy
# The engine's books: no arrays of a device. What they import joins them here.
HOST_MODULES = (
    *(
        "channel",
        "scheduler",
        "sliced_scheduler",
        "admission",
        "plan",
        "waiting",
        "residency",
        "pages",
        "prefix_cache",
        "sequence",
        "guide",
    ),
)
ON_THE_HOST = tuple(f"atoma_jax.engine.{name}" for name in HOST_MODULES)

KERNELS = ("pallas_kernels", "sharding", "atoma_jax.quant", "atoma_jax.native", *BASICS)
LOADING = ("sharding", "atoma_jax.models", "atoma_jax.ops", "atoma_jax.quant", *BASICS)

# The arrows of docs/structure.md. A module may import itself, its own package's modules, and what stands here; the
# longest name that fits it decides. "atoma_jax" alone means the public names, not what lies below.
ARROWS: dict[str, tuple[str, ...]] = {
    "pallas_kernels": (),
    "sharding": (),
    "configs": (),
    "atoma_jax": ("atoma_jax.engine", *BASICS),
    "atoma_jax.errors": (),
    "atoma_jax.config": BASICS,
    "atoma_jax.cores": (),
    "atoma_jax.histogram": (),
    "atoma_jax.model_spec": BASICS,
    "atoma_jax.sampling_params": BASICS,
    "atoma_jax.structured_outputs": BASICS,
    "atoma_jax.outputs": BASICS,
    "atoma_jax.tokenizer": ("atoma_jax.loading.gguf.file", *BASICS),
    "atoma_jax.quant": BASICS,
    "atoma_jax.native": ("atoma_jax.quant", *BASICS),
    "atoma_jax.ops": KERNELS,
    "atoma_jax.models": ("sharding", "atoma_jax.ops", "atoma_jax.quant", *BASICS),
    "atoma_jax.loading": LOADING,
    **dict.fromkeys(NAMES, ("atoma_jax.loading", *LOADING)),
    "atoma_jax.engine": (
        "sharding",
        "atoma_jax.models",
        "atoma_jax.ops",
        "atoma_jax.loading",
        "atoma_jax.tokenizer",
        "atoma_jax.quant",
        *BASICS,
    ),
    "atoma_jax.server": PUBLIC,
    "atoma_jax.benchmarks": PUBLIC,
    "atoma_jax.evaluation": PUBLIC,
    "atoma_jax.cli": (
        "atoma_jax.server",
        "atoma_jax.benchmarks",
        "atoma_jax.evaluation",
        "atoma_jax.loading.fetch.hub",
        "atoma_jax.loading.gguf.mixtures",
        "atoma_jax.loading.gguf.requantize",
        *PUBLIC,
    ),
    **dict.fromkeys(PARSERS, (*PARSERS, "configs", *(f"atoma_jax.quant.{name}" for name in HOST_QUANT), *BASICS)),
    **dict.fromkeys(ON_THE_HOST, (*ON_THE_HOST, *BASICS)),
}
WITHOUT_JAX = (*PARSERS, *ON_THE_HOST, "atoma_jax.tokenizer", "atoma_jax.errors", "atoma_jax.config", "atoma_jax.cores")
JAX = {"jax", "jaxlib", "flax", "orbax", "optax"}

# Code that runs what a file or a request says; reliability.md row 8.
FORBIDDEN_IMPORTS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}

LONGEST_FILE = 600  # lines


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in SOURCES}


def imports_of(path: Path) -> Iterator[str]:
    """Every module that a file imports, inside functions too; `from package import module` counts as the module."""
    package = module_of(path) if path.name == "__init__.py" else module_of(path).rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, base] if base else parents)
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield inner if inner in MODULES else base


def lies_in(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def rule_for(module: str) -> str | None:
    return max((name for name in ARROWS if lies_in(module, name)), key=len, default=None)


def may_import(module: str, target: str) -> bool:
    rule = rule_for(module)
    assert rule is not None
    if module != "atoma_jax" and lies_in(target, rule):
        return True
    return any(
        target == "atoma_jax" if allowed == "atoma_jax" else lies_in(target, allowed) for allowed in ARROWS[rule]
    )


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_imports_follow_the_arrows(path: Path) -> None:
    module = module_of(path)
    if module.startswith("atoma_jax."):
        assert rule_for(module) != "atoma_jax", f"{module} has no row in ARROWS: say what it may import"
    wrong = {
        target
        for target in imports_of(path)
        if any(lies_in(target, package) for package in SHIPPED) and not may_import(module, target)
    }
    assert not wrong, f"{module} must not import {sorted(wrong)}"


@pytest.mark.parametrize(
    ("module", "target"),
    [
        ("pallas_kernels.qmm", "atoma_jax.quant"),
        ("sharding.mesh", "atoma_jax.errors"),
        ("atoma_jax.models.llama", "pallas_kernels.qmm"),
        ("atoma_jax.models.llama", "atoma_jax.engine.pages"),
        ("atoma_jax.engine.pages", "atoma_jax.engine.runner"),
        ("atoma_jax.engine.runner", "atoma_jax.server.app"),
        ("atoma_jax.loading.gguf.file", "atoma_jax.loading.weights"),
        ("atoma_jax.server.app", "atoma_jax.engine.scheduler"),
    ],
)
def test_the_rule_refuses_a_wrong_arrow(module: str, target: str) -> None:
    assert not may_import(module, target)


def test_no_jax_where_none_belongs() -> None:
    """Imported for real, in a process of its own: a JAX that comes through a third module counts as well.

    The public names of `atoma_jax` are left out: they are the engine's, and these modules do not use them.
    """
    modules = sorted(
        module for module in set(MODULES) - set(NAMES) if any(lies_in(module, name) for name in WITHOUT_JAX)
    )
    face = "import sys, types; face = types.ModuleType('atoma_jax'); face.__path__ = ['atoma_jax']"
    face += "; sys.modules['atoma_jax'] = face"
    code = f"{face}; import {', '.join(modules)}; print(*sorted({JAX!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_nothing_runs_what_a_file_says(path: Path) -> None:
    imported = {name.split(".")[0] for name in imports_of(path)}
    assert not imported & FORBIDDEN_IMPORTS
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in FORBIDDEN_CALLS, f"line {node.lineno}"
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            assert isinstance(node.value, ast.Constant), f"line {node.lineno}"
            assert node.value.value is False, f"line {node.lineno}"


@pytest.mark.parametrize("path", ALL_PYTHON, ids=lambda path: str(path.relative_to(ROOT)))
def test_file_says_what_it_owns_and_is_not_too_long(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert ast.get_docstring(ast.parse(text)), "the first lines say what the file owns"
    assert len(text.splitlines()) <= LONGEST_FILE, "look for the second thing in it"


def test_every_toml_file_parses() -> None:
    files = sorted((ROOT / "configs").rglob("*.toml"))
    assert files
    for path in files:
        tomllib.loads(path.read_text(encoding="utf-8"))


def test_no_path_of_a_developers_machine_is_in_the_tree() -> None:
    private = re.compile(r"(?<![\w./~])/(?:work|root|home/\w+|Users/\w+)(?:/|\b)")
    kinds = {".py", ".md", ".toml", ".cc", ".h", ".yaml", ""}
    folders = [*SHIPPED, "tests", "bench", "docs", ".ci"]
    files = [path for folder in folders for path in (ROOT / folder).rglob("*")] + list(ROOT.iterdir())
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in files
        if path.is_file() and path.suffix in kinds and path != Path(__file__)
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if private.search(line)
    ]
    assert not found
