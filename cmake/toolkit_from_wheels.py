"""Makes a CUDA toolkit folder out of Python's nvidia-* wheels, and prints its path.

Usage: toolkit_from_wheels.py FOLDER
"""

import importlib.util
import pathlib
import sys

WHEELS = "nvidia-cuda-nvcc nvidia-nvvm nvidia-cuda-crt nvidia-cuda-cccl nvidia-cuda-runtime"
NEEDED = ("bin/nvcc", "nvvm", "include/crt", "include/cuda_runtime.h", "lib/libcudart_static.a")


def main(folder: pathlib.Path) -> str:
    spec = importlib.util.find_spec("nvidia")
    roots = [pathlib.Path(path) for path in spec.submodule_search_locations] if spec else []
    candidates = [root / "cu13" for root in roots]
    for root in candidates:
        if all((root / name).exists() for name in NEEDED):
            break
    else:
        missing = [n for n in NEEDED if not any((root / n).exists() for root in candidates)]
        return f"jax_flash: expected the wheels {WHEELS}; {', '.join(missing)} not found"
    # nvcc looks for everything at its own folder's parent, and there for lib64; CMake wants
    # libcudart.so, though nothing links it.
    links = {name: root / name for name in ("include", "nvvm")} | {"lib64": folder / "lib"}
    for part in ("bin", "lib"):
        (folder / part).mkdir(parents=True, exist_ok=True)
        links |= {f"{part}/{path.name}": path for path in (root / part).iterdir()}
    for path in (root / "lib").glob("libcudart.so.*"):
        links["lib/libcudart.so"] = path
    for name, target in links.items():
        link = folder / name
        link.unlink(missing_ok=True)
        link.symlink_to(target)
    print(folder)
    return ""


if __name__ == "__main__":
    sys.exit(main(pathlib.Path(sys.argv[1])) or 0)
