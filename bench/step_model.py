"""A model of the time of a step on GPUs that are not here: what a device reads, multiplies and exchanges, each over the
rate that the GPU is said to have. Arithmetic alone; what is exchanged comes from a compiled step's HLO.

Times are lower bounds: a kernel that reaches its rate, no host, no gaps. Meshes are compared by them, nothing else.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from atoma_jax.model_spec import ModelSpec
from bench.collectives import Collective
from sharding.mesh import MeshShape


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What is put in.

    Attributes:
        nvlink: bytes a second of one GPU, sent and received together, as NVIDIA states it.
        hbm: bytes a second of one GPU's memory.
        matrix: operations a second of its matrix units, two for a product and its sum.
        latency: seconds of one exchange whose bytes take none.
    """

    nvlink: float = 900e9
    hbm: float = 4.3e12
    matrix: float = 990e12
    latency: float = 10e-6

    def exchange_time(self, sent: float, calls: float) -> float:
        """Seconds; a device receives as much as it sends, at the same time."""
        return sent / (self.nvlink / 2) + calls * self.latency

    def local_time(self, read: float, operations: float) -> float:
        """Seconds of a device by itself: reading and multiplying overlap."""
        return max(read / self.hbm, operations / self.matrix)


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchange:
    """What a device sends in a step, in bytes, and in how many exchanges. Only what every step does.

    Attributes:
        ahead, ahead_calls: in each layer, of the next layer's weights, while that layer computes.
        rounds, rounds_calls: in each layer, of tokens and sums that go round while products are made.
        waited, waited_calls: in each layer, of activations, which the layer waits for.
        once, once_calls: before and behind the layers.
    """

    ahead: float = 0
    ahead_calls: float = 0
    rounds: float = 0
    rounds_calls: float = 0
    waited: float = 0
    waited_calls: float = 0
    once: float = 0
    once_calls: float = 0

    @classmethod
    def of(cls, found: Sequence[Collective], layers: int) -> "Exchange":
        """Of a compiled step with a loop over `layers` layers, more than one."""
        sums = dict.fromkeys([field.name for field in fields(cls)], 0.0)
        for one in found:
            if not one.always:
                continue
            in_loop = one.times % layers == 0
            hidden = {"all-gather over fsdp": "ahead", "collective-permute over tensor": "rounds"}
            name = hidden.get(f"{one.kind} over {'+'.join(one.axes)}", "waited") if in_loop else "once"
            turns = layers if in_loop else 1
            sums[name] += one.step_bytes / turns
            sums[f"{name}_calls"] += one.times / turns
        return cls(**sums)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    """Seconds of a step.

    Attributes:
        local: of a device by itself.
        exchanged: that devices talk, hidden or not.
        total: of the step.
    """

    local: float
    exchanged: float
    total: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What one slice does in a step."""

    tokens: int
    rows: int  # of logits
    context: float  # tokens that each token attends to
    read_context: float  # tokens whose K and V are read from memory, of all rows together


def decode_load(rows: int, context: int) -> Load:
    """A token of each of some sequences."""
    return Load(tokens=rows, rows=rows, context=context, read_context=rows * context)


def prefill_load(tokens: int, context: int) -> Load:
    """Prompts of `context` tokens, of which each attends to half on average; K and V are at hand."""
    rows = math.ceil(tokens / context)
    return Load(tokens=tokens, rows=rows, context=min(tokens, context) / 2, read_context=tokens)


def exchange_at(steps: tuple[Exchange, Exchange], tokens: tuple[int, int], rows: int, load: Load) -> Exchange:
    """What a slice of another load exchanges, from two compiled steps that differ in tokens alone. Weights are the same
    whatever a step holds; activations in front of the layers and in them grow with tokens, those behind with rows.

    Args:
        steps: with fewer and with more tokens, whose residual streams lie and go round as that of the load.
        tokens: of these two.
        rows: of logits, of both.
        load: the other one.
    """
    (one, other), (few, many) = steps, tokens
    of_token = (other.once - one.once) / (many - few)
    of_row = (one.once - one.ahead - few * of_token) / rows  # the first layer is gathered in front of the others
    return replace(
        one,
        rounds=one.rounds / few * load.tokens,
        waited=one.waited / few * load.tokens,
        once=one.ahead + of_token * load.tokens + of_row * load.rows,
    )


def step_time(
    part: ModelSpec, mesh: MeshShape, vocab_size: int, load: Load, exchange: Exchange, machine: Machine
) -> StepTime:
    """Of a model in bfloat16.

    Args:
        part: the model as one device computes it.
        mesh: that it is cut over.
        vocab_size: tokens, with what fills the vocabulary up.
        load: of one slice.
        exchange: of one device at that load.
        machine: a GPU and its links.
    """
    D, H, N, K, F = part.dim, part.head_dim, part.num_heads, part.num_kv_heads, part.ffn_dim
    parameters = (2 * N + 2 * K) * H * D + 3 * F * D  # of a layer, once gathered
    # What is spread along fsdp is read to be sent, written as it comes, and read again.
    passes = 1 if mesh.fsdp == 1 else 2 + 1 / mesh.fsdp
    read = 2 * parameters * passes + 2 * 2 * K * H * load.read_context
    operations = 2 * parameters * load.tokens + 4 * N * H * load.context * load.tokens
    layer = machine.local_time(read, operations)
    table = vocab_size // (mesh.tensor * mesh.fsdp) * D
    head = machine.local_time(2 * table, 2 * table * load.rows * mesh.fsdp)
    hidden = machine.exchange_time(exchange.ahead + exchange.rounds, exchange.ahead_calls + exchange.rounds_calls)
    waited = machine.exchange_time(exchange.waited, exchange.waited_calls)
    once = machine.exchange_time(exchange.once, exchange.once_calls)
    L = part.num_layers
    return StepTime(
        local=L * layer + head,
        exchanged=L * (hidden + waited) + once,
        total=L * (max(layer, hidden) + waited) + head + once,
    )
