"""Where BF16 breaks rotary embedding and where it does not, on a model or on seeded random vectors.

python tools/rope_precision.py                                      # a small random model, 90 s on a CPU
python tools/rope_precision.py --hf models/llama --text README.md   # any Hugging Face checkpoint we know
python tools/rope_precision.py --checkpoint build/demo/checkpoints  # what a run saved
python tools/rope_precision.py --preset llama-3-8b --tokens 2048    # a random model of a published shape
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from anchor_megatron import cpu
from anchor_megatron.config import ModelConfig, model_config

ROOT = Path(__file__).resolve().parent.parent
SMALL = dict(num_layers=4, hidden_size=512, ffn_hidden_size=1536, num_attention_heads=8, num_query_groups=2,
             vocab_size=4096, rotary_base=5e5)  # fmt: skip


def main() -> int:
    """Returns the process's exit status: 2 for what a user got wrong."""
    given = _parser().parse_args()
    if not torch.cuda.is_available():
        cpu.install()
    try:
        with torch.no_grad():
            _run(given)
    except ValueError as error:
        print(f"rope_precision.py: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--hf", type=Path, help="a Hugging Face checkpoint's folder")
    source.add_argument("--checkpoint", type=Path, help="a training checkpoint's folder, or a folder of them")
    source.add_argument("--preset", help="the shape of a random model (anchor_megatron/presets.py)")
    source.add_argument(
        "--results", type=Path, help="a precision.json: write its report again, measure nothing"
    )
    parser.add_argument("--layers", type=int, help="layers of a random model, where not the preset's own")
    parser.add_argument(
        "--text", type=Path, help="text for a model that has a tokenizer (default: our README)"
    )
    parser.add_argument("--tokens", type=int, default=512, help="tokens run through the model (default 512)")
    parser.add_argument("--length", type=int, default=131_072, help="longest sequence (default 131072)")
    parser.add_argument("--seed", type=int, default=0, help="of random vectors, weights and tokens")
    parser.add_argument("--out", type=Path, default=Path("build/precision"), help="folder of the report")
    return parser


def _run(given: argparse.Namespace) -> None:
    from anchor_megatron.precision.findings import findings
    from anchor_megatron.precision.report import summary_table, write_report

    given.out.mkdir(parents=True, exist_ok=True)
    results = _measured(given) if given.results is None else _read(given.results)
    found = findings(results)
    results["findings"] = [dataclasses.asdict(one) for one in found]
    (given.out / "precision.json").write_text(_one_row_a_line(results))
    write_report(results, found, given.out)
    print(summary_table(results))
    for one in found:
        print(f"- {one.text}")
    print(f"{results['seconds']:.0f} s; see {given.out / 'report.html'}")


def _measured(given: argparse.Namespace) -> dict[str, Any]:
    from anchor_megatron.precision.lab import Settings, measure

    started = time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    settings = Settings.up_to(given.length, seed=given.seed)
    if device.type == "cuda":
        settings = dataclasses.replace(settings, kernel_lengths=(512, 2048, given.length))
    subjects = _subjects(given, device)
    results = measure(subjects, settings, device=device, say=lambda text: print(text, flush=True))
    return _rounded(results) | dict(
        command=shlex.join(["python", "tools/rope_precision.py", *sys.argv[1:]]),
        device=torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        torch=torch.__version__,
        seconds=round(time.perf_counter() - started, 1),
    )


def _rounded(value: Any) -> Any:
    """Numbers to four digits, in dictionaries and lists too."""
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_rounded(one) for one in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _one_row_a_line(results: dict[str, Any]) -> str:
    parts = []
    for key, value in results.items():
        rows = isinstance(value, list) and value and isinstance(value[0], dict)
        text = "[\n " + ",\n ".join(map(json.dumps, value)) + "\n]" if rows else json.dumps(value)
        parts.append(f"{json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"--results {path}: {error}") from error


def _subjects(given: argparse.Namespace, device: torch.device) -> list[Any]:
    """The model asked for and, where it is a trained one, a random one of its shape beside it."""
    if given.checkpoint is not None:
        from anchor_megatron.convert.exporting import export_checkpoint

        with tempfile.TemporaryDirectory(prefix="precision-") as name:
            export_checkpoint(given.checkpoint, Path(name) / "hf", say=lambda text: None)
            return _trained(Path(name) / "hf", str(given.checkpoint), given, device)
    if given.hf is not None:
        return _trained(given.hf, str(given.hf), given, device)
    model = model_config(dict(preset=given.preset) if given.preset else SMALL)
    if given.layers:
        model = dataclasses.replace(model, num_layers=given.layers)
    return [_random(model, given, device, tokens=None)]


def _trained(folder: Path, shown: str, given: argparse.Namespace, device: torch.device) -> list[Any]:
    from transformers import AutoModelForCausalLM

    from anchor_megatron.convert.hf_config import read_hf_config, read_model
    from anchor_megatron.precision.lab import Subject

    model = read_model(read_hf_config(folder / "config.json"))
    weights: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    tokens = _tokens(folder, model, given).to(device)
    subject = Subject("trained", f"the model in {shown}", _probe(weights.to(device), model), tokens)
    return [subject, _random(model, given, device, tokens=tokens)]


def _random(
    model: ModelConfig, given: argparse.Namespace, device: torch.device, *, tokens: torch.Tensor | None
) -> Any:
    """A model of that shape as training would begin with it: normal weights of model.init_std."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from anchor_megatron.convert.hf_config import write_hf_config
    from anchor_megatron.precision.lab import Subject

    written = write_hf_config(model, None, torch_dtype="bfloat16", longest=1 << 22, token_ids={})
    torch.manual_seed(given.seed)
    with device:
        weights: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(**written), dtype=torch.bfloat16)
    if tokens is None:
        generator = torch.Generator().manual_seed(given.seed)
        tokens = torch.randint(0, model.vocab_size or 1, (given.tokens,), generator=generator).to(device)
    title = f"a random model of {model.num_layers} layers, width {model.hidden_size}"
    return Subject("random_model", title, _probe(weights, model), tokens)


def _probe(weights: Any, model: ModelConfig) -> Any:
    from anchor_megatron.model.rope_scaling import inverse_frequencies
    from anchor_megatron.precision.model import Probe

    frequencies, factor = inverse_frequencies(
        head_dim=model.kv_channels or model.hidden_size // model.num_attention_heads,
        rotary_base=model.rotary_base,
        rope_scaling=model.rope_scaling,
        max_position_embeddings=model.max_position_embeddings,
        seq_length=model.max_position_embeddings,
    )
    return Probe(weights, torch.from_numpy(frequencies), attention_factor=factor)


def _tokens(folder: Path, model: ModelConfig, given: argparse.Namespace) -> torch.Tensor:
    """The text's first tokens behind the tokenizer's BOS (else EOS); random ones without a tokenizer."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        print(f"{folder}: no tokenizer ({str(error).splitlines()[0]}); taking random tokens", file=sys.stderr)
        generator = torch.Generator().manual_seed(given.seed)
        return torch.randint(0, model.vocab_size or 1, (given.tokens,), generator=generator)
    path = given.text or ROOT / "README.md"
    if not path.is_file():
        raise ValueError(f"--text: got {path}, expected a file")
    ids = tokenizer(path.read_text(), add_special_tokens=False)["input_ids"][: given.tokens - 1]
    if len(ids) < given.tokens - 1:
        raise ValueError(f"--text {path}: got {len(ids)} tokens, expected at least {given.tokens - 1}")
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return torch.tensor([first if first is not None else ids[0], *ids])


if __name__ == "__main__":
    sys.exit(main())
