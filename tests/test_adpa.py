"""adpa.py: its loss against float64 loops, and one step of the real script against plain forward passes."""

import math

import pytest
import torch
from conftest import first_gradient, read_jsonl
from transformers import AutoModelForCausalLM

from adpa import advantages, expected_advantage
from common import LM, make_examples, read_rows


def random_log_probs(n=5, vocab=13, seed=0, scale=3.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(n, vocab, generator=generator, dtype=torch.float64)).log_softmax(-1)


# -------------------------------------------------------------------------------------------------------- mathematics
def test_advantage_of_two_tokens_by_hand():
    teacher, reference = (torch.tensor([[p, 1 - p]], dtype=torch.float64).log() for p in (0.8, 0.5))
    advantage = advantages(teacher, reference)
    assert advantage.tolist() == [pytest.approx([math.log(1.6), math.log(0.4)])]
    student = torch.tensor([[0.25, 0.75]], dtype=torch.float64).log()
    expected = 0.25 * math.log(1.6) + 0.75 * math.log(0.4)
    assert expected_advantage(student, advantage).item() == pytest.approx(expected)
    assert expected == pytest.approx(
        -0.569717, abs=1e-6
    )  # with the teachers exchanged it would be positive


@pytest.mark.parametrize("clip", [None, (-0.5, 2.0), (1e-8, 0.99999999)])
@pytest.mark.parametrize("top_k", [0, 1, 4, 13, 99])
@pytest.mark.parametrize("with_reference", [True, False])
def test_expected_advantage_equals_a_slow_loop(clip, top_k, with_reference):
    teacher, reference, student = (random_log_probs(seed=seed) for seed in (1, 2, 3))
    slow = []
    for t in range(len(teacher)):
        likeliest = sorted(range(13), key=lambda a, t=t: -teacher[t, a])[: top_k or 13]
        total = 0.0
        for a in likeliest:
            advantage = teacher[t, a].item() - (reference[t, a].item() if with_reference else 0.0)
            if clip:
                advantage = min(max(advantage, clip[0]), clip[1])
            total += math.exp(student[t, a].item()) * advantage
        slow.append(total)
    ours = expected_advantage(
        student, advantages(teacher, reference if with_reference else None, clip, top_k)
    )
    assert ours.tolist() == pytest.approx(slow, abs=1e-12)


def test_gradient_is_the_closed_form():
    """∂/∂z_a Σ π A = π_a (A_a − E_π[A])"""
    logits, advantage = random_log_probs(seed=1).requires_grad_(), random_log_probs(seed=2)
    expected_advantage(logits.log_softmax(-1), advantage).sum().backward()
    probs = logits.detach().softmax(-1)
    baseline = (probs * advantage).sum(-1, keepdim=True)
    assert torch.allclose(logits.grad, probs * (advantage - baseline), atol=1e-12)


def test_a_constant_changes_the_value_and_not_the_gradient():
    gradients, values = [], []
    for constant in (0.0, 7.0):
        logits = random_log_probs(seed=1).requires_grad_()
        value = expected_advantage(logits.log_softmax(-1), random_log_probs(seed=2) + constant)
        value.sum().backward()
        gradients.append(logits.grad)
        values.append(value.detach())
    assert torch.allclose(values[1] - values[0], torch.full_like(values[0], 7.0))
    assert torch.allclose(*gradients, atol=1e-12)


def test_r29_equal_teachers_have_advantage_zero():
    teacher = random_log_probs(seed=1)
    assert not advantages(teacher, teacher).any()
    assert not expected_advantage(random_log_probs(seed=2), advantages(teacher, teacher)).any()


def test_the_released_clip_makes_negative_advantages_nothing_and_large_ones_one():
    teacher, reference = random_log_probs(seed=1), random_log_probs(seed=2)
    plain, clipped = (
        advantages(teacher, reference),
        advantages(teacher, reference, (1e-8, 0.99999999)),
    )
    assert (plain < 0).any() and (plain > 1).any()
    assert torch.allclose(clipped, plain.clamp(0, 1), atol=2e-8)
    assert torch.equal(clipped, plain.clamp(1e-8, 1 - 1e-8))


def test_top_k_keeps_the_teachers_likeliest_tokens():
    teacher, reference = random_log_probs(seed=1), random_log_probs(seed=2)
    plain, cut = advantages(teacher, reference), advantages(teacher, reference, None, 4)
    assert ((cut != 0).sum(-1) == 4).all()
    assert torch.equal(cut[cut != 0], plain[cut != 0])
    assert (
        teacher.masked_fill(cut == 0, math.inf).amin(-1)
        > teacher.masked_fill(cut != 0, -math.inf).amax(-1)
    ).all()
    assert torch.equal(advantages(teacher, reference, None, 13), plain)


@pytest.mark.parametrize("top_k", [0, 3])
def test_r10_excluded_tokens_give_no_nan(top_k):
    inf = math.inf
    teacher = torch.tensor([[1.0, -inf, 0.5, -inf, 0.2]]).log_softmax(-1)
    reference = torch.tensor([[0.3, -inf, 0.1, 0.2, -inf]]).log_softmax(-1)
    logits = torch.tensor([[0.3, -inf, 0.1, 0.2, 0.4]], requires_grad=True)
    advantage = advantages(teacher, reference, None, top_k)
    kept = [0, 2]  # where both have a finite log-prob
    assert advantage[0, kept].tolist() == pytest.approx((teacher - reference)[0, kept].tolist())
    assert not advantage[0, [1, 3, 4]].any()
    value = expected_advantage(logits.log_softmax(-1), advantage)
    value.sum().backward()
    assert value.isfinite().all() and logits.grad.isfinite().all()


# -------------------------------------------------------------------------------------------- one step of the script
def slow_step(models: list[str], run, pairs, states="student", clip=None, top_k=0):
    """(sft, advantage), and the gradient of each, over all pairs, in float64: one plain forward pass after the other.
    `models` are student, teacher and perhaps teacher_ref; ŷ comes from the run's own file."""
    lm = LM(models[0], torch.device("cpu"))
    rows, file = read_rows(str(pairs), "train"), run / f"{states}_answers.jsonl"
    if file.exists():
        rows = [{**row, states: answer} for row, answer in zip(rows, read_jsonl(file), strict=True)]
    examples = make_examples(lm, rows, ("chosen", states), 512, 40)
    assert len(examples) >= 6  # noise of random models may take more than 40 tokens once it is text
    models = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64) for path in models]
    sft = advantage = 0.0
    for _, prompt, (chosen, state) in examples:
        for response in (chosen, state):
            log_probs = [
                model(torch.tensor([prompt + response])).logits[
                    0, len(prompt) - 1 : -1, : lm.vocab_size
                ]
                for model in models
            ]
            ours, *theirs = [values.log_softmax(-1) for values in log_probs]
            if response is chosen:
                sft = sft - sum(ours[t, token] for t, token in enumerate(response)) / len(response)
            if response is state:
                a = theirs[0] - theirs[1] if len(theirs) > 1 else theirs[0]
                a = a.detach().clamp(*clip) if clip else a.detach()
                for t in range(len(response)):
                    kept = theirs[0][t].topk(top_k or lm.vocab_size).indices
                    advantage = advantage + (ours[t, kept].exp() * a[t, kept]).sum() / len(response)
    terms, parameters = (
        (sft / len(examples), advantage / len(examples)),
        list(models[0].parameters()),
    )
    return [
        (term.item(), torch.autograd.grad(term, parameters, retain_graph=True)) for term in terms
    ]


def assert_gradient(run, expected):
    for ours, theirs in zip(first_gradient(run), expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=2e-3, atol=1e-4)


SETTINGS = {
    "as in the paper": {"gamma": 1.5},
    "no reference": {"gamma": 0.3, "teacher_ref": "none"},
    "released clip": {"advantage_clip": (1e-8, 0.99999999)},
    "top 5": {"top_k": 5},
    "on the chosen answers": {"states": "chosen"},
    "on the rejected answers": {"states": "rejected"},
    "on the teacher's answers": {"states": "teacher"},
    "greedy": {"sample_temperature": 0},
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_r04_a_step_equals_a_slow_loop_over_plain_forward_passes(
    checkpoints, pairs, run_tiny, setting
):
    flags = {"gamma": 0.5, "teacher_ref": checkpoints["teacher_ref"], **SETTINGS[setting]}
    run = run_tiny("adpa", **flags)
    models = [checkpoints["student"], checkpoints["teacher"], flags["teacher_ref"]]
    how = (flags.get("states", "student"), flags.get("advantage_clip"), flags.get("top_k", 0))
    (sft, of_sft), (advantage, of_advantage) = slow_step(
        [m for m in models if m != "none"], run, pairs, *how
    )
    [row] = read_jsonl(run / "metrics.jsonl")
    assert row["losses/sft"] == pytest.approx(sft, rel=1e-4)
    assert row["losses/advantage"] == pytest.approx(advantage, rel=2e-4)
    assert row["losses/total"] == pytest.approx(sft - flags["gamma"] * advantage, rel=2e-4)
    expected = [one - flags["gamma"] * other for one, other in zip(of_sft, of_advantage)]
    assert_gradient(run, expected)
    assert row["charts/grad_norm"] == pytest.approx(
        sum(g.square().sum() for g in expected).sqrt().item(), rel=1e-3
    )


def test_without_gamma_it_is_sft_on_the_chosen_answers(checkpoints, pairs, run_tiny):
    run = run_tiny("adpa", gamma=0, teacher_ref=checkpoints["teacher_ref"])
    (sft, of_sft), _ = slow_step(
        [checkpoints[m] for m in ("student", "teacher", "teacher_ref")], run, pairs
    )
    [row] = read_jsonl(run / "metrics.jsonl")
    assert row["losses/total"] == row["losses/sft"] == pytest.approx(sft, rel=1e-4)
    assert_gradient(run, of_sft)


def test_r29_a_teacher_that_is_its_own_reference_leaves_exactly_sft(checkpoints, run_tiny):
    sft = run_tiny("adpa", gamma=0, teacher_ref=checkpoints["teacher"])
    same = run_tiny("adpa", gamma=100, teacher_ref=checkpoints["teacher"])
    [row] = read_jsonl(same / "metrics.jsonl")
    assert row["losses/advantage"] == 0 and row["losses/total"] == row["losses/sft"]
    assert all(
        torch.equal(one, other)
        for one, other in zip(first_gradient(sft), first_gradient(same), strict=True)
    )


def test_no_preference_label_is_used_beyond_the_chosen_answer(
    checkpoints, pairs, run_tiny, tmp_path
):
    other = tmp_path / "other.jsonl"
    other.write_text(pairs.read_text().replace('"rejected": "', '"rejected": "x'))
    flags = {"teacher_ref": checkpoints["teacher_ref"], "gamma": 1}
    runs = [run_tiny("adpa", data=data, **flags) for data in (pairs, other)]
    gradients = [first_gradient(run) for run in runs]
    assert all(torch.equal(one, two) for one, two in zip(*gradients, strict=True))


@pytest.mark.parametrize("states", ["student", "teacher"])
def test_the_answers_of_stage_one_are_those_of_the_named_model(
    checkpoints, pairs, run_tiny, states
):
    run = run_tiny(
        "adpa", states=states, sample_temperature=0, teacher_ref=checkpoints["teacher_ref"]
    )
    lm = LM(checkpoints[states], torch.device("cpu"))
    rows = read_rows(str(pairs), "train")
    prompts = [lm.encode(row["prompt"])[0] for row in rows]
    expected = lm.sample(prompts, temperature=0, max_new_tokens=40, batch_size=3, seed=9)
    told = [
        {"text": row["text"], "finished": row["finished"]}
        for row in read_jsonl(run / f"{states}_answers.jsonl")
    ]
    assert told == [answers[0] for answers in expected]
    assert {row["id"] for row in read_jsonl(run / f"{states}_answers.jsonl")} == {
        row["id"] for row in rows
    }
