"""Each Hopper instruction of csrc/ptx alone, on a GPU that has it; see csrc/testing/ptx/launch.h.

The data are small integers, so that sums are exact in float32 and results must be equal, not near.
"""

import functools
import importlib
import os
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

CSRC = pathlib.Path(__file__).parent.parent / "csrc"
SANITIZED = bool(os.environ.get("JAX_FLASH_TESTS_PLAIN_ON_CPU"))  # by run_gpu.py


@functools.cache
def _unavailable() -> str | None:
    """Registers the custom calls of `_cuda_testing`; says why they cannot run, or None."""
    try:
        module = importlib.import_module("jax_flash._cuda_testing")
    except ImportError as error:
        return f"no test-only CUDA module ({error})"
    for name, capsule in module.registrations().items():
        jax.ffi.register_ffi_target(name, capsule, platform="CUDA", api_version=1)
    device = jax.devices()[0]
    if device.platform != "gpu" or device.compute_capability != "9.0":
        return f"{device.device_kind} is not of compute capability 9.0"
    return None


@pytest.fixture
def run():
    """run(name, results, *operands, **attributes): one custom call, its results as numpy."""
    if reason := _unavailable():
        pytest.skip(reason)

    def call(name, results, *operands, aliases=None, **attributes):
        function = jax.ffi.ffi_call(
            f"jax_flash_testing.{name}", results, input_output_aliases=aliases
        )
        # bool and arrays pass as they are; the handlers take int64.
        attributes = {key: np.int64(x) if type(x) is int else x for key, x in attributes.items()}
        return jax.tree.map(np.asarray, jax.jit(lambda *x: function(*x, **attributes))(*operands))

    return call


def _shape(dtype, *shape):
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))


def _integers(seed: int, *shape: int, limit: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).integers(-limit, limit + 1, shape).astype(np.float32)


def _bits(x: np.ndarray, dtype) -> np.ndarray:
    return x.astype(jnp.dtype(dtype)).view(np.uint16)


# A in shared memory K-major or MN-major, or in registers.
@pytest.mark.gpu
@pytest.mark.parametrize("a_form", ["k_major", "mn_major", "registers"])
@pytest.mark.parametrize("transpose_b", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("n", [64, 80, 96, 128, 192, 256])
def test_wgmma(run, n, dtype, transpose_b, a_form):
    a, b = _integers(n, 128, 384), _integers(n + 1, n, 384)
    c = _integers(n + 2, 128, n)
    transpose_a = a_form == "mn_major"
    operands = [_bits(x.T if t else x, dtype) for x, t in ((a, transpose_a), (b, transpose_b))]
    # From the first byte of shared memory, and so far up that a descriptor needs its highest bits.
    for first_byte in (0, 128 * 1024):
        for accumulate in (True, False):
            # Without accumulation nothing of C may be seen, not even a NaN.
            start = c if accumulate else np.full_like(c, np.nan)
            got = run(
                "wgmma",
                _shape("float32", 128, n),
                *operands,
                start,
                is_bf16=dtype == "bfloat16",
                a_in_registers=a_form == "registers",
                transpose_a=transpose_a,
                transpose_b=transpose_b,
                accumulate=accumulate,
                first_byte=first_byte,
            )
            np.testing.assert_array_equal(got, a @ b.T + (c if accumulate else 0))


# (dim, rows, heads, entries) of the array, which may be a view into a larger one.
TENSORS = {
    "whole": (128, 300, 3, 2, 1),
    "narrow": (72, 200, 2, 3, 1),
    "tiny": (8, 5, 1, 1, 1),
    "packed": (96, 133, 4, 2, 3),
}


@pytest.mark.gpu
@pytest.mark.parametrize("box_rows", [8, 80, 128])
@pytest.mark.parametrize("tensor", TENSORS)
def test_tma_load(run, tensor, box_rows):
    """Boxes inside, over the edges and wholly outside: what does not exist becomes zero."""
    dim, rows, heads, entries, parts = TENSORS[tensor]
    rng = np.random.default_rng(dim + box_rows)
    memory = rng.integers(1, 1 << 15, (entries, rows, parts, heads, dim)).astype(np.uint16)
    part = parts - 1
    source = memory.reshape(-1)[part * heads * dim :]
    strides = np.array([parts * heads * dim, dim, rows * parts * heads * dim])
    first_rows = [0, 1, max(0, rows - 3), rows - box_rows, rows, rows + 1000, -3, 7]
    coordinates = np.array(
        [
            (c0, row, rng.integers(heads), rng.integers(entries))
            for c0 in (0, 64)
            for row in first_rows
        ],
        np.int32,
    )
    expected = np.zeros((len(coordinates), box_rows, 128), np.uint16)
    for out, (c0, row, head, entry) in zip(expected, coordinates, strict=True):
        for r in range(box_rows):
            if 0 <= row + r < rows:
                found = memory[entry, row + r, part, head, c0 : c0 + 128]
                out[r, : len(found)] = found
    for hint in range(3):
        got = run(
            "tma_load",
            _shape("uint16", *expected.shape),
            source,
            coordinates,
            sizes=np.array([dim, rows, heads, entries]),
            strides=strides,
            hint=hint,
        )
        np.testing.assert_array_equal(got, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("box_rows", [16, 64])
@pytest.mark.parametrize("tensor", ["whole", "narrow", "tiny"])
def test_tma_store(run, tensor, box_rows):
    """What of a box lies in the array is written, and nothing else."""
    dim, rows, heads, entries, _ = TENSORS[tensor]
    rng = np.random.default_rng(dim + box_rows)
    before = rng.integers(1, 1 << 15, (entries, rows, heads, dim)).astype(np.uint16)
    # Each for a head of its own. None below 0: no kernel needs that, and an H200 took the test that
    # had it for an illegal instruction.
    first_rows = [0, max(0, rows - 3), 3, 7, rows, max(0, rows - box_rows)]
    places = [(head, entry) for head in range(heads) for entry in range(entries)]
    for c0 in (0, 64):
        coordinates = np.array(
            [(c0, row, *place) for row, place in zip(first_rows, places, strict=False)], np.int32
        )
        source = rng.integers(1, 1 << 15, (len(coordinates), box_rows, 128)).astype(np.uint16)
        expected = before.copy()
        for box, (_, row, head, entry) in zip(source, coordinates, strict=True):
            for r in range(box_rows):
                if 0 <= row + r < rows:
                    expected[entry, row + r, head, c0:] = box[r, : max(0, dim - c0)]
        got = run(
            "tma_store",
            _shape("uint16", *before.shape),
            source,
            coordinates,
            before,
            aliases={2: 0},
            sizes=np.array([dim, rows, heads, entries]),
            strides=np.array([heads * dim, dim, rows * heads * dim]),
        )
        np.testing.assert_array_equal(got, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 200])
@pytest.mark.parametrize("delay", [0, 3000, -3000])
def test_pipeline(run, steps, delay):
    """A ring of three mbarrier pairs, wrapped up to 66 times: bulk_load, registers given and taken,
    whoever is late."""
    source = _integers(steps, steps, 256)
    got = run("pipeline", _shape("float32", 256, 192), source, delay=delay)
    columns = np.arange(256)[:, None] % 64 + np.arange(192)
    np.testing.assert_array_equal(got, source.sum(0)[columns])


@pytest.mark.gpu
@pytest.mark.parametrize("columns", [4, 260, 512])
def test_bulk_reduce_add(run, columns):
    """Many CTAs add to the same memory, from two buffers that each overwrites at once."""
    source, before = _integers(0, 200, 9, columns), _integers(1, columns)
    got = run("bulk_reduce", _shape("float32", columns), source, before, aliases={1: 0})
    np.testing.assert_array_equal(got, before + source.sum((0, 1)))


@pytest.mark.gpu
@pytest.mark.parametrize("rounds", [1, 2, 50])
def test_own_sum(run, rounds):
    """What a thread has stored and added to in global memory, it finds in full."""
    source = _integers(rounds, rounds, 4096)
    sums, out = run("own_sum", (_shape("float32", 4096), _shape("float32", 4096)), source)
    np.testing.assert_array_equal(out, source.sum(0))
    np.testing.assert_array_equal(sums, out)


@pytest.mark.gpu
@pytest.mark.parametrize("transpose", [False, True])
def test_stmatrix(run, transpose):
    """Stores what the documented fragments say, and ldmatrix reads it back."""
    fragments = np.random.default_rng(0).integers(0, 1 << 32, (32, 4), dtype=np.uint32)
    results = (_shape("uint16", 16, 16), _shape("uint32", 32, 4))
    matrix, back = run("stmatrix", results, fragments, transpose=transpose)
    expected = np.zeros((16, 16), np.uint16)
    for lane in range(32):
        for i in range(4):
            for half in range(2):
                row, col = lane // 4, 2 * (lane % 4) + half
                row, col = (col, row) if transpose else (row, col)
                value = fragments[lane, i] >> (16 * half) & 0xFFFF
                expected[i % 2 * 8 + row, i // 2 * 8 + col] = value
    np.testing.assert_array_equal(matrix, expected)
    np.testing.assert_array_equal(back, fragments)


@pytest.mark.gpu
def test_named_barriers(run):
    """Three warpgroups take turns."""
    order = run("named_barriers", _shape("int32", 300))
    np.testing.assert_array_equal(order, np.arange(300) % 3)


@pytest.mark.gpu
def test_dependent_launch(run):
    """The second kernel starts before the first has ended, and still reads what that wrote last."""
    for seed in range(5):
        source = _integers(seed, 5000)
        results = (_shape("float32", 5000), _shape("float32", 5001), _shape("int32", 1))
        out, _, seen = run("dependent_pair", results, source)
        np.testing.assert_array_equal(out, (source + 1) * 2)
        if not SANITIZED:  # there one kernel runs at a time
            assert seen[0] == 1, "the dependent kernel did not start early"


@pytest.mark.gpu
def test_ordered_sum(run):
    """Sums of many CTAs' floats, rounded in the order of the CTAs."""
    source = np.random.default_rng(0).standard_normal((500, 260), dtype=np.float32)
    source *= np.exp(np.random.default_rng(1).standard_normal((500, 1), dtype=np.float32) * 4)
    expected = np.zeros(260, np.float32)
    for row in source:
        expected += row
    total, turn = run("ordered_sum", (_shape("float32", 260), _shape("int32", 1)), source)
    np.testing.assert_array_equal(total, expected)
    assert turn[0] == 500


@pytest.mark.gpu
def test_claimed_sum(run):
    """Sums that begin with a store, by whichever of many CTAs comes first."""
    source = _integers(3, 400, 508)
    results = (_shape("float32", 70, 508), _shape("int32", 70))
    for _ in range(3):
        total, states = run("claimed_sum", results, source)
        np.testing.assert_array_equal(total, np.tile(source.sum(0), (70, 1)))
        np.testing.assert_array_equal(states, 2)


@pytest.mark.gpu
@pytest.mark.parametrize("n", [64, 128])
def test_repeated_rows(run, n):
    """Operands of wgmma that stand for more rows and columns than are in memory."""
    a, b = _integers(0, 8, 8), _integers(1, 8, n)
    got = run("repeated_rows", _shape("float32", 64, n), _bits(a, "bfloat16"), _bits(b, "bfloat16"))
    np.testing.assert_array_equal(got, np.tile(2 * a.T @ b, (8, 1)))


@pytest.mark.gpu
def test_cluster(run):
    """Rows that go from one CTA of a pair to the other and back, all bits of them."""
    source = np.random.default_rng(0).integers(0, 1 << 32, (150, 40, 512), dtype=np.uint32)
    source[::7] = 0xFFFFFFFF
    constant = np.array([3, 0xFFFFFFFF, 0, 12345], np.uint32)
    got = run("cluster", _shape("uint32", *source.shape), source, constant)
    np.testing.assert_array_equal(
        got, source + np.tile(constant * np.array([0, 1, 1, 1], np.uint32), 128)
    )


def test_every_instruction_is_tested():
    """No wrapper of an instruction without a kernel here that uses it."""
    if not CSRC.is_dir():
        pytest.skip("no sources here")
    headers = [CSRC / "ptx" / name for name in ("sm90.cuh", "wgmma.cuh", "cluster.cuh")]
    declared = set()
    for header in headers:
        functions = r"^__device__ __forceinline__ \w+ (\w+)\("  # indented: of a class
        declared |= set(re.findall(functions, header.read_text(), re.MULTILINE))
    kernels = "".join(path.read_text() for path in (CSRC / "testing" / "ptx").glob("*.cu*"))
    used = set(re.findall(r"ptx::(\w+)[<(]", kernels))
    indirect = {"mbarrier_try_wait"}  # mbarrier_wait is a loop of it
    assert len(declared) > 20
    assert declared - used <= indirect, declared - used
