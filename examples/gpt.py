"""A byte-level GPT in Flax Linen with jax_flash's attention, short enough to copy.

    x = sqrt(D) (E[bytes] + positions)
    x = x + attention(norm(x));  x = x + W2 gelu(W1 norm(x))        in each block
    logits = norm(x) E^T

train_gpt.py trains it. `attention="xla"` swaps in Flax's own layer around `jax.nn`'s attention; the
parameters keep their names and shapes, so that a checkpoint of one runs in the other.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from flax import linen as nn

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


class GPT(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, tokens: jax.Array, deterministic: bool = True) -> jax.Array:
        """tokens: integers [B, T] below 256, T <= context. Returns float32 logits [B, T, 256]."""
        config = self.config
        small = nn.initializers.normal(0.02)  # keeps the first loss at log(256) = 5.55
        table = self.param("embedding", small, (VOCABULARY, config.width)).astype(config.dtype)
        positions = self.param("positions", small, (config.context, config.width))
        # A product rather than a lookup: its gradient is a product too, not a scatter-add, which on
        # a GPU is slow into so few rows, and sums in another order on every run.
        x = jax.nn.one_hot(tokens, VOCABULARY, dtype=config.dtype) @ table
        x = x + positions[: tokens.shape[1]].astype(config.dtype)
        x = x * math.sqrt(config.width)  # as in "Attention is all you need", section 3.4
        x = nn.Dropout(config.dropout, deterministic=deterministic)(x)
        for _ in range(config.layers):
            x = Block(config)(x, deterministic)
        x = nn.LayerNorm(use_bias=False, dtype=config.dtype)(x)
        return (x @ table.T).astype(jnp.float32)


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
