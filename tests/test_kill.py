"""Runs that are killed at random moments, in every stage, end with the weights of a run that was
not, bit for bit."""

import random
import time
from pathlib import Path

import pytest
from conftest import SCRIPTS, ScriptProcess, first_rows, read_jsonl

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


def finish(script: str, flags: dict) -> float:
    """Runs a script to its end. Returns the seconds that it took."""
    process = ScriptProcess(script, flags)
    started = time.time()
    assert process.wait(300) == 0, process.output()[-2000:]
    return time.time() - started


def kill_after(seconds: float, script: str, flags: dict) -> bool:
    """Starts a script and kills it. False if it had come to its end by then."""
    process = ScriptProcess(script, flags)
    if process.wait(seconds) is None:
        process.kill()
        return True
    assert process.wait(0) == 0, process.output()[-2000:]
    return False


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

    seconds = finish(script, {**flags, "output_dir": whole})
    for _ in range(kills):
        moment = moments.uniform(0.1, 0.5) * seconds
        if kill_after(moment, script, flags_to_go_on(killed, flags)):
            seen.append(sorted(path.name for path in killed.glob("*")))
    assert seen, "the run came to its end before every kill"
    finish(script, flags_to_go_on(killed, flags))

    assert metrics_without_clock(killed) == metrics_without_clock(whole), seen
    weights = [(run / "model/model.safetensors").read_bytes() for run in (killed, whole)]
    assert weights[0] == weights[1], seen


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_r36_twenty_kills(script, tmp_path):
    for number in range(5):
        folder = tmp_path / str(number)
        folder.mkdir()
        kill_often(script, 4, folder, seed=10 + number)
