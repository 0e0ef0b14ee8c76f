"""A model on this device as an OpenAI-compatible server, for programs and pages of this machine. Needs the `serve` extra."""

from crayon_runtime.server.app import create_app

__all__ = ["create_app"]
