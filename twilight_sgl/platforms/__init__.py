"""SGLang on a machine without a GPU, in plain PyTorch."""

import os


def activate() -> str | None:
    """SGLang's platform entry point: the platform's class, or None where it is not for us.

    Any accelerator, and SGLang's own CPU engine (`SGLANG_USE_CPU_ENGINE=1`), come first.
    """
    import torch

    if os.environ.get("SGLANG_USE_CPU_ENGINE", "0") == "1":
        return None
    if torch.cuda.is_available() or torch.xpu.is_available() or torch.backends.mps.is_available():
        return None
    return "twilight_sgl.platforms.cpu.TorchCpuPlatform"
