"""How devices share a call: from the names of its arrays' axes to one device's part of it.

    Signature  -> what the axes of operands and results are called, and which may be cut
    Partition  -> of one call: where operands that lie cut say to cut it, the rule in Shardy's
                  notation, the call through custom_partitioning

Operands and results are described by axis names, e.g. ("*", "T", "N", "H"): "*" stands for the
leading batch axes that all operands have in common, where each one has the full size or 1
(shared: what `vmap` makes of an operand that is not mapped). An operand of shape (0,) is an
option that is off.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax._src.sharding_impls import unflatten_array
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec

Axes = tuple[str | None, ...]
BATCH = "*"


def is_off(array) -> bool:
    return array.shape == (0,)


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


class Cut(NamedTuple):
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


class Partition:
    """One call, by its signature and the shapes of its arrays."""

    def __init__(self, signature: Signature, operands, results):
        self._signature = signature
        self._operands, self._results = operands, results
        # Every axis of every array by name: "b0", "b1", ... for batch axes, None if shared.
        arrays = (*operands, *results)
        named: list[Axes] = []
        for array, axes in zip(arrays, (*signature.operands, *signature.results), strict=True):
            if axes[:1] == (BATCH,):
                lead = array.shape[: len(array.shape) - len(axes) + 1]
                full = results[0].shape
                batch = (f"b{i}" if size == full[i] else None for i, size in enumerate(lead))
                axes = (*batch, *axes[1:])
            named.append(axes or (None,) * len(array.shape))
        self._operand_axes, self._result_axes = named[: len(operands)], named[len(operands) :]
        self._sizes = {
            name: n
            for axes, a in zip(named, arrays, strict=True)
            for name, n in zip(axes, a.shape, strict=True)
        }

    def cut(self, given, mesh) -> Cut:
        """The one way to cut the call: an axis goes as the first operand that cuts it has it.

        Args:
          given: for each operand the PartitionSpec that it comes with, or None.
        """
        signature, sizes = self._signature, self._sizes
        chosen: dict[str, Any] = {}
        shared: dict[str, tuple[str, ...]] = {}
        used: set[str] = set()
        for axes, spec in zip(self._operand_axes, given, strict=True):
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

        return Cut(
            specs(self._operand_axes),
            specs(self._result_axes),
            places(self._operand_axes),
            places(self._result_axes),
            [() if signature.join else missing(axes) for axes in self._result_axes],
            cuts,
        )

    def call(self, run: Callable[..., Sequence[jax.Array]], *operands) -> list[jax.Array]:
        """`run(*operands)`, which XLA may cut: then each device runs it on its part."""
        signature, results = self._signature, self._results
        # What is off has nothing to cut: it stays outside of the partitioned call.
        on = [i for i, x in enumerate(operands) if not is_off(x)]
        on_results = [i for i, x in enumerate(results) if not is_off(x)]

        def one_shard(*shards, cuts=None):
            given = iter(shards)
            full = [
                next(given) if i in on else jnp.zeros(a.shape, a.dtype)
                for i, a in enumerate(self._operands)
            ]
            if cuts and signature.enter:
                full = signature.enter(full, cuts)
            out = signature.instead(full, cuts) if cuts and signature.instead else None
            if out is None:
                out = run(*full)
            if cuts and signature.join:
                out = signature.join(out, cuts)
            return tuple(out[i] for i in on_results)

        def cut(mesh, arg_shapes):
            given: list[Any] = [None] * len(operands)
            for i, a in zip(on, arg_shapes, strict=True):
                given[i] = _spec_of(a.sharding, len(a.shape), mesh)
            return self.cut(given, mesh)

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
        rule, factors = self._shardy_rule(
            [self._operand_axes[i] for i in on], [self._result_axes[i] for i in on_results]
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

    def _shardy_rule(self, operand_axes, result_axes):
        """The sharding rule in Shardy's notation (einsum-like, one factor an axis).

        An axis that must stay whole gets a factor of its own that asks for replication. Where G
        query heads share a kv head, N = (K G).
        """
        signature, sizes = self._signature, self._sizes
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
