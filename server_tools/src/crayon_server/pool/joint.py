"""N LoRAs trained together: every text is answered with its own blend of them.

    A(alpha) = sum_n alpha_n A_n      B(alpha) = sum_n alpha_n B_n      y = W x + scale B(alpha) A(alpha) x

A(alpha) and B(alpha) are formed per text, then two `bmm`: the cost of a step is that of one LoRA of rank r, whatever N is.

The LoRAs are float32 and whole in every process, whatever the base is: bfloat16, or sharded over many GPUs.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from crayon_runtime.manifest import LINEARS
from crayon_server import training

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import numpy.typing as npt
    import torch
    from accelerate import Accelerator

    from crayon_server.checkpoints import Checkpoints
    from crayon_server.training import OnStep, Options, Tokens

    Floats = npt.NDArray[np.float32]
    Weights = Callable[[list[int], np.random.Generator], Floats]
    """Indices of a batch's texts -> their alphas, float32 [B, N]."""


class JointLoras:
    """N LoRAs of one rank on linears of a base model, which is frozen and otherwise untouched.

    Attributes:
        alpha: float32 [B, N], the weights of each text of the next batch; None: the base model answers.
        matrices: module -> A float32 [N, rank, in] and B float32 [N, out, rank], not scaled, where the model is.

    Args:
        model: a transformers decoder, or what accelerate made of it; its linears have hooks until `remove`.
        targets: names of the linears of every block.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        count: int,
        rank: int,
        *,
        scale: float,
        seed: int,
        targets: Sequence[str] = LINEARS,
    ) -> None:
        import torch

        self.model, self.scale = model, scale
        self.alpha: torch.Tensor | None = None
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self.matrices: dict[str, tuple[torch.nn.Parameter, torch.nn.Parameter]] = {}
        model.requires_grad_(False)
        generator = torch.Generator().manual_seed(seed)
        for name, linear in model.named_modules():
            if isinstance(linear, torch.nn.Linear) and name.rpartition(".")[2] in targets:
                a = torch.randn(count, rank, linear.in_features, generator=generator) / math.sqrt(linear.in_features)
                b = torch.zeros(count, linear.out_features, rank)
                device = linear.weight.device
                pair = (torch.nn.Parameter(a.to(device)), torch.nn.Parameter(b.to(device)))
                self.matrices[name] = pair
                self._hooks.append(linear.register_forward_hook(self._hook(*pair)))

    def _hook(self, a: torch.Tensor, b: torch.Tensor) -> Callable[..., Any]:
        import torch

        def add(_: torch.nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
            if self.alpha is None:
                return output
            with torch.autocast(output.device.type, enabled=False):  # a sum over N in bfloat16 loses too much
                blended_a = torch.einsum("bn,nri->bir", self.alpha, a).to(output.dtype)
                blended_b = torch.einsum("bn,nor->bro", self.alpha, b).to(output.dtype)
            return output + self.scale * torch.bmm(torch.bmm(inputs[0], blended_a), blended_b)

        return add

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        return [parameter for pair in self.matrices.values() for parameter in pair]

    @property
    def modules(self) -> list[str]:
        """What is adapted, as "model.layers.0.self_attn.q_proj"."""
        return list(self.matrices)

    def lora(self, n: int) -> dict[str, tuple[Floats, Floats]]:
        """The n-th LoRA: module -> A float32 [rank, in] and B float32 [out, rank], not scaled."""
        return {
            module: (a[n].detach().cpu().numpy().copy(), b[n].detach().cpu().numpy().copy())
            for module, (a, b) in self.matrices.items()
        }

    def remove(self) -> None:
        """Leave the model as it was."""
        for hook in self._hooks:
            hook.remove()

    def train(
        self,
        texts: Sequence[Tokens],
        weights: Weights,
        options: Options,
        *,
        batch_size: int,
        pad_id: int,
        on_step: OnStep | None = None,
        place: Accelerator | None = None,
        checkpoints: Checkpoints | None = None,
    ) -> list[float]:
        """Train all LoRAs on `texts`, each with its own weights; the loss of each step is returned.

        The other arguments, and what is raised, are those of `training.train`.
        """
        import torch

        generator = np.random.default_rng(options.seed)
        place = place or training.accelerator()
        alphas = torch.empty(0)

        def batches() -> Iterator[list[Tokens]]:
            nonlocal alphas
            for batch in training.epochs(range(len(texts)), batch_size, options.seed):
                alphas = torch.from_numpy(weights(batch, generator)).to(place.device)
                yield [texts[i] for i in batch]

        def on_part(part: slice) -> None:
            self.alpha = alphas[part]

        self.model.requires_grad_(False)
        try:
            return training.train(
                self.model,
                batches(),
                options,
                pad_id=pad_id,
                on_step=on_step,
                on_part=on_part,
                parameters=self.parameters,
                place=place,
                checkpoints=checkpoints,
            )
        finally:
            self.alpha = None
