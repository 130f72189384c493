"""What a person sees: --help, and what a run prints on a terminal and into a log file."""

import contextlib
import dataclasses
import importlib
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import (
    ROOT,
    SCRIPTS,
    TINY_RUN,
    command_line,
    flags_it_has,
    one_short,
    read_jsonl,
    write_jsonl,
)
from safetensors.torch import load_file

import adpa
import common
from common import Bar, duration, parse_flags

every_script = pytest.mark.parametrize("script", one_short(SCRIPTS, "dckd"))
GROUPS = ["method", "optimisation", "models and data", "evaluation and output"]


# ------------------------------------------------------------------------------------- r51: --help
def help_of(script: str, **environment) -> str:
    """What `python <script>.py --help` prints on a terminal of 80 columns."""
    done = subprocess.run(
        [sys.executable, f"{script}.py", "--help"],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "80", **environment},
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def flags_in(text: str) -> list[str]:
    """The flags that stand at the beginning of a line of a panel, in order."""
    return re.findall(r"^[│ ] --(\w+)", text, re.M)


@every_script
def test_r51_help_shows_the_flags_in_groups_with_those_of_the_method_first(script):
    module = importlib.import_module(script)
    text = help_of(script)
    titles = re.findall(r"─ ([a-z ]+) options ─", text)
    assert titles == GROUPS
    assert max(len(line) for line in text.splitlines()) <= 80
    names = [flag.name for flag in dataclasses.fields(module.Args)]
    assert flags_in(text) == names
    panels = text.split(" options ─")[-4:]
    first_of_group = [flags_in(panel)[0] for panel in panels]
    assert first_of_group[1:] == ["learning_rate", "student", "eval_data"]
    assert len(re.findall(r"\(default: ", text)) <= len(names)
    assert "(default: '')" not in text


@pytest.mark.slow
def test_r51_help_can_be_read_where_there_is_no_utf_8():
    """A character that cannot be printed is printed as its number: γ is U+03B3."""
    text = help_of("adpa", PYTHONIOENCODING="ascii")
    assert text.isascii()
    assert r"\u03b3, weight of the advantage term" in " ".join(text.split())


@pytest.mark.parametrize("module", ["playground.chat", "studies.compare", "studies.measure"])
def test_r51_the_other_programs_spell_flags_the_same_way(module, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    module = importlib.import_module(module)
    with pytest.raises(SystemExit) as stopped:
        parse_flags(module.Args, module.__doc__, ["--help"])
    text = capsys.readouterr().out
    assert stopped.value.code == 0
    names = [flag.name for flag in dataclasses.fields(module.Args)]
    assert [name for name in names if name in flags_in(text)] == flags_in(text)
    assert len(flags_in(text)) >= len(names) - 1  # one may be an argument without a name
    assert not re.search(r"--\w+-\w", text.replace("--no-", ""))
    assert "(default: '')" not in text


@every_script
def test_r51_a_flag_has_two_spellings_and_one_value(script):
    module = importlib.import_module(script)
    words = ["--batch-size", "3", "--eval_every", "5", "--no-gradient-checkpointing"]
    args = parse_flags(module.Args, module.__doc__, words)
    assert args == module.Args(batch_size=3, eval_every=5)


# ------------------------------------------------------------------------------- r52: bars and logs
class Clock:
    """Time that goes on by `tick` seconds whenever it is asked for."""

    def __init__(self, tick: float):
        self.now = 0.0
        self.tick = tick

    def time(self) -> float:
        self.now += self.tick
        return self.now


@pytest.mark.parametrize("tick", [0.001, 1.0, 60.0])
def test_r52_a_log_file_gets_at_most_twenty_lines_a_stage(tick, monkeypatch, capsys):
    monkeypatch.setattr(common, "time", Clock(tick))
    with Bar("answers", 1000, "prompts") as bar:
        for count in [300] + [1] * 700:
            bar.advance(count, loss=1 / count)
    text = capsys.readouterr().err
    lines = text.splitlines()
    assert "\r" not in text and 1 <= len(lines) <= 21
    assert lines[-1].startswith("answers: 1000 of 1000 prompts, loss 1, ")
    if tick == 0.001:
        assert len(lines) == 1  # work that is over in a second leaves one line
    else:
        assert len(lines) > 10
        line = r"answers: 3\d\d of 1000 prompts, loss \S+, .* so far, .* to go"
        assert re.fullmatch(line, lines[0])


def test_r52_short_work_may_stay_silent(capsys):
    with Bar("encoding", 10, "rows", delay=100) as bar:
        bar.advance(10)
    assert capsys.readouterr().err == ""


def test_r52_a_bar_on_a_terminal_shows_the_newest_values(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    monkeypatch.setattr(sys, "stderr", Terminal())
    with Bar("training", 4, "steps", done=1) as bar:
        bar.advance(1, loss=0.75, reward=None)
        bar.advance(1, loss=0.5, reward=1.125)
        bar.advance(1, loss=0.25, reward=None)
    last = sys.stderr.getvalue().rstrip().rsplit("\r", 1)[-1]
    assert "4 of 4 steps" in last
    assert "loss 0.25, reward 1.12" in last


def test_durations_are_read_as_people_say_them():
    assert [duration(seconds) for seconds in (0.4, 59.6, 100, 7325)] == [
        "0 s",
        "1 min 0 s",
        "1 min 40 s",
        "2 h 2 min",
    ]


# ---------------------------------------------------------------------- r53: what a run prints
every_script_and_baselines = pytest.mark.parametrize(
    "script", one_short([*SCRIPTS, "studies/baselines"], "dckd")
)


@pytest.fixture
def own_flags(checkpoints, pairs, tmp_path) -> dict[str, dict]:
    """What a script needs besides to run on random models."""
    rows = []
    for row in read_jsonl(pairs):
        rows.append({**row, "refined": f"{row['chosen']} indeed", "teacher": "a word"})
        rows[-1] |= {
            "score_refined": 8,
            "score_chosen": 6,
            "score_rejected": 2,
            "teacher": "a word",
        }
    annotations = write_jsonl(tmp_path / "annotations.jsonl", rows)
    return {
        "adpa": {"teacher_ref": checkpoints["teacher_ref"]},
        "dckd": {},
        "dpkd": {},
        "pad": {"alpha": 1, "num_answers": 2},
        "rm_distiller": {"annotations": annotations},
        "studies/baselines": {},
    }


def printed_by(run_tiny, script: str, **flags) -> tuple[Path, str]:
    """A run, and all that it prints, into one log file as it were."""
    log = io.StringIO()
    with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        run = run_tiny(script, **flags)
    return run, log.getvalue()


def parameters_of(model: str) -> str:
    """How many numbers are in a checkpoint, as people write it."""
    count = sum(tensor.numel() for tensor in load_file(Path(model) / "model.safetensors").values())
    return f"{count:,} parameters"


def facts_of(text: str) -> dict[str, str]:
    """{"device": "cpu", ...} from lines whose second column begins at the same place."""
    return {line[:17].strip(): line[18:] for line in text.splitlines() if line[17:18] == " "}


@every_script_and_baselines
def test_r53_a_run_says_what_it_is_before_any_work(script, run_tiny, own_flags, checkpoints):
    run, text = printed_by(run_tiny, script, **own_flags[script], num_epochs=3, max_steps=0)

    first_stage = re.search(r"^(eval_before|training): ", text, re.M).start()
    start = text[:first_stage]
    facts = facts_of(start)
    assert start.splitlines()[0] == f"run folder        {run}"
    assert facts["if interrupted"] == f"go on with --resume {run}"
    assert facts["device"] == "cpu"
    assert parameters_of(checkpoints["teacher"]) in facts["teacher"]
    assert facts["teacher"].endswith("float32, frozen")
    assert facts["student"].startswith(f"{checkpoints['student']}: ")
    assert facts["student"].endswith("float32, trained")
    if script != "rm_distiller":  # to which it adds a reward head
        assert parameters_of(checkpoints["student"]) in facts["student"]
    assert facts["training data"].endswith(".jsonl") and facts["held-out data"].endswith(".jsonl")
    kept = [name for name, fact in facts.items() if fact == "8 of 8 rows"]
    assert [name for name in kept if name.startswith("held-out")]
    assert [name for name in kept if name.startswith("training")] or script == "rm_distiller"
    # Eight rows in one batch: three epochs are three steps.
    assert facts["training"] == "at most 3 steps of 8, 3 epochs over 8 examples"
    steps = [row["step"] for row in read_jsonl(run / "metrics.jsonl")]
    assert steps == [0, 1, 2, 3]

    # A log file stays readable.
    assert "\r" not in text
    assert len(text.splitlines()) < 80
    assert "{'" not in text  # no dictionary as Python prints it


def test_r53_the_table_at_the_end_shows_what_the_run_has_written(run_tiny, checkpoints):
    flags = {"eval_prompts": 8, "teacher_ref": checkpoints["teacher_ref"], "max_steps": 3}
    run, text = printed_by(run_tiny, "adpa", **flags)

    rewards = {}
    for name in ("before", "after", "teacher"):
        rewards[name] = [row["reward"] for row in read_jsonl(run / f"eval_{name}.jsonl")]
    pairs = list(zip(rewards["before"], rewards["after"]))
    better = sum(now > before for before, now in pairs) / 8
    worse = sum(now < before for before, now in pairs) / 8
    facts = facts_of(text[text.index("responses to 8 different prompts") :])
    assert float(facts["before"]) == pytest.approx(sum(rewards["before"]) / 8, abs=6e-4)
    assert float(facts["teacher"]) == pytest.approx(sum(rewards["teacher"]) / 8, abs=6e-4)
    now, words = facts["now"].split(maxsplit=1)
    assert float(now) == pytest.approx(sum(rewards["after"]) / 8, abs=6e-4)
    assert words == f"better than before on {better:.0%} of prompts, worse on {worse:.0%}"
    assert "best possible" not in facts  # conftest.vowels does not say it
    # The responses stand above it, under a header.
    samples = text[text.index("\nresponses to held-out prompts, each behind its reward\n") :]
    first = read_jsonl(run / "eval_after.jsonl")[0]
    assert f"    now     {first['reward']:6.2f}   {common.one_line(first['text'])}\n" in samples


def evaluation(rewards: list) -> list[dict]:
    """Rows of an evaluation with these rewards, each to a prompt of its own."""
    rows = []
    for number, reward in enumerate(rewards):
        chat = [{"role": "user", "content": f"prompt {number}"}]
        rows.append({"prompt": chat, "text": "x", "reward": reward})
    return rows


def test_r53_a_prompt_without_both_rewards_is_in_no_share(capsys):
    """Of the four prompts, two have both rewards: one rises and one falls."""
    before = evaluation([1.0, None, 1.0, 1.0])
    now = evaluation([2.0, 5.0, None, 0.0])
    common.print_rewards({"before": before, "now": now}, best_possible=None)
    text = capsys.readouterr().out
    facts = facts_of(text)
    assert "mean over those that have one, of 4 responses to 4 different prompts" in text
    assert facts["before"].strip() == "1.000"
    assert facts["now"].strip() == "2.333   better than before on 50% of prompts, worse on 50%"


def test_r53_a_table_fits_a_terminal_of_80_columns(capsys):
    rows = evaluation([-1.0] * 999)
    common.print_rewards({"before": rows, "now": evaluation([1.0] * 999)}, best_possible=1.2)
    assert max(len(line) for line in capsys.readouterr().out.splitlines()) <= 80


def test_r53_the_best_possible_reward_is_shown_where_the_function_says_it():
    rewards = [-1.0, 0.45, 1.2]
    reward_fn = common.load_reward_function("playground.world:reward", torch.device("cpu"))
    assert reward_fn.best_possible == max(rewards) == 1.2
    assert common.load_reward_function("conftest:vowels", "cpu").best_possible is None


def test_r53_one_prompt_is_shown_once_and_long_texts_are_cut(capsys):
    prompts = ["one", "one", "two", "three", "four", "five"]
    rows = []
    for prompt in prompts:
        chat = [{"role": "user", "content": prompt}]
        rows.append({"prompt": chat, "text": "word\n" * 1000, "finished": True})
    common.print_samples({"before": rows, "now": rows})
    text = capsys.readouterr().out
    shown = [line.strip() for line in text.splitlines() if re.fullmatch(r"  \w+", line)]
    assert shown == ["one", "two", "three", "four"]
    assert max(len(line) for line in text.splitlines()) < 350


@pytest.mark.parametrize(
    "stage_seconds, expected",
    [(19, "20 s"), (65, "20 s since --resume; stages took 1 min 5 s in all")],
)
def test_r53_a_resumed_run_says_what_it_took_before(stage_seconds, expected, tmp_path, capsys):
    summary = {"stage_seconds": {"eval_before": stage_seconds - 15, "training": 15}}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    common.print_end(tmp_path, adpa.Args(), seconds=20)
    assert facts_of(capsys.readouterr().out)["time"] == expected


def commands_at_the_end(text: str) -> dict[str, str]:
    names = ("chat", "use as a reward", "compare", "curves")
    return {name: fact for name, fact in facts_of(text).items() if name in names}


@pytest.mark.slow
@pytest.mark.parametrize("folder", [str(ROOT), "/"], ids=["project", "elsewhere"])
def test_r53_the_commands_at_the_end_can_be_typed(folder, run_tiny, checkpoints, capsys):
    run = run_tiny("adpa", teacher_ref=checkpoints["teacher_ref"])
    run_tiny("dckd")
    capsys.readouterr()
    args = adpa.Args(track="tensorboard")
    with contextlib.chdir(folder):
        common.print_end(run, args, 100)
    commands = commands_at_the_end(capsys.readouterr().out)
    assert commands.keys() == {"chat", "compare", "curves"}
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for name in ("chat", "compare"):
        done = subprocess.run(
            commands[name],
            shell=True,
            cwd=folder,
            env=environment,
            input="Hello\n",
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip()
    assert f"{run.parent / 'run1'}" in commands["compare"]  # the other run
    assert commands["curves"] == f"tensorboard --logdir {run}"


@pytest.mark.slow
def test_r53_everything_can_be_printed_where_there_is_no_utf_8(own_flags, checkpoints, tmp_path):
    """With letters that ASCII does not have in the data, in a process of its own."""
    path = own_flags["rm_distiller"]["annotations"]
    rows = read_jsonl(path)
    for row in rows:
        row["refined"] += " \u017elu\u0165ou\u010dk\u00fd \U0001f98a"
    write_jsonl(path, rows)
    flags = {
        **flags_it_has("rm_distiller", TINY_RUN),
        **own_flags["rm_distiller"],
        "student": checkpoints["student"],
        "teacher": checkpoints["teacher"],
        "eval_data": path,
        "output_dir": tmp_path / "run",
    }
    done = subprocess.run(
        [sys.executable, "rm_distiller.py", *command_line(flags)],
        cwd=ROOT,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.isascii()
    assert rb"\u017elu\u0165ou\u010dk\xfd \U0001f98a" in done.stdout


# ------------------------------------------------------------------------------ r54: what is logged
@every_script_and_baselines
def test_r54_metrics_begin_with_the_untrained_student(script, run_tiny, own_flags):
    """The curves of all methods start at the same point."""
    run = run_tiny(script, **own_flags[script])
    first = read_jsonl(run / "metrics.jsonl")[0]
    assert first["step"] == 0
    if script == "rm_distiller":
        assert 0 <= first["eval/accuracy"] <= 1
    else:
        rewards = [row["reward"] for row in read_jsonl(run / "eval_before.jsonl")]
        assert first["eval/reward"] == pytest.approx(sum(rewards) / len(rewards))


@pytest.mark.parametrize("script", ["dckd", "rm_distiller"])
def test_r54_tensorboard_shows_flags_step_0_and_responses(script, run_tiny, own_flags):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = run_tiny(script, **own_flags[script], track="tensorboard")
    events = EventAccumulator(str(run))
    events.Reload()

    def texts(tag: str) -> dict[int, str]:
        shown = events.Tensors(f"{tag}/text_summary")
        return {event.step: event.tensor_proto.string_val[0].decode() for event in shown}

    assert "--batch_size 8\n" in texts("flags")[0]
    key = "eval/accuracy" if script == "rm_distiller" else "eval/reward"
    expected = {row["step"]: row[key] for row in read_jsonl(run / "metrics.jsonl")}
    logged = {event.step: event.value for event in events.Scalars(key)}
    assert logged == pytest.approx(expected)
    if script == "rm_distiller":
        assert "A thing. indeed" in texts("responses")[0]
    else:
        for step, name in ((0, "before"), (1, "after")):
            first = read_jsonl(run / f"eval_{name}.jsonl")[0]
            assert common.one_line(first["text"]) in texts("responses")[step]
