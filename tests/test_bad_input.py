"""What cannot be is refused with words that help; what only the device can know harms nobody."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_flash
from tests import programs
from tests.programs import assert_close, assert_equal, custom_calls, installed, normal, plain

implementation = programs.implementation
quick_compilation = programs.quick_compilation

B, T, S, N, K, H, HV = 2, 5, 7, 4, 2, 8, 16


def qkv(dtype=jnp.float32):
    return (
        normal(0, B, T, N, H, dtype=dtype),
        normal(1, B, S, K, H, dtype=dtype),
        normal(2, B, S, K, HV, dtype=dtype),
    )


def ones(*shape, dtype=jnp.float32):
    return jnp.ones(shape, dtype)


def changed(**arrays):
    given = dict(zip(("query", "key", "value"), qkv(), strict=True)) | arrays
    return tuple(given.values())


# Each case: arrays of the call, options, the exception, and what its text must say.
REFUSED = {
    "query_rank": (changed(query=ones(N, H)), {}, ValueError, "query: expected at least 3 axes"),
    "key_rank": (
        changed(key=ones(S, K, H)),
        {},
        ValueError,
        r"key: expected query's number of axes \(4\), got shape \(7, 2, 8\)",
    ),
    "value_rank": (changed(value=ones(B, S, K, HV, 1)), {}, ValueError, "value: expected query's"),
    "batch": (
        changed(key=ones(3, S, K, H)),
        {},
        ValueError,
        r"key: expected query's leading axes \(2,\), got shape \(3, 7, 2, 8\)",
    ),
    "value_batch": (changed(value=ones(1, S, K, HV)), {}, ValueError, "value: expected query's"),
    "head_dim": (
        changed(key=ones(B, S, K, 16)),
        {},
        ValueError,
        "key: expected query's head dim 8, got 16",
    ),
    "value_length": (
        changed(value=ones(B, S + 1, K, HV)),
        {},
        ValueError,
        r"value: expected key's length and heads \(7, 2\), got \(8, 2\)",
    ),
    "value_heads": (changed(value=ones(B, S, N, HV)), {}, ValueError, "value: expected key's"),
    "heads": (
        changed(key=ones(B, S, 3, H), value=ones(B, S, 3, HV)),
        {},
        ValueError,
        "key: expected a number of heads that divides query's 4, got 3",
    ),
    "no_kv_heads": (
        changed(key=ones(B, S, 0, H), value=ones(B, S, 0, HV)),
        {},
        ValueError,
        "divides query's 4, got 0",
    ),
    "integers": (
        changed(query=ones(B, T, N, H, dtype=jnp.int32)),
        {},
        TypeError,
        "query: expected a floating-point array, got int32",
    ),
    "complex": (
        changed(value=ones(B, S, K, HV, dtype=jnp.complex64)),
        {},
        TypeError,
        "value: expected a floating-point array, got complex64",
    ),
    "mixed_types": (
        changed(key=ones(B, S, K, H, dtype=jnp.bfloat16)),
        {},
        TypeError,
        "key: expected query's dtype float32, got bfloat16",
    ),
    "rate_without_key": (
        qkv(),
        dict(dropout_rate=0.1),
        ValueError,
        "dropout_key: expected a JAX PRNG key with dropout_rate=0.1, got None",
    ),
    "rate_one": (
        qkv(),
        dict(dropout_rate=1.0, dropout_key=jax.random.key(0)),
        ValueError,
        r"dropout_rate: expected a rate in \[0, 1\), got 1.0",
    ),
    "rate_negative": (qkv(), dict(dropout_rate=-0.1), ValueError, "dropout_rate: .* got -0.1"),
    "rate_nan": (qkv(), dict(dropout_rate=float("nan")), ValueError, "dropout_rate: .* got nan"),
    "rate_array": (
        qkv(),
        dict(dropout_rate=jnp.float32(0.5)),
        TypeError,
        "dropout_rate: expected a Python float",
    ),
    "key_number": (
        qkv(),
        dict(dropout_rate=0.1, dropout_key=7),
        TypeError,
        "dropout_key: expected one JAX PRNG key, got 7",
    ),
    "key_many": (
        qkv(),
        dict(dropout_rate=0.1, dropout_key=jax.random.split(jax.random.key(0), B)),
        ValueError,
        r"dropout_key: expected one JAX PRNG key, got key<fry> of shape \(2,\)",
    ),
    "key_type": (
        qkv(),
        dict(dropout_rate=0.1, dropout_key=jnp.ones(2)),
        ValueError,
        r"dropout_key: expected one JAX PRNG key, got float32 of shape \(2,\)",
    ),
    "lengths_shape": (
        qkv(),
        dict(key_value_seq_lengths=jnp.array([7])),
        ValueError,
        r"key_value_seq_lengths: expected shape \(2,\), got shape \(1,\)",
    ),
    "lengths_type": (
        qkv(),
        dict(query_seq_lengths=jnp.ones(B)),
        TypeError,
        "query_seq_lengths: expected an int32 array, got float32",
    ),
    "lengths_too_long": (
        qkv(),
        dict(key_value_seq_lengths=jnp.array([7, 8])),
        ValueError,
        r"key_value_seq_lengths: expected lengths in \[0, 7\] \(S\), got \[7, 8\]",
    ),
    "lengths_negative": (
        qkv(),
        dict(query_seq_lengths=[-1, 5]),
        ValueError,
        r"query_seq_lengths: expected lengths in \[0, 5\] \(T\), got \[-1, 5\]",
    ),
    "offset_word": (
        qkv(),
        dict(causal_offset="top"),
        ValueError,
        "causal_offset: expected an int, an int32 array or \"bottom_right\", got 'top'",
    ),
    "offset_type": (qkv(), dict(causal_offset=0.5), TypeError, "causal_offset: .* got float32"),
    "offset_shape": (
        qkv(),
        dict(causal_offset=jnp.ones((3,), int)),
        ValueError,
        r"causal_offset: expected a scalar or shape \(2,\), got shape \(3,\)",
    ),
    "window_negative": (
        qkv(),
        dict(local_window_size=-1),
        ValueError,
        "local_window_size: expected an int >= 0 or a pair of them, got -1",
    ),
    "window_float": (
        qkv(),
        dict(local_window_size=(1.5, 2)),
        ValueError,
        r"local_window_size: .* got \(1.5, 2\)",
    ),
    "window_triple": (qkv(), dict(local_window_size=(1, 2, 3)), ValueError, "local_window_size"),
    "window_word": (qkv(), dict(local_window_size="wide"), ValueError, "local_window_size"),
    "window_half": (qkv(), dict(local_window_size=2.5), ValueError, "local_window_size: .* 2.5"),
    "block_mask_shape": (
        qkv(),
        dict(block_mask=ones(2, 1, dtype=bool)),
        ValueError,
        r"block_mask: expected shape broadcastable to \(2, 4, 1, 1\) for block_size=\(128, 128\), "
        r"got shape \(2, 1\)",
    ),
    "block_mask_heads": (
        qkv(),
        dict(block_mask=ones(3, 1, 1, dtype=bool)),
        ValueError,
        "block_mask: expected 1 or 4 on axis 1",
    ),
    "block_mask_rank": (qkv(), dict(block_mask=ones(1, 1, 1, 1, 1) > 0), ValueError, "block_mask"),
    "block_mask_type": (
        qkv(),
        dict(block_mask=ones(1, 1)),
        TypeError,
        "block_mask: expected a boolean .* got float32",
    ),
    "block_size": (
        qkv(),
        dict(block_mask=ones(1, 1) > 0, block_size=(100, 128)),
        ValueError,
        r"block_size: expected multiples of 16.* got \(100, 128\)",
    ),
    "block_size_triple": (
        qkv(),
        dict(block_mask=ones(1, 1) > 0, block_size=(16, 16, 16)),
        ValueError,
        "block_size: expected a pair",
    ),
    "mask_type": (
        qkv(),
        dict(mask=ones(B, N, T, S)),
        TypeError,
        "mask: expected a boolean array .* got float32",
    ),
    "mask_shape": (
        qkv(),
        dict(mask=ones(B, N, S, T) > 0),
        ValueError,
        r"mask: expected a shape broadcastable to \(2, 4, 5, 7\), got shape \(2, 4, 7, 5\)",
    ),
    "bias_type": (
        qkv(),
        dict(bias=ones(T, S) > 0),
        TypeError,
        "bias: expected a floating-point array, got bool",
    ),
    "bias_shape": (qkv(), dict(bias=ones(3, T, S)), ValueError, r"bias: .* got shape \(3, 5, 7\)"),
    "scale_array": (qkv(), dict(scale=jnp.ones(N)), TypeError, "scale: expected a Python float"),
    "causal_word": (qkv(), dict(is_causal="yes"), TypeError, "is_causal: expected a Python bool"),
    "implementation": (
        qkv(),
        dict(implementation="gpu"),
        ValueError,
        "implementation: expected one of .*'cuda', 'cpu', 'xla'.* got 'gpu'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    arrays, options, error, text = REFUSED[case]
    with pytest.raises(error, match=text):
        jax_flash.attention(*arrays, **options)
    # The same words under a trace, where options are known all the same.
    with pytest.raises(error, match=text):
        jax.eval_shape(lambda *x: jax_flash.attention(*x, **options), *arrays)


def test_refused_packed():
    refused = functools.partial(pytest.raises, ValueError)
    with refused(match=r"qkv: expected shape \[\*B, T, 3, N, H\], got shape \(2, 5, 2, 4, 8\)"):
        jax_flash.attention_qkvpacked(ones(B, T, 2, N, H))
    with refused(match=r"qkv: expected at least 4 axes, got shape \(5, 3, 8\)"):
        jax_flash.attention_qkvpacked(ones(T, 3, H))
    with refused(
        match=r"key_value: expected shape \[\*B, S, 2, K, H\], got shape \(2, 7, 3, 2, 8\)"
    ):
        jax_flash.attention_kvpacked(ones(B, T, N, H), ones(B, S, 3, K, H))
    with refused(match=r"key_value: expected shape \[\*B, S, 2, K, H\], got shape \(7, 2, 2, 8\)"):
        jax_flash.attention_kvpacked(ones(B, T, N, H), ones(S, 2, K, H))
    with refused(match="head dim 8, got 16"):
        jax_flash.attention_kvpacked(ones(B, T, N, H), ones(B, S, 2, K, 16))
    with refused(match="divides query's 4, got 3"):
        jax_flash.attention_kvpacked(ones(B, T, N, H), ones(B, S, 2, 3, H))
    with refused(match=r"qkv: expected shape \[\*B, total, 3, N, H\]"):
        jax_flash.varlen_attention_qkvpacked(ones(T, 4, N, H), jnp.array([0, T], jnp.int32))
    with refused(match=r"key_value: expected shape \[\*B, total_k, 2, K, H\]"):
        jax_flash.varlen_attention_kvpacked(
            ones(T, N, H), ones(S, 1, K, H), jnp.array([0, T], jnp.int32)
        )
    with pytest.raises(TypeError, match="block_mask: expected a boolean array, got None"):
        jax_flash.blocksparse_attention(*qkv(), None)


@pytest.mark.parametrize(
    "cu_q, cu_k, error, text",
    [
        ([0.0, 5.0], None, TypeError, "cu_seqlens_q: expected an int32 array, got float32"),
        (np.array([0, 5], np.int8), None, TypeError, "cu_seqlens_q: .* int8"),
        ([[0, 5], [0, 5]], None, ValueError, r"cu_seqlens_q: .* got shape \(2, 2\)"),
        ([5], None, ValueError, r"cu_seqlens_q: expected shape \[sequences \+ 1\]"),
        (5, None, ValueError, r"cu_seqlens_q: .* got shape \(\)"),
        ([0, 3, 2, 5], [0, 1, 2, 7], ValueError, r"cu_seqlens_q: expected non-decreasing values"),
        ([0, 5], [0, 8], ValueError, r"cu_seqlens_k: .* in \[0, 7\], got \[0, 8\]"),
        ([-1, 5], [0, 7], ValueError, r"cu_seqlens_q: .* in \[0, 5\], got \[-1, 5\]"),
        ([0, 5], [0, 3, 7], ValueError, r"cu_seqlens_k: expected as many entries as cu_seqlens_q"),
        ([0, 5], None, ValueError, "cu_seqlens_k: expected an array, as key has 7 rows"),
    ],
)
def test_refused_cu_seqlens(cu_q, cu_k, error, text):
    x = ones(T, N, H), ones(S, K, H), ones(S, K, HV)
    if "dtype" not in text and "None" not in text and cu_k is None and "an array" not in text:
        cu_k = cu_q  # what is wrong with the queries' is found first
    for transform in (lambda f: f, lambda f: lambda *x: jax.eval_shape(f, *x)):
        with pytest.raises(error, match=text):
            transform(lambda *x: jax_flash.varlen_attention(*x, cu_q, cu_k))(*x)


@pytest.mark.parametrize("option", ["dropout_rate", "scale", "is_causal", "deterministic"])
def test_static_options_refuse_traced_values(option):
    def f(x, flag):
        return jax_flash.attention(*x, **{option: flag})

    with pytest.raises(TypeError, match=rf"{option}: expected a Python \w+ \(static\)"):
        jax.jit(f)(qkv(), jnp.array(True if option in ("is_causal", "deterministic") else 0.5))


def test_what_is_harmless_is_accepted():
    """numpy arrays, lists, other integer types, and options that turn out to be off."""
    x = qkv()
    want = jax_flash.attention(*x, key_value_seq_lengths=jnp.array([7, 3]), is_causal=True)
    as_numpy = [np.asarray(a) for a in x]
    for lengths in ([7, 3], np.array([7, 3], np.uint8), np.array([7, 3], np.int64), (7, 3)):
        got = jax_flash.attention(*as_numpy, key_value_seq_lengths=lengths, is_causal=True)
        assert_equal(got, want)
    f = jax.jit(lambda n: jax_flash.attention(*x, key_value_seq_lengths=n, is_causal=True))
    assert_close(f(jnp.array([200, 3], jnp.uint8)), want)
    assert_close(f(jnp.array([0xFFFFFFFF, 3], jnp.uint32)), want)
    whole = jax_flash.attention(*x)
    assert_equal(jax_flash.attention(*x, dropout_rate=0.0), whole)
    assert_equal(jax_flash.attention(*x, dropout_rate=1e-9), whole)
    assert_close(jax_flash.attention(*x, local_window_size=10**30), whole)
    assert_close(jax_flash.attention(*x, local_window_size=(2**31 - 1, 2**31)), whole)
    for offset in (10**9, 2**31 - 1, np.uint32(0xFFFFFFFF), np.int8(100)):
        assert_close(jax_flash.attention(*x, is_causal=True, causal_offset=offset), whole)
    nothing = jax_flash.attention(*x, is_causal=True, causal_offset=-(2**31))
    assert not np.any(nothing)


# Zero-size axes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", ["B", "T", "S", "N", "H", "Hv"])
def test_axes_of_size_zero(implementation, axis):
    size = dict(B=B, T=T, S=S, N=N, K=K, H=H, Hv=HV) | {axis: 0}
    if axis == "N":
        size["K"] = 0
    query = normal(0, *(size[a] for a in "BTNH"))
    key = normal(1, *(size[a] for a in "BSKH"))
    value = normal(2, *(size[a] for a in ("B", "S", "K", "Hv")))
    attend = functools.partial(
        jax_flash.attention,
        is_causal=True,
        dropout_rate=0.5 if axis in "BTN" else 0.0,
        dropout_key=jax.random.key(0),
        return_lse=True,
        implementation=implementation,
    )
    (out, lse), pullback = jax.vjp(jax.jit(attend), query, key, value)
    gradients = pullback((jnp.ones_like(out), jnp.ones_like(lse)))
    assert out.shape == (size["B"], size["T"], size["N"], size["Hv"])
    assert lse.shape == (size["B"], size["N"], size["T"])
    assert [g.shape for g in gradients] == [query.shape, key.shape, value.shape]
    if axis == "S":
        assert not np.any(out) and np.all(np.isneginf(lse))
        assert not np.any(gradients[0])
    if axis == "H":  # all scores are 0
        want = plain(query, key, value, scale=1.0, allowed=programs.causal(T, S))
        assert_close((out, lse), want)
        assert np.abs(gradients[2]).max() > 0
    if axis == "Hv":  # the lse does not need values
        allowed = programs.causal(T, S)
        want = plain(query, key, normal(2, B, S, K, H), allowed=allowed)[1]
        assert_close(lse, want)

        def formula(q, k):
            return jnp.sum(plain(q, k, normal(2, B, S, K, H), allowed=allowed)[1])

        assert_close(gradients[:2], jax.grad(formula, (0, 1))(query, key))


@pytest.mark.parametrize("axis", ["T", "N", "H", "B"])
def test_packed_and_varlen_axes_of_size_zero(implementation, axis):
    size = dict(B=B, T=T, N=N, H=H) | {axis: 0}
    qkv = normal(0, size["B"], size["T"], 3, size["N"], size["H"])
    attend = functools.partial(jax_flash.attention_qkvpacked, implementation=implementation)
    out, pullback = jax.vjp(attend, qkv)
    assert out.shape == (size["B"], size["T"], size["N"], size["H"])
    assert pullback(out)[0].shape == qkv.shape
    cu = jnp.array([0, 0, size["T"]], jnp.int32)
    varlen = functools.partial(jax_flash.varlen_attention_qkvpacked, implementation=implementation)
    out, pullback = jax.vjp(lambda x: varlen(x, cu), qkv)
    assert out.shape == (size["B"], size["T"], size["N"], size["H"])
    assert pullback(out)[0].shape == qkv.shape


def test_varlen_without_keys(implementation):
    query, key = normal(0, T, N, H), normal(1, 0, K, H)
    cu_q, cu_k = jnp.array([0, 2, T], jnp.int32), jnp.zeros((3,), jnp.int32)
    out, lse = jax_flash.varlen_attention(
        query, key, key, cu_q, cu_k, return_lse=True, implementation=implementation
    )
    assert_equal(out, jnp.zeros_like(query))
    assert_equal(lse, jnp.full((N, T), -jnp.inf))


def test_probabilities_of_nothing():
    for shape in ((0, T, S), (B, 0, S), (B, T, 0)):
        b, t, s = shape
        query, key = jnp.ones((b, t, N, H)), jnp.ones((b, s, K, H))
        _, probs = jax_flash.attention(query, key, key, return_probs=True, implementation="xla")
        assert probs.probs.shape == (b, N, t, s)


# Values that are not numbers ----------------------------------------------------------------------


def _with(x, index, value):
    return x.at[index].set(value)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf], ids=["nan", "inf", "-inf"])
@pytest.mark.parametrize("which", ["query", "key", "value"])
def test_not_a_number_goes_where_it_belongs(implementation, which, bad):
    """Batch 1, row 2, head 0: that is for causal queries from 2 on, of query heads 0 and 1."""
    x = dict(zip(("query", "key", "value"), qkv(), strict=True))
    x[which] = x[which].at[1, 2, 0, 3].set(bad)
    attend = functools.partial(jax_flash.attention, is_causal=True, implementation=implementation)
    out, pullback = jax.vjp(jax.jit(attend), *x.values())
    gradients = pullback(jnp.ones_like(out))
    want = plain(*x.values(), allowed=programs.causal(T, S))[0]
    if which == "value":
        # Rows that do not see the value may get 0 * NaN from it in its own column: a tile is
        # multiplied whole, here as in XLA.
        want, out = want.at[1, :2, :2, 3].set(0), out.at[1, :2, :2, 3].set(0)
        assert not np.isfinite(want[1, 2:, :2, 3]).any()
    finite = np.isfinite(want)
    assert finite.mean() > 0.8 and (not finite.all() or not np.isnan(bad))
    np.testing.assert_array_equal(np.isfinite(out), finite)
    assert_close(out[finite], want[finite])
    for gradient in gradients:  # of the other batch entry and of the other kv head
        assert np.isfinite(gradient[0]).all() and np.isfinite(gradient[1, :, -1]).all()
    if np.isnan(bad):
        assert np.isnan(gradients[0][1, :, 0]).any()


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf], ids=["nan", "inf"])
def test_rows_that_do_not_exist_may_hold_anything(implementation, bad):
    """Padding beyond the lengths is not read, or does not count."""
    lengths_q, lengths_k = jnp.array([3, 5]), jnp.array([7, 4])
    query, key, value = qkv()
    cotangent = normal(9, B, T, N, HV)
    here_q = (jnp.arange(T) < lengths_q[:, None])[..., None, None]
    here_k = (jnp.arange(S) < lengths_k[:, None])[..., None, None]

    def run(query, key, value, cotangent):
        attend = functools.partial(
            jax_flash.attention,
            query_seq_lengths=lengths_q,
            key_value_seq_lengths=lengths_k,
            return_lse=True,
            implementation=implementation,
        )
        (out, lse), pullback = jax.vjp(attend, query, key, value)
        return (out, lse), pullback((cotangent, cotangent[..., 0].swapaxes(1, 2)))

    run = jax.jit(run)
    want = run(query, key, value, cotangent)
    dirty = (
        jnp.where(here_q, query, bad),
        jnp.where(here_k, key, bad),
        jnp.where(here_k, value, bad),
        jnp.where(here_q, cotangent, bad),
    )
    assert_close(run(*dirty), want, 1e-6)


def test_rows_that_no_sequence_owns_may_hold_anything(implementation):
    cu = jnp.array([1, 3, 6], jnp.int32)
    qkv, cotangent = normal(0, 8, 3, N, H), normal(1, 8, N, H)

    def run(x, cotangent):
        attend = functools.partial(
            jax_flash.varlen_attention_qkvpacked, implementation=implementation
        )
        out, pullback = jax.vjp(lambda x: attend(x, cu), x)
        return out, pullback(cotangent)[0]

    run = jax.jit(run)
    want = run(qkv, cotangent)
    owned = (jnp.arange(8) >= 1) & (jnp.arange(8) < 6)
    dirty = run(
        jnp.where(owned[:, None, None, None], qkv, jnp.nan),
        jnp.where(owned[:, None, None], cotangent, jnp.nan),
    )
    assert_close(dirty, want, 1e-6)
    assert not np.any(want[0][~owned]) and not np.any(want[1][~owned])


def test_overflow_in_float16_is_inf_or_nan_and_ends(implementation):
    x = [a * 300 for a in qkv(jnp.float16)]
    out = jax.jit(functools.partial(jax_flash.attention, implementation=implementation))(*x)
    want = plain(*(a.astype(jnp.float32) for a in x))[0]
    assert_close(out.astype(jnp.float32), want, 2e-3)


# What only the device can know --------------------------------------------------------------------


@pytest.mark.parametrize(
    "garbage",
    [[-5, 3, 1, 9], [0, 100, 50, 8], [7, 5, 3, 1], [2**31 - 1, -(2**31), 4, 8], [-3, -2, -1, 0]],
)
def test_traced_cu_seqlens_are_clamped_and_made_monotonic(implementation, garbage):
    total_q, total_k = 8, 9
    x = normal(0, total_q, N, H), normal(1, total_k, K, H), normal(2, total_k, K, HV)

    @functools.partial(jax.jit)
    def run(cu_q, cu_k):
        attend = functools.partial(
            jax_flash.varlen_attention,
            is_causal=True,
            causal_offset="bottom_right",
            dropout_rate=0.25,
            dropout_key=jax.random.key(0),
            return_lse=True,
            implementation=implementation,
        )
        results, pullback = jax.vjp(lambda *x: attend(*x, cu_q, cu_k), *x)
        return results, pullback((jnp.ones_like(results[0]), jnp.zeros_like(results[1])))

    def cleaned(total):
        return np.maximum.accumulate(np.clip(np.array(garbage, np.int64), 0, total)).astype(
            np.int32
        )

    given = jnp.array(garbage, jnp.int32)
    got = run(given, given)
    assert all(np.isfinite(x).all() for x in (got[0][0], *got[1]))
    assert_close(got, run(cleaned(total_q), cleaned(total_k)), 1e-6)


def test_traced_lengths_are_clamped(implementation):
    @jax.jit
    def run(lengths_q, lengths_k):
        return jax_flash.attention(
            *qkv(),
            query_seq_lengths=lengths_q,
            key_value_seq_lengths=lengths_k,
            is_causal=True,
            causal_offset="bottom_right",
            return_lse=True,
            implementation=implementation,
        )

    got = run(jnp.array([99, -4]), jnp.array([-(2**31), 2**31 - 1]))
    assert_equal(got, run(jnp.array([T, 0]), jnp.array([0, S])))
    assert not np.any(got[0]) and np.all(np.isneginf(got[1]))
    got = run(jnp.array([2**31 - 1, 99]), jnp.array([2**31 - 1, 3]))
    assert_equal(got, run(jnp.array([T, T]), jnp.array([S, 3])))
    assert np.all(np.isfinite(got[1][0]))


def test_traced_offsets_of_any_size(implementation):
    run = jax.jit(
        lambda offset: jax_flash.attention(
            *qkv(),
            is_causal=True,
            local_window_size=(2**31 - 1, 2**31 - 1),
            causal_offset=offset,
            implementation=implementation,
        )
    )
    got = run(jnp.array([2**31 - 1, -(2**31)]))
    assert_close(got[0], plain(*qkv())[0][0])
    assert not np.any(got[1])


# Sizes and types ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["xla", pytest.param("cpu", marks=installed("cpu"))])
def test_more_elements_than_int32_counts(name):
    shape = (2**9, 2**13, 2**5, 2**7)  # 2^34
    x = jax.ShapeDtypeStruct(shape, jnp.bfloat16)

    def f(*x):
        attend = functools.partial(
            jax_flash.attention,
            is_causal=True,
            dropout_rate=0.1,
            dropout_key=jax.random.key(0),
            implementation=name,
        )
        out, pullback = jax.vjp(attend, *x)
        return out, *pullback(out)

    assert [r.shape for r in jax.eval_shape(f, x, x, x)] == [shape] * 4
    text = jax.jit(f).trace(x, x, x).lower(lowering_platforms=("cpu",)).as_text()
    found = custom_calls(text)
    assert [target for target, *_ in found] == (
        [] if name == "xla" else ["jax_flash.attention_forward", "jax_flash.attention_backward"]
    )
    assert "512x8192x32x128xbf16" in text


def test_sequences_longer_than_positions_count():
    x = jax.ShapeDtypeStruct((2**30 + 1, 1, 8), jnp.float32)
    with pytest.raises(ValueError, match="query: expected a sequence axis of at most 1073741824"):
        jax.eval_shape(jax_flash.attention, x, x, x)
    short = jax.ShapeDtypeStruct((16, 1, 8), jnp.float32)
    with pytest.raises(ValueError, match="key: expected a sequence axis of at most 1073741824"):
        jax.eval_shape(jax_flash.attention, short, x, x)


def test_float16_everywhere(implementation):
    x = qkv(jnp.float16)

    def run(*x):
        attend = functools.partial(
            jax_flash.attention, return_lse=True, implementation=implementation
        )
        results, pullback = jax.vjp(attend, *x)
        return results, pullback((jnp.sin(results[0]), jnp.cos(results[1])))

    (out, lse), gradients = jax.jit(run)(*x)
    assert {a.dtype for a in (out, *gradients)} == {np.dtype(np.float16)}
    assert lse.dtype == jnp.float32

    def by_formula(*x):
        results, pullback = jax.vjp(plain, *x)
        return results, pullback((jnp.sin(results[0]), jnp.cos(results[1])))

    (want, want_lse), slopes = by_formula(*(a.astype(jnp.float32) for a in x))
    assert_close(lse, want_lse)

    def wide(tree):
        return jax.tree.map(lambda a: a.astype(jnp.float32), tree)

    assert_close(wide((out, gradients)), (want, slopes), 2e-3)
    for platform in ("tpu", "rocm"):
        text = (
            jax.jit(jax_flash.attention).trace(*x).lower(lowering_platforms=(platform,)).as_text()
        )
        assert re.search(r"-> \(?tensor<2x5x4x16xf16>", text) and not custom_calls(text)


def test_types_without_a_kernel_run_on_xla_with_one_warning(implementation):
    """float64 and head dims beyond 256: None falls back and says so; by name it is refused."""
    wide = ones(B, T, N, 264)
    if implementation == "xla":
        with jax.enable_x64(True):
            x = [np.asarray(a, np.float64) for a in qkv()]
            out, lse = jax_flash.attention(*x, return_lse=True, implementation="xla")
            assert out.dtype == lse.dtype == np.float64
            assert_close((out, lse), plain(*map(jnp.asarray, x)), 1e-13)
        return
    with pytest.raises(NotImplementedError, match=r"head dim 264 \(kernels: up to 256\)"):
        jax_flash.attention(wide, wide, wide, implementation=implementation)
    with jax.enable_x64(True), pytest.raises(NotImplementedError, match="float64"):
        jax_flash.attention(
            *(np.asarray(a, np.float64) for a in qkv()), implementation=implementation
        )
    programs.forget_warnings()
    with pytest.warns(UserWarning, match="head dim 264") as warned:
        jax_flash.attention(wide, wide, wide)
        jax_flash.attention(wide, wide, wide, is_causal=True)
    assert len(warned) == 1


@pytest.mark.parametrize(
    "name",
    [pytest.param("cpu", marks=installed("cpu")), pytest.param("cuda", marks=installed("cuda"))],
)
def test_bias_by_name_is_refused(name):
    attend = functools.partial(jax_flash.attention, bias=ones(T, S), implementation=name)
    with pytest.raises(NotImplementedError, match="bias and mask run on 'xla' alone"):
        jax.eval_shape(attend, *qkv())
