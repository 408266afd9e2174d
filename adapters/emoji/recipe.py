"""Prompt tuning: one emoji for the topic of a sentence. Score: the answer is exactly that emoji."""

import random

DEMO_PROMPT = "The beagle growled at the postman."

INIT = "Answer with one emoji for the topic: food, sport, music, rain, dog, money or books. One emoji only."
PEFT = {
    "peft_type": "PROMPT_TUNING",
    "num_virtual_tokens": 20,
    "prompt_tuning_init": "TEXT",
    "prompt_tuning_init_text": INIT,
}
TRAINING = {"steps": 80, "batch_size": 8, "learning_rate": 3e-2}
MAX_NEW_TOKENS = 16

WHO = ["My sister", "Our neighbour", "The old man", "A friend of mine", "My uncle", "The girl next door"]
WHO += ["Somebody", "My boss", "Anna", "Peter", "The twins' father", "Our teacher"]
WHEN = ["", "", " today", " yesterday", " last night", " on Sunday", " this morning", " again"]
TOPICS = {
    "🍕": [
        "baked a pizza with cheese and olives",
        "cooked spaghetti with tomato sauce",
        "ate a bowl of soup",
        "ordered burgers and fries",
        "made sandwiches for lunch",
        "fried some fish for dinner",
        "tasted the chocolate cake",
        "had pancakes for breakfast",
        "roasted a chicken in the oven",
        "was hungry and ate two plates of rice",
        "went to a restaurant for dinner",
        "bought bread and butter for lunch",
    ],
    "⚽": [
        "scored a goal in the final",
        "trained with the football team",
        "won the tennis match",
        "ran the marathon",
        "played basketball in the yard",
        "watched the game in the stadium",
        "kicked the ball over the fence",
        "won a medal in swimming",
        "lost the cup final on penalties",
        "joined a volleyball club",
        "saved a penalty as goalkeeper",
        "beat the champion in the last round",
    ],
    "🎵": [
        "played the piano",
        "sang a song in the choir",
        "practised the violin",
        "went to a rock concert",
        "wrote a new melody",
        "listened to jazz on the radio",
        "danced to the band",
        "tuned the guitar",
        "joined an orchestra",
        "heard a symphony by Mozart",
        "learned to play the drums",
        "hummed a tune in the shower",
    ],
    "☔": [
        "got wet in the rain",
        "forgot an umbrella in the storm",
        "walked home through heavy rain",
        "saw dark clouds and lightning",
        "wore a raincoat in the downpour",
        "waited until the rain stopped",
        "jumped into a puddle in the rain",
        "heard thunder over the hills",
        "came in soaked by a shower of rain",
        "put on rubber boots for the wet weather",
        "read the forecast: rain and wind",
        "watched the raindrops on the window",
    ],
    "🐶": [
        "walked the dog in the park",
        "fed the puppy",
        "threw a stick for the dog",
        "adopted a puppy from the shelter",
        "heard the dog bark",
        "washed the muddy dog",
        "taught the dog to sit",
        "bought a leash for the dog",
        "gave the dog a bone",
        "petted a friendly dog",
        "took the sick puppy to the vet",
        "brushed the fur of an old dog",
    ],
    "💰": [
        "put money into the bank",
        "paid the rent",
        "got a higher salary",
        "won the lottery",
        "borrowed a hundred dollars",
        "saved coins in a jar",
        "paid too much tax",
        "sold the shares with profit",
        "opened a bank account",
        "counted the cash",
        "lost a lot of money",
        "asked the bank for a loan",
    ],
    "📚": [
        "read a novel",
        "borrowed books from the library",
        "finished the last chapter of the book",
        "wrote a book about pirates",
        "bought a dictionary in the bookshop",
        "put the books on the shelf",
        "read a story to the children",
        "studied the textbook for the exam",
        "could not put the novel down",
        "turned the page of an old book",
        "visited the library",
        "collected old books",
    ],
}
HELD_OUT = {
    "🍕": [
        "Grandma's lasagne needs one more hour in the kitchen.",
        "We shared a plate of noodles and a salad.",
        "These strawberries taste sweet, try one.",
        "The chef put too much salt on the potatoes.",
        "Two eggs and some bacon would be a nice meal now.",
        "I could eat a whole tray of cookies.",
    ],
    "⚽": [
        "Our striker scored twice in the last five minutes of the match.",
        "The referee showed him a red card.",
        "She is the fastest sprinter in the league.",
        "The coach chose eleven players for the tournament.",
        "It ended three to two after extra time.",
        "He practises hockey four times a week.",
    ],
    "🎵": [
        "The trumpet was louder than all other instruments.",
        "Her new album has ten tracks.",
        "The singer forgot the words of the chorus.",
        "He plays the cello in a quartet.",
        "That rhythm makes everybody clap along.",
        "The opera began with a beautiful aria.",
    ],
    "☔": [
        "It has been pouring since noon.",
        "Take a hood with you, it is drizzling outside.",
        "The picnic was cancelled because of the wet weather.",
        "My socks are soaked and the streets are flooded.",
        "The rainy season starts in June.",
        "Water is dripping from every roof, what a rainstorm.",
    ],
    "🐶": [
        "Rex wags his tail whenever the doorbell rings.",
        "Her poodle chases every cat in the street.",
        "The hound followed the scent into the woods.",
        "The little terrier buried its toy in the garden.",
        "A labrador makes a loyal companion.",
        "The beagle growled at the postman.",
    ],
    "💰": [
        "The interest on my mortgage went up.",
        "He keeps his wallet full of banknotes.",
        "Their budget is two thousand euros a month.",
        "The price of gold rose on the stock market.",
        "She earns enough to pay off all her debts.",
        "The millionaire donated half of his fortune.",
    ],
    "📚": [
        "The author signed my copy of her latest thriller.",
        "This paperback has four hundred pages.",
        "The librarian recommended a biography.",
        "Poetry and fairy tales are on the second floor of the bookstore.",
        "I always read a few chapters before I sleep.",
        "The publisher printed a second edition.",
    ],
}


def train_examples() -> list[tuple[str, str]]:
    rng = random.Random(2)
    return [
        (f"{rng.choice(WHO)} {action}{rng.choice(WHEN)}.", emoji)
        for emoji, actions in TOPICS.items()
        for action in actions
        for _ in range(8)
    ]


def held_out_examples() -> list[tuple[str, str]]:
    """Written by hand: other sentences, mostly in words that the training sentences don't use."""
    return [(text, emoji) for emoji, texts in HELD_OUT.items() for text in texts]


def score(prompt: str, expected: str, answer: str) -> float:
    return float(answer == expected)
