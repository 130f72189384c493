"""dpkd.py: its loss against float64 loops, a step of the script against plain forward passes, when
it samples, interrupted runs, its corpus, and the collapse on old responses of the student."""

import gzip
import math
import random
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    ROOT,
    TINY_RUN,
    first_gradient,
    make_model,
    make_tokenizer,
    read_jsonl,
    run_script,
    save,
    vowels,
    write_jsonl,
)
from safetensors.torch import load_file
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM

import common
from common import (
    LM,
    Example,
    encode_rows,
    load_checkpoint,
    read_rows,
    save_checkpoint,
)
from dpkd import (
    Args,
    PendingSamples,
    has_collapsed,
    implicit_rewards,
    preference_loss,
    read_corpus,
    read_texts,
    take_pairs,
    weighted,
)

CPU = torch.device("cpu")
INF = math.inf
# Models whose responses are text, and end.
PLAYGROUND = {"student": "playground/student", "teacher": "playground/teacher"}
LENGTHS = [5, 1, 3, 7, 2, 2]  # of three pairs y_t, y_s


def random_logps(seed: int) -> torch.Tensor:
    """[N]: a log-prob for every token of responses of the LENGTHS."""
    generator = torch.Generator().manual_seed(seed)
    return -3 * torch.rand(sum(LENGTHS), generator=generator)


def rewards_of(student_logps, teacher_logps, lengths=LENGTHS, beta=1.5, length_normalize=True):
    """`implicit_rewards` of responses with these lengths."""
    lengths = torch.tensor(lengths)
    response_index = torch.arange(len(lengths)).repeat_interleave(lengths)
    batch = SimpleNamespace(response_index=response_index, lengths=lengths)
    return implicit_rewards(
        student_logps, teacher_logps, batch, beta=beta, length_normalize=length_normalize
    )


def slow_rewards(student_logps, teacher_logps, beta, length_normalize) -> list[float]:
    """One token after the other."""
    student_logps = student_logps.tolist()
    teacher_logps = teacher_logps.tolist()
    rewards = []
    for length in LENGTHS:
        log_ratio = 0.0
        for _ in range(length):
            log_ratio += student_logps.pop(0) - teacher_logps.pop(0)
        divisor = length if length_normalize else 1
        rewards.append(beta / divisor * log_ratio)
    return rewards


# -------------------------------------------------------------------------------------- mathematics
def test_one_pair_by_hand():
    """The example of the docstrings: q(y_t) = ½ · ¼, p(y_t) = ½ · ½; q(y_s) = ½, p(y_s) = ⅛. The
    margin is (2/2) log ½ − (2/1) log 4."""
    student = torch.tensor([0.5, 0.25, 0.5]).log()
    teacher = torch.tensor([0.5, 0.5, 0.125]).log()
    rewards = rewards_of(student, teacher, [2, 1], beta=2.0)
    assert rewards.tolist() == pytest.approx([math.log(0.5), 2 * math.log(4)])
    assert rewards.tolist() == pytest.approx([-0.69, 2.77], abs=0.005)
    [loss], [margin] = preference_loss(rewards)
    assert margin.item() == pytest.approx(-5 * math.log(2))
    assert margin.item() == pytest.approx(-3.47, abs=0.005)
    assert loss.item() == pytest.approx(math.log(1 + 2**5))
    assert loss.item() == pytest.approx(3.496508, abs=1e-6)
    summed = rewards_of(student, teacher, [2, 1], beta=2.0, length_normalize=False)
    assert summed.tolist() == pytest.approx([2 * math.log(0.5), 2 * math.log(4)])


@pytest.mark.parametrize("length_normalize", [True, False])
@pytest.mark.parametrize("beta", [0.1, 1.0, 5.0])
def test_r26_rewards_and_loss_equal_a_slow_loop(length_normalize, beta):
    student = random_logps(1)
    teacher = random_logps(2)
    slow = slow_rewards(student, teacher, beta, length_normalize)
    slow_margins = [y_t - y_s for y_t, y_s in zip(slow[::2], slow[1::2])]
    slow_losses = [math.log(1 + math.exp(-margin)) for margin in slow_margins]
    rewards = rewards_of(student, teacher, beta=beta, length_normalize=length_normalize)
    assert rewards.tolist() == pytest.approx(slow, rel=1e-5, abs=1e-6)
    losses, margins = preference_loss(rewards)
    assert losses.tolist() == pytest.approx(slow_losses, rel=1e-5, abs=1e-6)
    assert margins.tolist() == pytest.approx(slow_margins, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("length_normalize", [True, False])
def test_r29_a_student_that_is_its_teacher_has_loss_log_2_for_every_pair(length_normalize):
    logps = random_logps(1)
    rewards = rewards_of(logps, logps.clone(), beta=3.0, length_normalize=length_normalize)
    losses, margins = preference_loss(rewards)
    log_2 = torch.tensor(2.0).log().item()
    assert margins.tolist() == [0.0, 0.0, 0.0]
    assert losses.tolist() == [log_2, log_2, log_2]


def test_r24_exchanged_answers_negate_the_margin():
    student = random_logps(1)
    teacher = random_logps(2)
    _, margins = preference_loss(rewards_of(student, teacher))
    order = [1, 0, 3, 2, 5, 4]
    student_parts = student.split(LENGTHS)
    teacher_parts = teacher.split(LENGTHS)
    exchanged = rewards_of(
        torch.cat([student_parts[i] for i in order]),
        torch.cat([teacher_parts[i] for i in order]),
        [LENGTHS[i] for i in order],
    )
    _, exchanged_margins = preference_loss(exchanged)
    assert torch.allclose(margins, -exchanged_margins, atol=1e-5)
    assert margins.abs().min() > 0.01


@pytest.mark.parametrize("length_normalize, factor", [(True, 1), (False, 2)])
def test_answers_of_twice_the_length_have_the_same_normalised_margin(length_normalize, factor):
    student = random_logps(1)
    teacher = random_logps(2)
    rewards = rewards_of(student, teacher, length_normalize=length_normalize)
    rewards_of_twice = rewards_of(
        torch.cat([part.repeat(2) for part in student.split(LENGTHS)]),
        torch.cat([part.repeat(2) for part in teacher.split(LENGTHS)]),
        [2 * length for length in LENGTHS],
        length_normalize=length_normalize,
    )
    _, margins = preference_loss(rewards)
    _, margins_of_twice = preference_loss(rewards_of_twice)
    assert torch.allclose(margins_of_twice, factor * margins, atol=1e-5)


def test_the_gradients_weight_is_sigma_of_r_s_minus_r_t():
    """∂L/∂log q(y_t) = −σ(r_s − r_t) β/|y_t| at every token; the paper prints σ(r_t − r_s)."""
    student = random_logps(1).requires_grad_()
    rewards = rewards_of(student, random_logps(2), beta=1.5)
    losses, margins = preference_loss(rewards)
    losses.sum().backward()
    sigma = (-margins.detach()).sigmoid()
    weights = torch.stack([-sigma, sigma], 1).flatten()  # [R]: y_t, y_s of every pair
    lengths = torch.tensor(LENGTHS)
    expected = (1.5 * weights / lengths).repeat_interleave(lengths)
    assert torch.allclose(student.grad, expected, atol=1e-5)


def test_r10_excluded_tokens_give_no_nan_and_a_broken_model_is_not_hidden():
    student = torch.tensor([-1.0, -2.0, -INF, -0.5, -INF, -1.0], requires_grad=True)
    teacher = torch.tensor([-0.5, -INF, -1.0, -0.5, -INF, -3.0])
    rewards = rewards_of(student, teacher, [3, 3], beta=1.0)
    assert rewards.tolist() == pytest.approx([-0.5 / 3, 2.0 / 3])
    losses, _ = preference_loss(rewards)
    losses.sum().backward()
    assert student.grad.isfinite().all()
    assert not student.grad[[1, 2, 4]].any()
    # r33: it must end the run.
    broken = torch.tensor([math.nan, -1.0])
    losses, _ = preference_loss(rewards_of(broken, -torch.ones(2), [1, 1]))
    assert losses.isnan().all()


def test_r10_a_weight_of_0_leaves_out_what_is_infinite():
    infinite = torch.tensor(INF, requires_grad=True)
    assert weighted(0.0, infinite) == 0
    assert weighted(0.5, infinite) == INF
    assert weighted(0.5, torch.tensor(3.0)) == 1.5


# ------------------------------------------------------------------------- one step of the script
LIMITS = SimpleNamespace(max_prompt_tokens=512, max_response_tokens=TINY_RUN["max_response_tokens"])


def trained_pairs(run, lm: LM) -> list[Example]:
    """What the run trained on, in the order of its only step. y_t comes from the run's own file,
    y_s from the untrained student with the run's seed."""
    rows = [{**row, "y_t": row} for row in read_jsonl(run / "teacher_answers.jsonl")]
    examples = encode_rows(lm, rows, ["y_t"], LIMITS, "test")
    assert len(examples) == len(rows)
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(1)).tolist()
    examples = [examples[i] for i in order]
    prompts = [example.prompt_ids for example in examples]
    limit = TINY_RUN["max_response_tokens"]
    samples = lm.sample(prompts, max_new_tokens=limit, batch_size=256, seed=1)
    for example, [sample] in zip(examples, samples):
        example.response_ids.append(sample["token_ids"])
    return examples


def sum_of_logps(model, example: Example, k: int, vocab_size: int) -> torch.Tensor:
    """log q(y|x) of response k with a gradient, from one plain forward pass."""
    prompt = example.prompt_ids
    response = example.response_ids[k]
    logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1, :vocab_size]
    log_probs = logits.log_softmax(-1)
    total = 0.0
    for t, token in enumerate(response):
        total = total + log_probs[t, token]
    return total


def slow_step(run, checkpoints, beta=1.0, length_normalize=True, corpus=()):
    """({term: value}, {term: gradient}) over all pairs, in float64. It takes one plain forward pass
    after the other."""
    lm = LM(checkpoints["student"], CPU)
    examples = trained_pairs(run, lm)
    student, teacher = [
        AutoModelForCausalLM.from_pretrained(checkpoints[name], dtype=torch.float64)
        for name in ("student", "teacher")
    ]
    # Samples of a random model hold every token, and transformers gives padding no gradient.
    student.get_input_embeddings().padding_idx = None
    count = len(examples)
    terms = {"preference": 0.0, "margin": 0.0, "sft": 0.0}
    for example in examples:
        rewards = []
        for k, response in enumerate(example.response_ids):
            log_q = sum_of_logps(student, example, k, lm.vocab_size)
            log_p = sum_of_logps(teacher, example, k, lm.vocab_size).detach()
            divisor = len(response) if length_normalize else 1
            rewards.append(beta / divisor * (log_q - log_p))
            if k == 0:
                terms["sft"] -= log_q / len(response) / count
        margin = rewards[0] - rewards[1]
        terms["margin"] += margin / count
        terms["preference"] += (1 + (-margin).exp()).log() / count
    if corpus:
        terms["lm"] = 0.0
        for piece in random.Random(1).choices(corpus, k=count):
            log_q = sum_of_logps(student, piece, 0, lm.vocab_size)
            terms["lm"] -= log_q / len(piece.response_ids[0]) / count

    parameters = list(student.parameters())
    values = {}
    gradients = {}
    for name, term in terms.items():
        values[name] = term.item()
        gradients[name] = torch.autograd.grad(term, parameters, retain_graph=True)
    return values, gradients


CORPUS = "A text about nothing.\nAnother one, which is a little longer.\nx\n"
SETTINGS = {
    "equation 9": {},
    "sums in place of means": {"beta": 0.1, "no-length_normalize": True},
    "with cross-entropy": {"beta": 2.0, "sft_coef": 0.5},
    "with a corpus": {"beta": 0.5, "lm_coef": 0.7},
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_r04_a_step_equals_a_slow_loop_over_plain_forward_passes(
    checkpoints, run_tiny, tmp_path, setting
):
    flags = SETTINGS[setting]
    weights = {"preference": 1.0}
    corpus = ()
    if "sft_coef" in flags:
        weights["sft"] = flags["sft_coef"]
    if "lm_coef" in flags:
        weights["lm"] = flags["lm_coef"]
        path = tmp_path / "corpus.txt"
        path.write_text(CORPUS)
        flags = {**flags, "lm_data": path}
        corpus = read_corpus(LM(checkpoints["student"], CPU), corpus_flags(path, 40))
    run = run_tiny("dpkd", **flags)
    values, gradients = slow_step(
        run,
        checkpoints,
        beta=flags.get("beta", 1.0),
        length_normalize="no-length_normalize" not in flags,
        corpus=corpus,
    )
    row = read_jsonl(run / "metrics.jsonl")[-1]
    assert ("losses/lm" in row) == bool(corpus)
    for name, value in values.items():
        assert row[f"losses/{name}"] == pytest.approx(value, rel=2e-4, abs=1e-5)
    total = sum(weight * values[name] for name, weight in weights.items())
    assert row["losses/total"] == pytest.approx(total, rel=2e-4)
    for i, measured in enumerate(first_gradient(run)):
        expected = sum(weight * gradients[name][i] for name, weight in weights.items())
        torch.testing.assert_close(measured.double(), expected, rtol=2e-3, atol=1e-4)


def test_r29_a_run_with_the_student_as_teacher_begins_at_log_2(checkpoints, run_tiny):
    row = read_jsonl(run_tiny("dpkd", teacher=checkpoints["student"]) / "metrics.jsonl")[-1]
    assert row["losses/preference"] == pytest.approx(math.log(2), abs=1e-6)
    assert row["losses/total"] == row["losses/preference"]
    assert row["losses/margin"] == pytest.approx(0, abs=1e-6)


class StudentWithoutEos(common.LM):
    """A student that never ends a response: the token that would do it has probability 0."""

    def check_packing(self):
        """Nothing is checked, because the model itself does not exclude the token."""

    def logits(self, hidden, vocab_size):
        logits = super().logits(hidden, vocab_size)
        if self.trainable:
            logits = logits.index_fill(-1, torch.tensor(self.eos_ids), -INF)
        return logits


def test_r10_terms_of_weight_0_may_be_infinite(pairs, tmp_path, monkeypatch, capsys):
    """Every text of data and corpus ends with a token that this student excludes."""
    corpus = tmp_path / "corpus.txt"
    corpus.write_text(CORPUS)
    flags = {**TINY_RUN, **PLAYGROUND, "data": pairs, "eval_data": pairs, "lm_data": corpus}
    monkeypatch.setattr(common, "LM", StudentWithoutEos)
    run = tmp_path / "run"
    assert run_script("dpkd", **flags, lm_coef=0, output_dir=run) == 0
    row = read_jsonl(run / "metrics.jsonl")[-1]
    assert row["losses/sft"] == row["losses/lm"] == INF
    assert math.isfinite(row["losses/total"])
    assert all(gradient.isfinite().all() for gradient in first_gradient(run))
    capsys.readouterr()
    assert run_script("dpkd", **flags, output_dir=tmp_path / "with_lm") == 2
    assert "error: loss inf" in capsys.readouterr().err


def test_no_answer_of_the_data_is_used(pairs, run_tiny, tmp_path):
    only_prompts = [{"prompt": row["prompt"]} for row in read_jsonl(pairs)]
    other = write_jsonl(tmp_path / "other.jsonl", only_prompts)
    one = first_gradient(run_tiny("dpkd", data=pairs))
    two = first_gradient(run_tiny("dpkd", data=other))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_the_teachers_answers_are_sampled_once_from_the_first_prompts(pairs, run_tiny, monkeypatch):
    monkeypatch.chdir(ROOT)
    run = run_tiny("dpkd", **PLAYGROUND, teacher_answers=3, batch_size=2, max_steps=5)
    lm = LM(PLAYGROUND["teacher"], CPU)
    rows = read_rows(str(pairs), "train", ())[:3]
    prompts = [lm.prompt_ids(row["prompt"]) for row in rows]
    limit = TINY_RUN["max_response_tokens"]
    expected = lm.sample(prompts, max_new_tokens=limit, batch_size=256, seed=1)
    written = read_jsonl(run / "teacher_answers.jsonl")
    assert [row["id"] for row in written] == [row["id"] for row in rows]
    for row, [response] in zip(written, expected, strict=True):
        assert row["text"] == response["text"] and row["finished"] == response["finished"]
    assert read_jsonl(run / "metrics.jsonl")[-1]["charts/epoch"] == 2.5


def watched_pairs(run, lm: LM) -> list[Example]:
    """Held-out prompts with the teacher's and the untrained student's response."""
    by_teacher = read_jsonl(run / "eval_teacher.jsonl")
    by_student = read_jsonl(run / "eval_before.jsonl")
    examples = []
    for samples in zip(by_teacher, by_student, strict=True):
        prompt_ids = lm.prompt_ids(samples[0]["prompt"])
        examples.append(Example({}, prompt_ids, [sample["token_ids"] for sample in samples]))
    return examples


def test_the_watched_log_probs_are_means_over_tokens_of_answers_that_never_change(
    checkpoints, run_tiny
):
    run = run_tiny("dpkd", eval_prompts=8, max_steps=2, eval_every=1)
    first, _, last = read_jsonl(run / "metrics.jsonl")
    for row, path in ((first, checkpoints["student"]), (last, run / "model")):
        lm = LM(path, CPU)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
        examples = watched_pairs(run, lm)
        assert len(examples) >= 5
        for k, name in enumerate(("teacher", "student")):
            means = []
            for example in examples:
                log_q = sum_of_logps(model, example, k, lm.vocab_size).item()
                means.append(log_q / len(example.response_ids[k]))
            expected = sum(means) / len(means)
            assert row[f"eval/logp_{name}_answers"] == pytest.approx(expected, rel=1e-4)


METHOD_FLAGS = ["beta", "refresh_every", "teacher_answers", "sft_coef", "lm_coef", "learning_rate"]


@pytest.mark.parametrize("flag", METHOD_FLAGS)
def test_r47_numbers_that_make_no_sense_are_one_line_before_anything_is_written(
    flag, tmp_path, capsys
):
    bad_values = ["-1"]
    if flag not in ("refresh_every", "teacher_answers"):
        bad_values += ["nan", "inf"]
    for value in bad_values:
        assert run_script("dpkd", **{flag: value}, output_dir=tmp_path / "run") == 2
        [line] = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: --{flag} {value}")
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------------------- on-policy
SAMPLINGS = [(2, [8, 8, 4]), (1, [4] * 5), (0, [20]), (7, [20])]


@pytest.mark.parametrize("refresh_every, expected", SAMPLINGS)
def test_one_sampling_by_the_current_student_serves_refresh_every_steps(
    refresh_every, expected, run_tiny, monkeypatch
):
    """Every call of `sample` by the student is written down, with the number of prompts and the
    weights that it was made with. An evaluation has one prompt."""
    counts = []
    weights = []

    class Watched(common.LM):
        def sample(self, prompts, **keywords):
            if self.trainable and len(prompts) > 1:
                counts.append(len(prompts))
                weights.append(self.model.get_input_embeddings().weight.detach().clone())
            return super().sample(prompts, **keywords)

    monkeypatch.setattr(common, "LM", Watched)
    run = run_tiny(
        "dpkd",
        **PLAYGROUND,
        refresh_every=refresh_every,
        warmup_ratio=0,
        batch_size=4,
        max_steps=5,
        eval_prompts=1,
        eval_every=100,
        learning_rate=0.01,
    )
    assert counts == expected
    initial = load_file(ROOT / "playground/student/model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(weights[0], initial)
    assert not any(torch.equal(one, two) for one, two in pairwise(weights))
    last = read_jsonl(run / "metrics.jsonl")[-1]
    assert 0 < last["charts/sampling_share"] < 1
    assert last["charts/sampling_tokens_per_second"] > 0
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    assert state["pending"] == {"response_ids": []}


def test_pending_samples_come_back_from_a_checkpoint(tmp_path):
    path = tmp_path / "checkpoint.pt"
    pending = PendingSamples()
    pending.response_ids = [[1, 2], [4], [3]]
    save_checkpoint(path, 6, {"tokens": 5}, pending=pending)
    pending.response_ids.clear()
    again = PendingSamples()
    counts = {"tokens": 0}
    assert load_checkpoint(path, counts, pending=again) == 6
    assert again.response_ids == [[1, 2], [4], [3]] and counts == {"tokens": 5}


def test_samples_are_taken_in_order():
    examples = [Example({"id": name}, [1], [[2, 3]]) for name in "ab"]
    pending = PendingSamples()
    pending.response_ids = [[4], [5, 6], [7]]
    pairs = take_pairs(examples, pending)
    assert [pair.row["id"] for pair in pairs] == ["a", "b"]
    assert [pair.response_ids for pair in pairs] == [[[2, 3], [4]], [[2, 3], [5, 6]]]
    assert pending.response_ids == [[7]]
    assert examples[0].response_ids == [[2, 3]]  # the next epoch takes another y_s


CALLS_LEFT = [0]


def deadly(prompts, responses) -> list[float]:
    """A reward function that is interrupted as soon as it was called often enough."""
    CALLS_LEFT[0] -= 1
    if CALLS_LEFT[0] == 0:
        raise KeyboardInterrupt
    return vowels(prompts, responses)


@pytest.mark.parametrize("refresh_every", [4, pytest.param(0, marks=pytest.mark.slow)])
def test_r36_a_run_that_died_between_two_samplings_goes_on_with_the_same_answers(
    refresh_every, pairs, tmp_path
):
    flags = {
        **PLAYGROUND,
        "data": pairs,
        "eval_data": pairs,
        "max_steps": 10,
        "batch_size": 4,
        "eval_prompts": 2,
        "max_response_tokens": 40,
        "log_every": 1,
        "save_every": 5,
        "eval_every": 3,
        "reward": "test_dpkd:deadly",
        "refresh_every": refresh_every,
    }
    whole = tmp_path / "whole"
    died = tmp_path / "died"
    assert run_script("dpkd", **flags, output_dir=whole) == 0
    # Two calls come before training, then steps 3 and 6. The checkpoint is of step 5, and its y_s
    # were sampled in step 4 or 0.
    CALLS_LEFT[0] = 4
    assert run_script("dpkd", **flags, output_dir=died) == 130
    state = torch.load(died / "checkpoint.pt", weights_only=True)
    steps_left = 3 if refresh_every else 5
    assert state["step"] == 5
    assert len(state["pending"]["response_ids"]) == 4 * steps_left
    assert run_script("dpkd", resume=died) == 0

    rows = read_jsonl(died / "metrics.jsonl")
    expected_rows = read_jsonl(whole / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(11))
    for row, expected in zip(rows, expected_rows, strict=True):
        assert row.keys() == expected.keys()
        for key, value in expected.items():
            if not key.endswith(("_per_second", "_share")):
                assert row[key] == value, (row["step"], key)
    weights = load_file(died / "model" / "model.safetensors")
    expected_weights = load_file(whole / "model" / "model.safetensors")
    assert weights.keys() == expected_weights.keys()
    assert all(torch.equal(weights[name], expected_weights[name]) for name in weights)

    # Tokens and seconds are counted over the whole run, also when it was resumed.
    counts = torch.load(died / "checkpoint.pt", weights_only=True)["counts"]
    expected_counts = torch.load(whole / "checkpoint.pt", weights_only=True)["counts"]
    assert counts["tokens"] == expected_counts["tokens"]
    assert counts["sampled_tokens"] == expected_counts["sampled_tokens"] > 0
    assert counts["seconds"] > state["counts"]["seconds"] > 0
    assert counts["sampling_seconds"] >= state["counts"]["sampling_seconds"] > 0


# ------------------------------------------------------------------------------------------- corpus
def all_ids(pieces: list[Example]) -> list[int]:
    """The tokens of all pieces, one after the other."""
    ids = []
    for piece in pieces:
        ids += piece.prompt_ids + piece.response_ids[0]
    return ids


def corpus_flags(path: Path, size: int) -> Args:
    """The flags of dpkd.py for a corpus in pieces of `size` tokens."""
    return Args(lm_data=str(path), max_response_tokens=size)


@pytest.mark.parametrize("adds_bos", [True, False])
def test_a_corpus_is_cut_into_pieces_and_nothing_is_lost(adds_bos, tmp_path):
    tokenizer = make_tokenizer()
    bos = []
    if adds_bos:
        bos = [tokenizer.bos_token_id]
        begin = [("<|begin|>", tokenizer.bos_token_id)]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<|begin|> $A", special_tokens=begin
        )
    lm = LM(save(tmp_path / "lm", tokenizer, make_model(len(tokenizer))), CPU)
    conversation = "<|user|>Hello<|end|><|assistant|>Hi.<|end|>"
    if adds_bos:
        conversation = "<|begin|>" + conversation
    texts = ["Some text of a corpus. " * 9, "x", "", conversation]
    rows = [{"text": text, "other": 1} for text in texts]
    path = write_jsonl(tmp_path / "corpus.jsonl", rows)
    pieces = read_corpus(lm, corpus_flags(path, 16))
    for piece in pieces:
        assert len(piece.prompt_ids) == 1 and 1 <= len(piece.response_ids[0]) <= 15

    end = [tokenizer.eos_token_id]
    long, short, nothing, talk = tokenizer(texts, add_special_tokens=False).input_ids
    assert talk[-1:] == end and talk[: len(bos)] == bos and len(long) > 32 and nothing == []
    # r12, r13: begin and end come once. The empty text is left out.
    assert all_ids(pieces) == bos + long + end + bos + short + end + talk


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", ".txt", ".TXT.gz"])
def test_all_files_of_a_corpus_read_the_same(load, tmp_path, suffix):
    from datasets import Dataset

    path = tmp_path / f"corpus{suffix}"
    texts = ["One text.", "Another text, 2021-01-01."]
    if suffix == ".parquet":
        Dataset.from_dict({"text": texts}).to_parquet(path)
    elif suffix == ".txt":
        path.write_text("\n".join(texts))
    elif suffix == ".TXT.gz":  # as Windows writes it
        path.write_bytes(gzip.compress("\r\n".join(texts).encode("utf-8-sig")))
    else:
        write_jsonl(path, [{"text": text} for text in texts])
    lm = load("student")
    decoded = []
    for piece in read_corpus(lm, corpus_flags(path, 99)):
        ids = piece.prompt_ids + piece.response_ids[0]
        decoded.append(lm.tokenizer.decode(ids, skip_special_tokens=True))
    assert decoded == texts


def test_texts_that_are_dates_stay_texts(tmp_path):
    path = write_jsonl(tmp_path / "corpus.jsonl", [{"text": "2021-01-01"}])
    assert read_texts(str(path), "train", "") == ["2021-01-01"]


CORPORA = {
    "no such file": ("/no/corpus.jsonl", None),
    "no such text file": ("/no/corpus.txt", None),
    "another column": ("corpus.jsonl", '{"prompt": "x"}\n'),
    "no text": ("corpus.jsonl", '{"text": null}\n'),
    "no kind of file": ("corpus.doc", "text"),
    "a number": ("corpus.jsonl", '{"text": 5}\n'),
    "no row": ("corpus.jsonl", "[5]"),
    "nothing in it": ("corpus.jsonl", ""),
    "no line in it": ("corpus.txt", ""),
    "broken": ("corpus.jsonl", '{"text": "a'),
}


@pytest.mark.parametrize("case", CORPORA)
def test_r46_a_corpus_that_cannot_be_read_is_one_line(load, tmp_path, capfd, case):
    name, content = CORPORA[case]
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(SystemExit) as end:
        read_corpus(load("student"), corpus_flags(tmp_path / name, 99))
    line = capfd.readouterr().err.splitlines()[-1]
    assert end.value.code == 2
    assert line.startswith("error: ") and name in line


@pytest.mark.slow
# ------------------------------------------------------------------------------------- the collapse
@pytest.mark.parametrize("refresh_every", [0, 1])
def test_old_student_answers_collapse_and_fresh_ones_do_not(refresh_every, tmp_path, capsys):
    run = tmp_path / "run"
    flags = {"learning_rate": 3e-3, "max_steps": 100, "eval_prompts": 64, "eval_every": 50}
    assert run_script("dpkd", **flags, refresh_every=refresh_every, output_dir=run) == 0
    rows = [row for row in read_jsonl(run / "metrics.jsonl") if "eval/reward" in row]
    assert [row["step"] for row in rows] == [0, 50, 100]
    before = rows[0]
    after = rows[-1]
    reward_rise = after["eval/reward"] - before["eval/reward"]
    teacher_drop = before["eval/logp_teacher_answers"] - after["eval/logp_teacher_answers"]
    student_drop = before["eval/logp_student_answers"] - after["eval/logp_student_answers"]
    warnings = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    if refresh_every == 0:
        assert student_drop > 1 and teacher_drop > 0.3
        assert reward_rise < -0.2
        [warning] = warnings
        assert "--refresh_every" in warning and "collapse" in warning
    else:
        assert abs(student_drop) < 0.4 and teacher_drop < 0.1
        assert reward_rise > 0.1
        assert not warnings


def test_a_collapse_is_a_fall_on_both_sides():
    def watched(teacher_logp: float, student_logp: float) -> dict:
        return {
            "eval/logp_teacher_answers": teacher_logp,
            "eval/logp_student_answers": student_logp,
        }

    before = watched(-0.8, -1.0)
    assert has_collapsed(before, watched(-0.9, -2.1))
    assert not has_collapsed(before, watched(-0.9, -1.9))
    assert not has_collapsed(before, watched(-0.7, -2.1))
