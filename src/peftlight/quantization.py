"""A base whose linear layers are held in few bits, so that a large model fits on a small card.

QLoRA: Efficient Finetuning of Quantized LLMs. Dettmers, Pagnoni, Holtzman, Zettlemoyer, 2023.
https://arxiv.org/abs/2305.14314
LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale. Dettmers, Lewis, Belkada, Zettlemoyer, 2022.
https://arxiv.org/abs/2208.07339

The layers are those of bitsandbytes. transformers reads a checkpoint tensor by tensor and quantizes each as it comes.
"""

import importlib
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import Any, Literal, get_type_hints

import torch
from torch import Tensor, nn

from peftlight.errors import UserError, listed
from peftlight.linear import is_conv1d, is_linear, is_quantized, widths
from peftlight.log_once import log_once
from peftlight.paths import heads_of, inside
from peftlight.targets import matching
from peftlight.typed import fits

_BIAS = "bias_before_forward"


@dataclass(frozen=True)
class Quantization:
    """How the linear layers of a base are held.

    Raises:
        UserError: a field has a value that bitsandbytes does not know.
    """

    bits: Literal[4, 8] = 4
    """Of each weight."""
    quant_type: Literal["nf4", "fp4"] = "nf4"
    """The sixteen values of 4 bits: quantiles of a normal distribution, or small floating-point numbers."""
    double_quant: bool = True
    """Whether the scales of 4 bits are held in 8 bits themselves: 4.127 bits for each weight instead of 4.5."""
    block_size: int = 64
    """Weights that share a scale, with 4 bits."""
    compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """In which the layers compute, with 4 bits; auto: bfloat16 on a card that has it, else float32."""
    keep: list[str] = field(default_factory=list)
    """Modules left as they are, as in `target_modules`; heads and embeddings always are."""

    def __post_init__(self) -> None:
        sizes = [32 << power for power in range(8)]
        if self.bits == 4 and self.block_size not in sizes:
            raise UserError(f"block_size is {self.block_size}; bitsandbytes has {listed(sizes)}.")

    def __str__(self) -> str:
        if self.bits == 8:
            return "8 bits"
        double = " with double quantization" if self.double_quant else ""
        return f"4 bits ({self.quant_type}{double}, blocks of {self.block_size})"

    @classmethod
    def from_plain(cls, fields: Mapping[str, Any]) -> "Quantization":
        """From what `described` gives.

        Raises:
            UserError: it is something else.
        """
        hints = get_type_hints(cls)
        wrong = [f"{name} is {value!r}" for name, value in fields.items()
                 if name not in hints or not fits(value, hints[name])]  # fmt: skip
        if wrong:
            raise UserError(f"The record of a quantization is not understood: {listed(wrong)}.")
        return cls(**fields)

    def described(self) -> dict[str, Any]:
        """The fields that matter, as plain data."""
        own = asdict(self)
        return own if self.bits == 4 else {name: own[name] for name in ("bits", "keep")}

    def kept(self, model: nn.Module) -> list[str]:
        """Paths of the linear layers that stay as they are.

        Raises:
            UserError: a name in `keep` matches nothing, or no layer is left to quantize.
        """
        left = [*heads_of(model), *(matching(model, self.keep) if self.keep else [])]
        linear = [path for path, module in model.named_modules() if is_linear(module)]
        kept = [path for path in linear if inside(path, left)]
        if len(kept) == len(linear):
            raise UserError(f"Nothing of this {type(model).__name__} would be quantized: it has "
                            f"{f'only {listed(kept)}, which stay' if kept else 'no linear layer'}.")  # fmt: skip
        return kept

    def options(self, model: nn.Module, device: torch.device) -> dict[str, Any]:
        """What `from_pretrained` takes to load a model of this shape (it may be on the meta device) quantized.

        Raises:
            UserError: nothing is there to quantize, or the package bitsandbytes is not installed.
        """
        _bitsandbytes()
        kept = [f"^{re.escape(path)}$" for path in self.kept(model)]
        return {"quantization_config": _config(self, kept, device), "device_map": {"": device}}

    def apply(self, model: nn.Module, device: torch.device | None = None) -> None:
        """Quantize the linear layers of a model in memory, one after the other, on `device` or where they are.

        Raises:
            UserError: nothing is there to quantize, or the package bitsandbytes is not installed.
        """
        kept = set(self.kept(model))
        for path, module in list(model.named_modules()):
            if is_linear(module) and not is_quantized(module) and path not in kept:
                model.set_submodule(path, self._layer(module if device is None else module.to(device)))
        hold_still(model)

    def check_same(self, already: Any, name: str) -> None:
        """See that a checkpoint which is quantized itself is so in the same way.

        Raises:
            UserError: it is not.
        """
        told = already if isinstance(already, dict) else already.to_dict()
        bits = next((bits for bits in (4, 8) if told.get(f"load_in_{bits}bit")), None)
        kind, double = told.get("bnb_4bit_quant_type"), bool(told.get("bnb_4bit_use_double_quant"))
        same = bits == self.bits and (bits == 8 or (kind, double) == (self.quant_type, self.double_quant))
        if told.get("quant_method") != "bitsandbytes" or not same or self.keep:
            four = f" {kind}{' with double quantization' if double else ''}" if bits == 4 else ""
            how = f"{told.get('quant_method')}{f', {bits} bits{four}' if bits else ''}"
            raise UserError(
                f"The model {name!r} is quantized already ({how}), and cannot be held in {self} besides: leave "
                "Quantize out, or name the full-precision model."
            )

    def _layer(self, module: nn.Module) -> nn.Module:
        bnb = _bitsandbytes()
        weight, bias = module.get_parameter("weight").detach(), getattr(module, "bias", None)
        weight = weight.T.contiguous() if is_conv1d(module) else weight
        shape, device = widths(module), weight.device
        if self.bits == 8:
            layer = bnb.nn.Linear8bitLt(*shape, bias is not None, has_fp16_weights=False, threshold=6.0, device="meta")
            layer.weight = bnb.nn.Int8Params(weight.cpu(), requires_grad=False, has_fp16_weights=False).to(device)
        else:
            layer = bnb.nn.Linear4bit(*shape, bias is not None, self.dtype_on(device), device="meta")
            layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, module=layer, **self._four_bits()).to(device)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
        made: nn.Module = layer.train(module.training)
        return made

    def _four_bits(self) -> dict[str, Any]:
        return {
            "quant_type": self.quant_type,
            "compress_statistics": self.double_quant,
            "blocksize": self.block_size,
        }

    def dtype_on(self, device: torch.device) -> torch.dtype:
        """The number format in which the layers compute: bfloat16 on a CPU is dozens of times slower than float32."""
        if self.compute_dtype != "auto":
            dtype: torch.dtype = getattr(torch, self.compute_dtype)
            return dtype
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if fast else torch.float32


def skeleton(config: Any, auto_class: str, **options: Any) -> nn.Module:
    """A model without weights."""
    import transformers

    with torch.device("meta"):
        model: nn.Module = getattr(transformers, auto_class).from_config(config, **options)
    return model


@dataclass(frozen=True)
class Held:
    """What a quantized model's linear layers take."""

    layers: int
    weights: int
    """Numbers that they hold."""
    size: int
    """Bytes, the scales included."""

    @property
    def bits(self) -> float:
        """Bits for each weight."""
        return 8 * self.size / self.weights

    def __str__(self) -> str:
        size = f"{self.size / 1e6:,.1f} MB ({self.bits:.3f} bits each)"
        return f"{self.layers} linear layers, {self.weights:,} weights in {size}"


def held(model: nn.Module) -> Held:
    """What the quantized layers of the model take."""
    layers = [module for module in model.modules() if is_quantized(module)]
    weights = sum(inputs * outputs for inputs, outputs in map(widths, layers))
    return Held(len(layers), weights, sum(t.numel() * t.element_size() for module in layers for t in _tensors(module)))


def _tensors(layer: Any) -> Iterator[Tensor]:
    weight: Any = layer.weight
    yield weight
    state = getattr(weight, "quant_state", None)
    if state is None:
        yield weight.SCB if weight.SCB is not None else layer.state.SCB
        return
    yield state.absmax
    if state.nested:
        yield state.state2.absmax


def in_float32(model: nn.Module, heads: Collection[str]) -> None:
    """Put normalisations and heads into float32: half precision loses there what a training needs."""
    heads = {*heads, *heads_of(model)}
    for path, module in model.named_modules():
        if "norm" in type(module).__name__.lower() or inside(path, heads):
            for parameter in module.parameters(recurse=False):
                if parameter.dtype in (torch.bfloat16, torch.float16):
                    parameter.data = parameter.data.float()


def hold_still(model: nn.Module) -> None:
    """Keep quantized weights as they are.

    On newer CPUs bitsandbytes packs them anew at the first row in eval mode, and rounds their scales: evaluation would
    be on another model than training, and the frozen base would move. And it rounds a layer's bias to the number format
    of the input, for good. Several threads may compute with a layer at once.

    At each call of a layer it also logs that inputs are cast; it is heard once.
    """
    layers = [module for module in model.modules() if is_quantized(module) and not hasattr(module, _BIAS)]
    for module in layers:
        module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
        setattr(module, _BIAS, None)
        module.register_forward_pre_hook(_keep_bias)
        module.register_forward_hook(_put_bias_back, always_call=True)
    if layers:
        log_once("bitsandbytes")


def _keep_bias(layer: nn.Module, inputs: Any) -> None:
    """Note the bias, unless another thread's call has rounded it for the moment."""
    bias, kept = layer.bias, getattr(layer, _BIAS)
    if isinstance(bias, nn.Parameter) and (kept is None or bias.dtype == kept.dtype):
        setattr(layer, _BIAS, bias.data)


def _put_bias_back(layer: nn.Module, inputs: Any, output: Any) -> None:
    kept = getattr(layer, _BIAS)
    if kept is not None and layer.bias is not None:
        bias = layer.get_parameter("bias")
        bias.data = kept.to(bias.device)


def _bitsandbytes() -> Any:
    try:
        return importlib.import_module("bitsandbytes")
    except ModuleNotFoundError as error:
        if error.name != "bitsandbytes":
            raise
        raise UserError("A base in few bits needs the package bitsandbytes: pip install bitsandbytes") from error


@cache
def _blocks() -> tuple[type, type]:
    """bitsandbytes' 4 bits as transformers loads them, with a block size that it has no setting for."""
    from transformers import BitsAndBytesConfig
    from transformers.quantizers import register_quantization_config, register_quantizer

    parent: Any = importlib.import_module("transformers.quantizers.quantizer_bnb_4bit").Bnb4BitHfQuantizer

    @register_quantization_config("peftlight_4bit")
    class BlocksConfig(BitsAndBytesConfig):
        """As its parent, and the block size."""

        def __init__(self, block_size: int = 64, **options: Any) -> None:
            super().__init__(load_in_4bit=True, **options)
            self.block_size, self.quant_method = block_size, "peftlight_4bit"  # type: ignore[assignment]

    @register_quantizer("peftlight_4bit")
    class BlocksQuantizer(parent):
        """As its parent, and the block size."""

        def _process_model_before_weight_loading(self, model: Any, device_map: Any, **options: Any) -> None:
            super()._process_model_before_weight_loading(model, device_map, **options)
            config: Any = self.quantization_config
            for module in model.modules():
                if is_quantized(module):
                    module.weight.blocksize = config.block_size

    return BlocksConfig, BlocksQuantizer


def _config(quantization: Quantization, kept: list[str], device: torch.device) -> Any:
    from transformers import BitsAndBytesConfig

    if quantization.bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=kept)
    return _blocks()[0](
        block_size=quantization.block_size,
        bnb_4bit_quant_type=quantization.quant_type,
        bnb_4bit_use_double_quant=quantization.double_quant,
        bnb_4bit_compute_dtype=quantization.dtype_on(device),
        llm_int8_skip_modules=kept,
    )
