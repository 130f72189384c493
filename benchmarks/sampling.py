"""Sampled tokens per second of `LM.sample` against plain `model.generate`, on prompts of mixed
length.

Plain means batches in the order of the data. `LM.sample` takes prompts of similar length together,
so that fewer of them are padded. Both ways write the same number of answers at a time, and a prompt
stands in its batch once for each of its answers. Greedy answers must be equal before anything is
timed. Then the ways take turns, and the median counts. Random weights do not end their answers, so
every answer has --max_new_tokens tokens in both ways.

    python -m benchmarks.sampling             # the table of the page: some minutes on two CPU cores
    python -m benchmarks.sampling --quick     # seconds, on a tiny model; the page stays as it is
    python -m benchmarks.sampling --student llama-3.2-1b --prompts 256 --batch_size 64 \\
        --output gpu.json                     # a GPU
"""

import statistics
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import transformers
import tyro

from benchmarks.shared import (
    RESULTS,
    PeakMemory,
    load,
    machine,
    markdown,
    prepare,
    record,
    seconds_of,
    turns,
    vocabulary_size,
)
from common import LM


@dataclass
class Args:
    quick: bool = False
    """a tiny model, two repeats, runs/benchmarks.json"""
    student: str = "smollm2-135m"
    """shape of the model (a name in benchmarks/shared.py), a folder or a hub id"""
    prompts: int = 16
    """prompts; with four answers each a quarter of them, so that both tables write as many"""
    shortest: int = 16
    """tokens of the shortest prompt"""
    longest: int = 512
    """tokens of the longest; lengths are spread evenly on a logarithmic scale and shuffled"""
    max_new_tokens: int = 48
    """tokens of every answer"""
    batch_size: int = 8
    """answers at a time"""
    repeats: int = 5
    """timed runs of every way, of which the median counts"""
    device: str = ""
    """cpu, cuda, ... (default: cuda where there is one)"""
    threads: int = 0
    """threads of the CPU, if not torch's own choice"""
    output: str = RESULTS
    """where results go; the page is filled from its own file alone"""


@torch.no_grad()
def plain_sample(
    lm: LM,
    prompts: list[list[int]],
    *,
    n: int,
    temperature: float,
    max_new_tokens: int,
    batch_size: int,
    seed: int,
) -> list[list[dict]]:
    """What one would write first, with the arguments of `LM.sample` and the texts of its result."""
    config = transformers.GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=lm.eos_ids,
        pad_token_id=lm.tokenizer.pad_token_id,
    )
    if temperature > 0:
        config.update(do_sample=True, temperature=temperature, top_k=0)
    torch.manual_seed(seed)
    responses = []
    prompts_per_batch = batch_size // n
    for start in range(0, len(prompts), prompts_per_batch):
        rows = []
        for prompt in prompts[start : start + prompts_per_batch]:
            rows += [prompt] * n
        batch = lm.tokenizer.pad({"input_ids": rows}, padding_side="left", return_tensors="pt")
        batch = batch.to(lm.device)
        with lm.autocast():
            ids = lm.model.generate(**batch, generation_config=config)
        prompt_width = batch["input_ids"].shape[1]
        texts = lm.tokenizer.batch_decode(ids[:, prompt_width:], skip_special_tokens=True)
        for first in range(0, len(texts), n):
            responses.append([{"text": text} for text in texts[first : first + n]])
    return responses


def draw_prompts(args: Args, vocab_size: int) -> list[list[int]]:
    """Random prompts of the lengths that --shortest and --longest ask for."""
    generator = torch.Generator().manual_seed(0)
    ratio = args.longest / args.shortest
    lengths = []
    for number in range(args.prompts):
        share = number / max(1, args.prompts - 1)
        lengths.append(round(args.shortest * ratio**share))
    prompts = []
    for index in torch.randperm(args.prompts, generator=generator).tolist():
        ids = torch.randint(3, vocab_size, (lengths[index],), generator=generator)
        prompts.append(ids.tolist())
    return prompts


def measure(lm: LM, prompts: list[list[int]], n: int, args: Args) -> dict:
    """Seconds and memory of both ways to n answers."""
    common_flags = {
        "n": n,
        "max_new_tokens": args.max_new_tokens,
        "batch_size": args.batch_size,
        "seed": 0,
    }
    functions = {
        "plain generate": partial(plain_sample, lm, prompts, **common_flags),
        "prefdistill": partial(lm.sample, prompts, **common_flags),
    }
    ways = {}
    greedy_texts = []
    for name, sample in functions.items():
        with PeakMemory(lm.device) as memory:
            responses = sample(temperature=0.0)
        ways[name] = {"seconds": [], "peak_bytes": memory.peak}
        greedy_texts.append(texts_of(responses))
    if greedy_texts[0] != greedy_texts[1]:
        raise SystemExit("error: greedy answers of the two ways differ")

    for order in turns(functions, args.repeats):
        for name in order:
            sample_once = partial(functions[name], temperature=1.0)
            ways[name]["seconds"].append(seconds_of(sample_once, lm.device))
    return {
        "prompt_lengths": [len(prompt) for prompt in prompts],
        "sampled_tokens": len(prompts) * n * args.max_new_tokens,
        "ways": ways,
    }


def texts_of(responses: list[list[dict]]) -> list[str]:
    """The texts of all responses to all prompts, in order."""
    texts = []
    for of_prompt in responses:
        texts += [response["text"] for response in of_prompt]
    return texts


def main(args: Args) -> dict:
    started = time.time()
    device = prepare(args)
    vocab_size = vocabulary_size("49k")
    if args.quick:
        args.student = "tiny"
        args.prompts = 8
        args.longest = 64
        args.max_new_tokens = 8
        args.repeats = 2
        vocab_size = 1024
    with tempfile.TemporaryDirectory() as folder:
        lm = load(Path(folder), args.student, vocab_size, 0, device)
        prompts = draw_prompts(args, lm.vocab_size)
        cases = {
            "n=1": measure(lm, prompts, 1, args),
            "n=4": measure(lm, prompts[::4], 4, args),
        }
    result = {
        "args": vars(args),
        "machine": machine(device),
        "cases": cases,
        "seconds": time.time() - started,
    }
    record(Path(args.output), "sampling", result, {"sampling": table(result)})
    return result


def table(result: dict) -> str:
    rows = []
    for name, case in result["cases"].items():
        plain_seconds = statistics.median(case["ways"]["plain generate"]["seconds"])
        for way, measured in case["ways"].items():
            seconds = statistics.median(measured["seconds"])
            speed = f"{case['sampled_tokens'] / seconds:.1f}"
            ratio = f"{plain_seconds / seconds:.2f}×"
            memory = f"{measured['peak_bytes'] / 1e9:.2f}"
            rows.append([name, way, speed, ratio, memory])
    header = ["answers to a prompt", "way", "sampled tokens/s", "speed", "peak memory, GB"]
    return markdown(header, rows)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
