"""Run an exported agent with torch only: python examples/deployed_torch.py agent.pt2."""

import json
import sys

import torch

extra = {"cyborg_torchrl.json": ""}
agent = torch.export.load(sys.argv[1], extra_files=extra).module()
about = json.loads(extra["cyborg_torchrl.json"])
state = {
    name: torch.zeros(1, *each["shape"], dtype=getattr(torch, each["dtype"])) for name, each in about["state"].items()
}
random = torch.Generator().manual_seed(0)
for step in range(8):  # random numbers instead of an environment
    shapes = {name: ((1, *each["shape"]), getattr(torch, each["dtype"])) for name, each in about["observation"].items()}
    seen = {name: torch.rand(shape, generator=random).to(dtype) for name, (shape, dtype) in shapes.items()}
    results = agent(seen, state, torch.tensor([step == 0]))
    state = results["state"]
    print(results["action"][0].tolist())
