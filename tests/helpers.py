"""One call in three ways: ours, the float64 definition, plain XLA of the same type.

How far ours may be off is told by rule.py.
"""

import contextlib
import dataclasses
import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_flash
from jax_flash.reference import attention as reference
from tests import rule

IMPLEMENTATIONS = ["xla", "cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
KEY = jax.random.key_data(jax.random.key(20261120))


def device(implementation: str) -> jax.Device:
    """Where a call by this implementation runs."""
    return jax.devices()[0] if implementation == "xla" else jax.devices(implementation)[0]


@dataclasses.dataclass(frozen=True)
class Shape:
    """Every size differs from the others and from a tile's, so that no transpose can hide."""

    batch: int = 2
    seq_q: int = 197
    seq_k: int = 261
    heads: int = 6
    kv_heads: int = 3
    head_dim: int = 40
    value_dim: int | None = None

    @property
    def query(self):
        return (self.batch, self.seq_q, self.heads, self.head_dim)

    @property
    def key(self):
        return (self.batch, self.seq_k, self.kv_heads, self.head_dim)

    @property
    def value(self):
        return (self.batch, self.seq_k, self.kv_heads, self.value_dim or self.head_dim)

    @property
    def out(self):
        return (self.batch, self.seq_q, self.heads, self.value_dim or self.head_dim)


def plain_device():
    """Where the plain form runs: beside ours, but on the CPU under compute-sanitizer (run_gpu.py).

    It is there for our kernels; in a process with matmuls of other libraries it crashes.
    """
    on_cpu = os.environ.get("JAX_FLASH_TESTS_PLAIN_ON_CPU")
    return jax.default_device(jax.devices("cpu")[0]) if on_cpu else contextlib.nullcontext()


def random(seed: int, dtype, *shapes) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape).astype(jnp.dtype(dtype)) for shape in shapes]


def with_gradients(attend, tensors, cotangents):
    """((out, lse), (dq, dk, dv)), to be compiled as one program."""
    results, pull = jax.vjp(attend, *tensors)
    return results, pull(cotangents)


@functools.partial(jax.jit, static_argnames=("scale", "rate"))
def plain_attention(tensors, cotangents, ok, keep, *, scale, rate):
    """What one writes in jnp, in the operands' type, and its gradients; O(T * S) memory."""

    def attend(query, key, value):
        group = query.shape[-2] // key.shape[-2]
        key, value = jnp.repeat(key, group, -2), jnp.repeat(value, group, -2)
        s = jnp.einsum("btnh,bsnh->bnts", query, key, preferred_element_type=jnp.float32)
        s = jnp.where(ok, s * scale, -1e30)
        lse = jax.nn.logsumexp(s, axis=-1)
        probs = jnp.exp(s - lse[..., None]) * ok
        if keep is not None:
            probs = probs * keep * reference.keep_scale(rate)
        return jnp.einsum("bnts,bsnh->btnh", probs.astype(value.dtype), value), lse

    return with_gradients(attend, tensors, cotangents)


def error_ratio(ours, exact: np.ndarray, plain, inherent: float = 0.0) -> tuple[float, str]:
    """The rule (rule.py) on one array: its error over what is allowed it (NaN: infinite), and
    that in words. `ours` gives the type, `inherent` comes on top of what is allowed."""
    unit = float(jnp.finfo(ours.dtype).eps)
    ours, plain = (np.asarray(x, np.float64) for x in (ours, plain))
    assert ours.shape == exact.shape, f"shape {ours.shape}, expected {exact.shape}"
    error = np.nan_to_num(np.abs(ours - exact), nan=np.inf)
    bound = rule.allowed(unit, np.abs(plain - exact).max(), np.abs(exact).max(), inherent)
    at = tuple(map(int, np.unravel_index(error.argmax(), error.shape)))
    ratio = error[at] / bound if error[at] > 0 else 0.0
    return float(ratio), f"off by {error[at]:.3g} at {at}, allowed {bound:.3g}"


def assert_close(name: str, ours, exact: np.ndarray, plain, inherent: float = 0.0) -> None:
    ratio, text = error_ratio(ours, exact, plain, inherent)
    assert ratio <= 1, f"{name}: {text}"


def assert_lse(ours, exact) -> None:
    ours = np.asarray(ours, np.float64)
    empty = exact == -np.inf
    assert (ours[empty] == -np.inf).all(), "lse of rows without keys"
    np.testing.assert_allclose(ours[~empty], exact[~empty], rtol=rule.LSE, atol=rule.LSE)


def mask_options(options: dict) -> dict:
    """The options that decide which pairs exist, for `reference.allowed`."""
    names = (
        "is_causal",
        "causal_offset",
        "query_seq_lengths",
        "key_value_seq_lengths",
        "local_window_size",
        "block_mask",
        "block_size",
    )
    return {name: options[name] for name in names if name in options}


def check_attention(
    implementation: str, dtype, shape: Shape, options: dict, *, seed=0, packing="separate"
):
    """Output, lse and all gradients of one padded call against the definition.

    Args:
      options: of `jax_flash.attention`, numpy arrays for what is an array.
      packing: "separate", "kv" or "qkv".
    """
    tensors = random(seed, dtype, shape.query, shape.key, shape.value)
    scores = (shape.batch, shape.heads, shape.seq_q, shape.seq_k)
    rate = options.get("dropout_rate", 0.0)
    return check_call(
        implementation,
        functools.partial(attend_packed, packing, implementation, options),
        tensors,
        ok=reference.allowed(*scores, **mask_options(options)),
        keep=reference.dropout_keep(rate, np.asarray(KEY), *scores) if rate else None,
        scale=options.get("scale", shape.head_dim**-0.5),
        rate=rate,
        seed=seed + 1,
    )


def check_call(
    implementation, call, tensors, *, ok, keep=None, scale, rate=0.0, seed=1, dout_scale=1.0
):
    """(out, lse) = call(q, k, v) and its gradients against the definition, for the pairs `ok`.

    Args:
      tensors: numpy q [B, T, N, H], k [B, S, K, H], v [B, S, K, Hv].
      ok, keep: bool [B, N, T, S].
      dout_scale: of the cotangents, whose elements are else of standard deviation 1.

    Returns:
      (out, lse, (dq, dk, dv)) of `call`.
    """
    q, k, v = tensors
    dout = random(seed, q.dtype, (*q.shape[:-1], v.shape[-1]))[0]
    dout = (dout * dout_scale).astype(q.dtype)
    formula = dict(scale=scale, keep=keep, rate=rate)
    exact = reference.forward(q, k, v, ok, **formula)
    dlse = random(seed + 1, np.float32, exact.lse.shape)[0]
    dlse = dlse * np.float32(dout_scale)
    dlse = np.where(np.isfinite(exact.lse), dlse, 0)  # an empty row's lse has no derivative
    exact_grads = reference.backward(q, k, v, ok, dout, dlse, **formula)

    with jax.default_device(device(implementation)):
        arrays = (q, k, v), (dout, dlse)
        with plain_device():
            (plain_out, _), plain_grads = plain_attention(*arrays, ok, keep, scale=scale, rate=rate)
        (out, lse), grads = jax.jit(functools.partial(with_gradients, call))(*arrays)

    assert_lse(lse, exact.lse)
    assert_close("out", out, exact.out, plain_out)
    inherent = (*rounding_of_delta(q, k, dout, exact, scale), 0.0)
    for name, *arrays in zip(
        ("dq", "dk", "dv"), grads, exact_grads, plain_grads, inherent, strict=True
    ):
        assert_close(name, *arrays)
    unseen = np.moveaxis(~ok.any(-1), 1, 2)
    assert not np.asarray(out, np.float64)[unseen].any(), "rows without keys give 0"
    return out, lse, grads


def rounding_of_delta(q, k, dout, exact, scale) -> tuple[float, float]:
    """How far dq and dk move when O, kept in the operands' type, gives delta = rowsum(dO * O).

    Every flash backward has this error, and plain attention, whose softmax keeps P, has not. It is
    seen where dS = P * (dP - delta) cancels: with one key, above all.
    """
    half_unit = float(jnp.finfo(q.dtype).eps) / 2
    delta = np.abs(dout.astype(np.float64) * exact.out).sum(-1)  # [B, T, N]
    delta = half_unit * scale * np.moveaxis(delta, 2, 1)[..., None]  # [B, N, T, 1]
    keys = np.repeat(np.moveaxis(k, 2, 1), q.shape[2] // k.shape[2], 1).astype(np.float64)
    queries = np.moveaxis(q, 2, 1).astype(np.float64)
    dq = np.abs(delta * (exact.probs @ keys))
    dk = np.sqrt(((exact.probs * delta) ** 2).swapaxes(-1, -2) @ queries**2)
    return abs(dq.max()), dk.max()


def attend_packed(packing: str, implementation: str, options: dict, q, k, v):
    """(out, lse) of the call that takes its operands packed so."""
    options = dict(options, return_lse=True, implementation=implementation)
    if options.get("dropout_rate"):
        options["dropout_key"] = jax.random.wrap_key_data(KEY)
    if packing == "qkv":
        return jax_flash.attention_qkvpacked(jnp.stack([q, k, v], -3), **options)
    if packing == "kv":
        return jax_flash.attention_kvpacked(q, jnp.stack([k, v], -3), **options)
    return jax_flash.attention(q, k, v, **options)
