"""PAD: Preference-Aligned Distillation (ACL Findings 2025, arXiv 2502.14272).

The student π_θ answers every prompt n times and learns how its teacher ranks the answers. Scores s of n answers give a
ranking τ, best first, the probability P(τ) = Π_k exp(β s_τ(k)) / Σ_{j≥k} exp(β s_τ(j)) (Plackett-Luce). The student's
score is its average log-prob (1/|y|) Σ_t log π_θ(y_t|s_t); the teacher's is α times its own plus (1 − α) s_mcq: asked
which of two answers is better, A or B, it gives each a probability, and s_mcq is the log of an answer's mean of those.

    PPD:  L = JSD(P_student, P_teacher) = ½ KL(P_student ‖ M) + ½ KL(P_teacher ‖ M),  M = ½ (P_student + P_teacher)
    VPD:  L = −log P_student(τ*),  τ* the teacher's ranking

Stages: (1) the student answers, `samples_1.jsonl`; (2) the teacher scores, `scores_1.jsonl`; (3) training; evaluation.
`--rounds k` does so k times with n/k answers of the newest student. Any tokenizer of the teacher will do. One GPU.

    python pad.py                                           # the playground: a CPU, less than a minute
    python pad.py --student google/gemma-2-2b-it --teacher google/gemma-2-9b-it --data trl-lib/ultrafeedback-prompt \\
        --eval_data trl-lib/ultrafeedback-prompt --max_rows 0 --num_epochs 1 --batch_size 128 --micro_batch_size 2 \\
        --max_response_tokens 1024 --learning_rate 8e-7 --beta 10 --alpha 0 --reward <reward model>      # one GPU
"""

import importlib.metadata
import itertools
import json
import math
import resource
import shutil
import statistics
import time
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import tyro
from tqdm import tqdm
from transformers import get_cosine_schedule_with_warmup

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
    eval_data: str = "playground/data/test.jsonl"
    """held-out rows, of which only the prompts are used"""
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
    """held-out prompts per evaluation, one answer each"""
    eval_temperature: float = 1.0
    """temperature of the evaluation's answers; 0 is greedy"""
    sample_batch_size: int = 256
    """answers sampled at a time"""

    # method
    learning_rate: float = 3e-3
    """of AdamW (playground; released code: 8e-7)"""
    loss: Literal["ppd", "vpd"] = "ppd"
    """distance of the distributions over rankings, or the teacher's ranking alone (paper: both, ppd is the main one)"""
    beta: float = 2.0
    """β, sharpness of both distributions (playground; released code: 10)"""
    scores: str = ""
    """scores_1.jsonl of another run or program, in place of --data and of stages 1 and 2 (columns: docs/pad.md)"""
    alpha: float = 0.9
    """α, weight of the average log-prob in the teacher's score; 1 drops the filter (playground; released code: 0)"""
    num_answers: int = 4
    """n, answers to learn from per prompt, in all rounds together (released code: 4)"""
    rounds: int = 1
    """k, rounds of n/k answers by the newest student, which share the --num_epochs (paper, section 4.4)"""
    num_samples: int = 5
    """answers sampled per prompt in a round, of which the most different are kept (released code: 5)"""
    sample_temperature: float = 1.0
    """of these answers (released code: 1, from a nucleus of 0.95; paper: 0.8)"""
    swap_order: bool = False
    """ask about two answers in both orders, against the judge's position bias (ours; paper and code: one order)"""
    max_rows: int = 1400
    """the first rows of --data, whose prompts are used (playground); 0 takes all"""


JUDGE = "Request: {prompt}\nAnswer A: {a}\nAnswer B: {b}\nWhich answer is better? Reply with A, B or None."


# ------------------------------------------------------------------------------------------------------ mathematics
def edit_distance(a, b) -> int:
    """The fewest insertions, deletions and replacements that turn one sequence into the other (Levenshtein)."""
    row = list(range(len(b) + 1))  # from nothing to the first j of b
    for i, item in enumerate(a, 1):
        best = [
            min(row[j] + (item != other), row[j + 1] + 1) for j, other in enumerate(b)
        ]  # keep, replace or delete
        row = list(
            itertools.accumulate(best, lambda left, other: min(left + 1, other), initial=i)
        )  # or insert
    return row[-1]


def most_different(sequences: list, n: int) -> list:
    """n of them, if there are so many: the first, then each time the one whose nearest taken one is farthest."""
    taken = sequences[:1]
    for _ in sequences[1:n]:
        taken.append(
            max(sequences, key=lambda one: min(edit_distance(one, other) for other in taken))
        )
    return taken


def judgements(
    p_a: torch.Tensor, p_b: torch.Tensor, pairs: list[tuple[int, int]], n: int
) -> torch.Tensor:
    """[B, n]: s_mcq(i) = log( (1e-8 + Σ_{pairs∋i} p(i)) / (n − 1) ) from p(A) and p(B) [B, pairs], where `pairs` says
    which answers were A and B. If both orders of two answers are among them, p(i) is the mean of both."""
    a, b = torch.tensor(pairs, device=p_a.device).unbind(-1)
    sums = p_a.new_zeros(len(p_a), n).index_add(1, a, p_a).index_add(1, b, p_b)
    return ((1e-8 + sums * math.comb(n, 2) / len(pairs)) / (n - 1)).log()


def ranking_logps(scores: torch.Tensor) -> torch.Tensor:
    """[B, n!]: log P(τ) = Σ_k [s_τ(k) − log Σ_{j≥k} exp(s_τ(j))] of all rankings of scores [B, n], theirs first."""
    ranked = scores[:, list(itertools.permutations(range(scores.shape[1])))]  # [B, n!, n]
    return (ranked - ranked.flip(-1).logcumsumexp(-1).flip(-1)).sum(-1)


def ppd(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """[B]: JSD of the distributions over rankings that scores [B, n] and [B, n] define, between 0 and log 2."""
    ours, theirs = ranking_logps(student), ranking_logps(teacher)  # [B, n!]
    mixture = torch.logaddexp(ours, theirs) - math.log(2)
    return (ours.exp() * (ours - mixture) + theirs.exp() * (theirs - mixture)).sum(-1) / 2


def vpd(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """[B]: −log P_student(τ*), τ* the descending order of the teacher's scores; from [B, n] and [B, n]."""
    return -ranking_logps(student.gather(-1, teacher.argsort(-1, descending=True)))[:, 0]


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
    run = Path(args.resume or args.output_dir or f"runs/pad__{args.seed}__{int(started)}")
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
    n = args.num_answers // max(args.rounds, 1)  # answers of a prompt in a round
    if not 2 <= n <= 6 or n * args.rounds != args.num_answers:
        stop(
            f"--num_answers {args.num_answers} / --rounds {args.rounds} must be 2 to 6 (n! rankings): try more rounds"
        )
    if args.num_samples < n or args.alpha > 1:
        stop(
            f"--num_samples {args.num_samples} must be at least {n}, --alpha {args.alpha} at most 1"
        )
    with clearly(f"use --device {args.device}"):
        device = torch.empty(
            0, device=args.device or ("cuda" if torch.cuda.is_available() else "cpu")
        ).device
    student = LM(args.student, device, True, args.gradient_checkpointing, args.trust_remote_code)
    teacher = LM(args.teacher, device, remote_code=args.trust_remote_code)
    judge = common.load_reward(args.reward, device, args.trust_remote_code)
    limits = args.max_prompt_tokens, args.max_response_tokens
    prompts = read_rows(args.scores or args.data, args.data_split, ())[: args.max_rows or None]
    prompts = [example.row for example in make_examples(student, prompts, (), *limits)]
    held_out = make_examples(student, read_rows(args.eval_data, args.eval_split, ()), (), *limits)
    held_out = [example.row for example in held_out[: args.eval_prompts]]
    if args.overwrite and run.resolve() in Path(args.scores).resolve().parents:
        stop(f"--overwrite would remove --scores {args.scores}; choose another --output_dir")
    if args.overwrite:  # only now: a run that cannot start replaces nothing
        shutil.rmtree(run, ignore_errors=True)
    run.mkdir(parents=True, exist_ok=True)
    (run / "args.json").write_text(json.dumps(vars(args), indent=1))

    # ----------------------------------------------------------------------------------------- sampling, evaluation
    def answer(lm: LM, temperature: float, rows: list[dict], number: int) -> list[dict]:
        """One answer {"text", "finished"} of `lm` to the prompt of every row; `number` is the first row's."""
        prompts = [lm.encode(row["prompt"])[0] for row in rows]
        how = {
            "temperature": temperature,
            "max_new_tokens": args.max_response_tokens,
            "seed": args.seed + number,
        }
        return [
            answers[0] for answers in lm.sample(prompts, batch_size=args.sample_batch_size, **how)
        ]

    def evaluate(lm: LM, rows: list[dict] = held_out, number: int = 0) -> list[dict]:
        """The same on held-out prompts, with the judge's reward."""
        answers = answer(lm, args.eval_temperature, rows, number)
        rewards = judge([row["prompt"] for row in rows], [answer["text"] for answer in answers])
        return [{**answer, "reward": reward} for answer, reward in zip(answers, rewards)]

    def mean_reward(answers: list[dict]) -> float:
        return statistics.mean(answer["reward"] for answer in answers)

    before = stage(
        run / "eval_before.jsonl", held_out, partial(evaluate, student), args.sample_batch_size
    )
    aligned = stage(
        run / "eval_teacher.jsonl", held_out, partial(evaluate, teacher), args.sample_batch_size
    )

    # ------------------------------------------------------------- stages 1 and 2 of a round: answers and their scores
    def sample(turn: int, rows: list[dict], number: int) -> list[dict]:
        """Of `num_samples` answers to the prompt of every row the n most different; fewer if there are not so many."""
        how = {
            "n": args.num_samples,
            "temperature": args.sample_temperature,
            "batch_size": args.sample_batch_size,
        }
        how |= {
            "max_new_tokens": args.max_response_tokens,
            "seed": args.seed + turn * len(prompts) + number,
        }
        several = student.sample([student.encode(row["prompt"])[0] for row in rows], **how)
        texts = [
            {tuple(student.tokenizer(said["text"]).input_ids): said for said in answers}
            for answers in several
        ]
        return [
            {"answers": [said[text] for text in most_different(list(said), n)]} for said in texts
        ]

    def average_logps(lm: LM, examples: list[Example]) -> torch.Tensor:
        """[B, n]: (1/|y|) Σ_t log p(y_t|s_t) of n answers each. A token that the model excludes does not make it −∞."""
        batch = pack(examples, lm)
        scored = [(lm, lm.hidden_states(batch)[batch.source])]
        logps = common.per_token(
            common.target_logps, batch.target_ids, scored, lm.vocab_size, args.logits_chunk
        )
        return common.response_means(logps.clamp(min=-1e4), batch.response_of, batch.lengths).view(
            -1, n
        )

    pairs = list(
        (itertools.permutations if args.swap_order else itertools.combinations)(range(n), 2)
    )
    letters = [
        [i for i in range(teacher.vocab_size) if teacher.tokenizer.decode([i]).strip() == x]
        for x in "AB"
    ]

    def weigh(rows: list[dict], _) -> list[dict]:
        """What the teacher said of answers, with the score that this run's α makes of it."""
        kept = ("answers", "average_logp", "judgement", "p_a", "p_b")
        with clearly(f"rank answers by the columns {kept} of {args.scores or 'stage 2'}"):
            rows = [{name: row[name] for name in kept} for row in rows]
            for row in rows:
                said = zip(row["average_logp"], row["judgement"], row["answers"], strict=True)
                row["score"] = [
                    args.alpha * logp + (1 - args.alpha) * math.log(judged)
                    for logp, judged, _ in said
                ]
        return rows

    def ask(rows: list[dict], number: int) -> list[dict]:
        """Of every answer the average log-prob, exp(s_mcq) and score; of every question p(A) and p(B)."""
        questions = []
        for row in rows:
            request, texts = (
                "\n".join(t["content"] for t in row["prompt"]),
                [said["text"] for said in row["answers"]],
            )
            questions += [JUDGE.format(prompt=request, a=texts[a], b=texts[b]) for a, b in pairs]
        ids = [teacher.encode([{"role": "user", "content": question}])[0] for question in questions]
        batch = pack([Example({}, question[:-1], [question[-1:]]) for question in ids], teacher)
        probs = teacher.logits(
            teacher.hidden_states(batch)[batch.last], teacher.vocab_size
        ).softmax(-1)  # [B·pairs, V]
        p_a, p_b = (
            probs[:, tokens].sum(-1).view(len(rows), -1) for tokens in letters
        )  # [B, pairs]
        logps = average_logps(
            teacher, [Example(row, *teacher.encode(row["prompt"], row["answers"])) for row in rows]
        )
        said = {
            "average_logp": logps,
            "judgement": judgements(p_a, p_b, pairs, n).exp(),
            "p_a": p_a,
            "p_b": p_b,
        }
        return weigh(
            [row | {k: v[i].tolist() for k, v in said.items()} for i, row in enumerate(rows)],
            number,
        )

    def make_round(turn: int) -> tuple[list[Example], dict[str, float]]:
        """The examples of a round, and what is logged of the judge."""
        rows, score = (
            prompts,
            weigh if args.scores and turn == 1 else ask,
        )  # --scores has answers and what was said
        if score is ask:
            rows = stage(
                run / f"samples_{turn}.jsonl",
                prompts,
                partial(sample, turn),
                args.sample_batch_size,
            )
        rows = [row for row in rows if len(row.get("answers", ())) == n]
        rows = stage(run / f"scores_{turn}.jsonl", rows, score, args.micro_batch_size // n or 1)
        kept = [
            row
            for row in rows
            if args.alpha == 1 or min(row["judgement"]) <= 0.5 < max(row["judgement"])
        ]
        p_a, p_b = (
            torch.tensor([p for row in rows for p in row[name]]).mean().item()
            for name in ("p_a", "p_b")
        )
        judged = {
            "mass": round(p_a + p_b, 4),
            "p_a": round(p_a, 4),
            "kept": len(kept) / len(prompts),
        }
        print(
            f"round {turn}: {n} answers differ for {len(rows)} of {len(prompts)} prompts, {len(kept)} kept; {judged}"
        )
        kept = [row | dict(enumerate(row["answers"])) for row in kept]
        return make_examples(student, kept, range(n), *limits), {
            f"charts/judge_{k}": v for k, v in judged.items()
        }

    examples, judged = make_round(1)

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
    seconds, tokens, distance = 0.0, 0, {"ppd": ppd, "vpd": vpd}[args.loss]
    for step in tqdm(
        range(first_step, total_steps), initial=first_step, total=total_steps, desc="training"
    ):
        turn, place = divmod(step, math.ceil(total_steps / args.rounds))
        if turn and (place == 0 or step == first_step):
            save_checkpoint(run / "checkpoint.pt", step, **parts)  # of the student that answers now
            examples, judged = make_round(turn + 1)
        tick, losses = time.time(), Counter()
        epoch, place = divmod(place, math.ceil(len(examples) / args.batch_size))
        order = torch.randperm(
            len(examples), generator=torch.Generator().manual_seed(args.seed + epoch)
        ).tolist()
        drawn = [
            examples[i] for i in order[place * args.batch_size : (place + 1) * args.batch_size]
        ]
        for start in range(0, len(drawn), args.micro_batch_size):
            micro = drawn[start : start + args.micro_batch_size]
            ours = average_logps(student, micro)  # [B, n]
            theirs = torch.tensor([example.row["score"] for example in micro]).to(ours)  # [B, n]
            loss = distance(args.beta * ours, args.beta * theirs).sum() / len(drawn)
            loss.backward()
            losses.update({"total": loss.item()})
            tokens += sum(len(response) for example in micro for response in example.responses)

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
            row |= judged
        if done % args.eval_every == 0 or done == total_steps:
            row["eval/reward"] = mean_reward(evaluate(student))
        if row:
            with metrics.open("a") as file:
                file.write(json.dumps({"step": done, **row}) + "\n")
            for key, value in row.items() if args.track != "none" else ():
                tracker.add_scalar(key, value, done)
        if done % args.save_every == 0 or done == total_steps:
            save_checkpoint(run / "checkpoint.pt", done, **parts)

    # ------------------------------------------------------------------------------------------------------ results
    after = stage(
        run / "eval_after.jsonl", held_out, partial(evaluate, student), args.sample_batch_size
    )
    with clearly(f"write {run / 'model'}"):
        student.model.save_pretrained(run / "model")
        student.tokenizer.save_pretrained(run / "model")
    wins = [
        (new["reward"] > old["reward"]) + (new["reward"] == old["reward"]) / 2
        for new, old in zip(after, before)
    ]
    memory = (
        torch.cuda.max_memory_allocated()
        if device.type == "cuda"
        else 1024 * resource.getrusage(0).ru_maxrss
    )
    summary = {
        "reward_before": mean_reward(before),
        "reward_after": mean_reward(after),
        "reward_teacher": mean_reward(aligned),
        "win_rate": statistics.mean(wins),
        "win_rate_stderr": statistics.pstdev(wins) / len(wins) ** 0.5,
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
    answers = [
        {"before": old, "after": new, "teacher": best}
        for old, new, best in zip(before, after, aligned)
    ]
    (run / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in answers))
    for sample in answers[:4]:
        print(f"\n{sample['before']['prompt'][-1]['content']}")
        for name, said in sample.items():
            print(f"  {name:<8}{said['reward']:6.2f}   {said['text']}")
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
