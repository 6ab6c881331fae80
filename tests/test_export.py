"""Programs with our custom calls, exported, stored, and called again: here and in a new process."""

import functools
import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import jax_flash
from tests import programs
from tests.programs import assert_close, assert_equal, installed, normal, plain

implementation = programs.implementation
quick_compilation = programs.quick_compilation

B, T, S, N, K, H = 2, 6, 10, 4, 2, 8


def qkv():
    return normal(0, B, T, N, H), normal(1, B, S, K, H), normal(2, B, S, K, H)


def step(implementation, query, key, value, lengths, seed):
    """A program with everything: forward, backward, lengths, dropout by a key made of data."""

    def loss(q, k, v):
        out, lse = jax_flash.attention(
            q,
            k,
            v,
            is_causal=True,
            key_value_seq_lengths=lengths,
            dropout_rate=0.25,
            dropout_key=jax.random.key(seed),
            return_lse=True,
            implementation=implementation,
        )
        return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.cos(lse))

    return jax.value_and_grad(loss, (0, 1, 2))(query, key, value)


def arguments():
    return (*qkv(), jnp.array([10, 4]), jnp.int32(3))


def stored(f, *args, platforms=None, **options):
    """Exported for the device in use (not the default backend), serialised and read again."""
    pytest.importorskip("flatbuffers", reason="jax.export serialises with flatbuffers")
    if platforms is None:
        (device,) = jnp.zeros(()).devices()
        platforms = ["cuda" if device.platform == "gpu" else device.platform]
    exported = export.export(
        jax.jit(f), platforms=platforms, disabled_checks=jax_flash.export_checks()
    )(*args)
    return export.deserialize(exported.serialize(**options))


def test_stored_and_called(implementation):
    f = functools.partial(step, implementation)
    program = stored(f, *arguments())
    assert program.in_avals[0].shape == (B, T, N, H)
    assert_equal(program.call(*arguments()), jax.jit(f)(*arguments()))
    # Other data, the same program.
    other = (*(x + 1 for x in qkv()), jnp.array([1, 9]), jnp.int32(4))
    assert_equal(jax.jit(program.call)(*other), jax.jit(f)(*other))


def test_stored_with_its_gradient(implementation):
    attend = functools.partial(jax_flash.attention, implementation=implementation)
    program = stored(attend, *qkv(), vjp_order=1)
    got = jax.grad(lambda *x: jnp.sum(jnp.sin(program.call(*x))), (0, 1, 2))(*qkv())
    want = jax.grad(lambda *x: jnp.sum(jnp.sin(plain(*x)[0])), (0, 1, 2))(*qkv())
    assert_close(got, want)


@pytest.mark.parametrize(
    "name, symbols",
    [
        ("xla", f"b, {T}, {N}, {H}"),
        pytest.param("cpu", f"b, {T}, {N}, {H}", marks=installed("cpu")),
        pytest.param("cpu", f"b, t, {N}, {H}", marks=installed("cpu")),
    ],
)
def test_symbolic_shapes(name, symbols):
    """One program for any batch; with kernels, for any length."""

    def f(*x):
        attend = functools.partial(jax_flash.attention, is_causal=True, implementation=name)
        out, pullback = jax.vjp(attend, *x)
        return out, *pullback(jnp.cos(out))

    x = jax.ShapeDtypeStruct(export.symbolic_shape(symbols), jnp.float32)
    exported = export.export(
        jax.jit(f), platforms=["cpu"], disabled_checks=jax_flash.export_checks()
    )(x, x, x)
    with jax.default_device(jax.devices("cpu")[0]):
        given = [normal(i, 3, T, N, H) for i in range(3)]
        assert_close(exported.call(*given), jax.jit(f)(*given), 1e-6)


@installed("cpu")
def test_the_checks_name_our_custom_calls():
    """Without them jax refuses to promise that the program will run elsewhere, and they are all."""
    attend = jax.jit(functools.partial(jax_flash.attention, implementation="cpu"))
    with (
        jax.default_device(jax.devices("cpu")[0]),
        pytest.raises(ValueError, match="jax_flash.attention_forward"),
    ):
        export.export(attend, platforms=["cpu"])(*qkv())
    assert len(jax_flash.export_checks()) == len(set(jax_flash.export_checks())) >= 2


@installed("cpu")
@installed("cuda")
def test_one_program_for_two_platforms():
    f = functools.partial(step, None)
    exported = export.export(
        jax.jit(f), platforms=["cpu", "cuda"], disabled_checks=jax_flash.export_checks()
    )(*arguments())
    text = exported.mlir_module()
    assert text.count("custom_call @jax_flash.attention_forward") == 2
    assert text.count("custom_call @jax_flash.attention_backward") == 2
    assert exported.platforms == ("cpu", "cuda")
    with jax.default_device(jax.devices("cpu")[0]):
        want = jax.jit(functools.partial(step, "cpu"))(*arguments())
        assert_equal(exported.call(*arguments()), want)


@installed("cpu")
def test_a_program_for_a_platform_without_kernels_beside_one_with():
    f = functools.partial(step, None)
    exported = export.export(
        jax.jit(f), platforms=["cpu", "tpu"], disabled_checks=jax_flash.export_checks()
    )(*arguments())
    text = exported.mlir_module()
    assert text.count("custom_call @jax_flash.attention_forward") == 1 and "dot_general" in text
    with jax.default_device(jax.devices("cpu")[0]):
        assert_equal(
            exported.call(*arguments()), jax.jit(functools.partial(step, "cpu"))(*arguments())
        )


@pytest.mark.parametrize("name", ["xla", pytest.param("cpu", marks=installed("cpu"))])
def test_sharded_programs(name):
    """For several devices, where nothing is left to choose: jit's own choice of a cut is made by
    Python when the program is compiled, which cannot be stored."""
    mesh = jax.sharding.Mesh(np.array(jax.devices("cpu")[:2]), ("a",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("a"))
    args = [jax.device_put(x, sharding) for x in qkv()]
    attend = functools.partial(jax_flash.attention, implementation=name)
    spec = jax.sharding.PartitionSpec("a")
    mapped = jax.shard_map(attend, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec)
    program = stored(mapped, *args, platforms=["cpu"])
    assert program.nr_devices == 2
    assert_close(jax.jit(program.call)(*args), plain(*qkv())[0])


@pytest.mark.parametrize("name", ["xla", pytest.param("cpu", marks=installed("cpu"))])
def test_called_in_a_new_process(name, tmp_path):
    f = functools.partial(step, name)
    with jax.default_device(jax.devices("cpu")[0]):
        exported = export.export(
            jax.jit(f), platforms=["cpu"], disabled_checks=jax_flash.export_checks()
        )(*arguments())
        want = jax.jit(f)(*arguments())
    pytest.importorskip("flatbuffers", reason="jax.export serialises with flatbuffers")
    (tmp_path / "program").write_bytes(exported.serialize())
    np.savez(tmp_path / "arguments.npz", *map(np.asarray, arguments()))
    script = textwrap.dedent(
        """
        import sys
        import numpy as np
        import jax, jax.export
        import jax_flash
        folder = sys.argv[1]
        program = jax.export.deserialize(open(f"{folder}/program", "rb").read())
        given = np.load(f"{folder}/arguments.npz")
        results = program.call(*(given[name] for name in given.files))
        np.savez(f"{folder}/results.npz", *jax.tree.leaves(results))
        """
    )
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    environment["PYTHONPATH"] = os.pathsep.join(
        [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], env=environment, check=True, timeout=120
    )
    results = np.load(tmp_path / "results.npz")
    for name, leaf in zip(results.files, jax.tree.leaves(want), strict=True):
        assert_close(results[name], np.asarray(leaf), 1e-6)
