"""How the results of `bench/accuracy.py` look: a page in Markdown and a plot. Measures nothing."""

# The library that draws is not in every environment.
# pyright: reportMissingImports=false

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

_HEAD = (
    *("row", "file", "packed", "rows", "perplexity", "ln ratio to base", "KLD", "99 % KLD", "RMS Δp", "same top"),
    *("load", "prefill", "decode"),
)
BASE = "F32"  # the row that all others are compared with
_PEER_HEAD = ("row", "ln ratio to base", "llama.cpp", "KLD", "llama.cpp", "same top", "llama.cpp")

_INTRODUCTION = """
# What each type costs in accuracy

Made by `python -m bench.accuracy --ladder tests/data/ladder_smollm2.json`; do not edit. All numbers, with standard
errors and quantiles, are in [accuracy.json](accuracy.json).

![KL divergence over bits a weight](accuracy.png)

Model: `{model}`, decoded to F32: that is the base, the row F32. Text: `{text}`, {tokens} tokens scored, each given all
before it. Products are computed in {dtype} by XLA, so that the types alone show. Ternary types are for models trained
so. {about}

- file, packed, rows: bits a parameter, norms and embedding included: in the file, on the device in the packed layout
  (the default on GPUs) and in the layout for CPUs (a byte a code), both as on a CPU, where dense weights take 32 bits;
  on a GPU they take 16. w8a8 has rows only. Packed, layers of different types are stacked apart, but
  projections that are fused (q, k, v; gate, up) share the widest of their types.
- perplexity, with standard error; its logarithm less the base's, with the standard error of the paired difference.
- KLD: mean KL divergence D(base‖row) of the next token's distribution in nats, and its 99 % quantile. RMS Δp: of the
  probability of the text's own token. same top: how often both hold the same token for the likeliest. Definitions and
  errors are those of llama.cpp's `llama-perplexity --kl-divergence`.
- load: seconds for the weights; prefill and decode: tokens a second, one sequence of 512 + 64 tokens, engine defaults.
- source is the file as it was fetched. `load:` rows are the base, quantized while it is loaded (`--quantization`; the
  embedding stays dense); `KV:` rows are the base with another type of KV cache (`--kv-cache-dtype`).
- Names such as Q4_K_M are llama.cpp's mixtures. Where blocks of 256 do not fit a row, llama.cpp and
  `atoma-jax quantize` fall back to Q4_0, Q5_0, Q5_1, Q8_0 or IQ4_NL. IQ types but IQ4_NL, NVFP4 and Q1_0 are written
  with libgguf's blocks, the embedding in Q8_0, and without a real importance matrix, which the smallest of them need.
"""

# What a reader has to know of a model before its numbers; nothing for others.
_ABOUT = {
    "smollm2-135m-instruct": """
The base is no original: its weights come out of a file in Q4_1, so a type that can hold Q4_1's numbers looks better
here than on weights as they were trained; Q4_1 and load:int4 hold them exactly, and their zeros say nothing about other
models. The model has 135 million parameters, 21 % of them in the embedding, and suffers more than large ones. Its rows
have 576 and 1,536 inputs: of types with blocks of 256 only the down projections are what the name says.
"""
}

_PEERS = """
## Beside llama.cpp

llama.cpp's own quantizer and arithmetic over the same base and text, recorded once. Its arithmetic rounds activations
to int8, which the row source shows alone: its weights are the base's.
"""


def render(results: Mapping[str, Any], order: Sequence[str], peers: Mapping[str, Mapping[str, float]]) -> str:
    """The page.

    Args:
        results: of `bench/accuracy.py`.
        order: of the rows.
        peers: llama.cpp's numbers by row, "ppl", "kld" and "same_top", those of the base among them; or none.
    """
    rows: Mapping[str, Mapping[str, Any]] = results["rows"]
    tokens = max((row.get("tokens", 0) for row in rows.values()), default=0)
    about = _ABOUT.get(results["model"], "").strip()
    lines = [_INTRODUCTION.format_map({**results, "tokens": tokens, "about": about}).strip(), ""]
    lines += _table(_HEAD, (_cells(name, rows[name]) for name in order))
    both = [name for name in order if name in peers and "perplexity" in rows[name]]
    if both:
        base_ppl = peers[BASE]["ppl"]
        lines += ["", _PEERS.strip(), ""]
        lines += _table(_PEER_HEAD, (_peer_cells(name, rows[name], peers[name], base_ppl) for name in both))
    for key, what in (("machine", "Accuracy"), ("speed_machine", "Times")):
        if key in results:
            lines += ["", f"{what}: {_machine(results[key])}"]
    return "\n".join(lines) + "\n"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [_line(head), _line(["---", *["--:"] * (len(head) - 1)]), *(_line(row) for row in rows)]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cells(name: str, row: Mapping[str, Any]) -> list[str]:
    return [
        name,
        *(_bits(row.get(f"{where}_bits")) for where in ("file", "planar", "rows")),
        _estimate(row, "perplexity"),
        _estimate(row, "log_perplexity_ratio"),
        _number(row.get("mean_kld")),
        _number(row.get("p99_kld")),
        _percent(row.get("rms_dp")),
        _percent(row.get("same_top")),
        _number(row.get("load_s"), " s"),
        _number(row.get("prefill_tokens_per_s")),
        _number(row.get("decode_tokens_per_s")),
    ]


def _peer_cells(name: str, row: Mapping[str, Any], peer: Mapping[str, float], base_ppl: float) -> list[str]:
    return [
        name,
        _estimate(row, "log_perplexity_ratio"),
        _number(math.log(peer["ppl"] / base_ppl)),
        _number(row["mean_kld"]),
        _number(peer["kld"]),
        _percent(row["same_top"]),
        _percent(peer["same_top"]),
    ]


def _bits(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _estimate(row: Mapping[str, Any], name: str) -> str:
    value, error = row.get(name), row.get(f"{name}_se")
    return _number(value) if error is None else f"{_number(value)} ± {_number(error)}"


def _number(value: float | None, unit: str = "") -> str:
    """Four digits, as many as a standard error of a thousand tokens supports; a dash where nothing was measured."""
    if value is None:
        return "–"
    if value == 0:
        return f"0{unit}"
    if not 1e-4 <= abs(value) < 1e5:
        return f"{value:.1e}{unit}"
    return f"{value:.4g}{unit}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.2f} %"


def _machine(machine: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    device = "" if machine["platform"] == "cpu" else f"{machine['num_devices']} × {machine['device']}, "
    return f"{device}{machine['cpu_cores']} cores of {machine['cpu']}; {versions}; {machine['date'][:10]}."


def plot(results: Mapping[str, Any], order: Sequence[str], path: Path) -> None:
    """Draws mean KLD over bits a weight, in the file and packed on the device.

    Rows of the KV cache have no place in it, nor have those without divergence.
    """
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot

    rows: Mapping[str, Mapping[str, Any]] = results["rows"]
    shown = [name for name in order if not name.startswith("KV:") and (rows[name].get("mean_kld") or 0) > 0]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 6), sharey=True, layout="constrained")
    for axes, where, title in ((left, "file", "in the file"), (right, "planar", "packed on the device")):
        for name in shown:
            if f"{where}_bits" not in rows[name]:
                continue
            x, y = rows[name][f"{where}_bits"], rows[name]["mean_kld"]
            axes.plot(x, y, "s" if name.startswith("load:") else "o", color="C1" if ":" in name else "C0")
            axes.annotate(name, (x, y), xytext=(4, 3), textcoords="offset points", fontsize=8)
        axes.set(yscale="log", xscale="log", xlabel=f"bits a parameter {title}")
        axes.set_xticks([5, 6, 8, 12, 16, 32], labels=["5", "6", "8", "12", "16", "32"])
        axes.set_xlim(4.4, 45)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    left.set_ylabel("mean KL divergence from the base, nats")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
