r"""PAD: Preference-Aligned Distillation (Gu et al., ACL Findings 2025, arXiv 2502.14272).

The student π_θ gives n answers to every prompt x and learns how its teacher π_T ranks them. Both
give every answer y a score. The student's is its average log-prob. The teacher's mixes its own
average log-prob with a judgement. With s_t = (x, y_<t),

    s_student(y) = (1/|y|) Σ_t log π_θ(y_t|s_t)
    s_teacher(y) = α (1/|y|) Σ_t log π_T(y_t|s_t) + (1 − α) s_mcq(y).

For the judgement, every two of the n answers are put to the teacher: which is better, A or B? So y
stands in n − 1 questions. In each, p(y) is the probability that the teacher's reply names y:

    s_mcq(y) = log( (1e-8 + Σ_questions p(y)) / (n − 1) ).

Scores make a distribution over the n! rankings τ, best answer first (Plackett-Luce): each place
goes to one of the answers that are left, by a softmax of their scores.

    P(τ) = Π_k [ exp(β s(y_τ(k))) / Σ_{j≥k} exp(β s(y_τ(j))) ]

The student learns the teacher's distribution (the paper's PPD), or only τ*, the teacher's order of
the answers (its VPD):

    PPD:  L = JSD(P_student, P_teacher)
            = ½ KL(P_student ‖ M) + ½ KL(P_teacher ‖ M)
              with M = ½ (P_student + P_teacher)
    VPD:  L = −log P_student(τ*).

Stages: (1) the student answers every prompt 5 times, and the n answers that differ most by edit
distance are kept; prompts with fewer different ones are dropped; (2) the teacher scores the
answers, and prompts are dropped where no answer wins more than half of its questions; (3) training;
(4) evaluation. With `--rounds 2` the first three happen twice, each time with half of the answers
and of the steps, and the second time it is the newest student that answers. The teacher reads text,
so its tokenizer need not be the student's. Simplified: one GPU. The released code (EganGu/PAD,
commit 89f2a91, scripts/simpo_trainer.py) computes another divergence: docs/pad.md lists all
departures.

    # the toy task: lists such as "Name two fish."; a CPU, less than a minute
    python pad.py

    # models and data of the hub, on one GPU of 80 GB
    python pad.py --student google/gemma-2-2b-it \
        --teacher google/gemma-2-9b-it \
        --data trl-lib/ultrafeedback-prompt --max_rows 0 --judge_criteria \
        --eval_data trl-lib/ultrafeedback-prompt \
        --reward Skywork/Skywork-Reward-V2-Llama-3.2-1B \
        --beta 10 --alpha 0 --learning_rate 8e-7 --num_epochs 1 \
        --batch_size 128 --micro_batch_size 2 --gradient_checkpointing \
        --sample_batch_size 64 --max_prompt_tokens 1024 \
        --max_response_tokens 1024

    # prompts of your own, without a reward
    python pad.py --data my.jsonl --eval_data my_test.jsonl --reward none
    # a run that was interrupted
    python pad.py --resume runs/<folder>

Read part 2 of common.py for `pack` and `per_token`. `pack` lists the response tokens alone, each
with the position before it, which predicts it. So no prompt token reaches a loss, and the shift is
done. Frozen models run without gradient. What is sampled or scored goes through `cached_map` (part
4), which calls function(rows, seed) and returns the rows with the results. Shapes: B examples,
which are prompts with their n answers of one round (n = num_answers / rounds), R = B·n responses, N
response tokens, V vocabulary, H hidden size.
"""

import itertools
import math
import time
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
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
    print_fact,
    print_models,
    print_plan,
    print_rewards,
    print_samples,
    print_start,
    prompt_text,
    read_rows,
    reward_metrics,
    row_number,
    row_numbers,
    save_checkpoint,
    save_model,
    save_summary,
    step_examples,
    stop,
    token_logps,
)

# isort: split
# common comes first: with it Ctrl-C ends in one line, also while the slow imports run.
import torch
from transformers import get_cosine_schedule_with_warmup


# -------------------------------------------------------------------------------------- mathematics
def edit_distance(a, b) -> int:
    """The fewest insertions, deletions and replacements that turn one sequence into the other
    (Levenshtein). Example: "kitten" and "sitting" have distance 3."""
    previous = list(range(len(b) + 1))  # from nothing to the first j items of b
    for i, a_item in enumerate(a, 1):
        current = [i]
        for j, b_item in enumerate(b, 1):
            replaced = previous[j - 1] + (a_item != b_item)
            deleted = previous[j] + 1
            inserted = current[j - 1] + 1
            current.append(min(replaced, deleted, inserted))
        previous = current
    return previous[-1]


def select_diverse(sequences: list, n: int) -> list:
    """n of the sequences, or all if there are fewer: the first one, then always the one that is
    farthest from its nearest selected sequence."""
    selected = sequences[:1]
    while len(selected) < min(n, len(sequences)):
        nearest = []
        for sequence in sequences:
            nearest.append(min(edit_distance(sequence, other) for other in selected))
        selected.append(sequences[nearest.index(max(nearest))])
    return selected


def mcq_scores(
    p_a: torch.Tensor, p_b: torch.Tensor, pairs: list[tuple[int, int]], n: int
) -> torch.Tensor:
    """[B, n]: s_mcq(i) = log( (1e-8 + Σ_{pairs∋i} p(i)) / (n − 1) ), from p(A) and p(B) [B, pairs].

    `pairs` says which answers were A and B. If two answers were asked about in both orders, p(i) is
    the mean of the two.

    Example: the pairs (0, 1), (0, 2), (1, 2) with p(A) = (.6, .9, .5) and p(B) = (.3, .1, .4) give
    log (.75, .4, .25). Answer 0 has (.6 + .9) / 2.
    """
    a, b = torch.tensor(pairs, device=p_a.device).T  # [pairs] each
    sums = p_a.new_zeros(len(p_a), n)
    sums = sums.index_add(1, a, p_a).index_add(1, b, p_b)
    # The factor is 1, or ½ if every two answers were asked about in both orders.
    sums = sums * math.comb(n, 2) / len(pairs)
    return ((1e-8 + sums) / (n - 1)).log()


def teacher_scores(logps: torch.Tensor, s_mcq: torch.Tensor, alpha: float) -> torch.Tensor:
    """[B, n]: α (1/|y|) Σ_t log π_T(y_t|s_t) + (1 − α) s_mcq, from average log-probs and s_mcq."""
    return alpha * logps + (1 - alpha) * s_mcq


def ranking_logps(scores: torch.Tensor) -> torch.Tensor:
    """[B, n!]: log P(τ) = Σ_k [ s_τ(k) − log Σ_{j≥k} exp(s_τ(j)) ] of all rankings, from scores
    [B, n], which are multiplied with β already. The first ranking is the order in which they stand.

    Example: the scores (log 3, 0) give log (3/4, 1/4).
    """
    rankings = list(itertools.permutations(range(scores.shape[1])))
    ranked = scores[:, rankings]  # [B, n!, n]
    log_sums = ranked.flip(-1).logcumsumexp(-1).flip(-1)  # [B, n!, n], over the answers j ≥ k
    return (ranked - log_sums).sum(-1)


def ppd(s_student: torch.Tensor, s_teacher: torch.Tensor) -> torch.Tensor:
    """[B]: JSD of the distributions over rankings that two sets of scores [B, n] define. It lies
    between 0 and log 2.

    Example: (log 3, 0) and (0, 0), so P = (3/4, 1/4), (1/2, 1/2) and M = (5/8, 3/8), give 0.0338.
    """
    student_logps = ranking_logps(s_student)  # [B, n!]
    teacher_logps = ranking_logps(s_teacher)  # [B, n!]
    mixture_logps = torch.logaddexp(student_logps, teacher_logps) - math.log(2)
    student_summands = student_logps.exp() * (student_logps - mixture_logps)
    teacher_summands = teacher_logps.exp() * (teacher_logps - mixture_logps)
    return (student_summands + teacher_summands).sum(-1) / 2


def vpd(s_student: torch.Tensor, s_teacher: torch.Tensor) -> torch.Tensor:
    """[B]: −log P_student(τ*), where τ* is the descending order of the teacher's scores, from
    [B, n] twice. Example: (log 3, 0) and (0, 1) give −log 1/4."""
    best_first = s_teacher.argsort(-1, descending=True)  # [B, n]
    return -ranking_logps(s_student.gather(-1, best_first))[:, 0]


# -------------------------------------------------------------------------------------------- flags
@dataclass
class Method:
    loss: Literal["ppd", "vpd"] = "ppd"
    """ppd: distance of the distributions over rankings; vpd: the teacher's ranking alone (paper:
    both; ppd is the main one)"""
    beta: float = 2.0
    """β, sharpness of both distributions over rankings (tuned for the toy task; released
    gemma-2-2b-it-pd.yaml: 10)"""
    alpha: float = 0.9
    """α, weight of the average log-prob in the teacher's score; 1 drops the filter (tuned for the
    toy task; released gemma-2-2b-it-pd.yaml: 0)"""
    num_answers: int = 4
    """answers to learn from per prompt, in all rounds together (released pipeline_n4_gemma.sh:
    4)"""
    rounds: int = 1
    """how often the newest student answers, with an equal share of --num_answers and of the steps
    each time (paper, section 4.4)"""
    num_samples: int = 5
    """answers sampled per prompt in a round, of which the most different are kept (released
    sampling.sh: 5)"""
    sample_temperature: float = 1.0
    """temperature of the student's answers (released sampling.sh: 1, from a nucleus of 0.95;
    paper: high)"""
    swap_order: bool = False
    """ask about two answers in both orders, against the judge's position bias (ours; released
    prob.py: one order)"""
    judge_criteria: bool = False
    """tell the judge what makes an answer better, and when to say None (released mcq-template.json:
    yes; the toy task's judge does not know such a text)"""
    scores: str = ""
    """scores_1.jsonl of another run or program, in place of --data and of stages 1 and 2 of the
    first round (columns: docs/pad.md)"""
    max_rows: int = 1400
    """prompts come from the first so many rows of --data (fits the toy task); 0 takes all"""


@dataclass
class Optimisation:
    learning_rate: float = 3e-3
    """learning rate of AdamW (tuned for the toy task; released gemma-2-2b-it-pd.yaml: 8e-7)"""
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
def pad_terms(
    examples: list[Example], student: LM, vocab_size: int, args: Args
) -> dict[str, torch.Tensor]:
    """The one term of L, [B]: how far the student's ranking is from the teacher's. It should fall.

    An example's responses are its n answers. Its row is a line of scores_<round>.jsonl, with what
    the teacher said of them (`judge_answers`).
    """
    # (1/|y|) Σ_t log π_θ(y_t|s_t)
    logps = average_logps(examples, student, vocab_size=vocab_size, chunk_size=args.logits_chunk)
    s_student = logps.view(len(examples), -1)  # [B, n]
    # α (1/|y|) Σ_t log π_T(y_t|s_t) + (1 − α) s_mcq
    s_teacher = scores_of_rows([example.row for example in examples], args.alpha)  # [B, n]
    s_teacher = s_teacher.to(s_student)

    # Both functions are looked up by name: studies/released.py puts another one in ppd's place.
    if args.loss == "ppd":
        divergence = ppd(args.beta * s_student, args.beta * s_teacher)
    elif args.loss == "vpd":
        divergence = vpd(args.beta * s_student, args.beta * s_teacher)
    return {"ranking": divergence}


def average_logps(
    examples: list[Example], lm: LM, *, vocab_size: int, chunk_size: int
) -> torch.Tensor:
    """[R]: (1/|y|) Σ_t log p(y_t|s_t) of every response, with its end-of-sequence token."""
    batch = pack(examples, lm)
    logps = per_token(
        token_logps,
        batch.target_ids,
        [lm],
        [lm.hidden_states(batch)[batch.predict_index]],
        vocab_size=vocab_size,
        chunk_size=chunk_size,
    )
    # A token of probability 0 counts −10,000. With −∞ an α of 0 would make NaN of the score.
    return mean_per_response(logps.clamp(min=-1e4), batch)


def scores_of_rows(rows: list[dict], alpha: float) -> torch.Tensor:
    """[B, n]: the teacher's scores of the answers in rows of stage 2, from what it said of them."""
    logps = torch.tensor([row["average_logp"] for row in rows], dtype=torch.float64)
    if alpha == 1:
        return logps
    judgement = torch.tensor([row["judgement"] for row in rows], dtype=torch.float64)
    return teacher_scores(logps, judgement.log(), alpha)


# ---------------------------------------------------------------- stage 1: answers of the student
def sample_diverse(rows: list[dict], seed: int, student: LM, n: int, args: Args) -> list[dict]:
    """{"answers": [...]} for every row: of --num_samples answers to its prompt the n that differ
    most, or fewer where there are not so many."""
    samples = student.sample(
        [student.prompt_ids(row["prompt"]) for row in rows],
        n=args.num_samples,
        temperature=args.sample_temperature,
        max_new_tokens=args.max_response_tokens,
        batch_size=args.sample_batch_size,
        seed=seed,
    )
    results = []
    for answers in samples:
        # Answers of the same tokens count once. An empty answer that was cut off has no token to
        # score.
        by_tokens = {}
        for answer in answers:
            tokens = tuple(student.plain_ids(answer["text"]))
            if tokens or answer["finished"]:
                by_tokens[tokens] = answer
        selected = select_diverse(list(by_tokens), n)
        results.append({"answers": [by_tokens[tokens] for tokens in selected]})
    return results


# ------------------------------------------------------------------ stage 2: what the teacher says
# The playground's teacher was trained on exactly this text. If it changes, the teacher must be
# built again (playground/build.py).
JUDGE_PROMPT = (
    "Request: {prompt}\nAnswer A: {a}\nAnswer B: {b}\n"
    "Which answer is better? Reply with A, B or None."
)
# What --judge_criteria puts in front of it, for a judge that follows instructions.
JUDGE_CRITERIA = (
    "Compare two answers to a request by five questions. Is the answer relevant to the request? Is "
    "what it says accurate? Is it complete? Is it coherent? Is it clear? The answer that does "
    "better in all of this together is better. Reply None if neither does well, or if they are so "
    "alike that none is better.\n\n"
)


def judge_answers(rows: list[dict], teacher: LM, args: Args) -> list[dict]:
    """The answers of every row, and what the teacher says of them: lists of numbers.

    "average_logp", "judgement", which is exp(s_mcq), and "score" have a number for every answer,
    "p_a" and "p_b" for every question. With α = 1 nothing is asked, and there are "average_logp"
    and "score" alone.
    """
    n = len(rows[0]["answers"])
    examples = []
    for row in rows:
        examples.append(Example(row, *teacher.encode(row["prompt"], row["answers"])))
    logps = average_logps(
        examples, teacher, vocab_size=teacher.vocab_size, chunk_size=args.logits_chunk
    )
    logps = logps.view(-1, n)  # [B, n]

    numbers = {"average_logp": logps}
    if args.alpha < 1:
        pairs = question_pairs(n, args.swap_order)
        p_a, p_b = ask_teacher(rows, pairs, teacher, args)  # [B, pairs] each
        judgement = mcq_scores(p_a, p_b, pairs, n).exp()  # [B, n]
        numbers |= {"judgement": judgement, "p_a": p_a, "p_b": p_b}

    results = []
    for i, row in enumerate(rows):
        result = {"answers": row["answers"]}
        for name, values in numbers.items():
            result[name] = values[i].tolist()
        results.append(with_score(result, args.alpha))
    return results


def question_pairs(n: int, swap_order: bool) -> list[tuple[int, int]]:
    """Which answers are A and B in each question: every two of n, in one order or in both."""
    if swap_order:
        return list(itertools.permutations(range(n), 2))
    return list(itertools.combinations(range(n), 2))


def judge_question(row: dict, a: int, b: int, args: Args) -> list[dict]:
    """The chat that asks which of two answers of a row is better."""
    question = JUDGE_PROMPT.format(
        prompt=prompt_text(row["prompt"]),
        a=row["answers"][a]["text"],
        b=row["answers"][b]["text"],
    )
    if args.judge_criteria:
        question = JUDGE_CRITERIA + question
    return [{"role": "user", "content": question}]


def check_length_of_questions(prompts: list[Example], teacher: LM, args: Args):
    """Ends the program before any work if the teacher has too few positions for a question about
    the longest prompt with two answers of --max_response_tokens."""
    longest = max(prompts, key=lambda example: len(example.prompt_ids))
    question = judge_question({**longest.row, "answers": [{"text": ""}, {"text": ""}]}, 0, 1, args)
    teacher.check_limits(0, len(teacher.prompt_ids(question)) + 2 * args.max_response_tokens)


def ask_teacher(
    rows: list[dict], pairs: list[tuple[int, int]], teacher: LM, args: Args
) -> tuple[torch.Tensor, torch.Tensor]:
    """p(A) and p(B), [B, pairs] each: how likely it is that the teacher's reply begins with a token
    that reads A or B. They are not normalised, so a reply of "None" lowers both."""
    questions = []
    for row in rows:
        for a, b in pairs:
            ids = teacher.prompt_ids(judge_question(row, a, b, args))
            # `pack` wants a response, so the question's last token is one. At its position
            # (`last_index`) the model predicts the first token of its reply.
            questions.append(Example({}, ids[:-1], [ids[-1:]]))
    batch = pack(questions, teacher)
    hidden = teacher.hidden_states(batch)[batch.last_index]  # [B·pairs, H]
    probs = teacher.logits(hidden, teacher.vocab_size).softmax(-1)  # [B·pairs, V]
    a_tokens, b_tokens = tokens_that_read("AB", teacher)
    p_a = probs[:, a_tokens].sum(-1).view(len(rows), -1)
    p_b = probs[:, b_tokens].sum(-1).view(len(rows), -1)
    return p_a, p_b


# The vocabulary is decoded once, when the first question is asked.
@cache
def tokens_that_read(letters: str, teacher: LM) -> list[list[int]]:
    """For every letter all tokens that are this letter once spaces are stripped."""
    texts = teacher.tokenizer.batch_decode([[token] for token in range(teacher.vocab_size)])
    tokens = {letter: [] for letter in letters}
    for token, text in enumerate(texts):
        if text.strip() in tokens:
            tokens[text.strip()].append(token)
    return list(tokens.values())


def with_score(row: dict, alpha: float) -> dict:
    """The row with the "score" of every answer. It is for readers of the file: training computes it
    from the other columns."""
    return {**row, "score": scores_of_rows([row], alpha)[0].tolist()}


def given_scores(rows: list[dict], args: Args) -> list[dict]:
    """What `judge_answers` would return, from rows of --scores."""
    results = []
    for row in rows:
        try:
            result = read_scores(row, args.alpha)
        except ValueError as error:
            stop(f"--scores {args.scores}, row {row_number(row)}: {error}; found {str(row)[:300]}")
        results.append(with_score(result, args.alpha))
    return results


def read_scores(row: dict, alpha: float) -> dict:
    """The answers of a row and the numbers about them, of which α = 1 needs "average_logp" alone.
    ValueError if they cannot be used."""
    for answer in row["answers"]:
        is_sample = isinstance(answer, dict) and {"text", "finished"} <= answer.keys()
        if not is_sample and not isinstance(answer, str):
            raise ValueError('an answer must be a text, or {"text": ..., "finished": ...}')
    result = {"answers": row["answers"]}
    columns = ["average_logp"]
    if alpha < 1:
        columns += ["judgement", "p_a", "p_b"]
    for column in columns:
        numbers = row.get(column)
        if not isinstance(numbers, list) or not all(map(is_number, numbers)):
            raise ValueError(f"a column {column} is needed, a list of numbers")
        if column in ("average_logp", "judgement") and len(numbers) != len(row["answers"]):
            raise ValueError(f"the column {column} must have a number for every answer")
        result[column] = numbers
    if min(result.get("judgement", [1])) <= 0:
        raise ValueError("the column judgement is exp(s_mcq), so it must be above 0")
    return result


def is_number(value) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


# ------------------------------------------------------------------------ both stages, for a round
def make_round(
    number: int,
    rows: list[dict],
    *,
    student: LM,
    teacher: LM,
    args: Args,
    run_dir: Path,
    encoded: dict | None = None,
) -> tuple[list[Example], dict[str, float]]:
    """Stages 1 and 2 of round 1, 2, ...: the examples to train on, and metrics about the judge.

    The rows are prompts. Each round has files of its own: samples_1.jsonl and scores_1.jsonl,
    samples_2.jsonl and scores_2.jsonl, ... `encoded` has the prompts' token ids (`encode_rows`).
    """
    n = args.num_answers // args.rounds
    if args.scores and number == 1:
        # The rows came with answers, and with what the teacher of another run said of them.
        answered = rows
        add_scores = partial(given_scores, args=args)
    else:
        # `cached_map` adds the index of a batch's first row to the seed. So evaluations use the
        # seeds from args.seed on, round 1 those from args.seed + len(rows) on, and so forth.
        answered = cached_map(
            run_dir / f"samples_{number}.jsonl",
            rows,
            partial(sample_diverse, student=student, n=n, args=args),
            args.sample_batch_size,
            args.seed + number * len(rows),
        )
        add_scores = partial(judge_answers, teacher=teacher, args=args)
    sampled = answered
    answered = [row for row in sampled if len(row.get("answers") or []) == n]
    if not answered:
        stop(why_no_prompt_has_answers(sampled, n, args))
    # n answers are in n (n − 1) / 2 questions, which repeat the prompt. With an n-th of the prompts
    # a batch of the teacher is about as large as a micro-batch of training.
    scored = cached_map(
        run_dir / f"scores_{number}.jsonl",
        answered,
        add_scores,
        max(1, args.micro_batch_size // n),
    )
    kept = [row for row in scored if passes_filter(row, args.alpha)]

    charts = {}
    if args.alpha < 1:
        charts = judge_charts(scored)
    charts["charts/judge_kept"] = len(kept) / len(rows)
    different = f"{len(scored)} of {len(rows)} prompts have {n} different answers"
    print_fact(f"round {number}", f"{different}; {len(kept)} kept")
    print_fact("judge", what_the_judge_says(charts))
    if not kept:
        stop(why_the_filter_keeps_nothing(scored, teacher, args))
    # `encode_rows` reads columns of a row, so every answer gets one. It drops rows with an answer
    # that is too long.
    columns = [f"answer {i}" for i in range(n)]
    kept = [{**row, **dict(zip(columns, row["answers"]))} for row in kept]
    examples = encode_rows(student, kept, columns, args, f"examples, round {number}", encoded)
    return examples, charts


def why_no_prompt_has_answers(rows: list[dict], n: int, args: Args) -> str:
    """What to say where no prompt has n different answers."""
    counts = [len(row.get("answers") or []) for row in rows]
    first = rows[0].get("answers") or ["nothing"]
    text = first[0] if isinstance(first[0], str) else first[0]["text"]
    advice = "a higher --sample_temperature, more --num_samples or fewer --num_answers"
    if args.scores:
        advice = "another --scores, or --num_answers as it was for that file"
    return (
        f"no prompt is left: none of {len(rows)} has {n} different answers (the most are "
        f"{max(counts)}); to {short(prompt_text(rows[0]['prompt']))} there is {short(text)}; "
        f"take {advice}"
    )


def why_the_filter_keeps_nothing(rows: list[dict], teacher: LM, args: Args) -> str:
    """What to say where the judge lets no answer win: the mass on A and B, and what it replies."""
    said = ""
    scores = f"--scores {args.scores}"
    if not args.scores:
        chat = judge_question(rows[0], 0, 1, args)
        [[reply]] = teacher.sample(
            [teacher.prompt_ids(chat)],
            temperature=0.0,
            max_new_tokens=16,
            batch_size=1,
            seed=args.seed,
        )
        said = f"; asked for A, B or None it replies {short(reply['text'])}"
        scores = f"--scores {args.output_dir}/scores_1.jsonl"
    return (
        f"no prompt is left: in none of {len(rows)} does an answer win more than half of its "
        f"questions and another one not; {what_the_judge_says(judge_charts(rows))}{said}; take a "
        f"larger --teacher, or --alpha 1, which asks no judge and goes on with {scores} (and where "
        "one letter has almost all, --swap_order)"
    )


def what_the_judge_says(charts: dict[str, float]) -> str:
    """What `judge_charts` measured, in words."""
    if "charts/judge_mass" not in charts:
        return "not asked"
    mass = charts["charts/judge_mass"]
    if math.isnan(mass):
        return "its p(A) and p(B) are not known"
    share_of_a = charts["charts/judge_p_a"] / max(mass, 1e-9)
    return f"p(A) + p(B) is {mass:.2f} on average, of which A has {share_of_a:.0%}"


def short(text: str) -> str:
    """A text as it stands in an error: in quotation marks and not longer than a line."""
    return repr(text if len(text) <= 60 else text[:60] + "…")


def passes_filter(row: dict, alpha: float) -> bool:
    """Whether a prompt is learned from: some answer wins more than half of its questions, so that
    exp(s_mcq) is above ½, and some answer does not. With α = 1, where no judgement enters the
    score, every prompt is.

    Of the judge's own answers the second half is always true, because p(A) + p(B) is at most 1. It
    is the paper's rule, and matters for --scores of other programs.
    """
    if alpha == 1:
        return True
    return min(row["judgement"]) <= 0.5 < max(row["judgement"])


def judge_charts(rows: list[dict]) -> dict[str, float]:
    """The means of p(A) + p(B) and of p(A) over all questions, NaN if there is none."""
    p_a = []
    p_b = []
    for row in rows:
        p_a += row["p_a"]
        p_b += row["p_b"]
    mean_p_a = torch.tensor(p_a).mean().item()
    mean_p_b = torch.tensor(p_b).mean().item()
    mass = mean_p_a + mean_p_b
    return {"charts/judge_mass": round(mass, 4), "charts/judge_p_a": round(mean_p_a, 4)}


def check_answers(args: Args):
    """Ends the program if the flags ask for answers that cannot be sampled, scored or ranked."""
    n = args.num_answers // max(1, args.rounds)
    per_round = f"--num_answers {args.num_answers} / --rounds {args.rounds}"
    if n * args.rounds != args.num_answers:
        stop(f"{per_round} must be a whole number")
    if not 2 <= n <= 6:
        stop(f"{per_round} must be 2 to 6, because n answers have n! rankings")
    if args.num_samples < n:
        stop(f"--num_samples {args.num_samples} must be at least {n}, the answers of a round")
    if args.alpha > 1:
        stop(f"--alpha {args.alpha} must be at most 1")


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
    flags = ["beta", "alpha", "num_answers", "rounds", "num_samples", "sample_temperature"]
    check_flags(args, at_least_0=[*flags, "max_rows"])
    check_answers(args)

    # ------------------------------------------------------------------------------ models and data
    device = choose_device(args.device)
    print_start(run_dir, device, data=args.scores or args.data, eval_data=args.eval_data)
    source = args.scores or args.data
    train_rows = read_rows(source, args.data_split, columns=(), config=args.data_config)
    if args.max_rows:
        train_rows = train_rows[: args.max_rows]
    eval_rows = read_rows(args.eval_data, args.eval_split, columns=(), config=args.eval_config)
    check_own_data(args, train_rows, eval_rows)
    reward_fn = load_reward_function(
        args.reward, device, args.trust_remote_code, label=args.reward_label, rows=eval_rows
    )
    student, teacher = load_models(args, device)
    print_models(student=student, teacher=teacher)
    encoded = {}  # token ids of prompts, so that none is encoded twice
    prompts = encode_rows(student, train_rows, [], args, "training prompts", encoded)
    held_out = encode_rows(student, eval_rows, [], args, "held-out prompts")
    train_rows = [example.row for example in prompts]
    eval_rows = [example.row for example in held_out[: args.eval_prompts]]
    source = "scores" if args.scores else "data"
    if args.alpha < 1:
        check_length_of_questions(prompts, teacher, args)
    print_plan(args, prompts, len(eval_rows))
    begin_run(run_dir, args, [student, teacher], **{source: prompts}, eval_data=held_out)

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

    # ------------------------------------------------- stages 1 and 2: answers and their scores
    new_round = partial(
        make_round,
        rows=train_rows,
        student=student,
        teacher=teacher,
        args=args,
        run_dir=run_dir,
        encoded=encoded,
    )
    round_number = 1
    examples, judge_values = new_round(round_number)

    # ------------------------------------------------------------------------------------ optimiser
    # One schedule spans all rounds. Its epochs are passes over the prompts of the first round.
    steps_per_epoch = math.ceil(len(examples) / args.batch_size)
    total_steps = args.max_steps or args.num_epochs * steps_per_epoch
    steps_per_round = math.ceil(total_steps / args.rounds)
    if (args.rounds - 1) * steps_per_round >= total_steps:
        stop(f"{total_steps} steps are too few for --rounds {args.rounds}")
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
        finished_rounds, step_of_round = divmod(step, steps_per_round)
        if round_number != finished_rounds + 1:
            # A later round begins, or a run is resumed in it. The student that answers now is saved
            # first: a run that is killed while it answers must go on with the same student. What
            # was sampled and scored before the kill is read from the files of the round.
            save_checkpoint(run_dir / "checkpoint.pt", step, counts, **state)
            round_number = finished_rounds + 1
            examples, judge_values = new_round(round_number)

        step_started = time.time()
        step_batch = step_examples(examples, step_of_round, args.batch_size, args.seed)
        losses = {"total": 0.0}
        for start in range(0, len(step_batch), args.micro_batch_size):
            micro_batch = step_batch[start : start + args.micro_batch_size]
            terms = pad_terms(micro_batch, student, student.vocab_size, args)
            # Divided by the examples of the whole step, so that the micro-batch size changes
            # memory and nothing else.
            loss = terms["ranking"].sum() / len(step_batch)
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
            values.update(judge_values)
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
