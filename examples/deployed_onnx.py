"""Run an exported agent with onnxruntime and numpy only: python examples/deployed_onnx.py agent.onnx."""

import json
import sys

import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession(sys.argv[1])
about = json.loads(session.get_modelmeta().custom_metadata_map["cyborg_torchrl"])
outputs = [output.name for output in session.get_outputs()]
state = {f"state.{name}": np.zeros((1, *each["shape"]), each["dtype"]) for name, each in about["state"].items()}
random = np.random.default_rng(0)
for step in range(8):  # random numbers instead of an environment
    seen = {
        name: random.random((1, *each["shape"])).astype(each["dtype"]) for name, each in about["observation"].items()
    }
    results = dict(zip(outputs, session.run(None, seen | state | {"is_init": np.array([step == 0])}), strict=True))
    state = {name: results[f"next_{name}"] for name in state}
    print(np.asarray(results["action"])[0].tolist())
