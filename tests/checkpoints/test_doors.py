"""Every place that could turn somebody's text or file into code is on a list, with its reason."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {"flowanchor": ROOT / "src" / "flowanchor", "plugins": ROOT / "plugins"}

# name -> {file in which it is called: why that is right}
TYPED = "what a user typed, composed by Hydra"
ALLOWED: dict[str, dict[str, str]] = {
    "instantiate": {
        "flowanchor/codecs/load.py": TYPED,
        "flowanchor/generation/prompts.py": TYPED,
        "flowanchor/generation/samplers.py": TYPED,
        "flowanchor/metrics/evaluator.py": TYPED,
        "flowanchor/programs/check.py": TYPED,
        "flowanchor/programs/convert.py": TYPED,
        "flowanchor/programs/encode.py": TYPED,
        "flowanchor/programs/evaluate.py": TYPED,
        "flowanchor/programs/train.py": TYPED,
        "flowanchor/testing/__main__.py": TYPED,
        "plugins/formats/published_folder.py": TYPED,
    },
    "hydra_instantiate": {"flowanchor/base/typed.py": "Hydra's own `instantiate`: what the others above call"},
    "import_module": {
        "flowanchor/base/trusted.py": "a class that is registered for its place, and the place's contract",
        "flowanchor/programs/commands.py": "the project's own programs, by names that stand in that file",
        "plugins/backbones/diffusers/description.py": "classes that are registered for that place",
    },
    "torch.load": {
        "flowanchor/base/torch_files.py": "the one reader of files of torch.save",
        "plugins/metrics/inception.py": "looks at weights before torch-fidelity does",
    },
    "Unpickler": {
        "flowanchor/checkpoints/sharded.py": "names and shapes alone, of a sharded checkpoint's index",
        "plugins/data/array_pickle.py": "arrays alone, of CIFAR-10's Python files",
    },
    "get_object": {"flowanchor/checkpoints/sources.py": "the teacher's class of the program that runs; of no file"},
    "OmegaConf.load": {"flowanchor/provenance.py": "compared with a run's settings; nothing in it is resolved"},
    "OmegaConf.create": {"flowanchor/programs/score.py": "the settings of the evaluation of the run's own folder"},
    "subprocess": {
        "flowanchor/programs/demo.py": "the demo's own commands",
        "flowanchor/programs/slurm.py": "scontrol, with the job's own number",
        "flowanchor/provenance.py": "git, with arguments of ours",
    },
    "gopen": {"flowanchor/data/tar_reader.py": "addresses that a user typed; a checkpoint's are refused"},
}
FORBIDDEN = {
    "eval", "exec", "compile", "__import__", "get_class", "get_method", "get_original_cwd_class",
    "pickle.load", "pickle.loads", "yaml.unsafe_load", "yaml.full_load", "yaml.load_all", "os.system", "os.popen",
    "run_path", "run_module", "marshal.loads", "shelve.open", "joblib.load", "dill.load", "torch.hub.load",
    "torch.jit.load", "torch.package.PackageImporter",
}  # fmt: skip


@dataclass(frozen=True)
class Code:
    """What the files of both folders call, and what their classes are made from: (where, node, its name)."""

    calls: list[tuple[str, ast.Call, str]]
    bases: list[tuple[str, str]]


@pytest.fixture(scope="module")
def code() -> Code:
    found = Code([], [])
    for name, folder in FOLDERS.items():
        for file in sorted(folder.rglob("*.py")):
            where = f"{name}/{file.relative_to(folder).as_posix()}"
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Call):
                    found.calls.append((where, node, ast.unparse(node.func)))
                elif isinstance(node, ast.ClassDef):
                    found.bases.extend((where, ast.unparse(base)) for base in node.bases)
    return found


def keyword(call: ast.Call, name: str) -> str | None:
    return next((ast.unparse(word.value) for word in call.keywords if word.arg == name), None)


def matches(called: str, name: str) -> bool:
    return called == name or called.endswith(f".{name}") or (name == "subprocess" and called.startswith("subprocess."))


@pytest.mark.parametrize("name", ALLOWED)
def test_only_places_that_are_known(name, code):
    if name == "Unpickler":
        found = {where for where, base in code.bases if base.endswith("Unpickler")}
    else:
        found = {where for where, _, called in code.calls if matches(called, name)}
    assert found == set(ALLOWED[name])


def test_what_is_never_used(code):
    odd = [(where, called) for where, call, called in code.calls if any(_named(called, name) for name in FORBIDDEN)]
    assert not odd


def _named(called: str, name: str) -> bool:
    return called == name or ("." in name and called.endswith(f".{name}")) or called.endswith(f"hydra.utils.{name}")


def test_nothing_is_unpickled_without_restriction(code):
    """The one keyword that stands between a file and its code is written out wherever a file is read."""
    for where, call, called in code.calls:
        if called == "torch.load":
            assert keyword(call, "weights_only") == "True", where
        elif called in ("np.load", "numpy.load"):
            assert keyword(call, "allow_pickle") in (None, "False"), where
        elif called == "yaml.load":
            assert "SafeLoader" in ast.unparse(call), where
        elif called.endswith(".from_pretrained"):
            assert keyword(call, "trust_remote_code") in (None, "False"), where
            assert keyword(call, "local_files_only") == "True", where
            tokenizer = "Tokenizer" in called or "Processor" in called
            assert tokenizer or keyword(call, "use_safetensors") == "True", where
            assert not tokenizer or keyword(call, "trust_remote_code") == "False", where
        elif keyword(call, "shell") is not None:
            raise AssertionError(f"{where}: a shell")


def test_trainer_reads_checkpoints_as_data(code):
    fits = [call for _, call, called in code.calls if called.endswith("trainer.fit")]
    assert fits and all(keyword(call, "weights_only") == "True" for call in fits)
