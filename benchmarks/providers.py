"""Who computes a workload: jax_flash and its rivals, each behind the same two functions.

A provider is a function of (q, k, v), on JAX arrays or torch tensors. `prepare` makes from it the
timed calls, one a direction: forward; backward alone, from stored residuals; both. What a provider
cannot do raises Unsupported with the reason, which the run prints.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable

import jax
import jax.numpy as jnp

from benchmarks.workloads import Workload

DIRECTIONS = ("forward", "backward", "forward_backward")


class Unsupported(Exception):
    """This provider has no such option, or is not on this machine."""


@functools.partial(jax.jit, static_argnums=(1, 2))
def _draw(key, shape, dtype):
    return jax.random.normal(key, shape).astype(dtype)


def arrays(workload: Workload) -> tuple[jax.Array, ...]:
    """Random q, k, v and dO, normal, in the workload's shapes (varlen: without a batch axis)."""
    lead = () if workload.lengths is not None else (workload.batch,)
    query = (*lead, workload.seq, workload.heads, workload.head_dim)
    key = (*lead, workload.seq, workload.num_kv_heads, workload.head_dim)

    keys = jax.random.split(jax.random.key(workload.seq + workload.head_dim), 4)
    shapes = (query, key, key, query)
    return tuple(_draw(k, shape, workload.dtype) for k, shape in zip(keys, shapes, strict=True))


# ---- JAX


def jax_flash_call(workload: Workload, implementation: str | None) -> Callable:
    """The jax_flash call that the workload describes, as a function of (q, k, v)."""
    import jax_flash

    options = dict(is_causal=workload.is_causal, implementation=implementation)
    if workload.deterministic:
        options["deterministic"] = True
    if workload.window is not None:
        options["local_window_size"] = workload.window
    if workload.dropout_rate:
        options |= dict(dropout_rate=workload.dropout_rate, dropout_key=jax.random.key(0))
    if workload.lengths is not None:
        cu_seqlens = jnp.asarray(workload.cu_seqlens())
        return lambda q, k, v: jax_flash.varlen_attention(q, k, v, cu_seqlens, **options)
    if workload.block_density is not None:
        block_mask = jnp.asarray(workload.block_mask())
        return lambda q, k, v: jax_flash.blocksparse_attention(
            q, k, v, block_mask, block_size=workload.block_size, **options
        )
    return lambda q, k, v: jax_flash.attention(q, k, v, **options)


def jax_nn_call(workload: Workload, implementation: str) -> Callable:
    if workload.lengths is not None or workload.block_density is not None or workload.dropout_rate:
        raise Unsupported("jax.nn.dot_product_attention has no varlen, block mask or dropout")
    if workload.deterministic:
        raise Unsupported("a choice of jax_flash alone")
    square_bytes = 4 * workload.batch * workload.heads * workload.seq**2
    if implementation == "xla" and square_bytes > 16 << 30:
        raise Unsupported(f"its probabilities alone would take {square_bytes >> 30} GiB")
    return lambda q, k, v: jax.nn.dot_product_attention(
        q,
        k,
        v,
        is_causal=workload.is_causal,
        local_window_size=workload.window,
        implementation=implementation,
    )


def prepare_jax(call: Callable, primals, dout, constants=(), compiled=None) -> dict[str, Callable]:
    """Direction -> a jitted call without arguments, compiled now.

    Args:
      call: of (*primals, *constants); differentiated by the primals.
      dout: the cotangent of what it returns.
      compiled: (function, arguments) -> the call without arguments; None: jax.jit's.
    """
    compiled = compiled or compiled_with

    def pullback(primals, constants):
        return jax.vjp(lambda *x: call(*x, *constants), *primals)

    def both(primals, constants, dout):
        out, vjp = pullback(primals, constants)
        return out, *vjp(dout)

    def backward():
        # The residuals are made once and are arguments of the timed function.
        _, vjp = jax.block_until_ready(jax.jit(pullback)(primals, constants))
        return compiled(lambda vjp, dout: vjp(dout), vjp, dout)

    return {
        "forward": lambda: compiled(call, *primals, *constants),
        "backward": backward,
        "forward_backward": lambda: compiled(both, primals, constants, dout),
    }


def compiled_with(function, *args) -> Callable:
    """`function` jitted for these arguments, as a function of none."""
    executable = jax.jit(function).lower(*args).compile()
    return lambda: executable(*args)


# ---- torch


def torch_call(workload: Workload, backend: str) -> Callable:
    import torch
    from torch.nn import functional
    from torch.nn.attention import SDPBackend, sdpa_kernel

    on_gpu = jax.default_backend() == "gpu"
    if on_gpu and not torch.cuda.is_available():
        raise Unsupported("this torch has no CUDA")
    if workload.deterministic:
        raise Unsupported("a choice of jax_flash alone")
    if workload.block_density is not None:
        raise Unsupported("scaled_dot_product_attention has no block mask")
    if not on_gpu and (backend != "FLASH_ATTENTION" or workload.dropout_rate):
        raise Unsupported("torch's CPU kernel is flash attention without dropout")

    if workload.lengths is not None or workload.window is not None:
        if backend != "FLASH_ATTENTION" or not on_gpu:
            raise Unsupported("only torch's CUDA flash kernel takes varlen and windows")
        ends = torch.tensor(workload.cu_seqlens(), device="cuda") if workload.lengths else None
        longest = max(workload.lengths) if workload.lengths else workload.seq
        left, right = workload.window or (-1, -1)
        return lambda q, k, v: torch.ops.aten._flash_attention_forward(
            q,
            k,
            v,
            ends,
            ends,
            longest,
            longest,
            workload.dropout_rate,
            workload.is_causal,
            False,
            window_size_left=left,
            window_size_right=right,
        )[0]

    def call(q, k, v):
        with sdpa_kernel(getattr(SDPBackend, backend)):
            out = functional.scaled_dot_product_attention(
                *(x.transpose(1, 2) for x in (q, k, v)),
                dropout_p=workload.dropout_rate,
                is_causal=workload.is_causal,
                enable_gqa=workload.kv_heads is not None,
            )
        return out.transpose(1, 2)

    return call


def prepare_torch(call: Callable, primals, dout, constants=()) -> dict[str, Callable]:
    """As `prepare_jax`, on the very same random data, shared and not copied."""
    import torch

    primals, dout, constants = jax.tree.map(torch.from_dlpack, (primals, dout, constants))
    leaves = [x.detach().requires_grad_() for x in primals]  # of autograd's graph

    def forward():
        def run():
            with torch.no_grad():
                return call(*primals, *constants)

        return run

    def backward():
        out = call(*leaves, *constants)
        return lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)

    def both():
        def run():
            out = call(*leaves, *constants)
            return out, *torch.autograd.grad(out, leaves, dout)

        return run

    return {"forward": forward, "backward": backward, "forward_backward": both}


def library_version(module: str) -> str:
    import importlib

    return f"{module} {importlib.import_module(module).__version__}"


# name -> (library, makes the call)
PROVIDERS: dict[str, tuple[str, Callable[[Workload], Callable]]] = {
    "jax_flash": ("jax", lambda workload: jax_flash_call(workload, None)),
    "jax_flash_sm80": ("jax", lambda workload: jax_flash_call(workload, None)),
    "jax_flash_xla": ("jax", lambda workload: jax_flash_call(workload, "xla")),
    "jax_nn_xla": ("jax", lambda workload: jax_nn_call(workload, "xla")),
    "jax_nn_cudnn": ("jax", lambda workload: jax_nn_call(workload, "cudnn")),
    "torch_flash": ("torch", lambda workload: torch_call(workload, "FLASH_ATTENTION")),
    "torch_cudnn": ("torch", lambda workload: torch_call(workload, "CUDNN_ATTENTION")),
}
GPU_ONLY = {"jax_flash_sm80", "jax_nn_cudnn", "torch_cudnn"}
# What a provider needs in the environment while it compiles and until it has run: the variable is
# read at every launch, by whichever thread launches.
ENVIRONMENT = {"jax_flash_sm80": {"JAX_FLASH_CUDA_KERNELS": "sm_80"}}


@contextlib.contextmanager
def environment(provider: str):
    """Everything of `provider` is to be built and run inside, up to the last synchronisation."""
    wanted = ENVIRONMENT.get(provider, {})
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def built_alone(provider: str) -> bool:
    """Whether a switch of the whole process forbids to build it beside others."""
    return provider in ENVIRONMENT or PROVIDERS[provider][0] == "torch"


def prepare(provider: str, workload: Workload, data) -> dict[str, Callable]:
    """Direction -> a function that builds (compiles) the timed call.

    Raises:
      Unsupported: with the reason.
    """
    library, make = PROVIDERS[provider]
    if provider in GPU_ONLY and jax.default_backend() != "gpu":
        raise Unsupported("needs an NVIDIA GPU")
    try:
        call = make(workload)
    except ImportError as error:
        raise Unsupported(str(error)) from error
    *primals, dout = data
    return (prepare_jax if library == "jax" else prepare_torch)(call, primals, dout)


def synchronise(result) -> None:
    """Waits for a call's result: JAX's arrays, or torch's tensors."""
    if any(isinstance(x, jax.Array) for x in jax.tree.leaves(result)):
        jax.block_until_ready(result)
    elif jax.default_backend() == "gpu":
        import torch

        torch.cuda.synchronize()


def version(provider: str) -> str:
    return library_version(PROVIDERS[provider][0])
