"""Ideas to make a step cheaper, each measured alone against the same step without it, also when it lost.

The step is DCKD's on a narrow cut of SmolLM2-135M (its width, 3 layers, vocabulary 49,152), forward and backward. With
and without take turns, the medians count. The README says which ideas were adopted, and why.

    python -m benchmarks.ideas             # the table of the README: some minutes on two CPU cores
    python -m benchmarks.ideas --quick     # seconds, on a tiny model; the README stays as it is
"""

import importlib
import statistics
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
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
from benchmarks.step import Case, draw_examples, run_loop, training_loop
from common import LM, Example, pack


@dataclass
class Args:
    quick: bool = False
    """a tiny model, two repeats, runs/benchmarks.json"""
    shape: str = "smollm2-135m/10"
    """shape of all models (a name in benchmarks/shared.py), a folder or a hub id"""
    repeats: int = 5
    """timed steps of both ways, of which the medians count"""
    compile: bool = True
    """also try torch.compile, which needs a C++ compiler and a minute"""
    device: str = ""
    """cpu, cuda, ... (default: cuda where there is one)"""
    threads: int = 0
    """threads of the CPU, if not torch's own choice"""
    output: str = RESULTS
    """where results go; the README is filled from its own file alone"""


# ------------------------------------------------------------------------------------------------------------- ideas
@contextmanager
def replaced(owner, name: str, value):
    before = getattr(owner, name)
    setattr(owner, name, value)
    yield
    setattr(owner, name, before)


def bf16_logits(self: LM, hidden: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """`LM.logits` with a product of bfloat16 numbers, summed in float32, and float32 from there on."""
    with torch.autocast(hidden.device.type, torch.bfloat16):
        return self.model.get_output_embeddings()(hidden)[:, :vocab_size].float()


def with_mask(examples: list[Example], *models: LM):
    """`pack` with the mask and the positions spelled out also where a row holds one response: it is causal."""
    batch = pack(examples, *models)
    rows, width = batch.input_ids.shape
    batch.attention_mask = (
        torch.ones(width, width, dtype=torch.bool).tril().expand(rows, 1, width, width)
    )
    batch.attention_mask = batch.attention_mask.contiguous().to(batch.input_ids.device)
    batch.position_ids = torch.arange(width, device=batch.input_ids.device).expand(rows, width)
    return batch


def together(models: tuple[LM, ...]):
    """A function that runs backbones of equal shapes as one, their weights stacked, on a batch; their sum."""
    weights, buffers = torch.func.stack_module_state([lm.model.base_model for lm in models])
    backbone = models[0].model.base_model

    def one(weights, buffers, batch):
        inputs = {
            "attention_mask": batch.attention_mask,
            "position_ids": batch.position_ids,
            "use_cache": False,
        }
        return torch.func.functional_call(
            backbone, (weights, buffers), (batch.input_ids,), inputs
        ).last_hidden_state

    return torch.no_grad()(
        lambda batch: torch.vmap(partial(one, batch=batch))(weights, buffers).sum().item()
    )


def main(args: Args) -> dict:
    if args.quick:
        args.shape, args.repeats, args.compile = "tiny", 2, False
        args.output = QUICK if args.output == RESULTS else args.output
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    started, results = time.time(), {}
    vocab_size = 1024 if args.quick else VOCABULARIES["49k"]
    script, code = importlib.import_module("dckd"), training_loop(importlib.import_module("dckd"))

    def try_out(name: str, without, idea):
        """Seconds and memory of two functions without arguments that return a loss, turn by turn."""
        ways, losses = {"without": without, "with": idea}, {}
        result = {way: {"seconds": []} for way in ways}
        for way, function in ways.items():
            with PeakMemory(device) as memory:
                losses[way] = function()
            result[way]["step_bytes"] = memory.peak - memory.start
        for repeat in range(args.repeats):
            for way in list(ways)[:: 1 if repeat % 2 else -1]:
                tick = clock(device)
                ways[way]()
                result[way]["seconds"].append(clock(device) - tick)
        results[name] = {**result, "difference": abs(losses["with"] - losses["without"])}

    with tempfile.TemporaryDirectory() as folder:
        student = load(Path(folder), args.shape, vocab_size, 0, device, True)
        teacher, other = (
            load(Path(folder), args.shape, vocab_size, seed, device) for seed in (1, 2)
        )
        small = 8 if args.quick else 1

        def step(examples: list[Example], chunk=10**9, micro=10**9) -> float:
            names = {"student": student, "teacher": teacher, "vocab_size": vocab_size}
            flags = script.Args(logits_chunk=chunk, micro_batch_size=min(micro, len(examples)))
            loss = run_loop(code, script, examples, **names, args=flags)
            student.model.zero_grad()
            return loss

        def drawn(number: int, n=2, prompt=256) -> list[Example]:
            case = Case("", "", n, prompt=prompt // small, answer=128 // small, examples=number)
            return draw_examples(case, vocab_size)

        pairs = drawn(2)
        tokens = sum(len(response) for example in pairs for response in example.responses)

        def plain() -> float:
            return step(pairs)

        try_out(
            "no recomputation where one chunk suffices", lambda: step(pairs, tokens // 2 + 1), plain
        )

        mixed = [drawn(2, prompt=64 * 2**power)[i] for i in (0, 1) for power in range(4)]
        alike = sorted(mixed, key=lambda example: len(example.prompt))
        try_out(
            "micro-batches of similar length",
            lambda: step(mixed, micro=4),
            lambda: step(alike, micro=4),
        )

        def alone(make) -> float:
            batch = make(drawn(4, n=1), student)
            loss = student.hidden_states(batch)[batch.source].square().mean()
            loss.backward()
            student.model.zero_grad()
            return loss.item()

        try_out(
            "no mask where a row holds one response", lambda: alone(with_mask), lambda: alone(pack)
        )

        @torch.no_grad()
        def scored(lms, batches) -> float:
            return sum(lm.hidden_states(batch).sum().item() for lm, batch in zip(lms, batches))

        lms, frozen, batch = (student, teacher), (teacher, other), pack(pairs, teacher)
        two = lambda: scored(lms, [pack(pairs, lm) for lm in lms])  # noqa: E731
        try_out(
            "one packed batch for student and teacher",
            two,
            lambda: scored(lms, [pack(pairs, *lms)] * 2),
        )
        stacked = together(frozen)
        try_out(
            "two teachers as one stacked model",
            lambda: scored(frozen, [batch] * 2),
            lambda: stacked(batch),
        )

        def in_bf16() -> float:
            with replaced(LM, "logits", bf16_logits):
                return step(pairs)

        try_out("bfloat16 logits, float32 softmax", plain, in_bf16)

        def all_in_bf16() -> float:
            autocast = lambda: torch.autocast(device.type, torch.bfloat16)  # noqa: E731
            with replaced(student, "autocast", autocast), replaced(teacher, "autocast", autocast):
                return step(pairs)

        try_out("bfloat16 autocast of everything", plain, all_in_bf16)

        if args.compile:
            backbone = torch.compile(student.model.base_model, dynamic=True)

            def compiled() -> float:
                with replaced(student.model, student.model.base_model_prefix, backbone):
                    return step(pairs)

            tick = time.perf_counter()
            compiled()
            compiling = time.perf_counter() - tick
            try_out("torch.compile of the student's backbone", plain, compiled)
            results["torch.compile of the student's backbone"]["compile_seconds"] = compiling

    result = {
        "args": vars(args),
        "machine": machine(device),
        "ideas": results,
        "seconds": time.time() - started,
    }
    record(Path(args.output), "ideas", result, {"ideas": table(result)})
    return result


def table(result: dict) -> str:
    rows = []
    for name, idea in result["ideas"].items():
        times = [statistics.median(idea[way]["seconds"]) for way in ("without", "with")]
        memory = [idea[way]["step_bytes"] / 1e9 for way in ("without", "with")]
        rows.append([name, *(f"{value:.3f}" for value in times), f"{times[0] / times[1]:.2f}×"])
        rows[-1] += [*(f"{value:.2f}" for value in memory), f"{idea['difference']:.0e}"]
    header = [
        "idea",
        "without, s",
        "with, s",
        "speed",
        "without, GB",
        "with, GB",
        "change of the loss",
    ]
    return markdown(header, rows)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
