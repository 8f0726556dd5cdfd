"""A fine-tuned model on its own: `python -m loftq_exp.export DIR OUT [--adapter FOLDER] [--to dense|bnb4|packed]`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from loftq_exp.commands.terminal import OneLineParser, exit_code, quiet_libraries
from loftq_exp.config import local_path
from loftq_exp.schemes import FORMATS

FORMS = tuple(FORMATS)
DTYPES = ("bfloat16", "float16", "float32")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code: 1 for a refusal, which is one line on standard error."""

    def work() -> int:
        options = _parser().parse_args(argv)
        folder, out = local_path(options.folder), local_path(options.out)
        adapter = local_path(options.adapter) if options.adapter else None
        quiet_libraries()
        from loftq_exp.artifact.exported import export  # torch takes seconds, which a typo should not cost

        sys.stdout.write(f"{export(folder, out, adapter, options.to, options.dtype)}\n")
        return 0

    return exit_code(work, "nothing was exported")


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="python -m loftq_exp.export",
        description="Merges a fine-tuned adapter into the quantized backbone that it was trained on: Q + s B A, in float32, for "
        "each quantized weight, never into the pre-trained weights.",
    )
    parser.add_argument("folder", metavar="DIR", help="the initialised checkpoint: what stages=[quantize] wrote")
    parser.add_argument("out", metavar="OUT", help="a new folder, or an empty one")
    parser.add_argument("--adapter", metavar="FOLDER", help="the adapter, such as a run's adapter/ (DIR/loftq_init)")
    parser.add_argument("--to", choices=FORMS, default="dense",
                        help="dense: a plain transformers checkpoint (the default). bnb4: bitsandbytes' packed NF4, a NEW "
                        "quantization of Q + s B A, which moves its values. packed: the backbone as it is, packed, with the "
                        "adapter beside it; only from packed storage")  # fmt: skip
    parser.add_argument("--dtype", choices=DTYPES, help="type of what is written dense (the checkpoint's save_dtype)")
    return parser
