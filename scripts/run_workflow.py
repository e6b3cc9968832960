"""Runs an API-format workflow on a ComfyUI server, shows its progress, and fetches what it made.

    python scripts/run_workflow.py workflows/api/text_to_video.json --set CogXSampler.steps=10 --output video.mp4

Needs aiohttp, which every ComfyUI environment has. Progress goes to stderr, a JSON summary to stdout.
Exit code: 0 done, 1 refused, failed or interrupted on the server, 130 interrupted here.
"""
from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import aiohttp

VIDEO_SUFFIXES = {".mp4", ".webm", ".mkv", ".mov"}
BAR_WIDTH = 24


class WorkflowError(RuntimeError):
    """The workflow, a setting or the run is at fault; the message is for the person."""


def load_workflow(path: Path) -> dict[str, dict[str, Any]]:
    try:
        workflow = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WorkflowError(f"Cannot read the workflow {path}: {error}") from error
    if not isinstance(workflow, dict) or not all(
        isinstance(node, dict) and "class_type" in node for node in workflow.values()
    ):
        raise WorkflowError(f"{path} is not in API format. In ComfyUI: Workflow > Export (API).")
    return workflow


def apply_setting(workflow: Mapping[str, dict[str, Any]], setting: str) -> None:
    """Applies `NODE.input=value` in place. NODE is an id or a class; a value that is no JSON is text."""
    target, equals, text = setting.partition("=")
    name, dot, key = target.partition(".")
    if not equals or not dot:
        raise WorkflowError(f"--set {setting}: expected NODE.input=value, for example CogXSampler.steps=10")
    nodes = [node for node_id, node in workflow.items() if name in (node_id, node["class_type"])]
    if not nodes:
        known = ", ".join(f"{node_id} ({node['class_type']})" for node_id, node in workflow.items())
        raise WorkflowError(f"--set {setting}: no node {name}; there are {known}")
    try:
        value = json.loads(text)
    except ValueError:
        value = text
    for node in nodes:
        if key not in node["inputs"]:
            raise WorkflowError(f"--set {setting}: {node['class_type']} has no input {key}, but "
                                f"{', '.join(node['inputs'])}")
        node["inputs"][key] = value


class Progress:
    """Node titles and steps on stderr: a bar that moves on a terminal, a line per step elsewhere."""

    def __init__(self, workflow: Mapping[str, dict[str, Any]]) -> None:
        self.titles = {node_id: title_of(node_id, node) for node_id, node in workflow.items()}
        self.terminal = sys.stderr.isatty()
        self.shown: dict[str, int] = {}
        self.began: dict[str, float] = {}
        self.bar_open = False

    def line(self, text: str) -> None:
        if self.bar_open:
            sys.stderr.write("\n")
            self.bar_open = False
        sys.stderr.write(text + "\n")
        sys.stderr.flush()

    def handle(self, kind: str, data: Mapping[str, Any]) -> None:
        if kind == "execution_cached" and data.get("nodes"):
            self.line("Unchanged since the last run: " + ", ".join(self.title(node) for node in data["nodes"]))
        elif kind == "progress_state":
            for state in data["nodes"].values():
                if state["state"] in ("running", "finished"):
                    self.update(state["display_node_id"], int(state["value"]), int(state["max"]))

    def title(self, node_id: str) -> str:
        return self.titles.get(node_id, f"node {node_id}")

    def update(self, node_id: str, value: int, maximum: int) -> None:
        if node_id not in self.began:
            self.began[node_id] = time.monotonic()
            self.line(self.title(node_id))
        if maximum <= 1 or value <= self.shown.get(node_id, 0):
            return
        self.shown[node_id] = value
        seconds = time.monotonic() - self.began[node_id]
        filled = BAR_WIDTH * value // maximum
        text = f"  [{'#' * filled}{'.' * (BAR_WIDTH - filled)}] {value}/{maximum}  {seconds:.1f} s"
        if self.terminal:
            sys.stderr.write(f"\r{text} ")
            sys.stderr.flush()
            self.bar_open = True
        else:
            self.line(text)


def title_of(node_id: str, node: Mapping[str, Any]) -> str:
    return str(node.get("_meta", {}).get("title") or node.get("class_type") or node_id)


def describe_refusal(answer: Mapping[str, Any], workflow: Mapping[str, dict[str, Any]]) -> str:
    """The server's validation errors in words, one line each. ComfyUI repeats what was checked for several inputs."""
    lines = []
    error = answer.get("error")
    if error:
        lines.append(" ".join(str(error.get(key, "")) for key in ("message", "details")).strip()
                     if isinstance(error, dict) else str(error))
    for node_id, problem in (answer.get("node_errors") or {}).items():
        title = title_of(node_id, workflow.get(node_id, {}))
        inputs: dict[tuple[str, str], list[str]] = {}
        for each in problem["errors"]:
            name, _, reason = each["details"].partition(" - ")
            inputs.setdefault((each["message"], reason), []).append(name)
        for (message, reason), names in inputs.items():
            details = " - ".join(filter(None, (", ".join(dict.fromkeys(names)), reason)))
            lines.append(f"{title} (node {node_id}): {message}: {details}")
    return "\n".join(lines)


async def queue(session: aiohttp.ClientSession, workflow: Mapping[str, dict[str, Any]], client_id: str) -> str:
    """Sends the workflow; the prompt's id."""
    async with session.post("/prompt", json={"prompt": workflow, "client_id": client_id}) as response:
        if response.content_type != "application/json":
            raise WorkflowError(f"The server answered {response.status}: {(await response.text())[:500]}")
        answer = await response.json()
    problems = describe_refusal(answer, workflow)
    if response.status != 200:
        raise WorkflowError(f"The server refused the workflow:\n{problems or json.dumps(answer)}")
    if problems:
        sys.stderr.write(f"Part of the workflow does not run:\n{problems}\n")
    return str(answer["prompt_id"])


async def follow(socket: aiohttp.ClientWebSocketResponse[Any], prompt_id: str, progress: Progress) -> None:
    """Shows events until the prompt is done; raises WorkflowError if it does not."""
    async for message in socket:
        if message.type is not aiohttp.WSMsgType.TEXT:
            continue  # previews
        event = json.loads(message.data)
        kind, data = event["type"], event["data"]
        if data.get("prompt_id") != prompt_id:
            continue
        progress.handle(kind, data)
        if kind == "executing" and data["node"] is None:  # execution_success comes before the history is written
            return
        if kind == "execution_interrupted":
            raise WorkflowError("The run was interrupted on the server.")
        if kind == "execution_error":
            raise WorkflowError(f"{progress.title(data['node_id'])} (node {data['node_id']}) failed: "
                                f"{data['exception_type'].rpartition('.')[2]}: {data['exception_message'].strip()}")
    raise WorkflowError("The server closed the connection before the run was done; its log says why.")


async def outputs_of(session: aiohttp.ClientSession, prompt_id: str) -> dict[str, dict[str, list[Any]]]:
    """What the nodes gave to see, by node id and kind: files, and what they say of themselves as ``text``."""
    async with session.get(f"/history/{prompt_id}") as response:
        history = await response.json()
    return dict(history[prompt_id]["outputs"])


def files_of(outputs: Mapping[str, Mapping[str, Sequence[Any]]]) -> list[dict[str, str]]:
    """Node, filename, subfolder, type."""
    return [
        {"node": node_id, **entry}
        for node_id, output in outputs.items()
        for entries in output.values()
        for entry in entries
        if isinstance(entry, dict) and "filename" in entry
    ]


async def save(session: aiohttp.ClientSession, outputs: Sequence[Mapping[str, str]], target: Path) -> None:
    """Writes the first video, or else the first file, of the outputs to `target`."""
    if not outputs:
        raise WorkflowError("The workflow ran but made no file.")
    chosen = min(outputs, key=lambda file: Path(file["filename"]).suffix.lower() not in VIDEO_SUFFIXES)
    query = {key: chosen.get(key, "") for key in ("filename", "subfolder", "type")}
    async with session.get("/view", params=query) as response:
        if response.status != 200:
            raise WorkflowError(f"The server does not give out {chosen['filename']}: {response.status}")
        content = await response.read()
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(content)


async def cancel(session: aiohttp.ClientSession, prompt_id: str) -> None:
    """Ends the prompt, whether it runs or waits."""
    await (await session.post("/queue", json={"delete": [prompt_id]})).release()
    await (await session.post("/interrupt", json={"prompt_id": prompt_id})).release()


def check_output(output: Path | None) -> None:
    """Refuses before the run, not after it, what cannot be written."""
    if output is None:
        return
    if output.is_dir():
        raise WorkflowError(f"--output {output} is a folder: name a file, such as {output / 'video.mp4'}.")
    if not os.access(next(folder for folder in output.resolve().parents if folder.exists()), os.W_OK):
        raise WorkflowError(f"--output {output} cannot be written there: choose another folder.")


async def run(workflow: Mapping[str, dict[str, Any]], server: str, output: Path | None) -> dict[str, Any]:
    """Runs the workflow and returns the summary that is printed."""
    client_id, began = uuid.uuid4().hex, time.monotonic()
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=15)
    async with aiohttp.ClientSession(server, timeout=timeout) as session:
        async with session.ws_connect(f"/ws?clientId={client_id}", max_msg_size=0, heartbeat=60) as socket:
            prompt_id = await queue(session, workflow, client_id)
            progress = Progress(workflow)
            try:
                await follow(socket, prompt_id, progress)
            except asyncio.CancelledError:  # Ctrl-C
                await cancel(session, prompt_id)
                raise
        outputs = await outputs_of(session, prompt_id)
        for node_id, given in outputs.items():
            for note in given.get("text", []):
                if not note.startswith("{"):  # JSON, for programs
                    progress.line(f"{progress.title(node_id)}: {note}")
        files = files_of(outputs)
        if output is not None:
            await save(session, files, output)
    return {
        "prompt_id": prompt_id,
        "seconds": round(time.monotonic() - began, 2),
        "outputs": files,
        "saved": str(output) if output else None,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workflow", type=Path, help="an API-format workflow")
    parser.add_argument("--server", default="http://127.0.0.1:8188")
    parser.add_argument("--set", action="append", default=[], metavar="NODE.input=value", dest="settings",
                        help="change an input; NODE is an id or a class; may be repeated")
    parser.add_argument("--output", type=Path, metavar="FILE", help="save the first video to this file")
    options = parser.parse_args(arguments)
    try:
        workflow = load_workflow(options.workflow)
        for setting in options.settings:
            apply_setting(workflow, setting)
        check_output(options.output)
        server = options.server if "://" in options.server else f"http://{options.server}"
        summary = asyncio.run(run(workflow, server, options.output))
    except WorkflowError as error:
        sys.stderr.write(f"\n{error}\n")
        return 1
    except (aiohttp.ClientError, OSError, asyncio.TimeoutError) as error:
        sys.stderr.write(f"\nNo connection with the ComfyUI at {options.server}: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("\nInterrupted.\n")
        return 130
    sys.stdout.write(json.dumps(summary, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
