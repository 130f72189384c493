"""pad.py: rankings, judgements and losses against brute force in float64; its stages against plain
forward passes; runs that are fed, killed and resumed across rounds; a teacher with another
tokenizer."""

import itertools
import json
import math
import random
import statistics
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    ROOT,
    ScriptProcess,
    first_gradient,
    first_rows,
    make_model,
    make_tokenizer,
    packed_averages,
    padded_averages,
    plain_log_probs,
    random_examples,
    read_jsonl,
    run_script,
    save,
    training_rows,
    write_jsonl,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import pad
from common import LM, encode_rows, prompt_text, read_rows
from pad import (
    JUDGE_PROMPT,
    Args,
    edit_distance,
    judge_answers,
    mcq_scores,
    pad_terms,
    passes_filter,
    ppd,
    question_pairs,
    ranking_logps,
    sample_diverse,
    select_diverse,
    teacher_scores,
    tokens_that_read,
    vpd,
)

CPU = torch.device("cpu")
SIZES = pytest.mark.parametrize("n", range(2, 6))


def random_scores(n, rows=4, seed=0, scale=1.5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(rows, n, generator=generator, dtype=torch.float64)


def float64(*values) -> torch.Tensor:
    """[1, n]"""
    return torch.tensor([values], dtype=torch.float64)


def slow_rankings(scores: list[float]) -> dict[tuple, float]:
    """{ranking: probability}, a product of one softmax after the other over the answers left."""
    result = {}
    for ranking in itertools.permutations(range(len(scores))):
        probability = 1.0
        for k, i in enumerate(ranking):
            probability *= math.exp(scores[i]) / sum(math.exp(scores[j]) for j in ranking[k:])
        result[ranking] = probability
    return result


def slow_ppd(student: list[float], teacher: list[float]) -> float:
    p = slow_rankings(student)
    q = slow_rankings(teacher)
    divergence = 0.0
    for ranking in p:
        mixture = (p[ranking] + q[ranking]) / 2
        for probability in (p[ranking], q[ranking]):
            divergence += probability * math.log(probability / mixture) / 2
    return divergence


def slow_vpd(student: list[float], teacher: list[float]) -> float:
    best_first = tuple(sorted(range(len(teacher)), key=lambda i: -teacher[i]))
    return -math.log(slow_rankings(student)[best_first])


# ----------------------------------------------------------------------------- rankings and losses
def test_the_examples_of_the_docstrings():
    probs = ranking_logps(float64(math.log(3), 0)).exp()
    assert probs.tolist() == [pytest.approx([3 / 4, 1 / 4])]
    assert ppd(float64(math.log(3), 0), float64(0, 0)).item() == pytest.approx(0.0338, abs=1e-4)
    assert vpd(float64(math.log(3), 0), float64(0, 1)).item() == pytest.approx(-math.log(1 / 4))
    s_mcq = mcq_scores(float64(0.6, 0.9, 0.5), float64(0.3, 0.1, 0.4), question_pairs(3, False), 3)
    assert s_mcq.exp().tolist() == [pytest.approx([0.75, 0.4, 0.25])]
    assert edit_distance("kitten", "sitting") == 3


@SIZES
def test_rankings_equal_brute_force_and_their_probabilities_sum_to_one(n):
    scores = random_scores(n)
    probs = ranking_logps(scores).exp()
    assert probs.shape == (4, math.factorial(n))
    assert probs.sum(-1).tolist() == pytest.approx([1.0] * 4, abs=1e-12)
    for row, row_probs in zip(scores.tolist(), probs.tolist()):
        assert row_probs == pytest.approx(list(slow_rankings(row).values()), abs=1e-12)


@SIZES
def test_equal_scores_make_all_rankings_equally_likely(n):
    logps = ranking_logps(torch.full((1, n), 0.7, dtype=torch.float64))
    uniform = torch.full_like(logps, -math.log(math.factorial(n)))
    assert torch.allclose(logps, uniform, atol=1e-12)


def test_two_answers_are_bradley_terry():
    student = random_scores(2)
    teacher = random_scores(2, seed=1)
    margins = student[:, 0] - student[:, 1]
    expected = torch.nn.functional.logsigmoid(margins)
    assert torch.allclose(ranking_logps(student)[:, 0], expected, atol=1e-12)
    signed = torch.where(teacher[:, 0] > teacher[:, 1], margins, -margins)
    expected = -torch.nn.functional.logsigmoid(signed)
    assert torch.allclose(vpd(student, teacher), expected, atol=1e-12)


def test_the_likeliest_ranking_is_the_descending_order():
    for row in random_scores(4, rows=20).tolist():
        rankings = slow_rankings(row)
        likeliest = max(rankings, key=rankings.get)
        assert list(likeliest) == sorted(range(4), key=lambda i: -row[i])
        # The first ranking is the order in which the scores stand.
        [logps] = ranking_logps(float64(*sorted(row, reverse=True)))
        assert logps.argmax() == 0


@SIZES
@pytest.mark.parametrize("seed", range(3))
def test_losses_equal_brute_force(n, seed):
    student = random_scores(n, seed=seed)
    teacher = random_scores(n, seed=seed + 50)
    expected_ppd = list(map(slow_ppd, student.tolist(), teacher.tolist()))
    expected_vpd = list(map(slow_vpd, student.tolist(), teacher.tolist()))
    assert ppd(student, teacher).tolist() == pytest.approx(expected_ppd, abs=1e-12)
    assert vpd(student, teacher).tolist() == pytest.approx(expected_vpd, abs=1e-12)
    in_float32 = ppd(student.float(), teacher.float())
    assert in_float32.tolist() == pytest.approx(expected_ppd, abs=1e-5)


@SIZES
@pytest.mark.parametrize("loss", [ppd, vpd])
def test_a_constant_on_all_scores_and_the_order_of_answers_change_nothing(n, loss):
    student = random_scores(n)
    teacher = random_scores(n, seed=1)
    expected = loss(student, teacher)
    assert torch.allclose(loss(student + 3.0, teacher - 7.0), expected, atol=1e-11)
    for order in itertools.islice(itertools.permutations(range(n)), 1, 8):
        assert torch.allclose(loss(student[:, order], teacher[:, order]), expected, atol=1e-11)


@SIZES
def test_r25_the_divergence_lies_between_0_and_log_2_and_is_symmetric(n):
    for scale in (0.01, 1.0, 30.0, 1000.0):
        student = random_scores(n, seed=2, scale=scale)
        teacher = random_scores(n, seed=3, scale=scale)
        values = ppd(student, teacher)
        assert torch.allclose(values, ppd(teacher, student), atol=1e-12)
        assert (values >= -1e-12).all() and (values <= math.log(2) + 1e-12).all()
    opposite = float64(*(1000.0 * i for i in range(n)))
    assert ppd(opposite, -opposite).item() == pytest.approx(math.log(2))


@SIZES
def test_r29_the_divergence_and_its_gradient_are_zero_for_equal_scores(n):
    student = random_scores(n).requires_grad_()
    values = ppd(student, student.detach() + 1.0)
    values.sum().backward()
    assert torch.allclose(values, torch.zeros_like(values), atol=1e-12)
    assert torch.allclose(student.grad, torch.zeros_like(student), atol=1e-12)


def test_r24_divergence_of_two_rankings_by_hand():
    """P_student = (3/4, 1/4), P_teacher = (1/2, 1/2), so M = (5/8, 3/8)."""
    kl_student = 0.75 * math.log(0.75 / 0.625) + 0.25 * math.log(0.25 / 0.375)
    kl_teacher = 0.5 * math.log(0.5 / 0.625) + 0.5 * math.log(0.5 / 0.375)
    expected = (kl_student + kl_teacher) / 2
    value = ppd(float64(math.log(3.0), 0.0), float64(0.0, 0.0))
    assert value.item() == pytest.approx(expected, abs=1e-12)
    assert expected == pytest.approx(0.033822, abs=1e-6)


@SIZES
@pytest.mark.parametrize("loss", [ppd, vpd])
def test_gradients(n, loss):
    student = random_scores(n, rows=2).requires_grad_()
    teacher = random_scores(n, rows=2, seed=1)

    def loss_of(scores):
        return loss(scores, teacher)

    assert torch.autograd.gradcheck(loss_of, student)


@pytest.mark.parametrize("loss", [ppd, vpd])
def test_r10_scores_as_far_apart_as_excluded_tokens_make_them_give_no_nan(loss):
    student = torch.tensor([[-2e4, -1.0, -2.0], [-1.0, -2.0, -3.0]], requires_grad=True)
    teacher = torch.tensor([[-1.0, -2e4, -2e4], [-1.0, -2.0, -2e4]])
    values = loss(student, teacher)
    values.sum().backward()
    assert values.isfinite().all() and student.grad.isfinite().all()


def test_every_prompt_counts_by_itself():
    student = random_scores(4)
    teacher = random_scores(4, seed=1)
    for loss in (ppd, vpd):
        alone = torch.cat([loss(student[i : i + 1], teacher[i : i + 1]) for i in range(4)])
        assert torch.allclose(loss(student, teacher), alone, atol=1e-14)


def test_the_released_divergence_is_unbounded_and_mixes_prompts():
    """The numbers of docs/pad.md: swapped arguments of the KL, and one mixture for all prompts of a
    micro-batch, whose mass is their number."""
    from studies.released import divergence_from_a_shared_mixture as released

    ranked = float64(0.0, -1.0, -2.0, -3.0)
    for beta, jsd, released_value in ((1, 0.577, 1.601), (2, 0.688, 4.773), (10, 0.693, 29.306)):
        student = beta * ranked
        teacher = beta * ranked.flip(-1)
        assert ppd(student, teacher).item() == pytest.approx(jsd, abs=1e-3)
        assert released(student, teacher).item() == pytest.approx(released_value, abs=1e-3)
    # A student that agrees with its teacher on two prompts, whose orders are opposite.
    both = torch.cat([2 * ranked, 2 * ranked.flip(-1)])
    assert ppd(both, both).tolist() == pytest.approx([0, 0], abs=1e-12)
    assert released(both, both).tolist() == pytest.approx([10.933, 10.933], abs=1e-3)
    assert released(both[:1], both[:1]).item() == pytest.approx(0, abs=1e-12)


# -------------------------------------------------------------------------- choice and judgement
def slow_distance(a, b) -> int:
    if not a or not b:
        return len(a) + len(b)
    deleted = slow_distance(a[1:], b) + 1
    inserted = slow_distance(a, b[1:]) + 1
    replaced = slow_distance(a[1:], b[1:]) + (a[0] != b[0])
    return min(deleted, inserted, replaced)


def test_edit_distance():
    assert edit_distance("kitten", "sitting") == 3
    assert edit_distance("", "abc") == 3
    assert edit_distance("abc", "") == 3
    rng = random.Random(0)
    for _ in range(200):
        a = rng.choices(range(3), k=rng.randrange(6))
        b = rng.choices(range(3), k=rng.randrange(6))
        assert edit_distance(a, b) == edit_distance(b, a) == slow_distance(a, b), (a, b)


def distance_to_nearest(sequence, others) -> int:
    return min(edit_distance(sequence, other) for other in others)


def test_the_most_different_are_selected_one_by_one():
    texts = ["aaaa", "aaab", "bbbb", "abbb", "cc"]
    # "cc" is as far from "aaaa" as "bbbb" is. The first of equals is selected.
    assert select_diverse(texts, 2) == ["aaaa", "bbbb"]
    assert select_diverse(texts, 3) == ["aaaa", "bbbb", "cc"]
    assert select_diverse(texts, 9) == select_diverse(texts, 5)
    assert sorted(select_diverse(texts, 5)) == sorted(texts)
    assert select_diverse([], 2) == []
    assert select_diverse(["a"], 2) == ["a"]
    rng = random.Random(1)
    for _ in range(50):
        pool = list({tuple(rng.choices(range(4), k=rng.randrange(1, 7))) for _ in range(6)})
        selected = select_diverse(pool, 4)
        assert selected[0] == pool[0]
        assert len(set(selected)) == min(4, len(pool))
        for k in range(1, len(selected)):
            farthest = max(distance_to_nearest(one, selected[:k]) for one in pool)
            assert distance_to_nearest(selected[k], selected[:k]) == farthest


def test_question_pairs():
    assert question_pairs(3, swap_order=False) == [(0, 1), (0, 2), (1, 2)]
    both = question_pairs(3, swap_order=True)
    assert sorted(both) == [(0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1)]


@pytest.mark.parametrize("n", range(2, 7))
@pytest.mark.parametrize("both_orders", [False, True])
def test_judgements_equal_a_slow_loop(n, both_orders):
    pairs = question_pairs(n, both_orders)
    generator = torch.Generator().manual_seed(n)
    p_a, p_b = torch.rand(2, 3, len(pairs), generator=generator, dtype=torch.float64) / 2
    s_mcq = mcq_scores(p_a, p_b, pairs, n)
    for row in range(3):
        for i in range(n):
            total = 0.0
            for k, (a, b) in enumerate(pairs):
                if a == i:
                    total += p_a[row, k].item()
                if b == i:
                    total += p_b[row, k].item()
            if both_orders:
                total /= 2
            expected = math.log((1e-8 + total) / (n - 1))
            assert s_mcq[row, i].item() == pytest.approx(expected, abs=1e-12)


def test_a_judge_that_always_says_a_prefers_nobody_once_both_orders_are_asked():
    once = question_pairs(4, swap_order=False)
    [biased] = mcq_scores(torch.ones(1, 6), torch.zeros(1, 6), once, 4).exp()
    assert biased.tolist() == pytest.approx([1, 2 / 3, 1 / 3, 0], abs=1e-6)
    both = question_pairs(4, swap_order=True)
    [fair] = mcq_scores(torch.ones(1, 12), torch.zeros(1, 12), both, 4).exp()
    assert fair.tolist() == pytest.approx([0.5] * 4)


def test_a_judge_that_never_names_an_answer_leaves_a_finite_score():
    [scores] = mcq_scores(torch.zeros(1, 1), torch.zeros(1, 1), [(0, 1)], 2)
    assert scores.tolist() == pytest.approx([math.log(1e-8)] * 2)


def test_the_teachers_score_is_a_weighted_sum():
    logps = float64(-1.0, -2.0)
    s_mcq = float64(-3.0, -0.5)
    assert teacher_scores(logps, s_mcq, 0.75).tolist() == [pytest.approx([-1.5, -1.625])]
    assert torch.equal(teacher_scores(logps, s_mcq, 1.0), logps)
    assert torch.equal(teacher_scores(logps, s_mcq, 0.0), s_mcq)


@pytest.mark.parametrize(
    "judgement, passes",
    [
        ([0.9, 0.5, 0.1], True),
        ([0.51, 0.6, 0.7], False),
        ([0.5, 0.4, 0.3], False),
        ([0.2, 0.5, 0.51], True),
    ],
)
def test_a_prompt_passes_if_some_answers_are_good_and_some_are_not(judgement, passes):
    for alpha in (0.0, 0.9):
        assert passes_filter({"judgement": judgement}, alpha) == passes
    assert passes_filter({"judgement": judgement}, 1.0)


def test_the_question_is_the_one_that_the_playgrounds_teacher_was_trained_on():
    assert JUDGE_PROMPT == (
        "Request: {prompt}\nAnswer A: {a}\nAnswer B: {b}\n"
        "Which answer is better? Reply with A, B or None."
    )


# --------------------------------------------------------------- stages and a step of the script
TINY = {
    "alpha": 0.6,
    "max_response_tokens": 12,
    "num_samples": 6,
    "micro_batch_size": 3,
    "num_answers": 3,
}
# Random teachers favour neither A nor B, so their judgement would keep no prompt.
NO_FILTER = {**TINY, "alpha": 1.0}
LIMITS = SimpleNamespace(max_prompt_tokens=512, max_response_tokens=12)


def slow_scores(teacher: LM, row: dict, alpha: float, both_orders=False) -> dict:
    """What the teacher says of a row's answers, one plain forward pass after the other."""
    averages = []
    prompt_ids, response_ids = teacher.encode(row["prompt"], row["answers"])
    for response in response_ids:
        log_probs = plain_log_probs(teacher.model, prompt_ids, response, teacher.vocab_size)
        logps = [log_probs[t, token].item() for t, token in enumerate(response)]
        averages.append(statistics.mean(logps))

    tokens = {"A": [], "B": []}
    for token in range(teacher.vocab_size):
        text = teacher.tokenizer.decode([token]).strip()
        if text in tokens:
            tokens[text].append(token)
    n = len(row["answers"])
    p_a = []
    p_b = []
    sums = [0.0] * n
    for a, b in question_pairs(n, both_orders):
        question = JUDGE_PROMPT.format(
            prompt=prompt_text(row["prompt"]),
            a=row["answers"][a]["text"],
            b=row["answers"][b]["text"],
        )
        ids = teacher.prompt_ids([{"role": "user", "content": question}])
        with torch.no_grad():
            logits = teacher.model(torch.tensor([ids])).logits[0, -1, : teacher.vocab_size]
        probs = logits.double().softmax(-1)
        p_a.append(probs[tokens["A"]].sum().item())
        p_b.append(probs[tokens["B"]].sum().item())
        orders = 2 if both_orders else 1
        sums[a] += p_a[-1] / orders
        sums[b] += p_b[-1] / orders
    judgement = [(1e-8 + total) / (n - 1) for total in sums]
    return {
        "average_logp": averages,
        "judgement": judgement,
        "score": slow_score(averages, judgement, alpha),
        "p_a": p_a,
        "p_b": p_b,
    }


def slow_score(averages: list[float], judgement: list[float], alpha: float) -> list[float]:
    """The teacher's score of each answer, a weighted sum."""
    scores = []
    for average, judged in zip(averages, judgement, strict=True):
        scores.append(alpha * average + (1 - alpha) * math.log(judged))
    return scores


def assert_scores(run, teacher: LM, both_orders=False) -> list[dict]:
    """The scores that a run wrote are those of plain forward passes. Returns its rows."""
    alpha = json.loads((run / "args.json").read_text())["alpha"]
    rows = read_jsonl(run / "scores_1.jsonl")
    assert len(rows) >= 6
    for row in rows:
        expected = slow_scores(teacher, row, alpha, both_orders)
        if alpha == 1:
            expected = {name: expected[name] for name in ("average_logp", "score")}
        for name, values in expected.items():
            assert row[name] == pytest.approx(values, rel=1e-3, abs=1e-5), name
    return rows


def prompts_of(pairs) -> list[dict]:
    """The rows of the file, with an id and a prompt and nothing else."""
    rows = read_rows(str(pairs), "train", ())
    return [{"id": row["id"], "prompt": row["prompt"]} for row in rows]


def finished(*texts) -> list[dict]:
    return [{"text": text, "finished": True} for text in texts]


def test_the_answers_are_the_most_different_of_the_students_samples(checkpoints, pairs, run_tiny):
    run = run_tiny("pad", **NO_FILTER)
    lm = LM(checkpoints["student"], CPU)
    rows = prompts_of(pairs)
    sampled = lm.sample(
        [lm.prompt_ids(row["prompt"]) for row in rows],
        n=6,
        max_new_tokens=12,
        batch_size=256,
        seed=1 + len(rows),
    )
    for row, samples in zip(read_jsonl(run / "samples_1.jsonl"), sampled, strict=True):
        by_tokens = {tuple(lm.tokenizer(one["text"]).input_ids): one for one in samples}
        selected = select_diverse(list(by_tokens), 3)
        assert row["answers"] == [by_tokens[tokens] for tokens in selected]
        assert len({answer["text"] for answer in row["answers"]}) == 3


def test_sampling_alone_leaves_out_what_has_no_token_and_what_is_said_twice(
    load, pairs, monkeypatch
):
    lm = load("student")
    nothing = {"text": "", "finished": False}
    samples = [nothing, *finished("yes", "yes", "", "no")]

    def same_samples(prompts, **_):
        return [samples] * len(prompts)

    monkeypatch.setattr(lm, "sample", same_samples)
    rows = prompts_of(pairs)[:2]
    for result in sample_diverse(rows, seed=1, student=lm, n=4, args=Args(**NO_FILTER)):
        texts = [answer["text"] for answer in result["answers"]]
        assert sorted(texts) == ["", "no", "yes"]
        assert nothing not in result["answers"]


def test_scores_equal_plain_forward_passes_of_the_teacher(checkpoints, run_tiny):
    run = run_tiny("pad", **NO_FILTER)
    assert_scores(run, LM(checkpoints["teacher"], CPU))


@pytest.mark.parametrize("alpha, both_orders", [(0.0, False), (0.6, False), (0.6, True)])
def test_judging_alone_equals_plain_forward_passes_and_decodes_the_vocabulary_once(
    load, pairs, monkeypatch, alpha, both_orders
):
    teacher = load("teacher")
    decoded = []
    batch_decode = teacher.tokenizer.batch_decode

    def counting_decode(ids):
        decoded.append(len(ids))
        return batch_decode(ids)

    monkeypatch.setattr(teacher.tokenizer, "batch_decode", counting_decode)
    rows = [{**row, "answers": finished("yes", "no, no", "a thing")} for row in prompts_of(pairs)]
    for some_rows in (rows[:3], rows[3:5]):
        flags = {**TINY, "alpha": alpha, "swap_order": both_orders}
        results = judge_answers(some_rows, teacher, Args(**flags))
        for row, result in zip(some_rows, results, strict=True):
            assert len(result["p_a"]) == (6 if both_orders else 3)
            for name, values in slow_scores(teacher, row, alpha, both_orders).items():
                assert result[name] == pytest.approx(values, rel=1e-3, abs=1e-5), name
    assert decoded == [teacher.vocab_size]


@pytest.mark.parametrize("judge_criteria", [False, True])
def test_the_judge_reads_the_criteria_if_it_should(load, pairs, monkeypatch, judge_criteria):
    teacher = load("teacher")
    asked = []
    prompt_ids = teacher.prompt_ids

    def remember(chat):
        asked.append(chat)
        return prompt_ids(chat)

    monkeypatch.setattr(teacher, "prompt_ids", remember)
    rows = [{**row, "answers": finished("yes", "no, no")} for row in prompts_of(pairs)[:2]]
    args = Args(**TINY, judge_criteria=judge_criteria)
    results = judge_answers(rows, teacher, args)
    scored = [{**row, **result} for row, result in zip(rows, results, strict=True)]
    # The line that says why no prompt is left asks the first question once more.
    pad.why_the_filter_keeps_nothing(scored, teacher, args)
    texts = [turn["content"] for [turn] in asked]
    assert len(texts) == 3 and texts[2] == texts[0]
    for row, text in zip(rows, texts):
        question = JUDGE_PROMPT.format(prompt=row["prompt"][0]["content"], a="yes", b="no, no")
        told = text.removesuffix(question)
        assert len(told) + len(question) == len(text)
        criteria = ("relevant", "accurate", "complete", "coherent", "clear", "Reply None if")
        assert all((word in told) == judge_criteria for word in criteria)


def other_teacher(folder) -> str:
    """Another tokenizer, another vocabulary, no chat template: nothing that the student shares."""
    text = "Answer A is better than Answer B: A, B or None. " * 50
    tokenizer = make_tokenizer(vocab_size=330, chat=False, text=text)
    return save(folder / "other_teacher", tokenizer, make_model(330, seed=7, width=48))


def test_a_teacher_with_another_tokenizer_reads_text(checkpoints, run_tiny, tmp_path):
    path = other_teacher(tmp_path)
    run = run_tiny("pad", **NO_FILTER, teacher=path)
    teacher = LM(path, CPU)
    student = LM(checkpoints["student"], CPU)
    [row, *_] = assert_scores(run, teacher)
    assert teacher.vocab_size != student.vocab_size
    _, teacher_ids = teacher.encode(row["prompt"], row["answers"])
    _, student_ids = student.encode(row["prompt"], row["answers"])
    assert teacher_ids != student_ids
    # Several tokens read A, and all count.
    a_tokens, b_tokens = tokens_that_read("AB", teacher)
    assert {"A", " A"} <= {teacher.tokenizer.decode([token]) for token in a_tokens}
    assert {"B", " B"} <= {teacher.tokenizer.decode([token]) for token in b_tokens}


def with_columns(rows: list[dict]) -> tuple[list[dict], list[str]]:
    """The rows with every answer in a column of its own, and the names of these columns."""
    columns = [f"answer {i}" for i in range(len(rows[0]["answers"]))]
    return [{**row, **dict(zip(columns, row["answers"]))} for row in rows], columns


def slow_step(path: str, rows: list[dict], loss, beta: float, alpha: float):
    """The mean loss over rows, and its gradient, in float64: one plain forward pass after the
    other."""
    lm = LM(path, CPU)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    rows, columns = with_columns(rows)
    examples = encode_rows(lm, rows, columns, LIMITS, "test")
    total = 0.0
    for example in examples:
        prompt = example.prompt_ids
        averages = []
        for response in example.response_ids:
            logits = model(torch.tensor([prompt + response])).logits[0]
            log_probs = logits[len(prompt) - 1 : -1, : lm.vocab_size].log_softmax(-1)
            averages.append(log_probs[range(len(response)), response].mean())
        student = torch.stack(averages)[None]
        row = example.row
        judgement = row.get("judgement", [1.0] * len(row["average_logp"]))  # α = 1 has none
        teacher = float64(*slow_score(row["average_logp"], judgement, alpha))
        total = total + loss(beta * student, beta * teacher)[0]
    total = total / len(examples)
    return total.item(), torch.autograd.grad(total, list(model.parameters()))


@pytest.mark.parametrize("loss", [ppd, vpd])
@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_r04_a_step_equals_a_slow_loop_over_plain_forward_passes(checkpoints, run_tiny, loss, beta):
    run = run_tiny("pad", **NO_FILTER, loss=loss.__name__, beta=beta)
    rows = read_jsonl(run / "scores_1.jsonl")
    value, gradient = slow_step(checkpoints["student"], rows, loss, beta, alpha=1.0)
    [row] = training_rows(run)
    assert row["losses/total"] == pytest.approx(value, rel=1e-3)
    for measured, expected in zip(first_gradient(run), gradient, strict=True):
        torch.testing.assert_close(measured.double(), expected, rtol=5e-3, atol=1e-5)


def test_the_terms_alone_have_one_distance_a_prompt_and_take_the_module_s_ppd(
    checkpoints, load, pairs, monkeypatch
):
    """studies/released.py replaces `pad.ppd`."""
    _, rows = samples_and_scores(pairs, JUDGED)
    lm = load("student", trainable=True)
    args = Args(**TINY)
    rows, columns = with_columns(rows)
    examples = encode_rows(lm, rows, columns, LIMITS, "test")
    terms = pad_terms(examples, lm, lm.vocab_size, args)
    assert list(terms) == ["ranking"] and terms["ranking"].shape == (8,)
    value, _ = slow_step(checkpoints["student"], rows, ppd, args.beta, args.alpha)
    assert terms["ranking"].mean().item() == pytest.approx(value, rel=1e-4)

    def seven(s_student, s_teacher):
        assert s_student.shape == s_teacher.shape == (8, 3)
        return s_student.new_full((8,), 7.0)

    monkeypatch.setattr(pad, "ppd", seven)
    assert pad_terms(examples, lm, lm.vocab_size, args)["ranking"].tolist() == [7.0] * 8


# ----------------------------------------------------------------- files that were made elsewhere
@pytest.fixture
def feed(checkpoints, pairs, tmp_path):
    """feed({file name: rows}, flags) resumes a run that finds files in its folder, as if killed
    with them there. It returns the folder and the exit code."""

    def run(files: dict[str, list[dict]], **flags):
        folder = tmp_path / f"fed{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        defaults = {
            "data": str(pairs),
            "eval_data": str(pairs),
            "eval_prompts": 2,
            "reward": "conftest:vowels",
            "max_steps": 1,
            "log_every": 1,
            "student": checkpoints["student"],
            "teacher": checkpoints["teacher"],
            "output_dir": str(folder),
        }
        args = Args(**{**defaults, **TINY, **flags})
        (folder / "args.json").write_text(json.dumps(vars(args)))
        for name, rows in files.items():
            write_jsonl(folder / name, rows)
        return folder, run_script("pad", resume=folder)

    return run


def test_answers_of_another_engine_are_taken_in_any_order(checkpoints, pairs, feed, capsys):
    samples = []
    for i, row in enumerate(prompts_of(pairs)):
        samples.append({**row, "answers": finished("yes", f"no {i}", "a thing")})
    samples[3]["answers"] = finished("only one")
    run, code = feed({"samples_1.jsonl": samples[::-1]}, alpha=1.0)
    assert code == 0
    assert "7 of 8 prompts have 3 different answers; 7 kept" in capsys.readouterr().out
    assert read_jsonl(run / "samples_1.jsonl") == samples[::-1]
    rows = assert_scores(run, LM(checkpoints["teacher"], CPU))
    complete = [row["answers"] for row in samples if len(row["answers"]) == 3]
    assert [row["answers"] for row in rows] == complete

    other_prompts = [{**row, "prompt": "another"} for row in samples]
    run, code = feed({"samples_1.jsonl": other_prompts}, alpha=1.0)
    assert code == 2
    assert "samples_1.jsonl" in capsys.readouterr().err


# Kept, all answers good, none good, kept.
JUDGED = [[0.9, 0.5, 0.1], [0.51, 0.6, 0.7], [0.5, 0.4, 0.3], [0.2, 0.5, 0.51]]


def samples_and_scores(pairs, judged: list[list[float]]) -> tuple[list[dict], list[dict]]:
    """Rows of both files for all prompts. The judgements are those given, in turn."""
    samples = []
    scores = []
    for row, judgement in zip(prompts_of(pairs), itertools.cycle(judged)):
        sample = {**row, "answers": finished("yes", "no", "a thing")}
        samples.append(sample)
        scores.append(
            {
                **sample,
                "average_logp": [-1.0, -2.0, -4.0],
                "judgement": judgement,
                "p_a": [0.5, 0.25, 0.0],
                "p_b": [0.25, 0.25, 0.5],
            }
        )
    return samples, scores


@pytest.mark.parametrize("alpha, share", [(0.0, 0.5), (0.9, 0.5), (1.0, 1.0)])
def test_the_filter_and_what_is_said_of_the_judge(checkpoints, pairs, feed, capsys, alpha, share):
    samples, scores = samples_and_scores(pairs, JUDGED)
    run, code = feed({"samples_1.jsonl": samples, "scores_1.jsonl": scores}, alpha=alpha)
    out = capsys.readouterr().out
    count = round(8 * share)
    assert code == 0
    # p(A) is 0.25 on average and p(B) 1/3, so A has 3/7 of both.
    judge = "not asked" if alpha == 1 else "p(A) + p(B) is 0.58 on average, of which A has 43%"
    assert f"round 1           8 of 8 prompts have 3 different answers; {count} kept\n" in out
    assert f"judge             {judge}\n" in out
    assert f"examples, round 1 {count} of {count} rows\n" in out
    [row] = training_rows(run)
    assert row["charts/judge_kept"] == share
    if alpha == 1:
        assert "charts/judge_mass" not in row
    else:
        assert row["charts/judge_mass"] == pytest.approx(1.75 / 3, abs=1e-4)
        assert row["charts/judge_p_a"] == pytest.approx(0.25, abs=1e-4)

    # What the file says of the answers is what is learned.
    kept = scores
    if alpha < 1:
        kept = [row for i, row in enumerate(scores) if i % 4 in (0, 3)]
    value, _ = slow_step(checkpoints["student"], kept, ppd, beta=2.0, alpha=alpha)
    assert row["losses/total"] == pytest.approx(value, rel=1e-4)


def test_r78_with_alpha_1_the_judge_is_not_asked(load, pairs, run_tiny, monkeypatch):
    """The average log-probs are those that a judge of α = 0.6 has, and nothing else is there."""
    monkeypatch.setattr(pad, "ask_teacher", None)
    teacher = load("teacher")
    rows = [{**row, "answers": finished("yes", "no, no", "a thing")} for row in prompts_of(pairs)]
    results = judge_answers(rows, teacher, Args(**NO_FILTER))
    for row, result in zip(rows, results):
        assert result.keys() == {"answers", "average_logp", "score"}
        expected = slow_scores(teacher, row, alpha=0.6)["average_logp"]
        assert result["score"] == result["average_logp"] == pytest.approx(expected, abs=1e-4)

    run = run_tiny("pad", **NO_FILTER)
    for row in read_jsonl(run / "scores_1.jsonl"):
        assert row.keys() == {"id", "prompt", "answers", "average_logp", "score"}
    again = run_tiny("pad", **NO_FILTER, scores=run / "scores_1.jsonl")
    assert_same_weights(run, again)


def assert_same_weights(one, other):
    weights = load_file(other / "model/model.safetensors")
    for name, weight in load_file(one / "model/model.safetensors").items():
        assert torch.equal(weight, weights[name]), name


def test_scores_of_a_former_run_give_the_same_weights(run_tiny):
    first = run_tiny("pad", **NO_FILTER, max_steps=3)
    scores = first / "scores_1.jsonl"
    again = run_tiny("pad", **NO_FILTER, max_steps=3, scores=scores, data="/nowhere")
    assert_same_weights(first, again)
    assert not (again / "samples_1.jsonl").exists()
    first_scores = [row["score"] for row in read_jsonl(scores)]
    assert [row["score"] for row in read_jsonl(again / "scores_1.jsonl")] == first_scores


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.9])
def test_scores_of_another_program_are_weighed_with_this_runs_alpha(
    checkpoints, pairs, run_tiny, tmp_path, alpha
):
    rows = []
    for row in samples_and_scores(pairs, [[0.9, 0.5, 0.1], [0.2, 0.5, 0.51]])[1]:
        row["prompt"] = f"say {len(rows)}"
        row["answers"] = [answer["text"] for answer in row["answers"]]
        del row["id"]
        rows.append(row)
    path = write_jsonl(tmp_path / "other.jsonl", rows)
    run = run_tiny("pad", **{**TINY, "alpha": alpha}, scores=path)

    written = read_jsonl(run / "scores_1.jsonl")
    for row, result in zip(rows, written, strict=True):
        expected = slow_score(row["average_logp"], row["judgement"], alpha)
        assert result["score"] == pytest.approx(expected, rel=1e-12)
        row["id"] = result["id"]
        row["prompt"] = [{"role": "user", "content": row["prompt"]}]
    value, _ = slow_step(checkpoints["student"], rows, ppd, beta=2.0, alpha=alpha)
    [row] = training_rows(run)
    assert row["losses/total"] == pytest.approx(value, rel=1e-4)
    assert row["charts/judge_kept"] == 1


def test_later_rounds_do_not_learn_from_given_scores(run_tiny):
    flags = {**NO_FILTER, "num_answers": 4, "rounds": 2, "max_steps": 4}
    whole = run_tiny("pad", **flags)
    run = run_tiny("pad", **flags, scores=whole / "scores_1.jsonl")
    assert_same_weights(whole, run)
    assert not (run / "samples_1.jsonl").exists()
    assert len(read_jsonl(run / "samples_2.jsonl")) == 8


SPOILT = {
    "no average_logp": {"average_logp": None},
    "no judgement": {"judgement": None},
    "no p_a": {"p_a": None},
    "no p_b": {"p_b": None},
    "a judgement too few": {"judgement": [0.9, 0.1]},
    "an average too few": {"average_logp": [-1.0, -2.0]},
    "a judgement of 0": {"judgement": [0.9, 0.1, 0.0]},
    "an average of −∞": {"average_logp": [-1.0, -2.0, -math.inf]},
    "a NaN": {"judgement": [0.9, 0.1, math.nan]},
    "a text among numbers": {"p_a": [0.5, "0.25", 0.0]},
    "an answer that is no text": {"answers": [1, 2, 3]},
}


@pytest.fixture
def run_on_scores(checkpoints, pairs, tmp_path):
    """run_on_scores(columns) gives every row of --scores these columns, and returns the code."""

    def run(columns: dict) -> int:
        _, scores = samples_and_scores(pairs, JUDGED)
        path = write_jsonl(tmp_path / "other.jsonl", [{**row, **columns} for row in scores])
        return run_script(
            "pad",
            **TINY,
            student=checkpoints["student"],
            teacher=checkpoints["teacher"],
            eval_data=pairs,
            eval_prompts=2,
            reward="conftest:vowels",
            scores=path,
            output_dir=tmp_path / "run",
        )

    return run


def error_line(text: str) -> str:
    """The only error among what was printed to stderr, which is no traceback."""
    assert "Traceback" not in text
    [line] = [line for line in text.splitlines() if "error: " in line]
    return line


@pytest.mark.parametrize("spoilt", SPOILT)
def test_scores_that_lack_something_are_one_line(spoilt, run_on_scores, capsys):
    assert run_on_scores(SPOILT[spoilt]) == 2
    error = error_line(capsys.readouterr().err)
    assert "--scores" in error and "other.jsonl, row 1: " in error
    [column] = SPOILT[spoilt]
    words = {"answers": "an answer must be a text"}
    assert words.get(column, f"column {column}") in error


TWO = [0.9, 0.1]
TWO_ANSWERS = {"answers": finished("yes", "no"), "average_logp": TWO, "judgement": TWO}


@pytest.mark.parametrize("columns", [{"answers": None}, TWO_ANSWERS])
def test_scores_without_n_answers_leave_no_row(columns, run_on_scores, capsys):
    assert run_on_scores(columns) == 2
    out, error = capsys.readouterr()
    assert "answers differ" not in out
    assert "none of 8 has 3 different answers" in error_line(error)
    assert "take another --scores" in error


def test_r29_a_student_that_is_its_teacher_has_divergence_zero(checkpoints, pairs, feed):
    samples, _ = samples_and_scores(pairs, JUDGED)
    run, _ = feed({"samples_1.jsonl": samples}, alpha=1.0, teacher=checkpoints["student"])
    [row] = training_rows(run)
    assert row["losses/total"] == pytest.approx(0, abs=1e-6)
    assert row["charts/grad_norm"] < 1e-3


def test_r88_a_filter_that_keeps_nothing_says_what_the_judge_did_and_what_helps(
    pairs, checkpoints, feed, capsys
):
    """p(A) is 1/4 on average and p(B) 1/3, so A has 3 of 7 parts. The reply is what transformers
    writes greedily."""
    samples, scores = samples_and_scores(pairs, [[0.4, 0.3, 0.2]])
    folder, code = feed({"samples_1.jsonl": samples, "scores_1.jsonl": scores}, alpha=0.5)
    captured = capsys.readouterr()
    assert code == 2
    assert "8 of 8 prompts have 3 different answers; 0 kept" in captured.out
    error = error_line(captured.err)
    assert "in none of 8" in error
    assert "p(A) + p(B) is 0.58 on average, of which A has 43%" in error
    for advice in ("a larger --teacher", "--alpha 1", f"--scores {folder}/scores_1.jsonl"):
        assert advice in error

    lm = LM(checkpoints["teacher"], CPU)
    question = {"prompt": samples[0]["prompt"][0]["content"], "a": "yes", "b": "no"}
    chat = [{"role": "user", "content": JUDGE_PROMPT.format(**question)}]
    ids = lm.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    written = lm.model.generate(
        torch.tensor([ids]), max_new_tokens=16, do_sample=False, eos_token_id=5, pad_token_id=5
    )[0, len(ids) :]
    reply = lm.tokenizer.decode(written, skip_special_tokens=True)
    shown = repr(reply if len(reply) <= 60 else reply[:60] + "…")
    assert f"it replies {' '.join(shown.split())};" in error

    # The advice can be followed: these answers, with α = 1, are learned from.
    _, code = feed({}, scores=f"{folder}/scores_1.jsonl", alpha=1.0, num_answers=3)
    assert code == 0


def test_r88_scores_of_another_program_that_the_filter_drops_need_no_reply(pairs, feed, capsys):
    _, scores = samples_and_scores(pairs, [[0.4, 0.3, 0.2]])
    file, _ = feed({"scores_1.jsonl": scores}, alpha=1.0, max_steps=1)
    capsys.readouterr()
    _, code = feed({}, scores=f"{file}/scores_1.jsonl", alpha=0.5)
    error = error_line(capsys.readouterr().err)
    assert code == 2
    assert "in none of 8" in error and "it replies" not in error
    assert f"goes on with --scores {file}/scores_1.jsonl" in error


def test_r89_prompts_without_enough_different_answers_say_how_many_there_are(pairs, feed, capsys):
    samples, _ = samples_and_scores(pairs, JUDGED)
    samples = [{**row, "answers": finished("one")} for row in samples]
    _, code = feed({"samples_1.jsonl": samples})
    error = error_line(capsys.readouterr().err)
    assert code == 2
    assert "none of 8 has 3 different answers (the most are 1)" in error
    prompt = samples[0]["prompt"][0]["content"]
    assert f"to {prompt!r} there is 'one'; take a higher --sample_temperature" in error


# ---------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    "flags, words",
    [
        ({"num_answers": 1}, "--num_answers 1 / --rounds 1 must be 2 to 6"),
        ({"num_answers": 7, "num_samples": 9}, "must be 2 to 6"),
        ({"num_answers": 4, "rounds": 4}, "--num_answers 4 / --rounds 4 must be 2 to 6"),
        ({"num_answers": 5, "rounds": 2}, "--num_answers 5 / --rounds 2"),
        ({"rounds": 0}, "--rounds 0"),
        ({"num_answers": 6}, "--num_samples 5 must be at least 6"),
        ({"alpha": 1.5}, "--alpha 1.5 must be at most 1"),
    ],
)
def test_r47_numbers_of_answers_that_make_no_sense_are_refused(flags, words, tmp_path, capsys):
    assert run_script("pad", student="/nowhere", output_dir=tmp_path / "run", **flags) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_more_rounds_than_steps_are_refused(tmp_path, capsys):
    """Of two rounds that share one step, the second would have none."""
    flags = {"data": first_rows("train", 8, tmp_path), "eval_prompts": 2, "alpha": 1}
    flags |= {"max_steps": 1, "rounds": 2, "output_dir": tmp_path / "run"}
    assert run_script("pad", **flags) == 2
    assert "too few for --rounds 2" in capsys.readouterr().err


FLOATS = ["beta", "alpha", "sample_temperature"]
INTEGERS = ["num_answers", "rounds", "num_samples", "max_rows"]


@pytest.mark.parametrize(
    "flag, value",
    [*itertools.product(FLOATS, ["nan", "inf", "-0.5"]), *itertools.product(INTEGERS, ["-1"])],
)
def test_r47_what_is_no_number_of_at_least_0_is_refused(flag, value, tmp_path, capsys):
    flags = {flag: value}
    assert run_script("pad", student="/nowhere", output_dir=tmp_path / "run", **flags) == 2
    error = capsys.readouterr().err
    assert f"--{flag} {value} must be a number" in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------ rounds
ROUNDS = {
    "rounds": 2,
    "num_answers": 4,
    "max_steps": 12,
    "batch_size": 8,
    "micro_batch_size": 4,
    "eval_prompts": 8,
    "sample_batch_size": 16,
    "log_every": 1,
    "eval_every": 100,
    "save_every": 4,
    "num_samples": 3,
}


def lines_in(path) -> int:
    if not path.exists():
        return 0
    return path.read_bytes().count(b"\n")


def kill_in(process: ScriptProcess, path, lines=2) -> int:
    """SIGKILL once so many lines of a file are written. Returns how many there are."""
    deadline = time.time() + 200
    while lines_in(path) < lines:
        assert process.is_running() and time.time() < deadline, process.output()
        time.sleep(0.002)
    process.kill()
    return lines_in(path)


def saved_step(run) -> int:
    """The step of the run's checkpoint, -1 if there is none."""
    path = run / "checkpoint.pt"
    if not path.exists():
        return -1
    return torch.load(path, weights_only=True)["step"]


def without_clock(run) -> list[dict]:
    rows = training_rows(run)
    for row in rows:
        row.pop("charts/tokens_per_second", None)
    return rows


def share_kept(scores: list[dict], prompts: int) -> float:
    """The share of prompts that pass the filter."""
    kept = [row for row in scores if min(row["judgement"]) <= 0.5 < max(row["judgement"])]
    return len(kept) / prompts


@pytest.mark.slow
def test_r36_rounds_and_runs_that_are_killed_in_every_stage_of_them(tmp_path):
    lines = (ROOT / "playground/data/train.jsonl").read_text().splitlines(keepends=True)[:64]
    (tmp_path / "data.jsonl").write_text("".join(lines))
    flags = {**ROUNDS, "data": tmp_path / "data.jsonl"}
    whole = tmp_path / "whole"
    run = tmp_path / "run"
    assert run_script("pad", **flags, output_dir=whole) == 0
    counts = {path.name: lines_in(path) for path in whole.glob("*_?.jsonl")}
    stage_files = {"samples_1.jsonl", "scores_1.jsonl", "samples_2.jsonl", "scores_2.jsonl"}
    assert set(counts) == stage_files

    # Each round has half of the answers. Those of the second are of another student, and are judged
    # and learned from after step 6.
    first = read_jsonl(whole / "scores_1.jsonl")
    second = read_jsonl(whole / "scores_2.jsonl")
    assert {len(row["answers"]) for row in first + second} == {2}
    first_answers = {row["id"]: row["answers"] for row in first}
    second_answers = {row["id"]: row["answers"] for row in second}
    in_both = first_answers.keys() & second_answers.keys()
    changed = [row_id for row_id in in_both if first_answers[row_id] != second_answers[row_id]]
    assert len(changed) > 50
    logged = [row["charts/judge_kept"] for row in training_rows(whole)]
    assert logged == pytest.approx([share_kept(first, 64)] * 6 + [share_kept(second, 64)] * 6)

    # The answers of the second round are of a student that is kept.
    process = ScriptProcess("pad", {**flags, "output_dir": run})
    for name, step in (("scores_1.jsonl", -1), ("samples_2.jsonl", 6), ("scores_2.jsonl", 6)):
        assert 1 < kill_in(process, run / name) < counts[name], name
        assert saved_step(run) == step
        process = ScriptProcess("pad", {"resume": run})
    # In the midst of the second round.
    assert kill_in(process, run / "metrics.jsonl", lines=11) < 13
    assert saved_step(run) == 8
    process = ScriptProcess("pad", {"resume": run})
    assert process.wait(200) == 0, process.output()

    assert_same_weights(run, whole)
    for name in counts:
        written = (run / name).read_text().splitlines()
        assert sorted(written) == sorted((whole / name).read_text().splitlines()), name
    assert without_clock(run) == without_clock(whole)


def test_the_second_round_samples_from_the_student_of_the_first(checkpoints, pairs, run_tiny):
    """With a learning rate of 0 that is the same student, with a seed of its own for each round."""
    flags = {**NO_FILTER, "num_answers": 4, "rounds": 2, "max_steps": 2}
    run = run_tiny("pad", **flags, learning_rate=0)
    lm = LM(checkpoints["student"], CPU)
    prompts = [lm.prompt_ids(row["prompt"]) for row in prompts_of(pairs)]
    for number in (1, 2):
        seed = 1 + number * len(prompts)
        sampled = lm.sample(prompts, n=6, max_new_tokens=12, batch_size=256, seed=seed)
        for row, samples in zip(read_jsonl(run / f"samples_{number}.jsonl"), sampled, strict=True):
            assert all(answer in samples for answer in row["answers"])


# ------------------------------------------------------------------------------------------- speed
@pytest.mark.slow
def test_a_step_is_three_times_as_fast_as_one_row_per_answer(tmp_path):
    """Prompts are about twice as long as answers, which differ in length as real ones do."""
    vocab_size = 32_768
    model = make_model(vocab_size, width=256, layers=4, initializer_range=0.05)
    lm = LM(save(tmp_path, make_tokenizer(), model), CPU, trainable=True)
    shapes = [(200, [140, 40, 90, 110]), (180, [100, 50, 120, 60]), (150, [60, 90, 40, 80])]
    examples = random_examples(400, shapes)
    teacher = torch.randn(3, 4)
    seconds = {packed_averages: [], padded_averages: []}
    losses = {}
    for _ in range(5):
        # Turn by turn, so that other work on the machine slows both.
        for averages in (packed_averages, padded_averages):
            lm.model.zero_grad()
            started = time.process_time()
            student = averages(lm, examples, vocab_size).view(3, 4)
            loss = ppd(2 * student, 2 * teacher).mean()
            loss.backward()
            seconds[averages].append(time.process_time() - started)
            losses[averages] = loss.item()
    packed = statistics.median(seconds[packed_averages])
    padded = statistics.median(seconds[padded_averages])
    print(f"packed {packed:.2f} s, padded {padded:.2f} s: {padded / packed:.1f} times")
    assert losses[packed_averages] == pytest.approx(losses[padded_averages], abs=1e-5)
    assert padded > 3 * packed, f"packed {packed:.2f} s, padded {padded:.2f} s"
