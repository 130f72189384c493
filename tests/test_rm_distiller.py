"""RM-Distiller against slow loops in float64, against plain forward passes, and against odd replies of teachers."""

import datetime
import json
import math
import re
import statistics
from pathlib import Path

import pytest
import torch
from conftest import ROOT, make_model, make_tokenizer, read_jsonl, run_script, save
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GraniteConfig,
    GraniteForCausalLM,
)

from common import LM, load_reward, read_rows
from playground import released, rm_pairs
from playground.world import all_requests, read_request
from playground.world import judge as oracle
from rm_distiller import (
    IT,
    REFINE,
    RESCORE,
    SCORE,
    A,
    Args,
    B,
    forward_kl,
    pair_loss,
    read_edit,
    read_score,
)

CPU = torch.device("cpu")


def said(text: str, finished=True) -> dict:
    return {"text": text, "finished": finished}


# ---------------------------------------------------------------------------------------------------------- mathematics
def draw(*shape, seed=0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_margin_loss_equals_a_slow_loop():
    better, worse, margins = draw(3, 7)
    slow = [(better[i].item() - worse[i].item() - margins[i].item()) ** 2 for i in range(7)]
    assert pair_loss(better, worse, margins).tolist() == pytest.approx(slow)
    assert pair_loss(better, better - margins, margins).tolist() == pytest.approx(
        [0] * 7, abs=1e-28
    )


def test_without_margins_it_is_bradley_terry():
    better, worse = draw(2, 7)
    slow = [-math.log(1 / (1 + math.exp(worse[i].item() - better[i].item()))) for i in range(7)]
    assert pair_loss(better, worse).tolist() == pytest.approx(slow)


def test_the_released_table_pulls_every_pair_to_the_mean_margin():
    better, worse, margins = draw(3, 5)
    table = [[(better[i] - worse[i] - margins[j]).item() ** 2 for i in range(5)] for j in range(5)]
    ours = released.margin_loss_over_a_table(better, worse, margins)
    assert ours.mean().item() == pytest.approx(statistics.mean(map(statistics.mean, table)))
    spread = margins.var(
        correction=0
    ).item()  # what cannot be learned, and what the pull is towards
    to_mean = pair_loss(better, worse, margins.mean().expand(5)).mean().item()
    assert ours.mean().item() == pytest.approx(to_mean + spread)
    assert abs(ours.mean().item() - pair_loss(better, worse, margins).mean().item()) > 0.1
    equal = torch.full(
        (5,), 1.5, dtype=torch.float64
    )  # and is nothing but the same when all margins are equal
    assert released.margin_loss_over_a_table(better, worse, equal).mean() == pytest.approx(
        pair_loss(better, worse, equal).mean().item()
    )


@pytest.mark.parametrize(
    "shapes", [((4,), (4,), (4, 1)), ((4, 1), (4, 1), (4,)), ((4,), (4,), (1,)), ((4,), (1,), None)]
)
def test_shapes_that_would_broadcast_are_refused(shapes):
    better, worse, margins = (None if shape is None else torch.zeros(shape) for shape in shapes)
    with pytest.raises(AssertionError):
        pair_loss(better, worse, margins)


def test_the_forward_kl_equals_a_slow_loop_and_takes_excluded_tokens():
    teacher, student = draw(2, 4, 9).log_softmax(-1)
    teacher[0, 2] = -math.inf
    slow = []
    for t in range(4):
        terms = [
            (teacher[t, a].exp() * (teacher[t, a] - student[t, a])).item()
            for a in range(9)
            if (t, a) != (0, 2)
        ]
        slow.append(sum(terms))
    assert forward_kl(teacher, student).tolist() == pytest.approx(slow)


# ---------------------------------------------------------------------------------------- r45: what teachers really say
PAIRS = {  # reply: (score of A, score of B), 0 where nothing certain was said
    "A: 8, B: 6": (8, 6),
    "A:8,B:6": (8, 6),
    "A: 8\nB: 6": (8, 6),
    "  A: 8, B: 6.  ": (8, 6),
    "A: 10, B: 1": (10, 1),
    "A: 8/10, B: 6/10": (8, 6),
    "A: 8 / 10\nB: 6 / 10": (8, 6),
    "A: 8 out of 10, B: 6 out of 10": (8, 6),
    "10/10, 7/10": (10, 7),
    "A: 8.5, B: 7": (8.5, 7),
    "8.5 and 7": (8.5, 7),
    "8, 6": (8, 6),
    "8 6": (8, 6),
    "8\n6": (8, 6),
    "B: 6, A: 8": (8, 6),
    "**A:** 8, **B:** 6": (8, 6),
    "**A: 8**\n**B: 6**": (8, 6),
    "A: **8**\nB: **6**": (8, 6),
    "`A: 8, B: 6`": (8, 6),
    "- A: 8\n- B: 6": (8, 6),
    "Answer A: 8, Answer B: 6": (8, 6),
    "Score A: 8\nScore B: 6": (8, 6),
    "Here are my scores:\n\nA: 8\nB: 6": (8, 6),
    "A = 8; B = 6": (8, 6),
    "A - 8, B - 6": (8, 6),
    "A (8), B (6)": (8, 6),
    "a: 8, b: 6": (8, 6),
    "A：8，B：6": (8, 6),
    "A：8分，B：6分": (8, 6),
    '{"A": 8, "B": 6}': (8, 6),
    "A gets 8 and B gets 6": (8, 6),
    "Answer A is a 9 and answer B is a 4.": (9, 4),
    "A: 8 (clear and right), B: 6 (one fault)": (8, 6),
    "A: 8, because it names 2 fish. B: 6": (8, 6),
    "A: 8 points, B: 6 points": (8, 6),
    "A: 3 facts are right, score 8; B: 2 facts are right, score 6": (0, 0),
    "A: 8, B: 6\n\nA: 8, B: 6": (8, 6),
    "": (0, 0),
    "   \n": (0, 0),
    "A: , B: ": (0, 0),
    "A: eight, B: six": (0, 0),
    "I cannot score these answers.": (0, 0),
    "Both answers are fine.": (0, 0),
    "A is better.": (0, 0),
    "A: 8": (0, 0),
    "B: 6": (0, 0),
    "8": (0, 0),
    "8, 6, 7": (0, 0),
    "A: 0, B: 6": (0, 0),
    "A: 8, B: 11": (0, 0),
    "A: -8, B: 6": (0, 0),
    "A: 100, B: 60": (0, 0),
    "A: 80%, B: 60%": (0, 0),
    "A: 8-9, B: 6": (0, 0),
    "A: 8/5, B: 3/5": (0, 0),
    "A: N/A, B: 6": (0, 0),
    "A: 8, B: 6. On reflection A: 5, B: 6": (0, 0),
    "A: 8th, B: 6th": (0, 0),
    "A: 99999999999999999999999999, B: 6": (0, 0),
    "AB: 8, BA: 6": (0, 0),
    "🦊 A: ٨, B: 6": (8, 6),
    "A: nan, B: inf": (0, 0),
}


@pytest.mark.parametrize("text", PAIRS)
def test_r45_scores_of_two_answers_are_read_right_or_not_at_all(text):
    first, second = PAIRS[text]
    assert read_score(said(text), A, B) == first
    if any(
        letter.isalpha() for letter in text.replace("and", "")
    ):  # without names, the order tells
        assert read_score(said(text), B, A) == second


SINGLE = {
    "8": 8, "8.": 8, " 10 ": 10, "8/10": 8, "8.5": 8.5, "**9**": 9, "Score: 7": 7, "score: 7/10": 7, "Rating: 7": 7,
    "The score is 7.": 7, "I would score it 7 out of 10": 7, "": 0, "good": 0, "0": 0, "11": 0, "7 or 8": 0,
    "7-8": 0, "-7": 0, "70%": 0, "Score: 7. Score: 8": 0, "It names 3 fish.": 0,
}  # fmt: skip


@pytest.mark.parametrize("text", SINGLE)
def test_r45_one_score_is_read_right_or_not_at_all(text):
    assert read_score(said(text), IT) == SINGLE[text]


EDITS = {
    "Why: one missing. Edited: cod and eel.": "cod and eel.",
    "Why: it says Edited wrongly. Edited: cod.": "cod.",
    "**Why:** short.\n\n**Edited:** cod and\neel.\n": "cod and\neel.",
    "Why: x\nEdited answer: cod.": "cod.",
    'Edited: "cod."': "cod.",
    "Edited: “cod.”": "cod.",
    "EDITED: cod.": "cod.",
    'Edited: A "cod" is a fish': 'A "cod" is a fish',
    "Why: nothing is wrong.": "",
    "Why: The text was poorly edited: it has faults. Edited: Good text.": "Good text.",
    'Edited: "Hello," she said. "Goodbye."': '"Hello," she said. "Goodbye."',
    "Edited:": "",
    "Edited:   \n": "",
    "": "",
    "cod and eel.": "",
}


@pytest.mark.parametrize("text", EDITS)
def test_r45_edits_are_what_stands_behind_the_word(text):
    assert read_edit(said(text)) == EDITS[text]
    assert (
        read_edit(said(text, finished=False)) == ""
    )  # a reply that was cut off holds half an edit


# ---------------------------------------------------------------------------------- a step against plain forward passes
def annotations(tmp_path, pairs) -> str:
    """What another program might have written about the eight pairs: text, and scores."""
    rows = []
    for i, row in enumerate(json.loads(line) for line in pairs.read_text().splitlines()):
        scores = {
            "score_chosen": 6.0 + i / 4,
            "score_rejected": 2.0 + i / 8,
            "score_refined": 9.5 - i / 4,
        }
        rows.append(
            {
                **row,
                "refined": f"{row['chosen']} indeed",
                "teacher": f"a thing of {i} words",
                **scores,
            }
        )
    path = tmp_path / "annotations.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


STEP = {"eval_prompts": 4, "best_of": 0, "max_response_tokens": 60}
FLAGS = {
    "the full method": {"kl_coef": 0.7, "nll_coef": 0.4, "margin_scale": 0.5},
    "no generation terms": {"kl_coef": 0.0},
    "only the likelihood": {"kl_coef": 0.0, "nll_coef": 1.0},
    "Bradley-Terry on the edits": {"no-margin": True, "kl_coef": 0.0},
    "plain pairs": {"no-refine": True, "margin_scale": 1.0},
    "Bradley-Terry on plain pairs": {"no-refine": True, "no-margin": True, "kl_coef": 0.0},
}


def slow_step(paths: dict, path: str, flags: dict):
    """Mean loss over the pairs, its parts and its gradient, in float64 and by one plain forward pass after another."""
    lm, model = (
        LM(paths["student"], CPU),
        AutoModelForCausalLM.from_pretrained(paths["student"], dtype=torch.float64),
    )
    teacher = AutoModelForCausalLM.from_pretrained(paths["teacher"], dtype=torch.float64)
    torch.manual_seed(1)
    head = (
        torch.nn.Linear(model.config.hidden_size, 1, bias=False)
        .weight.detach()
        .double()[0]
        .requires_grad_()
    )
    better = "chosen" if flags.get("no-refine") else "refined"
    parts = {"pair": 0.0, "kl": 0.0, "nll": 0.0}
    rows = read_rows(path, "train", (better, "rejected"))
    for row in rows:
        prompt, responses = lm.encode(row["prompt"], [row[better], row["rejected"], row["teacher"]])
        r = []
        for response in responses[:2]:
            states = model(
                torch.tensor([prompt + response]), output_hidden_states=True
            ).hidden_states[-1]
            r.append((states[0, -1] * head).sum())
        margin = flags.get("margin_scale", 0.3) * (row[f"score_{better}"] - row["score_rejected"])
        bradley_terry = -torch.log(torch.sigmoid(r[0] - r[1]))
        parts["pair"] += bradley_terry if flags.get("no-margin") else (r[0] - r[1] - margin) ** 2
        ids, span = torch.tensor([prompt + responses[2]]), slice(len(prompt) - 1, -1)
        ours = model(ids).logits[0, span, : lm.vocab_size].log_softmax(-1)
        theirs = teacher(ids).logits[0, span, : lm.vocab_size].log_softmax(-1).detach()
        length = len(responses[2])
        parts["kl"] += (
            sum((theirs[t].exp() * (theirs[t] - ours[t])).sum() for t in range(length)) / length
        )
        parts["nll"] -= sum(ours[t, token] for t, token in enumerate(responses[2])) / length
    parts = {name: part / len(rows) for name, part in parts.items()}
    total = (
        parts["pair"]
        + flags.get("kl_coef", 0.1) * parts["kl"]
        + flags.get("nll_coef", 0.0) * parts["nll"]
    )
    gradient = torch.autograd.grad(total, [*model.parameters(), head])
    return {"total": total.item(), **{name: part.item() for name, part in parts.items()}}, gradient


@pytest.mark.parametrize("name", FLAGS)
def test_r04_r44_a_step_equals_a_slow_loop_over_plain_forward_passes(
    name, checkpoints, pairs, run_tiny, tmp_path
):
    path, flags = annotations(tmp_path, pairs), FLAGS[name]
    run = run_tiny("rm_distiller", annotations=path, **STEP, **flags)
    expected, gradient = slow_step(checkpoints, path, flags)
    [row_of_metrics] = read_jsonl(run / "metrics.jsonl")
    logged = {
        key.removeprefix("losses/"): v
        for key, v in row_of_metrics.items()
        if key.startswith("losses/")
    }
    generation = flags.get("kl_coef", 0.1) + flags.get("nll_coef", 0) > 0
    assert logged.keys() == ({"total", "pair", "kl", "nll"} if generation else {"total", "pair"})
    for term, value in logged.items():
        silent = term == "kl" and not flags.get(
            "kl_coef", 0.1
        )  # without the teacher there is nothing to compare with
        assert value == pytest.approx(0 if silent else expected[term], rel=1e-3, abs=1e-6), term
    state = torch.load(run / "checkpoint.pt", weights_only=True)["optimizer"]["state"]
    for i, theirs in enumerate(gradient):
        if i not in state:
            assert not theirs.any()  # the language-model head, when nothing is asked of it
        else:  # AdamW's first moment is (1 − 0.9) times the gradient
            ours = state[i]["exp_avg"].double().view_as(theirs) / 0.1
            torch.testing.assert_close(ours, theirs, rtol=5e-3, atol=1e-5)
    lm, better = LM(checkpoints["student"], CPU), "chosen" if flags.get("no-refine") else "refined"
    columns = [better, "rejected", "teacher"] if generation else [better, "rejected"]
    rows = read_rows(path, "train", (better, "rejected"))
    responses = [
        r for row in rows for r in lm.encode(row["prompt"], [row[name] for name in columns])[1]
    ]
    assert row_of_metrics["charts/tokens"] == sum(
        map(len, responses)
    )  # y_T is no part of the row if nothing needs it


def test_of_every_pair_only_its_own_margin_counts(checkpoints, pairs, run_tiny, tmp_path):
    """Changing one margin changes the loss by what that pair's term changes: nothing is spread over the batch."""
    path = annotations(tmp_path, pairs)
    rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
    losses = []
    for more in (0.0, 1.0):
        changed = [
            row | {"score_refined": row["score_refined"] + more * (i == 3)}
            for i, row in enumerate(rows)
        ]
        file = tmp_path / f"changed{more}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in changed))
        run = run_tiny("rm_distiller", annotations=str(file), **STEP, kl_coef=0, margin_scale=1)
        losses.append(read_jsonl(run / "metrics.jsonl")[0]["losses/pair"])
    torch.manual_seed(1)
    head = torch.nn.Linear(32, 1, bias=False).weight.detach()[0]
    lm, row = LM(checkpoints["student"], CPU), read_rows(path, "train", ("refined", "rejected"))[3]
    prompt, responses = lm.encode(row["prompt"], [row["refined"], row["rejected"]])
    with torch.no_grad():
        states = [
            lm.model(torch.tensor([prompt + r]), output_hidden_states=True).hidden_states[-1]
            for r in responses
        ]
    difference = ((states[0][0, -1] - states[1][0, -1]) @ head).item()
    margin = row["score_refined"] - row["score_rejected"]
    expected = ((difference - margin - 1) ** 2 - (difference - margin) ** 2) / 8
    assert losses[1] - losses[0] == pytest.approx(expected, rel=1e-3)


# ----------------------------------------------------------------------------------------------- the saved reward model
def trained(checkpoints, pairs, tmp_path, tokenizer=None, **flags):
    """A run from annotations, of a student with some tokenizer, for a few steps."""
    models = {role: checkpoints[role] for role in ("student", "teacher")}
    if tokenizer is not None:
        models = {
            role: save(tmp_path / role, tokenizer, make_model(len(tokenizer), seed=3))
            for role in models
        }
    how = {
        "annotations": annotations(tmp_path, pairs),
        "eval_data": pairs,
        "reward": "conftest:vowels",
        "max_steps": 3,
    }
    how |= {
        "batch_size": 4,
        "max_response_tokens": 60,
        "learning_rate": 1e-2,
        "best_of": 0,
        **flags,
    }
    assert run_script("rm_distiller", **models, **how, output_dir=tmp_path / "run") == 0
    return tmp_path / "run"


TOKENIZERS = {
    "pad is another token": {},
    "pad is the end-of-turn": {"pad": "<|end|>"},
    "no pad": {"pad": None},
}


@pytest.mark.parametrize("case", TOKENIZERS)
def test_r44_the_saved_model_is_a_plain_classifier_with_equal_scores(
    case, checkpoints, pairs, tmp_path
):
    tokenizer = make_tokenizer(**TOKENIZERS[case])
    run = trained(checkpoints, pairs, tmp_path, tokenizer)
    state = torch.load(run / "checkpoint.pt", weights_only=True)["model"]
    lm = LM(tmp_path / "student", CPU)
    rows = read_rows(str(pairs), "train")
    texts, expected = [], []
    trained_model = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    head = state.pop("score.weight")
    trained_model.load_state_dict(state)
    for row in rows:
        for answer in (row["chosen"], row["rejected"]):
            prompt, [response] = lm.encode(row["prompt"], [answer])
            with torch.no_grad():
                states = trained_model(
                    torch.tensor([prompt + response]), output_hidden_states=True
                ).hidden_states[-1]
            texts.append(prompt + response)
            expected.append((states[0, -1] @ head[0]).item())
    assert len({round(value, 4) for value in expected}) > 10

    model = AutoModelForSequenceClassification.from_pretrained(run / "model")
    reloaded = AutoTokenizer.from_pretrained(run / "model")
    assert (
        model.config.num_labels == 1
        and model.config.pad_token_id == reloaded.pad_token_id is not None
    )
    batch = reloaded.pad(
        {"input_ids": texts}, return_tensors="pt", padding_side="right"
    )  # as libraries do it
    with torch.no_grad():
        together = model(**batch).logits[:, 0].tolist()
        alone = [model(torch.tensor([ids])).logits[0, 0].item() for ids in texts]
    assert together == pytest.approx(expected, abs=1e-5) and alone == pytest.approx(
        expected, abs=1e-5
    )

    for size in (1, 3, 32):  # and as `--reward runs/<run>/model` of the other scripts
        judge = load_reward(str(run / "model"), CPU, batch_size=size)
        prompts = [row["prompt"] for row in rows for _ in range(2)]
        answers = [row[name] for row in rows for name in ("chosen", "rejected")]
        assert judge(prompts, answers) == pytest.approx(expected, abs=1e-5)
    language = AutoModelForCausalLM.from_pretrained(run / "model")  # which the backbone has kept
    assert language.generate(torch.tensor([texts[0]]), max_new_tokens=2).shape[1] > len(texts[0])


def test_the_pages_lines_for_loading_it_give_the_same_score(checkpoints, pairs, tmp_path):
    run = trained(checkpoints, pairs, tmp_path)
    page = (ROOT / "docs" / "rm_distiller.md").read_text()
    [code] = re.findall(r"```python\n(.*?)```", page, re.S)
    scope = {}
    exec(code.replace("runs/rm/model", str(run / "model")), scope)
    prompt, answer = (turn["content"] for turn in scope["chat"])
    [expected] = load_reward(str(run / "model"), CPU)([[ask(prompt)]], [answer])
    assert scope["reward"] == pytest.approx(expected, abs=1e-5)


def test_r44_the_head_is_seeded(checkpoints, pairs, tmp_path):
    heads = []
    for folder, seed in (("one", 1), ("again", 1), ("other", 2)):
        (tmp_path / folder).mkdir()
        run = trained(checkpoints, pairs, tmp_path / folder, seed=seed, max_steps=1)
        heads.append(torch.load(run / "checkpoint.pt", weights_only=True)["model"]["score.weight"])
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])


def test_a_language_model_without_a_head_is_no_judge(checkpoints, capsys):
    with pytest.raises(SystemExit):
        load_reward(checkpoints["student"], CPU)
    assert "score.weight" in capsys.readouterr().err


def test_a_reward_model_judges_the_other_scripts(checkpoints, pairs, run_tiny, tmp_path):
    model = trained(checkpoints, pairs, tmp_path) / "model"
    run = run_tiny("adpa", reward=model, teacher_ref="none")
    rows = read_jsonl(run / "eval_before.jsonl")
    judged = load_reward(str(model), CPU)(
        [row["prompt"] for row in rows], [row["text"] for row in rows]
    )
    assert [row["reward"] for row in rows] == pytest.approx(judged, abs=1e-5)


# ----------------------------------------------------------------------------------------------------------- evaluation
def test_accuracy_by_subset_and_best_of_n_equal_a_slow_count(checkpoints, pairs, tmp_path, capsys):
    """Columns of the data that happen to be called as something of ours change nothing."""
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    names = ["one", "two", None, "one", "", "two", "two", "one"]
    rows = [
        row | {"source": name, "worth": [5, 7], "pool": "x", "score_chosen": 1}
        for row, name in zip(rows, names)
    ]
    file = tmp_path / "subsets.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[0]]))
    (tmp_path / "here").mkdir()
    flags = {"eval_data": file, "best_of": 3, "eval_prompts": 5, "max_response_tokens": 40}
    run = trained(checkpoints, pairs, tmp_path / "here", **flags)
    out = capsys.readouterr().out
    summary = json.loads((run / "summary.json").read_text())

    judge, right = load_reward(str(run / "model"), CPU), {"one": [], "two": [], "all": []}
    for row, name in zip([*rows, rows[0]], [*names, "one"]):
        prompt = (
            row["prompt"]
            if isinstance(row["prompt"], list)
            else [{"role": "user", "content": row["prompt"]}]
        )
        chosen, rejected = judge([prompt] * 2, [row["chosen"], row["rejected"]])
        for subset in {name or "all", "all"}:
            right[subset].append(chosen > rejected)
    for subset, values in right.items():
        share, error, count = summary["accuracy"][subset]
        assert (share, count) == (pytest.approx(statistics.mean(values)), len(values))
        assert error == pytest.approx((share * (1 - share) / count) ** 0.5)
        assert subset in out
    assert summary["accuracy_after"] == summary["accuracy"]["all"][0] and summary[
        "accuracy"
    ].keys() == {
        *right,
        "best of 3",
    }

    options = read_jsonl(run / "options.jsonl")
    best = []
    for row in options:
        texts = [answer["text"] for answer in row["answers"]]
        assert len(texts) == 3 and row["worth"] == [
            sum(c in "aeiou" for c in text) / (len(text) + 1) for text in texts
        ]
        r = judge_unfinished(run, row)
        best.append(
            statistics.mean(worth for value, worth in zip(r, row["worth"]) if value == max(r))
        )
    assert len(options) == 5 and summary["best_of_n_reward"] == pytest.approx(statistics.mean(best))


def judge_unfinished(run, row: dict) -> list[float]:
    """r of sampled answers, which end with an end-of-turn only if they were finished."""
    lm = LM(run / "model", CPU, reward=True)
    prompt, responses = lm.encode(row["prompt"], row["answers"])
    with torch.no_grad():
        return [
            lm.model(torch.tensor([prompt + response[:40]])).logits[0, 0].item()
            for response in responses
        ]


def test_the_playgrounds_pairs_are_what_they_are_said_to_be():
    rows, requests = (
        read_jsonl(ROOT / Args().eval_data),
        {request.text for request in all_requests()[1]},
    )
    gaps = {"easy": [], "hard": [], "shifted": []}
    for row in rows:
        request = read_request(row["prompt"])
        gaps[row["subset"]].append(
            oracle(request, row["chosen"]).reward - oracle(request, row["rejected"]).reward
        )
    assert {row["prompt"] for row in rows} == requests  # none of which is trained on
    assert {name: len(values) for name, values in gaps.items()} == {
        "easy": 256,
        "hard": 256,
        "shifted": 256,
    }
    assert (
        min(gaps["easy"]) > rm_pairs.EASY - 1e-6
        and 0 < min(gaps["hard"]) <= max(gaps["hard"]) < rm_pairs.HARD + 1e-6
    )
    assert min(gaps["shifted"]) > 0
    worth = {name: [] for name in gaps}
    for row in rows:
        worth[row["subset"]] += [
            oracle(read_request(row["prompt"]), row[side]).reward for side in ("chosen", "rejected")
        ]
    means = {name: statistics.mean(values) for name, values in worth.items()}
    assert means["shifted"] > max(
        means["easy"], means["hard"]
    )  # the teacher's answers are better than the writers'


# --------------------------------------------------------------------------------------------- the stages of annotation
SHORT = {
    "max_steps": 2,
    "batch_size": 8,
    "eval_prompts": 4,
    "best_of": 0,
    "max_response_tokens": 40,
}


PAIR_OF_SCORES = (("chosen", 7), ("rejected", 1))


def few(tmp_path, count=24):
    lines = (ROOT / "playground/data/train.jsonl").read_text().splitlines(keepends=True)
    path = tmp_path / "train.jsonl"
    path.write_text("".join(lines[:count]))
    return path


def plain_scores(lm: LM, chat: list[dict], form: str) -> float:
    """Σ_s s p(s) by one plain forward pass for each of the ten replies."""
    logps = []
    for s in range(1, 11):
        prompt, [reply] = lm.encode(chat, [{"text": form.format(s), "finished": form == "{}"}])
        with torch.no_grad():
            logits = (
                lm.model(torch.tensor([prompt + reply]))
                .logits[0, len(prompt) - 1 : -1, : lm.vocab_size]
                .double()
            )
        logps.append(logits.log_softmax(-1)[range(len(reply)), reply].sum())
    return (torch.stack(logps).softmax(0) * torch.arange(1.0, 11.0)).sum().item()


def ask(text: str) -> dict:
    return {"role": "user", "content": text}


def test_expected_scores_equal_plain_forward_passes_of_the_teacher(tmp_path):
    assert run_script("rm_distiller", data=few(tmp_path), **SHORT, output_dir=tmp_path / "run") == 0
    lm, rows = LM("playground/teacher", CPU), read_jsonl(tmp_path / "run" / "annotations.jsonl")
    assert len(rows) > 12
    for row in rows[:6]:
        request, chosen, rejected = row["prompt"][-1]["content"], row["chosen"], row["rejected"]
        for name, a, b in (("chosen", chosen, rejected), ("rejected", rejected, chosen)):
            question = (SCORE % ("a", "b")).format(asked=request, a=a, b=b)
            assert row[f"score_{name}"] == pytest.approx(
                plain_scores(lm, [ask(question)], "A: {},"), abs=1e-3
            )
        refine = ask(REFINE.format(asked=request, teacher=row["teacher"], rejected=rejected))
        assert row["refined"] == row["refined_reply"].partition("Edited:")[2].strip()
        reply = {"role": "assistant", "content": row["refined_reply"]}
        chat = [refine, reply, ask(RESCORE.format(score_rejected=round(row["score_rejected"])))]
        assert row["score_refined"] == pytest.approx(plain_scores(lm, chat, "{}"), abs=1e-3)
        assert row["score_chosen"] > row["score_rejected"] and row["refined"] != rejected


def test_scores_from_text_are_numbers_the_teacher_wrote(tmp_path, capsys):
    flags = {"data": few(tmp_path), **SHORT, "score": "text"}
    assert run_script("rm_distiller", **flags, output_dir=tmp_path / "run") == 0
    rows = read_jsonl(tmp_path / "run" / "annotations.jsonl")
    assert len(rows) > 6
    lm = LM(
        "playground/teacher", CPU
    )  # scores are greedy, whatever the temperature of answers and edits
    data = {row["id"]: row for row in read_rows(str(few(tmp_path)), "train")}
    for row in read_jsonl(tmp_path / "run" / "score_chosen.jsonl")[:8]:
        pair, request = data[row["id"]], row["prompt"][-1]["content"]
        question = (SCORE % ("a", "b")).format(asked=request, a=pair["chosen"], b=pair["rejected"])
        prompts = [lm.encode([ask(question)])[0]]
        [[greedy]] = lm.sample(prompts, temperature=0, max_new_tokens=40, batch_size=1, seed=0)
        assert row["reply"] == greedy["text"]
    columns = ("score_chosen", "score_rejected", "score_refined")
    assert all(row[name] in range(1, 11) for row in rows for name in columns)
    for column, names in (
        ("score_refined", (IT,)),
        ("score_chosen", (A, B)),
        ("score_rejected", (A, B)),
    ):
        for row in read_jsonl(tmp_path / "run" / f"{column}.jsonl"):
            assert row[column] == read_score(said(row["reply"]), *names)
    counts = table_of(capsys.readouterr().out)
    assert (
        counts["tie"] >= 1 and counts.pop("rows in") == 24
    )  # whole numbers tie; expected ones do not
    assert sum(counts.values()) == 24


def table_of(out: str) -> dict[str, int]:
    """What the run printed of the rows that it dropped and kept."""
    lines = [line.split(None, 1) for line in out.splitlines() if line[:8].strip().isdigit()]
    return {what: int(count) for count, what in lines}


@pytest.fixture
def feed(pairs, checkpoints, tmp_path):
    """feed({stage: rows}): a run that finds files of stages in its folder, as if killed with them there."""

    def run(files: dict[str, list[dict]], **flags):
        folder = tmp_path / "fed"
        folder.mkdir()
        how = {
            "data": str(pairs),
            "eval_data": str(pairs),
            "reward": "conftest:vowels",
            **SHORT,
            "log_every": 1,
        }
        args = Args(
            **{**how, "student": checkpoints["student"], "teacher": checkpoints["teacher"], **flags}
        )
        (folder / "args.json").write_text(json.dumps({**vars(args), "output_dir": str(folder)}))
        for name, rows in files.items():
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return folder, run_script("rm_distiller", resume=folder)

    return run


def test_what_is_dropped_is_counted_and_stages_may_come_from_elsewhere(pairs, feed, capsys):
    """Eight rows: one unreadable score, one tie, one unreadable edit, one edit that changes nothing, one unreadable
    score of an edit, one gain of exactly a point, one that the teacher orders the other way, and a plain one."""
    rows = [{"id": row["id"], "prompt": row["prompt"]} for row in read_rows(str(pairs), "train")]
    source = read_rows(str(pairs), "train")
    first, second = [0, 5, 7, 7, 7, 7, 2, 8], [4, 5, 3, 3, 3, 3, 6, 3]
    after = [9, 9, 9, 9, 0, 4, 9, 9]
    edits = ["", "", "", source[3]["rejected"], "x y", "x y", "x y", "x y"]
    files = {
        "teacher": [row | {"teacher": said("a teacher's answer")} for row in rows],
        "score_chosen": [row | {"score_chosen": s} for row, s in zip(rows, first)],
        "score_rejected": [
            row | {"score_rejected": s} for row, s in zip(rows, second) if row is not rows[0]
        ],
        "refined": [
            row | {"refined": e, "refined_reply": f"Edited: {e}"}
            for row, e in list(zip(rows, edits))[2:]
        ],
        "score_refined": [row | {"score_refined": s} for row, s in list(zip(rows, after))[4:]],
    }
    folder, code = feed({name: made[::-1] for name, made in files.items()})
    out = capsys.readouterr().out
    assert code == 0
    assert table_of(out) == {
        "rows in": 8,
        "unreadable": 3,
        "tie": 1,
        "equal": 1,
        "below the margin": 1,
        "kept": 2,
    }
    kept = {row["id"]: row for row in read_jsonl(folder / "annotations.jsonl")}
    turned = kept[rows[6]["id"]]
    assert turned["rejected"] == source[6]["chosen"] and turned["chosen"] == source[6]["rejected"]
    assert (turned["score_chosen"], turned["score_rejected"], turned["score_refined"]) == (6, 2, 9)
    assert "-on -and" in out or "+x +y" in out


def test_the_end_of_a_reply_tells_one_from_ten(pairs, checkpoints, feed):
    """With a tokenizer that writes 10 in two tokens, and a teacher that is not sure of the end."""
    rows = [{"id": row["id"], "prompt": row["prompt"]} for row in read_rows(str(pairs), "train")]
    source = read_rows(str(pairs), "train")
    files = {"teacher": [row | {"teacher": said("a teacher's answer")} for row in rows]}
    files |= {
        f"score_{name}": [row | {f"score_{name}": s} for row in rows] for name, s in PAIR_OF_SCORES
    }
    files["refined"] = [row | {"refined": "x y", "refined_reply": "Edited: x y"} for row in rows]
    folder, _ = feed(files)
    lm, checked = LM(checkpoints["teacher"], CPU), 0
    assert len(lm.tokenizer("10").input_ids) > len(lm.tokenizer("1").input_ids)
    for row, pair in zip(read_jsonl(folder / "score_refined.jsonl"), source):
        asked = "\n".join(turn["content"] for turn in row["prompt"])
        refine = REFINE.format(
            asked=asked, teacher=said("a teacher's answer"), rejected=pair["rejected"]
        )
        reply = {"role": "assistant", "content": "Edited: x y"}
        chat = [ask(refine), reply, ask(RESCORE.format(score_rejected=1))]
        assert row["score_refined"] == pytest.approx(plain_scores(lm, chat, "{}"), abs=1e-3)
        checked += 1
    assert checked == 8


def test_a_stage_of_other_data_is_refused(pairs, feed, capsys):
    rows = [{"id": row["id"], "prompt": "another"} for row in read_rows(str(pairs), "train")]
    _, code = feed({"teacher": [row | {"teacher": said("x")} for row in rows]})
    assert code == 2 and "teacher.jsonl" in capsys.readouterr().err


@pytest.mark.parametrize("column", ["score_refined", "score_rejected", "teacher", "refined"])
def test_annotations_without_a_column_are_one_line(
    column, checkpoints, pairs, run_tiny, tmp_path, capsys
):
    path = annotations(tmp_path, pairs)
    rows = [
        {key: value for key, value in json.loads(line).items() if key != column}
        for line in Path(path).read_text().splitlines()
    ]
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    models = {role: checkpoints[role] for role in ("student", "teacher")}
    flags = {"annotations": path, "eval_data": pairs, "reward": "conftest:vowels", **SHORT}
    assert run_script("rm_distiller", **models, **flags, output_dir=tmp_path / "run") == 2
    err = capsys.readouterr().err
    assert column in err and "Traceback" not in err
    if (
        column == "teacher"
    ):  # which is needed for the generation terms only, and so is the teacher itself
        flags |= {"teacher": "/no/teacher", "overwrite": True}
        assert (
            run_script(
                "rm_distiller", **{**models, **flags}, kl_coef=0, output_dir=tmp_path / "run"
            )
            == 0
        )


def test_nothing_is_trained_that_could_not_be_loaded(checkpoints, pairs, tmp_path, capsys):
    """An architecture without a sequence classifier in transformers ends before the teacher is asked anything."""
    shape = {"vocab_size": 400, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    config = GraniteConfig(
        **shape, num_attention_heads=4, num_key_value_heads=2, eos_token_id=5, pad_token_id=0
    )
    student = save(tmp_path / "granite", make_tokenizer(), GraniteForCausalLM(config))
    flags = {
        "teacher": checkpoints["teacher"],
        "annotations": annotations(tmp_path, pairs),
        "eval_data": pairs,
    }
    flags |= {
        "reward": "conftest:vowels",
        **SHORT,
        "student": student,
        "output_dir": tmp_path / "run",
    }
    assert run_script("rm_distiller", **flags) == 2
    assert (
        "granite has no classifier" in capsys.readouterr().err and not (tmp_path / "run").exists()
    )


def test_overwrite_does_not_remove_the_annotations_that_it_reads(
    checkpoints, pairs, tmp_path, capsys
):
    run = trained(checkpoints, pairs, tmp_path)
    kept = (run / "annotations.jsonl").write_text(Path(annotations(tmp_path, pairs)).read_text())
    models = {role: checkpoints[role] for role in ("student", "teacher")}
    flags = {
        "annotations": run / "annotations.jsonl",
        "eval_data": pairs,
        "reward": "conftest:vowels",
        **SHORT,
    }
    assert run_script("rm_distiller", **models, **flags, output_dir=run, overwrite=True) == 2
    assert (
        "--annotations" in capsys.readouterr().err
        and len((run / "annotations.jsonl").read_text()) == kept
    )


def test_columns_of_the_data_that_json_does_not_know_do_no_harm(tmp_path):
    import pyarrow
    from pyarrow.parquet import write_table

    rows = [
        json.loads(line) | {"written": datetime.datetime(2026, 1, 2)}
        for line in few(tmp_path, 12).read_text().splitlines()
    ]
    write_table(pyarrow.Table.from_pylist(rows), tmp_path / "train.parquet")
    flags = {"data": tmp_path / "train.parquet", **SHORT}
    assert run_script("rm_distiller", **flags, output_dir=tmp_path / "run") == 0
    assert "2026-01-02" in read_jsonl(tmp_path / "run" / "annotations.jsonl")[0]["written"]


def test_when_nothing_can_be_read_the_table_says_why(pairs, feed, capsys):
    rows = [{"id": row["id"], "prompt": row["prompt"]} for row in read_rows(str(pairs), "train")]
    files = {"teacher": [row | {"teacher": said("x")} for row in rows]}
    files["score_chosen"] = [row | {"score_chosen": 0} for row in rows]
    _, code = feed(files)
    captured = capsys.readouterr()
    assert code == 2 and "no row left" in captured.err and table_of(captured.out)["unreadable"] == 8


@pytest.mark.parametrize("teacher", ["text", None])
def test_a_stage_without_what_later_ones_need_is_one_line(teacher, pairs, feed, capsys):
    rows = [{"id": row["id"], "prompt": row["prompt"]} for row in read_rows(str(pairs), "train")]
    files = {"teacher": [row | {"teacher": teacher or said("x")} for row in rows]}
    files |= {
        f"score_{name}": [row | {f"score_{name}": s} for row in rows]
        for name, s in (("chosen", 7), ("rejected", 3))
    }
    if not teacher:
        files["refined"] = [row | {"refined": "x y"} for row in rows]
    _, code = feed(files)
    err = capsys.readouterr().err
    assert (
        code == 2
        and ("refined.jsonl" if teacher else "score_refined.jsonl") in err
        and "Traceback" not in err
    )


def test_a_teacher_with_another_tokenizer_needs_the_kl_to_be_off(
    checkpoints, pairs, tmp_path, capsys
):
    tokenizer = make_tokenizer(vocab_size=330, text="Answer A is better than Answer B. " * 50)
    other = save(tmp_path / "other", tokenizer, make_model(len(tokenizer), seed=7))
    flags = {
        "student": checkpoints["student"],
        "teacher": other,
        "annotations": annotations(tmp_path, pairs),
    }
    flags |= {"eval_data": pairs, "reward": "conftest:vowels", **SHORT, "max_response_tokens": 60}
    assert run_script("rm_distiller", **flags, output_dir=tmp_path / "run") == 2
    assert "--kl_coef 0 --nll_coef 1" in capsys.readouterr().err
    assert (
        run_script("rm_distiller", **flags, kl_coef=0, nll_coef=1, output_dir=tmp_path / "run") == 0
    )
    assert read_jsonl(tmp_path / "run" / "metrics.jsonl")[-1]["losses/nll"] > 1


def test_the_thoughts_of_a_reasoning_teacher_are_left_out(tmp_path, monkeypatch):
    """A teacher that thinks aloud before every answer, here by a changed `sample`, gives the same annotations."""
    plain, sample = tmp_path / "plain", LM.sample
    flags = {"data": few(tmp_path, 12), **SHORT, "score": "text", "sample_temperature": 0}
    assert run_script("rm_distiller", **flags, output_dir=plain) == 0

    def thinking(self, *args, **how):
        thought = "<think>\nA: 1, B: 9. Edited: no\n</think>\n\n"
        several = sample(self, *args, **how)
        return [[one | {"text": thought + one["text"]} for one in some] for some in several]

    monkeypatch.setattr(LM, "sample", thinking)
    assert run_script("rm_distiller", **flags, output_dir=tmp_path / "thinking") == 0
    assert (plain / "annotations.jsonl").read_text() == (
        tmp_path / "thinking" / "annotations.jsonl"
    ).read_text()
