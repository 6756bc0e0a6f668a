"""What benchmarks read of a model's folder."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from twilight_sgl.errors import TwilightError


def load_model_files(path: str, extra: Sequence[str]) -> tuple[Any, Any, int]:
    """Tokenizer, configuration and context length of a model.

    Args:
        extra: flags of its server, of which --context-length counts.
    Raises:
        TwilightError: they cannot be read.
    """
    from transformers import AutoConfig, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise TwilightError(f"--model-path {path} cannot be read: {error}") from error
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--context-length", type=int)
    given = parser.parse_known_args(list(extra))[0].context_length
    context = given or config.get_text_config().max_position_embeddings
    return tokenizer, config, context


def weight_bytes(folder: Path) -> int:
    """Bytes of the safetensors in a folder; 0 for weights of other kinds or elsewhere."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def attention_shape(config: Any) -> tuple[int, int, int]:
    """Layers, KV heads and dimensions of a head, by a model's transformers configuration."""
    text = config.get_text_config()
    heads = text.num_attention_heads
    return (
        text.num_hidden_layers,
        getattr(text, "num_key_value_heads", None) or heads,
        getattr(text, "head_dim", None) or text.hidden_size // heads,
    )
