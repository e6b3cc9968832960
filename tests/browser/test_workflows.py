"""The shipped workflows, help pages and thumbnails in ComfyUI's own front end, on classic and on Vue nodes."""

from __future__ import annotations

import json
import re
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import av
import pytest
from cogx.models.specs import PUBLISHED
from cogx.scripts.make_workflows import open_front_end
from cogx.tests.comfy_server import ROOT, ComfyServer, Run

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

PACK = "comfyui-cogx"
WORKFLOWS = ROOT / "workflows"
NAMES = sorted(path.stem for path in (WORKFLOWS / "api").glob("*.json"))
TINY = {"text_to_video": "5B", "text_to_video_1.5": "1.5-5B", "image_to_video": "5B-I2V",
        "image_to_video_1.5": "1.5-5B-I2V", "first_last_frame": "5B-I2V", "video_to_video": "5B",
        "inversion": "5B", "long_text_to_video": "5B", "long_image_to_video": "5B-I2V", "looping_video": "5B",
        "extend_video": "1.5-5B-I2V"}
WIDTH, HEIGHT, FRAMES, STEPS = 96, 64, 17, 4
SIZE = {"width": WIDTH, "height": HEIGHT}
SMALL: dict[str, dict[str, Any]] = {  # by the kind of a node, what makes its work small
    "CogXEmptyLatent": {**SIZE, "length": FRAMES}, "CogXImageToVideo": {**SIZE, "length": FRAMES},
    "CogXVideoToVideo": {**SIZE, "length": FRAMES}, "ImageScale": SIZE,
    "CogXSampler": {"steps": STEPS}, "CogXScheduler": {"steps": STEPS}, "CogXInversion": {"steps": STEPS},
    "CogXContextWindows": {"length": FRAMES, "overlap": 8},
    "CogXExtend": {"steps": STEPS, "length": FRAMES, "overlap": 9},
}
LENGTHS = {"long_text_to_video": 33, "long_image_to_video": 33}  # more than a window
# What else comes out: a loop of 5 latent frames; the example's 81 frames and 8 of each chunk.
MADE = {**LENGTHS, "looping_video": 20, "extend_video": 97}
THUMBNAIL_BYTES = 60_000

# What the front end says in error overlays, dialogs and toasts; nodes that it does not know.
COMPLAINTS = """() => {
    const boxes = ["[data-testid*=error]", "[role=alert]", "[role=alertdialog]", "[role=dialog]",
                   ".p-toast-message-error", ".comfy-modal"];
    const seen = [...document.querySelectorAll(boxes.join())].filter(box => box.checkVisibility());
    const said = seen.map(box => box.innerText);
    const unknown = app.graph.nodes.filter(node => node.has_errors || !(node.type in LiteGraph.registered_node_types));
    return [...said.filter(text => text.trim()), ...unknown.map(node => `unknown node ${node.type}`)];
}"""
DRAWN_AS_VUE_NODES = """expected => expected ===
    app.graph.nodes.every(node => document.querySelector(`[data-node-id="${node.id}"]`) !== null)"""
SETTLED = "() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"
SET_WIDGETS = """values => {
    for (const [id, name, value] of values) {
        const widget = app.graph.getNodeById(id).widgets.find(widget => widget.name === name);
        widget.value = value;
        widget.callback?.(value);
    }
}"""
# Node boxes in graph units, titles included: as drawn for Vue nodes, which may be taller than the graph says.
BOXES = """() => app.graph.nodes.map(node => {
    const element = document.querySelector(`[data-node-id="${node.id}"]`);
    const height = element ? element.offsetHeight : node.size[1] + LiteGraph.NODE_TITLE_HEIGHT;
    return {title: node.title, left: node.pos[0], right: node.pos[0] + node.size[0],
            top: node.pos[1] - LiteGraph.NODE_TITLE_HEIGHT, bottom: node.pos[1] - LiteGraph.NODE_TITLE_HEIGHT + height};
})"""

# In the card of a template's heading: what has no other heading in it.
PICTURE_IS_SHOWN = """heading => {
    let card = heading;
    while (card.parentElement.querySelectorAll(heading.tagName).length === 1) card = card.parentElement;
    return [...card.querySelectorAll("img")].some(image => image.naturalWidth === 512);
}"""

OpenPage = Callable[[ComfyServer], "Page"]

both_renderers = pytest.mark.parametrize("vue_nodes", [False, True], ids=["classic", "vue"])
each_workflow = pytest.mark.parametrize("name", NAMES)


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@dataclass
class Pages:
    """The front ends that are open, one per server and renderer, and the scripts that failed in them."""

    browser: Browser
    opened: dict[tuple[str, bool], Page] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def get(self, server: ComfyServer, vue_nodes: bool) -> Page:
        key = (server.url, vue_nodes)
        if key not in self.opened:
            self.opened[key] = open_front_end(self.browser, server.url, vue_nodes)
            self.opened[key].on("pageerror", lambda error: self.failures.append(str(error)))
        return self.opened[key]


@pytest.fixture(scope="module")
def pages(browser: Browser) -> Pages:
    return Pages(browser)


@pytest.fixture
def open_page(pages: Pages, vue_nodes: bool) -> Iterator[OpenPage]:
    """A server's front end with the nodes that the test asks for; no script may have failed in it meanwhile."""
    pages.failures.clear()
    yield lambda server: pages.get(server, vue_nodes)
    assert pages.failures == []


def load(page: Page, name: str, vue_nodes: bool) -> None:
    page.evaluate("workflow => app.loadGraphData(workflow)", read(WORKFLOWS / f"{name}.json"))
    page.wait_for_function(DRAWN_AS_VUE_NODES, arg=vue_nodes, timeout=10_000)
    page.evaluate(SETTLED)


def converted(page: Page) -> dict[str, Any]:
    """What the front end would queue."""
    return page.evaluate("app.graphToPrompt().then(made => made.output)")


def without_titles(prompt: dict[str, Any]) -> dict[str, Any]:
    return {node: {key: value for key, value in content.items() if key != "_meta"} for node, content in prompt.items()}


def without_newer_defaults(prompt: dict[str, Any], twin: dict[str, Any], server: ComfyServer) -> dict[str, Any]:
    """``prompt`` without what the twin lacks in core's nodes: optional inputs at their defaults, because not every
    ComfyUI has them and it runs on all, and widgets of the front end alone, such as the preview in Load Video."""
    kept = {}
    for node, content in prompt.items():
        kind = content["class_type"]
        known = server.get(f"/object_info/{kind}")[kind]["input"]
        schema, names = known.get("optional", {}), {name for group in known.values() for name in group}
        given = twin.get(node, {"inputs": {}})["inputs"]
        defaults = {} if kind.startswith("CogX") else {
            name: spec[1]["default"] for name, spec in schema.items() if name not in given and "default" in spec[1]}
        inputs = {name: value for name, value in content["inputs"].items()
                  if (name not in defaults or value != defaults[name]) and (name in names or kind.startswith("CogX"))}
        kept[node] = {**content, "inputs": inputs}
    return kept


def prompt_node(api: dict[str, Any]) -> str:
    return next(node for node, content in api.items() if content["class_type"] in ("CogXTextEncode",
                                                                                   "CogXPromptSequence"))


def queue_from_page(page: Page, server: ComfyServer, name: str, text: str) -> Run:
    """Run the loaded workflow, made tiny, from within the page."""
    api = read(WORKFLOWS / "api" / f"{name}.json")
    node_of = {content["class_type"]: int(node) for node, content in reversed(api.items())}
    small = [[node, widget, value] for kind, node in node_of.items() for widget, value in SMALL.get(kind, {}).items()]
    if name in LENGTHS:
        small += [[node, "length", LENGTHS[name]] for kind, node in node_of.items()
                  if kind in ("CogXEmptyLatent", "CogXImageToVideo")]
    page.evaluate(SET_WIDGETS, [
        [node_of["CogXLoadPipeline"], "pipeline", TINY[name]], [int(prompt_node(api)), "text", text], *small])
    with page.expect_response("**/api/prompt") as response:
        page.evaluate("app.queuePrompt(0, 1)")
    answer = response.value.json()
    assert not answer.get("error") and not answer.get("node_errors"), answer
    return server.wait(answer["prompt_id"])


def test_each_api_workflow_has_its_ui_twin_and_picture() -> None:
    for suffix in ("json", "jpg"):
        assert sorted(path.stem for path in WORKFLOWS.glob(f"*.{suffix}")) == NAMES
    assert sorted(TINY) == NAMES


@each_workflow
def test_the_file_is_flat_and_bound_to_no_machine(name: str) -> None:
    text = (WORKFLOWS / f"{name}.json").read_text(encoding="utf-8")
    workflow = json.loads(text)
    assert not workflow.get("definitions")  # subgraphs
    # Queueing again after a failed decode must not sample again. (An inversion has no seed.)
    assert all("fixed" in node["widgets_values"] for node in workflow["nodes"]
               if node["type"] in ("CogXSampler", "CogXExtend"))
    assert not re.search(r'"(randomize|increment|decrement)"', text)
    assert not re.search(r"/(home|root|tmp|work|Users)/|[A-Z]:\\\\|127\.0\.0\.1|localhost", text)


@pytest.mark.browser
@pytest.mark.server
@pytest.mark.parametrize("comfyui", ["server", "oldest_server"], ids=["newest", "oldest"])
@both_renderers
@each_workflow
def test_front_end_converts_it_to_the_api_twin(request: pytest.FixtureRequest, open_page: OpenPage, comfyui: str,
                                               vue_nodes: bool, name: str) -> None:
    server: ComfyServer = request.getfixturevalue(comfyui)
    page = open_page(server)
    load(page, name, vue_nodes)
    assert page.evaluate(COMPLAINTS) == []  # neither about the pipeline, which is not here
    twin = read(WORKFLOWS / "api" / f"{name}.json")
    made = without_titles(converted(page))
    assert without_newer_defaults(made, twin, server) == without_titles(twin)
    titles = {str(node): title for node, title in page.evaluate("app.graph.nodes.map(node => [node.id, node.title])")}
    assert {node: titles[node] for node in twin} == {node: content["_meta"]["title"] for node, content in twin.items()}


@pytest.mark.browser
@pytest.mark.server
@pytest.mark.parametrize("comfyui", ["server", "oldest_server"], ids=["newest", "oldest"])
@both_renderers
@each_workflow
def test_nodes_do_not_overlap(request: pytest.FixtureRequest, open_page: OpenPage, comfyui: str, vue_nodes: bool,
                              name: str) -> None:
    page = open_page(request.getfixturevalue(comfyui))
    load(page, name, vue_nodes)
    boxes = page.evaluate(BOXES)
    overlaps = [
        (one["title"], other["title"])
        for index, one in enumerate(boxes) for other in boxes[:index]
        if max(one["left"], other["left"]) < min(one["right"], other["right"])
        and max(one["top"], other["top"]) < min(one["bottom"], other["bottom"])
    ]
    assert overlaps == []


@pytest.mark.browser
@pytest.mark.server
@both_renderers
@each_workflow
def test_it_runs_from_the_page_and_shows_the_token_count(server: ComfyServer, open_page: OpenPage, vue_nodes: bool,
                                                         name: str) -> None:
    page = open_page(server)
    load(page, name, vue_nodes)
    # A text that no other test has: what is cached is not run, and shows nothing.
    text = f"a red balloon over the sea, {name}, {'vue' if vue_nodes else 'classic'}"
    run = queue_from_page(page, server, name, text)
    api = read(WORKFLOWS / "api" / f"{name}.json")
    node_of = {content["class_type"]: node for node, content in reversed(api.items())}

    with av.open(str(server.output(run, node_of["SaveVideo"]))) as video:
        assert video.format.name.startswith("mov,mp4")
        stream = video.streams.video[0]
        frames = [(frame.width, frame.height) for frame in video.decode(stream)]
        assert frames == [(WIDTH, HEIGHT)] * MADE.get(name, FRAMES)
        assert float(stream.average_rate) == (
            api[node_of["CreateVideo"]]["inputs"]["fps"] if "CreateVideo" in node_of else PUBLISHED[TINY[name]].fps)

    node = prompt_node(api)
    count, = run.outputs[node]["text"]
    assert re.fullmatch(r"(1: )?\d+ of 22[46] tokens", count)
    place = page.locator(f"[data-node-id='{node}']") if vue_nodes else page.locator(".dom-widget")
    place.get_by_text(count, exact=True).wait_for(state="visible", timeout=10_000)


@pytest.mark.server
def test_every_node_has_a_help_page(server: ComfyServer) -> None:
    nodes = [name for name, info in server.get("/object_info").items() if info["python_module"].endswith(PACK)]
    assert len(nodes) > 5
    missing = [name for name in nodes if not fetch(server, f"/extensions/{PACK}/docs/{name}.md")]
    assert missing == []


def fetch(server: ComfyServer, path: str) -> bytes:
    """The content at ``path``, or nothing if there is none."""
    try:
        with urllib.request.urlopen(server.url + path, timeout=30) as response:
            return response.read()
    except urllib.error.HTTPError as error:
        assert error.code == 404, error
        return b""


@pytest.mark.server
def test_template_browser_gets_workflows_and_pictures(server: ComfyServer) -> None:
    assert sorted(server.get("/api/workflow_templates")[PACK]) == NAMES
    for name in NAMES:
        assert server.get(f"/api/workflow_templates/{PACK}/{name}.json") == read(WORKFLOWS / f"{name}.json")
        picture = fetch(server, f"/api/workflow_templates/{PACK}/{name}.jpg")
        assert picture.startswith(b"\xff\xd8\xff") and len(picture) < THUMBNAIL_BYTES


@pytest.mark.browser
@pytest.mark.server
@pytest.mark.parametrize("vue_nodes", [True], ids=["vue"])  # a dialog: it is the same with both
def test_template_browser_shows_workflows_and_pictures(server: ComfyServer, open_page: OpenPage) -> None:
    page = open_page(server)
    page.evaluate("app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    dialog = page.get_by_role("dialog")
    dialog.get_by_text(PACK, exact=True).first.click()
    for name in NAMES:
        heading = dialog.get_by_role("heading", name=name, exact=True)
        heading.wait_for(state="visible", timeout=10_000)
        heading.scroll_into_view_if_needed()  # a picture is loaded when it is seen
        page.wait_for_function(PICTURE_IS_SHOWN, arg=heading.element_handle(), timeout=10_000)
