"""Makes packed backbones known to transformers and PEFT once either is imported, so that `import loftq_exp` is enough.

Importing them takes seconds, which `--help` and a typo should not cost; so wrapt calls back when they come.
"""

from __future__ import annotations

from typing import Any

import wrapt


def register() -> None:
    """Called once, when loftq_exp is imported."""
    wrapt.register_post_import_hook(_register_with_transformers, "transformers.quantizers.auto")
    wrapt.register_post_import_hook(_register_with_peft, "peft.tuners.lora.config")


def _register_with_transformers(_: Any) -> None:
    import loftq_exp.integrations.transformers_quantizer  # noqa: F401  # its classes register themselves


def _register_with_peft(module: Any) -> None:
    """PEFT keeps custom modules in each LoraConfig and never in a file: every new one is told of ours."""
    wrapt.wrap_function_wrapper(module, "LoraConfig.__post_init__", _with_packed_layers)


def _with_packed_layers(post_init: Any, config: Any, args: Any, kwargs: Any) -> None:
    post_init(*args, **kwargs)
    from loftq_exp.integrations.linear import PackedLinear
    from loftq_exp.integrations.lora import PackedLoraLayer

    config._register_custom_module({PackedLinear: PackedLoraLayer})
