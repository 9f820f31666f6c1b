"""The page: its tabs, its looks, and the server."""
from __future__ import annotations

import gradio as gr

from ldm.web.combine_tab import CombineTab
from ldm.web.compare_tab import CompareTab
from ldm.web.concept_files import ConceptFiles
from ldm.web.generate_tab import GenerateTab
from ldm.web.site import Site
from ldm.web.teach_tab import TeachTab

TITLE = "Perfusion"
HEADER = "# Perfusion\nTeach a model your own teddy, teapot or cat from a few photos, then use it in any prompt."
FONTS = ("system-ui", "sans-serif")
CODE_FONTS = ("ui-monospace", "monospace")
CSS = ".gradio-container {max-width: 1240px !important} progress {accent-color: #e0457b}"
LARGEST_UPLOAD = "100mb"


def theme() -> gr.themes.Base:
    """Return the looks of the page, with fonts that every system has: nothing is loaded from elsewhere."""
    return gr.themes.Soft(primary_hue="pink", font=FONTS, font_mono=CODE_FONTS)


def build_page(site: Site) -> gr.Blocks:
    """Return the page of a site."""
    concepts = ConceptFiles(site.queue)
    with gr.Blocks(title=TITLE, analytics_enabled=False) as page:
        gr.Markdown(HEADER)
        with gr.Tabs():
            with gr.Tab("Teach"):
                runs = TeachTab(site).build()
            with gr.Tab("Generate") as generating:
                generate = GenerateTab(site, concepts)
                generate.build()
            with gr.Tab("Combine") as combining:
                combine = CombineTab(concepts)
                combine.build()
            with gr.Tab("Compare") as comparing:
                compare = CompareTab(site, concepts)
                compare.build(generate.paths)
        page.load(runs.refresh, [runs.chosen], runs.outputs, show_progress="hidden")
        page.load(generate.refresh, [generate.chosen], [generate.chosen], show_progress="hidden")
        for tab, content in ((generating, generate), (combining, combine), (comparing, compare)):
            tab.select(content.refresh, [content.chosen], [content.chosen], show_progress="hidden")
    return page


def launch_options(site: Site) -> dict[str, object]:
    """Return the arguments of `gr.Blocks.launch` that do not depend on the command line."""
    return {"theme": theme(), "css": CSS, "footer_links": [], "show_error": True, "max_file_size": LARGEST_UPLOAD,
            "share": False, "ssr_mode": False, "mcp_server": False, "enable_monitoring": False,
            "allowed_paths": [str(site.queue.root)], "quiet": True}
