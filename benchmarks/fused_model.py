"""Time a training step of a GPT made of our fused layers, and of the same in plain Flax.

    python -m benchmarks.fused_model               # 350 M parameters, T = 2048: an H200's size
    python -m benchmarks.fused_model --tiny        # any machine
    python -m benchmarks.fused_model --profile     # where the device's time goes, kernel by kernel

    jax_flash       linen.TransformerBlock with a RotaryTable, linear_softmax_cross_entropy
    jax_nn_cudnn    Flax's LayerNorm, MultiHeadDotProductAttention around jax.nn's attention (cuDNN
                    on a GPU), Dense, Dropout; rotary and cross-entropy in jnp

Both train the same float32 parameters, in bfloat16, with Adam, and take turns; before that, their
losses must agree at a small size and, without dropout, in the first steps at this one. Rows go to
benchmarks/results/<device>/fused_model.csv.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import datetime
import functools
import statistics
import sys
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

import jax_flash
from benchmarks import evidence, model, providers
from jax_flash import linen

COLUMNS = "run,device,date,commit,source,model,program,version,step_ms,tokens_per_s,spread"
COLUMNS = (COLUMNS + ",memory_gb,loss").split(",")
# Of one step under the profiler, milliseconds of device time; empty without --profile.
KINDS = {
    "attention forward": "step_attention_ms",
    "attention backward": "step_attention_ms",
    "matrix products": "step_products_ms",
    "the rest": "step_rest_ms",
}
COLUMNS += dict.fromkeys(KINDS.values())
PROGRAMS = ("jax_flash", "jax_nn_cudnn")
CUBLAS = {"xla_gpu_enable_triton_gemm": False}  # no products by Triton to try and to compile


@dataclasses.dataclass(frozen=True)
class Model:
    layers: int = 24
    width: int = 1024
    heads: int = 16
    seq: int = 2048
    batch: int = 8
    vocabulary: int = 50304  # a multiple of 128
    dropout: float = 0.0  # of each branch

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    def name(self) -> str:
        shapes = jax.eval_shape(lambda: init(self))
        parameters = sum(x.size for x in jax.tree.leaves(shapes))
        text = (
            f"gpt {parameters / 1e6:.3g}M, {self.layers} layers, D={self.width} N={self.heads} "
            f"H={self.head_dim}, B={self.batch} T={self.seq}"
        )
        return text + (f", dropout {self.dropout:g}" if self.dropout else "")

    def table(self) -> jax_flash.RotaryTable:
        return jax_flash.RotaryTable.make(self.seq, self.head_dim)


TINY = Model(layers=2, width=64, heads=4, seq=96, batch=2, vocabulary=256)


# ---- in plain Flax


def turned(x, table):
    """Rotary, halves: [B, T, N, H]."""
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = table.cos[:, None], table.sin[:, None]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)


def plain_attention(model: Model, query, key, value, **unused):
    table = model.table()
    on_gpu = jax.default_backend() == "gpu"
    return jax.nn.dot_product_attention(
        turned(query, table),
        turned(key, table),
        value,
        is_causal=True,
        implementation="cudnn" if on_gpu else "xla",
    )


class PlainMLP(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x):
        x = nn.gelu(nn.Dense(4 * self.width, dtype=jnp.bfloat16, name="fc1")(x))
        return nn.Dense(self.width, dtype=jnp.bfloat16, name="fc2")(x)


class PlainBlock(nn.Module):
    model: Model

    @nn.compact
    def __call__(self, x):
        norm = functools.partial(nn.LayerNorm, dtype=jnp.bfloat16)
        drop = nn.Dropout(self.model.dropout, deterministic=False)
        attention = nn.MultiHeadDotProductAttention(
            num_heads=self.model.heads,
            dtype=jnp.bfloat16,
            attention_fn=functools.partial(plain_attention, self.model),
            name="attention",
        )
        x = x + drop(attention(norm(name="norm1")(x)))
        return x + drop(PlainMLP(self.model.width, name="mlp")(norm(name="norm2")(x)))


class PlainGPT(nn.Module):
    model: Model

    @nn.compact
    def __call__(self, x):
        for i in range(self.model.layers):
            x = PlainBlock(self.model, name=f"block{i}")(x)
        return nn.LayerNorm(dtype=jnp.bfloat16, name="norm")(x)


def plain_head(x, embedding, labels):
    logits = (x @ embedding.T).astype(jnp.float32)
    target = jnp.take_along_axis(logits, labels[..., None], -1)[..., 0]
    return (jax.nn.logsumexp(logits, -1) - target).mean()


# ---- of fused layers


class FusedGPT(nn.Module):
    model: Model

    @nn.compact
    def __call__(self, x):
        stream, model = None, self.model
        for i in range(model.layers):
            block = linen.TransformerBlock(
                num_heads=model.heads,
                is_causal=True,
                rotary=model.table(),
                dropout_rate=(model.dropout if i else 0.0, model.dropout),  # not of the embedding
                deterministic=False,
                dtype=jnp.bfloat16,
                name=f"block{i}",
            )
            x, stream = block(x, stream)
        last = linen.DropoutAddLayerNorm(
            dropout_rate=model.dropout, deterministic=False, name="norm"
        )
        return last(x, stream)


def fused_head(x, embedding, labels):
    return jax_flash.linear_softmax_cross_entropy(x, embedding.T, labels)


# ---- both


def init(model: Model) -> dict[str, Any]:
    """Parameters, float32; of the blocks as Flax makes them, compiled for one of them."""
    small = dataclasses.replace(model, layers=1, seq=8, batch=1, dropout=0.0)
    x = jnp.zeros((1, 8, model.width), jnp.bfloat16)
    one = jax.jit(lambda key: FusedGPT(small).init(key, x)["params"])
    parameters: dict[str, Any] = {}
    for i in range(model.layers):
        layer = one(jax.random.key(i))
        parameters |= {f"block{i}": layer["block0"], "norm": layer["norm"]}
    shape = (model.vocabulary, model.width)
    embedding = jax.jit(lambda key: 0.02 * jax.random.normal(key, shape))(jax.random.key(1 << 20))
    return parameters | {"embedding": embedding}


def loss(module: nn.Module, head, parameters, tokens):
    """Mean cross-entropy of the next token; tokens is int32 [B, T + 1]."""
    embedding = parameters["embedding"].astype(jnp.bfloat16)
    blocks = {name: value for name, value in parameters.items() if name != "embedding"}
    x = embedding[tokens[:, :-1]]
    # The key changes with the parameters, so that no step's masks are another's.
    seed = jax.lax.bitcast_convert_type(parameters["norm"]["scale"][0], jnp.uint32)
    rngs = {"dropout": jax.random.fold_in(jax.random.key(2), seed)} if module.model.dropout else {}
    return head(module.apply({"params": blocks}, x, rngs=rngs), embedding, tokens[:, 1:])


def programs(model: Model) -> dict[str, Any]:
    return {
        "jax_flash": functools.partial(loss, FusedGPT(model), fused_head),
        "jax_nn_cudnn": functools.partial(loss, PlainGPT(model), plain_head),
    }


def random_tokens(model: Model) -> jax.Array:
    """[B, T + 1]."""
    return jax.random.randint(jax.random.key(3), (model.batch, model.seq + 1), 0, model.vocabulary)


def are_one_model() -> bool:
    """Whether both programs, made small, give the same loss; without dropout."""
    operands = init(TINY), random_tokens(TINY)
    lowered = [jax.jit(loss).lower(*operands) for loss in programs(TINY).values()]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        compiled = pool.map(lambda x: x.compile(compiler_options=CUBLAS), lowered)
    values = [float(loss(*operands)) for loss in compiled]
    print("losses of a small model:", values, flush=True)
    return abs(values[0] - values[1]) < 0.01


def kinds_of(name: str, profile: dict[str, list[float]]) -> dict[str, str]:
    """Columns of a row from a profile, which is printed."""
    columns: dict[str, float] = {}
    for kind, milliseconds in model.profile_by_kind(name, profile).items():
        columns[KINDS[kind]] = columns.get(KINDS[kind], 0.0) + milliseconds
    return {column: f"{milliseconds:.2f}" for column, milliseconds in columns.items()}


def parse(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="two layers of 64, on any machine")
    parser.add_argument("--batch", type=int, help=f"default: {Model.batch}")
    parser.add_argument("--dropout", type=float, default=0.0, help="of each branch; default: 0")
    parser.add_argument("--rounds", type=int, default=5, help="bursts of each program")
    parser.add_argument("--steps", type=int, default=4, help="steps of a burst")
    parser.add_argument(
        "--cublas", action="store_true", help="no products by Triton: compiles fast"
    )
    parser.add_argument("--profile", action="store_true", help="one more step under the profiler")
    parser.add_argument("--out", default="", help="CSV to append to (default: by device)")
    return parser.parse_args(argv)


def main(argv=None) -> int:
    args = parse(argv)
    shape = TINY if args.tiny else Model()
    shape = dataclasses.replace(shape, batch=args.batch or shape.batch, dropout=args.dropout)
    args.device, args.now = evidence.device_name(), datetime.datetime.now(datetime.UTC)
    path = args.out or evidence.device_folder(args.device) / "fused_model.csv"
    title = shape.name() + (", products by cuBLAS" if args.cublas else "")
    print(f"{args.device}: {title} -> {path}", flush=True)
    if not are_one_model():
        print("the programs are not the same model", file=sys.stderr)
        return 1
    tokens = random_tokens(shape)
    parameters = jax.device_get(init(shape))

    def fresh():
        return model.first_state(jax.device_put(parameters))

    options = CUBLAS if args.cublas else None
    steps = model.compiled_steps(programs(shape), jax.eval_shape(fresh), tokens, options)
    losses = model.first_losses(steps, fresh, tokens)
    if not shape.dropout and (wrong := model.disagreement(losses)):
        print(wrong, file=sys.stderr)
        return 1
    state, seconds = model.time_steps(steps, fresh(), tokens, args)
    profiles = model.profile_steps(steps, state, tokens) if args.profile else {}
    rows = []
    for name, step in steps.items():
        row = model.row_of(args, name, step, seconds[name], tokens)
        row |= dict(model=title, program=name, loss=f"{losses[name][-1]:.4f}")
        if name in profiles:
            row |= kinds_of(name, profiles[name])
        rows.append(row)
        print(
            f"  {name:14s} {row['step_ms']:>9s} ms/step {row['tokens_per_s']:>8s} tokens/s "
            f"{row['memory_gb']:>7s} GB; spread {row['spread']}, loss {row['loss']}",
            flush=True,
        )
    model.append_rows(path, COLUMNS, rows)
    ours, theirs = (statistics.median(seconds[name]) for name in PROGRAMS)
    print(f"{providers.version('jax_flash')}: {theirs / ours:.3f} times as fast")
    return 0


if __name__ == "__main__":
    sys.exit(main())
