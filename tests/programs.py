"""What the tests of transformations, sharding, lowering and export share: the implementations to
run, a plain attention to differentiate any number of times, and eyes for jaxprs and programs."""

from __future__ import annotations

import collections
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_flash._ops import _op, _register


def installed(platform: str) -> pytest.MarkDecorator:
    """Skips, with the reason, where the kernels of `platform` are not installed."""
    reason = _register.missing(platform)
    return pytest.mark.skipif(reason is not None, reason=str(reason))


@pytest.fixture(
    params=[
        "xla",
        pytest.param("cpu", marks=installed("cpu")),
        pytest.param("cuda", marks=[pytest.mark.gpu, installed("cuda")]),
    ]
)
def implementation(request):
    """ "xla" and "cpu" run on the CPU, also where there is a GPU."""
    device = jax.devices("gpu" if request.param == "cuda" else "cpu")[0]
    with jax.default_device(device):
        yield request.param


@pytest.fixture(autouse=True)
def quick_compilation():
    """Less work for LLVM: these tests compile much and compute little."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def normal(seed: int, *shape: int, dtype=jnp.float32) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32).astype(dtype)


def plain(query, key, value, *, scale=None, allowed=None, keep=None, rate=0.0):
    """(out, lse) by the formula, whole, in jnp: [*B, T, N, H], [*B, S, K, H], [*B, S, K, Hv].

    `allowed` and `keep` are bool, broadcastable to [*B, N, T, S]; every row must see a key.
    """
    group = query.shape[-2] // key.shape[-2]
    key, value = jnp.repeat(key, group, -2), jnp.repeat(value, group, -2)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = jnp.einsum("...tnh,...snh->...nts", query, key, precision="highest") * scale
    if allowed is not None:
        scores = jnp.where(allowed, scores, -jnp.inf)
    lse = jax.nn.logsumexp(scores, -1)
    probs = jnp.exp(scores - lse[..., None])
    if keep is not None:
        threshold = round(rate * 65536)
        probs = jnp.where(keep, probs * (65536 / (65536 - threshold)), 0.0)
    return jnp.einsum("...nts,...snh->...tnh", probs, value, precision="highest"), lse


def causal(seq_q: int, seq_k: int, offset: int = 0) -> jax.Array:
    return jnp.arange(seq_k)[None, :] <= jnp.arange(seq_q)[:, None] + offset


def assert_close(got, want, tolerance=1e-5):
    """Same tree, shapes, dtypes; the largest error at most `tolerance` of the largest magnitude."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype, (a.shape, a.dtype, b.shape, b.dtype)
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        infinite = np.isinf(b)
        np.testing.assert_array_equal(a[infinite], b[infinite])
        a, b = a[~infinite], b[~infinite]
        limit = tolerance * max(1.0, np.abs(b).max(initial=0))
        np.testing.assert_allclose(a, b, rtol=0, atol=limit)


def assert_equal(got, want):
    """The same bits."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def equations(jaxpr, name: str | None = None) -> list:
    """Every equation of a jaxpr and of those inside it; with a name, those of that primitive."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    found = []
    for equation in jaxpr.eqns:
        if name is None or equation.primitive.name == name:
            found.append(equation)
        for parameter in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            if hasattr(parameter, "eqns") or hasattr(parameter, "jaxpr"):
                found += equations(parameter, name)
    return found


def calls(jaxpr) -> dict[str, int]:
    """How often each of our primitives stands in a jaxpr."""
    names = (equation.primitive.name for equation in equations(jaxpr))
    return dict(collections.Counter(name for name in names if name.startswith("attention_")))


def custom_calls(text: str) -> list[tuple[str, list[str], list[str]]]:
    """(target, operand types, result types) of our custom calls in StableHLO text."""
    found = []
    for line in text.splitlines():
        match = re.search(r"stablehlo\.custom_call @(jax_flash\.\w+)\(.*: \((.*)\) -> (.*)$", line)
        if match:
            types = [re.findall(r"tensor<([^>]*)>", side) for side in match.groups()[1:]]
            found.append((match.group(1), *types))
    return found


def largest_array(compiled_text: str) -> tuple[int, str]:
    """(elements, type) of the largest array in an optimised HLO program."""
    shapes = set(re.findall(r"\b(?:pred|[a-z]+\d+)\[([\d,]+)\]", compiled_text))
    return max((int(np.prod([int(n) for n in s.split(",")])), s) for s in shapes)


_COLLECTIVES = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"


def collectives(compiled_text: str) -> dict[str, list[tuple[int, ...]]]:
    """Shapes of all results of every collective in an optimised HLO program."""
    found = collections.defaultdict(list)
    for line in compiled_text.splitlines():
        if match := re.search(rf" = (.*) ({_COLLECTIVES})(?:-start)?\(", line):
            for dims in re.findall(r"\b(?:pred|[a-z]+\d+)\[([\d,]*)\]", match[1]):
                found[match[2]].append(tuple(int(n) for n in dims.split(",") if n))
    return dict(found)


def forget_warnings() -> None:
    """Warnings that are given once are given again."""
    _op.warn_once.cache_clear()
