"""playground/baselines.py: its losses against float64 loops, one step of the script against plain forward passes."""

import math

import pytest
import torch
from conftest import first_gradient, read_jsonl, run_script, vowels
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from common import LM, make_examples, read_rows
from playground.baselines import dpo_loss, reverse_kl, simpo_loss

CPU = torch.device("cpu")
LOSSES = ["dpo", "simpo", "reverse_kl"]


def random_log_probs(n=5, vocab=13, seed=0, scale=3.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(n, vocab, generator=generator, dtype=torch.float64)).log_softmax(-1)


# -------------------------------------------------------------------------------------------------------- mathematics
def test_dpo_and_simpo_by_hand():
    logps = torch.tensor(
        [-1.0, -3.0, -2.0, -2.5], dtype=torch.float64
    )  # of two pairs, chosen and rejected
    reference = torch.tensor([-2.0, -2.0, -1.0, -3.0], dtype=torch.float64)
    sigmoid = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
    # (−1 + 2) − (−3 + 2) = 2 and (−2 + 1) − (−2.5 + 3) = −1.5
    assert dpo_loss(logps, reference, 0.5).tolist() == pytest.approx(
        [-math.log(sigmoid(1)), -math.log(sigmoid(-0.75))]
    )
    # 2 · (−1 + 3) − 0.5 = 3.5 and 2 · (−2 + 2.5) − 0.5 = 0.5
    assert simpo_loss(logps, 2.0, 0.5).tolist() == pytest.approx(
        [-math.log(sigmoid(3.5)), -math.log(sigmoid(0.5))]
    )
    assert simpo_loss(torch.zeros(2), 2.0, 0.0).item() == pytest.approx(math.log(2))


def test_r29_a_student_that_is_its_reference_has_dpo_loss_log_2():
    logps = -torch.rand(8, dtype=torch.float64)
    assert dpo_loss(logps, logps.clone(), 0.3).tolist() == [math.log(2)] * 4


def test_r24_reverse_kl_of_two_tokens_by_hand():
    student, teacher = (torch.tensor([[p, 1 - p]], dtype=torch.float64).log() for p in (0.75, 0.5))
    assert reverse_kl(student, teacher).item() == pytest.approx(
        0.130812, abs=1e-6
    )  # the other direction: 0.143841
    assert reverse_kl(student, teacher).item() == pytest.approx(
        0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    )


@pytest.mark.parametrize("seed", range(3))
def test_reverse_kl_equals_a_slow_loop(seed):
    student, teacher = random_log_probs(seed=seed), random_log_probs(seed=seed + 100)
    slow = []
    for ours, theirs in zip(student.tolist(), teacher.tolist()):
        slow.append(0.0)
        for one, other in zip(ours, theirs):
            slow[-1] += math.exp(one) * (one - other)
    assert reverse_kl(student, teacher).tolist() == pytest.approx(slow, abs=1e-12)
    assert reverse_kl(student.float(), teacher.float()).tolist() == pytest.approx(slow, abs=1e-5)
    assert min(slow) > 0 and not reverse_kl(student, student).any()


def test_the_gradient_of_reverse_kl_is_the_closed_form():
    """∂/∂z_a Σ π (log π − log p) = π_a (log π_a − log p_a − KL)"""
    logits, teacher = random_log_probs(seed=1).requires_grad_(), random_log_probs(seed=2)
    kl = reverse_kl(logits.log_softmax(-1), teacher)
    kl.sum().backward()
    log_probs = logits.detach().log_softmax(-1)
    assert torch.allclose(
        logits.grad, log_probs.exp() * (log_probs - teacher - kl.detach()[:, None]), atol=1e-12
    )


def test_r10_excluded_tokens_give_no_nan():
    inf = math.inf
    logits = torch.tensor([[1.0, -inf, 0.5, -inf, 0.2]], requires_grad=True)
    teacher = torch.tensor([[0.3, 0.5, 0.5, -inf, 0.7]]).log_softmax(-1)
    kl = reverse_kl(logits.log_softmax(-1), teacher)
    kept = [0, 2, 4]
    expected = reverse_kl(logits.detach().log_softmax(-1)[:, kept], teacher[:, kept])
    assert kl.item() == pytest.approx(expected.item())
    kl.sum().backward()
    assert logits.grad.isfinite().all()


# -------------------------------------------------------------------------------------------- one step of the script
def slow_step(loss: str, checkpoints, pairs, beta: float, gamma: float):
    """The loss over all pairs (or over fresh answers of the student) and its gradient, in float64: one plain forward
    pass after the other."""
    lm = LM(checkpoints["student"], CPU)
    columns = () if loss == "reverse_kl" else ("chosen", "rejected")
    examples = make_examples(lm, read_rows(str(pairs), "train", columns), columns, 512, 40)
    if loss == "reverse_kl":
        order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(1)).tolist()
        examples = [examples[i] for i in order]
        answers = lm.sample(
            [example.prompt for example in examples], max_new_tokens=40, batch_size=256, seed=1
        )
        for example, (answer,) in zip(examples, answers):
            example.responses.extend(lm.encode(example.row["prompt"], [answer])[1])
    paths = [checkpoints[name] for name in ("student", "teacher")]
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64) for path in paths
    )
    reference = AutoModelForCausalLM.from_pretrained(paths[0], dtype=torch.float64)

    def log_probs(model, prompt, response):
        values = model(torch.tensor([prompt + response])).logits[
            0, len(prompt) - 1 : -1, : lm.vocab_size
        ]
        return values.log_softmax(-1)

    def logp(model, prompt, response):
        return sum(log_probs(model, prompt, response)[t, token] for t, token in enumerate(response))

    total = 0.0
    for _, prompt, responses in examples:
        if loss == "reverse_kl":
            [y] = responses
            ours, theirs = (log_probs(model, prompt, y) for model in (student, teacher))
            total += (ours.exp() * (ours - theirs.detach())).sum() / len(y)
        elif loss == "dpo":
            w, l = (
                logp(student, prompt, y) - logp(reference, prompt, y).detach() for y in responses
            )  # noqa: E741
            total += (1 + (-beta * (w - l)).exp()).log()
        else:
            w, l = (logp(student, prompt, y) / len(y) for y in responses)  # noqa: E741
            total += (1 + (gamma - beta * (w - l)).exp()).log()
    total = total / len(examples)
    return total.item(), torch.autograd.grad(total, list(student.parameters()))


@pytest.mark.parametrize(
    "loss, beta, gamma", [("dpo", 0.5, 0), ("simpo", 2.0, 1.3), ("reverse_kl", 1.0, 0)]
)
def test_r04_a_step_equals_a_slow_loop_over_plain_forward_passes(
    loss, beta, gamma, checkpoints, pairs, run_tiny
):
    run = run_tiny("playground/baselines", loss=loss, beta=beta, simpo_gamma=gamma)
    expected, gradient = slow_step(loss, checkpoints, pairs, beta, gamma)
    [row] = read_jsonl(run / "metrics.jsonl")
    assert row["losses/total"] == pytest.approx(expected, rel=2e-4)
    if loss == "dpo":
        assert row["losses/total"] == pytest.approx(math.log(2), abs=1e-6)
    for ours, theirs in zip(first_gradient(run), gradient, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=2e-3, atol=1e-4)


def test_the_reference_of_dpo_is_the_initial_student(run_tiny):
    """After some steps the loss has left log 2, which it would not if the reference were trained as well."""
    rows = read_jsonl(
        run_tiny("playground/baselines", loss="dpo", max_steps=6, learning_rate=3e-3)
        / "metrics.jsonl"
    )
    assert rows[0]["losses/total"] == pytest.approx(math.log(2), abs=1e-6)
    assert rows[-1]["losses/total"] < math.log(2) - 0.1


@pytest.mark.parametrize("loss", LOSSES)
def test_r20_the_split_of_a_batch_changes_nothing(loss, run_tiny):
    whole, parts = (
        run_tiny("playground/baselines", loss=loss, micro_batch_size=size) for size in (8, 3)
    )
    [one], [other] = (read_jsonl(run / "metrics.jsonl") for run in (whole, parts))
    assert one["losses/total"] == pytest.approx(other["losses/total"], rel=1e-5)
    for a, b in zip(first_gradient(whole), first_gradient(parts), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


CALLS_LEFT = [0]


def deadly(prompts, answers) -> list[float]:
    """A judge that dies as soon as it was called often enough."""
    CALLS_LEFT[0] -= 1
    if CALLS_LEFT[0] == 0:
        raise KeyboardInterrupt
    return vowels(prompts, answers)


@pytest.mark.parametrize("loss", LOSSES)
def test_r36_an_interrupted_run_ends_with_the_same_bits(loss, checkpoints, pairs, tmp_path):
    flags = {role: checkpoints[role] for role in ("student", "teacher")} | {
        "data": pairs,
        "eval_data": pairs,
    }
    flags |= {
        "max_steps": 6,
        "batch_size": 4,
        "eval_prompts": 2,
        "max_response_tokens": 40,
        "log_every": 1,
    }
    flags |= {"save_every": 2, "eval_every": 3, "reward": "test_baselines:deadly", "loss": loss}
    assert run_script("playground/baselines", **flags, output_dir=tmp_path / "whole") == 0
    CALLS_LEFT[0] = 3  # two before training, one at step 3, when the checkpoint is of step 2
    with pytest.raises(KeyboardInterrupt):
        run_script("playground/baselines", **flags, output_dir=tmp_path / "died")
    assert run_script("playground/baselines", resume=tmp_path / "died") == 0
    one, other = (
        load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "died")
    )
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("loss, rises", [("dpo", 0.05), ("reverse_kl", 0.15)])
def test_a_short_run_improves_the_student(loss, rises, tmp_path):
    flags = {
        "loss": loss,
        "max_steps": 50,
        "eval_prompts": 128,
        "eval_every": 50,
        "output_dir": tmp_path / "run",
    }
    assert run_script("playground/baselines", **flags) == 0
    [row] = [row for row in read_jsonl(tmp_path / "run" / "metrics.jsonl") if "eval/reward" in row]
    before = [row["reward"] for row in read_jsonl(tmp_path / "run" / "eval_before.jsonl")]
    assert row["eval/reward"] > sum(before) / len(before) + rises
