"""An environment that prevents jax is named in one line."""

import pytest

from modjax import backend
from modjax.errors import InputError


def test_what_fails_at_the_start_of_jax_names_the_variables_that_it_reads(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "foo")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "ours")
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    with pytest.raises(InputError) as caught, backend.starting():
        raise RuntimeError("no backend\n'foo'")
    said = str(caught.value)
    assert said.startswith("environment = {'JAX_PLATFORMS': 'foo'") and "ours" not in said
    assert said.endswith("}: jax cannot start: RuntimeError: no backend 'foo'")
    with pytest.raises(InputError, match=r"^a = 1: as it is$"), backend.starting():
        raise InputError("a", 1, "as it is")


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (
            "import os, sys; sys.stderr.write('F1129 18:3 7 a.cc:2] Bad flag'); os.abort()",
            "Bad flag",
        ),
        ("import faulthandler as f, os; f.enable(); os.abort()", "Fatal Python error"),
        ("raise ImportError('no memory')", "ImportError: no memory"),
        ("import os; os._exit(127)", "it said nothing"),
    ],
)
def test_xla_is_tried_in_another_process_where_it_may_abort(code, words, monkeypatch):
    monkeypatch.setattr(backend, "TRIAL", code)
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    backend.check_xla_starts()  # nothing to fear
    monkeypatch.setenv("XLA_FLAGS", "--nonsense")
    with pytest.raises(InputError, match=r"'XLA_FLAGS': '--nonsense'.*jax cannot") as caught:
        backend.check_xla_starts()
    assert words in str(caught.value).partition("jax cannot start: ")[2]
    monkeypatch.setattr(backend, "TRIAL", "")
    backend.check_xla_starts()
