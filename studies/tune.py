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
import re
import shutil
import statistics
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import tyro

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
QUICK = " --eval_every 1000000 --save_every 1000000 --eval_prompts 32"
ANNOTATED = "rm_distiller.py --best_of 0 --annotations {rm_annotations}/annotations.jsonl"
SCORED = "pad.py --scores {pad_scores}/scores_1.jsonl"
BEST_AND_WORST = " --data {best_and_worst:pad_scores}"

# Stages that no setting changes are made once a seed. These runs are not judged.
SOURCES = {
    "dpkd_answers": "dpkd.py --max_steps 1" + SHORT + QUICK,
    "pad_scores": "pad.py --max_steps 1" + SHORT + QUICK,
    "rm_annotations": "rm_distiller.py --max_steps 1 --best_of 0",
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
        "RM-Distiller",
        ANNOTATED,
        ["--kl_coef 0.03", "--kl_coef 0.1", "--kl_coef 0.3"],
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
STARTS = {method.start for method in METHODS.values()}


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


def command_of(setting: Setting, results: dict) -> str:
    """The command of a setting, as those of `compare.RUNS`."""
    method = METHODS[setting.method]
    command = method.command
    if method.start:
        start = best_setting(results, method.start)
        if start is None:
            raise SystemExit(
                f"{setting.method} starts from the best of {method.start}: none is known"
            )
        command = command.replace("{start}", f"{{{start.name()}}}")
    command += f" {setting.flags()}{QUICK}"
    return command if method.key == "accuracy" else command + SHORT


# ------------------------------------------------------------------------------------------ results
def read_results(path: Path) -> dict:
    """What docs/tuning.json holds: {"best": {method: ...}, "cells": [...]}."""
    if path.exists():
        return json.loads(path.read_text())
    return {"best": {}, "cells": []}


def write_results(results: dict, root: Path):
    """Writes docs/tuning.json, wholly or not at all, and the tables of docs/tuning.md."""
    # Another thread may be adding a cell.
    results = {**results, "cells": list(results["cells"]), "best": best_of_all(results)}
    path = root / "docs/tuning.json"
    partial_path = path.with_name("tuning.json.partial")
    partial_path.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    partial_path.replace(path)
    compare.replace_block(root / "docs/tuning.md", "tuning", report(results))


def cells_of(results: dict, setting: Setting) -> dict[int, dict]:
    """The finished cells of a setting, by seed."""
    cells = {}
    for cell in results["cells"]:
        if Setting(cell["method"], cell["coefficient"], cell["learning_rate"]) == setting:
            cells[cell["seed"]] = cell
    return cells


def find_cell(results: dict, setting: Setting, seed: int, command: str) -> dict | None:
    """The finished cell of a setting, a seed and this command, if there is one."""
    cell = cells_of(results, setting).get(seed)
    return cell if cell is not None and cell["command"] == f"python {command}" else None


def shared_seeds(results: dict, name: str) -> list[int]:
    """The seeds with which all settings of a method are finished. Only these choose the best:
    a setting must not win because its seeds were others."""
    seeds = [set(cells_of(results, setting)) for setting in settings(name)]
    return sorted(set.intersection(*seeds))


def setting_values(results: dict, setting: Setting, seeds: list[int]) -> list[float]:
    """One value a seed, or [] if one of them diverged."""
    cells = cells_of(results, setting)
    values = []
    for seed in seeds:
        if "diverged" in cells[seed]:
            return []
        values.append(cells[seed][METHODS[setting.method].key])
    return values


def best_setting(results: dict, name: str) -> Setting | None:
    """The setting with the highest mean over the seeds that all settings of the method have. None
    if there is no such seed, or all settings diverged."""
    seeds = shared_seeds(results, name)
    if not seeds:
        return None
    means = {}
    for setting in settings(name):
        values = setting_values(results, setting, seeds)
        if values:
            means[setting] = statistics.mean(values)
    return max(means, key=means.get) if means else None


def best_of_all(results: dict) -> dict[str, dict]:
    """{method: its best flags, and what they reached}."""
    best = {}
    for name, method in METHODS.items():
        setting = best_setting(results, name)
        if setting is None:
            continue
        seeds = shared_seeds(results, name)
        values = setting_values(results, setting, seeds)
        best[name] = {
            "flags": setting.flags(),
            "coefficient": setting.coefficient,
            "learning_rate": setting.rate,
            method.key: statistics.mean(values),
            "standard_error": standard_error(values),
            "seeds": seeds,
        }
    return best


# ------------------------------------------------------------------------------------------- report
def report(results: dict) -> str:
    """All tables: a row a method and coefficient, a column a learning rate."""
    if not results["cells"]:
        return "No cell has been made yet."
    text = [progress(results)]
    for rates in different_rates():
        lines = []
        for name, method in METHODS.items():
            if method.rates == rates and any(cells_of(results, s) for s in settings(name)):
                lines += method_lines(results, name)
        if lines:
            text.append(markdown(["method", "coefficient", *rates], lines))
    if results["best"]:
        header = ["method", "best setting", "reached", "at an edge of the grid"]
        text.append("The best setting of each:\n\n" + markdown(header, best_lines(results)))
    return "\n\n".join(text)


def progress(results: dict) -> str:
    """How many cells are finished, with what, and whether some are missing."""
    cells = results["cells"]
    seeds = sorted({cell["seed"] for cell in cells})
    settings_count = sum(len(settings(name)) for name in METHODS)
    wanted = settings_count * SEEDS
    versions = sorted({f"torch {cell['torch']}" for cell in cells if "torch" in cell})
    text = f"{len(cells)} cells, seeds {', '.join(map(str, seeds))}, {', '.join(versions)}."
    if len(cells) < wanted:
        text = f"**Incomplete**: {len(cells)} of {wanted} cells are finished. {text}"
    return text


def different_rates() -> list[list[str]]:
    """The ladders of learning rates, each once."""
    ladders = []
    for method in METHODS.values():
        if method.rates not in ladders:
            ladders.append(method.rates)
    return ladders


def method_lines(results: dict, name: str) -> list[list[str]]:
    """A line for every value of a method's coefficient, the best setting in bold."""
    best = best_setting(results, name)
    lines = []
    for coefficient in METHODS[name].coefficients:
        line = [METHODS[name].label, f"`{coefficient}`" if coefficient else ""]
        for rate in METHODS[name].rates:
            setting = Setting(name, coefficient, rate)
            text = cell_text(results, setting)
            line.append(f"**{text}**" if setting == best else text)
        lines.append(line)
    return lines


def cell_text(results: dict, setting: Setting) -> str:
    """Mean ± standard error over the seeds that did not diverge, how many did, and how many seeds
    there are if some are missing."""
    cells = cells_of(results, setting)
    if not cells:
        return "–"
    values = []
    for cell in cells.values():
        if "diverged" not in cell:
            values.append(cell[METHODS[setting.method].key])
    text = mean_and_error(values) if values else ""
    if len(values) < len(cells):
        text += f" diverged: {len(cells) - len(values)} of {len(cells)}"
    if len(cells) < SEEDS:
        text += f" (seeds: {len(cells)})"
    return text.strip()


def best_lines(results: dict) -> list[list[str]]:
    """A line for every method. At an edge, the best of all may lie outside of the grid."""
    lines = []
    for name, best in results["best"].items():
        method = METHODS[name]
        reached = f"{best[method.key]:.3f}"
        if len(best["seeds"]) > 1:
            reached += f" ± {best['standard_error']:.3f}"
        if method.key == "accuracy":
            reached += " of pairs"
        edges = []
        if best["learning_rate"] in (method.rates[0], method.rates[-1]):
            edges.append("learning rate")
        # The first three values of a coefficient are in its order.
        ordered = method.coefficients[:3]
        if len(ordered) > 1 and best["coefficient"] in (ordered[0], ordered[-1]):
            edges.append("coefficient")
        lines.append([method.label, f"`{best['flags']}`", reached, ", ".join(edges)])
    return lines


# ---------------------------------------------------------------------------------------- execution
NOT_FINITE = re.compile(r"error: (loss \S+, gradient norm \S+ in step \d+)")
# What remains of a judged cell's run, by which it would be found finished.
KEPT = ["args.json", "summary.json", "metrics.jsonl", "timings.json", "measured.json"]


@dataclass
class Study:
    """What is made, and what has come out so far."""

    output_dir: Path
    responses: int
    results: dict
    failed: list[str] = field(default_factory=list)
    """the errors of cells that failed in another way than by a loss that is not finite"""


def make(name: str, seed: int, *, study: Study, cells: dict[str, Setting]):
    """Makes one of the `cells`, and notes its result. Any other run is made for those that need it.
    A cell that fails does not end the study: the others do not need it."""
    output_dir = study.output_dir
    if name not in cells:
        compare.execute(name, seed, output_dir)
        return
    setting = cells[name]
    started = time.time()
    cell = {
        "method": setting.method,
        "coefficient": setting.coefficient,
        "learning_rate": setting.rate,
        "seed": seed,
        "command": f"python {compare.RUNS[name]}",
    }
    try:
        compare.make(name, seed, output_dir, study.responses)
        cell |= read_cell(run_folder(output_dir, name, seed), METHODS[setting.method].key)
    except SystemExit as error:
        log = output_dir / f"{run_folder(output_dir, name, seed).name}.log"
        diverged = NOT_FINITE.search(log.read_text())
        if diverged is None:
            study.failed.append(str(error))
            return
        cell["diverged"] = diverged[1]
    cell["seconds"] = round(time.time() - started, 1)
    study.results["cells"].append(cell)
    remove_large_files(run_folder(output_dir, name, seed), keep_model=setting.method in STARTS)


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


def waiting_cells(names: list[str], seeds: range, results: dict) -> tuple[list[tuple], dict]:
    """The runs (name, seed) that are missing, each behind the sources that it needs, and the
    settings of the cells among them by name. All commands go into `compare.RUNS`."""
    compare.RUNS.update(SOURCES)
    for start in filter(None, STARTS):
        for setting in settings(start):
            compare.RUNS[setting.name()] = command_of(setting, results)
    waiting = []
    cells = {}
    for seed in seeds:
        for name in names:
            for setting in settings(name):
                command = command_of(setting, results)
                if find_cell(results, setting, seed, command) is not None:
                    continue
                compare.RUNS[setting.name()] = command
                cells[setting.name()] = setting
                for source in compare.needs(command):
                    if (source, seed) not in waiting:
                        waiting.append((source, seed))
                waiting.append((setting.name(), seed))
    return waiting, cells


def tune(names: list[str], seeds: range, study: Study, at_once: int, root: Path):
    """Makes the missing cells of some methods, and writes what is there after each."""
    results = study.results
    waiting, cells = waiting_cells(names, seeds, results)
    # A cell that was made with another command, or from another start, is out of date.
    missing = [(cells[name], seed) for name, seed in waiting if name in cells]
    results["cells"] = [cell for cell in results["cells"] if not is_one_of(cell, missing)]
    make_one = partial(make, study=study, cells=cells)
    compare.execute_in_turn(waiting, at_once, make_one, partial(write_results, results, root))


def is_one_of(cell: dict, pairs: list[tuple[Setting, int]]) -> bool:
    setting = Setting(cell["method"], cell["coefficient"], cell["learning_rate"])
    return (setting, cell["seed"]) in pairs


# --------------------------------------------------------------------------------------------- main
# Of a cell on one core, before any is finished.
TYPICAL_SECONDS = 25


def plan(names: list[str], seeds: range, results: dict) -> str:
    """A line for every method: its cells, how many are missing, and about how long these take on
    one core, by the median of the finished ones."""
    lines = [["", "cells", "missing", "minutes"]]
    counts = [0, 0, 0.0]
    for name in names:
        finished = []
        for setting in settings(name):
            cells = cells_of(results, setting)
            finished += [cells[seed] for seed in seeds if seed in cells]
        total = len(settings(name)) * len(seeds)
        missing = total - len(finished)
        seconds = TYPICAL_SECONDS
        if finished:
            seconds = statistics.median(cell["seconds"] for cell in finished)
        minutes = missing * seconds / 60
        counts = [counts[0] + total, counts[1] + missing, counts[2] + minutes]
        lines.append([name, str(total), str(missing), f"{minutes:.0f}"])
    lines.append(["all", str(counts[0]), str(counts[1]), f"{counts[2]:.0f}"])
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
    results = read_results(ROOT / "docs/tuning.json")
    if args.dry_run:
        print(plan(names, seeds, results))
        return
    if args.write_page:
        write_results(results, ROOT)
        return

    study = Study(ROOT / args.output_dir, args.responses, results)
    study.output_dir.mkdir(parents=True, exist_ok=True)
    tune([name for name in names if not METHODS[name].start], seeds, study, args.at_once, ROOT)
    # A method that starts from the best student of another comes after all seeds of that one.
    tune([name for name in names if METHODS[name].start], seeds, study, args.at_once, ROOT)
    write_results(results, ROOT)
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
