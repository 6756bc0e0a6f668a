"""Model families under Twilight: tiny random models, each on a server of its own, all at once.

A family passes when decoding with p = 1 over all pages equals dense decoding on the same server,
up to that server's own rounding noise: the logprobs that its prefill gives the same tokens.

    python tests/gpu/models.py --out DIR [--only NAME] [FLAG ...]

prints a line a family and leaves the servers' logs in DIR; FLAGs go to every server.
"""

import argparse
import contextlib
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "server"))

from client import Server, running

VOCABULARY = 2048
TOKENS = 24
PROMPT_TOKENS = (17, 160, 767, 1500)
WINDOW = 128
SLIDING_AND_FULL = ["sliding_attention", "full_attention"] * 2

BASE = {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 4096,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.06,  # larger than usual: queries then prefer some keys to others
}
# All experts answer, so that rounding cannot choose others.
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 4, "moe_intermediate_size": 256}
FLAGS = [
    *("--skip-tokenizer-init", "--page-size", "16"),
    # The cache is bounded by tokens: servers that start together cannot tell whose memory it is.
    *("--mem-fraction-static", "0.7", "--max-total-tokens", "16384"),
    *("--max-running-requests", "4", "--cuda-graph-max-bs-decode", "4"),
    *("--cuda-graph-backend-prefill", "disabled"),
    *("--twilight-selector-budget", "1", "--twilight-min-context-tokens", "0"),
    *("--twilight-skip-layers", "0", "--twilight-recent-tokens", "16"),
    *("--twilight-min-step-mb", "0", "--twilight-audit-interval", "8"),
]


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


def ask(server: Server, twilight: dict[str, Any]) -> list[Answer]:
    """Decode all prompts greedily in one batch, from an empty radix cache."""
    server.flush()
    sampling = {"max_new_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
    body = {
        "input_ids": prompts(),
        "sampling_params": sampling | {"custom_params": {"twilight": twilight}},
        "return_logprob": True,
        "top_logprobs_num": 8,
    }
    return [
        Answer(
            ids=[entry[1] for entry in meta["output_token_logprobs"]],
            logprobs=[entry[0] for entry in meta["output_token_logprobs"]],
            best=[{entry[1]: entry[0] for entry in top} for top in meta["output_top_logprobs"]],
        )
        for meta in (answer["meta_info"] for answer in server.post("/generate", body))
    ]


def difference(one: Answer, other: Answer) -> float:
    """The largest difference in logprob up to the first token that differs, that one included."""
    largest = 0.0
    for position, (token, logprob) in enumerate(zip(one.ids, one.logprobs, strict=True)):
        chosen = other.ids[position]
        if chosen != token:
            return max(largest, logprob - one.best[position].get(chosen, -float("inf")))
        largest = max(largest, abs(logprob - other.logprobs[position]))
    return largest


def prefill_noise(server: Server, answers: list[Answer]) -> float:
    """How far prefill is from decoding, in logprob of the tokens that were decoded."""
    server.flush()
    body = {
        "input_ids": [
            [*prompt, *answer.ids] for prompt, answer in zip(prompts(), answers, strict=True)
        ],
        "sampling_params": {"max_new_tokens": 1, "temperature": 0},
        "return_logprob": True,
        "logprob_start_len": 0,
    }
    largest = 0.0
    for said, answer in zip(server.post("/generate", body), answers, strict=True):
        entries = said["meta_info"]["input_token_logprobs"][-TOKENS:]
        assert [entry[1] for entry in entries] == answer.ids
        for entry, logprob in zip(entries, answer.logprobs, strict=True):
            largest = max(largest, abs(entry[0] - logprob))
    return largest


def budget_problem(family: "Family", before: dict[str, Any], after: dict[str, Any]) -> str:
    """What is wrong with the budget of one `ask` with p = 1, if anything."""
    names = ("context_tokens", "candidate_tokens", "kept_tokens")
    context, candidates, kept = (after["budget"][n] - before["budget"][n] for n in names)
    if not context == candidates == kept:
        return f"of {context} tokens {candidates} were candidates and {kept} kept"
    once = sum(size + step for size in PROMPT_TOKENS for step in range(1, TOKENS))
    layers = context / (once * family.settings["num_key_value_heads"])
    # Overlap scheduling decodes one more token than a request takes.
    if round(layers, 0) != family.selecting_layers:
        return f"{layers:.2f} layers were sparse, expected {family.selecting_layers}"
    if after["audit"]["violations"] or not after["audit"]["checks"]:
        return f"the audit says {after['audit']}"
    return ""


def equality(family: "Family", server: Server) -> str:
    """Keeping everything equals dense attention; keeping little does not."""
    dense = ask(server, {"enabled": False})
    tolerance = 2 * prefill_noise(server, dense)
    before = server.twilight()
    everything = ask(server, {"p": 1.0})
    problem = budget_problem(family, before, server.twilight())
    if problem:
        return problem
    largest = max(map(difference, dense, everything))
    if largest > tolerance:
        return f"logprobs differ from dense by {largest:.4f}, more than {tolerance:.4f}"
    little = max(map(difference, dense, ask(server, {"p": 0.05})))
    if little <= tolerance:
        return f"p = 0.05 differs from dense by {little:.4f}, within noise: nothing is shown"
    return ""


def idle(family: "Family", server: Server) -> str:
    """Speculative decoding runs, densely, whatever a request asks of Twilight."""
    prompt = prompts()[-1]
    dense, asked = (
        server.generate(prompt, 4 * TOKENS, wish)["output_ids"]
        for wish in ({"enabled": False}, {"p": 0.05})
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
        decoding = pool.submit(server.generate, prompts()[1], 1024, asked)
        while not server.twilight()["budget"]["context_tokens"]:
            time.sleep(0.05)
        while not decoding.done() and not server.twilight()["budget"]["mixed_rows"]:
            arrival = [drawn.randrange(3, VOCABULARY) for _ in range(200)]
            server.generate(arrival, 1, asked)
        decoding.result()
    state = server.twilight()
    if not state["budget"]["mixed_rows"]:
        return "no decode row was in a mixed step"
    if state["budget"]["kept_tokens"] != state["budget"]["context_tokens"]:
        return f"p = 1 did not keep everything: {state['budget']}"
    if state["audit"]["violations"] or not state["audit"]["checks"]:
        return f"the audit says {state['audit']}"
    return ""


@dataclass(frozen=True)
class Family:
    """A model family, or one model in another mode.

    Attributes:
        model_type: as in Hugging Face's config.json.
        config: what differs from `BASE` there.
        selecting_layers: how many layers have summaries.
        flags: for its server; `{folder}` is the model's.
        check: says how the server differs from what is expected; an empty text if it does not.
        draft: config.json of a draft model.
    """

    model_type: str
    config: dict[str, Any]
    selecting_layers: int = 3
    flags: tuple[str, ...] = ()
    check: Callable[["Family", Server], str] = equality
    draft: dict[str, Any] | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """The fields of config.json."""
        return BASE | self.config


LLAMA: dict[str, Any] = {}
GPT_OSS = {
    "head_dim": 64,
    "num_attention_heads": 16,
    "num_local_experts": 4,
    "num_experts_per_tok": 4,
    "intermediate_size": 512,
    "layer_types": SLIDING_AND_FULL,
    "sliding_window": WINDOW,
    "swiglu_limit": 7.0,
}
GEMMA = {
    "head_dim": 256,
    "num_attention_heads": 4,
    "query_pre_attn_scalar": 256,
    "layer_types": SLIDING_AND_FULL,
    "sliding_window": WINDOW,
}
QWEN3_NEXT = {
    **EXPERTS,
    "head_dim": 256,
    "shared_expert_intermediate_size": 256,
    "full_attention_interval": 4,
    "layer_types": ["linear_attention"] * 3 + ["full_attention"],
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
}
SPECULATION = ("--speculative-num-draft-tokens", "4")
EAGLE = (
    *("--speculative-algorithm", "EAGLE", "--speculative-draft-model-path", "{folder}/draft"),
    *("--speculative-num-steps", "3", "--speculative-eagle-topk", "1", *SPECULATION),
    *("--speculative-draft-load-format", "dummy"),
)
NGRAM = (
    *("--speculative-algorithm", "NGRAM", "--speculative-ngram-max-bfs-breadth", "1"),
    *SPECULATION,
)
FAMILIES = {
    "llama": Family("llama", LLAMA),
    "qwen2": Family("qwen2", {"hidden_size": 896, "num_attention_heads": 14, "head_dim": 64}),
    "qwen3": Family("qwen3", {}),
    "qwen3-moe": Family("qwen3_moe", EXPERTS),
    "mistral": Family("mistral", {"sliding_window": None}),
    # SGLang attends to everything in Mistral models, whatever window they name.
    "mistral-window": Family("mistral", {"sliding_window": WINDOW}),
    "gemma2": Family("gemma2", {**GEMMA, "hidden_act": "gelu_pytorch_tanh"}, selecting_layers=2),
    "gemma3": Family("gemma3_text", GEMMA, selecting_layers=2),
    "gpt-oss": Family("gpt_oss", GPT_OSS, selecting_layers=2),
    "qwen3-next": Family(
        "qwen3_next", QWEN3_NEXT, selecting_layers=1, flags=("--max-mamba-cache-size", "32")
    ),
    "llama-mixed": Family("llama", LLAMA, flags=("--enable-mixed-chunk",), check=mixed),
    "llama-ngram": Family("llama", LLAMA, flags=NGRAM, check=idle),
    "llama-eagle": Family(
        "llama",
        LLAMA,
        flags=EAGLE,
        check=idle,
        draft={"architectures": ["LlamaForCausalLMEagle"], "num_hidden_layers": 1},
    ),
}


def write_model(family: Family, folder: Path) -> None:
    """Write a random model that SGLang can load."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(family.model_type, **family.settings)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        if name.endswith("sinks"):
            # As heavy as some hundred tokens, so that attention without them would show.
            torch.nn.init.normal_(parameter, mean=5.0, std=1.0)
    model.save_pretrained(folder)
    if family.draft is not None:
        (folder / "draft").mkdir()
        draft = json.loads((folder / "config.json").read_text()) | family.draft
        (folder / "draft" / "config.json").write_text(json.dumps(draft))


def verdict(name: str, folder: Path, logs: Path, flags: Iterable[str]) -> str:
    """Serve a written model and check it: `ok`, how it differs, or the end of an error."""
    family = FAMILIES[name]
    own = [flag.format(folder=folder) for flag in family.flags]
    argv = ["--model-path", str(folder), *FLAGS, *own, *flags]
    try:
        with running(argv, logs / f"{name}.log") as server:
            return family.check(family, server.wait()) or "ok"
    except (AssertionError, KeyError, OSError, RuntimeError) as error:
        return f"error: {type(error).__name__}: {last_lines(str(error))}"


def last_lines(text: str, count: int = 3) -> str:
    """The last lines of an error that say something, as one line."""
    return " | ".join([line.strip() for line in text.splitlines() if line.strip()][-count:])


@contextlib.contextmanager
def verdicts(
    names: Iterable[str], logs: Path, flags: Iterable[str] = ()
) -> Iterator[dict[str, "Future[str]"]]:
    """Start the servers of families as their models are written; what each comes to, by name."""
    names = list(names)
    with tempfile.TemporaryDirectory() as models, ThreadPoolExecutor(len(names)) as pool:
        futures = {}
        for name in names:
            folder = Path(models) / name
            write_model(FAMILIES[name], folder)
            futures[name] = pool.submit(verdict, name, folder, logs, flags)
        yield futures


def main() -> int:
    """Check the families asked for; returns the number of those that are not ok."""
    parser = argparse.ArgumentParser(description="Model families under Twilight.")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="for logs")
    parser.add_argument("--only", choices=FAMILIES, metavar="NAME", help=", ".join(FAMILIES))
    arguments, flags = parser.parse_known_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    names = [arguments.only] if arguments.only else list(FAMILIES)
    bad = 0
    with verdicts(names, arguments.out, flags) as futures:
        for name, future in futures.items():
            bad += future.result() != "ok"
            print(f"{name:16} {future.result()}", flush=True)
    return bad


if __name__ == "__main__":
    sys.exit(main())
