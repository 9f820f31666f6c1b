"""Serve the page: teach concepts from photos, generate, combine and compare, in a browser."""
from __future__ import annotations

import argparse
import logging
import os
import secrets
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from ldm.cli import generation as flags  # noqa: E402
from ldm.cli.parser import Parser, add_part_flags, int_in_range  # noqa: E402
from ldm.common.errors import UserError, one_line_errors  # noqa: E402
from ldm.common.paths import check_folder, expand_home, user_path  # noqa: E402
from ldm.inference.settings import ModelSettings  # noqa: E402

DESCRIPTION = f"""{__doc__}

Without flags: the bundled model. The page is for this machine only, unless --listen is given.
"""
EXAMPLES = """examples:
  python scripts/web.py
  python scripts/web.py --base configs/perfusion-sd-v1.yaml --ckpt v1-5-pruned-emaonly.safetensors
"""
DEFAULT_BASE = "configs/perfusion.yaml"
LOCAL, ANY = "127.0.0.1", "0.0.0.0"
USER = "perfusion"
EVENTS_AT_A_TIME = 4  # of each kind; those that generate take turns

log = logging.getLogger(__name__)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line.

    Raises:
        UserError: a file is missing, or flags contradict each other.
    """
    parser = Parser(DESCRIPTION, EXAMPLES)
    parser.add_argument("--base", type=expand_home, default=DEFAULT_BASE, metavar="FILE",
                        help="config of the training (default: %(default)s)")
    parser.add_argument("--config", type=expand_home, metavar="FILE", help="config of the base model for generation "
                        f"(default: that of --base; with {DEFAULT_BASE} {flags.DEFAULT_CONFIG})")
    parser.add_argument("--ckpt", type=expand_home, metavar="FILE", help="the base model: .safetensors, .ckpt or "
                        "diffusers folder (default: the config's)")
    add_part_flags(parser)
    parser.add_argument("--runs", type=expand_home, default="runs", metavar="FOLDER",
                        help="folder of all runs and images (default: %(default)s)")
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, mps, ... (default: the fastest there is)")
    parser.add_argument("--precision", choices=("full", "autocast"), help="see scripts/txt2img.py")
    server = parser.add_argument_group("server")
    server.add_argument("--port", type=int_in_range(0, 65535), default=7860, metavar="N",
                        help="port (default: %(default)s; 0: a free one)")
    server.add_argument("--listen", action="store_true", help="serve other machines, too; a password is needed then")
    server.add_argument("--auth", metavar="USER:PASSWORD", help="ask for these (default: nothing on this machine, "
                        "a random password with --listen)")
    server.add_argument("--share", action="store_true", help="a public address by Gradio's servers, with a password")
    server.add_argument("--inbrowser", action="store_true", help="open the page in the browser")
    options = parser.parse_args(arguments)
    if options.auth is not None and not all(options.auth.partition(":")[::2]):
        raise UserError("--auth: give a user and a password, such as --auth me:secret")
    check_folder("--runs", Path(options.runs))
    options.config = options.config or (flags.DEFAULT_CONFIG if options.base == DEFAULT_BASE else options.base)
    flags.check_base_model(options)
    return options


def credentials(options: argparse.Namespace) -> tuple[str, str] | None:
    """Return user and password; random ones, which are printed, if others can reach the page and none are given."""
    if options.auth is not None:
        user, _, password = options.auth.partition(":")
        return user, password
    if not (options.listen or options.share):
        return None
    password = secrets.token_urlsafe(12)
    print(f"user {USER}, password {password}", flush=True)
    return USER, password


def set_environment(runs: Path) -> None:
    """Keep Gradio offline, and its temporary files in the folder of the runs."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ["GRADIO_TEMP_DIR"] = str(runs / ".gradio")


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    if find_spec("gradio") is None or find_spec("psutil") is None:
        raise UserError('the page needs more packages; pip install -e ".[web]"')
    runs = user_path(options.runs).resolve()
    set_environment(runs)
    from ldm.web.page import build_page, launch_options
    from ldm.web.site import Site, SiteSettings

    model = ModelSettings(options.config, options.ckpt, options.device, options.precision, options.vae,
                          options.text_encoder)
    site = Site(SiteSettings(runs, options.base, model))
    page = build_page(site)
    try:
        _, address, _ = page.queue(default_concurrency_limit=EVENTS_AT_A_TIME).launch(
            server_name=ANY if options.listen else LOCAL, server_port=options.port or None, share=options.share,
            auth=credentials(options), inbrowser=options.inbrowser, prevent_thread_lock=True, **launch_options(site))
    except OSError:
        raise UserError(f"port {options.port} is in use; choose another one with --port, or --port 0") from None
    site.queue.serve()
    site.warm_up()
    print(f"the page is at {address}", flush=True)
    page.block_thread()


if __name__ == "__main__":
    main()
