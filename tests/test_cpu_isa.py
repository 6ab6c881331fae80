"""Every instruction set of the CPU kernels that this machine has: one source, the same answers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_flash
from tests.helpers import Shape, check_attention, random

VARIABLE = "JAX_FLASH_CPU_ISA"
ISAS = ["baseline", "avx2", "avx512", "avx512_bf16"]


def attend(*tensors):
    return jax_flash.attention(*tensors, implementation="cpu")


def refusal(monkeypatch, isa: str) -> str | None:
    """What a call says where it cannot have `isa`; None where it can."""
    monkeypatch.setenv(VARIABLE, isa)
    with jax.default_device(jax.devices("cpu")[0]):
        try:
            jax.block_until_ready(attend(*[jnp.ones((1, 3, 1, 8))] * 3))
        except (ValueError, jax.errors.JaxRuntimeError) as error:
            return str(error)
    return None


@pytest.fixture(params=ISAS)
def isa(request, monkeypatch):
    if (reason := refusal(monkeypatch, request.param)) is not None:
        pytest.skip(reason.splitlines()[0])
    return request.param


LENGTHS = dict(
    query_seq_lengths=np.array([197, 71], np.int32),
    key_value_seq_lengths=np.array([130, 261], np.int32),
)
CASES = {  # head dim, value dim, options
    "causal": (136, 24, dict(is_causal=True)),
    "window_dropout": (40, 72, dict(local_window_size=(70, 5), dropout_rate=0.3)),
    "lengths": (8, 56, LENGTHS),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("case", CASES)
def test_isa(isa, dtype, case):
    head_dim, value_dim, options = CASES[case]
    check_attention("cpu", dtype, Shape(head_dim=head_dim, value_dim=value_dim), options)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_special_values(isa, dtype):
    """NaN reaches the rows that see it and no others; infinities and denormals come through."""
    q, k, v = random(3, dtype, (1, 37, 1, 16), (1, 37, 1, 16), (1, 37, 1, 16))
    v[0, 0] = np.array(6e-8 if dtype == "float16" else 1e-30).astype(dtype)  # a float16 denormal
    v[0, 0, 0, 1] = np.inf
    k[0, 20] = np.nan
    with jax.default_device(jax.devices("cpu")[0]):
        out = jax_flash.attention(q, k, v, is_causal=True, implementation="cpu")
    out = np.asarray(out, np.float64)
    assert np.isnan(out[0, 20:]).all()
    assert (out[0, :20, 0, 1] == np.inf).all()
    assert np.isfinite(np.delete(out[0, :20, 0], 1, axis=-1)).all()
    np.testing.assert_array_equal(out[0, 0], np.asarray(v[0, 0], np.float64))


def test_second_run_is_equal(isa):
    """Also where one kv head is split over threads, whose sums are then joined."""
    shape = Shape(1, 700, 650, 1, 1, 24)
    q, k, v = random(5, "float32", shape.query, shape.key, shape.value)
    with jax.default_device(jax.devices("cpu")[0]):
        gradients = jax.jit(jax.grad(lambda q, k, v: attend(q, k, v).sum(), argnums=(0, 1, 2)))
        first, second = gradients(q, k, v), gradients(q, k, v)
    for a, b in zip(first, second):
        np.testing.assert_array_equal(a, b)


def test_baseline_is_everywhere(monkeypatch):
    assert refusal(monkeypatch, "baseline") is None


def test_unknown_isa(monkeypatch):
    said = refusal(monkeypatch, "sse9")
    assert said is not None
    assert VARIABLE in said and "expected baseline" in said and "got sse9" in said
