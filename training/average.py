"""Average the weights of models that were trained from the same start (Wortsman et al. 2022, arXiv:2203.05482).

    python training/average.py runs/long runs/short --out runs/mean
    python training/average.py runs/long runs/short runs/first --weights 0.75 0.75 -0.5 --out runs/demo

The mean of several such models often knows what each of them knows. Models that were not trained from the same start
have nothing in common that could be averaged: their mean knows nothing.

A negative weight for the model from which the others started goes further in the direction of their training (task
vectors: Ilharco et al. 2023, arXiv:2212.04089). The second line is the mean of both runs, and half of the way from the
start to this mean once more.
"""

import argparse
import math
from pathlib import Path

import shared
import torch

import miniclip


def average(names: list[str], weights: list[float]) -> tuple[miniclip.CLIP, miniclip.Preprocess]:
    """The model whose every parameter is the weighted mean of those of the models, in float32.

    Raises:
        SystemExit: if two of them differ in their configuration.
    """
    model, preprocess = miniclip.load(names[0], "cpu", dtype=torch.float32)
    total = {name: weights[0] * value.double() for name, value in model.state_dict().items()}
    for other_name, weight in zip(names[1:], weights[1:]):
        other, _ = miniclip.load(other_name, "cpu", dtype=torch.float32)
        if other.config != model.config:
            raise SystemExit(f"{names[0]} and {other_name} have different configurations")
        for name, value in other.state_dict().items():
            total[name] += weight * value.double()
    model.load_state_dict(total)
    return model, preprocess


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="names, paths or Hub repositories")
    parser.add_argument(
        "--weights", nargs="+", type=float, metavar="W", help="one number for each model, 1 in sum (default: equal)"
    )
    parser.add_argument("--out", type=Path, required=True, help="the folder of the mean")
    parser.add_argument("--half", action="store_true", help="save the mean in float16")
    options = parser.parse_args()
    models = options.models
    if len(models) < 2:
        parser.error("give two models or more")
    weights = options.weights or [1 / len(models)] * len(models)
    if len(weights) != len(models):
        parser.error(f"there are {len(models)} models and {len(weights)} weights")
    if not math.isclose(sum(weights), 1, abs_tol=1e-6):
        parser.error(f"the weights must be 1 in sum, got {sum(weights):g}")
    if (options.out / "model.safetensors").exists():
        raise SystemExit(f"{options.out} holds a model already")
    model, preprocess = average(models, weights)
    miniclip.save_pretrained(model.half() if options.half else model, options.out, preprocess)
    print(f"{options.out}: the mean of {len(models)} models")


if __name__ == "__main__":
    shared.main(main)
