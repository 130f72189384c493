"""The commands of README.md, of the pages in docs/ and of the scripts' docstrings: the first is run as it stands, and
every other one is read by the script's own command line (r50)."""

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

import pytest
import tyro
from conftest import ROOT, SCRIPTS

from common import read_rows

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
    """The words of every command: lines that end with a backslash joined, comments and placeholders taken out."""
    text = re.sub(r"<[a-z ]+>", "PLACEHOLDER", text.replace("\\\n", " "))
    parts = [part for line in text.splitlines() for part in line.split("&&")]
    return [words for words in (shlex.split(part, comments=True) for part in parts) if words]


def python_commands() -> list[tuple[str, list[str]]]:
    """("README.md", ["python", "adpa.py", ...]), ... from pages, from the playground's table and from docstrings."""
    found = []
    for page in PAGES:
        text = page.read_text()
        found += [
            (page.name, words) for block in fenced(text, "bash", "sh") for words in commands(block)
        ]
        found += [
            (page.name, words)
            for line in re.findall(r"`(python [^`]+)`", text)
            for words in commands(line)
        ]
    for path in sorted(ROOT.glob("*.py")) + sorted((ROOT / "playground").glob("*.py")):
        text = ast.get_docstring(ast.parse(path.read_text())) or ""
        lines = re.findall(r"^    (python (?:[^\\\n]|\\\n)+)", text, re.M) + re.findall(
            r"`(python [^`]+)`", text
        )
        found += [(path.name, words) for line in lines for words in commands(line)]
    return [(where, words) for where, words in found if words[0] in ("python", "python3")]


def readable(words: list[str]) -> None:
    """Ends with an AssertionError unless the script exists and its command line accepts the flags and values."""
    name, flags = words[1], words[2:]
    if name == "-m":
        module, flags = words[2], words[3:]
        assert importlib.util.find_spec(module), f"no module {module}"
        if module == "venv":
            return
    else:
        assert (ROOT / name).exists(), f"no file {name}"
        module = name.removesuffix(".py").replace("/", ".")
    module = importlib.import_module(module)
    if hasattr(module, "Args") and "--help" not in flags:
        err = io.StringIO()
        with contextlib.redirect_stderr(err), contextlib.redirect_stdout(err):
            try:
                tyro.cli(module.Args, args=flags)
            except SystemExit as stopped:
                raise AssertionError(f"{' '.join(words)}\n{err.getvalue()}") from stopped
        for word in flags:
            assert not word.startswith("playground/") or (ROOT / word).exists(), (
                f"{word} does not exist"
            )


COMMANDS = python_commands()


@pytest.mark.parametrize(
    "command", sorted({(where, shlex.join(words)) for where, words in COMMANDS}), ids=" ".join
)
def test_r50_every_command_can_be_typed(command):
    readable(shlex.split(command[1]))


def test_commands_are_found_and_wrong_ones_are_refused():
    scripts = {(where, words[1]) for where, words in COMMANDS}
    assert {("README.md", "adpa.py"), ("adpa.md", "dckd.py"), ("adpa.py", "adpa.py")} <= scripts
    for script in SCRIPTS:
        assert (f"{script}.py", f"{script}.py") in scripts
    for wrong in (
        "adpa.py --gama 1",
        "adpa.py --gamma much",
        "no_such.py",
        "adpa.py --data playground/none.jsonl",
    ):
        with pytest.raises((AssertionError, ModuleNotFoundError)):
            readable(["python", *wrong.split()])


def test_models_that_a_command_takes_from_runs_are_made_by_a_command_above():
    for page in PAGES:
        made = set()
        for block in fenced(page.read_text(), "bash", "sh"):
            for words in commands(block):
                for word in words:
                    if word.startswith("runs/") and word.endswith("/model"):
                        assert word.removesuffix("/model") in made, (
                            f"{page.name}: nothing above makes {word}"
                        )
                made |= {words[i + 1] for i, word in enumerate(words) if word == "--output_dir"}


# --------------------------------------------------------------------------------------------------- the two commands
def test_r50_the_first_command_runs_in_a_fresh_copy_and_shows_the_numbers_of_the_readme(tmp_path):
    """Its last part, with this interpreter, on the files that git tracks; the packages are only looked up."""
    first = commands(fenced(README, "bash", "sh")[0])
    assert first[0] == ["python3", "-m", "venv", ".venv"] and first[1] == [
        ".",
        ".venv/bin/activate",
    ]
    assert first[2] == ["pip", "install", "-r", "requirements.txt"] and first[3] == [
        "python",
        "adpa.py",
    ]
    assert len(first) == 4 and "no flag" in README
    needed = (ROOT / "requirements.txt").read_text().split()
    assert {line.split("~=")[0] for line in needed} == {"torch", "transformers", "datasets", "tyro"}

    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode == 0:
        names = [name for name in tracked.stdout.split("\0") if name and (ROOT / name).exists()]
    else:  # an archive without its history
        names = [
            str(p.relative_to(ROOT))
            for p in ROOT.rglob("*")
            if p.is_file() and ".venv" not in p.parts
        ]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    done = subprocess.run(
        [sys.executable, "adpa.py"], cwd=tmp_path, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr

    [run] = (tmp_path / "runs").iterdir()
    summary = json.loads((run / "summary.json").read_text())
    assert re.fullmatch(r"adpa__1__\d+", run.name)
    assert f"everything is in runs/{run.name}" in done.stdout and "reward_after" in done.stdout
    assert all(
        f"\n  {word} " in done.stdout for word in ("before", "after", "teacher")
    )  # the table of answers
    assert summary["seconds"] < 300, "a minute on two idle cores"
    said = re.search(r"from\s+(\d\.\d+)\s+to\s+(?:about\s+)?(\d\.\d+)\D+(\d\.\d+)", README)
    assert said, "the README gives the student's reward before and after, and the teacher's"
    for name, value in zip(("before", "after", "teacher"), said.groups()):
        assert summary[f"reward_{name}"] == pytest.approx(float(value), abs=0.06), (name, summary)


def test_the_second_command_installs_the_test_extras_and_is_what_ci_runs():
    second = fenced(README, "bash", "sh")[1]
    assert commands(second) == [["pip", "install", "-r", "tests/requirements.txt"], ["pytest"]]
    assert second.strip() in (ROOT / ".ci/run").read_text()
    extras = (ROOT / "tests/requirements.txt").read_text().splitlines()
    assert extras[0] == "-r ../requirements.txt" and any(
        line.startswith("pytest") for line in extras
    )


def test_pytest_leaves_out_the_slow_tests_and_the_readme_says_so():
    assert """addopts = "-m 'not slow'\"""" in (ROOT / "pyproject.toml").read_text()
    assert "`pytest -m slow`" in README


# ----------------------------------------------------------------------------------------------------------- the rest
def test_the_rows_of_the_readme_read_the_same(tmp_path):
    [block] = fenced(README, "json")
    read = []
    for line in block.splitlines():
        path = tmp_path / "row.jsonl"
        path.write_text(line)
        [row] = read_rows(str(path), "train")
        read.append((row["prompt"], row["chosen"].partition(".")[0], row["rejected"]))
    assert len(read) == 3 and read[0] == read[1] == read[2]


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.name)
def test_functions_named_on_a_methods_page_exist(page):
    """ "paper · released code · here" points at code: (`advantages`), (`LM.sample`, `pack`)."""
    script = ROOT / f"{page.stem}.py"
    if not script.exists():
        pytest.skip("not the page of a script")
    source = script.read_text() + (ROOT / "common.py").read_text()
    points = page.read_text().split("released code · here")[1].split("\n## ")[0]
    named = {
        name
        for group in re.findall(r"\((`[\w., `]+`)\)", points)
        for name in re.findall(r"`([\w.]+)`", group)
    }
    assert named
    for name in named:
        assert re.search(rf"(def|class) {name.split('.')[-1]}\b", source), name


def headings(page) -> set[str]:
    """Anchors as GitHub makes them."""
    lines = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in lines}


@pytest.mark.parametrize(
    "page", [*PAGES, ROOT / "benchmarks" / "README.md"], ids=lambda page: page.name
)
def test_links_lead_to_files_and_headings_that_exist(page):
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    for link in links:
        if not link.startswith(("http", "mailto")):
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), link
            assert not anchor or anchor in headings(target), link
