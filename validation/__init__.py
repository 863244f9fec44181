"""The proof: miniclip beside transformers.CLIPModel, stage by stage, on real images and texts.

``stages.py`` has the limits and the comparison, and is the file to read first. ``reference.py`` makes the inputs and
checkpoints that benchmarks and tests use too. ``weights.py`` chooses the weights, ``report.py`` shows the results,
``__main__.py`` is the command line: ``python validate.py`` or ``python -m validation``.
"""

import os

# Set before anything imports transformers: otherwise transformers downloads a second copy of every pickle it loads,
# in a background thread.
os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")
