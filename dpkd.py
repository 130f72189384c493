r"""DPKD: Direct Preference Knowledge Distillation (Li et al., 2024, arXiv 2406.19774).

The student q_θ learns to prefer the teacher's response y_t to a prompt x over its own response y_s.
Its implicit reward is measured from the teacher p, which takes the place of DPO's reference
(equation 9, Algorithm 1):

    r(x, y) = (β/|y|) log [ q_θ(y|x) / p(y|x) ]
    L = −log σ( r(x, y_t) − r(x, y_s) ) + λ L_LM.

|y| counts the end-of-sequence token. L is averaged over the prompts of a step.

Why a log-ratio is a reward: the optimal policy of a reward r that is penalised by β KL(q ‖ p) is
p exp(r/β), times a factor that depends only on x. So a student q_θ stands for the reward
β log [q_θ/p]. Without 1/|y| the factor cancels in the difference of two rewards. With it, it does
so between responses of equal length. docs/dpkd.md has more.

y_t is sampled from p once. y_s must come from the current student (here it is at most 4 steps old):
then q_θ = p is a stationary point of the expected loss. With old y_s the loss keeps falling as the
probability of y_s goes to 0, and the mass goes to responses that are neither y_t nor y_s. That is
the collapse, which `--refresh_every 0` shows. L_LM is the language-model loss on a text corpus.
Without `--lm_data` it is left out. `--sft_coef` adds a cross-entropy on y_t.

Stages: (1) the teacher answers every prompt once; (2) training, in which the student answers the
prompts of some steps at a time; (3) evaluation. Simplified: one GPU, and the teacher runs in every
step. The released code (microsoft/LMOps, commit 4f2a9de, dpkd/main.py) samples nothing in training:
docs/dpkd.md lists all departures.

    # the toy task: lists such as "Name two fish."; a CPU, less than a minute
    python dpkd.py

    # models and data of the hub, on one GPU of 80 GB
    python dpkd.py --student allenai/OLMo-2-0425-1B-SFT \
        --teacher allenai/OLMo-2-1124-7B-DPO \
        --data argilla/dpo-mix-7k --eval_data argilla/dpo-mix-7k \
        --reward Skywork/Skywork-Reward-V2-Llama-3.2-1B \
        --learning_rate 1e-6 \
        --batch_size 128 --micro_batch_size 4 --gradient_checkpointing \
        --sample_batch_size 64 --max_prompt_tokens 1024 \
        --max_response_tokens 1024

    # prompts of your own, without a reward
    python dpkd.py --data my.jsonl --eval_data my_test.jsonl --reward none
    # a run that was interrupted
    python dpkd.py --resume runs/<folder>

Read part 2 of common.py for `pack` and `per_token`. `pack` lists the response tokens alone, each
with the position before it, which predicts it. So no prompt token reaches a loss, and the shift is
done. Frozen models run without gradient. What is sampled or scored goes through `cached_map` (part
4), which calls function(rows, seed) and returns the rows with the results. Shapes: B examples, R =
2·B responses (y_t and y_s of every example), N response tokens, V vocabulary.
"""

import math
import random
import time
from dataclasses import dataclass
from functools import partial
from typing import Literal

from common import (
    FILE_KINDS,
    LM,
    Bar,
    Batch,
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
    read_records,
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
import torch.nn.functional as F
from tqdm import tqdm
from transformers import get_cosine_schedule_with_warmup


# -------------------------------------------------------------------------------------- mathematics
def implicit_rewards(
    student_logps: torch.Tensor,
    teacher_logps: torch.Tensor,
    batch: Batch,
    *,
    beta: float,
    length_normalize: bool,
) -> torch.Tensor:
    """[R]: r(x, y) = (β/|y|) log [ q_θ(y|x) / p(y|x) ] of every response (equation 9), from the
    log-probs [N] of its tokens. Without normalisation it is β log [ q_θ(y|x) / p(y|x) ].

    A token that one of the models excludes (probability 0) counts as a ratio of 1.

    Example: y_t has two tokens, with probabilities ½ · ¼ under q_θ and ½ · ½ under p. y_s has one,
    with ½ and ⅛. β = 2 gives r(x, y_t) = (2/2) log ½ = −.69 and r(x, y_s) = (2/1) log 4 = 2.77.
    """
    log_ratios = student_logps - teacher_logps  # [N]
    excluded = student_logps.isneginf() | teacher_logps.isneginf()
    means = mean_per_response(log_ratios.masked_fill(excluded, 0.0), batch)  # [R]
    if length_normalize:
        return beta * means
    sums = means * batch.lengths
    return beta * sums


def preference_loss(rewards: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """([B], [B]): −log σ(margin) and the margin r(x, y_t) − r(x, y_s) (equation 9), from [2·B].

    Example: the rewards (−.69, 2.77) above give the margin −3.47 and the loss log(1 + 2⁵) = 3.50.
    """
    teacher_rewards, student_rewards = rewards.view(-1, 2).T  # [B] each: of y_t, of y_s
    margins = teacher_rewards - student_rewards
    return -F.logsigmoid(margins), margins


# -------------------------------------------------------------------------------------------- flags
@dataclass
class Method:
    beta: float = 1.0
    """β, scale of the implicit reward (tuned for the toy task; released arguments.py: 0.1; the
    paper gives none)"""
    length_normalize: bool = True
    """divide log-ratios by the response's length (equation 9; paper, table 3: worse without)"""
    refresh_every: int = 4
    """y_s is sampled anew every this many steps (tuned for the toy task; paper: 1); 0 samples all
    of them from the initial student"""
    teacher_answers: int = 0
    """prompts of --data that the teacher answers and training uses; 0 takes all"""
    sft_coef: float = 0.0
    """weight of the cross-entropy on the teacher's y_t (released main.py: as much of it as of the
    preference, which is 1; the paper: none)"""
    lm_data: str = ""
    """corpus of L_LM: a .txt file, or a column `text` in what --data can be, cut into pieces of
    --max_response_tokens; if empty, L_LM is left out"""
    lm_config: str = ""
    """config of --lm_data, where a hub id has several"""
    lm_split: str = "train"
    """split of --lm_data, or a part of one"""
    lm_coef: float = 1.0
    """λ, weight of L_LM (the paper gives none; released dpkd-gpt2_base_runner.sh: 0.5, with half of
    the term a soft cross-entropy to the teacher; 1 is plain addition)"""


@dataclass
class Optimisation:
    learning_rate: float = 2e-3
    """learning rate of AdamW (tuned for the toy task; released dpkd-gpt2_base_runner.sh: 5e-4
    for a GPT-2 of 120M; the paper gives none)"""
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
def dpkd_terms(
    examples: list[Example],
    student: LM,
    teacher: LM,
    vocab_size: int,
    args: Args,
    texts: list[Example] | None = None,
) -> dict[str, torch.Tensor]:
    """The terms of L before their weights, each [B]. An example's responses are y_t and y_s.

    "preference", "sft" and "lm" enter L as they are and should fall. "lm" is taken on `texts`, one
    piece of the corpus for every example, and is 0 without them. "margin" is for the log.
    """
    batch = pack(examples, student, teacher)
    student_hidden = student.hidden_states(batch)[batch.predict_index]  # [N, H]
    teacher_hidden = teacher.hidden_states(batch)[batch.predict_index]  # [N, H]

    def score_tokens(target_ids, student_log_probs, teacher_log_probs):
        student_logps = token_logps(target_ids, student_log_probs)  # [N]
        teacher_logps = token_logps(target_ids, teacher_log_probs)  # [N]
        return student_logps, teacher_logps

    student_logps, teacher_logps = per_token(
        score_tokens,
        batch.target_ids,
        [student, teacher],
        [student_hidden, teacher_hidden],
        vocab_size=vocab_size,
        chunk_size=args.logits_chunk,
    )
    # r(x, y) = (β/|y|) log [ q_θ(y|x) / p(y|x) ]
    # The responses of an example are [y_t, y_s].
    rewards = implicit_rewards(
        student_logps,
        teacher_logps,
        batch,
        beta=args.beta,
        length_normalize=args.length_normalize,
    )
    rewards = rewards.view(len(examples), 2)  # [B, 2]
    # −log σ( r(x, y_t) − r(x, y_s) )
    preference, margins = preference_loss(rewards)  # [B] each
    # −(1/|y|) log q_θ(y|x), of which --sft_coef takes y_t
    nll = -mean_per_response(student_logps, batch).view(len(examples), 2)  # [B, 2]
    # L_LM
    lm_loss = torch.zeros_like(preference)
    if texts:
        lm_loss = -mean_logps(texts, student, vocab_size, args)  # [B]
    return {"preference": preference, "margin": margins, "sft": nll[:, 0], "lm": lm_loss}


def mean_logps(examples: list[Example], lm: LM, vocab_size: int, args: Args) -> torch.Tensor:
    """[R]: (1/|y|) log q_θ(y|x) of the examples' responses."""
    batch = pack(examples, lm)
    hidden = lm.hidden_states(batch)[batch.predict_index]  # [N, H]
    logps = per_token(
        token_logps,
        batch.target_ids,
        [lm],
        [hidden],
        vocab_size=vocab_size,
        chunk_size=args.logits_chunk,
    )
    return mean_per_response(logps, batch)


# --------------------------------------------------------------------------------- corpus of L_LM
def read_corpus(lm: LM, args: Args) -> list[Example]:
    """The documents of --lm_data, cut into pieces of --max_response_tokens. A piece is an example
    whose prompt is its first token.

    Special tokens that are written in a text are recognised, so that it may hold conversations.
    Begin and end of a document are added if they are missing. Blank documents are left out.
    """
    pieces = []
    texts = read_texts(args.lm_data, args.lm_split, args.lm_config)
    for number, text in enumerate(texts, 1):
        if not text.strip():
            continue
        ids = lm.tokenizer(text, add_special_tokens=False).input_ids
        if ids[: len(lm.bos_ids)] != lm.bos_ids:
            ids = lm.bos_ids + ids
        if ids[-1:] != lm.eos_ids[:1]:
            ids = ids + lm.eos_ids[:1]
        for start in range(0, len(ids), args.max_response_tokens):
            piece = ids[start : start + args.max_response_tokens]
            # Nothing predicts the first token of a piece.
            if len(piece) > 1:
                row = {"id": str(number)}
                pieces.append(Example(row, prompt_ids=piece[:1], response_ids=[piece[1:]]))
    if not pieces:
        stop(f"--lm_data {args.lm_data} holds no text")
    return pieces


def read_texts(source: str, split: str, config: str) -> list[str]:
    """The documents of a corpus: lines of a .txt file, or the column `text` of something else."""
    texts = []
    kinds = (*FILE_KINDS, ".txt")
    for file, number, record in read_records(source, split, config, kinds):
        if not isinstance(record, dict) or not isinstance(record.get("text", 0), str | None):
            found = str(record)[:200]
            stop(f"--lm_data {file}, row {number}: a column text is needed, found {found}")
        texts.append(record["text"] or "")
    return texts


# ------------------------------------------------------------------------------- y_s, sampled ahead
class PendingSamples:
    """Token ids of the y_s that were sampled ahead and wait for their steps.

    They are part of a checkpoint: when a run is resumed, the weights that sampled them are gone.
    """

    def __init__(self):
        self.response_ids = []

    def state_dict(self) -> dict:
        return {"response_ids": self.response_ids}

    def load_state_dict(self, state: dict):
        self.response_ids = state["response_ids"]


def sample_ahead(examples: list[Example], steps: range, student: LM, args: Args) -> list[list[int]]:
    """Token ids of one y_s for every example of the given steps, in order, by the student as it is
    before the first of them."""
    upcoming = []
    for later_step in steps:
        upcoming += step_examples(examples, later_step, args.batch_size, args.seed)
    rows = [example.row for example in upcoming]
    samples = respond(rows, args.seed + steps[0], lm=student, temperature=1.0, args=args)
    return [sample["token_ids"] for sample in samples]


def take_pairs(examples: list[Example], pending: PendingSamples) -> list[Example]:
    """The examples of a step with the responses y_t and y_s. Each y_s is taken out of `pending`."""
    pairs = []
    for example in examples:
        [teacher_ids] = example.response_ids
        student_ids = pending.response_ids.pop(0)
        pairs.append(Example(example.row, example.prompt_ids, [teacher_ids, student_ids]))
    return pairs


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


def watched_examples(
    held_out: list[Example], by_teacher: list[dict], by_student: list[dict], lm: LM, args: Args
) -> list[Example]:
    """Held-out prompts with two responses that never change: the teacher's, and the untrained
    student's. The program ends if there is none with tokens in both."""
    watched = []
    for example, teacher_sample, student_sample in zip(held_out, by_teacher, by_student):
        prompt = example.row["prompt"]
        teacher_ids = lm.ids_of_response(prompt, teacher_sample)
        student_ids = lm.ids_of_response(prompt, student_sample)
        if teacher_ids and student_ids:
            watched.append(Example(example.row, example.prompt_ids, [teacher_ids, student_ids]))
    if not watched:
        stop("no held-out prompt has an answer of the teacher and one of the student")
    return watched


@torch.no_grad()
def watched_logps(
    watched: list[Example], student: LM, vocab_size: int, args: Args
) -> dict[str, float]:
    """Mean over prompts of (1/|y|) log q_θ(y|x) of the two watched responses. If both fall, the
    mass goes to third responses, which no term of the loss sees."""
    means = []
    for start in range(0, len(watched), args.micro_batch_size):
        micro_batch = watched[start : start + args.micro_batch_size]
        means.append(mean_logps(micro_batch, student, vocab_size, args))
    of_teacher, of_student = torch.cat(means).view(-1, 2).mean(0).tolist()
    return {"eval/logp_teacher_answers": of_teacher, "eval/logp_student_answers": of_student}


def has_collapsed(before: dict[str, float], now: dict[str, float]) -> bool:
    """Whether log q_θ fell by more than a nat per token on the untrained student's responses, and
    fell on the teacher's too. In a healthy run the first falls by a few tenths."""
    teacher_drop = before["eval/logp_teacher_answers"] - now["eval/logp_teacher_answers"]
    student_drop = before["eval/logp_student_answers"] - now["eval/logp_student_answers"]
    return student_drop > 1.0 and teacher_drop > 0


# --------------------------------------------------------------------------------------------- main
def main(args: Args):
    started = time.time()
    args, run_dir = open_run(args, __file__)
    check_flags(
        args, at_least_0=["beta", "refresh_every", "teacher_answers", "sft_coef", "lm_coef"]
    )

    # ------------------------------------------------------------------------------ models and data
    device = choose_device(args.device)
    print_start(run_dir, device, data=args.data, eval_data=args.eval_data)
    train_rows = read_rows(args.data, args.data_split, columns=(), config=args.data_config)
    eval_rows = read_rows(args.eval_data, args.eval_split, columns=(), config=args.eval_config)
    check_own_data(args, train_rows, eval_rows)
    reward_fn = load_reward_function(
        args.reward, device, args.trust_remote_code, label=args.reward_label, rows=eval_rows
    )
    student, teacher = load_models(args, device)
    print_models(student=student, teacher=teacher)
    vocab_size = shared_vocab_size(student, teacher)
    encoded = {}  # token ids of prompts, so that none is encoded twice
    prompts = encode_rows(student, train_rows, [], args, "training prompts", encoded)
    held_out = encode_rows(student, eval_rows, [], args, "held-out prompts")
    held_out = held_out[: args.eval_prompts]
    if args.teacher_answers:
        prompts = prompts[: args.teacher_answers]
    train_rows = [example.row for example in prompts]
    eval_rows = [example.row for example in held_out]
    corpus = []
    if args.lm_data:
        corpus = read_corpus(student, args)
    print_plan(args, prompts, len(eval_rows))
    begin_run(run_dir, args, [student, teacher], data=prompts, eval_data=held_out, lm_data=corpus)

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
    watched = watched_examples(held_out, eval_teacher, eval_before, student, args)
    logps_before = watched_logps(watched, student, vocab_size, args)

    # --------------------------------------------------------------------------------- stage 1: y_t
    answers = cached_map(
        run_dir / "teacher_answers.jsonl",
        train_rows,
        partial(respond, lm=teacher, temperature=1.0, args=args),
        args.sample_batch_size,
        args.seed,
    )
    check_not_empty(answers, teacher, "the teacher's answers")
    # `cached_map` returns the rows with what `respond` made of them.
    for answer in answers:
        answer["y_t"] = dict(answer)
    examples = encode_rows(student, answers, ["y_t"], args, "teacher's answers", encoded)

    # ------------------------------------------------------------------------------------ optimiser
    steps_per_epoch = math.ceil(len(examples) / args.batch_size)
    total_steps = args.max_steps or args.num_epochs * steps_per_epoch
    optimizer = torch.optim.AdamW(
        student.model.parameters(), args.learning_rate, weight_decay=args.weight_decay
    )
    warmup_steps = math.ceil(args.warmup_ratio * total_steps)
    scheduler = get_cosine_schedule_with_warmup(optimizer, warmup_steps, total_steps)
    pending = PendingSamples()
    state = {"model": student.model, "optimizer": optimizer, "scheduler": scheduler}
    state["pending"] = pending
    # Of training and of sampling y_s so far, kept in the checkpoint.
    counts = {"tokens": 0, "seconds": 0.0, "sampled_tokens": 0, "sampling_seconds": 0.0}
    first_step = load_checkpoint(run_dir / "checkpoint.pt", counts, **state)
    metrics = Metrics(run_dir, args, first_step)
    if first_step == 0:
        metrics.log(0, {**reward_metrics(eval_before), **logps_before})
        metrics.log_samples(0, eval_before)

    # ------------------------------------------------------------------------------------- training
    refresh_every = args.refresh_every or total_steps
    warned = False
    bar = Bar("training", total_steps, "steps", done=first_step)
    for step in range(first_step, total_steps):
        # y_s of this step and of the next ones, by the current student
        if step % refresh_every == 0:
            sampling_started = time.time()
            steps_ahead = range(step, min(step + refresh_every, total_steps))
            pending.response_ids = sample_ahead(examples, steps_ahead, student, args)
            counts["sampled_tokens"] += sum(len(ids) for ids in pending.response_ids)
            counts["sampling_seconds"] += time.time() - sampling_started

        step_started = time.time()
        step_batch = take_pairs(step_examples(examples, step, args.batch_size, args.seed), pending)
        texts = []
        if corpus:
            texts = random.Random(args.seed + step).choices(corpus, k=len(step_batch))
        losses = {"total": 0.0, "preference": 0.0, "margin": 0.0, "sft": 0.0, "lm": 0.0}
        for start in range(0, len(step_batch), args.micro_batch_size):
            micro_batch = step_batch[start : start + args.micro_batch_size]
            micro_texts = texts[start : start + args.micro_batch_size]
            terms = dpkd_terms(micro_batch, student, teacher, vocab_size, args, micro_texts)
            # Divided by the examples of the whole step, so that the micro-batch size changes
            # memory and nothing else.
            preference = terms["preference"].sum() / len(step_batch)
            margin = terms["margin"].sum() / len(step_batch)
            sft = terms["sft"].sum() / len(step_batch)
            lm_loss = terms["lm"].sum() / len(step_batch)
            loss = preference + weighted(args.sft_coef, sft) + weighted(args.lm_coef, lm_loss)
            loss.backward()
            losses["total"] += loss.item()
            losses["preference"] += preference.item()
            losses["margin"] += margin.item()
            losses["sft"] += sft.item()
            losses["lm"] += lm_loss.item()

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
            values["losses/preference"] = losses["preference"]
            values["losses/margin"] = losses["margin"]
            values["losses/sft"] = losses["sft"]
            if corpus:
                values["losses/lm"] = losses["lm"]
            values["charts/learning_rate"] = scheduler.get_last_lr()[0]
            values["charts/grad_norm"] = grad_norm.item()
            values["charts/epoch"] = done / steps_per_epoch
            values["charts/tokens"] = counts["tokens"]
            values["charts/tokens_per_second"] = counts["tokens"] / counts["seconds"]
            sampling_speed = counts["sampled_tokens"] / counts["sampling_seconds"]
            values["charts/sampling_tokens_per_second"] = sampling_speed
            loop_seconds = counts["sampling_seconds"] + counts["seconds"]
            values["charts/sampling_share"] = counts["sampling_seconds"] / loop_seconds
        if is_last or done % args.eval_every == 0:
            if is_last:
                values |= reward_metrics(evaluate_once(student, "after"))
            elif reward_fn is not None:
                evaluated = evaluate(eval_rows, args.seed, student, reward_fn, args)
                values |= reward_metrics(evaluated)
            logps = watched_logps(watched, student, vocab_size, args)
            values |= logps
            if has_collapsed(logps_before, logps) and not warned:
                warned = True
                advice = "sample y_s more often (--refresh_every)"
                tqdm.write(f"warning: log q falls on all held-out answers, a collapse: {advice}")
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
