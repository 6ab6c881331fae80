"""A byte-level GPT in Flax Linen with jax_flash's attention, short enough to copy.

    x = sqrt(D) (E[bytes] + positions)
    x = x + attention(norm(x));  x = x + W2 gelu(W1 norm(x))        in each block
    logits = norm(x) E^T

train_gpt.py trains it. `attention="xla"` swaps in Flax's own layer around `jax.nn`'s attention; the
parameters keep their names and shapes, so that a checkpoint of one runs in the other. `fused=True`
is a model of its own, made of jax_flash's fused layers: rotary embedding instead of positions, RMS
norms, and a loss that never holds all logits.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

import jax_flash
from jax_flash import linen

VOCABULARY = 256  # a token is a byte


@dataclasses.dataclass(frozen=True)
class Config:
    """A model's shape, e.g. Config(layers=4, width=128, heads=4, context=256)."""

    layers: int
    width: int  # D, a multiple of `heads`
    heads: int
    context: int  # the longest sequence, T
    dropout: float = 0.0  # of the embedding and of each block's two branches
    attention_dropout: float = 0.0  # of the attention weights; "flash" only
    attention: str = "flash"  # or "xla"
    fused: bool = False  # made of linen.TransformerBlock; "flash" only
    dtype: str = "float32"  # of the computation; parameters are float32


def xla_attention(query, key, value, **unused):
    """Plain causal attention as XLA compiles it: [B, T, N, H] each, materialises [B, N, T, T]."""
    return jax.nn.dot_product_attention(query, key, value, is_causal=True)


def last_init(config: Config) -> nn.initializers.Initializer:
    """Of a branch's last product: small, so that the bytes are not drowned by untrained blocks.

    As in GPT-2. With Flax's own init a short run hardly learns more than how often bytes occur.
    """
    return nn.initializers.normal(0.02 / math.sqrt(2 * config.layers))


def causal_attention(config: Config) -> nn.Module:
    options = dict(
        num_heads=config.heads,
        dtype=config.dtype,
        out_kernel_init=last_init(config),
        name="attention",
    )
    if config.attention == "flash":
        return linen.MultiHeadAttention(
            is_causal=True, dropout_rate=config.attention_dropout, **options
        )
    return nn.MultiHeadDotProductAttention(attention_fn=xla_attention, **options)


class Block(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool) -> jax.Array:  # x: [B, T, D]
        dense = functools.partial(nn.Dense, dtype=self.config.dtype)
        norm = functools.partial(nn.LayerNorm, use_bias=False, dtype=self.config.dtype)
        drop = nn.Dropout(self.config.dropout, deterministic=deterministic)

        branch = causal_attention(self.config)(norm()(x), deterministic=deterministic)
        x = x + drop(branch)
        branch = nn.gelu(dense(4 * self.config.width)(norm()(x)))
        return x + drop(dense(self.config.width, kernel_init=last_init(self.config))(branch))


def plain_blocks(config: Config, x: jax.Array, deterministic: bool) -> jax.Array:
    for _ in range(config.layers):
        x = Block(config)(x, deterministic)
    return nn.LayerNorm(use_bias=False, dtype=config.dtype)(x)


def fused_blocks(config: Config, x: jax.Array, deterministic: bool) -> jax.Array:
    """The residual stream travels beside x, what the last block computed and has not added yet."""
    stream, rotary = None, jax_flash.RotaryTable.make(config.context, config.width // config.heads)
    for i in range(config.layers):
        block = linen.TransformerBlock(
            num_heads=config.heads,
            norm="rms",
            rotary=rotary,
            is_causal=True,
            # The first addition is of what came before: the embedding has its own dropout.
            dropout_rate=(config.dropout if i > 0 else 0.0, config.dropout),
            attention_dropout_rate=config.attention_dropout,
            deterministic=deterministic,
            dtype=config.dtype,
            out_kernel_init=last_init(config),
        )
        x, stream = block(x, stream)
    last = linen.DropoutAddRMSNorm(dropout_rate=config.dropout, deterministic=deterministic)
    return last(x, stream)


class GPT(nn.Module):
    config: Config

    @nn.compact
    def __call__(
        self, tokens: jax.Array, deterministic: bool = True, labels: jax.Array | None = None
    ) -> jax.Array:
        """tokens: integers [B, T] below 256, T <= context. Returns float32 logits [B, T, 256], or
        with labels, integers [B, T], the mean cross-entropy."""
        config = self.config
        small = nn.initializers.normal(0.02)  # keeps the first loss at log(256) = 5.55
        table = self.param("embedding", small, (VOCABULARY, config.width)).astype(config.dtype)
        # A product rather than a lookup: its gradient is a product too, not a scatter-add, which on
        # a GPU is slow into so few rows, and sums in another order on every run.
        x = jax.nn.one_hot(tokens, VOCABULARY, dtype=config.dtype) @ table
        if not config.fused:
            positions = self.param("positions", small, (config.context, config.width))
            x = x + positions[: tokens.shape[1]].astype(config.dtype)
        x = x * math.sqrt(config.width)  # as in "Attention is all you need", section 3.4
        x = nn.Dropout(config.dropout, deterministic=deterministic)(x)
        x = (fused_blocks if config.fused else plain_blocks)(config, x, deterministic)
        if labels is not None and config.fused:
            return jax_flash.linear_softmax_cross_entropy(x, table.T, labels)
        logits = (x @ table.T).astype(jnp.float32)
        if labels is None:
            return logits
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@functools.partial(jax.jit, static_argnames=("model", "length"))
def generate(
    model: GPT,
    params: dict,
    prompt: jax.Array,
    length: int,
    key: jax.Array,
    temperature: float | jax.Array,
) -> jax.Array:
    """Draws `length` bytes that continue `prompt` (integers [P], 0 < P); returns [length].

    Every byte runs the whole window again: simple, and quick enough for a sample.
    """
    context = model.config.context
    prompt = prompt[-context:]
    window = jnp.zeros(context, jnp.int32).at[: len(prompt)].set(prompt)

    def step(carry, key):
        window, used = carry
        logits = model.apply({"params": params}, window[None])[0, used - 1]
        token = jax.random.categorical(key, logits / temperature)
        # Make room at the end once the window is full.
        window = jnp.where(used == context, jnp.roll(window, -1), window)
        place = jnp.minimum(used, context - 1)
        return (window.at[place].set(token), place + 1), token

    _, tokens = jax.lax.scan(step, (window, len(prompt)), jax.random.split(key, length))
    return tokens
