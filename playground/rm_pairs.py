"""Held-out pairs that measure a reward model: `python -m playground.rm_pairs` makes data/rm_test.jsonl.

Every pair is ordered by the exact oracle and stands under one of three names in the column `subset`: "easy", two
writers' answers whose rewards are far apart; "hard", two writers' answers whose rewards are close; "shifted", two
answers sampled from the teacher, which is better than any writer that a reward model is trained on. Two pairs of each
kind for each held-out request; no equal rewards. Deterministic for a seed on one machine.
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from common import LM
from playground.build import SKILLS
from playground.world import Request, all_requests, judge, write

EASY, HARD = 0.5, 0.3  # an easy pair's oracle gap is at least, a hard pair's at most this


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


def two_different(request: Request, draw, least: float, most: float) -> dict:
    """The first pair of answers by `draw()` whose oracle gap is within the bounds, as a row."""
    for _ in range(10_000):
        rejected, chosen = sorted(
            (draw(), draw()), key=lambda answer: judge(request, answer).reward
        )
        gap = judge(request, chosen).reward - judge(request, rejected).reward
        if least - 1e-9 <= gap <= most + 1e-9:
            return {"prompt": request.text, "chosen": chosen, "rejected": rejected}
    raise RuntimeError(f"no two answers to {request.text!r} differ by {least} to {most}")


def make_pairs(teacher: LM, pairs: int, seed: int) -> list[dict]:
    rng, requests, rows = random.Random(seed), all_requests()[1], []
    chats = [teacher.encode([{"role": "user", "content": request.text}])[0] for request in requests]
    drawn = teacher.sample(chats, n=64, max_new_tokens=32, batch_size=1024, seed=seed)
    sampled = [[answer["text"] for answer in answers if answer["finished"]] for answers in drawn]
    for subset, least, most in (("easy", EASY, 9.0), ("hard", 0.01, HARD), ("shifted", 0.01, 9.0)):
        for request, texts in zip(requests, sampled):
            if subset == "shifted":
                draw = lambda texts=texts: rng.choice(texts)  # noqa: E731
            else:
                draw = lambda request=request: write(request, rng.uniform(*SKILLS), rng)  # noqa: E731
            rows += [
                {**two_different(request, draw, least, most), "subset": subset}
                for _ in range(pairs)
            ]
    return rows


def main(args: Args):
    rows = make_pairs(LM(args.teacher, torch.device("cpu")), args.pairs, args.seed)
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    Path(args.output).write_text("".join(lines), encoding="utf-8")
    print(f"{len(rows)} pairs in {args.output}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
