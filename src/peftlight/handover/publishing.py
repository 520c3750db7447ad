"""What of an adapter or a merged model leaves this machine: its files by name, without the paths of this machine."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peftlight.errors import UserError, listed
from peftlight.handover.merged_card import merged_card
from peftlight.handover.model_card import CARD, is_untouched, model_card
from peftlight.handover.public_names import is_public, paths_in, without_folders
from peftlight.handover.serving import MODEL_CONFIG, model_config
from peftlight.interop import metadata
from peftlight.interop.folder import CONFIG, find_adapter, read_files
from peftlight.interop.json_files import as_json, read_json
from peftlight.interop.tensor_files import TENSORS, sha256
from peftlight.merging.merging import CERTIFICATE


@dataclass
class Publication:
    """What is uploaded."""

    files: dict[str, Path | bytes]
    """By their names in the repository: a file as it is, or what stands in it there."""
    kind: str
    """The file that says what the repository holds."""
    card_is_ours: bool = True
    """Whether the card is as peftlight wrote it."""
    remarks: list[str] = field(default_factory=list)
    """What differs from the files here."""


def publication(folder: str | Path, base: str | None = None) -> Publication:
    """What of the adapter or the merged model in `folder` is uploaded, after its files were checked.

    Args:
        folder: of an adapter, of the run that trained it, or of a merged model.
        base: the name under which others find the adapter's base, where its record has another.

    Raises:
        UserError: there is neither, a file is damaged, or the base has no name that others could use.
    """
    folder = Path(folder)
    if (folder / MODEL_CONFIG).is_file():
        return _of_model(folder)
    try:
        files = read_files(folder, convert_pickle=False)
        folder = find_adapter(folder)
    except UserError as error:
        raise UserError(f"Cannot publish the adapter in {folder}: {error}") from None
    name = base or files.record.base.name
    _check_base(name)
    found = Publication({TENSORS: folder / TENSORS}, CONFIG)
    _add(found, folder / CONFIG, without_folders({**files.config, "base_model_name_or_path": name}))
    if (folder / metadata.FILE).exists():
        origin = read_json(folder / metadata.FILE)
        _add(found, folder / metadata.FILE, without_folders({**origin, **_base_in(origin, str(name))}))
    return _add_card(found, folder / CARD, model_card(folder, name))


def _check_base(name: str | None) -> None:
    if name is None:
        raise UserError("The adapter does not say which base it was trained on. Say what it is called on the hub: "
                        "--base USER/MODEL")  # fmt: skip
    if not is_public(name):
        raise UserError(f"The adapter's base is {name!r}, which is a file or folder of this machine: nobody else could "
                        "load it. Say what it is called on the hub: --base USER/MODEL")  # fmt: skip


def _base_in(origin: dict[str, Any], name: str) -> dict[str, Any]:
    """The record's base under its public name; a revision belongs to the name that it was recorded with."""
    if "base" not in origin:
        return {"base_model": name}  # of the first format
    base = origin["base"]
    return {"base": base if base.get("name") == name else {**base, "name": name, "revision": None}}


def _add(found: Publication, file: Path, content: dict[str, Any]) -> None:
    """Put the file among those found; where its content differs from what is to be said, that instead."""
    there = read_json(file)
    found.files[file.name] = file
    if content != there:
        found.files[file.name] = as_json(content).encode()
        changed = ", ".join(key for key in content if content[key] != there.get(key))
        found.remarks.append(
            f"{file.name} differs in {changed} from the one here: no path of this machine is published"
        )


def _add_card(found: Publication, card: Path, ours: str) -> Publication:
    """Put the card among those found: the one that a person wrote or changed, or else ours.

    Raises:
        UserError: a person's holds paths of this machine.
    """
    found.card_is_ours = not card.is_file() or is_untouched(card.read_bytes())
    found.files[CARD] = ours.encode() if found.card_is_ours else card
    if not found.card_is_ours and (told := paths_in(card.read_text(encoding="utf-8", errors="replace"))):
        raise UserError(f"{card} would tell everybody paths of this machine: {listed(told, 3)}. Take them out, or "
                        "delete the card: peftlight writes one.")  # fmt: skip
    return found


def _of_model(folder: Path) -> Publication:
    """The files that the certificate lists, which are still the ones that were compared with base and adapter."""
    if not (folder / CERTIFICATE).is_file():
        raise UserError(f"{folder} is no merged model: it has no {CERTIFICATE}. What `peftlight merge` writes has one.")
    certificate = read_json(folder / CERTIFICATE)
    hashes = certificate.get("files")
    if not isinstance(hashes, dict) or MODEL_CONFIG not in hashes:
        raise UserError(f"{folder / CERTIFICATE} does not list the files of the model: merge again.")
    found = Publication({}, MODEL_CONFIG)
    for name, digest in sorted(hashes.items()):
        file = folder / name
        if folder.resolve() not in file.resolve().parents or not file.is_file() or sha256(file) != digest:
            raise UserError(f"{file} is not the file that was merged and compared: merge again.")
        found.files[name] = file
    _add(found, folder / CERTIFICATE, without_folders(certificate))
    try:
        card = merged_card(certificate, model_config(folder))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{folder / CERTIFICATE} is no certificate of a merge ({error!r}): merge again.") from None
    return _add_card(found, folder / CARD, card)
