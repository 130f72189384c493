"""Variants of the playground, for claims that need what it does not have.

    lengths    half of the requests ask for a sentence about every word, so that answers have 3 to
               60 words: for the length normalisation of DPKD. A student and a teacher of their own
    corpus     conversations with the playground's writers, on which its student was trained: for
               DPKD's loss on a text corpus
    styles     pairs of a better and a poorer writer who differ in style as well, and held-out pairs
               in which style says nothing, or the opposite: for the refinement of RM-Distiller.
               Student and teacher are the playground's
    tokenizer  a teacher whose tokenizer has two tokens for every word of a category: for PAD with a
               teacher of another tokenizer. It is trained on from the playground's teacher. The
               student is the playground's

    python -m studies.worlds lengths      # runs/worlds/lengths
    python dpkd.py --student runs/worlds/lengths/student --teacher runs/worlds/lengths/teacher \\
        --data runs/worlds/lengths/data/train.jsonl \\
        --eval_data runs/worlds/lengths/data/test.jsonl --reward studies.worlds:reward

`studies.compare` makes a variant when one of its runs needs it. A seed gives the same files every
time on one machine. Nothing here changes the playground. Teachers are trained on the answers of
skilled writers, which is quicker than DPO, and what a student needs is that they are better.
"""

import json
import random
import re
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import tyro
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from common import LM
from playground import build, world
from playground.build import Turn
from playground.world import ALL_WORDS, KIND_WORDS, RIGHT, Request, Verdict, assess

# Between these are the skills of the writers from whom teachers learn.
SKILLS_OF_TEACHERS = (0.85, 1.0)
PLAYGROUND = Path(build.__file__).parent


@dataclass
class Args:
    variant: tyro.conf.Positional[Literal["corpus", "lengths", "styles", "tokenizer"]]
    """which one to make"""
    seed: int = 1
    """everything random follows from it"""
    output_dir: str = ""
    """where data/ and the models go; if empty, runs/worlds/<variant>"""
    student_steps: int = 2000
    """optimiser steps of a student"""
    teacher_steps: int = 1000
    """optimiser steps of a teacher"""
    train_pairs: int = 2000
    """rows of data/train.jsonl"""
    test_pairs: int = 512
    """rows of data/test.jsonl"""


# Between the student's and the playground's teacher. It need not judge, only answer.
SMALL_TEACHER = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}


# ------------------------------------------------------------------------------------------- corpus
def make_corpus(folder: Path, args: Args, rng: random.Random) -> dict:
    """corpus.txt with a conversation in every line."""
    lines = []
    for _ in range(args.train_pairs):
        request = rng.choice(build.TRAIN_REQUESTS)
        [turn] = build.answering(request, rng)
        line = f"<|begin|><|user|>{turn.question}<|end|><|assistant|>{turn.reply}<|end|>\n"
        lines.append(line)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "corpus.txt").write_text("".join(lines))
    return {"conversations": len(lines)}


# ---------------------------------------------------------------------- lengths: 3 to 60 words
DESCRIBE = " Describe each."
ORDINALS = ["first", "second", "third", "fourth", "fifth"]
# Which of them a writer takes is chance, and the reward does not depend on it.
ADJECTIVES = ["large", "small", "old", "young", "famous", "quiet", "strange", "common"]
SENTENCE = re.compile(
    rf"The (?:{'|'.join(ORDINALS)}) that comes to my mind is (\w+), "
    rf"which is (?:{'|'.join(ADJECTIVES)}) and (?:{'|'.join(ADJECTIVES)})"
)
WORDS_OF_SENTENCES = "The that comes to my mind is which Describe each " + " ".join(
    ORDINALS + ADJECTIVES
)


def describe(words: list[str], ended: bool, kind_word: str, rng: random.Random) -> str:
    """A sentence of 14 words about every word, and the kind word."""
    sentences = []
    for ordinal, word in zip(ORDINALS, words):
        one, other = rng.sample(ADJECTIVES, 2)
        sentences.append(
            f"The {ordinal} that comes to my mind is {word}, which is {one} and {other}."
        )
    text = " ".join(sentences)
    if not ended:
        text = text.removesuffix(".")
    return f"{text} {kind_word}".strip()


def wants_descriptions(request: Request) -> bool:
    return request.text.endswith(DESCRIBE)


def verdict_on(request: Request, answer: str) -> Verdict:
    """What is in an answer. Sentences count as the words that they are about, as in the playground.
    One of another form counts as a wrong word."""
    if not wants_descriptions(request):
        return assess(request, answer)
    *sentences, tail = answer.strip().split(".")
    tail = tail.strip()
    ended = bool(sentences)
    if SENTENCE.fullmatch(tail):
        sentences.append(tail)
        tail = ""
        ended = False
    words = []
    for sentence in sentences:
        match = SENTENCE.fullmatch(sentence.strip())
        words.append(match[1] if match else "nonsense")
    return assess(request, world.phrase(words, ended=ended, kind_word=tail))


def reward(prompts: list, completions: list, **columns) -> list[float]:
    """The exact reward of answers to requests of both kinds, at most 1.2, as --reward takes it."""
    rewards = []
    for prompt, completion in zip(prompts, completions, strict=True):
        text = completion if isinstance(completion, str) else completion[-1]["content"]
        rewards.append(verdict_on(world.read_request(prompt), text).reward)
    return rewards


reward.best_possible = world.reward.best_possible
reward.can_judge = world.can_judge


def requests_of_both_kinds(requests: list[Request]) -> list[Request]:
    """The requests, and those for sentences. What asks for a single word is left out of the first:
    its answers have two words."""
    several = [request for request in requests if request.count > 1]
    described = [replace(request, text=request.text + DESCRIBE) for request in requests]
    return several + described


def write(request: Request, skill: float, rng: random.Random) -> str:
    """A writer's answer to a request of either kind."""
    answer = world.write(request, skill, rng)
    if not wants_descriptions(request):
        return answer
    verdict = assess(request, answer)
    return describe(verdict.words, verdict.ended, verdict.kind_word, rng)


def answering(request: Request, rng: random.Random) -> list[Turn]:
    """The task of the student."""
    return [Turn(request.text, write(request, rng.uniform(*build.SKILLS), rng))]


def answering_well(request: Request, rng: random.Random) -> list[Turn]:
    """The task of a teacher."""
    return [Turn(request.text, write(request, rng.uniform(*SKILLS_OF_TEACHERS), rng))]


def pair_of_any_length(request: Request, rng: random.Random) -> dict | None:
    """Two writers' answers, as in the playground's data."""
    a = write(request, rng.uniform(*build.SKILLS), rng)
    b = write(request, rng.uniform(*build.SKILLS), rng)
    gap = verdict_on(request, a).reward - verdict_on(request, b).reward
    return build.noisy_pair(request, a, b, gap, rng)


def make_lengths(folder: Path, args: Args, rng: random.Random) -> dict:
    """Data, a student and a teacher. What they do on held-out requests."""
    train_requests = requests_of_both_kinds(build.TRAIN_REQUESTS)
    test_requests = requests_of_both_kinds(build.TEST_REQUESTS)
    train_rows = build.preferences(train_requests, args.train_pairs, rng, pair_of_any_length)
    test_rows = build.preferences(test_requests, args.test_pairs, rng, pair_of_any_length)
    write_data(folder, train=train_rows, test=test_rows)
    tokenizer = build.make_tokenizer(WORDS_OF_SENTENCES)
    torch.manual_seed(args.seed)
    student = build.train(
        tokenizer,
        shape=build.STUDENT,
        curriculum=[(1.0, {answering: 1})],
        steps=args.student_steps,
        learning_rate=4e-3,
        rng=rng,
        name="student",
        requests=train_requests,
    )
    build.save(student, tokenizer, folder / "student", torch.float32)
    teacher = build.train(
        tokenizer,
        shape=SMALL_TEACHER,
        curriculum=[(1.0, {answering_well: 1})],
        steps=args.teacher_steps,
        learning_rate=3e-3,
        rng=rng,
        name="teacher",
        requests=train_requests,
    )
    build.save(teacher, tokenizer, folder / "teacher", torch.float16)
    models_made = {"student": folder / "student", "teacher": folder / "teacher"}
    return {name: measure(path, test_requests) for name, path in models_made.items()}


# ------------------------------------------------------------------- styles: two kinds of writers
# A style is the kind word that closes an answer, and the half of the category's usual order in
# which the first right word stands. The reward depends on neither.
GOOD_STYLE = 0
POOR_STYLE = 1
# The least difference of the rewards in a held-out pair.
LEAST_GAP = 0.1


def has_style(request: Request, answer: str, style: int) -> bool:
    """Whether an answer may be by a writer of this style. A very poor answer may be by any."""
    verdict = assess(request, answer)
    if verdict.kind_word not in ("", KIND_WORDS[style]):
        return False
    right_words = [word for word in verdict.words if word in RIGHT[request.category]]
    if not right_words:
        return True
    half = RIGHT[request.category].index(right_words[0]) // 4
    return half == style


def write_in_style(request: Request, skill: float, style: int, rng: random.Random) -> str:
    """The first of a writer's answers that has the style."""
    answer = world.write(request, skill, rng)
    while not has_style(request, answer, style):
        answer = world.write(request, skill, rng)
    return answer


def pair_of_styles(request: Request, rng: random.Random) -> dict | None:
    """Answers of a better writer in the good style and of a poorer one in the poor style, in the
    order of their rewards with the playground's noise."""
    a = write_in_style(request, rng.uniform(0.85, 1.0), GOOD_STYLE, rng)
    b = write_in_style(request, rng.uniform(0.5, 0.7), POOR_STYLE, rng)
    gap = assess(request, a).reward - assess(request, b).reward
    return build.noisy_pair(request, a, b, gap, rng)


# The styles of the chosen and of the rejected answer in held-out pairs.
SUBSETS = {
    "as in training": (GOOD_STYLE, POOR_STYLE),
    "same style": (GOOD_STYLE, GOOD_STYLE),
    "styles exchanged": (POOR_STYLE, GOOD_STYLE),
}


def held_out_pair(
    request: Request, chosen_style: int, rejected_style: int, rng: random.Random
) -> dict:
    """Two answers by writers of any skill, in the exact order of their rewards."""
    while True:
        chosen = write_in_style(request, rng.uniform(*build.SKILLS), chosen_style, rng)
        rejected = write_in_style(request, rng.uniform(*build.SKILLS), rejected_style, rng)
        gap = assess(request, chosen).reward - assess(request, rejected).reward
        if gap >= LEAST_GAP - 1e-9:
            return {"prompt": request.text, "chosen": chosen, "rejected": rejected}


def make_styles(folder: Path, args: Args, rng: random.Random) -> dict:
    """Data alone. How often the label of a training pair follows the style."""
    train_rows = build.preferences(build.TRAIN_REQUESTS, args.train_pairs, rng, pair_of_styles)
    test_rows = []
    for subset, (chosen_style, rejected_style) in SUBSETS.items():
        for request in build.TEST_REQUESTS * 2:
            row = held_out_pair(request, chosen_style, rejected_style, rng)
            test_rows.append({**row, "subset": subset})
    write_data(folder, train=train_rows, rm_test=test_rows)
    follows = []
    for row in train_rows:
        request = world.read_request(row["prompt"])
        if not has_style(request, row["chosen"], POOR_STYLE):
            follows.append(1.0)
        elif not has_style(request, row["rejected"], POOR_STYLE):
            follows.append(0.0)
    return {"chosen in the good style": statistics.mean(follows), "pairs": len(follows)}


# --------------------------------------------------------------- tokenizer: a teacher of its own
def answering_a_request(request: Request, rng: random.Random) -> list[Turn]:
    return [Turn(request.text, world.write(request, rng.uniform(*SKILLS_OF_TEACHERS), rng))]


# What PAD asks of a teacher: answers, and which of two is better.
TASKS = {answering_a_request: 1, build.membership: 0.5, build.checking: 1, build.judging: 3}


def parts_of(piece: str) -> list[str]:
    """The tokens in place of a token of the playground. A word of a category has two. Example:
    "▁elephant" becomes "▁elep" and "hant", and "▁Name" stays as it is."""
    is_split = len(piece) > 4 and piece.removeprefix("▁") in ALL_WORDS
    if not is_split:
        return [piece]
    middle = 1 + len(piece) // 2
    return [piece[:middle], piece[middle:]]


def make_tokenizer_of_halves() -> PreTrainedTokenizerFast:
    """The playground's tokenizer, but that every word of a category has two tokens."""
    content = json.loads(build.make_tokenizer().backend_tokenizer.to_str())
    scores = {}
    for piece, score in content["model"]["vocab"]:
        for part in parts_of(piece):
            scores.setdefault(part, score)
    content["model"]["vocab"] = list(scores.items())
    return build.with_chat_template(Tokenizer.from_str(json.dumps(content)))


def with_halves(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """The playground's teacher with the tokens of that tokenizer. A half begins as the mean of the
    words that it is a half of."""
    teacher = LM(PLAYGROUND / "teacher", torch.device("cpu"))
    sources = {}
    for piece, token in teacher.tokenizer.get_vocab().items():
        for part in parts_of(piece):
            sources.setdefault(part, []).append(token)
    shape = {name: getattr(teacher.config, name) for name in build.TEACHER}
    model = build.new_model(tokenizer, shape)
    state = teacher.model.state_dict()
    embeddings = model.get_input_embeddings().weight.detach().clone()
    for piece, token in tokenizer.get_vocab().items():
        embeddings[token] = state["model.embed_tokens.weight"][sources[piece]].mean(0)
    state["model.embed_tokens.weight"] = embeddings
    state["lm_head.weight"] = embeddings
    model.load_state_dict(state)
    return model


def make_another_tokenizer(folder: Path, args: Args, rng: random.Random) -> dict:
    """A teacher. What it does on held-out requests, and how often it judges right."""
    tokenizer = make_tokenizer_of_halves()
    torch.manual_seed(args.seed)
    teacher = build.train(
        tokenizer,
        shape=build.TEACHER,
        curriculum=[(1.0, TASKS)],
        steps=args.teacher_steps,
        learning_rate=1e-3,
        rng=rng,
        name="teacher",
        model=with_halves(tokenizer),
    )
    build.save(teacher, tokenizer, folder / "teacher", torch.float16)
    measured = {"teacher": measure(folder / "teacher", build.TEST_REQUESTS)}
    measured["student"] = measure(PLAYGROUND / "student", build.TEST_REQUESTS)
    pairs = []
    for request in rng.choices(build.TEST_REQUESTS, k=500):
        pairs.append((request, *build.two_answers(request, rng)))
    lm = LM(folder / "teacher", torch.device("cpu"))
    measured["judging"] = build.measure_judging(lm, pairs)
    return measured


# --------------------------------------------------------------------------------------------- main
def write_data(folder: Path, **rows: list[dict]):
    """Writes data/<name>.jsonl for every name."""
    (folder / "data").mkdir(parents=True, exist_ok=True)
    for name, some_rows in rows.items():
        build.write_jsonl(folder / f"data/{name}.jsonl", some_rows)


def measure(path: Path, requests: list[Request]) -> dict:
    """The reward of four sampled answers to every request, and their lengths in words."""
    lm = LM(path, torch.device("cpu"))
    texts = [request.text for request in requests] * 4
    answers = build.ask(lm, texts, temperature=1.0, max_new_tokens=128)
    lengths = sorted(len(answer.split()) for answer in answers)
    return {
        "reward": statistics.mean(reward(texts, answers)),
        "words": statistics.mean(lengths),
        "5% have at most": lengths[len(lengths) // 20],
        "5% have at least": lengths[-len(lengths) // 20],
        "parameters": lm.model.num_parameters(),
    }


MAKERS = {
    "corpus": make_corpus,
    "lengths": make_lengths,
    "styles": make_styles,
    "tokenizer": make_another_tokenizer,
}


def main(args: Args):
    started = time.time()
    folder = Path(args.output_dir or f"runs/worlds/{args.variant}")
    measured = MAKERS[args.variant](folder, args, random.Random(args.seed))
    measured["seconds"] = time.time() - started
    # It comes last, so it is the sign of a variant that is complete.
    (folder / "measured.json").write_text(json.dumps(measured, indent=1) + "\n")
    print(json.dumps(measured, indent=1))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
