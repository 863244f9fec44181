"""Make folders of captioned images from emoji, to train the demo model and to measure it.

    pip install -c constraints.txt -e ".[examples]"
    python training/emoji_data.py emoji                        npm downloads the packages (about 170 MB)
    python training/emoji_data.py emoji --packages downloads   uses the .tgz files in this folder, if they exist

    emoji/train/            nine sets, whose licences permit training and sharing the result
    emoji/twemoji/          never trained on: ordinary colour images
    emoji/openmoji-black/   never trained on: thin black outlines
    emoji/openmoji-color/   never trained on: the same drawings in colour
    emoji/names.txt         the names of all emoji

Each folder holds PNGs of 64 pixels with a transparent background, and a captions.csv (image, caption). The list of
emoji, their names and their tags come from emojibase. The first caption of an image is its bare name. Flags are
included, skin tones are not.
"""

import argparse
import csv
import gzip
import io
import json
import random
import re
import shutil
import subprocess
import tarfile
import tempfile
import unicodedata
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import shared
from PIL import Image

SIZE = 64  # pixels: the size of the images in the PNG packages

PACKAGES = {
    "emojibase-data": "17.0.0",  # MIT: names and tags
    "emoji-datasource-google": "16.0.0",  # Apache 2.0
    "emoji-datasource-twitter": "16.0.0",  # Twemoji, CC BY 4.0
    "@iconify-json/noto-v1": "1.2.5",  # Apache 2.0
    "@iconify-json/fluent-emoji": "1.2.7",  # MIT
    "@iconify-json/fluent-emoji-flat": "1.2.6",  # MIT
    "@iconify-json/fluent-emoji-high-contrast": "1.2.6",  # MIT
    "@iconify-json/emojione": "1.2.3",  # CC BY 4.0
    "@iconify-json/emojione-monotone": "1.2.1",  # CC BY 4.0
    "@iconify-json/fxemoji": "1.2.2",  # Apache 2.0
    "@iconify-json/streamline-emojis": "1.2.4",  # CC BY 4.0
    "openmoji": "17.0.0",  # CC BY-SA 4.0: for measuring, never for training
}
# The icon sets for training. The last three are black and white or outlines: the model should know outlines as well.
ICONIFY = ["noto-v1", "fluent-emoji", "fluent-emoji-flat", "emojione", "fxemoji"]
ICONIFY += ["fluent-emoji-high-contrast", "emojione-monotone", "streamline-emojis"]

# demo_quality.py measures with other templates. There are many, of many forms, so that the model learns to find the
# noun in a sentence instead of learning the sentences.
TEMPLATES = (
    *("{a}", "{a}.", "{name}", "the {name}", "one {name}", "my {name}", "some {name}", "{name}!", "a photo of {a}."),
    *("a photo of a {name}.", "a photo of {name}", "photo: {name}", "{a} in a photo", "a close-up photo of {a}."),
    *("a photo of {a} in the distance.", "a blurry photo of the {name}.", "a photo of my {name}"),
    *("a good photo of {a}.", "a bad photo of the {name}.", "a black and white photo of {a}."),
    *("a photo of many {name}", "a picture of {a}", "a picture of the {name}.", "picture of {name}"),
    *("in the picture there is {a}.", "a drawing of {a}.", "{a} drawn by hand", "a simple drawing of the {name}"),
    *("a sketch of {a}.", "a painting of {a}.", "a cartoon of {a}", "the cartoon {name}.", "a rendering of {a}."),
    *("{a} in 3D", "graphics of the {name}", "an emoji of {a}", "the {name} emoji", "emoji: {name}"),
    *("an icon showing {a}", "icon of {name}", "{name} icon", "a symbol for {a}", "a small image of {a}."),
    *("an image that shows {a}", "image of {name}.", "a sign with {a}", "an outline of {a}.", "{a} as an outline"),
    *("line art: {name}", "a logo of {a}", "a silhouette of the {name}", "{a} on a plain background", "{a} on white"),
    *("{a} against a coloured background", "a colourful {name}", "here is {a}.", "it is {a}", "that's {a}!"),
    *("look at this {name}.", "there is {a} here.", "can you see {a}?", "what you see is {a}", "{a} is shown here."),
    *("we see {a}", "I like this {name}", "this one shows {a}.", "is it {a}?", "a toy {name}."),
    *("a {name} made of plastic", "a pin with {a} on it", "a stamp with {a}", "{a} for children"),
)


@dataclass
class Entry:
    """One emoji and its names."""

    hexcode: str
    name: str  # "flag of France"
    synonyms: list[str]
    tags: list[str]
    slugs: list[str] = field(default_factory=list)  # its possible names in icon sets, the likeliest first


# -- packages ---------------------------------------------------------------------------------------------------------


def fetch(folder: Path) -> None:
    """Let npm download the missing packages. npm checks the integrity of each package."""
    missing = [f"{name}@{version}" for name, version in PACKAGES.items() if not tarball(folder, name).exists()]
    if not missing:
        return
    if shutil.which("npm") is None:
        raise SystemExit(
            f"{folder} lacks {tarball(folder, missing[0].rpartition('@')[0]).name}, and npm is not installed: "
            "install Node.js, or download the .tgz files and pass their folder as --packages"
        )
    folder.mkdir(parents=True, exist_ok=True)
    print(f"npm downloads {len(missing)} packages into {folder}")
    # Into a temporary folder first, so that an interrupted download is never taken for a complete package.
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        done = subprocess.run(
            ["npm", "pack", "--silent", "--pack-destination", temporary, *missing], capture_output=True, text=True
        )
        if done.returncode:
            raise SystemExit(f"npm could not download the packages: {done.stderr.strip()[-500:]}")
        for path in Path(temporary).iterdir():
            path.replace(folder / path.name)


def tarball(folder: Path, name: str) -> Path:
    return folder / f"{name.removeprefix('@').replace('/', '-')}-{PACKAGES[name]}.tgz"


def read(folder: Path, name: str, wanted: Callable[[str], bool]) -> dict[str, bytes]:
    """The contents of a package's files whose path within the package is wanted, by that path."""
    path = tarball(folder, name)
    try:
        with tarfile.open(path) as archive:
            members = ((member.name.removeprefix("package/"), member) for member in archive if member.isfile())
            return {inner: archive.extractfile(member).read() for inner, member in members if wanted(inner)}  # type: ignore[union-attr]
    except (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError, OSError) as error:
        raise SystemExit(f"{path} cannot be read ({error}): remove it and run again") from None


# -- names ------------------------------------------------------------------------------------------------------------


def read_entries(folder: Path) -> list[Entry]:
    """All emoji of emojibase, with the names that emojibase and Unicode give them."""
    files = read(folder, "emojibase-data", lambda name: name in ("en/data.json", "en/shortcodes/emojibase.json"))
    listed = json.loads(files["en/data.json"])
    shortcodes = json.loads(files["en/shortcodes/emojibase.json"])
    unicode_file = read(folder, "emoji-datasource-google", lambda name: name == "emoji.json")["emoji.json"]
    unicode = {code(item["unified"]): item for item in json.loads(unicode_file)}
    entries = []
    for item in listed:
        if item.get("group") in (None, 2):  # single letters of flags; skin tones and hair as emoji of their own
            continue
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
        tags = [tag for tag in item.get("tags", ()) if len(tag) > 2]
        entries.append(Entry(key, name, synonyms, tags, [text for text in slugs if text]))
    return entries


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


def with_article(name: str) -> str:
    """The name with its article, by simple rules. They get "a rice" and "a scissors" wrong, as users' prompts do."""
    if name[:1].isdigit() or re.match(r"(two|three|the|keycap|.*’s|.*'s)\b", name):
        return name
    first, head = name.split(" ")[0], name.split(" with ")[0].split(" of ")[0]
    if name.startswith("flag of "):
        return f"the {name}"
    if head.endswith("s") and not head.endswith(("ss", "us", "is")):
        return name
    return f"{'an' if re.match('[aeio]|u(?!n[ij]|se)', first.lower()) else 'a'} {name}"


def captions(entry: Entry, pick: random.Random) -> list[str]:
    """The bare name, then what a person might write: prompts with the name, with synonyms, and the name with tags."""
    lines = [entry.name]
    lines += [template.format(name=entry.name, a=with_article(entry.name)) for template in pick.sample(TEMPLATES, 9)]
    others = pick.sample(entry.synonyms, min(2, len(entry.synonyms)))
    lines += [pick.choice(TEMPLATES).format(name=other, a=with_article(other)) for other in others]
    if entry.tags:
        lines.append(f"{entry.name}, {', '.join(pick.sample(entry.tags, min(2, len(entry.tags))))}")
    return list(dict.fromkeys(lines))


def code(hexcode: str) -> str:
    """The code points without variation selectors, which some vendors write and others omit."""
    return hexcode.upper().replace("-FE0F", "")


def slug(text: str) -> str:
    """The text in the spelling of icon names: "flag for Åland Islands" becomes "flag-for-aland-islands"."""
    text = text.lower().replace("&", "and").replace("'", "").replace("’", "")
    text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    return re.sub("[^a-z0-9]+", "-", text).strip("-")


# -- images -----------------------------------------------------------------------------------------------------------

EmojiImages = Iterator[tuple[Entry, Image.Image]]


def png_images(folder: Path, package: str, vendor: str, entries: list[Entry]) -> EmojiImages:
    """The images of a package of PNGs, found by code point."""
    files = read(folder, package, lambda name: name.startswith(f"img/{vendor}/64/"))
    by_code = {code(Path(name).stem): data for name, data in files.items()}
    for entry in entries:
        if data := by_code.get(entry.hexcode):
            yield entry, Image.open(io.BytesIO(data)).convert("RGBA")


def iconify_images(folder: Path, name: str, entries: list[Entry]) -> EmojiImages:
    """The images of an icon set, found by name. Some sets omit the hyphens, and some number their variants."""
    files = read(folder, f"@iconify-json/{name}", lambda name: name in ("icons.json", "chars.json"))
    sets = json.loads(files["icons.json"])
    by_name: dict[str, str] = {}
    for icon in sets["icons"]:
        by_name.setdefault(icon.replace("-", ""), icon)
        by_name.setdefault(re.sub(r"-\d$", "", icon).replace("-", ""), icon)
    for alias, target in sets.get("aliases", {}).items():
        if set(target) == {"parent"}:  # not a mirrored or rotated alias
            by_name.setdefault(alias.replace("-", ""), target["parent"])
    by_code = {code(key): icon for key, icon in json.loads(files["chars.json"]).items()}
    for entry in entries:
        found = by_code.get(entry.hexcode)
        found = found or next((by_name[s.replace("-", "")] for s in entry.slugs if s.replace("-", "") in by_name), None)
        if found:
            yield entry, draw(svg_document(sets, found))


def svg_document(sets: dict[str, Any], name: str) -> str:
    """An icon as an SVG file: an icon set gives its body, and its size if that is not the size of the whole set."""
    icon = sets["icons"][name]
    width, height = (icon.get(side, sets.get(side, 16)) for side in ("width", "height"))
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{icon.get("left", 0)} {icon.get("top", 0)} {width} {height}">{icon["body"]}</svg>'
    )


def openmoji_images(folder: Path, style: str, entries: list[Entry]) -> EmojiImages:
    """OpenMoji's drawings, found by code point. ``style`` is black or color."""
    files = read(folder, "openmoji", lambda name: name.startswith(f"{style}/svg/"))
    by_code = {code(Path(name).stem): data for name, data in files.items()}
    for entry in entries:
        if data := by_code.get(entry.hexcode):
            yield entry, draw(data.decode())


def draw(svg: str, size: int = SIZE) -> Image.Image:
    import resvg_py

    png = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, skip_system_fonts=True)
    return Image.open(io.BytesIO(bytes(png))).convert("RGBA")


def write(folder: Path, sets: dict[str, EmojiImages], seed: int) -> None:
    """Write the images and their captions.csv. That file comes last, so a folder with a captions.csv is complete."""
    (folder / "captions.csv").unlink(missing_ok=True)  # that of an earlier run does not describe the new images
    rows: list[tuple[str, str]] = []
    for vendor, images in sets.items():
        (folder / vendor).mkdir(parents=True, exist_ok=True)
        before = len(rows)
        drawn = 0
        for entry, image in images:
            if image.getchannel("A").getextrema()[1] == 0:
                continue  # an empty drawing
            name = f"{vendor}/{entry.hexcode.lower()}.png"
            image.save(folder / name)
            rows += [(name, line) for line in captions(entry, random.Random(f"{seed} {name}"))]
            drawn += 1
        print(f"  {folder.name}/{vendor}: {drawn:,} images, {len(rows) - before:,} captions", flush=True)
    temporary = folder / "captions.csv.tmp"
    with temporary.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("image", "caption"), *rows])
    temporary.replace(folder / "captions.csv")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the folder to create")
    parser.add_argument("--packages", type=Path, help="the folder of the npm packages (default: OUT/packages)")
    parser.add_argument("--seed", type=int, default=0, help="seed for the choice of captions (default: 0)")
    options = parser.parse_args()
    import resvg_py  # noqa: F401  a missing package is reported before anything is downloaded

    packages = options.packages or options.out / "packages"
    fetch(packages)
    entries = read_entries(packages)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "names.txt").write_text("".join(f"{entry.name}\n" for entry in entries), encoding="utf-8")
    train = {"google": png_images(packages, "emoji-datasource-google", "google", entries)}
    train |= {name: iconify_images(packages, name, entries) for name in ICONIFY}
    write(options.out / "train", train, options.seed)
    twitter = png_images(packages, "emoji-datasource-twitter", "twitter", entries)
    write(options.out / "twemoji", {"twemoji": twitter}, options.seed)
    for style in ("black", "color"):
        write(options.out / f"openmoji-{style}", {style: openmoji_images(packages, style, entries)}, options.seed)


if __name__ == "__main__":
    shared.main(main)
