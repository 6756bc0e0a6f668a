"""A server that answers `/server_info` and `/v1/loads` with what a test puts there."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from snapshots import totals

from twilight_sgl.config import TwilightConfig


def state(steps: int, **others: Any) -> dict[str, Any]:
    """One replica's part of `/server_info` after so many sparse steps."""
    twilight = {"config": TwilightConfig().to_dict(), **totals(steps, **others).to_dict()}
    return {"last_gen_throughput": 12.5, "twilight": twilight}


class MonitoredServer:
    """Serves `states`; `headers` are those of the last request.

    Args:
        port: 0 for a free one.
    """

    def __init__(self, *states: dict[str, Any], port: int = 0, api_key: str = "") -> None:
        self.states = list(states)
        self.loads: list[dict[str, int]] = [{"num_running_reqs": 3, "num_waiting_reqs": 1}]
        self.requests: list[str] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.requests.append(self.path)
                if api_key and self.headers["Authorization"] != f"Bearer {api_key}":
                    self.send_error(401)
                    return
                answers: dict[str, Any] = {
                    "/server_info": {
                        "served_model_name": "/models/m",
                        "internal_states": outer.states,
                    },
                    "/v1/loads": {"loads": outer.loads},
                }
                body = json.dumps(answers[self.path.partition("?")[0]]).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                """Say nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> "MonitoredServer":
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
