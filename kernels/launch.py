"""What the Triton kernels share: how work is laid over a fixed grid, and launch choices."""

import contextlib
import functools
import os
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
import triton
import triton.language as tl
from triton.runtime import driver


def is_interpreted() -> bool:
    """Whether Triton kernels run in its interpreter, on the CPU (TRITON_INTERPRET=1)."""
    return bool(triton.knobs.runtime.interpret)


@functools.cache
def _multiprocessors(device_index: int) -> int:
    return torch.cuda.get_device_properties(device_index).multi_processor_count


def grid_programs(device: torch.device, per_multiprocessor: int) -> int:
    """Programs of a grid that loops over device-counted work; small under the interpreter."""
    if is_interpreted():
        return 3
    index = device.index if device.index is not None else torch.cuda.current_device()
    return _multiprocessors(index) * per_multiprocessor


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory of one of the GPU's multiprocessors."""
    return torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor


def compute_dtype(q_dtype: torch.dtype) -> tl.dtype:
    """Dtype of the products with q: q's own, float32 under the interpreter (no bfloat16 there)."""
    if is_interpreted() or q_dtype == torch.float32:
        return tl.float32
    return tl.bfloat16 if q_dtype == torch.bfloat16 else tl.float16


@functools.cache
def _dependent_launches() -> bool:
    """Whether the GPU has programmatic dependent launches (compute capability 9)."""
    return (
        not is_interpreted()
        and torch.cuda.is_available()
        and torch.cuda.get_device_capability()[0] >= 9
    )


def launch_options(num_warps: int, max_registers: int | None = None) -> dict[str, object]:
    """Compile and launch options of a pipeline kernel.

    Where the GPU can, kernels are launched as programmatic dependents: the next one's blocks
    start while the last of this one's run, and `wait_for_inputs` holds them back. Fewer registers
    a thread than the compiler would take let more programs run at once.
    """
    options: dict[str, object] = {"num_warps": num_warps, "PDL": _dependent_launches()}
    if max_registers is not None:
        options["maxnreg"] = max_registers
    if _dependent_launches():
        options["launch_pdl"] = True
    return options


_ahead = False  # whether launches only compile


class _Compilers:
    """Compile kernels, and with each the C module that launches it, in a pool of threads.

    Triton builds that module when a kernel is first launched, in a third of a second.
    """

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self._pool = pool
        self._first: dict[Hashable, Any] = {}  # kernel of each kind of launcher

    def submit(self, compile_kernel: Callable[[], Any]) -> Future[Any]:
        """What Triton wants of a pool."""
        return self._pool.submit(self._compile, compile_kernel)

    def _compile(self, compile_kernel: Callable[[], Any]) -> Any:
        kernel = compile_kernel()
        launcher = kernel.src.fn, tuple(kernel.src.signature.values())
        if self._first.setdefault(launcher, kernel) is kernel:  # constants are not part of it
            with contextlib.suppress(Exception):
                driver.active.launcher_cls(kernel.src, kernel.metadata)
        return kernel


@contextlib.contextmanager
def compiling_ahead() -> Iterator[None]:
    """Launches inside compile their kernels, on all CPUs at a time, and launch nothing.

    One by one, as a server's graphs meet them, the variants for its batch sizes take a minute. What
    does not compile is passed over, and says why where it is launched.
    """
    global _ahead
    with (
        ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool,
        triton.AsyncCompileMode(_Compilers(pool), ignore_errors=True),
    ):
        _ahead = True
        try:
            yield
        finally:
            _ahead = False


def launch(kernel: Any, programs: int) -> Callable[..., Any]:
    """What takes a kernel's arguments to launch it, on a grid of one dimension."""
    if _ahead:
        return functools.partial(kernel.warmup, grid=(programs,))
    launcher: Callable[..., Any] = kernel[(programs,)]
    return launcher


class CompiledLaunch:
    """Launches a kernel as it was compiled when it was first launched so.

    Triton's own launch looks at every argument again, which takes the host three times as long.
    So nothing that differs from launch to launch may change how the kernel is compiled. Its hooks
    of launches, which its own profiler sets, do not see these.

    Args:
        kernel: what `triton.jit` made.
        options: of its launch.
    """

    def __init__(self, kernel: Any, **options: object) -> None:
        self._kernel = kernel
        self._options = options
        self._compiled: dict[Hashable, tuple[Any, int]] = {}  # and the device it was loaded on

    def __call__(self, programs: int, arguments: tuple[Any, ...], kind: Hashable = None) -> None:
        """Launch on the current stream.

        Args:
            programs: of a grid of one dimension.
            arguments: all of the kernel's in order, constants included.
            kind: tells launches apart that want the kernel compiled anew.
        """
        if _ahead or kind not in self._compiled:
            compiled = launch(self._kernel, programs)(*arguments, **self._options)
            if not is_interpreted() and not _ahead:
                self._compiled[kind] = compiled, torch.cuda.current_device()
            return
        compiled, device = self._compiled[kind]
        stream = torch._C._cuda_getCurrentRawStream(device)
        binary = compiled.function, compiled.packed_metadata
        compiled.run(programs, 1, 1, stream, *binary, None, None, None, *arguments)


@triton.jit
def wait_for_inputs(PDL: tl.constexpr):
    """Let the next kernel's blocks start, and wait until the kernels before have ended.

    Call it before any load or store. It orders a kernel behind all before it, because each of
    those has waited for its own predecessor.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def locate_block(item, row_blocks, row_ends, HK: tl.constexpr):
    """Map an item of flat ragged work to its row, KV head and block of the row.

    Items run over KV heads fastest, then blocks, then rows, so that programs that run together
    read neighbouring memory.

    Args:
        item: scalar, below sum(row_blocks) * HK.
        row_blocks: [BP] int32 blocks of every row; row_ends: their inclusive sums.
    """
    index = item // HK
    before = row_ends <= index
    row = tl.sum(before.to(tl.int32), 0)
    first = tl.sum(tl.where(before, row_blocks, 0), 0)
    return row, item % HK, index - first


@triton.jit
def soft_cap_logits(logits, logit_cap, HAS_CAP: tl.constexpr):
    """logit_cap * tanh(logits / logit_cap), in float32."""
    if HAS_CAP:
        x = tl.minimum(tl.maximum(logits / logit_cap, -20.0), 20.0)
        e = tl.exp(-2.0 * x)
        logits = logit_cap * (1.0 - e) / (1.0 + e)
    return logits
