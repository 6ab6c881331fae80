"""Every operator as a program: which custom calls it becomes on which platform, with which
operands, without copies, and without memory of the size of the scores."""

import functools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_flash
from jax_flash._ops import _register
from tests import programs
from tests.programs import assert_close, custom_calls, installed, normal, plain

B, T, S, N, K, H, HV = 2, 48, 80, 4, 2, 24, 40
BF16 = jnp.bfloat16
CU_Q, CU_K = np.array([0, 10, 31, 48], np.int32), np.array([0, 30, 31, 80], np.int32)
KEY = jax.random.key(1)

native = pytest.mark.parametrize(
    "platform",
    [pytest.param("cpu", marks=installed("cpu")), pytest.param("cuda", marks=installed("cuda"))],
)


def shapes(*sizes, dtype=BF16):
    return [jax.ShapeDtypeStruct(size, dtype) for size in sizes]


SEPARATE = shapes((B, T, N, H), (B, S, K, H), (B, S, K, HV))
PACKED = shapes((B, T, 3, N, H))
KV_PACKED = shapes((B, T, N, H), (B, S, 2, K, H))
VARLEN = shapes((T, N, H), (S, K, H), (S, K, HV))

# name -> (function of the differentiable arrays, their shapes)
OPERATORS = {
    "attention": (jax_flash.attention, SEPARATE),
    "causal": (functools.partial(jax_flash.attention, is_causal=True), SEPARATE),
    "bottom_right_window": (
        functools.partial(
            jax_flash.attention, local_window_size=(9, 3), causal_offset="bottom_right"
        ),
        SEPARATE,
    ),
    "lengths": (
        lambda *x: jax_flash.attention(
            *x,
            query_seq_lengths=jnp.array([3, T]),
            key_value_seq_lengths=jnp.array([S, 9]),
            causal_offset=jnp.array([4, -1]),
            is_causal=True,
        ),
        SEPARATE,
    ),
    "dropout": (
        functools.partial(jax_flash.attention, dropout_rate=0.1, dropout_key=KEY),
        SEPARATE,
    ),
    "deterministic": (functools.partial(jax_flash.attention, deterministic=True), SEPARATE),
    "qkvpacked": (functools.partial(jax_flash.attention_qkvpacked, is_causal=True), PACKED),
    "kvpacked": (jax_flash.attention_kvpacked, KV_PACKED),
    "blocksparse": (
        lambda *x: jax_flash.blocksparse_attention(
            *x, jnp.ones((N, 3, 5), bool), block_size=(16, 16), is_causal=True
        ),
        SEPARATE,
    ),
    "varlen": (lambda *x: jax_flash.varlen_attention(*x, CU_Q, CU_K, is_causal=True), VARLEN),
    "varlen_dropout": (
        lambda *x: jax_flash.varlen_attention(*x, CU_Q, CU_K, dropout_rate=0.1, dropout_key=KEY),
        VARLEN,
    ),
    "varlen_qkvpacked": (
        lambda x: jax_flash.varlen_attention_qkvpacked(x, CU_Q),
        shapes((T, 3, N, H)),
    ),
    "varlen_kvpacked": (
        lambda *x: jax_flash.varlen_attention_kvpacked(*x, CU_Q, CU_K),
        shapes((T, N, H), (S, 2, K, H)),
    ),
}


def forward_and_backward(f):
    def both(*x):
        out, pullback = jax.vjp(f, *x)
        return out, pullback(out)

    return both


def lowered(f, arrays, platform) -> str:
    return jax.jit(f).trace(*arrays).lower(lowering_platforms=(platform,)).as_text()


def size(tensor_type: str) -> int:
    return int(np.prod([int(n) for n in tensor_type.split("x")[:-1]]))


@native
@pytest.mark.parametrize("name", OPERATORS)
def test_every_operator_is_two_custom_calls(platform, name):
    f, arrays = OPERATORS[name]
    text = lowered(forward_and_backward(f), arrays, platform)
    (forward, inputs, outputs), (backward, inputs_back, outputs_back) = custom_calls(text)
    assert (forward, backward) == ("jax_flash.attention_forward", "jax_flash.attention_backward")
    assert (len(inputs), len(outputs)) == (9, 2)
    assert (len(inputs_back), len(outputs_back)) == (13, 4)
    # The gradients are as the operands: three batch axes, one array for what is packed.
    ones = (1,) * (3 if name.startswith("varlen") else 2)
    gradients = ["x".join(map(str, (*ones, *a.shape, "bf16"))) for a in arrays]
    gradients += ["0xbf16"] * (3 - len(gradients))
    assert outputs_back[:3] == inputs_back[:3] == inputs[:3] == gradients
    assert re.fullmatch(r"\d+xui8", outputs_back[3])  # scratch
    # Both have the same options; the backward has the forward's results.
    assert inputs_back[7:] == inputs[3:]
    assert inputs_back[3:6] == [*outputs, outputs[0]]
    assert inputs_back[6] == "0xf32"  # nothing asks for a gradient through the lse


@native
@pytest.mark.parametrize("name", OPERATORS)
def test_operands_are_not_copied(platform, name):
    """Head dims that are multiples of 8 reach the kernels as they lie in memory."""
    f, arrays = OPERATORS[name]
    text = lowered(forward_and_backward(f), arrays, platform)
    smallest = min(int(np.prod(a.shape)) for a in arrays)
    copies = r"stablehlo\.(pad|transpose|concatenate|slice|gather|broadcast_in_dim|add)\b"
    for line in text.splitlines():
        if re.search(copies, line):
            result = re.findall(r"tensor<([^>]*)>", line)[-1]
            assert size(result) < smallest, line


def test_odd_head_dims_are_padded():
    """The test above can fail: 20 is no multiple of 8."""
    x = shapes((B, T, N, 20), (B, S, K, 20), (B, S, K, 20))
    text = lowered(lambda *x: jax_flash.attention(*x, implementation="xla"), x, "cpu")
    assert re.search(rf"stablehlo\.pad .*-> tensor<{B}x{T}x{N}x24xbf16>", text)


@native
def test_options_become_attributes(platform):
    def f(*x):
        return jax_flash.attention(
            *x,
            scale=0.5,
            is_causal=True,
            causal_offset="bottom_right",
            local_window_size=(11, 5),
            dropout_rate=0.25,
            dropout_key=KEY,
            block_mask=jnp.ones((3, 2), bool),
            block_size=(16, 48),
            deterministic=True,
        )

    text = lowered(forward_and_backward(f), SEPARATE, platform)
    lines = [line for line in text.splitlines() if "custom_call @jax_flash" in line]
    assert len(lines) == 2
    for line in lines:
        for attribute in (
            "scale = 5.000000e-01 : f32",
            "window_left = 11 : i64",
            "window_right = 0 : i64",
            "bottom_right = true",
            "varlen = false",
            "dropout_threshold = 16384 : i64",
            "block_rows = 16 : i64",
            "block_cols = 48 : i64",
            "packing = 0 : i64",
        ):
            assert attribute in line
    assert "deterministic = true" in lines[1] and "deterministic" not in lines[0]


@native
def test_hessian_vector_product_lowers(platform):
    def f(q, k, v):
        def slope(q):
            return jnp.vdot(jax.grad(lambda q: jnp.sum(jax_flash.attention(q, k, v)))(q), q)

        return jax.grad(slope)(q)

    found = [target for target, *_ in custom_calls(lowered(f, SEPARATE, platform))]
    assert set(found) == {"jax_flash.attention_forward", "jax_flash.attention_backward"}


# Platforms without kernels ------------------------------------------------------------------------


@pytest.mark.parametrize("platform", ["tpu", "rocm"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_other_platforms_get_the_xla_form(platform, dtype, recwarn):
    with jax.enable_x64(dtype == "float64"):
        arrays = shapes((B, T, N, H), (B, S, K, H), (B, S, K, HV), dtype=jnp.dtype(dtype))
        f, _ = OPERATORS["causal"]
        text = lowered(forward_and_backward(f), arrays, platform)
    assert "custom_call @jax_flash" not in text and "dot_general" in text
    short = dict(bfloat16="bf16", float16="f16", float32="f32", float64="f64")[dtype]
    assert f"tensor<{B}x{T}x{N}x{HV}x{short}>" in text
    assert not [w for w in recwarn if "jax_flash" in str(w.message)]  # it is what runs there


@pytest.mark.parametrize("platform", ["tpu", "rocm", "cuda", "cpu"])
@pytest.mark.parametrize("asked", ["cpu", "cuda"])
def test_an_implementation_by_name_runs_on_its_platform_alone(platform, asked, monkeypatch):
    if platform == asked:
        return
    monkeypatch.setattr(_register, "missing", lambda platform: None)  # as if installed
    f = functools.partial(jax_flash.attention, implementation=asked)
    text = f"implementation='{asked}' does not run on platform '({platform}|other)'"
    with pytest.raises(NotImplementedError, match=text):
        lowered(f, SEPARATE, platform)


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
def test_without_the_module(platform, monkeypatch):
    """By name: refused with the reason. By platform: XLA's form, with one warning that says why."""
    reason = f"jax_flash is installed without its {platform} kernels (no such file)"
    monkeypatch.setattr(_register, "missing", lambda name: reason if name == platform else None)
    programs.forget_warnings()
    f, arrays = OPERATORS["causal"]
    with pytest.raises(NotImplementedError, match=re.escape(f"'{platform}': {reason}")):
        jax.eval_shape(functools.partial(f, implementation=platform), *arrays)
    with pytest.warns(UserWarning, match=re.escape(reason)) as warned:
        text = lowered(f, arrays, platform)
        assert "custom_call @jax_flash" not in text and "dot_general" in text
        again = lowered(lambda *x: f(*x), arrays, platform)
        assert "custom_call @jax_flash" not in again
    assert len(warned) == 1 and f"no {platform} kernel" in str(warned[0].message)


def test_a_missing_module_is_reported_with_the_import_error(monkeypatch):
    def cannot(name):
        raise ImportError("libsomething.so: cannot open shared object file")

    monkeypatch.setattr(_register.importlib, "import_module", cannot)
    reason = _register.missing.__wrapped__("cuda")
    assert "without its cuda kernels (libsomething.so: cannot open" in reason


def test_xla_by_name_runs_everywhere():
    f = functools.partial(jax_flash.attention, implementation="xla")
    for platform in ("cpu", "cuda", "tpu"):
        assert "custom_call @jax_flash" not in lowered(forward_and_backward(f), SEPARATE, platform)


def test_show_backends(capsys, monkeypatch):
    jax_flash.show_backends()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and jax.__version__ in lines[0]
    for line, name in zip(lines[1:], ("cuda", "cpu", "xla"), strict=True):
        assert re.fullmatch(rf"  {name} +(yes.*|no: .+)", line)
        if name != "xla" and (reason := _register.missing(name)) is not None:
            assert reason in line
    monkeypatch.setattr(_register, "missing", lambda name: f"no {name} module")
    jax_flash.show_backends()
    out = capsys.readouterr().out
    assert "no: no cuda module" in out and "no: no cpu module" in out


@pytest.mark.parametrize(
    "capability, switch, words",
    [
        ("8.6", "", "sm_80 kernels"),
        ("9.0", "", "sm_90a kernels, and sm_80 kernels for what those do not serve"),
        ("9.0", "sm_80", "sm_80 kernels (JAX_FLASH_CUDA_KERNELS=sm_80)"),
        ("12.0", "", "sm_80 kernels compiled from PTX at their first use"),
        ("7.5", "", None),
    ],
)
def test_show_backends_names_the_kernels_of_the_gpu(capability, switch, words, capsys, monkeypatch):
    gpu = types.SimpleNamespace(device_kind="NVIDIA X", compute_capability=capability)
    monkeypatch.setattr(jax, "devices", lambda platform: [gpu, gpu])
    monkeypatch.setattr(_register, "missing", lambda name: None)
    monkeypatch.setenv("JAX_FLASH_CUDA_KERNELS", switch)
    jax_flash.show_backends()
    line = capsys.readouterr().out.splitlines()[1]
    if words is None:
        assert line == "  cuda  no: NVIDIA X is older than compute capability 8.0"
    else:
        assert line == f"  cuda  yes: NVIDIA X, {words}"


# Memory -------------------------------------------------------------------------------------------


def _memory(f, rows, dtype=jnp.float32):
    """(bytes of temporaries, elements of the largest array) of the compiled CPU program."""
    x = shapes((1, rows, 2, 16), dtype=dtype) * 3
    with jax.default_device(jax.devices("cpu")[0]):
        compiled = jax.jit(f).trace(*x).lower(lowering_platforms=("cpu",)).compile()
    return (
        compiled.memory_analysis().temp_size_in_bytes,
        programs.largest_array(compiled.as_text())[0],
    )


@installed("cpu")
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_cpu_kernels_use_memory_of_the_size_of_the_operands(direction):
    def f(*x):
        return jax_flash.attention(
            *x, is_causal=True, dropout_rate=0.1, dropout_key=KEY, implementation="cpu"
        )

    rows = 4096
    operand = rows * 2 * 16
    temporary, largest = _memory(f if direction == "forward" else forward_and_backward(f), rows)
    assert largest == operand
    assert temporary < 8 * 4 * operand  # the scores would be 512 times one operand


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("dropout", [False, True])
def test_xla_form_keeps_one_chunk_of_scores(direction, dropout):
    """Of a constant size: twice the length does not take four times the memory, nor twice."""

    def f(*x):
        options = dict(dropout_rate=0.1, dropout_key=KEY) if dropout else {}
        return jax_flash.attention(*x, is_causal=True, implementation="xla", **options)

    f = f if direction == "forward" else forward_and_backward(f)
    short, largest_short = _memory(f, 4096)
    long, largest_long = _memory(f, 8192)
    chunk = 32 << 20  # bytes of float32 scores
    assert largest_long <= 8 * chunk // 4 and largest_short <= 8 * chunk // 4
    assert long < 1.3 * short
    whole = 4 * 2 * 8192**2
    assert largest_long < whole / 4 and long < 8 * chunk


def test_the_measure_of_memory_sees_scores():
    """The tests above can fail: the plain form has an array of T * S elements for each head."""
    temporary, largest = _memory(lambda *x: plain(*x)[0], 4096)
    assert largest >= 2 * 4096**2 and temporary >= 4 * 2 * 4096**2


def test_bias_and_mask_keep_one_chunk_of_scores():
    def f(*x):
        return jax_flash.attention(*x, bias=jnp.ones((1, 8192)), implementation="xla")

    temporary, largest = _memory(forward_and_backward(f), 8192)
    assert largest < 2 * 8192**2 / 4 and temporary < 8 * (32 << 20)


def test_gradient_of_float64_on_the_cpu():
    """What no kernel computes runs on XLA, in its own precision."""
    with jax.enable_x64(True):
        x = [jnp.asarray(normal(i, B, 5, 2, 3), jnp.float64) for i in range(3)]
        programs.forget_warnings()
        with jax.default_device(jax.devices("cpu")[0]), pytest.warns(UserWarning, match="float64"):
            got = jax.grad(lambda *x: jnp.sum(jnp.sin(jax_flash.attention(*x))), (0, 1, 2))(*x)
        want = jax.grad(lambda *x: jnp.sum(jnp.sin(plain(*x)[0])), (0, 1, 2))(*x)
        assert_close(got, want, 1e-13)
