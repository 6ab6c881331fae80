"""Who computes an operator's workload: jax_flash and its rivals, each a function of the operands.

A provider makes of a workload a call of (*primals, *constants), see operator_workloads.Data, on
JAX arrays or torch tensors. What it cannot do raises Unsupported.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable

import jax
import jax.numpy as jnp

from benchmarks import operator_rivals, providers
from benchmarks.operator_rivals import norm_operands
from benchmarks.operator_workloads import EPSILON, SCALE, SMOOTHING, Data, Workload
from benchmarks.providers import Unsupported

_SHARED_BYTES = 1 << 20  # of an operand that the calls of a launch have in common
_POOL_SHARE = 0.5  # of the device's memory: arguments that launches use up, made before a burst


# ---- jax_flash


def jax_flash_call(workload: Workload, implementation: str | None) -> Callable:
    """The public call that the workload describes."""
    import jax_flash

    chosen = dict(implementation=implementation)

    def norm(*operands):
        x, weight, bias, residual, key = norm_operands(workload, operands)
        of_kind = dict(ln=jax_flash.dropout_add_layer_norm, rms=jax_flash.dropout_add_rms_norm)
        options = dict(epsilon=EPSILON, prenorm=True, **chosen)
        if key is not None:
            options["dropout_key"] = jax.random.wrap_key_data(key)
            options["dropout_rate"] = workload.dropout_rate
        return of_kind[workload.kind](x, residual, weight, bias, **options)

    def cross_entropy(logits, labels):
        options = dict(label_smoothing=SMOOTHING, reduction="none", **chosen)
        return jax_flash.softmax_cross_entropy(logits, labels, **options)

    def linear_cross_entropy(hidden, weight, labels):
        options = dict(label_smoothing=SMOOTHING, reduction="none", **chosen)
        return jax_flash.linear_softmax_cross_entropy(hidden, weight, labels, **options)

    def softmax(scores, *mask):
        if not mask:
            return jax_flash.scaled_causal_softmax(scores, scale=SCALE, **chosen)
        return jax_flash.scaled_masked_softmax(scores, *mask, scale=SCALE, **chosen)

    def rotary(*operands):
        *arrays, cos, sin = operands
        interleaved = workload.kind == "interleaved"
        if workload.is_packed:
            table = jax_flash.RotaryTable(cos, sin, interleaved=interleaved)
            return jax_flash.apply_rotary_qkvpacked(*arrays, table, **chosen)
        from jax_flash import nnx  # the layer turns queries and keys in one call

        layer = nnx.RotaryEmbedding(2 * cos.shape[-1], interleaved=interleaved, **chosen)
        return layer(*arrays)

    calls = dict(norm=norm, cross_entropy=cross_entropy, softmax=softmax, rotary=rotary)
    calls["linear_cross_entropy"] = linear_cross_entropy
    calls["dense_gelu"] = lambda *layer: jax_flash.dense_gelu(*layer, **chosen)
    calls["mlp"] = lambda *layers: jax_flash.mlp(*layers, **chosen)
    return calls[workload.operator]


# ---- XLA: what a user would write in jnp


def xla_call(workload: Workload) -> Callable:
    wide = jnp.float32

    def norm(*operands):
        x, weight, bias, residual, key = norm_operands(workload, operands)
        if key is not None:
            kept = jax.random.bernoulli(
                jax.random.wrap_key_data(key), 1 - workload.dropout_rate, x.shape
            )
            x = jnp.where(kept, x / (1 - workload.dropout_rate), 0).astype(x.dtype)
        s = residual + x
        z = s.astype(wide)
        if bias is not None:
            z = z - z.mean(-1, keepdims=True)
        z = z * jax.lax.rsqrt((z * z).mean(-1, keepdims=True) + EPSILON) * weight.astype(wide)
        return (z if bias is None else z + bias.astype(wide)).astype(x.dtype), s

    def cross_entropy(logits, labels):
        logits = logits.astype(wide)
        lse = jax.nn.logsumexp(logits, -1)
        own = jnp.take_along_axis(logits, labels[:, None], -1)[:, 0]
        return (1 - SMOOTHING) * (lse - own) + SMOOTHING * (lse - logits.mean(-1))

    def softmax(scores, *mask):
        rows, columns = (jnp.arange(n) for n in scores.shape[-2:])
        masked = mask[0] if mask else columns > rows[:, None]
        scores = jnp.where(masked, -1e9, scores.astype(wide) * SCALE)
        return jax.nn.softmax(scores, -1).astype(workload.dtype)

    def turned(x, cos, sin):
        cos, sin = cos[:, None], sin[:, None]
        if workload.kind == "half":
            x1, x2 = jnp.split(x.astype(wide), 2, -1)
            turned = jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], -1)
        else:
            pairs = x.astype(wide).reshape(*x.shape[:-1], -1, 2)
            x1, x2 = pairs[..., 0], pairs[..., 1]
            turned = jnp.stack([x1 * cos - x2 * sin, x2 * cos + x1 * sin], -1).reshape(x.shape)
        return turned.astype(x.dtype)

    def dense_gelu(x, weight, bias):
        return jax.nn.gelu(x @ weight + bias, approximate=True)

    calls = dict(norm=norm, cross_entropy=cross_entropy, softmax=softmax, dense_gelu=dense_gelu)
    calls["linear_cross_entropy"] = lambda x, weight, labels: cross_entropy(x @ weight, labels)

    def rotary(*operands):
        *arrays, cos, sin = operands
        if workload.is_packed:
            q, k, v = jnp.moveaxis(arrays[0], -3, 0)
            return jnp.stack([turned(q, cos, sin), turned(k, cos, sin), v], -3)
        return tuple(turned(x, cos, sin) for x in arrays)

    calls["rotary"] = rotary
    calls["mlp"] = lambda x, w1, b1, w2, b2: dense_gelu(x, w1, b1) @ w2 + b2
    return calls[workload.operator]


# name -> (library, makes the call)
PROVIDERS: dict[str, tuple[str, Callable[[Workload], Callable]]] = {
    "jax_flash": ("jax", lambda workload: jax_flash_call(workload, None)),
    "jax_flash_xla": ("jax", lambda workload: jax_flash_call(workload, "xla")),
    "xla": ("jax", xla_call),
    "torch_compile": ("torch", operator_rivals.torch_compile_call),
    "tokamax": ("jax", operator_rivals.tokamax_call),
    "liger": ("torch", operator_rivals.liger_call),
    "quack": ("torch", operator_rivals.quack_call),
}
GPU_ONLY = {"torch_compile", "tokamax", "liger", "quack"}
# JAX chooses what plain jnp keeps for a backward that is compiled alone, and chooses badly (every
# float32 intermediate). Its backward is the time of both less that of the forward.
BACKWARD_BY_DIFFERENCE = {"xla"}


def version(provider: str) -> str:
    """Of the library that the rows are about."""
    if provider in ("tokamax", "liger", "quack"):
        package = {"liger": "liger-kernel", "quack": "quack-kernels"}.get(provider, provider)
        return f"{package} {importlib.metadata.version(package)}"
    return providers.library_version(PROVIDERS[provider][0])


def built_alone(provider: str) -> bool:
    return PROVIDERS[provider][0] == "torch"


def prepare(provider: str, workload: Workload, data: Data) -> dict[str, Callable]:
    """Direction -> a function that builds (compiles) the timed call.

    Raises:
      Unsupported: with the reason.
    """
    library, make = PROVIDERS[provider]
    if provider in GPU_ONLY and jax.default_backend() != "gpu":
        raise Unsupported("needs an NVIDIA GPU")
    try:
        call = make(workload)
    except ImportError as error:
        raise Unsupported(str(error)) from error
    operands = data.primals, data.cotangent, data.constants
    if library == "torch":
        return operator_rivals.prepare_torch(provider, workload, call, *operands)
    makers = providers.prepare_jax(call, *operands, compiled=repeated(workload))
    if workload.in_place:
        in_place = providers.prepare_jax(call, *operands, compiled=repeated(workload, InPlace))
        makers |= {direction: in_place[direction] for direction in workload.in_place}
    return makers


def repeated(workload: Workload, compiled_with: Callable = providers.compiled_with) -> Callable:
    """Makes jitted calls that run the operator as often as the workload says.

    Each has large arrays of its own. Weights, statistics and what is off are shared: every buffer
    costs the host time, and with 18 a call it was the host that eight small norms waited for.
    """
    calls = workload.calls

    def compiled(function, *args):
        leaves, tree = jax.tree.flatten(args)
        own = [i for i, x in enumerate(leaves) if x.nbytes > _SHARED_BYTES]
        shared = {i: x for i, x in enumerate(leaves) if i not in own}
        first = [leaves[i] for i in own]
        sets = [first, *(jax.tree.map(jnp.copy, first) for _ in range(calls - 1))]

        def run_all(sets, shared):
            found = (shared | dict(zip(own, arrays, strict=True)) for arrays in sets)
            return [
                function(*jax.tree.unflatten(tree, [x[i] for i in range(len(leaves))]))
                for x in found
            ]

        run = compiled_with(run_all, sets, shared)
        run.calls = calls
        return run

    return compiled if calls > 1 else compiled_with


class InPlace:
    """A jitted call whose results may be written over arguments of the same shape and type.

    So it is in a program, where what comes is not needed again; here every launch takes copies that
    were made before the burst. Each result may take one argument: the last that fits, which is the
    cotangent where it does.
    """

    def __init__(self, function, *args):
        leaves, tree = jax.tree.flatten(args)
        results = jax.tree.leaves(jax.eval_shape(function, *args))
        given: list[int] = []
        for result in results:
            fits = [i for i, x in enumerate(leaves) if i not in given and _alike(x, result)]
            given += fits[-1:]
        given.sort()  # JAX gives the first result the first that fits: of several calls, its own
        kept = [i for i in range(len(leaves)) if i not in given]

        def call(given_leaves, kept_leaves):
            order = dict(zip((*given, *kept), (*given_leaves, *kept_leaves), strict=True))
            return function(*jax.tree.unflatten(tree, [order[i] for i in range(len(leaves))]))

        self._given, self._kept = [leaves[i] for i in given], [leaves[i] for i in kept]
        jitted = jax.jit(call, donate_argnums=0)
        self._executable = jitted.lower(self._given, self._kept).compile()
        self._copies: list = []

    def refill(self, launches: int) -> int:
        """Copies for as many launches as wanted, or as fit; returns how many."""
        size = sum(x.nbytes for x in self._given)
        limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", 8 << 30)
        launches = max(1, min(launches, int(_POOL_SHARE * limit) // max(size, 1)))
        self._copies = [[jnp.copy(x) for x in self._given] for _ in range(launches)]
        jax.block_until_ready(self._copies)
        return launches

    def __call__(self):
        if not self._copies:
            self.refill(1)
        return self._executable(self._copies.pop(), self._kept)


def _alike(x, y) -> bool:
    return (x.shape, x.dtype) == (y.shape, y.dtype)
