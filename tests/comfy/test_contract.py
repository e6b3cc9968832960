"""Node ids, inputs and outputs are frozen: tests/data/nodes.json, and a CHANGELOG line for each change of it.

To change the contract (append optional inputs only): run this file with ``COGX_WRITE_CONTRACT=1``, and add the new
digest to CHANGELOG.md with what changed.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SNAPSHOT = ROOT / "tests" / "data" / "nodes.json"

# Their lists are the host's (samplers, schedules) or the disk's (files).
OPEN_LISTS = {"pipeline", "checkpoint", "text_encoder", "vae", "sampler", "schedule"}


def contract() -> dict[str, Any]:
    from cogx.nodes import NODES

    def describe(item: Any) -> dict[str, Any]:
        entry = {"id": item.id, "type": item.io_type, "optional": bool(item.optional),
                 "default": getattr(item, "default", None)}
        if item.io_type == "COMBO" and item.id not in OPEN_LISTS:
            entry["options"] = list(item.options)
        return entry

    schemas = [node.define_schema() for node in NODES]
    return {schema.node_id: {"inputs": [describe(item) for item in schema.inputs],
                             "outputs": [item.io_type for item in schema.outputs]} for schema in schemas}


def digest(value: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=False).encode()).hexdigest()[:8]


def test_contract_is_the_snapshot():
    current = contract()
    if os.environ.get("COGX_WRITE_CONTRACT"):
        SNAPSHOT.write_text(json.dumps(current, indent=1) + "\n", encoding="utf-8")
    assert current == json.loads(SNAPSHOT.read_text(encoding="utf-8")), __doc__


def test_changelog_names_the_contract():
    value = digest(json.loads(SNAPSHOT.read_text(encoding="utf-8")))
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"`{value}`" in changelog, f"CHANGELOG.md lacks `{value}`. {__doc__}"


def test_every_node_has_a_help_page():
    for node, value in json.loads(SNAPSHOT.read_text(encoding="utf-8")).items():
        page = (ROOT / "web" / "docs" / f"{node}.md").read_text(encoding="utf-8")
        missing = [item["id"] for item in value["inputs"] if f"`{item['id']}`" not in page]
        assert not missing, f"{node}.md does not explain {missing}"
