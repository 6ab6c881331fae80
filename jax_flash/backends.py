"""Which kernels are installed, what they need, and how to export programs that use them."""

from __future__ import annotations

import os

import jax

from jax_flash._ops import _register


def show_backends() -> None:
    """Prints, a line an implementation, whether it can run here and why not.

    "cuda" needs the module `_cuda` and a GPU of compute capability 8.0 or more, "cpu" the module
    `_cpu`; "xla" runs everywhere. Of "cuda" it also says which kernels the GPUs use.
    """
    try:
        gpus = [d for d in jax.devices("cuda")]
    except RuntimeError:
        gpus = []
    print(f"jax_flash on jax {jax.__version__}, default platform {jax.default_backend()}")
    for name in ("cuda", "cpu"):
        reason = _register.missing(name)
        if reason is None and name == "cuda":
            old = [d for d in gpus if float(d.compute_capability) < 8.0]
            if not gpus:
                reason = "jax sees no CUDA device; programs still lower for cuda"
            elif old:
                reason = f"{old[0].device_kind} is older than compute capability 8.0"
        answer = "yes" if reason is None else f"no: {reason}"
        if reason is None and name == "cuda":
            kinds = sorted({(d.device_kind, d.compute_capability) for d in gpus})
            answer += ": " + "; ".join(f"{kind}, {_kernels(cc)}" for kind, cc in kinds)
        print(f"  {name:5} {answer}")
    print("  xla   yes: compiled from jnp on any platform, O(T) memory")


def _kernels(compute_capability: str) -> str:
    """Which kernels a GPU uses: what csrc/attention/cuda/architecture.h decides at each launch."""
    if compute_capability == "9.0":
        if os.environ.get("JAX_FLASH_CUDA_KERNELS") == "sm_80":
            return "sm_80 kernels (JAX_FLASH_CUDA_KERNELS=sm_80)"
        return "sm_90a kernels, and sm_80 kernels for what those do not serve"
    compiled = " compiled from PTX at their first use" if float(compute_capability) > 9 else ""
    return "sm_80 kernels" + compiled


def export_checks() -> list[jax.export.DisabledSafetyCheck]:
    """The `disabled_checks` that let `jax.export.export` serialise programs with our custom calls.

    The process that loads such a program must `import jax_flash` first.
    """
    return [jax.export.DisabledSafetyCheck.custom_call(name) for name in _register.targets()]
