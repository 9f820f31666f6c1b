"""Call the functions of runwayml's `inpaint_st.py` without its page: `inpaint_streamlit.py CONFIG CHECKPOINT`."""
from __future__ import annotations

import sys

import streamlit
from PIL import Image

streamlit.cache = lambda **options: lambda function: function  # the page's cache

from inpaint_st import initialize_model, inpaint  # noqa: E402 - streamlit must be prepared first

sampler = initialize_model(*sys.argv[1:])
images = inpaint(sampler, Image.open("photo.png"), Image.open("mask.png"), "a red car", seed=3, scale=7.5,
                 ddim_steps=10, num_samples=2, w=64, h=64)
for index, image in enumerate(images):
    image.save(f"out{index}.png")
