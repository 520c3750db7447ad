"""QLoRA as a callback: the base is loaded in few bits, whatever the strategy."""

from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer

from peftlight.errors import UserError
from peftlight.quantization import Quantization
from peftlight.tasks import PEFTModule, TaskCallback

_SHARDING = {"FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy"}


class Quantize(TaskCallback):
    """Holds the base's linear layers in 4 or 8 bits; adapters, heads and normalisations stay in full precision."""

    def __init__(
        self,
        bits: Literal[4, 8] = 4,
        quant_type: Literal["nf4", "fp4"] = "nf4",
        double_quant: bool = True,
        block_size: int = 64,
        compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        keep: list[str] | None = None,
        adapter_dtype: Literal["float32", "bfloat16"] = "float32",
    ) -> None:
        """
        Args:
            bits: of each weight.
            quant_type: the sixteen values of 4 bits: quantiles of a normal distribution, or small floats.
            double_quant: whether the scales of 4 bits are quantized too: 4.127 bits for each weight instead of 4.5.
            block_size: weights that share a scale, with 4 bits.
            compute_dtype: in which the layers compute, with 4 bits; auto: bfloat16 on a card that has it, else float32.
            keep: modules left as they are, by names or patterns; heads and embeddings always are.
            adapter_dtype: number format of the adapter; what half precision would hardly train, such as IA3's vectors
                and DoRA's magnitudes, which start near one, stays in float32.
        """
        self.quantization = Quantization(bits, quant_type, double_quant, block_size, compute_dtype, list(keep or ()))
        self.adapter_dtype = adapter_dtype

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not isinstance(pl_module, PEFTModule):
            raise UserError(f"Quantize needs a task of peftlight; {type(pl_module).__name__} is none.")
        self.before_base(trainer, pl_module)

    def before_base(self, trainer: Trainer, module: PEFTModule) -> None:
        _refuse_others(trainer)
        asked = (self.quantization, self.adapter_dtype)
        if module.adapter is not None and (module.quantization, module.adapter_dtype) != asked:
            raise UserError("Quantize comes too late: the base is loaded already. Make a new task for it.")
        module.quantization, module.adapter_dtype = self.quantization, self.adapter_dtype


def _refuse_others(trainer: Any) -> None:
    if sum(isinstance(callback, Quantize) for callback in trainer.callbacks) > 1:
        raise UserError("There are two Quantize callbacks, and the base can be held in one way only: leave one out.")
    if type(trainer.precision_plugin).__name__ == "BitsandbytesPrecision":
        raise UserError(
            "Lightning's BitsandbytesPrecision quantizes too, and both at once would do it twice: leave out "
            "trainer.plugins (or the precision that names it), or the Quantize callback."
        )
    if _SHARDING & {kind.__name__ for kind in type(trainer.strategy).__mro__}:
        raise UserError(
            f"Quantize does not go with {type(trainer.strategy).__name__}: packed weights and their scales cannot be "
            "cut into shards. Choose --trainer.strategy ddp, where each process holds its own quantized base, or "
            "leave Quantize out."
        )
