"""TransformerBlock and rotary MultiHeadAttention, Linen and NNX, against the same in plain Flax."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("flax")
from flax import linen as nn
from flax import nnx

import jax_flash
from jax_flash import linen
from jax_flash import nnx as flash_nnx

B, T, N, K, H, D, F = 3, 13, 6, 2, 8, 20, 28
close = functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-5)
SMALL = nn.initializers.normal(0.5)  # biases that matter
TABLE = jax_flash.RotaryTable.make(T, 6)
INTERLEAVED = jax_flash.RotaryTable.make(T, H, interleaved=True)


def normal(seed, *shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


# ---- the same in plain Flax


def turn(x, table):
    """x [B, T, N, H] by the book: each pair (a, b) becomes (a cos - b sin, b cos + a sin)."""
    pairs = table.cos.shape[-1]
    cos, sin = (jnp.asarray(t)[: x.shape[1], None] for t in (table.cos, table.sin))
    first = np.arange(pairs) * 2 if table.interleaved else np.arange(pairs)
    second = first + (1 if table.interleaved else pairs)
    a, b = x[..., first], x[..., second]
    return x.at[..., first].set(a * cos - b * sin).at[..., second].set(b * cos + a * sin)


class FlaxAttention(nn.Module):
    kv_heads: int
    rotary: Any
    window: Any

    @nn.compact
    def __call__(self, x):
        dense = functools.partial(nn.DenseGeneral, bias_init=SMALL)
        q = dense((N, H), name="query")(x)
        k, v = (dense((self.kv_heads, H), name=name)(x) for name in ("key", "value"))
        if self.rotary is not None:
            q, k = turn(q, self.rotary), turn(k, self.rotary)
        out = jax.nn.dot_product_attention(q, k, v, is_causal=True, local_window_size=self.window)
        return dense(D, axis=(-2, -1), name="out")(out)


class FlaxMLP(nn.Module):
    activation: str

    @nn.compact
    def __call__(self, x):
        gated = self.activation == "swiglu"
        x = nn.Dense(2 * F if gated else F, bias_init=SMALL, name="fc1")(x)
        x = nn.silu(x[..., :F]) * x[..., F:] if gated else nn.gelu(x)
        return nn.Dense(D, bias_init=SMALL, name="fc2")(x)


class FlaxBlock(nn.Module):
    """One array in, one out: the stream with everything added."""

    norm: str = "layer"
    kind: str = "prenorm"
    tied_norm: bool = False
    activation: str = "gelu_tanh"
    kv_heads: int = N
    rotary: Any = None
    window: Any = None

    @nn.compact
    def __call__(self, x):
        make = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}[self.norm]
        norm1 = make(name="norm1")
        norm2 = norm1 if self.tied_norm else make(name="norm2")
        attention = FlaxAttention(self.kv_heads, self.rotary, self.window, name="attention")
        mlp = FlaxMLP(self.activation, name="mlp")
        if self.kind == "postnorm":
            x = norm1(x + attention(x))
            return norm2(x + mlp(x))
        if self.kind == "parallel":
            return x + attention(norm1(x)) + mlp(norm2(x))
        x = x + attention(norm1(x))
        return x + mlp(norm2(x))


CASES = {
    "prenorm": {},
    "postnorm": dict(kind="postnorm"),
    "parallel": dict(kind="parallel", norm="rms"),
    "tied": dict(kind="parallel", tied_norm=True),
    "gqa-rotary-gated": dict(norm="rms", activation="swiglu", kv_heads=K, rotary=TABLE),
    "rotary": dict(rotary=INTERLEAVED, window=(3, 0)),
    "postnorm-gqa": dict(kind="postnorm", norm="rms", kv_heads=K, window=(4, 0)),
}


def options_of(case):
    """The same as options of both TransformerBlocks."""
    case = dict(kind="prenorm") | case
    kind, kv_heads = case.pop("kind"), case.pop("kv_heads", N)
    return dict(
        qkv_features=N * H,
        num_kv_heads=kv_heads,
        hidden_features=F,
        prenorm=kind != "postnorm",
        parallel=kind == "parallel",
        is_causal=True,
        local_window_size=case.pop("window", None),
        bias_init=SMALL,
        **case,
    )


def linen_block(**options):
    return linen.TransformerBlock(num_heads=N, **options)


def nnx_block(**options):
    return flash_nnx.TransformerBlock(N, D, rngs=nnx.Rngs(0), **options)


def put(layer, parameters):
    """Linen's parameters into an NNX layer."""
    for name, value in parameters.items():
        if isinstance(value, dict):
            put(getattr(layer, name), value)
        else:
            getattr(layer, name)[...] = value


def take(state, like):
    return {
        name: take(state[name], value) if isinstance(value, dict) else state[name][...]
        for name, value in like.items()
    }


def whole(result):
    """What the plain block returns: the stream with what is not added yet."""
    if not isinstance(result, tuple):
        return result
    x, stream = result
    return stream + sum(x) if isinstance(x, tuple) else stream + x


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_one_block_is_flax_s(case):
    x, cotangent = normal(0, B, T, D), normal(1, B, T, D)
    theirs, ours = FlaxBlock(**case), linen_block(**options_of(case))
    variables = theirs.init(jax.random.key(2), x)
    jax.tree.map(np.testing.assert_array_equal, variables, ours.init(jax.random.key(2), x))

    def both(function):
        out, pullback = jax.vjp(function, variables, x)
        return out, pullback(cotangent)

    want = jax.jit(lambda: both(theirs.apply))()
    got = jax.jit(lambda: both(lambda v, x: whole(ours.apply(v, x))))()
    jax.tree.map(functools.partial(close, rtol=1e-3, atol=1e-4), got, want)

    layer = nnx_block(**options_of(case))
    put(layer, variables["params"])
    close(whole(layer(x)), want[0], rtol=1e-3, atol=1e-4)
    gradient = nnx.grad(lambda layer: jnp.vdot(whole(layer(x)), cotangent))(layer)
    gradient = take(gradient, variables["params"])
    jax.tree.map(functools.partial(close, rtol=1e-3, atol=1e-4), gradient, want[1][0]["params"])


@pytest.mark.parametrize("parallel", [False, True])
def test_a_stack_ends_in_a_norm(parallel):
    """Three blocks and the layer that adds what the last one computed."""
    x = normal(0, B, T, D)
    case = dict(kind="parallel" if parallel else "prenorm", norm="rms")
    theirs = [FlaxBlock(**case) for _ in range(3)]
    variables = [block.init(jax.random.key(i), x) for i, block in enumerate(theirs)]
    want = x
    for block, own in zip(theirs, variables, strict=True):
        want = block.apply(own, want)
    want = nn.RMSNorm().apply({"params": {"scale": jnp.ones(D)}}, want)
    stream = None
    for own in variables:
        x, stream = linen_block(**options_of(case)).apply(own, x, stream)
    x, x1 = x if parallel else (x, None)
    last = linen.DropoutAddRMSNorm()
    got = last.apply({"params": {"scale": jnp.ones(D)}}, x, stream, x1=x1)
    close(got, want, rtol=1e-3, atol=1e-4)
    layer = flash_nnx.DropoutAddRMSNorm(D, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(layer(x, stream, x1=x1), got)


# ---- types


@pytest.mark.parametrize("residual_in_fp32", [False, True])
def test_types(residual_in_fp32):
    x = normal(0, B, T, D)
    block = linen_block(residual_in_fp32=residual_in_fp32, dtype=jnp.bfloat16, qkv_features=N * H)
    variables = block.init(jax.random.key(0), x)
    assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(variables))
    out, stream = block.apply(variables, x)
    assert out.dtype == jnp.bfloat16
    assert stream.dtype == (jnp.float32 if residual_in_fp32 else jnp.bfloat16)
    again, same = block.apply(variables, out, stream)
    assert (again.dtype, same.dtype) == (out.dtype, stream.dtype)


def test_a_stream_is_never_narrower_than_its_branches():
    x = normal(0, B, T, D, dtype=jnp.bfloat16)
    block = linen_block(qkv_features=N * H)  # float32 parameters: branches are float32
    variables = block.init(jax.random.key(0), x)
    out, stream = block.apply(variables, x)
    assert (out.dtype, stream.dtype) == (jnp.float32, jnp.float32)


# ---- dropout and drop path


def kinds(make_options):
    """(name, block as a function of x, residual, deterministic, key), and its MLP's parameters."""
    x = normal(0, B, T, D)
    layer = linen_block(**make_options)
    variables = layer.init(jax.random.key(1), x, deterministic=True)

    def by_linen(x, residual=None, deterministic=False, key=None, **options):
        rngs = None if key is None else {"dropout": key}
        options |= dict(deterministic=deterministic, rngs=rngs)
        return layer.apply(variables, x, residual, **options)

    other = nnx_block(**make_options)
    put(other, variables["params"])

    def by_nnx(x, residual=None, deterministic=False, key=None, **options):
        rngs = None if key is None else nnx.Rngs(dropout=key)
        return other(x, residual, deterministic=deterministic, rngs=rngs, **options)

    return {"linen": by_linen, "nnx": by_nnx}


DROPPING = dict(qkv_features=N * H, hidden_features=F)


@pytest.mark.parametrize("kind", ["linen", "nnx"])
@pytest.mark.parametrize(
    "options",
    [
        dict(dropout_rate=0.4),
        dict(dropout_rate=(0.0, 0.5)),
        dict(drop_path_rate=0.5),
        dict(attention_dropout_rate=0.5),
        dict(dropout_rate=0.3, drop_path_rate=0.3, attention_dropout_rate=0.3),
        dict(dropout_rate=0.3, prenorm=False, drop_path_rate=0.5),
        dict(dropout_rate=0.3, parallel=True, drop_path_rate=(0.1, 0.5)),
    ],
    ids=lambda options: "-".join(options),
)
def test_dropping_follows_the_key(kind, options):
    block = kinds(DROPPING | options)[kind]
    x = normal(3, B, T, D)
    inputs = (x, None) if not options.get("prenorm", True) else (x, normal(4, B, T, D))
    if options.get("parallel"):
        inputs = ((x, normal(5, B, T, D)), inputs[1])
    first, again, other = (whole(block(*inputs, key=jax.random.key(i))) for i in (7, 7, 8))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    still = whole(block(*inputs, deterministic=True))
    assert not np.array_equal(first, still)
    plain = kinds(DROPPING | {n: v for n, v in options.items() if "rate" not in n})[kind]
    np.testing.assert_array_equal(still, whole(plain(*inputs)))


@pytest.mark.parametrize("kind", ["linen", "nnx"])
@pytest.mark.parametrize("with_lengths", [False, True])
def test_drop_path_drops_sequences(kind, with_lengths):
    """The stream gets all of a sequence's branch, scaled, or none of it, at the given rate."""
    rate, sequences, rows = 0.25, 400, 3
    options = dict(drop_path_rate=(rate, 0.0), out_kernel_init=nn.initializers.zeros)
    block = kinds(DROPPING | options)[kind]  # attention gives 0
    shape, cu_seqlens = (sequences, rows, D), None
    if with_lengths:  # two sequences in each entry of the batch
        shape = (sequences // 2, 2 * rows, D)
        cu_seqlens = jnp.array([0, rows, 2 * rows], jnp.int32)
    x, residual = jnp.ones(shape), normal(4, *shape)
    _, stream = block(x, residual, key=jax.random.key(0), cu_seqlens=cu_seqlens)
    scale = np.asarray(stream - residual).reshape(sequences, -1)
    dropped = np.abs(scale).max(-1) < 1e-3
    close(scale[~dropped], 1 / (1 - rate), rtol=1e-3)
    assert abs(dropped.mean() - rate) < 4 * (rate * (1 - rate) / sequences) ** 0.5
    assert (dropped[::2] != dropped[1::2]).any()
    _, stream = block(x, key=jax.random.key(0), cu_seqlens=cu_seqlens)
    np.testing.assert_array_equal(stream, x)  # what begins the stream is no branch


# ---- attention with rotary and concatenated sequences


@pytest.mark.parametrize("kind", ["linen", "nnx"])
@pytest.mark.parametrize("kv_heads", [N, K])
@pytest.mark.parametrize("layer", [False, True], ids=["table", "layer"])
def test_rotary_attention_of_concatenated_sequences(kind, kv_heads, layer):
    """Each sequence is attended alone, and positions count within it."""
    x = normal(0, 2, T, D)
    lengths = [5, T - 5]
    rotary = TABLE
    options = dict(num_kv_heads=kv_heads, qkv_features=N * H, is_causal=True)
    if kind == "linen":
        if layer:
            rotary = linen.RotaryEmbedding(dim=6)
        attention = linen.MultiHeadAttention(num_heads=N, rotary=rotary, **options)
        call = functools.partial(attention.apply, attention.init(jax.random.key(1), x))
    else:
        if layer:
            rotary = flash_nnx.RotaryEmbedding(6)
        call = flash_nnx.MultiHeadAttention(N, D, rotary=rotary, rngs=nnx.Rngs(1), **options)
    together = call(x, cu_seqlens=jnp.array([0, *np.cumsum(lengths)], jnp.int32))
    parts = [call(part) for part in jnp.split(x, [5], 1)]
    close(together, jnp.concatenate(parts, 1))
    assert not np.allclose(together, call(x))


@pytest.mark.parametrize("use_bias", [False, True])
def test_one_device_projects_with_two_axes(use_bias, monkeypatch):
    x = normal(0, 2, T, D)
    options = dict(qkv_features=N * H, rotary=TABLE, use_bias=use_bias, bias_init=SMALL)
    attention = linen.MultiHeadAttention(num_heads=N, **options)
    variables = attention.init(jax.random.key(1), x)
    want = attention.apply(variables, x)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    close(attention.apply(variables, x), want)
    assert f"f32[{2 * T},{3 * N * H}] = dot_general" in str(
        jax.make_jaxpr(attention.apply)(variables, x)
    )


@pytest.mark.parametrize("kv_heads", [N, K])
def test_rotary_positions(kv_heads):
    x = normal(0, 2, T, D)
    table = jax_flash.RotaryTable.make(64, H)
    options = dict(num_kv_heads=kv_heads, qkv_features=N * H, is_causal=True, rotary=table)
    attention = linen.MultiHeadAttention(num_heads=N, **options)
    variables = attention.init(jax.random.key(1), x)
    plain = attention.apply(variables, x)
    close(attention.apply(variables, x, offsets=17), plain, rtol=1e-3, atol=1e-4)  # relative
    spread = attention.apply(variables, x, positions=3 * jnp.arange(T))
    assert not np.allclose(spread, plain, atol=1e-3)


def test_a_table_is_no_state():
    block = nnx_block(qkv_features=N * H, rotary=TABLE)
    assert not any(leaf is TABLE.cos for leaf in jax.tree.leaves(nnx.state(block)))
    graph, state = nnx.split(block)
    x = normal(0, B, T, D)
    jitted = jax.jit(lambda state, x: nnx.merge(graph, state)(x))
    jax.tree.map(functools.partial(close, rtol=1e-3, atol=1e-4), jitted(state, x), block(x))


# ---- transformations


def test_scan_over_layers_with_remat():
    """Blocks under nn.scan and nn.remat, (x, stream) as the carry."""
    x = normal(0, B, T, D)
    options = dict(num_heads=N, qkv_features=N * H, is_causal=True, rotary=TABLE)

    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            def body(block, carry, _):
                return block(*carry), None

            scan = nn.scan(
                nn.remat(body),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=3,
            )
            block = linen.TransformerBlock(**options)
            carry, _ = scan(block, (x, jnp.zeros_like(x)), None)
            return carry

    stack = Stack()
    variables = stack.init(jax.random.key(0), x)
    stacked = variables["params"]["TransformerBlock_0"]
    gradient = jax.grad(lambda v: jnp.sum(jnp.sin(whole(stack.apply(v, x)))))(variables)

    def one_by_one(v):
        carry = (x, jnp.zeros_like(x))
        for i in range(3):
            own = jax.tree.map(lambda p: p[i], v["params"]["TransformerBlock_0"])  # noqa: B023
            carry = linen.TransformerBlock(**options).apply({"params": own}, *carry)
        return jnp.sum(jnp.sin(whole(carry)))

    assert stacked["mlp"]["fc1"]["kernel"].shape == (3, D, 4 * D)
    want = jax.grad(one_by_one)(variables)
    jax.tree.map(functools.partial(close, rtol=1e-3, atol=1e-4), gradient, want)


# ---- refusals


@pytest.mark.parametrize("kind", ["linen", "nnx"])
@pytest.mark.parametrize(
    "options, message",
    [
        (dict(norm="batch"), "norm: expected one of"),
        (dict(parallel=True, prenorm=False), "parallel: expected False without prenorm"),
        (dict(tied_norm=True), "tied_norm: expected False without parallel"),
        (dict(residual_in_fp32=True, prenorm=False), "residual_in_fp32: expected False"),
        (dict(dropout_rate=1.0), "dropout_rate: expected a rate in"),
        (dict(dropout_rate=(0.1, 0.2, 0.3)), "dropout_rate: expected a rate in"),
        (dict(dropout_rate=(0.1, 0.2), parallel=True), "dropout_rate: expected one rate"),
        (dict(drop_path_rate=-0.1), "drop_path_rate: expected a rate in"),
        (dict(attention_dropout_rate=2), "dropout_rate: expected a rate in"),
        (dict(num_kv_heads=4), "num_kv_heads: expected a divisor"),
        (dict(rotary=3), "rotary: expected a RotaryTable"),
        (dict(rotary=jax_flash.RotaryTable.make(T, 2 * H)), "rotary: expected at most 8 turned"),
        (dict(activation="elu"), "activation: expected one of"),
        (dict(dropout_rate=0.5), "deterministic"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_attributes(kind, options, message):
    x = normal(0, B, T, D)
    options = dict(qkv_features=N * H) | options
    with pytest.raises((TypeError, ValueError), match=message):
        if kind == "linen":
            linen_block(**options).init(jax.random.key(0), x)
        else:
            nnx_block(**options)(x)


@pytest.mark.parametrize("kind", ["linen", "nnx"])
@pytest.mark.parametrize(
    "options, arguments, message",
    [
        ({}, lambda x: ((x, x),), "x: expected an array"),
        (dict(parallel=True), lambda x: (x, x), "x: expected the pair of branches"),
        (dict(parallel=True), lambda x: ((x, x[:1]), x), "x: expected branches of one shape"),
        ({}, lambda x: (x, x[:1]), "residual: expected x's shape"),
        (dict(prenorm=False), lambda x: (x, x), "residual: expected None without prenorm"),
        ({}, lambda x: (x[0, 0],), "x: expected shape"),
    ],
)
def test_bad_arguments(kind, options, arguments, message):
    x = normal(0, B, T, D)
    options = dict(qkv_features=N * H) | options
    layer = linen_block(**options)
    variables = layer.init(jax.random.key(0), x)
    call = functools.partial(layer.apply, variables) if kind == "linen" else nnx_block(**options)
    with pytest.raises(ValueError, match=message):
        call(*arguments(x))


@pytest.mark.parametrize("kind", ["linen", "nnx"])
@pytest.mark.parametrize(
    "options, message",
    [
        (dict(seq_lengths=True), "query_seq_lengths: expected None with cu_seqlens"),
        (dict(positions=True), "positions: expected None without rotary"),
        (dict(offsets=True), "offsets: expected None without rotary"),
    ],
)
def test_bad_places(kind, options, message):
    x = normal(0, B, T, D)
    cu_seqlens = jnp.array([0, T], jnp.int32)
    block = kinds(DROPPING)[kind]
    values = dict(
        seq_lengths=jnp.full(B, T), positions=jnp.arange(T), offsets=jnp.zeros(B, jnp.int32)
    )
    with pytest.raises(ValueError, match=message):
        block(x, cu_seqlens=cu_seqlens, **{name: values[name] for name in options})
