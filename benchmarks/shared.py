"""What all benchmarks need: random checkpoints of public shapes, a clock, memory, and one file of
results, which fills the tables of the page."""

import ctypes
import importlib.metadata
import json
import os
import platform
import re
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from common import LM, Example

HERE = Path(__file__).parent
RESULTS = str(HERE / "results.json")
QUICK = str(HERE.parent / "runs" / "benchmarks.json")

# Of public checkpoints, from their config.json. Weights are random and nothing is downloaded.
SMOLLM2_135M = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
SHAPES = {
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "smollm2-135m": SMOLLM2_135M,
    "smollm2-135m/10": {**SMOLLM2_135M, "num_hidden_layers": 3},
    "llama-3.2-1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "llama-3.1-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": False,
    },
}
VOCABULARIES = {"49k": 49152, "128k": 128256}  # SmolLM2's and Llama 3's


@dataclass
class Setup:
    """What a training step is taken with. Scripts with fewer frozen models leave some out."""

    examples: list[Example]
    args: object
    """flags of the script, as its Args"""
    vocab_size: int
    student: LM
    teacher: LM | None = None
    teacher_ref: LM | None = None


# ------------------------------------------------------------------------------------------- models
def vocabulary_size(name: str) -> int:
    """The tokens of a named vocabulary, or of one that is given by its number."""
    return VOCABULARIES[name] if name in VOCABULARIES else int(name)


def checkpoint(folder: Path, shape: str, vocab_size: int, seed: int) -> Path:
    """A random checkpoint as a Hugging Face folder, in bfloat16 as such models are published.

    Weights are drawn so wide that next-token distributions are far from uniform. Losses that agree
    then agree for a reason.
    """
    path = folder / f"{shape.replace('/', '-')}-{vocab_size}-{seed}"
    if path.exists():
        return path
    token_ids = {"<pad>": 0, "<s>": 1, "</s>": 2}
    for token_id in range(len(token_ids), vocab_size):
        token_ids[f"t{token_id}"] = token_id
    tokenizer = Tokenizer(models.WordLevel(token_ids, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(path)
    config = AutoConfig.for_model(
        "llama",
        vocab_size=vocab_size,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.06,
        max_position_embeddings=8192,
        **SHAPES[shape],
    )
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(path)
    return path


def load(
    folder: Path,
    shape: str,
    vocab_size: int,
    seed: int,
    device: torch.device,
    *,
    trainable: bool = False,
    bf16: bool = False,
) -> LM:
    """A random model of a named shape, or the model in any folder or with any hub id, as the LM
    that the scripts train and score with."""
    path = checkpoint(folder, shape, vocab_size, seed) if shape in SHAPES else shape
    lm = LM(path, device, trainable=trainable)
    if bf16:
        # The scripts do this on a GPU. On a CPU it is something to compare.
        lm.autocast_enabled = True
    return lm


# --------------------------------------------------------------------------------- time and memory
def prepare(args) -> torch.device:
    """The device of a benchmark, after --threads and --quick have been obeyed."""
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.quick and args.output == RESULTS:
        args.output = QUICK
    default = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(args.device or default)


def clock(device: torch.device) -> float:
    """Seconds. With a single thread they are those of the process, which a busy machine hardly
    changes."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    if device.type == "cpu" and torch.get_num_threads() == 1:
        return time.process_time()
    return time.perf_counter()


def seconds_of(function, device: torch.device) -> float:
    """The seconds that a function without arguments takes."""
    started = clock(device)
    function()
    return clock(device) - started


def turns(ways, repeats: int) -> list[list[str]]:
    """The order of the ways in every repeat. They take turns, so that a busy machine slows all of
    them, and each repeat begins with another one."""
    order = list(ways)
    orders = []
    for _ in range(repeats):
        orders.append(order)
        order = order[1:] + order[:1]
    return orders


def matmul_peak(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """Floating-point operations a second of one large matrix product."""
    left = torch.randn(size, size, device=device).to(dtype)
    right = torch.randn(size, size, device=device).to(dtype)

    def product():
        return left @ right

    product()  # the first one is slower
    return 2 * size**3 / seconds_of(product, device)


class PeakMemory:
    """Bytes in use at the start and at the peak of a `with` block.

    On a GPU they are the allocator's. On a CPU they are the resident ones of the process, whose
    high-water mark Linux can reset. Freed heap is returned first, so that the start is what is
    alive. Other systems do not tell, and the bytes are 0.
    """

    def __init__(self, device: torch.device):
        self.on_gpu = device.type == "cuda"
        self.high_water_mark = Path("/proc/self/clear_refs")
        self.start = 0
        self.peak = 0

    def __enter__(self):
        if self.on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self.start = torch.cuda.memory_allocated()
        elif self.high_water_mark.exists():
            ctypes.CDLL(None).malloc_trim(0)
            self.high_water_mark.write_text("5")
            self.start = resident_bytes("VmRSS")
        return self

    def __exit__(self, *exception):
        if self.on_gpu:
            self.peak = torch.cuda.max_memory_allocated()
        elif self.high_water_mark.exists():
            self.peak = resident_bytes("VmHWM")


def resident_bytes(field: str) -> int:
    """VmRSS, what is resident now, or VmHWM, the most that was."""
    status = Path("/proc/self/status").read_text()
    kilobytes = re.search(rf"{field}:\s*(\d+) kB", status)[1]
    return 1024 * int(kilobytes)


# ------------------------------------------------------------------------------ machine and results
def machine(device: torch.device) -> dict:
    """Hardware and versions, as the page prints them."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else cpu_name()
    load_average = None
    if hasattr(os, "getloadavg"):  # Windows has none
        load_average = round(os.getloadavg()[0], 2)
    description = {
        "device": name,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "load average at the end": load_average,
        "python": platform.python_version(),
    }
    for package in ("torch", "transformers", "trl", "accelerate"):
        try:
            description[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            description[package] = "not installed"
    return description


def cpu_name() -> str:
    """The processor's name, which Linux keeps in a file."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = re.search(r"model name\s*: (.*)", cpuinfo.read_text())
        if found:
            return found[1]
    return platform.processor()


def markdown(header: list[str], rows: list[list]) -> str:
    """A table of Markdown."""
    lines = []
    for cells in [header, ["---"] * len(header), *rows]:
        text = " | ".join(str(cell) for cell in cells)
        lines.append(f"| {text} |")
    return "\n".join(lines)


def fill(page: str, tables: dict[str, str]) -> str:
    """A page whose tables are replaced. Each stands between `<!-- results:NAME -->` and
    `<!-- /results -->`. A table that the page does not show is left out."""
    for name, table in tables.items():
        opening = f"<!-- results:{name} -->\n"
        closing = "<!-- /results -->"
        if opening in page:
            before, _, rest = page.partition(opening)
            _, _, after = rest.partition(closing)
            page = f"{before}{opening}{table}\n{closing}{after}"
    return page


def record(output: Path, benchmark: str, result: dict, tables: dict[str, str]):
    """Puts a result into the file of all results. The page's own file fills the page as well."""
    results = json.loads(output.read_text()) if output.exists() else {}
    results[benchmark] = result
    output.parent.mkdir(exist_ok=True)
    output.write_text(json.dumps(results, indent=1))
    if str(output) == RESULTS:
        page = HERE / "README.md"
        filled = fill(page.read_text(encoding="utf-8"), tables)
        page.write_text(filled, encoding="utf-8")
    for name, table in tables.items():
        has_rows = table.count("\n") > 1
        if has_rows:
            print(f"{name}\n{table}\n")
    print(f"everything is in {output}")
