"""Benchmarks as code: every workload's options are right when small, and tables follow rows."""

import csv
import json

import jax
import numpy as np
import pytest

import jax_flash
from benchmarks import evidence, providers, readme, rows, run, workloads
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
