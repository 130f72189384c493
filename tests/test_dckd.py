"""dckd.py: its loss against float64 loops, and a step of it against plain forward passes."""

import math
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from conftest import first_gradient, read_jsonl, training_rows, write_jsonl
from transformers import AutoModelForCausalLM

from common import LM, encode_rows, read_rows
from dckd import forward_kl, with_rest

INF = math.inf


def random_log_probs(n=5, vocab=13, seed=0, scale=3.0) -> torch.Tensor:
    """[n, vocab] in float64, far from uniform."""
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(n, vocab, generator=generator, dtype=torch.float64)
    return logits.log_softmax(-1)


def log_probs_of(*rows: list[float]) -> torch.Tensor:
    """[N, V] in float64: the logs of one distribution per state."""
    return torch.tensor(rows, dtype=torch.float64).log()


def slow_kl(teacher, student, top_k=0) -> list[float]:
    """KL of every state, one state after the other."""
    teacher_probs = teacher.exp().tolist()
    student_probs = student.exp().tolist()
    return [slow_kl_of_state(p, q, top_k) for p, q in zip(teacher_probs, student_probs)]


def slow_kl_of_state(p: list[float], q: list[float], top_k: int) -> float:
    """One token after the other. With top_k the events are the teacher's k likeliest tokens, then
    all others together."""
    likeliest_first = sorted(range(len(p)), key=lambda a: -p[a])
    kept = likeliest_first[: top_k or len(p)]
    rest = likeliest_first[len(kept) :]
    events = [(p[a], q[a]) for a in kept]
    if rest:
        p_rest = sum(p[a] for a in rest)
        q_rest = sum(q[a] for a in rest)
        events.append((p_rest, q_rest))
    total = 0.0
    for p_event, q_event in events:
        if p_event > 0:
            total += p_event * math.log(p_event / q_event)
    return total


# -------------------------------------------------------------------------------------- mathematics
def test_r24_forward_kl_of_two_tokens_by_hand():
    teacher = log_probs_of([0.75, 0.25])
    student = log_probs_of([0.5, 0.5])
    by_hand = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert forward_kl(teacher, student).item() == pytest.approx(by_hand)
    assert by_hand == pytest.approx(0.130812, abs=1e-6)
    # The other direction has another value.
    assert forward_kl(student, teacher).item() == pytest.approx(0.143841, abs=1e-6)


@pytest.mark.parametrize("top_k", [0, 1, 3, 12, 13, 99])
@pytest.mark.parametrize("seed", range(3))
def test_kl_equals_a_slow_loop(top_k, seed):
    teacher = random_log_probs(seed=seed)
    student = random_log_probs(seed=seed + 100)
    slow = slow_kl(teacher, student, top_k)
    kl = forward_kl(teacher, student, top_k)
    single_precision_kl = forward_kl(teacher.float(), student.float(), top_k)
    assert kl.tolist() == pytest.approx(slow, abs=1e-9)
    assert single_precision_kl.tolist() == pytest.approx(slow, abs=1e-5)


def test_gradient_is_the_difference_of_the_distributions():
    teacher = random_log_probs(seed=1)
    logits = random_log_probs(seed=2).requires_grad_()
    forward_kl(teacher, logits.log_softmax(-1)).sum().backward()
    difference = logits.detach().softmax(-1) - teacher.exp()
    assert torch.allclose(logits.grad, difference, atol=1e-12)


@pytest.mark.parametrize("top_k", [0, 3])
def test_r29_kl_and_its_gradient_are_zero_where_student_and_teacher_agree(top_k):
    logits = random_log_probs().requires_grad_()
    student = logits.log_softmax(-1)
    kl = forward_kl(student.detach(), student, top_k)
    kl.sum().backward()
    assert torch.allclose(kl, torch.zeros_like(kl), atol=1e-12)
    assert torch.allclose(logits.grad, torch.zeros_like(logits), atol=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_top_k_kl_grows_with_k_up_to_the_full_kl(seed):
    """Joining events can only lose divergence, and the bins of k + 1 split those of k."""
    teacher = random_log_probs(seed=seed)
    student = random_log_probs(seed=seed + 100)
    full = forward_kl(teacher, student)
    kls = [forward_kl(teacher, student, k) for k in range(1, 14)]
    for less, more in pairwise(kls):
        assert (less <= more + 1e-12).all()
    assert (kls[0] < full - 1e-3).any()
    assert torch.equal(kls[-1], full)


@pytest.mark.parametrize("top_k", [0, 2, 3, 4])
def test_r10_excluded_tokens_give_no_nan(top_k):
    """A model that masks tokens has logits of −inf."""
    one = [1.0, -INF, 0.5, -INF, 0.2]
    other = [2.0, 1.0, -INF, -INF, -INF]
    teacher = torch.tensor([one, other]).log_softmax(-1)
    one = [0.3, -INF, 0.5, 0.1, 0.7]
    other = [0.1, 0.2, -INF, 0.4, -INF]
    logits = torch.tensor([one, other], requires_grad=True)
    student = logits.log_softmax(-1)
    kl = forward_kl(teacher, student, top_k)
    # Where p is 0 the term is 0, whatever the student's value there.
    positive_probs = student.double().exp().clamp(min=1e-300)
    slow = slow_kl(teacher.double(), positive_probs.log(), top_k)
    assert kl.tolist() == pytest.approx(slow, abs=1e-5)
    kl.sum().backward()
    assert logits.grad.isfinite().all()


def test_a_rest_that_rounds_to_nothing_stays_finite():
    # 1 − p rounds to 0 in float32.
    logits = torch.tensor([[60.0, 0.0, -5.0, -9.0]], requires_grad=True)
    certain = logits.log_softmax(-1)
    other = torch.randn(1, 4).log_softmax(-1)
    of_certain_teacher = forward_kl(certain.detach(), other, top_k=1)
    of_certain_student = forward_kl(other, certain, top_k=1)
    for kl in (of_certain_teacher, of_certain_student):
        assert kl.isfinite().all()
        assert kl.item() > 0
    of_certain_student.sum().backward()
    assert logits.grad.isfinite().all()
    assert with_rest(torch.zeros(1, 1)).isfinite().all()


# ------------------------------------------------------------------------- one step of the script
LIMITS = SimpleNamespace(max_prompt_tokens=512, max_response_tokens=256)


def slow_kl_of_token(teacher_log_probs, student_log_probs, top_k: int) -> torch.Tensor:
    """KL of one position [V], over the teacher's k likeliest tokens and one bin for the rest."""
    kept = teacher_log_probs.topk(top_k or len(teacher_log_probs)).indices
    p = teacher_log_probs[kept].exp()
    q = student_log_probs[kept].exp()
    kl = (p * (p / q).log()).sum()
    if top_k:
        p_rest = 1 - p.sum()
        q_rest = 1 - q.sum()
        kl = kl + p_rest * (p_rest / q_rest).log()
    return kl


def slow_step(student: str, teacher: str, pairs, top_k=0):
    """({term: value}, {term: gradient}) over all pairs, in float64. It takes one plain forward pass
    after the other."""
    lm = LM(student, torch.device("cpu"))
    rows = read_rows(str(pairs), "train")
    examples = encode_rows(lm, rows, ["chosen", "rejected"], LIMITS, "test")
    models = [
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
        for path in (student, teacher)
    ]
    terms = {"sft": 0.0, "kl_chosen": 0.0, "kl_rejected": 0.0}
    for example in examples:
        prompt = example.prompt_ids
        for side, response in zip(("chosen", "rejected"), example.response_ids):
            log_probs = []
            for model in models:
                logits = model(torch.tensor([prompt + response])).logits[0, :, : lm.vocab_size]
                log_probs.append(logits[len(prompt) - 1 : -1].log_softmax(-1))
            student_log_probs, teacher_log_probs = log_probs
            teacher_log_probs = teacher_log_probs.detach()
            weight = 1 / len(response) / len(examples)
            for t, token in enumerate(response):
                kl = slow_kl_of_token(teacher_log_probs[t], student_log_probs[t], top_k)
                terms[f"kl_{side}"] += weight * kl
                if side == "chosen":
                    terms["sft"] -= weight * student_log_probs[t, token]
    parameters = list(models[0].parameters())
    values = {}
    gradients = {}
    for name, term in terms.items():
        values[name] = term.item()
        gradients[name] = torch.autograd.grad(term, parameters, retain_graph=True)
    return values, gradients


def weighted(gradients: dict, **weights: float) -> list[torch.Tensor]:
    """The weighted sum of the terms' gradients, a tensor for each parameter."""
    total = [torch.zeros_like(gradient) for gradient in gradients["sft"]]
    for name, weight in weights.items():
        for i, gradient in enumerate(gradients[name]):
            total[i] += weight * gradient
    return total


def assert_gradient(run, expected):
    """The gradient of the run's only step is the expected one."""
    for measured, slow in zip(first_gradient(run), expected, strict=True):
        torch.testing.assert_close(measured.double(), slow, rtol=2e-3, atol=2e-5)


@pytest.mark.parametrize("top_k", [0, 5])
def test_r04_a_step_equals_a_slow_loop_over_plain_forward_passes(
    checkpoints, pairs, run_tiny, top_k
):
    run = run_tiny("dckd", kl_chosen=0.7, kl_rejected=0.4, top_k=top_k)
    terms, gradients = slow_step(checkpoints["student"], checkpoints["teacher"], pairs, top_k)
    [row] = training_rows(run)
    for name, value in terms.items():
        assert row[f"losses/{name}"] == pytest.approx(value, rel=1e-4)
    total = terms["sft"] + 0.7 * terms["kl_chosen"] + 0.4 * terms["kl_rejected"]
    assert row["losses/total"] == pytest.approx(total, rel=1e-4)
    expected = weighted(gradients, sft=1.0, kl_chosen=0.7, kl_rejected=0.4)
    assert_gradient(run, expected)
    norm = sum(gradient.square().sum() for gradient in expected).sqrt().item()
    assert row["charts/grad_norm"] == pytest.approx(norm, rel=1e-3)


def test_without_kl_it_is_sft_on_the_chosen_answers(checkpoints, pairs, run_tiny):
    run = run_tiny("dckd", kl_chosen=0, kl_rejected=0)
    [row] = training_rows(run)
    terms, gradients = slow_step(checkpoints["student"], checkpoints["teacher"], pairs)
    assert row["losses/total"] == row["losses/sft"] == pytest.approx(terms["sft"], rel=1e-4)
    assert_gradient(run, gradients["sft"])


def test_without_the_rejected_side_it_is_vanilla_distillation(checkpoints, pairs, run_tiny):
    run = run_tiny("dckd", kl_chosen=1, kl_rejected=0)
    terms, gradients = slow_step(checkpoints["student"], checkpoints["teacher"], pairs)
    [row] = training_rows(run)
    assert row["losses/total"] == pytest.approx(terms["sft"] + terms["kl_chosen"], rel=1e-4)
    assert_gradient(run, weighted(gradients, sft=1.0, kl_chosen=1.0))


def test_r29_a_student_that_is_its_teacher_has_kl_zero(checkpoints, pairs, run_tiny):
    run = run_tiny("dckd", teacher=checkpoints["student"], kl_chosen=5, kl_rejected=5)
    [row] = training_rows(run)
    assert row["losses/kl_chosen"] == pytest.approx(0, abs=1e-6)
    assert row["losses/kl_rejected"] == pytest.approx(0, abs=1e-6)
    _, gradients = slow_step(checkpoints["student"], checkpoints["student"], pairs)
    assert_gradient(run, gradients["sft"])


def test_swapped_answers_leave_the_kl_as_it_is(pairs, run_tiny, tmp_path):
    rows = []
    for row in read_jsonl(pairs):
        rows.append({**row, "chosen": row["rejected"], "rejected": row["chosen"]})
    swapped = write_jsonl(tmp_path / "swapped.jsonl", rows)
    logged = []
    for data in (pairs, swapped):
        run = run_tiny("dckd", data=data, kl_chosen=1, kl_rejected=1)
        logged += training_rows(run)
    one, other = logged
    assert one["losses/kl_chosen"] == pytest.approx(other["losses/kl_rejected"], rel=1e-5)
    assert one["losses/kl_rejected"] == pytest.approx(other["losses/kl_chosen"], rel=1e-5)
    both = [row["losses/total"] - row["losses/sft"] for row in logged]
    assert both[0] == pytest.approx(both[1], rel=1e-5)
    assert one["losses/sft"] != pytest.approx(other["losses/sft"], rel=1e-3)
