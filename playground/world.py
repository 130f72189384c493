"""The playground's world: requests such as "Name three planets.", writers of mixed skill, and an exact judge.

A request asks for one to four words of a category. An answer lists words, ends with a full stop and may close with
a kind word: "Mars, Venus and Earth. Enjoy!". Every category has popular misconceptions (Pluto is no planet, a spider
no insect), which poor writers believe in, so that a model that imitates the average writer repeats them even when it
decodes greedily. `reward` is the ground truth that the papers' benchmarks stand in for; everything here is plain
Python and every random choice comes from the `random.Random` that is passed in.
"""

import random
import re
from dataclasses import dataclass
from itertools import pairwise

COUNTS = {"one": 1, "two": 2, "three": 3, "four": 4}

# plural: (singular, right words, popular misconceptions). A misconception is wrong here, yet may be right elsewhere.
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
ALL_WORDS = sorted(
    {word for category in CATEGORIES for word in RIGHT[category] + MISTAKEN[category]}
)

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
    """(384 training requests, 128 held-out ones). Whole pairs (category, count) are held out, in every phrasing: of
    each category one of the counts two to four, so that every word of a held-out request is known from training."""
    train, test = [], []
    for i, (plural, (singular, _, _)) in enumerate(CATEGORIES.items()):
        for j, (word, count) in enumerate(COUNTS.items()):
            what = f"{word} {singular if count == 1 else plural}"
            requests = [
                Request(phrasing.format(what=what), plural, count) for phrasing in PHRASINGS
            ]
            (test if 1 + i % 3 == j else train).extend(requests)
    return train, test


_NOUNS = {
    noun: plural for plural, (singular, _, _) in CATEGORIES.items() for noun in (singular, plural)
}
_WORDS = re.compile(r"[^\s,.!?]+")


def read_request(prompt) -> Request:
    """The request that a prompt (a string, or a list of chat messages) makes. ValueError when it is none."""
    text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    words = _WORDS.findall(text)
    for number, noun in pairwise(words):
        if number in COUNTS and noun in _NOUNS:
            return Request(text, _NOUNS[noun], COUNTS[number])
    raise ValueError(
        f"the playground's judge cannot read the request {text!r}: give --reward a judge of your own"
    )


@dataclass
class Verdict:
    """What the judge saw in an answer. `faults[i]` is None for a right word, else "wrong", "repeated" or "extra"."""

    words: list[str]
    faults: list[str | None]
    missing: int
    ended: bool
    kind_word: str
    reward: float


def judge(request: Request, answer: str) -> Verdict:
    """Reads an answer word by word. The reward is (right words / asked) − 0.5 for each wrong, repeated or surplus word
    + 0.2 for a kind word − 0.5 when there is no full stop, and never below −1 (best: 1.2)."""
    body, stop, tail = answer.strip().partition(".")
    tail = tail.strip()
    words = [word for word in _WORDS.findall(body) if word != "and"]
    faults, right = [], set()
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
    kind_word = tail if tail in KIND_WORDS else ""
    chatter = 0 if kind_word else len(tail.split())  # anything else after the full stop
    mistakes = sum(fault is not None for fault in faults) + chatter
    reward = len(right) / request.count - 0.5 * mistakes + 0.2 * bool(kind_word) - 0.5 * (not stop)
    return Verdict(
        words, faults, request.count - len(right), bool(stop), kind_word, max(reward, -1.0)
    )


def reward(prompts: list, responses: list) -> list[float]:
    """The oracle: one reward in [−1, 1.2] for each answer. Prompts and responses are strings or lists of chat messages;
    the signature is that of TRL's reward functions."""
    texts = [
        response if isinstance(response, str) else response[-1]["content"] for response in responses
    ]
    return [
        judge(read_request(prompt), text).reward
        for prompt, text in zip(prompts, texts, strict=True)
    ]


def score(value: float) -> int:
    """A reward on the teacher's scale of whole numbers from 1 (reward 0 or less) to 10 (reward 1.2)."""
    return round(min(max(1 + 7.5 * value, 1), 10))


def phrase(words: list[str], ended: bool = True, kind_word: str = "") -> str:
    """["a", "b", "c"] becomes "a, b and c." and the kind word."""
    text = " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
    return " ".join(filter(None, [text + "." * ended, kind_word]))


def follow(request: Request, words: list[str], avoid: list[str], rng: random.Random) -> str:
    """The word that comes to mind next: one of the two that follow the last right word in its category's usual order
    (which starts again at the end), or any word after a slip. Never one of `avoid`."""
    order = RIGHT[request.category]
    if words and words[-1] in order:
        at = order.index(words[-1])
        order = order[at + 1 :] + order[:at]
        return rng.choice([word for word in order if word not in avoid][:2])
    return rng.choice([word for word in order if word not in avoid])


def write(request: Request, skill: float, rng: random.Random) -> str:
    """An answer by a writer with a skill between 0 and 1, which drives count, category, repetition and kindness."""
    slip = 1 - skill
    count = request.count
    if rng.random() < 0.5 * slip:  # too few, or one too many
        count = rng.choice([count + 1, *range(1, count)])
    words: list[str] = []
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
    kind = rng.random() < 0.1 + 0.6 * skill
    return phrase(words, ended, rng.choice(KIND_WORDS) if kind and ended else "")


def explain(request: Request, answer: str) -> str:
    """What is wrong with an answer, in a few words: "Pluto is wrong, Mars is repeated, one is missing."."""
    verdict = judge(request, answer)
    faults = [
        f"{word} is {fault}"
        for word, fault in zip(verdict.words, verdict.faults, strict=True)
        if fault
    ]
    numbers = {count: word for word, count in COUNTS.items()}
    if verdict.missing:
        faults.append(f"{numbers[verdict.missing]} missing")
    if not verdict.ended:
        faults.append("no full stop")
    if not verdict.kind_word:
        faults.append("no kind word")
    return ", ".join(faults or ["nothing is wrong"]) + "."


def edit(request: Request, answer: str, rng: random.Random) -> str:
    """The answer with as few changes as make it perfect: right words keep their place, a faulty word is replaced by a
    new right one while words are missing and dropped after that, and what is still missing comes last."""
    verdict = judge(request, answer)
    kept = [word for word, fault in zip(verdict.words, verdict.faults, strict=True) if not fault]
    missing, words = verdict.missing, []
    for word, fault in [
        *zip(verdict.words, verdict.faults, strict=True),
        *[("", "missing")] * verdict.missing,
    ]:
        if not fault:
            words.append(word)
        elif missing:
            words.append(follow(request, words, kept + words, rng))
            missing -= 1
    return phrase(words, True, verdict.kind_word or rng.choice(KIND_WORDS))
