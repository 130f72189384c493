"""studies/worlds.py: what the variants of the playground ask, hold and reward."""

import json
import random
import re
import statistics
from collections import Counter
from dataclasses import replace

import pytest
import torch
from conftest import read_jsonl
from transformers import AutoTokenizer

from common import LM
from playground import build, world
from playground.world import KIND_WORDS, RIGHT, assess, read_request
from studies import worlds

_, HELD_OUT = world.all_requests()


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Few held-out requests, and teachers as small as students."""
    monkeypatch.setattr(build, "TEST_REQUESTS", HELD_OUT[::16])
    monkeypatch.setattr(build, "TEACHER", build.STUDENT)


def make(variant: str, folder, **flags) -> dict:
    """What is measured of a variant that was hardly trained."""
    defaults = {"train_pairs": 40, "test_pairs": 16, "student_steps": 2, "teacher_steps": 3}
    worlds.main(worlds.Args(variant, output_dir=str(folder), **{**defaults, **flags}))
    return json.loads((folder / "measured.json").read_text())


# ------------------------------------------------------------------------------------------ lengths
TWO_FISH = "Name two fish. Describe each."
TROUT = "The first that comes to my mind is trout, which is old and quiet"
COD = "The second that comes to my mind is cod, which is common and large"
WHALE = "The second that comes to my mind is whale, which is large and old"
ANSWERS = {
    f"{TROUT}. {COD}. Enjoy!": 1.2,
    f"{TROUT}. {COD}.": 1.0,
    f"{TROUT}. {COD}": 0.5,
    f"{TROUT}. {WHALE}. Enjoy!": 0.5 - 0.5 + 0.2,
    f"{TROUT}. Enjoy!": 0.7,
    f"{TROUT}. {TROUT}. Enjoy!": 0.5 - 0.5 + 0.2,
    # A sentence of another form is a wrong word, and chatter behind the end counts by its words.
    f"{TROUT}. cod and carp. Enjoy!": 0.5 - 0.5 + 0.2,
    f"{TROUT}. {COD}. I hope": 0.0,
    "trout and cod. Enjoy!": 0.0 - 0.5 + 0.2,
    "": -0.5,
}


@pytest.mark.parametrize("answer", ANSWERS)
def test_the_reward_of_sentences_by_hand(answer):
    chat = [{"role": "user", "content": TWO_FISH}]
    completion = [{"role": "assistant", "content": answer}]
    expected = [ANSWERS[answer]]
    assert worlds.reward([TWO_FISH], [answer]) == pytest.approx(expected)
    assert worlds.reward([chat], [completion]) == pytest.approx(expected)


def test_sentences_are_worth_what_their_words_are():
    """By every writer, to every held-out request, in either form."""
    rng = random.Random(5)
    for request in HELD_OUT:
        assert worlds.verdict_on(request, "cod.").reward == assess(request, "cod.").reward
        words = world.write(request, rng.random(), rng)
        verdict = assess(request, words)
        sentences = worlds.describe(verdict.words, verdict.ended, verdict.kind_word, rng)
        described = replace(request, text=request.text + worlds.DESCRIBE)
        if verdict.words:
            assert worlds.verdict_on(described, sentences).reward == verdict.reward


def test_answers_have_3_to_60_words():
    """But for a few of poor writers, which have a word too few or one too many."""
    requests = worlds.requests_of_both_kinds(HELD_OUT)
    rng = random.Random(1)
    lengths = []
    for request in requests * 8:
        lengths.append(len(worlds.write(request, 1.0, rng).split()))
    assert min(lengths) == 3 and 57 <= max(lengths) <= 60
    assert statistics.mean(length > 30 for length in lengths) > 0.25
    assert statistics.mean(length < 10 for length in lengths) > 0.25


def test_lengths_have_data_a_student_and_a_teacher(tmp_path):
    measured = make("lengths", tmp_path)
    assert measured.keys() == {"student", "teacher", "seconds"}
    assert -1 <= measured["student"]["reward"] <= 1.2
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "teacher")
    train_rows = read_jsonl(tmp_path / "data/train.jsonl")
    assert len(train_rows) == 40 and len(read_jsonl(tmp_path / "data/test.jsonl")) == 16
    is_long = [row["prompt"].endswith(worlds.DESCRIBE) for row in train_rows]
    assert 10 < sum(is_long) < 35
    for row in train_rows:
        for text in (row["prompt"], row["chosen"], row["rejected"]):
            tokens = tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids)
            # A token for every word and sign: no byte, nothing unknown.
            assert not any(token.startswith("<") for token in tokens), (text, tokens)
            assert len(tokens) == len(re.findall(r"\w+|[.,!?]", text))
    gaps = []
    for row in train_rows:
        chosen, rejected = worlds.reward([row["prompt"]] * 2, [row["chosen"], row["rejected"]])
        gaps.append(chosen - rejected)
    assert statistics.mean(gaps) > 0.1


# ------------------------------------------------------------------------------------------- styles
def style_of(row: dict, column: str) -> set[int]:
    """The styles that an answer may have, from its kind word and its first right word."""
    request = read_request(row["prompt"])
    answer = row[column]
    styles = {0, 1, 2}
    for style, kind_word in enumerate(KIND_WORDS):
        if answer.endswith(kind_word):
            styles &= {style}
    for word in re.findall(r"\w+", answer.partition(".")[0]):
        if word in RIGHT[request.category]:
            return styles & {RIGHT[request.category].index(word) // 4}
    return styles


def test_the_better_writer_has_another_style(tmp_path):
    measured = make("styles", tmp_path, train_pairs=300)
    assert 0.7 < measured["chosen in the good style"] < 0.95
    gaps = []
    for row in read_jsonl(tmp_path / "data/train.jsonl"):
        chosen, rejected = world.reward([row["prompt"]] * 2, [row["chosen"], row["rejected"]])
        gaps.append(chosen - rejected)
        styles = (style_of(row, "chosen"), style_of(row, "rejected"))
        assert ({0} <= styles[0] and {1} <= styles[1]) or ({1} <= styles[0] and {0} <= styles[1])
    assert statistics.mean(gaps) > 0.3


def test_in_held_out_pairs_the_style_says_nothing_or_the_opposite(tmp_path):
    make("styles", tmp_path)
    rows = read_jsonl(tmp_path / "data/rm_test.jsonl")
    expected = {"as in training": (0, 1), "same style": (0, 0), "styles exchanged": (1, 0)}
    assert Counter(row["subset"] for row in rows) == dict.fromkeys(expected, 16)
    for row in rows:
        chosen_style, rejected_style = expected[row["subset"]]
        assert chosen_style in style_of(row, "chosen")
        assert rejected_style in style_of(row, "rejected")
        chosen, rejected = world.reward([row["prompt"]] * 2, [row["chosen"], row["rejected"]])
        assert chosen - rejected > worlds.LEAST_GAP - 1e-6
    # Nothing was trained on these requests.
    train_prompts = {row["prompt"] for row in read_jsonl(tmp_path / "data/train.jsonl")}
    assert train_prompts.isdisjoint(row["prompt"] for row in rows)


# --------------------------------------------------------------------------- tokenizer and corpus
def test_the_other_teacher_has_other_tokens_for_the_same_texts(tmp_path):
    measured = make("tokenizer", tmp_path)
    assert measured.keys() == {"teacher", "student", "judging", "seconds"}
    other = AutoTokenizer.from_pretrained(tmp_path / "teacher")
    own = build.make_tokenizer()
    elephant = other.convert_ids_to_tokens(other("an elephant.").input_ids)
    assert elephant[-3:] == ["▁elep", "hant", "."]
    for request in HELD_OUT:
        text = world.write(request, 0.9, random.Random(1))
        ids = other(text).input_ids
        assert other.decode(ids) == text
        words = [word for word in re.findall(r"\w+", text) if len(word) > 3]
        names = [word for word in words if word in world.ALL_WORDS]
        assert len(ids) == len(own(text).input_ids) + len(names)
    assert other.eos_token == "<|end|>" and other.chat_template == own.chat_template


def test_the_corpus_has_conversations_about_training_requests(tmp_path):
    make("corpus", tmp_path, train_pairs=20)
    lines = (tmp_path / "corpus.txt").read_text().splitlines()
    form = r"<\|begin\|><\|user\|>(.+)<\|end\|><\|assistant\|>(.*)<\|end\|>"
    prompts = [re.fullmatch(form, line)[1] for line in lines]
    assert len(prompts) == 20
    assert set(prompts) <= {request.text for request in build.TRAIN_REQUESTS}


@pytest.mark.parametrize("variant", ["styles", "corpus"])
def test_a_seed_gives_the_same_files(variant, tmp_path):
    contents = []
    for folder, seed in (("one", 1), ("again", 1), ("other", 2)):
        make(variant, tmp_path / folder, seed=seed)
        files = sorted((tmp_path / folder).rglob("*.*"))
        contents.append([path.read_bytes() for path in files if path.name != "measured.json"])
    assert contents[0] == contents[1] != contents[2]


def test_a_half_of_a_word_begins_as_the_word():
    teacher = LM(worlds.PLAYGROUND / "teacher", torch.device("cpu"))
    tokenizer = worlds.make_tokenizer_of_halves()
    model = worlds.with_halves(tokenizer)

    def row(model, tokenizer, piece: str) -> torch.Tensor:
        return model.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids(piece)]

    sources = {
        "▁Name": ["▁Name"],
        "▁elep": ["▁elephant"],
        "hant": ["▁elephant"],
        "▁cob": ["▁cobalt", "▁cobra"],
        "▁bat": ["▁bat"],
    }
    for piece, words in sources.items():
        rows = [row(teacher.model, teacher.tokenizer, word) for word in words]
        expected = torch.stack(rows).mean(0)
        torch.testing.assert_close(row(model, tokenizer, piece), expected)
    # A text without split words means to the model what it meant to the teacher.
    text = "Please name two fish. bat. Enjoy!"
    logits = []
    for one, its_tokenizer in ((model, tokenizer), (teacher.model, teacher.tokenizer)):
        ids = torch.tensor([its_tokenizer(text).input_ids])
        full_stop = its_tokenizer.convert_tokens_to_ids(".")
        logits.append(one(ids).logits[0, :, full_stop])
    torch.testing.assert_close(logits[0], logits[1])
