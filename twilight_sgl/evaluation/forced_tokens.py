"""Teacher forcing on SGLang: a server decodes the tokens it is given, and says how likely each was.

A server that was started with `--enable-custom-logit-processor` imports this for a request.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from sglang.srt.sampling.custom_logit_processor import CustomLogitProcessor

FORCED = "forced_tokens"  # of a request's custom_params: ids, one a step
# The sampler reads log-probabilities off what we leave of the logits: 0 at the forced token, which
# makes it the greedy choice, and the one that counts, less this, at another token. e^-50 is lost in
# float32, so both stay what they are.
OFFSET = 50.0
_STEP = "forced_step"


class ForcedTokens(CustomLogitProcessor):
    """Leaves of each step's logits the forced token, and its log-probability at another one.

    The n-th step of a request forces the n-th token. Steps are counted in the request's own
    parameters, which SGLang carries from batch to batch: under overlap scheduling the tokens that
    a request holds are one step behind.
    """

    def __call__(
        self,
        logits: torch.Tensor,
        custom_param_list: Sequence[Mapping[str, Any] | None] | None = None,
    ) -> torch.Tensor:
        """Rewrite `logits` float32 [B, vocabulary] in place; one set of parameters a row."""
        given = custom_param_list or ()
        if len(given) != len(logits):  # several tokens of a request at once cannot be forced
            return logits
        rows, forced = [], []
        for row, params in enumerate(given):
            token = None if params is None else _next_token(params)
            if token is not None:
                rows.append(row)
                forced.append(token)
        if not rows:
            return logits
        places = torch.tensor(rows, device=logits.device)
        tokens = torch.tensor(forced, device=logits.device)
        likely = torch.log_softmax(logits[places].float(), dim=-1)
        likely = likely.gather(1, tokens[:, None]).squeeze(1)
        logits[places] = -torch.inf
        logits[places, tokens] = 0.0
        logits[places, (tokens == 0).long()] = (likely - OFFSET).to(logits.dtype)
        return logits


def _next_token(params: Any) -> int | None:
    """The token of this step, which then is over; None where nothing is to be forced."""
    tokens, step = params.get(FORCED) or (), params.get(_STEP, 0)
    if step >= len(tokens):  # overlap scheduling runs a step more than was asked for
        return None
    request = params["__req__"]
    if len(request.get_fill_ids()) < len(request.origin_input_ids):
        return None  # a chunk of the prompt, whose token is thrown away
    params[_STEP] = step + 1
    return int(tokens[step])
