"""One small call of every CUDA kernel: what compute-sanitizer's racecheck repeats (run_gpu.py).

More than two key tiles and two query tiles, ragged edges, so that every stage of every ring is used
again.
"""

import numpy as np
import pytest

from tests.helpers import Shape, check_attention
from tests.test_blocksparse import random_mask
from tests.test_varlen import OPTIONS, check

SHAPE = Shape(1, 270, 410, 2, 1, 64)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 192, 256])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("rate", [0.0, 0.2])
def test_racecheck_dense(dtype, head_dim, rate):
    shape = Shape(1, 270, 410, 2, 1, head_dim)
    check_attention("cuda", dtype, shape, dict(is_causal=True, dropout_rate=rate))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_racecheck_varlen(dtype):
    check("cuda", dtype, "ragged", OPTIONS["bottom_right"])


@pytest.mark.gpu
@pytest.mark.parametrize("deterministic", [False, True])
def test_racecheck_blocks(deterministic):
    options = dict(
        block_mask=random_mask((1, 2), (64, 64), shape=SHAPE),
        block_size=(64, 64),
        key_value_seq_lengths=np.array([333], np.int32),
        deterministic=deterministic,
    )
    check_attention("cuda", "bfloat16", SHAPE, options)
