"""Training that goes on where it was killed: parameters, optimizer, losses and random state, in safetensors and JSON.

The learning rate is a function of the step, and batches are drawn again from their seed, so neither has a state to save.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from crayon_runtime.errors import IntegrityError, OutputError
from crayon_runtime.files import atomic_directory

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import torch
    from accelerate import Accelerator

TENSORS = "state.safetensors"
LOSSES = "losses.json"
_FREE = "free some space, or choose a work folder on another disk"


@dataclass(frozen=True)
class Checkpoints:
    """The last checkpoint of one run.

    Attributes:
        folder: of this run alone; runs that are to give other results have others. All processes see it.
        every: steps between checkpoints. The last step is always saved.
    """

    folder: Path
    every: int = 100

    def due(self, step: int, steps: int) -> bool:
        return step % self.every == 0 or step == steps

    def steps(self) -> int:
        """How many steps the checkpoint has; 0 if there is none, or if it is damaged, which `load` says."""
        try:
            return len(msgspec.json.decode((self.folder / LOSSES).read_bytes(), type=list[float]))
        except (OSError, msgspec.DecodeError):
            return 0

    def load(
        self, parameters: Sequence[torch.nn.Parameter], optimizer: torch.optim.Optimizer, place: Accelerator
    ) -> list[float]:
        """Restore what was saved; the losses so far are returned, none if nothing was saved.

        Raises:
            IntegrityError: the checkpoint is damaged, or of other parameters.
        """
        import torch
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        if not self.folder.exists():
            place.wait_for_everyone()  # before one of them saves
            return []
        try:
            losses = msgspec.json.decode((self.folder / LOSSES).read_bytes(), type=list[float])
            tensors = load_file(self.folder / TENSORS)
            for i, parameter in enumerate(parameters):
                with torch.no_grad():
                    parameter.copy_(_as_parameter(tensors[f"parameter.{i}"], parameter))
                state = {name: _as_parameter(tensors[f"{name}.{i}"], parameter) for name in ("exp_avg", "exp_avg_sq")}
                optimizer.state[parameter] = {"step": torch.tensor(float(len(losses))), **state}
            random = tensors["random"]
            _set_random_state(random[place.process_index % len(random)], place)
        except (OSError, KeyError, RuntimeError, SafetensorError, msgspec.DecodeError) as e:
            raise IntegrityError(
                f"the checkpoint cannot be used: {e}", where=self.folder, do="remove it, to train from the beginning"
            ) from e
        place.wait_for_everyone()
        return losses

    def save(
        self,
        parameters: Sequence[torch.nn.Parameter],
        optimizer: torch.optim.Optimizer,
        losses: Sequence[float],
        place: Accelerator,
    ) -> None:
        """Replace the checkpoint, at once.

        Raises:
            OutputError: it cannot be written; the old one is still there.
        """
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        tensors = {"random": place.gather(_random_state(place)[None]).cpu()}
        for i, parameter in enumerate(parameters):
            state = optimizer.state[parameter]
            named = {"parameter": parameter.detach(), "exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}
            for name, tensor in named.items():
                gathered = whole(tensor)
                if place.is_main_process:
                    tensors[f"{name}.{i}"] = gathered.cpu().contiguous()
        if not place.is_main_process:
            return
        with atomic_directory(self.folder, replace=True) as folder:
            try:
                save_file(tensors, folder / TENSORS)
            except SafetensorError as e:  # it does not say what the system said, but in words
                raise OutputError(f"the checkpoint cannot be written: {e}", where=self.folder, do=_FREE) from e
            (folder / LOSSES).write_bytes(msgspec.json.encode(list(losses)))


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor, gathered from all processes where it is sharded."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _as_parameter(tensor: torch.Tensor, parameter: torch.nn.Parameter) -> torch.Tensor:
    """A whole tensor on the device of a parameter, and sharded as it is."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    tensor = tensor.to(parameter.device)
    if isinstance(parameter, DTensor):
        return distribute_tensor(tensor, parameter.device_mesh, parameter.placements)
    return tensor


def _random_state(place: Accelerator) -> torch.Tensor:
    """uint8: the state of torch's generators, on the device of the process (dropout is what asks them)."""
    import torch

    states = [torch.get_rng_state()]
    if place.device.type == "cuda":
        states.append(torch.cuda.get_rng_state(place.device))
    return torch.cat(states).to(place.device)


def _set_random_state(state: torch.Tensor, place: Accelerator) -> None:
    import torch

    size = len(torch.get_rng_state())
    torch.set_rng_state(state[:size].clone())  # torch takes no part of a larger tensor: it reads where that begins
    if place.device.type == "cuda" and len(state) > size:
        torch.cuda.set_rng_state(state[size:].clone(), place.device)
