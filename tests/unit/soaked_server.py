"""A server with an audit, whose totals grow with its requests, for the soak's tests."""

from collections.abc import Callable
from typing import Any

from aiohttp import web
from monitored_server import state
from streaming_server import StreamingServer

POOL_TOKENS, CONTEXT_TOKENS = 4096, 1500


class SoakedServer(StreamingServer):
    """Answers requests as `StreamingServer` does, until told to break.

    Args:
        audit_interval: 0 for a server without an audit.
        sealing: whether steps select and build summaries.
        grammar: whether it takes constrained requests.
        events: what to do once so many requests came.
        dies_at_flush: a flush ends it.
        restarts: it counts from 0 again once it has told of a request.
    """

    def __init__(
        self,
        *,
        audit_interval: int = 16,
        sealing: bool = True,
        grammar: bool = True,
        events: dict[int, Callable[["SoakedServer"], None]] | None = None,
        dies_at_flush: bool = False,
        restarts: bool = False,
    ) -> None:
        super().__init__()
        self.dies_at_flush, self.restarts = dies_at_flush, restarts
        self.grammar, self.events = grammar, events or {}
        self.sealing = sealing
        self.config = {"audit_interval": audit_interval, "min_context_tokens": 256}
        self.violations = 0
        self.audits = True
        self.broken = self.dead = False
        self.counted_before = self.told_steps = 0

    def break_(self) -> None:
        """Answer requests with an error from now on."""
        self.broken = True

    def recover(self) -> None:
        """Answer requests again."""
        self.broken = False

    def die(self) -> None:
        """Answer nothing from now on."""
        self.dead = True

    def violate(self) -> None:
        """Have found a summary that is not that of its keys."""
        self.violations = 1

    def routes(self) -> list[web.RouteDef]:
        return [
            *super().routes(),
            web.get("/v1/models", self._models),
            web.get("/model_info", self._model_info),
            web.post("/v1/tokenize", self._tokenize),
        ]

    async def _models(self, _: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "m", "max_model_len": CONTEXT_TOKENS}]})

    async def _model_info(self, _: web.Request) -> web.Response:
        return web.json_response({"model_path": "models/m", "tokenizer_path": None})

    async def _tokenize(self, request: web.Request) -> web.Response:
        words = (await request.json())["prompt"].split()
        return web.json_response({"tokens": [1 + len(word) for word in words]})

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        if event := self.events.get(len(self.requests) + 1):
            event(self)
        body = await request.json()
        constrained = {"regex", "json_schema"} & set(body["sampling_params"])
        if self.dead and request.transport is not None:
            request.transport.abort()
        elif self.broken or (constrained and not self.grammar):
            self.requests.append(body)
            text = "no grammar backend" if constrained else "the scheduler is confused"
            return web.Response(status=400 if constrained else 500, text=text)
        return await super()._generate(request)

    async def _flush(self, request: web.Request) -> web.Response:
        self.dead = self.dead or self.dies_at_flush
        if self.dead and request.transport is not None:
            request.transport.abort()
        return await super()._flush(request)

    async def _info(self, request: web.Request) -> web.Response:
        if self.dead and request.transport is not None:
            request.transport.abort()
        if self.restarts and self.told_steps:
            self.counted_before = len(self.requests)
            self.restarts = False
        steps = self.told_steps = len(self.requests) - self.counted_before
        others: dict[str, Any] = {
            "audit_checks": steps if self.audits else 0,
            "audit_violations": self.violations,
        }
        if not self.sealing:
            others |= {"pages_built": 0, "pages_sealed": 0}
        counted = state(steps, **others)
        counted["twilight"]["config"] |= self.config
        about = {"max_total_num_tokens": POOL_TOKENS, "internal_states": [counted]}
        return web.json_response(about)
