"""Average the weights of models that were trained from the same start (Wortsman et al. 2022, arXiv:2203.05482).

    python training/average.py runs/first runs/second --out runs/mean

The mean of several such models often knows what each of them knows. Models that were not trained from the same start
have nothing in common that could be averaged: their mean knows nothing.
"""

import argparse
from pathlib import Path

import shared
import torch

import miniclip


def average(names: list[str]) -> tuple[miniclip.CLIP, miniclip.Preprocess]:
    """The model whose every weight is the mean of those of the models, in float32.

    Raises:
        SystemExit: if two of them differ in their configuration.
    """
    model, preprocess = miniclip.load(names[0], "cpu", dtype=torch.float32)
    total = {name: value.double() for name, value in model.state_dict().items()}
    for other_name in names[1:]:
        other, _ = miniclip.load(other_name, "cpu", dtype=torch.float32)
        if other.config != model.config:
            raise SystemExit(f"{names[0]} and {other_name} have different configurations")
        for name, value in other.state_dict().items():
            total[name] += value
    model.load_state_dict({name: value / len(names) for name, value in total.items()})
    return model, preprocess


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="names, paths or Hub repositories")
    parser.add_argument("--out", type=Path, required=True, help="the folder of the mean")
    parser.add_argument("--half", action="store_true", help="save the mean in float16")
    options = parser.parse_args()
    if len(options.models) < 2:
        parser.error("give two models or more")
    if (options.out / "model.safetensors").exists():
        raise SystemExit(f"{options.out} holds a model already")
    model, preprocess = average(options.models)
    miniclip.save_pretrained(model.half() if options.half else model, options.out, preprocess)
    print(f"{options.out}: the mean of {len(options.models)} models")


if __name__ == "__main__":
    shared.main(main)
