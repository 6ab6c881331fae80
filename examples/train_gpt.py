"""Trains a byte-level GPT on real text with jax_flash's attention.

    python examples/train_gpt.py                        # the Python documentation, minutes on a CPU
    python examples/train_gpt.py --text book.txt --out runs/book
    python examples/train_gpt.py --resume runs/book     # go on from the last checkpoint
    python examples/train_gpt.py --compare              # time a step against plain XLA attention
    python examples/train_gpt.py --fused                # made of jax_flash's fused layers

The run's directory receives config.json, losses.csv, loss.png, sample.txt and checkpoints/. The
batch of step i depends on the seed and i alone, so that a resumed run follows the same losses as an
uninterrupted one. The model is in gpt.py.
"""

import argparse
import csv
import dataclasses
import functools
import hashlib
import json
import logging
import math
import signal
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

try:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import optax
    import orbax.checkpoint as ocp
    from gpt import GPT, Config, generate
    from tqdm import tqdm
except ImportError as error:
    sys.exit(f'train_gpt.py: {error}; it needs pip install "jax-flash[examples]"')

import jax_flash

# What a run is unless told otherwise, by platform. On two CPU cores: under four minutes.
DEFAULTS = {
    "cpu": dict(layers=2, width=192, heads=6, context=256, batch=8, steps=1000, dtype="float32")
    | dict(learning_rate=3e-3, dropout=0.0),
    "gpu": dict(layers=8, width=512, heads=8, context=1024, batch=32, steps=700, dtype="bfloat16")
    | dict(learning_rate=1e-3, dropout=0.2),
}
ALWAYS = dict(text=None, seed=0, attention="flash", attention_dropout=0.0, validation=0.1)
ALWAYS |= dict(fused=False)
# May change when a run is resumed: they do not touch what was learnt so far.
FREE = dict(
    steps=None,
    eval_every=None,
    checkpoint_every=None,
    prompt="The ",
    sample_bytes=400,
    temperature=0.7,
)


# ---- arguments


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {value}")
    return value


def from_zero(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"expected a number from 0, got {value}")
    return value


def fraction(text: str) -> float:
    value = float(text)
    if not 0.0 <= value < 1.0:
        raise argparse.ArgumentTypeError(f"expected a number in [0, 1), got {value}")
    return value


def positive_real(text: str) -> float:
    value = float(text)
    if not 0.0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {value}")
    return value


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--text", type=Path, help="file to learn (default: pydoc_data.topics, half a megabyte)")
    place = parser.add_mutually_exclusive_group()
    place.add_argument("--out", type=Path, help="directory of a new run (default: runs/<time>)")
    place.add_argument(
        "--resume", type=Path, metavar="RUN", help="directory of a run to go on with"
    )
    place.add_argument(
        "--compare",
        type=positive,
        nargs="*",
        metavar="T",
        help="time a training step with flash and with xla attention at these context lengths "
        "(default: 1 and 4 times the context), and stop",
    )
    add("--attention", choices=("flash", "xla"), help="xla: jax.nn.dot_product_attention")
    add(
        "--fused",
        action="store_const",
        const=True,
        help="a model of jax_flash's fused layers: TransformerBlock, rotary, RMS norm, linear "
        "cross-entropy; with --compare: against the plain model",
    )
    add("--steps", type=positive, help="training steps in all")
    add("--batch", type=positive, help="sequences in a step")
    add("--context", type=positive, help="bytes in a sequence")
    add("--layers", type=positive)
    add("--width", type=positive, help="features of a token")
    add("--heads", type=positive, help="attention heads; divides the width")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="of the computation")
    add("--learning-rate", type=positive_real, help="at its highest")
    add("--dropout", type=fraction, help="of embeddings and branches")
    add("--attention-dropout", type=fraction, help="of attention weights; flash only (default: 0)")
    add("--validation", type=fraction, help="part of the text held out (default: 0.1)")
    add("--seed", type=from_zero, help="of everything random (default: 0)")
    add("--eval-every", type=positive, metavar="STEPS", help="default: a tenth of the steps")
    add(
        "--checkpoint-every", type=positive, metavar="STEPS", help="default: a quarter of the steps"
    )
    add("--prompt", help='start of the sample (default: "The ")')
    add("--sample-bytes", type=positive, help="length of the sample (default: 400)")
    add("--temperature", type=positive_real, help="of the sample (default: 0.7)")
    shapes = (f"{name}: {json.dumps(values)[1:-1]}" for name, values in DEFAULTS.items())
    parser.epilog = "defaults by platform:\n  " + "\n  ".join(shapes).replace('"', "")
    return parser


def read_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Fills in the defaults, or a resumed run's own choices; exits with a clear text on errors."""
    parser = make_parser()
    args = parser.parse_args(argv)
    platform = "cpu" if jax.default_backend() == "cpu" else "gpu"
    defaults = FREE | ALWAYS | DEFAULTS[platform]
    if args.resume is not None:
        path = args.resume / "config.json"
        if not path.is_file():
            parser.error(f"--resume: no run in {args.resume} (there is no {path})")
        try:
            saved = json.loads(path.read_text())
        except ValueError as error:
            parser.error(f"--resume: {path} is damaged: {error}")
        for name in saved:
            given = getattr(args, name, None)
            given = str(given.resolve()) if isinstance(given, Path) else given
            if name not in FREE and given is not None and given != saved[name]:
                option = "--" + name.replace("_", "-")
                parser.error(
                    f"{option}: {given} is not the {saved[name]} of the run in {args.resume}; "
                    "leave it out to go on, or start a new run"
                )
        defaults |= saved
    for name, value in defaults.items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    args.eval_every = args.eval_every or max(1, args.steps // 10)
    args.checkpoint_every = args.checkpoint_every or max(1, args.steps // 4)
    args.text = Path(args.text).resolve() if args.text is not None else None

    if args.width % args.heads != 0:
        parser.error(f"--width: {args.width} is not a multiple of --heads {args.heads}")
    if args.fused and args.attention == "xla":
        parser.error("--fused: its attention is flash")
    if args.fused and args.width // args.heads % 2 != 0:
        parser.error(
            f"--fused: {args.width // args.heads} features of a head, expected an even number"
        )
    if args.attention == "xla" and args.attention_dropout > 0.0:
        parser.error("--attention-dropout: jax.nn.dot_product_attention has none; use flash")
    if not args.prompt:
        parser.error("--prompt: expected at least one character")
    if args.text is not None and not args.text.is_file():
        parser.error(f"--text: no such file: {args.text}")
    if args.out is not None and (args.out / "config.json").exists():
        parser.error(f"--out: {args.out} holds a run already; --resume {args.out} goes on with it")
    try:
        args.train, args.held_out = split_text(read_text(args.text), args.validation, args.context)
    except ValueError as error:
        parser.error(str(error))
    return args


# ---- data


def read_text(path: Path | None) -> np.ndarray:
    """The bytes of a file, or of the Python language reference that comes with every Python."""
    if path is not None:
        return np.frombuffer(path.read_bytes(), np.uint8)
    from pydoc_data.topics import topics

    return np.frombuffer("\n\n".join(topics.values()).encode(), np.uint8)


def split_text(text: np.ndarray, validation: float, context: int) -> tuple[np.ndarray, np.ndarray]:
    """Splits into a beginning to learn and an end to measure on, each at least a sequence long."""
    held_out = max(math.ceil(validation * len(text)), context + 1)
    if len(text) - held_out < context + 1:
        raise ValueError(
            f"--text: {len(text)} bytes are too few for sequences of {context} + 1 bytes to learn "
            "and to measure on; give a longer text or a shorter --context"
        )
    return text[:-held_out], text[-held_out:]


def batch_at(step: int, text: np.ndarray, batch: int, context: int, seed: int) -> np.ndarray:
    """The sequences [batch, context + 1] of one step: random places of the text."""
    starts = np.random.default_rng((seed, step)).integers(0, len(text) - context, batch)
    return text[starts[:, None] + np.arange(context + 1)]


def validation_batches(text: np.ndarray, batch: int, context: int) -> list[np.ndarray]:
    """Up to 8 batches of sequences evenly spread over the held-out text."""
    count = min(8 * batch, (len(text) - 1) // context)
    starts = np.linspace(0, len(text) - context - 1, count).astype(int)
    windows = text[starts[:, None] + np.arange(context + 1)]
    return np.array_split(windows, math.ceil(count / batch))


# ---- training


@functools.cache
def make_optimizer(learning_rate: float, steps: int) -> optax.GradientTransformation:
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, learning_rate, warmup_steps=min(50, steps // 10), decay_steps=steps, end_value=0.0
    )
    decayed = functools.partial(jax.tree.map, lambda p: p.ndim > 1)
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(schedule, b2=0.99, weight_decay=0.1, mask=decayed),
    )


def loss_of(model: GPT, params: dict, tokens: jax.Array, dropout_key: jax.Array | None = None):
    """Mean cross-entropy in nats per byte of tokens [B, T + 1]; dropout where a key is given."""
    tokens = tokens.astype(jnp.int32)
    return model.apply(
        {"params": params},
        tokens[:, :-1],
        deterministic=dropout_key is None,
        labels=tokens[:, 1:],
        rngs=None if dropout_key is None else {"dropout": dropout_key},
    )


evaluate = jax.jit(loss_of, static_argnames="model")


@functools.cache  # runs of one shape in one process compile once
def make_step(model: GPT, optimizer: optax.GradientTransformation, seed: int):
    """Returns step(state, tokens) -> (state, loss), compiled; state is params, optimizer, step."""

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, tokens):
        key = jax.random.fold_in(jax.random.key(seed), state["step"])
        loss, gradients = jax.value_and_grad(loss_of, argnums=1)(
            model, state["params"], tokens, key
        )
        updates, optimizer_state = optimizer.update(gradients, state["optimizer"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        return dict(params=params, optimizer=optimizer_state, step=state["step"] + 1), loss

    return step


def init_state(model: GPT, optimizer: optax.GradientTransformation, seed: int) -> dict:
    tokens = jnp.zeros((1, model.config.context), jnp.int32)
    params = jax.jit(model.init)(jax.random.key(seed), tokens)["params"]
    return dict(params=params, optimizer=optimizer.init(params), step=jnp.zeros((), jnp.int32))


def model_of(args: argparse.Namespace, **changes) -> GPT:
    names = [field.name for field in dataclasses.fields(Config)]
    return GPT(Config(**({name: getattr(args, name) for name in names} | changes)))


class Interrupt:
    """Notes a Ctrl-C instead of raising, so that no step is cut in half; the second one raises."""

    def __enter__(self):
        self.noted = False
        self.previous = signal.signal(signal.SIGINT, self.note)
        return self

    def note(self, *unused):
        self.noted = True
        signal.signal(signal.SIGINT, self.previous)

    def __exit__(self, *unused):
        signal.signal(signal.SIGINT, self.previous)


def train(args: argparse.Namespace, directory: Path) -> dict:
    """Trains to args.steps, writing losses and checkpoints; returns the state."""
    model, optimizer = model_of(args), make_optimizer(args.learning_rate, args.steps)
    state = init_state(model, optimizer, args.seed)
    checkpoints = ocp.CheckpointManager(
        (directory / "checkpoints").resolve(), options=ocp.CheckpointManagerOptions(max_to_keep=2)
    )
    losses = directory / "losses.csv"
    start = checkpoints.latest_step() or 0
    if start > 0:
        state = checkpoints.restore(start, args=ocp.args.StandardRestore(state))
    keep_rows(losses, start)

    parameters = sum(leaf.size for leaf in jax.tree.leaves(state["params"]))
    print(
        f"{parameters / 1e6:.2f} M parameters, {args.attention} attention"
        f"{', fused layers' if args.fused else ''}, {args.dtype} on "
        f"{jax.devices()[0].device_kind}; {len(args.train):,} bytes to learn, "
        f"{len(args.held_out):,} held out; {directory}" + (f", from step {start}" if start else "")
    )
    step, tokens_per_step = make_step(model, optimizer, args.seed), args.batch * args.context
    held_out = validation_batches(args.held_out, args.batch, args.context)

    bar = tqdm(total=args.steps, initial=start, unit="step", dynamic_ncols=True)
    with bar, losses.open("a", newline="") as file, Interrupt() as interrupt:
        rows, shown, since, waiting = csv.writer(file), {}, time.perf_counter(), []

        def flush():
            """Waits for the steps under way, writes their losses and moves the bar."""
            for number, loss in waiting:
                rows.writerow([number, f"{float(loss):.6f}", ""])
                if not math.isfinite(loss):
                    sys.exit(f"the loss of step {number} is {loss}: try a smaller --learning-rate")
            if waiting:
                speed = len(waiting) * tokens_per_step / (time.perf_counter() - since)
                shown.update({"loss": f"{float(waiting[-1][1]):.3f}", "tok/s": f"{speed:,.0f}"})
                bar.set_postfix(shown, refresh=False)
                bar.update(len(waiting))
                waiting.clear()
            file.flush()

        done = start
        for index in range(start, args.steps):
            tokens = batch_at(index, args.train, args.batch, args.context, args.seed)
            state, loss = step(state, tokens)
            done = index + 1
            waiting.append((done, loss))
            is_last = done == args.steps or interrupt.noted
            evaluates = done % args.eval_every == 0 or done == args.steps
            saves = done % args.checkpoint_every == 0 or is_last
            # The first step includes the compilation: keep it out of the speed of the rest.
            if done % 10 == 0 or index == start or evaluates or saves:
                flush()
                if evaluates:
                    value = mean_loss(model, state["params"], held_out)
                    rows.writerow([done, "", f"{value:.6f}"])
                    shown["val"] = f"{value:.3f}"
                    bar.write(f"step {done:5d}  loss {shown['loss']}  validation {value:.3f}")
                if saves:
                    file.flush()
                    checkpoints.save(done, args=ocp.args.StandardSave(state))
                    checkpoints.wait_until_finished()
                since = time.perf_counter()
            if is_last:
                break
    checkpoints.close()
    if interrupt.noted and done < args.steps:
        sys.exit(f"stopped after step {done}; go on with --resume {directory}")
    return state


def mean_loss(model: GPT, params: dict, batches: list[np.ndarray]) -> float:
    losses = jax.device_get([evaluate(model, params, batch) for batch in batches])
    return float(np.average(losses, weights=[len(batch) for batch in batches]))


# ---- results


def keep_rows(path: Path, last_step: int) -> None:
    """Starts the table of losses, or cuts a resumed run's back to its checkpoint."""
    rows = []
    if path.exists():
        with path.open(newline="") as file:
            rows = [row for row in list(csv.reader(file))[1:] if int(row[0]) <= last_step]
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["step", "loss", "validation"], *rows])


def read_losses(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Returns (training, validation), each [n, 2] of step and nats per byte."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return tuple(
        np.array([(int(row["step"]), float(row[name])) for row in rows if row[name]]).reshape(-1, 2)
        for name in ("loss", "validation")
    )


def plot(directory: Path) -> None:
    training, validation = read_losses(directory / "losses.csv")
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(*training.T, color="0.75", linewidth=0.8, label="training, each step")
    width = min(25, len(training))
    smooth = np.convolve(training[:, 1], np.ones(width) / width, mode="valid")
    axes.plot(training[width - 1 :, 0], smooth, label=f"training, mean of {width}")
    axes.plot(*validation.T, marker="o", markersize=4, label="validation")
    axes.set(xlabel="step", ylabel="nats per byte", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(directory / "loss.png", dpi=150)
    plt.close(figure)


def write_sample(args: argparse.Namespace, params: dict, directory: Path) -> str:
    prompt = jnp.asarray(np.frombuffer(args.prompt.encode(), np.uint8), jnp.int32)
    tokens = generate(
        model_of(args),
        params,
        prompt,
        args.sample_bytes,
        jax.random.key(args.seed),
        args.temperature,
    )
    text = args.prompt + np.asarray(tokens, np.uint8).tobytes().decode(errors="replace")
    (directory / "sample.txt").write_text(text)
    return text


def compare(args: argparse.Namespace) -> None:
    """Prints the time of a training step with either attention, the same tokens in every row; with
    --fused, of the fused model and the plain one."""
    tokens_per_step = args.batch * args.context
    print(
        f"training steps of {args.layers} layers, width {args.width}, {args.heads} heads, ", end=""
    )
    print(f"{args.dtype} on {jax.devices()[0].device_kind}; medians")
    ours = "fused" if args.fused else "flash"
    print(f"{'context':>8} {'batch':>6}   {ours:>9} {'xla':>9} {'faster':>7}   ", end="")
    print(f"{ours + ' memory':>13} {'xla memory':>13}")
    for context in args.compare or [args.context * factor for factor in (1, 4)]:
        batch = max(1, tokens_per_step // context)
        text = np.resize(args.train, max(len(args.train), context + 2))
        runs = {}
        for attention in ("flash", "xla"):
            changes = dict(attention=attention, context=context, attention_dropout=0.0)
            changes["fused"] = args.fused and attention == "flash"
            model, optimizer = model_of(args, **changes), make_optimizer(args.learning_rate, 1000)
            state = init_state(model, optimizer, args.seed)
            tokens = batch_at(0, text, batch, context, args.seed)
            step = make_step(model, optimizer, args.seed).lower(state, tokens).compile()
            runs[attention] = dict(step=step, state=state, times=[], tokens=tokens)
        # Alternate, so that whatever else the machine does meets both.
        for _ in range(6):
            for run in runs.values():
                begin = time.perf_counter()
                run["state"], loss = run["step"](run["state"], run["tokens"])
                loss.block_until_ready()
                run["times"].append(time.perf_counter() - begin)
        flash, xla = (float(np.median(run["times"][1:])) for run in runs.values())
        memory = [run["step"].memory_analysis() for run in runs.values()]
        flash_mb, xla_mb = (f"{m.temp_size_in_bytes / 1e6:,.0f} MB" if m else "?" for m in memory)
        print(f"{context:8d} {batch:6d}   {flash * 1e3:6.1f} ms {xla * 1e3:6.1f} ms ", end="")
        print(f"{xla / flash:6.2f}x   {flash_mb:>13} {xla_mb:>13}")


def main(argv: list[str] | None = None) -> None:
    logging.getLogger("absl").setLevel(logging.ERROR)  # orbax reports every file it writes
    args = read_arguments(argv)
    if args.compare is not None:
        compare(args)
        return
    directory = args.resume or args.out or Path("runs") / time.strftime("%Y%m%d-%H%M%S")
    directory.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256(args.train.tobytes() + args.held_out.tobytes()).hexdigest()
    path = directory / "config.json"
    if args.resume is not None and json.loads(path.read_text())["text_sha256"] != digest:
        sys.exit(f"--resume: the text is not the one that the run in {directory} began with")
    names = FREE | ALWAYS | DEFAULTS["cpu"]
    config = {name: getattr(args, name) for name in names} | dict(text_sha256=digest)
    config["text"] = str(args.text) if args.text else None
    path.write_text(json.dumps(config, indent=2) + "\n")

    begin = time.perf_counter()
    if args.attention == "flash":
        jax_flash.show_backends()
    state = train(args, directory)
    plot(directory)
    text = write_sample(args, state["params"], directory)
    training, validation = read_losses(directory / "losses.csv")
    print(f"\n--- a sample\n{text}\n---")
    print(
        f"loss {training[0, 1]:.2f} -> {training[-10:, 1].mean():.2f}, validation "
        f"{validation[-1, 1]:.2f} nats per byte ({validation[-1, 1] / math.log(2):.2f} bits); "
        f"{time.perf_counter() - begin:.0f} s; see {directory}/loss.png"
    )


if __name__ == "__main__":
    main()
