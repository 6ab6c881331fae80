"""One small call of every CUDA kernel: what compute-sanitizer's racecheck repeats (run_gpu.py).

More than two key tiles and two query tiles, ragged edges, so that every stage of every ring is used
again; and calls with many jobs, so that the places that describe them are, too.
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
@pytest.mark.parametrize(("head_dim", "batch"), [(64, 56), (128, 28), (256, 28)])
def test_racecheck_many_jobs(head_dim, batch):
    """More than four jobs and three key tiles for each CTA (two teams at H = 64) of 132."""
    shape = Shape(batch, 96, 160, 24, 12, head_dim)
    check_attention("cuda", "bfloat16", shape, dict(is_causal=True))


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
