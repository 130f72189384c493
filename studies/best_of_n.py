r"""Best of n: of n responses of a model, the one to which a reward gives most, judged by another
reward. It is what a reward model is good for without any training.

    python -m studies.best_of_n --reward runs/<run>/model
    python -m studies.best_of_n --reward runs/rm/model --policy runs/adpa/model --n 16

The policy answers every different held-out prompt `--samples` times. --reward picks the best of n
of these responses, and --eval_reward says what that one is worth. The result is exact for these
samples: the mean over all choices of n of them, and over prompts. So many reward models can be
compared on the same responses, which depend on policy, prompts and seed alone.

A larger n is a stronger optimisation. The distribution of the best of n is at most
log n − (n − 1)/n nats from the policy (Beirami et al., 2024, arXiv 2401.01879), in KL. That is the
currency of `studies.rloo`. A reward model whose curve falls as n grows is exploited.

Stages: (1) samples, with both rewards; (2) the table. A run that was killed goes on with --resume.
"""

import math
import statistics
import time
from dataclasses import dataclass
from functools import partial

from common import (
    LM,
    begin_run,
    cached_map,
    choose_device,
    encode_rows,
    exit_in_one_line,
    load_reward_function,
    open_run,
    parse_flags,
    print_fact,
    print_models,
    read_rows,
    save_summary,
    standard_error,
    stop,
)
from studies.measure import different_prompts


# -------------------------------------------------------------------------------------- mathematics
def best_of_n(rewards: list[float], worth: list[float], n: int) -> float:
    """What the response with the highest reward of n is worth: the mean over all choices of n of
    these responses. Where several of the n have the highest reward, each is picked equally often.

    Example: rewards of (1, 2, 3), worth of (0.5, 0, 1), n = 2. The choices {1, 2}, {1, 3} and
    {2, 3} pick 0, 1 and 1, so it is 2/3.
    """
    worth_by_reward = {}
    for reward, value in zip(rewards, worth, strict=True):
        worth_by_reward.setdefault(reward, []).append(value)
    total = 0.0
    lower = 0  # responses with a lower reward
    for reward in sorted(worth_by_reward):
        equal = worth_by_reward[reward]
        # So many choices have this reward as their highest.
        choices = math.comb(lower + len(equal), n) - math.comb(lower, n)
        total += choices * statistics.mean(equal)
        lower += len(equal)
    return total / math.comb(len(rewards), n)


def most_kl(n: int) -> float:
    """An upper bound of KL(best of n ‖ policy), in nats.

    Example: log 2 − 1/2 = 0.193 for n = 2, and 0 for n = 1.
    """
    return math.log(n) - (n - 1) / n


# -------------------------------------------------------------------------------------------- flags
@dataclass
class Method:
    policy: str = "playground/student"
    """model whose responses are picked from: a hub id or a folder"""
    reward: str = "playground.world:reward"
    """what picks a response: a reward model, or file.py:function or module:function (which is
    executed)"""
    reward_label: str = ""
    """label of a reward model that has several, by name or index; its logit is the reward"""
    n: int = 8
    """responses of which one is picked; smaller powers of 2 are shown as well"""
    samples: int = 32
    """responses sampled to a prompt, from which n are drawn in all ways"""
    temperature: float = 1.0
    """temperature of the responses"""
    max_response_tokens: int = 64
    """sampling stops there (no answer of the playground has more than 32)"""
    sample_batch_size: int = 512
    """responses sampled at a time"""
    seed: int = 1
    """seed of sampling"""
    device: str = ""
    """cpu, cuda, cuda:1, ...; if empty, a GPU where there is one"""
    trust_remote_code: bool = False
    """run the Python code that comes with a hub model on this machine: only where you trust it"""


@dataclass
class EvaluationAndOutput:
    eval_data: str = "playground/data/test.jsonl"
    """held-out rows, of which only the prompts are used; the same prompt counts once"""
    eval_config: str = ""
    """config of --eval_data, where a hub id has several"""
    eval_split: str = "test"
    """split of --eval_data, or a part of one"""
    eval_reward: str = "playground.world:reward"
    """what judges the picked responses, as --reward names it"""
    max_prompt_tokens: int = 512
    """rows with longer prompts are dropped and counted"""
    output_dir: str = ""
    """folder of this run; if empty, runs/best_of_n__<seed>__<time>"""
    resume: str = ""
    """folder of a run that was interrupted; it goes on with the flags it had"""


@dataclass
class Args(EvaluationAndOutput, Method):
    """The flags of both groups, read as args.seed. --help shows the last of these groups first."""


def check_flags(args: Args):
    """Ends the program if a number makes no sense."""
    if not 1 <= args.n <= args.samples:
        stop(f"--n {args.n} must be a number between 1 and --samples {args.samples}")
    for name in ("sample_batch_size", "max_response_tokens", "max_prompt_tokens"):
        if getattr(args, name) < 1:
            stop(f"--{name} {getattr(args, name)} must be at least 1")
    if not 0 < args.temperature < math.inf:  # NaN is refused as well
        stop(f"--temperature {args.temperature} must be above 0: greedy responses are all alike")
    if "none" in (args.reward, args.eval_reward):
        stop("--reward must pick and --eval_reward must judge, so neither can be none")


# ----------------------------------------------------------------------------------------- sampling
def sample_options(
    rows: list[dict], seed: int, *, policy: LM, reward_fn, eval_reward_fn, args: Args
) -> list[dict]:
    """Responses of the policy to every prompt, as "options", with what --reward gives them, as
    "rewards", and what --eval_reward gives them, as "worth"."""
    samples = policy.sample(
        [policy.prompt_ids(row["prompt"]) for row in rows],
        n=args.samples,
        temperature=args.temperature,
        max_new_tokens=args.max_response_tokens,
        batch_size=args.sample_batch_size,
        seed=seed,
    )
    results = []
    for row, responses in zip(rows, samples):
        same_row = [row] * len(responses)
        result = {
            "options": responses,
            "rewards": reward_fn(same_row, responses),
            "worth": eval_reward_fn(same_row, responses),
        }
        results.append(result)
    return results


def sizes_to_show(n: int) -> list[int]:
    """1, 2, 4, ... and n."""
    sizes = [1]
    while 2 * sizes[-1] < n:
        sizes.append(2 * sizes[-1])
    if n > 1:
        sizes.append(n)
    return sizes


def summarise(rows: list[dict], n: int) -> dict:
    """The reward of what --reward picks, and a curve over the sizes up to n: for each of them what
    --reward picks, with its standard error over prompts, and what --eval_reward would pick."""
    curve = []
    for size in sizes_to_show(n):
        picked = [best_of_n(row["rewards"], row["worth"], size) for row in rows]
        best = [best_of_n(row["worth"], row["worth"], size) for row in rows]
        point = {
            "n": size,
            "kl_at_most": most_kl(size),
            "picked": statistics.mean(picked),
            "stderr_over_prompts": standard_error(picked),
            "best": statistics.mean(best),
        }
        curve.append(point)
    return {"best_of_n_reward": curve[-1]["picked"], "curve": curve, "prompts": len(rows)}


def print_curve(results: dict, samples: int):
    """A line for every size."""
    prompts = results["prompts"]
    print(f"\n--eval_reward of one of n responses: {samples} samples to each of {prompts} prompts")
    print(f"{'n':>6}{'KL at most':>12}{'picked by --reward':>22}{'by --eval_reward':>18}")
    for point in results["curve"]:
        picked = f"{point['picked']:.3f} ± {point['stderr_over_prompts']:.3f}"
        print(f"{point['n']:>6}{point['kl_at_most']:>12.2f}{picked:>22}{point['best']:>18.3f}")


# --------------------------------------------------------------------------------------------- main
def main(args: Args):
    started = time.time()
    args, run_dir = open_run(args, __file__)
    check_flags(args)

    # -------------------------------------------------------------------- models, rewards and data
    device = choose_device(args.device)
    print_fact("run folder", run_dir)
    print_fact("if interrupted", f"go on with --resume {run_dir}")
    rows = read_rows(args.eval_data, args.eval_split, columns=(), config=args.eval_config)
    rows = different_prompts(rows)
    eval_reward_fn = load_reward_function(
        args.eval_reward, device, args.trust_remote_code, rows=rows
    )
    reward_fn = load_reward_function(
        args.reward, device, args.trust_remote_code, label=args.reward_label, rows=rows
    )
    policy = LM(args.policy, device, trust_remote_code=args.trust_remote_code)
    print_models(policy=policy)
    held_out = encode_rows(policy, rows, [], args, "held-out prompts")
    begin_run(run_dir, args, [policy], eval_data=held_out)

    # ------------------------------------------------------------------- samples with both rewards
    options = cached_map(
        run_dir / "options.jsonl",
        [example.row for example in held_out],
        partial(
            sample_options,
            policy=policy,
            reward_fn=reward_fn,
            eval_reward_fn=eval_reward_fn,
            args=args,
        ),
        max(1, args.sample_batch_size // args.samples),
        args.seed,
    )
    # Responses can be compared where each of them has both rewards.
    comparable = [row for row in options if None not in row["rewards"] + row["worth"]]
    if not comparable:
        stop("no prompt is left: --reward or --eval_reward gave None for a response to each")

    # -------------------------------------------------------------------------------------- results
    results = summarise(comparable, args.n)
    results["seconds"] = time.time() - started
    save_summary(run_dir, results, {"tokens": 0, "seconds": 0.0}, args)
    print_curve(results, args.samples)


if __name__ == "__main__":
    args = parse_flags(Args, __doc__)
    with exit_in_one_line(args):
        main(args)
