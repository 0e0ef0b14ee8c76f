"""The server LLM, which is not ours: any OpenAI-compatible endpoint, or a model of this machine that is made one.

Upstream        asks it, from any thread
Endpoint        asks it, from an event loop, also for answers that are streamed
serving         makes a bundle an endpoint, for as long as a block runs; `as_bundle` makes a Hugging Face folder a bundle
"""

from crayon_server.upstream.client import Upstream
from crayon_server.upstream.endpoint import Endpoint
from crayon_server.upstream.errors import UpstreamError
from crayon_server.upstream.local import as_bundle, serving

__all__ = ["Endpoint", "Upstream", "UpstreamError", "as_bundle", "serving"]
