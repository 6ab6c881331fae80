"""LayerNorm and RMSNorm over a residual stream in plain jnp: any platform, any float type.

    s = residual + dropout(x * rowscale * layerscale) [+ dropout(x1)]
    z = (s - mean(s)) * rsigma * weight + bias,   rsigma = 1 / sqrt(var(s) + epsilon)

Operands as `_ops/norm.py` lists them: [*batch, *rows, D], vectors [*batch, D]; all leading batch
axes broadcast. Everything is computed in float32 (float64 for float64), sums as well.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jax_flash._ops import dropout

HEAD = 0x4E4F524D  # "NORM": the head word of this operator's draws; the second branch has the next


def _off(x) -> bool:
    return x is None or x.shape == (0,)


def _over_rows(vector, config, wide):
    """[*batch, D] -> [*batch, 1, ..., 1, D]."""
    ones = (1,) * config.row_axes
    return vector.astype(wide).reshape(*vector.shape[:-1], *ones, vector.shape[-1])


def _sum_rows(x, config):
    """[*batch, *rows, D] -> [*batch, D]."""
    return jnp.sum(x, axis=tuple(range(x.ndim - 1 - config.row_axes, x.ndim - 1)))


def select(x, subset, config):
    """Rows of a compact [*batch, M, D] by number from 1, [*batch, *rows]; zeros for no such row."""
    lead = subset.shape[: subset.ndim - config.row_axes]
    rows = subset.shape[subset.ndim - config.row_axes :]
    flat = subset.reshape(*lead, -1)
    if x.shape[-2] == 0:
        shape = jnp.broadcast_shapes(lead, x.shape[:-2])
        return jnp.zeros((*shape, *rows, x.shape[-1]), x.dtype)
    found = (flat >= 1) & (flat <= x.shape[-2])
    at = jnp.clip(flat - 1, 0, x.shape[-2] - 1)
    taken = jnp.take_along_axis(x, at[..., None], axis=-2, mode="clip")
    taken = jnp.where(found[..., None], taken, 0)
    return taken.reshape(*taken.shape[:-2], *rows, x.shape[-1])


def place(y, subset, count: int, config):
    """The transpose of `select`: [*batch, *rows, D] -> [*batch, count, D]."""
    batch = jnp.broadcast_shapes(
        y.shape[: y.ndim - 1 - config.row_axes], subset.shape[: subset.ndim - config.row_axes]
    )
    compact = jax.ShapeDtypeStruct((*batch, count, y.shape[-1]), y.dtype)
    y = jnp.broadcast_to(y, (*batch, *y.shape[len(y.shape) - 1 - config.row_axes :]))
    return jax.linear_transpose(lambda x: select(x, subset, config), compact)(y)[0]


def keep_mask(config, dropout_state, row_ids, branch: int, width: int):
    """bool [*batch, *rows, D]: which elements survive."""
    ones = (1,) * config.row_axes
    k0, k1, batch = (
        dropout_state[..., i].reshape(*dropout_state.shape[:-1], *ones) for i in range(3)
    )
    bits = dropout.draws_rows((k0, k1), batch, HEAD + branch, row_ids, width)
    return bits >= config.dropout_threshold


def statistics(config, stream):
    """(mean or None, rsigma), [*batch, *rows]."""
    width = stream.shape[-1]
    mean = None if config.is_rms else jnp.sum(stream, -1) / width
    centred = stream if mean is None else stream - mean[..., None]
    square = jnp.sum(centred * centred, -1) / width
    return mean, jax.lax.rsqrt(square + config.epsilon)


def _normalised(stream, mean, rsigma):
    centred = stream if _off(mean) else stream - mean[..., None]
    return centred * rsigma[..., None]


def forward(config, x, x1, residual, weight, bias, weight1, bias1, layerscale, *options):
    """z, z1, stream, mean, rsigma, mask, mask1; None where off.

    z is of the stream before it is rounded to its type, mean and rsigma are of the rounded one.
    """
    rowscale, x_subset, out_subset, dropout_state, row_ids = options
    wide, width = jnp.promote_types(x.dtype, jnp.float32), weight.shape[-1]

    def branch(index, x):
        x = x.astype(wide)
        if not _off(x_subset):
            x = select(x, x_subset, config)
        if not _off(rowscale):
            x = x * rowscale.astype(wide)[..., None]
        if not _off(layerscale):
            x = x * _over_rows(layerscale, config, wide)
        if config.dropout_threshold == 0:
            mask = jnp.ones((), jnp.bool_)
        else:
            mask = keep_mask(config, dropout_state, row_ids, index, width)
            x = jnp.where(mask, x * dropout.keep_scale(config.dropout_threshold), 0.0)
        if not _off(x_subset):
            mask = mask & ((x_subset >= 1) & (x_subset <= config.x_rows))[..., None]
        return x, mask

    stream, mask = branch(0, x)
    mask1 = None
    if not _off(x1):
        second, mask1 = branch(1, x1)
        stream = stream + second
    if not _off(residual):
        stream = stream + residual.astype(wide)

    mean, rsigma = statistics(config, stream)
    y = _normalised(stream, mean, rsigma)
    kept = jnp.finfo(config.stream_dtype)
    if config.write_stream and kept.dtype != wide:
        # The backward sees the stream rounded, and needs the statistics that fit what it sees: with
        # others a row of equal values is no longer normalised to 0. A pair of conversions would not
        # do here: XLA may drop it.
        mean, rsigma = statistics(config, jax.lax.reduce_precision(stream, kept.nexp, kept.nmant))

    def scaled(weight, bias):
        if _off(weight):
            return None
        z = y * _over_rows(weight, config, wide)
        if not _off(bias):
            z = z + _over_rows(bias, config, wide)
        z = z.astype(x.dtype)
        return z if _off(out_subset) else place(z, out_subset, config.out_rows, config)

    return scaled(weight, bias), scaled(weight1, bias1), stream, mean, rsigma, mask, mask1


def backward(config, x, stream, mean, rsigma, weight, weight1, layerscale, *rest):
    """dx, dx1, dresidual, dweight, dbias, dweight1, dbias1, dlayerscale; None where off."""
    dz, dz1, dstream, rowscale, x_subset, out_subset, dropout_state, row_ids = rest
    wide, width = rsigma.dtype, weight.shape[-1]
    y = _normalised(stream.astype(wide), mean, rsigma)

    def through(weight, dz):
        """(dy, dweight, dbias) of one norm."""
        if _off(weight):
            return 0.0, None, None
        dz = dz.astype(wide)
        if not _off(out_subset):
            dz = select(dz, out_subset, config)
        dweight, dbias = _sum_rows(dz * y, config), _sum_rows(dz, config)
        return dz * _over_rows(weight, config, wide), dweight, dbias

    dy, dweight, dbias = through(weight, dz)
    dy1, dweight1, dbias1 = through(weight1, dz1)
    dy = dy + dy1
    ds = dy - y * (jnp.sum(dy * y, -1, keepdims=True) / width)
    if not config.is_rms:
        ds = ds - jnp.sum(dy, -1, keepdims=True) / width
    ds = ds * rsigma[..., None]
    if not _off(dstream):
        ds = ds + dstream.astype(wide)

    def branch(index):
        """(gradient of one branch, dlayerscale)."""
        d, rows = ds, None
        if not _off(layerscale):
            rows = x.astype(wide) if _off(x_subset) else select(x.astype(wide), x_subset, config)
        if config.dropout_threshold:
            mask = keep_mask(config, dropout_state, row_ids, index, width)
            d = jnp.where(mask, d * dropout.keep_scale(config.dropout_threshold), 0.0)
            rows = None if rows is None else jnp.where(mask, rows, 0.0)  # it may be NaN
        if not _off(rowscale):
            d = d * rowscale.astype(wide)[..., None]
        dlayerscale = None
        if rows is not None:
            dlayerscale = _sum_rows(d * rows, config)
            d = d * _over_rows(layerscale, config, wide)
        if not _off(x_subset):
            d = place(d, x_subset, config.x_rows, config)
        return d, dlayerscale

    dx, dlayerscale = branch(0)
    dx1 = branch(1)[0] if config.has_x1 and config.dropout_threshold else None
    return dx, dx1, ds, dweight, dbias, dweight1, dbias1, dlayerscale
