r"""Reinforcement learning with a reward: RLOO (Ahmadian et al., ACL 2024, arXiv 2402.14740; Kool et
al., 2019), four responses a prompt. It is for comparisons, not for use.

π_θ is the student, π_0 the student before training, x a prompt, and y_1, ..., y_k are responses
that π_θ samples in this very step, with s_t = (x, y_<t). A response earns the reward r(x, y), and
what it earned more than the others to the same prompt is its advantage:

    A_i = r(x, y_i) − 1/(k − 1) Σ_{j≠i} r(x, y_j)
    L = (1/k) Σ_i Σ_t [ −A_i log π_θ(y_i,t|s_t) + κ KL( π_θ(·|s_t) ‖ π_0(·|s_t) ) ].

The KL of a state is exact, a sum over the vocabulary. No gradient goes through the sampling of y.
So the KL is a price on the states that were met, and not on where they lead. Advantages are divided
by their standard deviation over the step (`--scale_advantages`), so that one κ means the same for
rewards of different scales.

    --credit reward           r is what --reward says: a function, or a reward model in a folder
    --credit implicit         r(x, y) = Σ_t log [π_dpo(y_t|s_t) / π_ref(y_t|s_t)], the implicit
                              reward of the aligned teacher π_dpo and of --teacher_ref π_ref, from
                              which it was aligned (Rafailov et al., 2023, arXiv 2305.18290)
    --credit implicit_tokens  every token has an advantage of its own: its summand of that reward,
                              less the mean of the summands in the other responses to the prompt

The last two learn from what adpa.py learns from, by sampled tokens in place of ADPA's expectation.
They stand for the baselines of the ADPA paper that optimise a DPO reward of whole sequences and of
tokens. Left out is what PPO adds to them: a critic, clipped ratios and several steps on the same
samples.

A reward that is learned can be exploited. So `--eval_reward` judges the evaluations by another
reward, and `eval/kl` says how far the student went from π_0: Σ_t KL of a response, in nats, mean
over held-out prompts. Reward against KL spent is the curve to look at.

Stages: (1) training; (2) evaluation. A run that was killed goes on with --resume, bit for bit.

    python -m studies.rloo                                            # the oracle's own reward
    python -m studies.rloo --reward runs/rm/model --eval_reward playground.world:reward
    python -m studies.rloo --credit implicit

Read part 2 of common.py for `pack` and `per_token`. `pack` lists the response tokens alone, each
with the position before it, which predicts it. So no prompt token reaches a loss, and the shift is
done. Frozen models run without gradient. What is sampled or scored goes through `cached_map` (part
4), which calls function(rows, seed) and returns the rows with the results. Shapes: B examples,
which are prompts with their k responses, R = B·k responses, N response tokens, V vocabulary.
"""

import math
import statistics
import time
from dataclasses import dataclass
from functools import partial
from typing import Literal

from common import (
    LM,
    Bar,
    Batch,
    Example,
    Metrics,
    begin_run,
    cached_map,
    check_flags,
    check_own_data,
    choose_device,
    compare_rewards,
    encode_rows,
    exit_in_one_line,
    load_checkpoint,
    load_reward_function,
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

from studies.baselines import reverse_kl


# -------------------------------------------------------------------------------------- mathematics
def leave_one_out(rewards: torch.Tensor) -> torch.Tensor:
    """[B, k]: A_i = r_i − 1/(k − 1) Σ_{j≠i} r_j, from the rewards [B, k] of the k responses to each
    prompt.

    Example: the rewards (1, 2, 6) give (1 − 4, 2 − 3.5, 6 − 1.5) = (−3, −1.5, 4.5).
    """
    k = rewards.shape[1]
    others = (rewards.sum(1, keepdim=True) - rewards) / (k - 1)  # [B, k]
    return rewards - others


def leave_one_out_of_tokens(
    values: torch.Tensor, response_index: torch.Tensor, k: int
) -> torch.Tensor:
    """[N]: every token's value less the mean of those in the other k − 1 responses to its prompt,
    from the values [N] and the responses [N] that the tokens belong to. k responses of a prompt
    follow one another.

    Example: k = 2 and the responses (1, 3) and (4,) give (1 − 4, 3 − 4) and (4 − 2,).
    """
    responses = int(response_index.max()) + 1
    sums = values.new_zeros(responses).index_add(0, response_index, values)  # [R]
    lengths = values.new_zeros(responses).index_add(0, response_index, torch.ones_like(values))
    sums = sums.view(-1, k)  # [B, k]
    lengths = lengths.view(-1, k)  # [B, k]
    other_sums = sums.sum(1, keepdim=True) - sums
    other_lengths = lengths.sum(1, keepdim=True) - lengths
    baselines = (other_sums / other_lengths).flatten()  # [R]
    return values - baselines[response_index]


# -------------------------------------------------------------------------------------------- flags
@dataclass
class Method:
    credit: Literal["reward", "implicit", "implicit_tokens"] = "reward"
    """what a response earns: --reward, the teacher's implicit reward, or each token's share of that
    """
    num_samples: int = 4
    """k, responses sampled to every prompt in a step"""
    kl_coef: float = 0.3
    """κ, weight of the KL to the student before training (a study takes several)"""
    scale_advantages: bool = True
    """divide advantages by their standard deviation over the step"""
    eval_reward: str = ""
    """what judges evaluations, as --reward names it; if empty, --reward"""
    teacher_ref: str = "playground/teacher_ref"
    """model that the teacher was aligned from, for the implicit reward"""


@dataclass
class Optimisation:
    learning_rate: float = 1e-3
    """learning rate of AdamW (fits the toy task)"""
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


# --------------------------------------------------------------------------------------- terms of L
@dataclass
class Sampled:
    """A prompt with k new responses, and the advantage of every response token of each."""

    example: Example
    advantages: list[torch.Tensor]  # k of them, [|y_i|] each


def rloo_terms(
    samples: list[Sampled], student: LM, start: LM, vocab_size: int, args: Args
) -> dict[str, torch.Tensor]:
    """The two terms of L before their weights, [B] each: means over the k responses of a prompt.

    "policy" is −Σ_t A log π_θ(y_t|s_t), whose value says nothing by itself. "kl" should stay small.
    """
    batch = pack([sampled.example for sampled in samples], student, start)
    advantages = []
    for sampled in samples:
        advantages += sampled.advantages
    advantages = torch.cat(advantages).to(student.device)  # [N]

    def score_tokens(target_ids, student_log_probs, start_log_probs):
        logps = token_logps(target_ids, student_log_probs)  # [N]
        return logps, reverse_kl(student_log_probs, start_log_probs)  # [N] each

    logps, kl = per_token(
        score_tokens,
        batch.target_ids,
        [student, start],
        [
            student.hidden_states(batch)[batch.predict_index],
            start.hidden_states(batch)[batch.predict_index],
        ],
        vocab_size=vocab_size,
        chunk_size=args.logits_chunk,
    )
    # −Σ_t A log π_θ(y_t|s_t) and Σ_t KL( π_θ(·|s_t) ‖ π_0(·|s_t) )
    policy = sum_per_response(-advantages * logps, batch).view(len(samples), -1)  # [B, k]
    kl = sum_per_response(kl, batch).view(len(samples), -1)  # [B, k]
    return {"policy": policy.mean(1), "kl": kl.mean(1)}


def sum_per_response(values: torch.Tensor, batch: Batch) -> torch.Tensor:
    """[R]: the sum of values [N] over the tokens of each response."""
    return values.new_zeros(len(batch.lengths)).index_add(0, batch.response_index, values)


# ------------------------------------------------------------- responses and what they have earned
def sample_with_advantages(
    examples: list[Example], seed: int, *, student: LM, judge, args: Args
) -> tuple[list[Sampled], float]:
    """k new responses to every prompt with their advantages, and the mean reward of a response.

    `judge` is `credit_by_reward` or `credit_by_teacher`.
    """
    samples = student.sample(
        [example.prompt_ids for example in examples],
        n=args.num_samples,
        temperature=1.0,
        max_new_tokens=args.max_response_tokens,
        batch_size=args.sample_batch_size,
        seed=seed,
    )
    answered = []
    for example, responses in zip(examples, samples):
        response_ids = [response["token_ids"] for response in responses]
        answered.append(Example(example.row, example.prompt_ids, response_ids))
    advantages, mean_reward = judge(answered, samples, args)  # [N]
    if args.scale_advantages:
        advantages = advantages / advantages.std().clamp(min=1e-6)

    sampled = []
    first = 0
    for example in answered:
        lengths = [len(response) for response in example.response_ids]
        last = first + sum(lengths)
        sampled.append(Sampled(example, list(advantages[first:last].split(lengths))))
        first = last
    return sampled, mean_reward


def load_judge(
    rows: list[dict],
    device: torch.device,
    student: LM,
    teacher: LM,
    teacher_ref: LM | None,
    args: Args,
):
    """`credit_by_reward` or `credit_by_teacher`, whichever --credit asks for."""
    if args.credit == "reward":
        reward_fn = load_reward_function(
            args.reward, device, args.trust_remote_code, label=args.reward_label, rows=rows
        )
        if reward_fn is None:
            stop("--reward none leaves nothing to learn from; --credit implicit needs no reward")
        return partial(credit_by_reward, reward_fn=reward_fn)
    vocab_size = shared_vocab_size(student, teacher)
    vocab_size = min(vocab_size, shared_vocab_size(student, teacher_ref))
    return partial(
        credit_by_teacher, teacher=teacher, teacher_ref=teacher_ref, vocab_size=vocab_size
    )


def credit_by_reward(
    examples: list[Example], samples: list[list[dict]], args: Args, *, reward_fn
) -> tuple[torch.Tensor, float]:
    """The advantage of every response token, [N]: that of its response by --reward. And the mean
    reward of a response."""
    rows = []
    responses = []
    for example, answers in zip(examples, samples):
        rows += [example.row] * len(answers)
        responses += answers
    rewards = reward_fn(rows, responses)
    if None in rewards:
        stop(f"--reward {args.reward} must have a reward for every response, and gave None")
    rewards = torch.tensor(rewards, dtype=torch.float64)
    advantages = leave_one_out(rewards.view(len(examples), -1)).flatten()  # [R]
    lengths = torch.tensor([len(response["token_ids"]) for response in responses])
    return advantages.float().repeat_interleave(lengths), rewards.mean().item()


def credit_by_teacher(
    examples: list[Example],
    samples: list[list[dict]],
    args: Args,
    *,
    teacher: LM,
    teacher_ref: LM,
    vocab_size: int,
) -> tuple[torch.Tensor, float]:
    """The same by the teacher's implicit reward, of the response or of the token itself."""
    shares = []
    for start in range(0, len(examples), args.micro_batch_size):
        micro_batch = examples[start : start + args.micro_batch_size]
        shares.append(implicit_rewards(micro_batch, teacher, teacher_ref, vocab_size, args))
    shares = torch.cat(shares)  # [N]
    lengths = []
    for answers in samples:
        lengths += [len(response["token_ids"]) for response in answers]
    lengths = torch.tensor(lengths)
    response_index = torch.arange(len(lengths)).repeat_interleave(lengths)  # [N]
    rewards = shares.new_zeros(len(lengths)).index_add(0, response_index, shares)  # [R]
    mean_reward = rewards.mean().item()
    if args.credit == "implicit_tokens":
        return leave_one_out_of_tokens(shares, response_index, args.num_samples), mean_reward
    advantages = leave_one_out(rewards.view(len(examples), -1)).flatten()  # [R]
    return advantages[response_index], mean_reward


@torch.no_grad()
def implicit_rewards(
    examples: list[Example], teacher: LM, teacher_ref: LM, vocab_size: int, args: Args
) -> torch.Tensor:
    """[N], on the CPU: log [π_dpo(y_t|s_t) / π_ref(y_t|s_t)] of every response token. A token that
    one of the two excludes gets 0."""
    batch = pack(examples, teacher, teacher_ref)

    def log_ratios(target_ids, teacher_log_probs, reference_log_probs):
        teacher_logps = token_logps(target_ids, teacher_log_probs)
        reference_logps = token_logps(target_ids, reference_log_probs)
        excluded = teacher_logps.isneginf() | reference_logps.isneginf()
        return (teacher_logps - reference_logps).masked_fill(excluded, 0.0)

    values = per_token(
        log_ratios,
        batch.target_ids,
        [teacher, teacher_ref],
        [
            teacher.hidden_states(batch)[batch.predict_index],
            teacher_ref.hidden_states(batch)[batch.predict_index],
        ],
        vocab_size=vocab_size,
        chunk_size=args.logits_chunk,
    )
    return values.cpu()


# --------------------------------------------------------------- models, sampling and evaluation
def load_models(args: Args, device: torch.device) -> tuple[LM, LM, LM, LM | None]:
    """The student, the student before training, the teacher, and for the implicit reward what the
    teacher was aligned from. With --credit reward the teacher is only evaluated."""
    student = LM(
        args.student,
        device,
        trainable=True,
        gradient_checkpointing=args.gradient_checkpointing,
        trust_remote_code=args.trust_remote_code,
    )
    start = LM(args.student, device, trust_remote_code=args.trust_remote_code)
    teacher = LM(args.teacher, device, trust_remote_code=args.trust_remote_code)
    if args.credit == "reward":
        return student, start, teacher, None
    teacher_ref = LM(args.teacher_ref, device, trust_remote_code=args.trust_remote_code)
    return student, start, teacher, teacher_ref


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


@torch.no_grad()
def kl_spent(evaluated: list[dict], student: LM, start: LM, vocab_size: int, args: Args) -> dict:
    """How far the student is from where it began, on its own responses to the held-out prompts: the
    mean of Σ_t KL( π_θ(·|s_t) ‖ π_0(·|s_t) ), in nats, and the mean length of a response."""
    sums = []
    lengths = []
    for first in range(0, len(evaluated), args.micro_batch_size):
        samples = []
        for row in evaluated[first : first + args.micro_batch_size]:
            example = Example(row, student.prompt_ids(row["prompt"]), [row["token_ids"]])
            zeros = torch.zeros(len(row["token_ids"]))
            samples.append(Sampled(example, [zeros]))
            lengths.append(len(row["token_ids"]))
        sums += rloo_terms(samples, student, start, vocab_size, args)["kl"].tolist()
    return {"eval/kl": statistics.mean(sums), "eval/length": statistics.mean(lengths)}


# --------------------------------------------------------------------------------------------- main
def main(args: Args):
    started = time.time()
    args, run_dir = open_run(args, __file__)
    check_flags(args, at_least_0=["kl_coef"])
    if args.num_samples < 2:
        stop(f"--num_samples {args.num_samples} must be at least 2: the others are the baseline")

    # ------------------------------------------------------------------------------ models and data
    device = choose_device(args.device)
    print_start(run_dir, device, data=args.data, eval_data=args.eval_data)
    student, start, teacher, teacher_ref = load_models(args, device)
    print_models(student=student, teacher=teacher, teacher_ref=teacher_ref)
    vocab_size = student.vocab_size
    train_rows = read_rows(args.data, args.data_split, columns=(), config=args.data_config)
    eval_rows = read_rows(args.eval_data, args.eval_split, columns=(), config=args.eval_config)
    check_own_data(args, train_rows, eval_rows)
    judge = load_judge(train_rows, device, student, teacher, teacher_ref, args)
    eval_reward_fn = load_reward_function(
        args.eval_reward or args.reward,
        device,
        args.trust_remote_code,
        label=args.reward_label,
        rows=eval_rows,
    )
    examples = encode_rows(student, train_rows, [], args, "training prompts")
    held_out = encode_rows(student, eval_rows, [], args, "held-out prompts")
    eval_rows = [example.row for example in held_out[: args.eval_prompts]]
    print_plan(args, examples, len(eval_rows))
    models = [student, teacher, teacher_ref]
    begin_run(run_dir, args, models, data=examples, eval_data=held_out)

    # ------------------------------------------------------------------------ evaluation at step 0
    # It comes before a checkpoint is read, so that "before" is the untrained student in every run.
    def evaluate_once(lm: LM, name: str) -> list[dict]:
        """Evaluates a model and keeps the responses in eval_<name>.jsonl."""
        return cached_map(
            run_dir / f"eval_{name}.jsonl",
            eval_rows,
            partial(evaluate, lm=lm, reward_fn=eval_reward_fn, args=args),
            args.sample_batch_size,
            args.seed,
        )

    eval_before = evaluate_once(student, "before")
    eval_teacher = evaluate_once(teacher, "teacher")

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
        sampled, mean_reward = sample_with_advantages(
            step_batch, args.seed + step, student=student, judge=judge, args=args
        )
        losses = {"total": 0.0, "policy": 0.0, "kl": 0.0}
        for first in range(0, len(sampled), args.micro_batch_size):
            micro_batch = sampled[first : first + args.micro_batch_size]
            terms = rloo_terms(micro_batch, student, start, vocab_size, args)
            # Divided by the examples of the whole step, so that the micro-batch size changes
            # memory and nothing else.
            policy = terms["policy"].sum() / len(step_batch)
            kl = terms["kl"].sum() / len(step_batch)
            loss = policy + args.kl_coef * kl
            loss.backward()
            losses["total"] += loss.item()
            losses["policy"] += policy.item()
            losses["kl"] += kl.item()

        max_grad_norm = args.max_grad_norm or math.inf
        grad_norm = torch.nn.utils.clip_grad_norm_(student.model.parameters(), max_grad_norm)
        if not math.isfinite(losses["total"]) or not math.isfinite(grad_norm):
            numbers = f"loss {losses['total']}, gradient norm {grad_norm}"
            stop(f"{numbers} in step {step} on rows {row_numbers(step_batch)}")
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        for one in sampled:
            counts["tokens"] += sum(len(response) for response in one.example.response_ids)
        counts["seconds"] += time.time() - step_started

        # --------------------------------------------------------------- log, evaluate, checkpoint
        done = step + 1
        is_last = done == total_steps
        values = {}
        if done % args.log_every == 0 or is_last:
            values["losses/total"] = losses["total"]
            values["losses/policy"] = losses["policy"]
            values["losses/kl"] = losses["kl"]
            values["charts/reward"] = mean_reward
            values["charts/learning_rate"] = scheduler.get_last_lr()[0]
            values["charts/grad_norm"] = grad_norm.item()
            values["charts/epoch"] = done / steps_per_epoch
            values["charts/tokens"] = counts["tokens"]
            values["charts/tokens_per_second"] = counts["tokens"] / counts["seconds"]
        if is_last:
            evaluated = evaluate_once(student, "after")
        elif done % args.eval_every == 0:
            evaluated = evaluate(eval_rows, args.seed, student, eval_reward_fn, args)
            evaluated = [{**row, **answer} for row, answer in zip(eval_rows, evaluated)]
        if is_last or done % args.eval_every == 0:
            values |= reward_metrics(evaluated)
            values |= kl_spent(evaluated, student, start, vocab_size, args)
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
    spent = kl_spent(eval_after, student, start, vocab_size, args)
    results["kl_spent"] = spent["eval/kl"]
    results["response_tokens"] = spent["eval/length"]
    results["seconds"] = time.time() - started
    save_summary(run_dir, results, counts, args)
    evaluations = {"before": eval_before, "now": eval_after, "teacher": eval_teacher}
    print_samples(evaluations)
    print_rewards(evaluations, getattr(eval_reward_fn, "best_possible", None))
    print_end(run_dir, args, results["seconds"])


if __name__ == "__main__":
    args = parse_flags(Args, __doc__)
    with exit_in_one_line(args):
        main(args)
