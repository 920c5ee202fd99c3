"""The documents tell the truth: commands run as written, and what is named exists."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from transformers import LlamaConfig, LlamaForCausalLM

from anchor_megatron.config import describe, load_config, model_config
from anchor_megatron.layout.exchanges import EXCHANGES
from anchor_megatron.layout.modes import MODES
from anchor_megatron.layout.placement import PLACEMENTS

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
DOCUMENTS = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"] + [
    f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))
]


def blocks(language: str) -> list[str]:
    """The README's code blocks in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def commands(*start: str) -> list[list[str]]:
    """The README's commands that begin with these words, in words, without comments."""
    lines = [shlex.split(line, comments=True) for block in blocks("bash") for line in block.splitlines()]
    return [words for words in lines if words[: len(start)] == list(start)]


def option(words: list[str], name: str) -> str:
    """What follows an option in a command."""
    return words[words.index(name) + 1]


def run(words: list[str], folder: Path) -> str:
    """What a command prints; it must succeed."""
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


KINDS = [
    ["make"],
    ["source", ".venv/bin/activate"],
    ["python", "tools/preprocess_data.py"],
    ["python", "tools/convert_checkpoint.py"],
    ["python", "tools/inspect_data.py"],
    ["python", "tools/show_plan.py"],
    ["python", "tools/profile_cp.py"],
    ["python", "pretrain_anchor.py", "--help"],
    ["torchrun", "--nproc-per-node", "4", "pretrain_anchor.py"],
    ["torchrun", "--nproc-per-node", "4", "tools/compare_logits.py"],
    ["python", "examples/extend_small/run.py"],
    ["python", "tools/estimate.py"],
    ["sbatch"],
    ["python", "-m", "pip", "install"],
]


def test_every_command_is_of_a_kind_that_is_tested_here() -> None:
    tested = [words for kind in KINDS for words in commands(*kind)]
    assert sorted(tested) == sorted(commands())
    assert all(commands(*kind) for kind in KINDS), "a kind is tested that the README no longer has"


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z]+):", makefile, flags=re.MULTILINE))
    assert {word for words in commands("make") for word in words[1:]} <= targets
    for name in DOCUMENTS:
        assert set(re.findall(r"`make ([a-z]+)`", (ROOT / name).read_text())) <= targets


def test_installation_names_files_and_extras_that_exist() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    section = project.split("[project.optional-dependencies]\n")[1].split("\n[")[0]
    extras = set(re.findall(r"^(\w+) = ", section, flags=re.MULTILINE))
    for words in commands("python", "-m", "pip", "install"):
        assert (ROOT / option(words, "-c")).is_file()
        for named in re.findall(r"\[(.*?)\]", " ".join(words)):
            assert set(named.split(",")) <= extras


def test_estimating_prints_memory_and_time() -> None:
    (words,) = commands("python", "tools/estimate.py")
    printed = run([sys.executable, *words[1:]], ROOT)
    assert "peak" in printed and "hours" in printed


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the README's data commands were run, in its order, on files by the names it uses."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "notes").mkdir()
    for source in DOCUMENTS:
        shutil.copy(ROOT / source, folder / "notes" / Path(source).name)
    (folder / "tools").symlink_to(ROOT / "tools")
    lines = [f'{{"text": "{n} tokens of text, {n * n} of them new"}}\n' for n in range(400)]
    (folder / "corpus.jsonl").write_text("".join(lines))
    trained, given = commands("python", "tools/preprocess_data.py")
    assert "--train-tokenizer" in trained and "--tokenizer" in given
    run([sys.executable, *trained[1:]], folder)
    tokenizer = folder / option(given, "--tokenizer")
    shutil.copytree(folder / f"{option(trained, '--output')}_tokenizer", tokenizer)
    assert "400 documents" in run([sys.executable, *given[1:]], folder)
    return folder


def test_data_commands_write_what_is_said(folder: Path) -> None:
    for words in commands("python", "tools/preprocess_data.py"):
        prefix = folder / option(words, "--output")
        written = {path.name.removeprefix(prefix.name) for path in prefix.parent.glob(f"{prefix.name}*")}
        assert written == {".bin", ".idx", ".json", "_tokenizer", "_statistics.json", "_statistics.png"}


def test_a_window_of_the_data_is_shown(folder: Path) -> None:
    [words] = commands("python", "tools/inspect_data.py")
    printed = run([sys.executable, *words[1:]], folder)
    assert printed.startswith("window 0: step 1") and " tokens of text, " in printed


@pytest.mark.slow
def test_the_training_line_trains(folder: Path) -> None:
    [words] = commands("torchrun", "--nproc-per-node", "4", "pretrain_anchor.py")
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    metrics = folder / "metrics.jsonl"
    overrides = [f"data.train={folder / 'data' / 'corpus'}", f"log.jsonl={metrics}"]
    printed = run([*program, *words[1:], *overrides], ROOT)
    steps = re.findall(r"^step +(\d+) +loss ", printed, flags=re.MULTILINE)
    assert steps == ["1", "2", "3"]
    assert len(metrics.read_text().splitlines()) == 3


@pytest.mark.slow
def test_a_model_goes_there_and_back(folder: Path) -> None:
    there, back = commands("python", "tools/convert_checkpoint.py")
    shape = dict(vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2)
    model = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=4, num_key_value_heads=2))
    model.save_pretrained(folder / option(there, "--hf"))
    run([sys.executable, *there[1:]], folder)
    checkpoint = folder / option(there, "--out")
    [named] = re.findall(rf"`({option(there, '--out')}/[\w/]+\.yaml)`", README)
    values = OmegaConf.to_object(OmegaConf.load(folder / named))
    assert model_config(values["model"]).num_layers == 2
    shutil.copytree(checkpoint, folder / option(back, "--megatron"))
    run([sys.executable, *back[1:]], folder)
    returned = LlamaForCausalLM.from_pretrained(folder / option(back, "--out"))
    assert returned.config.rope_parameters["rope_theta"] == 5e6
    for name, weight in returned.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name]), name


def test_the_plan_is_shown() -> None:
    for words in commands("python", "tools/show_plan.py"):
        printed = run([sys.executable, *words[1:]], ROOT)
        assert printed.startswith("64 tokens, 5 documents, 4 ranks of 16 tokens")


def test_more_ranks_are_simulated(tmp_path: Path) -> None:
    for words in commands("python", "tools/profile_cp.py"):
        few = ["--cp", "2", "--windows", "1", "--output", str(tmp_path / "few")]
        assert "| ours: document, sparse" in run([sys.executable, *words[1:], *few], ROOT)


@pytest.mark.slow
def test_logits_are_compared() -> None:
    [words] = commands("torchrun", "--nproc-per-node", "4", "tools/compare_logits.py")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    assert "   4  ulysses            0.00e+00         yes" in run([*launch, *words[1:]], ROOT)


def test_the_slurm_script_parses() -> None:
    for words in commands("sbatch"):
        run(["bash", "-n", words[1]], ROOT)


def test_help_explains_every_field() -> None:
    [words] = commands("python", "pretrain_anchor.py", "--help")
    assert describe() in run([sys.executable, *words[1:]], ROOT)


def test_configurations_load(tmp_path: Path) -> None:
    assert blocks("yaml")
    for number, text in enumerate(blocks("yaml")):
        path = tmp_path / f"{number}.yaml"
        path.write_text(text)
        assert load_config(path).data.train == "data/corpus", "the data set that the README prepares"


@pytest.mark.parametrize("name", DOCUMENTS)
def test_named_files_exist(name: str) -> None:
    text = (ROOT / name).read_text()
    named = re.findall(r"`([\w./-]+(?:\.(?:py|md|yaml|txt|toml)|/))`", text)
    bases = (ROOT, ROOT / "anchor_megatron")  # docs/architecture.md names files as seen from the package
    missing = [
        path
        for path in named
        if not path.startswith(("PREFIX", "checkpoints/"))
        and not any((base / path).exists() for base in bases)
    ]
    assert not missing, f"{name} names what is not there: {missing}"
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (ROOT / name).parent.joinpath(link).exists(), f"{name} links to {link}"


@pytest.mark.parametrize("name", DOCUMENTS)
def test_named_fields_exist(name: str) -> None:
    known = set(re.findall(r"^  (\w+\.\w+) \(", describe(), flags=re.MULTILINE))
    sections = "|".join({field.split(".")[0] for field in known})
    for field in re.findall(rf"`((?:{sections})\.\w+)[`=:]", (ROOT / name).read_text()):
        assert field in known or field.endswith((".py", ".yaml")), f"{name} names the field {field}"


def test_tables_name_all_modes_placements_and_exchanges() -> None:
    rows = re.findall(r"^\| `(\w+)` \|", README, flags=re.MULTILINE)
    assert tuple(rows) == (*MODES, *PLACEMENTS, *EXCHANGES)
