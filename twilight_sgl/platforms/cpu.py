"""A CPU platform for SGLang that needs no compiled kernels."""

import os
import shutil
from typing import Any

from sglang.srt.platforms import interface
from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum

from twilight_sgl.errors import TwilightError

ATTENTION_BACKEND = "torch_native"
MAX_TOTAL_TOKENS = 65536


class TorchCpuPlatform(CpuDeviceMixin, interface.SRTPlatform):
    """Plain PyTorch on the CPU: native forwards, no Triton, no graphs."""

    _enum = PlatformEnum.OOT
    device_name = "cpu"
    device_type = "cpu"

    def apply_server_args_defaults(self, server_args: Any) -> None:
        """Settle what SGLang would choose badly for a plain CPU.

        Its attention default needs compiled kernels; its KV cache would take nearly all of the
        machine's memory; its idle loop would spin on a core; and bfloat16 products are many
        times slower than float32 ones on processors without bfloat16 units. Its grammars need a
        GPU: the first constrained request would end the server.

        Raises:
            TwilightError: such grammars are asked for.
        """
        if server_args.attention_backend in (None, "intel_amx"):
            server_args.attention_backend = ATTENTION_BACKEND
        if server_args.max_total_tokens is None:
            server_args.max_total_tokens = MAX_TOTAL_TOKENS
        if server_args.dtype == "auto":
            server_args.dtype = "float32"
        if server_args.grammar_backend == "xgrammar":
            raise TwilightError(
                "--grammar-backend xgrammar needs a GPU in this SGLang: leave it out, or pass "
                "llguidance"
            )
        if server_args.grammar_backend is None:
            # llguidance masks logits in what PyTorch compiles with a C++ compiler; `none` refuses
            # constrained requests.
            compiler = shutil.which(os.environ.get("CXX", "g++"))
            server_args.grammar_backend = "llguidance" if compiler else "none"
        server_args.sleep_on_idle = True

    def get_device(self, device_id: int = 0) -> str:
        """The device's name: SGLang splits it as text."""
        return "cpu"

    def get_default_attention_backend(self) -> str:
        """Attention through `scaled_dot_product_attention`."""
        return ATTENTION_BACKEND

    def get_mha_kv_pool_cls(self) -> type:
        """SGLang's own pool, which allocates on any torch device (asked for up to 0.5.17)."""
        from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

        return MHATokenToKVPool

    def get_kv_pool_cls(self, *, kind: str) -> type | None:
        """None: SGLang's own pool (asked for from 0.5.18 on)."""
        return None

    def get_paged_allocator_cls(self) -> type | None:
        """An allocator without Triton; None where SGLang's own works without."""
        if hasattr(interface, "PlatformCapabilities"):  # from 0.5.18 on
            return None
        from twilight_sgl.platforms.paged_allocator import TorchPagedAllocator

        return TorchPagedAllocator
