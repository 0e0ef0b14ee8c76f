"""Pools of LoRAs: built, imported, blended, looked at. The folder that comes of it is `crayon_runtime.pool`'s."""
