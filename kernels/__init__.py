"""Operators of the decode pipeline, one folder each.

Every folder holds `reference.py`, plain PyTorch in float32 and the oracle of its operator, and
where a GPU implementation exists `triton.py`. Kernels know tensors, not SGLang.

Symbols used throughout: `B` requests, `N` context tokens, `HQ` query heads, `HK` KV heads,
`G = HQ // HK`, `D` head dim, `PS` page size in tokens, `P` pages in the pool, `L` layers,
`T` logical pages of the longest request in a batch, `C` candidate pages.
"""
