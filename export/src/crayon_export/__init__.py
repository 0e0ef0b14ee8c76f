"""From a checkpoint and LoRAs to a bundle that a device runs."""

from crayon_export.adapters import convert_adapter
from crayon_export.exporter import Exported, export
from crayon_export.report import Report

__all__ = ["Exported", "Report", "convert_adapter", "export"]
