"""What the captions of one picture say together: the questions that they answer, and what is there. See caption_questions.py.

The rules go over words. A fact counts where captions agree on it, and none contradicts it.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from nanochat.data import caption_words as words

AGREE = 2  # captions that must say the same of what a person or an animal does, and where

ONE = words.PERSONS | words.ANIMALS
SEVERAL = words.SEVERAL_PERSONS | words.SEVERAL_ANIMALS
NOUNS = ONE | SEVERAL
PATTERN = "pattern"
PREPOSITIONS = set("in on at through across down along into onto up inside".split())
# words that end a noun phrase
STOP = PREPOSITIONS | set(
    "and with while as of near by to over from for behind that which is are who whilst beside next under during off out around "
    "toward towards has have being wearing above against between among after before his her its their a an the".split()
)


@dataclass(frozen=True)
class Question:
    kind: str
    text: str
    answer: str


@dataclass(frozen=True)
class Mention:
    """A person or an animal in a caption. place: the index of its word; name: its class; number: None if it is not said."""

    place: int
    name: str
    number: int | None

    @property
    def is_person(self) -> bool:
        return self.name in words.MAY_BE


@dataclass(frozen=True)
class Subject:
    """The only person, animal or group of its sort in a picture, to ask about. name: "man" or "dog", also of several."""

    name: str
    several: bool = False

    @property
    def is_person(self) -> bool:
        return self.name in words.MAY_BE

    @property
    def verb(self) -> str:
        return "are" if self.several else "is"

    @property
    def called(self) -> str:
        return plural(self.name) if self.several else self.name

    def in_caption(self, found: Sequence[Mention]) -> Mention | None:
        """Where a caption speaks of it; None if it does not, or may speak of others."""
        own = [mention for mention in found if mention.name == self.name] or [
            mention for mention in found if self.name in words.MAY_BE.get(mention.name, ())
        ]
        return own[0] if len(own) == 1 and (own[0].number != 1) == self.several else None


@dataclass(frozen=True)
class Facts:
    """questions: all that can be asked, before they are balanced. present, absent: nouns of "is there ...?"."""

    questions: list[Question]
    present: set[str]
    absent: set[str]


def read_captions(captions: Iterable[str]) -> Facts:
    texts = [words_of(caption) for caption in captions]
    seen = [mentions(tokens) for tokens in texts]
    known = list(subjects(seen))
    found = [*numbers(texts, seen), *colors(texts, seen, known), *kinds_of_things(texts, seen), *places(texts, known)]
    for subject in known:
        found += about(subject, texts, seen)
        found += worn_by(subject, texts, seen)
    present = {noun for noun, (own, _) in words.PRESENCE.items() if votes(texts, own) >= AGREE}
    absent = set(absent_nouns(texts)) if len(texts) > AGREE else set()
    return Facts(list(dict.fromkeys(found)), present, absent)


def words_of(caption: str) -> list[str]:
    """In lower case, without the possessive "'s", and with clothes of two words as one."""
    text = caption.lower().replace("'s", "").replace("wet suit", "wetsuit")
    return re.findall(r"[a-z0-9]+(?:-[a-z0-9]+)*", re.sub(r"\b(bathing|swim|swimming) suit", "swimsuit", text))


def votes(texts: Sequence[Sequence[str]], forms: Iterable[str]) -> int:
    """The number of captions with one of the words."""
    forms = frozenset(forms)
    return sum(not forms.isdisjoint(tokens) for tokens in texts)


def absent_nouns(texts: Sequence[Sequence[str]]) -> Iterator[str]:
    """The nouns of "is there ...?" that no caption mentions, nor anything that often comes with them."""
    said = {token for tokens in texts for token in tokens}
    for noun, (own, related) in words.PRESENCE.items():
        may_be_meant = noun in words.PERSONS_PRESENT and not words.ANY_PERSON.isdisjoint(said)
        if not may_be_meant and own.isdisjoint(said) and related.isdisjoint(said):
            yield noun


def mentions(tokens: Sequence[str]) -> list[Mention]:
    """The persons and animals in a caption. A noun before another one only describes it: "dog" in "dog toy"."""
    found = []
    for place, token in enumerate(tokens):
        following = tokens[place + 1] if place + 1 < len(tokens) else ""
        describes = following in NOUNS or following in words.THINGS and following not in words.BARE
        if describes or token == "couple" and following == "of":
            continue
        if token in ONE:
            found.append(Mention(place, ONE[token], 1))
        elif token in SEVERAL:
            before = tokens[max(0, place - 4) : place]
            number = next((words.NUMBERS[word] for word in reversed(before) if word in words.NUMBERS), None)
            pair = token == "couple" or number is None and "couple" in before
            found.append(Mention(place, SEVERAL[token], 2 if pair else number))
    return found


def common_name(found: Iterable[Mention]) -> str:
    """What persons are called if the captions mean the same ones: "boy" for "boy" and "child"; "" if they cannot."""
    possible = set.intersection(*(words.MAY_BE[mention.name] for mention in found))
    return next((name for name in ("person", "child", *sorted(possible)) if name in possible), "")


def subjects(seen: Sequence[list[Mention]]) -> Iterator[Subject]:
    """Persons and animals of whom most captions mention exactly one, or one group."""
    persons = [[mention for mention in found if mention.is_person] for found in seen]
    persons = [found for found in persons if found]
    if sum(len(found) > 1 for found in persons) >= AGREE:
        yield from (Subject(name) for name in ("man", "woman", "boy", "girl") if is_one_of_several(name, persons))
    elif len(persons) > AGREE and all(len(found) == 1 for found in persons):
        name = common_name(mention for [mention] in persons)
        several = {mention.number != 1 for [mention] in persons}
        if name and len(several) == 1:
            yield Subject(name, *several)
    for name in dict.fromkeys(words.ANIMALS.values()):
        own = [[mention for mention in found if mention.name == name] for found in seen]
        own = [found for found in own if found]
        several = {mention.number != 1 for found in own for mention in found}
        if len(own) > AGREE and all(len(found) == 1 for found in own) and len(several) == 1:
            yield Subject(name, *several)


def is_one_of_several(name: str, persons: Sequence[list[Mention]]) -> bool:
    """Whether there is one "man", say, besides other persons: no caption has two, or a person beside him that may be another."""
    literal = [sum(mention.name == name for mention in found) for found in persons]
    single = [sum(name in words.MAY_BE[m.name] and m.number == 1 for m in found) for found in persons]
    several = any(mention.name == name and mention.number != 1 for found in persons for mention in found)
    return sum(literal) > AGREE and max(single) == 1 and not several


def plural(name: str) -> str:
    return words.PLURALS.get(name, f"{name}s")


def numbers(texts: Sequence[Sequence[str]], seen: Sequence[list[Mention]]) -> Iterator[Question]:
    """How many there are, where all captions that say it agree, and at least AGREE do."""
    for name in ["person", *dict.fromkeys(words.ANIMALS.values())]:
        own = [[m for m in found if m.name == name or name == "person" and m.is_person] for found in seen]
        own = [found for found in own if found]
        sums = [sum(m.number for m in found) for found in own if all(m.number for m in found)]
        vague = len(own) - len(sums)
        if len(sums) < AGREE or len(set(sums)) > 1 or name == "person" and votes(texts, words.CROWDS):
            continue
        if sums[0] == 1 and (vague or len(sums) <= AGREE) or vague > len(sums):
            continue
        names = {name}
        if name == "person":
            names.add(common_name(m for found in own for m in found))
        for called in sorted(names - {""}):
            yield Question("number", f"how many {plural(called)} are there?", str(sums[0]))


def colors(
    texts: Sequence[Sequence[str]], seen: Sequence[list[Mention]], known: Sequence[Subject]
) -> Iterator[Question]:
    """Of things that all captions give the same colour. Clothes are asked about where there is one person, and animals where
    there is one of them."""
    single = {subject.name for subject in known if not subject.several}
    one_person = any(subject.is_person and not subject.several for subject in known) and all(
        sum(mention.is_person for mention in found) <= 1 for found in seen
    )
    asked = (
        words.COLORED | (words.CLOTHES if one_person else {}) | {f: n for f, n in words.ANIMALS.items() if n in single}
    )
    found: dict[str, list[str]] = {}
    for tokens in texts:
        for place, token in enumerate(tokens):
            following = tokens[place + 1] if place + 1 < len(tokens) else ""
            if token in asked and following not in asked:
                found.setdefault(asked[token], []).append(color_before(tokens, place))
    everything = {token for tokens in texts for token in tokens}
    for name, said in found.items():
        said = [color for color in said if color]
        if (
            said
            and len(set(said)) == 1
            and said[0] != PATTERN
            and (name == "hair" or "blond" not in said[0])
            and f"{name}s" not in everything
        ):
            verb = "are" if name in words.PAIRS else "is"
            yield Question("color", f"what color {verb} the {name}?", said[0])


def color_before(tokens: Sequence[str], place: int) -> str:
    """The colour that the noun phrase with its noun at `place` begins with, "black and white" too; "" if it has none."""
    start = place
    while start > 0 and place - start < 5 and tokens[start - 1] not in STOP - {"and"}:
        start -= 1
    phrase = tokens[start:place]
    if words.PATTERNS & set(phrase):
        return PATTERN
    found = [i for i, token in enumerate(phrase) if token in words.COLORS]
    if not found or place - start - found[-1] > 3 or "and" in phrase[found[-1] :]:
        return ""
    pair = len(found) > 1 and found[-1] - found[-2] == 2 and phrase[found[-1] - 1] == "and"
    named = [words.COLORS[phrase[i]] for i in (found[-2:] if pair else found[-1:])]
    return " and ".join(sorted(named))


def kinds_of_things(texts: Sequence[Sequence[str]], seen: Sequence[list[Mention]]) -> Iterator[Question]:
    animals = [{m.name for m in found if not m.is_person} for found in seen]
    if sum(map(bool, animals)) > AGREE and len(set.union(*animals)) == 1:
        yield Question("object", "what animal is in the picture?", set.union(*animals).pop())
    for kind, text, table in (
        ("object", "what vehicle is in the picture?", words.VEHICLES),
        ("activity", "what sport is this?", words.SPORTS),
    ):
        found = [{table[token] for token in tokens if token in table} for tokens in texts]
        if sum(map(bool, found)) > AGREE and len(set.union(*found)) == 1:
            yield Question(kind, text, set.union(*found).pop())


# ---- what one subject does, where, with what


def about(subject: Subject, texts: Sequence[Sequence[str]], seen: Sequence[list[Mention]]) -> Iterator[Question]:
    doing, objects = Counter(), {}
    for tokens, found in zip(texts, seen, strict=True):
        mention = subject.in_caption(found)
        if mention is None:
            continue
        start = mention.place + 1
        end = next((other.place for other in found if other.place >= start), len(tokens))
        verbs = list(verbs_in(tokens[:end], start, subject.several))
        activity = next((verb for _, verb in verbs if verb not in words.NOT_AN_ACTIVITY), None)
        doing.update([activity] if activity else [])
        for asked, thing in things(tokens, verbs, subject):
            objects.setdefault(asked, set()).add(thing)
    activity, name = agreed(doing), subject.called
    if activity:
        yield Question("activity", f"what {subject.verb} the {name} doing?", activity)
    if subject.name != "person" and all(subject.in_caption(found) and len(found) == 1 for found in seen if found):
        yield Question("object", f"who is {activity}?" if activity else "who is in the picture?", name)
    for asked, answers in objects.items():
        posture = asked.split()[0] in ("sitting", "lying", "standing")
        if len(answers) == 1 and (not posture or activity == asked.split()[0]):
            yield Question("object", f"what {subject.verb} the {name} {asked}?", *answers)
    worn = {words.HEADWEAR[token] for tokens in texts for token in tokens if token in words.HEADWEAR}
    if subject.is_person and not subject.several and len(worn) == 1 and votes(texts, words.HEADWEAR) >= AGREE:
        yield Question("object", f"what is on the {name}'s head?", *worn)


def worn_by(subject: Subject, texts: Sequence[Sequence[str]], seen: Sequence[list[Mention]]) -> Iterator[Question]:
    """What most captions say that the only person of the picture wears."""
    alone = subject.is_person and not subject.several
    if not alone or any(sum(mention.is_person for mention in found) > 1 for found in seen):
        return
    garment = agreed(Counter(name for tokens in texts for name in {words.WORN[t] for t in tokens if t in words.WORN}))
    if garment:
        yield Question("object", f"what is the {subject.name} wearing?", garment)


def agreed(found: Counter) -> str | None:
    """What at least AGREE captions say, and more than say anything else."""
    first, second = (found.most_common(2) + [("", 0)] * 2)[:2]
    return first[0] if first[1] >= AGREE and first[1] > second[1] else None


def verbs_in(tokens: Sequence[str], start: int, several: bool) -> Iterator[tuple[int, str]]:
    """(place, form in -ing) of the verbs from `start` on."""
    for place in range(start, len(tokens)):
        token, before = tokens[place], tokens[place - 1]
        after = tokens[place + 1] if place + 1 < len(tokens) else ""
        if token in words.GERUNDS and before not in words.ARTICLES | PREPOSITIONS and after not in words.AFTER_A_NOUN:
            yield place, words.GERUNDS[token]
        elif several and token in words.BARE and (place == start or before in ("who", "and", "that")):
            yield place, words.BARE[token]


def things(tokens: Sequence[str], verbs: Iterable[tuple[int, str]], subject: Subject) -> Iterator[tuple[str, str]]:
    """(the verb to ask with, the thing): "holding", "ball"."""
    for place, verb in verbs:
        particle = tokens[place + 1] if tokens[place + 1 : place + 2] and tokens[place + 1] in words.PARTICLES else ""
        said = f"{verb} {particle}".strip()
        thing = head_noun(tokens, place + 1 + bool(particle))
        for asked, meant in words.OBJECT_OF.items():
            if said in meant and thing:
                yield "carrying" if asked == "holding" and not subject.is_person else asked, thing
    if not subject.is_person and "mouth" in tokens:
        place = tokens.index("mouth")
        if place > 2 and tokens[place - 2] == "in" and tokens[place - 3] in words.THINGS:
            yield "carrying", words.THINGS[tokens[place - 3]]


def head_noun(tokens: Sequence[str], start: int) -> str:
    """The thing that the noun phrase at `start` is about: "ball" of "a red tennis ball". "" if it is not in the list."""
    while start < len(tokens) and tokens[start] in words.ARTICLES:
        start += 1
    end = start
    while end < len(tokens) and tokens[end] not in STOP and tokens[end] not in words.GERUNDS:
        end += 1
    return words.THINGS.get(tokens[end - 1], "") if end > start else ""


def places(texts: Sequence[Sequence[str]], known: Sequence[Subject]) -> Iterator[Question]:
    """Where most captions agree that it is, of the first subject or of the picture."""
    found = Counter(place for tokens in texts for place in set(places_in(tokens)))
    answer = agreed(found)
    if answer:
        subject = known[0] if known else None
        text = f"where {subject.verb} the {subject.called}?" if subject else "where was this picture taken?"
        yield Question("place", text, answer)


def places_in(tokens: Sequence[str]) -> Iterator[str]:
    for place, token in enumerate(tokens):
        after = tokens[place + 1] if place + 1 < len(tokens) else ""
        if token not in words.PLACES or after in words.PLACES or after in words.THINGS or after == "covered":
            continue
        before = next((w for w in reversed(tokens[max(0, place - 5) : place]) if w in STOP - words.ARTICLES), "")
        if before in PREPOSITIONS - {"into", "onto"} and (before != "at" or token not in words.ONLY_SEEN):
            yield words.PLACES[token]
