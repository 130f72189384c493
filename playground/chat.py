"""Talk to a model in the terminal: `python -m playground.chat runs/<run>`.

The model is the trained student of a run, or any other model in a folder or on the hub. Responses
are sampled as the scripts sample them, with nothing of the checkpoint's own generation settings. An
empty line, Ctrl-D or Ctrl-C ends the chat, and /new begins a new conversation.

    python -m playground.chat playground/teacher
    python -m playground.chat HuggingFaceTB/SmolLM2-135M-Instruct --keep_history
"""

import contextlib
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from common import LM, choose_device, parse_flags, stop

# isort: split
# common comes first: with it Ctrl-C ends in one line, also while the slow imports run.
import torch
import transformers
import tyro

PLAYGROUND = Path(__file__).parent


@dataclass
class Args:
    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """folder of a run, whose model/ is taken, or a model: a folder or a hub id"""
    temperature: float = 1.0
    """of sampling, as in the scripts' evaluations; 0 is greedy"""
    max_new_tokens: int = 256
    """a response is cut off there"""
    keep_history: bool = False
    """show the model the whole conversation, for models that were trained on conversations; those
    of the playground were trained on single questions, and a second one confuses them"""
    system: str = ""
    """system prompt, where the model's chat template takes one"""
    seed: int = 1
    """of sampling: the same seed and the same questions give the same responses"""
    device: str = ""
    """cpu, cuda, cuda:1, ...; if empty, a GPU where there is one"""
    trust_remote_code: bool = False
    """run code that comes with a hub model"""


# ---------------------------------------------------------------------------------------- the model
def find_model(path: str) -> str:
    """The model of a run, if the path is a run, and otherwise the path itself."""
    folder = Path(path)
    if (folder / "model" / "config.json").exists():
        return str(folder / "model")
    if (folder / "args.json").exists():
        stop(f"{path} has no trained model yet; finish the run with --resume {path}")
    if folder.is_dir() and not (folder / "config.json").exists():
        stop(f"{path} is neither a run nor a model: it has no config.json")
    # A hub id is a name, or an owner and a name.
    is_hub_id = len(folder.parts) <= 2 and not path.startswith(("/", ".", "~", "runs/"))
    if not folder.exists() and not is_hub_id:
        stop(f"there is no folder {path}")
    return path


def load_chat_model(path: str, device: torch.device, trust_remote_code: bool) -> LM:
    """The model. The program ends if it is a reward model, which has no LM head of its own."""
    try:
        config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        if Path(path).exists():
            stop(f"cannot load a model from {path}: {error}")
        stop(f"there is no folder {path}, and it cannot be loaded from the hub: {error}")
    architectures = config.architectures or []
    is_classifier = any("SequenceClassification" in name for name in architectures)
    if is_classifier or config.num_labels == 1:
        stop(f"{path} is a reward model: it judges responses (--reward {path}) and writes none")
    return LM(path, device, trust_remote_code=trust_remote_code)


def is_of_the_playground(lm: LM) -> bool:
    """Whether a model knows nothing but the playground: it has the playground's tokenizer."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(PLAYGROUND / "student")
    return lm.tokenizer.get_vocab() == tokenizer.get_vocab()


def respond(lm: LM, prompt_ids: list[int], *, temperature: float, max_new_tokens: int) -> dict:
    """A response {"text", "finished"}, printed while it is sampled. With the same random state it
    is that of `LM.sample`, which explains the settings."""
    lm.model.generation_config = lm.sampling_config(temperature, max_new_tokens)
    streamer = transformers.TextStreamer(lm.tokenizer, skip_prompt=True, skip_special_tokens=True)
    input_ids = torch.tensor([prompt_ids], device=lm.device)
    mask = torch.ones_like(input_ids)
    with lm.autocast():
        ids = lm.model.generate(input_ids, attention_mask=mask, streamer=streamer)
    return lm.decode_response(ids[0, len(prompt_ids) :].tolist())


# ----------------------------------------------------------------------------------------- the chat
def read_question() -> str:
    """What the person types, or an empty text at the end of the input."""
    try:
        question = input("> ").strip()
    except EOFError:
        print()
        return ""
    if not sys.stdin.isatty():
        print(question)  # a terminal shows what is typed, a pipe does not
    return question


def chat(lm: LM, args: Args):
    """Asks and responds until the person ends it."""
    beginning = []
    if args.system:
        beginning.append({"role": "system", "content": args.system})
    context_length = getattr(lm.config, "max_position_embeddings", math.inf)
    messages = list(beginning)
    while True:
        question = read_question()
        if not question:
            return
        if question == "/new":
            messages = list(beginning)
            print("(a new conversation)")
            continue
        turn = {"role": "user", "content": question}
        prompt_ids = lm.prompt_ids([*messages, turn])
        room = context_length - len(prompt_ids)
        if room < 1:
            print(f"(too long: this model takes {context_length} tokens; /new begins again)")
            continue
        max_new_tokens = min(args.max_new_tokens, room)
        response = respond(
            lm, prompt_ids, temperature=args.temperature, max_new_tokens=max_new_tokens
        )
        if not response["finished"]:
            print(f"(cut off after {max_new_tokens} tokens)")
        if args.keep_history:
            messages += [turn, {"role": "assistant", "content": response["text"]}]


def print_introduction(lm: LM, args: Args):
    print(f"{lm.path}: {lm.model.num_parameters():,} parameters, on {lm.device}")
    if args.keep_history:
        print("The model sees the whole conversation. /new begins a new one.")
    else:
        print("Every question is a conversation of its own (--keep_history: one for all).")
    print("An empty line or Ctrl-D ends the chat.")
    if is_of_the_playground(lm):
        print('Ask for one to four words of a kind: "Name three planets." or "Give me two fish."')


def main(args: Args):
    if not 0 <= args.temperature < math.inf:  # NaN is refused as well
        stop(f"--temperature {args.temperature} must be a number of at least 0")
    if args.max_new_tokens < 1:
        stop(f"--max_new_tokens {args.max_new_tokens} must be at least 1")
    try:
        device = choose_device(args.device)
        lm = load_chat_model(find_model(args.model), device, args.trust_remote_code)
        print_introduction(lm, args)
        torch.manual_seed(args.seed)
        chat(lm, args)
    except KeyboardInterrupt:
        print()
    print("Goodbye.")


if __name__ == "__main__":
    # With this module, where a system has it, `input` understands the arrow keys.
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401
    # Bytes that are no text, and characters that a terminal lacks, do not end a chat.
    sys.stdin.reconfigure(errors="replace")
    sys.stdout.reconfigure(errors="replace")
    main(parse_flags(Args, __doc__))
