"""What no ten examples can reach: a LoRA of each user's own, trained on hundreds of texts of their whole task.

Runs in a process of its own beside the building of the pool. Reads a `Job` from stdin, as JSON.
"""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec
import numpy as np

from crayon_runtime.blend import Blended
from crayon_runtime.pool import write_adapter_bundle
from crayon_server import models, training
from crayon_server.data.phone_assistant import benchmark, more_examples
from crayon_server.pool.build import Settings, train


class Job(msgspec.Struct, frozen=True):
    """What to train.

    Attributes:
        users: validation users of the benchmark, by the names of their adapters.
        texts: of each user; none has the answer of one of their queries.
        out: the folder of the adapter bundles.
    """

    users: dict[str, str]
    texts: int
    steps: int
    threads: int | None
    out: str


def main(job: Job) -> None:
    """Train all users in one go, as a pool whose weights are 1 for the user's own LoRA and 0 for the others."""
    import torch

    model_dir = models.load_nano()
    tokenizer = models.load_tokenizer(model_dir)
    model = models.load(model_dir, torch.float32)
    people = {user.name: user for user in benchmark().validation}
    examples = [e for user in job.users.values() for e in more_examples(people[user], job.texts)]
    texts = [training.tokenize(tokenizer, example) for example in examples]
    own = np.eye(len(job.users), dtype=np.float32)
    settings = Settings(adapters=len(job.users), steps=job.steps, threads=job.threads)
    pad_id = training.pad_id(tokenizer)
    loras, _ = train(model, texts, lambda batch, _: own[np.array(batch) // job.texts], settings, pad_id=pad_id)
    fingerprint = training.base_fingerprint(model_dir)
    for n, name in enumerate(job.users):
        adapter = Blended.of([loras.lora(n)], np.ones(1, np.float32), settings.scale, "separate")
        write_adapter_bundle(adapter, Path(job.out) / name, name=name, base_fingerprint=fingerprint)


if __name__ == "__main__":
    from crayon_server.cli import quiet

    with quiet():
        main(msgspec.json.decode(sys.stdin.buffer.read(), type=Job))
