"""Where torch's generators stand: so that the same can be drawn once more."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Draws(NamedTuple):
    """Where torch's generators stand: the host's, and the device's where it has its own."""

    device: torch.device
    states: list[Tensor]

    @classmethod
    def now(cls, device: torch.device) -> Draws:
        states = [torch.get_rng_state()]
        if device.type != "cpu":
            states.append(torch.get_device_module(device.type).get_rng_state())
        return cls(device, states)

    def again(self) -> None:
        """Put them back, so that the same is drawn."""
        torch.set_rng_state(self.states[0])
        for state in self.states[1:]:
            torch.get_device_module(self.device.type).set_rng_state(state)
