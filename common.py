"""What the five methods (adpa, dckd, dpkd, pad, rm_distiller) share. A learner needs part 2 alone,
and `LM.hidden_states` and `LM.logits` of part 1.

    Part 1  language models      load a model, turn chats into token ids, sample, compute logits
    Part 2  per-token scores     pack responses into rows, log-probs of response tokens, their means
    Part 3  data                 preference pairs, and functions that give a response its reward
    Part 4  runs                 folder, flags, stages, metrics, checkpoints; nothing about a method

Three things are done here, so that no script has to think of them. `pack` lists response tokens
only, so no prompt token reaches a loss. With every token it lists the position before it, which
predicts it: that is the shift. `LM.hidden_states` gives frozen models no gradient.

Letters in shapes:

    B  examples of a micro-batch       n  responses of an example
    R  responses of a micro-batch, B·n when every example has n
    N  response tokens of a micro-batch, with their end-of-sequence tokens
    T  tokens of a row                 V  vocabulary                       H  hidden size
"""

import os
import signal
import sys
import threading


def end_at_once(*_):
    """Ctrl-C while the imports below run, which takes seconds. A KeyboardInterrupt would be lost in
    some of them, and leave a library that works in part."""
    print("interrupted; nothing was written yet", file=sys.stderr, flush=True)
    os._exit(130)


if (
    signal.getsignal(signal.SIGINT) is signal.default_int_handler
    and threading.current_thread() is threading.main_thread()
):
    signal.signal(signal.SIGINT, end_at_once)

import asyncio
import codecs
import csv
import errno
import glob
import hashlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import io
import itertools
import json
import lzma
import math
import pickle
import re
import shlex
import shutil
import statistics
import textwrap
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, make_dataclass, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Annotated

import docstring_parser
import jinja2
import torch
import transformers
import tyro
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

if signal.getsignal(signal.SIGINT) is end_at_once:
    signal.signal(signal.SIGINT, signal.default_int_handler)

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def stop(message: str):
    """Ends the program with one line and exit code 2. It is for mistakes of the user that the code
    has looked for. Every other error keeps its traceback."""
    one_line = " ".join(message.split())
    tqdm.write(f"error: {one_line[:600]}", file=sys.stderr)
    raise SystemExit(2)


class ChatTemplateError(ValueError):
    """A chat template refuses the messages of a row, or does not keep a prompt as it is."""


class UnusableRow(ValueError):
    """A row has no text in a column that is needed."""


@contextmanager
def error_note(note: str):
    """Adds a line to the traceback of whatever goes wrong inside: which file, which row."""
    try:
        yield
    except Exception as error:
        error.add_note(f"while {note}")
        raise


# -------------------------------------------------------------------------- part 1: language models
# Some chat templates write the date into a prompt. It is that on which the run began, also after
# midnight, and when the run is resumed (see `open_run`).
CLOCK = {"began": datetime.now()}


class LM:
    """A language model with its tokenizer, from a hub id or a local folder (safetensors only).

    A trainable model has float32 weights and runs under bfloat16 autocast on a GPU. A frozen model
    is bfloat16 on a GPU and float32 on a CPU. Nothing in a forward pass is random: dropout, noise
    of routers and skipped layers are off.
    """

    def __init__(
        self,
        path: str | Path,
        device: torch.device,
        *,
        trainable: bool = False,
        gradient_checkpointing: bool = False,
        trust_remote_code: bool = False,
        is_reward_model: bool = False,
    ):
        self.path = str(path)
        self.device = device
        self.trainable = trainable
        try:
            # The model comes first: one that is refused may have a tokenizer of an odd kind too.
            self.model, self.checkpoint_dtype = load_model(
                path, device, trainable, trust_remote_code, is_reward_model
            )
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(
                path, trust_remote_code=trust_remote_code
            )
        except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
            place = str(path)
            if not Path(path).exists():
                place += ", which is no folder here"
            if (Path(path) / "model" / "config.json").exists():
                place += f", which is a run with the model {Path(path) / 'model'}"
            stop(f"cannot load a model with tokenizer from {place}: {error}")
        self.config = self.model.config.get_text_config()
        self.model.requires_grad_(trainable)
        if gradient_checkpointing:
            try:
                self.model.activation_checkpointing_enable()
            except ValueError as error:
                stop(f"{path} does not take --gradient_checkpointing: {error}")
        self.set_mode()

        # Many models pad their LM head to a round number, beyond the tokens of the tokenizer. The
        # ids of a tokenizer may have holes, so its size is not how many tokens it has.
        embeddings = self.model.get_input_embeddings()
        self.num_embeddings = embeddings.weight.shape[0]
        last_id = max(self.tokenizer.get_vocab().values())
        self.vocab_size = min(last_id + 1, self.num_embeddings)
        self.num_positions = count_positions(self.model)
        # The padding token is often the end-of-sequence token as well. It needs its gradient.
        embeddings.padding_idx = None
        # Our mask replaces the model's sliding window, so packed responses must be shorter than it.
        self.sliding_window = getattr(self.config, "sliding_window", None) or math.inf
        # Other windows count the tokens of a whole row.
        self.row_window = shortest_window(self.config)
        self.longest_row, self.longest_row_reason = longest_row(self.config)

        added_tokens = self.tokenizer.added_tokens_decoder.values()
        self.added_tokens = [token.content for token in added_tokens]
        self.special_tokens = [token.content for token in added_tokens if token.special]
        bos_id = self.tokenizer.bos_token_id
        adds_bos = self.tokenizer("a").input_ids[:1] == [bos_id]
        self.bos_ids = [bos_id] if adds_bos else []
        self.turn_end = ""  # what the chat template writes after a response
        self.eos_ids = self.find_eos_ids()
        probe = self.prompt_ids([{"role": "user", "content": "a"}])
        self.check_limits(max(*probe, self.eos_ids[0]))

        self.share_prefix = True  # the responses of a prompt stand in one row, see `pack`
        self.samples_together = ""  # which prompts: `check_sampling` says it when it is needed
        self.autocast_enabled = False
        if not is_reward_model:
            self.check_packing()  # in full precision, before autocast is switched on
        self.autocast_enabled = device.type == "cuda"

    def set_mode(self):
        """Eval mode for every module, so that nothing in it is random. Modules that compute their
        activations again in the backward pass do so in train mode only, so they alone get it."""
        for module in self.model.modules():
            module.training = getattr(module, "gradient_checkpointing", False)

    def check_limits(self, largest: int, length: int = 0, flag: str = "--max_response_tokens"):
        """Ends the program if the largest token id, or the last of so many positions, lies beyond
        the model's tables, or if so many tokens cannot be read right in a batch. A GPU would say
        nothing of use. `flag` is what to lower besides --max_prompt_tokens."""
        if largest >= self.num_embeddings:
            token = f"token {self.tokenizer.convert_ids_to_tokens(largest)} ({largest})"
            advice = "call model.resize_token_embeddings(len(tokenizer)) and train it first"
            stop(f"{self.path}: {token} is beyond its {self.num_embeddings} embeddings; {advice}")
        advice = f"lower --max_prompt_tokens or {flag}"
        if length > self.num_positions:
            stop(f"{self.path} has {self.num_positions} positions, not {length}; {advice}")
        if length > self.longest_row:
            problem = f"beyond {self.longest_row} tokens {self.longest_row_reason}"
            stop(f"{self.path} cannot read {length} tokens right: {problem}; {advice}")

    def autocast(self):
        """Context of every forward pass: bfloat16 on a GPU, nothing on a CPU."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast_enabled)

    # ------------------------------------------------------------------------- text to token ids
    def find_eos_ids(self) -> list[int]:
        """The tokens that end a response. The first of them is appended to texts of the data.

        It is the special token with which the chat template ends an assistant turn. After it come
        the end-of-sequence tokens of the tokenizer and of the generation config.
        """
        known = [self.tokenizer.eos_token_id]
        if self.model.can_generate():
            configured = self.model.generation_config.eos_token_id
            known += configured if isinstance(configured, list) else [configured]
        candidates = known
        if self.tokenizer.chat_template:
            candidates = [*self.end_of_turn(known), *known]

        eos_ids = [token for token in dict.fromkeys(candidates) if token is not None]
        if not eos_ids:
            stop(f"{self.path} names no end-of-sequence token")
        return eos_ids

    def end_of_turn(self, known: list[int]) -> list[int]:
        """The special token that ends an assistant turn, or nothing if the template writes none.
        Sets `turn_end`, all that the template writes after a response.

        A template may close parts of a response with special tokens before it ends the turn. The
        token that ends the turn is one that ends responses by the configs (`known`), or the user's
        turn as well. If there is no such token, it is the first special one.
        """
        chat = [
            {"role": "user", "content": "7531"},
            {"role": "assistant", "content": "2468"},
        ]
        try:
            text = self.chat_text(chat)
        except ChatTemplateError as error:
            stop(str(error))
        before_answer, answer, self.turn_end = text.rpartition("2468")
        if not answer:
            stop(f"{self.path}: its chat template leaves out the text of a response: {text}")
        _, _, after_question = before_answer.rpartition("7531")
        encode = partial(self.tokenizer, add_special_tokens=False)
        ends_a_turn = [*known, *encode(after_question).input_ids]
        special = []
        for token in encode(self.turn_end).input_ids:
            added_token = self.tokenizer.added_tokens_decoder.get(token)
            if added_token is not None and added_token.special:
                special.append(token)
        first = [token for token in special if token in ends_a_turn] + special
        return first[:1]

    def chat_text(self, messages: list[dict], add_generation_prompt: bool = False) -> str:
        """What the chat template writes for messages. ChatTemplateError if it refuses them."""
        return self.apply_template(
            messages, add_generation_prompt=add_generation_prompt, tokenize=False
        )

    def apply_template(self, messages: list[dict], **keywords) -> str | list[int]:
        """The tokenizer's `apply_chat_template`. ChatTemplateError if it refuses the messages."""
        if "strftime_now" in str(self.tokenizer.chat_template):
            template = self.tokenizer.get_chat_template()
            keywords["chat_template"] = with_date(template, CLOCK["began"])
        try:
            return self.tokenizer.apply_chat_template(messages, return_dict=False, **keywords)
        except (jinja2.TemplateError, ValueError) as error:
            roles = [message["role"] for message in messages]
            raise ChatTemplateError(
                f"cannot apply the chat template of {self.path} to roles {roles}: {error}"
            ) from error

    def plain_ids(self, text: str) -> list[int]:
        """Token ids of a text as it stands, without special tokens."""
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids

    def ids_behind(self, context: str, text: str, *, is_plain: bool = False) -> list[int]:
        """Token ids of a text that stands behind a context, tokenised on its own: no token spans
        both. Special tokens that a plain text spells out stay text.

        The context keeps tokenizers of the SentencePiece kind from putting a space before the text,
        as they do at the beginning of a document. Where the text's first token would merge with the
        context, a line break takes its place, or else nothing.
        """
        encode = partial(self.tokenizer, add_special_tokens=False, split_special_tokens=is_plain)
        for before in (context, "\n"):
            before_ids = encode(before).input_ids
            ids = encode(before + text).input_ids
            if ids[: len(before_ids)] == before_ids:
                return ids[len(before_ids) :]
        return encode(text).input_ids

    def ids_of_prompt(self, prompt: list[dict]) -> list[int]:
        """Token ids of a prompt, up to where the response begins. ChatTemplateError if the chat
        template refuses it.

        Special tokens that a message spells out stay text. So do other added tokens, such as the
        tags of thoughts, but for those that the assistant wrote: templates look for them there.
        """
        if not self.tokenizer.chat_template:
            return self.bos_ids + self.plain_ids(prompt_text(prompt))
        sanitize = False
        for message in prompt:
            tokens = self.special_tokens if message["role"] == "assistant" else self.added_tokens
            for value in message.values():
                if not isinstance(value, str) or contains_any(value, tokens):
                    sanitize = True
        ids = self.apply_template(
            prompt, add_generation_prompt=True, sanitize_control_tokens=sanitize
        )
        has_bos = ids[: len(self.bos_ids)] == self.bos_ids
        return ids if has_bos else self.bos_ids + ids

    def ids_of_response(self, prompt: list[dict], response: str | dict) -> list[int]:
        """Token ids of a response: a text, {"text", "finished"}, or {"text", "finished",
        "token_ids"} as `sample` returns it.

        A sample keeps its token ids, because decoding and encoding may give others. A finished
        response ends with exactly one end-of-sequence token, any other one with none.
        The ids of a text are those of what the chat template writes behind the prompt, tokenised on
        its own, because generation goes on from the prompt's ids as they are. ChatTemplateError if
        the template writes another prompt once it is answered.
        """
        if isinstance(response, str):
            response = {"text": response, "finished": True}
        if self.has_token_ids(response):
            return response["token_ids"]
        if self.tokenizer.chat_template:
            ids = self.ids_from_template(prompt, response["text"], response["finished"])
        else:
            ids = self.plain_ids(response["text"])

        # What a template writes after the end-of-sequence token, such as a line break, is not part
        # of the response.
        end = first_index(ids, self.eos_ids)
        if not response["finished"]:
            return ids[:end]
        if end < len(ids):
            return ids[: end + 1]
        return [*ids, self.eos_ids[0]]

    def has_token_ids(self, response: dict) -> bool:
        """Whether a response has token ids that read as its text with this tokenizer. Those of
        another tokenizer do not, nor do those of a text that was changed afterwards."""
        ids = response.get("token_ids")
        if not isinstance(ids, list) or not ids:
            return False
        for token in ids:
            if not isinstance(token, int) or not 0 <= token < self.vocab_size:
                return False
        if response["finished"]:
            *ids, end = ids
            if end not in self.eos_ids and self.tokenizer.decode([end], skip_special_tokens=True):
                return False
        return self.tokenizer.decode(ids, skip_special_tokens=True) == response["text"]

    def ids_from_template(self, prompt: list[dict], text: str, finished: bool) -> list[int]:
        """Token ids of what the chat template writes for a response, with the end of its turn if it
        is finished. Special tokens that the text spells out stay text."""
        before = self.chat_text(prompt, add_generation_prompt=True)
        whole = self.chat_text([*prompt, {"role": "assistant", "content": text}])
        if not whole.startswith(before):
            start = prompt_text(prompt)[:200]
            raise ChatTemplateError(
                f"{self.path}: its template changes this prompt once it is answered: {start}"
            )
        written = whole.removeprefix(before).removesuffix(self.turn_end)
        end = self.turn_end if finished and whole.endswith(self.turn_end) else ""

        # The end of the prompt, from an added token on, is all the context that a tokenizer needs.
        start = max(0, len(before) - 100)
        start = max((before.rfind(token, start) for token in self.added_tokens), default=0)
        context = before[max(0, start) :]
        if not contains_any(text, self.special_tokens):
            return self.ids_behind(context, written + end)
        if not written.endswith(text):
            raise ChatTemplateError(
                f"{self.path}: its template changes this text with special tokens: {text[:200]}"
            )
        ids = self.ids_behind(context, written.removesuffix(text))
        ids += self.ids_behind("\n", text, is_plain=True)
        return ids + self.ids_behind("\n", end)

    def rewritten(self, text: str, ids: list[int]) -> list[str]:
        """["<text> as <other text>"] if the token ids of a text read otherwise, or else []. What
        the chat template adds, such as an empty block of thoughts, counts as well."""
        if ids[-1] in self.eos_ids:
            ids = ids[:-1]
        decoded = self.tokenizer.decode(ids)
        # A tokenizer's own way to decode, which may lack a first space, is no change.
        if decoded == text or decoded == self.tokenizer.decode(self.plain_ids(text)):
            return []
        # The example begins shortly before the first difference.
        same = 0
        while text[same : same + 1] == decoded[same : same + 1]:
            same += 1
        start = max(0, same - 20)
        return [f"{text[start : start + 60]!r} as {decoded[start : start + 60]!r}"]

    def encode(self, prompt: list[dict], responses=()) -> tuple[list[int], list[list[int]]]:
        """Token ids of a prompt, and of each response to it. The program ends if the chat template
        refuses the prompt, or changes it once it is answered."""
        try:
            prompt_ids = self.ids_of_prompt(prompt)
            return prompt_ids, [self.ids_of_response(prompt, response) for response in responses]
        except ChatTemplateError as error:
            stop(str(error))

    def prompt_ids(self, prompt: list[dict]) -> list[int]:
        """Token ids of a prompt, up to where the response begins, as `encode` returns them."""
        return self.encode(prompt)[0]

    # -------------------------------------------------------------------------- the forward pass
    def hidden_states(self, batch: "Batch") -> torch.Tensor:
        """[rows·T, H]: the last hidden states of packed rows. A frozen model gets no gradient."""
        mask = batch.attention_mask
        if mask is not None and self.model.config._attn_implementation == "eager":
            # Eager attention adds its mask: 0 where a token may look, the lowest number elsewhere.
            lowest = torch.finfo(self.model.dtype).min
            mask = torch.zeros_like(mask, dtype=self.model.dtype).masked_fill(~mask, lowest)
        layout = {}  # not all architectures know these arguments
        if mask is not None:
            layout = {"attention_mask": mask, "position_ids": batch.position_ids}
        backbone = self.backbone()
        with torch.set_grad_enabled(self.trainable and torch.is_grad_enabled()), self.autocast():
            output = backbone(batch.input_ids, use_cache=False, **layout)
        return output.last_hidden_state.flatten(0, 1)

    def backbone(self) -> torch.nn.Module:
        """The model without its head. (Llama 4's base_model is the whole model.)"""
        backbone = self.model.base_model
        return self.model.model if backbone is self.model else backbone

    def logits(self, hidden: torch.Tensor, vocab_size: int) -> torch.Tensor:
        """[N, V] in float32 from [N, H], scaled and capped as the model's config says."""
        scale = getattr(self.config, "logit_scale", None) or 1.0
        scale /= getattr(self.config, "logits_scaling", None) or 1.0
        with self.autocast():
            # Scaling H numbers per token is cheaper than scaling V.
            logits = self.model.get_output_embeddings()(hidden * scale)
        logits = logits[:, :vocab_size].float()
        cap = getattr(self.config, "final_logit_softcapping", None)
        if cap:
            logits = cap * torch.tanh(logits / cap)
        return logits

    @torch.no_grad()
    def check_packing(self):
        """Compares the logits of packed examples with the model's own, on random tokens.

        An architecture that does not take our mask gets a row for every response. That is slower
        and gives the same result. The program ends, with the reason, if that is not so.
        """
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(self.vocab_size, (20,), generator=generator).tolist()
        examples = [
            Example(row={}, prompt_ids=ids[:6], response_ids=[ids[6:11], ids[11:16]]),
            Example(row={}, prompt_ids=ids[16:18], response_ids=[ids[18:]]),  # with padding
        ]
        parameters = inspect.signature(self.backbone().forward).parameters
        self.share_prefix = not parameters.keys().isdisjoint({"position_ids", "kwargs"})
        if self.share_prefix and not self.packing_problem(examples):
            return
        self.share_prefix = False
        problem = self.packing_problem(examples)
        if problem:
            stop(
                f"cannot score responses with {self.path} ({type(self.model).__name__}): {problem}"
            )
        print(f"note: {self.path} takes a row per response (slower, same result)")

    def packing_problem(self, examples: list["Example"]) -> str:
        """Why `pack` and `logits` do not give what a plain forward pass for every response gives.
        It is "" if they do, up to rounding."""
        tolerance = 1e-4 if self.model.dtype == torch.float32 else 3e-2
        # On a GPU sums of floats may come in another order when they are repeated.
        noise_tolerance = 0.0 if self.device.type == "cpu" else tolerance
        try:
            expected = self.plain_logits(examples)
            logits = self.packed_logits(examples)
            error = relative_distance(logits, expected)
            noise = relative_distance(self.packed_logits(examples), logits)
        except (IndexError, RuntimeError, ValueError) as error:  # such as for a refused mask
            return f"{type(error).__name__}: {error}"
        if noise > noise_tolerance:
            return "its forward pass is random: it gives other logits when it is repeated"
        if error < tolerance:  # NaN is an error
            return ""
        problem = (
            "its LM head is not what LM.logits computes, or the rows of a batch see each other"
        )
        return f"{problem} (error {error:.1e})"

    def plain_logits(self, examples: list["Example"]) -> torch.Tensor:
        """[N, V]: the model's own logits of the response tokens, one response at a time."""
        logits = []
        for example in one_response_per_example(examples):
            ids = torch.tensor([example.prompt_ids + example.response_ids[0]], device=self.device)
            row = self.model(ids).logits[0, len(example.prompt_ids) - 1 : -1]
            logits.append(row[:, : self.vocab_size].float())
        return torch.cat(logits)

    def packed_logits(self, examples: list["Example"]) -> torch.Tensor:
        """[N, V]: the same from `pack` and `logits`, as the scripts compute them."""
        batch = pack(examples, self)
        return self.logits(self.hidden_states(batch)[batch.predict_index], self.vocab_size)

    # ------------------------------------------------------------------------------------ sampling
    @torch.no_grad()
    def sample(
        self,
        prompts: list[list[int]],
        *,
        n: int = 1,
        temperature: float = 1.0,
        max_new_tokens: int,
        batch_size: int,
        seed: int,
    ) -> list[list[dict]]:
        """n responses to every prompt (token ids), each {"text", "finished", "token_ids"}. The ids
        end with the end-of-sequence token if the response is finished. Temperature 0 is greedy.

        `batch_size` responses are sampled at a time, prompts of similar length together. Of the
        checkpoint's generation config only the end-of-sequence tokens count. The same seed gives
        the same responses.
        """
        longest = max(len(prompt) for prompt in prompts)
        self.check_limits(max(max(prompt) for prompt in prompts), longest + max_new_tokens)
        if not self.samples_together:
            self.samples_together = self.check_sampling()
        responses = [[] for _ in prompts]
        with self.sampling(temperature, max_new_tokens), torch.random.fork_rng(), self.autocast():
            torch.manual_seed(seed)
            for indices in self.sampling_batches(prompts, n, batch_size):
                new_ids = self.generate([prompts[i] for i in indices])
                for i, ids in zip(indices, new_ids.tolist()):
                    responses[i].append(self.decode_response(ids))
        return responses

    def sampling_batches(self, prompts: list[list[int]], n: int, batch_size: int):
        """The indices of prompts in batches, the shortest prompts first, each index n times."""
        by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        batches = []
        for i in by_length:
            if self.samples_together == "single":
                batches += [[i]] * n
                continue
            fits = bool(batches) and len(batches[-1]) + n <= batch_size
            if fits and self.samples_together == "one length":
                fits = len(prompts[i]) == len(prompts[batches[-1][0]])
            if not fits:
                batches.append([])
            batches[-1] += [i] * n
        return batches

    def check_sampling(self) -> str:
        """Which prompts can be sampled together: "any", those of "one length" or a "single" one.

        Some recurrent models take the padding of short prompts for text, or keep no state for each
        of several prompts.
        """
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(self.vocab_size, (12,), generator=generator).tolist()
        if self.samples_alike([ids[:3], ids[3:]]):
            return "any"
        if self.samples_alike([ids[:6], ids[6:]]):
            tqdm.write(f"note: {self.path} reads padding, so it samples prompts of one length")
            return "one length"
        tqdm.write(f"note: {self.path} samples one response at a time, since others change it")
        return "single"

    def samples_alike(self, prompts: list[list[int]]) -> bool:
        """Whether prompts get the logits that they get alone, for their first two new tokens."""
        tolerance = 1e-4 if self.model.dtype == torch.float32 else 3e-2
        with self.sampling(temperature=0.0, max_new_tokens=2):
            self.model.generation_config.eos_token_id = None
            together = self.generate(prompts, output_logits=True)  # [prompts, 2, V]
            alone = torch.cat([self.generate([ids], output_logits=True) for ids in prompts])
        if not relative_distance(together[:, 0], alone[:, 0]) < tolerance:
            return False
        # Two tokens of nearly equal logits may change places. What comes after them differs.
        same_token = together[:, 0].argmax(-1) == alone[:, 0].argmax(-1)
        if not same_token.any():
            return True
        return relative_distance(together[same_token, 1], alone[same_token, 1]) < tolerance

    @contextmanager
    def sampling(self, temperature: float, max_new_tokens: int):
        """Puts our generation config in place of the checkpoint's. Temperature 0 is greedy."""
        saved_config = self.model.generation_config
        self.model.generation_config = self.sampling_config(temperature, max_new_tokens)
        self.model.eval()  # in train mode gradient checkpointing would switch the cache off
        try:
            yield
        finally:
            self.model.generation_config = saved_config
            self.set_mode()

    def sampling_config(
        self, temperature: float, max_new_tokens: int
    ) -> transformers.GenerationConfig:
        """What `generate` gets in place of the checkpoint's generation config."""
        config = transformers.GenerationConfig(
            max_new_tokens=max_new_tokens,
            eos_token_id=self.eos_ids,
            pad_token_id=self.eos_ids[0],
        )
        if temperature > 0:
            config.update(do_sample=True, temperature=temperature, top_p=1.0, top_k=0)
        return config

    def decode_response(self, ids: list[int]) -> dict:
        """{"text", "finished", "token_ids"} from sampled ids. What comes after an end-of-sequence
        token is padding."""
        end = first_index(ids, self.eos_ids)
        text = self.tokenizer.decode(ids[:end], skip_special_tokens=True)
        return {"text": text, "finished": end < len(ids), "token_ids": ids[: end + 1]}

    def generate(self, prompts: list[list[int]], output_logits: bool = False) -> torch.Tensor:
        """[prompts, T]: the new tokens of a response to every prompt, or [prompts, T, V]: their
        logits. Prompts are padded on the left."""
        width = max(len(prompt) for prompt in prompts)
        ids = torch.full((len(prompts), width), self.eos_ids[0])
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        output = self.model.generate(
            ids.to(self.device),
            attention_mask=mask.to(self.device),
            output_logits=output_logits,
            return_dict_in_generate=True,
        )
        if output_logits:
            return torch.stack(output.logits, dim=1)[..., : self.vocab_size].float()
        return output.sequences[:, width:]


# What models call their table of positions.
POSITIONS = ("wpe", "embed_positions", "position_embeddings", "positions_embed", "pos_encoding")
# What configs call the noise of forward passes, and windows of local or sparse attention.
NOISE = "drop|jitter|noise|stochastic"
WINDOWS = ["window_size", "sliding_window_size", "attention_window_size", "keep_window_size"]
WINDOWS += ["local_attention", "local_attention_window_len", "attention_chunk_size", "index_topk"]


def switch_noise_off(config):
    """Sets every rate of dropout, skipped layers and noise to 0, in nested configs as well."""
    for name, value in list(vars(config).items()):
        if isinstance(value, transformers.PreTrainedConfig):
            switch_noise_off(value)
        elif isinstance(value, float) and re.search(NOISE, name):
            setattr(config, name, 0.0)


def shortest_window(config) -> float:
    """The tokens that a row may have before the model's own windows cut it, or infinity.

    `sliding_window` is no part of it. That window is a mask, which `pack` replaces by its own.
    """
    windows = [getattr(config, name, None) for name in WINDOWS]
    return min([window for window in windows if window], default=math.inf)


def longest_row(config) -> tuple[float, str]:
    """(tokens, why): longer rows make scores depend on the other rows of a batch. Or (∞, "")."""
    sparse = getattr(config, "index_topk", None)
    if sparse:
        return sparse, "its sparse attention looks at padding"
    parameters = getattr(config, "rope_parameters", None) or {}
    layers = [parameters, *parameters.values()]  # some configs have one set for a kind of layers
    for rope in [layer for layer in layers if isinstance(layer, dict)]:
        if rope.get("rope_type") in ("dynamic", "longrope"):
            limit = rope.get("original_max_position_embeddings") or config.max_position_embeddings
            return limit, f"its {rope['rope_type']} rotary embeddings change with the longest row"
    return math.inf, ""


def relative_distance(values: torch.Tensor, expected: torch.Tensor) -> float:
    """|values − expected| / |expected|."""
    return ((values - expected).norm() / expected.norm()).item()


def load_model(path, device, trainable: bool, trust_remote_code: bool, is_reward_model: bool):
    """(the transformers model without dropout, the dtype of its checkpoint). ValueError if it lacks
    weights, or if a reward model has no head that can be read."""
    if (Path(path) / "adapter_config.json").exists():
        raise ValueError("it has an adapter (adapter_config.json), which is not read: merge it")
    config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    text_config = config.get_text_config()
    checkpoint_dtype = config.dtype or text_config.dtype
    switch_noise_off(config)

    auto_class = transformers.AutoModelForCausalLM
    if is_reward_model:
        auto_class = transformers.AutoModelForSequenceClassification
        has_classifier = type(config) in transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
        if not has_classifier and not hasattr(config, "auto_map"):
            raise ValueError(f"transformers has no sequence classifier for {config.model_type}")
    frozen_on_gpu = device.type == "cuda" and not trainable
    load = partial(
        auto_class.from_pretrained,
        path,
        config=config,
        dtype=torch.bfloat16 if frozen_on_gpu else torch.float32,
        use_safetensors=True,
        trust_remote_code=trust_remote_code,
        # They are refused below, with the shapes.
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    if trainable and checkpoint_dtype is None:
        # Where the config does not declare it, the weights show it.
        checkpoint_dtype = load(dtype="auto")[0].dtype
    model, info = load()
    shapes = {name: (saved, expected) for name, saved, expected in info["mismatched_keys"]}
    if is_reward_model and list(shapes) == ["score.weight"]:
        # A config that does not say how many labels there are counts two. The weights know better.
        saved, _ = shapes["score.weight"]
        config.num_labels = saved[0]
        model, info = load()
    for name, saved, expected in info["mismatched_keys"]:
        raise ValueError(f"{name} has the shape {list(saved)}, by its config {list(expected)}")
    if info["missing_keys"]:
        raise ValueError(f"it lacks weights: {sorted(info['missing_keys'])}")
    if is_reward_model and not isinstance(getattr(model, "score", None), torch.nn.Linear):
        raise ValueError(
            f"{type(model).__name__} has no linear head `score`, which is read at the last token; "
            "encoders and other classifiers need a reward function that calls them"
        )
    return model.to(device), checkpoint_dtype


def count_positions(model) -> float:
    """How many positions a model has: the size of its table of positions, or infinity if positions
    are computed, as rotary ones are."""
    count = math.inf
    for name, module in model.named_modules():
        if name.endswith(POSITIONS) and isinstance(module, torch.nn.Embedding):
            count = min(count, module.num_embeddings - getattr(module, "offset", 0))
    for name, table in model.named_buffers():  # those of GPT-J and CTRL are not learned
        if name.endswith(POSITIONS):
            count = min(count, len(table))
    return count


def shared_vocab_size(student: LM, teacher: LM, advice: str = "choose a pair") -> int:
    """How many tokens two models share. The program ends with the advice if one id means two
    different tokens. Heads that are padded to different sizes do no harm, nor do tokens at the end
    of one vocabulary that no text contains.
    """
    size = min(student.vocab_size, teacher.vocab_size)
    student_vocab = {t: i for t, i in student.tokenizer.get_vocab().items() if i < size}
    teacher_vocab = {t: i for t, i in teacher.tokenizer.get_vocab().items() if i < size}
    if student_vocab != teacher_vocab:
        stop(f"{student.path} and {teacher.path} have different tokenizers; {advice}")
    chat = [{"role": "user", "content": "a"}]
    if student.encode(chat, ["a"]) != teacher.encode(chat, ["a"]):
        print(
            f"note: {teacher.path} has another chat template than {student.path}; where it scores "
            "tokens, it reads prompts as the student's template writes them"
        )
    return size


def with_date(template: str, now: datetime) -> str:
    """A chat template in which `strftime_now("…")` is replaced by what it gives at that time."""

    def date(call: re.Match) -> str:
        return repr(now.strftime(call["format"]))

    return re.sub(r"""strftime_now\(\s*(["'])(?P<format>.*?)\1\s*\)""", date, template)


def first_index(ids: list[int], wanted: list[int]) -> int:
    """The index of the first id that is one of the wanted ones, or the number of ids."""
    for index, token in enumerate(ids):
        if token in wanted:
            return index
    return len(ids)


def contains_any(text: str, words: list[str]) -> bool:
    return any(word in text for word in words)


def prompt_text(prompt: list[dict]) -> str:
    """The messages of a prompt as one text, without their roles."""
    return "\n".join(message["content"] for message in prompt)


# ------------------------------------------------------------------------- part 2: per-token scores
@dataclass
class Example:
    """A row of data, with the token ids of its prompt and of its n responses."""

    row: dict
    prompt_ids: list[int]
    response_ids: list[list[int]]


@dataclass
class Batch:
    """Packed rows, and where their R responses and N response tokens lie in them."""

    input_ids: torch.Tensor  # [rows, T]
    position_ids: torch.Tensor | None  # [rows, T]
    attention_mask: torch.Tensor | None  # [rows, 1, T, T], True where a query may look at a key
    target_ids: torch.Tensor  # [N] the response tokens
    predict_index: torch.Tensor  # [N] into rows·T: the position before the token, which predicts it
    response_index: torch.Tensor  # [N] which of the R responses the token belongs to
    last_index: torch.Tensor  # [R] into rows·T: the position of each response's last token
    lengths: torch.Tensor  # [R] tokens of each response

    def only(self, k: int, of: int) -> "Batch":
        """The same rows, but only response k (from 0) of every example is scored. Every example
        must have `of` responses. It serves terms of a loss that are taken on one response."""
        is_wanted = self.response_index % of == k  # [N]
        return replace(
            self,
            target_ids=self.target_ids[is_wanted],
            predict_index=self.predict_index[is_wanted],
            response_index=self.response_index[is_wanted] // of,
            last_index=self.last_index[k::of],
            lengths=self.lengths[k::of],
        )


def pack(examples: list[Example], *models: LM) -> Batch:
    """A micro-batch in a layout that all the given models can read.

    An example is ONE row, the prompt followed by its responses. So the prompt is computed once:

        tokens         x0 x1 x2 | a0 a1 a2 | b0 b1 | padding
        segment         0  0  0 |  1  1  1 |  2  2 | 0
        position_ids    0  1  2 |  3  4  5 |  3  4 | 0

    A response looks at the prompt (segment 0) and at itself, never at another response. Its
    positions go on from the prompt's. So it sees what it would see alone. Models that cannot do
    that get one response per row. ValueError if a response has no token.
    """
    longest = 0
    for example in examples:
        for response in example.response_ids:
            if not response:
                raise ValueError("a response without tokens")
            longest = max(longest, len(example.prompt_ids) + len(response))
    width = max(len(e.prompt_ids) + sum(map(len, e.response_ids)) for e in examples)
    for lm in models:
        is_full = longest <= lm.sliding_window and width <= lm.row_window
        if not (lm.share_prefix and is_full):
            examples = one_response_per_example(examples)
            width = longest

    input_ids = torch.zeros(len(examples), width, dtype=torch.long)
    position_ids = torch.zeros_like(input_ids)
    segments = torch.zeros_like(input_ids)
    target_ids, predict_index, last_index, lengths = [], [], [], []
    for row, example in enumerate(examples):
        prompt_length = len(example.prompt_ids)
        input_ids[row, :prompt_length] = torch.tensor(example.prompt_ids)
        position_ids[row, :prompt_length] = torch.arange(prompt_length)
        first = row * width  # the index of this row's first token in rows·T
        start = prompt_length
        for segment, response in enumerate(example.response_ids, 1):
            end = start + len(response)
            input_ids[row, start:end] = torch.tensor(response)
            position_ids[row, start:end] = prompt_length + torch.arange(len(response))
            segments[row, start:end] = segment
            target_ids += response
            # The prompt's last token predicts the first response token. Each response token
            # predicts the next one.
            predict_index.append(first + prompt_length - 1)
            predict_index += range(first + start, first + end - 1)
            last_index.append(first + end - 1)
            lengths.append(len(response))
            start = end

    for lm in models:
        lm.check_limits(int(input_ids.max()), longest)

    # A token looks at its own segment and at the prompt, and never at what is later in the row. So
    # nothing looks at padding, which is the last thing in a row.
    same_segment = segments[:, :, None] == segments[:, None, :]
    key_in_prompt = (segments == 0)[:, None, :]
    attention_mask = (same_segment | key_in_prompt).tril()[:, None]
    one_response_per_row = len(lengths) == len(examples)
    if one_response_per_row:
        # That is plainly causal, which is what models do without a mask.
        attention_mask = None
        position_ids = None

    def on_device(values):
        return None if values is None else torch.as_tensor(values).to(models[0].device)

    lengths = torch.tensor(lengths)
    return Batch(
        input_ids=on_device(input_ids),
        position_ids=on_device(position_ids),
        attention_mask=on_device(attention_mask),
        target_ids=on_device(target_ids),
        predict_index=on_device(predict_index),
        response_index=on_device(torch.arange(len(lengths)).repeat_interleave(lengths)),
        last_index=on_device(last_index),
        lengths=on_device(lengths),
    )


def one_response_per_example(examples: list[Example]) -> list[Example]:
    """The same responses in the same order, each as an example of its own."""
    single = []
    for example in examples:
        for response in example.response_ids:
            single.append(Example(example.row, example.prompt_ids, [response]))
    return single


def per_token(
    function,
    target_ids: torch.Tensor,
    models: list[LM],
    hidden: list[torch.Tensor],
    *,
    vocab_size: int,
    chunk_size: int,
):
    """Calls function(target_ids [N], log_probs [N, V] of every model), which returns one tensor [N]
    or several. `hidden` has each model's hidden states [N, H] at the positions that predict.

    It takes hidden states and not logits because logits need the most memory. More than
    `chunk_size` tokens are handled in slices of that size, whose logits are computed again in the
    backward pass. So only [chunk_size, V] logits per model are in memory at a time. Log-probs are
    float32.
    """

    def on_slice(target_ids, *hidden):
        log_probs = [lm.logits(h, vocab_size).log_softmax(-1) for lm, h in zip(models, hidden)]
        return function(target_ids, *log_probs)

    if len(target_ids) <= chunk_size:
        return on_slice(target_ids, *hidden)
    columns = [tensor.split(chunk_size) for tensor in (target_ids, *hidden)]
    results = []
    for part in zip(*columns):
        results.append(checkpoint(on_slice, *part, use_reentrant=False, preserve_rng_state=False))
    if torch.is_tensor(results[0]):
        return torch.cat(results)
    return tuple(torch.cat(parts) for parts in zip(*results))


def token_logps(target_ids: torch.Tensor, log_probs: torch.Tensor) -> torch.Tensor:
    """[N]: the log-prob of each response token, from [N] and [N, V]."""
    return log_probs.gather(-1, target_ids[:, None]).squeeze(-1)


def mean_per_response(values: torch.Tensor, batch: Batch) -> torch.Tensor:
    """[R]: the mean of values [N] over the tokens of each response."""
    sums = values.new_zeros(len(batch.lengths)).index_add(0, batch.response_index, values)
    return sums / batch.lengths


def weighted(weight: float, term: torch.Tensor) -> torch.Tensor | float:
    """weight · term. A weight of 0 gives 0 even where the term is infinite, because 0 · ∞ is NaN.

    A term is infinite where one model excludes a token of the other, with a logit of −∞.
    """
    return weight * term if weight else 0.0


# ------------------------------------------------------------------------------------- part 3: data
COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd", ".xz": "xz"}
FILE_KINDS = (".jsonl", ".json", ".csv", ".parquet")  # and ".txt" where lines of text serve


def read_rows(
    source: str, split: str, columns=("chosen", "rejected"), config: str = ""
) -> list[dict]:
    """The rows of a file, a folder or a hub id: each has a prompt and the named columns.

    A column is a response: a text, or a conversation that ends with it. The turns before it are the
    prompt. A column `prompt` says the same, as a text or as messages, or says it alone. Where
    nothing says it, the prompt is what `messages` or `conversations` hold before their last
    response. A message has `role` and `content`, or `from` and `value`.

    A returned row has an `id`, the prompt as messages, the columns as texts, and whatever else it
    had but images and sounds. As `record` it has the row as it was read. Rows without a text in one
    of the columns are left out and counted. The program ends if no row is left, and with the file
    and row that cannot be read.
    """
    rows = []
    left_out = []
    records = read_records(source, split, config)
    for number, (file, place, record) in enumerate(records, 1):
        try:
            rows.append(read_row(record, number, columns))
        except ValueError as error:
            problem = f"{file}, row {place}: {error}: {repr(record)[:200]}"
            if not isinstance(error, UnusableRow):
                stop(problem)
            left_out.append(problem)
    if not rows:
        stop(left_out[0] if left_out else f"there are no rows in {source} (split {split})")
    if left_out:
        print(f"note: left out {len(left_out)} of {len(records)} rows, as {left_out[0]}")
    return rows


def read_records(source: str, split: str, config: str, kinds=FILE_KINDS) -> list[tuple]:
    """(file, row in it, record) for every record of a split. A file is one split, of any name. The
    program ends with a file that is of none of the kinds."""
    path = Path(source)
    if not path.exists() and file_kind(path) not in kinds:
        return read_hub(source, split, config)
    if path.is_file() and config:
        stop(f"{source} is a file, which has no config {config}")
    records = {}  # by split, for train[:90%] and train+test
    for name in re.findall(r"(?:^|\+)\s*([^\s\[+]+)", split):
        files = [path]
        if path.is_dir() and file_kind(path) != ".parquet":
            files = folder_files(path, name, config, kinds)
        records[name] = []
        for file in files:
            for number, record in enumerate(read_file(file, kinds), 1):
                records[name].append((str(file), number, record))
    if split in records:
        return records[split]

    from datasets import ReadInstruction  # takes a second to import

    wanted = []
    lengths = {name: len(part) for name, part in records.items()}
    try:
        for part in ReadInstruction.from_spec(split).to_absolute(lengths):
            wanted += records[part.splitname][part.from_ : part.to]
    except (ValueError, AssertionError) as error:
        stop(f"cannot read the split {split} of {source}: {error}")
    return wanted


def read_hub(source: str, split: str, config: str) -> list[tuple]:
    """(hub id, row, record) for every record of a split of a dataset on the hub."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        dataset = load_dataset(source, config or None, split=split)
    except (OSError, ValueError, DatasetsError) as error:
        part = f"split {split}, config {config or 'not named'}"
        stop(f"{source} is no file or folder, and cannot be read from the hub ({part}): {error}")
    names = columns_without_bytes(dataset.features.arrow_schema)
    return [(source, number, row) for number, row in enumerate(dataset.select_columns(names), 1)]


def folder_files(folder: Path, split: str, config: str, kinds: tuple[str, ...]) -> list[Path]:
    """The files of a split: those that the README lists, or else by their names, as on the hub.
    What is of none of the kinds, such as a licence, is left out beside files that are."""
    from datasets import load_dataset_builder
    from datasets.data_files import DataFilesDict, get_data_patterns

    readme = folder / "README.md"
    try:
        if config or (readme.exists() and "\nconfigs:" in readme.read_text("utf-8")):
            files = load_dataset_builder(str(folder), config or None).config.data_files
        else:
            base_path = glob.escape(folder.resolve().as_posix())  # its name may have brackets
            patterns = get_data_patterns(base_path)
            files = DataFilesDict.from_patterns(patterns, base_path=base_path)
    except (OSError, ValueError) as error:
        stop(f"cannot read {folder}: {error}")
    if split not in files:
        stop(f"cannot read {folder}: it has no split {split}, but {', '.join(map(str, files))}")
    paths = [Path(file) for file in files[split]]
    readable = [path for path in paths if file_kind(path) in kinds]
    others = [path.name for path in paths if path not in readable]
    if readable and others:
        count = f"{len(others)} of {len(paths)}"
        print(f"note: not read in {folder}: {', '.join(others[:5])} ({count})")
    return readable or paths


def file_kind(path: Path) -> str:
    """The suffix of a file in small letters, without that of a compression: .csv for A.CSV.gz."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def read_file(path: Path, kinds: tuple[str, ...]) -> list:
    """The records of a file. Texts stay what they are: `datasets` makes dates of some."""
    kind = file_kind(path)
    if not path.exists():
        stop(f"cannot read {path}: there is no such file")
    if kind not in kinds:
        wanted = f"a file of the kinds {', '.join(kinds)}, also with {', '.join(COMPRESSIONS)}"
        stop(f"cannot read {path}: what is needed is {wanted}, or a folder of such files")
    try:
        if kind == ".parquet":
            return read_parquet(path)
        data = read_bytes(path)
        if kind == ".txt":
            lines = io.StringIO(data.decode(), newline=None)
            return [{"text": line.removesuffix("\n")} for line in lines]
        if kind == ".csv":
            return read_csv(data)
        return read_json(data)
    except (OSError, ValueError, RecursionError, lzma.LZMAError) as error:
        # An error in a line begins with its number.
        place = f"{path}, " if str(error).startswith("line ") else f"{path}: "
        stop(f"cannot read {place}{error}")


def read_bytes(path: Path) -> bytes:
    """What is in a file, decompressed and without a byte-order mark."""
    compression = COMPRESSIONS.get(path.suffix.lower())
    if compression is None:
        data = path.read_bytes()
    elif compression == "xz":
        data = lzma.decompress(path.read_bytes())
    else:
        import pyarrow

        with pyarrow.input_stream(str(path), compression=compression) as file:
            data = file.read()
    return data.removeprefix(codecs.BOM_UTF8)


def read_json(data: bytes) -> list:
    """The records of JSON with one on each line, or with one list of them."""
    if data.lstrip().startswith(b"["):
        return json.loads(data)
    records = []
    for number, line in enumerate(data.splitlines(), 1):
        try:
            if line.strip():
                records.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"line {number}: {error}") from error
    return records


def read_csv(data: bytes) -> list[dict]:
    """The records of CSV whose first line names the columns. Every value is a text."""
    csv.field_size_limit(2**31 - 1)
    text = data.decode()
    names, _, _ = text.partition("\n")
    delimiter = max(",;\t", key=names.count)  # some spreadsheets write semicolons or tabs
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    records = []
    try:
        for record in reader:
            if None in record:
                raise ValueError("it has more values than the first line has names")
            records.append(record)
    except (ValueError, csv.Error) as error:
        raise ValueError(f"line {reader.reader.line_num}: {error}") from error
    return records


def read_parquet(path: Path) -> list[dict]:
    """The records of a file, or of a folder of parts with the name of a file."""
    import pyarrow.dataset

    try:
        dataset = pyarrow.dataset.dataset(str(path), format="parquet")
        return dataset.to_table(columns=columns_without_bytes(dataset.schema)).to_pylist()
    except pyarrow.ArrowException as error:
        raise ValueError(str(error)) from error


def columns_without_bytes(schema) -> list[str]:
    """The columns of an Arrow schema that hold no bytes, which images and sounds are."""

    def holds_bytes(kind) -> bool:
        parts = [kind.field(i).type for i in range(kind.num_fields)]
        if parts:
            return any(holds_bytes(part) for part in parts)
        return "binary" in str(kind)

    return [field.name for field in schema if not holds_bytes(field.type)]


def read_row(record, number: int, columns) -> dict:
    """A row as `read_rows` returns it. ValueError says why a record is not valid."""
    if not isinstance(record, dict):
        raise ValueError("this is not an object with columns")
    prompt = read_prompt(record, columns)
    texts = []
    for column in columns:
        turns_before, text = read_response(record, column)
        if turns_before and spoken(turns_before) != spoken(prompt):
            raise ValueError(f"the turns before the response in {column} are not the prompt")
        texts.append(text)
    content = [prompt, texts]
    # JSON can spell half a character, "\ud83e", which no tokenizer takes.
    if re.search(r"[\ud800-\udfff]", json.dumps(content, ensure_ascii=False, default=str)):
        raise ValueError("half a character (a lone surrogate) stands in a text")
    digest = hashlib.sha256(json.dumps(content, default=str).encode()).hexdigest()
    row = {**record, "record": record, "id": f"{number}-{digest[:8]}", "prompt": prompt}
    return row | dict(zip(columns, texts))


def read_prompt(record: dict, columns) -> list[dict]:
    """The prompt of a record as messages. The last of them is one that an assistant answers."""
    missing = [column for column in columns if record.get(column) is None]
    prompt = []
    if record.get("prompt") is not None:
        prompt = read_turns(record["prompt"], "prompt", role="user")
    for column in [*columns, "chosen"]:
        if not prompt and isinstance(record.get(column), list | str):
            prompt, _ = read_response(record, column)
    for column in ("messages", "conversations"):
        if not prompt and record.get(column) is not None:
            prompt = read_turns(record[column], column, role="user")
            if prompt[-1]["role"] == "assistant":
                prompt = prompt[:-1]
    if missing or not prompt:
        needed = ", ".join(["prompt", *columns])
        found = ", ".join(name for name in record if record[name] is not None)
        raise UnusableRow(f"the columns {needed} are needed, found {found}")
    role = prompt[-1]["role"]
    if role not in ("user", "tool"):
        raise ValueError(f"the prompt ends with a turn of the {role}, not of the user or a tool")
    return prompt


def read_response(record: dict, column: str) -> tuple[list[dict], str]:
    """(the turns before it, its text) of the response in a column."""
    *turns_before, last = read_turns(record[column], column, role="assistant")
    if last["role"] != "assistant":
        raise ValueError(f"the last turn of {column} is the {last['role']}'s, not the assistant's")
    for key in ("tool_calls", "reasoning_content", "thinking"):
        if last.get(key):
            raise ValueError(f"the response in {column} is more than a text, it has {key}")
    return turns_before, last["content"]


def read_turns(value, column: str, role: str) -> list[dict]:
    """Messages, from messages, from one message, or from a text, which gets the role."""
    if isinstance(value, str):
        if re.match(r"""\[\s*\{\s*["'](role|content|from|value)["']""", value):
            raise UnusableRow(f"{column} is a conversation that was written as a text")
        return [{"role": role, "content": value}]
    messages = [value] if isinstance(value, dict) else value
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{column} is neither a text nor a conversation")
    return [read_message(message, column) for message in messages]


def read_message(message, column: str) -> dict:
    """A chat message with `role` and `content`. In some files they are called from and value."""
    if isinstance(message, dict):
        # A parquet file writes all keys that any message has.
        message = {key: value for key, value in message.items() if value is not None}
        if "role" not in message and "from" in message:
            role = str(message.pop("from"))
            message["role"] = {"human": "user", "gpt": "assistant"}.get(role, role)
            message["content"] = message.pop("value", None)
        if isinstance(message.get("role"), str) and isinstance(message.get("content"), str):
            return message
    raise ValueError(f"a message of {column} has no role and content as text")


def spoken(turns: list[dict]) -> list[tuple[str, str]]:
    """Who said what."""
    return [(turn["role"], turn["content"]) for turn in turns]


def encode_rows(
    lm: LM, rows: list[dict], columns, args, label: str, encoded: dict | None = None
) -> list[Example]:
    """Rows as token ids, with the responses in the columns: texts, or samples as `LM.sample`
    returns them.

    What does not fit --max_prompt_tokens and --max_response_tokens is dropped and counted, never
    cut, and the counts are printed after the label. One thing is cut: the text of a sample that
    never ended and has no token ids, as other programs write it. The limit cut it when it was
    sampled. The program ends if no row is left.

    `encoded` keeps the token ids of prompts and texts for a later call with the same rows.
    """
    encoded = {} if encoded is None else encoded
    encoded_before = set(encoded)
    kept = []
    dropped = Counter()
    refused = []
    changed = []
    with Bar(f"encoding {label}", total=len(rows), unit="rows", delay=1.0) as bar:
        for row in rows:
            bar.advance(1)
            try:
                with error_note(f"encoding row {row_number(row)} ({label})"):
                    example = encode_row(lm, row, columns, args.max_response_tokens, encoded)
            except ChatTemplateError as error:
                dropped["refused or changed by the chat template"] += 1
                refused.append(f"row {row_number(row)}: {error}")
                continue
            reason = reason_to_drop(example, columns, args)
            if reason:
                dropped[reason] += 1
                continue
            kept.append(example)
            for column, ids in zip(columns, example.response_ids):
                text = row[column]
                if isinstance(text, str) and (row["id"], text) not in encoded_before:
                    changed += lm.rewritten(text, ids)

    counts = f"{len(kept)} of {len(rows)} rows"
    for reason, count in dropped.items():
        counts += f", {count} dropped ({reason})"
    if refused:
        counts += f"; {refused[0]}"
    if not kept:
        stop(f"{label}: no row left: {counts}")
    print_fact(label, counts)
    if changed:
        print(f"note: {lm.path} writes {len(changed)} responses otherwise, as {changed[0]}")
    return kept


def check_not_empty(rows: list[dict], lm: LM, label: str):
    """Ends the program if a model answered every prompt with nothing, and says of how many it did.

    The rows have the prompts and the samples. An empty answer that is finished still has its
    end-of-sequence token, from which a student would learn to be silent.
    """
    empty = [row for row in rows if not row["text"].strip()]
    if rows and len(empty) == len(rows):
        shown = repr(prompt_text(rows[0]["prompt"])[:80])
        stop(
            f"{label}: all {len(rows)} are empty, as that to {shown}: {lm.path} writes nothing but "
            "the end of its response; it may need another chat template, or is no model to "
            f"learn from: try python -m playground.chat {lm.path}"
        )
    if empty:
        print(f"note: {label}: {len(empty)} of {len(rows)} are empty")


def reason_to_drop(example: Example, columns, args) -> str:
    """Why a row is not learned from, or ""."""
    texts = ["".join(message["content"] for message in example.row["prompt"])]
    texts += [example.row[column] for column in columns if isinstance(example.row[column], str)]
    responses = example.response_ids
    if not all(responses) or not all(text.strip() for text in texts):
        return "empty prompt or response"
    if columns[1:2] == ["rejected"] and responses[0] == responses[1]:
        return f"{columns[0]} equals rejected"
    if len(example.prompt_ids) > args.max_prompt_tokens:
        return f"prompt over {args.max_prompt_tokens} tokens"
    if any(len(ids) > args.max_response_tokens for ids in responses):
        return f"response over {args.max_response_tokens} tokens"
    return ""


def encode_row(lm: LM, row: dict, columns, limit: int, encoded: dict) -> Example:
    """A row as token ids. What is in `encoded` is taken from there, and what is not is added.

    A text that never ended, as other programs sampled it, is cut to the limit.
    """
    if row["id"] not in encoded:
        encoded[row["id"]] = lm.ids_of_prompt(row["prompt"])
    response_ids = []
    for column in columns:
        response = row[column]
        if isinstance(response, str):
            key = (row["id"], response)
            if key not in encoded:
                encoded[key] = lm.ids_of_response(row["prompt"], response)
            ids = encoded[key]
        else:
            ids = lm.ids_of_response(row["prompt"], response)
            if not response["finished"]:
                ids = ids[:limit]
        response_ids.append(ids)
    return Example(row, encoded[row["id"]], response_ids)


def load_reward_function(
    spec: str,
    device: torch.device,
    trust_remote_code: bool = False,
    batch_size: int = 32,
    *,
    label: str = "",
    rows: Sequence[dict] = (),
):
    """reward_fn(rows, responses) -> a list with a reward for every response, from --reward.

    `spec` is "none", which gives None in place of a function; `file.py:function` or
    `module:function`, see `call_reward_function`; or a reward model, a sequence classifier in a
    folder or on the hub, of which `label` chooses one label where it has several. A response is a
    text or a sample {"text", ...}.

    A reward is a finite number, or None where a function says that it does not apply. Anything else
    ends the program. So does a function that needs a column which `rows`, those that it will judge,
    do not have. An error inside a function keeps its traceback. A function may say what the highest
    reward is, in its attribute best_possible: it is shown at the end of a run.
    """
    place, _, name = spec.rpartition(":")
    # A path of Windows has a colon as well, but the name of no function behind it.
    is_function = bool(place) and name.isidentifier() and not Path(spec).exists()
    if label and (is_function or spec == "none"):
        stop(f"--reward_label {label} chooses a label of a reward model; --reward {spec} is none")
    if spec == "none":
        return None
    if spec.endswith(".py"):
        stop(f"--reward {spec} is a file: name a function in it, as in {spec}:reward")
    best_possible = None
    if is_function:
        function = load_function(spec)
        columns = other_columns(rows)
        if rows:
            check_parameters(function, columns, spec)
            check_prompts(function, rows, spec)
        score = partial(call_reward_function, function, columns)
        best_possible = getattr(function, "best_possible", None)
    else:
        score = load_reward_model(
            spec, device, trust_remote_code, batch_size=batch_size, label=label
        )

    def reward_fn(rows: list[dict], responses: list[str | dict]) -> list[float | None]:
        samples = []
        for response in responses:
            samples.append({"text": response} if isinstance(response, str) else response)
        with error_note(f"judging {len(responses)} responses with --reward {spec}"):
            returned = score(rows, samples)
        rewards = as_rewards(returned)
        if len(rewards) != len(responses):
            wanted = f"a list of {len(responses)} finite numbers"
            stop(f"--reward {spec} must return {wanted}; it returned {str(returned)[:100]}")
        return rewards

    reward_fn.best_possible = best_possible
    return reward_fn


def as_rewards(returned) -> list[float | None]:
    """What a reward function returned, as numbers and None, or [] if it is anything else."""
    try:
        rewards = [None if reward is None else float(reward) for reward in returned]
    except (TypeError, ValueError):
        return []
    is_valid = [reward is None or math.isfinite(reward) for reward in rewards]
    return rewards if all(is_valid) else []


def load_function(spec: str):
    """The function that `file.py:function` or `module:function` names. A module is looked for where
    Python looks, and last in the working directory. Code that fails keeps its traceback."""
    place, _, function_name = spec.rpartition(":")
    if place.endswith(".py"):
        module = load_file(Path(place).expanduser(), spec)
    else:
        sys.path.append(os.getcwd())
        advice = "a file is named with its ending, as in my/rewards.py:reward"
        if place.startswith("."):
            stop(f"--reward {spec}: there is no module {place}; {advice}")
        try:
            module = importlib.import_module(place)
        except ModuleNotFoundError as error:
            if not f"{place}.".startswith(f"{error.name}."):
                raise  # the module exists, and one that it imports does not
            stop(f"--reward {spec}: there is no module {error.name}; {advice}")
    function = getattr(module, function_name, None)
    if not callable(function):
        found = getattr(module, "__file__", place)
        stop(f"--reward {spec}: {found} has no function {function_name}")
    if inspect.isclass(function):
        stop(f"--reward {spec} is a class: name a function, or an instance that can be called")
    return function


def load_file(path: Path, spec: str):
    """A Python file as a module. It may import what lies beside it."""
    if not path.is_file():
        stop(f"--reward {spec}: there is no file {path}")
    sys.path.append(str(path.parent.resolve()))
    # With a name of its own it takes the place of no other module.
    name = f"reward_file_{path.stem}"
    module_spec = importlib.util.spec_from_file_location(name, path.resolve())
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[name] = module
    module_spec.loader.exec_module(module)
    return module


def call_reward_function(function, columns: list[str], rows: list[dict], samples: list[dict]):
    """What a reward function returns for one sample of a response to the prompt of every row.

    A function that takes keywords (`takes_keywords`) is called as TRL's GRPOTrainer calls one
    (huggingface/trl, trl/trainer/grpo_trainer.py, `_calculate_rewards`), with a list each for
    prompts=, completions=, completion_ids= and every other column of the rows. Where the prompt in
    the data is a text, prompt and completion are texts. Where it is a list of messages, so is the
    completion, with one message of the assistant. TRL decides that by the first prompt of a batch
    (trl/data_utils.py, `is_conversational`), and here every row decides for itself. They differ
    only for data that mixes both. A coroutine is awaited, as in TRL. log_extra and log_metric log
    nothing. There is no trainer_state: a response is worth the same in every step.

    Any other function is called as f(prompts, responses), a list of chats and one of texts.
    """
    if takes_keywords(function):
        keywords = reward_keywords(rows, samples, columns)
        parameters = inspect.signature(function).parameters
        kinds = [parameter.kind for parameter in parameters.values()]
        if inspect.Parameter.VAR_KEYWORD not in kinds:
            keywords = {name: value for name, value in keywords.items() if name in parameters}
        rewards = function(**keywords)
    else:
        prompts = [row["prompt"] for row in rows]
        rewards = function(prompts, [sample["text"] for sample in samples])
    if inspect.iscoroutine(rewards):
        rewards = asyncio.run(rewards)
    return rewards


def takes_keywords(function) -> bool:
    """Whether a reward function is called as TRL does it: it has a parameter `completions` or
    `completion_ids`, or cannot be called with two arguments, prompts and responses."""
    signature = inspect.signature(function)
    try:
        signature.bind("prompts", "responses")
    except TypeError:
        return True
    return "completions" in signature.parameters or "completion_ids" in signature.parameters


def reward_keywords(rows: list[dict], samples: list[dict], columns: list[str]) -> dict[str, list]:
    """The keywords of a reward function, as `call_reward_function` describes them."""
    prompts = []
    completions = []
    for row, sample in zip(rows, samples):
        prompt = original_row(row).get("prompt")
        if isinstance(prompt, str):
            prompts.append(prompt)
            completions.append(sample["text"])
        else:
            prompts.append(row["prompt"])
            completions.append([{"role": "assistant", "content": sample["text"]}])
    # The columns come last, so that no column takes the place of what TRL passes.
    keywords = {
        "prompts": prompts,
        "completions": completions,
        "completion_ids": [sample.get("token_ids") for sample in samples],
        "log_extra": log_nothing,
        "log_metric": log_nothing,
    }
    for name in columns:
        keywords.setdefault(name, [original_row(row).get(name) for row in rows])
    return keywords


def log_nothing(name: str, values):
    """Stands for the functions with which a reward function writes to the logs of TRL's trainer."""


def original_row(row: dict) -> dict:
    """A row as it stood in the data."""
    return row.get("record", row)


def other_columns(rows: Sequence[dict]) -> list[str]:
    """The columns that a reward function gets besides the prompts: all that any of the rows has."""
    columns = {}
    for row in rows:
        columns |= dict.fromkeys(original_row(row))
    for name in ("prompt", "completion", "completion_ids"):  # as TRL leaves them out
        columns.pop(name, None)
    return list(columns)


def check_parameters(function, columns: list[str], spec: str):
    """Ends the program if a reward function has a parameter for which there is no argument."""
    if not takes_keywords(function):
        return
    given = list(reward_keywords([], [], columns))
    for name, parameter in inspect.signature(function).parameters.items():
        is_variable = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        if not is_variable and parameter.default is parameter.empty and name not in given:
            stop(f"--reward {spec} needs {name}=, but is given {', '.join(given)}")


def check_prompts(function, rows: Sequence[dict], spec: str):
    """Ends the program if a reward function says, by a function `can_judge` that it has as an
    attribute, that it cannot judge responses to some prompt."""
    can_judge = getattr(function, "can_judge", None)
    if can_judge is None:
        return
    refused = [row for row in rows if not can_judge(row["prompt"])]
    if refused:
        text = prompt_text(refused[0]["prompt"])[:100]
        stop(
            f"--reward {spec} cannot judge {len(refused)} of {len(rows)} prompts, as "
            f"{text!r}: pass --reward none, a function of your own (file.py:function) or a reward "
            "model"
        )


def check_own_data(args, train_rows: list[dict], eval_rows: list[dict]):
    """Ends the program if data of the user's own would be evaluated on the playground's.

    Data is the playground's if its reward can read at least half of the prompts, so a copy or a
    slice of it is. A copy of the scripts without the playground has nothing to check.
    """
    try:
        can_judge = importlib.import_module("playground.world").can_judge
    except ModuleNotFoundError:
        return

    def is_playground(rows: list[dict]) -> bool:
        readable = [row for row in rows if can_judge(row["prompt"])]
        return 2 * len(readable) >= len(rows)

    if is_playground(eval_rows) and not is_playground(train_rows):
        advice = "pass --eval_data with prompts of your own"
        if hasattr(args, "reward"):
            advice += ", and --reward none, a function of your own (file.py:function) or a reward "
            advice += "model"
        stop(
            f"--eval_data {args.eval_data} is the playground's, but the training data is not: "
            f"{advice}"
        )


def load_reward_model(
    spec: str, device: torch.device, trust_remote_code: bool, *, batch_size: int, label: str
):
    """The scores of a sequence classifier, as a function of rows and samples. A score is the logit
    of a label, read at the last token of the response, whatever the padding token of the model is.
    """
    lm = LM(spec, device, trust_remote_code=trust_remote_code, is_reward_model=True)
    index = label_index(lm.model.config.id2label, label, spec)
    check_score(lm)
    lm.model.score.float()
    print_fact("reward model", describe(lm))

    @torch.no_grad()
    def score(rows: list[dict], samples: list[dict]) -> list[float]:
        scores = []
        for start in range(0, len(rows), batch_size):
            stop_at = start + batch_size
            examples = []
            for row, sample in zip(rows[start:stop_at], samples[start:stop_at]):
                examples.append(Example(row, *lm.encode(row["prompt"], [sample["text"]])))
            batch = pack(examples, lm)
            hidden = lm.hidden_states(batch)[batch.last_index]  # [R, H]
            scores += lm.model.score(hidden.float())[:, index].tolist()
        return scores

    return score


def label_index(names: dict[int, str], label: str, spec: str) -> int:
    """Which of the labels of a classifier is the reward: the only one, or the one that
    --reward_label names, by its name or by its index."""
    if not label and len(names) == 1:
        return 0
    for index, name in names.items():
        if label and label in (name, str(index)):
            return index
    listed = ", ".join(f"{index} ({name})" for index, name in names.items())
    if label:
        stop(f"--reward_label {label} is no label of {spec}, which has {listed}")
    stop(f"--reward {spec} has several labels: choose one with --reward_label: {listed}")


@torch.no_grad()
def check_score(lm: LM):
    """Compares the logits of a classifier, read as `load_reward_model` reads them, with its own."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(lm.vocab_size, (16,), generator=generator).tolist()
    ids = [token for token in ids if token != lm.config.pad_token_id]
    expected = lm.model(torch.tensor([ids], device=lm.device)).logits[0].float()
    batch = pack([Example(row={}, prompt_ids=ids[:6], response_ids=[ids[6:]])], lm)
    hidden = lm.hidden_states(batch)[batch.last_index]
    error = (lm.model.score(hidden)[0].float() - expected).norm() / (1 + expected.norm())
    tolerance = 1e-4 if lm.model.dtype == torch.float32 else 3e-2
    if not error < tolerance:  # NaN counts as an error
        stop(f"{lm.path}: its score is not that of a linear head at the last token ({error:.1e})")


# ------------------------------------------------------------------------------------- part 4: runs
# What torch, pickle and load_state_dict raise for a file that is cut, spoilt or of another model.
SPOILT_FILE = (OSError, RuntimeError, ValueError, KeyError, EOFError, pickle.UnpicklingError)
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
MAX_SEED = 2**63 - 1  # torch takes twice as many, and steps are added to it
AT_LEAST_1 = ["max_prompt_tokens", "max_response_tokens", "num_epochs", "batch_size"]
AT_LEAST_1 += ["micro_batch_size", "logits_chunk", "log_every", "eval_every", "save_every"]
AT_LEAST_1 += ["sample_batch_size"]
AT_LEAST_0 = ["seed", "max_steps", "learning_rate", "warmup_ratio", "weight_decay"]
AT_LEAST_0 += ["max_grad_norm"]


def parse_flags(Args: type, description: str, words: list[str] | None = None):
    """An object of the class Args, from the words of the command line.

    `--help` shows the description, and the flags in a group for each class that Args inherits, or
    in one group. A flag may be spelled with underscores or with hyphens. A mistake ends the program
    with code 2.
    """
    print_any_character()
    words = sys.argv[1:] if words is None else words
    if "-h" in words or "--help" in words:
        # tyro would join the lines of its formulas and commands.
        print(wrap(description) + "\n")
    groups = []
    classes = list(reversed(Args.__bases__))
    if classes == [object]:
        classes = [Args]
    for group in classes:
        title = ""  # of a program with few flags
        if group is not Args:
            title = " ".join(re.findall("[A-Z][a-z]*", group.__name__)).lower()
        kind = Annotated[with_help(group), tyro.conf.arg(name=title)]
        groups.append((group.__name__, kind))
    module_spec = sys.modules["__main__"].__spec__  # None but for `python -m studies.rloo`
    program = f"python -m {module_spec.name}" if module_spec else None
    try:
        grouped = tyro.cli(
            tyro.conf.OmitArgPrefixes[make_dataclass("Flags", groups)],
            args=words,
            prog=program,
            description="",
            use_underscores=True,
        )
    except KeyboardInterrupt:
        end_interrupted("nothing was written yet")
    values = {}
    for group in vars(grouped).values():
        values |= vars(group)
    return Args(**values)


def with_help(group: type) -> type:
    """A dataclass of flags as tyro takes it, with the text below each flag as its help. tyro would
    keep the line breaks of that text, and show an empty default as (default: '')."""
    helps = {}
    for param in docstring_parser.parse_from_object(group).params:
        helps[param.arg_name] = " ".join(param.description.split())
    flags = []
    for flag in fields(group):
        hint = "" if flag.default == "" else None
        about = tyro.conf.arg(help=helps[flag.name], help_behavior_hint=hint)
        default = field(default=flag.default, default_factory=flag.default_factory)
        flags.append((flag.name, Annotated[flag.type, about], default))
    return make_dataclass(group.__name__, flags)


def wrap(text: str) -> str:
    """A text with its paragraphs as wide as the terminal. Indented parts stay as they are."""
    width = min(shutil.get_terminal_size().columns, 100)
    parts = []
    for part in text.strip().split("\n\n"):
        is_indented = any(line.startswith(" ") for line in part.splitlines())
        parts.append(part if is_indented else textwrap.fill(part, width))
    return "\n\n".join(parts)


def print_any_character():
    """A terminal or a log file that cannot show a character shows its number, as \\u03b3."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


@contextmanager
def exit_in_one_line(args):
    """Ctrl-C and a full disk end the program with one line that says how to go on. Every other
    error keeps its traceback. A run that ends before its first stage leaves no folder behind."""
    try:
        yield
    except KeyboardInterrupt:
        end_interrupted(how_to_go_on(args))
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise
        stop(f"{error}; {how_to_go_on(args)}")
    finally:
        if args.output_dir or args.resume:
            leave_folder(Path(args.resume or args.output_dir), is_new=not args.resume)


def end_interrupted(advice: str):
    """Ends the program after Ctrl-C in one line, with the exit code of shells for it."""
    tqdm.write(f"interrupted; {advice}", file=sys.stderr)
    raise SystemExit(130) from None


def how_to_go_on(args) -> str:
    folder = Path(args.resume or args.output_dir or "nowhere")
    if args.resume or has_results(folder):
        return f"finished stages and checkpoints are kept: go on with --resume {folder}"
    return "nothing was written yet"


def check_flags(args, at_least_0: list[str]):
    """Ends the program if a number makes no sense, or if what --track needs cannot be imported.

    `at_least_0` names the flags of the method that must be numbers of at least 0. The numbers that
    scripts share are checked as well.
    """
    minimum = dict.fromkeys(AT_LEAST_0 + at_least_0, 0) | dict.fromkeys(AT_LEAST_1, 1)
    if hasattr(args, "eval_prompts"):  # the evaluations of rm_distiller.py sample no responses
        minimum |= {"eval_prompts": 1, "eval_temperature": 0}
    for name, least in minimum.items():
        value = getattr(args, name)
        if not least <= value < math.inf:  # NaN is refused as well
            stop(f"--{name} {value} must be a number of at least {least}")
    if args.seed > MAX_SEED:
        stop(f"--seed {args.seed} must be a number between 0 and {MAX_SEED}")
    modules = {"none": [], "tensorboard": ["torch.utils.tensorboard"]}
    modules["wandb"] = ["wandb", *modules["tensorboard"]]
    for module in modules[args.track]:
        try:
            importlib.import_module(module)
        except ImportError as error:  # the package is not there, or lacks another one
            package = module.removeprefix("torch.utils.")
            stop(f"--track {args.track} needs a package: pip install {package} ({error})")


# What is in a run's folder before its first stage has a result, also with .partial behind it.
LOCK = "run.lock"
WRITTEN_FIRST = {LOCK, "args.json", "inputs.json"}
LOCKS = {}  # of the run folders that this process has


def open_run(args, script: str):
    """(args, folder) of a new run, or of the run that --resume names, with the flags it began with.

    `script` is the file of the script, after which a run is named. The folder is made at once, and
    no other process gets it while this one runs. A run that is finished stays as it is, and the
    program ends.
    """
    if not args.resume:
        CLOCK["began"] = datetime.now()
        if args.output_dir:
            new_folder(Path(args.output_dir))
        else:
            args.output_dir = str(new_named_folder(f"{Path(script).stem}__{args.seed}"))
        return args, Path(args.output_dir)

    folder = Path(args.resume)
    if args != type(args)(resume=args.resume):
        stop(f"--resume {folder} takes the flags that the run began with, and no other flag")
    try:
        saved_args = type(args)(**json.loads((folder / "args.json").read_text()))
    except (OSError, ValueError, TypeError) as error:
        stop(f"cannot resume {folder}: {error}")
    if (folder / "summary.json").exists():
        print(f"{folder} is finished, nothing is changed; its results are in summary.json")
        raise SystemExit(0)
    take_folder(folder)
    inputs = read_inputs(folder)
    if inputs:
        CLOCK["began"] = datetime.fromisoformat(inputs["began"])
    return saved_args, folder


def new_named_folder(name: str) -> Path:
    """Makes and takes runs/<name>__<time>, or runs/<name>__<time>_2, ... where another run that
    began in the same second has that."""
    first = f"runs/{name}__{int(time.time())}"
    for number in itertools.count(1):
        suffix = f"_{number}" if number > 1 else ""
        folder = Path(first + suffix)
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            stop(f"cannot write to {folder}: {error}")
        take_folder(folder)
        return folder


def new_folder(folder: Path):
    """Makes and takes a folder of a given name. It may exist if it is empty, or if a run that was
    killed before its first stage left it."""
    if folder.is_file():
        stop(f"--output_dir {folder}: Not a directory")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        is_free = not any(folder.iterdir())
    except OSError as error:
        stop(f"cannot write to {folder}: {error}")
    if not is_free:
        is_free = (folder / LOCK).exists() and not has_results(folder)
    if not is_free:
        stop(f"{folder} is not empty; --resume it, remove it, or take another --output_dir")
    take_folder(folder)
    for path in folder.iterdir():
        if path.name != LOCK:
            path.unlink()  # what the killed run wrote of its flags


def take_folder(folder: Path):
    """Locks a folder until this process ends, in whatever way. Ends the program if another process
    has it. (The package filelock comes with torch.)"""
    if folder in LOCKS:
        return
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        stop(f"another run is using {folder}, which is still going on")
    except OSError as error:
        stop(f"cannot write to {folder}: {error}")
    LOCKS[folder] = lock


def leave_folder(folder: Path, is_new: bool):
    """Unlocks a folder if this process has it. A new one without results is removed."""
    lock = LOCKS.pop(folder, None)
    if lock is None:
        return
    is_unused = is_new and not has_results(folder)
    (folder / LOCK).unlink(missing_ok=True)
    lock.release()
    if is_unused:
        shutil.rmtree(folder, ignore_errors=True)


def has_results(folder: Path) -> bool:
    """Whether there is more in a run's folder than what is written before the first stage, and
    files that a stage has only opened."""
    if not folder.exists():
        return False
    for path in folder.iterdir():
        is_empty = path.suffix == ".jsonl" and path.stat().st_size == 0
        if path.name.removesuffix(".partial") not in WRITTEN_FIRST and not is_empty:
            return True
    return False


def begin_run(run_dir: Path, args, models: list[LM | None], **examples: list[Example]):
    """Writes inputs.json, which says what a run is made from, and args.json, which --resume reads.

    A run that is resumed must be made from the same models and rows as at first. Else the program
    ends and names the first that differs. `examples` are encoded rows, under the flag that names
    their file, as in data=pairs.
    """
    inputs = {"began": CLOCK["began"].isoformat(), "models": {}, "rows": {}}
    longest_prompt = 0
    for flag, rows in examples.items():
        inputs["rows"][flag] = [row_digests(example) for example in rows]
        for example in rows:
            longest_prompt = max(longest_prompt, len(example.prompt_ids))
    for lm in models:
        if lm is not None:
            check_lengths(lm, longest_prompt, args)
            inputs["models"][lm.path] = model_digests(lm)

    began_with = read_inputs(run_dir)
    if not began_with:
        write_json(run_dir / "inputs.json", inputs)
        write_json(run_dir / "args.json", asdict(args))
        return
    problem = f"cannot resume {run_dir}"
    for path, digests in began_with["models"].items():
        for part, digest in digests.items():
            if inputs["models"].get(path, {}).get(part) != digest:
                stop(f"{problem}: the {part} of {path} is not what it was when the run began")
    for flag, rows in examples.items():
        before = began_with["rows"].get(flag, [])
        place = f"--{flag} {getattr(args, flag)}"
        check_rows(f"{problem}: {place}", before, inputs["rows"][flag], rows, models[0].tokenizer)


def check_lengths(lm: LM, longest_prompt: int, args):
    """Ends the program if a model has too few positions for the longest prompt and a response of
    --max_response_tokens. Where positions are computed, it prints a note."""
    length = longest_prompt + args.max_response_tokens
    lm.check_limits(0, length)
    trained = getattr(lm.config, "max_position_embeddings", None) or math.inf
    if length > trained:
        print(f"note: {lm.path} was made for {trained} positions; rows may have up to {length}")


def read_inputs(run_dir: Path) -> dict:
    """What `begin_run` wrote when a run began, or {} if it has not begun."""
    path = run_dir / "inputs.json"
    try:
        return json.loads(path.read_text()) if path.exists() else {}
    except (OSError, ValueError) as error:
        stop(f"cannot resume {run_dir}: {path}: {error}")


def write_json(path: Path, content):
    """Writes a file wholly or not at all."""
    partial_path = path.with_name(f"{path.name}.partial")
    partial_path.write_text(json.dumps(content, indent=1))
    partial_path.replace(path)


@torch.no_grad()
def model_digests(lm: LM) -> dict[str, str]:
    """Short digests of a model and of its tokenizer, by which another one is noticed."""
    weights = hashlib.sha256()
    for name, weight in lm.model.base_model.named_parameters():
        # A thousand numbers of every tensor are enough. Rounded to bfloat16, a weight is the same
        # on every device.
        step = max(1, weight.numel() // 1000)
        sample = weight.flatten()[::step].bfloat16().float()
        weights.update(name.encode() + sample.cpu().numpy().tobytes())
    vocabulary = sorted(lm.tokenizer.get_vocab().items())
    template = str(lm.tokenizer.chat_template)
    return {"model": weights.hexdigest()[:16], "tokenizer": short_digest([vocabulary, template])}


def row_digests(example: Example) -> str:
    """The id of a row, which has a digest of its texts, and digests of its tokens and columns."""
    tokens = short_digest([example.prompt_ids, example.response_ids])
    return f"{example.row['id']} {tokens} {short_digest(example.row)}"


def short_digest(value) -> str:
    """Eight letters that are others for another value. Of what JSON cannot write, such as an image,
    only the type counts."""
    text = json.dumps(value, sort_keys=True, default=type_name)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def type_name(value) -> str:
    return type(value).__name__


def check_rows(problem: str, before: list[str], now: list[str], examples: list[Example], tokenizer):
    """Ends the program at the first row whose digests are not what they were."""
    for index, (old, new) in enumerate(itertools.zip_longest(before, now)):
        if old == new:
            continue
        if new is None:
            stop(f"{problem} has lost rows: {len(before)} were used, now {len(now)}")
        if old is None:
            stop(f"{problem} has got rows: {len(before)} were used, now {len(now)}")
        example = examples[index]
        texts = []
        for ids in (example.prompt_ids, *example.response_ids):
            texts.append(repr(tokenizer.decode(ids)[:150]))
        parts = zip(["another text", "other tokens", "other columns"], old.split(), new.split())
        difference = next(name for name, old_part, new_part in parts if old_part != new_part)
        row = f"row {row_number(example.row)} has {difference} than when the run began"
        stop(f"{problem}, {row}; now: {' '.join(texts)}")


def row_numbers(examples: list[Example]) -> str:
    """Where rows stand in their file, from 1 on: "3, 17"."""
    return ", ".join(row_number(example.row) for example in examples)


def row_number(row: dict) -> str:
    number, _, _ = row["id"].partition("-")
    return number


def choose_device(name: str) -> torch.device:
    """The device that --device names, or a GPU where there is one. It is tried out at once."""
    default = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name or default).device
    except (RuntimeError, AssertionError) as error:
        stop(f"cannot use --device {name}: {error}")


class Bar:
    """How far long work is, on standard error: a bar on a terminal, and in a log file a line
    every twentieth of the work, but not more often than every ten seconds. Example:

        with Bar("encoding", total=len(rows), unit="rows") as bar:
            for row in rows:
                ...
                bar.advance(1)

    Work that is over in less than `delay` seconds shows nothing.
    """

    def __init__(self, name: str, total: int, unit: str, done: int = 0, delay: float = 0.0):
        self.name = name
        self.total = total
        self.unit = unit
        self.first = done
        self.done = done
        self.delay = delay
        self.values = {}
        self.started = time.time()
        self.line_done = done  # when the last line was printed
        self.line_time = self.started
        self.terminal_bar = None
        if sys.stderr.isatty():
            # A terminal of 0 columns or lines, as containers have it, counts as one of usual size.
            size = shutil.get_terminal_size()
            self.terminal_bar = tqdm(
                desc=name,
                total=total,
                initial=done,
                unit=unit,
                delay=delay,
                ncols=min(size.columns, 100),
                nrows=size.lines,
                bar_format="{desc}: {percentage:3.0f}%|{bar}| {n_fmt} of {total_fmt} {unit} "
                "[{elapsed}<{remaining}{postfix}]",
            )

    def advance(self, count: int, **values: float | None):
        """`count` more are done. Values such as loss=0.5 are shown beside that. One that is None
        stays what it was."""
        self.done += count
        for name, value in values.items():
            if value is not None:
                self.values[name] = f"{name} {value:.3g}"
        if self.terminal_bar is not None:
            self.terminal_bar.set_postfix_str(", ".join(self.values.values()), refresh=False)
            self.terminal_bar.update(count)
            return
        seconds = time.time() - self.line_time
        is_due = self.done - self.line_done >= self.total / 20 and seconds >= 10
        is_last = self.done == self.total and count > 0
        if is_due or is_last:
            self.print_line()

    def print_line(self):
        took = time.time() - self.started
        if took < self.delay:
            return
        parts = [f"{self.name}: {self.done} of {self.total} {self.unit}", *self.values.values()]
        parts.append(f"{duration(took)} so far" if self.done < self.total else duration(took))
        if self.first < self.done < self.total:
            left = took / (self.done - self.first) * (self.total - self.done)
            parts.append(f"{duration(left)} to go")
        print(", ".join(parts), file=sys.stderr, flush=True)
        self.line_done = self.done
        self.line_time = time.time()

    def close(self):
        if self.terminal_bar is not None:
            self.terminal_bar.close()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()


def duration(seconds: float) -> str:
    """Example: 100 is "1 min 40 s"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    if minutes:
        return f"{minutes} min {seconds} s"
    return f"{seconds} s"


def cached_map(path: Path, rows: list[dict], function, batch_size: int, seed: int | None = None):
    """function(some rows) for all rows: one dict per row, in order, kept in the JSONL at `path`.

    A run that was killed finds what was made before and goes on. Rows are matched by id and prompt,
    so a file of another program serves as well. A file that was made from other rows is refused.
    With a seed it calls function(some rows, seed + the index of the first of them), so that every
    batch has a seed of its own, which does not depend on interruptions. How long a stage took, in
    all processes of the run together, stands in timings.json beside it. Example, with a function
    respond(rows, seed) that returns [{"text": ...}, ...]:

        answers = cached_map(run_dir / "answers.jsonl", rows, respond, 256, args.seed)
    """
    done = {}
    complete = b""
    if path.exists():
        complete = path.read_bytes()
        complete = complete[: complete.rfind(b"\n") + 1]  # without a line that a kill cut
    prompts = {row["id"]: row["prompt"] for row in rows}
    try:
        for number, line in enumerate(complete.splitlines(), 1):
            place = f"{path}, line {number}"
            row = json.loads(line)
            if prompts.get(row["id"]) != row["prompt"]:
                raise ValueError("it was made from other data")
            done[row["id"]] = row
    except (ValueError, KeyError, TypeError) as error:
        stop(f"cannot go on with {place}: {error}; remove the file to make it again")

    if len(done) == len(rows):
        return [done[row["id"]] for row in rows]

    with Bar(path.stem, len(rows), "prompts") as bar, path.open("ab") as file:
        file.truncate(len(complete))
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            if not all(row["id"] in done for row in batch):
                batch_started = time.time()
                with error_note(f"making rows {start} to {start + len(batch) - 1} of {path}"):
                    results = function(batch) if seed is None else function(batch, seed + start)
                for row, result in zip(batch, results, strict=True):
                    if row["id"] not in done:
                        done[row["id"]] = {"id": row["id"], "prompt": row["prompt"], **result}
                        file.write(json.dumps(done[row["id"]]).encode() + b"\n")
                file.flush()
                add_seconds(path.parent, path.stem, time.time() - batch_started)
            bar.advance(len(batch))
    return [done[row["id"]] for row in rows]


def read_timings(run_dir: Path) -> dict[str, float]:
    """The seconds that each stage took so far, from timings.json."""
    path = run_dir / "timings.json"
    return json.loads(path.read_text()) if path.exists() else {}


def add_seconds(run_dir: Path, stage: str, seconds: float):
    """Adds to what a stage took so far. A run that is resumed goes on counting."""
    timings = read_timings(run_dir)
    timings[stage] = timings.get(stage, 0.0) + seconds
    write_json(run_dir / "timings.json", timings)


class Metrics:
    """metrics.jsonl of a run, one line per logged step, and the same for TensorBoard or wandb."""

    def __init__(self, run_dir: Path, args, first_step: int):
        self.path = run_dir / "metrics.jsonl"
        self.writer = None
        # A resumed run repeats the steps after its checkpoint, so their lines are removed.
        kept = ""
        if first_step:
            for line in self.path.read_text().splitlines(keepends=True):
                if line.endswith("\n") and json.loads(line)["step"] <= first_step:
                    kept += line
        self.path.write_text(kept)
        if args.track == "wandb":
            import wandb

            wandb.init(
                project="prefdistill", name=run_dir.name, config=asdict(args), sync_tensorboard=True
            )
        if args.track != "none":
            from torch.utils.tensorboard import SummaryWriter

            # What a killed run logged after its checkpoint is hidden.
            self.writer = SummaryWriter(str(run_dir), purge_step=first_step + 1)
            lines = [f"    --{name} {value}" for name, value in asdict(args).items()]
            self.writer.add_text("flags", "\n".join(lines), first_step)

    def log_samples(self, step: int, rows: list[dict], count: int = 4):
        """Shows the first responses in TensorBoard or wandb. A row has a prompt, a text and perhaps
        a reward."""
        if self.writer is None:
            return
        lines = []
        for row in rows[:count]:
            lines.append(f"    {one_line(prompt_text(row['prompt']))}")
            lines.append(f"    {short_reward(row):>8}   {one_line(row['text'])}")
        # Lines that are indented by four columns are shown as they are.
        self.writer.add_text("responses", "\n".join(lines), step)
        self.writer.flush()

    def log(self, step: int, values: dict[str, float]):
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        if self.writer:
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)
            self.writer.flush()


def save_checkpoint(path: Path, step: int, counts: dict, **parts):
    """Writes the step, the counts of the run so far (tokens, seconds) and the state_dict of every
    part (model, optimizer, scheduler): wholly or not at all."""
    states = {name: part.state_dict() for name, part in parts.items()}
    partial_path = path.with_suffix(".pt.partial")
    try:
        torch.save({"step": step, "counts": counts, **states}, partial_path)
    except (OSError, RuntimeError) as error:  # what torch raises when the disk is full
        stop(f"cannot write {partial_path}: {error}; the checkpoint before it is kept")
    partial_path.replace(path)


def load_checkpoint(path: Path, counts: dict, **parts) -> int:
    """Restores what `save_checkpoint` wrote and returns its step, or 0 if there is none yet."""
    if not path.exists():
        return 0
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(state[name])
    except SPOILT_FILE as error:
        stop(f"cannot read {path}: {error}; remove it to train from the start")
    counts.update(state["counts"])
    return state["step"]


def step_examples(examples: list, step: int, batch_size: int, seed: int) -> list:
    """The examples of an optimiser step. Every epoch has an order of its own, which depends on
    nothing but the seed, so a resumed run sees what it would have seen."""
    steps_per_epoch = math.ceil(len(examples) / batch_size)
    epoch, step_of_epoch = divmod(step, steps_per_epoch)
    generator = torch.Generator().manual_seed(seed + epoch)
    order = torch.randperm(len(examples), generator=generator).tolist()
    start = step_of_epoch * batch_size
    return [examples[i] for i in order[start : start + batch_size]]


def reward_metrics(evaluated: list[dict]) -> dict[str, float]:
    """{"eval/reward": the mean reward} of an evaluation, or {} if --reward is none."""
    if "reward" not in evaluated[0]:
        return {}
    return {"eval/reward": mean_reward(evaluated)}


def mean_reward(evaluated: list[dict]) -> float:
    """The mean over the responses that have a reward. Some have None in its place, where a function
    says that it does not apply. The program ends if all have."""
    rewards = [response["reward"] for response in evaluated if response["reward"] is not None]
    if not rewards:
        stop(f"--reward returned None for all of {len(evaluated)} responses, so they have no mean")
    return statistics.mean(rewards)


def standard_error(values: list[float]) -> float:
    return statistics.pstdev(values) / len(values) ** 0.5


def compare_rewards(before: list[dict], after: list[dict], teacher: list[dict]) -> dict:
    """The mean rewards of three evaluations, and how often the trained student beats itself before
    training, the mean of `find_wins`. With --reward none there is nothing to compare.
    """
    if "reward" not in before[0]:
        return {}
    results = {
        "reward_before": mean_reward(before),
        "reward_after": mean_reward(after),
        "reward_teacher": mean_reward(teacher),
    }
    wins = find_wins(before, after)
    if wins:
        results["win_rate"] = statistics.mean(wins)
        results["win_rate_stderr"] = standard_error(wins)
    return results


def find_wins(before: list[dict], now: list[dict]) -> list[float]:
    """1 for a prompt whose response has a higher reward than before, ½ for an equal one, 0 for a
    lower one. Prompts of which one response has no reward are left out."""
    wins = []
    for old, new in zip(before, now, strict=True):
        if old["reward"] is None or new["reward"] is None:
            continue
        if new["reward"] == old["reward"]:
            wins.append(0.5)
        else:
            wins.append(float(new["reward"] > old["reward"]))
    return wins


def save_model(lm: LM, folder: Path):
    """Writes model and tokenizer as an ordinary Hugging Face folder, in the dtype that the model's
    checkpoint had. The weights in memory are rounded to it, so this comes after all else."""
    for parameter in lm.model.parameters():
        parameter.data = parameter.data.to(lm.checkpoint_dtype)
    try:
        lm.model.save_pretrained(folder)
        lm.tokenizer.save_pretrained(folder)
    except SafetensorError as error:  # what safetensors raises when the disk is full
        stop(f"cannot write {folder}: {error}")
    # safetensors lets nobody but the owner read its files.
    mode = (folder / "config.json").stat().st_mode
    for path in folder.glob("*.safetensors"):
        path.chmod(mode)


def save_summary(run_dir: Path, results: dict, counts: dict, args):
    """Writes summary.json, the sign of a finished run: script, results, seconds by stage, speed,
    seed, device, versions. "seconds" is of the last process. The stages count all processes."""
    summary = {"script": Path(sys.argv[0]).stem, **results}
    summary["stage_seconds"] = {**read_timings(run_dir), "training": counts["seconds"]}
    summary["tokens_per_second"] = counts["tokens"] / max(counts["seconds"], 1e-9)
    if torch.cuda.is_available():
        summary["peak_memory_bytes"] = torch.cuda.max_memory_allocated()
    summary["seed"] = args.seed
    summary["device"] = str(choose_device(args.device))
    for package in ("torch", "transformers", "datasets", "tyro"):
        summary[package] = importlib.metadata.version(package)
    write_json(run_dir / "summary.json", summary)


def print_fact(name: str, text):
    print(f"{name:<17} {text}", flush=True)


def print_start(run_dir: Path, device: torch.device, *, data: str, eval_data: str):
    """What is known of a run before its models are loaded, which may take minutes."""
    name = device.type
    if device.type == "cuda":
        name = f"{device} ({torch.cuda.get_device_name(device)})"
    print_fact("run folder", run_dir)
    print_fact("if interrupted", f"go on with --resume {run_dir}")
    print_fact("device", name)
    print_fact("training data", data)
    print_fact("held-out data", eval_data)


def print_models(**models: LM | None):
    """A line for every model, after its flag, such as student=lm."""
    for name, lm in models.items():
        if lm is not None:
            print_fact(name, describe(lm))


def describe(lm: LM) -> str:
    """Example: "playground/student: 28,416 parameters, float32, trained"."""
    count = sum(parameter.numel() for parameter in lm.model.parameters())
    dtype = str(lm.model.dtype).removeprefix("torch.")
    if lm.autocast_enabled and dtype == "float32":
        dtype = "float32, computing in bfloat16"
    return f"{lm.path}: {count:,} parameters, {dtype}, {'trained' if lm.trainable else 'frozen'}"


def print_plan(args, examples: list, held_out: int):
    """The steps of a run and its evaluations, before the first stage. A stage may drop examples."""
    if args.max_steps:
        epochs = args.max_steps * args.batch_size / len(examples)
        plan = f"{args.max_steps} steps of {args.batch_size}, about {epochs:.2g} epochs"
    else:
        steps = args.num_epochs * math.ceil(len(examples) / args.batch_size)
        plan = f"at most {steps} steps of {args.batch_size}, {args.num_epochs} epochs"
    print_fact("training", f"{plan} over {len(examples)} examples")
    moments = f"before, every {args.eval_every} steps, and after"
    print_fact("evaluation", f"{held_out} held-out rows, {moments}")


def one_line(text: str, limit: int = 300) -> str:
    """A text without line breaks, and cut where it is longer than the limit."""
    text = " ".join(text.split())
    return text if len(text) <= limit else text[:limit] + " …"


def short_reward(row: dict) -> str:
    """The reward of a response with two digits, or "" if it has none."""
    reward = row.get("reward")
    return "" if reward is None else f"{reward:.2f}"


def print_samples(evaluations: dict[str, list[dict]], count: int = 4):
    """Responses to the first different held-out prompts, from {"before": rows, "now": rows}."""
    header = "responses to held-out prompts"
    if "reward" in evaluations["before"][0]:
        header += ", each behind its reward"
    print(f"\n{header}")
    shown = []
    for rows in zip(*evaluations.values()):
        prompt = one_line(prompt_text(rows[0]["prompt"]))
        if prompt in shown or len(shown) == count:
            continue
        shown.append(prompt)
        print(f"\n  {prompt}")
        for name, row in zip(evaluations, rows):
            print(f"    {name:<8}{short_reward(row):>6}   {one_line(row['text'])}")


def print_rewards(evaluations: dict[str, list[dict]], best_possible: float | None):
    """The mean rewards of all evaluations in a table, and how often "now" is better than "before".
    With --reward none there is nothing to show."""
    before = evaluations["before"]
    if "reward" not in before[0]:
        return
    prompts = {prompt_text(row["prompt"]) for row in before}
    responses = f"{len(before)} responses to {len(prompts)} different prompts"
    rows = itertools.chain.from_iterable(evaluations.values())
    if any(row["reward"] is None for row in rows):
        responses = f"those that have one, of {responses}"
    print()
    print_fact("", f"  reward   mean over {responses}")
    for name, rows in evaluations.items():
        line = f"{mean_reward(rows):8.3f}"
        wins = find_wins(before, rows) if name == "now" else []
        if wins:
            better = f"{wins.count(1.0) / len(wins):.0%} of prompts"
            line += f"   better than before on {better}, worse on {wins.count(0.0) / len(wins):.0%}"
        print_fact(name, line)
    if best_possible is not None:
        print_fact("best possible", f"{best_possible:8.3f}")


def print_end(run_dir: Path, args, seconds: float, *, is_reward_model: bool = False):
    """How long a run took, where it is, and commands that use it."""
    summary = json.loads((run_dir / "summary.json").read_text())
    all_stages = sum(summary["stage_seconds"].values())
    took = duration(seconds)
    if all_stages > seconds:
        took += f" since --resume; stages took {duration(all_stages)} in all"
    print()
    print_fact("time", took)
    print_fact("run folder", run_dir)
    print_fact("model", run_dir / "model")
    # Modules of this project are found in its folder alone.
    root = Path(__file__).parent.resolve()
    enter = ""
    if Path.cwd().resolve() != root:
        enter = f"cd {shlex.quote(str(root))} && "
        run_dir = run_dir.resolve()
    if is_reward_model:
        use = ["python", "adpa.py", "--reward", str(run_dir / "model")]
        print_fact("use as a reward", enter + shlex.join(use))
    else:
        print_fact("chat", enter + shlex.join(["python", "-m", "playground.chat", str(run_dir)]))
    # Beside the newest other run that is finished.
    runs = [run_dir]
    finished = [path for path in run_dir.parent.glob("*/summary.json") if path.parent != run_dir]
    if finished:
        runs.append(max(finished, key=lambda path: path.stat().st_mtime).parent)
    compare = ["python", "-m", "studies.table", *map(str, runs)]
    print_fact("compare", enter + shlex.join(compare))
    if args.track == "tensorboard":
        logs = run_dir.parent if run_dir.parent.name == "runs" else run_dir
        print_fact("curves", shlex.join(["tensorboard", "--logdir", str(logs)]))
