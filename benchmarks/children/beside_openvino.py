"""miniclip and OpenVINO take turns in a process without ONNX Runtime.

The argument is a JSON object: the checkpoint's folder, the ONNX file, the dtype, the threads, and for each input a
.npy file and a number of rounds. The last line printed is the list of their medians in seconds.
"""

import json
import sys
from pathlib import Path

import numpy as np
import peers
import torch
from measure import take_turns

import miniclip

request = json.loads(sys.argv[1])
half = request["dtype"] == "bfloat16"
torch.set_num_threads(request["threads"])
model = miniclip.load(request["folder"], "cpu", dtype=getattr(torch, request["dtype"]))[0]
openvino = peers.openvino(Path(request["onnx"]), request["threads"], "bf16" if half else "f32")
medians = []
for path, rounds in request["inputs"]:
    given = torch.from_numpy(np.load(path))
    encode = model.encode_image if given.ndim == 4 else model.encode_text
    contenders = {"miniclip": lambda: encode(given), "OpenVINO": lambda: openvino(given)}  # noqa: B023
    medians.append(take_turns(contenders, rounds, "OpenVINO", 0.999 if half else 0.9999))
assert "onnxruntime" not in sys.modules
print(json.dumps(medians))
