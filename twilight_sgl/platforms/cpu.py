"""A CPU platform for SGLang that needs no compiled kernels."""

from typing import Any

from sglang.srt.platforms import interface
from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum

ATTENTION_BACKEND = "torch_native"


class TorchCpuPlatform(CpuDeviceMixin, interface.SRTPlatform):
    """Plain PyTorch on the CPU: native forwards, no Triton, no graphs."""

    _enum = PlatformEnum.OOT
    device_name = "cpu"
    device_type = "cpu"

    def apply_server_args_defaults(self, server_args: Any) -> None:
        """Replace SGLang's CPU default, which needs compiled kernels, and turn graphs off."""
        if server_args.attention_backend in (None, "intel_amx"):
            server_args.attention_backend = ATTENTION_BACKEND

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
