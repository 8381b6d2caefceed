"""What the quickstart teaches, made on the spot: questions about the order of names, and a small untrained model.

    python -m examples.quickstart.teach

starts runs/quickstart anew: `data/pairs.jsonl` and `data/sorting.jsonl` to train on, `data/held-out-….jsonl` with
questions that those do not ask, in whatever order of the names, and `model`, a base model with random weights.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from examples.make_model import make_model

FOLDER = Path("runs/quickstart")
NAMES = [
    "Ada", "Amy", "Ann", "Ben", "Bob", "Cleo", "Dan", "Dora", "Eli", "Emma",
    "Eva", "Finn", "Gus", "Hana", "Hugo", "Ida", "Ivan", "Jack", "Jana", "Kim",
    "Kurt", "Leo", "Lisa", "Max", "Mia", "Nils", "Nora", "Ola", "Otto", "Paul",
    "Pia", "Rosa", "Sam", "Sue", "Tim", "Tom", "Uma", "Vera", "Will", "Zoe",
]  # fmt: skip
NUM_PAIRS, NUM_SORTING, NUM_HELD_OUT = 2_000, 8_000, 100

Conversation = dict[str, list[dict[str, str]]]
Draw = Callable[[random.Random], list[str]]


def main() -> None:
    for made_before in ("data", "model", "out"):
        shutil.rmtree(FOLDER / made_before, ignore_errors=True)
    source = random.Random(1)
    held_out_pairs, pairs = split(draw_two, compare, NUM_PAIRS, source)
    held_out_sorting, sorting = split(draw_some, sort, NUM_SORTING, source)
    write("pairs", pairs)
    write("sorting", sorting)
    write("held-out-pairs", held_out_pairs)
    write("held-out-sorting", held_out_sorting)
    # A wider initialisation than usual: with so few steps, a model this small learns faster from it.
    make_model(FOLDER / "model", texts(pairs + sorting), hidden=128, layers=2, vocab=512, initializer_range=0.06)
    print(f"{FOLDER}: {NUM_PAIRS:,} questions about two names, {NUM_SORTING:,} about three to five, a model to teach")


def draw_two(source: random.Random) -> list[str]:
    return source.sample(NAMES, 2)


def draw_some(source: random.Random) -> list[str]:
    return source.sample(NAMES, source.randint(3, 5))


def compare(names: list[str]) -> Conversation:
    return conversation(f"Who comes first, {names[0]} or {names[1]}?", min(names))


def sort(names: list[str]) -> Conversation:
    return conversation(f"Sort {', '.join(names)}.", ", ".join(sorted(names)))


def conversation(question: str, answer: str) -> Conversation:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def split(
    draw: Draw, ask: Callable[[list[str]], Conversation], num_training: int, source: random.Random
) -> tuple[list[Conversation], list[Conversation]]:
    """Held-out and training conversations; no training question is about just the names of a held-out one."""
    held_out: dict[frozenset[str], list[str]] = {}
    while len(held_out) < NUM_HELD_OUT:
        names = draw(source)
        held_out.setdefault(frozenset(names), names)
    training: list[Conversation] = []
    while len(training) < num_training:
        names = draw(source)
        if frozenset(names) not in held_out:
            training.append(ask(names))
    return [ask(names) for names in held_out.values()], training


def texts(conversations: Iterable[Conversation]) -> list[str]:
    """What the tokenizer learns from: what is said, and the words that a chat template says around it."""
    said = [message["content"] for item in conversations for message in item["messages"]]
    return said + [message["role"] for item in conversations for message in item["messages"]]


def write(name: str, conversations: Iterable[Conversation]) -> None:
    path = FOLDER / "data" / f"{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(item) + "\n" for item in conversations))


if __name__ == "__main__":
    main()
