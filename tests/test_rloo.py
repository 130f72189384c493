"""studies/rloo.py: advantages by hand, a step against plain forward passes in float64, what it says
of the KL, and that a run which was interrupted ends with the same bits."""

import json
import statistics

import pytest
import torch
from conftest import (
    TINY_RUN,
    first_gradient,
    random_examples,
    read_jsonl,
    run_script,
    training_rows,
    vowels,
)
from safetensors.torch import load_file
from test_baselines import LIMITS, plain_log_probs
from transformers import AutoModelForCausalLM

from common import LM, encode_rows, read_rows
from studies.rloo import Args, Sampled, leave_one_out, leave_one_out_of_tokens, rloo_terms

CREDITS = ["reward", "implicit", "implicit_tokens"]
every_credit = pytest.mark.parametrize("credit", CREDITS)


# -------------------------------------------------------------------------------------- mathematics
def test_the_others_are_the_baseline_by_hand():
    rewards = torch.tensor([[1.0, 2.0, 6.0], [5.0, 5.0, 5.0]])
    assert leave_one_out(rewards).tolist() == [[-3.0, -1.5, 4.5], [0.0, 0.0, 0.0]]
    # With two responses it is the difference.
    assert leave_one_out(torch.tensor([[3.0, 1.0]])).tolist() == [[2.0, -2.0]]


def test_the_baseline_of_tokens_by_hand():
    """Two prompts with two responses: (1, 3) and (4,), then (2,) and (0, 6)."""
    values = torch.tensor([1.0, 3.0, 4.0, 2.0, 0.0, 6.0])
    response_index = torch.tensor([0, 0, 1, 2, 3, 3])
    expected = [1 - 4, 3 - 4, 4 - 2, 2 - 3, 0 - 2, 6 - 2]
    assert leave_one_out_of_tokens(values, response_index, 2).tolist() == expected


@pytest.mark.parametrize("seed", range(3))
def test_the_baseline_of_tokens_equals_a_slow_loop(seed):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 6, (12,), generator=generator)
    response_index = torch.arange(12).repeat_interleave(lengths)
    values = torch.randn(len(response_index), generator=generator, dtype=torch.float64)
    k = 4
    slow = []
    for value, response in zip(values.tolist(), response_index.tolist()):
        others = []
        for other_value, other in zip(values.tolist(), response_index.tolist()):
            if other != response and other // k == response // k:
                others.append(other_value)
        slow.append(value - sum(others) / len(others))
    assert leave_one_out_of_tokens(values, response_index, k).tolist() == pytest.approx(slow)


# ------------------------------------------------------------------------- one step of the script
def tiny(run_tiny, checkpoints, credit: str, **flags):
    return run_tiny("studies/rloo", credit=credit, teacher_ref=checkpoints["teacher_ref"], **flags)


def samples_of_the_step(checkpoints, pairs) -> list[tuple[dict, list[int], list[dict]]]:
    """(row, prompt, its three responses) as the only step of a run samples them."""
    lm = LM(checkpoints["student"], torch.device("cpu"))
    rows = read_rows(str(pairs), "train", columns=())
    examples = encode_rows(lm, rows, [], LIMITS, "test")
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(1)).tolist()
    examples = [examples[i] for i in order]
    prompts = [example.prompt_ids for example in examples]
    limit = TINY_RUN["max_response_tokens"]
    samples = lm.sample(prompts, n=3, max_new_tokens=limit, batch_size=256, seed=1)
    sampled = []
    for example, responses in zip(examples, samples):
        sampled.append((example.row, example.prompt_ids, responses))
    return sampled


def slow_advantages(credit: str, log_ratios: list[list[float]], rewards: list[float]):
    """For every response of one prompt, a list with an advantage for each token."""
    advantages = []
    for i, own in enumerate(log_ratios):
        others = [j for j in range(len(log_ratios)) if j != i]
        if credit == "implicit_tokens":
            tokens = []
            for j in others:
                tokens += log_ratios[j]
            advantages.append([value - sum(tokens) / len(tokens) for value in own])
            continue
        worth = rewards
        if credit == "implicit":
            worth = [sum(values) for values in log_ratios]
        baseline = sum(worth[j] for j in others) / len(others)
        advantages.append([worth[i] - baseline] * len(own))
    return advantages


@pytest.mark.parametrize("scale", [True, pytest.param(False, marks=pytest.mark.slow)])
@every_credit
def test_r04_a_step_equals_a_slow_loop_over_plain_forward_passes(
    credit, scale, checkpoints, pairs, run_tiny
):
    """In the first step π_θ is π_0, so the KL and its gradient are 0: the next test is about it."""
    scaling = "scale_advantages" if scale else "no-scale_advantages"
    run = tiny(run_tiny, checkpoints, credit, num_samples=3, kl_coef=0.5, **{scaling: True})
    models = {}
    for name in ("student", "teacher", "teacher_ref"):
        models[name] = AutoModelForCausalLM.from_pretrained(checkpoints[name], dtype=torch.float64)
    models["student"].get_input_embeddings().padding_idx = None
    vocab_size = LM(checkpoints["student"], torch.device("cpu")).vocab_size

    prompts = samples_of_the_step(checkpoints, pairs)
    all_logps = []
    all_advantages = []
    for row, prompt, responses in prompts:
        log_ratios = []
        for response in responses:
            ids = response["token_ids"]
            rows = torch.arange(len(ids))
            logps = {}
            for name, model in models.items():
                log_probs = plain_log_probs(model, prompt, ids, vocab_size)
                logps[name] = log_probs[rows, torch.tensor(ids)]
            all_logps.append(logps["student"])
            log_ratios.append((logps["teacher"] - logps["teacher_ref"]).tolist())
        rewards = vowels([row["prompt"]] * 3, [response["text"] for response in responses])
        all_advantages += slow_advantages(credit, log_ratios, rewards)
    flat = torch.tensor([value for values in all_advantages for value in values])
    divisor = flat.std().item() if scale else 1.0
    total = 0.0
    for logps, advantages in zip(all_logps, all_advantages):
        total -= (logps * torch.tensor(advantages) / divisor).sum()
    total = total / len(all_logps)

    [measured] = training_rows(run)
    assert measured["losses/policy"] == pytest.approx(total.item(), rel=1e-3, abs=1e-4)
    assert measured["losses/kl"] == pytest.approx(0, abs=1e-5)
    gradient = torch.autograd.grad(total, list(models["student"].parameters()))
    for one, other in zip(first_gradient(run), gradient, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=5e-3, atol=2e-3)


def slow_kl(models, prompt: list[int], ids: list[int], vocab_size: int) -> torch.Tensor:
    """Σ_t KL(π_θ ‖ π_0) of a response, from two models in float64."""
    student = plain_log_probs(models[0], prompt, ids, vocab_size)
    start = plain_log_probs(models[1], prompt, ids, vocab_size).detach()
    return (student.exp() * (student - start)).sum()


def test_the_kl_is_exact_a_sum_over_a_response_and_has_its_gradient(checkpoints, load):
    """The teacher stands for the student before training, so that there is a distance."""
    student = load("student", trainable=True)
    start = load("teacher")
    vocab_size = student.vocab_size
    examples = random_examples(vocab_size, [(3, [4, 2]), (5, [1, 6])], seed=3)
    # Id 0 is the padding token, which transformers gives no gradient.
    samples = []
    for example in examples:
        zeros = [torch.zeros(len(ids)) for ids in example.response_ids]
        samples.append(Sampled(example, zeros))
    terms = rloo_terms(samples, student, start, vocab_size, Args(logits_chunk=4))
    models = [
        AutoModelForCausalLM.from_pretrained(checkpoints[name], dtype=torch.float64)
        for name in ("student", "teacher")
    ]
    models[0].get_input_embeddings().padding_idx = None
    expected = []
    for example in examples:
        one, other = [
            slow_kl(models, example.prompt_ids, ids, vocab_size) for ids in example.response_ids
        ]
        expected.append((one + other) / 2)
    assert terms["kl"].tolist() == pytest.approx([kl.item() for kl in expected], rel=1e-4)
    assert terms["policy"].tolist() == [0.0, 0.0]
    terms["kl"].sum().backward()
    gradient = torch.autograd.grad(sum(expected), list(models[0].parameters()))
    for parameter, slow in zip(student.model.parameters(), gradient, strict=True):
        torch.testing.assert_close(parameter.grad.double(), slow, rtol=5e-3, atol=2e-3)


@pytest.mark.slow
@every_credit
def test_r20_the_split_of_a_batch_changes_nothing(credit, run_tiny, checkpoints):
    gradients = []
    for size in (8, 3):
        run = tiny(run_tiny, checkpoints, credit, micro_batch_size=size)
        gradients.append(first_gradient(run))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


# ------------------------------------------------------------------------------ what a run measures
def no_reward(prompts, responses) -> list[None]:
    return [None] * len(responses)


def length_in_words(prompts, responses) -> list[float]:
    return [float(len(response.split())) for response in responses]


def test_evaluations_are_judged_by_another_reward_and_say_what_kl_was_spent(run_tiny, checkpoints):
    run = tiny(
        run_tiny,
        checkpoints,
        "reward",
        eval_reward="test_rloo:length_in_words",
        max_steps=3,
        learning_rate=3e-3,
        eval_prompts=4,
    )
    *_, last = read_jsonl(run / "metrics.jsonl")
    answers = read_jsonl(run / "eval_after.jsonl")
    words = [len(answer["text"].split()) for answer in answers]
    assert last["eval/reward"] == pytest.approx(statistics.mean(words))
    assert 0 <= last["charts/reward"] <= 1  # a share of vowels, by --reward
    # Σ_t KL between the saved model and the one before training, on the same responses.
    models = []
    for path in (run / "model", checkpoints["student"]):
        models.append(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64))
    lm = LM(checkpoints["student"], torch.device("cpu"))
    sums = []
    for answer in answers:
        prompt = lm.prompt_ids(answer["prompt"])
        sums.append(slow_kl(models, prompt, answer["token_ids"], lm.vocab_size).item())
    assert last["eval/kl"] == pytest.approx(statistics.mean(sums), rel=1e-3)
    assert last["eval/kl"] > 0.001
    lengths = [len(answer["token_ids"]) for answer in answers]
    assert last["eval/length"] == pytest.approx(statistics.mean(lengths))
    summary = json.loads((run / "summary.json").read_text())
    assert summary["kl_spent"] == last["eval/kl"]
    assert summary["response_tokens"] == last["eval/length"]


@pytest.mark.slow
def test_training_pays_for_the_reward(run_tiny, checkpoints):
    """A dozen steps towards vowels raise their share, and a high price keeps the KL low."""
    rises = []
    spent = []
    for kl_coef in (0.0, 100.0):
        run = tiny(
            run_tiny, checkpoints, "reward", max_steps=12, kl_coef=kl_coef, learning_rate=1e-2
        )
        rows = training_rows(run)
        rises.append(rows[-1]["charts/reward"] - rows[0]["charts/reward"])
        spent.append(rows[-1]["eval/kl"])
    assert rises[0] > 0.05 and spent[1] < spent[0] / 2, (rises, spent)


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"num_samples": 1}, "--num_samples 1 must be at least 2"),
        ({"reward": "none"}, "--reward none leaves nothing to learn from"),
        ({"reward": "test_rloo:no_reward"}, "must have a reward for every response"),
    ],
)
def test_what_leaves_nothing_to_learn_from_is_one_line(flags, message, checkpoints, pairs, capsys):
    words = {
        "student": checkpoints["student"],
        "teacher": checkpoints["teacher"],
        "data": pairs,
        "eval_data": pairs,
        "eval_reward": "conftest:vowels",
        "eval_prompts": 2,
        "max_response_tokens": 10,
        **flags,
    }
    capsys.readouterr()
    assert run_script("studies/rloo", **words) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


# --------------------------------------------------------------------- on one footing with scripts
CALLS_LEFT = [0]


def deadly(prompts, responses) -> list[float]:
    """A reward function that is interrupted as soon as it was called often enough."""
    CALLS_LEFT[0] -= 1
    if CALLS_LEFT[0] == 0:
        raise KeyboardInterrupt
    return vowels(prompts, responses)


@pytest.mark.slow
def test_r36_an_interrupted_run_ends_with_the_same_bits(checkpoints, pairs, tmp_path):
    flags = {
        "student": checkpoints["student"],
        "teacher": checkpoints["teacher"],
        "data": pairs,
        "eval_data": pairs,
        "max_steps": 6,
        "batch_size": 4,
        "eval_prompts": 2,
        "max_response_tokens": 40,
        "log_every": 1,
        "save_every": 2,
        "reward": "test_rloo:deadly",
        "eval_reward": "conftest:vowels",
    }
    whole = tmp_path / "whole"
    died = tmp_path / "died"
    assert run_script("studies/rloo", **flags, output_dir=whole) == 0
    CALLS_LEFT[0] = 4  # the fourth step, behind a checkpoint of step 2
    assert run_script("studies/rloo", **flags, output_dir=died) == 130
    assert run_script("studies/rloo", resume=died) == 0
    weights = load_file(whole / "model" / "model.safetensors")
    for name, weight in load_file(died / "model" / "model.safetensors").items():
        assert torch.equal(weight, weights[name])
    for row, resumed_row in zip(
        read_jsonl(whole / "metrics.jsonl"), read_jsonl(died / "metrics.jsonl"), strict=True
    ):
        row.pop("charts/tokens_per_second", None)
        resumed_row.pop("charts/tokens_per_second", None)
        assert row == resumed_row
