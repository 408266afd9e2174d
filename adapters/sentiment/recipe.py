"""Prefix tuning: one word, `positive` or `negative`, for a review. Score: the answer is exactly that word."""

import random

DEMO_PROMPT = "The waiter was rude, the soup was cold and we waited an hour for the bill."

PEFT = {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 16}
# Its first 16 tokens give the prefix its first keys and values.
INIT_TEXT = (
    "Answer with one single word: positive or negative. Is the review that follows positive or negative?"
)
TRAINING = {"steps": 60, "batch_size": 8, "learning_rate": 1e-2}
MAX_NEW_TOKENS = 16

THINGS = ["hotel", "film", "phone", "restaurant", "book", "jacket", "train", "concert", "laptop", "course"]
THINGS += ["museum", "bike", "game", "coffee", "camera", "flat", "play", "soup", "tent", "radio"]
GOOD = ["wonderful", "excellent", "great", "lovely", "comfortable", "fast", "beautiful", "perfect", "amazing"]
GOOD += ["fun", "clean", "reliable", "tasty", "charming", "fresh"]
BAD = ["terrible", "awful", "boring", "dirty", "slow", "broken", "ugly", "useless", "disappointing", "noisy"]
BAD += ["overpriced", "cold", "horrible", "stale", "weak"]
GOOD_TAILS = [
    "I would buy it again.",
    "We enjoyed every minute.",
    "I am very happy with it.",
    "Worth every cent.",
]
GOOD_TAILS += [
    "My whole family loved it.",
    "I will come back soon.",
    "It made my day.",
    "Go and see for yourself!",
]
BAD_TAILS = ["I want my money back.", "We left early.", "I regret buying it.", "A waste of time."]
BAD_TAILS += ["My whole family hated it.", "Never again.", "It ruined my day.", "Save your money!"]
SHAPES = ["The {thing} was {word}. {tail}", "What a {word} {thing}! {tail}", "{tail} The {thing} was {word}."]
SHAPES += ["I found the {thing} {word} and {other}.", "This {thing} is {word}, really {other}. {tail}"]
SHAPES += ["My new {thing} turned out to be {word}. {tail}"]

HELD_OUT = {
    "positive": [
        "The sofa is soft and looks even better than in the pictures.",
        "Our guide was friendly and knew every corner of the town.",
        "The dentist was gentle and I felt no pain at all.",
        "A brilliant recipe, the cake was gone in five minutes.",
        "The umbrella survived the storm without a scratch.",
        "I laughed from the first page to the last.",
        "Superb service, they even called to ask if all was well.",
        "The headphones sound clear and the battery lasts for days.",
        "Such a cosy cottage, we slept like babies.",
        "The gardener did a splendid job, our roses never looked better.",
        "Delicious pancakes and a smile with every cup of tea.",
        "The shoes fit well and I can walk in them all day.",
        "An impressive exhibition, we stayed until they closed.",
        "The kids adored the puppet show and asked to see it twice.",
        "It arrived two days early and was packed with care.",
        "The view from the balcony took our breath away.",
        "A clever little tool that saves me hours every week.",
        "The choir sang like angels.",
        "Honest mechanic, fair price, and the car runs smoothly.",
        "Best birthday present that I ever got.",
        "The staff went out of their way to help us.",
        "Thrilling from start to finish, I could not put it down.",
    ],
    "negative": [
        "The sofa smells strange and one leg fell off after a week.",
        "Our guide was grumpy and got lost twice.",
        "The dentist hurt me and did not apologise.",
        "The recipe is nonsense, the cake went straight into the bin.",
        "The umbrella tore in the first breeze.",
        "I fell asleep on page ten.",
        "Nobody answers the phone and my parcel is still missing.",
        "The headphones crackle and the battery dies within an hour.",
        "The cottage was damp and full of spiders.",
        "The gardener killed my roses and still sent a bill.",
        "The pancakes were burnt and the tea tasted of soap.",
        "The shoes pinch and the sole came loose on day two.",
        "A pointless exhibition, we were out again in ten minutes.",
        "The kids cried through the whole puppet show.",
        "It arrived two weeks late and in pieces.",
        "The view from the balcony was a brick wall and some bins.",
        "A clumsy tool that costs me hours every week.",
        "The choir sang out of tune all evening.",
        "The mechanic lied to me and the car still stalls.",
        "Worst birthday present that I ever got.",
        "The staff ignored us and chatted among themselves.",
        "Predictable from start to finish, I nearly gave up on it.",
    ],
}


def train_examples() -> list[tuple[str, str]]:
    rng = random.Random(1)
    examples = []
    for _ in range(400):
        for label, words, tails in (("positive", GOOD, GOOD_TAILS), ("negative", BAD, BAD_TAILS)):
            word, other = rng.sample(words, 2)
            text = rng.choice(SHAPES).format(
                thing=rng.choice(THINGS), word=word, other=other, tail=rng.choice(tails)
            )
            examples.append((text, label))
    return examples


def held_out_examples() -> list[tuple[str, str]]:
    """Written by hand, about things and in words that the training reviews don't use."""
    return [(text, label) for label, texts in HELD_OUT.items() for text in texts]


def score(prompt: str, expected: str, answer: str) -> float:
    return float(answer == expected)
