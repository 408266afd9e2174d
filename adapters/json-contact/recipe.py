"""LoRA: a sentence about a person becomes one JSON object.

Score: 0 unless the answer is JSON with exactly the expected keys; otherwise the share of right values.
"""

import json
import random

DEMO_PROMPT = "Ingrid Solberg, aged 47, is a beekeeper from Tromso."

PEFT = {
    "peft_type": "LORA",
    "r": 8,
    "lora_alpha": 16,
    "target_modules": ["k_proj", "o_proj", "q_proj", "v_proj"],
}
TRAINING = {"steps": 45, "batch_size": 8, "learning_rate": 2e-3}
MAX_NEW_TOKENS = 48

SHAPES = [
    "{name}, {age}, lives in {city} and works as {a} {job}.",
    "{name} is {a} {job} in {city}, {age} years old.",
    "At {age}, {name} moved to {city} to become {a} {job}.",
    "Meet {name}: {age} years old, {job}, living in {city}.",
    "In {city} there is {a} {job} called {name}, who is {age}.",
    "My neighbour in {city}, {name}, turned {age} and still works as {a} {job}.",
    "{name} works as {a} {job}. Home is {city}, and the age is {age}.",
    "The {job} {name} from {city} is {age} years old.",
]
HELD_OUT_SHAPES = ["{name}, aged {age}, is {a} {job} from {city}."]

FIRST = (
    "Anna Ben Carla David Elena Frank Grace Henry Irene Jack Karen Liam Maria Noah Olga Paul Rosa Simon Tina"
)
FIRST += " Victor Wendy Amir Bella Chen Dora Emil Fatima Goran Hana Ivan"
LAST = "Smith Keller Rossi Novak Brown Garcia Lindqvist Tanaka Okafor Meyer Dubois Petrov Silva Evans Haddad"
LAST += " Jansen Kowalski Moreau Singh Walker Bianchi Costa Duarte Fischer Green"
CITIES = (
    "Lisbon Paris Berlin Madrid Rome Oslo Vienna Dublin Athens Prague Warsaw Boston Chicago Toronto Sydney"
)
CITIES += " Cairo Nairobi Lima Tokyo Seoul Delhi Bern Porto Milan Lyon"
JOBS = (
    "nurse teacher baker pilot farmer lawyer plumber dentist painter driver cook tailor actor engineer judge"
)
JOBS += " gardener waiter butcher singer carpenter"

HELD_OUT_FIRST = "Ingrid Marcus Yusuf Clara Oscar Leila Hugo Nadia Felix Sofia"
HELD_OUT_LAST = "Solberg Adams Castillo Weber Nakamura Ferrari Hughes Romero Bauer Larsen"
HELD_OUT_CITIES = "Tromso London Denver Geneva Hamburg Naples Seville Montreal Osaka Krakow"
HELD_OUT_JOBS = "beekeeper librarian electrician photographer mechanic doctor fisherman writer architect chef"


def _example(rng: random.Random, shapes: list[str], vocabulary: list[str]) -> tuple[str, str]:
    first, last, city, job = (rng.choice(words.split()) for words in vocabulary)
    row = {"name": f"{first} {last}", "age": rng.randint(18, 89), "city": city, "job": job}
    prompt = rng.choice(shapes).format(a="an" if job[0] in "aeiou" else "a", **row)
    return prompt, json.dumps(row)


def _invented(rng: random.Random) -> str:
    """A few words that nobody has seen, so that the adapter learns to copy, not to choose from lists."""
    starts, middles, ends = (
        "b br c d f g h j k l m n p r s st t tr v w z",
        "a e i o u ai ea oo",
        "n r l s m nd rt ck x",
    )
    syllables = ["".join(rng.choice(part.split()) for part in (starts, middles, ends)) for _ in range(24)]
    return " ".join(first + second for first, second in zip(syllables[::2], syllables[1::2], strict=True))


def train_examples() -> list[tuple[str, str]]:
    rng = random.Random(3)
    known = [FIRST, LAST, CITIES, JOBS]
    examples = []
    for _ in range(1000):
        vocabulary = [words if rng.random() < 0.5 else _invented(rng) for words in known]
        vocabulary[:3] = [words.title() for words in vocabulary[:3]]
        examples.append(_example(rng, SHAPES, vocabulary))
    return examples


def held_out_examples() -> list[tuple[str, str]]:
    """Names, cities and jobs are all new; one sentence in five has a shape that is new as well."""
    rng = random.Random(4)
    vocabulary = [HELD_OUT_FIRST, HELD_OUT_LAST, HELD_OUT_CITIES, HELD_OUT_JOBS]
    return [_example(rng, HELD_OUT_SHAPES if index % 5 == 0 else SHAPES, vocabulary) for index in range(50)]


def score(prompt: str, expected: str, answer: str) -> float:
    wanted = json.loads(expected)
    try:
        said = json.loads(answer)
    except ValueError:
        return 0.0
    if not isinstance(said, dict) or list(said) != list(wanted):
        return 0.0
    return sum(said[key] == value for key, value in wanted.items()) / len(wanted)
