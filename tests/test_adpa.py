"""adpa.py: its mathematics against float64 loops, and a step of the script against plain forward
passes."""

import math
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY_RUN, first_gradient, read_jsonl, run_script, training_rows
from transformers import AutoModelForCausalLM

from adpa import advantages, expected_advantage
from common import LM, encode_rows, read_rows

VOCAB = 13


def random_log_probs(seed=0, n=5, scale=3.0) -> torch.Tensor:
    """[n, VOCAB] in float64, far from uniform."""
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(n, VOCAB, generator=generator, dtype=torch.float64)
    return logits.log_softmax(-1)


def log_probs_of(*probs: float) -> torch.Tensor:
    """[1, V] in float64: the log of one state's distribution."""
    return torch.tensor([probs], dtype=torch.float64).log()


# -------------------------------------------------------------------------------------- mathematics
def test_the_example_of_the_docstrings():
    """A = log(.6/.3), log(.3/.3), log(.1/.4). E = .2 · .693 + .5 · 0 − .3 · 1.386 = −.277. The
    gradient of a logit is π_a (A_a − E): .2 · .970, .5 · .277, .3 · −1.109."""
    advantage = advantages(log_probs_of(0.6, 0.3, 0.1), log_probs_of(0.3, 0.3, 0.4))
    assert advantage.tolist() == [pytest.approx([0.6931, 0.0, -1.3863], abs=1e-4)]

    logits = log_probs_of(0.2, 0.5, 0.3).requires_grad_()
    expectation = expected_advantage(logits.log_softmax(-1), advantage)
    expectation.sum().backward()
    assert expectation.item() == pytest.approx(-0.2773, abs=1e-4)
    assert logits.grad.tolist() == [pytest.approx([0.1941, 0.1386, -0.3327], abs=1e-4)]


def test_advantage_of_two_tokens_by_hand():
    advantage = advantages(log_probs_of(0.8, 0.2), log_probs_of(0.5, 0.5))
    assert advantage.tolist() == [pytest.approx([math.log(1.6), math.log(0.4)])]
    expected = 0.25 * math.log(1.6) + 0.75 * math.log(0.4)
    assert expected_advantage(log_probs_of(0.25, 0.75), advantage).item() == pytest.approx(expected)
    # With the two teachers exchanged it would be positive.
    assert expected == pytest.approx(-0.569717, abs=1e-6)


def slow_expected_advantage(student, teacher, reference, clip, top_k) -> list[float]:
    """One state and one token after the other."""
    result = []
    for t in range(len(teacher)):
        likeliest = teacher[t].argsort(descending=True).tolist()
        total = 0.0
        for a in likeliest[: top_k or VOCAB]:
            advantage = teacher[t, a].item()
            if reference is not None:
                advantage -= reference[t, a].item()
            if clip is not None:
                advantage = min(max(advantage, clip[0]), clip[1])
            total += math.exp(student[t, a].item()) * advantage
        result.append(total)
    return result


@pytest.mark.parametrize("clip", [None, (-0.5, 2.0), (1e-8, 0.99999999)])
@pytest.mark.parametrize("top_k", [0, 1, 4, 13, 99])
@pytest.mark.parametrize("with_reference", [True, False])
def test_expected_advantage_equals_a_slow_loop(clip, top_k, with_reference):
    teacher = random_log_probs(seed=1)
    reference = random_log_probs(seed=2) if with_reference else None
    student = random_log_probs(seed=3)
    values = expected_advantage(student, advantages(teacher, reference, clip, top_k))
    slow = slow_expected_advantage(student, teacher, reference, clip, top_k)
    assert values.tolist() == pytest.approx(slow, abs=1e-12)


def test_gradient_is_the_closed_form():
    """∂/∂z_a Σ π A = π_a (A_a − E_π[A])"""
    logits = random_log_probs(seed=1).requires_grad_()
    advantage = random_log_probs(seed=2)
    expected_advantage(logits.log_softmax(-1), advantage).sum().backward()
    probs = logits.detach().softmax(-1)
    baseline = (probs * advantage).sum(-1, keepdim=True)
    assert torch.allclose(logits.grad, probs * (advantage - baseline), atol=1e-12)


def test_a_constant_changes_the_value_and_not_the_gradient():
    gradients = []
    values = []
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


def test_a_clip_to_0_and_1_makes_negative_advantages_nothing_and_large_ones_one():
    teacher = random_log_probs(seed=1)
    reference = random_log_probs(seed=2)
    plain = advantages(teacher, reference)
    clipped = advantages(teacher, reference, clip=(1e-8, 0.99999999))
    assert (plain < 0).any() and (plain > 1).any()
    assert torch.allclose(clipped, plain.clamp(0, 1), atol=2e-8)
    assert torch.equal(clipped, plain.clamp(1e-8, 1 - 1e-8))


def test_top_k_keeps_the_teachers_likeliest_tokens():
    teacher = random_log_probs(seed=1)
    reference = random_log_probs(seed=2)
    plain = advantages(teacher, reference)
    cut = advantages(teacher, reference, top_k=4)
    is_kept = cut != 0
    assert (is_kept.sum(-1) == 4).all()
    assert torch.equal(cut[is_kept], plain[is_kept])
    least_kept = teacher.masked_fill(~is_kept, math.inf).amin(-1)
    most_dropped = teacher.masked_fill(is_kept, -math.inf).amax(-1)
    assert (least_kept > most_dropped).all()
    assert torch.equal(advantages(teacher, reference, top_k=VOCAB), plain)


@pytest.mark.parametrize("top_k", [0, 3])
def test_r10_excluded_tokens_give_no_nan(top_k):
    inf = math.inf
    teacher = torch.tensor([[1.0, -inf, 0.5, -inf, 0.2]]).log_softmax(-1)
    reference = torch.tensor([[0.3, -inf, 0.1, 0.2, -inf]]).log_softmax(-1)
    logits = torch.tensor([[0.3, -inf, 0.1, 0.2, 0.4]], requires_grad=True)
    advantage = advantages(teacher, reference, top_k=top_k)
    both_finite = [0, 2]
    expected = (teacher - reference)[0, both_finite].tolist()
    assert advantage[0, both_finite].tolist() == pytest.approx(expected)
    assert not advantage[0, [1, 3, 4]].any()
    value = expected_advantage(logits.log_softmax(-1), advantage)
    value.sum().backward()
    assert value.isfinite().all() and logits.grad.isfinite().all()


# ------------------------------------------------------------------------- one step of the script
LIMITS = SimpleNamespace(max_prompt_tokens=512, max_response_tokens=TINY_RUN["max_response_tokens"])


def examples_of(run, pairs, states: str, lm: LM):
    """What the run trained on: y_w, and ŷ from the run's own file if it was sampled."""
    rows = read_rows(str(pairs), "train")
    path = run / f"{states}_answers.jsonl"
    if path.exists():
        for row, answer in zip(rows, read_jsonl(path), strict=True):
            row[states] = answer
    examples = encode_rows(lm, rows, ["chosen", states], LIMITS, "test")
    # Noise of random models may take more tokens than the limit once it is text.
    assert len(examples) >= 6
    return examples


def slow_step(paths, run, pairs, states="student", clip=None, top_k=0):
    """(sft, advantage) over all pairs, and the gradient of each, in float64. It takes one plain
    forward pass after the other. `paths` are student, teacher and, unless left out, reference."""
    lm = LM(paths[0], torch.device("cpu"))
    student, teacher, *reference = [
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64) for path in paths
    ]
    examples = examples_of(run, pairs, states, lm)
    sft = 0.0
    advantage = 0.0
    for example in examples:
        prompt = example.prompt_ids
        chosen, state = example.response_ids
        log_probs = response_log_probs(student, prompt, chosen, lm.vocab_size)
        for t, token in enumerate(chosen):
            sft = sft - log_probs[t, token] / len(chosen) / len(examples)

        log_probs = response_log_probs(student, prompt, state, lm.vocab_size)
        teacher_log_probs = response_log_probs(teacher, prompt, state, lm.vocab_size).detach()
        values = teacher_log_probs
        for model in reference:
            values = values - response_log_probs(model, prompt, state, lm.vocab_size).detach()
        if clip:
            values = values.clamp(*clip)
        for t in range(len(state)):
            kept = teacher_log_probs[t].topk(top_k or lm.vocab_size).indices
            expectation = (log_probs[t, kept].exp() * values[t, kept]).sum()
            advantage = advantage + expectation / len(state) / len(examples)
    parameters = list(student.parameters())
    sft_gradient = torch.autograd.grad(sft, parameters, retain_graph=True)
    advantage_gradient = torch.autograd.grad(advantage, parameters)
    return (sft.item(), sft_gradient), (advantage.item(), advantage_gradient)


def response_log_probs(model, prompt, response, vocab_size) -> torch.Tensor:
    """[|response|, V] with a gradient, from one plain forward pass."""
    logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1, :vocab_size]
    return logits.log_softmax(-1)


def assert_gradient(run, expected):
    """The gradient of the run's only step is the expected one."""
    for measured, slow in zip(first_gradient(run), expected, strict=True):
        torch.testing.assert_close(measured.double(), slow, rtol=2e-3, atol=1e-4)


SETTINGS = {
    "as in the paper": {"gamma": 1.5},
    "no reference": {"gamma": 0.3, "teacher_ref": "none"},
    "clip to 0 and 1": {"advantage_clip": (1e-8, 0.99999999)},
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
    paths = [checkpoints["student"], checkpoints["teacher"]]
    if flags["teacher_ref"] != "none":
        paths.append(flags["teacher_ref"])
    (sft, sft_gradient), (advantage, advantage_gradient) = slow_step(
        paths,
        run,
        pairs,
        states=flags.get("states", "student"),
        clip=flags.get("advantage_clip"),
        top_k=flags.get("top_k", 0),
    )
    gamma = flags["gamma"]
    [row] = training_rows(run)
    assert row["losses/sft"] == pytest.approx(sft, rel=1e-4)
    assert row["losses/advantage"] == pytest.approx(advantage, rel=2e-4)
    assert row["losses/total"] == pytest.approx(sft - gamma * advantage, rel=2e-4)
    expected = [one - gamma * other for one, other in zip(sft_gradient, advantage_gradient)]
    assert_gradient(run, expected)
    norm = sum(gradient.square().sum() for gradient in expected).sqrt().item()
    assert row["charts/grad_norm"] == pytest.approx(norm, rel=1e-3)


def test_without_gamma_it_is_sft_on_the_chosen_answers(checkpoints, pairs, run_tiny):
    run = run_tiny("adpa", gamma=0, teacher_ref=checkpoints["teacher_ref"])
    paths = [checkpoints[name] for name in ("student", "teacher", "teacher_ref")]
    (sft, sft_gradient), _ = slow_step(paths, run, pairs)
    [row] = training_rows(run)
    assert row["losses/total"] == row["losses/sft"] == pytest.approx(sft, rel=1e-4)
    assert_gradient(run, sft_gradient)


def test_r29_a_teacher_that_is_its_own_reference_leaves_exactly_sft(checkpoints, run_tiny):
    sft = run_tiny("adpa", gamma=0, teacher_ref=checkpoints["teacher"])
    same = run_tiny("adpa", gamma=100, teacher_ref=checkpoints["teacher"])
    [row] = training_rows(same)
    assert row["losses/advantage"] == 0 and row["losses/total"] == row["losses/sft"]
    for one, other in zip(first_gradient(sft), first_gradient(same), strict=True):
        assert torch.equal(one, other)


def test_no_preference_label_is_used_beyond_the_chosen_answer(
    checkpoints, pairs, run_tiny, tmp_path
):
    other = tmp_path / "other.jsonl"
    other.write_text(pairs.read_text().replace('"rejected": "', '"rejected": "x'))
    flags = {"teacher_ref": checkpoints["teacher_ref"], "gamma": 1}
    one, two = [first_gradient(run_tiny("adpa", data=data, **flags)) for data in (pairs, other)]
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("states", ["student", "teacher"])
def test_the_answers_of_stage_one_are_those_of_the_named_model(
    checkpoints, pairs, run_tiny, states
):
    run = run_tiny(
        "adpa", states=states, sample_temperature=0, teacher_ref=checkpoints["teacher_ref"]
    )
    lm = LM(checkpoints[states], torch.device("cpu"))
    rows = read_rows(str(pairs), "train", ["chosen"])
    prompts = [lm.prompt_ids(row["prompt"]) for row in rows]
    limit = TINY_RUN["max_response_tokens"]
    expected = lm.sample(prompts, temperature=0, max_new_tokens=limit, batch_size=3, seed=9)
    written = read_jsonl(run / f"{states}_answers.jsonl")
    for row, [response] in zip(written, expected, strict=True):
        assert row["text"] == response["text"] and row["finished"] == response["finished"]
    assert [row["id"] for row in written] == [row["id"] for row in rows]


def test_top_k_without_a_reference_is_refused(tmp_path, capsys):
    """Without a reference A = log π_dpo is at most 0. The tokens that top_k drops would get 0."""
    flags = {"teacher_ref": "none", "top_k": 5, "output_dir": tmp_path / "run"}
    assert run_script("adpa", **flags) == 2
    assert "--teacher_ref" in capsys.readouterr().err and not (tmp_path / "run").exists()
