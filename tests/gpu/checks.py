"""What a tiny model's server must do under Twilight: each check says how it does not."""

import random
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "server"))

from client import Server

if TYPE_CHECKING:
    from models import Family

VOCABULARY = 2048
TOKENS = 24
PROMPT_TOKENS = (17, 160, 767, 1500)


@dataclass(frozen=True)
class Answer:
    """What a server said: ids [T], their logprobs [T], and the best ids' logprobs [T]."""

    ids: list[int]
    logprobs: list[float]
    best: list[dict[int, float]]


def prompts() -> list[list[int]]:
    """Random token ids, the same at every call."""
    drawn = random.Random(0)
    return [[drawn.randrange(3, VOCABULARY) for _ in range(size)] for size in PROMPT_TOKENS]


def ask(server: Server, twilight: dict[str, Any], **request: Any) -> list[Answer]:
    """Decode all prompts greedily in one batch, from an empty radix cache.

    Args:
        request: further fields of the request.
    """
    server.flush()
    sampling = {"max_new_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
    body = {
        "input_ids": prompts(),
        "sampling_params": sampling | {"custom_params": {"twilight": twilight}},
        "return_logprob": True,
        "top_logprobs_num": 8,
        **request,
    }
    return [
        Answer(
            ids=[entry[1] for entry in meta["output_token_logprobs"]],
            logprobs=[entry[0] for entry in meta["output_token_logprobs"]],
            best=[{entry[1]: entry[0] for entry in top} for top in meta["output_top_logprobs"]],
        )
        for meta in (answer["meta_info"] for answer in server.post("/generate", body))
    ]


def decode(server: Server, prompt: list[int], tokens: int, twilight: Any = None) -> Any:
    """Decode so many tokens greedily; the models have no token that ends an answer."""
    sampling: dict[str, Any] = {"max_new_tokens": tokens, "temperature": 0}
    if twilight is not None:
        sampling["custom_params"] = {"twilight": twilight}
    return server.post("/generate", {"input_ids": prompt, "sampling_params": sampling})


def decode_all(server: Server, prompts: list[list[int]], tokens: int) -> list[Any]:
    """Decode all prompts at the same time."""
    with ThreadPoolExecutor(len(prompts)) as pool:
        return list(pool.map(lambda prompt: decode(server, prompt, tokens), prompts))


def difference(one: Answer, other: Answer) -> float:
    """The largest difference in logprob up to the first token that differs, that one included."""
    largest = 0.0
    for position, (token, logprob) in enumerate(zip(one.ids, one.logprobs, strict=True)):
        chosen = other.ids[position]
        if chosen != token:
            return max(largest, logprob - one.best[position].get(chosen, -float("inf")))
        largest = max(largest, abs(logprob - other.logprobs[position]))
    return largest


def prefill_noise(server: Server, answers: list[Answer], **request: Any) -> float:
    """How far prefill is from decoding, in logprob of the tokens that were decoded."""
    server.flush()
    body = {
        "input_ids": [
            [*prompt, *answer.ids] for prompt, answer in zip(prompts(), answers, strict=True)
        ],
        "sampling_params": {"max_new_tokens": 1, "temperature": 0},
        "return_logprob": True,
        "logprob_start_len": 0,
        **request,
    }
    largest = 0.0
    for said, answer in zip(server.post("/generate", body), answers, strict=True):
        entries = said["meta_info"]["input_token_logprobs"][-TOKENS:]
        prefilled = [entry[1] for entry in entries]
        # SGLang reports the vocabulary's last token as token 0 here (its logprob is right).
        decoded = [0 if token == VOCABULARY - 1 else token for token in answer.ids]
        assert prefilled == decoded, f"prefill saw {prefilled}, decoded were {decoded}"
        for entry, logprob in zip(entries, answer.logprobs, strict=True):
            largest = max(largest, abs(entry[0] - logprob))
    return largest


def counted(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> list[int]:
    """Tokens of the context, candidates and kept ones, that all data-parallel ranks counted."""
    return [
        sum(state["budget"][name] for state in after)
        - sum(state["budget"][name] for state in before)
        for name in ("context_tokens", "candidate_tokens", "kept_tokens")
    ]


def budget_problem(
    family: "Family", before: list[dict[str, Any]], after: list[dict[str, Any]]
) -> str:
    """What is wrong with the budget of one `ask` with p = 1, if anything."""
    context, candidates, kept = counted(before, after)
    if not context == candidates == kept:
        return f"of {context} tokens {candidates} were candidates and {kept} kept"
    once = sum(size + step for size in PROMPT_TOKENS for step in range(1, TOKENS))
    heads = family.settings["num_key_value_heads"] // family.head_ranks
    if any(len(state["heads"]["kept_fraction"][0]) != heads for state in after):
        return f"a rank does not have {heads} KV heads: {after}"
    layers = context / (once * heads)
    # Overlap scheduling decodes one more token than a request takes.
    if round(layers, 0) != family.selecting_layers:
        return f"{layers:.2f} layers were sparse, expected {family.selecting_layers}"
    return audit_problem(*after)


def equality(family: "Family", server: Server) -> str:
    """Keeping everything equals dense attention; keeping little does not."""
    dense = ask(server, {"enabled": False}, **family.request)
    tolerance = 2 * prefill_noise(server, dense, **family.request)
    before = server.twilights()
    everything = ask(server, {"p": 1.0}, **family.request)
    problem = budget_problem(family, before, server.twilights())
    if problem:
        return problem
    largest = max(map(difference, dense, everything))
    if largest > tolerance:
        return f"logprobs differ from dense by {largest:.4f}, more than {tolerance:.4f}"
    little = max(map(difference, dense, ask(server, {"p": 0.05}, **family.request)))
    if little <= tolerance:
        return f"p = 0.05 differs from dense by {little:.4f}, within noise: nothing is shown"
    return ""


def adapted(family: "Family", server: Server) -> str:
    """`equality` holds under an adapter, and the adapter is in force."""
    plain, with_adapter = (ask(server, {"p": 1.0}, **more) for more in ({}, family.request))
    if [answer.ids for answer in plain] == [answer.ids for answer in with_adapter]:
        return "the adapter changed no token: nothing is shown"
    return equality(family, server)


def reloaded(family: "Family", server: Server) -> str:
    """Pages that were evicted to the host and come back are sealed again, with the same output."""
    drawn = random.Random(2)
    filling = [[drawn.randrange(3, VOCABULARY) for _ in range(1500)] for _ in range(6)]
    asked = {"p": 0.9}
    decode(server, filling[0], TOKENS, asked)
    cached = decode(server, filling[0], TOKENS, asked)["output_ids"]
    decode_all(server, filling[1:], TOKENS)
    built = server.twilight()["pages"]["built"]
    again = decode(server, filling[0], TOKENS, asked)
    state = server.twilight()
    from_host = (again["meta_info"].get("cached_tokens_details") or {}).get("host", 0)
    if from_host < 1000:
        return f"only {from_host} tokens came back from the host: {again['meta_info']}"
    if state["pages"]["built"] - built < from_host // 16:
        return f"{state['pages']['built'] - built} pages sealed for {from_host} tokens"
    if again["output_ids"] != cached:
        return f"from the host it decoded {again['output_ids']}, from the GPU {cached}"
    return audit_problem(state)


def retracted(family: "Family", server: Server) -> str:
    """Requests that outgrow the cache are retracted and end with as many tokens as they asked."""
    drawn = random.Random(3)
    growing = [[drawn.randrange(3, VOCABULARY) for _ in range(900)] for _ in range(4)]
    before = server.twilight()["steps"]["sparse_rows"]
    with ThreadPoolExecutor(1) as pool:
        others = pool.submit(decode_all, server, growing[:-1], 400)
        # SGLang admits the last one only beside requests that decode: it reserves less for those.
        while server.twilight()["steps"]["sparse_rows"] == before:
            time.sleep(0.05)
        answers = [decode(server, growing[-1], 400), *others.result()]
    if any(answer["meta_info"]["completion_tokens"] != 400 for answer in answers):
        return f"tokens: {[answer['meta_info']['completion_tokens'] for answer in answers]}"
    if "Retract requests" not in server.log.read_text():
        return "SGLang retracted nothing: nothing is shown"
    return audit_problem(server.twilight())


def alike(family: "Family", together: Server, alone: Server) -> str:
    """Several ranks answer as one GPU does, and keep as much of the context."""
    dense = ask(alone, {"enabled": False}, **family.request)
    tolerance = 2 * prefill_noise(alone, dense, **family.request)
    for asked in ({"enabled": False}, {"p": 1.0}, {"p": 0.9}):
        answers, shares = [], []
        for server in (together, alone):
            before = server.twilights()
            answers.append(ask(server, asked, **family.request))
            context, _, kept = counted(before, server.twilights())
            shares.append(kept / max(context, 1))
        largest = max(map(difference, *answers))
        print(f"{family.flags} {asked}: {largest:.4f} of {tolerance:.4f}, kept {shares}")
        if largest > tolerance:
            return (
                f"asked for {asked} logprobs differ from one GPU's by {largest:.4f}, "
                f"more than {tolerance:.4f}"
            )
        if abs(shares[0] - shares[1]) > 0.02 * shares[1]:
            return f"asked for {asked} they kept {shares[0]:.4f}, one GPU {shares[1]:.4f}"
    return audit_problem(*together.twilights())


def shared_out(family: "Family", server: Server) -> str:
    """`equality` holds under data-parallel attention, and a rank without a request does nothing."""
    problem = equality(family, server)
    if problem:
        return problem
    before = [doings(state) for state in server.twilights()]
    decode(server, prompts()[-1], TOKENS, {"p": 0.5})
    after = [doings(state) for state in server.twilights()]
    if sum(state in before for state in after) != len(after) - 1:
        return f"one request moved other than one rank's totals: {before} became {after}"
    drawn = random.Random(4)
    with ThreadPoolExecutor(1) as pool:
        # Every other prompt is prefilled by the rank beside the one that decodes.
        decoding = pool.submit(decode, server, prompts()[1], 512, {"p": 0.5})
        while not decoding.done():
            decode(server, [drawn.randrange(3, VOCABULARY) for _ in range(200)], 2, {"p": 0.5})
        tokens = decoding.result()["meta_info"]["completion_tokens"]
    if tokens != 512:
        return f"{tokens} tokens beside prefills of the other rank"
    return audit_problem(*server.twilights())


def doings(state: dict[str, Any]) -> list[Any]:
    """What of a rank's state changes when it decodes."""
    return [state[name] for name in ("budget", "steps", "pages", "audit")]


def audit_problem(*states: dict[str, Any]) -> str:
    """What the audit of any rank found, or that it did not run."""
    for state in states:
        if state["audit"]["violations"] or not state["audit"]["checks"]:
            return f"the audit says {state['audit']}"
    return ""


def idle(family: "Family", server: Server) -> str:
    """Speculative decoding runs, densely, whatever a request asks of Twilight."""
    # The first two runs fill the radix cache and the n-grams: what is drafted, and so how many
    # tokens a pass verifies and how it rounds, is then the same for the two that are compared.
    *_, dense, asked = (
        decode(server, prompts()[-1], 4 * TOKENS, wish)["output_ids"]
        for wish in (*[{"enabled": False}] * 3, {"p": 0.05})
    )
    state = server.twilight()
    if state["budget"]["context_tokens"] or state["pages"]["sealed"]:
        return f"not idle: {state['budget']}, {state['pages']}"
    if len(dense) != 4 * TOKENS or dense != asked:
        return f"asked for p = 0.05 it decoded {asked}, not {dense}"
    if "Twilight is idle under speculative decoding" not in server.log.read_text():
        return "the log does not say that Twilight is idle"
    return ""


def mixed(family: "Family", server: Server) -> str:
    """Prefills arrive while others decode: rows of the mixed steps are counted apart."""
    asked, drawn = {"p": 1.0}, random.Random(1)
    with ThreadPoolExecutor(1) as pool:
        decoding = pool.submit(decode, server, prompts()[1], 1024, asked)
        while not server.twilight()["budget"]["context_tokens"]:
            time.sleep(0.05)
        while not decoding.done() and not server.twilight()["budget"]["mixed_rows"]:
            arrival = [drawn.randrange(3, VOCABULARY) for _ in range(200)]
            decode(server, arrival, 1, asked)
        decoding.result()
    state = server.twilight()
    if not state["budget"]["mixed_rows"]:
        return "no decode row was in a mixed step"
    if state["budget"]["kept_tokens"] != state["budget"]["context_tokens"]:
        return f"p = 1 did not keep everything: {state['budget']}"
    return audit_problem(state)
