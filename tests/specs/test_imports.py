"""User modules: found, imported with a limit, and identified by their source."""

import hashlib
import importlib
import os
import signal
import subprocess
import sys
import threading

import pytest

from modjax.errors import InputError
from modjax.specs import Dense, MoD, ModelSpec, Recycled, imports
from modjax.specs.imports import (
    IMPORTED,
    import_all,
    layer_source,
    own_layers,
    places,
    source_of,
    without_unused,
)
from modjax.specs.layer import NAMES

pytestmark = pytest.mark.usefixtures("own_layers", "interrupts")


@pytest.fixture
def interrupts():
    """Makes Ctrl-C work as at a terminal: a background job begins with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


LAYER = """
import dataclasses
from modjax.specs import Cost, Layer, named

@named
@dataclasses.dataclass(frozen=True)
class {name}(Layer):
    width: int = 4

    def cost(self, shape, load):
        yield Cost("own", 2.0 * load.tokens, shape.d_model)
"""


@pytest.fixture
def imported(tmp_path):
    """Returns a function that imports files by name and source, and returns its error, or ""."""

    def imported(**sources: str) -> str:
        for name, source in sources.items():
            (tmp_path / f"{name}.py").write_text(source)
        try:
            names = tuple(f"{name}.py" for name in sources)
            import_all(places(names, tmp_path, "model.imports"), "model.imports")
        except InputError as error:
            return str(error)
        return ""

    return imported


def model(layers: str, *names: str, **changes) -> ModelSpec:
    shape = {"vocab_size": 40, "d_model": 16, "num_layers": 4, "num_heads": 2, "num_kv_heads": 2}
    return ModelSpec(**shape | {"d_ff": 32, "layers": layers, "imports": names} | changes)


def kept_of(spec: ModelSpec) -> tuple[str, ...]:
    return without_unused(spec).imports


def test_a_spec_imports_nothing_and_a_file_is_imported_by_its_path(imported, tmp_path, monkeypatch):
    (tmp_path / "bad.py").write_text("raise SystemExit(0)")
    assert model("Dense()", str(tmp_path / "bad.py"), "no_such_module").layers == (Dense(),)
    with pytest.raises(InputError, match=r"model\.layers = 'Mine': unknown; known: AltUp"):
        model("Mine()", "mine.py")
    monkeypatch.chdir("/")
    assert imported(mine=LAYER.format(name="Mine")) == ""
    assert type(model("Mine()", "mine.py").layers[0]).__name__ == "Mine"
    assert imported(mine=LAYER.format(name="Mine")) == "", "once more is no other layer"


@pytest.mark.parametrize("names", ["own.py", 3, (3,), ("",), None])
def test_what_does_not_name_imports_is_refused(names, tmp_path):
    with pytest.raises(
        InputError, match=r"model\.imports = .*: must be a list of files and modules"
    ):
        places(names, tmp_path, "model.imports")


ENDLESS = "while True:\n    try:\n        time.sleep(9)\n    except Exception:\n        pass"


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("import sys\nsys.exit(0)", "SystemExit: 0"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("raise GeneratorExit", "GeneratorExit"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("raise ValueError('two\\nlines')", "ValueError: two lines"),
        (
            "class E(Exception):\n    def __str__(self): raise SystemExit\nraise E",
            "E: its message cannot be shown",
        ),
        (
            "class E(BaseException):\n    def __str__(self): return 3\nraise E",
            "E: its message cannot be shown",
        ),
        ("def (:", "SyntaxError: invalid syntax"),
        ("import no_such_module", "ModuleNotFoundError: No module named"),
        (f"import time\n{ENDLESS}", "it still ran after 0.2 seconds"),
        ("while True: pass", "it still ran after 0.2 seconds"),
    ],
)
def test_whatever_an_import_does_is_one_line_with_its_name(imported, monkeypatch, source, says):
    monkeypatch.setattr(imports, "SECONDS_UNSAID", 0.1)
    monkeypatch.setattr(imports, "SECONDS_AT_MOST", 0.2)
    said = imported(bad=source)
    assert said.startswith("model.imports = 'bad.py': cannot be imported: " + says.split(":")[0])
    assert says in said and "\n" not in said
    assert "modjax_imports_bad" not in " ".join(sys.modules)
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_missing_file_and_a_missing_module_are_named(tmp_path):
    with pytest.raises(InputError, match=r"--imports = 'none.py': no such file: .*/none.py$"):
        import_all(places(("none.py",), tmp_path, ""), "--imports")
    with pytest.raises(InputError, match="--imports = 'none': cannot be imported: ModuleNotFound"):
        import_all(places(("none",), tmp_path, ""), "--imports")


def test_what_is_awaited_is_said_and_prints_stay_out_of_stdout(imported, monkeypatch, capfd):
    monkeypatch.setattr(imports, "SECONDS_UNSAID", 0.1)
    assert imported(slow="import time\nprint('hello')\ntime.sleep(0.5)") == ""
    out, err = capfd.readouterr()
    assert out == "" and "hello" in err
    assert err.count("modjax: model.imports = 'slow.py': still runs; it ends after 300 s") == 1


def test_a_real_interrupt_is_no_fault_of_the_import(imported):
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        imported(slow="import time\ntime.sleep(20)")


def test_an_interrupt_that_the_user_handles_is_no_fault_of_the_import(imported):
    class Mine(Exception):
        pass

    def handle(signum, frame):
        raise Mine

    before = signal.signal(signal.SIGINT, handle)
    try:
        with pytest.raises(KeyboardInterrupt):
            imported(slow="import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nwhile 1: pass")
        assert signal.getsignal(signal.SIGINT) is handle
    finally:
        signal.signal(signal.SIGINT, before)


def test_code_that_catches_every_exception_ends_the_process(tmp_path):
    path = tmp_path / "stubborn.py"
    path.write_text(f"import time\n{ENDLESS}".replace("Exception", "BaseException"))
    code = (
        "from modjax.specs import imports\n"
        "imports.SECONDS_UNSAID, imports.SECONDS_AT_MOST = 0.05, 0.1\n"
        f"imports.import_all({{'stubborn.py': {str(path)!r}}}, 'model.imports')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    last = "modjax: model.imports = 'stubborn.py': does not end by an exception: modjax ends"
    assert done.stderr.splitlines()[-1] == last


def test_a_run_keeps_the_imports_that_its_layers_need_and_a_dense_one_none(imported):
    assert imported(one=LAYER.format(name="One"), two=LAYER.format(name="Two"), three="") == ""
    every = ("one.py", "two.py", "three.py")
    assert kept_of(model("Dense(), MoD(Dense())", *every)) == ()
    assert kept_of(model("Dense(), One()", *every)) == ("one.py",)
    assert kept_of(model("MoD(Two()), One(width=2)", *every)) == ("one.py", "two.py")
    assert own_layers(model("MoD(Two()), Dense()")) == ["Two"]
    assert kept_of(model("One()", "two.py", "elsewhere")) == ("two.py", "elsewhere"), (
        "can't be told"
    )
    assert kept_of(model("AltUp(MoD(Two()))", *every, streams=Recycled(2))) == ("two.py",)


def test_an_import_that_is_a_package_needs_what_its_parts_register(tmp_path, monkeypatch):
    package = tmp_path / "own_package"
    package.mkdir()
    (package / "__init__.py").write_text("from own_package import parts")
    (package / "parts.py").write_text(LAYER.format(name="Part"))
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("own_package")  # by somebody else, before
    import_all(places(("own_package", "json"), tmp_path, ""), "")
    assert kept_of(model("Part()", "json", "own_package")) == ("own_package",)


def test_the_hash_is_of_the_layers_file_and_of_what_it_imports_of_the_users_own(
    tmp_path, monkeypatch
):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_helper.py").write_text("from own_deeper import two")
    (tmp_path / "own_deeper.py").write_text("two = 2")
    (tmp_path / "own_bystander.py").write_text("two = 2")
    source = "def late():\n    import own_helper\n" + LAYER.format(name="Mine")

    def digest(**changes: str) -> str:
        for name, text in ({"own_mine": source} | changes).items():
            (tmp_path / f"{name}.py").write_text(text)
        for name in ("own_mine", "own_helper", "own_deeper"):
            sys.modules.pop(name, None)
        importlib.invalidate_caches()
        importlib.import_module("own_helper")
        importlib.import_module("own_mine")
        found = layer_source("Mine")
        (tmp_path / "own_mine.py").write_text("edited after it was imported")
        assert layer_source("Mine") == found
        return found

    sys.dont_write_bytecode = True
    first = digest()
    files = [source.encode(), b"from own_deeper import two", b"two = 2"]
    each = sorted(hashlib.sha256(content).hexdigest() for content in files)
    assert first == hashlib.sha256("".join(each).encode()).hexdigest()[:16]
    assert digest(own_bystander="two = 3") == first
    assert digest(own_deeper="two = 20") != first
    assert digest(own_deeper="two = 2", own_mine=source + "# edited") != first
    sys.dont_write_bytecode = False


def test_the_source_of_a_module_leaves_out_what_is_installed(imported):
    assert imported(mine="import json, numpy\nfrom modjax import flops") == ""
    assert source_of(IMPORTED["mine.py"]).modules == {IMPORTED["mine.py"].__name__}


def test_a_name_is_given_to_one_layer_only(imported):
    said = imported(mine=LAYER.format(name="MoD"))
    assert "modjax.register = 'MoD': is a layer of " in said
    assert said.endswith("modjax/specs/layers/mod.py already: choose another name")
    assert NAMES["MoD"] is MoD
    assert imported(one=LAYER.format(name="Mine")) == ""
    assert "'Mine': is a layer of " in imported(other=LAYER.format(name="Mine"))
    assert NAMES["Mine"].__module__ == IMPORTED["one.py"].__name__
    module, first = IMPORTED["one.py"], NAMES["Mine"]
    module.__loader__.exec_module(module)
    assert NAMES["Mine"] is module.Mine is not first, "the same class again is none other"
