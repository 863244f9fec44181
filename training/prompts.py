"""Sentences around a name, as people write them: "cat" becomes "a photo of a cat."."""

import random
import re

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


def sentence(phrase: str, pick: random.Random) -> str:
    """The phrase in one of the templates, chosen by ``pick``."""
    return pick.choice(TEMPLATES).format(name=phrase, a=with_article(phrase))


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
