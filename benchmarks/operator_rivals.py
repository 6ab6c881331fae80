"""Other libraries' fused operators: tokamax in JAX; torch.compile, Liger and QuACK in torch.

Each function makes of a workload a call of (*primals, *constants), see operator_workloads.Data, or
raises Unsupported with the reason. They are on a GPU alone, and imported where they are needed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax

from benchmarks import providers
from benchmarks.operator_workloads import EPSILON, SCALE, SMOOTHING, Workload
from benchmarks.providers import Unsupported

_POOL_BYTES = 24 << 30  # of arguments that torch's launches use up, made before a burst


def norm_operands(workload: Workload, operands):
    """x, weight, bias or None, residual, dropout key or None."""
    x, weight = operands[:2]
    has_bias = workload.kind == "ln"
    bias = operands[2] if has_bias else None
    residual, *key = operands[2 + has_bias :]
    return x, weight, bias, residual, key[0] if key else None


def tokamax_call(workload: Workload) -> Callable:
    if workload.operator != "norm" or workload.dropout_rate:
        raise Unsupported("of these operators tokamax has kernels for norms, without dropout")
    import tokamax

    def norm(*operands):
        x, weight, bias, residual, _ = norm_operands(workload, operands)
        s = x + residual
        options = dict(subtract_mean=workload.kind == "ln", epsilon=EPSILON)
        return tokamax.layer_norm(s, weight, bias, implementation="triton", **options), s

    return norm


# ---- torch


def torch_compile_call(workload: Workload) -> Callable:
    import torch
    from torch.nn import functional

    def norm(*operands):
        x, weight, bias, residual, _ = norm_operands(workload, operands)
        if workload.dropout_rate:
            x = functional.dropout(x, workload.dropout_rate, True)
        s = residual + x
        width = s.shape[-1:]
        if workload.kind == "ln":
            return functional.layer_norm(s, width, weight, bias, EPSILON), s
        return functional.rms_norm(s, width, weight, EPSILON), s

    def cross_entropy(logits, labels):
        options = dict(reduction="none", label_smoothing=SMOOTHING)
        return functional.cross_entropy(logits.float(), labels.long(), **options)

    def softmax(scores, *mask):
        size = scores.shape[-2:]
        masked = (
            mask[0] if mask else torch.ones(size, dtype=torch.bool, device=scores.device).triu(1)
        )
        scores = (scores.float() * SCALE).masked_fill(masked, -1e9)
        return torch.softmax(scores, -1).to(getattr(torch, workload.dtype))

    def turned(x, cos, sin):
        cos, sin = cos[:, None], sin[:, None]
        if workload.kind == "half":
            x1, x2 = x.float().chunk(2, -1)
            return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], -1).to(x.dtype)
        x1, x2 = x.float().unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack([x1 * cos - x2 * sin, x2 * cos + x1 * sin], -1).flatten(-2).to(x.dtype)

    def dense_gelu(x, weight, bias):
        return functional.gelu(torch.addmm(bias, x, weight), approximate="tanh")

    calls = dict(norm=norm, cross_entropy=cross_entropy, softmax=softmax, dense_gelu=dense_gelu)
    calls["linear_cross_entropy"] = lambda x, weight, labels: cross_entropy(x @ weight, labels)

    def rotary(*operands):
        *arrays, cos, sin = operands
        if workload.is_packed:
            q, k, v = arrays[0].unbind(-3)
            return torch.stack([turned(q, cos, sin), turned(k, cos, sin), v], -3)
        return tuple(turned(x, cos, sin) for x in arrays)

    calls["rotary"] = rotary
    calls["mlp"] = lambda x, w1, b1, w2, b2: torch.addmm(b2, dense_gelu(x, w1, b1), w2)
    return torch.compile(calls[workload.operator], dynamic=False)


def liger_call(workload: Workload) -> Callable:
    """Its norms, and its cross-entropy as long as no gradient is wanted; `_liger_in_place` has the
    rest. Its softmax has no mask."""
    if workload.dropout_rate:
        raise Unsupported("Liger's norms have no dropout")
    if workload.operator == "cross_entropy":
        return _liger_cross_entropy("none")
    if workload.kind == "half" and not workload.is_packed:
        return _not_alone
    if workload.operator != "norm":
        raise Unsupported("of these operators Liger has norms, cross-entropy and rotary by halves")
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    def norm(*operands):
        x, weight, bias, residual, _ = norm_operands(workload, operands)
        if bias is None:
            options = (EPSILON, 0.0, "llama", False)
            return LigerFusedAddRMSNormFunction.apply(x, residual, weight, *options)
        s = x + residual
        return LigerLayerNormFunction.apply(s, weight, bias, EPSILON), s

    return norm


def _not_alone(*operands):
    raise NotImplementedError("in place only")


def _liger_cross_entropy(reduction: str) -> Callable:
    from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction

    def cross_entropy(logits, labels):
        options = (None, -100, 0.0, SMOOTHING, reduction)
        return LigerCrossEntropyFunction.apply(logits, labels.long(), *options)[0]

    return cross_entropy


def _liger_in_place(workload: Workload, primals, dout, constants) -> dict[str, Callable]:
    """Direction -> a function that builds the call: those of Liger's that use up what they take.

    Its cross-entropy turns logits into their gradient in the forward. It has no other pass if the
    loss is a mean whose cotangent is 1, so that is what is timed; what is compared with ours is the
    loss of each row and its gradient.
    """
    import torch

    if workload.operator == "cross_entropy":

        def both(reduction):
            def run(logits, labels, dloss):
                loss = _liger_cross_entropy(reduction)(logits.requires_grad_(), labels)
                dloss = dloss.to(loss.dtype) if reduction == "none" else torch.ones_like(loss)
                return loss, *torch.autograd.grad(loss, [logits], dloss)

            return UsedUp(run, primals, (*constants, dout))

        def forward_backward():
            call = both("mean")
            call.compared = both("none")
            return call

        return {"forward_backward": forward_backward}
    if workload.operator == "rotary":
        from liger_kernel.ops import rope

        cos, sin = (torch.cat([x, x], -1)[None].contiguous() for x in constants)

        def turned(turn):
            def run(q, k):
                q, k = turn(q.transpose(1, 2), k.transpose(1, 2), cos, sin)[:2]
                return q.transpose(1, 2), k.transpose(1, 2)

            return run

        return {
            "forward": lambda: UsedUp(turned(rope.rope_forward), primals, ()),
            "backward": lambda: UsedUp(turned(rope.rope_backward), dout, ()),
        }
    return {}


class UsedUp:
    """A call that writes over some tensors: every launch takes copies, made before the burst."""

    def __init__(self, call: Callable, given, kept):
        self._call, self._given, self._kept = call, given, kept
        self._copies: list = []

    def refill(self, launches: int) -> int:
        """Copies for as many launches as wanted, or as fit; returns how many."""
        size = sum(x.numel() * x.element_size() for x in self._given)
        launches = max(1, min(launches, _POOL_BYTES // max(size, 1)))
        self._copies = []
        self._copies = [[x.detach().clone() for x in self._given] for _ in range(launches)]
        providers.synchronise(None)
        return launches

    def __call__(self):
        if not self._copies:
            self.refill(1)
        return self._call(*self._copies.pop(), *self._kept)


def quack_call(workload: Workload) -> Callable:
    if workload.kind != "rms" or workload.dropout_rate:
        raise Unsupported("QuACK: RMSNorm without dropout is the call that has our options")
    from quack.rmsnorm import rmsnorm

    def norm(*operands):
        x, weight, _, residual, _ = norm_operands(workload, operands)
        return rmsnorm(x, weight, residual=residual, eps=EPSILON, prenorm=True)

    return norm


def prepare_torch(provider: str, workload: Workload, call, primals, dout, constants):
    """Direction -> a function that builds the timed call, on the very same data.

    What writes over nothing is recorded as a CUDA graph: a launch then costs the host next to
    nothing, as it does in a jitted program.
    """
    import torch
    import torch._functorch.config

    torch._functorch.config.donated_buffer = False  # a backward runs again and again
    makers = providers.prepare_torch(call, primals, dout, constants)
    if provider == "liger":
        tensors = jax.tree.map(torch.from_dlpack, (primals, dout, constants))
        if in_place := _liger_in_place(workload, *tensors):
            # Its cross-entropy asks the device for the number of rows: no graph of that.
            del makers["backward"], makers["forward_backward"]
            return makers | in_place
    return {way: functools.partial(recorded, make) for way, make in makers.items()}


def recorded(make: Callable) -> Callable:
    """What `make` builds, as a CUDA graph of one launch."""
    import torch

    if not torch.cuda.is_available():
        return make()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # autograd runs a backward where its forward ran
        run = make()
        for _ in range(3):  # compiles
            run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                result = run()
        except Exception as error:
            print(f"  no CUDA graph: {error}".splitlines()[0])
            return run
    torch.cuda.synchronize()

    def replay():
        graph.replay()
        return result

    replay.recorded = run  # what it reads must stay, a backward's residuals above all
    return replay
