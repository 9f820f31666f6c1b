"""The page: its tabs, its looks, and the server."""
from __future__ import annotations

from typing import Any

import gradio as gr

from ldm.web.combine_tab import CombineTab
from ldm.web.compare_tab import CompareTab
from ldm.web.concept_files import ConceptFiles
from ldm.web.endpoints import add_endpoints
from ldm.web.events import QUIET
from ldm.web.generate_tab import GenerateTab
from ldm.web.site import Site
from ldm.web.teach_tab import TeachTab

TITLE = "Perfusion"
HEADER = "# Perfusion\nTeach a model your own teddy, teapot or cat from a few photos, then use it in any prompt."
FONTS = ("system-ui", "sans-serif")
CODE_FONTS = ("ui-monospace", "monospace")
CSS = """
.gradio-container main.app {max-width: 1280px !important; padding-inline: 16px !important; margin: 0 auto}
#thumbnails .grid-container {grid-template-columns: repeat(auto-fill, minmax(90px, 110px)) !important}
#thumbnails .grid-wrap, #reviewed-photos .grid-wrap {min-height: 0 !important}
.beside {align-items: flex-end}
.beside > button {height: 42px; margin-bottom: 12px}
[data-testid="status-tracker"]:has(> .error) {display: none}
progress {accent-color: #e0457b}
#run-status code, #teach-message, #photo-problems, #generate-status {overflow-wrap: anywhere}
@media (max-width: 640px) {
  #images .grid-container, #attention .grid-container {grid-template-columns: repeat(2, 1fr) !important}
}
#previews img {max-width: 100%; max-height: 480px; margin: 0 auto}
:focus-visible {outline: 2px solid #e0457b; outline-offset: 1px}
"""
LARGEST_UPLOAD = "100mb"
KEPT_SECONDS = 24 * 3600  # of uploads and of images that Gradio copies for the browser


def theme() -> gr.themes.Base:
    """Return the looks of the page, with fonts that every system has: nothing is loaded from elsewhere."""
    return gr.themes.Soft(primary_hue="pink", font=FONTS, font_mono=CODE_FONTS).set(
        block_title_background_fill="transparent", block_title_padding="0", block_title_text_color="*body_text_color",
        block_label_background_fill="transparent")


def build_page(site: Site) -> gr.Blocks:
    """Return the page of a site."""
    concepts = ConceptFiles(site.queue)
    teach, combine = TeachTab(site), CombineTab(concepts)
    generate, compare = GenerateTab(site, concepts), CompareTab(site, concepts)
    with gr.Blocks(title=TITLE, analytics_enabled=False, fill_width=True,
                   delete_cache=(KEPT_SECONDS, KEPT_SECONDS)) as page:
        add_endpoints(teach, generate, concepts)  # first: events of the same names would take the names
        gr.Markdown(HEADER)
        with gr.Tabs():
            with gr.Tab("Teach"):
                runs = teach.build()
            with gr.Tab("Generate") as generating:
                generate.build()
            with gr.Tab("Combine") as combining:
                combine.build()
            with gr.Tab("Compare") as comparing:
                compare.build(generate.paths)
        page.load(runs.refresh, runs.inputs, runs.outputs, **QUIET)
        page.load(teach.restore, [], teach.restored, **QUIET)
        page.load(generate.refresh, [generate.chosen], [generate.chosen], **QUIET)
        for tab, content in ((generating, generate), (combining, combine), (comparing, compare)):
            tab.select(content.refresh, [content.chosen], [content.chosen], **QUIET)
    return page


def launch_options(site: Site) -> dict[str, Any]:
    """Return the arguments of `gr.Blocks.launch` that do not depend on the command line."""
    return {"theme": theme(), "css": CSS, "footer_links": [], "show_error": True, "max_file_size": LARGEST_UPLOAD,
            "ssr_mode": False, "mcp_server": False, "enable_monitoring": False,
            "allowed_paths": [str(site.queue.root)], "quiet": True}
