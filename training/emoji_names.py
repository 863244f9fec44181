"""The names of emoji: those of Unicode and emojibase, and the plain words that a person uses instead."""

import itertools
import json
import random
import re
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from npm_packages import read
from prompts import with_article

NAME_FILES = ("en/data.json", "en/shortcodes/emojibase.json", "meta/groups.json")
EVERYDAY = 200  # how many things measure plain words

# What a person calls the members of Unicode's subgroups. Subgroups without a common word are left out.
KINDS = {
    "face-smiling": ["smiling face", "face", "happy face"],
    "face-affection": ["face", "loving face"],
    "face-tongue": ["face", "face with tongue"],
    "face-hand": ["face", "face with hand"],
    "face-neutral-skeptical": ["face"],
    "face-sleepy": ["face", "sleepy face", "tired face"],
    "face-unwell": ["face", "sick face"],
    "face-hat": ["face", "face with hat"],
    "face-glasses": ["face", "face with glasses"],
    "face-concerned": ["face", "sad face", "worried face"],
    "face-negative": ["face", "angry face"],
    "face-costume": ["costume", "mask"],
    "cat-face": ["cat", "cat", "animal", "pet"],
    "monkey-face": ["monkey", "monkey", "animal"],
    "heart": ["heart", "love"],
    "hand-fingers-open": ["hand", "gesture"],
    "hand-fingers-partial": ["hand", "gesture"],
    "hand-single-finger": ["hand", "finger"],
    "hand-fingers-closed": ["hand", "fist"],
    "hands": ["hands"],
    "hand-prop": ["hand"],
    "body-parts": ["body part", "part of the body"],
    "person": ["person", "human"],
    "person-gesture": ["person", "gesture"],
    "person-role": ["person", "job", "profession"],
    "person-fantasy": ["person", "fantasy character"],
    "person-activity": ["person", "activity"],
    "person-sport": ["person", "athlete", "sport"],
    "person-resting": ["person"],
    "family": ["people", "family"],
    "animal-mammal": ["animal", "mammal"],
    "animal-bird": ["animal", "bird"],
    "animal-amphibian": ["animal", "amphibian"],
    "animal-reptile": ["animal", "reptile"],
    "animal-marine": ["animal", "sea animal"],
    "animal-bug": ["animal", "bug", "insect"],
    "plant-flower": ["plant", "flower"],
    "plant-other": ["plant"],
    "food-fruit": ["food", "fruit", "something to eat"],
    "food-vegetable": ["food", "vegetable", "something to eat"],
    "food-prepared": ["food", "meal", "something to eat"],
    "food-asian": ["food", "Asian food", "something to eat"],
    "food-sweet": ["food", "dessert", "something sweet", "something to eat"],
    "drink": ["drink", "something to drink"],
    "dishware": ["dishes", "tableware"],
    "place-map": ["map", "place"],
    "place-geographic": ["landscape", "place"],
    "place-building": ["building", "place"],
    "place-religious": ["building", "place of worship"],
    "place-other": ["place", "scene"],
    "transport-ground": ["vehicle", "transport"],
    "transport-water": ["boat", "vehicle", "transport"],
    "transport-air": ["aircraft", "vehicle", "transport"],
    "time": ["time", "clock"],
    "sky-weather": ["weather", "sky"],
    "event": ["celebration", "holiday"],
    "award-medal": ["award", "prize"],
    "sport": ["sport", "sports equipment"],
    "game": ["game", "toy"],
    "arts-crafts": ["art", "craft"],
    "clothing": ["clothing", "clothes", "something to wear"],
    "sound": ["sound"],
    "music": ["music"],
    "musical-instrument": ["musical instrument", "instrument"],
    "phone": ["phone", "device"],
    "computer": ["computer", "device"],
    "light-video": ["light", "video"],
    "book-paper": ["paper", "something to read"],
    "money": ["money"],
    "mail": ["mail", "post"],
    "writing": ["something to write with"],
    "office": ["office supplies"],
    "lock": ["lock", "security"],
    "tool": ["tool"],
    "science": ["science"],
    "medical": ["medicine", "medical"],
    "household": ["household item"],
    "transport-sign": ["sign", "traffic sign"],
    "warning": ["sign", "warning sign"],
    "arrow": ["arrow"],
    "religion": ["symbol", "religious symbol"],
    "zodiac": ["zodiac sign", "star sign"],
    "av-symbol": ["button", "symbol"],
    "math": ["mathematical symbol"],
    "punctuation": ["punctuation mark"],
    "currency": ["money", "currency"],
    "keycap": ["number", "key"],
    "alphanum": ["sign", "letters"],
    "geometric": ["shape", "geometric shape"],
    "flag": ["flag"],
    "country-flag": ["flag", "flag of a country"],
    "subdivision-flag": ["flag"],
}


@dataclass
class Entry:
    """One emoji and its names."""

    hexcode: str
    name: str  # "flag of France"
    synonyms: list[str]
    tags: list[str]
    slugs: list[str] = field(default_factory=list)  # its possible names in icon sets, the likeliest first
    plain: list[str] = field(default_factory=list)  # "cat" for "smiling cat with heart-eyes", the likeliest first
    kinds: list[str] = field(default_factory=list)  # what it is one of: "mammal", "animal"
    everyday: bool = False  # one of the 200 things of demo_quality.py


def read_entries(folder: Path) -> list[Entry]:
    """All emoji of emojibase, with the names that emojibase and Unicode give them."""
    files = read(folder, "emojibase-data", lambda name: name in NAME_FILES)
    listed = json.loads(files["en/data.json"])
    shortcodes = json.loads(files["en/shortcodes/emojibase.json"])
    unicode_file = read(folder, "emoji-datasource-google", lambda name: name == "emoji.json")["emoji.json"]
    unicode = {code(item["unified"]): item for item in json.loads(unicode_file)}
    subgroups = json.loads(files["meta/groups.json"])["subgroups"]
    listed = [item for item in listed if item.get("group") not in (None, 2)]  # letters of flags; skin tones and hair
    group_of_word = {item["label"]: item["group"] for item in listed if item["label"].isalpha()}
    everyday = everyday_codes(listed)
    entries = []
    for item in listed:
        key, label = code(item["hexcode"]), item["label"].replace("’", "'")
        codes = shortcodes.get(item["hexcode"], [])
        names = [spoken(name.replace("_", " ")) for name in ([codes] if isinstance(codes, str) else codes)]
        slugs = [slug(label)]
        if label.startswith("flag: "):
            country = label.removeprefix("flag: ")
            names, slugs = [f"{country} flag", label], [*slugs, slug(f"flag for {country}"), slug(country)]
        if known := unicode.get(key):
            if known["name"] and "FLAG" not in known["name"]:
                names.append(spoken(known["name"].lower()))
            slugs += [slug(name) for name in (known["name"] or "", *known["short_names"])]
        name = spoken(label)
        synonyms = [other for other in dict.fromkeys(names) if other != name]
        subgroup = subgroups[str(item["subgroup"])]
        tags = [tag for tag in item.get("tags", ()) if len(tag) > 2]
        # The keyword "dog" of a hot dog is the name of something else. The "cat" of the cat faces is not.
        foreign = {tag for tag in tags if group_of_word.get(tag, item["group"]) != item["group"]}
        tags = [tag for tag in tags if tag not in foreign or tag in subgroup]
        entry = Entry(key, name, synonyms, tags, [text for text in slugs if text])
        entry.plain, entry.kinds = plain_names(name, tags), KINDS.get(subgroup, [])
        entry.everyday = item["hexcode"] in everyday
        entries.append(entry)
    return entries


def everyday_codes(listed: list[dict[str, Any]]) -> set[str]:
    """The 200 things that measure plain words, by a rule: the oldest emoji whose Unicode name is one lower-case word.

    Animals, nature, food, drink, travel, places, activities and objects count. Emoji of the same version are taken in
    Unicode's order.
    """
    things = [item for item in listed if item["group"] in (3, 4, 5, 6, 7) and re.fullmatch("[a-z]+", item["label"])]
    things.sort(key=lambda item: (item["version"], item["order"]))
    return {item["hexcode"] for item in things[:EVERYDAY]}


def plain_names(name: str, tags: list[str]) -> list[str]:
    """What a person calls it: "red apple" is an apple, "dog face" a dog, "smiling cat with heart-eyes" a cat.

    What follows "with", "of" and similar words is dropped, and "face" at the end. Of the rest, the last words count if
    they are the whole name or one of the emoji's keywords.
    """
    base = re.split(r" (?:with|of|in|on|holding|facing) ", name)[0]
    base = base.removesuffix(" face") if base.removesuffix(" face") in tags else base
    words = base.split(" ")
    ends = [" ".join(words[start:]) for start in range(len(words))]
    return [end for end in reversed(ends) if end == name or end in tags]


def plural(noun: str) -> str:
    """The plural by simple rules: "cats", "boxes", "cherries"."""
    if noun.endswith(("s", "x", "z", "ch", "sh")):
        return noun if noun.endswith("s") and not noun.endswith(("ss", "us")) else f"{noun}es"
    return f"{noun[:-1]}ies" if re.search("[^aeiou]y$", noun) else f"{noun}s"


def phrases(entry: Entry, pick: random.Random) -> list[str]:
    """The name, then what a person might write instead. A phrase stands more than once if it shall be used more often.

    Of up to 21 lines, 9 are full names, 5 plain nouns, 5 keywords, and 2 tell what kind of thing it is.
    """
    names = [entry.name, *pick.sample(entry.synonyms, min(3, len(entry.synonyms)))]
    lines = [name for name, _ in zip(itertools.cycle(names), range(9))]
    if entry.plain:
        nouns = [*entry.plain, entry.plain[0], plural(entry.plain[0])]
        lines += [noun for noun, _ in zip(itertools.cycle(nouns), range(5))]
    lines += pick.sample(entry.tags, min(4, len(entry.tags)))
    if entry.tags:
        lines.append(f"{entry.name}, {', '.join(pick.sample(entry.tags, min(2, len(entry.tags))))}")
    lines += pick.sample(entry.kinds, min(2, len(entry.kinds)))
    return lines


def spoken(label: str) -> str:
    """A label in spoken English: "family: man, woman, boy" becomes "family of a man, a woman and a boy"."""
    head, colon, tail = label.partition(": ")
    if not colon:
        return label
    if head == "flag":
        return f"flag of {tail}"
    if head == "keycap":
        return f"keycap {tail}"
    if head in ("family", "kiss", "couple with heart"):
        people = [with_article(person) for person in tail.split(", ")]
        return f"{head} of {' and '.join([', '.join(people[:-1]), people[-1]] if people[1:] else people)}"
    if head in ("man", "woman", "person"):
        return f"{head} who is bald" if tail == "bald" else f"{head} with {'a ' * (tail == 'beard')}{tail}"
    return f"{head} {tail}"


def code(hexcode: str) -> str:
    """The code points without variation selectors, which some vendors write and others omit."""
    return hexcode.upper().replace("-FE0F", "")


def slug(text: str) -> str:
    """The text in the spelling of icon names: "flag for Åland Islands" becomes "flag-for-aland-islands"."""
    text = text.lower().replace("&", "and").replace("'", "").replace("’", "")
    text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    return re.sub("[^a-z0-9]+", "-", text).strip("-")
