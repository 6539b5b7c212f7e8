import json

import numpy as np
import pytest

from tests.losses.record import CASES, KEPT, losses


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_losses_of_every_step_are_those_that_were_kept(case):
    """Machines round differently, and six steps make little of it."""
    rtol = 2e-2 if case == "bfloat16" else 1e-4
    np.testing.assert_allclose(losses(case), json.loads(KEPT.read_text())[case], rtol=rtol)
