"""Pretrained decoders: read from Hugging Face folders and GGUF files, written as folders."""

from modjax.pretrained.families import FAMILIES, Family, register
from modjax.pretrained.files import open_files
from modjax.pretrained.load import (
    Pretrained,
    from_pretrained,
    match_weights,
    model_fields,
    pretrained_spec,
)
from modjax.pretrained.save import save_pretrained, save_routers
from modjax.pretrained.tensors import read_weights
