"""`atoma-jax bench serve` as a whole: what the server is, warm-up, one run or a sweep of them, the object printed."""

import asyncio
import datetime
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import httpx
from tqdm import tqdm

from atoma_jax.benchmarks.serve.client import Ask, Outcome, Target, send
from atoma_jax.benchmarks.serve.lanes import Lanes
from atoma_jax.benchmarks.serve.lengths import Length, sharegpt_like_lengths
from atoma_jax.benchmarks.serve.load import run_load
from atoma_jax.benchmarks.serve.prompts import random_asks, read_lexicon, sharegpt_asks
from atoma_jax.benchmarks.serve.result import result_of
from atoma_jax.benchmarks.serve.workload import Pace, ServeWorkload, SweepPlan
from atoma_jax.errors import AtomaError, UserError


def measure_serve(work: ServeWorkload, sweep: SweepPlan | None, on_run: Callable[[dict[str, Any]], None]) -> Any:
    """Sends the workload, once or for each value of the sweep, with a progress bar on standard error.

    Args:
        work: what is sent.
        sweep: None: one run.
        on_run: told of each run's result.

    Returns:
        A run's object, or one whose key `runs` holds those of the sweep.

    Raises:
        UserError: the server does not have the model, or a length does not fit into it.
        AtomaError: the server cannot be reached, or a warm-up request failed.
    """
    return asyncio.run(_measure(work, sweep, on_run))


async def _measure(work: ServeWorkload, sweep: SweepPlan | None, on_run: Callable[[dict[str, Any]], None]) -> Any:
    headers = {} if work.api_key is None else {"Authorization": f"Bearer {work.api_key}"}
    timeout = httpx.Timeout(work.timeout, pool=None)
    async with httpx.AsyncClient(headers=headers, transport=Lanes(), timeout=timeout, trust_env=False) as client:
        url = work.base_url.rstrip("/").removesuffix("/v1")
        model, longest = await _find_model(client, url, work.model)
        target = Target(url=url, model=model, chat=work.chat, body=work.body)
        asks = await _asks(client, target, work, longest)
        await _warm_up(client, target, asks, work.num_warmups)
        runs: list[dict[str, Any]] = []
        for number, pace in enumerate([work.pace] if sweep is None else sweep.paces(work.pace)):
            # A server with a prefix cache must not know the prompts of the run before.
            fresh = (
                asks if number == 0 else await _asks(client, target, replace(work, seed=work.seed + number), longest)
            )
            runs.append(await _run(client, target, fresh, work, pace))
            on_run(runs[-1])
    return runs[0] if sweep is None else {"sweep": sweep.over, "runs": runs}


async def _find_model(client: httpx.AsyncClient, url: str, wanted: str | None) -> tuple[str, int | None]:
    """A model of the server, and how many tokens it takes where the server says so."""
    try:
        response = await client.get(f"{url}/v1/models")
        cards: Any = response.json()["data"] if response.status_code == 200 else None
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, TypeError) as error:
        raise AtomaError(f"bench serve: no OpenAI-compatible server answers at {url}: {error}") from error
    if not cards:
        raise AtomaError(f"bench serve: {url}/v1/models answers {response.status_code} and names no model")
    lengths = {card["id"]: card.get("max_model_len") for card in cards}
    if wanted is not None and wanted not in lengths:
        raise UserError("model", wanted, f"the server has only {', '.join(lengths)}")
    name = next(iter(lengths)) if wanted is None else wanted
    return name, lengths[name]


async def _asks(client: httpx.AsyncClient, target: Target, work: ServeWorkload, longest: int | None) -> list[Ask]:
    if work.dataset == "sharegpt":
        assert work.dataset_path is not None, "checked by the command line"
        return await sharegpt_asks(
            client,
            target,
            work.dataset_path,
            count=work.num_prompts,
            output_len=work.sharegpt_output_len,
            seed=work.seed,
        )
    lengths: list[Length]
    if work.dataset == "random":
        total = work.prefix_len + work.lengths.longest
        if longest is not None and total > longest:
            problem = f"prompts and answers of up to {total} tokens do not fit into the model's {longest}"
            raise UserError("random_input_len", work.lengths.input_len, problem)
        lengths = work.lengths.draw(work.num_prompts, work.seed)
    else:
        lengths = sharegpt_like_lengths(work.num_prompts, work.seed, longest=longest)
    lexicon = await read_lexicon(client, target)
    return random_asks(lexicon, lengths, chat=work.chat, prefix_len=work.prefix_len, seed=work.seed)


async def _warm_up(client: httpx.AsyncClient, target: Target, asks: Sequence[Ask], count: int) -> None:
    """Sends first requests at once, which are not counted."""
    chosen = [asks[index % len(asks)] for index in range(count)]
    for outcome in await asyncio.gather(*(send(client, target, ask) for ask in chosen)):
        if outcome.error:
            raise AtomaError(f"bench serve: a warm-up request to {target.path} failed: {outcome.error}")


async def _run(
    client: httpx.AsyncClient, target: Target, asks: Sequence[Ask], work: ServeWorkload, pace: Pace
) -> dict[str, Any]:
    with tqdm(total=len(asks), unit=" requests", desc=_describe(pace)) as bar:
        failed = 0

        def done(outcome: Outcome) -> None:
            nonlocal failed
            failed += bool(outcome.error)
            bar.set_postfix(failed=failed, refresh=False)
            bar.update()

        outcomes, end = await run_load(client, target, asks, pace, done)
    duration = end - min(outcome.start for outcome in outcomes)
    measured = result_of(
        outcomes, duration=duration, limits=work.goodput, percentiles=work.percentiles, detail=work.detail
    )
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "backend": "openai-chat" if target.chat else "openai",
        "label": work.label,
        "model_id": target.model,
        "tokenizer_id": target.model,
        "dataset": work.dataset,
        "num_prompts": len(asks),
        "request_rate": "inf" if pace.request_rate == float("inf") else pace.request_rate,
        "burstiness": pace.burstiness,
        "max_concurrency": pace.max_concurrency,
        "seed": work.seed,
        **measured,
    }


def _describe(pace: Pace) -> str:
    rate = "all at once" if pace.request_rate == float("inf") else f"{pace.request_rate:g}/s"
    return rate if pace.max_concurrency is None else f"{rate}, {pace.max_concurrency} at once"
