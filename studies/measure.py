"""Judges a trained model on many sampled responses: `python -m studies.measure runs/<run>/model`.

The scripts judge a student on 256 responses, which shows where a run is going. Its noise is too
large to tell methods apart: rewards of single responses differ by 0.4 to 0.6, so a mean of 256 is
known to 0.03. Here every different held-out prompt gets equally many responses, 4,096 in all by
default, which leaves 0.006.

    python -m studies.measure runs/adpa/model                       # the playground: six seconds
    python -m studies.measure playground/teacher --seed 2 --output_dir runs/teacher

--output_dir gets measured.jsonl, with the rewards and mean length of every prompt's responses, and
measured.json, with their means. It may be the folder of the run. A measurement that was interrupted
goes on with the same command. Responses end after --max_response_tokens, so that a model that
writes without end takes no longer than others.
"""

import json
import math
import statistics
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import tyro

from common import (
    LM,
    cached_map,
    choose_device,
    load_reward_function,
    model_digests,
    parse_flags,
    read_rows,
    stop,
    write_json,
)


@dataclass
class Args:
    model: tyro.conf.Positional[str]
    """model to judge: a hub id or a folder"""
    responses: int = 4096
    """sampled responses in all, equally many for every different prompt (rounded up)"""
    seed: int = 1
    """seed of sampling"""
    eval_data: str = "playground/data/test.jsonl"
    """held-out rows, of which only the prompts are used; the same prompt counts once"""
    eval_config: str = ""
    """config of --eval_data, where a hub id has several"""
    eval_split: str = "test"
    """split of --eval_data, or a part of one"""
    reward: str = "playground.world:reward"
    """what gives a response its reward, as in the scripts"""
    reward_label: str = ""
    """label of a reward model that has several, by name or index; its logit is the reward"""
    max_response_tokens: int = 64
    """sampling stops there (no answer of the playground has more than 32)"""
    sample_batch_size: int = 512
    """responses sampled at a time"""
    device: str = ""
    """cpu, cuda, cuda:1, ...; if empty, a GPU where there is one"""
    trust_remote_code: bool = False
    """run the Python code that comes with a hub model on this machine: only where you trust it"""
    output_dir: str = ""
    """folder of the results; if empty, the folder in which the model lies"""


def different_prompts(rows: list[dict]) -> list[dict]:
    """The first row of every prompt."""
    first_rows = {}
    for row in rows:
        first_rows.setdefault(json.dumps(row["prompt"]), row)
    return list(first_rows.values())


def judge_many(rows: list[dict], seed: int, *, lm: LM, n: int, reward_fn, args: Args):
    """For every row {"rewards": of n sampled responses to its prompt, "tokens": their mean length,
    "finished": the share of them that ended}."""
    samples = lm.sample(
        [lm.prompt_ids(row["prompt"]) for row in rows],
        n=n,
        temperature=1.0,
        max_new_tokens=args.max_response_tokens,
        batch_size=args.sample_batch_size,
        seed=seed,
    )
    results = []
    for row, responses in zip(rows, samples):
        rewards = reward_fn([row] * n, responses)
        if None in rewards:
            stop(f"--reward {args.reward} must have a reward for every response, and gave None")
        result = {
            "rewards": rewards,
            "tokens": statistics.mean(len(response["token_ids"]) for response in responses),
            "finished": statistics.mean(response["finished"] for response in responses),
        }
        results.append(result)
    return results


def summarise(measured: list[dict]) -> dict[str, float]:
    """Means over prompts, and the standard error of the mean reward over prompts. Prompts, and not
    responses, are what other prompts would be drawn from."""
    means = [statistics.mean(row["rewards"]) for row in measured]
    error = statistics.stdev(means) / math.sqrt(len(means)) if len(means) > 1 else 0.0
    return {
        "reward": statistics.mean(means),
        "stderr_over_prompts": error,
        "tokens": statistics.mean(row["tokens"] for row in measured),
        "finished": statistics.mean(row["finished"] for row in measured),
        "prompts": len(measured),
        "responses": sum(len(row["rewards"]) for row in measured),
    }


def begin(folder: Path, lm: LM, n: int, args: Args):
    """Notes in measured_from.json what is measured. The program ends if a measurement of something
    else lies in the folder."""
    source = {"model": model_digests(lm), "responses_to_a_prompt": n, "reward": args.reward}
    source["seed"] = args.seed
    source["max_response_tokens"] = args.max_response_tokens
    path = folder / "measured_from.json"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, source)
    before = json.loads(path.read_text())
    different = [name for name, value in source.items() if before.get(name) != value]
    if different:
        stop(f"{folder} has a measurement with another {different[0]}; remove {folder}/measured*")


def main(args: Args):
    if args.responses < 1 or args.max_response_tokens < 1 or args.sample_batch_size < 1:
        stop("--responses, --max_response_tokens and --sample_batch_size must be at least 1")
    folder = Path(args.output_dir or Path(args.model).parent)
    device = choose_device(args.device)
    lm = LM(args.model, device, trust_remote_code=args.trust_remote_code)
    rows = read_rows(args.eval_data, args.eval_split, columns=(), config=args.eval_config)
    rows = different_prompts(rows)
    reward_fn = load_reward_function(
        args.reward, device, args.trust_remote_code, label=args.reward_label, rows=rows
    )
    if reward_fn is None:
        stop("--reward none leaves nothing to measure")
    n = math.ceil(args.responses / len(rows))
    function = partial(judge_many, lm=lm, n=n, reward_fn=reward_fn, args=args)
    batch_size = max(1, args.sample_batch_size // n)
    begin(folder, lm, n, args)
    measured = cached_map(folder / "measured.jsonl", rows, function, batch_size, args.seed)
    results = summarise(measured)
    results["seed"] = args.seed
    write_json(folder / "measured.json", results)
    mean = f"{results['reward']:.3f} ± {results['stderr_over_prompts']:.3f} (over prompts)"
    print(
        f"{args.model}: reward {mean}, {results['responses']} responses to {results['prompts']} "
        f"prompts, {results['tokens']:.1f} tokens each"
    )


if __name__ == "__main__":
    args = parse_flags(Args, __doc__)
    try:
        main(args)
    except KeyboardInterrupt:
        raise SystemExit("interrupted; the same command goes on") from None
