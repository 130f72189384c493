"""Small real models and tokenizers, made on the spot, and runs of the scripts, that the tests share."""

import contextlib
import json
import os
import runpy
import sys
from pathlib import Path

# before the imports that read them: no waiting for a hub, and one thread, which tiny models are fastest with
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TEXT = (
    Path(__file__).parent / "tokenizer_text.txt"
).read_text()  # frozen: tests depend on the merges


def make_tokenizer(
    vocab_size=400, chat=True, bos=True, pad="<|pad|>", text=TEXT
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on tests/tokenizer_text.txt."""
    special = ["<|pad|>", "<|begin|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet
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
    shape = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}
    shape |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 5}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, **{**shape, **config}))


def save(folder: Path, tokenizer, model) -> str:
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
    return {
        name: save(folder / name, tokenizer, make_model(len(tokenizer), **shape))
        for name, shape in shapes.items()
    }


@pytest.fixture
def load(checkpoints):
    """load("teacher") is a fresh LM on the CPU."""
    from common import LM

    return lambda name, **how: LM(checkpoints.get(name, name), torch.device("cpu"), **how)


def random_examples(vocab_size: int, shapes, seed=0):
    """Examples with prompts and responses of the given lengths: [(prompt, [response, ...]), ...]."""
    from common import Example

    generator = torch.Generator().manual_seed(seed)
    draw = lambda length: torch.randint(vocab_size, (length,), generator=generator).tolist()  # noqa: E731
    return [
        Example({"id": str(i)}, draw(prompt), [draw(length) for length in responses])
        for i, (prompt, responses) in enumerate(shapes)
    ]


def plain_log_probs(model, prompt: list[int], response: list[int], vocab_size: int) -> torch.Tensor:
    """[|response|, V] in float64, from one ordinary forward pass over prompt + response."""
    with torch.no_grad():
        values = model(torch.tensor([prompt + response])).logits[0, :, :vocab_size]
    return values[len(prompt) - 1 : -1].double().log_softmax(-1)


def packed_averages(lm, examples, vocab_size: int) -> torch.Tensor:
    """[R]: the average log-prob of every response, as the scripts compute it."""
    from common import pack, per_token, response_means, target_logps

    batch = pack(examples, lm)
    scored = [(lm, lm.hidden_states(batch)[batch.source])]
    logps = per_token(target_logps, batch.target_ids, scored, vocab_size, 1024)
    return response_means(logps, batch.response_of, batch.lengths)


def padded_averages(lm, examples, vocab_size: int) -> torch.Tensor:
    """[R] the usual way: a padded row per response, all logits, and a mask for what is neither prompt nor padding."""
    rows = [(prompt, response) for _, prompt, responses in examples for response in responses]
    width = max(len(prompt) + len(response) for prompt, response in rows)
    ids = torch.tensor([p + r + [0] * (width - len(p) - len(r)) for p, r in rows])
    mask = torch.tensor(
        [[0] * len(p) + [1] * len(r) + [0] * (width - len(p) - len(r)) for p, r in rows]
    )
    attention = torch.tensor([[1] * len(p + r) + [0] * (width - len(p) - len(r)) for p, r in rows])
    logits = lm.model(ids, attention_mask=attention).logits[:, :-1, :vocab_size]
    logps = logits.float().log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    return (logps * mask[:, 1:]).sum(-1) / mask[:, 1:].sum(-1)


# ------------------------------------------------------------------------------------------------- runs of the scripts
SCRIPTS = sorted(path.stem for path in ROOT.glob("*.py") if path.stem != "common")


def run_script(name: str, **flags) -> int:
    """`python <name>.py --flag value ...` in this process, which saves the imports; returns its exit code. A flag that
    is True stands alone, one that is False or None is left out, a tuple has several values."""
    words = [str(ROOT / f"{name}.py")]
    for flag, value in flags.items():
        if value is not None and value is not False:
            values = value if isinstance(value, tuple) else () if value is True else (value,)
            words += [f"--{flag}", *map(str, values)]
    before, sys.argv = sys.argv, words
    try:
        with contextlib.chdir(ROOT):
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as stopped:
        return stopped.code or 0
    finally:
        sys.argv = before
    return 0


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def vowels(prompts, answers) -> list[float]:
    """A judge of any text: the share of vowels in it."""
    return [sum(letter in "aeiou" for letter in answer) / (len(answer) + 1) for answer in answers]


@pytest.fixture(scope="session")
def pairs(tmp_path_factory) -> Path:
    """Eight preference pairs of different lengths for the random models, one of them with several turns."""
    turns = [
        ("system", "Be brief."),
        ("user", "Hello"),
        ("assistant", "Hi."),
        ("user", "What is a token?"),
    ]
    rows = [
        {
            "prompt": "What is it?",
            "chosen": "A thing.",
            "rejected": "It is what it is, and no more than that.",
        },
        {
            "prompt": "Name a word that is long.",
            "chosen": "A long word is rejected.",
            "rejected": "No.",
        },
        {"prompt": "Go on", "chosen": "on and on", "rejected": "off"},
        {
            "prompt": [{"role": r, "content": c} for r, c in turns],
            "chosen": "a piece of text",
            "rejected": "a coin",
        },
        {"prompt": "def f(x):", "chosen": "return x", "rejected": "raise ValueError(x)"},
        {"prompt": "One?", "chosen": "1", "rejected": "2, 3 and 4"},
        {
            "prompt": "Say nothing of the kind.",
            "chosen": "the kind",
            "rejected": "nothing of it, nothing of it",
        },
        {
            "prompt": "x",
            "chosen": "some tokens of a response",
            "rejected": "other tokens of a response",
        },
    ]
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def run_tiny(checkpoints, pairs, tmp_path):
    """run_tiny("adpa", gamma=2) trains the random student for one step on all eight pairs; returns the run folder."""

    def run(name: str, **flags) -> Path:
        folder = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        models = {role: checkpoints[role] for role in ("student", "teacher")}
        how = {
            "data": pairs,
            "eval_data": pairs,
            "eval_prompts": 2,
            "reward": "conftest:vowels",
            "max_steps": 1,
        }
        how |= {
            "batch_size": 8,
            "max_response_tokens": 40,
            "max_grad_norm": 1e9,
            "log_every": 1,
            "save_every": 1,
        }
        assert run_script(name, **{**models, **how, "output_dir": folder, **flags}) == 0
        return folder

    return run


def first_gradient(run: Path) -> list[torch.Tensor]:
    """The gradient of a run's only step, a tensor for each parameter: AdamW's first moment is (1 − 0.9) times it."""
    state = torch.load(run / "checkpoint.pt", weights_only=True)["optimizer"]["state"]
    return [state[i]["exp_avg"] / 0.1 for i in range(len(state))]
