"""Count the decode rows that SGLang runs inside a prefill step, where attention is dense."""

from typing import Any

from twilight_sgl.patches import Patch
from twilight_sgl.patches.compat import decodes_as_extend
from twilight_sgl.request import RequestOptions

BATCH = "sglang.srt.managers.schedule_batch.ScheduleBatch"


def _count_rows(result: Any, batch: Any, running_batch: Any = None) -> None:
    """The rows of running_batch are the last of batch; without it, all of batch decode."""
    runtime = getattr(batch.req_to_token_pool, "twilight", None)
    reqs = (batch if running_batch is None else running_batch).reqs
    if runtime is None or not reqs:
        return
    options = (RequestOptions.from_custom_params(r.sampling_params.custom_params) for r in reqs)
    context_tokens = (prefix + 1 for prefix in batch.prefix_lens[-len(reqs) :])
    runtime.on_dense_step(context_tokens, options)


WHY = "the prefill backend serves these rows, so no budget of ours counts them"

PATCHES = [  # for --enable-mixed-chunk
    Patch(f"{BATCH}.mix_with_running", "after", _count_rows, WHY, ("self", "running_batch"))
]
if decodes_as_extend():  # beside a rank that prefills, with data-parallel attention
    PATCHES.append(Patch(f"{BATCH}.convert_decode_to_extend", "after", _count_rows, WHY, ("self",)))
