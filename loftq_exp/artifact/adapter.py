"""Read a LoRA adapter from PEFT's files, factor by factor, and check that it fits a backbone.

PEFT itself determines the adapted layers, their shapes and s, on a model on the meta device. Rank and alpha patterns,
rslora's scaling and fully saved heads are thus handled exactly as when PEFT loads the adapter.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open

from loftq_exp import manifest
from loftq_exp.artifact.backbone import Backbone, BackboneWeight
from loftq_exp.artifact.folder import ADAPTER, Initialised, read_artifact
from loftq_exp.artifact.origin import read_origin
from loftq_exp.errors import UserError
from loftq_exp.integrations.loads import ranks_of_parameters
from loftq_exp.source.head import PREFIX
from loftq_exp.source.layout import skeleton

log = logging.getLogger(__name__)

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_UNDERSTOOD = {
    "auto_mapping", "base_model_name_or_path", "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights",
    "layers_pattern", "layers_to_transform", "lora_alpha", "lora_dropout", "modules_to_save", "peft_type", "peft_version",
    "alpha_pattern", "r", "rank_pattern", "revision", "target_modules", "target_parameters", "task_type",
    "use_rslora",
}  # fmt: skip
"""Settings that keep a layer at Q x + s B A x, or that PEFT resolves to a plain s, rank or list of modules."""
_PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")
"""Initialisations that do not change the backbone. The others (pissa, olora, corda, loftq ...) change it on loading."""


@dataclass(frozen=True)
class Adapter:
    """An adapter that fits a backbone: exactly the targets have factors."""

    folder: Path
    scaling: dict[str, float]
    """s of each layer of PEFT."""
    head: dict[str, tuple[int, ...]]
    """Shapes of the fully saved parameters, by their names in the model."""
    num_labels: int | None
    """Outputs of the head, if config.json has another number."""
    file: Any

    def merged(self, weight: BackboneWeight, values: torch.Tensor) -> torch.Tensor:
        """Q + s B A of one weight in float32. `values` is its Q in float32."""
        target = weight.target
        lora_A, lora_B = (target.factor(factor, self.file.get_tensor(f"{PREFIX}{target.layer}.lora_{factor}.weight")).float()
                          for factor in "AB")  # fmt: skip
        return torch.addmm(values, lora_B, lora_A, alpha=self.scaling[target.layer])

    def head_values(self, name: str) -> torch.Tensor:
        """A parameter of the head, by its name in the model."""
        return self.file.get_tensor(PREFIX + name)


@contextmanager
def open_adapter(folder: Path, backbone: Backbone, checked: bool = True) -> Iterator[Adapter]:
    """Open the adapter in `folder`. Its file is closed when the block ends.

    Raises UserError if it is not a plain LoRA adapter of this backbone, or if it is `checked` and not as it was written.
    """
    settings = _read_settings(folder)
    if folder.resolve().parent != backbone.init.folder.resolve():
        _check_base(folder, settings.get("base_model_name_or_path"), backbone.init)
    if checked:
        manifest.check(folder, f"--adapter={folder}: fine-tune or quantize again")
    try:
        file = safe_open(str(folder / WEIGHTS), framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise UserError(f"--adapter={folder}: {WEIGHTS} cannot be read ({error}); save it again with PEFT's save_pretrained "
                        "(safe_serialization=True)") from None  # fmt: skip
    with file as opened:
        yield _fitting(folder, settings, opened, backbone)


def _read_settings(folder: Path) -> dict[str, Any]:
    """The content of adapter_config.json. Raises UserError if the adapter does more than add s B A to linear layers."""
    try:
        settings = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        plain = LoraConfig().to_dict()
        odd = [
            name for name, value in settings.items() if value and name not in _UNDERSTOOD and value != plain.get(name)
        ]
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"--adapter={folder}: no adapter ({CONFIG} cannot be read: {error}); give a folder that PEFT's "
                        "save_pretrained wrote") from None  # fmt: skip
    if settings.get("peft_type") != "LORA":
        raise UserError(f"--adapter={folder}: a {settings.get('peft_type')} adapter, and only LoRA's can be exported")
    if odd:
        raise UserError(f"--adapter={folder}: {odd[0]}={settings[odd[0]]!r} is more than Q + s B A; only plain LoRA and rslora "
                        "can be exported")  # fmt: skip
    if settings.get("init_lora_weights", True) not in _PLAIN_STARTS:
        raise UserError(f"--adapter={folder}: init_lora_weights={settings['init_lora_weights']!r} changes the backbone on "
                        "loading, so it is no adapter of Q; fine-tune from loftq_init instead")  # fmt: skip
    return settings


def _check_base(folder: Path, base: str | None, init: Initialised) -> None:
    """Raise UserError if the adapter names another backbone. Warn if it names a missing folder, which may have been moved."""
    model = init.report["model"]
    published = init.report.get("off_the_shelf", {}).get("taken_from")
    wrong = f"--adapter={folder}: it was trained on {base}, not on DIR={init.folder}"
    origin, key = read_origin(folder), init.report.get("key")
    trained_here = not base or Path(base).resolve() == init.folder.resolve()
    if origin and origin.initialisation == key:
        return
    if origin and key and trained_here:
        raise UserError(f"--adapter={folder}: it was trained on another initialisation, which was in DIR={init.folder} at that "
                        "time; s B A fits only the Q that it was trained on")  # fmt: skip
    if not base or base == published or Path(base).resolve() == init.folder.resolve():
        return
    if Path(base).is_dir():
        other = read_artifact(Path(base))
        if other is None:
            raise UserError(
                f"{wrong}, and that is no initialised checkpoint; s B A fits only the Q that it was trained on"
            )
        if _values_from(other) != _values_from(init):
            raise UserError(f"{wrong}, which was quantized differently; give {base} as DIR")
    elif base == model["requested"]:
        raise UserError(f"{wrong}: that is the pre-trained model; s B A fits only the Q that it was trained on")
    else:
        log.warning("--adapter=%s names %s, which does not exist; DIR=%s is used, because all targets and shapes fit",
                    folder, base, init.folder)  # fmt: skip


def _values_from(init: Initialised) -> list[Any]:
    """What determines Q's values: equal for two checkpoints of the same values, even in different storage formats."""
    quant, made_from = init.report["quant"], init.report.get("made_from") or {}
    settings = [quant.get(name) for name in ("method", "type", "block_size", "double", "iter", "save_dtype")]
    settings += [quant.get("scale", "absmax"), quant.get("levels", "nf")]  # older reports lack them
    settings += [quant.get("solver", "randomized")] if quant.get("iter") else []
    if quant.get("calibration", "none") != "none":
        settings += [quant.get(name) for name in ("calibration", "rounding", "order")]
        settings += [made_from.get("settings", {}).get("text")]
    weights = [
        [weight.get(key) for key in ("name", "shape", "digest", "bits", "rank")] for weight in init.report["weights"]
    ]
    return [settings, weights]


def _fitting(folder: Path, settings: dict[str, Any], file: Any, backbone: Backbone) -> Adapter:
    """The adapter. Raises UserError unless PEFT gives it these names and shapes on this model, and its targets match."""
    found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  # no mapping
    num_labels = None
    expected, scaling = _as_peft_has_it(folder, settings, backbone, None)
    if backbone.init.report["model"]["kind"] == "classification":
        outputs = {found[name][0] for name, shape in expected.items()
                   if ".lora_" not in name and found.get(name, shape)[0] != shape[0]}  # fmt: skip
        if len(outputs) == 1:
            num_labels = outputs.pop()
            expected, scaling = _as_peft_has_it(folder, settings, backbone, num_labels)
    layers = {weight.target.layer for weight in backbone.weights.values()}
    if odd := sorted(set(scaling).symmetric_difference(layers)):
        what = "adapts it, but it is not part of Q" if odd[0] in scaling else "has no factors for it"
        raise UserError(f"--adapter={folder}: not for DIR={backbone.init.folder}: {odd[0]}: the adapter {what}; give an adapter "
                        "whose targets are those of init_report.json")  # fmt: skip
    if odd := sorted(set(found).symmetric_difference(expected)):
        what = "belongs to no layer that it adapts" if odd[0] in found else "is missing"
        raise UserError(f"--adapter={folder}: {odd[0]} {what}; the adapter is another model's, or damaged")
    for name, shape in expected.items():
        if found[name] != shape:
            raise UserError(f"--adapter={folder}: {name} has shape {found[name]}, DIR={backbone.init.folder} and {CONFIG} need "
                            f"{shape}; the adapter is another model's")  # fmt: skip
    head = {name.removeprefix(PREFIX): shape for name, shape in expected.items() if ".lora_" not in name}
    return Adapter(folder, scaling, head, num_labels, file)


def _as_peft_has_it(
    folder: Path, settings: dict[str, Any], backbone: Backbone, num_labels: int | None
) -> tuple[dict[str, tuple[int, ...]], dict[str, float]]:
    """The shape of every adapter tensor by its name in the file, and s by module, as PEFT derives them from `settings`."""
    init = backbone.init
    model = skeleton(init.folder, init.report["model"]["kind"], num_labels=num_labels)
    known = {name: value for name, value in settings.items() if name in _UNDERSTOOD - {"auto_mapping", "peft_version"}}
    try:
        config = LoraConfig(**known | {"base_model_name_or_path": None, "init_lora_weights": False})
        with ranks_of_parameters(config):
            adapted = get_peft_model(model, config, autocast_adapter_dtype=False, low_cpu_mem_usage=True)
        tensors = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    except (ValueError, TypeError, KeyError, ZeroDivisionError) as error:
        raise UserError(f"--adapter={folder}: PEFT cannot put it on DIR={init.folder} ({error}); the adapter is another "
                        "model's") from None  # fmt: skip
    scaling = {
        name.removeprefix(PREFIX): float(layer.scaling["default"])
        for name, layer in adapted.named_modules()
        if isinstance(layer, LoraLayer)
    }
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}, scaling


def default_adapter(folder: Path) -> Path:
    """The folder of the initial adapter in the initialised checkpoint `folder`."""
    return folder / ADAPTER
