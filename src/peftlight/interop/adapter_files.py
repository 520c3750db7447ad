"""The folder of an adapter: written so that a failure leaves the earlier one whole, and read strictly."""

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peftlight.delta import unchanged_on_error
from peftlight.errors import UserError, listed
from peftlight.files import write_together
from peftlight.head_size import tell_sizes
from peftlight.interop import metadata, own_format
from peftlight.interop.base_hash import differs, fingerprint
from peftlight.interop.contents import Config, Contents, Tensors
from peftlight.interop.distrust import Room
from peftlight.interop.folder import CONFIG, Files, read_files
from peftlight.interop.heads import keep_held, make_room
from peftlight.interop.hf import adalora, ia3, in_place, lora, lora_type, prefix, prompts, tokens, vera
from peftlight.interop.hf.frame import base_name
from peftlight.interop.json_files import as_json
from peftlight.interop.tensor_files import TENSORS, check_finite, save_tensors, sha256
from peftlight.shards import is_sharded
from peftlight.strategies.adalora import AdaLoRA
from peftlight.strategies.bitfit import BitFit
from peftlight.strategies.ia3 import IA3
from peftlight.strategies.layer_norm import LayerNormTuning
from peftlight.strategies.lora import LoRA
from peftlight.strategies.prefix import PrefixTuning
from peftlight.strategies.prompt import PromptTuning
from peftlight.strategies.stack import Stack
from peftlight.strategies.trainable_tokens import TrainableTokens
from peftlight.strategies.vera import VeRA
from peftlight.strategy import Adapter, PEFTStrategy, attach
from peftlight.turns import turn
from peftlight.wrappers import plain_model

# One row for each method that is exchanged with HF PEFT; everything else goes through our own format.
_WRITERS: dict[type[PEFTStrategy], Callable[[Adapter], tuple[Config, Tensors]]] = {
    AdaLoRA: adalora.to_peft,
    BitFit: in_place.bitfit_to_peft,
    IA3: ia3.to_peft,
    LayerNormTuning: in_place.norms_to_peft,
    LoRA: lora.to_peft,
    PrefixTuning: prefix.to_peft,
    PromptTuning: prompts.to_peft,
    Stack: tokens.stack_to_peft,
    TrainableTokens: tokens.to_peft,
    VeRA: vera.to_peft,
}
_READERS: dict[str, Callable[[Config, Tensors, nn.Module, str], Contents]] = {
    "ADALORA": adalora.from_peft,
    "IA3": ia3.from_peft,
    "LN_TUNING": in_place.norms_from_peft,
    "LORA": lora_type.from_peft,
    "PREFIX_TUNING": prefix.from_peft,
    "PROMPT_TUNING": prompts.from_peft,
    "P_TUNING": prompts.from_peft,
    "TRAINABLE_TOKENS": tokens.from_peft,
    "VERA": vera.from_peft,
}

# What the record beside HF PEFT's files changes about what they say.
_AS_RECORDED: dict[type[PEFTStrategy], Callable[[Contents, Mapping[str, Any], nn.Module, str], Contents]] = {
    PrefixTuning: prefix.as_recorded,
    PromptTuning: prompts.as_recorded,
}


def save_adapter(adapter: Adapter, folder: str | Path, record: Mapping[str, Any] | None = None) -> None:
    """Write the adapter's config, tensors and origin into `folder`; in HF PEFT's format where it has the method.

    Prompts and prefixes are so only where HF PEFT computes the same, as it does with `compat: peft`. Without that,
    prompts are where a model predicts tokens or labels each (HF PEFT's classifiers pool a virtual token; and it puts
    prompts before padding on the left, so it serves rows that are padded there otherwise), and prefixes where positions
    turn keys, as in Llama (elsewhere HF PEFT's prefix moves the tokens' positions). The rest is in a format of our own,
    with a warning where HF PEFT has the method but cannot say what was trained.

    What only training needed (the network that makes a prefix, say) is left out: see `Adapter.finished`.

    An adapter that is there already is replaced once all of the new one is on the disk. The same adapter and record
    give the same bytes.

    Where the model is sharded over processes, all of them call this, and the first one writes.

    Args:
        adapter: what is saved.
        folder: where it goes; made if it is not there.
        record: what is known of the training, laid out as in `Record`; it goes into `peftlight.json` beside what the
            adapter itself knows. Without a name of the base, that of the model's config is taken.

    Raises:
        UserError: a value is not finite, or the files cannot be written.
    """
    folder, recipe = Path(folder), adapter.strategy
    with adapter.whole():
        adapter = adapter.finished()
        if not adapter.state():
            raise UserError(f"The adapter {adapter.name!r} holds nothing to save; it may have been removed.")
        config, tensors = _written(adapter)
        check_finite(tensors, f"The adapter {adapter.name!r} is not saved")
        origin = metadata.describe(adapter, recipe, tensors, record or {})
    if is_sharded(adapter.model) and torch.distributed.get_rank() != 0:
        return
    text = as_json(config)

    def write_tensors(file: Path) -> None:
        save_tensors(tensors, file)
        origin["sha256"] = sha256(file)

    def write_record(file: Path) -> None:
        file.write_text(as_json(origin), encoding="utf-8")

    def write_config(file: Path) -> None:
        file.write_text(text, encoding="utf-8")

    write_together(folder, {TENSORS: write_tensors, CONFIG: write_config, metadata.FILE: write_record})


def _written(adapter: Adapter) -> tuple[Config, Tensors]:
    write = _WRITERS.get(type(adapter.strategy))
    if write is None:
        return own_format.to_own(adapter)
    try:
        _refuse_single(adapter)
        return write(adapter)
    except UserError as error:  # a training must not be lost because another library has no words for it
        warnings.warn(f"{error} It is saved in peftlight's own format, which HF PEFT does not read.", stacklevel=3)
        return own_format.to_own(adapter)


def _refuse_single(adapter: Adapter) -> None:
    modules = {name for name, _ in adapter.model.named_modules()}
    beside = [name for name in adapter.trained if name not in modules]
    if beside and (single := sorted(set(beside) - set(adapter.strategy.train(adapter.model)))):
        raise UserError(f"HF PEFT's format has no place for single parameters beside the method: {listed(single, 3)}.")


def load_adapter(
    model: nn.Module,
    folder: str | Path,
    name: str = "default",
    *,
    keep_base: bool = False,
    own_heads: bool = False,
    other_base: bool = False,
    convert_pickle: bool = False,
) -> Adapter:
    """Put the adapter in `folder`, one of ours or of HF PEFT's, on `model`.

    As after `attach`, the base is frozen and all that the adapter owns is trainable. What is trained in place keeps
    the precision of the file: in a half-precision base, a head saved in float32 becomes float32, and the model then
    computes under autocast.

    Args:
        model: the base; it is changed in place.
        folder: where the adapter is; the folder of the run that trained it will do.
        name: the adapter's name on the model.
        keep_base: as for `attach`.
        own_heads: whether a head trained whole may have another number of outputs than the model's.
        other_base: whether the base may be another one than the adapter was trained on.
        convert_pickle: whether a pickle of tensors is read where there are no safetensors; nothing in it is run.

    Raises:
        UserError: the files are missing, damaged, not supported, or do not fit the model, which is as it was.
    """
    folder, model = Path(folder), plain_model(model)
    with turn(model, short=True), unchanged_on_error(model):
        try:
            files = read_files(folder, convert_pickle)
            held = make_room(model, files.tensors) if own_heads else {}
            with Room(files.tensors):
                contents = _contents(files, model, name)
                trained = contents.modules_to_train
                adapter = attach(model, contents.strategy, name, modules_to_train=trained, keep_base=keep_base)
            keep_held(adapter, held)
            if not other_base:
                _check_base(files, adapter)
            _fill(adapter, contents.state)
            adapter.labels = tell_sizes(model, held, {})
        except UserError as error:
            raise UserError(f"Cannot load the adapter in {folder}: {error}") from None
    return adapter


def _contents(files: Files, model: nn.Module, name: str) -> Contents:
    read, recorded = _reader(files.config), files.record.strategy
    contents = read(files.config, files.tensors, model, name)
    as_recorded = _AS_RECORDED.get(type(contents.strategy))
    if read is own_format.from_own or as_recorded is None or recorded is None:
        return contents
    return as_recorded(contents, recorded, model, name)


def _reader(config: Config) -> Callable[[Config, Tensors, nn.Module, str], Contents]:
    kind = str(config.get("peft_type"))
    if kind.startswith(own_format.TYPE_PREFIX):
        return own_format.from_own
    if kind not in _READERS:
        raise UserError(
            f"peft_type is {config.get('peft_type')!r} in {CONFIG}. Of HF PEFT's types, "
            f"{listed(sorted(_READERS))} can be read."
        )
    return _READERS[kind]


def _check_base(files: Files, adapter: Adapter) -> None:
    base, model = files.record.base, adapter.model
    if what := differs(base.fingerprint, fingerprint(adapter, files.tensors)):
        raise UserError(
            f"It was trained on another base, {base.name or 'of an unknown name'}"
            f"{f' ({base.revision})' if base.revision else ''}; this {type(model).__name__} is "
            f"{base_name(model) or 'of an unknown name'}, and the two differ in the {what} of what the adapter "
            "leaves frozen. Load the base that it was trained on; or, to use it on this one nevertheless: "
            "load_adapter(..., other_base=True), or --other_base true on the command line."
        )


def _fill(adapter: Adapter, state: Tensors) -> None:
    own = adapter.state()
    if {key: value.shape for key, value in own.items()} == {key: value.shape for key, value in state.items()}:
        _check_kinds(own, state)
        for key, parameter in adapter.parameters().items():
            if parameter.dtype in (torch.float16, torch.bfloat16) and state[key].dtype == torch.float32:
                parameter.data = parameter.data.float()
    adapter.load_state(state, TENSORS)


def _check_kinds(own: Tensors, state: Tensors) -> None:
    """See that numbers with and without a fraction go where such numbers belong, and that they fit there."""
    odd = [
        f"{key} ({str(state[key].dtype).removeprefix('torch.')})"
        for key, value in own.items()
        if value.is_floating_point() != state[key].is_floating_point() or value.is_complex() != state[key].is_complex()
    ]
    if odd:
        raise UserError(f"{TENSORS} holds numbers of another kind than the model takes: {listed(odd)}.")
    check_finite({key: state[key].to(value.dtype) for key, value in own.items()}, f"{TENSORS} is refused")
