"""This engine beside others: the same file, prompts and machine, in turns. Prints medians and ratios with their spread.

Every engine has a process of its own, for the whole comparison, that waits while others run, so the memory of all
must fit at once. A round runs each kind of work on each engine, in an order that rotates from round to round. Ratios
are taken within a round, so that a machine that slows down for a while slows both sides. Prompts are random token
ids, new in every round and the same for all; outputs are greedy, of a fixed length.

| number | work | tokens a second |
|---|---|---|
| prefill | 1 sequence, 512 tokens in, 1 out; three of them in a row, being short | 3·512 / time |
| decode | 1 sequence, 16 in, 128 out | tokens after the first / their time |
| batch | 16 sequences, 128 in, 64 out | 16·64 / time, prefill included |
| batch decode | the same run | tokens that came once every sequence had its first / their time |

Beside this engine's numbers stands what the machine could do at most (`bench/roofline.py`), measured right before and
right behind each of its runs; what is reached of that is taken within a round, too.

`python -m bench.compare --model smollm2-135m-instruct --python llama_cpp=/other/venv/bin/python`, and on another
type of the same model with `--requantize Q8_0`; `--json`, `--markdown` and `--plot` write files.
"""

import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from atoma_jax.benchmarks.machine import describe_host
from atoma_jax.loading.fetch.hub import resolve
from atoma_jax.loading.gguf.file import GGUFFile
from atoma_jax.loading.gguf.mixtures import TypeOptions
from atoma_jax.loading.gguf.requantize import requantize
from atoma_jax.native.build import BuildError
from bench.compare_report import ENGINE, markdown, plot, ratios, report
from bench.roofline import Gauge, ModelCost, Peaks, limits

ROOT = Path(__file__).resolve().parent.parent
PEERS = ("llama_cpp", "transformers", "openvino")
LOWEST_ID = 1000  # ids below are control tokens and bytes in the vocabularies of all common models
DECODE_PROMPT = 16  # tokens in front of what one sequence decodes
PREFILLS = 3  # a single one is over in less time than a virtual machine is held up for
TAIL = 1500  # characters of a failed process's messages


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What an engine does in its turn: `num_seqs` prompts of `prompt_tokens`, continued by `new_tokens`."""

    num_seqs: int
    prompt_tokens: int
    new_tokens: int
    repeats: int = 1  # with other prompts, one behind the other


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How large each kind of work is."""

    prefill_tokens: int
    decode_tokens: int
    num_seqs: int
    prompt_tokens: int
    output_tokens: int

    def works(self) -> dict[str, Work]:
        """What a round runs, by name."""
        S, P, O = self.num_seqs, self.prompt_tokens, self.output_tokens  # noqa: E741
        return {
            "prefill": Work(num_seqs=1, prompt_tokens=self.prefill_tokens, new_tokens=1, repeats=PREFILLS),
            "decode": Work(num_seqs=1, prompt_tokens=DECODE_PROMPT, new_tokens=self.decode_tokens),
            "batch": Work(num_seqs=S, prompt_tokens=P, new_tokens=O),
        }

    def limits(self, cost: ModelCost, peaks: Peaks) -> dict[str, float]:
        """Tokens a second at most by kind, on a machine of such peaks."""
        return limits(
            cost,
            peaks,
            prefill_tokens=self.prefill_tokens,
            decode=(DECODE_PROMPT, self.decode_tokens),
            num_seqs=self.num_seqs,
            prompt_tokens=self.prompt_tokens,
            output_tokens=self.output_tokens,
        )

    def rates(self, timings: dict[str, dict[str, Any]]) -> dict[str, float]:
        """Tokens a second by kind, from the timings of one round."""
        decode, batch = timings["decode"], timings["batch"]
        return {
            "prefill": PREFILLS * self.prefill_tokens / timings["prefill"]["total_s"],
            "decode": decode["decoded"] / (decode["total_s"] - decode["first_s"]),
            "batch": self.num_seqs * self.output_tokens / batch["total_s"],
            "batch_decode": batch["decoded"] / (batch["total_s"] - batch["first_s"]),
        }


# Kinds of numbers that come of each kind of work.
KINDS = {"prefill": ("prefill",), "decode": ("decode",), "batch": ("batch", "batch_decode")}


class PeerError(Exception):
    """A peer's process failed; the message holds what it said last."""


class Worker:
    """A peer's process."""

    def __init__(self, name: str, python: str, setup: dict[str, Any]):
        """Starts it. `description` is empty where its library is `missing`.

        Raises:
            PeerError: it could not load the model.
        """
        self.name = name
        # Lives as long as the process that writes it: closed by `close`.
        self._messages = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            [python, "-m", "bench.peers.worker", name],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._messages,
            text=True,
        )
        try:
            answer = self._ask(setup)
        except PeerError:
            self.close()
            raise
        self.missing: str | None = answer.get("missing")
        self.description: str = answer.get("description", "")

    def do(self, runs: list[list[list[int]]], new_tokens: int) -> dict[str, Any]:
        """The timing of all runs together, each of some prompts."""
        timings = [self.run(prompts, new_tokens) for prompts in runs]
        return {name: sum(timing[name] for timing in timings) for name in ("first_s", "total_s", "decoded")}

    def run(self, prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
        """One run's timing, checked to have done the work."""
        timing = self._ask({"prompts": prompts, "new_tokens": new_tokens})
        lengths = {len(ids) for ids in timing["token_ids"]}
        if lengths != {new_tokens} or len(timing["token_ids"]) != len(prompts):
            raise PeerError(f"{self.name} made {sorted(lengths)} tokens a sequence where {new_tokens} were asked for")
        return timing

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # what a dead process did not read is flushed by closing
            self._process.stdin.close()
        self._process.stdout.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._messages.close()

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise PeerError(self._last_words("ended early")) from None
        line = self._process.stdout.readline()
        if not line:
            raise PeerError(self._last_words("ended early"))
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise PeerError(self._last_words(answer["error"]))
        return answer

    def _last_words(self, problem: str) -> str:
        self._messages.seek(0)
        return f"{self.name}: {problem}\n{self._messages.read()[-TAIL:]}"


def main(
    model: Annotated[str, typer.Option(help="As for atoma-jax; must be a GGUF file.")] = "smollm2-135m-instruct",
    peers: Annotated[str, typer.Option(help="Names, separated by commas.")] = ",".join(PEERS),
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    python: Annotated[list[str] | None, typer.Option(help="PEER=PATH: the interpreter a peer lives in.")] = None,
    option: Annotated[list[str] | None, typer.Option(help="PEER:NAME=VALUE: a setting of one peer.")] = None,
    threads: Annotated[int | None, typer.Option(help="Of each peer; default: the cores this may use.")] = None,
    prefill_tokens: Annotated[int, typer.Option(min=1)] = 512,
    decode_tokens: Annotated[int, typer.Option(min=2)] = 128,
    num_seqs: Annotated[int, typer.Option(min=1)] = 16,
    prompt_tokens: Annotated[int, typer.Option(min=1)] = 128,
    output_tokens: Annotated[int, typer.Option(min=2)] = 64,
    seed: Annotated[int, typer.Option(help="Of the prompts.")] = 0,
    requantized: Annotated[
        str | None, typer.Option("--requantize", help="Compare on the model in another type, such as Q8_0.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write all numbers here.")] = None,
    markdown_file: Annotated[Path | None, typer.Option("--markdown", help="Also write the table here.")] = None,
    plot_file: Annotated[Path | None, typer.Option("--plot", help="Also draw it here; takes matplotlib.")] = None,
) -> None:
    """Compare this engine with others on this machine."""
    names = [name for name in peers.split(",") if name]
    unknown = [name for name in names if name not in PEERS]
    if unknown:
        raise typer.BadParameter(f"{unknown[0]} is none of {', '.join(PEERS)}", param_hint="--peers")
    sizes = Sizes(
        prefill_tokens=prefill_tokens,
        decode_tokens=decode_tokens,
        num_seqs=num_seqs,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
    )
    setup = {
        "threads": threads or len(os.sched_getaffinity(0)),
        "num_seqs": num_seqs,
        "max_len": max(work.prompt_tokens + work.new_tokens for work in sizes.works().values()) + 1,
    }
    interpreters = dict(_pair(entry, "--python") for entry in python or [])
    options: dict[str, dict[str, str]] = {}
    for entry in option or []:
        target, value = _pair(entry, "--option")
        peer, _, setting = target.partition(":")
        options.setdefault(peer, {})[setting] = value
    peaks: dict[str, list[Peaks]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        try:
            gauge = Gauge(setup["threads"], Path(scratch))
        except BuildError as error:
            print(f"without limits of the machine: {error}", file=sys.stderr)
            gauge = None
        path = resolve(model).path.absolute()
        if requantized is not None:
            target_path = Path(scratch) / f"{path.stem}-{requantized}.gguf"
            requantize(path, target_path, TypeOptions.named(requantized))
            path = target_path
        with GGUFFile.open(path) as file:
            tokens = file.metadata["tokenizer.ggml.tokens"]
            assert isinstance(tokens, list), "the reader checks it"
            cost = ModelCost.of(file)
        workers = start([ENGINE, *names], {"model": str(path), **setup}, interpreters, options)
        try:
            results = compare(
                workers, sizes, rounds=rounds, vocab_size=len(tokens), seed=seed, gauge=gauge, peaks=peaks
            )
        finally:
            for worker in workers:
                worker.close()
    most = {
        kind: [sizes.limits(cost, own)[kind] for own in measured]
        for work, measured in peaks.items()
        for kind in KINDS[work]
    } or None
    report(results, most)
    descriptions = {worker.name: worker.description for worker in workers}
    if json_file is not None:
        about = {"model": model, "requantized": requantized, "rounds": rounds, "threads": setup["threads"]}
        measured = {"rates": results, "ratios": ratios(results), "limits": most}
        machine = {
            **describe_host(),
            "peaks": {work: [asdict(own) for own in measured] for work, measured in peaks.items()},
        }
        everything = {**about, **machine, "model_cost": asdict(cost), "engines": descriptions, **measured}
        json_file.write_text(json.dumps(everything, indent=2) + "\n", encoding="utf-8")
    if markdown_file is not None:
        markdown_file.write_text(markdown(results, most, descriptions), encoding="utf-8")
    if plot_file is not None:
        plot(results, most, plot_file)


def start(
    names: list[str], setup: dict[str, Any], interpreters: dict[str, str], options: dict[str, dict[str, str]]
) -> list[Worker]:
    """Starts the engines one after the other; says which are missing. This engine must be there."""
    workers: list[Worker] = []
    for name in names:
        try:
            python = interpreters.get(name, sys.executable)
            worker = Worker(name, python, {**setup, "options": options.get(name, {})})
        except PeerError as error:
            _give_up_on(name, error)
            continue
        if worker.missing is None:
            print(f"{name}: {worker.description}", flush=True)
            workers.append(worker)
        else:
            worker.close()
            _give_up_on(name, PeerError(f"{name} is not installed: {worker.missing}"))
    return workers


def compare(
    workers: list[Worker],
    sizes: Sizes,
    *,
    rounds: int,
    vocab_size: int,
    seed: int,
    gauge: Gauge | None = None,
    peaks: dict[str, list[Peaks]] | None = None,
) -> dict[str, dict[str, list[float]]]:
    """Tokens a second by engine and kind, one a round, after a first round that does not count.

    What the machine did around this engine's runs, by a `gauge`, goes into `peaks` by kind of work, one a round.
    """
    results: dict[str, dict[str, list[float]]] = {worker.name: {} for worker in workers}
    rng = random.Random(seed)
    lowest = min(LOWEST_ID, vocab_size // 2)
    alive = list(workers)
    for number in range(rounds + 1):
        print(f"round {number} of {rounds}" if number else "warm-up", file=sys.stderr, flush=True)
        timings: dict[str, dict[str, Any]] = {worker.name: {} for worker in alive}
        for kind, work in sizes.works().items():
            runs = [
                [[rng.randrange(lowest, vocab_size) for _ in range(work.prompt_tokens)] for _ in range(work.num_seqs)]
                for _ in range(work.repeats)
            ]
            turn = number % len(alive)
            for worker in [*alive[turn:], *alive[:turn]]:
                own = gauge if worker.name == ENGINE and number else None
                try:
                    before = own.measure() if own else None
                    timings[worker.name][kind] = worker.do(runs, work.new_tokens)
                    if own and before and peaks is not None:
                        peaks.setdefault(kind, []).append(Peaks.mean([before, own.measure()]))
                except PeerError as error:
                    _give_up_on(worker.name, error)
                    alive.remove(worker)
        if number:
            for worker in alive:
                for kind, rate in sizes.rates(timings[worker.name]).items():
                    results[worker.name].setdefault(kind, []).append(rate)
    return {name: rates for name, rates in results.items() if len(next(iter(rates.values()), [])) == rounds}


def _give_up_on(name: str, error: PeerError) -> None:
    print(error, file=sys.stderr, flush=True)
    if name == ENGINE:
        raise SystemExit(1)
    print(f"{name}: left out", flush=True)


def _pair(entry: str, flag: str) -> tuple[str, str]:
    name, equals, value = entry.partition("=")
    if not equals:
        raise typer.BadParameter(f"{entry!r} is not NAME=VALUE", param_hint=flag)
    return name, value


if __name__ == "__main__":
    typer.run(main)
