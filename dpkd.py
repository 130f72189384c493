"""DPKD: Direct Preference Knowledge Distillation (Li et al., 2024, arXiv 2406.19774).

The student q_θ learns to prefer the teacher's answer y_t over its own answer y_s to a prompt x. Its implicit reward is
measured from the teacher p, which takes the place of DPO's reference (equation 9, Algorithm 1):

    r(x, y) = (β/|y|) log [ q_θ(y|x) / p(y|x) ],    L = −log σ( r(x, y_t) − r(x, y_s) ) + λ L_LM.

y_t is sampled from p, once. y_s must come from the current student: then q_θ = p is a stationary point. With old y_s
the loss falls for ever while y_s becomes impossible, and the mass goes to answers that are neither y_t nor y_s: the
collapse (`--refresh_every 0` shows it). L_LM is the language-model loss on a text corpus (`--lm_data`).

Stages: (1) the teacher answers every prompt, `teacher_answers.jsonl`; (2) training; (3) evaluation. Simplified: one
GPU, the teacher scored live, one sampling of y_s for some steps. The paper's code samples nothing: see docs/dpkd.md.

    python dpkd.py                                          # the playground: a CPU, less than a minute
    python dpkd.py --student allenai/OLMo-2-0425-1B-SFT --teacher allenai/OLMo-2-1124-7B-DPO --learning_rate 1e-6 \\
        --data argilla/dpo-mix-7k --eval_data argilla/dpo-mix-7k --max_prompt_tokens 1024 --max_response_tokens 1024 \\
        --batch_size 128 --micro_batch_size 4 --sample_batch_size 64 --reward <reward model>          # one GPU
"""

import importlib.metadata
import json
import math
import random
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
import torch.nn.functional as F
import tyro
from tqdm import tqdm
from transformers import get_cosine_schedule_with_warmup

from common import (
    LM,
    Example,
    clearly,
    load_checkpoint,
    load_reward,
    make_examples,
    pack,
    per_token,
    read_rows,
    response_means,
    save_checkpoint,
    shared_vocab,
    stage,
    stop,
    target_logps,
)

WATCHED = ("eval/logp_teacher_answers", "eval/logp_student_answers")
COLLAPSE = 1.0  # nats per token: when the second falls by more and the first falls too, third answers took the mass


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
    learning_rate: float = 2e-3
    """of AdamW (playground; released code: 5e-4 for a GPT-2 of 120M; the paper gives none)"""
    beta: float = 1.0
    """β, scale of the implicit reward (playground; released code: 0.1; the paper gives none)"""
    length_normalize: bool = True
    """divide both log-ratios by their answers' lengths (equation 9; paper, table 3: worse without)"""
    refresh_every: int = 4
    """optimiser steps that one sampling of y_s serves; 0 samples all of them from the initial student (playground)"""
    teacher_answers: int = 0
    """prompts of --data that the teacher answers and training uses, if not all (0)"""
    sft_coef: float = 0.0
    """weight of the cross-entropy on y_t (released code: 0.5; the paper: none)"""
    lm_data: str = ""
    """corpus of L_LM, a column `text` in a .jsonl, .json, .parquet or .txt file or a hub id; "" leaves L_LM out"""
    lm_split: str = "train"
    """split of --lm_data where it has several"""
    lm_coef: float = 1.0
    """λ, weight of L_LM (the paper gives none; 1 is plain addition)"""


# ------------------------------------------------------------------------------------------------------- mathematics
def implicit_rewards(
    student_logps, teacher_logps, response_of, lengths, beta: float, length_normalize: bool
):
    """[R]: r(x, y) = (β/|y|) log [ q_θ(y|x) / p(y|x) ] (inside equation 9's sigmoid), from the log-probs [N] of tokens
    under both models, response_of [N] and lengths [R]; without normalisation β log [ q_θ(y|x) / p(y|x) ]."""
    log_ratios = student_logps - teacher_logps  # [N]
    excluded = (
        student_logps.isneginf() | teacher_logps.isneginf()
    )  # probability 0: no finite ratio to learn from
    means = response_means(log_ratios.masked_fill(excluded, 0.0), response_of, lengths)  # [R]
    return beta * (means if length_normalize else means * lengths)


def preference_loss(rewards: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """([B], [B]): −log σ(margin) and the margin r(x, y_t) − r(x, y_s) (equation 9), from rewards [2·B], y_t first."""
    teacher_rewards, student_rewards = rewards.view(-1, 2).unbind(1)
    margins = teacher_rewards - student_rewards
    return -F.logsigmoid(margins), margins


# ---------------------------------------------------------------------------------------- corpus, answers that wait
def read_corpus(lm: LM, source: str, split: str, size: int) -> list[Example]:
    """Documents in pieces of `size` tokens, each an example whose prompt is its first token. Special tokens written in
    a corpus are read as such, so that it may hold conversations; begin and end of a document come once."""
    from datasets import load_dataset  # a second of import time

    file, end, pieces = Path(source), lm.end_ids[:1], []
    where = (
        {"path": str(file.parent), "data_files": file.name} if file.is_file() else {"path": source}
    )
    with clearly(f"read a column text from --lm_data {source} (split {split})"):
        for ids in lm.tokenizer(
            list(load_dataset(**where, split=split)["text"]), add_special_tokens=False
        ).input_ids:
            ids = lm.bos * (ids[:1] != lm.bos) + ids + end * (ids[-1:] != end)
            pieces += [ids[start : start + size] for start in range(0, len(ids), size)]
    return [Example({}, ids[:1], [ids[1:]]) for ids in pieces if ids[1:]] or stop(
        f"--lm_data {source} holds no text"
    )


class Waiting(list):
    """Token ids of the y_s that wait for their steps: part of a checkpoint, because earlier weights wrote them."""

    state_dict, load_state_dict = list.copy, list.extend


# ------------------------------------------------------------------------------------------------------------- main
def main(args: Args):
    # ----------------------------------------------------------------------------------------------- the run folder
    for name, value in vars(args).items():
        least = (
            1
            if name.endswith(("_size", "_epochs", "_every", "_tokens", "_prompts", "_chunk"))
            else 0
        )
        least = 0 if name == "refresh_every" else least
        if type(value) in (int, float) and not least <= value < math.inf:
            stop(f"--{name} {value} must be a number of at least {least}")
    started = time.time()
    run = Path(args.resume or args.output_dir or f"runs/dpkd__{args.seed}__{int(started)}")
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
    teacher = LM(args.teacher, device, remote_code=args.trust_remote_code)
    vocab_size = shared_vocab(student, teacher)
    judge = load_reward(args.reward, device, args.trust_remote_code)
    limits = args.max_prompt_tokens, args.max_response_tokens
    prompts = make_examples(student, read_rows(args.data, args.data_split, ()), (), *limits)
    rows = [example.row for example in prompts[: args.teacher_answers or None]]
    corpus = (
        read_corpus(student, args.lm_data, args.lm_split, args.max_response_tokens)
        if args.lm_data
        else []
    )
    held_out = make_examples(student, read_rows(args.eval_data, args.eval_split, ()), (), *limits)
    held_out = [example.row for example in held_out[: args.eval_prompts]]
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

    # ------------------------------------------------------------------------------ stage 1: y_t; log q of answers
    answers = stage(
        run / "teacher_answers.jsonl", rows, partial(answer, teacher, 1.0), args.sample_batch_size
    )
    examples = make_examples(
        student, [{**answer, "y_t": answer} for answer in answers], ("y_t",), *limits
    )

    def encoded(row: dict, *answers: dict) -> Example:
        """A prompt with sampled answers; one that never ended is no longer as text than it was as a sample."""
        prompt, responses = student.encode(row["prompt"], answers)
        return Example(
            row,
            prompt,
            [r[: None if a["finished"] else limits[1]] for r, a in zip(responses, answers)],
        )

    def mean_logps(examples: list[Example]) -> torch.Tensor:
        """[R]: (1/|y|) log q_θ(y|x) of the examples' responses."""
        batch = pack(examples, student)
        scored = [(student, student.hidden_states(batch)[batch.source])]
        logps = per_token(target_logps, batch.target_ids, scored, vocab_size, args.logits_chunk)
        return response_means(logps, batch.response_of, batch.lengths)

    @torch.no_grad()
    def watch() -> dict[str, float]:
        """Its mean over answers to held-out prompts that never change, the teacher's and the untrained student's."""
        fixed, size = (
            [p for p in map(encoded, held_out, aligned, before) if all(p.responses)],
            args.micro_batch_size,
        )
        means = torch.cat(
            [mean_logps(fixed[start : start + size]) for start in range(0, len(fixed), size)]
        )
        return dict(zip(WATCHED, means.view(-1, 2).mean(0).tolist()))

    at_start = watch()  # before any checkpoint is loaded

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
    waiting = parts["waiting"] = Waiting()
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
    if first_step == 0:
        metrics.write_text(
            json.dumps({"step": 0, "eval/reward": mean_reward(before), **at_start}) + "\n"
        )

    def draw(step: int) -> list[Example]:
        epoch, place = divmod(step, steps_per_epoch)
        order = torch.randperm(
            len(examples), generator=torch.Generator().manual_seed(args.seed + epoch)
        ).tolist()
        return [examples[i] for i in order[place * args.batch_size : (place + 1) * args.batch_size]]

    seconds, tokens, sampling_seconds, sampled_tokens, warned = 0.0, 0, 0.0, 0, False
    refresh_every = args.refresh_every or total_steps
    for step in tqdm(
        range(first_step, total_steps), initial=first_step, total=total_steps, desc="training"
    ):
        # ------------------------------------------------ y_s of this step and the next ones, by the current student
        tick, asked = time.time(), draw(step)
        if step % refresh_every == 0:
            ahead = [
                example.row
                for s in range(step, min(step + refresh_every, total_steps))
                for example in draw(s)
            ]
            waiting[:] = [
                said.responses[0] for said in map(encoded, ahead, answer(student, 1.0, ahead, step))
            ]
            sampled_tokens += sum(map(len, waiting))
        drawn = [
            Example(row, prompt, [*y_t, y_s])
            for (row, prompt, y_t), y_s in zip(asked, waiting)
            if y_s
        ]
        del waiting[
            : len(asked)
        ]  # a y_s without tokens said nothing and did not end: it is left out
        sampling_seconds += time.time() - tick
        tick, losses = time.time(), Counter()
        texts = random.Random(args.seed + step).choices(corpus, k=len(drawn)) if corpus else []
        for start in range(0, len(drawn), args.micro_batch_size):
            micro = drawn[start : start + args.micro_batch_size]
            batch = pack(micro, student, teacher)  # two responses of every example: y_t, y_s
            scored = [(lm, lm.hidden_states(batch)[batch.source]) for lm in (student, teacher)]
            logps = per_token(
                lambda ids, ours, theirs: (target_logps(ids, ours), target_logps(ids, theirs)),
                *(batch.target_ids, scored, vocab_size, args.logits_chunk),
            )
            rewards = implicit_rewards(
                *logps, batch.response_of, batch.lengths, args.beta, args.length_normalize
            )
            preference, margins = preference_loss(rewards)  # [B], [B]
            nll = -response_means(logps[0], batch.response_of, batch.lengths).view(-1, 2)  # [B, 2]

            terms = {"preference": preference, "margin": margins, "sft": nll[:, 0]}
            if corpus:
                terms["lm"] = -mean_logps(texts[start : start + args.micro_batch_size])
            terms = {name: term.sum() / len(drawn) for name, term in terms.items()}
            loss = (
                terms["preference"]
                + args.sft_coef * terms["sft"]
                + args.lm_coef * terms.get("lm", 0.0)
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
            row["charts/sampling_share"] = sampling_seconds / (sampling_seconds + seconds)
            row["charts/sampling_tokens_per_second"] = sampled_tokens / max(sampling_seconds, 1e-9)
        if done % args.eval_every == 0 or done == total_steps:
            row["eval/reward"] = mean_reward(evaluate(student))
            row |= watch()
            y_t, y_s = (at_start[key] - row[key] for key in WATCHED)
            if y_s > COLLAPSE and y_t > 0 and not warned:
                falls, warned = (
                    f"log q per token fell by {y_s:.1f} on y_s and {y_t:.1f} on y_t",
                    True,
                )
                tqdm.write(
                    f"warning: {falls} by step {done}, a collapse: sample y_s more often (--refresh_every)"
                )
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
