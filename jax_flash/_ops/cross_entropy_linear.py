"""The primitives of cross-entropy of logits that never exist at once, in terms of those of logits.

    linear_cross_entropy_forward  (hidden, weight, bias, labels)   -> lse, label_logit, total
    linear_cross_entropy_backward (hidden, weight, bias, labels, lse, dlse, dlabel, dtotal)
                                                                   -> dhidden, dweight, dbias
    linear_cross_entropy_gradients(hidden, weight, bias, labels, row_weights)
                                       -> lse, label_logit, total, dhidden, dweight, dbias

logits = hidden @ weight + bias; statistics and cotangents are those of _ops/cross_entropy.py. The
last one makes the logits of a chunk of tokens once, for their statistics and for the gradients of
sum(row_weights * row_loss). `bias` and `dbias` are off where there is none.

Each is a loop over chunks of tokens, whose logits, float32, exist at once: 256 MiB of them, or as
much as the weight. Gradients of logits, in the operands' type, are kept for a group of chunks,
since with each group the sum of the weight's gradient, float32, is read and written, and that chunk
by chunk would take longer than the products. There is one group where that takes no more memory
than the sum, which then does not exist, or than 1 GiB. The products are XLA's; what becomes of a
chunk's logits is jnp or, on CUDA, the kernels of logits.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from jax_flash._ops import cross_entropy as of_logits
from jax_flash._ops._op import Implementation, Op
from jax_flash._ops._partition import BATCH, Signature, is_off
from jax_flash._ops.cross_entropy import IGNORED

_CHUNK_LOGITS = 1 << 26  # logits at once: 256 MiB
_CHUNK_MULTIPLE = 128  # tokens: whole tiles of a matmul
_UNROLLED = 16  # chunks of a group that are no loop, on CUDA
_GROUP_BYTES = 1 << 30  # of gradients of logits that may be kept, however small the weight


# Shapes and devices -------------------------------------------------------------------------------


def _row_names(config) -> tuple[str, ...]:
    return tuple(f"R{i}" for i in range(config.row_axes))


def _axes(config, bias):
    rows = (BATCH, *_row_names(config))
    tensors = ((*rows, "D"), (BATCH, "D", "V"), () if is_off(bias) else (BATCH, "V"))
    return tensors, rows, rows if config.with_total else ()


def _shardable(config, hidden, weight) -> dict[str, int]:
    rows = hidden.shape[-1 - config.row_axes : -1]
    return {"V": weight.shape[-1], **dict(zip(_row_names(config), rows, strict=True))}


def _forward_signature(config, hidden, weight, bias, labels) -> Signature:
    tensors, rows, total = _axes(config, bias)
    return Signature(
        operands=(*tensors, rows),
        results=(rows, rows, total),
        shardable=_shardable(config, hidden, weight),
        aliases={},
        enter=of_logits.enter(3, 1),
        join=of_logits.join,
    )


def _backward_signature(config, hidden, weight, bias, *rest) -> Signature:
    tensors, rows, total = _axes(config, bias)
    return Signature(
        operands=(*tensors, rows, rows, rows, rows, total),
        results=tensors,
        shardable=_shardable(config, hidden, weight),
        aliases={},
        enter=of_logits.enter(3, 1),
    )


def _gradients_signature(config, hidden, weight, bias, *rest) -> Signature:
    tensors, rows, total = _axes(config, bias)
    return Signature(
        operands=(*tensors, rows, rows),
        results=(rows, rows, total, *tensors),
        shardable=_shardable(config, hidden, weight),
        aliases={},
        enter=of_logits.enter(3, 1),
        instead=functools.partial(_gradients_of_a_part, config),
    )


def _gradients_of_a_part(config, operands, cuts):
    """Where devices share the vocabulary, a row's gradient begins when all know its lse."""
    if "V" not in cuts:
        return None
    *call, row_weights = operands
    statistics = linear_cross_entropy_forward.on_this_device(config, *call)
    statistics = of_logits.combine(statistics, cuts["V"])
    cotangents = of_logits.row_cotangents(config, statistics[0], row_weights)
    gradients = linear_cross_entropy_backward.on_this_device(
        config, *call, statistics[0], *cotangents
    )
    dhidden, *sums = gradients
    sums = (x.astype(sum_type(x.dtype)) for x in sums)
    # Of a result without the axis V the devices' parts are added up.
    first = jax.lax.axis_index(cuts["V"]) == 0
    return (*(jnp.where(first, x, 0) for x in statistics), dhidden, *sums)


def _leads(config, hidden, weight, bias, *rows) -> tuple[int, ...]:
    """The axes of vmap, that come before all others."""
    own_axes = (1 + config.row_axes, 2, 1, *(config.row_axes,) * len(rows))
    arrays = (hidden, weight, bias, *rows)
    return jnp.broadcast_shapes(
        *(x.shape[: x.ndim - n] for x, n in zip(arrays, own_axes, strict=True) if not is_off(x))
    )


def _forward_results(config, hidden, *rest):
    lead = _leads(config, hidden, *rest)
    rows = hidden.shape[-1 - config.row_axes : -1]
    return of_logits.statistics_shapes(config, (*lead, *rows), hidden.dtype)


def _backward_results(config, hidden, weight, bias, *rest):
    lead = _leads(config, hidden, weight, bias, *rest)
    own_axes = (1 + config.row_axes, 2, 1)
    return tuple(
        jax.ShapeDtypeStruct((0,) if is_off(x) else (*lead, *x.shape[x.ndim - n :]), x.dtype)
        for x, n in zip((hidden, weight, bias), own_axes, strict=True)
    )


def sum_type(dtype):
    """Of dweight and dbias by `linear_cross_entropy_gradients`.

    The exponents of float16 leave no room for a mean's row_weights, and then have none for the sum.
    """
    return jnp.float32 if dtype == jnp.float16 else dtype


def _gradients_results(config, *operands):
    dhidden, *sums = _backward_results(config, *operands)
    sums = (jax.ShapeDtypeStruct(x.shape, sum_type(x.dtype)) for x in sums)
    return *_forward_results(config, *operands), dhidden, *sums


# Chunks -------------------------------------------------------------------------------------------


def _cut(tokens: int, limit: int, multiple: int) -> tuple[int, int]:
    """(how many, tokens in each), none over the limit: what fills the last one up is least."""

    def size(count):
        return -(-tokens // (count * multiple)) * multiple

    least = -(-tokens // limit)
    count = min(range(least, least + min(least, 64) + 1), key=lambda n: n * size(n))
    return count, min(size(count), tokens)


def _limit(config, weight) -> tuple[int, int]:
    """(tokens whose logits exist at once, what a chunk should be a multiple of)."""
    logits = max(_CHUNK_LOGITS, weight.size * weight.dtype.itemsize // 4)
    default = max(1, logits // weight.shape[1] // _CHUNK_MULTIPLE) * _CHUNK_MULTIPLE
    return (min(default, config.chunk), 1) if config.chunk else (default, _CHUNK_MULTIPLE)


def chunks(config, weight, tokens: int) -> tuple[int, int]:
    """(how many, tokens in each)."""
    return _cut(tokens, *_limit(config, weight))


def groups(config, weight, tokens: int) -> tuple[int, int, int]:
    """(groups, chunks in each, tokens in each of those)."""
    limit, multiple = _limit(config, weight)
    most = config.chunk or tokens
    columns, row = weight.shape[0], weight.shape[1] * weight.dtype.itemsize
    if most * row > max(4 * weight.size, _GROUP_BYTES):
        # dlogits take more than the sum of the weight's gradient: a half of it, and that.
        half = max(2 * columns // weight.dtype.itemsize, _GROUP_BYTES // row)
        most = config.chunk or max(limit, half // multiple * multiple)
    group = -(-tokens // (-(-tokens // most) * multiple)) * multiple
    each, size = _cut(group, limit, multiple)
    return -(-tokens // (each * size)), each, size


def _split(x, count: int, size: int, fill=0):
    """[tokens, ...] -> [count, size, ...]; nothing moves where they fit."""
    if is_off(x):
        return jnp.zeros((count, 0), x.dtype)
    if extra := count * size - x.shape[0]:
        x = jnp.pad(x, [(0, extra)] + [(0, 0)] * (x.ndim - 1), constant_values=fill)
    return x.reshape(count, size, *x.shape[1:])


def _split_all(count: int, size: int, hidden, labels, *rows):
    """Of all that has an entry a token; what fills the last chunk up is ignored."""
    hidden, labels, *rows = (x if is_off(x) else _flat(x, labels) for x in (hidden, labels, *rows))
    return (
        _split(hidden, count, size),
        _split(labels, count, size, IGNORED),
        *(_split(x, count, size) for x in rows),
    )


def _flat(x, labels):
    return x.reshape(labels.size, *x.shape[labels.ndim :])


def _whole(x, shape):
    """[count, size, ...] -> `shape`, without what filled the last chunk up; off stays off."""
    if x.shape[1:] == (0,):
        return jnp.zeros((0,), x.dtype)
    tail = x.shape[2:]
    tokens = math.prod(shape[: len(shape) - len(tail)])
    return x.reshape(-1, *tail)[:tokens].reshape(shape)


def _in_turn(of_chunk: Callable, chunks: Sequence[jax.Array]):
    """of_chunk(*chunk) of each, stacked."""
    if chunks[0].shape[0] == 1:
        return jax.tree.map(lambda x: x[None], of_chunk(*(x[0] for x in chunks)))
    return jax.lax.map(lambda chunk: of_chunk(*chunk), tuple(chunks))


def _add_up(of_chunk: Callable, chunks: Sequence[jax.Array]):
    """of_chunk(*chunk) -> (sums, of_tokens), sums added up, of_tokens stacked; in turn."""
    # The first chunk by itself: it gives the sums their shardings, which zeros would not have.
    sums, of_tokens = of_chunk(*(x[0] for x in chunks))
    of_tokens = jax.tree.map(lambda x: x[None], of_tokens)
    if chunks[0].shape[0] == 1:
        return sums, of_tokens

    def add(sums, chunk):
        more, of_tokens = of_chunk(*chunk)
        return jax.tree.map(jnp.add, sums, more), of_tokens

    sums, later = jax.lax.scan(add, sums, tuple(x[1:] for x in chunks))
    return sums, jax.tree.map(lambda *x: jnp.concatenate(x), of_tokens, later)


def _chunk_logits(hidden, weight, bias):
    """float32, never rounded to the operands' type."""
    wide = jnp.promote_types(hidden.dtype, jnp.float32)
    logits = jnp.dot(hidden, weight, preferred_element_type=wide)
    return logits if is_off(bias) else logits + bias


def _products(dlogits, hidden, weight, bias, wide):
    """((dweight, dbias), dhidden) of a group; the sums in the type `wide`."""
    dbias = bias if is_off(bias) else dlogits.sum(0, dtype=jnp.promote_types(wide, jnp.float32))
    dhidden = jnp.dot(dlogits, weight.T, preferred_element_type=hidden.dtype)
    return (jnp.dot(hidden.T, dlogits, preferred_element_type=wide), dbias), dhidden


# The loops ----------------------------------------------------------------------------------------


def _forward(of_chunk, config, hidden, weight, bias, labels):
    """of_chunk(config, logits, labels) -> statistics"""

    def step(hidden, labels):
        return of_chunk(config, _chunk_logits(hidden, weight, bias), labels)

    split = _split_all(*chunks(config, weight, labels.size), hidden, labels)
    return tuple(_whole(x, labels.shape) for x in _in_turn(step, split))


def _gradients(of_chunks, config, hidden, weight, bias, labels, *others, sums=None):
    """Results a token, dhidden, and dweight and dbias in the type `sums` (None: the operands').

    Of a group's chunks, of_chunks(config, logits_of, hidden, labels, *others) makes results a token
    and dlogits; its arrays are [chunks, tokens, ...].
    """
    count, each, size = groups(config, weight, labels.size)
    # The sums of many groups are float32; that of one, in which the product adds up so, need not.
    result = hidden.dtype if sums is None else sums
    wide = result if count == 1 else jnp.promote_types(result, jnp.float32)

    @jax.checkpoint
    def of_group(hidden, labels, *others):
        split = _split_all(each, size, hidden, labels, *others)
        logits_of = functools.partial(_chunk_logits, weight=weight, bias=bias)
        of_tokens, dlogits = of_chunks(config, logits_of, *split)
        dlogits = dlogits.reshape(each * size, -1)
        sums, dhidden = _products(dlogits, hidden, weight, bias, wide)
        return sums, ([_whole(x, labels.shape) for x in of_tokens], dhidden)

    split = _split_all(count, each * size, hidden, labels, *others)
    (dweight, dbias), (of_tokens, dhidden) = _add_up(of_group, split)
    return (
        *(_whole(x, labels.shape) for x in of_tokens),
        _whole(dhidden, hidden.shape),
        dweight.astype(result),
        dbias.astype(result),
    )


def _over_batch(f, axes: int, operands: Sequence[jax.Array]):
    """f on operands with so many more leading axes; what is shared along one is not repeated."""
    if axes == 0:
        return f(*operands)
    mapped = [not is_off(x) and x.shape[0] != 1 for x in operands]
    operands = [x if m or is_off(x) else x[0] for x, m in zip(operands, mapped, strict=True)]
    if not any(mapped):
        return [x if is_off(x) else x[None] for x in _over_batch(f, axes - 1, operands)]

    results = jax.vmap(
        lambda *x: _over_batch(f, axes - 1, x), in_axes=[0 if m else None for m in mapped]
    )(*operands)
    return [jnp.zeros((0,), x.dtype) if x.size == 0 else x for x in results]  # off


# Implementations ----------------------------------------------------------------------------------


def _of_cotangents(backward, config, logits_of, hidden, labels, *rows):
    def step(hidden, labels, *rows):
        (dlogits,) = backward(config, logits_of(hidden), labels, *rows)
        return dlogits.astype(hidden.dtype)

    return (), _in_turn(step, (hidden, labels, *rows))


def _of_weights(config, logits_of, hidden, labels, row_weights):
    def step(hidden, labels, row_weights):
        logits = logits_of(hidden)
        statistics = of_logits.forward(config, logits, labels)
        cotangents = of_logits.row_cotangents(config, statistics[0], row_weights)
        (dlogits,) = of_logits.backward(config, logits, labels, statistics[0], *cotangents)
        return statistics, dlogits.astype(hidden.dtype)

    return _in_turn(step, (hidden, labels, row_weights))


def _kernel_of_weights(config, logits_of, hidden, labels, row_weights):
    """Each chunk's call writes its part of the group's dlogits, which nobody has to set to 0."""
    count, size = labels.shape
    call = functools.partial(of_logits.kernel_gradients, config, dtype=hidden.dtype)

    def step(dlogits, chunk):
        i, hidden, labels, row_weights = chunk
        place = dict(into=dlogits, first_row=i * size, rows=count * size)
        statistics, dlogits = call(logits_of(hidden), labels, row_weights, **place)
        return dlogits, statistics

    if count > 1 and size % 8 != 0:  # its rows could not start at 16-byte boundaries
        return _in_turn(
            lambda hidden, labels, rows: call(logits_of(hidden), labels, rows),
            (hidden, labels, row_weights),
        )
    chunks = jnp.arange(count), hidden, labels, row_weights
    dlogits, first = step(None, tuple(x[0] for x in chunks))
    first = [x[None] for x in first]
    if count == 1:
        return first, dlogits
    # A loop would have a transposed weight, such as an embedding, copied first.
    unroll = count <= _UNROLLED
    dlogits, later = jax.lax.scan(step, dlogits, tuple(x[1:] for x in chunks), unroll=unroll)
    return [jnp.concatenate(x) for x in zip(first, later, strict=True)], dlogits


def _run(loop, of_chunks, config, hidden, *rest):
    axes = hidden.ndim - 1 - config.row_axes
    return tuple(_over_batch(functools.partial(loop, of_chunks, config), axes, (hidden, *rest)))


def forward(config, *operands):
    return _run(_forward, of_logits.forward, config, *operands)


def backward(config, *operands):
    """JAX can differentiate it any number of times, without keeping all logits."""
    of_chunks = functools.partial(_of_cotangents, of_logits.backward)
    return _run(_gradients, of_chunks, config, *operands)


def gradients(config, hidden, *rest):
    loop = functools.partial(_gradients, sums=sum_type(hidden.dtype))
    return _run(loop, _of_weights, config, hidden, *rest)


def _kernel_forward(config, *operands):
    return _run(_forward, of_logits.kernel_forward, config, *operands)


def _kernel_backward(config, hidden, *rest):
    kernel = functools.partial(of_logits.kernel_backward, dtype=hidden.dtype)
    of_chunks = functools.partial(_of_cotangents, kernel)
    return _run(_gradients, of_chunks, config, hidden, *rest)


def _kernel_gradients(config, hidden, *rest):
    loop = functools.partial(_gradients, sums=sum_type(hidden.dtype))
    return _run(loop, _kernel_of_weights, config, hidden, *rest)


def _refuse(config, hidden, weight, *rest) -> str | None:
    return of_logits.refuse_kernel(config, weight)


linear_cross_entropy_forward = Op(
    "linear_cross_entropy_forward",
    signature=_forward_signature,
    results=_forward_results,
    native={"cuda": Implementation("cuda", _kernel_forward, _refuse)},
    xla=Implementation("xla", forward),
)
linear_cross_entropy_backward = Op(
    "linear_cross_entropy_backward",
    signature=_backward_signature,
    results=_backward_results,
    native={"cuda": Implementation("cuda", _kernel_backward, _refuse)},
    xla=Implementation("xla", backward),
)
linear_cross_entropy_gradients = Op(
    "linear_cross_entropy_gradients",
    signature=_gradients_signature,
    results=_gradients_results,
    native={"cuda": Implementation("cuda", _kernel_gradients, _refuse)},
    xla=Implementation("xla", gradients),
)
