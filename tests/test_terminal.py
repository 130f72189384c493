"""What a person sees: --help, and what a run prints on a terminal and into a log file."""

import dataclasses
import importlib
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT, SCRIPTS

from common import parse_flags

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
