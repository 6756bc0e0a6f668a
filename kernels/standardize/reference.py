"""Standard scores of pages, in plain PyTorch."""

import torch


def standardize_scores(
    head_scores: torch.Tensor, seq_lens: torch.Tensor, *, page_size: int, heads_kv: int
) -> torch.Tensor:
    """Scores less their mean, by their standard deviation, maximised over the heads of a group.

    Both are taken over the request's full pages and each query head by itself, so that no head
    has the say over its group because its products are large. Scores that are not finite do not
    count in them and stay as they are; where all are equal each is 0.

    Args:
        head_scores: [B, HQ, T] float32, see `head_scores`; read for full pages only.
        seq_lens: [B] tokens, the one being decoded included; 0 for no request.
        page_size: PS, tokens; heads_kv: HK.
    Returns:
        [B, HK, T] float32.
    """
    column = torch.arange(head_scores.shape[-1], device=head_scores.device)
    full = column < ((seq_lens.long() - 1).clamp(min=0) // page_size).view(-1, 1, 1)
    counted = full & head_scores.isfinite()
    count = counted.sum(-1, keepdim=True).clamp(min=1)
    mean = head_scores.where(counted, 0.0).sum(-1, keepdim=True) / count
    off = (head_scores - mean).where(counted, 0.0)
    deviation = (off.square().sum(-1, keepdim=True) / count).sqrt()
    standard = off / deviation.where(deviation > 0, 1.0)
    standard = standard.where(counted, head_scores)
    return standard.unflatten(1, (heads_kv, -1)).amax(2)
