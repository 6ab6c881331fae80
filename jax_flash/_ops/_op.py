"""An operator: one primitive, its implementations, and how it behaves under JAX's transformations.

This is the only file that knows JAX's internals. An `Op` is

    bind           -> abstract evaluation (shapes, explicit shardings, varying axes), vmap rule
    lowering       -> custom_partitioning with a Shardy rule, where there are several devices
    implementation -> one function a platform: an XLA custom call, or plain jnp

Operands and results are described by axis names, e.g. ("*", "T", "N", "H"): "*" stands for the
leading batch axes that all operands have in common, where each one has the full size or 1
(shared: what `vmap` makes of an operand that is not mapped). An operand of shape (0,) is an
option that is off.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax._src import core, dispatch
from jax._src.sharding_impls import unflatten_array
from jax.experimental.custom_partitioning import custom_partitioning
from jax.extend import core as extend_core
from jax.interpreters import batching, mlir
from jax.sharding import NamedSharding, PartitionSpec

Axes = tuple[str | None, ...]
BATCH = "*"
PLATFORMS = ("cpu", "cuda")


@dataclasses.dataclass(frozen=True)
class Signature:
    """Axis names of one call's operands and results.

    Attributes:
      operands, results: names of each array's axes, first BATCH where it has the batch axes; ()
        for an operand that is off.
      shardable: names (besides the batch axes) along which devices may share the call, with the
        number of equal parts it falls into: {"N": kv_heads}. A result without such an axis is the
        sum over the devices that share it.
      aliases: names that are cut wherever another is, one to each part: {"K": "N"}. Where several
        devices share a part, such an axis stays whole: each device takes its own one from it, and
        results with this axis are sums over devices.
      enter: (operands, cuts) -> a device's operands, where their values count from the call's
        first column; `cuts` are the mesh axes that each cut name lies on.
      join: (results, cuts) -> the call's results, where they are no sums over the devices.
      instead: (operands, cuts) -> a device's part of the results where, cut so, it is not what the
        implementation makes of its operands, or None.
    """

    operands: tuple[Axes, ...]
    results: tuple[Axes, ...]
    shardable: dict[str, int]
    aliases: dict[str, str]
    enter: Callable[..., Sequence[jax.Array]] | None = None
    join: Callable[..., Sequence[jax.Array]] | None = None
    instead: Callable[..., Sequence[jax.Array] | None] | None = None


class _Cut(NamedTuple):
    """How devices share a call.

    Attributes:
      operands, results: a PartitionSpec for each array.
      operand_places, result_places: for each array the (axis, mesh axes) that stays whole though
        the call is cut by it, or None.
      result_sums: for each result the mesh axes that cut the call along an axis it has not.
      axes: the mesh axes of each name that is cut.
    """

    operands: list[PartitionSpec]
    results: list[PartitionSpec]
    operand_places: list[tuple[int, tuple[str, ...]] | None]
    result_places: list[tuple[int, tuple[str, ...]] | None]
    result_sums: list[tuple[str, ...]]
    axes: dict[str, tuple[str, ...]]


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


def is_off(array) -> bool:
    return array.shape == (0,)


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
            specs = self._cut(config, avals, [a.sharding.spec for a in avals], mesh).results
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

    # Sharding ------------------------------------------------------------------------------------

    def _named_axes(self, config, avals):
        """Every axis of every array by name: "b0", "b1", ... for batch axes, None if shared."""
        signature = self._signature(config, *avals)
        results = self._results(config, *avals)
        arrays = (*avals, *results)
        named: list[Axes] = []
        for array, axes in zip(arrays, (*signature.operands, *signature.results), strict=True):
            if axes[:1] == (BATCH,):
                lead = array.shape[: len(array.shape) - len(axes) + 1]
                full = results[0].shape
                batch = (f"b{i}" if size == full[i] else None for i, size in enumerate(lead))
                axes = (*batch, *axes[1:])
            named.append(axes or (None,) * len(array.shape))
        sizes = {
            name: n
            for axes, a in zip(named, arrays, strict=True)
            for name, n in zip(axes, a.shape, strict=True)
        }
        return signature, named[: len(avals)], named[len(avals) :], sizes

    def _cut(self, config, avals, given, mesh) -> _Cut:
        """The one way to cut the call: an axis goes as the first operand that cuts it has it."""
        signature, operand_axes, result_axes, sizes = self._named_axes(config, avals)
        chosen: dict[str, Any] = {}
        shared: dict[str, tuple[str, ...]] = {}
        used: set[str] = set()
        for axes, spec in zip(operand_axes, given, strict=True):
            for name, entry in zip(axes, tuple(spec or ()), strict=False):  # a spec may be short
                name = signature.aliases.get(name, name)
                if name is None or name in chosen or not isinstance(entry, (str, tuple)):
                    continue
                mesh_axes = (entry,) if isinstance(entry, str) else entry
                devices = math.prod(mesh.shape[axis] for axis in mesh_axes)
                parts = sizes[name] if name.startswith("b") else signature.shardable.get(name)
                if parts is None or used & set(mesh_axes):
                    continue
                if parts % devices != 0:
                    if devices % parts != 0 or sizes[name] % devices != 0:
                        continue
                    shared[name] = mesh_axes
                chosen[name] = entry
                used |= set(mesh_axes)

        def entry_of(name):
            target = signature.aliases.get(name, name)
            return None if target != name and target in shared else chosen.get(target)

        def specs(arrays):
            return [PartitionSpec(*(entry_of(name) for name in axes)) for axes in arrays]

        def places(arrays):  # of axes that stay whole though others are cut by them
            return [
                next(
                    (
                        (i, shared[signature.aliases[name]])
                        for i, name in enumerate(axes)
                        if signature.aliases.get(name) in shared
                    ),
                    None,
                )
                for axes in arrays
            ]

        cuts = {n: (e,) if isinstance(e, str) else tuple(e) for n, e in chosen.items() if e}

        def missing(axes):  # mesh axes over which a result is a sum
            own = {signature.aliases.get(name, name) for name in axes}
            others = [name for name in signature.shardable if name in cuts.keys() - own]
            return tuple(axis for name in others for axis in cuts[name])

        return _Cut(
            specs(operand_axes),
            specs(result_axes),
            places(operand_axes),
            places(result_axes),
            [() if signature.join else missing(axes) for axes in result_axes],
            cuts,
        )

    def _partitioned(self, *operands, config):
        avals = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in operands]
        results = self._results(config, *avals)
        # What is off has nothing to cut: it stays outside of the partitioned call.
        on = [i for i, x in enumerate(operands) if not is_off(x)]
        on_results = [i for i, x in enumerate(results) if not is_off(x)]

        def one_shard(*shards, cuts=None):
            given = iter(shards)
            full = [
                next(given) if i in on else jnp.zeros(a.shape, a.dtype) for i, a in enumerate(avals)
            ]
            if cuts and signature.enter:
                full = signature.enter(full, cuts)
            out = signature.instead(full, cuts) if cuts and signature.instead else None
            if out is None:
                out = self.on_this_device(config, *full)
            if cuts and signature.join:
                out = signature.join(out, cuts)
            return tuple(out[i] for i in on_results)

        def cut(mesh, arg_shapes):
            given: list[Any] = [None] * len(avals)
            for i, a in zip(on, arg_shapes, strict=True):
                given[i] = _spec_of(a.sharding, len(a.shape), mesh)
            return self._cut(config, avals, given, mesh)

        def partition(mesh, arg_shapes, result_shapes):
            c = cut(mesh, arg_shapes)
            takes = [c.operand_places[i] for i in on]
            gives = [c.result_places[i] for i in on_results]
            sums = [c.result_sums[i] for i in on_results]

            def share(*shards):
                own = (_own_part(x, place, mesh) for x, place in zip(shards, takes, strict=True))
                wholes = (results[i].shape for i in on_results)
                parts = one_shard(*own, cuts=c.axes)
                placed = (
                    _sum_of_parts(x, place, mesh, whole)
                    for x, place, whole in zip(parts, gives, wholes, strict=True)
                )
                return tuple(_sum_over(x, axes) for x, axes in zip(placed, sums, strict=True))

            def local(*shards):
                # A shard knows of no mesh: a sharding named in here would outlive the partitioner.
                with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
                    return share(*shards)

            return (
                mesh,
                local,
                tuple(NamedSharding(mesh, c.results[i]) for i in on_results),
                tuple(NamedSharding(mesh, c.operands[i]) for i in on),
            )

        def infer_sharding_from_operands(mesh, arg_shapes, result_shapes):
            specs = cut(mesh, arg_shapes).results
            return tuple(NamedSharding(mesh, specs[i]) for i in on_results)

        call = custom_partitioning(lambda *whole: one_shard(*whole))
        signature, operand_axes, result_axes, sizes = self._named_axes(config, avals)
        rule, factors = _shardy_rule(
            signature, [operand_axes[i] for i in on], [result_axes[i] for i in on_results], sizes
        )
        call.def_partition(
            partition=partition,
            infer_sharding_from_operands=infer_sharding_from_operands,
            sharding_rule=rule,
            decode_shardings=False,
            **factors,
        )
        returned = iter(call(*(operands[i] for i in on)))
        return [
            next(returned) if i in on_results else jnp.zeros(r.shape, r.dtype)
            for i, r in enumerate(results)
        ]

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


def _spec_of(sharding, rank: int, mesh) -> PartitionSpec:
    """The mesh axes along which XLA has cut an array, of those that it cuts whole.

    Where a mesh axis has more devices than there are kv heads, Shardy proposes to cut them by a
    part of it, which no PartitionSpec can say. Such an axis of the array, and what follows it,
    counts as not cut.
    """
    tiles = getattr(sharding, "_hlo_sharding", None)
    if tiles is None or mesh.empty or not tiles.is_tiled():
        return PartitionSpec()
    order = iter(unflatten_array(mesh.shape, tiles.tile_assignment_devices()))
    spec: list[tuple[str, ...]] = []
    for parts in tiles.tile_assignment_dimensions()[:rank]:
        names: list[str] = []
        while parts > 1:
            names.append(next(order))
            if parts % mesh.shape[names[-1]] != 0:
                return PartitionSpec(*spec)
            parts //= mesh.shape[names[-1]]
        spec.append(tuple(names))
    return PartitionSpec(*spec)


def _part(axis: int, mesh_axes, mesh, parts: int):
    """Which of `parts` is this device's, where several devices share each."""
    devices = math.prod(mesh.shape[name] for name in mesh_axes)
    return jax.lax.axis_index(mesh_axes) // (devices // parts)


def _own_part(x, place, mesh):
    if place is None:
        return x
    axis, mesh_axes = place
    at = _part(axis, mesh_axes, mesh, x.shape[axis])
    return jax.lax.dynamic_slice_in_dim(x, at, 1, axis)


def _sum_of_parts(x, place, mesh, whole: Sequence[int]):
    if place is None:
        return x
    axis, mesh_axes = place
    at = _part(axis, mesh_axes, mesh, whole[axis])
    wide = jnp.promote_types(x.dtype, jnp.float32)
    full = jnp.zeros((*x.shape[:axis], whole[axis], *x.shape[axis + 1 :]), wide)
    full = jax.lax.dynamic_update_slice_in_dim(full, x.astype(wide), at, axis)
    return jax.lax.psum(full, mesh_axes).astype(x.dtype)


def _sum_over(x, mesh_axes: tuple[str, ...]):
    if not mesh_axes:
        return x
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return jax.lax.psum(x.astype(wide), mesh_axes).astype(x.dtype)


def _shardy_rule(signature, operand_axes, result_axes, sizes):
    """The sharding rule in Shardy's notation (einsum-like, one factor an axis).

    An axis that must stay whole gets a factor of its own that asks for replication. Where G query
    heads share a kv head, N = (K G).
    """
    whole: list[str] = []  # in order of appearance, as Shardy wants them
    factor_sizes: dict[str, int] = {}

    def factor(name):
        name = signature.aliases.get(name, name)
        if name is not None and name.startswith("b"):
            return name
        if name in signature.shardable:
            return name.lower()
        whole.append(f"w{len(whole)}")
        return whole[-1]

    def factors(name):
        parts = signature.shardable.get(name)
        if parts is None or sizes[name] == parts:
            return factor(name)
        group = f"{name.lower()}group"
        if parts == 1:  # a factor of size 1 may not stand beside another one
            return group
        factor_sizes[group] = sizes[name] // parts
        return f"({name.lower()} {group})"

    def side(arrays):
        return ", ".join(" ".join(factors(name) for name in axes) for axes in arrays)

    rule = f"{side(operand_axes)} -> {side(result_axes)}"
    return rule, {"need_replication_factors": tuple(whole), **factor_sizes}


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
