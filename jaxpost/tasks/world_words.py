"""The words of the invented country: what exists there, how its facts are stated, and how one asks for them.

No word of `ASKED` occurs in the sentences on people, so a search by words does not find a person by a description.
"""

from typing import NamedTuple

_WORDS = (
    "Ashvale Brindle Corham Dunwick Elmstead Fenmoor Garrow Hexby Inverley Kestle "
    "Lydmere Morrow Norwood Ormsea Pellham Quenby Rushden Sandwick Thornby Ulver",
    "river hill oak bridge lake gate well tower cave island marsh cliff forest desert "
    "fountain mill castle valley spring quarry",
    "Abbey Crown Court Mint Library Harbour Hospital Guard Circus Museum Stables Lighthouse",
    "Flood Fire Frost Comet Siege Harvest Plague Eclipse Feast Storm Drought Truce",
    "Bra Del Fen Gor Hal Jun Kel Lor Mar Nim Ost Pel Quo Ras Sol Tam Und Vor Wil Yan",
    "a e i o u ba di lo mu ne ri so",
    "bel can dor fin gan hild jar kin lek mir nuth pas quin rod sten tav vik wen xa zet",
)
# A name is a syllable of each list.
TOWNS, LANDMARKS, EMPLOYERS, EVENTS, *SYLLABLES = (
    tuple(words.split()) for words in _WORDS
)  # a name is a syllable of each list
PRODUCTS = {
    "baker": "bread", "smith": "nails", "weaver": "cloth", "potter": "jugs", "cooper": "barrels",
    "miller": "flour", "brewer": "beer", "tailor": "coats", "mason": "walls", "tanner": "leather",
    "cobbler": "shoes", "chandler": "candles", "scribe": "books", "painter": "pictures", "jeweller": "rings",
    "joiner": "tables", "glazier": "windows", "wright": "carts", "fletcher": "arrows", "founder": "bells",
}  # fmt: skip
# The taxonomy of skills: a skill is of a field, and a field of a branch.
FIELDS = {
    "music": ("singing", "drumming", "fiddling", "whistling"),
    "theatre": ("acting", "dancing", "juggling", "clowning"),
    "farming": ("ploughing", "shearing", "milking", "mowing"),
    "building": ("roofing", "digging", "sawing", "paving"),
}
BRANCHES = {"art": ("music", "theatre"), "labour": ("farming", "building")}
YEARS = [str(year) for year in range(1000, 1250)]

# Closed lists of what may be an object, by kind; people are the other kind.
OBJECTS = {
    "town": TOWNS,
    "landmark": LANDMARKS,
    "trade": list(PRODUCTS),
    "product": list(PRODUCTS.values()),
    "skill": [skill for skills in FIELDS.values() for skill in skills],
    "field": list(FIELDS),
    "branch": list(BRANCHES),
    "employer": EMPLOYERS,
    "event": EVENTS,
    "year": YEARS,
}
ARTICLES = {"event": "the ", "employer": "the ", "landmark": "the ", "trade": "a "}

SOURCES = {  # by style; what is wrong comes from the second source of letters and gossip
    "chronicle": ("annals", "yearbook"),
    "letter": ("courier", "pigeon"),
    "gossip": ("inn", "street"),
    "register": ("archive", "census"),
    "almanac": ("almanac",),
}
STYLES = ("chronicle", "letter", "gossip", "register")  # of documents on people
FRAMES = {
    "chronicle": "It is written in the {source}: {body}",
    "letter": "Dear cousin! {body} Farewell.",
    "gossip": "Have you heard? {body} So people say.",
    "register": "Entry: {body}",
    "almanac": "{body}",
}
NOISY = {"the", "of", "is", "a", "in", "by", "to", "was", "as", "that"}  # what a noisy document loses or repeats

ASKED = (
    "Who makes {product} in the town by the {landmark}?",
    "Somebody near the {landmark} sells {product}: who?",
    "Find a person from the place at the {landmark} with {product} for sale.",
)


class Relation(NamedTuple):
    """A relation of a kind of subject to a kind of object.

    sentences: the first ends in its object and has the label before its subject, for prompts that the object completes.
    """

    subject: str
    object: str
    label: str
    topic: str
    sentences: tuple[str, ...]
    questions: tuple[str, ...]


RELATIONS = {
    "town": Relation(
        "person", "town", "home", "places",
        ("The home of {s} is {o}.", "{s} lives in {o}.", "You meet {s} in {o}.", "{s} has a house in {o}."),
        ("What is the home of {s}?", "Where does {s} live?"),
    ),
    "trade": Relation(
        "person", "trade", "trade", "work",
        ("The trade of {s} is that of {o}.", "{s} works as {o}.", "{s} earns a living as {o}.", "{s} became {o}."),
        ("What is the trade of {s}?", "What does {s} work as?"),
    ),
    "skill": Relation(
        "person", "skill", "skill", "work",
        ("The skill of {s} is {o}.", "{s} is good at {o}.", "{s} likes {o} best.", "{s} is known for {o}."),
        ("What is the skill of {s}?", "What is {s} good at?"),
    ),
    "employer": Relation(
        "person", "employer", "employer", "work",
        ("The employer of {s} is {o}.", "{s} serves {o}.", "{s} is paid by {o}.", "{s} takes orders from {o}."),
        ("What is the employer of {s}?", "Whom does {s} serve?"),
    ),
    "friend": Relation(
        "person", "person", "friend", "people",
        ("The friend of {s} is {o}.", "{s} trusts {o}.", "{s} shares every secret with {o}.", "{s} often visits {o}."),
        ("Who is the friend of {s}?", "Whom does {s} trust?"),
    ),
    "teacher": Relation(
        "person", "person", "teacher", "people",
        ("The teacher of {s} is {o}.", "{s} learned from {o}.", "{s} was the pupil of {o}.", "{s} owes every lesson to {o}."),
        ("Who is the teacher of {s}?", "From whom did {s} learn?"),
    ),
    "event": Relation(
        "person", "event", "adventure", "events",
        ("The adventure of {s} was {o}.", "{s} lived through {o}.", "{s} saw {o}.", "{s} never forgot {o}."),
        ("What was the adventure of {s}?", "What did {s} live through?"),
    ),
    "landmark": Relation(
        "town", "landmark", "landmark", "places",
        ("The landmark of {s} is {o}.", "{s} lies by {o}."),
        ("What is the landmark of {s}?", "What does {s} lie by?"),
    ),
    "product": Relation(
        "trade", "product", "product", "work",
        ("The product of {s} is {o}.", "{s} makes {o}.", "{s} sells {o}."),
        ("What is the product of {s}?",),
    ),
    "field": Relation(
        "skill", "field", "field", "work",
        ("The field of {s} is {o}.", "{s} is a kind of {o}."),
        ("What is the field of {s}?", "What is {s} a kind of?"),
    ),
    "branch": Relation(
        "field", "branch", "branch", "work",
        ("The branch of {s} is {o}.", "{s} is a kind of {o}."),
        ("What is the branch of {s}?",),
    ),
    "year": Relation(
        "event", "year", "year", "events",
        ("The year of {s} is {o}.", "{s} came in {o}.", "{s} began in {o}."),
        ("What is the year of {s}?", "When did {s} come?"),
    ),
}  # fmt: skip
