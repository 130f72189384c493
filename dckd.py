"""DCKD: Dual-Constrained Knowledge Distillation (Gao et al., ICLR 2025, arXiv 2502.17927).

The student π_θ imitates an aligned teacher's next-token distributions on both answers of a preference pair, the chosen
y_w and the rejected y_l, and learns the chosen one (forward KL, full vocabulary, temperature 1):

    L = −(1/|y_w|) Σ_t log π_θ(y_w,t|s_t) + Σ_{y in (y_w, y_l)} (α_y/|y|) Σ_t KL( π_teacher(·|s_t) ‖ π_θ(·|s_t) ).

α_l = 0 is vanilla knowledge distillation, α_w = α_l = 0 is SFT on the chosen answers: `--kl_rejected 0 --kl_chosen 0`.

Stages: (1) training; (2) evaluation. ADPA+ starts from the result: `python adpa.py --student runs/<this run>/model`.
Simplified: one GPU; the teacher is scored live. The paper's code distils its 50 likeliest tokens and a bin for all
others (`--top_k 50`), and never the end-of-turn token: docs/dckd.md lists all departures.

    python dckd.py                                          # the playground: a CPU, less than a minute
    python dckd.py --student allenai/OLMo-2-0425-1B-SFT --teacher allenai/OLMo-2-1124-7B-DPO --learning_rate 5e-7 \\
        --data argilla/dpo-mix-7k --eval_data argilla/dpo-mix-7k --max_prompt_tokens 1024 --max_response_tokens 1024 \\
        --num_epochs 3 --batch_size 128 --micro_batch_size 4 --reward <reward model>                  # one GPU
"""

import importlib.metadata
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

from common import (
    LM,
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
    learning_rate: float = 1e-3
    """of AdamW (playground; the paper and its code: 5e-7)"""
    kl_chosen: float = 0.1
    """α_w, weight of the KL on the chosen answer (released code: 0.1; the paper's sweep is best at 0.2)"""
    kl_rejected: float = 0.1
    """α_l, weight of the KL on the rejected answer (released code: 0.1; the paper's sweep is best at 0.2)"""
    top_k: int = 0
    """KL over the teacher's k likeliest tokens and one bin for all others (released code: 50); 0 takes all tokens"""


# ------------------------------------------------------------------------------------------------------- mathematics
def forward_kl(
    teacher_log_probs: torch.Tensor, student_log_probs: torch.Tensor, top_k: int = 0
) -> torch.Tensor:
    """[N]: KL(π_teacher(·|s) ‖ π_θ(·|s)) of every state, from [N, V] and [N, V]. With `top_k` it is taken over k + 1
    events: the teacher's k likeliest tokens, and any other."""
    if 0 < top_k < teacher_log_probs.shape[-1]:
        likeliest = teacher_log_probs.topk(top_k).indices  # [N, k]
        teacher_log_probs = with_rest(teacher_log_probs.gather(-1, likeliest))
        student_log_probs = with_rest(student_log_probs.gather(-1, likeliest))
    probs = teacher_log_probs.exp()
    terms = probs * (teacher_log_probs - student_log_probs)
    return terms.masked_fill(probs == 0, 0.0).sum(-1)  # p log p is 0 at p = 0; computed it is NaN


def with_rest(log_probs: torch.Tensor) -> torch.Tensor:
    """[N, k + 1] from [N, k]: appends the log-prob of all other tokens, log(1 − Σ_k p_k). A sum that rounds to 1 leaves
    the smallest step below 1 instead of nothing, whose logarithm would be −inf."""
    rest = (1 - log_probs.exp().sum(-1, keepdim=True)).clamp(min=torch.finfo(log_probs.dtype).eps)
    return torch.cat([log_probs, rest.log()], dim=-1)


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
    run = Path(args.resume or args.output_dir or f"runs/dckd__{args.seed}__{int(started)}")
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
    examples = make_examples(
        student, read_rows(args.data, args.data_split), ("chosen", "rejected"), *limits
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
    seconds, tokens = 0.0, 0
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
                micro, student, teacher
            )  # two responses of every example: chosen, rejected
            scored = [(lm, lm.hidden_states(batch)[batch.source]) for lm in (student, teacher)]
            logps, kls = per_token(
                lambda ids, ours, theirs: (
                    target_logps(ids, ours),
                    forward_kl(theirs, ours, args.top_k),
                ),
                *(batch.target_ids, scored, vocab_size, args.logits_chunk),
            )
            nll = -response_means(logps, batch.response_of, batch.lengths).view(-1, 2)  # [B, 2]
            kl = response_means(kls, batch.response_of, batch.lengths).view(-1, 2)  # [B, 2]

            terms = {"sft": nll[:, 0], "kl_chosen": kl[:, 0], "kl_rejected": kl[:, 1]}
            terms = {name: term.sum() / len(drawn) for name, term in terms.items()}
            loss = (
                terms["sft"]
                + args.kl_chosen * terms["kl_chosen"]
                + args.kl_rejected * terms["kl_rejected"]
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
