r"""ADPA: Advantage-Guided Distillation for Preference Alignment (Gao et al., ICLR 2025, arXiv
2502.17927), and ADPA+.

Writing a response is a token-level MDP: a state is s_t = (x, y_<t), an action is the next token a.
An aligned teacher π_dpo and the model π_ref that it was aligned from give every action an advantage
(section 3.2),

    A(s_t, a) = log π_dpo(a|s_t) − log π_ref(a|s_t),

and the student π_θ learns from the chosen response y_w and from its own earlier response ŷ, whose
states are ŝ_t = (x, ŷ_<t):

    L = −(1/|y_w|) Σ_t log π_θ(y_w,t|s_t)
        − γ (1/|ŷ|) Σ_t Σ_a π_θ(a|ŝ_t) A(ŝ_t, a).

|y| counts the end-of-sequence token. L is averaged over the pairs of a step.

Why a log-ratio is an advantage: DPO looks for the policy that maximises a reward minus
β KL(π ‖ π_ref). With A* = Q* − V*, the advantage of that problem, its optimal policy is
π_ref exp(A*/β), already normalised. DPO's π_dpo stands for it. So A* = β A, and γ absorbs β.
docs/adpa.md has the derivation.

The inner sum is an exact expectation over the vocabulary. In a given state its gradient is a policy
gradient with a baseline and without sampling noise. ŷ is sampled once, before training. From the
second step on the student has moved, and ŷ is off-policy.

Stages: (1) the initial student answers every prompt once, which gives ŷ; (2) training; with an
evaluation before and after. ADPA+ is the same from a checkpoint of DCKD (dckd.py):
`python adpa.py --student runs/<dckd run>/model`. Simplified: one GPU, and π_dpo and π_ref run in
every step instead of once beforehand. The released code (gaoshiping/ADPA, commit a95c32f) differs
in several points, among them a clamp of A to [0, 1] (utils/compress_logits.py): docs/adpa.md lists
them.

    # the toy task: lists such as "Name two fish."; a CPU, less than a minute
    python adpa.py

    # models and data of the hub, on one GPU of 80 GB
    python adpa.py --student allenai/OLMo-2-0425-1B-SFT \
        --teacher allenai/OLMo-2-1124-7B-DPO \
        --teacher_ref allenai/OLMo-2-1124-7B-SFT \
        --data argilla/dpo-mix-7k --eval_data argilla/dpo-mix-7k \
        --reward Skywork/Skywork-Reward-V2-Llama-3.2-1B \
        --gamma 1.5 --sample_temperature 0 --learning_rate 5e-7 --num_epochs 1 \
        --batch_size 128 --micro_batch_size 4 --gradient_checkpointing \
        --sample_batch_size 64 --max_prompt_tokens 1024 \
        --max_response_tokens 1024

    # data of your own, without a reward
    python adpa.py --data my.jsonl --eval_data my_test.jsonl --reward none
    # a run that was interrupted
    python adpa.py --resume runs/<folder>

Read part 2 of common.py for `pack` and `per_token`. `pack` lists the response tokens alone, each
with the position before it, which predicts it. So no prompt token reaches a loss, and the shift is
done. Frozen models run without gradient. What is sampled or scored goes through `cached_map` (part
4), which calls function(rows, seed) and returns the rows with the results. Shapes: B examples, N
response tokens, V vocabulary.
"""

import math
import time
from dataclasses import dataclass
from functools import partial
from typing import Literal

from common import (
    LM,
    Bar,
    Example,
    Metrics,
    begin_run,
    cached_map,
    check_flags,
    check_not_empty,
    check_own_data,
    choose_device,
    compare_rewards,
    encode_rows,
    exit_in_one_line,
    load_checkpoint,
    load_reward_function,
    mean_per_response,
    open_run,
    pack,
    parse_flags,
    per_token,
    print_end,
    print_models,
    print_plan,
    print_rewards,
    print_samples,
    print_start,
    read_rows,
    reward_metrics,
    row_numbers,
    save_checkpoint,
    save_model,
    save_summary,
    shared_vocab_size,
    step_examples,
    stop,
    token_logps,
)

# isort: split
# common comes first: with it Ctrl-C ends in one line, also while the slow imports run.
import torch
from transformers import get_cosine_schedule_with_warmup


# -------------------------------------------------------------------------------------- mathematics
def advantages(
    teacher_log_probs: torch.Tensor,
    reference_log_probs: torch.Tensor | None = None,
    clip: tuple[float, float] | None = None,
    top_k: int = 0,
) -> torch.Tensor:
    """[N, V]: A(s, a) = log π_dpo(a|s) − log π_ref(a|s) of every token (section 3.2).

    With `top_k` only the teacher's k likeliest tokens keep theirs, and the others get 0. So does a
    token that one of the models excludes, with a logit of −∞. Without a reference A is log π_dpo.
    Then 0 is the highest value there is, so `top_k` makes no sense.

    Example: π_dpo = (.6, .3, .1) and π_ref = (.3, .3, .4) give A = (.69, 0, −1.39).
    """
    if reference_log_probs is None:
        reference_log_probs = torch.zeros_like(teacher_log_probs)
    excluded = teacher_log_probs.isneginf() | reference_log_probs.isneginf()
    advantage = teacher_log_probs - reference_log_probs
    if clip is not None:
        low, high = clip
        advantage = advantage.clamp(low, high)
    advantage = advantage.masked_fill(excluded, 0.0)
    if top_k:
        k = min(top_k, teacher_log_probs.shape[-1])
        likeliest = teacher_log_probs.topk(k).indices  # [N, k]
        kept = advantage.gather(-1, likeliest)  # [N, k]
        advantage = torch.zeros_like(advantage).scatter(-1, likeliest, kept)
    return advantage


def expected_advantage(student_log_probs: torch.Tensor, advantage: torch.Tensor) -> torch.Tensor:
    """[N]: Σ_a π_θ(a|s) A(s, a), from [N, V] and [N, V].

    Its gradient with respect to the student's logits is π_a (A_a − E_π[A]): the expectation E_π[A]
    is subtracted from every A_a, as a baseline is.

    Example: with the A above, π_θ = (.2, .5, .3) gives −.28 and the gradient (.19, .14, −.33).
    """
    return (student_log_probs.exp() * advantage).sum(-1)


# -------------------------------------------------------------------------------------------- flags
@dataclass
class Method:
    teacher_ref: str = "playground/teacher_ref"
    """model that the teacher was aligned from; "none": A = log π_dpo (paper, table 2)"""
    gamma: float = 0.7
    """γ, weight of the advantage term (tuned for the toy task; paper: best near 1.5 at learning
    rate 5e-7, worse from 3; released student_adpa.yaml: 1.6)"""
    states: Literal["student", "chosen", "rejected", "teacher"] = "student"
    """whose responses are ŷ (paper: the student's; the others are in appendix E)"""
    advantage_clip: tuple[float, float] | None = None
    """bounds of the advantage (paper: None; what the released compress_logits.py bounds is in
    docs/adpa.md, point 1)"""
    top_k: int = 0
    """keep A of the teacher's k likeliest tokens alone (paper, section 4.1: 50); 0 keeps all"""
    sample_temperature: float = 1.0
    """temperature at which ŷ is sampled (tuned for the toy task; released vllm_generate.py: 0,
    greedy)"""


@dataclass
class Optimisation:
    learning_rate: float = 1e-3
    """learning rate of AdamW (tuned for the toy task; paper and released student_adpa.yaml:
    5e-7)"""
    num_epochs: int = 4
    """passes over the data"""
    max_steps: int = 0
    """optimiser steps; if not 0, it takes the place of --num_epochs"""
    batch_size: int = 32
    """examples of an optimiser step"""
    micro_batch_size: int = 32
    """examples of a forward pass; it changes memory, not the result"""
    logits_chunk: int = 1024
    """response tokens whose logits are in memory at a time"""
    gradient_checkpointing: bool = False
    """compute the student's activations again in the backward pass, to save memory"""
    warmup_ratio: float = 0.1
    """share of the steps in which the learning rate rises; after that a cosine brings it to 0"""
    weight_decay: float = 0.0
    """weight decay of AdamW"""
    max_grad_norm: float = 1.0
    """gradients are clipped to this norm; 0 leaves them as they are"""
    seed: int = 1
    """seed of the data's order and of sampling"""


@dataclass
class ModelsAndData:
    student: str = "playground/student"
    """model to train: a hub id or a folder"""
    teacher: str = "playground/teacher"
    """frozen teacher: a hub id or a folder"""
    data: str = "playground/data/train.jsonl"
    """training rows: a .jsonl, .json, .csv or .parquet file, a folder or a hub id"""
    data_config: str = ""
    """config of --data, where a hub id has several"""
    data_split: str = "train"
    """split of --data, or a part of one, such as train[:90%]; a file is one split, of any name"""
    max_prompt_tokens: int = 512
    """rows with longer prompts are dropped and counted"""
    max_response_tokens: int = 256
    """rows with longer responses are dropped and counted; sampling stops there"""
    sample_batch_size: int = 256
    """responses sampled at a time"""
    device: str = ""
    """cpu, cuda, cuda:1, ...; if empty, a GPU where there is one"""
    trust_remote_code: bool = False
    """run the Python code that comes with a hub model on this machine: only where you trust it"""


@dataclass
class EvaluationAndOutput:
    eval_data: str = "playground/data/test.jsonl"
    """held-out rows, of which only the prompts are used"""
    eval_config: str = ""
    """config of --eval_data, where a hub id has several"""
    eval_split: str = "test"
    """split of --eval_data, or a part of one"""
    reward: str = "playground.world:reward"
    """what gives a response its reward: file.py:function or module:function (which is executed), a
    reward model, or none"""
    reward_label: str = ""
    """label of a reward model that has several, by name or index; its logit is the reward"""
    eval_prompts: int = 256
    """held-out prompts of an evaluation, with one response each"""
    eval_temperature: float = 1.0
    """temperature of the responses of an evaluation; 0 is greedy"""
    eval_every: int = 50
    """optimiser steps between evaluations"""
    log_every: int = 10
    """optimiser steps between lines of metrics.jsonl"""
    save_every: int = 50
    """optimiser steps between checkpoints"""
    output_dir: str = ""
    """folder of this run; if empty, runs/<script>__<seed>__<time>"""
    resume: str = ""
    """folder of a run that was interrupted; it goes on with the flags it had"""
    track: Literal["none", "tensorboard", "wandb"] = "none"
    """where metrics go besides metrics.jsonl; `pip install tensorboard` for the one, and
    `pip install wandb tensorboard` for the other"""


@dataclass
class Args(EvaluationAndOutput, ModelsAndData, Optimisation, Method):
    """The flags of all groups, read as args.seed. --help shows the last of these groups first."""


# -------------------------------------------------------------------------------------- terms of L
def adpa_terms(
    examples: list[Example],
    student: LM,
    teacher: LM,
    teacher_ref: LM | None,
    vocab_size: int,
    args: Args,
) -> dict[str, torch.Tensor]:
    """The two terms of L before their weights, each [B]. An example's responses are [y_w, ŷ].

    "sft" enters L as it is and should fall. "advantage" enters with −γ and should rise.
    """
    # The student reads y_w and ŷ in one row.
    batch = pack(examples, student)
    hidden = student.hidden_states(batch)  # [rows·T, H]
    chosen = batch.only(0, of=2)  # the tokens of y_w
    states = batch.only(1, of=2)  # the tokens of ŷ

    # (1/|y_w|) Σ_t log π_θ(y_w,t|s_t)
    logps = per_token(
        token_logps,
        chosen.target_ids,
        [student],
        [hidden[chosen.predict_index]],
        vocab_size=vocab_size,
        chunk_size=args.logits_chunk,
    )
    chosen_logps = mean_per_response(logps, chosen)  # [B]

    # (1/|ŷ|) Σ_t Σ_a π_θ(a|ŝ_t) A(ŝ_t, a)
    # The teachers score ŷ alone, in rows of their own. They read the student's token ids, its chat
    # template included. Both batches list the tokens of ŷ in the same order, that of `examples`.
    teachers = [teacher] if teacher_ref is None else [teacher, teacher_ref]
    only_states = [Example(e.row, e.prompt_ids, e.response_ids[1:]) for e in examples]
    teacher_batch = pack(only_states, *teachers)
    state_hidden = [hidden[states.predict_index]]  # [N, H] each
    for lm in teachers:
        state_hidden.append(lm.hidden_states(teacher_batch)[teacher_batch.predict_index])

    # The token that was written is not used: the sum is over all tokens of the vocabulary.
    def advantage_of_states(_, student_log_probs, teacher_log_probs, reference_log_probs=None):
        advantage = advantages(
            teacher_log_probs, reference_log_probs, args.advantage_clip, args.top_k
        )  # [N, V]
        return expected_advantage(student_log_probs, advantage)  # [N]

    values = per_token(
        advantage_of_states,
        states.target_ids,
        [student, *teachers],
        state_hidden,
        vocab_size=vocab_size,
        chunk_size=args.logits_chunk,
    )
    return {"sft": -chosen_logps, "advantage": mean_per_response(values, states)}


# --------------------------------------------------------------- models, sampling and evaluation
def load_models(args: Args, device: torch.device) -> tuple[LM, LM, LM | None]:
    """The student, the teacher π_dpo, and π_ref unless it is left out."""
    student = LM(
        args.student,
        device,
        trainable=True,
        gradient_checkpointing=args.gradient_checkpointing,
        trust_remote_code=args.trust_remote_code,
    )
    teacher = LM(args.teacher, device, trust_remote_code=args.trust_remote_code)
    if args.teacher_ref == "none":
        return student, teacher, None
    teacher_ref = LM(args.teacher_ref, device, trust_remote_code=args.trust_remote_code)
    for size in ("num_hidden_layers", "hidden_size"):
        if getattr(teacher.config, size) != getattr(teacher_ref.config, size):
            stop(f"--teacher_ref must be what --teacher was aligned from: {size} differs")
    return student, teacher, teacher_ref


def respond(rows: list[dict], seed: int, lm: LM, temperature: float, args: Args) -> list[dict]:
    """One response of `lm` to the prompt of every row, as `LM.sample` returns it."""
    samples = lm.sample(
        [lm.prompt_ids(row["prompt"]) for row in rows],
        temperature=temperature,
        max_new_tokens=args.max_response_tokens,
        batch_size=args.sample_batch_size,
        seed=seed,
    )
    return [responses[0] for responses in samples]


def evaluate(rows: list[dict], seed: int, lm: LM, reward_fn, args: Args) -> list[dict]:
    """One response of `lm` to the prompt of every row, with its "reward" if one is given."""
    responses = respond(rows, seed, lm, args.eval_temperature, args)
    if reward_fn is None:
        return responses
    rewards = reward_fn(rows, responses)
    return [{**response, "reward": reward} for response, reward in zip(responses, rewards)]


# --------------------------------------------------------------------------------------------- main
def main(args: Args):
    started = time.time()
    args, run_dir = open_run(args, __file__)
    check_flags(args, at_least_0=["gamma", "top_k", "sample_temperature"])
    if args.advantage_clip and not args.advantage_clip[0] < args.advantage_clip[1]:
        stop(f"--advantage_clip {args.advantage_clip} must be a lower and a higher bound")
    if args.top_k and args.teacher_ref == "none":
        stop("--top_k needs a --teacher_ref: without one the tokens it drops have the highest A")

    # ------------------------------------------------------------------------------ models and data
    device = choose_device(args.device)
    print_start(run_dir, device, data=args.data, eval_data=args.eval_data)
    columns = ["chosen", "rejected"] if args.states == "rejected" else ["chosen"]
    train_rows = read_rows(args.data, args.data_split, columns=columns, config=args.data_config)
    eval_rows = read_rows(args.eval_data, args.eval_split, columns=(), config=args.eval_config)
    check_own_data(args, train_rows, eval_rows)
    reward_fn = load_reward_function(
        args.reward, device, args.trust_remote_code, label=args.reward_label, rows=eval_rows
    )
    student, teacher, teacher_ref = load_models(args, device)
    print_models(student=student, teacher=teacher, teacher_ref=teacher_ref)
    vocab_size = shared_vocab_size(student, teacher)
    if teacher_ref is not None:
        vocab_size = min(vocab_size, shared_vocab_size(student, teacher_ref))
    encoded = {}  # token ids of prompts and texts, so that none is encoded twice
    answered = encode_rows(student, train_rows, columns, args, "training rows", encoded)
    held_out = encode_rows(student, eval_rows, [], args, "held-out prompts")
    train_rows = [example.row for example in answered]
    eval_rows = [example.row for example in held_out[: args.eval_prompts]]
    print_plan(args, answered, len(eval_rows))
    begin_run(run_dir, args, [student, teacher, teacher_ref], data=answered, eval_data=held_out)

    # ------------------------------------------------------------------------ evaluation at step 0
    # It comes before a checkpoint is read, so that "before" is the untrained student in every run.
    def evaluate_once(lm: LM, name: str) -> list[dict]:
        """Evaluates a model and keeps the responses in eval_<name>.jsonl."""
        return cached_map(
            run_dir / f"eval_{name}.jsonl",
            eval_rows,
            partial(evaluate, lm=lm, reward_fn=reward_fn, args=args),
            args.sample_batch_size,
            args.seed,
        )

    eval_before = evaluate_once(student, "before")
    eval_teacher = evaluate_once(teacher, "teacher")

    # -------------------------------------------------------------------------- stage 1: sample ŷ
    if args.states in ("student", "teacher"):
        writer = student if args.states == "student" else teacher
        answers = cached_map(
            run_dir / f"{args.states}_answers.jsonl",
            train_rows,
            partial(respond, lm=writer, temperature=args.sample_temperature, args=args),
            args.sample_batch_size,
            args.seed,
        )
        check_not_empty(answers, writer, f"the {args.states}'s answers")
        for row, answer in zip(train_rows, answers):
            row[args.states] = answer
    # ŷ stands in a column that is named after --states. A sample has its token ids with it.
    columns = ["chosen", args.states]
    examples = encode_rows(student, train_rows, columns, args, "training examples", encoded)

    # ------------------------------------------------------------------------------------ optimiser
    steps_per_epoch = math.ceil(len(examples) / args.batch_size)
    total_steps = args.max_steps or args.num_epochs * steps_per_epoch
    optimizer = torch.optim.AdamW(
        student.model.parameters(), args.learning_rate, weight_decay=args.weight_decay
    )
    warmup_steps = math.ceil(args.warmup_ratio * total_steps)
    scheduler = get_cosine_schedule_with_warmup(optimizer, warmup_steps, total_steps)
    state = {"model": student.model, "optimizer": optimizer, "scheduler": scheduler}
    counts = {"tokens": 0, "seconds": 0.0}  # of training so far, kept in the checkpoint
    first_step = load_checkpoint(run_dir / "checkpoint.pt", counts, **state)
    metrics = Metrics(run_dir, args, first_step)
    if first_step == 0:
        metrics.log(0, reward_metrics(eval_before))
        metrics.log_samples(0, eval_before)

    # ------------------------------------------------------------------------------------- training
    bar = Bar("training", total_steps, "steps", done=first_step)
    for step in range(first_step, total_steps):
        step_started = time.time()
        step_batch = step_examples(examples, step, args.batch_size, args.seed)
        losses = {"total": 0.0, "sft": 0.0, "advantage": 0.0}
        for start in range(0, len(step_batch), args.micro_batch_size):
            micro_batch = step_batch[start : start + args.micro_batch_size]
            terms = adpa_terms(micro_batch, student, teacher, teacher_ref, vocab_size, args)
            # Divided by the examples of the whole step, so that the micro-batch size changes
            # memory and nothing else.
            sft = terms["sft"].sum() / len(step_batch)
            advantage = terms["advantage"].sum() / len(step_batch)
            loss = sft - args.gamma * advantage
            loss.backward()
            losses["total"] += loss.item()
            losses["sft"] += sft.item()
            losses["advantage"] += advantage.item()

        max_grad_norm = args.max_grad_norm or math.inf
        grad_norm = torch.nn.utils.clip_grad_norm_(student.model.parameters(), max_grad_norm)
        if not math.isfinite(losses["total"]) or not math.isfinite(grad_norm):
            numbers = f"loss {losses['total']}, gradient norm {grad_norm}"
            stop(f"{numbers} in step {step} on rows {row_numbers(step_batch)}")
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        for example in step_batch:
            counts["tokens"] += sum(len(response) for response in example.response_ids)
        counts["seconds"] += time.time() - step_started

        # --------------------------------------------------------------- log, evaluate, checkpoint
        done = step + 1
        is_last = done == total_steps
        values = {}
        if done % args.log_every == 0 or is_last:
            values["losses/total"] = losses["total"]
            values["losses/sft"] = losses["sft"]
            values["losses/advantage"] = losses["advantage"]
            values["charts/learning_rate"] = scheduler.get_last_lr()[0]
            values["charts/grad_norm"] = grad_norm.item()
            values["charts/epoch"] = done / steps_per_epoch
            values["charts/tokens"] = counts["tokens"]
            values["charts/tokens_per_second"] = counts["tokens"] / counts["seconds"]
        if is_last:
            values |= reward_metrics(evaluate_once(student, "after"))
        elif reward_fn is not None and done % args.eval_every == 0:
            evaluated = evaluate(eval_rows, args.seed, student, reward_fn, args)
            values |= reward_metrics(evaluated)
        if values:
            metrics.log(done, values)
        if done % args.save_every == 0 or is_last:
            save_checkpoint(run_dir / "checkpoint.pt", done, counts, **state)
        bar.advance(1, loss=losses["total"], reward=values.get("eval/reward"))
    bar.close()

    # -------------------------------------------------------------------------------------- results
    eval_after = evaluate_once(student, "after")
    metrics.log_samples(total_steps, eval_after)
    save_model(student, run_dir / "model")
    results = compare_rewards(eval_before, eval_after, eval_teacher)
    results["seconds"] = time.time() - started
    save_summary(run_dir, results, counts, args)
    evaluations = {"before": eval_before, "now": eval_after, "teacher": eval_teacher}
    print_samples(evaluations)
    print_rewards(evaluations, getattr(reward_fn, "best_possible", None))
    print_end(run_dir, args, results["seconds"])


if __name__ == "__main__":
    args = parse_flags(Args, __doc__)
    with exit_in_one_line(args):
        main(args)
