"""Which kernels are installed, what they need, and how to export programs that use them."""

from __future__ import annotations

import jax

from jax_flash._ops import _register


def show_backends() -> None:
    """Prints, a line an implementation, whether it can run here and why not.

    "cuda" needs the module `_cuda` and a GPU of compute capability 8.0 or more, "cpu" the module
    `_cpu`; "xla" runs everywhere.
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
        print(f"  {name:5} {'yes' if reason is None else f'no: {reason}'}")
    print("  xla   yes: compiled from jnp on any platform, O(T) memory")


def export_checks() -> list[jax.export.DisabledSafetyCheck]:
    """The `disabled_checks` that let `jax.export.export` serialise programs with our custom calls.

    The process that loads such a program must `import jax_flash` first.
    """
    return [jax.export.DisabledSafetyCheck.custom_call(name) for name in _register.targets()]
