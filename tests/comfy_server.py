"""A real ComfyUI server with this pack, for tests: started in its own base directory, talked to through its API."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
START_SECONDS = 180
RUN_SECONDS = 600


class PromptError(Exception):
    """A prompt that was refused (``node_errors``) or failed (``exception_message``)."""

    def __init__(self, message: str, details: Any) -> None:
        super().__init__(message)
        self.details = details


@dataclass
class Run:
    """What a finished prompt left: outputs per node id, and the events of its websocket if they were asked for."""

    outputs: dict[str, Any]
    events: list[dict[str, Any]] = field(default_factory=list)
    previews: list[bytes] = field(default_factory=list)


class ComfyServer:
    """Starts ``main.py`` of a ComfyUI tree. ``base`` gets custom_nodes/, models/, input/ and output/."""

    def __init__(self, tree: Path, base: Path, *arguments: str) -> None:
        self.tree, self.base, self.arguments = tree, base, arguments
        self.log_path = base / "server.log"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def log(self) -> str:
        return self.log_path.read_text(encoding="utf-8", errors="replace")

    def start(self) -> ComfyServer:
        nodes = self.base / "custom_nodes"
        nodes.mkdir(parents=True, exist_ok=True)
        if not (nodes / "comfyui-cogx").exists():
            (nodes / "comfyui-cogx").symlink_to(ROOT, target_is_directory=True)
        shutil.copytree(ROOT / "workflows" / "inputs", self.base / "input", dirs_exist_ok=True)
        command = [sys.executable, "main.py", "--port", str(self.port), "--base-directory", str(self.base),
                   "--database-url", "sqlite:///:memory:", "--disable-auto-launch", *self.arguments]
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        with open(self.log_path, "wb") as log:
            self._process = subprocess.Popen(command, cwd=self.tree, stdout=log, stderr=log, env=environment)
        self._wait_until_ready()
        assert not re.search(r"IMPORT FAILED\S*:? \S*comfyui-cogx", self.log), self.log
        return self

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            assert self._process is not None and self._process.poll() is None, self.log
            try:
                self.get("/system_stats")
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.2)
            else:
                return
        raise TimeoutError(self.log)

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    def kill(self) -> None:
        """Without a warning, as the system's out-of-memory killer does."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None and bool(self.get("/system_stats"))

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.url + path, timeout=30) as response:
            return json.loads(response.read())

    def post(self, path: str, body: Any) -> Any:
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(),
                                         {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as response:
            content = response.read()
        return json.loads(content) if content else None

    def queue(self, prompt: dict[str, Any], **extra: Any) -> str:
        """Queue an API-format prompt and return its id.

        Raises:
            PromptError: the server refused it at validation.
        """
        try:
            answer = self.post("/prompt", {"prompt": prompt, **extra})
        except urllib.error.HTTPError as error:
            details = json.loads(error.read())
            raise PromptError(_validation_words(details), details) from None
        if answer.get("node_errors"):
            raise PromptError(_validation_words(answer), answer)
        return answer["prompt_id"]

    def wait(self, prompt_id: str) -> Run:
        """The finished run of a prompt.

        Raises:
            PromptError: it failed or was interrupted.
        """
        deadline = time.monotonic() + RUN_SECONDS
        while time.monotonic() < deadline:
            assert self._process is not None and self._process.poll() is None, self.log
            entry = self.get(f"/history/{prompt_id}").get(prompt_id)
            if entry and entry.get("status", {}).get("status_str"):
                _raise_if_failed(entry["status"])
                return Run(entry["outputs"])
            time.sleep(0.05)
        raise TimeoutError(self.log)

    def run(self, prompt: dict[str, Any]) -> Run:
        return self.wait(self.queue(prompt))

    def watch(self, prompt: dict[str, Any], on_event: Callable[[dict[str, Any]], None] | None = None,
              preview: str = "none") -> Run:
        """As ``run``, listening on the websocket; ``on_event`` sees each event as it comes."""
        return asyncio.run(self._watch(prompt, on_event or (lambda event: None), preview))

    async def _watch(self, prompt: dict[str, Any], on_event: Callable[[dict[str, Any]], None], preview: str) -> Run:
        import aiohttp

        client = uuid.uuid4().hex
        events: list[dict[str, Any]] = []
        previews: list[bytes] = []
        url = f"{self.url.replace('http', 'ws')}/ws?clientId={client}"
        async with aiohttp.ClientSession() as session, session.ws_connect(url, max_msg_size=0) as socket_:
            prompt_id = self.queue(prompt, client_id=client, extra_data={"preview_method": preview})
            async for message in socket_:
                if message.type == aiohttp.WSMsgType.BINARY:
                    previews.append(message.data)
                    continue
                event = json.loads(message.data)
                events.append(event)
                on_event(event)
                ours = event.get("data", {}).get("prompt_id") == prompt_id
                done = event["type"] == "executing" and event["data"].get("node") is None
                if ours and (done or event["type"] in ("execution_error", "execution_interrupted")):
                    break
        run = self.wait(prompt_id)
        return Run(run.outputs, events, previews)

    def output(self, run: Run, node: str, index: int = 0) -> Path:
        """The file that an output node saved."""
        entries = [item for items in run.outputs[node].values() if isinstance(items, (list, tuple))
                   for item in items if isinstance(item, dict)]
        entry = entries[index]
        return self.base / entry["type"] / entry["subfolder"] / entry["filename"]


def _validation_words(answer: dict[str, Any]) -> str:
    parts = [error["details"] for node in answer.get("node_errors", {}).values() for error in node["errors"]]
    return "\n".join(dict.fromkeys(parts)) or json.dumps(answer)


def _raise_if_failed(status: dict[str, Any]) -> None:
    for kind, data in status["messages"]:
        if kind == "execution_error":
            raise PromptError(data["exception_message"], data)
        if kind == "execution_interrupted":
            raise PromptError("interrupted", data)
