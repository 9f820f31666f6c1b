"""Say at once whether a model that a flag or a config names can be had, before any library is loaded.

Without a network, the libraries of models try again and again for minutes before they say that a name is unknown.
"""
from __future__ import annotations

import contextlib
import difflib
import functools
import importlib.util
import logging
import os
import re
import socket
import threading
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

from ldm.common.errors import UserError
from ldm.common.paths import resolve_path

log = logging.getLogger(__name__)
HUB = "https://huggingface.co"
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
OFFLINE = "HF_HUB_OFFLINE"
CONNECT_SECONDS = 3.0
LEAST_SIMILARITY = 0.8  # of an unknown architecture and the one that is meant


def check_model_name(what: str, name: str | Path, remedy: str) -> None:
    """Raise UserError if a name is neither a folder nor a model of the hub that is on this machine or can be fetched.

    Args:
        what: what names the model, such as "--segmenter".
        name: a folder, or OWNER/NAME on the hub.
        remedy: what to do instead, the end of the message.
    """
    folder = resolve_path(name)
    if folder.is_dir():
        return
    if not HUB_NAME.fullmatch(str(name)):
        raise UserError(f"{what} {name}: no such folder; {remedy}")
    cached = _is_cached(str(name))
    if _can_download():
        if not cached:
            _announce_download(what, str(name))
        return
    if cached:
        os.environ[OFFLINE] = "1"  # otherwise the library asks for updates, again and again
        return
    why = f"{OFFLINE} is set" if _is_offline() else f"{_hub_address()} cannot be reached"
    raise UserError(f"{what} {name}: no such folder, nor a model that was downloaded before, and {why}; check the name "
                    f"and the network, or {remedy}")


def check_clip_name(what: str, name: str | Path) -> None:
    """Raise UserError as `check_model_name` does for a CLIP, which may also be ARCHITECTURE/WEIGHTS of `open_clip`."""
    architecture, _, weights = str(name).partition("/")
    known = _openclip_architectures()
    if resolve_path(name).is_dir():
        return
    if architecture in known:
        if not _can_download():
            os.environ[OFFLINE] = "1"  # what was downloaded before is found, and everything else is refused at once
        return
    meant = difflib.get_close_matches(architecture, known, 1, LEAST_SIMILARITY)
    if meant and not _is_cached(str(name)):
        raise UserError(f"{what} {name}: no such folder, nor an architecture of open_clip; do you mean "
                        f"{meant[0]}/{weights or 'WEIGHTS'}?")
    check_model_name(what, name, "give a folder that holds a CLIP, or a name such as ViT-B-32/openai")


@functools.cache  # a command and the library that it calls both ask
def _announce_download(what: str, name: str) -> None:
    log.info("%s %s: not on this machine yet; downloading it once from %s", what, name, _hub_address())


def _is_offline() -> bool:
    return os.environ.get(OFFLINE, "").upper() in ("1", "ON", "YES", "TRUE")


def _hub_address() -> str:
    return os.environ.get("HF_ENDPOINT") or HUB


def _is_cached(name: str) -> bool:
    """Return whether a model of the hub was downloaded before."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface"
    cache = Path(os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE") or Path(home) / "hub")
    return any((cache / f"models--{name.replace('/', '--')}" / "snapshots").glob("*/*"))


def _can_download() -> bool:
    """Return whether the hub, or the proxy on the way to it, accepts a connection within a few seconds."""
    if _is_offline():
        return False
    address = urlsplit(_hub_address())
    proxies = urllib.request.getproxies()
    proxy = proxies.get(address.scheme) or proxies.get("all")
    if proxy and not urllib.request.proxy_bypass(address.hostname or ""):
        address = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    port = address.port or (80 if address.scheme == "http" else 443)
    answers: list[bool] = []

    def connect() -> None:
        with contextlib.suppress(OSError):
            socket.create_connection((address.hostname or "", port), CONNECT_SECONDS).close()
            answers.append(True)

    # In a thread: looking up the name of a host has no time limit of its own.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(CONNECT_SECONDS)
    return bool(answers)


def _openclip_architectures() -> list[str]:
    """Return the names of open_clip's architectures, from its files: importing it takes seconds."""
    found = importlib.util.find_spec("open_clip")
    folders = [] if found is None else found.submodule_search_locations or []
    return sorted(path.stem for folder in folders for path in (Path(folder) / "model_configs").glob("*.json"))
