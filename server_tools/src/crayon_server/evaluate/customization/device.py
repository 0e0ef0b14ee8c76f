"""The benchmark on a device: the int4 bundle on `crayon_runtime`, which computes alpha and answers with a blended adapter bundle."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

import numpy as np

from crayon_runtime import Engine
from crayon_runtime.customize import alpha_of
from crayon_runtime.examples import answer_log_loss
from crayon_runtime.manifest import SCHEMA_VERSION
from crayon_runtime.pool import Embedding, Pool, PoolManifest, write_adapter_bundle, write_pool
from crayon_server import models
from crayon_server.data.phone_assistant import score
from crayon_server.evaluate.customization.answers import Answers
from crayon_server.evaluate.exact_match import MAX_NEW_TOKENS
from crayon_server.pool.indicators import Embeddings

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import numpy.typing as npt

    from crayon_runtime.backends.base import Adapter
    from crayon_runtime.bundle import Bundle
    from crayon_runtime.pool import TypicalText
    from crayon_server.data.phone_assistant import Example, User
    from crayon_server.pool.build import Located, Settings
    from crayon_server.pool.joint import JointLoras
    from crayon_server.training import Tokens

    Floats = npt.NDArray[np.float32]


class Device:
    """nano in int4.

    Args:
        folder: where the bundle, pools and adapters are put.
        users: who ask.
        texts: their queries, tokenized.
        settings: of the pools.
    """

    def __init__(self, folder: Path, users: Sequence[User], texts: Sequence[Tokens], settings: Settings) -> None:
        from crayon_export import export

        self.folder, self.users, self.texts, self.settings = folder, users, texts, settings
        exported = export(models.load_nano(), folder / "bundle", quantize="int4", tap_layer=settings.tap_layer)
        self.bundle = exported.bundle
        self.engine = Engine.load(self.bundle, threads=settings.threads)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.engine.close()

    def embed(self, examples: Sequence[Example]) -> Embeddings:
        """As `indicators.embed`, with the quantized base."""
        pairs = [(e.prompt, e.completion) for e in examples]
        return Embeddings(*(self.engine.embed(pairs, part=part, base=True) for part in ("prompt", "answer", "all")))

    def write_pool(self, name: str, located: Located, loras: JointLoras, typical: Sequence[TypicalText] = ()) -> Pool:
        """A pool as a server has it, of LoRAs that were trained here."""
        model, recipe = self.bundle.model, located.recipe
        manifest = PoolManifest(
            schema_version=SCHEMA_VERSION,
            name=name,
            base_fingerprint=model.base_fingerprint,
            adapters=self.settings.adapters,
            rank=self.settings.rank,
            scale=self.settings.scale,
            targets=loras.modules,
            embedding=Embedding(model.tap.layer, "all" if recipe == "paper" else "answer", located.projection.residual),
            dimensions=located.projection.projection.shape[1],
            weighting=self.settings.weighting,
            blend="separate",
            grouped=located.groups is not None,
            settings={},
        )
        adapters = ((None, loras.lora(n)) for n in range(self.settings.adapters))
        return write_pool(self.folder / name, manifest, located.projection, adapters, typical=typical, replace=True)

    def alphas(self, pool: Pool) -> Floats:
        """What each user's examples give here, float32 [users, N]."""
        pairs = [[(e.prompt, e.completion) for e in user.examples] for user in self.users]
        return np.stack([alpha_of(self.engine, own, pool.manifest, pool.projection) for own in pairs])

    def answer(self, pool: Pool | None = None, alphas: Floats | None = None) -> Answers:
        """Answer all queries, each user's with the adapter that is blended for them; without a pool with the base."""
        answers, texts = [], iter(self.texts)
        for n, user in enumerate(self.users):
            adapter = (
                None if pool is None or alphas is None else self.engine.read_adapter(self.blended(pool, alphas[n]))
            )
            self.engine.set_adapter(adapter)
            answers += [self._answer(query, next(texts), adapter) for query in user.queries]
        exact, intent, structure, log_loss = zip(*answers, strict=True)
        return Answers(np.array(exact), np.array(intent), np.array(structure), np.array(log_loss, np.float32))

    def blended(self, pool: Pool, alpha: Floats) -> Bundle:
        """The adapter of one user, with the prototypes that alpha picks where the pool has some; it replaces the one before."""
        return write_adapter_bundle(
            pool.blend(alpha),
            self.folder / "adapter",
            name="blended",
            base_fingerprint=pool.manifest.base_fingerprint,
            dtype="fp16",
            pool=pool.manifest.origin,
            prototypes=pool.prototypes.picked(alpha) if pool.prototypes else None,
            replace=True,
        )

    def _answer(self, query: Example, text: Tokens, adapter: Adapter | None) -> tuple[bool, bool, bool, float]:
        generation = self.engine.generate(query.prompt, max_new_tokens=MAX_NEW_TOKENS)
        judged = score(generation.text, query)
        exact = generation.token_ids == text.ids[text.in_completion.index(True) :]
        if exact:  # what was generated is the reference: its probabilities are known
            log_loss = -float(np.mean(generation.log_probabilities))
        else:
            log_loss = answer_log_loss(self.engine, [(query.prompt, query.completion)], adapter)
        return exact, judged.intent, judged.structure, log_loss
