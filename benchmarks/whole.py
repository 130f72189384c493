"""Seconds of a whole run of every script without flags, imports included, stage by stage.

A stage ends when its file in the run folder is complete, so nothing is added to the scripts to time
them.

    python -m benchmarks.whole             # the table of the page: some minutes on two CPU cores
    python -m benchmarks.whole --quick     # one script, a few steps; the page stays as it is
"""

import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from benchmarks.shared import HERE, QUICK, RESULTS, machine, markdown, record

LIMITS = {"dckd": 60, "adpa": 60, "pad": 60, "dpkd": 60, "rm_distiller": 90}
NO_STAGES = ("metrics", "eval_after")  # files that are written while training and after it


@dataclass
class Args:
    quick: bool = False
    """adpa.py alone with a few steps, runs/benchmarks.json"""
    repeats: int = 1
    """runs of every script, of which the medians count"""
    only: str = ""
    """name of one script, if not all"""
    output: str = RESULTS
    """where results go; the page is filled from its own file alone"""


def run(script: str, folder: Path, flags: list[str]) -> dict[str, float]:
    """Seconds of every stage of one run, and of all of it."""
    started = time.time()
    command = [sys.executable, f"{script}.py", "--output_dir", str(folder), *flags]
    subprocess.run(
        command, cwd=HERE.parent, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    finished = time.time()
    files = {"imports": folder / "args.json", "training": folder / "checkpoint.pt"}
    for path in folder.glob("*.jsonl"):
        if path.stem not in NO_STAGES:
            files[path.stem] = path
    ends = {name: path.stat().st_mtime for name, path in files.items()}

    seconds = {}
    previous_end = started
    for name in sorted(ends, key=lambda name: ends[name]):
        seconds[name] = ends[name] - previous_end
        previous_end = ends[name]
    seconds["evaluation, saving"] = finished - previous_end
    seconds["all"] = finished - started
    return seconds


def main(args: Args) -> dict:
    scripts = list(LIMITS)
    flags = []
    if args.only:
        scripts = [args.only]
    if args.quick:
        scripts = ["adpa"]
        flags = ["--max_steps", "2", "--eval_prompts", "4"]
        if args.output == RESULTS:
            args.output = QUICK
    result = {"machine": machine(torch.device("cpu")), "scripts": {}}
    for script in scripts:
        runs = []
        for number in range(args.repeats):
            with tempfile.TemporaryDirectory() as folder:
                runs.append(run(script, Path(folder) / str(number), flags))
        stages = {}
        for name in runs[0]:
            stages[name] = [seconds[name] for seconds in runs]
        result["scripts"][script] = stages
    record(Path(args.output), "whole", result, {"whole": table(result)})
    return result


def table(result: dict) -> str:
    rows = []
    for script, stages in result["scripts"].items():
        medians = {name: statistics.median(seconds) for name, seconds in stages.items()}
        total = medians.pop("all")
        parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in medians.items())
        rows.append([f"{script}.py", f"{total:.1f}", LIMITS[script], parts])
    return markdown(["", "seconds", "limit", "of which"], rows)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
