"""The settings `quant`: how weights are quantized."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

from loftq_exp.config.schema import INITIALISATION, setting
from loftq_exp.errors import UserError
from loftq_exp.schemes import BITS_OF_TYPE, BLOCKLESS_TYPES, SCALES, SEARCHED_TYPES, TYPES_OF_LEVELS, Scheme

ALLOCATIONS = ("paper", "error", "error+rank")
PAPER_WIDTHS = (2, 4)
"""Widths of the paper's mixed precision: 4 bits in the first layers, 2 in the others."""


@dataclass(frozen=True)
class QuantConfig:
    """How each weight W becomes a quantized backbone Q and LoRA factors A, B with Q + s B A close to W."""

    method: str = setting(
        "loftq: Q and LoRA factors A, B fitted to W; qlora: Q = quantize(W), B = 0; pissa: B A = the leading components of W, "
        "Q = quantize(W - B A); lora: W kept in 16 bits, B = 0; off-the-shelf: a published checkpoint",
        choices=("loftq", "qlora", "pissa", "lora", "off-the-shelf"),
        shapes=(INITIALISATION,),
    )
    type: str = setting(
        "quantizer. nf, nf-symmetric: NormalFloat; uniform: even levels from a block's minimum to its maximum; "
        "uniform-clipped: even levels over the weight's mean +- 2 standard deviations; uniform-sigma: even levels scaled by "
        "a block's mean + 2.5 standard deviations; int: int8 with one scale per row; none: not quantized",
        "nf",
        choices=tuple(BITS_OF_TYPE),
        shapes=(INITIALISATION,),
    )
    bits: float = setting(
        "bits per value, scales not counted: one width for all weights, or a fraction as the mean over all values",
        4,
        shapes=(INITIALISATION,),
    )
    allocation: str | None = setting(
        "how bits are distributed over the weights, with quant.bits as the mean. paper: 4 bits for the first "
        "floor(L (bits - 2) / 2) of the L layers, 2 for the others (encoder layers come before decoder layers); error: the "
        "widths with the smallest sum of weight errors; error+rank: widths and ranks, for an adapter that is no larger. "
        "null: the same width everywhere if quant.bits is whole, otherwise paper",
        None,
        choices=ALLOCATIONS,
        shapes=(INITIALISATION,),
    )
    bits_per_layer: Mapping[str, int] | None = setting(
        "bits by module name pattern; replaces quant.bits. The first matching pattern applies. * matches any text, ? any "
        "character, and N-M between two dots any number from N to M. Example: {*.layers.0-15.*:4,*:2}",
        None,
        shapes=(INITIALISATION,),
    )
    target_modules: tuple[str, ...] | None = setting(
        "patterns of the layers to quantize and adapt; null: all linear layers of all blocks. A pattern matches a module's whole "
        "name or its part after a dot, such as q_proj or self_attn.*. * matches any text, ? any character, and N-M between two "
        "dots any number from N to M, such as layers.0-15.mlp.*",
        None,
        shapes=(INITIALISATION,),
    )
    exclude: tuple[str, ...] | None = setting(
        "patterns, as in quant.target_modules, of layers that stay dense and get no adapter; null: none",
        None,
        shapes=(INITIALISATION,),
    )
    rank: int = setting("rank of the LoRA factors A and B", 64, ge=1, shapes=(INITIALISATION,))
    rank_choices: tuple[int, ...] | None = setting(
        "ranks that quant.allocation=error+rank may choose; null: half, once and twice quant.rank",
        None,
        shapes=(INITIALISATION,),
    )
    iter: int = setting("number of alternating LoftQ steps; 0 is QLoRA", 5, ge=0, lt=1001, shapes=(INITIALISATION,))
    block_size: int = setting(
        "number of consecutive values (row-major) that share one scale", 64, ge=1, shapes=(INITIALISATION,)
    )
    double: bool = setting(
        "double quantization: quantize the block scales to 8 bits, with one step size per 256 scales",
        False,
        shapes=(INITIALISATION,),
    )
    scale: str = setting(
        "scale of a block. absmax: it covers the block's range, as published; search: of 15 fractions of that, the one with the "
        "smallest squared error (types nf, nf-symmetric and uniform)",
        "absmax",
        choices=SCALES,
        shapes=(INITIALISATION,),
        before="absmax",
    )
    levels: str = setting(
        "levels of type nf. nf: NormalFloat's, as published; optimal: a subset of NF4's levels with nearly the smallest "
        "squared error, at 2, 3 and 4 bits exact in bitsandbytes' NF4",
        "nf",
        choices=tuple(TYPES_OF_LEVELS),
        shapes=(INITIALISATION,),
        before="nf",
    )
    alpha: float | None = setting(
        "LoRA alpha; the adapter's output is scaled by alpha / rank. null: equal to the rank",
        None,
        gt=0,
        shapes=(INITIALISATION,),
    )
    dropout: float = setting(
        "dropout probability on the adapter's input in training", 0.1, ge=0, lt=1, shapes=(INITIALISATION,)
    )
    solver: str = setting(
        "truncated SVD for the LoRA factors: randomized (faster) or exact",
        "randomized",
        choices=("randomized", "exact"),
        shapes=(INITIALISATION,),
    )
    calibration: str = setting(
        "norm in which the error of a weight is minimised. none: that of the weight itself; full: that of the layer's outputs "
        "on calibration text, by the second moment H of its inputs; diagonal: the same with H's diagonal alone",
        "none",
        choices=("none", "diagonal", "full"),
        shapes=(INITIALISATION,),
        before="none",
    )
    rounding: str = setting(
        "how values become codes. nearest: each to the nearest level; gptq: column by column, where later columns compensate "
        "the error of earlier ones (needs quant.calibration=full)",
        "nearest",
        choices=("nearest", "gptq"),
        shapes=(INITIALISATION,),
        before="nearest",
    )
    order: str = setting(
        "inputs on which a layer is calibrated. parallel: those in the pre-trained model; sequential: those in the model whose "
        "earlier blocks are initialised already",
        "parallel",
        choices=("parallel", "sequential"),
        shapes=(INITIALISATION,),
        before="parallel",
    )
    polish_steps: int = setting(
        "gradient steps on A and B after the decomposition, so that the model's last hidden state on the calibration text is the "
        "pre-trained one's; 0: none",
        0,
        ge=0,
        shapes=(INITIALISATION,),
        before=0,
    )
    polish_learning_rate: float = setting(
        "peak learning rate of these steps", 5e-4, gt=0, shapes=(INITIALISATION,), before=5e-4
    )
    path: str | None = setting(
        "off-the-shelf only: Hub id or folder of the published checkpoint; null: the one known for model, bits and rank",
        None,
        shapes=(),
    )
    revision: str | None = setting(
        "off-the-shelf only: branch, tag or commit of quant.path on the Hub; null: the default branch", None, shapes=()
    )

    def __post_init__(self) -> None:
        if self.bits == int(self.bits):  # 4.0 becomes 4, so that names, digests and reports are the same
            object.__setattr__(self, "bits", int(self.bits))
        self._check_off_the_shelf()
        if self.bits_per_layer is not None:
            self._check_pattern(self.bits_per_layer)
        else:
            self._check_bits()
        self._check_rank_choices()
        for name, patterns in (("target_modules", self.target_modules), ("exclude", self.exclude)):
            if patterns is not None and not all(patterns or ("",)):
                raise UserError(f"quant.{name}=[{','.join(patterns)}]: a pattern is empty or none is given; give quant.{name}=[PATTERN,...], or null")  # fmt: skip
        if (self.method == "lora") != (self.type == "none"):
            raise UserError(
                f"quant.type={self.type}: method {self.method} does not go with it; "
                "quant=lora keeps the weights (type none), the other methods quantize"
            )
        if self.method == "pissa" and self.iter != 1:
            raise UserError(
                f"quant.iter={self.iter}: pissa fits its factors once, before it quantizes; leave quant.iter at 1"
            )
        if self.method not in ("loftq", "pissa") and self.iter != 0:
            raise UserError(
                f"quant.iter={self.iter}: {self.method} has no alternating steps; use quant=loftq, or leave quant.iter at 0"
            )
        self._check_calibration()
        if self.block_size & (self.block_size - 1) or not 16 <= self.block_size <= 4096:
            raise UserError(
                f"quant.block_size={self.block_size}: not a block size; choose a power of two from 16 to 4096 (64 is usual)"
            )
        if self.double and self.type in BLOCKLESS_TYPES:
            raise UserError(f"quant.double=true: type {self.type} has no blocks whose scales could be quantized; "
                            "leave quant.double out, or use nf or uniform")  # fmt: skip
        if self.scale == "search" and self.type not in SEARCHED_TYPES:
            raise UserError(f"quant.scale=search: type {self.type} has no range per block to search; "
                            f"leave quant.scale out, or use quant.type={' or '.join(SEARCHED_TYPES)}")  # fmt: skip
        if self.type not in TYPES_OF_LEVELS[self.levels]:
            raise UserError(f"quant.levels={self.levels}: type {self.type} does not use these levels; "
                            "leave quant.levels out, or use quant.type=nf")  # fmt: skip

    def _check_bits(self) -> None:
        allowed = BITS_OF_TYPE[self.type]
        widths = ", ".join(map(str, allowed))
        if self.allocation is None and self.bits in allowed:
            return
        if self.allocation is None and isinstance(self.bits, int):
            raise UserError(
                f"quant.bits={self.bits}: type {self.type} has {widths} bits; choose one of them or another quant.type"
            )
        mixed = PAPER_WIDTHS if self.rule == "paper" else allowed
        if len(allowed) == 1 or not set(mixed) <= set(allowed):
            given = f"quant.bits={self.bits}" if self.allocation is None else f"quant.allocation={self.allocation}"
            raise UserError(f"{given}: type {self.type} has {widths} bits and no others to mix; "
                            "choose quant.type=nf or uniform to mix them")  # fmt: skip
        if not mixed[0] <= self.bits <= mixed[-1]:
            side = "under the smallest" if self.bits < mixed[0] else "over the largest"
            raise UserError(f"quant.bits={self.bits}: a budget {side} choice, {self.rule} mixes {', '.join(map(str, mixed))} "
                            f"bits; give a value from {mixed[0]} to {mixed[-1]}")  # fmt: skip

    def _check_pattern(self, patterns: Mapping[str, int]) -> None:
        if self.allocation is not None:
            raise UserError(f"quant.allocation={self.allocation}: bits_per_layer says already which weight gets how many bits; "
                            "leave one of the two out")  # fmt: skip
        if not patterns:
            raise UserError("quant.bits_per_layer={}: no pattern is given; give {PATTERN:BITS,...,*:BITS}, or null")
        allowed = BITS_OF_TYPE[self.type]
        for pattern, bits in patterns.items():
            if bits not in allowed:
                raise UserError(f"quant.bits_per_layer.{pattern}={bits}: type {self.type} has {', '.join(map(str, allowed))} bits; "
                                "choose one of them or another quant.type")  # fmt: skip

    def _check_rank_choices(self) -> None:
        if self.allocation == "error+rank" and self.method not in ("loftq", "pissa"):
            raise UserError(f"quant.allocation=error+rank: the factors of {self.method} start at zero, at any rank; "
                            "use quant.allocation=error, or quant=loftq")  # fmt: skip
        if self.rank_choices is None:
            return
        shown = f"quant.rank_choices=[{','.join(map(str, self.rank_choices))}]"
        if self.allocation != "error+rank":
            raise UserError(
                f"{shown}: ranks are chosen by quant.allocation=error+rank; add that, or leave the choices out"
            )
        if not self.rank_choices or min(self.rank_choices) < 1 or len(set(self.rank_choices)) < len(self.rank_choices):
            raise UserError(f"{shown}: not a choice of ranks; name different ranks, each at least 1")
        if min(self.rank_choices) > self.rank:
            raise UserError(f"{shown}: a budget under the smallest choice, the adapter may be as large as at "
                            f"quant.rank={self.rank}; add a rank of at most {self.rank}")  # fmt: skip

    def _check_calibration(self) -> None:
        if self.calibration != "none" and self.method not in ("loftq", "qlora"):
            raise UserError(f"quant.calibration={self.calibration}: {self.method} is not calibrated; use quant=loftq or qlora, "
                            "or leave it at none")  # fmt: skip
        if self.rounding == "gptq" and self.calibration != "full":
            raise UserError(f"quant.rounding=gptq: needs all of H, and quant.calibration={self.calibration}; "
                            "add quant.calibration=full, or use quant.rounding=nearest")  # fmt: skip
        if self.rounding == "gptq" and self.type not in SEARCHED_TYPES:
            raise UserError(f"quant.rounding=gptq: type {self.type} has no levels per block to round to; "
                            f"choose quant.type={' or '.join(SEARCHED_TYPES)}, or quant.rounding=nearest")  # fmt: skip
        if self.order != "parallel" and self.calibration == "none":
            raise UserError(f"quant.order={self.order}: nothing is calibrated; add quant.calibration=full, "
                            "or leave the order at parallel")  # fmt: skip
        if self.polish_steps and self.method not in ("loftq", "qlora", "pissa"):
            raise UserError(f"quant.polish_steps={self.polish_steps}: {self.method} has no quantization error to tune for; "
                            "use quant=loftq, qlora or pissa, or leave it at 0")  # fmt: skip

    @property
    def needs_text(self) -> bool:
        """Whether the initialisation reads calibration text."""
        return self.calibration != "none" or self.polish_steps > 0

    def _check_off_the_shelf(self) -> None:
        if self.method != "off-the-shelf":
            for name, value in (("path", self.path), ("revision", self.revision)):
                if value is not None:
                    raise UserError(f"quant.{name}={value}: names a published checkpoint; add quant=off-the-shelf, "
                                    f"or set model.{name} for the pre-trained one")  # fmt: skip
            return
        published = {
            "type": "nf",
            "block_size": 64,
            "double": False,
            "scale": "absmax",
            "levels": "nf",
            "alpha": None,
            "allocation": None,
            "bits_per_layer": None,
            "target_modules": None,
            "exclude": None,
        }
        for name, kept in published.items():
            if (value := getattr(self, name)) != kept:
                raise UserError(f"quant.{name}={value}: off-the-shelf takes a checkpoint as it was published; "
                                f"leave quant.{name} out, or use quant=loftq")  # fmt: skip
        if not isinstance(self.bits, int):
            raise UserError(f"quant.bits={self.bits}: off-the-shelf takes a checkpoint as it was published, and none mixes "
                            "widths; choose whole bits, or use quant=loftq")  # fmt: skip

    @property
    def rule(self) -> str:
        """The allocation rule: `same`, `paper`, `error`, `error+rank` or `pattern`."""
        if self.bits_per_layer is not None:
            return "pattern"
        return self.allocation or ("same" if isinstance(self.bits, int) else "paper")

    @property
    def widths(self) -> tuple[int, ...]:
        """The bit widths that a weight may get, ascending."""
        if self.bits_per_layer is not None:
            return tuple(sorted(set(self.bits_per_layer.values())))
        if self.rule == "same":
            return (int(self.bits),)
        return PAPER_WIDTHS if self.rule == "paper" else BITS_OF_TYPE[self.type]

    @property
    def scheme(self) -> Scheme:
        """The quantization scheme against which storage formats are checked."""
        return Scheme(self.type, self.widths, self.block_size, self.double, self.levels)

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks that a weight may get, ascending."""
        if self.rule != "error+rank":
            return (self.rank,)
        return tuple(sorted(self.rank_choices or {max(self.rank // 2, 1), self.rank, 2 * self.rank}))

    @property
    def exact_bits(self) -> Fraction:
        """quant.bits as an exact decimal. The float 2.3 is slightly smaller, which may give one layer fewer bits."""
        return Fraction(str(self.bits))

    @property
    def bits_label(self) -> str:
        """The bits as shown in folder names: 4, 2.5, or `mixed` for a pattern."""
        return "mixed" if self.rule == "pattern" else str(self.bits)

    @property
    def lora_alpha(self) -> float:
        """alpha as a float; the rank if quant.alpha is None."""
        return float(self.rank) if self.alpha is None else self.alpha

    @property
    def scaling(self) -> float:
        """The scaling factor s = alpha / rank of B A."""
        return self.lora_alpha / self.rank
