"""Kernel experiments: several versions of csrc/ in one process, without XLA.

    python -m benchmarks.variants build --name base --csrc OTHER/csrc --head-dims 64,128
    python -m benchmarks.variants build --name mine           # this tree's csrc
    python -m benchmarks.variants check --names mine          # on a Hopper GPU, with torch
    python -m benchmarks.variants time --names base,mine --head-dims 128 --seqs 512,4096

`build` needs nvcc and no GPU: one shared object for each direction and head dim, in `--folder`,
with what ptxas says of spills and serialised wgmma. `check` holds every variant to a float64
reference, by the rule of tests/rule.py. `time` interleaves the variants and torch's cuDNN in
random order, in bursts between two CUDA events. What it prints is for docs/kernels/log.md; rows of
benchmarks/results/ come from benchmarks.run, through JAX.
"""

from __future__ import annotations

import argparse
import ctypes
import math
import pathlib
import random
import re
import shutil
import statistics
import subprocess
import sys

from benchmarks import evidence
from tests import rule

HERE = pathlib.Path(__file__).parent
TOKENS, HIDDEN = 16384, 2048  # the grid's
DEVICE = "cuda"


class Call(ctypes.Structure):
    """Call of entry.cu."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in "q k v o dout dq dk dv lse workspace".split()),
        ("workspace_bytes", ctypes.c_int64),
        *((name, ctypes.c_int64) for name in "batch seq_q seq_k heads kv_heads head_dim".split()),
        *((name, ctypes.c_int64) for name in "causal window_left is_fp16 deterministic".split()),
        ("num_sequences", ctypes.c_int64),
        ("cu_seqlens", ctypes.c_void_p),
        ("threshold", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("state", "head_ids")),
    ]


# Build --------------------------------------------------------------------------------------------


def library(folder: pathlib.Path, name: str, direction: str, head_dim: int) -> pathlib.Path:
    return folder / f"{name}_{direction}_{head_dim}.so"


def build(folder, name, csrc, direction, head_dim, fp16=True, options=()) -> str:
    """Compiles one variant; returns what ptxas has to say of it, "" for nothing."""
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    folder.mkdir(parents=True, exist_ok=True)
    command = [nvcc, "-O3", "-std=c++20", "-shared", "-Xcompiler", "-fPIC", "-cudart", "static"]
    command += ["-gencode", "arch=compute_90a,code=sm_90a", "-Xptxas", "-v,--warn-on-spills"]
    command += ["-diag-suppress", "177", "-I", str(csrc), f"-DVARIANT_HEAD_DIM={head_dim}"]
    command += ["-DVARIANT_BACKWARD"] * (direction == "backward") + ["-DVARIANT_FP16"] * fp16
    command += [*options, "-o", str(library(folder, name, direction, head_dim))]
    run = subprocess.run(
        [*command, str(HERE / "entry.cu")], capture_output=True, text=True, check=False
    )
    if run.returncode != 0:
        sys.exit(run.stdout + run.stderr)
    text = run.stdout + run.stderr
    return "\n".join(line for line in text.splitlines() if re.search(r"C75\d\d|spilled", line))


def load(folder, name, direction, head_dim):
    """call(Call, stream), or None where it was not built."""
    path = library(folder, name, direction, head_dim)
    if not path.exists():
        return None
    module = ctypes.CDLL(str(path))
    if module.call_bytes() != ctypes.sizeof(Call):
        sys.exit(f"{path}: built for another Call: build it again")
    module.run.restype = ctypes.c_char_p
    module.run.argtypes = [ctypes.c_void_p, ctypes.c_void_p]

    def call(arguments: Call, stream: int) -> None:
        if error := module.run(ctypes.addressof(arguments), stream):
            raise RuntimeError(error.decode())

    return call


def _stream() -> int:
    import torch

    return torch.cuda.current_stream().cuda_stream


# Calls --------------------------------------------------------------------------------------------


KEY = (0x2468ACE, 0x13579BDF)  # of dropout


def wide(a: int, b):
    """The high and low words of 32 x 32 bit products, from halves of b: int64 has 63 bits."""
    low, high = a * (b & 0xFFFF), a * (b >> 16)
    total = (low >> 16) + (high & 0xFFFFFFFF)
    return (total >> 16) + (high >> 32 << 16), (total & 0xFFFF) << 16 | low & 0xFFFF


class Problem:
    """Random operands of one call on the GPU, results full of NaN, and the Call that names them."""

    def __init__(
        self,
        batch,
        seq_q,
        seq_k,
        heads,
        kv_heads,
        head_dim,
        *,
        causal=0,
        left=-1,
        bounds=(),
        dropout=0.0,
    ):
        self.shape = dict(batch=batch, seq_q=seq_q, seq_k=seq_k)
        self.shape |= dict(heads=heads, kv_heads=kv_heads, head_dim=head_dim)
        self.options = dict(causal=causal, window_left=left)
        self.bounds = bounds  # cu_seqlens of queries and keys; (): dense
        self.threshold = round(dropout * 65536)

    def fill(self, fp16=False, deterministic=False, seed=0, scores=0.0):
        """`scores`: what all queries and keys have in common, to move the scores up or down."""
        import torch

        generator = torch.Generator(device=DEVICE).manual_seed(seed)
        dtype = torch.float16 if fp16 else torch.bfloat16
        batch, seq_q, seq_k, heads, kv_heads, head_dim = self.shape.values()

        def normal(rows, heads, mean=0.0):
            size = (batch, rows, heads, head_dim)
            x = torch.randn(size, device=DEVICE, generator=generator, dtype=torch.float32)
            return (x + mean).to(dtype)

        self.arrays = dict(q=normal(seq_q, heads, abs(scores)), k=normal(seq_k, kv_heads, scores))
        self.arrays |= dict(v=normal(seq_k, kv_heads), dout=normal(seq_q, heads))
        for name in "qkv":
            self.arrays["d" + name] = torch.full_like(self.arrays[name], math.nan)
        self.arrays["o"] = torch.full_like(self.arrays["q"], math.nan)
        self.arrays["lse"] = torch.full((batch, heads, seq_q), math.nan, device=DEVICE)
        sums = self.workspace_bytes
        self.arrays["workspace"] = torch.empty(sums, dtype=torch.uint8, device=DEVICE)
        if self.bounds:
            bounds = torch.tensor(self.bounds, device=DEVICE, dtype=torch.int32)
            self.arrays["cu_seqlens"] = bounds
        state = [[KEY[0], KEY[1], entry, 0] for entry in range(batch)]
        self.arrays["state"] = torch.tensor(state, device=DEVICE, dtype=torch.int32)
        self.arrays["head_ids"] = torch.arange(heads, device=DEVICE, dtype=torch.int32)
        pointers = {name: x.data_ptr() for name, x in self.arrays.items()}
        self.call = Call(
            **pointers,
            **self.shape,
            **self.options,
            workspace_bytes=sums,
            is_fp16=fp16,
            deterministic=deterministic,
            num_sequences=self.num_sequences,
            threshold=self.threshold,
        )
        return self

    @property
    def num_sequences(self) -> int:
        return max(0, len(self.bounds) - 1)

    @property
    def workspace_bytes(self) -> int:
        """More than any plan of backward_plan.h asks for at these sizes."""
        batch, seq_q, seq_k, heads, kv_heads, head_dim = self.shape.values()
        sums = 24 * batch * heads * (seq_q + 512 + 256 * self.num_sequences) * max(64, head_dim)
        return sums + 32 * batch * kv_heads * seq_k * head_dim + (64 << 20)

    def run(self, call) -> None:
        call(self.call, _stream())

    def allowed(self):
        """[seq_q, seq_k]: which pairs exist."""
        import torch

        i = torch.arange(self.shape["seq_q"], device=DEVICE)
        j = torch.arange(self.shape["seq_k"], device=DEVICE)
        rows, columns = self.shape["seq_q"], self.shape["seq_k"]
        ok = torch.ones(rows, columns, dtype=torch.bool, device=DEVICE)
        offset = columns - rows if self.options["causal"] == 2 else 0
        if self.bounds:  # the same for both: no offset between them
            bounds, offset = self.arrays["cu_seqlens"].long(), 0
            of_i = torch.bucketize(i, bounds[1:], right=True)
            of_j = torch.bucketize(j, bounds[1:], right=True)
            ok &= (of_i[:, None] == of_j) & (of_i < self.num_sequences)[:, None]
        difference = j - i[:, None] - offset
        if self.options["causal"]:
            ok &= difference <= 0
        if self.options["window_left"] >= 0:
            ok &= difference >= -self.options["window_left"]
        return ok

    def kept(self):
        """[batch, heads, seq_q, seq_k]: what dropout keeps, by csrc/common/philox.h."""
        import torch

        def axis(name, dim):
            size = self.shape[name]
            return torch.arange(size, device=DEVICE).view([-1 if i == dim else 1 for i in range(4)])

        i, j, head, entry = (
            axis(*x) for x in (("seq_q", 2), ("seq_k", 3), ("heads", 1), ("batch", 0))
        )
        if self.bounds:  # rows and columns count from their sequence's start
            bounds = self.arrays["cu_seqlens"].long()
            of_i, of_j = (
                torch.bucketize(x, bounds[1:], right=True).clamp_max(self.num_sequences - 1)
                for x in (i, j)
            )
            i, j = (i - bounds[of_i]).clamp_min(0), (j - bounds[of_j]).clamp_min(0)
            entry = entry * self.num_sequences + of_i
        x, y, z, w = j // 16 * 4 + j % 8 // 2, i // 16 * 8 + i % 8, head, entry
        key0, key1 = KEY
        for _ in range(7):
            (high0, low0), (high1, low1) = wide(0xD2511F53, x), wide(0xCD9E8D57, z)
            x, y, z, w = high1 ^ y ^ key0, low1, high0 ^ w ^ key1, low0
            key0, key1 = (key0 + 0x9E3779B9) % 2**32, (key1 + 0xBB67AE85) % 2**32
        is_right, is_lower = j & 8 != 0, i & 8 != 0
        word = torch.where(is_lower, torch.where(is_right, w, z), torch.where(is_right, y, x))
        return (word >> 16 * (j & 1) & 0xFFFF) >= self.threshold

    def reference(self, dtype) -> dict:
        """All results in `dtype`, by plain torch."""
        import torch

        q, k, v = (self.arrays[name].detach().to(dtype).requires_grad_() for name in "qkv")
        group = self.shape["heads"] // self.shape["kv_heads"]
        keys, values = (x.repeat_interleave(group, 2) for x in (k, v))
        ok = self.allowed()
        s = torch.einsum("btnh,bsnh->bnts", q, keys) / math.sqrt(self.shape["head_dim"])
        s = s.masked_fill(~ok, -math.inf)
        p = torch.where(ok.any(-1)[:, None], torch.softmax(s, -1), torch.zeros_like(s))
        dropped = p
        if self.threshold:
            dropped = p * self.kept() * (65536 / (65536 - self.threshold))
        out = torch.einsum("bnts,bsnh->btnh", dropped, values)
        out.backward(self.arrays["dout"].to(dtype))
        lse = torch.logsumexp(s.double(), -1)
        found = dict(o=out, lse=lse, dq=q.grad, dk=k.grad, dv=v.grad)
        return {name: x.detach() for name, x in found.items()}


# Check --------------------------------------------------------------------------------------------


def problems(head_dim: int, direction: str):
    """(problem, what fill() is told): ragged ends, T != S, GQA, windows, empty rows, many tiles."""
    shapes = [
        ((2, 512, 512, 3, 3), dict()),
        ((2, 512, 512, 3, 3), dict(causal=1)),
        ((1, 1000, 777, 4, 2), dict(causal=2)),
        ((2, 257, 513, 6, 3), dict()),
        ((2, 129, 129, 3, 1), dict(causal=1)),
        ((1, 1500, 1500, 5, 1), dict(causal=1, left=200)),
        ((1, 61, 300, 4, 2), dict(causal=1)),
        ((1, 300, 61, 4, 2), dict(causal=2)),
        ((40, 384, 384, 16, 16), dict(causal=1)),
    ]
    for shape, options in shapes:
        for fp16 in (False, True):
            yield Problem(*shape, head_dim, **options), dict(fp16=fp16)
    for bounds, options in (
        ([0, 5, 5, 400, 401, 900, 1000], dict(causal=1)),
        ([0, 128, 384, 390, 1003], dict()),
    ):
        yield Problem(1, 1003, 1003, 4, 2, head_dim, bounds=bounds, **options), dict()
    for (batch, *shape), options in shapes[1:]:
        for fp16 in (False, True):
            problem = Problem(min(batch, 10), *shape, head_dim, dropout=0.2, **options)
            yield problem, dict(fp16=fp16)
    bounds = [0, 5, 5, 400, 401, 900, 1003]
    yield Problem(1, 1003, 1003, 4, 2, head_dim, bounds=bounds, causal=1, dropout=0.2), dict()
    if direction == "forward":  # scores far above and below what a job begins with
        for scores in (1.5, -1.5, 3.0, -3.0):
            yield Problem(2, 512, 512, 3, 3, head_dim, causal=1), dict(scores=scores)
            # Many jobs, of whose first tile some warps see nothing.
            yield Problem(40, 256, 288, 16, 16, head_dim, causal=2), dict(scores=scores)


def faults(problem: Problem, call, direction: str, exact: dict, plain: dict) -> list[str]:
    """What is wrong with the results of one call."""
    import torch

    names = ("o", "lse") if direction == "forward" else ("dq", "dk", "dv")
    if direction == "backward":
        problem.arrays["o"].copy_(exact["o"])
        problem.arrays["lse"].copy_(exact["lse"])
    for name in names:
        problem.arrays[name].fill_(math.nan)
    problem.run(call)  # on the stream on which torch reads the results
    found = []
    for name in names:
        ours, right = problem.arrays[name].double(), exact[name].double()
        if name == "lse":
            empty = right == -math.inf
            good = (ours[empty] == -math.inf).all()
            near = (ours - right).abs() <= rule.LSE * (1 + right.abs())
            if not (good and near[~empty].all()):
                found.append("lse")
            continue
        unit = torch.finfo(problem.arrays[name].dtype).eps
        error = (ours - right).abs().max().item()
        plain_error = (plain[name].double() - right).abs().max().item()
        bound = rule.allowed(unit, plain_error, right.abs().max().item())
        if not error <= bound:
            found.append(f"{name}: off by {error:.2e}, allowed {bound:.2e}")
    return found


def check(args) -> int:
    import torch

    count = bad = 0
    for direction in args.directions:
        for head_dim in args.head_dims:
            calls = {name: load(args.folder, name, direction, head_dim) for name in args.names}
            for problem, options in problems(head_dim, direction):
                problem.fill(seed=head_dim, **options)
                exact = problem.reference(torch.float64)
                plain = problem.reference(problem.arrays["q"].dtype)
                for name, call in calls.items():
                    if call is None:
                        continue
                    count += 1
                    if found := faults(problem, call, direction, exact, plain):
                        bad += 1
                        what = {**problem.shape, **problem.options, **options}
                        what["threshold"] = problem.threshold
                        print(f"{name} {direction} {what}: {', '.join(found)}", flush=True)
    print(f"{bad} of {count} calls are wrong")
    return int(bad > 0 or count == 0)


# Time ---------------------------------------------------------------------------------------------


def burst(function, launches: int) -> float:
    """Milliseconds of one of so many launches."""
    import torch

    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(launches):
        function()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / launches


def cudnn(problem: Problem, direction: str):
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q, k, v, dout = (
        problem.arrays[name].transpose(1, 2).detach() for name in ("q", "k", "v", "dout")
    )
    tensors = [x.requires_grad_(direction == "backward") for x in (q, k, v)]

    def forward():
        with sdpa_kernel([SDPBackend.CUDNN_ATTENTION]):
            causal = problem.options["causal"] == 1
            return torch.nn.functional.scaled_dot_product_attention(*tensors, is_causal=causal)

    if direction == "forward":
        return forward
    out = forward()
    return lambda: torch.autograd.grad(out, tensors, dout, retain_graph=True)


def time_one(args, direction: str, head_dim: int, seq: int, causal: int) -> str:
    heads = HIDDEN // head_dim
    problem = Problem(
        TOKENS // seq,
        seq,
        seq,
        heads,
        args.kv_heads or heads,
        head_dim,
        causal=causal,
        left=args.left,
        dropout=args.dropout,
    ).fill(deterministic=args.deterministic)
    functions = {}
    for name in args.names:
        if direction == "backward":  # what it reads of the forward: of the right order is enough
            problem.arrays["o"].normal_()
            problem.arrays["lse"].fill_(math.log(seq) + 0.5)
        if (call := load(args.folder, name, direction, head_dim)) is not None:
            functions[name] = lambda call=call: problem.run(call)
    if args.cudnn and not args.kv_heads and args.left < 0:
        functions["cudnn"] = cudnn(problem, direction)
    launches, times = {}, {name: [] for name in functions}
    for name, function in functions.items():
        function()
        launches[name] = max(2, min(200, round(args.burst / max(burst(function, 3), 1e-3))))
    for _ in range(args.rounds):
        for name in random.sample(list(functions), len(functions)):
            times[name].append(burst(functions[name], launches[name]))
    medians = {name: statistics.median(x) for name, x in times.items()}
    operations = 4 * TOKENS * seq * HIDDEN * (0.5 if causal else 1)
    operations *= 2.5 if direction == "backward" else 1
    texts = []
    for name, ms in medians.items():
        over = f" ({medians['cudnn'] / ms:.3f})" if "cudnn" in medians and name != "cudnn" else ""
        texts.append(f"{name} {operations / ms / 1e9:6.1f}{over} {ms * 1e3:.0f} us")
    mask = "causal" if causal else "full"
    return f"{direction:8s} H={head_dim:3d} {mask:6s} T={seq:5d} | " + "  ".join(texts)


def time_all(args) -> int:
    print("TFLOP/s (over cuDNN) and microseconds a call")
    for direction in args.directions:
        for head_dim in args.head_dims:
            for causal in (0, 1):
                for seq in args.seqs:
                    print(time_one(args, direction, head_dim, seq, causal), flush=True)
    return 0


def main(argv=None) -> int:
    def words(text):
        return text.split(",")

    def numbers(text):
        return [int(word) for word in text.split(",")]

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--folder", type=pathlib.Path, default=evidence.ROOT / "build" / "variants")
    shared.add_argument("--directions", type=words, default=["forward", "backward"])
    shared.add_argument("--head-dims", type=numbers, default=[64, 128, 256])
    commands = parser.add_subparsers(dest="command", required=True)
    builds = commands.add_parser("build", parents=[shared])
    builds.add_argument("--name", required=True)
    builds.add_argument("--csrc", type=pathlib.Path, default=evidence.ROOT / "csrc")
    builds.add_argument("--no-fp16", dest="fp16", action="store_false")
    builds.add_argument("--option", action="append", default=[], help="of nvcc: --option=-DX=1")
    for name in ("check", "time"):
        runs = commands.add_parser(name, parents=[shared])
        runs.add_argument("--names", type=words, required=True)
    runs.add_argument("--seqs", type=numbers, default=[512, 1024, 2048, 4096, 8192, 16384])
    runs.add_argument("--kv-heads", type=int, default=0, help="default: as many as query heads")
    runs.add_argument("--left", type=int, default=-1, help="keys before a query; default: all")
    runs.add_argument("--dropout", type=float, default=0.0, help="the variants', not cuDNN's")
    runs.add_argument("--deterministic", action="store_true")
    runs.add_argument("--no-cudnn", dest="cudnn", action="store_false")
    runs.add_argument("--rounds", type=int, default=5)
    runs.add_argument("--burst", type=float, default=8.0, help="milliseconds")
    args = parser.parse_args(argv)
    if args.command == "check":
        return check(args)
    if args.command == "time":
        return time_all(args)
    for direction in args.directions:
        for head_dim in args.head_dims:
            said = build(
                args.folder, args.name, args.csrc, direction, head_dim, args.fp16, args.option
            )
            print(f"{args.name} {direction} {head_dim}: {said or 'no spills'}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
