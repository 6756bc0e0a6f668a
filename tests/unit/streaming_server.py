"""A server that streams scripted tokens as SGLang's `/generate` does, for the benchmark's tests."""

import asyncio
import itertools
import json
import threading
from typing import Any

from aiohttp import web


class StreamingServer:
    """Answers each prompt with `answer(prompt, place)`; counts what it is asked for.

    Args:
        wrong_from: place from which on this server answers other tokens.
        sparse: it reports Twilight's state: candidates a quarter, kept a tenth of the context.
        info: more of `/server_info`.
        incremental: chunks hold new tokens only, as with --incremental-streaming-output.
        refusal: an error that `/generate` answers with; `refuse_with` is its status.
        drops: it breaks the connection instead of an answer.
    """

    def __init__(
        self,
        *,
        wrong_from: int | None = None,
        sparse: bool = False,
        info: dict[str, Any] | None = None,
        incremental: bool = False,
        refusal: str = "",
        refuse_with: int = 200,
        drops: bool = False,
    ) -> None:
        self.wrong_from, self.sparse, self.info = wrong_from, sparse, info or {}
        self.incremental, self.refusal, self.refuse_with = incremental, refusal, refuse_with
        self.drops = drops
        self.requests: list[dict[str, Any]] = []
        self.clients: list[Any] = []
        self.flushes = 0
        self.running: set[str] = set()
        self.aborted: set[str] = set()
        self.hung_up: set[str] = set()
        self.context = 0
        self.url = ""
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._serve)

    def __enter__(self) -> "StreamingServer":
        self._thread.start()
        assert self._ready.wait(30)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def answer(self, prompt: list[int], place: int) -> int:
        """The token at a place of the output."""
        wrong = self.wrong_from is not None and place >= self.wrong_from
        return sum(prompt[:4]) + place + wrong

    def routes(self) -> list[web.RouteDef]:
        """What it answers."""
        return [
            web.post("/generate", self._generate),
            web.post("/abort_request", self._abort),
            web.post("/flush_cache", self._flush),
            web.get("/server_info", self._info),
        ]

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        app = web.Application(client_max_size=1 << 24)
        app.router.add_routes(self.routes())
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

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.requests.append(body)
        self.clients.append(request.transport and request.transport.get_extra_info("peername"))
        if self.refusal and self.refuse_with != 200:
            return web.Response(status=self.refuse_with, text=self.refusal)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        if self.drops and request.transport is not None:
            request.transport.abort()
            return response
        if self.refusal:
            await self._send(response, {"error": {"message": self.refusal}})
            return response
        self.running.add(body["rid"])
        try:
            await self._stream(response, body)
        except ConnectionResetError:  # the client hung up
            self.hung_up.add(body["rid"])
        finally:
            self.running.remove(body["rid"])
        return response

    async def _stream(self, response: web.StreamResponse, body: dict[str, Any]) -> None:
        rid, sampling = body["rid"], body["sampling_params"]
        most, interval = sampling["max_new_tokens"], sampling["stream_interval"]
        ids: list[int] = []
        sent = 0
        for place in itertools.count():
            ended = place == most or rid in self.aborted
            if ended or (ids and (len(ids) - 1) % interval == 0 and len(ids) > sent):
                reason = {"type": "abort" if rid in self.aborted else "length"} if ended else None
                meta = {
                    "prompt_tokens": len(body["input_ids"]),
                    "completion_tokens": len(ids),
                    "finish_reason": reason,
                }
                shown = ids[sent:] if self.incremental else ids
                await self._send(response, {"output_ids": shown, "meta_info": meta})
                sent = len(ids)
                await asyncio.sleep(0.001)
            if ended:
                break
            ids.append(self.answer(body["input_ids"], place))
            self.context += len(body["input_ids"]) * 40
        await response.write(b"data: [DONE]\n\n")

    async def _send(self, response: web.StreamResponse, message: dict[str, Any]) -> None:
        await response.write(b"data: " + json.dumps(message).encode() + b"\n\n")

    async def _abort(self, request: web.Request) -> web.Response:
        self.aborted.add((await request.json())["rid"])
        return web.Response()

    async def _flush(self, _: web.Request) -> web.Response:
        if self.running:
            return web.Response(status=400, text="requests are running")
        self.flushes += 1
        return web.Response()

    async def _info(self, _: web.Request) -> web.Response:
        state: dict[str, Any] = {}
        if self.sparse:
            budget = {
                "context_tokens": self.context,
                "candidate_tokens": self.context // 4,
                "kept_tokens": self.context // 10,
            }
            heads = {"layer_ids": [0], "kept_fraction": None, "kept_mass": None}
            steps = {"sparse_rows": 0, "decode": 0, "dense": 0}
            if self.context:
                heads |= {"kept_fraction": [[0.1]], "kept_mass": [[0.95]]}
                rows = self.context // 100
                steps = {"sparse_rows": rows, "decode": rows, "dense": 0}
            state["twilight"] = {"config": {"p": 0.95}, "budget": budget, "heads": heads}
            state["twilight"]["steps"] = steps
        about = {"max_total_num_tokens": 100_000, "internal_states": [state], **self.info}
        return web.json_response(about)
