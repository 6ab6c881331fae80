"""Attention shared by eight host devices: numbers of one device, no traffic where none is due."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_flash
from tests import programs
from tests.programs import assert_close, collectives, installed, normal, plain

quick_compilation = programs.quick_compilation

T, S, H, HV = 6, 10, 8, 16
RATE = 0.25


@pytest.fixture(params=["xla", pytest.param("cpu", marks=installed("cpu"))])
def implementation(request):
    with jax.default_device(jax.devices("cpu")[0]):
        yield request.param


def mesh_of(*sizes, kind=AxisType.Auto):
    """A mesh with axes "a", "b" of eight host devices."""
    names = ("a", "b")[: len(sizes)]
    devices = np.array(jax.devices("cpu")[: int(np.prod(sizes))]).reshape(sizes)
    return jax.sharding.Mesh(devices, names, axis_types=(kind,) * len(sizes))


def qkv(batch, heads, kv_heads, seed=0):
    return (
        normal(seed, batch, T, heads, H),
        normal(seed + 1, batch, S, kv_heads, H),
        normal(seed + 2, batch, S, kv_heads, HV),
    )


def everything(implementation, query, key, value, lengths, dropout_key):
    """(out, lse), (dq, dk, dv) of a call with the options that devices could get wrong."""

    def attend(q, k, v):
        return jax_flash.attention(
            q,
            k,
            v,
            is_causal=True,
            causal_offset=2,
            key_value_seq_lengths=lengths,
            dropout_rate=RATE,
            dropout_key=dropout_key,
            return_lse=True,
            implementation=implementation,
        )

    results, pullback = jax.vjp(attend, query, key, value)
    return results, pullback((jnp.cos(results[0]) + 1, jnp.sin(results[0][..., 0]).swapaxes(1, 2)))


KEY = np.array([3, 9], np.uint32)


def lengths_of(batch):
    return jnp.asarray(3 + np.arange(batch) % 8, jnp.int32)


@functools.cache
def on_one_device(implementation, batch, heads, kv_heads):
    f = jax.jit(functools.partial(everything, implementation))
    return jax.device_get(f(*qkv(batch, heads, kv_heads), lengths_of(batch), KEY))


def put(mesh, arrays, specs):
    return [
        jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(arrays, specs, strict=True)
    ]


def run(f, *args):
    """(results, collectives of the compiled program)."""
    compiled = jax.jit(f).lower(*args).compile()
    return compiled(*args), collectives(compiled.as_text())


def same_sharding(array, mesh, spec):
    return array.sharding.is_equivalent_to(NamedSharding(mesh, spec), array.ndim)


HEADS = P(None, None, "a")

# mesh, (batch, heads, kv heads), specs of query and of key and value, of the lengths, of lse
FREE = {
    "batch": ((8,), (8, 4, 2), P("a"), P("a"), P("a"), P("a")),
    "heads": ((8,), (3, 16, 8), HEADS, HEADS, P(), P(None, "a")),
    "batch_and_heads": (
        (2, 4),
        (2, 8, 4),
        P("a", None, "b"),
        P("a", None, "b"),
        P("a"),
        P("a", "b"),
    ),
    "batch_over_two_axes": ((2, 4), (8, 4, 2), P(("a", "b")), P(("a", "b")), P(), P(("a", "b"))),
}


@pytest.mark.parametrize("case", FREE)
def test_jit_of_sharded_operands_needs_no_collective(implementation, case):
    sizes, shape, q_spec, kv_spec, lengths_spec, lse_spec = FREE[case]
    mesh = mesh_of(*sizes)
    arrays = put(
        mesh, (*qkv(*shape), lengths_of(shape[0])), (q_spec, kv_spec, kv_spec, lengths_spec)
    )
    results, traffic = run(functools.partial(everything, implementation), *arrays, KEY)
    assert traffic == {}
    assert_close(results, on_one_device(implementation, *shape), 2e-6)
    (out, lse), gradients = results
    assert same_sharding(out, mesh, q_spec) and same_sharding(lse, mesh, lse_spec)
    for gradient, spec in zip(gradients, (q_spec, kv_spec, kv_spec), strict=True):
        assert same_sharding(gradient, mesh, spec)


# mesh, (batch, heads, kv heads), specs of query and of key and value: fewer kv heads than devices.
SHARED_KV_HEADS = {
    "two_devices_a_kv_head": ((2, 4), (2, 8, 2), P("a", None, "b"), P("a")),
    "one_kv_head": ((4,), (3, 8, 1), HEADS, P()),
    "two_axes_on_the_heads": ((2, 4), (3, 16, 4), P(None, None, ("a", "b")), P()),
}


def assert_only_keys_and_values_move(traffic):
    """Sums of dk and dv over devices; XLA may cut a sum and gather it."""
    assert set(traffic) in ({"all-reduce"}, {"all-reduce", "all-gather"})
    for shapes in traffic.values():
        assert all(S in shape and T not in shape for shape in shapes)


@pytest.mark.parametrize("case", SHARED_KV_HEADS)
def test_devices_that_share_a_kv_head(implementation, case):
    """The forward moves nothing; the backward only what the gradients of keys and values need."""
    sizes, shape, q_spec, kv_spec = SHARED_KV_HEADS[case]
    mesh = mesh_of(*sizes)
    arrays = put(mesh, (*qkv(*shape), lengths_of(shape[0])), (q_spec, kv_spec, kv_spec, P()))
    f = functools.partial(everything, implementation)
    _, traffic = run(lambda *x: f(*x)[0], *arrays, KEY)
    assert traffic == {}
    results, traffic = run(f, *arrays, KEY)
    assert_only_keys_and_values_move(traffic)
    assert_close(results, on_one_device(implementation, *shape), 2e-6)
    assert same_sharding(results[0][0], mesh, q_spec)
    assert same_sharding(results[1][0], mesh, q_spec)


def test_packed_keys_of_which_devices_share_a_head(implementation):
    mesh = mesh_of(4)
    query, kv = normal(0, 2, T, 8, H), normal(1, 2, S, 2, 2, H)
    attend = functools.partial(jax_flash.attention_kvpacked, implementation=implementation)
    gradient = jax.grad(lambda *x: jnp.sum(jnp.sin(attend(*x))), (0, 1))
    got, traffic = run(gradient, *put(mesh, (query, kv), (HEADS, P())))
    assert_only_keys_and_values_move(traffic)
    assert_close(got, jax.jit(gradient)(query, kv), 2e-6)


# The numbers must be right for every sharding, and these cannot all be free of traffic.
COSTLY = {
    "kv_heads_not_divisible": ((4,), (3, 12, 3), HEADS, P()),
    "queries_cut": ((2,), (2, 4, 2), P(None, "a"), P()),
    "keys_cut": ((2,), (2, 4, 2), P(), P(None, "a")),
    "head_dim_cut": ((2,), (2, 4, 2), P(None, None, None, "a"), P(None, None, None, "a")),
    "query_by_batch_key_by_heads": ((2,), (2, 4, 2), P("a"), HEADS),
}


@pytest.mark.parametrize("case", COSTLY)
def test_jit_of_any_sharding_is_right(implementation, case):
    sizes, shape, q_spec, kv_spec = COSTLY[case]
    arrays = put(
        mesh_of(*sizes), (*qkv(*shape), lengths_of(shape[0])), (q_spec, kv_spec, kv_spec, P())
    )
    results, _ = run(functools.partial(everything, implementation), *arrays, KEY)
    assert_close(results, on_one_device(implementation, *shape), 2e-6)


def test_replicated_keys_join_sharded_queries_without_traffic(implementation):
    """One operand says how the call is cut; what is whole on every device is sliced there."""
    mesh, shape = mesh_of(8), (8, 4, 2)
    arrays = put(mesh, qkv(*shape), (P("a"), P(), P()))
    attend = functools.partial(jax_flash.attention, implementation=implementation)
    out, traffic = run(attend, *arrays)
    assert traffic == {} and same_sharding(out, mesh, P("a"))
    assert_close(out, plain(*qkv(*shape))[0])


def test_the_dropout_mask_is_that_of_one_device(implementation):
    """Values that are the identity give the probabilities: what is dropped is an exact zero."""
    batch, heads, size = 4, 4, 16
    query, key, _ = (x[:, :1].repeat(size, 1) for x in qkv(batch, heads, heads))
    value = jnp.broadcast_to(jnp.eye(size)[:, None], (batch, size, heads, size))

    def dropped(query, key, value):
        out = jax_flash.attention(
            query, key, value, dropout_rate=RATE, dropout_key=KEY, implementation=implementation
        )
        return out == 0

    want = np.asarray(jax.jit(dropped)(query, key, value))
    assert 0.2 < want.mean() < 0.3
    assert len({row.tobytes() for row in np.moveaxis(want, 2, 1).reshape(-1, size * size)}) == 16
    for sizes, spec in (((4,), P("a")), ((2,), HEADS), ((2, 4), P("a", None, "b"))):
        arrays = put(mesh_of(*sizes), (query, key, value), (spec,) * 3)
        np.testing.assert_array_equal(jax.jit(dropped)(*arrays), want)


@pytest.mark.parametrize("spec", [P("a"), P(None, None, "a")], ids=["batch", "heads"])
def test_eager_calls_keep_the_sharding(implementation, spec):
    mesh, shape = mesh_of(4), (4, 8, 4)
    attend = functools.partial(jax_flash.attention, implementation=implementation)
    out = attend(*put(mesh, qkv(*shape), (spec,) * 3))
    assert same_sharding(out, mesh, spec)
    assert_close(out, plain(*qkv(*shape))[0])


def test_packed_calls(implementation):
    mesh = mesh_of(2, 4)
    spec = P("a", None, None, "b")
    qkv = normal(0, 2, T, 3, 8, H)
    attend = functools.partial(
        jax_flash.attention_qkvpacked,
        is_causal=True,
        dropout_rate=RATE,
        dropout_key=KEY,
        implementation=implementation,
    )
    gradient = jax.grad(lambda x: jnp.sum(jnp.sin(attend(x))))
    got, traffic = run(gradient, *put(mesh, [qkv], [spec]))
    assert traffic == {} and same_sharding(got, mesh, spec)
    assert_close(got, jax.jit(gradient)(qkv), 2e-6)
    # Query by heads, key and value packed.
    kv = normal(1, 2, S, 2, 4, H)
    attend = functools.partial(jax_flash.attention_kvpacked, implementation=implementation)
    gradient = jax.grad(lambda *x: jnp.sum(jnp.sin(attend(*x))), (0, 1))
    arrays = put(mesh, (qkv[:, :, 0], kv), (P("a", None, "b"), spec))
    got, traffic = run(gradient, *arrays)
    assert traffic == {} and same_sharding(got[1], mesh, spec)
    assert_close(got, jax.jit(gradient)(qkv[:, :, 0], kv), 2e-6)


def test_varlen_with_a_sharded_leading_axis(implementation):
    mesh, total = mesh_of(4), 15
    query, key, value = (normal(i, 4, total, n, H) for i, n in enumerate((4, 2, 2)))
    cu = jnp.array([[0, 4, 15], [0, 9, 9], [1, 2, 14], [0, 0, 15]], jnp.int32)

    def f(cu, *x):
        attend = functools.partial(
            jax_flash.varlen_attention,
            is_causal=True,
            dropout_rate=RATE,
            dropout_key=KEY,
            implementation=implementation,
        )
        out, pullback = jax.vjp(lambda *x: attend(*x, cu), *x)
        return out, pullback(jnp.sin(out))

    arrays = put(mesh, (cu, query, key, value), (P("a"),) * 4)
    results, traffic = run(f, *arrays)
    assert traffic == {}
    assert_close(results, jax.jit(f)(cu, query, key, value), 2e-6)


def test_block_masks(implementation):
    """With a head axis they are cut along it, without one they are whole."""
    mesh, size = mesh_of(2, 4), 40
    query, key, value = (normal(i, 2, size, 4, H) for i in range(3))
    spec = P("a", None, "b")
    full = jax.random.bernoulli(jax.random.key(4), 0.6, (2, 4, 3, 3))
    for mask, mask_spec in ((full, P("a", "b")), (full[:, :1], P("a")), (full[0, 0], P())):

        def f(mask, *x):
            attend = functools.partial(
                jax_flash.blocksparse_attention, block_size=(16, 16), implementation=implementation
            )
            out, pullback = jax.vjp(lambda *x: attend(*x, mask), *x)
            return out, pullback(jnp.sin(out))

        arrays = put(mesh, (mask, query, key, value), (mask_spec, spec, spec, spec))
        results, traffic = run(f, *arrays)
        assert traffic == {}
        assert_close(results, jax.jit(f)(mask, query, key, value), 2e-6)


@pytest.mark.parametrize("by", ["batch", "heads"])
def test_vmap_of_sharded_operands(implementation, by):
    """The mapped axis may be the one that is cut; what is not mapped is whole or cut by heads."""
    mesh = mesh_of(2, 4)
    query, key, value = normal(0, 2, T, 8, H), normal(1, S, 4, H), normal(2, S, 4, HV)
    attend = functools.partial(jax_flash.attention, return_lse=True, implementation=implementation)

    def f(q, k, v):
        results, pullback = jax.vjp(lambda q: jax.vmap(attend, (0, None, None))(q, k, v), q)
        return results, pullback((jnp.sin(results[0]), jnp.cos(results[1])))

    specs = (P("a"), P(), P())
    if by == "heads":
        specs = (P("a", None, "b"), P(None, "b"), P(None, "b"))
    results, traffic = run(f, *put(mesh, (query, key, value), specs))
    assert traffic == {}
    assert same_sharding(results[0][0], mesh, specs[0])
    assert_close(results, jax.jit(f)(query, key, value), 2e-6)


def test_explicit_axes_that_share_a_kv_head(implementation):
    mesh, shape = mesh_of(4, kind=AxisType.Explicit), (3, 8, 2)
    attend = functools.partial(jax_flash.attention, implementation=implementation)
    gradient = jax.grad(lambda *x: jnp.sum(jnp.sin(attend(*x))), (0, 1, 2))
    want = jax.jit(gradient)(*qkv(*shape))
    with jax.set_mesh(mesh):
        got, traffic = run(gradient, *put(mesh, qkv(*shape), (HEADS, P(), P())))
    assert_only_keys_and_values_move(traffic)
    assert_close(jax.device_get(got), jax.device_get(want), 2e-6)


# Explicit axes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", FREE)
def test_explicit_axes(implementation, case):
    sizes, shape, q_spec, kv_spec, lengths_spec, lse_spec = FREE[case]
    mesh = mesh_of(*sizes, kind=AxisType.Explicit)
    specs = (q_spec, kv_spec, kv_spec, lengths_spec)
    seen = []

    def f(*args):
        results = everything(implementation, *args)
        seen.append(jax.tree.map(lambda x: jax.typeof(x).sharding.spec, results))
        return results

    with jax.set_mesh(mesh):
        arrays = put(mesh, (*qkv(*shape), lengths_of(shape[0])), specs)
        results, traffic = run(f, *arrays, KEY)
    assert traffic == {}
    assert_close(results, on_one_device(implementation, *shape), 2e-6)

    def padded(spec, rank):
        return P(*spec, *[None] * (rank - len(spec)))

    want = (
        (padded(q_spec, 4), padded(lse_spec, 3)),
        (padded(q_spec, 4), padded(kv_spec, 4), padded(kv_spec, 4)),
    )
    assert seen[0] == want


def test_explicit_axes_that_must_be_gathered(implementation):
    mesh, shape = mesh_of(2, kind=AxisType.Explicit), (2, 4, 2)
    attend = functools.partial(jax_flash.attention, implementation=implementation)
    with jax.set_mesh(mesh):
        arrays = put(mesh, qkv(*shape), (P(None, "a"), P(), P()))
        out = jax.jit(attend)(*arrays)
    assert_close(jax.device_get(out), jax.device_get(plain(*qkv(*shape))[0]))


@pytest.mark.parametrize("by", ["batch", "heads"])
def test_hessian_vector_product(implementation, by):
    """The second derivative is XLA's own: with explicit axes and with automatic ones."""
    shape, spec = ((4, 4, 2), P("a")) if by == "batch" else ((2, 8, 4), HEADS)

    def product(f):
        def slope(*x):
            gradients = jax.grad(lambda *x: jnp.sum(jnp.sin(f(*x))), (0, 1, 2))(*x)
            return sum(jnp.sum(g * g) for g in gradients)

        return jax.grad(slope, (0, 1, 2))

    x = qkv(*shape)
    want = jax.device_get(product(lambda *x: plain(*x)[0])(*x))
    attend = functools.partial(jax_flash.attention, implementation=implementation)
    for kind in (AxisType.Explicit, AxisType.Auto):
        mesh = mesh_of(4, kind=kind)
        with jax.set_mesh(mesh):
            got, traffic = run(product(attend), *put(mesh, x, (spec,) * 3))
        assert set(traffic) <= {"all-reduce"}  # of the scalar, whose value nobody wants
        assert same_sharding(got[1], mesh, spec)
        assert_close(jax.device_get(got), want, 1e-4)


def test_explicit_axes_under_vmap(implementation):
    mesh = mesh_of(4, kind=AxisType.Explicit)
    query, key, value = normal(0, 4, T, 4, H), normal(1, S, 2, H), normal(2, S, 2, HV)
    attend = functools.partial(jax_flash.attention, implementation=implementation)

    def f(q, k, v):
        return jax.vmap(attend, (0, None, None))(q, k, v)

    with jax.set_mesh(mesh):
        out, traffic = run(f, *put(mesh, (query, key, value), (P("a"), P(), P())))
    assert traffic == {} and same_sharding(out, mesh, P("a"))
    assert_close(jax.device_get(out), jax.device_get(f(query, key, value)), 2e-6)


# Manual axes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("by", ["batch", "heads"])
def test_shard_map(implementation, by, check_vma):
    mesh, shape = mesh_of(4), (4, 8, 4)
    spec = P("a") if by == "batch" else HEADS

    def loss(f, *x):
        out, lse = f(*x)
        return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.cos(lse))

    attend = functools.partial(
        jax_flash.attention, is_causal=True, return_lse=True, implementation=implementation
    )
    mapped = jax.shard_map(
        attend,
        mesh=mesh,
        in_specs=(spec,) * 3,
        out_specs=(spec, P("a") if by == "batch" else P(None, "a")),
        check_vma=check_vma,
    )
    x = put(mesh, qkv(*shape), (spec,) * 3)
    results, traffic = run(mapped, *x)
    assert traffic == {}
    allowed = programs.causal(T, S)
    formula = functools.partial(plain, allowed=allowed)
    assert_close(results, formula(*qkv(*shape)))
    got, traffic = run(jax.grad(functools.partial(loss, mapped), (0, 1, 2)), *x)
    assert traffic == {}
    assert_close(got, jax.grad(functools.partial(loss, formula), (0, 1, 2))(*qkv(*shape)))


@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map_with_operands_that_do_not_vary(implementation, check_vma):
    """Every device has its own query and all the keys, whose gradient is the sum over devices."""
    mesh = mesh_of(4)
    query, key, value = normal(0, 4, T, 4, H), normal(1, S, 2, H), normal(2, S, 2, HV)
    lengths = jnp.int32(7)

    def body(q, k, v, lengths):
        out = jax_flash.attention(
            q[0], k, v, key_value_seq_lengths=lengths, implementation=implementation
        )
        return out[None]

    mapped = jax.shard_map(
        body,
        mesh=mesh,
        in_specs=(P("a"), P(), P(), P()),
        out_specs=P("a"),
        check_vma=check_vma,
    )

    def by_formula(q, k, v, lengths):
        allowed = jnp.arange(S) < lengths
        return jax.vmap(lambda q: plain(q, k, v, allowed=allowed)[0])(q)

    def gradient(f):
        return jax.grad(lambda *x: jnp.sum(jnp.sin(f(*x, lengths))), (0, 1, 2))

    got = jax.jit(gradient(mapped))(query, key, value)
    assert_close(got, gradient(by_formula)(query, key, value))


def test_shard_map_gradient_inside_the_body(implementation):
    mesh = mesh_of(4)
    query, key, value = normal(0, 4, T, 4, H), normal(1, S, 2, H), normal(2, S, 2, HV)

    def body(q, k, v):
        def loss(k):
            return jnp.sum(
                jnp.sin(
                    jax_flash.attention(
                        q[0],
                        k,
                        v,
                        dropout_rate=RATE,
                        dropout_key=jax.random.key(0),
                        implementation=implementation,
                    )
                )
            )

        return jax.grad(loss)(jax.lax.pcast(k, "a", to="varying"))[None]

    mapped = jax.shard_map(body, mesh=mesh, in_specs=(P("a"), P(), P()), out_specs=P("a"))
    got = jax.jit(mapped)(query, key, value)
    # Inside, every device makes a call of its own, with a mask of its own shard.
    one = jax.jit(
        lambda q: jax.grad(
            lambda k: jnp.sum(
                jnp.sin(
                    jax_flash.attention(
                        q,
                        k,
                        value,
                        dropout_rate=RATE,
                        dropout_key=jax.random.key(0),
                        implementation=implementation,
                    )
                )
            )
        )(key)
    )
    assert_close(got, jnp.stack([one(q) for q in query]), 2e-6)


def test_shard_map_over_one_of_two_axes(implementation):
    """The batch by hand, the heads by the compiler."""
    mesh, shape = mesh_of(2, 4), (2, 8, 4)
    spec = P("a", None, "b")
    mapped = jax.shard_map(
        functools.partial(jax_flash.attention, is_causal=True, implementation=implementation),
        mesh=mesh,
        axis_names={"a"},
        in_specs=(P("a"),) * 3,
        out_specs=P("a"),
    )

    def loss(f, *x):
        return jnp.sum(jnp.sin(f(*x)))

    gradient = jax.value_and_grad(functools.partial(loss, mapped), (0, 1, 2))
    got = jax.jit(gradient)(*put(mesh, qkv(*shape), (spec,) * 3))

    def formula(*x):
        return plain(*x, allowed=programs.causal(T, S))[0]

    want = jax.value_and_grad(functools.partial(loss, formula), (0, 1, 2))(*qkv(*shape))
    assert_close(got, want, 2e-5)


def test_pmap(implementation):
    devices = jax.devices("cpu")[:4]
    query, key, value = (x.reshape(4, 2, *x.shape[1:]) for x in qkv(8, 4, 2))
    attend = functools.partial(jax_flash.attention, is_causal=True, implementation=implementation)
    allowed = programs.causal(T, S)

    def formula(*x):
        return plain(*x, allowed=allowed)[0]

    def step(f, q, k, v):
        loss, gradients = jax.value_and_grad(lambda *x: jnp.mean(jnp.sin(f(*x))), (0, 1, 2))(
            q, k, v
        )
        return jax.lax.pmean(loss, "d"), gradients

    got = jax.pmap(functools.partial(step, attend), "d", devices=devices)(query, key, value)
    want = jax.vmap(functools.partial(step, formula), axis_name="d")(query, key, value)
    assert_close(jax.device_get(got), jax.device_get(want))
    # Keys that all devices have in common.
    shared = jax.pmap(attend, in_axes=(0, None, None), devices=devices)(query, key[0], value[0])
    want = jax.vmap(formula, (0, None, None))(query, key[0], value[0])
    assert_close(jax.device_get(shared), jax.device_get(want))


def test_vmap_with_spmd_axis_name(implementation):
    """What flax's and maxtext-like code does to batch a sharded model."""
    mesh, shape = mesh_of(4), (4, 4, 2)

    def f(*x):
        attend = functools.partial(jax_flash.attention, implementation=implementation)
        return jax.vmap(attend, spmd_axis_name="a")(*x)

    with jax.set_mesh(mesh):
        out, traffic = run(f, *put(mesh, qkv(*shape), (P("a"),) * 3))
    assert traffic == {} and same_sharding(out, mesh, P("a"))
    assert_close(jax.device_get(out), jax.device_get(plain(*qkv(*shape))[0]))
