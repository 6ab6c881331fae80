"""Set-up that every test shares: eight host devices for sharding, and the gpu marker."""

import os

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
# numpy's products of the float64 definitions: more threads than cores wait for each other. A
# definition of test_many_short_sequences took 18 s with 16 and 3 s with one (2 cores, 2026-11-28).
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import pytest

# Without this the plain forms that ours are measured with would run in TF32 on a GPU.
jax.config.update("jax_default_matmul_precision", "highest")


def has_gpu() -> bool:
    return any(device.platform == "gpu" for device in jax.devices())


def pytest_collection_modifyitems(items):
    if not any(item.get_closest_marker("gpu") for item in items) or has_gpu():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU"))


def pytest_report_header():
    """Which code the committed GPU reports judged: a note, since only a GPU can make a new one."""
    from benchmarks import evidence

    reports = evidence.gpu_reports()
    if not reports:
        return "GPU report: none committed"
    return [
        f"GPU report: {report['device']}, {report['date']}, "
        + ("of this very code" if report["matches"] else "NOT of this code: run make gpu-test")
        for report in reports
    ]
