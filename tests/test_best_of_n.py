"""studies/best_of_n.py: its mean over all choices against a slow loop, what it samples and judges,
and that an interrupted run goes on."""

import json
import math
import statistics
from itertools import combinations

import pytest
from conftest import read_jsonl, run_script, vowels, write_jsonl

from studies.best_of_n import best_of_n, most_kl, sizes_to_show, summarise


# -------------------------------------------------------------------------------------- mathematics
def slow_best_of_n(rewards: list[float], worth: list[float], n: int) -> float:
    """One choice of n after the other. Those with the highest reward share it."""
    picked = []
    for choice in combinations(range(len(rewards)), n):
        highest = max(rewards[i] for i in choice)
        picked.append(statistics.mean(worth[i] for i in choice if rewards[i] == highest))
    return statistics.mean(picked)


def test_the_best_of_n_by_hand():
    assert best_of_n([1, 2, 3], [0.5, 0, 1], 2) == pytest.approx(2 / 3)
    assert best_of_n([1, 2, 3], [0.5, 0, 1], 1) == 0.5
    assert best_of_n([1, 2, 3], [0.5, 0, 1], 3) == 1
    # Equal rewards share it.
    assert best_of_n([0, 0, 0, 0], [1, 4, 1, 4], 3) == 2.5
    with pytest.raises(ValueError):
        best_of_n([1, 2], [1], 1)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 7])
def test_the_best_of_n_equals_a_slow_loop(n):
    rewards = [0.3, -1.0, 0.3, 2.0, 0.3, 2.0, 5.0]
    worth = [1.0, 0.0, 0.2, 0.9, 0.7, -1.0, 0.4]
    expected = slow_best_of_n(rewards, worth, n)
    assert best_of_n(rewards, worth, n) == pytest.approx(expected)


def test_the_kl_of_picking_the_best_by_hand():
    assert most_kl(1) == 0
    assert most_kl(2) == pytest.approx(math.log(2) - 0.5)
    # Of two equally likely responses the better one is picked with 3/4, a KL below the bound.
    kl = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert kl < most_kl(2)


def test_sizes_are_powers_of_two_and_n():
    assert sizes_to_show(1) == [1]
    assert sizes_to_show(2) == [1, 2]
    assert sizes_to_show(8) == [1, 2, 4, 8]
    assert sizes_to_show(11) == [1, 2, 4, 8, 11]


def test_the_error_is_that_of_the_prompts():
    """The best of two is worth 1 for one prompt and 3 for the other."""
    rows = [
        {"rewards": [1, 2], "worth": [9, 1]},
        {"rewards": [2, 1], "worth": [3, 4]},
    ]
    results = summarise(rows, 2)
    first, last = results["curve"]
    assert results["best_of_n_reward"] == last["picked"] == 2
    assert last["stderr_over_prompts"] == pytest.approx(1 / 2**0.5)
    assert last["best"] == 6.5
    assert first["picked"] == first["best"] == 4.25
    assert results["prompts"] == 2


# -------------------------------------------------------------------------------------- whole runs
def length(prompts, responses) -> list[float]:
    return [float(len(response)) for response in responses]


def not_for_every_prompt(prompts, responses) -> list[float | None]:
    """None for prompts of one letter."""
    rewards = []
    for prompt, response in zip(prompts, responses):
        is_long = len(prompt[-1]["content"]) > 1
        rewards.append(float(len(response)) if is_long else None)
    return rewards


def never(prompts, responses) -> list[None]:
    return [None] * len(responses)


CALLS_LEFT = [0]


def deadly(prompts, responses) -> list[float]:
    """It is interrupted as soon as it was called often enough."""
    CALLS_LEFT[0] -= 1
    if CALLS_LEFT[0] == 0:
        raise KeyboardInterrupt
    return length(prompts, responses)


@pytest.fixture
def flags(checkpoints, pairs, tmp_path) -> dict:
    """Every prompt stands in two rows."""
    twice = write_jsonl(tmp_path / "rows.jsonl", read_jsonl(pairs) * 2)
    return {
        "policy": checkpoints["student"],
        "reward": "test_best_of_n:length",
        "eval_reward": "conftest:vowels",
        "eval_data": twice,
        "n": 3,
        "samples": 5,
        "max_response_tokens": 12,
        "sample_batch_size": 10,
        "output_dir": tmp_path / "run",
    }


def test_one_reward_picks_and_another_one_judges(flags, tmp_path, capsys):
    assert run_script("studies/best_of_n", **flags) == 0
    rows = read_jsonl(tmp_path / "run/options.jsonl")
    assert len(rows) == 8
    expected = []
    for row in rows:
        texts = [option["text"] for option in row["options"]]
        assert len(texts) == 5 and len(set(texts)) > 1
        assert all(len(option["token_ids"]) <= 12 for option in row["options"])
        rewards = [float(len(text)) for text in texts]
        expected.append(slow_best_of_n(rewards, vowels(None, texts), 3))
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["best_of_n_reward"] == pytest.approx(statistics.mean(expected))
    assert summary["script"] == "best_of_n" and summary["prompts"] == 8
    assert [point["n"] for point in summary["curve"]] == [1, 2, 3]
    out = capsys.readouterr().out
    assert f"     3        0.43         {statistics.mean(expected):.3f} ± " in out


def test_prompts_to_which_a_reward_does_not_apply_are_left_out(flags, tmp_path):
    """One of the eight prompts has one letter."""
    flags["eval_reward"] = "test_best_of_n:not_for_every_prompt"
    assert run_script("studies/best_of_n", **flags) == 0
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["prompts"] == 7


def test_an_interrupted_run_goes_on(flags, tmp_path):
    flags["reward"] = "test_best_of_n:deadly"
    CALLS_LEFT[0] = 100
    assert run_script("studies/best_of_n", **{**flags, "output_dir": tmp_path / "whole"}) == 0
    CALLS_LEFT[0] = 6
    assert run_script("studies/best_of_n", **flags) == 130
    CALLS_LEFT[0] = 100
    assert run_script("studies/best_of_n", resume=tmp_path / "run") == 0
    assert CALLS_LEFT[0] > 100 - 8  # a call is one prompt's responses
    whole = (tmp_path / "whole/options.jsonl").read_bytes()
    assert (tmp_path / "run/options.jsonl").read_bytes() == whole


WRONG = [
    ({"n": 6}, "--n 6 must be a number between 1 and --samples 5"),
    ({"n": 0}, "--n 0"),
    ({"temperature": 0}, "--temperature 0.0 must be above 0"),
    ({"max_response_tokens": 0}, "--max_response_tokens 0"),
    ({"reward": "none"}, "neither can be none"),
    ({"eval_reward": "none"}, "neither can be none"),
    ({"eval_reward": "test_best_of_n:never"}, "no prompt is left"),
]


@pytest.mark.parametrize("wrong, message", WRONG)
def test_what_cannot_be_measured_is_one_line(wrong, message, flags, capsys):
    assert run_script("studies/best_of_n", **{**flags, **wrong}) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


@pytest.mark.slow
def test_the_playgrounds_oracle_picks_better_answers_of_more(tmp_path):
    flags = {"n": 4, "samples": 8, "output_dir": tmp_path / "run"}
    assert run_script("studies/best_of_n", **flags) == 0
    curve = json.loads((tmp_path / "run/summary.json").read_text())["curve"]
    picked = [point["picked"] for point in curve]
    assert picked == sorted(picked)
    assert 0.5 < picked[0] < 0.7 and picked[-1] > 1.0
    assert picked == [point["best"] for point in curve]
