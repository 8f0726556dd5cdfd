"""Register packed backbones with transformers and PEFT when either is imported, so that `import loftq_exp` is enough.

Importing them takes seconds, which `--help` and a mistyped setting should not cost. wrapt therefore calls back on import.
"""

from __future__ import annotations

from typing import Any

import wrapt


def register() -> None:
    """Install the import hooks. Called once, when loftq_exp is imported."""
    wrapt.register_post_import_hook(_register_with_transformers, "transformers.quantizers.auto")
    wrapt.register_post_import_hook(_register_with_peft, "peft.tuners.lora.config")


def _register_with_transformers(_: Any) -> None:
    import loftq_exp.integrations.transformers_quantizer  # noqa: F401  # its classes register themselves


def _register_with_peft(module: Any) -> None:
    """Add the packed layer to every new LoraConfig. PEFT keeps custom modules there, and never saves them."""
    wrapt.wrap_function_wrapper(module, "LoraConfig.__post_init__", _with_packed_layers)


def _with_packed_layers(post_init: Any, config: Any, args: Any, kwargs: Any) -> None:
    post_init(*args, **kwargs)
    from loftq_exp.integrations.linear import PackedLinear
    from loftq_exp.integrations.lora import adapted_layer

    config._register_custom_module({PackedLinear: adapted_layer})
