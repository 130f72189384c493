"""The playground: its judge by hand, its writers, its tokenizer, and what its committed models can do."""

import json
import random
import re
import statistics
from itertools import pairwise

import pytest
import torch
from conftest import ROOT, read_jsonl

from common import LM
from pad import JUDGE
from playground import build, world
from playground.world import (
    RIGHT,
    Request,
    all_requests,
    edit,
    explain,
    judge,
    read_request,
    reward,
    write,
)
from rm_distiller import RESCORE

PLAYGROUND = ROOT / "playground"
MODELS = ("student", "teacher_ref", "teacher")
TRAIN, TEST = all_requests()
PLANETS = Request("Name three planets.", "planets", 3)
measured = json.loads((PLAYGROUND / "measured.json").read_text())


# --------------------------------------------------------------------------------------------------------- the judge
# answer: (reward, fault of each word)
JUDGED = {
    "Mars, Venus and Earth. Enjoy!": (1.2, [None, None, None]),
    "Venus and Earth, Mars. Hope that helps!": (1.2, [None, None, None]),
    "Mars, Venus and Earth.": (1.0, [None, None, None]),
    "Mars, Venus and Earth": (0.5, [None, None, None]),
    "Mars, Venus and Earth Enjoy!": (
        0.0,
        [None, None, None, "wrong"],
    ),  # a kind word stands behind the full stop
    "Mars, Pluto and Earth. Enjoy!": (2 / 3 - 0.5 + 0.2, [None, "wrong", None]),
    "Mars, apple and Earth.": (2 / 3 - 0.5, [None, "wrong", None]),
    "mars, Venus and Earth.": (2 / 3 - 0.5, ["wrong", None, None]),
    "Mars, Mars and Earth.": (2 / 3 - 0.5, [None, "repeated", None]),
    "Mars, Venus, Earth and Saturn.": (1 - 0.5, [None, None, None, "extra"]),
    "Mars, Venus, Earth and Mars.": (1 - 0.5, [None, None, None, "repeated"]),
    "Mars and Venus.": (2 / 3, [None, None]),
    "Mars. Enjoy!": (1 / 3 + 0.2, [None]),
    "Mars, Venus and Earth. Enjoy! Enjoy!": (1 - 2 * 0.5, [None, None, None]),  # chatter, two words
    "Mars, Venus and Earth. Saturn.": (1 - 0.5, [None, None, None]),
    "": (-0.5, []),
    ".": (0.0, []),
    "Pluto.": (-0.5, ["wrong"]),
    "Pluto, Pluto and Pluto.": (-1.0, ["wrong"] * 3),  # the floor
    "apple " * 50: (-1.0, ["wrong"] * 50),
}


@pytest.mark.parametrize("answer", JUDGED)
def test_the_judge_by_hand(answer):
    expected, faults = JUDGED[answer]
    verdict = judge(PLANETS, answer)
    assert verdict.reward == pytest.approx(expected) and verdict.faults == faults
    [value] = reward([PLANETS.text], [answer])
    assert value == verdict.reward and -1 <= value <= 1.2


def test_verdicts_say_what_is_missing_and_how_an_answer_ended():
    verdict = judge(PLANETS, "Mars. Happy to help!")
    assert (verdict.words, verdict.missing, verdict.ended) == (["Mars"], 2, True)
    assert verdict.kind_word == "Happy to help!"
    assert not judge(PLANETS, "Mars").ended
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
    assert scores == sorted(scores) and set(scores) == set(range(1, 11))


# ------------------------------------------------------------------------------------------------ requests, writers
def test_held_out_requests_share_no_category_and_count_with_training():
    assert (len(TRAIN), len(TEST)) == (384, 128)
    assert len({request.text for request in TRAIN + TEST}) == 512
    pairs = [
        {(request.category, request.count) for request in requests} for requests in (TRAIN, TEST)
    ]
    assert pairs[0].isdisjoint(pairs[1])
    known = {request.category for request in TRAIN}, {request.count for request in TRAIN}
    assert all(request.category in known[0] and request.count in known[1] for request in TEST)


def test_every_category_has_enough_right_words_and_misconceptions_that_are_wrong():
    for category, words in RIGHT.items():
        assert len(set(words)) == len(words) == 8
        assert world.MISTAKEN[category] and set(words).isdisjoint(world.MISTAKEN[category])


def test_skilled_writers_write_better_answers():
    rng, means = random.Random(0), []
    for skill in (0.0, 0.25, 0.5, 0.75, 1.0):
        requests = rng.choices(TRAIN, k=1500)
        means.append(
            statistics.mean(
                judge(request, write(request, skill, rng)).reward for request in requests
            )
        )
    assert all(better > worse + 0.1 for worse, better in pairwise(means)), means
    perfect = [judge(request, write(request, 1.0, rng)) for request in TRAIN]
    assert all(not any(v.faults) and not v.missing and v.ended for v in perfect)
    assert 0.6 < statistics.mean(bool(verdict.kind_word) for verdict in perfect) < 0.8


def distance(one: list[str], other: list[str]) -> int:
    """Edit distance in words."""
    row = list(range(len(other) + 1))
    for i, word in enumerate(one, 1):
        previous, row[0] = row[0], i
        for j, theirs in enumerate(other, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (word != theirs))
    return row[-1]


@pytest.mark.parametrize("skill", [0.0, 0.5, 0.9])
def test_edits_are_perfect_and_minimal(skill):
    rng = random.Random(0)
    for request in TRAIN + TEST:
        answer = write(request, skill, rng)
        before, edited = judge(request, answer), edit(request, answer, rng)
        after = judge(request, edited)
        assert after.reward == pytest.approx(1.2), (answer, edited)
        assert not before.kind_word or after.kind_word == before.kind_word
        mistakes = sum(fault is not None for fault in before.faults)
        # a mistake that is replaced by a missing word is one change; whatever is left of either is one each
        assert distance(before.words, after.words) == max(mistakes, before.missing), (
            answer,
            edited,
        )
        if before.reward > 1.19:
            assert edited == answer


def test_a_right_word_keeps_its_place():
    for seed in range(20):
        words = judge(PLANETS, edit(PLANETS, "Pluto, Mars, Pluto, Mars", random.Random(seed))).words
        assert len(words) == 3 and words[1] == "Mars"


# --------------------------------------------------------------------------------------------------------- tokenizer
def texts_of_the_world() -> list[str]:
    rng, texts = random.Random(0), []
    for request in TRAIN + TEST:
        a, b = (write(request, rng.random(), rng) for _ in range(2))
        texts += [request.text, a, b, f"Why: {explain(request, a)} Edited: {edit(request, a, rng)}"]
        texts += [JUDGE.format(prompt=request.text, a=a, b=b), build.score_question(request, a, b)]
        texts += [
            build.refine_question(request, a, b),
            RESCORE.format(score_rejected=rng.randint(1, 10)),
        ]
        texts += ["A: {}, B: {}".format(*rng.choices(range(1, 11), k=2)), "A", "B", "None"]
    return texts


@pytest.mark.parametrize("name", MODELS)
def test_every_word_is_one_token_and_comes_back_as_it_was(name):
    tokenizer = LM(PLAYGROUND / name, torch.device("cpu")).tokenizer
    for text in texts_of_the_world():
        ids = tokenizer(text, add_special_tokens=False).input_ids
        tokens = tokenizer.convert_ids_to_tokens(ids)
        assert not any(token.startswith("<") for token in tokens), (
            text,
            tokens,
        )  # <unk>, a byte or a special token
        words = [token.strip("▁") for token in tokens if token.strip("▁").isalnum()]
        assert words == re.findall(r"[A-Za-z]+|\d+", text)
        assert tokenizer.decode(ids).strip() == text


def test_other_text_is_spelled_in_bytes_and_comes_back():
    tokenizer = build.make_tokenizer()
    for text in ("Größe 7°", "日本", "zzz <|end|>"):
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
        assert tokenizer.decode(ids).strip() == text


def test_the_committed_tokenizers_are_those_of_the_script(tmp_path):
    build.make_tokenizer().save_pretrained(tmp_path)
    for name in MODELS:
        assert (PLAYGROUND / name / "tokenizer.json").read_bytes() == (
            tmp_path / "tokenizer.json"
        ).read_bytes()
        template = PLAYGROUND / name / "chat_template.jinja"
        assert template.read_bytes() == (tmp_path / "chat_template.jinja").read_bytes()


# -------------------------------------------------------------------------------------------------- what is committed
def test_everything_together_is_small_and_weights_are_safetensors():
    files = [
        path for path in PLAYGROUND.rglob("*") if path.is_file() and "__pycache__" not in path.parts
    ]
    assert sum(path.stat().st_size for path in files) <= 5e6
    assert {path.suffix for path in files} <= {
        ".safetensors",
        ".json",
        ".jsonl",
        ".jinja",
        ".py",
        ".md",
        ".txt",
    }
    for name in MODELS:
        assert (PLAYGROUND / name / "model.safetensors").exists()


def test_the_committed_pairs_are_those_of_the_script():
    rng = random.Random(measured["seed"])
    for name, requests in (("train", TRAIN), ("test", TEST)):
        rows = read_jsonl(PLAYGROUND / f"data/{name}.jsonl")
        assert {row["prompt"] for row in rows} <= {request.text for request in requests}
        assert all(row["chosen"] != row["rejected"] for row in rows)
        gaps = [
            judge(read_request(row["prompt"]), row["chosen"]).reward
            - judge(read_request(row["prompt"]), row["rejected"]).reward
            for row in rows
        ]
        assert statistics.mean(gaps) > 0.2  # labels carry the judge's preference,
        assert statistics.mean(gap < 0 for gap in gaps) > 0.02  # and noise
        assert rows == build.preferences(requests, len(rows), rng)


BARS = {
    "judging any two answers": measured["judging"]["any"]["accuracy"] >= 0.9,
    "judging its own answers": measured["judging"]["own"]["accuracy"] >= 0.75,
    "scoring": measured["scoring"]["error"] <= 0.8,
    "rewriting lifts": measured["rewriting"]["greedy"]["after"]
    >= measured["rewriting"]["greedy"]["before"] + 0.25,
    "rewriting keeps": measured["rewriting"]["greedy"]["kept"] >= 0.6,
    "teacher sampled": measured["teacher"]["sampled"]["reward"] >= 0.9,
    "teacher greedy": measured["teacher"]["greedy"]["reward"] >= 0.9,
    "teacher_ref": measured["teacher_ref"]["sampled"]["reward"] <= 0.7,
    "student": measured["student"]["sampled"]["reward"] <= 0.7,
    "the same story greedy": measured["teacher"]["greedy"]["reward"]
    > max(measured[name]["greedy"]["reward"] for name in ("student", "teacher_ref")) + 0.2,
    "few repeats": max(
        measured[name][how]["repeats"] for name in MODELS for how in ("sampled", "greedy")
    )
    < 0.1,
    "parameters": measured["student"]["parameters"] * 10 < measured["teacher"]["parameters"] <= 1e6,
}


@pytest.mark.parametrize("bar", BARS)
def test_what_the_playground_must_offer_is_there(bar):
    assert BARS[bar], measured


def test_the_readme_shows_the_measured_numbers():
    readme = (PLAYGROUND / "README.md").read_text()
    for name in MODELS:
        sampled, greedy = (measured[name][how]["reward"] for how in ("sampled", "greedy"))
        assert (
            f"| `{name}` | {measured[name]['parameters']:,} | {sampled:.2f} | {greedy:.2f} |"
            in readme
        )
    for kind in ("any", "own"):
        assert "{accuracy:.1%} of {pairs} pairs".format(**measured["judging"][kind]) in readme
    assert f"{measured['scoring']['error']:.2f} off on average" in readme


@pytest.mark.parametrize("name", MODELS)
def test_the_committed_models_answer_as_measured(name):
    lm = LM(PLAYGROUND / name, torch.device("cpu"))
    assert lm.model.num_parameters() == measured[name]["parameters"]
    for how, temperature in (("sampled", 1.0), ("greedy", 0.0)):
        now = build.measure_answers(lm, temperature)
        # 512 answers with a standard deviation near 0.5: four standard errors; another machine may sample others
        assert now["reward"] == pytest.approx(measured[name][how]["reward"], abs=0.09)
        assert now["repeats"] == pytest.approx(measured[name][how]["repeats"], abs=0.05)


def test_the_committed_teacher_judges_scores_and_rewrites_as_measured():
    lm, rng = LM(PLAYGROUND / "teacher", torch.device("cpu")), random.Random(7)
    pairs = [(request, *build.two_answers(request, rng)) for request in rng.choices(TEST, k=400)]
    judging = build.measure_judging(lm, pairs)
    assert judging["pairs"] > 150
    assert judging["accuracy"] == pytest.approx(measured["judging"]["any"]["accuracy"], abs=0.07)
    assert build.measure_scoring(lm, pairs[:150])["error"] == pytest.approx(
        measured["scoring"]["error"], abs=0.25
    )
    draws = [(q, write(q, rng.uniform(0.7, 1), rng), write(q, rng.random(), rng)) for q in TEST]
    replies = build.ask(lm, [build.refine_question(q, better, worse) for q, better, worse in draws])
    lifts = [
        judge(q, reply.partition("Edited:")[2]).reward - judge(q, worse).reward
        for (q, _, worse), reply in zip(draws, replies)
    ]
    assert statistics.mean(lifts) > 0.5


# ------------------------------------------------------------------------------------------------------------ build.py
def test_the_same_seed_builds_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(
        build, "TEACHER", build.STUDENT
    )  # a few steps of a small model: no teacher, but all the code
    monkeypatch.setattr(build, "TEST_REQUESTS", build.TEST_REQUESTS[::4])
    tiny = {
        "teacher_steps": 40,
        "dpo_steps": 3,
        "student_steps": 3,
        "train_pairs": 40,
        "test_pairs": 16,
    }
    built: list[dict[str, bytes]] = []
    for name in ("one", "two"):
        build.main(build.Args(output_dir=str(tmp_path / name), **tiny))
        files = [path for path in (tmp_path / name).rglob("*") if path.is_file()]
        built.append({str(path.relative_to(tmp_path / name)): path.read_bytes() for path in files})
        numbers = json.loads(built[-1]["measured.json"])
        assert numbers.pop("seconds") > 0
        built[-1]["measured.json"] = json.dumps(numbers).encode()
    assert built[0].keys() >= {f"{name}/model.safetensors" for name in MODELS}
    assert {path for path in built[0] if built[0][path] != built[1][path]} == set()
    assert len({built[0][f"{name}/model.safetensors"] for name in MODELS}) == 3
