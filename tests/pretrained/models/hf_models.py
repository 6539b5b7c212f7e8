"""Tiny random Hugging Face models of every family, as files, and what they compute.

Every tensor is drawn: fresh norms are 1, biases and routers 0, so that faults in them do not show.
Legend: B batch, L positions.
"""

import copy
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from tests.pretrained.models.small_models import Case, drawn


def silence() -> None:
    """Imports transformers without its warnings and progress bars."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def make(case: Case) -> Any:
    """Returns the model of a case, in float32, with the values that its files can express."""
    silence()
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**case.config())
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            value = torch.tensor(drawn(name, tuple(parameter.shape), case.family, rng))
            parameter.copy_(value.to(getattr(torch, case.dtype)))
    return model


def logits(model: Any, tokens_BL: np.ndarray) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.tensor(tokens_BL, dtype=torch.long), use_cache=False).logits.numpy()


def save(case: Case, model: Any, folder: Path) -> None:
    """Writes a model as files of the form that the case asks for."""
    import torch

    stored = copy.deepcopy(model).to(getattr(torch, case.dtype))  # rounds rotary tables too
    stored.save_pretrained(folder, max_shard_size=case.shard_size)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    if case.sparse:
        default = type(model.config)().to_dict() | {"model_type": None}
        derived = {"layer_types", "no_rope_layers"}
        config = {
            name: value
            for name, value in config.items()
            if name not in derived and (name not in default or default[name] != value)
        }
    if case.nested:
        nest(folder, case.prefix)
    path.write_text(json.dumps(case.in_form(config)))


def nest(folder: Path, prefix: str) -> None:
    """Renames the tensors as those of the text part of a model of images and text."""
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    found = load_file(path)
    save_file({prefix + n: t for n, t in found.items()}, path, {"format": "pt"})
