r"""Baselines of the papers that no method's script computes, and two losses that learn as much from
the same models: distillation with the student's own samples. They are for comparisons, not for use.

π_θ is the student, π_ref the initial student, π_T the teacher, (x, y_w, y_l) a preference pair, a
prompt with its chosen and its rejected response, and s_t = (x, y_<t).

    --loss dpo          L = −log σ( β log[π_θ(y_w|x)/π_ref(y_w|x)]
                        − β log[π_θ(y_l|x)/π_ref(y_l|x)] )
                        (Rafailov et al., NeurIPS 2023, arXiv 2305.18290, equation 7)
    --loss simpo        L = −log σ( (β/|y_w|) log π_θ(y_w|x) − (β/|y_l|) log π_θ(y_l|x) − γ )
                        (Meng et al., NeurIPS 2024, arXiv 2405.14734, equation 6)
    --loss kd           L = (1/|y_w|) Σ_t KL( π_T(·|s_t) ‖ π_θ(·|s_t) ) on the data's y_w
                        (word-level distillation; Kim and Rush, EMNLP 2016, arXiv 1606.07947)

In the other three y is a response that π_θ samples in this very step.

    --loss reverse_kl   L = (1/|y|) Σ_t KL( π_θ(·|s_t) ‖ π_T(·|s_t) )
                        (on-policy distillation; the core of MiniLLM, Gu et al., ICLR 2024, arXiv
                        2306.08543, equation 1)
    --loss gkd          L = (1/|y|) Σ_t JSD_b( π_T(·|s_t) ‖ π_θ(·|s_t) ),
                        JSD_b(P ‖ Q) = b KL(P ‖ M) + (1 − b) KL(Q ‖ M), M = b P + (1 − b) Q
                        (GKD, Agarwal et al., ICLR 2024, arXiv 2306.13649, equation 1 and algorithm
                        1 with λ = 1)
    --loss aligndistil  L = (1/|y|) Σ_t KL( π_θ(·|s_t) ‖ π*(·|s_t) ),
                        π* = softmax( z_T + α (z_T − z_R) ), z the logits of π_T and --teacher_ref
                        (the core of AlignDistil, Zhang et al., ACL 2025, arXiv 2503.02832)

The divergence of a state is exact, a sum over the vocabulary. No gradient goes through the sampling
of y. Left out is what MiniLLM adds: the long-range part of the gradient, with its clipping and
mixed sampling, and a language-model term. Of AlignDistil the contrast with a reversed DPO model is
left out, and an α of every token's own: α is one number here. It learns from what adpa.py learns
from, and stays close to a distribution where ADPA's expectation has no bound.

Stages: (1) training; (2) evaluation. DPO and SimPO use the teacher only in the evaluation, and only
AlignDistil uses --teacher_ref.

    # the toy task: a CPU, less than a minute
    python -m studies.baselines --loss dpo

    # models and data of the hub, on one GPU of 80 GB
    python -m studies.baselines --loss dpo \
        --student allenai/OLMo-2-0425-1B-SFT \
        --teacher allenai/OLMo-2-1124-7B-DPO \
        --data argilla/dpo-mix-7k --eval_data argilla/dpo-mix-7k \
        --reward Skywork/Skywork-Reward-V2-Llama-3.2-1B \
        --beta 0.1 --learning_rate 5e-7 --num_epochs 3 \
        --batch_size 128 --micro_batch_size 4 --gradient_checkpointing \
        --sample_batch_size 64 --max_prompt_tokens 1024 \
        --max_response_tokens 1024

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
)

# isort: split
# common comes first: with it Ctrl-C ends in one line, also while the slow imports run.
import torch
import torch.nn.functional as F
from transformers import get_cosine_schedule_with_warmup


# -------------------------------------------------------------------------------------- mathematics
def dpo_loss(
    student_logps: torch.Tensor, reference_logps: torch.Tensor, beta: float
) -> torch.Tensor:
    """[B]: −log σ( β log[π_θ(y_w|x)/π_ref(y_w|x)] − β log[π_θ(y_l|x)/π_ref(y_l|x)] ).

    The log-probs [2·B] are sums over the tokens of y_w and y_l, which take turns.

    Example: a log-ratio of 1 on y_w and of −1 on y_l, with β = 0.5, gives −log σ(1) = 0.313.
    """
    rewards = beta * (student_logps - reference_logps)  # [2·B]
    chosen_rewards, rejected_rewards = rewards.view(-1, 2).T  # [B] each
    return -F.logsigmoid(chosen_rewards - rejected_rewards)


def simpo_loss(mean_logps: torch.Tensor, beta: float, gamma: float) -> torch.Tensor:
    """[B]: −log σ( (β/|y_w|) log π_θ(y_w|x) − (β/|y_l|) log π_θ(y_l|x) − γ ).

    The log-probs [2·B] are means over the tokens of y_w and y_l, which take turns.

    Example: means of −1 and −3, with β = 2 and γ = 0.5, give −log σ(3.5) = 0.030.
    """
    rewards = beta * mean_logps  # [2·B]
    chosen_rewards, rejected_rewards = rewards.view(-1, 2).T  # [B] each
    return -F.logsigmoid(chosen_rewards - rejected_rewards - gamma)


def reverse_kl(student_log_probs: torch.Tensor, teacher_log_probs: torch.Tensor) -> torch.Tensor:
    """[N]: KL(π_θ(·|s) ‖ π_T(·|s)) = Σ_a π_θ(a|s) log [π_θ(a|s) / π_T(a|s)], from [N, V] twice.

    Example: π_θ = (3/4, 1/4) and π_T = (1/2, 1/2) give ¾ log 1.5 + ¼ log 0.5 = 0.131.
    """
    log_ratios = student_log_probs - teacher_log_probs
    # p log p is 0 at p = 0. Computed, it is NaN.
    log_ratios = log_ratios.masked_fill(student_log_probs.isneginf(), 0.0)
    return (student_log_probs.exp() * log_ratios).sum(-1)


def forward_kl(student_log_probs: torch.Tensor, teacher_log_probs: torch.Tensor) -> torch.Tensor:
    """[N]: KL(π_T(·|s) ‖ π_θ(·|s)) = Σ_a π_T(a|s) log [π_T(a|s) / π_θ(a|s)], from [N, V] twice.

    Example: π_T = (3/4, 1/4) and π_θ = (1/2, 1/2) give ¾ log 1.5 + ¼ log 0.5 = 0.131.
    """
    return reverse_kl(teacher_log_probs, student_log_probs)


def generalised_jsd(
    student_log_probs: torch.Tensor, teacher_log_probs: torch.Tensor, weight: float
) -> torch.Tensor:
    """[N]: b KL(π_T ‖ M) + (1 − b) KL(π_θ ‖ M), M = b π_T + (1 − b) π_θ, from [N, V] twice and the
    weight b between 0 and 1.

    Example: π_T = (3/4, 1/4), π_θ = (1/4, 3/4) and b = ½ give M = (½, ½) and ¾ log 1.5 + ¼ log 0.5
    = 0.131.
    """
    # The gradient of logaddexp at two excluded tokens, with log-probs of −∞, would be NaN.
    teacher_log_probs = teacher_log_probs.clamp(min=-1e4)
    student_log_probs = student_log_probs.clamp(min=-1e4)
    mixture_log_probs = torch.logaddexp(
        teacher_log_probs + math.log(weight), student_log_probs + math.log(1 - weight)
    )
    teacher_kl = reverse_kl(teacher_log_probs, mixture_log_probs)
    student_kl = reverse_kl(student_log_probs, mixture_log_probs)
    return weight * teacher_kl + (1 - weight) * student_kl


def extrapolated_log_probs(
    teacher_log_probs: torch.Tensor, reference_log_probs: torch.Tensor, alpha: float
) -> torch.Tensor:
    """[N, V]: log softmax( z_T + α (z_T − z_R) ), from the log-probs of the teacher and of what it
    was aligned from. Their logits z would give the same.

    A token that the teacher excludes, with a logit of −∞, stays excluded. Where the reference
    excludes one, the teacher's own log-prob is taken.

    Example: π_T = (.6, .4), π_R = (.4, .6) and α = 1 give .6²/.4 : .4²/.6 = .9 : .267, so (.771,
    .229).
    """
    log_ratios = teacher_log_probs - reference_log_probs
    excluded = teacher_log_probs.isneginf() | reference_log_probs.isneginf()
    log_ratios = log_ratios.masked_fill(excluded, 0.0)
    return (teacher_log_probs + alpha * log_ratios).log_softmax(-1)


# What suits a loss on the playground, from seeds 101 to 103.
DEFAULTS = {
    "dpo": {"learning_rate": 1e-3, "beta": 1.0},
    "simpo": {"learning_rate": 1e-4, "beta": 2.0},
    "kd": {"learning_rate": 3e-3},
    "reverse_kl": {"learning_rate": 3e-3},
    "gkd": {"learning_rate": 3e-3},
    "aligndistil": {"learning_rate": 3e-3},
}
# The columns of the data that a loss learns from. Where there is none, the student samples y.
COLUMNS = {
    "dpo": ["chosen", "rejected"],
    "simpo": ["chosen", "rejected"],
    "kd": ["chosen"],
    "reverse_kl": [],
    "gkd": [],
    "aligndistil": [],
}


# -------------------------------------------------------------------------------------------- flags
@dataclass
class Method:
    loss: Literal["dpo", "simpo", "kd", "reverse_kl", "gkd", "aligndistil"] = "dpo"
    """which baseline is trained"""
    beta: float = 0.0
    """β of DPO and SimPO; 0 takes what was tuned for --loss on the toy task (DEFAULTS; papers: DPO
    0.1, SimPO 2.0 to 2.5)"""
    simpo_gamma: float = 1.0
    """γ, the margin that SimPO asks for (paper: 0.3 to 1.6)"""
    jsd_weight: float = 0.5
    """b, share of the teacher in GKD's mixture, between 0 and 1 (paper: 0.1, 0.5 and 0.9)"""
    alpha: float = 1.0
    """α, how far AlignDistil goes beyond its teacher (tuned for the toy task; the paper finds an α
    for every token)"""
    teacher_ref: str = "playground/teacher_ref"
    """model that the teacher was aligned from, for AlignDistil"""


@dataclass
class Optimisation:
    learning_rate: float = 0.0
    """learning rate of AdamW; 0 takes what was tuned for --loss on the toy task (DEFAULTS)"""
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
def dpo_terms(
    examples: list[Example], student: LM, reference: LM, vocab_size: int, args: Args
) -> dict[str, torch.Tensor]:
    """DPO's L as its only term, [B]. An example's responses are y_w and y_l."""
    batch = pack(examples, student, reference)
    student_hidden = student.hidden_states(batch)[batch.predict_index]  # [N, H]
    reference_hidden = reference.hidden_states(batch)[batch.predict_index]  # [N, H]

    def score_tokens(target_ids, student_log_probs, reference_log_probs):
        student_logps = token_logps(target_ids, student_log_probs)  # [N]
        reference_logps = token_logps(target_ids, reference_log_probs)  # [N]
        return student_logps, reference_logps

    student_logps, reference_logps = per_token(
        score_tokens,
        batch.target_ids,
        [student, reference],
        [student_hidden, reference_hidden],
        vocab_size=vocab_size,
        chunk_size=args.logits_chunk,
    )
    # log π(y|x) = Σ_t log π(y_t|s_t): the mean over the tokens times their number
    student_logps = mean_per_response(student_logps, batch) * batch.lengths  # [2·B]
    reference_logps = mean_per_response(reference_logps, batch) * batch.lengths  # [2·B]
    # −log σ( β log[π_θ(y_w|x)/π_ref(y_w|x)] − β log[π_θ(y_l|x)/π_ref(y_l|x)] )
    return {"dpo": dpo_loss(student_logps, reference_logps, args.beta)}


def simpo_terms(
    examples: list[Example], student: LM, vocab_size: int, args: Args
) -> dict[str, torch.Tensor]:
    """SimPO's L as its only term, [B]. An example's responses are y_w and y_l."""
    batch = pack(examples, student)
    logps = per_token(
        token_logps,
        batch.target_ids,
        [student],
        [student.hidden_states(batch)[batch.predict_index]],
        vocab_size=vocab_size,
        chunk_size=args.logits_chunk,
    )
    # (1/|y|) log π_θ(y|x) = (1/|y|) Σ_t log π_θ(y_t|s_t)
    mean_logps = mean_per_response(logps, batch)  # [2·B]
    # −log σ( (β/|y_w|) log π_θ(y_w|x) − (β/|y_l|) log π_θ(y_l|x) − γ )
    return {"simpo": simpo_loss(mean_logps, args.beta, args.simpo_gamma)}


def distillation_terms(
    examples: list[Example], student: LM, teachers: list[LM], vocab_size: int, args: Args
) -> dict[str, torch.Tensor]:
    """A divergence from the teacher as the only term of L, [B]. An example's response is y, or y_w
    for --loss kd. `teachers` are the teacher and, for AlignDistil, its reference."""
    batch = pack(examples, student, *teachers)
    hidden = []  # [N, H] of every model
    for lm in [student, *teachers]:
        hidden.append(lm.hidden_states(batch)[batch.predict_index])

    def divergence_of_states(_, student_log_probs, teacher_log_probs, reference_log_probs=None):
        if args.loss == "kd":
            return forward_kl(student_log_probs, teacher_log_probs)  # [N]
        if args.loss == "gkd":
            return generalised_jsd(student_log_probs, teacher_log_probs, args.jsd_weight)  # [N]
        if args.loss == "aligndistil":
            teacher_log_probs = extrapolated_log_probs(
                teacher_log_probs, reference_log_probs, args.alpha
            )  # [N, V]
        return reverse_kl(student_log_probs, teacher_log_probs)  # [N]

    divergence = per_token(
        divergence_of_states,
        batch.target_ids,
        [student, *teachers],
        hidden,
        vocab_size=vocab_size,
        chunk_size=args.logits_chunk,
    )
    # (1/|y|) Σ_t of it
    return {args.loss: mean_per_response(divergence, batch)}


# --------------------------------------------------------------- models, sampling and evaluation
def load_models(args: Args, device: torch.device) -> tuple[LM, LM, LM | None]:
    """The student, the teacher, and a reference: for DPO the initial student, for AlignDistil what
    the teacher was aligned from."""
    student = LM(
        args.student,
        device,
        trainable=True,
        gradient_checkpointing=args.gradient_checkpointing,
        trust_remote_code=args.trust_remote_code,
    )
    teacher = LM(args.teacher, device, trust_remote_code=args.trust_remote_code)
    paths = {"dpo": args.student, "aligndistil": args.teacher_ref}
    if args.loss not in paths:
        return student, teacher, None
    reference = LM(paths[args.loss], device, trust_remote_code=args.trust_remote_code)
    return student, teacher, reference


def distilled_models(teacher: LM, reference: LM | None, loss: str) -> list[LM]:
    """The models whose next-token distributions a loss compares with the student's."""
    if loss in ("dpo", "simpo"):
        return []
    if loss == "aligndistil":
        return [teacher, reference]
    return [teacher]


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


def sample_responses(examples: list[Example], seed: int, student: LM, args: Args) -> list[Example]:
    """The same prompts, each with the token ids of one response y that the student samples now."""
    rows = [example.row for example in examples]
    answered = []
    for example, response in zip(examples, respond(rows, seed, student, 1.0, args)):
        answered.append(Example(example.row, example.prompt_ids, [response["token_ids"]]))
    return answered


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
    check_flags(args, at_least_0=["beta", "simpo_gamma", "alpha"])
    if not 0 < args.jsd_weight < 1:
        stop(f"--jsd_weight {args.jsd_weight} must lie between 0 and 1")
    for name, value in DEFAULTS[args.loss].items():
        if getattr(args, name) == 0:
            setattr(args, name, value)

    # ------------------------------------------------------------------------------ models and data
    device = choose_device(args.device)
    print_start(run_dir, device, data=args.data, eval_data=args.eval_data)
    columns = COLUMNS[args.loss]
    train_rows = read_rows(args.data, args.data_split, columns=columns, config=args.data_config)
    eval_rows = read_rows(args.eval_data, args.eval_split, columns=(), config=args.eval_config)
    check_own_data(args, train_rows, eval_rows)
    reward_fn = load_reward_function(
        args.reward, device, args.trust_remote_code, label=args.reward_label, rows=eval_rows
    )
    student, teacher, reference = load_models(args, device)
    print_models(student=student, teacher=teacher, reference=reference)
    vocab_size = student.vocab_size
    teachers = distilled_models(teacher, reference, args.loss)
    for lm in teachers:
        vocab_size = min(vocab_size, shared_vocab_size(student, lm))
    examples = encode_rows(student, train_rows, columns, args, "training rows")
    held_out = encode_rows(student, eval_rows, [], args, "held-out prompts")
    eval_rows = [example.row for example in held_out[: args.eval_prompts]]
    print_plan(args, examples, len(eval_rows))
    models = [student, teacher, reference]
    begin_run(run_dir, args, models, data=examples, eval_data=held_out)

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
        if not columns:
            step_batch = sample_responses(step_batch, args.seed + step, student, args)
        losses = {"total": 0.0}
        for start in range(0, len(step_batch), args.micro_batch_size):
            micro_batch = step_batch[start : start + args.micro_batch_size]
            if args.loss == "dpo":
                terms = dpo_terms(micro_batch, student, reference, vocab_size, args)
            elif args.loss == "simpo":
                terms = simpo_terms(micro_batch, student, vocab_size, args)
            else:
                terms = distillation_terms(micro_batch, student, teachers, vocab_size, args)
            # Divided by the examples of the whole step, so that the micro-batch size changes
            # memory and nothing else.
            loss = terms[args.loss].sum() / len(step_batch)
            loss.backward()
            losses["total"] += loss.item()

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
