"""The service that customizes devices: alpha comes in, a signed adapter bundle goes out, and nothing is kept of who asked."""

from crayon_server.service.app import create_app

__all__ = ["create_app"]
