"""Text to packed rows, once.

    source -> documents -> [train | val | holdout] -> BPE tokenizer (from train only) -> rows of seq_len + 1 tokens

A prepared folder holds `train.bin`, `val.bin` and `holdout.bin` (little-endian uint16, seq_len + 1 tokens a row, for
memory mapping), `tokenizer.json` (plain data) and `manifest.json` (what it was made from and how, the SHA-256 of each
file). It appears whole or not at all. Rows start with a BOS token and are packed by best fit, without padding. The
splits never share a document.

    python prepare.py                    # what this machine wants: climbmix with a GPU, packages without
    python prepare.py --source FILE_OR_FOLDER

This file is the command line; `harness/data` does the work.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from hotloop.harness.command_line import exit_status
from hotloop.harness.data.building import prepare
from hotloop.harness.data.dataset import SPLITS, Dataset, default_data_dir, load_dataset
from hotloop.harness.data.packing import PACKINGS, Packer
from hotloop.harness.data.readers import DOCUMENT_CHARS, FORMATS
from hotloop.harness.data.tokenizer import Tokenizer

__all__ = ["Dataset", "Packer", "Tokenizer", "default_data_dir", "load_dataset", "main", "prepare"]


def main(argv: Sequence[str] | None = None) -> int:
    """`python prepare.py`, `hotloop prepare`; returns the exit status."""
    from hotloop.harness.settings import PRESETS, preset_named
    from hotloop.harness.single import preset_here

    parser = argparse.ArgumentParser(
        prog="hotloop prepare", description="Turn text into a tokenizer and packed rows of tokens, once."
    )
    parser.add_argument(
        "--preset", default="auto", choices=["auto", *sorted(PRESETS)],
        help="source and sizes (auto: h100 with a GPU, laptop without)",
    )  # fmt: skip
    parser.add_argument(
        "--device", default="auto", choices=["auto", "cpu"], help="cpu: for training on the CPU of a machine with a GPU"
    )
    parser.add_argument(
        "--source", help=f"climbmix, packages (sources of pinned Python packages), stdlib (readable for train.py: not "
        f"safe against cheating), or a file or folder of {FORMATS}; text files are cut at paragraphs into documents of "
        f"at most {DOCUMENT_CHARS} characters (default: the preset's)"
    )  # fmt: skip
    parser.add_argument("--text-field", default="text", metavar="NAME", help="JSON: the text's field (default: text)")
    parser.add_argument("--text-column", default="text", metavar="NAME", help="parquet: its column (default: text)")
    parser.add_argument(
        "--packing", choices=PACKINGS, help="of a document that is cut to fill a row, crop loses the rest, as the "
        "reference does (default for climbmix), and carry begins the next row with it (default)"
    )  # fmt: skip
    parser.add_argument("--seq-len", type=int, metavar="T", help="tokens a row (default: the preset's)")
    parser.add_argument("--vocab-size", type=int, metavar="V", help="of the tokenizer (default: the preset's)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="the folder to make (default: one named after it all)")
    parser.add_argument("--num-shards", type=int, default=10, metavar="N", help="climbmix: train shards (default: 10)")
    parser.add_argument(
        "--mirror", metavar="URL", help="climbmix: download from here (default: HF_ENDPOINT, or https://huggingface.co)"
    )
    parser.add_argument("--workers", type=int, default=8, metavar="N", help="climbmix: parallel downloads (default: 8)")
    args = parser.parse_args(argv)

    def run() -> int:
        name = args.preset if args.preset != "auto" else "laptop" if args.device == "cpu" else preset_here()
        preset = preset_named(name)
        dataset = prepare(
            args.source or preset.source,
            seq_len=preset.seq_len if args.seq_len is None else args.seq_len,
            vocab_size=preset.vocab_size if args.vocab_size is None else args.vocab_size,
            out=args.out,
            packing=args.packing,
            num_shards=args.num_shards,
            workers=args.workers,
            max_rows={"val": preset.eval_rows, "holdout": preset.holdout_rows},
            text_field=args.text_field,
            text_column=args.text_column,
            mirror=args.mirror,
            report=print,
        )
        if why := _why_not_safe(dataset):
            print(f"WARNING: {why}")
        rows = ", ".join(f"{s} {dataset.manifest['splits'][s]['rows']:,}" for s in SPLITS)
        print(f"{dataset.path}\nrows of {dataset.seq_len} tokens: {rows}")
        print(_next(dataset, name, args.preset == "auto", args.device))
        return 0

    return exit_status(run, "stopped; nothing half-written was left, and what was there before is there")


def _why_not_safe(dataset: Dataset) -> str:
    """What a sandbox cannot keep from train.py; empty where it can."""
    from hotloop.harness.sandbox.policy import Sandbox
    from hotloop.harness.sandbox.visible import exposed_text, readable_text

    if file := exposed_text(dataset):
        return f"{file} lies where train.py must be able to read, so no run will start with it; move the text elsewhere"
    return readable_text(dataset.source, Sandbox(3))


def _next(dataset: Dataset, asked: str, is_default: bool, device: str) -> str:
    """The command that uses what was prepared for the preset `asked`."""
    from hotloop.harness.settings import PRESETS

    fitting = [n for n in (asked, *PRESETS) if PRESETS[n].seq_len == dataset.seq_len]
    if not fitting:
        lengths = ", ".join(f"{n} {p.seq_len}" for n, p in PRESETS.items())
        return f"no preset trains on rows of {dataset.seq_len} tokens ({lengths}); see --seq-len"
    preset = PRESETS[fitting[0]]
    words = ["hotloop", "loop"]
    if device != "auto":
        words += ["--device", device]
    if not is_default or preset.name != asked:
        words += ["--preset", preset.name]
    if dataset.path != default_data_dir(preset.source, preset.seq_len, preset.vocab_size).resolve():
        words += ["--data", shlex.quote(str(dataset.path))]
    return f"to use it: {' '.join(words)}"


if __name__ == "__main__":
    raise SystemExit(main())
