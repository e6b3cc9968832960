"""Makes the UI workflows and their thumbnails from the API ones, in ComfyUI's own front end.

    python dev.py serve                                      in one terminal
    python scripts/make_workflows.py                         in another, with the host's Python
    python scripts/make_workflows.py --server http://127.0.0.1:8188 text_to_video

For each workflows/api/NAME.json it writes workflows/NAME.json, which ComfyUI's template browser lists, and
workflows/NAME.jpg. The pipelines that they name need not be there. Two runs write the same files; the server's
settings stay as they are. Needs playwright, Pillow and a Chromium (apt-get install chromium, or COGX_CHROMIUM).
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import sys
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page, Playwright, Route

WORKFLOWS = Path(__file__).resolve().parent.parent / "workflows"

CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
CHROMIUM_FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--hide-scrollbars",
)
SETTINGS: dict[str, Any] = {
    "Comfy.TutorialCompleted": True,  # else the template browser opens over the graph
    "Comfy.Workflow.Persist": False,
    "Comfy.Workflow.SortNodeIdOnSave": True,
    "Comfy.Locale": "en",
    "Comfy.Minimap.Visible": False,
    "Comfy.NodeBadge.NodeSourceBadgeMode": "None",
    "Comfy.Graph.CanvasInfo": False,
}

TITLE_HEIGHT = 30
COLUMN_GAP, ROW_GAP = 60, 75  # Vue nodes are taller than the classic ones whose heights the file holds
LEFT, TOP = 100, 130
VIEW_WIDTH, VIEW_MARGIN = 1800, (90, 130)  # what a full HD window shows beside the sidebar and below the buttons
THUMBNAIL_SIDE, THUMBNAIL_QUALITY, THUMBNAIL_MARGIN = 512, 85, 40
# The whole graph would be too small to read.
THUMBNAIL_CENTRE = ("CogXTextEncode", "CogXSampler", "CogXInversion", "CogXExtend")
PANELS = 400  # room around the graph for the front end's panels, which the thumbnail leaves out


class WorkflowError(RuntimeError):
    """The workflow or the front end is at fault; the message is for the person."""


@dataclass(frozen=True)
class Column:
    """Nodes that stand below each other, in the order of ``classes`` and then of their ids."""

    width: int
    classes: tuple[str, ...]


COLUMNS = (
    Column(300, ("CogXLoadPipeline", "CogXLoadModel", "CogXLoadTextEncoder", "CogXLoadVAE", "LoadImage", "LoadVideo",
                 "MarkdownNote")),
    Column(400, ("CogXPromptSequence", "CogXTextEncode", "CogXEmptyLatent", "GetVideoComponents", "ImageScale")),
    Column(310, ("CogXImageSize", "CogXImageToVideo", "CogXVideoToVideo")),
    Column(310, ("CogXInversion", "CogXSamplerSelect", "CogXScheduler", "CogXContextWindows")),
    Column(310, ("CogXSampler", "CFGGuider", "SamplerCustomAdvanced", "CogXExtend")),
    Column(260, ("CogXDecode", "CogXDecodeVideo")),
    Column(230, ("CreateVideo",)),
    Column(360, ("SaveVideo",)),
)
# Room for text, the token count and the video; older front ends draw Vue nodes a third taller than classic ones.
LEAST_HEIGHT = {"CogXLoadPipeline": 180, "CogXTextEncode": 240, "CogXPromptSequence": 240, "CogXContextWindows": 420,
                "LoadImage": 330, "LoadVideo": 330, "CogXImageToVideo": 460, "SaveVideo": 420, "MarkdownNote": 220}

MODEL_NOTE = """\
Download the whole folder [zai-org/{name}](https://huggingface.co/zai-org/{name}) to \
**ComfyUI/models/diffusers/{name}**, then press R in ComfyUI.
"""
EXAMPLES = ("The examples are in this pack's folder **workflows/inputs**: copy them to **ComfyUI/input**, or choose "
            "your own.")
MORE_NOTE = {
    "text_to_video": "CogVideoX-2b works here too. Frames: 8N+1 (native: 49 at 8 fps, 720x480).",
    "text_to_video_1.5": "Frames: 16N+1 (native: 81 or 161 at 16 fps, 1360x768).",
    "image_to_video": "Frames: 8N+1 (native: 49 at 8 fps). The size is 720x480 only. " + EXAMPLES,
    "image_to_video_1.5": "Frames: 16N+1 (native: 81 or 161 at 16 fps). The short side is 768, the long side 768 to "
                          "1360; CogVideoX Image Size proposes it. " + EXAMPLES,
    "first_last_frame": "None of the published models was trained with an end image: take a model or a LoRA that was. "
                        + EXAMPLES,
    "video_to_video": "denoise in the sampler says how much changes. " + EXAMPLES,
    "inversion": "features in CogVideoX Inversion keeps more of the video, for more time and memory. Inversion and "
                 "CogVideoX Scheduler have the same steps. " + EXAMPLES,
    "long_text_to_video": "193 frames, four times what the model was trained on, in windows of 49: CogVideoX Context "
                          "Windows shows them. Ask for more motion than for a short video.",
    "long_image_to_video": "193 frames in windows of 49, each of which sees the image. " + EXAMPLES,
    "looping_video": "The last frame meets the first: schedule looped in CogVideoX Context Windows and closed_loop in "
                     "CogVideoX Decode to Video go together. Length may be longer: 8N+1.",
    "extend_video": "Two chunks of 81 frames go on from the last 17 of the video, which should have 16 frames per "
                    "second. A prompt for each chunk, one on each line. Queued again after an interruption, it goes on "
                    "from the last finished chunk. " + EXAMPLES,
}

LOAD_API = "([prompt, name]) => app.loadApiJson(prompt, name)"
ADD_NOTE = """([id, title, text]) => {
    const note = LiteGraph.createNode("MarkdownNote");
    note.id = id;
    note.title = title;
    note.widgets[0].value = text;
    app.graph.add(note);
}"""
# Fixed: queueing again after a failed decode must find the sampled latent in ComfyUI's cache.
FIX_SEEDS = """() => app.graph.nodes.forEach(node => node.widgets?.forEach(widget => {
    if (widget.name === "control_after_generate") widget.value = "fixed";
}))"""
READ_NODES = """() => app.graph.nodes.map(node => ({id: Number(node.id), type: node.type,
    height: Math.ceil(node.computeSize()[1])}))"""
PLACE_NODES = """places => {
    for (const {id, x, y, width, height} of places) {
        const node = app.graph.getNodeById(id);
        node.pos = [x, y];
        node.setSize([width, height]);
    }
}"""
# Through JSON text, as the front end saves it: undefined must vanish, and playwright would make it null.
SERIALIZE = "() => JSON.stringify(app.graph.serialize())"
SHOW = """([scale, x, y]) => {
    app.canvas.ds.scale = scale;
    app.canvas.ds.offset = [x, y];
    app.canvas.show_info = false;
    app.canvas.draw(true, true);
}"""
TWO_FRAMES = "() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"


@dataclass(frozen=True)
class Place:
    """Where a node stands, in graph units. ``y`` is the node's body; its title is above."""

    id: int
    type: str
    x: int
    y: int
    width: int
    height: int


# --- The front end ---


def find_chromium(playwright: Playwright) -> str:
    """The path of a Chromium.

    Raises:
        WorkflowError: there is none; says how to install it.
    """
    named = os.environ.get("COGX_CHROMIUM")
    candidates = [named] if named else [*CHROMIUM_NAMES, playwright.chromium.executable_path]
    found = next(filter(None, map(shutil.which, candidates)), None)
    if found is None:
        raise WorkflowError(f"No Chromium ({', '.join(map(str, candidates))}). Install one with apt-get install "
                            "chromium or python -m playwright install chromium, or set COGX_CHROMIUM to its path.")
    return found


def launch(playwright: Playwright) -> Browser:
    """A headless Chromium. Raises WorkflowError if there is none."""
    return playwright.chromium.launch(executable_path=find_chromium(playwright), args=list(CHROMIUM_FLAGS))


def open_front_end(browser: Browser, server: str, vue_nodes: bool, size: tuple[int, int] = (1920, 1080)) -> Page:
    """A new page with the front end of ``server``, ready to load a workflow.

    The page gets settings of its own (nothing is stored on the server) and nothing from outside the server.
    """
    settings = json.dumps({**SETTINGS, "Comfy.VueNodes.Enabled": vue_nodes})

    def answer(route: Route) -> None:
        if not route.request.url.startswith(server):
            route.abort()
        elif "/api/settings" not in route.request.url:
            route.continue_()
        elif route.request.method == "GET":
            route.fulfill(body=settings, content_type="application/json")
        else:
            route.fulfill(status=200)

    page = browser.new_page(viewport={"width": size[0], "height": size[1]}, device_scale_factor=1)
    page.route("**/*", answer)
    page.goto(server)
    # The front end opens its default workflow by itself; ours must come after that.
    page.wait_for_function("window.app?.vueAppReady && app.graph?.nodes.length > 0", timeout=60_000)
    page.wait_for_load_state("networkidle")
    return page


# --- Layout ---


def arrange(nodes: Sequence[Mapping[str, Any]]) -> list[Place]:
    """Places for nodes of ``{id, type, height}``: columns from left to right, in the order of the work.

    Raises:
        WorkflowError: a node has no column.
    """
    known = {kind for column in COLUMNS for kind in column.classes}
    strangers = sorted({node["type"] for node in nodes} - known)
    if strangers:
        raise WorkflowError(f"No place for {', '.join(strangers)}: add them to COLUMNS in make_workflows.py.")
    places, x = [], LEFT
    for column in COLUMNS:
        members = [node for node in nodes if node["type"] in column.classes]
        y = TOP
        for node in sorted(members, key=lambda node: (column.classes.index(node["type"]), node["id"])):
            height = max(node["height"], LEAST_HEIGHT.get(node["type"], 0))
            places.append(Place(node["id"], node["type"], x, y, column.width, height))
            y += height + ROW_GAP
        x += (column.width + COLUMN_GAP) if members else 0
    return places


def bounds(places: Sequence[Place]) -> tuple[int, int, int, int]:
    """Left, top, width and height of all nodes with their titles."""
    left, top = min(place.x for place in places), min(place.y for place in places) - TITLE_HEIGHT
    right = max(place.x + place.width for place in places)
    bottom = max(place.y + place.height for place in places)
    return left, top, right - left, bottom - top


def view(places: Sequence[Place]) -> dict[str, Any]:
    """The front end's scale and offset that show the whole graph."""
    left, top, width, _ = bounds(places)
    scale = round(min(1.0, VIEW_WIDTH / width), 2)
    return {"scale": scale, "offset": [round(VIEW_MARGIN[0] / scale) - left, round(VIEW_MARGIN[1] / scale) - top]}


# --- Workflow and thumbnail ---


def model_note(name: str, prompt: Mapping[str, Any]) -> str | None:
    """What a note says about the model files, for a workflow that loads a published pipeline."""
    names = [node["inputs"]["pipeline"] for node in prompt.values() if node["class_type"] == "CogXLoadPipeline"]
    if not names:
        return None
    return "\n\n".join(filter(None, [MODEL_NOTE.format(name=names[0]).strip(), MORE_NOTE.get(name)]))


def make_workflow(page: Page, name: str, prompt: Mapping[str, Any]) -> tuple[dict[str, Any], list[Place]]:
    """The UI workflow of an API-format ``prompt``, laid out, and the places of its nodes."""
    page.evaluate(LOAD_API, [prompt, name])
    text = model_note(name, prompt)
    if text:
        page.evaluate(ADD_NOTE, [max(map(int, prompt)) + 1, "Model files", text])
    page.evaluate(FIX_SEEDS)
    nodes = page.evaluate(READ_NODES)
    missing = sorted({node["class_type"] for node in prompt.values()} - {node["type"] for node in nodes})
    if missing:
        raise WorkflowError(f"This ComfyUI has no {', '.join(missing)}: is the pack installed in it?")
    places = arrange(nodes)
    page.evaluate(PLACE_NODES, [vars(place) for place in places])
    workflow = json.loads(page.evaluate(SERIALIZE))
    if workflow.get("definitions", {}).get("subgraphs"):
        raise WorkflowError(f"{name} has subgraphs, which the template browser's users must not meet.")
    workflow["id"] = str(uuid.uuid5(uuid.NAMESPACE_URL, f"comfyui-cogx/workflows/{name}"))  # the same on every run
    workflow["extra"] = {"ds": view(places)}
    return workflow, places


def make_thumbnail(page: Page, places: Sequence[Place]) -> bytes:
    """A square JPEG, as the template browser's cards are, of the heart of the graph that ``page`` shows."""
    from PIL import Image

    left, top, width, height = bounds(places)
    page.set_viewport_size({"width": width + 2 * PANELS, "height": height + 2 * PANELS})
    page.evaluate(SHOW, [1, PANELS - left, PANELS - top])
    page.evaluate(TWO_FRAMES)
    page.wait_for_timeout(500)  # text boxes follow the canvas in their own time
    side = height + 2 * THUMBNAIL_MARGIN
    heart_left, _, heart_width, _ = bounds([place for place in places if place.type in THUMBNAIL_CENTRE])
    shot = page.screenshot(clip={"x": PANELS + heart_left - left + (heart_width - side) / 2,
                                 "y": PANELS - THUMBNAIL_MARGIN, "width": side, "height": side})
    picture = Image.open(io.BytesIO(shot)).convert("RGB")
    small = picture.resize((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    small.save(file, "JPEG", quality=THUMBNAIL_QUALITY, optimize=True)
    return file.getvalue()


def make(browser: Browser, server: str, name: str) -> None:
    """Writes ``workflows/NAME.json`` and ``workflows/NAME.jpg``."""
    prompt = json.loads((WORKFLOWS / "api" / f"{name}.json").read_text(encoding="utf-8"))
    page = open_front_end(browser, server, vue_nodes=False)
    workflow, places = make_workflow(page, name, prompt)
    text = json.dumps(workflow, indent=2, ensure_ascii=False) + "\n"
    (WORKFLOWS / f"{name}.json").write_text(text, encoding="utf-8", newline="\n")
    (WORKFLOWS / f"{name}.jpg").write_bytes(make_thumbnail(page, places))
    page.close()


def main(arguments: Sequence[str] | None = None) -> int:
    every = sorted(path.stem for path in (WORKFLOWS / "api").glob("*.json"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which workflows (default: {', '.join(every)})")
    parser.add_argument("--server", default="http://127.0.0.1:8188", help="a running ComfyUI with this pack")
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.names) - set(every))
    if unknown:
        parser.error(f"no workflows/api/{unknown[0]}.json; there are {', '.join(every)}")
    try:
        from playwright.sync_api import Error, sync_playwright
    except ImportError:
        sys.stderr.write("playwright is not installed: pip install playwright\n")
        return 1
    try:
        with sync_playwright() as playwright:
            browser = launch(playwright)
            for name in options.names or every:
                make(browser, options.server.rstrip("/"), name)
                print(f"workflows/{name}.json, workflows/{name}.jpg")
            browser.close()
    except (WorkflowError, Error) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
