"""A served model: what it says of itself, and its greedy answers."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from twilight_sgl.errors import TwilightError
from twilight_sgl.telemetry.totals import twilight_states

GENERATE, COMPLETIONS = "/generate", "/v1/completions"


@dataclass(frozen=True)
class Server:
    """A server that answers.

    Attributes:
        url: without a path.
        endpoint: where prompts go: SGLang's `/generate`, else `/v1/completions`.
        model: the served model's path or name.
        tokenizer: path or name of its tokenizer; the model's where the server does not say.
        context_tokens: that prompt and output may take together, None if the server does not say.
        info: SGLang's `/server_info`, empty on other servers.
    """

    url: str
    endpoint: str
    model: str
    tokenizer: str
    context_tokens: int | None
    info: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """Output of one prompt; the prompt's tokens as the server counts them, if it says."""

    text: str
    prompt_tokens: int | None


async def find_server(session: aiohttp.ClientSession, url: str, *, flag: str = "--url") -> Server:
    """Ask a server what it serves.

    Args:
        flag: that named it, for messages.
    Raises:
        TwilightError: nothing answers there, or it has no model to complete prompts with.
    """
    url = url.rstrip("/").removesuffix("/v1")
    models = await _get(session, f"{url}/v1/models", flag) or {}
    about = await _get(session, f"{url}/model_info") or await _get(session, f"{url}/get_model_info")
    listed = models.get("data") or []
    if about:
        info = await _get(session, f"{url}/server_info") or {}
        given = (
            *(model.get("max_model_len") for model in listed),
            info.get("max_total_num_tokens"),
        )
        limit = min((tokens for tokens in given if tokens is not None), default=None)
        model = about["model_path"]
        return Server(url, GENERATE, model, about.get("tokenizer_path") or model, limit, info)
    if not listed:
        raise TwilightError(
            f"{flag} {url} answers neither /v1/models nor /model_info: pass the address of an "
            "OpenAI-compatible or SGLang server, e.g. http://127.0.0.1:30000"
        )
    first = listed[0]
    source = first.get("root") or first["id"]
    return Server(url, COMPLETIONS, first["id"], source, first.get("max_model_len"))


async def read_info(session: aiohttp.ClientSession, server: Server) -> dict[str, Any]:
    """SGLang's `/server_info` as of now; empty on other servers."""
    if server.endpoint != GENERATE:
        return {}
    return await _get(session, f"{server.url}/server_info") or {}


async def complete(
    session: aiohttp.ClientSession,
    server: Server,
    prompt: str,
    *,
    max_tokens: int,
    twilight: Mapping[str, Any] | None,
) -> Answer:
    """A greedy answer.

    Args:
        max_tokens: of output.
        twilight: options for this request (`custom_params.twilight`), None for the server's.
    Raises:
        TwilightError: the server refused, aborted or ended; the message is its own.
    """
    params = {} if twilight is None else {"custom_params": {"twilight": dict(twilight)}}
    if server.endpoint == GENERATE:
        sampling = {"temperature": 0, "max_new_tokens": max_tokens, **params}
        body: dict[str, Any] = {"text": prompt, "sampling_params": sampling}
    else:
        body = {"model": server.model, "prompt": prompt, "temperature": 0, **params}
        body["max_tokens"] = max_tokens
    answer = await post(session, server, body)
    try:
        if server.endpoint == COMPLETIONS:
            used = (answer.get("usage") or {}).get("prompt_tokens")
            return Answer(answer["choices"][0]["text"], used)
        return Answer(answer["text"], answer["meta_info"].get("prompt_tokens"))
    except (LookupError, TypeError, AttributeError) as error:
        raise no_completion(server, answer) from error


async def post(
    session: aiohttp.ClientSession, server: Server, body: Mapping[str, Any], *, if_ended: str = ""
) -> dict[str, Any]:
    """What the server's endpoint answers.

    Args:
        if_ended: what else to check where the server ends the connection.
    Raises:
        TwilightError: the server refused, aborted or ended; the message is its own.
    """
    where = server.url + server.endpoint
    try:
        async with session.post(where, json=body) as response:
            status, text = response.status, await response.text()
    except (aiohttp.ClientError, OSError) as error:
        raise TwilightError(
            f"{where} ended the connection ({error!r}): see the server's log, then run the same "
            f"command again, which goes on where this one stopped{if_ended}"
        ) from error
    if status != 200:
        raise TwilightError(f"{where} answered {status}: {text[:500]}")
    try:
        answer = json.loads(text)
        reason = (answer.get("meta_info") or {}).get("finish_reason") or {}
        aborted = reason.get("type") == "abort"
    except (ValueError, AttributeError) as error:
        raise no_completion(server, text) from error
    if aborted:
        raise TwilightError(f"{where} aborted: {reason.get('message')}")
    return answer


def no_completion(server: Server, answer: object) -> TwilightError:
    """The error of an answer that lacks what was asked for."""
    return TwilightError(
        f"{server.url}{server.endpoint} answered what is no completion: {str(answer)[:500]}"
    )


def method_name(info: Mapping[str, Any], twilight: Mapping[str, Any] | None) -> str:
    """What tables call a way to decode: the attention backend, or the sparsity that holds."""
    states = twilight_states(info)
    if twilight is not None and twilight.get("enabled") is False:
        return "dense"
    if not states:
        backend = info.get("decode_attention_backend") or info.get("attention_backend")
        return str(backend or "dense")
    config = states[0]["config"]
    if config.get("pruner") == "none":
        return f"{config['selector']} B0={config['selector_budget']:g}"
    p = (twilight or {}).get("p", config["p"])
    return f"twilight p={p:g}"


async def _get(
    session: aiohttp.ClientSession, address: str, flag: str = "--url"
) -> dict[str, Any] | None:
    """A JSON object, None where the server has none.

    Raises:
        TwilightError: nothing answers.
    """
    try:
        async with session.get(address) as response:
            if response.status != 200:
                return None
            answer = json.loads(await response.text())
    except json.JSONDecodeError:
        return None
    except (aiohttp.ClientError, OSError, ValueError) as error:
        raise TwilightError(
            f"{flag}: {address} does not answer ({error}): start the server, or correct {flag}"
        ) from error
    return answer if isinstance(answer, dict) else None
