"""A run has its folder for itself, is what it was when it is resumed, and knows its limits before
any work."""

import ast
import contextlib
import json
import math
import os
import re
import runpy
import shutil
import subprocess
import sys
import time
from datetime import datetime
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import (
    CHAT_TEMPLATE,
    PAIRS,
    ROOT,
    SCRIPTS,
    TINY_RUN,
    command_line,
    first_gradient,
    make_model,
    make_tokenizer,
    one_error_line,
    one_short,
    packed_logps,
    plain_log_probs,
    read_jsonl,
    run_script,
    save,
    write_jsonl,
)
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForSequenceClassification,
    CTRLConfig,
    CTRLLMHeadModel,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
    OPTConfig,
    OPTForCausalLM,
)

import adpa
import common
import dpkd
import rm_distiller
from common import Example, begin_run, exit_in_one_line, open_run

CODE = []
for pattern in ("*.py", "studies/*.py", "playground/*.py", "benchmarks/*.py"):
    CODE += [path.relative_to(ROOT) for path in sorted(ROOT.glob(pattern))]


@pytest.fixture
def tiny_flags(checkpoints, pairs) -> dict:
    """The flags of `run_tiny`, without a folder."""
    models = {"student": checkpoints["student"], "teacher": checkpoints["teacher"]}
    return {**models, "data": pairs, "eval_data": pairs, **TINY_RUN}


def broken_reward(prompts, responses):
    raise TypeError("a mistake in a function of one's own")


def contents(folder: Path) -> dict[str, bytes]:
    """Every file in a folder."""
    files = {}
    for path in folder.rglob("*"):
        if path.is_file():
            files[str(path.relative_to(folder))] = path.read_bytes()
    return files


# -------------------------------------------------------------------- a run has a folder for itself
def opened(**flags) -> Path:
    _, folder = open_run(adpa.Args(**flags), "some/where/fork.py")
    return folder


def test_r72_runs_that_start_in_the_same_second_have_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "time", lambda: 1700000000.5)

    folders = [opened(), opened(), opened(seed=2), opened()]

    assert [str(folder) for folder in folders] == [
        "runs/fork__1__1700000000",
        "runs/fork__1__1700000000_2",
        "runs/fork__2__1700000000",
        "runs/fork__1__1700000000_3",
    ]
    assert all(folder.is_dir() for folder in folders)


# Another process that has a run folder. It says so, and ends with its standard input.
HAS_THE_FOLDER = """
import sys
from filelock import FileLock
lock = FileLock(sys.argv[1] + "/run.lock")
lock.acquire(timeout=0)
print("locked", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def another_process():
    """another_process(folder) has the folder until the test ends."""
    processes = []

    def take(folder: Path) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-c", HAS_THE_FOLDER, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        assert process.stdout.readline() == "locked\n"
        return process

    yield take
    for process in processes:
        process.communicate()


def program(**flags):
    """What every script does behind its last line, up to where it has its folder."""
    args = adpa.Args(**flags)
    with exit_in_one_line(args):
        open_run(args, "adpa.py")


def test_r72_a_folder_that_another_process_has_is_refused_and_stays(
    tmp_path, another_process, capsys
):
    run = tmp_path / "run"
    run.mkdir()
    process = another_process(run)
    before = contents(run)

    error = one_error_line(capsys, program, output_dir=str(run))

    assert f"another run is using {run}" in error
    assert contents(run) == before
    # Killed, it leaves its lock behind. The same command works then.
    process.kill()
    process.wait()
    assert contents(run) == before
    with pytest.raises(ZeroDivisionError), exit_in_one_line(adpa.Args(output_dir=str(run))):
        opened(output_dir=str(run))
        raise ZeroDivisionError
    assert not run.exists()


def test_r72_a_run_is_resumed_by_one_process_at_a_time(run_tiny, another_process, tmp_path, capsys):
    run = run_tiny("dckd")
    (run / "summary.json").unlink()
    another_process(run)
    before = contents(run)

    assert run_script("dckd", resume=run) == 2

    assert f"another run is using {run}" in capsys.readouterr().err
    assert contents(run) == before


@pytest.mark.slow
def test_r72_of_two_equal_commands_at_once_one_is_refused(tiny_flags, tmp_path):
    run = tmp_path / "run"
    words = command_line({**tiny_flags, "output_dir": run})
    processes = []
    for _ in range(2):
        processes.append(
            subprocess.Popen(
                [sys.executable, "dckd.py", *words],
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": str(ROOT / "tests")},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    errors = [process.communicate(timeout=200)[1] for process in processes]

    assert sorted(process.returncode for process in processes) == [0, 2], errors
    refused = errors[[process.returncode for process in processes].index(2)]
    assert str(run) in refused
    assert (run / "summary.json").exists()


def test_r72_a_run_is_named_after_the_file_that_made_it(tiny_flags, tmp_path, monkeypatch):
    fork = shutil.copy(ROOT / "dckd.py", tmp_path / "fork.py")
    words = [str(fork), *command_line(tiny_flags)]
    monkeypatch.setattr(sys, "argv", words)

    with contextlib.chdir(tmp_path):
        runpy.run_path(words[0], run_name="__main__")

    [run] = (tmp_path / "runs").iterdir()
    assert run.name.startswith("fork__1__")
    assert (run / "model").is_dir()
    assert not (run / "run.lock").exists()


# ------------------------------------------------------------- what a run that failed leaves behind
def test_r73_a_run_that_fails_before_its_first_stage_leaves_nothing(tiny_flags, tmp_path, capsys):
    run = tmp_path / "run"
    flags = {**tiny_flags, "output_dir": run}

    assert run_script("dckd", **{**flags, "teacher": "/no/teacher"}) == 2
    assert not run.exists()
    assert run_script("dckd", **{**flags, "data": "/no/data.jsonl"}) == 2
    assert not run.exists()
    # A function of one's own that fails when it is first called: the flags are written by then.
    with pytest.raises(TypeError):
        run_script("dckd", **{**flags, "reward": "test_runs:broken_reward"})
    assert not run.exists()

    assert run_script("dckd", **flags) == 0
    assert (run / "model").is_dir()


@pytest.mark.parametrize("moment", ["flags written", "stage opened"])
def test_r73_a_run_that_was_killed_before_its_first_stage_does_not_block_its_command(
    moment, tiny_flags, tmp_path
):
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.lock").touch()
    (run / "args.json").write_text("{}")
    if moment == "stage opened":
        (run / "eval_before.jsonl").touch()

    assert run_script("dckd", **tiny_flags, output_dir=run) == 0

    assert (run / "summary.json").exists()


FOREIGN = {
    "another program's flags": {"args.json": "{}"},
    "a result": {"run.lock": "", "args.json": "{}", "eval_before.jsonl": '{"id": "1"}\n'},
    "notes": {"run.lock": "", "notes.txt": ""},
}


@pytest.mark.parametrize("case", FOREIGN)
def test_r73_a_folder_that_holds_more_is_refused_and_nothing_in_it_is_touched(
    case, tmp_path, capsys
):
    for name, text in FOREIGN[case].items():
        (tmp_path / name).write_text(text)
    before = contents(tmp_path)

    error = one_error_line(capsys, program, output_dir=str(tmp_path))

    assert "is not empty" in error
    assert contents(tmp_path) == before


def test_r73_a_resumed_run_that_fails_keeps_its_folder(run_tiny, capsys):
    run = run_tiny("dckd")
    (run / "summary.json").unlink()
    before = contents(run)
    args = (run / "args.json").read_text()
    (run / "args.json").write_text(args.replace('"teacher": "', '"teacher": "/no'))

    assert run_script("dckd", resume=run) == 2

    assert contents(run).keys() == before.keys()


def test_r73_ctrl_c_before_the_first_stage_leaves_nothing_and_later_names_the_folder(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    for results, farewell in (("", "nothing was written yet"), ("{}\n", "go on with --resume ")):
        args = adpa.Args()
        with pytest.raises(SystemExit) as stopped, exit_in_one_line(args):
            _, folder = open_run(args, "adpa.py")
            (folder / "eval_before.jsonl").write_text(results)
            raise KeyboardInterrupt
        error = capsys.readouterr().err
        assert stopped.value.code == 130
        assert error.count("\n") == 1
        assert error.startswith("interrupted; ")
        assert farewell in error
        assert (str(folder) in error) == folder.exists() == bool(results)


# ------------------------------------------------------------------- a resumed run is the same run
DATED = "<|system|>Today: {{ strftime_now('%d %b %Y') }}<|end|>" + CHAT_TEMPLATE


def dated_copy(checkpoint: str, folder: Path) -> str:
    """The same model, whose chat template writes the date into every prompt."""
    shutil.copytree(checkpoint, folder)
    (folder / "chat_template.jinja").write_text(DATED)
    return str(folder)


def set_day(monkeypatch, day: int):
    class Clock(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime(2026, 1, day, 23, 59)

    monkeypatch.setattr(common, "datetime", Clock)


def test_r75_a_run_keeps_its_date_when_it_is_resumed_on_another_day(
    tiny_flags, tmp_path, monkeypatch
):
    flags = {**tiny_flags, "max_steps": 3, "warmup_ratio": 0}
    for name in ("student", "teacher"):
        flags[name] = dated_copy(tiny_flags[name], tmp_path / name)
    killed = tmp_path / "killed"  # the run as a kill after its first step would leave it
    save_checkpoint = common.save_checkpoint

    def save_and_copy(path, step, counts, **parts):
        save_checkpoint(path, step, counts, **parts)
        if step == 1 and not killed.exists():
            shutil.copytree(path.parent, killed)

    monkeypatch.setattr(common, "save_checkpoint", save_and_copy)
    set_day(monkeypatch, 1)
    assert run_script("dckd", **flags, output_dir=tmp_path / "whole") == 0
    set_day(monkeypatch, 2)
    assert run_script("dckd", **flags, output_dir=tmp_path / "next day") == 0
    assert run_script("dckd", resume=killed) == 0

    whole, resumed, next_day = [
        (tmp_path / name / "model/model.safetensors").read_bytes()
        for name in ("whole", "killed", "next day")
    ]
    assert resumed == whole
    assert next_day != whole  # the date matters


def test_r75_the_date_in_a_prompt_is_that_of_the_beginning(
    checkpoints, load, tmp_path, monkeypatch
):
    lm = load(dated_copy(checkpoints["student"], tmp_path / "dated"))
    prompt = [{"role": "user", "content": "Hello"}]
    texts = []
    for day in (1, 2):
        set_day(monkeypatch, day)
        open_run(adpa.Args(output_dir=str(tmp_path / str(day))), "adpa.py")
        set_day(monkeypatch, day + 1)  # midnight
        texts.append(lm.tokenizer.decode(lm.prompt_ids(prompt)))
    assert "Today: 01 Jan 2026" in texts[0]
    assert "Today: 02 Jan 2026" in texts[1]


def without_a_row(rows: list[dict]) -> list[dict]:
    return rows[:2] + rows[3:]


def with_a_row(rows: list[dict]) -> list[dict]:
    return [*rows, {**rows[0], "prompt": "A new one?"}]


def with_another_prompt(rows: list[dict]) -> list[dict]:
    return [*rows[:2], {**rows[2], "prompt": "Go on, please"}, *rows[3:]]


def with_another_response(rows: list[dict]) -> list[dict]:
    return [*rows[:2], {**rows[2], "chosen": "on and off"}, *rows[3:]]


CHANGED_ROWS = {  # how a file changes, and what the message says of it
    "a row less": (without_a_row, "row 3 has another text"),
    "the last row less": (lambda rows: rows[:-1], "has lost rows: 8 were used, now 7"),
    "a row more": (with_a_row, "has got rows: 8 were used, now 9"),
    "another prompt": (with_another_prompt, "row 3 has another text"),
    "another response": (with_another_response, "row 3 has"),
}


def change_weights(folder: Path):
    """What another training run would leave: the same names and sizes, other numbers."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for tensor in tensors.values():
        tensor *= 1.01
    save_file(tensors, path, metadata={"format": "pt"})


def change_template(folder: Path):
    path = folder / "chat_template.jinja"
    path.write_text("<|system|>Be kind.<|end|>" + path.read_text())


@pytest.fixture
def begun(tiny_flags, tmp_path, monkeypatch):
    """begun(script) is a run that was killed after its beginning. Its models and data are copies
    in the same folder, which a test may change."""

    def begin(script: str) -> Path:
        flags = {**tiny_flags, "output_dir": tmp_path / "run", "reward": "test_runs:broken_reward"}
        flags["eval_prompts"] = len(PAIRS) + 1
        if script == "adpa":
            flags["teacher_ref"] = "none"
        for name in ("student", "teacher"):
            flags[name] = shutil.copytree(tiny_flags[name], tmp_path / name)
        for name in ("data", "eval_data"):
            flags[name] = shutil.copy(tiny_flags[name], tmp_path / f"{name}.jsonl")
        with monkeypatch.context() as patch, pytest.raises((TypeError, SystemExit)):
            patch.setattr(common, "has_results", lambda folder: True)  # so that the folder stays
            raise SystemExit(run_script(script, **flags))
        assert (tmp_path / "run/args.json").exists()
        return tmp_path / "run"

    return begin


def resume_error(script: str, run: Path, capsys) -> str:
    """The line with which a resumed run is refused, or "" if it got as far as it did before."""
    capsys.readouterr()
    with contextlib.suppress(TypeError):
        run_script(script, resume=run)
    lines = capsys.readouterr().err.splitlines()
    return "".join(line for line in lines if "cannot resume" in line)


@pytest.mark.parametrize("script", one_short(SCRIPTS, "adpa"))
def test_r76_a_run_is_not_resumed_on_other_rows(script, begun, capsys):
    run = begun(script)
    assert resume_error(script, run, capsys) == ""
    for flag in ("data", "eval_data"):
        path = run.parent / f"{flag}.jsonl"
        original = path.read_bytes()
        for change, expected in CHANGED_ROWS.values():
            write_jsonl(path, change(read_jsonl(path)))
            before = contents(run)
            error = resume_error(script, run, capsys)
            assert f"--{flag} {path}" in error
            assert expected in error
            assert not re.search(r"\d-[0-9a-f]{8}", error)
            assert contents(run) == before
            path.write_bytes(original)
    assert resume_error(script, run, capsys) == ""


@pytest.mark.parametrize("script", one_short(SCRIPTS, "adpa"))
def test_r76_a_run_is_not_resumed_with_other_models(script, begun, capsys):
    run = begun(script)
    for name in ("student", "teacher"):
        folder = run.parent / name
        saved = contents(folder)
        for part, change in (("model", change_weights), ("tokenizer", change_template)):
            change(folder)
            error = resume_error(script, run, capsys)
            assert f"the {part} of {folder} is not what it was" in error
            for file, content in saved.items():
                (folder / file).write_bytes(content)
    assert resume_error(script, run, capsys) == ""


def test_r76_what_else_a_run_learns_from_is_compared(load, tmp_path, capsys):
    """The columns of --annotations and --scores, and the texts of --lm_data."""
    lm = load("student")
    corpus = tmp_path / "corpus.txt"
    args = dpkd.Args(data="scored.jsonl", lm_data=str(corpus))

    def begin(score: float, text: str):
        row = {"id": "7-0509eef7", "prompt": "a", "score": score, "image": object()}
        corpus.write_text(f"One text.\n\n{text}\n")
        pieces = dpkd.read_corpus(lm, args)
        begin_run(tmp_path, args, [lm, None], data=[Example(row, [], [])], lm_data=pieces)

    begin(1.5, "Another text.")
    begin(1.5, "Another text.")
    error = one_error_line(capsys, begin, 1.6, "Another text.")
    assert "--data scored.jsonl, row 7 has other columns" in error
    error = one_error_line(capsys, begin, 1.5, "Yet another text.")
    assert f"--lm_data {corpus}, row 3 has other tokens" in error
    assert "et another text." in error  # what it is now


# -------------------------------------------------------------------------- limits, before any work
def gpt2(folder: Path, tokenizer, positions: int = 64) -> str:
    shape = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": positions}
    torch.manual_seed(0)
    shape |= {"vocab_size": len(tokenizer), "eos_token_id": 5, "bos_token_id": None}
    return save(folder, tokenizer, GPT2LMHeadModel(GPT2Config(**shape)))


def small_config(config_class, **shape):
    return config_class(
        vocab_size=400,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=48,
        **shape,
    )


COUNTED = {  # a model, and how many positions it has
    "GPT-2": (GPT2LMHeadModel, GPT2Config(vocab_size=400, n_embd=8, n_layer=1, n_head=2), 1024),
    # Its table has two more, which no text uses.
    "OPT": (OPTForCausalLM, small_config(OPTConfig, hidden_size=8, word_embed_proj_dim=8), 48),
    "GPT-J": (
        GPTJForCausalLM,
        GPTJConfig(vocab_size=400, n_embd=8, n_layer=1, n_head=2, rotary_dim=4, n_positions=48),
        48,
    ),
    "GPT-1": (
        OpenAIGPTLMHeadModel,
        OpenAIGPTConfig(vocab_size=400, n_embd=8, n_layer=1, n_head=2, n_positions=48),
        48,
    ),
    "CTRL": (
        CTRLLMHeadModel,
        CTRLConfig(vocab_size=400, n_embd=8, dff=8, n_layer=1, n_head=2, n_positions=48),
        48,
    ),
    "Llama": (LlamaForCausalLM, small_config(LlamaConfig, hidden_size=8), math.inf),
}


@pytest.mark.parametrize("family", COUNTED)
def test_r77_positions_are_counted(family):
    """The last one that is counted works, and the next one does not."""
    model_class, config, expected = COUNTED[family]
    model = model_class(config).eval()
    assert common.count_positions(model) == expected
    if expected < math.inf:
        model(torch.zeros(1, expected, dtype=torch.long))
        with pytest.raises((IndexError, RuntimeError)):
            model(torch.zeros(1, expected + 1, dtype=torch.long))


@pytest.mark.parametrize("script", SCRIPTS)
def test_r77_too_few_positions_are_one_line_before_anything_is_sampled(
    script, tiny_flags, tokenizer, tmp_path, capsys
):
    student = gpt2(tmp_path / "gpt2", tokenizer)
    flags = {**tiny_flags, "student": student, "teacher": student, "output_dir": tmp_path / "run"}
    if script == "adpa":
        flags["teacher_ref"] = student

    assert run_script(script, **{**flags, "max_response_tokens": 64}) == 2

    error = capsys.readouterr().err
    assert re.search(rf"error: {student} has 64 positions, not \d+; lower --max_prompt", error)
    assert "Traceback" not in error
    assert not (tmp_path / "run").exists()


ASKED = {  # flags of a script, and the one to lower where the teacher's questions are too long
    "rm_distiller": ({"max_edit_tokens": 400}, "--max_edit_tokens"),
    "pad": ({"alpha": 0.5, "max_response_tokens": 200}, "--max_response_tokens"),
}


@pytest.mark.parametrize("script", ASKED)
def test_r77_a_teacher_with_too_few_positions_for_its_questions_is_one_line_as_early(
    script, tiny_flags, tokenizer, tmp_path, capsys
):
    """Its positions are enough for every prompt with a response."""
    teacher = gpt2(tmp_path / "gpt2", tokenizer, positions=450)
    own, flag = ASKED[script]
    flags = {**tiny_flags, "teacher": teacher, **own, "output_dir": tmp_path / "run"}

    assert run_script(script, **flags) == 2

    error = capsys.readouterr().err
    assert re.search(rf"error: {teacher} has 450 .*; lower --max_prompt_tokens or {flag}\n", error)
    assert not (tmp_path / "run").exists()


def test_r77_a_run_may_use_all_positions(tiny_flags, tokenizer, tmp_path, load):
    lm = load(gpt2(tmp_path / "probe", tokenizer))
    rows = common.read_rows(str(tiny_flags["data"]), "train")
    longest = max(len(lm.prompt_ids(row["prompt"])) for row in rows)
    student = gpt2(tmp_path / "gpt2", tokenizer, positions=longest + 40)
    flags = {**tiny_flags, "student": student, "teacher": student, "eval_prompts": 8}

    for tokens, code in ((40, 0), (41, 2)):
        flags |= {"max_response_tokens": tokens, "output_dir": tmp_path / str(tokens)}
        assert run_script("dckd", **flags) == code


def test_r77_longer_questions_and_samples_are_one_line_as_well(tokenizer, tmp_path, load, capsys):
    """A judge's questions are longer than the prompts that are known at the start."""
    lm = load(gpt2(tmp_path / "gpt2", tokenizer))
    error = one_error_line(capsys, common.pack, [Example({}, [1] * 40, [[2] * 25])], lm)
    assert "64 positions, not 65" in error
    sample = partial(lm.sample, [[1] * 40], max_new_tokens=25, batch_size=1, seed=0)
    assert "64 positions, not 65" in one_error_line(capsys, sample)
    common.pack([Example({}, [1] * 40, [[2] * 24])], lm)


def test_r77_computed_positions_beyond_those_of_the_config_are_a_note(
    tiny_flags, tokenizer, tmp_path, capsys
):
    model = make_model(len(tokenizer), max_position_embeddings=32)
    student = save(tmp_path / "short", tokenizer, model)
    flags = {**tiny_flags, "student": student}

    assert run_script("dckd", **flags, output_dir=tmp_path / "run") == 0

    assert re.search(rf"note: {student} was made for 32 positions", capsys.readouterr().out)


def test_r77_tokens_beyond_the_embeddings_are_one_line(load, tmp_path, capsys):
    """Chat tokens were added to the tokenizer, and the embeddings were not resized."""
    tokenizer = make_tokenizer()
    model = make_model(len(tokenizer))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHAT_TEMPLATE.replace("<|end|>", "<|im_end|>")
    added = save(tmp_path / "added", tokenizer, model)
    error = one_error_line(capsys, load, added)
    assert f"{added}: token <|im_end|>" in error
    assert "resize_token_embeddings" in error
    # A token that no text contains does no harm.
    tokenizer.chat_template = CHAT_TEMPLATE
    lm = load(save(tmp_path / "unused", tokenizer, model))
    assert lm.vocab_size == len(tokenizer) - 2
    error = one_error_line(capsys, common.pack, [Example({}, [1], [[lm.vocab_size]])], lm)
    assert "is beyond its" in error


def test_r77_a_tokenizer_with_holes_in_its_ids_works(load, tiny_flags, tmp_path):
    """The end-of-turn has the id 600, and the tokenizer has 400 tokens."""
    model = make_model(640, eos_token_id=600)
    folder = Path(save(tmp_path / "holes", make_tokenizer(), model))
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    for token in tokenizer["added_tokens"]:
        if token["content"] == "<|end|>":
            token["id"] = 600
    tokenizer["model"]["vocab"]["<|end|>"] = 600
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))

    lm = load(str(folder))

    assert lm.vocab_size == 601
    prompt_ids, [response_ids] = lm.encode([{"role": "user", "content": "Hello"}], ["a coin"])
    assert response_ids[-1] == lm.eos_ids[0] == 600
    _, logps = packed_logps(lm, [Example({}, prompt_ids, [response_ids])], lm.vocab_size)
    expected = plain_log_probs(lm.model, prompt_ids, response_ids, lm.vocab_size)
    expected = expected[range(len(response_ids)), response_ids]
    assert torch.allclose(logps.double(), expected, atol=1e-5)
    flags = {**tiny_flags, "student": folder, "teacher": folder}
    assert run_script("dckd", **flags, output_dir=tmp_path / "run") == 0


@pytest.mark.parametrize("seed, code", [(2**63 - 1, 0), (2**63, 2), (10**23, 2)])
def test_r77_seeds_that_torch_does_not_take_are_one_line(seed, code, tiny_flags, tmp_path, capsys):
    run = tmp_path / "run"
    assert run_script("dckd", **{**tiny_flags, "seed": seed, "output_dir": run}) == code
    if code:
        assert f"--seed {seed} must be a number between 0 and" in capsys.readouterr().err
        assert not run.exists()


def test_r77_checkpointing_that_a_model_does_not_support_is_one_line(load, checkpoints, capsys):
    keywords = {"trainable": True, "gradient_checkpointing": True}
    with mock.patch.object(LlamaForCausalLM, "supports_gradient_checkpointing", False):
        error = one_error_line(capsys, load, "student", **keywords)
    assert f"{checkpoints['student']} does not take --gradient_checkpointing" in error


@pytest.mark.parametrize("script", one_short(["dckd", "dpkd"], "dckd"))
def test_r77_a_gradient_norm_of_0_is_no_limit(script, run_tiny):
    runs = [run_tiny(script, max_grad_norm=norm, learning_rate=1e-2) for norm in (0, 1e9, 1e-3)]
    unlimited, high, low = [first_gradient(run) for run in runs]
    assert all(torch.equal(a, b) for a, b in zip(unlimited, high))
    assert not all(torch.equal(a, b) for a, b in zip(unlimited, low))


def test_r77_a_reward_head_is_as_wide_as_what_it_reads(load, tokenizer, tmp_path):
    """OPT-350m projects its hidden states to another width before its head."""
    config = OPTConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        word_embed_proj_dim=16,
        do_layer_norm_before=False,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        init_std=0.3,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=5,
    )
    torch.manual_seed(0)
    student = load(save(tmp_path / "opt", tokenizer, OPTForCausalLM(config)), trainable=True)
    rm_distiller.add_reward_head(student, seed=1)
    examples = []
    for text in ("a coin", "some tokens of a response"):
        examples.append(Example({}, *student.encode([{"role": "user", "content": "x"}], [text])))
    batch = common.pack(examples, student)
    rewards = rm_distiller.response_rewards(student, student.hidden_states(batch), batch)

    rm_distiller.save_reward_model(student, tmp_path / "rm")

    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm").eval()
    for example, reward in zip(examples, rewards):
        ids = torch.tensor([example.prompt_ids + example.response_ids[0]])
        assert classifier(ids).logits.item() == pytest.approx(reward.item(), abs=1e-5)


# ------------------------------------------------------------------------------- terms of weight 0
def exclude(monkeypatch, ids: list[int], only_student: bool):
    """While a run trains, its models (or the student alone) give these tokens probability 0."""
    logits = common.LM.logits

    def without_tokens(self, hidden, vocab_size):
        values = logits(self, hidden, vocab_size)
        if torch.is_grad_enabled() and (self.trainable or not only_student):
            values = values.index_fill(-1, torch.tensor(ids), -math.inf)
        return values

    monkeypatch.setattr(common.LM, "logits", without_tokens)


def training_row(run: Path) -> dict:
    """The metrics of a run's only step, whose loss and gradient must be finite."""
    [row] = [row for row in read_jsonl(run / "metrics.jsonl") if "losses/total" in row]
    assert math.isfinite(row["losses/total"])
    assert math.isfinite(row["charts/grad_norm"])
    return row


def test_r78_an_infinite_kl_of_weight_0_is_not_in_the_loss(run_tiny, load, pairs, monkeypatch):
    """The student excludes all tokens that no chosen response has."""
    lm = load("student")
    used = set()
    for row in common.read_rows(str(pairs), "train"):
        used.update(lm.encode(row["prompt"], [row["chosen"]])[1][0])
    exclude(monkeypatch, sorted(set(range(lm.vocab_size)) - used), only_student=True)

    row = training_row(run_tiny("dckd", kl_chosen=0, kl_rejected=0))

    assert row["losses/kl_chosen"] == row["losses/kl_rejected"] == math.inf
    assert row["losses/total"] == pytest.approx(row["losses/sft"])


def test_r78_an_infinite_cross_entropy_of_weight_0_is_not_in_the_loss(
    run_tiny, tmp_path, monkeypatch
):
    """The student excludes tokens of y_t, y_s and the corpus. Their log-ratios count as 0."""
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("A piece of text.\n")
    exclude(monkeypatch, list(range(100, 400)), only_student=True)

    row = training_row(run_tiny("dpkd", sft_coef=0, lm_data=corpus, lm_coef=0))

    assert row["losses/sft"] == row["losses/lm"] == math.inf
    assert row["losses/total"] == pytest.approx(row["losses/preference"])


def test_r78_an_infinite_likelihood_of_weight_0_is_not_in_the_loss(
    run_tiny, load, pairs, tmp_path, monkeypatch
):
    """Student and teacher exclude a token that y_T has."""
    rows = []
    for row in read_jsonl(pairs):
        annotation = {"teacher": "an answer", "score_chosen": 8, "score_rejected": 3}
        rows.append({**row, **annotation})
    annotations = write_jsonl(tmp_path / "annotations.jsonl", rows)
    exclude(monkeypatch, load("student").plain_ids("an answer")[:1], only_student=False)

    run = run_tiny("rm_distiller", annotations=annotations, **{"no-refine": True})

    row = training_row(run)
    assert row["losses/nll"] == math.inf
    assert row["losses/total"] == pytest.approx(row["losses/pair"] + 0.1 * row["losses/kl"])


# ------------------------------------------------------------------------------------ guards and -O
@pytest.mark.parametrize("path", CODE, ids=str)
def test_r74_no_guard_is_an_assert_statement(path):
    """`python -O` leaves assert statements out."""
    lines = []
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Assert):
            lines.append(node.lineno)
    assert lines == []


# A step on a response without tokens, and a language model without a head as a judge.
TWO_GUARDS = """
import sys
import torch
from common import LM, Example, load_reward_function, pack
assert False, "assert statements are left out"
device = torch.device("cpu")
lm = LM(sys.argv[1], device)
try:
    pack([Example({}, [1], [[]])], lm)
except ValueError as error:
    print(error)
load_reward_function(sys.argv[1], device)
"""


@pytest.mark.slow
def test_r74_guards_hold_under_python_O(checkpoints):
    process = subprocess.run(
        [sys.executable, "-O", "-c", TWO_GUARDS, checkpoints["teacher"]],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert process.stdout == "a response without tokens\n"
    assert process.returncode == 2, process.stderr
    assert process.stderr.startswith("error: cannot load a model")
    assert "score.weight" in process.stderr
