"""Seconds of a whole run of every script without flags, imports included, stage by stage.

A stage ends when its file in the run folder is complete, so nothing is added to the scripts to time them.

    python -m benchmarks.whole             # the table of the README: some minutes on two CPU cores
    python -m benchmarks.whole --quick     # one script, a few steps; the README stays as it is
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


@dataclass
class Args:
    quick: bool = False
    """adpa.py alone with a few steps, runs/benchmarks.json"""
    repeats: int = 1
    """runs of every script, of which the medians count"""
    only: str = ""
    """name of one script, if not all"""
    output: str = RESULTS
    """where results go; the README is filled from its own file alone"""


def run(script: str, folder: Path, flags: list[str]) -> dict[str, float]:
    """Seconds of every stage of one run."""
    started = time.time()
    command = [sys.executable, f"{script}.py", "--output_dir", str(folder), *flags]
    subprocess.run(
        command, cwd=HERE.parent, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    ended = {"imports": folder / "args.json", "training": folder / "checkpoint.pt"}
    ended |= {
        path.stem: path
        for path in folder.glob("*.jsonl")
        if path.stem not in ("metrics", "samples", "eval_after")
    }
    times, stages, last = {name: path.stat().st_mtime for name, path in ended.items()}, {}, started
    for name, end in sorted(times.items(), key=lambda item: item[1]):
        stages[name], last = end - last, end
    return {**stages, "evaluation, saving": time.time() - last, "all": time.time() - started}


def main(args: Args) -> dict:
    scripts = ["adpa"] if args.quick else [args.only] if args.only else list(LIMITS)
    flags, result = [], {"machine": machine(torch.device("cpu")), "scripts": {}}
    if args.quick:
        flags = ["--max_steps", "2", "--eval_prompts", "4"]
        args.output = QUICK if args.output == RESULTS else args.output
    for script in scripts:
        with tempfile.TemporaryDirectory() as folder:
            runs = [run(script, Path(folder) / str(i), flags) for i in range(args.repeats)]
        result["scripts"][script] = {name: [one[name] for one in runs] for name in runs[0]}
    record(Path(args.output), "whole", result, {"whole": table(result)})
    return result


def table(result: dict) -> str:
    rows = []
    for script, stages in result["scripts"].items():
        middle = {name: statistics.median(seconds) for name, seconds in stages.items()}
        shown = ", ".join(f"{name} {value:.1f}" for name, value in middle.items() if name != "all")
        rows.append([f"{script}.py", f"{middle['all']:.1f}", LIMITS[script], shown])
    return markdown(["", "seconds", "limit", "of which"], rows)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
