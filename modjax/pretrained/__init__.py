"""Pretrained decoders in Hugging Face's form or as GGUF: read as models of modjax, and written."""

from modjax.pretrained.families import FAMILIES, Family, register
from modjax.pretrained.load import Pretrained, from_pretrained, pretrained_spec, save_pretrained
