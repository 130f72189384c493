"""The training step of every script against a padded row per response and against TRL: time,
memory, and its share of the matmul peak.

Three ways to the same loss, on the same random models, data and optimiser:

    padded       what one would write first: a row per response, padded to the longest, logits at
                 all positions (padded.py)
    prefdistill  the terms of the script itself, weighted as its training loop weights them
    TRL          where it has the objective (trl_steps.py)

Losses must agree to 1e-3 before anything is timed. Then the ways take turns, so that a busy machine
slows all of them, and the median is reported. Every step is forward, backward, clipping and AdamW
at learning rate 0: weights stay equal.

    python -m benchmarks.step             # the tables of the page: 15 minutes on two CPU cores
    python -m benchmarks.step --quick     # a minute on tiny models; the page stays as it is
    python -m benchmarks.step --student llama-3.2-1b --teacher llama-3.1-8b --examples 8 \\
        --output gpu.json                 # a GPU

On a CPU memory is the process's. On a GPU it is the allocator's, and bfloat16 autocast is on, as in
the scripts.
"""

import importlib.util
import re
import statistics
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
import tyro
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import adpa
import dckd
import dpkd
import pad
import rm_distiller
from benchmarks import padded, trl_steps
from benchmarks.shared import (
    RESULTS,
    PeakMemory,
    Setup,
    load,
    machine,
    markdown,
    matmul_peak,
    prepare,
    record,
    seconds_of,
    turns,
    vocabulary_size,
)
from common import Example, weighted


@dataclass
class Args:
    quick: bool = False
    """tiny models, few repeats, runs/benchmarks.json"""
    student: str = "smollm2-135m"
    """shape of the student (a name in benchmarks/shared.py), a folder or a hub id"""
    teacher: str = "smollm2-135m"
    """shape of the frozen models, a folder or a hub id"""
    growth: str = "smollm2-135m/10"
    """shape of both in the tables of growth"""
    examples: int = 1
    """examples of a step in the table of methods"""
    repeats: int = 5
    """timed steps of every way, of which the median counts"""
    device: str = ""
    """cpu, cuda, ... (default: cuda where there is one)"""
    threads: int = 0
    """threads of the CPU, if not torch's own choice"""
    only: str = ""
    """a regular expression that the names of cases must match"""
    output: str = RESULTS
    """where results go; the page is filled from its own file alone"""


@dataclass
class Case:
    table: str
    """table of the page that the case stands in"""
    script: str
    n: int = 2
    """responses of an example"""
    vocab: str = "49k"
    prompt: int = 256
    answer: int = 128
    """lengths are drawn between 3/4 of these and these"""
    examples: int = 2
    chunk: int = 1024
    ways: tuple[str, ...] = ("padded", "prefdistill")
    flags: dict = field(default_factory=dict)
    """flags of the script"""
    note: str = ""
    """what the page's table adds to the script's name"""
    bf16: bool = False
    """bfloat16 autocast (on a GPU always)"""
    timed: bool = True
    """or for its memory alone"""

    @property
    def name(self) -> str:
        words = [self.table, self.script]
        if self.note:
            words.append(self.note)
        words += [f"n={self.n}", f"V={self.vocab}", f"prompt={self.prompt}"]
        words += [f"answer={self.answer}", f"examples={self.examples}"]
        return " ".join(words)


# ------------------------------------------------------------------- the scripts' own training step
# The loss of a micro-batch, weighted as in the training loop of the script. A change there is a
# change here: the losses of padded rows, which know nothing of the loop, find it.
def dckd_loss(micro_batch: list[Example], setup: Setup, batch_size: int) -> torch.Tensor:
    args = setup.args
    terms = dckd.dckd_terms(micro_batch, setup.student, setup.teacher, setup.vocab_size, args)
    sft = terms["sft"].sum() / batch_size
    kl_chosen = terms["kl_chosen"].sum() / batch_size
    kl_rejected = terms["kl_rejected"].sum() / batch_size
    loss = sft + weighted(args.kl_chosen, kl_chosen)
    return loss + weighted(args.kl_rejected, kl_rejected)


def adpa_loss(micro_batch: list[Example], setup: Setup, batch_size: int) -> torch.Tensor:
    terms = adpa.adpa_terms(
        micro_batch,
        setup.student,
        setup.teacher,
        setup.teacher_ref,
        setup.vocab_size,
        setup.args,
    )
    sft = terms["sft"].sum() / batch_size
    advantage = terms["advantage"].sum() / batch_size
    return sft - setup.args.gamma * advantage


def dpkd_loss(micro_batch: list[Example], setup: Setup, batch_size: int) -> torch.Tensor:
    args = setup.args
    terms = dpkd.dpkd_terms(micro_batch, setup.student, setup.teacher, setup.vocab_size, args)
    preference = terms["preference"].sum() / batch_size
    sft = terms["sft"].sum() / batch_size
    lm_loss = terms["lm"].sum() / batch_size
    return preference + weighted(args.sft_coef, sft) + weighted(args.lm_coef, lm_loss)


def pad_loss(micro_batch: list[Example], setup: Setup, batch_size: int) -> torch.Tensor:
    terms = pad.pad_terms(micro_batch, setup.student, setup.vocab_size, setup.args)
    return terms["ranking"].sum() / batch_size


def rm_distiller_loss(micro_batch: list[Example], setup: Setup, batch_size: int) -> torch.Tensor:
    args = setup.args
    terms = rm_distiller.rm_distiller_terms(
        micro_batch, setup.student, setup.teacher, setup.vocab_size, args
    )
    parts = {name: term.sum() / batch_size for name, term in terms.items()}
    kl = parts.get("kl", 0.0)
    nll = parts.get("nll", 0.0)
    return parts["pair"] + weighted(args.kl_coef, kl) + weighted(args.nll_coef, nll)


def run_micro_batches(loss_of_micro_batch, setup: Setup) -> float:
    """Forward and backward of a step, as the scripts' loops do it. Returns the loss, whose
    gradients it leaves behind."""
    total = 0.0
    batch_size = len(setup.examples)
    for start in range(0, batch_size, setup.args.micro_batch_size):
        micro_batch = setup.examples[start : start + setup.args.micro_batch_size]
        loss = loss_of_micro_batch(micro_batch, setup, batch_size)
        loss.backward()
        total += loss.item()
    return total


SCRIPTS = {"dckd": dckd, "adpa": adpa, "dpkd": dpkd, "pad": pad, "rm_distiller": rm_distiller}
FROZEN_MODELS = {"dckd": 1, "adpa": 2, "dpkd": 1, "pad": 0, "rm_distiller": 1}
LOSSES = {
    "dckd": dckd_loss,
    "adpa": adpa_loss,
    "dpkd": dpkd_loss,
    "pad": pad_loss,
    "rm_distiller": rm_distiller_loss,
}
PADDED_LOSSES = {
    "dckd": padded.dckd_loss,
    "adpa": padded.adpa_loss,
    "dpkd": padded.dpkd_loss,
    "pad": padded.pad_loss,
    "rm_distiller": padded.rm_distiller_loss,
}


# -------------------------------------------------------------------------------------- measurement
GROUPS = {  # operators by what they do, for the profile
    "matrix products": r"aten::(mm|addmm|bmm|baddbmm|linear|matmul)|mkldnn_linear"
    r"|gemm|cutlass|nvjet",
    "attention": r"attention|flash|fmha",
    "softmax": r"softmax|exp|logsumexp",
    "optimiser and clipping": r"_foreach|adam|lerp|addcdiv|addcmul|norm",
    "copies and gathers": r"copy|cat|index|gather|scatter|_to_copy|empty|zero|fill|clone"
    r"|Memcpy|Memset",
}


def loss_tolerance(loss: float, *, bf16: bool) -> float:
    """How far a loss may be from another way's, relative where it is above 1."""
    relative = 2e-2 if bf16 else 1e-3
    return relative * max(1.0, abs(loss))


def make_setup(case: Case, args: Args, folder: Path, device: torch.device) -> Setup:
    """The models, flags and examples of a case."""
    student_shape = args.growth
    teacher_shape = args.growth
    if case.table in ("methods", "bf16"):
        student_shape = args.student
        teacher_shape = args.teacher
    vocab_size = vocabulary_size(case.vocab)
    bf16 = case.bf16 or device.type == "cuda"
    script = SCRIPTS[case.script]
    setup = Setup(
        examples=draw_examples(case, vocab_size),
        args=script.Args(logits_chunk=case.chunk, micro_batch_size=case.examples, **case.flags),
        vocab_size=vocab_size,
        student=load(folder, student_shape, vocab_size, 0, device, trainable=True, bf16=bf16),
    )
    if FROZEN_MODELS[case.script] >= 1:
        setup.teacher = load(folder, teacher_shape, vocab_size, 1, device, bf16=bf16)
    if FROZEN_MODELS[case.script] >= 2:
        setup.teacher_ref = load(folder, teacher_shape, vocab_size, 2, device, bf16=bf16)
    if case.script == "rm_distiller":
        rm_distiller.add_reward_head(setup.student, seed=0)
    return setup


def draw_examples(case: Case, vocab_size: int) -> list[Example]:
    """Random examples, with what the scripts look for in their rows."""
    generator = torch.Generator().manual_seed(0)

    def draw(longest: int) -> list[int]:
        length = int(torch.randint(3 * longest // 4, longest + 1, (), generator=generator))
        return torch.randint(3, vocab_size, (length,), generator=generator).tolist()

    values = torch.randn(case.n, generator=generator)
    row = {
        "margin": 5.0,
        "average_logp": (-values.abs()).tolist(),
        "judgement": values.sigmoid().tolist(),
    }
    examples = []
    for number in range(case.examples):
        prompt_ids = draw(case.prompt)
        response_ids = [draw(case.answer) for _ in range(case.n)]
        examples.append(Example({"id": number, **row}, prompt_ids, response_ids))
    return examples


def make_optimizer(model) -> torch.optim.AdamW:
    """AdamW at learning rate 0. Its state is made at once, so that it does not count as memory of
    the first step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def take_step(way: str, script: str, setup: Setup, optimizer, trainer) -> float:
    """One training step of a way. Returns its loss."""
    model = setup.student.model
    if way == "TRL":
        model.activation_checkpointing_enable()  # its default
    # Gradient checkpointing works in train mode only.
    model.train(way == "TRL")
    if way == "prefdistill":
        loss = run_micro_batches(LOSSES[script], setup)
    elif way == "padded":
        padded_loss = PADDED_LOSSES[script](setup)
        padded_loss.backward()
        loss = padded_loss.item()
    else:
        loss = trl_steps.step_of(trainer, script, setup)
    model.activation_checkpointing_disable()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss


def measure(case: Case, args: Args, folder: Path, device: torch.device, *, profiled: bool) -> dict:
    """One case: the losses of all ways compared, then their seconds, memory and floating-point
    operations."""
    setup = make_setup(case, args, folder, device)
    bf16 = case.bf16 or device.type == "cuda"
    optimizer = make_optimizer(setup.student.model)
    trainer = None
    if "TRL" in case.ways:
        trainer = trl_steps.make_trainer(case.script, setup, folder, bf16=bf16)

    def step(way: str) -> float:
        return take_step(way, case.script, setup, optimizer, trainer)

    ways = {}
    for way in case.ways:
        with PeakMemory(device) as memory, FlopCounterMode(display=False) as flops:
            loss = step(way)
        ways[way] = {
            "loss": loss,
            "alive_bytes": memory.start,
            "peak_bytes": memory.peak,
            "seconds": [],
            "flops": flops.get_total_flops(),
        }
    check_losses(case, ways, setup, bf16=bf16)

    peaks = []
    matmul_dtype = torch.bfloat16 if bf16 else torch.float32
    matmul_size = 256 if args.quick else 2048
    repeats = args.repeats if case.timed else 0
    for order in turns(ways, repeats):
        peaks.append(matmul_peak(device, matmul_dtype, matmul_size))
        for way in order:
            ways[way]["seconds"].append(seconds_of(partial(step, way), device))

    result = {**asdict(case), "ways": ways, "matmul_flops_per_second": peaks}
    result["response_tokens"] = 0
    for example in setup.examples:
        result["response_tokens"] += sum(len(response) for response in example.response_ids)
    if profiled:
        result["profile"] = {
            "padded": profile(partial(step, "padded"), device),
            "prefdistill": profile(partial(step, "prefdistill"), device),
        }
    return result


def check_losses(case: Case, ways: dict[str, dict], setup: Setup, *, bf16: bool):
    """Ends the benchmark if a way has another loss than this project. GKDTrainer's is one term of
    DCKD's and compared with that term."""
    for way, result in ways.items():
        expected = ways["prefdistill"]["loss"]
        if case.script == "dckd" and way.startswith("TRL"):
            expected = trl_steps.token_kl(setup)
        if abs(result["loss"] - expected) > loss_tolerance(expected, bf16=bf16):
            raise SystemExit(
                f"error: {case.name}: the loss of {way} is {result['loss']}, not {expected}"
            )


def profile(step, device: torch.device) -> dict[str, float]:
    """The share of a step's time that goes into each group of operators."""
    seconds = Counter()
    with torch.profiler.profile() as profiler:
        step()
    for event in profiler.key_averages():
        on_gpu = device.type == "cuda"
        own_time = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        seconds[group_of(event.key)] += own_time
    shares = {}
    for group in [*GROUPS, "other"]:
        shares[group] = seconds[group] / seconds.total()
    return shares


def group_of(operator: str) -> str:
    """The first group whose pattern an operator's name contains."""
    for group, pattern in GROUPS.items():
        if re.search(pattern, operator):
            return group
    return "other"


# -------------------------------------------------------------------------------------------- cases
def all_cases(examples: int) -> list[Case]:
    """What the page shows, in its order. `examples` is the number of the table of methods."""
    with_trl = ("padded", "prefdistill", "TRL", "TRL lean")
    bradley_terry = {"refine": False, "margin": False, "kl_coef": 0.0}
    cases = [
        Case("methods", "dpkd", ways=with_trl, examples=examples),
        Case("methods", "dckd", ways=with_trl, examples=examples),
        Case("methods", "adpa", examples=examples),
        Case("methods", "pad", n=2, examples=examples),
        Case("methods", "pad", n=4, examples=examples),
        Case("methods", "rm_distiller", n=3, examples=examples),
        Case(
            "methods",
            "rm_distiller",
            ways=with_trl,
            flags=bradley_terry,
            note="Bradley-Terry",
            examples=examples,
        ),
        Case("bf16", "dpkd", ways=with_trl, bf16=True, examples=examples),
    ]
    for count in (1, 2, 4, 8):
        cases.append(
            Case(
                "tokens",
                "dckd",
                vocab="128k",
                prompt=64,
                answer=148,
                chunk=256,
                examples=count,
                timed=count < 8,
            )
        )
    for vocab in ("8192", "32768", "49k", "128k"):
        cases.append(Case("vocabulary", "dckd", vocab=vocab, examples=examples))
    for n in (2, 3, 4, 6):
        cases.append(Case("n", "pad", n=n, examples=examples))
    for prompt in (64, 128, 256, 512):
        cases.append(Case("prompt", "dckd", prompt=prompt, examples=examples))
    return cases


def make_quick(case: Case):
    """Cuts a case to an eighth of its tokens and to a small vocabulary."""
    case.prompt //= 8
    case.answer //= 8
    case.chunk //= 8
    if case.vocab == "49k":
        case.vocab = "1024"
    elif case.vocab == "128k":
        case.vocab = "2048"


def chosen_cases(args: Args) -> list[Case]:
    """The cases that --only, --quick and the packages that are installed leave."""
    has_trl = importlib.util.find_spec("trl") is not None
    cases = []
    for case in all_cases(args.examples):
        if args.quick:
            make_quick(case)
        if not has_trl:
            case.ways = ("padded", "prefdistill")
        if re.search(args.only, case.name):
            cases.append(case)
    return cases


# ------------------------------------------------------------------------------------------- tables
METHOD_HEADER = ["script", "n", "way", "s a step", "speed", "response tokens/s", "matmul peak"]
METHOD_HEADER += ["memory, GB", "of the step"]
GROWTH_HEADER = ["padded, s", "prefdistill, s", "speed"]
GROWTH_HEADER += ["padded, GB", "prefdistill, GB", "memory"]
GROWTH_TITLES = {
    "tokens": "response tokens",
    "vocabulary": "vocabulary",
    "n": "responses of a prompt",
    "prompt": "prompt tokens at most",
}


def tables(result: dict) -> dict[str, str]:
    """The page's tables from what was measured."""
    by_table = {name: [] for name in ["methods", "bf16", *GROWTH_TITLES]}
    profile_rows = []
    for case in result["cases"]:
        by_table[case["table"]].append(case)
        for way, shares in case.get("profile", {}).items():
            profile_rows.append([way, *map(percent, shares.values())])

    filled = {}
    for name in ("methods", "bf16"):
        rows = []
        for case in by_table[name]:
            rows += method_rows(case)
        filled[name] = markdown(METHOD_HEADER, rows)
    for name, title in GROWTH_TITLES.items():
        rows = [growth_row(case) for case in by_table[name]]
        filled[name] = markdown([title, *GROWTH_HEADER], rows)
    filled["profile"] = markdown(["", *GROUPS, "other"], profile_rows)
    filled["machine"] = markdown(["", ""], list(result["machine"].items()))
    return filled


def median_seconds(way: dict) -> float:
    return statistics.median(way["seconds"])


def step_gigabytes(way: dict) -> float:
    """What a step adds to the memory of models and optimiser."""
    return (way["peak_bytes"] - way["alive_bytes"]) / 1e9


def percent(share: float) -> str:
    return f"{100 * share:.0f}%"


def method_rows(case: dict) -> list[list]:
    """A row for every way to a method's step."""
    matmul_speed = statistics.median(case["matmul_flops_per_second"])
    padded_seconds = median_seconds(case["ways"]["padded"])
    script = f"{case['script']} {case['note']}".strip()
    rows = []
    for name, way in case["ways"].items():
        seconds = median_seconds(way)
        rows.append(
            [
                script,
                case["n"],
                name,
                f"{seconds:.2f}",
                f"{padded_seconds / seconds:.2f}×",
                f"{case['response_tokens'] / seconds:.0f}",
                percent(way["flops"] / seconds / matmul_speed),
                f"{way['peak_bytes'] / 1e9:.2f}",
                f"{step_gigabytes(way):.2f}",
            ]
        )
    return rows


def growth_row(case: dict) -> list[str]:
    """Seconds and memory of a step, of padded rows and of this project. A case that is not timed
    has its memory alone."""
    first = case["ways"]["padded"]
    second = case["ways"]["prefdistill"]
    times = ["", "", ""]
    if case["timed"]:
        times = [
            f"{median_seconds(first):.3f}",
            f"{median_seconds(second):.3f}",
            f"{median_seconds(first) / median_seconds(second):.2f}×",
        ]
    less_memory = step_gigabytes(first) / max(step_gigabytes(second), 1e-9)
    memory = [f"{step_gigabytes(first):.2f}", f"{step_gigabytes(second):.2f}"]
    return [growth_value(case), *times, *memory, f"{less_memory:.1f}×"]


def growth_value(case: dict) -> str:
    """What grows in the table that a case stands in."""
    if case["table"] == "tokens":
        return str(case["response_tokens"])
    if case["table"] == "vocabulary":
        return f"{vocabulary_size(case['vocab']):,}"
    return str(case[case["table"]])


# --------------------------------------------------------------------------------------------- main
def main(args: Args) -> dict:
    started = time.time()
    device = prepare(args)
    if args.quick:
        args.student = "tiny"
        args.teacher = "tiny"
        args.growth = "tiny"
    measured = []
    profiled = False
    with tempfile.TemporaryDirectory() as folder:
        for case in tqdm(chosen_cases(args)):
            wants_profile = case.table == "methods" and not profiled
            result = measure(case, args, Path(folder), device, profiled=wants_profile)
            measured.append(result)
            profiled = profiled or wants_profile
            times = []
            if case.timed:
                for name, way in result["ways"].items():
                    times.append(f"{name} {median_seconds(way):.3f} s")
            tqdm.write(f"{case.name}: {', '.join(times)}")
    result = {
        "args": vars(args),
        "machine": machine(device),
        "cases": measured,
        "seconds": time.time() - started,
    }
    record(Path(args.output), "step", result, tables(result))
    return result


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
