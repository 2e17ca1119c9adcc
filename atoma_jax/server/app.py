"""The routes, and nothing else: what each does is another module's."""

from functools import partial
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from atoma_jax import SamplingParams, __version__
from atoma_jax.server.answers import Frame, Usage
from atoma_jax.server.chat import ChatWriter
from atoma_jax.server.completions import CompletionWriter
from atoma_jax.server.embeddings import check_embedding, check_inputs, embed
from atoma_jax.server.errors import Problem, problem_of
from atoma_jax.server.generation import Generation
from atoma_jax.server.guard import Bodies, Keys, Records
from atoma_jax.server.page import router as page_router
from atoma_jax.server.params import chat_params, completion_params
from atoma_jax.server.prompts import Prompt
from atoma_jax.server.schemas import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    SamplingRequest,
    TokenizeRequest,
)
from atoma_jax.server.service import Service
from atoma_jax.server.stream import EventStream
from atoma_jax.server.tools import tool_use
from atoma_jax.server.unsupported import refuse_unsupported

router = APIRouter()


def build_app(service: Service) -> FastAPI:
    """The application over a service; the engine may come later."""
    app = FastAPI(title="atoma-jax", version=__version__, redoc_url=None)
    app.state.service = service
    app.include_router(router)
    if service.settings.ui:
        app.include_router(page_router)
    app.add_exception_handler(RequestValidationError, _problem)
    app.add_exception_handler(HTTPException, _http_problem)
    settings = service.settings
    app.add_middleware(Bodies, max_bytes=settings.max_body_bytes, timeout=settings.body_timeout)
    app.add_middleware(Keys, keys=settings.api_key, scope=settings.api_key_scope)
    app.add_middleware(Records, service=service)  # the last is the outermost
    return app


def _service(request: Request) -> Service:
    return request.app.state.service


async def _problem(request: Request, error: Exception) -> Response:
    del request
    return problem_of(error).response()


async def _http_problem(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    where = f"{request.method} {request.url.path[:200]}"
    text = {404: f"There is no {where}.", 405: f"There is no {where}."}.get(error.status_code, str(error.detail))
    response = Problem(error.status_code, text).response()
    response.headers.update(error.headers or {})
    return response


@router.post("/v1/completions")
async def completions(body: CompletionRequest, request: Request) -> Response:
    """Continues a prompt, or several."""
    service = _service(request)
    llm = service.llm
    model = service.check_model(body.model)
    refuse_unsupported(body)
    params = completion_params(body, llm.get_default_sampling_params())
    prompts = await service.in_worker(service.prompts.of_completion, body)
    frame = _frame(service, request, body, "cmpl", "text_completion", model)
    usage = Usage(service.settings.enable_prompt_tokens_details)
    writer = CompletionWriter(llm, body, prompts, frame, usage)
    return await _generate(request, body, writer, prompts, params)


@router.post("/v1/chat/completions")
async def chat_completions(body: ChatRequest, request: Request) -> Response:
    """Answers a conversation."""
    service = _service(request)
    llm = service.llm
    model = service.check_model(body.model)
    refuse_unsupported(body)
    tools = tool_use(body, service.settings)
    forced = None if tools is None else tools.constraint
    params = chat_params(body, llm.get_default_sampling_params(), forced)
    prompt = await service.in_worker(service.prompts.of_chat, body)
    kind = "chat.completion.chunk" if body.stream else "chat.completion"
    frame = _frame(service, request, body, "chatcmpl", kind, model)
    writer = ChatWriter(llm, body, frame, Usage(service.settings.enable_prompt_tokens_details), tools)
    return await _generate(request, body, writer, [prompt], params)


async def _generate(
    request: Request,
    body: SamplingRequest,
    writer: CompletionWriter | ChatWriter,
    prompts: list[Prompt],
    params: SamplingParams,
) -> Response:
    service = _service(request)
    limit = service.settings.max_choices
    if len(prompts) * params.n > limit:
        problem = f"n: prompts × n must be at most {limit} (--max-choices), got {len(prompts)} × {params.n}."
        raise Problem(400, problem, param="n")
    generation = Generation(
        service,
        request.receive,
        service.new_name(),
        prompts,
        params,
        priority=body.priority or 0,
        cache_salt=service.cache_salt(request.state.key, body.cache_salt),
        traceparent=request.headers.get("traceparent"),
    )
    ignored = body.ignored_fields()
    headers = {"X-Ignored-Fields": ignored} if ignored else {}
    request.state.log["usage"] = writer.usage
    if body.stream:
        events = writer.events(generation)
        return await EventStream.open(events, send_timeout=service.settings.send_timeout, headers=headers)
    return JSONResponse(await writer.answer(generation), headers=headers)


def _frame(service: Service, request: Request, body: SamplingRequest, prefix: str, kind: str, model: str) -> Frame:
    return Frame(
        prefix=prefix,
        kind=kind,
        model=model,
        fingerprint=service.fingerprint,
        suffix=(body.request_id or request.headers.get("x-request-id", ""))[:128],
    )


@router.post("/v1/embeddings")
async def embeddings(body: EmbeddingRequest, request: Request) -> Response:
    """Turns texts into vectors."""
    service = _service(request)
    llm = service.llm
    model = service.check_model(body.model)
    check_embedding(body, llm)
    prompts = await service.in_worker(service.prompts.of_embedding, body)
    check_inputs(prompts)
    generation = Generation(
        service,
        request.receive,
        service.new_name(),
        prompts,
        None,
        priority=body.priority or 0,
        cache_salt=service.cache_salt(request.state.key, None),
        traceparent=request.headers.get("traceparent"),
    )
    request.state.log["usage"] = usage = Usage(with_details=False)
    ignored = body.ignored_fields()
    headers = {"X-Ignored-Fields": ignored} if ignored else {}
    return JSONResponse(await embed(generation, body, model, len(prompts), usage), headers=headers)


@router.get("/v1/models")
async def models(request: Request) -> dict[str, Any]:
    """The one model that is served, under each of its names."""
    service = _service(request)
    length = service.llm.model_config.max_model_len
    cards = [
        {
            "id": name,
            "object": "model",
            "created": service.created,
            "owned_by": "atoma-jax",
            "root": service.model_names[0],
            "parent": None,
            "max_model_len": length,
            "permission": [],
        }
        for name in service.model_names
    ]
    return {"object": "list", "data": cards}


@router.post("/tokenize")
async def tokenize(body: TokenizeRequest, request: Request) -> dict[str, Any]:
    """The tokens of a text or of a conversation."""
    service = _service(request)
    llm = service.llm
    service.check_model(body.model)
    prompt = await service.in_worker(service.prompts.of_tokenize, body)
    answer = {"count": len(prompt.ids), "max_model_len": llm.model_config.max_model_len, "tokens": prompt.ids}
    if body.return_token_strs:
        answer["token_strs"] = [llm.get_tokenizer().id_to_token(token) for token in prompt.ids]
    return answer


@router.post("/detokenize")
async def detokenize(body: DetokenizeRequest, request: Request) -> dict[str, Any]:
    """The text of tokens."""
    service = _service(request)
    service.check_model(body.model)
    decode = partial(service.llm.get_tokenizer().decode, skip_special_tokens=False)
    return {"prompt": await service.in_worker(decode, body.tokens)}


@router.get("/tokenizer_info")
async def tokenizer_info(request: Request) -> dict[str, Any]:
    """What clients that tokenize by themselves need to know."""
    tokenizer = _service(request).prompts.tokenizer
    names = {name: tokenizer.special_names.get(name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
    return {
        "tokenizer_class": type(tokenizer).__name__,
        **names,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_ids": sorted(tokenizer.eos_token_ids),
        "pad_token_id": tokenizer.pad_token_id,
        "vocab_size": tokenizer.vocab_size,
        "chat_template": tokenizer.chat_template,
    }


@router.get("/health")
@router.get("/ping")
async def health(request: Request) -> Response:
    """200 while the engine lives, drain included; 503 while it loads, once it is dead, and while it hangs."""
    state = _service(request).health
    return Response(status_code=200 if state in ("ready", "draining") else 503, headers={"X-State": state})


@router.get("/ready")
async def ready(request: Request) -> Response:
    """200 while requests are taken."""
    state = _service(request).health
    return Response(status_code=200 if state == "ready" else 503, headers={"X-State": state})


@router.get("/version")
async def version() -> dict[str, str]:
    """Of the program."""
    return {"version": __version__}


@router.get("/load")
async def load(request: Request) -> dict[str, int]:
    """Generations in flight."""
    return {"server_load": len(_service(request).in_flight)}


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """For Prometheus."""
    text = await _service(request).metrics.exposition()
    return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")


@router.post("/start_profile")
async def start_profile(request: Request) -> Response:
    """Begins to record host and device."""
    service = _service(request)
    folder = service.settings.profile_dir
    if folder is None:
        raise Problem(400, "profile_dir: is not set: start the server with --profile-dir.", param="profile_dir")
    try:
        await service.llm.start_profile(folder)
    except RuntimeError:
        raise Problem(400, "A profile is being recorded: call /stop_profile.") from None
    return Response()


@router.post("/stop_profile")
async def stop_profile(request: Request) -> Response:
    """Writes what was recorded."""
    try:
        await _service(request).llm.stop_profile()
    except RuntimeError:
        raise Problem(400, "No profile is being recorded: call /start_profile.") from None
    return Response()


@router.post("/reset_prefix_cache")
async def reset_prefix_cache(request: Request) -> Response:
    """Forgets all shared prefixes."""
    await _service(request).llm.reset_prefix_cache()
    return Response()
