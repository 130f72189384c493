"""Runs that are killed at random moments, in every stage, end with the weights of a run that was not, bit for bit."""

import json
import os
import random
import subprocess
import sys
import time

import pytest
from conftest import ROOT

SHORT = [
    "--max_steps",
    "12",
    "--batch_size",
    "8",
    "--save_every",
    "3",
    "--log_every",
    "1",
    "--eval_every",
    "6",
]
SHORT += ["--eval_prompts", "16", "--sample_batch_size", "16", "--max_response_tokens", "32"]
FLAGS = {  # what else makes a run of each script short, and makes it pass through all of its stages several times
    "adpa": [],
    "dckd": [],
    "dpkd": ["--refresh_every", "5"],
    "pad": [],
    "rm_distiller": [],
}
SCRIPTS = [name for name in FLAGS if (ROOT / f"{name}.py").exists()]


def start(script: str, *flags) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = [sys.executable, f"{script}.py", *map(str, flags)]
    return subprocess.Popen(
        words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process: subprocess.Popen):
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, (out, err[-2000:])


def outcome(run) -> tuple:
    """What must not depend on interruptions: weights, losses and rewards (time and memory do)."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    keys = ("step", "losses/", "eval/", "charts/learning_rate", "charts/grad_norm")
    rows = [{key: value for key, value in row.items() if key.startswith(keys)} for row in rows]
    return (run / "model" / "model.safetensors").read_bytes(), rows


def again(run, flags: list) -> list:
    """The flags that go on with a run, or begin it if it was killed before it wrote anything."""
    return ["--resume", run] if (run / "args.json").exists() else [*flags, "--output_dir", run]


def kill_often(script: str, kills: int, tmp_path, seed: int):
    data = tmp_path / "data.jsonl"
    lines = (ROOT / "playground/data/train.jsonl").read_text().splitlines(keepends=True)
    data.write_text("".join(lines[:96]))
    flags = ["--data", data, *SHORT, *FLAGS[script]]
    began = time.time()
    finish(start(script, *flags, "--output_dir", tmp_path / "whole"))
    whole, run, rng, states = time.time() - began, tmp_path / "killed", random.Random(seed), []
    for _ in range(kills):
        process = start(script, *again(run, flags))
        try:
            process.wait(rng.uniform(0.3, 1.0) * whole)
            assert process.returncode == 0, process.communicate()[1][
                -2000:
            ]  # it was faster than the kill
        except subprocess.TimeoutExpired:
            process.kill()
        process.communicate()
        states.append(sorted(path.name for path in run.iterdir()) if run.exists() else [])
    finish(start(script, *again(run, flags)))
    assert outcome(run)[1] == outcome(tmp_path / "whole")[1], states
    assert outcome(run)[0] == outcome(tmp_path / "whole")[0], states


@pytest.mark.parametrize("script", SCRIPTS)
def test_r36_two_kills(script, tmp_path):
    kill_often(script, 2, tmp_path, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_r36_twenty_kills(script, tmp_path):
    for round in range(5):
        (tmp_path / str(round)).mkdir()
        kill_often(script, 4, tmp_path / str(round), seed=10 + round)
