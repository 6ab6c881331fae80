"""Attention over concatenated sequences: the dense definition with a block-diagonal mask."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_flash
from jax_flash.reference import attention as reference
from tests.helpers import IMPLEMENTATIONS, KEY, check_call, device, mask_options, random

# Lengths that straddle tiles, empty sequences, rows before the first and after the last sequence.
PACKS = {
    "ragged": ([0, 1, 131, 131, 200, 333], [0, 70, 71, 150, 290, 291], 333, 291),
    "spare": ([3, 60, 60, 190], [5, 140, 141, 180], 233, 207),
    "one": ([0, 150], [0, 97], 150, 97),
    "many_short": (list(range(0, 260, 5)), list(range(0, 312, 6)), 255, 306),
    "garbage": ([-5, 90, 40, 400, 100], [20, 10, 170, 170, 9999], 150, 180),
}
OPTIONS = {
    "none": {},
    "causal": dict(is_causal=True),
    "bottom_right": dict(is_causal=True, causal_offset="bottom_right"),
    "window": dict(local_window_size=(20, 9)),
    "dropout": dict(dropout_rate=0.3, is_causal=True),
}


def block_diagonal(cu_q, cu_k, total_q, total_k, heads, options):
    """(ok, keep): each sequence's own [1, N, T_s, S_s] put on the diagonal of [1, N, T, S]."""
    rate = options.get("dropout_rate", 0.0)
    ok = np.zeros((1, heads, total_q, total_k), bool)
    keep = np.zeros_like(ok) if rate else None
    rows = reference.sequences(cu_q, total_q)
    cols = reference.sequences(cu_k, total_k)
    for s, ((top, bottom), (left, right)) in enumerate(zip(rows, cols, strict=True)):
        part = (1, heads, bottom - top, right - left)
        block = np.s_[:, :, top:bottom, left:right]
        ok[block] = reference.allowed(*part, **mask_options(options))
        if rate:
            keep[block] = reference.dropout_keep(rate, np.asarray(KEY), *part, first_batch=s)
    return ok, keep


def call_varlen(implementation, options, packing, cu_q, cu_k, q, k, v):
    options = dict(options, return_lse=True, implementation=implementation)
    if options.get("dropout_rate"):
        options["dropout_key"] = jax.random.wrap_key_data(KEY)
    q, k, v = (x[0] for x in (q, k, v))
    # Through jit, so that wrong values are the kernel's affair and not Python's.
    if packing == "qkv":
        packed = jnp.stack([q, k, v], -3)
        out = jax_flash.varlen_attention_qkvpacked(packed, cu_q, **options)
    elif packing == "kv":
        packed = jnp.stack([k, v], -3)
        out = jax_flash.varlen_attention_kvpacked(q, packed, cu_q, cu_k, **options)
    else:
        out = jax_flash.varlen_attention(q, k, v, cu_q, cu_k, **options)
    return jax.tree.map(lambda x: x[None], out)


def check(implementation, dtype, pack, options, packing="separate", heads=4, kv_heads=2):
    cu_q, cu_k, total_q, total_k = PACKS[pack]
    if packing == "qkv":
        cu_k, total_k = cu_q, total_q
    cu = [jnp.asarray(c, jnp.int32) for c in (cu_q, cu_k)]
    tensors = random(
        0,
        dtype,
        (1, total_q, heads, 32),
        (1, total_k, kv_heads, 32),
        (1, total_k, kv_heads, 32),
    )
    ok, keep = block_diagonal(cu_q, cu_k, total_q, total_k, heads, options)

    def call(q, k, v, cu=None):
        return call_varlen(implementation, options, packing, *cu, q, k, v)

    # A fresh tracer for cu_seqlens: `check_call` jits `call`, so its closure must be traced data.
    def traced(q, k, v):
        hidden = jax.lax.optimization_barrier(tuple(cu))
        return call(q, k, v, hidden)

    return check_call(
        implementation,
        traced,
        tensors,
        ok=ok,
        keep=keep,
        scale=32**-0.5,
        rate=options.get("dropout_rate", 0.0),
    )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("pack", PACKS)
@pytest.mark.parametrize("option", OPTIONS)
def test_varlen(implementation, dtype, pack, option):
    if implementation == "xla" and dtype == "bfloat16" and option != "dropout":
        pytest.skip("the XLA form is the same for all types")
    check(implementation, dtype, pack, OPTIONS[option])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("packing,kv_heads", [("qkv", 4), ("kv", 2)])
def test_packed(implementation, packing, kv_heads):
    check(implementation, "bfloat16", "ragged", OPTIONS["dropout"], packing, kv_heads=kv_heads)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_equal_lengths_are_a_batch(implementation):
    """The same numbers as the padded call, and the same bits of dropout."""
    q, k, v = random(2, "float32", (3, 64, 4, 16), (3, 96, 2, 16), (3, 96, 2, 16))
    options = dict(
        is_causal=True,
        causal_offset="bottom_right",
        dropout_rate=0.4,
        dropout_key=jax.random.wrap_key_data(KEY),
        return_lse=True,
        implementation=implementation,
    )
    with jax.default_device(device(implementation)):
        q, k, v = map(jnp.asarray, (q, k, v))
        dense, dense_lse = jax_flash.attention(q, k, v, **options)
        cu_q, cu_k = (jnp.arange(4, dtype=jnp.int32) * n for n in (64, 96))
        flat = [x.reshape(-1, *x.shape[2:]) for x in (q, k, v)]
        out, lse = jax_flash.varlen_attention(*flat, cu_q, cu_k, **options)
    np.testing.assert_allclose(out.reshape(dense.shape), dense, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(lse.reshape(4, 3, 64), np.moveaxis(dense_lse, 0, 1), rtol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_deterministic(implementation):
    cu = jnp.asarray([0, 100, 130, 300], jnp.int32)
    q, k, v = random(3, "bfloat16", (300, 4, 64), (300, 2, 64), (300, 2, 64))
    attend = functools.partial(
        jax_flash.varlen_attention,
        cu_seqlens_q=cu,
        deterministic=True,
        implementation=implementation,
    )
    grad = jax.jit(jax.grad(lambda *a: (attend(*a).astype(jnp.float32) ** 2).sum(), (0, 1, 2)))
    with jax.default_device(device(implementation)):
        first = grad(*map(jnp.asarray, (q, k, v)))
        second = grad(*map(jnp.asarray, (q, k, v)))
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))
