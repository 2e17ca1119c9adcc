"""BitNet b1.58 in numpy and float64, straight from a Hugging Face folder: the slow reference of all faster ones.

Activations are rounded to int8 in front of every ternary matrix. A rounding has an edge: where x · s is almost a half,
float32 and float64, or two orders of summation, fall on different sides, and from then on all logits differ by about a
thousandth of their size, in every pair of implementations. So the reference says how near to an edge each position has
come, and it can take the codes that another implementation chose, after checking that they are fair roundings.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes  # noqa: F401 — gives numpy the bfloat16 that safetensors asks it for
import numpy as np
from safetensors.numpy import load_file

# Of an int8 step. Seen: float32 is off by up to 6e-6 where the largest step is 127. Nearer to an edge than this, two
# implementations need not agree.
EDGE = 2e-5


@dataclass(frozen=True)
class Trace:
    """What a forward pass computed.

    `edge[t]` is the smallest distance to a rounding edge, in steps of int8, of any activation of positions 0 … t: those
    that the logits of position t depend on.
    """

    logits: np.ndarray  # [T, V]
    edge: np.ndarray  # [T]


class BitNetReference:
    """A folder's model."""

    def __init__(self, folder: Path):
        self._config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self._tensors = load_file(folder / "model.safetensors")
        self.weights = {name: self._read(name) for name in self._tensors if not name.endswith("_scale")}

    def _read(self, name: str) -> np.ndarray:
        """A tensor as numbers: four rows a byte, lowest bits first, each code less one, times or over the scale."""
        stored = self._tensors[name]
        if stored.dtype != np.uint8:
            return stored.astype(np.float64)
        codes = np.concatenate([(stored >> shift) & 3 for shift in (0, 2, 4, 6)]).astype(np.float64) - 1
        scale = self._tensors[f"{name}_scale"].astype(np.float64)
        multiplies = self._config["quantization_config"]["linear_class"] == "autobitlinear"
        return codes * scale if multiplies else codes / scale

    def forward(self, ids: np.ndarray, taken: Mapping[str, np.ndarray] | None = None) -> Trace:
        """Logits after each of the tokens. `taken` has the int8 codes [T, K] of another implementation, by matrix."""
        run = _Pass(self._config, self.weights, taken)
        return Trace(run.logits(ids), np.minimum.accumulate(run.edge))


class _Pass:
    """One forward pass over T tokens."""

    def __init__(self, config: dict, weights: Mapping[str, np.ndarray], taken: Mapping[str, np.ndarray] | None):
        self._config, self._weights, self._taken = config, weights, taken
        self.edge: np.ndarray = np.array(0.5)

    def logits(self, ids: np.ndarray) -> np.ndarray:
        x = self._weights["model.embed_tokens.weight"][ids]
        for i in range(self._config["num_hidden_layers"]):
            layer = f"model.layers.{i}"
            y = self._norm(x, f"{layer}.input_layernorm")
            q, k, v = (self._linear(y, f"{layer}.self_attn.{name}_proj") for name in "qkv")
            y = self._norm(self._attention(q, k, v), f"{layer}.self_attn.attn_sub_norm")
            x = x + self._linear(y, f"{layer}.self_attn.o_proj")
            y = self._norm(x, f"{layer}.post_attention_layernorm")
            gate, up = (self._linear(y, f"{layer}.mlp.{name}_proj") for name in ("gate", "up"))
            y = self._norm(np.maximum(gate, 0) ** 2 * up, f"{layer}.mlp.ffn_sub_norm")
            x = x + self._linear(y, f"{layer}.mlp.down_proj")
        return self._norm(x, "model.norm") @ self._weights["model.embed_tokens.weight"].T

    def _norm(self, x: np.ndarray, name: str) -> np.ndarray:
        mean_square = np.mean(x**2, axis=-1, keepdims=True)
        return x / np.sqrt(mean_square + self._config["rms_norm_eps"]) * self._weights[f"{name}.weight"]

    def _linear(self, x: np.ndarray, name: str) -> np.ndarray:
        scale = 127 / np.maximum(np.abs(x).max(axis=-1, keepdims=True), 1e-5)
        steps = x * scale
        self.edge = np.minimum(self.edge, np.abs(steps - np.floor(steps) - 0.5).min(axis=-1))
        codes = np.clip(np.rint(steps), -128, 127)  # numpy rounds halves to even
        if self._taken is not None:
            codes = self._taken[name].astype(np.float64)
            assert np.abs(codes - steps).max() < 0.5 + 1e-3, f"{name}: not the nearest steps"
        return codes / scale @ self._weights[f"{name}.weight"].T

    def _attention(self, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
        T = len(q)
        heads, kv_heads = self._config["num_attention_heads"], self._config["num_key_value_heads"]
        q, k = self._rotated(q.reshape(T, heads, -1)), self._rotated(k.reshape(T, kv_heads, -1))
        v = v.reshape(T, kv_heads, -1)
        out = np.empty_like(q)
        for head in range(heads):
            shared = head * kv_heads // heads
            scores = q[:, head] @ k[:, shared].T / np.sqrt(q.shape[-1])
            scores[np.triu_indices(T, 1)] = -np.inf
            shares = np.exp(scores - scores.max(axis=-1, keepdims=True))
            out[:, head] = shares / shares.sum(axis=-1, keepdims=True) @ v[:, shared]
        return out.reshape(T, -1)

    def _rotated(self, x: np.ndarray) -> np.ndarray:
        """[T, heads, H], with the halves of a head as the pairs."""
        half = x.shape[-1] // 2
        turn = np.exp(1j * np.outer(np.arange(len(x)), self._config["rope_theta"] ** -(np.arange(half) / half)))
        pairs = (x[..., :half] + 1j * x[..., half:]) * turn[:, None]
        return np.concatenate([pairs.real, pairs.imag], axis=-1)
