"""Publish a checkpoint's folder on the Hub: looked at first, one commit, a card, and again after a dropped line."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError

from ..convert.inspect import inspect
from ..format.spec import CheckpointError
from .card import card_metadata, folder_card, inherited_metadata, merged_card, own_card

# What is never published: weights that can run code, which readers refuse, and what a run leaves beside a checkpoint.
_LEFT_OUT = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", ".*", "*.part", "*.journal", "*.tmp", "**/.*")


@dataclass(frozen=True)
class Pushed:
    """What was published.

    Args:
        repo_id: the repository, with its owner.
        url: of the commit.
        pull_request: its address, or "".
        files: names, sorted.
        bytes: of all of them.
    """

    repo_id: str
    url: str
    pull_request: str
    files: list[str]
    bytes: int


def published_files(folder: Path) -> list[Path]:
    """The files that are pushed, subfolders not included, sorted."""
    return [
        path
        for path in sorted(folder.iterdir())
        if path.is_file() and not any(path.match(pattern) for pattern in _LEFT_OUT)
    ]


def push_folder(
    folder: str | Path, repo_id: str, *, private: bool | None = None, revision: str | None = None,
    create_pr: bool = False, message: str | None = None, description: str | None = None,
    token: bool | str | None = None, tags: list[str] | None = None, base_model: str = "", license: str = "",
) -> Pushed:  # fmt: skip
    """Publish a GPTQ checkpoint.

    The folder is inspected first, and nothing is sent where something is wrong with it. Files that the Hub has already
    are not sent again: after a dropped connection the same call goes on. Weight files of an older version that are
    not in the folder are removed with the same commit. A README.md that somebody wrote keeps its text; its metadata are
    completed.

    Args:
        folder: the checkpoint.
        repo_id: `name` or `owner/name`; made where it does not exist.
        private: of a new repository. An existing public one is refused where this is True, for a pull request too.
        revision: branch to commit to, made where it does not exist; "main" by default.
        create_pr: open a pull request instead of committing; to an existing repository.
        message, description: of the commit.
        token: see `HfApi`.
        tags: for the card, beside its own.
        base_model: Hub name of the dense model, whatever a card says; what the folder's card says by default.
        license: whatever a card says; that of the folder's card or of the base model by default.

    Raises:
        CheckpointError: no GPTQ checkpoint, or one with problems, which are listed; a README.md that cannot be read.
        ValueError: options that contradict each other, a name that is none, a public repository.
        OSError: the Hub could not be reached or refused.
    """
    folder = Path(folder)
    if create_pr and revision not in (None, "main"):
        raise ValueError(f"create_pr and revision={revision!r} exclude each other: pull requests go to main")
    found = inspect(folder)
    if found.layout not in ("gptq", "gptq_v2"):
        raise CheckpointError(f"{folder} holds {found.layout}; GPTQ checkpoints are pushed: quantize or convert first")
    if found.problems:
        raise CheckpointError(
            f"{folder} is not published while something is wrong with it: {'; '.join(found.problems)}"
        )
    own_card(folder / "README.md")  # one that cannot be read is refused before a repository is made
    api = HfApi(token=token)
    try:
        return _pushed(
            api, folder, repo_id, private, revision, create_pr, message, description, tags, base_model, license
        )
    except HFValidationError as error:
        raise ValueError(f"{repo_id!r} is no name of a repository: {error}") from None
    except (ValueError, OSError):
        raise
    except Exception as error:  # the Hub's client has had several HTTP libraries, with errors of their own
        raise ConnectionError(
            f"pushing to {repo_id} was interrupted ({type(error).__name__}: {error}); push again: what has arrived is "
            "not sent twice"
        ) from error


def _pushed(
    api: HfApi, folder: Path, repo_id: str, private: bool | None, revision: str | None, create_pr: bool,
    message: str | None, description: str | None, tags: list[str] | None, base_model: str, license: str,
) -> Pushed:  # fmt: skip
    if not create_pr:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if private and api.model_info(repo_id).private is False:
        raise ValueError(f"{repo_id} exists and is public; make it private on the Hub first, or push without private")
    if revision not in (None, "main") and not str(revision).startswith("refs/"):  # never of a pull request
        api.create_branch(repo_id, branch=str(revision), exist_ok=True)
    files = published_files(folder)
    inherited = _of_base(api, base_model or str(card_metadata(folder / "README.md").get("base_model") or ""))
    stated = {"license": license} if license else {}
    card = folder_card(folder, repo_id, base_model, stated, inherited)
    with tempfile.TemporaryDirectory() as place:
        staging = Path(place)
        for path in files:
            _link(path, staging / path.name)
        (staging / "README.md").unlink(missing_ok=True)
        merged = merged_card(api, repo_id, card, revision, tags, base_model, stated)
        (staging / "README.md").write_bytes(merged.encode())
        names = sorted(path.name for path in staging.iterdir())
        size = sum(path.stat().st_size for path in staging.iterdir())
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=staging,
            commit_message=message or "Upload model",
            commit_description=description,
            revision=revision,
            create_pr=create_pr,
            delete_patterns=["model*.safetensors", "model.safetensors.index.json"],
        )
    return Pushed(repo_id, str(commit.commit_url), str(commit.pr_url or ""), names, size)


def _of_base(api: HfApi, base: str) -> dict[str, Any]:
    """Licence and languages of the base model's card; nothing where it cannot be read: the push does not need it."""
    if not base:
        return {}
    try:
        return inherited_metadata(card_metadata(Path(api.hf_hub_download(base, "README.md"))))
    except Exception:  # gated, renamed, offline
        return {}


def _link(path: Path, target: Path) -> None:
    """The same file under another name; a copy only where the file system has no links."""
    try:
        target.symlink_to(path.resolve())
    except OSError:
        shutil.copyfile(path, target)
