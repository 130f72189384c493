"""dpkd.py: its loss against float64 loops, one step of the real script against plain forward passes, when it samples,
interrupted runs, and the collapse on old student answers."""

import json
import math
import random
from itertools import pairwise

import pytest
import torch
from conftest import (
    ROOT,
    first_gradient,
    make_model,
    make_tokenizer,
    read_jsonl,
    run_script,
    save,
    vowels,
)
from safetensors.torch import load_file
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM

import common
from common import LM, load_checkpoint, make_examples, read_rows, save_checkpoint
from dpkd import Waiting, implicit_rewards, preference_loss, read_corpus

CPU = torch.device("cpu")
PLAYGROUND = {
    "student": "playground/student",
    "teacher": "playground/teacher",
}  # whose answers are text, and end
LENGTHS = [5, 1, 3, 7, 2, 2]  # of three pairs y_t, y_s


def random_logps(seed: int, lengths=LENGTHS) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return -3 * torch.rand(sum(lengths), generator=generator)


def layout(lengths) -> tuple[torch.Tensor, torch.Tensor]:
    lengths = torch.tensor(lengths)
    return torch.arange(len(lengths)).repeat_interleave(lengths), lengths


def slow_rewards(student, teacher, lengths, beta, normalize) -> list[float]:
    """One token after the other."""
    student, teacher, rewards = student.tolist(), teacher.tolist(), []
    for length in lengths:
        log_ratio = 0.0
        for _ in range(length):
            log_ratio += student.pop(0) - teacher.pop(0)
        rewards.append(beta / (length if normalize else 1) * log_ratio)
    return rewards


# -------------------------------------------------------------------------------------------------------- mathematics
def test_one_pair_by_hand():
    """q(y_t) = 1/2 · 1/4, p(y_t) = 1/2 · 1/2; q(y_s) = 1/2, p(y_s) = 1/8: the margin is (2/2) log ½ − 2 log 4."""
    student, teacher = (
        torch.tensor(probs).log() for probs in ([0.5, 0.25, 0.5], [0.5, 0.5, 0.125])
    )
    rewards = implicit_rewards(student, teacher, *layout([2, 1]), 2.0, True)
    assert rewards.tolist() == pytest.approx([math.log(0.5), 2 * math.log(4)])
    [loss], [margin] = preference_loss(rewards)
    assert margin.item() == pytest.approx(-5 * math.log(2))
    assert loss.item() == pytest.approx(math.log(1 + 2**5)) == pytest.approx(3.496508, abs=1e-6)
    summed = implicit_rewards(student, teacher, *layout([2, 1]), 2.0, False)
    assert summed.tolist() == pytest.approx([2 * math.log(0.5), 2 * math.log(4)])


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("beta", [0.1, 1.0, 5.0])
def test_r26_rewards_and_loss_equal_a_slow_loop(normalize, beta):
    student, teacher = random_logps(1), random_logps(2)
    slow = slow_rewards(student, teacher, LENGTHS, beta, normalize)
    losses = [math.log(1 + math.exp(y_s - y_t)) for y_t, y_s in zip(slow[::2], slow[1::2])]
    rewards = implicit_rewards(student, teacher, *layout(LENGTHS), beta, normalize)
    assert rewards.tolist() == pytest.approx(slow, rel=1e-5, abs=1e-6)
    loss, margins = preference_loss(rewards)
    assert loss.tolist() == pytest.approx(losses, rel=1e-5, abs=1e-6)
    assert margins.tolist() == pytest.approx(
        [y_t - y_s for y_t, y_s in zip(slow[::2], slow[1::2])], rel=1e-5, abs=1e-5
    )


@pytest.mark.parametrize("normalize", [True, False])
def test_r29_a_student_that_is_its_teacher_has_loss_log_2_for_every_pair(normalize):
    logps = random_logps(1)
    losses, margins = preference_loss(
        implicit_rewards(logps, logps.clone(), *layout(LENGTHS), 3.0, normalize)
    )
    assert margins.tolist() == [0.0] * 3 and losses.tolist() == [torch.tensor(2.0).log().item()] * 3


def test_r24_exchanged_answers_negate_the_margin():
    student, teacher = random_logps(1), random_logps(2)
    _, margins = preference_loss(implicit_rewards(student, teacher, *layout(LENGTHS), 1.5, True))
    order = [1, 0, 3, 2, 5, 4]
    where = [torch.cat([values.split(LENGTHS)[i] for i in order]) for values in (student, teacher)]
    _, swapped = preference_loss(
        implicit_rewards(*where, *layout([LENGTHS[i] for i in order]), 1.5, True)
    )
    assert torch.allclose(margins, -swapped, atol=1e-5) and margins.abs().min() > 0.01


def test_answers_of_twice_the_length_have_the_same_normalised_margin():
    student, teacher = random_logps(1), random_logps(2)
    twice = [
        torch.cat([part.repeat(2) for part in values.split(LENGTHS)])
        for values in (student, teacher)
    ]
    for normalize, factor in ((True, 1), (False, 2)):
        _, once = preference_loss(
            implicit_rewards(student, teacher, *layout(LENGTHS), 1.5, normalize)
        )
        doubled = layout([2 * length for length in LENGTHS])
        _, margins = preference_loss(implicit_rewards(*twice, *doubled, 1.5, normalize))
        assert torch.allclose(margins, factor * once, atol=1e-5)


def test_the_gradients_weight_is_sigma_of_r_s_minus_r_t():
    """∂L/∂log q(y_t) = −σ(r_s − r_t) β/|y_t| at every token; the paper prints σ(r_t − r_s)."""
    student, teacher, beta = random_logps(1).requires_grad_(), random_logps(2), 1.5
    rewards = implicit_rewards(student, teacher, *layout(LENGTHS), beta, True)
    preference_loss(rewards)[0].sum().backward()
    y_t, y_s = rewards.detach()[::2], rewards.detach()[1::2]
    weights = torch.stack([-(y_s - y_t).sigmoid(), (y_s - y_t).sigmoid()], 1).flatten() * beta
    response_of, lengths = layout(LENGTHS)
    assert torch.allclose(student.grad, (weights / lengths)[response_of], atol=1e-5)


def test_r10_excluded_tokens_give_no_nan_and_a_broken_model_is_not_hidden():
    inf = math.inf
    student = torch.tensor([-1.0, -2.0, -inf, -0.5, -inf, -1.0], requires_grad=True)
    teacher = torch.tensor([-0.5, -inf, -1.0, -0.5, -inf, -3.0])
    rewards = implicit_rewards(student, teacher, *layout([3, 3]), 1.0, True)
    assert rewards.tolist() == pytest.approx([-0.5 / 3, 2.0 / 3])
    preference_loss(rewards)[0].sum().backward()
    assert student.grad.isfinite().all() and not student.grad[[1, 2, 4]].any()
    broken = torch.tensor([math.nan, -1.0])  # r33: it must end the run
    assert (
        preference_loss(implicit_rewards(broken, -torch.ones(2), *layout([1, 1]), 1.0, True))[0]
        .isnan()
        .all()
    )


# -------------------------------------------------------------------------------------------- one step of the script
def slow_step(run, checkpoints, pairs, beta=1.0, normalize=True, corpus=()):
    """The terms over all pairs and the gradient of each, in float64: one plain forward pass after the other. y_t comes
    from the run's own file, y_s from the untrained student with the run's seed."""
    lm = LM(checkpoints["student"], CPU)
    rows = [{**row, "y_t": row} for row in read_jsonl(run / "teacher_answers.jsonl")]
    examples = make_examples(lm, rows, ("y_t",), 512, 40)
    count = len(examples)
    assert count >= 5  # noise of random models may take more than 40 tokens once it is text
    order = torch.randperm(count, generator=torch.Generator().manual_seed(1)).tolist()
    examples = [examples[i] for i in order]
    answers = lm.sample(
        [example.prompt for example in examples], max_new_tokens=40, batch_size=256, seed=1
    )
    for example, (answer,) in zip(examples, answers):
        [y_s] = lm.encode(example.row["prompt"], [answer])[1]
        example.responses.append(y_s if answer["finished"] else y_s[:40])
    models = [
        AutoModelForCausalLM.from_pretrained(checkpoints[m], dtype=torch.float64)
        for m in ("student", "teacher")
    ]

    def logps(model, prompt, response):
        values = model(torch.tensor([prompt + response])).logits[
            0, len(prompt) - 1 : -1, : lm.vocab_size
        ]
        return sum(values.log_softmax(-1)[t, token] for t, token in enumerate(response))

    terms = {"preference": 0.0, "margin": 0.0, "sft": 0.0, "lm": 0.0}
    for _, prompt, responses in examples:
        rewards, norms = [], [len(r) if normalize else 1 for r in responses]
        for response, norm in zip(responses, norms):
            ours, theirs = (
                logps(models[0], prompt, response),
                logps(models[1], prompt, response).detach(),
            )
            rewards.append(beta / norm * (ours - theirs))
        margin = rewards[0] - rewards[1]
        terms["margin"] += margin / count
        terms["preference"] += (1 + (-margin).exp()).log() / count
        terms["sft"] -= logps(models[0], prompt, responses[0]) / len(responses[0]) / count
    for document in random.Random(1).choices(corpus, k=count) if corpus else ():
        terms["lm"] -= (
            logps(models[0], document.prompt, document.responses[0])
            / len(document.responses[0])
            / count
        )
    parameters = list(models[0].parameters())
    terms = {name: term for name, term in terms.items() if name != "lm" or corpus}
    gradients = {
        name: torch.autograd.grad(term, parameters, retain_graph=True)
        for name, term in terms.items()
    }
    return {name: term.item() for name, term in terms.items()}, gradients


SETTINGS = {
    "equation 9": ({}, {}),
    "sums in place of means": ({"beta": 0.1, "length_normalize": False}, {}),
    "with cross-entropy": ({"beta": 2.0}, {"sft": 0.5}),
    "with a corpus": ({"beta": 0.5}, {"lm": 0.7}),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_r04_a_step_equals_a_slow_loop_over_plain_forward_passes(
    checkpoints, pairs, run_tiny, tmp_path, setting
):
    method, weights = SETTINGS[setting]
    flags = {"beta": method.get("beta", 1.0), "no-length_normalize": "length_normalize" in method}
    flags |= {f"{name}_coef": value for name, value in weights.items()}
    corpus = ()
    if "lm" in weights:
        flags["lm_data"] = tmp_path / "corpus.txt"
        flags["lm_data"].write_text(
            "A text about nothing.\nAnother one, which is a little longer.\nx\n"
        )
        corpus = read_corpus(LM(checkpoints["student"], CPU), str(flags["lm_data"]), "train", 40)
    run = run_tiny("dpkd", **flags)
    terms, gradients = slow_step(
        run, checkpoints, pairs, flags["beta"], "length_normalize" not in method, corpus
    )
    row = read_jsonl(run / "metrics.jsonl")[-1]
    assert ("losses/lm" in row) == bool(corpus)
    for name in gradients:
        assert row[f"losses/{name}"] == pytest.approx(terms[name], rel=2e-4, abs=1e-5)
    weights = {"preference": 1.0, **weights}
    assert row["losses/total"] == pytest.approx(
        sum(weights[name] * terms[name] for name in weights), rel=2e-4
    )
    for i, ours in enumerate(first_gradient(run)):
        expected = sum(weight * gradients[name][i] for name, weight in weights.items())
        torch.testing.assert_close(ours.double(), expected, rtol=2e-3, atol=1e-4)


def test_r29_a_run_with_the_student_as_teacher_begins_at_log_2(checkpoints, run_tiny):
    row = read_jsonl(run_tiny("dpkd", teacher=checkpoints["student"]) / "metrics.jsonl")[-1]
    assert row["losses/preference"] == row["losses/total"] == pytest.approx(math.log(2), abs=1e-6)
    assert row["losses/margin"] == pytest.approx(0, abs=1e-6)


def test_no_answer_of_the_data_is_used(pairs, run_tiny, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text(
        "".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in read_jsonl(pairs))
    )
    one, two = (first_gradient(run_tiny("dpkd", data=data)) for data in (pairs, other))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_the_teachers_answers_are_sampled_once_from_the_first_prompts(pairs, run_tiny, monkeypatch):
    monkeypatch.chdir(ROOT)
    run = run_tiny("dpkd", **PLAYGROUND, teacher_answers=3, batch_size=2, max_steps=5)
    lm = LM(PLAYGROUND["teacher"], CPU)
    rows, told = read_rows(str(pairs), "train", ())[:3], read_jsonl(run / "teacher_answers.jsonl")
    expected = lm.sample(
        [lm.encode(row["prompt"])[0] for row in rows], max_new_tokens=40, batch_size=256, seed=1
    )
    assert [row["id"] for row in told] == [row["id"] for row in rows]
    assert [(row["text"], row["finished"]) for row in told] == [
        (a["text"], a["finished"]) for (a,) in expected
    ]
    assert read_jsonl(run / "metrics.jsonl")[-1]["charts/epoch"] == 2.5


def test_the_watched_log_probs_are_means_over_tokens_of_answers_that_never_change(
    checkpoints, run_tiny
):
    run = run_tiny("dpkd", eval_prompts=8, max_steps=2, eval_every=1)
    first, _, last = read_jsonl(run / "metrics.jsonl")
    for row, path in ((first, checkpoints["student"]), (last, run / "model")):
        lm = LM(path, CPU)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
        both = {
            "teacher": read_jsonl(run / "eval_teacher.jsonl"),
            "student": read_jsonl(run / "eval_before.jsonl"),
        }
        kept = [
            i
            for i in range(8)
            if all(answers[i]["text"] or answers[i]["finished"] for answers in both.values())
        ]
        for name, answers in both.items():
            means = []
            for answer in (answers[i] for i in kept):
                prompt, (response,) = lm.encode(answer["prompt"], [answer])
                response = response if answer["finished"] else response[:40]
                logits = model(torch.tensor([prompt + response])).logits[
                    0, len(prompt) - 1 : -1, : lm.vocab_size
                ]
                logps = [
                    logits.log_softmax(-1)[t, token].item() for t, token in enumerate(response)
                ]
                means.append(sum(logps) / len(logps))
            assert row[f"eval/logp_{name}_answers"] == pytest.approx(
                sum(means) / len(means), rel=1e-4
            )


# --------------------------------------------------------------------------------------------------------- on-policy
@pytest.mark.parametrize(
    "refresh_every, expected", [(2, [8, 8, 4]), (1, [4] * 5), (0, [20]), (7, [20])]
)
def test_one_sampling_by_the_current_student_serves_refresh_every_steps(
    refresh_every, expected, run_tiny, monkeypatch
):
    """Every call of `sample` is written down with the number of prompts and the weights that it was made with."""
    calls = []

    class Watched(common.LM):
        def sample(self, prompts, **how):
            calls.append(
                (
                    self.trains,
                    len(prompts),
                    self.model.get_input_embeddings().weight.detach().clone(),
                )
            )
            return super().sample(prompts, **how)

    monkeypatch.setattr(common, "LM", Watched)
    flags = {
        "batch_size": 4,
        "max_steps": 5,
        "eval_prompts": 1,
        "eval_every": 100,
        "learning_rate": 0.01,
    }
    run = run_tiny("dpkd", **PLAYGROUND, refresh_every=refresh_every, warmup_ratio=0, **flags)
    ours = [(prompts, weights) for trains, prompts, weights in calls if trains and prompts > 1]
    assert [prompts for prompts, _ in ours] == expected
    initial = load_file(ROOT / "playground/student/model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(ours[0][1], initial)
    assert all(not torch.equal(one[1], two[1]) for one, two in pairwise(ours))
    last = read_jsonl(run / "metrics.jsonl")[-1]
    assert 0 < last["charts/sampling_share"] < 1 and last["charts/sampling_tokens_per_second"] > 0
    assert not torch.load(run / "checkpoint.pt", weights_only=True)["waiting"]


def test_waiting_answers_come_back_from_a_checkpoint(tmp_path):
    waiting, again = Waiting([[1, 2], [], [3]]), Waiting()
    save_checkpoint(tmp_path / "checkpoint.pt", 6, waiting=waiting)
    del waiting[:]
    assert load_checkpoint(tmp_path / "checkpoint.pt", waiting=again) == 6
    assert again == [[1, 2], [], [3]] and isinstance(again, Waiting)


CALLS_LEFT = [0]


def deadly(prompts, answers) -> list[float]:
    """A judge that dies as soon as it was called often enough."""
    CALLS_LEFT[0] -= 1
    if CALLS_LEFT[0] == 0:
        raise KeyboardInterrupt
    return vowels(prompts, answers)


@pytest.mark.parametrize("refresh_every", [4, 0])
def test_r36_a_run_that_died_between_two_samplings_goes_on_with_the_same_answers(
    refresh_every, pairs, tmp_path
):
    flags = {**PLAYGROUND, "data": pairs, "eval_data": pairs}
    flags |= {
        "max_steps": 10,
        "batch_size": 4,
        "eval_prompts": 2,
        "max_response_tokens": 40,
        "log_every": 1,
    }
    flags |= {
        "save_every": 5,
        "eval_every": 3,
        "reward": "test_dpkd:deadly",
        "refresh_every": refresh_every,
    }
    whole, died = tmp_path / "whole", tmp_path / "died"
    assert run_script("dpkd", **flags, output_dir=whole) == 0
    CALLS_LEFT[0] = (
        4  # before training two, step 3, step 6: the checkpoint is of step 5, its answers of step 4 or 0
    )
    with pytest.raises(KeyboardInterrupt):
        run_script("dpkd", **flags, output_dir=died)
    state = torch.load(died / "checkpoint.pt", weights_only=True)
    assert state["step"] == 5 and len(state["waiting"]) == 4 * (3 if refresh_every else 5)
    assert run_script("dpkd", resume=died) == 0
    ours, theirs = (read_jsonl(run / "metrics.jsonl") for run in (died, whole))
    for one, other in zip(ours, theirs, strict=True):
        assert {key: one[key] for key in one if not key.startswith("charts/")} == {
            key: other[key] for key in other if not key.startswith("charts/")
        }
    one, other = (load_file(run / "model" / "model.safetensors") for run in (died, whole))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ------------------------------------------------------------------------------------------------------------- corpus
@pytest.mark.parametrize("adds_bos", [True, False])
def test_a_corpus_is_cut_into_pieces_and_nothing_is_lost(adds_bos, tmp_path):
    tokenizer = make_tokenizer()
    if adds_bos:
        begin = [("<|begin|>", tokenizer.bos_token_id)]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<|begin|> $A", special_tokens=begin
        )
    lm = LM(save(tmp_path / "lm", tokenizer, make_model(len(tokenizer))), CPU)
    talk = "<|begin|>" * adds_bos + "<|user|>Hello<|end|><|assistant|>Hi.<|end|>"
    texts = ["Some text of a corpus. " * 9, "x", "", talk]
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text, "other": 1}) + "\n" for text in texts))
    pieces = read_corpus(lm, str(path), "train", 16)
    assert all(len(piece.prompt) == 1 and 1 <= len(piece.responses[0]) <= 15 for piece in pieces)
    ids = [token for piece in pieces for token in piece.prompt + piece.responses[0]]
    first, x, nothing, said = [
        tokenizer(text, add_special_tokens=False).input_ids for text in texts
    ]
    bos, end = [tokenizer.bos_token_id] * adds_bos, [tokenizer.eos_token_id]
    assert said[-1:] == end and said[: len(bos)] == bos and len(first) > 32 and nothing == []
    # r12, r13: begin and end once; without a begin an empty text is its end alone, which nothing predicts
    expected = bos + first + end + bos + x + end + (bos + end) * adds_bos + said
    assert ids == expected


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", ".txt"])
def test_all_files_of_a_corpus_read_the_same(load, tmp_path, suffix):
    from datasets import Dataset

    path, texts = tmp_path / f"corpus{suffix}", ["One text.", "Another text, 2021-01-01."]
    if suffix == ".parquet":
        Dataset.from_dict({"text": texts}).to_parquet(path)
    elif suffix == ".txt":
        path.write_text("\n".join(texts))
    else:
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    lm = load("student")
    pieces = [
        piece.prompt + piece.responses[0] for piece in read_corpus(lm, str(path), "train", 99)
    ]
    assert [lm.tokenizer.decode(ids, skip_special_tokens=True) for ids in pieces] == texts


CORPORA = {
    "no such file": ("/no/corpus.jsonl", None),
    "another column": ("corpus.jsonl", '{"prompt": "x"}\n'),
    "no text": ("corpus.jsonl", '{"text": null}\n'),
    "nothing in it": ("corpus.jsonl", ""),
    "broken": ("corpus.jsonl", '{"text": "a'),
}


@pytest.mark.parametrize("case", CORPORA)
def test_r46_a_corpus_that_cannot_be_read_is_one_line(load, tmp_path, capfd, case):
    name, content = CORPORA[case]
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(SystemExit) as end:
        read_corpus(load("student"), str(tmp_path / name), "train", 99)
    line = capfd.readouterr().err.splitlines()[-1]
    assert end.value.code == 2 and line.startswith("error: ") and name in line


# ------------------------------------------------------------------------------------------------------- the collapse
@pytest.mark.parametrize("refresh_every", [0, 1])
def test_old_student_answers_collapse_and_fresh_ones_do_not(refresh_every, tmp_path, capsys):
    run = tmp_path / "run"
    flags = {"learning_rate": 3e-3, "max_steps": 100, "eval_prompts": 64, "eval_every": 50}
    assert run_script("dpkd", **flags, refresh_every=refresh_every, output_dir=run) == 0
    rows = [row for row in read_jsonl(run / "metrics.jsonl") if "eval/reward" in row]
    y_t, y_s = (
        [row[f"eval/logp_{name}_answers"] for row in rows] for name in ("teacher", "student")
    )
    warnings = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    if refresh_every == 0:
        assert y_s[-1] < y_s[0] - 1 and y_t[-1] < y_t[0] - 0.3
        assert rows[-1]["eval/reward"] < rows[0]["eval/reward"] - 0.2
        assert len(warnings) == 1 and "--refresh_every" in warnings[0] and "collapse" in warnings[0]
    else:
        assert abs(y_s[-1] - y_s[0]) < 0.4 and y_t[-1] > y_t[0] - 0.1
        assert rows[-1]["eval/reward"] > rows[0]["eval/reward"] + 0.1 and not warnings
