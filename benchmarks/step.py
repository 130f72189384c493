"""The training step of every script against a padded row per response and against TRL: time, memory, matmul share.

Three ways to the same loss, on the same random models, data and optimiser:

    padded       what one would write first: a row per response, padded to the longest, logits at all positions
    prefdistill  the training loop of the script itself, cut out of its source
    TRL          where it has the objective: DPOTrainer has DPKD's loss, GKDTrainer DCKD's KL, RewardTrainer pairs

Losses must agree to 1e-3 before anything is timed. Then the ways take turns, so that a busy machine slows all of them,
and the median is reported. Every step is forward, backward, clipping and AdamW at learning rate 0: weights stay equal.

    python -m benchmarks.step             # the tables of the README: about 15 minutes on two CPU cores
    python -m benchmarks.step --quick     # a minute on tiny models; the README stays as it is
    python -m benchmarks.step --student llama-3.2-1b --teacher llama-3.1-8b --examples 8 --output gpu.json      # a GPU

On a CPU memory is the process's. On a GPU it is the allocator's, and bfloat16 autocast is on, as in the scripts.
"""

import ast
import copy
import importlib
import importlib.util
import inspect
import re
import statistics
import tempfile
import textwrap
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import tyro
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from benchmarks.shared import (
    QUICK,
    RESULTS,
    VOCABULARIES,
    PeakMemory,
    clock,
    load,
    machine,
    markdown,
    matmul_peak,
    record,
)
from common import LM, Example

TOLERANCE = {
    False: 1e-3,
    True: 2e-2,
}  # of a loss in float32 and under bfloat16 autocast, relative where it is above 1


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
    """where results go; the README is filled from its own file alone"""


@dataclass
class Case:
    table: str
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
    flags: tuple[tuple[str, object], ...] = ()
    """flags of the script"""
    note: str = ""
    """what the README's table adds to the script's name"""
    bf16: bool = False
    """bfloat16 autocast (on a GPU always)"""
    timed: bool = True
    """or for its memory alone"""

    @property
    def name(self):
        sizes = f"n={self.n} V={self.vocab} prompt={self.prompt} answer={self.answer} examples={self.examples}"
        return " ".join(filter(None, [self.table, self.script, self.note, sizes]))


# -------------------------------------------------------------------------------------------------- (a) padded rows
class Padded:
    """A batch of one row per response, padded on the right, and [R, T-1, V] float32 log-probs of models on it."""

    def __init__(self, examples: list[Example], device: torch.device):
        rows = [
            (prompt + response, len(prompt))
            for _, prompt, responses in examples
            for response in responses
        ]
        width = max(len(row) for row, _ in rows)
        ids = torch.tensor([row + [0] * (width - len(row)) for row, _ in rows])
        place = torch.arange(width)
        ends, starts = (
            torch.tensor([len(row) for row, _ in rows]),
            torch.tensor([start for _, start in rows]),
        )
        self.ids, self.attention_mask = ids.to(device), (place < ends[:, None]).long().to(device)
        self.scored = ((place >= starts[:, None]) & (place < ends[:, None]))[:, 1:].to(
            device
        )  # [R, T-1]
        self.last = (ends - 1).to(device)

    def outputs(self, lm: LM, **how):
        with torch.set_grad_enabled(lm.trains), lm.autocast():
            return lm.model(self.ids, attention_mask=self.attention_mask, use_cache=False, **how)

    def log_probs(self, lm: LM) -> torch.Tensor:
        return self.outputs(lm).logits[:, :-1].float().log_softmax(-1)

    def target_logps(self, log_probs: torch.Tensor) -> torch.Tensor:
        return log_probs.gather(-1, self.ids[:, 1:, None]).squeeze(-1)  # [R, T-1]

    def means(self, values: torch.Tensor) -> torch.Tensor:
        return (values * self.scored).sum(-1) / self.scored.sum(-1)  # [R]


def padded_dckd(script, args, examples, student, teacher, **_):
    batch = Padded(examples, student.device)
    ours, theirs = batch.log_probs(student), batch.log_probs(teacher)
    nll = -batch.means(batch.target_logps(ours)).view(-1, 2)
    kl = batch.means(script.forward_kl(theirs, ours)).view(-1, 2)
    return (nll[:, 0] + args.kl_chosen * kl[:, 0] + args.kl_rejected * kl[:, 1]).mean()


def padded_adpa(script, args, examples, student, frozen, **_):
    batch = Padded(examples, student.device)
    states = Padded(
        [Example(row, prompt, responses[1:]) for row, prompt, responses in examples], student.device
    )
    ours = batch.log_probs(student)
    sft = -batch.means(batch.target_logps(ours)).view(-1, 2)[:, 0]
    advantage = script.advantages(
        *map(states.log_probs, frozen)
    )  # [B, T-1, V], with T of the states alone
    values = script.expected_advantage(ours[1::2, : advantage.shape[1]], advantage)
    return (sft - args.gamma * states.means(values)).mean()


def padded_dpkd(script, args, examples, student, teacher, **_):
    batch = Padded(examples, student.device)
    ours, theirs = (batch.target_logps(batch.log_probs(lm)) for lm in (student, teacher))
    log_ratios = batch.means(ours - theirs) * (1 if args.length_normalize else batch.scored.sum(-1))
    return script.preference_loss(args.beta * log_ratios)[0].mean()


def padded_pad(script, args, examples, student, n, distance, **_):
    batch = Padded(examples, student.device)
    ours = batch.means(batch.target_logps(batch.log_probs(student))).view(-1, n)
    theirs = torch.tensor([example.row["score"] for example in examples]).to(ours)
    return distance(args.beta * ours, args.beta * theirs).mean()


def padded_rm_distiller(script, args, examples, student, teacher, **_):
    """Pairs as rows through the backbone and the reward head, answers y_T as rows through the language model."""
    pairs = Padded(
        [Example(row, prompt, responses[:2]) for row, prompt, responses in examples], student.device
    )
    with student.autocast():
        hidden = student.model.base_model(
            pairs.ids, attention_mask=pairs.attention_mask
        ).last_hidden_state
    better, worse = (
        student.model.score(hidden[range(len(hidden)), pairs.last].float()).view(-1, 2).unbind(1)
    )
    margins = torch.tensor([row["margin"] for row, *_ in examples]).to(better)
    loss = script.pair_loss(
        better, worse, args.margin_scale * margins if args.margin else None
    ).mean()
    if args.kl_coef:
        answers = Padded(
            [Example(row, prompt, responses[2:]) for row, prompt, responses in examples],
            student.device,
        )
        theirs, ours = map(answers.log_probs, (teacher, student))
        loss = loss + args.kl_coef * answers.means(script.forward_kl(theirs, ours)).mean()
    return loss


# -------------------------------------------------------------------------------------------- (b) the scripts' own
def training_loop(script):
    """The code of a script's micro-batch loop, forward to backward, with the functions inside `main` that it calls."""
    main = ast.parse(textwrap.dedent(inspect.getsource(script.main))).body[0]
    loops = [
        node
        for node in ast.walk(main)
        if isinstance(node, ast.For) and "len(drawn)" in ast.unparse(node.iter)
    ]
    called = {node.id for node in ast.walk(loops[0]) if isinstance(node, ast.Name)}
    helpers = [
        node for node in main.body if isinstance(node, ast.FunctionDef) and node.name in called
    ]
    return compile(
        ast.Module([*helpers, loops[0]], []), f"{script.__name__}.py: training loop", "exec"
    )


def run_loop(code, script, examples, **names) -> float:
    """Runs it with the names that `main` has at that point; returns the loss, whose gradients it leaves behind."""
    scope = {**vars(script), **names, "drawn": examples, "losses": Counter(), "tokens": 0}
    exec(code, scope)
    return scope["losses"]["total"]


# -------------------------------------------------------------------------------------------------------- (c) TRL
def trl_trainer(case: Case, args, student: LM, teacher: LM, bf16: bool, folder: Path):
    """The trainer of TRL with this objective, a function that makes its batch of examples, and one that says what its
    loss must be where it is only a term of ours."""
    import trl
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    how = {
        "output_dir": str(folder / "trl"),
        "report_to": [],
        "bf16": bf16,
        "use_cpu": student.device.type == "cpu",
    }
    how |= {"max_length": None, "per_device_train_batch_size": case.examples}
    text = Dataset.from_list([{"prompt": "t5 t6 ", "chosen": "t7 ", "rejected": "t8 "}])
    models = {"model": student.model, "processing_class": student.tokenizer, "train_dataset": text}

    def pairs(examples):
        keys = "prompt_ids", "chosen_ids", "rejected_ids"
        return trainer.data_collator(
            [dict(zip(keys, (prompt, *responses))) for _, prompt, responses in examples]
        )

    def whole_pairs(examples):
        both = [
            [prompt + response for response in responses[:2]] for _, prompt, responses in examples
        ]
        return trainer.data_collator(
            [{"chosen_ids": chosen, "rejected_ids": rejected} for chosen, rejected in both]
        )

    def rows(examples):
        batch = Padded(examples, student.device)
        labels = batch.ids.clone()
        labels[:, 1:][~batch.scored] = labels[:, 0] = -100
        return {"input_ids": batch.ids, "attention_mask": batch.attention_mask, "labels": labels}

    @torch.no_grad()
    def token_kl(examples):
        batch = Padded(examples, student.device)
        script = importlib.import_module(case.script)
        return (
            script.forward_kl(*map(batch.log_probs, (teacher, student)))[batch.scored].mean().item()
        )

    if case.script == "dpkd":
        loss = "sigmoid_norm" if args.length_normalize else "sigmoid"
        config = trl.DPOConfig(**how, beta=args.beta, loss_type=[loss])
        trainer, collate, expected = (
            trl.DPOTrainer(**models, ref_model=teacher.model, args=config),
            pairs,
            None,
        )
    elif case.script == "rm_distiller":
        config = trl.RewardConfig(**how)
        with torch.device(
            "meta"
        ):  # the class that the trainer wants, around the weights that the others train
            shape = copy.deepcopy(student.config)
            shape.num_labels = 1
            model = AutoModelForSequenceClassification.from_config(shape)
        model.model, model.score = student.model.base_model, student.model.score
        text = text.map(lambda row: {f"{name}_ids": [5, 6, 7] for name in ("chosen", "rejected")})
        models |= {"model": model, "train_dataset": text}
        trainer, collate, expected = trl.RewardTrainer(**models, args=config), whole_pairs, None
    elif case.script == "dckd":
        config = GKDConfig(**how, beta=0.0, lmbda=0.0)  # the forward KL, on the data's own answers
        trainer, collate, expected = (
            GKDTrainer(**models, teacher_model=teacher.model, args=config),
            rows,
            token_kl,
        )
    trainer.current_gradient_accumulation_steps = 1  # which `train` sets before its first step
    return trainer, collate, expected


# ------------------------------------------------------------------------------------------------------ measurement
GROUPS = {  # operators by what they do, for the profile
    "matrix products": r"aten::(mm|addmm|bmm|baddbmm|linear|matmul)|mkldnn_linear|gemm|cutlass|nvjet",
    "attention": r"attention|flash|fmha",
    "softmax": r"softmax|exp|logsumexp",
    "optimiser and clipping": r"_foreach|adam|lerp|addcdiv|addcmul|norm",
    "copies and gathers": r"copy|cat|index|gather|scatter|_to_copy|empty|zero|fill|clone|Memcpy|Memset",
}


def measure(case: Case, args: Args, folder: Path, device: torch.device, profiled: bool) -> dict:
    """One case: the ways' losses compared, then their seconds, memory and floating-point operations."""
    vocab_size = VOCABULARIES.get(case.vocab) or int(case.vocab)
    shapes = (
        [args.student, args.teacher] if case.table in ("methods", "bf16") else [args.growth] * 2
    )
    bf16 = case.bf16 or device.type == "cuda"
    student = load(folder, shapes[0], vocab_size, 0, device, True, bf16)
    frozen = [
        load(folder, shapes[1], vocab_size, seed, device, bf16=bf16) for seed in FROZEN[case.script]
    ]
    script = importlib.import_module(case.script)
    flags = script.Args(logits_chunk=case.chunk, micro_batch_size=case.examples, **dict(case.flags))
    examples = draw_examples(case, vocab_size)
    names = {
        "student": student,
        "teacher": frozen[0] if frozen else None,
        "frozen": frozen,
        "vocab_size": vocab_size,
    }
    names |= {"args": flags, "shaping": {}, "corpus": [], "n": case.n}
    names["distance"] = getattr(script, getattr(flags, "loss", ""), None)
    if case.script == "rm_distiller":
        torch.manual_seed(0)
        student.model.score = torch.nn.Linear(
            student.config.hidden_size, 1, bias=False, device=device
        )
        names |= {"generation": flags.kl_coef > 0, "guide": frozen[0]}

    optimizer = torch.optim.AdamW(student.model.parameters(), lr=0.0, weight_decay=0.0)
    for weight in student.model.parameters():
        weight.grad = torch.zeros_like(weight)
    optimizer.step()  # makes AdamW's state, which is not to count as the first way's memory
    optimizer.zero_grad()

    code, padded = training_loop(script), globals()[f"padded_{case.script}"]
    if any(way.startswith("TRL") for way in case.ways):
        trainer, collate, expected = trl_trainer(
            case, flags, student, names["teacher"], bf16, folder
        )

    def step(way: str) -> float:
        """One step of a way; returns its loss."""
        checkpointing = way == "TRL" or "checkpointing" in way  # TRL's default
        student.model.train(checkpointing)
        if checkpointing:
            student.model.gradient_checkpointing_enable()
        if way.startswith("TRL"):
            loss = trainer.training_step(trainer.model, collate(examples)).item()
        elif way.startswith("prefdistill"):
            loss = run_loop(code, script, examples, **names)
        else:
            loss = padded(script, examples=examples, **names)
            loss.backward()
            loss = loss.item()
        student.model.gradient_checkpointing_disable()
        torch.nn.utils.clip_grad_norm_(student.model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    ways = {}
    for way in case.ways:
        with PeakMemory(device) as memory, FlopCounterMode(display=False) as flops:
            loss = step(way)
        ways[way] = {
            "loss": loss,
            "alive_bytes": memory.start,
            "peak_bytes": memory.peak,
            "seconds": [],
        }
        ways[way]["flops"] = flops.get_total_flops()
    first = ways["prefdistill"]["loss"]
    for way, result in ways.items():
        should = expected(examples) if way.startswith("TRL") and expected else first
        if abs(result["loss"] - should) > TOLERANCE[bf16] * max(1, abs(should)):
            raise SystemExit(
                f"error: {case.name}: the loss of {way} is {result['loss']}, not {should}"
            )

    order, peaks = list(ways), []
    for _ in range(args.repeats * case.timed):
        peaks.append(
            matmul_peak(
                device, torch.bfloat16 if bf16 else torch.float32, 256 if args.quick else 2048
            )
        )
        for way in order:
            tick = clock(device)
            step(way)
            ways[way]["seconds"].append(clock(device) - tick)
        order = order[1:] + order[:1]
    result = {**asdict(case), "ways": ways, "matmul_flops_per_second": peaks}
    result["response_tokens"] = sum(
        len(response) for example in examples for response in example.responses
    )
    if profiled:
        result["profile"] = {way: profile(step, way, device) for way in ("padded", "prefdistill")}
    return result


def draw_examples(case: Case, vocab_size: int) -> list[Example]:
    generator = torch.Generator().manual_seed(0)

    def draw(most: int) -> list[int]:
        length = int(torch.randint(3 * most // 4, most + 1, (), generator=generator))
        return torch.randint(3, vocab_size, (length,), generator=generator).tolist()

    number = range(case.examples)
    row = {"margin": 5.0, "score": torch.randn(case.n, generator=generator).tolist()}
    return [
        Example({"id": i, **row}, draw(case.prompt), [draw(case.answer) for _ in range(case.n)])
        for i in number
    ]


def profile(step, way: str, device: torch.device) -> dict[str, float]:
    """Share of a step's time that goes into each group of operators."""
    on_gpu, seconds = device.type == "cuda", Counter()
    with torch.profiler.profile() as profiler:
        step(way)
    for event in profiler.key_averages():
        group = next(
            (name for name, pattern in GROUPS.items() if re.search(pattern, event.key)), "other"
        )
        seconds[group] += event.self_device_time_total if on_gpu else event.self_cpu_time_total
    return {name: seconds[name] / seconds.total() for name in (*GROUPS, "other")}


# ------------------------------------------------------------------------------------------------------------- cases
FROZEN = {
    "dckd": [1],
    "adpa": [1, 2],
    "dpkd": [1],
    "pad": [],
    "rm_distiller": [1],
}  # seeds of the frozen models


def cases(args: Args) -> list[Case]:
    four = "padded", "prefdistill", "TRL", "TRL lean"
    size = {"examples": args.examples}
    plain = ("refine", False), ("margin", False), ("kl_coef", 0.0)
    found = [
        Case("methods", "dpkd", ways=four, **size),
        Case("methods", "dckd", ways=four, **size),
        Case("methods", "adpa", **size),
        Case("methods", "pad", **size),
        Case("methods", "pad", 4, **size),
        Case("methods", "rm_distiller", 3, **size),
        Case("methods", "rm_distiller", 2, ways=four, flags=plain, note="Bradley-Terry", **size),
        Case("bf16", "dpkd", ways=four, bf16=True, **size),
    ]
    of = {"vocab": "128k", "prompt": 64, "answer": 148, "chunk": 256}
    found += [Case("tokens", "dckd", examples=B, timed=B < 8, **of) for B in (1, 2, 4, 8)]
    found += [Case("vocabulary", "dckd", vocab=V, **size) for V in ("8192", "32768", "49k", "128k")]
    found += [Case("n", "pad", n, **size) for n in (2, 3, 4, 6)]
    found += [Case("prompt", "dckd", prompt=P, **size) for P in (64, 128, 256, 512)]
    for case in found:
        if args.quick:
            case.prompt, case.answer, case.chunk = (
                case.prompt // 8,
                case.answer // 8,
                case.chunk // 8,
            )
            case.vocab = {"49k": "1024", "128k": "2048"}.get(case.vocab, case.vocab)
        if not importlib.util.find_spec("trl"):
            case.ways = case.ways[:2]
    return [case for case in found if re.search(args.only, case.name)]


# ------------------------------------------------------------------------------------------------------------ tables
def tables(result: dict) -> dict[str, str]:
    """The README's tables from what was measured."""
    made, cases = {}, result["cases"]
    for name in ("methods", "bf16"):
        rows = [row for case in cases if case["table"] == name for row in method_rows(case)]
        header = [
            "script",
            "n",
            "way",
            "s a step",
            "speed",
            "response tokens/s",
            "matmul peak",
            "memory, GB",
            "of the step",
        ]
        made[name] = markdown(header, rows)
    for name, (title, value) in GROWTH.items():
        some = [
            case for case in cases if case["table"] == name
        ]  # seconds and memory of a step, both ways
        header = [
            title,
            "padded, s",
            "prefdistill, s",
            "speed",
            "padded, GB",
            "prefdistill, GB",
            "memory",
        ]
        made[name] = markdown(header, [[value(case), *compared(case)] for case in some])
    rows = [
        [name, *map(percent, shares.values())]
        for case in cases
        for name, shares in case.get("profile", {}).items()
    ]
    made["profile"] = markdown(["", *GROUPS, "other"], rows)
    made["machine"] = markdown(
        ["", ""], [[name, value] for name, value in result["machine"].items()]
    )
    return made


GROWTH = {  # tables of growth: heading of the first column, and its value for a case
    "tokens": ("response tokens", lambda case: case["response_tokens"]),
    "vocabulary": (
        "vocabulary",
        lambda case: f"{VOCABULARIES.get(case['vocab']) or int(case['vocab']):,}",
    ),
    "n": ("responses of a prompt", lambda case: case["n"]),
    "prompt": ("prompt tokens at most", lambda case: case["prompt"]),
}


def seconds(way: dict) -> float:
    return statistics.median(way["seconds"])


def percent(share: float) -> str:
    return f"{100 * share:.0f}%"


def method_rows(case: dict) -> list[list]:
    peak, rows = statistics.median(case["matmul_flops_per_second"]), []
    for name, way in case["ways"].items():
        rows.append(
            [f"{case['script']} {case['note']}".strip(), case["n"], name, f"{seconds(way):.2f}"]
        )
        rows[-1] += [f"{seconds(case['ways']['padded']) / seconds(way):.2f}×"]
        rows[-1] += [
            f"{case['response_tokens'] / seconds(way):.0f}",
            percent(way["flops"] / seconds(way) / peak),
        ]
        rows[-1] += [
            f"{way['peak_bytes'] / 1e9:.2f}",
            f"{(way['peak_bytes'] - way['alive_bytes']) / 1e9:.2f}",
        ]
    return rows


def compared(case: dict) -> list[str]:
    """Seconds and memory of the step (above models and optimiser), of padded rows and of this project."""
    ways = [case["ways"][name] for name in ("padded", "prefdistill")]
    memory = [(way["peak_bytes"] - way["alive_bytes"]) / 1e9 for way in ways]
    cells = ["", "", ""]
    if case["timed"]:
        times = [seconds(way) for way in ways]
        cells = [*(f"{t:.3f}" for t in times), f"{times[0] / times[1]:.2f}×"]
    return [*cells, *(f"{m:.2f}" for m in memory), f"{memory[0] / max(memory[1], 1e-9):.1f}×"]


def main(args: Args) -> dict:
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.quick:
        args.student = args.teacher = args.growth = "tiny"
        args.output = QUICK if args.output == RESULTS else args.output
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    started, measured, profiled = time.time(), [], set()
    with tempfile.TemporaryDirectory() as folder:
        for case in tqdm(cases(args)):
            measured.append(
                measure(case, args, Path(folder), device, case.table == "methods" and not profiled)
            )
            profiled.add("profile" in measured[-1])
            tqdm.write(
                f"{case.name}: "
                + ", ".join(
                    f"{k} {seconds(v):.3f} s" for k, v in measured[-1]["ways"].items() if case.timed
                )
            )
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
