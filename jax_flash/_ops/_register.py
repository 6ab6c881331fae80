"""Finds the compiled modules and registers their handlers with XLA, once."""

from __future__ import annotations

import functools
import importlib

import jax

_XLA_PLATFORM = {"cpu": "cpu", "cuda": "CUDA"}


@functools.cache
def missing(platform: str) -> str | None:
    """Registers every handler of `_cpu` or `_cuda`; says why it is not there, or None."""
    try:
        module = importlib.import_module(f"jax_flash._{platform}")
    except ImportError as error:
        return f"jax_flash is installed without its {platform} kernels ({error})"
    for name, capsule in module.registrations().items():
        jax.ffi.register_ffi_target(name, capsule, platform=_XLA_PLATFORM[platform], api_version=1)
    return None


def refusal(platform: str, dtype) -> str | None:
    """Why the kernels of `platform` do not serve elements of this type, or None."""
    if (reason := missing(platform)) is not None:
        return reason
    if dtype.name not in ("float32", "float16", "bfloat16"):
        return f"{dtype} (kernels: float32, float16, bfloat16)"
    return None


def register_all() -> None:
    """For programs that come ready-made (`jax.export`), before any call of ours is traced."""
    for platform in _XLA_PLATFORM:
        missing(platform)


def targets() -> list[str]:
    """Names of the custom calls that the installed modules provide."""
    names: set[str] = set()
    for platform in _XLA_PLATFORM:
        if missing(platform) is None:
            names |= importlib.import_module(f"jax_flash._{platform}").registrations().keys()
    return sorted(names)
