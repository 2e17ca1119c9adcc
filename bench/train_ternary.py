"""Trains a small BitNet b1.58 model on the World English Bible and writes it as a Hugging Face folder and as GGUF.

`pip install -e '.[bench]'`, then `python -m bench.train_ternary --out build/ternary/model`. Owns the optimizer, the
loop and its checkpoints: a run that was stopped goes on from its last checkpoint when it is started again with the same
settings. The schedule follows "The Era of 1-bit LLMs: Training Tips" of BitNet's authors: a first stage with a high
learning rate and weight decay, a second one that goes down and has no decay. The first may be ended at any checkpoint.
"""

import json
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import typer
from safetensors import safe_open
from safetensors.numpy import save_file

from bench.ternary.export import freeze, write_folder, write_gguf
from bench.ternary.model import Shape, Weights, as_ternary, initial_weights, mean_nll
from bench.ternary.sample import continuation
from bench.ternary.text import all_windows, random_windows, read_corpus, stream, train_tokenizer

VALIDATE_IN = 8  # windows at once


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Everything that decides the trained weights, beside the text and the model's shape."""

    steps: int
    anneal_from: int  # the step at which the second stage begins
    horizon: int  # steps of the first stage's cosine, which the second stage cuts short
    batch: int  # windows a step
    peak_rate: float
    last_rate: float  # of the peak
    warm_up: int  # steps
    weight_decay: float  # of matrices and embedding, in the first stage
    largest_gradient: float  # norm over all weights
    seed: int
    quantized: bool  # False trains the dense twin: the same model without any rounding

    def optimizer(self) -> optax.GradientTransformation:
        """AdamW in two stages: warm-up and a cosine; then a steeper cosine without weight decay."""
        last = self.peak_rate * self.last_rate
        first = optax.warmup_cosine_decay_schedule(0.0, self.peak_rate, self.warm_up, self.horizon, last)
        reached = float(np.asarray(first(self.anneal_from)))
        second = optax.cosine_decay_schedule(reached, self.steps - self.anneal_from, last / reached)
        rate = optax.join_schedules([first, second], [self.anneal_from])
        decay = optax.piecewise_constant_schedule(self.weight_decay, {self.anneal_from: 0.0})
        return optax.chain(
            optax.clip_by_global_norm(self.largest_gradient),
            optax.adamw(rate, b1=0.9, b2=0.95, weight_decay=decay, mask=_is_matrix),
        )

    def decides(self, done: int) -> dict[str, Any]:
        """The settings that the first `done` steps depend on: the first stage knows nothing of the second."""
        settings = asdict(self)
        if done <= self.anneal_from:
            del settings["steps"], settings["anneal_from"]
        return settings


def _is_matrix(weights: Weights) -> dict[str, bool]:
    return {name: w.ndim == 2 for name, w in weights.items()}


@dataclass(slots=True)
class Run:
    """A training run: what changes from step to step, and where it is kept."""

    recipe: Recipe
    shape: Shape
    tokens: np.ndarray
    checkpoint: Path
    weights: Weights
    state: Any
    done: int = 0

    @classmethod
    def start(cls, recipe: Recipe, shape: Shape, tokens: np.ndarray, checkpoint: Path) -> "Run":
        """From the checkpoint, if there is one of the same settings; else from the initial weights."""
        weights = initial_weights(shape, recipe.seed)
        run = cls(recipe, shape, tokens, checkpoint, weights, recipe.optimizer().init(weights))
        if checkpoint.is_file():
            run._resume()
        return run

    def _resume(self) -> None:
        with safe_open(self.checkpoint, "np") as saved:
            found = saved.metadata()
            done = int(found["done"])
            if found["settings"] != self._settings(done):
                raise typer.BadParameter(f"{self.checkpoint} is of other settings: delete it or choose another --work")
            leaves, tree = jax.tree.flatten((self.weights, self.state))
            restored = [jnp.asarray(saved.get_tensor(f"{i}")) for i in range(len(leaves))]
        self.weights, self.state = jax.tree.unflatten(tree, restored)
        self.done = done

    def save(self) -> None:
        """Replaces the checkpoint in one move, so that a stop in between leaves the old one."""
        leaves = {f"{i}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves((self.weights, self.state)))}
        new = self.checkpoint.with_suffix(".new")
        save_file(leaves, new, metadata={"settings": self._settings(self.done), "done": f"{self.done}"})
        new.replace(self.checkpoint)

    def _settings(self, done: int) -> str:
        return json.dumps([self.recipe.decides(done), asdict(self.shape)])

    def train(self, every: int, held_out: np.ndarray) -> None:
        """Runs to the end. Prints and saves every so many steps."""
        optimizer, shape, quantized = self.recipe.optimizer(), self.shape, self.recipe.quantized

        def loss_of(weights: Weights, inputs: jax.Array, targets: jax.Array) -> jax.Array:
            seen = as_ternary(weights, shape) if quantized else weights
            return mean_nll(seen, inputs, targets, shape, quantized=quantized)

        @partial(jax.jit, donate_argnums=(0, 1))
        def step(weights: Weights, state: Any, inputs: jax.Array, targets: jax.Array) -> tuple[Weights, Any, jax.Array]:
            loss, gradients = jax.value_and_grad(loss_of)(weights, inputs, targets)
            updates, state = optimizer.update(gradients, state, weights)
            return optax.apply_updates(weights, updates), state, loss  # pyright: ignore[reportReturnType]

        losses: list[float] = []
        began, first = time.monotonic(), self.done
        while self.done < self.recipe.steps:
            inputs, targets = random_windows(
                self.tokens, count=self.recipe.batch, length=shape.context, seed=self.recipe.seed, step=self.done
            )
            self.weights, self.state, loss = step(self.weights, self.state, inputs, targets)
            losses.append(float(loss))
            self.done += 1
            if self.done % every == 0 or self.done == self.recipe.steps:
                self.save()
                seen = as_ternary(self.weights, shape) if quantized else self.weights
                rate = (self.done - first) * inputs.size / (time.monotonic() - began)
                validation = loss_on(seen, held_out, shape, quantized=quantized)
                mean = sum(losses) / len(losses)
                print(f"step {self.done} train {mean:.4f} held out {validation:.4f} {rate:.0f} tokens/s", flush=True)
                losses.clear()


def loss_on(weights: Any, tokens: np.ndarray, shape: Shape, *, quantized: bool) -> float:
    """Nats a token over all windows of a text."""
    inputs, targets = all_windows(tokens, shape.context)
    total = 0.0
    for at in range(0, len(inputs), VALIDATE_IN):
        part = slice(at, at + VALIDATE_IN)
        total += float(_NLL(weights, inputs[part], targets[part], shape, quantized=quantized)) * len(inputs[part])
    return total / len(inputs)


_NLL = jax.jit(mean_nll, static_argnames=("shape", "quantized"))


def main(
    out: Annotated[Path, typer.Option(help="folder for the trained model")],
    work: Annotated[Path, typer.Option(help="folder for checkpoints")] = Path("build/ternary"),
    steps: int = 500,
    anneal_from: Annotated[int, typer.Option(help="step at which the second stage begins")] = 300,
    horizon: Annotated[int, typer.Option(help="steps of the first stage's cosine, if it ran to its end")] = 1500,
    batch: int = 4,
    peak_rate: float = 3e-3,
    seed: int = 1,
    every: Annotated[int, typer.Option(help="steps between checkpoints")] = 50,
    dense: Annotated[bool, typer.Option(help="train the dense twin, for comparison; nothing is written")] = False,
) -> None:
    """Trains, then writes `out/hf` and `out/model-TQ2_0.gguf`, and prints what came out."""
    shape = Shape()
    recipe = Recipe(
        steps=steps,
        anneal_from=anneal_from,
        horizon=horizon,
        batch=batch,
        peak_rate=peak_rate,
        last_rate=0.05,
        warm_up=100,
        weight_decay=0.1,
        largest_gradient=1.0,
        seed=seed,
        quantized=not dense,
    )
    work.mkdir(parents=True, exist_ok=True)
    corpus = read_corpus()
    tokenizer = train_tokenizer(corpus.training, shape.V)
    tokens, held_out = stream(tokenizer, corpus.training), stream(tokenizer, corpus.held_out)
    bytes_a_token = sum(len(text.encode()) for text in corpus.held_out) / len(held_out)
    print(f"{len(tokens)} tokens to train on, {len(held_out)} held out, {bytes_a_token:.3f} bytes a token")
    run = Run.start(recipe, shape, tokens, work / ("dense.safetensors" if dense else "ternary.safetensors"))
    run.train(every, held_out)
    if dense:
        return
    frozen = freeze({name: np.asarray(w) for name, w in run.weights.items()}, shape)
    write_folder(out / "hf", frozen, shape, tokenizer)
    write_gguf(out / "model-TQ2_0.gguf", frozen, shape, tokenizer)
    report = {
        "recipe": asdict(recipe),
        "shape": asdict(shape),
        "training_tokens": len(tokens),
        "tokens_seen": recipe.steps * recipe.batch * shape.context,
        "parameters": sum(w.size for w in run.weights.values()),
        "training_nats_a_token": loss_on(frozen.values(), tokens[: len(held_out)], shape, quantized=True),
        "held_out_tokens": len(held_out),
        "held_out_nats_a_token": (nats := loss_on(frozen.values(), held_out, shape, quantized=True)),
        "held_out_bits_a_byte": nats / np.log(2) / bytes_a_token,
        "zeros": float(np.mean([np.mean(codes == 0) for codes in frozen.codes.values()])),
        "continuation": continuation(frozen.values(), shape, tokenizer, "In the beginning", tokens=80),
    }
    (out / "training.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    typer.run(main)
