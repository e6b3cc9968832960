"""Which sampled latents are kept: the settings of ComfyUI's front end, and an environment variable.

Pure. The front end's part is web/recovery.js; it stores only what the user changed.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

log = logging.getLogger("cogx")

ENABLED, KEEP, MINIMUM_SECONDS = "CogX.Recovery.Enabled", "CogX.Recovery.Keep", "CogX.Recovery.MinimumSeconds"
VARIABLE = "COGX_RECOVERY"
OFF = ("0", "off", "false", "no")
MOST_KEPT = 100


@dataclass(frozen=True)
class RecoverySettings:
    enabled: bool = True
    keep: int = 5  # files of complete runs, and as many of others
    minimum_seconds: float = 60.0  # shorter runs are not saved, unless they go on from what is


def _number(value: Any, default: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return default
    try:
        number = float(value)
    except OverflowError:  # JSON has integers of any length
        return default
    return number if math.isfinite(number) else default


def from_values(values: Mapping[str, Any]) -> RecoverySettings:
    """Settings from what the front end stored. What is missing or of the wrong kind has its default."""
    default = RecoverySettings()
    enabled = values.get(ENABLED, default.enabled)
    keep = int(_number(values.get(KEEP), default.keep))
    return RecoverySettings(
        enabled=enabled if isinstance(enabled, bool) else default.enabled,
        keep=min(max(keep, 1), MOST_KEPT),
        minimum_seconds=max(_number(values.get(MINIMUM_SECONDS), default.minimum_seconds), 0.0),
    )


def read_settings(file: Path, environment: Mapping[str, str]) -> RecoverySettings:
    """Settings from ComfyUI's settings file. A damaged file gives the defaults and a warning: it stops no render."""
    if environment.get(VARIABLE, "").strip().lower() in OFF:
        return RecoverySettings(enabled=False)
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return RecoverySettings()
    except (OSError, ValueError) as error:
        log.warning("%s cannot be read (%s): latents are saved with the default settings.", file, error)
        return RecoverySettings()
    return from_values(values if isinstance(values, dict) else {})
