"""Ideas to make a step cheaper, each measured alone against the same step without it, also when it
lost.

The step is DCKD's on a narrow cut of SmolLM2-135M (its width, 3 layers, vocabulary 49,152), forward
and backward. With and without take turns, and the medians count. The page says which ideas were
adopted, and why.

    python -m benchmarks.ideas             # the table of the page: some minutes on two CPU cores
    python -m benchmarks.ideas --quick     # seconds, on a tiny model; the page stays as it is
"""

import statistics
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import tyro

import dckd
from benchmarks.shared import (
    RESULTS,
    PeakMemory,
    Setup,
    load,
    machine,
    markdown,
    prepare,
    record,
    seconds_of,
    turns,
    vocabulary_size,
)
from benchmarks.step import Case, dckd_loss, draw_examples, run_micro_batches
from common import LM, Batch, Example, pack

NO_LIMIT = 10**9


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
    """where results go; the page is filled from its own file alone"""


@dataclass
class Models:
    """What every idea is tried on: a student, two teachers of its shape, and random examples."""

    student: LM
    teacher: LM
    other_teacher: LM
    vocab_size: int
    shrink: int
    """examples are shorter by this factor"""

    def draw(self, count: int, *, n: int = 2, prompt: int = 256) -> list[Example]:
        """Random examples, always the same ones."""
        case = Case(
            table="ideas",
            script="dckd",
            n=n,
            prompt=prompt // self.shrink,
            answer=128 // self.shrink,
            examples=count,
        )
        return draw_examples(case, self.vocab_size)

    def step(
        self, examples: list[Example], *, chunk: int = NO_LIMIT, micro_batch_size: int = NO_LIMIT
    ) -> float:
        """Forward and backward of DCKD. Returns the loss."""
        args = dckd.Args(logits_chunk=chunk, micro_batch_size=min(micro_batch_size, len(examples)))
        setup = Setup(examples, args, self.vocab_size, self.student, self.teacher)
        loss = run_micro_batches(dckd_loss, setup)
        self.student.model.zero_grad()
        return loss


# -------------------------------------------------------------------------------------------- ideas
# Each function returns two functions without arguments, the step without the idea and with it. Both
# return the loss, or some number in its place.
def no_recomputation(models: Models):
    """Tokens that fit into one chunk are not computed again in the backward pass."""
    pairs = models.draw(2)
    tokens = 0
    for example in pairs:
        tokens += sum(len(response) for response in example.response_ids)
    in_two_chunks = partial(models.step, pairs, chunk=tokens // 2 + 1)
    return in_two_chunks, partial(models.step, pairs)


def similar_lengths(models: Models):
    """The micro-batches of a step hold prompts of similar length, so that less is padded."""
    mixed = []
    for index in (0, 1):
        for prompt in (64, 128, 256, 512):
            mixed.append(models.draw(2, prompt=prompt)[index])
    alike = sorted(mixed, key=lambda example: len(example.prompt_ids))
    in_order = partial(models.step, mixed, micro_batch_size=4)
    return in_order, partial(models.step, alike, micro_batch_size=4)


def no_mask(models: Models):
    """Rows with one response are plainly causal and need no mask."""
    examples = models.draw(4, n=1)

    def step(pack_examples) -> float:
        student = models.student
        batch = pack_examples(examples, student)
        loss = student.hidden_states(batch)[batch.predict_index].square().mean()
        loss.backward()
        student.model.zero_grad()
        return loss.item()

    return partial(step, pack_with_mask), partial(step, pack)


def pack_with_mask(examples: list[Example], lm: LM) -> Batch:
    """`pack` with the mask and the positions spelled out where a row holds one response."""
    batch = pack(examples, lm)
    rows, width = batch.input_ids.shape
    device = batch.input_ids.device
    causal = torch.ones(width, width, dtype=torch.bool, device=device).tril()
    batch.attention_mask = causal.expand(rows, 1, width, width).contiguous()
    batch.position_ids = torch.arange(width, device=device).expand(rows, width)
    return batch


@torch.no_grad()
def sum_of_hidden_states(lms: list[LM], batches: list[Batch]) -> float:
    total = 0.0
    for lm, batch in zip(lms, batches):
        total += lm.hidden_states(batch).sum().item()
    return total


def one_packed_batch(models: Models):
    """Student and teacher read one batch, which is packed once."""
    pairs = models.draw(2)
    lms = [models.student, models.teacher]

    def pack_for_each() -> float:
        return sum_of_hidden_states(lms, [pack(pairs, lm) for lm in lms])

    def pack_once() -> float:
        batch = pack(pairs, *lms)
        return sum_of_hidden_states(lms, [batch, batch])

    return pack_for_each, pack_once


def stacked_teachers(models: Models):
    """Two teachers of one shape run as one model with stacked weights."""
    teachers = [models.teacher, models.other_teacher]
    batch = pack(models.draw(2), models.teacher)
    backbones = [lm.model.base_model for lm in teachers]
    weights, buffers = torch.func.stack_module_state(backbones)

    def one_backbone(weights, buffers):
        output = torch.func.functional_call(
            backbones[0],
            (weights, buffers),
            (batch.input_ids,),
            {
                "attention_mask": batch.attention_mask,
                "position_ids": batch.position_ids,
                "use_cache": False,
            },
        )
        return output.last_hidden_state

    @torch.no_grad()
    def stacked() -> float:
        return torch.vmap(one_backbone)(weights, buffers).sum().item()

    return partial(sum_of_hidden_states, teachers, [batch, batch]), stacked


@contextmanager
def replaced(owner, name: str, value):
    """Sets an attribute for the time of a `with` block."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def bf16_logits(lm: LM, hidden: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """`LM.logits` with a product of bfloat16 numbers, summed in float32, and float32 after that."""
    with torch.autocast(hidden.device.type, torch.bfloat16):
        logits = lm.model.get_output_embeddings()(hidden)
    return logits[:, :vocab_size].float()


def bf16_head(models: Models):
    """Logits are computed in bfloat16 and their softmax in float32."""
    pairs = models.draw(2)

    def step_in_bf16() -> float:
        with replaced(LM, "logits", bf16_logits):
            return models.step(pairs)

    return partial(models.step, pairs), step_in_bf16


def bf16_everything(models: Models):
    """All models run under bfloat16 autocast, as they do on a GPU."""
    pairs = models.draw(2)

    def step_in_bf16() -> float:
        student_in_bf16 = replaced(models.student, "autocast_enabled", True)
        teacher_in_bf16 = replaced(models.teacher, "autocast_enabled", True)
        with student_in_bf16, teacher_in_bf16:
            return models.step(pairs)

    return partial(models.step, pairs), step_in_bf16


def compiled_backbone(models: Models):
    """The student's backbone is compiled. Its first call compiles it."""
    pairs = models.draw(2)
    model = models.student.model
    backbone = torch.compile(model.base_model, dynamic=True)

    def step_compiled() -> float:
        with replaced(model, model.base_model_prefix, backbone):
            return models.step(pairs)

    return partial(models.step, pairs), step_compiled


COMPILE = "torch.compile of the student's backbone"
IDEAS = {
    "no recomputation where one chunk suffices": no_recomputation,
    "micro-batches of similar length": similar_lengths,
    "no mask where a row holds one response": no_mask,
    "one packed batch for student and teacher": one_packed_batch,
    "two teachers as one stacked model": stacked_teachers,
    "bfloat16 logits, float32 softmax": bf16_head,
    "bfloat16 autocast of everything": bf16_everything,
    COMPILE: compiled_backbone,
}


# -------------------------------------------------------------------------------------- measurement
def measure(without_idea, with_idea, repeats: int, device: torch.device) -> dict:
    """Seconds and memory of two functions that return a loss, turn by turn."""
    functions = {"without": without_idea, "with": with_idea}
    result = {}
    losses = {}
    for way, function in functions.items():
        with PeakMemory(device) as memory:
            losses[way] = function()
        result[way] = {"seconds": [], "step_bytes": memory.peak - memory.start}
    for order in turns(functions, repeats):
        for way in order:
            result[way]["seconds"].append(seconds_of(functions[way], device))
    result["difference"] = abs(losses["with"] - losses["without"])
    return result


def main(args: Args) -> dict:
    started = time.time()
    device = prepare(args)
    vocab_size = vocabulary_size("49k")
    shrink = 1
    if args.quick:
        args.shape = "tiny"
        args.repeats = 2
        args.compile = False
        vocab_size = 1024
        shrink = 8
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        load_one = partial(load, Path(folder), args.shape, vocab_size)
        models = Models(
            student=load_one(0, device, trainable=True),
            teacher=load_one(1, device),
            other_teacher=load_one(2, device),
            vocab_size=vocab_size,
            shrink=shrink,
        )
        for name, idea in IDEAS.items():
            if name == COMPILE and not args.compile:
                continue
            without_idea, with_idea = idea(models)
            compile_seconds = seconds_of(with_idea, device) if name == COMPILE else None
            results[name] = measure(without_idea, with_idea, args.repeats, device)
            if compile_seconds is not None:
                results[name]["compile_seconds"] = compile_seconds
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
        seconds_without = statistics.median(idea["without"]["seconds"])
        seconds_with = statistics.median(idea["with"]["seconds"])
        rows.append(
            [
                name,
                f"{seconds_without:.3f}",
                f"{seconds_with:.3f}",
                f"{seconds_without / seconds_with:.2f}×",
                f"{idea['without']['step_bytes'] / 1e9:.2f}",
                f"{idea['with']['step_bytes'] / 1e9:.2f}",
                f"{idea['difference']:.0e}",
            ]
        )
    header = ["idea", "without, s", "with, s", "speed", "without, GB", "with, GB"]
    header.append("change of the loss")
    return markdown(header, rows)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
