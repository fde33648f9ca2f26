"""The error texts that people meet when a checkpoint does not load, and what repairs each.

They are those of torch (0.3 to 2.13), safetensors, numpy, zipfile, transformers, diffusers, peft,
accelerate, Lightning, DeepSpeed, DCP, mmengine, detectron2, fairseq and others, by topic. Texts
change between versions, so each is known by the part that stays. `docs/errors.md` is this table.
"""

from __future__ import annotations

from ckptfix.known_errors import (
    containers,
    devices,
    keys,
    libraries,
    not_files,
    pickles,
    saving,
    uses,
)
from ckptfix.known_errors.known import Known

__all__ = ["KNOWN", "Known"]

KNOWN: tuple[Known, ...] = (
    *devices.ROWS,
    *keys.ROWS,
    *libraries.ROWS,
    *saving.ROWS,
    *containers.ROWS,
    *pickles.ROWS,
    *uses.ROWS,
    *not_files.ROWS,
)
"""The first row that fits a message explains it, so what is more special comes first."""
