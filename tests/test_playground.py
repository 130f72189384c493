"""The playground: its reward by hand, its writers, its tokenizer, what its committed models can do,
and how they are built."""

import json
import random
import re
import statistics
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from conftest import ROOT, read_jsonl

from common import LM
from pad import JUDGE_PROMPT
from playground import build, world
from playground.world import (
    RIGHT,
    Request,
    all_requests,
    assess,
    edit,
    explain,
    read_request,
    reward,
    write,
)
from rm_distiller import RESCORE_PROMPT

PLAYGROUND = ROOT / "playground"
MODELS = ("student", "teacher_ref", "teacher")
TRAIN, TEST = all_requests()
PLANETS = Request("Name three planets.", "planets", 3)
measured = json.loads((PLAYGROUND / "measured.json").read_text())


# --------------------------------------------------------------------------------------- the reward
# answer: (reward, fault of each word)
JUDGED = {
    "Mars, Venus and Earth. Enjoy!": (1.2, [None, None, None]),
    "Venus and Earth, Mars. Hope that helps!": (1.2, [None, None, None]),
    "Mars, Venus and Earth.": (1.0, [None, None, None]),
    "Mars, Venus and Earth": (0.5, [None, None, None]),
    # A kind word stands behind the full stop.
    "Mars, Venus and Earth Enjoy!": (0.0, [None, None, None, "wrong"]),
    "Mars, Pluto and Earth. Enjoy!": (2 / 3 - 0.5 + 0.2, [None, "wrong", None]),
    "Mars, apple and Earth.": (2 / 3 - 0.5, [None, "wrong", None]),
    "mars, Venus and Earth.": (2 / 3 - 0.5, ["wrong", None, None]),
    "Mars, Mars and Earth.": (2 / 3 - 0.5, [None, "repeated", None]),
    "Mars, Venus, Earth and Saturn.": (1 - 0.5, [None, None, None, "extra"]),
    "Mars, Venus, Earth and Mars.": (1 - 0.5, [None, None, None, "repeated"]),
    "Mars and Venus.": (2 / 3, [None, None]),
    "Mars. Enjoy!": (1 / 3 + 0.2, [None]),
    # Chatter of two words.
    "Mars, Venus and Earth. Enjoy! Enjoy!": (1 - 2 * 0.5, [None, None, None]),
    "Mars, Venus and Earth. Saturn.": (1 - 0.5, [None, None, None]),
    "": (-0.5, []),
    ".": (0.0, []),
    "Pluto.": (-0.5, ["wrong"]),
    # Nothing is below −1.
    "Pluto, Pluto and Pluto.": (-1.0, ["wrong"] * 3),
    "apple " * 50: (-1.0, ["wrong"] * 50),
}


@pytest.mark.parametrize("answer", JUDGED)
def test_the_judge_by_hand(answer):
    expected, faults = JUDGED[answer]
    verdict = assess(PLANETS, answer)
    assert verdict.reward == pytest.approx(expected)
    assert verdict.faults == faults
    [value] = reward([PLANETS.text], [answer])
    assert value == verdict.reward
    assert -1 <= value <= 1.2


def test_verdicts_say_what_is_missing_and_how_an_answer_ended():
    verdict = assess(PLANETS, "Mars. Happy to help!")
    assert verdict.words == ["Mars"]
    assert verdict.missing == 2
    assert verdict.ended
    assert verdict.kind_word == "Happy to help!"
    assert not assess(PLANETS, "Mars").ended
    assert explain(PLANETS, "Mars, Pluto, Mars") == (
        "Pluto is wrong, Mars is repeated, two missing, no full stop, no kind word."
    )
    assert explain(PLANETS, "Mars, Venus and Earth. Enjoy!") == "nothing is wrong."


def test_a_misconception_may_be_right_elsewhere():
    assert reward(["Name one mammal.", "Name one bird."], ["bat.", "bat."]) == [1.0, -0.5]


def test_the_judge_reads_every_request_as_text_and_as_messages():
    for request in TRAIN + TEST:
        assert read_request(request.text) == request
        chat = [
            {"role": "system", "content": "Name two fish."},
            {"role": "user", "content": request.text},
        ]
        assert read_request(chat) == request
    answer = [{"role": "assistant", "content": "cod."}]
    assert reward([[{"role": "user", "content": "Name one fish."}]], [answer]) == [1.0]
    with pytest.raises(ValueError, match="--reward"):
        reward(["What is the meaning of life?"], ["cod."])
    with pytest.raises(ValueError):
        reward(["Name one fish."], ["cod.", "cod."])


def test_scores_are_whole_numbers_from_one_to_ten():
    assert [world.score(value) for value in (-1, 0, 0.4, 1.0, 1.2)] == [1, 1, 4, 8, 10]
    scores = [world.score(value / 100) for value in range(-100, 121)]
    assert scores == sorted(scores)
    assert set(scores) == set(range(1, 11))


# -------------------------------------------------------------------------------- requests, writers
def test_held_out_requests_share_no_category_and_count_with_training():
    assert len(TRAIN) == 384
    assert len(TEST) == 128
    assert len({request.text for request in TRAIN + TEST}) == 512
    train_pairs = {(request.category, request.count) for request in TRAIN}
    test_pairs = {(request.category, request.count) for request in TEST}
    assert train_pairs.isdisjoint(test_pairs)
    assert {request.category for request in TEST} <= {request.category for request in TRAIN}
    assert {request.count for request in TEST} <= {request.count for request in TRAIN}


def test_every_category_has_enough_right_words_and_misconceptions_that_are_wrong():
    for category, words in RIGHT.items():
        assert len(set(words)) == len(words) == 8
        assert world.MISTAKEN[category]
        assert set(words).isdisjoint(world.MISTAKEN[category])


def test_skilled_writers_write_better_answers():
    rng = random.Random(0)
    means = []
    for skill in (0.0, 0.25, 0.5, 0.75, 1.0):
        requests = rng.choices(TRAIN, k=1500)
        rewards = [assess(request, write(request, skill, rng)).reward for request in requests]
        means.append(statistics.mean(rewards))
    for worse, better in pairwise(means):
        assert better > worse + 0.1, means

    perfect = [assess(request, write(request, 1.0, rng)) for request in TRAIN]
    for verdict in perfect:
        assert not any(verdict.faults)
        assert not verdict.missing
        assert verdict.ended
    assert 0.6 < statistics.mean(bool(verdict.kind_word) for verdict in perfect) < 0.8


def edit_distance(a: list[str], b: list[str]) -> int:
    """The fewest words that have to be added, dropped or replaced to turn a into b."""
    previous = list(range(len(b) + 1))
    for i, word_a in enumerate(a, 1):
        current = [i]
        for j, word_b in enumerate(b, 1):
            replaced = previous[j - 1] + (word_a != word_b)
            dropped = previous[j] + 1
            added = current[j - 1] + 1
            current.append(min(replaced, dropped, added))
        previous = current
    return previous[-1]


@pytest.mark.parametrize("skill", [0.0, 0.5, 0.9])
def test_edits_are_perfect_and_minimal(skill):
    rng = random.Random(0)
    for request in TRAIN + TEST:
        answer = write(request, skill, rng)
        before = assess(request, answer)
        edited = edit(request, answer, rng)
        after = assess(request, edited)
        assert after.reward == pytest.approx(1.2), (answer, edited)
        if before.kind_word:
            assert after.kind_word == before.kind_word
        # A mistake that is replaced by a missing word is one change. What is left of the mistakes
        # or of the missing words is one change each.
        mistakes = sum(fault is not None for fault in before.faults)
        changes = max(mistakes, before.missing)
        assert edit_distance(before.words, after.words) == changes, (answer, edited)
        if before.reward > 1.19:
            assert edited == answer


def test_a_right_word_keeps_its_place():
    for seed in range(20):
        edited = edit(PLANETS, "Pluto, Mars, Pluto, Mars", random.Random(seed))
        words = assess(PLANETS, edited).words
        assert len(words) == 3
        assert words[1] == "Mars"


# ---------------------------------------------------------------------------------------- tokenizer
def texts_of_the_world() -> list[str]:
    """Whatever the models read and write: requests, answers, questions to the teacher, replies."""
    rng = random.Random(0)
    texts = ["A", "B", "None"]
    for request in TRAIN + TEST:
        a = write(request, rng.random(), rng)
        b = write(request, rng.random(), rng)
        texts += [
            request.text,
            a,
            b,
            f"Why: {explain(request, a)} Edited: {edit(request, a, rng)}",
            JUDGE_PROMPT.format(prompt=request.text, a=a, b=b),
            build.score_question(request, a, b),
            build.refine_question(request, a, b),
            RESCORE_PROMPT.format(score=rng.randint(1, 10)),
            f"A: {rng.randint(1, 10)}, B: {rng.randint(1, 10)}",
        ]
    return texts


@pytest.mark.parametrize("name", MODELS)
def test_every_word_is_one_token_and_comes_back_as_it_was(name):
    tokenizer = LM(PLAYGROUND / name, torch.device("cpu")).tokenizer
    for text in texts_of_the_world():
        ids = tokenizer(text, add_special_tokens=False).input_ids
        tokens = tokenizer.convert_ids_to_tokens(ids)
        # No <unk>, no byte and no special token.
        assert not any(token.startswith("<") for token in tokens), (text, tokens)
        stripped = [token.strip("▁") for token in tokens]
        words = [token for token in stripped if token.isalnum()]
        assert words == re.findall(r"[A-Za-z]+|\d+", text)
        assert tokenizer.decode(ids).strip() == text


def test_other_text_is_spelled_in_bytes_and_comes_back():
    tokenizer = build.make_tokenizer()
    for text in ("Größe 7°", "日本", "zzz <|end|>"):
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
        assert tokenizer.decode(ids).strip() == text


def test_the_committed_tokenizers_are_those_of_the_script(tmp_path):
    build.make_tokenizer().save_pretrained(tmp_path)
    for file in ("tokenizer.json", "chat_template.jinja"):
        expected = (tmp_path / file).read_bytes()
        for name in MODELS:
            assert (PLAYGROUND / name / file).read_bytes() == expected


# -------------------------------------------------------------------------------- what is committed
def test_everything_together_is_small_and_weights_are_safetensors():
    paths = [path for path in PLAYGROUND.rglob("*") if "__pycache__" not in path.parts]
    files = [path for path in paths if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 5e6
    allowed = {".safetensors", ".json", ".jsonl", ".jinja", ".py", ".md", ".txt"}
    assert {path.suffix for path in files} <= allowed
    for name in MODELS:
        assert (PLAYGROUND / name / "model.safetensors").exists()


def test_the_committed_pairs_are_those_of_the_script():
    rng = random.Random(measured["seed"])
    for name, requests in (("train", TRAIN), ("test", TEST)):
        rows = read_jsonl(PLAYGROUND / f"data/{name}.jsonl")
        assert {row["prompt"] for row in rows} <= {request.text for request in requests}
        gaps = []
        for row in rows:
            assert row["chosen"] != row["rejected"]
            request = read_request(row["prompt"])
            chosen_reward = assess(request, row["chosen"]).reward
            gaps.append(chosen_reward - assess(request, row["rejected"]).reward)
        # The order carries the reward's preference, and noise.
        assert statistics.mean(gaps) > 0.2
        assert statistics.mean(gap < 0 for gap in gaps) > 0.02
        assert rows == build.preferences(requests, len(rows), rng)


def test_the_teacher_judges_scores_and_rewrites_well_enough():
    assert measured["judging"]["any"]["accuracy"] >= 0.9
    assert measured["judging"]["own"]["accuracy"] >= 0.75
    assert measured["scoring"]["error"] <= 0.8
    rewriting = measured["rewriting"]["greedy"]
    assert rewriting["after"] >= rewriting["before"] + 0.25
    assert rewriting["kept"] >= 0.6


def test_the_teacher_answers_well_and_the_other_models_do_not():
    teacher = measured["teacher"]
    assert teacher["sampled"]["reward"] >= 0.9
    assert teacher["greedy"]["reward"] >= 0.9
    for name in ("student", "teacher_ref"):
        assert measured[name]["sampled"]["reward"] <= 0.7
        # Greedy decoding tells the same story.
        assert teacher["greedy"]["reward"] > measured[name]["greedy"]["reward"] + 0.2


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", ["sampled", "greedy"])
def test_few_answers_say_a_word_twice(name, kind):
    assert measured[name][kind]["repeats"] < 0.1


def test_the_student_is_a_tenth_of_the_teacher_or_less():
    teacher_parameters = measured["teacher"]["parameters"]
    assert measured["student"]["parameters"] * 10 < teacher_parameters <= 1e6


def test_the_readme_is_what_build_writes_and_shows_the_measured_numbers():
    text = (PLAYGROUND / "README.md").read_text(encoding="utf-8")
    assert text == build.readme(measured, build.Args())
    for name in MODELS:
        parameters = measured[name]["parameters"]
        sampled = measured[name]["sampled"]["reward"]
        greedy = measured[name]["greedy"]["reward"]
        assert f"| `{name}` | {parameters:,} | {sampled:.2f} | {greedy:.2f} |" in text
    for kind in ("any", "own"):
        judging = measured["judging"][kind]
        assert f"{judging['accuracy']:.1%} of {judging['pairs']} pairs" in text
    assert f"{measured['scoring']['error']:.2f} points off on average" in text


def test_the_examples_of_the_readme_are_right():
    text = (PLAYGROUND / "README.md").read_text(encoding="utf-8")
    call, result = re.search(r"^(reward\(.*\))  # (.*)$", text, re.M).groups()
    assert repr(eval(call)) == result
    unseen = re.search(r'No model has seen "(.*)" in any wording', text).group(1)
    assert sum(unseen in request.text for request in TEST) == len(world.PHRASINGS)
    assert not any(unseen in request.text for request in TRAIN)


@pytest.mark.parametrize("name", MODELS)
def test_the_committed_models_answer_as_measured(name):
    lm = LM(PLAYGROUND / name, torch.device("cpu"))
    assert lm.model.num_parameters() == measured[name]["parameters"]
    # Another machine may sample other answers. 0.09 is four standard errors of the mean of 512 of
    # them, whose standard deviation is near 0.5.
    for kind, temperature in (("sampled", 1.0), ("greedy", 0.0)):
        now = build.measure_answers(lm, temperature)
        assert now["reward"] == pytest.approx(measured[name][kind]["reward"], abs=0.09)
        assert now["repeats"] == pytest.approx(measured[name][kind]["repeats"], abs=0.05)


def test_the_committed_teacher_judges_scores_and_rewrites_as_measured():
    lm = LM(PLAYGROUND / "teacher", torch.device("cpu"))
    rng = random.Random(7)
    pairs = []
    for request in rng.choices(TEST, k=400):
        pairs.append((request, *build.two_answers(request, rng)))

    judging = build.measure_judging(lm, pairs)
    assert judging["pairs"] > 150
    assert judging["accuracy"] == pytest.approx(measured["judging"]["any"]["accuracy"], abs=0.07)
    scoring = build.measure_scoring(lm, pairs[:150])
    assert scoring["error"] == pytest.approx(measured["scoring"]["error"], abs=0.25)

    cases = [build.draw_rewriting_case(request, rng) for request in TEST]
    build.rewrite_and_score(lm, cases, temperature=0.0)
    lifts = [case.after().reward - case.before().reward for case in cases]
    assert statistics.mean(lifts) > 0.5


# ----------------------------------------------------------------------------------------- build.py
def build_tiny(folder: Path) -> dict[str, bytes]:
    """What `build.main` writes, by name, without the time that it took."""
    args = build.Args(
        output_dir=str(folder),
        teacher_steps=40,
        dpo_steps=3,
        student_steps=3,
        train_pairs=40,
        test_pairs=16,
    )
    build.main(args)
    files = {}
    for path in folder.rglob("*"):
        if path.is_file():
            files[str(path.relative_to(folder))] = path.read_bytes()
    numbers = json.loads(files["measured.json"])
    assert numbers.pop("seconds") > 0
    files["measured.json"] = json.dumps(numbers).encode()
    files["README.md"] = re.sub(rb"\(\d+ minutes", b"(some minutes", files["README.md"])
    return files


@pytest.mark.slow
def test_the_same_seed_builds_the_same_bytes(tmp_path, monkeypatch):
    # A few steps of a small model pass through all of the code.
    monkeypatch.setattr(build, "TEACHER", build.STUDENT)
    monkeypatch.setattr(build, "TEST_REQUESTS", build.TEST_REQUESTS[::4])
    one = build_tiny(tmp_path / "one")
    two = build_tiny(tmp_path / "two")
    weights = {f"{name}/model.safetensors" for name in MODELS}
    assert one.keys() == two.keys()
    assert one.keys() >= weights
    for name in one:
        assert one[name] == two[name], name
    assert len({one[name] for name in weights}) == 3
