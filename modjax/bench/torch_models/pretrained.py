"""A pretrained model in the package transformers, for comparison in `bench pretrained`.

Legend: B batch, L positions, V vocabulary, O new tokens.
"""

import warnings

import numpy as np
import torch
import transformers


class TorchModel:
    """The model of a folder, in float32 and with plain attention."""

    def __init__(self, folder: str):
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        warnings.simplefilter("ignore")
        torch.set_grad_enabled(False)
        auto = transformers.AutoModelForCausalLM
        loaded = auto.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
        self.model = loaded.eval()

    def logits(self, tokens_BL: np.ndarray) -> np.ndarray:
        """Returns logits_BLV."""
        return self.model(torch.tensor(tokens_BL)).logits.numpy()

    def prefill(self, tokens_BL: np.ndarray) -> object:
        """Reads the tokens into a cache and returns the logits of the last position with it."""
        return self.model(torch.tensor(tokens_BL), use_cache=True, logits_to_keep=1)

    def decode(self, tokens_BL: np.ndarray, new: int) -> object:
        """Returns the tokens and `new` greedy ones behind them."""
        tokens = torch.tensor(tokens_BL)
        return self.model.generate(tokens, min_new_tokens=new, max_new_tokens=new, do_sample=False)
