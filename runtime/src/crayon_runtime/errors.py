"""Every error that the public API raises, as one tree.

    CrayonError
    ├── BundleError            a bundle cannot be used
    │   ├── ManifestError      manifest.json is missing, malformed or contradicts itself
    │   ├── SchemaTooNew       the bundle was written by a newer major version
    │   ├── IntegrityError     a file's size or hash is not what the manifest says
    │   ├── SignatureError     no key that is trusted here has signed the manifest
    │   └── GoldenMismatch     the model runs, but not as its golden cases say
    ├── CheckpointError        a source model or adapter cannot be read, or lies about itself
    ├── UnsupportedModel       readable, but something in it is not supported; it is named
    ├── AdapterError           an adapter does not fit the base it is offered to
    ├── InvalidInput           a prompt, option or token id that cannot be served
    │   └── ContextOverflow    more tokens than the context holds
    ├── TemplateError          a template of programs is damaged, foreign, or of another version
    ├── BackendError           the inference backend failed or is not installed
    ├── DeviceError            a device to measure on cannot be reached, or lacks something
    ├── ServerError            a service cannot be reached, refuses, or does not answer as it should
    │   └── PoolChanged        it serves another pool now than the one that alpha was computed with
    ├── EngineClosed           used after `close()`
    ├── MissingExtra           an optional part of the package is not installed
    └── OutputError            a result could not be written (disk full, target exists)

Each carries what is wrong, where, and what to do about it, and prints as one paragraph:

    layer 3 has no tensor model.layers.3.mlp.up_proj.weight
      where: model-00002-of-00003.safetensors
      do:    download the checkpoint again; the index names this file for it
"""

from __future__ import annotations

from os import PathLike


class CrayonError(Exception):
    """Base of the tree.

    Args:
        what: what is wrong, in a sentence without a full stop.
        where: the file, field or option concerned.
        do: what the reader can do about it.
    """

    def __init__(self, what: str, *, where: str | PathLike[str] | None = None, do: str | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.where = None if where is None else str(where)
        self.do = do

    def __str__(self) -> str:
        lines = [self.what]
        if self.where:
            lines.append(f"  where: {self.where}")
        if self.do:
            lines.append(f"  do:    {self.do}")
        return "\n".join(lines)


class BundleError(CrayonError):
    """A bundle cannot be used."""


class ManifestError(BundleError):
    """manifest.json is missing, malformed or contradicts itself."""


class SchemaTooNew(BundleError):
    """The bundle was written by a newer major version of the schema."""


class IntegrityError(BundleError):
    """A file's size or hash is not what the manifest says."""


class SignatureError(BundleError):
    """No key that is trusted here has signed the manifest as it is."""


class GoldenMismatch(BundleError):
    """The model runs, but its outputs are outside the tolerance of its golden cases."""


class CheckpointError(CrayonError):
    """A source model or adapter cannot be read, or lies about itself."""


class UnsupportedModel(CrayonError):
    """The source is readable, but uses something that is not supported; the message names it."""


class AdapterError(CrayonError):
    """An adapter does not fit the base model it is offered to."""


class InvalidInput(CrayonError):
    """A prompt, an option or a token id that cannot be served."""


class ContextOverflow(InvalidInput):
    """More tokens than the context holds."""


class TemplateError(CrayonError):
    """A template of programs for ExecuTorch is damaged, is none, or was made for other versions."""


class BackendError(CrayonError):
    """The inference backend failed, or is not installed."""


class DeviceError(CrayonError):
    """A device to measure on cannot be reached, was lost, or lacks something."""


class ServerError(CrayonError):
    """A service cannot be reached, refuses, or does not answer as it should."""


class PoolChanged(ServerError):
    """The service has another pool now than the one that alpha was computed with."""


class EngineClosed(CrayonError):
    """The engine was used after `close()`."""


class MissingExtra(CrayonError):
    """An optional part of the package is not installed.

    Args:
        extra: the extra of the distribution that provides it.
        needed_for: what asked for it.
    """

    def __init__(self, extra: str, needed_for: str) -> None:
        super().__init__(
            f"{needed_for} needs the {extra!r} extra, which is not installed",
            do=f"pip install 'crayon-edge[{extra}]'",
        )
        self.extra = extra


class OutputError(CrayonError):
    """A result could not be written: the disk is full, the target exists, or is not writable."""
