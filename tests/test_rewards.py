"""What --reward takes and how it is called: functions of two conventions, reward models, none."""

import json
import math
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from conftest import (
    ROOT,
    SCRIPTS,
    TINY_RUN,
    first_rows,
    one_error_line,
    one_short,
    read_jsonl,
    run_script,
    save,
    write_jsonl,
)
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    CohereConfig,
    CohereForCausalLM,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from common import compare_rewards, load_reward_function, mean_reward, read_rows, reward_metrics

CPU = torch.device("cpu")
QUESTION = [{"role": "user", "content": "What is it?"}]
TEXT_ROW = {"prompt": "What is it?", "solution": "a coin", "id": 7}
CHAT_ROW = {"prompt": QUESTION, "solution": "a thing", "id": 8}


def judged_rows(folder, *records: dict) -> list[dict]:
    """The records as rows of a data file."""
    return read_rows(str(write_jsonl(folder / "rows.jsonl", list(records))), "test", columns=())


def file_with(code: str, path) -> str:
    """Writes a file with this code and returns how --reward names its function `reward`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(code)
    return f"{path}:reward"


# ---------------------------------------------------------------------------------- two conventions
CALLS = []  # what the functions below were called with


def keep_call(*arguments, **keywords) -> list[float]:
    for name in ("log_extra", "log_metric"):
        if name in keywords:
            keywords.pop(name)("a name", [1.0])  # it can be called, as in TRL
    CALLS.append((arguments, keywords))
    return [0.5, 1.5]


def ours(prompts, responses):
    return keep_call(prompts, responses)


def ours_by_other_names(questions, texts, strict=True):
    return keep_call(questions, texts, strict=strict)


def trl(prompts, completions, **kwargs):
    return keep_call(prompts=prompts, completions=completions, **kwargs)


def trl_completions_alone(completions, **kwargs):
    return keep_call(completions=completions, **kwargs)


def trl_without_other_keywords(completions, solution):
    return keep_call(completions=completions, solution=solution)


def trl_token_ids(completion_ids, **kwargs):
    return keep_call(completion_ids=completion_ids, **kwargs)


def trl_keywords_alone(**kwargs):
    return keep_call(**kwargs)


def trl_every_keyword(prompts, completions, completion_ids, log_extra, log_metric, **kwargs):
    log_extra("length", [1, 2])
    log_metric("length", 1.5)
    keywords = {"prompts": prompts, "completions": completions, "completion_ids": completion_ids}
    return keep_call(**keywords, **kwargs)


class OfTRL:
    def __call__(self, prompts, completions, **kwargs):
        return keep_call(prompts=prompts, completions=completions, **kwargs)


class OfOurs:
    def __call__(self, prompts, responses):
        return keep_call(prompts, responses)


trl_instance = OfTRL()
ours_instance = OfOurs()
FORMS_OF_TRL = ["trl", "trl_coroutine", "trl_keywords_alone", "trl_every_keyword", "trl_instance"]


def trl_state(completions, trainer_state, **kwargs):
    return keep_call(completions=completions)


async def trl_coroutine(prompts, completions, **kwargs):
    return keep_call(prompts=prompts, completions=completions, **kwargs)


@pytest.fixture
def call(tmp_path):
    """call(name, *records) judges two responses with a function of this file, and returns what the
    function got: (its arguments, its keywords)."""

    def call_one(name: str, *records: dict) -> tuple:
        CALLS.clear()
        rows = judged_rows(tmp_path, *records)
        reward_fn = load_reward_function(f"test_rewards:{name}", CPU, rows=rows)
        samples = [{"text": "A coin.", "token_ids": [4, 5]}, {"text": "A thing.", "token_ids": [6]}]
        assert reward_fn(rows, samples) == [0.5, 1.5]
        [got] = CALLS
        return got

    return call_one


def test_r67_a_function_of_two_arguments_gets_chats_and_texts(call):
    texts = ["A coin.", "A thing."]

    assert call("ours", TEXT_ROW, CHAT_ROW) == (([QUESTION, QUESTION], texts), {})
    assert call("ours_instance", TEXT_ROW, CHAT_ROW) == (([QUESTION, QUESTION], texts), {})
    assert call("ours_by_other_names", TEXT_ROW, CHAT_ROW) == (
        ([QUESTION, QUESTION], texts),
        {"strict": True},
    )


@pytest.mark.parametrize("name", FORMS_OF_TRL)
def test_r67_a_function_of_trl_gets_texts_where_the_prompts_are_texts(name, call):
    arguments, keywords = call(name, TEXT_ROW, {**TEXT_ROW, "id": 9})

    assert arguments == ()
    # The other columns are as they stood in the data, `id` as well, which our rows replace.
    columns = {"solution": ["a coin", "a coin"], "id": [7, 9], "completion_ids": [[4, 5], [6]]}
    assert keywords == {
        "prompts": ["What is it?", "What is it?"],
        "completions": ["A coin.", "A thing."],
        **columns,
    }


@pytest.mark.parametrize("name", FORMS_OF_TRL)
def test_r67_a_function_of_trl_gets_messages_where_the_prompts_are_messages(name, call):
    _, keywords = call(name, CHAT_ROW, CHAT_ROW)

    assert keywords["prompts"] == [QUESTION, QUESTION]
    assert keywords["completions"] == [
        [{"role": "assistant", "content": "A coin."}],
        [{"role": "assistant", "content": "A thing."}],
    ]
    assert keywords["solution"] == ["a thing", "a thing"]


def test_r67_a_prompt_that_is_the_start_of_conversations_is_messages(call):
    chosen = [*QUESTION, {"role": "assistant", "content": "A coin."}]
    row = {"chosen": chosen, "rejected": chosen}

    _, keywords = call("trl", row, row)

    assert keywords["prompts"] == [QUESTION, QUESTION]
    assert keywords["completions"][0] == [{"role": "assistant", "content": "A coin."}]
    assert keywords["chosen"] == [chosen, chosen]


def test_r67_a_function_of_trl_gets_the_keywords_that_it_names(call):
    _, keywords = call("trl_completions_alone", TEXT_ROW, TEXT_ROW)
    assert keywords["completions"] == ["A coin.", "A thing."]
    assert keywords["prompts"] == ["What is it?", "What is it?"]

    _, keywords = call("trl_without_other_keywords", TEXT_ROW, TEXT_ROW)
    assert keywords == {
        "completions": ["A coin.", "A thing."],
        "solution": ["a coin", "a coin"],
    }

    _, keywords = call("trl_token_ids", TEXT_ROW, TEXT_ROW)
    assert keywords["completion_ids"] == [[4, 5], [6]]


def test_r67_a_column_that_one_row_lacks_is_none_there(call):
    _, keywords = call("trl", {"prompt": "What is it?", "level": 3}, {"prompt": "Who is it?"})

    assert keywords["level"] == [3, None]


def test_r67_a_function_that_needs_a_column_which_is_not_there_is_refused_at_once(tmp_path, capsys):
    rows = judged_rows(tmp_path, {"prompt": "What is it?", "level": 3})
    spec = "test_rewards:trl_without_other_keywords"

    error = one_error_line(capsys, load_reward_function, spec, CPU, rows=rows)

    assert f"--reward {spec} needs solution=" in error
    given = "prompts, completions, completion_ids, log_extra, log_metric, level"
    assert f"is given {given}" in error
    spec = "test_rewards:trl_state"
    error = one_error_line(capsys, load_reward_function, spec, CPU, rows=rows)
    assert f"--reward {spec} needs trainer_state=, but is given {given}" in error


def test_r67_the_playgrounds_reward_is_one_of_trl(tmp_path):
    texts = ["Mars and Venus.", "Mars."]
    prompt = "Name two planets."
    rows = judged_rows(
        tmp_path, {"prompt": prompt}, {"prompt": [{**QUESTION[0], "content": prompt}]}
    )
    reward_fn = load_reward_function("playground.world:reward", CPU, rows=rows)

    assert reward_fn(rows, texts) == [1.0, 0.5]

    from playground.world import reward

    assert reward([prompt, prompt], texts) == [1.0, 0.5]
    assert reward(prompts=[prompt, prompt], completions=texts, level=[1, 2]) == [1.0, 0.5]


def test_r67_the_readmes_functions_of_both_conventions_run(tmp_path):
    blocks = re.findall(r"```python\n(def \w+\(.*?)```", (ROOT / "README.md").read_text(), re.S)
    (tmp_path / "rewards.py").write_text("\n\n".join(blocks))
    rows = judged_rows(tmp_path, TEXT_ROW, CHAT_ROW)
    texts = ["It is a coin.", "Nothing."]

    long = load_reward_function(f"{tmp_path}/rewards.py:long", CPU, rows=rows)
    right = load_reward_function(f"{tmp_path}/rewards.py:right", CPU, rows=rows)

    assert long(rows, texts) == [13.0, 8.0]
    assert right(rows, texts) == [1.0, 0.0]


def test_r67_the_function_of_dpkds_page_gets_the_chosen_responses(tmp_path, monkeypatch):
    """With a scorer in place of the package's, which counts whether two texts are equal."""

    class RougeScorer:
        def __init__(self, kinds, use_stemmer):
            assert kinds == ["rougeL"]

        def score(self, target, prediction):
            return {"rougeL": SimpleNamespace(fmeasure=float(target == prediction))}

    package = ModuleType("rouge_score")
    package.rouge_scorer = ModuleType("rouge_score.rouge_scorer")
    package.rouge_scorer.RougeScorer = RougeScorer
    monkeypatch.setitem(sys.modules, "rouge_score", package)
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", package.rouge_scorer)
    page = (ROOT / "docs" / "dpkd.md").read_text()
    [code] = re.findall(r"```python\n(import rouge_score.*?)```", page, re.S)
    spec = file_with(code, tmp_path / "rouge.py")
    row = {"prompt": "What is it?", "chosen": "A coin.", "rejected": "No."}
    rows = judged_rows(tmp_path, row, row)

    assert load_reward_function(spec, CPU, rows=rows)(rows, ["A coin.", "No."]) == [1.0, 0.0]


# ----------------------------------------------------------------------------- where functions lie
NEIGHBOUR = "def count(texts):\n    return [float(len(text)) for text in texts]\n"
USES_NEIGHBOUR = (
    "from a_neighbour import count\n\ndef reward(prompts, texts):\n    return count(texts)\n"
)


@pytest.fixture
def own_folder(tmp_path, monkeypatch):
    """A folder with my_reward.py, which imports what lies beside it. The working directory is
    another one, and paths and modules of the tests are forgotten afterwards."""
    folder = tmp_path / "mine"
    file_with(USES_NEIGHBOUR, folder / "my_reward.py")
    (folder / "a_neighbour.py").write_text(NEIGHBOUR)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield folder
    for name in ("a_neighbour", "my_reward", "reward_file_my_reward"):
        sys.modules.pop(name, None)


def test_r68_a_file_is_found_by_any_path(own_folder, monkeypatch):
    monkeypatch.setenv("HOME", str(own_folder.parent))
    rows = [{"prompt": QUESTION}]

    for path in (own_folder, "../mine", "~/mine", "../elsewhere/../mine"):
        reward_fn = load_reward_function(f"{path}/my_reward.py:reward", CPU)
        assert reward_fn(rows, ["four"]) == [4.0]


def test_r68_a_module_is_found_in_the_working_directory(own_folder, monkeypatch):
    monkeypatch.chdir(own_folder)

    reward_fn = load_reward_function("my_reward:reward", CPU)

    assert reward_fn([{"prompt": QUESTION}], ["four"]) == [4.0]


def test_r68_a_file_takes_the_place_of_no_module(own_folder):
    """A file may be named as a module of ours, of Python or of another reward."""
    spec = file_with("def reward(prompts, texts):\n    return [1.0]\n", own_folder / "json.py")

    reward_fn = load_reward_function(spec, CPU)

    assert reward_fn([{"prompt": QUESTION}], ["four"]) == [1.0]
    assert sys.modules["json"] is json


REFUSED = {
    "no.such:function": "there is no module no",
    "./my_reward:reward": "there is no module",
    "playground.world:nothing": "world.py has no function nothing",
    "math:pi": "has no function pi",
    "no/such/file.py:reward": "there is no file no/such/file.py",
    "my/rewards.py": "is a file: name a function in it, as in my/rewards.py:reward",
    "/no/such/model": "/no/such/model",
    # A path of Windows is a path.
    "C:\\no\\such\\model": "cannot load a model with tokenizer from C:\\no\\such\\model",
    "C:\\no\\such\\file.py:reward": "there is no file C:\\no\\such\\file.py",
}


@pytest.mark.parametrize("spec", REFUSED)
def test_r68_reward_functions_that_do_not_exist_are_one_line(spec, capsys):
    error = one_error_line(capsys, load_reward_function, spec, CPU)

    assert spec in error
    assert REFUSED[spec] in error


BROKEN = {
    "import a_package_that_is_not_installed\n": ModuleNotFoundError,
    "from math import no_such_name\n": ImportError,
    "raise KeyError('mine')\n": KeyError,
    "def reward(prompts, texts)\n    return []\n": SyntaxError,
}


@pytest.mark.parametrize("code", BROKEN)
@pytest.mark.parametrize("as_module", [False, True])
def test_r68_a_file_that_cannot_be_imported_keeps_its_traceback(code, as_module, own_folder):
    spec = file_with(code, own_folder / "my_reward.py")
    if as_module:
        sys.path.append(str(own_folder))
        spec = "my_reward:reward"

    with pytest.raises(BROKEN[code]) as raised:
        load_reward_function(spec, CPU)

    if BROKEN[code] is SyntaxError:
        assert raised.value.filename == str(own_folder / "my_reward.py")
    else:
        assert raised.traceback[-1].path == own_folder / "my_reward.py"


# ------------------------------------------------------------------------------------ what they say
@pytest.mark.parametrize(
    "returned",
    [
        *[[1.0], [1.0, math.nan], [1.0, math.inf], [], [None, math.nan]],
        *[None, 0.5, ["good", "bad"], [(1.0,), (2.0,)], {"a": 1.0, "b": 2.0}],
    ],
    ids=str,
)
def test_rewards_that_are_not_one_finite_number_each_are_one_line(returned, capsys, monkeypatch):
    def odd_reward(prompts, responses):
        return returned

    monkeypatch.setattr("playground.world.reward", odd_reward)
    reward_fn = load_reward_function("playground.world:reward", CPU)

    error = one_error_line(capsys, reward_fn, [{"prompt": QUESTION}] * 2, ["a", "b"])

    assert f"must return a list of 2 finite numbers; it returned {returned}" in error


def test_r67_an_error_in_a_function_keeps_its_traceback_and_a_class_is_no_function(
    capsys, monkeypatch
):
    def broken(prompts, responses):
        return float("many")

    monkeypatch.setattr("test_rewards.broken", broken, raising=False)
    reward_fn = load_reward_function("test_rewards:broken", CPU)
    with pytest.raises(ValueError, match="many"):
        reward_fn([{"prompt": QUESTION}], ["a"])

    error = one_error_line(capsys, load_reward_function, "test_rewards:OfTRL", CPU)
    assert "--reward test_rewards:OfTRL is a class: name a function, or an instance" in error


def test_r67_tensors_and_numpy_numbers_are_rewards(monkeypatch):
    def reward(prompts, responses):
        return torch.tensor([1.0, 2.5])

    monkeypatch.setattr("playground.world.reward", reward)
    rewards = load_reward_function("playground.world:reward", CPU)([{"prompt": QUESTION}] * 2, "ab")

    assert rewards == [1.0, 2.5]
    assert json.dumps(rewards) == "[1.0, 2.5]"


def rewards(*values: float | None) -> list[dict]:
    return [{"reward": value} for value in values]


def test_rewards_are_compared_by_their_means_and_by_wins_per_prompt():
    """The third prompt wins, the second loses, the first and the last are ties: ½ + 0 + 1 + ½."""
    before = rewards(1.0, 3.0, 0.0, 2.0)
    after = rewards(1.0, 1.0, 5.0, 2.0)
    teacher = rewards(4.0, 4.0, 4.0, 6.0)

    results = compare_rewards(before, after, teacher)

    assert results == {
        "reward_before": pytest.approx(6 / 4),
        "reward_after": pytest.approx(9 / 4),
        "reward_teacher": pytest.approx(18 / 4),
        "win_rate": pytest.approx(2 / 4),
        # The deviations from ½ are 0, −½, ½ and 0, whose mean square is 1/8. There are 4 prompts.
        "win_rate_stderr": pytest.approx(math.sqrt(1 / 8) / math.sqrt(4)),
    }


def test_r67_responses_to_which_a_function_does_not_apply_are_left_out_of_the_mean():
    """The second prompt has no reward, and the last one only before training: 1 win of 2."""
    before = rewards(1.0, None, 5.0, 9.0)
    after = rewards(2.0, None, 4.0, None)
    teacher = rewards(None, None, 7.0, None)

    assert compare_rewards(before, after, teacher) == {
        "reward_before": pytest.approx(15 / 3),
        "reward_after": pytest.approx(6 / 2),
        "reward_teacher": pytest.approx(7.0),
        "win_rate": pytest.approx(1 / 2),
        "win_rate_stderr": pytest.approx(math.sqrt(1 / 4) / math.sqrt(2)),
    }
    assert reward_metrics(before) == {"eval/reward": pytest.approx(15 / 3)}


def test_r67_a_function_that_applies_to_no_response_is_one_line(capsys):
    error = one_error_line(capsys, mean_reward, rewards(None, None, None))

    assert "None for all of 3 responses" in error


# ------------------------------------------------------------------------------------ reward models
def tiny_classifier(folder: Path, tokenizer, labels: list[str], pad_token_id=0):
    """(folder, model) of a random classifier of Llama's shape with these labels."""
    names = dict(enumerate(labels))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        id2label=names,
        label2id={name: index for index, name in names.items()},
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.3,
        pad_token_id=pad_token_id,
    )
    model = LlamaForSequenceClassification(config)
    return save(folder, tokenizer, model), model


@pytest.fixture
def reward_model(tmp_path, tokenizer):
    """(folder, model) of a random reward model, whose padding is the end of turn: the trap."""
    return tiny_classifier(
        tmp_path / "rm", tokenizer, ["reward"], pad_token_id=tokenizer.eos_token_id
    )


def test_r43_a_reward_model_is_read_at_the_last_token_even_when_pad_is_eos(reward_model, load):
    path, model = reward_model
    responses = ["A.", "Something much longer than that.", "", "B", "Nothing at all."]
    reward_fn = load_reward_function(path, CPU, batch_size=2)

    rewards = reward_fn([{"prompt": QUESTION}] * 5, responses)

    lm = load("student")
    for response, reward in zip(responses, rewards, strict=True):
        prompt_ids, [response_ids] = lm.encode(QUESTION, [response])
        with torch.no_grad():
            hidden = model.model(torch.tensor([prompt_ids + response_ids])).last_hidden_state
            expected = model.score(hidden[0, -1]).item()
        assert reward == pytest.approx(expected, abs=1e-4)


def own_logits(model, tokenizer, response: str) -> list[float]:
    """What transformers' classifier says of a chat."""
    chat = [*QUESTION, {"role": "assistant", "content": response}]
    ids = tokenizer.apply_chat_template(chat, return_dict=False)
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].tolist()


def test_r70_a_judge_with_several_labels_is_refused_with_its_labels(tmp_path, tokenizer, capsys):
    path, _ = tiny_classifier(tmp_path / "rm", tokenizer, ["bad", "good"])

    error = one_error_line(capsys, load_reward_function, path, CPU)

    assert "has several labels: choose one with --reward_label: 0 (bad), 1 (good)" in error


@pytest.mark.parametrize("label", ["helpfulness", "honesty", "0", "2"])
def test_r70_the_label_that_is_chosen_is_the_reward(label, tmp_path, tokenizer):
    labels = ["helpfulness", "honesty", "brevity"]
    path, model = tiny_classifier(tmp_path / "rm", tokenizer, labels)
    index = labels.index(label) if label in labels else int(label)
    responses = ["A.", "Something longer."]

    reward_fn = load_reward_function(path, CPU, label=label)

    expected = [own_logits(model, tokenizer, response)[index] for response in responses]
    assert abs(expected[0] - expected[1]) > 0.01
    rewards = reward_fn([{"prompt": QUESTION}] * 2, responses)
    assert rewards == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("labels", [["bad", "good"], ["only"]])
def test_r70_a_label_that_is_not_there_is_refused(labels, tmp_path, tokenizer, capsys):
    path, _ = tiny_classifier(tmp_path / "rm", tokenizer, labels)

    for label in ("better", "2", "-1"):
        error = one_error_line(capsys, load_reward_function, path, CPU, label=label)
        assert f"--reward_label {label} is no label of {path}, which has 0 ({labels[0]})" in error


@pytest.mark.parametrize("spec", ["none", "conftest:vowels"])
def test_r70_a_label_for_what_has_none_is_refused(spec, capsys):
    error = one_error_line(capsys, load_reward_function, spec, CPU, label="good")

    assert "--reward_label good" in error and spec in error


@pytest.mark.parametrize("rows_of_head", [1, 2, 3])
def test_r71_a_config_without_labels_has_those_of_the_weights(
    rows_of_head, tmp_path, tokenizer, capsys
):
    """transformers takes such a config for one of two labels."""
    path, model = tiny_classifier(tmp_path / "rm", tokenizer, ["a", "b", "c"][:rows_of_head])
    config_file = tmp_path / "rm" / "config.json"
    config = json.loads(config_file.read_text())
    del config["id2label"], config["label2id"]
    config_file.write_text(json.dumps(config))

    if rows_of_head > 1:
        error = one_error_line(capsys, load_reward_function, path, CPU)
        last = rows_of_head - 1
        assert f"{last} (LABEL_{last})" in error
    reward_fn = load_reward_function(path, CPU, label=str(rows_of_head - 1))
    [reward] = reward_fn([{"prompt": QUESTION}], ["A."])
    assert reward == pytest.approx(own_logits(model, tokenizer, "A.")[-1], abs=1e-4)


def small(config_class, vocab_size: int, **more):
    """A small config of an encoder."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return config_class(
        vocab_size=vocab_size, **sizes, intermediate_size=64, num_labels=1, pad_token_id=0, **more
    )


OTHER_CLASSIFIERS = {
    "Bert": (BertConfig, BertForSequenceClassification),
    "Roberta": (RobertaConfig, RobertaForSequenceClassification),
    "DebertaV2": (DebertaV2Config, DebertaV2ForSequenceClassification),
    "ModernBert": (ModernBertConfig, ModernBertForSequenceClassification),
}


@pytest.mark.parametrize("family", OTHER_CLASSIFIERS)
def test_r71_an_encoder_is_refused_with_the_reason(family, tmp_path, tokenizer, capsys):
    config_class, model_class = OTHER_CLASSIFIERS[family]
    model = model_class(small(config_class, len(tokenizer)))
    path = save(tmp_path / "rm", tokenizer, model)

    error = one_error_line(capsys, load_reward_function, path, CPU)

    assert f"{family}ForSequenceClassification has no linear head `score`" in error
    assert "need a reward function" in error


def test_r71_a_head_under_another_name_is_refused_with_the_weights_it_lacks(
    tmp_path, tokenizer, capsys
):
    """As the value heads of OpenRLHF and TRL."""
    path, _ = tiny_classifier(tmp_path / "rm", tokenizer, ["reward"])
    file = tmp_path / "rm" / "model.safetensors"
    weights = load_file(file)
    weights["value_head.weight"] = weights.pop("score.weight")
    save_file(weights, file, {"format": "pt"})

    error = one_error_line(capsys, load_reward_function, path, CPU)

    assert "lacks weights: ['score.weight']" in error


def test_r71_weights_of_another_shape_are_refused_with_the_shapes(
    checkpoints, tmp_path, capsys, load
):
    """Not with transformers' words, which name a report that is switched off here."""
    shutil.copytree(checkpoints["student"], tmp_path / "model")
    config_file = tmp_path / "model" / "config.json"
    config = json.loads(config_file.read_text())
    config["intermediate_size"] = 48
    config_file.write_text(json.dumps(config))

    error = one_error_line(capsys, load, str(tmp_path / "model"))

    assert re.search(r"\.weight has the shape \[.*\], by its config \[.*48.*\]", error)
    assert "report" not in error


def test_r71_an_architecture_without_classifier_is_refused_with_the_reason(
    tmp_path, tokenizer, capsys
):
    torch.manual_seed(0)
    config = CohereConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    path = save(tmp_path / "rm", tokenizer, CohereForCausalLM(config))

    error = one_error_line(capsys, load_reward_function, path, CPU)

    assert "transformers has no sequence classifier for cohere" in error


def test_r71_a_score_that_is_not_the_heads_is_refused(reward_model, capsys, monkeypatch):
    """As in an architecture that scales its scores, or reads them at another token."""
    path, model = reward_model
    forward = type(model).forward

    def scaled(self, *arguments, **keywords):
        output = forward(self, *arguments, **keywords)
        output.logits = 1.01 * output.logits
        return output

    monkeypatch.setattr(type(model), "forward", scaled)

    error = one_error_line(capsys, load_reward_function, path, CPU)

    assert "its score is not that of a linear head at the last token" in error


# -------------------------------------------------------------------------------------------- none
def test_r69_no_reward_is_no_number():
    assert load_reward_function("none", CPU) is None
    assert reward_metrics([{"text": "a"}]) == {}
    assert compare_rewards([{"text": "a"}], [{"text": "b"}], [{"text": "c"}]) == {}


def flags_without_reward(script: str, pairs, tmp_path) -> dict:
    """Flags of a run of two steps with evaluations, and without a reward."""
    flags = {"reward": "none", "max_steps": 2, "eval_every": 1}
    if script == "adpa":
        flags["teacher_ref"] = "none"
    if script == "rm_distiller":
        # Rows as an annotation leaves them. A random teacher says nothing that can be read.
        rows = []
        for row in read_jsonl(pairs):
            scores = {"score_chosen": 8.0, "score_rejected": 3.0, "score_refined": 9.0}
            rows.append({**row, **scores, "refined": row["chosen"], "teacher": row["chosen"]})
        flags["annotations"] = write_jsonl(tmp_path / "annotations.jsonl", rows)
    if script == "pad":
        flags["alpha"] = 1
    return flags


def check_run_without_reward(run: Path):
    """A finished run that has a model, and no number that comes from a reward."""
    assert (run / "model" / "model.safetensors").exists()
    summary = json.loads((run / "summary.json").read_text())
    for row in [summary, *read_jsonl(run / "metrics.jsonl")]:
        for name, value in row.items():
            assert value is None or not re.search("reward|win_rate|best_of", name), name


@pytest.mark.parametrize("script", one_short(SCRIPTS, "rm_distiller"))
def test_r69_a_run_without_reward_trains_saves_and_answers(
    script, run_tiny, pairs, tmp_path, capsys
):
    run = run_tiny(script, **flags_without_reward(script, pairs, tmp_path))

    check_run_without_reward(run)
    out = capsys.readouterr().out
    if script == "rm_distiller":
        [*_, last] = read_jsonl(run / "metrics.jsonl")
        assert 0 <= last["eval/accuracy"] <= 1
    else:
        for name in ("before", "after", "teacher"):
            for row in read_jsonl(run / f"eval_{name}.jsonl"):
                assert isinstance(row["text"], str)
                assert "reward" not in row
        # The answers are shown all the same.
        assert "before" in out


def test_r69_a_baseline_without_reward_trains_and_saves(checkpoints, pairs, tmp_path):
    flags = {**TINY_RUN, "reward": "none", "max_steps": 2, "eval_every": 1, "loss": "reverse_kl"}
    models = {"student": checkpoints["student"], "teacher": checkpoints["teacher"]}
    run = tmp_path / "run"

    code = run_script(
        "studies/baselines", **models, **flags, data=pairs, eval_data=pairs, output_dir=run
    )

    assert code == 0
    check_run_without_reward(run)


# ------------------------------------------------------------ own data on the playground
# RM-Distiller has no reward: see the last of these tests.
JUDGED_SCRIPTS = [name for name in SCRIPTS if name != "rm_distiller"] + ["studies/baselines"]
PASS_EVAL_DATA = "pass --eval_data with prompts of your own, and --reward none"
CANNOT_JUDGE = "cannot judge 8 of 8 prompts"
NO_MODEL = "cannot load a model with tokenizer from /no/"


@pytest.fixture
def refusal(pairs, tmp_path, capsys):
    """refusal(script, **flags) is the line with which a script ends that has no models to load. A
    value "own" stands for data of the user's own, "copy" for rows of the playground elsewhere."""
    copies = {
        "data": first_rows("train", 20, tmp_path),
        "eval_data": first_rows("rm_test", 20, tmp_path),
    }

    def run(script: str, **flags) -> str:
        for name, value in flags.items():
            if value == "own":
                flags[name] = pairs
            elif value == "copy":
                flags[name] = copies[name]
        models = {"student": "/no/student", "teacher": "/no/teacher"}
        capsys.readouterr()
        assert run_script(script, **models, output_dir=tmp_path / "run", **flags) == 2
        assert not (tmp_path / "run").exists()
        return capsys.readouterr().err

    return run


@pytest.mark.parametrize("script", one_short(JUDGED_SCRIPTS, "dckd"))
def test_r69_own_data_is_not_evaluated_on_the_playground(script, refusal):
    assert PASS_EVAL_DATA in refusal(script, data="own")
    assert PASS_EVAL_DATA in refusal(script, data="own", reward="none")
    assert PASS_EVAL_DATA in refusal(script, data="own", eval_data="copy")
    error = refusal(script, data="own", eval_data="own")
    assert CANNOT_JUDGE in error
    assert "pass --reward none, a function of your own (file.py:function)" in error
    assert CANNOT_JUDGE in refusal(script, eval_data="own")


@pytest.mark.parametrize("script", one_short(JUDGED_SCRIPTS, "dckd"))
def test_r69_own_data_with_what_it_needs_and_the_playgrounds_rows_elsewhere_are_taken(
    script, refusal
):
    assert NO_MODEL in refusal(script, data="own", eval_data="own", reward="none")
    assert NO_MODEL in refusal(script, data="own", eval_data="own", reward="conftest:vowels")
    assert NO_MODEL in refusal(script, data="copy")
    assert NO_MODEL in refusal(script, data="copy", eval_data="copy")
    assert NO_MODEL in refusal(script)


def test_r69_a_run_that_uses_no_reward_needs_none(refusal):
    assert NO_MODEL in refusal("rm_distiller", data="own", eval_data="own")
    error = refusal("rm_distiller", data="own")
    assert "pass --eval_data with prompts of your own\n" in error


def test_r69_a_copy_of_the_scripts_needs_no_playground(refusal, monkeypatch):
    monkeypatch.setitem(sys.modules, "playground.world", None)

    assert NO_MODEL in refusal("dckd", data="own", eval_data="own", reward="none")
