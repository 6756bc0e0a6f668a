"""A server that finds what evaluation prompts ask for, or fails to, for the evaluation's tests."""

import asyncio
import json
import re
import threading
from collections.abc import Callable
from typing import Any

from aiohttp import web


def solve(prompt: str) -> str:
    """The pass key or secret that the prompt asks for."""
    if asked := re.search(r"The secret (?:number|uuid) of (\S+) given in the text is$", prompt):
        found = re.search(rf"The secret \w+ of {asked[1]} is (\S+)\.", prompt)
    else:
        found = re.search(r"The pass key is (\d+)\.", prompt)
    assert found is not None
    return f" {found[1]}."


class EvaluationServer:
    """Completes prompts on SGLang's `/generate`, or on `/v1/completions` alone.

    Args:
        model: path of the model, where its tokenizer is.
        sglang: it has SGLang's own routes; else OpenAI's alone.
        twilight: its Twilight configuration, None for a dense server.
        context: of the model, in tokens.
        answer: output of a prompt.
        refuses_after: requests that it answers before it refuses others.
        sparse: decode steps select, so that budgets grow by each prompt's characters.
    """

    def __init__(
        self,
        model: str,
        *,
        sglang: bool = True,
        twilight: dict[str, Any] | None = None,
        context: int | None = 8192,
        answer: Callable[[str], str] = solve,
        refuses_after: int | None = None,
        sparse: bool = True,
    ) -> None:
        self.model, self.sglang, self.twilight, self.context = model, sglang, twilight, context
        self.answer, self.refuses_after, self.sparse = answer, refuses_after, sparse
        self.requests: list[dict[str, Any]] = []
        self.prompts: list[str] = []
        self.most_at_once = 0
        self.url = ""
        self._at_once = self._context_tokens = 0
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._serve)

    def __enter__(self) -> "EvaluationServer":
        self._thread.start()
        assert self._ready.wait(30)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        app = web.Application(client_max_size=1 << 24)
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/completions", self._completions)
        if self.sglang:
            app.router.add_get("/model_info", self._model_info)
            app.router.add_get("/server_info", self._server_info)
            app.router.add_post("/generate", self._generate)
        runner = web.AppRunner(app)
        self._loop.run_until_complete(runner.setup())
        site = web.TCPSite(runner, "127.0.0.1", 0)
        self._loop.run_until_complete(site.start())
        host, port = runner.addresses[0][:2]
        self.url = f"http://{host}:{port}"
        self._ready.set()
        self._loop.run_forever()
        self._loop.run_until_complete(runner.cleanup())
        self._loop.close()

    async def _models(self, _: web.Request) -> web.Response:
        model = {"id": "served", "root": self.model, "max_model_len": self.context}
        return web.json_response({"data": [model]})

    async def _model_info(self, _: web.Request) -> web.Response:
        return web.json_response({"model_path": self.model, "tokenizer_path": None})

    async def _server_info(self, _: web.Request) -> web.Response:
        state: dict[str, Any] = {}
        if self.twilight is not None:
            context = self._context_tokens
            budget = {
                "context_tokens": context,
                "candidate_tokens": context // 4,
                "kept_tokens": context // 10,
            }
            state["twilight"] = {"config": self.twilight, "budget": budget}
        about = {"attention_backend": "fa3", "version": "0.0", "max_total_num_tokens": 100_000}
        return web.json_response({**about, "internal_states": [state]})

    async def _complete(self, request: web.Request, prompt_field: str) -> str | None:
        body = await request.json()
        self._at_once += 1
        self.most_at_once = max(self.most_at_once, self._at_once)
        await asyncio.sleep(0.005)
        self._at_once -= 1
        if self.refuses_after is not None and len(self.requests) >= self.refuses_after:
            return None
        self.requests.append(body)
        self.prompts.append(body[prompt_field])
        self._context_tokens += self.sparse * 40 * len(body[prompt_field])
        return self.answer(body[prompt_field])

    async def _generate(self, request: web.Request) -> web.Response:
        text = await self._complete(request, "text")
        if text is None:
            return web.Response(status=400, text=json.dumps({"error": {"message": "too long"}}))
        meta = {"prompt_tokens": 7, "finish_reason": {"type": "stop"}}
        return web.json_response({"text": text, "meta_info": meta})

    async def _completions(self, request: web.Request) -> web.Response:
        text = await self._complete(request, "prompt")
        if text is None:
            return web.Response(status=500, text="out of memory")
        return web.json_response({"choices": [{"text": text}], "usage": {"prompt_tokens": 7}})
