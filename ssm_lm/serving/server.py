"""The HTTP server: OpenAI's protocol before an engine."""

import asyncio
import contextlib
import hmac
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from ..errors import UserError
from ..evaluation.generate import first_token
from .conversation import Conversations, Reply, Words
from .engine import Engine, Finished, Full, Piece, Request
from .protocol import Answers, Limits, Refused, Wanted, read_request, usage
from .sampling import Draw
from .thread import EngineThread

BYTES_A_TOKEN = 64  # that a request may have, of its longest prompt
SECONDS_TO_SEND = 30  # that a client has for it
LOOPBACK = ("127.0.0.1", "localhost", "[::1]", "::1")


class Service:
    """Answers requests. name: of the model, as clients ask for it. token: that they give, or None."""

    def __init__(
        self,
        engine: Engine,
        tokenizer,
        name: str,
        words: Words = Words(),  # noqa: B008  (it cannot change)
        limits: Limits = Limits(),  # noqa: B008  (a tuple)
        token: str | None = None,
    ):
        self.engine, self.thread = engine, EngineThread(engine)
        self.name, self.tokenizer, self.conversations = name, tokenizer, Conversations(tokenizer, words)
        self.limits, self.token = limits, token
        self.created = int(time.time())

    def app(self, hosts: tuple[str, ...]) -> Starlette:
        """The application. hosts: names by which it may be called, against a page in a browser that has its own name
        lead here; ("*",): any.
        """

        @asynccontextmanager
        async def lifespan(app):
            self.thread.start()
            yield
            await asyncio.to_thread(self.thread.stop)

        return Starlette(
            routes=[
                Route("/v1/completions", self.guarded(self.completions), methods=["POST"]),
                Route("/v1/chat/completions", self.guarded(self.chat_completions), methods=["POST"]),
                Route("/v1/models", self.guarded(self.models)),
                Route("/v1/models/{name:path}", self.guarded(self.model)),
                Route("/health", self.health),
            ],
            middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))],
            lifespan=lifespan,
        )

    # ---- routes

    def guarded(self, route):
        """With the token looked at, and what is refused said in the protocol's form."""

        async def call(http: HttpRequest) -> Response:
            try:
                self._check_token(http)
                return await route(http)
            except Refused as refused:
                headers = {"Retry-After": "1"} if refused.status == 503 else {}
                return JSONResponse(refused.body(), refused.status, headers)
            except ClientDisconnect:
                return Response(status_code=400)  # nobody reads it

        return call

    async def health(self, http: HttpRequest) -> Response:
        """Open to all: whether the server works, and how much."""
        engine = self.engine
        work = {"rows": len(engine.rows), "waiting": len(engine.waiting)}
        tokens = {"tokens_read": engine.read, "tokens_written": engine.written, "tokens_known": engine.kept}
        return JSONResponse({"status": "ok", "model": self.name} | work | tokens)

    async def models(self, http: HttpRequest) -> Response:
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, http: HttpRequest) -> Response:
        self._check_name(http.path_params["name"])
        return JSONResponse(self._model())

    async def completions(self, http: HttpRequest) -> Response:
        body = await self._body(http)
        wanted = read_request(body, chat=False, limits=self.limits)
        self._check_name(body.get("model"))
        prompts = [self._ids(prompt) for prompt in wanted.prompts]
        return await self._answer(http, wanted, [ids for ids in prompts for _ in range(wanted.n)], chat=False)

    async def chat_completions(self, http: HttpRequest) -> Response:
        body = await self._body(http)
        wanted = read_request(body, chat=True, limits=self.limits)
        self._check_name(body.get("model"))
        ids = self.conversations.ids(wanted.messages)
        return await self._answer(http, wanted, [ids] * wanted.n, chat=True)

    # ---- checks

    def _check_token(self, http: HttpRequest) -> None:
        if self.token is None:
            return
        scheme, _, given = http.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), self.token.encode()):
            raise Refused(401, "this server needs its token as the API key", code="invalid_api_key")

    def _check_name(self, name) -> None:
        if name != self.name:
            raise Refused(404, f"there is no model {name!r} here; there is {self.name!r}", "model", "model_not_found")

    def _model(self) -> dict:
        return {"id": self.name, "object": "model", "created": self.created, "owned_by": "ssm_lm"}

    async def _body(self, http: HttpRequest):
        """The JSON of a request. No page of another site can send this type without being asked first."""
        if http.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise Refused(415, "the body must be of type application/json")
        found, most = bytearray(), BYTES_A_TOKEN * self.limits.prompt_tokens
        try:
            async with asyncio.timeout(SECONDS_TO_SEND):
                async for part in http.stream():
                    found += part
                    if len(found) > most:
                        raise Refused(413, f"the body has more than {most:,} bytes")
        except TimeoutError as error:
            raise Refused(408, f"the body did not come within {SECONDS_TO_SEND} seconds") from error
        try:
            return json.loads(found)
        except (ValueError, RecursionError) as error:
            raise Refused(400, "the body is no JSON") from error

    def _ids(self, prompt: str | list[int]) -> list[int]:
        """The tokens of a prompt, one at least."""
        if isinstance(prompt, str):
            prompt = self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        size = self.engine.model.config.vocab_size
        if any(not 0 <= token < size for token in prompt):
            raise Refused(400, f"prompt: has token ids that are not from 0 to {size - 1}", "prompt")
        try:
            return prompt or [first_token(self.engine.model, self.tokenizer)]
        except UserError as error:
            raise Refused(400, "prompt: is empty, and the model has no token to begin with", "prompt") from error

    # ---- answers

    async def _answer(self, http: HttpRequest, wanted: Wanted, prompts: list[list[int]], chat: bool) -> Response:
        longest = max(map(len, prompts))
        if longest > self.limits.prompt_tokens:
            key = "messages" if chat else "prompt"
            most = self.limits.prompt_tokens
            raise Refused(400, f"{key}: {longest} tokens, and this server reads at most {most}", key)
        work = Work(self, wanted, prompts, chat)
        work.begin()
        if wanted.stream:
            return StreamingResponse(work.stream(), media_type="text/event-stream")
        answer = asyncio.ensure_future(work.whole())
        gone = asyncio.ensure_future(_until_gone(http))
        try:
            await asyncio.wait((answer, gone), return_when=asyncio.FIRST_COMPLETED)
            if answer.done():
                return JSONResponse(answer.result())
            raise ClientDisconnect
        finally:
            work.cancel()
            for task in (answer, gone):
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, Refused):
                    await task


async def _until_gone(http: HttpRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


class Work:
    """The texts of one request."""

    def __init__(self, service: Service, wanted: Wanted, prompts: list[list[int]], chat: bool):
        self.service, self.wanted, self.prompts, self.chat = service, wanted, prompts, chat
        self.answers = Answers(service.name, chat)
        self.events: asyncio.Queue = asyncio.Queue()
        self.requests: list[Request] = []
        self.read = self.written = 0

    def begin(self) -> None:
        """Submit all; Refused, with nothing in work, where the queue is full."""
        loop = asyncio.get_running_loop()
        deadline = time.monotonic() + self.service.limits.seconds
        wanted = self.wanted
        stops = wanted.stops + (self.service.conversations.words.stops if self.chat else ())

        def hand_over(index):
            def receive(event):
                with contextlib.suppress(RuntimeError):  # the loop is closed, and nobody waits
                    loop.call_soon_threadsafe(self.events.put_nowait, (index, event))

            return receive

        for index, ids in enumerate(self.prompts):
            seed = None if wanted.seed is None else wanted.seed + index  # choices differ
            draw = Draw(wanted.temperature, wanted.top_p, seed)
            request = Request(ids, wanted.max_new_tokens, draw, hand_over(index), stops, deadline)
            try:
                self.service.thread.submit(request)
            except Full as full:
                self.cancel()
                raise Refused(503, "the server has too many requests; try again soon", code="overloaded") from full
            self.requests.append(request)

    def cancel(self) -> None:
        """Texts that are not at their end are not wanted any more."""
        for request in self.requests:
            request.cancelled = True

    async def parts(self) -> AsyncIterator[tuple[int, str, str | None]]:
        """(choice, some more of its text, why it ended or None) until all have ended. Raises Refused."""
        replies = [Reply() for _ in self.prompts]
        open_texts = len(self.prompts)
        while open_texts:
            index, event = await self.events.get()
            if isinstance(event, Piece):
                piece = replies[index].add(event.text) if self.chat else event.text
                if piece:
                    yield index, piece, None
                continue
            open_texts -= 1
            self._close(index, replies[index].text, event)
            yield index, "", event.reason

    def _close(self, index: int, text: str, event: Finished) -> None:
        self.read += event.read
        self.written += event.written
        if event.reason == "queue":
            raise Refused(503, "the server was too busy for this request; try again soon", code="overloaded")
        if event.reason == "error":
            raise Refused(500, "the model failed on this text")
        if self.chat:
            self.service.conversations.remember(self.prompts[index], text, event.ids)

    def usage(self) -> dict:
        prompt = sum(map(len, self.prompts[:: self.wanted.n]))  # which n choices share
        return usage(prompt, max(0, prompt - self.read), self.written)

    async def whole(self) -> dict:
        """The answer as one object."""
        texts, reasons = [""] * len(self.prompts), [""] * len(self.prompts)
        async for index, text, reason in self.parts():
            texts[index] += text
            reasons[index] = reason or reasons[index]
        return self.answers.whole(texts, reasons, self.usage())

    async def stream(self) -> AsyncIterator[str]:
        """The answer as server-sent events, as it comes."""

        def event(data: dict) -> str:
            return f"data: {json.dumps(data)}\n\n"

        try:
            if self.chat:
                for index in range(len(self.prompts)):
                    yield event(self.answers.part(index, "", first=True))
            async for index, text, reason in self.parts():
                yield event(self.answers.part(index, text or None, reason))
            if self.wanted.include_usage:
                yield event(self.answers.usage(self.usage()))
            yield "data: [DONE]\n\n"
        except Refused as refused:  # the head of the answer is out
            yield event(refused.body())
        finally:
            self.cancel()
