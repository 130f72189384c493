"""dckd.py: its loss against float64 loops, and one step of the real script against plain forward passes."""

import json
import math

import pytest
import torch
from conftest import first_gradient, read_jsonl
from transformers import AutoModelForCausalLM

from common import LM, make_examples, read_rows
from dckd import forward_kl, with_rest


def random_log_probs(n=5, vocab=13, seed=0, scale=3.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(n, vocab, generator=generator, dtype=torch.float64)).log_softmax(-1)


def slow_kl(teacher, student, top_k=0) -> list[float]:
    """One position and one token after the other; with top_k the teacher's k likeliest tokens, then all others."""
    result = []
    for ours, theirs in zip(student.exp().tolist(), teacher.exp().tolist()):
        order = sorted(range(len(theirs)), key=lambda a: -theirs[a])
        kept = order[: top_k or len(theirs)]
        events = [(theirs[a], ours[a]) for a in kept]
        if len(kept) < len(order):
            events.append(
                (sum(theirs[a] for a in order[top_k:]), sum(ours[a] for a in order[top_k:]))
            )
        result.append(sum(p * (math.log(p) - math.log(q)) for p, q in events if p > 0))
    return result


# -------------------------------------------------------------------------------------------------------- mathematics
def test_r24_forward_kl_of_two_tokens_by_hand():
    teacher, student = (torch.tensor([[p, 1 - p]], dtype=torch.float64).log() for p in (0.75, 0.5))
    assert forward_kl(teacher, student).item() == pytest.approx(
        0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    )
    assert forward_kl(teacher, student).item() == pytest.approx(
        0.130812, abs=1e-6
    )  # the other direction: 0.143841
    assert forward_kl(student, teacher).item() == pytest.approx(0.143841, abs=1e-6)


@pytest.mark.parametrize("top_k", [0, 1, 3, 12, 13, 99])
@pytest.mark.parametrize("seed", range(3))
def test_kl_equals_a_slow_loop(top_k, seed):
    teacher, student = random_log_probs(seed=seed), random_log_probs(seed=seed + 100)
    assert forward_kl(teacher, student, top_k).tolist() == pytest.approx(
        slow_kl(teacher, student, top_k), abs=1e-9
    )
    single = forward_kl(teacher.float(), student.float(), top_k).tolist()
    assert single == pytest.approx(slow_kl(teacher, student, top_k), abs=1e-5)


def test_gradient_is_the_difference_of_the_distributions():
    teacher, logits = random_log_probs(seed=1), random_log_probs(seed=2).requires_grad_()
    forward_kl(teacher, logits.log_softmax(-1)).sum().backward()
    assert torch.allclose(logits.grad, logits.detach().softmax(-1) - teacher.exp(), atol=1e-12)


@pytest.mark.parametrize("top_k", [0, 3])
def test_r29_kl_and_its_gradient_are_zero_where_student_and_teacher_agree(top_k):
    logits = random_log_probs().requires_grad_()
    kl = forward_kl(logits.detach().log_softmax(-1), logits.log_softmax(-1), top_k)
    kl.sum().backward()
    assert torch.allclose(kl, torch.zeros_like(kl), atol=1e-12)
    assert torch.allclose(logits.grad, torch.zeros_like(logits), atol=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_top_k_kl_grows_with_k_up_to_the_full_kl(seed):
    """Joining events can only lose divergence, and the bins of k + 1 split those of k."""
    teacher, student = random_log_probs(seed=seed), random_log_probs(seed=seed + 100)
    full = forward_kl(teacher, student)
    kls = [forward_kl(teacher, student, k) for k in range(1, 14)]
    assert all((less <= more + 1e-12).all() for less, more in zip(kls, [*kls[1:], full]))
    assert (kls[0] < full - 1e-3).any() and torch.equal(kls[-1], full)


@pytest.mark.parametrize("top_k", [0, 2, 3, 4])
def test_r10_excluded_tokens_give_no_nan(top_k):
    """A model that masks tokens has logits of −inf."""
    inf = math.inf
    teacher_logits = torch.tensor([[1.0, -inf, 0.5, -inf, 0.2], [2.0, 1.0, -inf, -inf, -inf]])
    logits = torch.tensor(
        [[0.3, -inf, 0.5, 0.1, 0.7], [0.1, 0.2, -inf, 0.4, -inf]], requires_grad=True
    )
    teacher, student = teacher_logits.log_softmax(-1), logits.log_softmax(-1)
    kl = forward_kl(teacher, student, top_k)
    assert kl.tolist() == pytest.approx(slow_kl_with_zeros(teacher, student, top_k), abs=1e-5)
    kl.sum().backward()
    assert logits.grad.isfinite().all()


def slow_kl_with_zeros(teacher, student, top_k):
    tiny = 1e-300  # where p is 0 the term is 0, so the student's value there does not matter
    return slow_kl(teacher.double(), student.double().exp().clamp(min=tiny).log(), top_k)


def test_a_rest_that_rounds_to_nothing_stays_finite():
    logits = torch.tensor(
        [[60.0, 0.0, -5.0, -9.0]], requires_grad=True
    )  # 1 − p rounds to 0 in float32
    for teacher, student in ((logits.detach(), torch.randn(1, 4)), (torch.randn(1, 4), logits)):
        kl = forward_kl(teacher.log_softmax(-1), student.log_softmax(-1), 1)
        assert kl.isfinite().all() and kl.item() > 0
    kl.sum().backward()
    assert logits.grad.isfinite().all()
    assert with_rest(torch.zeros(1, 1)).isfinite().all()


# -------------------------------------------------------------------------------------------- one step of the script
def slow_step(
    student: str, teacher: str, pairs, top_k=0
) -> tuple[dict[str, float], dict[str, list[torch.Tensor]]]:
    """The three terms over all pairs, and the gradient of each, in float64: one plain forward pass after the other."""
    lm = LM(student, torch.device("cpu"))
    examples = make_examples(lm, read_rows(str(pairs), "train"), ("chosen", "rejected"), 512, 256)
    models = [
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
        for path in (student, teacher)
    ]
    terms = {"sft": 0.0, "kl_chosen": 0.0, "kl_rejected": 0.0}
    for _, prompt, responses in examples:
        for side, response in zip(("chosen", "rejected"), responses):
            ours, theirs = (
                model(torch.tensor([prompt + response])).logits[
                    0, len(prompt) - 1 : -1, : lm.vocab_size
                ]
                for model in models
            )
            ours, theirs = ours.log_softmax(-1), theirs.detach().log_softmax(-1)
            kl = nll = 0.0
            for t, token in enumerate(response):
                nll -= ours[t, token]
                kept = theirs[t].topk(top_k or lm.vocab_size).indices
                p, q = theirs[t, kept].exp(), ours[t, kept].exp()
                kl += (p * (p / q).log()).sum()
                if top_k:
                    kl += (1 - p.sum()) * ((1 - p.sum()) / (1 - q.sum())).log()
            terms[f"kl_{side}"] += kl / len(response) / len(examples)
            if side == "chosen":
                terms["sft"] += nll / len(response) / len(examples)
    parameters = list(models[0].parameters())
    gradients = {
        name: torch.autograd.grad(term, parameters, retain_graph=True)
        for name, term in terms.items()
    }
    return {name: term.item() for name, term in terms.items()}, gradients


def assert_gradient(run, expected):
    for ours, theirs in zip(first_gradient(run), expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=2e-3, atol=2e-5)


@pytest.mark.parametrize("top_k", [0, 5])
def test_r04_a_step_equals_a_slow_loop_over_plain_forward_passes(
    checkpoints, pairs, run_tiny, top_k
):
    weights = {"kl_chosen": 0.7, "kl_rejected": 0.4}
    run = run_tiny("dckd", **weights, top_k=top_k)
    terms, gradients = slow_step(checkpoints["student"], checkpoints["teacher"], pairs, top_k)
    [row] = read_jsonl(run / "metrics.jsonl")
    for name, value in terms.items():
        assert row[f"losses/{name}"] == pytest.approx(value, rel=1e-4)
    total = terms["sft"] + 0.7 * terms["kl_chosen"] + 0.4 * terms["kl_rejected"]
    assert row["losses/total"] == pytest.approx(total, rel=1e-4)
    expected = [
        sft + 0.7 * chosen + 0.4 * rejected
        for sft, chosen, rejected in zip(
            gradients["sft"], gradients["kl_chosen"], gradients["kl_rejected"]
        )
    ]
    assert_gradient(run, expected)
    norm = sum(gradient.square().sum() for gradient in expected).sqrt().item()
    assert row["charts/grad_norm"] == pytest.approx(norm, rel=1e-3)


def test_without_kl_it_is_sft_on_the_chosen_answers(checkpoints, pairs, run_tiny):
    run = run_tiny("dckd", kl_chosen=0, kl_rejected=0)
    [row] = read_jsonl(run / "metrics.jsonl")
    terms, gradients = slow_step(checkpoints["student"], checkpoints["teacher"], pairs)
    assert row["losses/total"] == row["losses/sft"] == pytest.approx(terms["sft"], rel=1e-4)
    assert_gradient(run, gradients["sft"])


def test_without_the_rejected_side_it_is_vanilla_distillation(checkpoints, pairs, run_tiny):
    run = run_tiny("dckd", kl_chosen=1, kl_rejected=0)
    terms, gradients = slow_step(checkpoints["student"], checkpoints["teacher"], pairs)
    [row] = read_jsonl(run / "metrics.jsonl")
    assert row["losses/total"] == pytest.approx(terms["sft"] + terms["kl_chosen"], rel=1e-4)
    assert_gradient(run, [sft + kl for sft, kl in zip(gradients["sft"], gradients["kl_chosen"])])


def test_r29_a_student_that_is_its_teacher_has_kl_zero(checkpoints, pairs, run_tiny):
    run = run_tiny("dckd", teacher=checkpoints["student"], kl_chosen=5, kl_rejected=5)
    [row] = read_jsonl(run / "metrics.jsonl")
    assert row["losses/kl_chosen"] == pytest.approx(0, abs=1e-6)
    assert row["losses/kl_rejected"] == pytest.approx(0, abs=1e-6)
    _, gradients = slow_step(checkpoints["student"], checkpoints["student"], pairs)
    assert_gradient(run, gradients["sft"])


def test_swapped_answers_leave_the_kl_as_it_is(pairs, run_tiny, tmp_path):
    swapped = tmp_path / "swapped.jsonl"
    rows = [
        row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in read_jsonl(pairs)
    ]
    swapped.write_text("".join(json.dumps(row) + "\n" for row in rows))
    [one], [other] = (
        read_jsonl(run_tiny("dckd", data=data, kl_chosen=1, kl_rejected=1) / "metrics.jsonl")
        for data in (pairs, swapped)
    )
    assert one["losses/kl_chosen"] == pytest.approx(other["losses/kl_rejected"], rel=1e-5)
    assert one["losses/kl_rejected"] == pytest.approx(other["losses/kl_chosen"], rel=1e-5)
    kl = [row["losses/total"] - row["losses/sft"] for row in (one, other)]
    assert kl[0] == pytest.approx(kl[1], rel=1e-5) and one["losses/sft"] != pytest.approx(
        other["losses/sft"], rel=1e-3
    )
