"""studies/released.py and studies/rm_pairs.py: the released variants run, and the committed pairs
are drawn again. The released formulas of PAD and RM-Distiller are tested beside those that they
replace."""

import importlib
import inspect
import json
import random

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, command_line, first_rows, read_jsonl, run_script

from playground.world import all_requests
from studies import released, rm_pairs

PLAYGROUND = ROOT / "playground/data"


# ------------------------------------------------------------------------------------- released.py
def test_the_released_preference_by_hand():
    """Of the three tokens the teacher prefers the first and the student the third. With β = 0.1 the
    margin is 0.1 · [log(.2/.5) − log(.6/.2)]."""
    teacher = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64).log()
    student = torch.tensor([[0.2, 0.2, 0.6]], dtype=torch.float64).log()
    margin = 0.1 * torch.tensor(0.2 / 0.5 * 0.2 / 0.6, dtype=torch.float64).log()
    value = released.argmax_preference(teacher, student)
    assert value.tolist() == pytest.approx([-F.logsigmoid(margin).item()])
    # Where both prefer the same token there is no margin.
    assert released.argmax_preference(teacher, teacher).item() == pytest.approx(0.693147, abs=1e-6)


@pytest.mark.parametrize("name", released.VARIANTS)
def test_a_variant_takes_the_place_of_a_function_with_the_same_first_arguments(name):
    variant = released.VARIANTS[name]
    function = getattr(importlib.import_module(variant.script), variant.function_name)
    expected = list(inspect.signature(function).parameters)
    replacement = list(inspect.signature(variant.replacement).parameters)
    assert replacement[: len(expected)] == expected


FLAGS_OF_VARIANTS = {"dpkd": {"kl_chosen": 2, "kl_rejected": 0}}


@pytest.mark.slow
@pytest.mark.parametrize("name", released.VARIANTS)
def test_a_variant_learns_from_another_loss_than_its_script(name, tmp_path, monkeypatch):
    variant = released.VARIANTS[name]
    script = importlib.import_module(variant.script)
    original = getattr(script, variant.function_name)
    flags = {
        "data": first_rows("train", 24, tmp_path),
        "eval_data": first_rows("rm_test", 8, tmp_path),
        "max_steps": 1,
        "batch_size": 8,
        "log_every": 1,
        "eval_prompts": 4,
    }
    # The variant stays in the module, so monkeypatch puts the function back after the test.
    monkeypatch.setattr(script, variant.function_name, original)
    monkeypatch.chdir(ROOT)
    released.main([name, *command_line({**flags, "output_dir": tmp_path / "released"})])
    args = json.loads((tmp_path / "released" / "args.json").read_text())
    for flag, value in FLAGS_OF_VARIANTS.get(name, {}).items():
        assert args[flag] == value
        flags[flag] = value
    assert run_script(variant.script, **flags, output_dir=tmp_path / "own") == 0
    [released_row] = read_jsonl(tmp_path / "released" / "metrics.jsonl")
    [own_row] = read_jsonl(tmp_path / "own" / "metrics.jsonl")
    assert released_row.keys() == own_row.keys()
    assert released_row["losses/total"] != pytest.approx(own_row["losses/total"], rel=1e-3)


@pytest.mark.parametrize("words", [[], ["adpa"], ["--help"]])
def test_a_variant_that_does_not_exist_is_one_line(words, capsys):
    with pytest.raises(SystemExit) as stopped:
        released.main(words)
    assert stopped.value.code == 2
    assert "released {dpkd,pad,rm_distiller} [flags" in capsys.readouterr().err


# ------------------------------------------------------------------------------------- rm_pairs.py
def test_the_writers_pairs_are_drawn_as_they_were():
    """They come before the shifted pairs, and need no model."""
    _, requests = all_requests()
    # Stands in for the teacher's answers, and leaves the pairs that are drawn before them alone.
    teacher_answers = [["Nothing.", "Nothing"] for _ in requests]
    rows = rm_pairs.make_pairs(requests, teacher_answers, pairs=2, seed=1)
    committed = read_jsonl(PLAYGROUND / "rm_test.jsonl")
    assert rows[:512] == committed[:512]
    assert [row["subset"] for row in rows] == [row["subset"] for row in committed]


@pytest.mark.slow
def test_all_pairs_are_drawn_as_they_were(tmp_path, monkeypatch):
    """A processor that rounds in another way may sample other answers from the teacher, so a few
    of the shifted pairs may differ."""
    monkeypatch.chdir(ROOT)
    rm_pairs.main(rm_pairs.Args(output=str(tmp_path / "rm_test.jsonl")))
    rows = read_jsonl(tmp_path / "rm_test.jsonl")
    committed = read_jsonl(PLAYGROUND / "rm_test.jsonl")
    assert len(rows) == len(committed)
    equal = sum(row == other for row, other in zip(rows, committed))
    assert equal >= 0.95 * len(committed)


def test_rewards_that_are_never_far_enough_apart_are_an_error():
    _, requests = all_requests()
    with pytest.raises(RuntimeError, match=r"no two answers to 'Name two planets\.'"):
        rm_pairs.draw_pair(
            rm_pairs.SUBSETS["shifted"], requests[0], ["Mars.", "Mars."], random.Random(1)
        )
