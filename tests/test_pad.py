"""pad.py: rankings, judgements and losses against brute force in float64; its stages against plain forward passes; runs
that are fed, killed and resumed across rounds; a teacher with another tokenizer."""

import itertools
import json
import math
import os
import random
import signal
import statistics
import subprocess
import sys
import time

import pytest
import torch
from conftest import (
    ROOT,
    first_gradient,
    make_model,
    make_tokenizer,
    packed_averages,
    padded_averages,
    plain_log_probs,
    random_examples,
    read_jsonl,
    run_script,
    save,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from common import LM, make_examples, read_rows
from pad import JUDGE, Args, edit_distance, judgements, most_different, ppd, ranking_logps, vpd

CPU = torch.device("cpu")
SIZES = pytest.mark.parametrize("n", range(2, 6))


def random_scores(n, rows=4, seed=0, scale=1.5) -> torch.Tensor:
    return scale * torch.randn(
        rows, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


def slow_rankings(scores: list[float]) -> dict[tuple, float]:
    """{ranking: probability}, a product of one softmax after the other over the answers that are left."""
    result = {}
    for ranking in itertools.permutations(range(len(scores))):
        probability = 1.0
        for k, i in enumerate(ranking):
            probability *= math.exp(scores[i]) / sum(math.exp(scores[j]) for j in ranking[k:])
        result[ranking] = probability
    return result


def slow_ppd(student: list[float], teacher: list[float]) -> float:
    p, q = slow_rankings(student), slow_rankings(teacher)
    mixture = {ranking: (p[ranking] + q[ranking]) / 2 for ranking in p}
    kl = [sum(x[r] * math.log(x[r] / mixture[r]) for r in x) for x in (p, q)]
    return sum(kl) / 2


def slow_vpd(student: list[float], teacher: list[float]) -> float:
    best_first = tuple(sorted(range(len(teacher)), key=lambda i: -teacher[i]))
    return -math.log(slow_rankings(student)[best_first])


# ----------------------------------------------------------------------------------------------- rankings and losses
@SIZES
def test_rankings_equal_brute_force_and_their_probabilities_sum_to_one(n):
    scores = random_scores(n)
    probs = ranking_logps(scores).exp()
    assert probs.shape == (4, math.factorial(n))
    assert probs.sum(-1).tolist() == pytest.approx([1.0] * 4, abs=1e-12)
    for row, ours in zip(scores.tolist(), probs.tolist()):
        assert ours == pytest.approx(list(slow_rankings(row).values()), abs=1e-12)


@SIZES
def test_equal_scores_make_all_rankings_equally_likely(n):
    logps = ranking_logps(torch.full((1, n), 0.7, dtype=torch.float64))
    assert torch.allclose(logps, torch.full_like(logps, -math.log(math.factorial(n))), atol=1e-12)


def test_two_answers_are_bradley_terry():
    scores, teacher = random_scores(2), random_scores(2, seed=1)
    margins = scores[:, 0] - scores[:, 1]
    assert torch.allclose(
        ranking_logps(scores)[:, 0], torch.nn.functional.logsigmoid(margins), atol=1e-12
    )
    signed = torch.where(teacher[:, 0] > teacher[:, 1], margins, -margins)
    assert torch.allclose(vpd(scores, teacher), -torch.nn.functional.logsigmoid(signed), atol=1e-12)


def test_the_likeliest_ranking_is_the_descending_order():
    for row in random_scores(4, rows=20).tolist():
        rankings = slow_rankings(row)
        assert list(max(rankings, key=rankings.get)) == sorted(range(4), key=lambda i: -row[i])
        [logps] = ranking_logps(torch.tensor([sorted(row, reverse=True)]))
        assert logps.argmax() == 0  # the first ranking is the order in which the scores stand


@SIZES
@pytest.mark.parametrize("seed", range(3))
def test_losses_equal_brute_force(n, seed):
    student, teacher = random_scores(n, seed=seed), random_scores(n, seed=seed + 50)
    pairs = list(zip(student.tolist(), teacher.tolist()))
    assert ppd(student, teacher).tolist() == pytest.approx(
        [slow_ppd(*pair) for pair in pairs], abs=1e-12
    )
    assert vpd(student, teacher).tolist() == pytest.approx(
        [slow_vpd(*pair) for pair in pairs], abs=1e-12
    )
    assert ppd(student.float(), teacher.float()).tolist() == pytest.approx(
        [slow_ppd(*pair) for pair in pairs], abs=1e-5
    )


@SIZES
@pytest.mark.parametrize("loss", [ppd, vpd])
def test_a_constant_on_all_scores_and_the_order_of_answers_change_nothing(n, loss):
    student, teacher = random_scores(n), random_scores(n, seed=1)
    expected = loss(student, teacher)
    assert torch.allclose(loss(student + 3.0, teacher - 7.0), expected, atol=1e-11)
    for order in itertools.islice(itertools.permutations(range(n)), 1, 8):
        assert torch.allclose(loss(student[:, order], teacher[:, order]), expected, atol=1e-11)


@SIZES
def test_r25_the_divergence_lies_between_0_and_log_2_and_is_symmetric(n):
    for scale in (0.01, 1.0, 30.0, 1000.0):
        student, teacher = (
            random_scores(n, seed=2, scale=scale),
            random_scores(n, seed=3, scale=scale),
        )
        values = ppd(student, teacher)
        assert torch.allclose(values, ppd(teacher, student), atol=1e-12)
        assert (values >= -1e-12).all() and (values <= math.log(2) + 1e-12).all()
    opposite = torch.tensor([[1000.0 * i for i in range(n)]], dtype=torch.float64)
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
    student = torch.tensor([[math.log(3.0), 0.0]], dtype=torch.float64)
    kl_student = 0.75 * math.log(0.75 / 0.625) + 0.25 * math.log(0.25 / 0.375)
    kl_teacher = 0.5 * math.log(0.5 / 0.625) + 0.5 * math.log(0.5 / 0.375)
    expected = (kl_student + kl_teacher) / 2
    assert ppd(student, torch.zeros(1, 2, dtype=torch.float64)).item() == pytest.approx(
        expected, abs=1e-12
    )
    assert expected == pytest.approx(0.033822, abs=1e-6)


@SIZES
@pytest.mark.parametrize("loss", [ppd, vpd])
def test_gradients(n, loss):
    student, teacher = random_scores(n, rows=2).requires_grad_(), random_scores(n, rows=2, seed=1)
    assert torch.autograd.gradcheck(lambda scores: loss(scores, teacher), student)


@pytest.mark.parametrize("loss", [ppd, vpd])
def test_r10_scores_as_far_apart_as_excluded_tokens_make_them_give_no_nan(loss):
    student = torch.tensor([[-2e4, -1.0, -2.0], [-1.0, -2.0, -3.0]], requires_grad=True)
    teacher = torch.tensor([[-1.0, -2e4, -2e4], [-1.0, -2.0, -2e4]])
    values = loss(student, teacher)
    values.sum().backward()
    assert values.isfinite().all() and student.grad.isfinite().all()


def test_every_prompt_counts_by_itself():
    student, teacher = random_scores(4), random_scores(4, seed=1)
    for loss in (ppd, vpd):
        alone = torch.cat([loss(student[i : i + 1], teacher[i : i + 1]) for i in range(4)])
        assert torch.allclose(loss(student, teacher), alone, atol=1e-14)


def test_the_released_divergence_is_unbounded_and_mixes_prompts():
    """The numbers of docs/pad.md: swapped arguments of the KL, and one mixture for all prompts of a micro-batch."""
    from playground.released import divergence_from_a_shared_mixture as released

    ranked = torch.tensor([[0.0, -1.0, -2.0, -3.0]], dtype=torch.float64)
    for beta, ours, theirs in ((1, 0.577, 1.601), (2, 0.688, 4.773), (10, 0.693, 29.306)):
        reverse = ranked.flip(-1)
        assert ppd(beta * ranked, beta * reverse).item() == pytest.approx(ours, abs=1e-3)
        assert released(beta * ranked, beta * reverse).item() == pytest.approx(theirs, abs=1e-3)
    both = torch.cat(
        [2 * ranked, 2 * ranked.flip(-1)]
    )  # a student that agrees with its teacher on two prompts
    assert ppd(both, both).tolist() == pytest.approx([0, 0], abs=1e-12)
    assert released(both, both).tolist() == pytest.approx([4.773, 4.773], abs=1e-3)
    assert released(both[:1], both[:1]).item() == pytest.approx(0, abs=1e-12)


# ------------------------------------------------------------------------------------------------ choice and judgement
def slow_distance(a, b) -> int:
    if not a or not b:
        return len(a) + len(b)
    options = (
        slow_distance(a[1:], b) + 1,
        slow_distance(a, b[1:]) + 1,
        slow_distance(a[1:], b[1:]) + (a[0] != b[0]),
    )
    return min(options)


def test_edit_distance():
    assert (
        edit_distance("kitten", "sitting") == 3
        and edit_distance("", "abc") == 3
        and edit_distance("abc", "") == 3
    )
    rng = random.Random(0)
    for _ in range(200):
        a, b = (rng.choices(range(3), k=rng.randrange(6)) for _ in range(2))
        assert edit_distance(a, b) == edit_distance(b, a) == slow_distance(a, b), (a, b)


def test_the_most_different_are_taken_one_by_one():
    texts = ["aaaa", "aaab", "bbbb", "abbb", "cc"]
    assert most_different(texts, 2) == [
        "aaaa",
        "bbbb",
    ]  # "cc" is as far; the first of equals is taken
    assert most_different(texts, 3) == ["aaaa", "bbbb", "cc"]
    assert most_different(texts, 9) == most_different(texts, 5) and sorted(
        most_different(texts, 5)
    ) == sorted(texts)
    assert most_different([], 2) == [] and most_different(["a"], 2) == ["a"]
    rng = random.Random(1)
    for _ in range(50):
        pool = list({tuple(rng.choices(range(4), k=rng.randrange(1, 7))) for _ in range(6)})
        taken = most_different(pool, 4)
        assert taken[0] == pool[0] and len(set(taken)) == min(4, len(pool))
        for k in range(1, len(taken)):
            nearest = {one: min(edit_distance(one, other) for other in taken[:k]) for one in pool}
            assert nearest[taken[k]] == max(nearest.values())


@pytest.mark.parametrize("n", range(2, 7))
@pytest.mark.parametrize("both_orders", [False, True])
def test_judgements_equal_a_slow_loop(n, both_orders):
    pairs = list((itertools.permutations if both_orders else itertools.combinations)(range(n), 2))
    draw = (
        torch.rand(
            2, 3, len(pairs), generator=torch.Generator().manual_seed(n), dtype=torch.float64
        )
        / 2
    )
    ours = judgements(*draw, pairs, n)
    for row in range(3):
        for i in range(n):
            total = 0.0
            for pair, p_a, p_b in zip(pairs, *draw[:, row].tolist()):
                total += (p_a if pair[0] == i else p_b if pair[1] == i else 0.0) / (
                    2 if both_orders else 1
                )
            assert ours[row, i].item() == pytest.approx(
                math.log((1e-8 + total) / (n - 1)), abs=1e-12
            )


def test_a_judge_that_always_says_a_prefers_nobody_once_both_orders_are_asked():
    n, always = 4, lambda pairs: (torch.ones(1, len(pairs)), torch.zeros(1, len(pairs)))
    once, both = (
        list(itertools.combinations(range(n), 2)),
        list(itertools.permutations(range(n), 2)),
    )
    [biased], [fair] = (
        judgements(*always(once), once, n).exp().tolist(),
        judgements(*always(both), both, n).exp(),
    )
    assert biased == pytest.approx([1, 2 / 3, 1 / 3, 0], abs=1e-6)
    assert fair.tolist() == pytest.approx([0.5] * n)


def test_a_judge_that_never_names_an_answer_leaves_a_finite_score():
    [scores] = judgements(torch.zeros(1, 1), torch.zeros(1, 1), [(0, 1)], 2)
    assert scores.tolist() == pytest.approx([math.log(1e-8)] * 2)


# ----------------------------------------------------------------------------------- stages and a step of the script
TINY = {
    "alpha": 0.6,
    "max_response_tokens": 12,
    "num_samples": 6,
    "micro_batch_size": 3,
    "num_answers": 3,
}
NO_FILTER = {
    "alpha": 1
}  # random teachers favour neither A nor B, so their judgement would keep no prompt


def slow_scores(teacher: LM, row: dict, alpha: float, both_orders=False) -> dict:
    """What the teacher says of a row's answers, one plain forward pass after the other."""
    n, text = len(row["answers"]), "\n".join(turn["content"] for turn in row["prompt"])
    prompt, responses = teacher.encode(row["prompt"], row["answers"])
    averages = []
    for response in responses:
        log_probs = plain_log_probs(teacher.model, prompt, response, teacher.vocab_size)
        averages.append(
            statistics.mean(log_probs[t, token].item() for t, token in enumerate(response))
        )
    reading = {"A": [], "B": []}
    for token in range(teacher.vocab_size):
        reading.get(teacher.tokenizer.decode([token]).strip(), []).append(token)
    pairs = list((itertools.permutations if both_orders else itertools.combinations)(range(n), 2))
    p_a, p_b, sums = [], [], [0.0] * n
    for a, b in pairs:
        question = JUDGE.format(
            prompt=text, a=row["answers"][a]["text"], b=row["answers"][b]["text"]
        )
        ids, _ = teacher.encode([{"role": "user", "content": question}])
        with torch.no_grad():
            probs = (
                teacher.model(torch.tensor([ids]))
                .logits[0, -1, : teacher.vocab_size]
                .double()
                .softmax(-1)
            )
        p_a.append(probs[reading["A"]].sum().item())
        p_b.append(probs[reading["B"]].sum().item())
        sums[a] += p_a[-1] / (1 + both_orders)
        sums[b] += p_b[-1] / (1 + both_orders)
    judged = [(1e-8 + total) / (n - 1) for total in sums]
    scores = [alpha * average + (1 - alpha) * math.log(j) for average, j in zip(averages, judged)]
    return {"average_logp": averages, "judgement": judged, "score": scores, "p_a": p_a, "p_b": p_b}


def assert_scores(run, teacher: LM, both_orders=False):
    alpha = json.loads((run / "args.json").read_text())["alpha"]
    rows = read_jsonl(run / "scores_1.jsonl")
    assert len(rows) >= 6
    for row in rows:
        for name, values in slow_scores(teacher, row, alpha, both_orders).items():
            assert row[name] == pytest.approx(values, rel=1e-3, abs=1e-5), name
    return rows


def test_the_answers_are_the_most_different_of_the_students_samples(checkpoints, pairs, run_tiny):
    run, lm = run_tiny("pad", **TINY | NO_FILTER), LM(checkpoints["student"], CPU)
    prompts = [row["prompt"] for row in read_rows(str(pairs), "train", ())]
    how = {"n": 6, "max_new_tokens": 12, "batch_size": 256, "seed": 1 + len(prompts)}
    sampled = lm.sample([lm.encode(prompt)[0] for prompt in prompts], **how)
    for row, said in zip(read_jsonl(run / "samples_1.jsonl"), sampled, strict=True):
        ids = {tuple(lm.tokenizer(answer["text"]).input_ids): answer for answer in said}
        assert row["answers"] == [ids[taken] for taken in most_different(list(ids), 3)]
        assert len({answer["text"] for answer in row["answers"]}) == 3


@pytest.mark.parametrize("both_orders", [False, True])
def test_scores_equal_plain_forward_passes_of_the_teacher(checkpoints, run_tiny, both_orders):
    run = run_tiny("pad", **TINY | NO_FILTER, swap_order=both_orders)
    [row, *_] = assert_scores(run, LM(checkpoints["teacher"], CPU), both_orders)
    assert len(row["p_a"]) == (6 if both_orders else 3)


def other_teacher(folder) -> str:
    """Another tokenizer, another vocabulary, no chat template: what its family writes behind a text, nothing shared."""
    tokenizer = make_tokenizer(
        vocab_size=330, chat=False, text="Answer A is better than Answer B: A, B or None. " * 50
    )
    return save(folder / "other_teacher", tokenizer, make_model(330, seed=7, width=48))


def test_a_teacher_with_another_tokenizer_reads_text(checkpoints, run_tiny, tmp_path):
    path = other_teacher(tmp_path)
    run = run_tiny("pad", **TINY | NO_FILTER, teacher=path)
    teacher, student = LM(path, CPU), LM(checkpoints["student"], CPU)
    [row, *_] = assert_scores(run, teacher)
    assert teacher.vocab_size != student.vocab_size
    assert (
        teacher.encode(row["prompt"], row["answers"])[1]
        != student.encode(row["prompt"], row["answers"])[1]
    )
    readings = [teacher.tokenizer.decode([token]) for token in range(teacher.vocab_size)]
    assert {"A", " A"} <= set(readings) and {"B", " B"} <= set(
        readings
    )  # several tokens read A, and all count


def slow_step(path: str, rows: list[dict], loss, beta: float, limit: int):
    """The mean loss over rows, and its gradient, in float64: one plain forward pass after the other."""
    lm, model = LM(path, CPU), AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    n, total = len(rows[0]["answers"]), 0.0
    examples = make_examples(
        lm, [row | dict(enumerate(row["answers"])) for row in rows], range(n), 512, limit
    )
    for row, prompt, responses in examples:
        ours = []
        for response in responses:
            logits = model(torch.tensor([prompt + response])).logits[
                0, len(prompt) - 1 : -1, : lm.vocab_size
            ]
            ours.append(logits.log_softmax(-1)[range(len(response)), response].mean())
        total = (
            total
            + loss(beta * torch.stack(ours)[None], beta * torch.tensor([row["score"]]).double())[0]
        )
    total = total / len(examples)
    return total.item(), torch.autograd.grad(total, list(model.parameters()))


@pytest.mark.parametrize("loss", [ppd, vpd])
@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_r04_a_step_equals_a_slow_loop_over_plain_forward_passes(checkpoints, run_tiny, loss, beta):
    run = run_tiny("pad", **TINY | NO_FILTER, loss=loss.__name__, beta=beta)
    value, gradient = slow_step(
        checkpoints["student"], read_jsonl(run / "scores_1.jsonl"), loss, beta, 12
    )
    [row] = read_jsonl(run / "metrics.jsonl")
    assert row["losses/total"] == pytest.approx(value, rel=1e-3)
    for ours, theirs in zip(first_gradient(run), gradient, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=5e-3, atol=1e-5)


# ------------------------------------------------------------------------------- files that were made elsewhere
@pytest.fixture
def feed(checkpoints, pairs, tmp_path):
    """feed({file name: rows}, flags): a run that finds files in its folder, as if killed with them there."""

    def run(files: dict[str, list[dict]], **flags):
        folder = tmp_path / f"fed{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        how = {
            "data": str(pairs),
            "eval_data": str(pairs),
            "eval_prompts": 2,
            "reward": "conftest:vowels",
        }
        how |= {
            "max_steps": 1,
            "log_every": 1,
            "student": checkpoints["student"],
            "teacher": checkpoints["teacher"],
        }
        args = Args(**{**how, **TINY, **flags, "output_dir": str(folder)})
        (folder / "args.json").write_text(json.dumps(vars(args)))
        for name, rows in files.items():
            (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return folder, run_script("pad", resume=folder)

    return run


def told(*texts) -> list[dict]:
    return [{"text": text, "finished": True} for text in texts]


def test_answers_of_another_engine_are_taken_in_any_order(checkpoints, pairs, feed, capsys):
    prompts = [
        {"id": row["id"], "prompt": row["prompt"]} for row in read_rows(str(pairs), "train", ())
    ]
    samples = [
        row | {"answers": told("yes", f"no {i}", "a thing")} for i, row in enumerate(prompts)
    ]
    samples[3]["answers"] = told("only one")
    run, code = feed({"samples_1.jsonl": samples[::-1]}, **NO_FILTER)
    assert code == 0 and "3 answers differ for 7 of 8 prompts, 7 kept" in capsys.readouterr().out
    assert read_jsonl(run / "samples_1.jsonl") == samples[::-1]
    rows = assert_scores(run, LM(checkpoints["teacher"], CPU))
    assert [row["answers"] for row in rows] == [
        row["answers"] for row in samples if len(row["answers"]) == 3
    ]
    run, code = feed(
        {"samples_1.jsonl": [row | {"prompt": "another"} for row in samples]}, **NO_FILTER
    )
    assert code == 2 and "samples_1.jsonl" in capsys.readouterr().err


def scored(pairs, judged: list[list[float]]) -> tuple[list[dict], list[dict]]:
    """Samples and scores of all prompts; the judgements are those given, in turn."""
    samples, scores = [], []
    for row, judgement in zip(read_rows(str(pairs), "train", ()), itertools.cycle(judged)):
        row = {"id": row["id"], "prompt": row["prompt"], "answers": told("yes", "no", "a thing")}
        p_a, p_b = [0.5, 0.25, 0.0], [0.25, 0.25, 0.5]
        scores.append(
            row | {"judgement": judgement, "score": [-1.0, -2.0, -3.0], "p_a": p_a, "p_b": p_b}
        )
        samples.append(row)
    return samples, scores


JUDGED = [
    [0.9, 0.5, 0.1],
    [0.51, 0.6, 0.7],
    [0.5, 0.4, 0.3],
    [0.2, 0.5, 0.51],
]  # kept, all good, none good, kept


@pytest.mark.parametrize("alpha, share", [(0.0, 0.5), (0.9, 0.5), (1.0, 1.0)])
def test_the_filter_and_what_is_said_of_the_judge(checkpoints, pairs, feed, capsys, alpha, share):
    samples, scores = scored(pairs, JUDGED)
    run, code = feed({"samples_1.jsonl": samples, "scores_1.jsonl": scores}, alpha=alpha)
    out = capsys.readouterr().out
    assert code == 0 and f"{8 * share:.0f} of {8 * share:.0f} rows" in out
    [row] = read_jsonl(run / "metrics.jsonl")
    facts = {"mass": 1.75 / 3, "p_a": 0.25, "kept": share}
    assert {name: row[f"charts/judge_{name}"] for name in facts} == pytest.approx(facts, abs=1e-4)
    assert f"{8 * share:.0f} kept; {{'mass': 0.5833, 'p_a': 0.25, 'kept': {share}}}" in out
    kept = [
        row
        for row, keep in zip(scores, itertools.cycle([True, False, False, True]))
        if keep or alpha == 1
    ]
    value, _ = slow_step(checkpoints["student"], kept, ppd, 2.0, 12)
    assert row["losses/total"] == pytest.approx(
        value, rel=1e-4
    )  # the scores of the file are what is learned


def same_weights(one, other):
    for name, weight in load_file(one / "model/model.safetensors").items():
        assert torch.equal(weight, load_file(other / "model/model.safetensors")[name]), name


def test_scores_of_a_former_run_give_the_same_weights(run_tiny):
    first = run_tiny("pad", **TINY | NO_FILTER, max_steps=3)
    again = run_tiny(
        "pad", **TINY | NO_FILTER, max_steps=3, scores=first / "scores_1.jsonl", data="/nowhere"
    )
    same_weights(first, again)
    assert not (again / "samples_1.jsonl").exists()
    rows = [read_jsonl(run / "scores_1.jsonl") for run in (first, again)]
    assert [row["score"] for row in rows[0]] == [row["score"] for row in rows[1]]


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.9])
def test_scores_of_another_program_are_weighed_with_this_runs_alpha(
    checkpoints, pairs, run_tiny, tmp_path, alpha
):
    rows = []
    for row in scored(pairs, [[0.9, 0.5, 0.1], [0.2, 0.5, 0.51]])[1]:
        row = {key: row[key] for key in ("answers", "judgement", "p_a", "p_b")} | {
            "average_logp": [-1.0, -2.0, -4.0]
        }
        rows.append(
            row
            | {"prompt": f"say {len(rows)}", "answers": [said["text"] for said in row["answers"]]}
        )
    (tmp_path / "told.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = run_tiny("pad", **TINY | {"alpha": alpha}, scores=tmp_path / "told.jsonl")
    for row in rows:
        said = zip(row["average_logp"], row["judgement"], strict=True)
        row["score"] = [
            alpha * average + (1 - alpha) * math.log(judgement) for average, judgement in said
        ]
        row["prompt"] = [{"role": "user", "content": row["prompt"]}]
    assert [row["score"] for row in read_jsonl(run / "scores_1.jsonl")] == [
        row["score"] for row in rows
    ]
    value, _ = slow_step(checkpoints["student"], rows, ppd, 2.0, 12)
    [row] = read_jsonl(run / "metrics.jsonl")
    assert row["losses/total"] == pytest.approx(value, rel=1e-4) and row["charts/judge_kept"] == 1


def test_later_rounds_do_not_learn_from_given_scores(run_tiny):
    flags = {**TINY, **NO_FILTER, "num_answers": 4, "rounds": 2, "max_steps": 4}
    whole = run_tiny("pad", **flags)
    run = run_tiny("pad", **flags, scores=whole / "scores_1.jsonl")
    same_weights(whole, run)
    assert not (run / "samples_1.jsonl").exists() and len(read_jsonl(run / "samples_2.jsonl")) == 8


def test_overwrite_does_not_remove_the_scores_that_it_reads(run_tiny, checkpoints, pairs, capsys):
    run = run_tiny("pad", **TINY | NO_FILTER)
    kept = (run / "scores_1.jsonl").read_bytes()
    flags = {
        **TINY,
        **NO_FILTER,
        "eval_data": pairs,
        "reward": "conftest:vowels",
        "eval_prompts": 2,
    }
    flags |= {name: checkpoints[name] for name in ("student", "teacher")}
    assert (
        run_script("pad", **flags, scores=run / "scores_1.jsonl", output_dir=run, overwrite=True)
        == 2
    )
    assert "--overwrite would remove --scores" in capsys.readouterr().err
    assert (run / "scores_1.jsonl").read_bytes() == kept


@pytest.mark.parametrize(
    "lacks", ["answers", "average_logp", "judgement", "p_a", "p_b", "a judgement", "an answer"]
)
def test_scores_that_lack_something_are_one_line(lacks, checkpoints, pairs, tmp_path, capsys):
    _, scores = scored(pairs, JUDGED)
    for row in scores:
        row["average_logp"] = [-1.0, -2.0, -4.0]
        if lacks.startswith("a "):
            row["judgement"] = row["judgement"][:2]
        elif lacks.startswith("an "):
            row |= {name: row[name][:2] for name in ("answers", "average_logp", "judgement")}
        else:
            del row[lacks]
    (tmp_path / "told.jsonl").write_text("".join(json.dumps(row) + "\n" for row in scores))
    flags = {name: checkpoints[name] for name in ("student", "teacher")} | {
        "eval_data": pairs,
        "eval_prompts": 2,
    }
    flags |= {
        **TINY,
        "reward": "conftest:vowels",
        "scores": tmp_path / "told.jsonl",
        "output_dir": tmp_path / "run",
    }
    assert run_script("pad", **flags) == 2
    out, error = capsys.readouterr()
    if "answer" in lacks:
        assert "3 answers differ for 0 of 8 prompts" in out and "no row left" in error
    else:
        assert (
            "told.jsonl" in error
            and "columns ('answers', 'average_logp', 'judgement', 'p_a', 'p_b')" in error
        )
    assert "Traceback" not in error and sum("error: " in line for line in error.splitlines()) == 1


def test_r29_a_student_that_is_its_teacher_has_divergence_zero(checkpoints, pairs, feed):
    samples, _ = scored(pairs, JUDGED)
    run, _ = feed({"samples_1.jsonl": samples}, **NO_FILTER, teacher=checkpoints["student"])
    [row] = read_jsonl(run / "metrics.jsonl")
    assert row["losses/total"] == pytest.approx(0, abs=1e-6) and row["charts/grad_norm"] < 1e-3


def test_a_filter_that_keeps_nothing_ends_the_run_with_the_counts(pairs, feed, capsys):
    samples, scores = scored(pairs, [[0.4, 0.3, 0.2]])
    _, code = feed({"samples_1.jsonl": samples, "scores_1.jsonl": scores}, alpha=0.5)
    captured = capsys.readouterr()
    assert (
        code == 2 and "'kept': 0.0" in captured.out and "no row left: 0 of 0 rows" in captured.err
    )
    samples = [row | {"answers": told("one")} for row in samples]
    _, code = feed({"samples_1.jsonl": samples})
    captured = capsys.readouterr()
    assert (
        code == 2
        and "3 answers differ for 0 of 8 prompts" in captured.out
        and "no row left" in captured.err
    )


# ------------------------------------------------------------------------------------------------------------ refusals
@pytest.mark.parametrize(
    "flags, words",
    [
        ({"num_answers": 1}, "--num_answers 1 / --rounds 1 must be 2 to 6"),
        ({"num_answers": 7, "num_samples": 9}, "more rounds"),
        ({"num_answers": 4, "rounds": 4}, "--num_answers 4 / --rounds 4 must be 2 to 6"),
        ({"num_answers": 5, "rounds": 2}, "--num_answers 5 / --rounds 2"),
        ({"rounds": 0}, "--rounds 0"),
        ({"num_answers": 6}, "--num_samples 5 must be at least 6"),
        ({"alpha": 1.5}, "--alpha 1.5 at most 1"),
    ],
)
def test_r47_numbers_of_answers_that_make_no_sense_are_refused(flags, words, tmp_path, capsys):
    assert run_script("pad", student="/nowhere", output_dir=tmp_path / "run", **flags) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


# -------------------------------------------------------------------------------------------------------------- rounds
ROUNDS = {
    "rounds": 2,
    "num_answers": 4,
    "max_steps": 12,
    "batch_size": 8,
    "micro_batch_size": 4,
    "eval_prompts": 8,
}
ROUNDS |= {
    "sample_batch_size": 16,
    "log_every": 1,
    "eval_every": 100,
    "save_every": 4,
    "num_samples": 3,
}


def start(**flags) -> subprocess.Popen:
    words = [word for flag, value in flags.items() for word in (f"--{flag}", str(value))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([sys.executable, "pad.py", *words], cwd=ROOT, env=environment, **pipes)


def kill_in(process: subprocess.Popen, path, lines=2) -> int:
    """SIGKILL once so many lines of a file are written; returns how many there are."""
    deadline = time.time() + 200
    while not (path.exists() and path.read_bytes().count(b"\n") >= lines):
        assert process.poll() is None and time.time() < deadline, process.communicate()[0]
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    return path.read_bytes().count(b"\n")


def test_r36_rounds_and_runs_that_are_killed_in_every_stage_of_them(tmp_path):
    lines = (ROOT / "playground/data/train.jsonl").read_text().splitlines(keepends=True)[:64]
    (tmp_path / "data.jsonl").write_text("".join(lines))
    flags = {**ROUNDS, "data": tmp_path / "data.jsonl"}
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert run_script("pad", **flags, output_dir=whole) == 0
    counts = {path.name: path.read_bytes().count(b"\n") for path in whole.glob("*_?.jsonl")}
    assert set(counts) == {"samples_1.jsonl", "scores_1.jsonl", "samples_2.jsonl", "scores_2.jsonl"}

    # of each round n / k answers, those of the second by another student, judged and learned from after step 6
    first, second = (read_jsonl(whole / f"scores_{turn}.jsonl") for turn in (1, 2))
    assert {len(row["answers"]) for row in first + second} == {2}
    ours, theirs = ({row["id"]: row["answers"] for row in rows} for rows in (first, second))
    assert sum(ours[id] != theirs[id] for id in ours.keys() & theirs.keys()) > 50
    rows = read_jsonl(whole / "metrics.jsonl")
    kept = [
        sum(min(row["judgement"]) <= 0.5 < max(row["judgement"]) for row in rows) / 64
        for rows in (first, second)
    ]
    assert [row["charts/judge_kept"] for row in rows] == pytest.approx(
        [kept[0]] * 6 + [kept[1]] * 6
    )

    process = start(**flags, output_dir=run)
    for name in ("scores_1.jsonl", "samples_2.jsonl", "scores_2.jsonl"):
        assert 1 < kill_in(process, run / name) < counts[name], name
        saved = run / "checkpoint.pt"  # the second round's answers are of a student that is kept
        assert saved.exists() == ("2" in name) and (
            "1" in name or torch.load(saved, weights_only=True)["step"] == 6
        )
        process = start(resume=run)
    assert kill_in(process, run / "metrics.jsonl", 10) < 12  # in the midst of the second round
    assert torch.load(saved, weights_only=True)["step"] == 8
    process = start(resume=run)
    assert process.wait(200) == 0, process.communicate()[0]
    process.communicate()
    for name, weight in load_file(run / "model" / "model.safetensors").items():
        assert torch.equal(weight, load_file(whole / "model" / "model.safetensors")[name]), name
    for name in counts:
        assert sorted((run / name).read_text().splitlines()) == sorted(
            (whole / name).read_text().splitlines()
        ), name
    for one, other in zip(
        *(read_jsonl(folder / "metrics.jsonl") for folder in (run, whole)), strict=True
    ):
        assert {key: one[key] for key in one if "tokens" not in key} == {
            k: other[k] for k in other if "tokens" not in k
        }


def test_the_second_round_samples_from_the_student_of_the_first(checkpoints, pairs, run_tiny):
    """With a learning rate of 0 that is the same student, with a seed of its own for every round."""
    flags = {**TINY, **NO_FILTER, "num_answers": 4, "rounds": 2, "max_steps": 2}
    run = run_tiny("pad", **flags, learning_rate=0)
    lm = LM(checkpoints["student"], CPU)
    prompts = [lm.encode(row["prompt"])[0] for row in read_rows(str(pairs), "train", ())]
    for turn in (1, 2):
        sampled = lm.sample(
            prompts, n=6, max_new_tokens=12, batch_size=256, seed=1 + turn * len(prompts)
        )
        for row, said in zip(read_jsonl(run / f"samples_{turn}.jsonl"), sampled, strict=True):
            assert all(answer in said for answer in row["answers"])


# --------------------------------------------------------------------------------------------------------------- speed
@pytest.mark.slow
def test_a_step_is_three_times_as_fast_as_one_row_per_answer(tmp_path):
    """Prompts about twice as long as answers, which differ in length as real ones do."""
    vocab_size = 32_768
    model = make_model(vocab_size, width=256, layers=4, initializer_range=0.05)
    lm = LM(save(tmp_path, make_tokenizer(), model), CPU, trains=True)
    examples = random_examples(
        400, [(200, [140, 40, 90, 110]), (180, [100, 50, 120, 60]), (150, [60, 90, 40, 80])]
    )
    teacher, times, losses = torch.randn(3, 4), {packed_averages: [], padded_averages: []}, {}
    for _ in range(5):
        for (
            averages,
            seconds,
        ) in times.items():  # turn by turn, so that other work on the machine slows both
            lm.model.zero_grad()
            begin = time.process_time()
            loss = ppd(2 * averages(lm, examples, vocab_size).view(3, 4), 2 * teacher).mean()
            loss.backward()
            seconds.append(time.process_time() - begin)
            losses[averages] = loss.item()
    packed, padded = (statistics.median(seconds) for seconds in times.values())
    print(f"packed {packed:.2f} s, padded {padded:.2f} s: {padded / packed:.1f} times")
    assert losses[packed_averages] == pytest.approx(losses[padded_averages], abs=1e-5)
    assert padded > 3 * packed, f"packed {packed:.2f} s, padded {padded:.2f} s"
