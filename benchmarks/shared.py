"""What all benchmarks need: random checkpoints of public shapes, clock, memory, and one file of results."""

import ctypes
import importlib.metadata
import json
import os
import platform
import re
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from common import LM

HERE = Path(__file__).parent
RESULTS, QUICK = str(HERE / "results.json"), str(HERE.parent / "runs" / "benchmarks.json")
SHAPES = {  # of public checkpoints, from their config.json; weights are random and nothing is downloaded
    "tiny": {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    | {"intermediate_size": 128, "tie_word_embeddings": True},
    "smollm2-135m": {
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    }
    | {"intermediate_size": 1536, "tie_word_embeddings": True},
    "smollm2-135m/10": {
        "hidden_size": 576,
        "num_hidden_layers": 3,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    }
    | {"intermediate_size": 1536, "tie_word_embeddings": True},
    "llama-3.2-1b": {
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    }
    | {"intermediate_size": 8192, "head_dim": 64, "tie_word_embeddings": True},
    "llama-3.1-8b": {
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    }
    | {"intermediate_size": 14336, "head_dim": 128, "tie_word_embeddings": False},
}
VOCABULARIES = {"49k": 49152, "128k": 128256}  # SmolLM2's and Llama 3's


def checkpoint(folder: Path, shape: str, vocab_size: int, seed: int) -> Path:
    """A random checkpoint as a Hugging Face folder, in bfloat16 as such models are published. Weights are drawn so wide
    that next-token distributions are far from uniform: losses that agree then agree for a reason."""
    path = folder / f"{shape.replace('/', '-')}-{vocab_size}-{seed}"
    if path.exists():
        return path
    words = {f"t{i}": i for i in range(vocab_size)}
    words = {{0: "<pad>", 1: "<s>", 2: "</s>"}.get(i, word): i for word, i in words.items()}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(path)
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    wide = {"initializer_range": 0.06, "max_position_embeddings": 8192}
    config = AutoConfig.for_model("llama", vocab_size=vocab_size, **SHAPES[shape], **ids, **wide)
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(path)
    return path


def load(
    folder: Path,
    shape: str,
    vocab_size: int,
    seed: int,
    device: torch.device,
    trains=False,
    bf16=False,
) -> LM:
    """A shape's name, or any folder or hub id, as the LM that the scripts train and score with."""
    lm = LM(
        checkpoint(folder, shape, vocab_size, seed) if shape in SHAPES else shape, device, trains
    )
    if bf16:  # the scripts do this on a GPU; on a CPU it is something to compare
        lm.autocast = lambda: torch.autocast(device.type, torch.bfloat16)
    return lm


def matmul_peak(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """Floating-point operations a second of one large matrix product."""
    one, other = torch.randn(2, size, size, device=device).to(dtype).unbind()
    one @ other
    tick = clock(device)
    one @ other
    return 2 * size**3 / (clock(device) - tick)


def clock(device: torch.device) -> float:
    """Seconds; with a single thread those of the process, which a busy machine hardly changes."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (
        time.process_time()
        if device.type == "cpu" and torch.get_num_threads() == 1
        else time.perf_counter()
    )


class PeakMemory:
    """Bytes in use at the start and at the peak of a `with` block: the allocator's on a GPU, else resident ones, whose
    high-water mark Linux can reset. Freed heap is returned first, so that the start is what is alive."""

    def __init__(self, device: torch.device):
        self.device = device

    def __enter__(self):
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self.start = torch.cuda.memory_allocated()
        else:
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
            self.start = self.status("VmRSS")
        return self

    def __exit__(self, *exception):
        on_gpu = self.device.type == "cuda"
        self.peak = torch.cuda.max_memory_allocated() if on_gpu else self.status("VmHWM")

    @staticmethod
    def status(field: str) -> int:
        return 1024 * int(
            re.search(rf"{field}:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]
        )


def machine(device: torch.device) -> dict:
    """Hardware and versions, as the README prints them."""
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    versions = {}
    for name in ("torch", "transformers", "trl", "accelerate"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "device": torch.cuda.get_device_name()
        if device.type == "cuda"
        else cpu[1]
        if cpu
        else platform.processor(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "load average at the end": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        **versions,
    }


def markdown(header: list[str], rows: list[list]) -> str:
    return "\n".join(
        f"| {' | '.join(map(str, line))} |" for line in (header, ["---"] * len(header), *rows)
    )


def fill(text: str, tables: dict[str, str]) -> str:
    """A page with what stands between `<!-- results:NAME -->` and `<!-- /results -->` replaced by the tables."""
    for name, table in tables.items():
        marks = rf"(<!-- results:{re.escape(name)} -->\n).*?(<!-- /results -->)"
        text = re.sub(
            marks,
            lambda found, table=table: f"{found[1]}{table}\n{found[2]}",
            text,
            flags=re.DOTALL,
        )
    return text


def record(output: Path, name: str, result: dict, tables: dict[str, str]):
    """Puts a result into the file of all results; beside the README's own file it fills the README as well."""
    results = json.loads(output.read_text()) if output.exists() else {}
    results[name] = result
    output.parent.mkdir(exist_ok=True)
    output.write_text(json.dumps(results, indent=1))
    if str(output) == RESULTS:
        page = HERE / "README.md"
        page.write_text(fill(page.read_text(), tables))
    print(
        "\n\n".join(f"{name}\n{table}" for name, table in tables.items() if table.count("\n") > 1)
    )
    print(f"\neverything is in {output}")
