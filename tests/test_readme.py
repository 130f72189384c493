"""The commands of README.md, of the pages in docs/ and of the scripts' docstrings: the first is run
as it stands, and every other one is read by the script's own command line (r50)."""

import ast
import contextlib
import importlib
import importlib.util
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import tyro
from conftest import ROOT, SCRIPTS, one_error_line, write_jsonl

from common import cached_map, read_rows

README = (ROOT / "README.md").read_text()
PAGES = [
    ROOT / "README.md",
    ROOT / "playground" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]


def fenced(text: str, *languages: str) -> list[str]:
    """The blocks between ``` lines of one of the languages."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", text, re.S | re.M)
    return [block for language, block in blocks if language in languages]


def commands(text: str) -> list[list[str]]:
    """The words of every command. Lines that end with a backslash are joined, comments and
    placeholders are taken out."""
    text = re.sub(r"<[a-z ]+>", "PLACEHOLDER", text.replace("\\\n", " "))
    found = []
    for line in text.splitlines():
        for part in line.split("&&"):
            words = shlex.split(part, comments=True)
            if words:
                found.append(words)
    return found


def commands_of_a_page(path: Path) -> list[list[str]]:
    """The commands in a page's blocks, and those between single backticks."""
    text = path.read_text()
    found = []
    for block in fenced(text, "bash", "sh"):
        found += commands(block)
    for line in re.findall(r"`(python [^`]+)`", text):
        found += commands(line)
    return found


def commands_of_a_docstring(path: Path) -> list[list[str]]:
    """The indented commands in a module's docstring, and those between single backticks."""
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    found = []
    for line in re.findall(r"^    (python (?:[^\\\n]|\\\n)+)", text, re.M):
        found += commands(line)
    for line in re.findall(r"`(python [^`]+)`", text):
        found += commands(line)
    return found


def python_commands() -> list[tuple[str, list[str]]]:
    """("README.md", ["python", "adpa.py", ...]), ... from all pages and docstrings."""
    found = []
    for page in PAGES:
        found += [(page.name, words) for words in commands_of_a_page(page)]
    for folder in (ROOT, ROOT / "playground", ROOT / "studies"):
        for path in sorted(folder.glob("*.py")):
            found += [(path.name, words) for words in commands_of_a_docstring(path)]
    return [(where, words) for where, words in found if words[0] in ("python", "python3")]


def assert_readable(words: list[str]) -> None:
    """The script of a command exists, and its command line accepts the flags and their values."""
    if words[1] == "-m":
        module_name = words[2]
        flags = words[3:]
        assert importlib.util.find_spec(module_name), f"no module {module_name}"
        if module_name == "venv":
            return
    else:
        flags = words[2:]
        assert (ROOT / words[1]).exists(), f"no file {words[1]}"
        module_name = words[1].removesuffix(".py").replace("/", ".")
    module = importlib.import_module(module_name)
    if hasattr(module, "Args") and "--help" not in flags:
        err = io.StringIO()
        with contextlib.redirect_stderr(err), contextlib.redirect_stdout(err):
            try:
                tyro.cli(module.Args, args=flags)
            except SystemExit as stopped:
                raise AssertionError(f"{' '.join(words)}\n{err.getvalue()}") from stopped
        for word in flags:
            if word.startswith("playground/"):
                assert (ROOT / word).exists(), f"{word} does not exist"


COMMANDS = python_commands()
TYPED = sorted({(where, shlex.join(words)) for where, words in COMMANDS})


@pytest.mark.parametrize("command", TYPED, ids=" ".join)
def test_r50_every_command_can_be_typed(command):
    _, line = command
    assert_readable(shlex.split(line))


WRONG = [
    "adpa.py --gama 1",
    "adpa.py --gamma much",
    "no_such.py",
    "adpa.py --data playground/none.jsonl",
]


def test_commands_are_found_and_wrong_ones_are_refused():
    scripts = {(where, words[1]) for where, words in COMMANDS}
    assert {("README.md", "adpa.py"), ("adpa.md", "dckd.py"), ("adpa.py", "adpa.py")} <= scripts
    for script in SCRIPTS:
        assert (f"{script}.py", f"{script}.py") in scripts
    for wrong in WRONG:
        with pytest.raises((AssertionError, ModuleNotFoundError)):
            assert_readable(["python", *wrong.split()])


def test_models_that_a_command_takes_from_runs_are_made_by_a_command_above():
    for page in PAGES:
        made = set()
        for block in fenced(page.read_text(), "bash", "sh"):
            for words in commands(block):
                for word in words:
                    if word.startswith("runs/") and word.endswith("/model"):
                        run = word.removesuffix("/model")
                        assert run in made, f"{page.name}: nothing above makes {word}"
                for flag, value in pairwise(words):
                    if flag == "--output_dir":
                        made.add(value)


# --------------------------------------------------------------------------------- the two commands
def copy_tracked_files(folder: Path) -> None:
    """What a fresh clone holds, as the working tree has it."""
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode == 0:
        names = [name for name in tracked.stdout.split("\0") if name]
    else:  # an archive without its history
        paths = [path.relative_to(ROOT) for path in ROOT.rglob("*") if ".venv" not in path.parts]
        names = [str(path) for path in paths]
    for name in names:
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)


def test_r50_the_first_command_runs_in_a_fresh_copy_and_shows_the_numbers_of_the_readme(tmp_path):
    """Its last part, with this interpreter. The packages are only looked up."""
    first = commands(fenced(README, "bash", "sh")[0])
    assert first[0] == ["python3", "-m", "venv", ".venv"]
    assert first[1] == [".", ".venv/bin/activate"]
    assert first[2] == ["pip", "install", "-r", "requirements.txt"]
    assert first[3:] == [["python", "adpa.py"]]
    assert "no flag" in README
    needed = (ROOT / "requirements.txt").read_text().split()
    names = {line.split("~=")[0] for line in needed}
    assert names == {"torch", "transformers", "datasets", "tyro"}

    copy_tracked_files(tmp_path)
    words = [sys.executable, "adpa.py"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stdout + done.stderr

    [run] = (tmp_path / "runs").iterdir()
    summary = json.loads((run / "summary.json").read_text())
    assert re.fullmatch(r"adpa__1__\d+", run.name)
    assert f"python -m playground.chat runs/{run.name}\n" in done.stdout
    for word in ("before", "now", "teacher"):
        assert f"\n    {word} " in done.stdout  # the responses
        assert f"\n{word} " in done.stdout  # the table of rewards
    assert summary["seconds"] < 300, "a minute on two idle cores"
    pattern = r"from\s+(\d\.\d+)\s+to\s+(?:about\s+)?(\d\.\d+)\D+(\d\.\d+)"
    numbers = re.search(pattern, README)
    assert numbers, "the README gives the student's reward before and after, and the teacher's"
    for name, value in zip(("before", "after", "teacher"), numbers.groups()):
        assert summary[f"reward_{name}"] == pytest.approx(float(value), abs=0.06), (name, summary)


def test_the_second_command_installs_the_test_extras_and_is_what_ci_runs():
    second = fenced(README, "bash", "sh")[1]
    assert commands(second) == [["pip", "install", "-r", "tests/requirements.txt"], ["pytest"]]
    assert second.strip() in (ROOT / ".ci/run").read_text()
    extras = (ROOT / "tests/requirements.txt").read_text().splitlines()
    assert extras[0] == "-r ../requirements.txt"
    assert any(line.startswith("pytest") for line in extras)


def test_pytest_leaves_out_the_slow_tests_and_the_readme_says_so():
    assert "-m 'not slow'" in (ROOT / "pyproject.toml").read_text()
    assert "pytest -m slow" in (ROOT / ".ci/run").read_text()
    assert "`pytest -m slow`" in README


# ----------------------------------------------------------------------------------------- the rest
COLUMNS = {  # what a script reads of a training row, besides the prompt
    "all": ["chosen", "rejected"],
    "ADPA, PAD, DPKD": ["chosen"],
    "PAD, DPKD": [],
}
FORMS = re.findall(r"^\| ([^|]+) \| `(\{.+\})` \| ([^|]+) \|$", README, re.M)


@pytest.mark.parametrize("form, line, serves", FORMS, ids=[form for form, _, _ in FORMS])
def test_a_form_of_the_readme_serves_what_it_says_and_nothing_else(
    form, line, serves, tmp_path, capsys
):
    path = tmp_path / "row.jsonl"
    path.write_text(line)
    for columns in COLUMNS.values():
        if len(columns) <= len(COLUMNS[serves]):
            [row] = read_rows(str(path), "train", columns)
            assert row["prompt"] == [{"role": "user", "content": "Name two fish."}]
            responses = {"chosen": "cod and carp.", "rejected": "whale."}
            for column in columns:
                assert row[column] == responses[column]
        else:
            error = one_error_line(capsys, read_rows, str(path), "train", columns)
            assert f"the columns {', '.join(['prompt', *columns])} are needed" in error


def test_the_readme_has_all_forms():
    assert len(FORMS) == 9


def test_answers_of_another_engine_that_adpas_page_writes_are_taken(tmp_path, monkeypatch):
    """The second row is one that the run dropped."""
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"Name {n} fish.", "chosen": "cod."} for n in ("two", "many", "three")]
    source = write_jsonl(tmp_path / "mine.jsonl", rows)
    first, _, last = read_rows(str(source), "train", ["chosen"])
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    inputs = {"rows": {"data": [f"{row['id']} 0123abcd 4567cdef" for row in (first, last)]}}
    Path("runs/mine/inputs.json").write_text(json.dumps(inputs))
    answers = {"Name two fish.": "cod.", "Name three fish.": "carp."}

    def answer(prompt: list[dict]) -> dict:
        return {"text": answers[prompt[-1]["content"]], "finished": True}

    [code] = fenced((ROOT / "docs/adpa.md").read_text(), "python")
    exec(code, {"answer": answer})

    taken = cached_map(Path("runs/mine/student_answers.jsonl"), [first, last], None, batch_size=2)
    assert [row["text"] for row in taken] == ["cod.", "carp."]


@pytest.mark.parametrize("script", SCRIPTS)
def test_functions_named_on_a_methods_page_exist(script):
    """ "paper · released code · here" points at code: (`advantages`), (`LM.sample`, `pack`)."""
    page = (ROOT / "docs" / f"{script}.md").read_text()
    source = (ROOT / f"{script}.py").read_text() + (ROOT / "common.py").read_text()
    points = page.split("released code · here")[1].split("\n## ")[0]
    named = set()
    for group in re.findall(r"\((`[\w., `]+`)\)", points):
        named |= set(re.findall(r"`([\w.]+)`", group))
    assert named
    for name in named:
        assert re.search(rf"(def|class) {name.split('.')[-1]}\b", source), name


def headings(page: Path) -> set[str]:
    """Anchors as GitHub makes them."""
    anchors = set()
    for line in re.findall(r"^#+ (.+)$", page.read_text(), re.M):
        anchors.add(re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-"))
    return anchors


LINKING_PAGES = [*PAGES, ROOT / "benchmarks" / "README.md"]


@pytest.mark.parametrize("page", LINKING_PAGES, ids=str)
def test_links_lead_to_files_and_headings_that_exist(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if link.startswith(("http", "mailto")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in headings(target), link
