"""One process of the soak: compiles signatures, runs their cases on the device, judges them.

What it does not know is how many cases there are, and who runs the others: tests/soak.py.
"""

from __future__ import annotations

import contextlib

import jax
import jax.numpy as jnp
import numpy as np

import jax_flash
from tests import helpers, soak_cases


class Programs:
    """The two compiled programs of each signature: ours, and the plain form."""

    def __init__(self, implementation: str):
        self.implementation = implementation
        self.compiled = {}

    def get(self, signature):
        if signature not in self.compiled:
            ours = jax.jit(lambda *args: self._ours(signature, *args))
            plain = jax.jit(lambda *args: self._plain(signature, *args))
            self.compiled[signature] = ours, plain
        return self.compiled[signature]

    def _call(self, s, operands, q, k, v):
        """(out, lse or None) of the public function, as a user would write the call."""

        options = dict(
            scale=s.scale,
            is_causal=s.is_causal,
            causal_offset=operands.get("causal_offset", 0),
            local_window_size=s.window,
            deterministic=s.deterministic,
            return_lse=s.lse,
            implementation=self.implementation,
        )
        if s.offset == "bottom_right":
            options["causal_offset"] = "bottom_right"
        if s.rate:
            key = jax.random.wrap_key_data(operands["dropout_key"])
            options |= dict(dropout_rate=s.rate, dropout_key=key)
        if s.sequences:
            q, k, v = q[0], k[0], v[0]
            cu_q, cu_k = operands["cu_seqlens_q"], operands["cu_seqlens_k"]
            if s.packing == "qkv":
                call = jax_flash.varlen_attention_qkvpacked
                result = call(jnp.stack([q, k, v], -3), cu_q, **options)
            elif s.packing == "kv":
                call = jax_flash.varlen_attention_kvpacked
                result = call(q, jnp.stack([k, v], -3), cu_q, cu_k, **options)
            else:
                result = jax_flash.varlen_attention(q, k, v, cu_q, cu_k, **options)
            result = jax.tree.map(lambda x: x[None], result)
        else:
            for name in ("query_seq_lengths", "key_value_seq_lengths"):
                options[name] = operands.get(name)
            if s.block_size is not None:
                options |= dict(block_mask=operands["block_mask"], block_size=s.block_size)
            if s.packing == "qkv":
                result = jax_flash.attention_qkvpacked(jnp.stack([q, k, v], -3), **options)
            elif s.packing == "kv":
                result = jax_flash.attention_kvpacked(q, jnp.stack([k, v], -3), **options)
            else:
                result = jax_flash.attention(q, k, v, **options)
        return result if s.lse else (result, None)

    def _ours(self, s, operands, q, k, v, dout, dlse):
        (out, lse), pull = jax.vjp(lambda *qkv: self._call(s, operands, *qkv), q, k, v)
        return out, lse, *pull((dout, dlse if s.lse else None))

    def _plain(self, s, pairs, q, k, v, dout, dlse):
        ok, keep = pairs
        dlse = jnp.where(ok.any(-1), dlse, 0) if s.lse else jnp.zeros_like(dlse)
        scale = s.head_dim**-0.5 if s.scale is None else s.scale
        (out, _), grads = helpers.plain_attention(
            (q, k, v), (dout, dlse), ok, keep, scale=scale, rate=s.rate
        )
        return out, None, *grads


def poisoned(case, arrays):
    """q, k, v, dO with NaN in the rows that lie outside lengths and sequences."""
    rows_q, rows_k = soak_cases.existing_rows(case)
    found = []
    for array, rows in zip(arrays, (rows_q, rows_k, rows_k, rows_q), strict=True):
        array = array.copy()
        array[~rows] = np.nan
        found.append(array)
    return found


class Runner:
    """What a worker keeps from case to case."""

    def __init__(self, plan: soak_cases.Plan, implementation: str | None):
        # Without this the plain form would run in TF32 on a GPU.
        jax.config.update("jax_default_matmul_precision", "highest")
        on_gpu = jax.default_backend() == "gpu"
        implementation = implementation or ("cuda" if on_gpu else "cpu")
        self.plan = plan
        self.device = helpers.device(implementation)
        self.programs = Programs(implementation)

    def run(self, index: int) -> tuple[float, list[str]]:
        """One case on the device and its judgement -> (worst ratio, complaints)."""
        case = self.plan.case(index)
        pairs = soak_cases.pairs(case)
        *arrays, dlse = soak_cases.tensors(case, self.plan.seed)
        seen = np.where(pairs[0].any(-1), dlse, np.float32(0))  # an empty row's has no derivative
        given = poisoned(case, arrays) if case.poisoned else arrays
        ours_program, plain_program = self.programs.get(case.signature)
        on_gpu = self.device.platform == "gpu"
        with jax.default_device(self.device):
            ours = [ours_program(case.operands, *given, seen)]
            if index % 8 == 0:
                ours.append(ours_program(case.operands, *given, seen))
        with helpers.plain_device() if on_gpu else jax.default_device(self.device):
            plain = plain_program(pairs, *arrays, dlse)
        truth = soak_cases.definition(case, pairs, arrays, dlse)  # while the device computes
        ours, plain = jax.device_get((ours, plain))
        judged = [soak_cases.judge(case, pairs, truth, results, plain) for results in ours]
        ratio = max(ratio for ratio, _ in judged)
        complaints = [text for _, texts in judged for text in texts]
        always = 5 if case.signature.deterministic else 2  # out and lse; else the gradients as well
        for name, a, *again in list(zip(("out", "lse", "dq", "dk", "dv"), *ours))[:always]:
            for b in again:
                if a is not None and a.tobytes() != b.tobytes():
                    complaints.append(f"{name}: other bits the second time")
        return ratio, complaints


def work(connection, plan: soak_cases.Plan, implementation: str | None) -> None:
    """Runs the cases whose indices it is sent, until it is sent None or nobody listens."""
    with contextlib.closing(connection), contextlib.suppress(EOFError, BrokenPipeError):
        runner = Runner(plan, implementation)
        connection.send(None)  # ready for the first
        while (index := connection.recv()) is not None:
            try:
                result = runner.run(index)
            except Exception as error:  # a call that raises has failed; the others go on
                result = 0.0, [f"{type(error).__name__}: {str(error)[:500]}"]
            connection.send(result)
