"""The folder of a run: its state, from which it can be resumed, and its learning curve."""

import argparse
import csv
import hashlib
import json
import os
from pathlib import Path

import shared
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

import miniclip

with shared.needs("examples"):
    import matplotlib

    matplotlib.use("Agg")  # draws to a file, without a window
    import matplotlib.pyplot as plt

Curve = list[tuple[int, float, float | None]]  # step, training loss, validation loss

# The options that may change when a run is resumed. Any other change would make it a different run.
CHANGEABLE = frozenset({"data", "out", "resume", "device", "workers", "compile", "every", "quiet"})


class RunFolder:
    """The folder OUT of a run. Its state file is replaced in one atomic rename, so it is always complete."""

    def __init__(self, options: argparse.Namespace) -> None:
        """Create the folder.

        Raises:
            SystemExit: if it holds a run or a model already and --resume is not given, or the other way round.
        """
        self.folder: Path = options.out
        self.state_path = self.folder / "state.safetensors"
        self.curve: Curve = []
        if self.state_path.exists() and not options.resume:
            raise SystemExit(f"{self.folder} holds a run already: pass --resume or choose another folder")
        if (self.folder / "model.safetensors").exists() and not options.resume:
            raise SystemExit(f"{self.folder} holds a model already: choose another folder")
        if options.resume and not self.state_path.exists():
            raise SystemExit(f"there is no run to resume in {self.folder}")
        self.settings = {key: str(value) for key, value in vars(options).items() if key not in CHANGEABLE}
        # With other captions the images would be split and batched in another way.
        with (options.data / "captions.csv").open("rb") as file:
            self.settings["captions"] = hashlib.file_digest(file, "sha256").hexdigest()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SystemExit(f"{self.folder} cannot be created ({error.strerror})") from None

    def save(self, step: int, model: miniclip.CLIP, optimiser: torch.optim.AdamW) -> None:
        """Replace the saved state by the present one, after ``step`` steps."""
        tensors = {f"model/{name}": parameter.detach() for name, parameter in model.named_parameters()}
        for name, parameter in model.named_parameters():
            for moment in ("exp_avg", "exp_avg_sq"):
                if parameter in optimiser.state:
                    tensors[f"{moment}/{name}"] = optimiser.state[parameter][moment]
        notes = {"step": step, "settings": self.settings, "curve": self.curve}
        temporary = self.state_path.with_suffix(".tmp")
        try:
            save_file(tensors, temporary, metadata={"run": json.dumps(notes)})
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(self.state_path)
        except (SafetensorError, OSError) as error:
            temporary.unlink(missing_ok=True)
            kept = "the previous state is kept" if self.state_path.exists() else "no state was saved before"
            raise SystemExit(f"{self.state_path} cannot be written at step {step} ({error}); {kept}") from None

    def resume(self, model: miniclip.CLIP, optimiser: torch.optim.AdamW) -> int:
        """Restore model, optimiser and curve. Returns the number of steps done.

        Raises:
            SystemExit: if the state is damaged, or the run had other settings, other captions or another architecture.
        """
        try:
            with safe_open(self.state_path, "pt") as file:
                notes = json.loads(file.metadata()["run"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, KeyError, TypeError) as error:
            raise SystemExit(f"{self.state_path} is not the state of a run ({error})") from None
        self._check_settings(notes["settings"])
        self._restore_model(model, tensors)
        self._restore_optimiser(model, optimiser, tensors, notes["step"])
        self.curve = [tuple(point) for point in notes["curve"]]
        return int(notes["step"])

    def _check_settings(self, saved: dict[str, str]) -> None:
        for key, value in self.settings.items():
            if saved.get(key) == value:
                continue
            if key == "captions":
                raise SystemExit(f"the run in {self.folder} started with other captions: its data has changed")
            raise SystemExit(f"the run in {self.folder} had --{key.replace('_', '-')} {saved.get(key)}, not {value}")

    def _restore_model(self, model: miniclip.CLIP, tensors: dict[str, Tensor]) -> None:
        parameters = {f"model/{name}": parameter for name, parameter in model.named_parameters()}
        saved = {name: tensor.shape for name, tensor in tensors.items() if name.startswith("model/")}
        if saved != {name: parameter.shape for name, parameter in parameters.items()}:
            raise SystemExit(f"the run in {self.folder} has another architecture: its configuration has changed")
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(tensors[name])

    def _restore_optimiser(
        self, model: miniclip.CLIP, optimiser: torch.optim.AdamW, tensors: dict[str, Tensor], step: int
    ) -> None:
        names = {parameter: name for name, parameter in model.named_parameters()}
        order = [names[parameter] for group in optimiser.param_groups for parameter in group["params"]]
        state = {
            index: {
                "step": torch.tensor(float(step)),
                "exp_avg": tensors[f"exp_avg/{name}"],
                "exp_avg_sq": tensors[f"exp_avg_sq/{name}"],
            }
            for index, name in enumerate(order)
            if f"exp_avg/{name}" in tensors
        }
        optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})

    def draw(self) -> None:
        """Write the learning curve as learning_curve.csv and learning_curve.png."""
        with (self.folder / "learning_curve.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("step", "training_loss", "validation_loss"), *self.curve])
        draw_curve(self.curve, self.folder / "learning_curve.png")


def draw_curve(curve: Curve, path: Path) -> None:
    figure, axes = plt.subplots(figsize=(6, 3.6), dpi=200, layout="constrained")
    axes.plot([step for step, *_ in curve], [loss for _, loss, _ in curve], label="training", color="C0")
    validated = [(step, loss) for step, _, loss in curve if loss is not None]
    if validated:
        axes.plot(*zip(*validated), label="validation (held-out images)", color="C1")
    axes.set(xlabel="step", ylabel="contrastive loss", xlim=(0, None), ylim=(0, None))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path)
    plt.close(figure)
