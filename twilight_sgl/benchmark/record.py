"""Record one decode step of a real model as a trace for `kernels --trace`."""

import argparse
import pydoc_data.topics
import sys
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from twilight_sgl.embedded_model import MODEL_NAME, EmbeddedModelError, ensure_embedded_model
from twilight_sgl.errors import TwilightError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PASS_KEY = "71432"
FACT = f"\n\nThe pass key is {PASS_KEY}. Remember it: {PASS_KEY} is the pass key.\n\n"
# Ends in the space that tokenizers split from a digit, so that the next token is one of the key.
QUESTION = "\n\nWhat is the pass key? The pass key is "
FACT_DEPTH = 0.1  # of the text before it
DEFAULT_CONTEXT_TOKENS = 32 << 10  # at most, where --context is not given
CHUNK_TOKENS = 2048
_CHARACTERS_PER_TOKEN = 8  # more than any tokenizer makes of prose or source


def record_step(
    model: "PreTrainedModel",
    token_ids: Sequence[int],
    *,
    layers: Sequence[int] | None = None,
    chunk_tokens: int = CHUNK_TOKENS,
) -> tuple[list[dict[str, Any]], int]:
    """Prefill all tokens but the last, then decode that one and record what attention is given.

    Args:
        model: a causal language model with `sdpa` attention.
        token_ids: [N] the context; the last is the one that is decoded.
        layers: which layers to record, all by default.
        chunk_tokens: prefill step, which bounds the memory that activations take.
    Returns:
        One entry a layer: {"layer": int, "q": [HQ, D], "keys": [N, HK, D], "values": [N, HK, DV]},
        bfloat16 on the CPU, after rotary embedding and scaled so that q . k / sqrt(D) is the
        logit; and the token that the model predicts next.
    Raises:
        TwilightError: a layer is not there, or does not keep all N keys, or recorded nothing.
    """
    from transformers import DynamicCache
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    wanted = range(model.config.num_hidden_layers) if layers is None else layers
    if missing := sorted(set(wanted) - set(range(model.config.num_hidden_layers))):
        raise TwilightError(
            f"--layers: {missing} not there; the model has layers 0 to "
            f"{model.config.num_hidden_layers - 1}"
        )
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
    recorded: dict[int, dict[str, Any]] = {}

    def record(
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        layer = module.layer_idx
        if layer in wanted:
            dim = query.shape[-1]
            scale = kwargs.get("scaling")
            factor = 1.0 if scale is None else scale * dim**0.5
            recorded[layer] = {
                "layer": layer,
                "q": _stored(query[0, :, -1] * factor),
                "keys": _stored(key[0].transpose(0, 1)),
                "values": _stored(value[0].transpose(0, 1)),
            }
        return sdpa(module, query, key, value, *args, **kwargs)

    tokens = torch.tensor([list(token_ids)], device=model.device)
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        for chunk in tokens[:, :-1].split(chunk_tokens, dim=1):
            model(input_ids=chunk, past_key_values=cache, use_cache=True, logits_to_keep=1)
        ALL_ATTENTION_FUNCTIONS["sdpa"] = record
        try:
            out = model(
                input_ids=tokens[:, -1:], past_key_values=cache, use_cache=True, logits_to_keep=1
            )
        finally:
            del ALL_ATTENTION_FUNCTIONS["sdpa"]
    for layer in wanted:
        held = recorded[layer]["keys"].shape[0] if layer in recorded else 0
        if held != len(token_ids):
            raise TwilightError(
                f"layer {layer} attends to {held} of {len(token_ids)} tokens through sdpa: name "
                "only layers of full attention in --layers"
            )
    return [recorded[layer] for layer in wanted], int(out.logits[0, -1].argmax())


def _stored(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.bfloat16).cpu().contiguous().clone()


def retrieval_context(
    encode: Callable[[str], list[int]], text: str, context: int, *, source: str
) -> list[int]:
    """[context] token ids: text with a pass key told early in it and asked for at its end.

    Args:
        encode: token ids of a string, without special tokens.
        source: what the text is, for the error.
    Raises:
        TwilightError: the text is too short, or the context for the question.
    """
    fact, question = encode(FACT), encode(QUESTION)
    room = context - len(fact) - len(question)
    if room <= 0:
        raise TwilightError(
            f"--context {context} leaves no room for text beside the question of "
            f"{len(fact) + len(question)} tokens: pass more"
        )
    filler = encode(text[: context * _CHARACTERS_PER_TOKEN])
    if len(filler) < room:
        raise TwilightError(
            f"{source} has {len(filler)} tokens, --context {context} needs {room}: "
            "pass a longer --text or a smaller --context"
        )
    before = int(room * FACT_DEPTH)
    return filler[:before] + fact + filler[before:room] + question


def python_text(characters: int) -> str:
    """What ships with Python: the language reference's topics, then standard library sources."""
    parts = [pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics)]
    total = sum(map(len, parts))
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        if total >= characters:
            break
        parts.append(path.read_text(encoding="utf-8", errors="replace"))
        total += len(parts[-1])
    return "\n\n".join(parts)


def parse_tokens(value: str) -> int:
    """Read a count of tokens: `28k` is 28 * 1024."""
    number, unit = (value[:-1], 1024) if value[-1:] in "kK" else (value, 1)
    try:
        tokens = int(float(number) * unit)
    except ValueError:
        tokens = 0
    if tokens < 1:
        raise argparse.ArgumentTypeError(f"{value!r} is no count of tokens: pass e.g. 28k or 4096")
    return tokens


def parse_layers(value: str) -> tuple[int, ...]:
    """Read comma-separated layer ids."""
    try:
        return tuple(int(part) for part in value.split(",") if part)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{value!r}: pass layer ids such as 0,1,12") from None


def check_context(context: int | None, limit: int, model_name: str) -> int:
    """Tokens to record: `context`, or without one the model's limit, at most 32k."""
    if context is None:
        return min(limit, DEFAULT_CONTEXT_TOKENS)
    if context > limit:
        raise TwilightError(
            f"--context {context} exceeds the {limit} tokens of {model_name}: pass {limit} or "
            "less, or another --model-path"
        )
    return context


def _load(path: Path) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """Load a Hugging Face folder or a GGUF file: bfloat16 on a GPU, float32 on the CPU."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source: dict[str, Any] = {"local_files_only": True}
    folder = path
    if path.is_file():
        folder, source["gguf_file"] = path.parent, path.name
    cuda = torch.cuda.is_available()
    dtype = torch.bfloat16 if cuda else torch.float32
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **source)
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation="sdpa", **source
        )
    except (ImportError, OSError, ValueError) as error:
        raise TwilightError(
            f"--model-path {path} could not be loaded ({error}): pass a causal language model's "
            "folder or GGUF file"
        ) from error
    return model.to("cuda" if cuda else "cpu").eval(), tokenizer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model-path", type=Path, help="folder or GGUF file; the embedded model by default"
    )
    parser.add_argument(
        "--text", type=Path, help="what the context is made of; by default what ships with Python"
    )
    parser.add_argument(
        "--context", type=parse_tokens, help="tokens, e.g. 28k; by default the model's, at most 32k"
    )
    parser.add_argument("--layers", type=parse_layers, help="e.g. 0,1,12; all by default")
    parser.add_argument("--out", type=Path, default=Path("trace.pt"))


def _record(args: argparse.Namespace) -> None:
    if args.model_path is not None and not args.model_path.exists():
        raise TwilightError(
            f"--model-path {args.model_path} is not there: pass a folder or a GGUF file"
        )
    if args.text is not None and not args.text.is_file():
        raise TwilightError(f"--text {args.text} is not a file: pass one, or leave it out")
    if args.model_path is None:
        path, name = ensure_embedded_model(), MODEL_NAME
    else:
        path, name = args.model_path.resolve(), args.model_path.resolve().name
    model, tokenizer = _load(path)
    context = check_context(args.context, model.config.max_position_embeddings, name)
    if args.text is None:
        text = python_text(context * _CHARACTERS_PER_TOKEN)
    else:
        text = args.text.read_text(encoding="utf-8", errors="replace")
    start = list(tokenizer("").input_ids)  # what the tokenizer puts before every text

    def encode(part: str) -> list[int]:
        return list(tokenizer(part, add_special_tokens=False).input_ids)

    source = f"--text {args.text}" if args.text else "what ships with Python"
    body = retrieval_context(encode, text, context - len(start), source=source)
    layers, predicted = record_step(model, start + body, layers=args.layers)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"model": name, "next": tokenizer.decode([predicted]), "layers": layers}, args.out)
    shape = layers[0]
    print(
        f"{name}: {len(layers)} layers, {shape['keys'].shape[0]} tokens, "
        f"q {tuple(shape['q'].shape)}, keys {tuple(shape['keys'].shape)}"
    )
    print(f"pass key {PASS_KEY}: the model goes on with {tokenizer.decode([predicted])!r}")
    print(f"wrote {args.out} ({args.out.stat().st_size / 1e6:.0f} MB)")


def main(args: argparse.Namespace) -> int:
    """Record a trace; returns a process exit status, 1 with a message on bad input."""
    try:
        _record(args)
    except (TwilightError, EmbeddedModelError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0
