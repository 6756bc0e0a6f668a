"""What cannot work is refused before any weights load, with the flag and the remedy."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 128,
    "max_position_embeddings": 1024,
    "torch_dtype": "float32",
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "mla": {
        **LLAMA,
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        "kv_lora_rank": 32,
        "q_lora_rank": None,
        "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "first_k_dense_replace": 2,
    },
    "gpt-oss": {
        **LLAMA,
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "head_dim": 64,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 128,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "eagle": {**LLAMA, "architectures": ["LlamaForCausalLMEagle"], "num_hidden_layers": 1},
    "encoder-decoder": {
        "architectures": ["MllamaForConditionalGeneration"],
        "model_type": "mllama",
        "text_config": {**LLAMA, "model_type": "mllama_text_model", "cross_attention_layers": [1]},
        "vision_config": {"model_type": "mllama_vision_model"},
    },
}

TWILIGHT = ["--decode-attention-backend", "twilight"]
# SGLang checks drafts of several tokens a step against page sizes and backends of its own.
EAGLE = [
    *("--speculative-algorithm", "EAGLE", "--speculative-draft-model-path", "{folder}/eagle"),
    *("--speculative-eagle-topk", "1", "--speculative-num-steps", "2"),
    *("--speculative-num-draft-tokens", "3"),
]
NGRAM = ["--speculative-algorithm", "NGRAM", "--speculative-ngram-max-bfs-breadth", "1"]
CASES: dict[str, tuple[str, list[str], list[str]]] = {
    "accepted": ("llama", TWILIGHT, ["accepted"]),
    "page size follows": ("llama", [*TWILIGHT, "--page-size", "32"], ["accepted"]),
    "not ours": ("llama", ["--page-size", "1"], ["accepted"]),
    "EAGLE": ("llama", [*TWILIGHT, *EAGLE], ["accepted", "drafting with torch_native", "idle"]),
    "EAGLE beside another prefill backend": (
        "llama",
        [*TWILIGHT, *EAGLE, "--prefill-attention-backend", "triton"],
        ["accepted", "drafting with triton", "idle"],
    ),
    "EAGLE with a draft backend": (
        "llama",
        [*TWILIGHT, *EAGLE, "--speculative-draft-attention-backend", "triton"],
        ["accepted", "drafting with triton", "idle"],
    ),
    "EAGLE, not ours": ("llama", EAGLE, ["accepted", "drafting with None", "nothing logged"]),
    "NGRAM": ("llama", [*TWILIGHT, *NGRAM], ["accepted", "idle"]),
    "verification as decode, EAGLE": (
        "llama",
        [*TWILIGHT, *EAGLE, "--speculative-attention-mode", "decode"],
        ["--speculative-attention-mode decode", "use --speculative-attention-mode prefill"],
    ),
    "verification as decode, NGRAM": (
        "llama",
        [*TWILIGHT, *NGRAM, "--speculative-attention-mode", "decode"],
        ["--speculative-attention-mode decode", "use --speculative-attention-mode prefill"],
    ),
    "draft backend": (
        "llama",
        [*TWILIGHT, *EAGLE, "--speculative-draft-attention-backend", "twilight"],
        ["--speculative-draft-attention-backend twilight", "leave it out"],
    ),
    "pinned backends, not ours": (
        "gpt-oss",
        ["--attention-backend", "triton", "--decode-attention-backend", "flashinfer"],
        ["GptOssForCausalLM requires one of"],
    ),
    "page size 1": ("llama", [*TWILIGHT, "--page-size", "1"], ["--page-size 1", "16, 32, 64"]),
    "two page sizes": (
        "llama",
        [*TWILIGHT, "--page-size", "64", "--twilight-page-size", "32"],
        ["--page-size 64", "--twilight-page-size 32"],
    ),
    "attention backend": (
        "llama",
        ["--attention-backend", "twilight"],
        ["--attention-backend twilight", "--decode-attention-backend twilight"],
    ),
    "prefill backend": (
        "llama",
        [*TWILIGHT, "--prefill-attention-backend", "twilight"],
        ["--prefill-attention-backend twilight", "--decode-attention-backend twilight"],
    ),
    "mla": ("mla", TWILIGHT, ["MLA", "--decode-attention-backend"]),
    "encoder-decoder": ("encoder-decoder", TWILIGHT, ["encoder-decoder"]),
    "fp8 e5m2": ("llama", [*TWILIGHT, "--kv-cache-dtype", "fp8_e5m2"], ["fp8_e5m2", "fp8_e4m3"]),
    "unknown selector": (
        "llama",
        [*TWILIGHT, "--twilight-selector", "best"],
        ["--twilight-selector", "'best'", "quest"],
    ),
    "unknown estimator": (
        "llama",
        [*TWILIGHT, "--twilight-estimator", "int2"],
        ["--twilight-estimator", "'int2'", "int4, int4_centred, exact"],
    ),
    "p": ("llama", [*TWILIGHT, "--twilight-p", "1.2"], ["--twilight-p", "(0, 1]"]),
    "hisparse": ("llama", [*TWILIGHT, "--enable-hisparse"], ["hisparse"]),
    "two-batch overlap": (
        "llama",
        [*TWILIGHT, "--enable-two-batch-overlap"],
        ["--enable-two-batch-overlap"],
    ),
    "decode context parallel": ("llama", [*TWILIGHT, "--dcp-size", "2"], ["dcp"]),
    "unified memory": ("llama", [*TWILIGHT, "--enable-unified-memory"], ["unified"]),
}

# One process for all cases: importing SGLang takes most of the time.
SCRIPT = """
import json, sys
from sglang.srt.plugins import load_plugins
load_plugins()
import io, logging, os
from sglang.srt.arg_groups.overrides import resolved_view
from sglang.srt.server_args import prepare_server_args
from twilight_sgl.platforms.cpu import TorchCpuPlatform
# Only arguments are resolved here: what a GPU would accept must get past the CPU's platform.
TorchCpuPlatform.supports_speculative_algorithm = lambda platform, algorithm: True
ours = logging.getLogger("twilight_sgl")
ours.propagate = False
answers = {}
for name, argv in json.load(open(sys.argv[1])).items():
    os.environ.pop("TWILIGHT_CONFIG", None)
    log = io.StringIO()
    ours.handlers = [logging.StreamHandler(log)]
    try:
        args = prepare_server_args(argv)
        if hasattr(args, "resolve_once"):
            args.resolve_once()
        args.check_server_args()
        draft = resolved_view(args).speculative_draft_attention_backend
        logged = log.getvalue() or "nothing"
        answers[name] = f"accepted, drafting with {draft}, {logged} logged"
    except BaseException as error:
        answers[name] = f"{type(error).__name__}: {error}"
json.dump(answers, open(sys.argv[2], "w"))
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    for name, config in MODELS.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config))
    argvs = {
        name: [flag.format(folder=folder) for flag in ("--model-path", f"{folder}/{model}", *flags)]
        for name, (model, flags, _) in CASES.items()
    }
    asked, answered = folder / "asked.json", folder / "answered.json"
    asked.write_text(json.dumps(argvs))
    environment = os.environ | {"PYTHONSAFEPATH": "1"}
    for name in ("TWILIGHT_CONFIG", "TRITON_INTERPRET"):  # others' tests may have set them
        environment.pop(name, None)
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(asked), str(answered)],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(Path(answered).read_text())


@pytest.mark.parametrize("case", CASES)
def test_refusal(answers: dict[str, str], case: str) -> None:
    _, _, fragments = CASES[case]
    for fragment in fragments:
        assert fragment.lower() in answers[case].lower()
