"""Runs that are killed at random moments, in every stage, end with the weights of a run that was
not, bit for bit."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, SCRIPTS, command_line, first_rows, read_jsonl

SHORT = {
    "max_steps": 12,
    "batch_size": 8,
    "save_every": 3,
    "log_every": 1,
    "eval_every": 6,
    "eval_prompts": 16,
    "sample_batch_size": 16,
    "max_response_tokens": 32,
}
# A short run of DPKD would sample its data once only, and pass through this stage once.
OWN_FLAGS = {"dpkd": {"refresh_every": 5}}


def start(script: str, flags: dict) -> subprocess.Popen:
    """`python <script>.py <flags>` in the background, on one core."""
    return subprocess.Popen(
        [sys.executable, f"{script}.py", *command_line(flags)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(script: str, flags: dict):
    """Runs a script to its end."""
    process = start(script, flags)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-2000:]


def kill_after(seconds: float, script: str, flags: dict):
    """Starts a script and kills it, unless it has come to its end by then."""
    process = start(script, flags)
    try:
        _, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return
    assert process.returncode == 0, errors[-2000:]


def flags_to_go_on(run: Path, flags: dict) -> dict:
    """A run that was killed before it wrote its flags begins anew."""
    if (run / "args.json").exists():
        return {"resume": run}
    return {**flags, "output_dir": run}


def metrics_without_clock(run: Path) -> list[dict]:
    """The metrics of a run: losses, rewards, learning rates, gradient norms, counted tokens. Left
    out is what is measured with a clock: tokens per second, shares of the time."""
    clocks = ("_per_second", "_share")
    rows = []
    for row in read_jsonl(run / "metrics.jsonl"):
        rows.append({key: value for key, value in row.items() if not key.endswith(clocks)})
    return rows


def kill_often(script: str, kills: int, folder: Path, seed: int):
    """Checks that a run with so many kills ends like one without."""
    flags = {"data": first_rows("train", 96, folder), **SHORT, **OWN_FLAGS.get(script, {})}
    whole = folder / "whole"
    killed = folder / "killed"
    moments = random.Random(seed)
    seen = []  # the files of the run after every kill, for the message of a failure

    started = time.time()
    finish(script, {**flags, "output_dir": whole})
    seconds = time.time() - started
    for _ in range(kills):
        kill_after(moments.uniform(0.3, 1.0) * seconds, script, flags_to_go_on(killed, flags))
        seen.append(sorted(path.name for path in killed.glob("*")))
    finish(script, flags_to_go_on(killed, flags))

    assert metrics_without_clock(killed) == metrics_without_clock(whole), seen
    weights = [(run / "model/model.safetensors").read_bytes() for run in (killed, whole)]
    assert weights[0] == weights[1], seen


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_r36_two_kills(script, tmp_path):
    kill_often(script, 2, tmp_path, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_r36_twenty_kills(script, tmp_path):
    for number in range(5):
        folder = tmp_path / str(number)
        folder.mkdir()
        kill_often(script, 4, folder, seed=10 + number)
