"""Every method and every baseline, several seeds, one table and one figure: `python -m playground.compare`.

Each run is a process that executes its real script; finished runs are not made again. What comes of it:
docs/results.json (every run: command, seed, summary, curves), and from that file alone the tables (mean ± standard
error, paired tests) between the `<!-- results:… -->` marks of README.md and docs/*.md, and the figures in docs/. The
figures need matplotlib: `pip install -r playground/requirements.txt`.
"""

import itertools
import json
import math
import multiprocessing
import os
import re
import runpy
import shlex
import statistics
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import tyro
from tqdm import tqdm

from playground import world

ROOT = Path(__file__).parent.parent


@dataclass
class Args:
    seeds: int = 5
    """every run is made with the seeds 1 to this"""
    first_seed: int = 1
    """or from this on (tuning must not see the seeds that are reported)"""
    quick: bool = False
    """one seed, only the runs of the README's table, no report"""
    output_dir: str = "runs/compare"
    """where the runs go; finished ones in it are used as they are"""
    at_once: int = 2
    """runs at a time, one CPU core each"""
    only: str = ""
    """runs whose name matches this regular expression and what they need, no report"""


LIKE_DPKD = "--kl_rejected 0 --learning_rate 3e-3"  # tuned on other seeds for the teacher's answers, as DPKD's is

# No answer of the playground has more than 32 tokens; where a student comes to write without end, the default limit of
# 256 takes minutes.
SHORT = "--max_response_tokens 64"

# name: command. `{name}` is the folder of that run with the same seed: a run waits for the runs that it names.
# `{file:name}` is a data file made from that run by the function of FILES.
RUNS = {
    # ---- the ADPA paper: baselines, DCKD, ADPA
    "dpo_student": "-m playground.baselines --loss dpo",
    "sft": "dckd.py --kl_chosen 0 --kl_rejected 0",
    "vanilla_kd": "dckd.py --kl_rejected 0",
    "dckd": "dckd.py",
    "adpa": "adpa.py",
    "adpa_plus": "adpa.py --student {dckd}/model",
    "adpa_no_reference": "adpa.py --teacher_ref none",
    "adpa_released_clip": "adpa.py --advantage_clip 1e-8 0.99999999",
    "adpa_greedy": "adpa.py --sample_temperature 0",
    **{f"adpa_gamma_{gamma}": f"adpa.py --gamma {gamma} {SHORT}" for gamma in (0.1, 2, 4)},
}
RUNS |= {
    # ---- the DPKD paper: baselines on the teacher's answers, all (2,000) and few (60); equal data and steps
    "dpkd": "dpkd.py",
    "dpkd_frozen": "dpkd.py --refresh_every 0",
    "dpkd_summed": "dpkd.py --no-length_normalize",
    **{f"dpkd_beta_{beta}": f"dpkd.py --beta {beta}" for beta in (0.1, 2)},
    "dpkd_released": "-m playground.released dpkd",
    "seqkd": f"dckd.py --data {{teacher_answers:dpkd}} --kl_chosen 0 {LIKE_DPKD}",
    "kd": f"dckd.py --data {{teacher_answers:dpkd}} --kl_chosen 1 {LIKE_DPKD}",
    "reverse_kl": "-m playground.baselines --loss reverse_kl",
    "dpkd_60": f"dpkd.py --teacher_answers 60 --max_steps 252 {SHORT}",
    "seqkd_60": f"dckd.py --data {{teacher_answers:dpkd_60}} --kl_chosen 0 {LIKE_DPKD} --max_steps 252 {SHORT}",
    "kd_60": f"dckd.py --data {{teacher_answers:dpkd_60}} --kl_chosen 1 {LIKE_DPKD} --max_steps 252 {SHORT}",
    # ---- the PAD paper; what differs only after the judgement takes the answers and judgements of `pad`
    "pad": "pad.py",
    "pad_vpd": "pad.py --scores {pad}/scores_1.jsonl --loss vpd",
    "pad_logp": "pad.py --scores {pad}/scores_1.jsonl --alpha 1",
    "pad_judgement": "pad.py --scores {pad}/scores_1.jsonl --alpha 0",
    "pad_half": "pad.py --scores {pad}/scores_1.jsonl --alpha 0.5",
    "pad_beta_10": "pad.py --scores {pad}/scores_1.jsonl --beta 10",
    "pad_2_answers": "pad.py --num_answers 2",
    "pad_3_answers": "pad.py --num_answers 3",
    "pad_2_rounds": f"pad.py --rounds 2 {SHORT}",
    "pad_swapped": "pad.py --swap_order",
    "pad_dpo": "-m playground.baselines --loss dpo --data {best_and_worst:pad}",
    "pad_simpo": "-m playground.baselines --loss simpo --data {best_and_worst:pad}",
    "pad_released": "-m playground.released pad --scores {pad}/scores_1.jsonl",
    # ---- the RM-Distiller paper: one annotation serves all
    "rm": "rm_distiller.py",
    "rm_bt_plain": "rm_distiller.py --annotations {rm}/annotations.jsonl --no-refine --no-margin --kl_coef 0",
    "rm_margin_plain": "rm_distiller.py --annotations {rm}/annotations.jsonl --no-refine --kl_coef 0",
    "rm_bt_refined": "rm_distiller.py --annotations {rm}/annotations.jsonl --no-margin --kl_coef 0",
    "rm_margin_refined": "rm_distiller.py --annotations {rm}/annotations.jsonl --kl_coef 0",
    "rm_released": "-m playground.released rm_distiller --annotations {rm}/annotations.jsonl",
}
README_RUNS = ["dpo_student", "sft", "vanilla_kd", "dckd", "adpa", "adpa_plus", "pad", "dpkd"]


# Every run is a process of its own. Where a process can be forked from one that has imported these, it is: importing
# them for every run would take a fifth of all the time.
PROCESSES = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
PROCESSES.set_forkserver_preload(["torch", "tyro", "transformers.models.llama.modeling_llama"])


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def teacher_answers(run: Path) -> Path:
    """The answers that a DPKD run's teacher wrote, as preference data whose rejected side is not used."""
    rows = [row for row in rows_of(run / "teacher_answers.jsonl") if row["text"]]
    return write_rows(
        run / "as_chosen.jsonl",
        [{"prompt": row["prompt"], "chosen": row["text"], "rejected": "-"} for row in rows],
    )


def best_and_worst(run: Path) -> Path:
    """The best and the worst by the teacher's score of the answers that a PAD run was trained on: data for DPO."""
    pairs = []
    for row in rows_of(run / "scores_1.jsonl"):
        if min(row["judgement"]) <= 0.5 < max(row["judgement"]):
            ranked = sorted(zip(row["score"], (answer["text"] for answer in row["answers"])))
            pairs.append(
                {"prompt": row["prompt"], "chosen": ranked[-1][1], "rejected": ranked[0][1]}
            )
    return write_rows(run / "best_and_worst.jsonl", pairs)


FILES = {"teacher_answers": teacher_answers, "best_and_worst": best_and_worst}


def needs(command: str) -> list[str]:
    return re.findall(r"{(?:\w+:)?(\w+)}", command)


def run_script(words: list[str], log: Path):
    """What `python words...` does, in this process, with its terminal output at the end of `log`."""
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(ROOT)
    sys.path[0] = str(ROOT)
    sys.argv = words[words[0] == "-m" :]
    if words[0] == "-m":
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(sys.argv[0], run_name="__main__")


def execute(name: str, seed: int, folder: Path):
    """Makes one run, unless it is finished with the same command. Its terminal output goes to <run>.log."""
    run = folder / f"{name}__{seed}"
    command = re.sub(r"{(\w+)}", lambda match: str(folder / f"{match[1]}__{seed}"), RUNS[name])
    for kind, source in re.findall(r"{(\w+):(\w+)}", command):
        made = FILES[kind](folder / f"{source}__{seed}")
        command = command.replace(f"{{{kind}:{source}}}", str(made))
    command += f" --seed {seed} --output_dir {run} --overwrite"
    log = run.with_suffix(".log")
    if (
        (run / "summary.json").exists()
        and log.exists()
        and log.read_text().partition("\n")[0] == command
    ):
        return
    log.write_text(command + "\n")
    process = PROCESSES.Process(target=run_script, args=(shlex.split(command), log))
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"{name} with seed {seed} failed: see {log}")


def execute_all(names: list[str], seeds: range, folder: Path, at_once: int):
    """Runs of all names and seeds, `at_once` at a time: always the first whose needs are there, so nobody waits for a
    run that could as well be made later."""
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["OMP_NUM_THREADS"] = "1"  # two runs at a time on two cores, not four threads
    waiting, finished, failed = [(name, seed) for seed in seeds for name in names], set(), []
    progress, changed = tqdm(total=len(waiting), desc="runs", smoothing=0.05), threading.Condition()

    def next_run() -> tuple[str, int] | None:
        with changed:
            while waiting and not failed:
                for run in waiting:
                    if all((needed, run[1]) in finished for needed in needs(RUNS[run[0]])):
                        waiting.remove(run)
                        return run
                changed.wait()

    def work():
        while run := next_run():
            try:
                execute(*run, folder)
            except BaseException as error:
                failed.append(error)
            with changed:
                finished.add(run)
                changed.notify_all()
            progress.update()

    with ThreadPoolExecutor(at_once) as pool:
        for worker in [pool.submit(work) for _ in range(at_once)]:
            worker.result()
    progress.close()
    if failed:
        raise failed[0]


def score_quality(run: Path) -> dict[str, float]:
    """How a PAD run's teacher scores the answers of the untrained student, inside a prompt: correlation with the
    oracle, distance between the highest and the lowest score, and the oracle's reward of the answer that has the
    highest; means over prompts whose answers are not all worth the same."""
    found = {}
    for name in ("average_logp", "judgement", "score"):
        measured = []
        for row in rows_of(run / "scores_1.jsonl"):
            worth = world.reward(
                [row["prompt"]] * len(row["answers"]), [answer["text"] for answer in row["answers"]]
            )
            scores = (
                [math.log(score) for score in row[name]] if name == "judgement" else row[name]
            )  # s_mcq
            if len(set(worth)) > 1 and len(set(scores)) > 1:
                best = worth[scores.index(max(scores))]
                measured.append(
                    (statistics.correlation(scores, worth), max(scores) - min(scores), best)
                )
        for key, numbers in zip(("correlation", "spread", "favourite"), zip(*measured)):
            found[f"{name}/{key}"] = statistics.mean(numbers)
    return found


def collect(names: list[str], seeds: range, folder: Path) -> dict:
    """What docs/results.json holds of the runs: {name: {command, runs: [{seed, summary, curves}]}}."""
    result = {}
    for name in names:
        result[name] = {"command": f"python {RUNS[name]}", "runs": []}
        for seed in seeds:
            run = folder / f"{name}__{seed}"
            rows = rows_of(run / "metrics.jsonl")
            curves = {
                key: [
                    [row["step"], row.get("charts/tokens", 0), row[key]]
                    for row in rows
                    if key in row
                ]
                for key in ("eval/reward", "eval/logp_teacher_answers", "eval/logp_student_answers")
            }
            summary = json.loads((run / "summary.json").read_text())
            for kind, (share, *_) in summary.pop("accuracy", {}).items():  # of a reward model
                summary[f"accuracy_after/{kind}"] = share
            if name == "pad":
                summary |= score_quality(run)
            result[name]["runs"].append(
                {"seed": seed, **summary, "curves": {k: v for k, v in curves.items() if v}}
            )
    return result


# ----------------------------------------------------------------------------------------------------------- statistics
def values(results: dict, name: str, key: str = "reward_after") -> list[float]:
    """One value a seed, in the seeds' order. The pseudo-runs "student" and "teacher" are measured by every run."""
    if name in ("student", "teacher"):
        name, key = "adpa", {"student": "reward_before", "teacher": "reward_teacher"}[name]
    return [run[key] for run in results[name]["runs"]]


def standard_error(numbers: list[float]) -> float:
    """Of the mean; 0 for a single number, which says nothing of it."""
    return statistics.stdev(numbers) / len(numbers) ** 0.5 if len(numbers) > 1 else 0.0


def mean_and_error(numbers: list[float], digits: int = 3) -> str:
    """Mean ± standard error over seeds; of a single seed the number alone."""
    error = f" ± {standard_error(numbers):.{digits}f}" if len(numbers) > 1 else ""
    return f"{statistics.mean(numbers):.{digits}f}{error}"


def sign_flip_test(differences: list[float]) -> float:
    """One-sided p of paired differences: the share of all 2^n sign patterns whose mean is at least as large. Exact, and
    with five seeds never below 1/32."""
    at_least = [
        sum(sign * d for sign, d in zip(signs, differences)) >= sum(differences) - 1e-12
        for signs in itertools.product((1, -1), repeat=len(differences))
    ]
    return sum(at_least) / len(at_least)


def compare(
    results: dict, better: str, worse: str, key: str = "reward_after"
) -> tuple[float, float, str]:
    """Mean difference, its one-sided p, and whether the claim "better > worse" shows at p ≤ 0.05."""
    differences = [
        one - other for one, other in zip(values(results, better, key), values(results, worse, key))
    ]
    p, opposite = sign_flip_test(differences), sign_flip_test([-d for d in differences])
    verdict = "yes" if p <= 0.05 else "no: the opposite" if opposite <= 0.05 else "not clearly"
    return statistics.mean(differences), p, verdict


# --------------------------------------------------------------------------------------------------------------- tables
def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def reward_table(results: dict, rows: dict[str, str]) -> str:
    """Rows {label: run}: reward, win rate against the untrained student, seconds of the whole run (median)."""
    lines = []
    for label, name in rows.items():
        line = [label, mean_and_error(values(results, name))]
        if name in ("student", "teacher"):
            line += ["", ""]
        else:
            line += [mean_and_error(values(results, name, "win_rate"), 2)]
            line += [f"{statistics.median(values(results, name, 'seconds')):.0f}"]
        lines.append(line)
    return markdown(["", "oracle reward", "win rate", "seconds"], lines)


def comparisons(results: dict, claims: list[tuple]) -> list[list[str]]:
    """Table rows for claims (paper, text, better, worse[, key]): what is measured, and whether it shows."""
    lines = []
    for paper, text, better, worse, *key in claims:
        difference, p, verdict = compare(results, better, worse, *key)
        numbers = " against ".join(
            mean_and_error(values(results, name, *key)) for name in (better, worse)
        )
        lines.append([paper, text, verdict, numbers, f"{difference:+.3f}", f"{p:.3f}"])
    return lines


def replace_block(path: Path, name: str, text: str):
    """Puts text between the marks `<!-- results:name -->` and `<!-- /results -->` of a page."""
    page = path.read_text()
    pattern = re.compile(rf"(<!-- results:{name} -->\n).*?(<!-- /results -->)", re.S)
    if not pattern.search(page):
        raise SystemExit(f"{path} has no mark results:{name}")
    path.write_text(pattern.sub(lambda match: f"{match[1]}{text}\n{match[2]}", page))


# -------------------------------------------------------------------------------------------------------------- figures
def figure(path: Path, draw, title: str, xlabel: str, ylabel: str, width=6.4, height=3.6):
    """One message: an SVG on white, legible on dark and light pages, the same bytes for the same results."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {
        "svg.hashsalt": "prefdistill",
        "svg.fonttype": "none",
        "axes.spines.right": False,
    }
    matplotlib.rcParams |= {
        "axes.spines.top": False,
        "axes.grid": True,
        "grid.alpha": 0.3,
        "legend.frameon": False,
    }
    from matplotlib import pyplot

    canvas, axes = pyplot.subplots(figsize=(width, height), layout="constrained")
    draw(axes)
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    canvas.savefig(path, metadata={"Date": None}, facecolor="white")
    pyplot.close(canvas)


def draw_intervals(results: dict, rows: dict[str, str]):
    """A dot and ± one standard error for each labelled run, best at the top; every seed as a faint dot."""

    def draw(axes):
        ordered = sorted(rows.items(), key=lambda row: statistics.mean(values(results, row[1])))
        for height, (_, name) in enumerate(ordered):
            numbers = values(results, name)
            error = standard_error(numbers)
            axes.plot(numbers, [height] * len(numbers), ".", color="C0", alpha=0.3)
            axes.errorbar(
                statistics.mean(numbers), height, xerr=error, fmt="o", color="C0", capsize=3
            )
        axes.set_yticks(range(len(ordered)), [label for label, _ in ordered])

    return draw


def draw_kinds(results: dict, rows: dict[str, str], keys: list[str]):
    """A dot and ± one standard error for each labelled run and each of several values of it, side by side."""

    def draw(axes):
        for color, key in enumerate(keys):
            for height, name in enumerate(reversed(rows.values())):
                numbers, at = values(results, name, key), height + 0.2 * (1 - color)
                error = standard_error(numbers)
                label = key.rpartition("/")[2] if height == 0 else None
                axes.errorbar(
                    statistics.mean(numbers),
                    at,
                    xerr=error,
                    fmt="o",
                    color=f"C{color}",
                    label=label,
                )
        axes.set_yticks(range(len(rows)), list(reversed(rows)))
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))

    return draw


def draw_curves(results: dict, rows: dict[str, str], key: str, x: int = 1, scale: float = 1.0):
    """Mean over seeds of a logged metric against steps (x = 0) or training tokens (x = 1), with its standard error."""

    def draw(axes):
        for color, (label, name) in enumerate(rows.items()):
            curves = [run["curves"][key] for run in results[name]["runs"]]
            points = [
                list(zip(*moment)) for moment in zip(*curves)
            ]  # per logged step: steps, tokens, values
            at = [statistics.mean(point[x]) * scale for point in points]
            mean = [statistics.mean(point[2]) for point in points]
            error = [standard_error(point[2]) for point in points]
            axes.plot(at, mean, color=f"C{color}", label=label)
            low, high = ([m + sign * e for m, e in zip(mean, error)] for sign in (-1, 1))
            axes.fill_between(at, low, high, color=f"C{color}", alpha=0.2)
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))

    return draw


def draw_sweep(results: dict, points: dict[float, str], log: bool = True):
    """A value over a swept setting: {setting: run}."""

    def draw(axes):
        means = [statistics.mean(values(results, name)) for name in points.values()]
        errors = [standard_error(values(results, name)) for name in points.values()]
        axes.errorbar(list(points), means, yerr=errors, fmt="o-", capsize=3)
        if log:
            axes.set_xscale("log")
        axes.set_xticks(list(points), [f"{point:g}" for point in points])

    return draw


# --------------------------------------------------------------------------------------------------------------- report
METHODS = {
    "student, untrained": "student",
    "DPO on the student": "dpo_student",
    "SFT on chosen": "sft",
    "vanilla distillation": "vanilla_kd",
    "DCKD": "dckd",
    "DPKD": "dpkd",
    "PAD": "pad",
    "ADPA": "adpa",
    "ADPA+": "adpa_plus",
    "teacher": "teacher",
}
ACCURACY = "accuracy_after"
CLAIMS = [  # (paper, claim, the run that should be better, the run that should be worse[, key])
    ("ADPA", "DPO hurts the small model", "student", "dpo_student"),
    ("ADPA", "DCKD beats distillation on the chosen side only", "dckd", "vanilla_kd"),
    ("ADPA", "DCKD beats SFT", "dckd", "sft"),
    ("ADPA", "ADPA beats DCKD", "adpa", "dckd"),
    ("ADPA", "ADPA+ beats ADPA", "adpa_plus", "adpa"),
    ("ADPA", "without the reference teacher ADPA falls", "adpa", "adpa_no_reference"),
    ("ADPA", "too large a γ over-optimises", "adpa", "adpa_gamma_4"),
    ("PAD", "PPD beats VPD", "pad", "pad_vpd"),
    ("PAD", "PAD beats pairwise training (DPO)", "pad", "pad_dpo"),
    ("PAD", "PAD beats pairwise training (SimPO)", "pad", "pad_simpo"),
    ("PAD", "the calibrated reward beats the plain average log-prob", "pad", "pad_logp"),
    ("PAD", "more answers help (4 against 2)", "pad", "pad_2_answers"),
    ("PAD", "the student passes its teacher", "pad", "teacher"),
    ("DPKD", "DPKD beats SeqKD", "dpkd", "seqkd"),
    ("DPKD", "DPKD beats token-level distillation", "dpkd", "kd"),
    ("DPKD", "length normalisation matters", "dpkd", "dpkd_summed"),
    (
        "RM-Distiller",
        "refinement adds (margin loss)",
        "rm_margin_refined",
        "rm_margin_plain",
        ACCURACY,
    ),
    (
        "RM-Distiller",
        "scoring adds (refined pairs)",
        "rm_margin_refined",
        "rm_bt_refined",
        ACCURACY,
    ),
    ("RM-Distiller", "generation adds", "rm", "rm_margin_refined", ACCURACY),
    ("RM-Distiller", "the full method beats binary labels", "rm", "rm_bt_plain", ACCURACY),
    ("RM-Distiller", "… also under best-of-n", "rm", "rm_bt_plain", "best_of_n_reward"),
]
RELEASED = [  # (method, what the release does, the method here, the release's way[, key])
    ("ADPA", "clamps advantages to [1e-8, 1 − 1e-8]", "adpa", "adpa_released_clip"),
    ("PAD", "swaps the divergence's arguments and mixes prompts", "pad", "pad_released"),
    ("DPKD", "trains on argmax tokens of both models instead of samples", "dpkd", "dpkd_released"),
    ("RM-Distiller", "takes the margin loss over a B × B table", "rm", "rm_released", ACCURACY),
]


TABLES = {  # (page, block): rows {label: run}
    ("README.md", "readme"): METHODS,
    ("docs/results.md", "methods"): METHODS,
    ("docs/dckd.md", "dckd"): {
        "student, untrained": "student",
        "SFT on chosen (`--kl_chosen 0 --kl_rejected 0`)": "sft",
        "vanilla distillation (`--kl_rejected 0`)": "vanilla_kd",
        "DCKD": "dckd",
        "teacher": "teacher",
    },
    ("docs/adpa.md", "adpa"): {
        "student, untrained": "student",
        "DPO on the student": "dpo_student",
        "SFT on chosen": "sft",
        "DCKD": "dckd",
        "ADPA": "adpa",
        "ADPA+": "adpa_plus",
        "ADPA without reference (`--teacher_ref none`)": "adpa_no_reference",
        "ADPA as released (`--advantage_clip 1e-8 0.99999999`)": "adpa_released_clip",
        "ADPA on greedy ŷ (`--sample_temperature 0`)": "adpa_greedy",
        "teacher": "teacher",
    },
    ("docs/adpa.md", "gamma"): {
        "γ = 0.1": "adpa_gamma_0.1",
        "γ = 0.7": "adpa",
        **{f"γ = {gamma}": f"adpa_gamma_{gamma}" for gamma in (2, 4)},
    },
    ("docs/dpkd.md", "dpkd"): {
        "student, untrained": "student",
        "SeqKD: SFT on the teacher's answers": "seqkd",
        "KD: forward KL on them": "kd",
        "reverse KL on the student's samples": "reverse_kl",
        "DPO on the student": "dpo_student",
        "DPKD": "dpkd",
        "teacher": "teacher",
    },
    ("docs/dpkd.md", "dpkd_settings"): {
        "DPKD": "dpkd",
        "`--beta 0.1`": "dpkd_beta_0.1",
        "`--beta 2`": "dpkd_beta_2",
        "`--no-length_normalize`": "dpkd_summed",
        "`--refresh_every 0` (frozen y_s)": "dpkd_frozen",
    },
    ("docs/dpkd.md", "dpkd_few"): {"SeqKD": "seqkd_60", "KD": "kd_60", "DPKD": "dpkd_60"},
    ("docs/pad.md", "pad"): {
        "student, untrained": "student",
        "PAD (PPD)": "pad",
        "`--loss vpd`": "pad_vpd",
        "`--alpha 1` (average log-prob alone)": "pad_logp",
        "`--alpha 0.5`": "pad_half",
        "`--alpha 0` (judgement alone)": "pad_judgement",
        "`--beta 10`": "pad_beta_10",
        "`--num_answers 2`": "pad_2_answers",
        "`--num_answers 3`": "pad_3_answers",
        "`--rounds 2`": "pad_2_rounds",
        "`--swap_order`": "pad_swapped",
        "DPO on best against worst": "pad_dpo",
        "SimPO on best against worst": "pad_simpo",
        "teacher": "teacher",
    },
}
REWARD_MODELS = {
    "Bradley-Terry, plain labels": "rm_bt_plain",
    "margin loss, plain labels": "rm_margin_plain",
    "Bradley-Terry, refined pairs": "rm_bt_refined",
    "margin loss, refined pairs": "rm_margin_refined",
    "full method": "rm",
    "full method, released B × B margin": "rm_released",
}
PAIR_KINDS = ("easy", "hard", "shifted")


def measured(results: dict, rows: dict[str, str]) -> dict[str, str]:
    """Those of the rows that were run; the untrained student and the teacher are measured by every run."""
    return {
        label: name
        for label, name in rows.items()
        if name in results or name in ("student", "teacher")
    }


def report(results: dict, root: Path):
    """Everything that is written from docs/results.json: tables between marks, figures."""
    docs, runs = root / "docs", [run for entry in results.values() for run in entry["runs"]]
    versions = ", ".join(f"{name} {runs[0][name]}" for name in ("torch", "transformers"))
    seeds = sorted({run["seed"] for run in runs})
    setting = f"{len(runs)} runs, seeds {seeds[0]} to {seeds[-1]}, {versions}, {runs[0]['device']}."
    replace_block(docs / "results.md", "setting", setting)
    for (page, block), rows in TABLES.items():
        if any(name in results for name in rows.values()):
            replace_block(root / page, block, reward_table(results, measured(results, rows)))
    for block, third, claims in (
        ("claims", "does it show here?", CLAIMS),
        ("released", "is it worse here?", RELEASED),
    ):
        header = [
            "method",
            "claim" if block == "claims" else "the released code",
            third,
            "numbers",
            "difference",
            "p",
        ]
        claims = [
            claim for claim in claims if len(measured(results, dict(enumerate(claim[2:4])))) == 2
        ]
        replace_block(docs / "results.md", block, markdown(header, comparisons(results, claims)))
    columns = [
        "accuracy_after",
        *(f"accuracy_after/{kind}" for kind in PAIR_KINDS),
        "best_of_n_reward",
    ]
    models = measured(results, REWARD_MODELS)
    lines = [
        [label, *(mean_and_error(values(results, name, k)) for k in columns)]
        for label, name in models.items()
    ]
    if lines:
        header = ["", "accuracy, all pairs", *PAIR_KINDS, "reward of best of 8"]
        replace_block(docs / "rm_distiller.md", "rm", markdown(header, lines))
        draw = draw_kinds(results, models, [f"accuracy_after/{kind}" for kind in PAIR_KINDS])
        figure(
            docs / "rm_accuracy.svg",
            draw,
            "Accuracy on held-out pairs",
            "share of pairs ordered right",
            "",
        )

    labels = {"average_logp": "average log-prob (α = 1)", "judgement": "judgement s_mcq (α = 0)"}
    labels["score"] = "score (α = 0.9)"
    header = ["teacher's score", "correlation with the oracle", "best minus worst, nats per token"]
    columns = [("correlation", 3), ("spread", 2), ("favourite", 3)]
    lines = [
        [
            label,
            *(
                mean_and_error(values(results, "pad", f"{name}/{key}"), digits)
                for key, digits in columns
            ),
        ]
        for name, label in labels.items()
    ]
    table = markdown([*header, "oracle reward of its favourite"], lines)
    replace_block(docs / "pad.md", "pad_correlations", table)

    reward, rows = "oracle reward of sampled answers", measured(results, METHODS)
    title = f"Reward after distillation, {len(seeds)} seed{'s' * (len(seeds) > 1)}"
    figure(docs / "rewards.svg", draw_intervals(results, rows), title, reward, "")
    rows = {label: name for label, name in rows.items() if name in results}
    draw = draw_curves(results, rows, "eval/reward", scale=1e-3)
    figure(
        docs / "efficiency.svg",
        draw,
        "Sample efficiency",
        "response tokens trained on, thousands",
        reward,
    )
    gammas = {0.1: "adpa_gamma_0.1", 0.7: "adpa", 2: "adpa_gamma_2", 4: "adpa_gamma_4"}
    figure(
        docs / "gamma.svg", draw_sweep(results, gammas), "Too large a γ over-optimises", "γ", reward
    )
    rows = measured(
        results, {"sampled anew every 4 steps": "dpkd", "of the untrained student": "dpkd_frozen"}
    )
    if rows:
        label = "log q per token, untrained student's answers"
        draw = draw_curves(results, rows, "eval/logp_student_answers", x=0)
        figure(
            docs / "dpkd_frozen.svg",
            draw,
            "DPKD pushes y_s down without end if they are old",
            "step",
            label,
        )
    if {"pad_2_answers", "pad_3_answers"} <= results.keys():
        draw = draw_sweep(results, {2: "pad_2_answers", 3: "pad_3_answers", 4: "pad"}, log=False)
        figure(
            docs / "pad_n.svg",
            draw,
            "PAD over the number of answers",
            "answers of a prompt",
            reward,
        )


def with_needs(names: list[str]) -> list[str]:
    """The names and all that they need, in the order of RUNS."""
    wanted = set(names)
    while more := {needed for name in wanted for needed in needs(RUNS[name])} - wanted:
        wanted |= more
    return [name for name in RUNS if name in wanted]


def main(args: Args):
    folder = ROOT / args.output_dir
    seeds = range(args.first_seed, args.first_seed + (1 if args.quick else args.seeds))
    names = README_RUNS if args.quick else [name for name in RUNS if re.search(args.only, name)]
    names = with_needs(names)
    execute_all(names, seeds, folder, args.at_once)
    results = collect(names, seeds, folder)
    if args.quick or args.only:
        print("README.md and docs/ are left as they are: --quick and --only make no report")
    else:
        text = json.dumps(results, indent=1, sort_keys=True)
        (ROOT / "docs/results.json").write_text(text + "\n")
        report(results, ROOT)
    for name in names:
        key = "reward_after" if "reward_after" in results[name]["runs"][0] else "accuracy_after"
        print(f"{name:<24}{mean_and_error(values(results, name, key))}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
