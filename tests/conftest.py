"""Small real models and tokenizers, made on the spot, and runs of the scripts, that tests share."""

import contextlib
import json
import multiprocessing
import os
import runpy
import sys
import tempfile
from pathlib import Path

# These come before the imports that read them. No test waits for a hub. Tiny models are fastest
# with one thread.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# The text is frozen in a file of its own: the merges of every test's tokenizer follow from it.
TEXT = (Path(__file__).parent / "tokenizer_text.txt").read_text()
SPECIAL_TOKENS = ["<|pad|>", "<|begin|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]


# --------------------------------------------------------------------------- models and tokenizers
def make_tokenizer(
    vocab_size=400, chat=True, bos=True, pad="<|pad|>", text=TEXT
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, trained on a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(text.splitlines(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        eos_token="<|end|>",
        bos_token="<|begin|>" if bos else None,
        chat_template=CHAT_TEMPLATE if chat else None,
    )


def make_model(vocab_size: int, seed=0, layers=2, width=32, **config) -> LlamaForCausalLM:
    """A random Llama whose next-token distributions are far from uniform, so that errors show."""
    torch.manual_seed(seed)
    shape = {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.3,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 5,
    }
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, **{**shape, **config}))


def save(folder: Path, tokenizer, model) -> str:
    """Writes a checkpoint and returns its path."""
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory, tokenizer) -> dict[str, str]:
    """Folders of three random models with one tokenizer: student, teacher, teacher_ref."""
    folder = tmp_path_factory.mktemp("models")
    shapes = {
        "student": {"seed": 1},
        "teacher": {"seed": 2, "width": 48},
        "teacher_ref": {"seed": 3, "width": 48},
    }
    paths = {}
    for name, shape in shapes.items():
        paths[name] = save(folder / name, tokenizer, make_model(len(tokenizer), **shape))
    return paths


@pytest.fixture
def load(checkpoints):
    """load("teacher") is a fresh LM on the CPU. It takes the keywords of LM."""
    from common import LM

    def load_one(name: str, **keywords) -> LM:
        return LM(checkpoints.get(name, name), torch.device("cpu"), **keywords)

    return load_one


# -------------------------------------------------------------- log-probs, packed and the slow way
def random_examples(vocab_size: int, shapes, seed=0):
    """Examples of given lengths: shapes is [(prompt length, [response length, ...]), ...]."""
    from common import Example

    generator = torch.Generator().manual_seed(seed)

    def draw(length: int) -> list[int]:
        return torch.randint(vocab_size, (length,), generator=generator).tolist()

    examples = []
    for number, (prompt_length, response_lengths) in enumerate(shapes):
        prompt_ids = draw(prompt_length)
        response_ids = [draw(length) for length in response_lengths]
        examples.append(Example({"id": str(number)}, prompt_ids, response_ids))
    return examples


def plain_log_probs(model, prompt: list[int], response: list[int], vocab_size: int) -> torch.Tensor:
    """[|response|, V] in float64, from one ordinary forward pass over prompt + response."""
    with torch.no_grad():
        values = model(torch.tensor([prompt + response])).logits[0, :, :vocab_size]
    return values[len(prompt) - 1 : -1].double().log_softmax(-1)


def packed_logps(lm, examples, vocab_size: int, chunk_size=1024):
    """(the batch, [N] log-probs of its response tokens), as the scripts compute them."""
    from common import pack, per_token, token_logps

    batch = pack(examples, lm)
    hidden = lm.hidden_states(batch)[batch.predict_index]
    logps = per_token(
        token_logps,
        batch.target_ids,
        [lm],
        [hidden],
        vocab_size=vocab_size,
        chunk_size=chunk_size,
    )
    return batch, logps


def packed_averages(lm, examples, vocab_size: int) -> torch.Tensor:
    """[R]: the average log-prob of every response, as the scripts compute it."""
    from common import mean_per_response

    batch, logps = packed_logps(lm, examples, vocab_size)
    return mean_per_response(logps, batch)


def padded_averages(lm, examples, vocab_size: int) -> torch.Tensor:
    """[R] the usual way: a padded row per response, all logits, and a mask for what counts."""
    rows = []
    for example in examples:
        for response in example.response_ids:
            rows.append((example.prompt_ids, response))
    width = max(len(prompt) + len(response) for prompt, response in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    is_token = torch.zeros_like(ids)
    is_response = torch.zeros_like(ids)
    for row, (prompt, response) in enumerate(rows):
        end = len(prompt) + len(response)
        ids[row, :end] = torch.tensor(prompt + response)
        is_token[row, :end] = 1
        is_response[row, len(prompt) : end] = 1
    logits = lm.model(ids, attention_mask=is_token).logits[:, :-1, :vocab_size]
    logps = logits.float().log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    return (logps * is_response[:, 1:]).sum(-1) / is_response[:, 1:].sum(-1)


# ----------------------------------------------------------------------------- runs of the scripts
SCRIPTS = sorted(path.stem for path in ROOT.glob("*.py") if path.stem != "common")


def one_short(names: list[str], short: str) -> list:
    """Parameters of a test whose promise is kept by code that all of them share: the short suite
    tests one of them, and the others are long tests."""
    return [name if name == short else pytest.param(name, marks=pytest.mark.slow) for name in names]


def command_line(flags: dict) -> list[str]:
    """{"seed": 1} as words. A flag that is True stands alone, False and None are left out, and a
    tuple has several values."""
    words = []
    for flag, value in flags.items():
        if value is None or value is False:
            continue
        words.append(f"--{flag}")
        if isinstance(value, tuple):
            words += [str(part) for part in value]
        elif value is not True:
            words.append(str(value))
    return words


# Flags of evaluations with sampled responses. A reward model has none, so its script lacks them.
OF_SAMPLED_RESPONSES = {"reward", "reward_label", "eval_prompts", "eval_temperature"}


def flags_it_has(script: str, flags: dict) -> dict:
    """The flags without those that rm_distiller.py lacks, if it is the script."""
    if script != "rm_distiller":
        return flags
    return {flag: value for flag, value in flags.items() if flag not in OF_SAMPLED_RESPONSES}


def run_script(name: str, **flags) -> int:
    """`python <name>.py --flag value ...` in this process, which saves the imports. Returns the
    exit code. An error with a traceback is raised here."""
    words = [str(ROOT / f"{name}.py"), *command_line(flags_it_has(name, flags))]
    before = sys.argv
    sys.argv = words
    try:
        with contextlib.chdir(ROOT):
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as stopped:
        return stopped.code or 0
    finally:
        sys.argv = before
    return 0


# A server that has imported everything once. Processes are forked from it, which saves each of them
# the four seconds that its imports would take.
FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(["torch", "transformers.models.llama.modeling_llama", "tyro"])


def run_into(log: Path, script: str, flags: dict):
    """`run_script` with its output in a file. It is what a process of the fork server does."""
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.exit(run_script(script, **flags))


class ScriptProcess:
    """`python <script>.py <flags>` in a process of its own, which can be killed."""

    def __init__(self, script: str, flags: dict):
        descriptor, path = tempfile.mkstemp(suffix=".log")
        os.close(descriptor)
        self.log = Path(path)
        self.process = FORKSERVER.Process(
            target=run_into, args=(self.log, script, flags), daemon=True
        )
        self.process.start()

    def is_running(self) -> bool:
        return self.process.is_alive()

    def output(self) -> str:
        """What it has printed so far."""
        return self.log.read_text()

    def wait(self, timeout: float) -> int | None:
        """The exit code, or None if it still runs after so many seconds."""
        self.process.join(timeout)
        return self.process.exitcode

    def kill(self):
        """SIGKILL, which no program can catch. Returns when the process is gone."""
        self.process.kill()
        self.process.join()


def first_rows(name: str, count: int, folder: Path) -> Path:
    """The first rows of a data file of the playground, as a file in `folder`."""
    lines = (ROOT / f"playground/data/{name}.jsonl").read_text().splitlines(keepends=True)
    path = folder / f"{name}_{count}.jsonl"
    path.write_text("".join(lines[:count]))
    return path


def one_error_line(capsys, function, *arguments, **keywords) -> str:
    """What the program says when it ends with code 2. It is one line, below which nothing is."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        function(*arguments, **keywords)
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def training_rows(run: Path) -> list[dict]:
    """The metrics of a run, but for the first row: it is of step 0, before any training."""
    before, *rows = read_jsonl(run / "metrics.jsonl")
    assert before["step"] == 0
    return rows


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def vowels(prompts, responses) -> list[float]:
    """A reward for any text: the share of vowels in it."""
    rewards = []
    for response in responses:
        count = sum(letter in "aeiou" for letter in response)
        rewards.append(count / (len(response) + 1))
    return rewards


TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi."},
    {"role": "user", "content": "What is a token?"},
]
PAIRS = [  # prompt, chosen, rejected
    ("What is it?", "A thing.", "It is what it is, and no more than that."),
    ("Name a word that is long.", "A long word is rejected.", "No."),
    ("Go on", "on and on", "off"),
    (TURNS, "a piece of text", "a coin"),
    ("def f(x):", "return x", "raise ValueError(x)"),
    ("One?", "1", "2, 3 and 4"),
    ("Say nothing of the kind.", "the kind", "nothing of it, nothing of it"),
    ("x", "some tokens of a response", "other tokens of a response"),
]


@pytest.fixture(scope="session")
def pairs(tmp_path_factory) -> Path:
    """Eight preference pairs of different lengths, one of them with several turns."""
    rows = [dict(zip(("prompt", "chosen", "rejected"), pair)) for pair in PAIRS]
    return write_jsonl(tmp_path_factory.mktemp("data") / "pairs.jsonl", rows)


TINY_RUN = {
    "eval_prompts": 2,
    "reward": "conftest:vowels",
    "max_steps": 1,
    "batch_size": 8,
    # The longest response of PAIRS has 20 tokens.
    "max_response_tokens": 24,
    "max_grad_norm": 1e9,
    "log_every": 1,
    "save_every": 1,
}


@pytest.fixture
def run_tiny(checkpoints, pairs, tmp_path):
    """run_tiny("adpa", gamma=2) trains the random student for one step on all eight pairs, and
    returns the run folder."""

    def run(name: str, **flags) -> Path:
        folder = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        defaults = {
            "student": checkpoints["student"],
            "teacher": checkpoints["teacher"],
            "data": pairs,
            "eval_data": pairs,
            "output_dir": folder,
            **TINY_RUN,
        }
        assert run_script(name, **{**defaults, **flags}) == 0
        return folder

    return run


def first_gradient(run: Path) -> list[torch.Tensor]:
    """The gradient of a run's only step, a tensor for each parameter. AdamW's first moment is
    (1 − 0.9) times it."""
    state = torch.load(run / "checkpoint.pt", weights_only=True)["optimizer"]["state"]
    return [state[i]["exp_avg"] / 0.1 for i in range(len(state))]
