"""`atoma-jax plan` tells from headers what a model takes and what fits."""

import json
import re

import pytest

from atoma_jax.cli.plan import parse_bytes, size
from atoma_jax.errors import UserError


@pytest.fixture
def model(tmp_path, monkeypatch):
    """The tiny llama; reading a weight fails the test."""
    from tests.tiny_model import write_tiny_llama

    monkeypatch.setattr("atoma_jax.quant.ggml.decode", None)
    monkeypatch.setattr("atoma_jax.quant.ggml.dequantize", None)
    return str(write_tiny_llama(tmp_path / "tiny.gguf"))


def planned(run, *arguments):
    result = run("plan", *arguments, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def test_the_numbers_add_up(run, model):
    plan = planned(run, model, "--memory", "4MB", "--max-model-len", "100", "--kv-cache-dtype", "float32")
    assert plan["parameters"] == sum(kind["parameters"] for kind in plan["types"].values())
    assert plan["file_bytes"] == sum(kind["file_bytes"] for kind in plan["types"].values())
    assert plan["weight_bytes"] == sum(plan["weights"].values())
    # Two layers, K and V, two kv heads of 16, four bytes each.
    assert (plan["kv_cache_dtype"], plan["kv_bytes_per_token"]) == ("float32", 2 * 2 * 2 * 16 * 4)
    assert plan["kv_bytes"] == 4_000_000 - plan["weight_bytes"]
    pages = plan["kv_bytes"] // (plan["kv_bytes_per_token"] * 16) - 1
    assert plan["longest_context"] == min(256, 16 * pages)
    assert plan["max_sequences"] == pages // 7


def test_the_cache_and_the_layout_count(run, model):
    narrow = planned(run, model, "--kv-cache-dtype", "int8", "--weight-layout", "planar")
    wide = planned(run, model)
    assert narrow["kv_bytes_per_token"] == 2 * 2 * 2 * (16 + 4)
    assert narrow["weight_bytes"] < wide["weight_bytes"]
    assert narrow["memory"] is narrow["kv_bytes"] is narrow["longest_context"] is narrow["max_sequences"] is None


def test_another_platform_than_this_machines(run, model):
    plan = planned(run, model, "--platform", "cuda", "--memory", "8GB")
    assert (plan["platform"], plan["weight_layout"], plan["kv_cache_dtype"]) == ("cuda", "planar", "bfloat16")
    assert plan["kv_bytes"] == 8 * 10**9 - plan["weight_bytes"] - plan["workspace_bytes"]
    assert plan["workspace_bytes"] > 0


def test_a_model_that_does_not_fit_says_what_is_missing(run, model):
    plan = planned(run, model, "--memory", "1kB")
    assert (plan["kv_bytes"], plan["longest_context"], plan["max_sequences"]) == (1000 - plan["weight_bytes"], 0, 0)
    shown = run("plan", model, "--memory", "1kB")
    assert "does not fit" in shown.stdout
    assert size(plan["weight_bytes"] - 1000) in shown.stdout


def test_people_get_a_table(run, model):
    result = run("plan", model, "--memory", "2GB")
    assert result.exit_code == 0, result.stderr
    shown = result.stdout
    assert "Q8_0" in shown
    assert "longest context 256 tokens" in shown


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--platform", "tpu"], "platform: must be cpu or cuda"),
        (["--memory", "lots"], "memory: must be a size above zero"),
        (["--max-model-len", "257"], "max_model_len: must be at most 256"),
        (["--kv-cache-dtype", "int3"], "kv_cache_dtype: must be one of"),
        (["--quantization", "int4"], "are F32, Q8_0 already|are Q8_0 already"),
    ],
)
def test_what_cannot_be_is_refused(run, model, flags, message):
    result = run("plan", model, *flags)
    assert result.exit_code == 2

    assert re.search(message, result.stderr)


@pytest.mark.parametrize(
    ("text", "count"),
    [("80GB", 80 * 10**9), ("24 GiB", 24 * 2**30), ("1.5k", 1500), ("1000000", 10**6), ("3mib", 3 * 2**20)],
)
def test_sizes_as_people_write_them(text, count):
    assert parse_bytes("memory", text) == count


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "1e3", "nan", "2 PB", "9" * 40])
def test_what_is_no_size(text):
    with pytest.raises(UserError, match="memory"):
        parse_bytes("memory", text)
