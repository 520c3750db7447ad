"""Adapters as files: those of HF PEFT where it has the method, and a format of our own for the rest."""

from peftlight.interop.adapter_files import load_adapter, save_adapter
from peftlight.interop.folder import read_record
from peftlight.interop.metadata import BaseRecord, Record
from peftlight.interop.tensor_files import convert_pickle

__all__ = ["BaseRecord", "Record", "convert_pickle", "load_adapter", "read_record", "save_adapter"]
