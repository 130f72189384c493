"""What a person sees: --help, and what a run prints on a terminal and into a log file."""

import dataclasses
import importlib
import io
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT, SCRIPTS, read_jsonl, write_jsonl

import common
from common import Bar, duration, parse_flags

every_script = pytest.mark.parametrize("script", SCRIPTS)
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
    return re.findall(r"^│ --(\w+)", text, re.M)


@every_script
def test_r51_help_shows_the_flags_in_groups_with_those_of_the_method_first(script):
    module = importlib.import_module(script)
    text = help_of(script)
    titles = re.findall(r"─ ([a-z ]+) options ─", text)
    assert titles == GROUPS
    names = [flag.name for flag in dataclasses.fields(module.Args)]
    assert flags_in(text) == names
    panels = text.split(" options ─")[-4:]
    first_of_group = [flags_in(panel)[0] for panel in panels]
    assert first_of_group[1:] == ["learning_rate", "student", "eval_data"]
    assert len(re.findall(r"\(default: ", text)) <= len(names)
    assert "(default: '')" not in text


def test_r51_help_can_be_read_where_there_is_no_utf_8():
    """A character that cannot be printed is printed as its number: γ is U+03B3."""
    text = help_of("adpa", PYTHONIOENCODING="ascii")
    assert text.isascii()
    assert r"\u03b3, weight of the advantage term" in " ".join(text.split())


@every_script
def test_r51_a_flag_has_two_spellings_and_one_value(script):
    module = importlib.import_module(script)
    words = ["--batch-size", "3", "--eval_prompts", "5", "--no-gradient-checkpointing"]
    args = parse_flags(module.Args, module.__doc__, words)
    assert args == module.Args(batch_size=3, eval_prompts=5)


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


# ------------------------------------------------------------------------------ r54: what is logged
@pytest.fixture
def own_flags(checkpoints, pairs, tmp_path) -> dict[str, dict]:
    """What a script needs besides to run on random models."""
    rows = []
    for row in read_jsonl(pairs):
        rows.append({**row, "refined": f"{row['chosen']} indeed"})
        rows[-1] |= {"score_refined": 8, "score_chosen": 6, "score_rejected": 2}
    annotations = write_jsonl(tmp_path / "annotations.jsonl", rows)
    return {
        "adpa": {"teacher_ref": checkpoints["teacher_ref"]},
        "dckd": {},
        "dpkd": {},
        "pad": {"alpha": 1, "num_answers": 2},
        "rm_distiller": {"annotations": annotations, "kl_coef": 0, "best_of": 2},
        "studies/baselines": {},
    }


@pytest.mark.parametrize("script", [*SCRIPTS, "studies/baselines"])
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
