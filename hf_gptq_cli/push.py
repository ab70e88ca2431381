"""`hf-gptq push`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .app import Json, console, print_json


def push(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder of a GPTQ checkpoint.")],
    repo: Annotated[
        str, typer.Argument(metavar="REPO", help="Repository on the Hub: name or owner/name; made where it is missing.")
    ],
    private: Annotated[
        bool, typer.Option(help="Make a new repository private; refuse an existing public one.")
    ] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to commit to; made where it is missing.")] = None,
    create_pr: Annotated[bool, typer.Option(help="Open a pull request instead of committing.")] = False,
    message: Annotated[str, typer.Option(help="Of the commit.")] = "Upload model",
    base_model: Annotated[str, typer.Option(help="Hub name of the dense model, for the card.")] = "",
    license: Annotated[str, typer.Option(help="For the card; that of the base model by default.")] = "",
    tag: Annotated[list[str] | None, typer.Option(help="For the card; several times for several.")] = None,
    dry_run: Annotated[bool, typer.Option(help="Show the card and the files, send nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Publish a checkpoint on the Hub with a model card. It is inspected first.

    The token is that of `hf auth login` or HF_TOKEN. Interrupted, the same command goes on: files that have arrived
    are not sent again. A README.md of your own is kept; its metadata are completed.

    Examples:

    hf-gptq push ./smollm2-4bit me/smollm2-4bit --base-model HuggingFaceTB/SmolLM2-135M-Instruct

    hf-gptq push ./smollm2-4bit team/smollm2-4bit --private --revision 4bit-g64
    """
    from hf_gptq_plugin.hf.card import folder_card
    from hf_gptq_plugin.hf.push import published_files, push_folder

    if dry_run:
        card = folder_card(folder, repo, base_model, {"license": license} if license else None)
        files = [path.name for path in published_files(folder)]
        if as_json:
            print_json({"repo": repo, "files": files, "card": card})
            return
        console.print(card, highlight=False, soft_wrap=True)
        console.print(f"Files: {', '.join(files)}")
        return
    done = push_folder(
        folder, repo, private=private or None, revision=revision, create_pr=create_pr, message=message, tags=tag,
        base_model=base_model, license=license,
    )  # fmt: skip
    if as_json:
        print_json(vars(done))
        return
    console.print(f"{len(done.files)} files, {done.bytes / 1e6:.1f} MB, are in {done.repo_id}.")
    console.print(done.pull_request or done.url, soft_wrap=True, highlight=False)
