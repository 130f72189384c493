"""Held-out pairs that measure a reward model: `python -m studies.rm_pairs` writes
playground/data/rm_test.jsonl.

The exact reward orders every pair, and no pair has equal rewards. The column `subset` says which of
three kinds a pair is:

    easy     two answers of writers, whose rewards are far apart
    hard     two answers of writers, whose rewards are close
    shifted  two answers sampled from the teacher, which is better than any writer whose answers a
             reward model is trained on

Each held-out request has two pairs of each kind. The file is the same for a seed on one machine.
"""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from common import LM
from playground.build import SKILLS
from playground.world import Request, all_requests, assess, write

EASY = 0.5  # the least difference of the rewards of an easy pair
HARD = 0.3  # the greatest difference of the rewards of a hard pair
LEAST = 0.01  # of any other pair: equal rewards are refused
MOST = 9.0  # of any other pair: no limit
SAMPLES = 64  # the teacher's answers to a request, from which its shifted pairs are drawn


@dataclass
class Args:
    seed: int = 1
    """of the writers and of the teacher's samples"""
    teacher: str = "playground/teacher"
    """whose answers make the shifted pairs"""
    output: str = "playground/data/rm_test.jsonl"
    """the file that is written"""
    pairs: int = 2
    """pairs of each kind for each of the 128 held-out requests"""


def sample_answers(teacher: LM, requests: list[Request], seed: int) -> list[list[str]]:
    """The teacher's answers to every request, without those that did not end."""
    messages = [[{"role": "user", "content": request.text}] for request in requests]
    samples = teacher.sample(
        [teacher.prompt_ids(prompt) for prompt in messages],
        n=SAMPLES,
        max_new_tokens=32,
        batch_size=1024,
        seed=seed,
    )
    answers = []
    for responses in samples:
        answers.append([response["text"] for response in responses if response["finished"]])
    return answers


def answer_of_a_writer(request: Request, teacher_answers: list[str], rng: random.Random) -> str:
    """A new answer by a writer of any skill. What the teacher answered is not used."""
    return write(request, rng.uniform(*SKILLS), rng)


def answer_of_the_teacher(request: Request, teacher_answers: list[str], rng: random.Random) -> str:
    """One of the answers that the teacher has given to this request."""
    return rng.choice(teacher_answers)


@dataclass
class Subset:
    """A kind of pair: how an answer is drawn, and how far apart the two rewards may be."""

    draw: Callable[[Request, list[str], random.Random], str]
    least: float
    most: float


SUBSETS = {
    "easy": Subset(draw=answer_of_a_writer, least=EASY, most=MOST),
    "hard": Subset(draw=answer_of_a_writer, least=LEAST, most=HARD),
    "shifted": Subset(draw=answer_of_the_teacher, least=LEAST, most=MOST),
}


def draw_pair(
    subset: Subset, request: Request, teacher_answers: list[str], rng: random.Random
) -> dict:
    """The first two answers whose rewards are as far apart as the subset wants them, as a row."""
    for _ in range(10_000):
        answers = [subset.draw(request, teacher_answers, rng) for _ in range(2)]
        rejected, chosen = sorted(answers, key=lambda answer: assess(request, answer).reward)
        gap = assess(request, chosen).reward - assess(request, rejected).reward
        if subset.least - 1e-9 <= gap <= subset.most + 1e-9:
            return {"prompt": request.text, "chosen": chosen, "rejected": rejected}
    bounds = f"{subset.least} to {subset.most}"
    raise RuntimeError(f"no two answers to {request.text!r} differ by {bounds}")


def make_pairs(
    requests: list[Request], teacher_answers: list[list[str]], pairs: int, seed: int
) -> list[dict]:
    """`pairs` rows of each kind for every request, ordered by kind and then by request."""
    rng = random.Random(seed)
    rows = []
    for name, subset in SUBSETS.items():
        for request, answers in zip(requests, teacher_answers, strict=True):
            for _ in range(pairs):
                rows.append({**draw_pair(subset, request, answers, rng), "subset": name})
    return rows


def main(args: Args):
    _, requests = all_requests()
    teacher = LM(args.teacher, torch.device("cpu"))
    teacher_answers = sample_answers(teacher, requests, args.seed)
    rows = make_pairs(requests, teacher_answers, args.pairs, args.seed)
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    Path(args.output).write_text("".join(lines), encoding="utf-8")
    print(f"{len(rows)} pairs in {args.output}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
