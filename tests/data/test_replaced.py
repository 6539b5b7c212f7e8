"""A cache that is replaced while it is open: it is never read as another one."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from modjax.data.prepare import replace
from modjax.data.prepare.prepare import prepare
from modjax.data.token_cache import check_fingerprint, open_cache
from modjax.errors import InputError

OLD = np.random.default_rng(0).integers(2, 259, 200_000)
NEW = np.random.default_rng(1).integers(2, 259, 180_000)


def read_everything(cache, tokens) -> int:
    """Checks all reads of the training split against `tokens`; returns how many were refused."""
    refused = 0
    for start in range(0, len(tokens), 5000):
        stop = min(start + 5000, len(tokens))
        try:
            np.testing.assert_array_equal(cache.read("train", start, stop), tokens[start:stop])
        except InputError as error:
            assert "was prepared anew since it was opened" in str(error)
            assert "\n" not in str(error)
            refused += 1
    return refused


@pytest.mark.usefixtures("tensorflow")
def test_other_text_prepared_with_force_is_never_read_by_who_opened_the_cache(tmp_path):
    def prepared(seed: int, **options) -> tuple[Path, np.ndarray]:
        letters = np.random.default_rng(seed).integers(97, 123, (150, 2000), np.uint8)
        file = tmp_path / f"{seed}.jsonl"
        file.write_text("".join(f'{{"text": "{bytes(row).decode()}"}}\n' for row in letters))
        path = prepare(text_files=[file], data_dir=tmp_path / "data", **options)
        cache = open_cache(path)
        return path, cache.read("train", 0, cache.manifest.splits["train"].tokens)

    path, tokens = prepared(0)
    cache = open_cache(path)
    check_fingerprint(cache)
    new_path, others = prepared(1, force=True)
    assert new_path == path
    # Chunks that it has decoded it keeps; the others are gone.
    assert read_everything(cache, tokens) > 0.8 * len(tokens) / 5000
    with pytest.raises(InputError, match="was prepared anew since it was opened, as "):
        check_fingerprint(cache)
    assert read_everything(open_cache(path), others) == 0
    assert sorted(p.name for p in path.iterdir()) == sorted(
        [open_cache(path).manifest.folder, "manifest.json"]
    )


@pytest.fixture
def partial(make_cache, tmp_path):
    """Makes a complete `.toy-bytes.partial` that is not yet in place."""

    def make(tokens, fingerprint: str) -> Path:
        made = make_cache(tokens, tokens[:5000], name="made", fingerprint=fingerprint)
        partial = tmp_path / ".toy-bytes.partial"
        os.rename(made / fingerprint[:16], partial)
        os.rename(made / "manifest.json", partial / "manifest.json")
        (partial / "journal.json").write_text("{}")
        made.rmdir()
        return partial

    return make


class Killed(BaseException):
    pass


@pytest.mark.parametrize("fingerprint", ["b" * 64, "a" * 64], ids=["other tokens", "same tokens"])
def test_killed_at_any_step_the_old_cache_or_the_new_one_is_there(
    make_cache, partial, tmp_path, monkeypatch, fingerprint
):
    new = NEW if fingerprint[0] == "b" else OLD
    tokens = {"a" * 64: OLD, fingerprint: new}
    steps = left = 0

    def dying(function):
        def step(*arguments, **options):
            nonlocal left
            if left == 0:
                raise Killed
            left -= 1
            return function(*arguments, **options)

        return step

    with monkeypatch.context() as patched:
        for module, name in ((os, "rename"), (os, "replace"), (shutil, "rmtree"), (Path, "unlink")):
            patched.setattr(module, name, dying(getattr(module, name)))
        done = False
        while not done:
            left = 1000
            shutil.rmtree(tmp_path / "toy-bytes", ignore_errors=True)
            final = make_cache(OLD, OLD[:5000], fingerprint="a" * 64)
            waiting = partial(new, fingerprint)
            opened = open_cache(final)
            left = steps
            try:
                replace.put_in_place(waiting, final)
                done = True
            except Killed:
                steps += 1
            left = 1000
            if fingerprint[0] == "b":
                found = open_cache(final)
                assert read_everything(found, tokens[found.manifest.fingerprint]) == 0
                read_everything(opened, OLD)
            replace.begin(waiting, final)
            if (waiting / "manifest.json").exists():
                replace.put_in_place(waiting, final)
            else:
                assert done or steps > 2
                shutil.rmtree(waiting)
                replace.tidy(final)
            assert not waiting.exists()
            assert open_cache(final).manifest.fingerprint == fingerprint
            assert read_everything(open_cache(final), new) == 0
            names = {path.relative_to(final).as_posix() for path in final.glob("**/*.*")}
            folder = fingerprint[:16]
            assert names == {"manifest.json"} | {
                f"{folder}/{split}/zarr.json" for split in ("train", "validation")
            }
            assert {path.name for path in final.iterdir()} == {"manifest.json", folder}
    assert steps >= 4


def test_a_damaged_cache_that_is_made_again_with_the_same_tokens_is_mended(make_cache, partial):
    final = make_cache(OLD, OLD[:5000], fingerprint="a" * 64)
    opened = open_cache(final)
    (final / "aaaaaaaaaaaaaaaa" / "train" / "c" / "0").write_bytes(b"damaged")
    replace.put_in_place(partial(OLD, "a" * 64), final)
    assert read_everything(opened, OLD) == read_everything(open_cache(final), OLD) == 0
    check_fingerprint(opened)


def test_the_fingerprint_must_be_the_one_that_was_opened_and_the_one_expected(make_cache, partial):
    final = make_cache(OLD, OLD[:5000], fingerprint="a" * 64)
    opened = open_cache(final)
    check_fingerprint(opened)
    check_fingerprint(opened, "a" * 64)

    def refused(*arguments) -> str:
        with pytest.raises(InputError) as caught:
            check_fingerprint(opened, *arguments)
        assert str(caught.value).startswith(f"data = {str(final)!r}: ")
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert f"is {'a' * 16}, but this was started with {'b' * 16}" in refused("b" * 64)
    replace.put_in_place(partial(NEW, "b" * 64), final)
    assert "was prepared anew" in refused() and "was prepared anew" in refused("b" * 64)
    (final / "manifest.json").write_bytes(b"\xff\x00")
    assert "cannot be read; if it is damaged" in refused()
    shutil.rmtree(final)
    assert "is gone since it was opened" in refused()
