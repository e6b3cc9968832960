"""The pack's settings in ComfyUI's own front end."""

from __future__ import annotations

import json
from dataclasses import astuple
from typing import TYPE_CHECKING, Any

import pytest
from cogx.model_loaders.recovery_settings import ENABLED, KEEP, MINIMUM_SECONDS, RecoverySettings
from cogx.scripts.make_workflows import open_front_end
from cogx.tests.comfy_server import ComfyServer

if TYPE_CHECKING:
    from playwright.sync_api import Browser

IDS = [ENABLED, KEEP, MINIMUM_SECONDS]


@pytest.mark.browser
@pytest.mark.server
@pytest.mark.parametrize("comfyui", ["server", "oldest_server"], ids=["newest", "oldest"])
def test_recovery_settings_show_and_are_sent(request: pytest.FixtureRequest, browser: Browser, comfyui: str) -> None:
    """Their defaults are those of the server's side, and what the user changes is stored under the same names."""
    server: ComfyServer = request.getfixturevalue(comfyui)
    page = open_front_end(browser, server.url, vue_nodes=False)
    values = page.evaluate("ids => ids.map(id => app.extensionManager.setting.get(id))", IDS)
    assert tuple(values) == astuple(RecoverySettings())

    page.evaluate("app.extensionManager.command.execute('Comfy.ShowSettingsDialog')")
    dialog = page.get_by_role("dialog")
    dialog.get_by_text("CogX", exact=True).first.click()
    for name in ("Save sampled latents", "Saved latents to keep", "Save sampled latents of runs over (seconds)"):
        dialog.get_by_text(name, exact=True).first.wait_for(state="visible", timeout=10_000)

    stored: dict[str, Any] = {}
    page.on("request", lambda sent: stored.update(_stored(sent)))
    with page.expect_response(lambda response: "/settings" in response.url and response.request.method == "POST"):
        dialog.get_by_role("switch").last.click()
    assert stored == {ENABLED: False}
    page.close()


def _stored(sent: Any) -> dict[str, Any]:
    """What a request to /settings or /settings/ID stores."""
    if sent.method != "POST" or "/settings" not in sent.url:
        return {}
    name, value = sent.url.rsplit("/settings", 1)[1].strip("/"), json.loads(sent.post_data)
    return {name: value} if name else value
