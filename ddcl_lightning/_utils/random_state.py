"""The states of the random generators that training draws from, as plain tensors for a checkpoint."""

import random
from typing import Any

import numpy as np
import torch


def random_states(device: torch.device) -> dict[str, Any]:
    """States of the random generators of this process: torch (CPU and devices like ``device``), numpy, Python."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # noqa: NPY002 - users draw from it
    return {
        "torch": torch.get_rng_state(),
        "python": {"version": version, "words": torch.tensor(words, dtype=torch.int64), "gauss": gauss},
        "numpy": {
            "name": str(name),
            "keys": torch.from_numpy(np.asarray(keys).astype(np.int64)),
            "rest": [int(position), int(has_gauss), float(cached)],
        },
        "device": {"type": device.type, "states": _device_states(device)},
    }


def set_random_states(states: dict[str, Any], device: torch.device) -> None:
    """Restore what :func:`random_states` gave; states of devices that are not here any more are left out."""
    torch.set_rng_state(states["torch"].cpu())
    python, legacy = states["python"], states["numpy"]
    random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss"]))
    np.random.set_state((legacy["name"], legacy["keys"].cpu().numpy().astype(np.uint32), *legacy["rest"]))  # noqa: NPY002
    if states["device"]["type"] == device.type:
        # On a CPU there are none.
        for number, state in enumerate(states["device"]["states"][: _device_count(device)]):
            backend = torch.get_device_module(device)
            if device.type == "mps":
                backend.set_rng_state(state.cpu())
            else:
                backend.set_rng_state(state.cpu(), number)


def _device_count(device: torch.device) -> int:
    if device.type == "cpu":
        return 0
    return 1 if device.type == "mps" else int(torch.get_device_module(device).device_count())


def _device_states(device: torch.device) -> list[torch.Tensor]:
    if device.type == "cpu":
        return []
    backend = torch.get_device_module(device)
    if device.type == "mps":
        return [backend.get_rng_state()]
    return [backend.get_rng_state(number) for number in range(_device_count(device))]
