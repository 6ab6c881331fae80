"""The package as built: metadata, types, native modules, and the files that speak about it."""

import importlib
import importlib.metadata
import importlib.util
import pathlib
import re
import subprocess
import sys

import jax
import pytest

import jax_flash
from benchmarks import evidence

OPS = {"jax_flash.attention_forward", "jax_flash.attention_backward"}
HAS_CUDA = importlib.util.find_spec("jax_flash._cuda") is not None


def _readelf(option: str, path: str) -> str:
    command = ["readelf", "-W", option, path]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("module", ["_cpu", "_cuda"])
def test_every_operator_is_registered(module):
    if module == "_cuda" and not HAS_CUDA:
        pytest.skip("built without nvcc")
    native = importlib.import_module(f"jax_flash.{module}")
    assert set(native.registrations()) >= OPS


def test_cuda_module_needs_no_cuda_library():
    """It imports on a machine without driver or toolkit: cudart is static, libcuda not linked."""
    if not HAS_CUDA:
        pytest.skip("built without nvcc")
    path = importlib.import_module("jax_flash._cuda").__file__
    needed = re.findall(r"NEEDED.*\[(.*?)\]", _readelf("-d", path))
    assert needed, "readelf printed no libraries"
    assert not [name for name in needed if "cuda" in name or "nv" in name], needed


@pytest.mark.parametrize("module", ["_cpu", "_cuda"])
def test_native_module_exports_only_its_init_function(module):
    """Everything else is hidden, so that two such libraries in one process cannot mix."""
    if module == "_cuda" and not HAS_CUDA:
        pytest.skip("built without nvcc")
    path = importlib.import_module(f"jax_flash.{module}").__file__
    lines = _readelf("--dyn-syms", path).splitlines()
    names = [line.split()[-1] for line in lines if " DEFAULT " in line and " UND " not in line]
    assert names == [f"PyInit_{module}"]


def test_stable_abi_from_python_3_12():
    suffix = pathlib.Path(importlib.import_module("jax_flash._cpu").__file__).name
    assert (".abi3." in suffix) == (sys.version_info >= (3, 12)), suffix


def test_size_fits_a_wheel():
    """A wheel is to stay under 40 MB; compression only helps."""
    folder = pathlib.Path(importlib.import_module("jax_flash._cpu").__file__).parent
    size = sum(path.stat().st_size for path in folder.glob("*.so"))
    assert 0 < size < 40e6, f"{size / 1e6:.1f} MB"


def test_metadata_and_types():
    package = pathlib.Path(jax_flash.__file__).parent
    assert (package / "py.typed").exists()
    try:
        metadata = importlib.metadata.metadata("jax-flash")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("run from the source tree, not installed")
    assert metadata["Version"] == jax_flash.__version__
    assert metadata["License-Expression"] == "Apache-2.0"


def test_importing_starts_no_backend():
    """import must not grab a GPU, nor fix the platform before the user could choose."""
    script = (
        "import jax_flash\n"
        "from jax._src import xla_bridge\n"
        "assert not xla_bridge.backends_are_initialized()\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=evidence.ROOT)


def test_jax_version_is_supported():
    version = tuple(int(part) for part in jax.__version__.split(".")[:2])
    assert (0, 10) <= version < (0, 13)


def test_every_switch_is_documented():
    """Environment variables and CMake options of ours: those that docs/switches.md names."""
    found = set()
    for folder, pattern in (
        ("csrc", r'getenv\("(JAX_FLASH_\w+)"'),
        ("jax_flash", r'environ(?:\.get)?[\[(]"(JAX_FLASH_\w+)"'),
        ("tests", r'environ\.get\("(JAX_FLASH_\w+)"'),
        ("cmake", r"^(?:set|option)\((JAX_FLASH_\w+)"),
    ):
        for path in (evidence.ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".h", ".cc", ".cmake"):
                found |= set(re.findall(pattern, path.read_text(), re.MULTILINE))
    text = (evidence.ROOT / "docs" / "switches.md").read_text()
    documented = set(re.findall(r"^\| `(JAX_FLASH_\w+)`", text, re.MULTILINE))
    assert len(found) >= 5 and documented == found


def test_readme_example_runs(capsys):
    """The example prints a finite loss, the gradient's shape, and the backends."""
    text = (evidence.ROOT / "README.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(compile(example, "README.md", "exec"), {})
    first, *backends = capsys.readouterr().out.splitlines()
    loss, shape = first.split(" ", 1)
    assert 0 < float(loss) < 1 and shape == "(2, 1000, 8, 64)"
    assert {"cuda", "cpu", "xla"} <= {line.split()[0] for line in backends if line.strip()}
