"""Bundles: reading, checking, installing, packing and writing them.

A bundle is a folder with a `manifest.json` that lists every other file with its size and SHA-256, or the same as one `.crayon`
archive. It is the only thing that crosses from server to device.
"""

from crayon_runtime.bundle.adapter import write_adapter, write_adapter_archive
from crayon_runtime.bundle.archive import pack
from crayon_runtime.bundle.reader import Bundle, install, unpack
from crayon_runtime.bundle.writer import BundleWriter

__all__ = ["Bundle", "BundleWriter", "install", "pack", "unpack", "write_adapter", "write_adapter_archive"]
