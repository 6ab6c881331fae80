"""JAX's transformations, one by one, against plain attention or the same call untransformed."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_policies

import jax_flash
from tests import programs
from tests.programs import assert_close, assert_equal, calls, equations, normal, plain

implementation = programs.implementation
quick_compilation = programs.quick_compilation

B, T, S, N, K, H, HV = 2, 20, 37, 4, 2, 8, 16
RATE = 0.25


def qkv(batch=(B,), seed=0):
    return (
        normal(seed, *batch, T, N, H),
        normal(seed + 1, *batch, S, K, H),
        normal(seed + 2, *batch, S, K, HV),
    )


def weighted(out, lse):
    """A scalar to which every element of (out, lse) adds its own share."""
    wo = jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
    wl = jnp.sin(jnp.arange(lse.size, dtype=jnp.float32)).reshape(lse.shape)
    return jnp.sum(wo * out) + jnp.sum(wl * lse)


# Derivatives --------------------------------------------------------------------------------------


def _loss_pair(implementation, rate):
    """(our loss, the plain one) of (query, key, value), causal with an offset, with lse."""
    key = jax.random.key(5)
    options = dict(is_causal=True, causal_offset=3)
    if rate:
        options |= dict(dropout_rate=rate, dropout_key=key)
    keep = None
    if rate:
        *_, probs = jax_flash.attention(*qkv(), **options, return_probs=True, implementation="xla")
        keep = probs.dropout_mask
        assert 0.6 < keep.mean() < 0.9

    def ours(*x):
        return weighted(
            *jax_flash.attention(*x, **options, return_lse=True, implementation=implementation)
        )

    def by_formula(*x):
        return weighted(*plain(*x, allowed=programs.causal(T, S, 3), keep=keep, rate=rate))

    return ours, by_formula


def test_value_and_grad(implementation):
    ours, by_formula = _loss_pair(implementation, 0.0)

    def transform(f):
        return jax.jit(jax.value_and_grad(f, (0, 1, 2)))(*qkv())

    assert_close(transform(ours), transform(by_formula), 5e-5)  # a sum of 2720 terms


def test_grad_of_each_argument_alone(implementation):
    ours, by_formula = _loss_pair(implementation, 0.0)
    want = jax.grad(by_formula, (0, 1, 2))(*qkv())
    for i in range(3):
        assert_close(jax.grad(ours, i)(*qkv()), want[i])


@pytest.mark.parametrize("rate", [0.0, RATE])
def test_hessian_vector_product(implementation, rate):
    ours, by_formula = _loss_pair(implementation, rate)
    directions = qkv(seed=10)

    def product(f):
        def slope(*x):
            gradients = jax.grad(f, (0, 1, 2))(*x)
            return sum(jnp.vdot(g, d) for g, d in zip(gradients, directions, strict=True))

        return jax.jit(jax.grad(slope, (0, 1, 2)))(*qkv())

    assert_close(product(ours), product(by_formula), 5e-5)


def test_third_derivative():
    ours, by_formula = _loss_pair("xla", 0.0)
    query, key, value = (x[:1, :4, :2] for x in qkv())

    def third(f):
        g = f
        for _ in range(3):
            g = (lambda h: lambda q: jnp.sum(jnp.sin(jax.grad(h)(q))))(g)
        return jax.jit(g)(query)

    attend = functools.partial(jax_flash.attention, return_lse=True, implementation="xla")
    assert_close(
        third(lambda q: weighted(*attend(q, key, value))),
        third(lambda q: weighted(*plain(q, key, value))),
        1e-4,
    )


def test_vjp_and_linearize(implementation):
    attend = functools.partial(jax_flash.attention, return_lse=True, implementation=implementation)
    want, pullback = jax.vjp(plain, *qkv())
    cotangents = tuple(normal(20 + i, *x.shape) for i, x in enumerate(want))
    got, ours = jax.vjp(attend, *qkv())
    assert_close(got, want)
    assert_close(ours(cotangents), pullback(cotangents))
    # Only one of two results is used: the other's cotangent is a symbolic zero.
    zero = (cotangents[0], jnp.zeros_like(cotangents[1]))
    assert_close(jax.grad(lambda *x: jnp.vdot(attend(*x)[0], zero[0]))(*qkv()), pullback(zero)[0])
    zero = (jnp.zeros_like(cotangents[0]), cotangents[1])
    assert_close(jax.grad(lambda *x: jnp.vdot(attend(*x)[1], zero[1]))(*qkv()), pullback(zero)[0])


def test_forward_mode_is_refused(implementation):
    attend = functools.partial(jax_flash.attention, implementation=implementation)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(attend, qkv(), qkv())


def test_gradient_of_residual_and_lse_agree(implementation):
    attend = functools.partial(jax_flash.attention, implementation=implementation)
    by_lse = jax.grad(lambda q, k, v: jnp.sum(jnp.sin(attend(q, k, v, return_lse=True)[1])))
    by_residual = jax.grad(
        lambda q, k, v: jnp.sum(jnp.sin(attend(q, k, v, return_residual=True)[1]))
    )
    got, want = by_lse(*qkv()), by_residual(*qkv())
    assert float(jnp.abs(want).max()) > 0.01
    assert_close(got, want, 1e-6)


def test_integer_operands_have_no_gradient(implementation):
    """Lengths, offsets and masks may be arguments of a differentiated function."""

    def loss(x, options):
        return jnp.sum(
            jax_flash.attention(*x, is_causal=True, **options, implementation=implementation)
        )

    options = dict(
        key_value_seq_lengths=jnp.array([30, 9]),
        query_seq_lengths=jnp.array([20, 3]),
        causal_offset=jnp.array([17, 0]),
        block_mask=jnp.ones((N, 1, 1), bool),
    )
    gradients = jax.grad(loss, (0, 1), allow_int=True)(qkv(), options)
    assert all(g.dtype == jax.dtypes.float0 for g in jax.tree.leaves(gradients[1]))
    assert_close(gradients[0], jax.grad(loss)(qkv(), options), 0)
    assert not np.any(gradients[0][1][1, 9:]) and np.any(gradients[0][1][0, 9:30])
    assert not np.any(gradients[0][0][1, 3:])


# vmap ---------------------------------------------------------------------------------------------

LENGTHS_Q, LENGTHS_K, OFFSET, KEY, BLOCKS = range(3, 8)


def _operands():
    """(query, key, value, query lengths, key lengths, causal offset, dropout key, block mask)."""
    blocks = jax.random.bernoulli(jax.random.key(7), 0.7, (B, N, 2, 3)).at[..., 0].set(True)
    return (*qkv(), jnp.array([20, 11]), jnp.array([37, 30]), jnp.array([4, 17]), KEYS[0], blocks)


KEYS = jax.random.split(jax.random.key(3), 3)


def _three(i):
    """Three different values of operand i, along a new axis 0."""
    if i < 3:
        shape = _operands()[i].shape
        return normal(30 + i, 3, *shape)
    return {
        LENGTHS_Q: jnp.array([[20, 11], [5, 20], [0, 16]]),
        LENGTHS_K: jnp.array([[37, 30], [12, 37], [1, 0]]),
        OFFSET: jnp.array([[4, 17], [0, -3], [30, 2]]),
        KEY: KEYS,
        BLOCKS: jax.random.bernoulli(jax.random.key(8), 0.5, (3, B, N, 2, 3)),
    }[i]


@functools.cache
def _everything(implementation):
    """All options at once: operands -> (out, lse), (dq, dk, dv)."""

    def f(q, k, v, q_lengths, k_lengths, offset, key, blocks):
        def attend(q, k, v):
            return jax_flash.attention(
                q,
                k,
                v,
                is_causal=True,
                causal_offset=offset,
                query_seq_lengths=q_lengths,
                key_value_seq_lengths=k_lengths,
                block_mask=blocks,
                block_size=(16, 16),
                dropout_rate=RATE,
                dropout_key=key,
                return_lse=True,
                implementation=implementation,
            )

        results, pullback = jax.vjp(attend, q, k, v)
        return results, pullback((jnp.cos(results[0]) + 1, jnp.ones_like(results[1])))

    return f


@functools.cache
def _everything_jitted(implementation):
    return jax.jit(_everything(implementation))


def _by_loop(implementation, operands, mapped):
    one = _everything_jitted(implementation)
    results = [one(*(x[i] if j in mapped else x for j, x in enumerate(operands))) for i in range(3)]
    return jax.tree.map(lambda *x: jnp.stack(x), *results)


@pytest.mark.parametrize(
    "mapped",
    [(0,), (1,), (2,), (LENGTHS_Q,), (LENGTHS_K,), (OFFSET,), (KEY,), (BLOCKS,), (0, 1), (1, 2)]
    + [(0, LENGTHS_K, KEY), (2, OFFSET, BLOCKS), tuple(range(8))],
    ids=lambda mapped: "_".join(map(str, mapped)),
)
def test_vmap_over_any_operand(implementation, mapped):
    operands = [_three(i) if i in mapped else x for i, x in enumerate(_operands())]
    in_axes = tuple(0 if i in mapped else None for i in range(8))
    got = jax.jit(jax.vmap(_everything(implementation), in_axes))(*operands)
    want = _by_loop(implementation, operands, mapped)
    different = got[1][0]
    assert np.abs(different[0] - different[1]).max() > 1e-3
    assert_close(got, want)


@pytest.mark.parametrize("axis", [1, 2, -1])
def test_vmap_axes(implementation, axis):
    mapped = (0, 1, 2, BLOCKS)
    operands = [_three(i) if i in mapped else x for i, x in enumerate(_operands())]
    want = _by_loop(implementation, operands, mapped)
    moved = [jnp.moveaxis(x, 0, axis) if i in mapped else x for i, x in enumerate(operands)]
    in_axes = tuple(axis if i in mapped else None for i in range(8))
    f = jax.vmap(_everything(implementation), in_axes, out_axes=axis)
    got = jax.jit(f)(*moved)
    assert_close(jax.tree.map(lambda x: jnp.moveaxis(x, axis, 0), got), want)


def test_vmap_with_a_shared_dropout_key_repeats_the_mask(implementation):
    """Each entry of a vmap is the call on that entry alone: one key gives all the same mask."""
    query, key, value = qkv()

    def attend(query, dropout_key):
        options = dict(dropout_rate=RATE, dropout_key=dropout_key, implementation=implementation)
        return jax_flash.attention(query, key, value, **options)

    same = jax.vmap(attend, (0, None))(jnp.stack([query] * 3), KEYS[0])
    assert_equal(same[0], same[1])
    assert_close(same[2], attend(query, KEYS[0]))
    different = jax.vmap(attend, (None, 0))(query, KEYS)
    assert np.abs(different[0] - different[1]).max() > 1e-2
    assert_close(different[0], same[0])


def test_nested_vmaps_with_more_kinds_of_sharing_than_kernels_have_axes(implementation):
    """query, key, value, lengths and masks each mapped by a vmap of its own: five batch axes."""
    operands = list(_operands())
    mapped = (0, 1, 2, LENGTHS_K, BLOCKS)
    for i in mapped:
        operands[i] = _three(i)[:2]
    f = _everything(implementation)
    for i in mapped:
        f = jax.vmap(f, tuple(0 if j == i else None for j in range(8)))
    got = jax.jit(f)(*operands)
    assert got[0][0].shape == (2, 2, 2, 2, 2, B, T, N, HV)
    one = _everything_jitted(implementation)
    for index in [(0, 0, 0, 0, 0), (1, 0, 1, 0, 1), (0, 1, 1, 1, 0)]:
        entry = jax.tree.map(lambda x, index=index: x[index], got)
        picked = list(operands)
        for i, at in zip(mapped, reversed(index), strict=True):  # the last vmap is the first axis
            picked[i] = operands[i][at]
        assert_close(entry, one(*picked))


def test_nested_vmaps_over_the_same_operand(implementation):
    """Neighbouring batch axes become one."""
    query, key, value = qkv()
    queries = normal(40, 2, 3, *query.shape)
    attend = functools.partial(jax_flash.attention, implementation=implementation)
    got = jax.vmap(jax.vmap(attend, (0, None, None)), (0, None, None))(queries, key, value)
    want = plain(queries, *(jnp.broadcast_to(x, (2, 3, *x.shape)) for x in (key, value)))[0]
    assert_close(got, want)


def test_vmap_does_not_repeat_what_is_not_mapped(implementation):
    operands = list(_operands())
    operands[0] = _three(0)
    f = jax.vmap(_everything(implementation), (0, *[None] * 7))
    jaxpr = jax.make_jaxpr(f)(*operands)
    (forward,) = equations(jaxpr, "attention_forward")
    (backward,) = equations(jaxpr, "attention_backward")
    shapes = [v.aval.shape for v in forward.invars]
    assert shapes == [
        (3, B, T, N, H),
        (1, B, S, K, H),
        (1, B, S, K, HV),
        (1, B, 1),
        (1, B, 1),
        (1, B, 1),
        (1, B, 4),
        (N,),
        (1, B, N, 2, 3),
    ]
    assert [v.aval.shape for v in backward.invars][:3] == shapes[:3]
    assert [v.aval.shape for v in backward.invars][7:] == shapes[3:]


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
def test_vmap_hands_shared_operands_to_the_kernels(platform):
    """In the lowered program, too, the custom calls see one copy of what is not mapped."""
    if (reason := programs._register.missing(platform)) is not None:
        pytest.skip(reason)
    operands = list(_operands())
    operands[0] = _three(0)
    f = jax.jit(jax.vmap(_everything(platform), (0, *[None] * 7)))
    text = f.trace(*operands).lower(lowering_platforms=(platform,)).as_text()
    found = {target: types for target, types, _ in programs.custom_calls(text)}
    assert set(found) == {"jax_flash.attention_forward", "jax_flash.attention_backward"}
    for types in found.values():
        assert f"1x3x{B}x{T}x{N}x{H}xf32" in types
        assert f"1x1x{B}x{S}x{K}x{H}xf32" in types and f"1x1x{B}x{S}x{K}x{HV}xf32" in types
        assert f"1x1x{B}x{N}x2x3xui8" in types
    repeated = [line for line in text.splitlines() if "broadcast_in_dim" in line]
    assert not any(re.search(rf"-> tensor<3x{B}x({S}x{K}|{N}x2)x", line) for line in repeated)


def test_grad_of_vmap_sums_over_what_is_shared(implementation):
    queries = _three(0)
    _, key, value = qkv()
    attend = functools.partial(jax_flash.attention, implementation=implementation, return_lse=True)

    def loss(f, q, k, v):
        return weighted(*f(q, k, v))

    ours = functools.partial(loss, jax.vmap(attend, (0, None, None)))
    by_formula = functools.partial(loss, jax.vmap(plain, (0, None, None)))

    def gradients(f):
        return jax.jit(jax.grad(f, (0, 1, 2)))(queries, key, value)

    assert_close(gradients(ours), gradients(by_formula))


def test_vmap_of_hessian_vector_product(implementation):
    ours, by_formula = _loss_pair(implementation, 0.0)
    _, key, value = qkv()

    def product(f, q, d):
        return jax.grad(lambda q: jnp.vdot(jax.grad(f)(q, key, value), d))(q)

    queries, directions = _three(0), normal(50, 3, B, T, N, H)
    got = jax.jit(jax.vmap(functools.partial(product, ours)))(queries, directions)
    want = jax.jit(jax.vmap(functools.partial(product, by_formula)))(queries, directions)
    assert_close(got, want, 5e-5)


def test_vmap_of_packed_and_varlen_calls(implementation):
    cu = jnp.array([[0, 5, 5, 20], [0, 1, 13, 18], [2, 7, 9, 11]], jnp.int32)
    packed = normal(60, T, 3, N, H)

    def f(qkv, cu):
        attend = functools.partial(
            jax_flash.varlen_attention_qkvpacked,
            is_causal=True,
            dropout_rate=RATE,
            dropout_key=KEYS[1],
            return_lse=True,
            implementation=implementation,
        )
        results, pullback = jax.vjp(lambda x: attend(x, cu), qkv)
        return results, pullback((jnp.sin(results[0]), jnp.zeros_like(results[1])))

    one = jax.jit(f)
    want = jax.tree.map(lambda *x: jnp.stack(x), *[one(packed, row) for row in cu])
    assert_close(jax.jit(jax.vmap(f, (None, 1)))(packed, cu.T), want)
    many = normal(61, T, 3, 3, N, H)  # mapped axis 2
    want = jax.tree.map(lambda *x: jnp.stack(x), *[one(many[:, :, i], cu[0]) for i in range(3)])
    assert_close(jax.jit(jax.vmap(f, (2, None)))(many, cu[0]), want)


# Control flow, rematerialisation ------------------------------------------------------------------


def _layer(implementation, x):
    return x + jax_flash.attention(x, x, x, is_causal=True, implementation=implementation)


def test_checkpoint_with_named_residuals_does_not_recompute(implementation):
    x = normal(0, B, T, N, H)

    def loss(x):
        return jnp.sum(jnp.sin(_layer(implementation, x)))

    named = checkpoint_policies.save_only_these_names("attention_out", "attention_lse")
    want = jax.grad(loss)(x)
    for policy, forwards in ((named, 1), (None, 2), (checkpoint_policies.everything_saveable, 1)):
        gradient = jax.grad(jax.checkpoint(loss, policy=policy))
        assert calls(jax.make_jaxpr(gradient)(x)) == {
            "attention_forward": forwards,
            "attention_backward": 1,
        }
        assert_close(jax.jit(gradient)(x), want)


def test_checkpoint_with_half_of_the_residuals_recomputes(implementation):
    """The names really are two: saving one alone is not enough."""
    x = normal(0, B, T, N, H)

    def loss(x):
        return jnp.sum(jnp.sin(_layer(implementation, x)))

    policy = checkpoint_policies.save_only_these_names("attention_out")
    jaxpr = jax.make_jaxpr(jax.grad(jax.checkpoint(loss, policy=policy)))(x)
    assert calls(jaxpr)["attention_forward"] == 2


def test_scan_over_layers(implementation):
    x, scales = normal(0, B, T, N, H), jnp.array([0.5, 1.0, 2.0])

    def by_scan(x, scales, layer):
        step = jax.checkpoint(lambda x, scale: (layer(x * scale), jnp.sum(x)))
        return weighted(*jax.lax.scan(step, x, scales))

    def by_loop(x, scales, layer):
        sums = []
        for scale in scales:
            sums.append(jnp.sum(x))
            x = layer(x * scale)
        return weighted(x, jnp.stack(sums))

    ours = functools.partial(_layer, implementation)

    def gradient(f, layer):
        return jax.jit(jax.value_and_grad(lambda *a: f(*a, layer), (0, 1)))(x, scales)

    want = gradient(by_loop, lambda x: x + plain(x, x, x, allowed=programs.causal(T, T))[0])
    assert_close(gradient(by_scan, ours), want, 5e-5)


@pytest.mark.parametrize("policy", ["none", "named"])
def test_a_scan_runs_each_kernel_once_a_layer(implementation, policy):
    """In the compiled program: XLA for GPUs copies a custom call whose result it also stacks."""
    if implementation == "xla":
        pytest.skip("no custom call to count")
    jax.config.update("jax_disable_most_optimizations", False)
    x, weights = (normal(i, *shape, dtype=jnp.bfloat16) for i, shape in enumerate(_STACK))

    def layer(x, w):
        y = jax_flash.attention(x, x @ w, x, is_causal=True, implementation=implementation)
        return x + jnp.sin(y @ w), None

    if policy == "named":
        names = checkpoint_policies.save_only_these_names("attention_out", "attention_lse")
        layer = jax.checkpoint(layer, policy=names)

    def loss(x, weights):
        return jnp.sum(jnp.sin(jax.lax.scan(layer, x, weights)[0]), dtype=jnp.float32)

    text = jax.jit(jax.grad(loss, (0, 1))).lower(x, weights).compile().as_text()
    for name in ("forward", "backward"):
        assert text.count(f'custom_call_target="jax_flash.attention_{name}"') == 1


_STACK = (2, 256, 4, 64), (3, 64, 64)  # x; a matrix for each of the layers


def test_vmap_of_scan_with_a_mapped_carry(implementation):
    """Inside, options that are off become mapped along with what is on."""
    x = normal(0, 3, B, T, N, H)

    def f(x):
        return jax.lax.scan(lambda x, _: (_layer(implementation, x), None), x, None, length=2)[0]

    def loss(f):
        return lambda x: jnp.sum(jnp.sin(f(x)))

    got = jax.jit(jax.vmap(jax.grad(loss(f))))(x)
    want = jnp.stack([jax.grad(loss(f))(entry) for entry in x])
    assert_close(got, want)


def test_map_cond_and_while(implementation):
    queries = _three(0)
    _, key, value = qkv()
    attend = functools.partial(jax_flash.attention, implementation=implementation)
    want = jnp.stack([plain(q, key, value)[0] for q in queries])
    assert_close(jax.lax.map(lambda q: attend(q, key, value), queries), want)

    def either(flag, q):
        return jax.lax.cond(
            flag, lambda: attend(q, key, value), lambda: attend(q, key, value, is_causal=True)
        )

    def loss(q, flag):
        return jnp.sum(jnp.sin(either(flag, q)))

    allowed = programs.causal(T, S)
    for flag in (True, False):

        def formula(q, flag=flag):
            return jnp.sum(jnp.sin(plain(q, key, value, allowed=None if flag else allowed)[0]))

        assert_close(jax.jit(jax.grad(loss))(queries[0], flag), jax.grad(formula)(queries[0]))
    flags = jnp.array([True, False, True])
    got = jax.vmap(either, (0, 0))(flags, queries)  # cond becomes select
    causal = plain(queries[1], key, value, allowed=allowed)[0]
    assert_close(got, want.at[1].set(causal))
    last = jax.lax.fori_loop(0, 2, lambda _, q: attend(q, key, value[..., :H]), queries[0])
    twice = plain(plain(queries[0], key, value[..., :H])[0], key, value[..., :H])[0]
    assert_close(last, twice)


def test_eval_shape(implementation):
    shapes = [jax.ShapeDtypeStruct(x.shape, jnp.bfloat16) for x in qkv()]
    attend = functools.partial(
        jax_flash.attention, return_lse=True, return_residual=True, implementation=implementation
    )
    out, lse, residual = jax.eval_shape(attend, *shapes)
    assert (out.shape, out.dtype) == ((B, T, N, HV), jnp.bfloat16)
    assert (lse.shape, lse.dtype) == ((B, N, T), jnp.float32)
    assert (residual.shape, residual.dtype) == ((B, T, N), jnp.float32)


def test_donated_operands(implementation):
    x = qkv()
    attend = functools.partial(jax_flash.attention, implementation=implementation)
    value = normal(2, B, S, K, H)  # out then fits into query's buffer
    want = plain(*x[:2], value)[0]
    donated = jnp.array(x[0])
    assert_close(jax.jit(attend, donate_argnums=0)(donated, x[1], value), want)
    assert donated.is_deleted()


def test_disable_jit(implementation):
    ours, by_formula = _loss_pair(implementation, 0.0)
    want = jax.grad(by_formula)(*qkv())
    with jax.disable_jit():
        assert_close(jax.grad(ours)(*qkv()), want)


def test_debug_nans_with_empty_rows(implementation):
    """Rows without a key must not pass through NaN on their way to 0."""
    lengths = jnp.array([0, 5])

    def f(*x):
        out = jax_flash.attention(
            *x,
            is_causal=True,
            causal_offset=-2,
            key_value_seq_lengths=lengths,
            implementation=implementation,
        )
        return jnp.sum(out**2)

    with jax.debug_nans(True):
        loss, gradients = jax.jit(jax.value_and_grad(f, (0, 1, 2)))(*qkv())
        eager = jax.value_and_grad(f, (0, 1, 2))(*qkv())
    assert_close(eager, (loss, gradients))
    assert loss > 0 and not np.any(gradients[0][0]) and not np.any(gradients[0][1, :2])
    assert np.any(gradients[0][1, 3:])


def test_static_options_do_not_recompile(implementation):
    traced = []

    @jax.jit
    def f(x, key, lengths):
        traced.append(1)
        return jax_flash.attention(
            *x,
            dropout_rate=RATE,
            dropout_key=key,
            key_value_seq_lengths=lengths,
            implementation=implementation,
        )

    first = f(qkv(), KEYS[0], jnp.array([37, 2]))
    second = f(qkv(), KEYS[1], jnp.array([37, 2]))
    third = f(qkv(), KEYS[0], jnp.array([3, 2]))
    assert len(traced) == 1
    assert np.abs(first - second).max() > 1e-2 and np.abs(first - third).max() > 1e-2


# Packed forms -------------------------------------------------------------------------------------


def test_packed_gradient_is_one_array_equal_to_the_separate_calls(implementation):
    qkv = normal(70, B, T, 3, N, H)
    options = dict(
        is_causal=True, dropout_rate=RATE, dropout_key=KEYS[0], implementation=implementation
    )

    def separate(x):
        out, lse = jax_flash.attention(
            x[:, :, 0], x[:, :, 1], x[:, :, 2], **options, return_lse=True
        )
        return weighted(jnp.sin(out), lse)

    def packed(x):
        out, lse = jax_flash.attention_qkvpacked(x, **options, return_lse=True)
        return weighted(jnp.sin(out), lse)

    def kv_packed(x):
        out, lse = jax_flash.attention_kvpacked(x[:, :, 0], x[:, :, 1:], **options, return_lse=True)
        return weighted(jnp.sin(out), lse)

    want = jax.jit(jax.value_and_grad(separate))(qkv)
    assert_close(jax.jit(jax.value_and_grad(packed))(qkv), want, 2e-6)
    assert_close(jax.jit(jax.value_and_grad(kv_packed))(qkv), want, 2e-6)
    (backward,) = equations(jax.make_jaxpr(jax.grad(packed))(qkv), "attention_backward")
    assert [v.aval.shape for v in backward.outvars] == [qkv.shape, (0,), (0,)]
    (backward,) = equations(jax.make_jaxpr(jax.grad(kv_packed))(qkv), "attention_backward")
    assert [v.aval.shape for v in backward.outvars] == [(B, T, N, H), (B, T, 2, N, H), (0,)]


def test_packed_hessian_vector_product(implementation):
    qkv, direction = normal(70, B, T, 3, N, H), normal(71, B, T, 3, N, H)
    attend = functools.partial(jax_flash.attention_qkvpacked, implementation=implementation)

    def by_formula(x):
        return plain(*jnp.moveaxis(x, 2, 0))[0]

    def product(f):
        def slope(x):
            return jnp.vdot(jax.grad(lambda x: jnp.sum(jnp.sin(f(x))))(x), direction)

        return jax.jit(jax.grad(slope))(qkv)

    assert_close(product(attend), product(by_formula), 5e-5)


def test_varlen_hessian_vector_product(implementation):
    """Two sequences as varlen are the two alone."""
    x = (normal(80, 17, N, H), normal(81, 23, K, H), normal(82, 23, K, H))
    d = normal(83, 17, N, H)
    cu_q, cu_k = jnp.array([0, 6, 17], jnp.int32), jnp.array([0, 9, 23], jnp.int32)

    def ours(q, k, v):
        return jax_flash.varlen_attention(q, k, v, cu_q, cu_k, implementation=implementation)

    def by_formula(q, k, v):
        first = plain(q[:6], k[:9], v[:9])[0]
        return jnp.concatenate([first, plain(q[6:], k[9:], v[9:])[0]])

    def product(f):
        def slope(*x):
            return jnp.vdot(jax.grad(lambda *x: jnp.sum(jnp.sin(f(*x))))(*x), d)

        return jax.jit(jax.grad(slope, (0, 1, 2)))(*x)

    assert_close(product(ours), product(by_formula), 5e-5)
