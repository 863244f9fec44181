"""Zero-shot classification: which of these labels does a picture show?

    python examples/zero_shot.py photo.jpg another.jpg --labels "a cat" "a dog" "a horse"

The labels are the classifier: no training, and any words will do. Several templates are averaged, which makes the
answer steadier than a single prompt (section 3.1.4 of the paper).
"""

import argparse

import miniclip

TEMPLATES = ("a photo of {}.", "a close-up photo of {}.", "a photo of {} in the distance.", "a drawing of {}.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="+", help="picture files")
    parser.add_argument("--labels", nargs="+", default=["a person", "an animal", "food", "a vehicle", "a landscape"])
    parser.add_argument("--model", default="ViT-B/32", help="a name, path or Hub repository (default: ViT-B/32)")
    options = parser.parse_args()

    model, preprocess = miniclip.load(options.model)
    classifier = miniclip.ZeroShotClassifier(model, preprocess, options.labels, TEMPLATES)
    photos = [miniclip.open_image(path) for path in options.images]
    for path, answer in zip(options.images, classifier(photos)):
        print(path)
        for label, probability in answer[:5]:
            print(f"  {probability:6.1%}  {label}")


if __name__ == "__main__":
    try:
        main()
    except miniclip.MiniclipError as error:
        raise SystemExit(f"zero_shot.py: {error}") from None
