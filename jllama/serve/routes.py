"""The application: its routes, and the admission and release of requests."""

import asyncio
import random
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Scope

from jllama import __version__
from jllama.formats.files import label
from jllama.serve import answers, body, page
from jllama.serve.answers import Answer, ChatAnswer, TextAnswer
from jllama.serve.bridge import EngineThread
from jllama.serve.errors import MAX_NAME, ApiError
from jllama.serve.exchange import Exchange
from jllama.serve.front import GONE, Front, Hosts, Keys, error_response
from jllama.serve.gate import Gate
from jllama.serve.metrics import Metrics
from jllama.serve.model import Model
from jllama.serve.parameters import Run, chat_run, completion_run, ids_to_count
from jllama.serve.running import Running, collect
from jllama.serve.schema import ChatBody, CompletionBody, DetokenizeBody, Drawing, StreamOptions, TokenizeBody
from jllama.serve.settings import Settings
from jllama.serve.stream import EventStream, unless_gone

WORKERS = 2  # threads that tokenise and render templates
EVENTS = 2000  # a second; more than so many from all streams together, and each holds new text for a while
WHOLE_S = 1.0  # for which new tokens are held if nobody waits for them


class Service:
    """A model, the engine that runs it, and everything that its routes share."""

    def __init__(self, model: Model, engine: EngineThread, settings: Settings, *, slots: int) -> None:
        self.model, self.engine, self.settings = model, engine, settings
        self.gate = Gate(slots + settings.queue, settings.bodies_bytes)
        self.metrics = Metrics(settings.names[0], lambda: engine.statistics)
        self._workers = ThreadPoolExecutor(WORKERS, "text")

    async def work[T](self, function: Callable[..., T], *args: Any) -> T:
        """Call a function that may take a while, such as a tokenizer on a long text, off the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._workers, function, *args)

    @asynccontextmanager
    async def reading[B: BaseModel](self, request: Request, schema: type[B]) -> AsyncGenerator[B]:
        """The body of a request, checked to name a model that is served here."""
        self.gate.check()
        async with body.reading(request, schema, self.settings, self.gate) as asked:
            name = getattr(asked, "model", None)
            if name is not None and name not in self.settings.names:
                known = ", ".join(self.settings.names)
                raise ApiError(404, f"model: expected {known}, found another", param="model", code="model_not_found")
            yield asked

    async def answer(
        self, request: Request, asked: Drawing, rows: int, build: Callable[..., Run], kind: type[Answer]
    ) -> Response:
        """Run a request. The answer is one object or a stream."""
        facts = request.scope["jllama"]
        exchange = Exchange(self.gate, self.metrics, facts, rows)
        facts |= {"user": asked.user, "stream": bool(asked.stream)}
        try:
            run = await self.work(build, asked, self.model, facts["tenant"])
            hold = self._hold if asked.stream or run.stop else lambda: WHOLE_S
            running = exchange.running = Running(run, self.model, self.engine, hold)
            answer = kind(self.settings.names[0], self.model.names, run.logprobs)
            if asked.stream:
                await unless_gone(request.receive, running.start(), GONE)
                return EventStream(stream(running, answer, asked.stream_options), exchange.close)
            whole = await unless_gone(request.receive, self._whole(running, answer), GONE)
            exchange.close()
            return Response(whole, media_type="application/json")
        except BaseException:
            exchange.close()
            raise

    def _hold(self) -> float:
        """How many seconds a stream keeps new text back after it has sent an event.

        The more texts are drawn, the longer, so that all streams together send at most some `EVENTS` a second. A random
        part of that time spreads the streams over the engine's turns. If all of them sent after the same turn, the
        event loop would keep Python's interpreter lock for long, and the engine's thread would wait for it."""
        most = min(self.settings.stream_interval, self.engine.statistics.running / EVENTS)
        return most * random.uniform(0.5, 1.0)

    async def _whole(self, running: Running, answer: Answer) -> bytes:
        await running.start()
        rows = await collect(running)
        return answers.encode(answer.whole(rows, answers.usage(running.prompt_tokens, running.completion_tokens)))


async def stream(running: Running, answer: Answer, options: StreamOptions | None) -> AsyncGenerator[bytes]:
    """The events of a stream. Errors become events, because the status has been sent already."""
    at_end, always = (bool(options.include_usage), bool(options.continuous_usage_stats)) if options else (False, False)

    def event(choices: list[dict[str, Any]], *, tell: bool) -> bytes:
        used = answers.usage(running.prompt_tokens, running.completion_tokens) if tell else None
        return answer.chunk(choices, used, tells_usage=at_end or always)

    try:
        opened = [choice for row in range(running.run.rows) if (choice := answer.opening(row)) is not None]
        if opened:
            yield b"".join(event([choice], tell=always) for choice in opened)
        async for deltas in running.deltas():
            yield b"".join(event([answer.part(delta)], tell=always) for delta in deltas)
        if at_end:
            yield event([], tell=True)
    except ApiError as error:
        yield answers.event(error.body)
    yield answers.DONE


def create_app(service: Service) -> ASGIApp:
    """The application for an HTTP server."""
    app = FastAPI(title="jllama", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False)
    _handle_errors(app)
    _add_model_routes(app, service)
    _add_state_routes(app, service)
    settings, routes = service.settings, {getattr(route, "path", "") for route in app.routes}

    def answered(scope: Scope, status: int) -> None:
        path = scope["path"]
        service.metrics.answered(path if path in routes else "other", status)

    front = Front(app, Keys(settings.api_keys), Hosts(settings.hosts), answered, log=settings.access_log)
    if not settings.origins:
        return front
    # Outside the front: a browser's preflight carries no key.
    headers = ["authorization", "content-type"]
    return CORSMiddleware(front, settings.origins, allow_methods=["GET", "POST"], allow_headers=headers)


def _add_model_routes(app: FastAPI, service: Service) -> None:
    model, settings = service.model, service.settings

    @app.post("/v1/completions", openapi_extra=_body_of(CompletionBody))
    async def completions(request: Request) -> Response:
        async with service.reading(request, CompletionBody) as asked:
            rows = len(asked.prompt) * (asked.n or 1)
            return await service.answer(request, asked, rows, completion_run, TextAnswer)

    @app.post("/v1/chat/completions", openapi_extra=_body_of(ChatBody))
    async def chat_completions(request: Request) -> Response:
        async with service.reading(request, ChatBody) as asked:
            return await service.answer(request, asked, asked.n or 1, chat_run, ChatAnswer)

    @app.post("/tokenize", openapi_extra=_body_of(TokenizeBody))
    async def tokenize(request: Request) -> Response:
        async with service.reading(request, TokenizeBody) as asked:
            ids = await service.work(ids_to_count, asked, model)
            texts = [model.names.text(i) for i in ids] if asked.return_token_strs else None
        return JSONResponse({"count": len(ids), "max_model_len": model.max_len, "tokens": ids, "token_strs": texts})

    @app.post("/detokenize", openapi_extra=_body_of(DetokenizeBody))
    async def detokenize(request: Request) -> Response:
        async with service.reading(request, DetokenizeBody) as asked:
            return JSONResponse({"prompt": await service.work(model.tokenizer.decode, asked.tokens)})

    def card(name: str) -> dict[str, Any]:
        made = {"id": name, "object": "model", "created": model.created, "owned_by": "jllama"}
        return made | {"root": settings.names[0], "parent": None, "max_model_len": model.max_len}

    @app.get("/v1/models")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [card(name) for name in settings.names]})

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> Response:
        if name not in settings.names:
            raise ApiError(404, "model: no such model", param="model", code="model_not_found")
        return JSONResponse(card(name))


def _add_state_routes(app: FastAPI, service: Service) -> None:
    def accepting() -> str:
        """One word: whether new requests are taken."""
        if not service.engine.alive:
            return "dead"
        return "draining" if service.gate.draining else "ok"

    @app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def chat_page() -> Response:
        return page.response()

    @app.get("/health")
    async def health() -> Response:
        word = accepting()
        return JSONResponse({"status": word}, 200 if word == "ok" else 503)

    @app.get("/ready")
    async def ready() -> Response:
        word, now = accepting(), service.engine.statistics
        if word == "ok" and service.gate.rows >= service.gate.limit:
            word = "full"
        state = {"status": word, "running": now.running, "waiting": now.waiting}
        return JSONResponse(state, 200 if word == "ok" else 503)

    @app.get("/version")
    async def version() -> Response:
        return JSONResponse({"version": __version__})

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _body_of(schema: type[BaseModel]) -> dict[str, Any]:
    content = {"application/json": {"schema": schema.model_json_schema()}}
    return {"requestBody": {"required": True, "content": content}}


def _handle_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def refused(request: Request, error: ApiError) -> Response:
        return error_response(error)

    @app.exception_handler(HTTPException)
    async def no_route(request: Request, error: HTTPException) -> Response:
        found = label(f"{request.method} {request.url.path}", MAX_NAME)
        return error_response(ApiError(error.status_code, f"{found}: {error.detail.lower()}"))

    @app.exception_handler(Exception)  # the error itself goes to the log, not to the client
    async def failed(request: Request, error: Exception) -> Response:
        return error_response(ApiError(500, "the server failed at this request; its log says how"))
