"""The same tuning for every method and baseline: `python -m studies.tune`.

    python -m studies.tune --dry_run                         # how many runs, and how long they take
    python -m studies.tune --only "^(dckd|adpa)$" --seeds 1  # two methods, one seed
    python -m studies.tune                                   # all: hours

A cell is one setting with one seed. Every method has three learning rates and, where it has a
coefficient, three values of it. The seeds are 101 to 103, which no report uses. A cell is made by
the method's own script (as in `studies.compare`), and its model is judged on 1,024 sampled
responses (`studies.measure`). A reward model is judged by its accuracy on held-out pairs.

After every cell docs/tuning.json and the tables of docs/tuning.md are written anew. A cell that
stands there is not made again, so a study that was interrupted goes on with the same command. A
cell whose loss is not finite has diverged: that is its result. The large files of a cell's run are
removed once it is judged.

`compare.best_flags(name)` returns the flags of a method's best setting.
"""

import json
import multiprocessing
import os
import re
import runpy
import shlex
import shutil
import statistics
import sys
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import tyro

from common import write_json
from studies import compare
from studies.compare import ROOT, SHORT, mean_and_error, run_folder, standard_error
from studies.table import aligned, markdown, stop

SEEDS = 3


@dataclass
class Args:
    seeds: int = SEEDS
    """every cell is made with this many seeds, from --first_seed on"""
    first_seed: int = 101
    """the first seed (those of a report must be others)"""
    output_dir: str = "runs/tune"
    """where the runs go"""
    at_once: int = 2
    """runs at a time, one CPU core each"""
    only: str = ""
    """only methods whose name matches this regular expression, and those that they start from"""
    responses: int = 1024
    """sampled responses on which a model is judged; finished cells keep theirs"""
    dry_run: bool = False
    """print how many cells there are and about how long they take, and make none"""
    write_page: bool = False
    """write the tables of docs/tuning.md from docs/tuning.json, and make no cell"""


# --------------------------------------------------------------------------------------------- grid
RATES = ["1e-3", "3e-3", "1e-2"]
# DPO and SimPO compare two responses, and break at rates at which the others learn best. They have
# the steps below, SimPO those below again.
DPO_RATES = ["3e-4", "1e-3", "3e-3"]
SIMPO_RATES = ["1e-4", "3e-4", "1e-3"]
KL_WEIGHTS = ["0.1", "0.3", "1"]
GAMMAS = ["--gamma 0.35", "--gamma 0.7", "--gamma 1.4"]
DPO_BETAS = ["--beta 0.3", "--beta 1", "--beta 3"]
# Evaluations and checkpoints during training change no model.
QUICK = " --eval_every 1000000 --save_every 1000000"
FEW_PROMPTS = " --eval_prompts 32"
ANNOTATED = "rm_distiller.py --annotations {rm_annotations}/annotations.jsonl"
SCORED = "pad.py --scores {pad_scores}/scores_1.jsonl"
BEST_AND_WORST = " --data {best_and_worst:pad_scores}"

# Stages that no setting changes are made once a seed. These runs are not judged.
SOURCES = {
    "dpkd_answers": "dpkd.py --max_steps 1" + SHORT + QUICK + FEW_PROMPTS,
    "pad_scores": "pad.py --max_steps 1" + SHORT + QUICK + FEW_PROMPTS,
    "rm_annotations": "rm_distiller.py --max_steps 1",
}


@dataclass
class Method:
    """What is tuned: a command, the flags of every value of its coefficient, and learning rates."""

    label: str
    command: str
    coefficients: list[str] = field(default_factory=lambda: [""])
    rates: list[str] = field(default_factory=lambda: RATES)
    key: str = "reward"
    """what is best where it is highest: the "reward" of responses, or the "accuracy" on pairs"""
    start: str = ""
    """the method whose best student, put in for {start}, this one trains"""


# In the order in which they are made. The methods of the papers come first, then what matters less.
METHODS = {
    "dckd": Method("DCKD", "dckd.py", [f"--kl_chosen {w} --kl_rejected {w}" for w in KL_WEIGHTS]),
    "adpa": Method("ADPA", "adpa.py", GAMMAS),
    "dpkd": Method("DPKD", "dpkd.py", ["--beta 1", "--beta 3", "--beta 7"]),
    # Answers have about seven tokens, so that these are the same three for sums.
    "dpkd_summed": Method(
        "DPKD, summed",
        "dpkd.py --no-length_normalize",
        ["--beta 0.15", "--beta 0.45", "--beta 1"],
    ),
    "vanilla_kd": Method(
        "vanilla distillation", "dckd.py --kl_rejected 0", [f"--kl_chosen {w}" for w in KL_WEIGHTS]
    ),
    "kd_data": Method("KD on the data's responses", "-m studies.baselines --loss kd"),
    "reverse_kl": Method("reverse KL", "-m studies.baselines --loss reverse_kl"),
    "gkd": Method(
        "GKD",
        "-m studies.baselines --loss gkd",
        ["--jsd_weight 0.1", "--jsd_weight 0.5", "--jsd_weight 0.9"],
    ),
    "aligndistil": Method(
        "AlignDistil, core only",
        "-m studies.baselines --loss aligndistil",
        ["--alpha 0.5", "--alpha 1", "--alpha 2"],
    ),
    "dpo_student": Method(
        "DPO on the student", "-m studies.baselines --loss dpo", DPO_BETAS, rates=DPO_RATES
    ),
    "sft": Method("SFT on chosen", "dckd.py --kl_chosen 0 --kl_rejected 0"),
    # β at today's α, then α.
    "pad_vpd": Method(
        "PAD (VPD)",
        SCORED + " --loss vpd",
        [
            "--alpha 0.9 --beta 2",
            "--alpha 0.9 --beta 5",
            "--alpha 0.9 --beta 10",
            "--alpha 0.8 --beta 10",
            "--alpha 1 --beta 10",
        ],
    ),
    # β, then γ.
    "pad_simpo": Method(
        "SimPO on best against worst",
        "-m studies.baselines --loss simpo" + BEST_AND_WORST,
        [
            "--beta 1 --simpo_gamma 1",
            "--beta 2 --simpo_gamma 1",
            "--beta 5 --simpo_gamma 1",
            "--beta 2 --simpo_gamma 0.3",
            "--beta 2 --simpo_gamma 1.6",
        ],
        rates=SIMPO_RATES,
    ),
    "pad_dpo": Method(
        "DPO on best against worst",
        "-m studies.baselines --loss dpo" + BEST_AND_WORST,
        DPO_BETAS,
        rates=DPO_RATES,
    ),
    "pad": Method(
        "PAD (PPD)",
        SCORED,
        [
            "--alpha 0.9 --beta 1",
            "--alpha 0.9 --beta 2",
            "--alpha 0.9 --beta 5",
            "--alpha 0.8 --beta 2",
            "--alpha 1 --beta 2",
        ],
    ),
    "rm": Method(
        "RM-Distiller, the full method",
        ANNOTATED,
        ["--kl_coef 0.03", "--kl_coef 0.1", "--kl_coef 0.3"],
        key="accuracy",
    ),
    # What the full reward model is compared with.
    "rm_margin_refined": Method(
        "reward model: margin loss, refined pairs",
        ANNOTATED + " --kl_coef 0",
        key="accuracy",
    ),
    "rm_bt_refined": Method(
        "reward model: Bradley-Terry, refined pairs",
        ANNOTATED + " --no-margin --kl_coef 0",
        key="accuracy",
    ),
    "rm_margin_plain": Method(
        "reward model: margin loss, plain labels",
        ANNOTATED + " --no-refine --kl_coef 0",
        key="accuracy",
    ),
    "rm_bt_plain": Method(
        "reward model: Bradley-Terry, plain labels",
        ANNOTATED + " --no-refine --no-margin --kl_coef 0",
        key="accuracy",
    ),
    "seqkd": Method(
        "SeqKD",
        "dckd.py --data {teacher_answers:dpkd_answers} --kl_chosen 0 --kl_rejected 0",
    ),
    "kd": Method(
        "SeqKD and forward KL",
        "dckd.py --data {teacher_answers:dpkd_answers} --kl_rejected 0",
        ["--kl_chosen 0.3", "--kl_chosen 1", "--kl_chosen 3"],
    ),
    "adpa_no_reference": Method("ADPA without reference", "adpa.py --teacher_ref none", GAMMAS),
    "dpo_large": Method(
        "DPO on teacher_ref",
        "-m studies.baselines --loss dpo --student playground/teacher_ref",
        DPO_BETAS,
        rates=DPO_RATES,
    ),
    "adpa_plus": Method("ADPA+", "adpa.py --student {start}/model", GAMMAS, start="dckd"),
}
# Their students are started from.
STARTS = {method.start for method in METHODS.values() if method.start}


@dataclass(frozen=True)
class Setting:
    """A method with a value of its coefficient and a learning rate."""

    method: str
    coefficient: str
    rate: str

    def flags(self) -> str:
        return f"{self.coefficient} --learning_rate {self.rate}".strip()

    def name(self) -> str:
        """Of its runs. Example: dckd-kl_chosen-1-kl_rejected-1-3e-3."""
        words = self.coefficient.replace("--", "").split()
        return "-".join([self.method, *words, self.rate])


def settings(name: str) -> list[Setting]:
    """All settings of a method."""
    method = METHODS[name]
    return [Setting(name, flags, rate) for flags in method.coefficients for rate in method.rates]


# The finished cells of every setting by seed: {setting: {seed: cell}}.
Cells = dict[Setting, dict[int, dict]]


def command_of(setting: Setting, cells: Cells) -> str:
    """The command of a setting, as those of `compare.RUNS`. Where it starts from the best student
    of another method, that one is among the cells."""
    method = METHODS[setting.method]
    command = method.command
    if method.start:
        start = best_setting(cells, method.start)
        if start is None:
            raise SystemExit(
                f"{setting.method} starts from the best of {method.start}: none is known"
            )
        command = command.replace("{start}", f"{{{start.name()}}}")
    command += f" {setting.flags()}{QUICK}"
    return command if method.key == "accuracy" else command + FEW_PROMPTS + SHORT


# ------------------------------------------------------------------------------------------ results
def read_cells(path: Path) -> Cells:
    """The cells of docs/tuning.json, which need not be there yet."""
    cells = {setting: {} for name in METHODS for setting in settings(name)}
    if path.exists():
        for cell in json.loads(path.read_text())["cells"]:
            setting = Setting(cell["method"], cell["coefficient"], cell["learning_rate"])
            cells.setdefault(setting, {})[cell["seed"]] = cell
    return cells


def write_results(cells: Cells, root: Path):
    """Writes docs/tuning.json, wholly or not at all, and the tables of docs/tuning.md."""
    # Another thread may be adding a cell. A copy is made at once.
    cells = {setting: dict(by_seed) for setting, by_seed in cells.items()}
    flat = []
    for by_seed in cells.values():
        flat += by_seed.values()
    path = root / "docs/tuning.json"
    write_json(path, {"best": best_of_all(cells), "cells": flat})
    compare.replace_block(root / "docs/tuning.md", "tuning", report(cells))


def shared_seeds(cells: Cells, name: str) -> list[int]:
    """The seeds with which all settings of a method are finished. Only these choose the best: a
    setting must not win because its seeds were others."""
    seeds = [set(cells[setting]) for setting in settings(name)]
    return sorted(set.intersection(*seeds))


def values(cells: Cells, setting: Setting, seeds: list[int]) -> list[float]:
    """What a setting reached with every seed with which it did not diverge."""
    reached = []
    for seed in seeds:
        if "diverged" not in cells[setting][seed]:
            reached.append(cells[setting][seed][METHODS[setting.method].key])
    return reached


def best_setting(cells: Cells, name: str) -> Setting | None:
    """The setting with the highest mean over the seeds that all settings of the method have, none
    of which diverged. None if there is no such seed or no such setting."""
    seeds = shared_seeds(cells, name)
    means = {}
    for setting in settings(name):
        reached = values(cells, setting, seeds)
        if seeds and len(reached) == len(seeds):
            means[setting] = statistics.mean(reached)
    return max(means, key=means.get) if means else None


def best_of_all(cells: Cells) -> dict[str, dict]:
    """{method: its best flags, and what they reached}."""
    best = {}
    for name, method in METHODS.items():
        setting = best_setting(cells, name)
        if setting is None:
            continue
        seeds = shared_seeds(cells, name)
        reached = values(cells, setting, seeds)
        best[name] = {
            "flags": setting.flags(),
            "coefficient": setting.coefficient,
            "learning_rate": setting.rate,
            method.key: statistics.mean(reached),
            "standard_error": standard_error(reached),
            "seeds": seeds,
        }
    return best


# ------------------------------------------------------------------------------------------- report
def report(cells: Cells) -> str:
    """All tables: a row a method and coefficient, a column a learning rate."""
    finished = []
    count = 0
    for name in METHODS:
        for setting in settings(name):
            finished += cells[setting].values()
            count += SEEDS
    if not finished:
        return "No cell has been made yet."
    text = [progress(finished, count)]
    for rates in different_rates():
        lines = []
        for name, method in METHODS.items():
            if method.rates == rates and any(cells[setting] for setting in settings(name)):
                lines += method_lines(cells, name)
        if lines:
            text.append(markdown(["method", "coefficient", *rates], lines))
    lines = best_lines(cells)
    if lines:
        header = ["method", "best setting", "reached", "at an edge of the grid"]
        text.append("The best setting of each:\n\n" + markdown(header, lines))
    return "\n\n".join(text)


def progress(finished: list[dict], count: int) -> str:
    """How many cells are finished, with what, and whether some are missing."""
    seeds = sorted({str(cell["seed"]) for cell in finished})
    libraries = set()
    for cell in finished:
        if "torch" in cell:
            libraries.add(f"torch {cell['torch']}, transformers {cell['transformers']}")
    text = f"{len(finished)} cells, seeds {', '.join(seeds)}; {' or '.join(sorted(libraries))}."
    if len(finished) < count:
        return f"**Incomplete**: {len(finished)} of {count} cells are finished. {text}"
    return text


def different_rates() -> list[list[str]]:
    """The ladders of learning rates, each once."""
    ladders = []
    for method in METHODS.values():
        if method.rates not in ladders:
            ladders.append(method.rates)
    return ladders


def method_lines(cells: Cells, name: str) -> list[list[str]]:
    """A line for every value of a method's coefficient, the best setting in bold."""
    best = best_setting(cells, name)
    lines = []
    for coefficient in METHODS[name].coefficients:
        line = [METHODS[name].label, f"`{coefficient}`" if coefficient else ""]
        for rate in METHODS[name].rates:
            setting = Setting(name, coefficient, rate)
            text = cell_text(cells, setting)
            line.append(f"**{text}**" if setting == best else text)
        lines.append(line)
    return lines


def cell_text(cells: Cells, setting: Setting) -> str:
    """Mean ± standard error over the seeds that did not diverge, how many did, and how many seeds
    there are if some are missing."""
    seeds = list(cells[setting])
    if not seeds:
        return "–"
    parts = []
    reached = values(cells, setting, seeds)
    if reached:
        parts.append(mean_and_error(reached))
    if len(reached) < len(seeds):
        parts.append(f"diverged: {len(seeds) - len(reached)} of {len(seeds)}")
    if len(seeds) < SEEDS:
        parts.append(f"(seeds: {len(seeds)})")
    return " ".join(parts)


def best_lines(cells: Cells) -> list[list[str]]:
    """A line for every method. At an edge, what is best of all may lie outside of the grid."""
    lines = []
    for name, best in best_of_all(cells).items():
        method = METHODS[name]
        reached = f"{best[method.key]:.3f}"
        if len(best["seeds"]) > 1:
            reached += f" ± {best['standard_error']:.3f}"
        if method.key == "accuracy":
            reached += " of pairs"
        edges = []
        if best["learning_rate"] in (method.rates[0], method.rates[-1]):
            edges.append("learning rate")
        if is_edge(best["coefficient"], method.coefficients):
            edges.append("coefficient")
        lines.append([method.label, f"`{best['flags']}`", reached, ", ".join(edges)])
    return lines


def is_edge(coefficient: str, coefficients: list[str]) -> bool:
    """Whether one of the flags has the lowest or the highest of the values that are tried."""
    words = coefficient.split()
    for flag, value in zip(words[::2], words[1::2]):
        tried = set()
        for other in coefficients:
            others = other.split()
            tried.add(float(others[others.index(flag) + 1]))
        if len(tried) > 1 and float(value) in (min(tried), max(tried)):
            return True
    return False


# ---------------------------------------------------------------------------------------- execution
NOT_FINITE = re.compile(r"error: (loss \S+, gradient norm \S+ in step \d+)")
# What remains of a judged cell's run, by which it would be found finished.
KEPT = ["args.json", "summary.json", "metrics.jsonl", "timings.json", "measured.json"]
# A server that has imported the libraries once. Runs are forked from it, which saves each of them,
# and each measurement, the four seconds that its imports would take.
FORK_SERVER = multiprocessing.get_context("forkserver")
FORK_SERVER.set_forkserver_preload(
    ["datasets", "torch", "transformers.models.llama.modeling_llama", "tyro"]
)


def run_forked(command: str, log: Path):
    """Runs a command like `compare.run_process`, in a process of its own, but without imports."""
    process = FORK_SERVER.Process(target=run_into, args=(command, log), daemon=True)
    process.start()
    process.join()
    if process.exitcode:
        last_line = log.read_text().rstrip().rpartition("\n")[2]
        raise SystemExit(f"{log.stem} failed: see {log}, which ends in: {last_line}")


def run_into(command: str, log: Path):
    """What such a process does: `python <command>` with its output behind what stands in a file."""
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    words = shlex.split(command)
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")


@dataclass
class Study:
    """What is to be made, and what has come out so far."""

    output_dir: Path
    responses: int
    cells: Cells
    missing: dict[str, Setting] = field(default_factory=dict)
    """the settings of the cells that are to be made, by the names of their runs"""
    failed: list[str] = field(default_factory=list)
    """the errors of cells that failed in another way than by a loss that is not finite"""


def make(name: str, seed: int, study: Study):
    """Makes a cell and notes its result, or makes a run that cells need. A cell that fails does not
    end the study: the others do not need it."""
    if name not in study.missing:
        compare.execute(name, seed, study.output_dir, run_forked)
        return
    setting = study.missing[name]
    run = run_folder(study.output_dir, name, seed)
    started = time.time()
    cell = {
        "method": setting.method,
        "coefficient": setting.coefficient,
        "learning_rate": setting.rate,
        "seed": seed,
        "command": f"python {compare.RUNS[name]}",
    }
    try:
        compare.execute(name, seed, study.output_dir, run_forked)
        compare.measure(name, seed, study.output_dir, study.responses, run_forked)
        cell |= read_cell(run, METHODS[setting.method].key)
    except SystemExit as error:
        diverged = NOT_FINITE.search((study.output_dir / f"{run.name}.log").read_text())
        if diverged is None:
            study.failed.append(str(error))
            return
        cell["diverged"] = diverged[1]
    cell["seconds"] = round(time.time() - started, 1)
    study.cells[setting][seed] = cell
    remove_large_files(run, keep_model=setting.method in STARTS)


def read_cell(run: Path, key: str) -> dict:
    """What a run reached, with its standard error, and the versions of the libraries."""
    summary = json.loads((run / "summary.json").read_text())
    cell = {package: summary[package] for package in ("torch", "transformers", "datasets")}
    if key == "accuracy":
        cell["accuracy"], cell["standard_error"], _ = summary["accuracy"]["all"]
        return cell
    measured = json.loads((run / compare.MEASURED).read_text())
    cell["reward"] = measured["reward"]
    cell["standard_error"] = measured["stderr_over_prompts"]
    for key in ("responses", "finished", "tokens"):
        cell[key] = measured[key]
    return cell


def remove_large_files(run: Path, *, keep_model: bool):
    """Leaves of a judged run what says how it went."""
    for path in run.iterdir():
        if path.name == "model":
            if not keep_model:
                shutil.rmtree(path)
        elif path.name not in KEPT and path.is_file():
            path.unlink()
    # What `compare.complete_command` made for this run.
    for path in run.parent.glob(f"{run.name}.*.jsonl"):
        path.unlink()


def waiting_runs(names: list[str], seeds: range, study: Study) -> list[tuple[str, int]]:
    """The runs (name, seed) that are missing, each behind those that it needs. Their commands go
    into `compare.RUNS`. A cell that was made with another command is out of date, and removed."""
    compare.RUNS.update(SOURCES)
    for start in STARTS:
        for setting in settings(start):
            compare.RUNS[setting.name()] = command_of(setting, study.cells)
    study.missing = {}
    waiting = []
    for seed in seeds:
        for name in names:
            for setting in settings(name):
                command = command_of(setting, study.cells)
                cell = study.cells[setting].get(seed, {})
                if cell.get("command") == f"python {command}":
                    continue
                study.cells[setting].pop(seed, None)
                compare.RUNS[setting.name()] = command
                study.missing[setting.name()] = setting
                for source in compare.needs(command):
                    if (source, seed) not in waiting:
                        waiting.append((source, seed))
                waiting.append((setting.name(), seed))
    return waiting


def tune(names: list[str], seeds: range, study: Study, at_once: int):
    """Makes the missing cells of some methods, and writes what is there after each."""
    compare.execute_in_turn(
        waiting_runs(names, seeds, study),
        at_once,
        partial(make, study=study),
        after_each=partial(write_results, study.cells, ROOT),
    )


# --------------------------------------------------------------------------------------------- main
# Of a cell on one core, before any is finished.
TYPICAL_SECONDS = 25


def plan(names: list[str], seeds: range, cells: Cells) -> str:
    """A line for every method: its cells, how many are missing, and about how long these take on
    one core, by the median of the finished ones."""
    lines = [["", "cells", "missing", "minutes"]]
    all_cells = 0
    all_missing = 0
    all_minutes = 0.0
    for name in names:
        finished = []
        for setting in settings(name):
            by_seed = cells[setting]
            finished += [by_seed[seed] for seed in seeds if seed in by_seed]
        total = len(settings(name)) * len(seeds)
        missing = total - len(finished)
        seconds = TYPICAL_SECONDS
        if finished:
            seconds = statistics.median(cell["seconds"] for cell in finished)
        minutes = missing * seconds / 60
        all_cells += total
        all_missing += missing
        all_minutes += minutes
        lines.append([name, str(total), str(missing), f"{minutes:.0f}"])
    lines.append(["all", str(all_cells), str(all_missing), f"{all_minutes:.0f}"])
    return aligned(lines)


def chosen_methods(only: str) -> list[str]:
    """The methods whose name matches, and those that they start from. The program ends if there is
    none."""
    try:
        names = [name for name in METHODS if re.search(only, name)]
    except re.error as error:
        stop(f"--only {only} is no regular expression: {error}")
    if not names:
        stop(f"--only {only} matches none of: {', '.join(METHODS)}")
    starts = [METHODS[name].start for name in names]
    return [name for name in METHODS if name in names or name in starts]


def main(args: Args):
    if args.seeds < 1 or args.at_once < 1 or args.responses < 1:
        stop("--seeds, --at_once and --responses must be at least 1")
    names = chosen_methods(args.only)
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    cells = read_cells(ROOT / "docs/tuning.json")
    if args.dry_run:
        print(plan(names, seeds, cells))
        return
    if args.write_page:
        write_results(cells, ROOT)
        return

    # With more threads, two runs on two cores would wait for each other.
    os.environ["OMP_NUM_THREADS"] = "1"
    study = Study(ROOT / args.output_dir, args.responses, cells)
    study.output_dir.mkdir(parents=True, exist_ok=True)
    tune([name for name in names if not METHODS[name].start], seeds, study, args.at_once)
    # A method that starts from the best student of another comes after all seeds of that one.
    tune([name for name in names if METHODS[name].start], seeds, study, args.at_once)
    write_results(cells, ROOT)
    if study.failed:
        errors = "\n".join(study.failed)
        raise SystemExit(f"the same command makes the cells again that failed:\n{errors}")


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    try:
        main(args)
    except KeyboardInterrupt:
        advice = "finished cells are kept, and the same command goes on"
        raise SystemExit(f"interrupted; {advice}") from None
