r"""DCKD: Dual-Constrained Knowledge Distillation (Gao et al., ICLR 2025, arXiv 2502.17927).

The student π_θ imitates an aligned teacher π_T on both responses of a preference pair, the chosen
y_w and the rejected y_l, and is fine-tuned on the chosen one. At every token it is pulled to the
teacher's whole next-token distribution, by a forward KL at temperature 1. With s_t = (x, y_<t),

    L = −(1/|y_w|) Σ_t log π_θ(y_w,t|s_t)
        + (α_w/|y_w|) Σ_t KL( π_T(·|s_t) ‖ π_θ(·|s_t) )   on y_w
        + (α_l/|y_l|) Σ_t KL( π_T(·|s_t) ‖ π_θ(·|s_t) )   on y_l.

|y| counts the end-of-sequence token. L is averaged over the pairs of a step. α_l = 0 is vanilla
knowledge distillation. α_w = α_l = 0 is SFT on the chosen responses.

Stages: (1) training; (2) evaluation. ADPA+ starts from the result:
`python adpa.py --student runs/<this run>/model`. Simplified: one GPU, and the teacher runs in every
step. The released code (gaoshiping/ADPA, commit a95c32f) distils its 50 likeliest tokens and a bin
for all others (utils/precompute_logits.py; here `--top_k 50`), and never the end-of-turn token:
docs/dckd.md lists all departures.

    # the toy task: lists such as "Name two fish."; a CPU, less than a minute
    python dckd.py

    # models and data of the hub, on one GPU of 80 GB
    python dckd.py --student allenai/OLMo-2-0425-1B-SFT \
        --teacher allenai/OLMo-2-1124-7B-DPO \
        --data argilla/dpo-mix-7k --eval_data argilla/dpo-mix-7k \
        --reward Skywork/Skywork-Reward-V2-Llama-3.2-1B \
        --learning_rate 5e-7 --num_epochs 1 \
        --batch_size 128 --micro_batch_size 4 --gradient_checkpointing \
        --sample_batch_size 64 --max_prompt_tokens 1024 \
        --max_response_tokens 1024

    # data of your own, without a reward
    python dckd.py --data my.jsonl --eval_data my_test.jsonl --reward none
    # a run that was interrupted
    python dckd.py --resume runs/<folder>

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
    weighted,
)

# isort: split
# common comes first: with it Ctrl-C ends in one line, also while the slow imports run.
import torch
from transformers import get_cosine_schedule_with_warmup


# -------------------------------------------------------------------------------------- mathematics
def forward_kl(
    teacher_log_probs: torch.Tensor, student_log_probs: torch.Tensor, top_k: int = 0
) -> torch.Tensor:
    """[N]: KL(π_T(·|s) ‖ π_θ(·|s)) = Σ_a π_T(a|s) log [π_T(a|s) / π_θ(a|s)], from [N, V] twice.

    With `top_k` it is taken over k + 1 events: the teacher's k likeliest tokens, and any other.

    Example: π_T = (3/4, 1/4) and π_θ = (1/2, 1/2) give ¾ log 1.5 + ¼ log 0.5 = 0.131.
    """
    if 0 < top_k < teacher_log_probs.shape[-1]:
        likeliest = teacher_log_probs.topk(top_k).indices  # [N, k]
        teacher_log_probs = with_rest(teacher_log_probs.gather(-1, likeliest))
        student_log_probs = with_rest(student_log_probs.gather(-1, likeliest))
    # The teacher's probabilities are constants. If the arguments changed places, the gradient would
    # run through them, and a token that is excluded would make it NaN.
    probs = teacher_log_probs.exp()
    summands = probs * (teacher_log_probs - student_log_probs)
    # p log p is 0 at p = 0. Computed, it is NaN.
    return summands.masked_fill(probs == 0, 0.0).sum(-1)


def with_rest(log_probs: torch.Tensor) -> torch.Tensor:
    """[N, k + 1] from [N, k]: appends the log-prob of all other tokens, log(1 − Σ_k p_k).

    The rest is at least the float's eps, so that its logarithm is finite where the sum rounds to 1.
    There it has no gradient.
    """
    rest = 1 - log_probs.exp().sum(-1, keepdim=True)
    rest = rest.clamp(min=torch.finfo(log_probs.dtype).eps)
    return torch.cat([log_probs, rest.log()], dim=-1)


# -------------------------------------------------------------------------------------------- flags
@dataclass
class Method:
    kl_chosen: float = 0.1
    """α_w, weight of the KL on the chosen y_w (released student_dckd.yaml: 0.1; the paper's sweep
    is best at 0.2)"""
    kl_rejected: float = 0.1
    """α_l, weight of the KL on the rejected y_l (released student_dckd.yaml: 0.1; the paper's sweep
    is best at 0.2)"""
    top_k: int = 0
    """KL over the teacher's k likeliest tokens and one bin for all others (released
    precompute_logits.py: 50); 0 takes all tokens"""


@dataclass
class Optimisation:
    learning_rate: float = 1e-3
    """learning rate of AdamW (tuned for the toy task; paper and released student_dckd.yaml:
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


# --------------------------------------------------------------------------------------- terms of L
def dckd_terms(
    examples: list[Example], student: LM, teacher: LM, vocab_size: int, args: Args
) -> dict[str, torch.Tensor]:
    """The three terms of L before their weights, each [B]. All of them should fall.

    An example's responses are [y_w, y_l].
    """
    batch = pack(examples, student, teacher)
    student_hidden = student.hidden_states(batch)[batch.predict_index]  # [N, H]
    teacher_hidden = teacher.hidden_states(batch)[batch.predict_index]  # [N, H]

    def score_tokens(target_ids, student_log_probs, teacher_log_probs):
        logps = token_logps(target_ids, student_log_probs)  # [N]
        kl = forward_kl(teacher_log_probs, student_log_probs, args.top_k)  # [N]
        return logps, kl

    logps, kl = per_token(
        score_tokens,
        batch.target_ids,
        [student, teacher],
        [student_hidden, teacher_hidden],
        vocab_size=vocab_size,
        chunk_size=args.logits_chunk,
    )
    # −(1/|y|) Σ_t log π_θ(y_t|s_t), of which L takes y_w
    nll = -mean_per_response(logps, batch).view(len(examples), 2)  # [B, 2]
    # (1/|y|) Σ_t KL( π_T(·|s_t) ‖ π_θ(·|s_t) ) on y_w and on y_l
    kl = mean_per_response(kl, batch).view(len(examples), 2)  # [B, 2]
    return {"sft": nll[:, 0], "kl_chosen": kl[:, 0], "kl_rejected": kl[:, 1]}


# --------------------------------------------------------------- models, sampling and evaluation
def load_models(args: Args, device: torch.device) -> tuple[LM, LM]:
    """The student and the teacher."""
    student = LM(
        args.student,
        device,
        trainable=True,
        gradient_checkpointing=args.gradient_checkpointing,
        trust_remote_code=args.trust_remote_code,
    )
    teacher = LM(args.teacher, device, trust_remote_code=args.trust_remote_code)
    return student, teacher


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
    check_flags(args, at_least_0=["kl_chosen", "kl_rejected", "top_k"])

    # ------------------------------------------------------------------------------ models and data
    device = choose_device(args.device)
    print_start(run_dir, device, data=args.data, eval_data=args.eval_data)
    train_rows = read_rows(args.data, args.data_split, config=args.data_config)
    eval_rows = read_rows(args.eval_data, args.eval_split, columns=(), config=args.eval_config)
    check_own_data(args, train_rows, eval_rows)
    reward_fn = load_reward_function(
        args.reward, device, args.trust_remote_code, label=args.reward_label, rows=eval_rows
    )
    student, teacher = load_models(args, device)
    print_models(student=student, teacher=teacher)
    vocab_size = shared_vocab_size(student, teacher)
    examples = encode_rows(student, train_rows, ["chosen", "rejected"], args, "training pairs")
    held_out = encode_rows(student, eval_rows, [], args, "held-out prompts")
    eval_rows = [example.row for example in held_out[: args.eval_prompts]]
    print_plan(args, examples, len(eval_rows))
    begin_run(run_dir, args, [student, teacher], data=examples, eval_data=held_out)

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
        losses = {"total": 0.0, "sft": 0.0, "kl_chosen": 0.0, "kl_rejected": 0.0}
        for start in range(0, len(step_batch), args.micro_batch_size):
            micro_batch = step_batch[start : start + args.micro_batch_size]
            terms = dckd_terms(micro_batch, student, teacher, vocab_size, args)
            # Divided by the examples of the whole step, so that the micro-batch size changes
            # memory and nothing else.
            sft = terms["sft"].sum() / len(step_batch)
            kl_chosen = terms["kl_chosen"].sum() / len(step_batch)
            kl_rejected = terms["kl_rejected"].sum() / len(step_batch)
            loss = sft + weighted(args.kl_chosen, kl_chosen)
            loss = loss + weighted(args.kl_rejected, kl_rejected)
            loss.backward()
            losses["total"] += loss.item()
            losses["sft"] += sft.item()
            losses["kl_chosen"] += kl_chosen.item()
            losses["kl_rejected"] += kl_rejected.item()

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
            values["losses/kl_chosen"] = losses["kl_chosen"]
            values["losses/kl_rejected"] = losses["kl_rejected"]
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
