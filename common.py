"""The three verbs of a language model that all five methods share: load it, sample from it, score responses with it.

What belongs to a method stands in its script. Letters in shapes:
    B  examples of a micro-batch    n  responses of an example    R = B·n  responses of a micro-batch
    N  response tokens of a micro-batch, end-of-turn included    T  tokens of a row    V  vocabulary    H  hidden size

Layout (`pack`): an example is ONE row, the prompt followed by all its responses. A response attends to the prompt and
to itself, never to its siblings, and its positions go on from the prompt's, so it sees what it would see alone. Only
hidden states that predict a response token meet the LM head; losses are functions of flat [N, V] and [N] tensors.
"""

import hashlib
import json
import math
import sys
from collections import Counter, namedtuple
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from pydoc import locate
from types import SimpleNamespace

import torch
import transformers
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def stop(message: str):
    """Ends the program as a command-line tool should: one line that says what is wrong and what to do, exit code 2."""
    tqdm.write(
        "error: " + " ".join(message.split())[:600], file=sys.stderr
    )  # on a line of its own, below the bars
    raise SystemExit(2)


@contextmanager
def clearly(task: str):
    """What goes wrong inside ends the program with one line: libraries raise many kinds of errors for one problem."""
    try:
        yield
    except Exception as error:
        stop(f"cannot {task}: {error}")


class LM:
    """A hub id or local folder (safetensors only) as a model to sample from and to score with. One that trains has
    float32 weights (bf16 autocast on a GPU), a frozen one is bf16 on a GPU and float32 on a CPU; dropout is off."""

    def __init__(
        self, path, device, trains=False, checkpointing=False, remote_code=False, reward=False
    ):
        self.path, self.device, self.trains, code = (
            str(path),
            device,
            trains,
            {"trust_remote_code": remote_code},
        )
        dtype = torch.bfloat16 if device.type == "cuda" and not trains else torch.float32
        with clearly(f"load a model with tokenizer from {path}"):
            self.tokenizer = tokenizer = transformers.AutoTokenizer.from_pretrained(path, **code)
            config = transformers.AutoConfig.from_pretrained(path, **code)
            self.config = config.get_text_config()
            vars(self.config).update(
                {name: 0.0 for name in vars(self.config) if "dropout" in name or "pdrop" in name}
            )
            auto = (
                transformers.AutoModelForSequenceClassification
                if reward
                else transformers.AutoModelForCausalLM
            )
            code |= {
                "config": config,
                "dtype": dtype,
                "use_safetensors": True,
                "output_loading_info": True,
            }
            self.model, info = auto.from_pretrained(path, **code)
            assert not info["missing_keys"], f"it lacks weights: {sorted(info['missing_keys'])}"
        self.model.to(device).requires_grad_(trains).train(
            checkpointing
        )  # which works in train mode only
        if checkpointing:
            getattr(
                self.model,
                "activation_checkpointing_enable",
                self.model.gradient_checkpointing_enable,
            )()
        self.model.get_input_embeddings().padding_idx = (
            None  # would get no gradient, and may be an end-of-turn as well
        )
        self.vocab_size = min(
            len(tokenizer), self.model.get_input_embeddings().weight.shape[0]
        )  # no head's padding
        self.window = (
            getattr(self.config, "sliding_window", None) or math.inf
        )  # beyond it our mask is not the model's
        self.marks = {
            token[0] for token in tokenizer.added_tokens_encoder
        }  # what a control token can begin with
        self.bos = (
            [tokenizer.bos_token_id]
            if tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
            else []
        )
        # what ends an answer: the special token that the template puts behind one, and the tokens that the configs name
        ends = self.model.generation_config.eos_token_id if self.model.can_generate() else None
        ends = [tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])]
        if tokenizer.chat_template:
            chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}]
            behind = self.template(chat)[len(self.template(chat[:1], ask=True)) :]
            ends = [
                *[
                    t
                    for t in behind
                    if getattr(tokenizer.added_tokens_decoder.get(t), "special", False)
                ][:1],
                *ends,
            ]
        self.end_ids = [token for token in dict.fromkeys(ends) if token is not None] or stop(
            f"{path} names no EOS"
        )
        self.share_prefix, self.autocast = True, nullcontext
        reward or self.check_layout()
        self.autocast = partial(
            torch.autocast, device.type, torch.bfloat16, enabled=device.type == "cuda"
        )

    @torch.no_grad()
    def check_layout(self):
        """Compares packed logits with the model's own `forward` on random tokens. Where siblings disturb each other (an
        architecture without our mask) responses get rows of their own; where the head does not match it is the end."""
        ids = torch.randint(
            self.vocab_size, (16,), generator=torch.Generator().manual_seed(0)
        ).tolist()
        prompt, responses, error = ids[:6], [ids[6:11], ids[11:]], math.inf
        own = [
            self.model(torch.tensor([prompt + r]).to(self.device)).logits[0, 5:-1]
            for r in responses
        ]
        own = torch.cat(own)[:, : self.vocab_size].float()
        for self.share_prefix in (True, False):
            with suppress(Exception):  # an architecture that refuses a 4-D mask
                batch = pack([Example({}, prompt, responses)], self)
                ours = self.logits(self.hidden_states(batch)[batch.source], self.vocab_size)
                error = (ours - own).norm() / own.norm()
            if error < (1e-4 if self.model.dtype == torch.float32 else 3e-2):
                return self.share_prefix or print(
                    f"note: {self.path} takes a row per response (slower, same result)"
                )
        stop(
            f"{self.path}: its LM head is not what LM.logits computes (error {error:.1e}); add it there"
        )

    def template(self, messages: list[dict], ask: bool = False) -> list[int]:
        """Chat template as ids; special-token strings inside messages stay text. `ask` adds the generation prompt."""
        plain = all(
            isinstance(v, str) and self.marks.isdisjoint(v)
            for turn in messages
            for v in turn.values()
        )
        how = {
            "add_generation_prompt": ask,
            "return_dict": False,
            "sanitize_control_tokens": not plain,
        }  # it is slow
        with clearly(
            f"use the chat template of {self.path} with roles {[turn['role'] for turn in messages]}"
        ):
            ids = self.tokenizer.apply_chat_template(messages, **how)
        return ids if ids[: len(self.bos)] == self.bos else self.bos + ids

    def encode(self, prompt: list[dict], answers=()) -> tuple[list[int], list[list[int]]]:
        """Ids of a prompt and of answers to it. An answer is a text, or {"text", "finished"} as sampled: only a
        finished one ends with an end-of-turn token. Without a chat template everything is plain text."""
        chat, plain = (
            self.tokenizer.chat_template,
            {"add_special_tokens": False, "split_special_tokens": True},
        )
        text, responses = "\n".join(turn["content"] for turn in prompt), []
        ids = (
            self.template(prompt, ask=True)
            if chat
            else self.bos + self.tokenizer(text, **plain).input_ids
        )
        for answer in [
            {"text": answer, "finished": True} if isinstance(answer, str) else answer
            for answer in answers
        ]:
            turn = {"role": "assistant", "content": answer["text"]}
            whole = (
                self.template([*prompt, turn])
                if chat
                else ids + self.tokenizer(answer["text"], **plain).input_ids
            )
            if whole[: len(ids)] != ids:
                stop(
                    f"{self.path}: its chat template writes this prompt otherwise once it is answered: {text[:200]}"
                )
            end = next(
                (i for i in range(len(ids), len(whole)) if whole[i] in self.end_ids), len(whole)
            )
            responses.append(
                whole[len(ids) : end]
                + (whole[end : end + 1] or self.end_ids[:1]) * answer["finished"]
            )
        return ids, responses

    def hidden_states(self, batch) -> torch.Tensor:
        """[rows·T, H]: the backbone's last hidden states. No gradient through a frozen model."""
        mask, dtype = batch.attention_mask, self.model.dtype
        if (
            mask is not None and self.model.config._attn_implementation == "eager"
        ):  # which adds its mask to the scores
            mask = torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
        inputs = {"attention_mask": mask, "position_ids": batch.position_ids, "use_cache": False}
        with torch.set_grad_enabled(self.trains and torch.is_grad_enabled()), self.autocast():
            return self.model.base_model(batch.input_ids, **inputs).last_hidden_state.flatten(0, 1)

    def logits(self, hidden: torch.Tensor, vocab_size: int) -> torch.Tensor:
        """[N, V] in float32 from [N, H], without the head's padding; scaled and capped as the config declares."""
        scale = getattr(self.config, "logit_scale", 1.0) / getattr(
            self.config, "logits_scaling", 1.0
        )
        with self.autocast():  # scaled where it is H numbers and not V
            values = self.model.get_output_embeddings()(hidden * scale)[:, :vocab_size].float()
        cap = getattr(self.config, "final_logit_softcapping", None)
        return cap * torch.tanh(values / cap) if cap else values

    @torch.no_grad()
    def sample(
        self, prompts, *, n=1, temperature=1.0, top_p=1.0, top_k=0, max_new_tokens, batch_size, seed
    ) -> list:
        """n answers {"text", "finished"} to each prompt [ids], in the prompts' order; temperature 0 is greedy decoding.
        Of the checkpoint's generation config only the end tokens count. `batch_size` answers at a time, by length of
        prompt; the n answers of a prompt share its prefill. The same seed gives the same answers."""
        model, pad, answers = self.model, self.end_ids[0], [[] for _ in prompts]
        how = (
            {"temperature": temperature, "top_p": top_p, "top_k": top_k} if temperature > 0 else {}
        )
        how |= {"do_sample": temperature > 0, "max_new_tokens": max_new_tokens}
        was_training, theirs = model.training, model.generation_config
        model.generation_config = transformers.GenerationConfig(
            **how, eos_token_id=self.end_ids, pad_token_id=pad
        )
        model.eval()  # gradient checkpointing would switch the cache off
        order, step = (
            sorted(range(len(prompts)), key=lambda i: len(prompts[i])),
            max(1, batch_size // n),
        )
        with torch.random.fork_rng(), self.autocast():
            torch.manual_seed(seed)
            for some in (order[start : start + step] for start in range(0, len(order), step)):
                width, cache = len(prompts[some[-1]]), None
                ids = torch.tensor(
                    [[pad] * (width - len(prompts[i])) + prompts[i] for i in some],
                    device=self.device,
                )
                mask = torch.tensor(
                    [[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in some]
                ).to(ids)
                if n > 1 and width > 1 and self.share_prefix:
                    seen = {
                        "attention_mask": mask[:, :-1],
                        "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)[:, :-1],
                    }
                    cache = model.base_model(ids[:, :-1], **seen, use_cache=True).past_key_values
                    cache.batch_repeat_interleave(n)
                ids, mask = ids.repeat_interleave(n, 0), mask.repeat_interleave(n, 0)
                new = model.generate(ids, attention_mask=mask, past_key_values=cache)[
                    :, width:
                ].tolist()
                for k, row in enumerate(new):
                    end = next(
                        (i for i, token in enumerate(row) if token in self.end_ids), len(row)
                    )
                    text = self.tokenizer.decode(row[:end], skip_special_tokens=True)
                    answers[some[k // n]].append({"text": text, "finished": end < len(row)})
        model.generation_config = theirs
        model.train(was_training)
        return answers


def shared_vocab(one: LM, other: LM, advice="choose a pair") -> int:
    """The number of tokens that two models share. Heads padded to different sizes do no harm, nor do added tokens that
    only one tokenizer has; if one id means two things, the program ends with advice."""
    size = min(one.vocab_size, other.vocab_size)
    ours, theirs = (
        {t: i for t, i in lm.tokenizer.get_vocab().items() if i < size} for lm in (one, other)
    )
    return (
        size
        if ours == theirs
        else stop(f"{one.path} and {other.path} have different tokenizers; {advice}")
    )


# A row of data, the ids of its prompt and of each of its n responses; a finished response ends with its end-of-turn.
Example = namedtuple("Example", ["row", "prompt", "responses"])


def read_rows(source: str, split: str, answers=("chosen", "rejected")) -> list[dict]:
    """Preference data from a .jsonl, .json or .parquet file, a folder or a hub id. A row has a `prompt` (text or chat
    messages) and `answers` (text or conversations), or only conversations that share all but their last turn; returned
    rows have an `id` (number and content hash), `prompt` as messages, answers as text, and all other columns."""
    raw, rows = [], []
    with clearly(f"read {source} (split {split})"):
        if source.endswith(
            (".json", ".jsonl")
        ):  # not by datasets, which makes a date of the text "2021-01-01"
            data = Path(source).read_bytes()
            for number, line in enumerate(
                [] if data.lstrip()[:1] == b"[" else data.splitlines(), 1
            ):
                with clearly(f"read {source}, line {number}"):
                    raw += [json.loads(line)] if line.strip() else []
            raw = raw or json.loads(data or b"[]")
        else:
            from datasets import load_dataset  # a second of import time
            from pyarrow.parquet import read_table

            raw = (
                read_table(source).to_pylist()
                if source.endswith(".parquet")
                else load_dataset(source, split=split)
            )
    for number, row in enumerate(raw, 1):
        with clearly(
            f"use {source}, row {number}, without {('prompt', *answers)} as text or chat: {str(row)[:150]}"
        ):
            prompt = row.get("prompt")
            if prompt is None and isinstance(row["chosen"], list):
                prompt = (
                    row["chosen"][:-1]
                    if row["chosen"][:-1] == row.get("rejected", row["chosen"])[:-1]
                    else None
                )
            prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            texts = [
                value if isinstance(value, str) else value[-1]["content"]
                for value in map(row.get, answers)
            ]
            "".join([*texts, *(turn["role"] + turn["content"] for turn in prompt)])  # all are text
        digest = hashlib.sha256(json.dumps([prompt, texts]).encode()).hexdigest()[:8]
        rows.append(
            {**row, "id": f"{number}-{digest}", "prompt": prompt, **dict(zip(answers, texts))}
        )
    return rows


def make_examples(
    lm: LM, rows: list[dict], answers, max_prompt_tokens: int, max_response_tokens: int
) -> list[Example]:
    """Rows as ids, with the answers in the columns `answers`. What does not fit is dropped and counted, never cut; only
    a sample that never ended, which the limit cut in the first place, is cut there again should its text take more."""
    kept, dropped = [], Counter()
    for row in rows:
        prompt, responses = lm.encode(row["prompt"], [row[key] for key in answers])
        texts = [
            row[key] for key in answers if isinstance(row[key], str)
        ]  # of the data, not sampled
        responses = [
            r[: None if set(r[-1:]) & set(lm.end_ids) else max_response_tokens] for r in responses
        ]
        if not all(responses) or not all(
            map(str.strip, ["".join(t["content"] for t in row["prompt"]), *texts])
        ):
            dropped["empty prompt or answer"] += 1
        elif answers and "chosen" in row and row["chosen"] == row.get("rejected"):
            dropped["equal answers"] += 1
        elif len(prompt) > max_prompt_tokens or any(
            len(response) > max_response_tokens for response in responses
        ):
            dropped[
                f"over {max_prompt_tokens} prompt or {max_response_tokens} response tokens"
            ] += 1
        else:
            kept.append(Example(row, prompt, responses))
    line = f"{len(kept)} of {len(rows)} rows" + "".join(
        f", {n} dropped ({why})" for why, n in dropped.items()
    )
    return print(line) or kept or stop(f"no row left: {line}")


def pack(examples: list[Example], *models: LM) -> SimpleNamespace:
    """A micro-batch as rows that suit all the given models (of one tokenizer), and where its R responses and their N
    tokens lie in them: see the shapes below. AssertionError if a response has no token."""
    assert all(response for example in examples for response in example.responses), (
        "a response without tokens"
    )
    longest = max(
        len(prompt) + len(response) for _, prompt, responses in examples for response in responses
    )
    if not all(lm.share_prefix and longest <= lm.window for lm in models):
        examples = [
            Example(row, prompt, [response])
            for row, prompt, group in examples
            for response in group
        ]
    width = max(len(prompt) + sum(map(len, responses)) for _, prompt, responses in examples)
    rows, source, last, targets, lengths = [], [], [], [], []
    for _, prompt, responses in examples:
        row = [
            (token, position, 0) for position, token in enumerate(prompt)
        ]  # of every token: id, position, segment
        for segment, response in enumerate(responses, 1):
            start = len(rows) * width + len(row)
            source += [
                len(rows) * width + len(prompt) - 1,
                *range(start, start + len(response) - 1),
            ]
            last.append(start + len(response) - 1)
            lengths.append(len(response))
            targets += response
            row += [
                (token, position, segment) for position, token in enumerate(response, len(prompt))
            ]
        rows.append(row + [(0, 0, 0)] * (width - len(row)))
    ids, positions, segments = torch.tensor(rows).unbind(-1)
    mask = (
        (segments[:, None, None] == 0) | (segments[:, None, None] == segments[:, None, :, None])
    ).tril()
    alone = len(rows) == len(
        lengths
    )  # one response a row is plainly causal: nothing looks at padding on the right
    batch = {
        "input_ids": ids,  # [rows, T]
        "position_ids": None if alone else positions,  # [rows, T]
        "attention_mask": None
        if alone
        else mask,  # [rows, 1, T, T], True where a query may look at a key
        "source": source,  # [N] index into rows·T of the position that predicts each response token
        "target_ids": targets,  # [N]
        "response_of": torch.arange(len(lengths)).repeat_interleave(
            torch.tensor(lengths)
        ),  # [N] which of the R
        "last": last,  # [R] index into rows·T of each response's last token
        "lengths": lengths,  # [R] tokens of each response
    }
    return SimpleNamespace(
        **{k: v if v is None else torch.as_tensor(v).to(models[0].device) for k, v in batch.items()}
    )


def per_token(
    function,
    target_ids: torch.Tensor,
    scored: list[tuple[LM, torch.Tensor]],
    vocab_size: int,
    chunk: int,
):
    """function(target_ids [N], float32 log_probs [N, V] of each model) -> one [N] tensor or several. `scored` holds
    each model with its hidden states [N, H] at the tokens' `source`. Beyond `chunk` tokens slices are recomputed in the
    backward pass, so that [chunk, V] logits per model are alive at a time; below it nothing is computed twice."""
    models, hidden = zip(*scored)

    def on_slice(target_ids, *hidden):
        return function(
            target_ids, *(lm.logits(h, vocab_size).log_softmax(-1) for lm, h in zip(models, hidden))
        )

    if len(target_ids) <= chunk:
        return on_slice(target_ids, *hidden)
    slices = zip(*(column.split(chunk) for column in (target_ids, *hidden)))
    parts = [
        checkpoint(on_slice, *part, use_reentrant=False, preserve_rng_state=False)
        for part in slices
    ]
    return torch.cat(parts) if torch.is_tensor(parts[0]) else tuple(map(torch.cat, zip(*parts)))


def target_logps(target_ids: torch.Tensor, log_probs: torch.Tensor) -> torch.Tensor:
    """[N]: log-prob of each response token, from [N] and [N, V]."""
    return log_probs.gather(-1, target_ids[:, None]).squeeze(-1)


def response_means(
    values: torch.Tensor, response_of: torch.Tensor, lengths: torch.Tensor
) -> torch.Tensor:
    """[R]: sums of values [N] by response_of [N], over lengths [R]; 0 for a response of which no token is there."""
    return values.new_zeros(len(lengths)).index_add(0, response_of, values) / lengths


def load_reward(spec: str, device: torch.device, trust_remote_code=False, batch_size=32):
    """The judge f(prompts, answers) -> list of floats: `module:function`, or a sequence-classification reward model,
    whose score is read at the answer's last token whatever its padding id is."""
    function = locate(spec.replace(":", ".")) if ":" in spec else None
    if ":" in spec and not callable(function):
        stop(
            f"--reward {spec}: no such function here; give module:function or the path of a reward model"
        )
    lm = None if function else LM(spec, device, remote_code=trust_remote_code, reward=True)

    @clearly(f"judge answers with --reward {spec}")
    @torch.no_grad()
    def judge(prompts, answers):
        scores = list(function(prompts, answers)) if function else []
        pairs = (
            [] if function else [Example({}, *lm.encode(p, [a])) for p, a in zip(prompts, answers)]
        )
        for batch in (
            pack(pairs[start : start + batch_size], lm)
            for start in range(0, len(pairs), batch_size)
        ):
            scores += lm.model.score.float()(lm.hidden_states(batch)[batch.last].float())[
                :, 0
            ].tolist()
        if len(scores) != len(answers) or not all(math.isfinite(score) for score in scores):
            stop(
                f"--reward {spec} must return {len(answers)} finite numbers; it returned {str(scores)[:100]}"
            )
        return [float(score) for score in scores]

    return judge


def stage(path: Path, rows: list[dict], produce, size: int) -> list[dict]:
    """Completes a JSONL of {"id", "prompt", **produce(some rows, number)[i]} for all rows, `size` rows at a time, and
    returns it in the rows' order. What a killed run left is kept, but for a half-written line. Rows are matched by id
    and prompt, so a file made by another program serves as well; one of other rows is refused."""
    written = path.read_bytes() if path.exists() else b""
    written = written[
        : written.rfind(b"\n") + 1
    ]  # behind the last line break: a line that a kill cut
    prompts = {row["id"]: row["prompt"] for row in rows}
    with clearly(f"go on with {path}; remove it to make it anew"):
        done = {row["id"]: row for row in map(json.loads, written.splitlines())}
        assert all(prompts[id] == row["prompt"] for id, row in done.items()), (
            "it was made from other data"
        )
    with path.open("a") as file:
        file.truncate(len(written))
        for start in tqdm(
            range(0, len(rows), size), desc=path.stem, disable=len(done) == len(rows)
        ):
            some = rows[start : start + size]
            if any(row["id"] not in done for row in some):
                for row, made in zip(some, produce(some, start), strict=True):
                    if row["id"] not in done:
                        done[row["id"]] = {"id": row["id"], "prompt": row["prompt"], **made}
                        file.write(json.dumps(done[row["id"]]) + "\n")
                file.flush()
    return [done[row["id"]] for row in rows]


def save_checkpoint(path: Path, step: int, **parts):
    """Writes the state_dicts of `parts` (model, optimizer, scheduler) and the step: wholly or not at all."""
    with clearly(f"write {path}.partial"):  # on a full disk torch raises errors of its own
        torch.save(
            {"step": step, **{name: part.state_dict() for name, part in parts.items()}},
            f"{path}.partial",
        )
    Path(f"{path}.partial").replace(path)


def load_checkpoint(path: Path, **parts) -> int:
    """Restores what `save_checkpoint` wrote and returns its step; 0 when there is nothing yet."""
    with clearly(f"go on from {path}; remove it to train from the start"):
        state = (
            torch.load(path, map_location="cpu", weights_only=True)
            if path.exists()
            else {"step": 0}
        )
        for name in parts.keys() & state.keys():
            parts[name].load_state_dict(state[name])
    return state["step"]
