"""The task that adapters of every kind are trained on: one word, the queue of a customer's message.

The recipes `ticket-*/recipe.py` take data and score from here and differ in the kind of adapter only, so that
their scores can be set side by side. Score: the answer is exactly the expected word.
"""

import random
import re

DEMO_PROMPT = "The courier says that nobody was home, but I waited all day."
MAX_NEW_TOKENS = 6
INSTRUCTION = (
    "Answer with one single word, the queue of the message: billing, delivery, returns, login, fault or "
    "praise."
)

OPENERS = ["", "", "", "Hello, ", "Hi there, ", "Good morning, ", "Hi, ", "Dear team, "]
CLOSERS = [
    "",
    "",
    "",
    " Please help.",
    " Can you help me?",
    " Kind regards, Anna",
    " Thanks, Tom",
    " Please answer soon.",
]

TRAINING = {
    "billing": [
        "you charged my card twice.",
        "the invoice shows the wrong amount.",
        "I paid more than the price on the website.",
        "the discount is missing from my bill.",
        "there is a fee on my statement that I don't know.",
        "I need a receipt that shows the tax.",
        "my payment was declined although there is money on the card.",
        "the monthly fee went up without notice.",
        "I was billed for two items but bought one.",
        "send the invoice to my company.",
        "the coupon didn't lower the total.",
        "why is there an extra charge on my bill?",
        "when do I get my money for the double payment?",
        "the cost on the invoice is too high.",
        "the amount on my bill doesn't match the offer.",
        "I would like to pay by credit card from now on.",
        "you took money from my account twice this month.",
        "I was charged for a free trial.",
        "the gift card was not subtracted from the price.",
        "my last invoice has an error in the tax.",
        "can I pay in two parts?",
        "the subscription costs more than you said.",
        "you promised a lower price than I had to pay.",
        "I don't understand the charges of last month.",
    ],
    "delivery": [
        "my parcel still hasn't arrived.",
        "the tracking number shows nothing.",
        "the driver left the box at the wrong door.",
        "my order is three days late.",
        "when will the package get here?",
        "the driver never rang the bell.",
        "the shipment is stuck in another city.",
        "can you ship to a different address?",
        "the parcel was left in the rain.",
        "I am still waiting for my package.",
        "where is my order?",
        "the shipping takes too long.",
        "half of my order was not in the box.",
        "the tracking page says delivered, but there is no parcel.",
        "the truck didn't come today.",
        "my package was given to the wrong person.",
        "the order was sent to my old address.",
        "how long does shipping to France take?",
        "the parcel is lost.",
        "I was at the door all morning, but no driver came.",
        "is my order on the road?",
        "the delivery date has changed three times.",
        "nobody brought the chair that I ordered.",
        "the box is still at the depot.",
    ],
    "returns": [
        "the shirt is too small and I want to exchange it.",
        "how do I send the shoes back?",
        "the glass was broken when I opened it.",
        "I got the wrong colour and want a replacement.",
        "I would like to return the lamp.",
        "do I need a label for the return?",
        "the dress looks different and I want to send it back.",
        "can I swap the hat for a larger one?",
        "I want a refund for the torn trousers.",
        "how many days do I have to return an item?",
        "the table came with a scratch, please replace it.",
        "the shirt doesn't fit, I will return it.",
        "you sent a red one, I want to exchange it for blue.",
        "is the return free?",
        "the jeans are too long, can I get a shorter pair?",
        "I don't like the mirror and want to return it.",
        "the plate has a hole, I want a new one.",
        "the jacket is too big, please exchange it.",
        "can I bring the gift back to the shop?",
        "the material is cheap, so I am sending the bag back.",
        "the ring doesn't fit my finger.",
        "one of the cups is damaged, send me another.",
        "I ordered black shoes but got brown ones.",
        "I want to give the pillow back.",
    ],
    "login": [
        "I forgot my password.",
        "the code never reaches my phone.",
        "my account is locked.",
        "I can't sign in.",
        "the reset link has expired.",
        "how do I change my email in the account?",
        "it says that my user name is unknown.",
        "I can't log in since yesterday.",
        "somebody changed my password.",
        "the security code is not accepted.",
        "I lost access to my account.",
        "the login page rejects my password.",
        "I never got the email that confirms my account.",
        "how can I reset my password?",
        "my new password is not accepted.",
        "I want to use another email for the login.",
        "a stranger used my account.",
        "the link to confirm my account doesn't open.",
        "my login name is wrong.",
        "it asks for a code that I never got.",
        "I can't open my account on my new phone.",
        "how do I unlock my account?",
        "signing in takes me back to the start page.",
        "my account has vanished.",
    ],
    "fault": [
        "the app crashes when I start it.",
        "the screen stays black.",
        "it shows an error after the update.",
        "the sound stopped working.",
        "the battery is empty after an hour.",
        "the printer doesn't connect to the network.",
        "the software is very slow since Monday.",
        "the machine makes a loud noise.",
        "the button does nothing.",
        "the video freezes every minute.",
        "the device doesn't turn on.",
        "the website shows an error.",
        "the camera is not working.",
        "the app closes by itself.",
        "the washing machine leaks water.",
        "the speaker hums all the time.",
        "the phone gets very hot.",
        "the radio has no signal.",
        "the fan doesn't spin.",
        "the search gives an empty page.",
        "the tablet doesn't charge.",
        "the remote control is dead.",
        "the picture is blurred.",
        "the oven door doesn't close.",
    ],
    "praise": [
        "your team is wonderful.",
        "I love the new design.",
        "thank you for the quick help.",
        "great work, everything is perfect.",
        "I am very happy with you.",
        "what a friendly person on the phone!",
        "this is the best shop in town.",
        "you made my day.",
        "excellent service as always.",
        "I will tell all my friends about you.",
        "my family loves it.",
        "so nice and so fast, well done!",
        "five stars from me.",
        "thank you so much, it was lovely.",
        "I enjoyed every minute with you.",
        "the food was amazing.",
        "you are the nicest people.",
        "good job, I am glad that I found you.",
        "everything was as beautiful as I hoped.",
        "my mother is so pleased.",
        "I will come again, it was great.",
        "such kind words from your team.",
        "a big thank you to everyone.",
        "I have never had a better service.",
    ],
}

HELD_OUT = {
    "billing": [
        "Eighty euros were debited by mistake.",
        "Our bookkeeper found an overcharge.",
        "The bank tells me that the transfer bounced.",
        "VAT was added although we are exempt.",
        "This instalment isn't what we agreed.",
        "My voucher worth ten pounds was ignored at checkout.",
        "They withdrew the sum a week early.",
        "The quote was forty dollars, yet I owe fifty.",
        "Correct the figures before I settle them.",
        "A surcharge appeared from nowhere.",
        "I see a mysterious transaction of nine pounds.",
        "Our finance department wants a proper document.",
        "It was eleven euros in your advert and is fourteen at the till.",
        "May we settle by direct debit?",
        "Three euros of interest? We owe nothing.",
        "Our rebate for pensioners isn't on the slip.",
    ],
    "delivery": [
        "The courier claims somebody was home, but we weren't.",
        "The postman threw it over the fence.",
        "Is the freight already on its way?",
        "Nothing has turned up so far.",
        "Which carrier handles the goods tomorrow?",
        "It was handed to a neighbour whom we don't see.",
        "The van passed our house.",
        "It was supposed to be here a week ago.",
        "Has my purchase been dispatched yet?",
        "Drop it at the post office instead.",
        "The letter went to our former street.",
        "The warehouse hasn't posted it yet.",
        "Customs holds our crate at the airport.",
        "Could the courier call before he is here?",
        "The ferry with our goods is anchored at sea.",
        "Our mailbox is bare, when is it coming?",
    ],
    "returns": [
        "These boots pinch, we'd rather try a wider size.",
        "The vase has a crack, may we have a fresh one?",
        "Our carpet is too thick, what now?",
        "Pick up this sofa again, it's ugly at our place.",
        "The sweater is huge on her, medium would do.",
        "We unpacked a kettle with a dent, take it away.",
        "We asked for socks, not gloves.",
        "Does unused perfume qualify for reimbursement?",
        "The curtains are too narrow, we don't keep them.",
        "Whom do I mail these unwanted earrings?",
        "Unfit: her coat is tight, could we trade?",
        "A zipper was ripped, reimburse us.",
        "We chose green wallpaper and unrolled purple.",
        "How do I hand in a scarf that she didn't want?",
        "We'd prefer cotton, would you take the wool one?",
        "The blouse is loose at her shoulders, what are our options?",
    ],
    "login": [
        "The two-factor token isn't valid.",
        "I'm shut out of our profile.",
        "A hacker seized my credentials.",
        "The authenticator got wiped with his former mobile.",
        "My PIN keeps being refused.",
        "Verification texts don't show up.",
        "We cannot authenticate.",
        "Captcha after captcha, it won't let her enter.",
        "I don't remember which username we registered.",
        "Recover our credentials, please.",
        "He isn't let inside again.",
        "Too many attempts, now I'm blocked.",
        "Our passcode isn't recognised.",
        "Her thumbprint doesn't let her into the portal.",
        "Which username did we choose in May?",
        "Our second factor is on a stolen mobile.",
    ],
    "fault": [
        "The display flickers all evening.",
        "Bluetooth drops whenever we walk around.",
        "A yellow light blinks and nothing warms up.",
        "Our router reboots constantly.",
        "The keyboard skips letters.",
        "It overheats, then shuts down.",
        "There is a bug: dragging files hangs the program.",
        "The vacuum has no suction.",
        "Installation fails halfway.",
        "The microphone crackles badly.",
        "Smoke came out of the toaster.",
        "Uploads never finish.",
        "The thermostat shows minus ninety.",
        "Wifi breaks down whenever it snows.",
        "The hinge squeaks and jams.",
        "Many pixels are white.",
    ],
    "praise": [
        "Fantastic, keep it up!",
        "Your staff went out of their way, we're grateful.",
        "I was impressed by how warmly Maria treated us.",
        "Superb quality, worth every penny.",
        "Compliments, such a delicious breakfast!",
        "We couldn't be more satisfied.",
        "Brilliant idea, I'm in awe.",
        "Hats off, marvellous!",
        "She was patient and solved it cleverly.",
        "A delight, we recommend it warmly.",
        "Our kids adore these toys.",
        "Awesome experience, cheers!",
        "It exceeds what we dreamed of.",
        "Congratulations, truly outstanding.",
        "We were moved to tears of joy.",
        "Top marks, we couldn't wish for more.",
    ],
}

# The only words, inflections included, that the held-out messages share with those of the training.
COMMON = """
a after again all although an and are at but by came didn't do does doesn't don't every everything
for found from got has hasn't have here how i in is it many me more my never no not nothing now of
on one please shows so somebody such take that the there this three to too two up want was went what
when with would you your
"""


def content_words(text: str) -> set[str]:
    """The words that carry a message's meaning, cut to five letters so that inflections meet."""
    words = set(re.findall(r"[a-z']+", text.lower()))
    return {word[:5] for word in words - set(COMMON.split())}


def train_examples() -> list[tuple[str, str]]:
    rng = random.Random(7)
    examples = []
    for label, messages in TRAINING.items():
        for message in messages:
            for _ in range(8):
                opener = rng.choice(OPENERS)
                text = f"{opener}{message}" if opener else message[0].upper() + message[1:]
                examples.append((f"{text}{rng.choice(CLOSERS)}", label))
    return examples


def held_out_examples() -> list[tuple[str, str]]:
    """Written by hand, without a content word that the training messages use."""
    return [(message, label) for label, messages in HELD_OUT.items() for message in messages]


def score(prompt: str, expected: str, answer: str) -> float:
    return float(answer == expected)
