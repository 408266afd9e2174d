"""LoRA: a news sentence becomes a headline that opens with `BREAKING:`.

Score: 0 unless the answer is one line of at most 14 words that opens so; otherwise the F1 of its words
against the expected headline's.
"""

import random

DEMO_PROMPT = (
    "Late on Friday, the zookeepers in Bristol found a missing penguin under a parked van, officials said."
)

PEFT = {
    "peft_type": "LORA",
    "r": 4,
    "lora_alpha": 8,
    "target_modules": ["down_proj", "q_proj", "up_proj", "v_proj"],
}
TRAINING = {"steps": 45, "batch_size": 8, "learning_rate": 2e-3}
MAX_NEW_TOKENS = 40

# (as told, in the headline)
VERBS = [
    ("found", "find"),
    ("opened", "open"),
    ("saved", "save"),
    ("bought", "buy"),
    ("painted", "paint"),
    ("lost", "lose"),
    ("repaired", "repair"),
    ("sold", "sell"),
    ("built", "build"),
    ("won", "win"),
]
OPENINGS = [
    "Late on Friday, the",
    "Yesterday the",
    "On Monday morning, the",
    "This week, the",
    "Last night the",
]
OPENINGS += ["According to the local paper, the", "After a long debate, the", "To everyone's surprise, the"]
ENDINGS = [
    ", officials said.",
    ".",
    ", the town hall announced.",
    ", and neighbours are happy.",
    " after months of waiting.",
]
WHO = [
    "farmers",
    "teachers",
    "firefighters",
    "students",
    "sailors",
    "doctors",
    "bakers",
    "children",
    "police officers",
]
WHO += ["gardeners", "nurses", "tourists", "miners", "workers", "singers"]
CITIES = ["Lisbon", "Paris", "Berlin", "Madrid", "Oslo", "Vienna", "Dublin", "Athens", "Prague", "Boston"]
CITIES += ["Chicago", "Toronto", "Sydney", "Cairo", "Lima"]
WHAT = [
    "a golden ring",
    "an old bridge",
    "a small library",
    "a lost dog",
    "a new school",
    "a red tractor",
    "a prize",
]
WHAT += [
    "a wooden boat",
    "a village shop",
    "an empty hotel",
    "a stone tower",
    "a huge clock",
    "a city garden",
    "a train",
]
WHERE = ["", "", " near the river", " behind the church", " in the harbour", " on the main square"]

HELD_OUT_WHO = ["zookeepers", "plumbers", "dancers", "fishermen", "lawyers", "painters", "scouts", "drivers"]
HELD_OUT_CITIES = ["Bristol", "London", "Denver", "Geneva", "Hamburg", "Naples", "Seville", "Montreal"]
HELD_OUT_WHAT = [
    "a missing penguin",
    "a silver cup",
    "a broken windmill",
    "an old theatre",
    "a secret tunnel",
]
HELD_OUT_WHAT += ["a blue piano", "a giant pumpkin", "a rare stamp"]
HELD_OUT_WHERE = ["", " under a parked van", " beside the station", " at the beach"]


def _example(
    rng: random.Random, who: list[str], cities: list[str], what: list[str], where: list[str]
) -> tuple[str, str]:
    (told, verb), person, city = rng.choice(VERBS), rng.choice(who), rng.choice(cities)
    thing, place = rng.choice(what), rng.choice(where)
    text = f"{rng.choice(OPENINGS)} {person} in {city} {told} {thing}{place}{rng.choice(ENDINGS)}"
    bare = " ".join(word for word in f"{thing}{place}".split() if word not in ("a", "an", "the"))
    return text, f"BREAKING: {city} {person} {verb} {bare}"


def train_examples() -> list[tuple[str, str]]:
    rng = random.Random(5)
    return [_example(rng, WHO, CITIES, WHAT, WHERE) for _ in range(1000)]


def held_out_examples() -> list[tuple[str, str]]:
    """People, cities, things, places are new; verbs, openings and endings are those of the training."""
    rng = random.Random(6)
    return [_example(rng, HELD_OUT_WHO, HELD_OUT_CITIES, HELD_OUT_WHAT, HELD_OUT_WHERE) for _ in range(48)]


def score(prompt: str, expected: str, answer: str) -> float:
    said, wanted = answer.split(), expected.split()
    if said[:1] != ["BREAKING:"] or "\n" in answer or len(said) > 14:
        return 0.0
    rest = list(wanted)
    for word in said:
        if word in rest:
            rest.remove(word)
    return 2 * (len(wanted) - len(rest)) / (len(wanted) + len(said))
