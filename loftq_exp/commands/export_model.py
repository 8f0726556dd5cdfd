"""Exporting a fine-tuned model: `python -m loftq_exp.export DIR OUT [--adapter FOLDER] [--to merged|bnb4|packed|adapter|gguf]`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from loftq_exp.commands.terminal import OneLineParser, exit_code, quiet_libraries
from loftq_exp.config import local_path
from loftq_exp.schemes import FORMATS

MERGED = "merged"
"""Another name of `dense`, for what it is beside `adapter` and `gguf`."""
FORMS = (MERGED, *FORMATS, "adapter", "gguf")
DTYPES = ("bfloat16", "float16", "float32", "q8_0")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code. An error is one line on standard error and exit code 1."""

    def work() -> int:
        options = _parser().parse_args(argv)
        folder, out = local_path(options.folder), local_path(options.out)
        adapter = local_path(options.adapter) if options.adapter else None
        quiet_libraries()
        from loftq_exp.artifact.exported import export  # imported late: torch takes seconds

        to = "dense" if options.to == MERGED else options.to
        sys.stdout.write(f"{export(folder, out, adapter, to, options.dtype)}\n")
        return 0

    return exit_code(work, "nothing was exported")


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="python -m loftq_exp.export",
        description="Merges a fine-tuned adapter into the quantized backbone that it was trained on. Each quantized weight "
        "becomes Q + s B A, computed in float32. The pre-trained weights are not used.",
    )
    parser.add_argument("folder", metavar="DIR", help="the initialised checkpoint, as written by stages=[quantize]")
    parser.add_argument("out", metavar="OUT", help="output folder, new or empty")
    parser.add_argument(
        "--adapter", metavar="FOLDER", help="the adapter, such as a run's adapter/ (default: DIR/loftq_init)"
    )
    parser.add_argument("--to", choices=FORMS, default="dense",
                        help="dense, or merged: a plain transformers checkpoint (default). bnb4: bitsandbytes NF4; Q + s B A is quantized "
                        "again, which changes its values. packed: the unchanged packed backbone with a separate adapter; only "
                        "for a checkpoint of save_format=packed. adapter: nothing is merged: OUT/base is Q, dense, and OUT/adapter the adapter, "
                        "as vLLM and PEFT load them. gguf: one merged file for llama.cpp")  # fmt: skip
    parser.add_argument("--dtype", choices=DTYPES, help="dtype of dense tensors (default: the checkpoint's save_dtype); q8_0 "
                        "(blocks of 8-bit codes) with --to gguf")  # fmt: skip
    return parser
