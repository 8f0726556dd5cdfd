"""PEFT's examples/loftq_finetuning/quantize_save_load.py by its own flags, done by loftq_exp. The table: docs/migrating.md.

python examples/quantize_save_load.py --model_name_or_path meta-llama/Llama-2-7b-hf --bits 4 --iter 5 --rank 16
"""

from __future__ import annotations

from argparse import ArgumentParser

from peft_flags import override, parse, run, translate

OVERRIDES = {
    "model_name_or_path": "model.path",
    "bits": "quant.bits",
    "iter": "quant.iter",
    "rank": "quant.rank",
    "save_dir": "save_dir",
}
FAMILIES = {"llama": "llama-2", "mistral": "mistral", "falcon": "falcon", "bart": "bart", "t5": "t5",
            "deberta": "deberta", "roberta": "roberta", "bert": "bert"}  # fmt: skip
"""The model group for what is in a model's name, in the order in which PEFT's script looks."""

if __name__ == "__main__":
    parser = ArgumentParser(description="Quantize a model with LoftQ, by the flags of PEFT's script of that name.")
    parser.add_argument("--model_name_or_path", required=True)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--iter", type=int, default=1)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--save_dir", default="./model_zoo/loftq/")
    flags = parse(parser)
    family = next((group for name, group in FAMILIES.items() if name in flags.model_name_or_path.lower()), None)
    if family is None:
        parser.exit(1, f"error: --model_name_or_path {flags.model_name_or_path}: none of {', '.join(FAMILIES)} is in its name; "
                       "use python -m loftq_exp model=NAME model.path=... stages=[quantize]\n")  # fmt: skip
    run([override("model", family), *translate(flags, OVERRIDES), "stages=[quantize]", *flags.overrides])
