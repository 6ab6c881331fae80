"""The soak (tests/soak.py) on any machine: a dozen cases, and that it sees what is wrong."""

import collections
import contextlib
import json
import multiprocessing
import os
import pickle
import threading

import numpy as np
import pytest

from jax_flash.reference import attention as reference
from tests import soak, soak_cases, soak_worker


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run(*arguments) -> (exit code, report)."""
    monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))  # put back afterwards
    path = tmp_path / "soak.json"

    def call(*arguments):
        code = soak.main([*arguments, "--out", str(path)])
        return code, json.loads(path.read_text())

    return call


def test_a_dozen_cases(run):
    code, report = run("--cases", "12", "--signatures", "6", "--seed", "3", "--workers", "1")
    assert code == 0 and report["failed"] == 0 and report["cases"] == 12, report["failures"]
    assert 0.01 < report["worst_ratio"] <= 1
    assert len(report["counts"]) > 10


@pytest.mark.parametrize("fault", ["scaled", "nan", "lse", "shifted", "raises"])
def test_faults_are_seen(run, fault, monkeypatch):
    calls = []

    def faulty(self, s, operands, q, k, v, dout, dlse):
        calls.append(s)
        if fault == "raises":
            raise ValueError("refused")
        out, lse, dq, dk, dv = correct(self, s, operands, q, k, v, dout, dlse)
        if fault == "scaled":  # one row of one gradient is 30% off
            dk = dk.at[0, 0].multiply(1.3)
        if fault == "nan":
            dq = dq.at[0, -1, 0, 0].set(np.nan)
        if fault == "lse" and lse is not None:
            lse = lse + 1e-3
        if fault == "shifted":
            out = out + 0.1
        return out, lse, dq, dk, dv

    correct = soak_worker.Programs._ours
    monkeypatch.setattr(soak_worker.Programs, "_ours", faulty)
    code, report = run("--cases", "6", "--signatures", "3", "--seed", "11", "--workers", "0")
    assert calls and code == 1
    words = dict(scaled="dk: off by", nan="dq: off by inf", lse="lse:", shifted="out: off by")
    wanted = words.get(fault, "ValueError: refused")
    complaints = [text for failure in report["failures"] for text in failure["complaints"]]
    assert any(text.startswith(wanted) for text in complaints), complaints


def test_other_bits_the_second_time_are_seen(run, monkeypatch):
    correct, calls = soak_worker.Programs.get, []

    def get(self, signature):
        ours, plain = correct(self, signature)

        def unsteady(*args):
            calls.append(signature)
            out, *rest = ours(*args)
            return out.at[0, 0, 0, 0].add(1e-3 * len(calls)), *rest

        return unsteady, plain

    monkeypatch.setattr(soak_worker.Programs, "get", get)
    code, report = run("--cases", "1", "--signatures", "1", "--seed", "3", "--workers", "0")
    assert code == 1 and len(calls) == 2
    assert "out: other bits the second time" in report["failures"][0]["complaints"]


def test_a_hang_ends_the_run(run, monkeypatch):
    end = threading.Event()
    monkeypatch.setattr(soak_worker.Programs, "get", lambda self, signature: end.wait())
    code, report = run("--cases", "2", "--signatures", "1", "--workers", "0", "--hang", "2")
    end.set()
    assert code == 3 and report["hung"] == [0] and report["cases"] == 0


def test_a_case_whose_worker_dies_has_failed_and_the_others_go_on():
    has_died = threading.Event()

    def work(connection, cases):
        with contextlib.closing(connection):
            for result in (None, *[(0.5, [])] * cases):
                connection.send(result)
                if connection.recv() is None:
                    return
                if cases > 1:  # not before the other has its last case, or this one takes that
                    has_died.wait()
        has_died.set()

    args = soak.parse(["--cases", "6"])
    plan = soak_cases.Plan(3, 6, 2)
    workers, tally = [], soak.Tally(9)
    for share, cases in (([0, 1, 2], 1), ([3, 4, 5], 9)):
        here, there = multiprocessing.Pipe()
        threading.Thread(target=work, args=(there, cases)).start()
        workers.append(soak.Worker(here, None, collections.deque(share)))
    assert soak.hand_out(args, plan, workers, tally) == []
    assert tally.cases == 6 and tally.worst == 0.5
    assert tally.failures == [dict(case=1, complaints=["its worker died"])]


def test_cases_can_be_drawn_again():
    signature = soak_cases.signatures(5, 40)[-1]
    assert signature == soak_cases.signatures(5, 40)[-1]
    first, second = (soak_cases.draw_case(signature, 5, 17) for _ in range(2))
    for a, b in zip(soak_cases.tensors(first, 5), soak_cases.tensors(second, 5), strict=True):
        assert a.tobytes() == b.tobytes()
    assert first.labels() == second.labels()
    for name, value in first.operands.items():
        np.testing.assert_array_equal(value, second.operands[name])


def test_a_plan_travels_as_what_it_is_made_of():
    plan = soak_cases.Plan(5, 10000, 40, ["varlen"])
    sent = pickle.dumps(plan)
    assert len(sent) < 1000
    got = pickle.loads(sent)
    assert got.signatures == plan.signatures and (got.order == plan.order).all()


def test_signatures_are_chosen_by_label():
    for signature in soak_cases.signatures(1, 20, ["varlen", "!dropout"]):
        assert signature.sequences and not signature.rate
    with pytest.raises(ValueError, match="expected some that go together, got varlen, block mask"):
        soak_cases.signatures(1, 1, ["varlen", "block mask"])


def test_signatures_cover_every_option():
    found = {label for s in soak_cases.signatures(20261120, 200) for label in s.labels()}
    assert len(found) == 29, sorted(found)


@pytest.mark.parametrize("sizes", [(2, 3, 45, 70), (1, 1, 1, 1), (1, 2, 128, 17)])
def test_keep_mask_is_the_definition(sizes):
    key = np.array([3, 2**32 - 5], np.uint32)
    expected = reference.dropout_keep(0.3, key, *sizes, first_batch=2)
    np.testing.assert_array_equal(soak_cases.keep_mask(0.3, key, *sizes, first_batch=2), expected)
