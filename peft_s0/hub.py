"""Pushing adapters to the Hugging Face Hub together with their model card."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi, ModelCard
from huggingface_hub.errors import EntryNotFoundError
from yaml import YAMLError

from .card import CARD_NAME, check_metrics, update_model_card


def push_to_hub(
    model: Any,
    repo_id: str,
    *,
    metrics: Mapping[str, float | str] | None = None,
    commit_message: str = "Upload S0 adapter",
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> CommitInfo:
    """Push a model's S0 adapters to the Hub, together with their model card.

    `model.push_to_hub` pushes the same states, but puts transformers' general card in place of the one that PEFT and S0
    write. A card that the repository has already is kept, and its section on S0 renewed.

    Args:
        model: the adapted model, a `PeftModel` or a transformers model.
        repo_id: the repository; it is made if it does not exist.
        metrics: what these states reach, for the card, such as `{"HumanEval pass@1": "72.2 %"}`.
        commit_message: message of the commit.
        private: whether a new repository is private. `None`: the default of its owner.
        token: token for the Hub. `None`: the stored one.
        revision: branch to push to; it is made if it does not exist. Or that of a pull request, such as "refs/pr/1".
        create_pr: open a pull request instead.

    Returns:
        The commit.

    Raises:
        TypeError: if the metrics are no names with texts or numbers.
        ValueError: if the model has no S0 adapter.
        OSError: if the repository's card cannot be read; nothing is pushed then.
    """
    check_metrics(metrics or {})
    if not any(config.peft_type == "S0" for config in getattr(model, "peft_config", {}).values()):
        raise ValueError(f"This {type(model).__name__} has no S0 adapter to push; make one with get_peft_model.")
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    # A pull request is there already, and what it says is for the branch that it will be merged into.
    branch = None if revision is None or revision.startswith("refs/") else revision
    if branch is not None:
        api.create_branch(repo_id, branch=branch, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        card = Path(folder, CARD_NAME)
        try:
            # Not from the cache, which gives an older one where the Hub does not answer.
            shutil.copyfile(api.hf_hub_download(repo_id, CARD_NAME, revision=revision, force_download=True), card)
        except EntryNotFoundError:
            earlier = None
        except ValueError as error:
            raise OSError(
                f"The model card of '{repo_id}' cannot be read ({error.__cause__}), so what is in it would be lost. "
                "Nothing was pushed; try again."
            ) from error
        else:
            try:
                earlier = ModelCard.load(card).data
            except (ValueError, YAMLError) as error:
                raise OSError(
                    f"The model card of '{repo_id}' is no text with metadata in YAML ({error}). Nothing was "
                    f"pushed; mend {CARD_NAME} there, or take it away."
                ) from error
        model.save_pretrained(folder)
        update_model_card(folder, repo_id=repo_id, revision=branch, metrics=metrics, earlier=earlier)
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=commit_message,
            revision=revision,
            create_pr=create_pr,
        )
