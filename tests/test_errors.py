"""What a person meets who makes a mistake, has a bug in a function of his own, or presses Ctrl-C.

A mistake that the code looks for is one line (test_common.py, test_hostile.py, test_scripts.py have
most of them). Every other error keeps its traceback. No script warns of anything.
"""

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    ROOT,
    SCRIPTS,
    TINY_RUN,
    ScriptProcess,
    command_line,
    first_rows,
    make_model,
    read_jsonl,
    run_script,
    save,
    training_rows,
)

import common
from common import read_rows


def start_python(*words: str, **environment: str) -> subprocess.Popen:
    """`python <words>` in the background, in the repository, on one core."""
    return subprocess.Popen(
        [sys.executable, *words],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run_python(*words: str, **environment: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of `python <words>` without progress bars."""
    process = start_python(*words, TQDM_DISABLE="1", **environment)
    out, err = process.communicate(timeout=200)
    return process.returncode, out, err


def few_rows(folder: Path, **flags) -> list[str]:
    """The flags of a run of a few seconds on the playground, as words."""
    defaults = {
        "data": first_rows("train", 64, folder),
        "output_dir": folder / "run",
        "max_steps": 2,
        "batch_size": 4,
        "eval_prompts": 4,
        "max_response_tokens": 64,
    }
    return command_line({**defaults, **flags})


# ------------------------------------------------------------------- a bug in somebody's own reward
HAS_A_BUG = """
def reward(prompts, responses):
    points = {"cod": 1.0}
    return [points[response] for response in responses]
"""
NEEDS_A_PACKAGE = """
import a_package_that_is_not_installed

def reward(prompts, responses):
    return [0.0 for _ in responses]
"""


def run_with_reward(code: str, folder: Path) -> tuple[int, str, str]:
    """A run whose reward is the function `reward` of a module my_reward with this code."""
    (folder / "my_reward.py").write_text(code)
    flags = few_rows(folder, reward="my_reward:reward")
    return run_python("adpa.py", *flags, PYTHONPATH=str(folder))


@pytest.mark.slow
def test_a_reward_function_that_raises_shows_its_own_file_and_line(tmp_path, monkeypatch):
    (tmp_path / "my_reward.py").write_text(HAS_A_BUG)
    monkeypatch.syspath_prepend(tmp_path)
    flags = {"data": first_rows("train", 64, tmp_path), "eval_prompts": 4}

    process = ScriptProcess(
        "adpa", {**flags, "reward": "my_reward:reward", "output_dir": tmp_path / "run"}
    )

    assert process.wait(100) == 1
    err = process.output()
    assert f'File "{tmp_path}/my_reward.py", line 4, in reward' in err
    assert re.search(r"^KeyError: ", err, re.MULTILINE)
    assert "while judging 4 responses with --reward my_reward:reward" in err
    assert f"of {tmp_path}/run/eval_before.jsonl" in err


@pytest.mark.slow
def test_a_reward_module_that_cannot_be_imported_keeps_its_traceback(tmp_path):
    code, _, err = run_with_reward(NEEDS_A_PACKAGE, tmp_path)

    assert code == 1
    assert f'File "{tmp_path}/my_reward.py", line 2, in <module>' in err
    assert "ModuleNotFoundError: No module named 'a_package_that_is_not_installed'" in err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_reward_module_that_does_not_exist_is_one_line(tmp_path):
    flags = few_rows(tmp_path, reward="no_such_module:reward")

    code, _, err = run_python("adpa.py", *flags)

    assert code == 2
    assert err.startswith(
        "error: --reward no_such_module:reward: there is no module no_such_module"
    )
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()


# --------------------------------------------------------------------------- errors of the system
def test_a_full_disk_is_one_line_and_another_error_of_the_system_keeps_its_traceback(capsys):
    args = SimpleNamespace(resume="", output_dir="")

    with pytest.raises(SystemExit) as stopped, common.exit_in_one_line(args):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(FileNotFoundError), common.exit_in_one_line(args):
        raise OSError(errno.ENOENT, "No such file or directory")

    assert stopped.value.code == 2
    assert "No space left on device" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------- Ctrl-C
@pytest.fixture
def ctrl_c_is_heard():
    """A shell lets its background jobs ignore Ctrl-C, and the processes that they start as well."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupt(process: subprocess.Popen) -> str:
    """Presses Ctrl-C. Returns the line in which the program says good-bye."""
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    # A progress bar is drawn over itself, with carriage returns.
    lines = [line for line in re.split(r"[\r\n]", err) if "interrupted" in line]
    assert len(lines) == 1, err
    return lines[0]


def wait_for_lines(path: Path, count: int, process: subprocess.Popen):
    """Returns as soon as a file that the process writes has so many lines."""
    deadline = time.time() + 200
    while not path.exists() or path.read_bytes().count(b"\n") < count:
        assert process.poll() is None, process.communicate()[1]
        assert time.time() < deadline
        time.sleep(0.002)


INTERRUPTED = {  # a file, and how many lines it has when Ctrl-C is pressed: some, but not all
    "evaluation": ("eval_before.jsonl", 4, 64),
    "sampling": ("student_answers.jsonl", 4, 64),
    "training": ("metrics.jsonl", 6, 31),
}


@pytest.mark.slow
@pytest.mark.parametrize("stage", INTERRUPTED)
def test_ctrl_c_ends_with_one_line_and_the_resumed_run_completes(stage, tmp_path, ctrl_c_is_heard):
    file, lines, all_lines = INTERRUPTED[stage]
    run = tmp_path / "run"
    flags = few_rows(
        tmp_path, max_steps=30, log_every=1, save_every=2, eval_prompts=64, sample_batch_size=4
    )

    process = start_python("adpa.py", *flags)
    wait_for_lines(run / file, lines, process)
    farewell = interrupt(process)

    assert farewell == (
        f"interrupted; finished stages and checkpoints are kept: go on with --resume {run}"
    )
    assert lines <= len((run / file).read_bytes().splitlines()) < all_lines
    assert not (run / "summary.json").exists()

    assert run_script("adpa", resume=run) == 0
    assert (run / "summary.json").exists()
    assert [row["step"] for row in training_rows(run)] == list(range(1, 31))
    for name in ("eval_before", "student_answers", "eval_after"):
        assert len(read_jsonl(run / f"{name}.jsonl")) == 64


@pytest.mark.parametrize(
    "words", [[f"{script}.py"] for script in SCRIPTS] + [["-m", "studies.rloo"]], ids=" ".join
)
def test_ctrl_c_while_torch_is_imported_is_one_line(words, tmp_path, ctrl_c_is_heard):
    """Python finds this torch before the real one. Like the real one it swallows exceptions."""
    (tmp_path / "torch.py").write_text(
        "import contextlib, os, signal\n"
        "with contextlib.suppress(BaseException):\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
    )
    process = start_python(*words, PYTHONPATH=str(tmp_path))
    out, err = process.communicate(timeout=60)
    assert (out, err) == ("", "interrupted; nothing was written yet\n")
    assert process.returncode == 130


SLOW_IMPORT = """
import time
from pathlib import Path

Path(__file__).with_name("imported").write_text("now\\n")
time.sleep(100)
"""


@pytest.mark.slow
def test_ctrl_c_before_the_run_has_a_folder_says_that_nothing_was_written(
    tmp_path, ctrl_c_is_heard
):
    (tmp_path / "slow_reward.py").write_text(SLOW_IMPORT)
    flags = few_rows(tmp_path, reward="slow_reward:reward")

    process = start_python("adpa.py", *flags, PYTHONPATH=str(tmp_path))
    wait_for_lines(tmp_path / "imported", 1, process)
    farewell = interrupt(process)

    assert farewell == "interrupted; nothing was written yet"
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------- resumed runs
def contents(folder: Path) -> dict[Path, bytes]:
    """Every file in a folder."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_finished_run_that_is_resumed_says_so_and_changes_no_byte(run_tiny, capsys):
    run = run_tiny("adpa", teacher_ref="none")
    before = contents(run)
    capsys.readouterr()

    code = run_script("adpa", resume=run)

    assert code == 0
    assert capsys.readouterr().out == (
        f"{run} is finished, nothing is changed; its results are in summary.json\n"
    )
    assert contents(run) == before


def test_charts_tokens_is_counted_and_goes_on_where_the_checkpoint_was(
    run_tiny, load, pairs, tmp_path, monkeypatch
):
    """A step of DCKD trains on all tokens of both responses of the eight pairs."""
    lm = load("student")
    tokens = 0
    for row in read_rows(str(pairs), "train"):
        _, responses = lm.encode(row["prompt"], [row["chosen"], row["rejected"]])
        tokens += sum(len(response) for response in responses)
    killed = tmp_path / "killed"  # the run as a kill after its first step would leave it
    save_checkpoint = common.save_checkpoint

    def save_and_copy(path, step, counts, **parts):
        save_checkpoint(path, step, counts, **parts)
        if step == 1:
            shutil.copytree(path.parent, killed)

    monkeypatch.setattr(common, "save_checkpoint", save_and_copy)

    whole = run_tiny("dckd", max_steps=3, save_every=1)
    counts = torch.load(killed / "checkpoint.pt", weights_only=True)["counts"]
    code = run_script("dckd", resume=killed)

    assert code == 0
    assert counts["tokens"] == tokens
    for run in (whole, killed):
        rows = training_rows(run)
        assert [row["charts/tokens"] for row in rows] == [tokens, 2 * tokens, 3 * tokens]


# --------------------------------------------------------------------- warnings and other platforms
# Everything that a script has, in few steps: evaluations, checkpoints, slices of logits.
ALL_PATHS = {
    "max_steps": 2,
    "log_every": 1,
    "eval_every": 1,
    "save_every": 1,
    "micro_batch_size": 2,
    "logits_chunk": 16,
    "gradient_checkpointing": True,
}
OWN_FLAGS = {
    "dpkd": {"refresh_every": 1, "sft_coef": 0.5},
    "pad": {"num_answers": 3},
    "rm_distiller": {"nll_coef": 0.5},
}


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_no_script_warns_of_anything(script, tmp_path):
    flags = {**ALL_PATHS, **OWN_FLAGS.get(script, {})}
    if script == "rm_distiller":
        flags["eval_data"] = first_rows("rm_test", 32, tmp_path)
        flags["eval_prompts"] = None

    code, _, err = run_python("-W", "error", f"{script}.py", *few_rows(tmp_path, **flags))

    assert code == 0, err
    # Nothing but progress is written to stderr.
    progress = re.compile(r"[\w ]+: \d+ of \d+ (prompts|rows|steps|pairs), .*\d s.*")
    assert [line for line in err.splitlines() if not progress.fullmatch(line)] == []


# As on Windows, which has neither the module nor the function.
WITHOUT_POSIX = """
import importlib, os, sys
sys.modules["resource"] = None
del os.fork
for name in sys.argv[1:]:
    print(importlib.import_module(name).Args.__name__)
"""


@pytest.mark.slow
def test_every_script_imports_without_resource_and_fork():
    code, out, err = run_python("-c", WITHOUT_POSIX, *SCRIPTS, PYTHONPATH=str(ROOT))

    assert code == 0, err
    assert out.split() == ["Args"] * len(SCRIPTS)


# ------------------------------------------------------------------- models that write nothing
def silent_model(vocab_size: int):
    """A model whose first token is always the end-of-sequence token, 5. Its layers add nothing, and
    the first number of every hidden state is large and reaches that token's logit alone."""
    model = make_model(vocab_size)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight[:, 0] = 100.0
        model.lm_head.weight[:, 0] = 0.0
        model.lm_head.weight[5, 0] = 50.0
    return model


@pytest.mark.parametrize("script, silent", [("adpa", "student"), ("dpkd", "teacher")])
def test_r92_a_model_whose_answers_are_all_empty_ends_the_run(
    script, silent, checkpoints, tokenizer, pairs, tmp_path, capsys
):
    models = {"student": checkpoints["student"], "teacher": checkpoints["teacher"]}
    if script == "adpa":
        models["teacher_ref"] = checkpoints["teacher_ref"]
    models[silent] = save(tmp_path / "silent", tokenizer, silent_model(len(tokenizer)))
    flags = {"data": pairs, "eval_data": pairs, "output_dir": tmp_path / "run", **TINY_RUN}
    assert run_script(script, **models, **flags) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"the {silent}'s answers: all 8 are empty, as that to 'What is it?'" in error
    assert f"{models[silent]} writes nothing but the end of its response" in error


def test_r92_some_empty_answers_are_counted(capsys):
    rows = [{"prompt": [{"role": "user", "content": "p"}], "text": text} for text in ("", "a", " ")]
    common.check_not_empty(rows, None, "the teacher's answers")
    assert capsys.readouterr().out == "note: the teacher's answers: 2 of 3 are empty\n"
    common.check_not_empty(rows[1:2], None, "the teacher's answers")
    assert capsys.readouterr().out == ""
