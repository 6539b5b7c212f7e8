import json

import numpy as np
import pytest

from tests.losses.record import CASES, KEPT, losses, machine


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_losses_of_every_step_are_those_that_were_kept(case):
    """To the last bit on the machine that they were kept on.

    Others round differently; where a last bit flips a selection, a routed model's losses differ.
    """
    kept = json.loads(KEPT.read_text())
    found = losses(case)
    if kept["machine"] == machine():
        assert found == kept["losses"][case]
    else:
        rtol = 1e-5 if case == "dense" else 2e-2
        np.testing.assert_allclose(found, kept["losses"][case], rtol=rtol)
