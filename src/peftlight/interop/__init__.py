"""Adapters as files: those of HF PEFT where it has the method, and a format of our own for the rest."""

from peftlight.interop.adapter_files import load_adapter, save_adapter

__all__ = ["load_adapter", "save_adapter"]
