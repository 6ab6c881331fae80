"""What the tests of cross-entropy share: options, labels, plain forms, where a call runs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_flash
from tests import programs

IGNORED = -100
OPTIONS = {
    "plain": {},
    "smoothing": dict(label_smoothing=0.1),
    "z_loss": dict(z_loss=1e-2),
    "scale": dict(logit_scale=1.7),
    "all": dict(label_smoothing=0.3, z_loss=1e-3, logit_scale=-0.4, ignore_index=2),
}
DTYPES = ["float32", "bfloat16", "float16"]
CHOSEN = dict(label_smoothing=0.2, z_loss=0.1)


@pytest.fixture(autouse=True)
def on_the_cpu():
    with jax.default_device(jax.devices("cpu")[0]):
        yield


@pytest.fixture(
    params=["xla", pytest.param("cuda", marks=[pytest.mark.gpu, programs.installed("cuda")])]
)
def implementation(request, on_the_cpu):
    with jax.default_device(jax.devices("cpu" if request.param == "xla" else "gpu")[0]):
        yield request.param


def some_labels(seed, shape, vocabulary, ignore=IGNORED):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, vocabulary, shape).astype(np.int32)
    return np.where(rng.random(shape) < 0.2, ignore, labels).astype(np.int32)


@functools.partial(
    jax.jit, static_argnames=("label_smoothing", "ignore_index", "z_loss", "logit_scale")
)
def plain_loss(
    logits, labels, *, label_smoothing=0.0, ignore_index=IGNORED, z_loss=0.0, logit_scale=1.0
):
    """(loss, lse) of each row as one writes them in jnp, in float32; every label a class."""
    z = logits.astype(jnp.float32) * logit_scale
    ignored = labels == ignore_index
    lse = jax.nn.logsumexp(z, -1)
    target = jax.nn.one_hot(jnp.where(ignored, 0, labels), z.shape[-1])
    target = (1 - label_smoothing) * target + label_smoothing / z.shape[-1]
    loss = lse - jnp.sum(target * z, -1) + z_loss * lse**2
    return jnp.where(ignored, 0, loss), jnp.where(ignored, 0, lse)


def plain_linear(hidden, weight, bias, labels, **options):
    logits = hidden @ weight
    return plain_loss(logits if bias is None else logits + bias, labels, **options)


def rows_of(call, **options):
    """`call` as the plain forms are: (loss, lse) of each row."""
    return functools.partial(call, reduction="none", return_lse=True, **options)


def linear_rows(hidden, weight, bias, labels, **options):
    call = rows_of(jax_flash.linear_softmax_cross_entropy, **options)
    return call(hidden, weight, labels, bias)


def with_gradients(f, tensors, labels, cotangents):
    results, pullback = jax.vjp(lambda *x: f(*x, labels), *tensors)
    return results, pullback(cotangents)


def weighted(loss, lse):
    weights = jnp.cos(jnp.arange(loss.size, dtype=jnp.float32)).reshape(loss.shape)
    return jnp.sum(weights * loss**2) + jnp.sum(jnp.sin(lse) * weights)


def hessian_product(f, tensors):
    def slope(*x):
        gradients = jax.grad(f, tuple(range(len(x))))(*x)
        return sum(jnp.sum(jnp.sin(3 * g)) for g in gradients)

    return jax.jit(jax.grad(slope, tuple(range(len(tensors)))))(*tensors)
