"""Checkpoints in and out: Hugging Face safetensors folders to this project's arrays.

`convert.converter.convert_checkpoint` writes a converted folder, `convert.load.load_checkpoint` reads a converted or a
Hugging Face one, `convert.load.describe` tells what is in either without reading the arrays.
"""
