"""A few steps of every script on a few rows, against numbers that were written down before the code
was last rewritten.

A change that is meant to leave the methods as they are must leave these numbers as they are. Where
a change is meant to move them, `python tests/test_golden.py` writes them again, and the commit says
why.
"""

import json
import sys
import tempfile
from pathlib import Path

import pytest
from conftest import first_rows, read_jsonl, run_script

import pad
import rm_distiller

GOLDEN = Path(__file__).parent / "golden.json"
SHORT = {
    "max_steps": 3,
    "batch_size": 8,
    "micro_batch_size": 4,
    "logits_chunk": 64,
    "log_every": 1,
    "eval_every": 2,
    "eval_prompts": 8,
}
FLAGS = {  # what a script needs besides, to pass through everything that it has
    "adpa": {},
    "dckd": {},
    "dpkd": {"refresh_every": 2, "sft_coef": 0.5},
    "pad": {"num_answers": 3},
    "rm_distiller": {"nll_coef": 0.5},
}


def short_run(script: str, folder: Path) -> list[dict]:
    """The metrics of a short run, without what is measured with a clock."""
    corpus = folder / "corpus.txt"
    corpus.write_text("The planets are Mars, Venus and Earth.\nA spider is no insect.\n")
    flags = {**SHORT, **FLAGS[script], "data": first_rows("train", 64, folder)}
    if script == "rm_distiller":
        flags["eval_data"] = first_rows("rm_test", 32, folder)
    if script == "dpkd":
        flags["lm_data"] = corpus
    assert run_script(script, **flags, output_dir=folder / "run") == 0
    rows = read_jsonl(folder / "run" / "metrics.jsonl")
    clocks = ("_per_second", "_share")
    return [{key: value for key, value in row.items() if not key.endswith(clocks)} for row in rows]


# What the playground's teacher was taught to answer (playground/build.py), to the letter.
PROMPTS = {
    "judge": (
        "Request: Name one fish.\nAnswer A: cod.\nAnswer B: whale.\n"
        "Which answer is better? Reply with A, B or None."
    ),
    "score": (
        "Request: Name one fish.\nAnswer A: cod.\nAnswer B: whale.\n"
        "Score each answer from 1 to 10. Reply as A: score, B: score"
    ),
    "refine": (
        "Request: Name one fish.\nBetter answer: cod.\nWorse answer: whale.\n"
        "Explain why the second answer is worse, then edit it as little as possible to make it "
        "good.\nReply as Why: reason Edited: answer"
    ),
    "rescore": (
        "The worse answer was scored 4 out of 10. Score the edited answer on the same scale.\n"
        "Reply with the score."
    ),
}


def test_the_prompts_are_those_that_the_playgrounds_teacher_learned():
    pair = {"prompt": "Name one fish.", "a": "cod.", "b": "whale."}
    edit = {"prompt": "Name one fish.", "better": "cod.", "worse": "whale."}
    assert pad.JUDGE_PROMPT.format(**pair) == PROMPTS["judge"]
    assert rm_distiller.SCORE_PROMPT.format(**pair) == PROMPTS["score"]
    assert rm_distiller.REFINE_PROMPT.format(**edit) == PROMPTS["refine"]
    assert rm_distiller.RESCORE_PROMPT.format(score=4.2) == PROMPTS["rescore"]


@pytest.mark.parametrize("script", FLAGS)
def test_a_few_steps_give_the_numbers_that_were_written_down(script, tmp_path):
    expected = json.loads(GOLDEN.read_text())[script]
    measured = short_run(script, tmp_path)
    assert [row["step"] for row in measured] == [row["step"] for row in expected]
    for row, golden in zip(measured, expected):
        assert row.keys() == golden.keys()
        for key, value in golden.items():
            # Other processors add in another order. 1e-4 leaves room for that and for nothing else.
            assert row[key] == pytest.approx(value, rel=1e-4, abs=1e-6), (row["step"], key)


def write():
    golden = {}
    for script in FLAGS:
        with tempfile.TemporaryDirectory() as folder:
            golden[script] = short_run(script, Path(folder))
    GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(write())
