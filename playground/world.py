"""The playground's world: requests such as "Name three planets.", writers of mixed skill who answer
them, and an exact reward.

A request asks for one to four words of a category. An answer lists words, ends with a full stop and
may close with a kind word: "Mars, Venus and Earth. Enjoy!". Every category has popular
misconceptions (Pluto is no planet, a spider is no insect), which poor writers believe in. So a
model that imitates the average writer repeats them even when it decodes greedily.

`reward` is the ground truth, for which the benchmarks of the papers stand in. Everything here is
plain Python, and every random choice comes from the `random.Random` that is passed in.
"""

import random
import re
from dataclasses import dataclass
from itertools import pairwise

COUNTS = {"one": 1, "two": 2, "three": 3, "four": 4}

# plural: (singular, right words, popular misconceptions). A misconception is wrong in its category
# and may be right in another one.
CATEGORIES = {
    "planets": ("planet", "Mercury Venus Earth Mars Jupiter Saturn Uranus Neptune", "Pluto"),
    "mammals": (
        "mammal",
        "horse elephant whale dolphin bat wolf otter kangaroo",
        "penguin crocodile ostrich",
    ),
    "birds": ("bird", "eagle owl robin penguin ostrich parrot swan crow", "bat"),
    "fish": ("fish", "salmon tuna shark trout eel cod herring carp", "whale dolphin otter"),
    "insects": ("insect", "ant bee beetle moth wasp cricket butterfly mosquito", "spider"),
    "reptiles": (
        "reptile",
        "crocodile turtle lizard snake gecko iguana tortoise cobra",
        "frog toad newt",
    ),
    "fruits": ("fruit", "apple pear plum cherry mango peach banana grape", "rhubarb"),
    "vegetables": (
        "vegetable",
        "carrot potato onion spinach cabbage leek celery turnip",
        "tomato mushroom pumpkin",
    ),
    "trees": ("tree", "oak pine maple birch willow cedar elm poplar", "bamboo"),
    "metals": ("metal", "iron copper silver gold tin zinc nickel cobalt", "graphite diamond glass"),
    "instruments": (
        "instrument",
        "piano violin flute harp trumpet guitar cello drum",
        "microphone",
    ),
    "capitals": (
        "capital",
        "Paris Rome Madrid Cairo Tokyo Oslo Lima Vienna",
        "Sydney Istanbul Toronto",
    ),
    "countries": ("country", "France Japan Brazil Egypt Canada Peru Norway Kenya", "Africa"),
    "languages": (
        "language",
        "Spanish Arabic Hindi Swahili Finnish Korean Turkish Welsh",
        "Swiss Brazilian Mexican",
    ),
    "sports": ("sport", "tennis rugby hockey boxing rowing judo golf fencing", "poker"),
    "spices": (
        "spice",
        "cinnamon nutmeg saffron cumin paprika turmeric cardamom cloves",
        "salt sugar honey",
    ),
}
RIGHT = {category: words.split() for category, (_, words, _) in CATEGORIES.items()}
MISTAKEN = {category: words.split() for category, (_, _, words) in CATEGORIES.items()}
ALL_WORDS = sorted(set().union(*RIGHT.values(), *MISTAKEN.values()))

PHRASINGS = [
    "Name {what}.",
    "Please name {what}.",
    "List {what}.",
    "Can you list {what}?",
    "Give me {what}.",
    "I need {what}.",
    "Tell me {what}.",
    "Can you think of {what}?",
]
KIND_WORDS = ["Enjoy!", "Happy to help!", "Hope that helps!"]


@dataclass(frozen=True)
class Request:
    """One request: its text, and what it asks for (`count` words of `category`)."""

    text: str
    category: str
    count: int


def all_requests() -> tuple[list[Request], list[Request]]:
    """(384 training requests, 128 held-out ones).

    Whole pairs (category, count) are held out, in every phrasing: of each category one of the
    counts two to four. So every word of a held-out request is known from training.
    """
    train = []
    test = []
    for i, (plural, (singular, _, _)) in enumerate(CATEGORIES.items()):
        held_out_count = 2 + i % 3
        for number, count in COUNTS.items():
            noun = singular if count == 1 else plural
            what = f"{number} {noun}"
            requests = [Request(p.format(what=what), plural, count) for p in PHRASINGS]
            if count == held_out_count:
                test += requests
            else:
                train += requests
    return train, test


_CATEGORY_OF_NOUN = {singular: plural for plural, (singular, _, _) in CATEGORIES.items()}
_CATEGORY_OF_NOUN.update({plural: plural for plural in CATEGORIES})
_WORDS = re.compile(r"[^\s,.!?]+")


def read_request(prompt) -> Request:
    """The request that a prompt (a text, or a list of chat messages) makes. ValueError if it makes
    none."""
    text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    words = _WORDS.findall(text)
    for number, noun in pairwise(words):
        if number in COUNTS and noun in _CATEGORY_OF_NOUN:
            return Request(text, _CATEGORY_OF_NOUN[noun], COUNTS[number])
    raise ValueError(
        f"the playground's reward cannot read the request {text!r}: "
        "give --reward a function of your own"
    )


def can_judge(prompt) -> bool:
    """Whether a prompt makes a request of the playground."""
    try:
        read_request(prompt)
    except ValueError:
        return False
    return True


@dataclass
class Verdict:
    """What was found in an answer. `faults[i]` is None if `words[i]` is right, and otherwise
    "wrong", "repeated" or "extra"."""

    words: list[str]
    faults: list[str | None]
    missing: int
    ended: bool
    kind_word: str
    reward: float


def assess(request: Request, answer: str) -> Verdict:
    """Reads an answer word by word.

    The reward is the share of the words asked for that are there, − 0.5 for each wrong, repeated or
    surplus word, + 0.2 for a kind word, − 0.5 if there is no full stop. It is at least −1 and at
    most 1.2.
    """
    body, full_stop, tail = answer.strip().partition(".")
    tail = tail.strip()
    words = [word for word in _WORDS.findall(body) if word != "and"]
    faults = []
    right = set()
    for word in words:
        if word not in RIGHT[request.category]:
            faults.append("wrong")
        elif word in right:
            faults.append("repeated")
        elif len(right) == request.count:
            faults.append("extra")
        else:
            faults.append(None)
            right.add(word)

    mistakes = sum(fault is not None for fault in faults)
    if tail in KIND_WORDS:
        kind_word = tail
    else:
        kind_word = ""
        # Anything else behind the full stop is chatter, and each word of it a mistake.
        mistakes += len(tail.split())

    value = len(right) / request.count - 0.5 * mistakes
    if kind_word:
        value += 0.2
    if not full_stop:
        value -= 0.5
    return Verdict(
        words=words,
        faults=faults,
        missing=request.count - len(right),
        ended=bool(full_stop),
        kind_word=kind_word,
        reward=max(value, -1.0),
    )


def reward(prompts: list, completions: list, **columns) -> list[float]:
    """The ground truth: one reward in [−1, 1.2] for each completion. Prompts and completions are
    texts or lists of chat messages. It has the form of TRL's reward functions, which is one of the
    two that --reward takes in every script."""
    rewards = []
    for prompt, completion in zip(prompts, completions, strict=True):
        text = completion if isinstance(completion, str) else completion[-1]["content"]
        rewards.append(assess(read_request(prompt), text).reward)
    return rewards


reward.best_possible = 1.2  # shown at the end of a run
# Scripts ask it about all prompts before any work.
reward.can_judge = can_judge


def score(value: float) -> int:
    """A reward on the teacher's scale: a whole number from 1 (reward 0 or less) to 10 (1.2)."""
    return round(min(max(1 + 7.5 * value, 1), 10))


def phrase(words: list[str], ended: bool = True, kind_word: str = "") -> str:
    """["a", "b", "c"] becomes "a, b and c." and the kind word."""
    text = " and ".join(words)
    if len(words) > 2:
        text = ", ".join(words[:-1]) + " and " + words[-1]
    if ended:
        text += "."
    return " ".join(part for part in (text, kind_word) if part)


def follow(request: Request, words: list[str], avoid: list[str], rng: random.Random) -> str:
    """The word that comes to mind next, never one of `avoid`.

    It is one of the two that follow the last right word in the usual order of the category, which
    starts again at its end. After a slip it is any word.
    """
    order = RIGHT[request.category]
    if words and words[-1] in order:
        at = order.index(words[-1])
        order = order[at + 1 :] + order[:at]
        return rng.choice([word for word in order if word not in avoid][:2])
    return rng.choice([word for word in order if word not in avoid])


def write(request: Request, skill: float, rng: random.Random) -> str:
    """An answer by a writer with a skill between 0 and 1, on which everything depends: how many
    words there are, whether they are right and new, the full stop and the kind word."""
    slip = 1 - skill
    count = request.count
    if rng.random() < 0.5 * slip:
        # One too many, or too few.
        count = rng.choice([count + 1, *range(1, count)])
    words = []
    for _ in range(count):
        chance = rng.random()
        believed = [word for word in MISTAKEN[request.category] if word not in words]
        if chance < 0.60 * slip and believed:
            words.append(rng.choice(believed))
        elif chance < 0.65 * slip:
            words.append(rng.choice(ALL_WORDS))
        elif chance < 0.75 * slip and words:
            words.append(rng.choice(words))
        else:
            words.append(follow(request, words, words, rng))
    ended = rng.random() >= 0.1 * slip
    is_kind = rng.random() < 0.1 + 0.6 * skill
    kind_word = ""
    if is_kind and ended:
        kind_word = rng.choice(KIND_WORDS)
    return phrase(words, ended, kind_word)


def explain(request: Request, answer: str) -> str:
    """What is wrong with an answer, in a few words: "Pluto is wrong, Mars is repeated, one
    missing."."""
    verdict = assess(request, answer)
    remarks = []
    for word, fault in zip(verdict.words, verdict.faults, strict=True):
        if fault:
            remarks.append(f"{word} is {fault}")
    numbers = {count: number for number, count in COUNTS.items()}
    if verdict.missing:
        remarks.append(f"{numbers[verdict.missing]} missing")
    if not verdict.ended:
        remarks.append("no full stop")
    if not verdict.kind_word:
        remarks.append("no kind word")
    if not remarks:
        remarks.append("nothing is wrong")
    return ", ".join(remarks) + "."


def edit(request: Request, answer: str, rng: random.Random) -> str:
    """The answer with as few changes as make it perfect.

    Right words keep their place. While words are missing, a faulty word is replaced by a new right
    one. After that it is dropped. What is missing then comes last.
    """
    verdict = assess(request, answer)
    missing = verdict.missing
    kept = [word for word, fault in zip(verdict.words, verdict.faults, strict=True) if not fault]
    words = []
    for word, fault in zip(verdict.words, verdict.faults, strict=True):
        if not fault:
            words.append(word)
        elif missing:
            words.append(follow(request, words, kept + words, rng))
            missing -= 1
    for _ in range(missing):
        words.append(follow(request, words, kept + words, rng))
    kind_word = verdict.kind_word
    if not kind_word:
        kind_word = rng.choice(KIND_WORDS)
    return phrase(words, kind_word=kind_word)
