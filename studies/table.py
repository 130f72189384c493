"""Run folders side by side: `python -m studies.table RUN RUN ...`.

The table has a column for each run: the flags that differ, the results with their standard errors
over prompts, and seconds by stage. Runs of all scripts and of forks mix, and so do runs that are
not finished. With `--output` it is written to a file as well.

    python -m studies.table runs/adpa__* runs/dckd__*
    python -m studies.table runs/* --output table.csv

Nothing here imports torch, so the table comes at once.
"""

import csv
import json
import shutil
import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path

import tyro

ROOT = Path(__file__).parent.parent


@dataclass
class Args:
    runs: tyro.conf.Positional[list[str]]
    """run folders, of which the first is the one that the others are compared with"""
    output: str = ""
    """file to write the table to as well: .csv (a line for each run, all digits) or .md"""


def stop(message: str):
    """Ends the program with one line and exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


# --------------------------------------------------------------------------------- what a run holds
@dataclass
class Measured:
    """A number, and its standard error where it has one."""

    value: float
    error: float | None = None
    digits: int = 3

    def __str__(self) -> str:
        text = f"{self.value:.{self.digits}f}"
        return text if self.error is None else f"{text} ± {self.error:.{self.digits}f}"


@dataclass
class Run:
    """What the files of a run folder say."""

    folder: Path
    script: str
    state: str
    flags: dict
    results: dict[str, Measured | str] = field(default_factory=dict)
    seconds: dict[str, Measured] = field(default_factory=dict)
    rewards: dict[str, float] = field(default_factory=dict)  # of the trained student, by row id


def is_run(folder: Path) -> bool:
    return (folder / "args.json").exists()


def read_run(folder: Path) -> Run:
    """The run in a folder. The program ends if there is none."""
    if not is_run(folder):
        stop(f"{folder} is no run folder: it has no args.json")
    flags = read_json(folder / "args.json")
    metrics = read_jsonl(folder / "metrics.jsonl")
    timings = read_json(folder / "timings.json")
    step = metrics[-1]["step"] if metrics else 0
    if not (folder / "summary.json").exists():
        run = Run(folder, script_of_name(folder), f"unfinished, step {step}", flags)
        # As soon as there are metrics, the evaluations before training are complete.
        if metrics:
            add_rewards(run, ["before", "teacher"])
            add_last_evaluation(run, metrics)
        add_seconds(run, timings, 0.0)
        return run

    summary = read_json(folder / "summary.json")
    script = summary.get("script", script_of_name(folder))
    run = Run(folder, script, f"finished, step {step}", flags)
    add_rewards(run, ["before", "after", "teacher"])
    for row in read_jsonl(folder / "eval_after.jsonl"):
        if row.get("reward") is not None:
            run.rewards[row["id"]] = row["reward"]
    if "win_rate" in summary:
        run.results["win rate"] = Measured(summary["win_rate"], summary.get("win_rate_stderr"))
    add_accuracy(run, summary)
    if not run.results:
        run.state += ", no rewards"
    add_seconds(run, summary.get("stage_seconds", timings), summary.get("seconds", 0.0))
    return run


def read_json(path: Path) -> dict:
    """The object in a file, or {} if there is no file. The program ends if it cannot be read."""
    if not path.exists():
        return {}
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        stop(f"cannot read {path}: {error}")


def read_jsonl(path: Path) -> list[dict]:
    """The rows of a file, without a last line that a kill cut. [] if there is no file."""
    if not path.exists():
        return []
    rows = []
    try:
        for line in path.read_text().splitlines(keepends=True):
            if line.endswith("\n"):
                rows.append(json.loads(line))
    except (OSError, ValueError) as error:
        stop(f"cannot read {path}: {error}")
    return rows


def script_of_name(folder: Path) -> str:
    """The script of a run whose folder has the default name, <script>__<seed>__<time>."""
    script, separator, _ = folder.resolve().name.partition("__")
    return script if separator else ""


def add_rewards(run: Run, names: list[str]):
    """The mean rewards of evaluations. A run with --reward none has none, and a reward function
    may leave out some responses."""
    for name in names:
        rows = read_jsonl(run.folder / f"eval_{name}.jsonl")
        rewards = [row["reward"] for row in rows if row.get("reward") is not None]
        if rewards:
            run.results[f"reward {name}"] = mean_and_error(rewards)


def add_last_evaluation(run: Run, metrics: list[dict]):
    """What an unfinished run measured last, and when."""
    for label, key in {"reward after": "eval/reward", "accuracy after": "eval/accuracy"}.items():
        evaluated = [row for row in metrics if key in row and row["step"] > 0]
        if evaluated:
            run.results[label] = f"{evaluated[-1][key]:.3f} at step {evaluated[-1]['step']}"


def add_accuracy(run: Run, summary: dict):
    """The results of a reward model: shares of pairs that it orders right, over all pairs and by
    subset. And of `studies.best_of_n`, what the response is worth that it picks."""
    if "accuracy_before" in summary:
        run.results["accuracy before"] = Measured(summary["accuracy_before"])
    for name, (mean, error, _) in summary.get("accuracy", {}).items():
        label = f"accuracy after, {name}"
        if name == "all":
            label = "accuracy after"
        run.results[label] = Measured(mean, error)
    if "best_of_n_reward" in summary:
        run.results["reward of the best of n"] = Measured(summary["best_of_n_reward"])


# These come last, whatever other stages a script has.
LAST_STAGES = ["training", "eval_after", "everything else", "in all"]


def add_seconds(run: Run, stages: dict[str, float], seconds: float):
    """Seconds by stage. `seconds` is of the last process, so a resumed run has at least its stages'
    sum. What is no stage is loading, evaluations during training and saving."""
    total = max(seconds, sum(stages.values()))
    if not total:
        return
    run.seconds = {stage: Measured(value, digits=1) for stage, value in stages.items()}
    if seconds:
        run.seconds["everything else"] = Measured(total - sum(stages.values()), digits=1)
    run.seconds["in all"] = Measured(total, digits=1)


def mean_and_error(values: list[float]) -> Measured:
    """The mean and its standard error, as the scripts compute them."""
    return Measured(statistics.mean(values), statistics.pstdev(values) / len(values) ** 0.5)


def wins(ours: dict[str, float], theirs: dict[str, float]) -> Measured | None:
    """The mean over the prompts that have both rewards: 1 for a higher reward than theirs, ½ for an
    equal one, 0 for a lower one. None if there is no such prompt."""
    points = []
    for row_id in ours.keys() & theirs.keys():
        if ours[row_id] == theirs[row_id]:
            points.append(0.5)
        else:
            points.append(float(ours[row_id] > theirs[row_id]))
    return mean_and_error(points) if points else None


# ---------------------------------------------------------------------------------------- the table
@dataclass
class Row:
    """A line of the table: a cell for each run, None where a run has nothing to show."""

    group: str
    label: str
    cells: list


def table_rows(runs: list[Run]) -> list[Row]:
    """All lines, in groups."""
    rows = [
        Row("run", "script", [run.script or None for run in runs]),
        Row("run", "state", [run.state for run in runs]),
    ]
    rows += flag_rows(runs)
    for label in ordered_labels([run.results for run in runs], last=[]):
        rows.append(Row("results", label, [run.results.get(label) for run in runs]))
    against_first = [None] + [wins(run.rewards, runs[0].rewards) for run in runs[1:]]
    if any(against_first):
        rows.append(Row("results", "beats the first run", against_first))
    for label in ordered_labels([run.seconds for run in runs], last=LAST_STAGES):
        rows.append(Row("seconds", label, [run.seconds.get(label) for run in runs]))
    return rows


def flag_rows(runs: list[Run]) -> list[Row]:
    """The flags that differ, and those that only some of the scripts have."""
    rows = []
    for flag in ordered_labels([run.flags for run in runs], last=[]):
        if flag in ("output_dir", "resume"):
            continue
        values = [json.dumps(run.flags.get(flag)) for run in runs]
        has_flag = [flag in run.flags for run in runs]
        if len(set(values)) > 1 or not all(has_flag):
            rows.append(Row("flags that differ", flag, [flag_cell(run, flag) for run in runs]))
    return rows


def flag_cell(run: Run, flag: str):
    """The value of a flag, and None if the script has no such flag."""
    if flag not in run.flags:
        return None
    value = run.flags[flag]
    if isinstance(value, list):
        return " ".join(str(part) for part in value)
    return "None" if value is None else value


def ordered_labels(dicts: list[dict], last: list[str]) -> list[str]:
    """All keys once, in the order in which they come first, then those of `last`."""
    labels = []
    for keys in dicts:
        labels += [key for key in keys if key not in labels]
    ordered = [label for label in labels if label not in last]
    return ordered + [label for label in last if label in labels]


def notes(runs: list[Run]) -> list[str]:
    """What the numbers leave out: the runs that a run took something from."""
    lines = []
    for run in runs:
        for flag, value in run.flags.items():
            source = source_run(value)
            if flag in ("output_dir", "resume") or source is None:
                continue
            line = f"{run.folder.name} took --{flag} from {source}, whose seconds come on top"
            if flag == "student":
                line += ", and its win rate is against that student"
            lines.append(line)
    return lines


def source_run(value) -> Path | None:
    """The run folder that a flag's value lies in, if it is a path into one."""
    if not isinstance(value, str) or not value:
        return None
    path = Path(value)
    for folder in (path, *path.parents):
        if (folder / "args.json").exists():
            return folder
    return None


# ------------------------------------------------------------------------------ printed and written
def cell_text(cell) -> str:
    """A cell as it is shown. Long paths keep their end."""
    if cell is None:
        return "–"
    text = '""' if cell == "" else str(cell)
    return text if len(text) <= 40 else "…" + text[-39:]


def aligned(lines: list[list[str]]) -> str:
    """Texts in columns: the first to the left, all others to the right."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    padded = []
    for first, *others in lines:
        cells = [first.ljust(widths[0])]
        cells += [text.rjust(width) for text, width in zip(others, widths[1:])]
        padded.append("  ".join(cells).rstrip())
    return "\n".join(padded)


def markdown(header: list[str], lines: list[list[str]]) -> str:
    """A table of texts."""
    written = []
    for cells in [header, ["---"] * len(header), *lines]:
        written.append(f"| {' | '.join(cells)} |")
    return "\n".join(written)


def run_names(runs: list[Run]) -> list[str]:
    """The names of their folders, or the paths where two names are equal."""
    names = [run.folder.resolve().name for run in runs]
    return names if len(set(names)) == len(names) else [str(run.folder) for run in runs]


def print_table(runs: list[Run], rows: list[Row], width: int):
    """Prints as many runs side by side as fit, and the others below them."""
    names = run_names(runs)
    label_width = max(len(row.label) for row in rows) + 2
    blocks = [[]]
    used = label_width
    for index, name in enumerate(names):
        texts = [cell_text(row.cells[index]) for row in rows]
        column = max(len(text) for text in [name, *texts])
        if blocks[-1] and used + column + 2 > width:
            blocks.append([])
            used = label_width
        blocks[-1].append(index)
        used += column + 2

    for block in blocks:
        lines = [[""] + [names[index] for index in block]]
        group = "run"
        for row in rows:
            cells = [row.cells[index] for index in block]
            if all(cell is None for cell in cells):
                continue
            if row.group != group:
                lines.append([row.group] + [""] * len(block))
                group = row.group
            lines.append([f"  {row.label}"] + [cell_text(cell) for cell in cells])
        print(aligned(lines), end="\n\n")


def write_markdown(path: Path, runs: list[Run], rows: list[Row]):
    lines = []
    for row in rows:
        cells = [cell_text(cell).replace("|", "\\|") for cell in row.cells]
        lines.append([f"{row.group}: {row.label}", *cells])
    path.write_text(markdown(["", *run_names(runs)], lines) + "\n")


def write_csv(path: Path, runs: list[Run], rows: list[Row]):
    """A line for each run. A number with an error has two columns."""
    columns = {"run": [str(run.folder) for run in runs]}
    for row in rows:
        name = f"{row.group}: {row.label}"
        cells = [cell.value if isinstance(cell, Measured) else cell for cell in row.cells]
        errors = [cell.error if isinstance(cell, Measured) else None for cell in row.cells]
        columns[name] = cells
        if any(error is not None for error in errors):
            columns[f"{name}, standard error"] = errors
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values()))


def check_output(output: str):
    """Ends the program if the table cannot be written there. The pages are nothing to write to."""
    path = Path(output).resolve()
    if path.suffix not in (".csv", ".md"):
        stop(f"--output {output} must end in .csv or .md")
    if path == ROOT / "README.md" or path.is_relative_to(ROOT / "docs"):
        stop(f"--output {output} is a page of the project; take another file")


def main(args: Args):
    if not args.runs:
        stop("name at least one run folder")
    if args.output:
        check_output(args.output)
    folders = [Path(folder) for folder in args.runs]
    # Among runs/* may be other folders, such as runs/compare.
    others = [folder for folder in folders if folder.is_dir() and not is_run(folder)]
    folders = [folder for folder in folders if folder not in others]
    if not folders:
        stop(f"{others[0]} is no run folder: it has no args.json")
    runs = [read_run(folder) for folder in folders]
    rows = table_rows(runs)
    print_table(runs, rows, width=shutil.get_terminal_size((100, 24)).columns)
    if any(row.group == "results" for row in rows):
        print("± is a standard error over prompts, and a tie counts ½ of a win. The win rate is")
        print("against the student that a run began with.")
    for line in notes(runs):
        print(f"note: {line}")
    for folder in others:
        print(f"note: {folder} is no run folder and is left out: it has no args.json")
    if args.output:
        write = write_csv if args.output.endswith(".csv") else write_markdown
        try:
            write(Path(args.output), runs, rows)
        except OSError as error:
            stop(f"cannot write {args.output}: {error}")


if __name__ == "__main__":
    name = "python -m studies.table"
    args = tyro.cli(Args, prog=name, description=__doc__, use_underscores=True)
    try:
        main(args)
        sys.stdout.flush()
    except BrokenPipeError:  # nobody reads on, as in `python -m studies.table runs/* | head`
        sys.stderr.close()
