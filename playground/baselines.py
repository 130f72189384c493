"""Baselines of the papers that no method's script computes: DPO, SimPO, reverse KL. For comparisons, not for use.

    --loss dpo         L = −log σ( β log[π_θ(y_w)/π_ref(y_w)] − β log[π_θ(y_l)/π_ref(y_l)] ), π_ref the initial student
                       (Rafailov et al., NeurIPS 2023, arXiv 2305.18290, equation 7)
    --loss simpo       L = −log σ( (β/|y_w|) log π_θ(y_w) − (β/|y_l|) log π_θ(y_l) − γ ), no reference
                       (Meng et al., NeurIPS 2024, arXiv 2405.14734, equation 6)
    --loss reverse_kl  L = (1/|y|) Σ_t KL( π_θ(·|s_t) ‖ π_teacher(·|s_t) ) on answers y that π_θ has just sampled
                       (the core of MiniLLM, Gu et al., ICLR 2024, arXiv 2306.08543, equation 1)

The KL of every state is exact, a sum over the vocabulary; no gradient goes through the sampling of y, as in on-policy
distillation (GKD, Agarwal et al., ICLR 2024, arXiv 2306.13649, algorithm 1 with λ = 1). What MiniLLM adds, the
long-range part of the gradient with its clipping and mixed sampling, and a language-model term, is left out.

    python -m playground.baselines --loss dpo               # pairs of --data; any file with prompt, chosen, rejected
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
import torch.nn.functional as F
import tyro
from tqdm import tqdm
from transformers import get_cosine_schedule_with_warmup

from common import (
    LM,
    Example,
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
    loss: Literal["dpo", "simpo", "reverse_kl"] = "dpo"
    """which baseline"""
    learning_rate: float = 0.0
    """of AdamW; 0 takes what suits --loss on the playground (DEFAULTS)"""
    beta: float = 0.0
    """β of DPO and SimPO; 0 takes what suits --loss (DEFAULTS: DPO's paper 0.1, SimPO's 2.0 to 2.5)"""
    simpo_gamma: float = 1.0
    """γ, the margin that SimPO asks for (paper: 0.3 to 1.6)"""


DEFAULTS = {  # of a loss, from seeds 101 to 103 of the playground
    "dpo": {"learning_rate": 1e-3, "beta": 1.0},
    "simpo": {"learning_rate": 1e-4, "beta": 2.0},
    "reverse_kl": {"learning_rate": 3e-3},
}


# ------------------------------------------------------------------------------------------------------- mathematics
def dpo_loss(
    student_logps: torch.Tensor, reference_logps: torch.Tensor, beta: float
) -> torch.Tensor:
    """[B]: −log σ(β log[π_θ(y_w)/π_ref(y_w)] − β log[π_θ(y_l)/π_ref(y_l)]) (DPO, equation 7), from the log-probs [2·B]
    of answers, summed over their tokens, chosen before rejected."""
    rewards = beta * (student_logps - reference_logps).view(-1, 2)  # [B, 2]
    return -F.logsigmoid(rewards[:, 0] - rewards[:, 1])


def simpo_loss(mean_logps: torch.Tensor, beta: float, gamma: float) -> torch.Tensor:
    """[B]: −log σ((β/|y_w|) log π_θ(y_w) − (β/|y_l|) log π_θ(y_l) − γ) (SimPO, equation 6), from the log-probs [2·B] of
    answers, averaged over their tokens, chosen before rejected."""
    rewards = beta * mean_logps.view(-1, 2)  # [B, 2]
    return -F.logsigmoid(rewards[:, 0] - rewards[:, 1] - gamma)


def reverse_kl(student_log_probs: torch.Tensor, teacher_log_probs: torch.Tensor) -> torch.Tensor:
    """[N]: KL(π_θ(·|s) ‖ π_teacher(·|s)) = Σ_a π_θ(a|s) (log π_θ(a|s) − log π_teacher(a|s)) of every state (MiniLLM,
    equation 1, one token at a time), from [N, V] and [N, V]."""
    log_ratios = student_log_probs - teacher_log_probs
    log_ratios = log_ratios.masked_fill(
        student_log_probs.isneginf(), 0.0
    )  # p log p is 0 at p = 0; computed it is NaN
    return (student_log_probs.exp() * log_ratios).sum(-1)


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
    run = Path(args.resume or args.output_dir or f"runs/{args.loss}__{args.seed}__{int(started)}")
    if args.resume:  # a run goes on with the flags it began with
        if args != Args(resume=args.resume) or not (run / "args.json").exists():
            stop(
                f"--resume {run} takes the folder of a run, which holds all flags, and no other flag"
            )
        args = Args(**json.loads((run / "args.json").read_text()))
    elif run.exists() and any(run.iterdir()):
        if not (args.overwrite and (run / "args.json").exists()):
            stop(
                f"{run} is not empty; --resume the run in it, --overwrite it, or choose another --output_dir"
            )
        shutil.rmtree(run)
    for name, value in DEFAULTS[args.loss].items():
        setattr(args, name, getattr(args, name) or value)
    run.mkdir(parents=True, exist_ok=True)
    (run / "args.json").write_text(json.dumps(vars(args), indent=1))

    # ---------------------------------------------------------------------------------------------- models and data
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    student = LM(args.student, device, True, args.gradient_checkpointing, args.trust_remote_code)
    teacher = LM(args.teacher, device, remote_code=args.trust_remote_code)
    models = [student] + ([teacher] if args.loss == "reverse_kl" else [])
    if args.loss == "dpo":
        models.append(LM(args.student, device, remote_code=args.trust_remote_code))  # π_ref
    vocab_size = min(shared_vocab(student, lm) for lm in models)
    judge = load_reward(args.reward, device, args.trust_remote_code)
    limits = args.max_prompt_tokens, args.max_response_tokens
    columns = () if args.loss == "reverse_kl" else ("chosen", "rejected")
    examples = make_examples(
        student, read_rows(args.data, args.data_split, columns), columns, *limits
    )
    held_out = make_examples(student, read_rows(args.eval_data, args.eval_split, ()), (), *limits)
    held_out = [example.row for example in held_out[: args.eval_prompts]]

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
    logged = metrics.read_text().splitlines(keepends=True) if first_step else []
    metrics.write_text("".join(line for line in logged if json.loads(line)["step"] <= first_step))
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
        if args.loss == "reverse_kl":  # y, sampled by the student of this very step
            said = answer(student, 1.0, [example.row for example in drawn], step)
            drawn = [
                Example(row, *student.encode(row["prompt"], [y]))
                for (row, _, _), y in zip(drawn, said)
            ]
            drawn = [
                example for example in drawn if example.responses[0]
            ]  # not one that said nothing and did not end
        for start in range(0, len(drawn), args.micro_batch_size):
            micro = drawn[start : start + args.micro_batch_size]
            batch = pack(
                micro, *models
            )  # two responses of every example, chosen and rejected; or y alone
            scored = [(lm, lm.hidden_states(batch)[batch.source]) for lm in models]
            if args.loss == "reverse_kl":
                kls = per_token(
                    lambda _, ours, theirs: reverse_kl(ours, theirs),
                    *(batch.target_ids, scored, vocab_size, args.logits_chunk),
                )
                term = response_means(kls, batch.response_of, batch.lengths)  # [B]
            else:
                logps = per_token(
                    lambda ids, *log_probs: tuple(
                        target_logps(ids, values) for values in log_probs
                    ),
                    *(batch.target_ids, scored, vocab_size, args.logits_chunk),
                )
                means = [
                    response_means(values, batch.response_of, batch.lengths) for values in logps
                ]  # [2·B] each
                if args.loss == "dpo":
                    term = dpo_loss(*(mean * batch.lengths for mean in means), args.beta)  # [B]
                else:
                    term = simpo_loss(*means, args.beta, args.simpo_gamma)  # [B]
            loss = term.sum() / len(drawn)
            loss.backward()
            losses.update({"total": loss.item()})
            tokens += batch.target_ids.numel()

        # ------------------------------------------------------------------------------------------- optimiser step
        if not math.isfinite(losses["total"]):
            ids = [example.row["id"] for example in drawn]
            stop(
                f"loss {losses['total']} in step {step} on rows {ids}; {run} keeps the checkpoint before it"
            )
        grad_norm = torch.nn.utils.clip_grad_norm_(student.model.parameters(), args.max_grad_norm)
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
