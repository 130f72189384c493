r"""RM-Distiller: a reward model distilled from a generative teacher (Zhou et al., IJCAI-ECAI 2026,
arXiv 2601.14032).

A teacher that only says which of two answers is better wastes most of what it knows. Here it gives
three things. It edits the worse answer y_l to a better one, y_w*, so that the two differ in what
matters and in nothing else. It scores both from 1 to 10, and the points m that the edit gains are
a margin for the rewards. Its own answer y_T keeps the backbone a language model. The reward r is a
linear head on the hidden state of an answer's last token. With s_t = (x, y_T,<t),

    L = ( r(x, y_w*) − r(x, y_l) − c m )²
        + κ (1/|y_T|) Σ_t KL( π_T(·|s_t) ‖ π_θ(·|s_t) )
        − ν (1/|y_T|) Σ_t log π_θ(y_T,t|s_t).

y_l is the one of the data's two answers that the teacher scores lower, whatever the data says. It
is edited with y_T as the model of a good answer. In the files the symbols are columns:

    y_l  rejected    y_w  chosen    y_w*  refined    y_T  teacher    m  margin

`--no-refine` takes the better answer y_w as it is for y_w*, and m is what y_w has over y_l.
`--no-margin` takes Bradley-Terry, −log σ( r(x, y_w*) − r(x, y_l) ), for the first line.

Stages: the teacher (1) answers every prompt, (2) scores the two answers of the data, (3) edits the
worse one, (4) scores the edit; (5) training; (6) evaluation, which is how often r orders held-out
pairs right. What r is good for besides: studies/best_of_n.py picks the best of n answers with it,
studies/rloo.py trains with it. Simplified: one GPU, and with κ > 0 the teacher runs in every step.
The released code (Joe-Hall-Lee/RM-Distiller, commit 0436fb0) pulls every margin to the mean of its
forward pass in one of its two trainers, distilrm_reward_trainer.py: docs/rm_distiller.md lists all
departures.

    # the toy task: lists such as "Name two fish."; a CPU, about two minutes
    python rm_distiller.py

    # models and data of the hub, on one GPU of 141 GB
    python rm_distiller.py --student Qwen/Qwen2.5-3B-Instruct \
        --teacher Qwen/Qwen2.5-14B-Instruct \
        --data argilla/dpo-mix-7k --eval_data argilla/dpo-mix-7k \
        --score_criteria \
        --learning_rate 1e-5 --micro_batch_size 2 --gradient_checkpointing \
        --sample_batch_size 64 --max_prompt_tokens 1024 \
        --max_response_tokens 1024 --max_edit_tokens 2048

    # pairs of your own
    python rm_distiller.py --data my.jsonl --eval_data my_test.jsonl
    # a run that was interrupted
    python rm_distiller.py --resume runs/<folder>

Read part 2 of common.py for `pack` and `per_token`. `pack` lists the response tokens alone, each
with the position before it, which predicts it. So no prompt token reaches a loss, and the shift is
done. Frozen models run without gradient. What is sampled or scored goes through `cached_map` (part
4), which calls function(rows, seed) and returns the rows with the results. Shapes: B examples, R
responses, N response tokens, H hidden size, V vocabulary.
"""

import json
import math
import re
import statistics
import string
import time
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
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
    encode_rows,
    exit_in_one_line,
    load_checkpoint,
    mean_per_response,
    one_line,
    open_run,
    pack,
    parse_flags,
    per_token,
    print_end,
    print_models,
    print_plan,
    print_start,
    prompt_text,
    read_rows,
    row_number,
    row_numbers,
    save_checkpoint,
    save_model,
    save_summary,
    shared_vocab_size,
    standard_error,
    step_examples,
    stop,
    token_logps,
    weighted,
)

# isort: split
# common comes first: with it Ctrl-C ends in one line, also while the slow imports run.
import torch
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    get_cosine_schedule_with_warmup,
)

# ------------------------------------------------------------------- what the teacher is asked
# The playground's teacher was trained on exactly these texts (playground/build.py). If one of them
# changes, it must be built again.
SCORE_PROMPT = (
    "Request: {prompt}\n"
    "Answer A: {a}\n"
    "Answer B: {b}\n"
    "Score each answer from 1 to 10. Reply as A: score, B: score"
)
REFINE_PROMPT = (
    "Request: {prompt}\n"
    "Better answer: {better}\n"
    "Worse answer: {worse}\n"
    "Explain why the second answer is worse, then edit it as little as possible to make it good.\n"
    "Reply as Why: reason Edited: answer"
)
# It follows the reply to REFINE_PROMPT. The score that it names is that of the worse answer.
RESCORE_PROMPT = (
    "The worse answer was scored {score:.0f} out of 10. "
    "Score the edited answer on the same scale.\n"
    "Reply with the score."
)
# What --score_criteria puts in front of SCORE_PROMPT and of RESCORE_PROMPT, for a teacher that
# follows instructions.
SCORE_CRITERIA = (
    "A score says how helpful an answer is, how relevant to the request, how accurate, and whether "
    "it has as much detail as it should. 1 is the worst and 10 the best. It makes no difference "
    "which answer comes first. Give no reasons.\n\n"
)


# -------------------------------------------------------------------------------------- mathematics
def pair_loss(
    better: torch.Tensor, worse: torch.Tensor, margins: torch.Tensor | None = None
) -> torch.Tensor:
    """[B]: (r(x, y_w*) − r(x, y_l) − c m)², from the rewards [B] twice and the margins c m [B].

    Without margins it is Bradley-Terry, −log σ(r(x, y_w*) − r(x, y_l)).

    Example: rewards of 1.2 and 0.3 with a margin of 0.5 give (0.9 − 0.5)² = 0.16. Without a margin
    they give −log σ(0.9) = 0.341.
    """
    # Margins [B, 1] would broadcast to a table [B, B]. The mean of that, which is the loss of the
    # released distilrm_reward_trainer.py, pulls every pair to the mean margin of its batch.
    shapes = [tuple(better.shape), tuple(worse.shape)]
    if margins is not None:
        shapes.append(tuple(margins.shape))
    if better.dim() != 1 or len(set(shapes)) > 1:
        raise ValueError(f"rewards and margins must have one shape [B], not {shapes}")
    difference = better - worse
    if margins is None:
        return -torch.nn.functional.logsigmoid(difference)
    return (difference - margins).square()


def forward_kl(teacher_log_probs: torch.Tensor, student_log_probs: torch.Tensor) -> torch.Tensor:
    """[N]: KL(π_T(·|s) ‖ π_θ(·|s)) = Σ_a π_T(a|s) log [π_T(a|s) / π_θ(a|s)], from [N, V] twice.

    Example: π_T = (3/4, 1/4) and π_θ = (1/2, 1/2) give ¾ log 1.5 + ¼ log 0.5 = 0.131.
    """
    probs = teacher_log_probs.exp()
    summands = probs * (teacher_log_probs - student_log_probs)
    # p log p is 0 at p = 0. Computed, it is NaN.
    return summands.masked_fill(probs == 0, 0.0).sum(-1)


# ------------------------------------------------------------------ how the teacher's text is read
# White space in these regular expressions is ignored, and they have comments (re.VERBOSE).
#
# What is scored, as replies name it. A small letter is a name only before a colon or an equals
# sign, since "a" is a word.
ANSWER_A = r"A | a(?=\s*[:=])"  # "A: 8", "Answer A is a 9", "a: 8"
ANSWER_B = r"B | b(?=\s*[:=])"  # "B = 6", "b: 6"
THE_EDIT = r"(?i: scored? | rating)"  # "Score: 7", "I would score it 7", "Rating: 7"

# A score as replies write it. A number that may mean something else is not read.
NUMBER = r"""
    (?<! [A-Za-z\d.,/-] )        # not the 8 of "-8" or "v8", nor the 5 of "8/5" or "8.5"
    ( \d+ (?: [.,]\d+ )? )       # "8", "8.5" and "8,5"
    (?! [.,]?\d | [A-Za-z]       # not the 8 of "80" or "8th"
      | \s*% | \s*[-–/]\s*\d     # nor of "8 %", "8-9" or "8/5"
      | \s+ (?! and\b | points?\b ) [a-z]  # nor of "8 facts", but of "8 and" and "8 points"
    )
"""
# What may stand between a name and its score. *? takes the shortest match.
BETWEEN = r"""
    (?: [^\w.!?;]                # "A: **8**", "A (8)", '"A": 8'
      | \b (?: answer | is | gets? | scored? | scores | rated | rating | deserves ) \b
      | \b (?: as | at | of | it | a ) \b   # "answer B is a 4"
      | 得分 | 评分               # "score" and "rating" in Chinese
    )*?
"""
NEXT_NUMBER = r"(?: \s* (?: [,;&] | and ) \s* | \s+ )"  # "8, 6", "8 and 6", "8 6"
OUT_OF_TEN = r"\s* (?: / | out\ of ) \s* 10\b"  # "8/10", "8 out of 10"

# What follows "Edited:". The word has a capital letter: "it was poorly edited: …" is no edit.
EDIT = r"""
    \bE(?i:dited)\b [\w ]{0,20} [*_]*:[*_]* \s*  # "Edited:", "**EDITED:**", "Edited answer:"
    (?: ["“] ([^"“”]*) ["”]      # an answer in quotation marks: "cod."
      | (.*\S)                   # or all that follows: cod.
    ) \s* $
"""
# What a reasoning model thinks before it replies. It may be cut off, or begin in the prompt.
THOUGHTS = r"^ .* </think> \s* | <think> .*"


def read_scores(text: str, names: list[str]) -> list[float]:
    """The scores from 1 to 10 that a reply gives to names (regular expressions), one for each.

    The reply names them, as in "A: 8, B: 6/10", or gives nothing but scores in the order of the
    names, as in "8, 6". All are 0 if one is missing, out of range or contradicted: a wrong label
    does more harm than a row that is dropped.

    Example: "**A:** 8, **B:** 6/10" is [8.0, 6.0], and "A: 8-9, B: 6" is [0.0, 0.0].
    """
    unreadable = [0.0] * len(names)
    text = re.sub(OUT_OF_TEN, "", text, flags=re.VERBOSE)
    only_numbers = NEXT_NUMBER.join([NUMBER] * len(names))
    match = re.fullmatch(rf"[\W_]* {only_numbers} [\W_]*", text, re.VERBOSE)
    if match:
        numbers = list(match.groups())
    else:
        numbers = []
        for name in names:
            named = rf"(?<![A-Za-z0-9_]) (?:{name}) (?![A-Za-z0-9_]) {BETWEEN} {NUMBER}"
            found = set(re.findall(named, text, re.VERBOSE))
            if len(found) != 1:
                return unreadable
            numbers.append(found.pop())
    scores = [float(number.replace(",", ".")) for number in numbers]
    in_range = all(1 <= score <= 10 for score in scores)
    return scores if in_range else unreadable


def read_edit(reply: dict) -> str:
    """The edit in a reply {"text", "finished"}: what follows "Edited:", without quotation marks.

    It is "" where nothing follows, and in a reply that was cut off, which holds half an edit.
    """
    match = re.search(EDIT, reply["text"], re.VERBOSE | re.DOTALL)
    if match is None or not reply["finished"]:
        return ""
    in_quotation_marks, rest = match.groups()
    edit = rest if in_quotation_marks is None else in_quotation_marks
    return edit.strip()


def without_thoughts(text: str) -> str:
    """Example: "<think>Hm. A: 1?</think> A: 8, B: 6" becomes "A: 8, B: 6"."""
    return re.sub(THOUGHTS, "", text, flags=re.VERBOSE | re.DOTALL)


# -------------------------------------------------------------------------------------------- flags
@dataclass
class Method:
    annotations: str = ""
    """annotations.jsonl of another run or program, in place of stages 1 to 4 (its columns are in
    docs/rm_distiller.md)"""
    score: Literal["expected", "text"] = "expected"
    """expected: a score is its expectation over the ten that the teacher can give; text: it is what
    the teacher's reply says"""
    score_criteria: bool = False
    """tell the teacher what a score should depend on (released score_orig_vllm.py: yes; the toy
    task's teacher does not know such a text)"""
    sample_temperature: float = 1.0
    """temperature of the teacher's answers and edits (tuned for the toy task; released
    refine_response_vllm.py: 0.7, with top_p 0.8 and top_k 20)"""
    refine: bool = True
    """learn the edit y_w* over y_l; if not, the better answer y_w as it is"""
    max_edit_tokens: int = 256
    """tokens of the reply that holds diagnosis and edit, and what a reasoning teacher thinks before
    (enough for the toy task; elsewhere at least twice --max_response_tokens)"""
    margin: bool = True
    """regress on the margin; if not, maximise the Bradley-Terry likelihood"""
    margin_scale: float = 0.3
    """c, reward for a point of the teacher's scale (tuned for the toy task; released
    distilrm_reward_trainer.py: 1, with a learning rate to match)"""
    kl_coef: float = 0.1
    """κ, weight of the KL on the teacher's y_T (tuned for the toy task; released
    run_distilrm_reward_train.py: 1, its launcher train_distilrm.sh: 0)"""
    nll_coef: float = 0.0
    """ν, weight of the likelihood of the teacher's y_T, of use where two vocabularies forbid the KL
    (released run_distilrm_reward_train.py: 1, its launcher train_distilrm.sh: 0)"""


@dataclass
class Optimisation:
    learning_rate: float = 5e-3
    """learning rate of AdamW (tuned for the toy task; released train_distilrm.sh: 1e-5)"""
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
    eval_data: str = "playground/data/rm_test.jsonl"
    """held-out pairs; a column `subset` or `source` gives each of its values a line of its own"""
    eval_config: str = ""
    """config of --eval_data, where a hub id has several"""
    eval_split: str = "test"
    """split of --eval_data, or a part of one"""
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


def response_columns(args: Args) -> list[str]:
    """The columns of an example's responses: y_w* (or y_w), y_l and, if κ or ν asks for it, y_T."""
    better = "refined" if args.refine else "chosen"
    if args.kl_coef > 0 or args.nll_coef > 0:
        return [better, "rejected", "teacher"]
    return [better, "rejected"]


# --------------------------------------------------------------------------------------- terms of L
def response_rewards(student: LM, hidden: torch.Tensor, batch: Batch) -> torch.Tensor:
    """[R]: r(x, y) of every response, in float32, from hidden states [rows·T, H] of the batch."""
    last_hidden = hidden[batch.last_index]  # [R, H]
    return student.model.score(last_hidden.float()).squeeze(-1)


def rm_distiller_terms(
    examples: list[Example], student: LM, teacher: LM | None, vocab_size: int, args: Args
) -> dict[str, torch.Tensor]:
    """The terms of L before their weights, each [B]. All of them should fall.

    An example's responses are [y_w*, y_l, y_T], in the order of `response_columns`. Without y_T
    there is the term "pair" alone. With it there is always "nll", and "kl" if κ is above 0, which
    alone needs the teacher.
    """
    # The student reads all responses of an example in one row, so the prompt is computed once.
    batch = pack(examples, student)
    hidden = student.hidden_states(batch)  # [rows·T, H]

    # ( r(x, y_w*) − r(x, y_l) − c m )²
    rewards = response_rewards(student, hidden, batch).view(len(examples), -1)  # [B, 2 or 3]
    margins = None
    if args.margin:
        points = [example.row["margin"] for example in examples]
        margins = args.margin_scale * rewards.new_tensor(points)  # [B]
    terms = {"pair": pair_loss(rewards[:, 0], rewards[:, 1], margins)}
    if "teacher" not in response_columns(args):
        return terms

    answers = batch.only(2, of=3)  # the tokens of y_T
    student_hidden = hidden[answers.predict_index]  # [N, H]
    if args.kl_coef == 0:
        # −(1/|y_T|) Σ_t log π_θ(y_T,t|s_t)
        logps = per_token(
            token_logps,
            answers.target_ids,
            [student],
            [student_hidden],
            vocab_size=vocab_size,
            chunk_size=args.logits_chunk,
        )
        terms["nll"] = -mean_per_response(logps, answers)
        return terms

    # The teacher reads y_T alone, in rows of its own.
    only_answers = [Example(e.row, e.prompt_ids, e.response_ids[2:]) for e in examples]
    teacher_batch = pack(only_answers, teacher)
    teacher_hidden = teacher.hidden_states(teacher_batch)[teacher_batch.predict_index]  # [N, H]

    def score_tokens(target_ids, student_log_probs, teacher_log_probs):
        logps = token_logps(target_ids, student_log_probs)  # [N]
        kl = forward_kl(teacher_log_probs, student_log_probs)  # [N]
        return logps, kl

    logps, kl = per_token(
        score_tokens,
        answers.target_ids,
        [student, teacher],
        [student_hidden, teacher_hidden],
        vocab_size=vocab_size,
        chunk_size=args.logits_chunk,
    )
    # (1/|y_T|) Σ_t KL( π_T(·|s_t) ‖ π_θ(·|s_t) )
    terms["kl"] = mean_per_response(kl, answers)
    # −(1/|y_T|) Σ_t log π_θ(y_T,t|s_t)
    terms["nll"] = -mean_per_response(logps, answers)
    return terms


# ------------------------------------------------------------------------------------------- models
def load_models(args: Args, device: torch.device) -> tuple[LM, LM | None]:
    """The student with a reward head, and the teacher, or None if neither the annotation nor the KL
    needs it."""
    student = LM(
        args.student,
        device,
        trainable=True,
        gradient_checkpointing=args.gradient_checkpointing,
        trust_remote_code=args.trust_remote_code,
    )
    if type(student.model.config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        stop(f"{args.student} has no classifier in transformers, so no reward model can be saved")
    add_reward_head(student, args.seed)
    if args.annotations and args.kl_coef == 0:
        return student, None
    return student, LM(args.teacher, device, trust_remote_code=args.trust_remote_code)


def add_reward_head(student: LM, seed: int):
    """Gives the model the head r, linear and in float32. transformers' classifiers and
    `load_reward_model` in common.py call it `score`. It is saved with the model's checkpoints."""
    torch.manual_seed(seed)
    # It reads what the LM head reads, which in some OPTs is narrower than the hidden size.
    width = student.model.get_output_embeddings().weight.shape[1]
    student.model.score = torch.nn.Linear(
        width, 1, bias=False, device=student.device, dtype=torch.float32
    )


def save_reward_model(student: LM, folder: Path):
    """Writes the student as a sequence classifier with one label, which other programs read right.

    They render a chat as text, turn it into token ids, with or without the tokenizer's special
    tokens, and pad. transformers then reads the score at the last token that is not the padding
    token. So padding has a token of its own, nothing comes after the end-of-turn, and the template
    alone writes the begin-of-sequence token.
    """
    tokenizer = student.tokenizer
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id in student.eos_ids:
        tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
        rows = student.model.get_input_embeddings().weight.shape[0]
        if rows < len(tokenizer):
            student.model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    if tokenizer.chat_template:
        tokenizer.chat_template = classifier_template(student)
        if tokenizer.is_fast:
            tokenizer.backend_tokenizer.post_processor = None
        for name in ("add_bos_token", "add_eos_token"):
            tokenizer.init_kwargs[name] = False
    save_model(student, folder)

    classifier = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(student.model.config)]
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["architectures"] = [classifier.__name__]
    config["id2label"] = {0: "reward"}
    config["label2id"] = {"reward": 0}
    # The text-classification pipeline takes the sigmoid of one score, unless it is a regression.
    config["problem_type"] = "regression"
    config["pad_token_id"] = tokenizer.pad_token_id
    if "text_config" in config:
        config["text_config"]["pad_token_id"] = tokenizer.pad_token_id
    path.write_text(json.dumps(config, indent=2) + "\n")


# {% set %} captures what the model's own template renders. The plus signs keep white space.
CLASSIFIER_TEMPLATE = """\
{% set chat +%}$template{%+ endset %}
{% if $bos and not chat.startswith($bos) %}{{ $bos }}{% endif %}
{% if add_generation_prompt or messages[-1]["role"] != "assistant" %}
{{- chat -}}
{% else %}
{{- chat.removesuffix($turn_end) + $end -}}
{% endif %}"""


def classifier_template(student: LM) -> str:
    """The student's chat template, which writes nothing after the end of a last assistant turn.

    Templates in the style of ChatML write a line break there, and Phi-3's writes another token. The
    begin-of-sequence and end-of-turn tokens are written by the template where `LM.encode` adds them
    to what it renders.
    """
    decode = student.tokenizer.decode
    ends = [re.escape(decode([token])) for token in student.eos_ids]
    match = re.search("|".join(ends), student.turn_end)
    if match:
        end = student.turn_end[: match.end()]
    else:
        end = student.turn_end + decode(student.eos_ids[:1])
    return string.Template(CLASSIFIER_TEMPLATE).substitute(
        template=student.tokenizer.get_chat_template().removesuffix("\n"),
        bos=json.dumps(decode(student.bos_ids)),
        turn_end=json.dumps(student.turn_end),
        end=json.dumps(end),
    )


# ------------------------------------------------------------ stages 1 to 4: the teacher annotates
def user_turn(text: str) -> dict:
    return {"role": "user", "content": text}


def teacher_replies(
    chats: list[list[dict]],
    seed: int,
    teacher: LM,
    *,
    temperature: float,
    max_new_tokens: int,
    batch_size: int,
) -> list[dict]:
    """One reply of the teacher to every chat, as `LM.sample` returns it, without what it thought.
    A reply without its thoughts has no token ids."""
    samples = teacher.sample(
        [teacher.prompt_ids(chat) for chat in chats],
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        seed=seed,
    )
    replies = []
    for [reply] in samples:
        text = without_thoughts(reply["text"])
        if text != reply["text"]:
            reply = {"text": text, "finished": reply["finished"]}
        replies.append(reply)
    return replies


def expected_scores(
    chats: list[list[dict]], reply: str, teacher: LM, *, reply_ends: bool, logits_chunk: int
) -> list[float]:
    """Σ_s s p(s) for every chat, s = 1 to 10.

    There are ten replies, such as "A: 1," to "A: 10,". p(s) is the probability of the one with s,
    scaled so that the ten add up to 1. With `reply_ends` each of them includes its end.
    """
    replies = [{"text": reply.format(score), "finished": reply_ends} for score in range(1, 11)]
    batch = pack([Example({}, *teacher.encode(chat, replies)) for chat in chats], teacher)
    hidden = teacher.hidden_states(batch)[batch.predict_index]  # [N, H]
    logps = per_token(
        token_logps,
        batch.target_ids,
        [teacher],
        [hidden],
        vocab_size=teacher.vocab_size,
        chunk_size=logits_chunk,
    )
    # The mean over a reply's tokens times their number is the sum.
    reply_logps = mean_per_response(logps, batch) * batch.lengths  # [R]
    probs = reply_logps.view(-1, 10).softmax(-1)  # [B, 10]
    scores = torch.arange(1.0, 11.0, device=probs.device)  # [10]
    return (probs @ scores).tolist()


def score_replies(chats: list[list[dict]], teacher: LM, args: Args) -> list[str]:
    """The teacher's greedy reply to every chat that asks for a score."""
    replies = teacher_replies(
        chats,
        args.seed,
        teacher,
        temperature=0.0,
        max_new_tokens=args.max_response_tokens,
        batch_size=args.sample_batch_size,
    )
    return [reply["text"] for reply in replies]


def answer_prompts(rows: list[dict], seed: int, teacher: LM, args: Args) -> list[dict]:
    """Stage 1. The teacher's own answer y_T to every prompt, as "teacher", and its text alone as
    "teacher_reply"."""
    chats = [row["prompt"] for row in rows]
    replies = teacher_replies(
        chats,
        seed,
        teacher,
        temperature=args.sample_temperature,
        max_new_tokens=args.max_response_tokens,
        batch_size=args.sample_batch_size,
    )
    return [{"teacher": reply, "teacher_reply": reply["text"]} for reply in replies]


def score_as_answer_a(
    rows: list[dict], scored: str, other: str, teacher: LM, args: Args
) -> list[dict]:
    """Stage 2. The teacher's score of the answer in the column `scored`, as "score_<scored>".

    It is shown as answer A, beside the one in the column `other`. With --score text, 0 is a reply
    that could not be read, and the reply is kept as "score_<scored>_reply".
    """
    chats = []
    for row in rows:
        question = SCORE_PROMPT.format(
            prompt=prompt_text(row["prompt"]), a=row[scored], b=row[other]
        )
        chats.append([score_turn(question, args)])

    column = f"score_{scored}"
    if args.score == "text":
        texts = score_replies(chats, teacher, args)
        scores = [read_scores(text, [ANSWER_A, ANSWER_B])[0] for text in texts]
        return [{column: score, f"{column}_reply": text} for score, text in zip(scores, texts)]
    # The comma ends the number: without it "A: 1" would be the beginning of "A: 10" as well.
    scores = expected_scores(
        chats, "A: {},", teacher, reply_ends=False, logits_chunk=args.logits_chunk
    )
    return [{column: score} for score in scores]


def score_turn(question: str, args: Args) -> dict:
    """The turn that asks for scores. With --score_criteria it says first what they depend on."""
    if args.score_criteria:
        question = SCORE_CRITERIA + question
    return user_turn(question)


def refine_question(row: dict) -> dict:
    """The turn that asks the teacher to edit y_l. The better answer that it is shown is y_T."""
    question = REFINE_PROMPT.format(
        prompt=prompt_text(row["prompt"]), better=row["teacher"]["text"], worse=row["rejected"]
    )
    return user_turn(question)


def edit_worse_answers(rows: list[dict], seed: int, teacher: LM, args: Args) -> list[dict]:
    """Stage 3. The teacher's edit y_w* of y_l, as "refined", from a reply that says why.

    It is "" if the reply could not be read. The whole reply is kept as "refined_reply", and whether
    it ended within --max_edit_tokens as "refined_finished".
    """
    replies = teacher_replies(
        [[refine_question(row)] for row in rows],
        seed,
        teacher,
        temperature=args.sample_temperature,
        max_new_tokens=args.max_edit_tokens,
        batch_size=args.sample_batch_size,
    )
    results = []
    for reply in replies:
        result = {
            "refined": read_edit(reply),
            "refined_reply": reply["text"],
            "refined_finished": reply["finished"],
        }
        results.append(result)
    return results


def score_edits(rows: list[dict], teacher: LM, args: Args) -> list[dict]:
    """Stage 4. The teacher's score of its edit, as "score_refined".

    It is asked in the same conversation, after its whole diagnosis and edit, and told what y_l was
    scored. With --score text, 0 is a reply that could not be read, and the reply is kept as
    "score_refined_reply".
    """
    chats = []
    for row in rows:
        reply = {"role": "assistant", "content": row["refined_reply"]}
        question = RESCORE_PROMPT.format(score=row["score_rejected"])
        chats.append([refine_question(row), reply, score_turn(question, args)])

    if args.score == "text":
        texts = score_replies(chats, teacher, args)
        scores = [read_scores(text, [THE_EDIT])[0] for text in texts]
        results = []
        for score, text in zip(scores, texts):
            results.append({"score_refined": score, "score_refined_reply": text})
        return results
    scores = expected_scores(chats, "{}", teacher, reply_ends=True, logits_chunk=args.logits_chunk)
    return [{"score_refined": score} for score in scores]


def check_length_of_questions(pairs: list[Example], teacher: LM, args: Args):
    """Ends the program before any work if the teacher has too few positions for what stages 2 to 4
    ask about the longest pair, with y_T and the replies as long as they may be."""

    def tokens_of(pair: Example) -> int:
        return len(pair.prompt_ids) + sum(len(ids) for ids in pair.response_ids)

    row = max(pairs, key=tokens_of).row
    prompt = prompt_text(row["prompt"])
    question = SCORE_PROMPT.format(prompt=prompt, a=row["chosen"], b=row["rejected"])
    score_tokens = args.max_response_tokens if args.score == "text" else 0
    teacher.check_limits(0, len(teacher.prompt_ids([score_turn(question, args)])) + score_tokens)
    if not args.refine:
        return
    worse = max(row["chosen"], row["rejected"], key=len)
    edit_question = refine_question({**row, "teacher": {"text": ""}, "rejected": worse})
    reply = {"role": "assistant", "content": "Edited:"}
    chat = [edit_question, reply, score_turn(RESCORE_PROMPT.format(score=10), args)]
    length = len(teacher.prompt_ids(chat)) + args.max_response_tokens + args.max_edit_tokens
    teacher.check_limits(0, length + score_tokens, "--max_edit_tokens")


def annotate(
    rows: list[dict], teacher: LM, run_dir: Path, args: Args, dropped: Counter
) -> list[dict]:
    """Stages 1 to 4. The rows that are left, with all columns of annotations.jsonl.

    The files are teacher.jsonl, score_chosen.jsonl and score_rejected.jsonl, refined.jsonl, and
    score_refined.jsonl. They may also come from another program. Rows that cannot be learned from
    are dropped, and counted by their reason: they stay in the file of their stage, and later stages
    lack them.
    """

    def run_stage(column: str, rows: list[dict], function, *, types, batch_size: int, seed=None):
        """The rows with the new columns of a stage. What could not be read is dropped."""
        path = run_dir / f"{column}.jsonl"
        results = cached_map(path, rows, function, batch_size, seed)
        new_rows = []
        for row, result in zip(rows, results):
            # The stage's own columns alone: a file of another program may have more.
            new_row = {**row, column: result.get(column)}
            if f"{column}_reply" in result:
                new_row[f"{column}_reply"] = result[f"{column}_reply"]
            new_rows.append(new_row)
        check_column(new_rows, column, types, f"cannot go on with {path}")
        readable = [row for row in new_rows if is_readable(row[column])]
        dropped["unreadable"] += len(rows) - len(readable)
        if rows and not readable:
            reply = str(new_rows[0].get(f"{column}_reply", ""))
            problem = f"none of {len(rows)} replies in {path} can be read, as {reply[:60]!r}"
            if column == "refined":
                cut_off = [result for result in results if not result.get("refined_finished", True)]
                problem += f"; {len(cut_off)} are cut off at --max_edit_tokens"
            stop_without_pairs(problem, dropped, ADVICE[column])
        return readable

    # Readers of annotations.jsonl find the request there as the teacher read it.
    rows = [{**row, "asked": prompt_text(row["prompt"])} for row in rows]
    for row in rows:
        # They find every column once.
        row.pop("record", None)
    if args.refine or "teacher" in response_columns(args):
        function = partial(answer_prompts, teacher=teacher, args=args)
        rows = run_stage(
            "teacher",
            rows,
            function,
            types=(str, dict),
            batch_size=args.sample_batch_size,
            seed=args.seed,
        )

    # Each answer is scored once, where it is answer A, so that the first place favours neither.
    scoring_batch_size = args.micro_batch_size
    if args.score == "text":
        scoring_batch_size = args.sample_batch_size
    for scored, other in (("chosen", "rejected"), ("rejected", "chosen")):
        function = partial(
            score_as_answer_a, scored=scored, other=other, teacher=teacher, args=args
        )
        rows = run_stage(
            f"score_{scored}", rows, function, types=(int, float), batch_size=scoring_batch_size
        )
    different = [row for row in rows if row["score_chosen"] != row["score_rejected"]]
    dropped["tie"] += len(rows) - len(different)
    if rows and not different:
        problem = f"the teacher scores both answers alike, the first ones {rows[0]['score_chosen']}"
        stop_without_pairs(problem, dropped, ADVICE["tie"])
    rows = [order_by_score(row) for row in different]
    if not args.refine:
        return rows

    check_column(rows, "teacher", dict, "cannot make refined.jsonl")
    function = partial(edit_worse_answers, teacher=teacher, args=args)
    rows = run_stage(
        "refined", rows, function, types=str, batch_size=args.sample_batch_size, seed=args.seed
    )
    edited = [row for row in rows if row["refined"] != row["rejected"]]
    dropped["equal"] += len(rows) - len(edited)
    if rows and not edited:
        problem = f"no edit changes anything, the first is {rows[0]['refined'][:60]!r}"
        stop_without_pairs(problem, dropped, ADVICE["equal"])
    rows = edited

    check_column(rows, "refined_reply", str, "cannot make score_refined.jsonl")
    function = partial(score_edits, teacher=teacher, args=args)
    return run_stage(
        "score_refined", rows, function, types=(int, float), batch_size=scoring_batch_size
    )


# What to do where a stage leaves no row, by its column, or by why rows are dropped.
ADVICE = {
    "teacher": "take another --teacher, or look at its chat template",
    "score_chosen": "take --score expected, which reads no reply, or a larger --teacher",
    "score_rejected": "take --score expected, which reads no reply, or a larger --teacher",
    "refined": "take more --max_edit_tokens if they are cut off, else a larger --teacher, or "
    "--no-refine, which needs no edit",
    "score_refined": "take --score expected, which reads no reply, or a larger --teacher",
    "tie": "take --score expected, whose scores are no whole numbers, or a larger --teacher",
    "equal": "take a larger --teacher, or --no-refine, which needs no edit",
    "below the margin": "take a larger --teacher, or --no-refine, which needs no edit",
}


# Why a row is dropped, as it is printed.
REASONS = {
    "unreadable": "a reply cannot be read",
    "tie": "both answers have the same score",
    "equal": "the edit changes nothing",
    "below the margin": "the gain in score is too small",
}


def stop_without_pairs(problem: str, dropped: Counter, advice: str):
    """Ends the program where no pair is left to learn from: what happened, how many rows were
    dropped for which reason, and what to do."""
    counts = ", ".join(f"{count}: {REASONS[reason]}" for reason, count in dropped.items() if count)
    stop(f"no pair is left to learn from: {problem} (rows dropped: {counts}); {advice}")


def is_readable(value: dict | str | float) -> bool:
    """Whether a stage found something in a reply: a text, or a score, which is never 0."""
    if isinstance(value, dict):
        return bool(value["text"])
    return bool(value)


def order_by_score(row: dict) -> dict:
    """The row with its two answers in the teacher's order, whatever the data says."""
    if row["score_chosen"] > row["score_rejected"]:
        return row
    exchanged = dict(row)
    for column in ("{}", "score_{}", "score_{}_reply"):
        chosen = column.format("chosen")
        rejected = column.format("rejected")
        if chosen in row and rejected in row:
            exchanged |= {chosen: row[rejected], rejected: row[chosen]}
    return exchanged


def check_column(rows: list[dict], column: str, types, problem: str):
    """Ends the program if a row lacks a column, or has something of another type there."""
    for row in rows:
        if not isinstance(row.get(column), types):
            need = f"row {row_number(row)} needs a column {column}"
            stop(f"{problem}: {need}, as docs/rm_distiller.md describes it")


def read_annotations(args: Args) -> list[dict]:
    """The rows of --annotations, with all columns that they are learned from."""
    columns = response_columns(args)
    source = args.annotations
    rows = read_rows(source, args.data_split, columns=columns[:2], config=args.data_config)
    problem = f"cannot learn from --annotations {args.annotations}"
    for column in columns[:2]:
        check_column(rows, f"score_{column}", (int, float), problem)
    if "teacher" in columns:
        check_column(rows, "teacher", (str, dict), problem)
    return rows


def add_margins(rows: list[dict], args: Args, dropped: Counter) -> list[dict]:
    """Rows with the points m that y_w* (or y_w) has more than y_l, as "margin".

    As in the paper an edit must gain more than a point. What gains less is dropped and counted.
    """
    better = response_columns(args)[0]
    least = 1.0 if args.refine else 0.0
    kept = []
    for row in rows:
        margin = row[f"score_{better}"] - row["score_rejected"]
        if margin > least:
            kept.append({**row, "margin": margin})
    dropped["below the margin"] += len(rows) - len(kept)
    if rows and not kept:
        gains = [row[f"score_{better}"] - row["score_rejected"] for row in rows]
        problem = f"the score of {better} must be more than {least:.0f} higher than that of "
        problem += f"rejected, the highest gain of {len(rows)} is {max(gains):.2f}"
        stop_without_pairs(problem, dropped, ADVICE["below the margin"])
    return kept


def print_annotations(rows: list[dict], better: str, dropped: Counter, count: int = 3):
    """How many rows were dropped and kept, and the two responses of some pairs."""
    print("\npairs after the teacher's annotation")
    print(f"{len(rows) + dropped.total():>8}  annotated")
    for reason, number in dropped.items():
        print(f"{number:>8}  dropped: {REASONS[reason]}")
    print(f"{len(rows):>8}  kept")
    worse_name, better_name = ("worse", "better") if better == "chosen" else ("before", "edited")
    for row in rows[:count]:
        print(f"\n  {one_line(prompt_text(row['prompt']))}")
        print(f"    {worse_name:<8}{one_line(row['rejected'])}")
        print(f"    {better_name:<8}{one_line(row[better])}")
    print()


# --------------------------------------------------------------------------------------- evaluation
@torch.no_grad()
def pair_accuracy(
    examples: list[Example], student: LM, micro_batch_size: int
) -> dict[str, list[float]]:
    """By subset, and for "all": 1 for a pair whose chosen response has the higher reward, ½ for a
    tie, 0 for any other."""
    correct = {"all": []}
    for start in range(0, len(examples), micro_batch_size):
        micro_batch = examples[start : start + micro_batch_size]
        batch = pack(micro_batch, student)
        rewards = response_rewards(student, student.hidden_states(batch), batch)  # [2·B]
        for example, (chosen, rejected) in zip(micro_batch, rewards.view(-1, 2).tolist()):
            value = 0.5 if chosen == rejected else float(chosen > rejected)
            correct["all"].append(value)
            subset = str(example.row.get("subset") or example.row.get("source") or "all")
            if subset != "all":
                correct.setdefault(subset, []).append(value)
    return correct


def mean_error_count(values: list[float]) -> list:
    """Their mean, its standard error, and how many there are."""
    return [statistics.mean(values), standard_error(values), len(values)]


def print_accuracy(before: dict[str, list[float]], after: dict[str, list[float]]):
    """The share of held-out pairs that r orders right: a line for all, and for each subset."""
    print("\nshare of held-out pairs whose better response has the higher reward")
    width = max(18, max(len(name) for name in after))
    print(f"{'':<{width}}{'pairs':>8}{'before':>9}{'now':>9} ± standard error")
    for name, values in after.items():
        mean, error, count = mean_error_count(values)
        numbers = f"{statistics.mean(before[name]):>9.3f}{mean:>9.3f} ± {error:.3f}"
        print(f"{name:<{width}}{count:>8}{numbers}")


# --------------------------------------------------------------------------------------------- main
def main(args: Args):
    started = time.time()
    args, run_dir = open_run(args, __file__)
    check_flags(args, at_least_0=["sample_temperature", "margin_scale", "kl_coef", "nll_coef"])
    if not 1 <= args.max_edit_tokens < math.inf:  # NaN is refused as well
        stop(f"--max_edit_tokens {args.max_edit_tokens} must be a number of at least 1")

    # ------------------------------------------------------------------------------ models and data
    device = choose_device(args.device)
    print_start(run_dir, device, data=args.annotations or args.data, eval_data=args.eval_data)
    if args.annotations:
        rows = read_annotations(args)
    else:
        rows = read_rows(args.data, args.data_split, config=args.data_config)
    eval_rows = read_rows(args.eval_data, args.eval_split, config=args.eval_config)
    check_own_data(args, rows, eval_rows)
    student, teacher = load_models(args, device)
    print_models(student=student, teacher=teacher)
    vocab_size = student.vocab_size
    if args.kl_coef > 0:
        vocab_size = shared_vocab_size(student, teacher, "take --kl_coef 0 --nll_coef 1")
    encoded = {}  # token ids of prompts and texts, so that none is encoded twice
    if args.annotations:
        sources = {"annotations": [Example(row, [], []) for row in rows]}
    else:
        columns = ["chosen", "rejected"]
        pairs = encode_rows(student, rows, columns, args, "training pairs", encoded)
        check_length_of_questions(pairs, teacher, args)
        rows = [example.row for example in pairs]
        sources = {"data": pairs}
    held_out = encode_rows(student, eval_rows, ["chosen", "rejected"], args, "held-out pairs")
    print_plan(args, rows, len(held_out))
    begin_run(run_dir, args, [student, teacher], **sources, eval_data=held_out)

    # ------------------------------------------------------------------------ evaluation at step 0
    # It comes before a checkpoint is read, so that "before" is the untrained student in every run.
    before = pair_accuracy(held_out, student, args.micro_batch_size)

    # ------------------------------------------------------- stages 1 to 4: the teacher annotates
    dropped = Counter()
    if not args.annotations:
        rows = annotate(rows, teacher, run_dir, args, dropped)
        lines = [json.dumps(row, default=str) + "\n" for row in rows]
        (run_dir / "annotations.jsonl").write_text("".join(lines))
    rows = add_margins(rows, args, dropped)
    columns = response_columns(args)
    print_annotations(rows, columns[0], dropped)
    examples = encode_rows(student, rows, columns, args, "annotated pairs", encoded)

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
        metrics.log(0, {"eval/accuracy": statistics.mean(before["all"])})
        edits = [{"prompt": row["prompt"], "text": row[columns[0]]} for row in rows]
        metrics.log_samples(0, edits)

    # ------------------------------------------------------------------------------------- training
    bar = Bar("training", total_steps, "steps", done=first_step)
    for step in range(first_step, total_steps):
        step_started = time.time()
        step_batch = step_examples(examples, step, args.batch_size, args.seed)
        losses = {"total": 0.0}
        for start in range(0, len(step_batch), args.micro_batch_size):
            micro_batch = step_batch[start : start + args.micro_batch_size]
            terms = rm_distiller_terms(micro_batch, student, teacher, vocab_size, args)
            # Divided by the examples of the whole step, so that the micro-batch size changes
            # memory and nothing else.
            parts = {name: term.sum() / len(step_batch) for name, term in terms.items()}
            # A term that the weights leave out is not there, and counts 0.
            kl = parts.get("kl", 0.0)
            nll = parts.get("nll", 0.0)
            loss = parts["pair"] + weighted(args.kl_coef, kl) + weighted(args.nll_coef, nll)
            loss.backward()
            losses["total"] += loss.item()
            for name, part in parts.items():
                losses[name] = losses.get(name, 0.0) + part.item()

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
            values["losses/pair"] = losses["pair"]
            if "kl" in losses:
                values["losses/kl"] = losses["kl"]
            if "nll" in losses:
                values["losses/nll"] = losses["nll"]
            values["charts/learning_rate"] = scheduler.get_last_lr()[0]
            values["charts/grad_norm"] = grad_norm.item()
            values["charts/epoch"] = done / steps_per_epoch
            values["charts/tokens"] = counts["tokens"]
            values["charts/tokens_per_second"] = counts["tokens"] / counts["seconds"]
        if done % args.eval_every == 0 or is_last:
            after = pair_accuracy(held_out, student, args.micro_batch_size)
            values["eval/accuracy"] = statistics.mean(after["all"])
        if values:
            metrics.log(done, values)
        if done % args.save_every == 0 or is_last:
            save_checkpoint(run_dir / "checkpoint.pt", done, counts, **state)
        bar.advance(1, loss=losses["total"], accuracy=values.get("eval/accuracy"))
    bar.close()

    # -------------------------------------------------------------------------------------- results
    if first_step == total_steps:
        # The run was interrupted behind its last step, so none was left in which to evaluate.
        after = pair_accuracy(held_out, student, args.micro_batch_size)
    save_reward_model(student, run_dir / "model")
    accuracy = {name: mean_error_count(values) for name, values in after.items()}
    results = {
        "accuracy_before": statistics.mean(before["all"]),
        "accuracy_after": statistics.mean(after["all"]),
        "accuracy": accuracy,
        "seconds": time.time() - started,
    }
    save_summary(run_dir, results, counts, args)
    print_accuracy(before, after)
    print_end(run_dir, args, results["seconds"], is_reward_model=True)


if __name__ == "__main__":
    args = parse_flags(Args, __doc__)
    with exit_in_one_line(args):
        main(args)
