"""What every pipeline does to a row first: cache its new token, or give it an output of zeros."""

import torch
import triton
import triton.language as tl

# A step's new keys [B, HK, D] and values [B, HK, DV], in the cache's dtype, a row's heads one
# behind the other.
Token = tuple[torch.Tensor, torch.Tensor]


@triton.jit
def write_token(
    new_key_ptr,
    new_value_ptr,
    keys_head_ptr,
    values_head_ptr,
    row_page_ids_ptr,
    length,
    KEY_STRIDE: tl.constexpr,
    VALUE_STRIDE: tl.constexpr,
    PS: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    DV: tl.constexpr,
    DV_PAD: tl.constexpr,
):
    """Write a KV head's [D] key and [DV] value of the newest token into the cache.

    Args:
        new_key_ptr, new_value_ptr: of this head.
        keys_head_ptr, values_head_ptr: the KV head's cache by slot.
        length: tokens of the row, at least 1; the newest is the last.
    """
    newest = length - 1
    page = tl.load(row_page_ids_ptr + newest // PS).to(tl.int64)
    slot = page * PS + newest % PS
    channel = tl.arange(0, D_PAD)
    key = tl.load(new_key_ptr + channel, channel < D)
    tl.store(keys_head_ptr + slot * KEY_STRIDE + channel, key, channel < D)
    value_channel = tl.arange(0, DV_PAD)
    value = tl.load(new_value_ptr + value_channel, value_channel < DV)
    tl.store(values_head_ptr + slot * VALUE_STRIDE + value_channel, value, value_channel < DV)


@triton.jit
def zero_group(
    out_ptr,
    stride_head,
    G: tl.constexpr,
    G_PAD: tl.constexpr,
    DV: tl.constexpr,
    DV_PAD: tl.constexpr,
):
    """Zero the outputs [G, DV] of one KV head's group."""
    head = tl.arange(0, G_PAD)
    channel = tl.arange(0, DV_PAD)
    zeros = tl.zeros([G_PAD, DV_PAD], out_ptr.dtype.element_ty)
    inside = (head[:, None] < G) & (channel[None, :] < DV)
    tl.store(out_ptr + head[:, None] * stride_head + channel[None, :], zeros, inside)


def token_strides(token: Token | None) -> tuple[int, int]:
    """Elements between rows of new keys and of new values."""
    return (0, 0) if token is None else (token[0].stride(0), token[1].stride(0))
