"""Methods, baselines and forks of yours, with several seeds: `python -m studies.compare`.

    python -m studies.compare --only "^(sft|dckd)$" --seeds 2              # two of the runs
    python -m studies.compare --only "^adpa$" --add mine="adpa.py --gamma 1"   # and one of yours
    python -m studies.compare --report                                   # all, and all pages anew

A run is a process that executes its real script, two at a time. A run that is finished is not made
again, so a study that was interrupted goes on with the same command. The model that a run ends with
is judged on 4,096 sampled responses to all different held-out requests (`studies.measure`), since
the 256 of a run are too few to tell methods apart. At the end there is a table: means over seeds ±
standard errors.

Some runs need variants of the playground, which are made first (`studies.worlds`). With
`--playground FOLDER` all runs take the models and data of another build of it.

With `--report` docs/results.json gets every run's command, seed, summary and curves. From that file
alone come the tables (with paired tests) between the `<!-- results:… -->` marks of README.md and
docs/*.md, and the figures in docs/. The figures need matplotlib:
`pip install -r studies/requirements.txt`. Without `--report` no page is touched.

This file has six parts:

    runs         the commands, and data files that are made from runs
    execution    makes the runs, each after those that it needs
    results      what docs/results.json keeps of a run
    statistics   means, standard errors, a paired test
    report       claims, tables, figures
    main
"""

import importlib.util
import json
import math
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
from bisect import bisect_left, bisect_right
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated

import tyro

from common import Bar, parse_flags
from playground import world
from studies.table import aligned, markdown, stop

ROOT = Path(__file__).parent.parent


@dataclass
class Args:
    seeds: int = 5
    """every run is made with this many seeds, from --first_seed on"""
    first_seed: int = 1
    """the first seed (tuning must not see the seeds that are reported)"""
    quick: bool = False
    """one seed, and only the runs of the README's table"""
    output_dir: str = ""
    """where the runs go, and finished ones in it are used as they are; if empty, runs/compare, and
    with --playground runs/compare_<its name>"""
    playground: str = "playground"
    """folder whose models and data all runs use, as playground.build --output_dir writes it"""
    at_once: int = 2
    """runs at a time, one CPU core each"""
    only: str = ""
    """only runs whose name matches this regular expression, and what they need"""
    responses: int = 4096
    """sampled responses on which a final model is judged; 0 leaves it at those of the run itself"""
    add: Annotated[list[str], tyro.conf.UseAppendAction] = field(default_factory=list)
    """a run of yours besides: name="fork.py --flag value"; may be given several times"""
    report: bool = False
    """write docs/results.json, the tables of README.md and docs/, and the figures anew"""


# --------------------------------------------------------------------------------------------- runs
# No answer of the playground has more than 32 tokens. Where a student comes to write without end,
# the default limit of 256 takes minutes.
SHORT = " --max_response_tokens 64"
# SeqKD and KD learn the teacher's answers. As DPKD's, their learning rate was tuned on other seeds.
TUNED = " --kl_rejected 0 --learning_rate 3e-3"
# RM-Distiller's variants take the annotations of `rm`, so one annotation serves all.
ANNOTATED = "rm_distiller.py --annotations {rm}/annotations.jsonl"
# PAD's variants that differ only after the judgement take the answers and judgements of `pad`.
SCORED = "pad.py --scores {pad}/scores_1.jsonl"
RELEASED_PAD = "-m studies.released pad --scores {pad}/scores_1.jsonl"
# Half of the scripts' steps: each of them samples and judges four responses a prompt.
RLOO = "-m studies.rloo --max_steps 126" + SHORT
ORACLE = " --eval_reward playground.world:reward"
# Variants of the playground, which `studies.worlds` makes.
LENGTHS = "runs/worlds/lengths"
LONGER = f" --eval_data {LENGTHS}/data/test.jsonl --reward studies.worlds:reward"
LONGER += " --max_response_tokens 128"
DPKD_LENGTHS = f"dpkd.py --student {LENGTHS}/student --teacher {LENGTHS}/teacher"
DPKD_LENGTHS += f" --data {LENGTHS}/data/train.jsonl --max_steps 126{LONGER}"
STYLED = " --eval_data runs/worlds/styles/data/rm_test.jsonl"
STYLED_PAIRS = "rm_distiller.py --annotations {styles_rm}/annotations.jsonl --kl_coef 0" + STYLED


def best_flags(name: str) -> str:
    """The flags of a method's best setting, as `studies.tune` found it, to be put behind the
    method's command. They are none if it was not tuned."""
    path = ROOT / "docs/tuning.json"
    if not path.exists():
        return ""
    best = json.loads(path.read_text())["best"]
    return f" {best[name]['flags']}" if name in best else ""


# The command of every run, by its name. `{name}` is the folder of that run with the same seed, and
# `{file:name}` is a data file that a function of DATA_FILES makes from that run. A run waits for
# the runs that it names, and stands behind them. The tuned settings come in here:
# "adpa.py" + best_flags("adpa").
RUNS = {
    # What was there before training. These are not trained, only judged.
    "student": "-m studies.measure playground/student",
    "teacher": "-m studies.measure playground/teacher",
    "teacher_ref": "-m studies.measure playground/teacher_ref",
    # The ADPA paper: baselines, DCKD, ADPA.
    "dpo_student": "-m studies.baselines --loss dpo",
    "dpo_large": "-m studies.baselines --loss dpo --student playground/teacher_ref",
    "sft": "dckd.py --kl_chosen 0 --kl_rejected 0",
    "vanilla_kd": "dckd.py --kl_rejected 0",
    "dckd": "dckd.py",
    "adpa": "adpa.py",
    "adpa_plus": "adpa.py --student {dckd}/model",
    "adpa_no_reference": "adpa.py --teacher_ref none",
    "adpa_released": "-m studies.released adpa",
    "adpa_states_chosen": "adpa.py --states chosen",
    "adpa_states_rejected": "adpa.py --states rejected",
    "adpa_states_teacher": "adpa.py --states teacher",
    "adpa_greedy": "adpa.py --sample_temperature 0",
    "adpa_gamma_0.1": "adpa.py --gamma 0.1" + SHORT,
    "adpa_gamma_2": "adpa.py --gamma 2" + SHORT,
    "adpa_gamma_4": "adpa.py --gamma 4" + SHORT,
    "dppo_sequence": "-m studies.rloo --max_steps 126 --credit implicit" + SHORT,
    "dppo_token": "-m studies.rloo --max_steps 126 --credit implicit_tokens" + SHORT,
    "aligndistil": "-m studies.baselines --loss aligndistil",
    # The DPKD paper: baselines on all answers of the teacher (2,000), then on few (60) with equal
    # data and steps.
    "dpkd": "dpkd.py",
    "dpkd_frozen": "dpkd.py --refresh_every 0",
    "dpkd_summed": "dpkd.py --no-length_normalize",
    "dpkd_beta_0.1": "dpkd.py --beta 0.1",
    "dpkd_beta_2": "dpkd.py --beta 2",
    "dpkd_beta_7": "dpkd.py --beta 7",
    "dpkd_lm": "dpkd.py --lm_data runs/worlds/corpus/corpus.txt",
    "dpkd_released": "-m studies.released dpkd --data {teacher_answers:dpkd}",
    "seqkd": "dckd.py --data {teacher_answers:dpkd} --kl_chosen 0" + TUNED,
    "kd": "dckd.py --data {teacher_answers:dpkd} --kl_chosen 1" + TUNED,
    "kd_data": "-m studies.baselines --loss kd",
    "reverse_kl": "-m studies.baselines --loss reverse_kl",
    "gkd": "-m studies.baselines --loss gkd",
    "dpkd_60": "dpkd.py --teacher_answers 60 --max_steps 252" + SHORT,
    "seqkd_60": (
        "dckd.py --data {teacher_answers:dpkd_60} --kl_chosen 0"
        + TUNED
        + " --max_steps 252"
        + SHORT
    ),
    "kd_60": (
        "dckd.py --data {teacher_answers:dpkd_60} --kl_chosen 1"
        + TUNED
        + " --max_steps 252"
        + SHORT
    ),
    # Answers of 3 to 60 words, in the mean 20 to 30 tokens: sums have a smaller β.
    "lengths_student": f"-m studies.measure {LENGTHS}/student{LONGER}",
    "lengths_teacher": f"-m studies.measure {LENGTHS}/teacher{LONGER}",
    "lengths_normalised_1": DPKD_LENGTHS + " --beta 1",
    "lengths_normalised_7": DPKD_LENGTHS + " --beta 7",
    "lengths_normalised_20": DPKD_LENGTHS + " --beta 20",
    "lengths_summed_0.05": DPKD_LENGTHS + " --no-length_normalize --beta 0.05",
    "lengths_summed_0.3": DPKD_LENGTHS + " --no-length_normalize --beta 0.3",
    "lengths_summed_1": DPKD_LENGTHS + " --no-length_normalize --beta 1",
    # The PAD paper.
    "pad": "pad.py",
    "pad_vpd": SCORED + " --loss vpd",
    "pad_logp": SCORED + " --alpha 1",
    "pad_judgement": SCORED + " --alpha 0",
    "pad_half": SCORED + " --alpha 0.5",
    "pad_beta_10": SCORED + " --beta 10",
    "pad_2_answers": "pad.py --num_answers 2",
    "pad_3_answers": "pad.py --num_answers 3",
    "pad_2_rounds": "pad.py --rounds 2" + SHORT,
    "pad_swapped": "pad.py --swap_order",
    "pad_other_tokenizer": "pad.py --teacher runs/worlds/tokenizer/teacher" + SHORT,
    "pad_other_tokenizer_logp": "pad.py --teacher runs/worlds/tokenizer/teacher --alpha 1" + SHORT,
    "other_teacher": "-m studies.measure runs/worlds/tokenizer/teacher",
    "pad_dpo": "-m studies.baselines --loss dpo --data {best_and_worst:pad}",
    "pad_simpo": "-m studies.baselines --loss simpo --data {best_and_worst:pad}",
    # One prompt in a forward pass, as in the released gemma-2-2b-it-pd.yaml, and two, as in the
    # run of gemma-log/pad.log. Then that file's α and β, with the released divergence and the JSD.
    "pad_released": RELEASED_PAD,
    "pad_released_2": RELEASED_PAD + " --micro_batch_size 2" + SHORT,
    "pad_released_alpha_0": RELEASED_PAD + " --alpha 0 --beta 10" + SHORT,
    "pad_judgement_beta_10": SCORED + " --alpha 0 --beta 10" + SHORT,
    # The RM-Distiller paper.
    "rm": "rm_distiller.py",
    "rm_bt_plain": ANNOTATED + " --no-refine --no-margin --kl_coef 0",
    "rm_margin_plain": ANNOTATED + " --no-refine --kl_coef 0",
    "rm_bt_refined": ANNOTATED + " --no-margin --kl_coef 0",
    "rm_margin_refined": ANNOTATED + " --kl_coef 0",
    "rm_released": "-m studies.released rm_distiller --annotations {rm}/annotations.jsonl",
    # Pairs of writers whose style differs, and held-out pairs in which it says something else.
    "styles_rm": "rm_distiller.py --data runs/worlds/styles/data/train.jsonl" + STYLED,
    "styles_bt_plain": STYLED_PAIRS + " --no-refine --no-margin",
    "styles_margin_plain": STYLED_PAIRS + " --no-refine",
    "styles_bt_refined": STYLED_PAIRS + " --no-margin",
    "styles_margin_refined": STYLED_PAIRS,
}
# What is the best of eight responses worth, if a reward model picks it?
BEST_OF_8 = "best_of_8_"
for reward_model in ("rm", "rm_bt_plain", "rm_margin_plain", "rm_bt_refined", "rm_margin_refined"):
    RUNS[BEST_OF_8 + reward_model] = f"-m studies.best_of_n --reward {{{reward_model}}}/model"
# Reinforcement learning with the oracle and with two reward models, at several prices of KL.
KL_WEIGHTS = [0.03, 0.1, 0.3, 1]
LEARNED_FROM = {"the oracle": "oracle", "full method": "rm", "Bradley-Terry, plain labels": "bt"}
for kl_coef in KL_WEIGHTS:
    price = f" --kl_coef {kl_coef}"
    RUNS[f"rloo_oracle_{kl_coef}"] = RLOO + price
    RUNS[f"rloo_rm_{kl_coef}"] = RLOO + price + " --reward {rm}/model" + ORACLE
    RUNS[f"rloo_bt_{kl_coef}"] = RLOO + price + " --reward {rm_bt_plain}/model" + ORACLE
README_RUNS = ["dpo_student", "sft", "vanilla_kd", "dckd", "adpa", "adpa_plus", "pad", "dpkd"]
README_RUNS += ["reverse_kl"]
PLACEHOLDER = re.compile(r"{(?:(\w+):)?([\w.-]+)}")


def needs(command: str) -> list[str]:
    """The names of the runs that a command takes something from."""
    return [name for _, name in PLACEHOLDER.findall(command)]


def with_needs(names: list[str]) -> list[str]:
    """The names and all that they need, in the order of RUNS."""
    wanted = set(names)
    # A run stands behind those that it needs, so one pass from the last to the first finds all.
    for name in reversed(RUNS):
        if name in wanted:
            wanted.update(needs(RUNS[name]))
    return [name for name in RUNS if name in wanted]


def on_playground(command: str, folder: str) -> str:
    """The command with the models and data of another playground: those that it names, and those
    that its script takes where it names none."""
    for flag, path in playground_flags(command).items():
        if f" --{flag} " not in command:
            command += f" --{flag} playground/{path}"
    return re.sub("(?<= )playground/", f"{shlex.quote(folder)}/", command)


def playground_flags(command: str) -> dict[str, str]:
    """The flags of a command's script whose default lies in the playground, with the rest of that
    path. Example: {"student": "student", "data": "data/train.jsonl"}."""
    words = shlex.split(command)
    script = words[0].removesuffix(".py")
    if script == "-m":
        script = words[1].replace(".", "/")
    if script == "studies/released":
        # It imports torch, which a study of one playground does not need.
        from studies.released import VARIANTS

        script = VARIANTS[words[2]].script
    source = (ROOT / f"{script}.py").read_text()
    return dict(re.findall(r'^    (\w+): str = "playground/(\S+)"$', source, re.M))


def check_playground(folder: Path):
    """Ends the program if something is missing in a playground."""
    for name in ("student", "teacher", "teacher_ref", "data/test.jsonl", "data/rm_test.jsonl"):
        if not (folder / name).exists():
            how = f"python -m playground.build --seed 2 --output_dir {folder}"
            if name == "data/rm_test.jsonl":
                how = f"python -m studies.rm_pairs --teacher {folder}/teacher"
                how += f" --output {folder}/{name}"
            stop(f"--playground: there is no {folder / name}; make it with {how}")


def make_worlds(names: list[str], output_dir: Path):
    """Makes the variants of the playground that the runs need and that are not there."""
    needed = set()
    for name in names:
        needed.update(re.findall(r"runs/worlds/(\w+)", RUNS[name]))
    for variant in sorted(needed):
        if not (ROOT / "runs/worlds" / variant / MEASURED).exists():
            output_dir.mkdir(parents=True, exist_ok=True)
            command = f"-m studies.worlds {variant}"
            print(f"making a variant of the playground: python {command}")
            run_process(command, output_dir / f"world_{variant}.log")


def added_runs(specs: list[str]) -> dict[str, str]:
    """The commands of --add by their names. The program ends if one cannot be made into a run."""
    added = {}
    for spec in specs:
        name, _, command = spec.partition("=")
        try:
            words = shlex.split(command)
        except ValueError as error:
            stop(f"--add {spec}: {error}")
        if not re.fullmatch(r"[\w.-]+", name) or not words:
            stop(f'--add {spec} must look like mine="fork.py --flag value"')
        if name in RUNS or name in added:
            stop(f"--add {spec}: there is a run {name} already; take another name")
        for needed in needs(command):
            if needed not in RUNS and needed not in added:
                stop(f"--add {spec}: there is no run {needed}")
        if words[0] != "-m":
            script = find_script(words[0])
            command = command.replace(words[0], shlex.quote(str(script)), 1)
        added[name] = command.strip()
    return added


def find_script(name: str) -> Path:
    """A script of this folder or of the project. The program ends if there is none."""
    for path in (Path(name).resolve(), ROOT / name):
        if path.is_file():
            return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
    stop(f"--add: there is no file {name}")


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def teacher_answers(run: Path) -> list[dict]:
    """The answers that a DPKD run's teacher wrote, as pairs whose rejected side is not used."""
    pairs = []
    for row in read_jsonl(run / "teacher_answers.jsonl"):
        if row["text"]:
            pairs.append({"prompt": row["prompt"], "chosen": row["text"], "rejected": "-"})
    return pairs


def best_and_worst(run: Path) -> list[dict]:
    """The best and the worst by the teacher's score of the answers that a PAD run learned from."""
    pairs = []
    for row in read_jsonl(run / "scores_1.jsonl"):
        # pad.py drops the other prompts: of their answers the teacher likes all, or none.
        if min(row["judgement"]) <= 0.5 < max(row["judgement"]):
            texts = [answer["text"] for answer in row["answers"]]
            ranked = sorted(zip(row["score"], texts))
            _, worst = ranked[0]
            _, best = ranked[-1]
            pairs.append({"prompt": row["prompt"], "chosen": best, "rejected": worst})
    return pairs


DATA_FILES = {"teacher_answers": teacher_answers, "best_and_worst": best_and_worst}


# ---------------------------------------------------------------------------------------- execution
def run_folder(output_dir: Path, name: str, seed: int) -> Path:
    return output_dir / f"{name}__{seed}"


def complete_command(name: str, seed: int, output_dir: Path) -> str:
    """The command of a run with its placeholders filled in. It writes the data files it names."""
    run = run_folder(output_dir, name, seed)
    command = RUNS[name]
    for kind, source_name in PLACEHOLDER.findall(command):
        source = run_folder(output_dir, source_name, seed)
        if kind:
            # The file is this run's own: others that need the same rows may be reading theirs now.
            path = output_dir / f"{run.name}.{kind}.jsonl"
            pairs = DATA_FILES[kind](source)
            path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
            command = command.replace(f"{{{kind}:{source_name}}}", shlex.quote(str(path)))
        else:
            command = command.replace(f"{{{source_name}}}", shlex.quote(str(source)))
    return f"{command} --seed {seed} --output_dir {shlex.quote(str(run))}"


def is_finished(run: Path, log: Path, command: str) -> bool:
    """Whether a run was made to its end with this command, which is the first line of its log."""
    is_there = (run / "summary.json").exists() or (run / MEASURED).exists()
    if not is_there or not log.exists():
        return False
    return log.read_text().partition("\n")[0] == command


def remove_run(run: Path, output_dir: Path):
    """Removes a run that is to be made again. Any other folder is left, and the script refuses it:
    a run lies in `output_dir` and holds the flags that its script wrote."""
    if run.resolve().parent == output_dir.resolve() and (run / "args.json").exists():
        shutil.rmtree(run)


def execute(name: str, seed: int, output_dir: Path, run_command=None):
    """Makes one run, unless it is finished. What it prints stands in <run>.log. In place of
    `run_process` another function may run the command."""
    run = run_folder(output_dir, name, seed)
    # Not by with_suffix, which would take the end of "adpa_gamma_0.1__5" for a suffix.
    log = output_dir / f"{run.name}.log"
    command = complete_command(name, seed, output_dir)
    if is_finished(run, log, command):
        return
    remove_run(run, output_dir)
    log.write_text(command + "\n")
    run_command = run_command or run_process
    run_command(command, log)


def run_process(command: str, log: Path):
    """Runs a command with its output behind what stands in the log. An error ends the study."""
    with log.open("a") as file:
        process = subprocess.run(
            [sys.executable, *shlex.split(command)],
            cwd=ROOT,
            # With more threads, two runs on two cores would wait for each other. A fork may lie in
            # another folder than common.py.
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": python_path()},
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    if process.returncode:
        last_line = log.read_text().rstrip().rpartition("\n")[2]
        raise SystemExit(f"{log.stem} failed: see {log}, which ends in: {last_line}")


MEASURED = "measured.json"
# How a run judges responses, in which it is followed: flag of studies.measure, flag of the script.
JUDGED_BY = ["eval_data", "eval_config", "eval_split", "reward", "reward_label"]
JUDGED_BY += ["max_response_tokens"]


def measure(name: str, seed: int, output_dir: Path, responses: int, run_command=None):
    """Judges the model that a run ended with on many responses, unless that was done. Reward models
    are left out, and so are runs without a reward."""
    run = run_folder(output_dir, name, seed)
    summary = run / "summary.json"
    if (run / MEASURED).exists() or not summary.exists() or not (run / "model").exists():
        return
    if "reward_after" not in json.loads(summary.read_text()):
        return
    args = json.loads((run / "args.json").read_text())
    args["reward"] = args.get("eval_reward") or args["reward"]
    words = ["-m", "studies.measure", str(run / "model"), "--output_dir", str(run)]
    words += ["--seed", str(seed), "--responses", str(responses)]
    for flag in JUDGED_BY:
        if args[flag] != "":
            words += [f"--{flag}", str(args[flag])]
    run_command = run_command or run_process
    run_command(shlex.join(words), output_dir / f"{run.name}.log")


def make(name: str, seed: int, output_dir: Path, responses: int):
    """Makes one run, and judges its model on so many responses unless it is 0."""
    execute(name, seed, output_dir)
    if responses:
        measure(name, seed, output_dir, responses)


def python_path() -> str:
    """Where a run's Python looks for modules: in the project as well."""
    folders = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return os.pathsep.join(folder for folder in folders if folder)


def first_ready(waiting: list[tuple], finished: set[tuple]) -> tuple[str, int] | None:
    """The first waiting run (name, seed) whose needs are finished, if there is one."""
    for name, seed in waiting:
        if all((needed, seed) in finished for needed in needs(RUNS[name])):
            return name, seed
    return None


def execute_all(
    names: list[str],
    seeds: range,
    output_dir: Path,
    at_once: int,
    *,
    responses: int = 0,
    after_each=None,
):
    """Makes the runs of all names and seeds, and judges their models on so many responses. The
    first run that fails ends all: no other is begun."""
    output_dir.mkdir(parents=True, exist_ok=True)
    waiting = []
    for seed in seeds:
        waiting += [(name, seed) for name in names]
    make_one = partial(make, output_dir=output_dir, responses=responses)
    execute_in_turn(waiting, at_once, make_one, after_each)


def execute_in_turn(waiting: list[tuple], at_once: int, make_one, after_each=None):
    """Calls make_one(name, seed) for all that wait, `at_once` at a time, always for the first that
    is ready. After each, after_each() is called. The first error ends all: no other is begun."""
    waiting = list(waiting)
    running = {}  # the run of every future
    finished = set()
    bar = Bar("finished", total=len(waiting), unit="runs")
    with bar, ThreadPoolExecutor(at_once) as pool:
        while waiting or running:
            ready = first_ready(waiting, finished)
            while ready is not None and len(running) < at_once:
                waiting.remove(ready)
                running[pool.submit(make_one, *ready)] = ready
                ready = first_ready(waiting, finished)
            if not running:
                raise ValueError(f"what these need is not among the names: {waiting}")
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                future.result()  # raises what ended a run that failed
                finished.add(running.pop(future))
                bar.advance(1)
            if after_each is not None:
                after_each()


# ------------------------------------------------------------------------------------------ results
CURVES = ["eval/reward", "eval/logp_teacher_answers", "eval/logp_student_answers"]


def collect(names: list[str], seeds: range, output_dir: Path) -> dict:
    """What docs/results.json holds: {name: {"command", "runs": one entry a seed}}."""
    results = {}
    for name in names:
        entries = []
        for seed in seeds:
            run = run_folder(output_dir, name, seed)
            entry = {"seed": seed, **read_run(run)}
            if (run / MEASURED).exists():
                entry.update(read_measured(run, run_folder(output_dir, "student", seed)))
            if name == "pad":
                entry.update(score_quality(run))
            entries.append(entry)
        results[name] = {"command": f"python {RUNS[name]}", "runs": entries}
    return results


def read_run(run: Path) -> dict:
    """The summary of a run, and its curves as points [step, tokens trained on, value]. What is only
    measured has neither, and `studies.best_of_n` trains nothing and has no curves."""
    if not (run / "summary.json").exists():
        return {"seconds": json.loads((run / "timings.json").read_text())["measured"]}
    entry = json.loads((run / "summary.json").read_text())
    # A reward model's accuracy on each kind of pair is (share, standard error, count).
    accuracies = entry.pop("accuracy", {})
    for kind, (share, _, _) in accuracies.items():
        entry[f"accuracy_after/{kind}"] = share

    entry["curves"] = {}
    if not (run / "metrics.jsonl").exists():
        return entry
    rows = read_jsonl(run / "metrics.jsonl")
    for key in CURVES:
        points = []
        for row in rows:
            if key in row:
                points.append([row["step"], row.get("charts/tokens", 0), row[key]])
        if points:
            entry["curves"][key] = points
    return entry


def read_measured(run: Path, student: Path) -> dict:
    """The reward of a run's final model, measured on many responses, in place of the run's own. And
    how often it beats the untrained student, if that was measured with the same seed."""
    measured = json.loads((run / MEASURED).read_text())
    entry = {"reward_after": measured["reward"], "measured": measured}
    opponent = student / "measured.jsonl"
    if opponent.exists() and student != run:
        rows = read_jsonl(run / "measured.jsonl")
        opponent_rows = read_jsonl(opponent)
        if [row["prompt"] for row in rows] == [row["prompt"] for row in opponent_rows]:
            entry["win_rate"] = win_rate(rows, opponent_rows)
    return entry


def score_quality(run: Path) -> dict[str, float]:
    """How well a PAD run's teacher scores the answers of the untrained student to one prompt.

    For each of its scores: the correlation with the oracle, the distance between the highest and
    the lowest, and the oracle's reward of the answer with the highest. They are means over the
    prompts whose answers are not all worth the same.
    """
    rows = read_jsonl(run / "scores_1.jsonl")
    quality = {}
    for name in ("average_logp", "judgement", "score"):
        correlations = []
        spreads = []
        favourites = []
        for row in rows:
            texts = [answer["text"] for answer in row["answers"]]
            rewards = world.reward([row["prompt"]] * len(texts), texts)
            scores = row[name]
            if name == "judgement":
                scores = [math.log(probability) for probability in scores]  # s_mcq
            if len(set(rewards)) > 1 and len(set(scores)) > 1:
                correlations.append(statistics.correlation(scores, rewards))
                spreads.append(max(scores) - min(scores))
                favourites.append(rewards[scores.index(max(scores))])
        quality[f"{name}/correlation"] = statistics.mean(correlations)
        quality[f"{name}/spread"] = statistics.mean(spreads)
        quality[f"{name}/favourite"] = statistics.mean(favourites)
    return quality


def values(results: dict, name: str, key: str = "reward_after") -> list[float]:
    """One value a seed, in the seeds' order. Every run judges the untrained "student" and the
    "teacher" as well. They are read from ADPA's where they were not measured by themselves."""
    if name == "student" and name not in results:
        return values(results, "adpa", "reward_before")
    if name == "teacher" and name not in results:
        return values(results, "adpa", "reward_teacher")
    return [run[key] for run in results[name]["runs"]]


def is_measured(results: dict, *names: str) -> bool:
    """Whether there are results of all these runs. A row without is left out of its table."""
    return all(name in results or name in ("student", "teacher") for name in names)


# --------------------------------------------------------------------------------------- statistics
def standard_error(numbers: list[float]) -> float:
    """Of the mean. It is 0 for a single number, which says nothing of it."""
    if len(numbers) == 1:
        return 0.0
    return statistics.stdev(numbers) / len(numbers) ** 0.5


def mean_and_error(numbers: list[float], digits: int = 3) -> str:
    """Mean ± standard error over seeds; of a single seed the number alone."""
    text = f"{statistics.mean(numbers):.{digits}f}"
    if len(numbers) > 1:
        text += f" ± {standard_error(numbers):.{digits}f}"
    return text


def win_rate(measured: list[dict], opponent: list[dict]) -> float:
    """How often a response of a model has a higher reward than one of its opponent to the same
    prompt, a tie being half a win: over all pairs of their responses, mean over prompts.

    Example: rewards of (1, 3) against (1, 2) win in 1 > 1? ½, 1 > 2? 0, 3 > 1? 1, 3 > 2? 1: 0.625.
    """
    rates = []
    for row, other in zip(measured, opponent, strict=True):
        rewards = sorted(other["rewards"])
        wins = 0.0
        for reward in row["rewards"]:
            lower = bisect_left(rewards, reward)
            equal = bisect_right(rewards, reward) - lower
            wins += lower + equal / 2
        rates.append(wins / (len(rewards) * len(row["rewards"])))
    return statistics.mean(rates)


# The 97.5 % point of Student's t with 1, 2, ... degrees of freedom.
T_POINTS = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179]
T_POINTS += [2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064]


def half_width(differences: list[float]) -> float:
    """Of the 95 % interval of a mean, mean ± t s/√n. It has no bound for a single number.

    Example: 1, 2 and 3 have s = 1, and 4.303/√3 = 2.484.
    """
    if len(differences) == 1:
        return math.inf
    degrees = min(len(differences) - 1, len(T_POINTS))
    return T_POINTS[degrees - 1] * standard_error(differences)


def verdict(differences: list[float]) -> str:
    """Whether the interval of the differences lies above 0, or below, or has 0 in it."""
    mean = statistics.mean(differences)
    width = half_width(differences)
    if mean - width > 0:
        return "yes"
    if mean + width < 0:
        return "no: the opposite"
    return "not clearly"


# --------------------------------------------------------------------------------- report: contents
@dataclass
class Claim:
    """A method's paper or released code says that one run is better than another."""

    method: str
    text: str
    better: str
    worse: str
    key: str = "reward_after"
    better_from: str = ""
    """the run whose value is subtracted, where gains are compared"""
    worse_from: str = ""


ACCURACY = "accuracy_after"
# What the papers claim.
CLAIMS = [
    Claim(
        "ADPA",
        "DPO gains less on the small model (gain of the large one against its own)",
        better="dpo_large",
        better_from="teacher_ref",
        worse="dpo_student",
        worse_from="student",
    ),
    Claim(
        "ADPA",
        "DCKD beats distillation on the chosen side only",
        better="dckd",
        worse="vanilla_kd",
    ),
    Claim("ADPA", "DCKD beats SFT", better="dckd", worse="sft"),
    Claim("ADPA", "ADPA beats DCKD", better="adpa", worse="dckd"),
    Claim("ADPA", "ADPA+ beats ADPA", better="adpa_plus", worse="adpa"),
    Claim(
        "ADPA",
        "ADPA beats reinforcement learning with the DPO reward of whole responses",
        better="adpa",
        worse="dppo_sequence",
    ),
    Claim("ADPA", "… and with that of tokens", better="adpa", worse="dppo_token"),
    Claim(
        "ADPA",
        "the student's own states are better than the chosen answers'",
        better="adpa",
        worse="adpa_states_chosen",
    ),
    Claim("ADPA", "… than the rejected answers'", better="adpa", worse="adpa_states_rejected"),
    Claim("ADPA", "… than the teacher's", better="adpa", worse="adpa_states_teacher"),
    Claim(
        "ADPA",
        "without the reference teacher ADPA falls",
        better="adpa",
        worse="adpa_no_reference",
    ),
    Claim("ADPA", "too large a γ over-optimises", better="adpa", worse="adpa_gamma_4"),
    Claim("PAD", "PPD beats VPD", better="pad", worse="pad_vpd"),
    Claim("PAD", "PAD beats pairwise training (DPO)", better="pad", worse="pad_dpo"),
    Claim("PAD", "PAD beats pairwise training (SimPO)", better="pad", worse="pad_simpo"),
    Claim(
        "PAD",
        "the calibrated reward beats the plain average log-prob",
        better="pad",
        worse="pad_logp",
    ),
    Claim("PAD", "more answers help (4 against 2)", better="pad", worse="pad_2_answers"),
    Claim(
        "PAD",
        "the student passes its teacher (the paper: on MT-Bench, with Gemma)",
        better="pad",
        worse="teacher",
    ),
    Claim("PAD", "a second round adds", better="pad_2_rounds", worse="pad"),
    Claim(
        "PAD",
        "it also learns from a teacher with another tokenizer (against no training)",
        better="pad_other_tokenizer",
        worse="student",
    ),
    Claim("DPKD", "DPKD beats SeqKD", better="dpkd", worse="seqkd"),
    Claim(
        "DPKD",
        "DPKD beats token-level distillation on the data's responses",
        better="dpkd",
        worse="kd_data",
    ),
    Claim("DPKD", "DPKD beats MiniLLM (here its core)", better="dpkd", worse="reverse_kl"),
    Claim(
        "DPKD",
        "length normalisation matters (β 7 with it, β 1 without: alike for 7 tokens)",
        better="dpkd_beta_7",
        worse="dpkd_summed",
    ),
    Claim(
        "DPKD",
        "… on answers of 3 to 60 words (β 7 with it, β 0.3 without)",
        better="lengths_normalised_7",
        worse="lengths_summed_0.3",
    ),
    Claim(
        "RM-Distiller",
        "refinement adds (margin loss)",
        better="rm_margin_refined",
        worse="rm_margin_plain",
        key=ACCURACY,
    ),
    Claim(
        "RM-Distiller",
        "… on pairs of writers of different style",
        better="styles_margin_refined",
        worse="styles_margin_plain",
        key=ACCURACY,
    ),
    Claim(
        "RM-Distiller",
        "… there, on pairs whose better answer has the poorer writers' style",
        better="styles_margin_refined",
        worse="styles_margin_plain",
        key="accuracy_after/styles exchanged",
    ),
    Claim(
        "RM-Distiller",
        "scoring adds (refined pairs)",
        better="rm_margin_refined",
        worse="rm_bt_refined",
        key=ACCURACY,
    ),
    Claim(
        "RM-Distiller",
        "generation adds",
        better="rm",
        worse="rm_margin_refined",
        key=ACCURACY,
    ),
    Claim(
        "RM-Distiller",
        "the full method beats binary labels",
        better="rm",
        worse="rm_bt_plain",
        key=ACCURACY,
    ),
    Claim(
        "RM-Distiller",
        "… also under best-of-n",
        better="best_of_8_rm",
        worse="best_of_8_rm_bt_plain",
        key="best_of_n_reward",
    ),
    Claim(
        "RM-Distiller",
        "… also as the reward of reinforcement learning (κ = 0.3)",
        better="rloo_rm_0.3",
        worse="rloo_bt_0.3",
    ),
]
# What the released code does (its files: studies/released.py), which is worse if the method as it
# stands here is better.
RELEASED = [
    Claim(
        "ADPA",
        "clamps log-ratios of the 50 likeliest tokens to [1e-8, 1 − 1e-8] (`compress_logits.py`)",
        better="adpa",
        worse="adpa_released",
    ),
    Claim(
        "PAD",
        "exchanges the divergence's arguments (1 prompt a device, `gemma-2-2b-it-pd.yaml`)",
        better="pad",
        worse="pad_released",
    ),
    Claim(
        "PAD",
        "… and adds up two prompts' distributions (2 a device, `gemma-log/pad.log`)",
        better="pad",
        worse="pad_released_2",
    ),
    Claim(
        "PAD",
        "… 1 prompt a device, at the release's α = 0 and β = 10",
        better="pad_judgement_beta_10",
        worse="pad_released_alpha_0",
    ),
    Claim(
        "DPKD",
        "trains on argmax tokens of both models along the teacher's responses",
        better="dpkd",
        worse="dpkd_released",
    ),
    Claim(
        "RM-Distiller",
        "takes the margin loss over a 4 × 4 table (its joint trainer)",
        better="rm",
        worse="rm_released",
        key=ACCURACY,
    ),
]

# Tables and figures have rows {label: run}.
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
    "on-policy distillation (reverse KL)": "reverse_kl",
    "on-policy distillation (GKD's JSD)": "gkd",
    "AlignDistil, core only": "aligndistil",
    "KD on the data's responses": "kd_data",
    "teacher": "teacher",
}
TABLES = {  # the rows of every table of rewards, by page and mark
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
        "ADPA as released (`python -m studies.released adpa`)": "adpa_released",
        "`--states chosen`": "adpa_states_chosen",
        "`--states rejected`": "adpa_states_rejected",
        "`--states teacher`": "adpa_states_teacher",
        "RLOO with the DPO reward of responses": "dppo_sequence",
        "RLOO with the DPO reward of tokens": "dppo_token",
        "AlignDistil, core only": "aligndistil",
        "ADPA on greedy ŷ (`--sample_temperature 0`)": "adpa_greedy",
        "teacher": "teacher",
    },
    ("docs/adpa.md", "gamma"): {
        "γ = 0.1": "adpa_gamma_0.1",
        "γ = 0.7": "adpa",
        "γ = 2": "adpa_gamma_2",
        "γ = 4": "adpa_gamma_4",
    },
    ("docs/dpkd.md", "dpkd"): {
        "student, untrained": "student",
        "SeqKD: SFT on the teacher's answers": "seqkd",
        "SeqKD and forward KL on them": "kd",
        "KD: forward KL on the data's responses": "kd_data",
        "reverse KL on the student's samples": "reverse_kl",
        "GKD's JSD on the student's samples": "gkd",
        "DPO on the student": "dpo_student",
        "DPKD": "dpkd",
        "teacher": "teacher",
    },
    ("docs/dpkd.md", "dpkd_settings"): {
        "DPKD": "dpkd",
        "`--beta 0.1`": "dpkd_beta_0.1",
        "`--beta 2`": "dpkd_beta_2",
        "`--beta 7`": "dpkd_beta_7",
        "`--no-length_normalize`": "dpkd_summed",
        "`--refresh_every 0` (frozen y_s)": "dpkd_frozen",
        "`--lm_data` (writers' conversations)": "dpkd_lm",
    },
    ("docs/dpkd.md", "dpkd_lengths"): {
        "student, untrained": "lengths_student",
        "DPKD, `--beta 1`": "lengths_normalised_1",
        "DPKD, `--beta 7`": "lengths_normalised_7",
        "DPKD, `--beta 20`": "lengths_normalised_20",
        "`--no-length_normalize --beta 0.05`": "lengths_summed_0.05",
        "`--no-length_normalize --beta 0.3`": "lengths_summed_0.3",
        "`--no-length_normalize --beta 1`": "lengths_summed_1",
        "teacher": "lengths_teacher",
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
        "a teacher with another tokenizer": "pad_other_tokenizer",
        "… `--alpha 1`": "pad_other_tokenizer_logp",
        "that teacher": "other_teacher",
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
    "full method, released 4 × 4 margin table": "rm_released",
}
PAIR_KINDS = ["easy", "hard", "shifted"]
PAIR_ACCURACIES = [f"accuracy_after/{kind}" for kind in PAIR_KINDS]
STYLED_REWARD_MODELS = {
    "Bradley-Terry, plain labels": "styles_bt_plain",
    "margin loss, plain labels": "styles_margin_plain",
    "Bradley-Terry, refined pairs": "styles_bt_refined",
    "margin loss, refined pairs": "styles_margin_refined",
    "full method": "styles_rm",
}
STYLE_KINDS = ["as in training", "same style", "styles exchanged"]
NOT_MEASURED = "Not measured with the present settings yet."


# ----------------------------------------------------------------------------------- report: tables
def report(results: dict, root: Path):
    """Everything that is written from docs/results.json: tables between marks, figures."""
    docs = root / "docs"
    replace_block(docs / "results.md", "setting", setting(results))
    for (page, mark), rows in TABLES.items():
        replace_block(root / page, mark, reward_table(results, rows))
    replace_block(docs / "results.md", "rloo_table", reinforcement_table(results))
    header = ["method", "claim", "does it show here?", "numbers", "difference, 95 % interval"]
    replace_block(docs / "results.md", "claims", claim_table(results, CLAIMS, header))
    header[1:3] = ["the released code", "is it worse here?"]
    replace_block(docs / "results.md", "released", claim_table(results, RELEASED, header))
    table = reward_model_table(results, REWARD_MODELS, PAIR_KINDS)
    replace_block(docs / "rm_distiller.md", "rm", table)
    table = reward_model_table(results, STYLED_REWARD_MODELS, STYLE_KINDS)
    replace_block(docs / "rm_distiller.md", "styles", table)
    replace_block(docs / "pad.md", "pad_correlations", score_quality_table(results))
    draw_figures(results, root)


def replace_block(path: Path, mark: str, text: str):
    """Puts text between the marks `<!-- results:mark -->` and `<!-- /results -->` of a page."""
    before, begin, rest = path.read_text().partition(f"<!-- results:{mark} -->\n")
    _, end, after = rest.partition("<!-- /results -->")
    if not end:
        raise SystemExit(f"{path} has no mark results:{mark}")
    path.write_text(f"{before}{begin}{text}\n{end}{after}")


def setting(results: dict) -> str:
    """How many runs there are, and with what they were made."""
    runs = []
    for entry in results.values():
        runs += entry["runs"]
    first = min(run["seed"] for run in runs)
    last = max(run["seed"] for run in runs)
    [run, *_] = results["adpa"]["runs"]
    versions = f"torch {run['torch']}, transformers {run['transformers']}, {run['device']}"
    judged = "A final model is judged on 256 responses to the 128 held-out requests, two to each."
    if "student" in results:
        measured = results["student"]["runs"][0]["measured"]
        judged = f"A final model is judged on {measured['responses']:,} sampled responses to the "
        judged += f"{measured['prompts']} held-out requests."
    return f"{len(runs)} runs, seeds {first} to {last}, {versions}. {judged}"


def reward_table(results: dict, rows: dict[str, str]) -> str:
    """Reward, win rate against the untrained student, and seconds of the whole run."""
    lines = []
    for label, name in rows.items():
        if not is_measured(results, name):
            continue
        rate = ""
        seconds = ""
        if not RUNS.get(name, "").startswith("-m studies.measure "):
            seconds = seconds_text(results, name)
            if has_win_rate(results, name):
                rate = mean_and_error(values(results, name, "win_rate"), digits=2)
        lines.append([label, mean_and_error(values(results, name)), rate, seconds])
    if not lines:
        return NOT_MEASURED
    return markdown(["", "oracle reward", "win rate", "seconds"], lines)


def has_win_rate(results: dict, name: str) -> bool:
    """Whether a run has a win rate against the untrained student. One that trains the student of
    another run has it only from `studies.measure`: its own is against where it began."""
    run = results[name]["runs"][0]
    if not isinstance(run.get("win_rate"), float):
        return False
    return "measured" in run or re.search(r"--student ({|playground)", RUNS[name]) is None


def seconds_text(results: dict, name: str) -> str:
    """The median seconds of a run, and behind a plus those of the runs that it takes something
    from: a model, answers, scores."""
    text = f"{median_seconds(results, name):.0f}"
    for needed in with_needs([name]):
        if needed != name:
            text += f" + {median_seconds(results, needed):.0f}"
    return text


def median_seconds(results: dict, name: str) -> float:
    return statistics.median(values(results, name, "seconds"))


RESULT_COLUMNS = {
    "reward before": "reward_before",
    "reward after": "reward_after",
    "teacher": "reward_teacher",
    "win rate": "win_rate",
    "accuracy": ACCURACY,
    "best of n": "best_of_n_reward",
}


def result_table(results: dict) -> str:
    """What a terminal shows at the end: means over seeds ± standard errors. A column that no run
    has is left out."""
    columns = {}
    for label, key in RESULT_COLUMNS.items():
        for entry in results.values():
            if isinstance(entry["runs"][0].get(key), float):
                columns[label] = key
    lines = [["", *columns, "seconds"]]
    for name, entry in results.items():
        cells = []
        for key in columns.values():
            has_value = isinstance(entry["runs"][0].get(key), float)
            if not has_value or (key == "win_rate" and not has_win_rate(results, name)):
                cells.append("–")
            else:
                cells.append(mean_and_error(values(results, name, key)))
        lines.append([name, *cells, seconds_text(results, name)])
    return aligned(lines)


def claim_table(results: dict, claims: list[Claim], header: list[str]) -> str:
    """What each claim measures, and whether it shows: paired differences over seeds. Below the
    table stands how many comparisons there are, since one in forty is above its interval by
    chance."""
    lines = []
    for claim in claims:
        names = [claim.better, claim.worse, claim.better_from, claim.worse_from]
        if not is_measured(results, *[name for name in names if name]):
            continue
        better = gains(results, claim.better, claim.better_from, claim.key)
        worse = gains(results, claim.worse, claim.worse_from, claim.key)
        differences = [one - other for one, other in zip(better, worse)]
        width = half_width(differences)
        line = [
            claim.method,
            claim.text,
            verdict(differences),
            f"{mean_and_error(better)} against {mean_and_error(worse)}",
            f"{statistics.mean(differences):+.3f} ± {width:.3f}",
        ]
        lines.append(line)
    if not lines:
        return NOT_MEASURED
    count = f"{len(lines)} comparisons, {len(results['adpa']['runs'])} seeds each."
    return f"{markdown(header, lines)}\n\n{count}"


def gains(results: dict, name: str, start: str, key: str) -> list[float]:
    """The values of a run, or by how much they are above those of the run that it started from."""
    after = values(results, name, key)
    if not start:
        return after
    return [value - before for value, before in zip(after, values(results, start, key))]


def reward_model_table(results: dict, rows: dict[str, str], kinds: list[str]) -> str:
    """Accuracy of each reward model on all pairs and on each kind, and the oracle's reward of what
    it picks out of eight responses, if that was measured."""
    header = ["", "accuracy, all pairs", *kinds]
    has_best_of_8 = any(BEST_OF_8 + name in results for name in rows.values())
    if has_best_of_8:
        header.append("reward of best of 8")
    lines = []
    for label, name in rows.items():
        if not is_measured(results, name):
            continue
        line = [label]
        for key in [ACCURACY, *[f"accuracy_after/{kind}" for kind in kinds]]:
            line.append(mean_and_error(values(results, name, key)))
        if BEST_OF_8 + name in results:
            line.append(mean_and_error(values(results, BEST_OF_8 + name, "best_of_n_reward")))
        elif has_best_of_8:
            line.append("–")
        lines.append(line)
    return markdown(header, lines) if lines else NOT_MEASURED


def reinforcement_table(results: dict) -> str:
    """The oracle's reward after reinforcement learning with a reward and a price of the KL, and the
    KL that was spent. Where nothing was measured, the block of the figure says so."""
    lines = []
    for label, kind in LEARNED_FROM.items():
        for kl_coef in KL_WEIGHTS:
            name = f"rloo_{kind}_{kl_coef}"
            if name in results:
                spent = mean_and_error(values(results, name, "kl_spent"), digits=2)
                reward = mean_and_error(values(results, name))
                lines.append([label, str(kl_coef), spent, reward])
    if not lines:
        return ""
    return markdown(["learned from", "κ", "KL spent, nats", "oracle reward"], lines)


def score_quality_table(results: dict) -> str:
    """How well PAD's teacher scores, by each part of its score and by the whole."""
    labels = {
        "average log-prob (α = 1)": "average_logp",
        "judgement s_mcq (α = 0)": "judgement",
        "score (α = 0.9)": "score",
    }
    lines = []
    for label, name in labels.items():
        correlations = values(results, "pad", f"{name}/correlation")
        spreads = values(results, "pad", f"{name}/spread")
        favourites = values(results, "pad", f"{name}/favourite")
        line = [
            label,
            mean_and_error(correlations),
            mean_and_error(spreads, digits=2),
            mean_and_error(favourites),
        ]
        lines.append(line)
    header = [
        "teacher's score",
        "correlation with the oracle",
        "best minus worst, nats per token",
        "oracle reward of its favourite",
    ]
    return markdown(header, lines)


# ---------------------------------------------------------------------------------- report: figures
# Grey text, blue and orange have a contrast of 3.2 to 5 on white and on GitHub's dark pages, and
# are different for readers who are colour-blind. The background is transparent.
GREY = "#787d85"
BLUE = "#2f7fe6"
ORANGE = "#d0691f"
COLORS = [BLUE, ORANGE, GREY]
REWARD = "oracle reward of sampled responses"
STEP = "optimiser step"
BEST_POSSIBLE = world.reward.best_possible
# What the picture of the README shows, in two groups.
FIVE = {"DCKD": "dckd", "DPKD": "dpkd", "PAD": "pad", "ADPA": "adpa", "ADPA+": "adpa_plus"}
BASELINES = {
    "DPO on the student": "dpo_student",
    "SFT": "sft",
    "vanilla distillation": "vanilla_kd",
    "KD on the data": "kd_data",
    "DPO on PAD's samples": "pad_dpo",
    "reverse KL, on-policy": "reverse_kl",
    "GKD, on-policy": "gkd",
    "AlignDistil's core": "aligndistil",
}
GAMMAS = {0.1: "adpa_gamma_0.1", 0.7: "adpa", 2: "adpa_gamma_2", 4: "adpa_gamma_4"}
# What a part of RM-Distiller adds is the first reward model against the second.
PARTS = {
    "refinement, with margins": ("rm_margin_refined", "rm_margin_plain"),
    "refinement, Bradley-Terry": ("rm_bt_refined", "rm_bt_plain"),
    "margins, refined pairs": ("rm_margin_refined", "rm_bt_refined"),
    "margins, plain labels": ("rm_margin_plain", "rm_bt_plain"),
    "KL on the teacher's response": ("rm", "rm_margin_refined"),
    "all three": ("rm", "rm_bt_plain"),
}


def draw_figures(results: dict, root: Path):
    """The figures whose runs were made, each with its link on the pages. Of the others no file is
    left, and the page says that they are not measured."""
    for name, (draw, alt, marks) in FIGURES.items():
        path = root / "docs" / name
        is_drawn = draw(results, path)
        if not is_drawn:
            path.unlink(missing_ok=True)
        for page in marks:
            link = os.path.relpath(path, (root / page).parent)
            text = f"![{alt}]({link})" if is_drawn else NOT_MEASURED
            replace_block(root / page, path.stem, text)


@contextmanager
def figure(path: Path, *, title: str, panels: int = 1, height: float = 3.6):
    """Axes to draw on, which become an SVG without a background: the same bytes for the same
    results. Several panels have the same x axis. Text stays text, so labels keep some distance."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "prefdistill"
    matplotlib.rcParams["svg.fonttype"] = "none"
    matplotlib.rcParams["font.size"] = 9.5
    matplotlib.rcParams["axes.spines.right"] = False
    matplotlib.rcParams["axes.spines.top"] = False
    matplotlib.rcParams["axes.grid"] = True
    matplotlib.rcParams["grid.alpha"] = 0.25
    for name in ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"):
        matplotlib.rcParams[name] = GREY
    matplotlib.rcParams["grid.color"] = GREY
    matplotlib.rcParams["legend.frameon"] = False

    canvas, axes = pyplot.subplots(1, panels, figsize=(7.6, height), layout="constrained")
    canvas.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    yield axes
    canvas.savefig(path, metadata={"Date": None, "Title": title}, transparent=True)
    pyplot.close(canvas)


def measured_rows(results: dict, rows: dict[str, str]) -> dict[str, str]:
    """The rows of which there are results."""
    return {label: name for label, name in rows.items() if is_measured(results, name)}


def mean_reward(results: dict, name: str) -> float:
    return statistics.mean(values(results, name))


def total_seconds(results: dict, name: str) -> float:
    """Median seconds of a run and of all runs that it takes something from."""
    return sum(median_seconds(results, needed) for needed in with_needs([name]))


def draw_reward_over_time(results: dict, path: Path) -> bool:
    """Reward against the time of all stages: the five methods and the baselines."""
    methods = measured_rows(results, FIVE)
    baselines = measured_rows(results, BASELINES)
    if not methods or not baselines:
        return False
    title = reward_over_time_title(results, methods, baselines)
    with figure(path, title=title, height=4.8) as axes:
        points = []
        groups = [("methods", methods, "o", BLUE), ("baselines", baselines, "s", ORANGE)]
        for group, rows, marker, color in groups:
            for label, name in rows.items():
                x = total_seconds(results, name)
                y = mean_reward(results, name)
                error = standard_error(values(results, name))
                axes.errorbar(x, y, yerr=error, fmt=marker, color=color, capsize=3)
                points.append((label, x, y, error, color))
            axes.plot([], [], marker, color=color, label=group)
        right = 1.4 * max(x for _, x, _, _, _ in points)
        lowest = min(y - error for _, _, y, error, _ in points)
        axes.set(
            xlim=(0, right),
            ylim=(lowest - 0.04, BEST_POSSIBLE + 0.02),
            xlabel="seconds of all stages that a row needs, on one CPU core",
            ylabel=f"{REWARD} ± standard error",
        )
        label_line(axes, mean_reward(results, "teacher"), "teacher", right)
        label_line(axes, BEST_POSSIBLE, "best possible", right)
        axes.legend(loc="lower right", ncols=2)
        label_points(axes, points)
    return True


def reward_over_time_title(results: dict, methods: dict, baselines: dict) -> str:
    """Whether the best baseline or the best method has the higher reward, by its paired interval,
    and whether it is also faster."""
    method = max(methods, key=lambda label: mean_reward(results, methods[label]))
    baseline = max(baselines, key=lambda label: mean_reward(results, baselines[label]))
    first = values(results, baselines[baseline])
    second = values(results, methods[method])
    answer = verdict([one - other for one, other in zip(first, second)])
    if answer == "not clearly":
        return f"{method} and {baseline} have the highest rewards,\nneither clearly more"
    winner = baseline
    loser = method
    beaten = "methods"
    if answer != "yes":
        winner = method
        loser = baseline
        beaten = "baselines"
    names = methods | baselines
    is_faster = total_seconds(results, names[winner]) < total_seconds(results, names[loser])
    speed = "less" if is_faster else "more"
    winner = winner[0].upper() + winner[1:]
    return f"{winner}: more reward than any of the {beaten},\nin {speed} time than {loser}"


def label_line(axes, y: float, label: str, x: float):
    """A horizontal line with its name above its right end."""
    axes.axhline(y, color=GREY, linestyle="--", linewidth=1)
    axes.annotate(label, (x, y), (-2, 2), textcoords="offset points", ha="right", va="bottom")


def label_points(axes, points: list[tuple]):
    """Writes the label of every point (label, x, y, error, color) beside it, where it covers no
    other label, point or line. Where no place is free, it takes the first."""
    from matplotlib.transforms import Bbox

    axes.figure.canvas.draw()
    renderer = axes.figure.canvas.get_renderer()
    taken = [text.get_window_extent(renderer) for text in axes.texts]
    taken.append(axes.get_legend().get_window_extent(renderer))
    for line in axes.lines:
        if line.get_linestyle() == "--":
            taken.append(line.get_window_extent(renderer).padded(2))
    for _, x, y, error, _ in points:
        lower, upper = axes.transData.transform([(x, y - error), (x, y + error)])
        taken.append(Bbox([lower, upper]).padded(5))
    for label, x, y, _, color in sorted(points, key=lambda point: point[2]):
        for place in PLACES:
            text = write_label(axes, label, (x, y), place, color)
            box = text.get_window_extent(renderer)
            # A tenth wider, for a reader whose machine has another font.
            if text.get_ha() == "left":
                box.x1 += 0.1 * box.width
            else:
                box.x0 -= 0.1 * box.width
            is_inside = axes.bbox.x0 < box.x0 and box.x1 < axes.bbox.x1
            if is_inside and not any(box.overlaps(other) for other in taken):
                break
            text.remove()
        else:
            write_label(axes, label, (x, y), PLACES[0], color)
        taken.append(box)


def write_label(axes, label: str, point: tuple, place: tuple, color: str):
    """A label so many points right of and above a marker, on the right side or on the left."""
    sideways = "left" if place[0] > 0 else "right"
    return axes.annotate(
        label, point, place, textcoords="offset points", ha=sideways, va="center", color=color
    )


# Where a label may stand, in points from its marker.
PLACES = [(8, 0), (-8, 0)]
for distance in range(6, 36, 6):
    PLACES += [(8, -distance), (-8, -distance), (8, distance), (-8, distance)]


def draw_gamma(results: dict, path: Path) -> bool:
    """Reward over ADPA's γ, between the untrained student and the teacher."""
    runs = {gamma: name for gamma, name in GAMMAS.items() if name in results}
    if len(runs) < 2:
        return False
    before = mean_reward(results, "student")
    harmful = []
    for gamma, name in runs.items():
        pairs = zip(values(results, "student"), values(results, name))
        if verdict([untrained - trained for untrained, trained in pairs]) == "yes":
            harmful.append(gamma)
    title = "ADPA: reward over γ"
    if harmful:
        title = f"ADPA at γ = {min(harmful):g} is worse than no training"
    with figure(path, title=title) as axes:
        axes.set_xscale("log")
        means = [mean_reward(results, name) for name in runs.values()]
        errors = [standard_error(values(results, name)) for name in runs.values()]
        axes.errorbar(list(runs), means, yerr=errors, fmt="o", color=BLUE, capsize=3)
        axes.plot(list(runs), means, ":", color=BLUE, linewidth=1)
        axes.set_xticks(list(runs), [f"{gamma:g}" for gamma in runs])
        axes.set(xlabel="γ, weight of the advantage", ylabel=REWARD)
        label_line(axes, before, "student before", max(runs))
        label_line(axes, mean_reward(results, "teacher"), "teacher", max(runs))
    return True


def draw_frozen(results: dict, path: Path) -> bool:
    """DPKD with fresh and with old answers of the student: three curves of each."""
    rows = {"fresh y_s, every 4 steps": "dpkd", "y_s of the untrained student": "dpkd_frozen"}
    if len(measured_rows(results, rows)) < 2:
        return False
    teacher_changes = curve_change(results, "dpkd_frozen", "eval/logp_teacher_answers")
    student_changes = curve_change(results, "dpkd_frozen", "eval/logp_student_answers")
    title = "DPKD with fresh and with old answers y_s of the student"
    if teacher_changes < 0 and student_changes < 0:
        title = "DPKD with old y_s: the teacher's answers become less likely, too"
    panels = {
        "eval/reward": "oracle reward",
        "eval/logp_teacher_answers": "log q of the teacher's answers,\nnats per token",
        "eval/logp_student_answers": "log q of the untrained\nstudent's, nats per token",
    }
    with figure(path, title=title, panels=3) as axes:
        for panel, (key, label) in zip(axes, panels.items()):
            draw_curves(panel, results, rows, key)
            panel.set(xlabel=STEP)
            panel.set_title(label, fontsize=9.5)
        handles, labels = axes[0].get_legend_handles_labels()
        axes[0].figure.legend(handles, labels, loc="outside lower center", ncols=2)
    return True


def curve_change(results: dict, name: str, key: str) -> float:
    """By how much a metric changed from the first to the last evaluation, mean over seeds."""
    changes = []
    for run in results[name]["runs"]:
        points = run["curves"][key]
        changes.append(points[-1][2] - points[0][2])
    return statistics.mean(changes)


def draw_curves(axes, results: dict, rows: dict[str, str], key: str):
    """A metric's mean over seeds ± one standard error, over the steps."""
    for color, (label, name) in zip(COLORS, rows.items()):
        curves = [run["curves"][key] for run in results[name]["runs"]]
        steps = []
        means = []
        low = []
        high = []
        for points in zip(*curves):  # of one moment: [step, tokens, value] of every seed
            steps.append(statistics.mean(point[0] for point in points))
            numbers = [point[2] for point in points]
            mean = statistics.mean(numbers)
            error = standard_error(numbers)
            means.append(mean)
            low.append(mean - error)
            high.append(mean + error)
        axes.plot(steps, means, color=color, label=label)
        axes.fill_between(steps, low, high, color=color, alpha=0.25, linewidth=0)


def draw_parts(results: dict, path: Path) -> bool:
    """What each part of RM-Distiller adds to the accuracy, with 95 % intervals."""
    parts = {label: names for label, names in PARTS.items() if is_measured(results, *names)}
    if not parts:
        return False
    differences = {}
    for label, (first, second) in parts.items():
        pairs = zip(values(results, first, ACCURACY), values(results, second, ACCURACY))
        differences[label] = [one - other for one, other in pairs]
    clear = [label for label in parts if verdict(differences[label]) == "yes"]
    title = "RM-Distiller: what clearly adds accuracy: " + (", ".join(clear) or "no part")
    if len(title) > 70:
        title = f"RM-Distiller: {len(clear)} of {len(parts)} comparisons show a clear gain"
    with figure(path, title=title, height=3.0) as axes:
        for height, label in enumerate(reversed(parts)):
            mean = statistics.mean(differences[label])
            width = half_width(differences[label])
            if math.isinf(width):
                width = 0.0
            color = GREY
            if verdict(differences[label]) != "not clearly":
                color = BLUE if mean > 0 else ORANGE
            axes.errorbar(mean, height, xerr=width, fmt="o", color=color, capsize=3)
        axes.axvline(0, color=GREY, linestyle="--", linewidth=1)
        axes.set_yticks(range(len(parts)), list(reversed(parts)))
        axes.set(xlabel="difference in accuracy on all held-out pairs, with its 95 % interval")
    return True


def draw_kl_spent(results: dict, path: Path) -> bool:
    """The oracle's reward against the KL spent, a line for each reward that was learned from, with
    every seed as a faint dot. What was not measured is left out."""
    if not any(name.startswith("rloo_") for name in results):
        return False
    title = "Reinforcement learning: what the KL buys"
    with figure(path, title=title, height=4.0) as axes:
        for color, (label, kind) in zip(COLORS, LEARNED_FROM.items()):
            x = []
            y = []
            for kl_coef in KL_WEIGHTS:
                name = f"rloo_{kind}_{kl_coef}"
                if name not in results:
                    continue
                spent = values(results, name, "kl_spent")
                axes.plot(spent, values(results, name), ".", color=color, alpha=0.4)
                x.append(statistics.mean(spent))
                y.append(mean_reward(results, name))
            if x:
                axes.plot(x, y, "o-", color=color, label=label)
        axes.set_xscale("log")
        axes.axhline(mean_reward(results, "student"), color=GREY, linestyle="--", linewidth=1)
        axes.set(xlabel="KL to the student before training, nats per response", ylabel=REWARD)
        axes.legend(title="learned from (dashed: no training)", loc="best")
    return True


# Of every figure: what draws it, its text for those who cannot see it, the pages that show it.
FIGURES = {
    "reward_over_time.svg": (
        draw_reward_over_time,
        "Reward against the seconds of all stages, methods and baselines",
        ["README.md", "docs/results.md"],
    ),
    "gamma.svg": (draw_gamma, "ADPA's reward over γ", ["docs/results.md"]),
    "dpkd_frozen.svg": (
        draw_frozen,
        "DPKD with fresh and with old answers of the student: reward and log-probs",
        ["docs/results.md", "docs/dpkd.md"],
    ),
    "rm_parts.svg": (
        draw_parts,
        "What each part of RM-Distiller adds to the accuracy",
        ["docs/results.md"],
    ),
    "rloo.svg": (draw_kl_spent, "Reward against KL spent", ["docs/results.md"]),
}


# --------------------------------------------------------------------------------------------- main
def check_flags(args: Args):
    """Ends the program before any run if it could not do in the end what the flags ask for."""
    if args.report and (args.quick or args.only or args.add):
        stop("--report takes all runs and no others: leave out --quick, --only and --add")
    if args.report and args.playground != "playground":
        stop("--report writes pages of the playground that belongs to them: leave out --playground")
    if args.playground != "playground":
        check_playground(Path(args.playground))
    if args.report and importlib.util.find_spec("matplotlib") is None:
        stop("--report draws figures: pip install -r studies/requirements.txt")
    if args.responses < 0:
        stop(f"--responses {args.responses} must be at least 0")
    if args.seeds < 1 or args.at_once < 1:
        stop(f"--seeds {args.seeds} and --at_once {args.at_once} must be at least 1")
    try:
        re.compile(args.only)
    except re.error as error:
        stop(f"--only {args.only} is no regular expression: {error}")


def main(args: Args):
    check_flags(args)
    added = added_runs(args.add)
    seed_count = 1 if args.quick else args.seeds
    seeds = range(args.first_seed, args.first_seed + seed_count)
    names = README_RUNS
    if not args.quick:
        names = [name for name in RUNS if re.search(args.only, name)]
    if not names:
        stop(f"--only {args.only} matches none of: {', '.join(RUNS)}")
    RUNS.update(added)
    names = with_needs([*names, *added])
    output_dir = ROOT / (args.output_dir or "runs/compare")
    if args.playground != "playground":
        folder = Path(args.playground).resolve()
        output_dir = ROOT / (args.output_dir or f"runs/compare_{folder.name}")
        for name in RUNS:
            RUNS[name] = on_playground(RUNS[name], str(folder))
    if args.responses and "student" in RUNS:
        # Win rates are against the untrained student's responses.
        names = with_needs([*names, "student"])

    make_worlds(names, output_dir)
    execute_all(names, seeds, output_dir, args.at_once, responses=args.responses)
    results = collect(names, seeds, output_dir)
    if args.report:
        text = json.dumps(results, indent=1, sort_keys=True)
        (ROOT / "docs/results.json").write_text(text + "\n")
        report(results, ROOT)
    print(result_table(results))
    folders = [run_folder(output_dir, name, seeds[0]) for name in names]
    # What is only measured, because nothing is trained, is no run.
    folders = [os.path.relpath(run) for run in folders if (run / "args.json").exists()]
    if folders:
        print(f"flags and stages side by side: python -m studies.table {shlex.join(folders[:3])}")
    if not args.report:
        print("README.md and docs/ are left as they are; --report makes them anew")


if __name__ == "__main__":
    args = parse_flags(Args, __doc__)
    try:
        main(args)
    except KeyboardInterrupt:
        advice = "finished runs are kept, and the same command goes on"
        raise SystemExit(f"interrupted; {advice}") from None
