"""studies/measure.py: what it samples and judges, its numbers by hand, and that it goes on."""

import json
import statistics

import pytest
from conftest import ROOT, read_jsonl, vowels, write_jsonl

from studies import measure
from studies.compare import win_rate


def measured(*rewards: list[float]) -> list[dict]:
    rows = []
    for one in rewards:
        rows.append({"rewards": one, "tokens": 3.0, "finished": 1.0})
    return rows


def test_the_error_of_a_mean_is_that_of_the_prompts_by_hand():
    """The means of two prompts are 1 and 3, whatever the spread of their responses."""
    results = measure.summarise(measured([0.0, 2.0], [3.0, 3.0]))
    assert results["reward"] == 2.0
    assert results["stderr_over_prompts"] == pytest.approx(2**0.5 / 2**0.5)
    assert results["responses"] == 4 and results["prompts"] == 2
    assert measure.summarise(measured([1.0, 2.0]))["stderr_over_prompts"] == 0.0


def test_win_rates_by_hand():
    # 1 = 1, 1 < 2, 3 > 1, 3 > 2
    assert win_rate(measured([1, 3]), measured([1, 2])) == 2.5 / 4
    assert win_rate(measured([1, 2]), measured([1, 3])) == 1.5 / 4
    assert win_rate(measured([5], [5]), measured([5], [9])) == 0.25
    with pytest.raises(ValueError):
        win_rate(measured([5]), measured([5], [9]))


def test_win_rates_equal_a_slow_loop():
    one = measured([0.3, 0.1, 0.3, 0.9], [0.2, 0.2, -1.0, 0.4])
    other = measured([0.3, 0.3, 1.2, -0.5], [0.2, 0.9, 0.2, -1.0])
    rates = []
    for row, opponent in zip(one, other):
        wins = []
        for a in row["rewards"]:
            for b in opponent["rewards"]:
                wins.append(0.5 if a == b else float(a > b))
        rates.append(statistics.mean(wins))
    assert win_rate(one, other) == pytest.approx(statistics.mean(rates))
    assert win_rate(one, other) + win_rate(other, one) == pytest.approx(1)


def test_the_playground_has_128_different_held_out_requests():
    from common import read_rows

    rows = read_rows(str(ROOT / "playground/data/test.jsonl"), "test", columns=())
    assert len(rows) == 512 and len(measure.different_prompts(rows)) == 128


@pytest.fixture
def flags(checkpoints, pairs, tmp_path) -> dict:
    twice = write_jsonl(tmp_path / "rows.jsonl", read_jsonl(pairs)[:3] * 2)
    return {
        "model": checkpoints["student"],
        "responses": 10,
        "eval_data": str(twice),
        "reward": "conftest:vowels",
        "max_response_tokens": 12,
        "sample_batch_size": 4,
        "output_dir": str(tmp_path / "out"),
    }


def test_every_different_prompt_gets_equally_many_responses(flags, tmp_path, monkeypatch, capsys):
    seen = []

    def spy(prompts, responses):
        seen.extend(responses)
        return vowels(prompts, responses)

    monkeypatch.setattr("conftest.vowels", spy)
    measure.main(measure.Args(**flags))
    rows = read_jsonl(tmp_path / "out/measured.jsonl")
    assert [len(row["rewards"]) for row in rows] == [4, 4, 4]  # 10 rounded up
    rewards = vowels(seen, seen)
    assert [value for row in rows for value in row["rewards"]] == rewards
    assert len(set(seen)) > 6
    results = json.loads((tmp_path / "out/measured.json").read_text())
    assert results["reward"] == pytest.approx(statistics.mean(rewards))
    assert results["responses"] == 12
    assert max(row["tokens"] for row in rows) <= 12
    assert f"reward {statistics.mean(rewards):.3f} ± " in capsys.readouterr().out


def test_a_measurement_goes_on_and_another_one_is_refused(flags, tmp_path, capsys):
    measure.main(measure.Args(**flags))
    path = tmp_path / "out/measured.jsonl"
    whole = path.read_bytes()
    path.write_bytes(b"".join(whole.splitlines(keepends=True)[:1]))
    measure.main(measure.Args(**flags))
    assert path.read_bytes() == whole
    for name, value in (("seed", 2), ("responses", 20), ("model", flags["model"] + "/../teacher")):
        with pytest.raises(SystemExit) as stopped:
            measure.main(measure.Args(**{**flags, name: value}))
        assert stopped.value.code == 2
        assert "has a measurement with another" in capsys.readouterr().err
    assert path.read_bytes() == whole


def no_reward(prompts, responses) -> list[None]:
    return [None] * len(responses)


@pytest.mark.parametrize(
    "wrong", [{"reward": "none"}, {"reward": "test_measure:no_reward"}, {"responses": 0}]
)
def test_what_cannot_be_measured_is_one_line(wrong, flags, capsys):
    with pytest.raises(SystemExit) as stopped:
        measure.main(measure.Args(**{**flags, **wrong}))
    assert stopped.value.code == 2
    assert "error: --re" in capsys.readouterr().err
