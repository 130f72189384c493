"""RM-Distiller: a reward model distilled from a generative teacher (2026, arXiv 2601.14032).

The teacher scores two answers, edits the worse one, y_l, to a better one, y_w*, and scores that. The gain is the margin
m of the reward r, a linear head on the last hidden state; on its own answer y_T the backbone stays a language model:

    L = (r(x, y_w*) − r(x, y_l) − c m)² + (1/|y_T|) Σ_t [κ KL(π_teacher(·|s_t) ‖ π_θ(·|s_t)) − ν log π_θ(y_T,t|s_t)].

Stages: the teacher (1) answers, (2) scores two answers, (3) edits one, (4) scores the edit; (5) training; evaluation.
Simplified: one GPU, no dropout. The paper's code pulls every margin to the mean of its batch: docs/rm_distiller.md.

    python rm_distiller.py                                  # the playground: a CPU, about a minute
    python rm_distiller.py --student Qwen/Qwen2.5-3B-Instruct --teacher Qwen/Qwen2.5-14B-Instruct --data <pairs> \\
        --eval_data <pairs> --learning_rate 1e-5 --micro_batch_size 2 --max_response_tokens 1024 --best_of 0  # one GPU
"""

import difflib
import importlib.metadata
import json
import math
import re
import resource
import shutil
import statistics
import time
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from tqdm import tqdm
from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, get_cosine_schedule_with_warmup

import common
from common import (
    LM,
    Example,
    clearly,
    load_checkpoint,
    make_examples,
    pack,
    read_rows,
    save_checkpoint,
    stage,
    stop,
)

SCORE = "Request: {asked}\nAnswer A: {%s}\nAnswer B: {%s}\nScore each answer from 1 to 10. Reply as A: score, B: score"
REFINE = """Request: {asked}\nBetter answer: {teacher[text]}\nWorse answer: {rejected}
Explain why the second answer is worse, then edit it as little as possible to make it good.
Reply as Why: reason Edited: answer"""
RESCORE = """The worse answer was scored {score_rejected:.0f} out of 10. Score the edited answer on the same scale.
Reply with the score."""


@dataclass
class Args:
    student: str = "playground/student"
    """model to train: a hub id or a folder"""
    teacher: str = "playground/teacher"
    """frozen teacher: a hub id or a folder"""
    data: str = "playground/data/train.jsonl"
    """preference pairs: a .jsonl, .json or .parquet file, a folder or a hub id"""
    data_split: str = "train"
    """split of --data where it has several"""
    eval_data: str = "playground/data/rm_test.jsonl"
    """held-out pairs; a column `subset` or `source` gives each of its values a line of its own"""
    eval_split: str = "test"
    """split of --eval_data where it has several"""
    reward: str = "playground.world:reward"
    """judge of answers: module:function as in TRL (your own code is executed), or a reward model"""
    output_dir: str = ""
    """folder of this run (default: runs/<script>__<seed>__<time>)"""
    resume: str = ""
    """folder of a run that was interrupted; it goes on with the flags it had"""
    overwrite: bool = False
    """replace the run that --output_dir holds"""
    seed: int = 1
    """seed of data order and sampling"""
    device: str = ""
    """cpu, cuda, cuda:1, ... (default: cuda where there is one)"""
    trust_remote_code: bool = False
    """run code that comes with a hub model"""
    track: Literal["none", "tensorboard", "wandb"] = "none"
    """where metrics go besides metrics.jsonl"""
    max_prompt_tokens: int = 512
    """rows with longer prompts are dropped and counted"""
    max_response_tokens: int = 256
    """rows with longer answers are dropped and counted; sampling stops there"""
    num_epochs: int = 4
    """passes over the data"""
    max_steps: int = 0
    """optimiser steps, if not 0, in place of --num_epochs"""
    batch_size: int = 32
    """examples of an optimiser step"""
    micro_batch_size: int = 32
    """examples of a forward pass: a matter of memory, not of the result"""
    logits_chunk: int = 1024
    """response tokens whose logits are alive at a time"""
    gradient_checkpointing: bool = False
    """recompute the student's activations in the backward pass to save memory"""
    warmup_ratio: float = 0.1
    """share of the steps in which the learning rate rises; a cosine brings it to 0 after that"""
    weight_decay: float = 0.0
    """of AdamW"""
    max_grad_norm: float = 1.0
    """gradients are clipped to this norm"""
    log_every: int = 10
    """optimiser steps between rows of metrics.jsonl"""
    eval_every: int = 50
    """optimiser steps between evaluations on held-out prompts"""
    save_every: int = 50
    """optimiser steps between checkpoints"""
    eval_prompts: int = 256
    """held-out prompts for --best_of"""
    eval_temperature: float = 1.0
    """temperature of the evaluation's answers; 0 is greedy"""
    sample_batch_size: int = 256
    """answers sampled at a time"""

    # method
    learning_rate: float = 5e-3
    """of AdamW (playground; released code: 1e-5)"""
    annotations: str = ""
    """annotations.jsonl of another run or program, in place of stages 1 to 4 (columns: docs/rm_distiller.md)"""
    score: Literal["expected", "text"] = "expected"
    """take a score as its expectation over the ten that the teacher can give, or from the text of its reply"""
    sample_temperature: float = 1.0
    """of the teacher's answers and edits (playground; released code: 0.7, top_p 0.8, top_k 20)"""
    refine: bool = True
    """learn the edit y_w* over y_l; if not, the better answer y_w as it is"""
    margin: bool = True
    """regress on the margin; if not, maximise the Bradley-Terry likelihood"""
    margin_scale: float = 0.3
    """c, reward for a point of the teacher's scale (playground; released code: 1, with a learning rate to match)"""
    kl_coef: float = 0.1
    """κ (playground; released Python code: 1, its launcher: 0)"""
    nll_coef: float = 0.0
    """ν, of use where two vocabularies forbid the KL (released Python code: 1, its launcher: 0)"""
    best_of: int = 8
    """answers of the untrained student to a held-out prompt, of which the reward model picks one; 0 leaves it out"""


# ------------------------------------------------------------------------------------------------------ mathematics
def pair_loss(
    better: torch.Tensor, worse: torch.Tensor, margins: torch.Tensor | None = None
) -> torch.Tensor:
    """[B]: (r(x, y_w) − r(x, y_l) − m)², or without margins Bradley-Terry, −log σ(r(x, y_w) − r(x, y_l)); all [B]."""
    assert (
        better.shape
        == worse.shape
        == (better if margins is None else margins).shape
        == (len(better),)
    )  # no table
    return (
        -torch.nn.functional.logsigmoid(better - worse)
        if margins is None
        else (better - worse - margins).square()
    )


def forward_kl(teacher_log_probs: torch.Tensor, student_log_probs: torch.Tensor) -> torch.Tensor:
    """[N]: KL(π_teacher(·|s) ‖ π_θ(·|s)) of every state, from [N, V] and [N, V]."""
    terms = teacher_log_probs.exp() * (teacher_log_probs - student_log_probs)
    return terms.masked_fill(teacher_log_probs.isneginf(), 0.0).sum(
        -1
    )  # p log p is 0 at p = 0; computed it is NaN


# ---------------------------------------------------------------------------------- what a teacher's reply is read as
A, B, IT = (
    r"A|a(?=\s*[:=])",
    r"B|b(?=\s*[:=])",
    r"(?i:scored?|rating)",
)  # what is scored, as a reply names it
NUMBER = r"(?<![A-Za-z\d.,/-])(\d+(?:[.,]\d+)?)(?![.,]?\d|[A-Za-z]|\s*%|\s*[-–/]\s*\d|\s+(?!and\b|points?\b)[a-z])"
FILLER = r"(?:[^\w.!?;]|\b(?:answer|is|gets?|scored?|scores|rated|rating|deserves|as|at|of|it|a)\b|得分|评分)*?"


def read_score(reply: dict, *names: str) -> float:
    """The first of the scores from 1 to 10 that a reply gives to names (regular expressions), as in "A: 8, B: 6/10", or
    alone as in "8, 6". 0 if one is missing, out of range or contradicted: a row less costs less than a wrong label."""
    said = re.sub(r"\s*(?:/|out of)\s*10\b", "", reply["text"])
    alone = re.fullmatch(
        r"[\W_]*" + r"(?:\s*(?:[,;&]|and)\s*|\s+)".join([NUMBER] * len(names)) + r"[\W_]*", said
    )
    named = [
        set(re.findall(rf"(?<![A-Za-z0-9_])(?:{name})(?![A-Za-z0-9_]){FILLER}{NUMBER}", said))
        for name in names
    ]
    said = alone.groups() if alone else [found.pop() for found in named if len(found) == 1]
    scores = [float(text.replace(",", ".")) for text in said]
    return (
        scores[0]
        if len(scores) == len(names) and all(1 <= score <= 10 for score in scores)
        else 0.0
    )


def read_edit(reply: dict) -> str:
    """What follows "Edited:" in a finished reply, without quotation marks around it; "" where nothing does."""
    found = re.search(
        r"(?s)\bE(?i:dited)\b[\w ]{0,20}[*_]*:[*_]*\s*(?:[\"“]([^\"“”]*)[\"”]|(.*\S))\s*$",
        reply["text"],
    )
    return (found[1] or found[2] or "").strip() if found and reply["finished"] else ""


# ------------------------------------------------------------------------------------------------------------- main
def main(args: Args):
    # ----------------------------------------------------------------------------------------------- the run folder
    for name, value in vars(args).items():
        least = (
            1
            if name.endswith(("_size", "_epochs", "_every", "_tokens", "_prompts", "_chunk"))
            else 0
        )
        if type(value) in (int, float) and not least <= value < math.inf:
            stop(f"--{name} {value} must be a number of at least {least}")
    started = time.time()
    run = Path(args.resume or args.output_dir or f"runs/rm_distiller__{args.seed}__{int(started)}")
    if args.resume:  # a run goes on with the flags it began with
        if args != Args(resume=args.resume) or not (run / "args.json").exists():
            stop(
                f"--resume {run} takes the folder of a run, which holds all flags, and no other flag"
            )
        with clearly(f"resume {run}"):
            args = Args(**{**json.loads((run / "args.json").read_text()), "overwrite": False})
    elif (
        run.exists()
        and any(run.iterdir())
        and not (args.overwrite and (run / "args.json").exists())
    ):
        stop(
            f"{run} is not empty; --resume the run in it, --overwrite it, or choose another --output_dir"
        )

    # ---------------------------------------------------------------------------------------------- models and data
    with clearly(f"use --device {args.device}"):
        device = torch.empty(
            0, device=args.device or ("cuda" if torch.cuda.is_available() else "cpu")
        ).device
    student = LM(args.student, device, True, args.gradient_checkpointing, args.trust_remote_code)
    alone = args.annotations and not args.kl_coef  # then there is nothing to ask the teacher
    teacher = None if alone else LM(args.teacher, device, remote_code=args.trust_remote_code)
    better, generation = "refined" if args.refine else "chosen", args.kl_coef + args.nll_coef > 0
    vocab_size = common.shared_vocab(
        student, teacher if args.kl_coef else student, "take --kl_coef 0 --nll_coef 1"
    )
    judge = common.load_reward(args.reward, device, args.trust_remote_code)
    torch.manual_seed(args.seed)
    type(student.model.config) in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING or stop(
        f"{args.student} has no classifier"
    )
    student.model.score = torch.nn.Linear(student.config.hidden_size, 1, bias=False, device=device)
    limits, pair, counts = (
        (args.max_prompt_tokens, args.max_response_tokens),
        ("chosen", "rejected"),
        Counter(),
    )
    rows = read_rows(
        args.annotations or args.data,
        args.data_split,
        (better, "rejected") if args.annotations else pair,
    )
    held_out = [
        row | {"worth": (1.0, 0.0), "pool": "all"}
        for row in read_rows(args.eval_data, args.eval_split)
    ]
    held_out = make_examples(student, held_out, pair, *limits)
    if args.overwrite and run.resolve() in Path(args.annotations).resolve().parents:
        stop(
            f"--overwrite would remove --annotations {args.annotations}; choose another --output_dir"
        )
    if args.overwrite:  # only now: a run that cannot start replaces nothing
        shutil.rmtree(run, ignore_errors=True)
    run.mkdir(parents=True, exist_ok=True)
    (run / "args.json").write_text(json.dumps(vars(args), indent=1))

    # ----------------------------------------------------------------------------------------- sampling, evaluation
    how, everything = (
        {"max_new_tokens": args.max_response_tokens, "batch_size": args.sample_batch_size},
        [*held_out],
    )

    @torch.no_grad()
    def evaluate(examples: list[Example] = held_out) -> dict[str, list[float]]:
        """By subset: worth of the answer that r prefers (of a pair 1 or 0: accuracy; ties share), its error, rows."""
        worth = defaultdict(list)
        for start in range(0, len(examples), args.micro_batch_size):
            batch = pack(micro := examples[start : start + args.micro_batch_size], student)
            rewards = student.model.score(student.hidden_states(batch)[batch.last].float())[
                :, 0
            ].cpu()  # [R]
            for (row, *_), r in zip(
                micro, rewards.split([len(example.responses) for example in micro])
            ):
                for name in dict.fromkeys(
                    (row["pool"], str(row.get("subset") or row.get("source") or row["pool"]))
                ):
                    worth[name].append(torch.tensor(row["worth"])[r == r.max()].mean().item())
        return {
            k: [statistics.mean(v), statistics.pstdev(v) / len(v) ** 0.5, len(v)]
            for k, v in worth.items()
        }

    def propose(rows: list[dict], number: int, n=args.best_of) -> list[dict]:
        """n answers of the untrained student to every prompt, and what they are worth to the judge."""
        prompts = [student.encode(row["prompt"])[0] for row in rows]
        several = student.sample(
            prompts, n=n, temperature=args.eval_temperature, seed=args.seed + number, **how
        )
        worth = [
            judge([row["prompt"]] * n, [said["text"] for said in some])
            for row, some in zip(rows, several)
        ]
        return [{"answers": answers, "worth": values} for answers, values in zip(several, worth)]

    if args.best_of:
        pool, prompts = (
            f"best of {args.best_of}",
            list({str(row["prompt"]): row for row, *_ in held_out}.values()),
        )
        options = stage(
            run / "options.jsonl", prompts[: args.eval_prompts], propose, args.sample_batch_size
        )
        options = [row | {"pool": pool} | dict(enumerate(row["answers"])) for row in options]
        everything += make_examples(student, options, range(args.best_of), *limits)
    before = evaluate(everything)

    # ------------------------------------------------------------------------- stages 1 to 4: the teacher annotates
    def annotate(rows: list[dict], column: str, templates: list[str], read, form="") -> list[dict]:
        """Rows with a new column: what `read` finds in the teacher's reply to templates as turns of user, assistant,
        user; or the expected score, Σ_s s p(s), p over the replies form.format(s), s = 1 to 10. Others are dropped."""
        expected, turns = (
            form and args.score == "expected",
            list(zip(("user", "assistant", "user"), templates)),
        )
        ten = [
            {"text": form.format(s), "finished": form == "{}"} for s in range(1, 11)
        ]  # "10," is no "1,"

        @clearly(f"make {column}.jsonl from the columns of the stages before it")
        def make(some: list[dict], number: int) -> list[dict]:
            chats = [
                [{"role": r, "content": t.format(**row)} for r, t in turns] or row["prompt"]
                for row in some
            ]
            if expected:
                batch = pack([Example({}, *teacher.encode(chat, ten)) for chat in chats], teacher)
                logits = teacher.logits(
                    teacher.hidden_states(batch)[batch.source], teacher.vocab_size
                )
                logps = common.target_logps(batch.target_ids, logits.log_softmax(-1))
                p = (
                    logps.new_zeros(len(batch.lengths))
                    .index_add(0, batch.response_of, logps)
                    .view(-1, 10)
                    .softmax(-1)
                )
                return [{column: score} for score in (p @ torch.arange(1.0, 11.0).to(p)).tolist()]
            heat, prompts = (
                0.0 if form else args.sample_temperature,
                [teacher.encode(chat)[0] for chat in chats],
            )
            several = teacher.sample(prompts, temperature=heat, seed=args.seed + number, **how)
            replies = [
                said | {"text": re.sub(r"(?s)^.*</think>\s*|<think>.*", "", said["text"])}
                for [said] in several
            ]
            return [
                {column: read(said), "reply" if form else f"{column}_reply": said["text"]}
                for said in replies
            ]

        made = stage(
            run / f"{column}.jsonl",
            rows,
            make,
            args.micro_batch_size if expected else args.sample_batch_size,
        )
        return keep(
            "unreadable", [row | new for row, new in zip(rows, made)], lambda row: row[column]
        )

    def keep(otherwise: str, rows: list[dict], good) -> list[dict]:
        counts[otherwise] += sum(not good(row) for row in rows)
        return [row for row in rows if good(row)]

    if not args.annotations:
        rows = [example.row for example in make_examples(student, rows, pair, *limits)]
        rows = [
            row | {"asked": "\n".join(turn["content"] for turn in row["prompt"])} for row in rows
        ]
        rows = annotate(rows, "teacher", [], dict) if args.refine or generation else rows
        for x, y in (
            pair,
            pair[::-1],
        ):  # each is scored as answer A: the first place favours neither
            rows = annotate(
                rows, f"score_{x}", [SCORE % (x, y)], lambda said: read_score(said, A, B), "A: {},"
            )
        rows = keep("tie", rows, lambda row: row["score_chosen"] != row["score_rejected"])
        for row in rows:
            (low, worse), (high, best) = sorted((row[f"score_{name}"], row[name]) for name in pair)
            row |= {"chosen": best, "score_chosen": high, "rejected": worse, "score_rejected": low}
        if args.refine:
            rows = annotate(rows, "refined", [REFINE], read_edit)
            rows = keep("equal", rows, lambda row: row["refined"] != row["rejected"])
            turns = [
                REFINE,
                "{refined_reply}",
                RESCORE,
            ]  # the score follows the whole diagnosis and edit
            rows = annotate(rows, "score_refined", turns, lambda said: read_score(said, IT), "{}")
        (run / "annotations.jsonl").write_text(
            "".join(json.dumps(row, default=str) + "\n" for row in rows)
        )
    with clearly("learn from annotations that lack a column (docs/rm_distiller.md has them)"):
        rows = [{**row, "margin": row[f"score_{better}"] - row["score_rejected"]} for row in rows]
        rows = keep(
            "below the margin", rows, lambda row: row["margin"] > (1.0 if args.refine else 0.0)
        )  # 1: paper
        for what, count in {
            "rows in": len(rows) + counts.total(),
            **counts,
            "kept": len(rows),
        }.items():
            print(f"{count:>8}  {what}")
        examples = make_examples(
            student, rows, [better, "rejected", *["teacher"] * generation], *limits
        )
    for row in rows[:3]:
        print(
            *(
                w.replace(" ", "")
                for w in difflib.ndiff(row["rejected"].split(), row[better].split())
                if w[0] != "?"
            )
        )

    # ---------------------------------------------------------------------------------------------------- optimiser
    steps_per_epoch = math.ceil(len(examples) / args.batch_size)
    total_steps = args.max_steps or args.num_epochs * steps_per_epoch
    optimizer = torch.optim.AdamW(
        student.model.parameters(), args.learning_rate, weight_decay=args.weight_decay
    )
    scheduler = get_cosine_schedule_with_warmup(
        optimizer, math.ceil(args.warmup_ratio * total_steps), total_steps
    )
    parts = {"model": student.model, "optimizer": optimizer, "scheduler": scheduler}
    first_step = load_checkpoint(run / "checkpoint.pt", **parts)
    metrics = run / "metrics.jsonl"
    logged = (
        metrics.read_text().split("\n")[:-1] if first_step else []
    )  # not what a kill left behind the last break
    metrics.write_text(
        "".join(line + "\n" for line in logged if json.loads(line)["step"] <= first_step)
    )
    if args.track == "wandb":
        import wandb

        wandb.init(project="prefdistill", name=run.name, config=vars(args), sync_tensorboard=True)
    if args.track != "none":
        from torch.utils.tensorboard import SummaryWriter

        tracker = SummaryWriter(str(run))

    # ----------------------------------------------------------------------------------------------------- training
    seconds, tokens, guide = 0.0, 0, teacher if args.kl_coef else student
    for step in tqdm(
        range(first_step, total_steps), initial=first_step, total=total_steps, desc="training"
    ):
        tick, losses = time.time(), Counter()
        epoch, place = divmod(step, steps_per_epoch)
        order = torch.randperm(
            len(examples), generator=torch.Generator().manual_seed(args.seed + epoch)
        ).tolist()
        drawn = [
            examples[i] for i in order[place * args.batch_size : (place + 1) * args.batch_size]
        ]
        for start in range(0, len(drawn), args.micro_batch_size):
            micro = drawn[start : start + args.micro_batch_size]
            batch = pack(
                micro, student
            )  # of every example y_w*, y_l and, for the generation terms, y_T
            hidden = student.hidden_states(batch)
            r = student.model.score(hidden[batch.last].float()).view(len(micro), -1)  # [B, 2 or 3]
            margins = args.margin_scale * torch.tensor([row["margin"] for row, *_ in micro]).to(
                r
            )  # [B]
            terms = {"pair": pair_loss(r[:, 0], r[:, 1], margins if args.margin else None)}  # [B]
            if generation:
                y_T = pack(
                    [example._replace(responses=example.responses[2:]) for example in micro],
                    student,
                    guide,
                )
                ours = hidden[batch.source][batch.response_of % 3 == 2]  # [N, H] on y_T
                theirs = guide.hidden_states(y_T)[y_T.source] if args.kl_coef else ours
                values = common.per_token(
                    lambda ids, theirs, ours: (
                        forward_kl(theirs, ours),
                        -common.target_logps(ids, ours),
                    ),
                    *(
                        y_T.target_ids,
                        [(guide, theirs), (student, ours)],
                        vocab_size,
                        args.logits_chunk,
                    ),
                )
                terms |= zip(
                    ("kl", "nll"),
                    (common.response_means(v, y_T.response_of, y_T.lengths) for v in values),
                )
            terms = {name: term.sum() / len(drawn) for name, term in terms.items()}
            loss = (
                terms["pair"]
                + args.kl_coef * terms.get("kl", 0)
                + args.nll_coef * terms.get("nll", 0)
            )
            loss.backward()
            losses.update(
                {"total": loss.item(), **{name: term.item() for name, term in terms.items()}}
            )
            tokens += batch.target_ids.numel()

        # ------------------------------------------------------------------------------------------- optimiser step
        grad_norm = torch.nn.utils.clip_grad_norm_(student.model.parameters(), args.max_grad_norm)
        if not math.isfinite(losses["total"] + grad_norm):
            ids, what = (
                [example.row["id"] for example in drawn],
                f"loss {losses['total']}, gradient norm {grad_norm}",
            )
            stop(f"{what} in step {step} on rows {ids}; {run} keeps the checkpoint before it")
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()

        # -------------------------------------------------------------------------------- log, evaluate, checkpoint
        done, row = step + 1, {}
        seconds += time.time() - tick
        if done % args.log_every == 0 or done == total_steps:
            row = {f"losses/{name}": value for name, value in losses.items()}
            row |= {
                "charts/learning_rate": scheduler.get_last_lr()[0],
                "charts/grad_norm": grad_norm.item(),
            }
            row |= {
                "charts/epoch": done / steps_per_epoch,
                "charts/tokens_per_second": tokens / seconds,
            }
            row["charts/tokens"] = (
                tokens / (done - first_step) * done
            )  # of the whole run, also when it was resumed
        if done % args.eval_every == 0 or done == total_steps:
            row["eval/accuracy"] = evaluate()["all"][0]
        if row:
            with metrics.open("a") as file:
                file.write(json.dumps({"step": done, **row}) + "\n")
            for key, value in row.items() if args.track != "none" else ():
                tracker.add_scalar(key, value, done)
        if done % args.save_every == 0 or done == total_steps:
            save_checkpoint(run / "checkpoint.pt", done, **parts)

    # ------------------------------------------------------------------------------------------------------ results
    after = evaluate(everything)
    if student.tokenizer.pad_token_id in (
        None,
        *student.end_ids,
    ):  # transformers reads r at the last token but padding
        student.tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
        student.model.resize_token_embeddings(len(student.tokenizer), mean_resizing=False)
    student.model.config.num_labels, student.config.pad_token_id = 1, student.tokenizer.pad_token_id
    with clearly(f"write {run / 'model'}"):
        student.model.save_pretrained(run / "model")
        student.tokenizer.save_pretrained(run / "model")
    memory = (
        torch.cuda.max_memory_allocated()
        if device.type == "cuda"
        else 1024 * resource.getrusage(0).ru_maxrss
    )
    summary = {
        "accuracy_before": before["all"][0],
        "accuracy_after": after["all"][0],
        "accuracy": after,
        "best_of_n_reward": after[pool][0] if args.best_of else None,
        "seconds": time.time() - started,
        "tokens_per_second": tokens / max(seconds, 1e-9),
        "peak_memory_bytes": memory,
        "seed": args.seed,
        "device": str(device),
        **{
            name: importlib.metadata.version(name)
            for name in ("torch", "transformers", "datasets", "tyro")
        },
    }
    (run / "summary.json").write_text(json.dumps(summary, indent=1))
    for name, (share, error, count) in after.items():
        print(f"{name:<32}{count:>6} rows   {before[name][0]:.3f} → {share:.3f} ± {error:.3f}")
    print(
        "\n"
        + ", ".join(
            f"{name} {value:.4g}" for name, value in summary.items() if isinstance(value, float)
        )
    )
    print(f"everything is in {run}, the model in {run / 'model'}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except OSError as error:  # a full disk, a folder without permission
        stop(
            f"{error}; complete stages and checkpoints are kept: --resume the run when this is mended"
        )
