"""A server that finds what evaluation prompts ask for, or fails to, for the evaluation's tests."""

import asyncio
import json
import re
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from aiohttp import web
from sglang.srt.sampling.custom_logit_processor import CustomLogitProcessor
from snapshots import HEADS_KV, LAYER_IDS, totals

VOCABULARY = 8
PAIRS = len(LAYER_IDS) * HEADS_KV


def solve(prompt: str) -> str:
    """The pass key or secret that the prompt asks for."""
    if asked := re.search(r"The secret (?:number|uuid) of (\S+) given in the text is$", prompt):
        found = re.search(rf"The secret \w+ of {asked[1]} is (\S+)\.", prompt)
    else:
        found = re.search(r"The pass key is (\d+)\.", prompt)
    assert found is not None
    return f" {found[1]}."


def logits_at(position: int) -> torch.Tensor:
    """Logits of the token at a position of a window, float32 [1, VOCABULARY]."""
    return torch.sin(torch.arange(VOCABULARY) * (1.0 + position))[None] * 3


class _Request:
    """What a logit processor may read of SGLang's `Req`: here, a prompt that is in the cache."""

    def __init__(self, prompt: list[int]) -> None:
        self.origin_input_ids = prompt

    def get_fill_ids(self) -> list[int]:
        return self.origin_input_ids


def decode(body: dict[str, Any]) -> dict[str, Any]:
    """`/generate`'s answer to a request with a logit processor, greedy, by SGLang's own steps."""
    prompt, sampling = body["input_ids"], body["sampling_params"]
    processor = CustomLogitProcessor.from_str(body["custom_logit_processor"])
    params = sampling["custom_params"] | {"__req__": _Request(prompt)}
    chosen, tops = [], []
    for step in range(sampling["max_new_tokens"]):
        logits = processor(logits_at(len(prompt) + step), [params])
        values, ids = logits.log_softmax(-1)[0].topk(body["top_logprobs_num"])
        top = [
            [value, token, None] for value, token in zip(values.tolist(), ids.tolist(), strict=True)
        ]
        chosen.append(top[0])
        tops.append(top)
    meta = {"output_token_logprobs": chosen, "output_top_logprobs": tops}
    return {"text": "", "meta_info": {**meta, "prompt_tokens": len(prompt)}}


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
        replicas: that take turns; each has totals of its own.
        processors: it takes custom logit processors.
        retractions: of each request that has one.
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
        replicas: int = 1,
        processors: bool = True,
        retractions: int = 0,
    ) -> None:
        self.model, self.sglang, self.twilight, self.context = model, sglang, twilight, context
        self.answer, self.refuses_after, self.sparse = answer, refuses_after, sparse
        self.processors, self.retractions = processors, retractions
        self.requests: list[dict[str, Any]] = []
        self.prompts: list[str] = []
        self.most_at_once = 0
        self.url = ""
        self._at_once = 0
        self._totals = [[0, 0] for _ in range(replicas)]  # sparse rows, context of a KV head
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
        shape = (len(LAYER_IDS), HEADS_KV)
        states: list[dict[str, Any]] = []
        for rows, context in self._totals:
            counts = {
                f"{name}_tokens": np.full(shape, context // part)
                for name, part in (("context", 1), ("candidate", 4), ("kept", 10))
            }
            shown = {"config": self.twilight, **totals(rows, **counts).to_dict()}
            states.append({} if self.twilight is None else {"twilight": shown})
        about = {"attention_backend": "fa3", "version": "0.0", "max_total_num_tokens": 100_000}
        about["enable_custom_logit_processor"] = self.processors
        return web.json_response({**about, "internal_states": states})

    async def _take(self, request: web.Request) -> dict[str, Any] | None:
        """A request's body; None if it is to be refused."""
        body = await request.json()
        self._at_once += 1
        self.most_at_once = max(self.most_at_once, self._at_once)
        await asyncio.sleep(0.005)
        self._at_once -= 1
        if self.refuses_after is not None and len(self.requests) >= self.refuses_after:
            return None
        prompt = body.get("text") or body.get("prompt") or body["input_ids"]
        if self.sparse:
            replica = self._totals[len(self.requests) % len(self._totals)]
            replica[0] += 1
            replica[1] += 40 * len(prompt)
        self.requests.append(body)
        if isinstance(prompt, str):
            self.prompts.append(prompt)
        return body

    async def _generate(self, request: web.Request) -> web.Response:
        body = await self._take(request)
        if body is None:
            return web.Response(status=400, text=json.dumps({"error": {"message": "too long"}}))
        if "input_ids" in body:
            answer = decode(body)
            answer["meta_info"]["num_retractions"] = self.retractions
            return web.json_response(answer)
        meta = {"prompt_tokens": 7, "finish_reason": {"type": "stop"}}
        return web.json_response({"text": self.answer(body["text"]), "meta_info": meta})

    async def _completions(self, request: web.Request) -> web.Response:
        body = await self._take(request)
        if body is None:
            return web.Response(status=500, text="out of memory")
        prompt = body["prompt"]
        choice: dict[str, Any] = {"text": ""}
        if body.get("echo"):
            likely = [
                logits_at(place).log_softmax(-1)[0, token].item()
                for place, token in enumerate(prompt)
            ]
            choice["logprobs"] = {"token_logprobs": [None, *likely[1:]]}
        elif isinstance(prompt, str):
            choice["text"] = self.answer(prompt)
        return web.json_response({"choices": [choice], "usage": {"prompt_tokens": 7}})
