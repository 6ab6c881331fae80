"""The rotary embedding: against its definition, and under JAX's transformations."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jax_flash
from jax_flash import RotaryTable, apply_rotary, apply_rotary_qkvpacked
from jax_flash.reference import rotary as reference
from jax_flash.rotary import rotate_pair
from tests import helpers, programs
from tests.programs import (
    assert_close,
    assert_equal,
    collectives,
    custom_calls,
    equations,
    installed,
    normal,
)

quick_compilation = programs.quick_compilation

# Where there is one, rows that begin at 0 bring no positions: see _ops/rotary.py.
on_one_or_several_devices = pytest.mark.parametrize("devices", [1, 8])
DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]
B, T, N, H, R, LENGTH = 2, 5, 3, 10, 6, 23
FORMS = {"half": False, "interleaved": True}
on_each = pytest.mark.parametrize(
    "implementation", ["xla", pytest.param("cuda", marks=pytest.mark.gpu)]
)


def table_of(dim=R, length=LENGTH, **options):
    return RotaryTable.make(length, dim, **options)


def plain(x, cos, sin, positions, interleaved, conjugate):
    """What one writes in jnp, in x's type; every position is in the table."""
    c, s = (jnp.asarray(t, x.dtype)[positions][..., None, :] for t in (cos, sin))
    s = -s if conjugate else s
    half = cos.shape[-1]
    turned, rest = x[..., : 2 * half], x[..., 2 * half :]
    pairs = turned.reshape(*turned.shape[:-1], *((half, 2) if interleaved else (2, half)))
    pairs = pairs if interleaved else pairs.swapaxes(-1, -2)
    x1, x2 = pairs[..., 0], pairs[..., 1]
    pairs = jnp.stack([x1 * c - x2 * s, x1 * s + x2 * c], -1)
    pairs = pairs if interleaved else pairs.swapaxes(-1, -2)
    return jnp.concatenate([pairs.reshape(turned.shape), rest], -1)


def with_gradient(f, x, dout):
    out, pullback = jax.vjp(f, x)
    return out, *pullback(dout)


def check(f, x, cos, sin, positions, *, interleaved=False, conjugate=False):
    """Result and gradient of f(x) against the definition."""
    dout = helpers.random(5, x.dtype, x.shape)[0]
    by_formula = functools.partial(
        plain, cos=cos, sin=sin, positions=positions, interleaved=interleaved, conjugate=conjugate
    )
    both = jax.jit(functools.partial(with_gradient, f))(x, dout)
    plain_both = jax.jit(functools.partial(with_gradient, by_formula))(x, dout)
    given = ((x, conjugate), (dout, not conjugate))  # the transpose turns back
    for name, got, by_jnp, (array, back) in zip(
        ("out", "dx"), both, plain_both, given, strict=True
    ):
        exact = reference.rotate(
            array, cos, sin, positions, interleaved=interleaved, conjugate=back
        )
        assert got.dtype == x.dtype
        helpers.assert_close(name, got, exact, by_jnp)
        rest = 2 * cos.shape[-1]
        assert_equal(got[..., rest:], array[..., rest:])


# The numbers --------------------------------------------------------------------------------------

# x, R: all of a head and a part, one pair, odd head dims, one row, no batch axis, two; on 16 bytes
# and not; more heads, and more pairs, than a block has threads
SHAPES = {
    "whole_head": ((2, 37, 3, 8), 8),
    "part": ((2, 5, 4, 11), 6),
    "one_pair_one_row": ((1, 3, 2), 2),
    "long": ((2, 1, 521, 2, 64), 64),
    "whole_chunks": ((2, 67, 17, 128), 128),
    "part_in_chunks": ((2, 13, 5, 96), 32),
    "chunks_for_queries_alone": ((3, 7, 6, 80), 40),
    "many_heads": ((2, 3, 601, 16), 16),
    "many_pairs": ((2, 3, 2, 1030), 1028),
    "many_chunks": ((1, 3, 2, 4160), 4160),
}


@on_each
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", SHAPES)
@on_one_or_several_devices
def test_rows_in_order(devices, case, form, dtype, implementation, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    shape, dim = SHAPES[case]
    x = helpers.random(1, dtype, shape)[0]
    table = table_of(dim, shape[-3] + 3, interleaved=FORMS[form])
    conjugate = case == "part"
    positions = np.arange(shape[-3])
    options = dict(conjugate=conjugate, implementation=implementation)
    f = functools.partial(apply_rotary, table=table, **options)
    given = (x, table.cos, table.sin, positions)
    check(f, *given, interleaved=FORMS[form], conjugate=conjugate)


ROWS, VARLEN = 13, reference.varlen_positions
CU = np.array([0, 0, 3, 3, 10, 12], np.int32)
CU_EACH = np.array([[0, 0, 3, 3, 10], [1, 4, 9, 9, 13]], np.int32)
STARTS = np.array([[0, 1, 2, 3], [9, 8, 0, 4]], np.int32)
IDS = np.arange(2 * ROWS).reshape(2, ROWS) % LENGTH

# options of the call, and the positions that they mean, for x [2, 13, 3, 10]
PLACED = {
    "offset": (dict(offsets=4), 4 + np.arange(ROWS)),
    "offsets": (dict(offsets=np.array([7, 0])), np.array([[7], [0]]) + np.arange(ROWS)),
    "positions": (dict(positions=IDS.astype(np.int16)), IDS),
    "shared_positions": (dict(positions=22 - np.arange(ROWS)), 22 - np.arange(ROWS)),
    "varlen": (dict(cu_seqlens=CU), VARLEN(CU, ROWS)),
    "varlen_offset": (dict(cu_seqlens=CU, offsets=3), VARLEN(CU, ROWS, np.full(5, 3))),
    "varlen_offsets": (
        dict(cu_seqlens=CU_EACH, offsets=STARTS),
        np.stack([VARLEN(CU_EACH[b], ROWS, STARTS[b]) for b in range(2)]),
    ),
}


@on_each
@pytest.mark.parametrize("case", PLACED)
def test_where_rows_stand(case, implementation):
    options, positions = PLACED[case]
    options = options | dict(implementation=implementation)
    x, table = normal(0, 2, ROWS, 3, 10), table_of(interleaved=case == "offsets")
    want = reference.rotate(x, table.cos, table.sin, positions, interleaved=table.interleaved)

    def calls(options):
        qkv = jnp.stack([x, x + 1, x], 2)
        return apply_rotary(x, table, **options), apply_rotary_qkvpacked(qkv, table, **options)

    # Known where the call is traced, and known to the device alone.
    traced = {name: value for name, value in options.items() if name != "implementation"}
    by_device = jax.jit(lambda traced: calls(options | traced))
    for out, packed in (jax.jit(lambda: calls(options))(), by_device(traced)):
        np.testing.assert_allclose(out, want, atol=2e-6)
        assert_equal(packed[:, :, 0], out)
        assert_equal(packed[:, :, 2], x)


@on_each
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scale_base", [None, 16.0])
@pytest.mark.parametrize("dims", [(H, R), (64, 64), (96, 48)], ids=str)
def test_packed(dims, scale_base, form, dtype, implementation):
    """Queries by one table, keys by the other, values untouched; one gradient for all three."""
    interleaved = FORMS[form]
    head_dim, dim = dims
    table = table_of(dim, scale_base=scale_base, interleaved=interleaved)
    keys = (table.cos, table.sin) if scale_base is None else (table.cos_k, table.sin_k)
    shape = (B, T, 3, N, head_dim)
    qkv, dout = helpers.random(3, dtype, shape, shape)
    before = qkv.copy()
    options = dict(table=table, implementation=implementation)
    f = functools.partial(apply_rotary_qkvpacked, **options)
    out, grad = jax.jit(functools.partial(with_gradient, f))(qkv, dout)
    for got, array, back in ((out, qkv, False), (grad, dout, True)):
        for i, tables in enumerate(((table.cos, table.sin), keys)):
            given = (array[:, :, i], *tables, np.arange(T))
            exact = reference.rotate(*given, interleaved=interleaved, conjugate=back)
            by_jnp = plain(*given, interleaved, back)
            helpers.assert_close("qk"[i], got[:, :, i], exact, by_jnp)
        assert_equal(got[:, :, 2], array[:, :, 2])
    assert_equal(qkv, before)
    tolerance = float(jnp.finfo(dtype).eps)  # XLA contracts products and sums as it likes
    for i in range(2):
        alone = apply_rotary(jnp.asarray(qkv[:, :, i]), is_key=i == 1, **options)
        assert_close(out[:, :, i], alone, 0 if implementation == "cuda" else tolerance)


@pytest.fixture
def one_device(monkeypatch):
    """As a program of one device: the pair is for those."""
    monkeypatch.setattr(jax, "device_count", lambda: 1)


@on_each
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scale_base", [None, 16.0])
@pytest.mark.parametrize("dims", [(H, R, 2), (64, 64, 1), (96, 48, 4)], ids=str)
def test_pair(dims, scale_base, form, dtype, implementation, one_device):
    """Queries and keys, of other numbers of heads, as each of them alone, in one call."""
    head_dim, dim, kv_heads = dims
    table = table_of(dim, scale_base=scale_base, interleaved=FORMS[form])
    shapes = (B, T, N, head_dim), (B, T, kv_heads, head_dim)
    query, key, *cotangents = map(jnp.asarray, helpers.random(3, dtype, *shapes, *shapes))
    places = dict(positions=jnp.array([[0, 4, -1, 22, 7], [1, 1, 2, 20, 0]]))
    pair = functools.partial(rotate_pair, table=table, implementation=implementation, **places)

    def both(query, key, cotangents):
        out, pullback = jax.vjp(pair, query, key)
        return *out, *pullback(tuple(cotangents))

    got = jax.jit(both)(query, key, cotangents)
    assert "rotary_pair" in str(jax.make_jaxpr(both)(query, key, cotangents))
    tolerance = 0 if implementation == "cuda" else float(jnp.finfo(dtype).eps)
    for i, (x, dout) in enumerate(zip((query, key), cotangents, strict=True)):
        options = dict(table=table, is_key=i == 1, implementation=implementation, **places)
        alone = with_gradient(functools.partial(apply_rotary, **options), x, dout)
        for y, want in zip(got[i::2], alone, strict=True):
            assert_close(y, want, tolerance)


@on_each
@pytest.mark.parametrize("how", ["plain", "vmap", "vmap_of_tables", "packed"])
def test_rows_that_bring_no_positions(how, implementation, one_device):
    """As with positions 0, 1, ...: one operand less."""
    x, table = normal(0, 3, B, T, N, H), jax.device_put(table_of(scale_base=16.0))
    by = apply_rotary_qkvpacked if how == "packed" else apply_rotary

    def call(x, table):
        return by(x, table, implementation=implementation)

    def counted(x, table):
        return by(x, table, implementation=implementation, positions=jnp.arange(T))

    if how == "packed":
        x = jnp.moveaxis(x, 0, 2)
    elif how == "vmap":
        call, counted = (jax.vmap(f, (0, None)) for f in (call, counted))
    elif how == "vmap_of_tables":
        table = jax.tree.map(lambda t: jnp.stack([t, t + 1, t * 2]), table)
        call, counted = jax.vmap(call), jax.vmap(counted)
    assert_equal(jax.jit(call)(x, table), jax.jit(counted)(x, table))
    (equation,) = equations(jax.make_jaxpr(call)(x, table), "rotary")
    assert equation.invars[-1].aval.shape == (0,)


@on_each
@pytest.mark.parametrize("axes", [(0, 0), (0, None), (None, 0)])
def test_vmap_of_a_pair(axes, implementation, one_device):
    query, key, table = normal(0, 3, B, T, N, H), normal(1, 3, B, T, 1, H), table_of()
    options = dict(table=table, offsets=3, implementation=implementation)
    given = [x if axis == 0 else x[0] for x, axis in zip((query, key), axes, strict=True)]
    got = jax.jit(jax.vmap(functools.partial(rotate_pair, **options), axes))(*given)
    for x, y, axis in zip((query, key), got, axes, strict=True):
        want = apply_rotary(x, **options)
        assert_close(y, want if axis == 0 else jnp.broadcast_to(want[0], want.shape))


def test_pair_that_is_none(one_device, monkeypatch):
    """Other rows, and programs of several devices, take two calls."""
    query, key, table = normal(0, B, T, N, H), normal(1, B, T + 1, 2, H), table_of()
    text = str(jax.make_jaxpr(functools.partial(rotate_pair, table=table))(query, key))
    assert "rotary_pair" not in text and text.count("rotary[") == 2
    monkeypatch.undo()
    text = str(jax.make_jaxpr(functools.partial(rotate_pair, table=table))(query, key[:, :T]))
    assert ("rotary_pair" in text) == (jax.device_count() == 1)
    for x, got in zip((query, key), rotate_pair(query, key, table), strict=True):
        assert_close(got, apply_rotary(x, table))


@pytest.mark.parametrize("form", FORMS)
def test_pair_lowers_for_cuda(form, one_device):
    def loss(query, key):
        turned = rotate_pair(query, key, table_of(interleaved=FORMS[form]))
        return sum(jnp.sum(jnp.sin(x)) for x in turned)

    f = jax.jit(jax.grad(loss, (0, 1)))
    given = normal(0, B, T, N, H), normal(1, B, T, 1, H)
    text = f.trace(*given).lower(lowering_platforms=("cuda",)).as_text()
    arrays = ["1x1x2x5x3x10xf32", "1x1x2x5x1x10xf32"]
    table, off = "1x1x1x23x3xf32", "0xf32"
    operands = [*arrays, table, table, off, off, "0xi32"]
    assert custom_calls(text) == [("jax_flash.rotary_pair", operands, arrays)] * 2


@on_each
def test_what_is_written_over_may_be_needed_again(implementation):
    """The packed result takes qkv's memory, unless somebody reads qkv later."""
    qkv = normal(0, B, T, 3, N, H)
    f = functools.partial(apply_rotary_qkvpacked, implementation=implementation)

    def both(x, table):
        x = 2 * x
        return f(x, table), x

    table = table_of()
    turned, doubled = jax.jit(both)(qkv, jax.device_put(table))
    assert_equal(doubled, 2 * np.asarray(qkv))
    assert_close(turned, f(2 * qkv, table))


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS)
def test_more_elements_than_int32_counts_cuda(form):
    """Offsets of 64 bits: the last rows of 2.2e9 elements are those of a small call."""
    x = jax.random.normal(jax.random.key(0), (2, 34_000, 256, 128), jnp.bfloat16)
    table = table_of(128, x.shape[1], interleaved=FORMS[form])
    got = jax.jit(lambda x: apply_rotary(x, table, implementation="cuda"))(x)[1, -3:]
    assert_equal(got, apply_rotary(x[1, -3:], table, offsets=33_997, implementation="cuda"))


def test_table():
    """The formula, in float64 before it is rounded; the same arguments give the same arrays."""
    length, dim = 1000, 8
    table = RotaryTable.make(length, dim, base=500.0, scale_base=512.0)
    angle = reference.angles(length, dim, 500.0)
    scale = reference.xpos_scale(length, dim, 512.0)
    for got, want in (
        (table.cos, np.cos(angle) * scale),
        (table.sin, np.sin(angle) * scale),
        (table.cos_k, np.cos(angle) / scale),
        (table.sin_k, np.sin(angle) / scale),
    ):
        assert got.dtype == np.float32 and not got.flags.writeable
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-7)
    assert RotaryTable.make(length, dim, base=500, scale_base=512) is table
    half = RotaryTable.make(length, dim, base=500.0, scale_base=512.0, dtype=jnp.bfloat16)
    assert half.cos.dtype == jnp.bfloat16
    assert_equal(half.sin_k, table.sin_k.astype(jnp.bfloat16))
    assert RotaryTable.make(length, dim).cos_k is None


def test_scores_depend_on_distances_alone():
    """What the embedding is for, xPos too: q . k is the same wherever the pair stands."""
    table = RotaryTable.make(64, H, scale_base=32.0)
    query, key = normal(0, 1, N, H), normal(1, 1, N, H)

    def scores(at):
        q = apply_rotary(query, table, offsets=at + 7)
        return jnp.sum(q * apply_rotary(key, table, offsets=at, is_key=True), -1)

    assert_close(scores(40), scores(0))
    assert float(jnp.abs(scores(0) - jnp.sum(query * key, -1)).min()) > 1e-2


def test_conjugate_is_the_inverse():
    x = normal(0, B, T, N, H)
    table = table_of(interleaved=True)
    assert_close(apply_rotary(apply_rotary(x, table), table, conjugate=True), x)


def test_float64():
    with jax.enable_x64(True):
        x = np.random.default_rng(0).standard_normal((T, N, H))
        table = table_of(dtype=jnp.float64)
        want = reference.rotate(x, table.cos, table.sin, np.arange(T))
        got = apply_rotary(x, table)
        assert got.dtype == np.float64
        np.testing.assert_allclose(got, want, atol=1e-15)


@on_each
def test_positions_that_only_the_device_knows(implementation):
    """Negative: the row is copied; beyond the table: NaN where it would be turned; no other row
    feels it. Wrong cu_seqlens are clamped and made monotonic."""
    x, table = normal(0, T, N, H), table_of(scale_base=16.0)  # position 0 scales
    by = functools.partial(apply_rotary, table=table, implementation=implementation)
    f = jax.jit(lambda x, p: with_gradient(lambda x: by(x, positions=p), x, x))
    given = np.array([-1, LENGTH, LENGTH - 1, np.iinfo(np.int32).max, np.iinfo(np.int32).min])
    for got, back in zip(f(x, given.astype(np.int32)), (False, True), strict=True):
        want = reference.rotate(x, table.cos, table.sin, given, conjugate=back)
        np.testing.assert_allclose(got, want, atol=2e-6)
        assert np.isnan(want[[1, 3], :, :R]).all() and np.isnan(want).sum() == 2 * N * R
    g = jax.jit(lambda x, cu: by(x, cu_seqlens=cu))
    for cu in ([-3, 2, 1, 99], [4, 2, 2, 3], [9, 9, 9, 9]):
        want = reference.rotate(x, table.cos, table.sin, reference.varlen_positions(cu, T))
        np.testing.assert_allclose(g(x, np.array(cu, np.int32)), want, atol=2e-6)
    beyond = jax.jit(lambda x, at: by(x, offsets=at))(x, jnp.int32(LENGTH - 2))
    np.testing.assert_array_equal(np.isnan(beyond).any((1, 2)), [False, False, True, True, True])


@pytest.mark.parametrize("shape", [(0, T, N, H), (B, 0, N, H), (B, T, 0, H)])
def test_nothing(shape):
    out, grad = with_gradient(
        lambda x: apply_rotary(x, table_of()), jnp.zeros(shape), jnp.zeros(shape)
    )
    assert out.shape == grad.shape == shape
    packed = (*shape[:-2], 3, *shape[-2:])
    assert apply_rotary_qkvpacked(jnp.zeros(packed), table_of()).shape == packed


# Transformations ----------------------------------------------------------------------------------


def test_second_derivative_and_the_tables_have_none():
    x, direction, table = normal(0, T, N, H), normal(1, T, N, H), table_of(scale_base=16.0)
    positions = np.arange(T)

    def product(f):
        def slope(x):
            return jnp.vdot(jax.grad(lambda x: jnp.sum(jnp.sin(f(x))))(x), direction)

        return jax.jit(jax.grad(slope))(x)

    by_formula = functools.partial(
        plain,
        cos=table.cos,
        sin=table.sin,
        positions=positions,
        interleaved=False,
        conjugate=False,
    )
    assert_close(product(lambda x: apply_rotary(x, table)), product(by_formula))
    gradient = jax.grad(lambda t: jnp.sum(apply_rotary(x, t)))(jax.device_put(table))
    assert all(not leaf.any() for leaf in jax.tree.leaves(gradient))


def test_nothing_of_the_size_of_x_is_kept():
    x, table = normal(0, B, T, N, H), table_of()
    _, pullback = jax.vjp(lambda x: apply_rotary(x, table), x)
    assert all(leaf.size < x.size for leaf in jax.tree.leaves(pullback))
    jaxpr = jax.make_jaxpr(jax.grad(lambda x: jnp.sum(apply_rotary(x, table))))(x)
    assert [e.params["config"].conjugate for e in equations(jaxpr, "rotary")] == [False, True]


MAPPED = {
    "x": (0, None, None),
    "cos": (None, 0, None),
    "positions": (None, None, 0),
    "all": (2, 1, -1),
    "tables_and_positions": (None, 0, 1),
}


@on_each
@pytest.mark.parametrize("case", MAPPED)
def test_vmap_of_any_operand(case, implementation):
    axes = MAPPED[case]
    x, table = normal(0, 4, B, T, N, H), table_of()
    tables = jnp.stack([table.cos, table.cos + 1, table.sin, table.cos])
    positions = jax.random.randint(jax.random.key(1), (4, B, T), 0, LENGTH)
    operands = (x, tables, positions)

    def f(x, cos, positions):
        options = dict(positions=positions, implementation=implementation)
        call = functools.partial(apply_rotary, table=RotaryTable(cos, cos + 2), **options)
        return with_gradient(call, x, jnp.cos(x))

    given = [a[0] if i is None else jnp.moveaxis(a, 0, i) for a, i in zip(operands, axes)]
    each = [f(*(a[0 if i is None else k] for a, i in zip(operands, axes))) for k in range(4)]
    want = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
    assert_close(jax.jit(jax.vmap(f, axes))(*given), want)


@on_each
def test_vmap_of_packed_operands_with_two_tables(implementation):
    qkv, table = normal(0, 4, T, 3, N, H), table_of(scale_base=16.0)
    starts = jnp.array([0, 3, 9, 18], jnp.int32)

    def f(qkv, at, cos_k):
        own = RotaryTable(table.cos, table.sin, cos_k, table.sin_k)
        options = dict(table=own, offsets=at, implementation=implementation)
        call = functools.partial(apply_rotary_qkvpacked, **options)
        return with_gradient(call, qkv, jnp.cos(qkv))

    cos_k = jnp.stack([table.cos_k + i for i in range(4)])
    each = [f(qkv[i], starts[i], cos_k[i]) for i in range(4)]
    want = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
    assert_close(jax.jit(jax.vmap(f))(qkv, starts, cos_k), want)


@installed("cuda")
@on_one_or_several_devices
def test_lowers_for_cuda(devices, monkeypatch):
    """One custom call a direction; packed, the result takes the memory of what comes."""
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    positions = "0xi32" if devices == 1 else "1x1x1x5xi32"

    def lowered(table, **options):
        f = jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(apply_rotary(x, table, **options)))))
        return f.trace(normal(0, B, T, N, H)).lower(lowering_platforms=("cuda",)).as_text()

    assert not custom_calls(lowered(table_of(), implementation="xla"))
    assert len(custom_calls(lowered(table_of()))) == 2
    text = lowered(table_of(interleaved=True))
    whole, table, off = "1x1x2x5x3x10xf32", "1x1x1x23x3xf32", "0xf32"
    operands = [whole, table, table, off, off, positions]
    assert custom_calls(text) == [("jax_flash.rotary", operands, [whole])] * 2
    assert "output_operand_alias<" not in text and "gather" not in text
    g = jax.jit(lambda x: apply_rotary_qkvpacked(x, table_of(scale_base=16.0)))
    text = g.trace(normal(0, B, T, 3, N, H)).lower(lowering_platforms=("cuda",)).as_text()
    packed = "1x1x2x5x3x3x10xf32"
    operands = [packed, *[table] * 4, positions]
    assert custom_calls(text) == [("jax_flash.rotary", operands, [packed])]
    assert "output_operand_alias<output_tuple_indices = [], operand_index = 0" in text


def test_jit_scan_and_export():
    """The table is an argument like any other, its form a static part of it."""
    table = jax.device_put(table_of(interleaved=True))
    x = normal(0, 3, B, T, N, H)
    f = jax.jit(lambda x, table, at: apply_rotary(x, table, offsets=at))
    want = jnp.stack([apply_rotary(x[i], table, offsets=i) for i in range(3)])

    def step(at, x):
        return at + 1, f(x, table, at)

    assert_close(jax.lax.scan(step, jnp.int32(0), x)[1], want)
    (batch,) = jax.export.symbolic_shape("b")
    shape = jax.ShapeDtypeStruct((batch, T, N, H), jnp.float32)
    exported = jax.export.export(
        jax.jit(lambda x: apply_rotary(x, table)), disabled_checks=jax_flash.export_checks()
    )(shape)
    assert_close(jax.export.deserialize(exported.serialize()).call(x[0]), want[0])


def test_packed_in_place():
    """A donated qkv is where the result goes."""
    qkv = normal(0, B, T, 3, N, H)
    f = jax.jit(lambda x: apply_rotary_qkvpacked(x, table_of()), donate_argnums=0)
    assert f.lower(qkv).compile().memory_analysis().alias_size_in_bytes == qkv.nbytes


# Sharding -----------------------------------------------------------------------------------------

CUT = {
    "batch_and_heads": (P("a", None, "b"), P("a"), False),
    "rows": (P(None, ("a", "b")), P(), False),
    "rows_and_heads": (P(None, "b", "a"), P(None, "b"), False),
    "head_dim": (P("a", None, None, "b"), P("a"), True),
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("case", CUT)
def test_sharded(case, packed):
    """Batch, rows and heads move nothing; a head dim that is cut is gathered."""
    spec, positions_spec, gathers = CUT[case]
    mesh = jax.sharding.Mesh(np.array(jax.devices("cpu")[:8]).reshape(2, 4), ("a", "b"))
    x = normal(0, 4, 8, 4, 12)
    positions = jax.random.randint(jax.random.key(1), (4, 8), 0, LENGTH)
    table = table_of(scale_base=16.0)
    call = apply_rotary_qkvpacked if packed else apply_rotary
    if packed:
        x = jnp.stack([x, x + 1, x], 2)
        spec = P(*spec[:2], None, *spec[2:])

    def f(x, positions):
        by_ids = with_gradient(lambda x: call(x, table, positions=positions), x, jnp.cos(x))
        return *by_ids, call(x, table, offsets=3)

    want = jax.jit(f)(x, positions)
    placed = [
        jax.device_put(x, NamedSharding(mesh, spec)),
        jax.device_put(positions, NamedSharding(mesh, positions_spec)),
    ]
    compiled = jax.jit(f).lower(*placed).compile()
    traffic = collectives(compiled.as_text())
    got = compiled(*placed)
    assert set(traffic) == ({"all-gather"} if gathers else set())
    assert_close(jax.device_get(got), jax.device_get(want), 1e-6)
    if not gathers:
        assert all(y.sharding.is_equivalent_to(placed[0].sharding, y.ndim) for y in got)


def test_cut_rows_without_positions(one_device):
    """Rows are gathered: a device whose rows are not the first would count them from 0."""
    mesh = jax.sharding.Mesh(np.array(jax.devices("cpu")[:8]).reshape(2, 4), ("a", "b"))
    x, table = normal(0, 4, 8, 4, 12), table_of(scale_base=16.0)
    f = jax.jit(lambda x: with_gradient(lambda x: apply_rotary(x, table), x, jnp.cos(x)))
    (equation, *_) = equations(jax.make_jaxpr(f)(x), "rotary")
    assert equation.invars[-1].aval.shape == (0,)
    placed = jax.device_put(x, NamedSharding(mesh, P("a", "b")))
    compiled = f.lower(placed).compile()
    assert set(collectives(compiled.as_text())) == {"all-gather"}
    assert_close(jax.device_get(compiled(placed)), jax.device_get(f(x)), 1e-6)


def test_shard_map():
    """A device knows only its own rows: it gives their positions."""
    mesh = jax.sharding.Mesh(np.array(jax.devices("cpu")[:4]), ("a",))
    x, table = normal(0, B, 8, N, H), table_of()

    def local(x):
        return apply_rotary(x, table, offsets=2 * jax.lax.axis_index("a"))

    f = jax.shard_map(local, mesh=mesh, in_specs=P(None, "a"), out_specs=P(None, "a"))
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(f(x)))))
    want = jax.grad(lambda x: jnp.sum(jnp.sin(apply_rotary(x, table))))(x)
    assert_close(jax.device_get(gradient(x)), jax.device_get(want), 1e-6)


# Bad input ----------------------------------------------------------------------------------------

X, TABLE = np.zeros((B, T, N, H), np.float32), RotaryTable.make(LENGTH, R)
# x, table, options, the exception, and what its text must say
REFUSED = {
    "integers": (X.astype(int), TABLE, {}, TypeError, "x: expected a floating-point array"),
    "rank": (X[0, 0], TABLE, {}, ValueError, "x: expected at least 3 axes"),
    "no_table": (X, TABLE.cos, {}, TypeError, "table: expected a RotaryTable, got ndarray"),
    "head_dim": (
        X[..., :5],
        TABLE,
        {},
        ValueError,
        r"table.cos: expected tables of at most 2 pairs, for a head dim of 5, got shape \(23, 3\)",
    ),
    "sin_shape": (
        X,
        RotaryTable(TABLE.cos, TABLE.sin[1:]),
        {},
        ValueError,
        r"table.sin: expected the same shape .* got shape \(22, 3\)",
    ),
    "one_key_table": (
        X,
        RotaryTable(TABLE.cos, TABLE.sin, TABLE.cos),
        {},
        ValueError,
        "table: expected both of cos_k and sin_k, or neither",
    ),
    "table_type": (
        X,
        RotaryTable(TABLE.cos, TABLE.sin.astype(int)),
        {},
        TypeError,
        "table.sin: expected a floating-point array, got int",
    ),
    "too_many_rows": (
        np.zeros((LENGTH + 1, N, H), np.float32),
        TABLE,
        {},
        ValueError,
        r"offsets: expected positions in \[0, 23\), which the table has, got positions 0 to 23",
    ),
    "offset_beyond": (X, TABLE, dict(offsets=19), ValueError, "got positions 19 to 23"),
    "offset_negative": (X, TABLE, dict(offsets=-1), ValueError, "got positions -1 to 3"),
    "offsets_shape": (
        X,
        TABLE,
        dict(offsets=np.zeros(3, int)),
        ValueError,
        r"offsets: expected an int or shape \(2,\), got shape \(3,\)",
    ),
    "offsets_type": (X, TABLE, dict(offsets=1.5), TypeError, "offsets: expected integers"),
    "positions_beyond": (
        X,
        TABLE,
        dict(positions=np.full(T, LENGTH)),
        ValueError,
        "positions: expected positions in",
    ),
    "positions_shape": (
        X,
        TABLE,
        dict(positions=np.zeros((B, T - 1), int)),
        ValueError,
        r"positions: expected shape \(5,\) or \(2, 5\), got shape \(2, 4\)",
    ),
    "positions_batch": (
        X,
        TABLE,
        dict(positions=np.zeros((3, T), int)),
        ValueError,
        r"positions: expected shape .* got shape \(3, 5\)",
    ),
    "both": (
        X,
        TABLE,
        dict(positions=np.arange(T), offsets=1),
        ValueError,
        "offsets: expected None, as positions says where each row stands, got both",
    ),
    "varlen_offsets": (
        X[0],
        TABLE,
        dict(cu_seqlens=np.array([0, 2, 5], np.int32), offsets=np.zeros(3, int)),
        ValueError,
        r"offsets: expected an int, shape \(2,\) or \(2,\), got shape \(3,\)",
    ),
    "varlen_beyond": (
        X[0],
        TABLE,
        dict(cu_seqlens=np.array([0, 0, 5], np.int32), offsets=np.array([99, 19])),
        ValueError,
        "offsets: expected positions in .* got positions 19 to 23",
    ),
    "cu_seqlens": (
        X[0],
        TABLE,
        dict(cu_seqlens=np.array([0, 6], np.int32)),
        ValueError,
        r"cu_seqlens: expected non-decreasing values in \[0, 5\]",
    ),
    "flag": (X, TABLE, dict(conjugate=1), TypeError, "conjugate: expected a Python bool"),
    "cpu": (
        X,
        TABLE,
        dict(implementation="cpu"),
        NotImplementedError,
        "implementation='cpu': rotary has no cpu kernels",
    ),
    "unknown": (
        X,
        TABLE,
        dict(implementation="triton"),
        ValueError,
        "implementation: expected one of .* got 'triton'",
    ),
}


def assert_refused(call, error, text):
    with pytest.raises(error) as caught:
        call()
    assert re.search(text, str(caught.value)), str(caught.value)


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    x, table, options, error, text = REFUSED[case]
    assert_refused(
        lambda: jax.eval_shape(lambda x: apply_rotary(x, table, **options), x), error, text
    )


def test_refused_packed_and_tables():
    make = RotaryTable.make
    for call, error, text in (
        (
            lambda: apply_rotary_qkvpacked(X, TABLE),
            ValueError,
            r"qkv: expected \[\*B, T, 3, N, H\]",
        ),
        (lambda: make(8, 3), ValueError, "dim: expected an even number, got 3"),
        (lambda: make(0, 4), ValueError, "length: expected a positive int, got 0"),
        (lambda: make(8, 4, base=0), ValueError, "base: expected a positive number, got 0"),
        (lambda: make(8, 4, scale_base=-1), ValueError, "scale_base: expected a positive number"),
        (lambda: make(8, 4, dtype=int), TypeError, "dtype: expected a floating-point type"),
    ):
        assert_refused(call, error, text)
