"""Model families under Twilight: tiny random models, each on a server of its own, all at once.

A family passes when decoding with p = 1 over all pages equals dense decoding on the same server,
up to that server's own rounding noise: the logprobs that its prefill gives the same tokens. What
takes several GPUs must then answer as a server on one GPU does.

    python tests/gpu/models.py --out DIR [--only NAME ...] [FLAG ...]

prints a line a family and leaves the servers' logs in DIR; FLAGs go to every server.
"""

import argparse
import contextlib
import json
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "server"))

from checks import (
    VOCABULARY,
    adapted,
    alike,
    equality,
    idle,
    mixed,
    reloaded,
    retracted,
    shared_out,
)
from client import Server, running

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WINDOW = 128
ADAPTER_RANK = 8
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
    "eos_token_id": None,  # answers are as long as asked: without a tokenizer nothing else is said
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
class Family:
    """A model family, or one model in another mode.

    Attributes:
        model_type: as in Hugging Face's config.json.
        config: what differs from `BASE` there.
        selecting_layers: how many layers have summaries.
        flags: for its server; `{folder}` is the model's.
        check: says how the server differs from what is expected; an empty text if it does not.
        draft: config.json of a draft model.
        adapter: write a LoRA adapter for the attention's projections.
        request: further fields of each request.
        gpus: GPUs that its server takes.
        head_ranks: ranks that the KV heads are shared out to.
    """

    model_type: str
    config: dict[str, Any]
    selecting_layers: int = 3
    flags: tuple[str, ...] = ()
    check: Callable[["Family", Server], str] = equality
    draft: dict[str, Any] | None = None
    adapter: bool = False
    request: dict[str, Any] = field(default_factory=dict)
    gpus: int = 1
    head_ranks: int = 1

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
    # fa3 caps logits by an approximate tanh, in prefill and decoding alike.
    "gemma2": Family(
        "gemma2",
        {**GEMMA, "hidden_act": "gelu_pytorch_tanh"},
        selecting_layers=2,
        flags=("--attention-backend", "triton"),
    ),
    "gemma3": Family("gemma3_text", GEMMA, selecting_layers=2),
    "gpt-oss": Family("gpt_oss", GPT_OSS, selecting_layers=2),
    "qwen3-next": Family(
        "qwen3_next", QWEN3_NEXT, selecting_layers=1, flags=("--max-mamba-cache-size", "32")
    ),
    # Modes of the server.
    "llama-fp8": Family("llama", LLAMA, flags=("--kv-cache-dtype", "fp8_e4m3")),
    "llama-flashinfer": Family("llama", LLAMA, flags=("--attention-backend", "flashinfer")),
    "llama-triton": Family("llama", LLAMA, flags=("--attention-backend", "triton")),
    "llama-page-64": Family("llama", LLAMA, flags=("--page-size", "64")),
    "llama-chunked": Family("llama", LLAMA, flags=("--chunked-prefill-size", "256")),
    "llama-prefill-graphs": Family(
        "llama", LLAMA, flags=("--cuda-graph-backend-prefill", "breakable")
    ),
    "llama-compile": Family("llama", LLAMA, flags=("--enable-torch-compile",)),
    "llama-no-overlap": Family("llama", LLAMA, flags=("--disable-overlap-schedule",)),
    "llama-lora": Family(
        "llama",
        LLAMA,
        flags=("--enable-lora", "--lora-paths", "a={folder}/adapter"),
        check=adapted,
        adapter=True,
        request={"lora_path": "a"},
    ),
    "llama-hicache": Family(
        "llama",
        LLAMA,
        flags=(
            *("--enable-hierarchical-cache", "--hicache-ratio", "4"),
            *("--max-total-tokens", "4096", "--twilight-selector-budget", "0.5"),
        ),
        check=reloaded,
    ),
    "llama-retraction": Family(
        "llama",
        LLAMA,
        flags=("--max-total-tokens", "4608", "--schedule-conservativeness", "0.1"),
        check=retracted,
    ),
    "llama-mixed": Family("llama", LLAMA, flags=("--enable-mixed-chunk",), check=mixed),
    "llama-ngram": Family("llama", LLAMA, flags=NGRAM, check=idle),
    "llama-tensor-parallel": Family("llama", LLAMA, flags=("--tp-size", "2"), gpus=2, head_ranks=2),
    "qwen3-data-parallel": Family(
        "qwen3",
        {},
        flags=("--tp-size", "2", "--dp-size", "2", "--enable-dp-attention"),
        check=shared_out,
        gpus=2,
    ),
    "llama-eagle": Family(
        "llama",
        LLAMA,
        flags=EAGLE,
        check=idle,
        draft={"architectures": ["LlamaForCausalLMEagle"], "num_hidden_layers": 1},
    ),
}


def runnable() -> list[str]:
    """The families that this machine has GPUs for."""
    import torch

    return [name for name, family in FAMILIES.items() if family.gpus <= torch.cuda.device_count()]


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
    if family.adapter:
        write_adapter(model, folder / "adapter")


def write_adapter(model: "PreTrainedModel", folder: Path) -> None:
    """Write a random LoRA adapter, as PEFT would."""
    import torch
    from safetensors.torch import save_file

    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    weights = {}
    for path, module in model.named_modules():
        if path.endswith(names):
            rows, columns = module.weight.shape
            of = f"base_model.model.{path}.lora_"
            weights[f"{of}A.weight"] = torch.randn(ADAPTER_RANK, columns) / columns**0.5
            weights[f"{of}B.weight"] = torch.randn(rows, ADAPTER_RANK) / ADAPTER_RANK**0.5
    about = {"peft_type": "LORA", "r": ADAPTER_RANK, "lora_alpha": ADAPTER_RANK}
    about |= {"target_modules": list(names), "bias": "none", "task_type": "CAUSAL_LM"}
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(about))
    save_file(weights, folder / "adapter_model.safetensors")


def verdict(name: str, folder: Path, logs: Path, flags: Iterable[str]) -> str:
    """Serve a written model and check it: `ok`, how it differs, or the end of an error."""
    family = FAMILIES[name]
    own = [flag.format(folder=folder) for flag in family.flags]
    usual = ["--model-path", str(folder), *FLAGS, *flags]
    try:
        with running([*usual, *own], logs / f"{name}.log") as server:
            problem = family.check(family, server.wait())
            if problem or family.gpus == 1:
                return problem or "ok"
            with running(usual, logs / f"{name}-alone.log") as alone:
                return alike(family, server, alone.wait()) or "ok"
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
    parser.add_argument(
        "--only", choices=FAMILIES, nargs="+", metavar="NAME", help=", ".join(FAMILIES)
    )
    arguments, flags = parser.parse_known_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    names = arguments.only or runnable()
    bad = 0
    with verdicts(names, arguments.out, flags) as futures:
        for name, future in futures.items():
            bad += future.result() != "ok"
            print(f"{name:16} {future.result()}", flush=True)
    return bad


if __name__ == "__main__":
    sys.exit(main())
