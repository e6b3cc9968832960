"""What CogX Save Model notes in a file beside the weights: all of a ModelSpec, so that nothing has to be guessed.

Pure: neither torch nor ComfyUI.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from ..models.specs import PUBLISHED, LatentSpec, ModelSpec, ScheduleSpec, SpecError, TransformerSpec, pick

SPEC_KEY = "cogx.spec"
_PARTS = {"transformer": TransformerSpec, "latent": LatentSpec, "schedule": ScheduleSpec}
_COUNTS = ("fps", "native_width", "native_height", "max_frames", "text_tokens")


def spec_metadata(spec: ModelSpec) -> dict[str, str]:
    return {SPEC_KEY: json.dumps(asdict(spec)), "cogx.variant": spec.name}


def spec_from_metadata(metadata: Mapping[str, str], where: str) -> ModelSpec | None:
    """The model that a file's metadata names; None if it names none.

    Raises:
        SpecError: the note is damaged.
    """
    if SPEC_KEY not in metadata:
        return None
    try:
        noted = json.loads(metadata[SPEC_KEY])
        values: dict[str, Any] = {name: int(noted[name]) for name in _COUNTS}
        for name, kind in _PARTS.items():
            values[name] = kind(**pick(kind, noted[name], f"{where}, {SPEC_KEY}"))
        return replace(PUBLISHED[noted["name"]], **values)
    except SpecError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise SpecError(f"{where}: its note {SPEC_KEY} is damaged ({error!r}). Save the model again, or download the "
                        "file again.") from None
