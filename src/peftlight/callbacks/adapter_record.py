"""What a run keeps with its adapter, wherever the adapter's folder goes."""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Trainer

from peftlight.class_paths import definitions, is_ours, path_of
from peftlight.tasks import PEFTModule


def adapter_record(
    trainer: Trainer, module: PEFTModule, run: Mapping[str, Any], metrics: Mapping[str, float | None]
) -> dict[str, Any]:
    """Laid out as `peftlight.interop.Record`.

    Args:
        trainer: of the run.
        module: the task that was trained.
        run: what run.json holds.
        metrics: as last logged.
    """
    data: Any = getattr(trainer, "datamodule", None)
    source = getattr(data, "source", None)
    quantization = module.quantization
    return {
        "base": {
            "auto_class": module.auto_class,
            "quantization": quantization and quantization.described(),
            **(vars(module.source) if module.source else {}),
        },
        "task": _name_of(type(module)),
        "defined_in": definitions([type(module)]),
        "label_names": getattr(module, "label_names", None),
        "data": {
            "source": source and str(source),
            "fingerprint": run.get("data_fingerprint"),
            "encoder": data.encoder("predict", None).settings() if hasattr(data, "encoder") else None,
        },
        "metrics": metrics,
        "steps": trainer.global_step,
        **{key: run[key] for key in ("initialised_from",) if key in run},
        "seed": None if run["seed"] is False else run["seed"],  # false: none was asked for
    }


def _name_of(kind: type) -> str:
    """The name of one of our tasks; of another its path."""
    return kind.__name__ if is_ours(kind) else path_of(kind)
