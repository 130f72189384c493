"""studies/baselines.py: its losses against float64 loops, a step of it against plain forward
passes, and whether it behaves as the scripts do."""

import json
import math
import re
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    ROOT,
    TINY_RUN,
    first_gradient,
    one_short,
    read_jsonl,
    run_script,
    training_rows,
    vowels,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from common import LM, Example, encode_rows, read_rows
from studies.baselines import (
    COLUMNS,
    DEFAULTS,
    dpo_loss,
    extrapolated_log_probs,
    forward_kl,
    generalised_jsd,
    reverse_kl,
    simpo_loss,
)

LOSSES = list(DEFAULTS)
every_loss = pytest.mark.parametrize("loss", LOSSES)


@pytest.fixture
def reference(checkpoints) -> dict[str, str]:
    """The flag for AlignDistil's reference, which must have the tokenizer of the tests."""
    return {"teacher_ref": checkpoints["teacher_ref"]}


def random_log_probs(n=5, vocab=13, seed=0, scale=3.0) -> torch.Tensor:
    """[n, vocab] in float64, far from uniform."""
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(n, vocab, generator=generator, dtype=torch.float64)
    return logits.log_softmax(-1)


def log_sigmoid(x: float) -> float:
    return -math.log(1 + math.exp(-x))


# -------------------------------------------------------------------------------------- mathematics
def test_the_examples_of_the_docstrings():
    log_ratios = torch.tensor([1.0, -1.0])
    assert dpo_loss(log_ratios, torch.zeros(2), 0.5).item() == pytest.approx(0.313, abs=1e-3)
    mean_logps = torch.tensor([-1.0, -3.0])
    assert simpo_loss(mean_logps, 2.0, 0.5).item() == pytest.approx(0.030, abs=1e-3)


def test_dpo_and_simpo_by_hand():
    # Two pairs, chosen before rejected.
    logps = torch.tensor([-1.0, -3.0, -2.0, -2.5], dtype=torch.float64)
    reference = torch.tensor([-2.0, -2.0, -1.0, -3.0], dtype=torch.float64)
    # (−1 + 2) − (−3 + 2) = 2 and (−2 + 1) − (−2.5 + 3) = −1.5, times β = 0.5
    expected = [-log_sigmoid(1), -log_sigmoid(-0.75)]
    assert dpo_loss(logps, reference, 0.5).tolist() == pytest.approx(expected)
    # 2 · (−1 + 3) − 0.5 = 3.5 and 2 · (−2 + 2.5) − 0.5 = 0.5
    expected = [-log_sigmoid(3.5), -log_sigmoid(0.5)]
    assert simpo_loss(logps, 2.0, 0.5).tolist() == pytest.approx(expected)
    assert simpo_loss(torch.zeros(2), 2.0, 0.0).item() == pytest.approx(math.log(2))


def test_r29_a_student_that_is_its_reference_has_dpo_loss_log_2():
    logps = -torch.rand(8, dtype=torch.float64)
    assert dpo_loss(logps, logps.clone(), 0.3).tolist() == [math.log(2)] * 4


def test_r24_reverse_kl_of_two_tokens_by_hand():
    student = torch.tensor([[0.75, 0.25]], dtype=torch.float64).log()
    teacher = torch.tensor([[0.5, 0.5]], dtype=torch.float64).log()
    by_hand = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert reverse_kl(student, teacher).item() == pytest.approx(by_hand)
    assert by_hand == pytest.approx(0.130812, abs=1e-6)
    # The other direction has another value.
    assert reverse_kl(teacher, student).item() == pytest.approx(0.143841, abs=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_reverse_kl_equals_a_slow_loop(seed):
    student = random_log_probs(seed=seed)
    teacher = random_log_probs(seed=seed + 100)
    slow = []
    for student_row, teacher_row in zip(student.tolist(), teacher.tolist()):
        total = 0.0
        for log_q, log_p in zip(student_row, teacher_row):
            total += math.exp(log_q) * (log_q - log_p)
        slow.append(total)
    assert reverse_kl(student, teacher).tolist() == pytest.approx(slow, abs=1e-12)
    assert reverse_kl(student.float(), teacher.float()).tolist() == pytest.approx(slow, abs=1e-5)
    assert min(slow) > 0 and not reverse_kl(student, student).any()


def test_the_gradient_of_reverse_kl_is_the_closed_form():
    """∂/∂z_a Σ π (log π − log p) = π_a (log π_a − log p_a − KL)"""
    logits = random_log_probs(seed=1).requires_grad_()
    teacher = random_log_probs(seed=2)
    kl = reverse_kl(logits.log_softmax(-1), teacher)
    kl.sum().backward()
    log_probs = logits.detach().log_softmax(-1)
    expected = log_probs.exp() * (log_probs - teacher - kl.detach()[:, None])
    assert torch.allclose(logits.grad, expected, atol=1e-12)


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


def two_tokens(*probabilities: float) -> torch.Tensor:
    return torch.tensor([probabilities], dtype=torch.float64).log()


def test_the_divergences_of_two_tokens_by_hand():
    teacher = two_tokens(0.75, 0.25)
    student = two_tokens(0.25, 0.75)
    half = two_tokens(0.5, 0.5)
    kl = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert forward_kl(half, teacher).item() == pytest.approx(kl)
    assert forward_kl(teacher, half).item() == pytest.approx(0.143841, abs=1e-6)
    # The mixture is (½, ½), from which both are as far away.
    assert generalised_jsd(student, teacher, 0.5).item() == pytest.approx(kl)
    # b = 0.9 makes M = (.7, .3): 0.9 KL(π_T ‖ M) + 0.1 KL(π_θ ‖ M)
    from_teacher = 0.75 * math.log(0.75 / 0.7) + 0.25 * math.log(0.25 / 0.3)
    from_student = 0.25 * math.log(0.25 / 0.7) + 0.75 * math.log(0.75 / 0.3)
    expected = 0.9 * from_teacher + 0.1 * from_student
    assert generalised_jsd(student, teacher, 0.9).item() == pytest.approx(expected)
    # The share is the teacher's: with the two models exchanged the value is another.
    assert generalised_jsd(teacher, student, 0.9).item() == pytest.approx(expected)
    other = generalised_jsd(two_tokens(0.1, 0.9), two_tokens(0.5, 0.5), 0.9).item()
    mixture = [0.9 * 0.5 + 0.1 * 0.1, 0.9 * 0.5 + 0.1 * 0.9]
    from_teacher = 0.5 * math.log(0.5 / mixture[0]) + 0.5 * math.log(0.5 / mixture[1])
    from_student = 0.1 * math.log(0.1 / mixture[0]) + 0.9 * math.log(0.9 / mixture[1])
    assert other == pytest.approx(0.9 * from_teacher + 0.1 * from_student)


def test_a_teacher_is_extrapolated_by_hand():
    teacher = two_tokens(0.6, 0.4)
    reference = two_tokens(0.4, 0.6)
    # .6²/.4 = .9 and .4²/.6 = .2667 in one step, .6³/.4² = 1.35 and .4³/.6² = .1778 in two
    [probs] = extrapolated_log_probs(teacher, reference, 1.0).exp().tolist()
    assert probs == pytest.approx([0.9 / (0.9 + 4 / 15), 4 / 15 / (0.9 + 4 / 15)])
    assert probs == pytest.approx([0.771, 0.229], abs=1e-3)
    [probs] = extrapolated_log_probs(teacher, reference, 2.0).exp().tolist()
    assert probs == pytest.approx([1.35 / (1.35 + 8 / 45), 8 / 45 / (1.35 + 8 / 45)])
    assert torch.equal(extrapolated_log_probs(teacher, reference, 0.0), teacher)
    # An equal reference changes nothing. With logits in place of log-probs it is the same.
    assert torch.allclose(extrapolated_log_probs(teacher, teacher, 3.0), teacher)
    shifted = extrapolated_log_probs(teacher + 2.0, reference - 5.0, 1.5)
    assert torch.allclose(shifted, extrapolated_log_probs(teacher, reference, 1.5))


@pytest.mark.parametrize("weight", [0.1, 0.5, 0.9])
def test_the_jsd_equals_a_slow_loop(weight):
    student = random_log_probs(seed=5)
    teacher = random_log_probs(seed=6)
    slow = []
    for student_row, teacher_row in zip(student.tolist(), teacher.tolist()):
        total = 0.0
        for log_q, log_p in zip(student_row, teacher_row):
            mixture = weight * math.exp(log_p) + (1 - weight) * math.exp(log_q)
            total += weight * math.exp(log_p) * (log_p - math.log(mixture))
            total += (1 - weight) * math.exp(log_q) * (log_q - math.log(mixture))
        slow.append(total)
    assert generalised_jsd(student, teacher, weight).tolist() == pytest.approx(slow, abs=1e-12)
    assert not generalised_jsd(student, student, weight).abs().gt(1e-14).any()


def test_r10_excluded_tokens_give_no_nan_in_any_divergence():
    inf = math.inf
    logits = torch.tensor([[1.0, -inf, 0.5, -inf, 0.2]], requires_grad=True)
    teacher = torch.tensor([[0.3, 0.5, 0.5, -inf, 0.7]]).log_softmax(-1)
    reference = torch.tensor([[0.1, -inf, 0.9, -inf, 0.2]]).log_softmax(-1)
    extrapolated = extrapolated_log_probs(teacher, reference, 1.0)
    assert extrapolated.isneginf().tolist() == [[False, False, False, True, False]]
    assert extrapolated.exp().sum().item() == pytest.approx(1)
    for other in (teacher, extrapolated):
        for value in (
            generalised_jsd(logits.log_softmax(-1), other, 0.5),
            reverse_kl(logits.log_softmax(-1), other),
        ):
            logits.grad = None
            value.sum().backward()
            assert value.isfinite().all() and logits.grad.isfinite().all()


# ------------------------------------------------------------------------- one step of the script
LIMITS = SimpleNamespace(max_prompt_tokens=512, max_response_tokens=TINY_RUN["max_response_tokens"])


def examples_of_the_step(loss: str, lm: LM, pairs) -> list[Example]:
    """What the only step of a run learns from: the data, or one new response to every prompt."""
    columns = COLUMNS[loss]
    examples = encode_rows(lm, read_rows(str(pairs), "train", columns), columns, LIMITS, "test")
    if columns:
        return examples
    # The responses depend on the order in which the prompts are drawn.
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(1)).tolist()
    examples = [examples[i] for i in order]
    prompts = [example.prompt_ids for example in examples]
    limit = TINY_RUN["max_response_tokens"]
    samples = lm.sample(prompts, max_new_tokens=limit, batch_size=256, seed=1)
    answered = []
    for example, [response] in zip(examples, samples):
        answered.append(Example(example.row, example.prompt_ids, [response["token_ids"]]))
    return answered


def plain_log_probs(model, prompt: list[int], response: list[int], vocab_size: int) -> torch.Tensor:
    """[|response|, V] with its gradient, from one ordinary forward pass."""
    logits = model(torch.tensor([prompt + response])).logits[0, :, :vocab_size]
    return logits[len(prompt) - 1 : -1].log_softmax(-1)


def plain_logp(model, prompt: list[int], response: list[int], vocab_size: int) -> torch.Tensor:
    """The log-prob of a whole response, summed token by token."""
    log_probs = plain_log_probs(model, prompt, response, vocab_size)
    total = 0.0
    for t, token in enumerate(response):
        total += log_probs[t, token]
    return total


def slow_divergence(loss: str, log_q, log_p, log_r) -> torch.Tensor:
    """Σ_t of a response's divergence, from the log-probs [|y|, V] of student, teacher and its
    reference, written out another way than in the script."""
    q, p = log_q.exp(), log_p.exp()
    if loss == "kd":
        return (p * (log_p - log_q)).sum()
    if loss == "gkd":
        mixture = 0.9 * p + 0.1 * q
        return (0.9 * p * (p / mixture).log() + 0.1 * q * (q / mixture).log()).sum()
    if loss == "aligndistil":
        weights = p**1.5 / log_r.exp() ** 0.5  # α = 0.5
        log_p = (weights / weights.sum(-1, keepdim=True)).log()
    return (q * (log_q - log_p)).sum()


def slow_step(loss: str, checkpoints, pairs, beta: float, gamma: float):
    """The loss over all examples of a step and its gradient, in float64: one plain forward pass
    after the other."""
    lm = LM(checkpoints["student"], torch.device("cpu"))
    examples = examples_of_the_step(loss, lm, pairs)
    student, teacher, teacher_ref, reference = [
        AutoModelForCausalLM.from_pretrained(checkpoints[name], dtype=torch.float64)
        for name in ("student", "teacher", "teacher_ref", "student")
    ]
    # Samples of a random model hold every token, and transformers gives padding no gradient.
    student.get_input_embeddings().padding_idx = None
    total = 0.0
    for example in examples:
        prompt = example.prompt_ids
        if loss not in ("dpo", "simpo"):
            [response] = example.response_ids
            log_q = plain_log_probs(student, prompt, response, lm.vocab_size)
            log_p = plain_log_probs(teacher, prompt, response, lm.vocab_size).detach()
            log_r = plain_log_probs(teacher_ref, prompt, response, lm.vocab_size).detach()
            total += slow_divergence(loss, log_q, log_p, log_r) / len(response)
            continue
        rewards = []
        for response in example.response_ids:
            logp = plain_logp(student, prompt, response, lm.vocab_size)
            if loss == "dpo":
                rewards.append(logp - plain_logp(reference, prompt, response, lm.vocab_size))
            else:
                rewards.append(logp / len(response))
        chosen_reward, rejected_reward = rewards
        margin = beta * (chosen_reward - rejected_reward)
        if loss == "simpo":
            margin = margin - gamma
        total += (1 + (-margin).exp()).log()
    total = total / len(examples)
    return total.item(), torch.autograd.grad(total, list(student.parameters()))


STEPS = [("dpo", 0.5, 0), ("simpo", 2.0, 1.3)]
STEPS += [(loss, 1.0, 0) for loss in ("kd", "reverse_kl", "gkd", "aligndistil")]


@pytest.mark.parametrize("loss, beta, gamma", STEPS)
def test_r04_a_step_equals_a_slow_loop_over_plain_forward_passes(
    loss, beta, gamma, checkpoints, pairs, run_tiny
):
    run = run_tiny(
        "studies/baselines",
        loss=loss,
        beta=beta,
        simpo_gamma=gamma,
        jsd_weight=0.9,
        alpha=0.5,
        teacher_ref=checkpoints["teacher_ref"],
    )
    expected, gradient = slow_step(loss, checkpoints, pairs, beta, gamma)
    [row] = training_rows(run)
    assert row["losses/total"] == pytest.approx(expected, rel=2e-4)
    if loss == "dpo":
        assert row["losses/total"] == pytest.approx(math.log(2), abs=1e-6)
    for measured, slow in zip(first_gradient(run), gradient, strict=True):
        torch.testing.assert_close(measured.double(), slow, rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("weight", [0, 1, 1.5])
def test_a_jsd_without_both_models_is_refused(weight, tmp_path, capsys):
    run = tmp_path / "run"
    assert run_script("studies/baselines", loss="gkd", jsd_weight=weight, output_dir=run) == 2
    assert f"--jsd_weight {float(weight)} must lie between 0 and 1" in capsys.readouterr().err


def test_the_reference_of_dpo_is_the_initial_student(run_tiny):
    """After some steps the loss has left log 2, which it would not if the reference were trained as
    well."""
    run = run_tiny("studies/baselines", loss="dpo", max_steps=6, learning_rate=3e-3)
    rows = training_rows(run)
    assert rows[0]["losses/total"] == pytest.approx(math.log(2), abs=1e-6)
    assert rows[-1]["losses/total"] < math.log(2) - 0.1


@pytest.mark.slow
@every_loss
def test_r20_the_split_of_a_batch_changes_nothing(loss, run_tiny, reference):
    whole = run_tiny("studies/baselines", loss=loss, micro_batch_size=8, **reference)
    parts = run_tiny("studies/baselines", loss=loss, micro_batch_size=3, **reference)
    [one] = training_rows(whole)
    [other] = training_rows(parts)
    assert one["losses/total"] == pytest.approx(other["losses/total"], rel=1e-5)
    for a, b in zip(first_gradient(whole), first_gradient(parts), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("loss", one_short(LOSSES, "simpo"))
def test_what_is_0_takes_what_suits_the_loss(loss, run_tiny, reference):
    run = run_tiny("studies/baselines", loss=loss, **reference)
    args = json.loads((run / "args.json").read_text())
    for name, value in DEFAULTS[loss].items():
        assert args[name] == value
    run = run_tiny("studies/baselines", loss=loss, beta=0.25, learning_rate=0.125, **reference)
    args = json.loads((run / "args.json").read_text())
    assert args["beta"] == 0.25 and args["learning_rate"] == 0.125


# --------------------------------------------------------------------- on one footing with scripts
CALLS_LEFT = [0]


def deadly(prompts, responses) -> list[float]:
    """A reward function that is interrupted as soon as it was called often enough."""
    CALLS_LEFT[0] -= 1
    if CALLS_LEFT[0] == 0:
        raise KeyboardInterrupt
    return vowels(prompts, responses)


@pytest.mark.slow
@every_loss
def test_r36_an_interrupted_run_ends_with_the_same_bits(loss, checkpoints, pairs, tmp_path):
    flags = {
        "student": checkpoints["student"],
        "teacher": checkpoints["teacher"],
        "teacher_ref": checkpoints["teacher_ref"],
        "data": pairs,
        "eval_data": pairs,
        "max_steps": 6,
        "batch_size": 4,
        "eval_prompts": 2,
        "max_response_tokens": 40,
        "log_every": 1,
        "save_every": 2,
        "eval_every": 3,
        "reward": "test_baselines:deadly",
        "loss": loss,
    }
    whole = tmp_path / "whole"
    died = tmp_path / "died"
    assert run_script("studies/baselines", **flags, output_dir=whole) == 0
    # Two calls come before training, the third at step 3, when the checkpoint is of step 2.
    CALLS_LEFT[0] = 3
    assert run_script("studies/baselines", **flags, output_dir=died) == 130
    # A kill may also cut the last line of the metrics.
    with (died / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "losses/to')
    assert run_script("studies/baselines", resume=died) == 0
    weights = load_file(whole / "model" / "model.safetensors")
    resumed_weights = load_file(died / "model" / "model.safetensors")
    assert weights.keys() == resumed_weights.keys()
    for name, weight in weights.items():
        assert torch.equal(weight, resumed_weights[name])
    for row, resumed_row in zip(training_rows(whole), training_rows(died), strict=True):
        del row["charts/tokens_per_second"]
        del resumed_row["charts/tokens_per_second"]
        assert row == resumed_row


def test_a_run_that_cannot_start_leaves_other_runs_alone(run_tiny, tmp_path, capsys):
    run = run_tiny("studies/baselines")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert run_script("studies/baselines", output_dir=run) == 2
    assert "is not empty" in capsys.readouterr().err
    assert run_script("studies/baselines", resume=run) == 0
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for flags in ({"student": tmp_path / "none"}, {"beta": -1}):
        assert run_script("studies/baselines", output_dir=tmp_path / "new", **flags) == 2
        assert "error:" in capsys.readouterr().err
        assert not (tmp_path / "new").exists()


@pytest.mark.slow
@every_loss
def test_r33_a_loss_that_is_not_finite_ends_the_run(loss, pairs, tmp_path, capsys):
    run = tmp_path / "run"
    flags = {"loss": loss, "learning_rate": 1e30, "save_every": 1, "log_every": 1}
    own_data = {"data": pairs, "eval_data": pairs, "reward": "none"}
    assert run_script("studies/baselines", **flags, **own_data, output_dir=run) == 2
    message = re.search(r"error: loss (.*) in step (\d+) on rows", capsys.readouterr().err)
    numbers, step = message.groups()
    assert re.search(r"\b(nan|inf)\b", numbers)
    assert torch.load(run / "checkpoint.pt", weights_only=True)["step"] == int(step) > 0
    assert len(training_rows(run)) == int(step) and not (run / "model").exists()


def test_r33_a_gradient_that_is_not_finite_ends_the_run_as_well(pairs, tmp_path, capsys):
    """The first loss of DPO is log 2 for every β. Its gradient is proportional to β."""
    flags = {"loss": "dpo", "beta": 1e38, "data": pairs, "eval_data": pairs, "reward": "none"}
    assert run_script("studies/baselines", **flags, output_dir=tmp_path / "run") == 2
    expected = r"error: loss 0\.69\d*, gradient norm (inf|nan) in step 0 on rows"
    assert re.search(expected, capsys.readouterr().err)


def shared_flags(path: str) -> dict[str, str]:
    """{flag: its line and its help} of those of Optimisation and the groups below it."""
    text = (ROOT / path).read_text()
    start = text.index("class Optimisation:\n")
    end = text.index("class Args(", start)
    return dict(re.findall(r'^    (\w+): (.*?""")$', text[start:end], re.M | re.S))


@pytest.mark.parametrize("script", ["studies/baselines.py", "studies/rloo.py"])
def test_flags_that_it_shares_with_the_scripts_have_not_drifted(script):
    expected = shared_flags("adpa.py")
    flags = shared_flags(script)
    assert len(flags) > 25 and list(flags) == list(expected)
    for name, entry in flags.items():
        if name != "learning_rate":
            assert entry == expected[name], f"--{name} is not what it is in adpa.py"


@pytest.mark.slow
@pytest.mark.parametrize("loss, rises", [("dpo", 0.05), ("reverse_kl", 0.15)])
def test_a_short_run_improves_the_student(loss, rises, tmp_path):
    run = tmp_path / "run"
    flags = {"loss": loss, "max_steps": 50, "eval_prompts": 128, "eval_every": 50}
    assert run_script("studies/baselines", **flags, output_dir=run) == 0
    rows = training_rows(run)
    [reward_after] = [row["eval/reward"] for row in rows if "eval/reward" in row]
    summary = json.loads((run / "summary.json").read_text())
    assert summary["reward_after"] == reward_after
    before = [row["reward"] for row in read_jsonl(run / "eval_before.jsonl")]
    assert reward_after > sum(before) / len(before) + rises
