"""Time a training step of a GPT with our attention and with jax.nn's, in one process.

    python -m benchmarks.model                     # 1.3 B parameters, T = 4096: an H200's size
    python -m benchmarks.model --tiny              # any machine
    python -m benchmarks.model --profile           # where the device's time goes, kernel by kernel

One program a library, alike but for the attention call: pre-norm blocks under one `lax.scan`, bf16
products, float32 parameters, Adam; token embedding and tied head. Their first losses, from the same
parameters, must agree (the last of them is in the row; rows until 2026-11-20 have one that compares
nothing); then steps are timed in bursts, in random order. Attention's own share is timed alone, at
the model's shapes, times the layers. Rows go to benchmarks/results/<device>/model.csv.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import csv
import dataclasses
import datetime
import functools
import os
import pathlib
import random
import statistics
import sys
import tempfile
import time

import jax
import jax.numpy as jnp

from benchmarks import evidence, providers, run
from benchmarks.workloads import Workload

COLUMNS = "run,device,date,commit,source,model,attention,version,step_ms,tokens_per_s,spread"
COLUMNS = (COLUMNS + ",memory_gb,forward_ms,backward_ms,loss").split(",")
# Of one step under the profiler, milliseconds of device time; empty without --profile.
KINDS = {
    "attention forward": "step_forward_ms",
    "attention backward": "step_backward_ms",
    "matrix products": "step_products_ms",
    "the rest": "step_rest_ms",
}
COLUMNS += KINDS.values()
ATTENTION = ("jax_flash", "jax_nn_cudnn")
FIRST_STEPS, LOSSES_APART = 3, 2e-4  # the latter relative


@dataclasses.dataclass(frozen=True)
class Model:
    layers: int = 24
    width: int = 2048
    heads: int = 16
    seq: int = 4096
    batch: int = 4
    vocabulary: int = 50304  # a multiple of 128

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    def parameters(self) -> int:
        return sum(x.size for x in jax.tree.leaves(jax.eval_shape(lambda: init(self, 0))))

    def name(self) -> str:
        return (
            f"gpt {self.parameters() / 1e9:.2g}B, {self.layers} layers, D={self.width} "
            f"N={self.heads} H={self.head_dim}, B={self.batch} T={self.seq}"
        )


def init(model: Model, seed: int) -> dict:
    """Parameters, float32; those of the blocks stacked along the layers."""
    d, n = model.width, model.layers
    shapes = {
        "qkv": (n, d, 3 * d),
        "out": (n, d, d),
        "up": (n, d, 4 * d),
        "down": (n, 4 * d, d),
    }
    keys = jax.random.split(jax.random.key(seed), len(shapes) + 1)
    blocks = {
        name: 0.02 * jax.random.normal(key, shape)
        for key, (name, shape) in zip(keys, shapes.items(), strict=False)
    }
    blocks |= {name: jnp.ones((n, d)) for name in ("norm_attention", "norm_mlp")}
    embedding = 0.02 * jax.random.normal(keys[-1], (model.vocabulary, d))
    return {"embedding": embedding, "blocks": blocks, "norm": jnp.ones(d)}


def rms_norm(x, weight):
    wide = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + 1e-6)
    return (wide * scale * weight).astype(x.dtype)


def block(model: Model, attend, x, weights):
    """x + attention(norm(x)), then x + mlp(norm(x)); x is bfloat16 [B, T, D]."""
    w = {name: weight.astype(x.dtype) for name, weight in weights.items() if weight.ndim == 2}
    qkv = rms_norm(x, weights["norm_attention"]) @ w["qkv"]
    qkv = qkv.reshape(*x.shape[:2], 3, model.heads, model.head_dim)
    out = attend(*(qkv[:, :, i] for i in range(3)))
    x = x + out.reshape(x.shape) @ w["out"]
    hidden = jax.nn.gelu(rms_norm(x, weights["norm_mlp"]) @ w["up"])
    return x + hidden @ w["down"], None


def loss(model: Model, attend, parameters, tokens):
    """Mean cross-entropy of the next token; tokens is int32 [B, T + 1]."""
    embedding = parameters["embedding"].astype(jnp.bfloat16)
    x = embedding[tokens[:, :-1]]
    x, _ = jax.lax.scan(functools.partial(block, model, attend), x, parameters["blocks"])
    logits = rms_norm(x, parameters["norm"]) @ embedding.T
    logits = logits.astype(jnp.float32)
    target = jnp.take_along_axis(logits, tokens[:, 1:, None], -1)[..., 0]
    return (jax.nn.logsumexp(logits, -1) - target).mean()


def step(loss, state, tokens):
    """One step of Adam on (parameters, both moments, count) -> the same afterwards, the loss."""
    parameters, first, second, count = state
    value, gradients = jax.value_and_grad(loss)(parameters, tokens)
    count = count + 1
    first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, first, gradients)
    second = jax.tree.map(lambda v, g: 0.95 * v + 0.05 * g * g, second, gradients)
    rate = 3e-4 * jnp.sqrt(1 - 0.95**count) / (1 - 0.9**count)
    parameters = jax.tree.map(
        lambda p, m, v: p - rate * m / (jnp.sqrt(v) + 1e-8), parameters, first, second
    )
    return (parameters, first, second, count), value


def first_state(parameters):
    """What `step` begins with."""
    zeros = (jax.tree.map(jnp.zeros_like, parameters) for _ in range(2))
    return parameters, *zeros, jnp.zeros(())


def compiled_steps(losses: dict, state, tokens, options=None) -> dict:
    """Name -> `step` of each loss, compiled with these of XLA's options; the state is donated."""

    def compiled(loss):
        function = jax.jit(functools.partial(step, loss), donate_argnums=0)
        return function.lower(state, tokens).compile(compiler_options=options)

    begin = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor() as pool:
        steps = dict(zip(losses, pool.map(compiled, losses.values()), strict=True))
    print(f"compiled in {time.monotonic() - begin:.0f} s", flush=True)
    return steps


def first_losses(steps: dict, fresh, tokens) -> dict[str, list[float]]:
    """Name -> losses of its first steps; each program begins with `fresh()`, the same state."""
    losses: dict[str, list[float]] = {}
    for name, one in steps.items():
        state, losses[name] = fresh(), []
        with providers.environment(name):
            for _ in range(FIRST_STEPS):
                state, value = one(state, tokens)
                losses[name].append(float(value))
        del state  # one copy fits beside a step
    return losses


def disagreement(losses: dict[str, list[float]]) -> str | None:
    """What is wrong if a program's losses are not the first one's; or None.

    The first is of the same parameters; the others show the gradients too. A tiny model's differ by
    1e-5 of themselves on a CPU, with a causal mask forgotten by 5e-4.
    """
    first, *others = losses.values()
    allowed = LOSSES_APART * first[0]
    agree = (abs(a - b) <= allowed for other in others for a, b in zip(first, other, strict=True))
    return None if all(agree) else f"first losses differ: {losses}"


def time_steps(steps: dict, state, tokens, args):
    """Bursts in random order -> (state, name -> seconds a step of each burst)."""
    # The state is donated from step to step, whoever's turn it is: one copy fits beside a step.
    seconds = collections.defaultdict(list)
    for warm_up in [True] + [False] * args.rounds:
        for name in random.sample(list(steps), len(steps)):
            with providers.environment(name):
                start = time.perf_counter()
                for _ in range(args.steps):
                    state, value = steps[name](state, tokens)
                jax.block_until_ready(value)
            if not warm_up:
                seconds[name].append((time.perf_counter() - start) / args.steps)
    return state, seconds


def profile_steps(steps: dict, state, tokens) -> dict[str, dict[str, list[float]]]:
    """Name -> kernel -> nanoseconds of each launch in one step."""
    profiles = {}
    for name, one in steps.items():
        with providers.environment(name):
            holder = [state]

            def one_step(one=one, holder=holder):
                holder[0], value = one(holder[0], tokens)
                return value

            profiles[name] = kernel_times(one_step)
            state = holder[0]
        if not profiles[name]:
            print(f"{name}: the profiler saw no kernel")
    return {name: times for name, times in profiles.items() if times}


def row_of(args, name: str, step, seconds: list[float], tokens) -> dict[str, str]:
    """What every row of a training step says."""
    median, plan = statistics.median(seconds), step.memory_analysis()
    memory = plan.temp_size_in_bytes + plan.argument_size_in_bytes
    return dict(
        run=args.now.strftime("%Y%m%dT%H%M%S"),
        device=args.device,
        date=args.now.strftime("%Y-%m-%d"),
        commit=evidence.commit(),
        source=evidence.source_hash()[:12],
        version=providers.version(name),
        step_ms=f"{median * 1e3:.2f}",
        tokens_per_s=f"{tokens.shape[0] * (tokens.shape[1] - 1) / median:.0f}",
        spread=f"{(max(seconds) - min(seconds)) / median:.3f}",
        memory_gb=f"{memory / 1e9:.2f}",
    )


def append_rows(path, columns: list[str], rows: list[dict[str, str]]) -> None:
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if file.tell() == 0:
            writer.writeheader()
        writer.writerows(rows)


def workload(model: Model) -> Workload:
    """The model's attention as a workload of its own."""
    return Workload("model", model.batch, model.seq, model.heads, model.head_dim, is_causal=True)


def attention_alone(model: Model, names, args) -> dict[tuple[str, str], float]:
    """(library, direction) -> milliseconds of all layers' attention."""
    if not args.on_gpu:
        args.target = args.target or 0.05
    timed = run.measure(workload(model), names, ("forward", "backward"), args, print)
    return {
        (entry.provider, entry.direction): 1e3 * model.layers * statistics.median(entry.seconds)
        for entry in timed
    }


def kernel_times(function) -> dict[str, list[float]]:
    """Kernel name -> nanoseconds of each launch on the device, while `function` runs."""
    times: dict[str, list[float]] = collections.defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(function())
        for path in pathlib.Path(folder).rglob("*.xplane.pb"):
            for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
                if not plane.name.startswith("/device:GPU"):
                    continue
                for line in plane.lines:
                    if line.name.startswith("Stream"):
                        for event in line.events:
                            times[event.name].append(event.duration_ns)
    return times


def kind_of(kernel: str) -> str:
    """What a kernel of the step is for, by its name."""
    name = kernel.lower()
    for kind, marks in (
        ("attention backward", ("bprop", "attention_backward", "preprocess", "postprocess")),
        ("attention forward", ("fprop", "attention_forward")),
    ):
        if any(mark in name for mark in marks):
            return kind
    if "jax_flash::attention" in name or "sdpa" in name:
        return (
            "attention backward" if "backward" in name or "bprop" in name else "attention forward"
        )
    if any(mark in name for mark in ("gemm", "nvjet", "cutlass", "cublas", "matmul")):
        return "matrix products"
    return "the rest"


def profile_by_kind(name: str, times: dict[str, list[float]]) -> dict[str, float]:
    """Prints where a step's device time goes -> milliseconds by kind."""
    kinds = dict.fromkeys(KINDS, 0.0)
    for kernel, launches in times.items():
        kinds[kind_of(kernel)] += sum(launches) / 1e6
    print(f"{name}: one step, ms of device time")
    for kind, milliseconds in kinds.items():
        print(f"  {milliseconds:9.2f}  {kind}")
    for kernel, launches in sorted(times.items(), key=lambda item: -sum(item[1]))[:25]:
        each = statistics.median(launches) / 1e6
        print(f"    {sum(launches) / 1e6:9.2f} = {len(launches)} x {each:.3f}  {kernel[:100]}")
    return kinds


def parse(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="two layers of 64, on any machine")
    parser.add_argument("--batch", type=int, help=f"default: {Model.batch}")
    parser.add_argument("--attention", default="", help=f"default: {','.join(ATTENTION)}")
    parser.add_argument("--rounds", type=int, default=5, help="bursts of each library")
    parser.add_argument("--steps", type=int, default=3, help="steps of a burst")
    parser.add_argument("--target", type=float, default=0.03, help="seconds of attention's bursts")
    parser.add_argument("--profile", action="store_true", help="one more step under the profiler")
    parser.add_argument("--out", default="", help="CSV to append to (default: by device)")
    args = parser.parse_args(argv)
    args.on_gpu = jax.default_backend() == "gpu"
    default = ATTENTION if args.on_gpu else ("jax_flash", "jax_nn_xla")
    args.attention = args.attention.split(",") if args.attention else list(default)
    if unknown := set(args.attention) - set(providers.PROVIDERS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    return args


def main(argv=None) -> int:
    args = parse(argv)
    model = Model(layers=2, width=64, heads=4, seq=96, batch=2, vocabulary=256)
    if not args.tiny:
        model = Model()
    if args.batch:
        model = dataclasses.replace(model, batch=args.batch)
    args.device, args.now = evidence.device_name(), datetime.datetime.now(datetime.UTC)
    path = args.out or evidence.device_folder(args.device) / "model.csv"
    print(f"{args.device}: {model.name()} -> {path}", flush=True)
    alone = attention_alone(model, args.attention, args)
    missing = [name for name in args.attention if (name, "backward") not in alone]
    names = [name for name in args.attention if name not in missing]

    shape = (model.batch, model.seq + 1)
    tokens = jax.random.randint(jax.random.key(1), shape, 0, model.vocabulary)
    make = jax.jit(init, static_argnums=(0, 1))

    def fresh():
        return first_state(make(model, 0))

    attends = {name: providers.PROVIDERS[name][1](workload(model)) for name in names}
    by_attention = {
        name: functools.partial(loss, model, attend) for name, attend in attends.items()
    }
    steps = compiled_steps(by_attention, jax.eval_shape(fresh), tokens)
    losses = first_losses(steps, fresh, tokens)
    if wrong := disagreement(losses):
        print(wrong, file=sys.stderr)
        return 1
    state, seconds = time_steps(steps, fresh(), tokens, args)
    profiles = profile_steps(steps, state, tokens) if args.profile else {}
    rows = []
    for name in names:
        row = row_of(args, name, steps[name], seconds[name], tokens)
        row |= dict(
            model=model.name(),
            attention=name,
            forward_ms=f"{alone[name, 'forward']:.2f}",
            backward_ms=f"{alone[name, 'backward']:.2f}",
            loss=f"{losses[name][-1]:.4f}",
        )
        if name in profiles:
            kinds = profile_by_kind(name, profiles[name])
            row |= {KINDS[kind]: f"{milliseconds:.2f}" for kind, milliseconds in kinds.items()}
        rows.append(row)
        rest = float(row["step_ms"]) - alone[name, "forward"] - alone[name, "backward"]
        print(
            f"  {name:14s} {row['step_ms']:>9s} ms/step {row['tokens_per_s']:>8s} tokens/s "
            f"{row['memory_gb']:>7s} GB; attention {row['forward_ms']} + {row['backward_ms']} "
            f"ms, the rest {rest:.2f} ms; spread {row['spread']}, loss {row['loss']}",
            flush=True,
        )
    append_rows(path, COLUMNS, rows)
    if missing:
        print(f"not measured: {', '.join(missing)}", file=sys.stderr)
    return 1 if missing or not names else 0


if __name__ == "__main__":
    sys.exit(main())
