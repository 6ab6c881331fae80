"""An operator: one primitive, its implementations, and how it behaves under JAX's transformations.

This file and _partition.py are the only ones that know JAX's internals. An `Op` is

    bind           -> abstract evaluation (shapes, explicit shardings, varying axes), vmap rule
    lowering       -> _partition.py: devices share the call, where there are several
    implementation -> one function a platform: an XLA custom call, or plain jnp
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax._src import core, dispatch
from jax.extend import core as extend_core
from jax.interpreters import batching, mlir
from jax.sharding import PartitionSpec

from jax_flash._ops._partition import BATCH, Partition, Signature, is_off

PLATFORMS = ("cpu", "cuda")


@dataclasses.dataclass(frozen=True)
class Implementation:
    """How one platform runs an operator.

    Attributes:
      name: "cuda", "cpu" or "xla".
      run: (config, *operands) -> results.
      refuse: (config, *operands) -> the reason why it cannot serve this call, or None.
      slower: (config, *operands) -> XLA's form is faster; it runs where nobody names this one.
    """

    name: str
    run: Callable[..., Sequence[jax.Array]]
    refuse: Callable[..., str | None] = lambda *_: None
    slower: Callable[..., bool] = lambda *_: False


def vary_together(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Under shard_map: all arrays vary over every mesh axis that one of them varies over.

    The cotangents of those that did not are then summed over the devices, by JAX.
    """
    return tuple(core.auto_insert_reshard(*arrays))


class Op:
    """One operator. `config` is a hashable dataclass with a field `implementation`."""

    def __init__(
        self,
        name: str,
        *,
        signature: Callable[..., Signature],
        results: Callable[..., Sequence[jax.ShapeDtypeStruct]],
        native: dict[str, Implementation],
        xla: Implementation,
    ):
        self.name = name
        self._signature = signature
        self._results = results
        self._native = native
        self._xla = xla
        self.primitive = self._make(name)
        self._local = self._make(f"{name}_local")
        _register_lowering(self.primitive, self._partitioned)
        # What custom_partitioning asks of whoever lowers to it.
        dispatch.prim_requires_devices_during_lowering.add(self.primitive)
        batching.primitive_batchers[self.primitive] = self._batch
        for platform in PLATFORMS:
            _register_lowering(self._local, functools.partial(self._run, platform), platform)
        _register_lowering(self._local, functools.partial(self._run, "other"))

    def __call__(self, config, *operands) -> tuple[jax.Array, ...]:
        return tuple(self.primitive.bind(*vary_together(*operands), config=config))

    def on_this_device(self, config, *operands) -> tuple[jax.Array, ...]:
        """The call inside the body of another operator, where each device is alone."""
        return tuple(self._local.bind(*vary_together(*operands), config=config))

    def _make(self, name: str) -> extend_core.Primitive:
        primitive = extend_core.Primitive(name)
        primitive.multiple_results = True
        primitive.def_impl(functools.partial(dispatch.apply_primitive, primitive))
        primitive.def_abstract_eval(self._abstract)
        return primitive

    def _abstract(self, *avals, config):
        results = self._results(config, *avals)
        mesh = core.get_cur_mesh_sharding().mesh
        specs = [PartitionSpec()] * len(results)
        if any(entry is not None for a in avals for entry in a.sharding.spec):  # explicit axes
            given = [a.sharding.spec for a in avals]
            specs = self._partition(config, avals, results).cut(given, mesh).results
        varying = core.standard_vma_rule(self.name, *avals)
        return [
            core.ShapedArray(
                result.shape,
                result.dtype,
                sharding=core.get_cur_mesh_sharding(spec),
                manual_axis_type=core.ManualAxisType(varying=varying),
            )
            for result, spec in zip(results, specs, strict=True)
        ]

    def _batch(self, operands, axes, *, config):
        """vmap: one more batch axis, of size 1 where an operand is not mapped."""
        unbatched = [_without_axis(x, axis) for x, axis in zip(operands, axes, strict=True)]
        # What is off stays off, though a loop may have given it the mapped axis.
        operands = [
            jnp.zeros(u.shape, u.dtype) if is_off(u) else x
            for x, u in zip(operands, unbatched, strict=True)
        ]
        axes = [None if is_off(u) else axis for axis, u in zip(axes, unbatched, strict=True)]
        names = self._signature(config, *unbatched).operands
        moved = []
        for x, axis, name in zip(operands, axes, names, strict=True):
            if axis is None:
                moved.append(jnp.expand_dims(x, 0) if name[:1] == (BATCH,) else x)
            elif name[:1] == (BATCH,):
                moved.append(jnp.moveaxis(x, axis, 0))
            else:
                raise NotImplementedError(f"jax_flash.{self.name}: vmap over an index operand")
        results = self(config, *moved)
        return results, [None if is_off(r) else 0 for r in results]

    def _partition(self, config, operands, results) -> Partition:
        return Partition(self._signature(config, *operands), operands, results)

    def _partitioned(self, *operands, config):
        avals = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in operands]
        call = self._partition(config, avals, self._results(config, *avals))
        return call.call(functools.partial(self.on_this_device, config), *operands)

    # Implementations -----------------------------------------------------------------------------

    def _run(self, platform, *operands, config):
        native, asked = self._native.get(platform), config.implementation
        if asked == "xla" or (asked is None and native is None):
            return self._xla.run(config, *operands)
        if native is None or asked not in (None, native.name):
            raise NotImplementedError(
                f"jax_flash.{self.name}: implementation={asked!r} does not run on platform "
                f"{platform!r}"
            )
        reason = native.refuse(config, *operands)
        if reason is None and asked is None and native.slower(config, *operands):
            return self._xla.run(config, *operands)
        if reason is None:
            return native.run(config, *operands)
        if asked is not None:
            raise NotImplementedError(f"jax_flash.{self.name}: implementation={asked!r}: {reason}")
        warn_once(
            f"jax_flash.{self.name}: no {native.name} kernel for this call: {reason}. "
            "XLA's compiled reference runs instead."
        )
        return self._xla.run(config, *operands)


def _register_lowering(primitive, function, platform=None):
    mlir.register_lowering(
        primitive, mlir.lower_fun(function, multiple_results=True), platform=platform
    )


def _without_axis(x, axis) -> jax.ShapeDtypeStruct:
    shape = list(x.shape)
    if axis is not None:
        del shape[axis]
    return jax.ShapeDtypeStruct(tuple(shape), x.dtype)


@functools.cache
def warn_once(text: str) -> None:
    warnings.warn(text, stacklevel=2)


def ffi_call(
    target: str,
    results: Sequence[jax.ShapeDtypeStruct],
    *operands,
    in_place: dict[int, int] | None = None,
    **attributes,
):
    """One custom call; attributes are booleans or numpy scalars, scratch memory is a result.

    `in_place` names operands whose memory results take: {operand: result}. XLA copies such an
    operand first where somebody still needs it. (Operators batch by their own rule; vmap sees a
    call only inside the body of one that is made of others.)
    """
    call = jax.ffi.ffi_call(
        target, tuple(results), input_output_aliases=in_place, vmap_method="sequential"
    )
    return call(*operands, **attributes)
