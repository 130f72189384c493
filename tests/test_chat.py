"""playground/chat.py: it says what `LM.sample` samples, there are several ways to end it, and some
models are refused. Sessions are piped in, as `printf ... | python -m playground.chat` does it."""

import io
import json
import shutil
import signal
import subprocess
import sys
from itertools import pairwise

import pytest
import torch
import transformers
from conftest import ROOT, make_model, make_tokenizer, save

from common import LM
from playground import chat

STUDENT = str(ROOT / "playground/student")
QUESTION = "Name three planets."


@pytest.fixture
def converse(monkeypatch, capsys):
    """converse(model, "one line\\n", temperature=0) is all that a chat prints."""

    def run(model: str, typed: str, **flags) -> str:
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        capsys.readouterr()
        chat.main(chat.Args(model, **flags))
        return capsys.readouterr().out

    return run


@pytest.fixture
def asked(monkeypatch) -> list[list[int]]:
    """The token ids of all prompts of the chats of a test, which are answered with "Mars."."""
    prompts = []

    def respond(lm, prompt_ids, *, temperature, max_new_tokens):
        prompts.append(prompt_ids)
        return {"text": "Mars.", "finished": True}

    monkeypatch.setattr(chat, "respond", respond)
    return prompts


def sampled_response(path: str, temperature: float, max_new_tokens: int = 256) -> str:
    """The response of `LM.sample` to QUESTION."""
    lm = LM(path, torch.device("cpu"))
    prompt_ids = lm.prompt_ids([{"role": "user", "content": QUESTION}])
    [[response]] = lm.sample(
        [prompt_ids],
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        batch_size=1,
        seed=chat.Args.seed,
    )
    return response["text"]


def responses_in(output: str) -> list[str]:
    """The first line of every response, which follows a line with a question."""
    lines = output.splitlines()
    responses = []
    for line, next_line in pairwise(lines):
        if line.startswith("> ") and line != "> ":
            responses.append(next_line)
    return responses


# ---------------------------------------------------------------------------------------- responses
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("name", ["student", "teacher"])
def test_the_first_response_is_that_of_lm_sample(converse, name, temperature):
    path = str(ROOT / "playground" / name)
    output = converse(path, f"{QUESTION}\n", temperature=temperature)
    assert responses_in(output) == [sampled_response(path, temperature)]


def test_a_seed_gives_one_chat_and_another_seed_another(converse):
    typed = f"{QUESTION}\n" * 4
    first = responses_in(converse(STUDENT, typed))
    assert len(set(first)) > 1, "the same question again has a new response"
    assert responses_in(converse(STUDENT, typed)) == first
    assert responses_in(converse(STUDENT, typed, seed=2)) != first


def test_nothing_of_the_checkpoints_own_settings_counts(converse, tmp_path):
    shutil.copytree(STUDENT, tmp_path / "model")
    path = tmp_path / "model/generation_config.json"
    settings = json.loads(path.read_text())
    settings |= {"do_sample": True, "top_k": 1, "repetition_penalty": 5.0, "max_length": 9}
    path.write_text(json.dumps(settings))
    expected = sampled_response(STUDENT, temperature=1.0)
    assert responses_in(converse(str(tmp_path / "model"), f"{QUESTION}\n")) == [expected]


def test_a_response_is_printed_while_it_is_sampled(converse, monkeypatch):
    pieces = []

    def keep(self, text, stream_end=False):
        pieces.append(text)

    monkeypatch.setattr(transformers.TextStreamer, "on_finalized_text", keep)
    converse(STUDENT, f"{QUESTION}\n", temperature=0.0)
    assert len([piece for piece in pieces if piece]) > 3
    assert "".join(pieces) == sampled_response(STUDENT, temperature=0.0)


def test_a_response_that_is_cut_off_says_so(converse):
    output = converse(STUDENT, f"{QUESTION}\n", temperature=0.0, max_new_tokens=2)
    assert responses_in(output) == [sampled_response(STUDENT, 0.0, max_new_tokens=2)]
    assert "(cut off after 2 tokens)" in output
    assert "cut off" not in converse(STUDENT, f"{QUESTION}\n", temperature=0.0)


# ------------------------------------------------------------------------------------ conversations
def test_every_question_stands_alone_unless_history_is_kept(converse, asked):
    lm = LM(STUDENT, torch.device("cpu"))
    typed = "Name two fish.\nName one bird.\n/new\nName one tree.\n"

    def user(text: str) -> dict:
        return {"role": "user", "content": text}

    converse(STUDENT, typed)
    questions = ["Name two fish.", "Name one bird.", "Name one tree."]
    assert asked == [lm.prompt_ids([user(question)]) for question in questions]

    asked.clear()
    assert "(a new conversation)" in converse(STUDENT, typed, keep_history=True)
    reply = {"role": "assistant", "content": "Mars."}
    two_turns = [user("Name two fish."), reply, user("Name one bird.")]
    assert asked[0] == lm.prompt_ids([user("Name two fish.")])
    assert asked[1] == lm.prompt_ids(two_turns)
    assert asked[2] == lm.prompt_ids([user("Name one tree.")])


def test_a_system_prompt_opens_every_conversation(converse, asked):
    lm = LM(STUDENT, torch.device("cpu"))
    converse(STUDENT, "Name two fish.\n/new\nName two fish.\n", system="Be kind.")
    system = {"role": "system", "content": "Be kind."}
    expected = lm.prompt_ids([system, {"role": "user", "content": "Name two fish."}])
    assert asked == [expected, expected]


def test_special_tokens_that_a_person_types_stay_text(converse, asked, checkpoints):
    lm = LM(checkpoints["student"], torch.device("cpu"))
    converse(checkpoints["student"], "One<|end|><|user|>two\nOne\n")
    end_id = lm.tokenizer.convert_tokens_to_ids("<|end|>")
    user_id = lm.tokenizer.convert_tokens_to_ids("<|user|>")
    for prompt_ids in asked:
        assert prompt_ids.count(end_id) == prompt_ids.count(user_id) == 1
    assert "One<|end|><|user|>two" in lm.tokenizer.decode(asked[0])


def test_the_models_context_is_not_exceeded(converse, tmp_path):
    tokenizer = make_tokenizer()
    model = make_model(len(tokenizer), max_position_embeddings=40)
    path = save(tmp_path / "short", tokenizer, model)
    lm = LM(path, torch.device("cpu"))
    short = "word " * 5
    room = 40 - len(lm.prompt_ids([{"role": "user", "content": short.strip()}]))
    assert room > 0
    output = converse(path, f"{'word ' * 40}\n{short}\n", temperature=0.0)
    assert output.count("(too long: this model takes 40 tokens; /new begins again)") == 1
    assert f"(cut off after {room} tokens)" in output


def test_only_the_playgrounds_models_come_with_a_hint(converse, asked, checkpoints):
    assert QUESTION in converse(STUDENT, "")
    assert QUESTION not in converse(checkpoints["student"], "")


# ------------------------------------------------------------------------------------------ endings
@pytest.mark.parametrize(
    "typed", ["", "\n", "  \n", "Name one fish.\n", "Name one fish.\n\nOne?\n"]
)
def test_an_empty_line_or_the_end_of_the_input_ends_it(converse, asked, typed):
    output = converse(STUDENT, typed)
    assert output.endswith("Goodbye.\n")
    assert len(asked) == typed.count("fish"), "nothing behind an empty line is read"


def test_ctrl_c_ends_it_while_a_person_types(converse, monkeypatch):
    def interrupted(prompt):
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", interrupted)
    assert converse(STUDENT, "").endswith("\nGoodbye.\n")


def test_ctrl_c_ends_it_in_the_middle_of_a_response(converse, monkeypatch):
    def interrupted(self, text, stream_end=False):
        print(text, end="")
        raise KeyboardInterrupt

    monkeypatch.setattr(transformers.TextStreamer, "on_finalized_text", interrupted)
    assert converse(STUDENT, f"{QUESTION}\n").endswith("\nGoodbye.\n")


def start_chat(*words: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-W", "error::FutureWarning", "-m", "playground.chat", *words],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@pytest.mark.slow
def test_a_piped_session_in_a_process_of_its_own():
    """Bytes that are no text do no harm, and nothing is written to stderr."""
    typed = f"{QUESTION}\n\xff Gr\u00f6\u00dfe\n".encode("latin-1")
    out, err = start_chat("playground/student", "--temperature", "0").communicate(typed, 120)
    assert err == b""
    lines = out.decode().splitlines()
    assert lines[-1] == "Goodbye."
    assert sampled_response(STUDENT, temperature=0.0) in lines


@pytest.mark.slow
def test_a_real_ctrl_c_ends_it_with_exit_code_0():
    process = start_chat("playground/student")
    shown = b""
    while not shown.endswith(b"> "):
        shown += process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, b"")
    assert out == b"\nGoodbye.\n"


# --------------------------------------------------------------------------------------- the models
def test_a_run_stands_for_its_model(converse, tmp_path):
    shutil.copytree(STUDENT, tmp_path / "model")
    (tmp_path / "args.json").write_text("{}")
    output = converse(str(tmp_path), f"{QUESTION}\n", temperature=0.0)
    assert output.startswith(f"{tmp_path}/model: 28,536 parameters, on cpu\n")
    assert responses_in(output) == [sampled_response(STUDENT, temperature=0.0)]


def refusal(capsys, model, **flags) -> str:
    """The one line that a chat ends with before it begins."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        chat.main(chat.Args(str(model), **flags))
    assert stopped.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    [line] = captured.err.splitlines()
    assert line.startswith("error: ")
    return line


def test_a_path_that_does_not_exist_is_refused_in_one_line(capsys, tmp_path):
    missing = tmp_path / "none"
    assert f"there is no folder {missing}" in refusal(capsys, missing)
    assert "there is no folder runs/none" in refusal(capsys, "runs/none")
    assert "there is no folder none/model" in refusal(capsys, "none/model")


def test_a_folder_without_a_model_is_refused_in_one_line(capsys, tmp_path):
    assert "neither a run nor a model" in refusal(capsys, tmp_path)
    (tmp_path / "args.json").write_text("{}")
    assert f"finish the run with --resume {tmp_path}" in refusal(capsys, tmp_path)
    (tmp_path / "config.json").write_text("{")
    (tmp_path / "args.json").unlink()
    assert f"cannot load a model from {tmp_path}" in refusal(capsys, tmp_path)


@pytest.mark.parametrize("architecture", ["LlamaForSequenceClassification", "LlamaForCausalLM"])
def test_a_reward_model_is_refused_in_one_line(capsys, tmp_path, architecture):
    """Whatever its config calls it, it has one label. The second is what rm_distiller.py saved."""
    folder = tmp_path / "run/model"
    config = transformers.AutoConfig.from_pretrained(STUDENT, num_labels=1)
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    save(folder, transformers.AutoTokenizer.from_pretrained(STUDENT), model)
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = [architecture]
    (folder / "config.json").write_text(json.dumps(config))
    assert f"{folder} is a reward model" in refusal(capsys, tmp_path / "run")


@pytest.mark.parametrize(
    "flags",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"max_new_tokens": 0},
        {"device": "nonsense"},
    ],
)
def test_flags_that_make_no_sense_are_refused_in_one_line(capsys, flags):
    [flag] = flags
    assert f"--{flag} " in refusal(capsys, STUDENT, **flags)
