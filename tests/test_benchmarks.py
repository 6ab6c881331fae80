"""Benchmarks as code: every workload's options are right when small, and tables follow rows."""

import csv
import json
import os

import jax
import numpy as np
import pytest

import jax_flash
from benchmarks import (
    clock,
    evidence,
    fused_model,
    model,
    operator_providers,
    operator_workloads,
    operators,
    plot,
    providers,
    readme,
    rows,
    run,
    workloads,
)
from benchmarks.workloads import WORKLOADS


def _signature(workload):
    """What decides the code path: workloads that differ only in size are tested once."""
    small = workload.small()
    return (
        small.group == "cpu" and small.dtype,
        small.is_causal,
        small.window,
        small.dropout_rate,
        small.lengths and small.name.split("/")[1],
        small.block_density,
        small.block_size if small.block_density else None,
        small.kv_heads,
        small.head_dim,
        small.deterministic,
    )


DISTINCT = list({_signature(workload): name for name, workload in WORKLOADS.items()}.values())


@pytest.mark.parametrize("name", DISTINCT)
def test_workload_agrees_with_the_reference(name):
    """The timed call, at a small size, against the xla implementation on the same float32 data."""
    workload = WORKLOADS[name].small()
    q, k, v, dout = providers.arrays(workload)

    def outputs(implementation, dtype):
        call = providers.jax_flash_call(workload, implementation)
        out, vjp = jax.vjp(call, *(x.astype(dtype) for x in (q, k, v)))
        return [np.asarray(x, np.float32) for x in (out, *vjp(dout.astype(dtype)))]

    bound = 1e-5 if workload.dtype == "float32" else 2e-2
    expected = outputs("xla", "float32")
    for got, want in zip(outputs(None, workload.dtype), expected, strict=True):
        error = np.linalg.norm(got - want) / np.linalg.norm(want)
        assert error < bound, error


def test_pairs_are_counted_exactly():
    windowed = WORKLOADS["window/h128/left256"].small()
    i, j = np.indices((windowed.seq, windowed.seq))
    allowed = (j <= i) & (j >= i - windowed.window[0])
    assert windowed.pairs() == windowed.batch * allowed.sum()
    sparse = WORKLOADS["blocksparse/128x128/25%"]
    assert sparse.pairs() == sparse.batch * sparse.seq**2 / 4
    ragged = WORKLOADS["varlen/ragged/h128/full"]
    assert ragged.cu_seqlens()[-1] == ragged.seq == workloads.TOKENS
    assert len(set(ragged.lengths)) > 5


def test_options_have_dense_twins():
    """Everything that the README's table of costs compares, and with what."""
    for name, twin, share in (
        ("dropout/h64/t2048/causal", "grid/h64/t2048/causal", 1),
        ("gqa8/h128/t4096/full", "grid/h128/t4096/full", 1),
        ("deterministic/h128/t8192/full", "grid/h128/t8192/full", 1),
        ("varlen/equal/h64/full", "grid/h64/t4096/full", 1),
        ("blocksparse/128x128/25%", "grid/h64/t8192/full", 0.25),
    ):
        assert WORKLOADS[name].twin() is WORKLOADS[twin]
        assert WORKLOADS[name].share() == share
    # 128 rows of tiles; the first 8 see fewer than the window's 9.
    windowed = WORKLOADS["window/h128/left1024"]
    assert windowed.share() == (128 * 9 - 36) / (128 * 129 / 2)
    ragged = WORKLOADS["varlen/ragged/h128/causal"]
    assert ragged.twin() is WORKLOADS["grid/h128/t2048/causal"]
    pairs = sum(n * n for n in ragged.lengths) / (workloads.TOKENS * 2048)
    assert ragged.share() == pytest.approx(pairs)
    for name in ("grid/h64/t512/full", "cpu/f32/t2048/gqa", "long/h128/t65536/full"):
        assert WORKLOADS[name].twin() is None


def test_twins_stand_beside_their_options():
    names = "gqa/h128/t4096/full,grid/h64/t512/full,mqa/h128/t4096/full,window/h128/left256"
    found = workloads.with_twins(workloads.select(names))
    assert [workload.name for workload in found] == [
        "grid/h128/t4096/full",
        "gqa/h128/t4096/full",
        "mqa/h128/t4096/full",
        "grid/h128/t16384/causal",
        "window/h128/left256",
        "grid/h64/t512/full",
    ]


def test_a_switch_of_the_process_is_put_back(monkeypatch):
    monkeypatch.delenv("JAX_FLASH_CUDA_KERNELS", raising=False)
    with providers.environment("jax_flash_sm80"):
        assert os.environ["JAX_FLASH_CUDA_KERNELS"] == "sm_80"
        with providers.environment("jax_flash"):
            assert os.environ["JAX_FLASH_CUDA_KERNELS"] == "sm_80"
    assert "JAX_FLASH_CUDA_KERNELS" not in os.environ
    assert providers.built_alone("jax_flash_sm80") and providers.built_alone("torch_flash")
    assert not providers.built_alone("jax_flash")


def test_unknown_workload_is_refused():
    with pytest.raises(ValueError, match="no workload matches 'grid/h65/"):
        workloads.select("cpu/*,grid/h65/*")


@pytest.mark.parametrize("direction", providers.DIRECTIONS)
def test_run_appends_rows(direction, tmp_path, monkeypatch, capsys):
    name = "cpu/f32/t2048/full"
    monkeypatch.setitem(WORKLOADS, name, WORKLOADS[name].small())
    path = tmp_path / "attention.csv"
    chosen = ["--workloads", name, "--providers", "jax_flash,jax_nn_xla,jax_nn_cudnn"]
    arguments = [*chosen, "--directions", direction, "--rounds", "1", "--target", "0.001"]
    assert run.main([*arguments, "--out", str(path)]) == 0
    assert run.main([*arguments, "--out", str(path)]) == 0
    with open(path) as file:
        found = list(csv.DictReader(file))
    assert len(found) == 4  # cuDNN has no float32
    assert {row["provider"] for row in found} == {"jax_flash", "jax_nn_xla"}
    assert all(float(row["ms"]) > 0 for row in found)
    if jax.default_backend() != "gpu":
        assert "jax_nn_cudnn: not measured: needs an NVIDIA GPU" in capsys.readouterr().out


def test_run_refuses_outputs_that_differ(tmp_path, monkeypatch, capsys):
    """With one rival, nobody knows who is right: no row, and the run fails."""
    name = "cpu/f32/t2048/full"
    monkeypatch.setitem(WORKLOADS, name, WORKLOADS[name].small())
    wrong = (
        "jax",
        lambda workload: lambda q, k, v: providers.jax_nn_call(workload, "xla")(q, v, k),
    )
    monkeypatch.setitem(providers.PROVIDERS, "jax_nn_xla", wrong)
    path = tmp_path / "attention.csv"
    arguments = ["--workloads", name, "--providers", "jax_flash,jax_nn_xla", "--out", str(path)]
    assert run.main([*arguments, "--directions", "forward", "--rounds", "1"]) == 1
    assert "MISMATCH: jax_nn_xla and jax_flash" in capsys.readouterr().out
    assert len(path.read_text().splitlines()) == 1


def test_rows_pair_rivals_of_the_same_run_only(tmp_path):
    path = tmp_path / "attention.csv"
    shared = dict.fromkeys(run.COLUMNS, "x") | dict(
        workload="w", direction="forward", tflops="1", spread="0", host_bound="0"
    )
    with open(path, "w") as file:
        writer = csv.DictWriter(file, run.COLUMNS)
        writer.writeheader()
        for which, provider, ms in (
            ("1", "jax_flash", 4.0),
            ("1", "torch_flash", 8.0),
            ("2", "jax_flash", 2.0),
            ("2", "jax_nn_xla", 6.0),
            ("3", "torch_cudnn", 1.0),
        ):
            writer.writerow(shared | dict(run=which, provider=provider, ms=ms))
    found = rows.Rows(path)
    assert found.ms == {("w", "forward"): {"jax_flash": 2.0, "jax_nn_xla": 6.0}}
    assert found.ratio("w", "forward", "jax_nn_xla") == 3.0
    assert found.ratio("w", "forward", "torch_flash") is None


def _row(run_, workload, provider, ms, tflops=1.0):
    values = dict.fromkeys(run.COLUMNS, "x")
    values |= dict(run=run_, workload=workload, provider=provider, direction="forward")
    return values | dict(ms=ms, tflops=tflops, spread=0, host_bound=0)


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """Rows of two runs, the later without rivals, and leads from another call."""
    monkeypatch.setattr(evidence, "ROOT", tmp_path)
    path = tmp_path / "attention.csv"
    grid, option = "grid/h128/t4096/full", "dropout/h128/t8192/full"
    with open(path, "w") as file:
        writer = csv.DictWriter(file, run.COLUMNS)
        writer.writeheader()
        for row in (
            ("1", rows.CEILING, "jax_matmul", 1.6, 690.0),
            ("1", grid, "jax_flash", 2.0, 700.0),
            ("1", grid, "jax_nn_cudnn", 2.5, 560.0),
            ("1", grid, "torch_flash", 4.0, 350.0),
            ("1", "grid/h128/t8192/full", "jax_flash", 9.0),
            ("1", option, "jax_flash", 9.1),
            ("2", grid, "jax_flash", 2.2),
            ("2", "grid/h128/t8192/full", "jax_flash", 4.0),
            ("2", option, "jax_flash", 4.4),
        ):
            writer.writerow(_row(*row))
    (tmp_path / "other_call.csv").write_text(
        "workload,direction,provider,over_jax_nn_cudnn,measured\n"
        f"{grid},forward,flash_attention_3,1.3,elsewhere\n"
    )
    return rows.Rows(path)


def test_rivals_of_another_call_come_through_cudnn(measured):
    grid = "grid/h128/t4096/full", "forward"
    assert measured.ms[grid]["jax_flash"] == 2.0  # of the run that has rivals
    assert measured.ratio(*grid, "jax_nn_cudnn") == 1.25
    assert measured.other_ratio(*grid, "flash_attention_3") == pytest.approx(1.25 / 1.3)
    assert measured.other_ratio(*grid, "tokamax") is None
    assert measured.best_rival(*grid) == ("FlashAttention-3", pytest.approx(1.25 / 1.3))
    assert measured.best_rival("grid/h128/t8192/full", "forward") is None
    assert measured.ceiling() == 690.0
    text = readme.best_rivals(measured)
    assert "| forward, H=128, full | 0.96 f3 |" in text
    assert "forward 1.25x (1 cells)" in text
    assert "Behind the best rival: 1 of 1 cells" in text


def test_costs_compare_one_run(measured):
    """Run 2 is the later one that has both; its ratio, not one of two runs."""
    name = "dropout/h128/t8192/full"
    assert measured.cost(name, "grid/h128/t8192/full", "forward") == pytest.approx(1.1)
    assert measured.cost(name, "grid/h64/t8192/full", "forward") is None
    line = readme.option_costs(measured).splitlines()[-2]
    assert line == f"| `{name}` | `grid/h128/t8192/full` | 1 | +10% |  |"


@pytest.fixture
def quick_compilation():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def test_model_trains_and_leaves_rows(tmp_path, capsys, quick_compilation):
    path = tmp_path / "model.csv"
    names = ("jax_flash", "jax_nn_xla")
    arguments = ["--tiny", "--rounds", "1", "--steps", "2", "--target", "0.001"]
    assert model.main([*arguments, "--attention", ",".join(names), "--out", str(path)]) == 0
    found = rows.ModelRows(path)
    assert [row["attention"] for row in found.latest()] == list(names)
    for row in found.latest():
        parts = [float(row[name]) for name in ("forward_ms", "backward_ms")]
        assert 0 < sum(parts) and float(row["tokens_per_s"]) > 0
        assert 0 < float(row["loss"]) < 6  # log 256 = 5.5 at the start
    assert "the rest" in capsys.readouterr().out
    assert len(readme.model(found).splitlines()) == 6  # the model, a gap, four lines of a table


def test_model_refuses_another_attention(tmp_path, monkeypatch, capsys, quick_compilation):
    """A mask that one program lacks shows in the first losses: no row."""
    full = ("jax", lambda workload: jax.nn.dot_product_attention)
    monkeypatch.setitem(providers.PROVIDERS, "jax_nn_xla", full)
    alone = {(name, "backward"): 1.0 for name in ("jax_flash", "jax_nn_xla")}
    monkeypatch.setattr(model, "attention_alone", lambda *args: alone)
    path = tmp_path / "model.csv"
    arguments = ["--tiny", "--attention", "jax_flash,jax_nn_xla", "--out", str(path)]
    assert model.main(arguments) == 1
    assert "first losses differ" in capsys.readouterr().err and not path.exists()


@pytest.mark.parametrize("dropout", ["0", "0.1"])
def test_fused_model_is_the_plain_one(dropout, tmp_path, capsys, quick_compilation):
    """First losses agree, which the run demands, and both rows are there."""
    path = tmp_path / "fused_model.csv"
    arguments = ["--tiny", "--rounds", "1", "--steps", "2", "--dropout", dropout]
    assert fused_model.main([*arguments, "--out", str(path)]) == 0
    found = rows.ModelRows(path)
    (name,) = found.names()
    assert [row["program"] for row in found.latest(name)] == ["jax_flash", "jax_nn_cudnn"]
    for row in found.latest(name):
        assert float(row["tokens_per_s"]) > 0 and 0 < float(row["loss"]) < 6
    assert "times as fast" in capsys.readouterr().out
    assert len(readme.fused_model(found).splitlines()) == 6
    assert ("dropout" in name) == (dropout != "0")


def test_fused_model_refuses_another_model(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fused_model, "fused_head", lambda *args: 2 * fused_model.plain_head(*args))
    assert fused_model.main(["--tiny", "--out", str(tmp_path / "rows.csv")]) == 1
    assert "not the same model" in capsys.readouterr().err


OPERATORS = {  # what differs by more than its size
    (*workload.name.split("/")[:2], workload.dropout_rate, workload.is_packed): name
    for name, workload in operator_workloads.WORKLOADS.items()
}
OPERATORS["several in a launch"] = "norm/rms/1024"


def test_operators_agree_and_leave_rows(tmp_path, capsys, quick_compilation):
    """A dry run: every call of every operator, forward and backward, against plain jnp."""
    path = tmp_path / "operators.csv"
    names = "jax_flash,jax_flash_xla,xla,torch_compile"
    arguments = ["--dry", "--workloads", ",".join(OPERATORS.values()), "--out", str(path)]
    assert operators.main([*arguments, "--providers", names]) == 0
    assert "torch_compile: not measured: needs" in capsys.readouterr().out
    found = rows.Rows(path)
    for name in OPERATORS.values():
        unit = found.tflops if "cross" not in name and "4096x" in name else found.gbs
        unit = found.tflops if name.startswith("linear") else unit
        assert set(unit[name, "forward"]) == set(unit[name, "backward"])
        assert set(unit[name, "forward"]) == {"jax_flash", "jax_flash_xla", "xla"}
    assert found.ceiling_beside("norm/ln/8192", "backward") > 0


def test_operators_refuse_outputs_that_differ(tmp_path, monkeypatch, capsys):
    """The backward is looked at as well: this one is of another scale."""
    name = "softmax/causal/2048"
    right = operator_providers.PROVIDERS["xla"]

    def wrong(workload):
        call = right[1](workload)
        return lambda x: 2 * call(x) - jax.lax.stop_gradient(call(x))

    monkeypatch.setitem(operator_providers.PROVIDERS, "jax_flash_xla", ("jax", wrong))
    path = tmp_path / "operators.csv"
    arguments = ["--dry", "--workloads", name, "--out", str(path)]
    assert operators.main([*arguments, "--providers", "jax_flash,jax_flash_xla"]) == 1
    assert "MISMATCH: backward: jax_flash_xla and jax_flash" in capsys.readouterr().out
    assert "softmax" not in path.read_text()


def test_who_has_no_backward_is_compared_in_both(tmp_path, monkeypatch):
    """Then everybody has a row of both directions together, and the table a line."""
    prepare = operator_providers.prepare

    def without_backward(name, *args):
        makers = prepare(name, *args)
        if name == "jax_flash_xla":
            del makers["backward"]
        return makers

    monkeypatch.setattr(operator_providers, "prepare", without_backward)
    path = tmp_path / "operators.csv"
    arguments = ["--dry", "--workloads", "cross_entropy/bf16/50257", "--out", str(path)]
    assert operators.main([*arguments, "--providers", "jax_flash,jax_flash_xla,xla"]) == 0
    found = rows.Rows(path)
    both = found.ms["cross_entropy/bf16/50257", "forward_backward"]
    assert set(both) == {"jax_flash", "jax_flash_xla", "xla"}
    assert set(found.ms["cross_entropy/bf16/50257", "backward"]) == {"jax_flash", "xla"}
    assert "| forward + backward |" in readme.operators(found)


def test_fewest_bytes_of_the_operators():
    """As in the targets: GB/s of these bytes are what is aimed at."""
    named = operator_workloads.WORKLOADS
    assert named["norm/rms/4096"].gigabytes("backward") == 4 * 16384 * 4096 * 2 / 1e9
    assert named["norm/ln/4096/dropout"].gigabytes("backward") == 5 * 16384 * 4096 * 2 / 1e9
    assert named["cross_entropy/f32/50257"].gigabytes("forward") == 8192 * 50257 * 4 / 1e9
    square = 4 * 2048 * 2048 / 1e9
    assert named["softmax/masked/2048"].gigabytes("forward") == pytest.approx(65 * square)
    assert named["softmax/causal/2048"].gigabytes("forward_backward") == 16 * 2 * 5 * square
    heads = 4 * 4096 * 32 * 128 * 2 / 1e9
    assert named["rotary/half/128"].gigabytes("backward") == pytest.approx(4 * heads)
    assert named["rotary/half/128/packed"].gigabytes("forward") == pytest.approx(4 * heads)
    assert named["mlp/bf16/4096x16384"].tflop("backward") == 8 * 16384 * 4096 * 16384 / 1e12
    assert named["mlp/bf16/4096x16384"].gigabytes("forward") is None


def test_launches_in_place_take_fresh_copies():
    """The result is written over the cotangent alone, and no launch sees another's result."""
    x, dout = jax.numpy.arange(6.0), jax.numpy.ones(6)
    call = operator_providers.InPlace(lambda x, dout: x * dout + 1, x, dout)
    entry = clock.Timed("xla", "backward", call, launches=5)
    entry.burst()
    assert entry.launches == 5 and len(entry.seconds) == 1
    np.testing.assert_array_equal(call(), np.arange(6.0) + 1)
    assert not dout.is_deleted() and not x.is_deleted()


def test_launches_in_place_of_several_calls(monkeypatch):
    """Each call's result takes the memory of its own operand, so that XLA copies none."""
    monkeypatch.setattr(operator_providers, "_SHARED_BYTES", 0)
    workload = operator_workloads.WORKLOADS["rotary/half/128/packed"].small()
    compiled = operator_providers.repeated(workload, operator_providers.InPlace)
    call = compiled(lambda x: 2 * x, jax.numpy.arange(6.0))
    assert call.calls == workload.calls == 2
    text = call._executable.as_text()
    assert "{0}: (0, {}" in text and "{1}: (1, {}" in text
    for result in call():
        np.testing.assert_array_equal(result, 2 * np.arange(6.0))


def test_several_calls_share_what_is_small(monkeypatch):
    """A launch has large operands once for each call, small ones once; all calls see both."""
    monkeypatch.setattr(operator_providers, "_SHARED_BYTES", 16)
    workload = operator_workloads.WORKLOADS["norm/rms/4096"]
    given = []

    def compiled_with(function, *args):
        given.extend(jax.tree.leaves(args))
        return providers.compiled_with(function, *args)

    large, small = jax.numpy.arange(6.0), jax.numpy.ones(2)
    call = operator_providers.repeated(workload, compiled_with)(
        lambda pair, small: pair["x"] * small.sum() + pair["y"].sum(), dict(x=large, y=small), small
    )
    assert call.calls == workload.calls == 2 and len(given) == 2 + 2
    for result in call():
        np.testing.assert_array_equal(result, 2 * np.arange(6.0) + 2)


@pytest.mark.parametrize("slow", [[*range(1), *range(3, 23)], [*range(3), *range(5, 20)]], ids=str)
def test_slow_first_launches_do_not_shorten_bursts(slow, monkeypatch):
    """What the first calls of a run wait for, memory above all, is not what fills a burst."""
    now, ran = [0.0], []

    def call():
        now[0] += 8e-3 if len(ran) in slow else 1e-4
        ran.append(None)
        return jax.numpy.zeros(1)

    monkeypatch.setattr(clock.time, "perf_counter", lambda: now[0])
    entry = clock.Timed("xla", "forward", call)
    entry.warm_up(0.02)
    assert entry.launches == 200 and not entry.seconds
    entry.burst()
    assert entry.median() == pytest.approx(1e-4)


def test_a_burst_s_start_is_taken_off(monkeypatch):
    """Of a device that takes a while to start, and once was slow at it, the calls alone count."""
    now, starts = [0.0], iter([3e-4, 3e-4, 3e-4, 3e-4, 9e-3, 3e-4, 3e-4, 3e-4])

    def call():
        now[0] += 2e-4
        return jax.numpy.zeros(1)

    def synchronise(result):
        now[0] += next(starts)

    monkeypatch.setattr(clock.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(clock.providers, "synchronise", synchronise)
    entry = clock.Timed("xla", "forward", call, launches=10, calls=2, less_start=True)
    for _ in range(4):
        entry.burst()
    np.testing.assert_allclose(entry.seconds, 1e-4)


def test_what_waits_takes_bounded_memory(monkeypatch):
    """Launches go ahead of the device as far as their results may take memory."""
    results = jax.numpy.ones((64, 1024))
    entry = clock.Timed("xla", "forward", lambda: results, launches=40)
    entry.burst()
    assert entry.waiting == 32
    monkeypatch.setattr(clock, "_WAITING_BYTES", 8 * results.nbytes)
    entry.burst()
    assert entry.waiting == 8 and len(entry.seconds) == 2


def test_table_and_figure_of_operators(tmp_path, monkeypatch):
    """Ours and its ceiling are of one run; a rival ahead shows as a ratio below 1."""
    monkeypatch.setattr(evidence, "ROOT", tmp_path)
    monkeypatch.setattr(evidence, "RESULTS", tmp_path)
    assert readme.fused_operators() == "Not measured yet.\n"
    (tmp_path / "device").mkdir()
    path = tmp_path / "device" / "operators.csv"
    norm, mlp = "norm/ln/4096", "mlp/bf16/4096x16384"
    with open(path, "w") as file:
        writer = csv.DictWriter(file, operators.COLUMNS)
        writer.writeheader()
        for which, name, provider, ms, gbs, tflops in (
            ("1", rows.COPY_CEILING, "jax_copy", 1, 4000, ""),
            ("1", rows.CEILING, "jax_matmul", 1, "", 700),
            ("1", norm, "jax_flash", 2, 3000, ""),
            ("1", norm, "xla", 4, 1500, ""),
            ("1", norm, "torch_compile", 1.5, 4000, ""),
            ("1", mlp, "jax_flash", 2, "", 630),
            ("2", rows.COPY_CEILING, "jax_copy", 1, 9999, ""),
            ("2", norm, "jax_flash", 1, 6000, ""),
        ):
            values = _row(which, name, provider, ms, tflops)
            writer.writerow({key: values.get(key, gbs) for key in operators.COLUMNS})
    (found,) = rows.load_operators()
    text = readme.fused_operators()
    assert f"| `{norm}` | forward | 3000 GB/s | 75% | 2.00x | 0.75x |" in text.splitlines()
    assert "over XLA, plain jnp | over torch.compile |" in text
    assert f"rival of their run, 1 of 1: `{norm}` forward 0.75 (torch.compile)." in text
    assert f"| `{mlp}` | forward | 630 TFLOP/s | 90% |  |  |" in text.splitlines()
    plot.operators(found)
    assert path.with_name("operators.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    "kernel, kind",
    [
        ("jax_flash::attention::sm90::forward_kernel<Traits>", "attention forward"),
        ("void jax_flash::attention::backward_kernel<Traits>", "attention backward"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16", "attention backward"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16", "attention forward"),
        ("nvjet_tst_256x128_64x4_2x1_v_bz_coopA_NNT", "matrix products"),
        ("void jax_flash::cross_entropy::backward_kernel<float>", "the rest"),
        ("loop_add_fusion_3", "the rest"),
    ],
)
def test_kernels_are_told_apart(kernel, kind):
    assert model.kind_of(kernel) == kind


def test_readme_is_up_to_date():
    text = readme.README.read_text()
    assert text.count("<!-- measured:") == len(readme.TABLES)
    assert readme.rewritten(text) == text, "run make readme"


def test_source_hash_follows_the_sources(tmp_path):
    for folder in ("csrc", "jax_flash", "cmake"):
        (tmp_path / folder).mkdir()
    (tmp_path / "CMakeLists.txt").write_text("project(x)")
    source = tmp_path / "csrc" / "kernel.cu"
    source.write_text("a")
    before = evidence.source_hash(tmp_path)
    (tmp_path / "jax_flash" / "_cpu.so").write_text("not a source")
    assert evidence.source_hash(tmp_path) == before
    source.write_text("b")
    assert evidence.source_hash(tmp_path) != before


def test_gpu_reports_say_which_code_they_judged(tmp_path, monkeypatch):
    monkeypatch.setattr(evidence, "RESULTS", tmp_path)
    for device, source in (("a", evidence.source_hash()), ("b", "0" * 64)):
        (tmp_path / device).mkdir()
        (tmp_path / device / "gpu_tests.json").write_text(json.dumps({"source_hash": source}))
    assert [report["matches"] for report in evidence.gpu_reports()] == [True, False]


def test_the_table_of_gpu_reports_hides_nothing(monkeypatch):
    """What was left out and what the sanitizer never finished stand beside the counts."""
    report = dict(device="d", date="t", jax="1", source_hash="0" * 64)
    report["tests"] = dict(
        passed=7, failed=2, skipped=1, selection="-q --deselect tests/test_a.py -k not cpu"
    )
    report["sanitizers"] = [dict(tool="memcheck", errors=3, passed=5, unfinished=["x", "y"])]
    monkeypatch.setattr(evidence, "gpu_reports", lambda: [report])
    cells = [cell.strip() for cell in readme.gpu_tests().splitlines()[-1].strip("|").split("|")]
    assert cells[3:6] == ["7", "2", "1"]
    assert cells[6] == "`--deselect tests/test_a.py -k not cpu`"
    assert cells[7] == "memcheck: 3 errors in 5 tests, 2 unfinished"


def test_public_calls_exist():
    """The names that the benchmarks and the README call."""
    for name in ("attention", "varlen_attention", "blocksparse_attention", "show_backends"):
        assert callable(getattr(jax_flash, name))
