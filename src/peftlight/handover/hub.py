"""Adapters on the Hugging Face hub: their files fetched by name, and published in one commit."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftlight.errors import UserError, listed
from peftlight.handover.model_card import CARD, is_untouched
from peftlight.handover.public_names import is_hub_id
from peftlight.handover.publishing import Publication
from peftlight.interop import metadata
from peftlight.interop.folder import CONFIG
from peftlight.interop.tensor_files import TENSORS

_HARMLESS = re.compile(r"\.gitattributes|\.gitignore|README\.md|LICENSE.*|.*\.(png|jpg|svg)", re.IGNORECASE)
"""Files that say nothing about what a repository holds."""
_MEANING = {
    400: "It refuses what was sent.",
    401: "It does not know the token, or there is no such repository: make a token with the right to write at "
    "https://huggingface.co/settings/tokens, then `hf auth login`, or set HF_TOKEN.",
    403: "The token may not do this: it needs the right to write to this user's or organisation's repositories.",
    404: "There is no such repository, branch or file, or the token may not see it.",
    409: "Somebody else changed the repository in the meantime: run the command again.",
    412: "Somebody else changed the repository in the meantime: run the command again.",
    413: "It finds the files too large.",
    429: "There were too many requests: wait some minutes.",
}


@dataclass(frozen=True)
class Pushed:
    """What came of an upload."""

    url: str
    """Of the commit."""
    commit: str
    is_new: bool
    """Whether there was anything to change."""
    remarks: list[str]


def adapter_folder(name: str | Path, revision: str | None = None) -> Path:
    """The folder of an adapter: a path as it is; for a name on the hub, where its own files are in the hub's cache.

    Args:
        name: a path; or USER/NAME or USER/NAME@REVISION on the hub.
        revision: branch, tag or commit of the repository.

    Raises:
        UserError: there is no such adapter, or the hub cannot be reached.
    """
    repo, _, pinned = str(name).partition("@")
    # With a local folder before the slash, a misspelt path is far likelier than a hub user called like the folder.
    if Path(name).exists() or "/" not in repo or not is_hub_id(repo) or Path(repo).parent.is_dir():
        return Path(name)
    from huggingface_hub import HfApi
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    api, revision = HfApi(), revision or pinned or None
    with _explained(f"There is no folder {repo}, and it cannot be fetched from the hub"):
        config = Path(api.hf_hub_download(repo, CONFIG, revision=revision))
        # the commit of the first file, so that the others are of the same
        commit = config.parent.name
        api.hf_hub_download(repo, TENSORS, revision=commit)
        try:
            api.hf_hub_download(repo, metadata.FILE, revision=commit)
        except EntryNotFoundError as error:  # an adapter of HF PEFT has none
            if isinstance(error, LocalEntryNotFoundError):
                raise
    return config.parent


def push_files(found: Publication, repo: str, private: bool, revision: str | None, message: str | None) -> Pushed:
    """Upload the files in one commit; the repository and the branch are made if they are not there.

    Args:
        found: what is uploaded.
        repo: USER/NAME on the hub.
        private: whether nobody else may see it.
        revision: the branch; the main one if None.
        message: of the commit.

    Raises:
        UserError: the hub refuses, cannot be reached, or has something else in that repository.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token

    if "/" not in repo:
        raise UserError(f"The repository is called {repo!r}; expected USER/NAME, with your name on the hub.")
    if get_token() is None:
        raise UserError("The hub needs a token to write: make one at https://huggingface.co/settings/tokens, then "
                        "`hf auth login`, or set HF_TOKEN.")  # fmt: skip
    api = HfApi()
    with _explained(f"Nothing was published at {repo}"):
        there = _repository(api, repo, private, revision)
        _check_purpose(there, found, repo)
        files, remarks = dict(found.files), list(found.remarks)
        if found.card_is_ours and _has_card_of_a_person(api, there, repo):
            del files[CARD]
            remarks.append(f"{CARD} in the repository was changed by hand, and is kept")
        additions = [CommitOperationAdd(name, content) for name, content in files.items()]
        summary = message or f"Upload {'model' if found.kind != CONFIG else 'adapter'} with peftlight"
        commit = api.create_commit(repo, additions, commit_message=summary, revision=revision, parent_commit=there.sha)
    return Pushed(str(commit.commit_url), commit.oid, commit.oid != there.sha, remarks)


def _repository(api: Any, repo: str, private: bool, revision: str | None) -> Any:
    """What the hub knows of the repository's branch, after making what is missing."""
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        there = api.repo_info(repo)
    except RepositoryNotFoundError:
        api.create_repo(repo, private=private or None)
        there = api.repo_info(repo)
    if private and not there.private:
        raise UserError("It is there already, and is public: make it private on its page first, or leave out --private")
    if revision is None:
        return there
    try:
        return api.repo_info(repo, revision=revision)
    except RevisionNotFoundError:
        api.create_branch(repo, branch=revision)
        return api.repo_info(repo, revision=revision)


def _check_purpose(there: Any, found: Publication, repo: str) -> None:
    """See that the repository is empty, or holds an earlier version of the same kind of thing."""
    names = [file.rfilename for file in there.siblings or []]
    others = sorted(name for name in names if name not in found.files and not _HARMLESS.fullmatch(name))
    if others and found.kind not in names:
        raise UserError(
            f"It holds something else: {listed(others)}. Choose another name, or another branch: --revision"
        )


def _has_card_of_a_person(api: Any, there: Any, repo: str) -> bool:
    if CARD not in {file.rfilename for file in there.siblings or []}:
        return False
    return not is_untouched(Path(api.hf_hub_download(repo, CARD, revision=there.sha)).read_bytes())


@contextmanager
def _explained(failed: str) -> Iterator[None]:
    """Errors of the hub's client in our words."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{failed}. {error}") from None
    except Exception as error:  # the hub's client raises many unrelated kinds
        raise UserError(f"{failed}. {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    while type(error) is RuntimeError and error.__cause__ is not None:
        error = error.__cause__  # the client's wrapping of what befell an upload
    status = getattr(getattr(error, "response", None), "status_code", None)
    said = " ".join(str(error).split())[:300] or type(error).__name__
    if status is None:
        return f"{type(error).__name__}: {said}"
    meaning = "It has trouble of its own: try again later." if status >= 500 else _MEANING.get(status, "")
    return f"The hub answered {status}. {meaning}\n  {said}"
