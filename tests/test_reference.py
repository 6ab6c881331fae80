"""The definition itself: against jax.nn, and its gradient against differences in float64."""

import jax
import jax.numpy as jnp
import numpy as np

from jax_flash.reference import attention as reference
from tests.helpers import Shape, random

SHAPE = Shape(2, 7, 11, 4, 2, 8, 6)


def test_forward_is_jax_nn():
    shape = Shape(2, 7, 11, 4, 2, 8)
    q, k, v = random(0, "float32", shape.query, shape.key, shape.value)
    options = dict(
        is_causal=True,
        key_value_seq_lengths=np.array([11, 4], np.int32),
        local_window_size=(3, 1),
    )
    ok = reference.allowed(2, 4, 7, 11, **options)
    out, lse, _ = reference.forward(q, k, v, ok)
    # jax.nn gives rows without keys a mean: compare the others.
    theirs, residual = jax.nn.dot_product_attention(
        q,
        k,
        v,
        return_residual=True,
        **jax.tree.map(jnp.asarray, options) | {"is_causal": True, "local_window_size": (3, 1)},
    )
    seen = ok.any(-1)
    np.testing.assert_allclose(
        np.moveaxis(out, 2, 1)[seen], np.moveaxis(theirs, 2, 1)[seen], atol=1e-5
    )
    np.testing.assert_allclose(lse[seen], np.moveaxis(residual, 2, 1)[seen], rtol=1e-5)
    assert not out[np.moveaxis(~seen, 1, 2)].any() and (lse[~seen] == -np.inf).all()


def test_backward_is_the_derivative():
    rng = np.random.default_rng(1)
    q, k, v = (rng.standard_normal(s) for s in (SHAPE.query, SHAPE.key, SHAPE.value))
    dout, dlse = rng.standard_normal(SHAPE.out), rng.standard_normal((2, 4, 7))
    ok = reference.allowed(2, 4, 7, 11, is_causal=True, causal_offset=2)
    keep = reference.dropout_keep(0.3, (1, 2), 2, 4, 7, 11)
    formula = dict(scale=0.4, keep=keep, rate=0.3)
    grads = reference.backward(q, k, v, ok, dout, dlse, **formula)

    def value(*tensors):
        out, lse, _ = reference.forward(*tensors, ok, **formula)
        return (out * dout).sum() + (lse * dlse).sum()

    for i, grad in enumerate(grads):
        direction = rng.standard_normal(grad.shape)
        ends = []
        for step in (1e-5, -1e-5):
            tensors = [q, k, v]
            tensors[i] = tensors[i] + step * direction
            ends.append(value(*tensors))
        np.testing.assert_allclose((grad * direction).sum(), (ends[0] - ends[1]) / 2e-5, rtol=1e-7)


def test_sequences():
    assert reference.sequences([-3, 4, 2, 99], 10) == [(0, 4), (4, 4), (4, 10)]
