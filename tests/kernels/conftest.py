"""Run the Triton kernels in its interpreter when there is no GPU.

Triton decides when a kernel is defined, so this is set before any test module of this folder is
imported. Other folders' tests import no Triton kernels without CUDA.
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
