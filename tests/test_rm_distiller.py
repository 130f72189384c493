"""rm_distiller.py: its mathematics and a step of it against slow loops and plain forward passes,
the replies of teachers that it can read, its stages, and the reward model that it saves."""

import datetime
import json
import math
import re
import shutil
import statistics
from dataclasses import asdict, fields
from pathlib import Path

import pytest
import torch
from conftest import (
    ROOT,
    make_model,
    make_tokenizer,
    one_short,
    random_examples,
    read_jsonl,
    run_script,
    save,
    training_rows,
    write_jsonl,
)
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GraniteConfig,
    GraniteForCausalLM,
)

import rm_distiller
from common import LM, load_reward_function, read_rows
from playground.world import all_requests, assess, read_request
from rm_distiller import (
    ANSWER_A,
    ANSWER_B,
    REFINE_PROMPT,
    RESCORE_PROMPT,
    SCORE_PROMPT,
    THE_EDIT,
    Args,
    add_reward_head,
    answer_prompts,
    edit_worse_answers,
    forward_kl,
    order_by_score,
    pair_accuracy,
    pair_loss,
    read_edit,
    read_scores,
    rm_distiller_terms,
    score_as_answer_a,
    score_edits,
    without_thoughts,
)
from studies import released, rm_pairs

CPU = torch.device("cpu")


def sample(text: str, finished=True) -> dict:
    return {"text": text, "finished": finished}


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


# ------------------------------------------------------------------------------------------ prompts
def test_the_prompts_are_to_the_letter_those_that_the_playgrounds_teacher_learned():
    """If one of them changes, the playground has to be built again."""
    assert SCORE_PROMPT.format(prompt="<x>", a="<y1>", b="<y2>") == (
        "Request: <x>\nAnswer A: <y1>\nAnswer B: <y2>\n"
        "Score each answer from 1 to 10. Reply as A: score, B: score"
    )
    assert REFINE_PROMPT.format(prompt="<x>", better="<y_T>", worse="<y_l>") == (
        "Request: <x>\nBetter answer: <y_T>\nWorse answer: <y_l>\n"
        "Explain why the second answer is worse, "
        "then edit it as little as possible to make it good.\n"
        "Reply as Why: reason Edited: answer"
    )
    assert RESCORE_PROMPT.format(score=6.51) == (
        "The worse answer was scored 7 out of 10. Score the edited answer on the same scale.\n"
        "Reply with the score."
    )


# -------------------------------------------------------------------------------------- mathematics
def draw(*shape, seed=0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def test_the_examples_of_the_docstrings():
    better = torch.tensor([1.2])
    worse = torch.tensor([0.3])
    assert pair_loss(better, worse, torch.tensor([0.5])).item() == pytest.approx(0.16)
    assert pair_loss(better, worse).item() == pytest.approx(0.341, abs=1e-3)
    teacher = torch.tensor([[0.75, 0.25]]).log()
    student = torch.tensor([[0.5, 0.5]]).log()
    assert forward_kl(teacher, student).item() == pytest.approx(0.131, abs=1e-3)
    assert read_scores("**A:** 8, **B:** 6/10", [ANSWER_A, ANSWER_B]) == [8.0, 6.0]
    assert read_scores("A: 8-9, B: 6", [ANSWER_A, ANSWER_B]) == [0.0, 0.0]
    assert without_thoughts("<think>Hm. A: 1?</think> A: 8, B: 6") == "A: 8, B: 6"


def test_the_margin_loss_equals_a_slow_loop():
    better, worse, margins = draw(3, 7)
    slow = []
    for i in range(7):
        slow.append((better[i].item() - worse[i].item() - margins[i].item()) ** 2)
    assert pair_loss(better, worse, margins).tolist() == pytest.approx(slow)
    exact = pair_loss(better, better - margins, margins)
    assert exact.tolist() == pytest.approx([0] * 7, abs=1e-28)


def test_without_margins_it_is_bradley_terry():
    better, worse = draw(2, 7)
    slow = []
    for i in range(7):
        slow.append(-math.log(1 / (1 + math.exp(worse[i].item() - better[i].item()))))
    assert pair_loss(better, worse).tolist() == pytest.approx(slow)


def test_the_released_table_pulls_every_pair_to_the_mean_margin():
    better, worse, margins = draw(3, 5)
    squares = []
    for i in range(5):
        for k in range(5):
            squares.append((better[i] - worse[i] - margins[k]).item() ** 2)
    table = released.margin_loss_over_a_table(better, worse, margins).mean().item()
    assert table == pytest.approx(statistics.mean(squares))
    # The variance of the margins cannot be learned. The rest pulls to their mean.
    spread = margins.var(correction=0).item()
    to_mean = pair_loss(better, worse, margins.mean().expand(5)).mean().item()
    assert table == pytest.approx(to_mean + spread)
    assert abs(table - pair_loss(better, worse, margins).mean().item()) > 0.1
    # If all margins are equal, it is the same loss.
    equal = torch.full((5,), 1.5, dtype=torch.float64)
    table = released.margin_loss_over_a_table(better, worse, equal).mean().item()
    assert table == pytest.approx(pair_loss(better, worse, equal).mean().item())


@pytest.mark.parametrize(
    "shapes", [((4,), (4,), (4, 1)), ((4, 1), (4, 1), (4,)), ((4,), (4,), (1,)), ((4,), (1,), None)]
)
def test_shapes_that_would_broadcast_are_refused(shapes):
    better, worse, margins = [None if shape is None else torch.zeros(shape) for shape in shapes]
    with pytest.raises(ValueError, match="one shape"):
        pair_loss(better, worse, margins)


def test_the_forward_kl_equals_a_slow_loop_and_takes_excluded_tokens():
    teacher, student = draw(2, 4, 9).log_softmax(-1)
    teacher[0, 2] = -math.inf
    # Where both exclude a token, the difference of their log-probs is NaN.
    teacher[1, 3] = -math.inf
    student[1, 3] = -math.inf
    slow = []
    for t in range(4):
        total = 0.0
        for a in range(9):
            p = teacher[t, a].exp().item()
            if p > 0:
                total += p * (teacher[t, a] - student[t, a]).item()
        slow.append(total)
    assert forward_kl(teacher, student).tolist() == pytest.approx(slow)


# --------------------------------------------------------------- r45: what teachers really reply
# A reply, and its scores of A and B. They are 0 where nothing certain was said.
PAIRS = {
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
    score_a, score_b = PAIRS[text]
    assert read_scores(text, [ANSWER_A, ANSWER_B]) == [score_a, score_b]
    # Without names it is their order that tells.
    has_names = any(letter.isalpha() for letter in text.replace("and", ""))
    if has_names:
        assert read_scores(text, [ANSWER_B, ANSWER_A]) == [score_b, score_a]


SINGLE = {
    "8": 8,
    "8.": 8,
    " 10 ": 10,
    "8/10": 8,
    "8.5": 8.5,
    "**9**": 9,
    "Score: 7": 7,
    "score: 7/10": 7,
    "Rating: 7": 7,
    "The score is 7.": 7,
    "I would score it 7 out of 10": 7,
    "": 0,
    "good": 0,
    "0": 0,
    "11": 0,
    "7 or 8": 0,
    "7-8": 0,
    "-7": 0,
    "70%": 0,
    "Score: 7. Score: 8": 0,
    "It names 3 fish.": 0,
}


@pytest.mark.parametrize("text", SINGLE)
def test_r45_one_score_is_read_right_or_not_at_all(text):
    assert read_scores(text, [THE_EDIT]) == [SINGLE[text]]


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
    assert read_edit(sample(text)) == EDITS[text]
    # A reply that was cut off holds half an edit.
    assert read_edit(sample(text, finished=False)) == ""


# ------------------------------------------------------------ a step against plain forward passes
def annotations(tmp_path, pairs) -> Path:
    """What another program might have written about the eight pairs: text, and scores."""
    rows = []
    for i, row in enumerate(read_jsonl(pairs)):
        row["refined"] = f"{row['chosen']} indeed"
        row["teacher"] = f"a thing of {i} words"
        row["score_chosen"] = 6.0 + i / 4
        row["score_rejected"] = 2.0 + i / 8
        row["score_refined"] = 9.5 - i / 4
        rows.append(row)
    return write_jsonl(tmp_path / "annotations.jsonl", rows)


STEP = {"max_response_tokens": 60}
FLAGS = {
    "the full method": {"kl_coef": 0.7, "nll_coef": 0.4, "margin_scale": 0.5},
    "no generation terms": {"kl_coef": 0.0},
    "only the likelihood": {"kl_coef": 0.0, "nll_coef": 1.0},
    "Bradley-Terry on the edits": {"no-margin": True, "kl_coef": 0.0},
    "plain pairs": {"no-refine": True, "margin_scale": 1.0},
    "Bradley-Terry on plain pairs": {"no-refine": True, "no-margin": True, "kl_coef": 0.0},
}


def seeded_head(width: int, seed=1) -> torch.Tensor:
    """[width]: the weights that the reward head begins with."""
    torch.manual_seed(seed)
    return torch.nn.Linear(width, 1, bias=False).weight.detach()[0]


def plain_reward(model, head: torch.Tensor, prompt, response) -> torch.Tensor:
    """r(x, y) from one plain forward pass."""
    output = model(torch.tensor([prompt + response]), output_hidden_states=True)
    return (output.hidden_states[-1][0, -1] * head).sum()


def plain_log_probs(model, prompt, response, vocab_size: int) -> torch.Tensor:
    """[|response|, V] with a gradient, from one plain forward pass."""
    logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1, :vocab_size]
    return logits.log_softmax(-1)


def slow_step(paths: dict, path: Path, flags: dict):
    """({term: value}, gradient) over all pairs, in float64. It takes one plain forward pass after
    the other."""
    lm = LM(paths["student"], CPU)
    model = AutoModelForCausalLM.from_pretrained(paths["student"], dtype=torch.float64)
    teacher = AutoModelForCausalLM.from_pretrained(paths["teacher"], dtype=torch.float64)
    head = seeded_head(model.config.hidden_size).double().requires_grad_()
    better = "chosen" if flags.get("no-refine") else "refined"
    rows = read_rows(str(path), "train", (better, "rejected"))
    terms = {"pair": 0.0, "kl": 0.0, "nll": 0.0}
    for row in rows:
        columns = [better, "rejected", "teacher"]
        prompt, responses = lm.encode(row["prompt"], [row[column] for column in columns])
        difference = plain_reward(model, head, prompt, responses[0])
        difference = difference - plain_reward(model, head, prompt, responses[1])
        points = row[f"score_{better}"] - row["score_rejected"]
        if flags.get("no-margin"):
            pair = -torch.log(torch.sigmoid(difference))
        else:
            pair = (difference - flags.get("margin_scale", 0.3) * points) ** 2
        terms["pair"] += pair / len(rows)

        answer = responses[2]
        log_probs = plain_log_probs(model, prompt, answer, lm.vocab_size)
        teacher_log_probs = plain_log_probs(teacher, prompt, answer, lm.vocab_size).detach()
        for t, token in enumerate(answer):
            kl = (teacher_log_probs[t].exp() * (teacher_log_probs[t] - log_probs[t])).sum()
            terms["kl"] += kl / len(answer) / len(rows)
            terms["nll"] -= log_probs[t, token] / len(answer) / len(rows)
    kl_coef = flags.get("kl_coef", 0.1)
    nll_coef = flags.get("nll_coef", 0.0)
    total = terms["pair"] + kl_coef * terms["kl"] + nll_coef * terms["nll"]
    gradient = torch.autograd.grad(total, [*model.parameters(), head])
    values = {name: term.item() for name, term in terms.items()}
    return {"total": total.item(), **values}, gradient


@pytest.mark.parametrize("name", FLAGS)
def test_r04_r44_a_step_equals_a_slow_loop_over_plain_forward_passes(
    name, checkpoints, pairs, run_tiny, tmp_path
):
    flags = FLAGS[name]
    path = annotations(tmp_path, pairs)
    run = run_tiny("rm_distiller", annotations=path, **STEP, **flags)
    expected, gradient = slow_step(checkpoints, path, flags)
    [metrics] = training_rows(run)
    terms = {"total", "pair"}
    if flags.get("kl_coef", 0.1) > 0:
        terms |= {"kl", "nll"}
    if flags.get("nll_coef", 0.0) > 0:
        terms.add("nll")
    assert {key for key in metrics if key.startswith("losses/")} == {f"losses/{t}" for t in terms}
    for term in terms:
        value = metrics[f"losses/{term}"]
        assert value == pytest.approx(expected[term], rel=1e-3, abs=1e-6), term

    state = torch.load(run / "checkpoint.pt", weights_only=True)["optimizer"]["state"]
    for i, slow in enumerate(gradient):
        if i in state:
            # AdamW's first moment is (1 − 0.9) times the gradient.
            measured = state[i]["exp_avg"].double().view_as(slow) / 0.1
            torch.testing.assert_close(measured, slow, rtol=5e-3, atol=1e-5)
        else:
            # It is the language model's head, when nothing is asked of it.
            assert not slow.any()


@pytest.mark.parametrize("name", FLAGS)
def test_the_teachers_answer_is_no_part_of_the_row_if_nothing_needs_it(
    name, checkpoints, pairs, run_tiny, tmp_path
):
    flags = FLAGS[name]
    path = annotations(tmp_path, pairs)
    run = run_tiny("rm_distiller", annotations=path, **STEP, **flags)
    better = "chosen" if flags.get("no-refine") else "refined"
    columns = [better, "rejected"]
    if flags.get("kl_coef", 0.1) + flags.get("nll_coef", 0.0) > 0:
        columns.append("teacher")
    lm = LM(checkpoints["student"], CPU)
    tokens = 0
    for row in read_rows(str(path), "train", (better, "rejected")):
        _, responses = lm.encode(row["prompt"], [row[column] for column in columns])
        tokens += sum(len(response) for response in responses)
    [metrics] = training_rows(run)
    assert metrics["charts/tokens"] == tokens


def test_of_every_pair_only_its_own_margin_counts(checkpoints, pairs, run_tiny, tmp_path):
    """Changing one margin changes the loss by what that pair's term changes: nothing is spread over
    the batch."""
    path = annotations(tmp_path, pairs)
    losses = []
    for more in (0.0, 1.0):
        rows = read_jsonl(path)
        rows[3]["score_refined"] += more
        changed = write_jsonl(tmp_path / f"changed{more}.jsonl", rows)
        run = run_tiny("rm_distiller", annotations=changed, **STEP, kl_coef=0, margin_scale=1)
        losses.append(training_rows(run)[0]["losses/pair"])

    lm = LM(checkpoints["student"], CPU)
    head = seeded_head(32)
    row = read_rows(str(path), "train", ("refined", "rejected"))[3]
    prompt, [refined, rejected] = lm.encode(row["prompt"], [row["refined"], row["rejected"]])
    with torch.no_grad():
        difference = plain_reward(lm.model, head, prompt, refined)
        difference -= plain_reward(lm.model, head, prompt, rejected)
    distance = difference.item() - (row["score_refined"] - row["score_rejected"])
    expected = ((distance - 1) ** 2 - distance**2) / 8
    assert losses[1] - losses[0] == pytest.approx(expected, rel=1e-3)


def test_the_terms_are_those_of_each_example_alone(load):
    """[B] for every term, of whatever batch. Without a KL there is no teacher."""
    student = load("student", trainable=True)
    add_reward_head(student, seed=1)
    teacher = load("teacher")
    shapes = [(4, [3, 5, 2]), (6, [1, 4, 7]), (2, [5, 2, 3])]
    examples = random_examples(student.vocab_size, shapes)
    for points, example in enumerate(examples, 2):
        example.row["margin"] = float(points)
    for kl_coef, names in ((1.0, ["pair", "kl", "nll"]), (0.0, ["pair", "nll"])):
        args = Args(kl_coef=kl_coef, nll_coef=1.0, logits_chunk=5)
        asked = teacher if kl_coef else None
        terms = rm_distiller_terms(examples, student, asked, student.vocab_size, args)
        assert list(terms) == names
        for i, example in enumerate(examples):
            alone = rm_distiller_terms([example], student, asked, student.vocab_size, args)
            for name in names:
                assert terms[name].shape == (3,)
                assert terms[name][i].item() == pytest.approx(alone[name].item(), rel=1e-4)


# ------------------------------------------------------------------------- the saved reward model
def train_from_annotations(checkpoints, pairs, tmp_path, tokenizer=None, **flags) -> Path:
    """The folder of a short run from annotations, of a student with this tokenizer."""
    models = {role: checkpoints[role] for role in ("student", "teacher")}
    if tokenizer is not None:
        for role in models:
            model = make_model(len(tokenizer), seed=3)
            models[role] = save(tmp_path / role, tokenizer, model)
    defaults = {
        "annotations": annotations(tmp_path, pairs),
        "eval_data": pairs,
        "max_steps": 3,
        "batch_size": 4,
        "max_response_tokens": 60,
        "learning_rate": 1e-2,
        "output_dir": tmp_path / "run",
    }
    assert run_script("rm_distiller", **{**models, **defaults, **flags}) == 0
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
    run = train_from_annotations(checkpoints, pairs, tmp_path, tokenizer)
    state = torch.load(run / "checkpoint.pt", weights_only=True)["model"]
    head = state.pop("score.weight")[0]
    assert head.dtype == torch.float32
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    trained.load_state_dict(state)
    lm = LM(tmp_path / "student", CPU)
    prompts = []
    responses = []
    ids = []
    expected = []
    for row in read_rows(str(pairs), "train"):
        for column in ("chosen", "rejected"):
            prompt_ids, [response_ids] = lm.encode(row["prompt"], [row[column]])
            prompts.append(row["prompt"])
            responses.append(row[column])
            ids.append(prompt_ids + response_ids)
            with torch.no_grad():
                expected.append(plain_reward(trained, head, prompt_ids, response_ids).item())
    assert len({round(value, 4) for value in expected}) > 10

    # The scores are those of transformers, for a padded batch as libraries make it, and one by one.
    model = AutoModelForSequenceClassification.from_pretrained(run / "model")
    reloaded = AutoTokenizer.from_pretrained(run / "model")
    assert model.config.num_labels == 1
    assert model.config.pad_token_id == reloaded.pad_token_id is not None
    batch = reloaded.pad({"input_ids": ids}, return_tensors="pt", padding_side="right")
    with torch.no_grad():
        together = model(**batch).logits[:, 0].tolist()
        alone = [model(torch.tensor([row])).logits[0, 0].item() for row in ids]
    assert together == pytest.approx(expected, abs=1e-5)
    assert alone == pytest.approx(expected, abs=1e-5)

    # They are those of `--reward runs/<run>/model` of the other scripts.
    for batch_size in (1, 3, 32):
        reward_fn = load_reward_function(str(run / "model"), CPU, batch_size=batch_size)
        judged = [{"prompt": prompt} for prompt in prompts]
        assert reward_fn(judged, responses) == pytest.approx(expected, abs=1e-5)

    # The backbone has kept the head of the language model.
    language_model = AutoModelForCausalLM.from_pretrained(run / "model")
    generated = language_model.generate(torch.tensor([ids[0]]), max_new_tokens=2)
    assert generated.shape[1] > len(ids[0])


def test_the_pages_lines_for_loading_it_give_the_same_score(checkpoints, pairs, tmp_path):
    run = train_from_annotations(checkpoints, pairs, tmp_path)
    page = (ROOT / "docs" / "rm_distiller.md").read_text()
    code = "".join(re.findall(r"```python\n(.*?)```", page, re.S))
    scope = {}
    exec(code.replace("runs/rm/model", str(run / "model")), scope)
    prompt, response = [turn["content"] for turn in scope["chat"]]
    reward_fn = load_reward_function(str(run / "model"), CPU)
    [expected] = reward_fn([{"prompt": [user(prompt)]}], [response])
    assert scope["reward"] == pytest.approx(expected, abs=1e-5)
    assert scope["score"] == pytest.approx(expected, abs=1e-5)


def test_r44_the_head_is_seeded(checkpoints, pairs, tmp_path):
    heads = []
    for folder, seed in (("one", 1), ("again", 1), ("other", 2)):
        (tmp_path / folder).mkdir()
        run = train_from_annotations(
            checkpoints, pairs, tmp_path / folder, seed=seed, learning_rate=0
        )
        heads.append(torch.load(run / "checkpoint.pt", weights_only=True)["model"]["score.weight"])
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
    # It depends on nothing but the seed.
    assert torch.equal(heads[0][0], seeded_head(32, seed=1))


def test_a_language_model_without_a_head_is_no_judge(checkpoints, capsys):
    with pytest.raises(SystemExit):
        load_reward_function(checkpoints["student"], CPU)
    assert "score.weight" in capsys.readouterr().err


def test_a_reward_model_judges_the_other_scripts(checkpoints, pairs, run_tiny, tmp_path):
    model = train_from_annotations(checkpoints, pairs, tmp_path) / "model"
    run = run_tiny("adpa", reward=model, teacher_ref="none")
    rows = read_jsonl(run / "eval_before.jsonl")
    reward_fn = load_reward_function(str(model), CPU)
    expected = reward_fn(rows, rows)
    assert [row["reward"] for row in rows] == pytest.approx(expected, abs=1e-5)


def test_a_run_that_was_killed_behind_its_last_step_still_has_its_results(
    checkpoints, pairs, tmp_path
):
    run = train_from_annotations(checkpoints, pairs, tmp_path)
    summary = json.loads((run / "summary.json").read_text())
    metrics = (run / "metrics.jsonl").read_bytes()
    weights = (run / "model" / "model.safetensors").read_bytes()
    (run / "summary.json").unlink()
    (run / "model" / "model.safetensors").unlink()
    assert run_script("rm_distiller", resume=run) == 0
    again = json.loads((run / "summary.json").read_text())
    for name in ("accuracy_before", "accuracy_after", "accuracy"):
        assert again[name] == summary[name], name
    assert (run / "metrics.jsonl").read_bytes() == metrics
    assert (run / "model" / "model.safetensors").read_bytes() == weights


# --------------------------------------------------------------------------------------- evaluation
SUBSETS = ["one", "two", None, "one", "", "two", "two", "one", "one"]


@pytest.fixture
def evaluated(checkpoints, pairs, tmp_path, capsys):
    """(rows with subsets, run folder, summary, what was printed) of a run. Columns of the data
    that happen to be called as something of ours change nothing."""
    rows = read_jsonl(pairs)
    rows.append(dict(rows[0]))
    for row, subset in zip(rows, SUBSETS, strict=True):
        row |= {"source": subset, "worth": [5, 7], "pool": "x", "score_chosen": 1}
    file = write_jsonl(tmp_path / "subsets.jsonl", rows)
    run = train_from_annotations(checkpoints, pairs, tmp_path, eval_data=file)
    summary = json.loads((run / "summary.json").read_text())
    return read_rows(str(file), "train"), run, summary, capsys.readouterr().out


def test_accuracy_by_subset_equals_a_slow_count(evaluated):
    rows, run, summary, out = evaluated
    reward_fn = load_reward_function(str(run / "model"), CPU)
    correct = {"one": [], "two": [], "all": []}
    for row in rows:
        chosen, rejected = reward_fn([row] * 2, [row["chosen"], row["rejected"]])
        for subset in {row["source"] or "all", "all"}:
            correct[subset].append(chosen > rejected)
    assert summary["accuracy"].keys() == correct.keys()
    for subset, values in correct.items():
        share, error, count = summary["accuracy"][subset]
        assert share == pytest.approx(statistics.mean(values))
        assert count == len(values)
        assert error == pytest.approx((share * (1 - share) / count) ** 0.5)
        assert re.search(rf"^{subset} +{count} .* {share:.3f} ± {error:.3f}$", out, re.M)
    assert summary["accuracy_after"] == summary["accuracy"]["all"][0]
    [*_, last] = training_rows(run)
    assert last["eval/accuracy"] == summary["accuracy_after"]


def test_equal_rewards_share_a_pair(load):
    """A head of zeros gives every response the reward 0."""
    student = load("student")
    add_reward_head(student, seed=1)
    torch.nn.init.zeros_(student.model.score.weight)
    examples = random_examples(student.vocab_size, [(4, [3, 3]), (5, [2, 4]), (3, [1, 2])])
    examples[0].row["subset"] = "one"
    correct = pair_accuracy(examples, student, micro_batch_size=2)
    assert correct == {"all": [0.5, 0.5, 0.5], "one": [0.5]}


def test_the_playgrounds_pairs_are_what_they_are_said_to_be():
    rows = read_jsonl(ROOT / Args().eval_data)
    gaps = {"easy": [], "hard": [], "shifted": []}
    rewards = {"easy": [], "hard": [], "shifted": []}
    for row in rows:
        request = read_request(row["prompt"])
        chosen = assess(request, row["chosen"]).reward
        rejected = assess(request, row["rejected"]).reward
        gaps[row["subset"]].append(chosen - rejected)
        rewards[row["subset"]] += [chosen, rejected]
    # Nothing was trained on these requests.
    _, held_out = all_requests()
    assert {row["prompt"] for row in rows} == {request.text for request in held_out}
    assert [len(values) for values in gaps.values()] == [256, 256, 256]
    assert min(gaps["easy"]) > rm_pairs.EASY - 1e-6
    assert min(gaps["hard"]) > 0
    assert max(gaps["hard"]) < rm_pairs.HARD + 1e-6
    assert min(gaps["shifted"]) > 0
    # The teacher's answers are better than the writers'.
    means = {name: statistics.mean(values) for name, values in rewards.items()}
    assert means["shifted"] > max(means["easy"], means["hard"])


# ---------------------------------------------------------------------- the stages of annotation
SHORT = {"max_steps": 2, "batch_size": 8}
SHORT["max_response_tokens"] = 40


def few(tmp_path, count=24) -> Path:
    """The first rows of the playground's training data."""
    lines = (ROOT / "playground/data/train.jsonl").read_text().splitlines(keepends=True)
    path = tmp_path / "train.jsonl"
    path.write_text("".join(lines[:count]))
    return path


def plain_score(lm: LM, chat: list[dict], form: str) -> float:
    """Σ_s s p(s) by one plain forward pass for each of the ten replies."""
    reply_logps = []
    for score in range(1, 11):
        response = sample(form.format(score), finished=form == "{}")
        prompt, [reply] = lm.encode(chat, [response])
        with torch.no_grad():
            log_probs = plain_log_probs(lm.model, prompt, reply, lm.vocab_size).double()
        reply_logps.append(log_probs[range(len(reply)), reply].sum())
    probs = torch.stack(reply_logps).softmax(0)
    return (probs * torch.arange(1.0, 11.0)).sum().item()


def score_chat(prompt: str, a: str, b: str) -> list[dict]:
    return [user(SCORE_PROMPT.format(prompt=prompt, a=a, b=b))]


def rescore_chat(prompt: str, row: dict) -> list[dict]:
    """What the teacher is asked behind its edit."""
    refine = REFINE_PROMPT.format(
        prompt=prompt, better=row["teacher"]["text"], worse=row["rejected"]
    )
    rescore = RESCORE_PROMPT.format(score=round(row["score_rejected"]))
    return [user(refine), assistant(row["refined_reply"]), user(rescore)]


# The tests of this run share it in one process.
shares_the_annotated_run = pytest.mark.xdist_group("annotated run")


@pytest.fixture(scope="session")
def annotated_run(tmp_path_factory) -> tuple[Path, Path]:
    """(its data, its folder): a short run whose teacher has scored and edited 24 rows."""
    folder = tmp_path_factory.mktemp("annotated")
    data = few(folder)
    assert run_script("rm_distiller", data=data, **SHORT, output_dir=folder / "run") == 0
    return data, folder / "run"


@shares_the_annotated_run
def test_expected_scores_equal_plain_forward_passes_of_the_teacher(annotated_run):
    _, run = annotated_run
    lm = LM("playground/teacher", CPU)
    rows = read_jsonl(run / "annotations.jsonl")
    assert len(rows) > 12
    for row in rows[:6]:
        prompt = row["prompt"][-1]["content"]
        expected = plain_score(lm, score_chat(prompt, row["chosen"], row["rejected"]), "A: {},")
        assert row["score_chosen"] == pytest.approx(expected, abs=1e-3)
        expected = plain_score(lm, score_chat(prompt, row["rejected"], row["chosen"]), "A: {},")
        assert row["score_rejected"] == pytest.approx(expected, abs=1e-3)
        expected = plain_score(lm, rescore_chat(prompt, row), "{}")
        assert row["score_refined"] == pytest.approx(expected, abs=1e-3)
        assert row["refined"] == row["refined_reply"].partition("Edited:")[2].strip()
        assert row["score_chosen"] > row["score_rejected"]
        assert row["refined"] != row["rejected"]


def test_scores_from_text_are_numbers_the_teacher_wrote(tmp_path, capsys):
    data = few(tmp_path)
    run = tmp_path / "run"
    assert run_script("rm_distiller", data=data, **SHORT, score="text", output_dir=run) == 0
    counts = table_of(capsys.readouterr().out)
    rows = read_jsonl(run / "annotations.jsonl")
    assert len(rows) > 6
    columns = ("score_chosen", "score_rejected", "score_refined")
    for row in rows:
        assert all(row[column] in range(1, 11) for column in columns)
        # Every score has the reply that it was read in, also where the teacher's order is not the
        # data's.
        for column in columns:
            names = [THE_EDIT] if column == "score_refined" else [ANSWER_A, ANSWER_B]
            assert read_scores(row[f"{column}_reply"], names)[0] == row[column]

    # They are greedy, whatever the temperature of answers and edits.
    lm = LM("playground/teacher", CPU)
    data_of = {row["id"]: row for row in read_rows(str(data), "train")}
    for row in read_jsonl(run / "score_chosen.jsonl")[:8]:
        pair = data_of[row["id"]]
        chat = score_chat(row["prompt"][-1]["content"], pair["chosen"], pair["rejected"])
        prompts = [lm.prompt_ids(chat)]
        [[greedy]] = lm.sample(prompts, temperature=0, max_new_tokens=40, batch_size=1, seed=0)
        assert row["score_chosen_reply"] == greedy["text"]

    names_of = {"score_refined": [THE_EDIT]}
    for column in columns:
        names = names_of.get(column, [ANSWER_A, ANSWER_B])
        for row in read_jsonl(run / f"{column}.jsonl"):
            assert row[column] == read_scores(row[f"{column}_reply"], names)[0]
    # Whole numbers tie. Expected scores do not.
    assert counts["dropped: both answers have the same score"] >= 1
    assert counts.pop("annotated") == 24
    assert sum(counts.values()) == 24


@shares_the_annotated_run
def test_r79_columns_of_the_data_that_have_the_names_of_ours_change_nothing(
    annotated_run, tmp_path
):
    """UltraFeedback, for one, has score_chosen and score_rejected."""
    data, plain_run = annotated_run
    own = {"score_chosen": 9.5, "teacher": "x", "refined": "y", "reply": "z", "margin": 5}
    labelled = write_jsonl(tmp_path / "own.jsonl", [{**row, **own} for row in read_jsonl(data)])
    labelled_run = tmp_path / "labelled"

    assert run_script("rm_distiller", data=labelled, **SHORT, output_dir=labelled_run) == 0

    plain = read_jsonl(plain_run / "annotations.jsonl")
    with_own = read_jsonl(labelled_run / "annotations.jsonl")
    assert len(plain) == len(with_own) > 0
    for row, own_row in zip(plain, with_own):
        assert own_row.pop("reply") == "z"
        assert own_row.pop("margin") == 5  # the margin of the loss is not in this file
        assert own_row == row
    assert saved_weights(labelled_run) == saved_weights(plain_run)


def saved_weights(run: Path) -> bytes:
    return (run / "model/model.safetensors").read_bytes()


@shares_the_annotated_run
def test_r79_other_columns_of_a_stage_file_change_nothing(annotated_run, tmp_path):
    """A file of another program may have all columns of a row."""
    _, plain_run = annotated_run
    run = tmp_path / "again"
    shutil.copytree(plain_run, run)
    stage = run / "score_refined.jsonl"
    write_jsonl(stage, [{**row, "chosen": "x", "refined": "y"} for row in read_jsonl(stage)])
    for name in ("summary.json", "checkpoint.pt", "metrics.jsonl", "annotations.jsonl"):
        (run / name).unlink()

    assert run_script("rm_distiller", resume=run) == 0

    assert read_jsonl(run / "annotations.jsonl") == read_jsonl(plain_run / "annotations.jsonl")
    assert saved_weights(run) == saved_weights(plain_run)


@pytest.fixture(scope="session")
def playground_teacher() -> LM:
    return LM("playground/teacher", CPU)


def test_every_stage_can_be_called_alone(playground_teacher, tmp_path):
    teacher = playground_teacher
    args = Args(max_response_tokens=40)
    rows = read_rows(str(few(tmp_path, 3)), "train")
    annotated = []
    for answered in answer_prompts(rows, 1, teacher, args):
        assert answered["teacher"]["finished"]
        assert answered["teacher_reply"] == answered["teacher"]["text"] != ""
        annotated.append(answered)
    rows = [{**row, **answered} for row, answered in zip(rows, annotated)]

    chosen = score_as_answer_a(rows, "chosen", "rejected", teacher, args)
    rejected = score_as_answer_a(rows, "rejected", "chosen", teacher, args)
    rows = [{**row, **one, **other} for row, one, other in zip(rows, chosen, rejected)]
    for row in rows:
        expected = score_chat(row["prompt"][0]["content"], row["rejected"], row["chosen"])
        expected = plain_score(teacher, expected, "A: {},")
        assert row["score_rejected"] == pytest.approx(expected, abs=1e-3)
        assert 1 < row["score_chosen"] < 10

    edits = edit_worse_answers(rows, 1, teacher, args)
    rows = [{**row, **edit} for row, edit in zip(rows, edits)]
    for row, scored in zip(rows, score_edits(rows, teacher, args), strict=True):
        assert row["refined"] == row["refined_reply"].partition("Edited:")[2].strip()
        expected = plain_score(teacher, rescore_chat(row["prompt"][0]["content"], row), "{}")
        assert scored == {"score_refined": pytest.approx(expected, abs=1e-3)}


@pytest.mark.parametrize("score", ["expected", "text"])
@pytest.mark.parametrize("score_criteria", [False, True])
def test_the_teacher_reads_what_a_score_depends_on_if_it_should(monkeypatch, score, score_criteria):
    asked = []

    def remember(chats, *_, **__) -> list[float]:
        asked.extend(chats)
        return [5.0] * len(chats)

    def remember_and_reply(chats, *_) -> list[str]:
        asked.extend(chats)
        return ["A: 5, B: 5"] * len(chats)

    monkeypatch.setattr(rm_distiller, "expected_scores", remember)
    monkeypatch.setattr(rm_distiller, "score_replies", remember_and_reply)
    row = {
        "prompt": [user("Name a bird.")],
        "chosen": "owl",
        "rejected": "fish",
        "teacher": sample("wren"),
        "score_rejected": 2.0,
        "refined_reply": "Why: a fish Edited: owl",
    }
    args = Args(score=score, score_criteria=score_criteria)
    assert score_as_answer_a([row], "chosen", "rejected", None, args)[0]["score_chosen"] == 5
    assert "score_refined" in score_edits([row], None, args)[0]
    [[pair], [refine, _, edit]] = asked
    questions = (
        SCORE_PROMPT.format(prompt="Name a bird.", a="owl", b="fish"),
        RESCORE_PROMPT.format(score=2),
    )
    criteria = ["helpful", "relevant", "accurate", "detail"] if score_criteria else []
    for turn, question in zip((pair, edit), questions):
        told = turn["content"].removesuffix(question)
        assert len(told) + len(question) == len(turn["content"])
        words = [word for word in ("helpful", "relevant", "accurate", "detail") if word in told]
        assert words == criteria
    assert refine["content"].startswith("Request: Name a bird.\nBetter answer: wren")


def test_texts_with_braces_are_put_into_the_prompts_as_they_are(monkeypatch):
    asked = []

    def remember(chats, reply, teacher, **keywords) -> list[float]:
        asked.extend(chats)
        return [5.0] * len(chats)

    monkeypatch.setattr(rm_distiller, "expected_scores", remember)
    row = {
        "prompt": [user("{prompt} {0}"), assistant("{"), user("f'{x:>3}'")],
        "chosen": "{b}",
        "rejected": "}{",
        "teacher": sample("{worse} %s"),
        "score_rejected": 2.0,
        "refined_reply": "{score}",
    }
    args = Args()
    assert score_as_answer_a([row], "chosen", "rejected", None, args) == [{"score_chosen": 5.0}]
    assert score_edits([row], None, args) == [{"score_refined": 5.0}]
    [[score], [refine, reply, _]] = asked
    request = "Request: {prompt} {0}\n{\nf'{x:>3}'\n"
    assert score["content"].startswith(request + "Answer A: {b}\nAnswer B: }{\nScore each")
    answers = "Better answer: {worse} %s\nWorse answer: }{\nExplain"
    assert refine["content"].startswith(request + answers)
    assert reply == assistant("{score}")


def test_the_order_of_a_pair_is_the_teachers():
    row = {"id": "1", "chosen": "x", "rejected": "y", "score_chosen": 2.0, "score_rejected": 6.0}
    turned = {"chosen": "y", "rejected": "x", "score_chosen": 6.0, "score_rejected": 2.0}
    assert order_by_score(row) == {"id": "1", **turned}
    assert order_by_score(turned) == turned


def table_of(out: str) -> dict[str, int]:
    """What the run printed of the rows that it dropped and kept."""
    counts = {}
    for line in out.splitlines():
        if line[:8].strip().isdigit():
            count, name = line.split(None, 1)
            counts[name] = int(count)
    return counts


@pytest.fixture
def rows_of_pairs(pairs) -> list[dict]:
    """The id and the prompt of the eight pairs, as files of stages begin."""
    return [{"id": row["id"], "prompt": row["prompt"]} for row in read_rows(str(pairs), "train")]


def with_column(rows: list[dict], **columns) -> list[dict]:
    """Rows with more columns, which have the same value in every row."""
    return [{**row, **columns} for row in rows]


@pytest.fixture
def feed(pairs, checkpoints, tmp_path):
    """feed({stage: rows}): a run that finds files of stages in its folder, as if it had been killed
    with them there. Returns (folder, exit code)."""

    def run(files: dict[str, list[dict]]):
        folder = tmp_path / "fed"
        folder.mkdir()
        args = Args(
            student=checkpoints["student"],
            teacher=checkpoints["teacher"],
            data=str(pairs),
            eval_data=str(pairs),
            log_every=1,
            output_dir=str(folder),
            **SHORT,
        )
        (folder / "args.json").write_text(json.dumps(asdict(args)))
        for name, rows in files.items():
            write_jsonl(folder / f"{name}.jsonl", rows)
        return folder, run_script("rm_distiller", resume=folder)

    return run


def test_what_is_dropped_is_counted_and_stages_may_come_from_elsewhere(
    pairs, rows_of_pairs, feed, capsys
):
    """Eight rows: one unreadable score, one tie, one unreadable edit, one edit that changes
    nothing, one unreadable score of an edit, one gain of exactly a point, one that the teacher
    orders the other way, and a plain one."""
    source = read_rows(str(pairs), "train")
    chosen = [0, 5, 7, 7, 7, 7, 2, 8]
    rejected = [4, 5, 3, 3, 3, 3, 6, 3]
    refined = [9, 9, 9, 9, 0, 4, 9, 9]
    edits = ["", "", "", source[3]["rejected"], "x y", "x y", "x y", "x y"]
    answer = sample("a teacher's answer")
    files = {"teacher": [], "score_chosen": [], "score_rejected": [], "refined": []}
    files["score_refined"] = []
    for i, row in enumerate(rows_of_pairs):
        files["teacher"].append({**row, "teacher": answer})
        files["score_chosen"].append({**row, "score_chosen": chosen[i]})
        if i >= 1:
            files["score_rejected"].append({**row, "score_rejected": rejected[i]})
        if i >= 2:
            edit = {"refined": edits[i], "refined_reply": f"Edited: {edits[i]}"}
            files["refined"].append({**row, **edit})
        if i >= 4:
            files["score_refined"].append({**row, "score_refined": refined[i]})
    for rows in files.values():
        rows.reverse()  # their order does not matter
    folder, code = feed(files)
    out = capsys.readouterr().out
    assert code == 0
    assert table_of(out) == {
        "annotated": 8,
        "dropped: a reply cannot be read": 3,
        "dropped: both answers have the same score": 1,
        "dropped: the edit changes nothing": 1,
        "dropped: the gain in score is too small": 1,
        "kept": 2,
    }
    kept = {row["id"]: row for row in read_jsonl(folder / "annotations.jsonl")}
    turned = kept[source[6]["id"]]
    assert turned["rejected"] == source[6]["chosen"]
    assert turned["chosen"] == source[6]["rejected"]
    assert turned["score_chosen"] == 6
    assert turned["score_rejected"] == 2
    assert turned["score_refined"] == 9
    assert f"    before  {turned['rejected']}\n    edited  {turned['refined']}\n" in out


def scores_of_a_pair(rows: list[dict], chosen: int, rejected: int) -> dict[str, list[dict]]:
    """The two files of stage 2, with the same scores in every row."""
    return {
        "score_chosen": with_column(rows, score_chosen=chosen),
        "score_rejected": with_column(rows, score_rejected=rejected),
    }


def test_the_end_of_a_reply_tells_one_from_ten(pairs, rows_of_pairs, load, feed):
    """With a tokenizer that writes 10 in two tokens, and a teacher that is not sure of the end."""
    answer = sample("a teacher's answer")
    files = {"teacher": with_column(rows_of_pairs, teacher=answer)}
    files |= scores_of_a_pair(rows_of_pairs, chosen=7, rejected=1)
    edit = {"refined": "x y", "refined_reply": "Edited: x y"}
    files["refined"] = with_column(rows_of_pairs, **edit)
    folder, _ = feed(files)
    lm = load("teacher")
    assert len(lm.tokenizer("10").input_ids) > len(lm.tokenizer("1").input_ids)
    scored = read_jsonl(folder / "score_refined.jsonl")
    assert len(scored) == 8
    for row, pair in zip(scored, read_rows(str(pairs), "train"), strict=True):
        prompt = "\n".join(turn["content"] for turn in row["prompt"])
        known = {"teacher": answer, "rejected": pair["rejected"], "score_rejected": 1, **edit}
        expected = plain_score(lm, rescore_chat(prompt, known), "{}")
        assert row["score_refined"] == pytest.approx(expected, abs=1e-3)


def test_a_stage_of_other_data_is_refused(rows_of_pairs, feed, capsys):
    others = with_column(rows_of_pairs, prompt="another", teacher=sample("x"))
    _, code = feed({"teacher": others})
    assert code == 2
    assert "teacher.jsonl" in capsys.readouterr().err


def stages_until(column: str, rows: list[dict], **last) -> dict[str, list[dict]]:
    """Files of the stages before a column, which are as they should be, and of that column."""
    files = {"teacher": with_column(rows, teacher=sample("x"))}
    files |= scores_of_a_pair(rows, chosen=7, rejected=3)
    files["refined"] = with_column(rows, refined="x y", refined_reply="Why: z Edited: x y")
    files["score_refined"] = with_column(rows, score_refined=9)
    files[column] = with_column(rows, **last)
    return files


# The first stage that leaves nothing, what its file holds, and the words of the error.
NOTHING_LEFT = {
    "empty answers": (
        "teacher",
        {"teacher": sample("")},
        ["8: a reply cannot be read", "another --teacher"],
    ),
    "no score": (
        "score_chosen",
        {"score_chosen": 0, "score_chosen_reply": "I like both."},
        ["none of 8 replies in", "'I like both.'", "8: a reply cannot be read", "--score expected"],
    ),
    "equal scores": (
        "score_rejected",
        {"score_rejected": 7},
        [
            "both answers alike, the first ones 7",
            "8: both answers have the same",
            "a larger --teacher",
        ],
    ),
    "no edit": (
        "refined",
        {"refined": "", "refined_reply": "It is wrong.", "refined_finished": False},
        ["'It is wrong.'; 8 are cut off at --max_edit_tokens", "--no-refine", "more --max_edit_"],
    ),
    "no score of an edit": (
        "score_refined",
        {"score_refined": 0, "score_refined_reply": "fine"},
        ["'fine'", "8: a reply cannot be read", "--score expected"],
    ),
    "no gain": (
        "score_refined",
        {"score_refined": 3.5},
        [
            "more than 1 higher",
            "the highest gain of 8 is 0.50",
            "8: the gain in score is too small",
        ],
    ),
}


@pytest.mark.parametrize("case", NOTHING_LEFT)
def test_r90_r91_a_stage_that_leaves_nothing_says_what_happened_and_what_to_do(
    case, rows_of_pairs, feed, capsys
):
    column, last, words = NOTHING_LEFT[case]
    _, code = feed(stages_until(column, rows_of_pairs, **last))
    error = capsys.readouterr().err.splitlines()[-1]
    assert code == 2
    for word in ["no pair is left to learn from", *words]:
        assert word in error


def test_r91_edits_that_change_nothing_say_so(pairs, rows_of_pairs, feed, capsys):
    files = stages_until("teacher", rows_of_pairs, teacher=sample("x"))
    for row, pair in zip(files["refined"], read_rows(str(pairs), "train"), strict=True):
        row["refined"] = pair["rejected"]
    _, code = feed(files)
    error = capsys.readouterr().err.splitlines()[-1]
    assert code == 2
    for word in ["no edit changes anything", "8: the edit changes nothing", "--no-refine"]:
        assert word in error


def test_r90_diagnosis_and_edit_have_a_limit_of_their_own(load, monkeypatch):
    """A random teacher, which hardly ever ends a reply, writes as long as the limit lets it."""
    teacher = load("teacher")
    lengths = []
    sample_responses = teacher.sample

    def recorded(prompts, **flags):
        samples = sample_responses(prompts, **flags)
        lengths.append(max(len(sample["token_ids"]) for [sample] in samples))
        return samples

    monkeypatch.setattr(teacher, "sample", recorded)
    prompt = [{"role": "user", "content": "Hello"}]
    rows = [{"prompt": prompt, "rejected": "No.", "teacher": {"text": "x"}}] * 4
    args = Args(max_response_tokens=3, max_edit_tokens=9)
    edits = edit_worse_answers(rows, 1, teacher, args)
    answer_prompts(rows, 1, teacher, args)
    assert lengths == [9, 3]
    assert [row["refined_finished"] for row in edits].count(False) > 0


# Columns of files of stages, and the file that cannot be made or gone on with.
INCOMPLETE = {
    "a teacher's answer as text": ({"teacher": "text"}, {}, "refined.jsonl", "teacher"),
    "an edit without its reply": ({}, {"refined": "x y"}, "score_refined.jsonl", "refined_reply"),
    "no answer in it": ({"answer": "x"}, {}, "teacher.jsonl", "teacher"),
    "no edit in it": ({}, {"edit": "x y"}, "refined.jsonl", "refined"),
}


@pytest.mark.parametrize("case", INCOMPLETE)
def test_a_stage_without_what_later_ones_need_is_one_line(case, rows_of_pairs, feed, capsys):
    answer, edit, file, column = INCOMPLETE[case]
    answer = answer or {"teacher": sample("x")}
    files = {"teacher": with_column(rows_of_pairs, **answer)}
    files |= scores_of_a_pair(rows_of_pairs, chosen=7, rejected=3)
    if edit:
        files["refined"] = with_column(rows_of_pairs, **edit)
    _, code = feed(files)
    err = capsys.readouterr().err
    assert code == 2
    assert file in err and f"a column {column}," in err and "Traceback" not in err


def test_a_stage_whose_scores_are_no_numbers_is_one_line(rows_of_pairs, feed, capsys):
    files = {"teacher": with_column(rows_of_pairs, teacher=sample("x"))}
    files["score_chosen"] = with_column(rows_of_pairs, score_chosen="8")
    _, code = feed(files)
    err = capsys.readouterr().err
    assert code == 2
    assert "score_chosen.jsonl" in err and "Traceback" not in err


# -------------------------------------------------------------------------------- flags and files
def flags_from_annotations(checkpoints, pairs, path: Path) -> dict:
    return {
        "student": checkpoints["student"],
        "teacher": checkpoints["teacher"],
        "annotations": path,
        "eval_data": pairs,
        "reward": "conftest:vowels",
        **SHORT,
    }


@pytest.mark.parametrize("column", ["score_refined", "score_rejected", "teacher", "refined"])
def test_annotations_without_a_column_are_one_line(column, checkpoints, pairs, tmp_path, capsys):
    path = annotations(tmp_path, pairs)
    rows = read_jsonl(path)
    for row in rows:
        del row[column]
    write_jsonl(path, rows)
    flags = flags_from_annotations(checkpoints, pairs, path)
    assert run_script("rm_distiller", **flags, output_dir=tmp_path / "run") == 2
    err = capsys.readouterr().err
    assert column in err and "Traceback" not in err
    assert not (tmp_path / "run").exists()
    if column == "teacher":
        # It is needed for the generation terms only, and so is the teacher itself.
        flags |= {"teacher": "/no/teacher", "kl_coef": 0}
        assert run_script("rm_distiller", **flags, output_dir=tmp_path / "other") == 0


@pytest.mark.parametrize("column", ["score_chosen", "chosen"])
def test_plain_pairs_need_the_columns_of_plain_pairs(column, checkpoints, pairs, tmp_path, capsys):
    path = annotations(tmp_path, pairs)
    rows = read_jsonl(path)
    for row in rows:
        del row[column]
    write_jsonl(path, rows)
    flags = flags_from_annotations(checkpoints, pairs, path)
    flags["output_dir"] = tmp_path / "run"
    assert run_script("rm_distiller", **flags, **{"no-refine": True}) == 2
    err = capsys.readouterr().err
    assert column in err and "Traceback" not in err


def test_nothing_is_trained_that_could_not_be_loaded(checkpoints, pairs, tmp_path, capsys):
    """An architecture without a sequence classifier in transformers ends before the teacher is
    asked anything."""
    config = GraniteConfig(
        vocab_size=400,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=5,
        pad_token_id=0,
    )
    flags = flags_from_annotations(checkpoints, pairs, annotations(tmp_path, pairs))
    flags["student"] = save(tmp_path / "granite", make_tokenizer(), GraniteForCausalLM(config))
    assert run_script("rm_distiller", **flags, output_dir=tmp_path / "run") == 2
    assert "granite has no classifier" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


NUMERIC = [field.name for field in fields(Args) if field.type in (int, float)]


@pytest.mark.parametrize("name", one_short(NUMERIC, "max_edit_tokens"))
def test_numbers_that_make_no_sense_are_one_line_before_anything_is_written(name, tmp_path, capsys):
    values = ["-1"]
    if isinstance(getattr(Args(), name), float):
        values += ["nan", "inf"]
    for value in values:
        assert run_script("rm_distiller", **{name: value}, output_dir=tmp_path / "run") == 2
        err = capsys.readouterr().err
        assert f"--{name} {value}" in err and "Traceback" not in err
        assert len(err.splitlines()) == 1
        assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_columns_of_the_data_that_json_does_not_know_do_no_harm(tmp_path):
    import pyarrow
    from pyarrow.parquet import write_table

    rows = read_jsonl(few(tmp_path, 12))
    for row in rows:
        row["written"] = datetime.datetime(2026, 1, 2)
    write_table(pyarrow.Table.from_pylist(rows), tmp_path / "train.parquet")
    flags = {"data": tmp_path / "train.parquet", **SHORT}
    assert run_script("rm_distiller", **flags, output_dir=tmp_path / "run") == 0
    assert "2026-01-02" in read_jsonl(tmp_path / "run" / "annotations.jsonl")[0]["written"]


def test_a_teacher_with_another_tokenizer_needs_the_kl_to_be_off(
    checkpoints, pairs, tmp_path, capsys
):
    tokenizer = make_tokenizer(vocab_size=330, text="Answer A is better than Answer B. " * 50)
    flags = flags_from_annotations(checkpoints, pairs, annotations(tmp_path, pairs))
    flags["teacher"] = save(tmp_path / "other", tokenizer, make_model(len(tokenizer), seed=7))
    flags |= {"max_response_tokens": 60, "output_dir": tmp_path / "run"}
    assert run_script("rm_distiller", **flags) == 2
    assert "--kl_coef 0 --nll_coef 1" in capsys.readouterr().err
    assert run_script("rm_distiller", **flags, kl_coef=0, nll_coef=1) == 0
    last = read_jsonl(tmp_path / "run" / "metrics.jsonl")[-1]
    assert last["losses/nll"] > 1
    assert "losses/kl" not in last


@pytest.mark.slow
def test_the_thoughts_of_a_reasoning_teacher_are_left_out(tmp_path, monkeypatch):
    """A teacher that thinks aloud before every answer, here by a changed `sample`, gives the same
    annotations."""
    flags = {"data": few(tmp_path, 12), **SHORT, "score": "text", "sample_temperature": 0}
    assert run_script("rm_distiller", **flags, output_dir=tmp_path / "plain") == 0
    plain_sample = LM.sample

    def think_and_sample(self, *args, **keywords):
        samples = plain_sample(self, *args, **keywords)
        for responses in samples:
            for response in responses:
                thought = "<think>\nA: 1, B: 9. Edited: no\n</think>\n\n"
                response["text"] = thought + response["text"]
        return samples

    monkeypatch.setattr(LM, "sample", think_and_sample)
    assert run_script("rm_distiller", **flags, output_dir=tmp_path / "thinking") == 0
    plain = read_jsonl(tmp_path / "plain" / "annotations.jsonl")
    for row in plain:
        # These are the tokens of the whole reply, which is not what is left of one with thoughts.
        del row["teacher"]["token_ids"]
    assert read_jsonl(tmp_path / "thinking" / "annotations.jsonl") == plain
