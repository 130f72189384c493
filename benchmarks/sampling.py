"""Sampled tokens per second of `LM.sample` against plain `model.generate`, on prompts of mixed length.

Plain means: batches in the order of the data, padded on the left to their longest prompt, which stands there once for
each of its answers (`num_return_sequences` does the same). Both ways write the same number of answers at a time. Greedy
answers must be equal before anything is timed; then the ways take turns, and the median counts. Random weights do not
end their answers, so that every answer has --max_new_tokens tokens in both ways.

    python -m benchmarks.sampling             # the table of the README: some minutes on two CPU cores
    python -m benchmarks.sampling --quick     # seconds, on a tiny model; the README stays as it is
    python -m benchmarks.sampling --student llama-3.2-1b --prompts 256 --batch_size 64 --output gpu.json       # a GPU
"""

import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
import tyro

from benchmarks.shared import (
    QUICK,
    RESULTS,
    VOCABULARIES,
    PeakMemory,
    clock,
    load,
    machine,
    markdown,
    record,
)
from common import LM


@dataclass
class Args:
    quick: bool = False
    """a tiny model, two repeats, runs/benchmarks.json"""
    student: str = "smollm2-135m"
    """shape of the model (a name in benchmarks/shared.py), a folder or a hub id"""
    prompts: int = 16
    """prompts; with four answers each a quarter of them, so that both tables write as many answers"""
    shortest: int = 16
    """tokens of the shortest prompt"""
    longest: int = 512
    """tokens of the longest; lengths are spread evenly on a logarithmic scale and shuffled"""
    max_new_tokens: int = 48
    """tokens of every answer"""
    batch_size: int = 4
    """answers at a time"""
    repeats: int = 5
    """timed runs of every way, of which the median counts"""
    device: str = ""
    """cpu, cuda, ... (default: cuda where there is one)"""
    threads: int = 0
    """threads of the CPU, if not torch's own choice"""
    output: str = RESULTS
    """where results go; the README is filled from its own file alone"""


@torch.no_grad()
def plain(lm: LM, prompts, *, n, temperature, max_new_tokens, batch_size, seed) -> list:
    """What one would write first, with the arguments and the result of `LM.sample`."""
    tokenizer, answers = lm.tokenizer, []
    tokenizer.padding_side = "left"
    how = {"do_sample": temperature > 0, "max_new_tokens": max_new_tokens}
    how |= {"temperature": temperature, "top_k": 0} if temperature > 0 else {}
    config = transformers.GenerationConfig(
        **how, eos_token_id=lm.end_ids, pad_token_id=tokenizer.pad_token_id
    )
    torch.manual_seed(seed)
    step = batch_size // n
    for some in (prompts[start : start + step] for start in range(0, len(prompts), step)):
        some = [prompt for prompt in some for _ in range(n)]
        batch = tokenizer.pad({"input_ids": some}, return_tensors="pt").to(lm.device)
        with lm.autocast():
            new = lm.model.generate(**batch, generation_config=config)[
                :, batch["input_ids"].shape[1] :
            ]
        texts = tokenizer.batch_decode(new, skip_special_tokens=True)
        answers += [[{"text": text} for text in texts[i : i + n]] for i in range(0, len(texts), n)]
    return answers


def main(args: Args) -> dict:
    if args.quick:
        args.student, args.prompts, args.longest, args.max_new_tokens, args.repeats = (
            "tiny",
            8,
            64,
            8,
            2,
        )
        args.output = QUICK if args.output == RESULTS else args.output
    if args.threads:
        torch.set_num_threads(args.threads)
    device, started = (
        torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu")),
        time.time(),
    )
    generator, steps = torch.Generator().manual_seed(0), max(1, args.prompts - 1)
    lengths = [
        round(args.shortest * (args.longest / args.shortest) ** (i / steps))
        for i in range(args.prompts)
    ]
    lengths = [lengths[i] for i in torch.randperm(args.prompts, generator=generator).tolist()]
    with tempfile.TemporaryDirectory() as folder:
        lm = load(
            Path(folder), args.student, 1024 if args.quick else VOCABULARIES["49k"], 0, device
        )
        prompts = [
            torch.randint(3, lm.vocab_size, (length,), generator=generator).tolist()
            for length in lengths
        ]
        ways, results = (
            {"plain generate": lambda *a, **k: plain(lm, *a, **k), "prefdistill": lm.sample},
            {},
        )
        for n in (1, 4):
            how = {"n": n, "max_new_tokens": args.max_new_tokens, "batch_size": args.batch_size}
            some, seconds, peaks, greedy = (
                prompts[:: 1 if n == 1 else 4],
                {name: [] for name in ways},
                {},
                {},
            )
            for name, way in ways.items():
                with PeakMemory(device) as memory:
                    greedy[name] = way(some, temperature=0.0, seed=0, **how)
                peaks[name] = memory.peak
            texts = [
                [answer["text"] for answers in made for answer in answers]
                for made in greedy.values()
            ]
            if texts[0] != texts[1]:
                raise SystemExit("error: greedy answers of the two ways differ")
            for repeat in range(args.repeats):
                for name, way in list(ways.items())[:: 1 if repeat % 2 else -1]:
                    tick = clock(device)
                    way(some, temperature=1.0, seed=repeat, **how)
                    seconds[name].append(clock(device) - tick)
            results[f"n={n}"] = {
                "prompt_lengths": list(map(len, some)),
                "sampled_tokens": len(some) * n * args.max_new_tokens,
                "ways": {
                    name: {"seconds": seconds[name], "peak_bytes": peaks[name]} for name in ways
                },
            }
    result = {
        "args": vars(args),
        "machine": machine(device),
        "cases": results,
        "seconds": time.time() - started,
    }
    record(Path(args.output), "sampling", result, {"sampling": table(result)})
    return result


def table(result: dict) -> str:
    rows = []
    for name, case in result["cases"].items():
        speeds = {
            w: case["sampled_tokens"] / statistics.median(v["seconds"])
            for w, v in case["ways"].items()
        }
        for way, speed in speeds.items():
            memory = case["ways"][way]["peak_bytes"] / 1e9
            ratio = f"{speed / speeds['plain generate']:.2f}×"
            rows.append([name, way, f"{speed:.1f}", ratio, f"{memory:.2f}"])
    return markdown(
        ["answers to a prompt", "way", "sampled tokens/s", "speed", "peak memory, GB"], rows
    )


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
