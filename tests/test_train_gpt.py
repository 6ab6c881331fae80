"""examples/train_gpt.py, from the command line to its files, on a model of 4 thousand weights."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("flax")
pytest.importorskip("optax")
pytest.importorskip("orbax.checkpoint")
pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import gpt
import jax
import jax.numpy as jnp
import train_gpt

SCRIPT = train_gpt.__file__
SHAPE = "--layers 1 --width 16 --heads 2 --context 16 --batch 4 --dtype float32".split()
RUN = [*SHAPE, *"--learning-rate 0.02 --eval-every 4 --checkpoint-every 5 --seed 3".split()]
RUN += ["--dropout", "0.1", "--attention-dropout", "0.1", "--sample-bytes", "20", "--prompt", "ab "]
STEPS = ["--steps", "8"]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_bytes(b"ab cd ef gh \n" * 200)
    return path


@pytest.fixture(scope="module")
def finished(text, tmp_path_factory):
    """The directory of a run of eight steps."""
    directory = tmp_path_factory.mktemp("runs") / "finished"
    train_gpt.main([*RUN, *STEPS, "--text", str(text), "--out", str(directory)])
    return directory


def losses(directory):
    return (directory / "losses.csv").read_text().splitlines()


def checkpoint_steps(directory):
    return sorted(int(path.name) for path in (directory / "checkpoints").iterdir())


def test_a_run_leaves_its_files(finished, text):
    training, validation = train_gpt.read_losses(finished / "losses.csv")
    assert training[:, 0].tolist() == list(range(1, 9))
    assert validation[:, 0].tolist() == [4, 8]
    assert 5.3 < training[0, 1] < 5.8  # log(256) = 5.55
    assert training[-1, 1] < training[0, 1] - 0.3
    assert validation[1, 1] < validation[0, 1]
    assert checkpoint_steps(finished) == [5, 8]
    assert (finished / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (finished / "loss.png").stat().st_size > 5000
    assert (finished / "sample.txt").read_text().startswith("ab ")
    config = json.loads((finished / "config.json").read_text())
    assert config["width"] == 16 and config["text"] == str(text)


def test_interrupted_and_resumed_run_follows_the_same_losses(
    finished, text, tmp_path, monkeypatch, capsys
):
    original = train_gpt.batch_at

    def interrupted(step, *rest):
        if step == 2:
            signal.raise_signal(signal.SIGINT)
        return original(step, *rest)

    monkeypatch.setattr(train_gpt, "batch_at", interrupted)
    with pytest.raises(SystemExit, match=r"stopped after step 3; go on with --resume"):
        train_gpt.main([*RUN, *STEPS, "--text", str(text), "--out", str(tmp_path / "run")])
    assert signal.getsignal(signal.SIGINT) is not interrupted
    monkeypatch.undo()
    assert len(losses(tmp_path / "run")) == 1 + 3
    train_gpt.main(["--resume", str(tmp_path / "run")])
    assert "from step 3" in capsys.readouterr().out
    assert losses(tmp_path / "run") == losses(finished)
    assert (tmp_path / "run/sample.txt").read_text() == (finished / "sample.txt").read_text()


def test_killed_run_goes_on_from_its_last_checkpoint(finished, tmp_path, capsys):
    run = shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(run / "checkpoints/8")  # as if killed after step 5 was saved
    train_gpt.main(["--resume", str(run)])
    assert "from step 5" in capsys.readouterr().out
    assert losses(run) == losses(finished)


def test_xla_attention_follows_the_same_losses(finished, text, tmp_path):
    options = [*RUN, "--attention-dropout", "0", "--steps", "4", "--text", str(text)]
    for attention in ("flash", "xla"):
        train_gpt.main([*options, "--attention", attention, "--out", str(tmp_path / attention)])
    flash, xla = (train_gpt.read_losses(tmp_path / a / "losses.csv")[0] for a in ("flash", "xla"))
    np.testing.assert_allclose(flash, xla, rtol=1e-4)


def test_fused_layers_learn_the_same_text(finished, text, tmp_path, capsys):
    """Another model, as good: it is resumed, sampled from, and its losses fall alike."""
    options = ["--text", str(text), "--out", str(tmp_path / "run"), "--fused"]
    train_gpt.main([*RUN, "--steps", "5", *options])
    train_gpt.main(["--resume", str(tmp_path / "run"), "--steps", "8"])
    assert "fused layers" in capsys.readouterr().out
    fused, plain = (
        train_gpt.read_losses(path / "losses.csv")[0] for path in (tmp_path / "run", finished)
    )
    assert len(fused) == 8
    assert abs(fused[0, 1] - plain[0, 1]) < 0.1
    assert abs(fused[-1, 1] - plain[-1, 1]) < 0.5 and fused[-1, 1] < fused[0, 1] - 0.3


@pytest.mark.parametrize("fused", [False, True])
def test_labels_give_the_mean_of_the_logits_losses(fused):
    config = gpt.Config(layers=2, width=16, heads=2, context=8, fused=fused)
    model, tokens = gpt.GPT(config), jnp.arange(24).reshape(3, 8) * 7 % 256
    params = model.init(jax.random.key(0), tokens)
    labels = jnp.roll(tokens, 1)
    logits = jax.nn.log_softmax(model.apply(params, tokens))
    want = -jnp.take_along_axis(logits, labels[..., None], -1).mean()
    np.testing.assert_allclose(model.apply(params, tokens, labels=labels), want, rtol=1e-5)


def test_compare_fused_with_plain(text, capsys):
    train_gpt.main([*SHAPE, "--text", str(text), "--fused", "--compare", "32"])
    assert "fused" in capsys.readouterr().out.splitlines()[1]


def test_compare_prints_a_table(text, capsys):
    train_gpt.main([*SHAPE, "--text", str(text), "--compare", "32"])
    lines = capsys.readouterr().out.splitlines()
    assert "context" in lines[1] and "flash" in lines[1] and "xla" in lines[1]
    rows = [line.split() for line in lines[2:]]
    assert [row[:2] for row in rows] == [["32", "2"]]  # as many bytes as 4 of 16
    for row in rows:
        flash, xla, ratio = float(row[2]), float(row[4]), float(row[6].rstrip("x"))
        assert flash > 0 and xla > 0
        # Times are printed to 0.1 ms, the ratio to 0.01.
        assert abs(ratio - xla / flash) < 0.01 + 0.1 * (xla + flash) / flash**2


@pytest.mark.parametrize(
    "options, message",
    [
        (["--width", "15"], "--width: 15 is not a multiple of --heads 2"),
        (["--steps", "0"], "--steps: expected a positive number, got 0"),
        (["--steps", "many"], "--steps: invalid positive value: 'many'"),
        (["--dropout", "1"], "--dropout: expected a number in [0, 1), got 1.0"),
        (["--learning-rate", "nan"], "--learning-rate: expected a positive number, got nan"),
        (["--attention", "xla", "--attention-dropout", "0.1"], "has none; use flash"),
        (["--attention", "cudnn"], "--attention: invalid choice"),
        (["--fused", "--attention", "xla"], "--fused: its attention is flash"),
        (["--fused", "--heads", "16"], "--fused: 1 features of a head"),
        (["--text", "no/such/file"], "--text: no such file"),
        (["--context", "3000"], "--text: 2600 bytes are too few"),
        (["--prompt", ""], "--prompt: expected at least one character"),
        (["--resume", "no/such/run"], "--resume: no run in no/such/run"),
        (["--out", "a", "--resume", "b"], "not allowed with argument"),
        (["--seed", "-1"], "--seed: expected a number from 0, got -1"),
        (["--unknown"], "unrecognized arguments: --unknown"),
    ],
)
def test_bad_arguments_are_refused(options, message, text, capsys):
    with pytest.raises(SystemExit) as exit:
        train_gpt.main([*SHAPE, "--text", str(text), *options])
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


def test_a_run_is_not_overwritten_nor_resumed_as_another(finished, text, tmp_path, capsys):
    with pytest.raises(SystemExit):
        train_gpt.main([*SHAPE, "--text", str(text), "--out", str(finished)])
    assert "holds a run already" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train_gpt.main(["--resume", str(finished), "--width", "32"])
    assert "--width: 32 is not the 16 of the run" in capsys.readouterr().err
    other = tmp_path / "other.txt"
    other.write_bytes(b"another text\n" * 200)
    config = json.loads((finished / "config.json").read_text())
    changed = tmp_path / "run"
    changed.mkdir()
    (changed / "config.json").write_text(json.dumps(config | {"text": str(other)}))
    with pytest.raises(SystemExit, match="the text is not the one"):
        train_gpt.main(["--resume", str(changed)])
    (changed / "config.json").write_text("{")
    with pytest.raises(SystemExit):
        train_gpt.main(["--resume", str(changed)])
    assert "config.json is damaged" in capsys.readouterr().err


def test_help_and_missing_packages():
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run(
        [sys.executable, SCRIPT, "--help"], capture_output=True, text=True, env=environment
    )
    assert result.returncode == 0
    for option in ("--text", "--resume", "--compare", "--attention", "--seed"):
        assert option in result.stdout
    code = "import runpy, sys; sys.modules['optax'] = None; sys.argv = ['train_gpt.py']; "
    result = subprocess.run(
        [sys.executable, "-c", code + f"runpy.run_path({SCRIPT!r})"],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert result.returncode == 1
    assert 'pip install "jax-flash[examples]"' in result.stderr


# ---- pieces


def test_default_text_is_english():
    text = train_gpt.read_text(None)
    assert text.dtype == np.uint8 and len(text) > 300_000
    assert bytes(text).count(b" the ") > 2000


def test_batches_depend_on_seed_and_step_alone():
    text = np.arange(256, dtype=np.uint8)
    first = train_gpt.batch_at(5, text, 4, 10, seed=1)
    assert first.shape == (4, 11)
    np.testing.assert_array_equal(first, train_gpt.batch_at(5, text, 4, 10, seed=1))
    assert not np.array_equal(first, train_gpt.batch_at(6, text, 4, 10, seed=1))
    assert not np.array_equal(first, train_gpt.batch_at(5, text, 4, 10, seed=2))
    assert (np.diff(first.astype(int), axis=1) == 1).all()
    # Every byte of the text can be learnt, and nothing beyond its end is read.
    seen = np.concatenate([train_gpt.batch_at(i, text[:12], 4, 10, 0).ravel() for i in range(50)])
    assert set(seen) == set(range(12))


def test_held_out_text_is_apart():
    text = np.arange(200, dtype=np.uint8)
    train, held_out = train_gpt.split_text(text, 0.1, 10)
    assert len(held_out) == 20 and train[-1] + 1 == held_out[0]
    batches = train_gpt.validation_batches(held_out, 4, 10)
    assert sum(len(batch) for batch in batches) == 1  # no byte twice
    _, short = train_gpt.split_text(text, 0.0, 10)
    assert len(short) == 11
    many = train_gpt.validation_batches(text, 2, 10)
    assert [batch.shape for batch in many] == [(2, 11)] * 8


def test_generate_continues_beyond_the_context():
    config = gpt.Config(layers=1, width=16, heads=2, context=8)
    model = gpt.GPT(config)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]
    apply = jax.jit(model.apply)
    for prompt in (jnp.array([65]), jnp.arange(20)):
        tokens = gpt.generate(model, params, prompt, 12, jax.random.key(1), 1e-4)
        # At temperature 0 each byte is the likeliest one after the window before it.
        text = prompt.tolist()
        for token in tokens.tolist():
            window = text[-config.context :]
            padded = np.pad(window, (0, config.context - len(window)))
            logits = apply({"params": params}, padded[None])[0, len(window) - 1]
            assert logits[token] > logits.max() - 1e-3
            text.append(token)
