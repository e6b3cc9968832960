"""A headless Chromium for ComfyUI's own front end."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, NoReturn

import pytest
from cogx.scripts.make_workflows import WorkflowError, launch

if TYPE_CHECKING:
    from playwright.sync_api import Browser


def _unavailable(reason: str) -> NoReturn:
    if os.environ.get("COGX_REQUIRE_BROWSER"):
        pytest.fail(f"COGX_REQUIRE_BROWSER is set. {reason}")
    pytest.skip(reason)


# Not for the whole session: while playwright's event loop runs, asyncio.run refuses to, which other tests need.
@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """One Chromium for a module's tests; skips without it, unless COGX_REQUIRE_BROWSER is set."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        _unavailable("playwright is not installed: python -m pip install playwright, and apt-get install chromium")
    with sync_playwright() as playwright:
        try:
            chromium = launch(playwright)
        except WorkflowError as error:
            _unavailable(str(error))
        yield chromium
        chromium.close()
