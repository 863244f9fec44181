"""Zero-shot classification: which of these labels does an image show?

    python examples/zero_shot.py                                    the demo model on examples/images
    python examples/zero_shot.py photo.jpg another.jpg --labels "a cat" "a dog" "a horse" --model ViT-B/32

The labels make the classifier: no training is needed, and any words can be labels. The prompts of several templates are
averaged, which gives better answers than a single prompt (section 3.1.4 of the paper).
"""

import argparse

import common

import miniclip
from miniclip.terminal import printable

TEMPLATES = ("a photo of {}.", "a close-up photo of {}.", "a photo of {} in the distance.", "a drawing of {}.")
SHOWN = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="*", help="image files (default: examples/images)")
    parser.add_argument("--labels", nargs="+", metavar="LABEL", help="the classes (default: the samples' captions)")
    parser.add_argument("--model", help=common.MODEL_HELP)
    options = parser.parse_args()

    if options.images and not options.labels:
        raise SystemExit("images of your own need labels, such as --labels 'a cat' 'a dog'")
    name = common.model_name(options.model, own_images=bool(options.images))
    captions = {} if options.images else common.read_captions(common.IMAGES)
    paths = options.images or [common.IMAGES / name for name in captions]
    labels = options.labels or [lines[0] for lines in captions.values()]
    images = [miniclip.open_image(path) for path in paths]
    model, preprocess = miniclip.load(name)
    classifier = miniclip.ZeroShotClassifier(model, preprocess, labels, TEMPLATES)
    for path, answer in zip(paths, classifier(images)):
        print(printable(str(path)))
        for label, probability in answer[:SHOWN]:
            print(f"  {probability:6.1%}  {label}")


if __name__ == "__main__":
    common.main(main)
